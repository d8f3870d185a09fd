"""What an answer costs with the adapters kept apart or merged, on a base in 4 or 16 bits.

    measure_inference("SmolVLM-135M", "nf4", merged=False, frames=8, work="build/bench")
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from vqlora.cost.bench import batch_of, prepare_source
from vqlora.cost.inputs import prompt_only
from vqlora.cost.measure import reset_resident_peak, resident_peak_bytes, static_bytes, step_bytes

SERVED = (("nf4", False), ("nf4", True), ("bf16", False), ("bf16", True))


def measure_inference(
    model: str, bits: str, merged: bool, *, frames: int, work: str | Path, rank: int = 8, answer: int = 8,
    repeat: int = 3, batch: int = 1, prompt: int = 32,
) -> dict:  # fmt: skip
    """One way to serve, in this process: seconds until the first token and for each further one; bytes.

    merged: the update is added to the 16-bit weights, which are then put into `bits`. CPU seconds of all
    threads; medians over `repeat` answers of `answer` tokens, the first not counted.
    """
    made = served(prepare_source(model, work), bits, merged, rank)
    inputs = prompt_only(batch_of(made, batch, frames, prompt, 1), 1)

    def say(count: int) -> None:
        exactly = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        with torch.no_grad():
            made.generate(**inputs, **exactly)

    reset_resident_peak()
    say(2)
    resident = resident_peak_bytes()
    first = statistics.median(_cpu_s(lambda: say(1)) for _ in range(repeat))
    whole = statistics.median(_cpu_s(lambda: say(answer)) for _ in range(repeat))
    held, peak = static_bytes(made)["total"], step_bytes(lambda: say(answer), inputs["input_ids"].device)
    return {
        "model": model, "bits": bits, "merged": merged, "frames": frames, "rank": rank, "batch": batch,
        "first_token_s": first, "next_token_s": max(0.0, whole - first) / (answer - 1),
        "static_bytes": held, "peak_bytes": peak, "total_bytes": held + peak, "resident_bytes": resident,
    }  # fmt: skip


def served(source: Path, bits: str, merged: bool, rank: int, seed: int = 0) -> nn.Module:
    """A model that answers: adapters with random weights (the same for a seed) on a base in `bits`, kept
    apart or merged into it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig

    import vqlora.kinevlm  # noqa: F401  makes the embedded base known to AutoConfig
    from vqlora.modalities import target_modules
    from vqlora.quantize import close_packing_trap, load_quantized, model_class

    if merged:
        cls = model_class(AutoConfig.from_pretrained(source))
        base = cls.from_pretrained(source, dtype=torch.float32)
    else:
        base = load_quantized(source, bits)
    torch.manual_seed(seed)
    adapters = LoraConfig(r=rank, target_modules=target_modules(base), init_lora_weights=False)
    model = get_peft_model(base, adapters)
    if merged:
        model = load_quantized(model.merge_and_unload(), bits)
    close_packing_trap(model)
    return model.eval()


def _cpu_s(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began
