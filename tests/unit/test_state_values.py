import argparse
import collections
import dataclasses
import datetime
import enum
import math
import pathlib
import random
import struct
import subprocess
import sys
import types
import zoneinfo

import ml_dtypes
import numpy as np
import pytest

from ckptvcs.errors import UnsupportedStateError
from ckptvcs.state import DataclassValue, EnumValue, tree
from ckptvcs.testing.memory import MemoryStore
from ckptvcs.testing.same import difference


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    HIGH = 3


class Mode(enum.Flag):
    A = 1
    B = 2


@dataclasses.dataclass
class Config:
    lr: float
    layers: list
    inner: object = None


Point = collections.namedtuple("Point", "x y")


def nan(bits):
    return struct.unpack("<d", struct.pack("<Q", bits))[0]


def ordered(metadata=None, **items):
    made = collections.OrderedDict(items)
    if metadata is not None:
        made._metadata = metadata
    return made


def check(state):
    store = MemoryStore()
    written = tree.write(store, state)
    back = tree.read(store, written.tree)
    assert difference(state, back) is None
    assert tree.write(MemoryStore(), back).tree == written.tree
    assert list(tree.entries(store, written.tree))
    return back


UTC8 = datetime.timezone(datetime.timedelta(hours=8))
LEAVES = [
    None,
    True,
    0,
    -1,
    2**63,
    -(2**63) - 1,
    2**2000,
    1.0,
    -0.0,
    5e-324,
    math.inf,
    nan(0x7FF0000000000001),
    nan(0xFFF8DEADBEEF0001),
    "",
    "\udcff",
    "é" * 5000,
    b"",
    b"x" * 5000,
    bytearray(b"ab"),
    bytearray(9999),
    1 - 0j,
    complex(-0.0, nan(0x7FF8000000000123)),
    (),
    [],
    {},
    set(),
    frozenset(),
    {1, "a", None, (1, 2), frozenset({3})},
    set(range(5000)),
    frozenset("abc"),
    ((1, (2,)), [3]),
    Point(1, [2]),
    ordered(a=1),
    ordered({"": {"version": 1}}, b=2),
    collections.defaultdict(list, a=[1]),
    collections.defaultdict(None, a=1),
    collections.Counter({"a": 2, 3: 0.5}),
    collections.deque([1, 2], 5),
    collections.deque(),
    pathlib.Path("/a/b"),
    pathlib.PurePosixPath("x"),
    pathlib.PureWindowsPath("c:\\x"),
    datetime.datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
    datetime.datetime(1, 1, 1),
    datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
    datetime.date(2024, 2, 29),
    datetime.time(1, 2, 3, 4, UTC8, fold=1),
    datetime.timedelta(-3, 4, 5),
    UTC8,
    datetime.timezone(datetime.timedelta(0), "Z"),
    zoneinfo.ZoneInfo("UTC"),
    argparse.Namespace(a=1, b=[2]),
    types.SimpleNamespace(x=None),
    Colour.RED,
    Level.HIGH,
    Mode.A | Mode.B,
    Config(0.1, [1, 2], Config(1.0, [])),
    range(3, 9, 2),
    slice(1, None, -1),
    ...,
    np.float32(1.5),
    np.bool_(True),
    np.int8(-1),
    np.complex64(1j),
    np.str_("é"),
    np.str_(""),
    np.bytes_(b"\0"),
    np.bytes_(b""),
    np.datetime64("2024-01-01", "D"),
    np.timedelta64("NaT"),
    ml_dtypes.bfloat16(1.5),
    ml_dtypes.float8_e4m3fn(2),
    ml_dtypes.int4(3),
    np.float64(nan(0x7FF0000000000001)),
    np.void(b"abc"),
    np.dtype(">f4"),
    np.dtype(ml_dtypes.bfloat16),
    np.dtype("U7"),
]


@pytest.mark.parametrize("leaf", LEAVES, ids=[f"{n}-{type(leaf).__name__}" for n, leaf in enumerate(LEAVES)])
def test_every_leaf_kind(leaf):
    check({"leaf": leaf})


