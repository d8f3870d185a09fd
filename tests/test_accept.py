"""Only sound results become the reference, with their runs and provenance."""

import hashlib
import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from invented_checkout import regenerated, replace, sealed_checkout

from vqlora.report.accept import accept
from vqlora.report.keys import ResultsError
from vqlora.report.seal import SUMS, seal_faults


@pytest.fixture
def made(tmp_path) -> Path:
    """A checkout as a git repository, with results of notebook 03 made by `full` from its commit."""
    checkout = sealed_checkout(tmp_path / "checkout")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(checkout)]
    for command in (["init", "-q"], ["add", "paper"], ["commit", "-qm", "text"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    commit = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    folder = regenerated(checkout, profile="full") / "03_main"
    note = {"profile": "full", "dirty": False, "commit": commit, "versions": {}}
    (folder / "manifest.json").write_text(json.dumps(note))
    replace(folder / "summary.csv", "language,qlora,nll,0.7475", "language,qlora,nll,0.7333")
    (folder / "cost.csv").write_text("key,train_cpu_s\nabc,1.5\n")
    run = checkout / "build" / "full" / "runs"
    (run / "examples").mkdir(parents=True)
    (run / "abc.json").write_text("{}")
    rows = {"task": ["caption", "gate"], "nll": [1.0, None], "frame": [None, 3], "gate.q_proj": [None, 0.5]}
    pd.DataFrame(rows).to_parquet(run / "examples" / "abc.parquet")
    return checkout


def test_accept_promotes_results_with_provenance_and_runs(made):
    accept("03_main", "full", made)
    kept = made / "results"
    assert "0.7333" in (kept / "03_main" / "summary.csv").read_text()
    assert json.loads((kept / "03_main" / "manifest.json").read_text())["profile"] == "full"
    rows = pd.read_parquet(kept / "runs" / "examples" / "abc.parquet")
    assert (kept / "runs" / "abc.json").is_file()
    assert rows.to_dict("list") == {"task": ["caption"], "nll": [1.0]}
    assert seal_faults(made) == []
    line = hashlib.sha256((kept / "03_main" / "summary.csv").read_bytes()).hexdigest()
    assert f"{line}  results/03_main/summary.csv" in (made / SUMS).read_text()


def test_accept_forgets_runs_that_no_result_names_any_more(made):
    runs = made / "results" / "runs"
    (runs / "examples").mkdir(parents=True, exist_ok=True)
    for key in ("old", "theirs"):
        (runs / f"{key}.json").write_text("{}")
        pd.DataFrame({"nll": [1.0]}).to_parquet(runs / "examples" / f"{key}.parquet")
    (made / "results" / "03_main" / "cost.csv").write_text("key,train_cpu_s\nold,1.5\n")
    (made / "results" / "08_bits" / "cost.csv").write_text("key,train_cpu_s\ntheirs,1.5\n")
    accept("03_main", "full", made)
    assert sorted(path.stem for path in runs.glob("*.json")) == ["abc", "theirs"]
    assert sorted(path.stem for path in (runs / "examples").iterdir()) == ["abc", "theirs"]


@pytest.mark.parametrize(
    ("note", "words"),
    [
        ({"dirty": True}, "made from a tree with changes"),
        ({"dirty": None}, "made from a tree with changes"),
        ({"profile": "smoke"}, "smoke's numbers mean nothing"),
        ({"profile": "cpu"}, "its manifest says profile 'cpu', not 'full'"),
        ({"commit": "0" * 40}, "commit 000000000000, which is not in the history"),
    ],
)
def test_accept_refuses_what_cannot_be_the_reference(made, note, words):
    manifest = made / "build" / "full" / "results" / "03_main" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **note}))
    before = (made / "results" / "03_main" / "summary.csv").read_bytes()
    with pytest.raises(ResultsError, match=words):
        accept("03_main", "full", made)
    assert (made / "results" / "03_main" / "summary.csv").read_bytes() == before


def test_accept_refuses_what_is_stale_and_what_a_sentence_denies(made):
    with pytest.raises(ResultsError, match="changed since it wrote it"):
        accept("03_main", "full", made, up_to_date=False)
    section = made / "paper" / "sections" / "results.tex"
    section.write_text(section.read_text() + "\\vqstates{total-less}It saves three fifths.\n")
    with pytest.raises(ResultsError, match="states as a fact that 60 to 65 per cent less memory.*is denied"):
        accept("03_main", "full", made)
    (made / "build" / "full" / "results" / "03_main" / "manifest.json").unlink()
    with pytest.raises(ResultsError, match="has not run to its end"):
        accept("03_main", "full", made)
