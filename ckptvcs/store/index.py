"""The index: one LMDB environment per repository. The only module that knows lmdb.

It says where each record lies (`rows`), which packs are published (`packs`), what refs point at
(`refs`), what happened (`log`), what was annotated (`notes`, `pins`, `drops`, `status`, `forks`), and
how far commits are from their beginnings (`ranks`). It never holds tensor bytes. It is a cache: rows, packs
and ranks are derivable from the pack files, everything else from `refs.journal` (docs/format.md, "Index").

Rules taken from LMDB's own caveats:
- One environment per file and process, shared by all handles, found by (device, inode).
- `lock.mdb` is not opened by us while an environment is open: closing it would drop the process's POSIX
  locks. Before that all its bytes are allocated: LMDB writes to it through memory, and a page for which a
  full disk has no room would end the process with SIGBUS.
- A forked child closes its inherited copy (the binding frees without touching the shared reader table)
  and opens its own on first use. No spare read transactions are kept, since a fork would leak them.
- Read transactions are short and results are copied out, so that free pages are never pinned.
- The map is 64 GiB of address space from the start and never resized while open. LMDB keeps its size in the
  file, and each opening takes it from there; it is doubled under the repository's exclusive lock.
- Rows carry a CRC, since LMDB 0.9 has no page checksums.
"""

from __future__ import annotations

import contextlib
import errno
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import lmdb

from ckptvcs import canonical
from ckptvcs.canonical import NotCanonicalError
from ckptvcs.disk import Disk, ReadFile, in_forked_child
from ckptvcs.errors import CkptError, CorruptionError, FormatError, LockedError, NotFoundError, StorageError
from ckptvcs.ids import ID_BYTES, Buffer, Kind, ObjectId
from ckptvcs.store.format import DAMAGED, HAS_BASE, MAX_STORED, Entry, PackName, largest, record_bytes
from ckptvcs.store.journal import (
    Drop,
    Expire,
    Fork,
    LogEntry,
    Move,
    Note,
    Operation,
    Pin,
    Status,
    Target,
)

MAP_SIZE: Final = 64 << 30
_READERS: Final = 1024
_LOCK_BYTES: Final = 64 * _READERS + 128
"""Of `lock.mdb`, as LMDB makes it on 64-bit Linux: a cache line for each reader but one, and its head.
It takes more readers where the file is longer, and lengthens one that is too short."""

TABLES: Final = {
    "meta": b"m",
    "rows": b"r",
    "packs": b"p",
    "refs": b"f",
    "log": b"l",
    "notes": b"n",
    "pins": b"i",
    "drops": b"d",
    "status": b"s",
    "forks": b"k",
    "ranks": b"g",
}
"""The first byte of every key says which table it belongs to. One LMDB database holds them all: named
databases can only be opened through a write transaction, which would make every open wait for writers.
"""

_READERS_WAIT: Final = 60.0
"""Seconds to wait for one of the 1,024 places for read transactions, each of which lasts for milliseconds."""

_ROW: Final = struct.Struct("<BBBBHIIQ16sI")
_CRC: Final = struct.Struct("<I")
_KINDS: Final = frozenset(int(kind) for kind in Kind)
_PACK: Final = struct.Struct("<QI")
_PACK_KEY_BYTES: Final = 20


