"""The one module that prints: lines, tables, graphs, JSON, errors; and how numbers and times read.

Text goes to standard output, warnings and errors to standard error. What comes out of a repository
(messages, names, paths) is cleaned of control characters before a terminal sees it. Colours appear on
terminals only, or as `--color` and `NO_COLOR` say. rich is imported when something needs it, no sooner.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import click

_AGES: Final = (
    (60, "second", 1),
    (3600, "minute", 60),
    (86_400, "hour", 3600),
    (14 * 86_400, "day", 86_400),
    (60 * 86_400, "week", 7 * 86_400),
    (730 * 86_400, "month", 30.44 * 86_400),
    (math.inf, "year", 365.25 * 86_400),
)

# ---- lines --------------------------------------------------------------------------------------


def line(text: str = "") -> None:
    """A line of output, or several. Whatever else than a style would steer a terminal is escaped."""
    if not text.isprintable():
        parts = _STYLES.split(text)
        parts[::2] = [
            "".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in part) for part in parts[::2]
        ]
        text = "".join(parts)
    click.echo(text)


_STYLES: Final = re.compile("(\x1b\\[[0-9;]*m)")


def data(value: Mapping[str, Any]) -> None:
    """The answer to `--json`: one object, ASCII, with numbers that JSON does not know as text."""
    click.echo(json.dumps(_for_json(value), indent=2, allow_nan=False))


def note(text: str) -> None:
    """Something worth knowing beside the result, on standard error."""
    click.echo(clean(text), err=True)


def warning(text: str) -> None:
    """Something that did not stop the command, on standard error."""
    click.echo(f"{paint('warning:', fg='yellow', err=True)} {clean(text)}", err=True)


def error(message: str, hint: str | None, *, color: bool | None = None) -> None:
    """What stopped the command, in a line, and what to do about it in another."""
    head, tail = click.style("error:", fg="red", bold=True), click.style("hint:", fg="cyan")
    click.echo(f"{head} {clean(message)}", err=True, color=color)
    if hint:
        click.echo(f"{tail} {clean(hint)}", err=True, color=color)


def error_data(code: str, message: str, hint: str | None, exit: int) -> None:
    """What stopped a command with `--json`."""
    data({"error": {"code": code, "message": message, "hint": hint, "exit": exit}})


def paint(text: str, *, err: bool = False, **style: Any) -> str:
    """Text in a style, where colours are wanted. `err` says that it goes to standard error."""
    return click.style(text, **style) if _colored(err) else text


def _colored(err: bool) -> bool:
    context = click.get_current_context(silent=True)
    if context is not None and context.color is not None:
        return context.color
    return (sys.stderr if err else sys.stdout).isatty()


def clean(text: str) -> str:
    """Text in one line, with control characters escaped: what a repository says may not steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(char: str) -> str:
    if 0xDC80 <= ord(char) <= 0xDCFF:  # a byte of a file name that is no UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


def _for_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _for_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(each) for each in value]
    if isinstance(value, bytes):
        return value.hex()
    return value


# ---- how values read ----------------------------------------------------------------------------


def size(count: float) -> str:
    """A byte count: 1.2 MB."""
    from ckptvcs.history.commit import in_bytes

    return in_bytes(count)


def counted(count: int, noun: str) -> str:
    """1 file, 2 files, 1,000 commits."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{count:,} {noun if count == 1 else plural}"


def number(value: Any) -> str:
    """A metric or another number, to six significant digits."""
    return f"{value:.6g}" if isinstance(value, float) else clean(str(value))


def age(time_ns: int, now_ns: int) -> str:
    """How long ago, in the largest fitting unit: 3 hours ago."""
    seconds = (now_ns - time_ns) / 1e9
    if seconds < -60:
        return "in the future"
    if seconds < 2:
        return "just now"
    for limit, unit, length in _AGES:
        if seconds < limit:
            return f"{counted(int(seconds / length), unit)} ago"
    return when(time_ns)


def when(time_ns: int) -> str:
    """A point in time, in the local zone."""
    return _datetime(time_ns).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")


def iso(time_ns: int) -> str:
    """A point in time for `--json`: ISO 8601, UTC, to the microsecond."""
    return _datetime(time_ns).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _datetime(time_ns: int) -> datetime.datetime:
    start = datetime.datetime.fromtimestamp(0, datetime.UTC)
    try:
        return start + datetime.timedelta(microseconds=time_ns // 1000)
    except OverflowError:
        return datetime.datetime.max.replace(tzinfo=datetime.UTC)


def duration(seconds: float) -> str:
    """A length of time as `--grace` reads it: 24 h, 7 d, 90 s."""
    for length, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length and seconds % length == 0 and (unit != "d" or seconds > 86_400):
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:g} s"


def wrapped(words: Sequence[str], width: int, gap: str = "  ") -> list[str]:
    """Words in as few lines as fit the width."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(gap) + len(word) <= width:
            lines[-1] += gap + word
        else:
            lines.append(word)
    return lines


