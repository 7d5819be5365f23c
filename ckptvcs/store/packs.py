"""Pack files: writing one until it is sealed, reading records back, and scanning damaged ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from ckptvcs.disk import Disk, ReadFile, WriteFile
from ckptvcs.errors import CorruptionError, FormatError, StorageError
from ckptvcs.ids import Buffer, Kind, ObjectId, digest
from ckptvcs.store.format import (
    HEADER_BYTES,
    PACK_LIMIT,
    RECORD_MAGIC,
    TRAILER_BYTES,
    Entry,
    Header,
    Layout,
    PackName,
    Trailer,
    check_footer,
    pack_footer,
    unpack_footer,
)

_BUFFER: Final = 1 << 20
_MOST: Final = 2 * PACK_LIMIT
"""Bytes of a pack, at most, that a scan looks at: a writer seals one that passes half as many."""

_STRETCH: Final = 8 << 20
"""Every so many bytes the disk is told to begin writing, while the next are still being encoded."""


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
        self._started = 0
        self._file: WriteFile = disk.create(layout.open_pack(name))

    @property
    def size(self) -> int:
        """Bytes of records so far."""
        return self._end

    def append(self, frame: Frame) -> Entry:
        """Add a record. Not durable before `seal`. The payload is not kept after the next `append`."""
        header, payload = frame
        entry = Entry.of(header, self._end)
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
        if self._file.size - self._started >= _STRETCH:
            self._file.start_writeback(self._started, self._file.size - self._started)
            self._started = self._file.size

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
        if self._disk.is_link(final.parent):
            raise CorruptionError(
                f"{final.parent} is a symbolic link, and no folder of packs", path=str(final.parent)
            )
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

    def records(self) -> int:
        """How many records the footer lists. CorruptionError if it is damaged; nothing of it is kept."""
        trailer = self.trailer()
        check_footer(self._file.read(trailer.footer_offset, trailer.footer_bytes), trailer, str(self.path))
        return trailer.records

    def entries(self) -> list[Entry]:
        """All records, from the footer."""
        trailer = self.trailer()
        body = self._file.read(trailer.footer_offset, trailer.footer_bytes)
        return unpack_footer(body, trailer, str(self.path))

    def _read(self, offset: int, length: int, record: int) -> bytes:
        """Exactly these bytes of the record at `record`. Refused before memory is taken for them."""
        inside = offset + length <= self._file.size()
        data = self._file.read(offset, length) if inside else b""
        if len(data) < length or not inside:
            raise CorruptionError(
                f"{self.path}: record at {record} is cut short", path=str(self.path), offset=record
            )
        return data

    def header(self, offset: int) -> Header:
        """The header at `offset`."""
        return Header.unpack(self._read(offset, HEADER_BYTES, offset), str(self.path), offset)

    def payload(self, header: Header, offset: int) -> bytes:
        """The payload of the record at `offset`, checked against the header's digest."""
        payload = self._read(offset + HEADER_BYTES, header.stored, offset)
        if digest(payload) != header.digest:
            raise CorruptionError(
                f"{self.path}: the {header.kind.label} {header.id.short} at {offset} is damaged",
                path=str(self.path),
                offset=offset,
                id=str(header.id),
            )
        return payload

    def record(
        self, offset: int, stored: int, memory: Callable[[int], memoryview]
    ) -> tuple[Header, memoryview]:
        """Header and payload in one read, into what `memory` gives for their size.

        The caller verifies the id, so the digest is not checked. Memory is not asked for before it is
        known that the file has as many bytes.
        """
        size = HEADER_BYTES + stored
        inside = offset + size <= self._file.size()
        buffer = memory(size if inside else 0)
        if not inside or self._file.read_into(buffer, offset) < size:
            raise CorruptionError(
                f"{self.path}: record at {offset} is cut short", path=str(self.path), offset=offset
            )
        header = Header.unpack(buffer, str(self.path), offset)
        if header.stored != stored:
            raise CorruptionError(
                f"{self.path}: the record at {offset} is not the one indexed",
                path=str(self.path),
                offset=offset,
                id=str(header.id),
            )
        return header, buffer[HEADER_BYTES:]

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Raw bytes of the file, for frames that need no decoding; fewer only at its end."""
        return self._file.read_into(buffer, offset) if offset < self._file.size() else 0

    def scan(self) -> Iterator[Entry]:
        """Every whole, undamaged record, found without the footer.

        After damage the scan goes on at the next record magic. A record counts only if header and
        payload pass their checks, so that bytes which merely look like one are passed over.

        The time is linear in the file's size: once the payloads that failed are longer than twice the
        file, which takes records made to hold each other, the scan goes on behind a record that fails.
        """
        size = min(self._file.size(), _MOST)
        magics = _Magics(self._file, size)
        failed = 0
        at = magics.find(0)
        while at is not None:
            try:
                header = self.header(at)
            except (CorruptionError, FormatError):
                at = magics.find(at + 1)
                continue
            end = at + HEADER_BYTES + header.stored
            if end > size:
                at = magics.find(at + 1)
                continue
            try:
                self.payload(header, at)
            except CorruptionError:
                failed += header.stored
                at = magics.find(end if failed > 2 * size else at + 1)
                continue
            yield Entry.of(header, at)
            at = magics.find(end)

    def close(self) -> None:
        """Give the descriptor back."""
        self._file.close()


class _Magics:
    """Finds record magics in a file, front to back."""

    def __init__(self, file: ReadFile, size: int) -> None:
        self._file = file
        self._size = size
        self._start = 0
        self._window = b""

    def find(self, at: int) -> int | None:
        """The first magic at or behind `at`, which is never less than before."""
        while at + len(RECORD_MAGIC) <= self._size:
            if at + len(RECORD_MAGIC) > self._start + len(self._window):
                self._start, self._window = at, self._file.read(at, _BUFFER)
            found = self._window.find(RECORD_MAGIC, at - self._start)
            if found >= 0:
                return self._start + found
            if len(self._window) < len(RECORD_MAGIC):
                return None
            at = self._start + len(self._window) - len(RECORD_MAGIC) + 1
        return None
