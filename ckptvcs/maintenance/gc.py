"""Garbage collection beside writers and readers, exact, without clocks (docs/format.md, "Collection").

1. Under `gc.lock`, note the log position and collect roots: refs, `lost/`, pins, and what log entries
   younger than the undo window moved.
2. Mark in short read transactions. Something missing below a root: stop, delete nothing.
3. Remove what dead writers left: unpublished packs and temporary files whose lease nobody holds.
4. Delete unmarked rows, referrers first: commits, then trees, chunk lists, chunks by falling depth. Each
   transaction first compares the log position; if it moved, the new roots are marked and the transaction
   tried again, unless few moved it: then they are marked inside. Then it bumps `gc_seq`, so that every
   writer looks its reused records up again before it publishes.
5. Unlink packs that no row points into, after their rows are gone. Then compact packs that some rows point
   into. In this order a full disk has room again before anything is copied.

What a drop record names is not reached from its commit (`reach`).

What the report announces in a dry run is what the run frees: both come from the same plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ckptvcs.errors import CkptError, CorruptionError, InvalidError, LockedError, StorageError
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.maintenance import compaction, points, rebasing
from ckptvcs.maintenance.compaction import Usage
from ckptvcs.maintenance.marking import CLASSES, COMMITS, SLICE, Marks
from ckptvcs.maintenance.reach import Drops
from ckptvcs.maintenance.rebasing import Rebased
from ckptvcs.store import Move, Pin, Reader, Snapshot, Store, Target
from ckptvcs.store.format import TRAILER_BYTES, PackName, unpack_object
from ckptvcs.store.leases import lease_is_live, remove_dead_leases
from ckptvcs.store.rebuild import pack_names
from ckptvcs.store.writer import child_name

LOST_DAYS: Final = 30
_DAY: Final = 86_400
_BATCH: Final = 5_000
"""Rows that one transaction deletes."""
_FEW: Final = 32
"""So many new roots are marked while a transaction is open."""
_LOST_COMPARISONS: Final = 3
_INGEST_WAIT: Final = 60.0


@dataclass(slots=True)
class Report:
    """What a collection freed, or would free.

    Attributes:
        freed: bytes of records: headers, payloads and footer entries; less what encoding anew added.
        records, commits: how many of them, and how many of those were commits.
        packs: files unlinked or rewritten.
        reencoded: chunks that were encoded anew, so that their bases could go.
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
    reencoded: int = 0
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
            "reencoded": self.reencoded,
            "disk": self.disk,
            "leftovers": self.leftovers,
            "held": self.held,
            "grace": self.grace,
            "expired": list(self.expired),
            "problems": list(self.problems),
        }


def collect(
    store: Store,
    *,
    grace: float,
    dry_run: bool,
    who: str,
    dropping: Mapping[ObjectId, tuple[str, ...]] | None = None,
    rebase: bool = False,
) -> Report:
    """Collect garbage. LockedError if another collector runs; CorruptionError, with nothing deleted, if
    something reachable is missing. Durable on return.

    Args:
        dropping: commits and the components that a dry run takes for dropped; () for the whole payload.
        rebase: encode anew what is kept as a difference against what is not, so that the base can go. Else
            bases stay as long as a difference needs them.
    """
    if dropping and not dry_run:
        raise InvalidError("only a dry run takes drops for recorded", hint="record them first")
    report = Report(dry_run=dry_run, grace=grace)
    with store.collecting():
        collection = _Collection(store, grace, report, Drops(dropping))
        if not dry_run:
            collection.expire_lost(who)
        if dry_run:
            collection.leftovers(remove=False)
        else:
            # What is being ingested has its name already and no row yet. Strays can wait for the next run.
            with (
                contextlib.suppress(LockedError),
                store.disk.lock(store.layout.packs_lock, wait=_INGEST_WAIT),
            ):
                collection.leftovers(remove=True)
        collection.mark_roots(bases=not rebase)
        if rebase:
            collection.rebase()
        if dry_run:
            collection.plan()
            return report
        collection.delete()
        # If the index were lost now, the journal must not bring back a ref whose deletion it missed.
        store.catch_up_journal(must=True)
        collection.sweep_packs()
    return report


