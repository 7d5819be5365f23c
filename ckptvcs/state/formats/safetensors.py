"""Safetensors: a length, a JSON header, and the tensors one after another.

https://huggingface.co/docs/safetensors: 8 bytes of header length, little endian; the header, an object of
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}` with offsets counted from its end, and text by name
in `__metadata__`; then the bytes, C order, little endian.
"""

from __future__ import annotations

import json
from typing import Any, Final

from ckptvcs.state import paths
from ckptvcs.state.formats.layout import MAX_TENSORS, File, Layout, Tensor, apart, shape_of
from ckptvcs.state.tensors import Spec, item_size

_MOST: Final = 100_000_000
"""Bytes of a header: the limit of the format's own reader."""

_DTYPES: Final = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32",
    "F64": "float64", "C64": "complex64", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E4M3FNUZ": "float8_e4m3fnuz",
}  # fmt: skip


class _OddError(Exception):
    """The header is none that a writer of this format makes."""


def parse(file: File) -> Layout | None:
    """The layout of a safetensors file; None if it is none, or damaged."""
    head = file.read(0, 9)
    if len(head) < 9 or head[8:] != b"{":
        return None
    length = int.from_bytes(head[:8], "little")
    if not 2 <= length <= min(_MOST, file.size - 8):
        return None
    text = file.read(8, length)
    if len(text) != length or _too_rich(text):
        return None
    try:
        header = json.loads(text.decode(), object_pairs_hook=_object)
        return _layout(header, 8 + length, file.size)
    except (_OddError, ValueError, RecursionError):
        return None


def _too_rich(text: bytes) -> bool:
    """Whether parsing would take far more memory than any header of so many tensors."""
    return text.count(b"{") + text.count(b"[") > 3 * MAX_TENSORS + 2 or text.count(b",") > 12 * MAX_TENSORS


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _OddError
    return found


def _layout(header: Any, start: int, size: int) -> Layout:
    if type(header) is not dict:
        raise _OddError
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise _OddError
    if len(header) > MAX_TENSORS:
        raise _OddError
    tensors = [_tensor(name, entry, start, size) for name, entry in header.items()]
    parts = apart(tensors)
    if len(parts) != sum(1 for tensor in tensors if tensor.spec.nbytes):
        raise _OddError  # they overlap
    return Layout(
        "safetensors", tuple(tensors), tuple(parts), {paths.name(key): text for key, text in metadata.items()}
    )


def _tensor(name: str, entry: Any, start: int, size: int) -> Tensor:
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _OddError
    dtype, shape, offsets = entry["dtype"], shape_of(entry["shape"]), entry["data_offsets"]
    if type(dtype) is not str or shape is None or type(offsets) is not list or len(offsets) != 2:
        raise _OddError
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= size - start:
        raise _OddError
    if dtype == "F4" and shape and shape[-1] % 2 == 0:  # two to a byte
        dtype, shape = "float4_e2m1fn_x2", (*shape[:-1], shape[-1] // 2)
    known = _DTYPES.get(dtype, dtype if dtype == "float4_e2m1fn_x2" else None)
    if known is None:  # a dtype from later than this program: its bytes are tensors all the same
        known, shape = "uint8", (end - begin,)
    spec = Spec("torch", known, shape, 0, item_size("torch", known))
    if spec.nbytes != end - begin:
        raise _OddError
    return Tensor(paths.name(name), start + begin, spec)
