"""SIGKILL between any two steps of every operation that has several, and what must be there afterwards.

Operations that only a whole repository has are cut off by power cuts here, too.
"""

from __future__ import annotations

import importlib
import os
import random
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pytest

from ckptvcs import CkptError, ConflictError, LockedError, ObjectId, Repo
from ckptvcs.companion import Channel, SharedMemory
from ckptvcs.disk import Disk
from ckptvcs.maintenance.rewriting import Rewriter
from ckptvcs.opened import Opened
from ckptvcs.store import Store
from ckptvcs.store.format import HEADER_BYTES, PackName
from ckptvcs.store.index_free import IndexFreeStore
from ckptvcs.testing.crashes import CrashState, RecordingDisk, crash_states, explore
from ckptvcs.testing.failpoints import Acknowledge, Killed, KillingDisk, kill_at_every_step
from tests.concurrency.processes import exact
from tests.crash.stores import create, noise, put_commit

_LONG = "CKPT_TEST_LONG" in os.environ
_STRIDE = 1 if _LONG else 3
"""Each n-th step is killed. Where it begins is drawn anew in each run."""
_SHARE = 1 if _LONG else 6
"""One in so many of the states that a power cut may leave is looked at."""
SEED = 20_261_125
Say = Callable[[str], None]
Operate = Callable[[Repo, Acknowledge], None]
Judge = Callable[[Repo, Killed], None]


def state_of(number: int) -> dict[str, Any]:
    """The state of a step: something that never changes, something that changes a little, something new."""
    fresh = np.random.default_rng(number)
    weights = np.random.default_rng(7).standard_normal(700).astype(np.float32)
    weights[number % 50] += np.float32(number) / 1000
    return {
        "frozen": np.random.default_rng(1).integers(0, 256, 900, np.uint8),
        "optimizer": {"exp_avg": fresh.standard_normal(40)},
        "model": weights,
        "step": number,
    }


def opened(folder: Path, disk: Disk | None = None, branch: str = "main") -> Repo:
    """A handle that goes through a disk of the test's."""
    store = Store.open(folder / ".ckpt", disk or Disk(), threads=1)
    return Repo(Opened(store, "test"), branch, owner=True)


@pytest.fixture(autouse=True)
def _several_packs(several_packs: None) -> None:
    """Each component of a commit gets a pack of its own."""


@pytest.fixture
def start(scratch: Path) -> Path:
    """Three commits on main, the last of which a tag names."""
    folder = scratch / "start"
    folder.mkdir()
    with Repo.init(folder) as repo:
        for number in range(3):
            repo.commit(state_of(number), step=number)
        repo.tag("v2")
    return folder


class BreakOff(Protocol):
    """Break an operation of a handle off at each of its steps, and check what is left."""

    def __call__(
        self, operate: Operate, judge: Judge = ..., *, prepare: Callable[[Repo], None] = ..., least: int
    ) -> None: ...


def nothing(*_: object) -> None:
    """Nothing to prepare, or nothing more to judge."""


@pytest.fixture
def kill(scratch: Path, start: Path, covered: Say) -> BreakOff:
    """By a kill, for a handle on main in a copy of `start`."""

    def run(
        operate: Operate, judge: Judge = nothing, *, prepare: Callable[[Repo], None] = nothing, least: int
    ) -> None:
        with opened(start) as repo:
            prepare(repo)

        def act(folder: Path, disk: KillingDisk, acknowledge: Acknowledge) -> None:
            with opened(folder, disk) as repo:
                operate(repo, acknowledge)

        kill_everywhere(start, scratch, act, judge, covered, least)

    return run


def kill_everywhere(
    start: Path,
    scratch: Path,
    operate: Callable[[Path, KillingDisk, Acknowledge], None],
    judge: Judge,
    covered: Say,
    least: int,
    before: Callable[[Path, Killed], None] = nothing,
) -> None:
    """Kill an operation at its steps, of which there are `least`: at each third one, or at all."""
    first = random.SystemRandom().randint(1, _STRIDE)

    def check(folder: Path, killed: Killed) -> None:
        before(folder, killed)
        whole(folder, killed, judge)

    kills = kill_at_every_step(start, scratch, operate, check, first=first, every=_STRIDE)
    which = "each step" if _STRIDE == 1 else f"one step in {_STRIDE}, from {first} on"
    covered(f"{kills} kills, at {which}")
    assert (kills + 1) * _STRIDE > least


