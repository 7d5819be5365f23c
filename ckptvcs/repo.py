"""The façade: a handle on a repository, bound to one branch.

The state layer and the maintenance verbs are imported by the methods that need them: they bring numpy and
much else, for which `ckpt log` or `ckpt branch` must not wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

from ckptvcs import config as settings
from ckptvcs.committing import Committer
from ckptvcs.disk import Disk, StrPath, scratch_folder
from ckptvcs.errors import (
    CkptError,
    ConflictError,
    CorruptionError,
    ExistsError,
    InvalidError,
    LockedError,
    NoRepositoryError,
    NotFoundError,
)
from ckptvcs.history import notes as noting
from ckptvcs.history import refs
from ckptvcs.history.best import Best, best
from ckptvcs.history.commit import Commit
from ckptvcs.history.comparison import Comparison, Line, compare
from ckptvcs.history.curves import Chart, curves
from ckptvcs.history.drops import Drops
from ckptvcs.history.filters import Filter, Moment, Steps
from ckptvcs.history.log import Told, told
from ckptvcs.history.revision import Revisions, range_of
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.opened import Opened
from ckptvcs.opening import (
    Environment,
    default_author,
    find,
    folder_mode,
    make_folders,
    open_store,
    refuse_network,
)
from ckptvcs.store import Claim, Fork, LogEntry, Move, Operation, Pin, Reader, Status, Store
from ckptvcs.store.format import FOLDER

if TYPE_CHECKING:
    from ckptvcs import importing
    from ckptvcs.background import PendingCommit
    from ckptvcs.combining import Merged
    from ckptvcs.history.deleted import Deleted
    from ckptvcs.history.diff import Diff
    from ckptvcs.maintenance import fsck, gc, repack, retaining, usage
    from ckptvcs.maintenance import ingest as ingesting
    from ckptvcs.maintenance.reach import Reach
    from ckptvcs.runs import Run
    from ckptvcs.state import export as exporting
    from ckptvcs.state import files as file_trees
    from ckptvcs.state import tree as state_trees
    from ckptvcs.state.checkpoint import Checkpoint
    from ckptvcs.state.lazy import LazyTensor
    from ckptvcs.state.paths import Selection

Revs: TypeAlias = str | ObjectId | Commit | Sequence[str | ObjectId | Commit]
"""A revision or a range, or several of them."""

_log = logging.getLogger("ckptvcs")
_RETRIES: Final = 10


class Restored(dict[str, Any]):
    """What `restore` did: a mapping of path to stored value for all that had no place in `into`.

    Attributes:
        commit: the commit that was restored; None on an unborn branch.
        step: its step; None if it has none.
        missing: paths of `into` that the commit does not hold.
        unexpected: paths of the commit that `into` has no place for.
        altered: path to what an object with `load_state_dict` made of what was stored there; only after
            `strict=False`, since it is an error otherwise.
        overrides: what the fork sets anew, if this was its fork point: name to value. Those that the state
            has no component for are here for the program to read.

    Falsy if nothing was restored, so `if repo.restore(state):` asks whether this is a resumed run.
    """

    def __init__(
        self,
        commit: Commit | None = None,
        leftover: Mapping[str, Any] | None = None,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        altered: Mapping[str, str] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(leftover or {})
        self.altered = dict(altered or {})
        self.overrides = dict(overrides or {})
        self.commit = commit
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)

    @property
    def step(self) -> int | None:
        """The restored commit's step."""
        return None if self.commit is None else self.commit.step

    def __bool__(self) -> bool:
        return self.commit is not None


