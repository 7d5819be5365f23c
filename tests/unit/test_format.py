"""Byte layouts: what is written is read back, and anything else is refused with a sentence."""

from __future__ import annotations

import json
import struct
import uuid
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.errors import CkptError, CorruptionError, FormatError
from ckptvcs.ids import Kind, ObjectId, chunk_id, digest
from ckptvcs.store.format import (
    FEATURES,
    GRIDS,
    HEADER_BYTES,
    MAX_OBJECT,
    MAX_RAW,
    MAX_STORED,
    TRAILER_BYTES,
    Entry,
    Format,
    Grid,
    Header,
    Layout,
    PackName,
    Trailer,
    largest,
    pack_footer,
    pack_object,
    record_bytes,
    unpack_footer,
    unpack_object,
)

ids = st.binary(min_size=32, max_size=32).filter(any).map(ObjectId)
words = st.integers(0, 2**32 - 1)
octets = st.integers(0, 255)
names = st.builds(PackName, st.binary(min_size=16, max_size=16), words)
headers = st.builds(
    Header,
    st.sampled_from(Kind),
    octets,
    octets,
    st.integers(0, MAX_OBJECT),
    st.integers(0, MAX_STORED),
    ids,
    st.none() | ids,
    st.binary(min_size=16, max_size=16),
)


def header(**changes: Any) -> Header:
    base = Header(Kind.CHUNK, 0, 4, 10, 10, chunk_id(b"x"), None, digest(b"x"))
    return base._replace(**changes)


def sealed(head: bytes) -> bytes:
    """Put the right CRC behind damaged content."""
    return head[:-4] + zlib.crc32(head[:-4]).to_bytes(4, "little")


# -- records --------------------------------------------------------------------------------------


@given(headers)
def test_header_round_trip(made: Header) -> None:
    data = made.pack()
    assert len(data) == HEADER_BYTES == 104
    assert Header.unpack(data, "p", 0) == made
    assert Header.unpack(memoryview(data + b"payload"), "p", 0) == made


@given(headers, st.integers(0, HEADER_BYTES * 8 - 1))
def test_every_flip_in_a_header_is_seen(made: Header, bit: int) -> None:
    data = bytearray(made.pack())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptionError, match="no record header at 77"):
        Header.unpack(data, "p", 77)


@pytest.mark.parametrize(
    ("offset", "value"),
    [(5, 0), (5, 5), (8, 0x02), (8, 0x80), (8, 0x01)],
    ids=["kind 0", "kind 5", "unknown flag", "another unknown flag", "a base flag without base"],
)
def test_impossible_headers(offset: int, value: int) -> None:
    data = bytearray(header().pack())
    data[offset] = value
    with pytest.raises(CorruptionError, match="impossible record header at 7") as caught:
        Header.unpack(sealed(bytes(data)), "file.pack", 7)
    assert (caught.value.path, caught.value.offset) == ("file.pack", 7)


def test_a_base_without_its_flag_is_impossible() -> None:
    data = bytearray(header(base=chunk_id(b"base")).pack())
    data[8] = 0
    with pytest.raises(CorruptionError, match="impossible"):
        Header.unpack(sealed(bytes(data)), "p", 0)


def test_a_length_beyond_the_limit_is_refused_before_anything_is_allocated() -> None:
    assert Header.unpack(header(raw=MAX_RAW).pack(), "p", 0).raw == MAX_RAW
    with pytest.raises(CorruptionError, match="impossible"):
        Header.unpack(header(raw=MAX_RAW + 1).pack(), "p", 0)


@pytest.mark.parametrize("kind", Kind)
def test_what_is_decoded_as_a_whole_has_a_limit_of_its_own(kind: Kind) -> None:
    """A tree of 30 Mi empty maps fits in a pack of 1.5 kB and took minutes."""
    most = MAX_OBJECT if kind in (Kind.TREE, Kind.COMMIT) else MAX_RAW
    assert largest(kind) == most
    assert Header.unpack(header(kind=kind, raw=most).pack(), "p", 0).raw == most
    with pytest.raises(CorruptionError, match="impossible"):
        Header.unpack(header(kind=kind, raw=most + 1).pack(), "p", 0)


def test_no_record_stores_more_than_a_codec_could_make_of_it() -> None:
    assert Header.unpack(header(stored=MAX_STORED).pack(), "p", 0).stored == MAX_STORED
    with pytest.raises(CorruptionError, match="impossible"):
        Header.unpack(header(stored=MAX_STORED + 1).pack(), "p", 0)


def test_a_newer_record_is_no_corruption() -> None:
    data = bytearray(header().pack())
    data[4] = 2
    with pytest.raises(FormatError, match="record at 3 has version 2; this program reads 1"):
        Header.unpack(sealed(bytes(data)), "p", 3)


