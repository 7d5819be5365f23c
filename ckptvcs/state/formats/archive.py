"""Zip archives: where each member's bytes lie. Every number in them is doubted.

Layout: APPNOTE.TXT of PKWARE, sections 4.3 and 4.5.3 (zip64). Archives over several disks, encrypted ones,
those with something before them, and those whose members overlap or have one name twice are no archives here.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from ckptvcs.state.formats.layout import MAX_TENSORS, File

_END: Final = struct.Struct("<4sHHHHIIH")
_END64: Final = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR: Final = struct.Struct("<4sIQI")
_ENTRY: Final = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL: Final = struct.Struct("<4sHHHHHIIIHH")
_MOST_MEMBERS: Final = MAX_TENSORS + 64
_MOST_DIRECTORY: Final = 256 * _MOST_MEMBERS
_ENCRYPTED: Final = 1 | 1 << 6 | 1 << 13


class Member(NamedTuple):
    """A member: its name, and where its bytes lie as they are in the file. `stored` says that these are its
    content, not compressed."""

    name: str
    offset: int
    size: int
    stored: bool


def members(file: File) -> list[Member] | None:
    """The members of an archive, by offset; None if the file is none, or odd in any way."""
    found = _directory(file)
    if found is None:
        return None
    start, directory, count = found
    listed = _listed(directory, count)
    if listed is None:
        return None
    result = []
    end = 0
    for local, name, size, stored in sorted(listed):
        head = file.read(local, _LOCAL.size)
        if local < end or len(head) < _LOCAL.size or head[:4] != b"PK\3\4":
            return None
        *_, name_length, extra_length = _LOCAL.unpack(head)
        if name_length != len(name) or file.read(local + _LOCAL.size, name_length) != name:
            return None
        offset = local + _LOCAL.size + name_length + extra_length
        end = offset + size
        if end > start:
            return None
        result.append(Member(_decoded(name), offset, size, stored))
    return result if len({member.name for member in result}) == len(result) else None


def _directory(file: File) -> tuple[int, bytes, int] | None:
    """(where the central directory begins, the directory, number of entries)."""
    # The comment behind the end record may be 65535 bytes long; the record is the last that fits.
    tail_at = max(0, file.size - _END.size - 0xFFFF)
    tail = file.read(tail_at, file.size - tail_at)
    at = tail.rfind(b"PK\5\6")
    while at >= 0:
        if len(tail) - at >= _END.size and at + _END.size + _END.unpack_from(tail, at)[7] == len(tail):
            break
        at = tail.rfind(b"PK\5\6", 0, at)
    else:
        return None
    _, disk, first, here, count, size, start, _ = _END.unpack_from(tail, at)
    end = tail_at + at
    locator = file.read(end - _LOCATOR.size, _LOCATOR.size) if end >= _LOCATOR.size else b""
    if locator[:4] == b"PK\6\7":
        _, _, end, _ = _LOCATOR.unpack(locator)
        record = file.read(end, _END64.size) if end <= file.size - _END64.size else b""
        if record[:4] != b"PK\6\6" or len(record) != _END64.size:
            return None
        _, _, _, _, disk, first, here, count, size, start = _END64.unpack(record)
    if disk or first or here != count or count > _MOST_MEMBERS or size > _MOST_DIRECTORY:
        return None
    if start + size != end:
        return None
    directory = file.read(start, size)
    return (start, directory, count) if len(directory) == size else None


def _listed(directory: bytes, count: int) -> list[tuple[int, bytes, int, bool]] | None:
    """(offset of the local header, name, bytes in the file, whether stored) of each entry."""
    found = []
    at = 0
    for _ in range(count):
        if len(directory) - at < _ENTRY.size:
            return None
        entry = _ENTRY.unpack_from(directory, at)
        flags, method, packed, size = entry[3], entry[4], entry[8], entry[9]
        name_length, extra_length, comment_length, disk, local = *entry[10:14], entry[16]
        end = at + _ENTRY.size + name_length + extra_length + comment_length
        if entry[0] != b"PK\1\2" or flags & _ENCRYPTED or end > len(directory):
            return None
        name = directory[at + _ENTRY.size :][:name_length]
        extra = directory[at + _ENTRY.size + name_length :][:extra_length]
        wide = _wide(extra, [size, packed, local], disk)
        if wide is None:
            return None
        size, packed, local = wide
        if method == 0 and size != packed:
            return None
        found.append((local, name, packed, method == 0))
        at = end
    return found if at == len(directory) else None


def _wide(extra: bytes, values: list[int], disk: int) -> list[int] | None:
    """The values with those that do not fit 32 bits taken from the zip64 field."""
    missing = [place for place, value in enumerate(values) if value == 0xFFFFFFFF]
    at = 0
    while missing:
        if len(extra) - at < 4:
            return None
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            if length < 8 * len(missing) or len(extra) - at - 4 < length:
                return None
            for place, value in zip(
                missing, struct.unpack_from(f"<{len(missing)}Q", extra, at + 4), strict=True
            ):
                values[place] = value
            break
        at += 4 + length
    return values if disk in (0, 0xFFFF) else None


def _decoded(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode("cp437")
