"""What a pickle would make, without making it.

A pickle is a program for a small machine with a stack and a memo. This machine runs it on descriptions: where
the real one would import a name it notes the name, where the real one would call something it notes what
would be called with what. So nothing from a file runs, and what is not understood still has its parts.
Operations, memory and time are in proportion to the pickle's length, which is bounded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final

MAX_BYTES: Final = 32 << 20
_MOST_STEPS: Final = 2_000_000


class OddError(Exception):
    """The pickle is damaged, older than protocol 2, or larger than is looked at."""


class Name:
    """A name that would be imported: a class, a function, a dtype."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class Pairs:
    """A dict: its keys and values in order, keys of any kind and maybe repeated."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[tuple[Any, Any]] = []


class Items:
    """A list, set or frozen set."""

    __slots__ = ("items",)

    def __init__(self, items: list[Any]) -> None:
        self.items = items


class Call:
    """What a call would give: of what, with which arguments, and what would be put into it afterwards."""

    __slots__ = ("arguments", "callee", "items", "pairs", "state")

    def __init__(self, callee: Any, arguments: Any) -> None:
        self.callee = callee
        self.arguments = arguments
        self.items: list[Any] = []
        self.pairs: list[tuple[Any, Any]] = []
        self.state: Any = None

    @property
    def name(self) -> str:
        """What is called, as "module.name"; "" if that is no plain name."""
        return self.callee.text if type(self.callee) is Name else ""


class Persistent:
    """Something outside the pickle, by the id it has there."""

    __slots__ = ("id",)

    def __init__(self, id: Any) -> None:
        self.id = id


_MARK: Final = object()


def described(data: bytes) -> Any:
    """The value that a pickle describes: None, bool, int, float, str, bytes, tuples, and the classes here.

    Values may be shared, and hold themselves. OddError for whatever is no whole pickle.
    """
    if len(data) > MAX_BYTES:
        raise OddError
    try:
        return _Machine(data).run()
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError, struct.error):
        raise OddError from None


class _Machine:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._encoded = 0

    def run(self) -> Any:
        data, steps = self._data, 0
        while True:
            steps += 1
            if steps > _MOST_STEPS:
                raise OddError
            code = data[self._at]
            self._at += 1
            if code == _STOP:
                return self._stack.pop()
            _STEPS[code](self)

    # -- reading ----------------------------------------------------------------------------------

    def _take(self, length: int) -> bytes:
        found = self._data[self._at : self._at + length]
        if len(found) != length:
            raise OddError
        self._at += length
        return found

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _line(self) -> str:
        end = self._data.index(b"\n", self._at, self._at + 1024)
        text = self._data[self._at : end].decode()
        self._at = end + 1
        return text

    # -- the stack --------------------------------------------------------------------------------

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if self._marks and self._marks[-1] == len(self._stack):
            raise OddError
        return self._stack.pop()

    def _popped(self) -> list[Any]:
        at = self._marks.pop()
        found = self._stack[at:]
        del self._stack[at:]
        return found

    def _top(self) -> Any:
        return self._stack[-1]

    # -- opcodes ----------------------------------------------------------------------------------

    def do_mark(self) -> None:
        self._marks.append(len(self._stack))

    def do_pop(self) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def do_pop_mark(self) -> None:
        self._popped()

    def do_dup(self) -> None:
        self._push(self._top())

    def do_proto(self) -> None:
        if not 2 <= self._number(1) <= 5:
            raise OddError

    def do_frame(self) -> None:
        self._take(8)

    def do_long(self, size: int) -> None:
        length = self._number(size)
        # Longer ones have decimal forms that take long to write.
        data = self._take(length)
        self._push(int.from_bytes(data, "little", signed=True) if length <= 16 else Name("an integer"))

    def do_text(self, size: int) -> None:
        self._push(self._take(self._number(size)).decode("utf-8", "surrogatepass"))

    def do_old_text(self, size: int) -> None:
        self._push(self._take(self._number(size)).decode("latin-1"))

    def do_bytes(self, size: int) -> None:
        self._push(self._take(self._number(size)))

    def do_tuple(self) -> None:
        self._push(tuple(self._popped()))

    def do_short_tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(items)))

    def do_list(self) -> None:
        self._push(Items(self._popped()))

    def do_dict(self) -> None:
        made = Pairs()
        items = self._popped()
        made.items += zip(items[::2], items[1::2], strict=True)
        self._push(made)

    def do_append(self) -> None:
        self._extend([self._pop()])

    def do_appends(self) -> None:
        self._extend(self._popped())

    def _extend(self, items: list[Any]) -> None:
        top = self._top()
        if type(top) not in (Items, Call):
            raise OddError
        top.items.extend(items)

    def do_setitem(self) -> None:
        value, key = self._pop(), self._pop()
        self._set([(key, value)])

    def do_setitems(self) -> None:
        items = self._popped()
        self._set(list(zip(items[::2], items[1::2], strict=True)))

    def _set(self, pairs: list[tuple[Any, Any]]) -> None:
        top = self._top()
        if type(top) not in (Pairs, Call):
            raise OddError
        (top.pairs if type(top) is Call else top.items).extend(pairs)

    def do_name(self) -> None:
        module = self._line()
        self._push(Name(f"{module}.{self._line()}"))

    def do_stack_name(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise OddError
        self._push(Name(f"{module}.{name}"))

    def do_call(self) -> None:
        arguments, callee = self._pop(), self._pop()
        if type(callee) is Name and callee.text == "_codecs.encode":  # how protocol 2 writes bytes
            text, codec = arguments
            if codec == "latin1" and type(text) is str:
                self._encoded += len(text)  # the same text may be encoded again and again
                if self._encoded > MAX_BYTES:
                    raise OddError
                self._push(text.encode("latin-1"))
                return
        self._push(Call(callee, arguments))

    def do_call_with_names(self) -> None:
        names, arguments, callee = self._pop(), self._pop(), self._pop()
        made = Call(callee, arguments)
        made.state = names
        self._push(made)

    def do_build(self) -> None:
        state = self._pop()
        top = self._top()
        if type(top) is Call:
            top.state = state

    def do_put(self, size: int) -> None:
        self._memo[self._number(size)] = self._top()

    def do_get(self, size: int) -> None:
        self._push(self._memo[self._number(size)])

    def do_memoize(self) -> None:
        self._memo[len(self._memo)] = self._top()

    def do_persistent(self) -> None:
        self._push(Persistent(self._pop()))


_Step = Callable[[_Machine], None]


def _sized(step: Callable[[_Machine, int], None], number: int) -> _Step:
    return lambda machine: step(machine, number)


def _constant(value: Any) -> _Step:
    return lambda machine: machine._push(value)


def _unpacked(layout: str) -> _Step:
    packed = struct.Struct(layout)
    return lambda machine: machine._push(packed.unpack(machine._take(packed.size))[0])


def _made(kind: Callable[[], Any]) -> _Step:
    return lambda machine: machine._push(kind())


_STOP: Final = ord(".")

# Of protocols 2 to 5; the letters are those of the standard library's `pickletools`.
_LETTERS: Final[dict[str | int, _Step]] = {
    "(": _Machine.do_mark,
    "0": _Machine.do_pop,
    "1": _Machine.do_pop_mark,
    "2": _Machine.do_dup,
    "N": _constant(None),
    0x88: _constant(True),
    0x89: _constant(False),
    "J": _unpacked("<i"),
    "K": _unpacked("<B"),
    "M": _unpacked("<H"),
    0x8A: _sized(_Machine.do_long, 1),
    0x8B: _sized(_Machine.do_long, 4),
    "G": _unpacked(">d"),
    "X": _sized(_Machine.do_text, 4),
    0x8C: _sized(_Machine.do_text, 1),
    0x8D: _sized(_Machine.do_text, 8),
    "T": _sized(_Machine.do_old_text, 4),
    "U": _sized(_Machine.do_old_text, 1),
    "B": _sized(_Machine.do_bytes, 4),
    "C": _sized(_Machine.do_bytes, 1),
    0x8E: _sized(_Machine.do_bytes, 8),
    0x96: _sized(_Machine.do_bytes, 8),
    ")": _constant(()),
    "t": _Machine.do_tuple,
    0x85: _sized(_Machine.do_short_tuple, 1),
    0x86: _sized(_Machine.do_short_tuple, 2),
    0x87: _sized(_Machine.do_short_tuple, 3),
    "]": _made(lambda: Items([])),
    "l": _Machine.do_list,
    "a": _Machine.do_append,
    "e": _Machine.do_appends,
    "}": _made(Pairs),
    "d": _Machine.do_dict,
    "s": _Machine.do_setitem,
    "u": _Machine.do_setitems,
    0x8F: _made(lambda: Items([])),
    0x90: _Machine.do_appends,
    0x91: _Machine.do_list,
    "c": _Machine.do_name,
    0x93: _Machine.do_stack_name,
    "R": _Machine.do_call,
    0x81: _Machine.do_call,
    0x92: _Machine.do_call_with_names,
    "b": _Machine.do_build,
    "q": _sized(_Machine.do_put, 1),
    "r": _sized(_Machine.do_put, 4),
    "h": _sized(_Machine.do_get, 1),
    "j": _sized(_Machine.do_get, 4),
    0x94: _Machine.do_memoize,
    "Q": _Machine.do_persistent,
    0x80: _Machine.do_proto,
    0x95: _Machine.do_frame,
}

_STEPS: Final = {code if isinstance(code, int) else ord(code): step for code, step in _LETTERS.items()}
