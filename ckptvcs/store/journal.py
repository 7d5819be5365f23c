"""Journal entries, what each does to the index, and the file `refs.journal` that outlives the index.

An entry is one atomic change of roots or annotations: a list of operations with who, when and why. The
index applies it and keeps it in its `log` table in the same transaction; afterwards the entry becomes a
line of `refs.journal`. LMDB is the truth; the file may lag behind it and never leads. Replaying the file
gives back every table that packs cannot (docs/format.md, "Journal").

A line is ``<position> <BLAKE3-128 hex> <base64 of the canonical entry>\\n``; the hash covers position
and entry. A torn last line is dropped by whoever appends next.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from ckptvcs import canonical
from ckptvcs.disk import Disk, ReadFile, WriteFile
from ckptvcs.errors import CorruptionError, InvalidError, StorageError
from ckptvcs.ids import ID_BYTES, ObjectId, digest

Target: TypeAlias = ObjectId | str
"""What a ref points at: a commit, or (HEAD only) the name of another ref."""

LONGEST_NAME: Final = 510
"""UTF-8 bytes of a ref's or branch's name: LMDB's keys have 511, and one of them names the table."""

LONGEST_KEY: Final = LONGEST_NAME - ID_BYTES
"""UTF-8 bytes of a note's key, which follows the commit's id."""

_SCALARS: Final = (type(None), bool, int, float, str)


def _require(fits: bool, what: str) -> None:
    """What nobody may enter into the log, or find in it."""
    if not fits:
        raise InvalidError(what)


def _require_name(name: object, what: str, longest: int = LONGEST_NAME) -> None:
    if type(name) is not str:
        raise InvalidError(f"{what} is text, not a {type(name).__name__}")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise InvalidError(f"{name[:40]!r} cannot be {what}: it is not valid text") from None
    if size > longest:
        raise InvalidError(f"{name[:40] + '…'!r} cannot be {what}: it is longer than {longest} bytes")


def _is_plain(value: object) -> bool:
    if type(value) is list:
        return all(map(_is_plain, value))
    return type(value) in _SCALARS


def _require_commit(id: object) -> None:
    _require(type(id) is ObjectId, f"a commit is named by its id, not by a {type(id).__name__}")


def _require_number(value: object, what: str, least: int) -> None:
    _require(type(value) is int and least <= value < 1 << 63, f"{what} is a whole number from {least} up")


@dataclass(frozen=True, slots=True)
class Move:
    """A ref goes from `old` to `new`; None means absent."""

    name: str
    old: Target | None
    new: Target | None

    def __post_init__(self) -> None:
        _require_name(self.name, "a ref's name")
        for target in (self.old, self.new):
            if target is not None and type(target) is not ObjectId:
                _require_name(target, "a ref's target")


@dataclass(frozen=True, slots=True)
class Note:
    """A metric or text attached to a commit after it was made; value None takes it away."""

    commit: ObjectId
    key: str
    value: float | int | str | bool | None

    def __post_init__(self) -> None:
        _require_commit(self.commit)
        _require_name(self.key, "a note's key", LONGEST_KEY)
        _require(type(self.value) in _SCALARS, f"a note cannot be a {type(self.value).__name__}")


@dataclass(frozen=True, slots=True)
class Pin:
    """A commit is kept whatever a retention policy says, or no longer."""

    commit: ObjectId
    pinned: bool

    def __post_init__(self) -> None:
        _require_commit(self.commit)
        _require(type(self.pinned) is bool, "a commit is pinned or not")


@dataclass(frozen=True, slots=True)
class Drop:
    """Retention took these components from a commit's payload; all of it if `names` is empty."""

    commit: ObjectId
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        _require_commit(self.commit)
        _require(type(self.names) is tuple, "the names of components are a tuple")
        for name in self.names:
            _require(type(name) is str, f"a component's name is text, not a {type(name).__name__}")


@dataclass(frozen=True, slots=True)
class Status:
    """The state of a run, by branch: 'running', 'finished', 'failed'; None forgets it."""

    branch: str
    status: str | None

    def __post_init__(self) -> None:
        _require_name(self.branch, "a branch")
        if self.status is not None:
            _require_name(self.status, "a run's status")


@dataclass(frozen=True, slots=True)
class Fork:
    """A branch begins at a commit, with values that its first restore sets anew: name to plain value. None
    as the commit forgets it."""

    branch: str
    commit: ObjectId | None
    overrides: dict[str, Any]

    def __post_init__(self) -> None:
        _require_name(self.branch, "a branch")
        if self.commit is not None:
            _require_commit(self.commit)
        _require(type(self.overrides) is dict, "a fork's overrides are a dict")
        for name, value in self.overrides.items():
            _require(type(name) is str and _is_plain(value), "a fork's overrides are names with plain values")

    __hash__ = None  # type: ignore[assignment]  # it holds a dict


