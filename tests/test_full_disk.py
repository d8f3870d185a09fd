"""A full disk, met for real: what was whole stays so, one line says it, and with room again all goes on."""

import os
import resource
import shutil
import subprocess

import pandas as pd
import pytest
import torch
from settings_like import settings_like
from test_train import CAPTIONS, clips, same

from vqlora.base import tiny
from vqlora.baselines import attach, prepare
from vqlora.checkpoints import last_whole_checkpoint
from vqlora.data.batches import ClipDataset, Collator
from vqlora.naming import describe_model, load_model, recognise, save_model
from vqlora.runs import RunResult, RunStore, StoreError
from vqlora.train import train

SETTINGS = settings_like("qlora", "nf4", steps=6)


class SmallDisk:
    """A file system of 8 MB in memory, which `fill` fills but for 100 kB. Needs root."""

    def __init__(self, folder):
        self.folder = folder
        command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]
        mounted = subprocess.run(command, capture_output=True)
        if mounted.returncode:
            pytest.skip("mounting a small file system needs root")

    def fill(self):
        with open(self.folder / "ballast", "wb") as file:
            file.write(bytes(shutil.disk_usage(self.folder).free - 100_000))

    def free(self):
        (self.folder / "ballast").unlink(missing_ok=True)

    def close(self):
        subprocess.run(["umount", "-l", self.folder], check=True)


class SmallFiles:
    """For anyone: no file of this process can be longer than 100 kB once it is `fill`ed."""

    def __init__(self, folder):
        self.folder = folder

    def fill(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    def free(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    close = free


@pytest.fixture(params=[SmallDisk, SmallFiles])
def disk(request, tmp_path):
    made = request.param(tmp_path)
    yield made
    made.close()


class Fills(ClipDataset):
    """The disk is full from the `at`-th example on."""

    def __init__(self, *args, at, disk, **kwargs):
        super().__init__(*args, **kwargs)
        self.at, self.disk, self.asked = at, disk, 0

    def __getitem__(self, index):
        self.asked += 1
        if self.asked == self.at:
            self.disk.fill()
        return super().__getitem__(index)


def run(work, disk=None, at=None):
    model, tokenizer = tiny()
    model = attach(prepare(model, SETTINGS), SETTINGS)
    made, store = clips()
    data = Fills(made, store, SETTINGS.frames, seed=0, at=at, disk=disk)
    given = train(model, SETTINGS, data, Collator(tokenizer, seed=0), work, save_steps=2)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}, given


def test_training_keeps_its_last_whole_checkpoint_and_goes_on_from_it(disk, tmp_path_factory):
    said = r"checkpoint-4: cannot be written \((No space left|File too large)"
    with pytest.raises(OSError, match=said) as fault:
        run(disk.folder, disk, at=8)
    assert "\n" not in str(fault.value)
    half = disk.folder / "checkpoints" / "checkpoint-4"
    assert half.is_dir(), "some of it was written"
    disk.free()
    resumed, given = run(disk.folder)
    assert given["steps_here"] == 4
    whole, _ = run(tmp_path_factory.mktemp("roomy"))
    assert same(whole, resumed)


def test_with_no_room_the_last_checkpoint_can_still_be_loaded(disk):
    with pytest.raises(OSError, match="checkpoint-4"):
        run(disk.folder, disk, at=8)
    assert last_whole_checkpoint(disk.folder / "checkpoints").name == "checkpoint-2"


def test_a_result_is_stored_whole_or_not_at_all(disk):
    store = RunStore(disk.folder)
    examples = pd.DataFrame({"clip": [os.urandom(50).hex() for _ in range(5000)]})  # half a megabyte
    (store.work("k") / "checkpoint").write_text("")
    disk.fill()
    with pytest.raises(StoreError, match=r"k\.parquet: cannot be written \((No space left|File too large)"):
        store.put("k", SETTINGS, RunResult({"nll": 1.0}, {}, examples))
    assert store.get("k") is None and (store.work("k") / "checkpoint").exists()
    disk.free()
    store.put("k", SETTINGS, RunResult({"nll": 1.0}, {}, examples))
    pd.testing.assert_frame_equal(store.get("k").examples(), examples)


def test_a_model_is_saved_whole_or_is_none(disk):
    model, tokenizer = tiny(words=" ".join(CAPTIONS).split())
    model = attach(prepare(model, SETTINGS), SETTINGS)
    named = describe_model(model, "tiny", "none")
    disk.fill()
    with pytest.raises(OSError, match=rf"{named.name}: cannot be written"):
        save_model(model, disk.folder, named, tokenizer)
    with pytest.raises(ValueError, match="saved only half"):
        recognise(disk.folder / named.name)
    disk.free()
    folder = save_model(model, disk.folder, named, tokenizer)
    again, _ = load_model(folder, tiny(words=" ".join(CAPTIONS).split())[0], trainable=True)
    kept = {name: p for name, p in again.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters() if p.requires_grad)
