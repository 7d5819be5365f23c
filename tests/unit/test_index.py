"""The index: tables, transactions, sharing between handles, forks and processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.disk import Disk
from ckptvcs.errors import CorruptionError, FormatError, LockedError, NotFoundError, StorageError
from ckptvcs.ids import Kind, ObjectId, chunk_id
from ckptvcs.store import index as index_module
from ckptvcs.store.format import MAX_OBJECT, MAX_STORED, PackName
from ckptvcs.store.index import TABLES, Index, PackInfo, Row, Snapshot, present
from ckptvcs.store.journal import Drop, Expire, Fork, LogEntry, Move, Note, Pin, Status

ONE, TWO, THREE = (chunk_id(b"%d" % i) for i in range(3))
PACK = PackName(bytes(range(16)), 3)
ROW = Row(Kind.COMMIT, 1, 4, 0, 100, 50, 2**40, PACK)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    folder = tmp_path / "meta"
    folder.mkdir()
    made = Index.create(Disk(), folder, "id")
    yield made
    made.close()


def in_child(action: Callable[[], object]) -> None:
    """Run `action` in a forked child; it must not raise."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def put(index: Index, id: ObjectId, row: Row = ROW) -> None:
    with index.change() as change:
        change.put_row(id, row)


def row_of(index: Index, id: ObjectId) -> Row | None:
    with index.snapshot() as snapshot:
        return snapshot.row(id)


# -- rows -----------------------------------------------------------------------------------------

octets = st.integers(0, 255)
rows = st.builds(
    Row,
    st.sampled_from(Kind),
    octets,
    octets,
    st.integers(0, 65535),
    st.integers(0, MAX_OBJECT),
    st.integers(0, MAX_STORED),
    st.integers(0, 2**64 - 1),
    st.builds(PackName, st.binary(min_size=16, max_size=16), st.integers(0, 2**32 - 1)),
    st.none() | st.binary(min_size=32, max_size=32).map(ObjectId),
    st.booleans(),
)


@given(rows)
def test_rows_round_trip(row: Row) -> None:
    assert Row.decode(ONE, row.encode()) == row


