"""The run store and the grid: identity, atomic files, failures that cost one run only."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import grid_fakes
import pandas as pd
import pytest

from vqlora import identity, store
from vqlora.config import RunSettings
from vqlora.grid.progress import Progress
from vqlora.grid.task import Task
from vqlora.runs import (
    ARM_MODULES,
    GridError,
    RunResult,
    RunStore,
    StoreError,
    expected_s,
    results_frame,
    run_grid,
    run_key,
)


def settings(seed: int = 0, **more) -> RunSettings:
    values = {
        "experiment": "e",
        "arm": "lora",
        "bits": "bf16",
        "domain": "d",
        "seed": seed,
        "learning_rate": 1e-3,
        "steps": 1,
        "train_clips": 4,
        "eval_clips": 4,
    }
    return RunSettings(**{**values, **more})


def grid(runs, root: Path, execute=grid_fakes.quick, workers: int = 2, **more):
    (root / "data").mkdir(exist_ok=True)
    return run_grid(runs, RunStore(root), workers, execute=execute, compute_dtype="fp32", **more)


def calls(root: Path) -> list[str]:
    path = root / "data" / "calls.txt"
    return sorted(path.read_text().split()) if path.exists() else []


def test_what_changes_a_runs_identity_and_what_does_not():
    key = run_key(settings(), "data", "base", "code")
    assert key == run_key(settings(experiment="other", base="elsewhere"), "data", "base", "code")
    for other in (settings(1), settings(rank=4), settings(compute_dtype="bf16"), settings(threads=2)):
        assert run_key(other, "data", "base", "code") != key
    for hashes in (("x", "base", "code"), ("data", "x", "code"), ("data", "base", "x")):
        assert run_key(settings(), *hashes) != key
    frozen = [run_key(settings(seed, arm="frozen"), "data", "base", "code") for seed in (0, 1)]
    assert frozen[0] == frozen[1] != run_key(settings(arm="frozen", frames=4), "data", "base", "code")


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "pack"
    (folder / "sub").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "sub" / "__init__.py").write_text("")
    (folder / "a.py").write_text("from pack.sub import b\ndef f():\n    from .c import g\n    return g\n")
    (folder / "sub" / "b.py").write_text("import os\nfrom .. import d\n")
    for name in "cde":
        (folder / f"{name}.py").write_text("x = 1\n")
    return folder


def test_code_hash_follows_imports_and_sees_past_comments_and_docstrings(package):
    before = identity.code_hash(["pack.a"], package)

    def after(name, text):
        path, old = package / name, (package / name).read_text()
        path.write_text(text)
        os.utime(path, ns=(time.time_ns(), time.time_ns()))
        found = identity.code_hash(["pack.a"], package)
        path.write_text(old)
        os.utime(path, ns=(time.time_ns(), time.time_ns()))
        return found

    assert after("e.py", "x = 2\n") == before, "not imported"
    assert after("c.py", '"""Says what."""\n\n# why\nx = (\n    1)\n') == before
    assert after("c.py", "x = 2\n") != before, "imported inside a function, relatively"
    assert after("d.py", "x = 2\n") != before, "imported by what is imported"
    assert after("sub/__init__.py", "y = 1\n") != before


def test_code_of_training_does_not_reach_plots_or_the_paper():
    reached, waiting = set(), ["vqlora.train"]
    while waiting:
        name = waiting.pop()
        path = identity.module_file(name)
        if path and name not in reached:
            reached.add(name)
            waiting += identity._parsed(path, path.stat().st_mtime_ns, name)[1]
    assert reached
    apart = ("vqlora.report", "vqlora.steps", "vqlora.cli", *ARM_MODULES["vqlora"])
    assert not [name for name in reached if name.startswith(apart)]


def test_data_and_weights_are_known_by_content(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "annotations.json").write_text("{}")
    (tmp_path / "d" / "a.mp4").write_bytes(b"12")
    before = identity.data_hash(tmp_path, "d")
    os.utime(tmp_path / "d" / "a.mp4", (0, 0))
    assert identity.data_hash(tmp_path, "d") == before
    (tmp_path / "d" / "a.mp4").write_bytes(b"123")
    assert identity.data_hash(tmp_path, "d") != before
    assert identity.data_hash(tmp_path, "none") == ""
    assert identity.base_hash(str(tmp_path / "d")) != identity.base_hash("some/hub-name")


def test_the_grid_makes_each_run_once_and_gives_results_in_order(tmp_path):
    wanted = [
        settings(2),
        settings(0),
        settings(0, experiment="other"),
        settings(0, arm="frozen"),
        settings(1, arm="frozen"),
    ]
    results = grid(wanted, tmp_path)
    assert [run.settings.seed for run in results] == [2, 0, 0, 0, 1]
    assert [run.metrics["nll"] for run in results[:3]] == [3.0, 1.0, 1.0]
    assert results[2].settings.experiment == "other" and results[0].settings.compute_dtype == "fp32"
    assert results[0].cost["wall_s"] > 0 and results[0].provenance["versions"]["numpy"]
    assert len(calls(tmp_path)) == 3, "the second label and the second frozen seed are the same runs"
    grid(wanted, tmp_path)
    assert len(calls(tmp_path)) == 3
    grid(wanted[:1], tmp_path, code="changed")
    assert len(calls(tmp_path)) == 4


def test_failed_and_killed_runs_cost_only_themselves(tmp_path, capfd):
    with pytest.raises(GridError) as fault:
        grid([settings(seed) for seed in range(5)], tmp_path, grid_fakes.faulty)
    message = str(fault.value)
    assert "2 of 5 runs failed" in message and "\n" not in message
    assert "seed1 (ValueError: the loss is not a number)" in message
    assert "seed2 (its process was killed by SIGKILL" in message
    assert calls(tmp_path) == [f"e/d/lora-bf16/seed{seed}" for seed in (0, 3, 4)], (
        "3 was killed once, tried again"
    )
    shown = capfd.readouterr().err
    assert "seed3: its process was killed by SIGKILL (out of memory?); it is tried once more" in shown
    logs = list((tmp_path / "work").glob("*/log.txt"))
    assert len(logs) == 2 and any("Traceback" in log.read_text() for log in logs), (
        "kept for the failed runs only"
    )


def test_progress_names_the_runs_under_way_and_the_time_left(tmp_path, capfd):
    grid([settings(seed) for seed in (0, 4, 5)], tmp_path, grid_fakes.faulty)
    shown = capfd.readouterr().err
    assert "3/3" in shown and "left; now d/lora-bf16/seed" in shown


def test_workers_end_with_a_killed_parent_and_the_run_can_go_on(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}]
        import grid_fakes, test_runs, pathlib
        if __name__ == "__main__":
            test_runs.grid([test_runs.settings()], pathlib.Path({str(tmp_path)!r}), grid_fakes.chatty)
    """)
    )
    parent = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    found = wait_for(lambda: [path for path in (tmp_path / "work").glob("*/pid") if path.read_text()], 120)
    pid = int(found[0].read_text())
    parent.send_signal(signal.SIGKILL)
    output = parent.communicate()[0]
    wait_for(lambda: not alive(pid), 30)
    assert output == b"" and "hello from the run" in (found[0].parent / "log.txt").read_text()
    assert grid([settings()], tmp_path, grid_fakes.quick, code=identity.code_hash(["grid_fakes"]))


