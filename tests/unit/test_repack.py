"""Repacking: the same content, never larger and never slower to read, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import CkptError, CorruptionError, ObjectId, Repo
from ckptvcs.maintenance import chains, compaction, repack
from ckptvcs.maintenance.chains import Cost
from ckptvcs.maintenance.rewriting import Rewriter
from ckptvcs.state import tree
from ckptvcs.store import Row, Writer
from ckptvcs.store.format import MAX_DEPTH

N = 12_000


def walk(steps: int, seed: int = 7) -> np.ndarray[Any, Any]:
    """A tensor of one chunk that changes a little with each step, and stays what it is on the whole."""
    random = np.random.default_rng(seed)
    start = random.standard_normal(N).astype(np.float32)
    for step in range(steps):
        noise = np.random.default_rng((seed, step)).standard_normal(N)
        start = (start + 1e-3 * noise).astype(np.float32)
    return start


def rows(repo: Repo) -> dict[ObjectId, Row]:
    return {id: row for part in compaction.slices(repo._store) for id, row in part}


def chunk_of(repo: Repo, rev: str, path: str = "w") -> ObjectId:
    with repo._store.reader() as reader:
        return tree.held(reader, repo.resolve(rev).tree)[path].chunks[0]


def reading(repo: Repo, id: ObjectId) -> int:
    """What reading a chunk takes."""
    found = rows(repo)
    total = 0
    current: ObjectId | None = id
    while current is not None:
        total += found[current].cost + found[current].raw
        current = found[current].base
    return total


def disk(repo: Repo) -> int:
    return sum(path.stat().st_size for path in (repo.path / ".ckpt" / "packs").rglob("*.pack"))


def packs(repo: Repo) -> list[Path]:
    return sorted((repo.path / ".ckpt" / "packs").rglob("*.pack"))


def costs(repo: Repo) -> tuple[int, int]:
    """Bytes of all records, and of reading all of them."""
    found = rows(repo)
    return sum(row.cost for row in found.values()), sum(reading(repo, id) for id in found)


@pytest.fixture(params=["fast", "balanced", "small"])
def trained(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[Repo, int]]:
    length = 13
    with Repo.init(folder, compression=request.param) as repo:
        for step in range(length):
            repo.commit({"w": walk(step), "step": step}, step=step)
        yield repo, length


def sound(repo: Repo, length: int, branch: str = "main") -> None:
    for step in range(length):
        back = repo.checkout(f"{branch}@step:{step}")
        assert np.array_equal(back["w"], walk(step))
        assert back["step"] == step
    report = repo.fsck(full=True)
    assert report.ok, report.problems


def test_never_larger_never_slower(trained: tuple[Repo, int]) -> None:
    repo, length = trained
    before, tip = costs(repo), reading(repo, chunk_of(repo, "main"))
    files, size = len(packs(repo)), disk(repo)
    announced = repo.repack(dry_run=True)
    assert (costs(repo), disk(repo)) == (before, size), "a dry run writes nothing"
    report = repo.repack()
    after = costs(repo)
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    assert before[0] - after[0] == report.saved == announced.saved
    assert before[1] - after[1] == report.read_saved
    assert reading(repo, chunk_of(repo, "main")) <= tip
    assert disk(repo) < size
    assert size - disk(repo) == report.freed
    assert len(packs(repo)) == 1 < files
    sound(repo, length)
    assert repo.gc(0).freed == 0, "nothing is left behind"
    # What was made better is as it should be now.
    again = repo.repack()
    assert (again.chunks, again.packs, again.freed) == (0, 0, 0), again
    repo.fsck(rebuild=True)
    sound(repo, length)


def test_the_newest_reads_fastest(folder: Path) -> None:
    """At level small the newest commit needs a whole chain, and none afterwards."""
    with Repo.init(folder, compression="small") as repo:
        # States that need ever fewer bytes for themselves, so that nothing speaks against it.
        for step in range(9):
            repo.commit({"w": np.round(walk(step) * 4096) / np.float32(4096), "step": step}, step=step)
            state = repo.checkout("main")
        tip = chunk_of(repo, "main")
        assert rows(repo)[tip].depth > 0
        before = reading(repo, tip)
        report = repo.repack(smallest=True)
        assert report.newest_saved > 0
        assert rows(repo)[tip].depth == 0
        assert reading(repo, tip) < before
        assert np.array_equal(repo.checkout("main")["w"], state["w"])
        assert repo.fsck(full=True).ok


def test_smallest_makes_differences_where_there_are(folder: Path) -> None:
    with Repo.init(folder, compression="small") as repo:
        for step in range(12):
            repo.commit({"w": walk(step), "step": step}, step=step)
        before, tip = costs(repo), reading(repo, chunk_of(repo, "main"))
        report = repo.repack(smallest=True)
        assert costs(repo)[0] == before[0] - report.saved <= before[0]
        assert reading(repo, chunk_of(repo, "main")) <= tip
        sound(repo, 12)
        assert max(row.depth for row in rows(repo).values()) <= MAX_DEPTH


def test_branches_that_share(folder: Path) -> None:
    with Repo.init(folder, compression="small") as repo:
        for step in range(4):
            repo.commit({"w": walk(step)}, step=step)
        side = repo.on("side")
        side.restore({}, "main", strict=False)
        other = walk(4, seed=9)
        side.commit({"w": other})
        for step in range(4, 7):
            repo.commit({"w": walk(step)}, step=step)
        tips = {name: reading(repo, chunk_of(repo, name)) for name in ("main", "side")}
        before = costs(repo)
        repo.repack()
        assert costs(repo)[0] <= before[0]
        assert sum(reading(repo, chunk_of(repo, name)) for name in tips) <= sum(tips.values())
        assert np.array_equal(repo.checkout("side")["w"], other)
        for step in range(7):
            assert np.array_equal(repo.checkout(f"main@step:{step}")["w"], walk(step))
        assert repo.fsck(full=True).ok


class _StoppedError(BaseException):
    pass


def test_interrupted_anywhere(folder: Path) -> None:
    """Stopped at each of its steps in turn, it leaves all readable, and nothing that gc does not free."""
    with Repo.init(folder, compression="balanced") as repo:
        for step in range(5):
            repo.commit({"w": walk(step), "step": step}, step=step)
        stops = 0
        while True:
            left = stops

            def say(_: str) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise _StoppedError

            with contextlib.suppress(_StoppedError):
                repo.repack(say=say)
                break
            stops += 1
            for step in range(5):
                assert np.array_equal(repo.checkout(f"main@step:{step}")["w"], walk(step))
        assert stops > 5
        sound(repo, 5)
        repo.gc(0)
        assert len(packs(repo)) == 1


def test_beside_a_writer(folder: Path) -> None:
    """Commits made while it runs, against chunks whose chains it changes."""
    with Repo.init(folder, compression="small") as repo, Repo.open(folder) as trainer:
        for step in range(9):
            trainer.commit({"w": walk(step), "step": step}, step=step)
        length = 9

        def say(_: str) -> None:
            nonlocal length
            if length < 14:
                trainer.commit({"w": walk(length), "step": length}, step=length)
                length += 1

        repo.repack(say=say, smallest=True)
        assert length > 11
        sound(repo, length)
        repo.repack(smallest=True)
        sound(repo, length)


def turn_round(repo: Repo, newest_first: list[ObjectId]) -> int:
    """Make each of these chunks a difference against the one before it, and the first one plain."""
    with repo._store.collecting(), Rewriter(repo._store) as rewriter:
        found = rows(repo)
        bases = dict(zip(newest_first, [None, *newest_first], strict=False))
        rewriter.take_together(
            [(id, found[id], rewriter.encoded(id, found[id], bases[id], however_deep=True)) for id in bases]
        )
        return rewriter.publish()


def test_a_writer_whose_base_became_deeper(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference that would make a chain too long is stored for itself."""
    with Repo.init(folder, compression="small") as repo:
        for step in range(MAX_DEPTH + 1):
            repo.commit({"w": walk(step), "step": step}, step=step)
        line = [chunk_of(repo, f"main@step:{step}") for step in range(MAX_DEPTH + 1)][::-1]
        side = repo.on("side")
        side.restore({}, "main@step:0", strict=False)
        publish = Writer.publish
        turned = []

        def late(writer: Writer, wanted: Any) -> bool:
            if not turned:
                turned.append(turn_round(repo, line))
            return publish(writer, wanted)

        monkeypatch.setattr(Writer, "publish", late)
        theirs = walk(1, seed=7) + np.float32(1e-4)
        side.commit({"w": theirs})
        assert turned == [len(line)]
        assert [rows(repo)[id].depth for id in line] == list(range(MAX_DEPTH + 1))
        assert rows(repo)[chunk_of(repo, "side")].depth == 0
        assert np.array_equal(repo.checkout("side")["w"], theirs)
        sound(repo, len(line))


