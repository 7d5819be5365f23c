"""Where the content of an earlier tree lies, by name: what the next tree may be stored as a difference to.

A tensor's base is the tensor of the same path, dtype and shape in the parent's tree; failing that, one whose
path is the same once the prefixes that wrappers add are folded away (`module.` of a model that was wrapped
meanwhile); failing that, one whose path differs in its numbers, if there is just one.

In files, numbers tell saves apart: `checkpoint-500/model.safetensors` and `checkpoint-1000/…`. There only
those in the file's path are folded, since `layers.3.weight` and `layers.4.weight` of a file are two tensors.
Of several candidates the one with the most numbers in common, and then with the nearest lower ones, is taken:
most likely the save before. A wrong guess costs space, never correctness.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from ckptvcs.disk import ThreadLock
from ckptvcs.errors import CkptError
from ckptvcs.ids import ObjectId
from ckptvcs.state import paths


class Held(NamedTuple):
    """Content that a tree holds: what it is (a dtype's name and a shape), and its chunks in order."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[ObjectId, ...]


_DIGITS: Final = re.compile(r"\d+")
_WRAPPERS: Final = re.compile(
    r"(?:(?<=[/.])|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


FILES: Final = paths.name("")
"""The first component of every path of content in files, which keeps it apart from nearly every state's."""

INSIDE: Final = "//"
"""Between the path of a file and that of a tensor in it: no name is empty, so nothing else is called so."""


def folded(path: str) -> str:
    """A path without what differs between saves of the same tensor: numbers, and prefixes of wrappers."""
    file, inside, tensor = path.partition(INSIDE)
    if inside:
        return _DIGITS.sub("#", file) + inside + _WRAPPERS.sub("", tensor)
    return _DIGITS.sub("#", _WRAPPERS.sub("", path))


def alike(path: str) -> str:
    """What paths of content that is stored in the same way have in common: of tensors in files all but the
    numbers of the file's path."""
    return folded(path) if INSIDE in path else path


def _numbers(path: str) -> tuple[tuple[int, str], ...]:
    """The numbers that are folded, so that they compare as numbers whatever their length."""
    file, inside, _ = path.partition(INSIDE)
    found = _DIGITS.findall(file if inside else _WRAPPERS.sub("", path))
    return tuple((len(digits), digits) for digits in (digits.lstrip("0") for digits in found))


class Bases:
    """The content of an earlier tree. Loaded when it is first asked for. Thread-safe."""

    def __init__(self, load: Callable[[], Mapping[str, Held]]) -> None:
        self._load = load
        self._mutex = ThreadLock()
        self._held: Mapping[str, Held] | None = None
        self._folded: dict[str, dict[tuple[tuple[int, str], ...], Held]] = {}

    def find(self, path: str, dtype: str, shape: tuple[int, ...]) -> tuple[ObjectId, ...]:
        """The chunks that content of this path, dtype and shape may differ little from; () if none."""
        with self._mutex:
            if self._held is None:
                self._held = self._loaded()
            held = self._held.get(path)
            if held is None or (held.dtype, held.shape) != (dtype, shape):
                held = self._nearest(path, dtype, shape)
        return () if held is None else held.chunks

    def _nearest(self, path: str, dtype: str, shape: tuple[int, ...]) -> Held | None:
        assert self._held is not None
        if not self._folded and self._held:
            self._folded = _by_folded_path(self._held)
        short, own = folded(path), _numbers(path)
        near = self._folded.get(short, {}) if short else {}
        if own in near or not path.startswith(f"{FILES}/"):
            held = near.get(own) or (next(iter(near.values())) if len(near) == 1 else None)
            return held if held is not None and (held.dtype, held.shape) == (dtype, shape) else None
        # Of a folder's shards, those of one number are alike.
        common = {
            at: sum(map(operator.eq, at, own))
            for at, held in near.items()
            if (held.dtype, held.shape) == (dtype, shape)
        }
        best = [at for at, same in common.items() if same == max(common.values())]
        lower = [at for at in best if at < own]
        return near[max(lower) if lower else min(best)] if best else None

    def _loaded(self) -> Mapping[str, Held]:
        try:
            return self._load()
        except CkptError:  # a damaged or half collected parent: then everything is stored for itself
            return {}


def _by_folded_path(held: Mapping[str, Held]) -> dict[str, dict[tuple[tuple[int, str], ...], Held]]:
    """By folded path, and by the numbers that were folded."""
    found: dict[str, dict[tuple[tuple[int, str], ...], Held]] = {}
    for path, each in held.items():
        found.setdefault(folded(path), {}).setdefault(_numbers(path), each)
    return found
