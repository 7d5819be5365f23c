"""Curves as pictures: SVG, written here, and PNG, drawn by matplotlib where it is installed."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol
from xml.sax.saxutils import escape

from ckptvcs.disk import Disk
from ckptvcs.errors import ExistsError, InvalidError
from ckptvcs.history.curves import Chart, Curve

_WIDTH: Final = 960
_HEIGHT: Final = 540
_LEFT, _TOP, _BOTTOM = 76, 40, 52
_LEGEND: Final = 220
_ROW: Final = 16
_COLOURS: Final = (
    "#1f6fb4", "#e07b00", "#2e9e4f", "#c7362f", "#8459b5",
    "#7f5a4a", "#d465a8", "#6e6e6e", "#a3a01c", "#1aa6b7",
)  # fmt: skip
_DASHES: Final = ("", "6 3", "2 2", "8 3 2 3")
_NOT_XML: Final = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Render(Protocol):
    """Makes a file's bytes of a chart."""

    def __call__(self, chart: Chart, *, log_scale: bool = False) -> bytes:
        """The picture. InvalidError if nothing can be drawn."""


def renderer(path: Path) -> Render:
    """What draws a file of this name. InvalidError for other endings than .svg and .png, and, with the code
    `missing-library`, for .png without matplotlib."""
    kind = path.suffix.lower()
    if kind == ".svg":
        return svg
    if kind != ".png":
        raise InvalidError(f"{path} is the name of no picture", hint="end it in .svg or .png")
    try:
        import_module("matplotlib")
    except ImportError:
        raise InvalidError(
            "drawing a PNG needs matplotlib, which is not installed",
            hint="`pip install 'ckptvcs[plot]'`, or write FILE.svg, which needs nothing",
            code="missing-library",
        ) from None
    return png


def write(disk: Disk, path: Path, data: bytes, *, force: bool = False) -> None:
    """Put a picture in its place, whole or not at all. ExistsError without `force` if something is there."""
    if not force and disk.exists(path):
        raise ExistsError(f"{path} is there already", hint="choose another name, or --force")
    disk.replace(path, data)


# -- scales ---------------------------------------------------------------------------------------


class _Scale:
    """From values to a length of pixels, with ticks."""

    def __init__(self, values: Iterable[float], length: float, *, log: bool = False) -> None:
        self._log = log
        shown = [self._inner(value) for value in values if self.fits(value)]
        low, high = min(shown), max(shown)
        if low / 2 == high / 2:  # also two numbers that have nothing between them
            pad = 1.0 if log else abs(low) / 10 or 1.0
            low, high = low - pad, high + pad
        if log:  # powers of ten that there are
            low, high = max(low, -323.0), min(high, 308.0)
        self.low, self.high, self._length = low, high, length

    def _inner(self, value: float) -> float:
        return math.log10(value) if self._log else float(value)

    def fits(self, value: float) -> bool:
        """Whether a value has a place."""
        return math.isfinite(value) and (value > 0 or not self._log)

    def at(self, value: float) -> float:
        """Pixels from the low end."""
        # Halved, so that the span cannot overflow.
        span = self.high / 2 - self.low / 2
        return (self._inner(value) / 2 - self.low / 2) / span * self._length

    def ticks(self) -> list[float]:
        """Round values, four to ten of them."""
        if self._log and self.high - self.low >= 2:
            every = max(1, math.ceil((self.high - self.low) / 8))
            return [10.0**e for e in range(math.ceil(self.low), math.floor(self.high) + 1, every)]
        low, high = (10.0**self.low, 10.0**self.high) if self._log else (self.low, self.high)
        rough = (high / 6) - (low / 6)
        if rough < 1e-300:  # too close to zero for round numbers between them
            return [low, high]
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        first = math.ceil(low / step)
        return [(first + i) * step for i in range(12) if (first + i) * step <= high]


