"""How far numbers moved, against formulas written anew."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ckptvcs.state.distance import Distance, Measure, widening

FLOATS = ("float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64")


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def measured(name: str, old: Any, new: Any, pieces: int = 1, equal: Any = None) -> Distance:
    kind = dtype_of(name)
    read = widening(name, kind.itemsize)
    assert read is not None
    a, b = (np.ascontiguousarray(side, kind) for side in (old, new))
    rest = np.zeros(0, kind) if equal is None else np.ascontiguousarray(equal, kind)
    measure = Measure(len(a) + len(rest), same_dtype=True)
    for one, other in zip(np.array_split(a, pieces), np.array_split(b, pieces), strict=True):
        measure.add(read(one.tobytes()), read(other.tobytes()))
    if len(rest):
        measure.add_equal(read(rest.tobytes()))
    return measure.distance()


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("pieces", [1, 7])
def test_formulas(name: str, pieces: int) -> None:
    rng = np.random.default_rng(7)
    kind = dtype_of(name)
    a = rng.standard_normal(1000).astype(np.float32).astype(kind)
    wide = np.complex128 if name == "complex64" else np.float64
    b = (a.astype(wide) + 0.1 * rng.standard_normal(1000)).astype(kind)
    b[::3] = a[::3]
    x, y = a.astype(np.complex128), b.astype(np.complex128)
    found = measured(name, a, b, pieces)
    bits = [side.view(np.uint8).reshape(1000, -1) for side in (a, b)]
    assert found.changed == np.any(bits[0] != bits[1], axis=1).mean()
    assert found.largest == pytest.approx(np.abs(y - x).max(), rel=1e-15)
    assert found.l2 == pytest.approx(np.linalg.norm(y - x), rel=1e-12)
    assert found.relative == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-12)
    cosine = np.vdot(x, y).real / np.linalg.norm(x) / np.linalg.norm(y)
    assert found.cosine == pytest.approx(cosine, rel=1e-12)
    assert (found.not_finite, found.whole) == (0, True)


def test_equal_parts_count_in_norms_when_they_were_read() -> None:
    a, b, rest = np.array([3.0, 0.0]), np.array([0.0, 0.0]), np.array([4.0])
    whole = measured("float64", a, b, equal=rest)
    assert (whole.changed, whole.relative, whole.cosine) == (1 / 3, 3 / 5, 4 / 5)
    measure = Measure(3, same_dtype=True)
    read = widening("float64", 8)
    assert read is not None
    measure.add(read(a.tobytes()), read(b.tobytes()))
    part = measure.distance()
    assert (part.changed, part.l2, part.relative) == (1 / 3, 3, 1)  # no less than the true 3/5
    assert (part.cosine, part.whole) == (None, False)


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1.0, 1e200, 1e307])
def test_the_whole_range_of_float64(scale: float) -> None:
    found = measured("float64", np.array([3.0, 4.0]) * scale, np.array([3.0, 0.0]) * scale)
    assert found.largest == pytest.approx(4 * scale, rel=1e-12)
    assert found.l2 == pytest.approx(4 * scale, rel=1e-12)
    assert found.relative == pytest.approx(0.8, rel=1e-12)
    assert found.cosine == pytest.approx(0.6, rel=1e-12)


def test_large_and_small_pieces_together() -> None:
    found = measured("float64", [1e-300, 1e300], [2e-300, 1e300], pieces=2)
    assert found.l2 == pytest.approx(1e-300, rel=1e-12)
    assert found.relative == 0  # 1e-600
    assert found.cosine == 1
    assert measured("float64", [1.7e308], [-1.7e308]).largest == math.inf


@pytest.mark.parametrize("name", ["int64", "uint64"])
def test_integers_are_subtracted_before_they_are_rounded(name: str) -> None:
    low, high = (0, 2**64 - 1) if name == "uint64" else (-(2**63), 2**63 - 1)
    old, new = [high, 2**60, low, low], [high - 1, 2**60 + 3, low, high]
    found = measured(name, old, new)
    exact = [Fraction(b) - Fraction(a) for a, b in zip(old, new, strict=True)]
    assert found.changed == 0.75
    assert found.largest == float(max(exact))
    assert measured(name, old[:3], new[:3]).largest == 3
    assert measured(name, old[:3], new[:3]).l2 == math.sqrt(10)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    nan, inf = math.nan, math.inf
    found = measured("float32", [nan, inf, 1, 2, inf], [nan, 5, nan, 4, inf])
    assert (found.changed, found.not_finite, found.largest, found.l2) == (0.6, 2, 2, 2)
    assert (found.relative, found.cosine) == (1, 1)
    zero = measured("float32", [0, 0], [0, 0])
    assert zero.relative == 0
    assert zero.cosine is not None
    assert math.isnan(zero.cosine)
    assert measured("float32", [0], [1]).relative == inf
    assert measured("float32", [0.0], [-0.0]).changed == 1
    assert measured("float32", [], []).changed == 0


@pytest.mark.parametrize("name", ["S3", "U2", "datetime64[s]", "complex32", "no such dtype"])
def test_what_are_no_numbers(name: str) -> None:
    assert widening(name, 4) is None
