"""Torch tensors on devices: their bytes move to and from the host in pieces, through a few pinned buffers.

A tensor's elements are taken in C order whatever its strides, so that a piece is a run of the bytes that are
stored. Nothing here depends on a kind of device; a tensor is on one if `on_host` says it is not here.
"""

from __future__ import annotations

import contextlib
import math
import queue
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np

from ckptvcs.disk import reserved_memory
from ckptvcs.ids import Buffer
from ckptvcs.state import torch_tensors
from ckptvcs.state.interface import Source
from ckptvcs.state.tensors import ArraySource, Raw, Spec, bytes_of, unit

BUFFER: Final = 32 << 20
"""Bytes of a pinned buffer."""

BUFFERS: Final = 2
"""How many there are for one commit or restore; threads that find none free wait."""


def on_host(tensor: Any) -> bool:
    """Whether a tensor's memory can be read as it is."""
    return bool(tensor.device.type == "cpu")


def settle(device: Any) -> None:
    """Wait until everything that was asked of a device has been done.

    Copies are made from threads of our own, whose streams know nothing of the one that training uses.
    """
    synchronize = getattr(getattr(torch_tensors.loaded(), device.type, None), "synchronize", None)
    if synchronize is not None:
        synchronize(device)


class Staging:
    """Pinned host memory on the way to and from devices, used again and again. Thread-safe."""

    def __init__(self, nbytes: int = BUFFER, count: int = BUFFERS) -> None:
        self.nbytes = nbytes
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(None)

    @contextlib.contextmanager
    def buffer(self) -> Iterator[Any]:
        """A flat uint8 tensor of `nbytes` on the host, for as long as the block runs."""
        found = self._free.get()
        try:
            if found is None:
                found = _pinned(self.nbytes)
            yield found
        finally:
            self._free.put(found)


def _pinned(nbytes: int) -> Any:
    torch = torch_tensors.require()
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:  # nothing here to pin memory for, or no more of it to be had
        return torch.empty(nbytes, dtype=torch.uint8)


class Captured(NamedTuple):
    """A strided tensor to be stored.

    Attributes:
        spec: what it is.
        raw: its memory. Of a tensor on a device, address space that nothing lies in: it tells what overlaps.
        source: its bytes.
    """

    spec: Spec
    raw: Raw
    source: Source


class Captures:
    """The tensors of one commit, read where they are. Keeps alive what their memory belongs to."""

    def __init__(self) -> None:
        self._staging = Staging()
        self._stand_ins: dict[tuple[str, int], Raw] = {}
        self._settled: set[str] = set()

    def dense(self, tensor: Any, witness: Hashable = None) -> Captured:
        """A strided tensor, not read yet. `witness` is its source's (`ArraySource.witness`)."""
        spec = torch_tensors.spec_of(tensor)
        size = unit(spec.dtype, spec.item)
        plain = torch_tensors.resolved(tensor)
        if on_host(plain):
            raw = torch_tensors.host_memory(plain)
            return Captured(spec, raw, ArraySource(raw, size, witness=witness))
        if str(plain.device) not in self._settled:
            self._settled.add(str(plain.device))
            settle(plain.device)
        return Captured(spec, self._stand_in(plain), DeviceSource(plain, size, self._staging, witness))

    def _stand_in(self, plain: Any) -> Raw:
        storage = plain.untyped_storage()
        key = (str(plain.device), storage.data_ptr())
        memory = self._stand_ins.get(key)
        if memory is None:
            memory = np.frombuffer(reserved_memory(max(1, storage.nbytes())), np.uint8)
            self._stand_ins[key] = memory
        return torch_tensors.view_of(plain, memory)


def as_target(tensor: Any) -> tuple[Spec, Raw] | None:
    """A tensor's own memory, to be filled in place; None if that memory is not plain memory of the host."""
    if not on_host(tensor) or not torch_tensors.is_dense(tensor) or tensor.is_conj() or tensor.is_neg():
        return None
    return torch_tensors.spec_of(tensor), torch_tensors.host_memory(tensor.detach())


