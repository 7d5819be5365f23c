"""Marks: which records roots reach, for millions of records in little memory.

`Rows` lists the ids of all records once, in order, with one byte each: what it is and how it is marked. That
is 33 bytes per record, whatever is marked. What is stored while marking goes on is kept beside it.

A record is marked *whole* once everything below it is marked too, and *alone* if a commit whose payload was
dropped in part keeps it for what is left (`reach`). A tree that is marked alone is looked into again when
something that is not dropped reaches it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final

from ckptvcs.errors import CorruptionError
from ckptvcs.ids import ID_BYTES, Kind, ObjectId
from ckptvcs.maintenance import reach
from ckptvcs.store import Reader, Row, Snapshot, Store
from ckptvcs.store.format import MAX_DEPTH

SLICE: Final = 10_000
"""Rows that are read in one transaction."""

_AT_ONCE: Final = 8 << 20
"""Bytes of objects that are looked into at once."""

_WORD: Final = 8

_CLASS: Final = 0x1F
_ALONE: Final = 0x20
_WHOLE: Final = 0x40
_DEEPEST: Final = 3 + MAX_DEPTH

CLASSES: Final = (0, 1, 2, *range(_DEEPEST, 2, -1))
"""Referrers first: commits, trees, chunk lists, then chunks by falling depth."""

COMMITS: Final = 0


def _class_of(row: Row) -> int:
    if row.kind is Kind.COMMIT:
        return 0
    if row.kind is Kind.TREE:
        return 1
    if row.kind is Kind.CHUNK_LIST:
        return 2
    return 3 + min(row.depth, MAX_DEPTH)


class Rows:
    """The ids of all records of a moment, in order, and a byte for each."""

    def __init__(self, store: Store) -> None:
        self._heads = array("Q")
        self._tails = bytearray()
        self._state = bytearray()
        for part in slices(store):
            for id, row in part:
                self._heads.append(int.from_bytes(id[:_WORD], "big"))
                self._tails += id[_WORD:]
                self._state.append(_class_of(row))

    def __len__(self) -> int:
        return len(self._state)

    def place(self, id: ObjectId) -> int | None:
        """Where an id is listed, or None."""
        head, tail = int.from_bytes(id[:_WORD], "big"), id[_WORD:]
        step = ID_BYTES - _WORD
        first = bisect_left(self._heads, head)
        while first < len(self._heads) and self._heads[first] == head:
            if self._tails[step * first : step * (first + 1)] == tail:
                return first
            first += 1
        return None

    def id(self, place: int) -> ObjectId:
        """The id that is listed there."""
        step = ID_BYTES - _WORD
        head = self._heads[place].to_bytes(_WORD, "big")
        return ObjectId(head + self._tails[step * place : step * (place + 1)])

    def is_commit(self, place: int) -> bool:
        """Whether it is a commit that is listed there."""
        return self._state[place] & _CLASS == COMMITS

    def marks(self, place: int) -> int:
        """How the record is marked; 0 if not at all."""
        return self._state[place] & ~_CLASS

    def mark(self, place: int, marks: int) -> None:
        """Add marks."""
        self._state[place] |= marks

    def unmarked(self, kind: int) -> Iterator[int]:
        """Places of a class that are not marked, in order. Marks may be added meanwhile."""
        wanted = bytes([kind])
        place = self._state.find(wanted)
        while place >= 0:
            yield place
            place = self._state.find(wanted, place + 1)


def slices(store: Store) -> Iterator[list[tuple[ObjectId, Row]]]:
    """All rows in id order, each slice from a transaction of its own."""
    start = b""
    while True:
        with store.snapshot() as snapshot:
            part = snapshot.rows_from(start, SLICE)
        yield part
        if len(part) < SLICE:
            return
        start = part[-1][0] + b"\x00"


class _Waiting:
    """What is still to be marked. What refers to little is taken first, and what few are left of waits until
    there are more, so that neither the list grows long nor the batches small."""

    _BATCH: Final = {Kind.CHUNK: SLICE, Kind.CHUNK_LIST: 64, Kind.TREE: 512, Kind.COMMIT: 512}

    def __init__(self, roots: Iterable[ObjectId]) -> None:
        self.whole: dict[Kind, list[ObjectId]] = {kind: [] for kind in reversed(Kind)}
        self.whole[Kind.COMMIT] += roots
        self.alone: list[ObjectId] = []

    def take(self) -> tuple[Kind, list[ObjectId]] | None:
        """A kind and some ids of it; None if nothing is left."""
        order = (Kind.CHUNK, Kind.CHUNK_LIST, Kind.TREE)
        full = (kind for kind in order if len(self.whole[kind]) >= self._BATCH[kind])
        some = (kind for kind in (Kind.COMMIT, *reversed(order)) if self.whole[kind])
        kind = next(full, None) or next(some, None)
        if kind is None:
            return None
        batch = self.whole[kind][-self._BATCH[kind] :]
        del self.whole[kind][-self._BATCH[kind] :]
        return kind, batch


class Marks:
    """Marks over `Rows`, and over what was stored since they were listed.

    Attributes:
        rows: the listing.
        bytes: what the marked records cost in packs.
    """

    def __init__(self, store: Store, drops: reach.Drops) -> None:
        self._store = store
        self._drops = drops
        self._since: dict[ObjectId, int] = {}
        self.rows = Rows(store)
        self.bytes = 0

    def __contains__(self, id: ObjectId) -> bool:
        return self._marks(id) != 0

    def _marks(self, id: ObjectId) -> int:
        place = self.rows.place(id)
        return self._since.get(id, 0) if place is None else self.rows.marks(place)

    def _mark(self, id: ObjectId, row: Row, marks: int) -> None:
        if self._marks(id) == 0:
            self.bytes += row.cost
        place = self.rows.place(id)
        if place is None:
            self._since[id] = self._since.get(id, 0) | marks
        else:
            self.rows.mark(place, marks)

    def add(
        self,
        reader: Reader,
        roots: Iterable[ObjectId],
        within: Snapshot | None = None,
        *,
        bases: bool = True,
    ) -> None:
        """Mark what commits reach, delta bases included, in short read transactions or within one.

        Without `bases` those are left for `add_bases`. CorruptionError if something is missing or cannot be
        read.
        """
        waiting = _Waiting(roots)
        while (taken := waiting.take()) is not None:
            kind, ids = taken
            fresh = sorted({id for id in ids if not self._marks(id) & _WHOLE})
            rows = self._looked_up(kind, fresh, within)
            dropped: dict[ObjectId, tuple[str, ...] | None] = {}
            if kind is Kind.COMMIT:
                dropped = self._dropped(fresh, within)
            now = fresh
            if kind is not Kind.CHUNK:
                now = _beginning(fresh, rows)
                waiting.whole[kind] += fresh[len(now) :]
            for id in now:
                row = rows[id]
                self._mark(id, row, _WHOLE)
                if row.base is not None and bases:
                    waiting.whole[Kind.CHUNK].append(row.base)
            if kind is Kind.CHUNK or not now:
                continue
            for id, payload in zip(now, reader.objects(kind, now), strict=True):
                found = reach.below(reader, kind, id, payload, dropped.get(id))
                for child_kind, child in found.whole:
                    if not self._marks(child) & _WHOLE:
                        waiting.whole[child_kind].append(child)
                if found.alone:
                    for tree, row in self._looked_up(Kind.TREE, found.alone, within).items():
                        self._mark(tree, row, _ALONE)

    def add_bases(self, instead: Mapping[ObjectId, ObjectId | None]) -> None:
        """Mark the bases of what is marked, and theirs; some chunks have other ones `instead`."""
        for part in slices(self._store):
            with self._store.snapshot() as snapshot:
                for id, row in part:
                    while row.base is not None and id in self:
                        base = instead.get(id, row.base)
                        if base is None or base in self:
                            break
                        (row,) = self._looked_up(Kind.CHUNK, [base], snapshot).values()
                        self._mark(base, row, _WHOLE)
                        id = base

    def _looked_up(
        self, kind: Kind, ids: Collection[ObjectId], within: Snapshot | None
    ) -> dict[ObjectId, Row]:
        if within is None:
            with self._store.snapshot() as snapshot:
                return self._looked_up(kind, ids, snapshot)
        found = {}
        for id in ids:
            row = within.row(id)
            if row is None:
                raise CorruptionError(
                    f"the {kind.label} {id.short} is referred to but missing; nothing was deleted", id=str(id)
                )
            if row.kind is not kind:
                raise CorruptionError(f"{id.short} is a {row.kind.label}, not a {kind.label}", id=str(id))
            found[id] = row
        return found

    def _dropped(
        self, commits: Collection[ObjectId], within: Snapshot | None
    ) -> dict[ObjectId, tuple[str, ...] | None]:
        if within is None:
            with self._store.snapshot() as snapshot:
                return self._dropped(commits, snapshot)
        return {id: self._drops.of(within, id) for id in commits}


def _beginning(ids: list[ObjectId], rows: dict[ObjectId, Row]) -> list[ObjectId]:
    """As many of the ids as may be looked into at once, one at least."""
    size = 0
    for at, id in enumerate(ids):
        size += rows[id].raw
        if at and size > _AT_ONCE:
            return ids[:at]
    return ids
