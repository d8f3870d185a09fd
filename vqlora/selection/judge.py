"""What a choice of frames is worth: one model, trained on mixed frames, evaluated under every policy.

    found = judge(model, tokenizer, {"test": (clips, store)}, ("uniform", "packets"), counts=(4, 8))
    found.examples.groupby(["policy", "frames"])["nll"].mean()

Every policy sees the same model, clips and references, so that only the frames differ. `ORACLES` are designs
that know where the events lie; the best of them on validation is the oracle that policies are held against:
any one alone is no ceiling.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import nn

from vqlora import metrics, scoring
from vqlora.data.batches import footage_of, pixels
from vqlora.data.clips import Clip
from vqlora.evaluate import Evaluation, references_of
from vqlora.frames import select
from vqlora.frames.policies import Footage, Policy, policy
from vqlora.selection.reading import Choice, read_choices

COLUMNS = ("part", "clip", "policy", "frames", "nll", "slot", "exact", "seen")


def _told(footage: Footage):
    return sorted(footage.events or (), key=lambda event: (event.start, event.end))


def _edges(footage: Footage, k: int, rng) -> np.ndarray:
    """Just before and just after each event, as far as k goes; the rest evenly."""
    n = footage.n_frames
    spots = [s for e in _told(footage) for s in (min(e.end, n - 1), max(e.start - 1, 0))]
    return select.filled(np.array(sorted(dict.fromkeys(spots[:k])), np.int64), n, k)


def _spans(footage: Footage, k: int, rng) -> np.ndarray:
    """Evenly over the frames of all events, one frame of margin on either side."""
    n, inside = footage.n_frames, np.zeros(footage.n_frames, bool)
    for event in _told(footage):
        inside[max(event.start - 1, 0):event.end + 1] = True
    there = np.flatnonzero(inside)
    return select.filled(there[select.uniform(len(there), k)] if len(there) else there, n, k)


def _half(footage: Footage, k: int, rng) -> np.ndarray:
    """Half of the frames on the events, half where they leave the widest gaps."""
    chosen = select.cover(footage.n_frames, -(-k // 2), footage.events or ())
    return select.filled(chosen, footage.n_frames, k)


ORACLES: dict[str, Policy] = {"oracle-cover": policy("cover"), "oracle-edges": _edges, "oracle-spans": _spans,
                              "oracle-half": _half}


def judge(model: nn.Module, tokenizer, parts: Mapping[str, tuple[Sequence[Clip], object]],
          policies: Sequence[str], counts: Sequence[int], *, exact: nn.Module | None = None, seed: int = 0,
          batch_size: int = 64) -> Evaluation:
    """Evaluate `model` on the clips of each part under every policy with every number of frames in `counts`.

    parts: name -> (clips, store of their decoded frames). policies: names of `vqlora.frames.policies`,
    "encoder", or "oracles" for all `ORACLES`. exact: the same model without quantization, for the policy
    "encoder": frames that quantization moves further than they differ are one to it. seed: of "random".

    Returns examples with the columns `COLUMNS`: nats per token of the references, slot and exact accuracy of
    the greedy caption, and the share of true events that some chosen frame shows. What several choices share
    is read once (`vqlora.selection.reading`). Raises ValueError for a policy or clip that does not fit.
    """
    rules = {name: None if name == "encoder" else policy(name) for name in policies if name != "oracles"}
    rules |= ORACLES if "oracles" in policies else {}
    if "encoder" in rules and exact is None:
        raise ValueError("policy 'encoder' needs the unquantized model as well")
    tables = []
    with scoring.scoring_mode(model):
        for part, (clips, store) in parts.items():
            clips = [replace(clip, questions=()) for clip in clips if clip.id in store]
            footage = [footage_of(clip, store[clip.id]) for clip in clips]
            if "encoder" in rules:
                rules["encoder"] = _encoder(model, exact, clips, store)
            chosen = {(name, count, n): rule(shown, count, np.random.default_rng((seed, n)))
                      for count in counts for name, rule in rules.items() for n, shown in enumerate(footage)}
            choices = [(n, tuple(frames.tolist())) for (_, _, n), frames in chosen.items()]
            found = _worth(model, tokenizer, clips, store, choices, batch_size)
            for (name, count, n), choice in zip(chosen, choices, strict=True):
                tables.append((part, clips[n].id, name, count, *found[choice], _seen(clips[n], choice[1])))
    table = pd.DataFrame(tables, columns=list(COLUMNS))
    return Evaluation({"clips": float(sum(len(clips) for clips, _ in parts.values()))}, table)


def _worth(model, tokenizer, clips, store, choices: Sequence[Choice], batch_size: int) -> dict:
    """(nll, slot, exact) of each choice of frames."""
    from vqlora.data.kinemoji.language import parse

    references = references_of(clips, "en")
    said = read_choices(model, tokenizer, clips, store, choices, references, batch_size)
    parser = partial(parse, language="en")
    truths = [parser(references[clips[owner].id][0]) for owner, _ in said]
    right = metrics.event_accuracy([one.caption for one in said.values()], truths, parser)
    nll = [float(np.mean([-s.logp / s.tokens for s in one.references])) for one in said.values()]
    return dict(zip(said, zip(nll, right["slot"], right["exact"], strict=True), strict=True))


def _seen(clip: Clip, chosen: Sequence[int]) -> float:
    if not clip.events:
        return float("nan")
    frames = np.array(chosen)
    return float(np.mean([bool(((frames >= e.start) & (frames < e.end)).any()) for e in clip.events]))


def _encoder(model: nn.Module, exact: nn.Module, clips: Sequence[Clip], store) -> Policy:
    """Farthest point on the features of the model's own vision tower, down to what quantization blurs."""
    held = {f"clip {clip.id}": _tower(model, store[clip.id]) for clip in clips}
    blur = [held[f"clip {clip.id}"] - _tower(exact, store[clip.id]) for clip in clips[:16]]
    resolution = float(np.median(np.concatenate([np.abs(moved).mean(axis=1) for moved in blur])))
    return lambda footage, k, rng: select.tell_apart(held[footage.name], k, resolution)


def _tower(model: nn.Module, frames: np.ndarray) -> np.ndarray:
    """Features float32 [T, d] of all frames by the vision tower, adapters switched off."""
    tower = scoring.below(model).model.vision_tower
    weight = tower.stem.conv3.weight
    with torch.no_grad(), model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        features = tower(pixels([frames]).flatten(0, 1).to(weight.device, weight.dtype))
    return features.flatten(1).float().cpu().numpy()
