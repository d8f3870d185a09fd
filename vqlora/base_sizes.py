"""Bases of several sizes by one recipe, trained from scratch for notebook 10.

    folders = train_bases(scaling, profile.base, here.build / "bases", here.base)    # name -> folder
    runs = run_grid(scaling.base_runs(placement, folders), here.store, here.profile)

Minutes for the smallest, half an hour on two cores for one of eight million parameters.
"""

from __future__ import annotations

from pathlib import Path

from vqlora.config import PretrainSettings
from vqlora.experiments import ScalingSettings

_NO_RECIPE = {"pretrain", "val_clips"}


def train_bases(
    scaling: ScalingSettings, common: PretrainSettings, folder: str | Path, base: str
) -> dict[str, str]:
    """Train every base of `scaling.bases` by the common recipe into `folder/<name>`; folders by name.

    base: the profile's own, trained by `common` where it pretrains, else released; it stands for the size
    whose recipe is its own. One that is finished, by the same recipe and code, is not trained again.
    """
    from vqlora.pretrain import pretrain

    made_by = (common if common.pretrain else PretrainSettings()).model_dump(exclude=_NO_RECIPE)
    folders = {}
    for size in scaling.bases:
        recipe = size.recipe(common)
        own = recipe.model_dump(exclude=_NO_RECIPE) == made_by
        folders[size.name] = base if own else str(pretrain(recipe, Path(folder, size.name)))
    return folders
