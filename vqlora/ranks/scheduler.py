"""Ranks that move between layers during training, at a fixed total: drop the smallest, grow by gradient.

    config = with_room(model, VQLoraConfig(ranks="uniform", budget=90_000, gate="none"))
    model = peft.get_peft_model(model, config)          # twice the ranks that the budget pays for
    arguments = TrainingArguments(..., restore_callback_states_from_checkpoint=True)
    Trainer(model, arguments, ..., callbacks=[RankScheduler(90_000, steps=1_000)])

Sparse training's rule (RigL: Evci et al. 2020, arXiv:1911.11134) on whole ranks. A rank i of a layer is
active, or its column of B is 0 and stays so: it adds nothing, and the gradient of that column says how much
it would help. Every few steps the active ranks with the smallest update |s| ||Bᵢ|| ||Aᵢ|| are dropped and the
parameters they free go to the inactive ranks with the largest gradients per parameter.
"""

from __future__ import annotations

import logging
import math

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from vqlora.adapter.config import VQLoraConfig
from vqlora.adapter.layer import GatedLayer
from vqlora.adapter.model import gated_layers
from vqlora.ranks.allocate import costs_of, fill_in
from vqlora.ranks.budget import uniform

ROOM = 2  # ranks a layer has room for, times the uniform rank that fits the budget
_log = logging.getLogger(__name__)


def with_room(model: nn.Module, config: VQLoraConfig) -> VQLoraConfig:
    """A copy of `config` with room for `ROOM` times the ranks that its budget pays for, for `RankScheduler`.

    `allocation` says so; only ranks worth the budget are ever active. Raises ValueError as `allocate_ranks`
    does, and for gates whose heads the scheduler cannot mask.
    """
    if config.gate not in ("none", "selective"):
        raise ValueError(f"gate: {config.gate!r} does not go with ranks that move; allowed: none, selective")
    costs = costs_of(model, config)
    active = uniform(costs, config.budget)
    room = np.minimum(np.maximum(active * ROOM, 1), costs.high)
    return fill_in(config, costs, room, active=costs.of(active))


