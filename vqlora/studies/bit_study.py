"""What notebook 08 asks of the base: what each layer loses in few bits, and bases in mixed and fewer bits.

    layers = layer_table(here.base, here.data, clips=64)          # layer, modality, error_nf4, .., harm
    bases, held = make_bases(here.base, here.build / "bits", layers, settings)
    runs = run_grid(settings.frozen_runs(bases), here.store, here.profile)

Bases that `load_quantized` does not make by itself (some layers kept in 16 bits, simulated bits) are saved as
folders, so that a run takes them as it takes any base.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from vqlora import comparison, stats
from vqlora.base import load_base
from vqlora.cost import parameter_count, static_bytes, tensor_bytes
from vqlora.data.batches import ClipDataset, Collator
from vqlora.data.cache import FrameStore
from vqlora.data.formats import load_kinemoji
from vqlora.losses import batch_loss
from vqlora.mixed_bits import expected_harm, keep_in_16bit, linear_bytes
from vqlora.modalities import describe
from vqlora.quantize import BITS, BLOCK, load_quantized
from vqlora.ranks import quantization_errors, signals
from vqlora.store import StoredRun

PACKED = ("int8", "nf4", "fp4")
SIMULATED = (3, 2)
METRICS = ("nll", "slot_frac", "token_accuracy_frac", "exact_frac", "qa_frac")


@dataclass(frozen=True)
class Base:
    """A base to score or tune: its name in tables, the bits it is loaded in, `released` or a folder."""

    label: str
    bits: str
    source: str
    seed: int = 0


def layer_table(base: str, data_root: str | Path, clips: int) -> pd.DataFrame:
    """What quantization takes from each layer that is quantized in 4 bits, in the model's order.

    Returns:
        layer, modality, entries (weights), error_<bits> (||W - Q(W)|| / ||W||) in nf4, fp4, int8 and
        simulated int3 and int2, fisher (trace, from loss gradients of single clips), and harm_nf4, the
        expected rise of the loss in nats a token (`mixed_bits.expected_harm`).
        Gradients are the 16-bit base's on the last `clips` source validation clips.
    """
    model, tokenizer = load_base(base)
    known = describe(model)
    names = list(load_quantized(copy.deepcopy(model), "nf4", device="cpu").vqlora_precision.quantized)
    errors = {bits: quantization_errors(model, names, bits) for bits in PACKED}
    weights = {name: _half(model.get_submodule(name).weight) for name in names}
    norms = {name: float(weight.square().sum()) for name, weight in weights.items()}
    for bits in SIMULATED:
        errors[f"int{bits}"] = {
            name: float((weight - simulate(weight, bits)).square().sum()) for name, weight in weights.items()
        }
    batches = _single_clips(model, tokenizer, Path(data_root), clips)
    found = signals.gradients(model, names, batches, lambda m, b: batch_loss(m, b, 0.0)[0], each=True)
    fisher = found.energy()
    harm = expected_harm(model, errors["nf4"], fisher)
    rows = [
        {"layer": name, "modality": known.of(name), "entries": weights[name].numel()}
        | {f"error_{bits}": math.sqrt(found[name] / norms[name]) for bits, found in errors.items()}
        | {"fisher": fisher[name], "harm_nf4": harm[name]}
        for name in names
    ]
    return pd.DataFrame(rows)


def simulate(weight: Tensor, bits: int) -> Tensor:
    """`weight` [d_out, d_in] rounded to 2^bits evenly spaced values between least and largest of each 64.

    A simulation: no such format is stored or multiplied here. Round to nearest, group-wise and asymmetric, as
    the baseline of GPTQ (Frantar et al. 2022, arXiv:2210.17323). d_in must be a multiple of 64.

    >>> len(simulate(torch.linspace(0, 1, 64)[None], 2).unique())
    4
    """
    if weight.shape[-1] % BLOCK or not 1 <= bits <= 8:
        raise ValueError(
            f"weight: {tuple(weight.shape)} in {bits} bits; allowed: rows of a multiple of {BLOCK}, 1 to 8"
        )
    groups = weight.unflatten(-1, (-1, BLOCK))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    return (low + step * ((groups - low) / step).round()).flatten(-2)


def mixed(model: nn.Module, layers: pd.DataFrame, percent: float, rng: np.random.Generator | None = None):
    """Names of the layers to keep in 16 bits for `percent` of the memory between NF4 and 16 bits throughout.

    By expected harm for each byte; with `rng`, at random: the control, under the same budget.
    """
    names = list(layers["layer"])
    price = [linear_bytes(model.get_submodule(n), "bf16") - linear_bytes(model.get_submodule(n), "nf4")
             for n in names]  # fmt: skip
    worth = layers["harm_nf4"] if rng is None else rng.random(len(names)) * price
    return keep_in_16bit(model, sum(price) * percent / 100, dict(zip(names, worth, strict=True)))


def make_bases(
    base: str, folder: str | Path, layers: pd.DataFrame, settings
) -> tuple[list[Base], pd.DataFrame]:
    """All bases of notebook 08, those that need it saved below `folder`, and what each holds.

    settings: a `vqlora.experiments.BitsSettings`; its `mixed`, `draws` and `simulated` are read. Labels are
    bf16, int8, nf4, fp4, mixed-25 (per cent of the memory between NF4 and 16 bits), random-25 (several
    draws: seeds), int3.

    Returns:
        the bases; and a table label, seed, weight_bytes (of the whole model), constant_bytes, linear_bits (a
        weight of the layers that are quantized, constants counted), kept (layers in 16 bits), origin.
    """
    bases, rows = [], []
    for bits in BITS:
        model = load_quantized(load_base(base)[0], bits, device="cpu")
        bases.append(Base(bits, bits, base))
        rows.append({"label": bits, "seed": 0, **_held(model, layers), "origin": "bitsandbytes"})
    exact = load_base(base)[0]
    for percent in settings.mixed:
        draws = [("random", n, np.random.default_rng(n)) for n in range(settings.draws)]
        for name, seed, rng in (("mixed", 0, None), *draws):
            kept = mixed(exact, layers, percent, rng)
            model, tokenizer = load_base(base)
            model = load_quantized(model, "nf4", skip=kept, device="cpu")
            label = f"{name}-{percent}"
            bases.append(Base(label, "nf4", _save(model, tokenizer, Path(folder, f"{label}-{seed}")), seed))
            rows.append({"label": label, "seed": seed, **_held(model, layers), "origin": "bitsandbytes"})
    for bits in settings.simulated:
        model, tokenizer = load_base(base)
        with torch.no_grad():
            for name in layers["layer"]:
                weight = model.get_submodule(name).weight
                weight.copy_(simulate(_half(weight), bits))
        label = f"int{bits}"
        bases.append(Base(label, "bf16", _save(model.bfloat16(), tokenizer, Path(folder, label))))
        rows.append({"label": label, "seed": 0, **_would_hold(rows[BITS.index("bf16")], layers, bits)})
    return bases, pd.DataFrame(rows)


def bit_claims(margin_nll: float, methods: Sequence[str]) -> list[dict]:
    """The comparisons planned for every domain, on NLL; of them those between `methods` that there are."""
    same = [{"a": bits, "b": "bf16", "claim": "equivalent", "margin": margin_nll} for bits in PACKED]
    better = [{"a": a, "b": b, "claim": "greater"} for a, b in (("mixed-25", "nf4"), ("bf16", "int2"))]
    claims = [*same, *better]
    return [claim for claim in claims if {claim["a"], claim["b"]} <= set(methods)]


def judge_bits(frozen: Sequence[StoredRun], tuned: Sequence[StoredRun], margin_nll: float) -> pd.DataFrame:
    """`comparison.judge` of the planned claims on the frozen and the tuned runs, Holm over all together."""
    parts = []
    for runs in (frozen, tuned):
        claims = bit_claims(margin_nll, [run.settings.method for run in runs])
        parts += [comparison.judge(runs, claims)] if claims else []
    return stats.corrected(pd.concat(parts, ignore_index=True))


def bit_summary(frozen: Sequence[StoredRun], tuned: Sequence[StoredRun], held: pd.DataFrame) -> pd.DataFrame:
    """Keyed numbers: domain, arm, metric, value, low, high. Domain `held` has what each base holds, mean over
    draws; `source` the frozen base, the others tuned ones; `tuned` how many seeds those have."""
    scores = pd.concat([comparison.summarise(runs, metrics=METRICS) for runs in (frozen, tuned)])
    means = held.groupby("label", sort=False)[["weight_bytes", "constant_bytes", "linear_bits"]].mean()
    rows = means.rename_axis("arm").reset_index().melt("arm", var_name="metric").assign(domain="held")
    seeds = {"domain": "tuned", "arm": "all", "metric": "seeds_count",
             "value": len({run.settings.seed for run in tuned})}  # fmt: skip
    return pd.concat([scores[scores["metric"].isin(METRICS)], rows, pd.DataFrame([seeds])])[
        ["domain", "arm", "metric", "value", "low", "high"]
    ]


def _held(model: nn.Module, layers: pd.DataFrame) -> dict[str, float]:
    """Bytes of a model before its first forward; bits a weight of the layers in `layers`."""
    found = static_bytes(model)
    params = {name: model.get_submodule(name).weight for name in layers["layer"]}
    kept = sum(p.dtype == torch.bfloat16 for p in params.values())
    linear = sum(map(tensor_bytes, params.values())) / sum(map(parameter_count, params.values()))
    return {"weight_bytes": found["total"], "constant_bytes": found["constants"], "linear_bits": 8 * linear,
            "kept": kept}  # fmt: skip


def _would_hold(exact: Mapping, layers: pd.DataFrame, bits: int) -> dict:
    """What simulated bits would take, were they packed: codes, and 16 bits each for step and offset of 64."""
    entries, scales = int(layers["entries"].sum()), 4 / BLOCK
    total = exact["weight_bytes"] - entries * (2 - bits / 8 - scales)
    return {"weight_bytes": round(total), "constant_bytes": round(entries * scales),
            "linear_bits": bits + 8 * scales, "kept": 0, "origin": "simulation"}  # fmt: skip


def _save(model: nn.Module, tokenizer, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _half(weight: Tensor) -> Tensor:
    """A weight's 16-bit values in float32, as `load_quantized` takes them."""
    return weight.detach().to(torch.bfloat16).float()


def _single_clips(model: nn.Module, tokenizer, data_root: Path, count: int):
    """Batches of one clip each, of the last `count` clips of source validation."""
    clips = load_kinemoji(data_root, "source", "val").clips
    data = ClipDataset(clips, FrameStore(clips, data_root / "cache", progress=False), seed=0)
    collator = Collator(tokenizer, seed=0, tokens_per_frame=getattr(model.config, "tokens_per_frame", 4))
    return (collator([data[n]]) for n in range(len(data) - count, len(data)))
