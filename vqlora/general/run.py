"""One run that is evaluated on more than its own clips, or learns captions in other languages.

What `vqlora.train.execute` is for other runs: the same loop, loss and batches. `examples` hold the rows of
every evaluation; their column `reading` says which:

    own               `domain` with `frames` frames, in English; not of runs that learn other languages
    domain.source     the same on clips of another domain
    frames.16         the same with another number of frames
    language.es       captions alone, asked for in a language (`vqlora.general.languages`)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from vqlora import cost, processes
from vqlora.base import load_base
from vqlora.baselines import attach, prepare
from vqlora.data.batches import ClipDataset, Collator
from vqlora.data.clips import require_disjoint
from vqlora.data.parts import clips_of
from vqlora.evaluate import evaluate
from vqlora.general.languages import LanguageCollator, read_languages
from vqlora.metrics import CAPTION_MEANS
from vqlora.naming import describe_model, save_model
from vqlora.quantize import compute_dtype
from vqlora.result import RunResult
from vqlora.train import choose_attention, chosen_ranks, first_batches, static_cost, train

KEPT = ("nll", "token_accuracy_frac", "slot_frac", "exact_frac", "qa_frac", "t2v_r1", "clips")


def execute(
    settings,
    data_root: str | Path,
    work: str | Path,
    *,
    progress: bool = False,
    save_to: str | Path | None = None,
) -> RunResult | None:
    """Base in its bits, arm, training, every evaluation. Arguments are those of `vqlora.train.execute`.

    metrics: those of the own reading by their names, of the others as `<reading>.<name>`; `nll` of a run that
    learns languages is the mean over these.
    """
    torch.set_num_threads(settings.threads)
    data_root, work = Path(data_root), Path(work)
    cost.reset_resident_peak()
    model, tokenizer = load_base(settings.base)
    model = prepare(model, settings)
    device = next(model.parameters()).device
    choose_attention(model, compute_dtype(settings.compute_dtype, device).name, device)
    clips, store, left_out = clips_of(data_root, settings, settings.eval_part, settings.eval_clips)
    metrics: dict[str, float] = {}
    if settings.arm == "frozen" or not settings.steps:
        model = attach(model, settings)
        costs = static_cost(model)
    else:
        learned = clips_of(data_root, settings, "train", settings.train_clips)
        left_out += learned[2]
        require_disjoint(**{"train": learned[0], settings.eval_part: clips})
        model, costs = _trained(model, tokenizer, settings, *learned[:2], work, progress)
        metrics |= chosen_ranks(model, settings)
        metrics["train_loss"] = costs.pop("train_loss")
    if not processes.first():
        return None
    if save_to is not None:
        base = "KineVLM" if settings.base == "released" else Path(settings.base).name
        named = describe_model(model, base, f"kinemoji.{settings.domain}", base_source=settings.base)
        save_model(model, save_to, named, tokenizer)
    tables = []
    with cost.cpu_seconds() as taken:
        for reading, summary, table in _readings(model, tokenizer, settings, clips, store, data_root):
            tables.append(table.assign(reading=reading))
            head = "" if reading == "own" else f"{reading}."
            metrics |= {f"{head}{name}": value for name, value in summary.items()}
    costs |= {"eval_cpu_s": taken["cpu_s"], "eval_wall_s": taken["wall_s"]}
    costs |= {name: float(value) for name, value in cost.device_memory().items()}
    metrics["clips_left_out"] = metrics.get("clips_left_out", 0.0) + left_out
    if settings.languages:
        metrics["nll"] = float(np.mean([metrics[f"language.{name}.nll"] for name in settings.languages]))
    return RunResult(metrics, costs, pd.concat(tables, ignore_index=True))


def _trained(model: nn.Module, tokenizer, settings, clips, store, work: Path, progress: bool):
    """(the trained model, its costs and `train_loss`)."""
    scored = settings.arm == "vqlora" and settings.gate_features == "scores"
    chosen = {"frames": settings.frames, "select": settings.select, "features": scored}
    data = ClipDataset(clips, store, **chosen, seed=settings.seed)
    options = {"seed": settings.seed, "question_share": settings.question_share,
               "tokens_per_frame": model.config.tokens_per_frame}  # fmt: skip
    if settings.languages:
        collator = LanguageCollator(tokenizer, settings.languages, **options)
    else:
        collator = Collator(tokenizer, **options)
    device = next(model.parameters()).device
    model = attach(model, settings, lambda: first_batches(data, collator, settings, device))
    return model, static_cost(model) | train(model, settings, data, collator, work, progress=progress)


def _readings(
    model: nn.Module, tokenizer, settings, clips, store, data_root: Path
) -> Iterator[tuple[str, dict[str, float], pd.DataFrame]]:
    """(reading, summary, rows per example) of every evaluation that the settings ask for."""
    scored = settings.arm == "vqlora" and settings.gate_features == "scores"
    how = {"select": settings.select, "features": scored}
    if not settings.languages:
        found = evaluate(model, tokenizer, clips, store, frames=settings.frames, **how)
        yield "own", found.summary, found.examples
    for name in settings.also_domains:
        there = settings.model_copy(update={"domain": name})
        others = clips_of(data_root, there, settings.eval_part, settings.eval_clips)[:2]
        found = evaluate(model, tokenizer, *others, frames=settings.frames, **how)
        yield f"domain.{name}", _kept(found.summary), found.examples
    for frames in settings.also_frames:
        found = evaluate(model, tokenizer, clips, store, frames=frames, **how)
        yield f"frames.{frames}", _kept(found.summary), found.examples
    if settings.languages or settings.also_languages:
        names = tuple(dict.fromkeys(("en", *settings.languages, *settings.also_languages)))
        table = read_languages(model, tokenizer, clips, store, names, frames=settings.frames, **how)
        for name, rows in table.groupby("kind", sort=False):
            means = {metric: float(rows[column].mean()) for metric, column in CAPTION_MEANS.items()
                     if column in rows}  # fmt: skip
            yield f"language.{name}", _kept(means), rows.assign(kind="")


def _kept(summary: dict[str, float]) -> dict[str, float]:
    return {name: summary[name] for name in KEPT if name in summary}
