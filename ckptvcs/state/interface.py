"""What this layer asks of a store, and of objects in a state.

Anything with these methods will do (`ckptvcs.testing.memory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

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


# -- objects in a state ---------------------------------------------------------------------------


class Last(Protocol):
    """An object with `state_dict()` and `load_state_dict(state)` that belongs behind all others, wherever
    it stands in the state: it is saved after them and loaded after them.

    Random generators are the reason: loaders draw numbers while they move to their position.
    """

    ckpt_last: bool
    """True."""

    def ckpt_differences(self, state: Any) -> Sequence[str]:
        """What of a stored state this object cannot take, each as a path with the reason in brackets.
        Asked before a strict restore changes anything; may be left out."""


def is_last(value: object) -> bool:
    """Whether an object says that it is `Last`."""
    return getattr(value, "ckpt_last", False) is True
