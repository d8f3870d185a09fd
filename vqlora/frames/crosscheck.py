"""A second decoding beside the first, where two ways to decode a damaged file tell different things.

Most decoders read on through damaged bits and give a picture; a second one of the same kind gives the same
picture. In two codecs another way through the same bits exists, and it stumbles over most such damage:

- VP9: libvpx refuses bits read past the end of a tile; FFmpeg's own decoder takes them for zeros. (In VP8
  libvpx takes them for zeros, too.)
- HEVC whose rows of blocks can be decoded in parallel (x265's default): with threads FFmpeg's decoder starts
  each row where the slice header says (ISO/IEC 23008-2, 7.4.7.1, entry points), without them where the row
  before happened to end. After damage the pictures differ.

The second needs as much time as the first, so it runs only where a file is not known by its sha256.
"""
from __future__ import annotations

import zlib
from collections import deque
from typing import Any

import av
import numpy as np

_LIBVPX = {"vp9": "libvpx-vp9"}


def cross_check(context: Any) -> CrossCheck | None:
    """A second decoder for the codec of an opened stream; None where none would tell more."""
    codec = context.codec.canonical_name
    name = _LIBVPX.get(codec, codec)
    if codec not in (*_LIBVPX, "hevc") or name not in av.codecs_available:
        return None
    return CrossCheck(context, name, compare=codec == "hevc")


class CrossCheck:
    """Is given every packet and what the first decoder made of it. `compare` also compares the pictures:
    libvpx rounds otherwise than FFmpeg where a frame refers to one of another size, so there it is errors
    alone that count."""

    def __init__(self, context: Any, name: str, compare: bool):
        self._decoder = av.CodecContext.create(name, "r")
        self._decoder.extradata = context.extradata
        self._decoder.options = context.options
        self._decoder.thread_type, self._decoder.thread_count = "SLICE", 2 if compare else 1
        self._compare, self._sums = compare, (deque(), deque())

    def follow(self, packet: Any, frames: list[Any]) -> None:
        """Raises ValueError or av.FFmpegError where the second decoder disagrees."""
        second = self._decoder.decode(packet if packet.size else None)  # None: what is still held back
        if not self._compare:
            return
        for queue, given in zip(self._sums, (frames, second), strict=True):
            queue.extend(map(_sum, given))
        while all(self._sums):
            if self._sums[0].popleft() != self._sums[1].popleft():
                raise ValueError("its rows do not start where the slice header says")
        if not packet.size and any(self._sums):
            raise ValueError("two ways to decode it give different numbers of frames")


def _sum(frame: Any) -> int:
    """A checksum over what is shown of a frame's planes, as stored."""
    value = 0
    for plane in frame.planes:
        rows = np.frombuffer(plane, np.uint8)[: plane.height * plane.line_size]
        sample = -(-frame.format.components[0].bits // 8)
        rows = rows.reshape(plane.height, plane.line_size)[:, : plane.width * sample]
        value = zlib.crc32(np.ascontiguousarray(rows), value)
    return value
