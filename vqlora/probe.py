"""One forward and backward of a model under observation: what each layer really read, computed and learned.

measured = probe(model, batch)     # gradients, modes and adapter weights are as before afterwards
measured.grads["base_model.model...lora_A.default.weight"]     # norm, or None where none arrived
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from vqlora.modalities import Modalities, linear_layers, plain_name
from vqlora.modalities.rows import FrameRows, frame_rows

GATE = "lora_gate"  # in the name of every parameter of a gate


@dataclass
class Seen:
    """What one layer saw in one forward: activation rows, those that show a frame, and two dtypes."""

    rows: int = 0
    frame_rows: int = 0
    read: torch.dtype | None = None
    made: torch.dtype | None = None


@dataclass
class Measured:
    """`grads` of the model as it is; `moved` with every all-zero adapter tensor shaken, so that no gradient
    is zero merely because its partner still is. `kept` are frozen parts that hold a graph for nothing."""

    loss: float
    grads: dict[str, float | None]
    moved: dict[str, float | None]
    layers: dict[str, Seen]
    kept: dict[str, str] = field(default_factory=dict)


NOTHING = Measured(float("nan"), {}, {}, {})


def probe(model: nn.Module, batch: dict, known: Modalities, seed: int = 0) -> Measured:
    """Run `batch` forward and backward in training mode.

    A second pass follows where an adapter tensor is all zero (B at initialisation): the zeros get small
    random values for it and are put back. Dropout and the values depend on `seed` alone.
    Raises ValueError if the batch gives no loss.
    """
    base = plain_base(model)
    rows = frame_rows(base, batch) if known.rows is not None else None
    with _left_as_it_was(model), torch.random.fork_rng(devices=_devices(model)):
        layers, kept, stack = {}, {}, ExitStack()
        with stack:
            for hook in _layer_hooks(base, known, rows, layers):
                stack.callback(hook.remove)
            for hook in _graph_hooks(model, base, known, kept):
                stack.callback(hook.remove)
            torch.manual_seed(seed)
            loss = _loss(model, batch)
        grads = _gradients(model, loss)
        zeros = [p for p in _trainable(model).values() if p.is_floating_point() and not p.any()]
        moved = grads
        if zeros:
            before = [param.detach().clone() for param in zeros]
            try:
                generator = torch.Generator().manual_seed(seed)
                for param in zeros:
                    noise = torch.randn(param.shape, generator=generator) * 0.02
                    param.data.copy_(noise)
                torch.manual_seed(seed)
                moved = _gradients(model, _loss(model, batch))
            finally:
                for param, old in zip(zeros, before, strict=True):
                    param.data.copy_(old)
    return Measured(float(loss.detach()), grads, moved, layers, kept)


def plain_base(model: nn.Module) -> nn.Module:
    """The model below peft, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapted_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """Layers that carry adapters of any peft method, by their full names in the base."""
    return {
        plain_name(name): m
        for name, m in plain_base(model).named_modules()
        if isinstance(m, BaseTunerLayer) and hasattr(m, "base_layer")
    }


def adapter_config(model: nn.Module):
    """Configuration of the active adapter; None without peft."""
    return model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None


def adapter_parameters(model: nn.Module) -> dict[str, str]:
    """Full parameter names of the active adapters -> the layer each belongs to."""
    if not isinstance(model, PeftModel):
        return {}
    prefix, config = getattr(model.base_model, "prefix", "prompt_encoder"), adapter_config(model)
    idle = set(model.peft_config) - set(model.active_adapters)
    found = {}
    for name, _ in model.named_parameters():
        steps = name.split(".")
        at = next((i for i, step in enumerate(steps) if step.startswith((prefix, "prompt_encoder"))), None)
        saved = "modules_to_save" in steps or any(step.startswith("trainable_tokens") for step in steps)
        bias = getattr(config, "bias", "none") != "none" and steps[-1] == "bias"
        if (at is None and not saved and not bias) or idle & set(steps):
            continue
        own = steps[:at] if at else steps[:-1]
        found[name] = layer_name(".".join(own))
    return found


