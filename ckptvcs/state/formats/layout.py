"""What a parser says about a file: its tensors, which of them share no byte, and what else can be shown."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from ckptvcs.disk import ThreadLock
from ckptvcs.ids import Buffer
from ckptvcs.state.tensors import (
    MAX_BYTES,
    MAX_DIMENSIONS,
    ArraySource,
    Raw,
    Spec,
    bounds,
    c_strides,
    dense_order_of,
    raw_dtype,
    swap,
    unit,
)

MAX_TENSORS: Final = 1 << 17
"""Tensors in one file. A file that says it has more is stored as plain bytes."""

MAX_NAME: Final = 4096
"""Characters in a tensor's path, which becomes a key in a tree."""

_HELD: Final = 512 << 20
"""Bytes of tensors that are kept in memory, in all, because they are not in C order in their files."""

Plain: TypeAlias = "bool | int | float | str | None"


class File(NamedTuple):
    """A file for a parser to look into.

    Attributes:
        size: its bytes.
        read: `read(offset, length)` gives that many bytes, fewer only at the end of the file. Called from
            several threads where a `TensorSource` is.
    """

    size: int
    read: Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor whose elements lie in a file.

    Attributes:
        name: its path (`ckptvcs.state.paths`): names that the file gives, joined by "/".
        offset: byte of its first element in the file.
        spec: dtype, shape, flags. BIG_ENDIAN says that the file's numbers are.
        strides: bytes from element to element along each dimension, none negative; None for C order.
    """

    name: str
    offset: int
    spec: Spec
    strides: tuple[int, ...] | None = None

    @property
    def order(self) -> list[int] | None:
        """The order of its dimensions in the file, outermost first, if it is dense and not in C order."""
        if self.strides is None:
            return None
        return dense_order_of(self.spec.shape, self.strides, self.spec.item)

    @property
    def dense(self) -> bool:
        """Whether it has some bytes, and touches each byte of its extent once."""
        return self.spec.nbytes > 0 and (self.strides is None or self.order is not None)

    @property
    def extent(self) -> int:
        """Bytes from the first to behind the last that it touches."""
        if self.strides is None or not self.spec.nbytes:
            return self.spec.nbytes
        return bounds(self.spec.shape, self.strides, self.spec.item)[1]


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file holds.

    Attributes:
        format: "safetensors", "torch", "npz" or "npy".
        tensors: every tensor that the file names, in its order. Several may view the same bytes: tied
            weights, slices.
        parts: dense tensors that share no byte, by offset. Nearly all of them are among `tensors`; the rest
            are stretches of a storage that no dense tensor covers.
        leaves: what can be read plainly besides: numbers and text by path; of safetensors the metadata.
    """

    format: str
    tensors: tuple[Tensor, ...]
    parts: tuple[Tensor, ...]
    leaves: Mapping[str, Plain] = field(default_factory=dict)


def shape_of(value: object) -> tuple[int, ...] | None:
    """A shape that a file states, if it is possible."""
    if not isinstance(value, (list, tuple)) or len(value) > MAX_DIMENSIONS:
        return None
    if not all(type(length) is int and 0 <= length < MAX_BYTES for length in value):
        return None
    return tuple(value) if math.prod(length for length in value if length) <= MAX_BYTES else None


def apart(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Dense tensors of a file that share no byte, by offset: of those that overlap, the one that begins
    first, and of these the largest."""
    dense = [tensor for tensor in tensors if tensor.dense]
    dense.sort(key=lambda tensor: (tensor.offset, -tensor.spec.nbytes))
    found: list[Tensor] = []
    end = 0
    for tensor in dense:
        if tensor.offset >= end:
            found.append(tensor)
            end = tensor.offset + tensor.spec.nbytes
    return found


def strides_of(shape: Sequence[int], strides: Sequence[int], item: int) -> tuple[int, ...] | None:
    """Byte strides as `Tensor` has them: None if they mean C order."""
    return None if _is_c_order(shape, strides, item) else tuple(strides)


def _is_c_order(shape: Sequence[int], strides: Sequence[int], item: int) -> bool:
    return 0 in shape or all(
        length == 1 or found == wanted
        for length, found, wanted in zip(shape, strides, c_strides(shape, item), strict=True)
    )


class TensorSource:
    """The bytes of a file's tensor in C order and little endian, as the same tensor in a state has them.

    A tensor in C order is read where it is asked for. Of any other, all of its extent is read, and kept until
    every byte has been given once or others need the room. Thread-safe (`ckptvcs.state.interface.Source`).
    """

    def __init__(self, file: File, tensor: Tensor) -> None:
        self._file = file
        self._tensor = tensor
        # Forks look at every lock, and a file may have many tensors.
        self._mutex = None if tensor.strides is None else ThreadLock()
        self._whole: ArraySource | None = None
        self._left = tensor.spec.nbytes
        self.nbytes = tensor.spec.nbytes
        self.element_size = unit(tensor.spec.dtype, tensor.spec.item)

    def read(self, offset: int, length: int) -> Buffer:
        """Bytes [offset, offset + length). EOFError if the file has become shorter."""
        if self._mutex is not None:
            with self._mutex:
                source = self._whole_tensor(length)
            return source.read(offset, length)
        size = self._tensor.spec.swap
        if not size:
            return self._bytes(self._tensor.offset + offset, length)
        first = offset // size * size
        data = bytearray(
            self._bytes(self._tensor.offset + first, -(-(offset + length) // size) * size - first)
        )
        swap(memoryview(data), size)
        return memoryview(data)[offset - first :][:length]

    def _bytes(self, offset: int, length: int) -> bytes:
        data = self._file.read(offset, length)
        if len(data) != length:
            raise EOFError(f"{self._tensor.name}: the file ends before byte {offset + length}")
        return data

    def _whole_tensor(self, wanted: int) -> ArraySource:
        """The whole tensor in memory, of which so many bytes will be given now."""
        source = self._whole
        if source is None:
            spec = self._tensor.spec
            data = np.frombuffer(self._bytes(self._tensor.offset, self._tensor.extent), np.uint8)
            raw: Raw = np.ndarray(spec.shape, raw_dtype(spec.item), data, 0, self._tensor.strides)
            source = self._whole = ArraySource(raw, self.element_size, spec.swap)
            self._left = spec.nbytes
            _hold(self)
        self._left -= wanted
        if self._left <= 0:
            self._whole = None
        return source


_held: Final[deque[weakref.ref[TensorSource]]] = deque()
_held_lock: Final = ThreadLock()


def _hold(newest: TensorSource) -> None:
    """Let go of the tensors that were read first while more than `_HELD` bytes are kept. What is asked for
    again is read again."""
    with _held_lock:
        kept = [each for ref in _held if (each := ref()) is not None and each._whole is not None]
        kept = [*(each for each in kept if each is not newest), newest]
        while len(kept) > 1 and sum(each._tensor.extent for each in kept) > _HELD:
            kept.pop(0)._whole = None
        _held.clear()
        _held.extend(map(weakref.ref, kept))
