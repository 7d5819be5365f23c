"""Figures on saves in the background: `python -m benchmarks.background [--megabytes N] [--dir DIR]`.

All are ratios of things measured in turn in one run, so that what else the machine does meets both sides.

- how long `commit_async` blocks, against one copy of as many bytes into warm memory; from the second save on
- how much slower a loop runs while a save is in flight: one of pure Python, and one that trains a little on
  what as many busy data-loader workers as there are CPUs bring
- extra memory: the shared copy, and what the writer process has for itself
- what `frozen=` saves when nothing changed
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

import ckptvcs
from ckptvcs.disk import usable_cpus

TENSORS = 300
WINDOW = 0.25
"""Seconds over which a loop's pace is taken."""


def state_of(megabytes: int) -> dict[str, Any]:
    """Some hundred tensors that look trained."""
    return {f"layer{i}": torch.randn((megabytes << 18) // TENSORS) for i in range(TENSORS)}


def trained(state: dict[str, Any]) -> None:
    """Every number changes a little, as by a step."""
    for tensor in state.values():
        tensor.mul_(1.0001)


def writer_of(repo: ckptvcs.Repo) -> int:
    """The process id of the writer."""
    background = repo._opened.background
    assert background is not None
    assert background._companion is not None
    return background._companion.number


# -- blocking -------------------------------------------------------------------------------------


def blocking(folder: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    """Seconds blocked by a save, over seconds of one copy, one after the other."""
    state = state_of(megabytes)
    given = sum(tensor.nbytes for tensor in state.values())
    source, warm = np.ones(given, np.uint8), np.zeros(given, np.uint8)

    def copy() -> float:
        started = time.perf_counter()
        np.copyto(warm, source)
        return time.perf_counter() - started

    copy()
    ratios, frozen, copies, first = [], [], [], 0.0
    with ckptvcs.Repo.init(folder, compression="fast") as repo:
        for number in range(repeats + 1):
            trained(state)
            copied = min(copy(), copy())
            pending = repo.commit_async(state, step=number)
            pending.result()
            copies.append(copied)
            if number:
                ratios.append(pending.blocked / copied)
            else:
                first = pending.blocked
        for number in range(3):
            pending = repo.commit_async(state, frozen="**")
            pending.result()
            if number:
                frozen.append(pending.blocked)
    return {
        "state_bytes": given,
        "copy_seconds_median": statistics.median(copies),
        "first_save_blocked_seconds": first,
        "blocked_over_copy_median": statistics.median(ratios),
        "blocked_over_copy_max": max(ratios),
        "blocked_seconds_all_frozen": min(frozen),
    }


# -- slowdown -------------------------------------------------------------------------------------


def pace(step: Callable[[], None]) -> float:
    """Steps per second over one window."""
    started = time.perf_counter()
    steps = 0
    while (passed := time.perf_counter() - started) < WINDOW:
        step()
        steps += 1
    return steps / passed


def slowdown(folder: Path, megabytes: int, repeats: int, step: Callable[[], None]) -> dict[str, Any]:
    """Time per step beside a working writer over time per step beside one that is stopped, minus 1.

    Within each save the writer works and is stopped in turn, so that the two sides of a pair are as near
    in time as can be.
    """
    state = state_of(megabytes)
    ratios, working = [], 0.0
    with ckptvcs.Repo.init(folder) as repo:
        repo.commit_async(state).result()
        writer = writer_of(repo)
        for number in range(repeats):
            trained(state)
            pending = repo.commit_async(state, step=number)
            while not pending.done():
                beside = pace(step)
                if pending.done():
                    break
                working += WINDOW
                os.kill(writer, signal.SIGSTOP)
                alone = pace(step)
                os.kill(writer, signal.SIGCONT)
                ratios.append(alone / beside)
            pending.result()
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "slowdown_median": middle - 1,
        "slowdown_quartiles": [low - 1, high - 1],
        "pairs": len(ratios),
        "seconds_of_work_per_save": working / repeats,
    }


def python_step() -> None:
    """A training loop whose time goes into Python."""
    total = {}
    for i in range(2000):
        total[i % 17] = total.get(i % 13, 0) + i


class Rows(torch.utils.data.Dataset[Any]):
    """Rows that take a worker some work."""

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> Any:
        values = np.random.default_rng(index).standard_normal(20_000)
        return torch.from_numpy(np.sort(values)[:256].astype(np.float32))


def loader_step() -> Callable[[], None]:
    """A step on a batch from as many workers as there are CPUs, which never have a pause."""
    loader = torch.utils.data.DataLoader(Rows(), batch_size=8, num_workers=usable_cpus(), prefetch_factor=4)
    batches: Iterator[Any] = iter(loader)
    model = torch.nn.Linear(256, 256)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        model(next(batches)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# -- memory ---------------------------------------------------------------------------------------


class Watch:
    """The most private and shared memory of a process during the block, in bytes, sampled."""

    def __init__(self, process: int) -> None:
        self.private = self.shared = 0
        self._status = Path(f"/proc/{process}/status")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            found = dict(line.split(":", 1) for line in self._status.read_text().splitlines())
            self.private = max(self.private, int(found["RssAnon"].split()[0]) << 10)
            self.shared = max(self.shared, int(found["RssShmem"].split()[0]) << 10)


def memory(folder: Path, megabytes: int) -> dict[str, Any]:
    """What a save adds: shared memory, the writer's own, and the trainer's own beyond what it had."""
    state = state_of(megabytes)
    given = sum(tensor.nbytes for tensor in state.values())
    with ckptvcs.Repo.init(folder) as repo:
        repo.commit_async({"n": 0}).result()
        with Watch(writer_of(repo)) as writer, Watch(os.getpid()) as trainer:
            time.sleep(0.05)
            before = trainer.private
            for number in range(3):
                trained(state)
                repo.commit_async(state, step=number)
    return {
        "state_bytes": given,
        "shared_bytes": max(writer.shared, trainer.shared),
        "writer_private_bytes": writer.private,
        "trainer_private_bytes": trainer.private - before,
        "threads": usable_cpus(),
    }


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=None, help="where the repositories are made")
    chosen = parser.parse_args()
    megabytes, repeats = chosen.megabytes, chosen.repeats
    with tempfile.TemporaryDirectory(dir=chosen.dir) as place:
        folder = Path(place)
        found = {
            "cpus": usable_cpus(),
            "blocking": blocking(folder / "blocking", megabytes, repeats),
            "python_loop": slowdown(folder / "python", megabytes // 2, repeats, python_step),
            "loader_loop": slowdown(folder / "loader", megabytes // 8, repeats, loader_step()),
            "memory": memory(folder / "memory", megabytes // 4),
        }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
