"""Numbers as the difference to those of a base: what training changed since an earlier checkpoint.

A chunk is predicted from its base, and only what the prediction missed is stored, as planes. The base itself
is one prediction. Another is the base times a factor: weight decay and the decay of an optimizer's moments
multiply every number by nearly the same value.

The difference is one of bit patterns, as integers. Floating-point numbers that are close have patterns that
are close, and integer arithmetic is exact for NaN, infinities, denormals and -0.0 alike. Only the factor
needs a floating-point operation: one IEEE multiplication, rounded to nearest, of normal numbers to normal
numbers, which gives the same bits on every machine, also where denormals are flushed to zero. Numbers near
the ends of the range, and those without a value, are predicted to stay as they are. docs/format.md,
"Differences", is the normative description.
"""

from __future__ import annotations

import struct
from typing import Any, Final, NamedTuple

import numpy as np

from ckptvcs.ids import Buffer
from ckptvcs.store import planes
from ckptvcs.store.planes import WORD, Words, scratch

SAME, SCALED = range(2)
"""Predictors: the base, and the base times a factor."""


class _Float(NamedTuple):
    """A floating-point format: its number in payloads, and where the exponent lies."""

    code: int
    size: int
    exponent: int
    """Mask of the exponent field."""
    lowest: int
    highest: int
    """The exponent fields, in place, between which numbers are multiplied."""


_MARGIN: Final = 8
"""A factor lies between 2**-8 and 2**8, and exponents keep that distance and one from both ends, so that
no product is denormal or infinite."""


def _float(code: int, size: int, mantissa: int, exponent: int) -> _Float:
    one = 1 << mantissa
    top = (1 << exponent) - 1
    return _Float(code, size, top * one, (_MARGIN + 2) * one, (top - _MARGIN - 2) * one)


_FLOATS: Final = {
    "bfloat16": _float(0, 2, 7, 8),
    "float32": _float(1, 4, 23, 8),
    "float64": _float(2, 8, 52, 11),
}
_BY_CODE: Final = {each.code: each for each in _FLOATS.values()}
_FACTOR: Final = struct.Struct("<Bd")
_HEAD: Final = struct.Struct("<B")


def is_float(numbers: str) -> bool:
    """Whether numbers of a dtype have an exponent above a mantissa of more than a few bits."""
    return numbers.startswith(("float16", "bfloat16", "float32", "float64", "complex", "bcomplex"))


def format_of(numbers: str) -> _Float | None:
    """The format in which numbers of a dtype can be multiplied, if there is one."""
    return _FLOATS.get(numbers.replace("complex128", "float64").replace("complex64", "float32"))


# -- encoding -------------------------------------------------------------------------------------


def encode(
    words: Words,
    base: Words,
    factor: float | None = None,
    kind: _Float | None = None,
    layout: int | None = None,
) -> Buffer:
    """The words as a difference to the base, or with a factor (`fit`) to the base times it."""
    if factor is None or kind is None:
        return planes.encode(_missed(words, base), layout=layout, prefix=_HEAD.pack(SAME))
    head = _HEAD.pack(SCALED) + _FACTOR.pack(kind.code, factor)
    return planes.encode(_missed(words, _scaled(base, kind, factor)), layout=layout, prefix=head)


def layout_of(payload: Buffer) -> int:
    """The layout of the planes in a payload that `encode` made."""
    head = _HEAD.size + (_FACTOR.size if payload[0] == SCALED else 0)
    return planes.layout_of(memoryview(payload)[head:])


def _digits(dtype: np.dtype[Any]) -> Any:
    """Adding this and taking it away bit by bit turns an integer into bytes that are signed digits."""
    return dtype.type(sum(0x80 << (8 * place) for place in range(dtype.itemsize - 1)))


def _missed(words: Words, predicted: Words) -> Words:
    """What a prediction missed. Small numbers of either sign have zeros in their upper bytes."""
    missed = scratch.array("missed", words.dtype, len(words))
    digits = _digits(words.dtype)
    np.subtract(words, predicted, out=missed)
    np.add(missed, digits, out=missed)
    np.bitwise_xor(missed, digits, out=missed)
    return missed