def wait_for(condition, seconds: float):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_results_are_whole_or_absent(tmp_path, capsys):
    runs = RunStore(tmp_path)
    examples = pd.DataFrame({"clip": ["a", "b"], "nll": [1.0, 2.0]})
    (runs.work("k") / "checkpoint").write_text("")
    (runs.work("k") / "tensorboard").mkdir()
    (runs.work("k") / "tensorboard" / "events").write_text("log")
    runs.put("k", settings(), RunResult({"nll": float("nan"), "n": 2.0}, {"peak_bytes": 3.0}, examples))
    back = runs.get("k")
    assert (
        back.settings == settings()
        and back.metrics["n"] == 2.0
        and back.metrics["nll"] != back.metrics["nll"]
    )
    pd.testing.assert_frame_equal(back.examples(), examples)
    assert not (tmp_path / "work" / "k").exists()
    assert (tmp_path / "tensorboard" / "e-d-lora-bf16-seed0" / "events").read_text() == "log"
    assert not list(tmp_path.rglob("*.part"))
    json.loads(runs.path("k").read_text(), parse_constant=lambda _: pytest.fail("NaN is not JSON"))
    runs.path("k").write_text('{"key": "k"')
    assert runs.get("k") is None and "not a finished run" in capsys.readouterr().err
    assert runs.get("never") is None and capsys.readouterr().err == ""


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    with pytest.raises(StoreError, match=r"x\.csv: cannot be written \(No space left on device\)"):
        with store.whole_file(tmp_path / "x.csv"):
            raise OSError(28, os.strerror(28))
    assert not list(tmp_path.iterdir())


