"""The store: what is put comes back, once; races and collectors lose nothing; base chains are bounded."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptvcs.disk import Disk
from ckptvcs.errors import (
    CkptError,
    CorruptionError,
    ExistsError,
    FormatError,
    InvalidError,
    LockedError,
    NoRepositoryError,
    NotFoundError,
    StorageError,
)
from ckptvcs.ids import Kind, ObjectId, chunk_id
from ckptvcs.store import Move, Note, Reader, Store
from ckptvcs.store.format import MAX_DEPTH, Format, pack_object, unpack_object
from ckptvcs.store.index import Row
from ckptvcs.store.reader import Link
from ckptvcs.testing.codecs import XOR, delta_frame, registered
from tests.crash.stores import (
    MAIN,
    Bytes,
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

MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with contextlib.closing(create(tmp_path)) as made:
        yield made


def packs(store: Store) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in files(store.layout.packs)}


def row_of(store: Store, id: ObjectId) -> Row | None:
    with store.snapshot() as snapshot:
        return snapshot.row(id)


def collect(store: Store, *ids: ObjectId) -> None:
    """What a collector does to rows, as far as a writer can see it."""
    with store.index.change() as change:
        change.bump_gc_seq()
        for id in ids:
            assert change.delete_row(id)


def everything_below(store: Store, root: ObjectId) -> dict[Kind, list[ObjectId]]:
    found: dict[Kind, list[ObjectId]] = {}
    waiting = [(Kind.COMMIT, root)]
    with store.reader() as reader:
        while waiting:
            kind, id = waiting.pop()
            found.setdefault(kind, []).append(id)
            if kind is not Kind.CHUNK:
                waiting += unpack_object(reader.objects(kind, [id])[0], "object")[0]
    return found


# -- life -----------------------------------------------------------------------------------------


def test_a_new_repository(tmp_path: Path) -> None:
    with contextlib.closing(create(tmp_path)) as store:
        with store.snapshot() as snapshot:
            assert snapshot.refs() == {"HEAD": MAIN}
            assert [entry.why for entry in snapshot.log()] == ["init"]
        assert verify(store) == 0
    root = tmp_path / ".ckpt"
    assert (root / ".gitignore").read_text() == "*\n"
    names = {"format", "config.toml", "refs.journal", "lock", "gc.lock", "packs.lock"}
    folders = {"meta", "packs", "incoming", "leases", "tmp", "quarantine"}
    assert set(os.listdir(root)) == {*names, *folders, ".gitignore"}
    assert os.listdir(tmp_path) == [".ckpt"]
    with pytest.raises(ExistsError, match="is a repository already"):
        create(tmp_path)
    assert os.listdir(tmp_path) == [".ckpt"]


def test_no_repository(tmp_path: Path) -> None:
    with pytest.raises(NoRepositoryError, match="no repository at") as caught:
        open_store(tmp_path)
    assert caught.value.hint is not None
    (tmp_path / "file").touch()
    with pytest.raises(NoRepositoryError):
        Store.open(tmp_path / "file" / ".ckpt", Disk())


def test_of_many_creators_one_wins(tmp_path: Path) -> None:
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            status = 9
            try:
                create(tmp_path).close()
                status = 0
            except ExistsError:
                status = 1
            finally:
                os._exit(status)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) == [0] + [1] * 7
    assert os.listdir(tmp_path) == [".ckpt"]
    with contextlib.closing(open_store(tmp_path)) as store:
        commit(store, [b"x"])


def test_leftovers_of_a_dead_creator_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".ckpt-init-abc" / "meta").mkdir(parents=True)
    (tmp_path / ".ckpt-mine").mkdir()
    create(tmp_path).close()
    assert sorted(os.listdir(tmp_path)) == [".ckpt", ".ckpt-mine"]


def test_an_idle_store_holds_nothing(store: Store, tmp_path: Path) -> None:
    made = commit(store, [noise(1, 3 * MIB)])
    assert contents(store, made.id) == made.contents
    open_files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd_open(fd)]
    assert not [path for path in open_files if path.endswith(".pack")]
    store.close()
    assert os.listdir(tmp_path / ".ckpt" / "leases") == []
    assert os.listdir(tmp_path / ".ckpt" / "tmp") == []
    with pytest.raises(CkptError, match="handle is closed") as caught, store.snapshot():
        pass
    assert caught.value.code == "closed"
    store.close()


def fd_open(fd: str) -> bool:
    try:
        os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return False
    return True


def test_a_repository_may_be_moved(store: Store, tmp_path: Path) -> None:
    made = commit(store, [b"moved"])
    store.close()
    os.rename(tmp_path / ".ckpt", tmp_path / "elsewhere")
    with contextlib.closing(Store.open(tmp_path / "elsewhere", Disk())) as moved:
        assert contents(moved, made.id) == made.contents


def test_an_index_of_another_repository_is_not_used(store: Store, tmp_path: Path) -> None:
    commit(store, [b"ours"])
    other = tmp_path / "other"
    other.mkdir()
    with contextlib.closing(create(other)) as second:
        theirs = commit(second, [b"theirs"])
    store.close()
    for name in ("data.mdb",):
        os.replace(tmp_path / ".ckpt" / "meta" / name, other / ".ckpt" / "meta" / name)
    with pytest.raises(CorruptionError, match="index of another repository"):
        Store.open(other / ".ckpt", Disk())
    with contextlib.closing(Store.open(other / ".ckpt", Disk(), rebuild=True)) as second:
        assert tips(second) == {MAIN: theirs.id}
        assert second.rebuilt is not None


@pytest.mark.parametrize(
    ("features", "refused"),
    [
        ({"write": ("new",)}, ["writer", "update"]),
        ({"gc": ("new",)}, ["collect"]),
        ({"read": ("new",)}, ["open"]),
    ],
    ids=["write", "gc", "read"],
)
def test_unknown_features(
    store: Store, tmp_path: Path, features: dict[str, tuple[str]], refused: list[str]
) -> None:
    made = commit(store, [b"x"])
    stamp = store.format
    store.close()
    changed = Format(stamp.repository, stamp.index, stamp.lmdb, stamp.grid, **features)
    (tmp_path / ".ckpt" / "format").write_bytes(changed.pack())
    if refused == ["open"]:
        with pytest.raises(FormatError, match="to read this repository"):
            open_store(tmp_path)
        return
    actions: dict[str, Callable[[Store], object]] = {
        "writer": lambda store: store.writer(),
        "update": lambda store: store.update([], who="", why=""),
        "collect": lambda store: store.collecting().__enter__(),
    }
    with contextlib.closing(open_store(tmp_path)) as store:
        assert contents(store, made.id) == made.contents
        for name in refused:
            with pytest.raises(FormatError, match="must know the feature new"):
                actions[name](store)


def test_one_collector_at_a_time(store: Store, tmp_path: Path) -> None:
    with contextlib.closing(open_store(tmp_path)) as other:
        with store.collecting(), pytest.raises(LockedError, match="collecting garbage"):
            other.collecting().__enter__()
        with other.collecting():
            pass


# -- content --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 4])
def test_put_and_read(tmp_path: Path, threads: int) -> None:
    parts = [b"", b"x", noise(1, 100), bytes(5 * MIB), noise(2, 2 * MIB), noise(3, 2 * MIB + 1), b"ab" * MIB]
    Store.create(tmp_path / ".ckpt", Disk(), config=b"", head=MAIN, who="t").close()
    with contextlib.closing(Store.open(tmp_path / ".ckpt", Disk(), threads=threads)) as store:
        made = commit(store, parts)
        assert contents(store, made.id) == tuple(parts)
        verify(store)
    with contextlib.closing(open_store(tmp_path)) as again:
        assert contents(again, made.id) == tuple(parts)


def test_chunks_are_cut_by_the_grid(store: Store) -> None:
    data = noise(1, 2 * MIB + 10)
    with store.writer() as writer:
        ((a, b, c), empty, (d,)) = writer.put([Bytes(data), Bytes(b""), Bytes(data[:MIB])])
    assert (a, b, c) == tuple(chunk_id(data[i : i + MIB]) for i in (0, MIB, 2 * MIB))
    assert empty == ()
    assert d == a


def test_the_same_content_is_stored_once(store: Store) -> None:
    data = noise(1, 3 * MIB)
    with store.writer() as writer:
        first, second = writer.put([Bytes(data), Bytes(data)])
        (third,) = writer.put([Bytes(data)])
        assert first == second == third
        tally = writer.tallies[""]
        assert (tally.new, tally.reused) == (len(data), 2 * len(data))
        assert len(data) < tally.stored < len(data) + 1000
        made = put_commit(writer, [data])
        assert writer.publish(publication(made.id, None))
    with store.snapshot() as snapshot:
        kinds = [row.kind for _, row in snapshot.rows_from(b"", 100)]
    assert sorted(kinds) == [Kind.CHUNK] * 3 + [Kind.TREE, Kind.COMMIT]
    assert sum(packs(store).values()) < len(data) + 2000


def test_an_unchanged_commit_stores_one_small_pack(store: Store) -> None:
    parts = [noise(i, 300_000) for i in range(5)]
    first = commit(store, parts)
    before = packs(store)
    second = commit(store, parts, first.id)
    new = {name: size for name, size in packs(store).items() if name not in before}
    assert len(new) == 1
    assert max(new.values()) < 500
    with store.snapshot() as snapshot:
        (row,) = [row for id, row in snapshot.rows_from(b"", 100) if id == second.id]
        assert len([1 for _, row in snapshot.rows_from(b"", 100) if row.kind is Kind.TREE]) == 1
    assert row.kind is Kind.COMMIT
    assert contents(store, second.id) == tuple(parts)


def test_nothing_unpublished_stays(store: Store, several_packs: None) -> None:
    with store.writer() as writer:
        put_commit(writer, [noise(1, 500), noise(2, 500), noise(3, 500)])
        assert list(files(store.layout.packs)) == []
        assert len(list(files(store.layout.temporary))) == 4
    assert packs(store) == {}
    assert list(files(store.layout.temporary)) == []
    assert verify(store) == 0
    assert tips(store) == {}


@pytest.fixture
def several_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptvcs.store.writer._SECTION_BYTES", 1)


def test_a_full_pack_is_sealed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptvcs.store.writer.PACK_LIMIT", 100_000)
    parts = [noise(i, 60_000) for i in range(7)]
    made = commit(store, parts)
    assert len(packs(store)) == 4
    assert contents(store, made.id) == tuple(parts)
    verify(store)


def test_a_state_that_changes_under_the_commit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(noise(1, 1000))
    real = chunk_id

    def meddling(raw: bytes) -> ObjectId:
        id = real(raw)
        data[0] ^= 1
        return id

    monkeypatch.setattr("ckptvcs.store.writer.chunk_id", meddling)
    with store.writer() as writer, pytest.raises(InvalidError, match="was changed while") as caught:
        writer.put([Bytes(data)])
    assert caught.value.code == "state-changed"


def test_an_object_too_large_for_a_record(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptvcs.store.writer.largest", lambda kind: 100)
    with store.writer() as writer, pytest.raises(InvalidError, match="too large; 100 is the most"):
        writer.put_objects(Kind.TREE, [pack_object([], bytes(200))])


# -- races ----------------------------------------------------------------------------------------


def test_a_lost_race_is_rescued(store: Store, tmp_path: Path) -> None:
    base = commit(store, [b"base"])
    with contextlib.closing(open_store(tmp_path)) as other, store.writer() as writer:
        made = put_commit(writer, [b"mine"], [base.id])
        winner = commit(other, [b"theirs"], base.id)
        assert not writer.publish(publication(made.id, base.id))
    rescued = f"refs/lost/main/{made.id.short}"
    assert tips(store) == {MAIN: winner.id, rescued: made.id}
    assert contents(store, made.id) == made.contents
    assert contents(store, winner.id) == winner.contents
    verify(store)
    with store.snapshot() as snapshot:
        entry = next(snapshot.log_backwards())
    assert entry.operations == (Move(rescued, None, made.id),)


def test_two_writers_of_the_same_chunk(store: Store, tmp_path: Path) -> None:
    """The second one's record becomes a gap: the live row is kept."""
    data = noise(1, 5000)
    with contextlib.closing(open_store(tmp_path)) as other, store.writer() as mine, other.writer() as theirs:
        first = put_commit(mine, [data], message="mine")
        second = put_commit(theirs, [data], message="theirs")
        assert theirs.publish(publication(second.id, None, "refs/heads/a"))
        row = row_of(store, chunk_id(data))
        assert mine.publish(publication(first.id, None, "refs/heads/b"))
        assert row_of(store, chunk_id(data)) == row
    verify(store)


