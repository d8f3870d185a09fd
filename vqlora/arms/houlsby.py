"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751) as a peft method; peft itself has none.

h <- h + W_up σ(W_down h + b_down) + b_up, on the output h [.., d] of each attention and of each feed-forward
part of a transformer block, "after the projection back to the input size, but before adding the skip
connection back" (section 2.1). σ is GELU, as in the paper's code. W_down [m, d] starts from the paper's
truncated normal of deviation 0.01, all else at zero: the model starts exactly as the base.

The paper also trains layer norms. Here these stay as they are, as in the other arms that hold the base
frozen, and one base carries any number of adapters. Parts without transformer blocks (a projector) get none.

    model = get_peft_model(load_quantized(base), HoulsbyConfig(width=8, modalities=("vision", "text")))

Importing this makes the method known to peft.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from peft import PeftConfig, mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from vqlora.modalities import target_modules
from vqlora.quantize import close_packing_trap

STD = 0.01
ENDS = {  # the last layer of each part of a block, by the names that Llama- and CLIP-like classes give them
    "attention": re.compile(r"\.self_attn\.(o_proj|out_proj)$"),
    "feed-forward": re.compile(r"\.mlp\.(down_proj|fc2)$"),
}


class HoulsbyPeftType(StrEnum):
    """The method's own peft type."""

    HOULSBY = "HOULSBY"


@dataclass
class HoulsbyConfig(PeftConfig):
    """width: m, of the bottleneck. modalities: parts whose transformer blocks get adapters. target_modules:
    full names of the layers behind which they are; filled in when the adapter is put on a model."""

    width: int = 8
    modalities: Sequence[str] = ("vision", "text")
    target_modules: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = HoulsbyPeftType.HOULSBY
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 1:
            raise ValueError(f"width: {self.width!r}; allowed: whole numbers from 1")
        self.modalities = list(self.modalities)
        if self.target_modules is not None:  # a tuple: peft would shorten a long list to endings
            self.target_modules = tuple(self.target_modules)


class Bottleneck(nn.Module):
    """x [.., d] -> W_up σ(W_down x + b_down) + b_up, zero at initialisation; in float32 as LoRA's weights."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        start = nn.init.trunc_normal_(torch.empty(width, features), std=STD, a=-2 * STD, b=2 * STD)
        self.down = nn.Parameter(start)
        self.down_bias = nn.Parameter(torch.zeros(width))
        self.up = nn.Parameter(torch.zeros(features, width))
        self.up_bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        low = F.gelu(F.linear(x.to(self.down.dtype), self.down, self.down_bias))
        return F.linear(low, self.up, self.up_bias).to(x.dtype)


class HoulsbyLayer(nn.Module, BaseTunerLayer):
    """A linear layer in any bits with bottlenecks behind it; `r` is their width, by adapter."""

    adapter_layer_names = ("houlsby_bottleneck",)
    other_param_names = ("r",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: HoulsbyConfig) -> None:
        super().__init__()
        self.base_layer, self.r, self.houlsby_bottleneck = base_layer, {}, nn.ModuleDict()
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: HoulsbyConfig) -> None:
        device = self.get_base_layer().weight.device
        self.r[adapter_name] = config.width
        self.houlsby_bottleneck[adapter_name] = Bottleneck(self.out_features, config.width).to(device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for name in () if self.disable_adapters else self.active_adapters:
            if name in self.houlsby_bottleneck:
                result = result + self.houlsby_bottleneck[name](result)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("bottleneck adapters hold a nonlinearity, which no weight of the base can take up")

    unmerge = merge


class HoulsbyModel(BaseTuner):
    """The adapters as peft sees them."""

    prefix = "houlsby_"
    tuner_layer_cls = HoulsbyLayer

    def _prepare_adapter_config(self, peft_config: HoulsbyConfig, model_config: dict) -> HoulsbyConfig:
        close_packing_trap(self.model)
        if peft_config.target_modules is None:
            peft_config.target_modules = tuple(block_ends(self.model, peft_config.modalities))
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: HoulsbyConfig, key: str) -> bool:
        return key in peft_config.target_modules

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key
    ) -> None:
        if isinstance(target, HoulsbyLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = HoulsbyLayer(target, adapter_name, peft_config)
        if adapter_name != self.active_adapter:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


# peft's own registration takes only names of its own list; these tables are what it reads.
mapping.PEFT_TYPE_TO_CONFIG_MAPPING[HoulsbyPeftType.HOULSBY] = HoulsbyConfig
mapping.PEFT_TYPE_TO_TUNER_MAPPING[HoulsbyPeftType.HOULSBY] = HoulsbyModel
mapping.PEFT_TYPE_TO_PREFIX_MAPPING[HoulsbyPeftType.HOULSBY] = HoulsbyModel.prefix


def configure(model: nn.Module, settings, batches) -> HoulsbyConfig:
    """`settings.rank` is the width, `settings.modalities` says whose blocks. Raises as `block_ends`."""
    blocks = tuple(part for part in settings.modalities if part != "fusion")
    return HoulsbyConfig(width=settings.rank, modalities=blocks, target_modules=block_ends(model, blocks))


def block_ends(model: nn.Module, modalities: Iterable[str]) -> list[str]:
    """Full names of the layers that end the attention and the feed-forward part of each transformer block.

    Raises ValueError for modalities without blocks, or whose layers have other names than `ENDS`.
    """
    modalities = tuple(modalities)
    if not modalities:
        raise ValueError("modalities: none has transformer blocks; allowed: vision, text, audio")
    found = []
    for modality in modalities:
        names = target_modules(model, (modality,))
        parts = {part: [name for name in names if end.search(name)] for part, end in ENDS.items()}
        counts = {part: len(own) for part, own in parts.items()}
        if len(set(counts.values())) > 1 or not all(counts.values()):
            raise ValueError(
                f"arm: 'houlsby' does not know the transformer blocks of {modality} in "
                f"{model.config.model_type!r}: it finds the ends of {counts}"
            )
        found += [name for name in names if any(name in own for own in parts.values())]
    return found
