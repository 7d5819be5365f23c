"""How two sets of tensors and values differ: what came, went or was reshaped, and how far numbers moved.

Tensors of commits are compared by the ids of their chunks, and only chunks that differ are read; of files,
bytes are compared first, in pieces. Only what differs is looked at as numbers (`distance`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from ckptvcs.state.checkpoint import Checkpoint, Dense
from ckptvcs.state.distance import Distance, Measure, widening
from ckptvcs.state.formats.layout import Plain

_PIECE: Final = 1 << 22
"""Bytes of each side compared at a time."""

_NUMBERS: Final = 1 << 16
"""Elements computed with at a time, as float64: few enough to stay in a processor's cache."""

_READ: Final = 1 << 24
"""Bytes read at a time of each side, if they lie in chunks: enough for several threads."""

ORDER: Final = (
    "reshaped", "cast", "removed", "new", "changed", "layout", "type", "value", "file",
)  # fmt: skip
"""Kinds of change, the gravest first."""


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT: Final = _Absent()
"""Stands for a value that one side does not have; None is a value."""


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value of a commit that JSON has no word for.

    Attributes:
        kind: the word for it, as `ls` has it.
        identity: what is equal for equal values.
        text: a short text.
    """

    kind: str
    identity: object
    text: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and (self.kind, self.identity) == (other.kind, other.identity)

    def __hash__(self) -> int:
        return hash((self.kind, self.identity))

    def __repr__(self) -> str:
        return self.text


Value: TypeAlias = "Plain | Opaque"


@dataclass(frozen=True, slots=True)
class Change:
    """A path at which two sides differ.

    Attributes:
        kind: one of `ORDER`.
        path: where.
        old, new: the tensor or file on each side, None where there is none; or the value, or `ABSENT`.
        distance: for numbers of one shape; else None.
        parameter: the parameter that an optimizer's entry belongs to, where it is known, else "".
    """

    kind: str
    path: str
    old: Dense | Value | _Absent
    new: Dense | Value | _Absent
    distance: Distance | None = None
    parameter: str = ""


@dataclass(slots=True)
class Comparison:
    """All that differs, the gravest first, and how many tensors and values are equal."""

    changes: list[Change]
    equal: int
    equal_values: int


def compare(
    old: Checkpoint, new: Checkpoint, say: Callable[[str], None] | None = None, *, norms: bool = False
) -> Comparison:
    """Compare two sides by path. `say` is told each tensor's path.

    `norms`: of tensors that differ in part, chunks that are equal are read as well, once (`distance`).
    """
    changes: list[Change] = []
    equal = 0
    for path in {**old.tensors, **new.tensors}:
        if say is not None:
            say(path)
        before, after = old.tensors.get(path), new.tensors.get(path)
        parameter = next((each.parameter for each in (after, before) if each and each.parameter), "")
        distance = None
        if before is None or after is None:
            kind = "new" if before is None else "removed"
        elif before.shape != after.shape:
            kind = "reshaped"
        elif before.dtype != after.dtype:
            kind, distance = "cast", _distance(before, after, _all(before), [])
        else:
            differing, same = _runs(before, after)
            if differing:
                kind = "changed"
                distance = _distance(before, after, differing, same if norms else [])
            elif before.layout and after.layout and before.layout != after.layout:
                kind = "layout"
            else:
                equal += 1
                continue
        changes.append(Change(kind, path, before, after, distance, parameter))
    values = _values(old.leaves, new.leaves)
    changes += values
    for name in {**old.others, **new.others}:
        before, after = old.others.get(name), new.others.get(name)
        if (
            before is None
            or after is None
            or (before.layout and after.layout and before.layout != after.layout)
            or before.nbytes != after.nbytes
            or _runs(before, after)[0]
        ):
            changes.append(Change("file", name, before, after))
    together = len(old.leaves | new.leaves)
    return Comparison(arranged(changes), equal, together - len(values))


def arranged(changes: list[Change]) -> list[Change]:
    """Changes with the gravest first."""
    return sorted(changes, key=_gravity)


def _values(old: Mapping[str, Value], new: Mapping[str, Value]) -> list[Change]:
    both = dict.fromkeys((*old, *new))
    sides = ((path, old.get(path, ABSENT), new.get(path, ABSENT)) for path in both)
    return [Change("value", path, one, other) for path, one, other in sides if not same_value(one, other)]


def same_value(one: object, other: object) -> bool:
    """Whether two values are equal: of the same type, and a NaN equals itself."""
    if type(one) is float and type(other) is float:
        return (one == other and math.copysign(1, one) == math.copysign(1, other)) or (
            math.isnan(one) and math.isnan(other)
        )
    return type(one) is type(other) and one == other


def _gravity(change: Change) -> tuple[int, float]:
    moved = 0.0 if change.distance is None else change.distance.relative
    if change.distance is not None and (change.distance.not_finite or math.isnan(moved)):
        moved = math.inf  # numbers that became NaN are what people look for
    return ORDER.index(change.kind), -moved


# -- which bytes differ --------------------------------------------------------------------------------

_Run: TypeAlias = tuple[int, int]
"""Bytes [start, stop) of a tensor."""


def _all(tensor: Dense) -> list[_Run]:
    return [(0, tensor.nbytes)] if tensor.nbytes else []


def _runs(old: Dense, new: Dense) -> tuple[list[_Run], list[_Run]]:
    """Where two tensors of one size may differ, and where they are equal."""
    if old.identity is not None and old.identity == new.identity:
        return [], _all(old)
    if old.cells is None or new.cells is None or old.cell != new.cell:
        return (_all(old), []) if not _same_bytes(old, new) else ([], _all(old))
    found: tuple[list[_Run], list[_Run]] = ([], [])
    for at, (one, other) in enumerate(zip(old.cells(), new.cells(), strict=True)):
        runs = found[one == other]
        start, stop = at * old.cell, min((at + 1) * old.cell, old.nbytes)
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, stop))
    return found


def _same_bytes(old: Dense, new: Dense) -> bool:
    one, other = old.opened(), new.opened()
    step = max(1, _PIECE // old.item) * old.item
    return all(
        memoryview(one(start, length)) == memoryview(other(start, length))
        for start in range(0, old.nbytes, step)
        for length in [min(step, old.nbytes - start)]
    )


# -- numbers -------------------------------------------------------------------------------------------


def _distance(old: Dense, new: Dense, differing: list[_Run], equal: list[_Run]) -> Distance | None:
    """None where a side's elements are no numbers that can be computed with."""
    one, other = widening(old.dtype, old.item), widening(new.dtype, new.item)
    if one is None or other is None:
        return None
    measure = Measure(math.prod(old.shape), old.dtype == new.dtype)
    spans = [(start // old.item, stop // old.item) for start, stop in differing]
    for before, after in zip(_pieces(old, spans), _pieces(new, spans), strict=True):
        measure.add(one(before), other(after))
    for both in _pieces(old, [(start // old.item, stop // old.item) for start, stop in equal]):
        measure.add_equal(one(both))
    return measure.distance()


def _pieces(tensor: Dense, spans: list[_Run]) -> Iterator[memoryview]:
    """The bytes of elements [start, stop) of each span, `_NUMBERS` elements at a time."""
    item, read, step = tensor.item, tensor.opened(), _NUMBERS
    ahead = max(1, (_PIECE if tensor.cells is None else _READ) // (step * item)) * step
    for first, last in spans:
        for at in range(first, last, ahead):
            until = min(at + ahead, last)
            data = memoryview(read(at * item, (until - at) * item))
            for piece in range(0, until - at, step):
                yield data[piece * item : min(piece + step, until - at) * item]
