"""The trainer is killed at random moments while it saves in the background."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import ckptvcs
from ckptvcs import Repo
from tests.concurrency.processes import exact, state_of

ROOT = Path(ckptvcs.__file__).parent.parent

TRAINER = """
import sys
sys.path.insert(0, sys.argv[2])
import ckptvcs
from tests.concurrency.processes import state_of

repo = ckptvcs.Repo.open(sys.argv[1])
got = repo.restore({}, strict=False)
number = got.step + 1 if got else 0
while True:
    state = state_of("trainer", number)
    pending = repo.commit_async(state, step=number)
    print("begun", number, repo._opened.background._companion.number, flush=True)
    state["fresh"][:] = 0
    state["deep"].clear()
    if number % 3 == 0:
        print("made", number, pending.result().id, flush=True)
    number += 1
"""


def ends_soon(process: int) -> None:
    """Wait until there is no such process, or only its record."""
    deadline = time.monotonic() + 60
    while True:
        try:
            if Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX":
                return
        except FileNotFoundError:
            return
        assert time.monotonic() < deadline, "an orphan lives on"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_trainer_killed_at_any_moment(scratch: Path, covered: Callable[[str], None]) -> None:
    """What `commit_async` returned from is there in the end, bit for bit, and no writer lives on."""
    seed = random.SystemRandom().getrandbits(32)
    chance = random.Random(seed)
    Repo.init(scratch).close()
    begun, made, rounds = -1, 0, 12
    for _ in range(rounds):
        trainer = subprocess.Popen(
            [sys.executable, "-c", TRAINER, str(scratch), str(ROOT)], stdout=subprocess.PIPE, text=True
        )
        assert trainer.stdout is not None
        said = [trainer.stdout.readline()]
        time.sleep(chance.random() ** 2)
        trainer.kill()
        said += trainer.stdout.readlines()
        trainer.wait()
        trainer.stdout.close()
        words = [line.split() for line in said if line.endswith("\n")]
        for writer in {word[2] for word in words if word[0] == "begun"}:
            ends_soon(int(writer))
        with Repo.open(scratch) as repo:
            commits = {str(commit.id): commit for commit in repo.log("main")}
            steps = [commit.step for commit in commits.values()]
            begun = max([begun, *(int(word[1]) for word in words if word[0] == "begun")])
            assert steps == list(range(len(steps) - 1, -1, -1)), f"seed {seed}"
            assert len(steps) - 1 in (begun, begun + 1), f"seed {seed}: {said[-3:]}"
            for word in words:
                if word[0] == "made":
                    made += 1
                    assert commits[word[2]].step == int(word[1]), f"seed {seed}"
            begun = len(steps) - 1
            assert repo.fsck(full=True).ok, f"seed {seed}"
            assert repo.lost() == {}, f"seed {seed}"
            for commit in list(commits.values())[:4]:
                assert commit.step is not None
                exact(state_of("trainer", commit.step), repo.checkout(commit))
    covered(f"trainers: {rounds} kills, {begun + 1} commits, {made} of them acknowledged, seed {seed}")
    assert begun > 10
