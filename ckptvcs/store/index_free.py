"""A repository opened without its index: for those who cannot share LMDB's locks, or may not write at all.

Processes in other PID namespaces, on other hosts and on network file systems cannot use `meta/`, and whoever
may only read cannot take its locks. They get an index of their own instead, in a folder for temporary files,
made from what never changes once it is there: packs, the journal, and the bundles in `incoming/`. No file
that somebody else changes in place is read, and no lock decides anything.

What such a store writes goes to `incoming/` as packs and a bundle (`bundles`), and becomes part of the
repository when a process with the index ingests it (`ckptvcs.maintenance.ingest`). A chunk is reused only
if the parent commit reaches it, which a ref keeps from being collected.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ckptvcs.disk import Disk, new_scratch_folder, random_name
from ckptvcs.errors import CkptError, CorruptionError, NotFoundError, StorageError
from ckptvcs.ids import ObjectId
from ckptvcs.store import bundles
from ckptvcs.store.bundles import Bundle, BundledPack
from ckptvcs.store.format import Layout, PackName
from ckptvcs.store.index import TABLES, Change, Index, PackInfo, Snapshot
from ckptvcs.store.journal import LogEntry, Move, Operation, Status
from ckptvcs.store.leases import Lease
from ckptvcs.store.packs import PackFile
from ckptvcs.store.reader import Reader
from ckptvcs.store.rebuild import Rebuilt, pack_names
from ckptvcs.store.store import Store
from ckptvcs.store.writer import Made, Publication, Writer, enter, put_row

_TABLES: Final = tuple(TABLES.keys() - {"meta", "rows", "packs"})
"""What the journal and the bundles say."""


class _Layout(Layout):
    """A repository whose index lies elsewhere, and whose new packs wait in `incoming/`."""

    def __init__(self, root: Path, scratch: Path) -> None:
        super().__init__(root)
        self.meta = scratch / "meta"
        self.places: dict[PackName, Path] = {}

    def pack(self, name: PackName) -> Path:
        return self.places.get(name) or self.incoming / f"{name.text}.pack"

    def open_pack(self, name: PackName) -> Path:
        return self.incoming / f"{name.text}.pack.tmp"


class _NoLease(Lease):
    """Names for packs of a writer whose packs nobody takes for strays: no bundle, no lock."""

    def next_pack(self) -> PackName:
        with self._mutex:
            if self._process != self._disk.process():
                self._id, self._seq, self._process = uuid.uuid4().bytes, 0, self._disk.process()
            self._seq += 1
            return PackName(self._id, self._seq)

    def check(self) -> None:
        pass


class _Writer(Writer):
    """Like any writer, but what it publishes is a bundle."""

    def build_on(self, store: IndexFreeStore, base: ObjectId | None) -> None:
        """Reuse what this commit reaches, and nothing else that is stored."""
        self._store = store
        self._base = base
        self._reusable = frozenset[ObjectId]()
        if base is not None:
            with contextlib.suppress(CkptError):  # not all of it is there: nothing need be reused
                self._reusable = frozenset((base, *self._closure(base)))
        self._builds_on = False

    def _missing(self, ids: Sequence[ObjectId]) -> set[ObjectId]:
        missing = super()._missing(ids)
        missing |= {id for id in ids if id not in self._reusable}
        self._builds_on = self._builds_on or len(missing) < len(set(ids))
        return missing

    def _enter(self, change: Change, wanted: Publication) -> bool:
        move, *tags = wanted.moves
        if not all(tag.old is None and tag.new == wanted.root for tag in tags) or not all(
            isinstance(each, Status) for each in wanted.annotations
        ):
            raise _needs_index("change this together with a commit")
        status = next((each.status for each in wanted.annotations if isinstance(each, Status)), None)
        bases = {made.entry.base for made in self._made.values()} - self._made.keys() - {None}
        self._store.leave(
            Bundle(
                name=self._lease.next_pack(),
                repository=self._store.format.repository,
                root=wanted.root,
                ref=move.name,
                tip=move.old if isinstance(move.old, ObjectId) else None,
                lost=not all(change.ref(each.name) == each.old for each in wanted.moves),
                tags=tuple(tag.name for tag in tags),
                status=status,
                base=self._base if self._builds_on or bases else None,
                packs=tuple(
                    BundledPack(each.name, each.info.size, each.info.records, self._mark(each.name))
                    for each in self._sealed
                ),
                time=wanted.time,
                who=wanted.who,
                why=wanted.why,
                info=wanted.info,
            )
        )
        # The bundle is there: whatever happens to the index of this process, the packs stay.
        self._published = True
        return super()._enter(change, wanted)

    def _mark(self, name: PackName) -> bytes:
        with contextlib.closing(PackFile(self._disk, self._layout.pack(name))) as pack:
            return pack.trailer().digest


class IndexFreeStore(Store):
    """An open repository folder without its index.

    Refs and log are those of the journal and the waiting bundles when it was opened or last wrote. With
    `writes=False` it only reads, and no file in the repository is touched.
    """

    layout: _Layout

    def __init__(self, root: Path, disk: Disk, threads: int | None, *, writes: bool = True) -> None:
        super().__init__(root, disk, threads)
        self._scratch: Path | None = None
        self._home = disk.process()
        self._writes = writes
        self._lease = _NoLease(disk, self.layout)
        self._bundles: dict[str, Bundle] = {}
        self._seen: tuple[int, tuple[PackName, ...]] = (-1, ())
        """The length of the journal, and the bundles."""

    # -- life ------------------------------------------------------------------------------------

    def start(self, *, copy: bool = False) -> None:
        """Open: make the index from what is there. A process that changes the format is waited for.

        With `copy` the shared index is copied, if there is one: faster, and only for local file systems.
        """
        self._read_format()
        self.disk.share(self.layout.root)
        with contextlib.ExitStack() as stack:
            # Where locks do not work, or may not be taken, nobody can hold this one against us either.
            with contextlib.suppress(StorageError):
                stack.enter_context(self._lock(shared=True))
            self._read_format()
            self._scratch = new_scratch_folder()
            self.layout = _Layout(self.layout.root, self._scratch)
            self.disk.make_dir(self.layout.meta)
            shared = Layout(self.layout.root)
            if copy:
                self._index = Index.copied(self.disk, shared.meta, self.layout.meta, self.format.index)
            if self._index is not None:
                with self._index.snapshot() as snapshot:
                    self.layout.places = {name: shared.pack(name) for name in snapshot.packs()}
                self._seen = (self._journal_size(), ())
            else:
                self._index = Index.create(self.disk, self.layout.meta, self.format.index)
            self.refresh()

    @property
    def index(self) -> Index:
        if self._index is None:
            raise CkptError("this repository handle is closed", code="closed")
        if self._process != self.disk.process():
            self._executor, self._process = None, self.disk.process()
        return self._index

    def close(self) -> None:
        super().close()
        self._clear()

    def _clear(self) -> None:
        scratch, self._scratch = self._scratch, None
        if scratch is not None and self._home == self.disk.process():
            self.disk.remove_tree(scratch)

    def __del__(self) -> None:
        super().__del__()
        with contextlib.suppress(Exception):
            self._clear()

    # -- what is there ---------------------------------------------------------------------------

    def refresh(self) -> None:
        """Look again: packs that came and went, the journal, and bundles that wait."""
        disk, layout = self.disk, self.layout
        # In this order: what is ingested meanwhile is in the journal and in `packs/` before it leaves here.
        coming = self._coming()
        arriving = [pack.name for each in coming for pack in each.packs]
        places = {name: layout.incoming / f"{name.text}.pack" for name in arriving}
        here = Layout(layout.root)
        places |= {name: here.pack(name) for name in pack_names(disk, here)}
        seen = (self._journal_size(), tuple(each.name for each in coming))
        before = layout.places
        layout.places = places
        if places.keys() == before.keys() and seen == self._seen:
            return
        with self.index.change() as change:
            if before.keys() - places.keys():
                # What lay there may lie in another pack that was known already: start anew.
                change.clear("rows", "packs")
                change.bump_gc_seq()
                before = {}
            self._add(change, sorted(places.keys() - before.keys()))
            known = set(self._seen[1])
            if seen[0] != self._seen[0] or not known <= set(seen[1]):
                change.clear(*_TABLES)
                for entry in self._journal.entries() if disk.exists(layout.journal) else ():
                    change.apply(entry)
                known = set()
            for each in coming:
                if each.name not in known:
                    _foresee(change, each)
        self._seen = seen

    def _coming(self) -> list[Bundle]:
        """The bundles that wait, in order. Each is read once."""
        there = bundles.waiting(self.disk, self.layout)
        self._bundles = {name: each for name, each in self._bundles.items() if name in set(there)}
        for name in there:
            if name not in self._bundles:
                with contextlib.suppress(FileNotFoundError, CkptError):  # whoever ingests will say why
                    self._bundles[name] = bundles.read(self.disk, self.layout.incoming / name)
        mine = [each for each in self._bundles.values() if each.repository == self.format.repository]
        return bundles.in_order(mine)

    def _journal_size(self) -> int:
        return self.disk.size(self.layout.journal) if self.disk.exists(self.layout.journal) else 0

    def _add(self, change: Change, names: Sequence[PackName]) -> None:
        made: dict[ObjectId, Made] = {}
        for name in names:
            try:
                with contextlib.closing(PackFile(self.disk, self.layout.pack(name))) as pack:
                    entries, size = pack.entries(), pack.size()
            except (FileNotFoundError, CorruptionError):
                continue  # gone, or for `fsck` to look at where the index is
            change.put_pack(name, PackInfo(size, len(entries)))
            for entry in entries:
                there = made.get(entry.id)
                if there is None or (there.entry.base is not None and entry.base is None):
                    made[entry.id] = Made(entry, name)
        for id in sorted(made):
            with contextlib.suppress(StorageError):  # its base is nowhere
                put_row(change, id, made, frozenset())

    def reader(self) -> Reader:
        """A scope for reading records. If a pack has gone meanwhile, what there is now is looked at."""
        return Reader(self.disk, self.layout, self.index, self.grid, self._pool, self.refresh)

    # -- writing ---------------------------------------------------------------------------------

    def check(self, work: str) -> None:
        self.format.check(work)
        if work != "read" and not self._writes:
            raise StorageError(
                f"permission denied: {self.layout.root.parent} is open for reading only, since it cannot be "
                "written to here",
                hint="ask its owner for write permission (`ckpt init --shared=group` makes one for a group)",
                path=str(self.layout.root),
                code="read-only",
            )

    def writer(self, compression: str = "balanced", base: ObjectId | None = None) -> Writer:
        """A scope for writing one commit, which may reuse what `base` reaches."""
        self.check("write")
        self.refresh()
        writer = self._make_writer(_Writer, compression)
        assert isinstance(writer, _Writer)
        writer.build_on(self, base)
        return writer

    def leave(self, bundle: Bundle) -> None:
        """Put a bundle into `incoming/`. Durable on return, and the commit with it."""
        final = self.layout.incoming / bundle.file_name
        temporary = final.with_name(f"{final.name}.{random_name()}.tmp")
        try:
            with self.disk.create(temporary) as file:
                file.write([bundle.pack()])
                file.sync()
            self.disk.protect(temporary)
            self.disk.publish(temporary, final)
            self.disk.sync_dir(final.parent)
        except BaseException:
            for path in (temporary, final):
                with contextlib.suppress(OSError):
                    self.disk.remove(path)
            raise

    # -- what needs the index --------------------------------------------------------------------

    def update(
        self,
        operations: Sequence[Operation],
        *,
        who: str,
        why: str,
        info: Mapping[str, Any] | None = None,
        provided: Callable[[Snapshot], bool] | None = None,
    ) -> LogEntry | None:
        self.check("write")
        raise _needs_index("change refs")

    def collecting(self, *, wait: float = 0.0) -> contextlib.AbstractContextManager[None]:
        self.check("gc")
        raise _needs_index("collect garbage")

    def needs_index(self, what: str) -> None:
        self.check("write")
        raise _needs_index(what)

    def reopen(self) -> None:
        """Nothing: it was never closed."""

    def rebuild(self, *, only_if_missing: bool = False) -> Rebuilt | None:
        self.check("write")
        raise _needs_index("rebuild the index")

    def catch_up_journal(self, *, must: bool = False) -> None:
        """Nothing: whoever has the index writes the journal."""


def _needs_index(what: str) -> CkptError:
    return CkptError(
        f"a handle without the index cannot {what}",
        hint="do it where the repository can be opened with its index; commits are fine from here",
        code="index-free",
    )


def _foresee(change: Change, bundle: Bundle) -> None:
    """Where refs will stand once a bundle is ingested. Nothing, if that cannot be."""
    lost = f"refs/lost/{bundle.ref.removeprefix('refs/heads/')}/{bundle.root.short}"
    rescue = Move(lost, change.ref(lost), bundle.root)
    publication = Publication(
        bundle.root,
        (rescue,) if bundle.lost else bundle.moves,
        rescue,
        (bundle.root, *([bundle.tip] if bundle.tip else ())),
        bundle.time,
        bundle.who,
        bundle.why,
        bundle.info,
        annotations=() if bundle.lost else bundle.annotations,
    )
    if bundle.root not in (change.ref(bundle.ref), change.ref(lost)):
        with contextlib.suppress(NotFoundError):
            enter(change, publication, (), {}, frozenset())