@pytest.fixture
def cut(scratch: Path, start: Path, covered: Say) -> BreakOff:
    """By a power cut, of which each has many outcomes."""

    def run(
        operate: Operate, judge: Judge = nothing, *, prepare: Callable[[Repo], None] = nothing, least: int
    ) -> None:
        with opened(start) as repo:
            prepare(repo)
        disk = RecordingDisk(start)
        with opened(start, disk) as repo:
            operate(repo, disk.acknowledge)

        def check(folder: Path, state: CrashState) -> None:
            broken_off = Killed(state.prefix, (state.last,), tuple(map(str, state.acknowledged)))
            whole(folder, broken_off, judge)

        breadth = {"seed": SEED, "exhaustive": 2, "sample": 1}
        left = {key for state in crash_states(disk.log, **breadth) if (key := state.key())[0] % _SHARE}
        explored = explore(disk.log, scratch, check, **breadth, known=left)
        covered(str(explored))
        assert explored.checked + len(left) >= least

    return run


@pytest.fixture(params=["killed", "cut"])
def break_off(request: pytest.FixtureRequest) -> BreakOff:
    """By kills, and by power cuts."""
    return cast(BreakOff, request.getfixturevalue("kill" if request.param == "killed" else "cut"))


def whole(folder: Path, killed: Killed, judge: Judge) -> None:
    """All that was there before and all that was acknowledged is there and exact, and work goes on."""
    with opened(folder) as repo:
        judge(repo, killed)
        acknowledged(repo, killed)
        sound(repo)
        before = refs_of(repo)
        repo.gc(grace=0)
        assert repo.gc(grace=0, dry_run=True).disk == 0, "one collection is enough"
        for name in ("tmp", "leases"):
            left = [each for each in os.listdir(folder / ".ckpt" / name) if not is_own_lease(repo, each)]
            assert left == [], (name, left)
        assert refs_of(repo) == before
        if "main" in repo.branches():
            repo.restore({}, strict=False)
        after = repo.commit(state_of(1000), step=1000)
        exact(repo.checkout(after), state_of(1000))
        before = refs_of(repo)
    shutil.rmtree(folder / ".ckpt" / "meta")
    with opened(folder) as repo:
        assert refs_of(repo) == before
        acknowledged(repo, killed)
        sound(repo)


def sound(repo: Repo) -> None:
    """Every byte hashes to its id, and all that refs reach is there."""
    report = repo.fsck(full=True)
    assert report.ok, report.problems


def acknowledged(repo: Repo, killed: Killed) -> None:
    """Each commit that the child said it had made, as 'NUMBER ID', and those of the start."""
    if "v2" in repo.tags():
        for number in range(3):
            if repo.dropped(f"v2~{2 - number}") is None:
                exact(repo.checkout(f"v2~{2 - number}"), state_of(number))
    for number, id in commits_of(killed):
        exact(repo.checkout(id), state_of(number))


def commits_of(killed: Killed) -> list[tuple[int, str]]:
    """The commits among what was acknowledged, with their numbers."""
    words = [said.split() for said in killed.acknowledged]
    return [(int(word[0]), word[1]) for word in words if word[0].isdigit()]


def is_own_lease(repo: Repo, name: str) -> bool:
    """Whether it is the lease that this very handle holds."""
    lock = repo._store.lease._lock
    return lock is not None and lock.path.name == name


def refs_of(repo: Repo) -> dict[str, ObjectId | str]:
    """All refs, HEAD included."""
    with repo._store.snapshot() as snapshot:
        return snapshot.refs()


