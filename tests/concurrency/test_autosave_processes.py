"""Autosave in real processes: two claimants, signals in the middle of saves, kills and requeues, exits."""

from __future__ import annotations

import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ckptvcs
from ckptvcs import Repo
from ckptvcs.testing.same import difference

pytestmark = pytest.mark.slow

SEED = 20261125

HEAD = """
import logging, os, random, signal, sys, time
import numpy as np
import ckptvcs
from ckptvcs.training import Autosave

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="LOG %(message)s")

def new_state(size):
    return {"w": np.zeros(size), "noise": np.zeros(size // 4), "step": 0, "rng": random.Random(7)}

def train(state):
    state["step"] += 1
    state["w"] += state["step"]
    fresh = np.random.default_rng(state["rng"].getrandbits(60))
    state["noise"][:] = fresh.standard_normal(state["noise"].size)
    return state["step"]

def say(*words):
    print(*words, flush=True)

place = sys.argv[1]
"""

LOOP = """
steps, every, size = map(int, sys.argv[2:5])
state = new_state(size)
with ckptvcs.Repo.open(place) as repo:
    got = repo.restore(state)
    with Autosave(repo, state, every=every, monitor="loss", config={"size": size}) as save:
        say("BEGUN", got.step)
        while state["step"] < steps:
            step = train(state)
            say("TRAINED", step)
            save.step(step, {"loss": abs(step - 40) / 7} if step % 5 == 0 else None)
            time.sleep(0.002)
say("DONE")
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(ckptvcs.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


JOBS: list[Job] = []


@pytest.fixture(autouse=True)
def _no_job_outlives_its_test() -> Iterator[None]:
    yield
    while JOBS:
        JOBS.pop().close()


class Job:
    """A process that runs one of the programs here."""

    def __init__(self, program: str, *arguments: object, **variables: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HEAD + program, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment() | variables,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._errors: list[str] = []
        assert self.process.stderr is not None
        self._listener = threading.Thread(target=self._errors.extend, args=(self.process.stderr,))
        self._listener.start()
        JOBS.append(self)

    def until(self, beginning: str) -> str:
        """The next line that begins so."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if line.startswith(beginning):
                return line.rstrip("\n")
        _, errors = self.end()
        raise AssertionError(f"it ended before it said {beginning}: {self.lines[-5:]} {errors}")

    def end(self) -> tuple[int, str]:
        """Its status and what it wrote to standard error; `lines` has the rest."""
        # Not `communicate`, which would pass over lines that `until` has read ahead.
        assert self.process.stdout is not None
        self.lines += [line.rstrip("\n") for line in self.process.stdout]
        self.process.wait(timeout=300)
        self._listener.join()
        errors = "".join(self._errors)
        return self.process.returncode, errors

    def close(self) -> None:
        """Kill it, and let go of its pipes."""
        self.process.kill()
        self.process.wait()
        self._listener.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def trained(self) -> int:
        """The last step it says it trained."""
        return max((int(line.split()[1]) for line in self.lines if line.startswith("TRAINED")), default=0)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    Repo.init(tmp_path / "work").close()
    return tmp_path / "work"


def exact(place: Path) -> None:
    """Every commit on main holds what training to its step gives."""
    names: dict[str, object] = {}
    exec(compile(HEAD.replace("place = sys.argv[1]", ""), "<head>", "exec"), names)  # the functions above
    with Repo.open(place) as repo:
        commits = list(repo.log())[::-1]
        state = names["new_state"](commits[-1].config["size"])  # type: ignore[operator]
        for commit in commits:
            while state["step"] < (commit.step or 0):
                names["train"](state)  # type: ignore[operator]
            assert difference(repo.checkout(commit), state) is None, commit.step
        assert repo.fsck(full=True).ok


# -- claims ---------------------------------------------------------------------------------------


def test_a_second_live_claimant_fails_at_the_start(place: Path) -> None:
    first = Job(LOOP, place, 10_000, 1000, 100, SLURM_JOB_ID="4711")
    first.until("BEGUN")
    second = Job(LOOP, place, 10, 1, 100)
    status, errors = second.end()
    assert status == 1
    assert "LockedError: the branch main is claimed by job slurm 4711: process " in errors
    assert f"process {first.process.pid} on {os.uname().nodename} (" in errors
    assert "steal=True" in errors
    assert not any(line.startswith("BEGUN") for line in second.lines)
    first.process.send_signal(signal.SIGTERM)
    assert first.end()[0] == 143
    third = Job(LOOP, place, first.trained() + 3, 1, 100)
    assert third.end()[0] == 0, third.lines
    exact(place)