def test_a_bundle_whose_base_became_deeper(folder: Path) -> None:
    """What was committed without the index before is taken up whole."""
    with Repo.init(folder, compression="small") as repo:
        repo.commit({"w": walk(0), "step": 0}, step=0)
        with Repo.open(folder, "side", index_free=True) as far:
            far.restore({}, "main", strict=False)
            for step in (1, 2, 3):
                far.commit({"w": walk(step, seed=7) + np.float32(1e-4)}, step=step)
        for step in range(1, MAX_DEPTH + 1):
            repo.commit({"w": walk(step), "step": step}, step=step)
        line = [chunk_of(repo, f"main@step:{step}") for step in range(MAX_DEPTH + 1)][::-1]
        assert turn_round(repo, line) == len(line)
        report = repo.ingest()
        assert (len(report.ingested), report.quarantined) == (3, [])
        for step in (1, 2, 3):
            back = repo.checkout(f"side@step:{step}")["w"]
            assert np.array_equal(back, walk(step, seed=7) + np.float32(1e-4))
        assert [rows(repo)[chunk_of(repo, f"side@step:{step}")].depth for step in (1, 2, 3)] == [0, 1, 2]
        sound(repo, len(line))
        repo.gc(0)
        sound(repo, len(line))


def test_a_group_is_pointed_anew_together_or_not_at_all(folder: Path) -> None:
    with Repo.init(folder, compression="small") as repo:
        for step in range(4):
            repo.commit({"w": walk(step), "step": step}, step=step)
        line = [chunk_of(repo, f"main@step:{step}") for step in range(4)][::-1]
        before = rows(repo)
        with repo._store.collecting(), Rewriter(repo._store) as rewriter:
            circle = dict(zip(line, [line[-1], *line], strict=False))
            rewriter.take_together(
                [
                    (id, before[id], rewriter.encoded(id, before[id], circle[id], however_deep=True))
                    for id in line
                ]
            )
            assert rewriter.publish() == 0, "it would never end"
        with repo._store.collecting(), Rewriter(repo._store) as rewriter:
            turned = dict(zip(line, [None, *line], strict=False))
            rewriter.take_together(
                [
                    (id, before[id], rewriter.encoded(id, before[id], turned[id], however_deep=True))
                    for id in line
                ]
            )
            with Rewriter(repo._store) as other:
                other.copy(line[1], before[line[1]])
                assert other.publish() == 1
            assert rewriter.publish() == 0, "one of them lies elsewhere now"
        after = rows(repo)
        assert all(after[id].base == before[id].base for id in line)
        assert turn_round(repo, line) == 4
        sound(repo, 4)


