"""docs/format.md says what the code does: tables, constants, worked examples."""

from __future__ import annotations

import re
import struct
import uuid
from pathlib import Path

import numpy as np
import pytest

from ckptvcs import canonical
from ckptvcs.disk import Disk
from ckptvcs.history import commit
from ckptvcs.history.commit import encode_commit
from ckptvcs.ids import Kind, ObjectId, chunk_id
from ckptvcs.state import codes, tree
from ckptvcs.store import bundles, codec, index, journal
from ckptvcs.store import format as layouts
from ckptvcs.store.journal import Drop as DropRecord
from ckptvcs.store.journal import Expire, Fork, Journal, LogEntry, Move, Note, Operation, Pin, Status
from ckptvcs.testing.memory import MemoryStore
from tests.docs import pages

PAGE = pages.ROOT / "docs" / "format.md"
TEXT = PAGE.read_text()


def hex_of(block: str) -> bytes:
    """The bytes of a hex block, whose lines begin with the offset."""
    data = bytearray()
    for line in block.splitlines():
        offset, _, digits = line.strip().partition("  ")
        assert int(offset) == len(data)
        data += bytes.fromhex(digits)
    return bytes(data)


def example_pack() -> bytes:
    raw = b"hello, checkpoint"
    number, payload = codec.encode(raw)
    id = chunk_id(raw)
    header = layouts.Header(Kind.CHUNK, number, 1, len(raw), len(payload), id, None, layouts.digest(payload))
    record = header.pack() + bytes(payload)
    name = layouts.PackName(uuid.UUID("00112233-4455-6677-8899-aabbccddeeff").bytes, 7)
    entry = layouts.Entry(0, Kind.CHUNK, number, 1, len(raw), len(payload), id, None)
    return record + layouts.pack_footer([entry], name, len(record))


def test_worked_pack() -> None:
    assert hex_of(pages.block_after(PAGE, "### Worked example", "hex")) == example_pack()


def test_worked_tree() -> None:
    store = MemoryStore()
    id = tree.write(store, {"lr": 0.001, "w": np.array([1, 2], dtype="float32")}).tree
    section = TEXT[TEXT.index("\n### Example\n") :]
    assert hex_of(pages.block_after(PAGE, "### Example", "hex")) == store.objects(Kind.TREE, [id])[0]
    assert f"`{id}`" in section


def test_worked_journal_line(tmp_path: Path) -> None:
    first = LogEntry(
        1, 1_700_000_000_000_000_000, "ada@example", "init", (Move("HEAD", None, "refs/heads/main"),)
    )
    journal = Journal(Disk(), tmp_path / "refs.journal")
    journal.create()
    journal.append(lambda _: [first])
    assert pages.block_after(PAGE, "## Journal", "text", 1) == journal.path.read_text()


def test_code_table_is_that_of_the_code() -> None:
    assert pages.block_after(PAGE, "## Trees", "text").strip() == (codes.__doc__ or "").strip()


@pytest.mark.parametrize(
    ("heading", "size"),
    [
        ("### Record header", layouts.HEADER_BYTES),
        ("### Trailer", layouts.TRAILER_BYTES),
        ("### Footer entry", layouts.record_bytes(0, True) - layouts.HEADER_BYTES),
        ("### Row", 78),
    ],
)
def test_fields_follow_each_other(heading: str, size: int) -> None:
    at = 0
    for offset, length, *_ in pages.table(PAGE, heading):
        assert offset in (str(at), f"42 or {at}")
        at += int(length)
    assert at == size


