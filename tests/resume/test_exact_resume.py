"""A run that is stopped and goes on in another process ends as the run that was never stopped.

The programs are those of docs/resume.md, word for word.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ckptvcs import Repo
from tests.docs import pages

PAGE = pages.ROOT / "docs" / "resume.md"
EPOCH = 6
"""Batches in an epoch: 90 samples, 16 at a time; the last one is short."""
STEPS = 3 * EPOCH - 2
SEED = 20261124

pytestmark = pytest.mark.slow


def write_programs(folder: Path) -> None:
    for block in pages.blocks(PAGE):
        name = block.text.partition("\n")[0].removeprefix("# ")
        if block.language == "python" and name in ("replay.py", "seeded.py", "train.py"):
            (folder / name).write_text(block.text)
    assert len(list(folder.glob("*.py"))) == 3


def train(folder: Path, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "train.py", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(pages.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("loader", ["replay", "seeded"])
def test_stopped_and_resumed_runs_end_alike(folder: Path, loader: str) -> None:
    seed = random.Random(f"{SEED} {loader}")
    # In the middle of an epoch, behind its last batch and behind its first; then at two places at once.
    stops = [
        (seed.randrange(2, EPOCH),),
        (EPOCH,),
        (EPOCH + 1,),
        (seed.randrange(2, 9), seed.randrange(9, 16)),
    ]
    print(f"seed {SEED}: stops {stops}")
    write_programs(folder)
    train(folder, "--loader", loader, "--branch", "whole", "--steps", STEPS)
    for number, places in enumerate(stops):
        for seed_of_process, steps in enumerate((*places, STEPS)):
            train(folder, "--loader", loader, "--branch", number, "--steps", steps, "--seed", seed_of_process)
    with Repo.open(folder / "runs") as repo:
        whole = repo.resolve("whole")
        final = repo.checkout(whole)
        assert len(final["progress"]["losses"]) == STEPS
        assert len(set(final["progress"]["losses"])) == STEPS
        for number, places in enumerate(stops):
            assert repo.resolve(f"{number}~1").step == places[-1]
            for path, loss in enumerate(repo.checkout(str(number))["progress"]["losses"]):
                assert loss == final["progress"]["losses"][path], f"stops {places}: step {path + 1}"
            # Weights, moments, schedule, position and all generators.
            assert repo.resolve(str(number)).tree == whole.tree, f"stops {places}"


def test_without_the_generators_it_would_end_differently(folder: Path) -> None:
    """The test above could notice."""
    write_programs(folder)
    program = folder / "train.py"
    program.write_text(program.read_text().replace('    "rng": ckptvcs.rng,\n', ""))
    train(folder, "--branch", "whole", "--steps", 8)
    train(folder, "--branch", "parts", "--steps", 3)
    train(folder, "--branch", "parts", "--steps", 8, "--seed", 1)
    with Repo.open(folder / "runs") as repo:
        assert repo.resolve("whole").tree != repo.resolve("parts").tree
