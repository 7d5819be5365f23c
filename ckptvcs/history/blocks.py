"""Numbers as rows of characters: sparklines and bars. Pure logic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

_LEVELS: Final = "▁▂▃▄▅▆▇█"
_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
_ASCII_LEVELS: Final = "_.-~=+*#"


def sparkline(
    values: Sequence[float],
    width: int,
    low: float | None = None,
    high: float | None = None,
    *,
    plain: bool = False,
) -> str:
    """Values from left to right as blocks of eight heights; at most `width` of them.

    Of more values each block is the mean of a run. The lowest block is `low`, the highest `high`, by default
    the least and the greatest value. What is not finite is `×` (`x` in a `plain` line, which is ASCII).
    """
    levels = _ASCII_LEVELS if plain else _LEVELS
    shown = _thinned(values, width)
    finite = [value for value in shown if math.isfinite(value)]
    bottom = min(finite, default=0.0) if low is None else low
    top = max(finite, default=0.0) if high is None else high
    cells = []
    for value in shown:
        if not math.isfinite(value):
            cells.append("x" if plain else "×")
            continue
        # Halves, so that the span itself cannot overflow.
        span = top / 2 - bottom / 2
        share = (value / 2 - bottom / 2) / span if span > 0 else 0.5
        cells.append(levels[min(len(levels) - 1, max(0, int(share * len(levels))))])
    return "".join(cells)


def _thinned(values: Sequence[float], width: int) -> list[float]:
    if len(values) <= width:
        return list(values)
    cells = []
    for i in range(width):
        run = values[i * len(values) // width : (i + 1) * len(values) // width]
        finite = [value / len(run) for value in run if math.isfinite(value)]
        cells.append(sum(finite) * len(run) / len(finite) if finite else math.nan)
    return cells


def bar(share: float, width: int, *, plain: bool = False) -> str:
    """A bar over `share` (0 to 1) of `width` characters, without trailing blanks; never empty for what is not
    zero."""
    if plain:
        return "#" * max(round(share * width), share > 0)
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[rest] if rest else "")
