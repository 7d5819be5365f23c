"""Pack files: sealed whole, read back checked, scanned past damage."""

from __future__ import annotations

import contextlib
import os
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptvcs.disk import Disk
from ckptvcs.errors import CorruptionError
from ckptvcs.ids import Kind, chunk_id, digest, object_id
from ckptvcs.store import codec
from ckptvcs.store.format import (
    HEADER_BYTES,
    MAX_RAW,
    RECORD_MAGIC,
    TRAILER_BYTES,
    Entry,
    Layout,
    PackName,
)
from ckptvcs.store.packs import Frame, PackFile, PackWriter, make_frame

NAME = PackName(bytes(range(16)), 5)
PAYLOADS = [os.urandom(size) for size in (0, 1, 700, 5000, 64, 300)]


def frame(payload: bytes, kind: Kind = Kind.CHUNK) -> Frame:
    return make_frame(kind, object_id(kind, payload), codec.RAW, 4, len(payload), payload)


def memory(size: int) -> memoryview:
    return memoryview(bytearray(size))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path)
    for folder in made.folders:
        folder.mkdir()
    return made


@pytest.fixture
def sealed(layout: Layout) -> tuple[Path, list[Entry]]:
    """A pack with one record per payload."""
    writer = PackWriter(Disk(), layout, NAME)
    entries = [writer.append(frame(payload)) for payload in PAYLOADS]
    size = writer.seal()
    path = layout.pack(NAME)
    assert path.stat().st_size == size
    return path, entries


@contextlib.contextmanager
def opened(path: Path) -> Iterator[PackFile]:
    with contextlib.closing(PackFile(Disk(), path)) as pack:
        yield pack


def test_seal_and_read(sealed: tuple[Path, list[Entry]], layout: Layout) -> None:
    path, entries = sealed
    assert os.listdir(layout.temporary) == []
    assert path.stat().st_mode & 0o222 == 0, "nobody writes into a sealed pack"
    with opened(path) as pack:
        assert pack.trailer().name == NAME
        assert pack.entries() == entries == list(pack.scan())
        for entry, payload in zip(entries, PAYLOADS, strict=True):
            header = pack.header(entry.offset)
            assert pack.payload(header, entry.offset) == payload
            assert pack.record(entry.offset, entry.stored, memory) == (header, payload)
            buffer = bytearray(len(payload))
            assert pack.read_into(memoryview(buffer), entry.offset + HEADER_BYTES) == len(payload)
            assert buffer == payload
        last = entries[-1]
        records = last.offset + HEADER_BYTES + last.stored
        assert pack.trailer().footer_offset == records
        assert pack.size() == sum(entry.cost for entry in entries) + TRAILER_BYTES


def test_large_records_are_not_held_back(layout: Layout) -> None:
    writer = PackWriter(Disk(), layout, NAME)
    payload = bytes(3 << 20)
    for _ in range(3):
        writer.append(frame(payload))
        assert layout.open_pack(NAME).stat().st_size == writer.size
    writer.append(frame(b"small"))
    assert layout.open_pack(NAME).stat().st_size < writer.size
    writer.seal()
    with opened(layout.pack(NAME)) as pack:
        assert len(pack.entries()) == 4


def test_an_abandoned_pack_leaves_nothing(layout: Layout) -> None:
    writer = PackWriter(Disk(), layout, NAME)
    writer.append(frame(b"x"))
    writer.abandon()
    writer.abandon()
    assert os.listdir(layout.temporary) == []
    assert os.listdir(layout.packs) == []


def test_a_pack_never_replaces_another(layout: Layout, sealed: tuple[Path, list[Entry]]) -> None:
    before = sealed[0].read_bytes()
    writer = PackWriter(Disk(), layout, NAME)
    writer.append(frame(b"another"))
    with pytest.raises(FileExistsError):
        writer.seal()
    writer.abandon()
    assert sealed[0].read_bytes() == before
    assert os.listdir(layout.temporary) == []


def test_the_wrong_place_is_refused(sealed: tuple[Path, list[Entry]]) -> None:
    path, entries = sealed
    with opened(path) as pack:
        with pytest.raises(CorruptionError, match="no record header at 5"):
            pack.header(5)
        with pytest.raises(CorruptionError, match="not the one indexed"):
            pack.record(entries[2].offset, entries[2].stored - 1, memory)
        with pytest.raises(CorruptionError, match="cut short"):
            pack.header(path.stat().st_size - 10)


def damage(path: Path, at: int, data: bytes) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def test_the_scan_goes_on_behind_damage(sealed: tuple[Path, list[Entry]]) -> None:
    path, entries = sealed
    whole = path.read_bytes()
    for broken, entry in enumerate(entries):
        for at in range(entry.offset, entry.offset + HEADER_BYTES + entry.stored, 13):
            damage(path, at, bytes([whole[at] ^ 0xFF]))
            with opened(path) as pack:
                assert list(pack.scan()) == entries[:broken] + entries[broken + 1 :]
                with pytest.raises(CorruptionError):
                    pack.payload(pack.header(entry.offset), entry.offset)
            path.write_bytes(whole)