def named_linear(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers of the base by their full names; of one in `modules_to_save` the copy that is trained."""
    layers = {}
    for name, module in linear_layers(plain_base(model)):
        if "original_module" not in name or layer_name(name) not in layers:
            layers[layer_name(name)] = module
    return layers


def layer_name(name: str) -> str:
    """A module's name in the base, below adapters and `modules_to_save` alike."""
    return re.sub(r"\.(original_module|modules_to_save\.[^.]+)(?=\.|$)", "", plain_name(name))


def rank(layer: nn.Module | None) -> int:
    """Largest rank of a layer's active adapters; 0 without, or where the method has no ranks."""
    ranks = getattr(layer, "r", None)
    if not isinstance(ranks, dict):
        return 0
    return max((ranks[name] for name in layer.active_adapters if isinstance(ranks.get(name), int)), default=0)


def to_device(batch: dict, device: torch.device) -> dict:
    """`batch` with its tensors on `device`."""
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, dict(batch))


def _loss(model: nn.Module, batch: dict) -> Tensor:
    output = model(**batch)
    loss = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"batch: {type(plain_base(model)).__name__} gives no loss for {', '.join(sorted(batch))}; "
            "add `labels` (or `return_loss=True` where the class has that)"
        )
    return loss


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, float | None]:
    params = _trainable(model)
    for param in model.parameters():
        param.grad = None
    if loss.requires_grad:
        loss.backward()
    return {n: None if p.grad is None else float(p.grad.float().norm()) for n, p in params.items()}


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def _devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    grads = {param: param.grad for param in model.parameters()}
    model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for param, grad in grads.items():
            param.grad = grad


def _layer_hooks(base, known: Modalities, rows: FrameRows | None, layers: dict[str, Seen]) -> Iterator:
    """Watch every linear layer; below an adapter the frozen one, which reads what the adapter reads."""

    def watch(name):
        def hook(module, inputs, output):
            x = inputs[0]
            seen = layers.setdefault(name, Seen())
            count = x[..., 0].numel()
            seen.rows, seen.read, seen.made = seen.rows + count, x.dtype, output.dtype
            if rows is not None and known.of(name) is not None and known.layout(name) != "text":
                index = rows.index(known.layout(name), x.shape)
                shows = int((index < rows.frames).sum())
                seen.frame_rows += shows * count // index.numel()

        return hook

    for name, module in named_linear(base).items():
        layers[name] = Seen()
        yield module.register_forward_hook(watch(name))


def _graph_hooks(model, base, known: Modalities, kept: dict[str, str]) -> Iterator:
    """Watch the outputs of parts without a trainable parameter for graphs that lead to none either."""
    trainable = {id(p) for p in _trainable(model).values()}
    own = {part: {id(p) for p in _part(base, part).parameters()} & trainable for part in _parts(base, known)}

    def watch(path, first):
        def hook(module, inputs, output):
            made = next((t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad), None)
            if made is None or path in kept:
                return
            leaves, hidden = _leaves(made)
            if leaves & trainable or (hidden and not first and trainable):
                return  # what reentrant checkpointing hides may be an adapter of an earlier part
            kept[path] = _parts(base, known)[path]

        return hook

    for path, modality in _parts(base, known).items():
        if not own[path]:
            module = _part(base, path)
            module = list(module)[-1] if isinstance(module, nn.ModuleList) else module
            yield module.register_forward_hook(watch(path, modality in ("vision", "audio")))


def _parts(base: nn.Module, known: Modalities) -> dict[str, str]:
    have = dict(base.named_modules())
    parts = {path: m for m in ("vision", "audio", "fusion", "text") for path in getattr(known, m)}
    return {path: m for path, m in parts.items() if path in have and list(have[path].parameters())}


def _part(base: nn.Module, path: str) -> nn.Module:
    return base.get_submodule(path)


def _leaves(tensor: Tensor) -> tuple[set[int], bool]:
    """Ids of the leaf tensors behind `tensor`, and whether a reentrant checkpoint hides some."""
    found, hidden, seen = {id(tensor)} if tensor.grad_fn is None else set(), False, set()
    queue = [tensor.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        hidden |= type(node).__name__ == "CheckpointFunctionBackward"
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        queue.extend(following for following, _ in node.next_functions)
    return found, hidden
