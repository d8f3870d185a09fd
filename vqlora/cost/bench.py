"""What a training step costs under each method, side by side: `vqlora bench`.

    rows = bench(["qlora", "lean"], model="SmolVLM-135M", frames=[8, 16], rounds=3, work="build/bench")

Every measurement runs in a process of its own, arms in turn, so that round i of two arms is a pair: they
met the same machine. A process trains with the stock Trainer (the first step is not counted) and is asked
for CPU and wall seconds of each step; then one step under the allocator's eyes and one followed by part.
Costs do not depend on what the weights say, so models are made from their configurations.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from vqlora.cost.inputs import clip_batch
from vqlora.cost.measure import (
    optimizer_bytes,
    reset_resident_peak,
    resident_peak_bytes,
    static_bytes,
    step_bytes,
)
from vqlora.cost.steps import follow_training

ARMS = {
    "qlora": "plain peft LoRA on bitsandbytes NF4",
    "lean": "the same model and adapters, under vqlora.lean_step",
    "qlora+ckpt": "plain peft QLoRA with gradient checkpointing (not reentrant)",
    "lean+ckpt": "the same under vqlora.lean_step",
    "vqlora": "gated adapters, loaded by vqlora, under vqlora.lean_step",
    "lora": "plain peft LoRA, the base not quantized",
    "full": "every parameter trained",
}


def measure_arm(
    arm: str, source: Path, *, frames: int, rank: int = 8, steps: int = 3, batch: int = 1, prompt: int = 32,
    answer: int = 32, parts: bool = True,
) -> dict:  # fmt: skip
    """One setting in this process: seconds of each step, bytes by part, FLOPs, tokens of a step.

    source: a checkpoint of `prepare_source`. Raises KeyError for an unknown arm.
    """
    if arm not in ARMS:
        raise KeyError(f"arm: {arm!r}; allowed: {', '.join(ARMS)}")
    model = build_arm(arm, source, rank)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = clip_batch(base, batch, frames, prompt, answer)
    inputs = {key: value.contiguous().to(base.device) for key, value in inputs.items()}
    reset_resident_peak()
    clock, trainer = train(model, inputs, steps + 1, checkpointing=arm.endswith("+ckpt"))
    resident = resident_peak_bytes()
    trained, optimizer = [p for p in model.parameters() if p.requires_grad], trainer.optimizer
    model.train()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    def step() -> None:
        model(**inputs).loss.backward()
        update()

    device = inputs["input_ids"].device
    peak = step_bytes(step, device)
    optimizer.zero_grad(set_to_none=True)
    found = {
        "arm": arm, "frames": frames, "rank": rank, "batch": batch,
        "tokens": inputs["input_ids"].numel(), "cpu_s": clock.cpu_s[1:], "wall_s": clock.wall_s[1:],
        "loss": trainer.state.log_history[0].get("loss"),
        "trainable": sum(p.numel() for p in trained), "static_bytes": static_bytes(model)["total"],
        "optimizer_bytes": optimizer_bytes(optimizer), "peak_bytes": peak, "resident_bytes": resident,
    }  # fmt: skip
    if parts:
        followed = follow_training(model, inputs, update=update)
        found |= {f"peak.{part}_bytes": size for part, size in followed.parts.items()}
        found["flops"] = followed.flops
    return found


def build_arm(arm: str, source: Path, rank: int) -> nn.Module:
    """The arm's model, in training mode, as a user of its libraries makes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig

    import vqlora
    import vqlora.kinevlm  # noqa: F401  makes the embedded base known to AutoConfig
    from vqlora.modalities import target_modules
    from vqlora.quantize import bnb_config, compute_dtype, layers_to_quantize, model_class

    device = "cuda" if torch.cuda.is_available() else "cpu"
    compute, cls = compute_dtype("auto", device), model_class(AutoConfig.from_pretrained(source))
    if arm == "full":
        return cls.from_pretrained(source, dtype=torch.float32).to(device).train()
    if arm == "vqlora":
        model = vqlora.load_quantized(source, "nf4", device=device)
        model = get_peft_model(model, vqlora.VQLoraConfig(ranks=rank, gate="rank"))
    else:
        more = {}
        if arm != "lora":
            with torch.device("meta"):
                empty = cls(AutoConfig.from_pretrained(source))
            _, kept = layers_to_quantize(empty, "nf4", (), False, torch.device(device))
            more["quantization_config"] = bnb_config("nf4", True, compute, kept)
        model = cls.from_pretrained(source, dtype=compute.dtype, device_map={"": device}, **more)
        # the layers that VQLoRA adapts, so that arms differ in nothing else
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=target_modules(model)))
    if arm in ("lean", "lean+ckpt", "vqlora"):
        vqlora.lean_step(model)
    return model.train()


