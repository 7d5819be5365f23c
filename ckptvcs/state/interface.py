"""What this layer asks of a store. Anything with these methods will do (`ckptvcs.testing.memory`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ckptvcs.ids import Buffer, Kind, ObjectId
from ckptvcs.store.format import Grid
from ckptvcs.store.hints import Hint


class Source(Protocol):
    """The bytes of one tensor, in C order and little endian. Thread-safe.

    `read` may be called again for the same range until the writer is closed, so the memory behind
    it stays alive and must not change meanwhile.
    """

    @property
    def nbytes(self) -> int:
        """All bytes; never 0 for a source handed to a writer."""

    @property
    def element_size(self) -> int:
        """Bytes of one number (a complex element counts as two): what codecs split by."""

    def read(self, offset: int, length: int) -> Buffer:
        """Bytes [offset, offset + length); without a copy where the memory is contiguous."""


class ObjectWriter(Protocol):
    """One commit's writer scope."""

    @property
    def grid(self) -> Grid:
        """How content is cut."""

    def put(
        self, sources: Sequence[Source], hints: Sequence[Hint] | None = None
    ) -> list[tuple[ObjectId, ...]]:
        """Cut each source by `grid.chunk`, store what is new, and return its chunk ids.

        `hints`, one per source, say what may help to store it small.
        """

    def put_objects(self, kind: Kind, payloads: Sequence[bytes]) -> list[ObjectId]:
        """Store objects. What they refer to was put before."""

    def section(self, name: str) -> None:
        """Frames that follow belong to this top-level component."""


class ObjectReader(Protocol):
    """Verified reads."""

    @property
    def grid(self) -> Grid:
        """How content was cut."""

    def objects(self, kind: Kind, ids: Sequence[ObjectId]) -> list[bytes]:
        """The payloads of these objects, each checked against its id."""

    def read_parts(self, wanted: Sequence[tuple[ObjectId, memoryview]]) -> None:
        """Fill each buffer with one chunk, which must be as long, checked against its id."""

    def read_into(self, requests: Sequence[tuple[Sequence[ObjectId], memoryview]]) -> None:
        """Fill each buffer with its chunks, one after another, each checked against its id."""
