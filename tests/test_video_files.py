"""Awkward and damaged files: the right frame for every number and time, or an error that names the file."""
import collections
import hashlib
import multiprocessing
from pathlib import Path

import av
import numpy as np
import pytest
from little_videos import damage, encode, encode_at, hide_start, pictures, rotate, shown

from vqlora.frames import reader
from vqlora.frames.gapless import stream_fault
from vqlora.frames.manifest import check_videos
from vqlora.frames.reader import (
    VideoError,
    check,
    frame_times,
    packets,
    probe,
    read_at,
    read_frames,
    stream,
)
from vqlora.frames.sums import container_fault, file_sha256, read_sums

OPEN_GROUPS = {"g": 12, "bf": 3, "x264_params": "open-gop=1"}


@pytest.mark.parametrize("suffix, codec, options", [
    ("mp4", "libx264", OPEN_GROUPS), ("ts", "libx264", {}), ("flv", "libx264", {}), ("avi", "libx264", {}),
    ("mkv", "libx264", OPEN_GROUPS), ("mpg", "mpeg2video", {}), ("mkv", "ffv1", {}), ("ogv", "libvpx", {}),
])
def test_every_container_gives_every_frame_by_number_and_in_a_stream(tmp_path, suffix, codec, options):
    path = encode(tmp_path / f"a.{suffix}", 24, codec=codec, height=64, **options)
    assert check(path).verdict == "ok" and len(packets(path)) == 24
    assert shown(read_frames(path)) == list(range(24))
    assert shown(read_frames(path, [17, 2, 2])) == [17, 2, 2]
    seen = [(picture.number, shown(picture.rgb()[None])[0]) for picture in stream(path)]
    assert seen == [(n, n) for n in range(24)]


@pytest.mark.parametrize("height, width, codec", [(33, 47, "mpeg4"), (1, 64, "ffv1"), (31, 17, "libvpx-vp9")])
def test_odd_sizes_and_single_frames(tmp_path, height, width, codec):
    path = encode(tmp_path / "a.mkv", 1, height=height, width=width, codec=codec)
    assert check(path).verdict == "ok"
    frames = read_frames(path)
    assert frames.shape == (1, height, width, 3) and shown(frames) == [0]
    assert next(iter(stream(path))).yuv()[0].shape == (height, width)
    assert read_at(path, [0.0]).shape == frames.shape


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turned_pictures_are_upright(tmp_path, turns):
    path = encode(tmp_path / "a.mp4", 3, height=32, width=64)
    plain = read_frames(path)
    turned = read_frames(rotate(path, turns))
    assert np.array_equal(turned, np.rot90(plain, -turns, axes=(1, 2)))
    assert next(iter(stream(path))).yuv()[0].shape == turned.shape[1:3]
    decord = pytest.importorskip("decord")  # noqa: F841  another reader that turns them
    assert np.array_equal(turned, read_frames(path, backend="decord"))


def test_brightness_alone_is_the_same_without_the_colour_planes(tmp_path):
    for picture in stream(encode(tmp_path / "a.mp4", 2)):
        y, u, v, full = picture.yuv(colour=False)
        assert np.array_equal(y, picture.yuv()[0]) and full == picture.yuv()[3] and np.ptp(y) > 0
        assert u.tolist() == v.tolist() == [[128]]


