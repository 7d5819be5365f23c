"""Writing: the scope in which new records are made, and the one transaction that publishes them.

The order of steps and what a crash leaves at each is docs/format.md, "Commit". In short: look up and
encode outside any transaction; seal and sync own packs; then one LMDB transaction checks that nothing
looked up was collected meanwhile, puts the rows, and compares and sets the refs.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, Self

from ckptvcs.disk import Disk
from ckptvcs.errors import InvalidError, NotFoundError, StorageError
from ckptvcs.ids import Buffer, Kind, ObjectId, chunk_id, object_id
from ckptvcs.store import codec
from ckptvcs.store.claims import Claim
from ckptvcs.store.format import (
    MAX_DEPTH,
    PACK_LIMIT,
    Entry,
    Grid,
    Layout,
    PackName,
    largest,
    unpack_object,
)
from ckptvcs.store.hints import Hint
from ckptvcs.store.index import Change, Index, PackInfo, Row, Snapshot
from ckptvcs.store.journal import Move, Operation
from ckptvcs.store.leases import Lease
from ckptvcs.store.memory import Reused
from ckptvcs.store.packs import Frame, PackWriter, make_frame
from ckptvcs.store.reader import Reader

if TYPE_CHECKING:
    from ckptvcs.store.choice import Chooser

_TASK_BYTES: Final = 2 << 20
_TASK_PIECES: Final = 256
_SECTION_BYTES: Final = 8 << 20
"""A component's frames get a pack of their own once the pack before has this many bytes, so that
dropping the component later unlinks whole packs."""


class Source(Protocol):
    """The bytes of one tensor or file. `read` is called from several threads, and again if a collector
    forces a chunk to be written anew, so it must give the same bytes until the writer closes."""

    @property
    def nbytes(self) -> int:
        """Bytes in all."""

    @property
    def element_size(self) -> int:
        """Bytes of one element; 1 for opaque bytes."""

    def read(self, offset: int, length: int) -> Buffer:
        """Bytes [offset, offset + length), without a copy where the memory allows it."""


class Piece(NamedTuple):
    """One grid cell of a source."""

    source: Source
    hint: Hint
    offset: int
    length: int


@dataclass(slots=True)
class Tally:
    """Bytes of one component: `reused` were stored already, `stored` is what records cost."""

    new: int = 0
    reused: int = 0
    stored: int = 0


class _Cell(NamedTuple):
    """A piece that has been hashed. `copy` is memory of its size, filled if `copied`."""

    piece: Piece
    id: ObjectId
    copy: memoryview
    copied: bool


_memory: Final = Reused()
"""What each thread copies the cells of one task into."""


class Made(NamedTuple):
    """A record that no row names yet, and the pack it lies in."""

    entry: Entry
    pack: PackName


class Sealed(NamedTuple):
    """A sealed pack that no row names yet."""

    name: PackName
    info: PackInfo


@dataclass(frozen=True, slots=True)
class Publication:
    """What `publish` asks for.

    Attributes:
        root: the commit.
        moves: refs to move; each must still stand at its `old`.
        rescue: the move that roots the commit elsewhere if any of `moves` lost its race.
        require: commits that must be present besides (parents, origin).
        claim: what must still be held when the refs move.
        annotations: what else is entered with the moves, if they win.
    """

    root: ObjectId
    moves: tuple[Move, ...]
    rescue: Move
    require: tuple[ObjectId, ...]
    time: int
    who: str
    why: str
    info: dict[str, Any] = field(default_factory=dict)
    claim: Claim | None = None
    annotations: tuple[Operation, ...] = ()


class Writer:
    """One commit in the making. Use as a context: what was not published is thrown away at its end.

    Not thread-safe; the pool inside it is. Bounded memory: a few tasks of 4 MiB per thread.
    """

    def __init__(
        self,
        disk: Disk,
        layout: Layout,
        index: Index,
        grid: Grid,
        lease: Lease,
        pool: Callable[[], ThreadPoolExecutor],
        threads: int,
        chooser: Chooser,
        reader: Reader,
    ) -> None:
        self.grid = grid
        self.tallies: dict[str, Tally] = {}
        self._disk = disk
        self._layout = layout
        self._index = index
        self._lease = lease
        self._pool = pool
        self._chooser = chooser
        self._reader = reader
        # A cell that was expected to be new was stored already, and none was new since.
        self._standing_still = False
        self._window = 2 * threads + 1
        self._pack: PackWriter | None = None
        self._full: list[PackWriter] = []
        self._sealed: list[Sealed] = []
        self._made: dict[ObjectId, Made] = {}
        self._pieces: dict[ObjectId, Piece] = {}
        self._objects: dict[ObjectId, tuple[Kind, bytes]] = {}
        # Packs that records are reused from: those that are there in full, and those that are not. A
        # record in a broken one is stored again and its row replaced, which heals it.
        self._whole: set[PackName] = set()
        self._broken: set[PackName] = set()
        self._section = ""
        self._tally = self.tallies.setdefault("", Tally())
        # Read before every lookup of this scope: if it still stands at the end, nothing that was
        # found has been deleted since.
        with index.snapshot() as snapshot:
            self._gc_seq = snapshot.gc_seq()

    # -- putting ---------------------------------------------------------------------------------

    def section(self, name: str) -> None:
        """The frames that follow belong to this top-level component."""
        if name != self._section:
            if self._pack is not None and self._pack.size >= _SECTION_BYTES:
                # Sealed at the end: what the disk writes meanwhile need not be waited for here.
                self._full.append(self._pack)
                self._pack = None
            self._section = name
            self._tally = self.tallies.setdefault(name, Tally())

    def put(
        self, sources: Sequence[Source], hints: Sequence[Hint] | None = None
    ) -> list[tuple[ObjectId, ...]]:
        """Cut sources by the grid, hash the cells and store those that are new; their ids, in order.

        Hashing, lookup and encoding run on the pool; appending happens here, in order.
        """
        if hints is None:
            hints = [Hint()] * len(sources)
        ids: list[list[ObjectId]] = [[] for _ in sources]
        waiting: deque[tuple[list[int], Future[list[tuple[ObjectId, Frame | None]]]]] = deque()

        def finish() -> None:
            owners, future = waiting.popleft()
            for owner, (id, frame) in zip(owners, future.result(), strict=True):
                ids[owner].append(id)
                self._take(id, frame)

        try:
            for owners, pieces in self._tasks(sources, hints):
                if not waiting and sum(p.length for p in pieces) < 1 << 16:
                    # Too little to be worth a thread switch.
                    done: Future[list[tuple[ObjectId, Frame | None]]] = Future()
                    done.set_result(self._prepare(pieces))
                    waiting.append((owners, done))
                else:
                    waiting.append((owners, self._pool().submit(self._prepare, pieces)))
                if len(waiting) >= self._window:
                    finish()
            while waiting:
                finish()
        finally:
            for _, future in waiting:
                future.cancel()
            wait([future for _, future in waiting])
        return [tuple(each) for each in ids]

    def _tasks(
        self, sources: Sequence[Source], hints: Sequence[Hint]
    ) -> Iterator[tuple[list[int], list[Piece]]]:
        owners: list[int] = []
        pieces: list[Piece] = []
        size = 0
        for owner, (source, hint) in enumerate(zip(sources, hints, strict=True)):
            for offset in range(0, source.nbytes, self.grid.chunk):
                length = min(self.grid.chunk, source.nbytes - offset)
                owners.append(owner)
                pieces.append(Piece(source, hint, offset, length))
                size += length
                if size >= _TASK_BYTES or len(pieces) >= _TASK_PIECES:
                    yield owners, pieces
                    owners, pieces, size = [], [], 0
        if pieces:
            yield owners, pieces

    def _prepare(self, pieces: list[Piece]) -> list[tuple[ObjectId, Frame | None]]:
        memory = _memory.of(sum(piece.length for piece in pieces))
        unchanged = self._chooser.memory.unchanged
        cells: list[_Cell] = []
        for piece in pieces:
            raw = piece.source.read(piece.offset, piece.length)
            copy, memory = memory[: piece.length], memory[piece.length :]
            # What is expected to be new is copied first and its copy hashed, which need not be hashed again
            # to be trusted. What is expected to be stored already is hashed where it lies.
            key = piece.hint.key
            copied = key is not None and key not in unchanged and not self._standing_still
            if copied:
                self._chooser.copy(raw, copy)
            cells.append(_Cell(piece, chunk_id(copy if copied else raw), copy, copied))
        missing = self._missing([cell.id for cell in cells])
        prepared: list[tuple[ObjectId, Frame | None]] = []
        for cell in cells:
            self._pieces.setdefault(cell.id, cell.piece)
            if cell.id in missing and cell.id not in self._made:
                missing.discard(cell.id)
                unchanged.discard(cell.piece.hint.key)
                self._standing_still = False
                if not cell.copied:
                    _copy_checked(cell.piece, cell.id, cell.copy)
                prepared.append((cell.id, self._encoded(cell.piece, cell.id, cell.copy)))
            else:
                unchanged.add(cell.piece.hint.key)
                self._standing_still = self._standing_still or cell.copied
                prepared.append((cell.id, None))
        return prepared

    def _encoded(self, piece: Piece, id: ObjectId, copy: memoryview) -> Frame:
        base = piece.hint.base(piece.offset) if piece.hint.base is not None else None
        return self._chooser.frame(id, copy, piece.source.element_size, piece.hint, base)

    def _missing(self, ids: Sequence[ObjectId]) -> set[ObjectId]:
        """Those of the ids that have to be stored: not indexed, or damaged or in a pack that is not whole,
        themselves or something that they are a difference against."""
        with self._index.snapshot() as snapshot:
            used = {id: _packs_of_chain(snapshot, id) for id in ids}
            fresh = {name for names in used.values() for name in names or ()} - self._whole - self._broken
            sizes = {name: snapshot.pack(name) for name in fresh}
        for name, info in sizes.items():
            # One look per pack and commit. A flipped bit is not seen so cheaply; fsck and reads see it.
            try:
                whole = info is None or self._disk.size(self._layout.pack(name)) == info.size
            except (FileNotFoundError, StorageError):
                whole = False
            (self._whole if whole else self._broken).add(name)
        return {id for id, names in used.items() if names is None or not self._broken.isdisjoint(names)}

    def put_frame(self, id: ObjectId, frame: Frame) -> None:
        """Store a chunk that the caller encoded, a difference against a base included.

        The caller vouches that decoding gives the chunk; the base must be stored by the time of
        `publish`.
        """
        self._take(id, frame)

    def put_objects(self, kind: Kind, payloads: Sequence[bytes]) -> list[ObjectId]:
        """Store objects of one kind; their ids, in order."""
        ids = [object_id(kind, payload) for payload in payloads]
        missing = self._missing(ids)
        for id, payload in zip(ids, payloads, strict=True):
            if len(payload) > largest(kind):
                raise InvalidError(
                    f"a {kind.label} of {len(payload)} bytes is too large; {largest(kind)} is the most"
                )
            self._objects[id] = (kind, payload)
            frame = None
            if id in missing:
                missing.discard(id)
                frame = _object_frame(kind, id, payload)
            self._take(id, frame, counted=len(payload) if frame else 0)
        return ids

    def _take(self, id: ObjectId, frame: Frame | None, counted: int | None = None) -> None:
        if frame is None or id in self._made:
            if counted is None:
                self._tally.reused += self._pieces[id].length if id in self._pieces else 0
            return
        entry = self._append(frame)
        if counted is None:
            self._tally.new += entry.raw
        self._tally.stored += entry.cost

    def _append(self, frame: Frame) -> Entry:
        if self._pack is None:
            self._pack = PackWriter(self._disk, self._layout, self._lease.next_pack())
        entry = self._pack.append(frame)
        self._made[frame.header.id] = Made(entry, self._pack.name)
        if self._pack.size >= PACK_LIMIT:
            self._seal()
        return entry

    def _seal(self) -> None:
        if self._pack is not None:
            self._full.append(self._pack)
            self._pack = None
        while self._full:
            pack = self._full.pop(0)
            try:
                size = pack.seal()
            except BaseException:
                pack.abandon()
                raise
            self._sealed.append(Sealed(pack.name, PackInfo(size, len(pack.entries))))

    # -- publishing ------------------------------------------------------------------------------

    def reuse(self) -> None:
        """Say that trees of this commit refer to stored records that were not put here.

        The row of a tree does not vouch for what is below it, since retention may have dropped a part: so
        `publish` looks all of it up. NotFoundError there if some of it is gone.
        """
        self._reused = True

    _reused = False

    def _reuses(self, root: ObjectId) -> bool:
        """Whether the commit refers to trees that were not put here."""
        made = self._objects.get(root)
        references = unpack_object(made[1], child_name(made[0], root))[0] if made else []
        return self._reused or any(kind is Kind.TREE and id not in self._objects for kind, id in references)

    def publish(self, wanted: Publication) -> bool:
        """Make the commit and all it reaches durable and move the refs, in one transaction.

        True if the refs moved. False if one of them stood elsewhere: then the commit is rooted by
        `rescue` instead. Durable on return either way.
        """
        closure = self._closure(wanted.root) if self._reuses(wanted.root) else None
        reuses = closure is not None
        while True:
            self._seal()
            absent: list[ObjectId] = []
            with self._index.change() as change:
                self._lease.check()
                if wanted.claim is not None:
                    wanted.claim.check()
                moved = change.gc_seq() != self._gc_seq or reuses
                if not moved or closure is not None:
                    # Differences are looked at in any case: a base may have been found damaged.
                    doubtful = closure if moved and closure is not None else self._differences()
                    absent = [id for id in doubtful if not is_safe(change, id, self._made, self._broken)]
                    if not absent:
                        return self._enter(change, wanted)
            # A collector ran since our first lookup. Look everything up again: what is gone is
            # written anew from its source, then the transaction is tried again.
            if moved and closure is None:
                closure = self._closure(wanted.root)
            for id in absent:
                self._write_again(id)

    def _enter(self, change: Change, wanted: Publication) -> bool:
        won = enter(change, wanted, self._sealed, self._made, self._broken)
        self._put_ranks(change)
        self._published = True
        return won

    _published = False

    def _put_ranks(self, change: Change) -> None:
        """Note the ranks of the commits made here, of which one may refer to another that was put before."""
        for id, (kind, payload) in self._objects.items():
            if kind is Kind.COMMIT:
                references, _ = unpack_object(payload, child_name(kind, id))
                change.put_rank(id, [child for below, child in references if below is Kind.COMMIT])

    def _differences(self) -> list[ObjectId]:
        return [id for id, made in self._made.items() if made.entry.base is not None]

    def _closure(self, root: ObjectId) -> list[ObjectId]:
        """Everything the commit reaches, other commits left out: their rows vouch for theirs."""
        seen = {root}
        waiting = [(Kind.COMMIT, root)]
        while waiting:
            kind, id = waiting.pop()
            made = self._objects.get(id)
            payload = made[1] if made else self._reader.objects(kind, [id])[0]
            for child_kind, child in unpack_object(payload, child_name(kind, id))[0]:
                if child_kind is not Kind.COMMIT and child not in seen:
                    seen.add(child)
                    if child_kind is not Kind.CHUNK:
                        waiting.append((child_kind, child))
        return sorted(seen)

    def _write_again(self, id: ObjectId) -> None:
        self._made.pop(id, None)
        if id in self._objects:
            kind, payload = self._objects[id]
            self._append(_object_frame(kind, id, payload))
        elif id in self._pieces:
            piece = self._pieces[id]
            copy = memoryview(bytearray(piece.length))
            _copy_checked(piece, id, copy)
            # Without a base: this one may be written again because its base is gone.
            self._append(self._chooser.frame(id, copy, piece.source.element_size, piece.hint, None))
        else:
            raise NotFoundError(
                f"{id.short} was collected while a commit that reuses it was being made",
                hint="commit again",
            )

    # -- life ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Throw away what was not published."""
        self._reader.close()
        if self._pack is not None:
            self._full.append(self._pack)
            self._pack = None
        while self._full:
            self._full.pop().abandon()
        if not self._published:
            for sealed in self._sealed:
                with contextlib.suppress(OSError, StorageError):
                    self._disk.remove(self._layout.pack(sealed.name))
        self._sealed = []
        self._pieces.clear()
        self._objects.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def enter(
    change: Change,
    wanted: Publication,
    sealed: Iterable[Sealed],
    made: Mapping[ObjectId, Made],
    broken: Set[PackName],
    replaced: Sequence[Move] = (),
) -> bool:
    """Within a transaction: rows for packs and the records made, then the refs; whether these moved.

    Otherwise `rescue` roots the commit, and the moves in `replaced` go with it. NotFoundError if a commit
    that is required is no longer stored.
    """
    won = all(change.ref(move.name) == move.old for move in wanted.moves)
    tips = {move.old for move in wanted.moves} if won else set()
    for commit in wanted.require:
        row = None if commit in tips else change.live(commit)
        if commit not in tips and (row is None or row.kind is not Kind.COMMIT):
            raise NotFoundError(
                f"the parent commit {commit.short} is no longer stored",
                hint="its branch was deleted and collected while this commit was being made",
            )
    for pack in sealed:
        change.put_pack(pack.name, pack.info)
    for id in sorted(made):
        put_row(change, id, made, broken)
    operations = (*wanted.moves, *wanted.annotations) if won else (wanted.rescue, *replaced)
    change.record(wanted.time, wanted.who, wanted.why, operations, wanted.info)
    return won


