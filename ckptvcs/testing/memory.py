"""A store in a dict: the smallest thing that satisfies `ckptvcs.state.interface`."""

from __future__ import annotations

from collections.abc import Sequence

from ckptvcs.errors import CorruptionError
from ckptvcs.ids import Kind, ObjectId, chunk_id, object_id
from ckptvcs.state.interface import Source
from ckptvcs.store.format import GRIDS, Grid, record_bytes, unpack_object
from ckptvcs.store.hints import Hint


class MemoryStore:
    """Writer and reader in one. Counts what a commit adds and what a checkout reads.

    Attributes:
        grid: how content is cut.
        records: everything stored, by kind and id.
        added: bytes of new records since the start, as a pack would count them (uncompressed).
        sections: the names given to `section`, in order.
        objects_read, chunks_read: ids asked for since the start, in order.
        hints: what was said about sources, by their first chunk.
    """

    def __init__(self, grid: Grid = GRIDS[1]) -> None:
        self.grid = grid
        self.records: dict[tuple[Kind, ObjectId], bytes] = {}
        self.added = 0
        self.sections: list[str] = []
        self.objects_read: list[ObjectId] = []
        self.chunks_read: list[ObjectId] = []
        self.hints: dict[ObjectId, Hint] = {}

    def _add(self, kind: Kind, raw: bytes) -> ObjectId:
        id = object_id(kind, raw)
        if (kind, id) not in self.records:
            if kind is not Kind.CHUNK:
                for reference in unpack_object(raw, "new object")[0]:
                    assert reference in self.records, f"{kind.label} {id} refers to an absent {reference}"
            self.records[kind, id] = raw
            self.added += record_bytes(len(raw), False)
        return id

    def put(
        self, sources: Sequence[Source], hints: Sequence[Hint] | None = None
    ) -> list[tuple[ObjectId, ...]]:
        """Store chunks. Hints are kept in `hints`, by the first chunk of their source."""
        step = self.grid.chunk
        found = [
            tuple(
                self._add(Kind.CHUNK, bytes(source.read(at, min(step, source.nbytes - at))))
                for at in range(0, source.nbytes, step)
            )
            for source in sources
        ]
        for ids, hint in zip(found, hints or (), strict=False):
            self.hints[ids[0]] = hint
        return found

    def put_objects(self, kind: Kind, payloads: Sequence[bytes]) -> list[ObjectId]:
        """Store objects; every reference must be present."""
        return [self._add(kind, payload) for payload in payloads]

    def section(self, name: str) -> None:
        """Remember the name."""
        self.sections.append(name)

    def objects(self, kind: Kind, ids: Sequence[ObjectId]) -> list[bytes]:
        """Stored payloads."""
        self.objects_read += ids
        try:
            return [self.records[kind, id] for id in ids]
        except KeyError as error:
            raise CorruptionError(f"no such {kind.label}: {error}") from None

    def read_parts(self, wanted: Sequence[tuple[ObjectId, memoryview]]) -> None:
        """Copy single chunks."""
        self.read_into([((id,), part) for id, part in wanted])

    def read_into(self, requests: Sequence[tuple[Sequence[ObjectId], memoryview]]) -> None:
        """Copy chunks into the buffers."""
        for ids, buffer in requests:
            self.chunks_read += ids
            raw = b"".join(self.records[Kind.CHUNK, id] for id in ids)
            if len(raw) != len(buffer) or any(chunk_id(self.records[Kind.CHUNK, id]) != id for id in ids):
                raise CorruptionError("the chunks do not fill the buffer")
            buffer[:] = raw
