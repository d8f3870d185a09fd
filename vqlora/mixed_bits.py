"""Which linear layers of a 4-bit model to keep in 16 bits, where a little memory is left: by sensitivity.

    errors = quantization_errors(model, names)                     # what each layer would lose
    fisher = signals.gradients(model, names, batches, each=True).energy()
    kept = keep_in_16bit(model, memory_bytes=2_000_000, sensitivity=expected_harm(model, errors, fisher))
    model = load_quantized(model, bits="nf4", skip=kept)           # saves and loads as any other

Every layer's weight is in one of two widths; a layer is worth the loss it saves for each byte it costs.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from vqlora.quantize import BLOCK

BYTES_NF4 = 0.5 + 1 / BLOCK + 4 / (BLOCK * 256)  # codes, 8-bit scales, and a float scale for 256 of them
BYTES_16 = 2.0


def linear_bytes(layer: nn.Linear, bits: str) -> float:
    """Bytes of a linear layer's weight in "nf4" (double quantization) or "bf16", constants counted."""
    return layer.in_features * layer.out_features * {"nf4": BYTES_NF4, "bf16": BYTES_16}[bits]


def expected_harm(
    model: nn.Module, errors: Mapping[str, float], fisher: Mapping[str, float]
) -> dict[str, float]:
    """Expected rise of the loss from quantizing each layer: ½ E[(g·ΔW)²] with independent entries.

    ½ ||ΔW||² tr(F) / n for n entries, F the diagonal of the Fisher information (as in HAWQ-V2, Dong et al.
    2020, arXiv:1911.03852, with the Fisher trace for the Hessian's).
    """
    sizes = {name: model.get_submodule(name) for name in errors}
    return {
        name: 0.5 * error * fisher[name] / (sizes[name].in_features * sizes[name].out_features)
        for name, error in errors.items()
    }


def keep_in_16bit(
    model: nn.Module, memory_bytes: float, sensitivity: Mapping[str, float]
) -> tuple[str, ...]:
    """Full names of the layers to keep, in the model's order; what they cost over NF4 fits `memory_bytes`.

    sensitivity: what quantizing each layer costs in quality; layers that are not named are quantized.
    Greedy by sensitivity for each byte: the layers it leaves out could each be worth no more per byte, but
    for those too large for what was left. Raises ValueError for a budget below 0 and KeyError for a layer
    that the model lacks.
    """
    if not memory_bytes >= 0:
        raise ValueError(f"memory_bytes: {memory_bytes}; allowed: from 0")
    layers = dict(model.named_modules())
    missing = sorted(set(sensitivity) - set(layers))
    if missing:
        raise KeyError(f"sensitivity: {missing[0]!r} is no layer of this model")
    own = {name: layers[name] for name in sensitivity}
    price = {name: linear_bytes(m, "bf16") - linear_bytes(m, "nf4") for name, m in own.items()}
    kept, left = set(), memory_bytes
    for name in sorted(price, key=lambda name: -sensitivity[name] / price[name]):
        if price[name] <= left and sensitivity[name] > 0:
            kept.add(name)
            left -= price[name]
    return tuple(name for name in sensitivity if name in kept)
