"""Checking a repository: refs -> rows -> packs -> ids. What is found is told from the record up: tensors,
commits, refs.

- *quick*: each published pack is there, as long as it was, with a whole footer; each row lies inside one;
  refs name commits; the journal says what the log says. No record is read.
- the default also proves that every ref reaches all it needs, that rows and footers agree, and that commits,
  trees and chunk lists hash to their ids.
- *full* decodes and hashes every record.
- *scrub* checks the stored bytes of every record against their digests, as many at a time as a budget allows
  (`scrub`).

Nothing is deleted. What was read and found damaged is marked in the index, so that content that is committed
again is stored again; a mark goes when the record is found sound. `repair` mends what can be mended.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ckptvcs.errors import CkptError, CorruptionError, NotFoundError, StorageError
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.maintenance import repair as repairing
from ckptvcs.maintenance import scrub
from ckptvcs.maintenance.damage import Hurt, Survey
from ckptvcs.maintenance.marking import slices
from ckptvcs.store import Move, Reader, Row, Store, Target
from ckptvcs.store.format import HEADER_BYTES, TRAILER_BYTES, Entry, PackName, unpack_object
from ckptvcs.store.packs import PackFile
from ckptvcs.store.rebuild import Rebuilt
from ckptvcs.store.writer import child_name

_SHOWN: Final = 8


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, in a sentence, with the id it was found at, the commits that cannot be
    restored whole because of it, the paths of what in them is unreadable, and the refs above those."""

    message: str
    id: str | None = None
    path: str | None = None
    refs: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()


@dataclass(slots=True)
class Report:
    """What a check looked at and found. Truthy if all is well.

    Attributes:
        level: quick, default, full or scrub.
        scrubbed: how far a scrub is.
        repaired: what was mended before this was checked.
    """

    level: str = "default"
    refs: int = 0
    commits: int = 0
    records: int = 0
    packs: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    rebuilt: Rebuilt | None = None
    scrubbed: scrub.Progress | None = None
    repaired: repairing.Repaired | None = None

    @property
    def full(self) -> bool:
        """Whether every byte was hashed."""
        return self.level == "full"

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
            "level": self.level,
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
                    "tensors": list(p.tensors),
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
        if self.scrubbed is not None:
            found["scrub"] = self.scrubbed.as_dict()
        if self.repaired is not None:
            found["repaired"] = self.repaired.as_dict()
        return found


def _say_nothing(_: str) -> None:
    pass


def check(
    store: Store,
    *,
    full: bool = False,
    quick: bool = False,
    repair: bool = False,
    budget: scrub.Budget | None = None,
    say: Callable[[str], None] = _say_nothing,
) -> Report:
    """Check everything. Problems are collected, not raised.

    Args:
        full, quick: the level; with neither, the default.
        repair: mend what can be mended (`repair`), then check again. LockedError if a collector runs.
        budget: scrub instead, so much of the repository, from where the last scrub stopped.
        say: told what is looked at, for people who wait.
    """
    checker = _checked(store, full, quick, budget, say)
    if repair and checker.report.problems:
        done = repairing.repair(store, checker.bad, checker.broken_packs, say)
        checker = _checked(store, full, quick, None if budget is None else scrub.NOTHING, say)
        checker.report.repaired = done
    return checker.report


def _checked(
    store: Store, full: bool, quick: bool, budget: scrub.Budget | None, say: Callable[[str], None]
) -> _Checker:
    level = "scrub" if budget is not None else "full" if full else "quick" if quick else "default"
    checker = _Checker(store, Report(level, rebuilt=store.rebuilt), say)
    checker.check_packs()
    if quick:
        checker.count_rows()
        checker.check_tips()
    else:
        if budget is not None:
            checker.scrub(budget)
        checker.check_rows()
        checker.mark()
        checker.check_refs()
    checker.check_journal()
    return checker


