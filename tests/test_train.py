import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from settings_like import settings_like

from vqlora import train as training
from vqlora.base import tiny
from vqlora.baselines import attach, prepare
from vqlora.checkpoints import MARKER, last_whole_checkpoint
from vqlora.data import parts
from vqlora.data.batches import ClipDataset, Collator
from vqlora.data.cache import ArrayStore
from vqlora.data.clips import Clip, Question
from vqlora.losses import batch_loss, info_nce
from vqlora.naming import recognise
from vqlora.train import choose_attention, measure_step, pick_optimizer, train

CAPTIONS = ("cat moves left", "dog moves right", "cat spins then dog spins", "two cat one dog", "dog spins")


def clips(count=5):
    questions = (Question("what", "what moves", ("cat", "dog"), 0),)
    made = [
        Clip(f"c{i}", Path("none.mp4"), "train", {"en": (CAPTIONS[i % 5],)}, questions) for i in range(count)
    ]
    rng = np.random.default_rng(0)
    return made, ArrayStore(made, [rng.integers(0, 255, (4, 64, 64, 3), dtype=np.uint8) for _ in made])


class KillsItself(ClipDataset):
    """Ends its process as `kill -9` does when it is asked for an example the `at`-th time."""

    def __init__(self, *args, at=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.at, self.asked = at, 0

    def __getitem__(self, index):
        self.asked += 1
        if self.asked == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def run(settings, work, *, kill_at=None, save_steps=2):
    """Train a fresh tiny model; returns (trained parameters by name, what train gave)."""
    model, tokenizer = tiny()
    model = attach(prepare(model, settings), settings)
    made, store = clips()
    data = KillsItself(made, store, settings.frames, "jittered", seed=settings.seed, at=kill_at)
    collator = Collator(tokenizer, seed=settings.seed, question_share=settings.question_share)
    given = train(model, settings, data, collator, work, save_steps=save_steps)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}, given


