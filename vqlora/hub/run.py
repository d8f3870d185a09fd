"""One whole run on a checkpoint of the hub: what `vqlora.train.execute` is for the embedded base.

The arms, the loop, the loss and the costs are the same; rows, pixels and scores are made from what the
checkpoint's files say. There is no retrieval, hence no contrastive part of the loss.
"""

from __future__ import annotations

from pathlib import Path

import torch

from vqlora import cost, processes
from vqlora.baselines import attach, finish
from vqlora.data.batches import ClipDataset
from vqlora.data.clips import require_disjoint
from vqlora.data.parts import clips_of, refuse_overlap
from vqlora.hub.batches import HubCollator, clip_seconds
from vqlora.hub.checkpoint import Checkpoint, load_model, read_checkpoint
from vqlora.hub.evaluate import evaluate_hub
from vqlora.hub.pixels import squared
from vqlora.hub.prompts import REQUEST
from vqlora.naming import describe_model, save_model
from vqlora.precision import compute_dtype
from vqlora.result import RunResult
from vqlora.train import choose_attention, chosen_ranks, first_batches, measure_step, static_cost, train

EVAL_BATCH = 8


def execute(
    settings,
    data_root: str | Path,
    work: str | Path,
    *,
    progress: bool = False,
    save_to: str | Path | None = None,
) -> RunResult | None:
    """Load in bits, put the arm on, train, save to `save_to`, score. As `vqlora.train.execute`, whose
    arguments it has.

    Raises ValueError for a checkpoint that cannot be used and for settings that mean nothing to one.
    """
    if settings.judge:
        raise ValueError(f"judge: {settings.judge} goes with the embedded base alone; allowed: []")
    torch.set_num_threads(settings.threads)
    settings = settings.model_copy(update={"contrastive_weight": 0.0})
    data_root, work = Path(data_root), Path(work)
    cost.reset_resident_peak()
    checkpoint = read_checkpoint(settings.base)
    model = load_model(settings.base, settings)
    device = next(model.parameters()).device
    choose_attention(model, compute_dtype(settings.compute_dtype, device).name, device)
    learns = settings.arm != "frozen" and settings.steps
    parts = ("train", settings.eval_part) if learns else (settings.eval_part,)
    if learns:
        refuse_overlap(settings)
    counts = {"train": settings.train_clips, settings.eval_part: settings.eval_clips}
    found = {
        part: clips_of(data_root, settings, part, counts[part], stored_side(checkpoint)) for part in parts
    }
    require_disjoint(**{part: clips for part, (clips, *_) in found.items()})
    seconds = clip_seconds((clip for clips, *_ in found.values() for clip in clips), data_root / "cache")
    scored = settings.arm == "vqlora" and settings.gate_features == "scores"
    chosen = {"frames": settings.frames, "select": settings.select, "features": scored}
    told = {"question_share": settings.question_share, "request": settings.prompt or REQUEST}
    collator = HubCollator(checkpoint, seconds, settings.seed, **told)
    metrics: dict[str, float] = {}
    if not learns:
        model = attach(model, settings)
        costs = static_cost(model)
    else:
        data = ClipDataset(*found["train"][:2], **chosen, seed=settings.seed)
        with cost.cpu_seconds() as taken:
            model = attach(model, settings, lambda: first_batches(data, collator, settings, device))
        costs = {**static_cost(model), "attach_cpu_s": taken["cpu_s"]}
        probe = ClipDataset(*found["train"][:2], **chosen)
        batch = HubCollator(checkpoint, seconds, **told)(
            [probe[i] for i in range(processes.share(settings.batch_size))]
        )
        costs |= measure_step(model, {key: value.to(device) for key, value in batch.items()}, 0.0)
        trained = train(model, settings, data, collator, work, progress=progress)
        metrics |= chosen_ranks(model, settings)
        metrics["train_loss"] = trained.pop("train_loss")
        costs |= trained
        costs["train_bytes"] = (
            costs["weight_bytes"]
            + costs["adapter_bytes"]
            + costs["optimizer_bytes"]
            + costs["step_peak_bytes"]
        )
    model, more = finish(model, settings)
    costs |= more
    if not processes.first():
        return None
    if save_to is not None:
        named = describe_model(model, Path(settings.base).name, settings.domain, base_source=settings.base)
        save_model(model, save_to, named, checkpoint.tokenizer)
    clips, store, _ = found[settings.eval_part]
    with cost.cpu_seconds() as taken:
        scores = evaluate_hub(model, collator, clips, store, **chosen, batch_size=EVAL_BATCH)
    costs |= {"eval_cpu_s": taken["cpu_s"], "eval_wall_s": taken["wall_s"]}
    costs |= {name: float(value) for name, value in cost.device_memory().items()}
    metrics |= scores.summary
    metrics["clips_left_out"] += sum(skipped for *_, skipped in found.values())
    return RunResult(metrics, costs, scores.examples)


def stored_side(checkpoint: Checkpoint) -> int | None:
    """Side of the squares that frames are kept as, where the class squeezes them to squares anyway; else
    None: frames are kept whole."""
    family, numbers = checkpoint.family, checkpoint.numbers
    if family.whole or numbers.get("do_center_crop"):
        return None
    if family.sizes is squared:
        return numbers["max_image_size"]["longest_edge"]
    size = numbers.get("size") or {}
    return size["height"] if size.get("height") and size.get("height") == size.get("width") else None
