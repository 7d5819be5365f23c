"""Grids of overrides, and the branch for each of their points. Pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from ckptvcs.errors import InvalidError
from ckptvcs.history import refs
from ckptvcs.state.overrides import checked, value_of

_UNFIT: Final = re.compile(r"[^A-Za-z0-9._+-]+")


class Point(NamedTuple):
    """A point of a grid.

    Attributes:
        branch: the name of its branch: of each override the last component of its name, and the value as it
            was written.
        overrides: name to value.
        texts: name to value as it was written.
    """

    branch: str
    overrides: dict[str, Any]
    texts: dict[str, str]


def grid(axes: Sequence[tuple[str, str]], prefix: str, fixed: Mapping[str, str]) -> list[Point]:
    """The points of a grid, the last axis fastest.

    Args:
        axes: name and comma-separated values of each; a comma inside brackets or quotes separates nothing.
        prefix: what the branches' names begin with, before a slash.
        fixed: overrides that all points share.

    InvalidError for an axis without values or given twice, and if two points would have the same name.
    """
    names = [name for name, _ in axes]
    for name in names:
        if names.count(name) > 1 or name in fixed:
            raise InvalidError(f"{name} is given twice", hint="one --grid for each name")
    values = {name: _values(name, text) for name, text in axes}
    shorts = _short_names(names)
    points = []
    for chosen in itertools.product(*values.values()):
        texts = {**fixed, **dict(zip(names, chosen, strict=True))}
        label = ",".join(
            f"{shorts[name]}={_UNFIT.sub('_', text)}" for name, text in zip(names, chosen, strict=True)
        )
        branch = refs.check_name(f"{prefix}/{label}", "branch")
        points.append(Point(branch, checked({k: value_of(v) for k, v in texts.items()}), texts))
    found = [point.branch for point in points]
    for branch in found:
        if found.count(branch) > 1:
            raise InvalidError(f"two points would be called {branch}", hint="give values that differ in name")
    return points


def _values(name: str, text: str) -> list[str]:
    found, depth, quote, current = list[str](), 0, "", ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "[(":
            depth += 1
        elif char in "])":
            depth -= 1
        if char == "," and not depth and not quote:
            found.append(current)
            current = ""
        else:
            current += char
    found.append(current)
    found = [each.strip() for each in found]
    if not all(found):
        raise InvalidError(
            f"--grid {name}={text} has an empty value", hint="as in --grid optimizer.lr=1e-4,3e-4"
        )
    return found


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """The last component of each name; the whole name where two would be the same."""
    short = {name: name.replace("/", ".").rpartition(".")[2] for name in names}
    counts = list(short.values())
    return {name: each if counts.count(each) == 1 else name.replace("/", ".") for name, each in short.items()}