class DeviceSource:
    """The bytes of a tensor on a device, in C order and little endian. Thread-safe."""

    def __init__(self, tensor: Any, element_size: int, staging: Staging, witness: Hashable = None) -> None:
        self._elements = _Elements(tensor)
        self._staging = staging
        self.nbytes: int = tensor.numel() * tensor.element_size()
        self.element_size = element_size
        self.witness = witness

    def read(self, offset: int, length: int) -> Buffer:
        """Bytes [offset, offset + length), on the host."""
        out = np.empty(length, np.uint8)
        item = self._elements.item
        most = self._staging.nbytes - 2 * item  # pieces end where elements do
        for done in range(0, length, most):
            start, stop = offset + done, offset + min(length, done + most)
            first, last = start // item, -(-stop // item)
            with self._staging.buffer() as buffer:
                memory = buffer[: (last - first) * item]
                memory.copy_(self._elements.taken(first, last))
                begin = start - first * item
                out[done : done + stop - start] = torch_tensors.memory(memory)[begin : begin + stop - start]
        return bytes_of(out)


def fill(tensor: Any, read: Callable[[int, memoryview], None], staging: Staging) -> None:
    """Fill a tensor on a device in place. `read(offset, memory)` gives its bytes, a buffer's worth at most
    and from multiples of that, so that the buffer's size must be one of the grid's cell."""
    elements = _Elements(tensor)
    nbytes = tensor.numel() * elements.item
    for start in range(0, nbytes, staging.nbytes):
        length = min(staging.nbytes, nbytes - start)
        with staging.buffer() as buffer:
            memory = buffer[:length]
            read(start, bytes_of(torch_tensors.memory(memory)))
            elements.put(start // elements.item, (start + length) // elements.item, memory)


class _Elements:
    """A tensor as a sequence of elements in C order."""

    def __init__(self, tensor: Any) -> None:
        torch = torch_tensors.require()
        self.item: int = tensor.element_size()
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
        self._whole = whole[self.item]
        self._view = tensor.detach().view(self._whole)
        self._flat = self._view.view(-1) if self._view.is_contiguous() else None

    def taken(self, first: int, last: int) -> Any:
        """The bytes of elements [first, last), on the device; a copy where they do not lie together."""
        torch = torch_tensors.require()
        if self._flat is not None:
            return self._flat[first:last].view(torch.uint8)
        out = torch.empty(last - first, dtype=self._whole, device=self._view.device)
        for view, at, count in _runs(self._view, first, last):
            out[at : at + count].copy_(view.reshape(-1))
        return out.view(torch.uint8)

    def put(self, first: int, last: int, memory: Any) -> None:
        """Set elements [first, last) from bytes on the host."""
        if self._flat is not None:
            self._flat[first:last].copy_(memory.view(self._whole))
            return
        piece = memory.view(self._whole).to(self._view.device)
        for view, at, count in _runs(self._view, first, last):
            view.copy_(piece[at : at + count].view(view.shape))


def _runs(view: Any, first: int, last: int, at: int = 0) -> Iterator[tuple[Any, int, int]]:
    """Parts of a tensor that together are its elements [first, last): (part, where it begins, its length)."""
    if first >= last:
        return
    if view.ndim == 0:
        yield view, at, 1
        return
    inner = math.prod(view.shape[1:])
    begin, end = -(-first // inner), last // inner
    if begin > end:  # within one slab
        yield from _runs(view[end], first - end * inner, last - end * inner, at)
        return
    head, tail = begin * inner - first, last - end * inner
    if head:
        yield from _runs(view[begin - 1], inner - head, inner, at)
    if end > begin:
        yield view[begin:end], at + head, (end - begin) * inner
    if tail:
        yield from _runs(view[end], 0, tail, at + head + (end - begin) * inner)
