"""The frames of an MP4 file as its own tables list them: what a demuxer would say, without opening one.

Opening a container in FFmpeg takes most of the time that listing the packets of a short clip costs: it sets
up decoders and reads ahead. The sample tables of ISO/IEC 14496-12 have all that is wanted. Only files are
taken in which nothing is left to interpretation (see `mp4_packets`); the demuxer has the word on all others.
"""
from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vqlora.frames.container import Packets

_CODECS = {b"avc1", b"hvc1", b"hev1", b"av01", b"vp09"}  # each packet of these is a frame
_PLAIN = {b"ftyp", b"mdat", b"moov", b"free", b"skip", b"wide", b"udta", b"uuid"}
_OPEN_TO_QUESTION = {b"stps", b"sgpd", b"sbgp", b"stz2"}  # may change which frames are key frames
_MOST = 1 << 28  # bytes of tables: a hundred days of video


class _Unusual(Exception):
    """Something for the demuxer to judge."""


def mp4_packets(path: Path) -> Packets | None:
    """The same as the demuxer's table, or None unless the file is plain: boxes without a gap from the first
    byte to the last, no fragments, a single description of the frames, at most one edit and that one hiding
    no frame, tables that agree about the number of frames, and all frames within the file."""
    try:
        with open(path, "rb") as file:
            moov, end = _moov(file)
        return _packets(moov, end)
    except (OSError, _Unusual, struct.error, LookupError, ValueError):
        return None


def _moov(file) -> tuple[bytes, int]:
    end, place, moov = os.fstat(file.fileno()).st_size, 0, None
    while place < end:
        file.seek(place)
        size, kind = struct.unpack(">I4s", file.read(8))
        head = 8
        if size == 1:
            size, head = struct.unpack(">Q", file.read(8))[0], 16
        if kind not in _PLAIN or size < head or place + size > end:
            raise _Unusual
        if kind == b"moov":
            if moov is not None or size > _MOST:
                raise _Unusual
            moov = file.read(size - head)
        place += size
    if moov is None:
        raise _Unusual
    return moov, end


def _packets(moov: bytes, end: int) -> Packets:
    movie, track = {}, None
    for kind, body in _boxes(moov):
        if kind == b"mvex":
            raise _Unusual
        if kind == b"mvhd":
            movie = dict(mvhd=body)
        elif kind == b"trak" and track is None:
            boxes = _only(body)
            media = _only(boxes[b"mdia"])
            if media[b"hdlr"][8:12] == b"vide":
                track = boxes | media | _only(_only(media[b"minf"])[b"stbl"])
    if track is None or _OPEN_TO_QUESTION & track.keys():
        raise _Unusual
    entry = track[b"stsd"][8:]
    if _u32(track[b"stsd"], 4) != 1 or entry[4:8] not in _CODECS:
        raise _Unusual
    sizes = _table(track[b"stsz"], 8, 1)[:, 0]
    n = len(sizes)
    if _u32(track[b"stsz"], 4) or not n or not sizes.all() or not _inside(track, sizes, end):
        raise _Unusual
    ticks, scale = _runs(track[b"stts"], n), _scale(track[b"mdhd"])
    if ticks.min() < 1:
        raise _Unusual
    stamps = np.cumsum(ticks) - ticks
    if b"ctts" in track:
        stamps = stamps + _runs(track[b"ctts"], n)
    if b"edts" in track:
        stamps = stamps - _edit(_only(track[b"edts"])[b"elst"], stamps, scale, _scale(movie["mvhd"]))
    key = np.ones(n, bool)
    if b"stss" in track:
        numbers = _table(track[b"stss"], 4, 1)[:, 0]
        if not len(numbers) or numbers.min() < 1 or numbers.max() > n:
            raise _Unusual
        key[:] = False
        key[numbers - 1] = True
        if entry[4:8] == b"avc1" and _h264_references(_only(entry[86:])[b"avcC"]) < 2:
            raise _Unusual  # FFmpeg then takes every I frame for a key frame, listed or not
    highest = np.maximum.accumulate(stamps)
    order = np.argsort(stamps, kind="stable")
    shown = stamps[order]
    if (shown[1:] == shown[:-1]).any():
        raise _Unusual
    return Packets((shown - shown[0]) * (1 / scale), sizes[order], key[order], (stamps < highest)[order],
                   shown, True, n)