def put_row(
    change: Change, id: ObjectId, made: Mapping[ObjectId, Made], broken: Set[PackName], below: int = 0
) -> int:
    """Put the row of a record that was made, unless a live one is there; gives its depth.

    A base is settled first, and its chain walked: a stored depth may be out of date.
    """
    there = chain_depth(change, id, broken)
    if there is not None:
        return there
    found = made.get(id)
    if found is None or below > MAX_DEPTH:
        raise StorageError(f"the base {id.short} of a frame is not stored, or its chain is endless")
    entry = found.entry
    depth = 0
    if entry.base is not None:
        depth = 1 + put_row(change, entry.base, made, broken, below + 1)
        if depth > MAX_DEPTH:
            raise StorageError(f"the base chain of {id.short} is longer than {MAX_DEPTH}")
    change.put_row(id, Row.of(entry, found.pack, depth))
    return depth


def is_safe(
    change: Change, id: ObjectId, made: Mapping[ObjectId, Made], broken: Set[PackName], below: int = 0
) -> bool:
    """Whether a record is live down its base chain, or will be by what was made.

    Only a plain record may take the place of one that is there and damaged: a difference there
    could close a circle, and a collector that has marked the old row would not look at its base.
    """
    if below > MAX_DEPTH:
        return False
    there = chain_depth(change, id, broken)
    if there is not None:
        # What it is a difference against may have been rewritten since, with a longer chain of its own.
        return there + below <= MAX_DEPTH
    found = made.get(id)
    if found is None:
        return False
    if found.entry.base is None:
        return True
    return change.row(id) is None and is_safe(change, found.entry.base, made, broken, below + 1)


