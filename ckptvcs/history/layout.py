r"""Drawing a history as a graph of ASCII characters, like `git log --graph`. Pure logic.

Commits come in topological order, children before parents. Every line of work that is still waiting for
a commit has a column of two characters. Between two commits, edges fan out to the right (a merge's further
parents) and then join towards the left (lines that wait for the same commit):

    *        a merge of two parents
    |\
    | *      the second parent
    |/
    *        the common parent of both
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """The lines that belong to one commit, without trailing blanks.

    Attributes:
        node: the line with the commit's `*`; its first text goes beside it. "" for a hidden commit, which
            has no texts.
        fan: lines below it that open columns for a merge's other parents; texts may go beside them.
        fill: a line to repeat for texts that are left.
        join: lines that lead to the next commit; nothing goes beside them.
        width: of the widest of the first three.
    """

    node: str
    fan: tuple[str, ...]
    fill: str
    join: tuple[str, ...]
    width: int


def draw(
    commits: Iterable[tuple[Hashable, Sequence[Hashable], bool]], widest: int | None = None
) -> Iterator[Row]:
    """A row for each (commit, parents, shown), in the order given, which must have children before parents.

    A commit that is not shown only connects others: its child's line goes on to its parents. Lines of more
    than `widest` characters are cut, and end in `~`; a commit that stands further right stands behind it.
    """
    columns: list[Hashable] = []
    for commit, parents, shown in commits:
        if commit not in columns:
            if not shown:  # nobody waits for it, and nobody shall wait for its parents
                yield Row("", (), "", (), 0)
                continue
            columns.append(commit)
        at = columns.index(commit)
        node = _line(["*" if i == at else "|" for i in range(len(columns))]) if shown else ""
        wanted = list(dict.fromkeys(parents))
        fan = []
        for _ in wanted[1:]:
            fan.append(_fan(len(columns), at))
            columns.insert(at + 1, None)
        if wanted:
            columns[at : at + len(wanted)] = wanted
            fill = _line(["|"] * len(columns))
            join: list[str] = []
        else:
            fill = _line([" " if i == at else "|" for i in range(len(columns))])
            join = _closed(len(columns), at)
            del columns[at]
        while (pair := _doubled(columns)) is not None:
            left, right = pair
            join += _joined(len(columns), left, right)
            del columns[right]
        lines = [_cut(line, widest) for line in (node, fill, *fan)]
        below = tuple(_cut(line, widest) for line in join)
        yield Row(lines[0], tuple(lines[2:]), lines[1], below, max(map(len, lines)))


def _cut(line: str, widest: int | None) -> str:
    if widest is None or len(line) <= widest:
        return line
    place = line.find("*")
    return line[: widest - 1].rstrip() + "~" if place < widest - 1 else f"{line[: (widest - 3) & ~1]}~ *"


def _doubled(columns: list[Hashable]) -> tuple[int, int] | None:
    """The first two columns that wait for the same commit."""
    for right, id in enumerate(columns):
        left = columns.index(id)
        if left < right:
            return left, right
    return None


def _line(columns: Sequence[str]) -> str:
    return " ".join(columns).rstrip()


def _canvas(columns: int, straight: int) -> list[str]:
    """A line as characters, with the first `straight` columns drawn straight down."""
    canvas = [" "] * (2 * columns + 1)
    canvas[0 : 2 * straight : 2] = "|" * straight
    return canvas


def _fan(columns: int, at: int) -> str:
    """One more column right of `at`: an edge goes out from there, those further right make room."""
    canvas = _canvas(columns, at + 1)
    for i in range(at, columns):
        canvas[2 * i + 1] = "\\"
    return "".join(canvas).rstrip()


def _closed(columns: int, at: int) -> list[str]:
    """Column `at` has ended; those right of it move one to the left."""
    if at + 1 == columns:
        return []
    canvas = _canvas(columns, at)
    for i in range(at + 1, columns):
        canvas[2 * i - 1] = "/"
    return ["".join(canvas).rstrip()]


def _joined(columns: int, left: int, right: int) -> list[str]:
    """Column `right` goes over into `left`, across those between; those right of it move one to the left."""
    lines = []
    if right - left > 1:
        canvas = _canvas(columns, columns)
        canvas[2 * right] = " "
        canvas[2 * right - 1] = "/"
        for i in range(left + 1, right - 1):
            canvas[2 * i + 1] = "_"
        # The columns further right stand still on this line.
        lines.append("".join(canvas).rstrip())
    canvas = _canvas(columns, right)
    canvas[2 * left + 1] = "/"
    for i in range(right + 1, columns):
        canvas[2 * i - 1] = "/"
    lines.append("".join(canvas).rstrip())
    return lines
