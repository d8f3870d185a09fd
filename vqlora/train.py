"""Train one arm on one domain and score it: the function behind every row of the results.

    result = execute(settings, "build/cpu/data", "build/cpu/work/<key>")   # metrics, cost, examples

Training runs on the Hugging Face Trainer; the loss alone is ours. A run killed at any moment goes on from its
last whole checkpoint to the same numbers: the order of examples is a pure function of (seed, position), and
the Trainer restores weights, optimizer, schedule and random state.
"""

from __future__ import annotations

import importlib
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from vqlora import cost, processes
from vqlora.base import load_base
from vqlora.baselines import WHOLE, attach, callbacks, finish, prepare, ranks, trainable_report
from vqlora.checkpoints import MarkWhole, last_whole_checkpoint
from vqlora.data.batches import ClipDataset, Collator, shuffled
from vqlora.data.clips import require_disjoint
from vqlora.data.parts import clips_of, frame_size, refuse_overlap, sources
from vqlora.evaluate import evaluate
from vqlora.files import writing
from vqlora.losses import batch_loss
from vqlora.naming import describe_model, save_model
from vqlora.quantize import compute_dtype
from vqlora.result import RunResult

CALIBRATION_BATCHES = 8  # of the run's own training stream, for arms that read ranks off data
_log = logging.getLogger(__name__)


