"""The index made anew from packs and journal: the same tables, and nothing that was dead."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptvcs.disk import Disk
from ckptvcs.errors import CorruptionError, LockedError
from ckptvcs.ids import Kind, ObjectId, chunk_id, object_id
from ckptvcs.store import Drop, Expire, Fork, Move, Note, Pin, Row, Status, Store
from ckptvcs.store.format import Entry, Layout, PackName, pack_object
from ckptvcs.store.index import TABLES
from ckptvcs.store.packs import Frame, PackWriter, make_frame
from ckptvcs.store.rebuild import Rebuilt, _Candidates, _choose
from ckptvcs.testing.codecs import delta_frame, registered
from tests.crash.stores import (
    MAIN,
    commit,
    contents,
    create,
    files,
    noise,
    open_store,
    publication,
    put_commit,
    put_root,
    tips,
    verify,
)

Tables = dict[str, dict[bytes, bytes]]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with contextlib.closing(create(tmp_path)) as made:
        yield made


def dump(store: Store) -> Tables:
    """Every table but what names this very index and counts its collections."""
    with store.snapshot() as snapshot:
        tables = snapshot.dump()
    assert set(tables) == set(TABLES)
    return {**tables, "meta": {k: v for k, v in tables["meta"].items() if k not in (b"index", b"gc_seq")}}


def rebuilt(store: Store) -> tuple[Store, list[str]]:
    """The repository opened again without its index, and what was said."""
    folder = store.layout.root
    store.close()
    shutil.rmtree(folder / "meta")
    said: list[str] = []
    return Store.open(folder, Disk(), threads=1, say=said.append), said


def test_every_table_comes_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptvcs.store.writer._SECTION_BYTES", 1)
    first = commit(store, [noise(1, 3000), bytes(2 << 20)])
    second = commit(store, [noise(1, 3000), noise(2, 700)], first.id)
    with registered(), store.writer() as writer:
        raw, base = b"delta" * 20, b"bases" * 20
        made = put_commit(writer, [base])
        writer.put_frame(chunk_id(raw), delta_frame(raw, base))
        (tree,) = writer.put_objects(Kind.TREE, [pack_object([(Kind.CHUNK, chunk_id(raw))], b"\xc0")])
        root = put_root(writer, tree, [made.id])
        assert writer.publish(publication(root, None, "refs/heads/delta"))
    operations = [
        [Move("HEAD", MAIN, second.id), Move("refs/tags/t", None, first.id)],
        [Move("refs/heads/x", None, first.id)],
        [Move("refs/heads/x", first.id, None)],
        [Note(first.id, "loss", 0.5), Note(second.id, "text", "x"), Note(first.id, "n", 1)],
        [Note(first.id, "n", None)],
        [Pin(first.id, True), Pin(second.id, True)],
        [Pin(first.id, False)],
        [Drop(first.id, ("optimizer",)), Drop(second.id, ())],
        [Drop(first.id, ("rng",))],
        [Status("main", "running"), Status("x", "failed")],
        [Status("x", None)],
        [Fork("x", first.id, {"optimizer.lr": 3e-4}), Fork("y", first.id, {"a": [1, "b"]})],
        [Fork("x", None, {})],
        [Expire(4)],
    ]
    for each in operations:
        assert store.update(each, who="me", why="test", info={"k": [1, None]})
    before = dump(store)
    assert all(before[table] for table in TABLES), "no table is compared empty"
    identity = store.format
    with registered():
        store, said = rebuilt(store)
        assert said == [
            f"the index of {store.layout.root.parent} is missing; rebuilding it from packs and journal"
        ]
        assert dump(store) == before
        assert store.format.repository == identity.repository
        assert store.format.index != identity.index
        verify(store)
        assert contents(store, second.id) == second.contents
        third = commit(store, [b"goes on"], second.id)
        assert contents(store, third.id) == third.contents
        store.close()


def test_rebuild_on_demand(store: Store) -> None:
    made = commit(store, [b"x"])
    before = dump(store)
    with store.index.change() as change:
        change.delete_row(made.id)  # the index has rotted
    report = store.rebuild()
    store.reopen()
    assert report is not None
    assert (report.packs, report.records, report.log_entries, report.left_out) == (1, 3, 2, 0)
    assert report.problems == []
    assert dump(store) == before
    assert [path.name for path in (store.layout.temporary).iterdir()] == []
    assert {path.name for path in store.layout.meta.iterdir()} <= {"data.mdb", "lock.mdb"}


def test_nobody_else_may_have_it_open(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptvcs.store.store._LOCK_WAIT", 0.05)
    with contextlib.closing(open_store(tmp_path)) as other:
        with pytest.raises(LockedError, match="another process has it open"):
            other.rebuild()
    with contextlib.closing(open_store(tmp_path)) as again:
        assert verify(again) == 0


def test_many_open_a_repository_without_index(store: Store, tmp_path: Path) -> None:
    """One of them rebuilds; all end with the same index."""
    made = commit(store, [b"x"])
    store.close()
    shutil.rmtree(tmp_path / ".ckpt" / "meta")
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            status = 9
            try:
                with contextlib.closing(open_store(tmp_path)) as own:
                    status = 0 if contents(own, made.id) == made.contents else 1
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
    with contextlib.closing(open_store(tmp_path)) as again:
        verify(again)


def test_duplicates(store: Store, tmp_path: Path) -> None:
    """A chunk that lies in two packs gets one row, the same one on every rebuild."""
    data = noise(1, 2000)
    with contextlib.closing(open_store(tmp_path)) as other, store.writer() as mine, other.writer() as theirs:
        first = put_commit(mine, [data], message="mine")
        second = put_commit(theirs, [data], message="theirs")
        assert mine.publish(publication(first.id, None, "refs/heads/a"))
        assert theirs.publish(publication(second.id, None, "refs/heads/b"))
    store, _ = rebuilt(store)
    once = dump(store)
    verify(store)
    assert contents(store, first.id) == contents(store, second.id) == (data,)
    store, _ = rebuilt(store)
    assert dump(store) == once
    store.close()


@pytest.mark.parametrize("where", ["footer", "trailer", "cut", "renamed"])
def test_a_pack_with_a_damaged_end_is_salvaged(store: Store, where: str) -> None:
    made = commit(store, [noise(1, 2000), noise(2, 300)])
    rows = dump(store)["rows"]
    (path,) = files(store.layout.packs)
    whole = path.read_bytes()
    path.chmod(0o644)
    at = {"footer": len(whole) - 100, "trailer": len(whole) - 10}.get(where)
    if at is not None:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    elif where == "cut":
        path.write_bytes(whole[:-80])
    else:
        name = PackName.parse(path.name)
        assert name is not None
        path = path.rename(store.layout.pack(PackName(name.lease, name.seq + 256)))
    store, said = rebuilt(store)
    assert "4 whole records were salvaged" in said[1]
    assert path.name in said[1] or where == "renamed"
    assert contents(store, made.id) == made.contents
    if where != "renamed":
        assert dump(store)["rows"] == rows
    verify(store)
    store.close()


def test_what_a_ref_reaches_stays_though_it_is_broken(store: Store) -> None:
    """So that fsck can report it; another commit may heal it."""
    data = noise(1, 2000)
    made = commit(store, [data, b"whole"])
    (path,) = files(store.layout.packs)
    whole = bytearray(path.read_bytes())
    path.chmod(0o644)
    whole[200] ^= 1  # inside the first chunk
    whole[-1] ^= 1  # and the footer, so that the pack is scanned
    path.write_bytes(whole)
    store, said = rebuilt(store)
    assert "3 whole records" in said[1]
    assert tips(store) == {MAIN: made.id}
    with pytest.raises(CorruptionError, match=f"{chunk_id(data).short} is referred to but not stored"):
        contents(store, made.id)
    again = commit(store, [data, b"whole"], made.id)
    assert contents(store, again.id) == contents(store, made.id) == made.contents
    store.close()


def test_dead_commits_do_not_come_back(store: Store) -> None:
    """A commit whose chunks were collected is left out, and with it what only vouches through it."""
    kept = commit(store, [b"kept"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckptvcs.store.writer._SECTION_BYTES", 1)
        dead = commit(store, [noise(1, 500), noise(2, 500)], None, "refs/heads/dead")
        child = commit(store, [b"kept"], dead.id, "refs/heads/dead", "child of a dead one")
    assert store.update([Move("refs/heads/dead", child.id, None)], who="t", why="delete")
    with store.snapshot() as snapshot:
        row = snapshot.row(chunk_id(dead.contents[1]))
    assert row is not None
    store.layout.pack(row.pack).unlink()
    store, _ = rebuilt(store)
    with store.snapshot() as snapshot:
        assert snapshot.row(dead.id) is None
        assert snapshot.row(child.id) is None, "its parent's closure is not whole"
        assert snapshot.row(kept.id) is not None
        assert snapshot.row(chunk_id(dead.contents[0])) is not None, "a chunk vouches for nothing but itself"
    verify(store)
    made = commit(store, list(dead.contents), kept.id)
    assert contents(store, made.id) == dead.contents
    store.close()


# -- which of several frames ----------------------------------------------------------------------

A, B, C, D = (chunk_id(bytes([i])) for i in range(4))
ONE, TWO, THREE = (PackName(bytes([i]) * 16, 1) for i in range(3))


def candidates(*places: tuple[ObjectId, PackName, int, ObjectId | None]) -> _Candidates:
    found = _Candidates()
    for id, pack, offset, base in places:
        entry = Entry(offset, Kind.CHUNK, 240 if base else 0, 1, 10, 10, id, base)
        found.entries.setdefault(id, []).append((pack, entry))
    return found


def chosen(*places: tuple[ObjectId, PackName, int, ObjectId | None]) -> tuple[dict[ObjectId, Row], Rebuilt]:
    report = Rebuilt()
    return _choose(candidates(*places), report, lambda *_: True), report


def test_plain_frames_are_preferred() -> None:
    rows, report = chosen((A, ONE, 0, None), (B, ONE, 200, A), (B, THREE, 0, None))
    assert (rows[B].pack, rows[B].base, rows[B].depth) == (THREE, None, 0)
    assert report.left_out == 0


def test_ties_go_by_pack_name_and_offset() -> None:
    rows, _ = chosen((A, TWO, 0, None), (A, ONE, 300, None), (A, ONE, 100, None))
    assert (rows[A].pack, rows[A].offset) == (ONE, 100)
    rows, _ = chosen((A, ONE, 0, None), (B, THREE, 5, A), (B, TWO, 9, A), (B, TWO, 7, A))
    assert (rows[B].pack, rows[B].offset) == (TWO, 7)


def test_the_shortest_chain_is_preferred() -> None:
    rows, _ = chosen((A, ONE, 0, None), (B, ONE, 1, A), (C, ONE, 2, B), (C, TWO, 0, A), (D, ONE, 3, C))
    assert {id: row.depth for id, row in rows.items()} == {A: 0, B: 1, C: 1, D: 2}
    assert rows[C].pack == TWO


def test_circles_and_missing_bases_are_left_out() -> None:
    rows, report = chosen((A, ONE, 0, B), (B, ONE, 1, A), (C, ONE, 2, C), (D, TWO, 0, A))
    assert rows == {}
    assert report.left_out == 4
    assert "4 frames have no base" in report.problems[0]
    rows, report = chosen((A, ONE, 0, B), (B, ONE, 1, A), (B, TWO, 0, None))
    assert {id: row.depth for id, row in rows.items()} == {A: 1, B: 0}
    assert report.problems == []


def test_a_chain_that_is_too_long_is_left_out() -> None:
    ids = [chunk_id(b"%d" % i) for i in range(11)]
    rows, report = chosen((ids[0], ONE, 0, None), *((ids[i], ONE, i, ids[i - 1]) for i in range(1, 11)))
    assert [rows[id].depth for id in ids[:9]] == list(range(9))
    assert report.left_out == 2


def test_a_difference_whose_plain_twin_is_damaged(store: Store) -> None:
    """The rebuilt row falls back to the other frame of the same chunk."""
    raw, base = noise(1, 400), noise(2, 400)

    def pack(*frames: Frame) -> Path:
        writer = PackWriter(Disk(), Layout(store.layout.root), store.lease.next_pack())
        for frame in frames:
            writer.append(frame)
        writer.seal()
        return store.layout.pack(writer.name)

    def plain(data: bytes) -> Frame:
        return make_frame(Kind.CHUNK, object_id(Kind.CHUNK, data), 0, 1, len(data), data)

    pack(plain(base))
    pack(delta_frame(raw, base))
    twin = pack(plain(raw))
    with registered():
        store, _ = rebuilt(store)
        with store.snapshot() as snapshot:
            row = snapshot.row(chunk_id(raw))
        assert row is not None
        assert row.base is None
        twin.chmod(0o644)
        data = bytearray(twin.read_bytes())
        data[150] ^= 1
        data[-1] ^= 1
        twin.write_bytes(data)
        store, _ = rebuilt(store)
        with store.snapshot() as snapshot:
            row = snapshot.row(chunk_id(raw))
        assert row is not None
        assert (row.base, row.depth) == (chunk_id(base), 1)
        with store.reader() as reader:
            assert reader.chunk(chunk_id(raw)) == raw
        store.close()
