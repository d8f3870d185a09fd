"""What gates cost of a training step, beside plain LoRA of the same rank on the same layers.

    python scripts/gate_cost.py --pairs 20 --bits nf4

Steps of both models alternate, and the median of the pairs' ratios is given with its quartiles, so that a
busy machine disturbs both alike; a second plain model in the gated one's place shows what the measurement
itself adds. Times are CPU seconds of one thread. Memory that was freed is kept by the allocator, so that
giving it back to the system and faulting it in again does not fall on one model or the other by accident.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Mapping

import peft
import torch
from torch import Tensor, nn

import vqlora
from vqlora.base import KineVLMForConditionalGeneration, build_tokenizer, small_config
from vqlora.modalities import target_modules
from vqlora.optimizer import create_optimizer


def keep_freed_memory() -> None:
    """Tell glibc's allocator to neither trim its heap nor map big blocks apart; elsewhere, nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for parameter in (-1, -3) if mallopt else ():  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(parameter, 2**30)


def step_ratios(
    gated: nn.Module, plain: nn.Module, batch: Mapping[str, Tensor], pairs: int, clock=time.process_time
) -> list[float]:
    """Of each pair (seconds of a gated training step) / (seconds of a plain one)."""
    steps = [(model.train(), create_optimizer(model, lr=1e-4, fused=True)) for model in (gated, plain)]
    ratios = []
    for pair in range(pairs + 2):
        seconds = {}
        for which in (0, 1) if pair % 2 else (1, 0):
            model, optimizer = steps[which]
            begin = clock()
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[which] = clock() - begin
        ratios.append(seconds[0] / seconds[1])
    return ratios[2:]  # the first steps allocate


def embedded(bits: str, gate: str | None, rank: int = 8) -> nn.Module:
    """A random model of the embedded base's shape with gated adapters, or with plain LoRA (gate None)."""
    words = len(build_tokenizer([f"w{i}" for i in range(180)]))
    model = vqlora.load_quantized(KineVLMForConditionalGeneration(small_config(words)), bits)
    if gate is not None:
        return peft.get_peft_model(model, vqlora.VQLoraConfig(ranks=rank, gate=gate))
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=target_modules(model)))


def clips(model: nn.Module, count: int, frames: int = 8, words: int = 20) -> dict[str, Tensor]:
    """A batch of the main experiment's shape: `frames` frames of four tokens each, then a caption."""
    rng, config = torch.Generator().manual_seed(0), model.config
    places = torch.full((count, frames * config.tokens_per_frame), config.image_token_id)
    text = torch.randint(10, config.text_config.vocab_size, (count, words), generator=rng)
    ids = torch.cat([places, text], dim=1)
    labels = torch.cat([torch.full_like(places, -100), text], dim=1)
    pixels = torch.rand(count, frames, 3, config.image_size, config.image_size, generator=rng) * 2 - 1
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--bits", default="nf4", choices=["nf4", "bf16", "int8"])
    parser.add_argument("--gates", nargs="+", default=["rank"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    plain = embedded(asked.bits, None)
    batch = clips(plain, asked.clips)
    for gate in ("plain again", *asked.gates):
        other = embedded(asked.bits, None if gate == "plain again" else gate)
        quartiles = statistics.quantiles(step_ratios(other, plain, batch, asked.pairs), n=4)
        low, middle, high = (f"{100 * (ratio - 1):+.1f}" for ratio in quartiles)
        print(f"{gate}: step {middle}% (quartiles {low}, {high})")
