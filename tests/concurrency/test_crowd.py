"""A crowd on one repository: twenty committers, a collector, a policy, threads, forked workers, kills.

Nobody is refused because somebody else works: every committer waits for its turn, or loses a race for a ref
and is told where its commit is kept. A child that raises anything else fails the test.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ckptvcs import ConflictError, LockedError, NotFoundError, Repo
from tests.concurrency.processes import Child, exact, state_of

Say = Callable[[Any], None]
RETAINED = "own3a"
"""The branch of which a policy keeps two commits."""


def own_branch(place: Path, name: str, count: int) -> Callable[[Say], None]:
    """Commits on a branch of its own, from where that stands to `count` commits; now and then one that is
    thrown away at once, and workers forked in the middle, as data loaders do it, that read what is there."""

    def work(say: Say) -> None:
        with Repo.open(place, branch=name) as repo:
            got = repo.restore({}, strict=False)
            for number in range((got.step or 0) + 1 if got else 0, count):
                workers = [Child(loader(repo, name, number)) for _ in range(2)] if number % 4 == 2 else []
                commit = repo.commit(state_of(name, number), step=number)
                say([name, number, str(commit.id)])
                if number % 3 == 1:  # content that dies at once, some of it shared with living commits
                    repo.on(f"brief-{name}").commit(state_of("x", number))
                    repo.delete_branch(f"brief-{name}", force=True)
                assert [worker.wait() for worker in workers] == [0] * len(workers)
                for worker in workers:
                    worker.close()

    return work


def loader(repo: Repo, name: str, number: int) -> Callable[[Say], None]:
    """A forked worker that uses the handle it inherited."""

    def work(_: Say) -> None:
        exact(repo.checkout(f"{name}~1" if number > 1 else name)["deep"]["a"][2], name)
        assert len(list(repo.log(name))) >= number

    return work


def two_threads(place: Path, name: str, count: int) -> Callable[[Say], None]:
    """Two threads on branches of their own in one process, and one that only reads."""

    def work(say: Say) -> None:
        failures: list[BaseException] = []
        done = threading.Event()
        with Repo.open(place, branch=name) as repo:

            def commits(branch: str) -> None:
                try:
                    own = repo.on(branch)
                    got = own.restore({}, strict=False)
                    for number in range((got.step or 0) + 1 if got else 0, count):
                        say([branch, number, str(own.commit(state_of(branch, number), step=number).id)])
                except BaseException as error:  # noqa: BLE001 - raised below
                    failures.append(error)

            def reads() -> None:
                try:
                    while not done.is_set():
                        for other in repo.branches():
                            if not other.startswith("brief"):
                                next(iter(repo.log(other)))
                except NotFoundError:
                    pass  # the branch went while it was looked at
                except BaseException as error:  # noqa: BLE001 - raised below
                    failures.append(error)

            threads = [threading.Thread(target=commits, args=(f"{name}{each}",)) for each in "ab"]
            reader = threading.Thread(target=reads)
            for thread in (*threads, reader):
                thread.start()
            for thread in threads:
                thread.join()
            done.set()
            reader.join()
        if failures:
            raise failures[0]

    return work


def racer(place: Path, name: str, count: int) -> Callable[[Say], None]:
    """Commits on the branch of all racers: each commit wins, or is kept and says how to go on with it."""

    def work(say: Say) -> None:
        with Repo.open(place, branch="race") as repo:
            for number in range(count):
                repo.restore({}, strict=False)
                say(["try", name, number])
                try:
                    commit = repo.commit(state_of(name, number), step=number)
                except ConflictError as error:
                    say([name, number, error.rescued, error.hint])
                else:
                    say([name, number, str(commit.id)])

    return work


def collector(place: Path, stop: Path) -> Callable[[Say], None]:
    """Collects without an undo window, and keeps two commits of one branch, until told to stop."""

    def work(say: Say) -> None:
        runs = 0
        with Repo.open(place) as repo:
            while not stop.exists():
                try:
                    assert repo.gc(grace=0).problems == []
                    runs += 1
                    if RETAINED in repo.branches():
                        repo.retain(RETAINED, keep_last=2)
                except LockedError:  # one that was killed has children that still let go of its lock
                    time.sleep(0.01)
        say(["collected", runs])

    return work


@dataclass
class Crowd:
    """Who works, what they said, and how often somebody was killed and came back."""

    place: Path
    works: dict[str, Callable[[Say], None]]
    children: dict[str, Child] = field(default_factory=dict)
    said: list[list[Any]] = field(default_factory=list)
    kills: int = 0

    def run(self, kills: int, chance: random.Random) -> None:
        """Everybody to the end, with kills among those who can begin again where their branch stands."""
        for name, work in self.works.items():
            self.children[name] = Child(work)
        mortal = [name for name in self.works if not name.startswith("racer")]
        for _ in range(kills):
            time.sleep(chance.random() ** 2 * 0.4)
            name = chance.choice(mortal)
            child = self.children[name]
            child.kill()
            self.said += child.rest()
            self.kills += child.wait() != 0
            child.close()
            self.children[name] = Child(self.works[name])
        for child in self.children.values():
            self.said += child.rest()
        assert [child.wait() for child in self.children.values()] == [0] * len(self.children)
        for child in self.children.values():
            child.close()


def crowd(place: Path, count: int, kills: int, seed: int) -> str:
    """Sixteen processes on their own branches and four on one, and a collector; a line of counts."""
    print(f"seed {seed}")
    Repo.init(place).close()
    names = [f"own{number}" for number in range(16)]
    works: dict[str, Callable[[Say], None]] = {
        name: (two_threads if number % 4 == 3 else own_branch)(place, name, count)
        for number, name in enumerate(names)
    }
    works |= {f"racer{number}": racer(place, f"racer{number}", count) for number in range(4)}
    stop = place / "stop"
    cleaning = Child(collector(place, stop))
    people = Crowd(place, works)
    people.run(kills, random.Random(seed))
    stop.touch()
    ((_, runs),) = list(cleaning.rest())
    assert cleaning.wait() == 0
    cleaning.close()
    made = [line for line in people.said if line[0] != "try"]
    raced = [line for line in made if line[0].startswith("racer")]
    lost = [line for line in raced if line[2].startswith("lost/race/")]
    branches = [f"{name}{each}" for name in names[3::4] for each in "ab"]
    branches += [name for number, name in enumerate(names) if number % 4 != 3]
    with Repo.open(place) as repo:
        assert sorted(each for each in repo.branches() if not each.startswith("brief")) == sorted(
            [*branches, "race"]
        )
        dropped = 0
        for name, number, rev, *_ in made:
            if repo.dropped(rev) is None:
                exact(repo.checkout(rev), state_of(name, number))
            else:
                assert name == RETAINED
                assert number < count - 2
                dropped += 1
        for name in branches:
            assert [commit.step for commit in repo.log(name)] == list(range(count))[::-1]
        assert len(raced) == 4 * count
        assert sorted(str(c.id) for c in repo.log("race")) == sorted(x[2] for x in raced if x not in lost)
        assert sorted(repo.lost()) == sorted(rescued for _, _, rescued, _ in lost)
        for name, number, rescued, hint in lost:
            assert hint == f"`ckpt branch NAME {rescued}` makes it a branch of its own"
            repo.branch(f"mine-{name}-{number}", rescued)
            assert repo.resolve(f"mine-{name}-{number}").step == number
        report = repo.fsck(full=True)
        assert report.ok, report.problems
        repo.gc(grace=0)
        assert repo.gc(grace=0).disk == 0
        assert os.listdir(place / ".ckpt" / "tmp") == []
    assert runs > 0
    return (
        f"16 processes on their own branches, 4 on one, {people.kills} of them killed, {runs} collections: "
        f"{len(made)} acknowledged commits exact, {len(lost)} of them under lost/, {dropped} dropped by a "
        f"policy, seed {seed}"
    )


@pytest.mark.slow
def test_a_crowd(folder: Path) -> None:
    print(crowd(folder, count=5, kills=10, seed=random.SystemRandom().getrandbits(32)))


@pytest.mark.slow
@pytest.mark.skipif("CKPT_TEST_LONG" not in os.environ, reason="takes minutes; CKPT_TEST_LONG=1 runs it")
def test_a_crowd_for_long(folder: Path) -> None:
    print(crowd(folder, count=60, kills=200, seed=random.SystemRandom().getrandbits(32)))