def killed_run(settings, work, kill_at):
    context = multiprocessing.get_context("forkserver")  # a fork of this process would hang in autograd
    context.set_forkserver_preload(["vqlora.train", "vqlora.base"])
    child = context.Process(target=run, args=(settings, work), kwargs={"kill_at": kill_at})
    child.start()
    child.join(timeout=120)
    assert child.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(settings, the folder of a run killed in step 5, parameters and report of one that was not)."""
    folder, settings = tmp_path_factory.mktemp("killed"), settings_like("qlora", "nf4", dropout=0.1, steps=6)
    killed_run(settings, folder / "cut", kill_at=12)  # batches of two, one is read ahead
    return settings, folder / "cut", *run(settings, folder / "whole")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_killed_run_goes_on_to_the_same_bits(killed, tmp_path):
    settings, cut, whole, given = killed
    shutil.copytree(cut, tmp_path, dirs_exist_ok=True)
    assert last_whole_checkpoint(tmp_path / "checkpoints").name == "checkpoint-4"
    resumed, again = run(settings, tmp_path)
    assert again["steps_here"] == 2 and given["steps_here"] == 6
    assert same(whole, resumed) and again["train_loss"] == given["train_loss"]
    assert any(value.abs().sum() > 0 for name, value in whole.items() if "lora_B" in name)
    assert list((tmp_path / "tensorboard").glob("events*"))
    finished, again = run(settings, tmp_path)  # killed in evaluation: nothing is trained again
    assert again["steps_here"] == 0 and again["train_loss"] == given["train_loss"] and same(whole, finished)


def test_a_half_written_checkpoint_is_never_loaded(killed, tmp_path):
    settings, cut, whole, _ = killed
    shutil.copytree(cut, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    weights = folder / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])  # killed before its last bytes
    resumed, again = run(settings, tmp_path)
    assert again["steps_here"] == 4 and same(whole, resumed)  # from checkpoint-2
    (folder / "checkpoint-6" / MARKER).unlink()  # killed before the marker
    (folder / "checkpoint-7").mkdir()
    assert last_whole_checkpoint(folder).name == "checkpoint-4" and not (folder / "checkpoint-7").exists()
    assert last_whole_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("arm,bits", [("full", "bf16"), ("lora", "bf16"), ("qlora", "int8")])
def test_every_arm_learns(tmp_path, arm, bits):
    trained, given = run(settings_like(arm, bits, steps=5, learning_rate=3e-3), tmp_path, save_steps=100)
    first = json.loads((tmp_path / "checkpoints/checkpoint-5/trainer_state.json").read_text())["log_history"][
        0
    ]["loss"]
    assert given["train_loss"] < first and given["train_cpu_s"] > 0 and given["step_s"] > 0
    assert given["optimizer_bytes"] >= 8 * sum(p.numel() for p in trained.values())  # two float32 moments


@pytest.mark.parametrize("arm,bits", [("full", "bf16"), ("qlora", "nf4")])
def test_bf16_compute_trains_float32_parameters(tmp_path, arm, bits):
    trained, given = run(settings_like(arm, bits, steps=2, compute_dtype="bf16"), tmp_path)
    assert all(value.dtype == torch.float32 for value in trained.values())
    assert math.isfinite(given["train_loss"])


def test_accumulation_equals_one_large_batch(tmp_path):
    # same rows, no contrast between the rows of a batch, and captions of one length: means of means are the
    # mean
    same = {"contrastive_weight": 0.0, "question_share": 1.0, "steps": 2, "frames": 2}
    large, _ = run(settings_like("lora", "bf16", batch_size=4, **same), tmp_path / "large")
    small, _ = run(settings_like("lora", "bf16", batch_size=2, accumulation=2, **same), tmp_path / "small")
    for name, value in large.items():
        torch.testing.assert_close(value, small[name], rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_changes_no_number(tmp_path):
    plain, _ = run(settings_like("qlora", "nf4", steps=2), tmp_path / "plain")
    saved, _ = run(settings_like("qlora", "nf4", steps=2, gradient_checkpointing=True), tmp_path / "saved")
    assert all(torch.equal(plain[name], saved[name]) for name in plain)


def test_frozen_and_no_learning_rate_are_refused(tmp_path):
    with pytest.raises(ValueError, match="arm 'frozen': no parameter is trainable"):
        run(settings_like("frozen", "bf16"), tmp_path)
    with pytest.raises(ValueError, match="learning_rate: 0.0 given for arm 'lora'; it must be above 0"):
        run(settings_like("lora", "bf16", learning_rate=0.0), tmp_path)


def test_info_nce():
    vectors = torch.eye(4)
    right = -math.log(math.exp(12) / (math.exp(12) + 3))
    assert info_nce(vectors, vectors, 12.0).item() == pytest.approx(right, abs=1e-6)
    assert info_nce(vectors, vectors[[1, 0, 3, 2]], 12.0).item() == pytest.approx(12 + right, rel=1e-5)
    torch.manual_seed(0)
    a, b = torch.randn(2, 4, 8).unbind()
    assert info_nce(a, b).item() == pytest.approx(info_nce(b, a).item())


def batch_of(model_tokenizer, count=3):
    made, store = clips()
    data = ClipDataset(made, store, 2)
    return Collator(model_tokenizer[1])([data[i] for i in range(count)])


def test_batch_loss_is_cross_entropy_plus_weighted_contrast():
    pair = tiny()
    batch = batch_of(pair)
    plain, outputs = batch_loss(pair[0], batch, 0.0)
    assert plain.item() == outputs.loss.item() and "text_ids" in batch
    more, _ = batch_loss(pair[0], batch, 0.5)
    half, _ = batch_loss(pair[0], batch, 0.25)
    assert (more - plain).item() == pytest.approx(2 * (half - plain).item(), rel=1e-4) and more > plain


def test_pick_optimizer():
    model = torch.nn.Linear(2, 2)
    assert pick_optimizer("auto", model, "cpu") == ("adamw_torch", "no paging without CUDA")
    name, reason = pick_optimizer("paged_adamw_8bit", model, "cpu")
    assert name == "adamw_torch" and "needs CUDA" in reason
    model.is_loaded_in_4bit = True
    assert pick_optimizer("auto", model, "cuda")[0] == "paged_adamw_8bit"
    assert pick_optimizer("paged_adamw_8bit", model, "cuda") == ("paged_adamw_8bit", "asked for")
    with pytest.raises(ValueError, match="optimizer: 'adamm' is not known; allowed: auto, adamw_torch"):
        pick_optimizer("adamm", model, "cpu")


def test_attention_is_written_out_for_bf16_on_cpu_only():
    for compute, wanted in (("fp32", "sdpa"), ("bf16", "eager")):
        model = tiny()[0]
        choose_attention(model, compute, torch.device("cpu"))
        assert model.model.language_model.config._attn_implementation == wanted


def test_measuring_a_step_leaves_no_trace_and_counts_4_bit_layers():
    flops = {}
    for arm, bits in (("lora", "bf16"), ("qlora", "nf4")):
        settings = settings_like(arm, bits)
        pair = tiny()
        model = attach(prepare(pair[0], settings), settings).eval()
        state = torch.random.get_rng_state()
        found = measure_step(model, batch_of(pair), 0.25)
        assert torch.equal(state, torch.random.get_rng_state())
        assert all(p.grad is None for p in model.parameters()) and not model.training
        flops[bits] = found["step_flops"]
        assert found["step_peak_bytes"] > 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert flops["nf4"] == flops["bf16"] > 0


def test_execute_gives_metrics_costs_and_examples(tmp_path, monkeypatch):
    made, store = clips()

    other = [dataclasses.replace(clip, id=f"v{i}", path=Path(f"{i}.mp4")) for i, clip in enumerate(made)]

    def load(root, domain, part):
        return SimpleNamespace(clips=made if part == "train" else other, left_out=("a row without a video",))

    class Evaluation:
        summary, examples = {"nll": 1.0, "clips_left_out": 0.0}, "rows"

    monkeypatch.setattr(training, "load_base", lambda name: tiny())
    monkeypatch.setattr(parts, "load_kinemoji", load)
    monkeypatch.setattr(parts, "FrameStore", lambda *args, **kwargs: store)
    monkeypatch.setattr(training, "evaluate", lambda model, tokenizer, clips, store, **kwargs: Evaluation)
    found = {}
    for arm, bits in (("frozen", "nf4"), ("lora", "bf16"), ("qlora", "nf4"), ("vqlora", "nf4")):
        settings = settings_like(arm, bits, steps=2)
        result = training.execute(settings, tmp_path, tmp_path / arm, save_to=tmp_path / "saved")
        found[arm] = result.cost
        assert result.examples == "rows" and result.metrics["nll"] == 1.0
        assert result.metrics["clips_left_out"] == (1.0 if arm == "frozen" else 2.0)
        assert all(isinstance(value, float) for value in {**result.metrics, **result.cost}.values())
    saved = tmp_path / "saved" / "KineVLM-kinemoji.language_SFT_LoRA4_QLORA_w4_headbf16"
    assert recognise(saved).base_source == "released"
    assert found["frozen"]["trainable_parameters"] == 0 and "train_bytes" not in found["frozen"]
    assert found["qlora"]["weight_bytes"] == found["frozen"]["weight_bytes"] < found["lora"]["weight_bytes"]
    assert found["qlora"]["trainable_parameters"] == found["lora"]["trainable_parameters"] > 0
    assert found["qlora"]["train_bytes"] < found["lora"]["train_bytes"]
    with pytest.raises(ValueError, match="9 clips of part 'val' asked for, 5 there"):
        training.execute(settings_like("frozen", "nf4", eval_clips=9), tmp_path, tmp_path)
    other[0] = dataclasses.replace(other[0], path=made[0].path, id=made[0].id)
    with pytest.raises(ValueError, match="clip c0 of val is also in train"):
        training.execute(settings_like("lora", "bf16"), tmp_path, tmp_path)
