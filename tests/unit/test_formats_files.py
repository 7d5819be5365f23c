"""Checkpoint files in and out of a commit: byte-exact whatever they hold, and as small as states."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptvcs import CorruptionError, InvalidError, NotFoundError, Repo
from ckptvcs.disk import Disk
from ckptvcs.ids import Kind, chunk_id
from ckptvcs.state import files, tree
from ckptvcs.state.bases import Bases
from ckptvcs.state.formats.layout import File, TensorSource
from ckptvcs.store.format import GRIDS
from ckptvcs.testing.memory import MemoryStore
from tests.unit.checkpoint_files import (
    ids_in,
    layout_of,
    nested,
    npy,
    npz,
    numbers,
    optimizer_state,
    safetensors,
    saved,
    scripted,
    torch,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

ARRAYS = {
    "w": numbers(1, 30, 40),
    "b": numbers(2, 100),
    "n": np.arange(90),
    "bf": numbers(3, 300).astype(ml_dtypes.bfloat16),
}

MAKERS: dict[str, Callable[[Path], bytes]] = {
    "model.safetensors": lambda _: safetensors(ARRAYS, {"format": "pt"}),
    "empty.safetensors": lambda _: safetensors({"a": np.zeros((0, 4), np.float32), "s": np.array(2.0)}),
    "none.safetensors": lambda _: safetensors({}),
    "state.pt": lambda _: saved(nested()),
    "optimizer.bin": lambda _: saved(optimizer_state()),
    "tensor.pth": lambda _: saved(torch.randn(300)),
    "protocol4.pt": lambda _: saved(nested(), pickle_protocol=4),
    "module.pt": lambda _: saved(torch.nn.Linear(30, 30)),
    "legacy.pt": lambda _: saved(optimizer_state(), _use_new_zipfile_serialization=False),
    "jit.pt": lambda tmp: scripted(tmp / "jit.pt"),
    "arrays.npz": lambda _: npz(
        w=ARRAYS["w"], f=np.asfortranarray(numbers(5, 30, 40)), big=numbers(6, 200).astype(">f4"),
        records=np.zeros(50, [("a", "i4"), ("b", "f8")]), objects=np.array([None, {}] * 90),
        text=np.array(["abc"] * 90), raw=np.zeros(50, "S9"), time=np.zeros(90, "M8[3D]"), zero=np.array(3.0),
        empty=np.zeros((0, 3)), **{"a/b": numbers(7, 300)},
    ),
    "compressed.npz": lambda _: npz(np.savez_compressed, w=ARRAYS["w"]),
    "array.npy": lambda _: npy(ARRAYS["w"]),
    "fortran.npy": lambda _: npy(np.asfortranarray(numbers(8, 50, 70, 3))),
    "big.npy": lambda _: npy(numbers(8, 500).astype(">c16")),
    "records.npy": lambda _: npy(np.zeros(50, [("a", "i4")])),
    "objects.npy": lambda _: npy(np.array([None] * 50)),
    "notes.txt": lambda _: b"loss 0.5\n" * 100,
    "nothing": lambda _: b"",
}  # fmt: skip

WITH_TENSORS = {
    "model.safetensors": "safetensors", "state.pt": "torch", "optimizer.bin": "torch", "tensor.pth": "torch",
    "protocol4.pt": "torch", "module.pt": "torch", "jit.pt": "torch", "arrays.npz": "npz",
    "array.npy": "npy", "fortran.npy": "npy", "big.npy": "npy",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A file of each kind."""
    tmp = tmp_path_factory.mktemp("made")
    return {name: make(tmp) for name, make in MAKERS.items()}


def stored(repo: Repo, **only: Any) -> dict[str, Any]:
    """The stored files of the repository's last commit."""
    with repo._store.reader() as reader:
        return tree.files(reader, repo.resolve().tree)


# -- every kind of file ---------------------------------------------------------------------------


