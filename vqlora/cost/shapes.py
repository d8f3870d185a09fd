"""Running a model without its weights: floating-point tensors are shapes, whole numbers are real.

    with Shapes():
        model = build()                        # parameters that take no memory
        model(input_ids=ids).loss.backward()   # the very operations of a real step, none of them computed

Fake tensors of torch alone (`FakeTensorMode`) stop at code that looks at values: where the placeholder tokens
are, whether a mask is all ones, which frames are black. Such values come from ids, masks and pixels, which
are small beside activations. So what is computed from real tensors alone is really computed here, and all
that a weight has touched is a shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqlora.quantize import BLOCK

_INDEXED = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)
_FILLED = (
    torch.ops.aten.uniform_.default,
    torch.ops.aten.normal_.default,
    torch.ops.aten.zero_.default,
    torch.ops.aten.fill_.Scalar,
)
_PREPARED = False


class Shapes(TorchDispatchMode):
    """Mode in which floating-point tensors that are made anew are shapes on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        _fill_code_books()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled inside; torch's guard against it costs time at every operation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args: tuple, kwargs: dict):
        """The result of one operation."""
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        if func in _FILLED:
            return args[0]
        if func in _INDEXED:
            args = (args[0], [_as_numbers(index) for index in args[1]], *args[2:])
        with self.fake:
            out = func(*args, **kwargs)
        if not tensors and not any(leaf.is_floating_point() for leaf in tree_leaves(out) if _is_tensor(leaf)):
            return func(*args, **kwargs)
        return out

    def shape(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor without values, whole numbers included."""
        with self.fake:
            return torch.empty(size, dtype=dtype)


def quantize_shapes(shapes: Shapes, model: nn.Module, names: list[str], bits: str, double_quant: bool):
    """Put bitsandbytes' layers in place of the named linear layers, in place; weights without values.

    What `vqlora.quantize.load_quantized` does to real ones; bitsandbytes' own parameter classes take no fake
    tensors, so plain parameters stand in for them, with the same bytes and the same constants.
    """
    for name in names:
        old = model.get_submodule(name)
        size = (old.in_features, old.out_features, old.bias is not None)
        if bits == "int8":
            new = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=0.0, device="meta")
            weight = _frozen(shapes.shape(old.out_features, old.in_features, dtype=torch.int8))
            weight.CB, weight.SCB = weight.data, shapes.shape(old.out_features)
        else:
            new = bnb.nn.Linear4bit(*size, compress_statistics=double_quant, quant_type=bits, device="meta")
            count = old.in_features * old.out_features
            weight = _frozen(shapes.shape((count + 1) // 2, 1, dtype=torch.uint8))
            weight.quant_state = new.quant_state = _constants(shapes, old.weight.shape, bits, double_quant)
            weight.compress_statistics, weight.quant_type, weight.blocksize = double_quant, bits, BLOCK
            weight.bnb_quantized, weight.module = True, new
        new.weight, new.bias = weight, old.bias
        new.source_cls = type(old)
        model.set_submodule(name, new.train(old.training))


@contextmanager
def converted_in_place() -> Iterator[None]:
    """`Module.to` changes parameters in place: torch would swap fake ones, which others may hold."""

    def apply(module: nn.Module, change, recurse: bool = True) -> nn.Module:
        for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
            tensor.data = change(tensor.data)
        return module

    before, nn.Module._apply = nn.Module._apply, apply
    try:
        yield
    finally:
        nn.Module._apply = before


def _constants(shapes: Shapes, size: torch.Size, bits: str, double_quant: bool) -> bnb.functional.QuantState:
    """One scale per block of 64 weights; with double quantization a byte each, and a scale per 256 of them
    (Dettmers et al. 2023, arXiv:2305.14314, section 3)."""
    blocks = -(-size.numel() // BLOCK)
    how = {"code": shapes.shape(16), "blocksize": BLOCK, "quant_type": bits, "dtype": torch.bfloat16}
    if not double_quant:
        return bnb.functional.QuantState(absmax=shapes.shape(blocks), shape=size, **how)
    scales = bnb.functional.QuantState(
        absmax=shapes.shape(-(-blocks // 256)), code=shapes.shape(256), blocksize=256, dtype=torch.float32
    )
    packed = shapes.shape(blocks, dtype=torch.uint8)
    return bnb.functional.QuantState(absmax=packed, shape=size, offset=shapes.shape(), state2=scales, **how)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _is_tensor(leaf) -> bool:
    return isinstance(leaf, Tensor)


def _as_numbers(index):
    """A real mask as the numbers of its true entries, so that the size of what it picks is known."""
    if isinstance(index, Tensor) and not isinstance(index, FakeTensor) and index.dtype == torch.bool:
        if index.dim() == 1:
            return index.nonzero()[:, 0]
    return index


def _fill_code_books() -> None:
    """bitsandbytes keeps its code books from the first use on: that must not be a use with fakes."""
    global _PREPARED
    if not _PREPARED:
        bnb.functional.quantize_4bit(torch.ones(1, BLOCK), compress_statistics=True, quant_type="nf4")
        _PREPARED = True

