"""What the base can do before anything is fine-tuned: scores on unseen source clips, and the release of its
weights."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from vqlora.data.cache import FrameStore
from vqlora.data.clips import Clip
from vqlora.evaluate import evaluate

POOL = 256  # clips that a caption is looked for among: Recall@1 depends on it
VIEWS: Mapping[str, Mapping] = {
    "uniform": {"select": "uniform"},
    "cover": {"select": "cover"},
    "blind": {"select": "uniform", "blind": True},
}


def score_base(
    model, tokenizer, clips: tuple[Clip, ...], store: FrameStore, *, frames: int = 8
) -> pd.DataFrame:
    """One row per view (column ``frames``) and one column per metric of :func:`vqlora.evaluate.evaluate`.

    Views: ``uniform`` frames, frames that ``cover`` the true events, and ``blind`` (the frames of another
    clip: what the text alone gives away). Each number is the mean over consecutive pools of 256 clips, so
    that retrieval always looks among as many; a pool of fewer than 256 is used only if it is the only one.
    """
    starts = range(0, max(len(clips) // POOL, 1) * POOL, POOL)
    rows = []
    for name, view in VIEWS.items():
        pools = [
            evaluate(model, tokenizer, clips[at : at + POOL], store, frames=frames, **view).summary
            for at in starts
        ]
        mean = pd.DataFrame(pools).mean().to_dict()
        rows.append({"frames": name, **mean, "clips": sum(pool["clips"] for pool in pools)})
    return pd.DataFrame(rows)


def long_table(scores: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Columns base, frames, metric, value, from one :func:`score_base` table for each base."""
    tables = [
        table.melt(id_vars="frames", var_name="metric", value_name="value").assign(base=base)
        for base, table in scores.items()
    ]
    return pd.concat(tables).sort_values(["base", "frames", "metric"])[["base", "frames", "metric", "value"]]


def release(trained: Path, to: Path) -> str:
    """Copy a trained base into the package with its SHA-256; returns the hash that ``load_base`` then
    insists on."""
    to.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(trained / name, to / name)
    shutil.copyfile(trained / "model.safetensors", to / "model.safetensors")
    found = hashlib.sha256((to / "model.safetensors").read_bytes()).hexdigest()
    (to / "SHA256").write_text(f"{found}  model.safetensors\n")
    return found
