"""Whether the runs of a comparison fit a card, by plans made from the checkpoints' published shapes.

    plan_cards(load_profile("gpu").hub[0])     # card, arm, bits, frames, batch, train_gb, room_gb, fits
    python -m vqlora.cost.cards                # the arm that takes most, into results/gpu_plan.csv; minutes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vqlora.adapter import VQLoraConfig
from vqlora.cost.plan import plan_memory, read_bytes
from vqlora.cost.sizes import CONFIGS

if TYPE_CHECKING:
    import pandas as pd

    from vqlora.experiments import HubSettings

RESERVE = "1GB"  # of the card: the driver's context and the allocator's rounding
ANSWER = 64
WORDS_PER_FRAME = 16  # of the longest clip text, SmolVLM's, and the request with them


def plan_cards(compared: HubSettings, cards: Sequence[str] = (), arms: Sequence[str] = ()) -> pd.DataFrame:
    """A row for each card and arm that trains (all, or the named ones), planned as its runs would train.

    Raises ValueError for a comparison without a known shape.
    """
    import pandas as pd

    if compared.shape not in CONFIGS:
        raise ValueError(f"shape: {compared.shape!r} is not known; allowed: {', '.join(CONFIGS)}")
    rows = []
    for card in cards or compared.cards:
        for arm in compared.on(card).arms:
            if arm.arm == "frozen" or (arms and arm.arm not in arms):
                continue
            (run, *_) = compared.on(card).model_copy(update={"arms": (arm,)}).runs()
            adapter = VQLoraConfig(
                r=run.rank, gate=run.gate if run.arm == "vqlora" else "none", modalities=run.modalities
            )
            plan = plan_memory(
                CONFIGS[compared.shape](),
                adapter,
                bits=run.bits,
                frames=run.frames,
                prompt=32 + WORDS_PER_FRAME * run.frames,
                answer=ANSWER,
                batch=run.batch_size,
                gradient_checkpointing=run.gradient_checkpointing,
                optimizer="paged_adamw_8bit" if run.bits in ("nf4", "fp4") else "adamw_torch",
                dtype=run.compute_dtype,
                device="cuda",
            )
            room = read_bytes(card) - read_bytes(RESERVE)
            rows.append(
                {
                    "card": card,
                    "arm": arm.arm,
                    "bits": run.bits,
                    "frames": run.frames,
                    "batch": run.batch_size,
                    "train_gb": plan.train_bytes / 1e9,
                    "room_gb": room / 1e9,
                    "fits": plan.train_bytes <= room,
                }
            )
    return pd.DataFrame(rows)


def main(profile: str = "gpu", arms: Sequence[str] = ("lora",)) -> None:
    """Plan every comparison of a profile on every card and write `results/gpu_plan.csv`."""
    import pandas as pd

    from vqlora.experiments import load_profile
    from vqlora.notebooks import repository
    from vqlora.store import write_csv

    root = repository()
    tables = [
        plan_cards(compared, arms=arms).assign(shape=compared.shape)
        for compared in load_profile(profile, root).hub
    ]
    write_csv(root / "results" / "gpu_plan.csv", pd.concat(tables)[["shape", *tables[0].columns[:-1]]])


if __name__ == "__main__":
    main()