def train(model: nn.Module, inputs: dict[str, Tensor], steps: int, checkpointing: bool):
    """(clock, Trainer) after `steps` steps of the stock Trainer on one batch."""
    clock = _Clock()
    rows = len(inputs["input_ids"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=rows, learning_rate=1e-4, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_steps=1, dataloader_pin_memory=False,
            optim="adamw_torch", remove_unused_columns=False, use_cpu=inputs["input_ids"].is_cpu,
            gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        trainer = Trainer(model, arguments, _Same(inputs), _Rows(rows * steps), callbacks=[clock])
        trainer.train()
    return clock, trainer


class _Rows(Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class _Same:
    """A collator that gives the same batch every time: cost depends on its shape alone."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self.inputs = inputs

    def __call__(self, rows: list[int]) -> dict[str, Tensor]:
        return dict(self.inputs)


class _Clock(TrainerCallback):
    """CPU (all threads of this process) and wall seconds of every optimizer step."""

    def __init__(self) -> None:
        self.cpu_s: list[float] = []
        self.wall_s: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.process_time(), time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.cpu_s.append(time.process_time() - self._began[0])
        self.wall_s.append(time.perf_counter() - self._began[1])


def prepare_source(name: str, folder: Path) -> Path:
    """The model's 16-bit checkpoint, made once: `name` is a key of `vqlora.cost.bench_models.MODELS`."""
    from vqlora.cost.bench_models import MODELS

    if name not in MODELS:
        raise KeyError(f"model: {name!r}; allowed: {', '.join(MODELS)}")
    path = Path(folder) / name
    if not (path / "model.safetensors").is_file():
        torch.manual_seed(0)
        MODELS[name]().to(torch.bfloat16).save_pretrained(path)
    return path


def bench(
    arms: Iterable[str], *, model: str, frames: Iterable[int], work: str | Path, ranks: Iterable[int] = (8,),
    rounds: int = 3, steps: int = 2, batch: int = 1, timeout_s: float = 900.0, say=lambda _: None,
) -> list[dict]:  # fmt: skip
    """Rows of `measure_arm`, one for each (frames, rank, round, arm), each from a process of its own.

    Bytes by part and FLOPs are taken in the first round alone: they are the same in all. Raises RuntimeError
    with the end of its output where a process fails.
    """
    arms, source, rows = list(arms), prepare_source(model, Path(work)), []
    for count in frames:
        for rank in ranks:
            for number in range(rounds):
                for arm in arms if number % 2 == 0 else arms[::-1]:
                    wanted = {"arm": arm, "frames": count, "rank": rank, "steps": steps, "batch": batch,
                              "parts": number == 0}  # fmt: skip
                    rows.append({"model": model, "round": number, **elsewhere(source, wanted, timeout_s)})
                    took = statistics.median(rows[-1]["cpu_s"])
                    say(f"{model} {arm} frames={count} rank={rank} round {number}: {took:.2f} CPU-s a step, "
                        f"{rows[-1]['peak_bytes'] / 1e6:.0f} MB above static")  # fmt: skip
    return rows


def elsewhere(source: Path, wanted: dict, timeout_s: float) -> dict:
    """What `measure_arm` says in a process of its own; `measure_inference` where `wanted` names bits,
    `measure_pairs` where it names pairs."""
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "vqlora.cost.bench", str(source), json.dumps(wanted)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{wanted}: ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(lines[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="one measurement, as `bench` starts it")
    parser.add_argument("source", type=Path)
    parser.add_argument("settings", type=json.loads)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if "bits" in chosen.settings:
        from vqlora.cost.bench_inference import measure_inference as measured
    elif "pairs" in chosen.settings:
        from vqlora.cost.bench_pairs import measure_pairs as measured
    else:
        measured = measure_arm
    print(json.dumps(measured(source=chosen.source, **chosen.settings)))
