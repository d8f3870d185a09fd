"""Runs on data that the project did not render: settings, identity, frames of one size, the whole way."""

import json
from pathlib import Path

import numpy as np
import odd_files
import pytest
from little_videos import damage, encode
from odd_files import put

from vqlora.base import tiny
from vqlora.config import ConfigError, DataSource, RunSettings, load_run
from vqlora.data import parts as data_parts
from vqlora.data.cache import FrameStore
from vqlora.data.clips import Clip, Segment
from vqlora.data.formats import write_activitynet, write_lsmdc, write_msrvtt, write_vatex
from vqlora.data.rows import FormatError
from vqlora.data.small import small_frames
from vqlora.data.sources import check_run, source_hash, unknown_tokens
from vqlora.identity import code_hash
from vqlora.runs import _codes, _keys
from vqlora.store import run_key

RUN = {
    "experiment": "e",
    "arm": "qlora",
    "bits": "nf4",
    "seed": 0,
    "learning_rate": 1e-2,
    "steps": 1,
    "train_clips": 2,
    "eval_clips": 1,
    "compute_dtype": "fp32",
}


def write_run(folder, **data):
    path = folder / "run.json"
    path.write_text(json.dumps(RUN | {"data": {"format": "jsonl", "root": ".", **data}}))
    return path


def test_a_settings_file_points_at_data_from_where_it_lies(tmp_path):
    settings = load_run(write_run(tmp_path))
    assert settings.data.root == str(tmp_path) and settings.domain == "jsonl"
    assert load_run(write_run(tmp_path, root="/elsewhere")).data.root == "/elsewhere"
    check_run(load_run(own_file(tmp_path, "v.mp4")))
    for wrong, wanted in (
        ({"root": "gone"}, "gone: no such folder"),
        ({"protocol": "1k-A"}, "is not one of official"),
        ({"format": "lsmdc", "eval_protocol": "2k"}, "'2k' is not one of official, 1k"),
    ):
        with pytest.raises(FormatError, match=wanted):
            check_run(load_run(write_run(tmp_path, **wrong)))
    with pytest.raises(FormatError, match="no part 'devtest'; allowed: train, val"):
        check_run(load_run(write_run(tmp_path)).model_copy(update={"eval_part": "devtest"}))


