"""What a log tells: which commits, in which order, and how those that are told hang together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

from ckptvcs.errors import InvalidError
from ckptvcs.history.commit import Commit
from ckptvcs.history.filters import Filter
from ckptvcs.history.graph import History
from ckptvcs.history.walk import Visit
from ckptvcs.ids import ObjectId


class Told(NamedTuple):
    """A commit of a log.

    Attributes:
        parents: those of its parents that follow, in the log or hidden.
        shown: False for one that only connects others: it was not asked for.
    """

    commit: Commit
    parents: tuple[ObjectId, ...]
    shown: bool


def told(
    history: History,
    tips: Sequence[ObjectId],
    without: Sequence[ObjectId],
    chosen: Filter,
    metrics: Callable[[Commit], Mapping[str, Any]],
    *,
    most: int | None = None,
    first_parent: bool = False,
    brief: Set[ObjectId] | None = None,
) -> Iterator[Told]:
    """Commits reachable from the tips and not from those `without`, children before parents; at most `most`
    that the filter matches. Nothing is read behind the last of them.

    With `brief`, only commits at which something happens are shown: those where a line ends, begins, parts or
    joins, fresh starts, and the commits that `brief` names.
    """
    if first_parent and len(dict.fromkeys(tips)) != 1:
        raise InvalidError("first_parent follows one revision, not several")
    return _told(history, tips, without, chosen, metrics, most, first_parent, brief)


def _told(
    history: History,
    tips: Sequence[ObjectId],
    without: Sequence[ObjectId],
    chosen: Filter,
    metrics: Callable[[Commit], Mapping[str, Any]],
    most: int | None,
    first_parent: bool,
    brief: Set[ObjectId] | None,
) -> Iterator[Told]:
    if most is not None and most <= 0:
        return
    visits = _line(history, tips[0], without) if first_parent else history.visits(tips, without)
    count = 0
    children: dict[ObjectId, int] = {}
    for commit, parents in visits:
        happens = True
        if brief is not None:
            alone = children.pop(commit.id, 0) == len(parents) == 1
            happens = not alone or commit.fresh_start or commit.id in brief
            for parent in parents:
                children[parent] = children.get(parent, 0) + 1
        shown = happens and chosen.matches(commit, metrics)
        count += shown
        yield Told(commit, parents, shown)
        if count == most:
            return


def _line(history: History, tip: ObjectId, without: Sequence[ObjectId]) -> Iterator[Visit]:
    """First parents alone, down to what is left out."""
    if not without:
        for commit in history.first_parents(tip):
            yield Visit(commit, commit.parents[:1])
        return
    wanted: ObjectId | None = tip
    for commit, parents in history.visits([tip], without):
        if commit.id == wanted:
            below = tuple(parent for parent in commit.parents[:1] if parent in parents)
            yield Visit(commit, below)
            wanted = next(iter(below), None)
        if wanted is None:
            return
