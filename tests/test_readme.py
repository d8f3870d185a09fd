"""What README tells a reader to type or look for is there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vqlora.config import RunSettings, load_run
from vqlora.data.formats import load_jsonl
from vqlora.data.sources import SOURCES
from vqlora.report.readme import fill
from vqlora.settings_file import parse, read_mapping
from vqlora.steps import NEEDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"`(make [^`]*)`|^ +(make \w+)", README, re.M)))


@pytest.mark.parametrize("command", sorted({a or b for a, b in COMMANDS}))
def test_every_make_command_exists(command):
    done = subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_two_commands_stand_first():
    assert re.findall(r"^    (make \w+)", README, re.M)[:2] == ["make paper", "make test"]


def test_every_notebook_and_profile_is_told_of():
    assert {name for name in NEEDS if f"`{name}`" in README} == set(NEEDS)
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"- `{path.stem}`: " in README


def test_the_example_settings_are_valid(tmp_path):
    path = tmp_path / "my_run.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", README, re.S)[1])
    assert parse(RunSettings, read_mapping(path), path).rank == 16


def test_files_and_folders_it_names_exist():
    named = set(
        re.findall(
            r"`((?:vqlora|configs|tests|notebooks)/[\w/.]+|[A-Z]+(?:\.\w+)?|[\w.]+\.(?:yml|lock|cff))`",
            README,
        )
    )
    named -= {"configs/mine.yaml"}
    assert {"LICENSE", "CITATION.cff", "requirements.lock", "vqlora/config.py"} <= named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_its_pictures_are_there():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


def test_its_tables_are_those_of_the_results():
    assert fill(README, ROOT / "results") == README
    assert fill("<!-- table: main -->\nold\n<!-- end -->", ROOT / "results").count("\n") > 5


def test_the_example_of_the_adapter_runs_as_it_is_written(tmp_path):
    code = re.search(r"```python\n(import peft.*?)```", README, re.S)[1]
    assert len(code.splitlines()) <= 12
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_lines_of_ones_own_captions_and_settings_are_valid(tmp_path):
    line = re.search(r"```json\n(.*?)```", README, re.S)[1]
    (tmp_path / "clips").mkdir()
    (tmp_path / json.loads(line)["video"]).touch()
    (tmp_path / "captions.jsonl").write_text(line)
    assert len(load_jsonl(tmp_path, part="train").clips[0].captions["en"]) == 2
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.S)
    path = tmp_path / "my_run.yaml"
    path.write_text(blocks[0] + next(block for block in blocks if block.startswith("data:")))
    assert load_run(path).data.root == "/data/msrvtt"
    for format, source in SOURCES.items():
        (row,) = re.findall(rf"^\| `{format}` \|(.*)$", README, re.M)
        assert {f"`{protocol}`" for protocol in source.protocols} <= set(re.findall("`[^`]*`", row))


def test_sizes_are_those_that_setup_states():
    script = (ROOT / "scripts" / "setup.sh").read_text()
    for size in (
        "0.8 GB to download",
        "2.8 GB on disk",
        "3 to 10 minutes",
        "86 MB to download, 300 MB on disk",
    ):
        assert size in script and size in README
