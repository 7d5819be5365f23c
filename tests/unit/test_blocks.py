"""Sparklines and bars."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.history.blocks import bar, sparkline


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([], ""),
        ([1], "▅"),
        ([2, 2, 2], "▅▅▅"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([0, math.nan, 7, math.inf], "▁×█×"),
        ([math.nan, -math.inf], "××"),
        ([-1.7e308, 0.0, 1.7e308], "▁▅█"),
    ],
)
def test_sparklines(values: list[float], drawn: str) -> None:
    assert sparkline(values, 20) == drawn


def test_a_long_line_is_thinned_by_means() -> None:
    assert sparkline([0, 0, 7, 7, math.nan, math.nan, math.nan, 3.5], 4) == "▁█×▅"
    assert len(sparkline(list(range(1000)), 24)) == 24


def test_one_scale_and_ascii() -> None:
    assert sparkline([0, 1], 9, 0, 7) == "▁▂"
    assert sparkline([0, 7, math.nan], 9, plain=True) == "_#x"


@given(st.lists(st.floats(), max_size=60), st.integers(1, 30))
def test_any_values_fit(values: list[float], width: int) -> None:
    assert len(sparkline(values, width)) == min(len(values), width)


def test_bars() -> None:
    assert [bar(share, 4) for share in (0, 1e-9, 0.25, 0.4, 1)] == ["", "▏", "█", "█▋", "████"]
    assert [bar(share, 4, plain=True) for share in (0, 1e-9, 0.5, 1)] == ["", "#", "##", "####"]
