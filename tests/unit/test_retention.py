"""What policies keep, and what retention frees."""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import Commit, DroppedError, InvalidError, NotFoundError, ObjectId, Repo
from ckptvcs.ids import chunk_id
from ckptvcs.maintenance.points import Point
from ckptvcs.maintenance.retaining import Report
from ckptvcs.maintenance.retention import Policy, components, keeps, score_by
from ckptvcs.store import Note, Store
from ckptvcs.testing.same import difference

SEED = 11
CASES = int(os.environ.get("CKPT_RETENTION_CASES", "20"))

# -- policies --------------------------------------------------------------------------------------


def line_of(count: int, *, step: int = 10, seconds: int = 60, **metrics: Mapping[int, float]) -> list[Point]:
    """A line of commits numbered from 0, the newest first; `metrics` by name and number."""
    points = []
    for n in range(count):
        id = chunk_id(str(n).encode())
        values = {name: by[n] for name, by in metrics.items() if n in by}
        points.append(Point(id, id, (), None, step * n, n * seconds * 10**9, values, {"model": 1}))
    return points[::-1]


def kept(line: Sequence[Point], score: Any = None, gone: Sequence[ObjectId] = (), **rules: Any) -> list[int]:
    """The numbers of the commits that a policy keeps, oldest first."""
    if score is None and "metric" in rules:
        by = {point.id: point.metrics for point in line}
        score = score_by(rules["metric"], rules.get("mode", "min"), by.__getitem__)
    found = keeps(line, Policy.of(rules), score, gone)
    return [len(line) - 1 - at for at, point in enumerate(line) if point.id in found][::-1]


def test_the_last() -> None:
    assert kept(line_of(10), keep_last=3) == [7, 8, 9]
    assert kept(line_of(2), keep_last=3) == [0, 1]
    assert kept([], keep_last=3) == []


def test_every_so_many_steps() -> None:
    assert kept(line_of(10), keep_every=30) == [0, 3, 6, 9]
    assert kept(line_of(10, step=7), keep_every=20) == [0, 3, 6, 9]  # the first at or behind 0, 20, 40, 60
    line = [replace(point, step=None) for point in line_of(4)]
    assert kept(line, keep_every=1) == []
    first = [replace(point, step=(point.step or 0) + 45) for point in line_of(4)]
    assert kept(first, keep_every=50) == [1]


def test_the_best() -> None:
    loss = dict(enumerate([5.0, 1.0, math.nan, 1.0, 0.5, 9.0, 0.5]))
    line = line_of(8, val_loss=loss)
    assert kept(line, keep_best=1, metric="val_loss") == [4]  # of equals the oldest
    assert kept(line, keep_best=3, metric="val_loss") == [1, 4, 6]
    assert kept(line, keep_best=2, metric="val_loss", mode="max") == [0, 5]
    assert kept(line, keep_best=9, metric="val_loss") == [0, 1, 3, 4, 5, 6]  # never NaN, nor without a value
    gone = [line[7 - 4].id]
    assert kept(line, gone=gone, keep_best=1, metric="val_loss") == [6]


def test_without_a_value_nothing_is_judged() -> None:
    assert kept(line_of(4), keep_best=1, metric="val_loss") == [0, 1, 2, 3]
    assert kept(line_of(4, val_loss={1: math.nan}), keep_best=1, metric="val_loss") == [0, 1, 2, 3]


def test_within_a_span_goes_by_the_line_and_not_by_clocks() -> None:
    assert kept(line_of(10), keep_within="2m") == [7, 8, 9]
    line = line_of(10)
    line[1] = replace(line[1], time=0)  # a clock that was wrong once drops nothing behind it
    assert kept(line, keep_within="2m") == [7, 8, 9]
    line[6] = replace(line[6], time=10**15)
    assert kept(line, keep_within="2m") == [3, 4, 5, 6, 7, 8, 9]
    assert kept(line_of(10), keep_within=0) == [9]


