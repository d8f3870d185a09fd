"""From a budget and a few batches to a rank for every layer: `vqlora.allocate_ranks`."""

from __future__ import annotations

import copy
import csv
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vqlora.adapter.config import VQLoraConfig, allocator_parts
from vqlora.cost import parameter_count
from vqlora.files import write_atomic
from vqlora.modalities import describe, target_modules
from vqlora.ranks import signals
from vqlora.ranks.budget import Costs, Slot, Worth, by_gain, combined, fill, proportional, uniform
from vqlora.temporal import PIXEL_FEATURES, head_size

REFERENCE = "source_gradients.csv"  # beside a base's weights: what `measure_reference` found
FLOOR = 1e-3  # of the median: a source gradient this small is taken for noise
_log = logging.getLogger(__name__)


def allocate_ranks(
    model: nn.Module,
    config: VQLoraConfig,
    batches: Iterable[Mapping[str, Any]] = (),
    *,
    loss: signals.Loss = signals.model_loss,
    reference: Mapping[str, float] | str | Path | None = None,
    errors: Mapping[str, float] | None = None,
) -> VQLoraConfig:
    """A copy of `config` whose `ranks` name a rank for every layer, together worth `config.budget`.

    The model is the base, quantized or not, before it has an adapter; it is left as it was. The scale of
    every layer's update stays what `lora_alpha` and `r` say, whatever its rank. `allocation` of the copy says
    how it came about, and is saved with the adapter; the seconds it took are logged.

    Args:
        config: `ranks` names an allocator, or several joined by "+" (the geometric mean of their worths):
            "uniform": ranks that differ by at most one.
            "ratio": in proportion to `rank_ratio` of each layer's modality.
            "entropy": in proportion to the effective rank of each layer's input.
            "motion": vision gets 2^z times the rank of the rest; z is the motion of the frames, standardised.
            "gradient": each rank where the gradient's next singular value is largest for its parameters.
            "fisher": the same with each batch's own gradient squared, then averaged.
            "relative": "gradient" divided by the layer's gradient energy on the base's source data.
            "quantization": in proportion to what a layer's weight lost when it was quantized.
        batches: of the training data, as keyword arguments of the model; not read by "uniform" and "ratio".
        loss: (model, batch) -> scalar; the model's own unless given.
        reference: for "relative", what `measure_reference` gives or a file of `save_reference`; unless given,
            the one kept beside the base's weights.
        errors: for "quantization", what `signals.quantization_errors` gives for the model before quantizing.

    Raises:
        ValueError: a budget below the least or above the most possible, settings whose parameters a budget
            cannot count, missing batches, reference or errors.

    >>> from vqlora.zoo import tiny_model
    >>> config = VQLoraConfig(ranks="uniform", budget=20_000, gate="none")
    >>> sorted(set(allocate_ranks(tiny_model("kinevlm"), config).ranks.values()))
    [3, 4]
    """
    if not isinstance(config.ranks, str):
        raise ValueError(f"ranks: {config.ranks!r} names no allocator: there is nothing to allocate")
    parts, batches = allocator_parts(config.ranks), list(batches)
    costs = costs_of(model, config)
    costs.check(config.budget)
    if parts == ("uniform",):
        ranks = uniform(costs, config.budget)
    else:
        worths = [_worth(part, model, config, costs, batches, loss, reference, errors) for part in parts]
        ranks = fill(costs, config.budget, worths[0] if len(worths) == 1 else combined(worths))
    return fill_in(config, costs, ranks, batches=len(batches))


def fill_in(config: VQLoraConfig, costs: Costs, ranks: Sequence[int], **how: Any) -> VQLoraConfig:
    """A copy of `config` with these ranks [L], every layer at the scale that `lora_alpha` and `r` give."""
    filled = copy.copy(config)
    filled.ranks = {slot.name: int(rank) for slot, rank in zip(costs.slots, ranks, strict=True)}
    grows = math.sqrt if config.use_rslora else float
    scale, used = config.lora_alpha / grows(config.r), {n: r for n, r in filled.ranks.items() if r}
    filled.alpha_pattern = {f"^{re.escape(name)}": scale * grows(rank) for name, rank in used.items()}
    spent = costs.of(ranks)
    filled.allocation = {"allocator": config.ranks, "budget": config.budget, "spent": spent, **how}
    _log.info("%s: %d of %d trainable parameters spent", config.ranks, spent, config.budget)
    return filled


