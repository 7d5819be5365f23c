"""Walking commits: reading them, first-parent chains, and whole histories in topological order.

Order comes from the graph alone; clocks never decide.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Final

from ckptvcs.history.commit import Commit, decode_commit
from ckptvcs.history.walk import Visit, Walk
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.store import Store

_REMEMBERED: Final = 4096
_REMEMBERED_RANKS: Final = 1 << 16


class History:
    """Commits of one store, read on demand and remembered (they never change)."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[ObjectId, Commit] = {}
        self._ranks: dict[ObjectId, int] = {}

    def commit(self, id: ObjectId) -> Commit:
        """The commit with this id. CorruptionError if it is not stored."""
        return self.commits([id])[0]

    def commits(self, ids: Sequence[ObjectId]) -> list[Commit]:
        """Several commits at once."""
        # Handles in several threads share this memory without a lock: nothing is ever taken out of a
        # dict that others may be reading.
        found = {id: self._seen.get(id) for id in ids}
        missing = [id for id, commit in found.items() if commit is None]
        fresh: dict[ObjectId, Commit] = {}
        if missing:
            with self._store.reader() as reader:
                payloads = reader.objects(Kind.COMMIT, missing)
            fresh = {id: decode_commit(id, data) for id, data in zip(missing, payloads, strict=True)}
            if len(self._seen) + len(fresh) > _REMEMBERED:
                self._seen = dict(list(fresh.items())[-_REMEMBERED:])
            else:
                self._seen.update(fresh)
        return [found[id] or fresh[id] for id in ids]

    def first_parents(self, tip: ObjectId) -> Iterator[Commit]:
        """The chain from `tip` down along first parents."""
        current: ObjectId | None = tip
        while current is not None:
            commit = self.commit(current)
            yield commit
            current = commit.parents[0] if commit.parents else None

    def walk(self, tips: Iterable[ObjectId], without: Iterable[ObjectId] = ()) -> Iterator[Commit]:
        """Every commit reachable from the tips and not from those `without`, children before parents, a line
        of work kept together (`history.walk`)."""
        for commit, _ in self.visits(tips, without):
            yield commit

    def visits(self, tips: Iterable[ObjectId], without: Iterable[ObjectId] = ()) -> Iterator[Visit]:
        """Like `walk`, each commit with those of its parents that follow."""
        waiting, left_out = list(dict.fromkeys(tips)), list(without)
        # A single line needs no ranks.
        while len(waiting) == 1 and not left_out:
            commit = self.commit(waiting[0])
            waiting = list(dict.fromkeys(commit.parents))
            yield Visit(commit, tuple(waiting))
        if waiting:
            yield from Walk(self.commit, self.rank, waiting, left_out)

    def rank(self, id: ObjectId) -> int:
        """A number that is higher for a commit than for all that it refers to (`store.index.Snapshot.rank`).

        Noted when a commit is made; for one from before that was so, found out by reading all below it, and
        noted then.
        """
        found = self._ranks.get(id)
        if found is None:
            with self._store.snapshot() as snapshot:
                found = snapshot.rank(id)
            if found is None:
                found = self._count_ranks(id)
            self._remember_rank(id, found)
        return found

    def _remember_rank(self, id: ObjectId, rank: int) -> None:
        if len(self._ranks) >= _REMEMBERED_RANKS:
            self._ranks = {}
        self._ranks[id] = rank

    def _count_ranks(self, top: ObjectId) -> int:
        known: dict[ObjectId, int] = {}
        counted: list[tuple[ObjectId, list[ObjectId]]] = []
        stack = [top]
        while stack:
            id = stack[-1]
            if id in known:
                stack.pop()
                continue
            commit = self.commit(id)
            below = list(dict.fromkeys(each for each in (*commit.parents, commit.origin) if each))
            with self._store.snapshot() as snapshot:
                noted = {each: snapshot.rank(each) for each in below if each not in known}
            known |= {each: rank for each, rank in noted.items() if rank is not None}
            missing = [each for each in below if each not in known]
            if not missing:
                known[id] = 1 + max((known[each] for each in below), default=0)
                counted.append((id, below))
            stack += missing
        self._store.note_ranks(counted)
        return known[top]

    def is_ancestor(self, older: ObjectId, newer: ObjectId) -> bool:
        """Whether `older` is `newer` or can be reached from it through parents."""
        return older in self.ancestors_among([newer], {older})

    def ancestors_among(self, tips: Iterable[ObjectId], wanted: Set[ObjectId]) -> set[ObjectId]:
        """Those of `wanted` that are a tip or below one. Reads nothing whose rank is too low."""
        found: set[ObjectId] = set()
        waiting = [(-self.rank(id), id) for id in dict.fromkeys(tips)]
        heapq.heapify(waiting)
        seen = {id for _, id in waiting}
        lowest = min((self.rank(id) for id in wanted), default=0)
        while waiting and len(found) < len(wanted):
            rank, id = heapq.heappop(waiting)
            if -rank < lowest:
                break
            if id in wanted:
                found.add(id)
            for parent in self.commit(id).parents:
                if parent not in seen:
                    seen.add(parent)
                    heapq.heappush(waiting, (-self.rank(parent), parent))
        return found

    def common_ancestors(self, tips: Sequence[ObjectId]) -> list[ObjectId]:
        """The best commits that are ancestors of all the tips, or one of them: none of them is an ancestor of
        another. One for a fork, several after criss-cross merges, none for unrelated histories. Highest rank
        first."""
        every = (1 << len(tips)) - 1
        reached: dict[ObjectId, int] = {}
        stale: set[ObjectId] = set()
        waiting: list[tuple[int, ObjectId]] = []

        def meet(id: ObjectId, mark: int, old: bool) -> None:
            if id not in reached:
                heapq.heappush(waiting, (-self.rank(id), id))
            reached[id] = reached.get(id, 0) | mark
            if old:
                stale.add(id)

        for place, id in enumerate(tips):
            meet(id, 1 << place, False)
        best: list[ObjectId] = []
        # In order of rank: all children of a commit were here before it.
        while any(id not in stale for _, id in waiting):
            _, id = heapq.heappop(waiting)
            mark, old = reached.pop(id), id in stale
            if mark == every and not old:
                best.append(id)
            for parent in self.commit(id).parents:
                meet(parent, mark, old or mark == every)
            stale.discard(id)
        return best
