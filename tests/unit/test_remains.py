"""What is left of a tree when components of it are dropped."""

from __future__ import annotations

import collections
import dataclasses
import random
from typing import Any

import numpy as np
import pytest

from ckptvcs.ids import Kind, ObjectId, chunk_id
from ckptvcs.state import paths, tree
from ckptvcs.state.build import FileContent
from ckptvcs.state.materialise import Materialiser
from ckptvcs.state.read import Loader
from ckptvcs.state.remains import Remains, remains
from ckptvcs.store.format import GRIDS, unpack_object
from ckptvcs.testing.memory import MemoryStore
from ckptvcs.testing.same import difference


def closure(store: MemoryStore, left: Remains) -> set[tuple[Kind, ObjectId]]:
    """Everything that is left."""
    found = {(Kind.TREE, id) for id in left.alone}
    waiting, seen = list(left.whole), set()
    while waiting:
        kind, id = waiting.pop()
        if (kind, id) not in seen:
            seen.add((kind, id))
            if kind is not Kind.CHUNK:
                waiting += unpack_object(store.records[kind, id], "it")[0]
    return found | seen


def array(seed: int, size: int) -> Any:
    """An array that no other shares a chunk with."""
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def some_state(random: random.Random) -> dict[Any, Any]:
    """A state whose components are of all shapes, few or many, shallow or deep."""
    count = random.choice((2, 5, 70, 200))
    state: dict[Any, Any] = random.choice((dict, collections.OrderedDict))()
    for at in range(count):
        key: Any = random.choice((f"part{at}", f"a/b{at}", at, -at - 1))
        wide = random.choice((1, 3, 40, 1500))
        state[key] = random.choice(
            (
                lambda at=at: array(at, 300),
                lambda at=at, wide=wide: {f"w{n}": array(1000 * at + n, 300) for n in range(min(wide, 30))},
                lambda at=at, wide=wide: [f"text {at} {n}" for n in range(wide)],
                lambda at=at, wide=wide: {n: {"x": [n, at]} for n in range(wide)},
                lambda at=at: (array(at + 7, 600), {"deep": [array(at + 9, 700)]}),
                lambda at=at: "x" * 300_000 + str(at),
                lambda at=at: at,
            )
        )()
    state["shared"] = {"as": array(0, 300), "text": "kept"}
    return state


@pytest.mark.parametrize("seed", range(40))
def test_the_rest_reads_back_and_nothing_else_is_left(seed: int) -> None:
    made = random.Random(seed)
    grid = dataclasses.replace(GRIDS[1], subtree=made.choice((64, 512, GRIDS[1].subtree)))
    store = MemoryStore(grid)
    state = some_state(made)
    written = tree.write(store, state)
    dropped = {name for name in written.sizes if made.random() < 0.5} or {"shared"}
    held = tree.held(store, written.tree)

    left = remains(store, written.tree, dropped)
    there = closure(store, left)
    few = len(state) <= 64
    stays = {
        key: value
        for key, value in state.items()
        if (paths.name(key) if few or isinstance(value, (dict, list, tuple)) else "") not in dropped
    }
    names = {paths.name(key) for key in stays}
    wanted = {id for path, each in held.items() if paths.split(path)[0] in names for id in each.chunks}
    assert {id for kind, id in there if kind is Kind.CHUNK} == wanted

    for kind, id in list(store.records):
        if (kind, id) not in there:
            del store.records[kind, id]
    for key, value in stays.items():
        loader = Loader(store)
        opened, parts = loader.root(written.tree)
        stored = loader.node(parts["state"], opened, paths.exactly([paths.name(key)]))
        found = Materialiser(store, None, None).values([("", stored)])[0]
        assert difference(dict(found), {key: value}) is None


def paths_first(path: str) -> str:
    """The first component of a path."""
    at = 0
    while at < len(path) and path[at] != "/":
        at += 2 if path[at] == "\\" else 1
    return path[:at]


def test_files_are_components_by_their_top_level_name() -> None:
    store = MemoryStore()
    folder = {
        "run": {"a.bin": content(array(1, 5000)), "b.bin": content(array(2, 5000))},
        "log.bin": content(array(3, 5000)),
    }
    written = tree.write(store, {"model": array(4, 5000)}, folder)
    assert set(written.sizes) == {"model", "run", "log.bin"}
    there = closure(store, remains(store, written.tree, {"run"}))
    assert {id for kind, id in there if kind is Kind.CHUNK} == {
        chunk_id(array(3, 5000)),
        chunk_id(array(4, 5000)),
    }


def test_a_state_that_is_no_dict_goes_as_a_whole() -> None:
    store = MemoryStore()
    written = tree.write(store, [array(1, 5000), array(2, 5000)])
    assert remains(store, written.tree, {""}) == Remains(frozenset({written.tree}), frozenset())
    assert len(closure(store, remains(store, written.tree, {"model"}))) == 3


def content(data: Any) -> FileContent:
    """A file of these bytes."""
    return FileContent(len(data), 0o644, bytes(32), 0, [InMemory(data.tobytes())])


@dataclasses.dataclass
class InMemory:
    """Bytes as a source."""

    data: bytes
    element_size: int = 1

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]
