"""The memory of stored tensors as torch lays it out, given front to back in pieces, without torch.

A tensor whose memory was dense but in another order than C is turned around by rows where its outermost
dimension stays the outermost (as in channels_last), and as a whole otherwise. Tensors that share memory are
interleaved as they are read if all are in C order; otherwise their memory is held as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ckptvcs.ids import Buffer
from ckptvcs.state.interface import ObjectReader
from ckptvcs.state.materialise import Filler, memory_for
from ckptvcs.state.read import StoredTensor
from ckptvcs.state.streams import PIECE, Stream
from ckptvcs.state.tensors import (
    Place,
    Raw,
    Spec,
    arrange,
    bytes_of,
    c_strides,
    ordered_strides,
    raw_dtype,
)


@dataclass(slots=True)
class Memory:
    """The bytes that some tensors show together, each at its place."""

    nbytes: int
    members: list[tuple[str, StoredTensor, Place]]

    def pieces(self, reader: ObjectReader) -> Iterator[Buffer]:
        """The bytes from front to back. Those that no tensor shows are zero."""
        in_order = all(
            place.strides == c_strides(node.spec.shape, node.spec.item) for _, node, place in self.members
        )
        if in_order:
            return self._in_order(reader)
        if len(self.members) == 1 and self.members[0][1].order is not None:
            _, node, _ = self.members[0]
            return _in_memory_order(Stream(reader, node.content), node.spec, node.order or [])
        return self._whole(reader)

    def _in_order(self, reader: ObjectReader) -> Iterator[Buffer]:
        """Members lie one after another; where they overlap they hold the same bytes."""
        at = 0
        for _, node, place in sorted(self.members, key=lambda member: member[2].offset):
            if place.offset > at:
                yield from _zeros(place.offset - at)
                at = place.offset
            if (end := place.offset + node.spec.nbytes) > at:
                yield from Stream(reader, node.content).pieces(at - place.offset)
                at = end
        yield from _zeros(self.nbytes - at)

    def _whole(self, reader: ObjectReader) -> Iterator[Buffer]:
        with memory_for(self.members[0][0], self.nbytes):
            memory: Raw = np.zeros(self.nbytes, np.uint8)
        filler = Filler(reader)
        for _, node, place in self.members:
            spec = node.spec
            filler.add(
                node.content,
                np.ndarray(spec.shape, raw_dtype(spec.item), memory, place.offset, place.strides),
            )
        filler.run()
        for start in range(0, self.nbytes, PIECE):
            yield memory[start : start + PIECE].data


def arranged(members: Sequence[tuple[str, StoredTensor]]) -> Iterator[Memory]:
    """One memory for all of a group, or one for each where none for all makes sense."""
    places = [(node.spec, node.alias) for _, node in members if node.alias is not None]
    together = arrange(places, shift=True) if places else None
    if together is not None:
        extent, found = together
        # Whole elements, so that a storage has a length in its dtype.
        extent += -extent % max(node.spec.item for _, node in members)
        yield Memory(extent, [(*member, place) for member, place in zip(members, found, strict=True)])
        return
    for path, node in members:
        spec = node.spec
        if node.order is None:
            strides = c_strides(spec.shape, spec.item)
        else:
            strides = ordered_strides(spec.shape, spec.item, node.order)
        yield Memory(spec.nbytes, [(path, node, Place(0, strides))])


def _in_memory_order(stream: Stream, spec: Spec, order: Sequence[int]) -> Iterator[Buffer]:
    """The bytes of dense memory whose dimensions lie in `order`. If the outermost stays where it is (as in
    channels_last), some of its rows at a time; else all at once."""
    outer = next((at for at, axis in enumerate(order) if spec.shape[axis] > 1), 0)
    axis = order[outer]
    rows, step = 1, 1
    if all(length == 1 for length in spec.shape[:axis]):
        rows = spec.shape[axis]
        step = max(1, PIECE // (spec.nbytes // rows))
    inner = spec.nbytes // rows
    for start in range(0, rows, step):
        stop = min(rows, start + step) if rows > 1 else 1
        shape = list(spec.shape)
        if rows > 1:
            shape[axis] = stop - start
        data = stream.read(start * inner, stop * inner)
        part: Raw = np.frombuffer(data, raw_dtype(spec.item)).reshape(shape)
        yield bytes_of(np.ascontiguousarray(part.transpose(order)))


def _zeros(count: int) -> Iterator[Buffer]:
    for start in range(0, count, PIECE):
        yield bytes(min(PIECE, count - start))
