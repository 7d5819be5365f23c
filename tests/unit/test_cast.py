"""Casts round once, to nearest even."""

from __future__ import annotations

import fractions

import ml_dtypes
import numpy as np
import pytest

from ckptvcs.errors import InvalidError
from ckptvcs.state.cast import cast, is_cast, target_of

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def nearest(value: float, dtype: type) -> float:
    """The number of a dtype that is nearest to a finite value, of two the even one, by exact arithmetic."""
    guess = np.float64(value).astype(dtype)
    around = [guess, np.nextafter(guess, dtype(np.inf)), np.nextafter(guess, dtype(-np.inf))]
    finite = [each for each in around if np.isfinite(np.float64(each))]
    exact = fractions.Fraction(value)

    def far(each: object) -> tuple[fractions.Fraction, int]:
        bits = int(np.asarray(each).view(f"u{np.asarray(each).itemsize}"))
        return abs(fractions.Fraction(float(each)) - exact), bits & 1  # type: ignore[arg-type]

    return float(min(finite, key=far))


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", ["float64", "float32", "float16", "bfloat16"])
def test_numbers_go_to_the_nearest_one(source: str, target: str) -> None:
    kind = {**DTYPES, "float64": np.float64}[source]
    rng = np.random.default_rng(4)
    numbers = (rng.standard_normal(4000) * np.exp2(rng.integers(-12, 13, 4000))).astype(kind)
    data, overflowed = cast(numbers.view(np.uint8).data, source, target)
    found = np.frombuffer(data, DTYPES[target])
    assert overflowed == 0
    assert [float(each) for each in found] == [nearest(float(each), DTYPES[target]) for each in numbers]


def test_a_float64_is_not_rounded_twice() -> None:
    # A little above the middle of two bfloat16: as float32 it is the middle, which goes to the even one.
    value = 1 + 2.0**-8 + 2.0**-40
    assert float(np.float64(value).astype(np.float32).astype(ml_dtypes.bfloat16)) == 1.0
    for sign in (1, -1):
        data, _ = cast(np.array([sign * value]).view(np.uint8).data, "float64", "bfloat16")
        assert np.frombuffer(data, ml_dtypes.bfloat16).astype(float).tolist() == [sign * (1 + 2.0**-7)]


def test_what_is_no_number_stays_so_and_what_overflows_is_counted() -> None:
    for target, large in (("float16", 65520.0), ("bfloat16", 3.4e38), ("float32", 1e39)):
        numbers = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, large, -large, 5e-324], np.float64)
        data, overflowed = cast(numbers.view(np.uint8).data, "float64", target)
        found = np.frombuffer(data, DTYPES[target]).astype(np.float64)
        assert np.isnan(found[0])
        assert found[1:7].tolist() == [np.inf, -np.inf, 0, 0, np.inf, -np.inf]
        assert np.signbit(found[3])
        assert not np.signbit(found[4])
        assert overflowed == 2


def test_only_floating_point_numbers_are_cast() -> None:
    assert is_cast("float32", "bfloat16")
    assert is_cast("float8_e4m3fn", "float32")
    assert not is_cast("bfloat16", "bfloat16")
    assert not any(is_cast(dtype, "float16") for dtype in ("int64", "bool", "complex64", "uint8", "int4"))
    assert not is_cast("float32", None)
    assert target_of("fp16") == "float16"
    with pytest.raises(InvalidError, match="int8") as refused:
        target_of("int8")
    assert refused.value.hint == "bf16, fp16 or fp32"
