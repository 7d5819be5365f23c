"""Tensors merged number by number.

Of the tensors x_1 ... x_n, weights w_i and a base b:

    mean             (x_1 + ... + x_n) / n
    weighted         sum v_i x_i, where v_i = w_i / sum w_j
    task-arithmetic  b + sum w_i (x_i - b); every w_i is 1 if none is given
    slerp            (sin((1 - t) W) x_1 + sin(t W) x_2) / sin W, where cos W = <x_1, x_2> / (|x_1| |x_2|)
                     over the whole tensor and t = w_2 / (w_1 + w_2), or 1/2; (1 - t) x_1 + t x_2 where
                     |cos W| > 0.9995 or a tensor is zero

Sums are taken from left to right, in float64 (complex128), and the result is rounded once to the dtype of the
tensors, to nearest, ties to even. Except with slerp, a number that all sides have (with task-arithmetic the
base as well) stays as it is, bit for bit. NaN and infinities go through the sums as IEEE 754 says; a tensor
that holds any has no angle, so slerp refuses it.

Sources: mean and weights, Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models
improves accuracy without increasing inference time", ICML 2022; task arithmetic, Ilharco et al., "Editing
models with task arithmetic", ICLR 2023; slerp, Shoemake, "Animating rotation with quaternion curves",
SIGGRAPH 1985, with the threshold that merging tools have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from ckptvcs.errors import InvalidError
from ckptvcs.ids import Buffer
from ckptvcs.state import cast
from ckptvcs.state.distance import Measure, widening
from ckptvcs.state.interface import ObjectReader
from ckptvcs.state.read import Content, StoredTensor
from ckptvcs.state.streams import Stream
from ckptvcs.state.tensors import unit

STRATEGIES: Final = ("mean", "weighted", "slerp", "task-arithmetic")

MERGEABLE: Final = frozenset(
    (
        "float16", "float32", "float64", "bfloat16", "complex64", "complex128", "float8_e4m3fn",
        "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e3m4", "float8_e4m3",
        "float8_e4m3b11fnuz",
    )
)  # fmt: skip
"""dtypes of numbers that an average can be rounded to."""

_PARALLEL: Final = 0.9995
_NUMBERS: Final = 1 << 16
"""Elements looked at at a time to find an angle."""

_Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True, slots=True)
class Formula:
    """A strategy with its weights, one per side.

    Attributes:
        strategy: one of `STRATEGIES`.
        weights: as given; for mean all are 1.
    """

    strategy: str
    weights: tuple[float, ...]

    @property
    def needs_base(self) -> bool:
        """Whether there is a base besides the sides."""
        return self.strategy == "task-arithmetic"

    @property
    def keeps_equal(self) -> bool:
        """Whether numbers that all have stay, one by one."""
        return self.strategy != "slerp"

    def coefficients(self, cosine: float = math.nan) -> tuple[float, ...]:
        """What each side is multiplied by; with slerp, for tensors of this cosine."""
        if self.strategy != "slerp":
            whole = math.fsum(self.weights)
            return self.weights if self.needs_base else tuple(each / whole for each in self.weights)
        t = self.weights[1] / math.fsum(self.weights)
        if not abs(cosine) <= _PARALLEL:
            return 1 - t, t
        angle = math.acos(cosine)
        return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)

    def combined(self, sides: Sequence[_Array], base: _Array | None, factors: Sequence[float]) -> _Array:
        """The result in float64, but for what stays. Complex numbers are pairs of real ones."""
        if sides[0].dtype.kind == "c":
            below = None if base is None else base.view(np.float64)
            pairs = self.combined([side.view(np.float64) for side in sides], below, factors)
            return pairs.view(np.complex128)
        with np.errstate(all="ignore"):
            if self.strategy == "mean":
                total = sides[0]
                for side in sides[1:]:
                    total = total + side
                mean: _Array = total / len(sides)
                return mean
            if base is not None:
                found = base
                for factor, side in zip(factors, sides, strict=True):
                    found = found + factor * (side - base)
                return found
            found = factors[0] * sides[0]
            for factor, side in zip(factors[1:], sides[1:], strict=True):
                found = found + factor * side
            return found


def formula(strategy: str, weights: Sequence[float] | None, sides: int) -> Formula:
    """The formula of a strategy for so many sides. InvalidError if its weights mean nothing."""
    if strategy not in STRATEGIES:
        raise InvalidError(f"there is no strategy {strategy!r}", hint=", ".join(STRATEGIES))
    if strategy == "slerp" and sides != 2:
        raise InvalidError(f"slerp goes between two states, not {sides}", hint="mean and weighted take more")
    if strategy == "mean" and weights is not None:
        raise InvalidError("a mean has no weights", hint="strategy 'weighted' has")
    if strategy == "weighted" and weights is None:
        raise InvalidError("strategy 'weighted' needs weights", hint="one per state, such as 0.7,0.3")
    found = tuple(float(each) for each in weights or ())
    if strategy == "slerp" and len(found) == 1:
        found = (1 - found[0], found[0])
    found = found or (1.0,) * sides
    if len(found) != sides:
        raise InvalidError(f"{len(found)} weights for {sides} states", hint="one per state, in their order")
    if not all(map(math.isfinite, found)):
        raise InvalidError("a weight is not finite")
    if strategy != "task-arithmetic" and not math.fsum(found):
        raise InvalidError("the weights add up to 0", hint="they are divided by their sum")
    return Formula(strategy, found)


class MergedSource:
    """The bytes of a merged tensor, computed when they are read, and the same each time. Thread-safe.

    Attributes:
        overflowed: numbers that became infinite or NaN by rounding, by the offset at which they were read.
    """

    def __init__(
        self,
        reader: ObjectReader,
        formula: Formula,
        sides: Sequence[StoredTensor],
        base: StoredTensor | None,
        factors: Sequence[float],
    ) -> None:
        """Chunk lists of the tensors are resolved."""
        spec = sides[0].spec
        self.nbytes = spec.nbytes
        self.element_size = unit(spec.dtype, spec.item)
        self.overflowed: dict[int, int] = {}
        self._reader = reader
        self._formula = formula
        self._dtype, self._item = spec.dtype, spec.item
        self._contents = [side.content for side in (*sides, *([] if base is None else [base]))]
        self._count = len(sides)
        self._factors = factors

    def read(self, offset: int, length: int) -> Buffer:
        """Bytes [offset, offset + length)."""
        start = offset // self._item * self._item
        stop = -(-(offset + length) // self._item) * self._item
        if self._formula.keeps_equal and self._equal(start, stop):
            return Stream(self._reader, self._contents[0]).read(offset, offset + length)
        read = widening(self._dtype, self._item)
        assert read is not None
        parts = [read(Stream(self._reader, content).read(start, stop)) for content in self._contents]
        wide = [part.wide for part in parts]
        base = wide[self._count] if len(wide) > self._count else None
        exact = self._formula.combined(wide[: self._count], base, self._factors)
        found = cast.narrowed(exact, self._dtype)
        with np.errstate(invalid="ignore"):
            lost = np.isfinite(exact) & ~np.isfinite(found.astype(exact.dtype))
        if self._formula.keeps_equal:
            stays = np.ones(len(found), bool)
            for part in parts[1:]:
                same = part.bits == parts[0].bits
                stays &= same.all(axis=1) if same.ndim > 1 else same
            if stays.any():
                bits = found.view(parts[0].bits.dtype).reshape(parts[0].bits.shape).copy()
                bits[stays] = parts[0].bits[stays]
                found = bits
                lost &= ~stays
        self.overflowed[offset] = int(np.count_nonzero(lost))
        return found.reshape(-1).view(np.uint8).data[offset - start :][:length]

    def _equal(self, start: int, stop: int) -> bool:
        """Whether the cells of a range are the same on all sides, by their ids."""
        if any(content.chunks is None for content in self._contents):
            return False
        cell = self._reader.grid.chunk
        first, last = start // cell, -(-stop // cell)
        cells = {content.chunks[first:last] for content in self._contents if content.chunks is not None}
        return len(cells) == 1


def cosine(reader: ObjectReader, one: StoredTensor, other: StoredTensor) -> float | None:
    """The cosine between two tensors, nan if one is zero; None if one holds what is not finite."""
    spec = one.spec
    read = widening(spec.dtype, spec.item)
    assert read is not None
    streams = Stream(reader, one.content), Stream(reader, other.content)
    measure = Measure(spec.nbytes // spec.item, same_dtype=True)
    step = _NUMBERS * spec.item
    for pieces in zip(*(stream.pieces() for stream in streams), strict=True):
        for start in range(0, len(pieces[0]), step):
            one_part, other_part = (read(memoryview(piece)[start : start + step]) for piece in pieces)
            if not (np.isfinite(one_part.wide).all() and np.isfinite(other_part.wide).all()):
                return None
            measure.add(one_part, other_part)
    return measure.distance().cosine


def is_same(contents: Sequence[Content]) -> bool:
    """Whether content is the same by its ids, or by its bytes where it is short."""
    first = contents[0]
    for other in contents[1:]:
        if first.inline is not None or other.inline is not None:
            same = first.inline == other.inline
        elif first.chunk_list is not None and other.chunk_list is not None:
            same = first.chunk_list == other.chunk_list
        else:
            same = first.chunks == other.chunks and first.chunk_list == other.chunk_list
        if not same:
            return False
    return True
