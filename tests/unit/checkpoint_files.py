"""Checkpoint files as the libraries write them, for tests."""

from __future__ import annotations

import collections
import io
import json
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs.ids import chunk_id
from ckptvcs.state.formats.layout import File, Layout, TensorSource
from ckptvcs.state.formats.recognise import recognise

torch = pytest.importorskip("torch")


def numbers(seed: int, *shape: int, dtype: Any = np.float32) -> Any:
    """Random numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


_NAMES = {
    "float32": "F32",
    "float64": "F64",
    "bfloat16": "BF16",
    "int64": "I64",
    "uint8": "U8",
    "bool": "BOOL",
}


def safetensors(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file, as its specification says and its library pads them."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name, array in tensors.items():
        end = at + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(array.tobytes() for array in tensors.values())


def saved(value: Any, **how: Any) -> bytes:
    """What torch.save writes."""
    out = io.BytesIO()
    torch.save(value, out, **how)
    return out.getvalue()


def npz(write: Callable[..., None] = np.savez, **arrays: Any) -> bytes:
    """What numpy.savez writes."""
    out = io.BytesIO()
    write(out, **arrays)
    return out.getvalue()


def npy(array: Any) -> bytes:
    """What numpy.save writes."""
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def layout_of(data: bytes) -> Layout | None:
    """What is recognised in a file of these bytes."""
    return recognise(File(len(data), lambda offset, length: data[offset : offset + length]))


def ids_in(data: bytes) -> dict[str, Any]:
    """The chunk ids of each tensor of a file, as the layout's sources give their bytes."""
    found = layout_of(data)
    assert found is not None
    file = File(len(data), lambda offset, length: data[offset : offset + length])
    return {t.name: chunk_id(TensorSource(file, t).read(0, t.spec.nbytes)) for t in found.tensors}


def optimizer_state() -> Any:
    """The whole state of a few steps of training."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16)).to(
        memory_format=torch.channels_last
    )
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(2):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        optimizer.step()
        scheduler.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "epoch": 3,
        "metrics": {"val_loss": 0.25, "np": np.float64(1.5)},
        "rng": torch.get_rng_state(),
    }


def nested() -> Any:
    """Tensors of many kinds, shared and not."""
    torch.manual_seed(1)
    base, tied = torch.randn(40, 40), torch.randn(30, 30)
    return {
        "tied": {"a": tied, "b": tied},
        "views": [base[:10], base[20:], base[::2], base.t()],
        "turned": torch.randn(4, 8, 8, 8).to(memory_format=torch.channels_last),
        "transposed": torch.randn(50, 30).t(),
        "bf16": torch.randn(30, 30).bfloat16(),
        "f8": torch.randn(30, 30).to(torch.float8_e4m3fn),
        "u16": torch.arange(300).to(torch.uint16),
        "bool": torch.randn(400) > 0,
        "complex": torch.randn(30, 30, dtype=torch.complex64),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(torch.randn(20, 20)),
        "part of a storage": torch.randn(1000)[100:120],
        "expanded": torch.randn(1, 30).expand(30, 30),
        "sparse": torch.eye(40).to_sparse(),
        "quantized": torch.quantize_per_tensor(base, 0.1, 3, torch.qint8),
        "text": "x" * 10_000,
        (1, "a"): {0: torch.randn(100)},
        "ordered": collections.OrderedDict(a=[1, None, True]),
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
    }


def scripted(tmp: Path) -> bytes:
    """What torch.jit writes."""
    torch.jit.script(torch.nn.Linear(20, 20)).save(str(tmp))
    return tmp.read_bytes()


def zipped(members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()
