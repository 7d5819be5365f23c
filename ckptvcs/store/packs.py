"""Pack files: writing one until it is sealed, reading records back, and scanning damaged ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from ckptvcs.disk import Disk, ReadFile, WriteFile
from ckptvcs.errors import CorruptionError, FormatError, StorageError
from ckptvcs.ids import Buffer, Kind, ObjectId, digest
from ckptvcs.store.format import (
    HEADER_BYTES,
    RECORD_MAGIC,
    TRAILER_BYTES,
    Entry,
    Header,
    Layout,
    PackName,
    Trailer,
    pack_footer,
    unpack_footer,
)

_BUFFER: Final = 1 << 20


class Frame(NamedTuple):
    """A record ready to be appended: its header and its payload."""

    header: Header
    payload: Buffer


def make_frame(
    kind: Kind,
    id: ObjectId,
    codec: int,
    element_size: int,
    raw: int,
    payload: Buffer,
    base: ObjectId | None = None,
) -> Frame:
    """A frame with its header filled in from the payload."""
    return Frame(Header(kind, codec, element_size, raw, len(payload), id, base, digest(payload)), payload)


class PackWriter:
    """One pack, written by one thread, invisible until `seal` returns.

    Small records are gathered and written together. After any error the pack is given up with
    `abandon`: a failed sync is never retried on the same file.
    """

    def __init__(self, disk: Disk, layout: Layout, name: PackName) -> None:
        self._disk = disk
        self._layout = layout
        self.name = name
        self.entries: list[Entry] = []
        self._end = 0
        self._waiting: list[Buffer] = []
        self._waiting_bytes = 0
        self._file: WriteFile = disk.create(layout.open_pack(name))

    @property
    def size(self) -> int:
        """Bytes of records so far."""
        return self._end

    def append(self, frame: Frame) -> Entry:
        """Add a record. Not durable before `seal`. The payload is not kept after the next `append`."""
        header, payload = frame
        entry = Entry(
            self._end,
            header.kind,
            header.codec,
            header.element_size,
            header.raw,
            header.stored,
            header.id,
            header.base,
        )
        self._waiting += (header.pack(), payload)
        added = HEADER_BYTES + header.stored
        self._waiting_bytes += added
        self._end += added
        self.entries.append(entry)
        if self._waiting_bytes >= _BUFFER:
            self._flush()
        return entry

    def _flush(self) -> None:
        self._file.write(self._waiting)
        self._waiting, self._waiting_bytes = [], 0

    def seal(self) -> int:
        """Footer, sync, final name, sync of the folder. Durable on return; gives the file's bytes.

        The order is docs/format.md, "Commit", step 3.
        """
        self._flush()
        self._file.write([pack_footer(self.entries, self.name, self._end)])
        size = self._file.size
        self._file.sync()
        self._file.close()
        final = self._layout.pack(self.name)
        self._disk.protect(self._file.path)
        # Also when the folder is there: whoever made it may have died before its name was durable.
        self._disk.make_dir(final.parent)
        self._disk.sync_dir(final.parent.parent)
        try:
            self._disk.publish(self._file.path, final)
            self._disk.sync_dir(final.parent)
        except FileExistsError:
            raise
        except BaseException:
            with contextlib.suppress(OSError, StorageError):
                self._disk.remove(final)
            raise
        return size

    def abandon(self) -> None:
        """Throw the unsealed pack away."""
        with contextlib.suppress(OSError, StorageError):
            self._file.close()
        with contextlib.suppress(OSError, StorageError):
            self._disk.remove(self._file.path)


class PackFile:
    """A sealed pack, open for reading from any thread."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self.path = path
        self._file: ReadFile = disk.open(path)

    def size(self) -> int:
        """Bytes in the file."""
        return self._file.size()

    def trailer(self) -> Trailer:
        """The pack's end. CorruptionError if the file was cut short or damaged there."""
        size = self._file.size()
        tail = self._file.read(max(0, size - TRAILER_BYTES), TRAILER_BYTES)
        return Trailer.unpack(tail, str(self.path), size)

    def entries(self) -> list[Entry]:
        """All records, from the footer."""
        trailer = self.trailer()
        body = self._file.read(trailer.footer_offset, trailer.footer_bytes)
        return unpack_footer(body, trailer, str(self.path))

    def header(self, offset: int) -> Header:
        """The header at `offset`."""
        return Header.unpack(self._file.read(offset, HEADER_BYTES), str(self.path), offset)

    def payload(self, header: Header, offset: int) -> bytes:
        """The payload of the record at `offset`, checked against the header's digest."""
        payload = self._file.read(offset + HEADER_BYTES, header.stored)
        if len(payload) < header.stored or digest(payload) != header.digest:
            raise CorruptionError(
                f"{self.path}: the {header.kind.label} {header.id.short} at {offset} is damaged",
                path=str(self.path),
                offset=offset,
                id=str(header.id),
            )
        return payload

    def record(self, offset: int, stored: int) -> tuple[Header, bytes]:
        """Header and payload in one read. The caller verifies the id, so the digest is not checked."""
        data = self._file.read(offset, HEADER_BYTES + stored)
        header = Header.unpack(data, str(self.path), offset)
        if header.stored != stored or len(data) < HEADER_BYTES + stored:
            raise CorruptionError(
                f"{self.path}: the record at {offset} is cut short or not the one indexed",
                path=str(self.path),
                offset=offset,
                id=str(header.id),
            )
        return header, data[HEADER_BYTES:]

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Raw bytes of the file, for frames that need no decoding."""
        return self._file.read_into(buffer, offset)

    def scan(self) -> Iterator[Entry]:
        """Every whole, undamaged record, found without the footer.

        After damage the scan goes on at the next record magic. A record counts only if header and
        payload pass their checks, so that bytes which merely look like one are passed over.
        """
        size = self._file.size()
        at = 0
        while at + HEADER_BYTES <= size:
            try:
                header = self.header(at)
                self.payload(header, at)
            except (CorruptionError, FormatError):
                found = self._find_magic(at + 1, size)
                if found is None:
                    return
                at = found
                continue
            yield Entry(
                at,
                header.kind,
                header.codec,
                header.element_size,
                header.raw,
                header.stored,
                header.id,
                header.base,
            )
            at += HEADER_BYTES + header.stored

    def _find_magic(self, start: int, size: int) -> int | None:
        step = 1 << 20
        while start < size:
            window = self._file.read(start, step + len(RECORD_MAGIC) - 1)
            found = window.find(RECORD_MAGIC)
            if found >= 0:
                return start + found
            start += step
        return None

    def close(self) -> None:
        """Give the descriptor back."""
        self._file.close()
