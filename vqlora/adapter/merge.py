"""Fold adapters into the base: a 16-bit model that any transformers can load, and what that cost.

    merged, report = vqlora.merge(model, calibration)     # batches as the model's forward takes them
    merged.save_pretrained(folder)                        # no trace of adapters, gates or 4-bit weights
    print(report)                                         # how it was merged, mean and worst output error

W' = W + s · B diag(ḡ) A with W as it is really held (dequantized). Where the gate g is the same for every row
(gate "none", control "constant", an untrained head) ḡ = g, and the merge is exact up to the rounding to 16
bits. Otherwise ḡ is the mean over the activation rows of the calibration batches, and no weight can be exact.
An int8 base rounds activations too when it evaluates, and the merged model does not: that shows as error.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from vqlora.adapter.layer import GatedLayer, GatedUpdate
from vqlora.held import hold_in_16bit, plain_class
from vqlora.modalities import describe
from vqlora.modalities.rows import keep_black_frames
from vqlora.probe import adapted_layers, to_device
from vqlora.quantize import load_quantized

_OUTPUTS = ("logits", "logits_per_video", "logits_per_image", "last_hidden_state")


@dataclass(frozen=True)
class OutputError:
    """How far a model's outputs are from the unmerged one's, over the calibration examples.

    mean, worst: ‖y' − y‖ / ‖y‖ per example. lost_mean, lost_worst: ‖y' − y‖ / ‖y − y₀‖ with y₀ of the base
    without adapters: the share of the adapter's effect that is gone (infinite where it has none).
    """

    mean: float
    worst: float
    lost_mean: float
    lost_worst: float

    def __str__(self) -> str:
        text = f"mean {self.mean:.2%}, worst {self.worst:.2%} of the output"
        if self.lost_worst == float("inf"):  # the adapter changes nothing yet
            return text
        return f"{text}; mean {self.lost_mean:.1%}, worst {self.lost_worst:.1%} of the adapter's effect"


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. `error` and `requantized` are None without calibration batches or requantization.

    gates: a row per layer: layer, rank, and mean, lowest and highest gate of all its ranks and rows.
    """

    exact: bool
    dtype: str
    examples: int
    error: OutputError | None
    bits: str | None
    requantized: OutputError | None
    gates: tuple[dict, ...]

    def __str__(self) -> str:
        how = "exactly, up to rounding" if self.exact else "with the mean gate"
        lines = [f"{len(self.gates)} layers merged into {self.dtype} {how}"]
        if self.error:
            lines.append(f"error over {self.examples} examples: {self.error}")
        if self.requantized:
            lines.append(f"after requantization to {self.bits}: {self.requantized}")
        return "\n".join(lines)


