"""What the numbers of a stored tensor are like, in float64 and in bounded memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ckptvcs.errors import FormatError, InvalidError
from ckptvcs.ids import Buffer
from ckptvcs.state.tensors import numpy_dtype

_WIDE: Final = 4 << 20
_NARROW: Final = 1 << 20
"""Bytes read at a time, of elements of 4 bytes and more, and of smaller ones: at most 1 Mi numbers."""

_OPAQUE: Final = re.compile(r"V\d+\Z")


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of a tensor's numbers; of complex ones, of their magnitudes.

    Attributes:
        count: all of them.
        minimum, maximum, mean, std: of those that are finite; None if none is. The first two are exact, also
            of 64-bit integers. `std` is that of the whole (divided by n), by the pairwise update of Chan,
            Golub and LeVeque (1979); infinite where a square is too large for float64.
        zeros, nan, positive_inf, negative_inf: how many there are. -0.0 is a zero.
        histogram: finite numbers in equal bins from minimum to maximum, the maximum in the last bin.
    """

    count: int
    minimum: int | float | None
    maximum: int | float | None
    mean: float | None
    std: float | None
    zeros: int
    nan: int
    positive_inf: int
    negative_inf: int
    histogram: tuple[int, ...]


def statistics(
    path: str, dtype: str, item: int, nbytes: int, read: Callable[[int, int], Buffer], bins: int
) -> Statistics:
    """Of the tensor at `path`: `read(start, stop)` gives its bytes in C order and little endian. Reads it
    twice: a histogram needs to know its ends. InvalidError for elements that are no numbers."""
    stored = _numbers_of(path, dtype)
    piece = (_WIDE if item >= 4 else _NARROW) // item * item

    def arrays() -> Iterator[Any]:
        for start in range(0, nbytes, piece):
            found = np.frombuffer(read(start, min(nbytes, start + piece)), stored)
            yield np.abs(found.astype(np.complex128)) if stored.kind == "c" else found

    gathered = _Gathered()
    for each in arrays():
        gathered.add(each)
    low, high = gathered.minimum, gathered.maximum
    counts = np.zeros(bins, np.int64)
    if low is not None and high is not None:
        for each in arrays():
            counts += _binned(each, float(low), float(high), bins)
    finite = gathered.finite
    return Statistics(
        count=nbytes // item,
        minimum=low,
        maximum=high,
        mean=gathered.mean if finite else None,
        std=math.sqrt(gathered.squares / finite) if finite else None,
        zeros=gathered.zeros,
        nan=gathered.nan,
        positive_inf=gathered.positive_inf,
        negative_inf=gathered.negative_inf,
        histogram=tuple(int(count) for count in counts),
    )


def _numbers_of(path: str, dtype: str) -> np.dtype[Any]:
    try:
        found = numpy_dtype(dtype)
        # Those of ml_dtypes are of kind V, too, but can be computed with.
        if found.kind not in "SUmM" and not _OPAQUE.match(dtype):
            np.zeros(1, found).astype(np.complex128 if found.kind == "c" else np.float64)
            return found
    except (FormatError, TypeError, ValueError):
        pass
    raise InvalidError(f"{path} holds elements of {dtype}, of which there are no statistics")


class _Gathered:
    def __init__(self) -> None:
        self.finite = self.zeros = self.nan = self.positive_inf = self.negative_inf = 0
        self.mean = self.squares = 0.0
        self.minimum: int | float | None = None
        self.maximum: int | float | None = None

    def add(self, array: Any) -> None:
        whole = array.dtype.kind in "iu"
        numbers = array.astype(np.float64)
        kept = np.isfinite(numbers)
        if not kept.all():
            self.nan += int(np.count_nonzero(np.isnan(numbers)))
            self.positive_inf += int(np.count_nonzero(numbers == math.inf))
            self.negative_inf += int(np.count_nonzero(numbers == -math.inf))
            numbers = numbers[kept]
        count = len(numbers)
        if not count:
            return
        exact = array if whole else numbers
        low, high = (kind(each) for kind in (int if whole else float,) for each in (exact.min(), exact.max()))
        self.minimum = low if self.minimum is None else min(self.minimum, low)
        self.maximum = high if self.maximum is None else max(self.maximum, high)
        self.zeros += count - int(np.count_nonzero(numbers))
        with np.errstate(over="ignore", invalid="ignore"):
            mean = float(numbers.mean())
            if not math.isfinite(mean):  # the sum is too large
                mean = float((numbers / count).sum())
            centred = numbers - mean
            squares = float(np.dot(centred, centred))
        if not self.finite:
            self.finite, self.mean, self.squares = count, mean, squares
            return
        total = self.finite + count
        # Halved, so that the distance of two means cannot overflow.
        half = mean / 2 - self.mean / 2
        self.mean += 2 * (half * (count / total))
        self.squares += squares + (half * half) * 4 * (self.finite / total) * count
        self.finite = total


def _binned(array: Any, low: float, high: float, bins: int) -> Any:
    numbers = array.astype(np.float64)
    numbers = numbers[np.isfinite(numbers)]
    span = high / 2 - low / 2
    if span <= 0:
        places = np.zeros(len(numbers), np.int64)
    else:
        places = np.minimum(((numbers / 2 - low / 2) / span * bins).astype(np.int64), bins - 1)
    return np.bincount(places, minlength=bins)
