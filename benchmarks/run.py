"""All measurements: `python -m benchmarks.run --trajectories DIR --work DIR --out results.json`.

Every tool and series is a job in a process of its own. Results are written after each job, and `--resume`
goes on with the jobs that are missing. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import machine, series
from benchmarks.rivals import ALL

KINDS = ("times", "memory", "components")
LIMIT = 3600
"""Seconds after which a job is given up."""


def jobs(options: argparse.Namespace, chosen: dict[str, series.Series]) -> list[tuple[str, str, str]]:
    """(what, series, rival) in the order in which they run."""
    listed = []
    for what in options.what:
        for name, one in chosen.items():
            # Memory depends on the size of a state, not on how it moves; one series of each kind tells.
            if what == "memory" and (name.startswith(("intervals", "forks")) or len(one.saves) < 2):
                continue
            for rival in options.rivals:
                if what == "components" and not rival.startswith("ckptvcs"):
                    continue
                if ALL[rival].available() is None:
                    listed.append((what, name, rival))
    return listed


def run_job(what: str, name: str, rival: str, options: argparse.Namespace) -> dict[str, Any]:
    work = options.work / "job"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    out = options.work / "job.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.measure", "--what", what, "--rival", rival, "--series", name]
    command += ["--trajectories", str(options.trajectories), "--work", str(work), "--out", str(out)]
    command += ["--repeats", str(options.repeats), "--scratch-mb", str(options.scratch_mb)]
    if options.saves:
        command += ["--saves", str(options.saves)]
    try:
        subprocess.run(command, check=True, timeout=LIMIT)
        facts = json.loads(out.read_text())
    except (subprocess.SubprocessError, OSError) as error:
        facts = {"failed": str(error).split("\n")[0]}
    shutil.rmtree(work, ignore_errors=True)
    return facts


def _write(results: dict[str, Any], out: Path) -> None:
    new = out.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    new.replace(out)


def _command(arguments: list[str]) -> str:
    """The command line for somebody else's machine."""
    places = {"--trajectories": "DIR", "--work": "WORK", "--out": "results.json"}
    shown = ["python -m benchmarks.run"]
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument != "--resume":
            shown.append(places.get(before, argument))
    return " ".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trajectories", type=Path, required=True, help="made by benchmarks.trajectories")
    parser.add_argument("--work", type=Path, required=True, help="a folder for stores, some 10 GB; emptied")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rivals", nargs="+", choices=ALL, default=list(ALL), metavar="RIVAL")
    parser.add_argument("--workloads", nargs="+", metavar="SERIES", help="all that are complete")
    parser.add_argument("--what", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--saves", type=int, help="at most so many saves of each series")
    parser.add_argument("--repeats", type=int, default=2, help="passes over each series for the times")
    parser.add_argument(
        "--scratch-mb", type=int, default=900, help="file written and deleted before each clock"
    )
    parser.add_argument("--quick", action="store_true", help="3 saves, 1 pass, a small scratch file")
    parser.add_argument("--resume", action="store_true", help="keep the results that are there")
    options = parser.parse_args()
    if options.quick:
        options.saves, options.repeats, options.scratch_mb = 3, 1, 100

    complete = series.found(options.trajectories, options.saves)
    unknown = set(options.workloads or ()) - set(complete)
    if unknown:
        parser.error(f"not complete in {options.trajectories}: {', '.join(sorted(unknown))}")
    chosen = {name: one for name, one in complete.items() if name in (options.workloads or complete)}

    results: dict[str, Any] = {"jobs": {}, "series": {}, "rivals": {}}
    if options.resume and options.out.exists():
        results = json.loads(options.out.read_text())
    results["machine"] = machine.facts()
    # Every command that added to the results, in order: with --resume there may be several.
    commands = results.setdefault("commands", [])
    if _command(sys.argv[1:]) not in commands:
        commands.append(_command(sys.argv[1:]))
    results["repeats"], results["scratch_mb"] = options.repeats, options.scratch_mb
    for name, one in chosen.items():
        results["series"][name] = {
            "about": one.about,
            "saves": len(one.saves),
            "counted": one.counted,
            "steps_between": one.steps_between,
        }
    for name in options.rivals:
        kind = ALL[name]
        missing = kind.available()
        facts = {"missing": missing} if missing else {"version": kind.version()}
        results["rivals"][name] = facts | {"note": kind.note}

    _write(results, options.out)
    listed = jobs(options, chosen)
    for place, (what, name, rival) in enumerate(listed, 1):
        key = f"{what}/{name}/{rival}"
        if key in results["jobs"] and "failed" not in results["jobs"][key]:
            continue
        started = time.perf_counter()
        facts = run_job(what, name, rival, options)
        results["jobs"][key] = facts | {"revision": results["machine"]["revision"]}
        _write(results, options.out)
        outcome = facts.get("failed", "done")
        print(f"{place}/{len(listed)} {key}: {outcome}, {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
