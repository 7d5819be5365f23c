"""Garbage collection: what it frees, what it keeps, what it announces, and whom it spares."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import (
    Commit,
    ConflictError,
    CorruptionError,
    FormatError,
    InvalidError,
    LockedError,
    NotFoundError,
    ObjectId,
    Repo,
)
from ckptvcs.disk import Disk
from ckptvcs.history.commit import encode_commit
from ckptvcs.ids import Kind, chunk_id
from ckptvcs.maintenance import compaction, gc, marking
from ckptvcs.state import tree as state_trees
from ckptvcs.state.interface import Source
from ckptvcs.store import Drop, Move, Publication, Store, Writer
from ckptvcs.store.format import TRAILER_BYTES, Format, pack_object
from ckptvcs.store.reader import Reader
from ckptvcs.testing import codecs
from ckptvcs.testing.same import difference

SEEDS = range(12)


def array(seed: int, size: int = 4000) -> np.ndarray[Any, Any]:
    """Bytes that no codec makes smaller."""
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def exact(a: Any, b: Any) -> None:
    """Fail with the place where two states differ."""
    assert difference(a, b) is None, difference(a, b)


def pack_paths(repo: Repo) -> list[Path]:
    """All sealed packs on disk."""
    return sorted((repo.path / ".ckpt" / "packs").rglob("*.pack"))


def pack_bytes(repo: Repo) -> int:
    """Bytes of everything a collection may free: packs and temporary files."""
    files = (repo.path / ".ckpt" / "packs").rglob("*"), (repo.path / ".ckpt" / "tmp").rglob("*")
    return sum(path.stat().st_size for part in files for path in part if path.is_file())


def rows(repo: Repo) -> dict[ObjectId, Any]:
    """The whole row table."""
    with repo._store.snapshot() as snapshot:
        return dict(snapshot.rows_from(b"", 1 << 30))


def packs_of(repo: Repo, *ids: ObjectId) -> set[Path]:
    """The packs in which these records lie."""
    found = rows(repo)
    return {repo._store.layout.pack(found[id].pack) for id in ids}


def damage(path: Path, data: bytes) -> None:
    """Flip a bit in the middle of `data` where it lies in a file."""
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[content.index(data) + len(data) // 2] ^= 1
    path.write_bytes(content)


class ClockDisk(Disk):
    """The real disk with a clock that can be moved."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def now_ns(self) -> int:
        return super().now_ns() + int(self.ahead * 10**9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ClockDisk:
    """The clock of every repository opened from now on."""
    disk = ClockDisk()
    monkeypatch.setattr("ckptvcs.repo.Disk", lambda: disk)
    return disk


@pytest.fixture
def pack_per_component(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each component of a commit gets a pack of its own, however small."""
    monkeypatch.setattr("ckptvcs.store.writer._SECTION_BYTES", 1)


def collect(repo: Repo, grace: float | None = 0, *, rebase: bool = False) -> gc.Report:
    """A dry run, which must change nothing, then the run; what was announced must be what happened."""

    def run(dry_run: bool) -> gc.Report:
        if not rebase:
            return repo.gc(grace=grace, dry_run=dry_run)
        return gc.collect(repo._store, grace=grace or 0, dry_run=dry_run, who="me", rebase=True)

    before, index = pack_bytes(repo), rows(repo)
    announced = run(True)
    assert pack_bytes(repo) == before
    assert rows(repo) == index
    done = run(False)
    assert replace(done, dry_run=True) == announced
    assert before - pack_bytes(repo) == done.disk
    assert len(index) - len(rows(repo)) == done.records
    return done


# -- what retention dropped -----------------------------------------------------------------------


def drop(repo: Repo, commit: Commit, *names: str) -> None:
    """Record that components of a commit are dropped; without names all of it."""
    assert repo._store.update([Drop(commit.id, names)], who="me", why="retain")


def chunks(repo: Repo) -> set[ObjectId]:
    """The chunks that are stored."""
    return {id for id, row in rows(repo).items() if row.kind is Kind.CHUNK}


def test_a_dropped_payload_goes_and_its_lineage_stays(repo: Repo) -> None:
    first = repo.commit({"a": array(1)}, message="the first", metrics={"loss": 2.0})
    repo.commit({"a": array(2)})
    dry = gc.collect(repo._store, grace=0, dry_run=True, who="me", dropping={first.id: ()})
    drop(repo, first)
    done = collect(repo, grace=None)  # whatever the undo window says
    assert done.freed == dry.freed > 4000
    assert chunks(repo) == {chunk_id(array(2))}
    assert [each.message for each in repo.log()][1] == "the first"
    assert repo.resolve("HEAD~1").metrics == {"loss": 2.0}
    assert repo.fsck(full=True).ok


def test_a_dropped_component_goes_and_the_others_stay(repo: Repo) -> None:
    state = {"model": {"w": array(1), "deep": {"x": array(2)}}, "optimizer": {"m": array(3)}, "step": 7}
    first = repo.commit(state)
    repo.commit({"model": {"w": array(1)}})
    dry = gc.collect(repo._store, grace=0, dry_run=True, who="me", dropping={first.id: ("optimizer",)})
    drop(repo, first, "optimizer")
    assert collect(repo).freed == dry.freed > 4000
    assert chunks(repo) == {chunk_id(array(1)), chunk_id(array(2))}
    exact(repo.checkout(first, only=["model", "step"]), {"model": state["model"], "step": 7})
    assert repo.fsck(full=True).ok
    drop(repo, first)
    collect(repo)
    assert chunks(repo) == {chunk_id(array(1))}


def test_drops_apply_to_what_only_the_window_holds(repo: Repo) -> None:
    repo.commit({"n": 0})
    side = repo.on("side").commit({"a": array(1), "b": array(2)})
    drop(repo, side, "a")
    repo.delete_branch("side", force=True)
    collect(repo, grace=None)
    assert chunks(repo) == {chunk_id(array(2))}
    repo.branch("back", side)
    exact(repo.checkout("back", only="b"), {"b": array(2)})
    assert repo.fsck(full=True).ok


@pytest.mark.parametrize("names", [(), ("optimizer",)])
@pytest.mark.parametrize("collected", [False, True])
def test_the_state_of_a_dropped_commit_can_be_committed_again(
    repo: Repo, names: tuple[str, ...], collected: bool
) -> None:
    """A tree that is there for a part of it is not taken for whole: neither by who commits the same state,
    nor by a collection that has seen it as a part first."""
    state = {"model": {"w": array(1)}, "optimizer": {"m": array(2), "v": {"x": array(3)}}}
    first = repo.commit(state)
    repo.commit({"n": 1})
    drop(repo, first, *names)
    if collected:
        collect(repo)
    handle = repo.on("again")
    handle.commit(state)
    for _ in range(2):
        collect(repo)
        exact(repo.checkout("again"), state)
        assert repo.fsck(full=True).ok
    repo.delete_branch("again", force=True)
    collect(repo)
    assert chunks(repo) == ({chunk_id(array(1))} if names else set())
    assert repo.fsck(full=True).ok


def test_the_same_state_is_committed_while_a_drop_is_collected(
    repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer found everything stored; then the collector took the optimizer. It is written again."""
    state = {"model": {"w": array(1)}, "optimizer": {"m": array(2), "v": {"x": array(3)}}}
    first = repo.commit(state)
    repo.commit({"n": 1})
    drop(repo, first, "optimizer")
    plain = Writer.publish

    def late(self: Writer, wanted: Publication) -> bool:
        monkeypatch.setattr(Writer, "publish", plain)
        with Repo.open(folder) as other:
            assert other.gc(grace=0).records > 0
        return plain(self, wanted)

    monkeypatch.setattr(Writer, "publish", late)
    repo.on("again").commit(state)
    exact(repo.checkout("again"), state)
    collect(repo)
    exact(repo.checkout("again"), state)
    assert repo.fsck(full=True).ok


def test_the_same_state_is_committed_after_a_collection_marked(
    repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector has marked the tree for a part of it; a new commit needs all of it."""
    state = {"model": {"w": array(1)}, "optimizer": {"m": array(2), "v": {"x": array(3)}}}
    first = repo.commit(state)
    repo.commit({"n": 1})
    drop(repo, first, "optimizer")
    plain = gc._Collection.delete

    def late(self: Any) -> None:
        with Repo.open(folder) as other:
            other.on("again").commit(state)
        plain(self)

    monkeypatch.setattr(gc._Collection, "delete", late)
    assert repo.gc(grace=0).records == 0
    exact(repo.checkout("again"), state)
    assert repo.fsck(full=True).ok


@pytest.mark.parametrize("names", [None, (), ("optimizer",)])
def test_a_commit_that_names_a_stored_tree_needs_all_of_it(repo: Repo, names: tuple[str, ...] | None) -> None:
    """A tree of which a part was dropped is there, and may not be taken for whole."""
    first = repo.commit({"model": array(1), "optimizer": {"m": array(2)}})
    repo.commit({"n": 1})
    if names is not None:
        drop(repo, first, *names)
        collect(repo)
    fields: Any = {"message": "", "step": None, "epoch": None, "author": "me", "time": 1, "sizes": {}}
    fields |= {"metrics": {}, "config": {}, "overrides": {}, "environment": {}}
    payload = encode_commit(tree=first.tree, parents=[], origin=None, **fields)
    with repo._store.writer() as writer:
        (id,) = writer.put_objects(Kind.COMMIT, [payload])
        move = Move("refs/heads/other", None, id)
        wanted = Publication(id, (move,), move, (), time=1, who="me", why="merge")
        if names is None:
            assert writer.publish(wanted)
            exact(repo.checkout("other"), repo.checkout(first))
            return
        with pytest.raises((NotFoundError, CorruptionError)):
            writer.publish(wanted)
    assert "other" not in repo.branches()


@pytest.mark.parametrize("lost", [False, True])
def test_a_rebuild_keeps_what_a_drop_left(repo: Repo, folder: Path, lost: bool) -> None:
    """The index is made anew while nothing but the undo window holds a commit that lost a part."""
    repo.commit({"n": 0})
    handle = repo.on("side")
    part = handle.commit({"a": array(1), "b": array(2)})
    none = handle.commit({"c": array(3)})
    tip = handle.commit({"d": array(4)})
    drop(repo, part, "a")
    drop(repo, none)
    repo.delete_branch("side", force=True)
    if lost:  # then they are gone, though their records may still lie in a pack
        gone = collect(repo)
        assert gone.commits == 3
    else:
        collect(repo, grace=None)
    repo.close()
    shutil.rmtree(folder / ".ckpt" / "meta")
    with Repo.open(folder) as again:
        if lost:
            with pytest.raises(NotFoundError):
                again.branch("back", tip)
            return
        again.branch("back", tip)
        exact(again.checkout("back"), {"d": array(4)})
        exact(again.checkout(part, only="b"), {"b": array(2)})
        assert again.fsck(full=True).ok
        collect(again)
        exact(again.checkout(part, only="b"), {"b": array(2)})


def test_what_a_drop_does_not_explain_is_damage(repo: Repo) -> None:
    first = repo.commit({"a": array(1), "b": array(2)})
    repo.commit({"n": 1})
    drop(repo, first, "a")
    collect(repo)
    with repo._store.index.change() as change:
        change.delete_row(chunk_id(array(2)))
    (problem,) = repo.fsck().problems
    assert problem.commits == (str(first.id),)
    with pytest.raises(CorruptionError):
        repo.gc(grace=0)


@pytest.mark.parametrize("seed", range(8))
def test_bases_that_nothing_needs_go_when_asked(tmp_path: Path, seed: int) -> None:
    """Random trainings with drops: afterwards no chunk is stored that no live commit holds, each chain of
    bases is as short as before, and what was announced is what is freed, to the byte."""
    chance = random.Random(f"rebase {seed}")
    numbers = np.random.default_rng(seed)
    with Repo.init(tmp_path / "r", compression=chance.choice(["balanced", "small"])) as repo:
        weights = {n: numbers.standard_normal(9000).astype(np.float32) for n in range(3)}
        made: list[Commit] = []
        states: dict[ObjectId, dict[str, Any]] = {}
        live: dict[ObjectId, set[str]] = {}
        handle = repo.on("main")
        reencoded = 0
        for step in range(14):
            n = chance.randrange(3)
            weights[n] = weights[n] + numbers.standard_normal(9000).astype(np.float32) * np.float32(1e-4)
            state = {f"p{n}": array for n, array in weights.items()}
            made.append(handle.commit(state, step=step))
            states[made[-1].id], live[made[-1].id] = state, set(state)
            if step % 4 == 3 or step == 13:
                for commit in chance.sample(made[:-1], min(len(made) - 1, 3)):
                    names = chance.choice([(), ("p0",), ("p1", "p2")])
                    drop(repo, commit, *names)
                    live[commit.id] -= set(names or states[commit.id])
                depths = {id: row.depth for id, row in rows(repo).items()}
                reencoded += collect(repo, rebase=chance.random() < 0.8 or step == 13).reencoded
                assert all(row.depth <= depths[id] for id, row in rows(repo).items())
        for commit in made:
            kept = {name: states[commit.id][name] for name in sorted(live[commit.id])}
            if kept:
                exact(repo.checkout(commit, only=list(kept)), kept)
        assert chunks(repo) == {
            chunk_id(states[id][n].data.cast("B")) for id, names in live.items() for n in names
        }
        assert repo.fsck(full=True).ok
        assert collect(repo, rebase=True).records == 0
        assert reencoded > 0


def test_only_a_dry_run_assumes_drops(repo: Repo) -> None:
    first = repo.commit({"a": array(1)})
    with pytest.raises(InvalidError, match="dry run"):
        gc.collect(repo._store, grace=0, dry_run=False, who="me", dropping={first.id: ()})


# -- what is freed, and what stays ----------------------------------------------------------------


def test_nothing_to_collect(repo: Repo) -> None:
    empty = collect(repo)
    assert (empty.freed, empty.disk, empty.packs, empty.held) == (0, 0, 0, 0)
    repo.commit({"a": array(1)})
    again = collect(repo)
    assert (again.freed, again.records, again.commits, again.disk) == (0, 0, 0, 0)
    exact(repo.checkout(), {"a": array(1)})


def test_a_dead_pack_is_unlinked(repo: Repo) -> None:
    repo.commit({"a": array(1)})
    (kept,) = pack_paths(repo)
    side = repo.on("side").commit({"b": array(2)})
    (dead,) = set(pack_paths(repo)) - {kept}
    size = dead.stat().st_size
    repo.delete_branch("side", force=True)
    report = collect(repo)
    assert pack_paths(repo) == [kept]
    assert (report.packs, report.commits, report.disk) == (1, 1, size)
    assert report.freed == size - TRAILER_BYTES
    assert side.report is not None
    assert report.freed == side.report.stored
    with pytest.raises(NotFoundError):
        repo.resolve(str(side.id))
    exact(repo.checkout(), {"a": array(1)})
    assert repo.fsck(full=True).ok


def test_a_partly_dead_pack_is_compacted_and_the_rest_stays_exact(repo: Repo) -> None:
    both = {"a": array(1, 3_000_000), "b": array(2)}
    repo.on("side").commit(both)
    (before,) = pack_paths(repo)
    repo.commit({"b": array(2)})  # shares b with the branch that goes
    assert len(pack_paths(repo)) == 2
    repo.delete_branch("side", force=True)
    report = collect(repo)
    assert report.freed >= 3_000_000
    assert before not in pack_paths(repo)
    assert pack_bytes(repo) < 3_000_000 // 10
    exact(repo.checkout(), {"b": array(2)})
    assert repo.fsck(full=True).ok
    assert collect(repo).freed == 0


def test_what_several_branches_share_goes_with_the_last_one(repo: Repo) -> None:
    repo.commit({"x": array(0)})
    for name in "abc":
        repo.on(name).commit({"shared": array(1, 50_000), "own": array(ord(name))})
    freed = []
    for name in "abc":
        repo.delete_branch(name, force=True)
        freed.append(collect(repo).freed)
        for left in repo.branches():
            if left != "main":
                exact(repo.checkout(left), {"shared": array(1, 50_000), "own": array(ord(left))})
    assert freed[0] < 10_000
    assert freed[1] < 10_000
    assert freed[2] > 50_000


def test_tags_lost_commits_and_detached_heads_are_roots(repo: Repo, folder: Path) -> None:
    first = repo.commit({"n": array(1)})
    tagged = repo.on("t").commit({"n": array(2)})
    repo.tag("keep", tagged)
    repo.delete_branch("t")
    other = repo.on("main")
    other.restore({"n": array(0)})
    repo.commit({"n": array(3)})
    with pytest.raises(ConflictError) as caught:
        other.commit({"n": array(4)})
    head = repo.on("h").commit({"n": array(5)})
    repo.set_head(head)
    repo.delete_branch("h")
    collect(repo)
    for rev, seed in ((first, 1), ("keep", 2), ("main", 3), (str(caught.value.rescued), 4), (head, 5)):
        exact(repo.checkout(rev), {"n": array(seed)})
    assert repo.fsck(full=True).ok


@pytest.mark.parametrize("seed", SEEDS)
def test_announced_is_freed_is_what_the_folder_shrinks_by(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, clock: ClockDisk
) -> None:
    """Random histories: branches, tags, lost commits, shared content, deletions, several packs a commit."""
    run_history(random.Random(f"gc {seed}"), tmp_path / "r", 40, monkeypatch, clock)


@pytest.mark.slow
def test_announced_is_freed_over_many_histories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: ClockDisk
) -> None:
    total = 0
    for seed in range(100, 140):
        total += run_history(random.Random(f"gc {seed}"), tmp_path / str(seed), 60, monkeypatch, clock)
        shutil.rmtree(tmp_path / str(seed))
    print(f"40 histories, {total} bytes announced and freed")
    assert total > 500_000


def run_history(
    chance: random.Random, place: Path, length: int, monkeypatch: pytest.MonkeyPatch, clock: ClockDisk
) -> int:
    """Live a random history, collecting now and then; the bytes freed."""
    monkeypatch.setattr("ckptvcs.store.writer._SECTION_BYTES", chance.choice([1, 3000, 8 << 20]))
    monkeypatch.setattr(gc, "_BATCH", chance.choice([3, 10_000]))
    monkeypatch.setattr(gc, "SLICE", chance.choice([3, 10_000]))
    monkeypatch.setattr(marking, "SLICE", chance.choice([3, 10_000]))
    monkeypatch.setattr(compaction, "PACK_LIMIT", chance.choice([5000, 1 << 30]))
    freed = 0
    states: dict[ObjectId, dict[str, Any]] = {}
    dropped: dict[ObjectId, set[str]] = {}
    with Repo.init(place) as repo:

        def state() -> dict[str, Any]:
            parts = chance.sample(range(12), chance.randint(0, 4))
            return {f"p{n}": array(n, 300 + 400 * n) for n in parts} | {"count": chance.randint(0, 3)}

        def commit() -> None:
            handle = repo.on(chance.choice(["main", "a", "b", f"n{chance.randint(0, 3)}"]))
            handle.restore({}, strict=False)
            rival = repo.on(str(handle.branch_name)) if chance.random() < 0.2 else None
            if rival is not None:
                rival.restore({}, strict=False)
            made = state()
            states[handle.commit(made).id] = made
            if rival is not None:
                made = state()
                with pytest.raises(ConflictError) as caught:
                    rival.commit(made)
                states[repo.resolve(str(caught.value.rescued)).id] = made

        def point() -> None:
            known = [*repo.branches(), *repo.tags()]
            make = chance.choice([repo.branch, repo.tag])
            with contextlib.suppress(FileExistsError):
                if known:
                    make(chance.choice("cdef"), chance.choice(known))

        def delete() -> None:
            which = chance.choice([(repo.branches, repo.delete_branch), (repo.tags, repo.delete_tag)])
            names = [name for name in which[0]() if name != "main"]
            if names:
                which[1](chance.choice(names), force=True)

        def drop() -> None:
            tips = [*repo.branches().values(), *repo.tags().values(), *repo.lost().values()]
            known = [each for each in repo.log(tips) if each.id not in tips] if tips else []
            if known:
                commit = chance.choice(known)
                some = chance.sample(sorted(commit.sizes), chance.randint(0, len(commit.sizes)))
                announced = repo._store.update([Drop(commit.id, tuple(some))], who="me", why="drop")
                assert announced
                gone = dropped.setdefault(commit.id, set())
                gone |= set(some or commit.sizes)

        def tidy() -> None:
            nonlocal freed
            clock.ahead += chance.choice([0, 3600, 40 * 86_400])
            freed += collect(repo, grace=chance.choice([0, 0, 1800, None])).freed

        for _ in range(length):
            chance.choices([commit, point, delete, drop, tidy], [6, 2, 4, 2, 1])[0]()
        clock.ahead += 31 * 86_400
        freed += collect(repo, grace=0).freed
        expected = set()
        for tip in [*repo.branches().values(), *repo.tags().values()]:
            for each in repo.log(tip):
                kept = {k: v for k, v in states[each.id].items() if k not in dropped.get(each.id, ())}
                expected |= {chunk_id(v) for v in kept.values() if isinstance(v, np.ndarray)}
                if kept:
                    exact(repo.checkout(each.id, only=list(kept)), kept)
        assert {id for id, row in rows(repo).items() if row.kind is Kind.CHUNK} == expected
        assert repo.lost() == {}
        assert repo.fsck(full=True).ok
        live = {c.id for ref in [*repo.branches().values(), *repo.tags().values()] for c in repo.log(ref)}
        assert {id for id, row in rows(repo).items() if row.kind is Kind.COMMIT} == live
        used = sum(row.cost for row in rows(repo).values()) + TRAILER_BYTES * len(pack_paths(repo))
        assert pack_bytes(repo) == used  # not a byte that nothing refers to
        assert collect(repo, grace=0).disk == 0
    return freed


# -- the undo window ------------------------------------------------------------------------------


def test_a_deleted_branch_stays_for_the_undo_window(repo: Repo) -> None:
    repo.commit({"a": array(1)})
    tip = repo.on("side").commit({"b": array(2, 70_000)})
    assert tip.report is not None
    repo.delete_branch("side", force=True)
    for grace in (None, 3600.0):
        report = collect(repo, grace)
        assert (report.freed, report.records) == (0, 0)
        assert report.held == tip.report.stored
    exact(repo.checkout("side@{1}"), {"b": array(2, 70_000)})
    repo.branch("side", str(tip.id))  # undone
    assert collect(repo, None).held == 0
    exact(repo.checkout("side"), {"b": array(2, 70_000)})
    repo.delete_branch("side", force=True)
    assert collect(repo, 0).freed == tip.report.stored
    with pytest.raises(NotFoundError):
        repo.branch("side", str(tip.id))
    with pytest.raises(NotFoundError):
        repo.branch("side", "side@{1}")


def test_the_window_ends(folder: Path, clock: ClockDisk) -> None:
    with Repo.init(folder) as repo:
        repo.commit({"a": array(1)})
        repo.on("side").commit({"b": array(2)})
        clock.ahead = 3600
        repo.delete_branch("side", force=True)
        clock.ahead = 23 * 3600
        assert collect(repo, None).freed == 0
        clock.ahead = 24.9 * 3600  # the branch was made more than a day ago, deleted less
        assert collect(repo, None).freed == 0
        clock.ahead = 25.1 * 3600
        assert collect(repo, None).freed > 0


@pytest.mark.parametrize(
    ("grace", "seconds"),
    [
        (0, 0),
        (90.5, 90.5),
        (datetime.timedelta(hours=2), 7200),
        ("30m", 1800),
        ("7d", 604_800),
        (None, 86_400),
    ],
)
def test_ways_to_say_grace(repo: Repo, grace: Any, seconds: float) -> None:
    assert repo.gc(grace=grace, dry_run=True).grace == seconds


@pytest.mark.parametrize("grace", [-1, "soon", "-3h", float("nan"), float("inf"), True, [], "1 h", 1e300])
def test_graces_that_mean_nothing(repo: Repo, grace: Any) -> None:
    with pytest.raises(InvalidError, match="not a duration"):
        repo.gc(grace=grace)


def test_grace_comes_from_the_config(repo: Repo, folder: Path) -> None:
    repo.configure("gc.grace", "2h")
    assert repo.gc(dry_run=True).grace == 7200
    with pytest.raises(InvalidError):
        repo.configure("gc.grace", "never")
    with Repo.open(folder) as other:
        assert other.gc(dry_run=True).grace == 7200


def test_lost_commits_expire_after_thirty_days(folder: Path, clock: ClockDisk) -> None:
    with Repo.init(folder) as repo:
        repo.commit({"a": array(1)})
        rival = repo.on("main")
        rival.restore({"a": array(0)})
        repo.commit({"a": array(2)})
        with pytest.raises(ConflictError) as caught:
            rival.commit({"a": array(3, 60_000)})
        name = str(caught.value.rescued)
        clock.ahead = 29.9 * 86_400
        assert collect(repo, 0).expired == []
        exact(repo.checkout(name), {"a": array(3, 60_000)})
        clock.ahead = 30.1 * 86_400
        with_window = collect(repo, None)
        assert with_window.expired == [name]
        assert with_window.freed == 0
        assert with_window.held > 60_000  # expiring is a change that the window lets one undo
        assert repo.lost() == {}
        assert collect(repo, 0).freed > 60_000
        assert repo.reflog(1)[0].why == "gc: expire lost"
        assert repo.fsck(full=True).ok


# -- handles and readers --------------------------------------------------------------------------


def test_idle_handles_neither_block_nor_keep_bytes(repo: Repo, folder: Path) -> None:
    repo.commit({"a": array(1)})
    with Repo.open(folder, branch="side") as idle, Repo.open(folder) as second:
        idle.commit({"b": array(2, 2_000_000)})
        idle.checkout()
        list(second.log("side"))
        idle.delete_branch("side", force=True)
        before = _used(folder)
        assert collect(repo).freed > 2_000_000
        held = [
            link
            for link in map(_target, os.listdir("/proc/self/fd"))
            if "deleted" in link and ".pack" in link
        ]
        assert held == []
        assert before - _used(folder) >= 2_000_000
        exact(idle.checkout("main"), {"a": array(1)})
        exact(second.checkout(), {"a": array(1)})
        with pytest.raises(NotFoundError, match="parent commit"):
            idle.commit({"b": array(3)})  # its branch is gone


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _used(place: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in place.rglob("*"))


def test_a_commit_collected_while_it_is_read_says_so(repo: Repo, folder: Path) -> None:
    repo.commit({"a": array(1)})
    side = repo.on("side").commit({"b": array(2), "c": [array(n) for n in range(30)]})
    with Repo.open(folder) as reading:

        def read() -> None:
            with reading._reading(side) as reader:
                repo.delete_branch("side", force=True)
                repo.gc(grace=0)
                state_trees.read(reader, side.tree)

        with pytest.raises(NotFoundError, match="deleted while it was being read"):
            read()


def test_a_reader_follows_records_that_compaction_moved(
    repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.on("side").commit({"a": array(1), "b": array(2, 90_000)})
    repo.commit({"a": array(1), "n": 1})
    repo.delete_branch("side", force=True)
    plain = Reader._chains
    moved: list[gc.Report] = []

    def chains_then_gc(self: Reader, ids: Any) -> Any:
        found = plain(self, ids)
        if not moved and chunk_id(array(1).tobytes()) in found:
            moved.append(gc.Report())
            moved[0] = repo.gc(grace=0)
        return found

    with Repo.open(folder) as reading:
        monkeypatch.setattr(Reader, "_chains", chains_then_gc)
        exact(reading.checkout("main"), {"a": array(1), "n": 1})
    assert moved[0].freed > 90_000


# -- difference frames ----------------------------------------------------------------------------


class Bytes(Source):
    """A source of plain bytes."""

    element_size = 1

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    @property
    def nbytes(self) -> int:
        return len(self.raw)

    def read(self, offset: int, length: int) -> bytes:
        return self.raw[offset : offset + length]


def publish(writer: Writer, store: Store, ref: str, chunks: list[ObjectId], text: str = "") -> ObjectId:
    """A commit of these chunks on a new branch."""
    (tree,) = writer.put_objects(Kind.TREE, [pack_object([(Kind.CHUNK, id) for id in chunks], text.encode())])
    (commit,) = writer.put_objects(
        Kind.COMMIT,
        [
            encode_commit(
                tree=tree, parents=(), origin=None, author="a", time=1, message=ref, step=None, epoch=None,
                metrics={}, config={}, overrides={}, environment={}, sizes={},
            )
        ],
    )  # fmt: skip
    name = f"refs/heads/{ref}"
    wanted = Publication(
        commit, (Move(name, None, commit),), Move(f"refs/lost/{ref}/x", None, commit), (), 1, "a", "test"
    )
    assert writer.publish(wanted)
    store.catch_up_journal()
    return commit


@pytest.fixture
def xor() -> Iterator[None]:
    """The synthetic difference codec."""
    with codecs.registered():
        yield


def put_chain(store: Store, ref: str, raws: list[bytes], stored_already: int) -> None:
    """Publish the last of `raws`, each a difference against the one before; the first are stored already."""
    with store.writer() as writer:
        for n in range(stored_already, len(raws)):
            writer.put_frame(chunk_id(raws[n]), codecs.delta_frame(raws[n], raws[n - 1]))
        publish(writer, store, ref, [chunk_id(raws[-1])])


@pytest.mark.usefixtures("xor")
@pytest.mark.parametrize("length", [2, 3, 5])
def test_bases_stay_as_long_as_a_difference_needs_them(repo: Repo, length: int) -> None:
    raws = [array(n, 20_000).tobytes() for n in range(length)]
    store = repo._store
    with store.writer() as writer:
        ((base,),) = writer.put([Bytes(raws[0])])
        (other,) = writer.put([Bytes(array(99, 30_000).tobytes())])
        publish(writer, store, "base", [base, *other])
    put_chain(store, "delta", raws, 1)
    assert rows(repo)[chunk_id(raws[-1])].depth == length - 1
    repo.delete_branch("base", force=True)
    report = collect(repo)
    assert 30_000 < report.freed < 31_000 + 500  # the other chunk, the tree and the commit, not the base
    for again in range(3):
        with store.reader() as reader:
            assert reader.chunk(chunk_id(raws[-1])) == raws[-1]
        assert repo.fsck(full=True).ok
        assert set(map(chunk_id, raws)) <= rows(repo).keys()
        if again == 0:
            repo.fsck(rebuild=True)
        else:
            assert collect(repo).freed == 0
    repo.delete_branch("delta", force=True)
    collect(repo)
    assert rows(repo) == {}
    assert pack_paths(repo) == []


@pytest.mark.usefixtures("xor")
def test_compaction_moves_bases_and_differences(repo: Repo) -> None:
    raws = [array(n, 5000).tobytes() for n in range(3)]
    store = repo._store
    with store.writer() as writer:
        ((base,),) = writer.put([Bytes(raws[0])])
        (dead,) = writer.put([Bytes(array(98, 30_000).tobytes())])
        for n in (1, 2):
            writer.put_frame(chunk_id(raws[n]), codecs.delta_frame(raws[n], raws[n - 1]))
        publish(writer, store, "all", [base, *dead, chunk_id(raws[2])])
    with store.writer() as writer:
        publish(writer, store, "kept", [chunk_id(raws[2])])
    repo.delete_branch("all", force=True)
    (before, _) = pack_paths(repo)
    report = collect(repo)
    assert report.freed > 30_000
    assert len(rows(repo)) == 5  # three chunks, a tree, a commit
    with store.reader() as reader:
        for raw in raws:
            assert reader.chunk(chunk_id(raw)) == raw
    assert rows(repo)[chunk_id(raws[2])].base == chunk_id(raws[1])
    assert before not in pack_paths(repo)
    assert repo.fsck(full=True).ok


@pytest.mark.usefixtures("xor")
def test_a_difference_whose_base_was_collected_is_refused_and_can_be_made_again(repo: Repo) -> None:
    raws = [array(n, 5000).tobytes() for n in range(2)]
    store = repo._store
    with store.writer() as writer:
        publish(writer, store, "base", [id for ids in writer.put([Bytes(raws[0])]) for id in ids])
    with store.writer() as writer:
        writer.put_frame(chunk_id(raws[1]), codecs.delta_frame(raws[1], raws[0]))
        repo.delete_branch("base", force=True)
        repo.gc(grace=0)
        with pytest.raises(NotFoundError, match="collected while a commit that reuses it"):
            publish(writer, store, "delta", [chunk_id(raws[1])])
    assert repo.branches() == {}
    assert rows(repo) == {}
    with store.writer() as writer:
        writer.put([Bytes(raws[0])])
        writer.put_frame(chunk_id(raws[1]), codecs.delta_frame(raws[1], raws[0]))
        publish(writer, store, "delta", [chunk_id(raws[1])])
    with store.reader() as reader:
        assert reader.chunk(chunk_id(raws[1])) == raws[1]
    assert repo.fsck(full=True).ok


# -- damage ---------------------------------------------------------------------------------------


def test_something_missing_below_a_root_stops_everything(repo: Repo) -> None:
    commit = repo.commit({"a": array(1), "deep": {"er": [array(n, 500) for n in range(40)]}})
    repo.on("side").commit({"b": array(2)})
    repo.delete_branch("side", force=True)
    everything = rows(repo)
    files = pack_paths(repo)
    for id, row in everything.items():
        if row.kind is Kind.COMMIT and id != commit.id:
            continue
        if packs_of(repo, id) != packs_of(repo, commit.id):
            continue  # belongs to the branch that may go
        with repo._store.index.change() as change:
            change.delete_row(id)
        for dry_run in (True, False):
            with pytest.raises(CorruptionError, match="missing; nothing was deleted") as caught:
                repo.gc(grace=0, dry_run=dry_run)
            assert caught.value.id == str(id)
        assert rows(repo) == {k: v for k, v in everything.items() if k != id}
        assert pack_paths(repo) == files
        with repo._store.index.change() as change:
            change.put_row(id, row)
    assert collect(repo).freed > 0
    exact(repo.checkout(), {"a": array(1), "deep": {"er": [array(n, 500) for n in range(40)]}})


def test_a_tree_that_cannot_be_read_stops_everything(repo: Repo) -> None:
    commit = repo.commit({"a": array(1), "text": "x" * 100})
    repo.on("side").commit({"b": array(2)})
    repo.delete_branch("side", force=True)
    row = rows(repo)[commit.tree]
    path = repo._store.layout.pack(row.pack)
    damage(path, path.read_bytes()[row.offset + 104 : row.offset + 104 + row.stored])
    before = (rows(repo), pack_paths(repo))
    with pytest.raises(CorruptionError):
        repo.gc(grace=0)
    assert (rows(repo), pack_paths(repo)) == before


@pytest.mark.parametrize("how", ["flipped", "header", "missing"])
def test_damage_in_a_partly_dead_pack_keeps_that_pack_only(repo: Repo, how: str) -> None:
    repo.on("x").commit({"a": array(1), "dead": array(2, 40_000)})
    repo.on("y").commit({"b": array(3), "dead": array(4, 50_000)})
    repo.on("z").commit({"dead": array(5, 60_000)})
    repo.commit({"a": array(1), "b": array(3)})
    (bad,) = packs_of(repo, chunk_id(array(1).tobytes()))
    (good,) = packs_of(repo, chunk_id(array(3).tobytes()))
    sound = bad.read_bytes()
    row = rows(repo)[chunk_id(array(1).tobytes())]
    if how == "missing":
        bad.unlink()
    elif how == "flipped":
        damage(bad, array(1).tobytes())
    else:
        damage(bad, sound[row.offset : row.offset + 104])
    for name in "xyz":
        repo.delete_branch(name, force=True)
    report = repo.gc(grace=0)
    assert len(report.problems) == 1
    assert str(bad) in report.problems[0]
    assert 110_000 < report.freed < 113_000  # y's and z's
    assert not good.exists()
    exact(repo.checkout("main", only="b"), {"b": array(3)})
    assert rows(repo)[chunk_id(array(1).tobytes())].pack == row.pack
    assert not repo.fsck(full=True).ok
    if how != "missing":
        assert bad.exists()
        bad.chmod(0o644)
    bad.write_bytes(sound)  # restored from a copy: then it can be compacted
    again = repo.gc(grace=0)
    assert again.problems == []
    assert again.freed > 40_000
    exact(repo.checkout(), {"a": array(1), "b": array(3)})
    assert repo.fsck(full=True).ok


# -- beside writers -------------------------------------------------------------------------------


def commit_with_gc_inside(
    monkeypatch: pytest.MonkeyPatch, handle: Repo, state: Any, meanwhile: Callable[[], None]
) -> Commit:
    """Commit a state, with something happening after all lookups and before the transaction."""
    plain = Writer.publish

    def late(self: Writer, wanted: Publication) -> bool:
        monkeypatch.setattr(Writer, "publish", plain)
        meanwhile()
        return plain(self, wanted)

    monkeypatch.setattr(Writer, "publish", late)
    return handle.commit(state)


BIG = {"shared": array(1, 2_500_000), "x": {"y": [array(n, 600) for n in range(80)]}, "small": 3}


@pytest.mark.usefixtures("pack_per_component")
@pytest.mark.parametrize("what", ["a chunk", "a tree", "everything"])
@pytest.mark.parametrize("many", [False, True])
def test_a_writer_writes_again_what_vanished_after_it_looked(
    repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch, what: str, many: bool
) -> None:
    repo.commit({"n": 0})
    repo.on("side").commit(BIG)
    state = {
        "a chunk": {"shared": BIG["shared"], "other": array(7)},
        "a tree": {"x": BIG["x"], "other": array(7)},
        "everything": BIG,
    }[what]
    reports: list[gc.Report] = []

    def meanwhile() -> None:
        with Repo.open(folder) as collector:
            collector.delete_branch("side", force=True)
            reports.append(collector.gc(grace=0))
            if many:
                collector.on("again").commit(BIG)  # comes back, and goes again
                collector.delete_branch("again", force=True)
                reports.append(collector.gc(grace=0))

    with Repo.open(folder, branch="job") as job:
        made = commit_with_gc_inside(monkeypatch, job, state, meanwhile)
        assert made.report is not None
        assert made.report.reused > 40_000  # it counted on the branch that went
        assert all(report.freed > 2_500_000 for report in reports)
        exact(job.checkout(), state)
    exact(repo.checkout(made.id), state)
    assert repo.fsck(full=True).ok
    collect(repo)
    exact(repo.checkout(made.id), state)
    repo.fsck(rebuild=True)
    exact(repo.checkout(made.id), state)
    assert repo.fsck(full=True).ok


def test_what_another_writer_put_back_is_not_written_twice(
    repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.commit({"n": 0})
    repo.on("side").commit(BIG)

    def meanwhile() -> None:
        with Repo.open(folder, branch="back") as other:
            other.delete_branch("side", force=True)
            other.gc(grace=0)
            other.commit(BIG)

    made = commit_with_gc_inside(monkeypatch, repo.on("job"), BIG, meanwhile)
    exact(repo.checkout(made.id), BIG)
    assert pack_bytes(repo) < 2 * 2_500_000
    assert repo.fsck(full=True).ok


def test_a_parent_that_was_collected_is_an_error(
    repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.commit({"n": 0})
    side = repo.on("side").commit({"a": array(1)})
    job = repo.on("job")
    job.restore({"a": array(0)}, side)

    def meanwhile() -> None:
        with Repo.open(folder) as collector:
            collector.delete_branch("side", force=True)
            collector.gc(grace=0)

    with pytest.raises(NotFoundError, match=r"parent commit .* no longer stored"):
        commit_with_gc_inside(monkeypatch, job, {"a": array(1)}, meanwhile)
    assert repo.branches().keys() == {"main"}
    assert repo.lost() == {}
    assert repo.fsck(full=True).ok


def test_a_ref_to_a_commit_that_was_collected_is_refused(repo: Repo) -> None:
    repo.commit({"n": 0})
    side = repo.on("side").commit({"a": array(1)})
    repo.delete_branch("side", force=True)
    repo.gc(grace=0)
    for call in (repo.branch, repo.tag):
        with pytest.raises(NotFoundError):
            call("again", side)
        with pytest.raises(NotFoundError):
            call("again", side.id)
    assert repo.fsck(full=True).ok


@pytest.mark.parametrize(("times", "few"), [(1, 32), (1, 0), (3, 0), (4, 0)])
def test_a_branch_made_during_collection_is_spared(
    repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch, times: int, few: int
) -> None:
    """The log moves before each of the first deletions: few new roots are marked in the transaction, and
    for many the batch is tried again, three times at most."""
    monkeypatch.setattr(gc, "_FEW", few)
    repo.commit({"n": 0})
    tips = [repo.on(f"side{n}").commit({"a": array(n)}) for n in range(times + 1)]
    for n in range(times + 1):
        repo.delete_branch(f"side{n}", force=True)
    plain = gc._Collection._delete_batch
    calls = 0

    def disturbed(self: Any, batch: Any) -> None:
        nonlocal calls
        if calls == 0:
            change = type(self._store.index).change

            def moved(index: Any) -> Any:
                nonlocal calls
                if calls < times:
                    calls += 1
                    monkeypatch.setattr(type(self._store.index), "change", change)
                    made = Move(f"refs/heads/saved{calls}", None, tips[calls].id)
                    assert repo._store.update([made], who="another process", why="branch")
                    monkeypatch.setattr(type(self._store.index), "change", moved)
                return change(index)

            monkeypatch.setattr(type(self._store.index), "change", moved)
        plain(self, batch)

    monkeypatch.setattr(gc._Collection, "_delete_batch", disturbed)
    report = repo.gc(grace=0)
    assert calls == times
    assert report.commits == 1
    for n in range(1, times + 1):
        exact(repo.checkout(f"saved{n}"), {"a": array(n)})
    assert repo.fsck(full=True).ok
    monkeypatch.undo()
    assert collect(repo).freed == 0


def test_one_collector_at_a_time(repo: Repo, folder: Path) -> None:
    repo.commit({"n": 0})
    with Repo.open(folder) as other:
        with other._store.collecting():
            for dry_run in (False, True):
                with pytest.raises(LockedError, match="another process is collecting"):
                    repo.gc(grace=0, dry_run=dry_run)
            repo.commit({"n": 1})  # writers go on
        repo.gc(grace=0)


def test_an_unknown_gc_feature_is_refused_while_commits_go_on(folder: Path) -> None:
    with Repo.init(folder) as repo:
        repo.commit({"n": 0})
    path = folder / ".ckpt" / "format"
    path.write_bytes(replace(Format.unpack(path.read_bytes(), "format"), gc=("lazy-clones",)).pack())
    with Repo.open(folder) as repo:
        for dry_run in (False, True):
            with pytest.raises(FormatError, match=r"collect garbage in .* lazy-clones"):
                repo.gc(dry_run=dry_run)
        repo.restore({"n": 5})
        repo.commit({"n": 1})
        assert repo.checkout() == {"n": 1}


# -- what dead writers leave ----------------------------------------------------------------------


def writer_in_child(folder: Path, seed: int, *, sealed: bool) -> tuple[int, int]:
    """A child in the middle of a commit, its pack sealed but not published, or not even sealed.

    Gives its process id and a descriptor: closing it lets the child go on and publish.
    """
    ready_r, ready_w = os.pipe()
    go_r, go_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(go_w)
            plain = Writer.publish

            def waiting(self: Writer, wanted: Publication) -> bool:
                if sealed:
                    self._seal()
                os.write(ready_w, b"x")
                os.read(go_r, 1)
                return plain(self, wanted)

            Writer.publish = waiting  # type: ignore[method-assign]
            with Repo.open(folder, branch=f"child{seed}") as repo:
                repo.commit({"c": array(seed, 30_000)})
            status = 0
        finally:
            os._exit(status)
    os.close(ready_w)
    os.close(go_r)
    assert os.read(ready_r, 1) == b"x"
    os.close(ready_r)
    return pid, go_w


@pytest.mark.parametrize("sealed", [False, True])
def test_leftovers_of_dead_writers_go_and_those_of_live_ones_stay(
    repo: Repo, folder: Path, sealed: bool
) -> None:
    repo.commit({"a": array(1)})
    clean = pack_bytes(repo)
    dead, go = writer_in_child(folder, 11, sealed=sealed)
    os.kill(dead, signal.SIGKILL)
    os.waitpid(dead, 0)
    os.close(go)
    left = pack_bytes(repo) - clean
    assert left >= (30_000 if sealed else 0)
    live, go = writer_in_child(folder, 12, sealed=sealed)
    report = collect(repo)
    assert report.leftovers == report.disk == left
    assert (report.freed, report.records) == (0, 0)
    os.close(go)
    assert os.waitstatus_to_exitcode(os.waitpid(live, 0)[1]) == 0
    exact(repo.checkout("child12"), {"c": array(12, 30_000)})
    assert repo.branches().keys() == {"main", "child12"}
    assert repo.fsck(full=True).ok
    assert collect(repo).disk == 0
    assert len(os.listdir(folder / ".ckpt/leases")) == 1  # this process's own


def test_leases_of_the_dead_are_removed(repo: Repo, folder: Path) -> None:
    repo.commit({"a": array(1)})
    (own,) = os.listdir(folder / ".ckpt/leases")
    for seed in (11, 12):
        pid, go = writer_in_child(folder, seed, sealed=False)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(go)
    assert len(os.listdir(folder / ".ckpt/leases")) == 3
    repo.gc(grace=0, dry_run=True)
    assert len(os.listdir(folder / ".ckpt/leases")) == 3
    repo.gc(grace=0)
    assert os.listdir(folder / ".ckpt/leases") == [own]


def test_foreign_files_are_left_alone(repo: Repo, folder: Path) -> None:
    repo.commit({"a": array(1)})
    strange = [
        folder / ".ckpt/packs/README",
        folder / ".ckpt/tmp/notes.txt",
        folder / ".ckpt/packs/zz/x.pack",
    ]
    for path in strange:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    repo.gc(grace=0)
    assert all(path.read_text() == "mine" for path in strange)