def costs_of(model: nn.Module, config: VQLoraConfig) -> Costs:
    """What ranks of the layers of `config` cost on `model`: exactly what `get_peft_model` makes trainable.

    Raises ValueError for settings that train parameters beside adapters and `modules_to_save`.
    """
    empties = {"bias": "none", "trainable_token_indices": None, "target_modules": None, "alpha_pattern": {}}
    for name, empty in empties.items():
        if getattr(config, name) not in (empty, [], ()):
            raise ValueError(
                f"{name}: {getattr(config, name)!r} does not go with a budget; allowed: {empty!r}"
            )
    known, slots = describe(model), []
    per_head = config.gate_hidden + 1
    unknown = set(config.rank_bounds or ()) - set(config.modalities)
    if unknown:
        raise ValueError(f"rank_bounds: {min(unknown)!r} is not among modalities {config.modalities}")
    for name in target_modules(model, config.modalities, config.layers):
        layer, modality = model.get_submodule(name), known.of(name)
        sides = (layer.in_features, layer.out_features)
        low, high = (config.rank_bounds or {}).get(modality, (0, min(sides)))
        gated = config.gates(modality)
        gate = config.gate if gated else "none"
        grows = head_size(gate, 2) - head_size(gate, 1)
        once = head_size(gate, 1) - grows
        high = min(high, *sides)
        slots.append(Slot(name, modality, sum(sides) + per_head * grows, per_head * once, low, high, gated))
    trunk = (config.feature_count + 1) * config.gate_hidden if head_size(config.gate, 1) else 0
    saved = tuple(config.modules_to_save or ())
    heads = [m for name, m in model.named_modules() if saved and name.endswith(saved)]
    fixed = sum(parameter_count(p) for head in heads for p in head.parameters())
    return Costs(tuple(slots), trunk, fixed)


def measure_reference(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    loss: signals.Loss = signals.model_loss,
    modalities: Sequence[str] = ("vision", "fusion", "text"),
) -> dict[str, float]:
    """Gradient energy of every layer on batches of the data that the base was trained on, by full name."""
    return signals.gradients(model, target_modules(model, modalities), batches, loss).energy()


def save_reference(path: str | Path, reference: Mapping[str, float], weights: str = "") -> None:
    """Write a reference as CSV: layer, energy; `weights` is the hash of the weights it was measured on."""
    rows = [f"{name},{energy:.6g}" for name, energy in reference.items()]
    write_atomic(Path(path), "\n".join([f"# weights {weights}", "layer,energy", *rows, ""]).encode())


def load_reference(path: str | Path) -> dict[str, float]:
    """Read what `save_reference` wrote. Raises ValueError that names what is wrong."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    try:
        rows = csv.DictReader(line for line in lines if not line.startswith("#"))
        return {row["layer"]: float(row["energy"]) for row in rows}
    except (KeyError, TypeError, ValueError) as fault:
        raise ValueError(f"{path}: {fault}; expected columns layer, energy") from fault


def reference_weights(path: str | Path) -> str:
    """The hash of the weights that a saved reference was measured on, "" if there is none."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []
    return lines[0].removeprefix("# weights").strip() if lines else ""


def _worth(part, model, config, costs, batches, loss, reference, errors) -> Worth:
    names = [slot.name for slot in costs.slots]
    if part == "uniform":
        return proportional([1.0] * len(names))
    if part == "ratio":
        unknown = set(config.rank_ratio) - set(config.modalities)
        if unknown:
            raise ValueError(f"rank_ratio: {min(unknown)!r} is not among modalities {config.modalities}")
        return proportional([config.rank_ratio.get(slot.modality, 0.0) for slot in costs.slots])
    if part == "quantization":
        return proportional(list(_known("errors", errors, names, "signals.quantization_errors").values()))
    if part == "entropy":
        found = signals.input_entropy(model, names, batches, loss)
        return proportional([math.exp(found[name]) for name in names])
    if part == "motion":
        mean, std = PIXEL_FEATURES["motion"]
        z = np.clip((signals.motion(model, batches, config.pixel_range) - mean) / std, -2, 2)
        return proportional([2.0**z if slot.modality == "vision" else 1.0 for slot in costs.slots])
    found = signals.gradients(model, names, batches, loss, each=part == "fisher").spectra
    if part == "relative":
        source = _known("reference", _reference(model, reference), names, "measure_reference")
        least = FLOOR * float(np.median(list(source.values())))
        found = {name: found[name] / max(source[name], least) for name in names}
    return by_gain([found[name].tolist() for name in names], costs)


def _reference(model: nn.Module, given) -> Mapping[str, float] | None:
    if given is None:
        beside = Path(getattr(model.config, "_name_or_path", "") or "", REFERENCE)
        return load_reference(beside) if beside.is_file() else None
    return given if isinstance(given, Mapping) else load_reference(given)


def _known(argument: str, values, names, source: str) -> dict[str, float]:
    missing = [name for name in names if values is None or name not in values]
    if missing:
        raise ValueError(f"{argument}: nothing for layer {missing[0]!r}; see vqlora.ranks.{source}")
    return {name: values[name] for name in names}

