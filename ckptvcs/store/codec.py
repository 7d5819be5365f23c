"""Codecs: raw bytes of a chunk or object <-> stored payload. The only module that knows zstandard.

A codec is a number in the record header. Decoding checks every declared size before it allocates:
python-zstandard ignores `max_output_size` when a frame states its own size, so the stated size is
compared with the record's raw length first.
"""

from __future__ import annotations

import threading
from typing import Final, Protocol

import zstandard

from ckptvcs.errors import CorruptionError, FormatError
from ckptvcs.ids import Buffer

RAW: Final = 0
ZSTD: Final = 1
EXPERIMENTAL: Final = range(240, 256)
"""Codec numbers that no release ever writes; tests use them for synthetic frames."""

_LEVEL: Final = 1
_SAMPLE: Final = 16 << 10
_MIN_SIZE: Final = 64
_WORTHWHILE: Final = 0.97
"""A payload is kept compressed only below this share of its raw size: decoding costs time."""


class Codec(Protocol):
    """One way to store bytes. Instances are shared between threads."""

    def encode(self, raw: Buffer, element_size: int, base: Buffer | None) -> bytes | None:
        """The payload, or None if this codec does not make the bytes smaller."""

    def decode(self, payload: Buffer, into: memoryview, element_size: int, base: Buffer | None) -> None:
        """Fill `into`, whose length is the record's raw length. ValueError for impossible payloads."""


class _Raw:
    def encode(self, raw: Buffer, element_size: int, base: Buffer | None) -> bytes | None:
        return bytes(raw)

    def decode(self, payload: Buffer, into: memoryview, element_size: int, base: Buffer | None) -> None:
        if len(payload) != len(into):
            raise ValueError(f"{len(payload)} stored bytes for {len(into)} raw ones")
        into[:] = payload


class _Zstd:
    """Plain zstandard. Compressors are not thread-safe, so each thread has its own pair."""

    def __init__(self) -> None:
        self._local = threading.local()

    def _pair(self) -> tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor]:
        pair = getattr(self._local, "pair", None)
        if pair is None:
            pair = zstandard.ZstdCompressor(level=_LEVEL), zstandard.ZstdDecompressor()
            self._local.pair = pair
        return pair

    def encode(self, raw: Buffer, element_size: int, base: Buffer | None) -> bytes | None:
        size = len(raw)
        if size < _MIN_SIZE:
            return None
        compressor, _ = self._pair()
        if size > 4 * _SAMPLE:
            # Trial on the middle of the chunk: dense mantissas do not compress, and finding that out
            # on all of it would cost more than writing it.
            middle = (size // 2) & ~7
            sample = memoryview(raw)[middle : middle + _SAMPLE]
            if len(compressor.compress(sample)) > _WORTHWHILE * _SAMPLE:
                return None
        payload = compressor.compress(raw)
        return payload if len(payload) < _WORTHWHILE * size else None

    def decode(self, payload: Buffer, into: memoryview, element_size: int, base: Buffer | None) -> None:
        try:
            stated = zstandard.frame_content_size(payload)
            if stated != len(into):
                raise ValueError(f"the frame states {stated} bytes, the record {len(into)}")
            _, decompressor = self._pair()
            raw = decompressor.decompress(payload, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None
        if len(raw) != len(into):
            raise ValueError(f"the frame gave {len(raw)} bytes, the record states {len(into)}")
        into[:] = raw


CODECS: Final[dict[int, Codec]] = {RAW: _Raw(), ZSTD: _Zstd()}


def encode(raw: Buffer, element_size: int) -> tuple[int, Buffer]:
    """The best plain encoding of `raw`: (codec, payload). The payload may be `raw` itself, uncopied."""
    payload = CODECS[ZSTD].encode(raw, element_size, None)
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
