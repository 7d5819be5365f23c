"""ckpt fork, sweep, runs and reset, with programs that really train."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import Repo
from tests.cli.command import COMMAND, ckpt, environment, refused

TRAINER = """
import json, os, sys, time
import numpy as np
import ckptvcs

class Sgd:
    '''As torch's optimizers: groups with options, loaded by load_state_dict.'''
    def __init__(self): self.param_groups = [{"lr": 0.5, "momentum": 0.9}]
    def state_dict(self): return {"param_groups": [dict(group) for group in self.param_groups]}
    def load_state_dict(self, state): self.param_groups = [dict(group) for group in state["param_groups"]]

state = {"w": np.arange(8.0), "optimizer": Sgd(), "step": 0}
with ckptvcs.Repo.open() as repo:
    repo.restore(state)
    overrides = json.loads(os.environ.get("CKPT_OVERRIDES", "{}"))
    assert overrides == repo.overrides
    if overrides.get("crash"):
        sys.exit(7)
    while state["step"] < int(sys.argv[1]):
        state["w"] -= state["optimizer"].param_groups[0]["lr"] * np.cos(state["w"])
        state["step"] += 1
        repo.commit(state, step=state["step"])
        print("step", state["step"], flush=True)
        time.sleep(float(overrides.get("pause", 0)))
