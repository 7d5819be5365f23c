"""States as files of other tools: what these read back, what is refused, and disks that refuse."""

from __future__ import annotations

import collections
import dataclasses
import errno
import json
import os
import random
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch

from ckptvcs import Repo
from ckptvcs.canonical import Tagged, encode, encoded_map, encoded_tag
from ckptvcs.disk import Disk
from ckptvcs.errors import ExistsError, InvalidError, NotFoundError, StorageError, UnsupportedStateError
from ckptvcs.ids import Kind
from ckptvcs.state import codes
from ckptvcs.state.export import bytes_of_text, export
from ckptvcs.state.formats import write_torch
from ckptvcs.state.formats.outgoing import Outgoing
from ckptvcs.state.formats.write_safetensors import CODES
from ckptvcs.state.formats.write_zip import ZipWriter
from ckptvcs.store.format import pack_object
from ckptvcs.testing.faults import FailingDisk
from ckptvcs.testing.memory import MemoryStore
from ckptvcs.testing.same import difference
from tests.peaks import PEAK

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:(Sparse|ComplexHalf|TypedStorage|torch.quant|.*quantiz).*:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:.*(quant|Sparse CS).*"),
]

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "C64": 8}


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, list[int], bytes]]]:
    """Metadata, and (code, shape, bytes) by name: a reader of its own, which checks what the format asks."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    assert header[:1] == b"{"
    assert length % 8 == 0
    entries = json.loads(header)
    metadata = entries.pop("__metadata__", {})
    found = {}
    end = 0
    for name, entry in entries.items():
        begin, until = entry["data_offsets"]
        assert begin == end, "a hole, or tensors out of order"
        end = until
        code = entry["dtype"]
        size = SIZES.get(code) or (1 if code.startswith("F8") else int(code[1:]) // 8)
        assert until - begin == size * int(np.prod(entry["shape"], dtype=int))
        assert (8 + length + begin) % size == 0
        found[name] = code, entry["shape"], body[begin:until]
    assert end == len(body)
    return metadata, found


@pytest.fixture
def repo(tmp_path: Path) -> Iterator[Repo]:
    with Repo.init(tmp_path / "repo") as opened:
        yield opened


def raw(tensor: Any) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def module() -> Any:
    return torch.nn.Sequential(
        torch.nn.Linear(30, 20), torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    )


class Pair(NamedTuple):
    one: int
    other: int


# -- safetensors ---------------------------------------------------------------------------------------


def test_a_model_has_the_names_of_its_state_dict(repo: Repo, tmp_path: Path) -> None:
    state = {"model": module().state_dict(), "step": 3}
    commit = repo.commit(state)
    report = repo.export("HEAD", tmp_path / "new" / "out", format="safetensors", only="model")
    metadata, found = read_safetensors(tmp_path / "new/out/model.safetensors")
    assert metadata == {"format": "pt", "ckptvcs.commit": str(commit.id)}
    assert {name: data for name, (_, _, data) in found.items()} == {
        name: raw(tensor) for name, tensor in state["model"].items()
    }
    assert (report.tensors, report.prefix) == (4, "model")
    assert report.files == {"model.safetensors": (tmp_path / "new/out/model.safetensors").stat().st_size}
    assert not list((tmp_path / "new/out").glob(".*"))


def test_without_only_names_begin_with_the_component(repo: Repo, tmp_path: Path) -> None:
    repo.commit({"a": {"w": np.ones(2)}, "b": [np.zeros(1), {0: np.ones(3, np.float32)}]})
    repo.export("HEAD", tmp_path, format="safetensors")
    _, found = read_safetensors(tmp_path / "state.safetensors")
    assert sorted(found) == ["a.w", "b.0", "b.1.0"]
    assert next(iter(found)) == "a.w"  # float64 before float32
    repo.export("HEAD", tmp_path, format="npz", only=["b/1", "b/0"])
    assert sorted(np.load(tmp_path / "b.npz").files) == ["0", "1.0"]
    repo.export("HEAD", tmp_path, format="npz", only=["a", "b/0"])
    assert sorted(np.load(tmp_path / "state.npz").files) == ["a.w", "b.0"]


def test_every_dtype_that_the_format_has(repo: Repo, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    state = {}
    for name in CODES:
        dtype = getattr(torch, name)
        item = torch.empty(0, dtype=dtype).element_size()
        data = torch.from_numpy(rng.integers(0, 2, 6 * item, np.uint8))
        state[name] = data.view(dtype).reshape(2, 3)
    repo.commit(
        {"t": state, "scalar": torch.tensor(5), "empty": torch.empty(0, 4), "big": np.arange(3, dtype=">i4")}
    )
    repo.export("HEAD", tmp_path, format="safetensors")
    _, found = read_safetensors(tmp_path / "state.safetensors")
    for name, code in CODES.items():
        assert found[f"t.{name}"] == (code, [2, 3], raw(state[name]))
    assert found["scalar"] == ("I64", [], struct.pack("<q", 5))
    assert found["empty"] == ("F32", [0, 4], b"")
    assert found["big"] == ("I32", [3], struct.pack("<3i", 0, 1, 2))


def test_what_has_no_place_is_refused_with_all_paths(repo: Repo, tmp_path: Path) -> None:
    repo.commit(
        {
            "c": np.ones(2, np.complex128),
            "s": torch.eye(3).to_sparse(),
            "q": torch.quantize_per_tensor(torch.ones(3), 0.1, 2, torch.qint8),
            "n": 5,
            "none": None,
            "empty": {},
            "__metadata__": np.ones(1),
            "bad\ud800": np.ones(1),
            "x.y": np.ones(1),
            "x": {"y": np.ones(1)},
            "text": "t" * 100_000,
            "generator": torch.Generator(),
        }
    )
    for more in ({}, {"tensors_only": True}):
        with pytest.raises(UnsupportedStateError) as refused:
            repo.export("HEAD", tmp_path / "out", format="safetensors", **more)
        paths = [path for path, _ in refused.value.leaves]
        tensors = ["c", "s", "q", "__metadata__", "bad\ud800", "x/y"]
        others = ["n", "none", "empty", "text", "generator"]
        assert sorted(paths) == sorted(tensors if more else tensors + others)
        assert "only=" in (refused.value.hint or "")
        assert not list((tmp_path / "out").iterdir())


def test_values_are_left_out_if_that_is_asked_for(repo: Repo, tmp_path: Path) -> None:
    repo.commit({"w": np.ones(1), "lr": 0.1, "names": ["a"]})
    report = repo.export("HEAD", tmp_path, format="npz", tensors_only=True)
    assert report.left_out == ["lr", "names/0"]
    assert np.load(tmp_path / "state.npz").files == ["w"]
    with pytest.raises(NotFoundError, match="no tensor"):
        repo.export("HEAD", tmp_path, format="npz", tensors_only=True, only="lr")


def test_tied_tensors_are_all_written_and_said(repo: Repo, tmp_path: Path) -> None:
    weight = torch.randn(50, 3)
    repo.commit({"embed": weight, "head": weight, "row": weight[2], "apart": weight.clone()})
    report = repo.export("HEAD", tmp_path, format="safetensors")
    _, found = read_safetensors(tmp_path / "state.safetensors")
    assert found["embed"] == found["head"] == found["apart"]
    assert found["row"][2] == raw(weight[2])
    assert report.repeated == ["head"]


@pytest.mark.parametrize("key", ["../x", "/x", "a\0b", "..", "a\\..\\x", "\udc80"])
def test_hostile_names_lead_nowhere(repo: Repo, tmp_path: Path, key: str) -> None:
    repo.commit({key: {"w": np.arange(3.0)}})
    out = tmp_path / "deep" / "out"
    only = f"{key}".replace("\\", "\\\\").replace("/", "\\/")
    for format in ("safetensors", "torch", "npz", "hf"):
        for selected in (None, only):
            try:
                repo.export("HEAD", out, format=format, only=selected, force=True)
            except UnsupportedStateError:
                assert selected is None
    made = {path.name for path in out.iterdir()}
    assert made <= {f"{stem}.{end}" for stem in ("state", "model") for end in ("safetensors", "pt", "npz")}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "repo"]
    assert torch.load(out / "state.pt", weights_only=True)["w"].tolist() == [0, 1, 2]


# -- npz -------------------------------------------------------------------------------------------------


def test_numpy_reads_every_array_as_it_was(repo: Repo, tmp_path: Path) -> None:
    arrays = {
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "z": np.array(3.5),
        "e": np.empty((0, 2), np.int16),
        "c": np.array([1 + 2j]),
        "t": np.array(["a", "bcd"]),
        "d": np.array(["2020-01-01"], "datetime64[D]"),
        "b": np.array([True, False]),
        "h": np.arange(4, dtype=">i8"),
        "long": np.zeros((1,) * 30, np.uint8),
    }
    repo.commit({"a": arrays, "torch": torch.arange(3, dtype=torch.float16)})
    repo.export("HEAD", tmp_path, format="npz")
    with np.load(tmp_path / "state.npz") as found:
        for name, array in arrays.items():
            got = found[f"a.{name}"]
            assert np.array_equal(got, array)
            assert got.dtype == array.dtype.newbyteorder("<")
            assert got.shape == array.shape
        assert found["torch"].dtype == np.float16
    with zipfile.ZipFile(tmp_path / "state.npz") as archive:
        assert archive.testzip() is None
        assert json.loads(archive.comment)["ckptvcs"]["commit"] == str(repo.resolve().id)


def test_what_numpy_has_no_word_for_can_be_cast(repo: Repo, tmp_path: Path) -> None:
    repo.commit(
        {
            "w": torch.ones(3, dtype=torch.bfloat16),
            "f": torch.ones(2).to(torch.float8_e4m3fn),
            "i": np.ones(1, int),
        }
    )
    with pytest.raises(UnsupportedStateError) as refused:
        repo.export("HEAD", tmp_path, format="npz")
    assert [path for path, _ in refused.value.leaves] == ["w", "f"]
    report = repo.export("HEAD", tmp_path, format="npz", dtype="fp32")
    with np.load(tmp_path / "state.npz") as found:
        assert found["w"].dtype == found["f"].dtype == np.float32
        assert found["i"].dtype == int
    assert report.cast == {"bfloat16": 1, "float8_e4m3fn": 1}


# -- torch -----------------------------------------------------------------------------------------------


def torch_state() -> dict[str, Any]:
    weight = torch.randn(40, 50)
    model = module()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    rng = np.random.default_rng(2)
    every = {}
    for name in (*CODES, "complex128", "complex32", "uint4", "int2", "float4_e2m1fn_x2"):
        if hasattr(torch, name):
            dtype = getattr(torch, name)
            item = torch.empty(0, dtype=dtype).element_size()
            every[name] = torch.from_numpy(rng.integers(0, 2, 4 * item, np.uint8)).view(dtype)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "every": every,
        "shared": {
            "whole": weight,
            "again": weight,
            "turned": weight.t(),
            "part": weight[3:5, ::2],
            "parameter": torch.nn.Parameter(weight),
            "expanded": torch.randn(1, 4).expand(3, 4),
            "rows": [weight[1], weight[2]],
        },
        "grad": torch.ones(2, requires_grad=True),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "sparse": [
            torch.eye(4).to_sparse(),
            torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,)),
            torch.eye(4).to_sparse_csr(),
            torch.eye(4).to_sparse_csc(),
            torch.nn.Parameter(torch.eye(3).to_sparse()),
        ],
        "quantized": [
            torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 2, torch.qint8),
            torch.quantize_per_channel(
                torch.randn(3, 4), torch.rand(3).double(), torch.zeros(3, dtype=torch.long), 0, torch.quint8
            ),
        ],
        "values": [
            None, True, False, 0, 255, 256, 65535, 65536, -1, 1 << 31, -1 << 31, -(1 << 31) - 1, 1 << 100,
            -(1 << 2000), 1.5, -0.0, float("inf"), "", "text", "text", "\ud800ü", b"", b"\xff\0",
            bytearray(b"x"), 3 - 4j, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, {1, "two", (3, 4)},
            torch.Size([2, 3]), torch.float16, torch.float8_e5m2, torch.device("cpu"), torch.device("cuda:1"),
            "y" * 100_000,
        ],
        "keys": {0: 1, "0": 2, (1, 2): 3, None: 4, 1.5: 5, b"k": 6},
        "ordered": collections.OrderedDict(b=1, a=2),
        "many": {f"key{i}": i for i in range(2500)},
        "scalar": torch.tensor(7.0),
        "empty": torch.empty(3, 0),
    }  # fmt: skip


@pytest.mark.slow
def test_torch_loads_what_was_committed(repo: Repo, tmp_path: Path) -> None:
    state = torch_state()
    repo.commit(state)
    stored = repo.checkout()
    report = repo.export("HEAD", tmp_path, format="torch")
    assert report.repeated == report.left_out == []
    for mapped in (False, True):
        loaded = torch.load(tmp_path / "state.pt", weights_only=True, mmap=mapped)
        assert difference(stored, loaded) is None
    assert loaded["model"]._metadata == state["model"]._metadata
    shared = loaded["shared"]
    assert shared["again"].data_ptr() == shared["whole"].data_ptr() == shared["turned"].data_ptr()
    shared["whole"][3, 0] = 99
    assert float(shared["part"][0, 0]) == 99
    assert loaded["shared"]["turned"].stride() == (1, 50)
    assert loaded["model"]["1.weight"].stride() == state["model"]["1.weight"].stride()
    model = module()
    model.load_state_dict(loaded["model"])
    with zipfile.ZipFile(tmp_path / "state.pt") as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            with archive.open(info) as member:
                start = member._orig_compress_start  # type: ignore[attr-defined]
                assert start % 64 == 0


def test_a_component_alone_is_the_whole_archive(repo: Repo, tmp_path: Path) -> None:
    state = {"model": module().state_dict(), "n": 1}
    repo.commit(state)
    repo.export("HEAD", tmp_path, format="torch", only="model")
    assert difference(repo.checkout()["model"], torch.load(tmp_path / "model.pt", weights_only=True)) is None


def test_arrays_become_tensors(repo: Repo, tmp_path: Path) -> None:
    base = np.arange(12, dtype=np.float32)
    repo.commit({"a": base, "b": base[::2], "back": np.arange(5)[::-1], "big": np.arange(3, dtype=">f8")})
    repo.export("HEAD", tmp_path, format="torch")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["b"].tolist() == base[::2].tolist()
    assert loaded["back"].tolist() == [4, 3, 2, 1, 0]
    assert loaded["big"].tolist() == [0, 1, 2]
    loaded["a"][2] = 50
    assert loaded["b"].tolist()[1] == 50


def test_what_the_weights_only_reader_does_not_build_is_refused(repo: Repo, tmp_path: Path) -> None:
    repo.commit(
        {
            "pair": Pair(1, 2),
            "default": collections.defaultdict(list, a=[1]),
            "scalar": np.float32(1),
            "path": Path("x"),
            "text": np.array(["a"]),
            "huge": 1 << 3000,
            "generator": torch.Generator(),
            "fine": [1, {"w": np.ones(1)}],
            "keys": {np.int64(3): 1},
            "frozen": frozenset([1]),
            "random": np.random.default_rng(1),
            "python": random.Random(1),
            "format": torch.channels_last,
        }
    )
    with pytest.raises(UnsupportedStateError) as refused:
        repo.export("HEAD", tmp_path, format="torch")
    paths = {path.split("/")[0] for path, _ in refused.value.leaves}
    assert paths == {"pair", "default", "scalar", "path", "text", "huge", "generator", "keys", "frozen"} | {
        "random",
        "python",
        "format",
    }
    assert not list(tmp_path.glob("*.pt"))


def test_a_cast_keeps_sharing(repo: Repo, tmp_path: Path) -> None:
    weight = torch.randn(20, 30)
    integers = torch.arange(5)
    quantized = torch.quantize_per_channel(
        torch.randn(3, 4), torch.rand(3).double(), torch.zeros(3, dtype=torch.long), 0, torch.quint8
    )
    state = {
        "a": weight,
        "b": weight.t(),
        "c": weight[2:4],
        "i": integers,
        "d": torch.randn(3).double(),
        "q": quantized,
    }
    repo.commit(state)
    report = repo.export("HEAD", tmp_path, format="torch", dtype="bf16")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    for name in "abcd":
        assert torch.equal(loaded[name], state[name].to(torch.bfloat16)), name
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()
    assert torch.equal(loaded["i"], integers)
    assert torch.equal(loaded["q"].q_per_channel_scales(), quantized.q_per_channel_scales())
    assert report.cast == {"float32": 3, "float64": 1}
    with zipfile.ZipFile(tmp_path / "state.pt") as archive:
        assert json.loads(archive.comment)["ckptvcs"]["cast"] == "bfloat16"


def test_a_cast_that_would_break_sharing_is_refused(repo: Repo, tmp_path: Path) -> None:
    memory = torch.randn(8)
    repo.commit({"floats": memory, "integers": memory.view(torch.int32)})
    repo.export("HEAD", tmp_path, format="torch")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(loaded["floats"].view(torch.int32), loaded["integers"])
    with pytest.raises(UnsupportedStateError, match="another dtype"):
        repo.export("HEAD", tmp_path / "out", format="torch", dtype="bf16")


@pytest.mark.slow
def test_large_tensors_in_any_memory_order(repo: Repo, tmp_path: Path) -> None:
    """Larger than a piece: in C order, channels last, transposed, and tied in parts."""
    flat = torch.randn(6_000_000)
    state = {
        "plain": flat,
        "head": flat[:5_000_000],
        "tail": flat[4_999_999:],
        "turned": torch.randn(2000, 2500).t(),
        "last": torch.randn(700, 16, 20, 20).to(memory_format=torch.channels_last),
        "one": torch.randn(1, 800, 80, 80).to(memory_format=torch.channels_last),
    }
    repo.commit(state)
    repo.export("HEAD", tmp_path, format="torch")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert difference(state, loaded) is None
    report = repo.export("HEAD", tmp_path, format="safetensors", dtype="fp16")
    _, found = read_safetensors(tmp_path / "state.safetensors")
    for name, tensor in state.items():
        assert found[name][2] == raw(tensor.half()), name
    assert report.overflowed == {}


def test_a_repository_cannot_put_opcodes_into_a_program(tmp_path: Path) -> None:
    """Names in a damaged or hostile tree are text of any kind; only torch's own get into a program."""
    evil = "float32\ncos\nsystem\n"
    view = write_torch.View(0, "int8", 0, (1,), (1,), 1)
    hostile = [
        write_torch.Dtype(evil),
        write_torch.Device(evil),
        write_torch.Device("cpu:x"),
        write_torch.Sparse(evil, (1,), (view,)),
        write_torch.Quantized(dataclasses.replace(view, dtype="qint8"), evil, 1.0, 0),
        write_torch.Quantized(dataclasses.replace(view, dtype=evil), "per_tensor_affine", 1.0, 0),
    ]
    for value in hostile:
        assert write_torch.why_not(value) is not None, value
    with pytest.raises(AssertionError):
        write_torch.write(lambda _: None, write_torch.Dtype(evil), [], "x", "")
    store = MemoryStore()
    for code, text in ((codes.TORCH_DTYPE, evil), (codes.TORCH_DEVICE, evil)):
        state = encode({"x": Tagged(code, encode(text))})
        root = encoded_tag(codes.ROOT, encoded_map([(encode("state"), state)]))
        (tree,) = store.put_objects(Kind.TREE, [pack_object([], root)])
        with pytest.raises(UnsupportedStateError, match="torch does not have"):
            export(store, tree, Disk(), tmp_path, format="torch")
        assert not list(tmp_path.iterdir())


