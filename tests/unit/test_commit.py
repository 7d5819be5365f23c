"""Commit objects: their encoding, what callers may pass, and how a report reads."""

from __future__ import annotations

import argparse
import enum
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs import CorruptionError, InvalidError, ObjectId, UnsupportedStateError, canonical
from ckptvcs.canonical import Tagged
from ckptvcs.history.commit import (
    Commit,
    CommitReport,
    checked_epoch,
    checked_step,
    decode_commit,
    encode_commit,
    in_bytes,
    plain_config,
    plain_metrics,
)
from ckptvcs.ids import Kind, chunk_id, object_id
from ckptvcs.store.format import pack_object, unpack_object

TREE = ObjectId(b"t" * 32)
ids = st.binary(min_size=32, max_size=32).map(ObjectId)
text = st.text(st.characters(exclude_categories=()), max_size=20)
numbers = st.one_of(st.integers(), st.floats())
plain: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, text, st.binary(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=8,
)
mappings = st.dictionaries(text, plain, max_size=3)


def fields(**changes: Any) -> dict[str, Any]:
    """All fields of a commit."""
    return {
        "tree": TREE,
        "parents": (),
        "origin": None,
        "author": "a",
        "time": 5,
        "message": "",
        "step": None,
        "epoch": None,
        "metrics": {},
        "config": {},
        "overrides": {},
        "environment": {},
        "sizes": {},
        **changes,
    }


def nested(depth: int) -> dict[str, Any]:
    """A config with a container within so many others."""
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"k": value}
    return value


def decoded(**changes: Any) -> Commit:
    """A commit written and read back."""
    payload = encode_commit(**fields(**changes))
    return decode_commit(object_id(Kind.COMMIT, payload), payload)


@given(
    st.builds(
        fields,
        tree=ids,
        parents=st.lists(ids, max_size=3, unique=True).map(tuple),
        author=text,
        time=st.integers(0, 1 << 70),
        message=text,
        step=st.one_of(st.none(), st.integers()),
        epoch=st.one_of(st.none(), st.integers(), st.floats(allow_nan=False)),
        metrics=st.dictionaries(text, numbers, max_size=3),
        config=mappings,
        overrides=mappings,
        environment=mappings,
        sizes=st.dictionaries(text, st.integers(0), max_size=3),
    ),
    st.integers(-1, 3),
)
def test_round_trip(given_fields: dict[str, Any], origin: int) -> None:
    parents = given_fields["parents"]
    given_fields["origin"] = (
        None if origin < 0 else (*parents, ObjectId(b"o" * 32))[min(origin, len(parents))]
    )
    payload = encode_commit(**given_fields)
    id = object_id(Kind.COMMIT, payload)
    found = decode_commit(id, payload)
    assert found.id == id
    for name, value in given_fields.items():
        assert repr(getattr(found, name)) == repr(value), name  # NaN equals itself this way
    assert encode_commit(**{name: getattr(found, name) for name in given_fields}) == payload
    assert found.fresh_start == (bool(parents) and origin < 0)


def test_a_commit_refers_to_its_tree_its_parents_and_its_origin_once() -> None:
    one, two = ObjectId(b"1" * 32), ObjectId(b"2" * 32)
    references, _ = unpack_object(encode_commit(**fields(parents=(one, two), origin=one)), "x")
    assert references == [(Kind.TREE, TREE), (Kind.COMMIT, one), (Kind.COMMIT, two)]
    references, _ = unpack_object(encode_commit(**fields(parents=(), origin=two)), "x")
    assert references == [(Kind.TREE, TREE), (Kind.COMMIT, two)]


@given(st.data())
def test_a_damaged_payload_is_never_something_else_than_an_error(data: st.DataObject) -> None:
    """The id already guards stored bytes; the decoder still trusts nothing."""
    payload = bytearray(
        encode_commit(**fields(parents=(ObjectId(b"p" * 32),), metrics={"loss": 1.0}, step=3))
    )
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.one_of(st.just(len(payload)), st.integers(0, len(payload))))
    try:
        found = decode_commit(TREE, bytes(payload[:cut]))
    except CorruptionError:
        return
    assert isinstance(found, Commit)