class _Collection:
    def __init__(self, store: Store, grace: float, report: Report, drops: Drops) -> None:
        self._store = store
        self._grace = grace
        self._report = report
        self._drops = drops
        self._now = store.disk.now_ns()
        self._position = 0
        self._marks: Marks
        self._rebased = Rebased()

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

    def mark_roots(self, *, bases: bool) -> None:
        """Mark everything reachable; first from refs and pins, then from the undo window, so that the
        difference, which the window alone holds, is known."""
        expiring = dict(self._old_lost()) if self._report.dry_run else {}
        with self._store.snapshot() as snapshot:
            self._position = snapshot.position()
            kept = {name: target for name, target in snapshot.refs().items() if name not in expiring}
            firm = _commits_of(kept.values()) | snapshot.pins()
            limit = self._now - int(self._grace * 10**9)
            recent = points.recent(snapshot, limit) if self._grace else set[ObjectId]()
        if expiring:
            self._report.expired = [ref.removeprefix("refs/") for ref in expiring]
            if self._grace:  # dropping them will be a log entry, which the window then holds
                recent |= set(expiring.values())
        self._marks = Marks(self._store, self._drops)
        with self._store.reader() as reader:
            self._marks.add(reader, firm, bases=bases)
            before = self._marks.bytes
            self._marks.add(reader, recent, bases=bases)
        self._report.held = self._marks.bytes - before

    def rebase(self) -> None:
        """Encode anew what needs bases that are not marked, then mark the bases that are left."""
        dry = self._report.dry_run
        try:
            self._rebased = rebasing.rebase(self._store, self._marks, write=not dry)
        except StorageError as error:
            if error.code != "disk-full":
                raise
            self._report.problems.append(str(error))
        # Where rows point now is what counts: a row may have been left alone.
        self._marks.add_bases(self._rebased.bases if dry else {})
        self._report.problems += self._rebased.problems
        self._report.reencoded = len(self._rebased.bases)
        self._report.freed -= self._rebased.added
        self._report.disk -= self._rebased.added + TRAILER_BYTES * self._rebased.packs

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

    def _root(self, commits: set[ObjectId], position: int, within: Snapshot | None = None) -> None:
        """Mark what became a root up to a position."""
        if commits:
            with self._store.reader() as reader:
                self._marks.add(reader, commits, within)
        self._position = position

    # -- rows ------------------------------------------------------------------------------------

    def _is_dead(self, id: ObjectId) -> bool:
        return id not in self._marks

    def _leaves(self, id: ObjectId) -> bool:
        """Whether a dry run's rows leave their pack: deleted, or pointed at a new record."""
        return self._is_dead(id) or id in self._rebased.bases

    def delete(self) -> None:
        """Delete the rows that are not marked, in bounded transactions.

        A commit's row vouches for its parents, so no transaction may delete a commit and leave one that
        refers to it. Nothing else vouches for others, except that a frame must not outlive its base.
        """
        for kind in CLASSES:
            if kind == COMMITS:
                places: Iterable[int] = self._referrers_first()
            else:
                places = self._marks.rows.unmarked(kind)
            batch: list[int] = []
            for place in places:
                batch.append(place)
                if len(batch) == _BATCH:
                    self._delete(batch)
                    batch = []
            self._delete(batch)

    def _referrers_first(self) -> list[int]:
        """Places of dead commits, each behind those that refer to it."""
        rows = self._marks.rows
        dead = list(rows.unmarked(COMMITS))
        children = dict.fromkeys(dead, 0)
        below: dict[int, tuple[int, ...]] = {}
        with self._store.reader() as reader:
            for place, references in self._references(reader, dead):
                parents = (rows.place(id) for kind, id in references if kind is Kind.COMMIT)
                below[place] = tuple(parent for parent in parents if parent in children)
                for parent in below[place]:
                    children[parent] += 1
        order = [place for place, count in children.items() if count == 0]
        for place in order:  # which grows behind
            for parent in below.pop(place, ()):
                children[parent] -= 1
                if children[parent] == 0:
                    order.append(parent)
        return order

    def _references(
        self, reader: Reader, places: Sequence[int]
    ) -> Iterator[tuple[int, list[tuple[Kind, ObjectId]]]]:
        """What dead commits refer to. One that cannot be read refers to nothing: no ref to it is of use."""
        for start in range(0, len(places), SLICE):
            part = [(place, self._marks.rows.id(place)) for place in places[start : start + SLICE]]
            try:
                payloads = reader.objects(Kind.COMMIT, [id for _, id in part])
            except CkptError:
                payloads = []
                for _, id in part:
                    try:
                        payloads += reader.objects(Kind.COMMIT, [id])
                    except CkptError:
                        payloads.append(b"")
            for (place, id), payload in zip(part, payloads, strict=True):
                with contextlib.suppress(CorruptionError):
                    yield place, unpack_object(payload, child_name(Kind.COMMIT, id))[0]

    def _delete(self, places: list[int]) -> None:
        """Delete rows in one transaction, or in more and smaller ones if the disk is so full that the index
        cannot grow: what one of them frees serves the next."""
        waiting = [places] if places else []
        while waiting:
            batch = waiting.pop()
            try:
                self._delete_batch(batch)
            except StorageError as error:
                if error.code != "disk-full" or len(batch) == 1:
                    raise
                half = len(batch) // 2
                waiting += [batch[half:], batch[:half]]

    def _delete_batch(self, batch: list[int]) -> None:
        """One transaction. What was rooted since the marks were made is marked before it is opened; the few
        roots that came while it was waited for are marked inside, so that busy committers cannot keep a
        collector from ever deleting."""
        rows = self._marks.rows
        for attempt in range(_LOST_COMPARISONS + 1):
            with self._store.snapshot() as snapshot:
                self._root(self._new_roots(snapshot), snapshot.position())
            with self._store.index.change() as change:
                roots = self._new_roots(change)
                if len(roots) > _FEW and attempt < _LOST_COMPARISONS:
                    continue
                self._root(roots, change.position(), within=change)
                change.bump_gc_seq()
                dead = [place for place in batch if not rows.marks(place)]
                gone = [place for place in dead if change.delete_row(rows.id(place))]
            self._report.records += len(gone)
            self._report.commits += sum(map(rows.is_commit, gone))
            return

    # -- packs -----------------------------------------------------------------------------------

    def plan(self) -> None:
        """Fill the report with what `delete` and `sweep_packs` would free."""
        for kind in CLASSES:
            dead = sum(1 for _ in self._marks.rows.unmarked(kind))
            self._report.records += dead
            self._report.commits += dead if kind == COMMITS else 0
        used = compaction.usage(self._store, self._leaves)
        for name in _unused(used):
            self._count([name], used)
        for group in _groups(used):
            self._count(group, used)

    def sweep_packs(self) -> None:
        """Unlink dead packs, then compact partly dead ones."""
        used = compaction.usage(self._store)
        for name in _unused(used):
            compaction.unlink(self._store, name)
            self._count([name], used)
        waiting = _groups(used)
        while waiting:
            group = waiting.pop()
            try:
                compaction.compact(self._store, group)
            except (CorruptionError, StorageError) as error:
                if isinstance(error, StorageError) and error.code != "disk-full":
                    raise
                if len(group) > 1:
                    # Those with the least to copy come first: what they free may be room for the others.
                    waiting += [[name] for name in sorted(group, key=lambda name: -used[name].bytes)]
                else:
                    # The pack stays as it is: its sound records are safest where they lie.
                    self._report.problems.append(str(error))
            else:
                self._count(group, used)

    def _count(self, names: list[PackName], used: dict[PackName, Usage]) -> None:
        """Add what packs free whose live records go into one new pack, if there are any."""
        before = sum(used[name].all_bytes for name in names)
        after = sum(used[name].bytes for name in names)
        self._report.freed += before - after
        self._report.disk += before - after + TRAILER_BYTES * (len(names) - bool(after))
        self._report.packs += len(names)

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


def _unused(used: dict[PackName, Usage]) -> list[PackName]:
    """Packs without a live record."""
    return sorted(name for name, pack in used.items() if pack.records == 0)


def _groups(used: dict[PackName, Usage]) -> list[list[PackName]]:
    """Partly dead packs, by the new pack that their live records go into."""
    return compaction.groups(
        (name, pack.bytes) for name, pack in sorted(used.items()) if 0 < pack.records < pack.all_records
    )


def _commits_of(targets: Iterable[Target | None]) -> set[ObjectId]:
    return {target for target in targets if isinstance(target, ObjectId)}
