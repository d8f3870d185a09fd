"""README's two lines for a checkpoint of the hub, typed as they are written: from videos to a model card."""

import json
import re
from pathlib import Path

from vqlora import cli
from vqlora.zoo.checkpoints import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_ones_own_videos_and_checkpoint_as_it_is_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "configs" / "cpu.yaml").write_bytes((ROOT / "configs" / "cpu.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert cli.main(["data", "example", "my_clips", "--clips", "5"]) == 0
    tiny_checkpoint("smolvlm", "my_clips/my_checkpoint")
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.S)
    lines = next(block for block in blocks if block.startswith("base:"))
    settings = Path("my_clips", "run.yaml")
    short = settings.read_text().replace("steps: 30", "steps: 2").replace("batch_size: 8", "batch_size: 2")
    settings.write_text(short + lines)
    capsys.readouterr()
    assert cli.main(["run", str(settings)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["captions"]) == 1 and 0 < found["metrics"]["nll"] < 10
    (adapter,) = Path("my_clips", "adapters").glob("*/adapter_model.safetensors")
    card = adapter.with_name("README.md")
    card.unlink()
    assert cli.main(["card", str(adapter.parent)]) == 0 and "## Scores" in card.read_text()