@dataclass(frozen=True, slots=True)
class Expire:
    """Log entries at positions below this one leave the log table."""

    before: int

    def __post_init__(self) -> None:
        _require_number(self.before, "a log position", 0)


Operation: TypeAlias = Move | Note | Pin | Drop | Status | Fork | Expire


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One atomic change.

    Attributes:
        position: 1 for the first entry of a repository, then one more each time.
        time: UTC nanoseconds; used for display and the undo window, never for ordering.
        who: the author that made it.
        why: a word such as 'commit', 'branch', 'gc', then free text.
        operations: all of them happen, or none.
        info: numbers worth keeping beside it, such as the bytes a commit stored.
    """

    position: int
    time: int
    who: str
    why: str
    operations: tuple[Operation, ...]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_number(self.position, "a log position", 1)
        _require_number(self.time, "a time", -(1 << 63))
        _require(type(self.who) is str and type(self.why) is str, "who and why are text")
        _require(type(self.info) is dict, "an entry's info is a dict")
        for name, value in self.info.items():
            plain = all(type(each) in _SCALARS for each in (value if type(value) is list else [value]))
            _require(type(name) is str and plain, "an entry's info is names with plain values")

    def encode(self) -> bytes:
        """The canonical bytes kept in the log table and, in base64, in the file."""
        return canonical.encode(
            [self.time, self.who, self.why, [_encode_operation(op) for op in self.operations], self.info]
        )

    @classmethod
    def decode(cls, position: int, data: bytes) -> LogEntry:
        """The inverse of `encode`. CorruptionError for anything else."""
        try:
            time, who, why, operations, info = canonical.decode(data)
            made = tuple(_decode_operation(op) for op in _listed(operations))
            return cls(position, time, who, why, made, info)
        except (ValueError, TypeError) as error:
            raise CorruptionError(f"log entry {position} is damaged: {error}") from None


def _encode_operation(op: Operation) -> list[Any]:
    match op:
        case Move(name, old, new):
            return ["ref", name, _encode_target(old), _encode_target(new)]
        case Note(commit, key, value):
            return ["note", bytes(commit), key, value]
        case Pin(commit, pinned):
            return ["pin", bytes(commit), pinned]
        case Drop(commit, names):
            return ["drop", bytes(commit), list(names)]
        case Status(branch, status):
            return ["status", branch, status]
        case Fork(branch, point, overrides):
            return ["fork", branch, None if point is None else bytes(point), overrides]
        case Expire(before):
            return ["expire", before]


def _decode_operation(fields: Any) -> Operation:
    kind, *rest = _listed(fields)
    if kind == "ref":
        name, old, new = rest
        return Move(name, _decode_target(old), _decode_target(new))
    if kind == "note":
        commit, key, value = rest
        return Note(_decode_commit(commit), key, value)
    if kind == "pin":
        commit, pinned = rest
        return Pin(_decode_commit(commit), pinned)
    if kind == "drop":
        commit, names = rest
        return Drop(_decode_commit(commit), _listed(names))
    if kind == "status":
        branch, status = rest
        return Status(branch, status)
    if kind == "fork":
        branch, point, overrides = rest
        return Fork(branch, None if point is None else _decode_commit(point), overrides)
    if kind == "expire":
        (before,) = rest
        return Expire(before)
    raise ValueError(f"unknown operation {kind!r}")


def _listed(value: Any) -> tuple[Any, ...]:
    if type(value) is not list:
        raise ValueError(f"a {type(value).__name__} where a list belongs")
    return tuple(value)


def _decode_commit(value: Any) -> ObjectId:
    if type(value) is not bytes:
        raise ValueError(f"a {type(value).__name__} where an id belongs")
    return ObjectId(value)


def _encode_target(target: Target | None) -> bytes | str | None:
    return bytes(target) if isinstance(target, ObjectId) else target


def _decode_target(value: bytes | str | None) -> Target | None:
    return ObjectId(value) if isinstance(value, bytes) else value


# -- the file -------------------------------------------------------------------------------------


def _line(entry: LogEntry) -> bytes:
    data = entry.encode()
    position = str(entry.position).encode()
    mark = digest(position + b" " + data).hex().encode()
    return b" ".join((position, mark, base64.b64encode(data))) + b"\n"


def _parse(line: bytes) -> LogEntry | None:
    """The entry of one line without its newline, or None if the line is damaged."""
    with contextlib.suppress(ValueError, binascii.Error, CorruptionError):
        position, mark, text = line.split(b" ")
        data = base64.b64decode(text, validate=True)
        if digest(position + b" " + data).hex().encode() == mark:
            return LogEntry.decode(int(position), data)
    return None


class Journal:
    """The file `refs.journal` of one repository."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self.path = path

    def create(self) -> None:
        """An empty journal, durable once the caller syncs the folder."""
        with self._disk.create(self.path) as file:
            file.sync()

    def last_position(self) -> int:
        """Position of the last whole line; 0 if there is none."""
        with self._disk.append(self.path) as file:
            return _tail(file)[1]

    def append(self, entries_after: Callable[[int], Sequence[LogEntry]]) -> None:
        """Bring the file up to date. Durable on return.

        Under the file's flock: a torn last line is cut off, then every entry after the last position
        is appended. `entries_after(position)` gives them in order, read after the lock is held.
        """
        with self._disk.append(self.path) as file:
            file.lock()
            file.size = self._disk.size(self.path)
            end, position = _tail(file)
            missing = entries_after(position)
            if end < file.size:
                file.truncate(end)
            try:
                # One at a time: a power cut in the middle of several could lose an earlier one and
                # keep the last, and then nobody would notice that the middle is missing.
                for entry in missing:
                    file.write([_line(entry)])
                    file.sync()
                    end = file.size
            except BaseException:
                # What a failed sync left in the cache must not pass for durable the next time.
                with contextlib.suppress(StorageError):
                    file.truncate(end)
                raise

    def entries(self, say: Callable[[str], None] | None = None) -> Iterator[LogEntry]:
        """Every entry, in order.

        CorruptionError for a damaged line or a gap, except that a torn last line is no entry at all:
        a power cut may leave any part of it, its newline included. `say` is told of one.
        """
        expected = 1
        torn = False
        with self._disk.open(self.path) as file:
            for line, ended in _lines(file, self.path):
                if torn and ended:  # the line before was not the last one
                    raise _damaged_line(self.path, expected)
                entry = _parse(line) if ended else None
                torn = entry is None
                if entry is not None:
                    if entry.position != expected:
                        raise _damaged_line(self.path, expected)
                    expected += 1
                    yield entry
        if torn and say is not None:
            say(f"{self.path}: the last line is torn, so entry {expected} was left out")


