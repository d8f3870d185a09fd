"""An open video file, strict about damage: the one place that talks to PyAV's demuxer and decoders.

Strict means: decoder errors end the reading (`err_detect=explode`), error concealment is not accepted (the
decoder's mark on a frame it has patched up is an error), a file must hold as many frames as its header
says, its container must be whole (`vqlora.frames.sums`, `vqlora.frames.gapless`), and in some codecs another
way to decode the same bits must agree (`vqlora.frames.crosscheck`). What is left is damage that decodes
without a fault, which only a checksum of the file shows.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vqlora.frames.crosscheck import cross_check
from vqlora.frames.gapless import stream_fault
from vqlora.frames.sums import container_fault

_STRICT = {"err_detect": "crccheck+bitstream+buffer+explode"}
_STRICTER = {  # by codec; no encoder's file tried was refused for it
    "h264": {"err_detect": _STRICT["err_detect"] + "+aggressive"},  # CAVLC slices must use up their bits
    "av1": {"strict": "1"},  # and the symbols of a tile theirs
}
_MAX_PIXELS = 1 << 26  # 8k x 8k: a damaged header must not ask for gigabytes
# Codecs whose packets each show one frame. VP8's hidden reference frames are packets of their own and are
# told by a bit; other codecs count only where the header's number of frames is that of the packets.
_ONE_EACH = {"h264", "hevc", "vp8", "vp9", "av1", "ffv1", "mjpeg", "png", "gif", "prores"}
_LUMA = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "yuv411p", "yuv410p", "gray"}


class VideoError(Exception):
    """A video that cannot be decoded as asked: `path`, `frame` (its number, None for the whole file),
    `reason`."""

    def __init__(self, path: Path | str, frame: int | None, reason: str):
        self.path, self.frame, self.reason = Path(path), frame, reason
        super().__init__(f"{path}: " + (reason if frame is None else f"frame {frame}: {reason}"))

    def __reduce__(self):
        return VideoError, (self.path, self.frame, self.reason)


@dataclass(frozen=True)
class VideoInfo:
    """What a file's header says; `frames` is 0 where the container does not tell (WebM, MKV). `width` and
    `height` are as stored, before any rotation."""

    frames: int
    width: int
    height: int
    fps: float
    duration_s: float


@dataclass(frozen=True)
class Packets:
    """The compressed frames of a video in order of display; T of them, known without decoding any.

    `times_s` float64 from the first frame's; `bytes` int64; `key` and `bidirectional` (shown before a frame
    that was stored earlier) bool. `exact` says that every packet shows one frame and has its own time stamp,
    so that packet t is frame t; where it is False (MPEG-2 streams, broken files) times are evenly spaced and
    t is a guess. `stamps` are presentation stamps in the stream's own unit, `promised` the number of frames
    in the header (or 0).
    """

    times_s: np.ndarray
    bytes: np.ndarray
    key: np.ndarray
    bidirectional: np.ndarray
    stamps: np.ndarray
    exact: bool
    promised: int

    def __len__(self) -> int:
        return len(self.bytes)


class Picture:
    """One decoded frame: its `number` (from 0, in order of display), `time_s` (from the first frame's) and
    its pixels, upright as a player shows them. Valid until the next one is asked for, unless copied."""

    __slots__ = ("_converter", "_frame", "number", "time_s")

    def __init__(self, frame: Any, number: int, time_s: float, converter: VideoReformatter):
        self._frame, self.number, self.time_s, self._converter = frame, number, time_s, converter

    def rgb(self) -> np.ndarray:
        """uint8 `[H, W, 3]`, a copy."""
        plane = (picture := self._converter.reformat(self._frame, format="rgb24")).planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(picture.height, plane.line_size)
        pixels = rows[:, : picture.width * 3].reshape(picture.height, picture.width, 3)
        return np.ascontiguousarray(self._upright(pixels)) if self._frame.rotation else pixels.copy()

    def yuv(self, colour: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        """(Y `[H, W]`, U, V, full range): views of the decoder's own uint8 planes, not converted to RGB.

        Without `colour`, as in grey videos, U and V are one grey pixel: getting at two planes more costs as
        much as scoring a small frame.
        """
        frame = self._frame
        if frame.format.name not in _LUMA:
            frame = self._converter.reformat(frame, format="yuv420p")
        planes = [self._upright(self._plane(plane)) for plane in frame.planes[:None if colour else 1]]
        grey = np.full((1, 1), 128, np.uint8)
        full = frame.color_range == 2 or frame.format.name.startswith("yuvj")
        return planes[0], *(planes[1:] or (grey, grey)), full

    @staticmethod
    def _plane(plane: Any) -> np.ndarray:
        rows = np.frombuffer(plane, np.uint8)[: plane.height * plane.line_size]
        return rows.reshape(plane.height, plane.line_size)[:, : plane.width]

    def _upright(self, pixels: np.ndarray) -> np.ndarray:
        return np.rot90(pixels, round(self._frame.rotation / 90)) if self._frame.rotation else pixels


class Video:
    """An open container and its first video stream, with errors turned into VideoError.

    `twice` also decodes by a second way where that shows more damage (VP9, HEVC), in twice the time.
    """

    def __init__(self, path: Path | str, strict: bool = True, decode: bool = True, twice: bool = False):
        self.path, self._second = Path(path), None
        options = dict(_STRICT) if strict else {}
        try:
            # To open a file FFmpeg decodes its first frames (44 ms at 720p); listing packets needs none.
            self.container = av.open(str(path), options=options,
                                     stream_options=None if decode else [{"skip_frame": "all"}])
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise VideoError(path, None, reason_of(error, self.path)) from None
        if not self.container.streams.video:
            self.container.close()
            raise VideoError(path, None, "no video stream")
        self.stream = self.container.streams.video[0]
        if self.stream.codec_context is None:
            self.container.close()
            raise VideoError(path, None, "no decoder for its codec")
        self.stream.thread_type = "NONE"
        if strict:
            context = self.stream.codec_context
            stricter = _STRICTER.get(context.codec.canonical_name, {})
            context.options = options | {"max_pixels": str(_MAX_PIXELS)} | stricter
            self._second = cross_check(context) if twice else None

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def info(self) -> VideoInfo:
        stream = self.stream
        rate = stream.average_rate or stream.guessed_rate or 0
        duration_s = (self.container.duration or 0) / av.time_base
        if stream.duration:
            duration_s = float(stream.duration * stream.time_base)
        return VideoInfo(stream.frames, stream.width, stream.height, float(rate), duration_s)

    def packets(self) -> Packets:
        """Demux the whole stream without decoding. Raises VideoError for an unreadable or empty one."""
        rows, highest, codec = [], -math.inf, self.stream.codec_context.codec.canonical_name
        try:
            for packet in self.container.demux(self.stream):
                size = packet.size
                if not size or packet.is_discard:  # the flush at the end; frames cut off by an edit list
                    continue
                if codec == "vp8" and not memoryview(packet)[0] & 0x10:  # RFC 6386, 9.1: not to be shown
                    continue
                stamp = packet.pts
                place = len(rows) if stamp is None else stamp
                rows.append((place, size, packet.is_keyframe, place < highest, stamp is None))
                highest = max(highest, place)
        except (av.error.FFmpegError, ValueError) as error:
            raise VideoError(self.path, len(rows), reason_of(error)) from None
        if not rows:
            raise VideoError(self.path, None, "no frames")
        table = np.array(rows, dtype=np.int64)
        one_each = codec in _ONE_EACH or self.stream.frames == len(table)
        exact = one_each and not table[:, 4].any() and len(np.unique(table[:, 0])) == len(table)
        if exact:
            table = table[np.argsort(table[:, 0], kind="stable")]
            times_s = (table[:, 0] - table[0, 0]) * float(self.stream.time_base)
        else:
            times_s = np.arange(len(table)) / (self.info().fps or 1.0)
        return Packets(times_s, table[:, 1], table[:, 2] > 0, table[:, 3] > 0, table[:, 0], exact,
                       self.stream.frames)

    def pictures(self, start_s: float | None = None, end_s: float | None = None) -> Iterator[Picture]:
        """Decode in order of display, strictly. A whole file must hold as many frames as its header says;
        numbers count from the first frame given."""
        stream, number, converter = self.stream, 0, VideoReformatter()
        whole, step = start_s is None and end_s is None, float(stream.time_base)
        start, end = start_s or 0.0, math.inf if end_s is None else end_s
        origin = stream.start_time or 0
        first, counts = None, [0, 0]
        try:
            if start:
                self.container.seek(origin + int(start / stream.time_base), stream=stream)
            for frame in self._decoded(counts):
                if frame.is_corrupt:
                    raise VideoError(self.path, number, "damaged")
                if frame.pts is None and not whole:
                    raise VideoError(self.path, number, "no time stamp")
                first = frame.pts if first is None else first
                if whole:
                    time_s = 0.0 if frame.pts is None else (frame.pts - (first or 0)) * step
                else:
                    time_s = float((frame.pts - origin) * stream.time_base)
                    if time_s < start - 1e-6:
                        continue
                    if time_s >= end - 1e-6:
                        break
                yield Picture(frame, number, time_s, converter)
                number += 1
        except (av.error.FFmpegError, ValueError) as error:
            raise VideoError(self.path, number, reason_of(error)) from None
        if whole and not self._complete(number, *counts):
            raise VideoError(self.path, number, f"ends after {number} of {stream.frames} frames")
        if whole:  # a cut Matroska file just ends
            fault = container_fault(self.path) or stream_fault(self.path, self.container.format.name)
            if fault:
                raise VideoError(self.path, None, fault)
        if number == 0:
            asked = "" if whole else f" from {start:g} to {end:g} s"
            raise VideoError(self.path, None, f"no frames{asked}")

    def pictures_at(self, key: int, stamps: set[int]) -> dict[int, np.ndarray] | None:
        """RGB pictures by presentation stamp, decoded from the key frame at `key` on; None unless the seek
        came down on that very key frame and every stamp was met exactly."""
        found, converter, landed = {}, VideoReformatter(), False
        try:
            self.container.seek(key, stream=self.stream)
            self.stream.codec_context.flush_buffers()
            for packet in self.container.demux(self.stream):
                if not landed and packet.size:
                    if not packet.is_keyframe or packet.pts is None or packet.pts > key:
                        return None
                    landed = True
                # What no other frame refers to need not be decoded on the way.
                self.stream.codec_context.skip_frame = "DEFAULT" if packet.pts in stamps else "NONREF"
                for frame in packet.decode():
                    if frame.pts in stamps:
                        if frame.is_corrupt:
                            return None
                        found[frame.pts] = Picture(frame, 0, 0.0, converter).rgb()
                        if len(found) == len(stamps):
                            return found
        except (av.error.FFmpegError, ValueError):
            pass  # the caller decodes from the start and so finds which frame is at fault
        return None

    def _decoded(self, counts: list[int]) -> Iterator[Any]:
        """Frames; `counts` becomes [packets, packets that an edit list hides]."""
        for packet in self.container.demux(self.stream):
            counts[0] += packet.size > 0
            counts[1] += packet.size > 0 and packet.is_discard
            frames = packet.decode()
            if self._second:
                self._second.follow(packet, frames)
            yield from frames

    def _complete(self, frames: int, packets: int, hidden: int) -> bool:
        """Whether there are as many frames as promised; frames hidden by an edit list are not missing."""
        promised = self.stream.frames
        return promised in (0, frames) or (hidden > 0 and packets == promised and frames == packets - hidden)


def reason_of(error: Exception, path: Path | None = None) -> str:
    """One line for people, starting in lower case."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if path is not None and path.is_file() and path.stat().st_size == 0:
        return "empty file"
    text = (getattr(error, "strerror", None) or str(error)).strip().splitlines() or ["cannot be read"]
    return text[0][:1].lower() + text[0][1:]
