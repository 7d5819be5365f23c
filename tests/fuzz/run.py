"""Coverage-guided fuzzing of every parser (`make fuzz`), by Atheris: libFuzzer for Python.

    python -m tests.fuzz.run [--seconds N] [--keep] [TARGET ...]    fuzz, each target for so long
    python -m tests.fuzz.run --replay FILE TARGET                   judge one input

What it learns stays in `.fuzz/TARGET/` and the next run begins there. An input that violates a target is
left in `.fuzz/found/` and named. `--keep` writes the smallest of what was learnt to
`tests/fuzz/corpus/`, where `tests/fuzz/test_fuzz.py` begins.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
GROWN = Path(".fuzz")
LONGEST = 1 << 14
_MEMORY_MB = 2048
_SECONDS_PER_INPUT = 10
_GUIDED = "--guided"  # in a process of its own, which libFuzzer ends


def main() -> int:
    """Fuzz, keep or replay, as asked for. The exit code is the number of targets that were violated."""
    if sys.argv[1:2] == [_GUIDED]:
        _guided(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=int, default=30, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--replay", type=Path)
    parser.add_argument("targets", nargs="*")
    asked = parser.parse_args()
    if asked.replay:
        _check(asked.targets[0], asked.replay.read_bytes())
        return 0
    from tests.fuzz.targets import TARGETS

    violated = []
    for name in asked.targets or TARGETS:
        print(f"--- {name}", flush=True)
        corpus, found = GROWN / name, GROWN / "found"
        corpus.mkdir(parents=True, exist_ok=True)
        found.mkdir(exist_ok=True)
        for number, seed in enumerate((*TARGETS[name].seeds(), *kept(name))):
            (corpus / f"seed-{number}").write_bytes(seed)
        limits = [f"-max_len={LONGEST}", f"-rss_limit_mb={_MEMORY_MB}", f"-timeout={_SECONDS_PER_INPUT}"]
        limits += [f"-max_total_time={asked.seconds}", f"-seed={asked.seed}", "-print_final_stats=1"]
        if _engine(name, [*limits, f"-artifact_prefix={found}/{name}-", str(corpus)]):
            violated.append(name)
        elif asked.keep:
            _keep(name, corpus)
    print(f"violated: {', '.join(violated) or 'none'}")
    return len(violated)


def _engine(name: str, arguments: list[str]) -> int:
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.run", _GUIDED, name, *arguments]
    return subprocess.run(command, check=False).returncode


def _guided(name: str, arguments: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["ckptvcs"]):
        from tests.fuzz.targets import TARGETS
    check = TARGETS[name].check
    atheris.Setup([sys.argv[0], *arguments], check)
    atheris.Fuzz()


def _check(name: str, data: bytes) -> None:
    from tests.fuzz.targets import TARGETS

    TARGETS[name].check(data)


def kept(name: str) -> list[bytes]:
    """The inputs of a target that earlier runs found worth keeping."""
    path = HERE / "corpus" / f"{name}.hex"
    return [bytes.fromhex(line) for line in path.read_text().splitlines()] if path.exists() else []


def _keep(name: str, corpus: Path) -> None:
    """The smallest inputs of a grown corpus, in which libFuzzer keeps what reaches something new."""
    grown = {path.read_bytes() for path in corpus.iterdir() if not path.name.startswith("seed-")}
    total, lines = 0, []
    for data in sorted(grown, key=lambda each: (len(each), each)):
        total += len(data)
        if total > LONGEST:
            break
        lines.append(f"{data.hex()}\n")
    (HERE / "corpus" / f"{name}.hex").write_text("".join(lines))


if __name__ == "__main__":
    sys.exit(main())
