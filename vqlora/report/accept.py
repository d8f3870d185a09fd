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

from vqlora.report.claims import judge_claims, load_claims, text_faults
from vqlora.report.keys import ResultsError
from vqlora.report.paper import results_dir
from vqlora.report.seal import write_seal
from vqlora.store import RunStore, whole_file

EXAMPLES_BYTES = 30_000_000  # of rows per example that the reference keeps, all notebooks together
KEPT = (".csv", ".json", ".png")


def accept(notebook: str, profile: str, root: Path | str = ".", *, up_to_date: bool = True) -> list[Path]:
    """Promote the results of `notebook` (its stem) from a profile to the reference; the files written.

    Rows per example of its runs come with them while all of those together stay within `EXAMPLES_BYTES`.

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
    """Copy finished runs and their rows per example, where there is room for all of the notebook's."""
    keys = set()
    for path in own.glob("*cost.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            keys |= {row["key"] for row in csv.DictReader(file) if row.get("key")}
    keys = sorted(keys)
    kept = RunStore(results)
    pairs = [(store.path(key), kept.path(key)) for key in keys]
    pairs += [(store.examples_path(key), kept.examples_path(key)) for key in keys]
    pairs = [(source, target) for source, target in pairs if source.is_file()]
    there = sum(path.stat().st_size for path in (results / "runs" / "examples").glob("*.parquet"))
    more = sum(source.stat().st_size for source, target in pairs if not target.is_file())
    if there + more > EXAMPLES_BYTES:
        return []
    return [_copy(source, target) for source, target in pairs]


def _copy(source: Path, target: Path) -> Path:
    with whole_file(target) as temporary:
        shutil.copyfile(source, temporary)
    return target
