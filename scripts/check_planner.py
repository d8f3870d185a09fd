"""The memory planner against measurements, and its predictions for well-known models.

    python scripts/check_planner.py --out build/planner            # two models, 20 settings
    python scripts/check_planner.py --only 0 3 12 --out build/planner

Writes planner.csv (setting, part, predicted and measured bytes, ratio; rows are added as they come, settings
that are there already are not measured again), and with --sizes sizes.csv and stated.csv, which are
predictions alone.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import pandas as pd

from vqlora.cost.check import SETTINGS, check_planner, peaks
from vqlora.cost.sizes import known_sizes, stated_sizes


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="settings, by place")
    parser.add_argument("--sizes", action="store_true", help="also the tables of predictions")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen.out.mkdir(parents=True, exist_ok=True)
    file = chosen.out / "planner.csv"
    done = set(pd.read_csv(file).number) if file.exists() else set()
    for number in range(len(SETTINGS)) if chosen.only is None else chosen.only:
        if number in done:
            continue
        rows = check_planner([SETTINGS[number]]).assign(number=number)
        rows.to_csv(file, mode="a", header=not file.exists(), index=False)
        print(peaks(rows).to_string(index=False, header=False), flush=True)
    print(peaks(pd.read_csv(file)).to_string(index=False))
    if chosen.sizes:
        known_sizes().to_csv(chosen.out / "sizes.csv", index=False)
        stated_sizes().to_csv(chosen.out / "stated.csv", index=False)


if __name__ == "__main__":
    main()
