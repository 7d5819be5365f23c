"""The order of a log: children before parents, lines of work kept together, nothing read ahead of need.

A commit may be told as soon as all its children in the walk have been. Whether it has another child is known
once every commit of a higher rank has been looked at (`store.index.Snapshot.rank`: a child's rank is above
its parents'). So before a commit is told, the walk looks ahead, in order of rank, down to that commit's rank
and no further: a page of *n* commits of a history with *b* branches reads some *n* × *b* commits at most.

Lines of work: a commit and its first parents down to where another line goes on. The walk begins at the tip
of the highest rank and stays on a line until a commit there waits for a child in another line. Then that line
is next, whichever it is; so side branches come right above the commit they were forked from, and a graph
of many branches stays narrow. This is what git does with generation numbers (`git log --topo-order` with a
commit-graph), except for the choice of the next line.

Memory: ids, ranks and lines of commits that were looked at and not told yet. Commits themselves are not kept.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ckptvcs.history.commit import Commit
from ckptvcs.ids import ObjectId


class Visit(NamedTuple):
    """A commit in a walk, with those of its parents that the walk comes to later."""

    commit: Commit
    parents: tuple[ObjectId, ...]


class Walk:
    """All commits reachable from some tips and not from others. Iterate once."""

    def __init__(
        self,
        commit: Callable[[ObjectId], Commit],
        rank: Callable[[ObjectId], int],
        tips: Sequence[ObjectId],
        without: Sequence[ObjectId] = (),
    ) -> None:
        """`commit` reads one; `rank` gives a number that is higher for a child than for its parents."""
        self._commit = commit
        self._rank = rank
        self._tips = list(dict.fromkeys(tips))
        self._without = set(without)
        # Not looked at yet, highest rank first.
        self._ahead: list[tuple[int, int, ObjectId]] = []
        self._counter = 0
        # Of commits that were met and not told: their line, and the lines of children that come first.
        self._line: dict[ObjectId, ObjectId] = {}
        self._waits: dict[ObjectId, list[ObjectId]] = {}
        self._left_out: set[ObjectId] = set()
        # Where each line goes on, by the commit it began with.
        self._front: dict[ObjectId, ObjectId] = {}

    def __iter__(self) -> Iterator[Visit]:
        for id in self._without:
            self._meet(id, id)
            self._left_out.add(id)
        for id in self._tips:
            self._meet(id, id)
        ready = sorted(self._tips, key=self._rank, reverse=True)[::-1]  # the last one is next
        while ready:
            found = self._unblocked(ready[-1])
            if found is None:
                ready.pop()
                continue
            id = found
            if id == ready[-1]:
                ready.pop()
            commit = self._commit(id)
            self._look_ahead(self._rank(id) - 1)
            if self._without:
                # Which parents are left out is known once nothing above them is left to look at.
                for parent in commit.parents:
                    self._look_ahead(self._rank(parent) - 1)
            parents = tuple(p for p in dict.fromkeys(commit.parents) if p in self._waits)
            line = self._line.pop(id)
            del self._waits[id]
            self._front.pop(line, None)
            if parents and self._line[parents[0]] == line:
                self._front[line] = parents[0]
            yield Visit(commit, parents)
            for parent in reversed(parents):
                self._waits[parent].remove(line)
                if not self._waits[parent]:
                    ready.append(parent)

    def _unblocked(self, id: ObjectId) -> ObjectId | None:
        """The commit itself if all its children were told, else the one that must be told first on the way
        there; None if the commit was told already, or is left out."""
        if id not in self._waits:
            return None
        self._look_ahead(self._rank(id))
        while id in self._waits and (lines := self._waits[id]):
            # The child lies in that line, behind what the line has next; and that has a higher rank.
            id = self._front[lines[0]]
        return id if id in self._waits and id not in self._left_out else None

    def _look_ahead(self, rank: int) -> None:
        """Look at every commit of a higher rank than this."""
        while self._ahead and -self._ahead[0][0] > rank:
            _, _, id = heapq.heappop(self._ahead)
            commit = self._commit(id)
            if id in self._left_out:
                for parent in commit.parents:
                    self._meet(parent, parent)
                    self._left_out.add(parent)
                self._forget(id)
                continue
            line = self._line[id]
            for place, parent in enumerate(dict.fromkeys(commit.parents)):
                self._meet(parent, line if place == 0 else parent)
                self._waits[parent].append(line)

    def _meet(self, id: ObjectId, line: ObjectId) -> None:
        if id in self._waits:
            return
        heapq.heappush(self._ahead, (-self._rank(id), self._counter, id))
        self._counter += 1
        self._line[id], self._waits[id] = line, []
        self._front.setdefault(line, id)

    def _forget(self, id: ObjectId) -> None:
        """A commit that is left out will not be told."""
        line = self._line.pop(id)
        del self._waits[id]
        self._left_out.discard(id)
        if self._front.get(line) == id:
            del self._front[line]