def test_thinning_is_dense_near_the_tip_and_sparse_behind() -> None:
    found = kept(line_of(64), thin=4)
    assert found[-4:] == [60, 61, 62, 63]
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert gaps == sorted(gaps, reverse=True)
    assert len(found) < 20


@pytest.mark.parametrize("dense", [1, 2, 3, 7])
def test_what_thinning_keeps_it_has_kept_before(dense: int) -> None:
    """Run after each commit it leaves what one run at the end leaves."""
    left: set[int] = set()
    for count in range(1, 200):
        now = set(kept(line_of(count), thin=dense))
        assert now <= left | {count - 1}
        assert len(now) <= dense * (math.log2(count / dense + 1) + 1) + 2
        left = now


def test_rules_are_united() -> None:
    line = line_of(20, val_loss={3: 0.1, 9: 0.5})
    assert kept(line, keep_last=2, keep_best=1, metric="val_loss", keep_every=100) == [0, 3, 10, 18, 19]


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"drop": "model"},
        {"keep_last": 0},
        {"keep_last": -1},
        {"keep_last": True},
        {"keep_last": 1.5},
        {"keep_every": "x"},
        {"keep_best": 1},
        {"metric": "loss"},
        {"keep_last": 1, "metric": "loss"},
        {"keep_best": 1, "metric": "loss", "mode": "best"},
        {"keep_within": "soon"},
        {"thin": 0},
        {"keep_last": 1, "drop": [1]},
        {"keep_last": 1, "keep_first": 1},
    ],
    ids=str,
)
def test_policies_that_cannot_be(rules: dict[str, Any]) -> None:
    with pytest.raises(InvalidError):
        Policy.of(rules)


def test_components_are_dropped_whole() -> None:
    names = ["model", "optimizer", "rng", ""]
    assert components([], names) == ()
    assert components(["optimizer/**"], names) == ("optimizer",)
    assert components(["optimizer", "r*"], names) == ("optimizer", "rng")
    assert components(["ema"], names) is None
    assert components(["**"], names) == ()
    for deeper in ("optimizer/state", "optimizer/*", "**/exp_avg", "*/state/**"):
        with pytest.raises(InvalidError, match="only whole components"):
            components([deeper], names)


# -- in a repository -------------------------------------------------------------------------------


def array(seed: int, size: int = 4000) -> np.ndarray[Any, Any]:
    """Bytes that no codec makes smaller."""
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def state(n: int) -> dict[str, Any]:
    """A state of its own for each number."""
    return {
        "model": array(n),
        "optimizer": {"m": array(1000 + n), "v": array(2000 + n)},
        "frozen": array(9999),
    }


def commits(repo: Repo, count: int, start: int = 0, **metrics: Mapping[int, float]) -> list[Commit]:
    """Commits numbered from `start`, ten steps apart."""
    return [
        repo.commit(
            state(n), f"number {n}", step=10 * n, metrics={k: v[n] for k, v in metrics.items() if n in v}
        )
        for n in range(start, start + count)
    ]


def left(repo: Repo, made: Sequence[Commit]) -> list[int]:
    """The numbers of the commits that have their payload."""
    return [n for n, commit in enumerate(made) if repo.dropped(commit) is None]


def pack_bytes(repo: Repo) -> int:
    """Bytes of all packs."""
    return sum(path.stat().st_size for path in (repo.path / ".ckpt" / "packs").rglob("*.pack"))


def retained(repo: Repo, *args: Any, **rules: Any) -> Report:
    """A dry run, then the run: what was announced must be what happens."""
    announced = repo.retain(*args, **rules, dry_run=True)
    assert announced.dry_run
    before = repo.du("branch").stored
    done = repo.retain(*args, **rules)
    assert replace(done, dry_run=True) == announced
    assert before - repo.du("branch").stored == done.freed
    assert sum(each.freed for each in done.dropped) + done.garbage - done.recoded == done.freed
    return done


