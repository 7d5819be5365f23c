"""Casting floating-point numbers to another width: rounded to nearest, ties to even, once.

Float64 goes to bfloat16 by way of float32, which would round twice and so miss the nearest number now and
then. The first step therefore rounds to odd: a float32 that is not exact gets its last bit set, which keeps
it on the right side of every tie of the narrower type (Boldo and Melquiond, "Emulation of FMA and correctly
rounded sums", IEEE TC 57(4), 2008; float32 has the two extra bits that this takes, 24 >= 8 + 2).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ckptvcs.errors import InvalidError
from ckptvcs.ids import Buffer
from ckptvcs.state.tensors import Raw, numpy_dtype

TARGETS: Final = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "fp32": "float32",
    "float32": "float32",
}
"""What people call the dtypes that can be cast to."""

_SOURCES: Final = frozenset(
    (
        "float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
        "float8_e5m2fnuz", "float8_e8m0fnu", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz",
    )
)  # fmt: skip


def target_of(name: str) -> str:
    """The dtype that a `dtype=` of an export names. InvalidError for any other text."""
    found = TARGETS.get(name)
    if found is None:
        raise InvalidError(f"cannot cast to {name!r}", hint="bf16, fp16 or fp32")
    return found


def is_cast(dtype: str, target: str | None) -> bool:
    """Whether numbers of this dtype become others."""
    return target is not None and dtype in _SOURCES and dtype != target


def cast(data: Buffer, dtype: str, target: str) -> tuple[Buffer, int]:
    """Little-endian numbers of `dtype` as those of `target`, and how many finite ones became infinite."""
    numbers: Raw = np.frombuffer(data, numpy_dtype(dtype))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if dtype == "float64" and target == "bfloat16":
            numbers = _rounded_to_odd(numbers)
        elif dtype not in ("float16", "float32", "float64"):
            numbers = numbers.astype(np.float32)  # exact
        found = numbers.astype(numpy_dtype(target))
    wide = found if target == "float32" else found.astype(np.float32)
    overflowed = int(np.count_nonzero(np.isinf(wide) & np.isfinite(numbers)))
    return found.view(np.uint8).data, overflowed


def narrowed(numbers: Raw, dtype: str) -> Raw:
    """Float64 or complex128 as another dtype: each number rounded once, to nearest, ties to even. What is
    beyond its range becomes what it has for that: an infinity, or NaN."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if numbers.dtype == np.float64 and dtype not in ("float16", "float32", "float64"):
            numbers = _rounded_to_odd(numbers)
        return numbers.astype(numpy_dtype(dtype))


def _rounded_to_odd(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Float64 as float32: exact, or the neighbour whose last bit is set."""
    near = numbers.astype(np.float32)
    bits = near.view(np.uint32)
    back = near.astype(np.float64)
    # Where rounding went away from zero, one step back is the truncated number; then its last bit is set.
    away = np.abs(back) > np.abs(numbers)
    inexact = (back != numbers) & ~np.isnan(numbers)
    odd = np.where(inexact, (bits - away.astype(np.uint32)) | np.uint32(1), bits)
    found: np.ndarray[Any, Any] = odd.view(np.float32)
    return found