"""


@pytest.fixture
def trained(folder: Path) -> Path:
    """A repository whose main has three steps of training, and the trainer beside it."""
    (folder / "train.py").write_text(TRAINER)
    Repo.init(folder).close()
    run = subprocess.run(
        [sys.executable, "train.py", "3"], cwd=folder, env=environment(), check=True, capture_output=True
    )
    assert run.stdout.split() == b"step 1 step 2 step 3".split()
    return folder


def weights(folder: Path, branch: str) -> list[float]:
    with Repo.open(folder) as repo:
        found: np.ndarray[Any, Any] = repo.checkout(branch)["w"]
        return found.tolist()


def expected(rates: list[float]) -> list[float]:
    w = np.arange(8.0)
    for rate in rates:
        w -= rate * np.cos(w)
    return w.tolist()


def test_fork_runs_a_program_on_its_branch(trained: Path) -> None:
    command = [sys.executable, "train.py", "5"]
    done = ckpt(trained, "fork", "main~1", "low", "--set", "optimizer.lr=0.125", "--", *command)
    assert done.out.splitlines() == ["step 3", "step 4", "step 5"]
    assert "fork low: optimizer.lr: 0.5 -> 0.125" in done.err
    assert weights(trained, "low") == expected([0.5] * 2 + [0.125] * 3)
    (run,) = ckpt(trained, "runs", "--json").json["runs"]
    assert (run["branch"], run["status"], run["exit"], run["step"]) == ("low", "finished", 0, 5)
    assert run["overrides"] == {"optimizer.lr": 0.125}
    with Repo.open(trained) as repo:
        assert run["fork_point"] == str(repo.resolve("main~1").id)
        assert repo.resolve("low~2").overrides == {"optimizer.lr": 0.125}
        assert repo.resolve("low").overrides == {}
    table = ckpt(trained, "runs").out
    assert "finished" in table
    assert "optimizer.lr=0.125" in table


def test_fork_without_a_program_and_refusals(trained: Path) -> None:
    assert "optimizer.lr = 0.25" in ckpt(trained, "fork", "main", "x", "--set", "optimizer.lr=0.25").out
    refused(trained, "fork", "main", "x", code=2, words=("x exists already", "--again"))
    refused(
        trained, "fork", "--again", "main", "x", "--set", "optimizer.lr=1", code=2, words=("not forked so",)
    )
    refused(trained, "fork", "main", "y", "--set", "a=1", "--set", "a=2", code=2, words=("given twice",))
    refused(trained, "fork", "main", "y", "--set", "a..b=1", code=2, words=("cannot be overridden",))
    refused(trained, "fork", "nowhere", "y", code=4, words=("nowhere",))
    assert ckpt(trained, "fork", "main", "z", "--set", "a=[1, 2]", "--json").json["overrides"] == {
        "a": [1, 2]
    }
    refused(trained, "fork", "main", "w", "--", "/no/such/program", code=2, words=("cannot be run",))
    runs = {run["branch"]: run["status"] for run in ckpt(trained, "runs", "--json").json["runs"]}
    assert runs == {"x": None, "z": None, "w": None}


def test_a_program_that_fails(trained: Path) -> None:
    program = [sys.executable, "-c", "raise SystemExit(9)"]
    done = ckpt(trained, "fork", "main", "bad", "--json", "--", *program, code=9)
    assert done.json["exit"] == 9
    (run,) = ckpt(trained, "runs", "--json").json["runs"]
    assert (run["status"], run["exit"], run["holder"]) == ("failed", 9, None)
    assert "failed (9)" in ckpt(trained, "runs").out


def test_a_signal_reaches_the_program_and_a_killed_run_is_stale(trained: Path) -> None:
    def start(name: str) -> subprocess.Popen[bytes]:
        words = ["fork", "main", name, "--set", "pause=30", "--", sys.executable, "train.py", "9"]
        running = subprocess.Popen(
            [*COMMAND, *words], cwd=trained, env=environment(), stdout=subprocess.PIPE, start_new_session=True
        )
        assert running.stdout is not None
        assert running.stdout.readline() == b"step 4\n"
        return running

    def the_run(name: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = ckpt(trained, "runs", "--json").json["runs"]
        return next(run for run in found if run["branch"] == name)

    with start("told") as running:
        assert the_run("told")["status"] == "running"
        assert the_run("told")["holder"]
        refused(
            trained, "fork", "--again", "main", "told", "--set", "pause=30", "--", "true", code=11, words=()
        )
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 128 + signal.SIGTERM
    assert (the_run("told")["status"], the_run("told")["exit"]) == ("failed", 143)
    with start("killed") as running:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait(60)
    deadline = time.monotonic() + 60
    while the_run("killed")["holder"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert the_run("killed")["status"] == "stale"


def test_killed_at_random_and_started_again_until_done(trained: Path) -> None:
    """Weights are those of the fork that was never killed, bit for bit."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    words = ["fork", "--again", "main", "cut", "--set", "optimizer.lr=0.0625", "--"]
    kills = 0
    for _ in range(40):
        with subprocess.Popen(
            [*COMMAND, *words, sys.executable, "train.py", "12"],
            cwd=trained,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as running:
            assert running.stdout is not None
            wanted = rng.randrange(3)
            while wanted and running.stdout.readline():
                wanted -= 1
            time.sleep(rng.random() * 0.05 if kills < 4 else 0)
            if kills < 4 and running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
                kills += 1
            running.stdout.read()
            if running.wait(90) == 0:
                break
    assert kills, f"seed {seed}: nothing was killed"
    assert weights(trained, "cut") == expected([0.5] * 3 + [0.0625] * 9), f"seed {seed}"
    with Repo.open(trained) as repo:
        line = [commit.step for commit in repo.log("cut")]
        assert line == list(range(12, 0, -1)), f"seed {seed}: a step was trained twice or lost"


# -- sweep ----------------------------------------------------------------------------------------

GRID = ["--grid", "optimizer.lr=0.25,0.125", "--grid", "crash=0,1"]


def test_sweep_runs_every_point_and_goes_on_with_the_rest(trained: Path) -> None:
    command = ["--", sys.executable, "train.py", "5"]
    done = ckpt(trained, "sweep", "main", *GRID, "--jobs", "2", *command, code=3)
    names = {f"sweep/lr={lr},crash={crash}" for lr in ("0.25", "0.125") for crash in (0, 1)}
    runs = {run["branch"]: run for run in ckpt(trained, "runs", "--json").json["runs"]}
    assert set(runs) == names
    assert "2 of 4 failed" in done.err
    for name, run in runs.items():
        crash = run["overrides"]["crash"]
        assert (run["status"], run["exit"]) == (("failed", 7) if crash else ("finished", 0))
        log = (trained / "sweep-logs" / f"{name}.log").read_text()
        assert ("step 5" in log) is not bool(crash)
    rate = runs["sweep/lr=0.25,crash=0"]["overrides"]["optimizer.lr"]
    assert weights(trained, "sweep/lr=0.25,crash=0") == expected([0.5] * 3 + [rate] * 2)
    again = ckpt(trained, "sweep", "main", *GRID, "--json", *command, code=3).json
    assert set(again["finished_before"]) == {name for name in names if name.endswith("crash=0")}
    assert again["ended"] == {name: 7 for name in names if name.endswith("crash=1")}


def test_sweep_prints_commands_that_do_the_same(trained: Path) -> None:
    command = ["--", sys.executable, "train.py", "4"]
    lines = ckpt(trained, "sweep", "main", "--grid", "lr=0.25,1", "--name", "s", "--print", *command).out
    rows = [shlex.split(line) for line in lines.splitlines()]
    assert [row[0] for row in rows] == ["ckpt", "ckpt"]
    assert not any(name.startswith("s/") for name in ckpt_branches(trained))
    for row in rows:
        ckpt(trained, *row[1:])
        ckpt(trained, *row[1:])  # a requeue finds the work done
    assert weights(trained, "s/lr=0.25") == expected([0.5] * 3 + [0.25])
    shown = ckpt(trained, "sweep", "main", "--grid", "lr=0.25,1", "--print", "--json", *command).json
    assert [point["overrides"] for point in shown["points"]] == [{"lr": 0.25}, {"lr": 1}]


def ckpt_branches(folder: Path) -> list[str]:
    return [row["name"] for row in ckpt(folder, "branch", "--json").json["branches"]]


def test_grids_that_cannot_be(trained: Path) -> None:
    tail = ("--", "true")
    refused(trained, "sweep", "main", "--grid", "a=1,", *tail, code=2, words=("empty value",))
    refused(trained, "sweep", "main", "--grid", "a=1", "--grid", "a=2", *tail, code=2, words=("given twice",))
    refused(trained, "sweep", "main", "--grid", "a=x y,x/y", *tail, code=2, words=("would be called",))
    shown = ckpt(
        trained, "sweep", "main", "--grid", "betas=[0.9,0.95],[0.8,0.9]", "--print", "--json", *tail
    ).json
    assert [point["overrides"] for point in shown["points"]] == [
        {"betas": [0.9, 0.95]},
        {"betas": [0.8, 0.9]},
    ]


def test_gpus_are_dealt_out(trained: Path) -> None:
    program = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    ckpt(
        trained, "sweep", "main", "--grid", "a=1,2", "--jobs", "2", "--", sys.executable, "-c", program,
        CUDA_VISIBLE_DEVICES="0,1,2,5",
    )  # fmt: skip
    logs = [(trained / "sweep-logs" / "sweep" / f"a={n}.log").read_text().strip() for n in (1, 2)]
    assert sorted(logs) == ["0,2", "1,5"]


# -- reset ----------------------------------------------------------------------------------------


def test_reset_and_back(trained: Path) -> None:
    with Repo.open(trained) as repo:
        tip, older = repo.resolve("main").id, repo.resolve("main~2").id
    done = ckpt(trained, "reset", "main~2", "--set", "optimizer.lr=2")
    assert f"ckpt reset --branch main {tip.short}" in done.out
    assert ckpt(trained, "log", "--json").json["commits"][0]["id"] == str(older)
    assert json.loads(ckpt(trained, "runs", "--json").out)["runs"][0]["overrides"] == {"optimizer.lr": 2}
    ckpt(trained, "reset", "main@{1}")
    assert ckpt(trained, "log", "--json").json["commits"][0]["id"] == str(tip)
    assert ckpt(trained, "runs", "--json").json["runs"] == []
    refused(trained, "reset", "main", "--branch", "nope", code=2, words=("no branch called 'nope'",))
