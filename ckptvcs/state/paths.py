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
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from ckptvcs.errors import InvalidError, NotFoundError

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

    def __init__(self, text: str, plain: bool = False) -> None:
        self.text = text
        is_glob = not plain and any(sign in text for sign in "*?[")
        self.glob = re.compile(fnmatch.translate(text)) if is_glob else None

    def matches(self, component: str, key: object) -> bool:
        # A text key may be given without its `\s`: "0" finds the parameter names of a Sequential.
        if self.text == component or (type(key) is str and self.text == key):
            return True
        return self.glob is not None and self.glob.match(component) is not None


class _State:
    """Where matching stands within a pattern. A pattern is a graph of as many states as it has parts.

    Attributes:
        exits: (component that leads on, state behind it).
        beyond: the state behind a `**`, which may match nothing; then any component leads back here.
        final: the whole pattern has matched.
    """

    __slots__ = ("beyond", "exits", "final", "pattern")

    def __init__(
        self,
        pattern: _Pattern,
        exits: Sequence[tuple[_Component, _State]] = (),
        beyond: _State | None = None,
        final: bool = False,
    ) -> None:
        self.pattern = pattern
        self.exits = exits
        self.beyond = beyond
        self.final = final


def _compiled(pattern: _Pattern) -> _State:
    """The start of a pattern. A `**` inside a component (`**weight`) stays within it or crosses several."""
    state = _State(pattern, final=True)
    for head in reversed(split(pattern.text)):
        cut = head.find("**")
        if head == "**":
            state = _State(pattern, beyond=state)
        elif cut < 0:
            state = _State(pattern, [(_Component(head), state)])
        else:
            before, after = head[:cut], head[cut:].lstrip("*")
            across = _State(pattern, [(_Component("*" + after), state)]) if after else state
            across = _State(pattern, beyond=across)
            within = (_Component(f"{before}*{after}"), state)
            state = _State(pattern, [within, (_Component(before + "*"), across)]) if before else across
    return state


class Selection:
    """Where in a tree a set of patterns stands. `step` goes one component down.

    Attributes:
        whole: everything from here on is selected.
    """

    __slots__ = ("_states", "whole")

    def __init__(self, states: Iterable[_State], whole: bool = False) -> None:
        self.whole = whole
        self._states: dict[_State, None] = {}
        waiting = list(states)
        while waiting:  # `**` matches nothing as well, so what follows it may begin here
            state = waiting.pop()
            if state in self._states:
                continue
            self._states[state] = None
            if state.beyond is not None:
                waiting.append(state.beyond)
            if state.final:
                state.pattern.matched = True
                self.whole = True

    def step(self, key: object) -> Selection | None:
        """The selection below `key`, or None if nothing there can match."""
        return self if self.whole and not self._states else self.step_named(name(key), key)

    def step_named(self, component: str, key: object = None) -> Selection | None:
        """Like `step`, where only the component's name is known."""
        states: list[_State] = []
        for state in self._states:
            if state.beyond is not None:
                states.append(state)
            states += [below for wanted, below in state.exits if wanted.matches(component, key)]
        return Selection(states, self.whole) if states or self.whole else None


EVERYTHING: Final = Selection((), whole=True)


class _AllBut(Selection):
    """Everything below the top but what lies under some names."""

    __slots__ = ("_names", "_raw")

    def __init__(self, names: frozenset[str], raw: bool) -> None:
        super().__init__(())
        self._names = names
        self._raw = raw

    def step_named(self, component: str, key: object = None) -> Selection | None:
        return None if (key if self._raw else component) in self._names else EVERYTHING


def all_but(names: Iterable[str], *, files: bool = False) -> Selection:
    """The selection of all that lies in none of these components; of everything without names. Components
    of files are called like the files."""
    left_out = frozenset(names)
    return _AllBut(left_out, files) if left_out else EVERYTHING


def exactly(components: Sequence[str]) -> Selection:
    """The selection of one path, whose components stand for themselves and not for patterns."""
    pattern = _Pattern("")
    state = _State(pattern, final=True)
    for component in reversed(components):
        state = _State(pattern, [(_Component(component, plain=True), state)])
    return Selection([state])


class Patterns:
    """The value of `only=`: a pattern, several, or None for everything."""

    def __init__(self, only: str | Sequence[str] | None) -> None:
        self._patterns = None if only is None else [_Pattern(text) for text in _texts(only)]

    def start(self) -> Selection:
        """The selection at the top of the state."""
        if self._patterns is None:
            return EVERYTHING
        return Selection([_compiled(pattern) for pattern in self._patterns])

    @property
    def complete(self) -> bool:
        """Whether each pattern has matched something."""
        return all(pattern.matched for pattern in self._patterns or ())

    def check(self, known: Iterable[str]) -> None:
        """NotFoundError, with near names out of `known`, if a pattern has matched nothing."""
        lost = [pattern.text for pattern in self._patterns or () if not pattern.matched]
        if lost:
            raise unmatched(lost, known, "this commit")


def unmatched(patterns: Sequence[str], known: Iterable[str], where: str) -> NotFoundError:
    """What to raise when patterns match none of the `known` paths; its hint has near ones."""
    near = nearest(patterns[0], known)
    return NotFoundError(
        f"nothing in {where} matches {', '.join(map(repr, patterns))}",
        hint=f"near: {', '.join(near)}" if near else "`ckpt ls` lists all paths",
    )


def _texts(only: object) -> list[str]:
    found: list[Any] = list(only) if isinstance(only, Iterable) and not isinstance(only, str) else [only]
    for text in found:
        if not isinstance(text, str):
            raise InvalidError(
                f"a pattern is text, not a {type(text).__name__}",
                hint="only= takes a pattern, as in 'model/**', or a list of them",
            )
    return found


def nearest(wanted: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Up to `n` known paths that look like `wanted`."""
    found = sorted(set(known))
    if len(found) > 5000:  # difflib is slow; the start is what people get right most often
        found = [path for path in found if path[:2] == wanted[:2]][:5000]
    return difflib.get_close_matches(wanted, found, n=n, cutoff=0.5)


def matches(pattern: str, path: str) -> bool:
    """Whether `path` lies in what `pattern` selects."""
    return matcher(pattern)(path)


def matcher(only: str | Sequence[str]) -> Callable[[str], bool]:
    """Tells which paths lie in what a pattern or several select."""
    start = Patterns(only).start()

    def selected(path: str) -> bool:
        at: Selection | None = start
        for component in split(path):
            if at is None or at.whole:
                break
            at = at.step_named(component)
        return at is not None and at.whole

    return selected
