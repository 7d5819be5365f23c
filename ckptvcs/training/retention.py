"""Which commits of a line a policy keeps. Pure: nothing here deletes anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ckptvcs.errors import InvalidError
from ckptvcs.history.commit import Commit
from ckptvcs.ids import ObjectId


def checked_count(value: Any, name: str) -> int | None:
    """A number of commits to keep, from 1 up, or None. 0 is refused: it reads as 'no limit' to some and as
    'delete all' to others."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidError(f"{name} cannot be {value!r:.40}", hint="a number from 1 up, or None for no limit")
    return value


def kept(
    line: Sequence[Commit],
    *,
    last: int | None = None,
    best: int | None = None,
    score: Callable[[Commit], float | None] | None = None,
) -> set[ObjectId]:
    """The commits that a policy keeps of a line of commits.

    The line is ordered from the newest to the oldest by its parents; neither clocks nor step numbers decide.
    A commit is kept if it is

    - among the first `last`;
    - among the `best` with the lowest score; of equals, the oldest;
    - without a score (None or NaN) while `best` is given: that policy cannot judge it.

    Without `last` and `best` all are kept.
    """
    if last is None and best is None:
        return {commit.id for commit in line}
    found = {commit.id for commit in line[: last or 0]}
    if best is not None and score is not None:
        scored: list[tuple[float, ObjectId]] = []
        for commit in reversed(line):
            value = score(commit)
            if value is None or math.isnan(value):
                found.add(commit.id)
            else:
                scored.append((value, commit.id))
        found.update(id for _, id in sorted(scored, key=lambda pair: pair[0])[:best])
    return found


def score_by(
    metric: str, mode: str, metrics: Callable[[Commit], Mapping[str, Any]]
) -> Callable[[Commit], float | None]:
    """A score that is lower the better: the metric's value, turned round if large is better."""
    sign = 1 if mode == "min" else -1

    def score(commit: Commit) -> float | None:
        value = metrics(commit).get(metric)
        return sign * value if isinstance(value, (int, float)) else None

    return score
