"""Runs on checkpoints in hub layout with one's own videos: trained, scored, saved, read by stock peft."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from vqlora.card import RECORD, has_record, make_card, write_card
from vqlora.config import load_run
from vqlora.data.batches import ClipDataset
from vqlora.data.example import write_example
from vqlora.data.parts import clips_of
from vqlora.hub.batches import HubCollator, clip_seconds
from vqlora.hub.checkpoint import load_model, read_checkpoint
from vqlora.hub.evaluate import _Reader
from vqlora.hub.run import stored_side
from vqlora.reporting import reporting
from vqlora.runs import _codes, run_grid
from vqlora.store import RunStore, run_key
from vqlora.zoo.checkpoints import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]
RUN = {
    "experiment": "mine",
    "data": {"format": "jsonl", "root": "clips"},
    "save_to": "adapters",
    "arm": "qlora",
    "bits": "nf4",
    "seed": 0,
    "rank": 4,
    "learning_rate": 1e-2,
    "steps": 2,
    "batch_size": 2,
    "frames": 3,
    "train_clips": 4,
    "eval_clips": 1,
    "compute_dtype": "fp32",
}
GATED = {"arm": "vqlora", "gate_features": "scores", "modalities": ["vision", "text"]}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_example(folder / "clips", clips=5)
    lines = (folder / "clips" / "captions.jsonl").read_text().splitlines()
    short = []
    for line in lines:  # a caption and a question each: the others would be more of the same
        row = json.loads(line)
        row["captions"], row["questions"] = row["captions"][:1], row.get("questions", [])[:1]
        short.append(json.dumps(row))
    (folder / "clips" / "captions.jsonl").write_text("\n".join(short))
    return folder


def settings_of(folder, name, **more):
    if not (folder / name).is_dir():
        tiny_checkpoint(name, folder / name)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(RUN | {"base": name} | more))
    return load_run(path)


def made(folder, settings):
    store = RunStore(folder / "build")
    return run_grid([settings], store, 0, data_root=folder / "build" / "data")[0]


@pytest.mark.parametrize("name, more", [("smolvlm", GATED), ("llava_onevision", {}), ("qwen2_5_vl", GATED)])
def test_a_run_trains_scores_and_saves(folder, name, more):
    settings = settings_of(folder, name, **more)
    run = made(folder, settings)
    assert run.metrics["clips"] == 1 and 0 < run.metrics["nll"] < 10 and run.metrics["clips_left_out"] == 0
    assert 0 < run.metrics["train_loss"] < 10 and run.cost["trainable_parameters"] > 0
    examples = run.examples()
    assert set(examples.task) == {"caption", "question"}
    (saved,) = (path.parent for path in (folder / "adapters").glob(f"{name}-*/{RECORD}"))
    assert has_record(folder / "adapters", run.key)
    tensors = load_file(saved / "adapter_model.safetensors")
    moved = [value for key, value in tensors.items() if "lora_B" in key]
    assert moved and all(bool(v.any()) for v in moved)  # every adapter has learned
    card = (saved / "README.md").read_text()
    assert str(folder) not in card + (saved / RECORD).read_text()
    assert f"{run.metrics['nll']:.4g}" in card


def test_a_run_whose_model_is_gone_is_made_again(folder):
    settings = settings_of(folder, "llava_onevision")
    run = made(folder, settings)
    (saved,) = (path.parent for path in (folder / "adapters").glob(f"llava_onevision-*/{RECORD}"))
    (saved / RECORD).unlink()
    assert not has_record(folder / "adapters", run.key)
    again = made(folder, settings)
    assert again.metrics == run.metrics and has_record(folder / "adapters", run.key)


def test_stock_peft_reads_what_was_saved_in_a_fresh_process(folder):
    run = made(folder, settings_of(folder, "smolvlm", **GATED))
    code = """
