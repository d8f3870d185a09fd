"""Decode video files, or raise: never a frame that was not asked for, never fewer than asked.

>>> read_frames("clip.mp4", [0, 5, 9]).shape        # by number
(3, 240, 320, 3)
>>> read_at("clip.mp4", [0.0, 1.5]).shape           # by time in seconds
(2, 240, 320, 3)
>>> sizes = [picture.rgb().mean() for picture in stream("film.mkv")]    # any length, one frame in memory

PyAV decodes strictly, which finds damage that breaks the format's rules. Damage that does not is found by
the file's sha256 alone: pass `sha256` from a manifest (`vqlora.frames.manifest`) and not a byte can differ.
decord reads whole files whose manifest says what must be `shown`, and PyAV those it reads otherwise: by
itself decord takes many damaged files for good ones, repeats the last frame of files with an edit list, and
errs in transport streams. A file is opened for each call and shared with nobody.
"""
from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vqlora.frames.container import (  # noqa: F401  what users of the reader need is found in one place
    Packets,
    Picture,
    Video,
    VideoError,
    VideoInfo,
    reason_of,
)
from vqlora.frames.mp4 import mp4_packets
from vqlora.frames.sums import file_sha256

OK = "ok"
BACKENDS = ("auto", "pyav", "decord")
_SEEK_FROM = 400  # frames; below, decoding from the start costs less than listing all packets to seek by


@dataclass(frozen=True)
class VideoCheck:
    """What decoding every frame found; `verdict` is "ok" or the reason why the file cannot be used.

    `seek` is False where a frame reached by seeking was not the same as in the decode from the start (none
    such was met in tests; up to four frames of a long file are tried): then tell `read_frames`. `shown` is a
    hash over the pixels of all frames.
    """

    sha256: str
    frames: int
    width: int
    height: int
    fps: float
    duration_s: float
    verdict: str
    seek: bool = True
    shown: str = ""


def probe(path: Path) -> VideoInfo:
    """Read the header only. Raises VideoError."""
    with Video(path, strict=False) as video:
        return video.info()


def check(path: Path, sha256: str | None = None) -> VideoCheck:
    """Hash a file, decode every frame strictly (no decoder error, no frame marked corrupt, none missing) and
    verify the container's own checksums.

    With `sha256` the file must also have that hash. Never raises for a bad file: the verdict says what is
    wrong. "ok" without `sha256` means that nothing contradicts the format: bytes overwritten inside the
    pictures of an MP4 or AVI before anybody took its hash may still have gone unseen.
    """
    path, count, found, seek, shown = Path(path), 0, "", True, _Shown()
    info = VideoInfo(0, 0, 0, 0.0, 0.0)
    try:
        found = file_sha256(path)
        if sha256 is not None and found != sha256:
            raise VideoError(path, None, "not the bytes that its sha256 was taken of")
        tries: dict[int, np.ndarray] = {}
        with Video(path, twice=sha256 is None) as video:
            info = video.info()
            for picture in video.pictures():
                pixels = picture.rgb()
                if count % _SEEK_FROM == _SEEK_FROM - 1 and len(tries) < 4:
                    tries[count] = pixels
                shown.add(pixels)
                count += 1
        for number, picture in tries.items():
            sought = _sought(path, {number})
            seek = seek and (sought is None or np.array_equal(sought[number], picture))
        verdict = OK
    except VideoError as error:
        verdict = error.reason if error.frame is None else f"frame {error.frame}: {error.reason}"
    except OSError as error:
        verdict = reason_of(error)
    duration_s = info.duration_s or (count / info.fps if info.fps else 0.0)
    of_frames = shown.hex() if verdict == OK else ""
    return VideoCheck(found, count, info.width, info.height, info.fps, duration_s, verdict, seek, of_frames)


