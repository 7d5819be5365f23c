"""The store: one repository folder, opened. Hands out readers, writers and ref changes.

Every open store holds `lock` shared, so that rebuilding the index, which takes it exclusively, runs
alone. It holds no pack open between operations and keeps no read transaction, so an idle store neither
blocks a collector nor keeps bytes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ckptvcs.disk import Disk, Lock, ThreadLock, random_name, usable_cpus
from ckptvcs.errors import (
    CkptError,
    CorruptionError,
    ExistsError,
    LockedError,
    NoRepositoryError,
    NotFoundError,
    StorageError,
)
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.store import claims
from ckptvcs.store.claims import Claim
from ckptvcs.store.format import GRIDS, Format, Grid, Layout
from ckptvcs.store.index import Change, Index, Snapshot
from ckptvcs.store.journal import Drop, Expire, Fork, Journal, LogEntry, Move, Note, Operation, Pin
from ckptvcs.store.leases import Lease
from ckptvcs.store.reader import Reader
from ckptvcs.store.rebuild import Below, Rebuilt, clear_leftovers, everything_below, rebuild
from ckptvcs.store.writer import Writer

if TYPE_CHECKING:
    from ckptvcs.store.choice import Memory

_LOCK_WAIT: Final = 60.0
_MOST_THREADS: Final = 4
_log = logging.getLogger("ckptvcs")


def _say_nothing(_: str) -> None:
    pass


class Store:
    """An open repository folder (`.ckpt`). Thread-safe; usable in a forked child, where it takes its
    own locks, threads and index connection on first use."""

    def __init__(self, root: Path, disk: Disk, threads: int | None) -> None:
        self.disk = disk
        self.layout = Layout(root)
        self.threads = threads or min(_MOST_THREADS, usable_cpus())
        self.format: Format
        self.rebuilt: Rebuilt | None = None
        """What making the index anew found, if opening did that."""
        self._journal = Journal(disk, self.layout.journal)
        self._lease = Lease(disk, self.layout)
        self._index: Index | None = None
        self._shared_lock: Lock | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._pool_mutex = ThreadLock()
        self._process = disk.process()
        self._thread = threading.local()
        self._choices: Memory | None = None
        self._below: Below = everything_below

    # -- life ------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        root: Path,
        disk: Disk,
        *,
        config: bytes,
        head: str,
        who: str,
        threads: int | None = None,
        below: Below = everything_below,
        mode: int | None = None,
    ) -> Store:
        """Make a repository at `root` (the `.ckpt` folder itself) and open it.

        `mode` is that of its folders, with the setgid bit, if several users are to share it (`Disk.share`).

        Built aside and renamed into place, so that it is there whole or not at all, and so that of
        many processes doing this at once one succeeds. ExistsError for the others. Durable on return.
        """
        with disk.lock(root.parent, wait=_LOCK_WAIT):
            if disk.exists(root / "format"):
                raise ExistsError(f"{root.parent} is a repository already", hint="open it instead")
            for name in disk.names(root.parent):
                if name.startswith(f"{root.name}-init-"):  # left by a process that died in here
                    disk.remove_tree(root.parent / name)
            aside = root.with_name(f"{root.name}-init-{random_name()}")
            disk.make_dir(aside)
            try:
                disk.share(aside, mode)
                cls._build(aside, disk, config, head, who)
                disk.rename(aside, root)
                disk.sync_dir(root.parent)
            except BaseException:
                disk.remove_tree(aside)
                raise
        return cls.open(root, disk, threads=threads, below=below)

    @staticmethod
    def _build(root: Path, disk: Disk, config: bytes, head: str, who: str) -> None:
        layout = Layout(root)
        for folder in layout.folders:
            disk.make_dir(folder)
        stamp = Format.new()
        journal = Journal(disk, layout.journal)
        journal.create()
        index = Index.create(disk, layout.meta, stamp.index)
        try:
            with index.change() as change:
                entry = change.record(disk.now_ns(), who, "init", [Move("HEAD", None, head)])
            journal.append(lambda _: [entry])
        finally:
            index.close()
        for path, data in (
            (layout.config, config),
            (layout.ignore, b"*\n"),
            (layout.format, stamp.pack()),
        ):
            disk.replace(path, data)
        for path in (layout.lock, layout.gc_lock, layout.packs_lock):
            disk.lock(path).release()
        for folder in layout.folders:
            disk.sync_dir(folder)
        disk.sync_dir(root)

    @classmethod
    def open(
        cls,
        root: Path,
        disk: Disk,
        *,
        threads: int | None = None,
        say: Callable[[str], None] = _say_nothing,
        rebuild: bool = False,
        below: Below = everything_below,
    ) -> Store:
        """Open an existing repository folder. `below` tells a rebuild what commits must reach.

        A missing index is made anew first, and `say` is told; with `rebuild` also one that is there,
        which may be damaged beyond opening. No other handle may be open for that.
        """
        store = cls(root, disk, threads)
        store._below = below
        try:
            if rebuild:
                store.rebuilt = store.rebuild()
            while not store._try_open():
                say(f"the index of {root.parent} is missing; rebuilding it from packs and journal")
                report = store.rebuild(only_if_missing=True)
                if report is not None:
                    store.rebuilt = report
                    for problem in report.problems:
                        say(problem)
            with contextlib.suppress(StorageError):  # unreadable: catching up warns of it
                store._check_journal()
            store.catch_up_journal()
        except BaseException:
            store.close()
            raise
        return store

    def _try_open(self) -> bool:
        """Take the shared lock and open the index; False if there is none."""
        self._refuse_links()
        self._read_format()
        self.disk.share(self.layout.root)
        self._make_missing_folders()
        if not self._open_index():
            return False
        if self.index.nearly_full and self._grow():
            return self._open_index()
        return True

    def _open_index(self) -> bool:
        if self._shared_lock is None:
            self._shared_lock = self._lock(shared=True)
        # Read again under the lock: a rebuild may just have renewed the index id.
        self._read_format()
        try:
            self._index = Index.open(self.disk, self.layout.meta, self.format.index)
        except NotFoundError:
            self._shared_lock.release()
            self._shared_lock = None
            return False
        return True

    def _grow(self) -> bool:
        """Double the index's map, if nobody else has the repository open; else a later opening does.

        Whether this handle let go of the index, and has to open it again.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.disk.lock(self.layout.gc_lock))
            except LockedError:
                return False
            self._close_index()
            with contextlib.suppress(LockedError), self.disk.lock(self.layout.lock):
                self._read_format()
                Index.grow(self.disk, self.layout.meta)
        return True

    def _refuse_links(self) -> None:
        """A link inside the folder could lead writing and collecting to files that are not the
        repository's. The folder itself may be one."""
        for path in self.layout.own:
            if self.disk.is_link(path):
                raise CorruptionError(
                    f"{path} is a symbolic link: a repository's own files and folders are none",
                    hint="put what it points to in its place; the folder .ckpt itself may be a link",
                    path=str(path),
                )

    def _make_missing_folders(self) -> None:
        """Empty folders get lost when a repository is copied by git, rsync or an object store."""
        missing = [
            folder
            for folder in self.layout.folders
            if folder != self.layout.meta and not self.disk.exists(folder)
        ]
        for folder in missing:
            self.disk.make_dir(folder)
        if missing:
            self.disk.sync_dir(self.layout.root)

    def _read_format(self) -> None:
        try:
            data = self.disk.read(self.layout.format)
        except (FileNotFoundError, StorageError) as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):  # the latter: below a file
                raise
            raise NoRepositoryError(
                f"there is no repository at {self.layout.root.parent}",
                hint="make one with `ckpt init`, or set CKPT_REPO",
            ) from None
        self.format = Format.unpack(data, str(self.layout.format))

    def _lock(self, *, shared: bool) -> Lock:
        try:
            return self.disk.lock(self.layout.lock, shared=shared, wait=_LOCK_WAIT)
        except LockedError:
            doing = "is rebuilding its index" if shared else "has it open"
            raise LockedError(
                f"the repository {self.layout.root.parent} is locked: another process {doing}",
                hint="wait for it to finish, or close other handles and programs that use it",
            ) from None

    def rebuild(self, *, only_if_missing: bool = False) -> Rebuilt | None:
        """Make the index anew. No other handle may be open; LockedError otherwise.

        With `only_if_missing`, None if another process rebuilt it first.
        """
        self._close_index()
        self._refuse_links()
        with self._lock(shared=False):
            self._read_format()
            self.format.check("write")
            if only_if_missing:
                with contextlib.suppress(NotFoundError):
                    Index.open(self.disk, self.layout.meta, self.format.index).close()
                    return None
            self.format, report = rebuild(
                self.disk, self.layout, self._pool, self._below, rescue=not only_if_missing
            )
        return report

    def reopen(self) -> None:
        """Open again after `rebuild`."""
        if not self._try_open():
            raise CorruptionError(f"the index of {self.layout.root.parent} cannot be opened")

    def _close_index(self) -> None:
        if self._index is not None:
            self._index.close()
            self._index = None
        if self._shared_lock is not None:
            self._shared_lock.release()
            self._shared_lock = None

    def close(self) -> None:
        """Let go of everything. The store cannot be used afterwards."""
        self._lease.release()
        if self._executor is not None and self._process == self.disk.process():
            self._executor.shutdown(wait=True)
        self._executor = None
        self._close_index()

    def __del__(self) -> None:
        # Who forgets to close a handle shall not block a rebuild for the rest of the process.
        with contextlib.suppress(Exception):
            self._close_index()

    @contextlib.contextmanager
    def operation(self) -> Iterator[None]:
        """A change, from its first look to its last step: at most one at a time in each thread.

        A signal handler, or a `state_dict()` that commits, would otherwise run a second change inside
        the first, which waits for the first one's locks or overtakes it.
        """
        if getattr(self._thread, "busy", False):
            raise CkptError(
                "a change of this repository is already under way in this thread",
                code="busy",
                hint="in a signal handler set a flag, and commit between two steps",
            )
        self._thread.busy = True
        try:
            yield
        finally:
            self._thread.busy = False

    # -- parts -----------------------------------------------------------------------------------

    @property
    def grid(self) -> Grid:
        """How this repository cuts content."""
        return GRIDS[self.format.grid]

    @property
    def index(self) -> Index:
        """The index, for collectors and checkers."""
        if self._index is None:
            raise CkptError("this repository handle is closed", code="closed")
        if self._process != self.disk.process():
            # A forked child: the parent's threads and locks did not come along. It is settled only
            # once it holds a lock of its own.
            self._shared_lock = self._lock(shared=True)
            self._executor = None
            self._process = self.disk.process()
        return self._index

    @property
    def lease(self) -> Lease:
        """This process's lease."""
        return self._lease

    def claim(
        self, ref: str, tip: ObjectId | None, holder: Mapping[str, Any], *, steal: bool = False
    ) -> Claim | None:
        """Claim a ref for `holder`, until released or until this process ends; None if it is not at `tip`.

        LockedError (code "claimed") naming the living claimant, unless `steal` (`claims`).
        """
        self.check("write")
        return claims.take(self.disk, self.layout, self.index, ref, tip, holder, steal=steal)

    def claimant(self, ref: str) -> str | None:
        """The living process that has claimed a ref, in words; None if nobody has."""
        return claims.living(self.disk, self.layout, ref)

    def refuse_claimed(self, ref: str) -> None:
        """LockedError (code "claimed") if a living process has claimed a ref."""
        who = self.claimant(ref)
        if who is not None:
            raise claims.refusal(ref, who)

    def restored_by_claimants(self) -> set[ObjectId]:
        """The commits whose states living claimants restored before they claimed."""
        return claims.restored(self.disk, self.layout)

    def standing_claim(self, ref: str, token: str) -> Claim:
        """A claim that another process took, to be checked and no more."""
        return claims.standing(self.disk, self.layout, ref, token)

    def _pool(self) -> ThreadPoolExecutor:
        with self._pool_mutex:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self.threads, thread_name_prefix="ckptvcs")
            return self._executor

    def snapshot(self) -> contextlib.AbstractContextManager[Snapshot]:
        """A short, consistent look at refs, log and rows."""
        return self.index.snapshot()

    def reader(self) -> Reader:
        """A scope for reading records."""
        return Reader(self.disk, self.layout, self.index, self.grid, self._pool)

    def check(self, work: str) -> None:
        """Refuse 'read', 'write' or 'gc' if this handle may not do that, or if a feature is unknown."""
        self.format.check(work)

    def needs_index(self, what: str) -> None:
        """Refuse what a handle without the index cannot do (`index_free`)."""

    def refresh(self) -> None:
        """Look at what others did. The index shows it at any time, so there is nothing to do."""

    def writer(self, compression: str = "balanced", base: ObjectId | None = None) -> Writer:
        """A scope for writing one commit, at a compression level (`choice.LEVELS`).

        `base` is the commit whose content it will probably share. Nothing depends on it here: whatever is
        stored is reused.
        """
        self.check("write")
        return self._make_writer(Writer, compression)

    def _make_writer(self, kind: type[Writer], compression: str) -> Writer:
        # Choosing brings numpy, which looking at a history must not wait for.
        from ckptvcs.store.choice import LEVELS, Chooser, Memory

        if self._choices is None:
            self._choices = Memory()
        reader = self.reader()
        chooser = Chooser(LEVELS[compression], self._choices, self.index, reader)
        return kind(
            self.disk,
            self.layout,
            self.index,
            self.grid,
            self._lease,
            self._pool,
            self.threads,
            chooser,
            reader,
        )

    # -- roots -----------------------------------------------------------------------------------

    def update(
        self,
        operations: Sequence[Operation],
        *,
        who: str,
        why: str,
        info: dict[str, Any] | None = None,
        provided: Callable[[Snapshot], bool] | None = None,
    ) -> LogEntry | None:
        """Change refs and annotations, all in one transaction; None if a ref was not at its `old`, or if
        `provided`, asked inside the transaction, does not hold.

        A ref may only be moved to a commit whose row is present, which vouches for all below it.
        Durable on return.
        """
        self.check("write")
        if any(isinstance(op, Expire) for op in operations):
            # What leaves the log table must be in the journal already, or it could never get there.
            self.catch_up_journal(must=True)
        with self.index.change() as change:
            if provided is not None and not provided(change):
                return None
            for op in operations:
                if isinstance(op, Move):
                    if change.ref(op.name) != op.old:
                        return None
                    if isinstance(op.new, ObjectId):
                        require_commit(change, op.new)
                elif isinstance(op, (Note, Pin, Drop, Fork)) and op.commit is not None:
                    require_commit(change, op.commit)
            entry = change.record(self.disk.now_ns(), who, why, operations, info)
        self.catch_up_journal()
        return entry

    def note_ranks(self, commits: Iterable[tuple[ObjectId, Sequence[ObjectId]]]) -> None:
        """Note the ranks of commits, given with those they refer to, each behind those. For commits whose
        rank nobody noted when they were made; where writing is refused, nothing happens."""
        try:
            self.format.check("write")
            with self.index.change() as change:
                for id, below in commits:
                    if change.row(id) is not None:
                        change.put_rank(id, below)
        except CkptError as error:
            _log.debug("ranks of commits were not noted: %s", error)

    def _check_journal(self) -> None:
        """Refuse an index that is older than the journal: it lost changes that were acknowledged."""
        if not self.disk.exists(self.layout.journal):
            return
        # In this order: the journal never leads, whatever others append meanwhile.
        written = self._journal.last_position()
        with self.snapshot() as snapshot:
            known = snapshot.position()
        if written > known:
            raise CorruptionError(
                f"{self.layout.journal} is ahead of the index: the index lost changes",
                hint="`ckpt fsck --rebuild` makes the index anew from packs and journal",
            )

    def catch_up_journal(self, *, must: bool = False) -> None:
        """Append to `refs.journal` what the log has beyond it.

        A failure is logged, not raised, unless it `must` succeed: the change itself is durable in the
        index already, and the next open or change tries again.
        """

        def entries_after(position: int) -> list[LogEntry]:
            with self.snapshot() as snapshot:
                return list(snapshot.log(after=position))

        try:
            if must:
                self._check_journal()
            if not self.disk.exists(self.layout.journal):
                _log.warning("%s is missing; writing it anew from the index", self.layout.journal)
                self._journal.create()
                self.disk.sync_dir(self.layout.root)
            with self.snapshot() as snapshot:
                newest = snapshot.position()
            if self._journal.last_position() != newest:
                self._journal.append(entries_after)
        except (CkptError, OSError) as error:
            if must:
                raise
            _log.warning("the journal could not be brought up to date: %s", error)

    def remove_rebuild_leftovers(self) -> None:
        """Remove what a rebuild that died left. None runs now: it would hold `lock` exclusively."""
        clear_leftovers(self.disk, self.layout)

    def journal_entries(self) -> Iterator[LogEntry]:
        """Every entry of `refs.journal`, in order. CorruptionError at the first damaged line."""
        return self._journal.entries()

    def collecting(self, *, wait: float = 0.0) -> contextlib.AbstractContextManager[None]:
        """Hold `gc.lock`: one collector at a time. LockedError if another one runs."""
        return self._collecting(wait)

    @contextlib.contextmanager
    def _collecting(self, wait: float) -> Iterator[None]:
        self.check("gc")
        try:
            lock = self.disk.lock(self.layout.gc_lock, wait=wait)
        except LockedError:
            raise LockedError(
                "another process is collecting garbage in this repository", hint="wait for it to finish"
            ) from None
        with lock:
            yield


def require_commit(change: Change, id: ObjectId) -> None:
    """Refuse a ref to something that is not a stored commit."""
    row = change.live(id)
    if row is None or row.kind is not Kind.COMMIT:
        raise NotFoundError(f"the commit {id.short} is no longer stored", hint="it was collected by gc")
