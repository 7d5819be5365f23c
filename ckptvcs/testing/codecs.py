"""A synthetic difference codec, so that base chains can be tested without any floating-point codec.

Its number is one that no release ever writes. A repository with such frames can be read only while the
codec is registered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import numpy as np

from ckptvcs.ids import Buffer, Kind, ObjectId, chunk_id
from ckptvcs.store.codec import CODECS, EXPERIMENTAL
from ckptvcs.store.packs import Frame, make_frame

XOR: Final = EXPERIMENTAL[0]


class XorDelta:
    """The exclusive or of a chunk and its base, which must be as long."""

    def encode(self, raw: Buffer, element_size: int, base: Buffer | None) -> bytes | None:
        """The difference; None without a base of the same length."""
        if base is None or len(base) != len(raw):
            return None
        return np.bitwise_xor(np.frombuffer(raw, np.uint8), np.frombuffer(base, np.uint8)).tobytes()

    def decode(self, payload: Buffer, into: memoryview, element_size: int, base: Buffer | None) -> None:
        """The chunk back from its difference."""
        if base is None or len(base) != len(into) or len(payload) != len(into):
            raise ValueError("the base does not fit the difference")
        into[:] = np.bitwise_xor(np.frombuffer(payload, np.uint8), np.frombuffer(base, np.uint8)).tobytes()


def register() -> None:
    """Know the codec from now on in this process."""
    CODECS[XOR] = XorDelta()


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Know the codec inside the block."""
    before = CODECS.get(XOR)
    register()
    try:
        yield
    finally:
        if before is None:
            del CODECS[XOR]
        else:
            CODECS[XOR] = before


def delta_frame(raw: bytes, base: bytes, *, base_id: ObjectId | None = None) -> Frame:
    """A chunk stored as a difference against another of the same length."""
    payload = XorDelta().encode(raw, 1, base)
    if payload is None:
        raise ValueError("a base must be as long as its difference")
    return make_frame(Kind.CHUNK, chunk_id(raw), XOR, 1, len(raw), payload, base_id or chunk_id(base))
