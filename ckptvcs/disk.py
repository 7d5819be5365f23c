"""The one door to files, locks and the clock.

Nothing else in the package calls `os`, `fcntl` or `mmap`. That makes power cuts testable: a test hands
over a `Disk` that records every operation (`ckptvcs.testing.crashes`) and replays what a crash may leave.
LMDB bypasses this door; `Disk.index_committed` tells the recorder when its file changed.

Every failure is a `StorageError` that names the path and the cause, except `FileNotFoundError` and
`FileExistsError`, which callers of this module tell apart and handle.

Durability: `WriteFile.sync` and `Disk.sync_dir` return once the medium has the bytes. A failed sync is
never retried on that file: Linux drops the dirty pages and the next sync would lie (fsyncgate).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import getpass
import mmap
import os
import platform
import shutil
import stat
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, Self, TypeAlias

from ckptvcs.errors import LockedError, StorageError
from ckptvcs.ids import Buffer

StrPath: TypeAlias = str | os.PathLike[str]

_CAUSES: Final = {
    errno.ENOSPC: ("the disk is full", "free some space, then try again; nothing was changed"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, then try again; nothing was changed"),
    errno.EACCES: ("permission denied", None),
    errno.EPERM: ("operation not permitted", None),
    errno.EROFS: ("the file system is read-only", None),
    errno.EIO: ("the disk reported an I/O error", "look at the system log; do not trust this disk"),
    errno.EFBIG: ("the file would be larger than this process may write", "see `ulimit -f`"),
    errno.EMFILE: ("too many open files", "see `ulimit -n`"),
}


@contextlib.contextmanager
def translated(action: str, path: Path | str) -> Iterator[None]:
    """Turn an OSError inside the block into a StorageError that says what failed, where and why."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, StorageError):
        raise
    except OSError as error:
        cause, hint = _CAUSES.get(error.errno or 0, (error.strerror or str(error), None))
        code = "disk-full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        raise StorageError(
            f"cannot {action} {path}: {cause}", hint=hint, path=str(path), errno=error.errno, code=code
        ) from error


