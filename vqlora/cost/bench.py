"""What a training step holds and costs under each method: the arms, and one of them measured.

    measure_arm("SmolVLM-135M", "qlora", frames=16, work="build/bench")      # bytes by part, FLOPs, tokens
    measure_rounds("SmolVLM-135M", ["qlora", "full"], frames=16, rounds=3, work="build/bench")      # seconds

Bytes are taken in a process of its own each (`vqlora.cost.apart`), so that a resident set holds nothing of
others. Seconds are taken in one process, two steps of every arm in turn, of which the second counts: round i
of two arms is a pair that met the same machine. Both train with the stock Trainer. Costs do not depend on
what the weights say, so models are made from their configurations.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

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
    "vqlora": "gated adapters on NF4, loaded by vqlora, under the plain step",
    "vqlora+lean": "the same under vqlora.lean_step",
    "vqlora+lean+ckpt": "and with gradient checkpointing",
    "lora": "plain peft LoRA on a base held in 16 bits",
    "full": "every parameter trained, in float32",
}


def measure_arm(
    model: str, arm: str, *, frames: int, work: str | Path, rank: int = 8, batch: int = 1, prompt: int = 32,
    answer: int = 32, dtype: str = "auto",
) -> dict:  # fmt: skip
    """One arm in this process: bytes by part at the peak of a step and in all, FLOPs, tokens of a step.

    dtype: what frozen weights are multiplied in, as `vqlora.precision.compute_dtype` is asked for it.
    Returns settings, tokens, loss (of the first step), trainable and base parameters; weights_, constants_,
    adapters_ and optimizer_bytes, held throughout; peak_bytes, what a step adds by the allocator, and of it
    peak.<part>_bytes as followed storage by storage; static_bytes, total_bytes, resident_bytes; flops.
    Raises KeyError for an unknown arm or model.
    """
    made = build_arm(arm, prepare_source(model, work), rank, dtype)
    inputs = batch_of(made, batch, frames, prompt, answer)
    reset_resident_peak()
    trained = [p for p in made.parameters() if p.requires_grad]
    optimizer = adamw(made)
    _, loss = train(made, inputs, optimizer, arm)
    resident = resident_peak_bytes()
    made.train()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    def step() -> None:
        made(**inputs).loss.backward()
        update()

    peak = step_bytes(step, inputs["input_ids"].device)
    optimizer.zero_grad(set_to_none=True)
    followed = follow_training(made, inputs, update=update)
    held, state = static_bytes(made), optimizer_bytes(optimizer)
    count, learns = sum(p.numel() for p in trained), arm == "full"
    return {
        "model": model, "arm": arm, "frames": frames, "rank": rank, "batch": batch,
        "tokens": inputs["input_ids"].numel(), "loss": loss, "trainable_parameters": count,
        "weights_bytes": held["weights"] + held["buffers"] + learns * held["trainable"],
        "constants_bytes": held["constants"], "adapters_bytes": (not learns) * held["trainable"],
        "optimizer_bytes": state, "peak_bytes": peak,
        **{f"peak.{part}_bytes": size for part, size in followed.parts.items()},
        "static_bytes": held["total"], "total_bytes": held["total"] + state + peak,
        "resident_bytes": resident, "flops": followed.flops,
    }  # fmt: skip


def measure_rounds(
    model: str, arms: Iterable[str], *, rounds: int, frames: int, work: str | Path, rank: int = 8,
    batch: int = 1, prompt: int = 32, answer: int = 32, dtype: str = "auto",
) -> list[dict]:  # fmt: skip
    """Seconds of a step of every arm in turn, `rounds` times after one that is not counted, in this process.

    An arm takes two steps each time, and the second counts: the first also pays for memory that the arm
    before it gave back, which nobody pays in a training of one arm. Arms go forwards in one round and
    backwards in the next. Returns rows of settings, arm, round, cpu_s (all threads of the process) and
    wall_s.
    """
    source, arms = prepare_source(model, work), list(arms)
    made = {arm: build_arm(arm, source, rank, dtype) for arm in arms}
    inputs = {arm: batch_of(made[arm], batch, frames, prompt, answer) for arm in arms}
    optimizers = {arm: adamw(made[arm]) for arm in arms}
    rows = []
    for number in range(rounds + 1):
        for arm in arms if number % 2 else arms[::-1]:
            clock, _ = train(made[arm], inputs[arm], optimizers[arm], arm, steps=2)
            rows.append({"model": model, "frames": frames, "rank": rank, "batch": batch, "arm": arm,
                         "round": number, "cpu_s": clock.cpu_s, "wall_s": clock.wall_s})  # fmt: skip
    return [row for row in rows if row["round"]]


def build_arm(arm: str, source: Path, rank: int, dtype: str = "auto") -> nn.Module:
    """The arm's model, in training mode, as a user of its libraries makes it. Raises KeyError for an unknown
    arm.
    """
    if arm not in ARMS:
        raise KeyError(f"arm: {arm!r}; allowed: {', '.join(ARMS)}")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig

    import vqlora.kinevlm  # noqa: F401  makes the embedded base known to AutoConfig
    from vqlora.adapter import VQLoraConfig
    from vqlora.modalities import target_modules
    from vqlora.quantize import bnb_config, compute_dtype, layers_to_quantize, load_quantized, model_class
    from vqlora.step import lean_step

    device = "cuda" if torch.cuda.is_available() else "cpu"
    compute, cls = compute_dtype(dtype, device), model_class(AutoConfig.from_pretrained(source))
    if arm == "full":
        return cls.from_pretrained(source, dtype=torch.float32).to(device).train()
    if arm.startswith("vqlora"):
        model = load_quantized(source, "nf4", device=device, compute_dtype=dtype)
        model = get_peft_model(model, VQLoraConfig(ranks=rank, gate="rank"))
    else:
        if arm == "lora":
            model = load_quantized(source, "bf16", device=device, compute_dtype=dtype)
        else:
            with torch.device("meta"):
                empty = cls(AutoConfig.from_pretrained(source))
            _, kept = layers_to_quantize(empty, "nf4", (), False, torch.device(device))
            held = bnb_config("nf4", True, compute, kept)
            how = {"dtype": compute.dtype, "device_map": {"": device}, "quantization_config": held}
            model = cls.from_pretrained(source, **how)
        # the layers that VQLoRA adapts, so that arms differ in nothing else
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=target_modules(model)))
    if "lean" in arm:
        lean_step(model)
    return model.train()


def batch_of(model: nn.Module, batch: int, frames: int, prompt: int, answer: int) -> dict[str, Tensor]:
    """A training batch for the model, adapted or not, on its device."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = clip_batch(base, batch, frames, prompt, answer)
    return {key: value.contiguous().to(base.device) for key, value in inputs.items()}


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """The Trainer's `adamw_torch` over what learns."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)


def train(
    model: nn.Module, inputs: dict[str, Tensor], optimizer: torch.optim.Optimizer, arm: str, steps: int = 1
) -> tuple[_Clock, float]:
    """(clock of the last, loss of the first) of `steps` steps of the stock Trainer on one batch."""
    clock, rows = _Clock(), len(inputs["input_ids"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=rows, report_to="none", save_strategy="no",
            disable_tqdm=True, logging_steps=1, dataloader_pin_memory=False, remove_unused_columns=False,
            use_cpu=inputs["input_ids"].is_cpu, gradient_checkpointing="ckpt" in arm,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        trainer = Trainer(model, arguments, _Same(inputs), _Rows(steps * rows), callbacks=[clock],
                          optimizers=(optimizer, None))  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock, trainer.state.log_history[0]["loss"]


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
    """CPU (all threads of this process) and wall seconds of the last optimizer step."""

    cpu_s = wall_s = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.process_time(), time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.cpu_s = time.process_time() - self._began[0]
        self.wall_s = time.perf_counter() - self._began[1]


def prepare_source(name: str, folder: str | Path) -> Path:
    """The model's 16-bit checkpoint, made once: `name` is a key of `vqlora.cost.bench_models.MODELS`."""
    from vqlora.cost.bench_models import MODELS

    if name not in MODELS:
        raise KeyError(f"model: {name!r}; allowed: {', '.join(MODELS)}")
    path = Path(folder) / name
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as aside:  # there as a whole or not at all
            torch.manual_seed(0)
            MODELS[name]().to(torch.bfloat16).save_pretrained(Path(aside) / name)
            with contextlib.suppress(OSError):  # another process was first
                (Path(aside) / name).rename(path)
    return path
