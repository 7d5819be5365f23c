"""One stored tensor, of which slices are read without the rest."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import EllipsisType
from typing import Any, TypeAlias

import numpy as np

from ckptvcs.disk import reserved_memory
from ckptvcs.errors import InvalidError, NotFoundError
from ckptvcs.ids import ObjectId
from ckptvcs.state import paths, torch_tensors
from ckptvcs.state.interface import ObjectReader
from ckptvcs.state.materialise import check_framework, memory_for, resolve, target_spec
from ckptvcs.state.read import Branch, Compound, Loader, Stored, StoredFile, StoredTensor
from ckptvcs.state.statistics import Statistics, statistics
from ckptvcs.state.streams import Stream
from ckptvcs.state.tensors import Place, Raw, Spec, c_strides, raw_dtype, restore_numpy, swap

Index: TypeAlias = "int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]"


class LazyTensor:
    """A tensor in a commit, not read yet. `tensor[...]` reads it all, `tensor[10:20, ::2]` only the chunks in
    which those rows lie. Each reading is checked against the ids of what it read.

    It keeps no file open and holds nothing back from a collector: a reading after its commit was collected
    is a NotFoundError.

    Attributes:
        path: its path in the state.
        shape: its dimensions.
        dtype: the dtype's name, such as "float32" or "bfloat16".
        nbytes: bytes of all elements.
        chunks: number of chunks; 0 when it lives in the tree.
    """

    def __init__(
        self,
        path: str,
        stored: StoredTensor,
        spec: Spec,
        chunk: int,
        opened: Callable[[], AbstractContextManager[ObjectReader]],
    ) -> None:
        self.path = path
        self.shape = spec.shape
        self.dtype = spec.dtype
        self.nbytes = spec.nbytes
        self._content = stored.content
        self.chunks = stored.content.cells or 0
        self._stored = stored.spec
        self._spec = spec
        self._chunk = chunk
        self._opened = opened

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a 0-dim tensor has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"LazyTensor({self.path!r}, {self.dtype}{list(self.shape)})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        found = np.asarray(self[...])
        return found if dtype is None else found.astype(dtype)

    def __getitem__(self, index: Index) -> Any:
        """The elements that an index of integers, slices and one `...` selects, as a new array or tensor."""
        slices, shape = _normalised(index, self.shape)
        item = self._stored.item
        with memory_for(self.path, item * int(np.prod(shape, dtype=object))):
            whole: Raw = np.ndarray(self.shape, raw_dtype(item), reserved_memory(max(1, self.nbytes)))
            if 0 not in shape:
                self._fill(whole, slices)
            found = np.array(whole[slices], order="C", copy=True).reshape(shape)
        if self._stored.swap and found.nbytes:
            swap(found.reshape(-1).view(np.uint8).data, self._stored.swap)
        return self._made(found)

    def statistics(self, bins: int = 32) -> Statistics:
        """What its numbers are like, and their histogram. Reads it twice, a few MiB at a time.

        InvalidError for elements that are no numbers.
        """
        with self._opened() as reader:
            read = Stream(reader, self._content).read
            return statistics(self.path, self.dtype, self._stored.item, self.nbytes, read, bins)

    def _fill(self, whole: Raw, slices: tuple[slice, ...]) -> None:
        flat = whole.reshape(-1).view(np.uint8).data
        if self._content.inline is not None:
            flat[: self.nbytes] = self._content.inline
            return
        chunks = self._content.chunks
        assert chunks is not None
        cells = _touched(self.shape, self._stored.item, slices, self._chunk)
        parts = [(chunks[at], flat[at * self._chunk : (at + 1) * self._chunk]) for at in cells]
        with self._opened() as reader:
            reader.read_parts(parts)

    def _made(self, found: Raw) -> Any:
        spec = Spec(self._spec.framework, self._spec.dtype, found.shape, self._spec.flags, self._spec.item)
        place = Place(0, c_strides(found.shape, spec.item))
        if spec.framework != "torch":
            return restore_numpy(found.reshape(-1).view(np.uint8), spec, place)
        base, memory = torch_tensors.allocate(found.nbytes)
        memory[:] = found.reshape(-1).view(np.uint8)
        return torch_tensors.restore(base, spec, place).detach()


def opened_tensor(
    opened: Callable[[], AbstractContextManager[ObjectReader]],
    tree: ObjectId,
    path: str,
    framework: str | None,
) -> LazyTensor:
    """The tensor at a path of a tree's state, or at that of a file followed by its own there.

    NotFoundError if there is none; InvalidError if what lies there is no dense tensor.
    """
    check_framework(framework)
    with opened() as reader:
        loader = Loader(reader)
        root, parts = loader.root(tree)
        names = paths.split(path)
        stored: Stored | None = None
        try:
            if "state" not in parts:
                raise NotFoundError(
                    f"this commit holds files and no state, and in the files no tensor at {path!r}",
                    hint="such a path is that of a file, and behind it the tensor's in the file",
                )
            stored = _walked(loader.node(parts["state"], root, paths.exactly(names)), names, path)
        except NotFoundError:
            if "files" in parts:
                stored = _in_files(lambda part: loader.node(parts["files"], root, paths.exactly(part)), names)
            if stored is None:
                raise
        if not isinstance(stored, StoredTensor):
            raise InvalidError(
                f"{path or 'the state'} is a {stored.kind}, not a dense tensor",
                hint="checkout(only=...) reads it",
            )
        resolve(reader, [stored.content])
        return LazyTensor(path, stored, target_spec(path, stored.spec, framework), reader.grid.chunk, opened)


def _in_files(node: Callable[[Sequence[str]], Stored], names: Sequence[str]) -> StoredTensor | None:
    """The tensor that a path names in a file; None if a folder or file of it is missing, or the tensor."""
    for end in range(1, len(names)):
        try:
            found = _walked(node(names[:end]), names[:end], "")
        except NotFoundError:
            return None
        if isinstance(found, StoredFile):
            inside = "/".join(names[end:])
            return next((each.tensor for each in found.tensors if each.name == inside), None)
    return None


def _walked(stored: Stored, names: Sequence[str], path: str) -> Stored:
    """What lies below, where these names lead."""
    for name in names:
        below = None
        if isinstance(stored, Branch) and not isinstance(stored, Compound):
            for key, child in zip(stored.keys, stored.children, strict=True):
                if name in (paths.name(key), key):
                    below = child
                    break
        if below is None:
            raise NotFoundError(
                f"there is nothing at {path!r} in this commit", hint="`ckpt ls REV` lists all paths"
            )
        stored = below
    return stored


def _normalised(index: Index, shape: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[int, ...]]:
    """An index as one slice per dimension, an integer being a slice of length 1, and the shape of what it
    selects. IndexError for what is no basic index, or of negative step."""
    given = list(index) if isinstance(index, tuple) else [index]
    dots = [at for at, each in enumerate(given) if each is Ellipsis]
    if len(dots) > 1:
        raise IndexError("an index can have one ellipsis only")
    at = dots[0] if dots else len(given)
    missing = len(shape) - (len(given) - len(dots))
    if missing < 0:
        raise IndexError(f"too many indices for a tensor of {len(shape)} dimensions")
    full: list[Any] = given[:at] + [slice(None)] * missing + given[at + len(dots) :]
    slices, kept = [], []
    for each, length in zip(full, shape, strict=True):
        if isinstance(each, slice):
            start, stop, step = each.indices(length)
            if step < 0:
                raise IndexError("slices of negative step are not supported; read, then reverse")
            slices.append(slice(start, max(start, stop), step))
            kept.append(len(range(start, stop, step)))
            continue
        try:
            number = operator.index(each)
        except TypeError:
            raise IndexError(
                f"a {type(each).__name__} cannot index a stored tensor; read it with [...] first"
            ) from None
        if not -length <= number < length:
            raise IndexError(f"index {number} is out of range for a dimension of {length}")
        slices.append(slice(number % length, number % length + 1, 1))
    return tuple(slices), tuple(kept)


def _touched(shape: tuple[int, ...], item: int, slices: tuple[slice, ...], chunk: int) -> list[int]:
    """The grid cells in which the selected elements lie."""
    # Dimensions from the right that are read as one run of bytes.
    runs = len(shape)
    while runs and slices[runs - 1] == slice(0, shape[runs - 1], 1):
        runs -= 1
    strides = c_strides(shape, item)
    first, length = 0, item
    for at in range(runs, len(shape)):
        length *= shape[at]
    starts = np.zeros(1, np.int64)
    for at in range(runs):
        each = slices[at]
        if at == runs - 1:  # the last of them makes the run longer, whatever its step
            last = range(each.start, each.stop, each.step)[-1]
            first, length = each.start * strides[at], (last - each.start) * strides[at] + length
            break
        steps = np.arange(each.start, each.stop, each.step, dtype=np.int64) * strides[at]
        starts = (starts[:, None] + steps).reshape(-1)
    starts = starts + first
    cells = -(-int(np.prod(shape, dtype=object)) * item // chunk)
    # +1 where a run enters a cell, -1 behind the last cell it reaches.
    borders = np.bincount(starts // chunk, minlength=cells + 1)[: cells + 1]
    borders = borders - np.bincount((starts + length - 1) // chunk + 1, minlength=cells + 1)[: cells + 1]
    return [int(cell) for cell in np.flatnonzero(np.cumsum(borders[:cells]))]