def merge(
    model: PeftModel,
    calibration: Mapping | Iterable[Mapping] = (),
    *,
    requantize: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[PreTrainedModel, MergeReport]:
    """A new model of the base's own class in `dtype` with the adapters folded in; `model` is left as it is.

    calibration: one batch or several; needed where a gate differs between rows, else only to measure errors.
    requantize: bits ("nf4", "fp4", "int8") to bring the merged model into, the same layers as in the base.
    Stock LoRA adapters are merged too. Holds a second copy of the model, a third while errors are measured.

    Raises ValueError, saying why, for what cannot be merged: gate "selective", several active adapters,
    adapters merged already, other methods than LoRA, adapters on shared weights or on layers that are not
    linear, repacked 4-bit weights, values that are not finite; and for calibration that is missing or
    reaches no row of a layer.
    """
    layers, adapter = _mergeable(model)
    base = model.get_base_model()
    device = next(base.parameters()).device
    batches = [calibration] if isinstance(calibration, Mapping) else calibration
    batches = [to_device(_without(batch, ("labels", "return_loss")), device) for batch in batches]
    if describe(base).rows is not None:  # a stock model drops black frames, adapters or not
        batches = [keep_black_frames(base, b) if "input_ids" in b else b for b in batches]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            gates, exact = _gates(model, layers, adapter, batches)
            means = {name: gate.mean for name, gate in gates.items()}
            merged = _build(base, layers, adapter, means, dtype)
            wanted = [_output(model, batch) for batch in batches]
            error = requantized = None
            if batches:
                with model.disable_adapter():
                    before = [_output(model, batch) for batch in batches]
                error = _error(_computing_like(base, merged), batches, wanted, before)
            if requantize is not None:
                merged = _requantize(base, merged, requantize, device)
                if batches:
                    requantized = _error(merged, batches, wanted, before)
    finally:
        for module, mode in modes.items():
            module.training = mode
    report = MergeReport(
        exact=exact,
        dtype=str(dtype).removeprefix("torch."),
        examples=sum(len(output) for output in wanted),
        error=error,
        bits=requantize,
        requantized=requantized,
        gates=tuple(gate.row(name) for name, gate in gates.items()),
    )
    return merged, report


@dataclass
class _Gate:
    """Running sums over rows of a layer's gate [r]."""

    total: Tensor
    rows: int
    low: float
    high: float

    @property
    def mean(self) -> Tensor:
        return (self.total / self.rows).float()

    def add(self, gate: Tensor, rows: int) -> None:
        gate = gate.double().view(-1, gate.shape[-1])
        self.total += gate.mean(0).expand_as(self.total) * rows
        self.rows += rows
        self.low, self.high = min(self.low, float(gate.min())), max(self.high, float(gate.max()))

    def row(self, name: str) -> dict:
        mean = float(self.mean.mean())
        return dict(layer=name, rank=len(self.total), mean=mean, lowest=self.low, highest=self.high)


def _mergeable(model) -> tuple[dict[str, LoraLayer], str]:
    if not isinstance(model, PeftModel):
        raise ValueError(f"{type(model).__name__} has no adapters to merge")
    if len(model.active_adapters) != 1:
        raise ValueError(f"{model.active_adapters} are active at once; choose with model.set_adapter(name)")
    adapter, base = model.active_adapters[0], model.get_base_model()
    names: dict[int, list[str]] = {}
    for name, param in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    layers = {n: m for n, m in adapted_layers(model).items() if adapter in getattr(m, "lora_A", ())}
    others = [n for n in adapted_layers(model) if n not in layers]
    for name, layer in [*layers.items(), *((n, adapted_layers(model)[n]) for n in others)]:
        weight = layer.get_base_layer().weight
        why = None
        if not isinstance(layer, LoraLayer):
            why = f"{type(layer).__name__} is not a low-rank update of one weight"
        elif name in others and adapter in getattr(layer, "lora_embedding_A", ()):
            why = "adapters on an embedding are not supported; use peft's merge_and_unload"
        elif name in others:
            continue  # another adapter's layer
        elif layer.merged:
            why = "its adapters are merged already; call model.unmerge_adapter() first"
        elif not isinstance(layer.get_base_layer(), nn.Linear):
            why = f"{type(layer.get_base_layer()).__name__} is not a linear layer"
        elif getattr(layer, "fan_in_fan_out", False) or layer.lora_bias.get(adapter):
            why = "fan_in_fan_out and lora_bias are not supported; use peft's merge_and_unload"
        elif not isinstance(layer.lora_variant.get(adapter), GatedUpdate | None):
            variant = type(layer.lora_variant[adapter]).__name__
            why = f"{variant} is more than a low-rank update; use peft's merge_and_unload"
        elif getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            why = "its 4-bit weight was repacked by an evaluation; load again with vqlora.load_quantized"
        elif len(names[id(weight)]) > 1:
            why = f"its weight is shared by {' and '.join(names[id(weight)])}; merging would change them all"
        elif isinstance(layer, GatedLayer) and _selective(layer, adapter):
            why = "gate 'selective' uses the base alone for some frames, which no single weight does"
        elif not all(bool(p[adapter].weight.isfinite().all()) for p in (layer.lora_A, layer.lora_B)):
            why = "its adapter holds values that are not finite"
        if why:
            raise ValueError(f"cannot merge {name}: {why}")
    if not layers:
        raise ValueError(f"adapter {adapter!r} is on no layer")
    return layers, adapter


def _selective(layer: GatedLayer, adapter: str) -> bool:
    config = layer.context.configs[adapter]
    return config.gate == "selective" and config.gates(layer.modality)


def _gates(model, layers, adapter: str, batches: list[dict]) -> tuple[dict[str, _Gate], bool]:
    """Mean gate of each layer, and whether all of them are constant."""
    gates, open_ = {}, {}
    for name, layer in layers.items():
        gate = torch.ones(layer.r[adapter])
        if isinstance(layer, GatedLayer):
            gate = layer.constant_gate(adapter)
        if gate is None:
            open_[name] = layer
            zero = layer.lora_A[adapter].weight.new_zeros(layer.r[adapter], dtype=torch.float64)
            gates[name] = _Gate(zero, 0, float("inf"), -float("inf"))
        else:
            gates[name] = _Gate(gate.double(), 1, float(gate.min()), float(gate.max()))
    if open_ and not batches:
        raise ValueError(
            f"cannot merge {next(iter(open_))}: its gate differs from row to row, and without `calibration` "
            "batches there is no mean to take"
        )

    def watch(name):
        def hook(layer, args):
            shape = args[0].shape
            gates[name].add(layer.gate_of_rows(adapter, shape), shape[:-1].numel())

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in open_.items()]
    try:
        for batch in batches if open_ else ():
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name in open_:
        if not gates[name].rows:
            raise ValueError(f"cannot merge {name}: no row of the calibration batches reaches it")
    return gates, not open_


