"""States whose trees are frozen: every code of `ckptvcs.state.codes`, and each way a tree is split."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import pathlib
import random
import types
import zoneinfo
from typing import Any

import ml_dtypes
import numpy as np
import torch

from ckptvcs.ids import Kind
from ckptvcs.state import tree
from ckptvcs.state.build import FileContent, LinkContent, TensorContent
from ckptvcs.state.tensors import BytesSource, Spec
from ckptvcs.state.values import TensorSubclassValue
from ckptvcs.testing.memory import MemoryStore


class Mode(enum.Enum):
    """A user's enum."""

    TRAIN = "train"


@dataclasses.dataclass
class Settings:
    """A user's dataclass."""

    lr: float
    layers: list[int]


Point = collections.namedtuple("Point", "x y")
UTC = datetime.UTC


def numbers(dtype: Any, count: int = 6) -> np.ndarray[Any, Any]:
    """Elements whose bytes count up from 1."""
    item = np.dtype(dtype).itemsize
    return np.frombuffer(bytes(i % 250 + 1 for i in range(item * count)), dtype).copy()


def leaves() -> dict[str, Any]:
    """Python values."""
    ordered = collections.OrderedDict(b=1, a=2)
    ordered._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    return {
        "plain": [
            None,
            True,
            False,
            0,
            1,
            -1,
            2**63,
            -(2**63) - 1,
            2**200,
            1.0,
            -0.0,
            float("inf"),
            "é\ud800",
            b"\0",
        ],
        "keys": {
            0: "int",
            "0": "text",
            True: "bool",
            2.5: "float",
            None: "none",
            (1, "a"): "tuple",
            b"k": "bytes",
        },
        "tuples": ((), (1, (2,)), Point(1, [2])),
        "sets": [set(), {3, 1, 2}, frozenset(("b", "a"))],
        "dicts": [ordered, collections.OrderedDict(), collections.defaultdict(list, {"x": [1]})],
        "deque": [collections.deque([1, 2], maxlen=3), collections.deque()],
        "complex": 1 - 2j,
        "bytearray": bytearray(b"abc"),
        "paths": [pathlib.PurePosixPath("a/b"), pathlib.PureWindowsPath("c:/d")],
        "times": [
            datetime.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC, fold=1),
            datetime.datetime(2026, 1, 2),
            datetime.date(2026, 1, 2),
            datetime.time(3, 4, 5, 6),
            datetime.timedelta(-1, 2, 3),
            datetime.timezone(datetime.timedelta(hours=-3), "X"),
            zoneinfo.ZoneInfo("UTC"),
        ],
        "namespaces": [argparse.Namespace(lr=0.1), types.SimpleNamespace(a=[1])],
        "stand-ins": [Mode.TRAIN, Settings(0.1, [1, 2])],
        "ranges": [range(1, 9, 2), slice(None, 3), ...],
        "scalars": [np.float32(1.5), np.int8(-1), np.str_("x"), np.datetime64("2026-01-02"), np.bool_(True)],
        "dtypes": [np.dtype("float32"), np.dtype(">i2"), np.dtype(ml_dtypes.bfloat16)],
        "long": ["t" * 3000, b"b" * 3000, bytearray(b"c" * 3000)],
    }


