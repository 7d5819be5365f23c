"""Where the content of an earlier tree lies, by name: what the next tree may be stored as a difference to.

A tensor's base is the tensor of the same path, dtype and shape in the parent's tree; failing that, the one
whose path is the same once digits and the prefixes that wrappers add are folded away, if there is just one
(`checkpoint-500/…` and `checkpoint-1000/…`, `module.…` of a model that was wrapped meanwhile). A wrong guess
costs space, never correctness.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from ckptvcs.disk import ThreadLock
from ckptvcs.errors import CkptError
from ckptvcs.ids import ObjectId


class Held(NamedTuple):
    """Content that a tree holds: what it is (a dtype's name and a shape), and its chunks in order."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[ObjectId, ...]


_DIGITS: Final = re.compile(r"\d+")
_WRAPPERS: Final = re.compile(
    r"(?:(?<=[/.])|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def folded(path: str) -> str:
    """A path without what differs between saves of the same tensor: numbers, and prefixes of wrappers."""
    return _DIGITS.sub("#", _WRAPPERS.sub("", path))


class Bases:
    """The content of an earlier tree. Loaded when it is first asked for. Thread-safe."""

    def __init__(self, load: Callable[[], Mapping[str, Held]]) -> None:
        self._load = load
        self._mutex = ThreadLock()
        self._held: Mapping[str, Held] | None = None
        self._folded: dict[str, Held | None] = {}

    def find(self, path: str, dtype: str, shape: tuple[int, ...]) -> tuple[ObjectId, ...]:
        """The chunks that content of this path, dtype and shape may differ little from; () if none."""
        with self._mutex:
            if self._held is None:
                self._held = self._loaded()
            held = self._held.get(path)
            if held is None or (held.dtype, held.shape) != (dtype, shape):
                if not self._folded:
                    self._folded = _by_folded_path(self._held)
                held = self._folded.get(folded(path))
        if held is None or (held.dtype, held.shape) != (dtype, shape):
            return ()
        return held.chunks

    def _loaded(self) -> Mapping[str, Held]:
        try:
            return self._load()
        except CkptError:  # a damaged or half collected parent: then everything is stored for itself
            return {}


def _by_folded_path(held: Mapping[str, Held]) -> dict[str, Held | None]:
    """None for a folded path that several paths have."""
    found: dict[str, Held | None] = {"": None}
    for path, each in held.items():
        short = folded(path)
        found[short] = None if short in found else each
    return found
