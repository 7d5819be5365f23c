"""Mending what can be mended, without deleting a byte.

1. A record that is damaged or missing is looked for elsewhere: in gaps of packs, in packs that no index
   names, in `quarantine/`. A copy whose content has the id is written anew, as a plain frame, and its row
   pointed there. That may make differences readable again, so it is repeated until nothing more is found.
2. The live records of packs that are broken as files (cut short, or without a whole footer) are copied out of
   them. A pack that nothing points into any more moves to `quarantine/`; one that still holds damaged records
   stays where it is, so that they can be named.

What is not found stays marked as damaged in the index, so that it is stored again when the same content is
committed again. Nothing takes its place meanwhile, zeros least of all.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from ckptvcs.errors import CkptError, CorruptionError, StorageError
from ckptvcs.ids import Kind, ObjectId, chunk_id, object_id
from ckptvcs.maintenance.marking import slices
from ckptvcs.maintenance.rewriting import Rewriter
from ckptvcs.store import Reader, Row, Store
from ckptvcs.store import codec as codecs
from ckptvcs.store.format import PACK_LIMIT, Entry, PackName
from ckptvcs.store.index import PackInfo
from ckptvcs.store.packs import Frame, PackFile, PackWriter, make_frame
from ckptvcs.store.rebuild import pack_names


@dataclass(slots=True)
class Repaired:
    """What a repair did.

    Attributes:
        copies: records that were replaced by a copy found elsewhere.
        salvaged: sound records that were copied out of broken packs.
        quarantined: where broken packs are now.
        lost: damaged or missing records of which there is no copy.
    """

    copies: int = 0
    salvaged: int = 0
    quarantined: list[str] = field(default_factory=list)
    lost: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "copies": self.copies,
            "salvaged": self.salvaged,
            "quarantined": list(self.quarantined),
            "lost": self.lost,
        }


def repair(
    store: Store,
    bad: Collection[ObjectId],
    broken: Collection[PackName],
    say: Callable[[str], None],
) -> Repaired:
    """Mend these records and packs as far as it goes. LockedError if a collector runs. Durable on return."""
    store.check("write")
    store.needs_index("fsck --repair")
    done = Repaired()
    with store.collecting():
        left = _from_copies(store, set(bad), done, say)
        for name in sorted(broken):
            say(f"pack {name.text}")
            _salvage(store, name, done)
        done.lost = len(_unreadable(store, left))
    return done


# -- copies ---------------------------------------------------------------------------------------


class _Copy(NamedTuple):
    """A record somewhere."""

    path: Path
    entry: Entry


def _from_copies(
    store: Store, bad: set[ObjectId], done: Repaired, say: Callable[[str], None]
) -> set[ObjectId]:
    """Give records another one of the same content; what is left unreadable."""
    left = _unreadable(store, bad)
    if not left:
        return left
    copies: dict[ObjectId, list[_Copy]] = {}
    for path in _pack_files(store):
        say(f"pack {path.name}")
        for entry in _entries(store, path):
            if entry.id in left:
                copies.setdefault(entry.id, []).append(_Copy(path, entry))
    found = 1
    while left and found:
        found = _take(store, [(id, copies[id]) for id in sorted(left) if id in copies])
        done.copies += found
        left = _unreadable(store, left)
    return left


def _unreadable(store: Store, ids: Collection[ObjectId]) -> set[ObjectId]:
    left = set()
    with store.reader() as reader:
        for id in ids:
            with store.snapshot() as snapshot:
                row = _row_of(snapshot.row, id)
            try:
                if row is None:
                    left.add(id)
                elif row.kind is Kind.CHUNK:
                    reader.chunk(id)
                else:
                    reader.objects(row.kind, [id])
            except CkptError:
                left.add(id)
    return left


def _row_of(look: Callable[[ObjectId], Row | None], id: ObjectId) -> Row | None:
    with contextlib.suppress(CorruptionError):  # of the row itself: a rebuild mends that
        return look(id)
    return None


def _pack_files(store: Store) -> Iterator[Path]:
    """Every pack that is not being written, published or not."""
    disk, layout = store.disk, store.layout
    yield from (layout.pack(name) for name in pack_names(disk, layout))
    aside = (layout.quarantine / name for name in disk.names(layout.quarantine))
    folders = [layout.incoming, layout.quarantine, *filter(disk.is_dir, aside)]
    for folder in folders:
        yield from (folder / name for name in disk.names(folder) if ".pack" in name)


def _entries(store: Store, path: Path) -> list[Entry]:
    try:
        with contextlib.closing(PackFile(store.disk, path)) as pack:
            try:
                return pack.entries()
            except CorruptionError:
                return list(pack.scan())
    except (CkptError, FileNotFoundError):
        return []


def _take(store: Store, copies: Sequence[tuple[ObjectId, Sequence[_Copy]]]) -> int:
    """Write for each record a copy whose content has its id anew, as a plain frame, and point its row there;
    for how many there was one."""
    taken = 0
    with store.reader() as reader:
        waiting = list(copies)
        while waiting:
            with _Replacements(store) as replacements:
                while waiting and not replacements.full:
                    id, places = waiting.pop(0)
                    with store.snapshot() as snapshot:
                        row = _row_of(snapshot.row, id)
                    frame = next(filter(None, (_plain(store, reader, place) for place in places)), None)
                    if frame is not None:
                        replacements.take(id, row, frame)
                taken += replacements.publish()
    return taken


class _Replacements:
    """Records that take the place of unreadable ones, in one pack. What is not published is thrown away."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._writer: PackWriter | None = None
        self._rows: list[tuple[ObjectId, Row | None, Entry]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.abandon()

    @property
    def full(self) -> bool:
        """Whether the pack is as large as packs are."""
        return self._writer is not None and self._writer.size >= PACK_LIMIT

    def take(self, id: ObjectId, row: Row | None, frame: Frame) -> None:
        """Add the record that takes the place of a row's."""
        if self._writer is None:
            self._writer = PackWriter(self._store.disk, self._store.layout, self._store.lease.next_pack())
        self._rows.append((id, row, self._writer.append(frame)))

    def publish(self) -> int:
        """Point the rows at the new records, if they still are as they were seen. Durable on return."""
        if self._writer is None:
            return 0
        size = self._writer.seal()
        name, self._writer = self._writer.name, None
        pointed = 0
        with self._store.index.change() as change:
            self._store.lease.check()
            change.bump_gc_seq()
            change.put_pack(name, PackInfo(size, len(self._rows)))
            for id, row, entry in self._rows:
                if _row_of(change.row, id) == row:
                    change.put_row(id, Row.of(entry, name, 0))
                    pointed += 1
        return pointed


def _plain(store: Store, reader: Reader, copy: _Copy) -> Frame | None:
    """A plain frame of a copy's content; None if that cannot be read or does not have the id."""
    try:
        return _decoded(store, reader, copy)
    except (CkptError, FileNotFoundError):
        return None


def _decoded(store: Store, reader: Reader, copy: _Copy) -> Frame:
    """A plain frame of a copy's content. CorruptionError if that does not have the id."""
    with contextlib.closing(PackFile(store.disk, copy.path)) as pack:
        header = pack.header(copy.entry.offset)
        payload = pack.payload(header, copy.entry.offset)
    raw = bytearray(header.raw) if header.base is None else bytearray(reader.chunk(header.base))
    if len(raw) != header.raw:
        raise CorruptionError(f"the base of {header.id.short} has another length")
    into = memoryview(raw)
    base = None if header.base is None else into
    codecs.decode(header.codec, payload, into, header.element_size, base, str(copy.path))
    found = chunk_id(raw) if header.kind is Kind.CHUNK else object_id(header.kind, raw)
    if found != copy.entry.id or header.id != copy.entry.id:
        raise CorruptionError(f"{copy.path}: {copy.entry.id.short} is damaged", id=str(copy.entry.id))
    if header.base is None:
        return Frame(header, payload)
    codec, stored = codecs.encode(raw)
    return make_frame(header.kind, header.id, codec, header.element_size, header.raw, stored)


# -- packs ----------------------------------------------------------------------------------------


def _salvage(store: Store, name: PackName, done: Repaired) -> None:
    """Copy the sound records of a broken pack elsewhere, and put the file aside if none is left in it."""
    live = [(id, row) for part in slices(store) for id, row in part if row.pack == name]
    left = 0
    with Rewriter(store) as rewriter:
        for id, row in sorted(live, key=lambda item: item[1].offset):
            try:
                rewriter.copy(id, row)
            except (CorruptionError, FileNotFoundError):
                left += 1
            except StorageError as error:
                if error.errno != errno.EIO or error.path != str(store.layout.pack(name)):
                    raise
                left += 1
        done.salvaged += rewriter.publish()
    path = store.layout.pack(name)
    if left or not store.disk.exists(path):
        return
    aside = store.layout.quarantine / path.name
    while store.disk.exists(aside):
        aside = aside.with_name(aside.name + "-again")
    # The file first, as when a pack is unlinked: a crash in between leaves a row without file, and no record
    # in it.
    store.disk.rename(path, aside)
    store.disk.sync_dir(aside.parent)
    store.disk.sync_dir(path.parent)
    with store.index.change() as change:
        change.bump_gc_seq()
        change.delete_pack(name)
    done.quarantined.append(str(aside))
