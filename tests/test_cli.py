"""The `vqlora` command: exit codes, one-line errors, and what a file of settings turns into."""

import json
from pathlib import Path

import pytest
from test_notebooks import ROOT, notebook

from vqlora import cli, runs, steps
from vqlora.console import duration
from vqlora.experiments import load_profile
from vqlora.report import command
from vqlora.store import RunResult


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "smoke.yaml").write_bytes((ROOT / "configs" / "smoke.yaml").read_bytes())
    notebook(tmp_path, "01_data", "pass")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(capsys, *arguments: str) -> str:
    assert cli.main(list(arguments)) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1, shown
    return shown.err


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (("notebook", "7", "--profile", "smoke"), "vqlora: notebook '7' is not known; allowed: 01_data"),
        (
            ("notebook", "01", "--profile", "smok"),
            "profile 'smok' is not known (did you mean 'smoke'?); allowed: smoke",
        ),
        (("run", "gone.yaml", "--profile", "smoke"), "gone.yaml: no such file"),
        (("pdf", "--profile", "smok"), "profile 'smok' is not known"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_1(checkout, capsys, arguments, wanted):
    assert wanted in fails(capsys, *arguments)


def test_outside_a_checkout_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "not inside a checkout" in fails(capsys, "list")


def test_faults_of_ours_keep_their_traceback(checkout, monkeypatch):
    monkeypatch.setattr("vqlora.steps.names", lambda root: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["list", "--profile", "smoke"])


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0 and "vqlora notebook 03 --profile cpu" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["nonsense"])
    assert stop.value.code == 2


@pytest.mark.parametrize("flags, pace", [(["avx2"], 1), (["avx2", "avx512_bf16"], 0.54)])
def test_list_gives_title_claim_and_cost(checkout, capsys, monkeypatch, flags, pace):
    monkeypatch.setattr(steps, "processor", lambda: ("a processor", flags))
    steps.likely_pace.cache_clear()
    assert cli.main(["list", "--profile", "smoke"]) == 0
    steps.likely_pace.cache_clear()
    about = duration(pace * load_profile("smoke", checkout).expected_s["01_data"])
    shown = capsys.readouterr().out
    assert shown == f"01  Title of 01_data\n    it is so.\n    cost (smoke): about {about}\n"


def test_one_run_from_a_settings_file(checkout, capsys, monkeypatch):
    values = {
        "experiment": "mine",
        "arm": "lora",
        "bits": "bf16",
        "domain": "language",
        "seed": 0,
        "steps": 1,
        "learning_rate": 1e-3,
        "train_clips": 4,
        "eval_clips": 4,
        "compute_dtype": "fp32",
    }
    Path("mine.json").write_text(json.dumps(values))
    assert "domain: 'language' is not in" in fails(capsys, "run", "mine.json", "--profile", "smoke")
    (checkout / "build" / "smoke" / "data" / "language").mkdir(parents=True)

    def grid(wanted, store, workers, data_root):
        store.put("k", wanted[0], RunResult({"nll": 2.0}, {"wall_s": 1.0}))
        return [store.get("k")]

    monkeypatch.setattr(runs, "run_grid", grid)
    assert cli.main(["run", "mine.json", "--profile", "smoke"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["metrics"] == {"nll": 2.0} and Path(shown["stored"]).is_file()


def test_publish_copies_what_differs_and_nothing_else(tmp_path):
    paper, root = tmp_path / "build" / "cpu" / "paper", tmp_path
    for name in ("figures/a.pdf", "generated/keys.tex", "generated/tables/main.tex", "main.pdf"):
        (paper / name).parent.mkdir(parents=True, exist_ok=True)
        (paper / name).write_text(name)
    (root / "figures").mkdir()
    same = root / "figures" / "a.pdf"
    same.write_text("figures/a.pdf")
    before = same.stat().st_mtime_ns
    command.publish(paper, root)
    assert (root / "paper" / "generated" / "tables" / "main.tex").read_text() == "generated/tables/main.tex"
    assert same.stat().st_mtime_ns == before and not (root / "main.pdf").exists()
