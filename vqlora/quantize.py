"""Put a base model into 4, 8 or 16 bits with bitsandbytes, the same way on CPU and CUDA.

    model = load_quantized("path-or-hub-id-or-model", bits="nf4")   # frozen; put adapters on it
    describe_bits(model)                                            # modality, bits, layers, bytes
    compute_dtype()                                                 # "fp32" or "bf16", and why

Linear layers become `bnb.nn.Linear4bit` (NF4 or FP4; Dettmers et al. 2023, arXiv:2305.14314) or
`Linear8bitLt` (Dettmers et al. 2022, arXiv:2208.07339). Embeddings, norms, convolutions and heads are stored
in bfloat16. Where the machine computes in float32, they are still stored in 16 bits and widened where they
are used (`vqlora.held`), so that the size of a model does not depend on the machine.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

import bitsandbytes as bnb
import torch
import transformers
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from vqlora.cost import parameter_count, tensor_bytes
from vqlora.held import Linear16, hold_in_16bit
from vqlora.modalities import find_description, is_under, linear_layers, match_names, matches
from vqlora.precision import ComputeDtype, Precision, compute_dtype
from vqlora.processes import refuse_sharding

BITS = ("nf4", "fp4", "int8", "bf16")
BLOCK = 64  # bitsandbytes' block: one scale per 64 weights of a row
_log = logging.getLogger(__name__)
_probe = compute_dtype  # load_quantized has an argument of that name

__all__ = [
    "BITS", "BLOCK", "ComputeDtype", "Precision", "close_packing_trap", "compute_dtype", "describe_bits",
    "layer_bits", "load_quantized",
]  # fmt: skip


def load_quantized(
    source: str | Path | PreTrainedModel,
    bits: str = "nf4",
    *,
    skip: Iterable[str] = (),
    double_quant: bool = True,
    quantize_head: bool = False,
    compute_dtype: str | None = None,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """Load a model with its linear layers in `bits`, frozen and ready for peft and the Trainer.

    source: hub id, directory, or a model in memory (which is changed in place).
    skip: more linear layers to keep in 16-bit: full module paths, or with `*` (a path keeps all below it).
    quantize_head: also quantize the output head (not possible where it is tied to the embeddings).
    compute_dtype: "fp32" or "bf16"; None probes, see `compute_dtype`.
    device: None takes CUDA where there is one.

    Raises ValueError: unknown bits, a skip entry that matches nothing, a layer whose width bitsandbytes
    cannot hold on CPU, a tied head, a model that is quantized already in other bits, a launcher that
    would shard quantized weights (see `vqlora.processes`).
    """
    if bits not in BITS:
        raise ValueError(f"bits: {bits!r} is not known; allowed: {', '.join(BITS)}")
    refuse_sharding(bits)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    compute = _probe("auto" if compute_dtype is None else compute_dtype, device)
    if isinstance(source, PreTrainedModel) and _is_quantized(source.config, bits):
        model, (chosen, kept) = source, _found(source)
        round_to_16bit(model, device)  # whoever loaded it may have widened what is not quantized
    elif isinstance(source, PreTrainedModel):
        model = source
        chosen, kept = layers_to_quantize(model, bits, tuple(skip), quantize_head, device)
        if bits != "bf16":
            _replace(model, chosen, bits, double_quant, compute, device)
            attach_quantizer(model, bnb_config(bits, double_quant, compute, kept))
        round_to_16bit(model, device)
    else:
        model, chosen, kept = _from_disk(
            str(source), bits, tuple(skip), double_quant, quantize_head, compute, device
        )
    for module in model.modules():
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) and module.bias is not None:
            module.bias.data = module.bias.data.to(compute.dtype)  # else cast in place at the first forward
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = compute.dtype, True
            # forward unpacks to the dtype of its input, backward to this one
            module.weight.quant_state.dtype = compute.dtype
    if compute.name == "fp32":
        hold_in_16bit(model)
    model.requires_grad_(False)
    close_packing_trap(model)
    if bits == "int8":
        _allow_any_shape(model)
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_no_cast_notice)
    states = [m.weight.quant_state for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    model.vqlora_precision = Precision(
        bits=bits,
        compute=compute.name,
        reason=compute.reason,
        double_quant=bool(states) and states[0].nested,
        head=bits if set(_heads(model)) & set(chosen) else "bf16",
        backend="torch" if bits == "bf16" else f"bitsandbytes {bnb.__version__}",
        quantized=tuple(chosen),
        kept=tuple(kept),
    )
    _log.info("%s in %s, computing in %s: %s", type(model).__name__, bits, compute.name, compute.reason)
    return model


def close_packing_trap(model: nn.Module) -> int:
    """Forbid bitsandbytes to repack 4-bit weights in evaluation; returns the number of 4-bit layers.

    On CPUs with AVX512-BF16 an eval-mode forward rewrites a 4-bit weight in another layout and rounds its
    constants; training, merging and saving after that lose gradients or give garbage. Called on every load
    here; call it again on a model that `from_pretrained` or `PeftModel.from_pretrained` loaded by itself.
    Raises RuntimeError if a weight was repacked already (its constants are rounded: only loading again
    helps).
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    for name, layer in layers:
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise RuntimeError(
                f"{name}: its 4-bit weight was repacked by an eval-mode forward before the packing trap "
                "was closed; load the model again with load_quantized"
            )
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def layer_bits(module: nn.Module) -> str:
    """Bits a linear layer's weight really has: nf4, fp4, int8, bf16, fp16 or fp32."""
    weight = module.weight
    if isinstance(weight, bnb.nn.Params4bit):
        return (
            weight.quant_state.quant_type
            if weight.quant_state is not None
            else f"{weight.quant_type} (not yet)"
        )
    names = {torch.int8: "int8", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return names.get(weight.dtype, str(weight.dtype))


def describe_bits(model: nn.Module) -> list[dict]:
    """What really happened: one row per (modality, kind, bits) with layers, parameters and bytes (constants
    counted).

    kind is "linear" or "other" (embeddings, norms, convolutions, adapters); modality is "none" outside every
    part.
    """
    known, rows, seen = find_description(model), {}, set()
    linear = {id(module) for _, module in linear_layers(model)}
    for name, module in model.named_modules():
        for param in module.parameters(recurse=False):
            if id(param) in seen:  # tied weights count once
                continue
            seen.add(id(param))
            is_weight = id(module) in linear and param is module.weight
            kind = "linear" if is_weight else "other"
            key = (
                (known.of(name) if known else None) or "none",
                kind,
                layer_bits(module) if is_weight else str(param.dtype).removeprefix("torch."),
            )
            row = rows.setdefault(
                key,
                dict(zip(("modality", "kind", "bits"), key, strict=True), layers=0, parameters=0, bytes=0),
            )
            row["layers"] += is_weight
            row["parameters"] += parameter_count(param)
            row["bytes"] += tensor_bytes(param)
    return [rows[key] for key in sorted(rows)]


class _Linear8bit(bnb.nn.Linear8bitLt):
    """bitsandbytes' 8-bit layer for inputs of any rank; its own eval mode takes three dimensions at most."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
            if x.dim() > 3
            else super().forward(x)
        )


def _allow_any_shape(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is bnb.nn.Linear8bitLt:
            module.__class__ = _Linear8bit


def _heads(model: nn.Module) -> list[str]:
    """Full names of the output layers: the described ones and the model's output embeddings."""
    known, output = find_description(model), None
    if isinstance(model, PreTrainedModel):
        output = model.get_output_embeddings()
    return [
        name
        for name, module in linear_layers(model)
        if (output is not None and module is output)
        or (known is not None and any(is_under(name, head) for head in known.heads))
    ]


def layers_to_quantize(model, bits, skip, quantize_head, device) -> tuple[list[str], list[str]]:
    """Full names of linear layers (to quantize, to keep)."""
    # subclasses of nn.Linear compute in their own way (Idefics, MultiheadAttention) and are left alone
    layers = {name: m for name, m in linear_layers(model) if type(m) in (nn.Linear, Linear16)}
    others = [name for name, module in linear_layers(model) if name not in layers]
    known = find_description(model)
    kept = set(_heads(model)) | {
        name
        for name, _ in linear_layers(model)
        if known is not None and any(matches(name, path) for path in known.keep)
    }
    if quantize_head:
        output = model.get_output_embeddings()
        if output is None:
            raise ValueError(f"quantize_head: {type(model).__name__} has no output head")
        if output.weight is model.get_input_embeddings().weight or getattr(
            model.config.get_text_config(), "tie_word_embeddings", False
        ):
            raise ValueError("quantize_head: the head is tied to the input embeddings, which stay in 16-bit")
        kept -= {name for name, module in layers.items() if module is output}
    kept |= set(match_names([*layers, *others], skip, "skip"))
    chosen = [name for name in layers if name not in kept and bits != "bf16"]
    if bits in ("nf4", "fp4") and device.type == "cpu":
        for name in chosen:
            width = layers[name].in_features
            if width % BLOCK:
                raise ValueError(
                    f"{name}: width {width} is not a multiple of bitsandbytes' block of {BLOCK}: on CPU it "
                    f"would give wrong values without an error; keep it in 16-bit: skip=({name!r}, ...)"
                )
    return chosen, [name for name in layers if name not in chosen] + others


def bnb_config(bits, double_quant, compute, kept) -> BitsAndBytesConfig:
    # transformers matches skip entries from the start of the full name or as an ending; anchored, each names
    # one layer
    exact = ["^" + re.escape(name) + "$" for name in kept]
    if bits == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=exact)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=bits,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute.dtype,
        llm_int8_skip_modules=exact,
    )


