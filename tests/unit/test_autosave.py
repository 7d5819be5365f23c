"""Autosave in one process: when it saves, what it decides, what it says. Clocks are turned by hand."""

from __future__ import annotations

import argparse
import errno
import logging
import math
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import (
    CkptError,
    ConflictError,
    CorruptionError,
    InvalidError,
    LineageError,
    LockedError,
    Repo,
    StorageError,
    UnsupportedStateError,
)
from ckptvcs.testing.faults import FailingDisk
from ckptvcs.training import Autosave


class Clock(FailingDisk):
    """A disk whose clock stands still until it is turned. Each commit takes `cost` seconds of it."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 1000.0
        self.cost = 0.0

    def seconds(self) -> float:
        return self.time


class Tick:
    """A leaf whose state takes some of the clock's time, as a save does."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def state_dict(self) -> dict[str, Any]:
        self.clock.time += self.clock.cost
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("ckptvcs.repo.Disk", lambda: made)
    return made


@pytest.fixture
def place(tmp_path: Path) -> Path:
    Repo.init(tmp_path / "work").close()
    return tmp_path / "work"


@pytest.fixture
def repo(place: Path, clock: Clock) -> Iterator[Repo]:
    with Repo.open(place) as opened:
        yield opened


@pytest.fixture(params=["background", "blocking"])
def blocking(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "blocking")


def new_state() -> dict[str, Any]:
    return {"w": np.zeros(100), "step": 0}


def train(state: dict[str, Any]) -> int:
    state["w"] += 1
    state["step"] += 1
    return int(state["step"])


class Refusal:
    """A disk that refuses what is saved, in this process or in the one that writes in the background."""

    def __init__(self, repo: Repo, clock: Clock, blocking: bool) -> None:
        self.repo, self.clock, self.blocking = repo, clock, blocking

    def begin(self, error: int = errno.ENOSPC) -> None:
        if self.blocking:
            self.clock.arm(3, error)
        else:
            self._limit(600)

    def end(self) -> None:
        self.clock.heal()
        if not self.blocking:
            self._limit(resource.RLIM_INFINITY)

    def _limit(self, most: int) -> None:
        """The writer process may write no larger files."""
        background = self.repo._opened.background
        assert background is not None
        assert background._companion is not None
        _, hard = resource.prlimit(background._companion.number, resource.RLIMIT_FSIZE)
        resource.prlimit(background._companion.number, resource.RLIMIT_FSIZE, (most, hard))


@pytest.fixture
def refusal(repo: Repo, clock: Clock, blocking: bool) -> Refusal:
    if not blocking and not hasattr(resource, "prlimit"):
        pytest.skip("only Linux can limit what another process writes")
    return Refusal(repo, clock, blocking)


def go_on(save: Autosave, state: dict[str, Any], count: int) -> None:
    for _ in range(count):
        save.step(train(state))


def steps(repo: Repo, rev: str = "HEAD") -> list[int | None]:
    """Steps that are saved, oldest first."""
    return [commit.step for commit in repo.log(rev)][::-1]


def whys(repo: Repo) -> list[str]:
    return [commit.title.removeprefix("autosave: ") for commit in repo.log()][::-1]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "ckptvcs"]


# -- when -----------------------------------------------------------------------------------------


def test_every_n_steps(repo: Repo, blocking: bool) -> None:
    state = new_state()
    with Autosave(repo, state, every=10, blocking=blocking) as save:
        assert save.last is None
        for _ in range(25):
            assert save.step(train(state)) is True
    assert steps(repo) == [10, 20, 25]
    assert whys(repo) == ["every 10 steps", "every 10 steps", "the last step"]
    for commit in repo.log():
        assert commit.step is not None
        assert np.array_equal(repo.checkout(commit)["w"], np.full(100, float(commit.step)))
    assert save.last is not None
    assert save.last.step == 25
    assert save.best is None
    assert save.should_stop is False


def test_every_n_steps_when_steps_are_told_in_strides(repo: Repo) -> None:
    state = new_state()
    with Autosave(repo, state, every=10, save_last=False) as save:
        for _ in range(50):
            if train(state) % 8 == 0:
                save.step(state["step"])
    assert steps(repo) == [16, 24, 32, 40]


def test_every_t_minutes(repo: Repo, clock: Clock) -> None:
    state = new_state()
    with Autosave(repo, state, every="15min", save_last=False, blocking=True) as save:
        for _ in range(100):
            clock.time += 60
            save.step(train(state))
    assert steps(repo) == [15, 30, 45, 60, 75, 90]


def test_whichever_comes_first(repo: Repo, clock: Clock) -> None:
    state = new_state()
    with Autosave(repo, state, every=(10, "5min"), save_last=False, blocking=True) as save:
        for n in range(40):
            clock.time += 100 if n < 10 else 1
            save.step(train(state))
    assert steps(repo) == [3, 6, 9, 10, 20, 30, 40]