class Repo:
    """A handle on a repository. Its branch is fixed when it opens: another process moving HEAD never
    redirects a job. Not for use from several threads at once; open one handle per thread with `on`.

    An idle handle blocks nothing and keeps no bytes. Use it as a context manager, or call `close`.
    """

    def __init__(self, opened: Opened, branch: str | None, *, owner: bool) -> None:
        """Use `Repo.init`, `Repo.open` or `on`."""
        self._opened = opened
        self._owner = owner
        self._committer = Committer(opened, branch)
        # Nothing in here refers back to the handle: one that is forgotten goes at once, its writer with it.
        self._revisions = Revisions(
            opened.store,
            opened.history,
            self._committer.head,
            lambda metric: opened.config.metric_mode(metric),
        )
        self._drops = Drops(opened.store, opened.history)
        if not owner:  # an owner in its own list would be freed by the garbage collector only
            opened.committers.append(self._committer)

    # -- opening and closing ---------------------------------------------------------------------

    @classmethod
    def init(
        cls,
        path: StrPath,
        *,
        compression: str | None = None,
        network: bool = False,
        shared: str | None = None,
    ) -> Repo:
        """Make a repository in the folder `path` (as `path/.ckpt`), with HEAD on the unborn branch `main`,
        and open it on `CKPT_BRANCH`, else on HEAD's. Missing folders are made.

        `compression` is 'fast', 'balanced' or 'small' and is recorded in the repository's config. So is
        `network`: the index may be on a network file system, since one host alone will use it.
        `shared` lets other users use it: 'group' (its group may write, nobody else may read), 'all' (and
        everybody may read), or a file mode such as '0640'. The repository's folder keeps that as its own
        mode, and every file in it follows, whatever the umask of who makes it. Folders above it that were
        missing get it, too.

        ExistsError if there is one already. Durable on return.
        """
        mode = None if shared is None else folder_mode(shared)
        level = (
            ""
            if compression is None
            else f'compression = "{settings.checked("compression", compression, "compression")}"\n'
        )
        environ = Environment()
        disk = Disk()
        folder = Path(path)
        if network:
            level += "index.network = true\n"
        else:
            refuse_network(disk, folder)
        make_folders(disk, folder, mode)
        store = Store.create(
            folder.resolve() / FOLDER,
            disk,
            config=level.encode(),
            head=refs.HEADS + "main",
            who=environ.author or default_author(),
            threads=environ.threads,
            below=_below,
            mode=mode,
        )
        return cls(Opened(store, environ.author, job=environ.job), environ.branch, owner=True)

    @classmethod
    def open(
        cls,
        path: StrPath | None = None,
        branch: str | None = None,
        *,
        compression: str | None = None,
        create: bool = False,
        rebuild: bool = False,
        index_free: bool | None = None,
        ingest: bool = True,
        say: Callable[[str], None] | None = None,
    ) -> Repo:
        """A handle on an existing repository.

        Who may only read it gets a handle that only reads. Bundles that wait in `incoming/` are taken up
        first (`ingest`), unless the setting `ingest` is 'manual'.

        Args:
            path: the repository's folder or any folder below it. Without it `CKPT_REPO`, else the
                current folder and those above it are searched, like git does.
            branch: the branch to work on; it need not exist yet. Without it `CKPT_BRANCH`, else the
                branch HEAD is on now.
            compression: 'fast', 'balanced' or 'small' for what this handle commits; without it, the
                repository's setting. Every level reads what every other wrote.
            create: make the repository if it is missing. Needs `path` or `CKPT_REPO`. Safe when many
                processes do it at once.
            rebuild: make the index anew from packs and journal first, even if it is too damaged to be
                opened. No other handle may be open.
            index_free: do not use the index, which processes in several PID namespaces (containers), on
                several hosts or on a network file system must not share. Commits then go to `incoming/`
                and are durable there; a process that has the index takes them up. Refs are seen as they
                were when the handle was opened or last committed. Without it, `CKPT_INDEX_FREE`.
            ingest: False leaves bundles where they are.
            say: told in a sentence when the index had to be rebuilt; the default logs a warning.

        Raises NoRepositoryError, FormatError for a newer format, LockedError during a rebuild, StorageError
        (code 'network') where the index must not be used.
        """
        if compression is not None:
            settings.checked("compression", compression, "compression")
        environ = Environment()
        disk = Disk()
        place = Path(path) if path is not None else environ.repo
        if create and place is None:
            raise InvalidError("create=True needs a path", hint="pass one, or set CKPT_REPO")
        root = find(disk, place if place is not None else Path.cwd())
        if root is None and create and place is not None:
            try:
                cls.init(place).close()
            except ExistsError:
                pass
            root = place.resolve() / FOLDER
        if root is None:
            where = place if place is not None else Path.cwd()
            raise NoRepositoryError(
                f"there is no repository in {where} or above it",
                hint="make one with `ckpt init`, or set CKPT_REPO to its folder",
            )
        store = open_store(
            root,
            disk,
            threads=environ.threads,
            say=say or _log.warning,
            rebuild=rebuild,
            index_free=environ.index_free if index_free is None else index_free,
            below=_below,
        )
        try:
            opened = Opened(store, environ.author, compression, environ.job)
            if ingest:
                opened.take_up(say or _log.warning)
            repo = cls(opened, branch or environ.branch, owner=True)
            repo._warn_of_missing_packs(say or _log.warning)
            return repo
        except BaseException:
            store.close()
            raise

    def _warn_of_missing_packs(self, say: Callable[[str], None]) -> None:
        from ckptvcs.maintenance import presence

        _, tip = self._committer.head()
        if tip is not None and not self._opened.index_free:
            with contextlib.suppress(CkptError):  # whatever it is, it is found by those who need it
                told = presence.warning(self._store, self.branch_name or "HEAD", tip)
                if told is not None:
                    say(told)

    def on(self, branch: str) -> Repo:
        """A second handle on the same repository, on another branch. Closed with this one."""
        return Repo(self._open(), branch, owner=False)

    def close(self) -> None:
        """Let go of the repository. The handle cannot be used afterwards; closing twice is fine.

        Waits for a save in flight (`commit_async`). If one failed and its error was not raised yet, it
        is raised here, after everything was closed. CkptError (code `busy`) in a signal handler that came
        while this thread was committing.
        """
        if self._committer.closed:
            return
        opened = self._opened
        with opened.store.operation():  # else it would wait for what cannot go on before it returns
            ending = [self._committer, *(opened.committers if self._owner else ())]
        try:
            with contextlib.ExitStack() as stack:  # of several errors each is raised, in a chain
                for committer in ending:
                    stack.callback(committer.settle)
        finally:
            for committer in ending:
                committer.close()
            if self._owner:
                if opened.background is not None:
                    opened.background.close()
                opened.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CkptError as error:
            if value is None:
                raise
            _log.error("a commit in the background was not made: %s", error)

    def __repr__(self) -> str:
        return f"Repo({str(self.path)!r}, branch={self.branch_name!r})"

    def _open(self) -> Opened:
        if self._committer.closed:
            raise CkptError("this repository handle is closed", code="closed", hint="open it again")
        return self._opened

    @property
    def _store(self) -> Store:
        return self._open().store

    # -- what it is ------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """The folder that holds `.ckpt`."""
        return self._opened.folder

    @property
    def branch_name(self) -> str | None:
        """The handle's branch, born or not; None when HEAD was detached at open."""
        return self._committer.branch

    @property
    def origin(self) -> Commit | None:
        """The commit this handle restored or committed last: where its next one comes from."""
        origin = self._committer.origin
        return None if origin is None else self._open().history.commit(origin)

    @property
    def disk(self) -> Disk:
        """The door to files and the clock through which this repository is used."""
        return self._opened.store.disk

    @property
    def author(self) -> str:
        """Who commits: `CKPT_AUTHOR`, else the config's author, else login@host."""
        opened = self._open()
        return opened.author or opened.config.get("author") or default_author()

    @property
    def config(self) -> settings.Config:
        """The repository's settings as they were at open, or after the last `configure`."""
        return self._open().config

    def configure(self, key: str, value: str | None) -> None:
        """Set a setting from text, or unset it (None). Durable on return."""
        opened = self._open()
        opened.store.check("write")
        opened.config = opened.read_config()
        text = opened.config.with_value(key, value)
        opened.store.disk.replace(opened.store.layout.config, text.encode())
        opened.config = opened.read_config()

    def metric_mode(self, metric: str) -> str:
        """Whether small or large values of a metric are better: 'min' or 'max', by the setting
        `metric.NAME.mode`, else by its name. InvalidError if neither tells."""
        self._open()
        return self._revisions.mode(metric)

    # -- committing ------------------------------------------------------------------------------

    def commit(
        self,
        state: Any,
        message: str = "",
        *,
        step: int | None = None,
        epoch: int | float | None = None,
        metrics: Mapping[str, Any] | None = None,
        config: Any = None,
        files: Mapping[str, StrPath] | None = None,
        environment: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        status: str | None = None,
    ) -> Commit:
        """Save a state on the handle's branch. Durable when it returns.

        Args:
            state: nested dicts, lists and tuples of tensors, arrays, numbers, text and the other leaf
                kinds of docs/format.md. Objects with `state_dict()` are stored as what that returns.
            message: free text.
            step, epoch: the training position.
            metrics: numbers by name, such as {"val_loss": 0.31}.
            config: hyperparameters: a mapping or an argparse.Namespace.
            files: files to keep beside the state, by the path they get in the commit.
            environment: circumstances to record besides those that are captured, nested plain values.
            tags: names of tags to be made at the commit.
            status: of the run on this branch from now on: 'running', 'finished' or 'failed'. 'running' claims
                the branch.

        Branch, tags and status move together, or none does. The first parent is the branch's tip as this
        handle last committed, restored or saw it at open.

        Raises:
            UnsupportedStateError: leaves that cannot be stored, all of them; nothing was written.
            LineageError: the handle restored a commit that is not its branch's tip, or HEAD is
                detached.
            ConflictError: somebody else moved the branch; the commit is kept under `.rescued`.
            StorageError: disk full, quota, permissions; the repository is unchanged.
        """
        from ckptvcs.state import files as file_trees
        from ckptvcs.state import tree as state_trees
        from ckptvcs.state.distributed import refuse_on_other_ranks

        refuse_on_other_ranks()
        attached = None if files is None else file_trees.attached(self.disk, files)
        return self._committer.commit(
            lambda writer, bases: state_trees.write(writer, state, attached, bases),
            message,
            step=step,
            epoch=epoch,
            metrics=metrics,
            config=config,
            circumstances=environment,
            tags=tags,
            status=status,
        )

    def check_commit(
        self, state: Any, *, metrics: Mapping[str, Any] | None = None, config: Any = None
    ) -> None:
        """Refuse now what `commit` with these arguments would refuse later. Writes nothing, copies nothing.

        Raises:
            UnsupportedStateError: leaves of the state or of the config that cannot be stored, all of them.
            InvalidError: metrics or config of another kind.
            LineageError: the handle restored a commit that is not its branch's tip, or HEAD is detached.
            ConflictError: somebody moved the branch since this handle saw it.
        """
        self._committer.check(state, metrics, config)

    def claim(self, *, steal: bool = False) -> Claim:
        """Claim this handle's branch for this process, until `release`, `close` or the process's end.

        Others cannot claim the branch meanwhile, and this handle commits only while it holds the claim. Seen
        by all processes of this machine; somebody who does not claim may still commit, which ends as a
        conflict. A handle that has restored nothing sees the branch's tip anew: who takes over from a job
        that saves often claims first and restores then.

        Args:
            steal: take the branch over from a living claimant, whose handle then refuses to commit.

        Raises LockedError (code 'claimed') naming the claimant's job, process and host; ConflictError if
        somebody moved the branch since this handle saw it, and then takes nothing over; LineageError if
        HEAD is detached.
        """
        return self._committer.claim(steal=steal)

    @property
    def claimed(self) -> Claim | None:
        """The claim on the branch that this handle holds; None without one."""
        return self._committer.claimed

    def commit_async(
        self,
        state: Any,
        message: str = "",
        *,
        step: int | None = None,
        epoch: int | float | None = None,
        metrics: Mapping[str, Any] | None = None,
        config: Any = None,
        files: Mapping[str, StrPath] | None = None,
        environment: Mapping[str, Any] | None = None,
        when_busy: str = "wait",
        frozen: str | Sequence[str] = (),
        quiet: bool = False,
        tags: Sequence[str] = (),
        status: str | None = None,
        retain: Mapping[str, Any] | None = None,
    ) -> PendingCommit:
        """Save a state in the background. When the call returns, everything is copied, files included,
        and the state may change; the commit is durable once `PendingCommit.result` returns it.

        A process of its own stores the copy, at the lowest priority; it is started by the first call and
        ends with `close`. If this process dies meanwhile, the save is finished all the same.

        Args:
            when_busy: one save is in flight at a time, over all handles of this repository from `on`.
                'wait' waits for the one before; 'skip' saves nothing then, and the result says so.
            frozen: pattern or patterns (as in `checkout`) of tensors that hardly ever change. Of torch
                tensors among them whose version counter says that nothing was written since the last
                call, no new copy is made. Writes that torch does not count are missed: through
                `tensor.data`, a numpy view, or foreign code.
            quiet: do not log a line at level INFO when the save has ended.
            retain: rules as `Repo.retain` takes them, such as {"keep_last": 3}, which the writer applies to
                the branch behind the commit. The next save with rules is stored after that, so that what
                should be gone never piles up. One without rules waits for nothing.
            others: as in `commit`.

        Extra memory is one copy of the state and files, kept for the next call, and what the writer
        process needs for itself (docs/architecture, "Memory").

        Raises at once what `commit` raises before it writes. An error met later is raised by `result`,
        or else by the next commit of this handle, or by `close`; if the program ends before any of them,
        it is logged and the exit status is 120. CkptError (code `writer-lost`) if the writer process died.
        """
        return self._committer.commit_async(
            state,
            message,
            step=step,
            epoch=epoch,
            metrics=metrics,
            config=config,
            files=files,
            circumstances=environment,
            when_busy=when_busy,
            frozen=frozen,
            quiet=quiet,
            tags=tags,
            status=status,
            retain=retain,
        )

    def commit_files(
        self,
        paths: Mapping[str, StrPath],
        message: str = "",
        *,
        step: int | None = None,
        epoch: int | float | None = None,
        metrics: Mapping[str, Any] | None = None,
        config: Any = None,
        continues: bool = False,
        tags: Sequence[str] = (),
        status: str | None = None,
    ) -> Commit:
        """Save files and folders, byte-exact, as a tree of exactly the paths given (tree path to file
        or folder). Otherwise like `commit`.

        `continues` says that the files come from the branch's tip, as when a person works on it, so
        that the commit is no fresh start.
        """
        from ckptvcs.state import files as file_trees
        from ckptvcs.state import tree as state_trees

        folder = file_trees.collected(self._store.disk, paths)
        return self._committer.commit(
            lambda writer, bases: state_trees.write(writer, files=folder, bases=bases),
            message,
            step=step,
            epoch=epoch,
            metrics=metrics,
            config=config,
            continues=continues,
            tags=tags,
            status=status,
        )

    # -- commits made of commits -------------------------------------------------------------------

    def merge(
        self,
        *revs: str | ObjectId | Commit,
        strategy: str = "mean",
        weights: Sequence[float] | None = None,
        base: str | ObjectId | Commit | None = None,
        only: str | Sequence[str] | None = None,
        ours: str | Sequence[str] = (),
        theirs: str | Sequence[str] = (),
        prefer: str | None = None,
        message: str = "",
        step: int | None = None,
        epoch: int | float | None = None,
        metrics: Mapping[str, Any] | None = None,
        config: Any = None,
        tags: Sequence[str] = (),
        say: Callable[[str], None] | None = None,
    ) -> Merged:
        """Commit the average of states, with all of them as parents, on the handle's branch.

        Tensor by tensor: no state is ever in memory. Formulas are in docs/concepts; they are computed in
        float64 and rounded once. What is equal in all is kept by its ids and not read.

        Args:
            revs: the commits. The first is the branch's tip, or where a branch without commits begins. One
                alone is merged into the tip.
            strategy: 'mean', 'weighted', 'slerp' (of two) or 'task-arithmetic'.
            weights: a number per commit, in their order; of slerp also one alone: how far to the second.
            base: of task-arithmetic, the commit that all were tuned from; the others' nearest common ancestor
                along first parents, if it is not given.
            only: names or patterns of what is averaged; the rest is that of the first commit.
            ours, theirs: names or patterns of what is taken from the first commit, or from the second.
            prefer: 'ours' or 'theirs' settles what no pattern does.
            message: by default, what was merged and how.
            step, epoch, config: by default those of the first commit.
            metrics, tags: as in `commit`.
            say: told the path of each tensor that is read before anything is stored.

        The handle's own state is not that of the new commit: `restore` comes before its next `commit`.

        Raises:
            MergeConflictError: what has no average (missing, another shape or dtype, integers, values that
                differ) and is claimed by no pattern; all of it.
            LineageError: the first commit is not the branch's tip, or HEAD is detached.
            ConflictError: somebody moved the branch meanwhile; the commit is kept under `.rescued`.
        """
        from ckptvcs import combining

        sides = [self.resolve(rev) for rev in (("HEAD", *revs) if len(revs) == 1 else revs)]
        recipe = combining.Recipe(
            strategy, weights, None if base is None else self.resolve(base), only, ours, theirs, prefer
        )
        rules, below, how = recipe.checked(sides, self._opened.history)
        names = ", ".join(side.id.short for side in sides)
        with contextlib.ExitStack() as stack:
            for each in [*sides, *([] if below is None else [below])]:
                reader = stack.enter_context(self._reading(each, only if each is below else ()))
            return combining.combine(
                self._open(),
                self._committer,
                reader,
                sides,
                below,
                rules,
                message or f"merge {names}: {strategy}",
                step=step,
                epoch=epoch,
                metrics=metrics,
                config=config,
                how={"merge": how},
                tags=tags,
                drops=self._drops,
                say=say,
            )

    def cherry_pick(
        self,
        rev: str | ObjectId | Commit,
        only: str | Sequence[str],
        *,
        onto: str | ObjectId | Commit = "HEAD",
        message: str = "",
        metrics: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
    ) -> Merged:
        """Commit a state with parts of another one: the weights of one run with the optimizer of another.

        No tensor is read: parts go by their ids. Both commits become parents.

        Args:
            rev: the commit from which parts are taken.
            only: names or patterns of these parts; they take the place of what is called so, or are added.
            onto: the commit whose state has the rest: the branch's tip, or where a branch without commits
                begins.
            message, metrics, tags: as in `commit`. Step, epoch and config are those of `onto`.

        Raises NotFoundError if a pattern matches nothing, and otherwise what `merge` does.
        """
        from ckptvcs import combining
        from ckptvcs.state import merging

        picked = combining.patterns(only)
        if not picked:
            raise InvalidError("a cherry-pick takes parts", hint="name them with only= (`--only optimizer`)")
        target, source = self.resolve(onto), self.resolve(rev)
        if target.id == source.id:
            raise InvalidError("both commits are the same")
        with self._reading(target, ()), self._reading(source, picked) as reader:
            return combining.combine(
                self._open(),
                self._committer,
                reader,
                [target, source],
                None,
                merging.Rules(theirs=picked),
                message or f"cherry-pick {', '.join(picked)} of {source.id.short}",
                step=None,
                epoch=None,
                metrics=metrics,
                config=None,
                how={"cherry_pick": {"commit": str(source.id), "only": list(picked)}},
                tags=tags,
                drops=self._drops,
                say=None,
            )

    # -- reading commits -----------------------------------------------------------------------------

    def resolve(self, rev: str | ObjectId | Commit = "HEAD") -> Commit:
        """The commit a revision names (docs/concepts: revisions)."""
        opened = self._open()
        return opened.history.commit(self._revisions.resolve(rev))

    def checkout(
        self,
        rev: str | ObjectId | Commit = "HEAD",
        only: str | Sequence[str] | None = None,
        *,
        device: Any = None,
        framework: str | None = None,
    ) -> Any:
        """The state saved in a commit, bit-exact. Reads nothing but what it returns.

        Args:
            rev: which commit.
            only: names or patterns: a plain name is a subtree, `*` stops at `/`, `**` does not. A
                pattern that matches nothing is a NotFoundError.
            device: where torch tensors go: one device or a mapping of pattern to device.
            framework: 'numpy' or 'torch'; None gives each tensor in the framework it was stored from.

        For a commit of files: {path: bytes}. This is a read: it does not become the origin of a later
        commit; `restore` does.
        """
        from ckptvcs.state import files as file_trees
        from ckptvcs.state import tree as state_trees

        commit = self.resolve(rev)
        with self._reading(commit, only) as reader:
            if not state_trees.parts(reader, commit.tree).state:
                return file_trees.contents(reader, commit.tree, only)
            return state_trees.read(reader, commit.tree, only=only, framework=framework, device=device)

    def open_tensor(
        self, rev: str | ObjectId | Commit, path: str, *, framework: str | None = None
    ) -> LazyTensor:
        """One tensor of a commit, of which slices are read without the rest.

        Args:
            rev: which commit.
            path: the tensor's path as `ckpt ls` shows it; no pattern.
            framework: 'numpy' or 'torch'; None gives slices in the framework it was stored from.

        NotFoundError if there is nothing of that path; InvalidError if it is no dense tensor.
        """
        from ckptvcs.state.lazy import opened_tensor
        from ckptvcs.state.paths import exactly, split

        commit = self.resolve(rev)
        place = exactly(split(path))
        return opened_tensor(lambda: self._reading(commit, place), commit.tree, path, framework)

    def restore(
        self,
        into: Any,
        rev: str | ObjectId | Commit | None = None,
        *,
        only: str | Sequence[str] | None = None,
        strict: bool = True,
        rename: Mapping[str, str] | None = None,
    ) -> Restored:
        """Fill `into` in place from a commit, by default the tip of the handle's branch.

        Arrays and tensors are filled where they are, objects with `load_state_dict` get what was
        stored for them, other values are replaced in their container. On an unborn branch nothing
        happens and the result is falsy.

        Args:
            into: the structure to fill, laid out like the state that was committed.
            rev: another commit. If it is not the branch's tip, commits need a branch of their own.
            only: fill only what matches (patterns as in `checkout`).
            strict: raise StateMismatchError, before anything is changed, if names or shapes differ; and
                afterwards, if an object did not keep what it was given.
            rename: stored path to path in `into`, or the beginning of names to another, such as
                {"model/encoder.": "model/backbone."}.

        DroppedError if retention took something of what is asked for; nothing was changed then.
        CorruptionError if a stored chunk is damaged; what was read before is in `into` then.
        """
        from ckptvcs.state import overrides as overriding
        from ckptvcs.state import restore as restoring

        self._committer.wait()  # or its commit would be the origin of what is committed after this
        _, tip = self._committer.head()
        if rev is None:
            if tip is None:
                return Restored()
            rev = tip
        commit = self.resolve(rev)
        if not self.has_state(commit):
            raise NotFoundError(
                f"the commit {commit.id.short} holds files and no state", hint=self._state_before(commit)
            )
        wanted = self._overrides_at(commit)
        overriding.check(into, wanted)
        with self._reading(commit, only) as reader:
            filled = restoring.fill(reader, commit.tree, into, only=only, strict=strict, rename=rename)
        applied = overriding.apply(into, wanted)
        for line in applied.said:
            _log.warning("fork %s: %s", self.branch_name, line)
        self._committer.stand_at(commit.id, tip, wanted)
        return Restored(commit, *filled, overrides=wanted)

    def _overrides_at(self, commit: Commit) -> dict[str, Any]:
        """What restoring a commit sets anew: the overrides of the handle's branch, where it was forked."""
        fork = self._committer.fork()
        return fork[1] if fork is not None and fork[0] == commit.id else {}

    def _state_before(self, commit: Commit) -> str:
        """Where to find a state when a commit has none."""
        for older in self._opened.history.first_parents(commit.id):
            if self.dropped(older) != () and self.has_state(older):
                return f"the nearest before it with a state is {older.id.short}: restore(state, rev=...)"
        return "no commit before it holds one either; check out its files instead"

    @contextlib.contextmanager
    def _reading(
        self, commit: Commit, only: str | Sequence[str] | Selection | None = None
    ) -> Iterator[Reader]:
        """A reader on what `only` selects of a commit's content. It tells what retention took, and what a
        collector took meanwhile, from damage."""
        self._drops.check(commit, only)
        try:
            with self._store.reader() as reader:
                yield reader
        except (CorruptionError, NotFoundError) as error:
            self._drops.explain(commit, only, error)
            raise

    def log(
        self,
        rev: Revs | None = None,
        n: int | None = None,
        *,
        first_parent: bool = False,
        brief: bool = False,
        branches: str | Sequence[str] | None = None,
        metric: str | Sequence[str] = (),
        step: Steps | None = None,
        since: Moment | None = None,
        until: Moment | None = None,
        author: str | None = None,
        grep: str | None = None,
    ) -> Iterator[Commit]:
        """Commits reachable from a revision, or from several, children before parents; at most `n`. They
        are read as they are asked for.

        Args:
            rev: a revision, a range ('A..B', 'A...B'), or several of these and of '^A' (docs/concepts:
                revisions); HEAD if neither this nor `branches` is given.
            n: the most commits to give.
            first_parent: follow first parents alone: one line of commits, from one revision.
            brief: only commits at which something happens: where a line ends, begins, parts or joins, fresh
                starts, and those that refs point at.
            branches: globs of branches to begin at, too.
            metric: conditions such as 'val_loss<0.3', on metrics with their notes.
            step: '1000..2000', a number, or a pair.
            since, until: when the commit was made: '2d' ago, a date, a datetime, a timedelta ago.
            author, grep: regular expressions for author and message; case is the same.
        """
        told = self.graph(
            rev, n, first_parent=first_parent, brief=brief, branches=branches, metric=metric, step=step,
            since=since, until=until, author=author, grep=grep,
        )  # fmt: skip
        return (commit for commit, _, shown in told if shown)

    def graph(
        self,
        rev: Revs | None = None,
        n: int | None = None,
        *,
        first_parent: bool = False,
        brief: bool = False,
        branches: str | Sequence[str] | None = None,
        **filters: Any,
    ) -> Iterator[Told]:
        """Like `log`, each commit with its parents, and those between that are not asked for, hidden."""
        opened = self._open()
        chosen = Filter.parse(self.disk.now_ns(), **filters)
        if rev is None:
            rev = "HEAD" if branches is None else ()
        revs = [rev] if isinstance(rev, (str, ObjectId, Commit)) else rev
        tips, without = self._revisions.resolve_all(revs)
        if branches is not None:
            known = self.branches()
            tips += [known[name] for name in refs.matching(branches, known)]
        named = {id for found in (self.branches(), self.tags(), self.lost()) for id in found.values()}
        return told(
            opened.history,
            tips,
            without,
            chosen,
            self.metrics,
            most=n,
            first_parent=first_parent,
            brief=named if brief else None,
        )

    def diff(
        self,
        old: str | ObjectId | Commit,
        new: str | ObjectId | Commit = "HEAD",
        *,
        only: str | Sequence[str] | None = None,
        norms: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> Diff:
        """What changed from one commit to another: tensors (how far their numbers moved), values, files, and
        with them step, metrics, config and environment. The gravest changes come first.

        Ids decide what is the same: equal subtrees are skipped unread, and of tensors that differ only the
        chunks that do are read, a few MiB at a time.

        Args:
            only: names or patterns as in `checkout`; NotFoundError if one matches nothing in either commit.
            norms: of tensors that differ in some chunks only, read the others as well (once). Without, their
                cosine is unknown and their relative size an upper bound.
            say: told the path of each tensor that is looked at.
        """
        from ckptvcs.history.diff import diff

        before, after = self.resolve(old), self.resolve(new)
        with self._reading(before, only), self._reading(after, only) as reader:
            return diff(reader, before, after, self.metrics, only=only, norms=norms, say=say)

    @contextlib.contextmanager
    def beside(
        self, rev: str | ObjectId | Commit, path: StrPath, *, only: str | Sequence[str] | None = None
    ) -> Iterator[tuple[Checkpoint, Checkpoint, str]]:
        """A commit and a checkpoint file or folder, as sides for `compare.compare`, while both are open,
        and the component of the commit that the file is about; "" for all of it."""
        from ckptvcs.state.checkpoint import open_checkpoint, selected
        from ckptvcs.state.side_by_side import aligned, contents

        commit = self.resolve(rev)
        file = open_checkpoint(self.disk, Path(path))
        with self._reading(commit) as reader:
            mine, prefix = aligned(contents(reader, commit.tree), file)
            if only is not None:
                mine, file = selected([mine, file], [only] if isinstance(only, str) else list(only))
            yield mine, file, prefix

    def metrics(self, commit: Commit) -> dict[str, Any]:
        """A commit's metrics together with those that notes added later."""
        self._open()
        return self._revisions.metrics(commit)

    def notes(self, rev: str | ObjectId | Commit = "HEAD") -> noting.Notes:
        """What is known of a commit beside what it holds: metrics with those added later, texts, what
        retention dropped, whether it is pinned."""
        return noting.of(self._store, self.resolve(rev))

    def annotate(
        self,
        rev: str | ObjectId | Commit = "HEAD",
        metrics: Mapping[str, Any] | None = None,
        *,
        texts: Mapping[str, str] | None = None,
        remove: str | Iterable[str] = (),
    ) -> noting.Notes:
        """Note something of a commit that was made: durable on return, gives all that is noted then.

        Args:
            rev: which commit.
            metrics: numbers by name. One that the commit has itself is hidden by the note.
            texts: texts by name.
            remove: names of notes to take away.

        InvalidError for names and values that cannot be notes; NotFoundError for a removal of nothing.
        """
        commit = self.resolve(rev)
        operations = noting.changes(commit, self.notes(commit), metrics, texts, remove)
        self.record(operations, f"note: {', '.join(op.key for op in operations)}")
        return self.notes(commit)

    def best(self, metric: str, *, branches: str | Sequence[str] | None = None, n: int = 1) -> list[Best]:
        """The `n` best commits by a metric over all branches, or over those that globs name; best first.

        Notes count. NaN never wins; of equal values the oldest is best (docs/concepts: metrics).
        NotFoundError if no commit has that metric; InvalidError if nobody said which values are better.
        """
        chosen = self._chosen(branches)
        return best(self._open().history, chosen, metric, self.metric_mode, self.metrics, n)

    def _chosen(self, branches: str | Sequence[str] | None) -> dict[str, ObjectId]:
        """Branches by globs, the handle's own first."""
        known = self.branches()
        names = list(known) if branches is None else refs.matching(branches, known)
        names.sort(key=lambda name: name != self.branch_name)
        return {name: known[name] for name in names}

    def compare(self, *revs: str) -> Comparison:
        """Branches or other revisions side by side, since the newest commit that all of them have.

        Args:
            revs: two or more revisions, ranges ('A..B' is B's line behind A), or globs of branches; a name
                with branches below it stands for them.

        Reads commits only, no content.
        """
        opened = self._open()
        known = self.branches()
        lines: list[Line] = []
        for rev in revs:
            sides = range_of(rev)
            if sides is not None and sides[1] == "...":
                raise InvalidError(f"{rev!r} is no line of commits", hint="name its sides apart, or use A..B")
            if sides is not None:
                left, right = (self._revisions.resolve(side or refs.HEAD) for side in sides[::2])
                lines.append(Line(rev, right, left))
            elif any(sign in rev for sign in "*?[") or any(name.startswith(f"{rev}/") for name in known):
                lines += [Line(name, known[name]) for name in refs.matching(rev, known)]
            else:
                lines.append(Line(rev, self._revisions.resolve(rev)))
        lines = list({line.name: line for line in lines}.values())
        return compare(opened.history, lines, self.metrics, self.metric_mode)

    def curves(self, metric: str, *, branches: str | Sequence[str] | None = None) -> Chart:
        """A metric along the first parents of all branches, or of those that globs name; what they share is
        part of one curve only, the first. `ckptvcs.charts` draws it."""
        return curves(self._open().history, self._chosen(branches), metric, self.metrics)

    def metric_names(self) -> set[str]:
        """The metrics of the newest commit of each branch."""
        tips = self._open().history.commits(list(dict.fromkeys(self.branches().values())))
        return {name for tip in tips for name in self.metrics(tip)}

    def dropped(self, rev: str | ObjectId | Commit = "HEAD") -> tuple[str, ...] | None:
        """The components that retention took from a commit: () if all of its content, None if none was."""
        return self._drops.of(self.resolve(rev).id)

    def nearest_with(
        self, rev: str | ObjectId | Commit = "HEAD", components: Sequence[str] = ()
    ) -> Commit | None:
        """The commit nearest to this one along its line, newer or older, that has these components (all of
        its content, without any); None if there is none."""
        return self._drops.nearest(self.resolve(rev), components)

    def has_state(self, rev: str | ObjectId | Commit = "HEAD") -> bool:
        """Whether a commit holds a Python state; otherwise it holds files only. DroppedError if retention
        took all of its content."""
        from ckptvcs.state import tree as state_trees

        commit = self.resolve(rev)
        with self._reading(commit, ()) as reader:
            return state_trees.parts(reader, commit.tree).state

    def entries(
        self, rev: str | ObjectId | Commit = "HEAD", only: str | Sequence[str] | None = None
    ) -> Iterator[state_trees.Entry]:
        """The leaves of a commit's state: paths, kinds, dtypes, shapes, bytes. Reads no tensor.

        Without `only`, of what is there: components that retention took are left out (`dropped`).
        """
        from ckptvcs.state import tree as state_trees

        commit = self.resolve(rev)
        with self._reading(commit, () if only is None else only) as reader:
            yield from state_trees.entries(reader, commit.tree, only, self.dropped(commit) or ())

    # -- files -----------------------------------------------------------------------------------

    def file_entries(
        self, rev: str | ObjectId | Commit = "HEAD", only: str | Sequence[str] | None = None
    ) -> list[file_trees.FileEntry]:
        """The files of a commit, attached ones included, without their content. Without `only`, those that
        retention took are left out (`dropped`)."""
        from ckptvcs.state import files as file_trees

        commit = self.resolve(rev)
        with self._reading(commit, () if only is None else only) as reader:
            return list(file_trees.entries(reader, commit.tree, only, self.dropped(commit) or ()))

    def file_status(self, rev: str | ObjectId | Commit = "HEAD") -> file_trees.FileStatus:
        """How the files in the repository's folder compare with a commit's."""
        from ckptvcs.state import files as file_trees

        commit = self.resolve(rev)
        with self._reading(commit) as reader:
            return file_trees.status(reader, commit.tree, self.path)

    def checkout_files(
        self,
        rev: str | ObjectId | Commit = "HEAD",
        to: StrPath | None = None,
        *,
        only: str | Sequence[str] | None = None,
        force: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> file_trees.WriteReport:
        """Put a commit's files below `to` (made if missing), by default the repository's folder.

        ConflictError, with nothing written, if files there were changed since the commit HEAD is on;
        `force` overwrites them. HEAD stays where it is.
        """
        from ckptvcs.state import files as file_trees

        _, head = self.head()
        commit = self.resolve(rev)
        with self._reading(commit, only) as reader:
            base = {}
            if to is None and head is not None and self.dropped(head) is None:
                base = {e.path: e for e in file_trees.entries(reader, self.resolve(head).tree)}
            return file_trees.write_out(
                reader,
                commit.tree,
                self.path if to is None else Path(to),
                only=only,
                force=force,
                base=base,
                say=say,
            )

    def export(
        self,
        rev: str | ObjectId | Commit,
        to: StrPath,
        *,
        format: str,
        only: str | Sequence[str] | None = None,
        dtype: str | None = None,
        config_from: StrPath | None = None,
        max_shard_size: int | str | None = None,
        tensors_only: bool = False,
        force: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> exporting.ExportReport:
        """Write a commit's state as checkpoint files of other tools, below the folder `to` (made if missing).

        Tensor by tensor: the state is never in memory (docs/concepts: export). Each file appears under its
        name when it is complete and durable.

        Args:
            rev: which commit.
            to: the folder.
            format: 'safetensors', 'torch' (an archive for `torch.load(weights_only=True)`, nested as the
                state is), 'npz', or 'hf' (a folder for `from_pretrained`).
            only: names or patterns as in `checkout`. If all begin with the same component, its name is
                dropped. 'hf' exports the component `model` if there is one and nothing is said here.
            dtype: 'bf16', 'fp16' or 'fp32': cast floating-point tensors, rounded to nearest even.
            config_from: for 'hf', a folder whose config and tokenizer files are copied.
            max_shard_size: for 'hf', bytes of tensors per file: a number or text such as '5GB'; 50 GB.
            tensors_only: leave out what is no tensor, where the format has no place for it.
            force: replace files that are there.
            say: told each tensor's path when it is written.

        UnsupportedStateError lists all values that the format cannot hold; ExistsError if a file is there
        already. Nothing was written then.
        """
        from ckptvcs.state import export as exporting

        commit = self.resolve(rev)
        if not self.has_state(commit):
            raise NotFoundError(
                f"the commit {commit.id.short} holds files and no state",
                hint=f"`ckpt checkout {commit.id.short} --to DIR` writes them as they were",
            )
        part = "model" if only is None and format == "hf" and "model" in commit.sizes else only
        with self._reading(commit, part):
            make_folders(self._store.disk, Path(to))
        with self._reading(commit, part) as reader:
            return exporting.export(
                reader,
                commit.tree,
                self._store.disk,
                Path(to),
                format=format,
                only=only,
                dtype=dtype,
                config_from=config_from,
                max_shard_size=max_shard_size,
                tensors_only=tensors_only,
                force=force,
                about={"commit": str(commit.id)},
                say=say,
            )

    # -- checkpoints of other tools --------------------------------------------------------------

    def import_run(
        self,
        folder: StrPath,
        *,
        branch: str | None = None,
        dry_run: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> importing.ImportReport:
        """Make a branch of a folder of checkpoints, a commit each, byte-exact, in the order of their steps.

        Hugging Face `checkpoint-500/`, Lightning `epoch=2-step=500.ckpt`, `step_100.pt` and the like
        (docs/concepts: importing a run). Done again, it goes on where it stopped, and takes in what is new.
        The folder is only read.

        Args:
            folder: where the checkpoints are.
            branch: the branch, made if missing; by default called like the folder.
            dry_run: keep nothing: `rehearsed_import` with this handle's compression.
            say: told each checkpoint's name when its turn comes.

        ExistsError if the branch holds anything else; NotFoundError if there is no checkpoint.
        """
        from ckptvcs import importing

        name = branch or importing.branch_for(Path(folder))
        refs.branch_ref(name)
        if dry_run:
            return self.rehearsed_import(folder, compression=self._opened.level, branch=name, say=say)
        return importing.run(self.on(name), self._store.disk, Path(folder), name, say)

    @classmethod
    def rehearsed_import(
        cls,
        folder: StrPath,
        *,
        compression: str | None = None,
        branch: str | None = None,
        scratch: StrPath | None = None,
        say: Callable[[str], None] | None = None,
    ) -> importing.ImportReport:
        """What `import_run` into an empty repository would find and store. Needs no repository.

        The checkpoints are really encoded, into a repository in a temporary folder (below `scratch`, or
        where temporary files go) that is removed at the end; it needs as much room as `stored` says.
        """
        from ckptvcs import importing

        name = branch or importing.branch_for(Path(folder))
        with scratch_folder(None if scratch is None else Path(scratch)) as place:
            with cls.init(place / "rehearsal", compression=compression) as repo:
                report = importing.run(repo.on(name), repo._store.disk, Path(folder), name, say)
        report.rehearsal = True
        report.checkpoints = [dataclasses.replace(each, commit=None) for each in report.checkpoints]
        return report

    # -- refs ------------------------------------------------------------------------------------

    def branch(self, name: str, start: str | ObjectId | Commit = "HEAD") -> ObjectId:
        """Make a branch at a commit, at no cost; returns the commit's id. ExistsError if it is there."""
        return self._new_ref(refs.branch_ref(name), start, f"branch: {name}")

    def fork(
        self,
        rev: str | ObjectId | Commit,
        name: str,
        overrides: Mapping[str, Any] | None = None,
    ) -> Repo:
        """Make a branch at a commit and give a handle on it. No bytes are copied; durable on return.

        Args:
            rev: the fork point.
            name: of the branch; it must not exist.
            overrides: values that `restore` sets anew when it restores the fork point on this branch, such
                as {"optimizer.lr": 3e-4} (docs/concepts: forks). They are recorded with the branch, and in
                the first commit made there. Restoring that commit or a later one sets nothing, so a job
                that is killed and started again is exact.

        ExistsError if the branch is there. Whether the overrides fit is known when a state is restored.
        """
        from ckptvcs.state import overrides as overriding

        ref = refs.branch_ref(name)
        target = self._revisions.resolve(rev)
        wanted = overriding.checked(overrides)
        if not self.record([Move(ref, None, target), Fork(name, target, wanted)], f"fork: {name}"):
            raise ExistsError(f"{name} exists already", hint="choose another name")
        return self.on(name)

    @property
    def overrides(self) -> dict[str, Any]:
        """The overrides that the handle's branch was forked with; empty if it was not forked."""
        self._open()
        fork = self._committer.fork()
        return {} if fork is None else fork[1]

    @property
    def fork_point(self) -> ObjectId | None:
        """The commit that the handle's branch was forked at; None if it was not."""
        self._open()
        fork = self._committer.fork()
        return None if fork is None else fork[0]

    def runs(self) -> list[Run]:
        """The runs on branches that have a status, were forked, or are claimed by a living process."""
        from ckptvcs import runs

        opened = self._open()
        return runs.runs(opened.store, opened.history)

    @property
    def holder(self) -> str | None:
        """The living process that has claimed the handle's branch, or runs a program there, in words."""
        from ckptvcs import runs

        branch = self.branch_name
        return None if branch is None else runs.holder_of(self._store, branch)

    def mark_running(self) -> Claim:
        """Say that this process runs a program on the handle's branch, until the claim is released; the
        branch itself is for the program to claim. LockedError (code 'claimed') if another process does."""
        return self._committer.mark_running()

    def enter_status(self, status: str, info: Mapping[str, Any]) -> None:
        """`set_status` for a program that was run on the branch: claims nothing."""
        self._committer.enter_status(status, info)

    def set_status(self, status: str | None, info: Mapping[str, Any] | None = None) -> None:
        """Say what becomes of the run on this handle's branch: 'running', 'finished', 'failed', or None to
        forget it. 'running' claims the branch. Durable on return.

        `info`: plain values to keep in the reflog beside it, such as {"exit": 1}.
        """
        self._committer.set_status(status, info)

    def reset(
        self,
        rev: str | ObjectId | Commit,
        overrides: Mapping[str, Any] | None = None,
        *,
        force: bool = False,
    ) -> ObjectId:
        """Move the handle's branch to another commit, whatever that is; returns where it was.

        No bytes are copied: the exploit step of population-based training is this and `restore`. The old tip
        stays in the reflog (`BRANCH@{1}`), and is collected after the undo window if nothing else holds it.

        Args:
            rev: the new tip.
            overrides: the branch is a fork from there, as `fork` makes it.
            force: also if another process has claimed the branch.

        The next commit of this handle needs a `restore` first. LockedError (code 'claimed') if another
        process has claimed the branch; ConflictError if it moved meanwhile.
        """
        from ckptvcs.state import overrides as overriding

        target = self._revisions.resolve(rev)
        return self._committer.reset(target, overriding.checked(overrides), force)

    def tag(self, name: str, rev: str | ObjectId | Commit = "HEAD") -> ObjectId:
        """Make a tag at a commit; returns the commit's id. ExistsError if it is there."""
        return self._new_ref(refs.tag_ref(name), rev, f"tag: {name}")

    def _new_ref(self, ref: str, rev: str | ObjectId | Commit, why: str) -> ObjectId:
        target = self._revisions.resolve(rev)
        if not self.record([Move(ref, None, target)], why):
            raise ExistsError(f"{refs.shown(ref)} exists already", hint="choose another name")
        return target

    def pin(self, rev: str | ObjectId | Commit = "HEAD") -> ObjectId:
        """Keep a commit's content whatever a retention policy says, and the commit itself whatever refs are
        deleted, until `unpin`. Returns its id; pinning twice is fine. Durable on return.

        DroppedError if retention took something of it already.
        """
        commit = self.resolve(rev)
        self._drops.check(commit)
        if commit.id not in self.pins():
            self.record([Pin(commit.id, True)], f"pin: {commit.id.short}")
        return commit.id

    def unpin(self, rev: str | ObjectId | Commit = "HEAD") -> ObjectId:
        """Take a pin away; returns the commit's id. NotFoundError if the commit is not pinned."""
        id = self._revisions.resolve(rev)
        if id not in self.pins():
            raise NotFoundError(
                f"the commit {id.short} is not pinned", hint="`ckpt pin --list` lists the pins"
            )
        self.record([Pin(id, False)], f"unpin: {id.short}")
        return id

    def pins(self) -> set[ObjectId]:
        """The pinned commits."""
        with self._store.snapshot() as snapshot:
            return snapshot.pins()

    def branches(self) -> dict[str, ObjectId]:
        """All branches and their tips, in name order."""
        return self._targets(refs.HEADS)

    def tags(self) -> dict[str, ObjectId]:
        """All tags and their commits, in name order."""
        return self._targets(refs.TAGS)

    def lost(self) -> dict[str, ObjectId]:
        """Commits that lost a race, as lost/<branch>/<id8>."""
        return {f"lost/{name}": id for name, id in self._targets(refs.LOST).items()}

    def _targets(self, prefix: str) -> dict[str, ObjectId]:
        with self._store.snapshot() as snapshot:
            return {
                name.removeprefix(prefix): target
                for name, target in snapshot.refs(prefix).items()
                if isinstance(target, ObjectId)
            }

    def delete_branch(self, name: str, force: bool = False) -> ObjectId:
        """Delete a branch; returns where it pointed. `gc` frees what nothing else refers to.

        A commit that lost a race is dismissed as `lost/...`. Without `force`, InvalidError if commits
        would become unreachable. The branch HEAD is on is
        never deleted.
        """
        if isinstance(name, str) and name in self.lost():
            return self._delete_ref(f"refs/{name}", force, "branch")
        return self._delete_ref(refs.branch_ref(name), force, "branch")

    def delete_tag(self, name: str, force: bool = False) -> ObjectId:
        """Delete a tag; like `delete_branch`."""
        return self._delete_ref(refs.tag_ref(name), force, "tag")

    def undelete(self, name: str) -> ObjectId:
        """Bring back a branch, a tag or `lost/...` that was deleted, where it was; returns the commit's id.

        A branch's fork point, overrides and run status come back with it. Durable on return. NotFoundError
        (code "collected") if gc has freed it, ExistsError if there is one of this name again.
        """
        from ckptvcs.history import deleted

        with self._store.snapshot() as snapshot:
            found = deleted.choose(snapshot, name)
        if not self.record(found.operations(), f"undelete {found.what}: {found.name}"):
            raise ExistsError(f"{name} is there again", hint="`ckpt reflog` shows where it stood before")
        return found.commit

    def deleted(self) -> list[Deleted]:
        """Branches, tags and lost commits that were deleted, newest first: those that `undelete` brings back,
        and (not `stored`) those that gc has collected."""
        from ckptvcs.history import deleted

        with self._store.snapshot() as snapshot:
            return deleted.deleted(snapshot)

    def _delete_ref(self, ref: str, force: bool, what: str) -> ObjectId:
        opened = self._open()
        name = refs.shown(ref)
        for _ in range(_RETRIES):
            with opened.store.snapshot() as snapshot:
                targets = snapshot.refs()
            target = targets.pop(ref, None)
            if not isinstance(target, ObjectId):
                raise NotFoundError(f"there is no {what} called {name!r}", hint=f"`ckpt {what}` lists them")
            if targets.get(refs.HEAD) == ref:
                raise InvalidError(
                    f"{name} is the branch HEAD is on", hint="`ckpt switch` to another branch first"
                )
            others = [t for t in targets.values() if isinstance(t, ObjectId)]
            if not force and not any(commit.id == target for commit in opened.history.walk(others)):
                raise InvalidError(
                    f"{name} holds commits that nothing else refers to",
                    hint=f"`ckpt {what} -d --force {name}` (force=True) deletes it all the same",
                    code="unmerged",
                )
            operations: list[Operation] = [Move(ref, target, None)]
            if ref.startswith(refs.HEADS):
                operations += [Fork(name, None, {}), Status(name, None)]
            if opened.store.update(operations, who=self.author, why=f"delete {what}: {name}"):
                return target
        raise ConflictError(f"the {what} {name} keeps moving", hint="stop its writer, then try again")

    def head(self) -> tuple[str | None, ObjectId | None]:
        """The repository's HEAD now: (branch or None when detached, commit or None when unborn)."""
        with self._store.snapshot() as snapshot:
            head = snapshot.ref(refs.HEAD)
            if isinstance(head, ObjectId) or head is None:
                return None, head
            tip = snapshot.ref(head)
        return head.removeprefix(refs.HEADS), tip if isinstance(tip, ObjectId) else None

    def set_head(self, target: str | Commit) -> None:
        """Move the repository's HEAD to a branch (by name) or detach it at a commit. Handles that are
        open stay on their branch."""
        new = target.id if isinstance(target, Commit) else refs.branch_ref(target)
        shown = target.id.short if isinstance(target, Commit) else target
        for _ in range(_RETRIES):
            with self._store.snapshot() as snapshot:
                old = snapshot.ref(refs.HEAD)
            if old == new:
                return
            if self.record([Move(refs.HEAD, old, new)], f"switch: {shown}"):
                return
        raise ConflictError("HEAD keeps moving", hint="try again")

    def reflog(self, n: int | None = None) -> list[LogEntry]:
        """What happened to refs and annotations, newest first; at most `n` entries."""
        with self._store.snapshot() as snapshot:
            entries: list[LogEntry] = []
            for entry in snapshot.log_backwards():
                if n is not None and len(entries) >= n:
                    break
                entries.append(entry)
        return entries

    def record(self, operations: Sequence[Operation], why: str) -> bool:
        """Apply ref moves and annotations together; False if a ref was not where the move expects it."""
        with self._store.operation():
            return self._store.update(operations, who=self.author, why=why) is not None

    # -- maintenance -----------------------------------------------------------------------------

    def gc(self, grace: float | datetime.timedelta | str | None = None, dry_run: bool = False) -> gc.Report:
        """Free what no ref reaches any more. Safe beside writers and readers.

        Args:
            grace: how long things deleted stay recoverable: seconds, a timedelta, '24h'. None takes
                the config's `gc.grace` (24 h). 0 is just as safe.
            dry_run: only tell.
        """
        from ckptvcs.maintenance import gc

        seconds = settings.seconds_of(self.config.get("gc.grace") if grace is None else grace)
        if not dry_run:
            self._open().take_up(_log.warning)
        with self._store.operation():
            report = gc.collect(self._store, grace=seconds, dry_run=dry_run, who=self.author)
        older_than = self.config.get("repack.older-than")
        if older_than is not None and not dry_run:
            with contextlib.suppress(LockedError):  # another collector has come; the next one sees to it
                for problem in self.repack(older_than=older_than).problems:
                    _log.warning("old packs: %s", problem)
        return report

    def repack(
        self,
        *,
        older_than: float | datetime.timedelta | str | None = None,
        dry_run: bool = False,
        smallest: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> repack.Report:
        """Rewrite what is stored so that the newest commits read fastest and packs are few. What would make
        the repository larger, or slower to read, is left alone. Safe beside writers and readers; may be
        interrupted at any time.

        Args:
            older_than: only copy what lives in packs whose files are older than this ('30d') into new ones,
                so that a purge of old files does not take them.
            dry_run: really encode, but write nothing.
            smallest: let commits that are no tips take longer to read, if that saves bytes.
            say: told what is being done, for people who wait.
        """
        from ckptvcs.maintenance import repack

        quiet = say or (lambda _: None)
        with self._store.operation():
            if older_than is None:
                return repack.repack(self._store, dry_run=dry_run, smallest=smallest, say=quiet)
            seconds = settings.seconds_of(older_than)
            return repack.renew(self._store, seconds, dry_run=dry_run, say=quiet)

    def ingest(self, *, retry: bool = False) -> ingesting.Report:
        """Take up the bundles that handles without the index left in `incoming/`: check all their bytes, and
        publish each in one transaction. A commit whose branch has moved meanwhile is kept under `lost/`.

        What is damaged, or builds on what is no longer stored, is put aside in `quarantine/`, with the
        reason; `retry` takes that up once more. LockedError if another process ingests.
        """
        from ckptvcs.maintenance import ingest

        with self._store.operation():
            return ingest.ingest(self._store, retry=retry)

    def retain(
        self,
        branches: str | Sequence[str] | None = None,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: int | None = None,
        metric: str | None = None,
        mode: str | None = None,
        keep_within: float | datetime.timedelta | str | None = None,
        thin: int | None = None,
        drop: str | Sequence[str] = (),
        dry_run: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> retaining.Report:
        """Drop the content of commits that no rule keeps, and free it (docs/concepts: retention).

        Commits themselves stay, with message, metrics and lineage. Tips, tags, lost commits, pins, fork
        points, the best of each line, and what a living claimant restored keep their content in any case.

        Args:
            branches: names or patterns; None for all.
            keep_last: so many newest commits of each branch.
            keep_every: of every so many steps the first commit.
            keep_best: so many best commits by `metric`; `mode` is 'min' or 'max', else what the repository
                knows.
            keep_within: what was made within this span before the branch's tip.
            thin: dense near the tip, ever sparser behind: so many newest commits, then every second of twice
                as many, and so on.
            drop: patterns of components to drop instead of all content, as in 'optimizer/**'.
            dry_run: only tell. What it announces is what a run frees.
            say: told now and then how far it is.

        Without any rule the policies of the config apply. InvalidError if there is none for these branches.
        Durable on return; nothing of it can be undone.
        """
        from ckptvcs.maintenance import retaining, retention

        rules: dict[str, Any] = {"keep_last": keep_last, "keep_every": keep_every, "keep_best": keep_best}
        rules |= {"metric": metric, "mode": mode, "keep_within": keep_within, "thin": thin}
        rules["drop"] = drop or None
        given = {name: value for name, value in rules.items() if value is not None}
        policy = retention.Policy.of(given) if given else None
        if not dry_run:
            self._store.check("write")
        with self._store.operation():
            return retaining.Retention(self._store, self._revisions.mode).run(
                retaining.chooser(branches, policy, self.config),
                grace=settings.seconds_of(self.config.get("gc.grace")),
                who=self.author,
                dry_run=dry_run,
                say=say or (lambda _: None),
            )

    def du(
        self,
        by: str | Sequence[str] = ("branch", "component"),
        rev: str | ObjectId | Commit = "HEAD",
        n: int = 20,
        *,
        say: Callable[[str], None] | None = None,
    ) -> usage.Usage:
        """Who holds the bytes (docs/concepts: bytes).

        Args:
            by: one or several of 'branch', 'component', 'commit' and 'tensor'.
            rev: where the view by commit begins; whose tensors the view by tensor shows.
            n: how many commits, along first parents.
            say: told now and then how far it is.
        """
        from ckptvcs.maintenance import usage

        views = (by,) if isinstance(by, str) else tuple(by)
        for view in views:
            if view not in usage.VIEWS:
                raise InvalidError(f"du cannot show {view!r:.40}", hint=f"choose {', '.join(usage.VIEWS)}")
        one = self.resolve(rev) if {"commit", "tensor"} & set(views) else None
        line = self.log(one, n, first_parent=True) if one is not None and "commit" in views else ()
        return usage.usage(
            self._store,
            grace=settings.seconds_of(self.config.get("gc.grace")),
            by=views,
            commits=[commit.id for commit in line],
            tensors_of=None if one is None else one.id,
            say=say or (lambda _: None),
        )

    def fsck(
        self,
        *,
        full: bool = False,
        rebuild: bool = False,
        quick: bool = False,
        repair: bool = False,
        budget: str | float | None = None,
        say: Callable[[str], None] | None = None,
    ) -> fsck.Report:
        """Check the repository: refs, rows, packs and the ids of all objects. Nothing is deleted.

        Args:
            full: hash every byte.
            quick: only the index, and the sizes and footers of packs.
            budget: besides the default check compare so many stored bytes with their digests ('10GiB', '30m'
                or a number of bytes), from where the last call with a budget stopped.
            repair: mend what can be mended: from other copies of a record, and by copying what is whole out
                of packs that are not. What is not found is marked, and stored again when it is committed
                again. Broken packs move to `quarantine/`.
            rebuild: first make the index anew from packs and journal; no other handle may be open then.
            say: told what is looked at, for people who wait.
        """
        from ckptvcs.maintenance import fsck, scrub

        if full + quick + (budget is not None) > 1:
            raise InvalidError("full, quick and budget exclude each other")
        if quick and repair:
            raise InvalidError("a quick check finds too little to repair", hint="leave out quick")
        wanted = None if budget is None else scrub.budget_of(budget)

        store = self._store
        if rebuild:
            if self._opened.background is not None:
                self._opened.background.close()  # its writer has the repository open
            with self._committer.mutex:
                try:
                    store.rebuilt = store.rebuild()
                except BaseException:
                    with contextlib.suppress(CkptError):  # refused: the handle goes on as before
                        store.reopen()
                    raise
                store.reopen()
        return fsck.check(
            store, full=full, quick=quick, repair=repair, budget=wanted, say=say or (lambda _: None)
        )


def _below(
    reader: Reader, kind: Kind, id: ObjectId, payload: bytes, dropped: tuple[str, ...] | None
) -> Reach:
    """What a commit must reach, for a store that makes its index anew."""
    from ckptvcs.maintenance import reach

    return reach.below(reader, kind, id, payload, dropped)
