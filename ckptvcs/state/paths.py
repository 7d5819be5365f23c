r"""Names of places in a state, and the patterns that select them.

A path joins component names with "/". Inside a name ``\`` is written ``\\`` and "/" is ``\/``. Keys that
are not text, and the indexes of lists and tuples, are written as literals: ``0``, ``True``, ``1.5``,
``(1, 2)``; other keys stand in angle brackets. A text key that would read as one of these, or is
empty, gets the prefix ``\s``: key 0 is ``0`` and key "0" is ``\s0``.

A pattern selects subtrees. ``*``, ``?`` and ``[...]`` match within one component, ``**`` across them.
"""

from __future__ import annotations

import difflib
import enum
import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, TypeAlias

from ckptvcs.errors import NotFoundError

_LITERAL: Final = re.compile(
    r"(?:None|True|False|[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+|inf|nan)j?|[(<].*|b['\"].*|\\s.*)\Z",
    re.DOTALL,
)
_SPLIT: Final = re.compile(r"((?:[^/\\]|\\.?)*)(?:/|\Z)", re.DOTALL)
_LITERAL_TYPES: Final = (type(None), bool, int, float, complex, bytes, tuple)


def name(key: object) -> str:
    """The component name of a dict key or an index."""
    if type(key) is str:
        text = key.replace("\\", "\\\\").replace("/", "\\/") if "\\" in key or "/" in key else key
        return text if key and not _LITERAL.match(key) else "\\s" + text
    if isinstance(key, enum.Enum):
        text = f"<{key}>"
    elif type(key) in _LITERAL_TYPES:
        text = repr(key)
    else:
        text = f"<{key}>"
    return text.replace("\\", "\\\\").replace("/", "\\/")


def key(component: str) -> Any:
    """A key with this component name: the text, or the None, bool or number that it is a literal of."""
    if component in _WORDS:
        return _WORDS[component]
    try:
        return int(component)
    except ValueError:
        text = component.removeprefix("\\s") if component.startswith("\\s") else component
        return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


_WORDS: Final = {"None": None, "True": True, "False": False}


def join(parent: str, component: str) -> str:
    """The path of `component` (already a name) below `parent`; the state itself is ""."""
    return f"{parent}/{component}" if parent else component


def split(path: str) -> tuple[str, ...]:
    """The component names of a path or pattern."""
    return tuple(found[1] for found in _SPLIT.finditer(path) if found[1])


class _Pattern:
    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = False


class _Component:
    """One component of a pattern: equal to a name, or a glob over it."""

    __slots__ = ("glob", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.glob = re.compile(fnmatch.translate(text)) if any(sign in text for sign in "*?[") else None

    def matches(self, component: str, key: object) -> bool:
        # A text key may be given without its `\s`: "0" finds the parameter names of a Sequential.
        if self.text == component or (type(key) is str and self.text == key):
            return True
        return self.glob is not None and self.glob.match(component) is not None


_ANY: Final = _Component("**")
_Tail: TypeAlias = tuple[_Pattern, tuple[_Component, ...]]


def _alternatives(components: Sequence[str]) -> Iterator[tuple[_Component, ...]]:
    """What a pattern can mean: a `**` inside a component (`**weight`) stays within it or crosses several."""
    if not components:
        yield ()
        return
    head = components[0]
    cut = head.find("**")
    starts: list[tuple[_Component, ...]]
    if head == "**":
        starts = [(_ANY,)]
    elif cut < 0:
        starts = [(_Component(head),)]
    else:
        before, after = head[:cut], head[cut:].lstrip("*")
        across = [_Component(before + "*")] * bool(before) + [_ANY] + [_Component("*" + after)] * bool(after)
        starts = [(_Component(f"{before}*{after}"),), tuple(across)]
    for start in starts:
        for rest in _alternatives(components[1:]):
            yield start + rest


class Selection:
    """Where in a tree a set of patterns stands. `step` goes one component down.

    Attributes:
        whole: everything from here on is selected.
    """

    __slots__ = ("_tails", "whole")

    def __init__(self, tails: Iterable[_Tail], whole: bool = False) -> None:
        self.whole = whole
        self._tails: list[_Tail] = []
        for pattern, tail in tails:
            at = 0
            while True:  # `**` matches nothing as well, so what follows it may begin here
                self._tails.append((pattern, tail[at:]))
                if at == len(tail) or tail[at] is not _ANY:
                    break
                at += 1
        for pattern, tail in self._tails:
            if not tail:
                pattern.matched = True
                self.whole = True

    def step(self, key: object) -> Selection | None:
        """The selection below `key`, or None if nothing there can match."""
        return self if self.whole and not self._tails else self.step_named(name(key), key)

    def step_named(self, component: str, key: object = None) -> Selection | None:
        """Like `step`, where only the component's name is known."""
        tails: list[_Tail] = []
        for pattern, tail in self._tails:
            if not tail:
                continue
            if tail[0] is _ANY:
                tails.append((pattern, tail))
            elif tail[0].matches(component, key):
                tails.append((pattern, tail[1:]))
        return Selection(tails, self.whole) if tails or self.whole else None


EVERYTHING: Final = Selection((), whole=True)


class Patterns:
    """The value of `only=`: a pattern, several, or None for everything."""

    def __init__(self, only: str | Sequence[str] | None) -> None:
        texts = [only] if isinstance(only, str) else only
        self._patterns = None if texts is None else [_Pattern(text) for text in texts]

    def start(self) -> Selection:
        """The selection at the top of the state."""
        if self._patterns is None:
            return EVERYTHING
        return Selection(
            [(pattern, tail) for pattern in self._patterns for tail in _alternatives(split(pattern.text))]
        )

    @property
    def complete(self) -> bool:
        """Whether each pattern has matched something."""
        return all(pattern.matched for pattern in self._patterns or ())

    def check(self, known: Iterable[str]) -> None:
        """NotFoundError, with near names out of `known`, if a pattern has matched nothing."""
        lost = [pattern.text for pattern in self._patterns or () if not pattern.matched]
        if lost:
            near = nearest(lost[0], known)
            raise NotFoundError(
                f"nothing in this commit matches {', '.join(map(repr, lost))}",
                hint=f"near: {', '.join(near)}" if near else "`ckpt ls REV` lists all paths",
            )


def nearest(wanted: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Up to `n` known paths that look like `wanted`."""
    found = sorted(set(known))
    if len(found) > 5000:  # difflib is slow; the start is what people get right most often
        found = [path for path in found if path[:2] == wanted[:2]][:5000]
    return difflib.get_close_matches(wanted, found, n=n, cutoff=0.5)


def matches(pattern: str, path: str) -> bool:
    """Whether `path` lies in what `pattern` selects."""
    at: Selection | None = Patterns(pattern).start()
    for component in split(path):
        if at is None or at.whole:
            break
        at = at.step_named(component)
    return at is not None and at.whole
