"""Lines of commits side by side: where they part, how their configs differ, how their metrics went."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ckptvcs.errors import InvalidError
from ckptvcs.history.commit import Commit, in_float
from ckptvcs.history.graph import History
from ckptvcs.ids import ObjectId


class Line(NamedTuple):
    """What is compared: a name for people, the newest commit, and the commit behind which it begins, if
    that is not the fork point."""

    name: str
    tip: ObjectId
    base: ObjectId | None = None


class Point(NamedTuple):
    """A metric's value in one commit, which may be NaN."""

    commit: ObjectId
    step: int | None
    value: int | float


@dataclass(slots=True)
class Series:
    """One metric along one line, oldest value first.

    Attributes:
        mode: whether less or more is better: 'min', 'max', or None if nobody said.
    """

    points: list[Point]
    mode: str | None

    @property
    def final(self) -> Point:
        """The newest value."""
        return self.points[-1]

    @property
    def best(self) -> Point | None:
        """The best value, of equal ones the oldest; None if all are NaN or if the mode is not known."""
        numbers = [point for point in self.points if not math.isnan(in_float(point.value))]
        if not numbers or self.mode is None:
            return None
        choose = min if self.mode == "min" else max
        return choose(numbers, key=lambda point: point.value)


@dataclass(slots=True)
class Side:
    """One line of a comparison.

    Attributes:
        name: as it was asked for.
        tip: its newest commit.
        base: the commit behind which it begins; None if it begins with a commit without parents.
        commits: how many it has, along first parents.
        config: the tip's config by dotted key.
        overrides: by dotted key what a fork changed, of the newest commit of the line that says so.
        series: by metric, of those that the line's commits record.
    """

    name: str
    tip: Commit
    base: ObjectId | None
    commits: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)


@dataclass(slots=True)
class Comparison:
    """Lines side by side.

    Attributes:
        fork: the newest commit that all of them have; None if their histories are unrelated.
        sides: in the order asked for.
    """

    fork: Commit | None
    sides: list[Side]

    @property
    def differing(self) -> list[str]:
        """The keys of configs that are not the same everywhere, in order of their names."""
        keys = sorted({key for side in self.sides for key in side.config})
        return [key for key in keys if len({_seen(side.config, key) for side in self.sides}) > 1]

    @property
    def metrics(self) -> list[str]:
        """The metrics that any line records, in the order in which they come up."""
        return list(dict.fromkeys(name for side in self.sides for name in side.series))


def scale(found: Comparison, metric: str) -> tuple[float, float]:
    """The least and the greatest finite value of a metric over all lines; (0, 0) if there is none. A line
    that is shown by its tip alone counts only where all are: it would flatten the others."""
    lines = [side for side in found.sides if side.commits] or found.sides
    values = [
        in_float(point.value)
        for side in lines
        if metric in side.series
        for point in side.series[metric].points
        if math.isfinite(in_float(point.value))
    ]
    return min(values, default=0.0), max(values, default=0.0)


def compare(
    history: History,
    lines: Sequence[Line],
    metrics: Callable[[Commit], Mapping[str, Any]],
    mode_of: Callable[[str], str],
) -> Comparison:
    """Compare two lines or more. Reads their commits since the fork point, no content; keeps numbers only.

    A line that has nothing of its own, since another goes on from its tip, is shown by its tip.
    """
    if len(lines) < 2:
        raise InvalidError("there is nothing to compare with", hint="name two branches or more, or a glob")
    forks = history.common_ancestors([line.tip for line in lines])
    fork = forks[0] if forks else None
    sides = [_side(history, line, fork, metrics, mode_of) for line in lines]
    return Comparison(None if fork is None else history.commit(fork), sides)


def _side(
    history: History,
    line: Line,
    fork: ObjectId | None,
    metrics: Callable[[Commit], Mapping[str, Any]],
    mode_of: Callable[[str], str],
) -> Side:
    base = line.base if line.base is not None else fork
    tip = history.commit(line.tip)
    side = Side(line.name, tip, base, config=flat(tip.config))
    for commit in _back_to(history, line.tip, base):
        side.commits += 1
        if not side.overrides:
            side.overrides = flat(commit.overrides)
        for name, value in metrics(commit).items():
            if name not in side.series:
                side.series[name] = Series([], _mode(name, mode_of))
            side.series[name].points.append(Point(commit.id, commit.step, value))
    if not side.commits:
        found = metrics(tip)
        side.series = {
            name: Series([Point(tip.id, tip.step, value)], _mode(name, mode_of))
            for name, value in found.items()
        }
    for series in side.series.values():
        series.points.reverse()
    return side


def _back_to(history: History, tip: ObjectId, base: ObjectId | None) -> Iterator[Commit]:
    """First parents from the tip to above the base. A line that passes the base by ends where it is no longer
    above it."""
    lowest = 0 if base is None else history.rank(base)
    for commit in history.first_parents(tip):
        if commit.id == base or (base is not None and history.rank(commit.id) <= lowest):
            return
        yield commit


def _mode(metric: str, mode_of: Callable[[str], str]) -> str | None:
    try:
        return mode_of(metric)
    except InvalidError:
        return None


def flat(values: Mapping[Any, Any], above: str = "") -> dict[str, Any]:
    """Nested values by dotted key. An empty container and a list are values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def _seen(config: Mapping[str, Any], key: str) -> str | None:
    """What tells a value from another: 1, 1.0 and True are three, and NaN is itself."""
    return repr(config[key]) if key in config else None
