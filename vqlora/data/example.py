"""A first data set of one's own to copy from: a few rendered clips, their captions as JSONL, settings."""
from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from vqlora.data.formats.kinemoji import load_kinemoji
from vqlora.data.kinemoji.write import write_domain
from vqlora.data.rows import FormatError
from vqlora.data.writers import write_jsonl
from vqlora.files import write_atomic

SETTINGS = """# vqlora run {name}/run.yaml
experiment: mine
data:
  format: jsonl          # or msrvtt, vatex, activitynet, lsmdc: see `vqlora data check --help`
  root: .                # from this file; holds captions.jsonl and the clips
arm: qlora
bits: nf4
seed: 0
learning_rate: 1e-2
steps: 30
batch_size: 8
train_clips: {train}
eval_clips: {val}
"""


def write_example(folder: str | Path, clips: int = 20, seed: int = 0) -> Path:
    """Write `clips` rendered videos, `captions.jsonl` and `run.yaml` into a new folder; returns it.

    Clips come from a domain whose captions have another style than what the released base was trained on, so
    that a run has something to learn. Raises FormatError where the folder holds something, or for under 5
    clips.
    """
    folder = Path(folder)
    if clips < 5:
        raise FormatError(f"clips: {clips}; at least 5 are needed, a fifth of them is for validation")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FormatError(f"{folder}: is there already; name a new folder")
    counts = {"train": clips - clips // 5, "val": clips // 5}
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as rendered:
        write_domain(Path(rendered), "language", counts, seed, languages=["en"], audio=False)
        own = []
        for part in counts:
            for clip in load_kinemoji(Path(rendered), "language", part).clips:
                path = folder / "clips" / clip.path.name.removeprefix("language-")
                shutil.move(clip.path, path)
                own.append(replace(clip, path=path))
    write_jsonl(folder / "captions.jsonl", own)
    settings = SETTINGS.format(name=folder.name, **counts)
    write_atomic(folder / "run.yaml", settings)
    return folder
