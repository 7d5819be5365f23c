"""Ids: kinds never collide, text forms are exact."""

from __future__ import annotations

import pickle

import pytest
from blake3 import blake3

from ckptvcs.ids import ID_BYTES, Hasher, Kind, ObjectId, chunk_id, digest, object_id

EMPTY = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


def test_chunks_are_plain_blake3() -> None:
    assert str(chunk_id(b"")) == EMPTY
    assert chunk_id(b"abc").hex() == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
    for buffer in (bytearray(b"abc"), memoryview(b"abc")):
        assert chunk_id(buffer) == chunk_id(b"abc")


def test_kinds_never_collide() -> None:
    ids = {object_id(kind, b"same payload") for kind in Kind}
    assert len(ids) == len(Kind) == 4
    assert object_id(Kind.CHUNK, b"x") == chunk_id(b"x")
    expected = blake3(b"x", derive_key_context="ckptvcs chunk list v1").digest()
    assert object_id(Kind.CHUNK_LIST, b"x") == expected


def test_the_numbers_of_kinds_are_part_of_the_format() -> None:
    assert {kind.label: int(kind) for kind in Kind} == {"chunk": 1, "chunk list": 2, "tree": 3, "commit": 4}


def test_text() -> None:
    id = chunk_id(b"")
    assert ObjectId.parse(str(id)) == id
    assert id.short == EMPTY[:8]
    assert EMPTY[:12] in repr(id)
    assert f"{id}" == EMPTY


@pytest.mark.parametrize("text", ["", EMPTY[:-1], EMPTY + "0", EMPTY.upper(), EMPTY + "\n", "g" + EMPTY[1:]])
def test_other_text_is_no_id(text: str) -> None:
    with pytest.raises(ValueError, match="not an id"):
        ObjectId.parse(text)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_length(length: int) -> None:
    with pytest.raises(ValueError, match=f"{ID_BYTES} bytes, not {length}"):
        ObjectId(bytes(length))


def test_an_id_is_a_value() -> None:
    id = chunk_id(b"x")
    assert pickle.loads(pickle.dumps(id)) == id
    assert type(pickle.loads(pickle.dumps(id))) is ObjectId
    assert {id: 1}[ObjectId(bytes(id))] == 1
    with pytest.raises(AttributeError):
        id.extra = 1  # type: ignore[attr-defined]


def test_digest_and_hasher_are_the_same_function() -> None:
    assert digest(b"x") == chunk_id(b"x")[:16]
    assert digest(b"x", 32) == chunk_id(b"x")
    hasher = Hasher()
    for part in (b"the ", b"whole ", b"file"):
        hasher.update(part)
    assert hasher.id() == chunk_id(b"the whole file")
