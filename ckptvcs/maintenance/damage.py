"""What damage costs: from damaged records up to the tensors, commits and refs that need them.

Each object is looked into once, whatever the number of commits: an object is *hurt* by the causes of damage
below it, and that is remembered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from ckptvcs.errors import CkptError, CorruptionError
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.maintenance import reach
from ckptvcs.state import tree as trees
from ckptvcs.store import Reader, Store
from ckptvcs.store.format import MAX_DEPTH

_NOTHING: Final[frozenset[str]] = frozenset()


@dataclass(slots=True)
class Hurt:
    """What one cause of damage makes unreadable.

    Attributes:
        commits: that cannot be restored whole; in the order in which they were met.
        tensors: paths of what in them is unreadable, each with one of those commits.
        refs: above those commits.
    """

    commits: dict[ObjectId, None] = field(default_factory=dict)
    tensors: dict[str, ObjectId] = field(default_factory=dict)
    refs: dict[str, None] = field(default_factory=dict)


class Survey:
    """Follows refs down to what is damaged. `bad` gives the cause for each record known to be unreadable;
    what is missing is added to it, as a cause of its own.

    Attributes:
        hurt: what each cause makes unreadable, if anything.
    """

    def __init__(self, store: Store, bad: dict[ObjectId, CkptError]) -> None:
        self._store = store
        self._bad = bad
        self._sound: set[ObjectId] = set()
        self._hurt: dict[ObjectId, frozenset[str]] = {}
        self._gathered: dict[ObjectId, set[str]] = {}
        self.hurt: dict[str, Hurt] = {}

    def follow(self, tips: Mapping[str, ObjectId]) -> None:
        """Look into all that the refs reach."""
        children: dict[ObjectId, list[ObjectId]] = {}
        harmed: dict[ObjectId, frozenset[str]] = {}
        with self._store.reader() as reader:
            seen: set[ObjectId] = set()
            waiting = list(dict.fromkeys(tips.values()))
            while waiting:
                commit = waiting.pop()
                if commit in seen:
                    continue
                seen.add(commit)
                parents, content, causes = self._commit(reader, commit)
                for parent in parents:
                    children.setdefault(parent, []).append(commit)
                    waiting.append(parent)
                causes |= self._causes_below(reader, content)
                if causes:
                    harmed[commit] = causes
            for commit, causes in harmed.items():
                for cause in causes:
                    self.hurt.setdefault(cause, Hurt()).commits[commit] = None
            for cause, found in self.hurt.items():
                above = _above(found.commits, children)
                found.refs.update((name, None) for name, tip in tips.items() if tip in above)
                self._name_tensors(reader, cause, found)

    def _row_causes(self, id: ObjectId) -> frozenset[str]:
        """Why a record itself, or one that it is a difference against, cannot be read. What has no row is
        noted as missing."""
        causes = set()
        current: ObjectId | None = id
        for _ in range(MAX_DEPTH + 1):
            if current is None:
                break
            row = None
            try:
                with self._store.snapshot() as snapshot:
                    row = snapshot.row(current)
            except CorruptionError as error:
                self._bad.setdefault(current, error)
            if row is None and current not in self._bad:
                self._bad[current] = CorruptionError(
                    f"{current.short} is referred to but missing", id=str(current)
                )
            if current in self._bad:
                causes.add(str(self._bad[current]))
            current = None if row is None else row.base
        return frozenset(causes)

    def _commit(
        self, reader: Reader, commit: ObjectId
    ) -> tuple[list[ObjectId], list[tuple[Kind, ObjectId]], frozenset[str]]:
        """The parents of a commit, its content, and what is wrong with itself."""
        causes = self._row_causes(commit)
        try:
            with self._store.snapshot() as snapshot:
                dropped = snapshot.drops(commit)
            payload = reader.objects(Kind.COMMIT, [commit])[0]
            found = reach.below(reader, Kind.COMMIT, commit, payload, dropped)
        except CkptError as error:
            return [], [], causes | self._told(error, commit)
        parents = [id for kind, id in found.whole if kind is Kind.COMMIT]
        for tree in found.alone:
            causes |= self._row_causes(tree)
        return parents, [each for each in found.whole if each[0] is not Kind.COMMIT], causes

    def _told(self, error: CkptError, id: ObjectId) -> frozenset[str]:
        """The cause that an error of reading names. What was collected meanwhile is none."""
        if isinstance(error, CorruptionError):
            with contextlib.suppress(CkptError):
                at = ObjectId.parse(error.id) if error.id else id
                return frozenset({str(self._bad.setdefault(at, error))})
        return frozenset({str(self._bad[id])}) if id in self._bad else _NOTHING

    def _causes_below(self, reader: Reader, roots: Iterable[tuple[Kind, ObjectId]]) -> frozenset[str]:
        """What hurts any of these records, or anything below them. Depth first, without recursion."""
        result: set[str] = set()
        stack: list[tuple[Kind, ObjectId, list[tuple[Kind, ObjectId]] | None, set[str]]] = [
            (kind, id, None, result) for kind, id in roots
        ]
        while stack:
            kind, id, below, into = stack.pop()
            if id in self._sound:
                continue
            if id in self._hurt:
                into |= self._hurt[id]
                continue
            if below is not None:  # all below it is known now
                causes = frozenset(self._gathered.pop(id))
                if causes:
                    self._hurt[id] = causes
                    into |= causes
                else:
                    self._sound.add(id)
                continue
            causes = self._row_causes(id)
            references: list[tuple[Kind, ObjectId]] = []
            if kind is not Kind.CHUNK and not causes:
                try:
                    payload = reader.objects(kind, [id])[0]
                    references = list(reach.below(reader, kind, id, payload).whole)
                except CkptError as error:
                    causes = self._told(error, id)
            if not references:
                if causes:
                    self._hurt[id] = causes
                    into |= causes
                else:
                    self._sound.add(id)
                continue
            mine = self._gathered.setdefault(id, set(causes))
            stack.append((kind, id, references, into))
            stack += [(child_kind, child, None, mine) for child_kind, child in references]
        return frozenset(result)

    def _name_tensors(self, reader: Reader, cause: str, found: Hurt) -> None:
        seen: set[ObjectId] = set()
        for commit in found.commits:
            with contextlib.suppress(CkptError):
                payload = reader.objects(Kind.COMMIT, [commit])[0]
                below = reach.below(reader, Kind.COMMIT, commit, payload)
                for kind, tree in below.whole:
                    if kind is not Kind.TREE or tree in seen:
                        continue
                    seen.add(tree)
                    for path, held in trees.held(reader, tree).items():
                        if any(cause in self._hurt.get(chunk, _NOTHING) for chunk in held.chunks):
                            found.tensors.setdefault(path, commit)


def _above(commits: Collection[ObjectId], children: Mapping[ObjectId, list[ObjectId]]) -> set[ObjectId]:
    """The commits and all that descend from them."""
    found = set(commits)
    waiting = list(commits)
    while waiting:
        for child in children.get(waiting.pop(), ()):
            if child not in found:
                found.add(child)
                waiting.append(child)
    return found
