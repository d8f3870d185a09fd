"""Same seed, same bits: in another process, and where the method allows it with another number of threads."""

import multiprocessing
import os

import pytest
import torch
from settings_like import settings_like
from test_train import run, same

from vqlora import train as training
from vqlora.runs import run_key

ARMS = {"qlora": "nf4", "vqlora": "nf4", "full": "bf16"}


def trained(arm: str, folder):
    return run(settings_like(arm, ARMS[arm], steps=3, learning_rate=1e-3, dropout=0.1), folder / arm)[0]


def elsewhere(folder) -> None:
    os.environ["PYTHONHASHSEED"] = "7"
    torch.save({arm: trained(arm, folder) for arm in ARMS}, folder / "theirs.pt")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return {arm: trained(arm, tmp_path_factory.mktemp("ours")) for arm in ARMS}


def test_another_process_trains_to_the_same_bits(ours, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vqlora.train", "vqlora.base"])
    child = context.Process(target=elsewhere, args=(tmp_path,))
    child.start()
    child.join(timeout=200)
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=False)
    for arm in ARMS:
        assert same(ours[arm], theirs[arm]), arm


@pytest.mark.parametrize("arm", ["qlora", "vqlora"])
def test_adapters_do_not_depend_on_the_number_of_threads(arm, ours, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert same(ours[arm], trained(arm, tmp_path))
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_is_taken_from_the_settings_and_part_of_the_identity(tmp_path, monkeypatch):
    def told(base):
        raise LookupError(f"{torch.get_num_threads()} threads")

    one, two = settings_like(threads=1), settings_like(threads=2)
    hashes = ("data", "base", "code")
    assert len({run_key(one, *hashes), run_key(two, *hashes), run_key(one, *hashes, processes=2)}) == 3
    monkeypatch.setattr(training, "load_base", told)
    before = torch.get_num_threads()
    try:
        with pytest.raises(LookupError, match="2 threads"):  # whatever OMP_NUM_THREADS says
            training.execute(two, tmp_path, tmp_path)
    finally:
        torch.set_num_threads(before)
