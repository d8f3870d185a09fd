"""``make accept NN``: one notebook's results become the reference, with their provenance.

    accept("03_main", "full", root)         # build/full/results/03_main -> results/03_main, with its runs

Refused are results of `smoke`, results made from a tree with changes or from a commit that is not in the
history, results that are not what their notebook last wrote, and results that deny a sentence of the paper.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import pandas

from vqlora.report.claims import judge_claims, load_claims, text_faults
from vqlora.report.keys import ResultsError
from vqlora.report.paper import results_dir
from vqlora.report.seal import write_seal
from vqlora.store import RunStore, whole_file

EXAMPLES_BYTES = 48_000_000  # of rows per example that the reference keeps, all notebooks together
KEPT = (".csv", ".json", ".png")


def accept(notebook: str, profile: str, root: Path | str = ".", *, up_to_date: bool = True) -> list[Path]:
    """Promote the results of `notebook` (its stem) from a profile to the reference; the files written.

    Rows per example of its runs come with them while all of those together stay within `EXAMPLES_BYTES`; what
    gates did in each frame stays behind.

    Args:
        up_to_date: whether the notebook's last good run left exactly these files (`Step.up_to_date`).

    Raises:
        ResultsError: one line that says why they are refused.
    """
    root = Path(root)
    own = results_dir(profile, root) / notebook
    manifest = _manifest(own)
    if reason := refusal(manifest, profile, root, up_to_date=up_to_date):
        raise ResultsError(f"{own}: refused: {reason}")
    if faults := _denied(own, notebook, root):
        raise ResultsError(f"{own}: refused: {faults[0]}; change the sentence first")
    target, written = root / "results" / notebook, []
    for path in sorted(path for path in own.iterdir() if path.suffix in KEPT):
        written.append(_copy(path, target / path.name))
    written += _keep_runs(own, RunStore(results_dir(profile, root).parent), root / "results")
    shared = results_dir(profile, root) / "lr.csv"
    if notebook == "03_main" and shared.is_file():  # what its sweep found, for all that build on it
        written.append(_copy(shared, root / "results" / "lr.csv"))
    return [*written, *write_seal(root)]


def refusal(manifest: dict, profile: str, root: Path, *, up_to_date: bool) -> str:
    """Why results with this manifest cannot be the reference; "" if they can."""
    if profile == "smoke" or manifest.get("profile") == "smoke":
        return "smoke's numbers mean nothing"
    if manifest.get("profile") != profile:
        return f"its manifest says profile {manifest.get('profile')!r}, not {profile!r}"
    if manifest.get("dirty") is not False:
        return "made from a tree with changes that are not committed, or not known to be clean"
    commit = manifest.get("commit") or ""
    known = ["git", "-C", str(root), "merge-base", "--is-ancestor", commit, "HEAD"]
    if not commit or subprocess.run(known, capture_output=True, check=False).returncode:
        return f"made from commit {commit[:12] or 'unknown'}, which is not in the history of HEAD"
    if not up_to_date:
        return "not what the notebook would write now, or changed since it wrote it; make it again"
    return ""


def _manifest(own: Path) -> dict:
    path = own / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"{path}: missing; the notebook has not run to its end") from None
    except ValueError as fault:
        raise ResultsError(f"{path}: not JSON ({fault})") from None


def _denied(own: Path, notebook: str, root: Path) -> list[str]:
    """Sentences that the new results would deny, with the other notebooks' results as they are."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder, "results")
        for old in sorted(path for path in (root / "results").glob("[0-9]*") if path.name != notebook):
            shutil.copytree(old, trial / old.name)
        shutil.copytree(own, trial / notebook)
        claims = load_claims(root / "paper" / "claims.yaml")
        return text_faults(claims, judge_claims(claims, trial, strict=False), root / "paper" / "sections")


def _keep_runs(own: Path, store: RunStore, results: Path) -> list[Path]:
    """Copy finished runs and their rows per example, where there is room for all of the notebook's; runs that
    no reference result names any more make room first."""
    keys, kept = sorted(_keys(own)), RunStore(results)
    named = set(keys).union(*(_keys(folder) for folder in results.glob("[0-9]*") if folder.name != own.name))
    for path in sorted((results / "runs").glob("*.json")):
        if path.stem not in named:
            path.unlink()
            kept.examples_path(path.stem).unlink(missing_ok=True)
    there = sum(path.stat().st_size for path in (results / "runs" / "examples").glob("*.parquet"))
    with tempfile.TemporaryDirectory() as folder:
        pairs = [(store.path(key), kept.path(key)) for key in keys]
        for key in keys:
            if not kept.examples_path(key).is_file() and (source := store.examples_path(key)).is_file():
                pairs.append((_without_gates(source, Path(folder)), kept.examples_path(key)))
        pairs = [(source, target) for source, target in pairs if source.is_file()]
        more = sum(source.stat().st_size for source, target in pairs if target.suffix == ".parquet")
        if there + more > EXAMPLES_BYTES:
            return []
        return [_copy(source, target) for source, target in pairs]


def _keys(folder: Path) -> set[str]:
    """Of the runs that a notebook's results name."""
    keys = set()
    for path in folder.glob("*cost.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            keys |= {row["key"] for row in csv.DictReader(file) if row.get("key")}
    return keys


def _without_gates(source: Path, folder: Path) -> Path:
    """Rows per example without those that say what gates did in every frame, ten times as many bytes as all
    else: tables and figures of 05 have what is said of them."""
    table = pandas.read_parquet(source)
    if "task" not in table or not (table["task"] == "gate").any():
        return source
    target = folder / source.name
    table[table["task"] != "gate"].dropna(axis="columns", how="all").to_parquet(target, index=False)
    return target


def _copy(source: Path, target: Path) -> Path:
    with whole_file(target) as temporary:
        shutil.copyfile(source, temporary)
    return target
