"""The reader gives the frames that were asked for or an error that names the file; selection is pure."""
import json
import pickle
from types import SimpleNamespace

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from little_videos import damage, encode, hide_start, pictures, shown

from vqlora.data.batches import footage_of
from vqlora.data.clips import Clip, TrueEvent
from vqlora.frames import manifest, reader, workers
from vqlora.frames.manifest import check_videos
from vqlora.frames.policies import policy
from vqlora.frames.reader import VideoError, check, probe, read_frames
from vqlora.frames.select import cover, jittered, mixed, uniform
from vqlora.frames.workers import run_jobs

HAS_DECORD = True
try:
    import decord  # noqa: F401
except ImportError:
    HAS_DECORD = False
BACKENDS = ["pyav", pytest.param("decord", marks=pytest.mark.skipif(not HAS_DECORD, reason="no decord here"))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_frames_in_order_close_to_what_was_encoded(tmp_path, backend):
    path = encode(tmp_path / "a.mp4", 12)
    frames = read_frames(path, backend=backend)
    assert frames.shape == (12, 32, 64, 3) and frames.dtype == np.uint8
    assert shown(frames) == list(range(12))
    assert np.abs(frames.astype(int) - pictures(12)).mean() < 3


@pytest.mark.skipif(not HAS_DECORD, reason="no decord here")
@pytest.mark.parametrize("size", [(32, 64), (64, 64), (34, 96)])
def test_both_decoders_give_the_same_bytes(tmp_path, size):
    path = encode(tmp_path / "a.mp4", 9, height=size[0], width=size[1], seed=3)
    assert np.array_equal(read_frames(path, backend="decord"), read_frames(path, backend="pyav"))


@pytest.mark.skipif(not HAS_DECORD, reason="no decord here")
def test_decord_reads_known_files_and_is_not_believed_where_it_shows_something_else(tmp_path, monkeypatch):
    plain = encode(tmp_path / "a.mp4", 12)
    hidden = hide_start(encode(tmp_path / "b.mp4", 24, bf=0, fps=8), 5 * 16384 // 8)
    known = {path: check(path).shown for path in (plain, hidden)}
    assert shown(read_frames(hidden, shown=known[hidden])) == list(range(5, 24))  # decord repeats the last
    monkeypatch.setattr(reader, "_decoded", None)  # no PyAV from here on
    assert shown(read_frames(plain, shown=known[plain])) == list(range(12))
    with pytest.raises(TypeError):
        read_frames(hidden, shown=known[hidden])


@pytest.mark.parametrize("options", [{}, {"g": 6, "bf": 3, "x264_params": "open-gop=1"}, {"g": 1}])
def test_frames_by_number_are_right_for_any_group_structure(tmp_path, options):
    path = encode(tmp_path / "a.mp4", 40, **options)
    for wanted in ([0], [39], [7, 7, 3], [9, 11, 13, 38], list(range(40))):
        assert shown(read_frames(path, wanted)) == wanted
    for number in range(0, 40, 3):
        assert shown(read_frames(path, np.array([number]))) == [number]


@pytest.mark.parametrize("suffix, codec", [("mp4", "mpeg4"), ("mkv", "libx264"), ("webm", "libvpx-vp9")])
def test_other_codecs_and_containers(tmp_path, suffix, codec):
    path = encode(tmp_path / f"a.{suffix}", 10, codec=codec)
    assert shown(read_frames(path)) == list(range(10))
    assert check(path).verdict == "ok" and check(path).frames == 10


@pytest.mark.parametrize("options", [{}, {"g": 6, "bf": 3, "x264_params": "open-gop=1"}])
def test_a_stretch_in_seconds_is_start_inclusive_end_exclusive(tmp_path, options):
    path = encode(tmp_path / "a.mp4", 40, fps=8, **options)
    assert shown(read_frames(path, start_s=1.5, end_s=3.0)) == list(range(12, 24))
    assert shown(read_frames(path, [0, 2], start_s=1.5, end_s=3.0)) == [12, 14]
    assert shown(read_frames(path, end_s=0.5)) == [0, 1, 2, 3]
    assert shown(read_frames(path, start_s=4.5)) == [36, 37, 38, 39]
    with pytest.raises(VideoError, match="no frames from 9 to 10 s"):
        read_frames(path, start_s=9, end_s=10)


def test_probe_and_check_agree(tmp_path):
    path = encode(tmp_path / "a.mp4", 12, fps=8)
    info, found = probe(path), check(path)
    assert (info.frames, info.width, info.height, info.fps, info.duration_s) == (12, 64, 32, 8.0, 1.5)
    assert (found.frames, found.duration_s, found.verdict, len(found.sha256)) == (12, 1.5, "ok", 64)


@pytest.mark.parametrize("kind", ["cut", "head", "garbage", "empty", "gone"])
def test_damaged_files_raise_one_line_with_the_name(tmp_path, kind):
    path = damage(encode(tmp_path / "b.mp4", 24), kind)
    assert check(path).verdict != "ok"
    for indices in (None, [0, 23]):
        with pytest.raises(VideoError) as caught:
            read_frames(path, indices)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason
    expected = {"empty": "empty file", "gone": "no such file"}
    assert kind not in expected or caught.value.reason == expected[kind]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_with_fewer_frames_than_known_is_caught(tmp_path, backend):
    path = encode(tmp_path / "c.mkv", 24, g=1)  # MKV does not say how many frames it holds: only a manifest
    assert probe(path).frames == 0 and len(read_frames(path, expected=24, backend=backend)) == 24
    with pytest.raises(VideoError, match="24 frames of 30"):
        read_frames(path, expected=30, backend=backend)


def test_a_file_cut_between_two_frames_is_caught_by_its_own_header(tmp_path):
    with av.open(str(encode(tmp_path / "a.mp4", 24))) as source, av.open(
            str(tmp_path / "b.mp4"), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    path = tmp_path / "b.mp4"
    with av.open(str(path)) as video:
        places = [packet.pos for packet in video.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: places[16]])  # every frame that is there decodes well
    assert check(path).verdict == "frame 16: ends after 16 of 24 frames"
    with pytest.raises(VideoError, match="of 24 frames"):
        read_frames(path, backend="pyav")


def test_frames_that_the_decoder_marks_as_damaged_are_never_used(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", 6)

    class Marking(reader.Video):
        """Stands in for damage that FFmpeg conceals and only marks: rare, and not in every version."""

        def _decoded(self, counts):
            for number, frame in enumerate(super()._decoded(counts)):
                yield SimpleNamespace(is_corrupt=True, pts=frame.pts) if number == 4 else frame

    monkeypatch.setattr(reader, "Video", Marking)
    assert check(path).verdict == "frame 4: damaged"


def test_wrong_requests_are_refused(tmp_path):
    path = encode(tmp_path / "a.mp4", 5)
    with pytest.raises(VideoError, match="frame 5: the video has 5 frames"):
        read_frames(path, [1, 5])
    with pytest.raises(VideoError, match="start at 0"):
        read_frames(path, [-1])
    with pytest.raises(VideoError, match="no frames asked for"):
        read_frames(path, [])
    with pytest.raises(ValueError, match="'cv2' is not one of auto, pyav, decord"):
        read_frames(path, backend="cv2")
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(VideoError, match="text.mp4"):
        probe(tmp_path / "text.mp4")


def test_works_without_decord(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", 6)

    def absent():
        raise ImportError("No module named 'decord'")

    monkeypatch.setattr(reader, "_decord", absent)
    assert shown(read_frames(path, shown=check(path).shown)) == list(range(6))
    with pytest.raises(ImportError):
        read_frames(path, backend="decord")


# --- manifest and workers


def test_manifest_is_made_once_and_made_again_for_a_changed_file(tmp_path, monkeypatch):
    paths = [encode(tmp_path / "v" / f"{i}.mp4", 4, seed=i) for i in range(3)] + [tmp_path / "v" / "gone.mp4"]
    damage(paths[1], "cut")
    seen = []
    monkeypatch.setattr(manifest, "check", lambda path, sha256: seen.append(path.name) or check(path))
    first = check_videos(paths, tmp_path / "cache", workers=1, progress=False)
    assert {path.name: found.verdict == "ok" for path, found in first.items()} == {
        "0.mp4": True, "1.mp4": False, "2.mp4": True}
    assert sorted(seen) == ["0.mp4", "1.mp4", "2.mp4"]
    assert check_videos(paths, tmp_path / "cache", progress=False) == first and len(seen) == 3
    encode(paths[1], 5)
    again = check_videos(paths, tmp_path / "cache", progress=False)
    assert seen[3:] == ["1.mp4"] and again[paths[1]].frames == 5 and again[paths[0]] == first[paths[0]]


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"version": 0, "files": {"0.mp4": 1}})])
def test_a_damaged_manifest_is_made_anew(tmp_path, text):
    path = encode(tmp_path / "v" / "0.mp4", 4)
    check_videos([path], tmp_path / "cache", progress=False)
    (file,) = (tmp_path / "cache" / "manifests").glob("*.json")
    file.write_text(text)
    assert check_videos([path], tmp_path / "cache", progress=False)[path].verdict == "ok"
    assert json.loads(file.read_text())["files"]["0.mp4"]["check"]["frames"] == 4


