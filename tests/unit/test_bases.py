"""What a tree holds, by path, and which content of an earlier tree a tensor may be a difference to."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from ckptvcs import Repo
from ckptvcs.disk import Disk
from ckptvcs.errors import CkptError, CorruptionError, NotFoundError, StorageError
from ckptvcs.ids import Kind, ObjectId, chunk_id
from ckptvcs.state import files, tree
from ckptvcs.state.bases import Bases, Held, alike, folded
from ckptvcs.store.format import GRIDS, Grid
from ckptvcs.testing.memory import MemoryStore

# So small that a handful of values already makes chunk lists and pages of pages.
TINY: Final = dataclasses.replace(
    GRIDS[1], chunk=16, inline=8, chunk_list=2, subtree=80, list_page=2, map_page=2
)
BOTH: Final = pytest.mark.parametrize("grid", [GRIDS[1], TINY], ids=["usual", "tiny"])

A, B, C = ((chunk_id(text),) for text in (b"a", b"b", b"c"))


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Config:
    table: Any
    name: str = "config"


def numbers(seed: int, count: int = 300, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).standard_normal(count).astype(dtype)


# -- what a tree holds ----------------------------------------------------------------------------


def checked(grid: Grid, state: Any = tree.ABSENT, folder: Any = None) -> dict[str, Held]:
    """What a state holds; fails if its tree says anything else."""
    store = MemoryStore(grid)
    written = tree.write(store, state, folder)
    found = tree.held(store, written.tree)
    assert found == written.held
    for each in found.values():
        assert each.chunks
        assert all((Kind.CHUNK, id) in store.records for id in each.chunks)
    again = tree.write(store, state, folder, Bases(lambda: written.held))
    assert again == written, "bases change no tree"
    return found


STATES: Final[dict[str, Callable[[], Any]]] = {
    "one tensor": lambda: numbers(1),
    "nested dicts": lambda: {"a": {"b": {"c": numbers(1)}, "d": numbers(2)}, "e": numbers(3)},
    "keys of all kinds": lambda: {
        key: numbers(at)
        for at, key in enumerate(["a/b", "a\\b", "", 0, "0", -1, True, None, 2.5, b"x", (1, "y"), "ü*?["])
    },
    "lists and tuples": lambda: [numbers(1), (numbers(2), [numbers(3), ()]), [], numbers(4)],
    "long lists": lambda: [numbers(at, 80) for at in range(150)],
    "long dicts": lambda: {f"layers.{at}.weight": numbers(at, 80) for at in range(300)},
    "named tuples": lambda: {"p": Point(numbers(1), Point(numbers(2), 3))},
    "dataclasses": lambda: {"c": Config(numbers(1)), "d": [Config([numbers(2)], "x" * 5000)]},
    "namespaces and the like": lambda: {
        "n": argparse.Namespace(a=numbers(1)),
        "s": types.SimpleNamespace(a=numbers(2)),
        "o": collections.OrderedDict(a=numbers(3)),
        "d": collections.defaultdict(list, a=numbers(4)),
        "q": collections.deque([numbers(5)], 3),
    },
    "long text and bytes": lambda: {
        "text": "é" * 5000,
        "bytes": bytes(range(256)) * 20,
        "array": bytearray(b"x" * 4000),
        "empty": ["", b"", bytearray()],
    },
    "numpy generators": lambda: {
        "rng": np.random.default_rng(1).bit_generator.state,
        "old": np.random.RandomState(1).get_state(),
    },
    "dtypes": lambda: (
        {
            name: numbers(1, 400, np.float32).astype(name)
            for name in ("?", "i1", "i8", "u2", "f2", "f8", "c8", "c16", ">i4", ">f8", "S7", "U3")
        }
        | {"bf": numbers(1, 400, ml_dtypes.bfloat16), "f8": numbers(1, 999, ml_dtypes.float8_e4m3fn)}
    ),
    "shapes and strides": lambda: {
        "empty": np.zeros((0, 3)),
        "scalar": np.float64(3),
        "zero-dimensional": np.array(3.0),
        "transposed": numbers(1, 900).reshape(30, 30).T,
        "strided": numbers(2, 900)[::-3],
    },
    "shared memory": lambda: (lambda base: {"a": base, "b": base[100:], "c": [base, base.T], "d": base[::2]})(
        numbers(1, 900)
    ),
    "the same content twice": lambda: {"a": numbers(1), "b": numbers(1), "c": {"a": numbers(1)}},
    "sets and scalars": lambda: {"s": {1, 2}, "f": frozenset("ab"), "n": None, "i": 7, "x": 1.5},
    "nothing": dict,
}


@BOTH
@pytest.mark.parametrize("name", STATES)
def test_a_tree_holds_what_writing_it_said(name: str, grid: Grid) -> None:
    checked(grid, STATES[name]())


@BOTH
@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
def test_trees_of_torch_hold_what_writing_them_said(grid: Grid) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    dense = torch.randn(40, 40)
    sparse = torch.where(dense.abs() > 1, dense, torch.zeros(()))
    model = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.BatchNorm1d(20))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 20)).sum().backward()
    optimizer.step()
    per_tensor = torch.quantize_per_tensor(dense, 0.1, 3, torch.qint8)
    per_channel = torch.quantize_per_channel(dense, torch.full((40,), 0.1), torch.zeros(40), 0, torch.qint8)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "coo": sparse.to_sparse(),
        "csr": sparse.to_sparse_csr(),
        "csc": sparse.to_sparse_csc(),
        "bsr": sparse.to_sparse_bsr((4, 4)),
        "quantized": [per_tensor, per_channel],
        "generator": torch.Generator(),
        "rng": torch.get_rng_state(),
        "half": dense.to(torch.complex32),
        "view": {"whole": dense, "part": dense[3:, 2:], "turned": dense.t()},
        "parameter": torch.nn.Parameter(dense.clone()),
    }
    found = checked(grid, state)
    assert {"coo/indices", "coo/values", "generator/state", "view/whole"} <= found.keys()
    assert found["model/0.weight"].shape == (20, 20)


def stored_folder(tmp_path: Path) -> Any:
    (tmp_path / "sub").mkdir()
    for name, data in {
        "a.bin": numbers(1, 2000).tobytes(), "sub/b.bin": b"text " * 1000, "sub/empty": b"", "tiny": b"x",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
    (tmp_path / "sub" / "link").symlink_to("b.bin")
    return files.collected(Disk(), {"run": tmp_path, "other.bin": tmp_path / "a.bin"})


@BOTH
def test_files_lie_apart_from_the_state(tmp_path: Path, grid: Grid) -> None:
    folder = stored_folder(tmp_path)
    alone = checked(grid, folder=folder)
    state = {"run": {"a.bin": numbers(5)}, "files": numbers(6), "other.bin": numbers(7)}
    both = checked(grid, state, folder)
    assert both == alone | checked(grid, state), "no path of a file is a path of the state"
    assert all((each.dtype, each.shape) == ("", ()) for each in alone.values())
    large = [path for path in alone if path.endswith("a.bin")]
    assert len(large) == 1


@BOTH
def test_what_is_held_is_what_is_stored(grid: Grid) -> None:
    array = numbers(1, 900).reshape(30, 30)
    found = checked(grid, {"a": {"w": array, "t": array.T.copy(), "n": 5}, "text": "x" * 5000})
    assert found.keys() == {"a/w", "a/t", "text"}
    raw = array.tobytes()
    cells = tuple(chunk_id(raw[at : at + grid.chunk]) for at in range(0, len(raw), grid.chunk))
    assert found["a/w"] == Held("float32", (30, 30), cells)
    assert found["text"].dtype == ""


def test_a_damaged_tree_is_an_error_and_not_half_an_answer() -> None:
    store = MemoryStore(TINY)
    written = tree.write(store, STATES["long dicts"]())
    for kind, id in [key for key in store.records if key[0] is not Kind.CHUNK][::9]:
        kept = store.records.pop((kind, id))
        with pytest.raises(CkptError):
            tree.held(store, written.tree)
        store.records[kind, id] = kept
    assert tree.held(store, written.tree) == written.held


# -- hints that are given to the writer -----------------------------------------------------------


def hinted(grid: Grid, before: Any, after: Any) -> dict[str, list[ObjectId | None]]:
    """The bases that are named for each cell of a state, by the path of its content."""
    store = MemoryStore(grid)
    first = tree.write(store, before)
    store.hints.clear()
    second = tree.write(store, after, bases=Bases(lambda: first.held))
    found = {}
    for path, each in second.held.items():
        hint = store.hints[each.chunks[0]]
        assert hint.base is not None
        assert hint.numbers == each.dtype
        found[path] = [hint.base(at * grid.chunk) for at in range(len(each.chunks) + 2)]
    return found


def test_every_cell_has_the_cell_at_its_place_as_a_base() -> None:
    before, after = {"w": numbers(1, 50), "v": numbers(2, 50)}, {"w": numbers(3, 50), "new": numbers(4, 77)}
    store = MemoryStore(TINY)
    old = tree.write(store, before).held
    found = hinted(TINY, before, after)
    assert found["w"] == [*old["w"].chunks, None, None]
    assert set(found["new"]) == {None}


def test_a_tensor_of_another_dtype_or_shape_is_no_base() -> None:
    before = {"a": numbers(1, 60), "b": numbers(2, 60), "c": "x" * 500}
    after = {"a": numbers(3, 60, np.float64), "b": numbers(4, 60).reshape(6, 10), "c": numbers(5, 60)}
    assert {base for bases in hinted(TINY, before, after).values() for base in bases} == {None}


def test_hints_of_alike_content_are_alike() -> None:
    """What suits a tensor is remembered by its path, dtype and shape."""
    keys = []
    for seed in (1, 2):
        store = MemoryStore(TINY)
        written = tree.write(store, {"w": numbers(seed, 50), "v": numbers(seed + 5, 50)})
        keys.append({path: store.hints[each.chunks[0]].key for path, each in written.held.items()})
    assert keys[0] == keys[1]
    assert keys[0]["w"] != keys[0]["v"]
    assert len({hash(key) for key in keys[0].values()}) == 2


# -- finding --------------------------------------------------------------------------------------


def named(held: Mapping[str, Held]) -> Bases:
    return Bases(lambda: held)


F32: Final = ("float32", (3,))


def held(chunks: tuple[ObjectId, ...], dtype: str = "float32", shape: tuple[int, ...] = (3,)) -> Held:
    return Held(dtype, shape, chunks)


def test_content_of_the_same_path_is_found() -> None:
    found = named({"model/a": held(A), "model/b": held(B)})
    assert found.find("model/a", *F32) == A
    assert found.find("model/b", *F32) == B
    for path, dtype, shape in (
        ("model/c", "float32", (3,)), ("model/a", "float64", (3,)), ("model/a", "float32", (3, 1)),
        ("model/a", "float32", ()), ("model/a", "", ()), ("", "float32", (3,)), ("a", "float32", (3,)),
    ):  # fmt: skip
        assert found.find(path, dtype, shape) == (), (path, dtype, shape)
    assert Bases(dict).find("model/a", *F32) == ()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("checkpoint-500/model/w", "checkpoint-1000/model/w"),
        ("step_9/x", "step_10/x"),
        ("module.w", "w"),
        ("w", "module.w"),
        ("model/module.layer.w", "model/layer.w"),
        ("model/layer.w", "model/_orig_mod.layer.w"),
        ("model/_orig_mod.module.w", "model/w"),
        ("model/a._fsdp_wrapped_module.w", "model/a.w"),
        ("model/a.w", "model/a._checkpoint_wrapped_module._fsdp_wrapped_module.w"),
        ("files/run-1/weights-0001.bin", "files/run-2/weights-0001.bin"),
    ],
)
def test_content_of_the_same_folded_path_is_found(before: str, after: str) -> None:
    assert folded(before) == folded(after)
    assert named({before: held(A), "other": held(B)}).find(after, *F32) == A


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("model/submodule.w", "model/sub.w"),
        ("model/my_module.w", "model/my_w"),
        ("module", "w"),
        ("a/w", "b/w"),
        ("a1/w", "a/w"),
        ("w", "v"),
        ("module/w", "w"),
    ],
)
def test_paths_that_only_look_alike_are_not_folded_together(before: str, after: str) -> None:
    assert folded(before) != folded(after)
    assert named({before: held(A)}).find(after, *F32) == ()


def test_a_folded_path_must_be_one_contents_alone() -> None:
    two = named({"layer.1.w": held(A), "layer.2.w": held(B), "head.1.w": held(C)})
    assert two.find("layer.1.w", *F32) == A, "its own path first"
    assert two.find("layer.3.w", *F32) == ()
    assert two.find("head.7.w", *F32) == C
    three = named({f"layer.{at}.w": held((chunk_id(bytes([at])),)) for at in range(3)})
    assert three.find("layer.9.w", *F32) == (), "an even number of times and an odd one"


def test_numbers_that_are_the_same_find_the_tensor_that_was_wrapped_meanwhile() -> None:
    plain = named({"layer.1.w": held(A), "layer.2.w": held(B)})
    assert plain.find("module.layer.2.w", *F32) == B
    assert plain.find("module.layer.02.w", *F32) == B
    assert plain.find("module.layer.3.w", *F32) == ()
    wrapped = named({"model/module.layer.1.w": held(A), "model/module.layer.2.w": held(B)})
    assert wrapped.find("model/layer.1.w", *F32) == A


def in_files(**chunks: tuple[ObjectId, ...]) -> Bases:
    """Tensors of one name in the files `run/checkpoint-N/model.safetensors`."""
    return named({inside(name.removeprefix("at"), "layers.3.w"): held(each) for name, each in chunks.items()})


def inside(step: str, name: str) -> str:
    return f"\\s/run/checkpoint-{step}/model.safetensors//{name}"


def test_of_a_files_tensor_the_save_before_is_found() -> None:
    several = in_files(at500=A, at1000=B, at90=C)
    for step, wanted in {
        "1500": B,
        "999": A,
        "100": C,
        "20": C,
        "500": A,
        "10000000000000000000000": B,
    }.items():
        assert several.find(inside(step, "layers.3.w"), *F32) == wanted, step
    assert several.find(inside("1500", "layers.4.w"), *F32) == (), "another layer"
    assert several.find(inside("1500", "layers.3.w"), "float64", (3,)) == ()
    assert several.find(inside("1500", "module.layers.3.w"), *F32) == B
    assert several.find(inside("1500", "layers.3.w").replace("model.", "other."), *F32) == ()
    assert in_files(at1000=B).find(inside("1500", "layers.3.w"), "int8", (3,)) == ()


def test_of_a_shard_the_shard_of_that_number_is_found() -> None:
    shards = {
        f"\\s/checkpoint-{step}/model-{shard}-of-2.bin": held((chunk_id(b"%d %d" % (step, shard)),), "", ())
        for step in (5, 10)
        for shard in (1, 2)
    }
    assert named(shards).find("\\s/checkpoint-15/model-1-of-2.bin", "", ()) == (chunk_id(b"10 1"),)


def test_hints_of_files_tensors_are_alike_whatever_the_save() -> None:
    assert alike(inside("5", "layers.3.w")) == alike(inside("10", "layers.3.w"))
    assert alike(inside("5", "layers.3.w")) != alike(inside("5", "layers.4.w"))
    assert alike("checkpoint-5/w") != alike("checkpoint-6/w")


def test_content_of_the_folded_path_must_be_of_the_same_dtype_and_shape() -> None:
    found = named({"step-1/w": held(A)})
    assert found.find("step-2/w", "float32", (3,)) == A
    for dtype, shape in (("float64", (3,)), ("float32", (4,)), ("float32", (1, 3)), ("", ())):
        assert found.find("step-2/w", dtype, shape) == ()


def test_content_whose_own_path_holds_something_else_may_have_moved() -> None:
    found = named({"step-1/w": held(A), "step-2/w": held(B, "int8"), "x": held(C)})
    assert found.find("step-2/w", *F32) == (), "two of that folded path"
    assert named({"a": held(A, "int8")}).find("a", *F32) == ()


def test_nothing_is_found_at_the_empty_path_by_folding() -> None:
    assert named({"": held(A)}).find("", *F32) == A
    assert named({"": held(A)}).find("module.", *F32) == ()


@pytest.mark.parametrize(
    "error",
    [
        CorruptionError("damaged"),
        NotFoundError("collected"),
        StorageError("input/output error"),
        CkptError("x"),
    ],
)
def test_content_that_cannot_be_loaded_is_no_base(error: CkptError) -> None:
    calls = []

    def load() -> dict[str, Held]:
        calls.append(1)
        raise error

    found = Bases(load)
    for _ in range(3):
        assert found.find("a", *F32) == ()
        assert found.find("b1", *F32) == ()
    assert calls == [1]


def test_nothing_is_loaded_before_it_is_asked_for_and_only_once() -> None:
    calls: list[int] = []
    started = threading.Barrier(4)
    results: list[Sequence[ObjectId]] = []

    def load() -> dict[str, Held]:
        calls.append(1)
        return {f"layer-{at}": held((chunk_id(bytes([at, 0])),)) for at in range(200)} | {"only-1": held(C)}

    found = Bases(load)
    assert calls == []

    def work() -> None:
        started.wait()
        for at in range(200):
            results.append(found.find(f"layer-{at}", *F32))
            results.append(found.find("only-2", *F32))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]
    assert len(results) == 1600
    assert sum(result == C for result in results) == 800
    assert () not in results


# -- through a repository -------------------------------------------------------------------------


def test_a_handle_remembers_what_it_committed_as_its_tree_has_it(folder: Path) -> None:
    state = {"a": {"w": numbers(1)}, "text": "x" * 5000, "l": [numbers(2), Point(numbers(3), 1)]}
    (folder / "beside").mkdir()
    (folder / "beside" / "x.bin").write_bytes(numbers(4).tobytes())
    with Repo.init(folder) as repo:
        commit = repo.commit(state, files={"beside": folder / "beside"})
        assert repo._committer.held is not None
        assert repo._committer.held[0] == commit.id
        with repo._store.reader() as reader:
            assert tree.held(reader, commit.tree) == repo._committer.held[1]
        other = repo.on("other")
        assert other._committer.held is None


def test_the_first_commit_and_a_fresh_start_have_no_bases(repo: Repo) -> None:
    assert repo._committer._bases([]).find("w", "float32", (300,)) == ()
    commit = repo.commit({"w": numbers(1)})
    found = repo.on("side")._committer._bases([commit.id]).find("w", "float32", (300,))
    assert found == (chunk_id(numbers(1).tobytes()),)


def test_a_parent_that_is_not_there_gives_no_bases(repo: Repo) -> None:
    commit = repo.commit({"w": numbers(1)})
    other = repo.on("side")
    missing = chunk_id(b"no commit")
    assert other._committer._bases([missing]).find("w", "float32", (300,)) == ()
    with repo._store.index.change() as change:
        assert change.delete_row(commit.tree)
    assert other._committer._bases([commit.id]).find("w", "float32", (300,)) == ()