def test_frames_hidden_by_an_edit_list_are_neither_shown_nor_missed(tmp_path):
    path = hide_start(encode(tmp_path / "a.mp4", 24, bf=0, fps=8), 5 * 16384 // 8)
    assert check(path).verdict == "ok" and check(path).frames == 19 and probe(path).frames == 24
    assert shown(read_frames(path)) == list(range(5, 24)) == shown(read_frames(path, range(19)))
    assert len(frame_times(path)) == 19 and shown(read_at(path, [0.0, 1.0])) == [5, 13]


def test_times_of_a_variable_rate(tmp_path):
    times_ms = [0, 40, 80, 500, 520, 2000, 2001, 2050, 5000]
    path = encode_at(tmp_path / "a.mp4", times_ms)
    assert np.allclose(frame_times(path), np.array(times_ms) / 1000)
    assert shown(read_at(path, [0, 0.03, 0.3, 1.99, 2.0, 2.0015, 5.0])) == [0, 0, 2, 4, 5, 6, 8]
    assert [round(1000 * picture.time_s) for picture in stream(path)] == times_ms
    for moment in (-0.1, 99.0, float("nan")):
        with pytest.raises(VideoError, match="no frame at"):
            read_at(path, [0.0, moment])


@pytest.mark.parametrize("suffix, options", [
    ("mp4", {"g": 40, "bf": 3, "x264_params": "open-gop=1"}), ("mkv", {"g": 30, "bf": 2}), ("ts", {"g": 25}),
    ("mp4", {"g": 50, "x264_params": "intra-refresh=1"}), ("avi", {"g": 40, "bf": 0}),
])
def test_far_frames_are_the_same_by_seeking_as_from_the_start(tmp_path, monkeypatch, suffix, options):
    path = encode(tmp_path / f"a.{suffix}", 130, height=16, width=16, **options)
    everything = read_frames(path)
    monkeypatch.setattr(reader, "_SEEK_FROM", 1)
    for number in (3, 29, 39, 40, 41, 77, 78, 79, 80, 119, 129):
        assert np.array_equal(read_frames(path, [number])[0], everything[number]), number
    assert np.array_equal(read_frames(path, [129, 5, 60]), everything[[129, 5, 60]])
    assert check(path).seek
    with pytest.raises(VideoError, match="frame 130: the video has 130 frames"):
        read_frames(path, [130])


def test_hidden_reference_frames_of_vp8_are_not_counted(tmp_path, monkeypatch):
    path = tmp_path / "a.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx", rate=8, options={"lag-in-frames": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 32, "yuv420p", 4_000_000
        for t, picture in enumerate(pictures(30)):
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                data = bytearray(bytes(packet))
                data[0] &= 0xEF if t == 11 else 0xFF  # not to be shown
                changed = av.Packet(bytes(data))
                changed.stream, changed.pts, changed.dts = stream, packet.pts, packet.dts
                changed.time_base, changed.is_keyframe = packet.time_base, packet.is_keyframe
                container.mux(changed)
    monkeypatch.setattr(reader, "_SEEK_FROM", 1)
    assert len(packets(path)) == len(read_frames(path)) == 29
    assert shown(read_frames(path, [10, 11, 25])) == [10, 12, 26]


def test_seeking_decodes_little(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", 130, height=16, width=16, g=10)
    monkeypatch.setattr(reader, "_SEEK_FROM", 1)
    monkeypatch.setattr(reader, "_decoded", None)  # decoding from the start would fail
    assert shown(read_frames(path, [100, 125])) == [100 % 45, 125 % 45]


def test_a_stream_keeps_one_frame_and_tells_of_missing_ones_at_its_end(tmp_path):
    path = damage(encode(tmp_path / "a.mkv", 40, g=5), "cut")
    seen = []
    with pytest.raises(VideoError, match=r"a\.mkv"):
        for picture in stream(path):
            seen.append(shown(picture.rgb()[None])[0])
    assert seen == list(range(len(seen))) and 0 < len(seen) < 40


# --- checksums


def overwrite(path, seed):
    """Spoil four bytes in the last two thirds of a file, keeping its length."""
    data, rng = bytearray(path.read_bytes()), np.random.default_rng(seed)
    place = int(rng.integers(len(data) // 3, len(data) - 8))
    data[place:place + 4] = bytes(255 - value for value in data[place:place + 4])
    path.write_bytes(data)


@pytest.mark.parametrize("suffix, codec", [("mp4", "libx264"), ("webm", "libvpx-vp9")])
def test_no_later_damage_passes_a_known_sha256(tmp_path, suffix, codec):
    whole = encode(tmp_path / f"a.{suffix}", 12, codec=codec, noise=60).read_bytes()
    path, sha256 = tmp_path / f"b.{suffix}", hashlib.sha256(whole).hexdigest()
    for seed in range(10):
        path.write_bytes(whole)
        assert len(read_frames(path, sha256=sha256)) == 12
        overwrite(path, seed)
        assert check(path, sha256).verdict != "ok"
        for read in (lambda: read_frames(path, sha256=sha256), lambda: read_frames(path, [3], sha256=sha256),
                     lambda: list(stream(path, sha256)), lambda: read_at(path, [0.5], sha256=sha256)):
            with pytest.raises(VideoError, match="changed or damaged since its manifest was written"):
                read()


def test_some_damage_within_h264_pictures_breaks_no_rule(tmp_path):
    """Why checksums are needed: if this ever fails, the decoder has become stricter, and the text is old."""
    whole, passed = encode(tmp_path / "a.mp4", 12, noise=60).read_bytes(), 0
    for seed in range(30):
        (path := tmp_path / "b.mp4").write_bytes(whole)
        overwrite(path, seed)
        passed += check(path).verdict == "ok"
    assert passed > 0


@pytest.mark.parametrize("name, codec", [("a.mkv", "libx264"), ("a.ogv", "libvpx")])
def test_checksums_of_the_container_find_overwritten_bytes(tmp_path, name, codec):
    path = encode(tmp_path / name, 12, noise=60, codec=codec)
    assert container_fault(path) is None
    whole = path.read_bytes()
    for seed in range(20):
        path.write_bytes(whole)
        overwrite(path, seed)
        assert check(path).verdict != "ok", seed
    path.write_bytes(whole[:len(whole) * 3 // 4])
    assert container_fault(path)
    assert container_fault(encode(tmp_path / "a.mp4", 2)) is None


@pytest.mark.parametrize("name, codec, options", [
    ("a.webm", "libvpx-vp9", {}), ("a.mp4", "libx265", {"height": 144})])
def test_a_second_way_to_decode_finds_overwritten_bytes(tmp_path, monkeypatch, name, codec, options):
    path = encode(tmp_path / name, 12, noise=60, codec=codec, **{"width": 176, "height": 96} | options)
    whole, found = path.read_bytes(), {True: 0, False: 0}
    assert check(path).verdict == "ok"
    for seed in range(12):
        path.write_bytes(whole)
        overwrite(path, seed)
        for twice in found:
            try:
                collections.deque(stream(path, twice=twice), 0)
            except VideoError:
                found[twice] += 1
    assert found[True] >= 10 and found[True] > found[False]
    path.write_bytes(whole)
    monkeypatch.setattr("vqlora.frames.container.cross_check", None)  # not for a file that is known
    assert len(read_frames(path, sha256=hashlib.sha256(whole).hexdigest())) == 12


@pytest.mark.parametrize("name, codec", [
    ("a.ts", "libx264"), ("a.m2ts", "libx264"), ("a.mpg", "mpeg2video"), ("a.flv", "libx264")])
def test_streams_must_be_gapless(tmp_path, name, codec):
    path = encode(tmp_path / name, 24, fps=25, noise=60, codec=codec)
    whole = path.read_bytes()
    assert check(path).verdict == "ok"
    middle, size = len(whole) // 2, 192 if "m2" in name else 188
    packet = 12 * size  # at a packet's start in a transport stream
    spoilt = {"cut": whole[:middle + 5], "hole": whole[:middle] + whole[middle + 50:], "head": whole[9:],
              "twice": whole[:middle] + whole[middle - 31:]}
    if "ts" in name:
        spoilt["packets"] = whole[:packet] + whole[packet + size:]
    for kind, data in spoilt.items():
        path.write_bytes(data)
        assert check(path).verdict != "ok", kind
        with pytest.raises(VideoError):
            read_frames(path)


def test_padding_is_no_gap_and_a_jump_is(tmp_path):
    path = encode(tmp_path / "a.mpg", 24, fps=25, noise=60, codec="mpeg2video")
    program = path.read_bytes()
    second = program.index(b"\0\0\1\xba", 4)
    path.write_bytes(program[:second] + bytes(20) + program[second:] + bytes(3000))
    assert stream_fault(path, "mpeg") is None
    whole = bytearray(encode(tmp_path / "a.ts", 24, noise=60).read_bytes())
    path.write_bytes(whole + whole)  # two recordings, one after the other
    assert "packets are missing" in stream_fault(path, "mpegts")
    assert stream_fault(path, "matroska,webm") is None


def test_listed_sums_are_required_and_a_new_list_is_noticed(tmp_path):
    good, bad = (encode(tmp_path / "v" / f"{name}.mp4", 4) for name in "ab")
    cache = tmp_path / "cache"
    assert all(found.verdict == "ok" for found in check_videos([good, bad], cache, progress=False).values())
    lines = [f"{file_sha256(good)}  a.mp4", f"{'0' * 64} *./b.mp4"]
    (tmp_path / "v" / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    assert read_sums(tmp_path / "v") == {"a.mp4": file_sha256(good), "b.mp4": "0" * 64}
    found = check_videos([good, bad], cache, progress=False)
    assert (found[good].verdict, found[bad].verdict) == ("ok", "not the bytes that its sha256 was taken of")
    (tmp_path / "v" / "SHA256SUMS").unlink()
    assert check_videos([bad], cache, progress=False)[bad].verdict == "ok"
    (tmp_path / "v" / "SHA256SUMS").write_text("nonsense\n")
    with pytest.raises(ValueError, match="line 1 is 'nonsense'"):
        check_videos([bad], cache, progress=False)


# --- workers


def _first_grey(path):
    return shown(read_frames(Path(path), [7]))[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_reads_in_forked_and_spawned_workers_after_a_read_in_the_parent(tmp_path, method):
    path = encode(tmp_path / "a.mp4", 12)
    pictures(1), read_frames(path)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply_async(_first_grey, (str(path),)).get(timeout=60) == 7
