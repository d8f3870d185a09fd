"""Whether a file of a stream format is a gapless row of its packets, from the first byte to the last.

Decoders look for the next start of a packet wherever one is missing, so that a stream can be joined at any
time, and then say nothing of what was lost on the way. A file should have nothing to look for. Files of the
three formats that have no table of contents are walked here, in the memory of a packet or a block.
"""
from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

_BLOCK = 4096  # packets of a transport stream looked at in one go
_NULL_PID = 0x1FFF
_SIZES = ((188, 0), (192, 4), (204, 0))  # of its packets: bytes, and where 0x47 is among them


def stream_fault(path: Path, format_name: str) -> str | None:
    """What is wrong with the row of packets of a file in FFmpeg's format `mpegts`, `mpeg` or `flv`; None when
    nothing is, and for any other format."""
    walk = {"mpegts": _transport, "mpeg": _program, "flv": _flv}.get(format_name)
    if walk is None:
        return None
    with open(path, "rb") as file:
        end = file.seek(0, 2)
        file.seek(0)
        return walk(file, end)


def _transport(file: BinaryIO, end: int) -> str | None:
    """ISO/IEC 13818-1, 2.4.3: packets of 188 bytes that begin with 0x47, counted modulo 16 in each stream.
    There are files with four bytes before each (M2TS), or 16 behind."""
    start = np.frombuffer(file.read(204 * 32), np.uint8)
    hits = {(np.mean(start[first::size] == 0x47), size, first) for size, first in _SIZES}
    share, size, first = max(hits)
    if share < 0.5:
        return "no packet of a transport stream at byte 0"
    if end % size:
        return f"{end % size} bytes at the end are no whole packet of {size}"
    last: dict[int, int] = {}
    for place in range(0, end, size * _BLOCK):
        file.seek(place)
        rows = np.frombuffer(file.read(size * _BLOCK), np.uint8).reshape(-1, size)[:, first:first + 188]
        bad = np.flatnonzero((rows[:, 0] != 0x47) | (rows[:, 1] & 0x80 > 0))
        if len(bad):
            return f"no packet, or one marked as damaged, at byte {place + bad[0] * size}"
        pids = (rows[:, 1] & 0x1F).astype(np.int64) << 8 | rows[:, 2]
        counted = (rows[:, 3] & 0x10 > 0) & (pids != _NULL_PID)
        jumps = (rows[:, 3] & 0x20 > 0) & (rows[:, 4] > 0) & (rows[:, 5] & 0x80 > 0)  # announced
        for pid in np.unique(pids[counted]):
            mine = np.flatnonzero(counted & (pids == pid))
            counts = rows[mine, 3] & 15
            before = np.append(last.get(int(pid), (int(counts[0]) - 1) & 15), counts[:-1])
            steps = (counts - before) & 15
            wrong = mine[(steps > 1) & ~jumps[mine]]  # 0: sent twice, which is allowed
            if len(wrong):
                return f"packets are missing before byte {place + wrong[0] * size}"
            last[int(pid)] = int(counts[-1])
    return None


def _program(file: BinaryIO, end: int) -> str | None:
    """ISO/IEC 13818-1, 2.5.3 and 11172-1: pack headers and packets that say how long they are."""
    place = 0
    while place < end:
        file.seek(place)
        head = file.read(14)
        if head[:4] == b"RIFF" and not place:  # a Video CD's sectors around it
            return None
        if place and head[:3] == b"\0\0\0":  # padding to the end of a sector, as Video CDs have it
            zeros = head + file.read(1 << 12)
            place += max(1, len(zeros) - len(zeros.lstrip(b"\0")) - 2)
            continue
        if head[:3] != b"\0\0\1" or len(head) < 4 or head[3] < 0xB9:
            if place and not any(head) and place + len(head) == end:
                return None
            return f"no packet of a program stream at byte {place}"
        if head[3] == 0xB9:
            place += 4
        elif head[3] == 0xBA:
            place += 14 + (head[13] & 7) if len(head) == 14 and head[4] & 0xC0 == 0x40 else 12
        else:
            place += 6 + struct.unpack(">H", head[4:6])[0] if len(head) >= 6 else 6
    return f"the last packet ends {place - end} bytes past the file" if place > end else None


def _flv(file: BinaryIO, end: int) -> str | None:
    """Video File Format Specification 10, annex E: tags, each followed by its length (not relied on: some
    writers get it wrong)."""
    head = file.read(9)
    if len(head) < 9 or head[:3] != b"FLV":
        return "no FLV header"
    place = struct.unpack(">I", head[5:9])[0] + 4
    while place < end:
        file.seek(place)
        tag = file.read(11)
        if len(tag) < 11 or tag[0] & 0xC0 or tag[0] & 0x1F not in (8, 9, 18) or any(tag[8:11]):
            return f"no FLV tag at byte {place}"
        place += 11 + int.from_bytes(tag[1:4], "big") + 4
    return f"the last FLV tag ends {place - end} bytes past the file" if place > end + 4 else None
