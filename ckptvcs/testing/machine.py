"""A model of a repository: what it must hold after any sequence of operations, in plain dicts.

Each method does one thing to the real repository and to the model, and fails where the two disagree.
`check` compares everything. The Hypothesis state machine of the tests drives it; anything else may.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ckptvcs.errors import CkptError, ConflictError, ExistsError, InvalidError, LineageError, NotFoundError
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.repo import Repo
from ckptvcs.testing.same import difference


@dataclass(frozen=True, slots=True)
class Known:
    """What the model remembers of a commit."""

    state: Any
    parents: tuple[ObjectId, ...]
    origin: ObjectId | None
    message: str


@dataclass(slots=True)
class Handle:
    """An open handle with what it must know of its branch: the tip it saw, and what it restored."""

    repo: Repo
    branch: str
    tip: ObjectId | None
    origin: ObjectId | None = None


class Model:
    """A repository and what it must hold.

    Attributes:
        branches, tags, lost: where refs must point.
        commits: every commit ever made, by id.
        stored: those that must still be stored.
        handles: the open handles; the first owns the others.
    """

    def __init__(self, place: str) -> None:
        """Make an empty repository in the folder `place`."""
        self.place = place
        self.branches: dict[str, ObjectId] = {}
        self.tags: dict[str, ObjectId] = {}
        self.lost: dict[str, ObjectId] = {}
        self.commits: dict[ObjectId, Known] = {}
        self.stored: set[ObjectId] = set()
        self.handles = [Handle(Repo.init(place), "main", None)]
        self.head = "main"

    @property
    def repo(self) -> Repo:
        """The first handle."""
        return self.handles[0].repo

    def roots(self) -> set[ObjectId]:
        """Every commit a ref points at."""
        return {*self.branches.values(), *self.tags.values(), *self.lost.values()}

    def reachable(self) -> set[ObjectId]:
        """Every commit below the roots."""
        found: set[ObjectId] = set()
        waiting = list(self.roots())
        while waiting:
            id = waiting.pop()
            if id not in found:
                found.add(id)
                known = self.commits[id]
                waiting += [*known.parents, *filter(None, [known.origin])]
        return found

    # -- operations ------------------------------------------------------------------------------

    def open(self, branch: str) -> None:
        """A second handle."""
        self.handles.append(Handle(self.repo.on(branch), branch, self.branches.get(branch)))

    def commit(self, handle: Handle, state: Any, message: str) -> str:
        """Commit; gives 'won', 'lost', 'refused' or 'orphaned', whichever the rules demand."""
        if handle.tip is None:
            parents = () if handle.origin is None else (handle.origin,)
        elif handle.origin is not None and handle.origin != handle.tip:
            _must_raise(LineageError, lambda: handle.repo.commit(state, message))
            return "refused"
        else:
            parents = (handle.tip,)
        current = self.branches.get(handle.branch)
        won = current == handle.tip
        needed = {*parents, *filter(None, [handle.origin])} - ({current} if won else set())
        if not needed <= self.stored:
            _must_raise(NotFoundError, lambda: handle.repo.commit(state, message))
            return "orphaned"
        if won:
            made = handle.repo.commit(state, message)
            _same("parents", made.parents, parents)
            _same("origin", made.origin, handle.origin)
            report = made.report
            assert report is not None
            _same("given", report.given, report.new + report.reused)
            self._remember(made.id, state, parents, handle.origin, message)
            self.branches[handle.branch] = handle.tip = handle.origin = made.id
            return "won"
        error = _must_raise(ConflictError, lambda: handle.repo.commit(state, message))
        assert not isinstance(error, LineageError), error
        assert error.rescued is not None
        id = self.repo.resolve(error.rescued).id
        _same("rescued", error.rescued, f"lost/{handle.branch}/{id.short}")
        self._remember(id, state, parents, handle.origin, message)
        self.lost[error.rescued] = id
        return "lost"

    def _remember(
        self,
        id: ObjectId,
        state: Any,
        parents: tuple[ObjectId, ...],
        origin: ObjectId | None,
        message: str,
    ) -> None:
        assert id not in self.commits, f"{id} was made twice"
        self.commits[id] = Known(state, parents, origin, message)
        self.stored.add(id)

    def restore(self, handle: Handle, id: ObjectId | None) -> None:
        """Restore a commit, or the branch's tip, into a blank state of its layout."""
        current = self.branches.get(handle.branch)
        wanted = current if id is None else id
        if wanted is None:
            assert not handle.repo.restore({"untouched": 1}), "an unborn branch restored something"
            return
        into = blank(self.commits[wanted].state)
        if wanted not in self.stored:
            _must_raise(NotFoundError, lambda: handle.repo.restore(into, wanted))
            return
        restored = handle.repo.restore(into, id)
        assert restored.commit is not None
        _same("restored", restored.commit.id, wanted)
        _exact(into, self.commits[wanted].state)
        handle.origin = wanted
        if current == wanted:
            handle.tip = wanted

    def branch(self, name: str, id: ObjectId) -> None:
        """Make a branch."""
        self._point(self.repo.branch, self.branches, name, id)

    def tag(self, name: str, id: ObjectId) -> None:
        """Make a tag."""
        self._point(self.repo.tag, self.tags, name, id)

    def _point(
        self,
        make: Callable[[str, ObjectId], object],
        refs: dict[str, ObjectId],
        name: str,
        id: ObjectId,
    ) -> None:
        if id not in self.stored:
            _must_raise(NotFoundError, lambda: make(name, id))
        elif name in refs:
            _must_raise(ExistsError, lambda: make(name, id))
        else:
            make(name, id)
            refs[name] = id

    def delete(self, name: str, *, tag: bool, force: bool) -> None:
        """Delete a branch or a tag."""
        refs = self.tags if tag else self.branches
        delete = self.repo.delete_tag if tag else self.repo.delete_branch
        if name not in refs:
            _must_raise(NotFoundError, lambda: delete(name, force))
            return
        if not tag and name == self.head:
            _must_raise(InvalidError, lambda: delete(name, force))
            return
        target = refs.pop(name)
        if not force and target not in self.reachable():
            refs[name] = target
            error = _must_raise(InvalidError, lambda: delete(name, force))
            _same("code", error.code, "unmerged")
            return
        _same("deleted", delete(name, force), target)

    def switch(self, branch: str) -> None:
        """Move HEAD to a branch."""
        self.repo.set_head(branch)
        self.head = branch

    def collect(self, *, grace: float | None) -> int:
        """Collect garbage; what a dry run announced must be what happened. Gives the bytes freed."""
        before = self._pack_bytes()
        announced = self.repo.gc(grace, dry_run=True)
        _same("bytes after a dry run", self._pack_bytes(), before)
        done = self.repo.gc(grace)
        _same("announced", announced, replace(done, dry_run=True))
        _same("shrinkage", before - self._pack_bytes(), done.disk)
        _same("problems", done.problems, [])
        if grace == 0:
            self.stored = self.reachable()
            _same("held", done.held, 0)
        else:
            _same("freed inside the undo window", done.freed, 0)
        return done.freed

    def _pack_bytes(self) -> int:
        total = 0
        for part in ("packs", "tmp"):
            for folder, _, files in os.walk(os.path.join(self.place, ".ckpt", part)):
                total += sum(os.path.getsize(os.path.join(folder, file)) for file in files)
        return total

    def reopen(self, *, rebuild: str | None = None) -> None:
        """Close everything and open again; `rebuild` by 'deleting' the index or by 'asking'."""
        log = [(entry.position, entry.why, entry.operations) for entry in self.repo.reflog()]
        self.repo.close()
        if rebuild == "deleting":
            shutil.rmtree(os.path.join(self.place, ".ckpt", "meta"))
        said: list[str] = []
        opened = Repo.open(self.place, rebuild=rebuild == "asking", say=said.append)
        _same("said", len(said), 1 if rebuild == "deleting" else 0)
        self.handles = [Handle(opened, self.head, self.branches.get(self.head))]
        _same("branch at open", opened.branch_name, self.head)
        _same("log", [(entry.position, entry.why, entry.operations) for entry in opened.reflog()], log)

    # -- comparing -------------------------------------------------------------------------------

    def check(self, *, full: bool = False) -> None:
        """Compare refs, states, lineage and the set of stored commits; run fsck."""
        repo = self.repo
        _same("branches", repo.branches(), dict(sorted(self.branches.items())))
        _same("tags", repo.tags(), dict(sorted(self.tags.items())))
        _same("lost", repo.lost(), dict(sorted(self.lost.items())))
        _same("HEAD", repo.head(), (self.head, self.branches.get(self.head)))
        for id in self.roots():
            _exact(repo.checkout(id), self.commits[id].state)
            self._check_log(id)
        report = repo.fsck(full=full)
        assert report.ok, report.problems
        _same("commits stored", self._stored(), self.stored)

    def _check_log(self, tip: ObjectId) -> None:
        seen: list[ObjectId] = []
        for commit in self.repo.log(tip):
            known = self.commits[commit.id]
            _same("parents", commit.parents, known.parents)
            _same("origin", commit.origin, known.origin)
            _same("message", commit.message, known.message)
            assert not set(known.parents) & set(seen), "a parent came before its child"
            seen.append(commit.id)
        below: set[ObjectId] = set()
        waiting = [tip]
        while waiting:
            id = waiting.pop()
            if id not in below:
                below.add(id)
                waiting += self.commits[id].parents
        _same("log", sorted(seen), sorted(below))

    def _stored(self) -> set[ObjectId]:
        with self.repo._store.snapshot() as snapshot:
            return {id for id, row in snapshot.rows_from(b"", 1 << 30) if row.kind is Kind.COMMIT}

    def close(self) -> None:
        """Close the repository."""
        self.repo.close()


def blank(state: Any) -> Any:
    """A state of the same layout with other content."""
    if isinstance(state, dict):
        return {key: blank(value) for key, value in state.items()}
    if isinstance(state, list):
        return [blank(value) for value in state]
    if isinstance(state, np.ndarray):
        return np.zeros_like(state)
    return None


def _must_raise(kind: type[Any], call: Callable[[], object]) -> Any:
    try:
        call()
    except CkptError as error:
        if isinstance(error, kind):
            return error
        raise AssertionError(f"{type(error).__name__} where {kind.__name__} belongs: {error}") from error
    raise AssertionError(f"{kind.__name__} was not raised")


def _same(what: str, found: Any, expected: Any) -> None:
    assert found == expected, f"{what}: {found!r}, expected {expected!r}"


def _exact(found: Any, expected: Any) -> None:
    wrong = difference(expected, found)
    assert wrong is None, wrong
