"""Notebooks as steps of the paper: what each needs, whether it is up to date, how it is run.

A notebook is up to date while the hash over its cells, its part of the profile, the code its imports reach,
its parameters and the results it builds on is that of its last good run, and what that run wrote is still
there, unchanged. Deciding that imports neither torch nor Jupyter.
"""
from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import chdir
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from vqlora.console import duration, say
from vqlora.execution import execute
from vqlora.experiments import Profile, load_profile, reads
from vqlora.identity import (
    PACKAGE,
    code_hash,
    data_hash,
    digest,
    file_hash,
    imports_of,
    parse,
    processor,
    tree_hash,
)
from vqlora.notebooks import Here, NotebookError
from vqlora.store import whole_file

_DRAWN = ("01_data", "02_base", "03_main", "04_cost", "05_temporal", "06_ranks", "07_frames", "08_bits",
          "09_rank_size_and_placement", "10_scaling", "11_generalization", "12_qualitative")
# What a notebook builds on. 02_base is added where the profile trains its own base.
_ON_DATA = ("00_tour", "02_base", "03_main", "05_temporal", "06_ranks", "07_frames", "08_bits",
            "09_rank_size_and_placement", "11_generalization", "14_checkpoints", "15_confirmation",
            "16_sound")
NEEDS = {**dict.fromkeys(_ON_DATA, ("01_data",)), "01_data": (), "04_cost": ("03_main",),
         "12_qualitative": ("03_main",), "13_architectures": (),
         "10_scaling": ("03_main", "06_ranks", "07_frames", "08_bits", "09_rank_size_and_placement"),
         "90_figures": _DRAWN, "91_tables": (*_DRAWN, "13_architectures")}
# What it builds on as well where the profile makes it.
WHERE_MADE = {"91_tables": ("16_sound",)}
# What a notebook comes after where both are made, without building on it: it takes up runs.
AFTER = {"08_bits": ("03_main",)}
_PAPER = {"90_figures": "figures", "91_tables": "generated"}     # parts of the paper that notebooks make
# What the PDF writes once more, with what became of verification.
_REWRITTEN = ("paper/generated/keys.tex",)
# The section of a profile that a notebook is about, `main` where nothing is said: a profile without it leaves
# the notebook out.
SECTIONS = {"01_data": "data", "04_cost": "cost", "05_temporal": "temporal", "06_ranks": "ranks",
            "07_frames": "frames", "08_bits": "bits", "09_rank_size_and_placement": "placement",
            "10_scaling": "scaling", "11_generalization": "general", "12_qualitative": "qualitative",
            "13_architectures": "bits", "14_checkpoints": "hub", "15_confirmation": "confirm",
            "16_sound": "sound"}
OUTPUTS = (".csv", ".json", ".png", ".pdf", ".tex", ".md")
MACHINE_BOUND = ("manifest.json",)                           # differs from run to run; nothing is built on it


