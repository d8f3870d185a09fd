"""What a model and a step cost, measured: bytes held, peak bytes, resident memory, floating-point operations.

static_bytes(model)["total"]     # packed weights and their quantization constants included
step_bytes(step)                 # most that was allocated above the start during one call
count_flops(step)                # right for 4-bit and 8-bit layers and attention on CPU

Foretold, before anything is loaded: `vqlora.cost.plan`, which nothing here imports, so that a change of the
planner makes no run anew.
"""

from vqlora.cost.flops import count_flops
from vqlora.cost.measure import (
    cpu_seconds,
    device_memory,
    optimizer_bytes,
    parameter_count,
    quantization_constants,
    reset_resident_peak,
    resident_bytes,
    resident_peak_bytes,
    static_bytes,
    step_bytes,
    tensor_bytes,
)

__all__ = [
    "count_flops", "cpu_seconds", "device_memory", "optimizer_bytes", "parameter_count",
    "quantization_constants", "reset_resident_peak", "resident_bytes", "resident_peak_bytes", "static_bytes",
    "step_bytes", "tensor_bytes",
]  # fmt: skip
