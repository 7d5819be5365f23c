"""Reading records: located by the index, read from packs, decoded, and verified by id. Always.

Nothing returned here was not hashed. Readers take no locks: a pack that a collector unlinked meanwhile
is looked up once more, then its record is reported as deleted or damaged.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Final, NamedTuple, Self, TypeAlias

from ckptvcs.disk import Disk
from ckptvcs.errors import CorruptionError, NotFoundError
from ckptvcs.ids import Kind, ObjectId, chunk_id, object_id
from ckptvcs.store import codec
from ckptvcs.store.format import HEADER_BYTES, MAX_DEPTH, Grid, Layout, PackName
from ckptvcs.store.index import Index, Row
from ckptvcs.store.memory import Reused
from ckptvcs.store.packs import PackFile

_OPEN_FILES: Final = 64
_BATCH: Final = 8 << 20
"""Raw bytes one task of the pool reads."""


class Link(NamedTuple):
    """A record, as one link of a chain of bases."""

    id: ObjectId
    row: Row


_Chain: TypeAlias = tuple[Link, ...]
"""A record and those below it, down to a plain one."""


_buffers: Final = Reused()
"""What each thread reads stored frames into."""


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
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        """`refresh` brings an index up to date that does not see by itself what others do."""
        self.grid = grid
        self._refresh = refresh
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
        chains = self._chains(ids)
        order = sorted(range(len(ids)), key=lambda i: _place(chains[ids[i]][0].row))
        payloads: list[bytes] = [b""] * len(ids)
        for i in order:
            row = chains[ids[i]][0].row
            if row.kind is not kind:
                raise CorruptionError(
                    f"{ids[i].short} is a {row.kind.label}, not a {kind.label}", id=str(ids[i])
                )
            buffer = bytearray(row.raw)
            self._fill(chains[ids[i]], memoryview(buffer))
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
        self.read_parts(wanted)

    def read_parts(self, wanted: Sequence[tuple[ObjectId, memoryview]]) -> None:
        """Fill each buffer with one chunk, which must be as long. Otherwise like `read_into`."""
        chains = self._chains([id for id, _ in wanted])
        for id, part in wanted:
            row = chains[id][0].row
            if row.kind is not Kind.CHUNK or row.raw != len(part):
                raise CorruptionError(
                    f"{id.short} is a {row.kind.label} of {row.raw} bytes where a chunk of "
                    f"{len(part)} belongs",
                    id=str(id),
                )
        items = [(chains[id], part) for id, part in wanted]
        items.sort(key=lambda item: _place(item[0][0].row))
        tasks: list[list[tuple[_Chain, memoryview]]] = [[]]
        size = 0
        for item in items:
            if size >= _BATCH:
                tasks.append([])
                size = 0
            tasks[-1].append(item)
            size += len(item[1])
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
        chain = self._chains([id])[id]
        buffer = bytearray(chain[0].row.raw)
        self._fill(chain, memoryview(buffer))
        return bytes(buffer)

    # -- how -------------------------------------------------------------------------------------

    def _fill_all(self, items: list[tuple[_Chain, memoryview]]) -> None:
        for chain, part in items:
            self._fill(chain, part)

    def _chains(self, ids: Sequence[ObjectId]) -> dict[ObjectId, _Chain]:
        """Each record with those below it in its base chain, down to a plain one, from one snapshot."""
        found: dict[ObjectId, _Chain] = {}
        with self._index.snapshot() as snapshot:
            for id in ids:
                if id in found:
                    continue
                chain = [Link(id, _found(id, snapshot.row(id)))]
                while (base := chain[-1].row.base) is not None:
                    if len(chain) > MAX_DEPTH:
                        raise CorruptionError(f"the base chain of {id.short} is too long", id=str(id))
                    chain.append(Link(base, _found(base, snapshot.row(base))))
                found[id] = tuple(chain)
        return found

    def _fill(self, chain: _Chain, into: memoryview) -> None:
        """Decode a record into memory of its size, and check its id.

        The plain frame at the end of the chain is decoded there first, then one difference after the other
        is applied in place, so that no link needs memory of its own. The id of the last one vouches for
        all. Only if it does not fit is each link looked at by itself, to name the one that is damaged.
        """
        while True:
            try:
                if self._apply(chain, into, check=False):
                    return
                self._apply(chain, into, check=True)
                return
            except FileNotFoundError as error:
                chain = self._moved(chain, str(error.filename))

    def _apply(self, chain: _Chain, into: memoryview, *, check: bool) -> bool:
        """Decode all links on top of each other; whether the result has its id. With `check` each link's
        id is compared, and the first that does not fit is a CorruptionError."""
        for link in reversed(chain):
            if link.row.raw != len(into):
                raise CorruptionError(f"the base {link.id.short} of {chain[0].id.short} has another length")
            try:
                self._decode(link, into)
            except CorruptionError:
                # Bytes of a wrong base need not be decodable as one: whose fault is it?
                if not check and len(chain) > 1:
                    return False
                raise
            if check and not _fits(link, into):
                raise CorruptionError(
                    f"{self._layout.pack(link.row.pack)}: the {link.row.kind.label} {link.id.short} "
                    f"at {link.row.offset} is damaged",
                    path=str(self._layout.pack(link.row.pack)),
                    offset=link.row.offset,
                    id=str(link.id),
                )
        return check or _fits(chain[0], into)

    def _moved(self, chain: _Chain, path: str) -> _Chain:
        """The chain as it is now that a pack of it is gone.

        Compaction may have moved a record, or a collector removed it, since the lookup. Each move leads to
        another pack, so asking again ends.
        """
        for link in chain:
            self._forget(link.row.pack)
        self._refresh()
        with self._index.snapshot() as snapshot:
            rows = [snapshot.row(link.id) for link in chain]
        for link, row in zip(chain, rows, strict=True):
            if row is None:
                raise NotFoundError(
                    f"the {link.row.kind.label} {link.id.short} was deleted while it was being read"
                )
            where = str(self._layout.pack(link.row.pack))
            if where == path and row.pack == link.row.pack:
                raise CorruptionError(
                    f"the pack {where} is missing; it holds the {row.kind.label} {link.id.short}",
                    path=where,
                    offset=row.offset,
                    id=str(link.id),
                )
        return self._chains([chain[0].id])[chain[0].id]

    def _decode(self, link: Link, into: memoryview) -> None:
        """Decode one frame into `into`, which holds its base."""
        id, row = link
        pack = self._pack(row.pack)
        if row.codec == codec.RAW and row.base is None and row.stored == len(into):
            self._count(pack.read_into(into, row.offset + HEADER_BYTES))
            return
        header, payload = pack.record(row.offset, row.stored, _buffers.of)
        self._count(row.stored)
        where = f"{pack.path} at {row.offset}"
        if header.id != id or header.raw != len(into) or header.base != row.base:
            raise CorruptionError(
                f"{where}: the record is not the one indexed",
                path=str(pack.path),
                offset=row.offset,
                id=str(id),
            )
        codec.decode(
            header.codec, payload, into, header.element_size, None if row.base is None else into, where
        )

    def _count(self, nbytes: int) -> None:
        with self._mutex:  # several threads read
            self.bytes_read += nbytes

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


def _fits(link: Link, raw: memoryview) -> bool:
    found = chunk_id(raw) if link.row.kind is Kind.CHUNK else object_id(link.row.kind, raw)
    return found == link.id


def _found(id: ObjectId, row: Row | None) -> Row:
    if row is None:
        raise CorruptionError(f"{id.short} is referred to but not stored", id=str(id))
    return row
