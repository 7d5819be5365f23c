"""New records for stored ones: the same bytes in another pack, or the same content in another encoding.

A rewriting is one new pack and one transaction. The records are written and the pack is sealed first; then
the rows that still are where they were seen are pointed at the new records, all of them together. Readers
that looked a row up before find its old pack until the caller unlinks it. The caller holds `gc.lock`.

Ids are of content, so an encoding may change under everything that refers to it, differences against it
among them. What must hold at every moment is that each chain of bases ends, at a plain frame and within
`MAX_DEPTH`: the transaction walks every chain that it makes longer or that it makes anew, and leaves a row
as it was if its new chain would not do.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Final, NamedTuple, Self

from ckptvcs.errors import CorruptionError
from ckptvcs.ids import ObjectId, chunk_id
from ckptvcs.store import Change, Row, Store
from ckptvcs.store import codec as codecs
from ckptvcs.store.format import MAX_DEPTH, PACK_LIMIT, Entry, PackName, record_bytes
from ckptvcs.store.hints import Hint
from ckptvcs.store.index import PackInfo
from ckptvcs.store.packs import Frame, PackFile, PackWriter
from ckptvcs.store.writer import chain_depth

_OPEN_PACKS: Final = 16
_NUMBERS: Final = {2: "bfloat16", 4: "float32", 8: "float64"}
"""What numbers of a size most likely are. A wrong guess costs size and nothing else."""


class _Move(NamedTuple):
    id: ObjectId
    old: Row
    entry: Entry
    above: int


class Encoded(NamedTuple):
    """A chunk in another encoding, verified.

    Attributes:
        frame: the record.
        cost: bytes that it takes in a pack, header and footer entry included.
    """

    frame: Frame
    cost: int


class Rewriter:
    """Records in the making for one new pack. Use as a context: what was not published is thrown away.

    Holds one chunk, its base and what encoding takes (docs/architecture.md, "Memory").

    Attributes:
        added: bytes of records that `publish` will have added, footer entries included.
    """

    def __init__(self, store: Store, level: str = "small") -> None:
        """`level`: how thoroughly chunks are encoded (`choice.LEVELS`)."""
        self.added = 0
        self._store = store
        self._level = level
        self._reader = store.reader()
        self._packs: OrderedDict[PackName, PackFile] = OrderedDict()
        self._writer: PackWriter | None = None
        self._moves: list[list[_Move]] = []
        self._chooser: Any = None
        self._own: set[PackName] = set()
        with store.snapshot() as snapshot:
            self._seen = set(snapshot.packs())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._abandon()
        self._reader.close()
        for pack in self._packs.values():
            pack.close()
        self._packs.clear()

    @property
    def full(self) -> bool:
        """Whether the pack has grown to the size at which packs are sealed."""
        return self._writer is not None and self._writer.size >= PACK_LIMIT

    def copy(self, id: ObjectId, row: Row) -> None:
        """Take over a record as it is. CorruptionError, naming the pack, if it is damaged or another."""
        pack = self._pack(row.pack)
        header = pack.header(row.offset)
        if header.id != id or header.base != row.base:
            raise CorruptionError(
                f"{pack.path}: the record at {row.offset} is not the one indexed",
                path=str(pack.path),
                offset=row.offset,
                id=str(id),
            )
        self._append(id, row, Frame(header, pack.payload(header, row.offset)), 0)

    def encoded(
        self,
        id: ObjectId,
        row: Row,
        base: ObjectId | None = None,
        numbers: str = "",
        *,
        however_deep: bool = False,
    ) -> Encoded:
        """A chunk encoded anew: plain, or as a difference against `base` if that is smaller. Writes nothing.

        Args:
            id, row: the chunk and its row.
            base: a stored chunk of the same length; None for a frame that needs no other.
            numbers: the name of its dtype, if it is known.
            however_deep: the base's own chain will be another one when it counts (`take_together`); else a
                base at full depth is replaced by one further down.

        The same chunk, base and level give the same bytes. CorruptionError or NotFoundError if the chunk or
        the base cannot be read.
        """
        raw = self._reader.chunk(id)
        chooser = self._made_chooser()
        hint = Hint(None, numbers or _NUMBERS.get(row.element_size, ""))
        frame: Frame = chooser.frame(id, memoryview(raw), row.element_size, hint, None)
        if base is not None:
            other: Frame = chooser.frame(
                id, memoryview(raw), row.element_size, hint, base, however_deep=however_deep
            )
            if other.header.base is not None and _cost(other) < _cost(frame):
                frame = other
        self._verify(frame, raw)
        return Encoded(frame, _cost(frame))

    def take(self, id: ObjectId, row: Row, found: Encoded, above: int = 0) -> None:
        """Take over a chunk in the encoding found.

        `above`: frames in the longest chain of differences against it, as the rows were at some time after
        this rewriter was made. With any, its row stays as it is if the chunk's own chain would grow.
        """
        self._append(id, row, found.frame, above)

    def take_together(self, chunks: Sequence[tuple[ObjectId, Row, Encoded]]) -> None:
        """Take over chunks of which each may be a difference against any other.

        All their rows are pointed anew, or none of them. With them must come every chunk whose chain of
        bases led through one of them after this rewriter was made.
        """
        moves = [self._written(id, row, found.frame, 0) for id, row, found in chunks]
        self._moves.append(moves)

    def publish(self) -> int:
        """Seal the pack, and point the rows at it in one transaction. Durable on return.

        Rows that were moved, deleted or replaced meanwhile stay as they are; so does one whose new chain of
        bases would not end, or be too long. Gives the number of rows that were pointed anew. Without any
        record nothing happens.
        """
        writer, self._writer = self._writer, None
        moves, self._moves = self._moves, []
        self.added = 0
        if writer is None:
            return 0
        store = self._store
        try:
            size = writer.seal()
        except BaseException:
            writer.abandon()
            raise
        with store.index.change() as change:
            store.lease.check()
            change.bump_gc_seq()
            change.put_pack(writer.name, PackInfo(size, len(writer.entries)))
            self._own.add(writer.name)
            used = functools.cache(lambda: self._bases_since(change))
            return sum(
                _point(change, group[0], writer.name, used)
                if len(group) == 1
                else _point_together(change, group, writer.name, used)
                for group in moves
            )

    # -- how -------------------------------------------------------------------------------------

    def _bases_since(self, change: Change) -> Set[ObjectId]:
        """Bases of the records in packs that were published since this rewriter was made."""
        found: set[ObjectId] = set()
        for name in change.packs().keys() - self._seen:
            if name not in self._own:
                found.update(entry.base for entry in self._pack(name).entries() if entry.base is not None)
        return found

    def _append(self, id: ObjectId, row: Row, frame: Frame, above: int) -> None:
        self._moves.append([self._written(id, row, frame, above)])

    def _written(self, id: ObjectId, row: Row, frame: Frame, above: int) -> _Move:
        if self._writer is None:
            self._writer = PackWriter(self._store.disk, self._store.layout, self._store.lease.next_pack())
        self.added += _cost(frame)
        return _Move(id, row, self._writer.append(frame), above)

    def _abandon(self) -> None:
        writer, self._writer = self._writer, None
        self._moves = []
        if writer is not None:
            writer.abandon()

    def _verify(self, frame: Frame, raw: bytes) -> None:
        """Decode a frame and compare: what cannot be read back must never take the place of what can."""
        header, payload = frame
        base = None if header.base is None else self._reader.chunk(header.base)
        back = bytearray(base if base is not None else len(raw))
        codecs.decode(
            header.codec,
            memoryview(payload).cast("B"),
            memoryview(back),
            header.element_size,
            None if base is None else memoryview(back),
            "a new record",
        )
        if chunk_id(back) != header.id:
            raise CorruptionError(f"{header.id.short} does not decode to what was encoded", id=str(header.id))

    def _made_chooser(self) -> Any:
        if self._chooser is None:
            # It brings numpy, which copying records must not wait for.
            from ckptvcs.store.choice import LEVELS, Chooser, Memory

            self._chooser = Chooser(LEVELS[self._level], Memory(), self._store.index, self._reader)
        return self._chooser

    def _pack(self, name: PackName) -> PackFile:
        pack = self._packs.get(name)
        if pack is None:
            path = self._store.layout.pack(name)
            try:
                pack = PackFile(self._store.disk, path)
            except FileNotFoundError:
                raise CorruptionError(f"the pack {path} is missing", path=str(path)) from None
            self._packs[name] = pack
            if len(self._packs) > _OPEN_PACKS:
                self._packs.popitem(last=False)[1].close()
        else:
            self._packs.move_to_end(name)
        return pack


def _cost(frame: Frame) -> int:
    return record_bytes(frame.header.stored, frame.header.base is not None)


def _point(change: Change, move: _Move, pack: PackName, used: Callable[[], Set[ObjectId]]) -> bool:
    """Point a row at its new record, if it still is where it was seen and its chain of bases will do. `used`
    gives the bases of what was published since the rewriting began."""
    current = change.row(move.id)
    if current is None or (current.pack, current.offset) != (move.old.pack, move.old.offset):
        return False
    base = move.entry.base
    depth = 0
    if base is not None and base == current.base:
        depth = current.depth
    elif base is not None:
        below = chain_depth(change, base, frozenset())
        if below is None or _leads_to(change, base, move.id):
            return False
        depth = below + 1
        before = chain_depth(change, move.id, frozenset())
        if depth > MAX_DEPTH:
            return False
        # The rows above keep the depths that they have, and a collector deletes by falling depth.
        if before is not None and depth > before and (move.above or move.id in used()):
            return False
    change.put_row(move.id, Row.of(move.entry, pack, depth)._replace(damaged=current.damaged))
    return True


def _point_together(
    change: Change, moves: Sequence[_Move], pack: PackName, used: Callable[[], Set[ObjectId]]
) -> int:
    """Point the rows of a group at their new records, if each of them still is where it was seen, and all of
    their chains of bases will do; the number of rows."""
    anew = {move.id: move.entry.base for move in moves}
    depths: list[int] = []
    for move in moves:
        current = change.live(move.id)
        if current is None or (current.pack, current.offset) != (move.old.pack, move.old.offset):
            return 0
        depth = _depth_with(change, move.id, anew)
        before = chain_depth(change, move.id, frozenset())
        if depth is None or before is None or (depth > before and move.id in used()):
            return 0
        depths.append(depth)
    for move, depth in zip(moves, depths, strict=True):
        change.put_row(move.id, Row.of(move.entry, pack, depth))
    return len(moves)


def _depth_with(change: Change, id: ObjectId, anew: Mapping[ObjectId, ObjectId | None]) -> int | None:
    """Frames below a chunk if some chunks had other bases; None if its chain would not end in time."""
    current = id
    for depth in range(MAX_DEPTH + 1):
        if current in anew:
            base = anew[current]
        else:
            row = change.live(current)
            if row is None:
                return None
            base = row.base
        if base is None:
            return depth
        current = base
    return None


def _leads_to(change: Change, id: ObjectId, goal: ObjectId) -> bool:
    """Whether a chain of bases passes through a record."""
    current: ObjectId | None = id
    for _ in range(MAX_DEPTH + 1):
        if current == goal:
            return True
        row = change.row(current) if current is not None else None
        current = None if row is None else row.base
    return False
