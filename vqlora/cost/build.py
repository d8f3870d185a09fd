"""A model as it would be loaded and adapted, from its configuration alone."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from vqlora.adapter import VQLoraConfig
from vqlora.cost.shapes import Shapes, converted_in_place, quantize_shapes
from vqlora.modalities import find_description
from vqlora.precision import compute_dtype
from vqlora.quantize import (
    attach_quantizer,
    bnb_config,
    close_packing_trap,
    layers_to_quantize,
    load_quantized,
    model_class,
    round_to_16bit,
)


def read_config(source: str | Path | PreTrainedConfig | nn.Module) -> tuple[type, PreTrainedConfig]:
    """(class, configuration) of a model in memory (adapted or not), a configuration, a folder, a
    `config.json`, or a hub id whose configuration is here already. Weights are neither needed nor read.

    Raises ValueError where there is no configuration, or no class for it.
    """
    import vqlora.kinevlm  # noqa: F401  makes the embedded base known to AutoConfig

    if isinstance(source, PeftModel):
        source = source.get_base_model()
    if isinstance(source, PreTrainedModel):
        from vqlora.held import plain_class

        return plain_class(type(source)), copy.deepcopy(source.config)
    if not isinstance(source, PreTrainedConfig):
        path = Path(source)
        if source == "released":
            from vqlora.base import RELEASED as path
        try:
            source = AutoConfig.from_pretrained(path if path.exists() else str(source))
        except OSError as fault:
            raise ValueError(
                f"{source}: no configuration found; give a folder with a config.json, a configuration, a "
                "model, or the id of a hub model whose configuration was downloaded before"
            ) from fault
    config = copy.deepcopy(source)
    return model_class(config), config


def build_shapes(shapes: Shapes, cls: type, config: PreTrainedConfig, settings) -> nn.Module:
    """The model that `settings` (a `vqlora.cost.plan.Settings`) describe, adapters on, without values.

    Goes through `load_quantized` and `get_peft_model` as a real model does, but for the packing itself.
    """
    device = torch.device(settings.device)
    saved = getattr(config, "quantization_config", None)
    if saved is not None:
        del config.quantization_config  # planned in the bits asked for, whatever it is stored in
    compute = compute_dtype(settings.dtype, "cpu")
    with shapes, no_init_weights():
        model = cls(config)
        model.tie_weights()
    if settings.full:
        return attend(model, settings)
    asked = settings.bits, tuple(settings.skip), settings.quantize_head
    chosen, kept = layers_to_quantize(model, *asked, device)
    if settings.bits != "bf16":
        quantize_shapes(shapes, model, chosen, settings.bits, settings.double_quant)
    with shapes, converted_in_place():
        if settings.bits != "bf16":
            how = bnb_config(settings.bits, settings.double_quant, compute, kept)
            attach_quantizer(model, how)
            round_to_16bit(model, torch.device("cpu"))
            model.config.quantization_config = how
        load_quantized(model, settings.bits, compute_dtype=compute.name, device="cpu")
        adapter = settings.adapter or default_adapter(model)
    with shapes, converted_in_place(), no_init_weights():
        model = get_peft_model(model, copy.deepcopy(adapter), autocast_adapter_dtype=True)
        close_packing_trap(model)
    return attend(model, settings)


def default_adapter(model: nn.Module) -> LoraConfig:
    """The library's own adapter where the architecture is described, else LoRA of rank 8 on all layers."""
    if find_description(model) is not None:
        return VQLoraConfig()
    return LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


def attend(model: nn.Module, settings) -> nn.Module:
    """The attention that `train` takes on this kind of machine."""
    from vqlora.train import choose_attention

    choose_attention(model, settings.dtype, torch.device(settings.device))
    return model
