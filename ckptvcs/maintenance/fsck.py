"""Checking a repository: refs -> rows -> packs -> ids. Reads only; deletes and repairs nothing.

The quick check proves that every ref reaches a whole closure, that each row lies inside a published pack
whose footer agrees, and that commits, trees and chunk lists hash to their ids. `full` decodes and hashes
every record as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ckptvcs.errors import CkptError, CorruptionError, NotFoundError
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.maintenance import reach
from ckptvcs.store import Move, Reader, Row, Store, Target
from ckptvcs.store.format import TRAILER_BYTES, Entry, PackName, unpack_object
from ckptvcs.store.packs import PackFile
from ckptvcs.store.rebuild import Rebuilt
from ckptvcs.store.writer import child_name

_SLICE: Final = 10_000
_SHOWN: Final = 8


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, in a sentence, with the id it was found at, the commits that cannot be
    restored whole because of it, and the refs above those."""

    message: str
    id: str | None = None
    path: str | None = None
    refs: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()


@dataclass(slots=True)
class Report:
    """What a check looked at and found. Truthy if all is well."""

    full: bool
    refs: int = 0
    commits: int = 0
    records: int = 0
    packs: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    rebuilt: Rebuilt | None = None

    @property
    def ok(self) -> bool:
        """No problem was found."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        found: dict[str, Any] = {
            "ok": self.ok,
            "full": self.full,
            "refs": self.refs,
            "commits": self.commits,
            "records": self.records,
            "packs": self.packs,
            "bytes": self.bytes,
            "problems": [
                {
                    "message": p.message,
                    "id": p.id,
                    "path": p.path,
                    "refs": list(p.refs),
                    "commits": list(p.commits),
                }
                for p in self.problems
            ],
        }
        if self.rebuilt is not None:
            found["rebuilt"] = {
                "packs": self.rebuilt.packs,
                "records": self.rebuilt.records,
                "log_entries": self.rebuilt.log_entries,
                "left_out": self.rebuilt.left_out,
                "problems": list(self.rebuilt.problems),
            }
        return found


def check(store: Store, *, full: bool = False) -> Report:
    """Check everything. Problems are collected, not raised."""
    report = Report(full=full, rebuilt=store.rebuilt)
    checker = _Checker(store, report)
    checker.check_packs()
    checker.check_rows()
    checker.check_refs()
    checker.check_journal()
    return report


class _Checker:
    def __init__(self, store: Store, report: Report) -> None:
        self._store = store
        self._report = report
        self._bad: dict[ObjectId, CkptError] = {}
        self._entries: dict[PackName, set[tuple[int, ObjectId]]] = {}
        self._missing: dict[PackName, Path] = {}

    def _problem(self, error: CkptError | str, id: ObjectId | None = None, refs: Iterable[str] = ()) -> None:
        path = error.path if isinstance(error, CorruptionError) else None
        self._report.problems.append(Problem(str(error), None if id is None else str(id), path, tuple(refs)))

    def check_packs(self) -> None:
        """Each published pack is there, as long as it was, with a whole footer."""
        store = self._store
        with store.snapshot() as snapshot:
            packs = snapshot.packs()
        for name, info in packs.items():
            path = store.layout.pack(name)
            self._report.packs += 1
            try:
                with contextlib.closing(PackFile(store.disk, path)) as pack:
                    size = pack.size()
                    if size != info.size:
                        raise CorruptionError(
                            f"{path} has {size} bytes instead of {info.size}", path=str(path)
                        )
                    entries = pack.entries()
                    if self._report.full:
                        self._check_records(name, pack, entries)
                self._entries[name] = {(entry.offset, entry.id) for entry in entries}
                self._report.bytes += size - TRAILER_BYTES
            except FileNotFoundError:
                # Harmless if nothing lies in it: a collector was interrupted between unlinking it and
                # forgetting it. `_check_row` tells.
                self._missing[name] = path
            except CkptError as error:
                self._problem(error)

    def _check_records(self, name: PackName, pack: PackFile, entries: list[Entry]) -> None:
        """Each live record's header says what the footer says, and its payload has the header's digest:
        compaction relies on both, and reading may pass over them."""
        with self._store.snapshot() as snapshot:
            rows = {entry.id: snapshot.row(entry.id) for entry in entries}
        for entry in entries:
            row = rows[entry.id]
            if row is None or (row.pack, row.offset) != (name, entry.offset):
                continue
            try:
                header = pack.header(entry.offset)
                if header[:7] != entry[1:]:
                    raise CorruptionError(
                        f"{pack.path}: the record at {entry.offset} is not the one its footer lists",
                        path=str(pack.path),
                        offset=entry.offset,
                        id=str(entry.id),
                    )
                pack.payload(header, entry.offset)
            except CkptError as error:
                self._bad[entry.id] = error

    def check_rows(self) -> None:
        """Each row points at a record of its id; objects, and with `full` all records, hash to it."""
        for rows in self._slices():
            with self._store.reader() as reader:
                for id, row in rows:
                    self._check_row(reader, id, row)

    def _check_row(self, reader: Reader, id: ObjectId, row: Row) -> None:
        self._report.records += 1
        self._report.commits += row.kind is Kind.COMMIT
        if id in self._bad:
            return
        # A row the footers do not know was published or moved since they were listed, or is really
        # wrong: reading it tells.
        known = (row.offset, id) in self._entries.get(row.pack, ())
        if known and row.kind is Kind.CHUNK and not self._report.full:
            return
        path = self._missing.get(row.pack)
        if path is not None and self._still_in(id, row.pack):
            self._bad[id] = CorruptionError(f"the pack {path} is missing", path=str(path))
            return
        try:
            self._read(reader, id, row)
        except NotFoundError:
            return  # collected meanwhile
        except CkptError as error:
            self._bad[id] = error

    def _still_in(self, id: ObjectId, pack: PackName) -> bool:
        """Whether the record was not moved or collected since its row was read."""
        with self._store.snapshot() as snapshot:
            row = snapshot.row(id)
        return row is not None and row.pack == pack

    def _read(self, reader: Reader, id: ObjectId, row: Row) -> None:
        if row.kind is Kind.CHUNK:
            reader.chunk(id)
        else:
            payload = reader.objects(row.kind, [id])[0]
            unpack_object(payload, child_name(row.kind, id))

    def _slices(self) -> Iterator[list[tuple[ObjectId, Row]]]:
        start = b""
        while True:
            with self._store.snapshot() as snapshot:
                try:
                    part = snapshot.rows_from(start, _SLICE)
                except CorruptionError as error:
                    self._problem(error)
                    return
            yield part
            if len(part) < _SLICE:
                return
            start = part[-1][0] + b"\x00"

    def check_refs(self) -> None:
        """Everything each ref reaches is stored and, as far as it was checked, sound."""
        try:
            with self._store.snapshot() as snapshot:
                refs = snapshot.refs()
        except CkptError as error:
            self._problem(error)
            return
        self._report.refs = len(refs)
        tips = {name: target for name, target in refs.items() if isinstance(target, ObjectId)}
        for id, kind in self._closure(tips.values()):
            if kind is None and id not in self._bad:
                self._bad[id] = CorruptionError(f"{id.short} is referred to but missing", id=str(id))
        if self._bad:
            self._report_damage(tips)

    def _report_damage(self, tips: dict[str, ObjectId]) -> None:
        """One problem for each cause, with the commits that need what it took and the refs above them.

        Only damage pays for looking at each commit by itself.
        """
        causes: dict[str, tuple[CkptError, ObjectId]] = {}
        for id, error in self._bad.items():
            causes.setdefault(str(error), (error, id))
        hurt: dict[str, dict[ObjectId, None]] = {cause: {} for cause in causes}
        above: dict[str, dict[str, None]] = {cause: {} for cause in causes}
        found: dict[ObjectId, set[str]] = {}
        for name, tip in tips.items():
            for commit, _ in self._closure([tip], {Kind.COMMIT}):
                if commit not in found:
                    content = self._closure([commit], set(Kind) - {Kind.COMMIT})
                    found[commit] = {str(self._bad[id]) for id, _ in content if id in self._bad}
                for cause in found[commit]:
                    hurt[cause][commit] = None
                    above[cause][name] = None
        for cause, (error, id) in causes.items():
            commits = [commit.short for commit in hurt[cause]]
            names = tuple(above[cause])
            note = "; nothing refers to it"
            if commits:
                more = f" and {len(commits) - _SHOWN} more" if len(commits) > _SHOWN else ""
                note = (
                    f"; {len(commits)} commit(s) cannot be restored whole: "
                    f"{', '.join(commits[:_SHOWN])}{more} (of {', '.join(names)})"
                )
            path = error.path if isinstance(error, CorruptionError) else None
            self._report.problems.append(
                Problem(cause + note, str(id), path, names, tuple(map(str, hurt[cause])))
            )

    def check_journal(self) -> None:
        """`refs.journal` is whole and says what the log says, as far as both go."""
        try:
            written = {entry.position: entry for entry in self._store.journal_entries()}
        except FileNotFoundError:
            self._problem(f"{self._store.layout.journal} is missing")
            return
        except CkptError as error:
            self._problem(error)
            return
        try:
            with self._store.snapshot() as snapshot:
                log = list(snapshot.log())
                refs = snapshot.refs()
        except CkptError as error:
            self._problem(error)
            return
        for entry in log:
            if written.get(entry.position, entry) != entry:
                self._problem(f"{self._store.layout.journal}: entry {entry.position} is not the log's")
        moved: dict[str, Target | None] = {}
        for entry in (*written.values(), *(entry for entry in log if entry.position not in written)):
            moved |= {op.name: op.new for op in entry.operations if isinstance(op, Move)}
        for name in sorted(moved.keys() | refs.keys()):
            if moved.get(name) != refs.get(name):
                self._problem(f"{name} is not where the log says it was moved to", None, (name,))

    def _closure(
        self, roots: Iterable[ObjectId], kinds: Set[Kind] = frozenset(Kind)
    ) -> Iterator[tuple[ObjectId, Kind | None]]:
        """All that commits must reach through records of these kinds, the roots always; kind None for what
        is missing or whose row is damaged. Below the unreadable nothing is known."""
        seen: set[ObjectId] = set()
        waiting = list(roots)
        with self._store.reader() as reader:
            while waiting:
                id = waiting.pop()
                if id in seen:
                    continue
                seen.add(id)
                row = dropped = None
                try:
                    with self._store.snapshot() as snapshot:
                        row = snapshot.row(id)
                        dropped = snapshot.drops(id)
                except CorruptionError as error:
                    self._bad[id] = error
                if row is None:
                    yield id, None
                    continue
                yield id, row.kind
                if row.base is not None and Kind.CHUNK in kinds:
                    waiting.append(row.base)
                if row.kind is Kind.CHUNK or id in self._bad:
                    continue
                try:
                    payload = reader.objects(row.kind, [id])[0]
                    found = reach.below(reader, row.kind, id, payload, dropped)
                except CkptError as error:
                    # What a commit is left with is told by its tree: that one may be missing.
                    if dropped and Kind.TREE in kinds and isinstance(error, CorruptionError) and error.id:
                        yield ObjectId.parse(error.id), None
                    continue
                waiting += [child for kind, child in found.whole if kind in kinds]
                yield from ((tree, Kind.TREE) for tree in found.alone if Kind.TREE in kinds)
