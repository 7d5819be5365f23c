"""The report's pictures."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.results import OURS, Results

_OURS, _OTHERS = "#1f6fb4", "#b8b8b8"


def sizes(results: Results, folder: Path) -> list[tuple[str, str]]:
    """Stored over given bytes by tool, one picture of all series. Answers (caption, file name)."""
    shown = [name for name in results.series if any(results.stored(name, r) for r in results.measured())]
    if not shown:
        return []
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.4 * rows), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, shown, strict=False):
        bars = [(rival, results.stored(name, rival)) for rival in reversed(results.measured())]
        kept = [(rival, value) for rival, value in bars if value is not None]
        colours = [_OURS if rival in OURS else _OTHERS for rival, _ in kept]
        drawn = axis.barh([rival for rival, _ in kept], [value for _, value in kept], color=colours)
        axis.bar_label(drawn, fmt="%.3f", padding=2, fontsize=7)
        axis.set_title(name, fontsize=9)
        axis.set_xlim(0, 1.2)
        axis.tick_params(labelsize=7)
    return [("Stored over given bytes, all saves of each series", _save(figure, folder / "sizes.png"))]


def growth(results: Results, folder: Path, series: str) -> list[tuple[str, str]]:
    """Bytes on disk after each save of one series."""
    figure, axis = plt.subplots(figsize=(8, 4))
    colours = plt.get_cmap("tab20").colors
    for place, rival in enumerate(results.measured()):
        facts = results.job("times", series, rival)
        if facts is None:
            continue
        stored = [size / 1e6 for size in facts["stored_after"]]
        width = 2.5 if rival in OURS else 1
        numbers = range(1, len(stored) + 1)
        axis.plot(numbers, stored, label=rival, linewidth=width, marker=".", color=colours[place])
        axis.set_xticks(numbers)
    if not axis.lines:
        plt.close(figure)
        return []
    axis.set_xlabel("saves")
    axis.set_ylabel("MB on disk")
    axis.set_title(series, fontsize=9)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return [(f"Disk use after each save of {series}", _save(figure, folder / f"growth_{series}.png"))]


def intervals(results: Results, folder: Path) -> list[tuple[str, str]]:
    """Stored over given bytes of ours against the steps between saves."""
    series = sorted((n for n in results.series if n.startswith("intervals_")), key=_gap)
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for rival in results.measured():
        points = [(_gap(name), results.stored(name, rival)) for name in series]
        kept = [(gap, value) for gap, value in points if value is not None]
        if kept and (rival in OURS or rival == "moonclip"):
            axis.plot([gap for gap, _ in kept], [value for _, value in kept], marker="o", label=rival)
    if not axis.lines:
        plt.close(figure)
        return []
    axis.set_xscale("log")
    axis.set_ylim(0, 1)
    axis.set_xlabel("optimizer steps between saves")
    axis.set_ylabel("stored / given")
    axis.legend(fontsize=8)
    return [("Size against the distance between saves", _save(figure, folder / "intervals.png"))]


def times(results: Results, folder: Path, series: str) -> list[tuple[str, str]]:
    """Later save and restore of one series as ratios to the reference."""
    rivals = [name for name in reversed(results.measured()) if results.ratio(series, name, "later")]
    if not rivals:
        return []
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.35 * len(rivals) + 1.2), sharey=True)
    for axis, operation, title in zip(axes, ("later", "restore"), ("later save", "restore"), strict=True):
        values = [results.ratio(series, name, operation) or 0 for name in rivals]
        drawn = axis.barh(rivals, values, color=[_OURS if name in OURS else _OTHERS for name in rivals])
        axis.bar_label(drawn, fmt="%.2f", padding=2, fontsize=7)
        axis.axvline(1, color="black", linewidth=0.7)
        axis.margins(x=0.12)
        axis.set_title(f"{title}, {series}: times the reference", fontsize=9)
        axis.tick_params(labelsize=7)
    return [
        (f"Times of {series} over those of torch.save and torch.load", _save(figure, folder / "times.png"))
    ]


def _gap(series: str) -> int:
    return int(series.rpartition("_")[2])


def _save(figure: plt.Figure, file: Path) -> str:
    figure.tight_layout()
    # No date or version in the file, so that the same figures make the same picture.
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return file.name
