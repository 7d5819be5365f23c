"""Forks: overrides in a live state, applied once, and branches that move."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ckptvcs import ConflictError, ExistsError, InvalidError, LineageError, LockedError, NotFoundError, Repo
from ckptvcs.state import overrides

torch = pytest.importorskip("torch")
schedulers = torch.optim.lr_scheduler


@pytest.fixture
def repo(tmp_path: Path) -> Iterator[Repo]:
    with Repo.init(tmp_path) as repo:
        yield repo


def training(
    lr: float = 0.1, schedule: Callable[[Any], Any] | None = None, groups: int = 1
) -> dict[str, Any]:
    torch.manual_seed(3)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(groups)))
    optimizer = torch.optim.AdamW(
        [{"params": layer.parameters(), "lr": lr * (n + 1)} for n, layer in enumerate(model)], lr=lr
    )
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
    if schedule is not None:
        state["scheduler"] = schedule(optimizer)
    return state


def train(state: dict[str, Any], steps: int) -> list[float]:
    """The learning rates of the steps, of the last group."""
    rates = []
    for _ in range(steps):
        state["optimizer"].zero_grad()
        data = torch.full((2, 4), 0.1 * (state["step"] + 1))
        state["model"](data).square().sum().backward()
        rates.append(float(state["optimizer"].param_groups[-1]["lr"]))
        state["optimizer"].step()
        if "scheduler" in state:
            state["scheduler"].step()
        state["step"] += 1
    return rates


# -- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("1", 1), ("true", True), ("None", None), ("[0.9, 0.95]", [0.9, 0.95]), ("adam", "adam"),
     ('{"a": 1}', '{"a": 1}'), ('"1"', "1"), ("", "")],
)  # fmt: skip
def test_values_of_the_command_line(text: str, value: Any) -> None:
    found = overrides.value_of(text)
    assert found == value
    assert type(found) is type(value)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 40),
    "step": lambda o: schedulers.StepLR(o, 3, 0.5),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda n: min(1.0, (n + 1) / 4) * 0.95**n),
    "onecycle": lambda o: schedulers.OneCycleLR(o, [0.1 * (n + 1) for n in range(2)], total_steps=40),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=4, cycle_momentum=False),
    "warmup": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1.0, 4), schedulers.CosineAnnealingLR(o, 40)], [4]
    ),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 4), schedulers.ExponentialLR(o, 0.95)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("before", [1, 3, 6])
def test_a_new_learning_rate_scales_the_schedule(name: str, before: int) -> None:
    """From the fork on, every rate is the old schedule's, times the ratio."""
    one, other = training(schedule=SCHEDULES[name], groups=2), training(schedule=SCHEDULES[name], groups=2)
    train(one, before)
    train(other, before)
    group = other["optimizer"].param_groups[1]
    top = next(group[key] for key in ("max_lr", "initial_lr", "lr") if key in group)
    applied = overrides.apply(other, {"optimizer.param_groups.1.lr": top / 4})
    assert applied.left == {}
    assert len(applied.said) == 1
    expected = [rate / 4 for rate in train(one, 12)]
    assert train(other, 12) == pytest.approx(expected, rel=1e-9)
    assert other["optimizer"].param_groups[0]["lr"] == one["optimizer"].param_groups[0]["lr"], "untouched"


def test_without_a_schedule_the_rate_is_exact_in_every_group() -> None:
    state = training(groups=3)
    said = overrides.apply(state, {"optimizer.lr": 3e-4}).said
    assert [group["lr"] for group in state["optimizer"].param_groups] == [3e-4] * 3
    assert said == [f"optimizer.lr: {0.1 * (n + 1)!r} -> 0.0003" for n in range(3)]


def test_a_rate_that_is_a_tensor_stays_that_tensor() -> None:
    state = training()
    rate = state["optimizer"].param_groups[0]["lr"] = torch.tensor(0.1)
    overrides.apply(state, {"lr": 0.5})
    assert state["optimizer"].param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


def test_a_rate_of_zero_is_set_as_it_is() -> None:
    state = training(lr=0.0)
    overrides.apply(state, {"optimizer.lr": 0.25})
    assert state["optimizer"].param_groups[0]["lr"] == 0.25


def test_other_options_and_plain_values() -> None:
    state: dict[str, Any] = training(schedule=SCHEDULES["exponential"])
    state["config"] = {"batch": 8, "data": [1, {"augment": False}], "name": "a", "none": None}
    state["ema"] = np.array([0.5], np.float32)
    state["ns"] = SimpleNamespace(k=1.5)
    found = overrides.apply(
        state,
        {
            "optimizer.weight_decay": 1,
            "optimizer.betas": [0.8, 0.9],
            "scheduler.gamma": 0.5,
            "config.batch": 16,
            "config/data/1/augment": True,
            "config.name": "b",
            "config.none": 3,
            "ema": 0.25,
            "ns.k": 2,
            "data.workers": 4,
            "elsewhere": "x",
        },
    )
    group = state["optimizer"].param_groups[0]
    assert (group["weight_decay"], group["betas"]) == (1.0, (0.8, 0.9))
    assert type(group["weight_decay"]) is float
    assert state["scheduler"].gamma == 0.5
    assert state["config"] == {"batch": 16, "data": [1, {"augment": True}], "name": "b", "none": 3}
    assert state["ema"].tolist() == [0.25]
    assert state["ns"].k == 2.0
    assert found.left == {"data.workers": 4, "elsewhere": "x"}


