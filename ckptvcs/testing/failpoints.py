"""Kills between any two steps of an operation: real processes, a real index, SIGKILL.

Whatever the package changes goes through the one door to files or through an index transaction. So those are
the steps, and nothing in the code that is tested has to name them: `KillingDisk` counts them, and
`kill_at_every_step` runs an operation in a child of its own once for each, and kills the child there. What
the child had acknowledged, and the folder it left, go to a check.

Two kinds of steps are also cut in half: of a write half of the bytes are there, and a pack that is being
published has both of its names. A transaction is cut when all is put and nothing is durable, with the index's
lock held by the process that dies.

Unlike a power cut (`ckptvcs.testing.crashes`) a kill loses nothing that was written, and leaves locks to the
kernel and the index to its own recovery.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, TypeAlias

from ckptvcs.disk import Disk, Lock, WriteFile
from ckptvcs.ids import Buffer
from ckptvcs.store.index import Change, Index

Acknowledge: TypeAlias = Callable[[str], None]
"""Says, outside the process, that something was promised."""

_ACKNOWLEDGED: Final = b"A"
_STEP: Final = b"S"


class KillingDisk(Disk):
    """The real file system, whose process is killed at its n-th step, counted from 1; 0 kills nobody.

    The step itself does not happen, or happens by half. Each is announced before: what dies can be named.
    """

    def __init__(self, at: int = 0, announce: Callable[[str], None] = lambda _: None) -> None:
        self._at = at
        self._announce = announce
        self._count = 0
        self._mutex = threading.RLock()

    def step(self, words: str) -> None:
        """One step; the process may die before it."""
        if self._due(words):
            self._die()

    def _due(self, words: str) -> bool:
        with self._mutex:
            self._count += 1
            self._announce(words)
            return self._count == self._at

    def _die(self) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("alive after SIGKILL")

    @contextlib.contextmanager
    def in_transactions(self) -> Iterator[None]:
        """Count, in this process, each index transaction of which nothing is durable yet as a step too."""
        disk, change = self, Index.change

        @contextlib.contextmanager
        def counted(self: Index) -> Iterator[Change]:
            with change(self) as transaction:
                yield transaction
                disk.step("commit the index transaction")

        Index.change = counted  # type: ignore[method-assign]
        try:
            yield
        finally:
            Index.change = change  # type: ignore[method-assign]

    # -- the door

    def create(self, path: Path, mode: int = 0o644) -> WriteFile:
        self.step(f"create {path.name}")
        return _KilledFile(self, path, create=True, mode=mode)

    def append(self, path: Path) -> WriteFile:
        return _KilledFile(self, path, create=False)

    def make_dir(self, path: Path) -> None:
        self.step(f"make folder {path.name}")
        super().make_dir(path)

    def publish(self, temporary: Path, final: Path) -> None:
        self.step(f"publish {final.name}")
        if self._due(f"publish {final.name}, both names there"):
            os.link(temporary, final)
            self._die()
        super().publish(temporary, final)

    def rename(self, old: Path, new: Path) -> None:
        self.step(f"rename {old.name} to {new.name}")
        super().rename(old, new)

    def protect(self, path: Path) -> None:
        self.step(f"protect {path.name}")
        super().protect(path)

    def remove(self, path: Path) -> None:
        self.step(f"remove {path.name}")
        super().remove(path)

    def remove_tree(self, path: Path) -> None:
        for folder, folders, files in os.walk(path, topdown=False):
            for name in sorted(files):
                self.remove(Path(folder) / name)
            for name in sorted(folders):
                self.step(f"remove folder {name}")
                os.rmdir(Path(folder) / name)
        self.step(f"remove folder {path.name}")
        super().remove_tree(path)

    def sync_dir(self, path: Path) -> None:
        self.step(f"sync folder {path.name}")
        super().sync_dir(path)

    def index_committed(self, path: Path) -> None:
        self.step("go on behind the index transaction")

    def lock(self, path: Path, *, shared: bool = False, wait: float = 0.0) -> Lock:
        if not os.path.lexists(path):
            self.step(f"make the lock {path.name}")
        return super().lock(path, shared=shared, wait=wait)


class _KilledFile(WriteFile):
    def __init__(self, disk: KillingDisk, path: Path, *, create: bool, mode: int = 0o644) -> None:
        super().__init__(path, create=create, mode=mode)
        self._disk = disk

    def write(self, buffers: Sequence[Buffer]) -> None:
        self._disk.step(f"write {self.path.name}")
        if self._disk._due(f"write half of {self.path.name}"):
            data = b"".join(bytes(buffer) for buffer in buffers)
            super().write([data[: len(data) // 2]])
            self._disk._die()
        super().write(buffers)

    def truncate(self, size: int) -> None:
        self._disk.step(f"cut {self.path.name}")
        super().truncate(size)

    def sync(self) -> None:
        self._disk.step(f"sync {self.path.name}")
        super().sync()


# -- every step of an operation -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Killed:
    """How one child ended.

    Attributes:
        at: the step at which it was killed; 0 if it was not.
        steps: all that it had begun, in words.
        acknowledged: what it had promised by then.
    """

    at: int
    steps: tuple[str, ...]
    acknowledged: tuple[str, ...]

    def __str__(self) -> str:
        if not self.at:
            return "not killed"
        said = ", ".join(self.acknowledged) or "nothing"
        return f"killed at step {self.at} ({self.steps[-1]}), acknowledged: {said}"


Operate: TypeAlias = Callable[[Path, KillingDisk, Acknowledge], None]
Check: TypeAlias = Callable[[Path, Killed], None]


def kill_at_every_step(
    start: Path, scratch: Path, operate: Operate, check: Check, *, first: int = 1, every: int = 1
) -> int:
    """Run `operate(folder, disk, acknowledge)` in a child, on a copy of `start`, and once more for each of
    its steps, killed there; and `check(folder, killed)` what each has left. Returns the number of kills.

    The first child is not killed: it tells how many steps there are at the least, and its end is checked as
    well. A step that only a later child reaches is killed too, so it does not matter that names, times and
    turns of threads differ from run to run. With `every` only each n-th step is taken, from the `first` on.
    """
    _one(start, scratch, operate, check, 0)
    at, kills = first, 0
    while True:
        killed = _one(start, scratch, operate, check, at)
        if not killed:
            return kills
        kills += 1
        at += every


def _one(start: Path, scratch: Path, operate: Operate, check: Check, at: int) -> bool:
    folder = scratch / f"killed-{at}"
    shutil.copytree(start, folder, symlinks=True)
    outcome = run_killed(folder, operate, at)
    try:
        check(folder, outcome)
    except BaseException as error:
        error.add_note(f"{outcome}, in {folder}")
        raise
    shutil.rmtree(folder)
    return bool(outcome.at)


def run_killed(folder: Path, operate: Operate, at: int) -> Killed:
    """Run an operation in a child that is killed at a step, if it gets there. RuntimeError if it fails."""
    out, into = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(out)
            # One small write per line: a pipe takes it whole or not at all.
            disk = KillingDisk(at, lambda words: _say(into, _STEP, words))
            with disk.in_transactions():
                operate(folder, disk, lambda what: _say(into, _ACKNOWLEDGED, what))
            status = 0
        except BaseException:  # noqa: BLE001 - the child must not return into its parent's code
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        lines = pipe.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = {
        kind: tuple(line[1:].decode() for line in lines if line[:1] == kind)
        for kind in (_STEP, _ACKNOWLEDGED)
    }
    # It may have been a process of the child's that went through the disk and died.
    reached = 0 < at <= len(said[_STEP])
    outcome = Killed(at if reached else 0, said[_STEP], said[_ACKNOWLEDGED])
    if status and not (reached and status == -signal.SIGKILL):
        raise RuntimeError(f"the operation failed with status {status} behind {outcome.steps[-3:]}")
    return outcome


def _say(fd: int, kind: bytes, words: str) -> None:
    os.write(fd, kind + words.encode() + b"\n")
