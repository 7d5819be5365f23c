"""The best commits by a metric, over branches."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ckptvcs.errors import NotFoundError
from ckptvcs.history.commit import Commit, rankable
from ckptvcs.history.graph import History
from ckptvcs.ids import ObjectId


class Best(NamedTuple):
    """A commit that did well.

    Attributes:
        value: its value of the metric, never NaN.
        revision: how to name it: `sweep/lr3e-4~2`, or its id if it is on no branch's line of first parents.
        branch: the first branch on whose line of first parents it is; None if it is on none.
    """

    commit: Commit
    value: int | float
    revision: str
    branch: str | None


def best(
    history: History,
    branches: Mapping[str, ObjectId],
    metric: str,
    mode_of: Callable[[str], str],
    metrics: Callable[[Commit], Mapping[str, Any]],
    count: int,
) -> list[Best]:
    """Up to `count` commits reachable from the branches, the best first.

    NaN never wins. Of equal values the oldest is best: the one of the lowest rank, so that an ancestor comes
    before what was made of it; and of equal ranks the lower id, so that the answer is always the same.

    NotFoundError if no commit has a number by that name; what `mode_of` raises if nobody knows which values
    are better.
    """
    seen_names: set[str] = set()

    def scored() -> Iterator[Best]:
        for branch, back, commit in _named(history, branches):
            found = metrics(commit)
            seen_names.update(found)
            value = rankable(found.get(metric))
            if value is not None:
                revision = commit.id.short if branch is None else f"{branch}~{back}" if back else branch
                yield Best(commit, value, revision, branch)

    candidates = scored()
    first = next(candidates, None)
    if first is None:
        names = ", ".join(sorted(seen_names - {metric}))
        hint = f"there are {names}" if names else "no commit there records another metric"
        raise NotFoundError(f"no commit there has a number for the metric {metric}", hint=hint)
    sign = 1 if mode_of(metric) == "min" else -1
    return heapq.nsmallest(
        count,
        itertools.chain([first], candidates),
        key=lambda each: (sign * each.value, history.rank(each.commit.id), each.commit.id),
    )


def _named(history: History, branches: Mapping[str, ObjectId]) -> Iterator[tuple[str | None, int, Commit]]:
    """Every commit once: those on lines of first parents with branch and distance, then the others."""
    seen: set[ObjectId] = set()
    others: list[ObjectId] = []
    for branch, tip in branches.items():
        for back, commit in enumerate(history.first_parents(tip)):
            if commit.id in seen:
                break
            seen.add(commit.id)
            others += commit.parents[1:]
            yield branch, back, commit
    while others:
        for commit in history.first_parents(others.pop()):
            if commit.id in seen:
                break
            seen.add(commit.id)
            others += commit.parents[1:]
            yield None, 0, commit
