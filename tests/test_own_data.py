"""README's shortest way in, typed as it is written: one's own videos, from nothing to captions."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_ones_own_videos_from_nothing_to_captions_as_it_is_written(tmp_path):
    section = README.split("## On your own videos and captions\n")[1].split("\n## ")[0]
    commands = [shlex.split(line, comments=True) for line in re.findall("^    (vqlora .*)", section, re.M)]
    assert [command[1] for command in commands] == ["data", "data", "run"]
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "notebooks").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for command in commands:
        call = [sys.executable, "-W", "ignore", "-m", "vqlora.cli", *command[1:]]
        done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        settings = tmp_path / "my_clips" / "run.yaml"
        settings.write_text(settings.read_text().replace("steps: 30", "steps: 2"))  # for time
    found = json.loads(done.stdout)
    assert len(found["captions"]) == 4 and all(row["prediction"] for row in found["captions"])
    assert found["metrics"]["unknown_tokens_frac"] == found["metrics"]["clips_left_out"] == 0
    assert found["metrics"]["nll"] < 20 and Path(found["examples"]).is_file()
