"""Figures on diff and merge: `python -m benchmarks.comparing [--megabytes N] [--dir DIR] [--json FILE]`.

- diff of two states that differ in one layer: bytes read from packs and seconds, against reading both states
  into memory and comparing them there; and the same for two states that differ everywhere
- merge of two states: peak memory above a merge of small ones, and seconds, against reading both, averaging
  them in memory and committing that

All seconds are of one run on one machine, in turn, the median of several. Each merge runs in a process of its
own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import ckptvcs
from benchmarks import clocks

LAYERS = 64


def state_of(megabytes: int, seed: int) -> dict[str, Any]:
    """Layers of float32 that look trained, and a step."""
    rng = np.random.default_rng(seed)
    count = (megabytes << 18) // LAYERS
    layers = {f"layers.{n}.weight": rng.standard_normal(count, np.float32) for n in range(LAYERS)}
    return {"model": layers, "step": seed}


def read_both(repo: ckptvcs.Repo, one: str, other: str) -> dict[str, float]:
    """What diff says, from whole states in memory."""
    old, new = repo.checkout(one)["model"], repo.checkout(other)["model"]
    found = {}
    for name, before in old.items():
        if not np.array_equal(before.view(np.uint32), new[name].view(np.uint32)):
            a, b = before.astype(np.float64), new[name].astype(np.float64)
            found[name] = float(np.linalg.norm(b - a) / np.linalg.norm(a))
    return found


def diffs(folder: Path, megabytes: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each pair of commits."""
    clock = clocks.Clock(folder, min(256, megabytes))  # a larger file would push the packs out of memory
    rows = []
    with ckptvcs.Repo.init(folder / "diff", compression="balanced") as repo:
        state = state_of(megabytes, 1)
        repo.commit(state, tags=["base"])
        name = f"layers.{LAYERS // 2}.weight"
        state["model"] = {**state["model"], name: state["model"][name] * np.float32(1.001)}
        repo.commit(state, tags=["one-layer"])
        repo.commit(state_of(megabytes, 2), tags=["everything"])
        for other in ("one-layer", "everything"):
            ours, theirs = [], []
            read_both(repo, "base", other)  # neither side shall pay for a cold disk
            for _ in range(repeats):
                seconds, found = clock.seconds(lambda other=other: repo.diff("base", other))
                ours.append(seconds)
                seconds, wanted = clock.seconds(lambda other=other: read_both(repo, "base", other))
                theirs.append(seconds)
            distances = {
                change.path.removeprefix("model/"): change.distance.relative
                for change in found.comparison.changes
                if change.distance is not None
            }
            assert distances.keys() == wanted.keys()
            assert all(abs(distances[name] / wanted[name] - 1) < 1e-9 for name in wanted)
            rows.append(
                {
                    "what": other,
                    "held": found.held,
                    "read": found.read,
                    "changed": len(distances),
                    "seconds": statistics.median(ours),
                    "reading_both": statistics.median(theirs),
                }
            )
    return rows


def merges(folder: Path, megabytes: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each strategy."""
    with ckptvcs.Repo.init(folder / "merge", compression="fast") as repo:
        for name, seed in (("one", 1), ("other", 2)):
            repo.on(name).commit(state_of(megabytes, seed)["model"])
            repo.on(f"small-{name}").commit({"w": np.full(300_000, seed, np.float32)})
    rows = []
    for strategy in ("mean", "slerp"):
        runs = [_merge(folder / "merge", strategy, number) for number in range(repeats)]
        rows.append(
            {"what": strategy, "held": 2 * megabytes << 20}
            | {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        )
    return rows


def _merge(folder: Path, strategy: str, number: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", _MERGE, str(folder), strategy, str(number)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


_MERGE = """
import json, sys, time
import numpy as np
from benchmarks import clocks
from ckptvcs import Repo
with Repo.open(sys.argv[1]) as repo:
    name = "-".join(sys.argv[2:])
    repo.on("small-" + name).merge("small-one", "small-other", strategy=sys.argv[2])
    started = time.perf_counter()
    peak = clocks.peak_bytes(lambda: repo.on(name).merge("one", "other", strategy=sys.argv[2]))
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    one, other = repo.checkout("one"), repo.checkout("other")
    made = {k: ((one[k].astype(np.float64) + other[k]) / 2).astype(np.float32) for k in one}
    repo.on("memory-" + name).commit(made)
    print(json.dumps({"peak": peak or 0, "seconds": seconds, "in_memory": time.perf_counter() - started}))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024, help="bytes of each state, in MiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where the repositories are made; else a temporary folder")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        rows = {
            "diff": diffs(Path(folder), given.megabytes, given.repeats),
            "merge": merges(Path(folder), given.megabytes, given.repeats),
        }
    for row in rows["diff"]:
        print(
            f"diff {row['what']}: {row['changed']} tensors, read {row['read'] / 1e6:.1f} of "
            f"{row['held'] / 1e6:.1f} MB ({row['read'] / row['held']:.4f}), {row['seconds']:.3f} s, "
            f"{row['seconds'] / row['reading_both']:.4f} of reading both ({row['reading_both']:.3f} s)"
        )
    for row in rows["merge"]:
        print(
            f"merge {row['what']}: peak {row['peak'] / 2**20:.0f} MiB for {row['held'] / 1e6:.1f} MB, "
            f"{row['seconds']:.2f} s, {row['seconds'] / row['in_memory']:.2f} of a mean in memory"
        )
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