@given(rows, st.data())
def test_every_flip_in_a_row_is_seen(row: Row, data: st.DataObject) -> None:
    encoded = bytearray(row.encode())
    bit = data.draw(st.integers(0, len(encoded) * 8 - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptionError, match=f"the index row of {ONE.short} is damaged"):
        Row.decode(ONE, bytes(encoded))


@pytest.mark.parametrize("size", [0, 3, 4, 20, len(ROW.encode()) - 1])
def test_short_rows(size: int) -> None:
    with pytest.raises(CorruptionError):
        Row.decode(ONE, ROW.encode()[:size])


@pytest.mark.parametrize(
    "body",
    [
        ROW.encode()[:-4] + b"x",
        ROW._replace(base=ONE).encode()[:-5],
        ROW._replace(base=ONE).encode()[:3] + b"\x00" + ROW._replace(base=ONE).encode()[4:-4],
        ROW.encode()[:3] + b"\x04" + ROW.encode()[4:-4],
    ],
    ids=["longer", "half a base", "a base that no flag names", "an unknown flag"],
)
def test_impossible_rows_with_a_right_checksum(body: bytes) -> None:
    with pytest.raises(CorruptionError, match="is impossible"):
        Row.decode(TWO, body + zlib.crc32(body).to_bytes(4, "little"))


def test_rotten_rows_are_not_used(index: Index) -> None:
    with index.change() as change:
        change._put("rows", ONE, ROW.encode()[:-1] + b"?")
    with index.snapshot() as snapshot:
        with pytest.raises(CorruptionError):
            snapshot.row(ONE)
        with pytest.raises(CorruptionError):
            snapshot.rows_from(b"", 10)


def test_rows(index: Index) -> None:
    ids = sorted(chunk_id(b"row%d" % i) for i in range(50))
    with index.change() as change:
        for number, id in enumerate(ids):
            change.put_row(id, ROW._replace(offset=number, damaged=number == 7))
    with index.snapshot() as snapshot:
        assert snapshot.row(ids[3]) == ROW._replace(offset=3)
        assert snapshot.row(ONE) is None
        assert snapshot.row(ids[7]) is not None
        assert snapshot.live(ids[7]) is None, "nobody may rely on a damaged record"
        assert present(snapshot, [*ids, ONE]) == set(ids) - {ids[7]}
        walked: list[ObjectId] = []
        start = b""
        while part := snapshot.rows_from(start, 7):
            walked += [id for id, _ in part]
            start = walked[-1] + b"\0"
        assert walked == ids
        assert snapshot.ids_with_prefix(ids[5][:6], 10) == [(ids[5], Kind.COMMIT)]
        assert [id for id, _ in snapshot.ids_with_prefix(b"", 20)] == ids[:20]
        assert snapshot.ids_with_prefix(b"\xff" * 32, 10) == []
    with index.change() as change:
        assert change.delete_row(ids[0])
        assert not change.delete_row(ids[0])
        assert change.row(ids[0]) is None
    assert row_of(index, ids[0]) is None


def test_packs_and_numbers(index: Index) -> None:
    other = PackName(bytes(range(16)), 2**32 - 1)
    with index.change() as change:
        change.put_pack(other, PackInfo(2**40, 7))
        change.put_pack(PACK, PackInfo(1, 2))
        change.bump_gc_seq()
        change.bump_gc_seq()
    with index.snapshot() as snapshot:
        assert snapshot.pack(PACK) == PackInfo(1, 2)
        assert list(snapshot.packs().items()) == [(PACK, PackInfo(1, 2)), (other, PackInfo(2**40, 7))]
        assert snapshot.gc_seq() == 2
        assert snapshot.position() == 0
    with index.change() as change:
        change.delete_pack(PACK)
        assert change.pack(PACK) is None


# -- log, refs, annotations -----------------------------------------------------------------------


def test_the_log_and_what_it_does(index: Index) -> None:
    with index.change() as change:
        first = change.record(1, "me", "one", [Move("HEAD", None, "refs/heads/main")], {"n": 1})
        change.record(2, "me", "two", [Move("refs/heads/main", None, ONE), Move("refs/heads/x", None, TWO)])
        change.record(3, "me", "notes", [Note(ONE, "a", 1.5), Note(ONE, "b", "text"), Note(TWO, "a", None)])
        change.record(4, "me", "pins", [Pin(ONE, True), Pin(TWO, True), Pin(TWO, False)])
        change.record(5, "me", "drops", [Drop(ONE, ("b",)), Drop(ONE, ("a", "b")), Drop(TWO, ())])
        change.record(6, "me", "drops", [Drop(TWO, ("c",))])
        change.record(
            7, "me", "status", [Status("main", "running"), Status("x", "failed"), Status("x", None)]
        )
    with index.snapshot() as snapshot:
        assert snapshot.position() == 7
        assert snapshot.refs() == {"HEAD": "refs/heads/main", "refs/heads/main": ONE, "refs/heads/x": TWO}
        assert snapshot.refs("refs/heads/m") == {"refs/heads/main": ONE}
        assert snapshot.ref("refs/heads/x") == TWO
        assert snapshot.ref("refs/heads") is None
        assert snapshot.notes(ONE) == {"a": 1.5, "b": "text"}
        assert snapshot.notes(TWO) == {}
        assert snapshot.pins() == {ONE}
        assert snapshot.drops(ONE) == ("a", "b")
        assert snapshot.drops(TWO) == (), "all of it stays all of it"
        assert snapshot.drops(THREE) is None
        assert snapshot.status() == {"main": "running"}
        log = list(snapshot.log())
        assert [entry.position for entry in log] == [1, 2, 3, 4, 5, 6, 7]
        assert log[0] == first == LogEntry(1, 1, "me", "one", first.operations, {"n": 1})
        assert list(snapshot.log(after=5)) == log[5:]
        assert list(snapshot.log(after=7)) == []
        assert list(snapshot.log_backwards()) == log[::-1]
    with index.change() as change:
        change.record(8, "me", "fork", [Fork("x", ONE, {"a": [1, "b"]}), Fork("y", ONE, {})])
    with index.snapshot() as snapshot:
        assert snapshot.fork("x") == (ONE, {"a": [1, "b"]})
        assert snapshot.fork("main") is None
    with index.change() as change:
        change.record(9, "me", "fork", [Fork("x", None, {})])
    with index.snapshot() as snapshot:
        assert snapshot.fork("x") is None
        assert snapshot.fork("y") == (ONE, {})
    with index.change() as change:
        change.record(10, "me", "gone", [Move("refs/heads/x", TWO, None), Note(ONE, "a", None), Expire(8)])
    with index.snapshot() as snapshot:
        assert snapshot.ref("refs/heads/x") is None
        assert snapshot.notes(ONE) == {"b": "text"}
        assert [entry.position for entry in snapshot.log()] == [8, 9, 10]
        assert [entry.position for entry in snapshot.log_backwards()] == [10, 9, 8]


def test_tables_do_not_run_into_each_other(index: Index) -> None:
    """Every table holds the lowest and the highest key, and each walk keeps to its own."""
    assert len(set(TABLES.values())) == len(TABLES)
    keys = [b"\0", b"\xff" * 40]
    with index.change() as change:
        before = change.dump()
        for table in TABLES:
            for key in keys:
                change._put(table, key, table.encode())
    with index.snapshot() as snapshot:
        for table, found in snapshot.dump().items():
            expected = {**before[table], **dict.fromkeys(keys, table.encode())}
            assert found == expected
            assert list(found) == sorted(found)


def test_an_empty_log_backwards(index: Index) -> None:
    with index.snapshot() as snapshot:
        assert list(snapshot.log_backwards()) == []


def test_damaged_refs_are_said(index: Index) -> None:
    with index.change() as change:
        change._put("refs", b"refs/heads/main", b"\x00short")
    with index.snapshot() as snapshot, pytest.raises(CorruptionError, match="its table refs"):
        snapshot.ref("refs/heads/main")


# -- transactions ---------------------------------------------------------------------------------


Read = Callable[[Snapshot], object]
ROTTEN: dict[str, tuple[str, bytes, bytes, Read]] = {
    "a short pack": ("packs", PACK.key, b"\xff", lambda look: look.packs()),
    "one short pack": ("packs", PACK.key, b"\xff", lambda look: look.pack(PACK)),
    "a pack without a name": ("packs", b"x", bytes(12), lambda look: look.packs()),
    "a ref that is no text": ("refs", b"refs/heads/\xff", b"\x00" + ONE, lambda look: look.refs()),
    "a target that is no text": ("refs", b"HEAD", b"\x01\xff", lambda look: look.ref("HEAD")),
    "a note that is no text": ("notes", ONE + b"\xff", b"\x01", lambda look: look.notes(ONE)),
    "a note that is no value": ("notes", ONE + b"k", b"\xc1", lambda look: look.notes(ONE)),
    "a note that is a list": ("notes", ONE + b"k", b"\x91\x01", lambda look: look.notes(ONE)),
    "a short pin": ("pins", b"short", b"", lambda look: look.pins()),
    "drops that are a number": ("drops", ONE, b"\x01", lambda look: look.drops(ONE)),
    "drops that are numbers": ("drops", ONE, b"\x91\x01", lambda look: look.drops(ONE)),
    "a state that is no text": ("status", b"main", b"\xff", lambda look: look.status()),
    "a fork that is a number": ("forks", b"main", b"\x01", lambda look: look.fork("main")),
    "a short number": ("meta", b"gc_seq", b"\x01", lambda look: look.gc_seq()),
    "a row without an id": ("rows", b"short", ROW.encode(), lambda look: look.rows_from(b"", 9)),
    "an id without its end": ("rows", b"short", ROW.encode(), lambda look: look.ids_with_prefix(b"sh", 9)),
}


@pytest.mark.parametrize("name", ROTTEN)
def test_what_nobody_writes_is_damage(index: Index, name: str) -> None:
    table, key, value, read = ROTTEN[name]
    with index.change() as change:
        change._put(table, key, value)
    with (
        index.snapshot() as snapshot,
        pytest.raises(CorruptionError, match=f"in its table {table} ") as found,
    ):
        read(snapshot)
    assert "--rebuild" in str(found.value.hint)


def test_the_count_of_collections_starts_anew_at_its_end(index: Index) -> None:
    with index.change() as change:
        change._put("meta", b"gc_seq", b"\xff" * 8)
        change.bump_gc_seq()
        assert change.gc_seq() == 0


def test_a_change_happens_whole_or_not_at_all(index: Index) -> None:
    def broken() -> None:
        with index.change() as change:
            change.put_row(ONE, ROW)
            change.record(1, "me", "x", [Move("refs/heads/main", None, ONE)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    with index.snapshot() as snapshot:
        assert snapshot.row(ONE) is None
        assert snapshot.position() == 0
    put(index, ONE)


def test_a_snapshot_stands_still(index: Index) -> None:
    with index.snapshot() as snapshot:
        thread = threading.Thread(target=put, args=(index, ONE))
        thread.start()
        thread.join()
        assert snapshot.row(ONE) is None
    assert row_of(index, ONE) == ROW


def test_what_a_snapshot_gave_outlives_it(index: Index) -> None:
    put(index, ONE)
    with index.snapshot() as snapshot:
        row, dump = snapshot.row(ONE), snapshot.dump()
    put(index, ONE, ROW._replace(offset=1))
    assert row == ROW
    assert dump["rows"] == {ONE: ROW.encode()}


def test_the_recorder_hears_of_commits_only(tmp_path: Path) -> None:
    heard: list[Path] = []

    class Hearing(Disk):
        def index_committed(self, path: Path) -> None:
            heard.append(path)

    (tmp_path / "meta").mkdir()
    index = Index.create(Hearing(), tmp_path / "meta", "id")
    assert heard == [tmp_path / "meta" / "data.mdb"]
    with pytest.raises(ZeroDivisionError), index.change():
        _ = 1 / 0
    with index.snapshot():
        pass
    assert len(heard) == 1
    index.close()


# -- handles and processes ------------------------------------------------------------------------


def test_handles_share_one_environment(index: Index, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "meta")
    other = Index.open(Disk(), tmp_path / "meta", "id")
    third = Index.open(Disk(), tmp_path / "link", "id")
    assert index._shared is other._shared is third._shared
    assert index._shared is not None
    key = index._shared.key
    put(index, ONE)
    assert row_of(third, ONE) == ROW
    index.close()
    index.close()
    put(other, TWO)
    other.close()
    assert row_of(third, TWO) == ROW
    third.close()
    assert key not in index_module._open
    again = Index.open(Disk(), tmp_path / "meta", "id")
    assert row_of(again, ONE) == ROW
    again.close()


def test_the_wrong_index_or_none(index: Index, tmp_path: Path) -> None:
    with pytest.raises(CorruptionError, match="index of another repository"):
        Index.open(Disk(), tmp_path / "meta", "other")
    with pytest.raises(NotFoundError, match="holds no index"):
        Index.open(Disk(), tmp_path / "nowhere", "id")
    assert row_of(index, ONE) is None
    shared = index._shared
    assert shared is not None
    assert shared.users == 1


def test_parent_and_child_both_go_on(index: Index) -> None:
    put(index, ONE)

    def child() -> None:
        assert row_of(index, ONE) == ROW
        put(index, TWO)
        assert row_of(index, TWO) == ROW
        with index.change() as change:
            change.put_row(ONE, ROW)

    with index.snapshot() as snapshot:
        in_child(child)  # forked inside a read transaction
        assert snapshot.row(TWO) is None
    assert row_of(index, TWO) == ROW
    put(index, THREE)
    in_child(lambda: [row_of(index, id) for id in (ONE, TWO, THREE)].index(ROW))
    in_child(index.close)
    put(index, ONE, ROW._replace(offset=9))
    assert row_of(index, ONE) == ROW._replace(offset=9)


def test_grandchildren(index: Index) -> None:
    def child() -> None:
        put(index, ONE)
        in_child(lambda: put(index, TWO))
        assert row_of(index, TWO) == ROW

    in_child(child)
    assert row_of(index, ONE) == row_of(index, TWO) == ROW


def test_a_fork_does_not_wait_for_the_parents_threads(index: Index) -> None:
    """Another thread may hold the module's lock at the moment of the fork."""
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with index_module._open_lock:
            held.set()
            release.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    try:
        in_child(lambda: put(index, ONE))
    finally:
        release.set()
        thread.join()
    assert row_of(index, ONE) == ROW


def test_two_processes(index: Index, tmp_path: Path) -> None:
    """A process of its own counts in turns with us; no increment is lost."""
    script = f"""
import sys
from pathlib import Path
from ckptvcs.disk import Disk
from ckptvcs.store.index import Index
index = Index.open(Disk(), Path({str(tmp_path / "meta")!r}), "id")
print("ready", flush=True)
for _ in range(100):
    with index.change() as change:
        change.bump_gc_seq()
index.close()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        for _ in range(100):
            with index.change() as change:
                change.bump_gc_seq()
        assert process.wait() == 0
    with index.snapshot() as snapshot:
        assert snapshot.gc_seq() == 200


def test_a_writer_killed_inside_a_transaction(index: Index) -> None:
    """Its lock is taken over and what it wrote is not there."""
    put(index, ONE)
    child = os.fork()
    if child == 0:
        with index.change() as change:
            change.delete_row(ONE)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert row_of(index, ONE) == ROW
    put(index, TWO)


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (lmdb.MapFullError("x"), StorageError, "is full"),
        (lmdb.ReadersFullError("x"), LockedError, "too many processes"),
        (lmdb.LockError("x"), LockedError, "cannot be locked"),
        (lmdb.Error("mdb_env_open: Resource temporarily unavailable"), LockedError, "cannot be locked"),
        (lmdb.VersionMismatchError("x"), FormatError, "another version of LMDB"),
        (lmdb.CorruptedError("x"), CorruptionError, "is damaged"),
        (lmdb.InvalidError("x"), CorruptionError, "is damaged"),
        (lmdb.Error("mdb_txn_commit: No space left on device"), StorageError, "the disk is full"),
        (lmdb.Error("mdb_txn_commit: Disk quota exceeded"), StorageError, "the disk is full"),
        (lmdb.Error("mdb_txn_commit: Input/output error"), StorageError, "Input/output error"),
    ],
)
def test_errors_are_ours(index: Index, error: Exception, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as caught, index.snapshot():
        raise error
    assert str(index.folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_io_error_on_a_full_disk_is_a_full_disk(tmp_path: Path) -> None:
    class Full(Disk):
        def free_bytes(self, path: Path) -> int:
            return 100

    (tmp_path / "meta").mkdir()
    index = Index.create(Full(), tmp_path / "meta", "id")
    with pytest.raises(StorageError, match="the disk is full") as caught, index.snapshot():
        raise lmdb.Error("mdb_txn_commit: Input/output error")
    assert caught.value.code == "disk-full"
    index.close()


def test_a_file_that_is_no_index(tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "data.mdb").write_bytes(b"not an LMDB file" * 1000)
    with pytest.raises(CorruptionError, match="is damaged") as caught:
        Index.open(Disk(), tmp_path / "meta", "id")
    assert caught.value.hint is not None
    assert "--rebuild" in caught.value.hint
    assert not index_module._open


def test_pack_info_is_a_value() -> None:
    assert replace(PackInfo(1, 2), records=3) == PackInfo(1, 3)


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "living"])
def test_a_full_table_of_readers_is_waited_for(index: Index, tmp_path: Path, killed: bool) -> None:
    """All places for read transactions are taken, by a process that is killed or one that lets them go."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            env = lmdb.open(str(tmp_path / "meta"), max_readers=1024, map_size=1 << 30)
            held = [env.begin() for _ in range(1024)]
            os.write(tell, b"x")
            time.sleep(60 if killed else 0.3)
            held.clear()
            time.sleep(60)
        finally:
            os._exit(1)
    try:
        assert os.read(ready, 1) == b"x"
        if killed:
            os.kill(child, signal.SIGKILL)
        with index.snapshot() as snapshot:
            assert snapshot.position() == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(tell)


def test_a_look_that_is_over_takes_no_place(index: Index) -> None:
    """However long somebody keeps the variable."""
    kept = []
    for _ in range(1100):
        with index.snapshot() as snapshot:
            kept.append(snapshot)
    assert len(kept) == 1100


def test_readers_that_never_let_go_are_named(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the end somebody has to be told."""
    monkeypatch.setattr(index_module, "_READERS_WAIT", 0.05)
    with contextlib.ExitStack() as stack:
        for _ in range(index_module._READERS):
            stack.enter_context(index.snapshot())
        with pytest.raises(LockedError, match="too many processes read"):
            stack.enter_context(index.snapshot())
