"""Numpy files: one array (`.npy`), and archives of them (`.npz`).

`numpy.lib.format`: a magic, a version, the length of a header, which is a Python dict written out, and the
elements. The header is matched, never evaluated. Arrays of objects and records are no tensors, and neither
are compressed members: they could not be compressed to the same bytes again.
"""

from __future__ import annotations

import re
from typing import Final

import numpy as np

from ckptvcs.errors import FormatError
from ckptvcs.state import codes, paths
from ckptvcs.state.formats.archive import members
from ckptvcs.state.formats.layout import File, Layout, Tensor, shape_of, strides_of
from ckptvcs.state.tensors import Spec, c_strides, dtype_name, item_size, ordered_strides, unit

_MAGIC: Final = b"\x93NUMPY"
_MOST_HEADER: Final = 1 << 16
_HEADER: Final = re.compile(
    rb"\{'descr': '(?P<descr>[<>|=][biufcmMSUV]\d{0,9}(?:\[\d{0,9}[a-zA-Z]{1,2}\])?)', "
    rb"'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>(?:\d{1,18}L?, ?)*(?:\d{1,18})?)\), ?\}[ \n]*\Z"
)


def parse(file: File) -> Layout | None:
    """The layout of a `.npz` archive; None if it is none, or holds no plain array that is stored as it is."""
    found = []
    for member in members(file) or ():
        name = member.name.removesuffix(".npy")
        if member.stored and name != member.name:
            tensor = _array(file, paths.name(name), member.offset, member.size)
            if tensor is not None:
                found.append(tensor)
    if not found:
        return None
    return Layout("npz", tuple(found), tuple(tensor for tensor in found if tensor.spec.nbytes))


def parse_npy(file: File) -> Layout | None:
    """The layout of a `.npy` file; None if it is none, or its dtype is none of tensors."""
    tensor = _array(file, "array", 0, file.size)
    if tensor is None:
        return None
    return Layout("npy", (tensor,), (tensor,) if tensor.spec.nbytes else ())


def _array(file: File, name: str, start: int, size: int) -> Tensor | None:
    head = file.read(start, min(size, 12))
    if len(head) < 10 or head[:6] != _MAGIC or head[6] not in (1, 2, 3):
        return None
    wide = 2 if head[6] == 1 else 4
    if len(head) < 8 + wide:
        return None
    length = int.from_bytes(head[8 : 8 + wide], "little")
    data = 8 + wide + length
    if length > _MOST_HEADER or data > size:
        return None
    header = _HEADER.match(file.read(start + 8 + wide, length))
    if header is None:
        return None
    spec, fortran = _spec(header), header["fortran"] == b"True"
    if spec is None or spec.nbytes != size - data:
        return None
    strides = c_strides(spec.shape, spec.item)
    if fortran:
        strides = ordered_strides(spec.shape, spec.item, range(len(spec.shape))[::-1])
    return Tensor(name, start + data, spec, strides_of(spec.shape, strides, spec.item))


def _spec(header: re.Match[bytes]) -> Spec | None:
    try:
        dtype = np.dtype(header["descr"].decode())
    except (TypeError, ValueError, OverflowError):
        return None
    lengths = header["shape"].decode().replace("L", "").split(",")
    shape = shape_of([int(length) for length in lengths if length.strip()])
    name = dtype_name(dtype)
    if shape is None or name is None or not _is_known(name):
        return None
    big = unit(name, dtype.itemsize) > 1 and dtype.str[0] == ">"
    return Spec("numpy", name, shape, codes.BIG_ENDIAN if big else 0, dtype.itemsize)


def _is_known(name: str) -> bool:
    """Whether a dtype of this name can be read back: numpy has longer text than trees do."""
    try:
        return item_size("numpy", name) > 0
    except FormatError:
        return False