class Row(NamedTuple):
    """Where a record lies and how to read it.

    Attributes:
        depth: frames below this one in its base chain; 0 for a plain frame.
        raw, stored: bytes before and after encoding.
        offset: of the record's header inside the pack.
        base: chunk this frame is a difference against.
        damaged: a check failed; the record is neither trusted by deduplication nor forgotten.
    """

    kind: Kind
    codec: int
    element_size: int
    depth: int
    raw: int
    stored: int
    offset: int
    pack: PackName
    base: ObjectId | None = None
    damaged: bool = False

    @classmethod
    def of(cls, entry: Entry, pack: PackName, depth: int) -> Row:
        """The row of a record that a pack's footer lists."""
        return cls(
            entry.kind,
            entry.codec,
            entry.element_size,
            depth,
            entry.raw,
            entry.stored,
            entry.offset,
            pack,
            entry.base,
        )

    @property
    def cost(self) -> int:
        """Bytes of the record in its pack: header, payload and footer entry."""
        return record_bytes(self.stored, self.base is not None)

    def encode(self) -> bytes:
        """The table value, CRC included."""
        flags = (HAS_BASE if self.base else 0) | (DAMAGED if self.damaged else 0)
        body = _ROW.pack(
            self.kind,
            self.codec,
            self.element_size,
            flags,
            self.depth,
            self.raw,
            self.stored,
            self.offset,
            self.pack.lease,
            self.pack.seq,
        ) + (self.base or b"")
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def decode(cls, key: Buffer, data: bytes) -> Row:
        """The inverse of `encode`. CorruptionError if the CRC does not fit."""
        body, crc = data[:-4], data[-4:]
        if len(data) < _ROW.size + 4 or _CRC.unpack(crc)[0] != zlib.crc32(body):
            raise CorruptionError(
                f"the index row of {bytes(key).hex()[:8]} is damaged",
                hint="`ckpt fsck --rebuild` makes the index anew",
                id=bytes(key).hex(),
            )
        kind, codec, element, flags, depth, raw, stored, offset, lease, seq = _ROW.unpack_from(body)
        size = _ROW.size + (ID_BYTES if flags & HAS_BASE else 0)
        if (
            kind not in _KINDS
            or raw > largest(Kind(kind))
            or stored > MAX_STORED
            or flags & ~(HAS_BASE | DAMAGED)
            or len(body) != size
        ):
            raise CorruptionError(
                f"the index row of {bytes(key).hex()[:8]} is impossible",
                hint="`ckpt fsck --rebuild` makes the index anew",
                id=bytes(key).hex(),
            )
        base = ObjectId(body[_ROW.size :]) if flags & HAS_BASE else None
        return cls(
            Kind(kind),
            codec,
            element,
            depth,
            raw,
            stored,
            offset,
            PackName(lease, seq),
            base,
            bool(flags & DAMAGED),
        )


@dataclass(frozen=True, slots=True)
class PackInfo:
    """A published pack: the file's size in bytes and its number of records."""

    size: int
    records: int

    @classmethod
    def decode(cls, data: bytes) -> PackInfo:
        """The inverse of what `Change.put_pack` writes. CorruptionError for anything else."""
        if len(data) != _PACK.size:
            raise _damaged("packs")
        return cls(*_PACK.unpack(data))


