"""Set-up: one lock, nothing drifts from it, and each missing thing is named."""

import importlib.metadata
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [
    *PROJECT["dependencies"],
    *PROJECT["optional-dependencies"]["paper"],
    *PROJECT["optional-dependencies"]["test"],
]


def tool(name: str) -> str:
    """Path of a program of this machine."""
    return subprocess.check_output(["bash", "-c", f"type -P {name}"], text=True).strip()


def lock() -> dict[str, Requirement]:
    lines = [line.strip() for line in (ROOT / "requirements.lock").read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def test_the_lock_pins_exactly_and_names_no_index_hash_or_build():
    text = (ROOT / "requirements.lock").read_text()
    for pin in lock().values():
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert not re.search(r"--|https?:|file:|@|\+", code)
    assert str(lock()["torch"].specifier) == "==2.13.0"


def test_every_requirement_of_the_project_is_in_the_lock_at_an_allowed_version():
    pins = lock()
    for text in DIRECT:
        wanted = Requirement(text)
        pin = pins[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(str(pin.specifier).removeprefix("==")), f"{text} but {pin}"
        assert (pin.marker is None) == (wanted.marker is None), text


def test_the_lock_is_whole_and_holds_nothing_else():
    """Walks what the installed packages require, from the project's own list."""
    pins, waiting, seen = lock(), [Requirement(text) for text in DIRECT], set()
    while waiting:
        wanted = waiting.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for text in importlib.metadata.requires(name) or ():
            part = Requirement(text)
            if part.marker is None or any(part.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                waiting.append(part)
    reached = {name for name, _ in seen}
    # The CUDA build of torch brings packages that only it needs; the lock leaves them to that build.
    cuda = {name for name in reached if name.startswith(("nvidia-", "cuda-", "triton"))}
    assert reached - cuda - set(pins) == set()
    assert set(pins) - reached == set()


def test_environment_yml_says_the_same_as_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert "python=3.11" in environment["dependencies"]
    listed = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    assert listed[0] == "-c requirements.lock" and listed[-1] == "-e ."
    assert [str(Requirement(text)) for text in listed[1:-1]] == [str(Requirement(text)) for text in DIRECT]


def test_the_library_alone_is_light():
    names = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert names == {
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "av",
        "numpy",
        "pydantic",
        "pyyaml",
        "tqdm",
        "filelock",
    }


@pytest.fixture
def machine(tmp_path) -> dict[str, str]:
    """A checkout's set-up files and a PATH on which only a few tools are found; `id` is no root."""
    (tmp_path / "scripts").mkdir()
    for name in ("requirements.lock", "pyproject.toml", "scripts/setup.sh"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "cat", "cksum", "dirname", "flock", "grep", "mkdir"):
        os.symlink(tool(name), tools / name)
    program(tools / "id", "echo 1000")
    return {"PATH": str(tools), "HOME": str(tmp_path)}


def program(path: Path, script: str) -> None:
    path.write_text(f"#!{tool('bash')}\n{script}\n")
    path.chmod(0o755)


def setup(machine: dict[str, str], **more: str) -> subprocess.CompletedProcess:
    root = Path(machine["HOME"])
    return subprocess.run(
        [f"{root}/tools/bash", "scripts/setup.sh"],
        cwd=root,
        env={**machine, **more},
        capture_output=True,
        text=True,
    )


def fake_python(machine: dict[str, str]) -> Path:
    """A `python3.11` that notes its calls; `-m venv` makes a .venv with the same program in it."""
    root = Path(machine["HOME"])
    program(
        root / "tools" / "python3.11",
        f'echo "$@" >>{root}/calls\n'
        f'case "$*" in *"-m venv"*) mkdir -p .venv/bin; cat {root}/tools/python3.11 >.venv/bin/python\n'
        f"  {tool('chmod')} +x .venv/bin/python;;\n"
        f'*"pip install"*) [ -z "$PIP_FAILS" ];; esac',
    )
    return root / "calls"


def latex(machine: dict[str, str]) -> None:
    for name in ("latexmk", "pdflatex", "kpsewhich"):
        program(Path(machine["HOME"]) / "tools" / name, "true")


def test_missing_python_is_one_clear_line(machine):
    done = setup(machine)
    assert done.returncode == 1
    assert "setup: python3.11 is not on the PATH. Install Python 3.11" in done.stderr


def test_python_without_venv_is_one_clear_line(machine):
    program(Path(machine["HOME"]) / "tools" / "python3.11", 'case "$*" in *ensurepip*) exit 1;; esac')
    done = setup(machine)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("On Debian 12: apt-get install python3.11-venv")


def test_setup_states_its_cost_first_installs_once_and_then_costs_nothing(machine):
    calls = fake_python(machine)
    latex(machine)
    first = setup(machine)
    assert first.returncode == 0, first.stderr
    assert re.search(
        r"setup: installing \d+ packages into .venv: 0.8 GB to download", first.stderr.splitlines()[0]
    )
    made = calls.read_text()
    assert "-m venv --clear .venv" in made and "-r requirements.lock" in made and "--no-deps" in made
    again = setup(machine)
    assert again.returncode == 0 and again.stderr == "" and calls.read_text() == made
    lockfile = Path(machine["HOME"], "requirements.lock")
    lockfile.write_text(lockfile.read_text() + "# changed\n")
    assert setup(machine).returncode == 0 and calls.read_text() != made


def test_a_failed_install_is_not_taken_for_done(machine):
    calls = fake_python(machine)
    latex(machine)
    failed = setup(machine, PIP_FAILS="1")
    assert failed.returncode == 1 and "pip could not install requirements.lock" in failed.stderr
    made = calls.read_text()
    assert setup(machine).returncode == 0 and calls.read_text() != made


def test_without_latex_and_root_all_but_the_pdf_works(machine):
    fake_python(machine)
    done = setup(machine)
    assert done.returncode == 0
    assert (
        "LaTeX is missing, so the PDF cannot be built; all else works. Install TeX Live, on Debian: apt-get"
        in done.stderr.splitlines()[-1]
    )


def test_root_on_debian_gets_latex_by_apt_and_is_told_the_size(machine):
    fake_python(machine)
    root = Path(machine["HOME"])
    program(root / "tools" / "id", "echo 0")
    program(root / "tools" / "apt-get", f'echo "$@" >>{root}/apt')
    done = setup(machine)
    assert "installing texlive-latex-recommended latexmk lmodern by apt: 86 MB" in done.stderr
    assert (
        "install -y -qq --no-install-recommends texlive-latex-recommended latexmk lmodern"
        in (root / "apt").read_text()
    )


def dry_make(*words: str) -> subprocess.CompletedProcess:
    """`make -n`, told nothing by a make that these tests may run below."""
    above = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    env = {name: value for name, value in os.environ.items() if name not in above}
    return subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, env=env)


def test_make_names_every_step_without_running_it():
    done = dry_make("paper", "PROFILE=full")
    assert done.stdout.splitlines() == [
        "bash scripts/setup.sh",
        ".venv/bin/vqlora notebook --profile full",
        ".venv/bin/vqlora verify --profile full",
        ".venv/bin/vqlora pdf --profile full",
    ]
    done = dry_make("paper", "PROFILE=full", "VERIFY=off")
    assert done.stdout.splitlines()[2:] == [".venv/bin/vqlora pdf --profile full --unverified"]
    assert dry_make("accept", "NN=03").stdout.splitlines()[-1] == ".venv/bin/vqlora accept 03 --profile full"
    done = dry_make("02")
    assert done.stdout.splitlines()[-1] == ".venv/bin/vqlora notebook 02 --pretrain --profile cpu"


def test_every_numbered_notebook_has_a_make_target():
    for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"):
        done = dry_make(path.name[:2])
        assert done.returncode == 0 and f"notebook {path.name[:2]} " in done.stdout