@pytest.mark.slow
def test_auto_stays_within_the_overhead(repo: Repo, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ckptvcs")
    state = {**new_state(), "tick": Tick(clock)}
    clock.cost = 3.0
    blocked, began = 0.0, clock.time
    with Autosave(repo, state, interval="auto", mtbf=None, save_last=False, blocking=True) as save:
        began = clock.time
        for _ in range(20_000):
            clock.time += 0.5
            before = clock.time
            save.step(train(state))
            blocked += clock.time - before
    assert 60 < len(steps(repo)) <= 10_000 / 150 + 1
    assert blocked / (clock.time - began) <= 0.02
    said = [line for line in lines(caplog) if line.startswith("saving every")]
    assert len(said) == 1
    assert said[0].startswith("saving every 2.5 min (about 300 steps), because a save costs 3.00 s: ")
    assert steps(repo)[0] == 120  # a minute of training, when nothing is measured yet


def test_auto_with_failures_to_expect(repo: Repo, clock: Clock) -> None:
    state = {**new_state(), "tick": Tick(clock)}
    clock.cost = 0.1
    with Autosave(repo, state, mtbf="6h", save_last=False, blocking=True) as save:
        for _ in range(1000):
            clock.time += 1
            save.step(train(state))
    gaps = set(np.diff([step or 0 for step in steps(repo)])[1:])
    assert gaps == {66}  # daly(0.1, 21600) = 65.7


def test_save_now(repo: Repo) -> None:
    state = new_state()
    with Autosave(repo, state, every=1000) as save:
        save.step(train(state), now=True, epoch=0.5)
        save.step(train(state))
    assert whys(repo) == ["asked for", "the last step"]
    assert [commit.epoch for commit in repo.log()] == [None, 0.5]


def test_nothing_is_saved_twice(repo: Repo) -> None:
    state = new_state()
    with Autosave(repo, state, every=5) as save:
        for _ in range(5):
            save.step(train(state))
        save.step(5)
    assert steps(repo) == [5]
    with Autosave(repo, state, every=5):
        pass
    assert steps(repo) == [5]


def test_saves_go_on_where_the_restored_commit_stood(place: Path, repo: Repo) -> None:
    state = new_state()
    with Autosave(repo, state, every=10, save_last=False) as save:
        for _ in range(12):
            save.step(train(state))
    again = new_state()
    with Repo.open(place) as other:
        got = other.restore(again)
        with Autosave(other, again, every=10, save_last=False) as save:
            assert save.last == got.commit
            for _ in range(got.step or 0, 35):
                train(again)
                if again["step"] % 3 == 0:
                    save.step(again["step"])
        assert steps(other) == [10, 21, 30]


# -- metrics --------------------------------------------------------------------------------------


def test_the_best_are_saved_and_marked(repo: Repo, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ckptvcs")
    state = new_state()
    losses = {2: 0.9, 4: math.nan, 6: 0.5, 8: 0.7, 10: 0.5}
    with Autosave(repo, state, every=10, monitor="val_loss", blocking=True) as save:
        for _ in range(12):
            step = train(state)
            save.step(step, {"val_loss": losses[step]} if step in losses else {"lr": 0.1})
        assert save.best is not None
        assert save.best.step == 6
    assert steps(repo) == [2, 6, 10, 12]
    assert whys(repo) == ["best val_loss", "best val_loss", "every 10 steps", "the last step"]
    assert repo.resolve("main@best:val_loss").step == 6
    assert [commit.metrics for commit in repo.log()] == [
        {"lr": 0.1},
        {"val_loss": 0.5},
        {"val_loss": 0.5},
        {"val_loss": 0.9},
    ]
    saved = [line for line in lines(caplog) if line.startswith("saved step")]
    assert len(saved) == 4
    assert "saved step 6 on main as " in saved[1]
    assert saved[1].endswith(", val_loss 0.5 (best)")
    assert saved[2].endswith(", val_loss 0.5")
    assert "waited 0 ms, blocked 0 ms, background 0 ms, new " in saved[0]
    assert " of 8" in saved[0]


def test_the_best_of_those_that_are_due(repo: Repo) -> None:
    state = new_state()
    with Autosave(repo, state, every=5, monitor="acc", save_best=False, save_last=False) as save:
        for value in (0.1, 0.9, 0.2, 0.3, 0.4, 0.8, 0.1, 0.1, 0.1, 0.3):
            save.step(train(state), {"acc": value})
    assert steps(repo) == [5, 10]
    assert save.best is not None
    assert save.best.step == 5  # 0.9 and 0.8 are in no commit


def test_the_mode_is_recorded(place: Path, repo: Repo) -> None:
    with pytest.raises(InvalidError, match="small or a large reward") as unsaid:
        Autosave(repo, new_state(), every=1, monitor="reward")
    assert "mode=" in (unsaid.value.hint or "")
    with Autosave(repo, new_state(), every=1, monitor="val_loss", mode="min"):
        assert repo.config.metric_mode("val_loss") is None  # the name says so already
    state = new_state()
    with Autosave(repo, state, every=1, monitor="reward", mode="max", blocking=True) as save:
        for value in (1.0, 3.0, 2.0):
            save.step(train(state), {"reward": value})
        assert save.best is not None
        assert save.best.step == 2
    with Repo.open(place) as other:
        assert other.config.metric_mode("reward") == "max"
        assert other.resolve("@best:reward").step == 2
        other.restore(new_state())
        with pytest.raises(InvalidError, match=r"metric\.reward\.mode is max") as caught:
            Autosave(other, new_state(), every=1, monitor="reward", mode="min")
        assert "ckpt config metric.reward.mode min" in str(caught.value.hint)


def test_patience(repo: Repo, caplog: pytest.LogCaptureFixture) -> None:
    state = new_state()
    values = [1.0, 0.8, 0.8, math.nan, 0.79, 0.85, 0.9, 0.95, 0.1]
    with Autosave(repo, state, every=100, monitor="loss", patience=3) as save:
        went = [save.step(train(state), {"loss": value}) for value in values[:8]]
        assert went == [True] * 7 + [False]
        assert save.should_stop
        assert save.step(train(state), {"loss": 0.1}) is False  # who goes on is told again
    assert steps(repo) == [1, 2, 5, 8, 9]
    assert whys(repo)[3] == "patience ran out"
    said = [line for line in lines(caplog) if "stopping" in line]
    assert said == ["stopping: the last 3 values of loss were not better than 0.79"]


def test_patience_counts_only_what_is_better_by_min_delta(repo: Repo) -> None:
    state = new_state()
    with Autosave(repo, state, every=100, monitor="acc", patience=2, min_delta=0.1) as save:
        went = [save.step(train(state), {"acc": value}) for value in (0.5, 0.55, 0.65, 0.7, 0.74)]
    assert went == [True, True, True, True, False]
    assert steps(repo) == [1, 2, 3, 4, 5]  # each was the best, and is kept


def test_patience_that_never_sees_a_number(repo: Repo) -> None:
    state = new_state()
    with Autosave(repo, state, every=100, monitor="loss", patience=2) as save:
        assert save.step(train(state), {"loss": math.nan})
        assert not save.step(train(state), {"loss": math.nan})
    assert save.best is None


def test_a_metric_that_never_comes(repo: Repo, caplog: pytest.LogCaptureFixture) -> None:
    state = new_state()
    with Autosave(repo, state, every=2, monitor="val_loss") as save:
        save.step(train(state), {"val_los": 1.0})
    assert "the metric val_loss was never given" in lines(caplog)


def test_nothing_is_said_of_a_metric_before_there_was_time_for_it(
    repo: Repo, caplog: pytest.LogCaptureFixture
) -> None:
    state = new_state()

    def fails() -> None:
        with Autosave(repo, state, every=1, monitor="val_loss") as save:
            save.step(train(state))
            raise RuntimeError("training failed")

    with pytest.raises(RuntimeError):
        fails()
    repo.restore(state)
    with Autosave(repo, state, every=1, monitor="val_loss"):
        pass  # all steps were made before
    assert not any("never given" in line for line in lines(caplog))


def test_metrics_are_read_only_when_needed(repo: Repo) -> None:
    class Scalar:
        """A 0-dim tensor on a device: reading it waits for the device."""

        shape = ()
        reads = 0

        def detach(self) -> Scalar:
            return self

        def item(self) -> float:
            Scalar.reads += 1
            return 0.25

    state = new_state()
    with Autosave(repo, state, every=10, save_last=False) as save:
        for _ in range(10):
            save.step(train(state), {"loss": Scalar()})
    assert Scalar.reads == 1
    assert repo.resolve().metrics == {"loss": 0.25}


def test_metrics_told_in_two_calls_belong_together(repo: Repo) -> None:
    state = new_state()
    with Autosave(repo, state, every=100, monitor="val_loss", patience=2) as save:
        save.step(train(state), {"loss": 1.0}, epoch=1)
        save.step(1, {"val_loss": 0.5})
        save.step(1, {"lr": 0.1})
    (commit,) = repo.log()
    assert commit.metrics == {"loss": 1.0, "val_loss": 0.5}
    assert commit.epoch == 1


@pytest.mark.parametrize("bad", [{"val_loss": "low"}, {"val_loss": None}, [1.0], {"val_loss": np.zeros(2)}])
def test_metrics_that_are_none(repo: Repo, bad: Any) -> None:
    state = new_state()
    with Autosave(repo, state, every=100, monitor="val_loss", save_last=False) as save:
        with pytest.raises(InvalidError):
            save.step(train(state), bad)
    assert steps_or_none(repo) == []


def steps_or_none(repo: Repo) -> list[int | None]:
    return steps(repo) if repo.branches() else []


@pytest.mark.parametrize("bad", [None, 1.5, "one", True])
def test_steps_that_are_none(repo: Repo, bad: Any) -> None:
    with Autosave(repo, new_state(), every=100) as save, pytest.raises(InvalidError, match="whole number"):
        save.step(bad)


# -- resuming -------------------------------------------------------------------------------------


def loss_at(step: int) -> float:
    """Goes down to step 60, with noise, and up from there."""
    return abs(step - 60) / 60 + (step * 7919 % 13) / 100


def run(place: Path, stop_at: int | None) -> bool:
    """Train to step 200, patience's end or `stop_at`, resuming from the branch's tip; whether it ended."""
    state = new_state()
    with Repo.open(place) as repo:
        repo.restore(state)
        save = Autosave(repo, state, every=9, monitor="val_loss", patience=6, keep_last=2)
        try:
            while state["step"] < 200:
                step = train(state)
                if step == stop_at:
                    return False  # killed: nothing more is saved
                if not save.step(step, {"val_loss": loss_at(step)} if step % 4 == 0 else None):
                    return True
        finally:
            save._close(save=False)
    return True


def history(place: Path) -> list[tuple[Any, ...]]:
    with Repo.open(place) as repo:
        return [
            (c.step, str(c.tree), c.metrics, c.message, c.environment["autosave"]) for c in repo.log("main")
        ][::-1]


@pytest.mark.slow
def test_a_killed_run_decides_as_one_that_was_not(place: Path) -> None:
    """Best marks, patience and saves are those of the uninterrupted run, wherever it is cut."""
    other = place.parent / "cut"
    Repo.init(other).close()
    assert run(place, None)
    cuts = [3, 11, 26, 27, 38, 55, 61, 70, 81, 82]
    for cut in cuts:
        assert not run(other, cut)
    assert run(other, None)
    assert history(other) == history(place)
    assert 60 < history(place)[-1][0] < 200


def test_counters_from_commits_that_no_autosave_made(place: Path, repo: Repo) -> None:
    for step, loss in enumerate([0.9, 0.3, 0.5, math.nan, 0.6], 1):
        repo.commit({"w": np.full(3, step)}, step=step, metrics={"loss": loss})
    repo.commit({"w": np.zeros(3)}, step=6)
    with Autosave(repo, {"w": np.zeros(3)}, every=100, monitor="loss", patience=5, save_last=False) as save:
        assert save.best is not None
        assert save.best.step == 2
        assert save.step(7, {"loss": 0.4})
        assert not save.step(8, {"loss": 0.4})  # 0.5, NaN, 0.6, 0.4, 0.4


def test_a_fork_continues_and_a_fresh_start_does_not(place: Path, repo: Repo) -> None:
    state = new_state()
    with Autosave(repo, state, every=2, monitor="loss", blocking=True) as save:
        for value in (0.5, 0.4, 0.3, 0.2):
            save.step(train(state), {"loss": value})
    fork = repo.on("fork")
    fork.restore(state, "main@step:2")
    with Autosave(fork, state, every=2, monitor="loss", blocking=True) as save:
        assert save.best is not None
        assert save.best.step == 2
        save.step(train(state), {"loss": 0.45})
        save.step(train(state), {"loss": 0.35})
        assert save.best.step == 4
    assert steps(fork) == [1, 2, 4]
    with (
        Repo.open(place, branch="main") as fresh,
        Autosave(fresh, state, every=2, monitor="loss", blocking=True) as save,
    ):
        assert save.best is None
        assert save.last is None


# -- what is refused at the start -------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"every": 0},
        {"every": "soon"},
        {"every": 10, "interval": "auto"},
        {"interval": "manual"},
        {"mtbf": "0"},
        {"max_overhead": 0},
        {"max_overhead": 2},
        {"max_overhead": "2%"},
        {"on_error": "ignore"},
        {"message": None},
        {"mode": "min"},
        {"patience": 3},
        {"keep_best": 1},
        {"monitor": "loss", "mode": "least"},
        {"monitor": "loss", "patience": 0},
        {"monitor": "loss", "patience": True},
        {"monitor": "loss", "min_delta": -1},
        {"monitor": "loss", "min_delta": math.nan},
        {"monitor": "two words"},
        {"monitor": 3},
        {"keep_last": 0},
        {"keep_last": -1},
        {"keep_last": 1.5},
        {"monitor": "loss", "keep_best": 0},
        {"signals": ["SIGNOTHING"]},
        {"signals": [9]},
        {"signals": "SIGSTOP"},
        {"signals": [1000]},
        {"config": 3},
    ],
)
def test_arguments_that_cannot_be(repo: Repo, arguments: dict[str, Any]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InvalidError) as caught:
        Autosave(repo, new_state(), **arguments)
    assert "\n" not in str(caught.value)
    assert signal.getsignal(signal.SIGTERM) == before
    Autosave(repo, new_state(), every=1).close()  # the branch is free


