"""Many choices of frames of the same clips, read by one model: what they have in common is computed once.

    said = read_choices(model, tokenizer, clips, store, [(0, (3, 9)), (0, (3, 12))], references)
    said[0, (3, 9)].caption

Two things do not depend on which frames a frame is shown with: what the vision tower makes of it, and the
weights. So each frame goes through the tower once, and a choice takes its rows; and layers that compute in
float32 are read as plain ones, unpacked and with their LoRA updates added once (`plain_layers`). And where
scoring has shown that each token of a reference is the model's first choice, that reference is the greedy
caption, and nothing is left to decode. All of it gives what reading each choice by itself gives, up to
float32 rounding. Models whose layers look at the frames (gates), or that bring a prompt of their own, are
read choice by choice.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import bitsandbytes as bnb
import numpy as np
import torch
from peft.tuners import lora
from torch import nn

from vqlora import scoring
from vqlora.cache_rows import take_rows
from vqlora.data.batches import Item, Layout, frame_times, pixels
from vqlora.data.clips import Clip
from vqlora.evaluate import HELD_BYTES, Reader
from vqlora.held import Linear16
from vqlora.kinevlm import KineVLMForConditionalGeneration

Choice = tuple[int, tuple[int, ...]]
"""(number of the clip, numbers of its frames)."""
_TOWER_FRAMES, _NEW_TOKENS = 64, 48


class Told(NamedTuple):
    """Of one choice: the greedy caption, and the scores of the clip's references."""

    caption: str
    references: Sequence[scoring.Score]


def read_choices(model: nn.Module, tokenizer, clips: Sequence[Clip], store, choices: Sequence[Choice],
                 references: Mapping[str, Sequence[str]], batch_size: int = 64, *,
                 shared: bool = True) -> dict[Choice, Told]:
    """What the model says of each choice; equal ones are read once.

    store: decoded frames uint8 [T, H, W, 3] by clip id. references: captions by clip id. shared: False reads
    each choice from its pixels, through the layers as they are, whatever the model. To be called within
    `scoring.scoring_mode(model)`.
    """
    by_count: dict[int, list[Choice]] = {}  # a batch has one number of frames
    for choice in dict.fromkeys(choices):
        by_count.setdefault(len(choice[1]), []).append(choice)
    said: dict[Choice, Told] = {}
    if not (shared and frames_stand_alone(model)):
        for some in by_count.values():
            shown = [clips[owner] for owner, _ in some]
            items = [_item(clip, store[clip.id], frames)
                     for clip, (_, frames) in zip(shown, some, strict=True)]
            found = Reader(model, tokenizer, items, "en", _NEW_TOKENS).ask(shown, references, batch_size)
            said |= zip(some, (Told(one.caption, one.references) for one in found), strict=True)
        return said
    with plain_layers(model):
        reader = _SharedReader(model, tokenizer, clips, store, choices)
        for some in by_count.values():
            said |= zip(some, reader.ask(some, references, batch_size), strict=True)
    return said


