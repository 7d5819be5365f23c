"""How deep chains of differences may grow: size, commit and restore at depths 0, 1, 2, 4, 8.

`python -m benchmarks.depths --trajectories DIR --work DIR --out results.json` adds them to the results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch

import ckptvcs
from benchmarks import clocks, states
from benchmarks.workloads import trajectory
from ckptvcs.store import choice

DEPTHS = (0, 1, 2, 4, 8)


def study(files: list[Path], work: Path, scratch_mb: int) -> list[dict[str, Any]]:
    """One row per depth. The level is `balanced` but for its depth; times are medians of paired ratios to
    `torch.save` with fsync and `torch.load`."""
    clock = clocks.Clock(work, scratch_mb)
    usual = choice.LEVELS["balanced"]
    rows = []
    try:
        for depth in DEPTHS:
            choice.LEVELS["balanced"] = usual._replace(depth=depth)
            rows.append({"depth": depth} | _run(files, work, clock))
    finally:
        choice.LEVELS["balanced"] = usual
    return rows


def _run(files: list[Path], work: Path, clock: clocks.Clock) -> dict[str, Any]:
    folder = work / "repository"
    shutil.rmtree(folder, ignore_errors=True)
    reference = work / "reference.pt"
    commits, saves, loads = [], [], []
    stored = given = 0
    with ckptvcs.Repo.init(folder, compression="balanced") as repo:
        for file in files:
            state = trajectory.load(file)
            other, _ = clock.seconds(lambda state=state: _save(state, reference))
            seconds, commit = clock.seconds(lambda state=state: repo.commit(state))
            saves.append(seconds / other)
            commits.append(commit)
            stored, given = stored + commit.report.stored, given + commit.report.given
        for commit, file in zip(commits, files, strict=True):
            # What was loaded is let go before the next clock: neither shall pay for a larger process.
            other = clock.seconds(lambda: torch.load(reference, weights_only=False))[0]
            seconds, back = clock.seconds(lambda commit=commit: repo.checkout(commit))
            loads.append(seconds / other)
            different = states.difference(trajectory.load(file), back)
            if different is not None:
                raise SystemExit(f"{file}: {different}")
            del back
    shutil.rmtree(folder)
    return {
        "stored": stored / given,
        "commit": statistics.median(saves[1:]),
        "restore": statistics.median(loads),
        "worst": max(loads),
    }


def _save(state: Any, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trajectories", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="results to add to")
    parser.add_argument("--series", nargs="+", default=["finetune_fp32", "finetune_bf16"])
    parser.add_argument("--saves", type=int, default=12)
    parser.add_argument("--scratch-mb", type=int, default=900)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.series:
        files = trajectory.saves_in(options.trajectories / name)[: options.saves]
        rows = study(files, options.work, options.scratch_mb)
        results.setdefault("depths", {})[name] = {"saves": len(files), "rows": rows}
        for row in rows:
            print(name, {key: round(value, 3) for key, value in row.items()}, flush=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