def test_keys_keep_their_type_and_order():
    state = {
        2: "int",
        "2": "str",
        None: 0,
        1.5: 1,
        b"k": 2,
        (1, ("a", True)): 3,
        Colour.RED: 4,
        1j: 5,
        False: 6,
        -1: 7,
    }
    back = check(state)
    assert [type(key) for key in back][:6] == [type(key) for key in state][:6]
    reordered = dict(reversed(state.items()))
    store = MemoryStore()
    assert tree.write(store, state).tree != tree.write(store, reordered).tree


def test_one_true_and_one_point_zero_are_different_content():
    assert (
        len({tree.write(MemoryStore(), [v]).tree for v in (1, True, 1.0, "1", b"1", np.int64(1), 1 + 0j)})
        == 7
    )


def test_stand_ins_compare_and_read():
    back = check({"c": Colour.RED, "d": Config(0.1, [1])})
    assert back["c"] == EnumValue(f"{__name__}:Colour", "RED", 1)
    assert str(back["c"]) == "Colour.RED"
    assert isinstance(back["d"], DataclassValue)
    assert back["d"]["lr"] == 0.1
    assert list(back["d"]) == ["lr", "layers", "inner"]


def test_named_tuples_come_back_as_one_class():
    back = check([Point(1, 2), Point(3, 4)])
    assert back[0] == Point(1, 2)
    assert back[0].x == 1
    assert type(back[0]) is type(back[1])


class WithState:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state


def test_objects_are_expanded():
    module = types.ModuleType("m")
    module.state_dict = lambda: {"k": 1}
    store = MemoryStore()
    nested = {"o": WithState({"a": WithState({"b": 1}), "m": module})}
    assert tree.write(store, nested).tree == tree.write(store, {"o": {"a": {"b": 1}, "m": {"k": 1}}}).tree
    assert tree.write(store, WithState({"a": 1})) == tree.write(store, {"a": 1})


def test_what_state_dict_raises_goes_through():
    class Broken:
        def state_dict(self):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tree.write(MemoryStore(), {"o": Broken()})


def test_all_unsupported_leaves_are_listed():
    class Text(str):
        __slots__ = ()

    loop = []
    loop.append(loop)
    deep = []
    for _ in range(120):
        deep = [deep]
    endless = WithState(None)
    endless.state = endless
    state = {
        "f": len,
        "l": [1, {"g": lambda: 0}],
        "class": WithState,
        "object": object(),
        "loop": loop,
        "deep": deep,
        "objects": np.array([None]),
        "fields": np.zeros(2, "i4,f4"),
        "masked": np.ma.array([1]),
        "text": Text("x"),
        "counter": collections.UserDict(),
        "set": {1, len},
        "rng": random.SystemRandom(),
        "default": collections.defaultdict(lambda: 0),
        "endless": endless,
        "long": np.longdouble(1),
        "strings": np.array(["a"], dtype=np.dtypes.StringDType())
        if hasattr(np.dtypes, "StringDType")
        else len,
        ("key", len): 1,
    }
    store = MemoryStore()
    with pytest.raises(UnsupportedStateError) as caught:
        tree.write(store, state)
    leaves = dict(caught.value.leaves)
    assert len(leaves) >= len(state)
    assert "lambda" in leaves["l/1/g"]
    assert leaves["object"] == "class object has no state_dict()"
    assert "str()" in leaves["text"]
    assert "contains itself" in leaves["loop/0"]
    assert not store.records


def test_the_same_container_twice_is_no_cycle():
    shared = [1, 2]
    assert tree.read(*_written({"a": shared, "b": shared})) == {"a": [1, 2], "b": [1, 2]}


def _written(state):
    store = MemoryStore()
    return store, tree.write(store, state).tree


SCRIPT = """
import sys; sys.path.insert(0, ".")
import numpy as np, pathlib, collections
from ckptvcs.state import tree
from ckptvcs.testing.memory import MemoryStore
state = {"s": {str(i) for i in range(99)}, "f": frozenset({(1, "a"), None}),
         "n": {i: {"w": np.arange(i)} for i in range(300)},
         "d": collections.OrderedDict(a=pathlib.PurePosixPath("x")), "v": [np.arange(9)] * 2, "t": "x" * 9999}
print(tree.write(MemoryStore(), state).tree)
"""


def test_the_same_tree_in_another_process():
    def run(seed):
        return subprocess.run(
            [sys.executable, "-c", SCRIPT], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout

    assert run("1") == run("2")