def test_results_files_are_the_same_bytes_for_the_same_numbers(tmp_path):
    results = grid([settings(seed, arm=arm) for arm in ("lora", "full") for seed in (10, 2)], tmp_path)
    for name, order in (("a", results), ("b", results[::-1])):
        store.write_results(tmp_path / name, results_frame(order), store.cost_frame(order), {"made_at": name})
    assert (tmp_path / "a" / "runs.csv").read_bytes() == (tmp_path / "b" / "runs.csv").read_bytes()
    table = pd.read_csv(tmp_path / "a" / "runs.csv")
    assert list(table.seed) == [2, 10, 2, 10] and list(table.arm) == ["full", "full", "lora", "lora"]
    assert "key" not in table and set(pd.read_csv(tmp_path / "a" / "cost.csv").key) == {
        run.key for run in results
    }


def test_settings_that_vary_get_a_column():
    runs = [
        store.StoredRun("k", settings(modalities=m), {"nll": 1.0}, {}, {}, Path("x"))
        for m in (("vision",), ("vision", "text"))
    ]
    assert list(results_frame(runs).modalities) == ["vision", "vision+text"]
    assert "modalities" not in results_frame(runs[:1])


def test_provenance_says_what_made_a_result(tmp_path):
    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            check=True,
            capture_output=True,
        )

    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "figures").mkdir()
    git("add", "-A")
    git("commit", "-qm", "x")
    (tmp_path / "figures" / "new.pdf").write_text("made by make")
    made = identity.provenance(tmp_path, extra=1)
    assert len(made["commit"]) == 40 and made["dirty"] is False and made["extra"] == 1
    (tmp_path / "code.py").write_text("2")
    assert identity.provenance(tmp_path)["dirty"] is True
    assert identity.provenance(Path("/"))["commit"] is None


def test_the_probed_compute_dtype_becomes_part_of_a_runs_identity():
    from vqlora.runs import _resolved

    assert _resolved([settings()], None)[0].compute_dtype in ("fp32", "bf16")
    assert _resolved([settings(compute_dtype="fp32")], "bf16")[0].compute_dtype == "fp32"


def test_longer_runs_are_expected_to_take_longer():
    assert (
        expected_s(settings(arm="frozen", steps=60))
        < expected_s(settings(steps=60))
        < expected_s(settings(steps=90))
    )


def test_the_estimate_follows_what_runs_turn_out_to_take():
    def left(elapsed: float, done=()) -> str:
        tasks = [Task("k", settings(), "", 30.0) for _ in range(4)]
        tasks[0].started = tasks[1].started = time.monotonic() - elapsed
        progress = Progress(4, 0, 2)
        progress.done = list(done)
        return re.match(r"about (.*) left", progress.left(tasks[2:], tasks[:2]))[1]

    assert left(0) == "60 s"
    assert left(20) == "40 s"
    assert left(120) == "2 min", "overdue runs count before they are finished"
    assert left(0, done=[(30.0, 90.0)] * 20) == "3 min"
