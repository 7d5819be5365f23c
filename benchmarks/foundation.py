"""Figures on the foundation: `python benchmarks/foundation.py [--dir DIR]`.

Ratios come from paired runs in one process.

- an unchanged state committed again, against one BLAKE3 pass over the same bytes on as many threads
- growth of the whole repository by that commit
- latency of a durable commit of a 100 KB state
- bytes added when one counter changes among 1,000 and 100,000 tensors
- import time against numpy's, and of `ckpt --version`
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

import ckptvcs


def seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def folder_bytes(folder: Path) -> int:
    """Apparent bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def unchanged(folder: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    """Commit a state once, then again and again, each time beside a bare hash of its bytes."""
    generator = np.random.default_rng(0)
    tensors = 16
    state = {
        "model": {
            f"layer{i}": generator.standard_normal((megabytes << 18) // tensors, dtype=np.float32)
            for i in range(tensors)
        },
        "step": 0,
    }
    given = sum(array.nbytes for array in state["model"].values())
    with ckptvcs.Repo.init(folder) as repo:
        threads = repo._store.threads
        views = [memoryview(array).cast("B") for array in state["model"].values()]
        parts = [view[at : at + (1 << 20)] for view in views for at in range(0, len(view), 1 << 20)]

        def hash_all(pool: ThreadPoolExecutor) -> None:
            for _ in pool.map(lambda part: blake3(part).digest(), parts, chunksize=16):
                pass

        def hash_whole(pool: ThreadPoolExecutor) -> None:
            for view in views:
                blake3(view, max_threads=threads).digest()

        repo.commit(state, "first")
        ratios, hashes, commits, growth = [], [], [], []
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(repeats):
                before = folder_bytes(folder)
                hashed = min(seconds(lambda: hash_all(pool)), seconds(lambda: hash_whole(pool)))
                committed = seconds(lambda: repo.commit(state, "again"))
                growth.append(folder_bytes(folder) - before)
                ratios.append(committed / hashed)
                hashes.append(hashed)
                commits.append(committed)
    return {
        "state_bytes": given,
        "threads": threads,
        "hash_seconds_median": statistics.median(hashes),
        "commit_seconds_median": statistics.median(commits),
        "ratio_median": statistics.median(ratios),
        "growth_bytes_median": statistics.median(growth),
        "growth_bytes_max": max(growth),
    }


def small_commits(folder: Path, repeats: int) -> dict[str, Any]:
    """A 100 KB state whose every byte changes between durable commits."""
    generator = np.random.default_rng(0)
    times = []
    with ckptvcs.Repo.init(folder) as repo:
        for step in range(repeats):
            state = {"w": generator.standard_normal(25_600, dtype=np.float32), "step": step}
            times.append(seconds(lambda state=state: repo.commit(state, step=state["step"])))
    return {"median_ms": statistics.median(times) * 1e3, "p95_ms": sorted(times)[int(repeats * 0.95)] * 1e3}


def counters(folder: Path, tensors: int) -> dict[str, Any]:
    """One counter changes in a flat dict of many small tensors."""
    state: dict[str, Any] = {f"layer{i}.weight": np.full(100, i, np.float32) for i in range(tensors)}
    state["counter"] = 0
    with ckptvcs.Repo.init(folder) as repo:
        first = seconds(lambda: repo.commit(state, "first"))
        before = folder_bytes(folder / ".ckpt" / "packs")
        state["counter"] = 1
        later = seconds(lambda: repo.commit(state, "counter"))
        added = folder_bytes(folder / ".ckpt" / "packs") - before
    return {"tensors": tensors, "added_bytes": added, "first_seconds": first, "later_seconds": later}


def imports(repeats: int) -> dict[str, Any]:
    """Start of a bare interpreter taken off both sides."""

    def run(*arguments: str) -> float:
        return seconds(lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True))

    rounds = [
        (
            run("-c", "pass"),
            run("-c", "import numpy"),
            run("-c", "import ckptvcs; ckptvcs.Repo"),
            run("-m", "ckptvcs", "--version"),
        )
        for _ in range(repeats)
    ]
    bare, numpy_time, ours, version = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "numpy_seconds": numpy_time - bare,
        "ckptvcs_with_repo_seconds": ours - bare,
        "ratio": (ours - bare) / (numpy_time - bare),
        "version_seconds": version,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, help="where repositories are made; default: a temporary folder")
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        place = Path(name)
        results = {
            "imports": imports(arguments.repeats),
            "small_commits": small_commits(place / "small", 100),
            "counters": [counters(place / f"counters{n}", n) for n in (1_000, 100_000)],
            "unchanged": unchanged(place / "unchanged", arguments.megabytes, arguments.repeats),
        }
    json.dump(results, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
