"""No graph where nothing learns: unadapted towers, and all that lies below the first adapter.

A frozen tower needs no graph, and with a folder its features are computed once for all epochs. Gradient
checkpointing makes the token embeddings ask for gradients, so that a reentrant checkpoint has an input that
does; one that is not reentrant needs none, and without it the layers below the first adapter keep nothing.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from vqlora.modalities import find_description
from vqlora.step.features import FeatureCache


class FrozenTowers:
    """Switch `frozen`: parts without a trainable parameter run under `no_grad` as long as no input of theirs
    asks for a gradient. folder: also keep their features there (see `vqlora.step.features`).
    """

    def __init__(self, model: nn.Module, folder: str | Path | None = None) -> None:
        self.towers = frozen_parts(model)
        self.caches: dict[str, FeatureCache] = {}
        for name, tower in self.towers.items():
            if folder is not None and FeatureCache.why_not(model, name) is None:
                self.caches[name] = FeatureCache(tower, folder)
            tower.forward = partial(self._forward, tower, self.caches.get(name))

    def off(self) -> None:
        for tower in self.towers.values():
            del tower.forward
        self.towers = {}

    def _forward(self, tower: nn.Module, cache: FeatureCache | None, *args, **kwargs):
        plain = partial(type(tower).forward, tower)
        asks = any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves((args, kwargs)))
        if asks or any(p.requires_grad for p in tower.parameters()):
            return plain(*args, **kwargs)
        with torch.no_grad():
            return plain(*args, **kwargs) if cache is None else cache(plain, args, kwargs)


def frozen_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Full name -> module of the described parts, encoders and fusion, in which nothing learns."""
    known, found = find_description(model), {}
    for name in (*known.vision, *known.audio, *known.fusion) if known is not None else ():
        part = model.get_submodule(name)
        list_of_parts = type(part) in (nn.ModuleList, nn.Sequential)  # called one by one
        free = not list_of_parts and "forward" not in vars(part)
        if free and not any(p.requires_grad for p in part.parameters()):
            found[name] = part
    return found


class InputGradients:
    """Switch `below`: outputs of embeddings, which checkpointing makes ask for gradients, do so no more.

    Looked at before every forward, since the Trainer sets checkpointing up when training begins.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.embeddings, self.hooks = _embeddings(model), []
        self.before = model.register_forward_pre_hook(self._before)

    def off(self) -> None:
        for hook in (self.before, *self.hooks):
            hook.remove()

    def _before(self, model: PreTrainedModel, args: tuple) -> None:
        for hook in self.hooks:
            hook.remove()  # to come behind hooks that were put there since
        embeddings = [] if reentrant(model) else self.embeddings
        self.hooks = [module.register_forward_hook(_no_more_leaf) for module in embeddings]


def _no_more_leaf(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """An output that asks for gradients without a graph was made to by a hook: no weight behind it learns."""
    return output.detach() if output.requires_grad and output.grad_fn is None else output


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """Input embeddings of the model and of the models in it."""
    found = {}
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            try:
                module = part.get_input_embeddings()
            except NotImplementedError:
                continue
            if isinstance(module, nn.Module):
                found[id(module)] = module
    return list(found.values())


def reentrant(model: nn.Module) -> bool:
    """Whether a block is checkpointed in the reentrant way, which needs an input that asks for gradients."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            function = getattr(function, "checkpoint", function)  # as the adapter's context wraps it
            if getattr(function, "keywords", {}).get("use_reentrant") is not False:
                return True
    return False