class Schedule(Dataset):
    """The examples of a whole training run in order: the first `count` of an endless shuffled stream.

    The Trainer reads it front to back, so a resumed run skips what was seen and gets the rest of the same
    stream. `frames` are cycled over batches of `batch_size`, whose clips so have one number of frames.
    """

    def __init__(
        self, dataset, count: int, seed: int, frames: Sequence[int] = (), batch_size: int = 1
    ) -> None:
        self.dataset, self.order = dataset, shuffled(len(dataset), count, seed)
        self.frames, self.batch_size = tuple(frames), batch_size

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int):
        index = int(self.order[place])
        if not self.frames:
            return self.dataset[index]
        return self.dataset.item(index, self.frames[place // self.batch_size % len(self.frames)])


class VideoTrainer(Trainer):
    """transformers.Trainer with the loss of `batch_loss`."""

    def __init__(self, *args, contrastive_weight: float = 0.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.contrastive_weight = contrastive_weight
        # the loss is a mean per micro-batch, so the Trainer must divide it under accumulation
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = batch_loss(model, inputs, self.contrastive_weight, shared=True)
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, model, trial):
        with writing(Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")):
            super()._save_checkpoint(model, trial)


def pick_optimizer(asked: str, model: nn.Module, device: str | torch.device) -> tuple[str, str]:
    """The Trainer's name of an optimizer, and why.

    `asked` "auto" takes a paged 8-bit AdamW for 4-bit models on CUDA. Paged and 8-bit optimizers keep their
    state in CUDA's unified memory; elsewhere AdamW stands in for them.
    """
    cuda = torch.device(device).type == "cuda"
    if asked == "auto":
        if cuda and getattr(model, "is_loaded_in_4bit", False):
            return "paged_adamw_8bit", "4-bit base on CUDA: its state can leave the card when that is full"
        return "adamw_torch", "no paging without CUDA" if not cuda else "the base is not in 4 bits"
    if not cuda and ("paged" in asked or "8bit" in asked or "bnb" in asked):
        return "adamw_torch", f"{asked!r} was asked for, but its state needs CUDA and this is {device}"
    if asked not in {*map(str, _optimizers())}:
        raise ValueError(f"optimizer: {asked!r} is not known; allowed: auto, " + ", ".join(_optimizers()))
    return asked, "asked for"


def execute(
    settings,
    data_root: str | Path,
    work: str | Path,
    *,
    progress: bool = False,
    save_to: str | Path | None = None,
) -> RunResult | None:
    """One whole run: base in its bits, arm, training, evaluation. `settings` is a
    `vqlora.config.RunSettings`.

    data_root: folder with a folder per domain, and `cache/` for decoded frames; `settings.data` names other
    data. work: this run's own folder; what a killed run left there is gone on from. save_to: folder for the
    trained model under its name, with its metadata (`vqlora.naming`). Bad clips are left out and counted
    (`clips_left_out`).

    Where a launcher started several processes, they train together, each on its share of every batch; then
    the first evaluates, saves and gives the result, the others give None (`vqlora.processes`).
    """
    torch.set_num_threads(settings.threads)
    data_root, work = Path(data_root), Path(work)
    cost.reset_resident_peak()
    model, tokenizer = load_base(settings.base)
    model = prepare(model, settings)
    device = next(model.parameters()).device
    choose_attention(model, compute_dtype(settings.compute_dtype, device).name, device)
    per_frame = getattr(model.config, "tokens_per_frame", 4)
    scored = settings.arm == "vqlora" and settings.gate_features == "scores"
    size = frame_size(model.config)
    learns = settings.arm != "frozen" and settings.steps
    if learns:
        refuse_overlap(settings)
    clips, store, left_out = clips_of(data_root, settings, settings.eval_part, settings.eval_clips, size)
    if not learns:
        model = attach(model, settings)
        costs, metrics = static_cost(model), {}
    else:
        train_clips, train_store, skipped = clips_of(data_root, settings, "train", settings.train_clips, size)
        left_out = left_out + skipped
        require_disjoint(**{"train": train_clips, settings.eval_part: clips})
        share = {"question_share": settings.question_share, "tokens_per_frame": per_frame}
        chosen = {"frames": settings.frames, "select": settings.select, "features": scored}
        data = ClipDataset(train_clips, train_store, **chosen, seed=settings.seed)
        collator = Collator(tokenizer, seed=settings.seed, **share)
        with cost.cpu_seconds() as taken:  # calibration, where ranks are read off data
            model = attach(model, settings, lambda: first_batches(data, collator, settings, device))
        costs, metrics = {**static_cost(model), "attach_cpu_s": taken["cpu_s"]}, {}
        probe = ClipDataset(train_clips, train_store, **chosen)  # the same for every seed
        batch = Collator(tokenizer, **share)([probe[i] for i in range(processes.share(settings.batch_size))])
        batch = {key: value.to(device) for key, value in batch.items()}
        costs |= measure_step(model, batch, settings.contrastive_weight)
        trained = train(model, settings, data, collator, work, progress=progress)
        metrics |= chosen_ranks(model, settings)
        metrics["train_loss"] = trained.pop("train_loss")
        costs |= trained
        costs["train_bytes"] = (costs["weight_bytes"] + costs["adapter_bytes"]
                                + costs["optimizer_bytes"] + costs["step_peak_bytes"])  # fmt: skip
    model, more = finish(model, settings)
    costs |= more
    if not processes.first():
        return None
    if save_to is not None:
        base = "KineVLM" if settings.base == "released" else Path(settings.base).name
        domain = settings.domain if settings.data else f"kinemoji.{settings.domain}"
        named = describe_model(model, base, domain, base_source=settings.base)
        save_model(model, save_to, named, tokenizer)
    with cost.cpu_seconds() as taken:
        if settings.judge:
            found = _judged(model, tokenizer, settings, data_root, clips, store)
        else:
            how = {"frames": settings.frames, "select": settings.select, "features": scored}
            found = evaluate(model, tokenizer, clips, store, **how)
    costs |= {"eval_cpu_s": taken["cpu_s"], "eval_wall_s": taken["wall_s"]}
    costs |= {name: float(value) for name, value in cost.device_memory().items()}
    metrics |= found.summary
    metrics["clips_left_out"] = metrics.get("clips_left_out", 0.0) + left_out
    if settings.data is not None:
        metrics["unknown_tokens_frac"] = sources().unknown_tokens(tokenizer, clips)
    return RunResult(metrics, costs, found.examples)


def _judged(model, tokenizer, settings, data_root: Path, clips, store):
    """The evaluation under many policies that `settings.judge` asks for, with `summary` and `examples`."""
    # Imported by name: other runs do not depend on this code (`runs.JUDGE_MODULES`).
    judge = importlib.import_module("vqlora.selection.judge").judge
    parts = {settings.eval_part: (clips, store)}
    if settings.judge_clips:
        size = frame_size(model.config)
        parts = {"val": clips_of(data_root, settings, "val", settings.judge_clips, size)[:2]} | parts
    exact = load_base(settings.base)[0] if "encoder" in settings.judge else None
    asked = settings.judge, settings.judge_frames
    return judge(model, tokenizer, parts, *asked, exact=exact, seed=settings.seed)


def chosen_ranks(model: nn.Module, settings) -> dict[str, float]:
    """`rank.<layer>` for arms that choose their ranks, and `active_parameters`, what these cost; else {}."""
    chosen = ranks(model, settings)
    if not chosen:
        return {}
    layers = [(model.get_base_model().get_submodule(name), rank) for name, rank in chosen.items()]
    active = sum(rank * (layer.in_features + layer.out_features) for layer, rank in layers)
    return {"active_parameters": float(active), **{f"rank.{n}": float(rank) for n, rank in chosen.items()}}


def first_batches(dataset, collator, settings, device, count: int = CALIBRATION_BATCHES) -> list[dict]:
    """The batches that training begins with: what a run may read before it, of its training part only."""
    size = settings.batch_size
    examples = Schedule(dataset, count * size, settings.seed)
    batches = (collator([examples[i * size + j] for j in range(size)]) for i in range(count))
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


def choose_attention(model: nn.Module, compute: str, device: torch.device) -> None:
    """Take written-out ("eager") attention where torch's fused one is slow: bfloat16 backward on CPU."""
    if device.type != "cpu" or compute != "bf16":
        return
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._can_set_attn_implementation():
            module.set_attn_implementation("eager")


def static_cost(model: nn.Module) -> dict[str, float]:
    """What does not depend on a batch; weight_bytes counts quantization constants and buffers."""
    report, held = trainable_report(model), cost.static_bytes(model)
    adapter_bytes = held["trainable"] if report["total"] > report["base"] else 0
    return {
        "trainable_parameters": float(report["trainable"]),
        "trainable_frac": report["trainable_frac"],
        "base_parameters": float(report["base"]),
        "weight_bytes": float(held["total"] - adapter_bytes),
        "constant_bytes": float(held["constants"]),
        "adapter_bytes": float(adapter_bytes),
    }


def train(
    model: nn.Module,
    settings,
    dataset,
    collator,
    work: str | Path,
    *,
    save_steps: int = 20,
    progress: bool = False,
) -> dict[str, float]:
    """Train `model` in place for `settings.steps` steps; returns {"train_cpu_s", "train_wall_s", "step_s",
    ...}.

    Logs for TensorBoard go to `work/tensorboard`, checkpoints to `work/checkpoints`; if whole ones are there,
    the run goes on from the last. `dataset[index, epoch]` gives one example, `collator` makes a batch of
    them. Raises ValueError if the learning rate is 0 or nothing is trainable.
    """
    work, device = Path(work), next(model.parameters()).device
    if not settings.learning_rate > 0:
        raise ValueError(
            f"learning_rate: {settings.learning_rate} given for arm {settings.arm!r}; it must be above 0"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"arm {settings.arm!r}: no parameter is trainable; see baselines.attach")
    optimizer, reason = pick_optimizer(settings.optimizer, model, device)
    _log.info("optimizer %s: %s", optimizer, reason)
    count = settings.steps * settings.batch_size * settings.accumulation
    examples = Schedule(dataset, count, settings.seed, settings.train_frames, settings.batch_size)
    clock = _StepClock()
    called = [*callbacks(model, settings), MarkWhole(), clock]
    writer = _tensorboard(work / "tensorboard") if processes.first() else None
    if writer is not None:
        writer.add_text("optimizer", f"{optimizer}: {reason}")
        called.append(TensorBoardCallback(writer))
    arguments = _arguments(settings, optimizer, device, model, work, save_steps, progress)
    trainer = VideoTrainer(
        model,
        arguments,
        collator,
        examples,
        callbacks=called,
        optimizers=(_gates_apart(model, settings, arguments) if settings.arm == "vqlora" else None, None),
        contrastive_weight=settings.contrastive_weight,
    )
    last = processes.told(lambda: last_whole_checkpoint(work / "checkpoints"))
    with cost.cpu_seconds() as taken:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        "train_cpu_s": processes.total(taken["cpu_s"]),
        "train_wall_s": taken["wall_s"],
        "step_s": statistics.median(clock.steps_s) if clock.steps_s else float("nan"),
        "steps_here": float(len(clock.steps_s)),
        "train_loss": losses[-1] if losses else float("nan"),
        "optimizer_bytes": float(cost.optimizer_bytes(trainer.optimizer)),
    }


def measure_step(
    model: nn.Module, batch: Mapping[str, Tensor], contrastive_weight: float
) -> dict[str, float]:
    """Peak bytes above the model, and FLOPs, of one forward and backward; leaves no gradients."""
    trainable = any(p.requires_grad for p in model.parameters())

    def step() -> None:
        with torch.set_grad_enabled(trainable):
            loss, _ = batch_loss(model, batch, contrastive_weight)
        if trainable:
            loss.backward()

    was_training, flops = model.training, []
    model.train(trainable)
    try:
        with torch.random.fork_rng():
            peak = cost.step_bytes(
                lambda: flops.append(cost.count_flops(step)), next(model.parameters()).device
            )
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    return {"step_peak_bytes": float(peak), "step_flops": float(flops[0])}


def _arguments(settings, optimizer, device, model, work, save_steps, progress) -> TrainingArguments:
    compute = compute_dtype(settings.compute_dtype, device).name
    more = {}
    if settings.gradient_checkpointing:
        more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(work / "checkpoints"),
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=processes.share(settings.batch_size),
        gradient_accumulation_steps=settings.accumulation,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        warmup_steps=min(settings.warmup_steps, settings.steps),
        weight_decay=settings.weight_decay,
        optim=optimizer,
        bf16=settings.arm in WHOLE and compute == "bf16",  # float32 masters, bf16 products
        seed=settings.seed,
        train_sampling_strategy="sequential",
        use_cpu=device.type == "cpu",
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        logging_steps=max(1, settings.steps // 20),
        logging_first_step=True,
        report_to="none",
        disable_tqdm=not progress,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        label_names=["labels"],
        # what the second forward of a step trains may be out of sight for DDP (see `batch_loss`)
        ddp_find_unused_parameters=not settings.contrastive_weight,
        **more,
    )


def _gates_apart(model: nn.Module, settings, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """The Trainer's own optimizer, with the gates in a group of their own that learns faster."""
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    options = {key: value for key, value in options.items() if key != "lr"}
    return importlib.import_module("vqlora.optimizer").create_optimizer(
        model,
        lr=settings.learning_rate,
        gate_lr=settings.gate_rate * settings.learning_rate,
        weight_decay=settings.weight_decay,
        optimizer_cls=kind,
        **options,
    )


class _StepClock(TrainerCallback):
    """Wall seconds of every optimizer step."""

    def __init__(self) -> None:
        self.steps_s: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps_s.append(time.perf_counter() - self._began)


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _log.warning("tensorboard is not installed: no logs in %s", folder)
        return None
    return SummaryWriter(str(folder))


def _optimizers() -> list[str]:
    from transformers.training_args import OptimizerNames

    return [name.value for name in OptimizerNames]
