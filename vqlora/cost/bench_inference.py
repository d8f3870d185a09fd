"""What an answer costs with the adapters kept apart or merged, on a base in 4 or 16 bits.

    rows = bench_inference(model="SmolVLM-135M", frames=[8], work="build/bench")
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from vqlora.cost.bench import elsewhere, prepare_source
from vqlora.cost.inputs import clip_batch, prompt_only
from vqlora.cost.measure import reset_resident_peak, resident_peak_bytes, static_bytes, step_bytes

SERVED = (("nf4", False), ("nf4", True), ("bf16", False), ("bf16", True))


def measure_inference(
    source: Path, bits: str, merged: bool, *, frames: int, rank: int = 8, answer: int = 8, repeat: int = 2,
    batch: int = 1, prompt: int = 32,
) -> dict:  # fmt: skip
    """One way to serve, in this process: seconds until the first token and for each further one; bytes.

    merged: the update is added to the 16-bit weights, which are then put into `bits`. CPU seconds of all
    threads; medians over `repeat` answers of `answer` tokens, the first not counted.
    """
    model = _served(source, bits, merged, rank)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = prompt_only(clip_batch(base, batch, frames, prompt, 1), 1)
    inputs = {key: value.contiguous().to(base.device) for key, value in inputs.items()}

    def say(count: int) -> None:
        exactly = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        with torch.no_grad():
            model.generate(**inputs, **exactly)

    reset_resident_peak()
    say(1)
    first = statistics.median(_cpu_s(lambda: say(1)) for _ in range(repeat))
    whole = statistics.median(_cpu_s(lambda: say(answer)) for _ in range(repeat))
    return {
        "bits": bits, "merged": merged, "frames": frames, "rank": rank, "batch": batch,
        "first_token_cpu_s": first, "next_token_cpu_s": max(0.0, whole - first) / (answer - 1),
        "static_bytes": static_bytes(model)["total"], "resident_bytes": resident_peak_bytes(),
        "peak_bytes": step_bytes(lambda: say(answer), base.device),
    }  # fmt: skip


def bench_inference(
    *, model: str, frames: Iterable[int], work: str | Path, rank: int = 8, timeout_s: float = 900.0,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict]:  # fmt: skip
    """Rows of `measure_inference` for each of `SERVED`, each from a process of its own."""
    source, rows = prepare_source(model, Path(work)), []
    for count in frames:
        for bits, merged in SERVED:
            wanted = {"bits": bits, "merged": merged, "frames": count, "rank": rank}
            rows.append({"model": model, **elsewhere(source, wanted, timeout_s)})
            say(f"{model} {bits}{' merged' if merged else ''}, {count} frames: "
                f"{rows[-1]['first_token_cpu_s']:.2f} CPU-s to the first token")  # fmt: skip
    return rows


def _served(source: Path, bits: str, merged: bool, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig

    import vqlora.kinevlm  # noqa: F401  makes the embedded base known to AutoConfig
    from vqlora.modalities import target_modules
    from vqlora.quantize import close_packing_trap, load_quantized, model_class

    base = load_quantized(source, bits) if not merged else None
    if merged:
        cls = model_class(AutoConfig.from_pretrained(source))
        base = cls.from_pretrained(source, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=rank, target_modules=target_modules(base)))
    if merged:
        model = load_quantized(model.merge_and_unload(), bits)
    close_packing_trap(model)
    return model.eval()


def _cpu_s(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began
