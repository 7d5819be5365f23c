"""Taking bundles from `incoming/` into the index (docs/format.md, "Ingest").

One bundle after the other, each behind those that made what it builds on:

1. Under `packs.lock`, which one ingester holds at a time, list the bundles. One that the log says was
   entered before is only cleared away: a crash came before that.
2. Check it: packs whole and those it names, every payload's digest, every object's id, and all that the
   commit reaches there.
3. Give each pack its final name; a collector looks for strays only under `packs.lock`, too. The name in
   `incoming/` stays: a crash leaves the bundle with all of its packs, or its commit.
4. One transaction: look all reused records up again, put rows, and compare and set the ref. If it is not
   where the bundle says, the commit is kept under `lost/`, and a lost line of commits stays one ref.
5. Bring the journal up to date, then remove the packs from `incoming/`, the bundle last.

What is damaged, or builds on what is not stored, goes to `quarantine/` as it is, with the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ckptvcs.errors import (
    CkptError,
    CorruptionError,
    FormatError,
    InvalidError,
    LockedError,
    NotFoundError,
    StorageError,
)
from ckptvcs.history import refs
from ckptvcs.ids import Kind, ObjectId, object_id
from ckptvcs.maintenance.straightening import straightened
from ckptvcs.store import Change, Move, Publication, Store, bundles, codec
from ckptvcs.store.bundles import Bundle, BundledPack
from ckptvcs.store.format import Entry, PackName, largest, unpack_object
from ckptvcs.store.index import PackInfo
from ckptvcs.store.packs import PackFile
from ckptvcs.store.writer import Made, Sealed, chain_depth, child_name, enter, is_safe

ABANDONED_DAYS: Final = 30
_DAY: Final = 86_400
_COPY: Final = 8 << 20
_REASON: Final = "reason.txt"


@dataclass(frozen=True, slots=True)
class Ingested:
    """A bundle that became part of the repository.

    Attributes:
        bundle: its name.
        commit: what it brought.
        ref: the full name of the ref that has the commit now.
        lost: whether its branch had moved, so that `ref` is one under lost/.
    """

    bundle: str
    commit: ObjectId
    ref: str
    lost: bool


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A bundle that was put aside, and why."""

    bundle: str
    why: str


@dataclass(slots=True)
class Report:
    """What an ingestion did.

    Attributes:
        ingested, quarantined: bundle by bundle, in the order taken up.
        cleared: bundles that had been entered before, and were only cleared away.
        abandoned: files of writers that left nothing complete, removed after 30 days.
        bytes: of packs that were taken in.
    """

    ingested: list[Ingested] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    cleared: list[str] = field(default_factory=list)
    abandoned: list[str] = field(default_factory=list)
    bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "ingested": [
                {
                    "bundle": each.bundle,
                    "commit": str(each.commit),
                    "ref": refs.shown(each.ref),
                    "lost": each.lost,
                }
                for each in self.ingested
            ],
            "quarantined": [{"bundle": each.bundle, "why": each.why} for each in self.quarantined],
            "cleared": list(self.cleared),
            "abandoned": list(self.abandoned),
            "bytes": self.bytes,
        }


def waiting(store: Store) -> int:
    """How many bundles wait."""
    return len(bundles.waiting(store.disk, store.layout))


def ingest(store: Store, *, retry: bool = False, wait: float = 0.0) -> Report:
    """Take up what waits in `incoming/`. Each commit is durable, and in the journal, when it is reported.

    With `retry`, what lies in quarantine is taken up once more. LockedError if another process ingests for
    longer than `wait` seconds. StorageError leaves the bundle that was at hand where it is.
    """
    store.check("write")
    store.needs_index("ingest")
    try:
        lock = store.disk.lock(store.layout.packs_lock, wait=wait)
    except LockedError:
        raise LockedError(
            "another process is ingesting into this repository", hint="wait for it to finish"
        ) from None
    with lock:
        work = _Ingestion(store)
        if retry:
            work.bring_back()
        work.run()
    return work.report


