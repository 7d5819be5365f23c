"""note, best, compare, plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ckptvcs.cli import output, session, shapes
from ckptvcs.cli.options import (
    branches_option,
    complete_metric,
    complete_path,
    complete_revision,
    json_option,
    number_of,
    pairs,
    revision_argument,
)
from ckptvcs.errors import InvalidError

if TYPE_CHECKING:
    from ckptvcs.history.comparison import Comparison, Point, Side
    from ckptvcs.history.notes import Notes

# ---- note ---------------------------------------------------------------------------------------


def _numbers(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for name, text in pairs(ctx, param, texts):
        value = number_of(text)
        if value is None:
            raise click.BadParameter(f"{text!r} is not a number", ctx, param)
        found[name] = value
    return found


@click.command()
@revision_argument()
@click.option(
    "--metric", "metrics", metavar="NAME=NUMBER", multiple=True, callback=_numbers, help="A metric."
)
@click.option("--text", "texts", metavar="NAME=TEXT", multiple=True, callback=pairs, help="A text.")
@click.option("--remove", metavar="NAME", multiple=True, help="Take a note away.")
@json_option
def note(
    revision: str,
    metrics: dict[str, Any],
    texts: list[tuple[str, str]],
    remove: tuple[str, ...],
    as_json: bool,
) -> None:
    """Add metrics and texts to a commit, or show them.

    log, best, compare, plot, @best and retention read them like the commit's own. A note of the name of a
    metric that the commit has itself takes its place, until it is removed. The commit does not change.

    \b
    ckpt note main@best:val_loss --metric mmlu=0.41 --text verdict='the one for the paper'
    ckpt note 1a2b3c4d --remove verdict
    """
    with session.opened() as repo:
        commit = session.resolved(repo, revision)
        if metrics or texts or remove:
            found = repo.annotate(commit, metrics, texts=dict(texts), remove=remove)
        else:
            found = repo.notes(commit)
        own = commit.metrics
    added = {name: value for name, value in found.metrics.items() if own.get(name) is not value}
    if as_json:
        output.data({"commit": str(commit.id), **_notes_shape(found), "added": sorted(added)})
        return
    rows = [(name, output.number(value)) for name, value in added.items()]
    rows += [(name, output.clean(text)) for name, text in found.texts.items()]
    output.line(f"{output.paint(commit.id.short, fg='yellow')} {output.clean(commit.title)}".rstrip())
    output.fields((f"  {output.clean(name)}", value) for name, value in rows or [("no notes", "")])


def _notes_shape(found: Notes) -> dict[str, Any]:
    return {"metrics": found.metrics, "notes": found.texts}


# ---- best ---------------------------------------------------------------------------------------


@click.command()
@click.argument("metric", shell_complete=complete_metric)
@branches_option("Only the branches that match, as in 'sweep/*'. Can be repeated.")
@click.option("-n", "count", type=click.IntRange(min=1), default=1, metavar="N", help="The N best.")
@json_option
def best(metric: str, branches: tuple[str, ...], count: int, as_json: bool) -> None:
    """Find the best commits by a metric, over all branches.

    Whether less or more is better is what `ckpt config metric.NAME.mode` says, else the name tells: ...loss,
    ...error and ...perplexity are better small, ...acc and ...accuracy large. Metrics that notes added count.
    NaN never wins. Of equal values the oldest commit is best.

    \b
    ckpt best val_loss
    ckpt best mmlu --branches 'sweep/*' -n 5
    """
    with session.opened() as repo:
        found = repo.best(metric, branches=branches or None, n=count)
        mode = repo.metric_mode(metric)
        if as_json:
            refs = shapes.decorations(repo)
            listed = [
                {
                    "revision": each.revision,
                    "branch": each.branch,
                    "value": each.value,
                    "commit": shapes.commit_shape(repo, each.commit, refs),
                }
                for each in found
            ]
            output.data({"metric": metric, "mode": mode, "best": listed})
            return
    rows = [
        (
            output.number(each.value),
            each.commit.id.short,
            each.revision if each.branch else "",
            "" if each.commit.step is None else f"step {each.commit.step}",
            output.fitted(output.clean(each.commit.title), 40),
        )
        for each in found
    ]
    output.table(rows, right=(0,), paints={1: {"fg": "yellow"}, 2: {"fg": "green"}})


# ---- compare ------------------------------------------------------------------------------------

_CURVE = 24
"""Characters of a sparkline."""


@click.command()
@click.argument("revisions", metavar="REV...", nargs=-1, required=True, shell_complete=complete_revision)
@click.option("--metric", "metrics", metavar="NAME", multiple=True, help="Only these metrics.",
              shell_complete=complete_metric)  # fmt: skip
@json_option
def compare(revisions: tuple[str, ...], metrics: tuple[str, ...], as_json: bool) -> None:
    """Put branches side by side: configs and metrics.

    Tells what the configs of their newest commits differ in, and how their metrics went.

    REV is a branch or another revision, a range (A..B is B's line behind A), or a glob of branches. Metrics
    are told along first parents, from behind the newest commit that all of them have: the last value, the
    best, and the curve. All curves of a metric have one scale. No content is read: `ckpt diff` does that.

    \b
    ckpt compare main exp
    ckpt compare 'sweep/*' --metric val_loss
    """
    with session.opened() as repo:
        found = repo.compare(*(session.spelled(repo, text) for text in revisions))
    names = _wanted(found, metrics)
    if as_json:
        output.data(_comparison_shape(found, names))
        return
    if found.fork is None:
        output.line("no common commit: the histories are unrelated")
    else:
        title = output.clean(found.fork.title)
        step = "" if found.fork.step is None else f"  step {found.fork.step}"
        output.line(f"fork point {output.paint(found.fork.id.short, fg='yellow')} {title}{step}")
    for side in found.sides:
        if side.overrides:
            told = [f"{key}={shapes.preview(value)}" for key, value in side.overrides.items()]
            lines = output.wrapped([f"{side.name}:", "overrides", *map(output.clean, told)], 78)
            output.line("\n  ".join(lines))
    _print_config(found)
    for name in names:
        _print_metric(found, name)


def _wanted(found: Comparison, metrics: Sequence[str]) -> list[str]:
    for name in metrics:
        if name not in found.metrics:
            known = ", ".join(found.metrics) or "none"
            raise InvalidError(f"no commit there has the metric {name}", hint=f"there are: {known}")
    return [name for name in found.metrics if not metrics or name in metrics]


def _print_config(found: Comparison) -> None:
    keys = found.differing
    output.line()
    if not keys:
        output.line("the configs are equal")
        return
    output.line(output.paint("config", bold=True))
    shown = [[_value(side, key) for key in keys] for side in found.sides]
    names = [output.clean(side.name) for side in found.sides]
    by_side = [
        ("", *map(output.clean, keys)),
        *((name, *row) for name, row in zip(names, shown, strict=True)),
    ]
    by_key = list(zip(*by_side, strict=True))
    for rows in (by_key, by_side) if len(names) <= len(keys) else (by_side, by_key):
        if _table_width(rows) <= output.width():
            output.table(rows[1:], header=rows[0])
            return
    for place, key in enumerate(keys):
        output.line(f"  {output.clean(key)}")
        output.table(
            [
                (f"    {name}", output.fitted(row[place], output.width() - 6))
                for name, row in zip(names, shown, strict=True)
            ]
        )


def _value(side: Side, key: str) -> str:
    return output.clean(shapes.preview(side.config[key])) if key in side.config else "-"


def _table_width(rows: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) + 2 for column in zip(*rows, strict=True)) - 2


def _print_metric(found: Comparison, name: str) -> None:
    from ckptvcs.history.blocks import sparkline
    from ckptvcs.history.commit import in_float
    from ckptvcs.history.comparison import scale

    mode = next((s.series[name].mode for s in found.sides if name in s.series), None)
    low, high = scale(found, name)
    rows = []
    for side in found.sides:
        series = side.series.get(name)
        if series is None:
            rows.append((side.name, "-", "", "", ""))
            continue
        best = series.best
        curve = sparkline(
            [in_float(p.value) for p in series.points], _CURVE, low, high, plain=output.is_plain()
        )
        rows.append(
            (
                side.name,
                output.number(series.final.value),
                "-" if best is None else output.number(best.value),
                "" if best is None else _place(best),
                curve,
            )
        )
    output.line()
    header = (name, "last", f"best ({mode})" if mode else "best (?)", "at", "curve")
    output.table(rows, header=header, right=(1, 2), paints={0: {"fg": "green"}})


def _place(point: Point) -> str:
    return point.commit.short if point.step is None else f"step {point.step}"


def _comparison_shape(found: Comparison, names: Sequence[str]) -> dict[str, Any]:
    def point(each: Point | None) -> dict[str, Any] | None:
        return None if each is None else {"commit": str(each.commit), "step": each.step, "value": each.value}

    keys = found.differing
    return {
        "fork": None if found.fork is None else str(found.fork.id),
        "config": keys,
        "sides": [
            {
                "name": side.name,
                "tip": str(side.tip.id),
                "base": None if side.base is None else str(side.base),
                "commits": side.commits,
                "config": {key: side.config[key] for key in keys if key in side.config},
                "overrides": side.overrides,
                "metrics": {
                    name: {
                        "mode": series.mode,
                        "final": point(series.final),
                        "best": point(series.best),
                        "points": [point(each) for each in series.points],
                    }
                    for name, series in side.series.items()
                    if name in names
                },
            }
            for side in found.sides
        ],
    }


# ---- plot ---------------------------------------------------------------------------------------


@click.command()
@click.argument("metric", shell_complete=complete_metric)
@branches_option("Only the branches that match, as in 'sweep/*'. Can be repeated.")
@click.option(
    "-o",
    "--out",
    "out",
    metavar="FILE",
    required=True,
    help="FILE.svg or FILE.png.",
    shell_complete=complete_path,
)
@click.option("--log", "log_scale", is_flag=True, help="A logarithmic scale of values.")
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@json_option
def plot(
    metric: str, branches: tuple[str, ...], out: str, log_scale: bool, force: bool, as_json: bool
) -> None:
    """Draw the curves of a metric, a branch each.

    Each branch is drawn along first parents from where it was forked; what several share is drawn once, as
    part of the first of them. From left to right are steps, or commits where one has no step. PNG needs
    matplotlib (`pip install 'ckptvcs[plot]'`).

    \b
    ckpt plot val_loss --branches 'sweep/*' -o sweep.svg
    """
    from pathlib import Path

    from ckptvcs import charts

    path = Path(out)
    render = charts.renderer(path)
    with session.opened() as repo:
        chart = repo.curves(metric, branches=branches or None)
        charts.write(repo.disk, path, render(chart, log_scale=log_scale), force=force)
    points = sum(len(curve.points) for curve in chart.curves)
    if as_json:
        names = [curve.name for curve in chart.curves]
        output.data({"file": out, "metric": metric, "by": chart.by, "branches": names, "points": points})
        return
    curves = output.counted(len(chart.curves), "curve")
    output.line(f"{out}: {curves} of {metric} by {chart.by}, {output.counted(points, 'point')}")
