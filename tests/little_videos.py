"""Small real videos for tests: each frame's brightness says which frame it is."""
import struct
from fractions import Fraction

import av
import numpy as np


def pictures(frames=12, height=32, width=64, seed=0, noise=4):
    """uint8 [T, H, W, 3]: frame t is grey 15 + 5t (t modulo 45), with a little texture."""
    rng = np.random.default_rng(seed)
    texture = rng.integers(0, noise, (1, height, width, 1))
    grey = 15 + 5 * (np.arange(frames) % 45)[:, None, None, None]
    return np.broadcast_to(grey + texture, (frames, height, width, 3)).astype(np.uint8)


def encode(path, frames=12, *, seed=0, height=32, width=64, fps=8, codec="libx264", noise=4, **options):
    """Write a video and return its path; options go to the encoder (g, bf, crf, x264-params ...)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if codec == "libx264":
            stream.options = {"preset": "veryfast", "crf": "10", "threads": "1"} | {
                key.replace("_", "-"): str(value) for key, value in options.items()}
        else:
            stream.bit_rate = 4_000_000
        for picture in pictures(frames, height, width, seed, noise):
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def shown(frames):
    """Which frame each picture of [T, H, W, 3] is, by its brightness."""
    return np.rint((frames.reshape(len(frames), -1).mean(axis=1) - 16.5) / 5).astype(int).tolist()


def damage(path, kind):
    """Spoil a file in place: cut (second half gone), head (no header), garbage, empty or gone."""
    data = bytearray(path.read_bytes())
    if kind == "gone":
        path.unlink()
        return path
    if kind == "cut":
        data = data[: len(data) // 2]
    elif kind == "head":
        data = data[200:]
    elif kind == "garbage":
        data = bytearray(np.random.default_rng(0).bytes(2000))
    elif kind == "empty":
        data = b""
    path.write_bytes(data)
    return path


def rotate(path, turns=1):
    """Have an MP4 file say that its pictures are to be shown turned clockwise by quarter turns."""
    cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[turns % 4]
    data = bytearray(path.read_bytes())
    matrix = data.find(b"tkhd") + 44
    rows = (cosine, sine, 0, -sine, cosine, 0, 0, 0)
    data[matrix:matrix + 36] = struct.pack(">9i", *(65536 * value for value in rows), 1 << 30)
    path.write_bytes(data)
    return path


def hide_start(path, ticks):
    """Have an MP4 file's edit list start that many ticks (of its video track) later."""
    data = bytearray(path.read_bytes())
    place = data.find(b"elst") + 16
    data[place:place + 4] = struct.pack(">i", struct.unpack(">i", data[place:place + 4])[0] + ticks)
    path.write_bytes(data)
    return path


def encode_at(path, times_ms, height=32, width=64):
    """A file of variable frame rate: frame t is shown from times_ms[t] on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time_ms, picture in zip(times_ms, pictures(len(times_ms), height, width), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
