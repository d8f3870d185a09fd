"""The frame cache loses bad clips and nothing else."""
import dataclasses
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from little_videos import damage, encode, shown

from vqlora.data import cache
from vqlora.data.cache import CacheError, FrameStore
from vqlora.data.clips import Clip, Question, TrueEvent

QUESTIONS = (Question("what", "what spins ?", ("dog", "cat"), 0),)


def make_clips(folder, lengths=(12, 12, 12, 20), **options):
    return [Clip(f"c{i}", encode(folder / f"c{i}.mp4", n, seed=i, **options), "train",
                 {"en": ("the dog spins", "the cat jumps", "dog spins")}, QUESTIONS,
                 events=(TrueEvent("dog", "spin", 3, 6),)) for i, n in enumerate(lengths)]


def make_store(clips, folder, **options):
    return FrameStore(clips, folder / "cache", progress=False, **options)


def test_store_holds_every_frame_of_clips_of_different_length(tmp_path):
    clips = make_clips(tmp_path, (12, 20, 7))
    store = make_store(clips, tmp_path)
    assert [clip.id for clip in store.clips] == ["c0", "c1", "c2"] and store.left_out == ()
    for i, n in enumerate((12, 20, 7)):
        assert store[i].shape == (n, 32, 64, 3) and store[i].dtype == np.uint8
        assert shown(store[f"c{i}"]) == list(range(n))
    with pytest.raises(ValueError):
        store[0][0] = 0  # the file is shared: nobody may write into it


def test_bad_clips_are_left_out_and_listed_and_the_rest_goes_on(tmp_path, caplog):
    clips = make_clips(tmp_path, (8,) * 7)
    for clip, kind in zip(clips[1:6], ("cut", "head", "garbage", "empty", "gone"), strict=True):
        damage(clip.path, kind)
    store = make_store(clips, tmp_path)
    assert [clip.id for clip in store.clips] == ["c0", "c6"]
    assert [row.row for row in store.left_out] == ["c1", "c2", "c3", "c4", "c5"]
    assert [row.reason for row in store.left_out][3:] == ["empty file", "no such file"]
    assert all(str(clip.path) in line for clip, line in zip(clips[1:6], caplog.messages, strict=True))
    assert shown(store[1]) == list(range(8)) and "c3" not in store and "c6" in store


def test_store_is_found_again_without_decoding_and_follows_content_not_names(tmp_path, monkeypatch):
    clips = make_clips(tmp_path / "a")
    first = make_store(clips, tmp_path)
    calls = []
    monkeypatch.setattr(cache, "run_jobs", lambda *args, **kwargs: calls.append(args))
    assert make_store(clips, tmp_path).path == first.path
    (tmp_path / "a").rename(tmp_path / "b")
    moved = [dataclasses.replace(clip, path=tmp_path / "b" / clip.path.name) for clip in clips]
    assert make_store(moved, tmp_path).path == first.path and not calls
    encode(moved[0].path, 9, seed=42)
    monkeypatch.undo()
    changed = make_store(moved, tmp_path)
    assert changed.path != first.path and len(changed[0]) == 9


@pytest.mark.parametrize("spoil", ["short", "no index", "broken index"])
def test_a_spoiled_store_is_built_anew(tmp_path, spoil):
    clips = make_clips(tmp_path, (5, 6))
    path = make_store(clips, tmp_path).path
    if spoil == "short":
        file = next(path.glob("frames-*.bin"))
        file.write_bytes(file.read_bytes()[:-1])
    elif spoil == "no index":
        (path / "index.json").unlink()
    else:
        (path / "index.json").write_text("{")
    (path.with_name(path.name + ".tmp")).mkdir()  # what a killed build leaves behind
    store = make_store(clips, tmp_path)
    assert shown(store[1]) == list(range(6))
    assert {p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()} == {path.name, "manifests"}


def test_parallel_decoding_gives_the_same_store(tmp_path):
    clips = make_clips(tmp_path, (6,) * 20)
    one, two = FrameStore(clips, tmp_path / "1", workers=1, progress=False), FrameStore(
        clips, tmp_path / "2", workers=2, progress=False)
    assert len(list(two.path.glob("frames-*.bin"))) == 2
    assert all(np.array_equal(one[i], two[i]) for i in range(20))


def test_two_processes_building_the_same_store_do_not_harm_each_other(tmp_path):
    clips = make_clips(tmp_path, (10,) * 4)
    (tmp_path / "clips.pkl").write_bytes(pickle.dumps(clips))
    script = ("import pickle, sys; from pathlib import Path; from vqlora.data.cache import FrameStore\n"
              "clips = pickle.loads(Path(sys.argv[1], 'clips.pkl').read_bytes())\n"
              "store = FrameStore(clips, Path(sys.argv[1], 'cache'), progress=False)\n"
              "print(sum(int(store[i].sum()) for i in range(4)))")
    with ThreadPoolExecutor(3) as threads:
        runs = list(threads.map(lambda _: subprocess.run([sys.executable, "-c", script, tmp_path], text=True,
                                                         capture_output=True), range(3)))
    assert [run.returncode for run in runs] == [0] * 3, runs[0].stderr
    assert len({run.stdout for run in runs}) == 1
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_behind(tmp_path, monkeypatch):
    clips = make_clips(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        with pytest.raises(CacheError, match=r"cache: decoded frames need \d+ MB and the disk has 0 MB free"):
            make_store(clips, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "run_jobs", lambda *_, each, **__: each(0, {"errno": 28, "strerror": "x"}))
        with pytest.raises(CacheError, match="cache: the disk is full"):
            make_store(clips, tmp_path)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir() and p.name != "manifests"]
    assert len(make_store(clips, tmp_path)) == 4


def test_a_stretch_of_a_long_video_is_its_own_clip(tmp_path):
    whole = make_clips(tmp_path, (24,), fps=8)[0]
    cut = [dataclasses.replace(whole, id=f"s{i}", start_s=i * 1.0, end_s=i + 1.0) for i in range(3)]
    late = dataclasses.replace(whole, id="late", start_s=7.0, end_s=9.0)
    store = make_store([*cut, late], tmp_path)
    assert [shown(store[i]) for i in range(3)] == [list(range(8 * i, 8 * i + 8)) for i in range(3)]
    assert [row.reason for row in store.left_out] == ["no frames from 7 to 9 s"]
    assert shown(make_store([dataclasses.replace(cut[0], end_s=0.5)], tmp_path)[0]) == [0, 1, 2, 3]
    assert shown(make_store(cut[:1], tmp_path)[0]) == list(range(8))  # the same file, another stretch


def test_store_travels_to_worker_processes_without_its_frames(tmp_path):
    store = make_store(make_clips(tmp_path), tmp_path)
    total = int(store[1].sum())
    assert len(pickle.dumps(store)) < 20_000
    script = "import pickle, sys; print(int(pickle.load(sys.stdin.buffer)[1].sum()), 'torch' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(store), capture_output=True)
    assert child.stdout.decode().split() == [str(total), "False"], child.stderr  # and decoding needs no torch