def frames_stand_alone(model: nn.Module) -> bool:
    """Whether the vision tower is a KineVLM's, without adapters that look at what else is shown."""
    adapters = getattr(model, "peft_config", {}).values()
    bound = any(getattr(config, "reads_frames", False) or config.is_prompt_learning for config in adapters)
    return isinstance(scoring.below(model), KineVLMForConditionalGeneration) and not bound


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers that compute in float32 are plain ones with the same map: 4-bit weights unpacked,
    16-bit ones widened, LoRA updates added. Other layers stay as they are. All are put back."""
    children = [(parent, *child) for parent in model.modules() for child in parent.named_children()]
    swapped = [(parent, name, layer, plain) for parent, name, layer in children
               if (plain := _plain(layer)) is not None]
    try:
        for parent, name, _, plain in swapped:
            setattr(parent, name, plain)
        yield
    finally:
        for parent, name, layer, _ in swapped:
            setattr(parent, name, layer)


def _plain(layer: nn.Module) -> nn.Linear | None:
    """The same map as one float32 layer; None where there is none, or the layer is that already."""
    adapted = type(layer) in (lora.Linear, lora.Linear4bit)  # by type: others may add up otherwise
    base = layer.get_base_layer() if adapted else layer
    if isinstance(base, bnb.nn.Linear4bit) and base.compute_dtype == torch.float32:
        weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).float()
    elif isinstance(base, Linear16) or (adapted and type(base) is nn.Linear and _is_float32(base)):
        weight = base.weight.float()
    else:
        return None
    if adapted and not (layer.merged or layer.disable_adapters):
        for name in set(layer.active_adapters) & set(layer.lora_A):
            if name in layer.lora_variant or layer.lora_bias[name]:
                return None  # not a plain sum: DoRA and others
            weight = weight + layer.get_delta_weight(name)
    plain = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = None if base.bias is None else nn.Parameter(base.bias.float(), requires_grad=False)
    return plain


def _is_float32(layer: nn.Linear) -> bool:
    return layer.weight.dtype == torch.float32


class _SharedReader:
    """Reads choices whose frames have all been through the vision tower: `features[owner, frame]` [N, W]."""

    def __init__(self, model: nn.Module, tokenizer, clips: Sequence[Clip], store,
                 choices: Sequence[Choice]) -> None:
        self.model, self.inner, self.clips = model, scoring.below(model), clips
        self.layout = Layout(tokenizer, self.inner.config.tokens_per_frame)
        self.lengths = [len(store[clip.id]) for clip in clips]
        self.features = _features(self.inner, clips, store, choices)
        self.device = next(model.parameters()).device

    def ask(self, choices: Sequence[Choice], references: Mapping[str, Sequence[str]],
            batch_size: int) -> list[Told]:
        """What the model says of each choice, in their order; all have equally many frames."""
        trees = [self._tree(references[self.clips[owner].id]) for owner, _ in choices]
        order = sorted(range(len(choices)), key=lambda k: trees[k].length)
        scores, tokens, waiting = [()] * len(choices), [()] * len(choices), []
        for first in range(0, len(order), batch_size):
            batch = order[first:first + batch_size]
            cache = self._encode([choices[k] for k in batch])
            rows = scoring.score(self.model, cache, [[trees[k]] for k in batch], self.layout.pad)
            undecided = []
            for row, (k, (found,)) in enumerate(zip(batch, rows, strict=True)):
                scores[k] = found
                right = next((n for n, score in enumerate(found) if score.hits == score.tokens), None)
                if right is None:
                    undecided.append(row)
                else:
                    tokens[k] = trees[k].branches[right][:-1][:_NEW_TOKENS]
            if undecided:
                take_rows(cache, undecided)
                waiting.append(([batch[row] for row in undecided], cache))
            held_bytes = sum(scoring.cache_bytes(cache) for _, cache in waiting)
            if waiting and (held_bytes > HELD_BYTES or batch[-1] == order[-1]):
                ks = [k for some, _ in waiting for k in some]
                told = self._decode(scoring.join([cache for _, cache in waiting]), len(ks))
                for k, one in zip(ks, told, strict=True):
                    tokens[k] = one
                waiting = []
        texts = self.layout.tokenizer.batch_decode([list(some) for some in tokens], skip_special_tokens=True)
        return [Told(text, found) for text, found in zip(texts, scores, strict=True)]

    def _tree(self, captions: Sequence[str]) -> scoring.Item:
        rows = [self.layout.caption(text) for text in captions]
        return scoring.Item(tuple(rows[0][0]), tuple(tuple(learned) for _, learned in rows))

    def _encode(self, choices: Sequence[Choice]):
        """Key/value cache of the visual prefix of each choice."""
        rows = [self.features[owner, frame] for owner, frames in choices for frame in frames]
        times = [frame_times(np.array(frames), self.lengths[owner]) for owner, frames in choices]
        times = torch.from_numpy(np.stack(times)).to(self.device)
        visual = self.inner.model.multi_modal_projector(torch.stack(rows), times)
        ids = torch.tensor([self.layout.prefix(times.shape[1])] * len(choices), device=self.device)
        embeds = self.inner.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids == self.layout.image)[..., None], visual.to(embeds.dtype))
        return self.model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).past_key_values

    def _decode(self, cache, rows: int) -> list[list[int]]:
        stems = [(self.layout.cap,)] * rows
        return scoring.greedy(self.model, cache, stems, self.layout.eos, _NEW_TOKENS)


def _features(inner: nn.Module, clips: Sequence[Clip], store, choices: Sequence[Choice]) -> dict:
    """Features [N, W] by (clip, frame), of all frames chosen, as the model's own forward has them."""
    tower, found, wanted = inner.model.vision_tower, {}, {}
    weight = tower.stem.conv3.weight
    for owner, frames in choices:
        wanted.setdefault(owner, set()).update(frames)
    for owner, frames in wanted.items():
        film, frames = store[clips[owner].id], sorted(frames)
        for start in range(0, len(frames), _TOWER_FRAMES):
            some = frames[start:start + _TOWER_FRAMES]
            rows = tower(pixels([film[some]])[0].to(weight.device, weight.dtype))
            found |= zip(((owner, frame) for frame in some), rows, strict=True)
    return found


def _item(clip: Clip, film: np.ndarray, frames: Sequence[int]) -> Item:
    return Item(clip, film[list(frames)], frame_times(np.array(frames), len(film)), 0, 0)
