"""One tensor of a commit, read in slices."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from ckptvcs import InvalidError, NotFoundError, Repo
from ckptvcs.errors import CorruptionError
from ckptvcs.ids import chunk_id
from ckptvcs.state import lazy, tree
from ckptvcs.testing.memory import MemoryStore


@pytest.fixture
def repo(tmp_path: Path) -> Any:
    with Repo.init(tmp_path) as made:
        yield made


def big(dtype: Any = np.float32, shape: tuple[int, ...] = (7, 300, 500)) -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).integers(0, 200, shape).astype(dtype)


INDEXES: list[Any] = [
    ...,
    0,
    -1,
    slice(2, 5),
    slice(5, 2),
    (slice(None), 7),
    (..., slice(10, 400, 7)),
    (3, ..., 499),
    (slice(1, 7, 2), slice(100, 120), slice(None, None, 3)),
    (6, 299, 499),
    (slice(-3, None), slice(-10, -2)),
]


@pytest.mark.parametrize("index", INDEXES, ids=str)
def test_a_slice_is_that_of_the_array(repo: Repo, index: Any) -> None:
    array = big()
    found = repo.open_tensor(repo.commit({"a": {"w": array}}), "a/w")
    assert (found.shape, found.dtype, found.nbytes, found.ndim) == (array.shape, "float32", array.nbytes, 3)
    sliced = found[index]
    assert isinstance(sliced, np.ndarray)
    assert sliced.dtype == array.dtype
    np.testing.assert_array_equal(sliced, array[index])


@pytest.mark.slow
def test_random_indexes() -> None:
    seed = random.randrange(1 << 32)
    print(f"replay with seed {seed}")
    chance = random.Random(seed)
    store = MemoryStore()
    for shape in ((3_000_001,), (1500, 1001), (5, 40, 9, 1000), (1, 2_000_000, 1)):
        array = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
        written = tree.write(store, {"w": array})
        opened = lazy.opened_tensor(lambda: _Open(store), written.tree, "w", None)
        for _ in range(25):
            index: list[Any] = []
            for length in shape:
                if chance.random() < 0.3:
                    index.append(chance.randrange(-length, length))
                else:
                    ends = [chance.choice([None, chance.randrange(-length, length + 1)]) for _ in "ab"]
                    index.append(slice(*ends, chance.choice([None, 1, 2, 17])))
            wanted = array[tuple(index)]
            store.chunks_read.clear()
            np.testing.assert_array_equal(opened[tuple(index)], wanted)
            if wanted.size:
                assert set(store.chunks_read) == needed(array, tuple(index), store.grid.chunk)


class _Open:
    def __init__(self, store: MemoryStore) -> None:
        self.store = store

    def __enter__(self) -> MemoryStore:
        return self.store

    def __exit__(self, *_: object) -> None:
        pass


def needed(array: np.ndarray[Any, Any], index: Any, chunk: int) -> set[Any]:
    """The chunks in which the elements lie, or any between the first and last of a strided innermost run."""
    item = array.itemsize
    places = np.arange(array.size).reshape(array.shape)[index].reshape(-1) * item // chunk
    flat = array.tobytes()
    ids = {int(at): chunk_id(flat[at * chunk : (at + 1) * chunk]) for at in np.unique(places)}
    return set(ids.values())


def test_only_the_chunks_of_the_slice_are_read(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((64, 1 << 18), dtype=np.float32)  # a row is a chunk
    with Repo.init(tmp_path, compression="fast") as repo:
        commit = repo.commit({"w": array, "other": big()})
        found = repo.open_tensor(commit, "w")
        with repo._reading(commit) as reader:
            whole = reader.bytes_read
            found._opened = lambda: _Open(reader)  # type: ignore[assignment, arg-type, return-value]
            np.testing.assert_array_equal(found[5:7, ::1000], array[5:7, ::1000])
            assert 1.5e6 < reader.bytes_read - whole < 2.1e6


@pytest.mark.parametrize(
    "dtype", [np.dtype(">f4"), np.dtype(bool), np.dtype("c16"), ml_dtypes.bfloat16, "S5"]
)
def test_every_kind_of_number(repo: Repo, dtype: Any) -> None:
    array = big(dtype, (900, 700))
    found = repo.open_tensor(repo.commit([array]), "0")[300:310, 1::2]
    assert found.dtype == array.dtype
    assert found.tobytes() == array[300:310, 1::2].tobytes()


def test_torch_tensors_and_views(repo: Repo) -> None:
    base = torch.arange(2_000_000.0).reshape(1000, 2000)
    parameter = torch.nn.Parameter(base.clone())
    commit = repo.commit({"t": base.T, "p": parameter, "bf": base.bfloat16(), "scalar": torch.tensor(3)})
    for name, whole in (("t", base.T), ("p", base), ("bf", base.bfloat16())):
        found = repo.open_tensor(commit, name)[10:12, 5]
        assert type(found) is torch.Tensor
        assert not found.requires_grad
        assert torch.equal(found, whole[10:12, 5])
    assert repo.open_tensor(commit, "scalar")[...].item() == 3
    assert type(repo.open_tensor(commit, "t", framework="numpy")[0, :3]) is np.ndarray
    assert len(repo.open_tensor(commit, "t")) == 2000
    np.testing.assert_array_equal(np.asarray(repo.open_tensor(commit, "p")), base.numpy())


def test_differences_and_small_tensors(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    weights = generator.standard_normal((1024, 1024), dtype=np.float32)
    with Repo.init(tmp_path, compression="small") as repo:
        for step in range(4):
            state = {"w": weights + np.float32(1e-4 * step), "tiny": np.arange(3), "empty": np.empty((0, 4))}
            commit = repo.commit(state, step=step)
        np.testing.assert_array_equal(repo.open_tensor(commit, "w")[700], state["w"][700])
        assert repo.open_tensor(commit, "tiny")[1] == 1
        assert repo.open_tensor(commit, "empty")[...].shape == (0, 4)


def test_names_are_no_patterns(repo: Repo) -> None:
    commit = repo.commit({"a*": np.ones(2), "ab": np.zeros(2), "x/y": np.ones(1), 0: np.ones(3)})
    assert repo.open_tensor(commit, "a*").shape == (2,)
    assert repo.open_tensor(commit, r"x\/y").shape == (1,)
    assert repo.open_tensor(commit, "0").shape == (3,)


def test_what_is_refused(repo: Repo, tmp_path: Path) -> None:
    state = {"d": {"w": np.ones(3)}, "n": 1, "s": torch.eye(3).to_sparse()}
    commit = repo.commit(state)
    for path in ("d/x", "nothing", "d/w/deeper", "a*"):
        with pytest.raises(NotFoundError, match="there is nothing at"):
            repo.open_tensor(commit, path)
    for path, kind in (("d", "dict"), ("n", "int"), ("s", "sparse"), ("", "dict")):
        with pytest.raises(InvalidError, match=f"is a {kind}, not a dense tensor"):
            repo.open_tensor(commit, path)
    with pytest.raises(InvalidError, match="unknown framework"):
        repo.open_tensor(commit, "d/w", framework="jax")
    found = repo.open_tensor(commit, "d/w")
    for index in (3, -4, (0, 0), (..., ...), "w", [0], None, slice(None, None, -1), 1.0):
        with pytest.raises(IndexError):
            found[index]  # type: ignore[index]
    (tmp_path / "file").write_bytes(b"x")
    files = repo.commit_files({"file": tmp_path / "file"})
    with pytest.raises(NotFoundError, match="holds files"):
        repo.open_tensor(files, "d/w")


def test_after_collection_and_damage(repo: Repo) -> None:
    repo.commit({"keep": 1})
    side = repo.on("side")
    found = side.open_tensor(side.commit({"w": big()}), "w")
    repo.delete_branch("side", force=True)
    repo.gc(grace=0)
    with pytest.raises(NotFoundError, match="was deleted while it was being read"):
        found[0]
    kept = repo.commit({"w": big()})
    opened = repo.open_tensor(kept, "w")
    for pack in repo.path.glob(".ckpt/packs/*/*.pack"):
        pack.chmod(0o644)
        data = bytearray(pack.read_bytes())
        for at in range(2000, len(data) - 20_000, 5000):
            data[at] ^= 1
        pack.write_bytes(data)
    with pytest.raises(CorruptionError):
        opened[...]


def test_combinations_of_whole_and_partial_dimensions() -> None:
    store = MemoryStore()
    array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4).repeat(100_000, axis=2)
    written = tree.write(store, [array])
    opened = lazy.opened_tensor(lambda: _Open(store), written.tree, "0", None)
    parts: list[Any] = [slice(None), 1, slice(1, 2), slice(0, None, 2)]
    for index in itertools.product(parts, repeat=3):
        np.testing.assert_array_equal(opened[index], array[index])
