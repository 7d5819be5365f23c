"""Bytes frozen when the format was: today's code writes them, and reads them to the same values."""

from __future__ import annotations

import contextlib
import math
import struct
from pathlib import Path
from typing import Any

import pytest

from ckptvcs.canonical import Tagged, decode, encode
from ckptvcs.disk import Disk
from ckptvcs.ids import Kind, ObjectId, object_id
from ckptvcs.store import codec
from ckptvcs.store.bundles import Bundle
from ckptvcs.store.format import (
    HEADER_BYTES,
    TRAILER_BYTES,
    Format,
    Header,
    Trailer,
    pack_object,
    unpack_footer,
    unpack_object,
)
from ckptvcs.store.index import Row
from ckptvcs.store.journal import Journal, LogEntry, Operation
from ckptvcs.store.packs import PackFile, make_frame
from ckptvcs.testing.codecs import registered
from tests.golden import values

HERE = Path(__file__).parent


def frozen(name: str) -> dict[str, bytes]:
    pairs = [line.split("\t") for line in (HERE / name).read_text().splitlines()]
    return {name: bytes.fromhex(text) for name, text in pairs}


def same(left: Any, right: Any) -> bool:
    """Equality that tells 1 from True from 1.0, one NaN from another, and one order from another."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return struct.pack(">d", left) == struct.pack(">d", right)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return same(list(left), list(right)) and same(list(left.values()), list(right.values()))
    return bool(left == right)


def test_every_kind_and_operation_is_frozen() -> None:
    """Nothing that is written to disk is left out of these files."""
    assert {kind for kind, _ in values.PAYLOADS.values()} == set(Kind)
    written = {type(op) for entry in values.JOURNAL for op in entry.operations}
    assert written == set(Operation.__args__)  # type: ignore[attr-defined]
    headers = [Header.unpack(r, "raw", 0) for r in frozen("records-raw.hex").values()]
    headers += [Header.unpack(r, "zstd", 0) for r in frozen("records-zstd.hex").values()]
    ways = set()
    for name, record in frozen("records-numbers.hex").items():
        if name.endswith(".record"):
            header = Header.unpack(record, name, 0)
            ways.add((header.codec, header.element_size))
    assert ways == {(codec.PLANES, size) for size in (1, 2, 4, 8)} | {
        (codec.DIFFERENCE, size) for size in (1, 2, 4, 8)
    }
    plain = {(header.kind, header.codec) for header in headers if header.base is None}
    assert plain == {(kind, number) for kind in Kind for number in (codec.RAW, codec.ZSTD)}


@pytest.mark.parametrize("index", range(len(values.CANONICAL)))
def test_canonical(index: int) -> None:
    data, value = frozen("canonical.hex")[str(index)], values.CANONICAL[index]
    assert encode(value) == data
    assert same(decode(data), value)


def test_canonical_bytes_by_hand() -> None:
    """A few encodings written down from the msgpack specification, not by our code."""
    assert encode([1, True, 1.0]).hex() == "9301c3" + "cb3ff0000000000000"
    assert encode({"a": None}).hex() == "81a161c0"
    assert encode(2**64).hex() == "c70901" + "010000000000000000"
    assert encode(Tagged(7, b"ab")).hex() == "d5076162"
    assert encode("a" * 65536)[:5].hex() == "db00010000"
    assert encode(b"a" * 65536)[:5].hex() == "c600010000"
    assert encode([None] * 65536)[:6].hex() == "dd00010000c0"
    assert encode(-1).hex() == "ff"
    assert encode(math.inf).hex() == "cb7ff0000000000000"
    assert encode("\ud800").hex() == "a3eda080"


def test_ids() -> None:
    ids = frozen("ids.hex")
    assert ids.keys() == values.PAYLOADS.keys()
    for name, (kind, payload) in values.PAYLOADS.items():
        assert object_id(kind, payload) == ids[name]
    # BLAKE3 of nothing, as its authors publish it.
    assert ids["empty chunk"].hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


def test_objects() -> None:
    objects = frozen("objects.hex")
    assert objects.keys() == values.PAYLOADS.keys()
    for name, (_, payload) in values.PAYLOADS.items():
        assert objects[name] == payload
    references, body = unpack_object(objects["commit"], "commit")
    assert references == [(Kind.TREE, values.TREE_ID), (Kind.COMMIT, values.PARENT_ID)]
    assert decode(body) == {"m": "hello"}
    assert pack_object(references, bytes(body)) == objects["commit"]


def test_raw_records() -> None:
    records = frozen("records-raw.hex")
    frames = values.raw_frames()
    assert records.keys() == frames.keys()
    for name, frame in frames.items():
        assert frame.header.pack() + bytes(frame.payload) == records[name]
        assert Header.unpack(records[name], name, 0) == frame.header
        assert len(records[name]) == HEADER_BYTES + frame.header.stored


@pytest.mark.parametrize("name", [*frozen("records-raw.hex")])
def test_raw_records_decode(name: str) -> None:
    with registered():
        check_decodes(frozen("records-raw.hex")[name], values.NEAR if name == "difference" else None, name)


@pytest.mark.parametrize("name", [*frozen("records-zstd.hex")])
def test_zstd_records_decode(name: str) -> None:
    record = frozen("records-zstd.hex")[name]
    check_decodes(record, None, name)
    header, payload = Header.unpack(record, name, 0), record[HEADER_BYTES:]
    kind, raw = values.PAYLOADS[name]
    assert header.codec == codec.ZSTD
    frame = make_frame(kind, object_id(kind, raw), codec.ZSTD, 1, len(raw), payload)
    assert frame.header.pack() == record[:HEADER_BYTES]


NUMBERS = frozen("records-numbers.hex")


@pytest.mark.parametrize(
    "name", [name.removesuffix(".record") for name in NUMBERS if name.endswith(".record")]
)
def test_number_records_decode(name: str) -> None:
    """What zstandard made of planes may differ between its versions; what it means may not."""
    record, raw, base = (NUMBERS.get(f"{name}.{part}") for part in ("record", "raw", "base"))
    assert record is not None
    assert raw is not None
    header = Header.unpack(record, name, 0)
    assert header.id == object_id(Kind.CHUNK, raw)
    assert (header.base is None) == (base is None)
    buffer = bytearray(header.raw) if base is None else bytearray(base)
    into = memoryview(buffer)
    codec.decode(
        header.codec, record[HEADER_BYTES:], into, header.element_size, None if base is None else into, name
    )
    assert buffer == raw


def test_number_records_are_those_of_the_states_they_were_made_from() -> None:
    """Every predictor, layout and mode of a plane is frozen."""
    made = values.number_records()
    assert made.keys() == NUMBERS.keys()
    for name, data in NUMBERS.items():
        if not name.endswith(".record"):
            assert made[name] == data, name
    assert values.forms(NUMBERS) == values.forms(made)


def check_decodes(record: bytes, raw: bytes | None, name: str) -> None:
    header = Header.unpack(record, name, 0)
    raw = values.PAYLOADS[name][1] if raw is None else raw
    buffer = bytearray(header.raw)
    base = values.CHUNK if header.base else None
    assert header.base in (None, values.CHUNK_ID)
    codec.decode(header.codec, record[HEADER_BYTES:], memoryview(buffer), header.element_size, base, name)
    assert buffer == raw
    assert object_id(header.kind, buffer) == header.id


def test_pack() -> None:
    data = (HERE / "pack.bin").read_bytes()
    assert values.pack_bytes() == data
    with contextlib.closing(PackFile(Disk(), HERE / "pack.bin")) as pack:
        trailer = pack.trailer()
        assert trailer.name == values.PACK
        assert trailer.name.text == "00112233-4455-6677-8899-aabbccddeeff-7"
        assert trailer.records == len(values.raw_frames())
        entries = pack.entries()
        assert entries == list(pack.scan())
        for entry, (name, frame) in zip(entries, values.raw_frames().items(), strict=True):
            assert pack.header(entry.offset) == frame.header, name
            assert pack.payload(frame.header, entry.offset) == frame.payload
    footer = data[trailer.footer_offset : -TRAILER_BYTES]
    assert unpack_footer(footer, Trailer.unpack(data[-TRAILER_BYTES:], "pack", len(data)), "pack") == entries


@pytest.mark.parametrize("index", range(len(values.FORMATS)))
def test_format(index: int) -> None:
    data = (HERE / f"format-{index}.txt").read_bytes()
    assert values.FORMATS[index].pack() == data
    assert Format.unpack(data, "format") == values.FORMATS[index]


def test_journal(tmp_path: Path) -> None:
    data = (HERE / "refs.journal").read_bytes()
    journal = Journal(Disk(), tmp_path / "refs.journal")
    journal.create()
    journal.append(lambda position: values.JOURNAL[position:])
    assert journal.path.read_bytes() == data
    read = list(Journal(Disk(), HERE / "refs.journal").entries())
    assert read == values.JOURNAL
    for entry in read:
        assert LogEntry.decode(entry.position, entry.encode()) == entry
    targets = [op.new for entry in read for op in entry.operations if hasattr(op, "new")]
    assert {type(target) for target in targets} == {ObjectId, str, type(None)}


def test_rows() -> None:
    rows = frozen("rows.hex")
    assert len(rows) == len(values.ROWS)
    for index, row in enumerate(values.ROWS):
        assert row.encode() == rows[str(index)]
        assert Row.decode(bytes(32), rows[str(index)]) == row


def test_bundles() -> None:
    bundles = frozen("bundles.hex")
    assert bundles.keys() == values.BUNDLES.keys()
    for name, bundle in values.BUNDLES.items():
        assert bundle.pack() == bundles[name]
        assert Bundle.unpack(bundles[name], name) == bundle