# -- Hugging Face folders ----------------------------------------------------------------------------------


def test_a_folder_for_from_pretrained(repo: Repo, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "chat_template.jinja",
    ):
        (base / name).write_text(name)
    (base / "model.safetensors").write_text("the old weights")
    (base / "secret.txt").write_text("no")
    (base / "generation_config.json").symlink_to("config.json")
    model = {f"layer{i}.w": torch.full((25, 10), float(i)) for i in range(5)}
    repo.commit({"model": model, "optimizer": {"lr": 1.0}})
    out = tmp_path / "out"
    report = repo.export("HEAD", out, format="hf", config_from=base, max_shard_size="2KB")
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5000
    assert index["weight_map"] == {f"layer{i}.w": names[i // 2] for i in range(5)}
    for name in names:
        assert sorted(read_safetensors(out / name)[1]) == sorted(
            k for k, v in index["weight_map"].items() if v == name
        )
    assert report.prefix == "model"
    copied = {"chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"}
    assert set(report.copied) == copied | {"tokenizer_config.json", "vocab.txt"}
    assert (out / "generation_config.json").read_text() == "config.json"
    assert not (out / "generation_config.json").is_symlink()
    assert {path.name for path in out.iterdir()} == {*names, "model.safetensors.index.json", *report.copied}


def test_one_file_if_it_fits(repo: Repo, tmp_path: Path) -> None:
    repo.commit({"w": torch.ones(3)})
    repo.export("HEAD", tmp_path / "out", format="hf")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_links_out_of_the_config_folder_are_not_followed(repo: Repo, tmp_path: Path) -> None:
    repo.commit({"w": torch.ones(3)})
    base = tmp_path / "base"
    base.mkdir()
    with pytest.raises(NotFoundError, match=r"no config\.json"):
        repo.export("HEAD", tmp_path / "out", format="hf", config_from=base)
    with pytest.raises(NotFoundError, match="no folder"):
        repo.export("HEAD", tmp_path / "out", format="hf", config_from=tmp_path / "nothing")
    (base / "config.json").write_text("{}")
    (tmp_path / "secret").write_text("secret")
    (base / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidError, match="leads out"):
        repo.export("HEAD", tmp_path / "out", format="hf", config_from=base)
    assert not list((tmp_path / "out").iterdir())


def test_sizes() -> None:
    assert [bytes_of_text(text) for text in ("5GB", "5GiB", "200mb", "7", 8, "1 kb")] == [
        5 * 10**9, 5 << 30, 200 * 10**6, 7, 8, 1000,
    ]  # fmt: skip
    for text in ("", "GB", "-1", "1.5GB", "0", "5XB", "5iB"):
        with pytest.raises(InvalidError):
            bytes_of_text(text)


# -- files -------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_without_force(repo: Repo, tmp_path: Path) -> None:
    repo.commit({"w": np.ones(3)})
    there = tmp_path / "state.npz"
    there.write_text("mine")
    with pytest.raises(ExistsError, match=r"state\.npz is in"):
        repo.export("HEAD", tmp_path, format="npz")
    assert there.read_text() == "mine"
    target = tmp_path / "elsewhere"
    target.write_text("theirs")
    there.unlink()
    there.symlink_to(target)
    with pytest.raises(ExistsError):
        repo.export("HEAD", tmp_path, format="npz")
    repo.export("HEAD", tmp_path, format="npz", force=True)
    assert target.read_text() == "theirs"  # the link itself was replaced
    assert np.load(there)["w"].tolist() == [1, 1, 1]
    assert stat.S_IMODE(there.stat().st_mode) & 0o600 == 0o600


def test_arguments_that_mean_nothing(repo: Repo, tmp_path: Path) -> None:
    repo.commit({"w": np.ones(3)})
    for more in (
        {"format": "onnx"},
        {"format": "npz", "max_shard_size": 5},
        {"format": "npz", "dtype": "int8"},
    ):
        with pytest.raises(InvalidError):
            repo.export("HEAD", tmp_path, **more)
    with pytest.raises(NotFoundError, match="nothing in this commit"):
        repo.export("HEAD", tmp_path, format="npz", only="model")


def test_a_commit_of_files_points_to_checkout(repo: Repo, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    repo.commit_files({"x": tmp_path / "x"})
    with pytest.raises(NotFoundError) as refused:
        repo.export("HEAD", tmp_path / "out", format="torch")
    assert "ckpt checkout" in (refused.value.hint or "")
    assert not (tmp_path / "out").exists()


def test_equal_commits_give_equal_bytes(repo: Repo, tmp_path: Path) -> None:
    repo.commit(torch_state())
    for format, only in (("torch", None), ("safetensors", "model"), ("npz", "model")):
        for folder in ("one", "two"):
            repo.export("HEAD", tmp_path / folder, format=format, only=only)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("force", [False, True])
def test_a_disk_that_refuses_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, force: bool
) -> None:
    disk = FailingDisk()
    monkeypatch.setattr("ckptvcs.repo.Disk", lambda: disk)
    with Repo.init(tmp_path / "repo") as repo:
        repo.commit({f"w{i}": torch.full((50, 50), float(i)) for i in range(4)})
        whole: dict[str, bytes] = {}
        for at in range(1, 60):
            out = tmp_path / f"out{at}"
            out.mkdir()
            if force:
                (out / "model-00001-of-00002.safetensors").write_bytes(b"old")
            disk.arm(at, error)
            problem: StorageError | None = None
            try:
                repo.export("HEAD", out, format="hf", max_shard_size=20_000, force=force)
            except StorageError as refused:
                problem = refused
            disk.heal()
            made = {path.name: path.read_bytes() for path in out.iterdir()}
            if problem is None:
                whole = made
                break
            assert problem.errno == error
            assert "\n" not in problem.message
            if error != errno.EIO:  # a disk that fails may also refuse to remove
                assert not [name for name in made if name.startswith(".")], (at, disk.failed)
        assert at > 10
        assert len(whole) == 3
        for folder in tmp_path.glob("out*"):
            for path in folder.iterdir():
                if not path.name.startswith("."):
                    assert path.read_bytes() in (whole[path.name], b"old"), path


def test_torch_is_not_imported(repo: Repo, tmp_path: Path) -> None:
    repo.commit({"model": module().state_dict(), "step": 1})
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from ckptvcs import Repo\n"
        f"with Repo.open({str(repo.path)!r}) as repo:\n"
        "    for format in ('safetensors', 'torch', 'npz', 'hf'):\n"
        f"        repo.export('HEAD', {str(tmp_path)!r} + '/' + format, format=format, only='model')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
    assert torch.load(tmp_path / "torch/model.pt", weights_only=True).keys() == module().state_dict().keys()


# -- archives ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_archive_beyond_four_gibibytes(tmp_path: Path) -> None:
    """Written to a sink that keeps headers only: a sparse file, so that no room is needed."""
    path = tmp_path / "big.zip"
    size = (4 << 30) + 5
    with path.open("wb") as file:

        def sink(data: Any) -> None:
            file.write(data)

        archive = ZipWriter(sink, b"note")
        archive.member("small", 3, [b"abc"])
        start = archive.size
        piece = bytes(1 << 20)

        def pieces() -> Iterator[bytes]:
            for at in range(0, size, len(piece)):
                yield piece[: min(len(piece), size - at)]

        real_write = archive._sink

        def skipping(data: Any) -> None:
            if len(data) == len(piece) and archive.size > start:
                file.seek(len(piece), os.SEEK_CUR)
            else:
                real_write(data)

        archive._sink = skipping
        archive.member("large", size, pieces())
        archive.member("behind", 2, [b"de"])
        archive.close()
    with zipfile.ZipFile(path) as found:
        assert [(info.filename, info.file_size) for info in found.infolist()] == [
            ("small", 3), ("large", size), ("behind", 2),
        ]  # fmt: skip
        assert found.read("behind") == b"de"
        assert found.comment == b"note"


def test_an_outgoing_tensor_knows_its_bytes() -> None:
    assert Outgoing("w", "bfloat16", (3, 4), 2, lambda: iter([])).nbytes == 24
    assert np.dtype(ml_dtypes.bfloat16).itemsize == 2


@pytest.mark.slow
@pytest.mark.parametrize(("format", "dtype"), [("safetensors", None), ("torch", None), ("npz", "fp16")])
def test_memory_does_not_grow_with_the_state(
    repo: Repo, tmp_path: Path, format: str, dtype: str | None
) -> None:
    """A state of 500 MB takes less than 128 MiB to export: two pieces of 16 MiB, what casting them takes, and
    the scratch memory of four threads."""
    rng = np.random.default_rng(5)
    repo.commit({"model": {f"w{i}": rng.random((5, 2_500_000), np.float32) for i in range(10)}})
    script = (
        f"{PEAK}"
        "from ckptvcs import Repo\n"
        f"with Repo.open({str(repo.path)!r}) as repo:\n"
        "    list(repo.entries())\n"
        "    before = peak()\n"
        f"    repo.export('HEAD', {str(tmp_path / 'out')!r}, format={format!r}, dtype={dtype!r})\n"
        "    print(peak() - before)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], check=True, cwd=root, capture_output=True)
    assert 1 << 20 < int(done.stdout) < 128 << 20


def test_attributes_of_a_state_dict_that_torch_cannot_read_are_refused(repo: Repo, tmp_path: Path) -> None:
    state: Any = collections.OrderedDict(w=torch.ones(3))
    for odd in (Path("x"), np.float32(1), 1 << 4000, [{"deep": Path("x")}]):
        state._metadata = {"": {"version": odd}}
        repo.commit({"model": state}, "odd")
        with pytest.raises(UnsupportedStateError, match="model: its attributes"):
            repo.export("HEAD", tmp_path / "out", format="torch")
    state._metadata = {"": {"version": [1, (2, "x")]}}
    repo.commit({"model": state}, "plain")
    repo.export("HEAD", tmp_path / "out", format="torch")
    assert torch.load(tmp_path / "out/state.pt", weights_only=True)["model"]._metadata == state._metadata


def test_a_name_too_long_for_an_archive_is_refused(repo: Repo, tmp_path: Path) -> None:
    repo.commit({"x" * 0xFFFC: np.ones(3)}, "long")
    with pytest.raises(UnsupportedStateError, match="longer than an archive"):
        repo.export("HEAD", tmp_path, format="npz")
    repo.commit({"x" * 0xFFFB: np.ones(3)}, "just right")
    repo.export("HEAD", tmp_path, format="npz")
    assert np.load(tmp_path / "state.npz").files == ["x" * 0xFFFB]