def test_faults_in_the_data_section_name_what_is_allowed(tmp_path):
    for wrong, wanted in (
        (
            {"fromat": 1},
            "data: unknown key 'fromat' (did you mean 'format'?); allowed: format, root, protocol",
        ),
        ({"format": "mvrvtt"}, "data.format: 'mvrvtt' is not one of msrvtt, vatex"),
        ({"size": 4}, "data.size: 4 is not at least 8"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_run(write_run(tmp_path, **wrong))
        assert wanted in str(caught.value)


def test_runs_on_rendered_data_do_not_know_of_other_data(tmp_path):
    odd = tmp_path / "odd"
    odd_files.jsonl(odd / "jsonl")
    tmp_path = tmp_path / "moved"
    rendered = RunSettings(**RUN, domain="language")
    own = RunSettings(**RUN, domain="language", data=DataSource(format="jsonl", root=str(odd / "jsonl")))
    codes = _codes([rendered, own], None)
    assert codes[0] == code_hash(["vqlora.train"]) != codes[1]
    assert run_key(rendered, "d", "b", "c") != run_key(own, "d", "b", "c")
    moved = own.model_copy(update={"data": own.data.model_copy(update={"root": str(tmp_path)})})
    odd_files.jsonl(tmp_path)
    assert _keys([own], tmp_path, ["c"]) == _keys([moved], tmp_path, ["c"])  # bytes count, not places
    put(tmp_path, "run.yaml", "steps: 2")
    assert source_hash(tmp_path) == source_hash(odd / "jsonl")
    other = put(tmp_path, "other.jsonl", (tmp_path / "captions.jsonl").read_bytes())
    assert source_hash(other) != source_hash(tmp_path / "captions.jsonl")  # two files of one folder
    other.unlink()
    put(tmp_path, "clips/a.mp4", b"longer")
    assert _keys([own], tmp_path, ["c"]) != _keys([moved], tmp_path, ["c"])


def own_file(folder, video):
    rows = [{"video": video, "captions": ["x"], "part": part} for part in ("train", "val")]
    put(folder, "captions.jsonl", "\n".join(map(json.dumps, rows)))
    return write_run(folder)


def own_clips(folder: Path, count: int = 4) -> Path:
    """`count` videos of different sizes with a caption each; the last is of `val`, the first is damaged."""
    lines = []
    for n in range(count):
        path = encode(folder / f"v{n}.mp4", 12, seed=n, width=64 + 32 * n, height=64)
        part = "val" if n == count - 1 else "train"
        lines.append({"video": path.name, "captions": ["dog moves left", "cat spins"], "part": part})
    damage(folder / "v0.mp4", "garbage")
    return put(folder, "captions.jsonl", "\n".join(map(json.dumps, lines)))


def test_videos_of_any_size_become_frames_of_one(tmp_path):
    root = own_clips(tmp_path / "own").parent
    settings = RunSettings(**RUN, domain="own", data=DataSource(format="jsonl", root=str(root), fps=2.0))
    clips, store, left_out = data_parts.clips_of(tmp_path, settings, "train", 3, size=32)
    assert [clip.id for clip in clips] == ["v0.mp4", "v1.mp4", "v2.mp4"] and left_out == 0
    assert [row.row for row in store.left_out] == ["v0.mp4"]
    assert {store[i].shape[1:] for i in range(2)} == {(32, 32, 3)} and 1 < len(store[0]) < 12
    larger = settings.model_copy(update={"data": settings.data.model_copy(update={"size": 48, "fps": None})})
    _, store, _ = data_parts.clips_of(tmp_path, larger, "train", 3, size=32)
    assert store["v1.mp4"].shape == (12, 48, 48, 3)
    with pytest.raises(ValueError, match="own: 4 clips of part 'train' asked for, 3 there"):
        data_parts.clips_of(tmp_path, settings, "train", 4)


def test_stores_of_whole_frames_keep_their_place(tmp_path):
    clip = Clip("c", encode(tmp_path / "c.mp4", 8), "train", {"en": ("x",)})
    whole, small = (FrameStore([clip], tmp_path / "cache", progress=False, size=size) for size in (None, 16))
    assert whole.path != small.path and np.shape(small["c"]) == (8, 16, 16, 3)
    assert FrameStore([clip], tmp_path / "cache", progress=False).path == whole.path
    with pytest.raises(ValueError, match="fps: 2 needs a size"):
        FrameStore([clip], tmp_path / "cache", progress=False, fps=2.0)


def test_words_that_the_base_does_not_know_are_counted(tmp_path):
    _, tokenizer = tiny()
    clip = Clip("c", tmp_path, "val", {"en": ("dog moves left", "a zebra"), "de": ("ein Zebra",)})
    assert unknown_tokens(tokenizer, [clip]) == 2 / 5 and unknown_tokens(tokenizer, []) == 0.0


def test_each_format_gives_frames_of_the_right_stretch(tmp_path):
    clips = []
    for n, part in enumerate(("train", "val")):
        path = encode(tmp_path / "videos" / f"video{n}.mp4", 24, seed=n)  # 3 s at 8 frames a second
        segments = (Segment(0.5, 1.5, "first"), Segment(1.0, 2.75, "then"))
        clips.append(Clip(f"video{n}", path, part, {"en": ("all of it",)}, segments=segments))
    for write, name in ((write_vatex, "vatex"), (write_activitynet, "activitynet"), (write_lsmdc, "lsmdc")):
        write(tmp_path / name, clips, durations_s=2.0)
        (tmp_path / name / "videos").symlink_to(tmp_path / "videos")
    write_msrvtt(tmp_path / "msrvtt" / "MSRVTT_data.json", clips, durations_s=3.0)
    (tmp_path / "msrvtt" / "videos").symlink_to(tmp_path / "videos")
    wanted = {"msrvtt": [24], "vatex": [16], "activitynet": [24], "lsmdc": [16], "segments": [8, 8]}
    for name, lengths in wanted.items():
        task = {"task": "segments"} if name == "segments" else {}
        format = "activitynet" if task else name
        data = DataSource(format=format, root=str(tmp_path / format), size=16, **task)
        settings = RunSettings(**RUN, domain=name, data=data)
        found, store, _ = data_parts.clips_of(tmp_path, settings, "train", len(lengths))
        assert [store[clip.id].shape for clip in found] == [(n, 16, 16, 3) for n in lengths], name
        whole = small_frames(clips[0].path, 16)
        first = {"segments": 4}.get(name, 0)
        assert (store[found[0].id] == whole[first : first + lengths[0]]).all()
