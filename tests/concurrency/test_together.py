"""Several processes and threads on one repository: nothing acknowledged is lost, nothing is damaged."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptvcs import ConflictError, LockedError, NotFoundError, ObjectId, Repo
from ckptvcs.store import index
from tests.concurrency.processes import Child, exact, state_of


def committer(place: Path, name: str, count: int) -> Callable[[Callable[[Any], None]], None]:
    """Commits on a branch of its own, and short-lived branches that are deleted again."""

    def work(say: Callable[[Any], None]) -> None:
        chance = random.Random(f"{name} {count}")
        with Repo.open(place, branch=name) as repo:
            for number in range(count):
                commit = repo.commit(state_of(name, number), step=number)
                say([name, number, str(commit.id)])
                if chance.random() < 0.4:  # content that dies at once, some of it shared with living commits
                    brief = f"brief-{name}-{number}"
                    repo.on(brief).commit(state_of(chance.choice("xy"), number + chance.randint(-3, 3) + 3))
                    repo.delete_branch(brief, force=True)
                if chance.random() < 0.1:
                    exact(repo.checkout(), state_of(name, number))

    return work


def collector(place: Path, stop: Path) -> Callable[[Callable[[Any], None]], None]:
    """Collects without an undo window until told to stop."""

    def work(say: Callable[[Any], None]) -> None:
        runs = freed = 0
        with Repo.open(place) as repo:
            while not stop.exists():
                report = repo.gc(grace=0)
                assert report.problems == [], report.problems
                runs += 1
                freed += report.freed
        say([runs, freed])

    return work


def together(folder: Path, count: int, committers: int = 2) -> str:
    """Committers beside one collector; a line of counts."""
    Repo.init(folder).close()
    stop = folder / "stop"
    began = time.monotonic()
    cleaning = Child(collector(folder, stop))
    working = [Child(committer(folder, f"job{n}", count)) for n in range(committers)]
    said = [line for child in working for line in child.rest()]
    assert [child.wait() for child in working] == [0] * committers
    stop.touch()
    runs, freed = cleaning.line()
    assert cleaning.wait() == 0
    for child in (*working, cleaning):
        child.close()
    assert len(said) == committers * count
    with Repo.open(folder) as repo:
        for name, number, id in said:
            exact(repo.checkout(id), state_of(name, number))
        assert sorted(repo.branches()) == [f"job{n}" for n in range(committers)]
        for name in repo.branches():
            assert [commit.step for commit in repo.log(name)] == list(range(count))[::-1]
        assert repo.lost() == {}
        assert repo.fsck(full=True).ok
        repo.gc(grace=0)
        assert repo.gc(grace=0).disk == 0
        report = repo.fsck(full=True, rebuild=True)
        assert report.ok, report.problems
        for name, number, id in said[:: max(1, count // 10)]:
            exact(repo.checkout(id), state_of(name, number))
    assert runs > 3
    assert freed > 0
    return (
        f"{committers} committers x {count} commits beside {runs} collections that freed {freed} bytes, "
        f"in {time.monotonic() - began:.1f} s: all {len(said)} acknowledged commits exact, fsck --full clean"
    )


def test_two_committers_beside_a_collector(folder: Path) -> None:
    print(together(folder, 60))


@pytest.mark.slow
def test_committers_beside_a_collector_for_long(tmp_path: Path) -> None:
    for n, (count, committers) in enumerate([(600, 2), (200, 4)]):
        (tmp_path / str(n)).mkdir()
        print(together(tmp_path / str(n), count, committers))


def test_two_collectors_take_turns(folder: Path) -> None:
    Repo.init(folder).close()
    stop = folder / "stop"

    def eager(say: Callable[[Any], None]) -> None:
        done = refused = 0
        with Repo.open(folder) as repo:
            while not stop.exists():
                try:
                    repo.gc(grace=0)
                    done += 1
                except LockedError:
                    refused += 1
        say([done, refused])

    collectors = [Child(eager) for _ in range(2)]
    working = Child(committer(folder, "job", 40))
    said = list(working.rest())
    stop.touch()
    counts = [child.line() for child in collectors]
    assert [child.wait() for child in (working, *collectors)] == [0, 0, 0]
    for child in (working, *collectors):
        child.close()
    print("collections done and refused, by process:", counts)
    with Repo.open(folder) as repo:
        for name, number, id in said:
            exact(repo.checkout(id), state_of(name, number))
        assert repo.fsck(full=True).ok


def racer(place: Path, name: str, count: int) -> Callable[[Callable[[Any], None]], None]:
    """Commits on a branch that others commit to as well: each commit wins or is kept under lost/."""

    def work(say: Callable[[Any], None]) -> None:
        with Repo.open(place, branch="main") as repo:
            for number in range(count):
                repo.restore({}, strict=False)
                try:
                    commit = repo.commit(state_of(name, number), step=number)
                except ConflictError as error:
                    say([name, number, error.rescued, False])
                else:
                    say([name, number, str(commit.id), True])

    return work


@pytest.mark.parametrize("count", [25, pytest.param(250, marks=pytest.mark.slow)])
def test_four_processes_on_one_branch(folder: Path, count: int) -> None:
    Repo.init(folder).close()
    children = [Child(racer(folder, f"racer{n}", count)) for n in range(4)]
    said = [line for child in children for line in child.rest()]
    assert [child.wait() for child in children] == [0] * 4
    for child in children:
        child.close()
    assert len(said) == 4 * count
    won = [line for line in said if line[3]]
    lost = [line for line in said if not line[3]]
    print(f"4 processes on one branch: {len(won)} commits won, {len(lost)} are kept under lost/")
    assert lost  # otherwise nothing raced
    with Repo.open(folder) as repo:
        line = list(repo.log("main"))
        assert sorted(str(commit.id) for commit in line) == sorted(id for _, _, id, _ in won)
        assert all(len(commit.parents) <= 1 for commit in line)
        assert sorted(repo.lost()) == sorted(name for _, _, name, _ in lost)
        main = {commit.id for commit in line}
        for name, number, rev, _ in said:
            exact(repo.checkout(rev), state_of(name, number))
        for _, _, rev, _ in lost:
            parents = repo.resolve(rev).parents
            assert not parents or parents[0] in main
        repo.gc(grace=0)
        assert sorted(repo.lost()) == sorted(name for _, _, name, _ in lost)
        assert repo.fsck(full=True).ok


# -- killed ---------------------------------------------------------------------------------------


def endless(place: Path, start: int) -> Callable[[Callable[[Any], None]], None]:
    """Says which commit it is about to make, commits, says its id. Now and then a branch, a tag, a gc."""

    def work(say: Callable[[Any], None]) -> None:
        with Repo.open(place) as repo:
            say("open")
            number = start
            repo.restore({}, strict=False)
            while True:
                say(["try", number])
                commit = repo.commit(state_of("k", number), step=number)
                say(["done", number, str(commit.id)])
                if number % 5 == 0:
                    repo.tag(f"t{number}")
                    say(["tagged", number])
                if number % 7 == 0:
                    repo.on(f"brief{number}").commit(state_of("brief", number))
                    repo.delete_branch(f"brief{number}", force=True)
                    repo.gc(grace=0)
                number += 1

    return work


def kill_many(folder: Path, kills: int, seed: str) -> str:
    """Kill a committing child at random moments, again and again; a line of counts."""
    chance = random.Random(seed)
    print(f"kills from {seed!r}")
    with Repo.init(folder) as repo:
        # Children inherit what this imports, so that they are killed in commits and not in imports.
        known = {0: str(repo.commit(state_of("k", 0), step=0).id)}
    tags: set[int] = set()
    unsaid = 0
    number = 1
    for kill in range(kills):
        child = Child(endless(folder, number))
        assert child.line() == "open"
        time.sleep(chance.random() ** 2 * 0.12)
        child.kill()
        said = list(child.rest())
        assert child.wait() == -9
        child.close()
        for line in said:
            if line[0] == "done":
                known[line[1]] = line[2]
            elif line[0] == "tagged":
                tags.add(line[1])
        tried = [line[1] for line in said if line[0] == "try"]
        with Repo.open(folder) as repo:
            # What was acknowledged is there; besides, at most the commit that was under way.
            tip = repo.branches().get("main")
            steps = [] if tip is None else [(commit.step, str(commit.id)) for commit in repo.log(tip)]
            found = dict(reversed(steps))
            extra = found.keys() - known.keys()
            assert extra <= set(tried[-1:]), (kill, extra, tried[-3:])
            unsaid += len(extra)
            for step in extra:
                known[step] = found[step]  # type: ignore[index]
            assert found == known, kill
            assert {f"t{n}" for n in tags} <= repo.tags().keys()
            tags |= {int(name[1:]) for name in repo.tags()}
            number = max(known, default=-1) + 1
            for step in list(known)[-3:]:
                exact(repo.checkout(known[step]), state_of("k", step))
            for step in tags - known.keys():
                raise AssertionError(f"tag t{step} without its commit")
            if kill % 10 == 9:
                report = repo.fsck(full=True)
                assert report.ok, (kill, report.problems)
                repo.gc(grace=0)
    with Repo.open(folder) as repo:
        for step, id in known.items():
            exact(repo.checkout(id), state_of("k", step))
        repo.gc(grace=0)
        assert repo.fsck(full=True).ok
        assert os.listdir(folder / ".ckpt/tmp") == []
        assert repo.gc(grace=0).disk == 0
        report = repo.fsck(full=True, rebuild=True)
        assert report.ok, report.problems
        assert {commit.step: str(commit.id) for commit in repo.log("main")} == known
    return (
        f"{kills} kills: {len(known)} commits, all acknowledged ones there and exact, "
        f"{unsaid} durable though the kill came before they were acknowledged"
    )


def test_killed_at_random_moments(folder: Path) -> None:
    print(kill_many(folder, 20, "kill 1"))


@pytest.mark.slow
def test_killed_hundreds_of_times(folder: Path) -> None:
    for n in range(6):  # anew each time: checking everything after each kill gets slow
        (folder / str(n)).mkdir()
        print(kill_many(folder / str(n), 50, f"kill 2.{n}"))


# -- forks and threads ----------------------------------------------------------------------------


def test_a_forked_child_may_use_the_handle_of_its_parent(folder: Path) -> None:
    """As data loaders do it: the parent has read and written, forks, and both go on."""
    with Repo.init(folder) as repo:
        for number in range(3):
            repo.commit(state_of("parent", number), step=number)
        side = repo.on("side")
        base = side.restore({}, "main", strict=False).commit
        assert base is not None
        inherited = list(index._open.values())

        def in_child(say: Callable[[Any], None]) -> None:
            exact(repo.checkout(base), state_of("parent", 2))
            # LMDB forbids the use of an environment that was opened before the fork.
            assert index._open
            assert not [shared for shared in index._open.values() if shared in inherited]
            for number in range(20):
                say(str(side.commit(state_of("child", number), step=number).id))
            repo.tag("from-child")
            side.close()
            repo.close()

        children = [Child(in_child)]
        ids = [str(repo.commit(state_of("parent", number), step=number).id) for number in range(3, 23)]
        said = [list(child.rest()) for child in children]
        assert [child.wait() for child in children] == [0]
        for child in children:
            child.close()
        ids += [str(repo.commit(state_of("parent", 23), step=23).id)]
        for number, id in enumerate(ids, 3):
            exact(repo.checkout(id), state_of("parent", number))
        for number, id in enumerate(said[0]):
            exact(repo.checkout(id), state_of("child", number))
        assert len(said[0]) == 20
        assert repo.resolve("side~20").id == repo.resolve("main~21").id
        assert "from-child" in repo.tags()
        repo.gc(grace=0)
        assert repo.fsck(full=True).ok


def test_many_children_of_one_handle(folder: Path) -> None:
    with Repo.init(folder) as repo:
        repo.commit(state_of("parent", 0))

        def in_child(number: int) -> Callable[[Callable[[Any], None]], None]:
            def work(say: Callable[[Any], None]) -> None:
                with repo.on(f"c{number}") as mine:
                    for step in range(5):
                        mine.commit(state_of(f"c{number}", step), step=step)

            return work

        children = [Child(in_child(number)) for number in range(6)]
        assert [child.wait() for child in children] == [0] * 6
        for child in children:
            child.close()
        for number in range(6):
            assert [commit.step for commit in repo.log(f"c{number}")] == [4, 3, 2, 1, 0]
            exact(repo.checkout(f"c{number}"), state_of(f"c{number}", 4))
        repo.gc(grace=0)
        assert repo.fsck(full=True).ok


def test_a_fork_does_not_keep_the_locks_of_its_parent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that outlives its parent's handle must not stop a rebuild."""
    monkeypatch.setattr("ckptvcs.store.store._LOCK_WAIT", 3.0)
    with Repo.init(folder) as repo:
        repo.commit(state_of("parent", 0))
        child = Child(lambda _: time.sleep(30))
    try:
        with Repo.open(folder, rebuild=True) as again:
            assert again.fsck(full=True).ok
    finally:
        child.kill()
        child.wait()
        child.close()