def test_a_damaged_record_is_stored_again(store: Store) -> None:
    data = noise(1, 5000)
    first = commit(store, [data])
    row = row_of(store, chunk_id(data))
    assert row is not None
    with store.index.change() as change:
        change.put_row(chunk_id(data), row._replace(damaged=True))
    second = commit(store, [data, b"more"], first.id)
    healed = row_of(store, chunk_id(data))
    assert healed is not None
    assert not healed.damaged
    assert healed.pack != row.pack
    assert contents(store, second.id) == second.contents


def test_threads_commit_side_by_side(store: Store) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            tip = None
            for step in range(5):
                parts = [noise(step, 4000), noise(100 * number + step, 4000)]
                tip = commit(store, parts, tip, f"refs/heads/b{number}").id
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(tips(store)) == 4
    verify(store)


def test_a_forked_child_commits_too(store: Store) -> None:
    base = commit(store, [b"base"])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            made = commit(store, [b"child", noise(1, 3 * MIB)], base.id, "refs/heads/main")
            assert contents(store, made.id) == made.contents
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    tip = tips(store)[MAIN]
    assert contents(store, tip) == (b"child", noise(1, 3 * MIB))
    after = commit(store, [b"parent"], tip)
    assert contents(store, after.id) == (b"parent",)
    verify(store)


