"""Notebooks as steps: what reruns them and what does not, what a failing cell leaves, who waits for whom."""

import gc
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest

from vqlora import console, notebooks, steps
from vqlora.experiments import load_profile
from vqlora.identity import parse

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = sorted((ROOT / "notebooks").glob("*.ipynb"))
WRITE = (
    "import pandas, sys\nfrom vqlora.notebooks import start\nhere = start(profile, '{name}')\n"
    "here.write_results(pandas.DataFrame({{'metric': ['nll'], 'value': [{value}]}}))\n"
    "print('words on stdout'); print('words on stderr', file=sys.stderr)"
)


def notebook(root: Path, name: str, *cells: str, parameters: str = 'profile = "cpu"') -> None:
    book = nbformat.v4.new_notebook()
    book.cells = [
        nbformat.v4.new_markdown_cell(f"# Title of {name}\n\n**Claim:** it is so."),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *(nbformat.v4.new_code_cell(text) for text in cells),
    ]
    (root / "notebooks").mkdir(exist_ok=True)
    nbformat.write(book, root / "notebooks" / f"{name}.ipynb")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A small checkout: the real profiles, two notebooks of which 03 builds on 01."""
    (tmp_path / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.yaml"):
        (tmp_path / "configs" / path.name).write_bytes(path.read_bytes())
    notebook(tmp_path, "01_data", WRITE.format(name="01_data", value=1))
    notebook(tmp_path, "03_main", WRITE.format(name="03_main", value=2))
    return tmp_path


def make(root: Path, *wanted: str, profile: str = "cpu") -> None:
    steps.make(steps.steps(list(wanted), profile, root))


def fake_execute(monkeypatch) -> list[str]:
    """Stands in for Jupyter where only the decision to run is of interest; writes what the cells would."""
    made = []

    def execute(source, output, parameters, root, mark=""):
        made.append(source.stem)
        here = notebooks.start(parameters["profile"], source.stem, root)
        (here.results / "runs.csv").write_text(re.sub(r"[^=]", "", source.read_text()))
        output.write_text("{}")
        return ""

    monkeypatch.setattr(steps, "execute", execute)
    return made


def test_what_is_left_goes_at_the_pace_of_what_was_made():
    left = steps.Left({"a": 100, "b": 300, "c": 100, "new": 0})
    assert left.s == 500
    left.made("a", 50)
    assert left.s == 200, "twice as fast as expected so far"
    left.made("new", 900)  # nothing was expected of it
    assert left.s == 200
    left.made("b", 350)
    assert left.s == 100, "400 s took 400 s"
    left.made("c", 1)
    assert left.s == 0
    assert steps.Left({"a": 100, "b": 300}, at_once=2).s == 200


def test_a_notebook_runs_with_its_parameters_and_shows_what_it_prints(checkout, capfd):
    make(checkout, "03")
    shown = capfd.readouterr()
    assert "words on stdout" in shown.out and "words on stderr" in shown.err
    assert "to make: 01_data, 03_main; about" in shown.err and "03_main: done in" in shown.err
    results = checkout / "build" / "cpu" / "results" / "03_main"
    assert (results / "runs.csv").read_text() == "metric,value\nnll,2\n"
    assert json.loads((results / "manifest.json").read_text())["profile"] == "cpu"
    executed = nbformat.read(checkout / "build" / "cpu" / "notebooks" / "03_main.ipynb", 4)
    assert any("injected-parameters" in cell.metadata.get("tags", ()) for cell in executed.cells)
    began = time.monotonic()
    make(checkout, "03")
    assert time.monotonic() - began < 2 and "03_main: up to date" in capfd.readouterr().err


def test_a_failing_cell_is_one_line_and_leaves_its_output_under_another_name(checkout, capfd):
    make(checkout, "01")
    notebook(checkout, "03_main", "before = 1", "raise ValueError('the base is missing')", "after = 1")
    with pytest.raises(notebooks.NotebookError) as fault:
        make(checkout, "03")
    message = str(fault.value)
    assert (
        "notebooks/03_main.ipynb: cell 4: ValueError: the base is missing" in message and "\n" not in message
    )
    folder = checkout / "build" / "cpu" / "notebooks"
    assert sorted(path.name for path in folder.iterdir()) == ["01_data.ipynb", "03_main.failed.ipynb"]
    step = steps.steps(["03"], "cpu", checkout)[-1]
    assert not step.up_to_date()


def test_a_killed_kernel_is_one_line(checkout):
    notebook(checkout, "01_data", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(
        notebooks.NotebookError, match=r"its process was killed \(out of memory\?\)"
    ):
        make(checkout, "01")


def test_a_parameter_the_notebook_does_not_have_is_refused(checkout):
    notebook(checkout, "01_data", "pass", parameters="prfile = 1")
    with pytest.raises(notebooks.NotebookError, match="its parameters cell sets prfile, but not profile"):
        make(checkout, "01")


def test_what_makes_a_notebook_stale(checkout, monkeypatch):
    made = fake_execute(monkeypatch)

    def made_by(change) -> list[str]:
        made.clear()
        change()
        make(checkout, "03")
        return list(made)

    def profile(old: str, new: str):
        path = checkout / "configs" / "cpu.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    results = checkout / "build" / "cpu" / "results"
    assert made_by(lambda: None) == ["01_data", "03_main"]
    assert made_by(lambda: None) == []
    assert (
        made_by(
            lambda: notebook(checkout, "03_main", "# a comment\n" + WRITE.format(name="03_main", value=2))
        )
        == []
    )
    assert made_by(lambda: notebook(checkout, "03_main", WRITE.format(name="03_main", value=3))) == [
        "03_main"
    ]
    assert made_by(lambda: notebook(checkout, "01_data", "x = 1; y = 1; z = 1")) == ["01_data", "03_main"], (
        "other results"
    )
    assert made_by(lambda: notebook(checkout, "01_data", "x = 1; y = 2; z = 2")) == ["01_data"], (
        "same results as before"
    )
    assert made_by(lambda: profile("workers: 2", "workers: 1")) == []
    assert made_by(lambda: profile("steps: 60", "steps: 61")) == ["03_main"]
    assert made_by(lambda: (results / "03_main" / "runs.csv").unlink()) == ["03_main"]
    assert made_by(lambda: (results / "01_data" / "runs.csv").write_text("edited")) == ["01_data"]
    assert made_by(lambda: (checkout / "build" / "cpu" / "stamps" / "03_main.json").write_text("{")) == [
        "03_main"
    ]


def test_code_that_a_notebook_imports_makes_it_stale(checkout, monkeypatch):
    made = fake_execute(monkeypatch)
    make(checkout, "03")
    made.clear()
    monkeypatch.setattr(steps, "code_hash", lambda modules: "other" if "vqlora.notebooks" in modules else "")
    make(checkout, "03")
    assert made == ["01_data", "03_main"]


def test_the_base_is_trained_where_the_profile_or_the_user_says_so(checkout, monkeypatch):
    made = fake_execute(monkeypatch)
    notebook(checkout, "02_base", "pass", parameters='profile = "cpu"\npretrain = False')
    assert [step.name for step in steps.steps(["03"], "cpu", checkout)] == ["01_data", "03_main"]
    smoke = steps.steps(["03"], "smoke", checkout)
    assert [step.name for step in smoke] == ["01_data", "02_base", "03_main"]
    assert smoke[1].parameters == {"profile": "smoke", "pretrain": True}
    steps.make(steps.steps(["02"], "cpu", checkout, pretrain=True))
    assert made == ["01_data", "02_base"]
    make(checkout, "02")
    assert made == ["01_data", "02_base"], "trained and compared here: nothing to add"


def test_unknown_notebooks_are_named_with_those_there_are(checkout):
    assert steps.find("notebooks/03_main.ipynb", checkout) == steps.find("03", checkout) == "03_main"
    with pytest.raises(notebooks.NotebookError, match="notebook '5' is not known; allowed: 01_data, 03_main"):
        steps.find("5", checkout)
    with pytest.raises(notebooks.NotebookError, match="not inside a checkout"):
        notebooks.repository(Path("/"))


def test_deciding_imports_neither_torch_nor_jupyter(checkout):
    code = (
        "import sys\nfrom vqlora import cli\ncli.main(['list'])\n"
        "heavy = {'torch', 'transformers', 'papermill', 'pandas', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "03  Title of 03_main\n    it is so.\n    cost (cpu): about " in done.stdout


def hold(path: Path, seconds: float) -> subprocess.Popen:
    code = (
        f"import sys, time\nfrom pathlib import Path\nfrom vqlora.console import lock\n"
        f"with lock(Path({str(path)!r}), 'make paper'):\n"
        f"    print('held', flush=True)\n    time.sleep({seconds})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_waits_and_says_for_whom(tmp_path, capfd):
    process = hold(tmp_path / "lock", 2)
    with console.lock(tmp_path / "lock", "second"):
        assert process.wait(timeout=0.5) == 0, "entered while the first still held it"
    assert f"waiting: process {process.pid} (make paper, since" in capfd.readouterr().err


def test_the_lock_of_a_killed_process_is_taken_over_with_a_word(tmp_path, capfd):
    process = hold(tmp_path / "lock", 60)
    process.kill()
    process.wait()
    with console.lock(tmp_path / "lock", "second"):
        pass
    assert f"process {process.pid} (make paper, since" in (shown := capfd.readouterr().err)
    assert "ended without releasing it" in shown
    with console.lock(tmp_path / "lock", "third"):
        pass
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebooks_hold_an_argument_and_no_output(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert cells[0]["cell_type"] == "markdown" and "".join(cells[0]["source"]).startswith("# ")
    parameters = [cell for cell in code if "parameters" in cell["metadata"].get("tags", ())]
    assert len(parameters) == 1 and 'profile = "cpu"' in "".join(parameters[0]["source"])
    text = "\n".join("".join(cell["source"]) for cell in code)
    assert "assert " in text, "a notebook checks what it says"
    assert not re.search(r"^def |^class ", text, re.M), "notebooks argue, the library computes"
    assert path.stem in steps.NEEDS, "vqlora/steps.py must say what it builds on"


def test_a_profile_without_a_section_leaves_its_notebook_out_and_says_so_when_asked():
    assert "06_ranks" in steps.planned("cpu", ROOT) and "06_ranks" not in steps.planned("small", ROOT)
    with pytest.raises(notebooks.NotebookError, match="06_ranks: profile 'small' has no section 'ranks'"):
        steps.steps(["06"], "small", ROOT)


def test_every_notebook_has_a_cost_in_every_profile():
    for profile in (ROOT / "configs").glob("*.yaml"):
        assert set(steps.planned(profile.stem, ROOT)) <= set(load_profile(profile.stem, ROOT).expected_s)


def test_notebooks_made_at_once_wait_for_those_they_build_on(checkout, monkeypatch):
    for name in ("00_tour", "04_cost", "08_bits", "13_architectures", "90_figures", "91_tables"):
        notebook(checkout, name, "pass")
    turn, running, seen = threading.Lock(), set(), []

    def execute(source, output, parameters, root, mark=""):
        with turn:
            running.add(source.stem)
            seen.append((source.stem, set(running)))
        time.sleep(0.05)
        with turn:
            running.discard(source.stem)
        output.write_text("{}")
        return "cell 2: it fails" if source.stem == fails else ""

    monkeypatch.setattr(steps, "execute", execute)
    todo = steps.steps(["00", "03", "04", "08", "13", "90", "91"], "cpu", checkout)
    todo = [step for step in todo if step.path.is_file()]
    fails = None
    steps.make(todo, at_once=2)
    order = [name for name, _ in seen]
    assert sorted(order) == sorted(step.name for step in todo)
    assert max(len(others) for _, others in seen) == 2
    at = {name: order.index(name) for name in order}
    assert at["01_data"] < at["03_main"] < min(at["04_cost"], at["08_bits"])
    assert all(not others & {"01_data", "03_main"} for name, others in seen if name in ("04_cost", "08_bits"))
    assert set(order[-2:]) == {"90_figures", "91_tables"}

    fails, seen[:] = "03_main", []
    with pytest.raises(notebooks.NotebookError, match="03_main.ipynb: cell 2: it fails"):
        steps.make(todo, force=True, at_once=2)
    assert not {"04_cost", "08_bits", "91_tables"} & {name for name, _ in seen}
    assert not running, "what ran beside the failing one has ended"


def test_lines_of_two_notebooks_are_marked_and_do_not_mix(checkout, capfd):
    said = "import sys\nprint('one\\ntwo', end='')\nprint('\\r1/2\\r2/2', file=sys.stderr)"
    notebook(checkout, "13_architectures", said)
    todo = steps.steps(["01", "13"], "cpu", checkout)
    steps.make(todo, at_once=2)
    shown = capfd.readouterr()
    assert {"[01] words on stdout", "[13] one", "[13] two"} <= set(shown.out.splitlines())
    assert "[13] 2/2" in shown.err.splitlines() and "1/2" not in shown.err


def test_two_threads_can_parse_at_once():
    """With `ast.parse` itself Python 3.11 fails here: a collection in the midst of one lets the other in."""
    text, faults = (ROOT / "vqlora" / "train.py").read_text(encoding="utf-8"), []

    def read():
        try:
            for _ in range(10):
                parse(text)
        except SystemError as fault:
            faults.append(fault)

    def yields(*_):
        time.sleep(0)

    before = gc.get_threshold()
    gc.callbacks.append(yields)
    gc.set_threshold(50)
    try:
        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(yields)
    assert not faults