def test_dropped_payloads_are_freed_at_once_and_lineage_stays(repo: Repo) -> None:
    made = commits(repo, 6, loss={n: float(n) for n in range(6)})
    before = pack_bytes(repo)
    report = retained(repo, keep_last=2, drop=())
    assert left(repo, made) == [0, 4, 5]  # 0 is the best loss
    assert [each.commit for each in report.dropped] == [made[n].id for n in (1, 2, 3)]
    assert all(12_000 < each.freed < 14_000 for each in report.dropped)
    assert all("the last 2" in each.reason for each in report.dropped)
    assert [(each.commit, each.reason) for each in report.kept] == [
        (made[5].id, "the tip of main"),
        (made[4].id, "among the last 2"),
        (made[0].id, "the best loss of main"),
    ]
    assert before - pack_bytes(repo) > 36_000
    assert [commit.message for commit in repo.log()] == [f"number {n}" for n in reversed(range(6))]
    assert repo.resolve(made[2].id).metrics == {"loss": 2.0}
    with pytest.raises(DroppedError):
        repo.checkout(made[2])
    for n in (0, 4, 5):
        assert difference(repo.checkout(made[n]), state(n)) is None
    assert repo.fsck(full=True).ok
    assert [entry.why for entry in repo.reflog(1)] == ["retain: 3 commits"]
    again = repo.retain(keep_last=2)
    assert (again.dropped, again.freed) == ([], 0)


def test_components(repo: Repo) -> None:
    made = commits(repo, 4)
    report = retained(repo, keep_last=1, drop="optimizer/**")
    assert [each.names for each in report.dropped] == [("optimizer",)] * 3
    assert report.freed > 3 * 8000
    assert difference(repo.checkout(made[0], "model")["model"], state(0)["model"]) is None
    with pytest.raises(DroppedError):
        repo.checkout(made[0])
    more = retained(repo, keep_last=2)
    assert [each.commit for each in more.dropped] == [made[0].id, made[1].id]
    assert repo.dropped(made[0]) == ()
    assert repo.dropped(made[2]) == ("optimizer",)
    assert repo.fsck(full=True).ok
    with pytest.raises(NotFoundError):
        repo.retain(keep_last=1, drop="optimiser")
    with pytest.raises(InvalidError):
        repo.retain(keep_last=1, drop="optimizer/m")


def test_what_is_protected(repo: Repo) -> None:
    made = commits(repo, 12, val_acc={3: 0.9, 5: math.nan, 7: 0.5})
    repo.tag("v1", made[1])
    repo.pin(made[2])
    repo.branch("side", made[6])
    side = repo.on("side")
    side.restore(state(0))
    side.commit(state(100))
    lost = repo.on("main")
    lost.restore(state(0), made[11])
    commits(repo, 1, 12)
    with pytest.raises(Exception, match="kept as"):
        lost.commit(state(200))
    commits(repo, 3, 13)
    repo.fork(made[5], "forked", {"model": 1}).close()
    late = repo.on("forked")
    late.commit({"own": 1})
    repo.set_head(made[4])
    repo.branch("at9", made[9])
    waiting = repo.on("unborn")
    waiting.restore(state(0), made[8])
    with waiting.claim():
        report = retained(repo, keep_last=1)
    reasons = {each.commit: each.reason for each in report.kept}
    assert reasons[made[1].id] == "named by v1"
    assert reasons[made[2].id] == "pinned"
    assert reasons[made[3].id] == "the best val_acc of at9"
    assert reasons[made[4].id] == "named by HEAD"
    assert reasons[made[5].id] == "where forked was forked"
    assert reasons[made[6].id] == "a fork point"
    assert reasons[made[8].id] == "restored by a running job"
    assert reasons[made[9].id] == "the tip of at9"
    assert reasons[made[11].id] == "a fork point"  # where the lost commit begins
    assert left(repo, made) == [1, 2, 3, 4, 5, 6, 8, 9, 11]
    repo.unpin(made[2])
    retained(repo, keep_last=1)
    assert left(repo, made) == [1, 3, 4, 5, 6, 9, 11]
    assert repo.fsck(full=True).ok


