"""What the size of a grid cell costs and saves: `python benchmarks/grid.py`. Decision 2 quotes it.

For each size: bytes stored when rows of a 51 MB embedding table are touched by a Zipf law, and the medians of
committing 268 MB unchanged, committing them wholly changed, and checking them out.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import ckptvcs
from ckptvcs.store import format as layout

SIZES_KIB = (256, 512, 1024, 2048, 4096)


def seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measured(chunk: int, folder: Path) -> dict[str, float]:
    """Figures with cells of `chunk` bytes."""
    layout.GRIDS[1] = dataclasses.replace(layout.GRIDS[1], chunk=chunk)
    generator = np.random.default_rng(0)
    table = generator.standard_normal((200_000, 64), dtype=np.float32)
    dense = [generator.standard_normal(4 << 20, dtype=np.float32) for _ in range(16)]
    with ckptvcs.Repo.init(folder) as repo:
        repo.commit({"table": table})
        stored = []
        for _ in range(5):
            rows = np.unique(np.minimum(generator.zipf(1.3, 2000) - 1, len(table) - 1))
            table[rows] += 1e-3
            report = repo.commit({"table": table}).report
            stored.append(report.stored if report else 0)
        handle = repo.on("dense")
        handle.commit({"w": dense})
        unchanged = [seconds(lambda: handle.commit({"w": dense})) for _ in range(5)]
        changed = []
        for _ in range(3):
            for array in dense:
                array += 1e-3
            changed.append(seconds(lambda: handle.commit({"w": dense})))
        checkout = [seconds(lambda: handle.checkout("dense")) for _ in range(5)]
    return {
        "kib": chunk >> 10,
        "zipf_rows_stored_mb": statistics.median(stored) / 1e6,
        "unchanged_ms": statistics.median(unchanged) * 1e3,
        "changed_s": statistics.median(changed),
        "checkout_s": statistics.median(checkout),
    }


def main() -> None:
    logging.getLogger("ckptvcs").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as place:
        for kib in SIZES_KIB:
            json.dump(measured(kib << 10, Path(place) / str(kib)), sys.stdout)
            sys.stdout.write("\n")


if __name__ == "__main__":
    main()
