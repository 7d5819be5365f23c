"""Programs that ckpt runs on a branch: their environment, their signals, and what became of them.

A program finds its branch through the environment, so that a training script need not know that it is a
fork: `Repo.open()` opens the repository on it.

CKPT_REPO        the repository's folder
CKPT_BRANCH      the branch
CKPT_FORK_POINT  id of the commit that the branch was forked at; not set if it was not
CKPT_OVERRIDES   what the fork sets anew, as a JSON object
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

from ckptvcs.errors import InvalidError, LockedError
from ckptvcs.opening import visible_gpus
from ckptvcs.repo import Repo

_HANDED_ON: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a batch system sends to the process it knows, which is not the one that trains."""

_TICK: Final = 0.05
_KILLED: Final = 128
"""A shell's exit status for a program that a signal ended, less the signal's number."""


def environment(repo: Repo, gpus: str | None = None) -> dict[str, str]:
    """What a program on the handle's branch gets besides this process's environment."""
    found = {
        "CKPT_REPO": str(repo.path),
        "CKPT_BRANCH": repo.branch_name or "",
        "CKPT_OVERRIDES": json.dumps(repo.overrides),
    }
    point = repo.fork_point
    if point is not None:
        found["CKPT_FORK_POINT"] = str(point)
    if gpus is not None:
        found["CUDA_VISIBLE_DEVICES"] = gpus
    return found


class Job:
    """A program that runs on a branch.

    Attributes:
        branch: its name.
        exit: the program's exit status, 128 + N if signal N ended it; None while it runs.
    """

    def __init__(
        self, repo: Repo, command: Sequence[str], *, gpus: str | None = None, log: Path | None = None
    ) -> None:
        """Start a program on the handle's branch, and record that it is running.

        Args:
            repo: a handle on the branch; the job closes it when it has ended.
            command: the program and its arguments.
            gpus: for CUDA_VISIBLE_DEVICES; None leaves it as it is.
            log: a file that gets its output, behind what is there; None is this process's own output.

        LockedError (code 'claimed') if another process trains or runs a program on the branch; InvalidError
        if the program cannot be started. Nothing is recorded then.
        """
        branch = repo.branch_name
        assert branch is not None  # it was opened on one
        holder = repo.holder
        if holder is not None:
            raise LockedError(
                f"the branch {branch} is claimed by {holder}",
                hint="stop it or wait for its end, or fork another branch",
                code="claimed",
            )
        self.branch = branch
        self.exit: int | None = None
        self._repo = repo
        self._claim = repo.mark_running()
        environ = {**os.environ, **environment(repo, gpus)}
        try:
            with contextlib.ExitStack() as stack:
                output = None if log is None else stack.enter_context(_log_file(log))
                self._process = subprocess.Popen(
                    list(command),
                    env=environ,
                    stdin=None if log is None else subprocess.DEVNULL,
                    stdout=output,
                    stderr=None if output is None else subprocess.STDOUT,
                )
        except (OSError, ValueError) as error:
            self._claim.release()
            why = getattr(error, "strerror", None) or str(error)
            raise InvalidError(f"{command[0]} cannot be run: {why}") from None
        repo.enter_status("running", {"command": list(map(str, command))})

    def poll(self) -> int | None:
        """The exit status once the program has ended, which is recorded then; None before."""
        code = self._process.poll()
        if code is None or self.exit is not None:
            return self.exit
        self.exit = code if code >= 0 else _KILLED - code
        # Not while the claim is held by somebody else: a handle that the program left behind has said enough.
        self._repo.enter_status("finished" if code == 0 else "failed", {"exit": self.exit})
        self._claim.release()
        self._repo.close()
        return self.exit

    def send(self, signum: int) -> None:
        """Hand a signal on to the program."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signum)


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        yield file


def run(repo: Repo, command: Sequence[str], started: Callable[[], None]) -> int:
    """Run a program on the handle's branch to its end, in this terminal; its exit status as `Job.exit`.
    `started` is called once it runs."""
    job = Job(repo, command)
    started()
    with _handing_on(lambda: [job]):
        while job.poll() is None:
            time.sleep(_TICK)
    assert job.exit is not None
    return job.exit


def run_all(
    starts: Sequence[Callable[[str | None], Job]],
    jobs: int,
    started: Callable[[Job], None],
    ended: Callable[[Job], None],
) -> None:
    """Run programs to their ends, `jobs` at a time, each on its share of the GPUs.

    Each start is given what CUDA_VISIBLE_DEVICES is to be. After SIGTERM, SIGHUP or an interrupt no further
    program is started; those that run get the signal too. What a start raises ends all further ones, once
    those that run have ended.
    """
    waiting = list(reversed(starts))
    free = list(reversed(shares(gpus(), jobs)))
    running: dict[Job, str | None] = {}
    stopped: list[int] = []
    problem: BaseException | None = None
    with _handing_on(lambda: list(running), stopped):
        while running or (waiting and not stopped and problem is None):
            while waiting and free and not stopped and problem is None:
                share = free.pop()
                try:
                    job = waiting.pop()(share)
                except Exception as error:  # noqa: BLE001 - raised below, when nothing runs any more
                    problem = error
                    break
                running[job] = share
                started(job)
            for job in [job for job in running if job.poll() is not None]:
                free.append(running.pop(job))
                ended(job)
            time.sleep(_TICK)
    if problem is not None:
        raise problem
    if stopped:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _handing_on(running: Callable[[], Sequence[Job]], stopped: list[int] | None = None) -> Iterator[None]:
    """Hand signals on to programs meanwhile. An interrupt from the terminal reaches them by itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hand_on(signum: int, _: FrameType | None) -> None:
        if stopped is not None and signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            stopped.append(signum)
        if signum != signal.SIGINT:
            for job in running():
                job.send(signum)

    earlier = {each: signal.signal(each, hand_on) for each in (*_HANDED_ON, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in earlier.items():
            signal.signal(each, handler)


def gpus() -> list[str]:
    """The GPUs of this process: CUDA_VISIBLE_DEVICES, else those whose device files are here."""
    said = visible_gpus()
    if said is not None:
        return said
    return [str(n) for n, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def shares(devices: Sequence[str], jobs: int) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is for each of so many jobs at a time: devices are dealt out; with fewer
    devices than jobs, jobs share them. None, which leaves it alone, without devices."""
    if not devices:
        return [None] * jobs
    return [
        ",".join(devices[n::jobs] if jobs <= len(devices) else [devices[n % len(devices)]])
        for n in range(jobs)
    ]