def test_the_scan_survives_lost_and_added_bytes(sealed: tuple[Path, list[Entry]]) -> None:
    """A piece cut out or put in moves all behind it; their ids still come out."""
    path, entries = sealed
    whole = path.read_bytes()
    path.chmod(0o644)
    ids = [entry.id for entry in entries]
    at = entries[3].offset + HEADER_BYTES + 1000
    for data in (
        whole[:at] + whole[at + 777 :],
        whole[:at] + os.urandom(333) + whole[at:],
        whole[:at] + RECORD_MAGIC * 50 + whole[at:],
    ):
        path.write_bytes(data)
        with opened(path) as pack:
            assert [entry.id for entry in pack.scan()] == ids[:3] + ids[4:]
            for entry in pack.scan():
                assert chunk_id(pack.payload(pack.header(entry.offset), entry.offset)) == entry.id
    path.write_bytes(os.urandom(400) + whole)
    with opened(path) as pack:
        assert [entry.id for entry in pack.scan()] == ids


def test_the_scan_of_a_cut_pack(sealed: tuple[Path, list[Entry]]) -> None:
    path, entries = sealed
    whole = path.read_bytes()
    path.chmod(0o644)
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with opened(path) as pack:
            expected = [e for e in entries if e.offset + HEADER_BYTES + e.stored <= size]
            assert list(pack.scan()) == expected
            with pytest.raises(CorruptionError):
                pack.entries()


def test_a_magic_inside_a_payload_is_no_record(layout: Layout) -> None:
    """Not even a whole record inside the payload of another one, as long as that one is whole."""
    inner = frame(b"inner")
    outer = frame(b"x" * 50 + inner.header.pack() + b"inner" + RECORD_MAGIC * 3)
    writer = PackWriter(Disk(), layout, NAME)
    entries = [writer.append(f) for f in (outer, frame(b"next"))]
    writer.seal()
    with opened(layout.pack(NAME)) as pack:
        assert list(pack.scan()) == entries
    path = layout.pack(NAME)
    damage(path, 20, b"\xff\xff\xff\xff")
    with opened(path) as pack:
        found = list(pack.scan())
    assert found[-1] == entries[1]
    assert {entry.id for entry in found} <= {inner.header.id, entries[1].id}


def test_a_record_longer_than_its_file_is_refused_before_it_is_read(layout: Layout) -> None:
    path = layout.temporary / "lying"
    made = make_frame(Kind.CHUNK, chunk_id(b"x"), codec.RAW, 1, 1, b"x").header._replace(stored=MAX_RAW)
    path.write_bytes(made.pack() + b"x" * 1000)
    with opened(path) as pack:
        tracemalloc.start()
        with pytest.raises(CorruptionError, match="cut short"):
            pack.payload(pack.header(0), 0)
        with pytest.raises(CorruptionError, match="cut short"):
            pack.record(0, MAX_RAW, memory)
        assert list(pack.scan()) == []
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()
        for offset in (1 << 40, 1 << 63, (1 << 64) - 1):
            with pytest.raises(CorruptionError, match="cut short"):
                pack.header(offset)
            assert pack.read_into(memoryview(bytearray(4)), offset) == 0


def test_the_scan_of_records_that_claim_to_hold_each_other_is_linear(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each header claims all that follows it: hashed once each, that would be quadratic."""
    count = 20_000
    size = count * HEADER_BYTES
    good = frame(b"good")
    lies = [
        good.header._replace(stored=size - (at + 1) * HEADER_BYTES, digest=bytes(16)).pack()
        for at in range(count)
    ]
    path = layout.temporary / "nested"
    path.write_bytes(b"".join(lies) + good.header.pack() + b"good")
    hashed = []

    def counting(data: bytes) -> bytes:
        hashed.append(len(data))
        return digest(data)

    monkeypatch.setattr("ckptvcs.store.packs.digest", counting)
    with opened(path) as pack:
        assert [entry.id for entry in pack.scan()] == [good.header.id]
    assert sum(hashed) < 4 * size


def test_the_scan_of_noise_ends(layout: Layout) -> None:
    path = layout.temporary / "noise"
    chance = random.Random(7)
    for size in (0, 1, HEADER_BYTES, 3000):
        path.write_bytes((RECORD_MAGIC + chance.randbytes(60)) * (size // 64 + 1))
        with opened(path) as pack:
            assert list(pack.scan()) == []
            with pytest.raises(CorruptionError, match="no whole footer"):
                pack.trailer()
