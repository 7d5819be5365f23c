"""Autosave on two ranks of a gloo group: one writes, all decide alike."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import ckptvcs
from ckptvcs import Repo

PROGRAM = """
import json, logging, os, random, signal, sys, time
import numpy as np, torch, torch.distributed as dist
import ckptvcs
from ckptvcs.training import Autosave

rank, options = int(sys.argv[1]), json.loads(sys.argv[2])
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="LOG %(message)s")
dist.init_process_group("gloo", init_method="file://" + options["rendezvous"], rank=rank, world_size=2)
seed = options.get("seed", 0) + rank
random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
model = torch.nn.Linear(8, 8)
for parameter in model.parameters():
    dist.broadcast(parameter.data, 0)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
state = {"model": model, "optimizer": optimizer, "rng": ckptvcs.rng}
repo = ckptvcs.Repo.open(options["place"])
got = repo.restore(state)
print("RESTORED", got.step, flush=True)
def train(save):
    for step in range(got.step or 0, options["steps"]):
        x = torch.randn(4, 8)  # each rank draws its own
        loss = ((model(x) + 0.1 * torch.randn(4, 8) + random.random() + np.random.rand()) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        if options.get("signal") == [rank, step + 1]:
            os.kill(os.getpid(), signal.SIGTERM)
        if options.get("pause"):
            time.sleep(options["pause"])
        metrics = {"loss": options["losses"][step]} if options.get("losses") and rank == 0 else None
        go_on = save.step(step + 1, metrics)
        print("STEP", step + 1, go_on, flush=True)
        if not go_on:
            break

try:
    with Autosave(repo, state, **options["arguments"]) as save:
        train(save)
    print("DRAWS", torch.randn(1).item(), random.random(), np.random.rand(), flush=True)
finally:
    dist.destroy_process_group()
"""


class Job:
    """Two ranks of the program above."""

    def __init__(self, place: Path, **options: Any) -> None:
        rendezvous = place.parent / f"rendezvous-{time.monotonic_ns()}"
        said = json.dumps({"place": str(place), "rendezvous": str(rendezvous), **options})
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(ckptvcs.__file__).parents[1]),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(rank), said],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(2)
        ]

    def end(self) -> list[tuple[int, list[str], str]]:
        """Status, lines and errors of each rank."""
        found = []
        for each in self.ranks:
            out, err = each.communicate(timeout=200)
            found.append((each.returncode, out.splitlines(), err))
        return found


def steps_of(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("STEP")]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    Repo.init(tmp_path / "work").close()
    return tmp_path / "work"


pytestmark = pytest.mark.slow


def test_rank_0_saves_and_a_cut_run_goes_on_exactly(place: Path) -> None:
    """Both ranks' generators are saved; a signal on rank 1 alone stops both at one step, behind its save."""
    whole = place.parent / "whole"
    Repo.init(whole).close()
    arguments = {"every": 4}
    job = Job(whole, arguments=arguments, steps=14)
    uncut = job.end()
    assert [status for status, _, _ in uncut] == [0, 0], uncut
    with Repo.open(whole) as repo:
        assert [commit.step for commit in repo.log()] == [14, 12, 8, 4]
        final = repo.resolve()
        assert len(repo.checkout()["rng"]["ranks"]) == 2

    cut = Job(place, arguments=arguments, steps=14, signal=[1, 7]).end()
    assert [status for status, _, _ in cut] == [143, 143], cut
    assert [steps_of(lines) for _, lines, _ in cut] == [[f"STEP {n} True" for n in range(1, 7)]] * 2
    with Repo.open(place) as repo:
        assert [commit.step for commit in repo.log()] == [7, 4]
    resumed = Job(place, arguments=arguments, steps=14, seed=99).end()
    assert [status for status, _, _ in resumed] == [0, 0], resumed
    assert ["RESTORED 7" in lines for _, lines, _ in resumed] == [True, True]
    assert [lines[-1] for _, lines, _ in resumed] == [lines[-1] for _, lines, _ in uncut]
    with Repo.open(place) as repo:
        assert repo.resolve().tree == final.tree


def test_patience_and_the_best_are_decided_by_rank_0(place: Path) -> None:
    losses = [0.9, 0.8, 0.7, 0.75, 0.76, 0.77, 0.1, 0.1]
    job = Job(place, arguments={"every": 100, "monitor": "loss", "patience": 3}, steps=8, losses=losses)
    ended = job.end()
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert [steps_of(lines) for _, lines, _ in ended] == [
        [f"STEP {n} {n < 6}" for n in range(1, 7)],
    ] * 2
    with Repo.open(place) as repo:
        assert [commit.step for commit in repo.log()] == [6, 3, 2, 1]


def test_times_are_decided_by_rank_0(place: Path) -> None:
    """Each rank has a clock of its own; the collective for the generators would hang if they disagreed."""
    ended = Job(place, arguments={"every": "0.2s"}, steps=12, pause=0.05).end()
    assert [status for status, _, _ in ended] == [0, 0], ended
    with Repo.open(place) as repo:
        assert len(list(repo.log())) >= 2
        assert len(repo.checkout()["rng"]["ranks"]) == 2


def test_what_fails_on_rank_0_fails_on_all(place: Path) -> None:
    with Repo.open(place) as repo:
        claim = repo.claim()
        began = time.monotonic()
        ended = Job(place, arguments={"every": 1}, steps=3).end()
        claim.release()
    assert time.monotonic() - began < 120
    assert [status for status, _, _ in ended] == [1, 1], ended
    assert "is claimed by process" in ended[0][2]
    assert "Autosave failed on another rank" in ended[1][2]


def test_a_signal_to_both_ranks(place: Path) -> None:
    job = Job(place, arguments={"every": 1000}, steps=100_000, pause=0.01)
    for each in job.ranks:
        assert each.stdout is not None
        while not each.stdout.readline().startswith("STEP"):
            pass
    for each in job.ranks:
        each.send_signal(signal.SIGTERM)
    ended = job.end()
    assert [status for status, _, _ in ended] == [143, 143], ended
    with Repo.open(place) as repo:
        (commit,) = repo.log()
        assert commit.title == "autosave: SIGTERM"
        said = [line for line in ended[0][1] if "durable" in line]
        assert len(said) == 1
        assert f"step {commit.step} is durable as {commit.id.short}" in said[0]


def test_on_rank_0_alone(place: Path) -> None:
    """Without agreement, a loop may leave the other ranks out; the generators of all are then refused."""
    job = Job(place, arguments={"every": 1, "agree": False}, steps=3)
    ended = job.end()
    assert ended[0][0] == 1
    assert "rank 0 sees its own random generators" in ended[0][2]
