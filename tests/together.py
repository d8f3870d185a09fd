"""What test_processes.py starts in two processes at once."""
import os
import sys
from pathlib import Path

import torch
from settings_like import settings_like
from test_train import run

from vqlora.runs import RunStore, run_grid

ARMS = {"qlora": "nf4", "vqlora": "nf4", "full": "bf16"}


def settings_of(arm: str, **more):
    return settings_like(arm, ARMS[arm], batch_size=4, learning_rate=1e-3, **{"steps": 4, **more})


def a_run(root: Path):
    """Settings of a whole run on what the test has laid out in `root`."""
    judged = {"judge": ("uniform",), "judge_frames": (2,)}
    return settings_of("qlora", base=str(root / "base"), domain="visual", compute_dtype="fp32", **judged)


def main(root: Path) -> None:
    rank, dropped = os.environ["RANK"], settings_of("qlora", dropout=0.1)
    for arm in ARMS:
        torch.save(run(settings_of(arm, steps=2), root / arm), root / f"{arm}-{rank}.pt")
    torch.save(run(dropped, root / "whole"), root / f"whole-{rank}.pt")
    for _ in range(2):
        found = run_grid([a_run(root)], RunStore(root / "grid"), data_root=root / "data")
    torch.save((found[0].key, found[0].metrics, found[0].provenance), root / f"grid-{rank}.pt")
    if rank == "0":
        (root / "whole" / "checkpoints" / "checkpoint-4" / "complete.json").unlink()  # as if killed in saving
    torch.save(run(dropped, root / "whole"), root / f"resumed-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