def arrays() -> dict[str, Any]:
    """numpy arrays of every dtype and layout."""
    names = (
        "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128"
    )
    shared = np.arange(12, dtype=np.float32).reshape(3, 4)
    small = [getattr(ml_dtypes, name) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4")]
    return {
        **{name: numbers("u1").astype(bool) if name == "bool" else numbers(name) for name in names.split()},
        **{np.dtype(dtype).name: np.arange(6).astype(dtype) for dtype in small},
        "text": np.array(["a", "bc"]),
        "times": np.array(["2026-01-02"], "datetime64[ns]"),
        "big endian": numbers(">f4"),
        "no dimension": np.array(7, np.int32),
        "empty": np.zeros((0, 3)),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "strided": np.arange(20)[::3],
        "shared": [shared, shared[1:], shared[:, ::-1], shared],
        "one chunk": np.arange(1000, dtype=np.int32),
        "chunks": np.arange(700_000, dtype=np.int32),
        "chunk list": np.arange(1_500_000, dtype=np.int32),
    }


def tensors() -> dict[str, Any]:
    """torch tensors."""
    base = torch.arange(6, dtype=torch.float32)
    images = torch.arange(24, dtype=torch.float32).reshape(1, 2, 3, 4)
    indices = torch.tensor([[0, 1], [1, 0]])
    return {
        "bfloat16": base.to(torch.bfloat16),
        "float8": base.to(torch.float8_e4m3fn),
        "bool": base > 2,
        "complex": torch.complex(base, -base),
        "parameter": torch.nn.Parameter(base.clone()),
        "grad": base.clone().requires_grad_(),
        "shared": [base, base[2:]],
        "channels last": images.contiguous(memory_format=torch.channels_last),
        "coo": torch.sparse_coo_tensor(indices, torch.tensor([1.0, 2.0]), (2, 2)).coalesce(),
        "csr": torch.tensor([[0.0, 1.0], [2.0, 0.0]]).to_sparse_csr(),
        "leaves": [torch.Size([1, 2]), torch.float16, torch.device("cuda:1")],
    }


def split() -> dict[str, Any]:
    """Containers that become pages."""
    return {
        "dict": {f"key{n}": n for n in range(600)},
        "dict of dicts": {n: {"step": n, "name": f"layer{n}"} for n in range(120)},
        "numbers": [n * 0.5 for n in range(3000)],
        "list": [{"at": n} for n in range(300)],
        "tuple": tuple(str(n) for n in range(600)),
    }


def generators() -> dict[str, Any]:
    """Random generators."""
    used = random.Random(1)
    used.gauss(0, 1)
    state = np.random.RandomState(2)
    state.standard_normal()
    half = np.random.Generator(np.random.PCG64([3, 2**70]))
    half.integers(0, 9, dtype=np.uint32)
    half.spawn(2)
    kinds = (np.random.MT19937, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)
    return {
        "python": [random.Random(0), used],
        "numpy": [state, half, *(np.random.Generator(kind(4)) for kind in kinds)],
        "bits": np.random.PCG64(5),
    }


def files() -> tree.Folder:
    """A folder of files."""
    long = b"0123456789" * 100
    return {
        "folder": {
            "empty": FileContent(0, 0o644, b"\1" * 32, 0, []),
            "small": FileContent(3, 0o755, b"\2" * 32, 0, [BytesSource(b"abc")]),
            "long": FileContent(1000, 0o600, b"\3" * 32, 0, [BytesSource(long)]),
        },
        "link": LinkContent("folder/small"),
    }


def tensor_files() -> tree.Folder:
    """Files in which tensors lie: two and a few, and so many that they become pages."""

    def tensor(name: str, before: int, spec: Spec, order: list[int] | None = None) -> TensorContent:
        return TensorContent(
            name, before, spec, order, BytesSource(bytes(n % 251 for n in range(spec.nbytes)))
        )

    plain, parameter = Spec("torch", "bfloat16", (10, 20), 0, 2), Spec("torch", "float32", (3, 100), 6, 4)
    big = Spec("numpy", "float64", (40,), 1, 8)
    small = [
        tensor("a", 10, plain), tensor("b/c", 0, parameter, [1, 0]),
        tensor("tiny", 3, Spec("numpy", "int8", (4,), 0, 1)), tensor("big", 1, big),
    ]  # fmt: skip
    many = [tensor(f"layers.{at}.weight", at % 3, plain) for at in range(200)]
    rest = [BytesSource(b"header" * 100)]
    sizes = [sum(each.spec.nbytes for each in tensors) for tensors in (small, many)]
    return {
        "few": FileContent(sizes[0] + 20, 0o644, b"\4" * 32, 0, [BytesSource(b"x" * 20)], "npz", small),
        "many": FileContent(sizes[1] + 600, 0o600, b"\5" * 32, 0, rest, "safetensors", many),
    }


class Marked(torch.Tensor):
    """A user's tensor."""


def later() -> dict[str, Any]:
    """What got codes of its own after the first."""
    data = torch.arange(3, dtype=torch.float32)
    marked: Any = torch.nn.Parameter(data.clone()).detach().as_subclass(Marked)
    marked.scale = 0.5
    parts = {"a": data.clone(), "b": data + 1}
    return {
        "counter": collections.Counter({"x": 2, 5: 1}),
        "constants": [torch.sparse_csr, torch.channels_last, torch.per_channel_affine],
        "subclass": marked,
        "stand-in": TensorSubclassValue("somewhere:Pair", (3,), 2, parts, {"axis": 0}),
    }


FILES = {"files": files, "tensor files": tensor_files}
STATES = {
    "leaves": leaves,
    "arrays": arrays,
    "tensors": tensors,
    "split": split,
    "later": later,
    "generators": generators,
}


def written(name: str) -> tuple[MemoryStore, bytes]:
    """A store that holds a state's tree, and the tree's id."""
    store = MemoryStore()
    if name in FILES:
        return store, tree.write(store, files=FILES[name]()).tree
    return store, tree.write(store, STATES[name]()).tree


def lines(name: str) -> list[str]:
    """The frozen text of a state: its tree's id, then each object as kind and hex, sorted."""
    store, root = written(name)
    objects = sorted(
        f"{name}\t{kind.label}\t{payload.hex()}"
        for (kind, _), payload in store.records.items()
        if kind is not Kind.CHUNK
    )
    return [f"{name}\troot\t{root.hex()}", *objects]