def test_init(scratch: Path, covered: Say) -> None:
    """There is no repository, or a whole one, and the next init sweeps up."""
    nowhere = scratch / "start"
    nowhere.mkdir()

    def operate(folder: Path, disk: KillingDisk, acknowledge: Acknowledge) -> None:
        create(folder, disk).close()
        acknowledge("created")

    def make_again(folder: Path, killed: Killed) -> None:
        if not (folder / ".ckpt").exists():
            assert not killed.acknowledged
            create(folder).close()
        assert os.listdir(folder) == [".ckpt"]

    kill_everywhere(nowhere, scratch, operate, nothing, covered, 40, before=make_again)


def test_commit(kill: BreakOff) -> None:
    """Several packs, a difference among them. The tip is the old one or the new one."""

    def operate(repo: Repo, acknowledge: Acknowledge) -> None:
        repo.restore({}, strict=False)
        for number in (3, 4):
            acknowledge(f"{number} {repo.commit(state_of(number), step=number).id}")

    def judge(repo: Repo, killed: Killed) -> None:
        done = len(killed.acknowledged)
        tip = repo.resolve("main")
        assert tip.step in (2 + done, 3 + done)
        exact(repo.checkout(tip), state_of(tip.step or 0))

    kill(operate, judge, least=80)


def test_lost_race(kill: BreakOff) -> None:
    """The commit that lost its race is under lost/, or nowhere."""

    def operate(repo: Repo, acknowledge: Acknowledge) -> None:
        repo.restore({}, strict=False)
        acknowledge(f"3 {repo.on('main').commit(state_of(3), step=3).id}")
        with pytest.raises(ConflictError) as caught:
            repo.commit(state_of(4), step=4)
        acknowledge(f"4 {caught.value.rescued}")

    def judge(repo: Repo, killed: Killed) -> None:
        for name in repo.lost():
            exact(repo.checkout(name), state_of(4))

    kill(operate, judge, least=80)


