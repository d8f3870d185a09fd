"""A scene becomes a video file: H.264 with an optional AAC track, the same bytes in every process.

This module and what it imports are all that a file's bytes depend on; `write` hashes them, so a change of
captions renders nothing again.
"""

import errno
import hashlib
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from .audio import RATE_HZ, soundtrack
from .domains import DOMAINS
from .render import render
from .scenes import sample_scene
from .sprites import load_sprites

FPS = 8
_AAC = {"aac_coder": "fast", "b": "32000"}
# Without cpu-independent, x264's AVX-512 code gives other bytes for
# about one clip in three each time it runs, although in one thread.
_H264 = {"preset": "veryfast", "threads": "1", "x264-params": "cpu-independent=1"}


class RenderError(OSError):
    """A file could not be written; the message is one line that names it."""


def render_job(job: dict) -> dict:
    """Render and write a clip: {domain, part, index, seed, audio, path} -> {bytes, sha256} or {fault}."""
    path = Path(job["path"])
    domain = DOMAINS[job["domain"]]
    scene = sample_scene(domain, job["part"], job["index"], job["seed"])
    frames = render(scene, load_sprites())
    try:
        data = write_video(path, frames, soundtrack(scene, FPS) if job["audio"] else None, domain.crf)
    except RenderError as error:
        return {"fault": str(error)}
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_video(path: Path, frames: np.ndarray, sound: np.ndarray | None = None, crf: int = 18) -> bytes:
    """Encode uint8 frames `[T, H, W, 3]` at `FPS`, and mono sound if given, to `path`; returns its bytes.

    Written under a temporary name and renamed when complete. Raises RenderError (say, on a full disk).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            container.flags |= 0x0400  # bit-exact: no encoder version or time in the header
            _encode(container, frames, sound, crf)
        data = temporary.read_bytes()
        os.replace(temporary, path)
    except OSError as error:  # PyAV's errors of the file system are OSErrors, too
        temporary.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise RenderError(f"{path}: {'the disk is full' if full else error.strerror or error}") from None
    return data


def _encode(container, frames: np.ndarray, sound: np.ndarray | None, crf: int) -> None:
    video = container.add_stream("libx264", rate=FPS, options={"crf": str(crf), **_H264})
    video.height, video.width = frames.shape[1:3]
    video.pix_fmt = "yuv420p"
    video.codec_context.thread_count = 1
    convert = VideoReformatter()  # one for all frames: setting it up costs more than using it
    tone = None
    if sound is not None:
        tone = container.add_stream("aac", rate=RATE_HZ, layout="mono", options=dict(_AAC))
    for number, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = convert.reformat(picture, format="yuv420p", threads=1)
        picture.pts, picture.time_base = number, Fraction(1, FPS)
        container.mux(video.encode(picture))
    container.mux(video.encode())
    if tone is not None:
        for start in range(0, len(sound), 1024):
            piece = av.AudioFrame.from_ndarray(sound[None, start:start + 1024], format="fltp", layout="mono")
            piece.sample_rate, piece.pts, piece.time_base = RATE_HZ, start, Fraction(1, RATE_HZ)
            container.mux(tone.encode(piece))
        container.mux(tone.encode())
