"""Stored nodes -> Python values: reading their content.

`Filler` gathers what has to be read and reads it in one call; `Materialiser` allocates memory for tensors and
makes values of it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from ckptvcs.errors import CorruptionError, InvalidError, StorageError
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.state import generators, paths, torch_devices, torch_tensors
from ckptvcs.state.interface import ObjectReader
from ckptvcs.state.read import (
    Branch,
    Compound,
    Content,
    Stored,
    StoredBlob,
    StoredLeaf,
    StoredRandom,
    StoredTensor,
    StoredTorch,
    torch_value,
)
from ckptvcs.state.tensors import (
    SHARED_NAMES,
    Place,
    Raw,
    Spec,
    arrange,
    bytes_of,
    c_strides,
    is_injective,
    ordered_strides,
    raw_dtype,
    restore_numpy,
    swap,
)
from ckptvcs.store.format import unpack_object

# -- reading content ------------------------------------------------------------------------------


@contextlib.contextmanager
def memory_for(path: str, nbytes: int) -> Iterator[None]:
    """Turn a MemoryError inside the block into a StorageError that says for what, and how much."""
    try:
        yield
    except MemoryError:
        raise StorageError(
            f"{path}: not enough memory for {nbytes} bytes",
            hint="only= reads a part; a machine with more memory reads it all",
        ) from None


class Filler:
    """Collects what is to be read, then reads it in one call."""

    def __init__(self, reader: ObjectReader) -> None:
        self._reader = reader
        self._wanted: list[tuple[Content, memoryview]] = []
        self._staged: list[tuple[Content, Any]] = []
        self._after: list[Callable[[], None]] = []

    def add(self, content: Content, raw: Raw, swapped: int = 0) -> None:
        """Have `raw` (raw elements, any strides) hold these bytes after `run`."""
        if not content.nbytes:
            return
        if raw.flags.c_contiguous and not swapped:
            self.add_flat(content, bytes_of(raw))
            return
        with memory_for("the state", raw.nbytes):
            scratch: Raw = np.empty(raw.shape, raw.dtype)
        flat = bytes_of(scratch)
        self.add_flat(content, flat)

        def place() -> None:
            if swapped:
                swap(flat, swapped)
            raw[...] = scratch

        self._after.append(place)

    def add_flat(self, content: Content, memory: memoryview) -> None:
        """Have flat memory hold these bytes after `run`."""
        self._wanted.append((content, memory))

    def add_staged(self, content: Content, tensor: Any) -> None:
        """Have a torch tensor on a device hold these bytes after `run`, which go there piece by piece."""
        if content.nbytes:
            self._staged.append((content, tensor))

    def run(self) -> None:
        """Read everything."""
        resolve(self._reader, [content for content, _ in (*self._wanted, *self._staged)])
        requests: list[tuple[Sequence[ObjectId], memoryview]] = []
        apart: list[tuple[memoryview, memoryview]] = []
        for (content, memory), alone in zip(self._wanted, _alone(self._wanted), strict=True):
            if content.inline is not None:
                memory[:] = content.inline
                continue
            assert content.chunks is not None
            if not alone:
                with memory_for("the state", len(memory)):
                    apart.append((memory, memoryview(bytearray(len(memory)))))
                memory = apart[-1][1]
            requests.append((content.chunks, memory))
        if requests:
            self._reader.read_into(requests)
        for memory, scratch in apart:
            memory[:] = scratch
        for step in self._after:
            step()
        staging = torch_devices.Staging()
        for content, tensor in self._staged:
            torch_devices.fill(tensor, functools.partial(self._read_piece, content), staging)
        self._wanted, self._staged, self._after = [], [], []

    def _read_piece(self, content: Content, offset: int, memory: memoryview) -> None:
        if content.inline is not None:
            memory[:] = content.inline[offset : offset + len(memory)]
            return
        assert content.chunks is not None
        cell = self._reader.grid.chunk
        self._reader.read_into(
            [(content.chunks[offset // cell : -(-(offset + len(memory)) // cell)], memory)]
        )


def _alone(wanted: Sequence[tuple[Content, memoryview]]) -> list[bool]:
    """Which buffers share no byte with one that comes before them in memory.

    Chunks are decoded in place by several threads, so two that are read into the same memory (tensors that
    share it) would spoil each other half way.
    """
    alone = [True] * len(wanted)
    places = [
        (np.frombuffer(memory, np.uint8).ctypes.data, len(memory), at)
        for at, (_, memory) in enumerate(wanted)
        if len(memory)
    ]
    end = 0
    for start, length, at in sorted(places):
        alone[at] = start >= end
        end = max(end, start + length)
    return alone


def resolve(reader: ObjectReader, contents: Sequence[Content]) -> None:
    """Replace chunk lists by their chunks. CorruptionError if one has the wrong number of them."""
    lists = list({content.chunk_list: None for content in contents if content.chunk_list is not None})
    if not lists:
        return
    payloads = reader.objects(Kind.CHUNK_LIST, lists)
    chunks = {id: parse_chunk_list(id, payload) for id, payload in zip(lists, payloads, strict=True)}
    for content in contents:
        if content.chunk_list is None:
            continue
        content.chunks = chunks[content.chunk_list]
        if content.cells is not None and len(content.chunks) != content.cells:
            raise CorruptionError(
                f"chunk list {content.chunk_list.short} has {len(content.chunks)} chunks, not {content.cells}"
            )
        content.chunk_list = None


def parse_chunk_list(id: ObjectId, payload: bytes) -> tuple[ObjectId, ...]:
    """The chunk ids of a chunk list object."""
    where = f"chunk list {id.short}"
    references, body = unpack_object(payload, where)
    if len(body) or not all(kind is Kind.CHUNK for kind, _ in references):
        raise CorruptionError(f"{where}: more than chunks")
    return tuple(each for _, each in references)


# -- values ---------------------------------------------------------------------------------------

Devices: TypeAlias = Any
"""None, a device, or a mapping of path pattern to device."""


def check_framework(framework: str | None) -> None:
    """InvalidError unless it is one."""
    if framework not in (None, "numpy", "torch"):
        raise InvalidError(f"unknown framework {framework!r}", hint='"numpy", "torch" or None')


def target_spec(path: str, spec: Spec, framework: str | None) -> Spec:
    """What a stored tensor becomes in a framework, or with None in its own. InvalidError if it cannot."""
    framework = framework or spec.framework
    if framework == "torch":
        torch_tensors.require()
    if framework == spec.framework:
        return spec
    if spec.dtype not in SHARED_NAMES:
        raise InvalidError(f"{path}: dtype {spec.dtype} has no counterpart in {framework}")
    return Spec(framework, spec.dtype, spec.shape, 0, spec.item)


class Materialiser:
    """Turns stored nodes into values, reading all content in one call.

    Attributes:
        filler: takes further memory to be filled in the same call.
    """

    def __init__(self, reader: ObjectReader, framework: str | None = None, device: Devices = None) -> None:
        check_framework(framework)
        self._reader = reader
        self._framework = framework
        self._device = device
        self.filler = Filler(reader)
        self._tensors: list[tuple[str, StoredTensor, Spec]] = []
        self._blobs: list[tuple[str, StoredBlob]] = []
        self._finish: list[Callable[[], None]] = []

    def values(self, nodes: Sequence[tuple[str, Stored]]) -> list[Any]:
        """The value of each (path, node)."""
        for path, node in nodes:
            self._collect(path, node)
        # Whatever can be wrong about sizes has been checked by now: memory is allocated from here on.
        resolve(
            self._reader,
            [node.content for _, node, _ in self._tensors] + [blob.content for _, blob in self._blobs],
        )
        self._allocate()
        memories = []
        for path, blob in self._blobs:
            with memory_for(path, blob.content.nbytes):
                memories.append(bytearray(blob.content.nbytes))
        for (_, blob), memory in zip(self._blobs, memories, strict=True):
            self.filler.add_flat(blob.content, memoryview(memory))
        self.filler.run()
        for finish in self._finish:
            finish()
        for (_, blob), memory in zip(self._blobs, memories, strict=True):
            blob.result = _blob_value(blob.kind, memory)
        return [self._make(node) for _, node in nodes]

    def _collect(self, path: str, node: Stored) -> None:
        if isinstance(node, StoredTensor):
            self._tensors.append((path, node, target_spec(path, node.spec, self._framework)))
        elif isinstance(node, StoredBlob):
            self._blobs.append((path, node))
        elif isinstance(node, Branch):
            if (
                isinstance(node, Compound)
                and node.kind in ("sparse", "quantized")
                and self._framework == "numpy"
            ):
                raise InvalidError(f"{path}: a {node.kind} torch tensor has no numpy form")
            for key, child in zip(node.keys, node.children, strict=True):
                self._collect(paths.join(path, paths.name(key)), child)

    def _device_of(self, path: str) -> Any:
        if not isinstance(self._device, Mapping):
            return self._device
        for pattern, device in self._device.items():
            if paths.matches(pattern, path):
                return device
        return None

    def _allocate(self) -> None:
        groups: dict[tuple[str, int, str], list[int]] = {}
        for at, (path, node, spec) in enumerate(self._tensors):
            device = self._device_of(path) if spec.framework == "torch" else None
            if node.alias is None:
                self._own(path, node, spec, device)
            else:
                groups.setdefault((node.spec.framework, node.alias.group, str(device)), []).append(at)
        for members in groups.values():
            path, _, spec = self._tensors[members[0]]
            device = self._device_of(path) if spec.framework == "torch" else None
            places = []
            for at in members:
                _, node, target = self._tensors[at]
                assert node.alias is not None
                places.append((target, node.alias))
            arranged = arrange(places, shift=spec.framework == "torch")
            if arranged is None:
                for at in members:
                    self._own(*self._tensors[at], device)
                continue
            extent, found = arranged
            self._buffer(
                path,
                extent,
                [(*self._tensors[at][1:], place) for at, place in zip(members, found, strict=True)],
                device,
            )

    def _own(self, path: str, node: StoredTensor, spec: Spec, device: Any) -> None:
        if node.order is None:
            strides = c_strides(spec.shape, spec.item)
        else:
            strides = ordered_strides(spec.shape, spec.item, node.order)
        self._buffer(path, spec.nbytes, [(node, spec, Place(0, strides))], device)

    def _buffer(
        self, path: str, nbytes: int, members: list[tuple[StoredTensor, Spec, Place]], device: Any
    ) -> None:
        """Memory for tensors that live together, to be filled and then made into tensors."""
        torch = members[0][1].framework == "torch"
        base: Any = None
        staged = (
            torch
            and device is not None
            and torch_tensors.device_type(device) != "cpu"
            and all(is_injective(spec.shape, place.strides, spec.item) for _, spec, place in members)
        )
        with memory_for(path, nbytes):
            if staged:
                base = _torch_memory(nbytes, zeroed=len(members) > 1, device=device)[0]
            elif torch:
                base, memory = _torch_memory(nbytes, zeroed=len(members) > 1)
            elif len(members) == 1:
                memory = np.empty(nbytes, np.uint8)
            else:
                memory = np.zeros(nbytes, np.uint8)  # bytes that no view shows
        seen = set()
        for node, spec, place in members:
            if not spec.nbytes or (place, spec.shape, spec.item, node.spec.swap) in seen:
                continue
            seen.add((place, spec.shape, spec.item, node.spec.swap))
            if staged:
                self.filler.add_staged(node.content, torch_tensors.restore(base, spec, place))
            else:
                raw: Raw = np.ndarray(spec.shape, raw_dtype(spec.item), memory, place.offset, place.strides)
                self.filler.add(node.content, raw, spec.swap)

        def finish() -> None:
            moved = base if base is None or device is None or staged else base.to(device)
            for node, spec, place in members:
                if torch:
                    node.result = torch_tensors.restore(moved, spec, place)
                else:
                    node.result = restore_numpy(memory, spec, place)

        self._finish.append(finish)

    def _make(self, node: Stored) -> Any:
        if isinstance(node, StoredLeaf):
            return node.value
        if isinstance(node, (StoredTensor, StoredBlob)):
            result, node.result = node.result, None
            return result
        if isinstance(node, StoredTorch):
            return torch_value(node, self._framework)
        if isinstance(node, StoredRandom):
            return generators.restore(node.code, node.plain)
        if isinstance(node, Branch):
            found = [self._make(child) for child in node.children]
            if isinstance(node, Compound) and node.kind == "generator" and self._framework == "numpy":
                return found[0]
            return node.make(node.keys, found)
        raise CorruptionError(f"a {node.kind} within a state")


def _torch_memory(nbytes: int, *, zeroed: bool, device: Any = None) -> tuple[Any, Raw]:
    try:
        return torch_tensors.allocate(nbytes, zeroed, device)
    except RuntimeError as error:  # torch's way to say so
        raise MemoryError(str(error)) from None


def _blob_value(kind: str, memory: bytearray) -> Any:
    if kind == "bytearray":
        return memory
    if kind == "bytes":
        return bytes(memory)
    try:
        return memory.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise CorruptionError("a stored text is not UTF-8") from None