def test_branches_and_patterns(repo: Repo) -> None:
    trunk = commits(repo, 4)
    for name in ("exp/a", "exp/b", "other"):
        handle = repo.on(name)
        repo.branch(name, trunk[1])
        handle = repo.on(name)
        handle.restore(state(0))
        commits(handle, 3, 100 + 10 * len(name) + ord(name[-1]))
    lines = {name: list(repo.log(name, first_parent=True)) for name in repo.branches()}
    report = retained(repo, "exp/*", keep_last=1)
    assert {each.branch for each in report.dropped} == {"exp/a", "exp/b"}
    assert left(repo, trunk) == [0, 1, 2, 3]  # they are at home on main, for which there is no policy
    assert [repo.dropped(c) for c in lines["exp/a"][:3]] == [None, (), ()]
    assert [repo.dropped(c) for c in lines["other"][:3]] == [None] * 3
    retained(repo, "main", keep_last=1)
    assert left(repo, trunk) == [1, 3]  # the fork point stays, whatever lines pass through 0
    with pytest.raises(NotFoundError, match="no branch matches 'nope'"):
        repo.retain("nope", keep_last=1)


def test_policies_of_the_config(repo: Repo) -> None:
    made = commits(repo, 5)
    with pytest.raises(InvalidError, match="no retention policy"):
        repo.retain()
    repo.branch("exp/a", "main")
    side = repo.on("exp/a")
    side.restore(state(0))
    own = commits(side, 4, 50)
    repo.configure("retention.keep_last", "2")
    repo.configure("retention.branch.exp/*.keep_last", "1")
    repo.configure("retention.branch.exp/*.drop", "optimizer/**")
    retained(repo)
    assert left(repo, made) == [3, 4]
    assert [repo.dropped(c) for c in own] == [("optimizer",)] * 3 + [None]
    with pytest.raises(InvalidError):
        repo.configure("retention.keep_last", "0")
    with pytest.raises(InvalidError):
        repo.configure("retention.keep_first", "1")
    repo.configure("retention.keep_best", "1")
    with pytest.raises(InvalidError, match="belong together"):
        repo.retain()


def test_notes_and_unknown_modes(repo: Repo) -> None:
    made = commits(repo, 5, bleu={n: float(n % 3) for n in range(5)})
    with pytest.raises(InvalidError, match="is a small or a large bleu better"):
        repo.retain(keep_best=1, metric="bleu")
    repo.record([Note(made[1].id, "bleu", 9.0)], "note")
    retained(repo, keep_best=1, metric="bleu", mode="max")
    assert left(repo, made) == [1, 4]


def test_the_undo_window_does_not_hold_what_a_policy_drops(repo: Repo) -> None:
    """It holds what was deleted by hand all the same."""
    commits(repo, 4)
    repo.on("gone").commit({"x": array(77, 50_000)})
    repo.delete_branch("gone", force=True)
    report = retained(repo, keep_last=1)
    assert report.freed > 3 * 12_000
    assert report.garbage == 0
    assert repo.du("branch").held > 50_000


