"""Codecs alone, on one core: GB/s of raw bytes, beside a copy of memory and the hash in the same run.

`python -m benchmarks.codecs --out results.json` adds them to the results. Weights are synthetic: normal
numbers, as dense layers have.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from ckptvcs.store import difference, planes

_MIB = 1 << 20


def speeds(words: Any, base: Any, rotated: bool, repeats: int) -> dict[str, Any]:
    """Median GB/s of each operation on 1 MiB, the operations taking turns."""
    out = np.empty_like(words)
    into = out.view(np.uint8).data
    plain = planes.encode(words, rotated)
    changed = difference.encode(words, base)

    def decode_difference() -> None:
        np.copyto(out, base)
        difference.decode_frame(changed, into, words.itemsize, into)

    actions: dict[str, Callable[[], Any]] = {
        "copy": lambda: np.copyto(out, words),
        "hash": lambda: blake3(words.view(np.uint8)).digest(),
        "planes_encode": lambda: planes.encode(words, rotated),
        "planes_decode": lambda: planes.decode(plain, out),
        "difference_encode": lambda: difference.encode(words, base),
        "difference_decode": decode_difference,
    }
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - started)
    assert (out == words).all()
    found: dict[str, Any] = {
        name: words.nbytes / statistics.median(times) / 1e9 for name, times in seconds.items()
    }
    return found | {"planes_left": len(plain) / words.nbytes, "difference_left": len(changed) / words.nbytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="results to add to")
    parser.add_argument("--repeats", type=int, default=400)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    values = (generator.standard_normal(_MIB // 2) * 0.05).astype("<f4")
    moved = values + (generator.standard_normal(_MIB // 2) * 1e-5).astype("<f4")
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    results["codecs"] = {
        "bf16": speeds(_upper(moved), _upper(values), True, options.repeats),
        "fp32": speeds(
            moved.view("<u4")[: _MIB // 4], values.view("<u4")[: _MIB // 4], False, options.repeats
        ),
    }
    print(json.dumps(results["codecs"], indent=1))
    options.out.write_text(json.dumps(results, indent=1) + "\n")


def _upper(values: Any) -> Any:
    """float32 cut to bfloat16, as words."""
    return (values.view("<u4") >> 16).astype("<u2")


if __name__ == "__main__":
    main()