@dataclass(frozen=True)
class Step:
    """One notebook under one profile, with the parameters it is run with."""

    here: Here
    parameters: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.here.name

    @property
    def path(self) -> Path:
        return self.here.root / "notebooks" / f"{self.name}.ipynb"

    @property
    def stamp(self) -> Path:
        return self.here.build / "stamps" / f"{self.name}.json"

    @cached_property
    def source(self) -> list[tuple[str, str]]:
        """(cell type, text) of every cell."""
        cells = json.loads(self.path.read_text(encoding="utf-8"))["cells"]
        return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]

    def key(self, parameters: Mapping[str, Any] | None = None) -> str:
        """Hash over all that the notebook's results depend on. Prose and comments do not count."""
        trees = [parse(_plain_python(text)) for kind, text in self.source if kind == "code"]
        code = code_hash(sorted(set().union(*(imports_of(tree) for tree in trees))) if trees else [])
        profile = self.here.profile
        built_on = {need: _tree(self.here.build / "results" / need) for need in needs(self.name, profile)}
        files = {path.as_posix(): file_hash(self.here.root / path) for path in _inputs(self.here)}
        return digest([tree_hash(tree) for tree in trees], code, built_on, files,
                      profile.read_by(self.name, also=["name"]),
                      dict(self.parameters if parameters is None else parameters))

    def up_to_date(self) -> bool:
        """True if the last good run had this key and all it wrote is still there unchanged."""
        try:
            seal = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        wanted = [self.key()]
        if self.parameters.get("pretrain") is False:         # a base trained here has been evaluated, too
            wanted.append(self.key({**self.parameters, "pretrain": True}))
        return seal.get("key") in wanted and seal.get("wrote") == self.wrote(seal.get("wrote", {}))

    def wrote(self, names: Mapping[str, str]) -> dict[str, str]:
        """Hash of each named output as it is now; a name ending in `/` is a data set."""
        return {name: data_hash(self.here.data, Path(name).name) if name.endswith("/") else
                file_hash(path) if (path := self.here.build / name).is_file() else "" for name in names}

    def outputs(self, since_ns: int) -> dict[str, str]:
        """Hash of each file its folders got since `since_ns` and, for 01, of each data set."""
        files = [path for path in (self.here.build / "results" / self.name).rglob("*")
                 if path.is_file() and path.stat().st_mtime_ns >= since_ns]
        if self.name in _PAPER:                              # not drawn anew where nothing changed
            files += (self.here.build / "paper" / _PAPER[self.name]).rglob("*")
        found = [path.relative_to(self.here.build).as_posix() for path in files if path.suffix in OUTPUTS]
        found = [name for name in found if name not in _REWRITTEN]
        if self.name == "01_data":
            found += [f"data/{domain}/" for domain in self.here.profile.data.domains]
        return self.wrote(dict.fromkeys(sorted(found), ""))

    def expected_s(self) -> float | None:
        """Seconds it took here last, else what the profile states, at the likely pace of this processor."""
        try:
            return json.loads(self.stamp.read_text(encoding="utf-8"))["took_s"]
        except (OSError, ValueError, KeyError):
            stated = self.here.profile.expected_s.get(self.name)
            return None if stated is None else stated * likely_pace()

    def run(self, *, apart: bool = False) -> None:
        """Execute the notebook, its output shown as it comes, or line by line with its number if `apart`.

        Raises NotebookError with the failing line.
        """
        began, began_ns, key = time.time(), time.time_ns(), self.key()
        done = self.here.build / "notebooks" / f"{self.name}.ipynb"
        partial, failed = done.with_suffix(".part.ipynb"), done.with_suffix(".failed.ipynb")
        done.parent.mkdir(parents=True, exist_ok=True)
        self.stamp.unlink(missing_ok=True)
        fault = execute(self.path, partial, self.parameters, self.here.root,
                        mark=f"[{self.name[:2]}] " if apart else "")
        if fault:
            if partial.exists():
                partial.replace(failed)
            raise NotebookError(f"notebooks/{self.name}.ipynb: {fault} (output so far: {failed})")
        partial.replace(done)
        failed.unlink(missing_ok=True)
        seal = {"key": key, "took_s": round(time.time() - began, 1), "wrote": self.outputs(began_ns)}
        with whole_file(self.stamp) as path:
            path.write_text(json.dumps(seal, indent=1) + "\n", encoding="utf-8")


