"""A StatefulDataLoader with workers, stopped in the middle of an epoch and resumed in another process.

The sampler and the data set are those of docs/resume.md, word for word.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ckptvcs import Repo
from ckptvcs.testing.same import difference
from tests.docs import pages

PAGE = pages.ROOT / "docs" / "resume.md"
SEED = 4
STEPS = 16
EPOCH = 6

pytestmark = pytest.mark.slow


def write_programs(folder: Path) -> None:
    """The programs of the page; the third way to load is the page's last one."""
    for block in pages.blocks(PAGE):
        name = block.text.partition("\n")[0].removeprefix("# ")
        if block.language in ("python", "text") and name in (
            "replay.py",
            "seeded.py",
            "stateful.py",
            "train.py",
        ):
            text = block.text.replace('choices=["replay", "seeded"]', 'choices=["stateful"]')
            (folder / name).write_text(text)
    assert len(list(folder.glob("*.py"))) == 4


def train(folder: Path, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "train.py", "--loader", "stateful", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(pages.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_resumed_in_another_process(folder: Path) -> None:
    seed = random.Random(SEED)
    stops = [(seed.randrange(1, EPOCH),), (EPOCH, seed.randrange(2 * EPOCH + 1, STEPS))]
    print(f"seed {SEED}: stops {stops}")
    write_programs(folder)
    train(folder, "--branch", "whole", "--steps", STEPS)
    for number, places in enumerate(stops):
        for seed_of_process, steps in enumerate((*places, STEPS)):
            train(folder, "--branch", number, "--steps", steps, "--seed", seed_of_process)
    with Repo.open(folder / "runs") as repo:
        whole = repo.checkout("whole")
        for number in range(len(stops)):
            parts = repo.checkout(str(number))
            # The loader's own bookkeeping differs: it says how each worker got where it is.
            for name in ("progress", "model", "optimizer", "schedule", "rng"):
                assert difference(whole[name], parts[name]) is None, f"stops {stops[number]}: {name}"
