"""`vqlora data`: what a person is told of a folder, exit codes, JSON; and the example that can be run."""

import json

import odd_files
import pytest

from vqlora import cli
from vqlora.config import load_run
from vqlora.data.small import small_frames
from vqlora.data.sources import load
from vqlora.frames.reader import VideoError, read_frames


def said(capsys, *arguments: str) -> tuple[int, str]:
    code = cli.main(["data", *arguments])
    return code, capsys.readouterr().out


def test_an_empty_folder_says_what_goes_where(tmp_path, capsys):
    code, text = said(capsys, "check", "msrvtt", "--root", str(tmp_path), "--protocol", "1k-A")
    assert code == 1 and text.endswith("NOT usable as it is\n")
    for line in (
        "MISSING    MSRVTT_data.json ",
        "MISSING    MSRVTT_train.9k.csv ",
        "its 9,000 training clips",
        "video0.mp4 to video9999.mp4",
        "  0 files there",
    ):
        assert line in text


@pytest.mark.parametrize(
    "format, protocol",
    [
        ("msrvtt", "official"),
        ("msrvtt", "1k-A"),
        ("vatex", "retrieval"),
        ("activitynet", "official"),
        ("lsmdc", "1k"),
        ("jsonl", "official"),
    ],
)
def test_odd_but_usable_folders(tmp_path, capsys, format, protocol):
    odd_files.WRITERS[format](tmp_path)
    arguments = ("check", format, "--root", str(tmp_path), "--protocol", protocol)
    code, text = said(capsys, *arguments)
    assert code == 0 and text.endswith("\nusable\n") and "MISSING" not in text
    code, out = said(capsys, *arguments, "--json")
    found = json.loads(out)
    assert code == 0 and found["usable"] and found["shared"] is None and not found["faults"]
    for row in found["parts"]:
        assert row["Left out"] == sum(one["part"] == row["Part"] for one in found["left_out"])
        assert row["Left out"] == sum(row["Why"].values()) and row["Clips"]
    gone = [row for row in found["left_out"] if row["reason"].startswith("no video file")]
    assert sum(row["No video"] for row in found["parts"]) == len(gone)


def test_a_broken_file_or_parts_that_overlap_are_not_usable(tmp_path, capsys):
    odd_files.vatex(tmp_path)
    odd_files.put(tmp_path, "splits/test_list.txt", "val1_0000000_000000_000010\n")
    code, text = said(capsys, "check", "vatex", "--root", str(tmp_path), "--protocol", "retrieval")
    assert code == 1 and "parts overlap: clip val1_0000000_000000_000010 of test is also in val" in text
    odd_files.put(tmp_path, "vatex_training_v1.0.json", "[")
    code, text = said(capsys, "check", "vatex", "--root", str(tmp_path))
    assert code == 1 and "train: not usable: " in text and "broken JSON at line 1" in text


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (("check", "msrvt", "--root", "."), "format: 'msrvt' is not one of msrvtt"),
        (("check", "lsmdc", "--root", ".", "--protocol", "2k"), "protocol: '2k' is not one of official, 1k"),
        (("check", "vatex", "--root", "nowhere"), "nowhere: no such folder"),
        (("example", "new", "--clips", "4"), "clips: 4; at least 5"),
        (("example", "."), ".: is there already"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, wanted):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert cli.main(["data", *arguments]) == 1
    shown = capsys.readouterr()
    assert wanted in shown.err and len(shown.err.splitlines()) == 1 and not shown.out


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "my_clips"
    assert cli.main(["data", "example", str(folder), "--clips", "5"]) == 0
    return folder


def test_the_example_is_a_usable_folder_with_settings_that_fit_it(example, capsys):
    assert {path.name for path in example.iterdir()} == {"clips", "captions.jsonl", "run.yaml"}
    settings = load_run(example / "run.yaml")
    parts = {part: load("jsonl", settings.data.root, part) for part in ("train", "val")}
    assert (
        (settings.train_clips, settings.eval_clips) == tuple(len(p.clips) for p in parts.values()) == (4, 1)
    )
    assert not any(p.left_out or p.noted for p in parts.values())
    clip = parts["val"].clips[0]
    assert len(clip.captions["en"]) == 5 and clip.questions
    assert said(capsys, "check", "jsonl", "--root", str(example))[0] == 0


def test_small_frames_are_the_videos_frames_or_fewer(example):
    path = sorted((example / "clips").glob("*.mp4"))[0]
    whole = read_frames(path)
    assert (small_frames(path, 64) == whole).all()
    half = small_frames(path, 32)
    assert half.shape == (len(whole), 32, 32, 3)
    blocks = whole.reshape(len(whole), 32, 2, 32, 2, 3).mean((2, 4))
    assert abs(half - blocks).mean() < 4  # the same pictures, each pixel about the mean of four
    rate = 2.0
    few = small_frames(path, 64, fps=rate)
    times = [round(n / 8, 3) for n in range(len(whole))]  # 8 frames a second
    assert (few == whole[[n for n, t in enumerate(times) if t % 0.5 == 0]]).all()
    assert len(small_frames(path, 64, start_s=1.0, end_s=2.0)) == 8
    with pytest.raises(VideoError, match="no frame"):
        small_frames(path, 64, start_s=100.0)
    with pytest.raises(VideoError, match="not those that were checked"):
        small_frames(path, 64, sha256="0" * 64)
