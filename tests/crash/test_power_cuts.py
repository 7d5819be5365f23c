"""Power cuts at every operation of every protocol of the store, each checked for what it must not lose.

A scenario does its work on a recording disk and says what must hold in each state that a power cut may leave.
The same scenarios then run with one sync after the other left out: the states must tell, or it is said here
why nothing depends on that sync.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import Repo
from ckptvcs.disk import Disk
from ckptvcs.errors import CkptError
from ckptvcs.ids import ObjectId
from ckptvcs.maintenance.gc import collect
from ckptvcs.opened import Opened
from ckptvcs.store import Move, Store
from ckptvcs.testing.crashes import (
    Acknowledged,
    CrashState,
    FolderSynced,
    Operation,
    RecordingDisk,
    Synced,
    crash_states,
    explore,
)
from ckptvcs.testing.same import difference
from tests.crash.stores import (
    MAIN,
    Commit,
    commit,
    contents,
    create,
    noise,
    open_store,
    parents,
    publication,
    put_commit,
    tips,
    verify,
)

SEED = 20_240_601
SETTINGS = b'compression = "small"\n'
Check = Callable[[Path, CrashState], None]
Made = tuple[RecordingDisk, Check]
"""What a scenario did, and what must hold in each state that a power cut in it may leave."""


@dataclass(frozen=True)
class Promise:
    """A ref was said to stand at a commit: durable in the index, or in the journal as well."""

    commit: Commit
    journalled: bool = False


Where = Callable[[Store, list[Promise]], None]
"""Whether refs stand where the promises allow."""


@dataclass(frozen=True)
class Scenario:
    """A protocol at work. `least` distinct states are looked at."""

    run: Callable[[Path], Made]
    least: int
    section_bytes: int | None

    def __call__(self, scratch: Path) -> Made:
        home = scratch / "home"
        home.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            # Names of packs decide which of them share a folder, and so what has to be synced.
            leases = itertools.count(1)
            patch.setattr(
                "ckptvcs.store.leases.uuid.uuid4",
                lambda: uuid.UUID(bytes=bytes([next(leases) * 40 % 256]) * 16),
            )
            if self.section_bytes is not None:
                patch.setattr("ckptvcs.store.writer._SECTION_BYTES", self.section_bytes)
            return self.run(home)


SCENARIOS: dict[str, Scenario] = {}


def scenario(least: int, *, several_packs: bool = False) -> Callable[[Callable[[Path], Made]], None]:
    """Register a scenario under its function's name. With `several_packs` each component has its own."""

    def register(run: Callable[[Path], Made]) -> None:
        SCENARIOS[run.__name__] = Scenario(run, least, 1 if several_packs else None)

    return register


def check_repository(known: list[Commit], where: Where | None = None) -> Check:
    """A checker: what the state promises is there, nothing is half there, and work goes on.

    `known` holds every commit of the scenario. `where` judges the refs; by default a ref stands at what was
    promised last or at a child of it.
    """
    expected = {each.id: each.contents for each in known}

    def check(folder: Path, state: CrashState) -> None:
        promises = [what for what in state.acknowledged if isinstance(what, Promise)]
        check_one(folder, promises)
        # The same crash, and the index is lost with it: packs and journal must suffice.
        without = folder.with_name(folder.name + "-without-index")
        without.mkdir()
        state.materialise(without)
        shutil.rmtree(without / ".ckpt" / "meta", ignore_errors=True)
        check_one(without, [promise for promise in promises if promise.journalled])
        shutil.rmtree(without)

    def check_one(folder: Path, promises: list[Promise]) -> None:
        with contextlib.closing(open_store(folder)) as store:
            verify(store)
            for promise in promises:
                assert contents(store, promise.commit.id) == promise.commit.contents
            (where or at_the_last_or_its_child)(store, promises)
            standing = tips(store)
            for name, tip in standing.items():
                assert contents(store, tip) == expected[tip], name
            before = refs(store)
            after = commit(store, [b"after the crash", noise(99, 700)], standing.get(MAIN))
            assert contents(store, after.id) == after.contents
            assert refs(store) == {**before, MAIN: after.id}
        shutil.rmtree(folder / ".ckpt" / "meta")
        with contextlib.closing(open_store(folder)) as store:
            assert refs(store) == {**before, MAIN: after.id}
            verify(store)

    return check


