"""Stored bytes, read in order a few MiB at a time, for whoever must not hold a tensor in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ckptvcs.ids import Buffer
from ckptvcs.state.interface import ObjectReader
from ckptvcs.state.materialise import resolve
from ckptvcs.state.read import Content

PIECE: Final = 16 << 20
"""Bytes read at a time: enough chunks to keep all threads at work."""


class Stream:
    """The bytes of one tensor or blob, checked against the ids of their chunks as they are read."""

    def __init__(self, reader: ObjectReader, content: Content) -> None:
        self._reader = reader
        self._content = content
        self.nbytes = content.nbytes

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop). Reads whole chunks, so a range that ends inside one costs all of it."""
        content, cell = self._content, self._reader.grid.chunk
        if content.inline is not None:
            return memoryview(content.inline)[start:stop]
        resolve(self._reader, [content])
        chunks = content.chunks
        assert chunks is not None
        first, last = start // cell, -(-stop // cell)
        memory = memoryview(bytearray(min(last * cell, self.nbytes) - first * cell))
        self._reader.read_into([(chunks[first:last], memory)])
        return memory[start - first * cell : stop - first * cell]

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[Buffer]:
        """Bytes from `start` to `stop`, piece by piece. Pieces end at multiples of `PIECE`."""
        end = self.nbytes if stop is None else stop
        while start < end:
            until = min(end, (start // PIECE + 1) * PIECE)
            yield self.read(start, until)
            start = until