def _replace(model, names, bits, double_quant, compute, device) -> None:
    for name in names:
        old = model.get_submodule(name)
        shape = (old.in_features, old.out_features, old.bias is not None)
        weight = old.weight.data.to(torch.bfloat16)  # as in a 16-bit checkpoint, so that both give one result
        if bits == "int8":
            new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=0.0, device="meta")
            new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            how = {"compress_statistics": double_quant, "quant_type": bits}
            new = bnb.nn.Linear4bit(*shape, compute.dtype, **how, device="meta")
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, blocksize=BLOCK, module=new, **how)
        new.bias = old.bias
        new.source_cls = type(old)  # transformers' own replacement sets it and its savers read it
        new.train(old.training)
        model.set_submodule(name, new.to(device))


def round_to_16bit(model, device) -> None:
    """Everything not quantized goes to bfloat16, except buffers (rotary frequencies need their dtype)."""
    for param in model.parameters():
        if param.is_floating_point() and not isinstance(param, bnb.nn.Params4bit):
            param.data = param.data.to(torch.bfloat16)
    model.to(device)
    model.config.dtype = torch.bfloat16


def attach_quantizer(model, config) -> None:
    """Mark a model quantized in memory as `from_pretrained` would; peft, the Trainer and saving look."""
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, config.quant_method
    quantizer.postprocess_model(model)


