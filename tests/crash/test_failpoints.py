"""SIGKILL between any two steps of every operation that has several, and what must be there afterwards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import ConflictError, ObjectId, Repo
from ckptvcs.disk import Disk
from ckptvcs.opened import Opened
from ckptvcs.store import Store
from ckptvcs.testing.failpoints import Acknowledge, Killed, KillingDisk, kill_at_every_step
from tests.concurrency.processes import exact

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


@pytest.fixture
def kill(scratch: Path, start: Path, covered: Callable[[str], None]) -> Callable[..., None]:
    """Kill an operation of a handle at each of its steps, and check what is left."""

    def run(operate: Operate, judge: Judge = lambda _, __: None, *, least: int) -> None:
        def act(folder: Path, disk: KillingDisk, acknowledge: Acknowledge) -> None:
            with opened(folder, disk) as repo:
                operate(repo, acknowledge)

        kills = kill_at_every_step(start, scratch, act, lambda folder, killed: whole(folder, killed, judge))
        covered(f"killed at each of {kills} steps")
        assert kills >= least

    return run


def whole(folder: Path, killed: Killed, judge: Judge) -> None:
    """All that was there before and all that was acknowledged is there and exact, and work goes on."""
    with opened(folder) as repo:
        judge(repo, killed)
        acknowledged(repo, killed)
        assert repo.fsck(full=True).ok, repo.fsck(full=True).problems
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
        acknowledged(repo, killed)
        assert repo.fsck(full=True).ok, repo.fsck(full=True).problems
        before = refs_of(repo)
    shutil.rmtree(folder / ".ckpt" / "meta")
    with opened(folder) as repo:
        assert refs_of(repo) == before
        acknowledged(repo, killed)
        assert repo.fsck(full=True).ok, repo.fsck(full=True).problems


def acknowledged(repo: Repo, killed: Killed) -> None:
    """Each commit that the child said it had made, as 'NUMBER ID', and those of the start."""
    for number in range(3) if "main" in repo.branches() else ():
        exact(repo.checkout("v2" if number == 2 else f"v2~{2 - number}"), state_of(number))
    for said in killed.acknowledged:
        number, id = said.split()
        exact(repo.checkout(id), state_of(int(number)))


def is_own_lease(repo: Repo, name: str) -> bool:
    """Whether it is the lease that this very handle holds."""
    lock = repo._store.lease._lock
    return lock is not None and lock.path.name == name


def refs_of(repo: Repo) -> dict[str, ObjectId | str]:
    """All refs, HEAD included."""
    with repo._store.snapshot() as snapshot:
        return snapshot.refs()


Kill = Callable[..., None]


def test_commit(kill: Kill) -> None:
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


def test_lost_race(kill: Kill) -> None:
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