def test_threads_each_with_a_handle_of_their_own(folder: Path) -> None:
    failures: list[BaseException] = []
    done: dict[str, list[ObjectId]] = {}
    with Repo.init(folder) as repo:
        repo.commit(state_of("base", 0))

        def work(name: str) -> None:
            try:
                handle = repo.on(name)
                done[name] = []
                for number in range(15):
                    done[name].append(handle.commit(state_of(name, number), step=number).id)
                    exact(handle.checkout(), state_of(name, number))
                    list(handle.log())
                    if number % 5 == 4:
                        with contextlib.suppress(LockedError):
                            handle.gc(grace=0)
            except BaseException as error:  # noqa: BLE001 - shown below
                failures.append(error)

        threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        for name, ids in done.items():
            assert [commit.id for commit in repo.log(name)] == ids[::-1]
            for number, id in enumerate(ids):
                exact(repo.checkout(id), state_of(name, number))
        assert repo.fsck(full=True).ok


def test_readers_beside_a_collector(folder: Path) -> None:
    """A reader gets the exact state, or is told that the commit is gone; never anything else."""
    Repo.init(folder).close()
    stop = folder / "stop"

    def reading(say: Callable[[Any], None]) -> None:
        chance = random.Random(5)
        whole = gone = 0
        with Repo.open(folder) as repo:
            while not stop.exists():
                names = list(repo.branches())
                if not names:
                    continue
                name = chance.choice(names)
                try:
                    exact(repo.checkout(name), state_of(name, 0))
                    whole += 1
                except NotFoundError:
                    gone += 1
        say([whole, gone])

    def churning(say: Callable[[Any], None]) -> None:
        with Repo.open(folder) as repo:
            for number in range(60):
                repo.on(f"b{number}").commit(state_of(f"b{number}", 0))
                if number > 3:
                    repo.delete_branch(f"b{number - 3}", force=True)
                    repo.gc(grace=0)

    reader, churner = Child(reading), Child(churning)
    assert churner.wait() == 0
    stop.touch()
    whole, gone = reader.line()
    assert reader.wait() == 0
    reader.close()
    churner.close()
    print(f"{whole} reads exact, {gone} told that the commit is gone")
    assert whole > 10
