"""What is alive when a step needs most memory: every storage from its making to its freeing, by what it is.

    with Follow(model, vocabulary=32000) as seen:
        loss = model(**batch).loss
        seen.phase = "backward"
        loss.backward()
    seen.peak_parts()       # {"activations": .., "gradients": .., "logits": .., "working": ..}

Works on real tensors and on those of `vqlora.cost.shapes` alike, so a measurement and a plan are split by the
same rules. Scratch memory inside an operation is not seen from here; where it is large it is added by the
table in `vqlora.cost.scratch`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqlora.cost.flops import flop_formulas
from vqlora.cost.shapes import Shapes

PARTS = ("activations", "gradients", "logits", "cache", "working")


@dataclass
class _Made:
    """One storage made inside: when, how large, in which phase, and what it was found to be."""

    phase: str
    size: int
    part: str | None = None


class Follow(TorchDispatchMode):
    """Follows storages made inside; what was there before counts as nothing.

    model: gradients of its parameters are told apart. vocabulary: tensors [.., vocabulary] are logits, with
    their float copy, their softmax and their gradients. scratch: (operation, arguments, result) -> bytes that
    the operation needs inside. shapes: run the operations there (as a mode of its own it would cost twice the
    time). phase: set it to say which part of the step runs. flops: of all so far, by phase.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        vocabulary: int | None = None,
        scratch: Callable | None = None,
        shapes: Shapes | None = None,
    ) -> None:
        super().__init__()
        self.vocabulary, self.scratch, self.shapes, self.phase = vocabulary, scratch, shapes, "forward"
        self.flops: Counter[str] = Counter()
        self._formulas = flop_formulas()
        self.alive: dict[int, int] = {}  # storage -> place in `made`
        self.made: list[_Made] = []
        self.events: list[tuple[int, bool, str]] = []  # (place, made or freed, phase)
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._gradient)
            for param in (model.parameters() if model is not None else ())
            if param.requires_grad
        ]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled inside; torch's guard against it doubles the time of an operation

    def __exit__(self, *fault):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*fault)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return self._run(func, args, kwargs)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._watch(leaf, before=True)
        out = self._run(func, args, kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops[self.phase] += formula(*args, **kwargs, out_val=out)
        inside = self.scratch(func, args, out) if self.scratch is not None else 0
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._watch(leaf)
        if inside:
            self._note(inside)
            self._free(len(self.made) - 1)
        return out

    def _run(self, func, args, kwargs):
        return func(*args, **kwargs) if self.shapes is None else self.shapes.run(func, args, kwargs)

    def tag(self, tensors: object, part: str) -> None:
        """Say what the storages of some tensors (in any nesting) are."""
        for leaf in tree_leaves(tensors):
            if isinstance(leaf, Tensor):
                place = self.alive.get(leaf.untyped_storage()._cdata)
                if place is not None:
                    self.made[place].part = part

    @property
    def peak_bytes(self) -> int:
        return self._peak()[0]

    def peak_parts(self, phase: str | None = None) -> dict[str, int]:
        """Bytes alive at the peak (of one phase) by part; without a phase they sum to `peak_bytes`.

        "activations" were made in the forward and lived into the backward; "working" is everything that no
        other part is: what a layer needs while it computes, and blocks that checkpointing computes again.
        """
        _, at = self._peak(phase)
        into_backward = self._alive(next((n for n, e in enumerate(self.events) if e[2] == "backward"), 0))
        parts = dict.fromkeys(PARTS, 0)
        for place in self._alive(at):
            made = self.made[place]
            parts[made.part or ("activations" if place in into_backward else "working")] += made.size
        return parts

    def _alive(self, count: int) -> set[int]:
        """Places of what is alive after the first `count` events."""
        alive: set[int] = set()
        for place, made, _ in self.events[:count]:
            (alive.add if made else alive.discard)(place)
        return alive

    def _peak(self, phase: str | None = None) -> tuple[int, int]:
        """(bytes, number of events until then) of the first moment with most alive."""
        now = peak = at = 0
        for number, (place, made, its_phase) in enumerate(self.events):
            now += self.made[place].size if made else -self.made[place].size
            if now > peak and phase in (None, its_phase):
                peak, at = now, number + 1
        return peak, at

    def _watch(self, tensor: Tensor, before: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = self._note(0 if before else storage.nbytes())
        if self.vocabulary and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
            self.made[-1].part = "logits"
        weakref.finalize(storage, self._free, self.alive[key], key).atexit = False

    def _note(self, size: int) -> int:
        self.made.append(_Made(self.phase, size))
        self.events.append((len(self.made) - 1, True, self.phase))
        return len(self.made) - 1

    def _free(self, place: int, key: int | None = None) -> None:
        if key is not None:
            self.alive.pop(key, None)
        self.events.append((place, False, self.phase))

    def _gradient(self, param: nn.Parameter) -> None:
        self.tag(param.grad, "gradients")
