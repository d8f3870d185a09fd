"""The memory planner against measurements, and its predictions for well-known models; notebook 08 without it.

    python scripts/check_planner.py --out build/planner            # two models, 20 settings
    python scripts/check_planner.py --only 0 3 12 --out build/planner

Each setting is measured in a process of its own, and not again while the code is the same. Writes planner.csv
(setting, part, predicted and measured bytes, ratio), and with --sizes sizes.csv and stated.csv, which are
predictions alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vqlora.cost.check import SETTINGS
from vqlora.cost.sizes import known_sizes, stated_sizes
from vqlora.cost.study import check_apart, judged_peaks


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="settings, by place")
    parser.add_argument("--sizes", action="store_true", help="also the tables of predictions")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    numbers = range(len(SETTINGS)) if chosen.only is None else chosen.only
    table = check_apart(numbers, chosen.out / "kept")
    table.to_csv(chosen.out / "planner.csv", index=False)
    print(judged_peaks(table).to_string(index=False))
    if chosen.sizes:
        known_sizes().to_csv(chosen.out / "sizes.csv", index=False)
        stated_sizes().to_csv(chosen.out / "stated.csv", index=False)


if __name__ == "__main__":
    main()