def test_damage_is_left_alone(folder: Path) -> None:
    with Repo.init(folder) as repo:
        for step in range(4):
            repo.commit({"w": walk(step), "step": step}, step=step)
        repo.on("other").commit({"w": walk(30, seed=3)})
        # One that no other is a difference against.
        bases = {row.base for row in rows(repo).values()}
        step = next(n for n in (1, 2, 3) if chunk_of(repo, f"main@step:{n}") not in bases)
        bad = chunk_of(repo, f"main@step:{step}")
        row = rows(repo)[bad]
        path = repo._store.layout.pack(row.pack)
        path.chmod(0o644)
        data = bytearray(path.read_bytes())
        data[row.offset + 300] ^= 4
        path.write_bytes(data)
        report = repo.repack()
        assert report.problems
        assert rows(repo)[bad] == row, "its record stays where it is"
        assert path.read_bytes() == bytes(data)
        for n in {0, 1, 2, 3} - {step}:
            assert np.array_equal(repo.checkout(f"main@step:{n}")["w"], walk(n))
        with pytest.raises(CorruptionError):
            repo.checkout(f"main@step:{step}")


def test_old_packs_are_renewed(folder: Path) -> None:
    with Repo.init(folder) as repo:
        repo.commit({"w": walk(0), "frozen": walk(50, seed=1)}, step=0)
        repo.commit({"w": walk(1), "frozen": walk(50, seed=1)}, step=1)
        old, new = sorted(packs(repo), key=lambda path: path.stat().st_size)[::-1]
        long_ago = time.time() - 40 * 86_400
        os.utime(old, (long_ago, long_ago))
        format = repo._store.layout.format
        os.utime(format, (long_ago, long_ago))
        assert repo.repack(older_than="60d").packs == 0
        announced = repo.repack(older_than="30d", dry_run=True)
        assert old.exists()
        report = repo.repack(older_than="30d")
        assert (report.packs, report.into, report.renewed) == (1, 1, announced.renewed)
        assert not old.exists()
        assert new.exists()
        assert time.time() - format.stat().st_mtime < 1000
        assert all(time.time() - path.stat().st_mtime < 1000 for path in packs(repo))
        assert np.array_equal(repo.checkout("main")["frozen"], walk(50, seed=1))
        assert repo.fsck(full=True).ok
        assert repo.repack(older_than="30d").packs == 0


def test_gc_renews_by_config(folder: Path) -> None:
    with Repo.init(folder) as repo:
        repo.commit({"w": walk(0)})
        (old,) = packs(repo)
        long_ago = time.time() - 40 * 86_400
        os.utime(old, (long_ago, long_ago))
        repo.gc()
        assert old.exists()
        repo.configure("repack.older-than", "30d")
        repo.gc(dry_run=True)
        assert old.exists()
        repo.gc()
        assert not old.exists()
        assert np.array_equal(repo.checkout("main")["w"], walk(0))
        with pytest.raises(CkptError, match="older-than"):
            repo.configure("repack.older-than", "soon")


