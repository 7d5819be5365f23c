"""Numpy archives: a zip of `.npy` files, as `np.savez` writes them, without holding an array in memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

import numpy as np

from ckptvcs.state.formats.outgoing import Outgoing, Sink
from ckptvcs.state.formats.write_zip import ZipWriter
from ckptvcs.state.tensors import numpy_dtype

_MAGIC: Final = b"\x93NUMPY"
_ALIGNMENT: Final = 64
_LONGEST: Final = 0xFFFF - len(".npy")
"""Bytes of a name: a zip archive counts them in 16 bits."""


def why_not(dtype: str) -> str | None:
    """Why an array of this dtype cannot be written, or None."""
    try:
        found = numpy_dtype(dtype)
    except Exception:  # noqa: BLE001 - a dtype of torch alone
        return f"dtype {dtype} is not one of numpy's"
    if found.type.__module__ != "numpy":
        return f"dtype {dtype} is not one of numpy's own, and `np.load` would give bytes without a type"
    return None


def why_not_called(name: str) -> str | None:
    """Why an array cannot have this name, or None. A name is a path for whoever unpacks the archive."""
    if any("\ud800" <= char <= "\udfff" for char in name):
        return "its name is not Unicode text (a lone surrogate)"
    if not name or name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        return "its name would lead whoever unpacks the archive out of their folder"
    if len(name.encode()) > _LONGEST:
        return "its name is longer than an archive can hold"
    return None


def write(sink: Sink, tensors: Sequence[Outgoing], comment: str) -> None:
    """Write an archive. The bytes are little endian and in C order, whatever the array was."""
    archive = ZipWriter(sink, comment.encode())
    for tensor in tensors:
        header = _header(tensor)
        archive.member(
            f"{tensor.name}.npy", len(header) + tensor.nbytes, itertools.chain([header], tensor.pieces())
        )
    archive.close()


def _header(tensor: Outgoing) -> bytes:
    """The header of a `.npy` file: numpy.lib.format, version 1.0, or 2.0 where the shape is very long."""
    descr = np.lib.format.dtype_to_descr(numpy_dtype(tensor.dtype))
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {tensor.shape!r}, }}"
    version, width = (1, 2) if len(text) < 0xFF00 else (2, 4)
    padded = text + " " * (-(len(_MAGIC) + 2 + width + len(text) + 1) % _ALIGNMENT) + "\n"
    return _MAGIC + bytes((version, 0)) + len(padded).to_bytes(width, "little") + padded.encode("latin1")
