"""What a video-language model says of a clip whose visual prefix it has read once.

Glossary: B rows (clips), P cached positions, L packed positions, V vocabulary, E retrieval width. The prefix
of a clip (its visual tokens) goes through the model once and stays in a key/value cache. All text that is to
be scored hangs on it as trees: an `Item` is a stem (the question) with branches (the choices), and all items
of a clip lie in one packed row whose 4-D attention mask lets a token see the prefix, its stem and its own
branch, at the positions it would have alone. That gives the scores of separate rows without copying the cache
or reading a stem twice.

Only stock interfaces are used: `forward` with `past_key_values`, `attention_mask` and `position_ids`, and the
output head.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqlora.cache_rows import join_rows, take_rows


@dataclass(frozen=True)
class Item:
    """Token ids of a `stem` (at least one) and of the `branches` (at least one each) that continue it."""

    stem: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.stem or not all(self.branches):
            raise ValueError(f"an item needs a stem and non-empty branches, got {self.stem}, {self.branches}")

    @property
    def length(self) -> int:
        """Positions it takes in a packed row: the last token of a branch predicts nothing and is not read."""
        return len(self.stem) + sum(len(branch) - 1 for branch in self.branches)


@dataclass(frozen=True)
class Score:
    """Of one branch: summed log-likelihood (nats), tokens that were the model's first choice, all tokens."""

    logp: float
    hits: int
    tokens: int


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module is put back into the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def below(model: nn.Module) -> nn.Module:
    """The model below a peft wrapper, adapters in it: prefix tuning comes before a clip once, not again."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def encode(model: nn.Module, prefix: Sequence[int], pixel_values: Tensor, frame_times: Tensor,
           frame_features: Tensor | None = None, sound: Tensor | None = None):
    """Read clips once: (key/value cache of B rows, retrieval vectors [B, E]).

    prefix: token ids every clip starts with; pixel_values [B, T, 3, H, W]; frame_times [B, T]; frame_features
    [B, T, n] for adapters whose gates read them; sound [B, S, bands] of models that listen.
    """
    ids = torch.tensor([list(prefix)] * len(pixel_values), device=pixel_values.device)
    seen = {"pixel_values": pixel_values, "frame_times": frame_times}
    if frame_features is not None:
        seen["frame_features"] = frame_features
    if sound is not None:
        seen["sound"] = sound
    out = model(input_ids=ids, **seen, use_cache=True, logits_to_keep=1)
    return out.past_key_values, below(model).embed(out.last_hidden_state, ids)


def embed_texts(model: nn.Module, rows: Sequence[Sequence[int]], pad: int, batch_size: int = 256) -> Tensor:
    """Retrieval vectors [N, E] of text-only rows of token ids, padded on the right, batched by length."""
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    vectors: list[Tensor | None] = [None] * len(rows)
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        width = len(rows[chunk[-1]])
        ids = torch.tensor([[*rows[i], *[pad] * (width - len(rows[i]))] for i in chunk], device=device)
        mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in chunk], device=device)
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        for i, vector in zip(chunk, below(model).embed(out.last_hidden_state, ids), strict=True):
            vectors[i] = vector
    return torch.stack(vectors)


def score(model: nn.Module, cache, rows: Sequence[Sequence[Item]], pad: int) -> list[list[list[Score]]]:
    """Scores [row][item][branch] of the items of each row behind its cached prefix. The cache is left as it
    was.
    """
    inner, past = below(model), cache.get_seq_length()
    packed = [_pack(items) for items in rows]
    width = max(len(p.ids) for p in packed)
    if width == 0:
        return [[] for _ in rows]
    device = next(model.parameters()).device

    def padded(name: str, fill: int) -> Tensor:
        lines = [getattr(p, name) for p in packed]
        return torch.tensor([[*line, *[fill] * (width - len(line))] for line in lines], device=device)

    ids, places = padded("ids", pad), padded("places", 0)
    item, branch = padded("item", -1), padded("branch", -1)
    before = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    seen = before & (item[:, :, None] == item[:, None, :])
    seen &= ((branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :]))
    head = inner.get_output_embeddings()
    prefix = torch.ones(len(rows), width, past, dtype=torch.bool, device=device)
    mask = torch.cat([prefix, seen], dim=2)[:, None]
    if inner.config.get_text_config()._attn_implementation != "sdpa":  # the others add it
        mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, torch.finfo(torch.float32).min)
    behind = {"attention_mask": mask, "position_ids": past + places, "past_key_values": cache}
    out = inner(input_ids=ids, **behind, use_cache=True, logits_to_keep=1)
    cache.crop(-width)
    # A crop is a view; this copy lets go of the packed positions.
    cache.batch_select_indices(torch.arange(len(rows), device=device))

    # Each position that predicts goes through the head once, though several branches may start there.
    wanted = [(r, *prediction) for r, p in enumerate(packed) for prediction in p.predictions]
    row, column, target, slot = torch.tensor(wanted, device=device).T
    spots, which = torch.unique(row * width + column, return_inverse=True)
    logits = head(out.last_hidden_state.flatten(0, 1)[spots]).float()
    logp = logits[which, target] - logits.logsumexp(-1)[which]
    hits = (logits.argmax(-1)[which] == target).float()
    firsts = torch.tensor([0, *(len(p.sizes) for p in packed)]).cumsum(0)
    index = slot + firsts[:-1].to(device)[row]
    sums = torch.zeros(2, int(firsts[-1]), dtype=torch.float64, device=device)
    sums.index_add_(1, index, torch.stack([logp, hits]).double())
    totals, counts = sums.tolist()
    sizes = [size for p in packed for size in p.sizes]
    flat = iter(Score(t, int(h), n) for t, h, n in zip(totals, counts, sizes, strict=True))
    return [[[next(flat) for _ in one.branches] for one in items] for items in rows]


@dataclass
class _Packed:
    ids: list[int]
    places: list[int]  # position behind the prefix
    item: list[int]
    branch: list[int]  # 0 the stem, else 1 + branch number
    predictions: list[tuple[int, int, int]]  # (column that predicts, token, number of the branch in the row)
    sizes: list[int]  # tokens of each branch


def _pack(items: Sequence[Item]) -> _Packed:
    row = _Packed([], [], [], [], [], [])
    for number, one in enumerate(items):
        depth = len(one.stem)
        row.ids += one.stem
        row.places += range(depth)
        row.item += [number] * one.length
        row.branch += [0] * depth
        root = len(row.ids) - 1
        for which, tokens in enumerate(one.branches, start=1):
            start, slot = len(row.ids), len(row.sizes)
            row.ids += tokens[:-1]
            row.places += range(depth, depth + len(tokens) - 1)
            row.branch += [which] * (len(tokens) - 1)
            row.predictions += [(start + k - 1 if k else root, token, slot) for k, token in enumerate(tokens)]
            row.sizes.append(len(tokens))
    return row


def greedy(
    model: nn.Module, cache, stems: Sequence[Sequence[int]], eos: int, max_new_tokens: int
) -> list[list[int]]:
    """The likeliest next token again and again behind prefix and stem of each row, up to `eos` (not
    included).

    Stems may differ in length: all rows go forward one token at a time, fed from the stem as long as it
    lasts. Rows that have ended leave the batch. The cache is used up.
    """
    inner, past = below(model), cache.get_seq_length()
    device = next(model.parameters()).device
    told: list[list[int]] = [[] for _ in stems]
    alive = list(range(len(stems)))
    feed = [stem[0] for stem in stems]
    for step in range(max(map(len, stems)) + max_new_tokens - 1):
        ids = torch.tensor(feed, device=device)[:, None]
        behind = {"position_ids": torch.full_like(ids, past + step), "past_key_values": cache}
        out = inner(input_ids=ids, **behind, use_cache=True, logits_to_keep=1)
        likeliest = out.logits[:, -1].argmax(-1).tolist()
        kept, feed = [], []
        for k, (row, token) in enumerate(zip(alive, likeliest, strict=True)):
            if step + 1 < len(stems[row]):
                token = stems[row][step + 1]
            elif token == eos:
                continue
            else:
                told[row].append(token)
                if len(told[row]) == max_new_tokens:
                    continue
            kept.append(k)
            feed.append(token)
        if not kept:
            break
        if len(kept) < len(alive):
            take_rows(cache, kept)
            alive = [alive[k] for k in kept]
    return told


def cache_bytes(cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def join(caches: Sequence):
    """One cache with the rows of all, in order; all must have equally many positions. Changes the first."""
    first = caches[0]
    join_rows(caches, into=first)
    for index, layer in enumerate(first.layers):
        layer.keys = torch.cat([cache.layers[index].keys for cache in caches])
        layer.values = torch.cat([cache.layers[index].values for cache in caches])
    return first


def rows_of(cache, rows: Sequence[int]):
    """A copy of the cache with the given rows, in this order; a row may be taken several times."""
    chosen = copy.deepcopy(cache)
    take_rows(chosen, rows)
    return chosen