def _inside(track: dict[bytes, bytes], sizes: np.ndarray, end: int) -> bool:
    """Whether every frame, where the tables say it lies, is within the file."""
    wide = b"co64" in track
    body = track[b"co64" if wide else b"stco"]
    starts = np.frombuffer(body, ">u8" if wide else ">u4", offset=8).astype(np.int64)
    runs = _table(track[b"stsc"], 4, 3)  # (first chunk, frames in each, description) up to the next row
    if len(starts) != _u32(body, 4) or runs[0, 0] != 1 or (runs[:, 2] != 1).any():
        return False
    chunks = np.diff(runs[:, 0], append=len(starts) + 1)
    if (chunks < 1).any() or (runs[:, 1] < 1).any():
        return False
    each = np.repeat(runs[:, 1], chunks)
    if each.sum() != len(sizes):
        return False
    ends = starts + np.add.reduceat(sizes, np.cumsum(each) - each)
    return bool(starts.min() > 0 and ends.max() <= end)


def _edit(body: bytes, stamps: np.ndarray, scale: int, movie_scale: int) -> int:
    """Where the one edit starts, in ticks: at the first frame shown, and it must last beyond the last."""
    count, long = _u32(body, 4), body[0]
    duration, start, rate = struct.unpack(">QqI" if long else ">IiI", body[8:28 if long else 20])
    lasts = duration * scale // movie_scale
    if count != 1 or rate != 1 << 16 or start != stamps.min() or stamps.max() - start >= lasts:
        raise _Unusual
    return start


def _h264_references(config: bytes) -> int:
    """`max_num_ref_frames` of the first parameter set in an avcC box (ISO/IEC 14496-10, 7.3.2.1.1)."""
    if not config[5] & 31:
        raise _Unusual
    unit = config[8:8 + struct.unpack_from(">H", config, 6)[0]].replace(b"\0\0\3", b"\0\0")
    bits, place = f"{int.from_bytes(unit[4:], 'big'):0{8 * len(unit[4:])}b}", 0

    def number() -> int:
        nonlocal place
        zeros = bits.index("1", place) - place
        place += 2 * zeros + 1
        return int(bits[place - zeros - 1:place], 2) - 1

    number()
    if unit[1] in (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135):
        if number() == 3:  # chroma
            place += 1
        number(), number()
        place += 2
        if bits[place - 1] == "1":  # scaling lists
            raise _Unusual
    number()
    order = number()
    if order == 0:
        number()
    elif order == 1:
        raise _Unusual
    return number()


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 0
    while place < len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        if size < 8 or place + size > len(data):
            raise _Unusual
        yield kind, data[place + 8:place + size]
        place += size


def _only(data: bytes) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    for kind, body in _boxes(data):
        if kind in found and kind not in (b"free", b"udta"):
            raise _Unusual
        found[kind] = body
    return found


def _table(body: bytes, at: int, columns: int) -> np.ndarray:
    """int64 `[rows, columns]` of 32-bit numbers, after their count at byte `at`, which must be right."""
    rows = np.frombuffer(body, ">u4", offset=at + 4).reshape(-1, columns)
    if len(rows) != _u32(body, at):
        raise _Unusual
    return rows.astype(np.int64)


def _runs(body: bytes, n: int) -> np.ndarray:
    """(count, value) rows written out: int64 `[n]`; negative and huge values are unusual."""
    rows = _table(body, 4, 2)
    if rows[:, 0].sum() != n or rows[:, 1].max() >= 1 << 31:
        raise _Unusual
    return np.repeat(rows[:, 1], rows[:, 0])


def _scale(body: bytes) -> int:
    """Ticks per second, of an mvhd or mdhd box."""
    scale = _u32(body, 20 if body[0] else 12)
    if not scale:
        raise _Unusual
    return scale


def _u32(body: bytes, at: int) -> int:
    return struct.unpack_from(">I", body, at)[0]