@pytest.mark.parametrize(
    "change",
    [
        {"tree": 1},
        {"tree": 5},
        {"parents": [0]},
        {"parents": [-1]},
        {"parents": 1},
        {"parents": [9]},
        {"origin": 0},
        {"origin": "x"},
        {"author": 3},
        {"time": "now"},
        {"time": 1.5},
        {"time": True},
        {"message": None},
        {"step": 1.5},
        {"step": True},
        {"epoch": "x"},
        {"metrics": []},
        {"config": None},
        {"sizes": 1},
        {"environment": "x"},
        {"tree": True},
        {"tree": -2},
        {"tree": 0.0},
        {"parents": [1.0]},
        {"parents": [True]},
        {"parents": ""},
        {"parents": {}},
        {"origin": -1},
        {"metrics": {1: 2}},
        {"metrics": {b"a": 2}},
        {"metrics": {"a": "x"}},
        {"metrics": {"a": True}},
        {"metrics": {"a": None}},
        {"metrics": {"a": Tagged(9, b"")}},
        {"metrics": {"a": [1]}},
        {"sizes": {"a": -1}},
        {"sizes": {"a": 1.5}},
        {"sizes": {"a": True}},
        {"sizes": {1: 1}},
        {"config": {"a": Tagged(9, b"")}},
        {"config": {"a": [1, {"b": [Tagged(9, b"")]}]}},
        {"config": {Tagged(9, b""): 1}},
        {"config": {"a": {None: 1}}},
        {"config": {"a": {1.5: 1}}},
        {"config": {"a": [[{b"k": 1}]]}},
        {"config": nested(101)},
        {"overrides": {"a": [Tagged(9, b"")]}},
        {"environment": {"argv": [Tagged(9, b"")]}},
        {"author": Tagged(9, b"")},
        {"message": b"bytes"},
    ],
)
def test_impossible_fields(change: dict[str, Any]) -> None:
    references, body = unpack_object(encode_commit(**fields(parents=(ObjectId(b"p" * 32),))), "x")
    whole = canonical.decode(body)
    with pytest.raises(CorruptionError, match="cannot be read"):
        decode_commit(TREE, pack_object(references, canonical.encode({**whole, **change})))
    del whole[next(iter(change))]
    with pytest.raises(CorruptionError, match="cannot be read"):
        decode_commit(TREE, pack_object(references, canonical.encode(whole)))


@pytest.mark.parametrize("body", [[], "x", None, {}, 5])
def test_a_body_that_is_no_commit(body: Any) -> None:
    with pytest.raises(CorruptionError, match="cannot be read"):
        decode_commit(TREE, pack_object([(Kind.TREE, TREE)], canonical.encode(body)))


def test_titles() -> None:
    assert decoded(message="one\ntwo").title == "one"
    assert decoded(message="").title == ""


class Colour(enum.Enum):
    """An enum has no plain form."""

    RED = 1


class Text(str):
    """A subclass of str becomes plain text."""

    __slots__ = ()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, {}),
        ({}, {}),
        ({"a": (1, [2, {"b": None}])}, {"a": [1, [2, {"b": None}]]}),
        (argparse.Namespace(x=1, y=argparse.Namespace(z=2)), {"x": 1, "y": {"z": 2}}),
        (types.SimpleNamespace(x=True), {"x": True}),
        ({"p": Path("a/b")}, {"p": "a/b"}),
        ({"n": np.float16(0.5), "m": np.array(3), "b": np.bool_(True)}, {"n": 0.5, "m": 3, "b": True}),
        ({"t": Text("x")}, {"t": "x"}),
        ({1: 2, 1.5: 4}, {1: 2, "1.5": 4}),
        (types.MappingProxyType({"a": 1}), {"a": 1}),
    ],
)
def test_configs(config: Any, expected: dict[str, Any]) -> None:
    found = plain_config(config)
    assert found == expected
    assert canonical.decode(canonical.encode(found)) == expected  # only plain types are left


def test_all_bad_places_of_a_config_are_listed() -> None:
    with pytest.raises(UnsupportedStateError) as caught:
        plain_config({"a": Colour.RED, "b": [1, {"c": object()}], "d": {1, 2}, "ok": 1})
    assert [path for path, _ in caught.value.leaves] == ["config/a", "config/b/1/c", "config/d"]


def test_configs_that_have_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptvcs.history.commit.MAX_VALUES", 20_000)
    cyclic: dict[str, Any] = {"a": [1], "b": {}}
    cyclic["b"]["c"] = cyclic
    listed: list[Any] = []
    listed += [listed, listed]
    space = argparse.Namespace(x=1)
    space.itself = [space]
    for config, path in ((cyclic, "config/b/c"), ({"l": listed}, "config/l/0"), (space, "config/itself/0")):
        with pytest.raises(UnsupportedStateError, match="contains itself") as caught:
            plain_config(config)
        assert caught.value.leaves[0][0] == path
    twice: list[Any] = []
    for _ in range(60):
        twice = [twice, twice]
    with pytest.raises(UnsupportedStateError, match=r"more than \d+ values"):
        plain_config({"l": twice})


