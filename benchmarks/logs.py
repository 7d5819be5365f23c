"""Histories of many commits and branches: what the first page of a log costs, and what memory.

    python -m benchmarks.logs [--commits 100000] [--branches 50] [--dir DIR]

Commits are made without content, many in one publication, so that the repository is there in a minute. Each
command runs as a process of its own; its time, its peak memory and its lines are printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ckptvcs import ObjectId, Repo
from ckptvcs.disk import scratch_folder
from ckptvcs.history.commit import encode_commit
from ckptvcs.ids import Kind
from ckptvcs.store import Move, Publication

_BATCH = 5000


def build(folder: Path, commits: int, branches: int) -> None:
    """A warm-up of a fifth of the commits on main; the rest on branches that part from its last thousand."""
    with Repo.init(folder) as repo:
        tree = repo.commit({"w": 0}, "seed").tree
        shared = commits // 5
        main = _line(repo, "main", repo.resolve("main").id, tree, shared, 0)
        each = (commits - shared) // branches
        for n in range(branches):
            fork = main[-1 - (n * 997) % min(1000, len(main))]
            _line(repo, f"sweep/{n:02}", fork, tree, each, n + 1)


def _line(repo: Repo, branch: str, start: ObjectId, tree: ObjectId, count: int, seed: int) -> list[ObjectId]:
    made: list[ObjectId] = []
    parent, ref = start, f"refs/heads/{branch}"
    environment = {"python": "3.12.1", "torch": "2.8.0", "host": "node17", "command": ["train.py"] * 8}
    for first in range(0, count, _BATCH):
        old = repo.branches().get(branch)
        with repo._store.writer() as writer:
            for step in range(first, min(count, first + _BATCH)):
                payload = encode_commit(
                    tree=tree, parents=(parent,), origin=parent, author="bench@host", time=step,
                    message=f"step {step}", step=step, epoch=None,
                    metrics={"val_loss": 1 / (step + 1 + seed), "acc": 0.5}, config={"lr": seed},
                    overrides={}, environment=environment, sizes={"w": 4},
                )  # fmt: skip
                (parent,) = writer.put_objects(Kind.COMMIT, [payload])
                made.append(parent)
            move = Move(ref, old, parent)
            assert writer.publish(Publication(parent, (move,), move, (), 0, "bench", "bench"))
    return made


def measure(folder: Path, arguments: Sequence[str]) -> tuple[float, float, int]:
    """Seconds, peak MB and lines of one command, its output thrown away."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "ckptvcs", *arguments]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines = sum(1 for _ in process.stdout)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, arguments
    return time.perf_counter() - start, usage.ru_maxrss / 1024, lines


COMMANDS: tuple[tuple[str, ...], ...] = (
    ("--version",),
    ("log", "-n", "20"),
    ("log", "--graph", "--all", "-n", "20"),
    ("log", "--graph", "--all", "-n", "1000", "--oneline"),
    ("log", "main..sweep/07", "-n", "20"),
    ("log", "--branches", "sweep/*", "--metric", "val_loss<0.01", "-n", "20"),
    ("log", "main@step:10", "-n", "1"),
    ("compare", "sweep/03", "sweep/04"),
    ("best", "val_loss"),
    ("log", "--graph", "--all", "--oneline"),
)


def main() -> None:
    """Build, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--commits", type=int, default=100_000)
    parser.add_argument("--branches", type=int, default=50)
    parser.add_argument("--dir", type=Path, help="keep the repository here, and use it again")
    given = parser.parse_args()
    with scratch_folder(None) as scratch:
        folder = given.dir or scratch / "repo"
        if not (folder / ".ckpt").exists():
            start = time.perf_counter()
            build(folder, given.commits, given.branches)
            print(f"built in {time.perf_counter() - start:.0f} s")
        print(f"{'seconds':>8} {'peak MB':>8} {'lines':>8}  command")
        for arguments in COMMANDS:
            seconds, memory, lines = measure(folder, arguments)
            print(f"{seconds:8.2f} {memory:8.0f} {lines:8,}  ckpt {' '.join(arguments)}")


if __name__ == "__main__":
    main()