def at_the_last_or_its_child(store: Store, promises: list[Promise]) -> None:
    """Each ref stands at the commit it was last said to stand at, or at a child nobody heard of yet."""
    standing = tips(store)
    for promise in {promise.commit.ref: promise for promise in promises}.values():
        tip = standing.get(promise.commit.ref)
        assert tip is not None, f"{promise.commit.ref} is gone"
        assert promise.commit.id in (tip, *parents(store, tip)), f"{promise.commit} is lost"


def refs(store: Store) -> dict[str, ObjectId | str]:
    """All refs, HEAD included."""
    with store.snapshot() as snapshot:
        return snapshot.refs()


def publish(store: Store, disk: RecordingDisk, parts: list[bytes], old: Commit | None) -> Commit:
    """A commit in which each step is promised when it returns."""
    with store.writer() as writer:
        made = put_commit(writer, parts, [old.id] if old else [])
        assert writer.publish(publication(made.id, old.id if old else None))
    disk.acknowledge(Promise(made))
    store.catch_up_journal()
    disk.acknowledge(Promise(made, journalled=True))
    return made


@scenario(50)
def init(home: Path) -> Made:
    """A repository is absent or whole, and absent only before `create` returned."""
    disk = RecordingDisk(home)
    Store.create(home / ".ckpt", disk, config=SETTINGS, head=MAIN, who="test", threads=1).close()
    disk.acknowledge("created")

    def check(folder: Path, state: CrashState) -> None:
        root = folder / ".ckpt"
        if not (root / "format").exists():
            assert not root.exists(), "half a repository is visible"
            assert not state.acknowledged, "the repository is gone"
            Store.create(root, Disk(), config=SETTINGS, head=MAIN, who="test", threads=1).close()
        assert (root / "config.toml").read_bytes() == SETTINGS
        assert (root / ".gitignore").read_bytes() == b"*\n"
        with contextlib.closing(open_store(folder)) as store:
            assert refs(store) == {"HEAD": MAIN}
            made = commit(store, [b"first"])
            assert contents(store, made.id) == (b"first",)
            verify(store)
        assert [path.name for path in folder.iterdir()] == [".ckpt"] or "format" not in state.last
        shutil.rmtree(root / "meta")
        with contextlib.closing(open_store(folder)) as store:
            assert refs(store) == {"HEAD": MAIN, MAIN: made.id}

    return disk, check


def one_commit(home: Path, number: int) -> Made:
    """A commit of several packs, into an empty repository or onto another commit."""
    shared = noise(1, 900)
    known = []
    with contextlib.closing(create(home)) as store:
        if number == 2:
            known.append(commit(store, [shared, b"a" * 700]))
    disk = RecordingDisk(home)
    for old in known:
        disk.acknowledge(Promise(old, journalled=True))
    with contextlib.closing(open_store(home, disk)) as store:
        known.append(
            publish(store, disk, [shared, noise(2, 1500), noise(3, 5000)], known[-1] if known else None)
        )
    return disk, check_repository(known)


@scenario(100, several_packs=True)
def first_commit(home: Path) -> Made:
    """Into an empty repository."""
    return one_commit(home, 1)


@scenario(100, several_packs=True)
def second_commit(home: Path) -> Made:
    """Onto another commit, whose content it shares."""
    return one_commit(home, 2)


