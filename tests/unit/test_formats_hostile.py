"""Damaged and hostile checkpoint files: stored all the same, nothing of them run, in bounded time."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptvcs import Repo, StorageError
from ckptvcs.disk import Disk
from ckptvcs.state import files, tree
from ckptvcs.state.formats import layout
from ckptvcs.state.formats.layout import File, Layout, Tensor, TensorSource
from ckptvcs.testing.memory import MemoryStore
from tests.unit.checkpoint_files import (
    layout_of,
    nested,
    npy,
    npz,
    numbers,
    safetensors,
    saved,
    torch,
    zipped,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Payload:
    """What an attacker would pickle."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {os.environ['CKPT_TEST_PAYLOAD']}",)


SMALL: dict[str, bytes] = {
    "safetensors": safetensors({"w": numbers(1, 9, 9), "b": numbers(2, 3)}),
    "torch": saved({"w": torch.ones(10, 10), "v": torch.ones(20, 20).t()[:, 3:], "n": 1}),
    "npz": npz(w=numbers(1, 9, 9), f=np.asfortranarray(numbers(2, 9, 9))),
    "npy": npy(numbers(1, 9, 9)),
}


def comes_back(data: bytes, tmp: Path) -> Layout | None:
    """Commit a file of these bytes and compare what comes back; what was recognised in it."""
    path = tmp / "file"
    path.write_bytes(data)
    store = MemoryStore()
    written = tree.write(store, files=files.collected(Disk(), {"file": path}))
    assert files.contents(store, written.tree) == {"file": data}
    return layout_of(data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SMALL)
def test_files_cut_at_every_length(kind: str, tmp_path: Path) -> None:
    data = SMALL[kind]
    for length in range(len(data) + 1):
        comes_back(data[:length], tmp_path)
    assert comes_back(data, tmp_path) is not None
    assert comes_back(data[:-1], tmp_path) is None or kind == "safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("kind", SMALL)
@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    print_blob=True,
)
@given(edits=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4))
def test_files_with_bytes_changed_at_random(kind: str, edits: list[tuple[int, int]], tmp_path: Path) -> None:
    data = bytearray(SMALL[kind])
    for at, byte in edits:
        data[at % len(data)] = byte
    comes_back(bytes(data), tmp_path)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "set", "opcode", "cut", "repeat"]),
        st.integers(0, 1 << 20),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=12,
)
OPCODES = b"(0t}]sueaRbqhKJMNQcX.\x85\x86\x87\x81\x89\x88\x8a2lod1\x94\x93"


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [2, 4])
@settings(max_examples=1500, deadline=None, print_blob=True)
@given(edits=EDITS)
def test_pickles_with_bytes_changed_at_random(protocol: int, edits: list[tuple[str, int, int]]) -> None:
    """Within the archive: what is around the pickle stays in order, so that its machine is reached."""
    members = members_of(protocol)
    head = next(name for name in members if name.endswith("data.pkl"))
    data = bytearray(members[head])
    for way, at, value in edits:
        at %= len(data)
        if way == "cut" and len(data) > 500:
            del data[at : at + 1 + value % 30]
        elif way == "repeat":
            data[at:at] = data[(at * 7) % len(data) :][: value % 60]
        else:
            data[at] = value if way == "set" else OPCODES[value % len(OPCODES)]
    whole = zipped(members | {head: bytes(data)})
    found = layout_of(whole)
    assert found is not None
    assert sum(part.spec.nbytes for part in found.parts) == sum(
        len(each) for name, each in members.items() if "/data/" in name
    )
    file = File(len(whole), lambda offset, length: whole[offset : offset + length])
    for tensor in found.tensors:
        if tensor.spec.nbytes < 1 << 20:
            assert len(TensorSource(file, tensor).read(0, tensor.spec.nbytes)) == tensor.spec.nbytes


@functools.cache
def members_of(protocol: int) -> dict[str, bytes]:
    """The members of a torch archive in which much is nested and shared."""
    with zipfile.ZipFile(io.BytesIO(saved(nested(), pickle_protocol=protocol))) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def with_pickle(data: bytes, **storages: bytes) -> bytes:
    """A torch archive with this pickle."""
    return zipped({"a/data.pkl": data, "a/byteorder": b"little", "a/version": b"3"}
                  | {f"a/data/{key}": value for key, value in storages.items()})  # fmt: skip