_WINDOW: Final = 1 << 20
_LONGEST: Final = 16 << 20
"""Bytes of a line. No entry is a hundredth as long, and no more is read into memory."""

_TORN: Final = 64 << 10
"""Bytes that a torn write may leave in several lines with wrong checks: what lay in its blocks before. More
are damage, which nobody may cut off unseen."""


def _damaged_line(path: Path, number: int) -> CorruptionError:
    return CorruptionError(f"{path}: line {number} is damaged", path=str(path), offset=number)


def _lines(file: ReadFile, path: Path) -> Iterator[tuple[bytes, bool]]:
    """The file's lines without their newlines, and whether there was one: the last may have none."""
    size, rest = file.size(), b""
    for at in range(0, size, _WINDOW):
        *lines, rest = (rest + file.read(at, min(_WINDOW, size - at))).split(b"\n")
        for line in lines:
            yield line, True
        if len(rest) > _LONGEST:
            raise _no_journal(path)
    if rest:
        yield rest, False


def _tail(file: WriteFile) -> tuple[int, int]:
    """(end of the last whole line, its position). Reads backwards, so a long journal costs nothing."""
    start, data, window = file.size, b"", 1 << 16
    stop = 0  # the place in `data` before which the last line may end
    while True:
        cut = data.rfind(b"\n", 0, stop)
        head = data.rfind(b"\n", 0, cut) if cut >= 0 else -1
        if head < 0 and start > 0:
            if len(data) > _LONGEST:
                raise _no_journal(file.path)
            before = max(0, start - window)
            more = file.read(before, start - before)
            data, start, window = more + data, before, 4 * window
            stop += len(more)
            continue
        entry = _parse(data[head + 1 : cut]) if cut >= 0 else None
        # A whole line with a bad check can only be a torn write that ended in a stray newline.
        torn = len(data) - (cut if entry is not None else head) - 1
        lines = data.count(b"\n", head + 1) if torn > _TORN else 0
        if torn > _LONGEST or lines > 2:
            raise _no_journal(file.path)
        if entry is not None:
            return start + cut + 1, entry.position
        stop = head + 1
        if stop == 0 and start == 0:
            return 0, 0


def _no_journal(path: Path) -> CorruptionError:
    return CorruptionError(
        f"{path} is damaged: what stands at its end was not written by a journal",
        path=str(path),
        hint="moved away, it is written anew from the index, if that is whole: see `ckpt fsck`",
    )
