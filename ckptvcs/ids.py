"""Ids: BLAKE3-256 of content. The only module that knows the hash function.

A chunk's id is the plain BLAKE3 of its raw bytes, before any encoding, so codecs may change and the
id stays. An object's id is BLAKE3 in key-derivation mode with the context ``ckptvcs <kind> v1``, so
that no two kinds can ever collide (BLAKE3 paper, section 2.3).
"""

from __future__ import annotations

import enum
import re
from typing import TypeAlias

from blake3 import blake3

Buffer: TypeAlias = bytes | bytearray | memoryview

ID_BYTES = 32
_HEX = re.compile(r"[0-9a-f]{64}\Z")


class Kind(enum.IntEnum):
    """What a record holds. The numbers are part of the format (docs/format.md)."""

    CHUNK = 1
    CHUNK_LIST = 2
    TREE = 3
    COMMIT = 4

    @property
    def label(self) -> str:
        """The word used in messages and in the hash context."""
        return self.name.lower().replace("_", " ")


class ObjectId(bytes):
    """A 32-byte content id. `str(id)` is 64 lower-case hex digits."""

    __slots__ = ()

    def __new__(cls, raw: Buffer) -> ObjectId:
        if len(raw) != ID_BYTES:
            raise ValueError(f"an id has {ID_BYTES} bytes, not {len(raw)}")
        return super().__new__(cls, raw)

    @classmethod
    def parse(cls, text: str) -> ObjectId:
        """The id written as exactly 64 lower-case hex digits; ValueError otherwise."""
        if not _HEX.match(text):
            raise ValueError(f"not an id: {text!r}")
        return cls(bytes.fromhex(text))

    @property
    def short(self) -> str:
        """The first 8 hex digits, for people."""
        return self.hex()[:8]

    def __str__(self) -> str:
        return self.hex()

    def __repr__(self) -> str:
        return f"ObjectId({self.hex()[:12]}…)"


_CONTEXTS = {kind: f"ckptvcs {kind.label} v1" for kind in Kind}


def chunk_id(raw: Buffer) -> ObjectId:
    """Id of a chunk: plain BLAKE3 of its bytes. Releases the GIL."""
    return ObjectId(blake3(raw).digest())


def object_id(kind: Kind, payload: Buffer) -> ObjectId:
    """Id of an object of `kind` with this canonical payload."""
    if kind is Kind.CHUNK:
        return chunk_id(payload)
    return ObjectId(blake3(payload, derive_key_context=_CONTEXTS[kind]).digest())


def digest(raw: Buffer, length: int = 16) -> bytes:
    """First `length` bytes of plain BLAKE3: guards stored payloads and journal lines."""
    return blake3(raw).digest(length=length)


class Hasher:
    """BLAKE3 of a whole file fed piece by piece (the file entry's hash)."""

    def __init__(self) -> None:
        self._hasher = blake3()

    def update(self, raw: Buffer) -> None:
        """Add the next bytes."""
        self._hasher.update(raw)

    def id(self) -> ObjectId:
        """Id of all bytes so far."""
        return ObjectId(self._hasher.digest())