@scenario(60, several_packs=True)
def lost_race(home: Path) -> Made:
    """The commit that lost its race is kept under the name it was told, and so is the winner."""
    with contextlib.closing(create(home)) as store:
        base = commit(store, [b"base"])
        winner = commit(store, [b"winner"], base.id)
    disk = RecordingDisk(home)
    disk.acknowledge(Promise(winner, journalled=True))
    with contextlib.closing(open_store(home, disk)) as store, store.writer() as writer:
        made = put_commit(writer, [noise(4, 600), noise(5, 800)], [base.id])
        assert not writer.publish(publication(made.id, base.id))
        rescued = Commit(made.id, made.contents, f"refs/lost/main/{made.id.short}")
        disk.acknowledge(Promise(rescued))
        store.catch_up_journal()
        disk.acknowledge(Promise(rescued, journalled=True))
    return disk, check_repository([base, winner, rescued])


@scenario(15)
def ref_moves(home: Path) -> Made:
    """A branch is made, moved together with another, and deleted."""
    with contextlib.closing(create(home)) as store:
        first = commit(store, [b"first"])
        second = commit(store, [b"second"], first.id)
    other = "refs/heads/other"
    steps: list[tuple[ObjectId, ObjectId | None]] = [
        (second.id, None),
        (second.id, first.id),
        (first.id, second.id),
        (first.id, None),
    ]
    disk = RecordingDisk(home)
    disk.acknowledge(Promise(second, journalled=True))
    with contextlib.closing(open_store(home, disk)) as store:
        for (main, branch), (new_main, new_branch) in itertools.pairwise(steps):
            moves = [Move(other, branch, new_branch)]
            moves += [Move(MAIN, main, new_main)] if main != new_main else []
            assert store.update(moves, who="test", why="move")
            disk.acknowledge(Promise(first, journalled=True))

    def where(store: Store, promises: list[Promise]) -> None:
        standing = tips(store)
        reached = max(0, len(promises) - 1)
        # All moves of one update happened, or none; and at most one update that nobody heard of yet.
        assert (standing[MAIN], standing.get(other)) in steps[reached : reached + 2]

    return disk, check_repository([first, second], where)


@scenario(30)
def journal_catches_up(home: Path) -> Made:
    """Many entries are appended at once behind a torn line; torn anywhere, nothing is lost."""
    with contextlib.closing(create(home)) as store:
        known = [commit(store, [b"base"])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "catch_up_journal", lambda _: None)
            for number in range(8):
                known.append(commit(store, [b"%d" % number], known[-1].id, message="x" * 200))
                store.update(
                    [Move("refs/tags/" + "t" * 150 + str(number), None, known[-1].id)], who="me", why="tag"
                )
    journal = home / ".ckpt" / "refs.journal"
    journal.write_bytes(journal.read_bytes() + b"3 0123456789abcdef torn " + b"j" * 700)
    disk = RecordingDisk(home)
    disk.acknowledge(Promise(known[-1]))
    with contextlib.closing(open_store(home, disk)):
        pass
    disk.acknowledge(Promise(known[-1], journalled=True))
    return disk, check_repository(known)


@scenario(80)
def rebuild(home: Path) -> Made:
    """A rebuild is cut off; the next open rebuilds again, and afterwards there is one index."""
    with contextlib.closing(create(home)) as store:
        first = commit(store, [noise(6, 800)])
        second = commit(store, [noise(6, 800), b"more"], first.id)
    disk = RecordingDisk(home)
    disk.acknowledge(Promise(second, journalled=True))
    with contextlib.closing(open_store(home, disk)) as store:
        store.rebuild()
        store.reopen()
        third = publish(store, disk, [b"third"], second)
    return disk, check_repository([first, second, third])


@scenario(50)
def rebuild_of_missing_index(home: Path) -> Made:
    """The same when `meta` was gone already."""
    with contextlib.closing(create(home)) as store:
        first = commit(store, [noise(6, 800)])
    shutil.rmtree(home / ".ckpt" / "meta")
    disk = RecordingDisk(home)
    disk.acknowledge(Promise(first, journalled=True))
    with contextlib.closing(open_store(home, disk)) as store:
        second = publish(store, disk, [b"second"], first)
    return disk, check_repository([first, second])


