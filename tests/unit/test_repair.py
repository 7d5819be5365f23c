"""Damage: named up to tensors and branches, healed by committing again, mended from copies, never hidden."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import CorruptionError, InvalidError, LockedError, ObjectId, Repo, StorageError
from ckptvcs.disk import ReadFile
from ckptvcs.ids import Kind
from ckptvcs.maintenance import compaction, scrub
from ckptvcs.maintenance.rewriting import Rewriter
from ckptvcs.state import tree
from ckptvcs.store import Row
from ckptvcs.store.codec import DIFFERENCE
from ckptvcs.store.format import HEADER_BYTES, TRAILER_BYTES

N = 12_000


def walk(steps: int, seed: int = 7) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(seed)
    start = random.standard_normal(N).astype(np.float32)
    for step in range(steps):
        start = (start + 1e-3 * np.random.default_rng((seed, step)).standard_normal(N)).astype(np.float32)
    return start


def rows(repo: Repo) -> dict[ObjectId, Row]:
    return {id: row for part in compaction.slices(repo._store) for id, row in part}


def chunk_of(repo: Repo, rev: str, path: str = "w") -> ObjectId:
    with repo._store.reader() as reader:
        return tree.held(reader, repo.resolve(rev).tree)[path].chunks[0]


def pack_of(repo: Repo, id: ObjectId) -> Path:
    return repo._store.layout.pack(rows(repo)[id].pack)


def flip(repo: Repo, id: ObjectId, at: int = HEADER_BYTES + 100) -> None:
    """Flip a bit of a record's payload."""
    row = rows(repo)[id]
    path = repo._store.layout.pack(row.pack)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(row.offset + at)
        byte = file.read(1)[0]
        file.seek(row.offset + at)
        file.write(bytes([byte ^ 0x20]))


@pytest.fixture
def trained(folder: Path) -> Iterator[Repo]:
    """Five commits, each a difference against the one before; and a branch with a tag of its own."""
    with Repo.init(folder, compression="small") as repo:
        for step in range(5):
            repo.commit({"w": walk(step), "frozen": walk(0, seed=1), "step": step}, step=step)
        side = repo.on("side")
        side.restore({}, "main@step:1", strict=False)
        side.commit({"other": walk(0, seed=5)})
        repo.tag("v1", "side")
        yield repo


def sound(repo: Repo, *steps: int) -> None:
    for step in steps:
        assert np.array_equal(repo.checkout(f"main@step:{step}", only="w")["w"], walk(step))


# -- what damage costs ----------------------------------------------------------------------------


def test_damage_is_told_from_chunk_to_refs(trained: Repo) -> None:
    chunks = [chunk_of(trained, f"main@step:{n}") for n in range(5)]
    flip(trained, chunks[3])
    report = trained.fsck(full=True)
    (problem,) = report.problems
    assert problem.id == str(chunks[3])
    # The fourth is a difference against the third.
    hurt = {str(trained.resolve(f"main@step:{n}").id) for n in (3, 4)}
    assert set(problem.commits) == hurt
    assert problem.refs == ("refs/heads/main",)
    assert problem.tensors == ("w",)
    assert "unreadable in them: w" in problem.message
    sound(trained, 0, 1, 2)
    flip(trained, chunk_of(trained, "main", "frozen"))
    found = trained.fsck(full=True)
    frozen = next(problem for problem in found.problems if problem.tensors == ("frozen",))
    assert len(frozen.commits) == 5
    assert set(frozen.refs) == {"refs/heads/main", "refs/heads/side", "refs/tags/v1"}


def test_messages_stay_short(folder: Path) -> None:
    with Repo.init(folder) as repo:
        state = {f"layer{n}": walk(0) for n in range(40)}
        for step in range(30):
            repo.commit({**state, "step": step}, step=step)
        flip(repo, chunk_of(repo, "main", "layer0"))
        (problem,) = repo.fsck(full=True).problems
        assert len(problem.commits) == 30
        assert len(problem.tensors) == 40
        assert "and 22 more" in problem.message
        assert "and 32 more" in problem.message
        assert len(problem.message) < 700


# -- levels ---------------------------------------------------------------------------------------