def test_workers_answer_every_job_and_survive_those_that_kill_their_process():
    answers = {}
    run_jobs("little_jobs:double", [{"n": n} for n in range(20)], workers=2, each=answers.__setitem__)
    assert answers == {n: {"died": 7} if n in (5, 6, 7) else {"twice": 2 * n} for n in range(20)}


def test_few_small_files_start_no_process_and_many_do(tmp_path, monkeypatch):
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda pid: range(4), raising=False)
    path = encode(tmp_path / "a.mp4", 2)
    counts = [workers._worth_starting([{"path": str(path)}] * n) for n in (0, 1, 50, 350, 5000)]
    assert counts == [1, 1, 1, 3, 4]


def test_an_error_in_a_job_reaches_the_caller():
    jobs = [{"n": n} for n in (*range(10, 29), 99)]
    with pytest.raises(RuntimeError, match="'n': 99.*ValueError: odd job"):
        run_jobs("little_jobs:double", jobs, workers=2, each=lambda index, result: None)


# --- selection

lengths = st.integers(1, 200)
counts = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(lengths, counts, st.integers(0, 5))
def test_every_policy_gives_sorted_distinct_frames_and_as_many_as_there_are(n, k, seed):
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, n, seed)
    events = [TrueEvent("dog", "spin", int(s), int(min(n, s + 4))) for s in starts]
    for chosen in (uniform(n, k), jittered(n, k, rng), mixed(n, k, rng), cover(n, k, events)):
        assert len(chosen) == min(n, k)
        assert np.all(np.diff(chosen) > 0) and chosen[0] >= 0 and chosen[-1] < n