@scenario(20)
def folder_made_by_a_writer_that_died(home: Path) -> Made:
    """A pack folder that is there need not be durable: whoever publishes into it must see to that."""

    class Dying(RecordingDisk):
        armed = True

        def sync_dir(self, path: Path) -> None:
            if self.armed and path.name == "packs":
                self.armed = False
                raise OSError("died here")
            super().sync_dir(path)

    with contextlib.closing(create(home)):
        pass
    disk = Dying(home)
    with contextlib.closing(open_store(home, disk)) as store:
        with pytest.raises(OSError, match="died here"):
            commit(store, [b"never"])
        store.lease._seq = 0  # the next pack goes into the same folder
        made = publish(store, disk, [b"acknowledged"], None)
    return disk, check_repository([made])


@scenario(100, several_packs=True)
def collection(home: Path) -> Made:
    """A collection is cut off: nothing live is lost, and the next one finishes the work."""
    shared = noise(7, 900)
    with contextlib.closing(create(home)) as store:
        # Dead: packs of their own, and a pack that the live commit shares a chunk with.
        dead = commit(store, [shared, noise(8, 600), noise(9, 5000)], ref="refs/heads/dead")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ckptvcs.store.writer._SECTION_BYTES", 1 << 30)
            mixed = commit(store, [shared, noise(10, 700), noise(11, 700)], dead.id, "refs/heads/dead")
        tip = commit(store, [shared, noise(10, 700), b"live"])
        assert store.update([Move("refs/heads/dead", mixed.id, None)], who="test", why="delete")
        with store.writer() as writer:
            put_commit(writer, [noise(12, 800), noise(13, 800)])
            writer._seal()
            writer._sealed.clear()  # as if it had died: its packs stay
    with contextlib.closing(open_store(home)) as store:
        planned = collect(store, grace=0, dry_run=True, who="test")
    assert planned.commits == 2
    assert planned.packs >= 3
    assert planned.leftovers > 0
    disk = RecordingDisk(home)
    disk.acknowledge(Promise(tip, journalled=True))
    with contextlib.closing(open_store(home, disk)) as store:
        done = collect(store, grace=0, dry_run=False, who="test")
        disk.acknowledge("collected")
        # What is made right after a collection must not rest on anything it took.
        after = publish(store, disk, [noise(9, 5000), shared, b"after"], tip)
    assert (done.freed, done.disk) == (planned.freed, planned.disk)
    usual = check_repository([tip, after, dead, mixed])

    def check(folder: Path, state: CrashState) -> None:
        again = folder.with_name(folder.name + "-collected")
        again.mkdir()
        state.materialise(again)
        with contextlib.closing(open_store(again)) as store:
            before = refs(store)
            collect(store, grace=0, dry_run=False, who="test")
            verify(store)
            assert refs(store) == before
            assert contents(store, tip.id) == tip.contents
            with store.snapshot() as snapshot:
                assert snapshot.row(dead.id) is None
                assert snapshot.row(mixed.id) is None
                names = {f"{name.text}.pack" for name in snapshot.packs()}
            left = collect(store, grace=0, dry_run=True, who="test")
            assert (left.freed, left.disk, left.records) == (0, 0, 0), "one collection is enough"
        assert {path.name for path in (again / ".ckpt" / "packs").rglob("*.pack")} == names
        shutil.rmtree(again)
        usual(folder, state)

    return disk, check


