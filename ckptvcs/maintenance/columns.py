"""Which records each commit reaches, for accounting: the index as columns, and labels that spread over it.

The collector answers one question (reached or not) and must be right beside writers; this answers others
(by whom) and is an estimate only as far as others write meanwhile. Both follow the same references: commits
to trees, trees to trees, lists and chunks, chunks to their bases.

Memory per record: 32 bytes of id and 17 of columns, and 4 for each label spread; while loading, 8 more and
what the slice takes. Per tree object some 150 bytes and 4 per reference. So 1,000,000 chunks in 100,000
commits take some 100 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptvcs.ids import ID_BYTES, Kind, ObjectId
from ckptvcs.maintenance.points import Point
from ckptvcs.state.read import Content as StoredContent
from ckptvcs.state.remains import remains
from ckptvcs.store import Store
from ckptvcs.store.format import unpack_object
from ckptvcs.store.writer import child_name

_SLICE: Final = 10_000
_AT_ONCE: Final = 2000
_BYTES_AT_ONCE: Final = 64 << 20
Places: TypeAlias = NDArray[np.int32]
"""Places of records in the columns."""
_NONE: Final[Places] = np.zeros(0, np.int32)


def _say_nothing(_: str) -> None:
    pass


class Rows:
    """All rows of the index as columns, in the order of their ids.

    Attributes:
        cost: bytes of the record in its pack.
        raw: bytes of its content.
        base: place of the chunk it is a difference to; -1 without one.
        kind: `Kind`.
    """

    def __init__(self, store: Store) -> None:
        ids: list[bytes] = []
        columns: list[NDArray[Any]] = []
        bases: list[tuple[int, ObjectId]] = []
        count, start = 0, b""
        while True:
            with store.snapshot() as snapshot:
                part = snapshot.rows_from(start, _SLICE)
            ids.append(b"".join(id for id, _ in part))
            columns.append(
                np.array([(row.cost, row.raw, row.kind) for _, row in part], np.int64).reshape(-1, 3)
            )
            bases += [(count + i, row.base) for i, (_, row) in enumerate(part) if row.base is not None]
            count += len(part)
            if len(part) < _SLICE:
                break
            start = part[-1][0] + b"\x00"
        self._ids = np.frombuffer(b"".join(ids), f"S{ID_BYTES}")
        table = np.concatenate(columns)
        self.cost = np.ascontiguousarray(table[:, 0])
        self.raw = table[:, 1].astype(np.uint32)
        self.kind = table[:, 2].astype(np.uint8)
        self.base = np.full(count, -1, np.int32)
        if bases:
            self.base[[at for at, _ in bases]] = self.places([id for _, id in bases])

    def __len__(self) -> int:
        return len(self._ids)

    def places(self, ids: Sequence[ObjectId]) -> Places:
        """Where these records are; -1 for what is not stored."""
        if not ids or not len(self._ids):
            return np.full(len(ids), -1, np.int32)
        wanted = np.frombuffer(b"".join(ids), f"S{ID_BYTES}")
        at = np.searchsorted(self._ids, wanted)
        at[at == len(self._ids)] = 0
        return np.where(self._ids[at] == wanted, at, -1).astype(np.int32)

    def known(self, ids: Sequence[ObjectId]) -> Places:
        """The places of those that are stored."""
        found = self.places(ids)
        return found[found >= 0]


class Labels:
    """A label for each record, 0 at first; labels of the same record are joined to one.

    `join` of two labels that differ and are not 0 is commutative, associative and idempotent.
    """

    def __init__(self, rows: Rows, join: Callable[[int, int], int]) -> None:
        self._rows = rows
        self._join = join
        self.of: Places = np.zeros(len(rows), np.int32)

    def add(self, places: Places, label: int) -> Places:
        """Label records, none of them twice; those whose label changed."""
        before = self.of[places]
        after = self._joined(before, np.full(len(places), label, np.int32))
        changed: Places = places[after != before]
        self.of[places] = after
        return changed

    def spread_to_bases(self) -> None:
        """What is needed to read a record is needed by whoever needs the record."""
        deltas = np.flatnonzero(self._rows.base >= 0).astype(np.int32)
        targets = self._rows.base[deltas]
        while True:
            before = self.of[targets]
            after = self._joined(before, self.of[deltas])
            changed = after != before
            if not changed.any():
                return
            # Of several differences to one base the last wins here, and the others the next time.
            self.of[targets[changed]] = after[changed]

    def _joined(self, a: Places, b: Places) -> Places:
        result = np.where(a == 0, b, a).astype(np.int32)
        differ = np.flatnonzero((a != b) & (a != 0) & (b != 0))
        if len(differ):
            pairs = (a[differ].astype(np.int64) << 32) | b[differ].astype(np.int64)
            unique, inverse = np.unique(pairs, return_inverse=True)
            joined = [self._join(int(pair >> 32), int(pair & 0xFFFFFFFF)) for pair in unique]
            result[differ] = np.array(joined, np.int32)[inverse]
        return result

    def bytes(self) -> dict[int, int]:
        """Bytes of records by label."""
        sums = np.bincount(self.of, weights=self._rows.cost) if len(self.of) else np.zeros(0)
        return {int(label): int(sums[label]) for label in np.flatnonzero(sums)}


MANY: Final = (1 << 31) - 1
"""The label of what several hold."""


def one_or_many(a: int, b: int) -> int:
    """Joins labels where all that matters is whether there is only one."""
    return MANY


class Sets:
    """Labels that stand for sets of numbers, as many as there are different ones."""

    def __init__(self) -> None:
        self._sets: list[int] = [0]
        self._labels: dict[int, int] = {0: 0}

    def label(self, members: Iterable[int]) -> int:
        """The label of a set."""
        bits = 0
        for member in members:
            bits |= 1 << member
        return self._of(bits)

    def _of(self, bits: int) -> int:
        found = self._labels.get(bits)
        if found is None:
            found = self._labels[bits] = len(self._sets)
            self._sets.append(bits)
        return found

    def join(self, a: int, b: int) -> int:
        """The union."""
        return self._of(self._sets[a] | self._sets[b])

    def members(self, label: int) -> set[int]:
        """The set of a label."""
        bits, found = self._sets[label], set()
        while bits:
            low = bits & -bits
            found.add(low.bit_length() - 1)
            bits ^= low
        return found


class Content:
    """The records below trees. Each tree object is read once."""

    def __init__(self, store: Store, rows: Rows, say: Callable[[str], None] = _say_nothing) -> None:
        self._store = store
        self._rows = rows
        self._say = say
        self._below: dict[int, Places] = {}
        self._parts: dict[tuple[ObjectId, tuple[str, ...]], Places] = {}

    def read(self, points: Iterable[Point], drops: Mapping[ObjectId, tuple[str, ...]]) -> None:
        """Read what these commits hold, many at once."""
        tops = list({point.tree for point in points if point.id not in drops})
        for start in range(0, len(tops), _AT_ONCE):
            self._read(tops[start : start + _AT_ONCE])
            self._say(f"{min(start + _AT_ONCE, len(tops)):,} of {len(tops):,} trees")

    def _read(self, ids: Sequence[ObjectId]) -> None:
        known = dict(zip(self._rows.places(ids).tolist(), ids, strict=True))
        waiting = {at: id for at, id in known.items() if at >= 0 and at not in self._below}
        while waiting:
            by_kind: dict[Kind, list[tuple[int, ObjectId]]] = {}
            for at, id in waiting.items():
                by_kind.setdefault(Kind(int(self._rows.kind[at])), []).append((at, id))
            waiting = {}
            for kind, items in by_kind.items():
                for batch in self._batches(items):
                    with self._store.reader() as reader:
                        payloads = reader.objects(kind, [id for _, id in batch])
                    for (at, id), payload in zip(batch, payloads, strict=True):
                        below = unpack_object(payload, child_name(kind, id))[0]
                        found = self._rows.places([child for _, child in below])
                        self._below[at] = np.unique(found[found >= 0]).astype(np.int32)
                        for (child_kind, child), place in zip(below, found.tolist(), strict=True):
                            if child_kind is not Kind.CHUNK and place >= 0 and place not in self._below:
                                waiting[place] = child

    def _batches(self, items: list[tuple[int, ObjectId]]) -> Iterable[list[tuple[int, ObjectId]]]:
        batch: list[tuple[int, ObjectId]] = []
        size = 0
        for at, id in items:
            if batch and (size + int(self._rows.raw[at]) > _BYTES_AT_ONCE or len(batch) >= _AT_ONCE):
                yield batch
                batch, size = [], 0
            batch.append((at, id))
            size += int(self._rows.raw[at])
        if batch:
            yield batch

    def label(self, labels: Labels, point: Point, label: int) -> None:
        """Label all that a commit holds, without its own record and without bases, if nothing was dropped
        from it. What has the label already has it with all below: label such commits before all others."""
        fresh = labels.add(self._rows.known([point.tree]), label)
        self._read([point.tree])
        while len(fresh):
            lower = [self._below[at] for at in fresh.tolist() if at in self._below]
            fresh = labels.add(np.unique(np.concatenate(lower)), label) if lower else _NONE

    def of(self, point: Point, dropped: tuple[str, ...] | None) -> Places:
        """The records that a commit holds, without its own and without bases."""
        if dropped == ():
            return _NONE
        if dropped is not None:
            key = (point.tree, dropped)
            if key not in self._parts:
                self._parts[key] = self._rest(point.tree, dropped)
            return self._parts[key]
        self._read([point.tree])
        return self._closure(self._rows.known([point.tree]))

    def _closure(self, top: Places) -> Places:
        found, fresh = top, top
        while len(fresh):
            lower = [self._below[at] for at in fresh.tolist() if at in self._below]
            fresh = np.setdiff1d(np.concatenate(lower), found) if lower else _NONE
            found = np.union1d(found, fresh)
        return found.astype(np.int32)

    def _rest(self, tree: ObjectId, dropped: tuple[str, ...]) -> Places:
        """What is left of a tree of which components were dropped."""
        with self._store.reader() as reader:
            left = remains(reader, tree, dropped)
        whole = [id for _, id in left.whole]
        self._read([id for kind, id in left.whole if kind is not Kind.CHUNK])
        return np.union1d(self._closure(self._rows.known(whole)), self._rows.known(list(left.alone)))

    def with_bases(self, places: Places) -> Places:
        """These records and all that are needed to read them."""
        found, fresh = places, places
        while len(fresh):
            below = self._rows.base[fresh]
            fresh = np.setdiff1d(below[below >= 0], found).astype(np.int32)
            found = np.union1d(found, fresh).astype(np.int32)
        return found

    def outside(self, content: StoredContent) -> Places:
        """The records of one tensor or other content: its chunks, and the list of them."""
        if content.chunk_list is None:
            return np.unique(self._rows.known(content.chunks or ()))
        self._read([content.chunk_list])
        return self._closure(self._rows.known([content.chunk_list]))