def _require_file(fd: int, path: Path) -> None:
    """Close the descriptor of anything but a regular file, and refuse it."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise StorageError(f"cannot open {path}: it is no ordinary file", path=str(path), errno=errno.EINVAL)


class ReadFile:
    """An open file for positioned reads from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with translated("open", path):
            # A pipe would be waited for, and a device never ends.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        _require_file(fd, path)
        self._fd = fd

    def size(self) -> int:
        """Bytes in the file now."""
        return os.fstat(self._fd).st_size

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset`; returns the bytes read, fewer only at the end of the file."""
        done = 0
        with translated("read", self.path):
            while done < len(buffer):
                n = os.preadv(self._fd, [buffer[done:]], offset + done)
                if n == 0:
                    break
                done += n
        return done

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`, fewer only at the end of the file."""
        with translated("read", self.path):
            data = os.pread(self._fd, length, offset)
            while len(data) < length:
                more = os.pread(self._fd, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
        return data

    def close(self) -> None:
        """Give the descriptor back; the bytes of an unlinked file are freed then."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WriteFile:
    """A file written from front to back by one owner. `size` is where the next byte goes."""

    def __init__(self, path: Path, *, create: bool, mode: int = 0o644) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        flags |= os.O_CREAT | os.O_EXCL if create else os.O_APPEND
        with translated("create" if create else "open", path):
            fd = os.open(path, flags, mode)
            self.size = 0 if create else os.fstat(fd).st_size
        _require_file(fd, path)
        self._fd = fd

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Append all buffers, in order."""
        queue = [memoryview(b).cast("B") for b in buffers if len(b)]
        with translated("write", self.path):
            while queue:
                n = os.writev(self._fd, queue[:512])
                self.size += n
                while queue and n >= len(queue[0]):
                    n -= len(queue.pop(0))
                if n:
                    queue[0] = queue[0][n:]

    def start_writeback(self, offset: int, length: int) -> None:
        """Have the system begin to write these bytes to the medium, so that a later `sync` waits less.

        Not waited for, and nothing is durable by it. On Linux this advice starts the writing of dirty pages
        and would drop clean ones, of which there are none among bytes just written.
        """
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes written earlier."""
        with translated("read", self.path):
            return os.pread(self._fd, length, offset)

    def truncate(self, size: int) -> None:
        """Cut the file back to `size` bytes."""
        with translated("truncate", self.path):
            os.ftruncate(self._fd, size)
            self.size = size

    def sync(self) -> None:
        """Return when the bytes are on the medium. After a failure the file must be given up."""
        with translated("sync", self.path):
            if sys.platform == "darwin":  # fsync there stops at the drive's cache
                fcntl.fcntl(self._fd, fcntl.F_FULLFSYNC)
            else:
                os.fsync(self._fd)

    def lock(self) -> None:
        """Hold an exclusive flock on this file until it is closed; waits for it."""
        with translated("lock", self.path):
            fcntl.flock(self._fd, fcntl.LOCK_EX)

    def close(self) -> None:
        """Give the descriptor back. No durability."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with translated("close", self.path):
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except StorageError:
            if kind is None:
                raise


class Lock:
    """A held flock. The kernel drops it when the process dies; no clock and no process id is involved.

    A forked child closes its copy of the descriptor at once, so that only the process that took the
    lock holds it.
    """

    _held: ClassVar[weakref.WeakSet[Lock]] = weakref.WeakSet()

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        Lock._held.add(self)

    @property
    def held(self) -> bool:
        """True while the lock is ours and its path still names the locked file."""
        if self._fd < 0:
            return False
        try:
            ours, named = os.fstat(self._fd), os.stat(self.path)
        except OSError:
            return False
        return (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)

    def write(self, data: Buffer) -> None:
        """Make this the locked file's content, for those who find it locked. Not durable."""
        with translated("write", self.path):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, data, 0)

    def release(self) -> None:
        """Let go of the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class ThreadLock:
    """A re-entrant lock between threads that a forked child finds free, whoever held it in the parent."""

    _all: ClassVar[weakref.WeakSet[ThreadLock]] = weakref.WeakSet()

    def __init__(self) -> None:
        self._lock = threading.RLock()
        ThreadLock._all.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _drop_locks_in_child() -> None:
    for lock in list(Lock._held):
        lock.release()
    for each in list(ThreadLock._all):
        each._lock = threading.RLock()


def in_forked_child(action: Callable[[], None]) -> None:
    """Run `action` in every child this process forks, before anything else there."""
    os.register_at_fork(after_in_child=action)


in_forked_child(_drop_locks_in_child)


_SMALL: Final = 16 << 20
"""Bytes of a file that is read as a whole."""


class Disk:
    """The real file system. Tests pass a subclass that records or fails.

    All it remembers is the folder that several users share (`share`). What is made below gets the modes that
    follow from the folder's own, whatever the umask.
    """

    _shared: tuple[Path, int] | None = None

    # -- sharing ---------------------------------------------------------------------------------

    def share(self, folder: Path, mode: int | None = None) -> None:
        """Treat a folder, and what is made below from now on, as its mode says.

        A folder with the setgid bit is shared: folders below get its mode, files the same without the right
        to enter. `mode` sets the mode first. Without the bit, umask and process decide as ever.
        """
        with translated("set the permissions of", folder):
            if mode is not None:
                os.chmod(folder, mode)
            found = stat.S_IMODE(os.stat(folder).st_mode)
        self._shared = (folder, found) if found & stat.S_ISGID else None

    def adopt(self, path: Path) -> None:
        """Give a file or folder that this process's user made the mode it has in a shared folder. Nothing if
        it is not there, is somebody else's, or lies elsewhere."""
        mode = self._mode(path)
        if mode is None:
            return
        with translated("set the permissions of", path), contextlib.suppress(FileNotFoundError):
            found = os.lstat(path)
            if stat.S_ISREG(found.st_mode):
                mode &= 0o666
            if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != mode:
                os.chmod(path, mode)

    def make_shared(self, path: Path) -> None:
        """In a shared folder, make an empty file with the right mode, if it is missing: whoever comes at the
        same time finds none, or one that it may open. Elsewhere nothing."""
        if self._mode(path) is None or self.exists(path):
            return
        temporary = path.with_name(f"{path.name}.{random_name()}.tmp")
        with self.create(temporary):
            pass
        with contextlib.suppress(FileExistsError):
            self.link(temporary, path)
        self.remove(temporary)

    def _mode(self, path: Path) -> int | None:
        """The mode of folders where a path lies, if that is shared."""
        if self._shared is None or not path.is_relative_to(self._shared[0]):
            return None
        return self._shared[1]

    # -- reading ---------------------------------------------------------------------------------

    def open(self, path: Path) -> ReadFile:
        """An existing file for reading. FileNotFoundError if it is not there."""
        return ReadFile(path)

    def read(self, path: Path) -> bytes:
        """A whole small file. FileNotFoundError if it is not there; StorageError if it is not small."""
        with ReadFile(path) as file:
            size = file.size()
            if size > _SMALL:
                raise StorageError(
                    f"cannot read {path}: it has {size} bytes, where at most {_SMALL} belong",
                    path=str(path),
                    errno=errno.EFBIG,
                )
            return file.read(0, size)

    def exists(self, path: Path) -> bool:
        """Whether the path names anything; a dangling symlink counts."""
        with translated("look at", path):
            try:
                os.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def is_dir(self, path: Path) -> bool:
        """Whether the path is a folder."""
        return path.is_dir()

    def is_link(self, path: Path) -> bool:
        """Whether the path is a symbolic link."""
        return path.is_symlink()

    def is_file(self, path: Path) -> bool:
        """Whether the path is a regular file, itself or through links."""
        return path.is_file()

    def is_plain_file(self, path: Path) -> bool:
        """Whether the path itself is a regular file: no link, no pipe, nothing else."""
        try:
            return stat.S_ISREG(os.lstat(path).st_mode)
        except OSError:
            return False

    def size(self, path: Path) -> int:
        """Bytes in the file. FileNotFoundError if it is not there."""
        with translated("look at", path):
            return os.stat(path).st_size

    def names(self, folder: Path) -> list[str]:
        """Sorted names in a folder; none if the folder does not exist."""
        with translated("list", folder):
            try:
                return sorted(os.listdir(folder))
            except FileNotFoundError:
                return []

    def free_bytes(self, path: Path) -> int:
        """Bytes an ordinary user may still write to the file system of `path`."""
        with translated("look at", path):
            space = os.statvfs(path)
            return space.f_bavail * space.f_frsize

    def modified_ns(self, path: Path) -> int:
        """When the file was last written, in UTC nanoseconds by its file system's clock."""
        with translated("look at", path):
            return os.stat(path).st_mtime_ns

    def network(self, path: Path) -> str | None:
        """The type of network file system that a path is on, as in 'nfs4'; None if it is on a local one.

        Told from `/proc/self/mountinfo`; where there is none (macOS), every path passes for local.
        """
        try:
            table = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
            device = os.stat(path).st_dev
        except OSError:
            return None
        kind = _mounted_type(table, f"{os.major(device)}:{os.minor(device)}", os.path.realpath(path))
        return kind if kind is not None and _is_network(kind) else None

    def same_file(self, path: Path) -> tuple[int, int]:
        """(device, inode): what tells two paths to one file from two files."""
        with translated("look at", path):
            found = os.stat(path)
            return found.st_dev, found.st_ino

    def writable(self, path: Path) -> bool:
        """Whether this process may create files in the folder."""
        return os.access(path, os.W_OK | os.X_OK)

    # -- changing --------------------------------------------------------------------------------

    def create(self, path: Path, mode: int = 0o644) -> WriteFile:
        """A new file. FileExistsError if the name is taken."""
        file = WriteFile(path, create=True, mode=mode)
        self.adopt(path)
        return file

    def allocate(self, path: Path, size: int) -> None:
        """Give every byte of a file its place on the disk; a missing or empty file has `size` zeros then.

        PermissionError where nobody but others may write it. No durability.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            fd = os.open(path, flags, 0o644)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise PermissionError(error.errno, error.strerror, str(path)) from None
            with translated("create", path):
                raise
        try:
            with translated("allocate", path):
                found = os.fstat(fd)
                wanted = found.st_size or size
                if hasattr(os, "posix_fallocate") and found.st_blocks * 512 < wanted:
                    os.posix_fallocate(fd, 0, wanted)
        finally:
            os.close(fd)

    def append(self, path: Path) -> WriteFile:
        """An existing file for appending."""
        return WriteFile(path, create=False)

    def make_dir(self, path: Path) -> None:
        """A new folder; fine if it is there already. Not durable before `sync_dir` of its parent."""
        with translated("create", path), contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o755)
            self.adopt(path)

    def publish(self, temporary: Path, final: Path) -> None:
        """Give a finished file its final name, never replacing one. FileExistsError if it is taken."""
        with translated("publish", final):
            try:
                os.link(temporary, final)
            except OSError as error:
                # File systems without hard links: names are unique by construction, so nobody can
                # take `final` between the look and the rename.
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                    raise
                if self.exists(final):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final)) from None
                os.rename(temporary, final)
            else:
                os.unlink(temporary)

    def link(self, existing: Path, new: Path) -> bool:
        """Give a file a second name. False where that cannot be: other file systems, other people's files.

        FileExistsError if the name is taken. Not durable before `sync_dir`.
        """
        with translated("publish", new):
            try:
                os.link(existing, new)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV, errno.EACCES):
                    raise
                return False
        return True

    def replace(self, path: Path, data: Buffer) -> None:
        """Write a whole file so that a crash leaves the old or the new content. Durable on return."""
        temporary = path.with_name(f"{path.name}.{random_name()}.tmp")
        try:
            with self.create(temporary) as file:
                file.write([data])
                file.sync()
            self.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                self.remove(temporary)
            raise
        self.sync_dir(path.parent)

    def rename(self, old: Path, new: Path) -> None:
        """Rename, replacing `new`. Not durable before `sync_dir`."""
        with translated("rename", old):
            os.rename(old, new)

    def touch(self, path: Path) -> None:
        """Give a file the present time, as if it had just been read and changed."""
        with translated("touch", path):
            os.utime(path)

    def protect(self, path: Path) -> None:
        """Make a finished file read-only for everybody."""
        mode = self._mode(path)
        with translated("protect", path):
            os.chmod(path, 0o444 if mode is None else mode & 0o444)

    def remove(self, path: Path) -> None:
        """Unlink a file; fine if it is gone already."""
        with translated("remove", path), contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and all in it. Only for folders nobody uses."""
        with translated("remove", path):
            shutil.rmtree(path, ignore_errors=True)

    def sync_dir(self, path: Path) -> None:
        """Return when the names in this folder are on the medium."""
        with translated("sync", path):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            except OSError as error:
                # Some network and FUSE file systems cannot sync a folder and say so.
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
            finally:
                os.close(fd)

    def index_committed(self, path: Path) -> None:
        """Called after each durable LMDB transaction with its data file. For recorders; does nothing."""

    # -- locks, clock, machine -------------------------------------------------------------------

    def lock(self, path: Path, *, shared: bool = False, wait: float = 0.0) -> Lock:
        """Take a flock on `path`, a folder or a file (made if missing), waiting up to `wait` seconds.

        LockedError if somebody else holds it. After locking, the descriptor is compared with the
        path: a file that was unlinked in between is not a lock.
        """
        deadline = time.monotonic() + wait
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        while True:
            with translated("lock", path):
                lock = Lock(path, _open_for_lock(path, shared))
            self.adopt(path)
            fd = lock._fd
            try:
                fcntl.flock(fd, mode | fcntl.LOCK_NB)
            except OSError as error:
                lock.release()
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    with translated("lock", path):
                        raise
                if time.monotonic() >= deadline:
                    raise LockedError(f"{path} is locked by another process") from None
                time.sleep(0.02)
                continue
            if lock.held:
                return lock
            lock.release()

    def now_ns(self) -> int:
        """Nanoseconds since 1970, UTC. For display and undo windows only, never for ordering."""
        return time.time_ns()

    def seconds(self) -> float:
        """A clock that only goes forward, for durations."""
        return time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Let others go on for a while."""
        time.sleep(seconds)

    def process(self) -> int:
        """This process's id: how a forked child notices that it is one."""
        return os.getpid()

    def host(self) -> str:
        """This machine's name, for people."""
        return platform.node() or "localhost"


