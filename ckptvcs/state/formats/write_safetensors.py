"""Safetensors files: eight bytes that say how long the header is, a JSON header, and the tensors' bytes.

The bytes are those that the `safetensors` library writes for the same tensors and metadata: sorted by dtype,
the widest first, then by name; the header padded with spaces to a multiple of 8; no holes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

from ckptvcs.state.formats.outgoing import Outgoing, Sink

CODES: Final = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "complex64": "C64",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}
"""The format's code for each dtype, in the format's own order."""

_RANK: Final = {dtype: rank for rank, dtype in enumerate(CODES)}
_LONGEST: Final = 100_000_000
"""What readers of the format accept as a header."""


def why_not(dtype: str) -> str | None:
    """Why a tensor of this dtype cannot be written, or None."""
    return None if dtype in CODES else f"the format has no code for dtype {dtype}"


def why_not_called(name: str) -> str | None:
    """Why a tensor cannot have this name, or None."""
    if name == "__metadata__":
        return "the format keeps the name __metadata__ for itself"
    if not name.isascii() and any("\ud800" <= char <= "\udfff" for char in name):
        return "its name is not Unicode text (a lone surrogate), which the header cannot hold"
    return None


def write(sink: Sink, tensors: Sequence[Outgoing], metadata: Mapping[str, str]) -> None:
    """Write a file. `metadata` is the header's `__metadata__`."""
    ordered = sorted(tensors, key=lambda each: (-_RANK[each.dtype], each.name.encode()))
    sink(header(ordered, metadata))
    for tensor in ordered:
        for piece in tensor.pieces():
            sink(piece)


def header(ordered: Sequence[Outgoing], metadata: Mapping[str, str]) -> bytes:
    """The length and the header of a file that holds these tensors one after another."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for tensor in ordered:
        entries[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset := offset + tensor.nbytes],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def fits(tensors: Sequence[Outgoing], metadata: Mapping[str, str]) -> bool:
    """Whether the header is short enough for those who read such files."""
    return len(header(tensors, metadata)) - 8 <= _LONGEST
