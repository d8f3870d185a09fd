"""Training in two processes: the same as in one, resumed, stored once; what cannot work is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import run, same
from together import ARMS, settings_of

from vqlora import processes
from vqlora.base import tiny
from vqlora.data.kinemoji.language import vocabulary
from vqlora.data.kinemoji.write import write_domain
from vqlora.quantize import load_quantized

# How far a weight may be from where one process takes it: the same sums in another order. Measured after six
# steps of up to 1e-3: 7e-7 (adapters on 4 bits) and 2.2e-5 (all weights).
APART = {"qlora": 1e-5, "vqlora": 1e-5, "full": 1e-3}  # AdamW steps as far for a gradient of noise
LAUNCHERS = ("WORLD_SIZE", "RANK", "ACCELERATE_USE_CPU", "MASTER_ADDR", *processes._MPI)


def launch(root: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    env["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    launcher = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")  # without GPUs: gloo
    command = [sys.executable, "-m", *launcher, str(Path(__file__).with_name("together.py")), str(root)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder in which two processes trained all arms, made a run, and resumed a training that was cut."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    root = tmp_path_factory.mktemp("two")
    model, tokenizer = tiny(words=vocabulary())
    for part in (model, tokenizer):
        part.save_pretrained(root / "base")
    write_domain(root / "data", "visual", {"train": 4, "val": 4}, 0, 1, progress=False)
    done = launch(root)
    assert not done.returncode, done.stderr[-3000:]
    return root


def loaded(root: Path, name: str, rank: int):
    return torch.load(root / f"{name}-{rank}.pt", weights_only=False)


@pytest.mark.parametrize("arm", ARMS)
def test_two_processes_train_as_one_does_on_the_same_batches(root, arm, tmp_path):
    alone, told = run(settings_of(arm, steps=2), tmp_path)
    ours, other = loaded(root, arm, 0), loaded(root, arm, 1)
    assert same(ours[0], other[0]), "both hold the same weights, to the bit"
    assert ours[1]["train_loss"] == pytest.approx(told["train_loss"], rel=1e-5)
    for name, value in alone.items():
        torch.testing.assert_close(ours[0][name], value, rtol=0, atol=APART[arm])


def test_they_resume_to_the_same_bits_and_save_once(root):
    whole, resumed = loaded(root, "whole", 0), loaded(root, "resumed", 0)
    assert whole[1]["steps_here"] == 4 and resumed[1]["steps_here"] == 2 and same(whole[0], resumed[0])
    assert resumed[1]["train_loss"] == whole[1]["train_loss"]
    names = {path.name for path in (root / "whole" / "checkpoints" / "checkpoint-4").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "complete.json"} <= names
    assert len(list((root / "qlora" / "tensorboard").glob("events*"))) == 1


def test_a_run_that_they_make_is_stored_once(root):
    key, metrics, made = loaded(root, "grid", 0)
    assert loaded(root, "grid", 1) == (key, metrics, made) and made["processes"] == 2
    assert [path.stem for path in (root / "grid" / "runs").glob("*.json")] == [key]


@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.parametrize("asked,reason", [
    ({"ACCELERATE_USE_FSDP": "true"}, "does not go with FSDP: sharded integer weights come apart"),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
     "does not go with DeepSpeed ZeRO-3"),
])  # fmt: skip
def test_what_would_corrupt_quantized_weights_is_refused(monkeypatch, bits, asked, reason):
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"bits: '{bits}' {reason}.*or take bits 'bf16'") as refused:
        load_quantized(tiny()[0], bits)
    assert "\n" not in str(refused.value)
    load_quantized(tiny()[0], "bf16")
    if "ACCELERATE_DEEPSPEED_ZERO_STAGE" in asked:
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        load_quantized(tiny()[0], bits)


def test_a_launcher_that_started_one_process_only_is_named(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    assert processes.count() == 1 and processes.first()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(processes.LaunchError, match="started this process alone.*torchrun"):
        processes.count()
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch_size: 32 does not divide by 3 processes"):
        processes.share(32)
