"""What was said of a commit after it was made: metrics and texts, dropped parts, pins.

A note is a number (a metric, which adds to the commit's own or takes the place of one) or a text. Both share
their names. The commit itself never changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from ckptvcs.errors import InvalidError, NotFoundError
from ckptvcs.history.commit import Commit, is_metric_name, plain_metrics
from ckptvcs.store import Note, Store
from ckptvcs.store.journal import LONGEST_KEY

LONGEST_TEXT: Final = 64 << 10
"""UTF-8 bytes of a text."""


class Notes(NamedTuple):
    """What is known of a commit beside what it holds.

    Attributes:
        metrics: its own with those that notes added or replaced.
        texts: notes that are texts.
        dropped: components that retention took from its payload; () means all of it, None nothing.
        pinned: whether retention must keep it.
    """

    metrics: dict[str, Any]
    texts: dict[str, str]
    dropped: tuple[str, ...] | None
    pinned: bool


def of(store: Store, commit: Commit) -> Notes:
    """The notes of a commit, as they are now."""
    with store.snapshot() as snapshot:
        found = snapshot.notes(commit.id)
        dropped = snapshot.drops(commit.id)
        pinned = snapshot.is_pinned(commit.id)
    numbers = {key: value for key, value in found.items() if type(value) in (int, float)}
    texts = {key: str(value) for key, value in found.items() if key not in numbers}
    return Notes({**commit.metrics, **numbers}, texts, dropped, pinned)


def changes(
    commit: Commit,
    now: Notes,
    metrics: Mapping[str, Any] | None,
    texts: Mapping[str, str] | None,
    remove: Iterable[str],
) -> list[Note]:
    """The operations that add, replace and take away notes. InvalidError for names and values that cannot be
    notes; NotFoundError for the removal of one that is not there."""
    numbers = plain_metrics(metrics)
    said = dict(texts or {})
    gone = [remove] if isinstance(remove, str) else list(remove)
    for name, text in said.items():
        _check_text(name, text)
        if name in numbers or name in commit.metrics:
            raise InvalidError(f"{name} is a metric, and cannot be a text too", hint="use another name")
    for name in (*numbers, *said):
        if len(name.encode()) > LONGEST_KEY:
            raise InvalidError(f"{name[:40] + '…'!r} cannot be the name of a note: it is too long")
    for name in gone:
        if name in numbers or name in said:
            raise InvalidError(f"{name} is to be set and removed at once")
        _check_there(commit, now, name)
    new = [Note(commit.id, name, value) for name, value in (*numbers.items(), *said.items())]
    found = [*new, *(Note(commit.id, name, None) for name in dict.fromkeys(gone))]
    if not found:
        raise InvalidError("there is nothing to note", hint="give a metric, a text, or what to remove")
    return found


def _check_text(name: object, text: object) -> None:
    if not is_metric_name(name):
        raise InvalidError(f"{name!r} cannot be the name of a note", hint="use a name like verdict")
    if not isinstance(text, str):
        raise InvalidError(f"the text {name} is a {type(text).__name__}", hint="numbers are metrics")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidError(f"the text {name} is not valid text") from None
    if size > LONGEST_TEXT:
        raise InvalidError(f"the text {name} has {size:,} bytes", hint=f"{LONGEST_TEXT:,} are the most")


def _check_there(commit: Commit, now: Notes, name: str) -> None:
    if name in now.texts:
        return
    if name in commit.metrics and now.metrics.get(name) is commit.metrics[name]:
        raise InvalidError(
            f"{name} is a metric of the commit itself, and commits never change",
            hint=f"a note takes its place: `ckpt note {commit.id.short} --metric {name}=nan`",
        )
    if name not in now.metrics:
        raise NotFoundError(f"the commit {commit.id.short} has no note {name}")


def dropped_words(dropped: tuple[str, ...] | None) -> str:
    """How a log says what retention took: "", "dropped", "dropped: optimizer, rng"."""
    if dropped is None:
        return ""
    return f"dropped: {', '.join(dropped)}" if dropped else "dropped"