def fit(words: Words, base: Words, kind: _Float) -> float | None:
    """The factor from a base to words: the median over a sample of their ratios; None if there is none.

    Rounded to float32, in which all but float64 are multiplied.
    """
    step = max(1, len(words) // _SAMPLE)
    new, old = words[::step], base[::step]
    usable = _in_range(new, kind) & _in_range(old, kind)
    if np.count_nonzero(usable) < _FEWEST:
        return None
    with np.errstate(all="ignore"):
        ratios = _values(new[usable], kind) / _values(old[usable], kind)
        factor = float(np.float32(np.median(ratios)))
    return factor if factor != 1.0 and _possible(factor) else None


_SAMPLE: Final = 2048
_FEWEST: Final = 64


def _in_range(words: Words, kind: _Float) -> Any:
    """Which of the words are numbers that would be multiplied. Denormals are not, so that a factor is the
    same where they are flushed to zero."""
    exponents = (words & words.dtype.type(kind.exponent)) - words.dtype.type(kind.lowest)
    return exponents <= words.dtype.type(kind.highest - kind.lowest)


def _possible(factor: float) -> bool:
    return 2.0**-_MARGIN <= factor <= 2.0**_MARGIN


def _values(words: Words, kind: _Float) -> Words:
    """Words as float64."""
    if kind.size == 2:
        words = words.astype("<u4") << np.uint32(16)
    return np.ascontiguousarray(words).view(f"<f{words.dtype.itemsize}").astype(np.float64)


# -- decoding -------------------------------------------------------------------------------------


def decode_frame(payload: Buffer, into: memoryview, element_size: int, base: Buffer | None) -> None:
    """Fill `into` from a payload and the bytes of the base, which may be `into` itself."""
    if base is None or len(base) != len(into):
        raise ValueError("a difference without a base of its length")
    words = planes.words_of(into, element_size)
    known = planes.words_of(base, element_size)
    view = memoryview(payload)
    if not len(view):
        raise ValueError("an empty payload")
    predictor, view = view[0], view[1:]
    predicted = known
    if predictor == SCALED:
        if len(view) < _FACTOR.size:
            raise ValueError("the factor is cut short")
        code, factor = _FACTOR.unpack_from(view)
        view = view[_FACTOR.size :]
        kind = _BY_CODE.get(code)
        if kind is None or kind.size != element_size or not _possible(factor):
            raise ValueError(f"an impossible factor {factor} of numbers of format {code}")
        predicted = _scaled(known, kind, factor)
    elif predictor != SAME:
        raise ValueError(f"unknown predictor {predictor}")
    missed = scratch.array("missed", WORD[element_size], len(words))
    planes.decode(view, missed)
    digits = _digits(missed.dtype)
    np.bitwise_xor(missed, digits, out=missed)
    np.subtract(missed, digits, out=missed)
    np.add(missed, predicted, out=words)


def _scaled(base: Words, kind: _Float, factor: float) -> Words:
    """The base times the factor, where that is exact on every machine; elsewhere the base."""
    count = len(base)
    exponents = scratch.array("low", base.dtype, count)
    np.bitwise_and(base, base.dtype.type(kind.exponent), out=exponents)
    np.subtract(exponents, base.dtype.type(kind.lowest), out=exponents)
    kept = scratch.array("kept", np.bool_, count)
    np.greater(exponents, base.dtype.type(kind.highest - kind.lowest), out=kept)
    scaled = scratch.array("scaled", base.dtype, count)
    with np.errstate(all="ignore"):
        if kind.size == 2:
            _scale_bfloat16(base, factor, scaled)
        else:
            number = np.dtype(f"<f{kind.size}")
            np.multiply(base.view(number), number.type(factor), out=scaled.view(number))
    if kept.any():
        np.copyto(scaled, base, where=kept)
    return scaled


def _scale_bfloat16(base: Words, factor: float, scaled: Words) -> None:
    """A product in float32, rounded to nearest, ties to even, by integer arithmetic."""
    wide = scratch.array("wide", "<u4", len(base))
    odd = scratch.array("odd", "<u4", len(base))
    np.left_shift(base, 16, out=wide, dtype=np.uint32)
    numbers = wide.view("<f4")
    np.multiply(numbers, np.float32(factor), out=numbers)
    np.right_shift(wide, 16, out=odd)
    np.bitwise_and(odd, 1, out=odd)
    np.add(wide, odd, out=wide)
    np.add(wide, 0x7FFF, out=wide)
    np.right_shift(wide, 16, out=wide)
    np.copyto(scaled, wide, casting="unsafe")
