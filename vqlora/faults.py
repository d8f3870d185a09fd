"""The faults that `vqlora.audit` looks for: one function each, from what a model is or a probe measured."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import nn

from vqlora.held import HELD
from vqlora.modalities import MODALITIES, Modalities, is_under, linear_layers, matches, plain_name
from vqlora.probe import (
    GATE,
    Measured,
    Seen,
    adapted_layers,
    adapter_config,
    adapter_parameters,
    plain_base,
    rank,
)
from vqlora.quantize import BLOCK, layer_bits

FAULTS = {
    "skip_list": "an entry of the list of layers not to quantize matches nothing",
    "quantized": "a layer is quantized that should not be",
    "repacked": "a 4-bit weight was repacked in place, or will be by the next evaluation",
    "trainable_base": "weights of the frozen base are trained",
    "foreign_modality": "adapters sit on a modality that was not meant",
    "features": "the gate's frame features do not arrive",
    "no_gradient": "adapters get no gradient, or zero",
    "stuck_gate": "a gate cannot move",
    "adapter_dtype": "a dtype that doubles memory",
    "kept_graph": "a graph is kept through a frozen part",
}
_IDLE = Seen()
_QUANTIZED = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)


@dataclass(frozen=True)
class Fault:
    """One finding: `name` of `FAULTS`, `layers` (or entries) concerned, `text` with the remedy."""

    name: str
    layers: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        more = f" and {len(self.layers) - 3} more" if len(self.layers) > 3 else ""
        return f"{self.name}: {self.text} [{', '.join(self.layers[:3])}{more}]"


def static_faults(model, known: Modalities, wanted, keep_16bit: tuple[str, ...], batch) -> list[Fault]:
    """Faults that show before any forward. ValueError for an entry of `keep_16bit` that names nothing."""
    base, config = plain_base(model), adapter_config(model)
    return [
        *_skip_list(base),
        *_wrongly_quantized(base, known, keep_16bit),
        *_repacked(base),
        *_trainable_base(model),
        *_foreign(model, known, config, wanted),
        *_features(config, batch),
    ]


def measured_faults(model, known: Modalities, measured: Measured) -> list[Fault]:
    """Faults that show in a forward and backward."""
    names = adapter_parameters(model)
    return [
        *_no_gradient(known, names, measured),
        *_stuck_gate(known, names, measured),
        *_dtypes(model, names, measured),
        *_kept_graph(measured),
    ]


def _skip_list(base) -> list[Fault]:
    saved = getattr(base.config, "quantization_config", None)
    saved = saved if isinstance(saved, dict) or saved is None else saved.to_dict()
    linear, faults = dict(linear_layers(base)), []
    names = [plain_name(name) for name, _ in base.named_modules() if name]
    leaves = {*linear, *(plain_name(name) for name, m in base.named_modules() if not list(m.children()))}
    for entry in (saved or {}).get("llm_int8_skip_modules") or ():
        # transformers' rule: from the start up to the end of a part of the name, or the name's end
        start = re.compile(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))")
        if any(start.match(name) or name.endswith(entry) for name in leaves):
            continue
        meant = [name for name in names if f".{entry}." in f".{name}."]
        path = min(meant, key=len, default=None)
        hit = [n for n, m in linear.items() if path and is_under(n, path) and isinstance(m, _QUANTIZED)]
        advice = f"write {path!r}" if path else "write full module paths"
        faults.append(
            Fault(
                "skip_list",
                (entry,),
                f"llm_int8_skip_modules entry {entry!r} matches no module (names are matched from their "
                f"start); {advice} and load again, or use vqlora.load_quantized, which refuses idle entries",
            )
        )
        if hit:
            text = f"meant to be skipped as {entry!r}, yet in {layer_bits(linear[hit[0]])}; load again with "
            faults.append(Fault("quantized", tuple(hit), text + repr(path)))
    return faults


def _wrongly_quantized(base, known: Modalities, keep_16bit: tuple[str, ...]) -> list[Fault]:
    precision, groups = getattr(base, "vqlora_precision", None), {}
    quantized = {name: m for name, m in linear_layers(base) if isinstance(m, _QUANTIZED)}
    paths = {path: m for m in MODALITIES for path in getattr(known, m)}
    for entry in keep_16bit:
        if entry not in MODALITIES and not any(is_under(n, entry) for n, _ in linear_layers(base)):
            raise ValueError(
                f"keep_16bit: {entry!r} is no part and no module path; parts: {', '.join(MODALITIES)}; paths "
                f"such as {', '.join(list(paths)[:3])}"
            )
    for name, module in quantized.items():
        head = any(is_under(name, path) for path in known.heads)
        parent = base.get_submodule(name.rpartition(".")[0]) if "." in name else base
        if any(is_under(name, e) or known.of(name) == e for e in keep_16bit):
            why = "keep_16bit names it; give its path to load_quantized(skip=...)"
        elif head and not (precision and name in precision.quantized):
            why = (
                "an output head; a skip list of one's own drops transformers' default for it: add it, or use "
                "vqlora.load_quantized, which always keeps heads"
            )
        elif any(matches(name, path) for path in known.keep):
            why = "must stay in 16-bit in this architecture; load with vqlora.load_quantized, which keeps it"
        elif isinstance(parent, nn.MultiheadAttention):
            why = "torch's MultiheadAttention reads this weight as a matrix; keep it in 16-bit"
        elif isinstance(module, bnb.nn.Linear4bit) and module.in_features % BLOCK and _on_cpu(module):
            why = (
                f"its width is not a multiple of {BLOCK}, so that 4 bits on CPU give wrong values without "
                "an error; keep it in 16-bit"
            )
        else:
            continue
        groups.setdefault(why, []).append(name)
    return [Fault("quantized", tuple(found), why) for why, found in groups.items()]


def _repacked(base) -> list[Fault]:
    layers = [(name, m) for name, m in linear_layers(base) if isinstance(m, bnb.nn.Linear4bit)]
    done = [n for n, m in layers if getattr(m.weight.quant_state, "packing_format_for_cpu", False)]
    if done:
        text = "an evaluation repacked these weights and rounded their constants: gradients get lost, saves "
        return [Fault("repacked", tuple(done), text + "are garbage; load again with vqlora.load_quantized")]
    ready = [n for n, m in layers if _on_cpu(m) and getattr(m, "support_avx512bf16_for_cpu", False)]
    text = "the next evaluation will repack these weights; call vqlora.quantize.close_packing_trap(model)"
    return [Fault("repacked", tuple(ready), text)] if ready else []


def _trainable_base(model) -> list[Fault]:
    base, names = plain_base(model), adapter_parameters(model)
    if not isinstance(model, PeftModel) and not any(isinstance(m, _QUANTIZED) for m in base.modules()):
        return []  # full fine-tuning
    found = [plain_name(n) for n, p in model.named_parameters() if p.requires_grad and n not in names]
    text = "base weights require gradients; freeze them (model.requires_grad_(False) before get_peft_model), "
    text += "or name what is to be trained in full in `modules_to_save`"
    return [Fault("trainable_base", tuple(found), text)] if found else []


def _foreign(model, known: Modalities, config, wanted: tuple[str, ...] | None) -> list[Fault]:
    layers = adapted_layers(model)
    if wanted is not None:
        found = [n for n in layers if rank(layers[n]) and known.of(n) not in (*wanted, None)]
        text = f"adapters outside {', '.join(wanted)}; target full names: vqlora.modalities.target_modules"
        return [Fault("foreign_modality", tuple(found), text + f"(model, {wanted!r})")] if found else []
    targets = getattr(config, "target_modules", None) or ()
    regex = isinstance(targets, str)
    for entry in [targets] if regex else sorted(targets):
        hit = [n for n in layers if (re.fullmatch(entry, n) if regex else _is_ending(n, entry))]
        counts = Counter(known.of(name) for name in hit if known.of(name))
        if len(counts) > 1:
            spread = ", ".join(f"{m} ({count})" for m, count in counts.items())
            text = (
                f"target {entry!r} put adapters on {spread}; target full names: vqlora.modalities."
                f"target_modules(model, ('text',)), or tell audit(modalities=...) that all are meant"
            )
            return [Fault("foreign_modality", tuple(hit), text)]
    return []


def _features(config, batch: dict | None) -> list[Fault]:
    if getattr(config, "features", None) != "scores" or getattr(config, "gate", "none") == "none":
        return []
    if batch is None or batch.get("frame_features") is not None:
        return []
    text = (
        "the gate reads `frame_features`, which this batch lacks; the Trainer drops columns that forward "
        "does not name: TrainingArguments(remove_unused_columns=False), and let the collator keep them"
    )
    return [Fault("features", ("frame_features",), text)]


def _no_gradient(known: Modalities, names: dict[str, str], measured: Measured) -> list[Fault]:
    groups: dict[str, list[str]] = {}
    for name, layer in names.items():
        if GATE in name:
            continue
        if name not in measured.moved:
            why = "frozen: load with PeftModel.from_pretrained(..., is_trainable=True)"
        elif measured.moved[name]:
            continue
        elif reason := known.why_never(layer):
            why = f"never trained in this architecture ({reason}): leave it out of the targets"
        elif measured.layers.get(layer) is not None and not measured.layers[layer].rows:
            why = "this layer never ran on this batch: leave it out, or audit with a batch that uses it"
        elif measured.moved[name] is None:
            why = (
                "no gradient arrives: its output does not reach the loss, or gradient checkpointing "
                "(reentrant) begins at an input that needs none: gradient_checkpointing_kwargs="
                "{'use_reentrant': False}"
            )
        else:
            why = "its gradient is exactly zero: look for zeros or infinities in its inputs or weights"
        groups.setdefault(why, []).append(layer)
    return [Fault("no_gradient", tuple(dict.fromkeys(found)), why) for why, found in groups.items()]


def _stuck_gate(known: Modalities, names: dict[str, str], measured: Measured) -> list[Fault]:
    gates = [name for name in names if GATE in name]
    sighted = {known.of(layer) for layer, seen in measured.layers.items() if seen.frame_rows}
    frozen = [name for name in gates if name not in measured.moved]
    still = [
        name
        for name in gates
        if name in measured.moved
        and not measured.moved[name]
        and measured.layers.get(names[name], _IDLE).rows
        # where no row shows a frame, all features are zero and what multiplies them rests
        and (known.of(names[name]) in sighted or not name.endswith("weight") or "trunk" not in name)
    ]
    faults = []
    if frozen:
        text = "gate parameters are frozen; set requires_grad, or load with is_trainable=True"
        faults.append(Fault("stuck_gate", tuple(map(plain_name, frozen)), text))
    if still:
        text = "gate parameters get no gradient: the gate is saturated, or its features do not reach it; "
        text += "check feature_mean and feature_std (vqlora.calibrate_features)"
        faults.append(Fault("stuck_gate", tuple(map(plain_name, still)), text))
    return faults


def _dtypes(model, names: dict[str, str], measured: Measured) -> list[Fault]:
    base, wide, copies = plain_base(model), [], 0
    linear, adapted = dict(linear_layers(base)), adapted_layers(model)
    for name, param in model.named_parameters():
        seen = measured.layers.get(names.get(name, ""))
        if seen is None or seen.read is None or names[name] not in adapted or GATE in name:
            continue
        if param.dtype.itemsize > seen.read.itemsize and names[name] not in wide:
            wide.append(names[name])
            copies += seen.rows * linear[names[name]].in_features * param.dtype.itemsize
    faults = []
    if wide:
        text = (
            f"float32 adapters on 16-bit activations keep a float32 copy of every input, "
            f"{copies / 2**20:.1f} MiB of this batch; get_peft_model(..., autocast_adapter_dtype=False) "
            "keeps them in 16-bit"
        )
        faults.append(Fault("adapter_dtype", tuple(wide), text))
    if any(isinstance(m, _QUANTIZED) for m in linear.values()):
        kinds = {*HELD, *HELD.values()}  # the rest is little and has its reasons (own norms, positions)
        own = {id(p) for n, p in model.named_parameters() if n in names}
        upcast = [
            plain_name(name)
            for name, module in base.named_modules()
            if type(module) in kinds
            and not isinstance(module, nn.LayerNorm)
            and ".lora_" not in name
            and module.weight.dtype == torch.float32
            and id(module.weight) not in own
        ]
        if upcast:
            text = (
                "unquantized weights of a quantized model in float32, twice the bytes of 16-bit; load with "
                "dtype=torch.bfloat16 or load_quantized, and leave out prepare_model_for_kbit_training"
            )
            faults.append(Fault("adapter_dtype", tuple(upcast), text))
    return faults


def _kept_graph(measured: Measured) -> list[Fault]:
    text = (
        "frozen, yet its activations are kept for a backward that trains nothing: gradient checkpointing "
        "made its inputs require gradients; enable it with {'use_reentrant': False} and then call "
        "model.disable_input_require_grads() (the Trainer's gradient_checkpointing=True enables them again)"
    )
    return [Fault("kept_graph", tuple(measured.kept), text)] if measured.kept else []


def _on_cpu(module: nn.Module) -> bool:
    return module.weight.device.type == "cpu"


def _is_ending(name: str, entry: str) -> bool:
    """peft's rule for a list of targets: the full name, or its last parts."""
    return name == entry or name.endswith("." + entry)