class RankScheduler(TrainerCallback, ExportableState):
    """Moves ranks of the default adapter between layers; a resumed run goes on with the same ones.

    Args:
        budget: trainable parameters of all active ranks together; never exceeded.
        steps: of the training; ranks move in its first three quarters and then stay.
        every: steps between two moves; a twelfth of `steps` unless given.
        share: of the active ranks that the first move exchanges; it falls to 0 along a cosine.

    `active` holds the numbers of the active ranks of each layer, `moved` how many were exchanged so far.
    Raises ValueError for a model without room, and when training goes on without the state it had
    (`restore_callback_states_from_checkpoint`).
    """

    def __init__(self, budget: int, steps: int, every: int | None = None, share: float = 0.3) -> None:
        self.budget, self.steps, self.share = budget, steps, share
        self.every = every or max(1, steps // 12)
        self.active: dict[str, list[int]] = {}
        self.helps: dict[str, list[float]] = {}
        self.moved = 0
        self._handles: list = []

    def state(self) -> dict:
        names = ("budget", "steps", "every", "share")
        return {
            "args": {name: getattr(self, name) for name in names},
            "attributes": {name: getattr(self, name) for name in ("active", "helps", "moved")},
        }

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        layers = dict(gated_layers(_plain(model)))
        if not self.active:
            if state.global_step:
                raise ValueError(
                    "RankScheduler: training goes on from a checkpoint without the ranks it had; set "
                    "TrainingArguments(restore_callback_states_from_checkpoint=True)"
                )
            self.active = {name: list(range(rank)) for name, rank in self._start(layers).items()}
        self.helps = self.helps or {name: [0.0] * layer.r["default"] for name, layer in layers.items()}
        self._masks = {name: self._mask(name, layer) for name, layer in layers.items()}
        for name, layer in layers.items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            self._handles += [
                a.register_hook(lambda g, n=name: g * self._masks[n][:, None]),
                b.register_hook(lambda g, n=name: self._note(n, g)),
            ]
            _silence(layer, self._masks[name])

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        step = state.global_step
        if step % self.every == 0 and step <= 0.75 * self.steps:
            self._move(dict(gated_layers(_plain(model))), optimizer, step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        for handle in self._handles:
            handle.remove()
        self._handles = []
        layers = dict(gated_layers(_plain(model)))
        config = next(iter(layers.values())).context.configs["default"]
        config.ranks = {**dict.fromkeys(config.ranks, 0), **{n: len(a) for n, a in self.active.items()}}
        spent = sum(_price(layers[name]) * len(active) for name, active in self.active.items())
        config.allocation = {"allocator": "scheduled", "budget": self.budget, "spent": spent}
        _log.info("ranks moved: %d in %d steps", self.moved, state.global_step)

    def _start(self, layers: dict[str, GatedLayer]) -> dict[str, int]:
        """As many ranks as the budget pays for, spread evenly."""
        if not any(layer.r["default"] > 1 for layer in layers.values()):
            raise ValueError("RankScheduler: no layer has room for a second rank; see with_room")
        ranks, left = dict.fromkeys(layers, 0), self.budget
        for rank in range(max(layer.r["default"] for layer in layers.values())):
            for name in sorted(layers, key=lambda name: -_price(layers[name])):
                if layers[name].r["default"] > rank and _price(layers[name]) <= left:
                    ranks[name] += 1
                    left -= _price(layers[name])
        if not left < self.budget:
            raise ValueError(f"budget: {self.budget:,} pays for no rank of any layer")
        return ranks

    def _note(self, name: str, gradient: Tensor) -> Tensor:
        """Adds up the squared gradients of B's columns [d_out, r]; only active ranks' gradients go on."""
        found = gradient.detach().float().square().sum(dim=0).tolist()
        self.helps[name] = [old + new for old, new in zip(self.helps[name], found, strict=True)]
        return gradient * self._masks[name]

    @torch.no_grad()
    def _move(self, layers: dict[str, GatedLayer], optimizer, step: int) -> None:
        share = self.share / 2 * (1 + math.cos(math.pi * step / (0.75 * self.steps)))
        price, size = {name: _price(layer) for name, layer in layers.items()}, {}
        for name, layer in layers.items():
            a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
            update = a.norm(dim=1) * b.norm(dim=0) * abs(layer.scaling["default"])
            size[name] = (update / price[name]).tolist()
        active = [(name, i) for name in layers for i in self.active[name]]
        active.sort(key=lambda place: size[place[0]][place[1]])
        dropped, kept = active[: int(share * len(active))], active[int(share * len(active)) :]
        left = self.budget - sum(price[name] for name, _ in kept)
        rest = [(n, i) for n in layers for i in range(len(size[n])) if i not in self.active[n]]
        rest.sort(key=lambda place: -self.helps[place[0]][place[1]] / price[place[0]])
        grown = []
        for name, i in (*rest, *reversed(dropped)):  # what was dropped comes back only if nothing else fits
            if price[name] <= left:
                grown.append((name, i))
                left -= price[name]
        self.moved += len(set(grown) - set(dropped))
        self.active = {name: sorted(i for n, i in (*kept, *grown) if n == name) for name in layers}
        for name, layer in layers.items():
            self._masks[name] = self._mask(name, layer)
            _silence(layer, self._masks[name], optimizer)
        self.helps = {name: [0.0] * len(helps) for name, helps in self.helps.items()}

    def _mask(self, name: str, layer: GatedLayer) -> Tensor:
        weight = layer.lora_A["default"].weight
        mask = torch.zeros(len(weight), device=weight.device, dtype=weight.dtype)
        mask[self.active[name]] = 1.0
        return mask


def _price(layer: GatedLayer) -> int:
    return layer.in_features + layer.out_features


@torch.no_grad()
def _silence(layer: GatedLayer, mask: Tensor, optimizer=None) -> None:
    """Inactive columns of B become 0, and so does what an optimizer remembers of inactive ranks."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    b *= mask
    if optimizer is None:
        return
    for parameter, own in ((a, mask[:, None]), (b, mask)):
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value *= own


def _plain(model: nn.Module) -> nn.Module:
    return getattr(model, "module", model)