_TRIES: Final = 2
"""How often a bundle is entered again whose bases seem to be gone."""


class _RefusedError(Exception):
    """This bundle cannot become part of the repository as things are."""


class _MovedError(_RefusedError):
    """So does it seem. But what it rests on may just have been rewritten."""


@dataclass(slots=True)
class _Checked:
    """A bundle that was read in full.

    Attributes:
        made: the records that its commit reaches.
        needed: what it reaches besides, with what kind it must be.
        links: the commits it refers to.
    """

    made: dict[ObjectId, Made]
    needed: dict[ObjectId, Kind]
    links: tuple[ObjectId, ...]


class _Ingestion:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._disk = store.disk
        self._layout = store.layout
        self.report = Report()

    # -- the folder ------------------------------------------------------------------------------

    def run(self) -> None:
        """Take up all that waits, also what comes meanwhile and others build on."""
        tried: set[str] = set()
        while names := [n for n in bundles.waiting(self._disk, self._layout) if n not in tried]:
            found: list[Bundle] = []
            damaged: list[tuple[str, str]] = []
            for name in names:
                tried.add(name)
                try:
                    found.append(bundles.read(self._disk, self._layout.incoming / name))
                except FileNotFoundError:
                    continue
                except CorruptionError as error:
                    damaged.append((name, error.message))
            for name, why in damaged:
                self._quarantine(name, self._packs_of(name), why)
            entered = self._entered({each.name.text for each in found})
            for bundle in bundles.in_order(found):
                if bundle.name.text in entered:
                    self._clear(bundle)
                    self.report.cleared.append(bundle.name.text)
                else:
                    self._take(bundle)
        self._remove_abandoned()

    def _entered(self, names: set[str]) -> set[str]:
        """Those of the bundles that the log has already."""
        if not names:
            return set()
        with self._store.snapshot() as snapshot:
            return {
                str(entry.info["bundle"])
                for entry in snapshot.log_backwards()
                if entry.info.get("bundle") in names
            }

    def _take(self, bundle: Bundle) -> None:
        try:
            self._check_promises(bundle)
            checked = self._checked(bundle)
            for pack in bundle.packs:
                self._place(pack)
            taken = self._tried(bundle, checked)
        except (_RefusedError, CorruptionError, FormatError, NotFoundError, FileNotFoundError) as error:
            self._quarantine(bundle.file_name, [each.name for each in bundle.packs], str(error))
            return
        self._store.catch_up_journal(must=True)
        self._clear(bundle)
        self.report.ingested.append(taken)
        self.report.bytes += sum(each.size for each in bundle.packs)

    def _clear(self, bundle: Bundle) -> None:
        """Packs first: a bundle that is there without them is in the log."""
        for pack in bundle.packs:
            self._disk.remove(self._arrived(pack.name))
        self._disk.sync_dir(self._layout.incoming)
        self._disk.remove(self._layout.incoming / bundle.file_name)

    def _arrived(self, name: PackName) -> Path:
        return self._layout.incoming / f"{name.text}.pack"

    def _remove_abandoned(self) -> None:
        """What a writer left that died before its bundle was there. No bundle names it, so nobody was told
        that it is stored; age decides only when it is tidied up."""
        named = {f"{name.text}.pack" for name in self._named()}
        limit = self._disk.now_ns() - ABANDONED_DAYS * _DAY * 10**9
        for name in self._disk.names(self._layout.incoming):
            path = self._layout.incoming / name
            if name in named or bundles.bundle_name(name) is not None or not self._disk.is_file(path):
                continue
            with contextlib.suppress(FileNotFoundError):
                if self._disk.modified_ns(path) < limit:
                    self._disk.remove(path)
                    self.report.abandoned.append(name)

    def _named(self) -> set[PackName]:
        """The packs of all bundles that can be read, those in quarantine among them."""
        found = bundles.readable(self._disk, self._layout)
        for name in self._disk.names(self._layout.quarantine):
            with contextlib.suppress(FileNotFoundError, CkptError):
                found.append(bundles.read(self._disk, self._layout.quarantine / name / name))
        return {pack.name for bundle in found for pack in bundle.packs}

    # -- checking --------------------------------------------------------------------------------

    def _check_promises(self, bundle: Bundle) -> None:
        if bundle.repository != self._store.format.repository:
            raise _RefusedError("it is for another repository")
        try:
            refs.check_name(bundle.ref.removeprefix(refs.HEADS), "branch")
            for tag in bundle.tags:
                refs.check_name(tag.removeprefix(refs.TAGS), "tag")
        except InvalidError as error:
            raise _RefusedError(error.message) from None
        if not bundle.ref.startswith(refs.HEADS):
            raise _RefusedError(f"it moves {bundle.ref}, which is no branch")
        if not all(tag.startswith(refs.TAGS) for tag in bundle.tags):
            raise _RefusedError("it makes tags that are none")

    def _checked(self, bundle: Bundle) -> _Checked:
        """Read a bundle's packs in full, and follow its commit. _RefusedError if something is not there."""
        records: dict[ObjectId, Made] = {}
        children: dict[ObjectId, list[tuple[Kind, ObjectId]]] = {}
        for pack in bundle.packs:
            for entry, below in self._records(pack):
                there = records.get(entry.id)
                if there is None or (there.entry.base is not None and entry.base is None):
                    records[entry.id] = Made(entry, pack.name)
                if below is not None:
                    children[entry.id] = below
        checked = _Checked({}, {}, ())
        links: list[ObjectId] = []
        waiting: list[tuple[Kind, ObjectId]] = [(Kind.COMMIT, bundle.root)]
        with self._store.reader() as reader:
            while waiting:
                kind, id = waiting.pop()
                if kind is Kind.COMMIT and id != bundle.root:
                    links.append(id)
                    continue
                if id in checked.made or id in checked.needed:
                    continue
                made = records.get(id)
                if made is not None:
                    if made.entry.kind is not kind:
                        raise _RefusedError(f"{id.short} is a {made.entry.kind.label}, not a {kind.label}")
                    checked.made[id] = made
                    if made.entry.base is not None:
                        waiting.append((Kind.CHUNK, made.entry.base))
                    waiting += children.get(id, ())
                    continue
                with self._store.snapshot() as snapshot:
                    row = snapshot.live(id)
                if row is None or row.kind is not kind:
                    raise _RefusedError(
                        f"the {kind.label} {id.short} is neither in its packs nor stored here"
                    )
                checked.needed[id] = kind
                if kind is not Kind.CHUNK:
                    payload = reader.objects(kind, [id])[0]
                    waiting += unpack_object(payload, child_name(kind, id))[0]
        checked.links = tuple(dict.fromkeys(links))
        with self._store.snapshot() as snapshot:
            for link in checked.links:
                row = snapshot.live(link)
                if row is None or row.kind is not Kind.COMMIT:
                    raise _RefusedError(f"the commit {link.short}, its parent or origin, is not stored here")
        if bundle.tip is not None and bundle.tip not in checked.links:
            raise _RefusedError(f"it says that {bundle.tip.short} is its parent, and its commit does not")
        return checked

    def _records(self, pack: BundledPack) -> list[tuple[Entry, list[tuple[Kind, ObjectId]] | None]]:
        """What a pack holds, each payload checked; of objects also what they refer to."""
        path = self._found(pack)
        found: list[tuple[Entry, list[tuple[Kind, ObjectId]] | None]] = []
        with contextlib.closing(PackFile(self._disk, path)) as file:
            trailer = file.trailer()
            if (trailer.name, trailer.digest, trailer.records) != (pack.name, pack.mark, pack.records):
                raise _RefusedError(f"{path.name} is not the pack that it names")
            for entry in file.entries():
                header = file.header(entry.offset)
                if Entry.of(header, entry.offset) != entry:
                    raise _RefusedError(f"{path.name}: the record at {entry.offset} is not the one listed")
                payload = file.payload(header, entry.offset)
                if entry.kind is Kind.CHUNK:
                    found.append((entry, None))
                    continue
                if entry.base is not None or entry.raw > largest(entry.kind):
                    raise _RefusedError(f"{path.name}: impossible object at {entry.offset}")
                raw = memoryview(bytearray(entry.raw))
                where = f"{path} at {entry.offset}"
                codec.decode(entry.codec, memoryview(payload), raw, entry.element_size, None, where)
                if object_id(entry.kind, raw) != entry.id:
                    raise _RefusedError(f"{path.name}: the {entry.kind.label} at {entry.offset} is damaged")
                found.append((entry, unpack_object(raw, child_name(entry.kind, entry.id))[0]))
        return found

    def _found(self, pack: BundledPack) -> Path:
        """Where a pack of a bundle is: in `incoming/`, or already placed by an ingester that died."""
        for path in (self._arrived(pack.name), self._layout.pack(pack.name)):
            # A link may lead anywhere, and elsewhere later.
            if self._disk.is_plain_file(path) and self._disk.size(path) == pack.size:
                return path
        raise _RefusedError(f"its pack {pack.name.text} is missing or cut short")

    # -- entering --------------------------------------------------------------------------------

    def _place(self, pack: BundledPack) -> None:
        """Give a pack its final name, besides the one it has. Durable on return."""
        final = self._layout.pack(pack.name)
        arrived = self._arrived(pack.name)
        self._disk.make_dir(final.parent)
        self._disk.sync_dir(final.parent.parent)
        if not self._disk.exists(final):
            if not self._disk.link(arrived, final):
                self._copy(pack, arrived, final)
        elif self._disk.size(final) != pack.size:
            raise _RefusedError(f"another pack is called {pack.name.text}")
        self._disk.sync_dir(final.parent)

    def _copy(self, pack: BundledPack, arrived: Path, final: Path) -> None:
        """Where a file cannot have two names, or may not be given one: a copy of it."""
        temporary = self._layout.open_pack(pack.name)
        self._disk.remove(temporary)
        try:
            with self._disk.open(arrived) as source, self._disk.create(temporary) as file:
                for offset in range(0, pack.size, _COPY):
                    file.write([source.read(offset, min(_COPY, pack.size - offset))])
                file.sync()
            self._disk.protect(temporary)
            self._disk.publish(temporary, final)
        except BaseException:
            with contextlib.suppress(OSError):
                self._disk.remove(temporary)
            raise
        # What was copied is what was checked only if nobody wrote to it meanwhile.
        with contextlib.closing(PackFile(self._disk, final)) as file_now:
            for entry in file_now.entries():
                file_now.payload(file_now.header(entry.offset), entry.offset)

    def _tried(self, bundle: Bundle, checked: _Checked) -> Ingested:
        for _ in range(_TRIES):
            with contextlib.suppress(_MovedError):
                return self._enter(bundle, checked)
        return self._enter(bundle, checked)

    def _enter(self, bundle: Bundle, checked: _Checked) -> Ingested:
        store = self._store
        sealed = [Sealed(each.name, PackInfo(each.size, each.records)) for each in bundle.packs]
        instead, more = straightened(store, checked.made)
        made = {**checked.made, **instead}
        sealed += more
        with store.index.change() as change:
            for id, kind in checked.needed.items():
                row = change.live(id)
                if row is None or row.kind is not kind or chain_depth(change, id, frozenset()) is None:
                    raise _RefusedError(
                        f"the {kind.label} {id.short} was collected while it was being ingested"
                    )
            for id in made:
                if not is_safe(change, id, made, frozenset()):
                    raise _MovedError(f"the base of {id.short} is not stored")
            lost, replaced = _lost_name(change, bundle)
            rescue = Move(lost, change.ref(lost), bundle.root)
            publication = Publication(
                root=bundle.root,
                moves=(rescue,) if bundle.lost else bundle.moves,
                rescue=rescue,
                require=checked.links,
                time=self._disk.now_ns(),
                who=bundle.who,
                why=f"ingest: {bundle.why}",
                info={**bundle.info, "bundle": bundle.name.text},
                annotations=() if bundle.lost else bundle.annotations,
            )
            try:
                won = enter(change, publication, sealed, made, frozenset(), replaced)
            except StorageError as error:
                if error.path is not None:  # the disk's, and no fault of the bundle
                    raise
                raise _RefusedError(error.message) from None
            won = won and not bundle.lost
        return Ingested(bundle.name.text, bundle.root, bundle.ref if won else lost, not won)

    # -- quarantine ------------------------------------------------------------------------------

    def _quarantine(self, file_name: str, packs: Sequence[PackName], why: str) -> None:
        """Put a bundle aside with its packs, the bundle last: a crash leaves one that is put aside again."""
        place = self._layout.quarantine / file_name
        self._disk.make_dir(place)
        self._disk.sync_dir(place.parent)
        for name in packs:
            with self._store.snapshot() as snapshot:
                published = snapshot.pack(name) is not None
            arrived, final = self._arrived(name), self._layout.pack(name)
            if self._disk.exists(arrived):
                self._disk.rename(arrived, place / arrived.name)
                if not published:  # its second name; what others may rely on stays
                    self._disk.remove(final)
            elif not published and self._disk.exists(final):
                self._disk.rename(final, place / arrived.name)
        self._disk.replace(place / _REASON, f"{why}\n".encode())
        self._disk.rename(self._layout.incoming / file_name, place / file_name)
        self._disk.sync_dir(place)
        self._disk.sync_dir(self._layout.incoming)
        self.report.quarantined.append(Quarantined(file_name.removesuffix(bundles.ENDING), why))

    def _packs_of(self, file_name: str) -> list[PackName]:
        """The packs of a bundle that cannot be read, as far as can be told: those that its writer made
        before, and that no other bundle names."""
        mine = bundles.bundle_name(file_name)
        others = self._named()
        names = filter(None, map(PackName.parse, self._disk.names(self._layout.incoming)))
        return [
            name
            for name in names
            if mine is not None and name.lease == mine.lease and name.seq < mine.seq and name not in others
        ]

    def bring_back(self) -> None:
        """Put what lies in quarantine back into `incoming/`, each bundle last."""
        for name in self._disk.names(self._layout.quarantine):
            place = self._layout.quarantine / name
            if bundles.bundle_name(name) is None or not self._disk.is_dir(place):
                continue
            inside = self._disk.names(place)
            for each in [n for n in inside if n not in (name, _REASON)] + [n for n in inside if n == name]:
                if PackName.parse(each) is not None or each == name:
                    self._disk.rename(place / each, self._layout.incoming / each)
                self._disk.sync_dir(self._layout.incoming)
            self._disk.remove_tree(place)


def _lost_name(change: Change, bundle: Bundle) -> tuple[str, tuple[Move, ...]]:
    """Where the commit goes if its branch has moved: 8 digits of its id, more if those are taken. The ref
    that keeps its parent there is no longer needed then."""
    place = f"{refs.LOST}{bundle.ref.removeprefix(refs.HEADS)}/"
    name = place + bundle.root.short
    if change.ref(name) not in (None, bundle.root):
        name = place + str(bundle.root)[:32]
    if bundle.tip is None:
        return name, ()
    parents = (place + digits for digits in (bundle.tip.short, str(bundle.tip)[:32]))
    return name, tuple(Move(each, bundle.tip, None) for each in parents if change.ref(each) == bundle.tip)
