"""The adapted layer: y = W x + s · B (g ⊙ (A x)) on a linear layer in 32, 16, 8 or 4 bits.

peft's own layers do everything but the update itself; gate "none" leaves even that to them.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer, layer, variants
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.nn import functional as F

from vqlora.adapter.config import VQLoraConfig
from vqlora.adapter.context import FrameContext
from vqlora.temporal import gate_values, head_size


class GatedUpdate(variants.LoraVariant):
    """What peft calls in place of the plain update."""

    @staticmethod
    def init(module: GatedLayer, adapter_name: str, **kwargs) -> None:
        """The gate needs the layer's place in the model: see `GatedLayer.add_gate`."""

    @staticmethod
    def forward(module: GatedLayer, *, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        """x [.., d_in], result = W x [.., d_out]. The gate acts on A x [.., r]: cheap, r is small."""
        low = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        low = low * module.gate_of_rows(active_adapter, x.shape).to(low)
        update = module.lora_B[active_adapter](low) * module.scaling[active_adapter]
        if module.rounds_update and not torch.is_autocast_enabled(x.device.type):
            update = update.to(result.dtype)
        return result + update

    @staticmethod
    def merge_safe(module: GatedLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + module.constant_delta(active_adapter).to(orig_weight)

    @staticmethod
    def merge_unsafe(module: GatedLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.constant_delta(active_adapter).to(orig_weight)

    @staticmethod
    def unmerge(module: GatedLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.constant_delta(active_adapter).to(orig_weight)


class GatedLayer(LoraLayer):
    """Mixed into peft's layers: a gate head per adapter, and in one layer of a modality the shared trunk."""

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_gate", "lora_gate_trunk")
    rounds_update = False  # to the base layer's dtype before the sum, as peft does it for this kind of layer
    context: FrameContext
    name: str  # full name in the base model
    modality: str
    layout: str  # how its input's rows are laid out, one of vqlora.modalities.LAYOUTS

    def update_layer(self, adapter_name: str, *args, **kwargs) -> None:
        if not hasattr(self, "lora_gate"):
            self.lora_gate, self.lora_gate_trunk = nn.ModuleDict(), nn.ModuleDict()
        super().update_layer(adapter_name, *args, **kwargs)

    def resolve_lora_variant(self, *, config: VQLoraConfig, **kwargs) -> GatedUpdate | None:
        return None if config.gate == "none" else GatedUpdate()

    def add_gate(self, adapter: str, config: VQLoraConfig) -> None:
        """Give the adapter its gate: a head that starts at zero, so that every gate starts at exactly 1."""
        if not config.gates(self.modality):
            self.lora_variant.pop(adapter, None)  # peft's own update
            return
        size, device = head_size(config.gate, self.r[adapter]), self.lora_A[adapter].weight.device
        if not size:
            return
        with torch.random.fork_rng(devices=[]):  # later layers' A comes out as without gates
            trunk = nn.Linear(config.feature_count, config.gate_hidden).to(device)
            head = nn.Linear(config.gate_hidden, size).to(device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.lora_gate[adapter] = head
        if (adapter, self.modality) not in self.context.trunks:
            self.lora_gate_trunk[adapter] = trunk
            self.context.trunks[adapter, self.modality] = trunk
        self.context.groups.setdefault((adapter, self.modality, self.layout), []).append(self)

    def gate_table(self, adapter: str) -> Tensor:
        """Gates [F + B, r] or [F + B, 1] of the current forward's frames, then of its clips, in float32.

        A single row where the gate is constant or the forward shows no video.
        """
        return _tables([self], adapter)

    def gate_of_rows(self, adapter: str, shape: torch.Size) -> Tensor:
        """Gates that broadcast to [*shape[:-1], r], for an input of `shape`.

        All layers of a modality whose rows are laid out alike are gated in one go: each by itself is a dozen
        operations on a few numbers, which add up in a small model's training step.
        """
        context, key = self.context, (adapter, self.modality, self.layout)
        if context.gates is None or self not in context.groups.get(key, ()):
            return self._look_up(_tables([self], adapter), adapter, shape)
        frames = context.frames
        now = (*key, *shape[:-1], torch.is_grad_enabled(), frames.offset if frames is not None else None)
        if now not in context.gates:
            layers = [layer for layer in context.groups[key] if adapter in layer.lora_A]
            rows = self._look_up(_tables(layers, adapter), adapter, shape)
            widths = [layer.gate_width(adapter) for layer in layers]
            one = rows.shape[-1] == 1  # gates without parameters are the same in all layers
            parts = [rows] * len(layers) if one else rows.split(widths, dim=-1)
            context.gates[now] = {layer.name: part for layer, part in zip(layers, parts, strict=True)}
        return context.gates[now][self.name]

    def gate_width(self, adapter: str) -> int:
        """Gates of a row: one for each rank, or 1."""
        return self.r[adapter] if self.context.configs[adapter].gate in ("rank", "mixture") else 1

    def _look_up(self, table: Tensor, adapter: str, shape: torch.Size) -> Tensor:
        if len(table) == 1:
            return table[0]
        index = self.context.current(self.name).index(self.layout, shape)
        # as an embedding: its backward adds up the rows of a frame much faster than plain indexing does
        return F.embedding(index.to(table.device), table)

    def constant_gate(self, adapter: str) -> Tensor | None:
        """The gate [r] that holds for every row, where there is one: always open, or not of the frames."""
        config, rank = self.context.configs[adapter], self.r[adapter]
        weight = self.lora_A[adapter].weight
        if not config.gates(self.modality):
            return torch.ones(rank, device=weight.device)
        if config.gate == "selective":
            return None
        with torch.no_grad():
            if config.control == "constant":
                return self.gate_table(adapter)[0].expand(rank)
            head = self.lora_gate[adapter]
            if bool(head.weight.any()):
                return None
            return gate_values(config.gate, head.bias.float(), rank).expand(rank)

    def delta_weight(self, adapter: str, gate: Tensor) -> Tensor:
        """s · B diag(gate) A [d_out, d_in] for a gate [r]: what the update is where the gate is this."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return (b * gate.to(b)) @ a * self.scaling[adapter]

    def constant_delta(self, adapter: str) -> Tensor:
        """The whole update, exactly. Raises ValueError if the gate differs from frame to frame."""
        gate = self.constant_gate(adapter)
        if gate is None:
            raise ValueError(
                f"{self.name}: the gate of adapter {adapter!r} differs from frame to frame, so no weight "
                "equals it; vqlora.merge(model, calibration) folds in the mean gate and says what that costs"
            )
        return self.delta_weight(adapter, gate)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _check_forward_args(self, x, *args, **kwargs) -> None:
        if kwargs.get("adapter_names") and self.lora_variant:
            raise ValueError("adapter_names: a batch of several adapters is not possible with gated adapters")
        super()._check_forward_args(x, *args, **kwargs)


class GatedLinear(GatedLayer, layer.Linear):
    """On torch.nn.Linear and its subclasses."""


class GatedLinear4bit(GatedLayer, Linear4bit):
    """On bitsandbytes' NF4 and FP4 layers."""

    rounds_update = True


class GatedLinear8bit(GatedLayer, Linear8bitLt):
    """On bitsandbytes' int8 layers."""

    rounds_update = True


LAYERS = {bnb.nn.Linear4bit: GatedLinear4bit, bnb.nn.Linear8bitLt: GatedLinear8bit, nn.Linear: GatedLinear}


def _tables(layers: list[GatedLayer], adapter: str) -> Tensor:
    """Gates of several layers of one modality side by side: [N, sum of their widths], in float32."""
    first = layers[0]
    context, config = first.context, first.context.configs[adapter]
    if config.reads_frames:
        frames = context.current(first.name)
        features = frames.features(adapter, config)
    else:
        features = torch.ones(1, config.feature_count)
    if config.gate == "selective":
        place = config.feature_names.index(config.selective_feature)
        table = (features[:, place : place + 1] >= config.selective_threshold).float()
        table[0 if frames.rows is None else frames.rows.frames :] = 1.0  # text keeps its adapters
        return table
    trunk, heads = context.trunks[adapter, first.modality], [layer.lora_gate[adapter] for layer in layers]
    device = heads[0].weight.device
    weight = torch.cat([head.weight.to(device) for head in heads])
    bias = torch.cat([head.bias.to(device) for head in heads])
    with torch.autocast(device.type, enabled=False):
        hidden = F.linear(features.to(trunk.weight.device), trunk.weight.float(), trunk.bias.float())
        u = F.linear(torch.tanh(hidden).to(device), weight.float(), bias.float())
        if config.gate == "mixture":
            parts = zip(u.split(1, dim=-1), layers, strict=True)
            return torch.cat(
                [gate_values("mixture", part, layer.r[adapter]) for part, layer in parts], dim=-1
            )
        return gate_values(config.gate, u, u.shape[-1])
