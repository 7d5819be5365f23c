"""The commits of a repository in short, as retention and accounting look at them, and the roots above them.

A commit object may be large (its config, its environment); of a long history only this is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ckptvcs.history import refs
from ckptvcs.history.commit import Commit, decode_commit
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.store import Move, Pin, Snapshot, Store

_AT_ONCE: Final = 500


@dataclass(frozen=True, slots=True)
class Point:
    """A commit.

    Attributes:
        before: its parents, and its origin if that is none of them: whatever its object refers to.
        first: its first parent; None for a beginning.
        time: UTC nanoseconds, as recorded.
        metrics: as committed, without notes.
        sizes: logical bytes by component, as committed.
    """

    id: ObjectId
    tree: ObjectId
    before: tuple[ObjectId, ...]
    first: ObjectId | None
    step: int | None
    time: int
    metrics: Mapping[str, Any]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, commit: Commit) -> Point:
        """What is kept of a commit."""
        origin = () if commit.origin is None else (commit.origin,)
        return cls(
            commit.id,
            commit.tree,
            tuple(dict.fromkeys((*commit.parents, *origin))),
            commit.parents[0] if commit.parents else None,
            commit.step,
            commit.time,
            commit.metrics,
            commit.sizes,
        )


@dataclass(slots=True)
class Roots:
    """What keeps commits, from one snapshot.

    Attributes:
        branches: branches and their tips.
        others: what else points at commits, by its name for people: tags, lost commits, a detached HEAD.
        pins: pinned commits.
        forks: where branches were forked, by branch.
        recent: commits that the undo window holds.
        position: of the log then.
    """

    branches: dict[str, ObjectId] = field(default_factory=dict)
    others: dict[str, ObjectId] = field(default_factory=dict)
    pins: frozenset[ObjectId] = frozenset()
    forks: dict[str, ObjectId] = field(default_factory=dict)
    recent: frozenset[ObjectId] = frozenset()
    position: int = 0

    @property
    def firm(self) -> set[ObjectId]:
        """The commits that are kept without the undo window."""
        return {*self.branches.values(), *self.others.values(), *self.pins}


def roots(store: Store, grace: float = 0.0) -> Roots:
    """What keeps commits now; `grace` is the undo window in seconds."""
    found = Roots()
    with store.snapshot() as snapshot:
        found.position = snapshot.position()
        found.pins = frozenset(snapshot.pins())
        for name, target in snapshot.refs().items():
            if isinstance(target, ObjectId):
                if name.startswith(refs.HEADS):
                    found.branches[name.removeprefix(refs.HEADS)] = target
                else:
                    found.others[refs.shown(name)] = target
        for branch in found.branches:
            fork = snapshot.fork(branch)
            if fork is not None:
                found.forks[branch] = fork[0]
        if grace:
            found.recent = frozenset(recent(snapshot, store.disk.now_ns() - int(grace * 10**9)))
    return found


def recent(snapshot: Snapshot, limit: int) -> set[ObjectId]:
    """Commits that log entries no older than `limit` (UTC nanoseconds) name, as far as they are still stored:
    what the undo window holds."""
    found: set[ObjectId] = set()
    for entry in snapshot.log_backwards():
        # Clocks may jump, so every entry is judged by itself; the log is short beside the data.
        if entry.time >= limit:
            for op in entry.operations:
                if isinstance(op, Move):
                    found |= {each for each in (op.old, op.new) if isinstance(each, ObjectId)}
                elif isinstance(op, Pin):
                    found.add(op.commit)
    return {id for id in found if snapshot.row(id) is not None}


class Points:
    """All commits that were asked for so far, by id. They never change, so nothing is read twice."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.of: dict[ObjectId, Point] = {}

    def reach(self, tips: Iterable[ObjectId]) -> set[ObjectId]:
        """Read and return everything that commits reach through parents and origins."""
        found: set[ObjectId] = set()
        waiting = list(tips)
        while waiting:
            batch = list(dict.fromkeys(id for id in waiting if id not in found))
            found.update(batch)
            self._read([id for id in batch if id not in self.of])
            waiting = [before for id in batch for before in self.of[id].before if before not in found]
        return found

    def _read(self, ids: list[ObjectId]) -> None:
        for start in range(0, len(ids), _AT_ONCE):
            part = ids[start : start + _AT_ONCE]
            with self._store.reader() as reader:
                payloads = reader.objects(Kind.COMMIT, part)
            for id, payload in zip(part, payloads, strict=True):
                self.of[id] = Point.of(decode_commit(id, payload))

    def line(self, tip: ObjectId) -> list[Point]:
        """A commit and its first parents, the newest first."""
        self.reach([tip])
        found = []
        current: ObjectId | None = tip
        while current is not None:
            found.append(self.of[current])
            current = found[-1].first
        return found

    def oldest_first(self, ids: set[ObjectId]) -> list[ObjectId]:
        """Commits with all that they reach, each behind what it refers to."""
        ordered: list[ObjectId] = []
        done: set[ObjectId] = set()
        for start in ids:
            stack = [start]
            while stack:
                id = stack[-1]
                if id in done:
                    stack.pop()
                    continue
                missing = [each for each in self.of[id].before if each in ids and each not in done]
                if missing:
                    stack += missing
                else:
                    done.add(id)
                    ordered.append(stack.pop())
        return ordered

    def metrics(self, id: ObjectId, snapshot: Snapshot) -> dict[str, Any]:
        """A commit's metrics with those that notes added or replaced later."""
        return {**self.of[id].metrics, **snapshot.notes(id)}