def _runs(curve: Curve, fits: Callable[[float], bool]) -> list[list[tuple[int, float]]]:
    """The parts of a curve between values that have no place."""
    runs: list[list[tuple[int, float]]] = [[]]
    for x, value in curve.points:
        if fits(value):
            runs[-1].append((x, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _scales(chart: Chart, width: float, height: float, log: bool) -> tuple[_Scale, _Scale]:
    values = [value for curve in chart.curves for _, value in curve.points]
    drawable = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not drawable:
        wanted = "a positive number" if log else "a number"
        raise InvalidError(f"no value of {chart.metric} is {wanted} that can be drawn")
    xs = [x for curve in chart.curves for x, _ in curve.points]
    return _Scale(xs, width), _Scale(drawable, height, log=log)


# -- SVG ------------------------------------------------------------------------------------------


def svg(chart: Chart, *, log_scale: bool = False) -> bytes:
    """The chart as SVG 1.1. Equal charts give equal bytes."""
    height = max(_HEIGHT, _TOP + _BOTTOM + _ROW * len(chart.curves))
    width, tall = _WIDTH - _LEFT - _LEGEND, height - _TOP - _BOTTOM
    across, up = _scales(chart, width, tall, log_scale)
    bottom = _TOP + tall
    size = f'width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="24" font-size="15">{_text(chart.metric)}</text>',
    ]
    for tick in up.ticks():
        y = bottom - up.at(tick)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_LEFT + width}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in across.ticks():
        x = _LEFT + across.at(tick)
        parts.append(f'<path d="M{x:.1f} {bottom}v5" stroke="#888888"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{tick:.10g}</text>')
    parts.append(f'<path d="M{_LEFT} {_TOP}V{bottom}H{_LEFT + width}" fill="none" stroke="#888888"/>')
    parts.append(
        f'<text x="{_LEFT + width / 2:.1f}" y="{height - 12}" text-anchor="middle">{chart.by}</text>'
    )
    for place, curve in enumerate(chart.curves):
        style = _style(place)
        parts.append(f"<g><title>{_text(curve.name)}</title>")
        for run in _runs(curve, up.fits):
            points = [(_LEFT + across.at(x), bottom - up.at(value)) for x, value in run]
            parts += _drawn(points, style)
        parts.append("</g>")
        y = _TOP + _ROW * place + 6
        x = _LEFT + width + 16
        parts.append(f'<path d="M{x} {y}h22" fill="none" {style}/>')
        parts.append(f'<text x="{x + 28}" y="{y + 4}">{_text(_short(curve.name))}</text>')
    parts.append("</svg>\n")
    return "\n".join(parts).encode()


def _style(place: int) -> str:
    dash = _DASHES[place // len(_COLOURS) % len(_DASHES)]
    return f'stroke="{_COLOURS[place % len(_COLOURS)]}" stroke-width="1.6"' + (
        f' stroke-dasharray="{dash}"' if dash else ""
    )


def _drawn(points: Sequence[tuple[float, float]], style: str) -> list[str]:
    if len(points) == 1:
        x, y = points[0]
        colour = style.split('"')[1]
        return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>']
    told = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return [f'<polyline points="{told}" fill="none" stroke-linejoin="round" {style}/>']


def _text(text: str) -> str:
    return escape(_NOT_XML.sub("�", text))


def _short(text: str) -> str:
    return text if len(text) <= 26 else f"…{text[-25:]}"


# -- PNG ------------------------------------------------------------------------------------------


def png(chart: Chart, *, log_scale: bool = False) -> bytes:
    """The chart as PNG, by matplotlib without a display."""
    across, up = _scales(chart, 1, 1, log_scale)
    del across
    backend: Any = import_module("matplotlib.backends.backend_agg")
    figures: Any = import_module("matplotlib.figure")
    figure = figures.Figure(figsize=(_WIDTH / 100, _HEIGHT / 100), dpi=150)
    backend.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, curve in enumerate(chart.curves):
        colour = _COLOURS[place % len(_COLOURS)]
        dash = ("-", "--", ":", "-.")[place // len(_COLOURS) % len(_DASHES)]
        # A name is text, and no formula; and one that begins with _ belongs into the legend, too.
        label = "\u200b" + _NOT_XML.sub("�", _short(curve.name)).replace("$", r"\$")
        for run in _runs(curve, up.fits):
            xs, ys = zip(*run, strict=True)
            marker = "." if len(run) == 1 else ""
            axes.plot(xs, ys, dash, color=colour, linewidth=1.2, marker=marker, label=label)
            label = "_"
    if log_scale:
        axes.set_yscale("log")
    axes.set_xlabel(chart.by)
    axes.set_title(chart.metric.replace("$", r"\$"), loc="left")
    axes.grid(axis="y", color="#e4e4e4")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7)
    made = io.BytesIO()
    figure.savefig(made, format="png", bbox_inches="tight", metadata={"Software": None})
    return made.getvalue()