class _Checker:
    def __init__(self, store: Store, report: Report, say: Callable[[str], None]) -> None:
        self.report = report
        self.bad: dict[ObjectId, CkptError] = {}
        self.broken_packs: set[PackName] = set()
        self._store = store
        self._say = say
        self._read: set[ObjectId] = set()
        self._marked: set[ObjectId] = set()
        self._entries: dict[PackName, set[tuple[int, ObjectId]]] = {}
        self._missing: dict[PackName, Path] = {}

    def _problem(self, error: CkptError | str, id: ObjectId | None = None, refs: Iterable[str] = ()) -> None:
        path = error.path if isinstance(error, CorruptionError) else None
        self.report.problems.append(Problem(str(error), None if id is None else str(id), path, tuple(refs)))

    # -- packs -----------------------------------------------------------------------------------

    def check_packs(self) -> None:
        """Each published pack is there, as long as it was, with a whole footer."""
        store = self._store
        with store.snapshot() as snapshot:
            packs = snapshot.packs()
        for name, info in packs.items():
            path = store.layout.pack(name)
            self._say(f"pack {name.text}")
            self.report.packs += 1
            try:
                with contextlib.closing(PackFile(store.disk, path)) as pack:
                    size = pack.size()
                    if size != info.size:
                        raise CorruptionError(
                            f"{path} has {size} bytes instead of {info.size}", path=str(path)
                        )
                    records = pack.records()
                    if records != info.records:
                        raise CorruptionError(
                            f"{path} lists {records} records instead of {info.records}", path=str(path)
                        )
                    if self.report.level != "quick":
                        self._check_entries(name, pack)
                self.report.bytes += size - TRAILER_BYTES
            except FileNotFoundError:
                # Harmless if nothing lies in it: a collector was interrupted between unlinking it and
                # forgetting it. The rows tell.
                self._missing[name] = path
            except CkptError as error:
                with store.snapshot() as snapshot:
                    if snapshot.pack(name) is not None:  # else it was collected meanwhile
                        self.broken_packs.add(name)
                        self._problem(error)

    def _check_entries(self, name: PackName, pack: PackFile) -> None:
        """Note what the footer lists. With `full`, each live record's header says the same, and its payload
        has the header's digest: compaction relies on both, and reading may pass over them."""
        entries = pack.entries()
        self._entries[name] = {(entry.offset, entry.id) for entry in entries}
        if not self.report.full:
            return
        with self._store.snapshot() as snapshot:
            rows = {entry.id: snapshot.row(entry.id) for entry in entries}
        for entry in entries:
            row = rows[entry.id]
            if row is None or (row.pack, row.offset) != (name, entry.offset):
                continue
            try:
                scrub.check_record(pack, entry)
            except CkptError as error:
                self.bad[entry.id] = error

    def scrub(self, budget: scrub.Budget) -> None:
        """Check records against their digests, as many as the budget allows."""
        self.report.scrubbed, found = scrub.scrub(self._store, budget, self._say)
        self.bad.update(found)

    # -- rows ------------------------------------------------------------------------------------

    def count_rows(self) -> None:
        """Each row lies inside a published pack. Reads no record."""
        with self._store.snapshot() as snapshot:
            packs = snapshot.packs()
        counts: dict[PackName, int] = {}
        for rows in self._slices():
            for id, row in rows:
                self.report.records += 1
                self.report.commits += row.kind is Kind.COMMIT
                counts[row.pack] = counts.get(row.pack, 0) + 1
                info = packs.get(row.pack)
                if info is not None and row.offset + HEADER_BYTES + row.stored > info.size:
                    self._problem(f"the index row of {id.short} points behind the end of its pack", id)
                if row.damaged:
                    self._problem(f"the {row.kind.label} {id.short} is known to be damaged", id)
        for name, path in self._missing.items():
            if counts.get(name):
                self._problem(
                    CorruptionError(
                        f"the pack {path} is missing, and {counts[name]:,} records with it", path=str(path)
                    )
                )
        for name in counts.keys() - packs.keys():
            with self._store.snapshot() as snapshot:
                if snapshot.pack(name) is None:  # else it was published meanwhile
                    self._problem(
                        f"{counts[name]:,} index rows point into {self._store.layout.pack(name)}, which is "
                        "not a pack of this repository"
                    )

    def check_tips(self) -> None:
        """Each ref names a commit that is indexed."""
        with self._store.snapshot() as snapshot:
            refs = snapshot.refs()
            self.report.refs = len(refs)
            for name, target in refs.items():
                if isinstance(target, ObjectId):
                    row = snapshot.row(target)
                    if row is None or row.kind is not Kind.COMMIT:
                        self._problem(f"{target.short} is referred to but missing", target, (name,))

    def check_rows(self) -> None:
        """Each row points at a record of its id; objects, and with `full` all records, hash to it."""
        for rows in self._slices():
            self._say(f"record {rows[0][0].short}" if rows else "records")
            with self._store.reader() as reader:
                for id, row in rows:
                    self._check_row(reader, id, row)

    def _check_row(self, reader: Reader, id: ObjectId, row: Row) -> None:
        self.report.records += 1
        self.report.commits += row.kind is Kind.COMMIT
        if row.damaged:
            self._marked.add(id)
        if id in self.bad:
            return
        # A row the footers do not know was published or moved since they were listed, or is really
        # wrong: reading it tells.
        known = (row.offset, id) in self._entries.get(row.pack, ())
        if known and row.kind is Kind.CHUNK and not self.report.full and not row.damaged:
            return
        path = self._missing.get(row.pack)
        if path is not None and self._still_in(id, row.pack):
            self.bad[id] = CorruptionError(f"the pack {path} is missing", path=str(path))
            return
        try:
            self._look_into(reader, id, row)
            self._read.add(id)
        except NotFoundError:
            return  # collected meanwhile
        except CkptError as error:
            self.bad[id] = error

    def _still_in(self, id: ObjectId, pack: PackName) -> bool:
        """Whether the record was not moved or collected since its row was read."""
        with self._store.snapshot() as snapshot:
            row = snapshot.row(id)
        return row is not None and row.pack == pack

    def _look_into(self, reader: Reader, id: ObjectId, row: Row) -> None:
        if row.kind is Kind.CHUNK:
            reader.chunk(id)
        else:
            payload = reader.objects(row.kind, [id])[0]
            unpack_object(payload, child_name(row.kind, id))

    def _slices(self) -> Iterator[list[tuple[ObjectId, Row]]]:
        try:
            yield from slices(self._store)
        except CorruptionError as error:
            self._problem(error)

    def mark(self) -> None:
        """Mark the rows of records whose bytes are damaged, and take marks from those that are sound.

        A repository that cannot be written stays as it is.
        """
        with self._store.reader() as reader:
            found = ((id, self._at_fault(reader, id, error)) for id, error in self.bad.items())
            at_fault = {id: row for id, row in found if row is not None}
        sound = self._marked & self._read
        if not (at_fault.keys() - self._marked or sound):
            return
        with contextlib.suppress(StorageError), self._store.index.change() as change:
            change.bump_gc_seq()
            for id, seen in at_fault.items():
                if change.row(id) == seen:  # else it was healed or moved meanwhile
                    change.put_row(id, seen._replace(damaged=True))
            for id in sound:
                row = change.row(id)
                if row is not None:
                    change.put_row(id, row._replace(damaged=False))

    def _at_fault(self, reader: Reader, id: ObjectId, error: CkptError) -> Row | None:
        """The row of a record whose own bytes are damaged or cannot be read; None if it is those of a base.

        A pack that is missing is noticed without marks.
        """
        unreadable = isinstance(error, StorageError) and error.errno == errno.EIO
        if not unreadable and not isinstance(error, CorruptionError):
            return None
        row = None
        with contextlib.suppress(CorruptionError), self._store.snapshot() as snapshot:
            row = snapshot.row(id)
        if row is None:
            return None
        try:
            with contextlib.closing(PackFile(self._store.disk, self._store.layout.pack(row.pack))) as pack:
                scrub.check_record(pack, _entry_of(id, row))
        except FileNotFoundError:
            return None
        except CorruptionError:
            return row
        except StorageError as again:
            return row if again.errno == errno.EIO else None
        except CkptError:
            return None
        if row.base is not None:
            try:
                reader.chunk(row.base)
            except CkptError:
                return None
        return row if not unreadable else None

    # -- refs ------------------------------------------------------------------------------------

    def check_refs(self) -> None:
        """Everything each ref reaches is stored and, as far as it was checked, sound."""
        try:
            with self._store.snapshot() as snapshot:
                refs = snapshot.refs()
        except CkptError as error:
            self._problem(error)
            return
        self.report.refs = len(refs)
        survey = Survey(self._store, self.bad)
        survey.follow({name: target for name, target in refs.items() if isinstance(target, ObjectId)})
        causes: dict[str, tuple[CkptError, ObjectId]] = {}
        for id, damage in self.bad.items():
            causes.setdefault(str(damage), (damage, id))
        for cause, (damage, id) in causes.items():
            self._report_damage(damage, id, survey.hurt.get(cause, Hurt()))

    def _report_damage(self, error: CkptError, id: ObjectId, hurt: Hurt) -> None:
        """One problem for each cause, with what it took."""
        note = "; nothing refers to it"
        if hurt.commits:
            commits = _few([commit.short for commit in hurt.commits])
            refs = _few([name.removeprefix("refs/heads/").removeprefix("refs/") for name in hurt.refs])
            note = f"; {len(hurt.commits)} commit(s) cannot be restored whole: {commits} (of {refs})"
            if hurt.tensors:
                note += f"; unreadable in them: {_few(list(hurt.tensors))}"
        path = error.path if isinstance(error, CorruptionError) else None
        self.report.problems.append(
            Problem(
                str(error) + note,
                str(id),
                path,
                tuple(hurt.refs),
                tuple(map(str, hurt.commits)),
                tuple(hurt.tensors),
            )
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


def _entry_of(id: ObjectId, row: Row) -> Entry:
    return Entry(row.offset, row.kind, row.codec, row.element_size, row.raw, row.stored, id, row.base)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
