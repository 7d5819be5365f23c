"""Hypothesis strategies: any state that can be committed. The only module that imports hypothesis."""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
import random
import types
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from ckptvcs.state.values import DataclassValue, EnumValue

_NATIVE = "? i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16 S3 U2 V5 M8[ns] m8[25s]"
_TURNED = ">i4 >f4 >c16 >U2 >M8[D]"

DTYPES = [
    *map(np.dtype, f"{_NATIVE} {_TURNED}".split()),
    *map(np.dtype, (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4)),
]
"""One of every kind of numpy dtype."""

text = st.text(st.characters(exclude_categories=()), max_size=20)
"""Text with lone surrogates."""

scalars: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 200), 1 << 200),
    st.floats(),
    text,
    st.binary(max_size=20),
    st.complex_numbers(),
)

keys: st.SearchStrategy[Any] = st.one_of(
    text, st.integers(), st.booleans(), st.none(), st.binary(max_size=4), st.tuples(st.integers(), text)
)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Arrays of any dtype with any bits, in C order, transposed, strided or reversed."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    if dtype.kind == "U":  # only code points are text
        found = np.array(draw(st.lists(st.text("ab\u20ac", max_size=2), min_size=1)), dtype)
        array = np.resize(found, shape)
    else:
        array = np.frombuffer(draw(st.binary(min_size=count, max_size=count)), dtype).reshape(shape)
    how = draw(st.sampled_from(["plain", "transposed", "reversed", "every second"]))
    if how == "transposed":
        return array.T
    if how == "reversed" and array.ndim:
        return array[::-1]
    if how == "every second" and array.ndim:
        return np.repeat(array, 2, axis=-1)[..., ::2]
    return array.copy()


_BIT_GENERATORS = (np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)


@st.composite
def generators(draw: st.DrawFn) -> Any:
    """Random generators of every kind, some of which have been used."""
    seed = draw(st.integers(0, 1 << 130))
    if draw(st.booleans()):
        found: Any = random.Random(seed)
        for _ in range(draw(st.integers(0, 2))):
            found.gauss(0, 1)
        return found
    bits = draw(st.sampled_from(_BIT_GENERATORS))(seed)
    kind = draw(st.sampled_from([np.random.Generator, np.random.RandomState, None]))
    if kind is None:
        return bits
    found = kind(bits)
    found.random(draw(st.integers(0, 700)))
    found.standard_normal(draw(st.integers(0, 2)))
    return found


leaves: st.SearchStrategy[Any] = st.one_of(
    scalars,
    generators(),
    arrays(),
    arrays().filter(lambda a: a.size > 0).map(lambda a: a.reshape(-1)[0]),
    st.datetimes(timezones=st.one_of(st.none(), st.timezones(), st.just(datetime.UTC))),
    st.dates(),
    st.times(),
    st.timedeltas(),
    st.builds(pathlib.PurePosixPath, st.text("ab/.", max_size=8)),
    st.builds(EnumValue, st.just("m:Colour"), st.text(max_size=4), scalars),
    st.binary(max_size=30).map(bytearray),
    st.integers(0, 3000).map(lambda n: "é" * n),
    st.sets(st.one_of(st.integers(), text)),
    st.frozensets(st.one_of(st.integers(), text)),
    st.builds(range, st.integers(-5, 5), st.integers(-5, 5), st.integers(1, 3)),
)


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=5)
    return st.one_of(
        st.lists(inner, max_size=8),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(keys, inner, max_size=8),
        st.dictionaries(keys, inner, max_size=5).map(collections.OrderedDict),
        st.dictionaries(keys, inner, max_size=5).map(lambda d: collections.defaultdict(list, d)),
        st.dictionaries(keys, inner, max_size=5).map(collections.Counter),
        st.lists(inner, max_size=5).map(lambda items: collections.deque(items, 9)),
        names.map(lambda d: argparse.Namespace(**d)),
        names.map(lambda d: types.SimpleNamespace(**d)),
        names.map(lambda d: DataclassValue("m:Config", d)),
    )


states: st.SearchStrategy[Any] = st.recursive(leaves, _containers, max_leaves=30)
"""Any nested state without torch."""
