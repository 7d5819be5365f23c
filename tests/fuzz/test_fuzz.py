"""Every parser against inputs that earlier, guided runs kept, and against mutations of them.

The mutations are the same in every run. `CKPT_FUZZ=100` makes a hundred times as many; `make fuzz` looks for
new paths instead. A failure names the file that holds the input; `python -m tests.fuzz.run --replay` judges
it again.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from tests.fuzz.mutation import mutations
from tests.fuzz.run import kept
from tests.fuzz.targets import TARGETS

SEED = 20_260_101
MUTATIONS = 1000
MORE = int(os.environ.get("CKPT_FUZZ", "1"))  # as it was before tests clean the environment
MEMORY = 1 << 30
"""Bytes of address space that one input may take, more than enough for what 64 KiB can ask for."""
CPU_SECONDS = 20.0
"""What no input may take. The slowest takes a tenth of a second."""

pytestmark = pytest.mark.filterwarnings("ignore")


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Less memory, and a signal for what does not end."""

    def refuse(number: int, frame: FrameType | None) -> None:
        raise AssertionError("the input takes too long")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGVTALRM, refuse)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGVTALRM, old)


@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_holds(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    seeds = [*target.seeds(), *kept(name)]
    with limits():
        for data in (*seeds, *mutations(seeds, SEED, MORE * MUTATIONS)):
            signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
            try:
                target.check(data)
            except BaseException as error:
                case = tmp_path / f"{name}.bin"
                case.write_bytes(data)
                error.add_note(f"replay: python -m tests.fuzz.run --replay {case} {name}")
                raise


def test_mutations_are_the_same_on_every_machine() -> None:
    made = list(mutations([b"some bytes", b"and others"], SEED, 1000))
    assert made == list(mutations([b"some bytes", b"and others"], SEED, 1000))
    assert len(set(made)) > 900
