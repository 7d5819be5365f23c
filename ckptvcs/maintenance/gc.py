"""Garbage collection beside writers and readers, exact, without clocks (docs/format.md, "Collection").

1. Under `gc.lock`, note the log position and collect roots: refs, `lost/`, pins, and what log entries
   younger than the undo window moved.
2. Mark in short read transactions. Something missing below a root: stop, delete nothing.
3. Delete unmarked rows, referrers first: commits, then trees, chunk lists, chunks by falling depth. Each
   transaction first compares the log position; if it moved, the new roots are marked and the transaction
   tried again, the third time with the marking inside. Then it bumps `gc_seq`, so that every writer
   looks its reused records up again before it publishes.
4. Unlink packs that no row points into, after their rows are gone. Compact packs that some rows point
   into: live records are copied verbatim, then one transaction moves their rows.
5. Remove what dead writers left: unpublished packs and temporary files whose lease nobody holds.

What the report announces in a dry run is what the run frees: both come from the same plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from ckptvcs.errors import CorruptionError, LockedError
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.store import Move, Pin, Reader, Row, Snapshot, Store, Target
from ckptvcs.store.format import PACK_LIMIT, TRAILER_BYTES, PackName, unpack_object
from ckptvcs.store.index import PackInfo
from ckptvcs.store.leases import lease_is_live, remove_dead_leases
from ckptvcs.store.packs import Frame, PackFile, PackWriter
from ckptvcs.store.rebuild import pack_names
from ckptvcs.store.writer import child_name

LOST_DAYS: Final = 30
_DAY: Final = 86_400
_SLICE: Final = 10_000
"""Rows one transaction reads or deletes."""
_AT_ONCE: Final = 64 << 20
"""Bytes of objects held in memory while marking."""
_LOST_COMPARISONS: Final = 3
_INGEST_WAIT: Final = 60.0
_ORDER: Final = {Kind.COMMIT: 0, Kind.TREE: 1, Kind.CHUNK_LIST: 2, Kind.CHUNK: 3}


@dataclass(slots=True)
class Report:
    """What a collection freed, or would free.

    Attributes:
        freed: bytes of records: headers, payloads and footer entries.
        records, commits: how many of them, and how many of those were commits.
        packs: files unlinked or rewritten.
        disk: bytes by which the pack files shrink, leftovers of dead writers included.
        leftovers: bytes of unpublished packs and temporary files of dead writers.
        held: bytes that only the undo window still holds; `--grace 0` frees them.
        grace: the undo window, in seconds.
        expired: lost/ refs older than 30 days that were dropped.
        problems: damage that kept a pack from being compacted.
    """

    dry_run: bool = False
    freed: int = 0
    records: int = 0
    commits: int = 0
    packs: int = 0
    disk: int = 0
    leftovers: int = 0
    held: int = 0
    grace: float = 0.0
    expired: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "dry_run": self.dry_run,
            "freed": self.freed,
            "records": self.records,
            "commits": self.commits,
            "packs": self.packs,
            "disk": self.disk,
            "leftovers": self.leftovers,
            "held": self.held,
            "grace": self.grace,
            "expired": list(self.expired),
            "problems": list(self.problems),
        }


def collect(store: Store, *, grace: float, dry_run: bool, who: str) -> Report:
    """Collect garbage. LockedError if another collector runs; CorruptionError, with nothing deleted, if
    something reachable is missing. Durable on return."""
    report = Report(dry_run=dry_run, grace=grace)
    with store.collecting():
        collection = _Collection(store, grace, report)
        if not dry_run:
            collection.expire_lost(who)
        collection.mark_roots()
        dead = collection.dead_rows()
        report.held = collection.held
        if dry_run:
            collection.plan(dead)
            collection.leftovers(remove=False)
            return report
        collection.delete(dead)
        # If the index were lost now, the journal must not bring back a ref whose deletion it missed.
        store.catch_up_journal(must=True)
        collection.sweep_packs()
        # What is being ingested has its name already and no row yet. Strays can wait for the next run.
        with (
            contextlib.suppress(LockedError),
            store.disk.lock(store.layout.packs_lock, wait=_INGEST_WAIT),
        ):
            collection.leftovers(remove=True)
    return report


class _Collection:
    def __init__(self, store: Store, grace: float, report: Report) -> None:
        self._store = store
        self._grace = grace
        self._report = report
        self._now = store.disk.now_ns()
        self._marked: set[ObjectId] = set()
        self._position = 0
        self.held = 0

    # -- roots and marking -----------------------------------------------------------------------

    def expire_lost(self, who: str) -> None:
        """Drop `lost/` refs older than 30 days. The log says when each was made."""
        for ref, target in self._old_lost():
            if self._store.update([Move(ref, target, None)], who=who, why="gc: expire lost"):
                self._report.expired.append(ref.removeprefix("refs/"))

    def _old_lost(self) -> list[tuple[str, ObjectId]]:
        limit = self._now - LOST_DAYS * _DAY * 10**9
        with self._store.snapshot() as snapshot:
            lost = snapshot.refs("refs/lost/")
            if not lost:
                return []
            made: dict[str, int] = {}
            for entry in snapshot.log():
                for op in entry.operations:
                    if isinstance(op, Move) and op.name in lost and op.new is not None:
                        made[op.name] = entry.time
        return [
            (ref, target)
            for ref, target in lost.items()
            if isinstance(target, ObjectId) and made.get(ref, 0) < limit
        ]

    def mark_roots(self) -> None:
        """Mark everything reachable; first from refs and pins, then from the undo window, so that the
        difference, which the window alone holds, is known."""
        with self._store.snapshot() as snapshot:
            self._position = snapshot.position()
            firm = _commits_of(snapshot.refs().values()) | snapshot.pins()
            recent = self._recent(snapshot)
        if self._report.dry_run:
            expiring = dict(self._old_lost())
            self._report.expired = [ref.removeprefix("refs/") for ref in expiring]
            with self._store.snapshot() as snapshot:
                kept = {k: v for k, v in snapshot.refs().items() if k not in expiring}
                firm = _commits_of(kept.values()) | snapshot.pins()
            if self._grace:  # dropping them will be a log entry, which the window then holds
                recent |= set(expiring.values())
        with self._store.reader() as reader:
            self._mark(reader, firm)
            before = set(self._marked)
            self._mark(reader, recent)
        self.held = self._bytes_of(self._marked - before)

    def _recent(self, snapshot: Snapshot) -> set[ObjectId]:
        """Commits that log entries inside the undo window name, as far as they are still stored."""
        if self._grace == 0:
            return set()
        limit = self._now - int(self._grace * 10**9)
        found: set[ObjectId] = set()
        for entry in snapshot.log_backwards():
            # Clocks may jump, so every entry is judged by itself; the log is short beside the data.
            if entry.time >= limit:
                for op in entry.operations:
                    if isinstance(op, Move):
                        found |= _commits_of((op.old, op.new))
                    elif isinstance(op, Pin):
                        found.add(op.commit)
        return {id for id in found if snapshot.row(id) is not None}

    def _mark(self, reader: Reader, roots: Iterable[ObjectId], within: Snapshot | None = None) -> None:
        """Mark all that the commits reach, delta bases included."""
        waiting: list[tuple[Kind, ObjectId]] = [(Kind.COMMIT, root) for root in roots]
        while waiting:
            batch, waiting = waiting[-_SLICE:], waiting[:-_SLICE]
            fresh = {id: kind for kind, id in batch if id not in self._marked}
            if within is not None:
                rows = {id: within.row(id) for id in fresh}
            else:
                with self._store.snapshot() as snapshot:
                    rows = {id: snapshot.row(id) for id in fresh}
            objects: list[tuple[Kind, list[ObjectId]]] = []
            size = _AT_ONCE
            for id, kind in sorted(fresh.items(), key=lambda item: item[1]):
                row = rows[id]
                if row is None:
                    raise CorruptionError(
                        f"the {kind.label} {id.short} is referred to but missing; nothing was deleted",
                        id=str(id),
                    )
                self._marked.add(id)
                if row.base is not None:
                    waiting.append((Kind.CHUNK, row.base))
                if row.kind is not Kind.CHUNK:
                    if size + row.raw > _AT_ONCE or objects[-1][0] is not row.kind:
                        objects.append((row.kind, []))
                        size = 0
                    objects[-1][1].append(id)
                    size += row.raw
            for kind, ids in objects:
                for id, payload in zip(ids, reader.objects(kind, ids), strict=True):
                    waiting += unpack_object(payload, child_name(kind, id))[0]

    def _bytes_of(self, ids: set[ObjectId]) -> int:
        total = 0
        for start in range(0, len(ids), _SLICE):
            part = list(ids)[start : start + _SLICE]
            with self._store.snapshot() as snapshot:
                total += sum(row.cost for row in map(snapshot.row, part) if row is not None)
        return total

    # -- rows ------------------------------------------------------------------------------------

    def dead_rows(self) -> list[tuple[ObjectId, Row]]:
        """Unmarked rows, referrers first: the order in which they are deleted."""
        dead: list[tuple[ObjectId, Row]] = []
        for id, row in self._all_rows():
            if id not in self._marked:
                dead.append((id, row))
        dead.sort(key=lambda item: (_ORDER[item[1].kind], -item[1].depth, item[0]))
        return dead

    def _all_rows(self) -> Iterable[tuple[ObjectId, Row]]:
        start = b""
        while True:
            with self._store.snapshot() as snapshot:
                part = snapshot.rows_from(start, _SLICE)
            yield from part
            if len(part) < _SLICE:
                return
            start = part[-1][0] + b"\x00"

    def delete(self, dead: list[tuple[ObjectId, Row]]) -> None:
        """Delete rows in bounded transactions. All commits go in one, and all trees: a commit names
        its parents and a tree its subtrees, so none of them may be seen without the others."""
        batches: list[list[tuple[ObjectId, Row]]] = []
        for kind in _ORDER:
            rows = [item for item in dead if item[1].kind is kind]
            step = _SLICE if kind in (Kind.CHUNK, Kind.CHUNK_LIST) else max(1, len(rows))
            batches += [rows[i : i + step] for i in range(0, len(rows), step)]
        for batch in batches:
            self._delete_batch(batch)

    def _delete_batch(self, batch: list[tuple[ObjectId, Row]]) -> None:
        lost = 0
        while True:
            with self._store.index.change() as change:
                moved = change.position() != self._position
                if moved and lost >= _LOST_COMPARISONS:
                    with self._store.reader() as reader:
                        self._mark(reader, self._new_roots(change), within=change)
                    self._position = change.position()
                    moved = False
                if not moved:
                    change.bump_gc_seq()
                    for id, row in batch:
                        if id not in self._marked and change.delete_row(id):
                            self._report.records += 1
                            self._report.commits += row.kind is Kind.COMMIT
                    return
            lost += 1
            with self._store.snapshot() as snapshot:
                roots = self._new_roots(snapshot)
                position = snapshot.position()
            with self._store.reader() as reader:
                self._mark(reader, roots)
            self._position = position

    def _new_roots(self, snapshot: Snapshot) -> set[ObjectId]:
        """Commits that entries behind the noted position rooted. What a move took away from is not
        kept: only the undo window does that, and it is marked already."""
        found: set[ObjectId] = set()
        for entry in snapshot.log(after=self._position):
            for op in entry.operations:
                if isinstance(op, Move):
                    found |= _commits_of((op.new, op.old if self._grace else None))
                elif isinstance(op, Pin) and op.pinned:
                    found.add(op.commit)
        return {id for id in found if snapshot.row(id) is not None}

    # -- packs -----------------------------------------------------------------------------------

    def _usage(self, dead: Iterable[ObjectId] = ()) -> dict[PackName, dict[ObjectId, Row]]:
        """Live rows by pack, of published packs."""
        gone = set(dead)
        with self._store.snapshot() as snapshot:
            live: dict[PackName, dict[ObjectId, Row]] = {name: {} for name in snapshot.packs()}
        for id, row in self._all_rows():
            if id not in gone and row.pack in live:
                live[row.pack][id] = row
        return live

    def plan(self, dead: list[tuple[ObjectId, Row]]) -> None:
        """Fill the report with what `delete` and `sweep_packs` would free."""
        self._report.records = len(dead)
        self._report.commits = sum(row.kind is Kind.COMMIT for _, row in dead)
        live = self._usage(id for id, _ in dead)
        unlinked, groups = self._work(live)
        for name in unlinked:
            self._count_unlinked(name)
        for group in groups:
            self._count_compacted(group, live)

    def sweep_packs(self) -> None:
        """Unlink dead packs and compact partly dead ones."""
        live = self._usage()
        unlinked, groups = self._work(live)
        for name in unlinked:
            self._count_unlinked(name)
            self._unlink(name)
        while groups:
            group = groups.pop()
            try:
                self._compact(group, live)
            except CorruptionError as error:
                if len(group) > 1:
                    groups += [[name] for name in group]
                else:
                    # The pack stays as it is: its sound records are safest where they lie.
                    self._report.problems.append(str(error))
            else:
                self._count_compacted(group, live)
                for name in group:
                    self._unlink(name)

    def _work(self, live: dict[PackName, dict[ObjectId, Row]]) -> tuple[list[PackName], list[list[PackName]]]:
        """Packs to unlink, and groups of packs whose live records go into one new pack each."""
        with self._store.snapshot() as snapshot:
            packs = snapshot.packs()
        unlinked, partly = [], []
        for name in sorted(live):
            if name not in packs:
                continue
            if not live[name]:
                unlinked.append(name)
            elif len(live[name]) < packs[name].records:
                partly.append(name)
        groups: list[list[PackName]] = []
        size = PACK_LIMIT
        for name in partly:
            bytes_live = sum(row.cost for row in live[name].values())
            if size + bytes_live > PACK_LIMIT:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += bytes_live
        return unlinked, groups

    def _records_bytes(self, name: PackName) -> int:
        """Bytes of a pack's records and footer entries: the file without its trailer."""
        with self._store.snapshot() as snapshot:
            info = snapshot.pack(name)
        return max(0, info.size - TRAILER_BYTES) if info else 0

    def _count_unlinked(self, name: PackName) -> None:
        self._report.freed += self._records_bytes(name)
        self._report.disk += self._records_bytes(name) + TRAILER_BYTES
        self._report.packs += 1

    def _count_compacted(self, group: list[PackName], live: dict[PackName, dict[ObjectId, Row]]) -> None:
        before = sum(self._records_bytes(name) for name in group)
        after = sum(row.cost for name in group for row in live[name].values())
        self._report.freed += before - after
        self._report.disk += before - after + TRAILER_BYTES * (len(group) - 1)
        self._report.packs += len(group)

    def _unlink(self, name: PackName) -> None:
        """The file first, then its row: a crash in between leaves a row without file, which the next
        run finishes. No row can come to point into a published pack again, so nothing is lost."""
        self._store.disk.remove(self._store.layout.pack(name))
        with self._store.index.change() as change:
            change.bump_gc_seq()
            change.delete_pack(name)

    def _compact(self, group: list[PackName], live: dict[PackName, dict[ObjectId, Row]]) -> None:
        store = self._store
        writer = PackWriter(store.disk, store.layout, store.lease.next_pack())
        moved: list[tuple[ObjectId, Row, Row]] = []
        try:
            for name in group:
                with contextlib.closing(self._opened(name)) as pack:
                    for id, row in sorted(live[name].items(), key=lambda item: item[1].offset):
                        header = pack.header(row.offset)
                        if header.id != id:
                            raise CorruptionError(
                                f"{pack.path}: the record at {row.offset} is not the one indexed",
                                path=str(pack.path),
                                offset=row.offset,
                                id=str(id),
                            )
                        entry = writer.append(Frame(header, pack.payload(header, row.offset)))
                        moved.append((id, row, row._replace(pack=writer.name, offset=entry.offset)))
            size = writer.seal()
        except BaseException:
            writer.abandon()
            raise
        with store.index.change() as change:
            store.lease.check()
            change.bump_gc_seq()
            change.put_pack(writer.name, PackInfo(size, len(moved)))
            for id, old, new in moved:
                current = change.row(id)
                if current is not None and (current.pack, current.offset) == (old.pack, old.offset):
                    change.put_row(id, current._replace(pack=new.pack, offset=new.offset))

    def _opened(self, name: PackName) -> PackFile:
        path = self._store.layout.pack(name)
        try:
            return PackFile(self._store.disk, path)
        except FileNotFoundError:
            raise CorruptionError(f"the pack {path} is missing", path=str(path)) from None

    # -- leftovers -------------------------------------------------------------------------------

    def leftovers(self, *, remove: bool) -> None:
        """Packs that were never published and temporary files, of writers that are gone."""
        store = self._store
        # Names first, then the published ones: a pack published in between is not taken for a stray.
        on_disk = pack_names(store.disk, store.layout)
        waiting = [store.layout.temporary / name for name in store.disk.names(store.layout.temporary)]
        live: dict[bytes, bool] = {}

        def is_live(lease: bytes) -> bool:
            if lease not in live:
                live[lease] = lease_is_live(store.disk, store.layout, lease)
            return live[lease]

        strays = [store.layout.pack(name) for name in on_disk if not is_live(name.lease)]
        with store.snapshot() as snapshot:
            published = {store.layout.pack(name) for name in snapshot.packs()}
        for path in waiting:
            name = PackName.parse(path.name)
            if name is not None and not is_live(name.lease):
                strays.append(path)
        for path in strays:
            if path in published:
                continue
            with contextlib.suppress(FileNotFoundError):
                size = store.disk.size(path)
                self._report.leftovers += size
                self._report.disk += size
                if remove:
                    store.disk.remove(path)
        if remove:
            remove_dead_leases(store.disk, store.layout)
            store.remove_rebuild_leftovers()


def _commits_of(targets: Iterable[Target | None]) -> set[ObjectId]:
    return {target for target in targets if isinstance(target, ObjectId)}
