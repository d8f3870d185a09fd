"""Checksums of video files: what tells damage that decodes without a fault.

Most codecs carry no checksum of the picture. Bytes overwritten inside an H.264, MPEG-4 or MJPEG frame often
decode to a wrong picture without an error in any decoder (all follow the same rules; where two ways to decode
differ, see `vqlora.frames.crosscheck`). Three things do show it, and this module has all three:

- the sha256 of the file against one taken while the file was whole (a manifest, or the publisher's list);
- `SHA256SUMS` beside the videos, as written by `sha256sum *`;
- the CRC-32 of every cluster in Matroska files (where the writer put one, as FFmpeg does in MKV but not in
  WebM) and of every page in Ogg files, where FFmpeg would merely leave the page out.

What none of them can show: a file in MP4, AVI, WebM or a stream format that was damaged in this way before
anybody took its hash.
"""
from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

SUMS_FILE = "SHA256SUMS"
_SEGMENT, _CRC32, _EBML = 0x18538067, 0xBF, b"\x1a\x45\xdf\xa3"
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_LINE = re.compile(r"\\?([0-9a-fA-F]{64}) [ *](.+)")


def file_sha256(path: Path) -> str:
    """Hex. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_sums(folder: Path) -> Mapping[str, str]:
    """File name -> sha256 from `SHA256SUMS` in a folder; empty when there is none. Raises ValueError for a
    line that is none."""
    sums, file = {}, Path(folder) / SUMS_FILE
    if not file.is_file():
        return sums
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            match = _LINE.fullmatch(line)
            if not match:
                raise ValueError(f"{file}: line {number} is {line[:40]!r}; expected a sha256, two spaces and "
                                 "a name")
            sums[match[2].removeprefix("./")] = match[1].lower()
    return sums


def container_fault(path: Path) -> str | None:
    """What a container's own checksums say is wrong; None when nothing is, or when it has none.

    Also says where the file is not a gapless row of the container's elements, as after a cut.
    """
    with open(path, "rb") as file:
        kind = file.read(4)
        end = file.seek(0, 2)
        if kind == _EBML:
            return _matroska_fault(file, end)
        return _ogg_fault(file, end) if kind == b"OggS" else None


def _matroska_fault(file: BinaryIO, end: int) -> str | None:
    """RFC 9559: a CRC-32 element, where there is one, comes first in its parent and is taken over the rest of
    it, least significant byte first. Elements of level 1 are looked at, one at a time."""
    place = 0
    while place < end:
        file.seek(place)
        head = _element(file.read(12))
        if head is None:
            return f"no Matroska element at byte {place}"
        kind, size, start = head
        if kind == _SEGMENT:  # its children follow
            place += start
            continue
        if size is None:  # live recordings: the length was not known; nothing to check it by
            return None
        place += start + size
        if place > end:
            return f"an element at byte {place - start - size} ends {place - end} bytes past the file"
        file.seek(place - size)
        crc = file.read(min(6, size))
        if len(crc) == 6 and crc[0] == _CRC32 and crc[1] == 0x84:
            value, left = 0, size - 6
            while left and (block := file.read(min(left, 1 << 20))):
                value, left = zlib.crc32(block, value), left - len(block)
            if value != int.from_bytes(crc[2:], "little"):
                return f"wrong CRC-32 of the {size} bytes before byte {place}"
    return None


def _ogg_fault(file: BinaryIO, end: int) -> str | None:
    """RFC 3533: each page has the CRC-32 of itself, its own field taken as 0, and a running number.

    Ogg's CRC takes bits in the other order than zlib's and starts from 0: hence the reversed bytes.
    """
    place, following, open_streams = 0, {}, set()
    while place < end:
        file.seek(place)
        head = file.read(27)
        if head[:4] != b"OggS" or len(head) < 27:
            return f"no Ogg page at byte {place}"
        lengths = file.read(head[26])
        page = head[:22] + bytes(4) + head[26:] + lengths + file.read(sum(lengths))
        value = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
        if int(f"{value:032b}"[::-1], 2) != int.from_bytes(head[22:26], "little"):
            return f"wrong CRC-32 of the Ogg page at byte {place}"
        serial, number = head[14:18], int.from_bytes(head[18:22], "little")
        if number != following.get(serial, number):
            return f"Ogg pages are missing before byte {place}"
        following[serial] = number + 1
        open_streams = (open_streams | {serial}) - ({serial} if head[5] & 4 else set())
        place += len(page)
    return "the end of an Ogg stream is missing" if open_streams else None


def _element(head: bytes) -> tuple[int, int | None, int] | None:
    """(id, size or None if unknown, bytes of id and size) of an EBML element, None if it is none."""
    if len(head) < 2 or not head[0]:
        return None
    id_bytes = 9 - head[0].bit_length()
    if id_bytes > 4 or len(head) <= id_bytes or not head[id_bytes]:
        return None
    size_bytes = 9 - head[id_bytes].bit_length()
    field = head[id_bytes:id_bytes + size_bytes]
    if len(field) < size_bytes:
        return None
    size = int.from_bytes(field, "big") & ((1 << 7 * size_bytes) - 1)
    known = size != (1 << 7 * size_bytes) - 1
    return int.from_bytes(head[:id_bytes], "big"), size if known else None, id_bytes + size_bytes
