"""Verification: a changed cell, figure or sentence is caught."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from invented_checkout import regenerated, replace, sealed_checkout

from vqlora import cli, notebooks
from vqlora.config import ConfigError
from vqlora.report.keys import ResultsError
from vqlora.report.recompute import CHECKS
from vqlora.report.seal import SUMS, seal_faults
from vqlora.report.tolerances import compare_file, compare_folders, load_tolerances
from vqlora.report.verify import recomputed, verify
from vqlora.report.verify import regenerated as compared

ROOT = Path(__file__).resolve().parents[1]
TOLERANCES = ROOT / "results" / "tolerances.toml"


@pytest.fixture
def checkout(tmp_path) -> Path:
    return sealed_checkout(tmp_path / "checkout")


def test_what_is_committed_is_what_was_sealed():
    assert seal_faults(ROOT) == []


def test_one_changed_cell_is_caught_in_the_file_and_in_the_sentence(checkout):
    assert seal_faults(checkout) == []
    replace(
        checkout / "results" / "03_main" / "summary.csv",
        "language,qlora,nll,0.7475",
        "language,qlora,nll,0.7175",
    )
    faults = seal_faults(checkout)
    assert faults[0] == "results/03_main/summary.csv: is not the file that was sealed"
    assert any(r"\vq{main.language.qlora.nll} = 0.718" in fault and "sealed" in fault for fault in faults)
    done = subprocess.run(["sha256sum", "-c", "--quiet", SUMS], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 1 and "results/03_main/summary.csv: FAILED" in done.stdout


def test_a_changed_figure_is_caught_unless_this_checkout_drew_it(checkout):
    figure = checkout / "figures" / "planner.pdf"
    figure.write_bytes(b"%PDF another")
    assert seal_faults(checkout) == ["figures/planner.pdf: is not the file that was sealed"]
    drawn = checkout / "build" / "cpu" / "paper" / "figures" / "planner.pdf"
    drawn.parent.mkdir(parents=True)
    shutil.copy(figure, drawn)
    assert seal_faults(checkout) == []
    figure.unlink()
    assert seal_faults(checkout) == ["figures/planner.pdf: is not there any more"]


def test_another_key_in_a_sentence_is_caught(checkout):
    section = checkout / "paper" / "sections" / "results.tex"
    replace(section, r"\vq{main.language.frozen.nll}", r"\vq{main.visual.frozen.nll}")
    (fault,) = seal_faults(checkout)
    assert fault.startswith("paper/sections/results.tex: number ")
    assert r"is \vq{main.visual.frozen.nll} = 4.600; sealed: \vq{main.language.frozen.nll} = 4.200" in fault


def test_changed_claims_tolerances_and_new_files_are_caught(checkout):
    replace(checkout / "paper" / "claims.yaml", "at_least: 0.60", "at_least: 0.20")
    replace(checkout / "results" / "tolerances.toml", "spread = 0.08", "spread = 8")
    (checkout / "results" / "99_new").mkdir()
    (checkout / "results" / "99_new" / "summary.csv").write_text("metric,value\nnll,1\n")
    assert [fault.split(":")[0] for fault in seal_faults(checkout)] == [
        "paper/claims.yaml", "results/99_new/summary.csv", "results/tolerances.toml"]  # fmt: skip


def faults_of(made: Path, checkout: Path) -> list[str]:
    tolerances = load_tolerances(checkout / "results" / "tolerances.toml")
    return [
        fault for file in compare_folders(made, checkout / "results", tolerances) for fault in file.faults
    ]


def test_a_loss_may_differ_in_its_last_digits_and_more_on_another_processor(checkout):
    made = regenerated(checkout)
    assert faults_of(made, checkout) == []
    summary = made / "03_main" / "summary.csv"
    replace(summary, "language,qlora,nll,0.7475", "language,qlora,nll,0.74751")
    assert faults_of(made, checkout) == []
    replace(summary, "language,qlora,nll,0.74751", "language,qlora,nll,0.76")
    (fault,) = faults_of(made, checkout)
    assert "language qlora nll: 0.76; reference 0.7475 (numeric" in fault
    replace(made / "03_main" / "manifest.json", "avx2", "avx512f")
    assert faults_of(made, checkout) == []
    replace(summary, "language,qlora,nll,0.76", "language,qlora,nll,1.5")
    assert "(statistical" in faults_of(made, checkout)[0]


def test_peaks_are_not_compared_between_processors_that_compute_in_other_dtypes(checkout):
    made = regenerated(checkout)
    summary = pd.read_csv(made / "03_main" / "summary.csv")
    summary.loc[summary["metric"] == "train_bytes", ["value", "low", "high"]] *= 0.6
    summary.to_csv(made / "03_main" / "summary.csv", index=False)
    assert any("train_bytes" in fault for fault in faults_of(made, checkout))
    replace(made / "03_main" / "manifest.json", "avx2", "avx512_bf16")
    assert faults_of(made, checkout) == []


def test_a_share_of_nothing_is_empty_on_one_processor_and_a_number_on_another(checkout):
    made = regenerated(checkout)
    for folder, order in ((made, ""), (checkout / "results", "1.0")):
        runs = pd.read_csv(folder / "03_main" / "runs.csv", dtype=str, keep_default_na=False)
        runs.assign(order_frac=order).to_csv(folder / "03_main" / "runs.csv", index=False)
    assert any("order_frac: empty; reference 1.0" in fault for fault in faults_of(made, checkout))
    replace(made / "03_main" / "manifest.json", "avx2", "avx512_bf16")
    assert faults_of(made, checkout) == []
    runs = pd.read_csv(made / "03_main" / "runs.csv", dtype=str, keep_default_na=False)
    runs.assign(slot_frac="").to_csv(made / "03_main" / "runs.csv", index=False)
    assert any("slot_frac: empty" in fault for fault in faults_of(made, checkout)), "always there"


def test_counts_are_exact_and_rows_may_not_vanish(checkout):
    made = regenerated(checkout)
    replace(made / "03_main" / "settings.csv", "steps,60", "steps,61")
    summary = pd.read_csv(made / "03_main" / "summary.csv")
    summary.iloc[1:].to_csv(made / "03_main" / "summary.csv", index=False)
    faults = faults_of(made, checkout)
    assert any("steps, value" in fault or "steps: 61; reference 60 (exact)" in fault for fault in faults)
    assert any(fault.startswith("row language frozen nll is missing") for fault in faults)


def test_another_profile_is_compared_where_that_makes_sense(checkout):
    made = regenerated(checkout, profile="full")
    replace(made / "03_main" / "settings.csv", "steps,60", "steps,90")
    assert faults_of(made, checkout) == [], "other settings are what another profile is"
    summary = pd.read_csv(made / "03_main" / "summary.csv")
    summary.assign(low=summary["low"] - 0.3).to_csv(made / "03_main" / "summary.csv", index=False)
    assert faults_of(made, checkout) == [], "as are intervals over fewer seeds"
    replace(made / "03_main" / "summary.csv", "language,qlora,nll,0.7475", "language,qlora,nll,2.5")
    assert len(faults_of(made, checkout)) == 1


@pytest.mark.parametrize(
    ("own", "reference", "faults"),
    [
        ("qa_frac,nll\n,1.0\n", "nll,qa_frac\n1.0,0.5\n", 0),  # nothing to count, another order
        ("nll,qa_how_frac\n1.0,0.4\n", "nll,qa_frac\n1.0,0.5\n", 0),  # other kinds of question
        ("train_bytes\n101000\n", "train_bytes\n100000\n", 0),  # longer captions of another seed
        ("train_bytes\n160000\n", "train_bytes\n100000\n", 0),  # another dtype
        ("weight_bytes\n120000\n", "weight_bytes\n100000\n", 1),
        ("nll,qa_frac\n1.0,0.9\n", "nll,qa_frac\n1.0,0.5\n", 1),
    ],
)
def test_what_another_profile_may_differ_in(tmp_path, own, reference, faults):
    for name, text in (("own.csv", own), ("reference.csv", reference)):
        (tmp_path / name).write_text(text)
    paths, rules = (tmp_path / "own.csv", tmp_path / "reference.csv"), load_tolerances(TOLERANCES)
    assert len(compare_file("05_temporal/x.csv", *paths, rules, same=False, alike=False).faults) == faults
    assert compare_file("05_temporal/x.csv", *paths, rules, same=True, alike=True).faults, "in one profile"


def test_a_profile_with_fewer_arms_or_domains_is_compared_row_by_row(tmp_path):
    """Rows are told apart by what they are about, not by where they stand: half of a file is no fault."""
    rules, half = load_tolerances(TOLERANCES), tmp_path / "half.csv"
    for path in sorted((ROOT / "results").glob("[0-9]*/*.csv")):
        pd.read_csv(path, dtype=str, keep_default_na=False).iloc[1::2].to_csv(half, index=False)
        name = f"{path.parent.name}/{path.name}"
        assert compare_file(name, half, path, rules, same=False, alike=False).faults == []


def test_files_that_only_some_profiles_write_may_be_missing(checkout):
    made = regenerated(checkout)
    (made / "03_main" / "more.csv").unlink()
    assert faults_of(made, checkout) == []
    (made / "03_main" / "tests.csv").unlink()
    assert faults_of(made, checkout) == ["not written"]


def test_a_profile_as_a_whole_is_held_against_its_own_kind_alone(checkout):
    (checkout / "results" / "07_frames" / "fuzz.csv").unlink()  # invented, without what names its rows
    made = regenerated(checkout, notebook="07_frames")
    path = made / "07_frames" / "summary.csv"
    lines = path.read_text().splitlines()
    row = next(n for n, line in enumerate(lines) if line.startswith("overall,") and ",cells," in line)
    lines[row] = lines[row].rpartition(",")[0] + ",7"
    path.write_text("\n".join(lines) + "\n")
    assert len(faults_of(made, checkout)) == 1, "the same profile counts the same cells"

    def settings(folder: Path, value: str):
        manifest = folder / "07_frames" / "manifest.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "settings": value}))

    settings(made, "now"), settings(checkout / "results", "now")
    assert len(faults_of(made, checkout)) == 1
    settings(checkout / "results", "before")
    assert faults_of(made, checkout) == [], "a profile of that name, but with other settings since"
    (checkout / "results" / "07_frames" / "runs.csv").write_text("domain,eval_clips\nvisual,160\n")
    (made / "07_frames" / "runs.csv").write_text("domain,eval_clips\nvisual,96\n")
    assert faults_of(made, checkout) == [], "fewer clips are another profile's"
    settings(checkout / "results", "now")
    assert [fault for fault in faults_of(made, checkout) if "eval_clips: 96; reference 160" in fault]


def test_tolerances_are_read_strictly_and_leave_no_cell_without_a_rule(tmp_path):
    path = tmp_path / "tolerances.toml"
    path.write_text('[[rule]]\nfiles = ["*"]\nkind = "near"\nwhy = "for this test"\n')
    with pytest.raises(ConfigError, match=r"rule\[0\]\.kind: 'near' is not one of exact, numeric"):
        load_tolerances(path)
    path.write_text('[[rule]]\nfiles = ["03_main/*"]\nkind = "exact"\nwhy = "for this test"\n')
    with pytest.raises(ConfigError, match="none fits 01_data/runs.csv, clips"):
        load_tolerances(path).of("01_data/runs.csv", "clips")
    committed = load_tolerances(TOLERANCES)
    assert committed.of("03_main/summary.csv", "nll").spread == 0.08
    assert committed.of("01_data/domains.csv", "clips").kind == "exact"
    assert [name for name in committed.rows if not (ROOT / "results" / name).is_file()] == []


@pytest.mark.parametrize("check", [c for c in CHECKS if not c.slow], ids=lambda c: f"{c.file}-{c.source[:9]}")
def test_committed_numbers_follow_from_finer_ones(check):
    assert check.ready(ROOT / "results") and check.faults(ROOT / "results") == []


def test_a_number_that_does_not_follow_is_named(tmp_path):
    results = tmp_path / "results"
    for folder in ("03_main", "07_frames"):
        shutil.copytree(ROOT / "results" / folder, results / folder)
    replace(results / "03_main" / "tests.csv", "undecided", "supported")
    gap = results / "07_frames" / "gap.csv"
    first = pd.read_csv(gap, dtype=str)
    first.loc[0, "gain"] = "0.5"
    first.to_csv(gap, index=False)
    named = {(check.file, check.source): check for check in CHECKS}
    corrected = named["03_main/tests.csv", "p-values and intervals"]
    closed = named["07_frames/gap.csv", "policies.csv"]
    assert corrected.faults(results) == [
        "03_main/tests.csv, line 4, verdict: supported; p-values and intervals give undecided"]  # fmt: skip
    assert "07_frames/gap.csv, line 2, gain: 0.5" in closed.faults(results)[0]


def test_the_command_prints_claims_and_fails_where_a_check_does(checkout, monkeypatch, capsys):
    monkeypatch.setattr(notebooks, "repository", lambda *_: checkout)
    assert cli.main(["verify", "--profile", "reference", "--quick"]) == 1, (
        "invented p-values do not correct so"
    )
    shown = capsys.readouterr().out
    assert "03_main/tests.csv" in shown and "failed" in shown and "Verification failed" in shown
    assert "QLoRA equals LoRA" in " ".join(shown.split()) and "denied" in shown
    assert cli.main(["verify", "--profile", "smoke"]) == 1
    assert "its numbers mean nothing" in capsys.readouterr().err
    outcome = verify("reference", checkout, quick=True)
    assert not outcome.ok and outcome.stamp().startswith("Verification failed: ")


def test_executed_notebooks_become_web_pages(tmp_path):
    from vqlora.report.html import export

    with pytest.raises(ResultsError, match="no executed notebook; run `make paper` first"):
        export(tmp_path)
    cells = [{"cell_type": "markdown", "metadata": {}, "source": "# It is so", "id": "a"}]
    book = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "notebooks").mkdir()
    for name in ("03_main.ipynb", "07_frames.failed.ipynb"):
        (tmp_path / "notebooks" / name).write_text(json.dumps(book))
    (page,) = export(tmp_path)
    assert page == tmp_path / "html" / "03_main.html" and "It is so" in page.read_text()


def test_what_was_recomputed_is_kept_until_results_change(tmp_path, monkeypatch):
    asked = []

    def faults(results):
        asked.append(results)
        return [f"{results / 'one.csv'}: wrong"] if "0" in (results / "one.csv").read_text() else []

    (tmp_path / "results" / "01_data").mkdir(parents=True)
    file = tmp_path / "results" / "01_data" / "one.csv"
    file.write_text("1")
    check = SimpleNamespace(file="one.csv", source="two.csv", slow=False, ready=lambda results: True,
                            faults=lambda results: faults(results / "01_data"))  # fmt: skip
    monkeypatch.setattr("vqlora.report.verify.CHECKS", [check])
    kept = tmp_path / "build" / "checked" / "recomputed.json"
    (tmp_path / "figures").mkdir()
    for text, status, times in (("1", "ok", 1), ("1", "ok", 1), ("0", "failed", 2), ("0", "failed", 2)):
        file.write_text(text)
        (tmp_path / "figures" / "a.png").write_bytes(bytes(len(asked)))  # another picture is no other result
        (line,) = recomputed(tmp_path / "results", kept=kept)
        assert line.status == status and len(asked) == times
    kept.write_text("{")
    assert recomputed(tmp_path / "results", kept=kept)[0].status == "failed" and len(asked) == 3


def test_comparisons_are_kept_until_either_side_changes(checkout, monkeypatch):
    found, reference, asked = regenerated(checkout), checkout / "results", []

    def compare(*folders):
        asked.append(folders)
        return compare_folders(*folders)

    monkeypatch.setattr("vqlora.report.verify.compare_folders", compare)
    kept = checkout / "build" / "checked" / "cpu.json"
    lines = compared(found, reference, kept=kept)
    assert compared(found, reference, kept=kept) == lines == compared(found, reference)
    assert len(asked) == 2  # once for the keeping, once without
    for folder, times in ((found, 3), (reference, 4)):
        replace(folder / "03_main" / "summary.csv", "language,qlora,nll,0.7475", "language,qlora,nll,9.7475")
        again = compared(found, reference, kept=kept)
        assert len(asked) == times and (again == lines) == (folder == reference)
