"""The sample clips of notebook 01 as pixels, for the figures that show frames."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd

from vqlora.report.cells import read_csv
from vqlora.report.keys import ResultsError


@dataclass(frozen=True)
class Samples:
    """A clip a domain: ``rows`` (domain, clip, frames, caption) and ``sheet``, a strip of frames a row."""

    rows: pd.DataFrame
    sheet: np.ndarray  # float [rows · side, frames · side, 3 or 4], 0 to 1
    side: int  # of a frame, pixels

    def strip(self, line: int) -> np.ndarray:
        """Row `line` of the CSV as one picture, [side, frames · side, channels]."""
        return self.sheet[line * self.side : (line + 1) * self.side]

    def frames(self, domain: str) -> np.ndarray:
        """The frames of a domain's clip, uint8 [T, side, side, 3]; of the first clip where it has none."""
        lines = [*(self.rows["domain"] == domain)]
        strip = self.strip(lines.index(True) if any(lines) else 0)[..., :3]
        frames = np.split(strip, strip.shape[1] // self.side, axis=1)
        return np.rint(np.stack(frames) * 255).astype(np.uint8)


def read_samples(results: Path) -> Samples:
    """``01_data/samples.csv`` and ``samples.png``: one row of square frames per line of the CSV.

    Raises ResultsError where a file is missing or the picture does not divide into the clips.
    """
    rows = read_csv(results, "01_data/samples.csv", ("domain", "clip", "frames", "caption"))
    path = Path(results) / "01_data" / "samples.png"
    if not path.is_file():
        raise ResultsError(f"{path}: missing; `make 01` writes it")
    sheet = matplotlib.image.imread(path)
    if sheet.shape[0] % len(rows):
        raise ResultsError(
            f"{path}: {sheet.shape[0]} pixel rows do not divide into the {len(rows)} clips of samples.csv"
        )
    return Samples(rows, sheet, sheet.shape[0] // len(rows))