def test_sizes_named_in_the_text() -> None:
    assert layouts.HEADER_BYTES == 104
    assert layouts.TRAILER_BYTES == 68
    assert layouts.record_bytes(0, False) - 104 == 52
    assert layouts.record_bytes(0, True) - 104 == 84
    assert (layouts.MAX_RAW, layouts.MAX_DEPTH, layouts.PACK_LIMIT) == (67_108_864, 8, 1 << 30)
    assert (layouts.MAX_OBJECT, layouts.MAX_STORED) == (8_388_608, 67_174_400)
    assert (journal.LONGEST_NAME, journal.LONGEST_KEY) == (510, 478)
    assert (codes.MAX_VALUES, commit.MAX_DEPTH) == (8_388_608, 100)
    assert codec.CODECS.keys() == {0, 1, 2, 3}
    assert range(240, 256) == codec.EXPERIMENTAL
    assert (codes.REFERENCE, codes.MAX_DEPTH, canonical.MAX_DEPTH) == (36, 100, 200)
    assert (codes.BIG_ENDIAN, codes.REQUIRES_GRAD, codes.PARAMETER, codes.COALESCED) == (1, 2, 4, 8)
    row = index.Row(Kind.CHUNK, 0, 1, 0, 1, 1, 0, layouts.PackName(bytes(16), 1))
    assert len(row.encode()) == 46
    assert len(row._replace(base=ObjectId(bytes(32))).encode()) == 78
    assert index.MAP_SIZE == 64 << 30
    for kind in Kind:
        assert f"| {kind.label} | {kind.value} |" in TEXT


def test_grid() -> None:
    rows = {name.strip("`"): int(value.replace(",", "")) for name, value, _ in pages.table(PAGE, "## Grid")}
    grid = layouts.GRIDS[1]
    assert rows == {name: getattr(grid, name) for name in grid.__slots__ if name != "id"}


def test_index_tables() -> None:
    letters = {row[0]: row[1].strip("`") for row in pages.table(PAGE, "## Index") if row[0]}
    assert letters == {name: prefix.decode() for name, prefix in index.TABLES.items()}


def test_operations() -> None:
    id = ObjectId(bytes(32))
    samples: list[Operation] = [
        Move("HEAD", None, id),
        Note(id, "k", 1),
        Pin(id, True),
        DropRecord(id, ("optimizer",)),
        Status("main", "running"),
        Fork("x", id, {}),
        Expire(3),
    ]
    assert {type(op) for op in samples} == set(Operation.__args__)  # type: ignore[attr-defined]
    encoded = canonical.decode(LogEntry(1, 0, "", "", tuple(samples)).encode())
    section = TEXT[TEXT.index("\n## Journal\n") :]
    described = re.findall(r"^\| `(\w+)` \|", section[: section.index("\n## Leases")], re.MULTILINE)
    assert described == [fields[0] for fields in encoded[3]]


def test_commit_keys() -> None:
    payload = encode_commit(
        tree=ObjectId(bytes(32)), parents=(), origin=None, author="", time=0, message="", step=None,
        epoch=None, metrics={}, config={}, overrides={}, environment={}, sizes={},
    )  # fmt: skip
    (count,) = struct.unpack_from("<I", payload)
    body = canonical.decode(payload[4 + 33 * count :])
    assert list(body) == [row[0].strip("`") for row in pages.table(PAGE, "### Commit")]


def test_bundles() -> None:
    id = ObjectId(bytes(32))
    name = layouts.PackName(bytes(16), 2)
    made = bundles.Bundle(name, str(uuid.UUID(int=0)), id, "", None, False, (), None, None, (), 0, "", "")
    data = made.pack()
    keys = [
        key.strip("`") for row in pages.table(PAGE, "### The map of a bundle") for key in row[0].split(", ")
    ]
    assert list(canonical.decode(data[12:-16])) == keys
    section = TEXT[TEXT.index("\n## Bundles\n") : TEXT.index("\n## Ingest\n")]
    assert " ".join(f"{byte:02X}" for byte in data[:8]) in section
    assert f"({bundles.MAX_BUNDLE:,} bytes)" in section


def test_names_in_the_folder() -> None:
    layout = layouts.Layout(pages.ROOT / "x")
    rows = " ".join(row[0] for row in pages.table(PAGE, "## What a repository contains"))
    named = set(re.findall(r"`([\w.-]+)", rows))
    assert named == {path.name for path in vars(layout).values() if path.name != "x"}
