"""A process of our own beside this one: memory that both see, messages between them, its birth and its end.

The second door to the operating system, beside `disk.py`: nothing here touches a file that lasts, so power
cuts have no part in it.

A companion runs one function of this package, in a fresh interpreter (a fork would take over threads, locks
and devices). It lives as long as its socket: when the other end is closed, or the process that holds it
dies, `Channel.receive` gives None there, and it ends. It ignores the signals that end a process group, so
what it has begun is finished; and it yields the CPUs to everybody else.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from ckptvcs.errors import CkptError, StorageError

_HINT: Final = "use commit, which stores the state before it returns"
_LENGTH: Final = struct.Struct("<Q")
_DEAF_TO: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PATIENCE: Final = 60.0
_NICENESS: Final = 19
_STEP: Final = 64 << 20
"""Bytes reserved at a time: a signal undoes what one call reserved, and the call begins again."""

_HEADROOM: Final = 8
"""Address space grows by this share more than is asked for: a state that grows a little at each save would
otherwise be mapped, page by page, each time."""


class SharedMemory:
    """Memory without a name, for this process and its companions. It grows, and keeps what it holds."""

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._mapped = 0
        self._reserved = 0
        try:
            if hasattr(os, "memfd_create"):
                self._fd = os.memfd_create("ckptvcs", os.MFD_CLOEXEC)
            else:
                with tempfile.TemporaryFile() as file:  # without a name from the start
                    self._fd = os.dup(file.fileno())
        except OSError as error:
            raise _no_memory(error) from error

    @classmethod
    def attached(cls, fd: int) -> SharedMemory:
        """The memory behind an inherited descriptor."""
        made = cls.__new__(cls)
        made._map, made._mapped, made._reserved, made._fd = None, 0, 0, fd
        return made

    @property
    def descriptor(self) -> int:
        """What a companion inherits."""
        return self._fd

    def reserve(self, nbytes: int) -> memoryview:
        """All of the memory, at least `nbytes`, which the machine then has. StorageError if it refuses."""
        if nbytes > self._reserved:
            try:
                if nbytes > self._mapped:
                    os.ftruncate(self._fd, nbytes + nbytes // _HEADROOM)
                # Without this the machine's refusal would come as a fatal signal at some later write.
                if hasattr(os, "posix_fallocate"):
                    for at in range(self._reserved, nbytes, _STEP):
                        os.posix_fallocate(self._fd, at, min(_STEP, nbytes - at))
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise _no_memory(error, nbytes) from error
            self._reserved = nbytes
        return self.view(nbytes)

    def view(self, nbytes: int) -> memoryview:
        """All of the memory, at least `nbytes`, which somebody has reserved."""
        if self._map is None or nbytes > self._mapped:
            try:
                self._mapped = os.fstat(self._fd).st_size
                self._map = mmap.mmap(self._fd, self._mapped)  # views of the old map keep it
            except (OSError, ValueError) as error:
                raise _no_memory(error, nbytes) from error
        return memoryview(self._map)

    def close(self) -> None:
        """Give the memory back, once its last view is gone."""
        if self._map is not None:
            with contextlib.suppress(BufferError):
                self._map.close()
            self._map = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


def _no_memory(error: Exception, nbytes: int = 0) -> StorageError:
    size = f" of {nbytes} bytes" if nbytes else ""
    return StorageError(
        f"cannot make the shared memory{size} into which commit_async copies the state: {error}",
        hint=_HINT,
        errno=getattr(error, "errno", None),
    )


class Channel:
    """One end of a pair of sockets that carries whole messages."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, message: bytes) -> bool:
        """Whether the other end still listens."""
        try:
            self._socket.sendall(_LENGTH.pack(len(message)) + message)
        except OSError:
            return False
        return True

    def receive(self) -> bytes | None:
        """The next message; None when the other end has gone."""
        head = self._exactly(_LENGTH.size)
        return None if head is None else self._exactly(_LENGTH.unpack(head)[0])

    def _exactly(self, count: int) -> bytes | None:
        data = bytearray()
        while len(data) < count:
            try:
                more = self._socket.recv(min(count - len(data), 1 << 20))
            except OSError:
                return None
            if not more:
                return None
            data += more
        return bytes(data)

    def close(self) -> None:
        """Let the other end know that nothing more comes."""
        self._socket.close()


