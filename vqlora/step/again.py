"""Elementwise results that are made again in backward and not kept: norms, activations, gated units.

A decoder layer keeps 20 numbers per hidden unit and token, and most are a multiplication away from others
that it keeps too. `again(f, x)` keeps x alone and computes f(x) anew in backward. Its result remembers how it
was made (`recipe`), so that a low-rank product that needs it in backward keeps no copy either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from vqlora.step.norms import is_rms_norm, rms_norm

_RECIPE = "_vqlora_recipe"
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
_GATED_UNIT = "self.down_proj(self.act_fn(self.gate_proj({x})) * self.up_proj({x}))"


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function: Callable, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        device = inputs[0].device.type
        enabled = torch.is_autocast_enabled(device)
        ctx.function, ctx.autocast = function, (device, torch.get_autocast_dtype(device), enabled)
        return function(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        inputs = [x.detach() for x in ctx.saved_tensors]
        asked = [x.requires_grad_() for x, asks in zip(inputs, ctx.needs_input_grad[1:], strict=True) if asks]
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled):
            out = ctx.function(*inputs)
        found = iter(torch.autograd.grad(out, asked, grad))
        return None, *(next(found) if asks else None for asks in ctx.needs_input_grad[1:])


class _Unit(torch.autograd.Function):
    """act(gate) · up; its backward makes the activation again, and not the product."""

    @staticmethod
    def forward(ctx, active: _Active, gate: Tensor, up: Tensor):
        ctx.save_for_backward(gate, up)
        ctx.active = active
        return active.act(gate) * up

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        of, active = ctx.active.take(gate)
        grad_gate = torch.autograd.grad(active, of, grad * up)[0] if ctx.needs_input_grad[1] else None
        return None, grad_gate, grad * active.detach() if ctx.needs_input_grad[2] else None


class _Active:
    """act(gate) as backward makes it, once: for the layer that read the product, then for the unit itself."""

    def __init__(self, act: Callable, device: str) -> None:
        self.act, self.made = act, None
        enabled = torch.is_autocast_enabled(device)
        self.autocast = device, torch.get_autocast_dtype(device), enabled

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        self.made = self._make(gate)
        return self.made[1].detach() * up

    def take(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """(gate, act(gate)) with a graph between them; they are kept no longer."""
        made, self.made = self.made or self._make(gate), None
        return made

    def _make(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        device, dtype, enabled = self.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled):
            of = gate.detach().requires_grad_()
            return of, self.act(of)


def again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), with nothing but the inputs kept for its backward.

    function: deterministic, and what it closes over does not learn.
    """
    return _remember(_Again.apply(function, *inputs), function, *inputs)


def _remember(out: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    setattr(out, _RECIPE, (function, inputs))
    return out


def recipe(x: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """(function, inputs) that make x: those it was made by `again` with, else itself."""
    return getattr(x, _RECIPE, (_itself, (x,)))


def _itself(x: Tensor) -> Tensor:
    return x


class Recomputed:
    """Switch `again`: frozen norms, activations, and gated units of the form of Llama's."""

    def __init__(self, model: nn.Module) -> None:
        self.patched = []
        for module in model.modules():
            if _is_gated_unit(module):
                self._patch(module, partial(_gated_unit, module))
            elif _is_frozen_leaf(module) and _is_norm(module):
                self._patch(module, partial(_norm, module))
            elif _is_frozen_leaf(module) and type(module).__module__ in _ACTIVATIONS:
                self._patch(module, partial(_activation, module))

    def off(self) -> None:
        for module in self.patched:
            del module.forward
        self.patched = []

    def _patch(self, module: nn.Module, forward: Callable) -> None:
        if "forward" not in vars(module):
            module.forward = forward
            self.patched.append(module)


def _norm(module: nn.Module, *args, **kwargs) -> Tensor:
    plain = partial(type(module).forward, module)
    if len(args) != 1 or kwargs or not _keeps_graph(module, args[0]):
        return plain(*args, **kwargs)
    if is_rms_norm(module):
        return _remember(rms_norm(module, args[0]), plain, args[0])
    return again(plain, args[0])


def _activation(module: nn.Module, x: Tensor) -> Tensor:
    """As it is, for its own backward starts from x; only who reads the result need not keep it."""
    plain = partial(type(module).forward, module)
    return _remember(plain(x), plain, x) if _keeps_graph(module, x) else plain(x)


def _gated_unit(module: nn.Module, x: Tensor) -> Tensor:
    """down(act(gate x) * up x)"""
    gate, up = module.gate_proj(x), module.up_proj(x)
    act = module.act_fn
    plain = partial(type(act).forward, act) if isinstance(act, nn.Module) else act
    if not _keeps_graph(module, gate):
        return module.down_proj(plain(gate) * up)
    active = _Active(plain, gate.device.type)
    return module.down_proj(_remember(_Unit.apply(active, gate, up), active.product, gate, up))


def _keeps_graph(module: nn.Module, x: Tensor) -> bool:
    return module.training and torch.is_grad_enabled() and x.requires_grad


def _is_gated_unit(module: nn.Module) -> bool:
    """Whether the module's forward is the known formula, by its source."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    try:
        body = inspect.getsource(type(module).forward)
        x = list(inspect.signature(type(module).forward).parameters)[1:]
    except (OSError, TypeError):
        return False
    lines = [line.strip() for line in body.splitlines()[1:] if line.strip()]
    formula = _GATED_UNIT.format(x=x[0]) if len(x) == 1 else None
    return lines in ([f"return {formula}"], [f"down_proj = {formula}", "return down_proj"])


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm without running statistics."""
    return "Norm" in type(module).__name__ and not isinstance(module, nn.modules.batchnorm._NormBase)


def _is_frozen_leaf(module: nn.Module) -> bool:
    """Whether the module holds no others, learns nothing and does not draw numbers."""
    leaf = not any(True for _ in module.children()) and not isinstance(module, nn.RReLU)
    return leaf and not any(p.requires_grad for p in module.parameters())
