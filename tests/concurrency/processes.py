"""Processes for the concurrency tests: forked from a clean parent, with a pipe back."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ckptvcs.testing.same import difference


class Child:
    """A forked child. What it `say`s arrives even if it is killed a moment later."""

    def __init__(self, action: Callable[[Callable[[Any], None]], None]) -> None:
        out, into = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(out)
                # One small write per line: a pipe takes it whole or not at all.
                action(lambda what: _write(into, what))
                status = 0
            except BaseException:  # noqa: BLE001 - the child must never return into pytest
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(into)
        self._out = out
        self._waiting = b""

    def line(self) -> Any:
        """The next thing it says; None when it has ended."""
        while b"\n" not in self._waiting:
            more = os.read(self._out, 1 << 16)
            if not more:
                return None
            self._waiting += more
        line, self._waiting = self._waiting.split(b"\n", 1)
        return json.loads(line)

    def rest(self) -> Iterator[Any]:
        """Everything it still says, until it ends."""
        while (line := self.line()) is not None:
            yield line

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit status; negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        """Let go of the pipe."""
        os.close(self._out)


def _write(fd: int, what: Any) -> None:
    os.write(fd, json.dumps(what).encode() + b"\n")


def state_of(name: str, number: int) -> dict[str, Any]:
    """The state of the n-th commit of a line of work; a function, so that nobody has to remember it.

    Some of it never changes, some is shared with every other line, some is new each time.
    """
    fresh = np.random.default_rng([number, *name.encode()])
    shared = np.random.default_rng(number % 7)
    return {
        "frozen": np.random.default_rng(1).integers(0, 256, 40_000, np.uint8),
        "shared": shared.integers(0, 256, 20_000, np.uint8),
        "fresh": fresh.standard_normal(500),
        "deep": {"a": [fresh.integers(0, 256, 400, np.uint8), number, name]},
    }


def exact(a: Any, b: Any) -> None:
    """Fail with the place where two states differ."""
    assert difference(a, b) is None, difference(a, b)
