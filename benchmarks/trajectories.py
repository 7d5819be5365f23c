"""Training runs to measure on: `python -m benchmarks.trajectories --dir DIR [--only NAME...] [--saves 12]`.

Each workload fills DIR/NAME with one `torch.save` file per save and, when it is complete, `about.json`.
Complete workloads are left alone. Everything follows from seeds, up to the rounding of the machine's kernels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads import embedding, finetune, frozen, lora, scratch, trajectory

# In the order in which they are made: forks starts from finetune_fp32.
WORKLOADS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "finetune_fp32": finetune.fp32,
    "finetune_bf16": finetune.bf16,
    "scratch": finetune.scratch,
    "scratch_dense": scratch.scratch,
    "embedding": embedding.with_moments,
    "embedding_sgd": embedding.plain,
    "ema": finetune.ema,
    "forks": finetune.forks,
    "frozen": frozen.frozen,
    "lora": lora.lora,
    "intervals": finetune.intervals,
}


def make(folder: Path, names: list[str], saves: int) -> None:
    for name in names:
        home = folder / name
        done = trajectory.about(home)
        if done and done["saves"] >= saves:
            print(f"{name}: complete")
            continue
        torch.manual_seed(0)
        started = time.perf_counter()
        facts = WORKLOADS[name](home, saves)
        facts |= {"name": name, "saves": saves, "seconds": round(time.perf_counter() - started)}
        facts |= {"torch": torch.__version__}
        trajectory.write_about(home, facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="where the runs go, some 25 GB")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME")
    parser.add_argument(
        "--saves", type=int, default=12, help="saves per run (intervals and forks have their own)"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    make(options.dir, [name for name in WORKLOADS if name in options.only], options.saves)


if __name__ == "__main__":
    main()
