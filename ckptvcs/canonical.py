"""The canonical encoding: one byte string per value, the same on every machine and Python version.

A subset of msgpack. The only module that imports the library.

- None, bool, int, float, str, bytes, list, dict and `Tagged`; nothing else, no subclasses.
- Integers take their shortest form; beyond 64 bit they are extension `BIGINT` (big-endian two's
  complement, shortest). Floats are always 8 IEEE bytes, so NaN payloads and -0.0 survive.
- Text is UTF-8 where lone surrogates are kept (file names and Python strings may hold them).
- The order of a dict is content. Keys may be any hashable value, `Tagged` included; 1, True and 1.0
  are distinct.
- `decode` accepts only the one encoding `encode` would give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgpack

from ckptvcs.ids import Buffer

BIGINT: Final = 1
"""Extension code of integers beyond 64 bit; codes above it are the tree's (docs/format.md)."""

MAX_DEPTH: Final = 200
"""A container lies within at most so many others, in one encoded value."""


@dataclass(frozen=True, slots=True)
class Tagged:
    """An extension value: a small code with bytes that the code's owner understands."""

    code: int
    payload: bytes


class NotCanonicalError(ValueError):
    """Bytes that are not the canonical encoding of any value."""


def _extend(value: object) -> msgpack.ExtType:
    if type(value) is Tagged:
        return msgpack.ExtType(value.code, value.payload)
    if type(value) is int:
        # bit_length of -2**63 - 1 is 64, yet its two's complement needs 65 bits: count the complement.
        bits = (value if value >= 0 else ~value).bit_length() + 1
        return msgpack.ExtType(BIGINT, value.to_bytes((bits + 7) // 8, "big", signed=True))
    raise TypeError(f"{type(value).__name__} has no canonical encoding")


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(
        value, default=_extend, strict_types=True, use_bin_type=True, unicode_errors="surrogatepass"
    )
    return packed


def encode(value: Any) -> bytes:
    """The canonical bytes of `value`. TypeError for a type outside the subset; ValueError if too deep."""
    packed = _pack(value)
    if len(packed) > MAX_DEPTH and _too_deep(value):
        raise ValueError(f"nested deeper than {MAX_DEPTH} containers")
    return packed


def _too_deep(value: Any) -> bool:
    level = [value] if type(value) in _CONTAINERS else []
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return False
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in _CONTAINERS
        ]
    return bool(level)


_CONTAINERS: Final = (list, dict)


def _restore(code: int, payload: bytes) -> Any:
    if code == BIGINT:
        return int.from_bytes(payload, "big", signed=True)
    return Tagged(code, payload)


def decode(data: Buffer) -> Any:
    """The value `data` encodes. NotCanonicalError for anything that `encode` would not write."""
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=False,
            use_list=True,
            ext_hook=_restore,
            unicode_errors="surrogatepass",
        )
        again = _pack(value)
    except (MemoryError, RecursionError):  # says something of this process, nothing of the bytes
        raise
    except Exception as error:  # noqa: BLE001 - the library raises many kinds; each means the same here
        raise NotCanonicalError(f"not a canonical value: {type(error).__name__}: {error}") from None
    if again != data:
        raise NotCanonicalError("not the shortest encoding of its value")
    if len(again) > MAX_DEPTH and _too_deep(value):
        raise NotCanonicalError(f"nested deeper than {MAX_DEPTH} containers")
    # The library turns extension -1 into a Timestamp behind our hook. Its three headers are rare
    # enough in real data that the walk over the value almost never happens.
    if any(header in again for header in _TIMESTAMP_HEADERS) and _holds_timestamp(value):
        raise NotCanonicalError("extension -1 is not part of the encoding")
    return value


_TIMESTAMP_HEADERS = (b"\xd6\xff", b"\xd7\xff", b"\xc7\x0c\xff")


def _holds_timestamp(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_timestamp(k) or _holds_timestamp(v) for k, v in value.items())
    if isinstance(value, list):
        return any(map(_holds_timestamp, value))
    return isinstance(value, msgpack.Timestamp)


def encoded_array(items: list[bytes]) -> bytes:
    """The encoding of a list whose items are encoded already."""
    header: bytes = _PACKER.pack_array_header(len(items))
    return header + b"".join(items)


def encoded_map(items: list[tuple[bytes, bytes]]) -> bytes:
    """The encoding of a dict whose keys and values are encoded already, in this order."""
    header: bytes = _PACKER.pack_map_header(len(items))
    return header + b"".join([part for item in items for part in item])


def encoded_tag(code: int, payload: bytes) -> bytes:
    """The encoding of `Tagged(code, payload)`."""
    packed: bytes = _PACKER.pack_ext_type(code, payload)
    return packed


_PACKER = msgpack.Packer()
