"""Making the index anew from packs and journal (docs/format.md, "Rebuild").

Runs under the exclusive repository lock, so nobody writes, reads or collects meanwhile. The new index is
built aside and takes the place of the old one at the end; a crash before that leaves the old state, a
crash while they change places no index, which the next open makes again.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

from ckptvcs.disk import Disk, random_name
from ckptvcs.errors import CkptError, CorruptionError, StorageError
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.store.format import GRIDS, MAX_DEPTH, Entry, Format, Layout, PackName, unpack_object
from ckptvcs.store.index import Index, PackInfo, Row
from ckptvcs.store.journal import Journal, Move
from ckptvcs.store.packs import PackFile
from ckptvcs.store.reader import Reader
from ckptvcs.store.writer import child_name

Below: TypeAlias = Callable[
    [Reader, Kind, ObjectId, bytes, "tuple[str, ...] | None"],
    "tuple[Sequence[tuple[Kind, ObjectId]], Sequence[ObjectId]]",
]
"""What an object must reach, given its payload and what a drop record took from it: records with all that
is below them, and trees by themselves. Those above this layer know what a tree is."""


def everything_below(
    reader: Reader, kind: Kind, id: ObjectId, payload: bytes, dropped: tuple[str, ...] | None
) -> tuple[Sequence[tuple[Kind, ObjectId]], Sequence[ObjectId]]:
    """`Below` for those who do not know: of a payload that was dropped in part all is wanted."""
    references = unpack_object(payload, child_name(kind, id))[0]
    if kind is Kind.COMMIT and dropped == ():
        return [reference for reference in references if reference[0] is Kind.COMMIT], ()
    return references, ()


@dataclass(slots=True)
class Rebuilt:
    """What a rebuild found. `problems` are sentences for people."""

    packs: int = 0
    records: int = 0
    log_entries: int = 0
    left_out: int = 0
    problems: list[str] = field(default_factory=list)


def rebuild(
    disk: Disk,
    layout: Layout,
    pool: Callable[[], ThreadPoolExecutor],
    below: Below = everything_below,
    *,
    rescue: bool,
) -> tuple[Format, Rebuilt]:
    """Write a new index and the `format` file that names it. Durable on return.

    The caller holds `lock` exclusively and has no index open. Without a journal the refs are lost:
    CorruptionError, or with `rescue` every commit without a child is kept under lost/.
    """
    report = Rebuilt()
    stamped = Format.unpack(disk.read(layout.format), str(layout.format)).with_new_index()
    journal = Journal(disk, layout.journal)
    entries = list(journal.entries(report.problems.append)) if disk.exists(layout.journal) else []
    if not entries and not rescue:
        raise CorruptionError(
            f"{layout.journal} is missing or empty, so the refs cannot be rebuilt",
            hint="put back a copy of it; without one, `ckpt fsck --rebuild` finds the commits and keeps "
            "them under lost/",
            path=str(layout.journal),
        )
    clear_leftovers(disk, layout)
    aside = layout.temporary / f"meta-{random_name()}"
    disk.make_dir(aside)
    index = Index.create(disk, aside, stamped.index)
    try:
        candidates = _scan(disk, layout, report)
        rows = _choose(candidates, report, lambda *place: _is_sound(disk, layout, *place))
        with index.change() as change:
            for pack, info in sorted(candidates.packs.items()):
                change.put_pack(pack, info)
            for id, row in sorted(rows.items()):
                change.put_row(id, row)
            for entry in entries:
                change.apply(entry)
                report.log_entries += 1
        grid = GRIDS[stamped.grid]
        with Reader(disk, layout, index, grid, pool) as reader:
            references, alone = _references(reader, index, rows, below)
        dangling = _dangling(index, references, alone, rows)
        if dangling:
            with index.change() as change:
                for id in dangling:
                    change.delete_row(id)
        for id in dangling:
            del rows[id]
        with index.change() as change:
            for id, refers in _commits_first_below(references, rows):
                change.put_rank(id, refers)
        if not entries:
            with index.change() as change:
                entry = change.record(disk.now_ns(), "ckpt", "rebuild", _rescued(references, rows))
            if not disk.exists(layout.journal):
                journal.create()
                disk.sync_dir(layout.root)
            journal.append(lambda _: [entry])
            report.log_entries = 1
            report.problems.append(
                f"{layout.journal} was missing or empty: branches and tags are lost, and "
                f"{len(entry.operations) - 1} commit(s) without a child are kept under lost/"
            )
        report.left_out += len(dangling)
        report.packs = len(candidates.packs)
        report.records = len(rows)
    finally:
        index.close()
    for name in disk.names(aside):
        if name != "data.mdb":
            disk.remove(aside / name)
    disk.sync_dir(aside)
    # The old index goes first, then its id, then the new one comes: a crash in between leaves no index
    # at all, which the next open makes again, and never one that does not fit `format`.
    old = layout.temporary / f"old-{random_name()}"
    if disk.exists(layout.meta):
        disk.rename(layout.meta, old)
        disk.sync_dir(layout.temporary)
        disk.sync_dir(layout.root)
    disk.replace(layout.format, stamped.pack())
    disk.rename(aside, layout.meta)
    disk.sync_dir(layout.temporary)
    disk.sync_dir(layout.root)
    disk.remove_tree(old)
    return stamped, report


def clear_leftovers(disk: Disk, layout: Layout) -> None:
    """Remove what a rebuild that died left behind. The caller holds `lock`, so none is running."""
    for name in disk.names(layout.temporary):
        if name.startswith(("meta-", "old-")):
            disk.remove_tree(layout.temporary / name)
    for name in disk.names(layout.root):
        if name.startswith("format.") and name.endswith(".tmp"):
            disk.remove(layout.root / name)


class _Candidates:
    def __init__(self) -> None:
        self.packs: dict[PackName, PackInfo] = {}
        self.entries: dict[ObjectId, list[tuple[PackName, Entry]]] = {}


def pack_names(disk: Disk, layout: Layout) -> list[PackName]:
    """Every sealed pack on disk, in name order. What else lies in `packs/` is left alone."""
    found = []
    for folder in disk.names(layout.packs):
        path = layout.packs / folder
        if not re.fullmatch("[0-9a-f]{2}", folder) or not disk.is_dir(path) or disk.is_link(path):
            continue
        for file in disk.names(layout.packs / folder):
            name = PackName.parse(file)
            if name is None or layout.pack(name).parent.name != folder:
                continue
            if disk.is_file(layout.pack(name)):
                found.append(name)
    return sorted(found)


def _scan(disk: Disk, layout: Layout, report: Rebuilt) -> _Candidates:
    found = _Candidates()
    for name in pack_names(disk, layout):
        with contextlib.closing(PackFile(disk, layout.pack(name))) as pack:
            try:
                trailer = pack.trailer()
                if trailer.name != name:
                    raise CorruptionError(f"{pack.path} holds the pack {trailer.name.text}")
                entries = pack.entries()
            except CorruptionError as error:
                entries = list(pack.scan())
                report.problems.append(f"{error}; {len(entries)} whole records were salvaged")
            found.packs[name] = PackInfo(pack.size(), len(entries))
        for entry in entries:
            found.entries.setdefault(entry.id, []).append((name, entry))
    return found


def _choose(
    candidates: _Candidates, report: Rebuilt, is_sound: Callable[[PackName, Entry], bool]
) -> dict[ObjectId, Row]:
    """One row per id: plain frames first, then by least depth, never a cycle; ties by pack name.

    Of several plain copies the first sound one is taken: the next collection drops the others.
    """
    rows: dict[ObjectId, Row] = {}
    deltas: list[tuple[ObjectId, PackName, Entry]] = []
    for id, places in candidates.entries.items():
        plain = [place for place in places if place[1].base is None]
        if plain:
            plain.sort(key=lambda place: (place[0], place[1].offset))
            name, entry = plain[0]
            if len(plain) > 1:
                sound = (place for place in plain if is_sound(*place))
                name, entry = next(sound, plain[0])
            rows[id] = Row.of(entry, name, 0)
        else:
            deltas += [(id, name, entry) for name, entry in places]
    deltas.sort(key=lambda item: (item[1], item[2].offset))
    for depth in range(1, MAX_DEPTH + 1):
        added = {
            id: Row.of(entry, name, depth)
            for id, name, entry in reversed(deltas)
            if id not in rows and entry.base in rows
        }
        rows.update(added)
    lost = {id for id, _, _ in deltas} - rows.keys()
    if lost:
        report.left_out += len(lost)
        report.problems.append(f"{len(lost)} frames have no base and were left out")
    return rows


def _is_sound(disk: Disk, layout: Layout, name: PackName, entry: Entry) -> bool:
    """Whether a record is the one its footer entry names and its payload passes its check."""
    try:
        with contextlib.closing(PackFile(disk, layout.pack(name))) as pack:
            header = pack.header(entry.offset)
            pack.payload(header, entry.offset)
    except CkptError:
        return False
    return header.id == entry.id


def _references(
    reader: Reader, index: Index, rows: dict[ObjectId, Row], below: Below
) -> tuple[dict[ObjectId, list[ObjectId]], dict[ObjectId, Sequence[ObjectId]]]:
    """What each sound object must reach, and the trees that commits need by themselves besides.

    StorageError if the disk does not give one: that says nothing of its bytes, and taken for damage it would
    cost the rows of what is below.
    """
    references: dict[ObjectId, list[ObjectId]] = {}
    alone: dict[ObjectId, Sequence[ObjectId]] = {}
    for id, row in rows.items():
        if row.kind is not Kind.CHUNK:
            with index.snapshot() as snapshot:
                dropped = snapshot.drops(id) if row.kind is Kind.COMMIT else None
            try:
                payload = reader.objects(row.kind, [id])[0]
                whole, by_themselves = below(reader, row.kind, id, payload, dropped)
            except StorageError:
                raise
            except CkptError:
                continue
            references[id] = [child for _, child in whole]
            if by_themselves:
                alone[id] = by_themselves
    return references, alone


def _commits_first_below(
    references: dict[ObjectId, list[ObjectId]], rows: dict[ObjectId, Row]
) -> Iterator[tuple[ObjectId, list[ObjectId]]]:
    """Every readable commit with the commits it refers to, each behind those."""
    below = {
        id: [child for child in children if child not in rows or rows[child].kind is Kind.COMMIT]
        for id, children in references.items()
        if id in rows and rows[id].kind is Kind.COMMIT
    }
    waiting = {id: sum(child in below for child in children) for id, children in below.items()}
    above: dict[ObjectId, list[ObjectId]] = {}
    for id, children in below.items():
        for child in children:
            above.setdefault(child, []).append(id)
    ready = [id for id, count in waiting.items() if count == 0]
    while ready:
        id = ready.pop()
        yield id, below[id]
        for child in above.get(id, ()):
            waiting[child] -= 1
            if waiting[child] == 0:
                ready.append(child)


def _rescued(references: dict[ObjectId, list[ObjectId]], rows: dict[ObjectId, Row]) -> list[Move]:
    """Refs for a repository whose journal is lost: each commit without a child is kept under lost/."""
    commits = {id for id in references if rows.get(id) is not None and rows[id].kind is Kind.COMMIT}
    parents = {child for id in commits for child in references[id]}
    moves = [Move("HEAD", None, "refs/heads/main")]
    return moves + [Move(f"refs/lost/rebuilt/{id.short}", None, id) for id in sorted(commits - parents)]


def _dangling(
    index: Index,
    references: dict[ObjectId, list[ObjectId]],
    alone: dict[ObjectId, Sequence[ObjectId]],
    rows: dict[ObjectId, Row],
) -> list[ObjectId]:
    """Objects whose closure is not whole, that no ref reaches, and that no commit needs by themselves.

    A pack may still hold the commit of a deleted branch whose chunks are gone. Its row must not come
    back, because a commit row that is present vouches for everything below it. What a ref does reach
    stays, so that fsck can report the damage.
    """
    broken = {id for id, row in rows.items() if row.kind is not Kind.CHUNK and id not in references}
    parents: dict[ObjectId, list[ObjectId]] = {}
    for id, children in references.items():
        for child in children:
            parents.setdefault(child, []).append(id)
            if child not in rows:
                broken.add(child)
    waiting = list(broken)
    while waiting:
        for parent in parents.get(waiting.pop(), ()):
            if parent not in broken:
                broken.add(parent)
                waiting.append(parent)
    if not broken:
        return []
    with index.snapshot() as snapshot:
        roots = [target for target in snapshot.refs().values() if isinstance(target, ObjectId)]
        roots += snapshot.pins()
    kept: set[ObjectId] = set()
    waiting = roots
    while waiting:
        id = waiting.pop()
        if id not in kept:
            kept.add(id)
            waiting += references.get(id, ())
    for id, trees in alone.items():
        if id not in broken or id in kept:
            kept.update(trees)
    return sorted(id for id in broken - kept if id in rows)