@pytest.mark.parametrize("size", [0, 1, HEADER_BYTES - 1])
def test_a_short_header(size: int) -> None:
    with pytest.raises(CorruptionError, match="cut short"):
        Header.unpack(header().pack()[:size], "p", 0)


# -- packs ----------------------------------------------------------------------------------------


def entries_of(headers: list[Header]) -> tuple[list[Entry], int]:
    found, at = [], 0
    for h in headers:
        found.append(Entry(at, h.kind, h.codec, h.element_size, h.raw, h.stored, h.id, h.base))
        at += HEADER_BYTES + h.stored
    return found, at


@given(st.lists(headers, max_size=5), names)
def test_footer_round_trip(made: list[Header], name: PackName) -> None:
    entries, end = entries_of(made)
    data = pack_footer(entries, name, end)
    trailer = Trailer.unpack(data[-TRAILER_BYTES:], "p", end + len(data))
    assert trailer.name == name
    assert (trailer.records, trailer.footer_offset) == (len(entries), end)
    assert unpack_footer(data[:-TRAILER_BYTES], trailer, "p") == entries
    # The whole file is what its records cost, and a trailer.
    total = sum(record_bytes(h.stored, h.base is not None) for h in made)
    assert end + len(data) == total + TRAILER_BYTES


def test_every_flip_in_footer_and_trailer_is_seen() -> None:
    entries, end = entries_of([header(), header(base=chunk_id(b"b"), id=chunk_id(b"y"))])
    whole = pack_footer(entries, PackName(bytes(16), 1), end)
    for bit in range(len(whole) * 8):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptionError):
            unpack_footer(
                data[:-TRAILER_BYTES],
                Trailer.unpack(bytes(data[-TRAILER_BYTES:]), "p", end + len(data)),
                "p",
            )


def test_a_trailer_must_fit_its_file() -> None:
    data = pack_footer([], PackName(bytes(16), 1), 0)
    assert Trailer.unpack(data, "p", TRAILER_BYTES)
    for size in (TRAILER_BYTES - 1, TRAILER_BYTES + 1, 0):
        with pytest.raises(CorruptionError, match="no whole footer"):
            Trailer.unpack(data, "p", size)
    with pytest.raises(CorruptionError, match="no whole footer"):
        Trailer.unpack(data[:-1], "p", TRAILER_BYTES - 1)


def lying(body: bytes, count: int, end: int) -> tuple[bytes, Trailer]:
    """A footer whose checks fit although it says something impossible."""
    return body, Trailer(count, end, len(body), PackName(bytes(16), 1), digest(body))


@pytest.mark.parametrize(
    "what", ["count+", "count-", "kind", "flag", "raw", "tree", "stored", "outside", "base cut"]
)
def test_impossible_footers(what: str) -> None:
    entries, end = entries_of([header(base=chunk_id(b"b")) if what == "base cut" else header()])
    body = bytearray(pack_footer(entries, PackName(bytes(16), 1), end)[:-TRAILER_BYTES])
    count = 1
    match what:
        case "count+":
            count = 2
        case "count-":
            count = 0
        case "kind":
            body[0] = 9
        case "flag":
            body[3] |= 0x40
        case "raw":
            struct.pack_into("<I", body, 4, MAX_RAW + 1)
        case "tree":
            body[0] = Kind.TREE
            struct.pack_into("<I", body, 4, MAX_OBJECT + 1)
        case "stored":
            struct.pack_into("<I", body, 8, MAX_STORED + 1)
            end = 1 << 40
        case "outside":
            struct.pack_into("<Q", body, 12, end)
        case "base cut":
            del body[-1]
    with pytest.raises(CorruptionError):
        unpack_footer(*lying(bytes(body), count, end), "p")


@given(names)
def test_pack_names(name: PackName) -> None:
    assert PackName.from_key(name.key) == name
    if name.seq < 10**9:
        assert PackName.parse(f"{name.text}.pack") == name
    assert (name.key < PackName(name.lease, 5).key) == (name < PackName(name.lease, 5))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x.pack",
        f"{uuid.UUID(int=1)}.pack",
        f"{uuid.UUID(int=1)}-1",
        f"{uuid.UUID(int=1)}-01.pack",
        f"{uuid.UUID(int=1)}--1.pack",
        f"{uuid.UUID(int=1)}-1.pack.tmp",
        f"{uuid.UUID(int=1)}-1.pack\n",
        f"{uuid.UUID(int=2**128 - 1)}-1.pack".upper(),
    ],
)
def test_other_files_are_no_packs(text: str) -> None:
    assert PackName.parse(text) is None