def test_taking_over(place: Path) -> None:
    """The thief goes on from what was saved; the first saves nothing more, not even what it had begun."""
    steal = LOOP.replace("    got =", "    repo.claim(steal=True)\n    got =")
    steal = steal.replace('while state["step"] < steps:', "for _ in range(steps):")
    first = Job(LOOP, place, 100_000, 5, 400_000)
    first.until("TRAINED 23")
    thief = Job(steal, place, 20, 5, 400_000)
    status, errors = first.end()
    assert status == 1
    assert "LockedError: the branch main was taken over by " in errors
    assert thief.end()[0] == 0
    with Repo.open(place) as repo:
        assert repo.resolve().step == thief.trained() > 20
        assert repo.lost() == {}
    exact(place)


def test_a_dead_claimant_leaves_nothing_behind(place: Path) -> None:
    """Not even while workers that it had forked live on."""
    workers = """
import multiprocessing
context = multiprocessing.get_context("fork")
state = new_state(100)
repo = ckptvcs.Repo.open(place)
save = Autosave(repo, state, every=1)
worker = context.Process(target=time.sleep, args=(30,))
worker.start()
say("BEGUN", worker.pid)
time.sleep(60)
"""
    first = Job(workers, place)
    worker = int(first.until("BEGUN").split()[1])
    first.process.kill()
    first.process.wait()
    os.kill(worker, 0)  # it lives
    began = time.monotonic()
    second = Job(LOOP, place, 3, 1, 100)
    assert second.end()[0] == 0
    os.kill(worker, signal.SIGKILL)
    assert time.monotonic() - began < 25
    exact(place)


# -- signals --------------------------------------------------------------------------------------


def test_sigterm_at_any_moment(place: Path) -> None:
    """Also in the middle of a save: it is finished, and then the last step is saved."""
    chance = random.Random(SEED)
    print(f"seed {SEED}")
    reached = 0
    for _ in range(6):
        job = Job(LOOP, place, 100_000, 3, 400_000)
        began = job.until("BEGUN")
        assert began == f"BEGUN {reached or None}"
        for _ in range(chance.randrange(1, 12)):
            job.until("TRAINED")
        time.sleep(chance.random() * 0.2)
        job.process.send_signal(signal.SIGTERM)
        status, errors = job.end()
        assert (status, errors) == (143, "")
        reached = job.trained()
        assert any(f"SIGTERM: step {reached} is durable as " in line for line in job.lines), job.lines[-3:]
        with Repo.open(place) as repo:
            assert repo.resolve().step == reached
    exact(place)


def test_a_signal_to_the_whole_group_spares_the_writer(place: Path) -> None:
    """Batch systems signal every process of a job."""
    job = Job(LOOP, place, 100_000, 2, 1_000_000)
    job.until("TRAINED 5")
    os.killpg(job.process.pid, signal.SIGUSR1)
    status, errors = job.end()
    assert (status, errors) == (128 + signal.SIGUSR1, "")
    with Repo.open(place) as repo:
        assert repo.resolve().step == job.trained()
    exact(place)


def test_earlier_handlers_run_behind_the_save(place: Path) -> None:
    program = """
def earlier(which, frame):
    say("HANDED", which, [commit.step for commit in repo.log()])
    sys.exit(7)

signal.signal(signal.SIGTERM, earlier)
state = new_state(1000)
repo = ckptvcs.Repo.open(place)
save = Autosave(repo, state, every=1000)
say("BEGUN")
while True:
    save.step(train(state))
    say("TRAINED", state["step"])
    time.sleep(0.01)
"""
    job = Job(program, place)
    job.until("TRAINED 3")
    job.process.send_signal(signal.SIGTERM)
    status, errors = job.end()
    assert (status, errors) == (7, "")
    with Repo.open(place) as repo:
        step = repo.resolve().step
    assert f"HANDED {int(signal.SIGTERM)} [{step}]" in job.lines


# -- kills ----------------------------------------------------------------------------------------


def test_kills_and_requeues_end_as_a_run_that_was_not_killed(place: Path) -> None:
    """Killed at random moments, in saves too: every requeue starts, goes on exactly, and decides alike."""
    chance = random.Random(SEED)
    print(f"seed {SEED}")
    whole = place.parent / "whole"
    Repo.init(whole).close()
    uncut = Job(LOOP, whole, 60, 4, 200_000)
    assert uncut.end()[0] == 0
    reached, kills = 0, 0
    for _ in range(12):
        job = Job(LOOP, place, 60, 4, 200_000)
        assert job.process.stdout is not None
        for line in itertools.islice(job.process.stdout, chance.randrange(1, 30)):
            job.lines.append(line.rstrip("\n"))
        time.sleep(chance.random() * 0.1)
        job.process.kill()
        status, errors = job.end()
        if status == 1:  # the writer of one that was killed may publish just before the claim of the next
            assert "somebody else moved the branch" in errors
            continue
        assert status in (0, -signal.SIGKILL), errors
        kills += status != 0
        begun = [line for line in job.lines if line.startswith("BEGUN")]
        if begun:
            step = begun[0].split()[1]
            assert step == "None" or int(step) >= reached, "a commit went away"
            reached = max(reached, 0 if step == "None" else int(step))
    for _ in range(2):
        job = Job(LOOP, place, 60, 4, 200_000)
        status, errors = job.end()
        if status == 0:
            break
        assert "somebody else moved the branch" in errors
    assert status == 0, errors
    assert kills > 0

    def history(where: Path) -> dict[int | None, tuple[str, object, object]]:
        with Repo.open(where) as repo:
            assert repo.lost() == {}
            return {c.step: (str(c.tree), c.metrics, c.environment["autosave"]) for c in repo.log()}

    assert history(place) == history(whole)
    exact(place)


