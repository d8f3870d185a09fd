"""What calibration batches say about each layer of a frozen, possibly 4-bit base, before any adapter exists.

    found = gradients(model, names, batches)           # one forward and backward a batch
    found.spectra["model...q_proj"]                     # squared singular values of the mean gradient
    input_entropy(model, names, batches)                # forwards only
    motion(model, batches)                              # the model is not run
    quantization_errors(original, bits="nf4")           # the weights alone

A quantized weight has no gradient of its own, but its layer's input x and output gradient dy give it:
G = Σ dyᵀ x [d_out, d_in]. An update of rank r along G's leading singular vectors lowers the loss, to first
order, by the sum of its r largest σ² for a step of unit length, so σᵢ² is what rank i may gain.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

EXACT = 1 << 20  # weights up to so many entries keep their whole gradient, wider ones a sketch of it
SKETCH = 64  # leading directions that a sketch can tell
ROWS = 512  # activation rows of a layer and batch that its entropy is taken from
Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gradients:
    """Loss gradients of frozen layers. spectra: σ² of each, falling. batches: how many they come from."""

    spectra: dict[str, Tensor]
    batches: int

    def energy(self) -> dict[str, float]:
        """||G||² of each layer (of its leading directions, where it is sketched)."""
        return {name: float(spectrum.sum()) for name, spectrum in self.spectra.items()}


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that the model itself computes from the batch's labels."""
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError("batches: the model gives no loss for them; add labels, or hand in loss=")
    return loss


def gradients(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Mapping[str, Any]],
    loss: Loss = model_loss,
    *,
    each: bool = False,
    seed: int = 0,
) -> Gradients:
    """Spectra of the loss gradients of the layers `names`, in float32.

    each: False takes the spectrum of the gradient summed over the batches and divided by their number; True
        the mean of the spectra of each batch's own gradient (with batches of one example their sum is the
        trace of the empirical Fisher information).
    Memory: a weight of more than `EXACT` entries is held as two projections of `SKETCH` directions, as large
    as an adapter of that rank (Tropp et al. 2017, arXiv:1609.00048, algorithm 7).
    Raises ValueError without batches, for a loss that is not finite, and if no layer gets a gradient.
    """
    layers = {name: model.get_submodule(name) for name in names}
    held: dict[str, _Accumulator] = {}
    sums: dict[str, Tensor] = {}
    count = 0

    def seen(name: str, x: Tensor, dy: Tensor) -> None:
        if name not in held:
            held[name] = _accumulator(dy.shape[-1], x.shape[-1], x.device, seed)
        held[name].add(dy.flatten(0, -2).float(), x.flatten(0, -2).float())

    began = time.perf_counter()
    with _evaluating(model), _watching(layers, seen):
        for batch in batches:
            with torch.enable_grad():
                value = loss(model, batch)
                if not bool(torch.isfinite(value)):
                    raise ValueError(f"batches: the loss of batch {count} is {float(value)}")
                if value.requires_grad:
                    value.backward()
            model.zero_grad(set_to_none=True)
            count += 1
            if each:
                for name, gradient in held.items():
                    spectrum = gradient.spectrum()
                    sums[name] = sums[name] + spectrum if name in sums else spectrum
                held.clear()
    if not count:
        raise ValueError("batches: none given; a few of the training data are needed")
    spectra = sums if each else {name: gradient.spectrum() for name, gradient in held.items()}
    scale = count if each else count**2
    if not any(bool(spectrum.any()) for spectrum in spectra.values()):
        raise ValueError("batches: the loss does not depend on any of the layers")
    took = time.perf_counter() - began
    _log.info("gradients of %d layers from %d batches: %.1f s", len(names), count, took)
    return Gradients({n: spectra[n] / scale if n in spectra else torch.zeros(1) for n in names}, count)


def input_entropy(
    model: nn.Module, names: Sequence[str], batches: Iterable[Mapping[str, Any]], loss: Loss = model_loss
) -> dict[str, float]:
    """Spectral entropy of each layer's input in nats: of the shares of variance of x's principal directions.

    exp of it is the effective rank (Roy & Vetterli 2007). Taken from `ROWS` evenly spaced rows of each
    batch, and averaged over the batches: never more than ln(min(ROWS, d_in)).
    """
    found: dict[str, list[float]] = {name: [] for name in names}

    def look(name: str):
        def hook(module, arguments, output):
            x = arguments[0].detach().flatten(0, -2)
            x = x[torch.linspace(0, len(x) - 1, min(ROWS, len(x)), device=x.device).long()].float()
            x = x - x.mean(dim=0)
            small = x @ x.T if len(x) < x.shape[1] else x.T @ x
            share = torch.linalg.eigvalsh(small).clamp(min=0)
            share = share / share.sum().clamp(min=1e-30)
            found[name].append(float(-torch.special.xlogy(share, share).sum()))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(look(name)) for name in names]
    count = 0
    try:
        with _evaluating(model), torch.no_grad():
            for batch in batches:
                loss(model, batch)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError("batches: none given; a few of the training data are needed")
    return {name: sum(values) / len(values) if values else 0.0 for name, values in found.items()}


