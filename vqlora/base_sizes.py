"""Bases of several sizes by one recipe, trained from scratch for notebook 10.

    folders = train_bases(scaling, profile.base, here.build / "bases")    # name -> folder
    runs = run_grid(scaling.base_runs(placement, folders), here.store, here.profile)

Each takes as long as notebook 02 with `pretrain` and more, so that only profile `full` has any.
"""

from __future__ import annotations

from pathlib import Path

from vqlora.config import PretrainSettings
from vqlora.experiments import ScalingSettings


def train_bases(scaling: ScalingSettings, common: PretrainSettings, folder: str | Path) -> dict[str, str]:
    """Train every base of `scaling.bases` by the common recipe into `folder/<name>`; folders by name.

    One that is finished, by the same recipe and code, is not trained again.
    """
    from vqlora.pretrain import pretrain

    return {size.name: str(pretrain(size.recipe(common), Path(folder, size.name))) for size in scaling.bases}
