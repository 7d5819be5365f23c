"""What changed from one commit to another: its state and files, and what was recorded with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from ckptvcs.history.commit import Commit
from ckptvcs.state.compare import ABSENT, Comparison, arranged, compare, same_value
from ckptvcs.state.side_by_side import sides
from ckptvcs.store import Reader

PARTS: Final = ("step", "epoch", "metrics", "config", "overrides", "environment")
"""What a commit records besides its content, in the order in which people want to know."""


class FieldChange(NamedTuple):
    """Something recorded with a commit that differs.

    Attributes:
        part: one of `PARTS`.
        name: the name in it, nested ones joined by dots; "" for a step or epoch.
        old, new: the value on each side, `compare.ABSENT` where there is none.
    """

    part: str
    name: str
    old: Any
    new: Any


@dataclass(frozen=True, slots=True)
class Diff:
    """What changed between two commits.

    Attributes:
        old, new: the commits.
        fields: what differs of step, epoch, metrics, config, overrides and environment, in that order.
        comparison: what differs in states and files, the gravest first.
        unread: subtrees that are the same in both and were skipped; what is in them is not counted as equal.
        read: bytes read from packs.
        held: logical bytes of both.
    """

    old: Commit
    new: Commit
    fields: list[FieldChange]
    comparison: Comparison
    unread: int
    read: int
    held: int

    def __bool__(self) -> bool:
        return bool(self.fields or self.comparison.changes)


def diff(
    reader: Reader,
    old: Commit,
    new: Commit,
    metrics: Callable[[Commit], Mapping[str, Any]],
    *,
    only: str | Sequence[str] | None = None,
    norms: bool = False,
    say: Callable[[str], None] | None = None,
) -> Diff:
    """Compare two commits. `metrics` gives those of a commit, notes included. With `only` the rest of what is
    recorded is left out."""
    found = sides(reader, old.tree, new.tree, only)
    comparison = compare(found.old, found.new, say, norms=norms)
    comparison.changes = arranged(comparison.changes + found.changes)
    recorded = [_recorded(commit, metrics(commit)) for commit in (old, new)]
    return Diff(
        old,
        new,
        [] if only is not None else list(_fields(*recorded)),
        comparison,
        found.unread,
        reader.bytes_read,
        sum(old.sizes.values()) + sum(new.sizes.values()),
    )


def _recorded(commit: Commit, metrics: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for part in PARTS:
        value = metrics if part == "metrics" else getattr(commit, part)
        if isinstance(value, Mapping):
            found |= {(part, name): each for name, each in flattened(value)}
        elif value is not None:
            found[part, ""] = value
    return found


def flattened(value: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """A nested config as dotted names and values; lists and empty maps are values."""
    for key, each in value.items():
        name = f"{above}.{key}" if above else str(key)
        if isinstance(each, Mapping) and each:
            yield from flattened(each, name)
        else:
            yield name, each


def _fields(old: Mapping[tuple[str, str], Any], new: Mapping[tuple[str, str], Any]) -> Iterator[FieldChange]:
    for part, name in sorted({**old, **new}, key=lambda each: PARTS.index(each[0])):
        before, after = (side.get((part, name), ABSENT) for side in (old, new))
        if not same_value(before, after):
            yield FieldChange(part, name, before, after)