def test_quick_reads_no_record(trained: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a record was read")

    monkeypatch.setattr("ckptvcs.store.reader.Reader.objects", never)
    monkeypatch.setattr("ckptvcs.store.reader.Reader.chunk", never)
    report = trained.fsck(quick=True)
    assert report.ok, report.problems
    assert (report.level, report.refs, report.commits, report.packs) == ("quick", 4, 6, 6)
    assert report.records == len(rows(trained))


@pytest.mark.parametrize("what", ["missing", "cut", "footer", "tip", "row", "unknown pack", "marked"])
def test_quick_finds(trained: Repo, what: str) -> None:
    id = chunk_of(trained, "main")
    path = pack_of(trained, id)
    path.chmod(0o644)
    row = rows(trained)[id]
    if what == "missing":
        path.unlink()
    elif what == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif what == "footer":
        data = bytearray(path.read_bytes())
        data[-TRAILER_BYTES - 3] ^= 1
        path.write_bytes(data)
    else:
        with trained._store.index.change() as change:
            if what == "tip":
                change.delete_row(trained.resolve("side").id)
            elif what == "row":
                change.put_row(id, row._replace(offset=path.stat().st_size))
            elif what == "marked":
                change.put_row(id, row._replace(damaged=True))
            else:
                change.delete_pack(row.pack)
    report = trained.fsck(quick=True)
    assert report.problems
    assert all("\n" not in problem.message for problem in report.problems)


def test_levels_exclude_each_other(trained: Repo) -> None:
    for wanted in ({"full": True, "quick": True}, {"full": True, "budget": 10}, {"quick": True, "budget": 1}):
        with pytest.raises(InvalidError, match="exclude"):
            trained.fsck(**wanted)  # type: ignore[arg-type]


def test_a_quick_check_repairs_nothing(trained: Repo) -> None:
    with pytest.raises(InvalidError, match="too little"):
        trained.fsck(quick=True, repair=True)


# -- scrubbing ------------------------------------------------------------------------------------


def test_scrubbing_goes_on_where_it_stopped(trained: Repo) -> None:
    total = sum(HEADER_BYTES + row.stored for row in rows(trained).values())
    bad = chunk_of(trained, "main")
    flip(trained, bad)
    read, calls, found = 0, 0, []
    while True:
        report = trained.fsck(budget=20_000)
        assert report.scrubbed is not None
        assert report.level == "scrub"
        assert report.scrubbed.read < 20_000 + 60_000, "one record more than the budget at most"
        read += report.scrubbed.read
        calls += 1
        found.append(not report.ok)
        if report.scrubbed.rounds:
            break
        assert calls < 100
    assert calls > 3
    assert read == total, "each byte once"
    assert found[0] is False or calls > 1
    assert True in found
    assert found[-1], "a verdict stays until the record is sound"
    again = trained.fsck(budget="1GiB")
    assert again.scrubbed is not None
    assert (again.scrubbed.read, again.scrubbed.rounds) == (total, 2)
    assert again.as_dict()["scrub"] == {"read": total, "packs": 6, "of": 6, "rounds": 2}


def test_a_lost_or_damaged_place_begins_a_new_round(trained: Repo) -> None:
    trained.fsck(budget=1)
    place = trained._store.layout.scrubbed
    for content in (b"", b"{}", b"[" * 5000, b'{"done": 3, "pack": 1, "offset": "x", "rounds": 0}'):
        place.write_bytes(content)
        report = trained.fsck(budget="10GB")
        assert report.ok
        assert report.scrubbed is not None
        assert report.scrubbed.rounds == 1
    place.unlink()
    assert trained.fsck(budget="1h").ok


def test_budgets() -> None:
    assert scrub.budget_of("10GiB") == scrub.Budget(10 << 30)
    assert scrub.budget_of("1.5 MB") == scrub.Budget(1_500_000)
    assert scrub.budget_of("30m") == scrub.Budget(None, 1800.0)
    assert scrub.budget_of(77) == scrub.Budget(77)
    for wrong in ("ten", "10", "", "-1GB", "5X", True, -1):
        with pytest.raises(InvalidError, match="budget"):
            scrub.budget_of(wrong)


# -- healing by committing again ------------------------------------------------------------------


def test_committed_again_is_stored_again(trained: Repo) -> None:
    bad = chunk_of(trained, "main", "frozen")
    before = rows(trained)[bad]
    flip(trained, bad)
    trained.commit({"w": walk(5), "frozen": walk(0, seed=1), "step": 5}, step=5)
    assert rows(trained)[bad] == before, "nobody has seen the flipped bit yet"
    assert not trained.fsck(full=True)
    assert rows(trained)[bad].damaged
    trained.commit({"w": walk(6), "frozen": walk(0, seed=1), "step": 6}, step=6)
    after = rows(trained)[bad]
    assert not after.damaged
    assert after.pack != before.pack
    assert trained.fsck(full=True).ok
    sound(trained, 0, 1, 2, 3, 4)
    for step in range(5):
        assert np.array_equal(trained.checkout(f"main@step:{step}")["frozen"], walk(0, seed=1))


def test_a_default_check_marks_what_it_reads(trained: Repo) -> None:
    bad = trained.resolve("main").tree
    flip(trained, bad, HEADER_BYTES + 5)
    assert not trained.fsck()
    assert rows(trained)[bad].damaged
    trained.commit({"w": walk(4), "frozen": walk(0, seed=1), "step": 4}, step=4)
    assert trained.fsck(full=True).ok


@pytest.mark.parametrize("how", ["flipped", "pack missing"])
def test_what_rests_on_a_damaged_base_is_stored_again(trained: Repo, how: str) -> None:
    """The chunk itself is sound and cannot be read: a commit of it must not rely on it."""
    base, top = chunk_of(trained, "main@step:3"), chunk_of(trained, "main@step:4")
    assert rows(trained)[top].base == base
    if how == "flipped":
        flip(trained, base)
        assert not trained.fsck(full=True)
        assert rows(trained)[base].damaged
        assert not rows(trained)[top].damaged, "its own bytes are as they were"
    else:
        pack_of(trained, base).unlink()
    with pytest.raises(CorruptionError):
        trained.checkout("main@step:4")
    with Repo.open(trained.path, "again") as other:
        other.commit({"w": walk(4)})
        assert np.array_equal(other.checkout("again")["w"], walk(4))
        assert rows(other)[top].base is None
        assert np.array_equal(other.checkout("main@step:4")["w"], walk(4)), "and with it the old commit"
        other.commit({"w": walk(3)})
        assert np.array_equal(other.checkout("again")["w"], walk(3))
    if how == "flipped":
        assert trained.fsck(full=True).ok


def test_marks_go_when_the_record_is_sound(trained: Repo) -> None:
    bad = chunk_of(trained, "main")
    flip(trained, bad)
    assert not trained.fsck(full=True)
    assert rows(trained)[bad].damaged
    flip(trained, bad)  # the same bit back, as after a cable was changed
    assert trained.fsck().ok
    assert not rows(trained)[bad].damaged


def test_a_damaged_row_is_told_and_made_anew(trained: Repo) -> None:
    id = chunk_of(trained, "main")
    data = bytearray(rows(trained)[id].encode())
    data[20] ^= 1
    with trained._store.index.change() as change:
        change._put("rows", id, bytes(data))
    for level in ({}, {"full": True}, {"quick": True}):
        report = trained.fsck(**level)  # type: ignore[arg-type]
        assert any("index row" in problem.message for problem in report.problems)
    assert trained.fsck(full=True, repair=True).ok
    sound(trained, 0, 1, 2, 3, 4)
    assert trained.fsck(rebuild=True, full=True).ok
    sound(trained, 0, 1, 2, 3, 4)


# -- repair ---------------------------------------------------------------------------------------


def duplicate(repo: Repo, id: ObjectId) -> None:
    """Copy a record into another pack; the old bytes become a gap."""
    with repo._store.collecting(), Rewriter(repo._store) as rewriter:
        rewriter.copy(id, rows(repo)[id])
        assert rewriter.publish() == 1


def test_repaired_from_a_copy(trained: Repo) -> None:
    for rev, path in (("main", "w"), ("main", "frozen"), ("main@step:2", "w")):
        duplicate(trained, chunk_of(trained, rev, path))
        flip(trained, chunk_of(trained, rev, path))
    ids = (trained.resolve("main").id, trained.resolve("main").tree)
    for id in ids:
        duplicate(trained, id)
        flip(trained, id, HEADER_BYTES + 3)
    assert not trained.fsck(full=True)
    before = {path: path.read_bytes() for path in trained._store.layout.packs.rglob("*.pack")}
    report = trained.fsck(full=True, repair=True)
    assert report.ok, report.problems
    assert report.repaired is not None
    assert report.repaired.copies == 5
    assert report.repaired.lost == 0
    assert {path: path.read_bytes() for path in before} == before, "nothing was deleted or changed"
    sound(trained, 0, 1, 2, 3, 4)
    trained.gc(0)
    assert trained.fsck(full=True).ok
    sound(trained, 0, 1, 2, 3, 4)


def test_a_copy_that_is_a_difference(trained: Repo) -> None:
    """Its base may be damaged itself and be mended first."""
    base, top = chunk_of(trained, "main@step:3"), chunk_of(trained, "main@step:4")
    for id in (base, top):
        duplicate(trained, id)
        flip(trained, id)
        assert rows(trained)[id].codec == DIFFERENCE
    report = trained.fsck(full=True, repair=True)
    assert report.ok
    assert report.repaired is not None
    assert report.repaired.copies == 2
    sound(trained, 3, 4)


def test_without_a_copy_it_stays_damage(trained: Repo) -> None:
    bad = chunk_of(trained, "main")
    flip(trained, bad)
    before = trained.path / ".ckpt" / "packs"
    files = {path: path.read_bytes() for path in before.rglob("*.pack")}
    report = trained.fsck(full=True, repair=True)
    assert not report.ok
    assert report.repaired is not None
    assert (report.repaired.copies, report.repaired.lost) == (0, 1)
    assert {path: path.read_bytes() for path in before.rglob("*.pack")} == files
    with pytest.raises(CorruptionError):
        trained.checkout("main")
    trained.commit({"w": walk(4), "frozen": walk(0, seed=1), "step": 4}, step=9)
    assert trained.fsck(full=True).ok
    sound(trained, 0, 1, 2, 3, 4)


def test_a_deleted_pack_is_found_elsewhere(trained: Repo) -> None:
    """A copy of the file in quarantine/, or among the packs under another folder's name."""
    id = chunk_of(trained, "main@step:1")
    path = pack_of(trained, id)
    shutil.copy(path, trained._store.layout.quarantine / path.name)
    path.unlink()
    assert not trained.fsck()
    report = trained.fsck(repair=True)
    assert report.ok, report.problems
    assert report.repaired is not None
    assert report.repaired.copies > 1
    assert len(list(trained._store.layout.packs.rglob("*.pack"))) == 6, "all of it in one pack"
    sound(trained, 0, 1, 2, 3, 4)
    trained.gc(0)
    assert trained.fsck(full=True).ok


@pytest.mark.parametrize("how", ["footer", "trailer", "cut a little"])
def test_a_broken_pack_is_salvaged_and_put_aside(trained: Repo, how: str) -> None:
    path = pack_of(trained, chunk_of(trained, "main", "frozen"))
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    if how == "cut a little":
        del data[-30:]
    else:
        data[-3 if how == "trailer" else -TRAILER_BYTES - 3] ^= 1
    path.write_bytes(data)
    before = len(rows(trained))
    assert not trained.fsck()
    report = trained.fsck(full=True, repair=True)
    assert report.ok, report.problems
    assert report.repaired is not None
    (aside,) = report.repaired.quarantined
    assert Path(aside).read_bytes() == bytes(data)
    assert report.repaired.salvaged > 0
    assert not path.exists()
    assert len(rows(trained)) == before
    sound(trained, 0, 1, 2, 3, 4)
    trained.fsck(rebuild=True)
    assert trained.fsck(full=True).ok
    trained.gc(0)
    assert Path(aside).exists(), "what is in quarantine is for people"


def test_a_broken_pack_with_damage_in_it_stays(trained: Repo) -> None:
    bad = chunk_of(trained, "main", "frozen")
    path = pack_of(trained, bad)
    flip(trained, bad)
    os.truncate(path, path.stat().st_size - 10)
    report = trained.fsck(full=True, repair=True)
    assert not report.ok
    assert path.exists()
    assert report.repaired is not None
    assert report.repaired.quarantined == []
    assert report.repaired.salvaged > 0
    sound(trained, 0, 1, 2, 3, 4)
    with pytest.raises(CorruptionError):
        trained.checkout("main", only="frozen")
    trained.commit({"w": walk(4), "frozen": walk(0, seed=1), "step": 4}, step=9)
    final = trained.fsck(full=True, repair=True)
    assert final.ok, final.problems
    assert final.repaired is not None
    assert len(final.repaired.quarantined) == 1


@pytest.mark.parametrize("where", ["a record", "the footer"])
def test_sectors_that_cannot_be_read(trained: Repo, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read is named, marked, and stored again when it is committed again."""
    bad = chunk_of(trained, "main", "frozen")
    row, path = rows(trained)[bad], pack_of(trained, bad)
    size = path.stat().st_size
    lost = range(row.offset + 200, row.offset + 201) if where == "a record" else range(size - 200, size - 199)

    def failing(read: Any) -> Any:
        def call(file: ReadFile, first: Any, second: Any) -> Any:
            at, length = (second, len(first)) if isinstance(first, memoryview) else (first, second)
            if file.path == path and at <= lost.start < at + length:
                raise StorageError(f"cannot read {path}", path=str(path), errno=errno.EIO)
            return read(file, first, second)

        return call

    monkeypatch.setattr(ReadFile, "read", failing(ReadFile.read))
    monkeypatch.setattr(ReadFile, "read_into", failing(ReadFile.read_into))
    assert not trained.fsck(full=True)
    report = trained.fsck(full=True, repair=True)
    if where == "the footer":
        assert report.ok, report.problems
        assert report.repaired is not None
        assert report.repaired.salvaged > 0
        assert len(report.repaired.quarantined) == 1
    else:
        assert rows(trained)[bad].damaged
        assert path.exists()
        trained.commit({"w": walk(4), "frozen": walk(0, seed=1), "step": 4}, step=9)
        assert trained.fsck(full=True).ok
    sound(trained, 0, 1, 2, 3, 4)


def test_a_row_that_is_gone_comes_back(trained: Repo) -> None:
    ids = [chunk_of(trained, "main"), trained.resolve("main@step:2").tree]
    with trained._store.index.change() as change:
        for id in ids:
            change.delete_row(id)
    assert not trained.fsck()
    report = trained.fsck(repair=True)
    assert report.ok, report.problems
    sound(trained, 0, 1, 2, 3, 4)


def test_repair_does_nothing_where_all_is_well(trained: Repo) -> None:
    before = rows(trained)
    report = trained.fsck(full=True, repair=True)
    assert report.ok
    assert report.repaired is None
    assert rows(trained) == before


def test_repair_waits_for_nobody(trained: Repo) -> None:
    flip(trained, chunk_of(trained, "main"))
    with trained._store.collecting(), pytest.raises(LockedError):
        trained.fsck(full=True, repair=True)


def test_dropped_parts_are_no_damage(trained: Repo) -> None:
    from ckptvcs.store import Drop

    commit = trained.resolve("main@step:2").id
    trained._store.update([Drop(commit, ())], who="t", why="t")
    trained.gc(0)
    assert rows(trained)[commit].kind is Kind.COMMIT
    for wanted in ({}, {"full": True}, {"quick": True}, {"budget": "1GB"}):
        assert trained.fsck(**wanted).ok  # type: ignore[arg-type]


def test_random_damage_never_gives_wrong_numbers(trained: Repo) -> None:
    """Bytes flipped at random places, then repaired: each commit is right or refused."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    for id in (chunk_of(trained, "main", "frozen"), chunk_of(trained, "main@step:1")):
        duplicate(trained, id)
    for path in trained._store.layout.packs.rglob("*.pack"):
        path.chmod(0o644)
        data = bytearray(path.read_bytes())
        for at in random.integers(0, len(data), 2):
            data[at] ^= 1 << int(random.integers(0, 8))
        path.write_bytes(data)
    report = trained.fsck(full=True, repair=True)
    hurt = {commit for problem in report.problems for commit in problem.commits}
    for step in range(5):
        try:
            commit = trained.resolve(f"main@step:{step}")
            state = trained.checkout(commit)
        except CorruptionError:
            continue
        assert str(commit.id) not in hurt
        assert np.array_equal(state["w"], walk(step))
        assert np.array_equal(state["frozen"], walk(0, seed=1))
