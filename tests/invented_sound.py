"""Invented runs of notebook 16, and its results files made of them."""

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from vqlora.experiments import load_profile
from vqlora.store import StoredRun
from vqlora.studies import sound_study

ROOT = Path(__file__).resolve().parents[1]
PROFILE = load_profile("full", ROOT)
SOUND = PROFILE.sound
NLL = {"silent": 1.0, "sound": 0.8, "fixed": 0.81, "shuffled": 1.02, "gated": 0.8, "silent-8": 0.7}
RIGHT = {"direction": {"sound": 0.9, "fixed": 0.9, "gated": 0.9, "silent-8": 0.9}}


class Run(StoredRun):
    """A stored run of 40 clips with a caption and three questions each."""

    def examples(self) -> pd.DataFrame:
        return _rows(self.settings.method, self.settings.seed)


@cache
def _rows(arm: str, seed: int) -> pd.DataFrame:
    rng, tables = np.random.default_rng(seed), []
    clips = pd.DataFrame({"clip": [f"c{i}" for i in range(40)]})
    noise = rng.normal(0, 0.01, 40)
    tables.append(clips.assign(task="caption", kind="", nll=NLL[arm] + noise, slot=0.5, exact=0.0))
    for kind in ("direction", "what", "where"):
        level = RIGHT.get(kind, {}).get(arm, 0.4)
        tables.append(clips.assign(task="question", kind=kind, correct=(np.arange(40) < 40 * level) * 1.0))
    tables.append(clips.assign(task="retrieval", kind="t2v", rank=1.0))
    return pd.concat(tables, ignore_index=True)


def run(settings) -> Run:
    """A finished run whose loss is lowest at a rate of 5e-3."""
    rows = _rows(settings.method, settings.seed)
    asked = rows[rows["task"] == "question"]["correct"].mean()
    metrics = {"nll": NLL[settings.method] + 10 * abs(settings.learning_rate - 5e-3), "qa_frac": asked}
    metrics |= {"slot_frac": 0.5, "exact_frac": 0.0, "t2v_r1": 1.0}
    return Run(settings.name, settings, metrics, {"trainable_parameters": 9.0}, {}, None)


def write_sound(folder: Path) -> Path:
    """The results files that tables, figure and text read."""
    runs = [run(settings) for settings in SOUND.runs()]
    tests = sound_study.judge(SOUND, runs)
    lesson = pd.DataFrame({"metric": ["steps", "first_nll", "last_nll"], "value": [300, 0.9, 0.6]})
    frames = {"summary": sound_study.summarise(runs), "kinds": sound_study.kinds(runs), "tests": tests,
              "overall": sound_study.overall(tests), "listen": lesson}  # fmt: skip
    for name, frame in frames.items():
        frame.to_csv(folder / f"{name}.csv", index=False)
    return folder
