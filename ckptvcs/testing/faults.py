"""Disks that fail: on purpose, at a chosen operation, with a chosen error."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ckptvcs.disk import Disk, Lock, ReadFile, WriteFile, translated
from ckptvcs.ids import Buffer

_NO_SPACE: Final = frozenset((errno.ENOSPC, errno.EDQUOT))


class FailingDisk(Disk):
    """The real file system, whose n-th change, or n-th read, fails.

    Counted are create, append, write, truncate, sync, make_dir, publish, link, rename, protect, remove,
    sync_dir and the making of lock files. `arm` starts counting anew. A failing write leaves half of its
    bytes. ENOSPC and EDQUOT stay for every later operation that needs space, as on a full disk, until `heal`;
    other errors happen once.

    `arm_reads` counts what is read from files instead, once.

    A file whose sync failed must be given up: writing or syncing it again is an AssertionError, because
    Linux drops the dirty pages and the second sync would lie (fsyncgate).

    Attributes:
        operations: what happened since `arm`, in words.
        failed: the first operation that failed, or None.
    """

    def __init__(self) -> None:
        self.operations: list[str] = []
        self.failed: str | None = None
        self._at: int | None = None
        self._reads_at: int | None = None
        self._error = 0
        self._mutex = threading.Lock()

    def arm(self, at: int, error: int) -> None:
        """Fail the `at`-th operation from now on, counted from 1."""
        self.operations, self.failed = [], None
        self._at, self._reads_at, self._error = at, None, error

    def arm_reads(self, at: int, error: int = errno.EIO) -> None:
        """Fail the `at`-th read of a file from now on, counted from 1."""
        self.operations, self.failed = [], None
        self._at, self._reads_at, self._error = None, at, error

    def heal(self) -> None:
        """Fail no more."""
        self._at = self._reads_at = None

    def reading(self, path: Path) -> None:
        """Count one read, and fail if its turn has come."""
        with self._mutex:
            if self._reads_at is None:
                return
            self._reads_at -= 1
            if self._reads_at:
                return
            self.failed = f"read {path.name}"
            error = OSError(self._error, os.strerror(self._error), str(path))
        with translated("read", path):
            raise error

    def step(self, action: str, path: Path, *, needs_space: bool) -> None:
        """Count one operation, and fail if its turn has come."""
        with self._mutex:
            self.operations.append(f"{action} {path.name}")
            if self._at is None or len(self.operations) < self._at:
                return
            first = len(self.operations) == self._at
            lasting = self._error in _NO_SPACE
            if lasting and not needs_space:
                if first:
                    self._at += 1  # a full disk does not refuse this: the next one fails
                return
            if not first and not lasting:
                return
            self.failed = self.failed or self.operations[-1]
            error = OSError(self._error, os.strerror(self._error), str(path))
        with translated(action, path):
            raise error

    def open(self, path: Path) -> ReadFile:
        return _FailingReadFile(self, path)

    def read(self, path: Path) -> bytes:
        self.reading(path)
        return super().read(path)

    def create(self, path: Path, mode: int = 0o644) -> WriteFile:
        self.step("create", path, needs_space=True)
        file = _FailingFile(self, path, create=True, mode=mode)
        self.adopt(path)
        return file

    def append(self, path: Path) -> WriteFile:
        self.step("open", path, needs_space=False)
        return _FailingFile(self, path, create=False)

    def make_dir(self, path: Path) -> None:
        self.step("create", path, needs_space=True)
        super().make_dir(path)

    def publish(self, temporary: Path, final: Path) -> None:
        self.step("publish", final, needs_space=True)
        super().publish(temporary, final)

    def link(self, existing: Path, new: Path) -> bool:
        self.step("link", new, needs_space=True)
        return super().link(existing, new)

    def rename(self, old: Path, new: Path) -> None:
        self.step("rename", old, needs_space=True)
        super().rename(old, new)

    def protect(self, path: Path) -> None:
        self.step("protect", path, needs_space=False)
        super().protect(path)

    def remove(self, path: Path) -> None:
        self.step("remove", path, needs_space=False)
        super().remove(path)

    def sync_dir(self, path: Path) -> None:
        self.step("sync", path, needs_space=True)
        super().sync_dir(path)

    def lock(self, path: Path, *, shared: bool = False, wait: float = 0.0) -> Lock:
        if not os.path.lexists(path):
            self.step("lock", path, needs_space=True)
        return super().lock(path, shared=shared, wait=wait)


class _FailingReadFile(ReadFile):
    def __init__(self, disk: FailingDisk, path: Path) -> None:
        super().__init__(path)
        self._disk = disk

    def read_into(self, buffer: memoryview, offset: int) -> int:
        self._disk.reading(self.path)
        return super().read_into(buffer, offset)

    def read(self, offset: int, length: int) -> bytes:
        self._disk.reading(self.path)
        return super().read(offset, length)


class _FailingFile(WriteFile):
    def __init__(self, disk: FailingDisk, path: Path, *, create: bool, mode: int = 0o644) -> None:
        super().__init__(path, create=create, mode=mode)
        self._disk = disk
        self._given_up = False

    def write(self, buffers: Sequence[Buffer]) -> None:
        assert not self._given_up, f"{self.path} is written although its sync failed"
        try:
            self._disk.step("write", self.path, needs_space=True)
        except OSError:
            data = b"".join(bytes(buffer) for buffer in buffers)
            super().write([data[: len(data) // 2]])
            raise
        super().write(buffers)

    def read(self, offset: int, length: int) -> bytes:
        self._disk.reading(self.path)
        return super().read(offset, length)

    def truncate(self, size: int) -> None:
        self._disk.step("truncate", self.path, needs_space=False)
        super().truncate(size)

    def sync(self) -> None:
        assert not self._given_up, f"{self.path} is synced again although its sync failed"
        try:
            self._disk.step("sync", self.path, needs_space=True)
        except OSError:
            self._given_up = True
            raise
        super().sync()
