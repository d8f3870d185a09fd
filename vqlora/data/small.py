"""Decode videos of any size into frames small enough to keep: resized, and at a lower rate if asked for."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation

from vqlora.data.cache import append_frames
from vqlora.frames.container import Picture, Video
from vqlora.frames.reader import VideoError
from vqlora.frames.sums import file_sha256
from vqlora.frames.workers import Job


def small_frames(path: Path, size: int, *, fps: float | None = None, start_s: float | None = None,
                 end_s: float | None = None, sha256: str | None = None) -> np.ndarray:
    """Frames of a video or of a stretch of it as uint8 RGB `[T, size, size, 3]`, one picture in memory.

    The picture is squeezed to a square (bicubic), so that nothing is cut away. With `fps` the first frame at
    or after every 1 / fps seconds is kept; a video that has fewer keeps all. Raises VideoError.
    """
    if sha256 is not None and file_sha256(path) != sha256:
        raise VideoError(path, None, "its bytes are not those that were checked")
    with Video(path, twice=sha256 is None) as video:
        pictures = video.pictures(start_s, end_s)
        kept = [_resized(picture, size) for picture in (pictures if fps is None else _thinned(pictures, fps))]
    if not kept:
        raise VideoError(path, None, f"no frame from {start_s or 0:g} s to {end_s} s")
    return np.stack(kept)


def decode_job(job: Job) -> dict:
    """A worker's job like `vqlora.data.cache.decode_job`, with `size` and `fps`."""
    wanted = {name: job[name] for name in ("fps", "start_s", "end_s", "sha256")}
    return append_frames(job, lambda: small_frames(Path(job["path"]), job["size"], **wanted))


def _thinned(pictures: Iterator[Picture], fps: float) -> Iterator[Picture]:
    first, taken = None, 0
    for picture in pictures:
        first = picture.time_s if first is None else first
        if (picture.time_s - first) * fps >= taken - 1e-6:
            taken = int((picture.time_s - first) * fps + 1e-6) + 1
            yield picture


def _resized(picture: Picture, size: int) -> np.ndarray:
    pixels = picture.rgb()
    if pixels.shape[:2] == (size, size):
        return pixels
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    return frame.reformat(width=size, height=size, interpolation=Interpolation.BICUBIC).to_ndarray()
