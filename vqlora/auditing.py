"""What a model with adapters really is, layer by layer, and the faults that otherwise pass in silence.

    table = vqlora.audit(model, batch)          # any peft model on a described architecture, stock LoRA too
    by_modality(table)                          # summed per modality
    audit(model, batch, modalities=("text",))   # stock peft: say which parts were meant to get adapters

One forward and backward of the batch in training mode (two at initialisation); the model is left as it was.
Each fault has a name (`FAULTS`), says where it is and what to do; `allow` accepts one knowingly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from vqlora.cost import parameter_count, tensor_bytes
from vqlora.faults import FAULTS, Fault, measured_faults, static_faults
from vqlora.modalities import MODALITIES, Modalities, describe
from vqlora.probe import (
    NOTHING,
    Measured,
    adapted_layers,
    adapter_config,
    adapter_parameters,
    layer_name,
    named_linear,
    plain_base,
    probe,
    rank,
    to_device,
)
from vqlora.quantize import layer_bits

if TYPE_CHECKING:
    import pandas as pd


class AuditError(ValueError):
    """Raised by `audit`; `faults` is the list, `table` as far as it was measured (None before the probe)."""

    def __init__(self, faults: list[Fault], table: pd.DataFrame | None):
        self.faults, self.table = faults, table
        super().__init__("\n".join(map(str, faults)))


def audit(
    model: nn.Module,
    batch=None,
    *,
    modalities: Iterable[str] | None = None,
    keep_16bit: Iterable[str] = (),
    allow: Iterable[str] = (),
) -> pd.DataFrame:
    """Table of every layer of `model` as it is and as it acts on `batch`. Raises `AuditError` on a fault.

    batch: what the model's forward takes, with labels; or a Trainer, whose first training batch is taken as
        it hands it over (which shows columns lost to `remove_unused_columns`). None runs nothing: the
        measured columns stay empty, and only faults that show without a forward are found.
    modalities: parts that were meant to get adapters; None takes them from the adapter's config if it says.
    keep_16bit: parts or full module paths that were meant to stay unquantized.
    allow: names of faults to accept; they are listed in `table.attrs["allowed"]`.

    Index (modality, layer), a row "(other)" per modality for embeddings, norms and the like. Columns: bits of
    the weight, compute_dtype (of the output), adapter_dtype, rank, trainable (parameters), gradient_norm (NaN
    where none arrived), bytes (weight, constants, adapters), rows and frame_rows (activation rows, and those
    that show a video frame).

    Raises KeyError for an architecture without description, ValueError for unknown arguments or no loss.
    """
    base = plain_base(model)
    known, config = describe(base), adapter_config(model)
    allow, keep_16bit = tuple(allow), tuple(keep_16bit)
    wanted = tuple(modalities) if modalities is not None else getattr(config, "modalities", None)
    for what, given, allowed in (("allow", allow, FAULTS), ("modalities", wanted or (), MODALITIES)):
        for entry in given:
            if entry not in allowed:
                raise ValueError(f"{what}: {entry!r} is not known; allowed: {', '.join(allowed)}")
    if hasattr(batch, "get_train_dataloader"):
        batch = next(iter(batch.get_train_dataloader()))
    if batch is not None:
        batch = to_device(batch, next(base.parameters()).device)
    faults = static_faults(model, known, wanted, keep_16bit, batch)
    unable = [f for f in faults if f.name in ("repacked", "features")]
    if unable and not {f.name for f in unable} <= set(allow):
        raise AuditError(faults, None)  # a forward would crash, or measure what training will not do
    measured = probe(model, batch, known) if batch is not None else NOTHING
    table = _table(model, known, measured)
    if batch is not None:
        faults += measured_faults(model, known, measured)
    table.attrs["loss"] = measured.loss
    table.attrs["allowed"] = [str(fault) for fault in faults if fault.name in allow]
    faults = [fault for fault in faults if fault.name not in allow]
    if faults:
        raise AuditError(faults, table)
    return table


def by_modality(table: pd.DataFrame) -> pd.DataFrame:
    """Sums of an audit's table per modality: layers, adapted, trainable, bytes, frame_rows (most of a layer),
    gradient_norm (of all together), bits (those that occur)."""
    rows = table.reset_index()
    return rows.groupby("modality", sort=False).apply(
        lambda part: _series(
            layers=int((part["layer"] != "(other)").sum()),
            adapted=int((part["rank"] > 0).sum()),
            bits=", ".join(sorted(set(part["bits"]) - {""})),
            trainable=int(part["trainable"].sum()),
            gradient_norm=float(part["gradient_norm"].pow(2).sum() ** 0.5),
            bytes=int(part["bytes"].sum()),
            frame_rows=int(part["frame_rows"].max()),
        ),
        include_groups=False,
    )


def _series(**values):
    import pandas as pd

    return pd.Series(values, dtype=object)


def _table(model, known: Modalities, measured: Measured) -> pd.DataFrame:
    import pandas as pd

    base, names = plain_base(model), adapter_parameters(model)
    linear, adapted = named_linear(model), adapted_layers(model)
    cells: dict[tuple[str, str], dict] = {}
    order = {layer_name(name): i for i, (name, _) in enumerate(base.named_modules())}
    for name in sorted({*linear, *adapted}, key=lambda name: order.get(name, 0)):
        seen = measured.layers.get(name)
        cells[known.of(name) or "none", name] = {
            "bits": layer_bits(linear[name]) if name in linear else "",
            "compute_dtype": _short(seen.made) if seen else "",
            "adapter_dtype": "",
            "rank": rank(adapted.get(name)),
            "trainable": 0,
            "gradient_norm": None,
            "bytes": 0,
            "rows": seen.rows if seen else 0,
            "frame_rows": seen.frame_rows if seen else 0,
        }
    counted = set()
    for name, param in model.named_parameters():
        if id(param) in counted:
            continue
        counted.add(id(param))
        layer = names.get(name) or layer_name(name.rpartition(".")[0])
        key = (known.of(layer) or "none", layer)
        if key not in cells:
            key = (key[0], "(other)")
        cell = cells.setdefault(key, {**dict.fromkeys(_COLUMNS, 0), "gradient_norm": None} | _BLANK)
        cell["bytes"] += tensor_bytes(param)
        if name in names and not cell["adapter_dtype"]:
            cell["adapter_dtype"] = _short(param.dtype)
        if param.requires_grad:
            cell["trainable"] += parameter_count(param)
            if measured.grads.get(name) is not None:
                cell["gradient_norm"] = ((cell["gradient_norm"] or 0) ** 2 + measured.grads[name] ** 2) ** 0.5
    parts = [*MODALITIES, "none"]
    keys = sorted(cells, key=lambda key: (parts.index(key[0]), key[1] == "(other)"))
    index = pd.MultiIndex.from_tuples(keys, names=("modality", "layer"))
    table = pd.DataFrame([cells[key] for key in keys], index=index, columns=_COLUMNS)
    return table.astype({"gradient_norm": float})


_COLUMNS = ["bits", "compute_dtype", "adapter_dtype", "rank", "trainable", "gradient_norm", "bytes", "rows",
            "frame_rows"]  # fmt: skip
_BLANK = {"bits": "", "compute_dtype": "", "adapter_dtype": ""}


def _short(dtype: torch.dtype | None) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return "" if dtype is None else names.get(dtype, str(dtype).removeprefix("torch."))
