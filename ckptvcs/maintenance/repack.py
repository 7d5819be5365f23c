"""Rewriting what stays: chunks encoded anew so that the newest commits read fastest, packs merged, old packs
renewed.

1. List the families of chunks (`chains`) and how new each chunk is. Encode each family in the ways that might
   suit it, and keep the plan by which tips of branches read fastest.
2. Take the plans in batches, leaving out those that cost most, until no batch takes more bytes, makes
   reading all of its chunks take longer, or those that tips hold. Each family's rows are pointed anew in one
   transaction, or not at all (`rewriting`).
3. Compact what that left behind, and merge small packs into packs of up to 1 GiB (`compaction`).

Every step leaves an intact repository, so it may be interrupted at any time. What would make the repository
larger or slower to read is left as it is.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final, NamedTuple

from ckptvcs.errors import CorruptionError, NotFoundError, StorageError
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.maintenance import chains, compaction
from ckptvcs.maintenance.chains import Cost, Plan
from ckptvcs.maintenance.marking import Rows, slices
from ckptvcs.maintenance.newness import Newness
from ckptvcs.maintenance.rewriting import Encoded, Rewriter
from ckptvcs.store import Row, Store
from ckptvcs.store.format import MAX_DEPTH, PACK_LIMIT, PackName

_SMALL_PACK: Final = PACK_LIMIT // 2
"""Packs below so many bytes are merged."""
_BATCH: Final = 256 << 20
"""Raw bytes of the families that are judged together."""
_LARGEST: Final = 512
"""Chunks in a family; a larger one is left alone."""
_KEPT: Final = 64 << 20
"""Bytes of encodings that are kept until it is known whether they are wanted. Others are made again."""


def _say_nothing(_: str) -> None:
    pass


@dataclass(slots=True)
class Report:
    """What a repack did, or would do.

    Attributes:
        chunks: of those looked at, how many were encoded anew.
        looked: chunks looked at.
        left: families that were left as they were, because nothing else is better.
        saved: bytes that the new encodings take less than the old ones.
        read_saved: bytes to be read and decoded less, if every chunk were read once.
        newest_saved: the same for the chunks that tips of branches and tags hold.
        packs, into: packs that were rewritten, and those that took their place.
        freed: bytes by which the pack files shrank; negative if they grew.
        renewed: bytes of live records in the old packs that were rewritten (`older_than`).
        problems: what was left alone because it is damaged, or for want of space.
    """

    dry_run: bool = False
    chunks: int = 0
    looked: int = 0
    left: int = 0
    saved: int = 0
    read_saved: int = 0
    newest_saved: int = 0
    packs: int = 0
    into: int = 0
    freed: int = 0
    renewed: int = 0
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "dry_run": self.dry_run,
            "chunks": self.chunks,
            "looked": self.looked,
            "left": self.left,
            "saved": self.saved,
            "read_saved": self.read_saved,
            "newest_saved": self.newest_saved,
            "packs": self.packs,
            "into": self.into,
            "freed": self.freed,
            "renewed": self.renewed,
            "problems": list(self.problems),
        }


def repack(
    store: Store,
    *,
    dry_run: bool = False,
    smallest: bool = False,
    say: Callable[[str], None] = _say_nothing,
) -> Report:
    """Encode anew, merge and compact. LockedError if a collector runs. Durable on return.

    Args:
        dry_run: really encode everything, and throw it away.
        smallest: let commits that are no tips take longer to read, if that saves bytes.
        say: told what is being done, for people who wait.
    """
    report = Report(dry_run)
    with store.collecting():
        before = _bytes(store)
        with Rewriter(store) as rewriter:
            _encode(store, rewriter, report, smallest, say)
        _merge(store, report, say)
        report.freed = before - _bytes(store) if not dry_run else report.saved
    return report


def renew(
    store: Store,
    older_than: float,
    *,
    dry_run: bool = False,
    say: Callable[[str], None] = _say_nothing,
) -> Report:
    """Copy the live records of packs that were last changed more than `older_than` seconds ago into new
    packs, so that a purge of old files does not find them. LockedError if a collector runs.

    The age is that of the file's last change: no policy takes a file for older than that. `format` and the
    other small files, which nothing rewrites, get a new time.
    """
    report = Report(dry_run)
    limit = store.disk.now_ns() - int(older_than * 10**9)
    with store.collecting():
        before = _bytes(store)
        old = []
        for name, use in sorted(compaction.usage(store).items()):
            try:
                if use.records and store.disk.modified_ns(store.layout.pack(name)) < limit:
                    old.append((name, use.bytes))
            except FileNotFoundError:
                report.problems.append(f"the pack {store.layout.pack(name)} is missing")
        report.renewed = sum(size for _, size in old)
        _compact(store, compaction.groups(old), report, say)
        if dry_run:
            return report
        for path in (store.layout.format, store.layout.config, store.layout.journal, store.layout.ignore):
            if store.disk.exists(path) and store.disk.modified_ns(path) < limit:
                store.disk.touch(path)
        report.freed = before - _bytes(store)
    return report


# -- packs ----------------------------------------------------------------------------------------


def _bytes(store: Store) -> int:
    with store.snapshot() as snapshot:
        return sum(info.size for info in snapshot.packs().values())


def _merge(store: Store, report: Report, say: Callable[[str], None]) -> None:
    """Compact packs of which a part is dead, and merge small ones."""
    used = compaction.usage(store)
    wanted = [
        (name, use.bytes)
        for name, use in sorted(used.items())
        if use.records and (use.records < use.all_records or use.all_bytes < _SMALL_PACK)
    ]
    groups = [
        group
        for group in compaction.groups(wanted)
        if len(group) > 1 or used[group[0]].records < used[group[0]].all_records
    ]
    empty = [name for name, use in used.items() if use.records == 0]
    report.packs += len(empty)
    if not report.dry_run:
        for name in empty:
            compaction.unlink(store, name)
    _compact(store, groups, report, say)


def _compact(
    store: Store, groups: Sequence[Sequence[PackName]], report: Report, say: Callable[[str], None]
) -> None:
    waiting = list(groups)
    while waiting:
        group = waiting.pop()
        say(f"pack {group[0].text}")
        try:
            if not report.dry_run:
                compaction.compact(store, group)
        except (CorruptionError, StorageError) as error:
            if isinstance(error, StorageError) and error.code != "disk-full":
                raise
            if len(group) > 1 and isinstance(error, CorruptionError):
                waiting += [[name] for name in group]
            else:
                report.problems.append(str(error))
        else:
            report.packs += len(group)
            report.into += 1


# -- encodings ------------------------------------------------------------------------------------


class _Choice(NamedTuple):
    """A plan for a family, with what it changes."""

    ids: Sequence[ObjectId]
    plan: Plan
    change: Cost
    raw: int


def _encode(
    store: Store, rewriter: Rewriter, report: Report, smallest: bool, say: Callable[[str], None]
) -> None:
    rows = Rows(store)
    newness = Newness(store, rows, say)
    report.problems += newness.problems
    batch: list[_Choice] = []
    made = _Encodings(store, rewriter)
    raw = 0
    for family in _families(store, rows, newness):
        say(f"chunk {family[0].short}")
        report.looked += len(family)
        try:
            found = _best(store, made, family, newness, smallest) if len(family) <= _LARGEST else None
        except StorageError:
            raise
        except (CorruptionError, NotFoundError) as error:
            report.problems.append(str(error))
            continue
        if found is None:
            report.left += 1
            continue
        batch.append(found)
        raw += found.raw
        if raw >= _BATCH:
            _take(store, rewriter, made, batch, report, smallest)
            batch, raw = [], 0
    _take(store, rewriter, made, batch, report, smallest)


class _Encodings:
    """Encodings of chunks against each other; the last ones are kept."""

    def __init__(self, store: Store, rewriter: Rewriter) -> None:
        self._store = store
        self._rewriter = rewriter
        self._kept: dict[tuple[ObjectId, ObjectId | None], Encoded] = {}
        self._bytes = 0

    def of(self, id: ObjectId, row: Row, base: ObjectId | None) -> Encoded:
        """A chunk against a base, or plain if that is smaller."""
        found = self._kept.get((id, base))
        if found is None:
            found = self._rewriter.encoded(id, row, base, however_deep=True)
            if self._bytes + found.cost <= _KEPT:
                self._kept[id, base] = found
                self._bytes += found.cost
        return found

    def forget(self, ids: Sequence[ObjectId], besides: Plan | None = None) -> None:
        """Keep no encodings of a family, except for those of a plan."""
        members = set(ids)
        for key in [key for key in self._kept if key[0] in members]:
            if besides is None or besides.get(key[0], key[0]) != key[1]:
                self._bytes -= self._kept.pop(key).cost


def _families(store: Store, rows: Rows, newness: Newness) -> Iterator[list[ObjectId]]:
    """All chunks by family, each with the newest first. Families with the newest chunks come first."""
    nothing = -1
    bases = array("q", [nothing]) * len(rows)
    chunks = array("q")
    for part in slices(store):
        for id, row in part:
            place = rows.place(id)
            if place is None or row.kind is not Kind.CHUNK:
                continue
            chunks.append(place)
            if row.base is not None:
                base = rows.place(row.base)
                bases[place] = nothing if base is None else base
    roots = array("q", range(len(rows)))
    for place in chunks:
        root = place
        for _ in range(MAX_DEPTH):
            if bases[root] == nothing:
                break
            root = bases[root]
        roots[place] = root
    first: dict[int, int] = {}
    for place in chunks:
        root, new = roots[place], newness.at(place)
        first[root] = min(first.get(root, new), new)
    order = sorted(chunks, key=lambda place: (first[roots[place]], roots[place], newness.at(place)))
    for _, places in groupby(order, key=lambda place: roots[place]):
        yield [rows.id(place) for place in places]


def _best(
    store: Store, made: _Encodings, ids: Sequence[ObjectId], newness: Newness, smallest: bool
) -> _Choice | None:
    """The plan by which tips read fastest and that takes the fewest bytes; None if the present one is."""
    with store.snapshot() as snapshot:
        rows = {id: row for id in ids if (row := snapshot.live(id)) is not None}
    old: dict[ObjectId, ObjectId | None] = {id: row.base for id, row in rows.items()}
    if len(rows) != len(ids) or any(base is not None and base not in rows for base in old.values()):
        return None  # damaged, or moved meanwhile
    raw = rows[ids[0]].raw
    newest = [id for id in ids if newness.of(id) < newness.tips]
    before = chains.cost(old, {id: row.cost for id, row in rows.items()}, raw, newest)
    best: _Choice | None = None
    for plan in chains.plans(old, ids, smallest=smallest):
        if chains.depths(plan) is None:
            continue
        found = {id: made.of(id, rows[id], base) for id, base in plan.items()}
        real: Plan = {id: each.frame.header.base for id, each in found.items()}
        costs = {id: each.cost for id, each in found.items()}
        change = chains.cost(real, costs, raw, newest) - before
        if _is_better(change, chains.NOTHING if best is None else best.change, smallest):
            best = _Choice(ids, plan, change, raw * len(ids))
    made.forget(ids, None if best is None else best.plan)
    return best


def _is_better(change: Cost, than: Cost, smallest: bool) -> bool:
    """Whether tips are read faster by it; or as fast, and it takes fewer bytes."""
    if smallest:
        return (change.bytes, change.newest) < (than.bytes, than.newest)
    return (change.newest, change.bytes) < (than.newest, than.bytes)


def _take(
    store: Store,
    rewriter: Rewriter,
    made: _Encodings,
    batch: list[_Choice],
    report: Report,
    smallest: bool,
) -> None:
    """Write the plans of a batch that together make nothing worse."""
    taken = _harmless(batch, smallest)
    report.left += len(batch) - len(taken)
    for choice in taken:
        with store.snapshot() as snapshot:
            rows = {id: snapshot.live(id) for id in choice.ids}
        group = [(id, row, made.of(id, row, choice.plan[id])) for id, row in rows.items() if row is not None]
        if len(group) != len(choice.ids):
            continue
        report.saved -= choice.change.bytes
        report.read_saved -= choice.change.read
        report.newest_saved -= choice.change.newest
        report.chunks += len(group)
        if not report.dry_run:
            rewriter.take_together(group)
            if rewriter.full:
                rewriter.publish()
    for choice in batch:
        made.forget(choice.ids)
    if not report.dry_run:
        rewriter.publish()


def _harmless(batch: Sequence[_Choice], smallest: bool) -> list[_Choice]:
    """As many of the plans as together make nothing worse: those that grow most are left out first."""

    def judged(change: Cost) -> Cost:
        return change._replace(read=0) if smallest else change

    left = list(batch)
    total = sum((judged(choice.change) for choice in left), chains.NOTHING)
    while left and not total.no_worse:
        worst = max(range(3), key=lambda at: total[at])
        left.sort(key=lambda choice: judged(choice.change)[worst])
        total -= judged(left.pop().change)
    return left