def test_leaves_are_checked_at_once_and_nothing_is_written(repo: Repo) -> None:
    with pytest.raises(UnsupportedStateError) as caught:
        Autosave(repo, {"model": np.zeros(3), "hook": print, "deep": {"rows": iter([1])}}, every=100)
    assert [path for path, _ in caught.value.leaves] == ["hook", "deep/rows"]
    with pytest.raises(UnsupportedStateError, match="config/f"):
        Autosave(repo, new_state(), every=100, config={"f": object()})
    assert repo.branches() == {}


def test_lineage_is_checked_at_once(place: Path, repo: Repo) -> None:
    state = new_state()
    for step in (1, 2):
        repo.commit(state, step=step)
    repo.restore(state, "HEAD~1")
    with pytest.raises(LineageError, match="not the tip of main"):
        Autosave(repo, state, every=1)
    repo.set_head(repo.resolve("main"))
    with Repo.open(place) as detached, pytest.raises(LineageError, match="detached"):
        Autosave(detached, state, every=1)
    repo.restore(state)
    with Repo.open(place, branch="main") as other:
        other.restore(state)
        other.commit(state, step=3)
    with pytest.raises(ConflictError, match="somebody else moved the branch main") as caught:
        Autosave(repo, state, every=1)
    assert "restore" in str(caught.value.hint)


