"""Logits and loss at label positions only.

Of the L positions of a row only those that predict a label reach the loss: n of them, often 3% of L in a
video prompt. The head computes logits [n, V] instead of [B, L, V], and over large vocabularies in chunks of
rows whose logits are dropped and made again in backward (Chen et al. 2016, arXiv:1604.06174), so that
[n, V] is never there at once; a head held in 16 bits is widened by blocks of its own rows. Mean, or sum
over `num_items_in_batch`: as in the model's own loss.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from vqlora.held import Linear16
from vqlora.step.products import is_frozen

IGNORED = -100
CHUNK = 1 << 22  # logits of one chunk: 16 MiB in float32


class LabelHead:
    """Switch `labels`: while it is on, a training forward with labels has `logits` None.

    Acts in training mode with gradients only; evaluation and generation see every logit. `chunk`: logits
    held at once, 0 for no chunks.
    """

    def __init__(self, model: PreTrainedModel, chunk: int = CHUNK) -> None:
        self.head, self.chunk = output_head(model), chunk
        self.model, self.plain_head, self.plain_loss = model, self.head.forward, model.loss_function
        self.held = type(self.head) is Linear16 and "forward" not in vars(self.head)
        self.has_own_loss = "_loss_function" in vars(model)
        self.chunked = chunk > 0 and self.plain_loss is ForCausalLMLoss
        self.labels: Tensor | None = None  # of the current forward, where its head is to be short
        self.targets: Tensor | None = None  # [n]
        self.deferred = False  # to `_loss`, which makes logits in chunks
        self.rows: Tensor | None = None  # what the head gave: logits [n, V], or hidden rows [n, D]
        self.head.forward = self._short
        model.loss_function = self._loss
        self.hooks = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        )

    @staticmethod
    def why_not(model: nn.Module) -> str | None:
        """The reason why the model's head cannot be shortened, None where it can."""
        if not isinstance(model, PreTrainedModel) or output_head(model) is None:
            return f"{type(model).__name__} has no output head"
        if "labels" not in inspect.signature(type(model).forward).parameters:
            return f"{type(model).__name__} takes no labels"
        if getattr(model.config, "is_encoder_decoder", False) or not _next_token_loss(model):
            return "its loss is not that of the next token"
        return None

    def off(self) -> None:
        del self.head.forward
        if self.has_own_loss:
            self.model.loss_function = self.plain_loss
        else:
            del self.model._loss_function
        for hook in self.hooks:
            hook.remove()

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        labels = given.get("labels")
        keep = given.get("logits_to_keep", 0)
        as_tuple = given.get("return_dict", getattr(model.config, "return_dict", True)) is False
        plain = as_tuple or not (isinstance(keep, int) and keep == 0)
        if "shift_labels" in given or not (model.training and torch.is_grad_enabled()):
            plain = True
        self.labels = labels if isinstance(labels, Tensor) and labels.dim() == 2 and not plain else None

    def _short(self, hidden: Tensor) -> Tensor:
        """hidden [B, L, D] -> logits [n, V], or [n, D] where `_loss` makes them in chunks."""
        if self.labels is None or hidden.shape[:-1] != self.labels.shape:
            return self.plain_head(hidden)
        following = nn.functional.pad(self.labels[:, 1:], (0, 1), value=IGNORED).to(hidden.device)
        learned = following != IGNORED
        self.targets, rows = following[learned], hidden[learned]
        vocabulary = getattr(self.head, "out_features", 0)
        self.deferred = self.chunked and rows.shape[0] * vocabulary > self.chunk
        self.rows = rows if self.deferred else self._logits(rows)
        return self.rows

    def _loss(self, logits: Tensor, labels: Tensor, vocab_size: int, **kwargs) -> Tensor:
        if self.rows is None:
            return self.plain_loss(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        if not self.deferred:
            return self.plain_loss(
                logits=logits, labels=None, vocab_size=vocab_size, shift_labels=self.targets, **kwargs
            )
        if logits is not self.rows:
            raise RuntimeError(
                f"{type(self.model).__name__} changes its logits before the loss, which chunks do not see; "
                "switch them off: lean_step(model, chunk=0)"
            )
        count = kwargs.get("num_items_in_batch")
        size = max(1, self.chunk // vocab_size)
        parts = zip(self.rows.split(size), self.targets.split(size), strict=True)
        ignored = kwargs.get("ignore_index", IGNORED)
        sums = [checkpoint(self._sum, *part, vocab_size, ignored, use_reentrant=False) for part in parts]
        total = torch.stack(sums).sum()
        return total / (len(self.targets) if count is None else torch.as_tensor(count).to(total.device))

    def _logits(self, rows: Tensor) -> Tensor:
        if self.held and self.head.bias is None and is_frozen(self.head):
            return held_product(rows, self.head.weight)
        return self.plain_head(rows)

    def _sum(self, rows: Tensor, targets: Tensor, vocabulary: int, ignored: int) -> Tensor:
        logits = self._logits(rows).float().view(-1, vocabulary)
        return nn.functional.cross_entropy(logits, targets, ignore_index=ignored, reduction="sum")

    def _after(self, model: nn.Module, args: tuple, output: Any) -> None:
        if self.rows is not None and output is not None:
            output.logits = None  # its rows are no longer the batch's
        self.labels = self.targets = self.rows = None


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, block: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.block = block
        out = x.new_empty(*x.shape[:-1], len(weight))
        for part, rows in zip(out.split(block, -1), weight.split(block), strict=True):
            part.copy_(nn.functional.linear(x, rows.to(x.dtype)))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        (weight,) = ctx.saved_tensors
        grad_x = grad.new_zeros(*grad.shape[:-1], weight.shape[1])
        for part, rows in zip(grad.split(ctx.block, -1), weight.split(ctx.block), strict=True):
            grad_x += part @ rows.to(grad.dtype)
        return grad_x, None, None


def held_product(x: Tensor, weight: Tensor, entries: int = CHUNK) -> Tensor:
    """x Wᵀ in float32 for a frozen bfloat16 W [V, D], of which `entries` are there in float32 at a time."""
    return _Held.apply(x.float(), weight.detach(), max(1, entries // weight.shape[1]))


def output_head(model: PreTrainedModel) -> nn.Module | None:
    """The module that makes logits: the model's own, or its decoder's."""
    for part in (model, getattr(model, "language_model", None)):
        if isinstance(part, PreTrainedModel):
            head = part.get_output_embeddings()
            if head is not None:
                return head
    return None


def _next_token_loss(model: PreTrainedModel) -> bool:
    return "shift_labels" in inspect.signature(model.loss_function).parameters
