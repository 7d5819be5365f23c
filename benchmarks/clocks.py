"""Seconds and memory of one operation, apart from what the machine does beside it."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self


class Clock:
    """Wall-clock seconds of actions, each begun with a supply of page-cache memory that was used before.

    On virtual machines memory that the guest never used costs several times as much as used memory, and
    which operation meets it is chance. Writing and deleting a file leaves used memory behind.
    """

    def __init__(self, folder: Path, megabytes: int) -> None:
        self._scratch = folder / "scratch"
        self._megabytes = megabytes

    def seconds(self, action: Callable[[], Any], *, refresh: bool = True) -> tuple[float, Any]:
        """Seconds and result. Without `refresh` no memory is supplied, for actions that need little."""
        if refresh:
            self._refresh()
        gc.collect()
        gc.disable()
        try:
            started = time.perf_counter()
            result = action()
            return time.perf_counter() - started, result
        finally:
            gc.enable()

    def _refresh(self) -> None:
        block = bytes(1 << 20)
        with self._scratch.open("wb") as file:
            for _ in range(self._megabytes):
                file.write(block)
        self._scratch.unlink()


def peak_bytes(action: Callable[[], Any]) -> int | None:
    """How far resident memory rises above where it is while an action runs; None where this cannot be read.

    Mapped files count while they are mapped.
    """
    gc.collect()
    if not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)  # memory already free would hide what the action needs
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    result = action()
    peak = _status("VmHWM") - before
    del result
    return peak


class ChildrenWatch:
    """The largest resident memory that this process's children and theirs have at one time, sampled.

    What the kernel keeps for ended children would not do: it counts the parent's memory at the fork.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, page * sum(map(_resident_pages, _descendants(os.getpid()))))


def _descendants(process: int) -> list[int]:
    found = []
    mine = Path("/proc/self/cmdline").read_bytes()
    try:
        for thread in Path(f"/proc/{process}/task").iterdir():
            for child in (thread / "children").read_text().split():
                # Between fork and exec a child still is this program, with this program's memory.
                if Path(f"/proc/{child}/cmdline").read_bytes() != mine:
                    found.append(int(child))
                found += _descendants(int(child))
    except OSError:  # it has ended, or this system has no such files
        pass
    return found


def _resident_pages(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)
