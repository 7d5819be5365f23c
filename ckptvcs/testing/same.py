"""Bit-exact comparison of states, memory sharing aside."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import struct
import sys
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from ckptvcs.state import generators, torch_tensors
from ckptvcs.state.values import DataclassValue, EnumValue, TensorSubclassValue, type_name


def difference(a: Any, b: Any, path: str = "") -> str | None:
    """Where and how `b` differs from `a`, or None if both are the same to the last bit.

    Enum members and dataclass instances equal their stand-ins; named tuples equal by class name.
    """
    torch: Any = sys.modules.get("torch")
    if isinstance(a, enum.Enum):
        a = EnumValue(type_name(type(a)), a.name, a.value)
    if isinstance(b, enum.Enum):
        b = EnumValue(type_name(type(b)), b.name, b.value)
    a, b = _stand_in(a), _stand_in(b)
    if isinstance(a, tuple) and hasattr(a, "_fields") and hasattr(b, "_fields"):
        if type_name(type(a)) != type_name(type(b)) or a._fields != b._fields:
            return f"{path}: {type(a)} is not {type(b)}"
        a, b = tuple(a), tuple(b)
    if torch is not None:
        a, b = _taken_apart(a), _taken_apart(b)
    if isinstance(a, TensorSubclassValue) and isinstance(b, TensorSubclassValue):
        left, right = ([t.type, t.shape, t.flags, dict(t.parts), t.context] for t in (a, b))
        return difference(left, right, path)
    if torch is not None and isinstance(a, torch.Tensor):
        return _torch_difference(torch, a, b, path)
    if isinstance(a, np.memmap):
        a = np.asarray(a)
    if type(a) is not type(b):
        return f"{path}: {type(a)} is not {type(b)}"
    if isinstance(a, (np.ndarray, np.generic)):
        if a.dtype != b.dtype or a.dtype.str != b.dtype.str or a.shape != b.shape:
            return f"{path}: {a.dtype}{a.shape} is not {b.dtype}{b.shape}"
        return None if a.tobytes() == b.tobytes() else f"{path}: other bytes"
    if isinstance(a, (float, complex)):
        parts = [struct.pack("<dd", complex(v).real, complex(v).imag) for v in (a, b)]
        return None if parts[0] == parts[1] else f"{path}: {a!r} is not {b!r}"
    if isinstance(a, (argparse.Namespace, types.SimpleNamespace)):
        return difference(vars(a), vars(b), path)
    if isinstance(a, DataclassValue):
        return difference([a.type, dict(a.fields)], [b.type, dict(b.fields)], path)
    if isinstance(a, EnumValue):
        return difference((a.type, a.name, a.value), (b.type, b.name, b.value), path)
    if isinstance(a, Mapping):
        if len(a) != len(b):
            return f"{path}: {len(a)} entries, not {len(b)}"
        extra = ("default_factory", "_metadata")
        if any(getattr(a, name, None) != getattr(b, name, None) for name in extra):
            return f"{path}: another factory or metadata"
        for (key, value), (other, found) in zip(a.items(), b.items(), strict=True):
            wrong = difference(key, other, f"{path}/key") or difference(value, found, f"{path}/{key!r}")
            if wrong:
                return wrong
        return None
    if isinstance(a, (list, tuple, collections.deque)):
        if len(a) != len(b) or getattr(a, "maxlen", None) != getattr(b, "maxlen", None):
            return f"{path}: another length"
        wrongs = (difference(x, y, f"{path}/{at}") for at, (x, y) in enumerate(zip(a, b, strict=True)))
        return next(filter(None, wrongs), None)
    if torch is not None and isinstance(a, torch.Generator):
        return difference(a.get_state(), b.get_state(), path)
    if generators.is_generator(a):
        return None if generators.leaf(a) == generators.leaf(b) else f"{path}: a generator in another state"
    if hasattr(a, "fold") and a.fold != b.fold:
        return f"{path}: another fold"
    return None if a == b or repr(a) == repr(b) else f"{path}: {a!r} is not {b!r}"


def _stand_in(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(
        value, (EnumValue, DataclassValue, TensorSubclassValue, type)
    ):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return DataclassValue(type_name(type(value)), fields)
    return value


def _taken_apart(value: Any) -> Any:
    apart = torch_tensors.subclass(value) if torch_tensors.is_tensor(value) else None
    return value if apart is None else TensorSubclassValue(*apart)


def _torch_difference(torch: Any, a: Any, b: Any, path: str) -> str | None:
    if type(a) is not type(b) or a.dtype != b.dtype or a.shape != b.shape or a.layout != b.layout:
        return f"{path}: {type(a)} {getattr(a, 'dtype', '')} is not {type(b)} {getattr(b, 'dtype', '')}"
    if a.requires_grad != b.requires_grad:
        return f"{path}: requires_grad differs"
    a, b = a.detach(), b.detach()
    if a.is_quantized:
        wrong = difference(a.int_repr(), b.int_repr(), path)
        same = repr(a.quantizer() if hasattr(a, "quantizer") else a.qscheme()) == repr(
            b.quantizer() if hasattr(b, "quantizer") else b.qscheme()
        )
        return wrong or (None if same else f"{path}: other scheme")
    if a.layout is torch.sparse_coo:
        if a.is_coalesced() != b.is_coalesced():
            return f"{path}: coalesced differs"
        return difference([a._indices(), a._values()], [b._indices(), b._values()], path)
    if a.layout is not torch.strided:
        rows = a.layout in (torch.sparse_csr, torch.sparse_bsr)
        names = ("crow_indices", "col_indices") if rows else ("ccol_indices", "row_indices")
        left, right = ([getattr(t, name)() for name in (*names, "values")] for t in (a, b))
        return difference(left, right, path)
    return None if _bytes(torch, a) == _bytes(torch, b) else f"{path}: other bytes"


def _bytes(torch: Any, tensor: Any) -> bytes:
    """Logical bytes in C order, by a road other than the one under test."""
    tensor = tensor.resolve_conj().resolve_neg()
    if not tensor.numel():
        return b""
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
    # A copy: Tensor.numpy would make the storage of the tensor itself fixed in size.
    whole = tensor.view(same_size[tensor.element_size()]).clone(memory_format=torch.contiguous_format)
    return bytes(whole.reshape(-1).view(torch.uint8).numpy().tobytes())