def _open_for_lock(path: Path, shared: bool) -> int:
    common = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | common, 0o644)
    except IsADirectoryError:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | common)
    except OSError as error:
        if not shared or error.errno not in (errno.EACCES, errno.EROFS):
            raise
        return os.open(path, os.O_RDONLY | common)


_NETWORK: Final = frozenset(
    (
        *(
            "9p",
            "acfs",
            "afs",
            "beegfs",
            "ceph",
            "cifs",
            "coda",
            "gfs",
            "gfs2",
            "glusterfs",
            "gpfs",
            "lustre",
        ),
        *("ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "smb2", "smb3", "smbfs", "vboxsf"),
        *("virtiofs", "vmhgfs", "wekafs"),
    )
)
_LOCAL_FUSE: Final = frozenset(
    f"fuse.{name}" for name in ("bindfs", "encfs", "fuse-overlayfs", "gocryptfs", "mergerfs", "ntfs-3g")
)


def _is_network(kind: str) -> bool:
    """Of FUSE file systems only those are taken for local that are known to be."""
    return kind in _NETWORK or (kind.split(".")[0] == "fuse" and kind not in _LOCAL_FUSE)


def _mounted_type(table: str, device: str, path: str) -> str | None:
    """The file system type of a path, from the lines of mountinfo (proc(5)).

    A line is that of the path if its mount point lies above it; the longest wins, of equally long ones the
    last, which covers the others. Lines of the path's own device come before all others: a bind mount may
    hide what its mount point says.
    """
    best: tuple[bool, int] | None = None
    found = None
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not after:
            continue
        point = fields[4].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
        if path != point and not path.startswith(point.rstrip("/") + "/"):
            continue
        rank = (fields[2] == device, len(point))
        if best is None or rank >= best:
            best, found = rank, after.split(" ")[0]
    return found


def reserved_memory(nbytes: int) -> memoryview:
    """Zeroed memory of which only the pages that are written take room, however much it is.

    MemoryError if the machine refuses even the address space.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if sys.platform == "linux":
        flags |= _MAP_NORESERVE
    try:
        return memoryview(mmap.mmap(-1, nbytes, flags=flags))
    except OSError as error:
        raise MemoryError(str(error)) from None


_MAP_NORESERVE: Final = 0x4000
"""Linux's, which the mmap module does not name in every version of Python."""


def random_name() -> str:
    """Twelve hex digits that nobody else draws."""
    return os.urandom(6).hex()


def environment_variable(name: str) -> str | None:
    """A process environment variable; None if unset or empty."""
    return os.environ.get(name) or None


def login() -> str:
    """The user's login name, or their number where there is no user database (containers)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid{os.getuid()}"


def usable_cpus() -> int:
    """CPUs this process may use: the smaller of its affinity and its cgroup's quota, at least 1."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cpus = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    return max(1, cpus)


def new_scratch_folder() -> Path:
    """A new folder where temporary files go, for its owner alone. Whoever makes it removes it."""
    with translated("create", Path(tempfile.gettempdir())):
        return Path(tempfile.mkdtemp(prefix="ckpt-"))


@contextlib.contextmanager
def scratch_folder(above: Path | None = None) -> Iterator[Path]:
    """A new folder for the time of the block, in `above` or where temporary files go. Removed at its end."""
    with translated("create", above or Path(tempfile.gettempdir())):
        folder = tempfile.TemporaryDirectory(prefix="ckpt-", dir=above, ignore_cleanup_errors=True)
    with folder as name:
        yield Path(name)


class Folder:
    """An open folder of the user's, for reading and writing files beneath it without following links.

    Each step is taken with `openat` and O_NOFOLLOW from the descriptor before it, so neither a name
    from a repository nor a symlink planted on the way can lead outside.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self.path = path

    @classmethod
    def open(cls, path: Path, *, create: bool = False) -> Folder:
        """The folder at a path that a person named (links in it are theirs and are followed)."""
        with translated("open", path):
            if create:
                os.makedirs(path, exist_ok=True)
            return cls(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), path)

    def enter(self, name: str, *, create: bool = False) -> Folder:
        """A folder directly inside. FileNotFoundError if missing; StorageError through a symlink."""
        check_name(name)
        path = self.path / name
        with translated("open", path):
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o755, dir_fd=self._fd)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
            return Folder(os.open(name, flags, dir_fd=self._fd), path)

    def names(self) -> list[str]:
        """Sorted names inside."""
        with translated("list", self.path):
            return sorted(os.listdir(self._fd))

    def kind(self, name: str) -> str | None:
        """'file', 'folder', 'link', 'other', or None if there is nothing of that name."""
        check_name(name)
        with translated("look at", self.path / name):
            try:
                mode = os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_mode
            except FileNotFoundError:
                return None
        if stat.S_ISREG(mode):
            return "file"
        if stat.S_ISDIR(mode):
            return "folder"
        return "link" if stat.S_ISLNK(mode) else "other"

    def stat(self, name: str) -> tuple[int, int]:
        """(size in bytes, permission bits) of a file."""
        check_name(name)
        with translated("look at", self.path / name):
            found = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        return found.st_size, stat.S_IMODE(found.st_mode)

    def open_file(self, name: str) -> ReadFile:
        """A regular file inside, for reading."""
        check_name(name)
        path = self.path / name
        file = ReadFile.__new__(ReadFile)
        file.path = path
        with translated("open", path):
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = os.open(name, flags, dir_fd=self._fd)
        _require_file(fd, path)
        file._fd = fd
        return file

    def read_link(self, name: str) -> str:
        """Where a symlink points, unread."""
        check_name(name)
        with translated("read", self.path / name):
            return os.readlink(name, dir_fd=self._fd)

    @contextlib.contextmanager
    def writing(self, name: str, mode: int) -> Iterator[WriteFile]:
        """Write a file that appears under its name only when complete, synced, with these permissions."""
        check_name(name)
        temporary = f".{random_name()}.ckpt-tmp"
        path = self.path / name
        file = WriteFile.__new__(WriteFile)
        file.path, file.size = path, 0
        with translated("create", path):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            file._fd = os.open(temporary, flags, 0o600, dir_fd=self._fd)
        try:
            with file:
                yield file
                with translated("set the permissions of", path):
                    os.fchmod(file._fd, mode & 0o777)
                file.sync()
            with translated("write", path):
                os.replace(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._fd)
            raise

    def write_link(self, name: str, target: str) -> None:
        """Make a symlink, replacing a file or link of that name. Its target is not looked at."""
        check_name(name)
        temporary = f".{random_name()}.ckpt-tmp"
        with translated("write", self.path / name):
            os.symlink(target, temporary, dir_fd=self._fd)
            os.replace(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def remove(self, name: str) -> None:
        """Unlink a file or link; fine if it is gone."""
        check_name(name)
        with translated("remove", self.path / name), contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def remove_folder(self, name: str) -> None:
        """Remove an empty folder. StorageError if it is not empty."""
        check_name(name)
        with translated("remove", self.path / name):
            os.rmdir(name, dir_fd=self._fd)

    def sync(self) -> None:
        """Return when the names in this folder are on the medium."""
        with translated("sync", self.path):
            os.fsync(self._fd)

    def close(self) -> None:
        """Give the descriptor back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_name(name: str) -> None:
    """Refuse a name that is not exactly one ordinary step below a folder."""
    if name in ("", ".", "..") or "/" in name or not _nameable(name):
        raise StorageError(f"refusing the file name {name!r}: it is no step below a folder")


def check_target(target: str) -> None:
    """Refuse text that no symbolic link can hold."""
    if not target or not _nameable(target):
        raise StorageError(f"refusing the link target {target!r}: no link can point there")


def _nameable(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return False