def test_a_payload_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: Repo) -> None:
    mark = tmp_path / "ran"
    monkeypatch.setenv("CKPT_TEST_PAYLOAD", str(mark))
    plain = pickle.dumps({"x": Payload()}, protocol=2)
    data = {
        "a.pt": saved({"w": torch.ones(100), "x": Payload()}), "b.pt": with_pickle(plain),
        "c.pkl": plain, "d.npy": npy(np.array([Payload()])), "e.npz": npz(a=np.array([Payload()])),
    }  # fmt: skip
    for name, each in data.items():
        (tmp_path / name).write_bytes(each)
    repo.commit_files({name: tmp_path / name for name in data})
    assert repo.checkout() == data
    assert not mark.exists()
    torch.load(io.BytesIO(data["a.pt"]), weights_only=False)
    assert mark.exists(), "it would have run"


def header(text: str | bytes, body: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw + body


def entry(begin: int, end: int, dtype: str = "U8", shape: Any = None) -> dict[str, Any]:
    """A tensor in a safetensors header."""
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


HOSTILE_HEADERS: dict[str, bytes] = {
    "overlap": header(json.dumps({"a": entry(0, 9), "b": entry(5, 14)}), bytes(14)),
    "outside": header(json.dumps({"a": entry(0, 99)}), bytes(14)),
    "negative": header(json.dumps({"a": entry(-5, 4)}), bytes(14)),
    "backwards": header(json.dumps({"a": {"dtype": "U8", "shape": [0], "data_offsets": [9, 2]}}), bytes(14)),
    "wrong size": header(json.dumps({"a": entry(0, 8, "F32", [3])}), bytes(14)),
    "huge shape": header(json.dumps({"a": entry(0, 8, "U8", [1 << 40, 1 << 40, 0])}), bytes(14)),
    "huge number": header(
        '{"a":{"dtype":"U8","shape":[' + "9" * 5000 + '],"data_offsets":[0,1]}}', bytes(14)
    ),
    "deep": header('{"a":' * 50_000 + "1" + "}" * 50_000),
    "deep lists": header('{"a":' + "[" * 100_000),
    "twice": header('{"a":' + json.dumps(entry(0, 4)) + ',"a":' + json.dumps(entry(4, 8)) + "}", bytes(14)),
    "floats": header(json.dumps({"a": entry(0, 4, "U8", [4.0])}), bytes(14)),
    "no object": header("{1}"),
    "no text": header(b'{"a\xff":1}'),
    "nan": header('{"a":NaN}'),
    "metadata": header('{"__metadata__":{"a":1}}'),
    "longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "many lists": header('{"a":[' + "[]," * 1_000_000 + "1]}"),
    "a long name": header(json.dumps({"n" * 100_000: entry(0, 400)}), bytes(400)),
}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_hostile_safetensors(name: str, tmp_path: Path) -> None:
    assert comes_back(HOSTILE_HEADERS[name], tmp_path) is None


def test_odd_but_possible_safetensors(tmp_path: Path) -> None:
    """Holes, an order that is not that of the bytes, dtypes from later, four and six bits."""
    found = comes_back(
        header(
            json.dumps({
                "b": entry(600, 1000), "a": entry(10, 310), "new": entry(310, 410, "X99", [3]),
                "f4": entry(1000, 1300, "F4", [6, 100]), "f6": entry(1300, 1600, "F6_E2M3", [400]),
                "odd/name/0": entry(1600, 1900), "\ud800": entry(1900, 2200), "": entry(2200, 2500),
            }),
            bytes(range(250)) * 10 + b"and more",
        ),
        tmp_path,
    )  # fmt: skip
    assert found is not None
    assert [(part.name, part.spec.dtype, part.spec.shape) for part in found.parts] == [
        ("a", "uint8", (300,)), ("new", "uint8", (100,)), ("b", "uint8", (400,)),
        ("f4", "float4_e2m1fn_x2", (6, 50)), ("f6", "uint8", (300,)), ("odd\\/name\\/0", "uint8", (300,)),
        ("\ud800", "uint8", (300,)), ("\\s", "uint8", (300,)),
    ]  # fmt: skip


