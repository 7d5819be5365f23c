"""Commits on one branch, from where a handle stands: lineage, claims, and saves in the background.

`Repo` has the public methods and their promises; this has what they do.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ckptvcs.disk import StrPath, ThreadLock
from ckptvcs.errors import (
    CkptError,
    ConflictError,
    CorruptionError,
    ExistsError,
    InvalidError,
    LineageError,
    NotFoundError,
)
from ckptvcs.history import commit as commits
from ckptvcs.history import environment, refs
from ckptvcs.history.commit import Commit, CommitReport, Component
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.opened import Opened
from ckptvcs.runs import checked_status, marker
from ckptvcs.store import Claim, Fork, Move, Publication, Status, Writer

if TYPE_CHECKING:
    from ckptvcs.background import PendingCommit
    from ckptvcs.state import tree as state_trees
    from ckptvcs.state.bases import Bases, Held

_log = logging.getLogger("ckptvcs")
_RETRIES: Final = 10


class Beside(NamedTuple):
    """What is entered together with a commit.

    Attributes:
        tags: full names of tags to be made.
        status: what becomes of the run on this branch; None leaves it as it is.
    """

    tags: tuple[str, ...] = ()
    status: str | None = None


class Committer:
    """Where a handle stands on its branch, and the commits it makes there.

    Attributes:
        ref: the branch's full name, born or not; None when HEAD was detached at open.
        tip: the branch's tip as this handle last committed, restored or saw it.
        origin: the commit whose state the handle has; None for a fresh start.
        held: the content of the commit made last, so that its tree need not be read.
        taken: the claim on the branch, held or released; None if there was none.
        pending: the save in flight, or one whose error nobody has asked for.
        applied: a fork point that was restored, and the overrides applied to it; None if there was none.
        closed: True once nothing may be committed any more.
        mutex: held while a commit of this handle is being made, or where it stands changes.
    """

    def __init__(self, opened: Opened, branch: str | None) -> None:
        self.mutex = ThreadLock()
        self.closed = False
        self.applied: tuple[ObjectId, dict[str, Any]] | None = None
        self.origin: ObjectId | None = None
        self.held: tuple[ObjectId, dict[str, Held]] | None = None
        self.taken: Claim | None = None
        self.pending: PendingCommit | None = None
        self.ref: str | None
        self.tip: ObjectId | None
        self._opened = opened
        self._warned = False
        with opened.store.snapshot() as snapshot:
            if branch is not None:
                self.ref = refs.branch_ref(branch)
            else:
                head = snapshot.ref(refs.HEAD)
                self.ref = None if isinstance(head, ObjectId) else head
                self.tip = head if isinstance(head, ObjectId) else None
            if self.ref is not None:
                tip = snapshot.ref(self.ref)
                self.tip = tip if isinstance(tip, ObjectId) else None

    @property
    def branch(self) -> str | None:
        """The branch's name; None when HEAD was detached at open."""
        return None if self.ref is None else self.ref.removeprefix(refs.HEADS)

    def head(self) -> tuple[str | None, ObjectId | None]:
        """The branch and its tip now."""
        if self.ref is None:
            return None, self.tip
        with self._opened.store.snapshot() as snapshot:
            tip = snapshot.ref(self.ref)
        return self.ref, tip if isinstance(tip, ObjectId) else None

    def fork(self) -> tuple[ObjectId, dict[str, Any]] | None:
        """Where the handle's branch was forked, and with which overrides; None if it was not."""
        if self.branch is None:
            return None
        with self._opened.store.snapshot() as snapshot:
            return snapshot.fork(self.branch)

    def stand_at(
        self, commit: ObjectId, tip: ObjectId | None, overrides: Mapping[str, Any] | None = None
    ) -> None:
        """The handle has restored a commit, when the branch was at `tip`; with overrides, a fork point."""
        with self.mutex:
            self.origin = commit
            self.applied = (commit, dict(overrides)) if overrides else None
            # The tip may have moved on meanwhile: then the next commit meets a conflict, as it should.
            if self.ref is not None and commit in (tip, self.head()[1]):
                self.tip = commit

    def stand_for(self, ref: str, tip: ObjectId | None, origin: ObjectId | None, claim: Claim | None) -> None:
        """Commit for another process's handle, from where that one stands."""
        self.ref, self.tip, self.origin, self.taken = ref, tip, origin, claim
        self._warned = True  # that handle did

    def close(self) -> None:
        """Refuse further commits and release the claim. One that another thread is making ends first."""
        with self.mutex:
            self.closed = True
            if self.taken is not None:
                self.taken.release()

    def _open(self) -> Opened:
        if self.closed:
            raise CkptError("this repository handle is closed", code="closed", hint="open it again")
        return self._opened

    def commit(
        self,
        write: Callable[[Writer, Bases], state_trees.Written],
        message: str,
        *,
        step: Any,
        epoch: Any,
        metrics: Mapping[str, Any] | None,
        config: Any,
        circumstances: Mapping[str, Any] | None = None,
        continues: bool = False,
        tags: Sequence[str] = (),
        status: str | None = None,
    ) -> Commit:
        """Store what `write` writes and publish its commit; otherwise `Repo.commit`, `Repo.commit_files`."""
        opened = self._open()
        started = opened.store.disk.seconds()
        self.settle()
        fields = self._fields(message, step, epoch, metrics, config, circumstances)
        beside = self.beside(tags, status)
        with self.mutex, opened.store.operation():
            if continues and self.origin is None:
                self.origin = self.tip
            return self.make(write, fields, started, beside)

    def combine(
        self,
        write: Callable[[Writer, Bases], state_trees.Written],
        message: str,
        first: Commit,
        others: Sequence[ObjectId],
        *,
        step: Any,
        epoch: Any,
        metrics: Mapping[str, Any] | None,
        config: Any,
        circumstances: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
    ) -> Commit:
        """Store what `write` makes of commits, and publish it with `first` and `others` as its parents.
        `first` is the branch's tip, or where a branch that is not born begins.

        The handle's own state is not what is stored, so it stays where it was, and must restore before it
        commits.
        """
        opened = self._open()
        started = opened.store.disk.seconds()
        self.settle()
        fields = self._fields(message, step, epoch, metrics, config, circumstances) | {"overrides": {}}
        beside = self.beside(tags, None)
        with self.mutex, opened.store.operation():
            ref, tip = self.head()
            if ref is None:
                raise _detached()
            if tip is not None and tip != first.id:
                raise LineageError(
                    f"the first commit, {first.id.short}, is not the tip of {self.branch} ({tip.short})",
                    hint="name the branch's tip first, or a branch that begins there: `--branch NAME`",
                )
            stood = self.tip, self.origin
            self.tip, self.origin = tip, first.id
            try:
                return self.make(write, fields, started, beside, others)
            finally:
                self.origin, self.held = stood[1], None
                if self.tip == tip:  # nothing was published
                    self.tip = stood[0]

    def check(self, state: Any, metrics: Mapping[str, Any] | None, config: Any) -> None:
        """`Repo.check_commit`."""
        from ckptvcs.state import tree as state_trees
        from ckptvcs.state.distributed import refuse_on_other_ranks

        refuse_on_other_ranks()
        commits.plain_metrics(metrics)
        commits.plain_config(config)
        store = self._open().store
        store.check("write")
        self.wait()
        with self.mutex:
            self._lineage()
            if self.head()[1] != self.tip:
                raise self._moved()
        state_trees.check(state)

    def claim(self, *, steal: bool) -> Claim:
        """`Repo.claim`."""
        opened = self._open()
        if self.ref is None:
            raise _detached()
        self.wait()  # the save in flight was begun without this claim, and moves the tip
        for _ in range(_RETRIES):
            tip = self.tip if self.origin is not None else self.head()[1]
            claim = opened.store.claim(self.ref, tip, self._holder(), steal=steal)
            if claim is not None:
                with self.mutex:
                    self.tip = tip
                    if self.taken is not None:
                        self.taken.release()
                    self.taken = claim
                return claim
            if self.origin is not None:
                break
        raise self._moved()

    def mark_running(self) -> Claim:
        """`Repo.mark_running`."""
        opened = self._open()
        if self.branch is None:
            raise _detached()
        claim = opened.store.claim(marker(self.branch), None, self._holder())
        assert claim is not None  # nothing can be called so, so there is no tip to differ
        return claim

    def set_status(self, status: str | None, info: Mapping[str, Any] | None) -> None:
        """`Repo.set_status`."""
        if checked_status(status) == "running" and self.claimed is None:
            self.claim(steal=False)
        self.enter_status(status, info or {})

    def enter_status(self, status: str | None, info: Mapping[str, Any]) -> None:
        """`Repo.enter_status`."""
        opened = self._open()
        if self.branch is None:
            raise _detached()
        why = f"run: {self.branch} {status or 'forgotten'}"
        with opened.store.operation():
            opened.store.update([Status(self.branch, status)], who=opened.author, why=why, info=dict(info))

    def reset(self, target: ObjectId, overrides: dict[str, Any], force: bool) -> ObjectId:
        """`Repo.reset`."""
        opened = self._open()
        if self.ref is None or self.branch is None:
            raise _detached()
        self.settle()
        store = opened.store
        with self.mutex, store.operation():
            if self.claimed is None and not force:
                store.refuse_claimed(self.ref)
            _, old = self.head()
            if old is None:
                raise NotFoundError(
                    f"the branch {self.branch} has no commits",
                    hint=f"`ckpt branch {self.branch} REV` makes it",
                )
            fork = Fork(self.branch, target, overrides) if overrides else Fork(self.branch, None, {})
            why = f"reset: {self.branch}"
            if store.update([Move(self.ref, old, target), fork], who=opened.author, why=why) is None:
                raise self._moved()
            self.tip, self.applied = target, None  # its state is still of where it was: restore comes first
        return old

    def _holder(self) -> dict[str, Any]:
        """What a claim says of who holds it."""
        disk = self._opened.store.disk
        return {
            "process": disk.process(),
            "host": disk.host(),
            "job": self._opened.job,
            "author": self._opened.author,
            "origin": None if self.origin is None else str(self.origin),
        }

    @property
    def claimed(self) -> Claim | None:
        """The claim on the branch that this handle holds; None without one."""
        claim = self.taken
        return claim if claim is not None and claim.held else None

    def commit_async(
        self,
        state: Any,
        message: str,
        *,
        step: Any,
        epoch: Any,
        metrics: Mapping[str, Any] | None,
        config: Any,
        files: Mapping[str, StrPath] | None,
        circumstances: Mapping[str, Any] | None,
        when_busy: str,
        frozen: str | Sequence[str],
        quiet: bool,
        tags: Sequence[str],
        status: str | None,
        retain: Mapping[str, Any] | None,
    ) -> PendingCommit:
        """`Repo.commit_async`."""
        opened = self._open()
        store = opened.store
        begun = store.disk.seconds()
        from ckptvcs.maintenance.retention import Policy
        from ckptvcs.state import files as file_trees
        from ckptvcs.state import tree as state_trees
        from ckptvcs.state.distributed import refuse_on_other_ranks
        from ckptvcs.state.paths import matcher

        refuse_on_other_ranks()
        if when_busy not in ("wait", "skip"):
            raise InvalidError(f"when_busy is {when_busy!r}", hint="'wait' or 'skip'")
        fields = self._fields(message, step, epoch, metrics, config, circumstances)
        is_frozen = matcher(frozen) if frozen else None
        policy = None if retain is None else Policy.of(retain).plain()
        store.check("write")

        def prepare() -> tuple[state_trees.Prepared, dict[str, Any]]:
            self._open()  # another thread may have closed it while this one waited for its turn
            self.settle()
            ref, _ = self._lineage()
            beside = self.beside(tags, status)
            claim = self.taken
            if claim is not None:
                claim.check()
            fields["time"] = store.disk.now_ns()
            fields["overrides"] = self._overrides()  # the save that was waited for has moved the origin
            attached = None if files is None else file_trees.attached(store.disk, files)
            return state_trees.prepare(store.grid, state, attached, is_frozen), {
                "folder": str(self._opened.folder),
                "index_free": self._opened.index_free,
                "branch": self.branch,
                "ref": ref,
                "tip": self.tip and bytes(self.tip),
                "origin": self.origin and bytes(self.origin),
                "claim": None if claim is None or claim.released else claim.token,
                "compression": self._opened.level,
                "fields": fields,
                "tags": list(beside.tags),
                "status": beside.status,
                "retain": policy,
            }

        with store.operation():
            if self.pending is not None and self.pending.done():
                self.settle()
            return opened.in_background().save(
                begun,
                when_busy == "wait",
                prepare,
                announce=self._begin,
                deliver=lambda answer: self._delivered(answer, fields),
                quiet=quiet,
            )

    def _begin(self, pending: PendingCommit) -> None:
        self.pending = pending

    def _delivered(self, answer: Mapping[str, Any] | None, fields: Mapping[str, Any]) -> Commit | None:
        """The commit that the writer process made, where this handle stands from now on. Without an
        answer: the one it made before it died, if it did."""
        from ckptvcs.background import commit_of, is_of

        made, problem = None, None
        if answer is not None:
            for problem_text in answer.get("warnings", ()):
                _log.warning("%s", problem_text)
            try:
                made = commit_of(answer, fields)
            except CkptError as error:
                problem = error
        self._opened.store.refresh()
        if made is None:
            # Like `commit` after an interruption: what became durable is where this handle stands.
            _, tip = self.head()
            if tip is not None and tip != self.tip:
                newest = self._opened.history.commit(tip)
                made = newest if is_of(newest, fields) else None
        with self.mutex:
            if made is not None:
                self.tip = self.origin = made.id
        if problem is not None:
            raise problem
        return made

    def wait(self) -> None:
        """Wait for this handle's save in flight, whatever comes of it: it decides where the handle stands."""
        if self.pending is not None:
            self.pending.wait()

    def settle(self) -> None:
        """Wait for this handle's save in flight, and raise what went wrong with it, unless that was done."""
        pending = self.pending
        if pending is not None:
            try:
                pending.surface()
            finally:
                if pending.done():
                    self.pending = None

    def _fields(
        self,
        message: str,
        step: Any,
        epoch: Any,
        metrics: Mapping[str, Any] | None,
        config: Any,
        circumstances: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """What a commit records besides its tree and lineage, checked."""
        if not isinstance(message, str):
            raise InvalidError(f"message must be text, not a {type(message).__name__}")
        return {
            "author": self._opened.author,
            "message": message,
            "step": commits.checked_step(step),
            "epoch": commits.checked_epoch(epoch),
            "metrics": commits.plain_metrics(metrics),
            "config": commits.plain_config(config),
            "overrides": self._overrides(),
            "environment": {
                **(environment.capture() if self._opened.config.get("environment") else {}),
                **commits.plain_config(circumstances, "environment"),
            },
        }

    def beside(self, tags: Sequence[str], status: str | None) -> Beside:
        """What moves together with the branch, checked. A run that says it is running claims its branch: that
        is how others know whether it lives."""
        names = [tags] if isinstance(tags, str) else list(tags)
        full = tuple(dict.fromkeys(refs.tag_ref(name) for name in names))
        with self._opened.store.snapshot() as snapshot:
            for ref in full:
                if snapshot.ref(ref) is not None:
                    raise ExistsError(f"{refs.shown(ref)} exists already", hint="choose another tag")
        checked_status(status)
        if status == "running" and self.claimed is None and self.ref is not None:
            self.claim(steal=False)
        return Beside(full, status)

    def _overrides(self) -> dict[str, Any]:
        """What the next commit records as overridden: only the first one behind a fork point."""
        return self.applied[1] if self.applied is not None and self.applied[0] == self.origin else {}

    def make(
        self,
        write: Callable[[Writer, Bases], state_trees.Written],
        fields: dict[str, Any],
        started: float,
        beside: Beside,
        others: Sequence[ObjectId] = (),
    ) -> Commit:
        """Store a tree and publish its commit, within `Store.operation`. Without a time it is made now.
        `others` are parents besides the first."""
        opened = self._open()
        ref, parents = self._lineage()
        parents = tuple(dict.fromkeys((*parents, *others)))
        if self.taken is not None:
            self.taken.check()  # and again when the refs move; nothing need be hashed to find it gone
        with opened.store.writer(self._opened.level, parents[0] if parents else None) as writer:
            written = write(writer, self._bases(parents))
            if written.kept:
                opened.store.needs_index("take over what other commits hold")
                writer.reuse()  # what was not put here may be gone by the time of publishing
            sizes = written.sizes
            writer.section("")
            fields = {"time": opened.store.disk.now_ns()} | fields
            fields |= {"tree": written.tree, "parents": parents, "origin": self.origin, "sizes": sizes}
            (id,) = writer.put_objects(Kind.COMMIT, [commits.encode_commit(**fields)])
            lost = self._free_lost_name(ref, id)
            stored = sum(tally.stored for tally in writer.tallies.values())
            publication = Publication(
                root=id,
                moves=(Move(ref, self.tip, id), *(Move(tag, None, id) for tag in beside.tags)),
                rescue=Move(lost, None, id),
                require=tuple(dict.fromkeys((*parents, *filter(None, [self.origin])))),
                time=fields["time"],
                who=fields["author"],
                why=f"commit: {_shortened(fields['message'])}".rstrip(": "),
                info={"given": sum(sizes.values()), "stored": stored},
                claim=self.taken,
                annotations=()
                if beside.status is None
                else (Status(ref.removeprefix(refs.HEADS), beside.status),),
            )
            won = False
            try:
                won = writer.publish(publication)
            finally:
                # Also after an interruption: what became durable is where this handle stands.
                with contextlib.suppress(CkptError):
                    if won or self.head()[1] == id:
                        self.tip = self.origin = id
                        self.held = id, written.held
            tallies = writer.tallies
        opened.store.catch_up_journal()
        opened.merge_small_packs()
        if not won:
            raise self._lost_race(ref, lost, beside)
        components = {}
        for name, size in sizes.items():
            tally = tallies.get(name)
            reused = written.kept.get(name, 0) + (tally.reused if tally is not None else 0)
            components[name] = Component(
                given=size,
                new=size - reused,
                reused=reused,
                stored=tally.stored if tally is not None else 0,
            )
        report = CommitReport(
            given=sum(sizes.values()),
            new=sum(each.new for each in components.values()),
            reused=sum(each.reused for each in components.values()),
            stored=stored,
            seconds=opened.store.disk.seconds() - started,
            components=components,
        )
        return Commit(id=id, report=report, **fields)

    def _bases(self, parents: Sequence[ObjectId]) -> Bases:
        """What the new commit may be stored as a difference to: its first parent's content."""
        from ckptvcs.state import tree as state_trees
        from ckptvcs.state.bases import Bases

        if not parents:
            return Bases(dict)
        if self.held is not None and self.held[0] == parents[0]:
            held = self.held[1]
            return Bases(lambda: held)

        def load() -> dict[str, Held]:
            try:
                with self._opened.store.reader() as reader:
                    return state_trees.held(reader, self._opened.history.commit(parents[0]).tree)
            except (CorruptionError, NotFoundError):
                with self._opened.store.snapshot() as snapshot:
                    dropped = snapshot.drops(parents[0]) is not None
                if not dropped:
                    raise
                return {}  # retention took it, since this handle restored it perhaps

        return Bases(load)

    def _free_lost_name(self, ref: str, id: ObjectId) -> str:
        """Where the commit goes if it loses its race: 8 digits of its id, more if those are taken."""
        place = f"{refs.LOST}{ref.removeprefix(refs.HEADS)}/"
        with self._opened.store.snapshot() as snapshot:
            taken = snapshot.ref(place + id.short) is not None
        return place + (str(id)[:32] if taken else id.short)

    def _lineage(self) -> tuple[str, tuple[ObjectId, ...]]:
        """The ref to move and the new commit's parents; refuses what would record a false parent."""
        if self.ref is None:
            raise _detached()
        branch = self.branch
        if self.tip is None:
            return self.ref, () if self.origin is None else (self.origin,)
        if self.origin is None and not self._warned:
            self._warned = True
            _log.warning(
                "committing to %s, which has commits, without having restored one: "
                "the log will show a fresh start",
                branch,
            )
        if self.origin is not None and self.origin != self.tip:
            raise LineageError(
                f"this handle restored {self.origin.short}, which is not the tip of {branch} "
                f"({self.tip.short}), so a commit there would have a false parent",
                hint=f"work on a branch of its own: Repo.open(branch='NAME'), or "
                f"`ckpt branch NAME {self.origin.short}`; `ckpt fork` does both",
            )
        return self.ref, (self.tip,)

    def _moved(self) -> ConflictError:
        return ConflictError(
            f"somebody else moved the branch {self.branch} since this handle saw it",
            hint="restore its tip and go on from there, or work on a branch of its own",
        )

    def _lost_race(self, ref: str, lost: str, beside: Beside) -> ConflictError:
        branch, kept = refs.shown(ref), refs.shown(lost)
        if self.head()[1] == self.tip and beside.tags:
            return ConflictError(
                f"somebody else made the tag {refs.shown(beside.tags[0])} meanwhile; "
                f"the commit is kept as {kept}",
                hint="commit again without the tag",
                rescued=kept,
            )
        return ConflictError(
            f"somebody else moved the branch {branch} since this handle saw it; the commit is kept as {kept}",
            hint=f"`ckpt branch NAME {kept}` makes it a branch of its own",
            rescued=kept,
        )


def _detached() -> LineageError:
    return LineageError(
        "HEAD is detached, so there is no branch to commit to",
        hint="open the repository with branch=..., or `ckpt switch BRANCH`",
    )


def _shortened(message: str) -> str:
    """A message's first line as the log keeps it."""
    title = message.split("\n", 1)[0].strip()
    return title if len(title) <= 100 else f"{title[:99]}…"
