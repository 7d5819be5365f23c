"""Reading records: located by the index, read from packs, decoded, and verified by id. Always.

Nothing returned here was not hashed. Readers take no locks: a pack that a collector unlinked meanwhile
is looked up once more, then its record is reported as deleted or damaged.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Final, Self

from ckptvcs.disk import Disk
from ckptvcs.errors import CorruptionError, NotFoundError
from ckptvcs.ids import Kind, ObjectId, chunk_id, object_id
from ckptvcs.store import codec
from ckptvcs.store.format import HEADER_BYTES, MAX_DEPTH, Grid, Layout, PackName
from ckptvcs.store.index import Index, Row
from ckptvcs.store.packs import PackFile

_OPEN_FILES: Final = 64
_BATCH: Final = 8 << 20
"""Raw bytes one task of the pool reads."""


class Reader:
    """A scope in which packs stay open. Close it: an open pack keeps its bytes on disk even when it is
    unlinked, so no handle keeps one between operations."""

    def __init__(
        self,
        disk: Disk,
        layout: Layout,
        index: Index,
        grid: Grid,
        pool: Callable[[], ThreadPoolExecutor],
    ) -> None:
        self.grid = grid
        self._disk = disk
        self._layout = layout
        self._index = index
        self._pool = pool
        self._packs: OrderedDict[PackName, PackFile] = OrderedDict()
        self._mutex = threading.Lock()
        self.bytes_read = 0
        """Stored bytes read from packs so far."""

    # -- what callers use ------------------------------------------------------------------------

    def objects(self, kind: Kind, ids: Sequence[ObjectId]) -> list[bytes]:
        """The verified payloads of objects of one kind, in the order asked for."""
        rows = self._rows(ids)
        order = sorted(range(len(ids)), key=lambda i: _place(rows[ids[i]]))
        payloads: list[bytes] = [b""] * len(ids)
        for i in order:
            row = rows[ids[i]]
            if row.kind is not kind:
                raise CorruptionError(
                    f"{ids[i].short} is a {row.kind.label}, not a {kind.label}", id=str(ids[i])
                )
            buffer = bytearray(row.raw)
            self._fill(ids[i], row, memoryview(buffer))
            payloads[i] = bytes(buffer)
        return payloads

    def read_into(self, requests: Sequence[tuple[Sequence[ObjectId], memoryview]]) -> None:
        """Fill each buffer with the chunks listed for it, on the pool, in the order they lie on disk.

        A buffer is as long as its tensor; chunk i belongs at `i * grid.chunk`. On any error the
        buffers hold rubbish and must be thrown away.
        """
        wanted: list[tuple[ObjectId, memoryview]] = []
        for ids, buffer in requests:
            view = memoryview(buffer).cast("B")
            cells = -(-len(view) // self.grid.chunk)
            if len(ids) != cells:
                raise CorruptionError(f"{len(ids)} chunks are listed for {len(view)} bytes")
            for i, id in enumerate(ids):
                wanted.append((id, view[i * self.grid.chunk : (i + 1) * self.grid.chunk]))
        if not wanted:
            return
        rows = self._rows([id for id, _ in wanted])
        for id, part in wanted:
            row = rows[id]
            if row.kind is not Kind.CHUNK or row.raw != len(part):
                raise CorruptionError(
                    f"{id.short} is a {row.kind.label} of {row.raw} bytes where a chunk of "
                    f"{len(part)} belongs",
                    id=str(id),
                )
        wanted.sort(key=lambda item: _place(rows[item[0]]))
        tasks: list[list[tuple[ObjectId, Row, memoryview]]] = [[]]
        size = 0
        for id, part in wanted:
            if size >= _BATCH:
                tasks.append([])
                size = 0
            tasks[-1].append((id, rows[id], part))
            size += len(part)
        if len(tasks) == 1:
            self._fill_all(tasks[0])
            return
        pool = self._pool()
        futures = [pool.submit(self._fill_all, task) for task in tasks]
        try:
            for future in futures:
                future.result()
        finally:
            # After an error the other tasks must not go on reading packs that are about to be closed.
            for future in futures:
                future.cancel()
            wait(futures)

    def chunk(self, id: ObjectId) -> bytes:
        """One verified chunk."""
        row = self._rows([id])[id]
        buffer = bytearray(row.raw)
        self._fill(id, row, memoryview(buffer))
        return bytes(buffer)

    # -- how -------------------------------------------------------------------------------------

    def _fill_all(self, items: list[tuple[ObjectId, Row, memoryview]]) -> None:
        for id, row, part in items:
            self._fill(id, row, part)

    def _rows(self, ids: Sequence[ObjectId]) -> dict[ObjectId, Row]:
        with self._index.snapshot() as snapshot:
            rows = {id: snapshot.row(id) for id in ids}
        return {id: _found(id, row) for id, row in rows.items()}

    def _fill(self, id: ObjectId, row: Row, into: memoryview, depth: int = 0) -> None:
        while True:
            try:
                self._decode(id, row, into, depth)
                return
            except FileNotFoundError:
                pass
            # Compaction may have moved the record, or a collector removed it, since the lookup. Each
            # move leads to another pack, so this ends.
            self._forget(row.pack)
            with self._index.snapshot() as snapshot:
                again = snapshot.row(id)
            if again is None:
                raise NotFoundError(f"the {row.kind.label} {id.short} was deleted while it was being read")
            if again.pack == row.pack:
                path = str(self._layout.pack(row.pack))
                raise CorruptionError(
                    f"the pack {path} is missing; it holds the {row.kind.label} {id.short}",
                    path=path,
                    offset=row.offset,
                    id=str(id),
                )
            row = again

    def _decode(self, id: ObjectId, row: Row, into: memoryview, depth: int) -> None:
        pack = self._pack(row.pack)
        if row.codec == codec.RAW and row.base is None and row.stored == len(into):
            read = pack.read_into(into, row.offset + HEADER_BYTES)
            self.bytes_read += read
        else:
            header, payload = pack.record(row.offset, row.stored)
            self.bytes_read += row.stored
            where = f"{pack.path} at {row.offset}"
            if header.id != id or header.raw != len(into) or header.base != row.base:
                raise CorruptionError(
                    f"{where}: the record is not the one indexed",
                    path=str(pack.path),
                    offset=row.offset,
                    id=str(id),
                )
            base = self._base(row.base, depth) if row.base is not None else None
            codec.decode(header.codec, payload, into, header.element_size, base, where)
        if (chunk_id(into) if row.kind is Kind.CHUNK else object_id(row.kind, into)) != id:
            raise CorruptionError(
                f"{pack.path}: the {row.kind.label} {id.short} at {row.offset} is damaged",
                path=str(pack.path),
                offset=row.offset,
                id=str(id),
            )

    def _base(self, id: ObjectId, depth: int) -> bytearray:
        if depth >= MAX_DEPTH:
            raise CorruptionError(f"the base chain of {id.short} is too long", id=str(id))
        row = self._rows([id])[id]
        buffer = bytearray(row.raw)
        self._fill(id, row, memoryview(buffer), depth + 1)
        return buffer

    def _pack(self, name: PackName) -> PackFile:
        with self._mutex:
            pack = self._packs.get(name)
            if pack is not None:
                self._packs.move_to_end(name)
                return pack
            pack = PackFile(self._disk, self._layout.pack(name))
            self._packs[name] = pack
            if len(self._packs) > _OPEN_FILES:
                # Not closed at once: another thread may be reading it. It closes when unreferenced.
                self._packs.popitem(last=False)
            return pack

    def _forget(self, name: PackName) -> None:
        with self._mutex:
            self._packs.pop(name, None)

    def close(self) -> None:
        """Close all packs."""
        with self._mutex:
            for pack in self._packs.values():
                pack.close()
            self._packs.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _place(row: Row) -> tuple[PackName, int]:
    return row.pack, row.offset


def _found(id: ObjectId, row: Row | None) -> Row:
    if row is None:
        raise CorruptionError(f"{id.short} is referred to but not stored", id=str(id))
    return row
