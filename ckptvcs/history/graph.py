"""Walking commits: reading them, first-parent chains, and whole histories in topological order.

Order comes from the graph alone; clocks never decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from ckptvcs.history.commit import Commit, decode_commit
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.store import Store

_REMEMBERED: Final = 4096


class History:
    """Commits of one store, read on demand and remembered (they never change)."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[ObjectId, Commit] = {}

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

    def walk(self, tips: Iterable[ObjectId]) -> Iterator[Commit]:
        """Every commit reachable from the tips, children before parents, a line of work kept together.

        A single line is streamed, so that the first page of a long history comes at once.
        """
        waiting = list(dict.fromkeys(tips))
        while len(waiting) == 1:
            commit = self.commit(waiting[0])
            yield commit
            waiting = list(commit.parents)
        if waiting:
            yield from self._topological(waiting)

    def _topological(self, tips: list[ObjectId]) -> Iterator[Commit]:
        # Depth first from the last tip to the first; the reversed order of finishing puts children
        # before parents and the first tip's line on top.
        finished: list[Commit] = []
        seen: set[ObjectId] = set()
        for tip in reversed(tips):
            stack: list[tuple[Commit, int]] = []
            if tip not in seen:
                seen.add(tip)
                stack.append((self.commit(tip), 0))
            while stack:
                commit, done = stack.pop()
                # Other parents first, so that the first parent's line ends up right below the child.
                parents = commit.parents[::-1]
                if done < len(parents):
                    stack.append((commit, done + 1))
                    if parents[done] not in seen:
                        seen.add(parents[done])
                        stack.append((self.commit(parents[done]), 0))
                else:
                    finished.append(commit)
        yield from reversed(finished)

    def is_ancestor(self, older: ObjectId, newer: ObjectId) -> bool:
        """Whether `older` is `newer` or can be reached from it through parents."""
        return any(commit.id == older for commit in self.walk([newer]))