import sys, vqlora, torch
from peft import PeftModel
base = vqlora.load_quantized(sys.argv[1], bits="nf4", compute_dtype="fp32")
model = PeftModel.from_pretrained(base, sys.argv[2])
learned = [bool(p.any()) for n, p in model.named_parameters() if "lora_B" in n]
print(model.peft_config["default"].peft_type, sum(learned))
"""
    (saved,) = (path.parent for path in (folder / "adapters").glob(f"smolvlm-*/{RECORD}"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder / "smolvlm"), str(saved)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kind, learned = done.stdout.split()
    assert "VQLORA" in kind and int(learned) > 10 and run.cost["trainable_parameters"] > 0


def test_a_score_is_the_loss_of_its_row(folder):
    settings = settings_of(folder, "qwen2_5_vl")
    checkpoint = read_checkpoint(settings.base)
    clips, store, _ = clips_of(folder / "build" / "data", settings, "val", 1, stored_side(checkpoint))
    collator = HubCollator(checkpoint, clip_seconds(clips, folder / "build" / "data" / "cache"))
    model = load_model(settings.base, settings).eval()
    item = ClipDataset(clips, store, 3)[0]
    texts = [("Describe the video.", "a dog runs"), ("what?", "a very fast dog that runs")]
    with torch.no_grad():
        scores = _Reader(model, collator, 4, 8).score(item, texts)
        for (request, answer), score in zip(texts, scores, strict=True):
            alone = model(**collator.rows([(item, request, answer)])).loss
            assert score.tokens == len(answer) + 1 and -score.logp / score.tokens == pytest.approx(
                float(alone), rel=1e-4
            )


def test_other_loggers_are_the_trainers_own(tmp_path):
    model, arguments = torch.nn.Linear(1, 1), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)

    def kinds():
        return {type(callback).__name__ for callback in Trainer(model, arguments).callback_handler.callbacks}

    with reporting(("tensorboard",)):
        assert "TensorBoardCallback" in kinds()
    assert "TensorBoardCallback" not in kinds()
    wrong = "report_to: .*wandbb is not supported.*wandb"
    with pytest.raises(ValueError, match=wrong), reporting(("wandbb",)):
        pass


def test_frames_are_kept_as_squares_only_where_the_class_squeezes_them_so(folder):
    sides = {}
    for name in ("smolvlm", "llava_onevision", "qwen2_5_vl", "llava_next_video"):
        settings_of(folder, name)
        sides[name] = stored_side(read_checkpoint(str(folder / name)))
    assert sides == {"smolvlm": 32, "llava_onevision": 32, "qwen2_5_vl": None, "llava_next_video": None}


def test_identity_of_hub_runs(folder):
    settings = settings_of(folder, "llava_onevision")
    same = settings.model_copy(update={"save_to": None, "label": "x", "report_to": ("wandb",)})
    other = settings.model_copy(update={"prompt": "What happens?"})
    keys = [run_key(one, "d", "b", "c") for one in (settings, same, other)]
    assert keys[0] == keys[1] != keys[2]
    released = settings.model_copy(update={"base": "released"})
    codes = _codes([settings, released], None)
    assert codes[0] != codes[1]


def test_a_card_tells_what_is_known(folder):
    (saved,) = (path.parent for path in (folder / "adapters").glob(f"smolvlm-*/{RECORD}"))
    card = make_card(saved)
    assert card.data.license == "other" and card.data.base_model == "smolvlm"
    assert {result.metric_type for result in card.data.eval_results} >= {"nll", "cider", "qa_frac"}
    for section in ("## Data", "## Scores", "## Limits", "## Licence", "## Use"):
        assert section in card.content
    assert "Gates of kind `rank`" in card.content
    write_card(saved, "apache-2.0")
    assert "license: apache-2.0" in (saved / "README.md").read_text()
    with pytest.raises(ValueError, match="not a model that vqlora saved"):
        write_card(folder)