class Snapshot:
    """A read transaction. Everything it gives is copied out and outlives it."""

    def __init__(self, txn: Any) -> None:
        self._txn = txn

    def _get(self, table: str, key: bytes) -> bytes | None:
        value: bytes | None = self._txn.get(TABLES[table] + key)
        return value

    def _items(self, table: str, start: bytes = b"", prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        first = TABLES[table] + max(start, prefix)
        prefix = TABLES[table] + prefix
        cursor = self._txn.cursor()
        try:
            if not cursor.set_range(first):
                return
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                yield key[1:], value
        finally:
            cursor.close()

    # rows and packs

    def row(self, id: ObjectId) -> Row | None:
        """Where a record lies, or None."""
        data = self._get("rows", id)
        return None if data is None else Row.decode(id, data)

    def live(self, id: ObjectId) -> Row | None:
        """Like `row`, but None also for a record known to be damaged."""
        found = self.row(id)
        return None if found is None or found.damaged else found

    def rows_from(self, start: bytes, limit: int) -> list[tuple[ObjectId, Row]]:
        """Up to `limit` rows in id order, from `start` on: one slice of a long walk."""
        found = []
        for key, value in self._items("rows", start):
            found.append((_id(key, "rows"), Row.decode(key, value)))
            if len(found) >= limit:
                break
        return found

    def ids_with_prefix(self, prefix: bytes, limit: int) -> list[tuple[ObjectId, Kind]]:
        """Up to `limit` ids that start with these bytes."""
        found = []
        for key, value in self._items("rows", prefix=prefix):
            found.append((_id(key, "rows"), Row.decode(key, value).kind))
            if len(found) >= limit:
                break
        return found

    def pack(self, name: PackName) -> PackInfo | None:
        """A published pack, or None."""
        data = self._get("packs", name.key)
        return None if data is None else PackInfo.decode(data)

    def packs(self) -> dict[PackName, PackInfo]:
        """All published packs."""
        return {_pack_name(key): PackInfo.decode(value) for key, value in self._items("packs")}

    # refs and log

    def ref(self, name: str) -> Target | None:
        """What a ref points at."""
        value = self._get("refs", name.encode())
        return None if value is None else _target(value)

    def refs(self, prefix: str = "") -> dict[str, Target]:
        """All refs whose names start with `prefix`, in name order."""
        found = self._items("refs", prefix=prefix.encode())
        return {_text(key, "refs"): _target(value) for key, value in found}

    def position(self) -> int:
        """Position of the newest log entry; 0 in a new repository."""
        return self._number("position")

    def gc_seq(self) -> int:
        """Bumped in every transaction that deletes or moves rows."""
        return self._number("gc_seq")

    def _number(self, name: str) -> int:
        value = self._get("meta", name.encode())
        if value is not None and len(value) != 8:
            raise _damaged("meta")
        return int.from_bytes(value or b"", "big")

    def log(self, after: int = 0) -> Iterator[LogEntry]:
        """Log entries behind a position, oldest first."""
        for key, value in self._items("log", (after + 1).to_bytes(8, "big")):
            yield LogEntry.decode(int.from_bytes(key, "big"), value)

    def log_backwards(self) -> Iterator[LogEntry]:
        """Log entries, newest first."""
        table = TABLES["log"]
        cursor = self._txn.cursor()
        try:
            # The next table's first key, or the end, stands just behind the newest entry.
            found = cursor.prev() if cursor.set_range(table + b"\xff" * 9) else cursor.last()
            while found and cursor.key().startswith(table):
                yield LogEntry.decode(int.from_bytes(cursor.key()[1:], "big"), cursor.value())
                found = cursor.prev()
        finally:
            cursor.close()

    # annotations

    def notes(self, commit: ObjectId) -> dict[str, Any]:
        """Notes of a commit by key."""
        found = self._items("notes", prefix=commit)
        return {_text(key[ID_BYTES:], "notes"): _note(value) for key, value in found}

    def pins(self) -> set[ObjectId]:
        """Pinned commits."""
        return {_id(key, "pins") for key, _ in self._items("pins")}

    def is_pinned(self, commit: ObjectId) -> bool:
        """Whether a commit is pinned."""
        return self._get("pins", commit) is not None

    def drops(self, commit: ObjectId) -> tuple[str, ...] | None:
        """Components that retention took from a commit; () means all of it, None nothing."""
        value = self._get("drops", commit)
        return None if value is None else _names(value)

    def status(self) -> dict[str, str]:
        """The state of each run, by branch."""
        return {_text(key, "status"): _text(value, "status") for key, value in self._items("status")}

    def fork(self, branch: str) -> tuple[ObjectId, dict[str, Any]] | None:
        """Where a branch was forked, and what its first restore sets anew; None if it was not."""
        value = self._get("forks", branch.encode())
        if value is None:
            return None
        return _fork(value)

    def rank(self, commit: ObjectId) -> int | None:
        """A commit's rank: one more than the highest rank among the commits it refers to, 1 if it refers to
        none. So what has a rank as high as another's, or a higher one, is not below it. None if unknown."""
        value = self._get("ranks", commit)
        return None if value is None else int.from_bytes(value, "big")

    def dump(self) -> dict[str, dict[bytes, bytes]]:
        """Every table as it lies in LMDB. For comparing an index with its rebuilt twin."""
        return {name: dict(self._items(name)) for name in TABLES}


class Change(Snapshot):
    """The write transaction. All of it becomes durable together when the block ends, or none of it."""

    def _put(self, table: str, key: bytes, value: bytes) -> None:
        self._txn.put(TABLES[table] + key, value)

    def _delete(self, table: str, key: bytes) -> bool:
        gone: bool = self._txn.delete(TABLES[table] + key)
        return gone

    def put_row(self, id: ObjectId, row: Row) -> None:
        """Index a record, replacing any row of the same id."""
        self._put("rows", id, row.encode())

    def delete_row(self, id: ObjectId) -> bool:
        """Forget a record. Only a collector does this, referrers first."""
        self._delete("ranks", id)
        return self._delete("rows", id)

    def put_rank(self, commit: ObjectId, below: Iterable[ObjectId]) -> int | None:
        """Note a commit's rank; `below` are the commits it refers to. None, and nothing is noted, if the
        rank of one of them is unknown: a reader of the history finds it out and notes it."""
        ranks = [self.rank(id) for id in below]
        known = [rank for rank in ranks if rank is not None]
        if len(known) < len(ranks):
            return None
        rank = 1 + max(known, default=0)
        self._put("ranks", commit, rank.to_bytes(8, "big"))
        return rank

    def put_pack(self, name: PackName, info: PackInfo) -> None:
        """Publish a pack."""
        self._put("packs", name.key, _PACK.pack(info.size, info.records))

    def delete_pack(self, name: PackName) -> None:
        """Forget a pack. Only after its file is gone."""
        self._delete("packs", name.key)

    def clear(self, *tables: str) -> None:
        """Empty whole tables: only for an index of one's own, filled anew in the same transaction."""
        for table in tables:
            for key in [key for key, _ in self._items(table)]:
                self._delete(table, key)

    def bump_gc_seq(self) -> None:
        """Tell every writer that what it looked up may be gone."""
        self._set_number("gc_seq", (self.gc_seq() + 1) % (1 << 64))

    def _set_number(self, name: str, value: int) -> None:
        self._put("meta", name.encode(), value.to_bytes(8, "big"))

    def record(
        self,
        time: int,
        who: str,
        why: str,
        operations: Sequence[Operation],
        info: dict[str, Any] | None = None,
    ) -> LogEntry:
        """Apply operations and log them as the next entry."""
        entry = LogEntry(self.position() + 1, time, who, why, tuple(operations), info or {})
        self.apply(entry)
        return entry

    def apply(self, entry: LogEntry) -> None:
        """Make an entry's operations true and keep it. Rebuilding replays the journal through here."""
        for op in entry.operations:
            self._apply(op)
        self._put("log", entry.position.to_bytes(8, "big"), entry.encode())
        self._set_number("position", entry.position)

    def _apply(self, op: Operation) -> None:
        match op:
            case Move(name, _, None):
                self._delete("refs", name.encode())
            case Move(name, _, new):
                assert new is not None
                self._put("refs", name.encode(), _target_bytes(new))
            case Note(commit, key, None):
                self._delete("notes", commit + key.encode())
            case Note(commit, key, value):
                self._put("notes", commit + key.encode(), _scalar_bytes(value))
            case Pin(commit, True):
                self._put("pins", commit, b"")
            case Pin(commit, False):
                self._delete("pins", commit)
            case Drop(commit, names):
                before = self.drops(commit)
                everything = not names or before == ()
                after = () if everything else tuple(sorted({*(before or ()), *names}))
                self._put("drops", commit, _scalar_bytes(list(after)))
            case Status(branch, None):
                self._delete("status", branch.encode())
            case Status(branch, status):
                assert status is not None
                self._put("status", branch.encode(), status.encode())
            case Fork(branch, None, _):
                self._delete("forks", branch.encode())
            case Fork(branch, commit, overrides):
                assert commit is not None
                self._put("forks", branch.encode(), _scalar_bytes([bytes(commit), overrides]))
            case Expire(before_position):
                positions = [
                    position
                    for position, _ in self._items("log")
                    if int.from_bytes(position, "big") < before_position
                ]
                for position in positions:
                    self._delete("log", position)


def _target_bytes(target: Target) -> bytes:
    return b"\x00" + target if isinstance(target, ObjectId) else b"\x01" + target.encode()


def _target(value: bytes) -> Target:
    if value[:1] == b"\x00" and len(value) == 1 + ID_BYTES:
        return ObjectId(value[1:])
    if value[:1] == b"\x01":
        return _text(value[1:], "refs")
    raise _damaged("refs")


# Tables other than that of the rows have no checksums: what cannot be what a writer put there is damage.


def _damaged(table: str) -> CorruptionError:
    return CorruptionError(
        f"the index is damaged: in its table {table} stands what nobody writes",
        hint="`ckpt fsck --rebuild` makes the index anew",
    )


def _text(value: bytes, table: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise _damaged(table) from None


def _id(key: bytes, table: str) -> ObjectId:
    if len(key) != ID_BYTES:
        raise _damaged(table)
    return ObjectId(key)


def _pack_name(key: bytes) -> PackName:
    if len(key) != _PACK_KEY_BYTES:
        raise _damaged("packs")
    return PackName.from_key(key)


def _scalar(value: bytes, table: str) -> Any:
    try:
        return canonical.decode(value)
    except NotCanonicalError:
        raise _damaged(table) from None


def _note(value: bytes) -> Any:
    found = _scalar(value, "notes")
    if type(found) not in (bool, int, float, str):
        raise _damaged("notes")
    return found


def _names(value: bytes) -> tuple[str, ...]:
    found = _scalar(value, "drops")
    if type(found) is not list or not all(type(name) is str for name in found):
        raise _damaged("drops")
    return tuple(found)


def _fork(value: bytes) -> tuple[ObjectId, dict[str, Any]]:
    match _scalar(value, "forks"):
        case [bytes(commit), dict(overrides)] if len(commit) == ID_BYTES:
            return ObjectId(commit), overrides
    raise _damaged("forks")


def _scalar_bytes(value: Any) -> bytes:
    return canonical.encode(value)


# -- the environment ------------------------------------------------------------------------------


class _Environment:
    """The process's one open LMDB environment of a file, counted by the handles that use it."""

    def __init__(self, env: Any, key: tuple[int, int]) -> None:
        self.env, self.key = env, key
        self.users = 0


_open: dict[tuple[int, int], _Environment] = {}
_open_lock = threading.RLock()


def _close_in_child() -> None:
    global _open_lock
    _open_lock = threading.RLock()
    for shared in _open.values():
        shared.env.close()
    _open.clear()


in_forked_child(_close_in_child)


class Index:
    """One handle on the index. Safe to use from any thread; reopened by itself after a fork."""

    def __init__(self, disk: Disk, folder: Path) -> None:
        self._disk = disk
        self.folder = folder
        self._data = folder / "data.mdb"
        self._shared: _Environment | None = None
        self._process = -1
        self._closed = False

    # -- life ------------------------------------------------------------------------------------

    @classmethod
    def create(cls, disk: Disk, folder: Path, index_id: str) -> Index:
        """A new, empty index. Durable on return."""
        index = cls(disk, folder)
        index._attach(create=True)
        try:
            with index.change() as change:
                change._put("meta", b"index", index_id.encode())
                change._set_number("gc_seq", 0)
                change._set_number("position", 0)
            disk.sync_dir(folder)
        except BaseException:
            index.close()
            raise
        return index

    @classmethod
    def open(cls, disk: Disk, folder: Path, index_id: str) -> Index:
        """The index with this id. NotFoundError if there is none; CorruptionError if it is another's."""
        index = cls(disk, folder)
        if not disk.exists(index._data):
            raise NotFoundError(f"{folder} holds no index")
        index._attach(create=False)
        try:
            with index.snapshot() as snapshot:
                found = snapshot._get("meta", b"index")
        except BaseException:
            index.close()
            raise
        if found != index_id.encode():
            index.close()
            raise CorruptionError(
                f"{folder} holds the index of another repository, or of an older copy of this one",
                hint="`ckpt fsck --rebuild` makes the index anew from packs and journal",
                path=str(folder),
            )
        return index

    def _attach(self, *, create: bool) -> _Environment:
        with _open_lock:
            if self._closed:
                raise CkptError("this repository handle is closed", code="closed", hint="open it again")
            if self._shared is not None and self._process == self._disk.process():
                return self._shared
            key = None if create else self._disk.same_file(self._data)
            shared = _open.get(key) if key else None
            if shared is None:
                lock = self.folder / "lock.mdb"
                with contextlib.suppress(PermissionError, FileNotFoundError):  # LMDB says why, or makes it
                    self._disk.make_shared(lock)
                    self._disk.allocate(lock, _LOCK_BYTES)
                with self._errors():
                    env = self._environment(MAP_SIZE if create else 0)
                    try:
                        self._check_length(env)
                        env.reader_check()
                    except BaseException:
                        env.close()
                        raise
                shared = _Environment(env, self._disk.same_file(self._data))
                _open[shared.key] = shared
            shared.users += 1
            self._shared, self._process = shared, self._disk.process()
            return shared

    def _environment(self, map_size: int) -> Any:
        """The LMDB environment, with a map of this size; 0 takes the one that the file names."""
        env = lmdb.open(
            str(self.folder),
            map_size=map_size,
            max_readers=_READERS,
            max_spare_txns=0,
            readahead=False,
            meminit=True,
            mode=0o644,
            **_LIBRARY,
        )
        self._disk.adopt(self._data)
        return env

    @property
    def nearly_full(self) -> bool:
        """Whether half of the map is used."""
        env = self._attach(create=False).env
        info = env.info()
        used, size = (info["last_pgno"] + 1) * env.stat()["psize"], int(info["map_size"])
        return int(used) * 2 > size

    @classmethod
    def grow(cls, disk: Disk, folder: Path) -> None:
        """Double the map. The caller holds the repository's lock exclusively, and no handle is open.

        One transaction, durable on return: the size is part of what it writes.
        """
        index = cls(disk, folder)
        with index._errors():
            env = index._environment(0)
            try:
                size = env.info()["map_size"]
            finally:
                env.close()
            env = index._environment(2 * size)
            try:
                with env.begin(write=True) as txn:
                    Change(txn)._set_number("gc_seq", Snapshot(txn).gc_seq())
            finally:
                env.close()
        disk.index_committed(index._data)

    @classmethod
    def copied(cls, disk: Disk, folder: Path, to: Path, index_id: str) -> Index | None:
        """A copy of the index with this id, to look at without its locks; None if there is none, or if its
        writers leave no time for it. Only on a local file system.

        LMDB never writes to a page that its last two transactions can see, and says which one is the last in
        the file's first two pages. So what was read between two equal looks at them holds that transaction.
        """
        for _ in range(_COPIES):
            try:
                with disk.open(folder / "data.mdb") as source:
                    before = _meta_pages(source)
                    with disk.create(to / "data.mdb") as target:
                        while part := source.read(target.size, _PIECE):
                            target.write([part])
                    if _meta_pages(source) == before:
                        return cls.open(disk, to, index_id)
                disk.remove(to / "data.mdb")
            except (CkptError, FileNotFoundError):
                for name in disk.names(to):
                    disk.remove(to / name)
                return None
        return None

    def _check_length(self, env: Any) -> None:
        """A file cut short must be noticed before its missing pages are touched: that is a SIGBUS."""
        needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        size = self._disk.size(self._data)
        if size < needed:
            raise CorruptionError(
                f"{self._data} is cut short: {size} bytes instead of {needed}",
                hint="`ckpt fsck --rebuild` makes the index anew",
                path=str(self._data),
            )

    def close(self) -> None:
        """Let go. The environment closes with its last user in the process."""
        with _open_lock:
            self._closed = True
            shared, self._shared = self._shared, None
            if shared is None or self._process != self._disk.process():
                return
            shared.users -= 1
            if shared.users == 0:
                del _open[shared.key]
                shared.env.close()

    # -- transactions ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """A consistent, short look. Never keep it across a wait or a long computation."""
        shared = self._attach(create=False)
        with self._errors():
            look = Snapshot(self._begin_reading(shared.env))
            try:
                yield look
            finally:
                # LMDB's binding gives the place among the readers back with the last reference, not before.
                look._txn.abort()
                look._txn = None

    @contextlib.contextmanager
    def change(self) -> Iterator[Change]:
        """The write transaction: one at a time over all processes. Durable when the block ends.

        An exception inside gives the whole transaction up. Do no hashing, waiting or file I/O inside.
        """
        shared = self._attach(create=False)
        with self._errors():
            txn = shared.env.begin(write=True)
            try:
                yield Change(txn)
            except BaseException:
                txn.abort()
                raise
            txn.commit()
        self._disk.index_committed(self._data)

    def _begin_reading(self, env: Any) -> Any:
        """A read transaction. While all places for readers are taken: processes that were killed give theirs
        back, and the living are waited for."""
        deadline = self._disk.seconds() + _READERS_WAIT
        while True:
            try:
                return env.begin()
            except lmdb.ReadersFullError:
                if env.reader_check() == 0:
                    if self._disk.seconds() > deadline:
                        raise
                    self._disk.pause(0.01)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except lmdb.Error as error:
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> Exception:
        where, text = str(self.folder), str(error)
        if isinstance(error, lmdb.MapFullError):
            return StorageError(
                f"the index {where} is full: its address space is used up",
                hint="close all handles and programs that use this repository, then open it again: its "
                "address space is doubled then",
                path=where,
                code="index-full",
            )
        if isinstance(error, lmdb.ReadersFullError):
            return LockedError(f"too many processes read the index {where} at once", hint="try again")
        if isinstance(error, lmdb.LockError) or "Resource temporarily unavailable" in text:
            return LockedError(
                f"the index {where} cannot be locked: {text}",
                hint="two containers with the same process id cannot share an index; "
                "let them share one PID namespace",
            )
        if isinstance(error, (lmdb.VersionMismatchError, lmdb.IncompatibleError)):
            return FormatError(f"the index {where} was written by another version of LMDB: {text}")
        if isinstance(
            error, (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.PanicError)
        ):
            return CorruptionError(
                f"the index {where} is damaged: {text}",
                hint="`ckpt fsck --rebuild` makes the index anew",
                path=where,
            )
        for refusal in ("Permission denied", "Read-only file system"):
            if refusal in text:
                return StorageError(
                    f"cannot open the index {where}: {refusal.lower()}",
                    hint="its files belong to another user; `ckpt init --shared=group` makes a repository "
                    "whose files a group shares",
                    path=where,
                )
        full = "No space left" in text
        if "Input/output error" in text or full:
            # LMDB reports a full disk as an I/O error on commit; its old content stays intact.
            full = full or self._disk.free_bytes(self.folder) < 1 << 20
        if full or "quota" in text:
            return StorageError(
                f"cannot write the index {where}: the disk is full",
                hint="free some space, then try again; nothing was changed",
                path=where,
                errno=errno.ENOSPC,
                code="disk-full",
            )
        return StorageError(f"the index {where} failed: {text}", path=where)


_COPIES: Final = 10
_PIECE: Final = 8 << 20
_PAGE_SIZE_AT: Final = 40
"""Where LMDB 0.9 keeps the size of its pages: in the first one, behind header, magic, version, address and
map size."""


def _meta_pages(file: ReadFile) -> bytes:
    """The first two pages, which name the last transaction."""
    size = int.from_bytes(file.read(_PAGE_SIZE_AT, 4), "little")
    return file.read(0, 2 * size if 512 <= size <= 1 << 16 else 1 << 17)


_LIBRARY: Final[dict[str, Any]] = {"lib_version": 0} if lmdb.__version__ >= "3" else {}
"""py-lmdb 3 carries two engines with different file formats; ours is 0.9 (recorded in `format`)."""


def present(snapshot: Snapshot, ids: Iterable[ObjectId]) -> set[ObjectId]:
    """Those of the ids whose records can be trusted."""
    return {id for id in ids if snapshot.live(id) is not None}
