"""How two sets of tensors and values differ: what came, went or was reshaped, and how far numbers moved.

Tensors are read in pieces, first to compare bytes; only where these differ are numbers looked at. What
differs is counted by bits (so -0.0 is not 0.0, and a NaN equals itself); distances are computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ckptvcs.errors import FormatError
from ckptvcs.state.checkpoint import Checkpoint, Dense, Read
from ckptvcs.state.formats.layout import Plain
from ckptvcs.state.tensors import numpy_dtype

_PIECE: Final = 1 << 22
"""Bytes read at a time of each side. As float64 a piece of float8 takes eight times that."""

ORDER: Final = ("reshaped", "cast", "removed", "new", "changed", "value", "file")
"""Kinds of change, the gravest first."""


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT: Final = _Absent()
"""Stands for a value that one side does not have; None is a value."""


@dataclass(frozen=True, slots=True)
class Distance:
    """How far the numbers of a tensor moved.

    Attributes:
        changed: part of the elements whose bits differ, 0 to 1. After a cast, of those whose value does.
        largest: the largest absolute difference among finite numbers.
        relative: the Euclidean norm of the difference over that of the old tensor, finite numbers only; inf
            if the old one is all zero.
        not_finite: elements that differ where one side is infinite or no number, left out of both.
    """

    changed: float
    largest: float
    relative: float
    not_finite: int


@dataclass(frozen=True, slots=True)
class Change:
    """A path at which two sides differ.

    Attributes:
        kind: one of `ORDER`.
        path: where.
        old, new: the tensor or file on each side, None where there is none; or the value, or `ABSENT`.
        distance: for numbers of one shape; else None.
    """

    kind: str
    path: str
    old: Dense | Plain | _Absent
    new: Dense | Plain | _Absent
    distance: Distance | None = None


@dataclass(slots=True)
class Comparison:
    """All that differs, the gravest first, and how many tensors and values are equal."""

    changes: list[Change]
    equal: int
    equal_values: int


def compare(old: Checkpoint, new: Checkpoint, say: Callable[[str], None] | None = None) -> Comparison:
    """Compare two checkpoints by path. `say` is told each tensor's path."""
    changes: list[Change] = []
    equal = 0
    for path in old.tensors | new.tensors:
        if say is not None:
            say(path)
        before, after = old.tensors.get(path), new.tensors.get(path)
        if before is None or after is None:
            changes.append(Change("new" if before is None else "removed", path, before, after))
        elif before.shape != after.shape:
            changes.append(Change("reshaped", path, before, after))
        elif before.dtype != after.dtype:
            changes.append(Change("cast", path, before, after, _distance(before, after)))
        elif _same_bytes(before, after):
            equal += 1
        else:
            changes.append(Change("changed", path, before, after, _distance(before, after)))
    values = _values(old.leaves, new.leaves)
    changes += values
    for name in old.others | new.others:
        before, after = old.others.get(name), new.others.get(name)
        if before is None or after is None or not _same_bytes(before, after):
            changes.append(Change("file", name, before, after))
    changes.sort(key=_gravity)
    together = len(old.leaves | new.leaves)
    return Comparison(changes, equal, together - len(values))


def _values(old: Mapping[str, Plain], new: Mapping[str, Plain]) -> list[Change]:
    both = dict.fromkeys((*old, *new))
    sides = ((path, old.get(path, ABSENT), new.get(path, ABSENT)) for path in both)
    return [Change("value", path, one, other) for path, one, other in sides if not _same(one, other)]


def _same(one: object, other: object) -> bool:
    if type(one) is float and type(other) is float:
        return one == other or (math.isnan(one) and math.isnan(other))
    return type(one) is type(other) and one == other


def _gravity(change: Change) -> tuple[int, float]:
    moved = 0.0 if change.distance is None else change.distance.relative
    if change.distance is not None and (change.distance.not_finite or math.isnan(moved)):
        moved = math.inf  # numbers that became NaN are what people look for
    return ORDER.index(change.kind), -moved


def _pieces(nbytes: int, item: int) -> Iterator[tuple[int, int]]:
    step = max(1, _PIECE // item) * item
    for start in range(0, nbytes, step):
        yield start, min(step, nbytes - start)


def _same_bytes(old: Dense, new: Dense) -> bool:
    if old.nbytes != new.nbytes:
        return False
    one, other = old.opened(), new.opened()
    return all(
        memoryview(one(start, length)) == memoryview(other(start, length))
        for start, length in _pieces(old.nbytes, old.item)
    )


# -- numbers -----------------------------------------------------------------------------------------


def _distance(old: Dense, new: Dense) -> Distance | None:
    """None where a side's elements are no numbers that can be computed with."""
    one, other = numbers(old), numbers(new)
    if one is None or other is None:
        return None
    total = math.prod(old.shape)
    changed = not_finite = 0
    largest = squares = norm = 0.0
    step = max(1, _PIECE // max(old.item, new.item))
    for start in range(0, total, step):
        count = min(step, total - start)
        a, a_bits = one(start, count)
        b, b_bits = other(start, count)
        differs = a != b
        if a_bits.dtype == b_bits.dtype and old.dtype == new.dtype:
            differs = a_bits != b_bits
            if differs.ndim > 1:
                differs = differs.any(axis=1)
        else:
            differs &= ~(np.isnan(a) & np.isnan(b))
        changed += int(np.count_nonzero(differs))
        finite = np.isfinite(a) & np.isfinite(b)
        not_finite += int(np.count_nonzero(differs & ~finite))
        a, b = np.where(finite, a, 0), np.where(finite, b, 0)
        with np.errstate(over="ignore"):
            moved, size = np.abs(b - a), np.abs(a)
            squares += float(np.dot(moved, moved))
            norm += float(np.dot(size, size))
        largest = max(largest, float(moved.max(initial=0.0)))
    if norm:
        relative = math.sqrt(squares / norm)
    else:
        relative = math.inf if squares else 0.0
    return Distance(changed / total if total else 0.0, largest, relative, not_finite)


_Numbers = Callable[[int, int], tuple[Any, Any]]


def numbers(tensor: Dense) -> _Numbers | None:
    """A function of (first element, count): the elements in float64 (or complex128), and their bits."""
    try:
        dtype = numpy_dtype(tensor.dtype)
        wide = np.complex128 if tensor.dtype.startswith("complex") else np.float64
        np.zeros(1, dtype).astype(wide)
    except (FormatError, TypeError, ValueError):
        return None
    if dtype.kind in "SUmM" or tensor.dtype == "complex32":
        return None
    # Wider elements as rows of words.
    word = min(tensor.item, 8)
    read: Read = tensor.opened()

    def read_numbers(start: int, count: int) -> tuple[Any, Any]:
        data = read(start * tensor.item, count * tensor.item)
        with np.errstate(invalid="ignore", over="ignore"):
            bits = np.frombuffer(data, np.dtype(f"u{word}"))
            if word != tensor.item:
                bits = bits.reshape(count, -1)
            return np.frombuffer(data, dtype).astype(wide), bits

    return read_numbers