def test_every_byte_of_each_kind_comes_back(made: dict[str, bytes], repo: Repo, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, data in made.items():
        (tmp_path / "in" / name).write_bytes(data)
    repo.commit_files({"run": tmp_path / "in"})
    repo.checkout_files("main", tmp_path / "out")
    for name, data in made.items():
        found = (tmp_path / "out" / "run" / name).read_bytes()
        assert hashlib.sha256(found).digest() == hashlib.sha256(data).digest(), name
    assert repo.checkout() == {f"run/{name}": data for name, data in made.items()}
    kinds = {path.removeprefix("run/"): each.format for path, each in stored(repo).items() if each.tensors}
    assert kinds == WITH_TENSORS
    assert repo.fsck(full=True).ok


def test_the_same_tensor_has_the_same_chunks_wherever_it_lies() -> None:
    """In a state of numpy or torch, in C order or not, and in each kind of file."""
    array = numbers(1, 6, 40, 50)
    tensor = torch.from_numpy(array.copy())
    store = MemoryStore()
    state = {
        "numpy": array, "fortran": np.asfortranarray(array), "big": array.astype(">f4"), "torch": tensor,
        "turned": tensor[None].to(memory_format=torch.channels_last)[0],
    }  # fmt: skip
    held = tree.write(store, state).held
    wanted = {held[name].chunks for name in state}
    assert len(wanted) == 1
    (id,) = wanted.pop()
    files = {
        "safetensors": safetensors({"other": numbers(2, 7), "w": array}),
        "torch": saved({"w": tensor}),
        "torch turned": saved({"w": state["turned"]}),
        "torch view": saved({"x": torch.cat([torch.zeros(10), tensor.reshape(-1)])[10:].reshape(6, 40, 50)}),
        "npz": npz(w=array),
        "npz fortran": npz(w=np.asfortranarray(array)),
        "npz big": npz(w=array.astype(">f4")),
        "npy": npy(array),
        "npy axes": npy(np.asfortranarray(array.astype(">f4"))),
    }
    for name, data in files.items():
        assert id in ids_in(data).values(), name


def test_names_are_those_of_the_state() -> None:
    """A file's tensors are called what the same value is called when it is committed as a state."""
    value = optimizer_state()
    known = set(tree.write(MemoryStore(), value).held)
    found = layout_of(saved(value))
    assert found is not None
    assert known <= {tensor.name for tensor in found.tensors}
    assert found.leaves["metrics/val_loss"] == 0.25
    assert found.leaves["metrics/np"] == 1.5
    assert found.leaves["epoch"] == 3
    assert found.leaves["optimizer/param_groups/0/lr"] == value["optimizer"]["param_groups"][0]["lr"]


def test_tensors_of_many_dimensions_keep_their_names() -> None:
    value = {"cache": torch.zeros(1, 64, 64, 64, 64), "six": torch.zeros(1, 2, 64, 64, 64, 8)[:, ::2]}
    assert [tensor.name for tensor in layout_of(saved(value)).tensors] == ["cache", "six"]


def test_chunks_of_committed_files_are_those_of_the_state(tmp_path: Path) -> None:
    state = nested()
    store = MemoryStore()
    held = tree.write(store, state).held
    (tmp_path / "x.pt").write_bytes(saved(state))
    there = set(store.records)
    written = tree.write(store, files=files.collected(Disk(), {"x.pt": tmp_path / "x.pt"}))
    fresh = {id for kind, id in store.records.keys() - there if kind is Kind.CHUNK}
    assert tree.held(store, written.tree) == written.held
    inside = {path.partition("//")[2]: each for path, each in written.held.items()}
    for name in ("tied/a", "turned", "transposed", "bf16", "f8", "u16", "bool", "complex", "parameter",
                 "sparse/indices", "(1, 'a')/0", "views/0", "quantized"):  # fmt: skip
        key = "quantized/integers" if name == "quantized" else name
        if name == "views/0":
            continue  # its storage is stored as a whole, by the transposed view of all of it
        assert inside[name].chunks == held[key].chunks, name
    # What is new: the rest of the file, the storages behind views, and the text within the pickle.
    assert len(fresh) < 10


def test_what_lies_around_tensors_is_small(made: dict[str, bytes], repo: Repo, tmp_path: Path) -> None:
    weights = {f"layers.{at}.weight": numbers(at, 100, 100) for at in range(20)}
    (tmp_path / "m.safetensors").write_bytes(safetensors(weights))
    (tmp_path / "m.pt").write_bytes(saved({name: torch.from_numpy(each) for name, each in weights.items()}))
    (tmp_path / "m.npz").write_bytes(npz(**weights))
    state = repo.commit({"model": weights})
    size = sum(each.nbytes for each in weights.values())
    for name in ("m.safetensors", "m.pt", "m.npz"):
        commit = repo.commit_files({name: tmp_path / name})
        assert commit.report is not None
        assert commit.report.stored < 0.01 * size, name
    assert state.report is not None


def test_the_parents_tensor_serves_as_base(tmp_path: Path) -> None:
    """`checkpoint-500` in the parent for `checkpoint-1000`, and the newest of several."""
    store = MemoryStore()
    kept: dict[str, Any] = {}
    for step in (20, 100, 500):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        weights = {f"layers.{at}.weight": numbers(step + at, 20, 20) for at in range(3)}
        (folder / "model.safetensors").write_bytes(safetensors(weights))
        kept[f"checkpoint-{step}"] = weights
    first = tree.write(
        store,
        files=files.collected(Disk(), {f"checkpoint-{s}": tmp_path / f"checkpoint-{s}" for s in (20, 100)}),
    )
    store.hints.clear()
    place = {"checkpoint-500": tmp_path / "checkpoint-500"}
    second = tree.write(store, files=files.collected(Disk(), place), bases=Bases(lambda: first.held))
    for at in range(3):
        path = f"\\s/checkpoint-500/model.safetensors//layers.{at}.weight"
        hint = store.hints[second.held[path].chunks[0]]
        assert hint.base is not None
        assert hint.numbers == "float32"
        assert hint.base(0) == chunk_id(kept["checkpoint-100"][f"layers.{at}.weight"].tobytes())


def test_a_grid_of_small_cells_gives_the_same_files(made: dict[str, bytes], tmp_path: Path) -> None:
    """Cells that are no pieces of a file, chunk lists, pages of pages, and small tensors inline."""
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    folder = files.collected(Disk(), {"run": tmp_path})
    for inline in (8, 1500):
        store = MemoryStore(
            dataclasses.replace(
                GRIDS[1], chunk=1 << 11, inline=inline, chunk_list=2, subtree=80, list_page=2, map_page=2
            )
        )
        written = tree.write(store, files=folder)
        assert tree.held(store, written.tree) == written.held
        assert files.contents(store, written.tree) == {f"run/{name}": data for name, data in made.items()}
        again = tree.write(store, files=folder, bases=Bases(lambda: written.held))  # noqa: B023
        assert again == written


def test_large_and_turned_tensors_are_written_in_pieces(repo: Repo, tmp_path: Path) -> None:
    """More chunks than fit in a list, and more than are read at once."""
    big = numbers(1, 5000, 1000)
    data = {
        "a.npy": npy(big), "f.npy": npy(np.asfortranarray(big)), "b.npy": npy(big.astype(">f4")),
        "s.safetensors": safetensors({"small": numbers(2, 100), "big": big, "end": numbers(3, 100)}),
    }  # fmt: skip
    for name, each in data.items():
        (tmp_path / name).write_bytes(each)
    commit = repo.commit_files({name: tmp_path / name for name in data})
    assert commit.report is not None
    assert commit.report.reused > 2.9 * big.nbytes
    assert repo.checkout() == data


def test_a_tensor_too_large_to_be_turned_is_stored_as_it_lies(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_TURNED", 1000)
    data = npy(np.asfortranarray(numbers(1, 30, 50)))
    (tmp_path / "f.npy").write_bytes(data)
    repo.commit_files({"f.npy": tmp_path / "f.npy"})
    (tensor,) = stored(repo)["f.npy"].tensors
    assert tensor.tensor.spec.shape == (50, 30)
    assert tensor.tensor.order is None
    assert repo.checkout() == {"f.npy": data}


def test_too_many_tensors_for_a_tree_are_stored_as_bytes(
    made: dict[str, bytes], repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.codes, "MAX_VALUES", 40)
    weights = {f"w{at}": numbers(at, 10, 10) for at in range(8)}
    for at in range(3):
        (tmp_path / f"{at}.safetensors").write_bytes(safetensors(weights))
    repo.commit_files({f"{at}": tmp_path / f"{at}.safetensors" for at in range(3)})
    assert [len(each.tensors) for each in stored(repo).values()] == [8, 0, 0]


# -- files that change, trees that lie ------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "arrays.npz", "fortran.npy"])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_file_that_changes_meanwhile_is_refused(
    made: dict[str, bytes], repo: Repo, tmp_path: Path, name: str, where: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what lies around tensors, in a tensor, or by becoming shorter."""
    path = tmp_path / name
    path.write_bytes(made[name])
    found = layout_of(made[name])
    assert found is not None
    largest = max(found.parts, key=lambda part: part.spec.nbytes)
    at = (largest.offset - 1, largest.offset + 5, 0)[where]
    collected = files.collected

    def changed(disk: Disk, paths: Any) -> Any:
        result = collected(disk, paths)
        data = bytearray(made[name])
        data[at] ^= 1
        path.write_bytes(data if where < 2 else data[: len(data) // 2])
        return result

    monkeypatch.setattr(files, "collected", changed)
    with pytest.raises(InvalidError, match="changed while it was being committed"):
        repo.commit_files({name: path})
    assert list(repo.branches()) == []


def test_trees_that_do_not_add_up_are_damage(tmp_path: Path) -> None:
    from ckptvcs.canonical import Tagged, encode
    from ckptvcs.state import codes
    from ckptvcs.store.format import pack_object

    tensor = Tagged(codes.TENSOR, encode(["numpy", "uint8", [4], 0, None, b"abcd"]))
    aliased = Tagged(codes.TENSOR, encode(["numpy", "uint8", [4], 0, {"alias": [0, 0, None]}, b"abcd"]))
    empty = Tagged(codes.TENSOR, encode(["numpy", "uint8", [0], 0, None, b""]))
    good = [7, 0o644, bytes(32), "npy", b"xyz", {"a": [1, tensor]}]

    def read(fields: Sequence[Any]) -> Any:
        store = MemoryStore()
        inner = {"f": Tagged(codes.TENSOR_FILE, encode(list(fields)))}
        body = encode(Tagged(codes.ROOT, encode({"files": inner})))
        (root,) = store.put_objects(Kind.TREE, [pack_object([], body)])
        (found,) = tree.files(store, root).values()
        return store, root, found

    _, _, found = read(good)
    assert (found.size, found.content.inline, found.tensors[0].before) == (7, b"xyz", 1)
    for at, wrong in [
        (0, 8), (0, 6), (0, 3), (0, -1), (0, "7"), (1, 1 << 16), (2, b""), (3, 5), (4, b"xy"), (4, 5),
        (5, {"a": [4, tensor]}), (5, {"a": [-1, tensor]}), (5, {"a": [1, aliased]}), (5, {"a": [1, empty]}),
        (5, {"a": tensor}), (5, {"a": [1, 5]}), (5, {1: [1, tensor]}), (5, [1]), (5, {"a": [True, tensor]}),
        (5, {"a": [1, tensor], "b": [0, tensor]}),
    ]:  # fmt: skip
        with pytest.raises(CorruptionError):
            read([*good[:at], wrong, *good[at + 1 :]])
    store, root, _ = read(good)
    with pytest.raises(CorruptionError, match="does not have the content"):
        files.contents(store, root)


def test_a_damaged_chunk_is_noticed(made: dict[str, bytes], tmp_path: Path) -> None:
    store = MemoryStore()
    (tmp_path / "f").write_bytes(made["state.pt"])
    written = tree.write(store, files=files.collected(Disk(), {"f": tmp_path / "f"}))
    for key in [key for key in store.records if key[0] is Kind.CHUNK][::3]:
        kept = store.records[key]
        store.records[key] = bytes([kept[0] ^ 1]) + kept[1:]
        with pytest.raises(CorruptionError):
            files.contents(store, written.tree)
        store.records[key] = kept
    assert files.contents(store, written.tree) == {"f": made["state.pt"]}


# -- any tensors ----------------------------------------------------------------------------------

DTYPES = ("float32", "bfloat16", "float64", "int8", "complex64", "float8_e5m2", "bool")


@st.composite
def tensors(draw: st.DrawFn) -> Any:
    """A tensor of any layout: permuted, sliced, expanded, with others in its storage or not."""
    shape = draw(st.lists(st.integers(0, 6), min_size=0, max_size=4))
    seed = draw(st.integers(0, 1 << 16))
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 2, shape, generator=generator).to(getattr(torch, draw(st.sampled_from(DTYPES))))
    for axis in range(found.dim()):
        way = draw(st.sampled_from(["as is", "as is", "turn", "cut", "step", "expand"]))
        if way == "turn":
            found = found.transpose(axis, draw(st.integers(0, found.dim() - 1)))
        elif way == "cut" and found.shape[axis]:
            found = found.narrow(axis, draw(st.integers(0, found.shape[axis] - 1)), 1)
        elif way == "step":
            found = found[(slice(None),) * axis + (slice(None, None, 2),)]
        elif way == "expand" and found.shape[axis] == 1:
            found = found.expand([-1] * axis + [3] + [-1] * (found.dim() - axis - 1))
    return found


@pytest.mark.slow
@settings(max_examples=300, deadline=None, print_blob=True)
@given(values=st.lists(tensors(), min_size=1, max_size=5), again=st.lists(st.integers(0, 4), max_size=3))
def test_any_tensors_of_torch_are_found_as_a_state_has_them(values: list[Any], again: list[int]) -> None:
    """Each of them gives the bytes that a commit of the state would store; parts share no byte."""
    state = {"x": values, "again": [values[at % len(values)] for at in again]}
    data = saved(state)
    found = layout_of(data)
    assert found is not None
    by_name = {tensor.name: tensor for tensor in found.tensors}
    file = File(len(data), lambda offset, length: data[offset : offset + length])
    wanted = {f"x/{at}": value for at, value in enumerate(values)}
    wanted |= {f"again/{at}": value for at, value in enumerate(state["again"])}
    assert by_name.keys() == wanted.keys()
    for name, value in wanted.items():
        tensor = by_name[name]
        plain = torch.empty(value.shape, dtype=value.dtype).copy_(value)
        assert (tensor.spec.dtype, tensor.spec.shape) == (str(value.dtype)[6:], tuple(value.shape))
        got = bytes(TensorSource(file, tensor).read(0, tensor.spec.nbytes))
        assert got == bytes(plain.untyped_storage()), name
    covered = sum(part.spec.nbytes for part in found.parts)
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in values}
    assert covered == sum(storages.values())


# -- reading a tensor out of a committed file -----------------------------------------------------


def test_slices_of_a_files_tensor_are_read_without_the_rest(repo: Repo, tmp_path: Path) -> None:
    array, tensor = numbers(1, 30, 40), torch.randn(4, 8, 8, 8).to(memory_format=torch.channels_last)
    (tmp_path / "500").mkdir()
    (tmp_path / "500" / "a.npz").write_bytes(npz(w=np.asfortranarray(array.astype(">f4")), **{"x/y": array}))
    (tmp_path / "500" / "b.pt").write_bytes(saved({"model": {0: tensor}}))
    files = {"500": tmp_path / "500"}
    repo.commit_files(files)
    assert np.array_equal(repo.open_tensor("main", "500/a.npz/w")[3:5, ::2], array[3:5, ::2])
    assert np.array_equal(repo.open_tensor("main", r"\s500/a.npz/x\/y")[...], array)
    found = repo.open_tensor("main", "500/b.pt/model/0")
    assert (found.dtype, found.shape) == ("float32", (4, 8, 8, 8))
    assert torch.equal(found[1], tensor[1])
    for path in ("500/a.npz/z", "500/b.pt", "500", "600/a.npz/w", "500/b.pt/model", "", "500/a.npz/w/0"):
        with pytest.raises(NotFoundError, match="no tensor"):
            repo.open_tensor("main", path)
    repo.commit({"w": array}, files=files)
    assert np.array_equal(repo.open_tensor("main", "500/a.npz/w")[...], array)
    assert np.array_equal(repo.open_tensor("main", "w")[...], array)
    with pytest.raises(NotFoundError, match="nothing at"):
        repo.open_tensor("main", "500/a.npz/z")