def motion(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], pixel_range: Sequence[float] = (-1.0, 1.0)
) -> float:
    """Mean motion of the frames in `batches`: the feature of that name in `vqlora.temporal`, 0 to 1."""
    from vqlora.modalities.rows import frame_pixels, frame_rows
    from vqlora.temporal import pixel_features

    found = []
    for batch in batches:
        rows = frame_rows(model, batch)
        if rows is not None and rows.frames:
            frames = frame_pixels(model, batch)
            found.append(pixel_features(frames, rows.clip, None, tuple(pixel_range), ("motion",)).flatten())
    if not found:
        raise ValueError("batches: none of them shows a frame")
    return float(torch.cat(found).mean())


def quantization_errors(
    model: nn.Module, names: Sequence[str] | None = None, bits: str = "nf4"
) -> dict[str, float]:
    """||W - Q(W)||² of each linear layer of a 16- or 32-bit model, were it held in `bits`.

    names: full names; all linear layers unless given. The model is left as it is.
    Raises ValueError for a layer that is quantized already: its original weight is gone.
    """
    from bitsandbytes import functional as bnb

    from vqlora.modalities import linear_layers
    from vqlora.quantize import BLOCK, layer_bits

    layers, found = dict(linear_layers(model)), {}
    for name in layers if names is None else names:
        weight = layers[name].weight.detach()
        if layer_bits(layers[name]) not in ("bf16", "fp16", "fp32"):
            raise ValueError(f"{name}: held in {layer_bits(layers[name])}; give the model before quantizing")
        weight = weight.to(torch.bfloat16).float()  # as load_quantized takes it
        if bits == "bf16":
            held = weight
        elif bits == "int8":
            scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
            held = (weight / scale).round() * scale
        else:
            how = {"blocksize": BLOCK, "compress_statistics": True, "quant_type": bits}
            held = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, **how)).view_as(weight)
        found[name] = float((weight - held).square().sum())
    return found


class _Accumulator:
    """The whole gradient, summed."""

    def __init__(self, d_out: int, d_in: int, device) -> None:
        self.total = torch.zeros(d_out, d_in, device=device)

    def add(self, dy: Tensor, x: Tensor) -> None:
        """dy [n, d_out], x [n, d_in] of n rows."""
        self.total.addmm_(dy.T, x)

    def spectrum(self) -> Tensor:
        return _squares(self.total)


class _Sketch:
    """Two projections of the sum: its range G Ω [d_out, k] and its co-range Ψ G [l, d_in], l = 2k + 1."""

    def __init__(self, d_out: int, d_in: int, device, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        k = SKETCH + SKETCH // 4
        self.omega = torch.randn(d_in, k, generator=rng).to(device)
        self.psi = torch.randn(2 * k + 1, d_out, generator=rng).to(device)
        self.range = torch.zeros(d_out, k, device=device)
        self.corange = torch.zeros(2 * k + 1, d_in, device=device)

    def add(self, dy: Tensor, x: Tensor) -> None:
        self.range.addmm_(dy.T, x @ self.omega)
        self.corange.addmm_(self.psi @ dy.T, x)

    def spectrum(self) -> Tensor:
        basis = torch.linalg.qr(self.range).Q
        inner = torch.linalg.lstsq(self.psi @ basis, self.corange).solution  # G ≈ basis inner
        return _squares(inner)[:SKETCH]


def _accumulator(d_out: int, d_in: int, device, seed: int) -> _Accumulator | _Sketch:
    if d_out * d_in <= EXACT or min(d_out, d_in) <= 2 * SKETCH:
        return _Accumulator(d_out, d_in, device)
    return _Sketch(d_out, d_in, device, seed)


def _squares(matrix: Tensor) -> Tensor:
    """Squared singular values, falling, on the CPU."""
    small = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(small).clamp(min=0).flip(0).cpu()


@contextmanager
def _evaluating(model: nn.Module):
    """Dropout off; every module goes back to the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _watching(layers: Mapping[str, nn.Module], seen: Callable[[str, Tensor, Tensor], None]):
    """Calls seen(name, x, dy) in the backward of each layer, though no parameter asks for a gradient."""

    def watch(name: str):
        def hook(module, arguments, output):
            if not torch.is_grad_enabled():
                return output
            if not output.requires_grad:  # the first layers: nothing before them asks for a gradient
                output = output.detach().requires_grad_()
            output = output.clone()  # a view of its own: what follows may write into it in place
            x = arguments[0].detach()
            output.register_hook(lambda dy: seen(name, x, dy.detach()))
            return output

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
