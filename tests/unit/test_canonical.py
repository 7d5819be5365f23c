"""The canonical encoding: one byte string per value, and nothing else decodes."""

from __future__ import annotations

import math
import random
import struct
from collections import OrderedDict
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.canonical import (
    BIGINT,
    MAX_DEPTH,
    NotCanonicalError,
    Tagged,
    decode,
    encode,
    encoded_array,
    encoded_map,
    encoded_tag,
)


def bits(value: float) -> bytes:
    return struct.pack(">d", value)


def same(left: Any, right: Any) -> bool:
    """Equality that tells 1 from True from 1.0, NaNs by payload, and dicts by order."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return bits(left) == bits(right)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return same(list(left), list(right)) and same(list(left.values()), list(right.values()))
    return bool(left == right)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.floats(width=64)
    | st.binary(max_size=40)
    | st.text(st.characters(codec=None, exclude_categories=()), max_size=20)
    | st.builds(Tagged, st.integers(2, 127), st.binary(max_size=20))
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(scalars, inner, max_size=5),
    max_leaves=20,
)


@given(values)
def test_round_trip(value: Any) -> None:
    data = encode(value)
    assert same(decode(data), value)
    assert encode(decode(data)) == data


@given(st.binary(max_size=30))
def test_any_bytes_decode_canonically_or_not_at_all(data: bytes) -> None:
    try:
        value = decode(data)
    except NotCanonicalError:
        return
    assert encode(value) == data


@given(values, st.randoms(use_true_random=False))
def test_damage_never_decodes_to_another_encoding(value: Any, chance: random.Random) -> None:
    data = bytearray(encode(value))
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    try:
        found = decode(bytes(data))
    except NotCanonicalError:
        return
    assert encode(found) == data


@pytest.mark.parametrize(
    "data",
    [
        "",
        "cc05",  # 5 in two bytes
        "cd0005",
        "d005",  # a positive number in a signed form
        "ce00000005",
        "cf0000000000000005",
        "d1ffff",
        "ca3f800000",  # single precision
        "d90161",  # a short text in a long form
        "da000161",
        "dc000101",
        "de00010102",
        "c500016f",
        "c8000107" + "00",  # an extension in a long form
        "c70101" + "05",  # 5 as a big integer
        "c70901" + "00ffffffffffffffff",  # 2**64 - 1 as a big integer
        "c70a01" + "00010000000000000000",  # 2**64 with a leading zero
        "c70901" + "ff8000000000000000",  # -2**63 as a big integer
        "c1",
        "c0c0",  # two values
        "93c0c0",  # cut short
        "a2c328",  # not UTF-8
        "d6ff00000000",  # the library's own timestamps
        "d7ff0000000000000000",
        "c70cff000000000000000000000000",
        "91d6ff00000000",
        "81d6ff00000000c0",
        "81c0d6ff00000000",
        "82a161c0a161c0",  # a key twice
        "8190c0",  # a list as a key
    ],
)
def test_refused(data: str) -> None:
    with pytest.raises(NotCanonicalError):
        decode(bytes.fromhex(data))


def test_the_shortest_big_integers() -> None:
    assert encode(2**64 - 1)[0] == 0xCF
    assert encode(-(2**63))[0] == 0xD3
    for value in (2**64, -(2**63) - 1, 2**127 - 1, 2**127, -(2**127), -(2**127) - 1, 10**100):
        data = encode(value)
        assert decode(data) == value
        found = msgpack.unpackb(data, ext_hook=lambda code, payload: (code, payload))
        assert found[0] == BIGINT
        assert int.from_bytes(found[1], "big", signed=True) == value
        assert int.from_bytes(found[1][1:], "big", signed=True) != value, "one byte less would do"


def test_nan_payloads_and_signed_zero() -> None:
    for text in ("7ff8000000000000", "fff8000000000000", "7ff8000000000001", "7ff0000000000001"):
        (value,) = struct.unpack(">d", bytes.fromhex(text))
        assert math.isnan(value)
        assert encode(value).hex() == "cb" + text
        assert bits(decode(encode(value))).hex() == text
    assert encode(0.0) != encode(-0.0)
    assert bits(decode(encode(-0.0))) == bits(-0.0)


def test_lone_surrogates() -> None:
    for text in ("\ud800", "\udfff", "a\udcffb", "\udc80" * 40):
        assert decode(encode(text)) == text
    # Two surrogates are not the character that they would make in UTF-16.
    assert encode("\ud800\udc00") != encode("\U00010000")
    assert decode(encode("\ud800\udc00")) == "\ud800\udc00"


def test_equal_keys_of_different_types_are_different_content() -> None:
    encodings = {encode({key: None}) for key in (1, True, 1.0, "1", b"1", Tagged(5, b"1"))}
    assert len(encodings) == 6
    for key in (1, True, 1.0):
        (found,) = decode(encode({key: None}))
        assert type(found) is type(key)


def test_keys_that_python_holds_equal_do_not_merge() -> None:
    """Two keys that no Python dict can hold at once are refused, not silently made one."""
    with pytest.raises(NotCanonicalError):
        decode(encoded_map([(encode(1), encode("a")), (encode(True), encode("b"))]))


def test_order_is_content() -> None:
    assert encode({"a": 1, "b": 2}) != encode({"b": 2, "a": 1})
    assert list(decode(encode({"b": 2, "a": 1}))) == ["b", "a"]


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [
        (1,),
        {1},
        OrderedDict(a=1),
        Text("a"),
        1j,
        object(),
        range(2),
        [{()}],
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_exact_types(value: object) -> None:
    with pytest.raises(TypeError):
        encode(value)


def test_buffers_are_encoded_as_bytes() -> None:
    assert encode(bytearray(b"a")) == encode(memoryview(b"a")) == encode(b"a")


def test_parts_put_together() -> None:
    items = [encode(item) for item in ("a", [1], {"k": None})]
    assert encoded_array(items) == encode(["a", [1], {"k": None}])
    assert encoded_array([encode(None)] * 70_000) == encode([None] * 70_000)
    assert encoded_map([(encode("k"), encode(1)), (encode(2), encode([]))]) == encode({"k": 1, 2: []})
    assert encoded_tag(9, b"payload") == encode(Tagged(9, b"payload"))
    assert encoded_array([]) == b"\x90"
    assert encoded_map([]) == b"\x80"


def test_deep_nesting_is_an_error_and_not_a_crash() -> None:
    deep: list[Any] = []
    for _ in range(MAX_DEPTH):
        deep = [deep]
    assert decode(encode(deep)) == deep
    for count in (MAX_DEPTH + 2, 600, 1024, 5000, 100_000):
        with pytest.raises(NotCanonicalError):
            decode(b"\x91" * count + b"\xc0")


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: {"k": v}, lambda v: [0, v, 0]])
def test_writer_and_reader_draw_the_line_at_the_same_depth(wrap: Any) -> None:
    value: Any = None
    for _ in range(MAX_DEPTH + 1):
        value = wrap(value)
        assert decode(encode(value)) == value
    value = wrap(value)
    with pytest.raises(ValueError, match="deeper than 200"):
        encode(value)
    with pytest.raises(NotCanonicalError, match="deeper than 200"):
        decode(msgpack.packb(value))
