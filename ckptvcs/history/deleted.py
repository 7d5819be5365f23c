"""Refs that were deleted, found in the log: what can be brought back, and how."""

from __future__ import annotations

from dataclasses import dataclass

from ckptvcs.errors import AmbiguousError, ExistsError, NotFoundError
from ckptvcs.history import refs
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.store import Fork, LogEntry, Move, Operation, Snapshot, Status


@dataclass(frozen=True, slots=True)
class Deleted:
    """A branch, a tag or a lost commit that was deleted.

    Attributes:
        ref, name: in full, and as people write it.
        commit: where it was.
        time: of the deletion, UTC nanoseconds.
        stored: whether that commit is still there; if not, gc collected it.
        beside: what the log said of it besides, to be said again.
    """

    ref: str
    name: str
    commit: ObjectId
    time: int
    stored: bool
    beside: tuple[Operation, ...] = ()

    @property
    def what(self) -> str:
        """The word for it."""
        kinds = {refs.HEADS: "branch", refs.TAGS: "tag"}
        return next((word for prefix, word in kinds.items() if self.ref.startswith(prefix)), "lost commit")

    def operations(self) -> list[Operation]:
        """What brings it back."""
        return [Move(self.ref, None, self.commit), *self.beside]


def deleted(snapshot: Snapshot) -> list[Deleted]:
    """The last deletion of each ref that is not there now, newest first."""
    there = snapshot.refs()
    found: dict[str, tuple[LogEntry, ObjectId]] = {}
    beside: dict[str, dict[type, Operation]] = {}
    for entry in snapshot.log_backwards():
        for op in entry.operations:
            if isinstance(op, Move) and op.new is None and isinstance(op.old, ObjectId):
                if op.name.startswith("refs/") and op.name not in there:
                    found.setdefault(op.name, (entry, op.old))
            elif isinstance(op, (Fork, Status)):
                # A branch's deletion takes these away too; what was said before it is said again.
                known = found.get(refs.HEADS + op.branch)
                if known is not None and known[0] is not entry:
                    beside.setdefault(refs.HEADS + op.branch, {}).setdefault(type(op), op)
    return [
        Deleted(
            ref,
            refs.shown(ref),
            commit,
            entry.time,
            _is_stored(snapshot, commit),
            _again(beside.get(ref, {})),
        )
        for ref, (entry, commit) in found.items()
    ]


def _again(said: dict[type, Operation]) -> tuple[Operation, ...]:
    """Whatever the run was, it does not run any more."""
    return tuple(
        op
        for op in said.values()
        if (isinstance(op, Fork) and op.commit is not None)
        or (isinstance(op, Status) and op.status not in (None, "running"))
    )


def _is_stored(snapshot: Snapshot, commit: ObjectId) -> bool:
    row = snapshot.live(commit)
    return row is not None and row.kind is Kind.COMMIT


def choose(snapshot: Snapshot, name: str) -> Deleted:
    """The deleted ref that a name means: a branch, a tag, `lost/...`, or a ref's full name.

    Raises:
        NotFoundError: nothing of this name was deleted, or gc collected it.
        ExistsError: there is one of this name again.
        AmbiguousError: a branch and a tag of this name were deleted.
    """
    known = [each for each in deleted(snapshot) if name in (each.name, each.ref)]
    if not known:
        for ref in (refs.HEADS + name, refs.TAGS + name, f"refs/{name}", name):
            if snapshot.ref(ref) is not None:
                raise ExistsError(f"{name} is there", hint="`ckpt reflog` shows where it stood before")
        raise NotFoundError(
            f"nothing called {name!r} was deleted", hint="`ckpt undelete` lists what can be brought back"
        )
    stored = [each for each in known if each.stored]
    if not stored:
        raise NotFoundError(
            f"{name} was at {known[0].commit.short}, which gc has collected",
            hint="gc keeps what was deleted within gc.grace (24h), unless it is called with --grace 0",
            code="collected",
        )
    if len(stored) > 1:
        raise AmbiguousError(
            f"{name} was a {' and a '.join(each.what for each in stored)}",
            hint=f"say `ckpt undelete {stored[0].ref}`",
        )
    return stored[0]
