import dataclasses
import os
import random
import sys
import time

import numpy as np
import pytest

from ckptvcs import canonical
from ckptvcs.canonical import Tagged
from ckptvcs.errors import (
    CkptError,
    CorruptionError,
    NotFoundError,
    StorageError,
    UnsupportedStateError,
)
from ckptvcs.ids import Kind, chunk_id, object_id
from ckptvcs.state import codes, tree
from ckptvcs.state.tensors import BytesSource
from ckptvcs.store.format import GRIDS, pack_object, unpack_object
from ckptvcs.testing.memory import MemoryStore
from ckptvcs.testing.same import difference


def added(store, state, check=True):
    before = store.added, len(store.records)
    written = tree.write(store, state)
    if check:
        assert difference(state, tree.read(store, written.tree)) is None
    return store.added - before[0], len(store.records) - before[1]


@pytest.mark.parametrize(("count", "limit"), [(1000, 4_000), (10_000, 5_000)])
def test_one_changed_counter_rewrites_a_few_kilobytes(count, limit):
    state = {f"layers.{at}.weight": np.full(8, at) for at in range(count)}
    state["step"] = np.array(1)
    store = MemoryStore()
    added(store, state)
    costs = []
    for name in ("step", *(f"layers.{at}.weight" for at in range(0, count, count // 5))):
        state[name] = state[name] + 1
        costs.append(added(store, state, check=False)[0])
    assert sum(costs) / len(costs) < 4 * limit
    del state["layers.11.weight"]
    state["layers.new"] = np.zeros(8)
    size, records = added(store, state)
    assert size < 10 * limit
    assert records < 14


def test_growing_lists_and_unchanged_subtrees():
    store = MemoryStore()
    state = {
        "loss": [0.5] * 100_000,
        "model": {str(at): np.full(8, at) for at in range(500)},
        "rng": random.getstate(),
    }
    added(store, state)
    state["loss"] = [*state["loss"], 0.25]
    size, records = added(store, state)
    assert size < 20_000
    assert records < 8
    assert added(store, {"renamed": state["model"]})[1] == 1


def test_pages_hold_with_tiny_grids():
    grid = dataclasses.replace(GRIDS[1], subtree=100, map_page=2, list_page=2)
    for count in (0, 1, 2, 3, 10, 500):
        store = MemoryStore(grid)
        added(store, {"m": {at: str(at) for at in range(count)}, "l": [str(at) for at in range(count)],
                      "n": list(range(count)),
                      "t": tuple(map(str, range(count))), "s": set(map(str, range(count)))})  # fmt: skip


def test_sections_and_sizes():
    store = MemoryStore()
    state = {"model": {"w": np.zeros(1000)}, "a/b": [np.zeros(500)], "step": 7, "small": np.zeros(3)}
    written = tree.write(store, state)
    assert store.sections == ["model", r"a\/b", ""]
    assert written.sizes == {"model": 8000, r"a\/b": 4000, "step": 1, "small": 24}
    assert {name: size for name, size in tree.sizes(store, written.tree).items() if name != "step"} == {
        name: size for name, size in written.sizes.items() if name != "step"
    }
    assert tree.write(store, np.zeros(1000)).sizes == {"": 8000}
    many = {f"w{at}": np.zeros(100) for at in range(100)} | {"model": {"w": np.zeros(100)}}
    assert tree.write(store, many).sizes == {"": 80000, "model": 800}


def test_one_read_for_everything():
    calls = []

    class Counting(MemoryStore):
        def read_into(self, requests):
            calls.append(len(requests))
            super().read_into(requests)

    store = Counting()
    written = tree.write(
        store, {"a": np.zeros(1000), "b": {"t": "x" * 9999, "c": np.arange(1000.0).reshape(10, 100).T}}
    )
    tree.read(store, written.tree)
    assert calls == [3]


# -- selecting ------------------------------------------------------------------------------------

STATE = {
    "model": {"encoder": {"w": np.arange(100.0), "b": np.ones(100)}, "decoder": {"w": np.zeros(100)}},
    "optimizer": {
        "state": {0: {"m": np.full(100, 2.0)}, 1: {"m": np.full(100, 3.0)}},
        "groups": [{"lr": 0.1}, {"lr": 0.2}],
    },
    "step": 5,
    "pair": (1, {"x": 2}),
    "big": {f"k{at}": {"v": at, "pad": "." * 100} for at in range(300)},
}


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("step", {"step": 5}),
        (
            "model/*/w",
            {
                "model": {
                    "encoder": {"w": STATE["model"]["encoder"]["w"]},
                    "decoder": STATE["model"]["decoder"],
                }
            },
        ),
        ("model/encoder", {"model": {"encoder": STATE["model"]["encoder"]}}),
        ("optimizer/state/1", {"optimizer": {"state": {1: STATE["optimizer"]["state"][1]}}}),
        ("optimizer/groups/1/lr", {"optimizer": {"groups": [{"lr": 0.2}]}}),
        ("optimizer/groups/*/lr", {"optimizer": {"groups": STATE["optimizer"]["groups"]}}),
        (["step", "pair/1"], {"step": 5, "pair": ({"x": 2},)}),
        ("**m", {"optimizer": {"state": STATE["optimizer"]["state"]}}),
        ("big/k7", {"big": {"k7": STATE["big"]["k7"]}}),
        ("", STATE),
    ],
)
def test_only(only, expected):
    store = MemoryStore()
    written = tree.write(store, STATE)
    assert difference(expected, tree.read(store, written.tree, only=only)) is None


def test_only_reads_nothing_else():
    store = MemoryStore()
    written = tree.write(store, STATE)
    store.objects_read.clear()
    tree.read(store, written.tree, only="model/encoder/w")
    assert store.chunks_read == [chunk_id(np.arange(100.0).tobytes())]
    assert len(set(store.objects_read)) == 1  # the root alone: the page of "big" was left out
    tree.read(store, written.tree, only="big/k7")
    assert len(store.chunks_read) == 1


@pytest.mark.parametrize("only", ["modle", "model/encodr", ["step", "nothing*"], "step/below", "model/*/x"])
def test_a_miss_is_an_error(only):
    store = MemoryStore()
    written = tree.write(store, STATE)
    with pytest.raises(NotFoundError, match="nothing in this commit matches") as caught:
        tree.read(store, written.tree, only=only)
    assert caught.value.hint


def test_entries():
    store = MemoryStore()
    written = tree.write(
        store, {"w": np.zeros((3, 1 << 18), "f4"), 0: [1, "text"], "none": {}, "long": "x" * 9000}
    )
    found = [
        (e.path, e.kind, e.dtype, e.shape, e.nbytes, e.chunks, e.preview)
        for e in tree.entries(store, written.tree)
    ]
    assert found == [
        ("w", "tensor", "float32", (3, 1 << 18), 3 << 20, 3, ""),
        ("0/0", "int", None, None, 8, 0, "1"),
        ("0/1", "str", None, None, 5, 0, "'text'"),
        ("none", "dict", None, None, 0, 0, "{}"),
        ("long", "str", None, None, 9000, 1, ""),
    ]
    assert not store.chunks_read


# -- files ----------------------------------------------------------------------------------------


def content(data, splitter=0, pieces=None):
    sources = [BytesSource(piece) for piece in (pieces or [data])]
    return tree.FileContent(len(data), 0o644, bytes(chunk_id(data)), splitter, sources)


def test_files():
    data = os.urandom(3000)
    folder = {
        "small": content(b"abc"),
        "empty": content(b""),
        "sub/dir": {
            "x": content(data, 1, [data[:1000], data[1000:1700], data[1700:]]),
            "link": tree.LinkContent("../small"),
        },
    }
    store = MemoryStore()
    written = tree.write(store, files=folder)
    assert tree.parts(store, written.tree) == (False, True)
    found = tree.files(store, written.tree)
    assert list(found) == ["small", "empty", "sub/dir/x", "sub/dir/link"]
    assert found["small"].content.inline == b"abc"
    assert found["sub/dir/link"].target == "../small"
    chunked = found["sub/dir/x"]
    assert (chunked.size, chunked.mode, chunked.digest, chunked.splitter) == (
        3000,
        0o644,
        bytes(chunk_id(data)),
        1,
    )
    buffer = bytearray(3000)
    store.read_into([(chunked.content.chunks, memoryview(buffer))])
    assert buffer == data
    with pytest.raises(NotFoundError, match="holds files and no state"):
        tree.read(store, written.tree)
    both = tree.write(store, {"s": 1}, folder)
    assert tree.read(store, both.tree) == {"s": 1}
    assert tree.files(store, both.tree) == found
    assert tree.write(store, None).tree != written.tree
    assert tree.read(store, tree.write(store, None).tree) is None


# -- damage ---------------------------------------------------------------------------------------


def rooted(state, references=()):
    """A store with a root whose state part is this canonical value."""
    store = MemoryStore()
    body = canonical.encode(Tagged(codes.ROOT, canonical.encode({"state": state})))
    payload = pack_object(list(references), body)
    id = object_id(Kind.TREE, payload)
    store.records[Kind.TREE, id] = payload
    return store, id


def tag(code, value):
    return Tagged(code, canonical.encode(value))


CHUNK = (Kind.CHUNK, chunk_id(b"x" * 1000))
TENSOR = ["numpy", "float32", [250], 0, None, [0]]


def tensor(**changes):
    fields = (
        dict(zip(("framework", "dtype", "shape", "flags", "layout", "data"), TENSOR, strict=True)) | changes
    )
    return tag(codes.TENSOR, list(fields.values()))


DAMAGED = {
    "too many chunks": tensor(data=[0, 0]),
    "no chunks": tensor(data=[]),
    "outside the table": tensor(data=[1]),
    "negative position": tensor(data=[-1]),
    "true position": tensor(data=[False]),
    "inline too short": tensor(shape=[3], data=b"x"),
    "inline too long": tensor(data=b"x" * 1000),
    "small in chunks": tensor(shape=[1]),
    "chunk as list": tensor(shape=[1 << 40], data={"list": 0}),
    "negative shape": tensor(shape=[-250]),
    "huge shape": tensor(shape=[1 << 62, 1 << 62]),
    "overflow behind zero": tensor(shape=[0, 1 << 60], data=b""),
    "many dimensions": tensor(shape=[1] * 65),
    "shape of floats": tensor(shape=[250.0]),
    "shape no list": tensor(shape=250),
    "flags": tensor(flags=2),
    "framework": tensor(framework="jax"),
    "order": tensor(layout=[1]),
    "order twice": tensor(shape=[250, 1], layout=[0, 0]),
    "alias far away": tensor(layout={"alias": [0, 1 << 60, None]}),
    "alias negative": tensor(layout={"alias": [0, 0, [-4]]}),
    "alias strides": tensor(layout={"alias": [0, 0, [4, 4]]}),
    "alias overflow": tensor(layout={"alias": [0, 0, [1 << 62]]}),
    "alias group": tensor(layout={"alias": [-1, 0, None]}),
    "alias of nothing": tensor(shape=[0], data=b"", layout={"alias": [0, 0, None]}),
    "fields": tag(codes.TENSOR, [1, 2]),
    "no fields": tag(codes.TENSOR, 1),
    "unknown code": tag(99, None),
    "payload": Tagged(codes.TUPLE, b"\xc1"),
    "chunk as tree": tag(codes.SUBTREE, 0),
    "subtree outside": tag(codes.SUBTREE, 7),
    "pages outside the top": tag(codes.MAP_PAGES, [0, []]),
    "tuple of a dict": tag(codes.TUPLE, {}),
    "set out of order": tag(codes.SET, [2, 1]),
    "set twice": tag(codes.SET, [1, 1]),
    "set of one thing twice": tag(codes.SET, [1, True]),
    "set of lists": tag(codes.SET, [tag(codes.SET, [])]),
    "key twice": {1: 0, tag(codes.NUMPY_SCALAR, ["int64", bytes([1] + [0] * 7)]): 1},
    "unhashable key": {tag(codes.SET, []): 0},
    "tensor key": {tensor(): 0},
    "factory": tag(codes.DEFAULT_DICT, ["eval", {}]),
    "deque": tag(codes.DEQUE, [1, [1, 2]]),
    "named tuple": tag(codes.NAMEDTUPLE, ["m:__import__('os')", ["x"], [1]]),
    "named tuple fields": tag(codes.NAMEDTUPLE, ["m:A", ["x", "x"], [1, 2]]),
    "named tuple keyword": tag(codes.NAMEDTUPLE, ["m:A", ["class"], [1]]),
    "named tuple length": tag(codes.NAMEDTUPLE, ["m:A", ["x"], [1, 2]]),
    "path": tag(codes.PATH, ["os.system", "x"]),
    "date": tag(codes.DATE, [2024, 13, 1]),
    "time zone": tag(codes.DATETIME, [2024, 1, 1, 0, 0, 0, 0, 0, 5]),
    "zone path": tag(codes.ZONEINFO, "../../etc/passwd"),
    "complex": tag(codes.COMPLEX, ["1", "2"]),
    "range": tag(codes.RANGE, [0, 1, 0]),
    "scalar": tag(codes.NUMPY_SCALAR, ["float32", b"abc"]),
    "attributes": tag(codes.NAMESPACE, {1: 2}),
    "file in a state": tag(codes.FILE, [3, 0, bytes(32), 0, b"abc"]),
    "generator": tag(codes.TORCH_GENERATOR, ["cpu", 5]),
    "sparse": tag(codes.SPARSE, ["sparse_coo", [2], 0, {"indices": 5, "values": 6}]),
    "quantised": tag(
        codes.QUANTIZED,
        ["qint8", "per_tensor_affine", 0, None, {"integers": 1, "scale": 1, "zero_point": 1}],
    ),
    "device": tag(codes.TORCH_DEVICE, "toaster"),
    "blob": tag(codes.BLOB, ["code", 1, b"x"]),
    "blob of bad text": tag(codes.BLOB, ["str", 1, b"\xff"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_impossible_trees(name):
    if name in ("sparse", "quantised", "device"):
        pytest.importorskip("torch")
    store, id = rooted(DAMAGED[name], [CHUNK])
    with pytest.raises(CorruptionError):
        tree.read(store, id)
    assert not store.chunks_read


def test_a_chunk_list_is_counted_before_memory_is_taken():
    lists = pack_object([CHUNK], b"")
    reference = (Kind.CHUNK_LIST, object_id(Kind.CHUNK_LIST, lists))
    store, id = rooted(tensor(shape=[1 << 50], data={"list": 0}), [reference])
    store.records[reference] = lists
    with pytest.raises(CorruptionError, match="chunk list"):
        tree.read(store, id)


def test_deep_and_endless_trees():
    for wrap in (
        lambda v: [v],
        lambda v: tag(codes.TUPLE, [v]),
        lambda v: {"k": v},
        lambda v: tag(codes.FROZENSET, [v]),
    ):
        value = None
        for _ in range(110):
            value = wrap(value)
        with pytest.raises(CorruptionError):
            tree.read(*rooted(value))


def doubling(times, twice):
    """Forty trees, each of which names the one below twice."""
    store = MemoryStore()
    payload = pack_object([], canonical.encode([1, 2]))
    for _ in range(times):
        id = object_id(Kind.TREE, payload)
        store.records[Kind.TREE, id] = payload
        payload = pack_object([(Kind.TREE, id)], canonical.encode(twice))
    other, root = rooted(tag(codes.SUBTREE, 0), [(Kind.TREE, id)])
    other.records |= store.records
    return other, root


@pytest.mark.parametrize(
    "twice",
    [
        [tag(codes.SUBTREE, 0)] * 2,
        {"a": tag(codes.SUBTREE, 0), "b": tag(codes.TUPLE, tag(codes.SUBTREE, 0))},
        tag(codes.LIST_PAGES, [0, [0, 0]]),
    ],
)
@pytest.mark.parametrize("only", [None, "**x"])
def test_a_small_tree_that_unfolds_without_end(twice, only):
    store, root = doubling(40, twice)
    started = time.monotonic()
    with pytest.raises(CorruptionError):
        tree.read(store, root, only=only)
    assert time.monotonic() - started < 8  # about one; two to the fortieth would be years
    assert len(store.objects_read) < 100_000


@pytest.mark.parametrize("item", [{}, [], None, tag(codes.TUPLE, [])])
def test_a_tree_of_nothing_but_empty_containers(item):
    """Thirty million of them took a kilobyte of a pack, and minutes."""
    for value in ([item] * 100_000, dict.fromkeys(range(30_000), item), tag(codes.SET, [item] * 30_000)):
        started = time.monotonic()
        with pytest.raises(CorruptionError, match="belongs into pages"):
            tree.read(*rooted(value))
        assert time.monotonic() - started < 8


def test_long_keys_are_never_cut():
    state = {
        frozenset(range(5000)): 1,
        "set": {tuple(range(3000)), (tuple(range(2500)), "x")},
        "slice": slice(tuple(range(4000)), None, None),
        tuple(range(6000)): {"k": 2},
    }
    store = MemoryStore()
    assert tree.read(store, tree.write(store, state).tree) == state


def test_what_is_named_many_times_is_read_as_often(monkeypatch):
    monkeypatch.setattr("ckptvcs.state.read._REPEATS", 1000)
    store, root = doubling(15, [tag(codes.SUBTREE, 0)] * 2)
    found = tree.read(store, root)
    for _ in range(14):
        found = found[1]
    assert found == [1, 2]
    same = {"k": ["x" * 500] * 5}
    store = MemoryStore()
    written = tree.write(store, [same] * 3_000)
    assert len(store.records) < 300
    assert tree.read(store, written.tree) == [same] * 3_000


def test_more_values_than_can_be_read_are_not_committed(monkeypatch):
    monkeypatch.setattr(codes, "MAX_VALUES", 100)
    store = MemoryStore()
    fits = {"a": list(range(98))}
    assert tree.read(store, tree.write(store, fits).tree) == fits
    count = len(store.records)
    for state in (
        {"a": list(range(99))},
        [{(1, 2): 3}] * 40,
        {"a": {"b": [None] * 1000}, "c": object()},
    ):
        with pytest.raises(UnsupportedStateError, match="more than 100 values"):
            tree.write(store, state)
    with pytest.raises(UnsupportedStateError, match="more than 100 values"):
        tree.write(store, files={str(at): tree.LinkContent("x") for at in range(101)})
    assert len(store.records) == count
    other, root = rooted([None] * 101)
    with pytest.raises(CorruptionError, match="more values"):
        tree.read(other, root)


@pytest.mark.parametrize("frames", [0, 500, 700, 800, 900, 950])
def test_a_deep_state_under_a_deep_stack(frames, request):
    """Committed, or refused with a sentence; never a bare RecursionError."""
    value = 1
    for at in range(97):
        value = ([value], (value,), {"k": value})[at % 3]

    def below(count, act):
        return below(count - 1, act) if count else act()

    # As many frames as a plain interpreter leaves, whatever the test runner took of them.
    used, frame = 0, sys._getframe()
    while frame is not None:
        used, frame = used + 1, frame.f_back
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000 + used)
    request.addfinalizer(lambda: sys.setrecursionlimit(limit))

    store = MemoryStore()
    root = tree.write(store, value).tree
    for act, result in (
        (lambda: tree.write(MemoryStore(), value).tree, root),
        (lambda: tree.read(store, root), value),
    ):
        try:
            found = below(frames, act)
        except UnsupportedStateError as error:
            found = error
        assert found == result or (frames and "nested too deeply" in str(found))


@pytest.mark.parametrize("kind", ["tensor", "text", "strided", "torch"])
def test_too_little_memory_is_no_bare_error(monkeypatch, kind):
    """A tensor of 1 TiB takes one chunk to store."""
    state = {"text": {"a": "x" * 5000}, "strided": {"a": np.zeros((100, 90)).T}}.get(
        kind, {"a": np.zeros(9000)}
    )
    if kind == "torch":
        state = {"a": pytest.importorskip("torch").zeros(9000)}
        monkeypatch.setattr("ckptvcs.state.torch_tensors.allocate", lambda nbytes: 1 / 0)

    def full(*_, **__):
        raise RuntimeError if kind == "torch" else MemoryError

    store = MemoryStore()
    written = tree.write(store, state)
    monkeypatch.setattr("ckptvcs.state.torch_tensors.allocate", full)
    monkeypatch.setattr("ckptvcs.state.materialise.np.empty", full)
    monkeypatch.setattr("ckptvcs.state.materialise.bytearray", full, raising=False)
    with pytest.raises(StorageError, match=r"a: not enough memory for \d+ bytes"):
        tree.read(store, written.tree)


def mutate(rng, value):
    """`value` with one thing in it changed; tagged payloads are opened."""
    kind = type(value)
    if kind is Tagged and rng.random() < 0.9:
        try:
            return Tagged(value.code, canonical.encode(mutate(rng, canonical.decode(value.payload))))
        except canonical.NotCanonicalError:
            return Tagged(rng.randrange(2, 70), value.payload)
    if kind is list and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return [*value[:at], mutate(rng, value[at]), *value[at + 1 :]]
    if kind is dict and value and rng.random() < 0.9:
        at = rng.choice(list(value))
        return {key: mutate(rng, item) if key is at else item for key, item in value.items()}
    return rng.choice(
        [
            None,
            True,
            -1,
            0,
            1,
            2,
            1 << 40,
            1 << 70,
            1.5,
            "",
            "U9",
            "float64",
            b"",
            b"abc",
            [],
            {},
            [0],
            Tagged(rng.randrange(2, 70), b"\xc0"),
        ]
    )


def test_mutated_trees_never_do_worse_than_an_error():
    state = {
        "a": np.arange(9, dtype=">f4"),
        "s": [np.zeros((4, 500))] * 2,
        "d": {(1, "x"): {1, 2}},
        "t": "x" * 3000,
        "n": np.float32(1),
    }
    state["v"] = state["s"][0].T
    source = MemoryStore()
    references, body = unpack_object(source.records[Kind.TREE, tree.write(source, state).tree], "")
    value = canonical.decode(canonical.decode(bytes(body)).payload)["state"]
    rng = random.Random(1)
    failed = 0
    for _ in range(1500):
        store, id = rooted(mutate(rng, value), references)
        store.records |= source.records
        try:
            tree.read(store, id)
        except CkptError:
            failed += 1
    assert failed > 500
