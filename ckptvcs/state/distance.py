"""How far the numbers of a tensor moved, in float64.

Of the old numbers a and the new ones b, over the elements where both are finite:

    largest   max |b_i - a_i|
    l2        |b - a|, where |x| = sqrt(sum |x_i|^2)
    relative  |b - a| / |a|; inf if only a is zero
    cosine    Re <a, b> / (|a| |b|); nan if either is zero

Numbers are widened to float64 (complex128), which is exact for all dtypes but 64-bit integers; of these the
difference is taken before it is rounded. Sums are taken piece by piece, in order. What would overflow or
vanish when it is squared is scaled by a power of two first, so results are right over the whole range of
float64, to the rounding of its sums. What differs is counted by bits, so -0.0 is not 0.0, and a NaN equals
itself.

Elements that are equal on both sides add nothing to a difference. Where they were not read, |a| and |b| are
known without them only: then `relative` is an upper bound, and `cosine` unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from ckptvcs.errors import FormatError
from ckptvcs.ids import Buffer
from ckptvcs.state.tensors import numpy_dtype

_LARGE: Final = 2.0**480
_SMALL: Final = 2.0**-480
"""Between these, squares of float64 and sums of 2^60 of them neither overflow nor vanish."""

_TINY: Final = 2.0**-1000
"""Products and ratios above it have all their digits."""

_DOWN: Final = -700
_UP: Final = 600
"""Powers of two by which numbers beyond are scaled; even."""

_Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True, slots=True)
class Distance:
    """How far the numbers of a tensor moved; formulas above.

    Attributes:
        changed: part of the elements whose bits differ, 0 to 1. After a cast, of those whose value does.
        largest: the largest absolute difference among finite numbers.
        relative: the norm of the difference over that of the old tensor; an upper bound unless `whole`.
        not_finite: elements that differ where one side is infinite or no number, left out of the rest.
        l2: the norm of the difference.
        cosine: between old and new tensor; None unless `whole`, nan if one of them is zero.
        whole: whether equal parts were read as well, which norms take.
    """

    changed: float
    largest: float
    relative: float
    not_finite: int
    l2: float
    cosine: float | None
    whole: bool


class Numbers(NamedTuple):
    """Elements of a tensor: in float64 or complex128, and their bits as words (of wide ones rows of them)."""

    wide: _Array
    bits: _Array
    exact: bool
    """Whether `wide` is exact; else `bits` are 64-bit integers of the type of the tensor."""


def widening(dtype: str, item: int) -> Callable[[Buffer], Numbers] | None:
    """Reads the numbers of little-endian bytes; None for a dtype that cannot be computed with."""
    try:
        kind = numpy_dtype(dtype)
        wide = np.complex128 if dtype.startswith("complex") else np.float64
        np.zeros(1, kind).astype(wide)
    except (FormatError, TypeError, ValueError):
        return None
    if kind.kind in "SUmM" or dtype == "complex32":
        return None
    word = min(item, 8)
    exact = dtype not in ("int64", "uint64")

    def read(data: Buffer) -> Numbers:
        with np.errstate(invalid="ignore", over="ignore"):
            bits = np.frombuffer(data, np.dtype(f"u{word}") if exact else kind)
            if word != item:
                bits = bits.reshape(-1, item // word)
            return Numbers(np.frombuffer(data, kind).astype(wide), bits, exact)

    return read


class _Sum:
    """A sum, as a float times a power of two, for numbers that float64 has no room for."""

    __slots__ = ("power", "total")

    def __init__(self) -> None:
        self.total, self.power = 0.0, 0

    def add(self, total: float, power: int) -> None:
        if not total:
            return
        if not self.total or power > self.power:
            self.total, self.power = (math.ldexp(self.total, self.power - power) if self.total else 0), power
        self.total += math.ldexp(total, power - self.power)


class Measure:
    """Takes in numbers of two tensors, piece by piece, and says how far apart they are."""

    def __init__(self, total: int, same_dtype: bool) -> None:
        """`total` elements in all; `same_dtype` if bits can be compared."""
        self._total = total
        self._same = same_dtype
        self._seen = self._changed = self._not_finite = 0
        self._largest = 0.0
        self._moved, self._old, self._new, self._both = _Sum(), _Sum(), _Sum(), _Sum()

    def add(self, old: Numbers, new: Numbers) -> None:
        """Elements of both sides, which may differ."""
        a, b = old.wide, new.wide
        if self._same:
            differs = old.bits != new.bits
            if differs.ndim > 1:
                differs = differs.any(axis=1)
        else:
            differs = (a != b) & ~(np.isnan(a) & np.isnan(b))
        self._seen += len(a)
        self._changed += int(np.count_nonzero(differs))
        a_most, b_most = _most(a), _most(b)
        if not math.isfinite(a_most + b_most):
            finite = np.isfinite(a) & np.isfinite(b)
            self._not_finite += int(np.count_nonzero(differs & ~finite))
            a, b = np.where(finite, a, 0), np.where(finite, b, 0)
            a_most, b_most = _most(a), _most(b)
        a, a_power = _scaled(a, a_most)
        b, b_power = _scaled(b, b_most)
        self._take(self._old, a, a, 2 * a_power)
        self._take(self._new, b, b, 2 * b_power)
        self._take(self._both, a, b, a_power + b_power)
        if self._same and not old.exact:
            moved, power = _integer_difference(old.bits, new.bits), 0
        else:
            power = max(a_power, b_power)
            moved = np.ldexp(b, b_power - power) if b_power != power else b
            moved = moved - (np.ldexp(a, a_power - power) if a_power != power else a)
        if moved.dtype.kind == "c":
            moved = np.abs(moved)
        most = _most(moved)
        self._largest = max(self._largest, _times(most, power))
        moved, more = _scaled(moved, most)
        self._take(self._moved, moved, moved, 2 * (power + more))

    def add_equal(self, numbers: Numbers) -> None:
        """Elements that both sides have."""
        a = numbers.wide
        if not math.isfinite(_most(a)):
            a = np.where(np.isfinite(a), a, 0)
        a, power = _scaled(a, _most(a))
        self._seen += len(a)
        for total in (self._old, self._new, self._both):
            self._take(total, a, a, 2 * power)

    def _take(self, total: _Sum, a: _Array, b: _Array, power: int) -> None:
        # No BLAS: its threads would wait for each other on a busy machine, and make sums depend on them.
        parts = a.view(np.float64), b.view(np.float64)
        total.add(float(np.einsum("i,i->", *parts)), power)

    def distance(self) -> Distance:
        """The result."""
        whole = self._seen == self._total
        cosine = None
        if whole:
            cosine = math.nan
            if self._old.total and self._new.total:
                power = self._both.power - (self._old.power + self._new.power) // 2
                size = _root_of_product(self._old.total, self._new.total)
                cosine = max(-1.0, min(1.0, _times(self._both.total / size, power)))
        if self._old.total:
            power = (self._moved.power - self._old.power) // 2
            ratio = self._moved.total / self._old.total
            if not _TINY < ratio < math.inf:
                relative = _times(math.sqrt(self._moved.total) / math.sqrt(self._old.total), power)
            else:
                relative = _times(math.sqrt(ratio), power)
        else:
            relative = math.inf if self._moved.total else 0.0
        return Distance(
            self._changed / self._total if self._total else 0.0,
            self._largest,
            relative,
            self._not_finite,
            _times(math.sqrt(self._moved.total), self._moved.power // 2),
            cosine,
            whole,
        )


def _most(numbers: _Array) -> float:
    """The largest absolute value, of complex numbers that of their parts; nan if one is."""
    parts = numbers.view(np.float64)
    return max(float(parts.max()), -float(parts.min())) if parts.size else 0.0


def _scaled(numbers: _Array, most: float) -> tuple[_Array, int]:
    """The numbers times two to the minus `power`, so that they can be squared; and that power."""
    if _SMALL <= most <= _LARGE or not most:
        return numbers, 0
    power = -_DOWN if most > _LARGE else -_UP
    parts = np.ldexp(numbers.view(np.float64), -power)
    return parts.view(numbers.dtype), power


def _times(number: float, power: int) -> float:
    try:
        return math.ldexp(number, power)
    except OverflowError:
        return math.inf


def _root_of_product(one: float, other: float) -> float:
    product = one * other
    if _TINY < product < math.inf:
        return math.sqrt(product)
    return math.sqrt(one) * math.sqrt(other)


def _integer_difference(old: _Array, new: _Array) -> _Array:
    """The difference of 64-bit integers, rounded once."""
    upper = (new >> 32).astype(np.int64) - (old >> 32).astype(np.int64)
    mask = old.dtype.type(0xFFFFFFFF)
    lower = (new & mask).astype(np.int64) - (old & mask).astype(np.int64)
    found: _Array = upper * 2.0**32 + lower
    return found