class Companion:
    """A running companion, seen from the process that started it."""

    def __init__(self, module: str, memory: SharedMemory, settings: Mapping[str, str]) -> None:
        """Start `module.main(channel, memory)` in a process of its own.

        `settings` are environment variables for it. CkptError if no process can be started here.
        """
        if not sys.executable or getattr(sys, "frozen", False):
            raise CkptError(
                "there is no Python interpreter to run the writer process of commit_async with", hint=_HINT
            )
        ours, theirs = socket.socketpair()
        try:
            with _blocked(_DEAF_TO):  # until the companion ignores them by itself
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        *_flags(),
                        "-c",
                        _start(module),
                        str(theirs.fileno()),
                        str(memory.descriptor),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    cwd="/",
                    env={**os.environ, **_ONE_THREAD, **settings},
                    pass_fds=(theirs.fileno(), memory.descriptor),
                )
        except (OSError, subprocess.SubprocessError) as error:
            ours.close()
            raise CkptError(
                f"cannot start the writer process of commit_async: {error}", hint=_HINT
            ) from error
        finally:
            theirs.close()
        self._channel = Channel(ours)
        self.send, self.receive = self._channel.send, self._channel.receive

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    @property
    def number(self) -> int:
        """Its process id."""
        return self._process.pid

    def end(self) -> str:
        """Have it end, wait for that, and say how it ended."""
        self._channel.close()
        try:
            status = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:  # it has nothing to do any more, so nothing is lost
            self._process.kill()
            status = self._process.wait()
        if status < 0:
            with contextlib.suppress(ValueError):
                return f"was killed by {signal.Signals(-status).name}"
            return f"was killed by signal {-status}"
        return f"ended with status {status}"

    def abandon(self) -> None:
        """In a forked child: let go of what belongs to the parent."""
        self._channel.close()
        self._process.returncode = 0  # not ours to wait for


_ONE_THREAD: Final = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
)


def _flags() -> list[str]:
    """Those of this interpreter's options that decide where modules come from."""
    flags = sys.flags
    if flags.isolated:
        return ["-I"]
    chosen = {"-E": flags.ignore_environment, "-s": flags.no_user_site, "-S": flags.no_site}
    return [option for option, on in chosen.items() if on]


def _start(module: str) -> str:
    """A program that runs `module` out of this very package, whatever else is called like it, with the
    same search path."""
    search = [str(Path(folder).absolute()) for folder in sys.path]
    package = str(Path(__file__).absolute().parent.parent)
    return (
        "import sys; sys.path = [each for each in sys.path if each]; import typing, __future__; "
        f"sys.path = {[package, *search]!a}; import ckptvcs; del sys.path[0]; "
        f"from ckptvcs.companion import run; from {module} import main; run(main)"
    )


def run(main: object) -> None:
    """In the companion: settle down, and call `main(channel, memory)`."""
    for each in _DEAF_TO:
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _DEAF_TO)
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    with contextlib.suppress(AttributeError, OSError):  # never in the way of a process that wakes up
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    link, memory = int(sys.argv[1]), int(sys.argv[2])
    for fd in (link, memory):
        os.set_inheritable(fd, False)
    assert callable(main)
    main(Channel(socket.socket(fileno=link)), SharedMemory.attached(memory))
    os._exit(0)  # the interpreter would take its own modules apart, at this priority, while somebody waits


@contextlib.contextmanager
def _blocked(signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Signals wait during the block. A process started in it begins with them waiting."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
