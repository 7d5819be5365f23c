"""What retention took from commits: reading the drop records, and saying so instead of reading on.

A drop is a fact of the log, not of the disk: what it names counts as gone from the moment it is recorded,
whether or not a collector has come by, and whatever else still holds the same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from ckptvcs.errors import CkptError, CorruptionError, DroppedError, NotFoundError
from ckptvcs.history import refs
from ckptvcs.history.commit import Commit
from ckptvcs.history.graph import History
from ckptvcs.ids import ObjectId
from ckptvcs.state import paths
from ckptvcs.store import Store


class Drops:
    """The drop records of one store."""

    def __init__(self, store: Store, history: History) -> None:
        self._store = store
        self._history = history

    def of(self, commit: ObjectId) -> tuple[str, ...] | None:
        """The components taken from a commit; () if all were, None if none was."""
        with self._store.snapshot() as snapshot:
            return snapshot.drops(commit)

    def check(self, commit: Commit, only: str | Sequence[str] | paths.Selection | None = None) -> None:
        """DroppedError, naming the nearest commit along the line that has it, if something that `only`
        selects (patterns as in `Repo.checkout`; () for nothing in particular) was taken from the commit."""
        taken = self.of(commit.id)
        if taken is None:
            return
        selected = _touched(commit.sizes, only)
        missing = selected if taken == () else tuple(name for name in taken if name in selected)
        if taken and not missing:
            return
        wanted = missing if taken or only is not None else ()
        raise self._refusal(commit, taken, wanted, self.nearest(commit, wanted))

    def explain(
        self, commit: Commit, only: str | Sequence[str] | paths.Selection | None, error: CkptError
    ) -> None:
        """Raise what an error met while reading really is, if it is no damage: something was dropped
        meanwhile, the commit was deleted, or a name was looked for in what had been dropped."""
        with self._store.snapshot() as snapshot:
            gone = snapshot.row(commit.id) is None
            taken = snapshot.drops(commit.id)
            id = error.id if isinstance(error, CorruptionError) else None
            missing = id is not None and snapshot.row(ObjectId.parse(id)) is None
        if gone and isinstance(error, CorruptionError):
            raise NotFoundError(
                f"the commit {commit.id.short} was deleted while it was being read"
            ) from error
        self.check(commit, only)
        if taken and missing:
            raise self._refusal(commit, taken, taken, self.nearest(commit, taken)) from error

    def _refusal(
        self, commit: Commit, taken: tuple[str, ...], wanted: tuple[str, ...], near: Commit | None
    ) -> DroppedError:
        what = f"the {_listed(wanted)} of" if wanted else "the content of"
        if near is None:
            hint = "no commit along its line has it any more"
        else:
            step = "" if near.step is None else f" (step {near.step})"
            hint = f"the nearest along its line that has it is {near.id.short}{step}"
        rest = [name for name in commit.sizes if taken and name and name not in taken]
        if rest:
            hint += f"; only={rest[0] if len(rest) == 1 else rest!r} reads what is left here"
        return DroppedError(
            f"retention took {what} the commit {commit.id.short}; its message and metrics are still there",
            hint=hint,
            commit=str(commit.id),
            names=wanted,
            nearest=None if near is None else str(near.id),
        )

    def nearest(self, commit: Commit, wanted: Sequence[str] = ()) -> Commit | None:
        """The commit with these components (with all its content, without names) that is fewest first
        parents away from this one, before or behind it; of two equally near ones the newer."""
        newer = self._newer(commit.id)
        older = itertools.islice(self._history.first_parents(commit.id), 1, None)
        for pair in itertools.zip_longest(newer, older):
            for each in pair:
                if each is not None and self._has(each, wanted):
                    return each
        return None

    def _has(self, commit: Commit, wanted: Sequence[str]) -> bool:
        taken = self.of(commit.id)
        if taken is None:
            return all(name in commit.sizes for name in wanted)
        return bool(taken and wanted) and all(n in commit.sizes and n not in taken for n in wanted)

    def _newer(self, id: ObjectId) -> list[Commit]:
        """The commits of the line that follow this one, the nearest first; of several lines the first, by
        the name of its ref."""
        with self._store.snapshot() as snapshot:
            found = snapshot.refs(refs.HEADS) | snapshot.refs(refs.LOST) | snapshot.refs(refs.TAGS)
        passed: set[ObjectId] = set()
        for tip in found.values():
            if not isinstance(tip, ObjectId):
                continue
            line: list[Commit] = []
            for commit in self._first_parents(tip, passed):
                if commit.id == id:
                    return line[::-1]
                line.append(commit)
        return []

    def _first_parents(self, tip: ObjectId, passed: set[ObjectId]) -> Iterator[Commit]:
        """A chain down to where an earlier one has passed."""
        for commit in self._history.first_parents(tip):
            if commit.id in passed:
                return
            passed.add(commit.id)
            yield commit


def _touched(
    components: Iterable[str], only: str | Sequence[str] | paths.Selection | None
) -> tuple[str, ...]:
    """Those components in which something may be selected."""
    start = only if isinstance(only, paths.Selection) else paths.Patterns(only).start()
    if start.whole:
        return tuple(components)
    return tuple(
        name
        for name in components
        if (not name and only != ()) or start.step_named(name, paths.key(name)) is not None
    )


def _listed(names: Sequence[str]) -> str:
    if len(names) < 2:
        return names[0] or "rest"
    return f"{', '.join(names[:-1])} and {names[-1]}"
