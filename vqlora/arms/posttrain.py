"""Full fine-tuning first and quantization after it: what low bits cost a model that was trained without them.

The arm trains as "full" does, on the same float32 weights, and is then brought into `settings.bits` as a base
would be. Nothing is trained afterwards, so what rounding takes away stays lost; QLoRA trains behind it.
"""

from __future__ import annotations

from accelerate.utils import extract_model_from_parallel
from torch import nn

from vqlora.cost import static_bytes
from vqlora.quantize import load_quantized


def finish(model: nn.Module, settings) -> tuple[nn.Module, dict[str, float]]:
    """The trained model in `settings.bits`, in place, and `quantized_bytes`: what it then holds, constants
    counted."""
    # Mixed precision left its wrapper on the forward, which a model loaded in these bits would not have.
    model = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    device = next(model.parameters()).device
    model = load_quantized(model, settings.bits, compute_dtype=settings.compute_dtype, device=device)
    return model, {"quantized_bytes": float(static_bytes(model)["total"])}
