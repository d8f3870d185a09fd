"""What to compute in on this machine, and the record of how a model was loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ComputeDtype(NamedTuple):
    """What layers compute in: `name` ("fp32" or "bf16", part of a run's identity) and why."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.name]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Precision:
    """How a model was loaded; kept on the model as `vqlora_precision` and written into its metadata."""

    bits: str
    compute: str
    reason: str
    double_quant: bool
    head: str  # bits of the output head: "bf16", or as `bits`
    backend: str
    quantized: tuple[str, ...]  # full names of the quantized layers
    kept: tuple[str, ...]  # full names of the linear layers left in 16-bit


def compute_dtype(
    asked: str = "auto", device: str | torch.device = "cpu", cpuinfo: str | Path = "/proc/cpuinfo"
) -> ComputeDtype:
    """Choose what to compute in on `device`: bf16 where the hardware multiplies it, else fp32.

    Without such hardware bf16 is emulated, 2 to 10 times slower than fp32. `asked` "fp32" or "bf16" wins.
    """
    if asked not in ("auto", *_DTYPES):
        raise ValueError(f"compute_dtype: {asked!r} is not known; allowed: auto, fp32, bf16")
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        reason = f"{torch.cuda.get_device_name(device)} {'has' if native else 'has no'} bf16 units"
    else:
        try:
            found = re.search(r"^flags\s*:(.*)$", Path(cpuinfo).read_text(), re.M)
        except OSError:
            found = None
        flags = set(found.group(1).split()) if found else set()
        have = sorted(flags & {"avx512_bf16", "amx_bf16"})
        native = bool(have)
        lacks = "this CPU has no avx512_bf16 or amx_bf16" if flags else f"no CPU flags in {cpuinfo}"
        reason = f"this CPU has {' and '.join(have)}" if native else lacks
    if asked != "auto":
        slow = "" if native or asked == "fp32" else ", so it is emulated and slow"
        return ComputeDtype(asked, f"asked for; {reason}{slow}")
    return ComputeDtype("bf16" if native else "fp32", reason)