def test_uniform_takes_the_centres_of_equal_spans():
    assert uniform(40, 4).tolist() == [5, 15, 25, 35]
    assert uniform(40, 1).tolist() == [20]
    assert uniform(96, 8).tolist() == [6, 18, 30, 42, 54, 66, 78, 90]
    assert uniform(3, 8).tolist() == [0, 1, 2]
    for n, k in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            uniform(n, k)


def test_cover_sees_short_events_that_uniform_misses():
    events = [TrueEvent("dog", "spin", 8, 12), TrueEvent("cat", "left", 21, 25),
              TrueEvent("bee", "blink", 70, 74)]

    def seen(frames):
        return [any(e.start <= f < e.end for f in frames) for e in events]

    for k in range(3, 20):
        assert seen(cover(96, k, events)) == [True] * 3
    assert seen(uniform(96, 4)) != [True] * 3
    assert seen(cover(96, 2, events)) == [True, True, False]
    assert {7, 12} <= set(cover(96, 9, events).tolist())  # a change shows against the frames before and after


def test_cover_without_events_is_uniform_and_needs_to_know_them():
    assert cover(40, 8, []).tolist() == uniform(40, 8).tolist()
    footage = footage_of(Clip("a", None, "test", {}), np.zeros((40, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="clip a: select 'cover' needs its true events"):
        policy("cover")(footage, 8, np.random.default_rng(0))
    with pytest.raises(ValueError, match="'best' is not one of uniform, jittered, random, mixed, keyframes"):
        policy("best")