def _build(base, layers, adapter: str, gates: dict[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """A model of the base's class and configuration, filled weight by weight."""
    config = copy.deepcopy(base.config)
    for part in [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]:
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with no_init_weights():
        merged = plain_class(type(base))._from_config(config, dtype=dtype)
    merged.to(next(base.parameters()).device)
    for key, tensor in merged.state_dict().items():
        path, _, leaf = key.rpartition(".")
        module = _module(base, path, adapter)
        if leaf == "weight" and isinstance(module, nn.Linear):
            value = _dense(module)
            if path in layers:
                value = value + _delta(layers[path], adapter, gates[path])
            if not bool(value.isfinite().all()):
                raise ValueError(f"cannot merge {path}: the merged weight is not finite")
        else:
            value = getattr(module, leaf)
        tensor.copy_(value)
    merged.tie_weights()
    if getattr(base, "generation_config", None) is not None:
        merged.generation_config = copy.deepcopy(base.generation_config)
    return merged.eval()


def _module(base: nn.Module, path: str, adapter: str) -> nn.Module:
    module = base
    for step in path.split(".") if path else ():
        module = getattr(module, step)
        if isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save
            module = saved[adapter] if adapter in saved else module.original_module
        if hasattr(module, "get_base_layer"):
            module = module.get_base_layer()
    return module


def _dense(module: nn.Linear) -> Tensor:
    """The weight that a layer really holds, in float32."""
    weight = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32
        return bnb.functional.dequantize_4bit(weight.data, state)
    if isinstance(module, bnb.nn.Linear8bitLt):
        scales = weight.SCB if weight.SCB is not None else module.state.SCB  # moved at the first forward
        return weight.data.float() * scales.float()[:, None] / 127
    return weight.float()


def _delta(layer: LoraLayer, adapter: str, gate: Tensor) -> Tensor:
    a, b = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
    return (b * gate.to(b)) @ a * layer.scaling[adapter]


def _requantize(base, merged, bits: str, device) -> PreTrainedModel:
    precision = getattr(base, "vqlora_precision", None)
    done = set(precision.quantized) if precision else set()
    keep = [n for n, m in merged.named_modules() if done and isinstance(m, nn.Linear) and n not in done]
    output = merged.get_output_embeddings()
    head = output is not None and any(merged.get_submodule(name) is output for name in done)
    compute = "fp32" if base.dtype == torch.float32 else "bf16"
    return load_quantized(
        merged, bits, skip=keep, quantize_head=head, compute_dtype=compute, device=device
    ).eval()


def _computing_like(base, merged) -> PreTrainedModel:
    """`merged`, or a copy that computes in float32 as the base does, so that only weights differ."""
    if base.dtype == torch.float32 and merged.dtype == torch.bfloat16:
        return hold_in_16bit(copy.deepcopy(merged))
    return merged


def _error(other, batches: list[dict], wanted: list[Tensor], before: list[Tensor]) -> OutputError:
    relative, lost = [], []
    for batch, y, y0 in zip(batches, wanted, before, strict=True):
        off = (_output(other, _without(batch, ("frame_features",))) - y).flatten(1).norm(dim=1)
        relative += (off / y.flatten(1).norm(dim=1)).tolist()
        effect = (y - y0).flatten(1).norm(dim=1)
        lost += torch.where(off > 0, off / effect, effect.new_zeros(())).tolist()
    return OutputError(sum(relative) / len(relative), max(relative), sum(lost) / len(lost), max(lost))


def _output(model, batch: dict) -> Tensor:
    """[examples, ...] float32; positions that the attention mask hides are zero."""
    output = model(**batch)
    found = next((output[key] for key in _OUTPUTS if isinstance(output.get(key), Tensor)), None)
    if found is None:
        raise ValueError(f"calibration: the model returns none of {', '.join(_OUTPUTS)}")
    mask = batch.get("attention_mask")
    if mask is not None and found.dim() == 3 and mask.shape == found.shape[:2]:
        found = found * mask[..., None].to(found)
    return found.float()


def _without(batch: Mapping, keys: tuple[str, ...]) -> dict:
    return {key: value for key, value in batch.items() if key not in keys}