def test_commit_in_the_background(kill: BreakOff, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the writer process that dies, and the one after it too if it gets as far. The trainer is told
    which saves were made, even if the writer died before it could answer, and goes on."""

    def operate(repo: Repo, acknowledge: Acknowledge) -> None:
        monkeypatch.setattr("ckptvcs.background.Companion", forked(repo.disk))
        repo.restore({}, strict=False)
        for number in (3, 4):
            pending = repo.commit_async(state_of(number), step=number)
            try:
                acknowledge(f"{number} {pending.result().id}")
            except CkptError as error:
                acknowledge(f"{error.code} {number} {error}")

    def judge(repo: Repo, killed: Killed) -> None:
        steps = [commit.step for commit in repo.log("main")]
        refused = [int(said.split()[1]) for said in killed.acknowledged if said.startswith("writer-lost ")]
        assert len(refused) + len(commits_of(killed)) == 2
        assert steps == [number for number in (4, 3, 2, 1, 0) if number not in refused]
        assert killed.at or not refused

    kill(operate, judge, least=40)


def forked(disk: Disk) -> Callable[..., Any]:
    """Stands for `Companion`: the writer process as a fork of this one, whose repository lies on `disk`."""

    class Forked:
        alive = True

        def __init__(self, module: str, memory: SharedMemory, _: object) -> None:
            ours, theirs = socket.socketpair()
            seen = os.dup(memory.descriptor)  # a fork lets go of what is its parent's
            self.number = os.fork()
            if self.number == 0:
                ours.close()
                for opening in ("ckptvcs.repo", "ckptvcs.opening"):
                    vars(sys.modules[opening])["Disk"] = lambda: disk
                try:
                    importlib.import_module(module).main(Channel(theirs), SharedMemory.attached(seen))
                finally:
                    os._exit(0)
            theirs.close()
            os.close(seen)
            self._channel = Channel(ours)
            self.send, self.receive = self._channel.send, self._channel.receive

        def end(self) -> str:
            self._channel.close()
            return f"ended with status {os.waitpid(self.number, 0)[1]}"

    return Forked


def test_ref_moves(kill: BreakOff) -> None:
    """Branches, tags and HEAD: each change happened or did not, in order."""
    changes: list[Callable[[Repo], object]] = [
        lambda repo: repo.branch("side", "main~1"),
        lambda repo: repo.set_head("side"),
        lambda repo: repo.tag("t", "main~2"),
        lambda repo: repo.set_head("main"),
        lambda repo: repo.delete_branch("side", force=True),
        lambda repo: repo.delete_tag("t", force=True),
    ]

    def operate(repo: Repo, acknowledge: Acknowledge) -> None:
        for change in changes:
            change(repo)
            acknowledge("changed")

    def judge(repo: Repo, killed: Killed) -> None:
        done = len(killed.acknowledged)
        with repo._store.snapshot() as snapshot:
            standing = (snapshot.ref("HEAD"), "side" in repo.branches(), "t" in repo.tags())
        main, side = "refs/heads/main", "refs/heads/side"
        stories = [
            (main, False, False),
            (main, True, False),
            (side, True, False),
            (side, True, True),
            (main, True, True),
            (main, False, True),
            (main, False, False),
        ]
        assert standing in stories[done : done + 2]

    kill(operate, judge, least=30)


def test_collection(kill: BreakOff) -> None:
    """Dead packs, packs that are dead in part, and what a dead writer left: nothing live is lost."""

    def prepare(repo: Repo) -> None:
        side = repo.on("side")
        side.commit(state_of(10))
        with pytest.MonkeyPatch.context() as patch:  # a pack that living and dead commits share
            patch.setattr("ckptvcs.store.writer._SECTION_BYTES", 1 << 30)
            side.commit({**state_of(11), "shared": state_of(12)})
        repo.restore({}, strict=False)
        repo.commit(state_of(12), step=12)
        repo.delete_branch("side", force=True)
        with repo._store.writer() as writer:
            put_commit(writer, [noise(12, 800), noise(13, 800)])
            writer._seal()
            writer._sealed.clear()  # as if it had died: its packs stay
        assert repo.gc(grace=0, dry_run=True).packs >= 3

    def operate(repo: Repo, acknowledge: Acknowledge) -> None:
        repo.gc(grace=0)
        acknowledge("collected")
        repo.restore({}, strict=False)
        # What is made behind a collection must not rest on anything it took.
        acknowledge(f"13 {repo.commit(state_of(13), step=13).id}")

    def judge(repo: Repo, killed: Killed) -> None:
        exact(repo.checkout("main~1" if repo.resolve("main").step == 13 else "main"), state_of(12))

    kill(operate, judge, prepare=prepare, least=60)


def test_expiry_of_lost_commits(kill: BreakOff, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection that first drops names under lost/ which are older than 30 days."""

    def prepare(repo: Repo) -> None:
        repo.restore({}, strict=False)
        repo.on("main").commit(state_of(3), step=3)
        with pytest.raises(ConflictError):
            repo.commit(state_of(4), step=4)

    def operate(repo: Repo, acknowledge: Acknowledge) -> None:
        monkeypatch.setattr("ckptvcs.maintenance.gc.LOST_DAYS", -1)
        repo.gc(grace=0)
        acknowledge("collected")

    def judge(repo: Repo, killed: Killed) -> None:
        for name in repo.lost():
            assert not killed.acknowledged
            exact(repo.checkout(name), state_of(4))

    kill(operate, judge, prepare=prepare, least=20)


@pytest.mark.parametrize("missing", [False, True], ids=["asked-for", "missing"])
def test_rebuild(scratch: Path, start: Path, covered: Say, missing: bool) -> None:
    """The index is made anew, on request or because it is gone."""
    if missing:
        shutil.rmtree(start / ".ckpt" / "meta")

    def operate(folder: Path, disk: KillingDisk, acknowledge: Acknowledge) -> None:
        with opened(folder, disk) as repo:
            if not missing:
                assert repo.fsck(rebuild=True).ok
            repo.restore({}, strict=False)
            acknowledge(f"3 {repo.commit(state_of(3), step=3).id}")

    kill_everywhere(start, scratch, operate, nothing, covered, 40)


def test_settings(kill: BreakOff) -> None:
    """`config.toml` holds the old settings or the new ones."""

    def operate(repo: Repo, acknowledge: Acknowledge) -> None:
        for value in ("1h", "2h", None):
            repo.configure("gc.grace", value)
            acknowledge("configured")

    def judge(repo: Repo, killed: Killed) -> None:
        done = len(killed.acknowledged)
        assert repo.config.get("gc.grace") in ["24h", "1h", "2h", "24h"][done : done + 2]

    kill(operate, judge, least=15)


def test_claims(kill: BreakOff) -> None:
    """A claim ends with its process, wherever that dies; a branch is taken over whole or not at all."""

    def operate(repo: Repo, acknowledge: Acknowledge) -> None:
        repo.restore({}, strict=False)
        first = repo.claim()
        acknowledge(f"3 {repo.commit(state_of(3), step=3).id}")
        with opened(repo.path, repo.disk) as other:
            other.restore({}, strict=False)
            other.claim(steal=True)
            assert not first.held
            with pytest.raises(LockedError):
                repo.commit(state_of(4), step=4)
            acknowledge(f"5 {other.commit(state_of(5), step=5).id}")

    def judge(repo: Repo, killed: Killed) -> None:
        with repo.claim():
            assert repo.claimed
        steps = [commit.step for commit in repo.log("main")]
        assert steps in ([2, 1, 0], [3, 2, 1, 0], [5, 3, 2, 1, 0])

    kill(operate, judge, least=80)


def test_import(kill: BreakOff, tmp_path: Path) -> None:
    """A branch of a folder of checkpoints, cut off anywhere: done again, it goes on where it stopped."""
    for step in (1, 2, 3):
        np.savez(tmp_path / f"step_{step}.npz", weights=np.arange(300) + step)

    def operate(repo: Repo, acknowledge: Acknowledge) -> None:
        repo.import_run(tmp_path, branch="run")
        acknowledge("imported")

    def judge(repo: Repo, killed: Killed) -> None:
        there = [commit.step for commit in repo.log("run")] if "run" in repo.branches() else []
        assert there == [3, 2, 1][3 - len(there) :]
        assert len(there) == 3 or not killed.acknowledged
        repo.import_run(tmp_path, branch="run")
        assert [commit.step for commit in repo.log("run")] == [3, 2, 1]

    kill(operate, judge, least=80)


def test_retention(break_off: BreakOff) -> None:
    """Content is dropped, freed, and what stays is encoded anew without it. Each commit has all or nothing
    of it, and those that are kept have all."""

    def prepare(repo: Repo) -> None:
        repo.restore({}, strict=False)
        repo.configure("compression", "small")
        for number in (3, 4, 5):
            repo.commit(state_of(number), step=number)
        repo.on("side").commit(state_of(6), step=6)

    def operate(repo: Repo, acknowledge: Acknowledge) -> None:
        repo.retain("main", keep_last=2)
        acknowledge("dropped")

    def judge(repo: Repo, killed: Killed) -> None:
        for commit in repo.log("main"):
            if repo.dropped(commit) is None:
                exact(repo.checkout(commit), state_of(commit.step or 0))
        kept = {commit.step for commit in repo.log("main") if repo.dropped(commit) is None}
        assert kept >= {2, 4, 5}, "the last two and the tagged one"
        assert kept == {2, 4, 5} or not killed.acknowledged
        exact(repo.checkout("side"), state_of(6))

    break_off(operate, judge, prepare=prepare, least=60)


def test_repack(break_off: BreakOff) -> None:
    """Chunks are encoded anew and packs merged; every commit stays what it is."""

    def prepare(repo: Repo) -> None:
        repo.restore({}, strict=False)
        for number in range(3, 7):
            repo.commit(smooth(number), step=number)

    def operate(repo: Repo, acknowledge: Acknowledge) -> None:
        assert repo.repack().packs > 3
        acknowledge("repacked")
        assert repo.repack(older_than=0).packs > 0
        acknowledge("renewed")

    def judge(repo: Repo, killed: Killed) -> None:
        for number in range(3, 7):
            exact(repo.checkout(f"main~{6 - number}"), smooth(number))

    break_off(operate, judge, prepare=prepare, least=40)


def smooth(number: int) -> dict[str, Any]:
    """States so much alike that they are stored as differences."""
    weights = np.random.default_rng(3).standard_normal(20_000).astype(np.float32)
    return {"weights": weights * np.float32(1 + number * 1e-6), "step": number}


def test_repair(break_off: BreakOff) -> None:
    """A damaged record is replaced by its other copy."""

    def prepare(repo: Repo) -> None:
        repo.restore({}, strict=False)
        commit = repo.commit({**state_of(3), "rare": state_of(30)}, step=3)
        with repo._store.snapshot() as snapshot:
            row = snapshot.row(commit.id)
        assert row is not None
        path = repo._store.layout.pack(row.pack)
        copy = repo._store.layout.pack(PackName(row.pack.lease, row.pack.seq + 1000))
        damaged = bytearray(path.read_bytes())
        damaged[row.offset + HEADER_BYTES + 3] ^= 1
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
        with repo._store.index.change() as change:
            info = change.pack(row.pack)
            assert info is not None
            change.put_pack(PackName(row.pack.lease, row.pack.seq + 1000), info)
        path.chmod(0o644)
        path.write_bytes(damaged)

    def operate(repo: Repo, acknowledge: Acknowledge) -> None:
        report = repo.fsck(full=True, repair=True)
        assert report.repaired is not None
        assert report.repaired.copies == 1
        acknowledge("repaired")

    def judge(repo: Repo, killed: Killed) -> None:
        if killed.acknowledged:
            sound(repo)
        repo.fsck(full=True, repair=True)
        exact(repo.checkout("main"), {**state_of(3), "rare": state_of(30)})

    break_off(operate, judge, prepare=prepare, least=10)


def test_commit_without_the_index_and_ingestion(scratch: Path, start: Path, covered: Say) -> None:
    """A bundle is there whole or not at all, and is taken up once, wherever its writer or ingester dies."""

    def operate(folder: Path, disk: KillingDisk, acknowledge: Acknowledge) -> None:
        outside = IndexFreeStore(folder / ".ckpt", disk, 1)
        outside.start()
        with Repo(Opened(outside, "test"), "main", owner=True) as repo:
            repo.restore({}, strict=False)
            for number in (3, 4):
                acknowledge(f"{number} {repo.commit(state_of(number), step=number).id}")
        with opened(folder, disk) as repo:
            repo.ingest()
        acknowledge("ingested")

    def judge(repo: Repo, killed: Killed) -> None:
        repo.ingest()
        steps = [commit.step for commit in repo.log("main")]
        assert steps in ([2, 1, 0], [3, 2, 1, 0], [4, 3, 2, 1, 0])
        assert len(steps) >= 3 + len(commits_of(killed))
        assert repo.lost() == {}
        assert os.listdir(repo._store.layout.quarantine) == []

    kill_everywhere(start, scratch, operate, judge, covered, 100)


def test_undelete_and_pins(kill: BreakOff) -> None:
    """A deleted branch comes back whole or not at all; a pin holds what it was said to hold."""

    def prepare(repo: Repo) -> None:
        repo.on("side").commit(state_of(8), step=8)
        repo.delete_branch("side", force=True)

    def operate(repo: Repo, acknowledge: Acknowledge) -> None:
        id = repo.undelete("side")
        acknowledge(f"8 {id}")
        repo.pin(id)
        acknowledge(f"8 {id}")
        repo.delete_branch("side", force=True)
        acknowledge(f"8 {id}")
        repo.gc(grace=0)

    def judge(repo: Repo, killed: Killed) -> None:
        said = len(killed.acknowledged)
        assert ("side" in repo.branches()) in {0: (False, True), 1: (True,), 2: (True, False), 3: (False,)}[
            said
        ]
        assert len(repo.pins()) in {0: (0,), 1: (0, 1), 2: (1,), 3: (1,)}[said]

    kill(operate, judge, prepare=prepare, least=15)


def drifting(number: int) -> dict[str, Any]:
    """A state in a line of differences, which is better turned round."""
    weights = np.random.default_rng(3).standard_normal(3000).astype(np.float32)
    weights[: 800 * number] = 0
    return {"w": weights, "frozen": noise(5, 900), "step": number}


@pytest.fixture
def line(scratch: Path) -> Path:
    """Four commits at level small."""
    folder = scratch / "line"
    folder.mkdir()
    with Repo.init(folder, compression="small") as repo:
        for number in range(4):
            repo.commit(drifting(number), step=number)
    return folder


def kill_upkeep(
    start: Path,
    scratch: Path,
    covered: Callable[[str], None],
    operate: Callable[[Repo], object],
    check: Callable[[Repo], None],
    *,
    least: int,
) -> None:
    """Kill what rewrites a repository at each of its steps. All commits stay readable, nothing stays behind,
    and done again it is as if nothing had happened."""

    def act(folder: Path, disk: KillingDisk, acknowledge: Acknowledge) -> None:
        with opened(folder, disk) as repo:
            operate(repo)
            acknowledge("done")

    def judge(folder: Path, killed: Killed) -> None:
        for again in (False, True):
            with opened(folder) as repo:
                if again:
                    operate(repo)
                if again or killed.acknowledged:
                    sound(repo)
                check(repo)
        with opened(folder) as repo:
            repo.gc(grace=0)
            assert repo.gc(grace=0, dry_run=True).disk == 0, "one collection is enough"
            sound(repo)
        shutil.rmtree(folder / ".ckpt" / "meta")
        with opened(folder) as repo:
            sound(repo)
            check(repo)

    kills = kill_at_every_step(start, scratch, act, judge)
    covered(f"killed at each of {kills} steps")
    assert kills >= least


def all_there(repo: Repo) -> None:
    """The four commits are exact."""
    for number in range(4):
        exact(repo.checkout(f"main@step:{number}"), drifting(number))


def test_repack_to_the_smallest(line: Path, scratch: Path, covered: Callable[[str], None]) -> None:
    with Repo.open(line) as repo:
        assert repo.repack(smallest=True, dry_run=True).chunks >= 3
    kill_upkeep(line, scratch, covered, lambda repo: repo.repack(smallest=True), all_there, least=25)


def test_renewing_old_packs(line: Path, scratch: Path, covered: Callable[[str], None]) -> None:
    for path in (line / ".ckpt").rglob("*"):
        if path.suffix == ".pack" or path.name in ("format", "refs.journal"):
            os.utime(path, (10**9, 10**9))
    kill_upkeep(line, scratch, covered, lambda repo: repo.repack(older_than="9d"), all_there, least=15)


def test_repair_of_a_pack_without_its_end(line: Path, scratch: Path, covered: Callable[[str], None]) -> None:
    """A pack without its footer, and a damaged record of which there is a copy."""
    with Repo.open(line) as repo:
        tip = repo.resolve("main").tree
        with repo._store.collecting(), Rewriter(repo._store) as rewriter:
            with repo._store.snapshot() as snapshot:
                row = snapshot.row(tip)
            assert row is not None
            rewriter.copy(tip, row)
            rewriter.publish()
        with repo._store.snapshot() as snapshot:
            row = snapshot.row(tip)
        assert row is not None
        damaged = repo._store.layout.pack(row.pack)
    first = next(path for path in (line / ".ckpt" / "packs").rglob("*.pack") if path != damaged)
    for path, at in ((damaged, row.offset + 110), (first, first.stat().st_size - 3)):
        path.chmod(0o644)
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    def check(repo: Repo) -> None:
        for number in range(3):
            exact(repo.checkout(f"main@step:{number}"), drifting(number))

    kill_upkeep(line, scratch, covered, lambda repo: repo.fsck(full=True, repair=True), check, least=25)


def test_merging_of_small_packs(break_off: BreakOff, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a commit, small packs become one; the commit is there before."""
    monkeypatch.setattr("ckptvcs.maintenance.small_packs.MANY", 4)

    def operate(repo: Repo, acknowledge: Acknowledge) -> None:
        repo.restore({}, strict=False)
        before = len(list(repo._store.layout.packs.rglob("*.pack")))
        acknowledge(f"3 {repo.commit(state_of(3), step=3).id}")
        assert len(list(repo._store.layout.packs.rglob("*.pack"))) < before

    break_off(operate, least=40)