def packets(path: Path) -> Packets:
    """Sizes, times and types of the compressed frames, without decoding any. Raises VideoError."""
    if (table := mp4_packets(path)) is not None:
        return table
    try:
        with Video(path, decode=False) as video:
            return video.packets()
    except VideoError:  # FLV and MPEG tell what is in them only when some of it is decoded
        with Video(path) as video:
            return video.packets()


def frame_times(path: Path) -> np.ndarray:
    """When each frame is first shown, float64 `[T]` seconds from the first one. Raises VideoError."""
    table = packets(path)
    if table.exact:
        return table.times_s
    with Video(path) as video:
        return np.array([picture.time_s for picture in video.pictures()])


def stream(path: Path, sha256: str | None = None, *, twice: bool | None = None) -> Iterator[Picture]:
    """Every frame in order of display, in constant memory: `picture.rgb()`, `.yuv()`, `.number`, `.time_s`.

    `twice` decodes VP9 and HEVC by a second way too, which shows most damage that the first does not; by
    default where no `sha256` vouches for the file. Raises VideoError at the frame where damage shows, also at
    the end for frames that are missing.
    """
    _verify(path, sha256)
    with Video(path, twice=sha256 is None if twice is None else twice) as video:
        yield from video.pictures()


def read_at(path: Path, times_s: Sequence[float] | np.ndarray, *, sha256: str | None = None) -> np.ndarray:
    """The frames on show at given moments, in seconds from the first frame, as uint8 RGB `[T, H, W, 3]`.

    Right for variable frame rates. Raises VideoError for a moment before the video or after its last frame.
    """
    times, shown = np.asarray(times_s, dtype=np.float64).ravel(), frame_times(path)
    gaps = np.diff(shown)
    end_s = max(shown[-1] + (np.median(gaps) if len(gaps) else 0.0), probe(path).duration_s)
    for time_s in times[~((times >= 0) & (times <= end_s))]:
        raise VideoError(path, None, f"no frame at {time_s:g} s; the video lasts {end_s:g} s")
    return read_frames(path, np.searchsorted(shown, times + 1e-6, side="right") - 1, sha256=sha256)