def test_the_branch_is_claimed(place: Path, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    state = new_state()
    with Repo.open(place) as first, Repo.open(place) as second:
        save = Autosave(first, state, every=1)
        with pytest.raises(
            LockedError, match=r"main is claimed by job slurm 4711: this process on "
        ) as caught:
            Autosave(second, state, every=1)
        assert caught.value.code == "claimed"
        assert "steal=True" in str(caught.value.hint)
        Autosave(second.on("elsewhere"), state, every=1).close()
        save.close()
        with Autosave(second, state, every=1) as later:
            later.step(train(state))
        assert (place / ".ckpt/leases").exists()
    with Repo.open(place) as third:
        assert third.gc(grace=0).problems == []
        assert not list((place / ".ckpt/leases").glob("claim-*"))
        assert third.fsck(full=True).ok


def test_a_stolen_branch_is_noticed(place: Path, repo: Repo) -> None:
    state, theirs = new_state(), new_state()
    save = Autosave(repo, state, every=1, on_error="warn", blocking=True)
    save.step(train(state))
    with Repo.open(place) as other:
        other.restore(theirs)
        with Autosave(other, theirs, every=1, steal=True, blocking=True) as thief:
            with pytest.raises(LockedError, match="main was taken over by this process") as caught:
                save.step(train(state))
            assert caught.value.code == "claimed"
            thief.step(train(theirs))
        assert steps(other) == [1, 2]
        assert other.lost() == {}
        with pytest.raises(LockedError):  # nothing of it is left to be saved in silence
            save.close()
        Autosave(other, theirs, every=1, blocking=True).close()  # and its end frees nothing of others


def test_claiming_before_restoring(place: Path, repo: Repo) -> None:
    """So that a job that saves all the time can be taken over from."""
    state, theirs = new_state(), new_state()
    first = Autosave(repo, state, every=1, blocking=True)
    go_on(first, state, 3)
    with Repo.open(place) as other:
        claim = other.claim(steal=True)
        assert other.restore(theirs).step == 3
        with Autosave(other, theirs, every=1) as save:
            go_on(save, theirs, 2)
            with pytest.raises(LockedError, match="by this process"):  # one is enough
                Autosave(other, theirs, every=1)
        assert claim.held  # it is the caller's
        with Autosave(other, theirs, every=1):
            pass
        claim.release()
        assert steps(other) == [1, 2, 3, 4, 5]
    with pytest.raises(LockedError):
        go_on(first, state, 1)


def test_a_closed_autosave(repo: Repo) -> None:
    save = Autosave(repo, new_state(), every=1)
    save.close()
    save.close()
    with pytest.raises(CkptError, match="closed"):
        save.step(1)


# -- errors ---------------------------------------------------------------------------------------


def test_errors_are_raised(repo: Repo, blocking: bool, refusal: Refusal) -> None:
    state = new_state()
    save = Autosave(repo, state, every=2, blocking=blocking)
    go_on(save, state, 2)
    save.wait()
    refusal.begin()
    with pytest.raises(StorageError, match="cannot write"):
        go_on(save, state, 5)
    refusal.end()
    assert steps(repo) == [2]
    save.close()  # tries the last step again
    assert steps(repo) == [2, state["step"]]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_training_goes_on_while_the_disk_is_full(
    repo: Repo, blocking: bool, refusal: Refusal, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    state = new_state()
    with Autosave(repo, state, every=5, on_error="warn", blocking=blocking) as save:
        for _ in range(22):
            if state["step"] in (7, 12):  # an I/O error happens once, so twice
                refusal.begin(error)
            elif state["step"] == 17:
                refusal.end()
            assert save.step(train(state))
            save.wait()
    assert steps(repo) == [5, 20, 22]
    said = lines(caplog)
    assert [line.split(":")[0] for line in said if "could not" in line] == [
        "step 10 could not be saved",
        "step 15 could not be saved",
    ]
    assert "saving works again" in said
    repo.gc(grace=0)
    assert repo.fsck(full=True).ok


def test_a_best_that_could_not_be_saved_is_not_the_best(repo: Repo, blocking: bool, refusal: Refusal) -> None:
    state = new_state()
    with Autosave(repo, state, every=100, monitor="loss", on_error="warn", blocking=blocking) as save:
        for loss in (0.9, 0.3, 0.5, 0.6):
            if loss == 0.3:
                refusal.begin()
            save.step(train(state), {"loss": loss})
            save.wait()
            if loss == 0.3:
                refusal.end()
        assert save.best is not None
        assert save.best.step == 3
    assert steps(repo) == [1, 3, 4]


def test_a_failed_save_is_tried_again_before_the_next_is_due(repo: Repo, clock: Clock) -> None:
    state = new_state()
    with Autosave(repo, state, every="6h", on_error="warn", save_last=False, blocking=True) as save:
        for n in range(1, 22_000 // 30):
            clock.time += 30
            if n == 719:
                clock.arm(3, errno.ENOSPC)
            if n == 723:
                clock.heal()
            save.step(train(state))
    assert steps(repo) == [724]
    assert whys(repo) == ["trying again"]


def test_a_writer_that_was_killed_does_not_end_training(repo: Repo) -> None:
    """The kernel does that when memory runs out."""

    def kill() -> None:
        background = repo._opened.background
        assert background is not None
        assert background._companion is not None
        os.kill(background._companion.number, signal.SIGSTOP)
        save.step(train(state), now=True)
        os.kill(background._companion.number, signal.SIGKILL)

    state = new_state()
    with Autosave(repo, state, every=100, on_error="warn") as save:
        save.step(train(state), now=True)
        save.wait()
        kill()
        save.wait()
        save.step(train(state), now=True)
    assert steps(repo) == [1, 3]
    with Autosave(repo, state, every=100) as save:  # nor does it keep the last save from being made
        save.step(train(state), now=True)
        save.wait()
        kill()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit):
            save.step(train(state))
    assert steps(repo) == [1, 3, 4, 6]


def test_a_last_save_that_fails_is_an_error(repo: Repo, blocking: bool, refusal: Refusal) -> None:
    state = new_state()
    save = Autosave(repo, state, every=5, on_error="warn", blocking=blocking)
    go_on(save, state, 6)
    save.wait()
    refusal.begin()
    with pytest.raises(StorageError, match="cannot write"):
        save.close()
    refusal.end()
    assert steps(repo) == [5]
    Autosave(repo, state, every=5).close()


def test_training_goes_on_when_the_writer_was_killed(repo: Repo, caplog: pytest.LogCaptureFixture) -> None:
    """As the kernel does when memory runs out."""
    state = new_state()
    with Autosave(repo, state, every=1, on_error="warn") as save:
        go_on(save, state, 2)
        save.wait()
        background = repo._opened.background
        assert background is not None
        assert background._companion is not None
        writer = background._companion.number
        os.kill(writer, signal.SIGSTOP)
        go_on(save, state, 1)
        os.kill(writer, signal.SIGKILL)
        go_on(save, state, 2)
    assert steps(repo) == [1, 2, 4, 5]
    assert any("step 3 could not be saved: the writer process was killed" in line for line in lines(caplog))


def test_what_trying_again_does_not_mend_is_raised(place: Path, repo: Repo) -> None:
    state = new_state()
    save = Autosave(repo, state, every=1, on_error="warn")
    save.step(train(state))
    with Repo.open(place) as other:  # somebody who does not claim
        other.restore(new_state())
        other.commit({"w": np.ones(3)})
    with pytest.raises(ConflictError) as caught:
        go_on(save, state, 2)
    assert caught.value.rescued
    state["hook"] = print
    with pytest.raises(CkptError):
        save.close()


def test_an_exception_ends_training_without_another_save(
    repo: Repo, caplog: pytest.LogCaptureFixture
) -> None:
    state = new_state()

    def broken() -> None:
        with Autosave(repo, state, every=2) as save:
            go_on(save, state, 3)
            state["w"] *= 0  # half a step
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert steps(repo) == [2]
    Autosave(repo, state, every=1).close()


# -- signals --------------------------------------------------------------------------------------


@pytest.fixture
def handlers() -> Iterator[None]:
    """What handled the signals before is back afterwards."""
    kept = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    for each, handler in kept.items():
        signal.signal(each, handler)


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops(
    repo: Repo, clock: Clock, which: signal.Signals, blocking: bool, caplog: pytest.LogCaptureFixture
) -> None:
    before = signal.getsignal(which)
    state = new_state()

    def training() -> None:
        with Autosave(repo, state, every=100, blocking=blocking) as save:
            for _ in range(10):
                if train(state) == 7:
                    signal.raise_signal(which)
                    clock.time += 1.5  # the handler does not interrupt the step
                save.step(state["step"], {"loss": 0.1})

    with pytest.raises(SystemExit) as caught:
        training()
    assert caught.value.code == 128 + which
    assert steps(repo) == [7]
    assert whys(repo) == [which.name]
    assert repo.resolve().metrics == {"loss": 0.1}
    assert signal.getsignal(which) == before
    (said,) = [line for line in lines(caplog) if "durable" in line]
    assert said == f"{which.name}: step 7 is durable as {repo.resolve().id.short}, 1.50 s after the signal"
    Autosave(repo, state, every=1).close()


def test_who_handled_the_signal_before_still_does(repo: Repo, handlers: None) -> None:
    seen: list[tuple[int, list[int | None]]] = []

    def earlier(which: int, frame: Any) -> None:
        seen.append((which, steps(repo)))

    signal.signal(signal.SIGUSR2, earlier)
    state = new_state()
    with Autosave(repo, state, every=100, signals=["SIGUSR2"]) as save:
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert save.step(train(state))
        signal.raise_signal(signal.SIGUSR2)
        assert seen == []
        assert save.step(train(state)) is False  # saved; whether to stop is the earlier handler's business
        assert save.should_stop
        assert seen == [(signal.SIGUSR2, [2])]
        signal.raise_signal(signal.SIGUSR2)
        save.step(train(state))
    assert seen == [(signal.SIGUSR2, [2]), (signal.SIGUSR2, [2, 3])]
    assert signal.getsignal(signal.SIGUSR2) is earlier
    signal.raise_signal(signal.SIGUSR2)
    assert len(seen) == 3


def test_a_keyboard_interrupt_after_the_save(repo: Repo, handlers: None) -> None:
    state = new_state()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Autosave(repo, state, every=100, signals=[signal.SIGINT]) as save:
        save.step(train(state))
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            save.step(train(state))
    assert steps(repo) == [2]


def test_a_handler_that_somebody_installs_later_stays(repo: Repo, handlers: None) -> None:
    def later(which: int, frame: Any) -> None:
        pass

    with Autosave(repo, new_state(), every=100):
        signal.signal(signal.SIGTERM, later)
    assert signal.getsignal(signal.SIGTERM) is later


def test_a_signal_behind_the_last_step_is_handed_on(repo: Repo, handlers: None) -> None:
    state = new_state()
    save = Autosave(repo, state, every=100)
    save.step(train(state))
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        save.close()
    assert caught.value.code == 143
    assert steps(repo) == [1]
    save.close()


def test_a_closed_autosave_does_not_swallow_signals(repo: Repo, handlers: None) -> None:
    """Not even where it was closed before one that was made later."""
    first = Autosave(repo, new_state(), every=100)
    state = new_state()
    second = Autosave(repo.on("next"), state, every=100)
    first.close()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        second.step(train(state))
    assert caught.value.code == 143
    second.close()


def test_a_forgotten_autosave_does_not_swallow_signals(place: Path, clock: Clock, handlers: None) -> None:
    seen: list[int] = []
    signal.signal(signal.SIGUSR1, lambda which, frame: seen.append(which))
    with Repo.open(place) as repo:
        save = Autosave(repo, new_state(), every=100)
        del save
        import gc

        gc.collect()
        signal.raise_signal(signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
        state = new_state()
        with Autosave(repo.on("next"), state, every=100) as save:
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(SystemExit):  # and not the end of the process by a handler that is left over
                save.step(train(state))


def test_a_signal_when_saving_fails(repo: Repo, blocking: bool, refusal: Refusal) -> None:
    state = new_state()
    warning = Autosave(repo, state, every=100, on_error="warn", blocking=blocking)
    warning.step(train(state), now=True)
    warning.wait()
    signal.raise_signal(signal.SIGTERM)
    refusal.begin()
    with pytest.raises(SystemExit) as caught:
        warning.step(train(state))
    assert caught.value.code == 143
    with pytest.raises(StorageError):
        warning.close()
    raising = Autosave(repo, state, every=100, blocking=blocking)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(StorageError):
        raising.step(train(state))
    refusal.end()
    with pytest.raises(SystemExit):  # it was not handed on yet
        raising.close()
    assert steps(repo) == [1, 3]


def test_other_threads_have_no_signals(place: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caught: list[Exception] = []

    def work(action: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                action()
            except Exception as error:  # noqa: BLE001 - handed to the test
                caught.append(error)

        thread = threading.Thread(target=guarded)
        thread.start()
        thread.join()

    def quiet() -> None:
        with Repo.open(place) as repo, Autosave(repo, new_state(), every=1) as save:
            save.step(1)

    def strict() -> None:
        with Repo.open(place) as repo:
            Autosave(repo, new_state(), every=1, signals=[signal.SIGTERM])

    work(quiet)
    assert caught == []
    assert any("Autosave will not notice signals" in line for line in lines(caplog))
    work(strict)
    (error,) = caught
    assert isinstance(error, InvalidError)
    assert "main thread" in str(error)


# -- retention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocking", [True, False])
def test_what_is_to_be_kept_is_kept_and_the_rest_goes(
    repo: Repo, caplog: pytest.LogCaptureFixture, blocking: bool
) -> None:
    caplog.set_level(logging.INFO, "ckptvcs")
    state = new_state()
    with Autosave(repo, state, every=2, monitor="loss", keep_last=2, keep_best=1, blocking=blocking) as save:
        assert "retention on main keeps the last 2, the best 1 by loss" in lines(caplog)
        for value in (0.5, 0.1, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9):
            save.step(train(state), {"loss": value})
        save.wait()
        assert [commit.step for commit in save.kept()] == [8, 6, 2]
    repo.close()
    with Repo.open(repo.path) as again:
        assert steps(again) == [1, 2, 4, 6, 8]
        assert [again.dropped(commit) for commit in again.log()] == [None, None, (), None, ()]
        assert again.resolve().environment["autosave"] == {
            "why": "every 2 steps",
            "keep_last": 2,
            "keep_best": 1,
            "monitor": {"metric": "loss", "mode": "min", "mark": 0.1, "stale": 6},
        }
        assert again.du("branch").pending == 0
        assert again.fsck(full=True).ok


def test_a_policy_of_the_config_holds_for_autosave(repo: Repo) -> None:
    repo.configure("retention.branch.main.keep_last", "1")
    other = repo.on("other")
    other.commit({"w": 1})
    other.commit({"w": 2})
    state = new_state()
    with Autosave(repo, state, every=1, blocking=True) as save:
        for _ in range(3):
            save.step(train(state))
        assert [commit.step for commit in save.kept()] == [3]
    assert [repo.dropped(commit) for commit in repo.log()] == [None, (), ()]
    assert [repo.dropped(commit) for commit in repo.log("other")] == [None, None]


def test_a_failing_retention_is_told_and_saving_goes_on(
    repo: Repo, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise CorruptionError("a pack is missing")

    monkeypatch.setattr(Repo, "retain", fail)
    state = new_state()
    with Autosave(repo, state, every=1, keep_last=1, blocking=True) as save:
        for _ in range(2):
            save.step(train(state))
    assert steps(repo) == [1, 2]
    assert lines(caplog).count("retention on main failed: a pack is missing") == 2


def test_without_a_policy_all_are_kept(repo: Repo, caplog: pytest.LogCaptureFixture) -> None:
    state = new_state()
    with Autosave(repo, state, every=1, blocking=True) as save:
        assert save.kept() == []
        for _ in range(3):
            save.step(train(state))
        assert [commit.step for commit in save.kept()] == [3, 2, 1]
    assert not any("retention" in line for line in lines(caplog))


# -- what is recorded -------------------------------------------------------------------------------


def test_config_and_message(repo: Repo) -> None:
    state = new_state()
    config = argparse.Namespace(lr=0.1, name="base")
    with Autosave(repo, state, every=1, config=config, message="my run") as save:
        save.step(train(state), epoch=2)
    commit = repo.resolve()
    assert (commit.config, commit.message, commit.epoch) == ({"lr": 0.1, "name": "base"}, "my run", 2)


def test_counters_are_recorded_where_the_environment_is_not(place: Path, repo: Repo) -> None:
    repo.configure("environment", "false")
    state = new_state()
    with Autosave(repo, state, every=1, monitor="loss") as save:
        save.step(train(state), {"loss": 1.0})
    assert repo.resolve().environment == {
        "autosave": {
            "why": "best loss",
            "monitor": {"metric": "loss", "mode": "min", "mark": 1.0, "stale": 0},
        }
    }


@pytest.mark.parametrize("hostile", [None, 3, [], {"metric": "loss"}, {"metric": "loss", "mode": "min"}])
@pytest.mark.parametrize("stale", [None, -1, 1.5, "x", True])
def test_a_record_that_is_none(repo: Repo, hostile: Any, stale: Any) -> None:
    record = {**hostile, "stale": stale} if isinstance(hostile, dict) else hostile
    state = new_state()
    repo.commit(state, step=1, metrics={"loss": 0.5}, environment={"autosave": {"monitor": record}})
    with Autosave(repo, state, every=10, monitor="loss", patience=2, save_last=False) as save:
        assert save.step(2, {"loss": 0.6})
        assert not save.step(3, {"loss": 0.6})


# -- a forked child ---------------------------------------------------------------------------------


def test_a_forked_child_holds_nothing(place: Path, repo: Repo) -> None:
    """A worker that was forked keeps neither the claim nor the signals, and does not save."""
    save = Autosave(repo, new_state(), every=1)
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(into)
        status = 1
        try:
            with pytest.raises(CkptError, match="parent"):
                save.step(1)
            os.read(out, 1)  # until the parent has tried
            status = 0
        finally:
            os._exit(status)
    os.close(out)
    save.close()
    with Repo.open(place) as other:
        Autosave(other, new_state(), every=1).close()
    os.write(into, b"x")
    os.close(into)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_forked_child_can_be_terminated(repo: Repo) -> None:
    with Autosave(repo, new_state(), every=1):
        ready, into = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(into, b"x")
            signal.pause()
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        os.close(ready)
        os.close(into)
