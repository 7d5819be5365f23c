"""How long a large repository takes: `python -m benchmarks.scale --work DIR --out scale.json`.

Two repositories are made by real commits (`Repo.commit`, synced as always), one with a tenth of the commits
of the other. Each commit holds eleven tensors, ten of which are new to the repository and one is new every
tenth time. Each is a little larger than what a tree holds inline, so it is a chunk of its own: 100,000
commits have 1,010,000 chunks. They lie on main, on twenty branches that left it, and on one that is deleted
before the collection.

Every operation then runs in a process of its own: a verb of the command line, or a few lines of Python. Its
time is that of the whole process, interpreter included, and its memory the kernel's peak of what was
resident. What a process takes that only starts (`ckpt --version`) stands first in the table, and is taken off
before the growth of the times is told.

Results are written after each step. `--resume` goes on where a run stopped, within a repository too. With the
default of 100,000 commits it takes some quarter of an hour on two cores and 3 GB on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import machine
from ckptvcs import Repo

TENSORS: Final = 11
ELEMENTS: Final = 72
"""float32 numbers in a tensor: 288 bytes, where a tree holds 256 inline."""
BLOCK: Final = 100
"""Commits that one process of the build makes on one branch before it goes to the next."""
BRANCHES: Final = 20
DOOMED: Final = "given-up"
LIMIT: Final = 1800
"""Seconds after which an operation is given up."""


# -- making it ------------------------------------------------------------------------------------


def branch_of(block: int) -> str:
    """Seven blocks in ten on main, two on a branch that left it, one on a branch that will be deleted."""
    if block % 10 < 7:
        return "main"
    return DOOMED if block % 10 == 9 else f"run/{block // 10 % BRANCHES:02}"


def build(folder: Path, commits: int) -> dict[str, Any]:
    """Make the repository, or go on with one that is not complete. Facts are those of this call."""
    if not folder.exists():
        Repo.init(folder).close()
    started = time.perf_counter()
    took: list[float] = []
    with Repo.open(folder) as repo:
        at = 1 + max((commit.step or 0 for commit in map(repo.resolve, repo.branches())), default=-1)
        while at < commits:
            end = min(commits, at - at % BLOCK + BLOCK)
            took += _block(repo, at, end)
            at = end
            if at % (50 * BLOCK) == 0:
                print(f"    {at:,} of {commits:,} commits", flush=True)
    return {
        "made": len(took),
        "seconds": round(time.perf_counter() - started, 2),
        "first_commits_ms": _milliseconds(took[: 10 * BLOCK]),
        "last_commits_ms": _milliseconds(took[-10 * BLOCK :]),
    }


def _block(repo: Repo, start: int, end: int) -> list[float]:
    """Commits of the steps from `start` to `end` on one branch, as by a process that goes on from its tip."""
    branch = branch_of(start // BLOCK)
    branches = repo.branches()
    if branch not in branches and branches:
        repo.branch(branch, "main")
    took = []
    handle = repo.on(branch)
    try:
        state = {"layers": {str(i): np.zeros(ELEMENTS, np.float32) for i in range(TENSORS)}}
        handle.restore(state)
        for step in range(start, end):
            chance = np.random.default_rng(step)
            for name, tensor in state["layers"].items():
                if name != "0" or step % 10 == 0:
                    tensor += chance.standard_normal(ELEMENTS, dtype=np.float32)
            metrics = {"val_loss": 4 / (1 + step) + float(chance.standard_normal()) / 100}
            begun = time.perf_counter()
            handle.commit(state, f"step {step}", step=step, metrics=metrics)
            took.append(time.perf_counter() - begun)
    finally:
        handle.close()
    return took


def _milliseconds(took: list[float]) -> float | None:
    return round(1000 * statistics.median(took), 3) if took else None


# -- measuring it ---------------------------------------------------------------------------------

_OPEN: Final = "import ckptvcs; ckptvcs.Repo.open('.').close()"
_COMMIT: Final = """
import sys, numpy, ckptvcs
with ckptvcs.Repo.open('.') as repo:
    state = repo.checkout()
    repo.restore(state)
    state['layers']['1'] += 1
    repo.commit(state, 'one more', step=int(sys.argv[1]))
"""
_CKPT: Final = ("-m", "ckptvcs")

STEPS: Final[dict[str, tuple[str, ...]]] = {
    "start": (*_CKPT, "--version"),
    "open": ("-c", _OPEN),
    "commit": ("-c", _COMMIT, "{step}"),
    "log, first page": (*_CKPT, "log", "-n", "20"),
    "log, one line each": (*_CKPT, "log", "--oneline"),
    "log --graph --all, first page": (*_CKPT, "log", "--graph", "--all", "-n", "20"),
    "log --graph --all": (*_CKPT, "log", "--graph", "--all", "--oneline"),
    "status": (*_CKPT, "status"),
    "main@best:val_loss": (*_CKPT, "show", "main@best:val_loss"),
    "main~N/2": (*_CKPT, "show", "main~{half}"),
    "du": (*_CKPT, "du"),
    "fsck --quick": (*_CKPT, "fsck", "--quick"),
    "fsck": (*_CKPT, "fsck"),
    "gc --dry-run": (*_CKPT, "gc", "--grace", "0", "--dry-run"),
    "delete a branch": (*_CKPT, "branch", "-d", DOOMED, "--force"),
    "gc --dry-run of a tenth": (*_CKPT, "gc", "--grace", "0", "--dry-run"),
    "gc of a tenth": (*_CKPT, "gc", "--grace", "0"),
    "gc, nothing to do": (*_CKPT, "gc", "--grace", "0"),
    "commit after gc": ("-c", _COMMIT, "{step}"),
}
"""What is run, in this order: what a verb is not there for, or refuses, is told in the table."""


_WATCHED: Final = """
import atexit, runpy, sys
from pathlib import Path
peak, kind, what, *sys.argv[1:] = sys.argv[1:]
def tell():
    with open('/proc/self/status') as status:
        Path(peak).write_text(next(line.split()[1] for line in status if line.startswith('VmHWM')))