# -- objects --------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(Kind), ids), max_size=5), st.binary(max_size=20))
def test_objects(references: list[tuple[Kind, ObjectId]], body: bytes) -> None:
    payload = pack_object(references, body)
    found, rest = unpack_object(payload, "tree")
    assert found == references
    assert rest == body
    for size in range(4 + 33 * len(references)):
        with pytest.raises(CorruptionError, match="tree: the object"):
            unpack_object(payload[:size], "tree")


def test_objects_that_lie() -> None:
    with pytest.raises(CorruptionError, match="cut short"):
        unpack_object(b"\xff\xff\xff\xff" + bytes(64), "tree")
    payload = bytearray(pack_object([(Kind.TREE, chunk_id(b""))], b""))
    payload[4] = 7
    with pytest.raises(CorruptionError, match="unknown kind 7"):
        unpack_object(payload, "tree")


# -- the format file ------------------------------------------------------------------------------


def stamped(**changes: Any) -> bytes:
    """A `format` file with other fields and a right checksum."""
    fields = json.loads(Format.new().pack().split(b"\n")[1])
    for name, value in changes.items():
        fields.pop(name) if value is ... else fields.update({name: value})
    return json_stamped(json.dumps(fields))


def json_stamped(body: str) -> bytes:
    """A `format` file with this text in place of its fields, and a right checksum."""
    return f"ckptvcs repository\n{body}\n{digest(body.encode()).hex()}\n".encode()


def test_format_round_trip() -> None:
    made = Format.new()
    assert Format.unpack(made.pack(), "f") == made
    again = made.with_new_index()
    assert again.repository == made.repository
    assert again.index != made.index
    assert Format.new().repository != made.repository
    assert made.grid in GRIDS


def test_the_grid_is_frozen() -> None:
    assert GRIDS[1] == Grid(
        id=1, chunk=1 << 20, inline=256, chunk_list=4, subtree=2048, list_page=64, map_page=16
    )


def test_every_flip_in_the_format_file_is_seen() -> None:
    whole = Format.new().pack()
    for bit in range(len(whole) * 8):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CkptError):
            Format.unpack(bytes(data), "f")
    for size in range(len(whole)):
        with pytest.raises(CorruptionError, match="f is damaged"):
            Format.unpack(whole[:size], "f")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        stamped(version=...),
        stamped(version="one"),
        stamped(repository="not a uuid"),
        stamped(index=None),
        stamped(grid=...),
        stamped(features=...),
        stamped(features={"read": [], "write": []}),
        stamped() + b"more",
        stamped(version=float("inf")),
        stamped(version=True),
        stamped(grid=float("inf")),
        stamped(grid="1"),
        stamped(lmdb=0.5),
        stamped(repository=5),
        stamped(index=["x"]),
        stamped(features={"read": [1], "write": [], "gc": []}),
        json_stamped("[" * 100_000),
        json_stamped('{"version": 1e999}'),
        json_stamped('{"version": ' + "9" * 5000 + "}"),
    ],
)
def test_damaged_format(data: bytes) -> None:
    with pytest.raises(CorruptionError, match="is damaged") as caught:
        Format.unpack(data, "/r/.ckpt/format")
    assert caught.value.path == "/r/.ckpt/format"
    assert "\n" not in caught.value.message


def test_a_newer_version_is_refused_before_the_rest_is_looked_at() -> None:
    for data in (stamped(version=2), stamped(version=2, features=..., grid="new", repository=...)):
        with pytest.raises(FormatError, match="repository format 2; this program knows 1") as caught:
            Format.unpack(data, "f")
        assert caught.value.hint == "use a newer ckptvcs"
    with pytest.raises(FormatError, match="unknown grid 9"):
        Format.unpack(stamped(grid=9), "f")


def test_unknown_features_are_refused_for_the_work_that_needs_them() -> None:
    with pytest.raises(FormatError, match="to read this repository a program must know the feature new"):
        Format.unpack(stamped(features={"read": ["new"], "write": [], "gc": []}), "f")
    found = Format.unpack(stamped(features={"read": [], "write": ["b", "a"], "gc": ["c"]}), "f")
    found.check("read")
    with pytest.raises(FormatError, match=r"to write to this repository .* the feature a, b, and this one"):
        found.check("write")
    with pytest.raises(FormatError, match=r"to collect garbage in this repository .* the feature c,"):
        found.check("gc")
    assert set(FEATURES) == {"read", "write", "gc"}


def test_layout_is_relative(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    name = PackName(b"\xfe" + bytes(15), 3)
    assert layout.pack(name) == tmp_path / "packs" / "01" / f"{name.text}.pack"
    assert layout.open_pack(name) == tmp_path / "tmp" / f"{name.text}.pack"
    assert layout.lease(name.lease).name == "fe000000-0000-0000-0000-000000000000"
    assert {layout.pack(PackName(bytes(16), seq)).parent.name for seq in range(256)} == {
        f"{i:02x}" for i in range(256)
    }
