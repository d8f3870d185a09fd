"""The adapter as peft sees it, and what can be read off a model that has one."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from vqlora.adapter.config import VQLoraConfig, resolve_layers
from vqlora.adapter.context import FrameContext
from vqlora.adapter.layer import LAYERS, GatedLayer
from vqlora.modalities import describe
from vqlora.quantize import close_packing_trap
from vqlora.temporal import effective_rank


class VQLoraModel(LoraModel):
    """Puts gated layers on a model; `peft.get_peft_model(model, VQLoraConfig(...))` makes one."""

    tuner_layer_cls = GatedLayer

    def _prepare_adapter_config(self, peft_config: VQLoraConfig, model_config: dict) -> VQLoraConfig:
        close_packing_trap(self.model)
        resolve_layers(self.model, peft_config)
        self.known, self.context = describe(self.model), FrameContext.of(self.model, create=True)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: VQLoraConfig, key: str):
        # peft also takes names that end in a target; here a target is one layer
        return key in peft_config.target_modules and LoraModel._check_target_module_exists(peft_config, key)

    def _create_new_module(self, lora_config, adapter_name, target, **kwargs) -> GatedLayer:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        for kind, wrapper in LAYERS.items():
            if isinstance(base, kind):
                return wrapper(target, adapter_name, config=lora_config, **kwargs)
        raise ValueError(
            f"{kwargs.get('target_name')}: {type(base).__name__} is not a linear layer; give `layers` "
            "patterns that leave it out"
        )

    def _create_and_replace(
        self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
        )
        layer = getattr(parent, target_name)
        layer.context, layer.name = self.context, current_key
        layer.modality, layer.layout = self.known.of(current_key), self.known.layout(current_key)
        self.context.configs[adapter_name] = lora_config
        layer.add_gate(adapter_name, lora_config)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.context.configs.pop(adapter_name, None)
        for shared in (self.context.trunks, self.context.groups):
            for key in [key for key in shared if key[0] == adapter_name]:
                del shared[key]

    def _unload_and_optionally_merge(self, *args, **kwargs) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        self.context.remove(model)
        return model


def gated_layers(model: nn.Module) -> list[tuple[str, GatedLayer]]:
    """Full names in the base model and modules of all adapted layers. Raises ValueError without any."""
    FrameContext.of(model)
    return [(module.name, module) for module in model.modules() if isinstance(module, GatedLayer)]


def gates(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """The gates of the last forward, by layer: [F, r], or [F, 1] where one gate holds for all ranks.

    Frames in order, clip by clip; a single row where the last forward showed no video. Layers without a gate
    are left out. adapter: None takes the active one.
    """
    return {layer.name: table for layer, table, _ in _tables(model, adapter)}


def effective_ranks(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """How many ranks act in each frame of the last forward, by layer: [F], between 0 and the layer's rank.

    (Σ g)² / Σ g² over the gates g: the participation ratio.
    """
    return {
        layer.name: effective_rank(table, layer.r[name]) for layer, table, name in _tables(model, adapter)
    }


def _tables(model: nn.Module, adapter: str | None):
    layers, context = gated_layers(model), FrameContext.of(model)
    shown = context.frames.rows if context.frames is not None else None
    for _, layer in layers:
        for name in [adapter] if adapter is not None else layer.active_adapters:
            if name not in layer.lora_A or not context.configs[name].gates(layer.modality):
                continue
            with torch.no_grad():
                table = context.resume(context.frames, layer.gate_table, name)
            if shown is not None:
                table = table.expand(shown.frames, -1) if len(table) == 1 else table[: shown.frames]
            yield layer, table, name