@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("optimizer.leaning_rate", 1.0, NotFoundError, "no parameter group has 'leaning_rate'"),
        ("optimizer.param_groups.7.lr", 1.0, NotFoundError, "no parameter group 7"),
        ("optimizer.params", 1.0, NotFoundError, "no parameter group has 'params'"),
        ("optimizer.lr", "fast", InvalidError, "a float is there"),
        ("optimizer.lr", True, InvalidError, "a float is there"),
        ("optimizer.betas", [0.9], InvalidError, "a tuple of 2 is there"),
        ("config.bath", 1, NotFoundError, "config has no 'bath'"),
        ("config.pair.0", 1, InvalidError, "in a tuple"),
        ("config", 1, InvalidError, "a dict is there"),
        ("model", 1, InvalidError, "there"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(
    repo: Repo, name: str, value: Any, error: type[Exception], says: str
) -> None:
    state = training()
    state["config"] = {"batch": 1, "pair": (1, 2)}
    commit = repo.commit(state)
    fork = repo.fork("HEAD", "x", {name: value})
    other = training(lr=0.7)
    other["config"] = {"batch": 5, "pair": (3, 4)}
    with pytest.raises(error, match=says):
        fork.restore(other)
    assert other["config"] == {"batch": 5, "pair": (3, 4)}
    assert other["optimizer"].param_groups[0]["lr"] == 0.7
    assert fork.origin is None
    assert repo.branches()["x"] == commit.id


def test_names_and_values_that_cannot_be(repo: Repo) -> None:
    repo.commit({"a": 1})
    for bad in ({"": 1}, {"a..b": 1}, {5: 1}, {"a": object()}, {"a": {"b": 1}}):
        with pytest.raises(InvalidError):
            repo.fork("HEAD", "x", bad)
    assert set(repo.branches()) == {"main"}
    repo.fork("HEAD", "x", {"a": np.float32(0.5), "b": (1, "2")})
    assert repo.on("x").overrides == {"a": 0.5, "b": [1, "2"]}


# -- forks ----------------------------------------------------------------------------------------


def test_overrides_apply_at_the_fork_point_and_never_again(
    repo: Repo, caplog: pytest.LogCaptureFixture
) -> None:
    state = training(schedule=SCHEDULES["cosine"])
    train(state, 3)
    point = repo.commit(state, step=3)
    train(state, 2)
    repo.commit(state, step=5)
    fork = repo.fork(point, "low", {"optimizer.lr": 0.01, "note": "mine"})
    assert (fork.branch_name, fork.fork_point) == ("low", point.id)
    ours = training(schedule=SCHEDULES["cosine"])
    with caplog.at_level(logging.WARNING, "ckptvcs"):
        got = fork.restore(ours)
    assert (got.step, got.overrides) == (3, {"optimizer.lr": 0.01, "note": "mine"})
    assert [r.getMessage() for r in caplog.records] == ["fork low: optimizer.lr: 0.1 -> 0.01"]
    assert ours["scheduler"].base_lrs == [0.01]
    train(ours, 1)
    first = fork.commit(ours, step=4)
    assert first.parents == (point.id,)
    assert first.overrides == {"optimizer.lr": 0.01, "note": "mine"}
    train(ours, 1)
    second = fork.commit(ours, step=5)
    assert second.overrides == {}
    again = training(schedule=SCHEDULES["cosine"])
    requeued = repo.on("low")
    got = requeued.restore(again, rev=first)
    assert got.overrides == {}
    assert again["optimizer"].param_groups[0]["lr"] != 0.01, "where the schedule stood, not its top"
    assert requeued.overrides == {"optimizer.lr": 0.01, "note": "mine"}, "the program may still ask"
    train(again, 1)
    assert repo.on("check").commit(again).tree == second.tree, "as if it had never stopped"
    elsewhere = training(schedule=SCHEDULES["cosine"])
    repo.on("third").restore(elsewhere, rev=point)
    assert elsewhere["scheduler"].base_lrs == [0.1], "another branch from the same commit is no fork"


def test_a_fork_killed_before_its_first_commit_applies_them_again(repo: Repo) -> None:
    point = repo.commit(training())
    repo.fork(point, "x", {"lr": 0.5})
    for _ in range(2):
        state = training()
        handle = repo.on("x")
        handle.restore(state)
        assert state["optimizer"].param_groups[0]["lr"] == 0.5
    assert handle.commit(state).overrides == {"lr": 0.5}


def test_saves_in_the_background_record_them_once(repo: Repo) -> None:
    point = repo.commit(training())
    fork = repo.fork(point, "x", {"lr": 0.5})
    state = training()
    fork.restore(state)
    one = fork.commit_async(state, step=1)
    two = fork.commit_async(state, step=2)
    assert one.result().overrides == {"lr": 0.5}
    assert two.result().overrides == {}
    assert two.result().parents == (one.result().id,)


def test_a_fork_costs_no_bytes_and_survives_the_index(repo: Repo, tmp_path: Path) -> None:
    point = repo.commit({"w": np.arange(100_000)})
    before = {p: p.stat().st_size for p in (tmp_path / ".ckpt" / "packs").rglob("*.pack")}
    repo.fork("HEAD", "x", {"a": 1})
    with pytest.raises(ExistsError):
        repo.fork("HEAD", "x")
    assert {p: p.stat().st_size for p in (tmp_path / ".ckpt" / "packs").rglob("*.pack")} == before
    repo.close()
    with Repo.open(tmp_path, rebuild=True) as again:
        assert (again.on("x").fork_point, again.on("x").overrides) == (point.id, {"a": 1})
        again.delete_branch("x", force=True)
        again.branch("x", point)
        assert again.on("x").fork_point is None, "a new branch of that name is no fork"


# -- reset ----------------------------------------------------------------------------------------


def test_reset_moves_the_branch_and_the_reflog_keeps_its_tip(repo: Repo) -> None:
    first = repo.commit({"a": 1})
    second = repo.commit({"a": 2})
    best = repo.on("best")
    best.restore({"a": 0}, rev=second)
    good = best.commit({"a": 9})
    assert repo.reset("best", {"a": 10}) == second.id
    assert repo.resolve("main").id == good.id
    assert repo.resolve("main@{1}").id == second.id
    with pytest.raises(LineageError, match="this handle restored"):
        repo.commit({"a": 3})
    state = {"a": 0}
    assert repo.restore(state).overrides == {"a": 10}
    assert state == {"a": 10}
    made = repo.commit(state)
    assert (made.parents, made.overrides) == ((good.id,), {"a": 10})
    assert repo.reset(first) == made.id
    assert repo.fork_point is None


def test_reset_respects_claims_and_races(repo: Repo) -> None:
    first = repo.commit({"a": 1})
    repo.commit({"a": 2})
    other = Repo.open(repo.path, "main")
    claim = other.claim()
    with pytest.raises(LockedError) as caught:
        repo.reset(first)
    assert caught.value.code == "claimed"
    repo.reset(first, force=True)
    with pytest.raises(ConflictError):
        other.commit({"a": 3})
    claim.release()
    other.close()
    with pytest.raises(NotFoundError, match="has no commits"):
        repo.on("unborn").reset(first)


# -- runs -----------------------------------------------------------------------------------------


def test_branch_tags_and_status_move_together(repo: Repo) -> None:
    made = repo.commit({"a": 1}, tags=["v1", "best"], status="finished")
    assert repo.tags() == {"best": made.id, "v1": made.id}
    (run,) = repo.runs()
    assert (run.branch, run.status, run.tip, run.holder) == ("main", "finished", made, None)
    (entry,) = repo.reflog(1)
    assert len(entry.operations) == 4
    with pytest.raises(ExistsError, match="v1 exists already"):
        repo.commit({"a": 2}, tags=["v2", "v1"])
    with pytest.raises(InvalidError, match="cannot be 'done'"):
        repo.commit({"a": 2}, status="done")
    assert repo.resolve("main").id == made.id, "nothing was written"
    later = repo.commit_async({"a": 3}, tags=["v3"], status="failed").result()
    assert (repo.tags()["v3"], repo.runs()[0].status) == (later.id, "failed")


def test_a_lost_race_makes_no_tag_and_keeps_the_status(repo: Repo) -> None:
    repo.commit({"a": 1}, status="finished")
    other = repo.on("main")
    other.restore({"a": 0})
    repo.commit({"a": 2})
    with pytest.raises(ConflictError, match="moved the branch"):
        other.commit({"a": 3}, tags=["mine"], status="failed")
    assert (repo.tags(), repo.runs()[0].status) == ({}, "finished")


def test_a_tag_made_by_another_meanwhile_is_named(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    first = repo.commit({"a": 1})
    committer = repo._committer
    looked = committer.beside

    def look_then_lose(*arguments: Any) -> Any:
        found = looked(*arguments)
        repo.on("side").tag("v1", first)
        return found

    monkeypatch.setattr(committer, "beside", look_then_lose)
    with pytest.raises(ConflictError, match="made the tag v1 meanwhile") as caught:
        repo.commit({"a": 2}, tags=["v1"])
    assert repo.resolve(caught.value.rescued).parents == (first.id,)
    assert repo.resolve("main").id == first.id


def test_a_running_run_is_stale_once_its_process_is_gone(repo: Repo) -> None:
    repo.commit({"a": 1}, status="running")
    assert repo.claimed is not None, "who runs claims its branch"
    (run,) = repo.runs()
    assert run.status == "running"
    assert run.holder is not None
    assert "this process" in run.holder
    repo.claimed.release()
    assert repo.runs()[0].status == "stale"
    repo.set_status("failed", {"exit": 3})
    (run,) = repo.runs()
    assert (run.status, run.exit) == ("failed", 3)
    repo.set_status(None)
    assert repo.runs() == []