atexit.register(tell)
if kind == '-m':
    runpy.run_module(what, run_name='__main__', alter_sys=True)
else:
    exec(what)
"""
"""Runs a module or a text, and tells the process's peak at its end. (The kernel's `ru_maxrss` would count the
memory of the process that started it.)"""


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(folder: Path, arguments: tuple[str, ...], commits: int) -> dict[str, Any]:
    """Run Python with these arguments in the repository: seconds, peak memory, exit code."""
    filled = [each.replace("{step}", str(commits)).replace("{half}", str(commits // 4)) for each in arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "CKPT_AUTHOR": "scale"}
    log, peak = folder.parent / "output.txt", folder.parent / "peak.txt"
    peak.unlink(missing_ok=True)
    cpu = _cpu_seconds()
    with log.open("wb") as output:
        begun = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", _WATCHED, str(peak), *filled],
            cwd=folder,
            stdout=output,
            stderr=output,
            env=environment,
        )
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        seconds = time.perf_counter() - begun
    facts: dict[str, Any] = {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(_cpu_seconds() - cpu, 3),
        "peak_mb": round(int(peak.read_text()) / 1024, 1) if peak.exists() else None,
        "output_bytes": log.stat().st_size,
    }
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-2:]
        facts["failed"] = f"exit code {code}: {' '.join(last)[:200]}"
    return facts


def contents(folder: Path) -> dict[str, Any]:
    """Files and bytes of the repository, and what is in it."""
    root = folder / ".ckpt"
    files = [path for path in root.rglob("*") if path.is_file()]
    packs = [path for path in files if path.suffix == ".pack"]
    with Repo.open(folder) as repo, repo._store.snapshot() as snapshot:
        rows = int(snapshot._txn.stat()["entries"])
    return {
        "files": len(files),
        "packs": len(packs),
        "bytes": sum(path.stat().st_size for path in files),
        "bytes_on_disk": sum(path.stat().st_blocks * 512 for path in files),
        "pack_bytes": sum(path.stat().st_size for path in packs),
        "index_bytes": sum(path.stat().st_size for path in (root / "meta").iterdir()),
        "journal_bytes": (root / "refs.journal").stat().st_size,
        "index_entries": rows,
    }


# -- all of it ------------------------------------------------------------------------------------


def run(results: dict[str, Any], commits: int, work: Path, out: Path) -> None:
    """Whatever of one size is not in the results yet."""
    facts = results["sizes"].setdefault(str(commits), {"steps": {}})
    folder = work / str(commits)
    print(f"{commits:,} commits", flush=True)
    if "contents" not in facts:
        built = build(folder, commits)
        facts.setdefault("builds", []).append(built)
        facts["contents"] = contents(folder)
        _write(results, out)
        print(f"    built: {built}", flush=True)
    for name, arguments in STEPS.items():
        if name not in facts["steps"]:
            facts["steps"][name] = measure(folder, arguments, commits)
            _write(results, out)
            print(f"    {name}: {facts['steps'][name]}", flush=True)
    if "contents_after" not in facts:
        facts["contents_after"] = contents(folder)
        _write(results, out)


def table(results: dict[str, Any]) -> str:
    """Markdown: both sizes side by side, and how the time grew."""
    sizes = sorted(results["sizes"], key=int)
    small, large = (results["sizes"][size] for size in (sizes[0], sizes[-1]))
    ratio = int(sizes[-1]) // int(sizes[0])
    fewer, more = (f"{int(size):,} commits | peak MB" for size in (sizes[0], sizes[-1]))
    lines = [
        f"| operation | {fewer} | {more} | time grew (of {ratio}) |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    start = large["steps"]["start"]["seconds"]
    for name in STEPS:
        cells = []
        for each in (small["steps"][name], large["steps"][name]):
            failed = each.get("failed")
            cells += (
                ["refused", ""] if failed else [f"{each['seconds']:.2f} s", f"{each['peak_mb'] or 0:.0f}"]
            )
        first, second = (max(0.0, each["steps"][name]["seconds"] - start) for each in (small, large))
        whole = first > start / 10 and "refused" not in cells
        growth = f"{second / first:.1f}" if whole else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {growth} |")
    lines += ["", f"| | {int(sizes[0]):,} commits | after gc | {int(sizes[-1]):,} commits | after gc |"]
    lines.append("|---|--:|--:|--:|--:|")
    for name in large["contents"]:
        counts = [each[when][name] for each in (small, large) for when in ("contents", "contents_after")]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(f'{count:,}' for count in counts)} |")
    lines.append("")
    for size in sizes:
        for built in results["sizes"][size]["builds"]:
            lines.append(f"{int(size):,} commits were built so: {built}")
    return "\n".join(lines)


def _write(results: dict[str, Any], out: Path) -> None:
    new = out.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    new.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder for both repositories")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commits", type=int, default=100_000)
    parser.add_argument(
        "--resume", action="store_true", help="keep the results and repositories that are there"
    )
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine.facts(), "sizes": {}}
    if options.resume and options.out.exists():
        results["sizes"] = json.loads(options.out.read_text())["sizes"]
    for commits in (options.commits // 10, options.commits):
        if not options.resume:
            shutil.rmtree(options.work / str(commits), ignore_errors=True)
    options.work.mkdir(parents=True, exist_ok=True)
    for commits in (options.commits // 10, options.commits):
        run(results, commits, options.work.resolve(), options.out)
    print(table(results))


if __name__ == "__main__":
    main()