# -- plans ----------------------------------------------------------------------------------------


def ids(count: int) -> list[ObjectId]:
    return [ObjectId(bytes([n]) * 32) for n in range(count)]


def test_plans_turn_chains_round() -> None:
    a, b, c, d = ids(4)  # d is the newest; b and c are differences against a, d against c
    old = {a: None, b: a, c: a, d: c}
    same, turned, star = chains.plans(old, [d, c, b, a], smallest=False)
    assert same == old
    assert turned == {d: None, c: d, a: c, b: a}
    assert star == {d: None, c: d, b: d, a: d}
    assert list(chains.plans({a: None}, [a], smallest=True)) == [{a: None}]


def test_chains_end() -> None:
    many = ids(30)
    *_, chained = chains.plans(dict.fromkeys(many, None), many, smallest=True)
    found = chains.depths(chained)
    assert found is not None
    assert max(found.values()) == MAX_DEPTH
    assert found[many[0]] == 0
    assert chains.depths({many[0]: many[1], many[1]: many[0]}) is None
    line = {many[at]: many[at + 1] if at < MAX_DEPTH + 1 else None for at in range(MAX_DEPTH + 2)}
    assert chains.depths(line) is None


def test_costs() -> None:
    a, b, c = ids(3)
    assert chains.cost({a: None, b: a, c: b}, {a: 100, b: 10, c: 5}, 1000, [c]) == Cost(
        115, 1100 + 2110 + 3115, 3115
    )


def test_what_is_worse_is_left_out() -> None:
    def choice(*change: int) -> repack._Choice:
        return repack._Choice((), {}, Cost(*change), 0)

    better, smaller, larger, slower = (
        choice(-5, -5, -5),
        choice(-9, 1, -1),
        choice(6, -9, -1),
        choice(0, 5, -1),
    )
    assert better in repack._harmless([better, smaller, larger], False)
    kept = repack._harmless([better, larger, slower], False)
    total = sum((each.change for each in kept), chains.NOTHING)
    assert total.no_worse
    assert better in kept
    assert repack._harmless([larger], False) == []
    assert repack._harmless([slower], True) == [slower]


# -- at random ------------------------------------------------------------------------------------


def test_random_histories(folder: Path) -> None:
    """Commits, branches, deletions, drops, collections, repacks, rebuilds in any order: what refs reach is
    right, and a repack makes nothing worse."""
    seed = int(os.environ.get("CKPT_TEST_SEED", "0")) or int.from_bytes(os.urandom(4), "big")
    steps = int(os.environ.get("CKPT_TEST_STEPS", "40"))
    print(f"seed {seed}: CKPT_TEST_SEED={seed}")
    random = np.random.default_rng(seed)
    levels = ("fast", "balanced", "small")
    expected: dict[str, np.ndarray[Any, Any]] = {}
    with Repo.init(folder) as repo:
        tips: dict[str, np.ndarray[Any, Any]] = {"main": random.standard_normal(3000).astype(np.float32)}
        names = iter(f"b{n}" for n in range(1000))
        for _ in range(steps):
            what = random.choice(["commit"] * 6 + ["branch", "delete", "gc", "repack", "repack", "rebuild"])
            name = str(random.choice(sorted(tips)))
            if what == "commit":
                tips[name] = (tips[name] + 1e-3 * random.standard_normal(3000)).astype(np.float32)
                with Repo.open(folder, name, compression=str(random.choice(levels))) as trainer:
                    trainer.restore({}, strict=False)
                    expected[str(trainer.commit({"w": tips[name]}).id)] = tips[name]
            elif what == "branch" and name in repo.branches():
                other = next(names)
                repo.branch(other, name)
                tips[other] = tips[name]
            elif what == "delete" and name in repo.branches() and len(repo.branches()) > 1 and name != "main":
                repo.delete_branch(name, force=True)
                del tips[name]
            elif what == "gc":
                repo.gc(0)
            elif what == "rebuild":
                repo.fsck(rebuild=True)
            elif what == "repack":
                smallest = bool(random.integers(2))
                repo.gc(0)
                before, size = costs(repo), disk(repo)
                repo.repack(smallest=smallest)
                after = costs(repo)
                assert after[0] <= before[0]
                assert smallest or after[1] <= before[1]
                assert disk(repo) <= size
        found = repo.fsck(full=True)
        assert found.ok, found.problems
        assert max((row.depth for row in rows(repo).values()), default=0) <= MAX_DEPTH
        if repo.branches():
            for commit in repo.log(list(repo.branches())):
                assert np.array_equal(repo.checkout(commit)["w"], expected[str(commit.id)])
