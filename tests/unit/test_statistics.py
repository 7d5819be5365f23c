"""Statistics of stored tensors, against numpy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ckptvcs import InvalidError, Repo
from ckptvcs.state import statistics as module
from ckptvcs.state.statistics import Statistics


def of(repo: Repo, value: Any, bins: int = 8) -> Statistics:
    repo.commit({"x": value})
    return repo.open_tensor("HEAD", "x").statistics(bins)


def check(found: Statistics, array: Any, bins: int = 8) -> None:
    numbers = np.asarray(array).astype(np.float64).reshape(-1)
    finite = numbers[np.isfinite(numbers)]
    assert found.count == numbers.size
    assert found.nan == np.isnan(numbers).sum()
    assert found.positive_inf == (numbers == np.inf).sum()
    assert found.negative_inf == (numbers == -np.inf).sum()
    assert found.zeros == (numbers == 0).sum()
    assert sum(found.histogram) == finite.size
    if not finite.size:
        assert found.minimum is found.maximum is found.mean is found.std is None
        return
    assert found.minimum == finite.min()
    assert found.maximum == finite.max()
    assert found.mean == pytest.approx(finite.mean(), rel=1e-12, abs=1e-12)
    assert found.std == pytest.approx(finite.std(), rel=1e-9, abs=1e-12)
    if finite.min() < finite.max():
        expected, _ = np.histogram(finite, bins, (finite.min(), finite.max()))
        # Numbers on an edge may fall to either side of it.
        assert np.abs(np.cumsum(expected) - np.cumsum(found.histogram)).max() <= max(2, finite.size // 1000)


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "int8", "uint16", "int64", "bool", "bfloat16", "float8_e4m3fn"]
)
def test_against_numpy_in_pieces(repo: Repo, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WIDE", 4096)
    monkeypatch.setattr(module, "_NARROW", 1024)
    numbers = np.random.default_rng(3).normal(5, 20, 20_000)
    numbers[::17] = 0
    kind = getattr(ml_dtypes, dtype) if dtype in ("bfloat16", "float8_e4m3fn") else np.dtype(dtype)
    array = np.abs(numbers).astype(kind) if dtype.startswith("u") else numbers.astype(kind)
    check(of(repo, array.reshape(100, 200)), array)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0],
        [-0.0, 0.0, 3.0],
        [math.nan] * 3,
        [math.nan, math.inf, -math.inf, 1.0, 2.0],
        [7.5] * 100,
        [1e-310, 5e-324, 0.0],
    ],
)
def test_odd_contents(repo: Repo, values: list[float]) -> None:
    check(of(repo, np.array(values, np.float64)), values)


def test_numbers_near_the_end_of_float64_overflow_nothing_but_squares(repo: Repo) -> None:
    big = np.array([1.7e308, -1.7e308, 1.7e308, 1.6e308] * 100)
    found = of(repo, big, 4)
    assert (found.minimum, found.maximum) == (-1.7e308, 1.7e308)
    assert found.mean == pytest.approx(0.825e308, rel=1e-9)
    assert found.std == math.inf
    assert found.histogram == (100, 0, 0, 300)


def test_64_bit_integers_are_exact(repo: Repo) -> None:
    found = of(repo, np.array([2**63 - 1, -(2**63), 2**53 + 1], np.int64))
    assert (found.minimum, found.maximum) == (-(2**63), 2**63 - 1)
    found = of(repo, np.array([2**64 - 1, 2**53 + 1], np.uint64))
    assert (found.minimum, found.maximum) == (2**53 + 1, 2**64 - 1)


def test_complex_numbers_by_magnitude_and_either_byte_order(repo: Repo) -> None:
    found = of(repo, np.array([3 + 4j, 0, -5j], np.complex64))
    assert (found.minimum, found.maximum, found.zeros) == (0, 5, 1)
    found = of(repo, np.arange(300, dtype=">f4"))
    assert (found.minimum, found.maximum, found.mean) == (0, 299, 149.5)


def test_what_is_no_number_has_none(repo: Repo) -> None:
    for array in (np.array(["a", "b"]), np.array([b"xy"]), np.array(["2026-01-01"], "M8[D]")):
        with pytest.raises(InvalidError, match="no statistics"):
            of(repo, array)


def test_torch_tensors(repo: Repo) -> None:
    torch = pytest.importorskip("torch")
    found = of(repo, torch.arange(10, dtype=torch.bfloat16))
    assert (found.minimum, found.maximum, found.zeros) == (0, 9, 1)


def test_memory_is_bounded(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0
    real = module._Gathered.add

    def add(self: Any, array: Any) -> None:
        nonlocal longest
        longest = max(longest, array.nbytes)
        real(self, array)

    monkeypatch.setattr(module._Gathered, "add", add)
    of(repo, np.zeros(3 << 20, np.float32))
    assert longest == module._WIDE


def test_a_tensor_in_a_committed_file(repo: Repo, folder: Path) -> None:
    np.savez(folder / "x.npz", array=np.arange(1000.0))
    repo.commit_files({"x.npz": folder / "x.npz"})
    assert repo.open_tensor("HEAD", "x.npz/array").statistics().maximum == 999
