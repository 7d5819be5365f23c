"""Codecs: raw bytes of a chunk or object <-> stored payload.

A codec is a number in the record header. Decoding checks every declared size before memory is taken for it,
and the reader checks the id of what comes out, so a codec need not be trusted.

The codecs for numbers bring numpy, which listing a history must not wait for: their modules are imported
when the first of their frames is met.
"""

from __future__ import annotations

import importlib
from typing import Any, Final, Protocol

from ckptvcs.errors import CorruptionError, FormatError
from ckptvcs.ids import Buffer
from ckptvcs.store import entropy

RAW: Final = 0
ZSTD: Final = 1
PLANES: Final = 2
DIFFERENCE: Final = 3
EXPERIMENTAL: Final = range(240, 256)
"""Codec numbers that no release ever writes; tests use them for synthetic frames."""

_SAMPLE: Final = 16 << 10
_MIN_SIZE: Final = 64
_WORTHWHILE: Final = 0.97
"""A payload is kept compressed only below this share of its raw size: decoding costs time."""


class Codec(Protocol):
    """One way to store bytes. Instances are shared between threads."""

    def decode(self, payload: Buffer, into: memoryview, element_size: int, base: Buffer | None) -> None:
        """Fill `into`, whose length is the record's raw length. ValueError for impossible payloads.

        `base` holds the bytes of the base, of the same length, and may be `into` itself.
        """


class _Raw:
    def decode(self, payload: Buffer, into: memoryview, element_size: int, base: Buffer | None) -> None:
        if len(payload) != len(into):
            raise ValueError(f"{len(payload)} stored bytes for {len(into)} raw ones")
        into[:] = payload


class _Zstd:
    def decode(self, payload: Buffer, into: memoryview, element_size: int, base: Buffer | None) -> None:
        into[:] = entropy.inflate(payload, len(into))


class _Numbers:
    """A codec in a module of this package that is imported on first use."""

    def __init__(self, module: str) -> None:
        self._module = module

    def decode(self, payload: Buffer, into: memoryview, element_size: int, base: Buffer | None) -> None:
        module: Any = importlib.import_module(self._module)
        module.decode_frame(payload, into, element_size, base)


CODECS: Final[dict[int, Codec]] = {
    RAW: _Raw(),
    ZSTD: _Zstd(),
    PLANES: _Numbers("ckptvcs.store.planes"),
    DIFFERENCE: _Numbers("ckptvcs.store.difference"),
}


def deflate(raw: Buffer) -> bytes | None:
    """`raw` as a zstandard frame; None if that is hardly smaller."""
    size = len(raw)
    if size < _MIN_SIZE:
        return None
    if size > 4 * _SAMPLE:
        # Trial on the middle: bytes that do not compress are found out by a part of them.
        middle = (size // 2) & ~7
        sample = memoryview(raw)[middle : middle + _SAMPLE]
        if len(entropy.deflate(sample)) > _WORTHWHILE * _SAMPLE:
            return None
    payload = entropy.deflate(raw)
    return payload if len(payload) < _WORTHWHILE * size else None


def encode(raw: Buffer) -> tuple[int, Buffer]:
    """The best encoding of bytes that are no numbers: (codec, payload). The payload may be `raw` itself."""
    payload = deflate(raw)
    return (RAW, raw) if payload is None else (ZSTD, payload)


def decode(
    codec: int, payload: Buffer, into: memoryview, element_size: int, base: Buffer | None, where: str
) -> None:
    """Decode `payload` into `into`. The caller verifies the id afterwards."""
    known = CODECS.get(codec)
    if known is None:
        raise FormatError(f"{where}: unknown codec {codec}", hint="use a newer ckptvcs")
    try:
        known.decode(payload, into, element_size, base)
    except ValueError as error:
        raise CorruptionError(f"{where}: the stored bytes cannot be decoded: {error}", path=where) from None