def read_frames(path: Path, indices: Sequence[int] | np.ndarray | None = None, *,
                start_s: float | None = None, end_s: float | None = None, expected: int | None = None,
                sha256: str | None = None, shown: str = "", seek: bool = True,
                backend: str = "auto") -> np.ndarray:
    """All frames of a video, or some, as uint8 RGB `[T, H, W, 3]`, upright.

    `indices` are frame numbers in order of display, in any order, repeats allowed. `start_s` and `end_s`
    choose the frames shown from start (inclusive) to end (exclusive); `indices` then count within that
    stretch. `expected` (the number of frames of the whole file), `sha256` and `shown` come from a manifest.
    `backend` "auto" takes decord for whole files whose frames are known, if the result is as `shown`. Far
    frames of a long video are reached by `seek`ing to a key frame where time stamps prove that it is right,
    else by decoding from the start. Raises VideoError naming file and frame, for an index outside the video
    as well.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    _verify(path, sha256)
    whole = start_s is None and end_s is None
    if backend == "auto" and shown and whole and indices is None:
        frames = _decord_frames(Path(path), shown)
        if frames is not None:
            return frames
    if backend == "decord":
        if indices is not None or not whole:
            raise ValueError("decord reads whole files only here: its seeks give wrong frames in open groups")
        frames = _read_decord(Path(path))
        if expected not in (None, len(frames)):
            raise VideoError(path, len(frames), f"decord gives {len(frames)} frames of {expected}")
        return frames
    wanted = None if indices is None else np.asarray(indices, dtype=np.int64).ravel()
    if wanted is not None and not len(wanted):
        raise VideoError(path, None, "no frames asked for")
    if wanted is not None and wanted.min() < 0:
        raise VideoError(path, int(wanted.min()), "frame numbers start at 0")
    last = None if wanted is None else int(wanted.max())
    keep = None if wanted is None else set(wanted.tolist())
    picked = _sought(Path(path), keep) if keep and whole and seek and last >= _SEEK_FROM else None
    if picked is None:
        picked = _decoded(path, keep, last, start_s, end_s, twice=sha256 is None)
    if wanted is None and whole and expected is not None and len(picked) != expected:
        raise VideoError(path, len(picked), f"PyAV gives {len(picked)} frames of {expected}")
    if len({picture.shape for picture in picked.values()}) > 1:
        raise VideoError(path, None, "the picture size changes within the video")
    return np.stack([picked[n] for n in (sorted(picked) if wanted is None else wanted.tolist())])


def _decoded(path: Path, keep: set[int] | None, last: int | None, start_s: float | None,
             end_s: float | None, twice: bool) -> dict[int, np.ndarray]:
    picked, number = {}, -1
    with Video(path, twice=twice) as video:
        for picture in video.pictures(start_s, end_s):
            number = picture.number
            if keep is None or number in keep:
                picked[number] = picture.rgb()
            if number == last:
                break
    if last is not None and number < last:
        raise VideoError(path, last, f"the video has {number + 1} frames")
    return picked


def _sought(path: Path, keep: set[int]) -> dict[int, np.ndarray] | None:
    """Frames by seeking, or None where that is not certain to give the right ones.

    A frame's number is the rank of its time stamp among all packets'. It is decoded from the last key frame
    that is not shown after it and recognised by its time stamp, so leading pictures of an open group, decoder
    delay and imprecise seeks cannot put another in its place.
    """
    stat = os.stat(path)
    table = _packets(path, stat.st_size, stat.st_mtime_ns)
    if table is None or max(keep) >= len(table):
        return None
    keys, groups = np.flatnonzero(table.key), {}
    for number in sorted(keep):
        before = keys[keys <= number]
        if not len(before):
            return None
        groups.setdefault(int(before[-1]), []).append(number)
    picked = {}
    with Video(path) as video:
        for key, numbers in groups.items():
            stamps = {int(table.stamps[number]): number for number in numbers}
            found = video.pictures_at(int(table.stamps[key]), set(stamps))
            if found is None:
                return None
            picked |= {stamps[stamp]: picture for stamp, picture in found.items()}
    return picked


@lru_cache(maxsize=8)
def _packets(path: Path, size: int, modified_ns: int) -> Packets | None:
    """The packets of a file in its present state; None when frame numbers cannot be read off them."""
    table = packets(path)
    return table if table.exact and table.promised in (0, len(table)) else None


def _verify(path: Path, sha256: str | None) -> None:
    if sha256 is None:
        return
    try:
        found = file_sha256(path)
    except OSError as error:
        raise VideoError(path, None, reason_of(error)) from None
    if found != sha256:
        raise VideoError(path, None, "changed or damaged since its manifest was written")


def _read_decord(path: Path) -> np.ndarray:
    decord = _decord()
    if not path.is_file():
        raise VideoError(path, None, "no such file")
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        return reader.get_batch(range(len(reader))).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise VideoError(path, None, f"decord: {reason_of(error)}") from None


def _decord_frames(path: Path, shown: str) -> np.ndarray | None:
    """What decord gives for a file, if it is there and gives what must be `shown`."""
    try:
        frames = _read_decord(path)
    except (VideoError, ImportError):
        return None
    found = _Shown()
    for pixels in frames:
        found.add(pixels)
    return frames if found.hex() == shown else None


class _Shown:
    """A hash over the pixels of frames, one after the other."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, pixels: np.ndarray) -> None:
        self._hash.update(f"{pixels.shape}".encode())
        self._hash.update(np.ascontiguousarray(pixels))

    def hex(self) -> str:
        return self._hash.hexdigest()


@cache
def _decord() -> Any:
    """decord, imported on first use and told to keep FFmpeg's chatter to itself. Raises ImportError without
    it."""
    decord = importlib.import_module("decord")
    decord.logging.set_level(decord.logging.QUIET)
    return decord
