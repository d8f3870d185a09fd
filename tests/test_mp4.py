"""The table of frames read from MP4 boxes is the demuxer's, or there is none and the demuxer is asked."""
import struct

import av
import numpy as np
import pytest
from little_videos import encode, encode_at, hide_start, rotate

from vqlora.frames import select_frames
from vqlora.frames.container import Video, VideoError
from vqlora.frames.mp4 import mp4_packets
from vqlora.frames.reader import packets
from vqlora.frames.scores import packet_score


def demuxed(path):
    with Video(path, decode=False) as video:
        return video.packets()


def assert_same(table, other):
    for name in ("times_s", "bytes", "key", "bidirectional", "stamps"):
        assert np.array_equal(getattr(table, name), getattr(other, name)), name
    assert table.times_s.dtype == np.float64 and table.exact and other.exact
    assert table.promised == other.promised


X264 = {"plain": {}, "open-group": {"g": 8, "bf": 3, "x264_params": "open-gop=1"}, "keys": {"g": 1},
        "refresh": {"x264_params": "intra-refresh=1"}, "cuts": {"x264_params": "keyint=10:bframes=5"}}


@pytest.mark.parametrize("name", X264)
def test_the_table_and_the_score_are_those_of_the_demuxer(tmp_path, name):
    path = encode(tmp_path / "a.mp4", 40, **X264[name])
    table, other = mp4_packets(path), demuxed(path)
    assert_same(table, other)
    scores = [packet_score(t.bytes, t.key, t.bidirectional) for t in (table, other)]
    assert np.array_equal(*scores)


def test_other_codecs_rates_turns_and_sound(tmp_path):
    paths = [encode(tmp_path / "vp9.mp4", 9, codec="libvpx-vp9"), encode(tmp_path / "a.mov", 9),
             encode_at(tmp_path / "vfr.mp4", [0, 10, 30, 31, 500, 900, 910]),
             rotate(encode(tmp_path / "turned.mp4", 9)), with_sound(tmp_path / "sound.mp4")]
    for path in paths:
        assert_same(mp4_packets(path), demuxed(path))


def with_sound(path):
    """Sound first, so that the video is the second track and its frames lie in several chunks."""
    with av.open(str(path), "w") as container:
        sound, video = container.add_stream("aac", rate=8000), container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 32, "yuv420p"
        for number in range(60):
            noise = np.random.default_rng(number).normal(0, 0.1, (1, 320)).astype(np.float32)
            heard = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
            heard.sample_rate, heard.pts = 8000, 320 * number
            container.mux(sound.encode(heard))
            picture = np.full((32, 64, 3), 4 * number, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux([*sound.encode(), *video.encode()])
    return path


def test_what_is_out_of_the_ordinary_is_left_to_the_demuxer(tmp_path):
    for path in (encode(tmp_path / "one-reference.mp4", 24, bf=0, refs=1),  # more key frames than listed
                 hide_start(encode(tmp_path / "hidden.mp4", 24, bf=0), 5 * 16384 // 8),
                 encode(tmp_path / "a.mp4", 9, codec="mpeg4"), fragmented(tmp_path / "fragments.mp4"),
                 encode(tmp_path / "a.mkv", 9)):
        assert mp4_packets(path) is None, path
        assert len(packets(path)) == len(demuxed(path))
    assert mp4_packets(tmp_path / "gone.mp4") is None
    with pytest.raises(VideoError, match="no such file"):
        packets(tmp_path / "gone.mp4")


def fragmented(path):
    with av.open(str(path), "w", options={"movflags": "frag_keyframe+empty_moov"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for number in range(9):
            picture = np.full((32, 64, 3), 9 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("box, at, value", [
    (b"stsz", 12, 99), (b"stsz", 16, 1 << 30), (b"stsz", 16, 0), (b"stts", 8, 1 << 31), (b"stts", 12, 0),
    (b"ctts", 12, 1 << 31), (b"stsc", 12, 0), (b"stco", 12, 1 << 31), (b"stss", 12, 41), (b"elst", 12, 0),
    (b"elst", 16, 7), (b"mdhd", 16, 0), (b"moov", -4, 9), (b"stsd", 16, 0)])
def test_tables_that_disagree_are_not_believed(tmp_path, box, at, value):
    path = encode(tmp_path / "a.mp4", 40)
    data = bytearray(path.read_bytes())
    place = data.index(box) + at
    data[place:place + 4] = struct.pack(">I", value)
    path.write_bytes(data)
    assert mp4_packets(path) is None


def test_damaged_files_give_a_choice_or_an_error_that_names_them(tmp_path):
    path, rng = encode(tmp_path / "a.mp4", 24), np.random.default_rng(0)
    whole, given = path.read_bytes(), 0
    moov = whole.index(b"moov")
    for _ in range(60):
        data, place = bytearray(whole), int(rng.integers(moov, len(whole) - 8))
        data[place:place + 8] = rng.bytes(8)
        path.write_bytes(data)
        try:
            chosen = select_frames(path, 4, "packets")
            given += len(chosen) == 4
        except VideoError as error:
            assert str(path) in str(error)
    assert 0 < given < 60
