"""A metric along the lines of branches, as curves that share what the branches share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ckptvcs.errors import NotFoundError
from ckptvcs.history.commit import Commit, in_float
from ckptvcs.history.graph import History
from ckptvcs.ids import ObjectId


@dataclass(frozen=True, slots=True)
class Curve:
    """One branch's part.

    Attributes:
        name: the branch.
        points: (x, value) in order. If the branch was forked from one that is drawn before it, the first is
            the point where it leaves that curve. Values may be NaN or infinite.
        forked: whether that is so.
    """

    name: str
    points: tuple[tuple[int, float], ...]
    forked: bool


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves of one metric.

    Attributes:
        by: what x is: 'step', or 'commit' (counted from the beginning of the line) if a commit has no step.
    """

    metric: str
    by: str
    curves: tuple[Curve, ...]


@dataclass(slots=True)
class _Place:
    depth: int
    step: int | None
    value: float


def curves(
    history: History,
    branches: Mapping[str, ObjectId],
    metric: str,
    metrics: Callable[[Commit], Mapping[str, Any]],
) -> Chart:
    """The curves of some branches along first parents, each down to what a branch before it has drawn.

    Branches without the metric are left out. NotFoundError if none has it.
    """
    depths: dict[ObjectId, int] = {}
    last_place: dict[ObjectId, _Place | None] = {}
    found: list[tuple[str, list[_Place], _Place | None]] = []
    names: set[str] = set()
    for name, tip in branches.items():
        own: list[tuple[ObjectId, int | None, float | None]] = []
        base: ObjectId | None = None
        for commit in history.first_parents(tip):
            if commit.id in depths:
                base = commit.id
                break
            known = metrics(commit)
            names.update(known)
            value = known.get(metric)
            own.append((commit.id, commit.step, value if type(value) in (int, float) else None))
        depth = 0 if base is None else depths[base]
        place = anchor = None if base is None else last_place[base]
        places: list[_Place] = []
        for id, step, value in reversed(own):
            depth += 1
            if value is not None:
                place = _Place(depth, step, in_float(value))
                places.append(place)
            depths[id], last_place[id] = depth, place
        found.append((name, places, anchor))
    drawn = [each for each in found if each[1]]
    if not drawn:
        others = ", ".join(sorted(names))
        hint = f"there are {others}" if others else "no commit there records a metric"
        raise NotFoundError(f"no commit there has the metric {metric}", hint=hint)
    by_step = all(place.step is not None for _, places, _ in drawn for place in places)

    def point(place: _Place) -> tuple[int, float]:
        x = place.step if by_step and place.step is not None else place.depth
        return x, place.value

    return Chart(
        metric,
        "step" if by_step else "commit",
        tuple(
            Curve(
                name,
                tuple(map(point, places if anchor is None else [anchor, *places])),
                anchor is not None,
            )
            for name, places, anchor in drawn
        ),
    )
