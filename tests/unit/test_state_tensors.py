import dataclasses

import ml_dtypes
import numpy as np
import pytest

from ckptvcs.errors import InvalidError
from ckptvcs.state import tensors, tree
from ckptvcs.store.format import GRIDS
from ckptvcs.testing.memory import MemoryStore
from ckptvcs.testing.same import difference

NUMPY = (
    "? i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16 >i2 >u8 >f4 >f8 >c8 >c16 "
    "S1 S5 U1 U3 >U3 V3 M8[ns] >M8[us] m8[7D] M8"
)
DTYPES = [
    *NUMPY.split(),
    *(getattr(ml_dtypes, name) for name in tensors._EXTRA if hasattr(ml_dtypes, name)),
]
RNG = np.random.default_rng(0)


def check(state, grid=GRIDS[1]):
    store = MemoryStore(grid)
    written = tree.write(store, state)
    back = tree.read(store, written.tree)
    assert difference(state, back) is None
    assert tree.write(MemoryStore(grid), back).tree == written.tree
    return back


def sample(dtype, shape):
    dtype = np.dtype(dtype)
    count = int(np.prod(shape, dtype=int))
    if dtype.kind == "U":
        return np.resize(np.array(["a\u20ac", "", "xyz"], dtype), shape)
    return np.frombuffer(RNG.bytes(count * dtype.itemsize), dtype, count).reshape(shape).copy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype):
    a = sample(dtype, (6, 35))
    check(
        {
            "a": a,
            "t": a.T.copy(order="F"),
            "s": a[::2, ::-3].copy()[:, 1:],
            "0": a[0, 0].reshape(()),
            "e": a[:0],
            "1": a[:1, :1],
        }
    )


def test_the_original_byte_order_comes_back_and_bytes_are_shared():
    a = np.arange(100000, dtype="<f4")
    store = MemoryStore()
    tree.write(store, a)
    before = store.added
    back = tree.read(store, tree.write(store, a.astype(">f4")).tree)
    assert back.dtype.str == ">f4"
    assert store.added - before < 1000


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 3, 1), (1, 0, 3, 2)])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 1), (300, 2, 3, 40)])
def test_dense_layouts_come_back(order, shape):
    a = np.empty(shape)[...]
    a = np.arange(a.size, dtype="f4").reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
    back = check({"a": a}, dataclasses.replace(GRIDS[1], chunk=1000))["a"]
    long = [axis for axis in range(4) if shape[axis] > 1]
    assert [back.strides[axis] for axis in long] == [a.strides[axis] for axis in long]


def test_strides_that_leave_gaps_come_back_contiguous():
    a = np.arange(2000.0).reshape(40, 50)
    for view in (a[::2], a[:, ::3], a[::-1], np.broadcast_to(a[0], (9, 50)), a[1:, 1:]):
        assert check(view).flags.c_contiguous


def test_memmap_and_read_only_arrays(tmp_path):
    mapped = np.memmap(tmp_path / "m", "f4", "w+", shape=(500,))
    mapped[:] = 3
    frozen = np.arange(300)
    frozen.flags.writeable = False
    back = check({"m": mapped, "f": frozen})
    assert type(back["m"]) is np.ndarray


def test_any_piece_of_a_source_can_be_read_again():
    for a in (RNG.random((7, 5, 3)),
              RNG.random((3, 5, 7)).T, RNG.random((14, 5, 3))[::-2], np.arange(105)[::-1],
              RNG.random((7, 5, 3)).astype(">f8"), RNG.random((7, 5, 3)).astype(">c16").T):  # fmt: skip
        spec, raw = tensors.capture(a)
        source = tensors.ArraySource(raw, tensors.unit(spec.dtype, spec.item), spec.swap)
        whole = np.ascontiguousarray(a).astype(a.dtype.newbyteorder("<")).tobytes()
        assert source.nbytes == len(whole)
        for _ in range(60):
            at = int(RNG.integers(0, len(whole)))
            length = int(RNG.integers(1, len(whole) - at + 1))
            assert bytes(source.read(at, length)) == whole[at : at + length]


def test_contiguous_memory_is_not_copied():
    a = np.arange(1000.0)
    _, raw = tensors.capture(a)
    view = tensors.ArraySource(raw, 8).read(80, 800)
    a[10] = -1
    assert np.frombuffer(view, "f8")[0] == -1


def test_chunk_counts_on_the_boundaries():
    grid = dataclasses.replace(GRIDS[1], chunk=64, inline=16, chunk_list=2)
    for n in (0, 1, 16, 17, 63, 64, 65, 128, 129, 192, 200):
        check({"a": RNG.integers(0, 255, n, dtype="u1"), "b": bytes(n), "z": np.zeros(n, "u1")}, grid)


# -- shared memory --------------------------------------------------------------------------------


def test_sharing_comes_back():
    a = np.zeros((40, 50))
    back = check(
        {
            "a": a,
            "same": a,
            "row": a[3],
            "column": a[:, 4],
            "reversed": a[::-1, ::-2],
            "t": a.T,
            "wide": np.broadcast_to(a[0], (3, 50)),
        }
    )
    back["a"][3, 4] = 7
    assert back["same"][3, 4] == back["row"][4] == back["column"][3] == back["t"][4, 3] == 7
    assert back["wide"].strides == (0, 8)
    back["reversed"][...] = 1
    assert back["a"][0, 49] == 1


def test_views_that_touch_but_do_not_overlap_do_not_share():
    a = np.zeros(2000)
    back = check([a[:1000], a[1000:]])
    assert not np.shares_memory(*back)


def test_interleaved_views_share_one_buffer():
    a = np.arange(200.0).reshape(2, 100)
    back = check([a[:, :50], a[:, 50:]])
    back[0].base[...] = 0
    assert back[0].base is back[1].base


def test_views_of_other_dtypes_share():
    a = np.arange(100, dtype="f4")
    back = check({"f": a, "raw": a.view("u1")[3:], "big": a.view(">i4")})
    back["f"][:] = 0
    assert not back["raw"].any()
    assert not back["big"].any()


def test_part_of_a_group():
    a = np.arange(100.0)
    store = MemoryStore()
    written = tree.write(store, {"all": a, "tail": a[90:], "tails": [a[95:], a[95:]]})
    part = tree.read(store, written.tree, only=["tail", "tails"])
    assert difference(part, {"tail": a[90:], "tails": [a[95:], a[95:]]}) is None
    part["tail"][5:] = 0
    assert not part["tails"][1].any()
    assert tree.read(store, written.tree, only="tail")["tail"].nbytes == 80


def test_a_few_elements_of_a_huge_array_do_not_bring_back_its_size():
    a = np.zeros(20_000_000, "u1")
    back = check({"a": a[::1_000_000], "b": a[::1_000_000], "c": a[5::3_000_000]})
    assert back["a"].base.nbytes == 20
    assert np.shares_memory(back["a"], back["b"])
    assert not np.shares_memory(back["a"], back["c"])


def test_freed_memory_does_not_look_shared():
    class Fresh:
        def __init__(self, at):
            self.at = at

        def state_dict(self):
            return {"a": np.full(100, self.at)}

    store = MemoryStore()
    written = tree.write(store, [Fresh(at) for at in range(20)])
    back = tree.read(store, written.tree)
    assert not any(np.shares_memory(back[0]["a"], each["a"]) for each in back[1:])


def test_frameworks_must_be_known():
    store = MemoryStore()
    written = tree.write(store, {"s": np.array(["x"])})
    with pytest.raises(InvalidError, match="unknown framework"):
        tree.read(store, written.tree, framework="jax")