def names(root: Path) -> list[str]:
    """Stems of all numbered notebooks, in order."""
    return sorted(path.stem for path in (root / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def planned(profile: str, root: Path) -> list[str]:
    """Stems of the notebooks that a profile makes: all but those whose section it lacks."""
    settings = load_profile(profile, root)
    return [name for name in names(root) if getattr(settings, SECTIONS.get(name, "main"))]


def find(text: str, root: Path) -> str:
    """Stem of the notebook that `03`, `03_main` or `notebooks/03_main.ipynb` means. Raises NotebookError."""
    wanted, known = Path(text).name.removesuffix(".ipynb"), names(root)
    found = [name for name in known if name == wanted or name.split("_")[0] == wanted]
    if not found:
        raise NotebookError(f"notebook {text!r} is not known; allowed: {', '.join(known) or 'none'}")
    return found[0]


def needs(name: str, profile: Profile) -> tuple[str, ...]:
    """Notebooks whose results `name` builds on under `profile`."""
    direct = NEEDS.get(name, ("01_data",)) if profile.data else ()
    direct += tuple(also for also in WHERE_MADE.get(name, ()) if getattr(profile, SECTIONS[also]))
    trained_here = profile.base.pretrain and "base" in reads(name)
    lacking = name not in ("01_data", "02_base") and "02_base" not in direct
    return (*direct, "02_base") if trained_here and lacking else direct


def steps(wanted: list[str], profile: str, root: Path, *, pretrain: bool | None = None) -> list[Step]:
    """The wanted notebooks and all they need, in order; `pretrain` overrides the profile for notebook 02."""
    settings, order = load_profile(profile, root), []
    if not wanted:
        raise NotebookError(f"{root / 'notebooks'}: no numbered notebooks to make")

    def add(name: str) -> None:
        for need in needs(name, settings):
            add(need)
        if name not in order:
            order.append(name)

    for name in wanted:
        add(find(name, root))
    for name in order:
        if not getattr(settings, section := SECTIONS.get(name, "main")):
            raise NotebookError(f"{name}: profile {profile!r} has no section {section!r}")
    retrain = settings.base.pretrain if pretrain is None else pretrain
    extra = {"02_base": {"pretrain": retrain}}
    return [Step(Here(root, settings, name), {"profile": profile, **extra.get(name, {})}) for name in order]


def make(todo: list[Step], *, force: bool = False, at_once: int = 1) -> None:
    """Run the steps that are out of date, `at_once` of them at a time, each after those it builds on.

    Raises NotebookError where one fails, after the others that were running have ended.
    """
    stale = [step for step in todo if force or not step.up_to_date()]
    left = Left({step.name: step.expected_s() or 0.0 for step in stale}, at_once)
    if stale:
        say(f"to make: {', '.join(step.name for step in stale)}; about {duration(left.s)} in all")
    if at_once == 1:
        for step in todo:
            _make(step, force, left)
        return
    waiting, running, ended = list(todo), {}, set()
    # Papermill changes this process's folder to the notebook's: all of them shall have one.
    with chdir(todo[0].here.root), ThreadPoolExecutor(at_once) as pool:
        while waiting or running:
            free = [step for step in waiting if not _earlier(step, todo) - ended]
            for step in free[:at_once - len(running)]:
                waiting.remove(step)
                running[pool.submit(_make, step, force, left, apart=True)] = step.name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                ended.add(running.pop(future))


@cache
def likely_pace() -> float:
    """What a notebook takes here of the seconds that profiles state, as far as the processor tells.

    They were taken without 16-bit units; where there are some, all of `cpu` took this share of them.
    """
    return 0.54 if {"avx512_bf16", "amx_bf16"} & set(processor()[1]) else 1.0


class Left:
    """How long it will take to make what is left: what that was expected to, at the pace of what is made.

    A machine twice as fast as the one that the profile's seconds are of is so from the first notebook on.
    """

    def __init__(self, expected_s: Mapping[str, float], at_once: int = 1):
        self.expected_s, self.at_once = dict(expected_s), at_once
        self.took_s = self.known_s = 0.0                     # of those made: in truth, and expected

    @property
    def s(self) -> float:
        pace = self.took_s / self.known_s if self.known_s else 1.0
        return sum(self.expected_s.values()) * pace / self.at_once

    def made(self, name: str, took_s: float) -> None:
        known = self.expected_s.pop(name, 0.0)
        self.known_s += known
        self.took_s += took_s if known else 0.0


def _make(step: Step, force: bool, left: Left, *, apart: bool = False) -> None:
    """Run one step if it is out of date. Asked at its turn: one before may have changed what it builds on."""
    if not force and step.up_to_date():
        say(f"{step.name}: up to date")
        left.expected_s.pop(step.name, None)
        return
    guess = step.expected_s()
    say(f"{step.name}: running" + (f", about {duration(guess)}" if guess else ""))
    began = time.monotonic()
    step.run(apart=apart)
    took_s = time.monotonic() - began
    left.made(step.name, took_s)
    say(f"{step.name}: done in {duration(took_s)}" + (f"; about {duration(left.s)} left" if left.s else ""))


def _earlier(step: Step, todo: list[Step]) -> set[str]:
    """Those of `todo` that come before this one."""
    named = {*needs(step.name, step.here.profile), *AFTER.get(step.name, ())}
    return named & {other.name for other in todo}


def about(path: Path) -> tuple[str, str]:
    """Title and claim of a notebook: its heading without the number, its first `Claim` or `Question`."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "markdown"
             for line in "".join(cell["source"]).replace("**", "").splitlines()]
    title = next((line[2:] for line in lines if line.startswith("# ")), path.stem)
    claim = next((line for word in ("Claim", "Question") for line in lines if line.startswith(word)), "")
    return re.sub(r"^\d+\s*\W\s*", "", title).strip(), re.sub(r"^\w+[:.]\s*", "", claim)


def _plain_python(text: str) -> str:
    """A cell's text without lines that only IPython reads."""
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in text.splitlines())


def _tree(folder: Path) -> list[list[str]]:
    return [[path.relative_to(folder).as_posix(), file_hash(path)] for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in MACHINE_BOUND]


def _inputs(here: Here) -> list[Path]:
    """Files beside code that results depend on: weights and tables in the package, tables kept, styles."""
    paths = [path for path in PACKAGE.rglob("*") if path.suffix not in (".py", ".pyc", ".md")]
    kept = here.root / "results"
    paths += [*kept.glob("*/*swe*.csv"), kept / "lr.csv",
              *(kept / name for name in ("02_base/stock.csv", "08_bits/sizes.csv", "08_bits/stated.csv")),
              *(here.root / "figures").glob("*.mplstyle")]
    return [Path(os.path.relpath(path, here.root)) for path in sorted(paths) if path.is_file()]