def test_a_lease_that_was_taken_away(store: Store) -> None:
    with store.writer() as writer:
        made = put_commit(writer, [b"x"])
        for path in files(store.layout.leases):
            path.unlink()
        with pytest.raises(StorageError, match="lease is gone"):
            writer.publish(publication(made.id, None))
    assert tips(store) == {}
    assert packs(store) == {}


# -- beside a collector ---------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["chunk", "object", "all"])
def test_collected_while_a_commit_is_made(store: Store, what: str) -> None:
    """What a commit reuses is deleted between its lookup and its publication: it is written again."""
    parts = [noise(1, 3000), noise(2, MIB + 5)]
    old = commit(store, parts)
    assert store.update([Move(MAIN, old.id, None)], who="t", why="delete")
    below = everything_below(store, old.id)
    with store.writer() as writer:
        made = put_commit(writer, parts, message="again")
        collect(
            store,
            old.id,
            *(below[Kind.CHUNK][:1] if what == "chunk" else []),
            *(below[Kind.TREE] if what == "object" else []),
            *(below[Kind.TREE] + below[Kind.CHUNK] if what == "all" else []),
        )
        assert writer.publish(publication(made.id, None))
    assert tips(store) == {MAIN: made.id}
    assert contents(store, made.id) == tuple(parts)
    verify(store)


