"""What a notebook's first cell asks for: the folders, settings and run store of a profile.

    from vqlora.notebooks import start
    here = start(profile, "03_main")
    runs = run_grid(here.profile.main.runs(base=here.base), here.store, here.profile)
    here.write_results(runs)               # build/<profile>/results/03_main/{runs,cost}.csv, manifest.json
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqlora.experiments import Profile, load_profile
from vqlora.identity import digest, provenance
from vqlora.store import RunStore, cost_frame, results_frame, write_results


class NotebookError(RuntimeError):
    """A notebook is unknown or one of its cells failed; the message is one line."""


@dataclass(frozen=True)
class Here:
    """Where a notebook works: its profile, its folders and the store of finished runs."""

    root: Path
    profile: Profile
    name: str

    @property
    def build(self) -> Path:
        """`build/<profile>`, all that this profile makes."""
        return self.root / "build" / self.profile.name

    @property
    def data(self) -> Path:
        """Rendered data sets, one folder per domain."""
        return self.build / "data"

    @property
    def cache(self) -> Path:
        """Folder whose `cache/` holds decoded frames; runs look there, too, so each clip is decoded once."""
        return self.data

    @property
    def results(self) -> Path:
        """Folder for this notebook's results files; made if missing."""
        return self.results_of(self.name)

    @property
    def store(self) -> RunStore:
        return RunStore(self.build)

    @property
    def base(self) -> str:
        """Base model of this profile's runs: `released`, or the folder that notebook 02 trained into."""
        return str(self.build / "base" / "model") if self.profile.base.pretrain else "released"

    def results_of(self, name: str) -> Path:
        """Folder of another notebook's results in this profile."""
        folder = self.build / "results" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def write_results(self, runs: Any, cost: Any = None, **more: Any) -> None:
        """Write `runs.csv`, `cost.csv`, `manifest.json`; `runs` is what `run_grid` gave back, or a table."""
        if isinstance(runs, list):
            runs, cost = results_frame(runs), cost_frame(runs)
        write_results(self.results, runs, cost, self.manifest(**more))

    def manifest(self, **more: Any) -> dict[str, Any]:
        """Provenance of this notebook's results; `more` is added.

        Results under equal `settings` are of one kind, whatever the profiles are called.
        """
        read = digest(self.profile.read_by(self.name))
        return provenance(self.root, notebook=self.name, profile=self.profile.name, settings=read, **more)


def start(profile: str, name: str, root: str | Path | None = None) -> Here:
    """Folders, settings and store for a notebook, in `root` or else found from the current folder upward."""
    root = Path(root) if root else repository()
    return Here(root, load_profile(profile, root), name)


def repository(start_at: Path | None = None) -> Path:
    """The folder, here or above, that holds `configs` and `notebooks`."""
    begin = (start_at or Path.cwd()).resolve()
    for folder in (begin, *begin.parents):
        if (folder / "configs").is_dir() and (folder / "notebooks").is_dir():
            return folder
    raise NotebookError(f"{begin}: not inside a checkout of vqlora (configs/ and notebooks/)")
