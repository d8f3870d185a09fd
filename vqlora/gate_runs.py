"""A run whose gates are kept: `vqlora.train.execute`, then what each gate does in every test frame.

    runs = run_grid(settings, store, profile, execute=gate_runs.execute)
    runs[0].examples().query("task == 'gate'")    # clip, frame, feature.<name>, gate.<layer>, active.<layer>
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from torch import nn

from vqlora import train
from vqlora.adapter import effective_ranks, gates, watch
from vqlora.data.batches import ClipDataset, Item, pixels
from vqlora.data.parts import clips_of
from vqlora.naming import load_model
from vqlora.result import RunResult
from vqlora.temporal import PIXEL_FEATURES, pixel_features

BATCH = 32  # clips


def execute(settings, data_root: str | Path, work: str | Path) -> RunResult | None:
    """One whole run; the examples of a gated one get a row for each frame it was tested on, task "gate"."""
    with TemporaryDirectory() as folder:
        result = train.execute(settings, data_root, work, save_to=folder)
        if result is None or settings.gate == "none":
            return result
        model, _ = load_model(next(Path(folder).iterdir()))
    clips, store, _ = clips_of(Path(data_root), settings, settings.eval_part, settings.eval_clips)
    data = ClipDataset(clips, store, settings.frames, settings.select)
    lengths = {clip.id: len(store[clip.id]) for clip in clips}
    table = gate_rows(model, [data[i] for i in range(len(data))], lengths)
    return RunResult(result.metrics, result.cost, pd.concat([result.examples, table], ignore_index=True))


def gate_rows(model: nn.Module, items: Sequence[Item], lengths: dict[str, int]) -> pd.DataFrame:
    """What the gates of `model` do in the frames of `items`: a row for each, columns as above.

    lengths: frames of the whole clip, by id. feature.*: as measured, before they are standardised. gate.*:
    mean over a layer's ranks. active.*: its effective rank. No layer is run: gates depend on frames alone.
    """
    tables = []
    for start in range(0, len(items), BATCH):
        shown = items[start : start + BATCH]
        inputs = _inputs(model, shown)
        with watch(model, **inputs), torch.no_grad():
            opened, active = gates(model), effective_ranks(model)
        clip = torch.arange(len(shown)).repeat_interleave(len(shown[0].frames))
        flat = inputs["pixel_values"].flatten(0, 1)
        seen = pixel_features(flat, clip, inputs["frame_times"].flatten())
        columns = {f"feature.{name}": seen[:, place].numpy() for place, name in enumerate(PIXEL_FEATURES)}
        # a constant gate is one row for all frames
        mean = {f"gate.{name}": table.mean(dim=1) for name, table in opened.items()}
        mean |= {f"active.{name}": ranks for name, ranks in active.items()}
        columns |= {name: found.expand(len(clip)).numpy() for name, found in mean.items()}
        frame = [round(float(t) * (lengths[item.clip.id] - 1)) for item in shown for t in item.times]
        named = {"clip": [item.clip.id for item in shown for _ in item.times], "task": "gate", "frame": frame}
        tables.append(pd.DataFrame({**named, **columns}))
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "id", table["clip"] + "/frame" + table["frame"].astype(str))
    return table


def _inputs(model: nn.Module, items: Sequence[Item]) -> dict[str, torch.Tensor]:
    """What a forward over the items' frames gets: pixels, times and the places of their tokens."""
    frames = len(items[0].frames)
    tokens = getattr(model.config, "tokens_per_frame", 4) * frames
    ids = torch.full((len(items), tokens), model.config.image_token_id)
    times = torch.stack([torch.from_numpy(item.times) for item in items])
    return {"input_ids": ids, "frame_times": times, "pixel_values": pixels([item.frames for item in items])}