# -- ends -----------------------------------------------------------------------------------------

ENDS = """
import resource
state = new_state(1000)
repo = ckptvcs.Repo.open(place)
on_error = "raise" if "raise" in sys.argv else "warn"
save = Autosave(repo, state, every=2, on_error=on_error, blocking="blocking" in sys.argv)
for _ in range(4):
    save.step(train(state))
    save.wait()
if "full" in sys.argv:
    if "blocking" in sys.argv:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
    else:
        writer = repo._opened.background._companion.number
        resource.prlimit(writer, resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
if "raise" in sys.argv:
    say("DONE")
    save.step(train(state))
    save.step(train(state))
    save.wait()
for _ in range(3):
    save.step(train(state))
say("DONE")
if "close" in sys.argv:
    save.close()
"""


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits what another process writes: Linux only")
@pytest.mark.parametrize("how", ["blocking", "background"])
def test_exit_statuses(place: Path, how: str) -> None:
    def ended(*words: str) -> tuple[int, str, list[str], list[int | None]]:
        where = place.parent / "-".join((how, *words))
        Repo.init(where).close()
        job = Job(ENDS, where, how, *words)
        status, errors = job.end()
        assert "DONE" in job.lines, errors
        with Repo.open(where) as repo:
            return status, errors, job.lines, [commit.step for commit in repo.log()][::-1]

    status, errors, lines, steps = ended("close")
    assert (status, errors, steps) == (0, "", [2, 4, 6, 7])

    status, errors, lines, steps = ended()
    assert (status, errors, steps) == (0, "", [2, 4, 6])  # the save under way is waited for
    assert any("step 7 was not saved when the process ended" in line for line in lines)

    status, errors, lines, steps = ended("full")
    assert status == 120
    assert steps == [2, 4]
    assert any("step 6 could not be saved" in line for line in lines)

    if how == "background":
        status, errors, lines, steps = ended("full", "raise")
        assert status == 1  # as of any exception: it is told once
        assert errors.count("StorageError") == 1
        assert steps == [2, 4]
        assert "last save failed" not in errors
        assert "exit status" not in errors

    status, errors, lines, steps = ended("full", "close")
    assert status == 1
    assert "StorageError" in errors
    assert steps == [2, 4]


def test_a_real_training_with_workers_is_cut_and_goes_on_exactly(place: Path) -> None:
    """torch: a network, AdamW, a schedule, a shuffling loader with worker processes, all generators."""
    program = """
import torch
steps, stop = int(sys.argv[2]), int(sys.argv[3])
random.seed(stop), np.random.seed(stop), torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
torch.manual_seed(stop)
x, y = torch.arange(96.0).reshape(24, 4) / 96, torch.arange(24.0)[:, None] / 24
data = torch.utils.data.TensorDataset(x, y)
state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rng": ckptvcs.rng, "epoch": 0}
repo = ckptvcs.Repo.open(place)
got = repo.restore(state)
if got.step is None:
    random.seed(0), np.random.seed(0), torch.manual_seed(1)
step = got.step or 0
with Autosave(repo, state, every="1h", monitor="val_loss", mode="min", keep_last=2, keep_best=1) as save:
    say("BEGUN", got.step)
    while step < steps:
        # An epoch is a step here, so that the loader stands at its beginning when the state is saved.
        for x, y in torch.utils.data.DataLoader(data, batch_size=6, shuffle=True, num_workers=2):
            loss = ((model(x + 0.01 * torch.randn_like(x)) - y) ** 2).mean() * (1 + random.random())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        step += 1
        if step == stop and stop != steps:
            os.kill(os.getpid(), signal.SIGTERM)
        save.step(step, {"val_loss": loss})
say("DONE")
"""
    whole = place.parent / "whole"
    Repo.init(whole).close()
    uncut = Job(program, whole, 8, 8)
    status, errors = uncut.end()
    assert status == 0, errors
    for stop, expected in ((3, 143), (6, 143), (8, 0)):
        job = Job(program, place, 8, stop)
        status, errors = job.end()
        assert status == expected, errors
    with Repo.open(whole) as one, Repo.open(place) as other:
        assert one.resolve().step == other.resolve().step == 8
        assert one.resolve().tree == other.resolve().tree
        assert one.resolve("@best:val_loss").metrics == other.resolve("@best:val_loss").metrics
        assert np.isfinite(one.resolve("@best:val_loss").metrics["val_loss"])