# -- races -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["tag", "pin", "branch", "commit", "another"])
def test_what_comes_to_depend_on_a_commit_meanwhile_keeps_it(
    repo: Repo, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = commits(repo, 5)
    fork = repo.on("fork")
    fork.restore(state(0), made[1])
    plain = Store.update
    busy = itertools.count()

    def meanwhile(self: Store, operations: Any, **more: Any) -> Any:
        if more["why"].startswith("retain") and (what == "another" or next(busy) == 0):
            with monkeypatch.context() as undone:
                undone.setattr(Store, "update", plain)
                match what:
                    case "tag":
                        repo.tag("late", made[1])
                    case "pin":
                        repo.pin(made[1])
                    case "branch":
                        repo.branch("late", made[1])
                    case "commit":
                        fork.commit(state(50))
                    case _:
                        repo.tag(f"t{next(busy)}", "main")
        return plain(self, operations, **more)

    monkeypatch.setattr(Store, "update", meanwhile)
    monkeypatch.setattr(Store, "operation", lambda self: __import__("contextlib").nullcontext())
    repo.retain(keep_last=1)
    assert left(repo, made) == ([4] if what == "another" else [1, 4])
    assert repo.fsck(full=True).ok


def test_another_collector_is_no_error(repo: Repo) -> None:
    made = commits(repo, 4)
    with repo._store.collecting():
        report = repo.retain(keep_last=1)
    assert not report.collected
    assert report.freed == 0
    assert left(repo, made) == [3]
    assert repo.retain(keep_last=1).freed > 3 * 12_000


# -- random histories ------------------------------------------------------------------------------


def random_rules(chance: random.Random) -> dict[str, Any]:
    """Some policy."""
    rules: dict[str, Any] = {}
    if chance.random() < 0.6:
        rules["keep_last"] = chance.randint(1, 4)
    if chance.random() < 0.3:
        rules["keep_every"] = chance.choice([20, 50])
    if chance.random() < 0.3 or not rules:
        rules |= {"keep_best": chance.randint(1, 2), "metric": "loss"}
    if chance.random() < 0.2:
        rules["thin"] = chance.randint(1, 3)
    if chance.random() < 0.3:
        rules["drop"] = chance.choice([("optimizer",), ("model/**", "frozen")])
    return rules


@pytest.mark.parametrize("case", range(CASES))
def test_freed_is_what_was_announced(tmp_path: Path, case: int) -> None:
    seed = f"{SEED}-{case}"
    print(f"seed {seed}")
    chance = random.Random(seed)
    level = chance.choice(["fast", "balanced", "small"])
    with Repo.init(tmp_path / "r", compression=level) as repo:
        states: dict[ObjectId, dict[str, Any]] = {}
        weights = np.random.default_rng(case).standard_normal(20_000, np.float32)
        steps = dict.fromkeys(("main", "b", "c"), 0)
        for _ in range(3):
            for _ in range(chance.randint(3, 8)):
                name = chance.choice(list(steps))
                if states and name not in repo.branches():
                    repo.branch(name, chance.choice(list(states)))
                handle = repo.on(name)
                weights = weights + np.float32(1e-4 * chance.random())
                steps[name] += 10
                made = {"model": weights, "optimizer": array(chance.randint(0, 5)), "frozen": array(9)}
                loss = {"loss": chance.random()} if chance.random() < 0.7 else {}
                states[handle.commit(made, step=steps[name], metrics=loss).id] = made
                if chance.random() < 0.1:
                    repo.tag(f"t{len(states)}", handle.resolve("HEAD"))
                if chance.random() < 0.1:
                    repo.pin(chance.choice([id for id in states if repo.dropped(id) is None]))
            if chance.random() < 0.2 and len(repo.branches()) > 1:
                gone = chance.choice([name for name in repo.branches() if name != "main"])
                repo.delete_branch(gone, force=True)
            rules = random_rules(chance)
            report = retained(repo, **rules)
            if level == "fast":
                assert report.recoded == 0, seed
            for id, expected in states.items():
                try:
                    commit = repo.resolve(id)
                except NotFoundError:
                    continue
                taken = repo.dropped(commit)
                if taken is None:
                    assert difference(repo.checkout(commit), expected) is None, seed
                elif taken:
                    rest = [name for name in expected if name not in taken]
                    assert difference(repo.checkout(commit, rest), {n: expected[n] for n in rest}) is None
            assert repo.fsck(full=True).ok, seed


def test_whole_numbers_beyond_floats_are_ranked(tmp_path: Path) -> None:
    with Repo.init(tmp_path) as repo:
        for step, value in enumerate((10**400, 3, float("nan"), -(10**400), 5)):
            repo.commit({"step": step}, step=step, metrics={"val_loss": value})
        assert repo.resolve("main@best:val_loss").step == 3
        assert repo.best("val_loss")[0].commit.step == 3
        repo.retain(keep_best=1, metric="val_loss", mode="min")
        assert repo.dropped("main@step:3") is None
        assert repo.dropped("main@step:0") == ()