def test_writer_and_reader_draw_the_line_at_the_same_depth_of_a_config() -> None:
    config = plain_config(nested(100))
    assert decoded(config=config).config == config
    for depth in (101, 500, 100_000):
        with pytest.raises(UnsupportedStateError, match="nested deeper than 100"):
            plain_config(nested(depth))


def test_a_deep_config_under_a_deep_stack() -> None:
    def below(count: int) -> Any:
        return below(count - 1) if count else plain_config(nested(100))

    assert below(300) == nested(100)
    with pytest.raises(UnsupportedStateError, match="too deeply"):
        below(900)


@pytest.mark.parametrize("config", [3, "text", [1], np.zeros(3)])
def test_a_config_is_a_mapping(config: Any) -> None:
    with pytest.raises(InvalidError):
        plain_config(config)


def test_metrics() -> None:
    assert plain_metrics(None) == {}
    assert plain_metrics({"a": np.int8(3), "b": 1 << 80}) == {"a": 3, "b": 1 << 80}
    with pytest.raises(InvalidError, match="the metric a is a str"):
        plain_metrics({"a": "x"})
    with pytest.raises(InvalidError, match="mapping"):
        plain_metrics([1])  # type: ignore[arg-type]


def test_steps_and_epochs() -> None:
    assert checked_step(None) is None
    assert checked_step(np.uint8(7)) == 7
    assert checked_epoch(0.5) == 0.5
    assert checked_epoch(np.array(2)) == 2
    for check, bad in (
        (checked_step, 1.0),
        (checked_step, True),
        (checked_epoch, float("inf")),
        (checked_epoch, "1"),
    ):
        with pytest.raises(InvalidError):
            check(bad)


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1234, "1.2 kB"),
        (99_400, "99.4 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (5 * 10**9, "5.0 GB"),
        (2 * 10**12, "2.0 TB"),
        (-1500, "-1.5 kB"),
    ],
)
def test_byte_counts_for_people(count: int, shown: str) -> None:
    assert in_bytes(count) == shown


def test_a_report_in_a_line() -> None:
    report = CommitReport(2000, 500, 1500, 300, 0.125)
    assert str(report) == "2.0 kB given, 500 B new, 1.5 kB reused, 300 B stored in 0.12 s"


LARGE = 1 << 4096


@pytest.mark.parametrize(
    "change",
    [
        {"step": LARGE},
        {"epoch": -LARGE},
        {"time": LARGE},
        {"metrics": {"loss": LARGE}},
        {"sizes": {"model": LARGE}},
        {"config": {"seeds": [{"x": LARGE}]}},
        {"environment": {"x": LARGE}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_numbers_that_python_does_not_write_as_text(change: dict[str, Any]) -> None:
    payload = encode_commit(**{**fields(), **change})
    with pytest.raises(CorruptionError, match="4097 bits"):
        decode_commit(object_id(Kind.COMMIT, payload), payload)


def test_numbers_that_python_does_not_write_as_text_are_refused_first() -> None:
    for refuse in (
        lambda: checked_step(LARGE),
        lambda: checked_epoch(LARGE),
        lambda: plain_metrics({"loss": LARGE}),
        lambda: plain_config({"seed": [LARGE]}),
    ):
        with pytest.raises(InvalidError, match="bits"):
            refuse()
    assert checked_step(LARGE - 1) == LARGE - 1


@pytest.mark.parametrize(
    "parents", [[1, 1], [1] * 1_000_000, list(range(1, 258))], ids=["two", "many", "257"]
)
def test_parents_beyond_all_merges(parents: list[int]) -> None:
    """A graph has a column for each: the time to draw it grew with the square of their number."""
    payload = encode_commit(**fields())
    references, body = unpack_object(payload, "commit")
    references += [(Kind.COMMIT, chunk_id(b"%d" % i)) for i in range(300)]
    changed = pack_object(references, canonical.encode({**canonical.decode(body), "parents": parents}))
    with pytest.raises(CorruptionError, match="parents"):
        decode_commit(object_id(Kind.COMMIT, changed), changed)
    ids = [chunk_id(b"%d" % each) for each in parents]
    with pytest.raises(InvalidError, match="parents"):
        encode_commit(**{**fields(), "parents": ids})