@scenario(60, several_packs=True)
def compaction_of_several_groups(home: Path) -> Made:
    """The living records of four packs go to two new ones, a transaction each."""
    with contextlib.closing(create(home)) as store:
        known: list[Commit] = []
        with pytest.MonkeyPatch.context() as patch:  # living and dead records side by side in each pack
            patch.setattr("ckptvcs.store.writer._SECTION_BYTES", 1 << 30)
            for number in range(4):
                ref = f"refs/heads/dead{number}"
                commit(store, [noise(20 + number, 700), noise(40 + number, 300)], ref=ref)
                old = known[-1].id if known else None
                known.append(commit(store, [noise(20 + number, 700), b"live %d" % number], old))
        dead = [name for name in tips(store) if "dead" in name]
        for name in dead:
            assert store.update([Move(name, tips(store)[name], None)], who="test", why="delete")
    disk = RecordingDisk(home)
    disk.acknowledge(Promise(known[-1], journalled=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckptvcs.maintenance.compaction.PACK_LIMIT", 2600)
        with contextlib.closing(open_store(home, disk)) as store:
            done = collect(store, grace=0, dry_run=False, who="test")
            assert done.packs == 4
            disk.acknowledge("collected")
    return disk, check_repository(known)


def drifting(home: Path, count: int) -> list[dict[str, Any]]:
    """A repository with a line of differences, a commit for each state."""
    states = []
    with Repo.init(home, compression="small") as repo:
        weights = np.random.default_rng(3).standard_normal(3000).astype(np.float32)
        for number in range(count):
            weights = weights.copy()
            weights[: 1000 * number] = 0  # so that the chain is better turned round
            states.append({"w": weights, "frozen": np.frombuffer(noise(5, 900), np.uint8), "step": number})
            repo.commit(states[-1], step=number)
    return states


def handle(folder: Path, disk: Disk | None = None) -> Repo:
    """A handle that goes through a disk of the test's."""
    return Repo(Opened(Store.open(folder / ".ckpt", disk or Disk(), threads=1), "test"), "main", owner=True)


def check_states(
    states: list[dict[str, Any]], operate: Callable[[Repo], object], kept: bytes | None = None
) -> Check:
    """A checker: every state is exact; done again it ends well, and a collection leaves nothing behind. In
    the end a file with the bytes to be `kept`, if any, is in quarantine, also if the index is lost."""

    def check(folder: Path, state: CrashState) -> None:
        without = folder.with_name(folder.name + "-without-index")
        without.mkdir()
        state.materialise(without)
        shutil.rmtree(without / ".ckpt" / "meta")
        for each in (folder, without) if kept else (folder,):
            with handle(each) as repo:
                exact(repo)
                operate(repo)
                exact(repo)
                report = repo.fsck(full=True)
                assert report.ok, report.problems
                repo.gc(grace=0)
                assert repo.gc(grace=0, dry_run=True).disk == 0, "one collection is enough"
                exact(repo)
            aside = [path.read_bytes() for path in (each / ".ckpt" / "quarantine").iterdir()]
            assert kept is None or kept in aside
        shutil.rmtree(without)

    def exact(repo: Repo) -> None:
        for number, state in enumerate(states):
            assert difference(repo.checkout(f"main@step:{number}"), state) is None

    return check


@scenario(25)
def repacking(home: Path) -> Made:
    """Chunks change their bases and packs are merged. At no moment is a chunk without a chain that ends."""
    states = drifting(home, 3)
    disk = RecordingDisk(home)
    with handle(home, disk) as repo:
        done = repo.repack()
        disk.acknowledge("repacked")
    assert done.into == 1
    assert done.chunks > 1
    return disk, check_states(states, lambda repo: None)


@scenario(20)
def repairing(home: Path) -> Made:
    """A pack without a whole footer is emptied and put aside."""
    states = drifting(home, 2)
    path = max((home / ".ckpt" / "packs").rglob("*.pack"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    disk = RecordingDisk(home)
    with handle(home, disk) as repo:
        done = repo.fsck(repair=True)
        disk.acknowledge("repaired")
    assert done.repaired is not None
    assert len(done.repaired.quarantined) == 1
    return disk, check_states(states, lambda repo: repo.fsck(repair=True), bytes(data))


@scenario(15)
def settings(home: Path) -> Made:
    """`config.toml` holds the old settings or the new ones, and the new ones once that was said."""
    with contextlib.closing(create(home)) as store:
        first = commit(store, [b"first"])
    texts = [b"", b'compression = "small"\n', b'compression = "fast"\ngc.grace = "1h"\n', b"# none\n"]
    disk = RecordingDisk(home)
    for text in texts[1:]:
        disk.replace(home / ".ckpt" / "config.toml", text)
        disk.acknowledge(text)
    usual = check_repository([first])

    def check(folder: Path, state: CrashState) -> None:
        said = len(state.acknowledged)
        assert (folder / ".ckpt" / "config.toml").read_bytes() in texts[said : said + 2]
        usual(folder, state)

    return disk, check


@scenario(40)
def claims(home: Path) -> Made:
    """A claim does not outlive a power cut, whatever is left of its file; a commit under it does."""
    with contextlib.closing(create(home)) as store:
        first = commit(store, [b"first"])
    disk = RecordingDisk(home)
    disk.acknowledge(Promise(first, journalled=True))
    with contextlib.closing(open_store(home, disk)) as store:
        claim = store.claim(MAIN, first.id, {"host": "here"})
        assert claim is not None
        with store.writer() as writer:
            made = put_commit(writer, [noise(3, 900)], [first.id])
            assert writer.publish(replace(publication(made.id, first.id), claim=claim))
        disk.acknowledge(Promise(made))
        thief = store.claim(MAIN, made.id, {"host": "there"}, steal=True)
        assert thief is not None
        assert not claim.held
        thief.release()
    usual = check_repository([first, made])

    def check(folder: Path, state: CrashState) -> None:
        with contextlib.closing(open_store(folder)) as store:
            taken = store.claim(MAIN, tips(store)[MAIN], {"host": "afterwards"})
            assert taken is not None
            assert taken.held
            taken.release()
        usual(folder, state)

    return disk, check


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["few", "many"])
def test_power_cuts(scratch: Path, covered: Callable[[str], None], name: str, few: bool) -> None:
    """In every state that a power cut may leave, all that was promised is there, and work goes on."""
    disk, check = SCENARIOS[name](scratch)
    explored = explore(
        disk.log, scratch, check, seed=SEED, exhaustive=4 if few else 8, sample=2 if few else 12
    )
    covered(str(explored))
    assert explored.enumerated >= explored.checked >= SCENARIOS[name].least, explored


def sync_of(disk: RecordingDisk, operation: Operation) -> str | None:
    """What kind of file or folder an operation syncs; None if it does something else."""
    if isinstance(operation, Synced):
        path = disk.log.paths[operation.node]
    elif isinstance(operation, FolderSynced):
        path = disk.log.paths[operation.folder] + "/"
    else:
        return None
    path = re.sub(r"[0-9a-f-]{36}-\d+", "NAME", path)
    path = re.sub(r"\.ckpt-init-[0-9a-f]{12}", ".ckpt", path)
    path = re.sub(r"packs/[0-9a-f]{2}/", "packs/xx/", path)
    return re.sub(r"[0-9a-f]{12}", "RANDOM", path)


EMPTY = "nothing lies in it yet, and a folder that is missing is made anew"
NOT_NEEDED: dict[tuple[str, str], str] = {
    ("init", ".ckpt/incoming/"): EMPTY,
    ("init", ".ckpt/leases/"): EMPTY,
    ("init", ".ckpt/packs/"): EMPTY,
    ("init", ".ckpt/quarantine/"): EMPTY,
    ("init", ".ckpt/tmp/"): EMPTY,
    ("init", ".ckpt/refs.journal"): "its one line is written anew from the index",
    ("init", ".ckpt/meta/"): "an index that is missing is made anew",
    ("rebuild_of_missing_index", ".ckpt/tmp/"): "the old name may come back: the next rebuild removes it",
}
"""What is synced although no crash state tells, by scenario: the reasons."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_each_sync_is_needed(scratch: Path, covered: Callable[[str], None], name: str) -> None:
    """These tests can fail: leaving out the syncs of one kind, up to any one promise, breaks a promise."""
    disk, check = SCENARIOS[name](scratch)
    operations = disk.log.operations
    breadth = {"seed": SEED, "exhaustive": 3, "sample": 2}
    known = {state.key() for state in crash_states(disk.log, **breadth)}
    promises = list(itertools.accumulate(isinstance(each, Acknowledged) for each in operations))
    left_out: dict[str, bool] = {}
    for kind in sorted({kind for each in operations if (kind := sync_of(disk, each)) is not None}):
        noticed = []
        for promised in sorted(set(promises)):
            disk.log.operations = [
                each
                for each, before in zip(operations, promises, strict=True)
                if before != promised or sync_of(disk, each) != kind
            ]
            if len(disk.log.operations) < len(operations):
                noticed.append(is_noticed(disk, scratch, check, breadth, known))
        left_out[kind] = any(noticed)
    covered(f"{len(left_out)} kinds of syncs left out, {sum(left_out.values())} of them noticed")
    unnoticed = {kind for kind, noticed in left_out.items() if not noticed}
    assert unnoticed == {kind for of, kind in NOT_NEEDED if of == name}


def is_noticed(
    disk: RecordingDisk, scratch: Path, check: Check, breadth: dict[str, int], known: set[bytes]
) -> bool:
    """Whether a crash state that is not among the known ones breaks a promise."""
    try:
        explore(disk.log, scratch, check, **breadth, known=known)
    except (AssertionError, OSError, CkptError) as problem:
        notes = "".join(problem.__notes__)
    else:
        return False
    assert "power cut after operation" in notes
    for left in scratch.glob("state-*"):
        shutil.rmtree(left)
    return True


def test_model_of_the_file_system(scratch: Path) -> None:
    """The model itself: content and names are lost apart from each other, and syncs end the doubt."""
    home = scratch / "home"
    home.mkdir()
    disk = RecordingDisk(home)
    with disk.create(home / "a.tmp") as file:
        file.write([b"x" * 600])
        file.sync()
    disk.rename(home / "a.tmp", home / "a")
    disk.sync_dir(home)
    disk.make_dir(home / "d")
    disk.publish(home / "a", home / "d" / "b")
    trees: list[dict[str, bytes | None]] = []
    explored = explore(disk.log, scratch, lambda _, state: trees.append(state.tree))
    x = b"x" * 600
    assert {"a.tmp": x[:512]} in trees
    assert {"a.tmp": bytes(600)} in trees
    assert {"a.tmp": bytes(512) + x[512:]} in trees
    assert {"a.tmp": b""} in trees
    assert {"a": x, "d": None} in trees
    assert {"d": None} in trees, "the unlink may be durable before the link"
    assert {"d": None, "d/b": x, "a": x} in trees
    assert {"a": b""} not in trees, "the content was synced before the rename"
    assert {"a": x, "a.tmp": x} not in trees, "a rename happens whole"
    after = [s for s in trees if "a" not in s and "a.tmp" not in s and "d" not in s]
    assert after == [{}]
    assert explored.checked == len(trees)


def test_writes_reach_the_medium_in_any_order(scratch: Path) -> None:
    """Of five unsynced writes any one may be lost or kept alone, and all be torn at a sector or a page."""
    home = scratch / "home"
    home.mkdir()
    disk = RecordingDisk(home)
    with disk.create(home / "a") as file:
        disk.sync_dir(home)
        for letter in b"vwxyz":
            file.write([bytes([letter]) * 2048])
    found = {state.tree["a"] for state in crash_states(disk.log, exhaustive=4) if "a" in state.tree}
    parts = [bytes([letter]) * 2048 for letter in b"vwxyz"]
    for lost in range(5):
        assert b"".join(bytes(2048) if at == lost else part for at, part in enumerate(parts)) in found or (
            lost == 4 and b"".join(parts[:4]) in found
        )
        assert bytes(2048 * lost) + parts[lost] in found
    whole = b"".join(parts)
    assert {whole[:512], whole[:4096], bytes(512) + whole[512:], bytes(4096) + whole[4096:]} <= found