def storage(key: str, count: int, kind: str = "FloatStorage") -> Any:
    """A persistent id as torch writes it, in opcodes."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    return (b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu")
            + b"J" + struct.pack("<i", count) + b"tQ")  # fmt: skip


def rebuilt(key: str, count: int, offset: int, shape: Sequence[int], steps: Sequence[int]) -> bytes:
    """A tensor as torch writes it, in opcodes."""

    def ints(values: Sequence[int]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    at = b"\x8a\x08" + struct.pack("<q", offset)
    return (b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(key, count) + at + ints(shape) + ints(steps)
            + b"\x89NtR")  # fmt: skip


HOSTILE_PICKLES: dict[str, bytes] = {
    "empty": b"",
    "stop": b".",
    "unknown opcode": b"\x80\x02\xff.",
    "never ends": b"\x80\x02" + b"N" * 5000,
    "deep": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 500_000 + b".",
    "holds itself": b"\x80\x02]q\0h\0a.",
    "unfolds": b"\x80\x02]q\0" + b"".join(b"](" + b"h\0" * 8 + b"eq\0" for _ in range(40)) + b".",
    "unfolds in a dict": b"\x80\x02}q\0" + b"".join(b"}(K\1h\0K\2h\0uq\0" for _ in range(60)) + b".",
    "a long key again and again": b"\x80\x02X" + struct.pack("<I", 4000) + b"k" * 4000
        + b"q\0]q\1" + b"".join(b"}(" + b"h\0h\1" * 9 + b"uq\1" for _ in range(30)) + b".",
    "a long text encoded again and again": b"\x80\x02X" + struct.pack("<I", 1 << 20) + b"k" * (1 << 20)
        + b"q\0](" + b"c_codecs\nencode\n(h\0X\6\0\0\0latin1tR" * 2000 + b"e.",
    "long integers": b"\x80\x02]" + (b"\x8b" + struct.pack("<I", 9999) + b"\x7f" * 9999 + b"a") * 99 + b".",
    "a length past the end": b"\x80\x02\x8e" + struct.pack("<Q", 1 << 62) + b".",
    "memo far away": b"\x80\x02Nr\xff\xff\xff\xffj\xff\xff\xff\xff.",
    "marks": b"\x80\x02" + b"(" * 1_000_000 + b".",
    "pops the mark": b"\x80\x02(0." + b"(00.",
    "appends to nothing": b"\x80\x02NNa.",
    "appends to a dict": b"\x80\x02}K\1a.",
    "pairs in a list": b"\x80\x02]K\1K\2s.",
    "a set of what has no order": b"\x80\x02K\1s.",
    "builds on a number": b"\x80\x02K\1}b.",
    "outside its storage": b"\x80\x02" + rebuilt("0", 100, 50, [100], [1]) + b".",
    "negative": b"\x80\x02" + rebuilt("0", 100, -50, [10], [1]) + b".",
    "negative strides": b"\x80\x02" + rebuilt("0", 100, 50, [10], [-1]) + b".",
    "overflowing": b"\x80\x02" + rebuilt("0", 100, 0, [1 << 40, 1 << 40], [1 << 40, 1]) + b".",
    "far strides": b"\x80\x02" + rebuilt("0", 100, 0, [2, 2], [1 << 55, 1 << 55]) + b".",
    "no strides": b"\x80\x02" + rebuilt("0", 100, 0, [10, 10], [1]) + b".",
    "no such storage": b"\x80\x02" + rebuilt("../../etc/passwd", 100, 0, [100], [1]) + b".",
    "negative storage": b"\x80\x02" + storage("0", -5) + b".",
    "a class of its own": b"\x80\x02" + storage("0", 100, "system") + b".",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_hostile_pickles(name: str, tmp_path: Path) -> None:
    """The storages are found all the same, as bytes."""
    raw = numbers(1, 100).tobytes()
    found = comes_back(with_pickle(HOSTILE_PICKLES[name], **{"0": raw}), tmp_path)
    assert found is not None
    assert [part.spec.nbytes for part in found.parts] == [400]


def test_more_tensors_than_one_in_a_storage() -> None:
    raw = numbers(1, 100).tobytes()
    pickled = (b"\x80\x02]("
               + rebuilt("0", 100, 0, [10], [1]) + rebuilt("0", 100, 5, [10], [1])
               + rebuilt("0", 100, 20, [5, 4], [1, 5]) + rebuilt("0", 100, 50, [10], [2])
               + b"e.")  # fmt: skip
    found = layout_of(with_pickle(pickled, **{"0": raw}))
    assert found is not None
    assert [tensor.name for tensor in found.tensors] == ["0", "1", "2", "3"]
    assert [(part.name, part.spec.shape, part.order) for part in found.parts] == [
        ("0", (10,), None), ("data/0[40:80]", (10,), None), ("2", (5, 4), [1, 0]),
        ("data/0[160:400]", (60,), None),
    ]  # fmt: skip


@pytest.mark.parametrize("steps", [(2, 2), (1, 3), (3, 1), (4, 0), (0, 4), (2, 1)])
def test_only_what_touches_each_byte_once_is_stored_as_a_tensor(
    steps: tuple[int, int], tmp_path: Path
) -> None:
    """Steps of 2 and 2 reach as far as 3 by 3 elements have bytes, and leave some out."""
    made = with_pickle(
        b"\x80\x02" + rebuilt("0", 400, 0, [3, 3], steps) + b".", **{"0": bytes(range(250)) * 7}
    )
    found = comes_back(made, tmp_path)
    assert found is not None
    wide = with_pickle(
        b"\x80\x02" + rebuilt("0", 400, 0, [20, 20], (steps[0] * 5, steps[1] * 5)) + b".",
        **{"0": numbers(1, 400).tobytes()},
    )
    comes_back(wide, tmp_path)
    named = [part for part in found.parts if part.name == "tensor"]
    assert bool(named) == (steps in ((1, 3), (3, 1)))


def test_steps_that_reach_as_far_as_the_bytes_come_back(tmp_path: Path) -> None:
    """A large one, which would not stay in the rest of its file: 101 by 101, steps of 51 and 51."""
    raw = numbers(1, 101 * 101).tobytes()
    data = with_pickle(b"\x80\x02" + rebuilt("0", 101 * 101, 0, [101, 101], (51, 51)) + b".", **{"0": raw})
    found = comes_back(data, tmp_path)
    assert found is not None
    assert [part.name for part in found.parts] == ["data/0[0:40804]"]


def _zip_cases() -> dict[str, bytes]:
    good = zipped({"a.npy": npy(numbers(1, 100)), "b.npy": npy(numbers(2, 100))})
    at = good.index(b"PK\1\2")
    end = good.rindex(b"PK\5\6")

    def edited(place: int, layout: str, value: int) -> bytes:
        data = bytearray(good)
        struct.pack_into(layout, data, place, value)
        return bytes(data)

    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("a.npy", npy(numbers(1, 100)))
        archive.writestr("b.npy", npy(numbers(2, 100)))
    doubled = twice.getvalue().replace(b"b.npy", b"a.npy")
    second = good.index(b"PK\1\2", at + 4)
    overlapping = bytearray(good)
    overlapping[second + 42 : second + 46] = good[at + 42 : at + 46]
    overlapping[second + 46 : second + 51] = b"a.npy"
    return {
        "two of one name": doubled,
        "overlapping": bytes(overlapping),
        "huge size": edited(at + 20, "<I", 0xFFFFFFF0),
        "size past the directory": edited(at + 20, "<I", len(good)),
        "huge directory": edited(end + 12, "<I", 0xFFFFFFF0),
        "many members": edited(end + 10, "<H", 0xFFF0),
        "directory elsewhere": edited(end + 16, "<I", 3),
        "encrypted": edited(at + 8, "<H", 1),
        "another disk": edited(end + 4, "<H", 1),
        "name beyond": edited(at + 28, "<H", 0xFFFF),
        "local header elsewhere": edited(at + 42, "<I", 7),
        "sizes in a zip64 field that is missing": edited(at + 24, "<I", 0xFFFFFFFF),
        "something before it": b"PK\3\4" + good,
        "something behind it": good + b"x",
        "locator to nowhere": good[:end] + b"PK\6\7" + struct.pack("<IQI", 0, 1 << 60, 1) + good[end:],
        "an empty archive": b"PK\5\6" + bytes(18),
    }


@pytest.mark.parametrize("name", _zip_cases())
def test_hostile_archives(name: str, tmp_path: Path) -> None:
    assert comes_back(_zip_cases()[name], tmp_path) is None


def test_odd_but_possible_archives(tmp_path: Path) -> None:
    """A comment, an archive in an archive, folders, zip64, members that are compressed."""
    inner = zipped({"x.npy": npy(numbers(3, 100))})
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.npy", npy(numbers(1, 100)))
        archive.writestr("folder/", b"")
        archive.writestr("inner.npz", inner)
        archive.writestr("fake.npy", b"\x93NUMPY\1\0\xff\xff" + bytes(100))
        archive.writestr(zipfile.ZipInfo("z.npy"), npy(numbers(2, 100)), zipfile.ZIP_DEFLATED)
        with archive.open(zipfile.ZipInfo("wide.npy"), "w", force_zip64=True) as member:
            member.write(npy(numbers(4, 100)))
        archive.comment = b"PK\5\6" * 20
    found = comes_back(out.getvalue(), tmp_path)
    assert found is not None
    assert found.format == "npz"
    assert [part.name for part in found.parts] == ["a", "wide"]


@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 99999999999999999, 99999999999999999), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (100,), }",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (100,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os').abort(),), }",
        "{'descr': '<f4', 'fortran_order': 1, 'shape': (100,), }",
        "{'descr': '<f3', 'fortran_order': False, 'shape': (100,), }",
        "{'descr': '<f16', 'fortran_order': False, 'shape': (25,), }",
        "{'descr': '|S0', 'fortran_order': False, 'shape': (100,), }",
        "{'descr': '|V999999999', 'fortran_order': False, 'shape': (0,), }",
        "{'descr': '<U999999999', 'fortran_order': False, 'shape': (0,), }",
        "{'descr': '<M8[1q]', 'fortran_order': False, 'shape': (50,), }",
        "{'shape': (100,), 'descr': '<f4', 'fortran_order': False}",
        "{" * 5000,
        "",
    ],
)  # fmt: skip
def test_hostile_numpy_headers(text: str, tmp_path: Path) -> None:
    raw = text.encode()
    assert comes_back(b"\x93NUMPY\1\0" + struct.pack("<H", len(raw)) + raw + bytes(400), tmp_path) is None


def test_random_bytes_are_no_checkpoint(tmp_path: Path) -> None:
    for seed in range(50):
        data = np.random.default_rng(seed).integers(0, 256, 3000, np.uint8).tobytes()
        for magic in (b"", b"PK\3\4", b"\x93NUMPY", b"\x20\0\0\0\0\0\0\0{"):
            assert comes_back(magic + data, tmp_path) is None, seed


def test_a_big_endian_archive_is_stored_as_it_is(tmp_path: Path) -> None:
    data = zipped({"a/data.pkl": b"\x80\x02N.", "a/byteorder": b"big", "a/data/0": bytes(400)})
    assert comes_back(data, tmp_path) is None


def test_sources_give_any_range() -> None:
    """Of every layout, in ranges that are no multiples of anything."""
    array = numbers(1, 7, 5, 11).astype(np.complex64)
    data = npz(
        c=array, f=np.asfortranarray(array), b=array.astype(">c8"), g=np.asfortranarray(array.astype(">c8"))
    )
    found = layout_of(data)
    assert found is not None
    wanted = array.tobytes()
    for tensor in found.tensors:
        source = TensorSource(File(len(data), lambda at, length: data[at : at + length]), tensor)
        assert source.element_size == 4
        for offset, length in ((0, len(wanted)), (1, 1), (3, 17), (64, 800), (len(wanted) - 5, 5), (0, 0)):
            assert bytes(source.read(offset, length)) == wanted[offset : offset + length], tensor
        short = TensorSource(File(len(data), lambda at, length: b""), tensor)
        with pytest.raises(EOFError):
            short.read(0, 8)


def test_a_tensor_says_how_it_lies() -> None:
    found = layout_of(npy(np.asfortranarray(numbers(1, 1, 5, 4))))
    assert found is not None
    (tensor,) = found.tensors
    assert isinstance(tensor, Tensor)
    assert (tensor.order, tensor.extent) == ([0, 2, 1], 80)


def test_tensors_that_are_not_in_c_order_share_the_memory_they_may_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arrays = {str(at): np.asfortranarray(numbers(at, 20, 50)) for at in range(5)}
    data = npz(**arrays)
    found = layout_of(data)
    assert found is not None
    reads: list[int] = []

    def read(offset: int, length: int) -> bytes:
        reads.append(length)
        return data[offset : offset + length]

    sources = [TensorSource(File(len(data), read), tensor) for tensor in found.tensors]
    monkeypatch.setattr(layout, "_HELD", 9000)  # two of them
    for source in sources:
        source.read(0, 10)
    assert [source._whole is not None for source in sources] == [False, False, False, True, True]
    for source, array in zip(sources, arrays.values(), strict=True):
        assert bytes(source.read(100, 3900)) == array.tobytes()[100:]
    assert all(length == 4000 for length in reads)
    sources[-1].read(0, 100)
    assert sources[-1]._whole is None, "every byte has been given"


def test_a_mistake_in_a_parser_fails_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def mistaken(file: File) -> Any:
        raise KeyError("a case nobody thought of")

    monkeypatch.setattr(files, "recognise", mistaken)
    comes_back(SMALL["torch"], tmp_path)
    assert "stored as plain bytes" in caplog.text
    assert str(tmp_path / "file") in caplog.text


def test_a_disk_that_fails_while_a_file_is_looked_into_fails_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(file: File) -> Any:
        raise StorageError("input/output error")

    monkeypatch.setattr(files, "recognise", failing)
    with pytest.raises(StorageError):
        comes_back(SMALL["torch"], tmp_path)
