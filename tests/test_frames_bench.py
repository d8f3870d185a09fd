"""The speed tables say what was measured, on videos that are what they claim to be."""
import numpy as np
import pytest
from little_videos import encode

from vqlora.frames import api, bench
from vqlora.frames.reader import check, read_frames

pytest.importorskip("pandas")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v")
    return [bench.render(folder / "scenes.mp4", 100, 64, 96, 0), encode(folder / "grey.mp4", 12)]


@pytest.fixture(scope="module")
def rows(videos):
    return bench.measure(videos, repeat=3)


def test_a_rendered_video_has_scenes_in_which_something_moves(videos):
    frames = read_frames(videos[0]).astype(int)
    assert frames.shape == (100, 64, 96, 3) and check(videos[0]).verdict == "ok"
    steps = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    assert set(np.argsort(steps)[-2:] + 1) == {40, 80}


def test_ratios_are_taken_within_rounds_and_held_against_their_aims(rows):
    times = {"pixel policy": [1.0, 2.0, 3.0], "decord": [1.0, 1.0, 4.0], "pyav": [8.0] * 3,
             "packet policy": [1.0, 4.0, 2.0]}
    row = {"video": "a", "frames": 999, "width": 4, "height": 2, "times_s": times}
    table = bench.speed_table([row, row | {"video": "b", "frames": 1000}]).set_index(["video", "ratio"])
    pixel = table.loc["a", "pixel policy / raw decord"]
    assert (pixel["low"], pixel["median"], pixel["high"], pixel["rounds"]) == (0.875, 1.0, 1.5, 3)
    assert pixel["at_most"] and pixel["aim"] == 1.15 and pixel["met"]
    packets = table.xs("full decode / packet policy", level="ratio")
    assert packets["median"].tolist() == [4, 4] and packets["aim"].tolist() == [4, 20]
    assert packets["met"].tolist() == [True, False]
    assert not any("ContentDetector" in name for name in table.index.get_level_values("ratio"))
    assert len(bench.times_table(rows)) == sum(len(row["times_s"]) for row in rows)


def test_the_default_policy_is_among_what_is_measured(rows):
    assert api.DEFAULT in rows[0]["times_s"]
    assert any(bench.RATIOS[name][1] == api.DEFAULT and bench.RATIOS[name][2] for name in bench.RATIOS)


def test_the_packet_policy_costs_a_fraction_of_decoding(rows):
    table = bench.speed_table(rows[:1]).set_index("ratio")
    assert table.loc["full decode / packet policy", "low"] > 4


def test_cuts_are_those_of_the_scenes_and_of_pyscenedetect(videos, rows):
    table = bench.cuts_table(rows).set_index("video")
    assert table.loc["scenes.mp4", "ours"] == "40 80" and table.loc["grey.mp4", "cuts"] == 0
    if "ContentDetector" in rows[0]["times_s"]:
        assert table["equal"].tolist() == [True, True]


def test_coverage_grows_with_k_and_the_loss_is_a_difference(videos):
    table = bench.coverage_table(videos[:1], ks=(2, 16))
    assert (table["packets"].iloc[1] > table["packets"].iloc[0]) and table["packets"].iloc[1] > 0.5
    assert np.allclose(table["loss"], table["cumulative-coverage"] - table["packets"], atol=2e-4)


def test_the_command_writes_its_tables(videos, tmp_path, capsys):
    assert bench.main([str(videos[1]), "--repeat", "1", "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "speed.csv", "times.csv", "cuts.csv", "packet_coverage.csv"}
    assert "full decode / packet policy" in capsys.readouterr().out
