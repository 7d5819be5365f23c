"""Bundles as bytes and as files in `incoming/`."""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from pathlib import Path

import pytest

from ckptvcs import canonical
from ckptvcs.disk import Disk
from ckptvcs.errors import CorruptionError
from ckptvcs.ids import ObjectId, digest
from ckptvcs.store import bundles
from ckptvcs.store.bundles import Bundle, BundledPack
from ckptvcs.store.format import Layout, PackName

LEASE = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff").bytes


def id_of(number: int) -> ObjectId:
    return ObjectId(bytes([number]) * 32)


def bundle(seq: int = 2, root: int = 1, tip: int | None = None, base: int | None = None) -> Bundle:
    return Bundle(
        name=PackName(LEASE, seq),
        repository="01234567-89ab-cdef-0123-456789abcdef",
        root=id_of(root),
        ref="refs/heads/main",
        tip=None if tip is None else id_of(tip),
        lost=False,
        tags=("refs/tags/v1",),
        status="finished",
        base=None if base is None else id_of(base),
        packs=(BundledPack(PackName(LEASE, seq - 1), 1234, 5, bytes(range(16))),),
        time=1,
        who="me@here",
        why="commit: first",
        info={"given": 10, "stored": 4},
    )


def resealed(data: bytes) -> bytes:
    """Bytes whose digest is right again."""
    return data[:-16] + digest(data[:-16])


@pytest.mark.parametrize("made", [bundle(), bundle(tip=7), bundle(tip=7, base=7)])
def test_round_trip(made: Bundle) -> None:
    assert Bundle.unpack(made.pack(), "here") == made


def test_every_changed_byte_is_noticed() -> None:
    data = bundle(tip=7).pack()
    for at in range(len(data)):
        with pytest.raises(CorruptionError, match="here"):
            Bundle.unpack(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "here")
        with pytest.raises(CorruptionError, match="here"):
            Bundle.unpack(data[:at], "here")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", b"short"),
        ("repository", "no uuid"),
        ("root", b"\1" * 31),
        ("root", "text"),
        ("ref", b"refs/heads/main"),
        ("tip", 1),
        ("lost", 0),
        ("tags", ["a", 1]),
        ("tags", "a"),
        ("status", 1),
        ("base", b""),
        ("packs", {}),
        ("packs", [[LEASE + b"\0\0\0\1", -1, 1, bytes(16)]]),
        ("packs", [[LEASE + b"\0\0\0\1", 1, 1, bytes(15)]]),
        ("packs", [[LEASE + b"\0\0\0\1", 1, 1]]),
        ("packs", [[LEASE + b"\0\0\0\1", 1, 1, bytes(16)]] * 2),
        ("time", 1.0),
        ("who", None),
        ("why", "x" * 5000),
        ("info", {"a": [1]}),
        ("info", {1: 1}),
        ("more", 1),
    ],
)
def test_what_means_nothing_is_refused(field: str, value: object) -> None:
    """With a digest that fits: somebody wrote it so."""
    data = bundle().pack()
    fields = canonical.decode(data[12:-16])
    fields[field] = value
    body = canonical.encode(fields)
    forged = resealed(data[:8] + len(body).to_bytes(4, "little") + body + bytes(16))
    with pytest.raises(CorruptionError, match="means nothing"):
        Bundle.unpack(forged, "here")


def test_a_file_is_what_it_is_called(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.incoming.mkdir()
    made = bundle()
    (layout.incoming / made.file_name).write_bytes(made.pack())
    other = dataclasses.replace(made, name=PackName(LEASE, 9)).file_name
    (layout.incoming / other).write_bytes(made.pack())
    for stranger in ("x.bundle", f"{made.name.text}.pack", f"{made.file_name}.abc.tmp", "notes.txt"):
        (layout.incoming / stranger).write_bytes(b"")
    disk = Disk()
    assert bundles.waiting(disk, layout) == sorted([made.file_name, other])
    assert bundles.read(disk, layout.incoming / made.file_name) == made
    with pytest.raises(CorruptionError, match="holds the bundle"):
        bundles.read(disk, layout.incoming / other)
    assert bundles.readable(disk, layout) == [made]


def test_a_giant_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / bundle().file_name
    with path.open("wb") as file:
        file.truncate(bundles.MAX_BUNDLE + 1)
    with pytest.raises(CorruptionError, match="too large"):
        bundles.read(Disk(), path)


def test_order_follows_what_each_builds_on() -> None:
    chain = [bundle(2, 1), bundle(4, 2, tip=1), bundle(6, 3, tip=2), bundle(8, 4, base=2)]
    for shuffled in itertools.permutations(chain):
        roots = [each.root for each in bundles.in_order(shuffled)]
        assert roots.index(id_of(1)) < roots.index(id_of(2)) < roots.index(id_of(3))
        assert roots.index(id_of(2)) < roots.index(id_of(4))
    circle = [bundle(2, 1, tip=2), bundle(4, 2, tip=1)]
    assert sorted(bundles.in_order(circle), key=lambda each: each.name) == circle
