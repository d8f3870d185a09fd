"""Where a model looks when it writes a word: attention of the decoder to visual tokens, against the truth.

    read = attend(model, tokenizer, clips, store)    # a row for each word, shown frame and cell
    looks(read, truth_of(data_root, "cutaways"))     # does a word look at its own event more than chance?

Glossary: a caption's word is predicted at the position before it, so its attention is read there; weights are
means over heads and layers, and are divided by what goes to visual tokens at all, so that they sum to 1 over
the T shown frames and their 2 x 2 cells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel

from vqlora import scoring, stats
from vqlora.data.batches import ClipDataset, Layout, pad_rows, pixels
from vqlora.data.clips import Clip
from vqlora.data.kinemoji.language import ASIDE_MOTION
from vqlora.data.kinemoji.lexicon import VARIANTS, VERBS

COLUMNS = ["clip", "place", "word", "kind", "event", "shown", "frame", "cell", "weight", "layer"]
WORDS = {"object": "name of what moves", "motion": "what it does", "aside": "name in the spliced-in shot"}


def truth_of(data_root: str | Path, domain: str) -> dict[str, dict]:
    """The rendered truth of each clip of a domain by its id: events, actors with their cells, frames."""
    lines = (Path(data_root) / domain / "annotations" / "truth.jsonl").read_text(encoding="utf-8")
    return {told["video_id"]: told for told in map(json.loads, lines.splitlines())}


def attend(
    model: nn.Module, tokenizer, clips: Sequence[Clip], store, *, frames: int = 8, batch_size: int = 16
) -> pd.DataFrame:
    """Attention to the visual tokens while the first reference of each clip is read: COLUMNS.

    A row for each word (its `place` in the caption), shown frame and cell; `kind` and `event` say what the
    word tells (see `told_words`), "" and -1 for others. `layer` -1 is the mean over layers; single layers are
    given for words that tell something.
    """
    inner = scoring.below(model)
    for module in inner.modules():
        if isinstance(module, PreTrainedModel) and module._can_set_attn_implementation():
            module.set_attn_implementation("eager")          # the fused one gives no weights
    layout = Layout(tokenizer, inner.config.tokens_per_frame)
    data, tables = ClipDataset(clips, store, frames), []
    with scoring.scoring_mode(model):
        for start in range(0, len(data), batch_size):
            items = [data[n] for n in range(start, min(start + batch_size, len(data)))]
            prefix = layout.prefix(frames)
            told = [layout.caption(item.clip.captions["en"][0]) for item in items]
            rows = pad_rows([(prefix + given, learned) for given, learned in told], layout.pad)
            times = torch.from_numpy(np.stack([item.times for item in items]))
            out = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], frame_times=times,
                        pixel_values=pixels([item.frames for item in items]), output_attentions=True,
                        use_cache=False)  # fmt: skip
            layers = torch.stack([layer.float().mean(dim=1) for layer in out.attentions], dim=1)
            visual = layers[..., 1 : 1 + layout.tokens_per_frame * frames]  # [B, layers, L, T * cells]
            visual = visual / visual.sum(dim=-1, keepdim=True)
            for item, weights in zip(items, visual, strict=True):
                length = len(store[item.clip.id])
                tables.append(_words_of(item, length, weights[:, len(prefix) :].numpy(), frames))
    return pd.concat(tables, ignore_index=True)


def _words_of(item, length: int, weights: np.ndarray, frames: int) -> pd.DataFrame:
    """weights: [layers, positions from `<cap>` on, T * cells]; position n predicts word n."""
    words = item.clip.captions["en"][0].split()
    about = told_words(words, item.clip)
    numbers, cells = np.rint(item.times * (length - 1)).astype(int), weights.shape[-1] // frames
    shown, cell = np.repeat(np.arange(frames), cells), np.tile(np.arange(cells), frames)
    parts = []
    for place, word in enumerate(words):
        kind, event = about.get(place, ("", -1))
        pictures = {-1: weights[:, place].mean(axis=0)}
        pictures |= dict(enumerate(weights[:, place])) if kind else {}
        for layer, weight in pictures.items():
            parts.append(pd.DataFrame({
                "clip": item.clip.id, "place": place, "word": word, "kind": kind, "event": event,
                "shown": shown, "frame": numbers[shown], "cell": cell, "weight": weight, "layer": layer,
            }))  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def told_words(words: Sequence[str], clip: Clip) -> dict[int, tuple[str, int]]:
    """Which words of an English caption tell an event: place -> (kind of WORDS, number of the event).

    Of a name or a motion of several words it is the first, at which it is decided. An object's name occurs
    once in a clip; of equal motions each event has the one nearest to its name.
    """
    found: dict[int, tuple[str, int]] = {}
    for number, event in enumerate(clip.events or ()):
        names = _places(words, [event.name])
        if not names:
            continue
        found[names[0]] = ("aside" if event.motion == ASIDE_MOTION else "object", number)
        if event.motion != ASIDE_MOTION:
            phrases = [*VERBS["en"][event.motion], VARIANTS["en"][event.motion]]
            verbs = sorted(_places(words, phrases), key=lambda place: abs(place - names[0]))
            found |= {verbs[0]: ("motion", number)} if verbs else {}
    return found


def _places(words: Sequence[str], phrases: Sequence[str]) -> list[int]:
    parts = [phrase.split() for phrase in phrases]
    return [n for n in range(len(words)) if any(list(words[n : n + len(part)]) == part for part in parts)]


def shows(event: Mapping, numbers: Sequence[int], inserted: Sequence[int] = ()) -> np.ndarray:
    """Of the shown frames (numbers, sorted) those that show an event, or what it did since the one before.

    bool [T]. A lasting motion is seen in the difference of two frames, of which none need lie inside it. What
    is told of a spliced-in shot is seen in its frames, `inserted`.
    """
    now = np.asarray(numbers)
    before = np.concatenate([[-1], now[:-1]])
    if event["motion"] == ASIDE_MOTION:
        return np.isin(now, list(inserted))
    return (now >= event["start"]) & (before < event["end"])


def looks(read: pd.DataFrame, truth: Mapping[str, dict]) -> pd.DataFrame:
    """For each word that tells an event, how much of its attention goes where the event is: clip, layer,
    kind, what, share, even, others.

    what: "frames" that show the event, or the "cell" of the 2 x 2 grid in which it happens, in all frames.
    even: the share if all frames, or cells, had the same. others: the mean share that the same word gives to
    where events of the same place in the order of telling happen in other clips; words told first look
    earlier whatever there is to see, so this is the chance to beat. Words whose event is shown by no frame,
    or by all, are left out.
    """
    told = read[read["event"] >= 0]
    rows, windows = [], {}
    for (clip, layer, kind, number), own in told.groupby(["clip", "layer", "kind", "event"], sort=False):
        event = truth[clip]["events"][number]
        grid = own.sort_values(["shown", "cell"])["weight"].to_numpy().reshape(own["shown"].nunique(), -1)
        numbers = own.drop_duplicates("shown").sort_values("shown")["frame"].to_numpy()
        seen = shows(event, numbers, truth[clip]["inserted"])
        alike = (number, len(truth[clip]["events"]))
        rows.append((clip, layer, kind, "frames", alike, grid.sum(axis=1), seen))
        cells = {actor["name"]: actor["cell"] for actor in truth[clip]["actors"]}
        if event["name"] in cells:
            where = np.arange(grid.shape[1]) == cells[event["name"]]
            rows.append((clip, layer, kind, "cell", (number, 0), grid.sum(axis=0), where))
    rows = [row for row in rows if row[-1].any() and not row[-1].all()]
    for clip, _, kind, what, alike, _, where in rows:
        windows.setdefault((kind, what, alike), {})[clip] = where
    made = []
    for clip, layer, kind, what, alike, weight, where in rows:
        others = [weight[one].sum() for name, one in windows[kind, what, alike].items() if name != clip]
        chance = np.mean(others) if others else np.nan
        made.append((clip, layer, kind, what, weight[where].sum(), where.mean(), chance))
    return pd.DataFrame(made, columns=["clip", "layer", "kind", "what", "share", "even", "others"])


def looks_table(found: Mapping[str, pd.DataFrame], seed: int = 0) -> pd.DataFrame:
    """`looks` of several models as means over words: model, kind, what, metric (share_frac, even_frac,
    others_frac, gain_frac: share less others), value, low, high. Layers averaged.
    """
    rng, tables = np.random.default_rng(seed), []
    for model, own in found.items():
        own = own[own["layer"] == -1].dropna(subset="others").assign(seed=0, model=model)
        own = own.assign(gain=own["share"] - own["others"])
        for metric in ("share", "even", "others", "gain"):
            values = own.assign(value=own[metric])
            table = stats.summarise(values, rng, by=("model", "kind", "what"))
            tables.append(table.rename(columns={"mean": "value"}).assign(metric=f"{metric}_frac"))
    return pd.concat(tables, ignore_index=True)[["model", "kind", "what", "metric", "value", "low", "high"]]


def looks_tests(found: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """The claims, written down before the run: each kind of word looks at its own event more than at those of
    other clips. what, kind, metric, value, low, high, claim, p, p_holm, smallest_effect, verdict.
    """
    rng, rows = np.random.default_rng(seed), []
    own = found[found["layer"] == -1].dropna(subset="others").assign(seed=0)
    for (what, kind), words in own.assign(value=own["share"] - own["others"]).groupby(["what", "kind"]):
        gains = stats.crossed(words).to_numpy()
        middle = stats.interval(gains, rng)
        rows.append((what, kind, "gain_frac", middle.mean, middle.low, middle.high, "greater",
                     stats.claim_p(gains, "greater"), stats.smallest_effect(gains)))  # fmt: skip
    columns = ["what", "kind", "metric", "value", "low", "high", "claim", "p", "smallest_effect"]
    table = pd.DataFrame(rows, columns=columns)
    table["p_holm"] = stats.holm(table["p"])
    shown = table[["p_holm", "low", "high", "claim"]].itertuples(index=False)
    return table.assign(verdict=[stats.verdict(*row) for row in shown])


def by_layer(found: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Mean gain over chance (share less others) of each layer: model, kind, what, layer, gain."""
    parts = [own[own["layer"] >= 0].assign(model=model, gain=own["share"] - own["others"])
             for model, own in found.items()]  # fmt: skip
    return pd.concat(parts).groupby(["model", "kind", "what", "layer"], as_index=False)["gain"].mean()