def chain_depth(snapshot: Snapshot, id: ObjectId, broken: Set[PackName]) -> int | None:
    """Frames below a record down to a plain one; None if one of them is missing, damaged or lies in a
    broken pack."""
    current: ObjectId | None = id
    for depth in range(MAX_DEPTH + 1):
        row = snapshot.live(current) if current is not None else None
        if row is None or row.pack in broken:
            return None
        if row.base is None:
            return depth
        current = row.base
    return None


def _packs_of_chain(snapshot: Snapshot, id: ObjectId) -> list[PackName] | None:
    """The packs in which a record lies and those that it is a difference against; None if one of these is
    missing or damaged."""
    found: list[PackName] = []
    current: ObjectId | None = id
    while current is not None and len(found) <= MAX_DEPTH:
        row = snapshot.live(current)
        if row is None:
            return None
        found.append(row.pack)
        current = row.base
    return found if current is None else None


def child_name(kind: Kind, id: ObjectId) -> str:
    """How an object is called in messages."""
    return f"{kind.label} {id.short}"


def _copy_checked(piece: Piece, id: ObjectId, copy: memoryview) -> None:
    """Copy a cell that was hashed where it lies. If another thread changed it since, the record would be
    unreadable for ever: better to refuse now."""
    copy[:] = piece.source.read(piece.offset, piece.length)
    if chunk_id(copy) != id:
        raise InvalidError(
            "the state was changed while it was being committed",
            hint="commit between steps, or copy the state first",
            code="state-changed",
        )


def _object_frame(kind: Kind, id: ObjectId, payload: bytes) -> Frame:
    number, stored = codec.encode(payload)
    return make_frame(kind, id, number, 1, len(payload), stored)