def test_collected_twice_while_a_commit_is_made(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between the first look and the second."""
    parts = [noise(1, 3000), noise(2, 3000)]
    old = commit(store, parts)
    store.update([Move(MAIN, old.id, None)], who="t", why="delete")
    below = everything_below(store, old.id)
    again: list[ObjectId] = [below[Kind.CHUNK][1]]
    with store.writer() as writer:
        made = put_commit(writer, parts, message="again")
        collect(store, old.id, below[Kind.CHUNK][0])
        seal = writer._seal

        def sealing() -> None:
            seal()
            if len(writer._sealed) == 2 and again:
                collect(store, again.pop())

        monkeypatch.setattr(writer, "_seal", sealing)
        assert writer.publish(publication(made.id, None))
    assert not again
    assert contents(store, made.id) == tuple(parts)
    verify(store)


def test_collection_elsewhere_costs_nothing(store: Store) -> None:
    first = commit(store, [noise(1, 3000)])
    before = packs(store)
    with store.writer() as writer:
        made = put_commit(writer, [noise(1, 3000)], [first.id])
        with store.index.change() as change:
            change.bump_gc_seq()
        assert writer.publish(publication(made.id, first.id))
    assert len(packs(store)) == len(before) + 1
    verify(store)


def test_a_reused_tree_whose_chunk_is_gone(store: Store) -> None:
    """The writer never saw the chunk's bytes, so it cannot write it again and says so."""
    old = commit(store, [noise(1, 3000)])
    below = everything_below(store, old.id)
    with store.writer() as writer:
        root = put_root(writer, below[Kind.TREE][0], message="reuses the tree")
        collect(store, below[Kind.CHUNK][0])
        with pytest.raises(NotFoundError, match="was collected while a commit that reuses it"):
            writer.publish(publication(root, old.id))
    assert tips(store) == {MAIN: old.id}


def test_a_parent_that_is_gone(store: Store) -> None:
    old = commit(store, [b"old"])
    other = commit(store, [b"other"], None, "refs/heads/other")
    with store.writer() as writer:
        made = put_commit(writer, [b"new"], [old.id, other.id])
        store.update([Move("refs/heads/other", other.id, None)], who="t", why="delete")
        collect(store, other.id)
        with pytest.raises(NotFoundError, match=f"parent commit {other.id.short} is no longer stored"):
            writer.publish(publication(made.id, old.id, require=[old.id, other.id]))
    assert tips(store) == {MAIN: old.id}
    with store.writer() as writer:
        made = put_commit(writer, [b"new"], [old.id])
        chunk = everything_below(store, old.id)[Kind.CHUNK][0]
        with pytest.raises(NotFoundError, match="no longer stored"):  # a row, but not of a commit
            writer.publish(publication(made.id, old.id, require=[chunk]))


# -- refs -----------------------------------------------------------------------------------------


def test_update_compares_and_sets(store: Store) -> None:
    first = commit(store, [b"1"])
    second = commit(store, [b"2"], first.id)
    a, b = "refs/heads/a", "refs/heads/b"
    assert store.update([Move(a, None, first.id), Move(b, None, second.id)], who="me", why="branch")
    before = tips(store)
    assert store.update([Move(a, first.id, second.id), Move(b, first.id, None)], who="me", why="x") is None
    assert store.update([Move(a, None, second.id)], who="me", why="x") is None
    assert tips(store) == before, "all of an update, or none"
    entry = store.update([Move(a, first.id, None), Note(first.id, "n", 1)], who="me", why="y", info={"k": 1})
    assert entry is not None
    assert (entry.who, entry.why, entry.info) == ("me", "y", {"k": 1})
    assert tips(store) == {MAIN: second.id, b: second.id}
    chunk = everything_below(store, first.id)[Kind.CHUNK][0]
    for missing in (chunk_id(b"nothing"), chunk):
        with pytest.raises(NotFoundError, match="is no longer stored"):
            store.update([Move("refs/tags/t", None, missing)], who="me", why="tag")
    journal = (store.layout.journal).read_bytes()
    assert journal.count(b"\n") == entry.position


def test_a_journal_ahead_of_the_index_is_refused(store: Store, tmp_path: Path) -> None:
    """An index that was put back from an older copy has lost changes; that is not hidden."""
    commit(store, [b"1"])
    data = store.layout.meta / "data.mdb"
    old = data.read_bytes()
    commit(store, [b"2"], tips(store)[MAIN])
    store.close()
    data.write_bytes(old)
    with pytest.raises(CorruptionError, match="is ahead of the index") as caught:
        open_store(tmp_path)
    assert caught.value.hint is not None
    assert "--rebuild" in caught.value.hint


# -- reading --------------------------------------------------------------------------------------


def test_reading_what_is_not_there(store: Store) -> None:
    made = commit(store, [b"x" * 100])
    tree = everything_below(store, made.id)[Kind.TREE][0]
    chunk = chunk_id(b"x" * 100)
    with store.reader() as reader:
        with pytest.raises(CorruptionError, match="is referred to but not stored"):
            reader.objects(Kind.TREE, [chunk_id(b"nothing")])
        with pytest.raises(CorruptionError, match="is a tree, not a commit"):
            reader.objects(Kind.COMMIT, [tree])
        with pytest.raises(CorruptionError, match="2 chunks are listed for 100 bytes"):
            reader.read_into([([chunk, chunk], memoryview(bytearray(100)))])
        with pytest.raises(CorruptionError, match="where a chunk of 99 belongs"):
            reader.read_into([([chunk], memoryview(bytearray(99)))])
        with pytest.raises(CorruptionError, match="is a tree of"):
            reader.read_into([([tree], memoryview(bytearray(100)))])
        assert reader.objects(Kind.TREE, []) == []
        reader.read_into([])


def test_a_pack_that_is_missing(store: Store) -> None:
    made = commit(store, [noise(1, 500)])
    for path in files(store.layout.packs):
        path.unlink()
    with pytest.raises(CorruptionError, match=r"the pack .* is missing; it holds the commit") as caught:
        contents(store, made.id)
    assert caught.value.path is not None
    assert caught.value.id == str(made.id)


def test_a_record_moved_by_compaction_while_it_is_read(store: Store) -> None:
    data = noise(1, 2000)
    first = commit(store, [data])
    row = row_of(store, chunk_id(data))
    assert row is not None
    with store.index.change() as change:
        change.put_row(chunk_id(data), row._replace(damaged=True))
    commit(store, [data], first.id, message="a second copy")
    new = row_of(store, chunk_id(data))
    assert new is not None
    assert new.pack != row.pack
    store.layout.pack(row.pack).unlink()
    with store.reader() as reader:
        buffer = bytearray(len(data))
        reader._fill((Link(chunk_id(data), row),), memoryview(buffer))
        assert buffer == data


def test_deleted_while_it_is_read(store: Store) -> None:
    data = noise(1, 2000)
    commit(store, [data])
    row = row_of(store, chunk_id(data))
    assert row is not None
    collect(store, chunk_id(data))
    store.layout.pack(row.pack).unlink()
    with store.reader() as reader, pytest.raises(NotFoundError, match="deleted while it was being read"):
        reader._fill((Link(chunk_id(data), row),), memoryview(bytearray(len(data))))


# -- base chains ----------------------------------------------------------------------------------


@pytest.fixture
def xor() -> Iterator[None]:
    with registered():
        yield


def versions(count: int) -> list[bytes]:
    return [noise(1, 1000)[:-4] + number.to_bytes(4, "big") for number in range(count)]


def put_chain(store: Store, raws: list[bytes], old: ObjectId | None = None) -> ObjectId:
    """Each chunk a difference to the one before, the first plain unless it is stored already."""
    with store.writer() as writer:
        writer.put([Bytes(raws[0])])
        for base, raw in itertools.pairwise(raws):
            writer.put_frame(chunk_id(raw), delta_frame(raw, base))
        references = [(Kind.CHUNK, chunk_id(raws[-1]))]
        (tree,) = writer.put_objects(Kind.TREE, [pack_object(references, b"\x91\x92\x01\xcd\x03\xe8")])
        root = put_root(writer, tree, [old] if old else [])
        assert writer.publish(publication(root, old))
    return root


@pytest.mark.usefixtures("xor")
def test_a_chain_of_differences(store: Store) -> None:
    raws = versions(MAX_DEPTH + 1)
    root = put_chain(store, raws)
    for depth, raw in enumerate(raws):
        row = row_of(store, chunk_id(raw))
        assert row is not None
        assert row.depth == depth
        assert row.codec == (XOR if depth else 0)
        assert row.base == (chunk_id(raws[depth - 1]) if depth else None)
        with store.reader() as reader:
            assert reader.chunk(chunk_id(raw)) == raw
    assert contents(store, root) == (raws[-1],)
    verify(store)


@pytest.mark.usefixtures("xor")
@pytest.mark.parametrize("split", [False, True], ids=["in one commit", "onto a stored chain"])
def test_a_chain_that_is_too_long(store: Store, split: bool) -> None:
    raws = versions(MAX_DEPTH + 2)
    old = put_chain(store, raws[:-1]) if split else None
    before = packs(store)
    with pytest.raises((StorageError, NotFoundError), match=chunk_id(raws[-1]).short):
        put_chain(store, raws[-2:] if split else raws, old)
    assert packs(store) == before
    assert tips(store) == ({MAIN: old} if old else {})
    assert row_of(store, chunk_id(raws[-1])) is None


@pytest.mark.usefixtures("xor")
def test_a_missing_base(store: Store) -> None:
    base, raw = versions(2)
    with store.writer() as writer:
        writer.put_frame(chunk_id(raw), delta_frame(raw, base))
        (tree,) = writer.put_objects(Kind.TREE, [pack_object([(Kind.CHUNK, chunk_id(raw))], b"\x90")])
        root = put_root(writer, tree)
        with pytest.raises((StorageError, NotFoundError), match=chunk_id(raw).short):
            writer.publish(publication(root, None))
    assert tips(store) == {}
    assert verify(store) == 0


@pytest.mark.usefixtures("xor")
def test_bases_that_are_their_own_bases(store: Store) -> None:
    one, two = versions(2)
    with store.writer() as writer:
        writer.put_frame(chunk_id(one), delta_frame(one, two))
        writer.put_frame(chunk_id(two), delta_frame(two, one))
        (tree,) = writer.put_objects(Kind.TREE, [pack_object([(Kind.CHUNK, chunk_id(one))], b"\x90")])
        root = put_root(writer, tree)
        with pytest.raises((StorageError, NotFoundError)):
            writer.publish(publication(root, None))
    assert verify(store) == 0


@pytest.mark.usefixtures("xor")
def test_a_base_collected_while_a_difference_is_made(store: Store) -> None:
    """A difference onto nothing is not published; what the writer has the bytes of is stored plain."""
    base, raw = versions(2)
    old = commit(store, [base])
    with store.writer() as writer:
        writer.put_frame(chunk_id(raw), delta_frame(raw, base))
        (tree,) = writer.put_objects(Kind.TREE, [pack_object([(Kind.CHUNK, chunk_id(raw))], b"\x90")])
        root = put_root(writer, tree)
        collect(store, chunk_id(base))
        with pytest.raises(NotFoundError, match="commit that reuses it was being made"):
            writer.publish(publication(root, None, "refs/heads/other"))
    assert tips(store) == {MAIN: old.id}


@pytest.mark.usefixtures("xor")
def test_a_reused_difference_whose_base_is_collected(store: Store) -> None:
    """The row of the difference is there, its base is not: the commit stores the chunk plain."""
    base, raw = versions(2)
    old = put_chain(store, [base, raw])
    store.update([Move(MAIN, old, None)], who="t", why="delete")
    with store.writer() as writer:
        made = put_commit(writer, [raw])
        collect(store, chunk_id(base), old)
        assert writer.publish(publication(made.id, None))
    row = row_of(store, chunk_id(raw))
    assert row is not None
    assert (row.base, row.depth) == (None, 0)
    assert contents(store, made.id) == (raw,)


@pytest.mark.usefixtures("xor")
def test_a_lying_difference_is_never_returned(store: Store) -> None:
    base, raw = versions(2)
    wrong = delta_frame(raw, base)
    wrong = wrong._replace(header=wrong.header._replace(id=chunk_id(b"else")))
    with store.writer() as writer:
        writer.put([Bytes(base)])
        writer.put_frame(chunk_id(b"else"), wrong)
        (tree,) = writer.put_objects(Kind.TREE, [pack_object([(Kind.CHUNK, chunk_id(b"else"))], b"\x90")])
        assert writer.publish(publication(put_root(writer, tree), None))
    with store.reader() as reader, pytest.raises(CorruptionError, match="is damaged"):
        reader.chunk(chunk_id(b"else"))


def test_an_unknown_codec_is_named(store: Store) -> None:
    base, raw = versions(2)
    with registered():
        root = put_chain(store, [base, raw])
    with pytest.raises(FormatError, match=f"unknown codec {XOR}"):
        contents(store, root)


def test_a_reader_can_be_asked_what_it_read(store: Store) -> None:
    data = noise(1, 10_000)
    made = commit(store, [data])
    with store.reader() as reader:
        assert isinstance(reader, Reader)
        assert reader.bytes_read == 0
        reader.chunk(chunk_id(data))
        assert reader.bytes_read == len(data)
    assert contents(store, made.id) == (data,)