def _from_disk(source, bits, skip, double_quant, quantize_head, compute, device):
    import vqlora.kinevlm  # noqa: F401  makes the embedded base known to AutoConfig

    config = AutoConfig.from_pretrained(source)
    cls = model_class(config)
    options = {"dtype": torch.bfloat16, "device_map": {"": device}}
    if _is_quantized(config, bits):
        model = cls.from_pretrained(source, **options)
        return model, *_found(model)
    with torch.device("meta"):
        chosen, kept = layers_to_quantize(cls._from_config(config), bits, skip, quantize_head, device)
    if bits != "bf16":
        options["quantization_config"] = bnb_config(bits, double_quant, compute, kept)
    return cls.from_pretrained(source, config=config, **options), chosen, kept


def _found(model) -> tuple[list[str], list[str]]:
    """Full names of linear layers (quantized, not) in a model that came quantized."""
    done = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    layers = linear_layers(model)
    return [n for n, m in layers if isinstance(m, done)], [n for n, m in layers if not isinstance(m, done)]


def model_class(config):
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in (
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForCausalLM,
        transformers.AutoModel,
    ):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise ValueError(
        f"model type {config.model_type!r} has no model class in transformers {transformers.__version__}"
    )


def _is_quantized(config, bits) -> bool:
    """Whether the model came quantized in `bits`. Raises ValueError if in others."""
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        return False
    saved = saved if isinstance(saved, dict) else saved.to_dict()
    has = "int8" if saved.get("load_in_8bit") else saved.get("bnb_4bit_quant_type", saved.get("quant_method"))
    if has != bits:
        raise ValueError(
            f"bits: {bits!r} asked for, but this model is stored in {has!r}; load it with bits={has!r}, "
            "or load the 16-bit model"
        )
    return True


def _no_cast_notice(record: logging.LogRecord) -> bool:
    return "inputs will be cast from" not in str(record.msg)  # said at every int8 layer and forward