def fitted(text: str, room: int) -> str:
    """Text cut to so many columns, on a terminal only: there a long line would break a graph."""
    if len(text) <= room or not sys.stdout.isatty():
        return text
    return text[: max(room, 20) - 1] + "…"


def is_plain() -> bool:
    """Whether block characters have no place: the encoding of standard output lacks them."""
    try:
        "▁×█".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return True
    return False


def width() -> int:
    """Columns of the terminal, or 80."""
    return shutil.get_terminal_size((80, 24)).columns


# ---- tables and graphs --------------------------------------------------------------------------


def table(
    rows: Iterable[Sequence[str]],
    *,
    header: Sequence[str] | None = None,
    right: Sequence[int] = (),
    paints: Mapping[int, Mapping[str, Any]] | None = None,
) -> None:
    """Aligned columns, two blanks apart. `right` names columns of numbers, `paints` gives columns a style.

    Lines are as long as they need to be, so that nothing is cut when they are searched or piped.
    """
    cells = [[clean(cell) for cell in row] for row in rows]
    titles = [list(header)] if header and cells else []
    widths = [max(map(_cells, column)) for column in zip(*titles, *cells, strict=True)]
    for place, row in enumerate(titles + cells):
        parts = []
        for i, cell in enumerate(row):
            blank = " " * (widths[i] - _cells(cell))
            if place < len(titles):
                shown = paint(cell, bold=True)
            else:
                shown = paint(cell, **paints[i]) if paints and i in paints and cell else cell
            parts.append(blank + shown if i in right else shown + blank)
        line("  ".join(parts).rstrip())


def _cells(text: str) -> int:
    """Columns a text takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def fields(items: Iterable[tuple[str, str]]) -> None:
    """`name  value` lines with the names in a column."""
    pairs = list(items)
    longest = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        line(f"{paint(name.ljust(longest), fg='cyan')}  {value}".rstrip())


def nested(values: Mapping[str, Any], indent: str = "  ") -> None:
    """A nested mapping, a key a line."""
    for key, value in values.items():
        name = f"{indent}{paint(clean(str(key)) + ':', fg='cyan')}"
        if isinstance(value, Mapping) and value:
            line(name)
            nested(value, indent + "  ")
        else:
            line(f"{name} {clean(_shown(value))}")


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value if value.strip() == value and value else repr(value)
    return json.dumps(_for_json(value), ensure_ascii=False)


def graph_row(
    row: tuple[str, Sequence[str], str, Sequence[str], int], texts: Callable[[int], list[str]]
) -> None:
    """A commit with its part of the graph: (node, fan, fill, join, width) of `history.layout.Row`.

    `texts` gives the commit's lines for the width that is left.
    """
    node, fan, fill, join, wide = row
    if not node:  # a hidden commit: edges alone
        for drawn in (*fan, *join):
            line(_edges(drawn, 0))
        return
    words = texts(width() - wide - 1)
    beside = [node, *fan] + [fill] * (len(words) - 1 - len(fan))
    words += [""] * (len(beside) - len(words))
    for drawn, text in zip(beside, words, strict=True):
        line(f"{_edges(drawn, wide)} {text}".rstrip())
    for drawn in join:
        line(_edges(drawn, 0))


def _edges(drawn: str, wide: int) -> str:
    """A graph line, padded; the node stands out."""
    padded = drawn.ljust(wide)
    return padded.replace("*", paint("*", fg="yellow", bold=True))


# ---- waiting ------------------------------------------------------------------------------------


@contextlib.contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """Show that something is going on, on a terminal only. Gives a function that counts what is done."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    done = 0
    with Console(stderr=True).status(text) as status:

        def count(_: str) -> None:
            nonlocal done
            done += 1
            status.update(f"{text} ({done:,})")

        yield count
