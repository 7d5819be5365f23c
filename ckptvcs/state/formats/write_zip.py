"""A zip archive of stored (not compressed) members, written front to back without seeking.

The size of a member is known before its bytes, its CRC after them, so each has a data descriptor behind it,
as in the archives of `torch.save`. Sizes and offsets from 4 GiB up are written in zip64 fields. All dates are
the zip epoch, so that equal content gives equal bytes. Layout: APPNOTE.TXT 6.3.9, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import Final

from ckptvcs.ids import Buffer
from ckptvcs.state.formats.outgoing import Sink

_LOCAL: Final = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL: Final = struct.Struct("<4sHHHHHHIIIHHHHHII")
_DESCRIPTOR: Final = struct.Struct("<4sIII")
_DESCRIPTOR_64: Final = struct.Struct("<4sIQQ")
_END: Final = struct.Struct("<4sHHHHIIH")
_END_64: Final = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR_64: Final = struct.Struct("<4sIQI")
_EXTRA_64: Final = struct.Struct("<HHQQ")
_FLAGS: Final = 0x0808
"""A data descriptor follows; the name is UTF-8."""
_DATE: Final = 0x0021
_PLAIN, _ZIP64 = 20, 45
_LIMIT: Final = 0xFFFFFFFF
_MANY: Final = 0xFFFF
_PADDING: Final = 0x4246
"""The extra field that only takes up room: "FB", as torch calls it."""

ALIGNMENT: Final = 64
"""Where the bytes of a member begin is a multiple of this, as torch has it, so that they can be mapped."""


class ZipWriter:
    """One archive. Call `member` for each member in order, then `close`.

    Attributes:
        size: bytes written so far.
    """

    def __init__(self, sink: Sink, comment: bytes = b"") -> None:
        self._sink = sink
        self._comment = comment
        self._members: list[tuple[bytes, int, int, int]] = []
        self.size = 0

    def _write(self, data: Buffer) -> None:
        self._sink(data)
        self.size += len(memoryview(data).cast("B"))

    def member(self, name: str, nbytes: int, pieces: Iterable[Buffer]) -> None:
        """Write a member of exactly `nbytes` bytes."""
        encoded = name.encode()
        offset, large = self.size, nbytes >= _LIMIT
        extra = _EXTRA_64.pack(1, 16, nbytes, nbytes) if large else b""
        header = offset + _LOCAL.size + len(encoded) + len(extra) + 4
        padding = -header % ALIGNMENT
        extra += struct.pack("<HH", _PADDING, padding) + b"Z" * padding
        stated = _LIMIT if large else nbytes
        version = _ZIP64 if large else _PLAIN
        self._write(
            _LOCAL.pack(b"PK\3\4", version, _FLAGS, 0, 0, _DATE, 0, stated, stated, len(encoded), len(extra))
            + encoded
            + extra
        )
        start, crc = self.size, 0
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
            self._write(piece)
        assert self.size - start == nbytes, f"{name}: {self.size - start} bytes of {nbytes}"
        shape = _DESCRIPTOR_64 if large else _DESCRIPTOR
        self._write(shape.pack(b"PK\7\10", crc, nbytes, nbytes))
        self._members.append((encoded, crc, nbytes, offset))

    def close(self) -> None:
        """Write the directory of the archive."""
        start = self.size
        for name, crc, nbytes, offset in self._members:
            large = [each for each in (nbytes, offset) if each >= _LIMIT]
            # The fields that do not fit, in the order of the header; a size stands there twice.
            wide = [nbytes, nbytes] if nbytes >= _LIMIT else []
            wide += [offset] if offset >= _LIMIT else []
            extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if large else b""
            version = _ZIP64 if large else _PLAIN
            stated, place = min(nbytes, _LIMIT), min(offset, _LIMIT)
            sizes = (crc, stated, stated, len(name), len(extra))
            record = _CENTRAL.pack(
                b"PK\1\2", version, version, _FLAGS, 0, 0, _DATE, *sizes, 0, 0, 0, 0, place
            )
            self._write(record + name + extra)
        length, count = self.size - start, len(self._members)
        if count >= _MANY or start >= _LIMIT or length >= _LIMIT:
            place = self.size
            self._write(
                _END_64.pack(b"PK\6\6", 44, _ZIP64, _ZIP64, 0, 0, count, count, length, start)
                + _LOCATOR_64.pack(b"PK\6\7", 0, place, 1)
            )
        few = min(count, _MANY)
        self._write(
            _END.pack(b"PK\5\6", 0, 0, few, few, min(length, _LIMIT), min(start, _LIMIT), len(self._comment))
            + self._comment
        )
