"""Bytes as they are: held by a model, at the peak of a step, by the process; and seconds of work."""

from __future__ import annotations

import contextlib
import math
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves


def parameter_count(param: torch.Tensor) -> int:
    """Number of weights a parameter stands for: two per byte where it is packed in 4 bits."""
    state = getattr(param, "quant_state", None)
    return math.prod(state.shape) if state is not None else param.numel()


def quantization_constants(param: torch.Tensor) -> list[torch.Tensor]:
    """Tensors beside a quantized weight's codes: scales, the scales' own scales and offset, code books."""
    found, state = [], getattr(param, "quant_state", None)
    while state is not None:
        found += [state.absmax, state.code, getattr(state, "offset", None)]
        state = getattr(state, "state2", None)
    found.append(getattr(param, "SCB", None))
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def tensor_bytes(param: torch.Tensor) -> int:
    """Bytes of a parameter with its quantization constants."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (param, *quantization_constants(param)))


def static_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes a model holds between steps, each storage counted once.

    Keys: weights (frozen), trainable, constants (of quantization), buffers, total. Neither
    `get_memory_footprint` nor a sum over parameters and buffers sees the constants.
    """
    parts, seen = dict.fromkeys(("weights", "trainable", "constants", "buffers"), 0), set()

    def add(part: str, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            parts[part] += storage.nbytes()

    for param in model.parameters():
        add("trainable" if param.requires_grad else "weights", param)
    for module in model.modules():
        for param in module.parameters(recurse=False):
            for constant in quantization_constants(param):
                add("constants", constant)
        state = getattr(module, "state", None)  # 8-bit layers move their scales here at the first forward
        for name in ("CB", "SCB"):
            if isinstance(getattr(state, name, None), torch.Tensor):
                add("constants", getattr(state, name))
    for buffer in model.buffers():
        add("buffers", buffer)
    return {**parts, "total": sum(parts.values())}


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state tensors."""
    return sum(
        tensor.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for tensor in tree_leaves(state)
        if isinstance(tensor, torch.Tensor)
    )


def step_bytes(step: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Peak bytes of tensors, gradients and scratch above the start of one call of `step`, by torch's own
    allocator.

    What existed before (the model) is not counted: add `static_bytes`. On CPU the allocations are read from
    the profiler, the only place where torch reports them; on CUDA from the allocator's counters.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def device_memory() -> dict[str, int]:
    """Peak bytes so far: resident set of this process, and allocated and reserved on each CUDA device."""
    out = {"resident_peak_bytes": resident_peak_bytes()}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        out[f"cuda{index}_allocated_peak_bytes"] = torch.cuda.max_memory_allocated(index)
        out[f"cuda{index}_reserved_peak_bytes"] = torch.cuda.max_memory_reserved(index)
    return out


def resident_bytes() -> int:
    """Resident set of this process now (Linux; elsewhere its peak)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resident_peak_bytes()


def resident_peak_bytes() -> int:
    """Largest resident set of this process since it began or since `reset_resident_peak`."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        found = None
    if found:
        return int(found.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_resident_peak() -> bool:
    """Start the peak anew (one process may make many runs); False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@contextlib.contextmanager
def cpu_seconds() -> Iterator[dict[str, float]]:
    """Context: CPU and wall seconds of its body, as {"cpu_s", "wall_s"}, all threads of this process."""
    taken: dict[str, float] = {}
    cpu, wall = time.process_time(), time.perf_counter()
    yield taken
    taken["cpu_s"], taken["wall_s"] = time.process_time() - cpu, time.perf_counter() - wall
