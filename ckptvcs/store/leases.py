"""Leases: how a collector knows that a pack nobody published yet still has a living writer.

A lease is a file under `leases/` whose flock its process holds. The kernel lets go when the process
dies, so no clock, no heartbeat and no process id decides (docs/format.md, "Leases"). Pack names are made
of the lease's UUID and a running number, so no name is ever used twice.
"""

from __future__ import annotations

import contextlib
import uuid
from typing import Final

from ckptvcs.disk import Disk, Lock, ThreadLock
from ckptvcs.errors import LockedError, StorageError
from ckptvcs.store.format import Layout, PackName

_WAIT: Final = 10.0


class Lease:
    """This process's right to leave unpublished packs lying about. Taken anew after a fork."""

    def __init__(self, disk: Disk, layout: Layout) -> None:
        self._disk = disk
        self._layout = layout
        self._mutex = ThreadLock()
        self._lock: Lock | None = None
        self._process = -1
        self._id = b""
        self._seq = 0

    def next_pack(self) -> PackName:
        """A fresh pack name under a lease that is held now, taking one if needed."""
        with self._mutex:
            if self._lock is None or self._process != self._disk.process():
                fresh = uuid.uuid4().bytes
                # A collector that clears away dead leases may hold it for a moment; it finds out that
                # the file is new only by locking it.
                self._lock = self._disk.lock(self._layout.lease(fresh), wait=_WAIT)
                self._id, self._seq, self._process = fresh, 0, self._disk.process()
            self._seq += 1
            return PackName(self._id, self._seq)

    def check(self) -> None:
        """Refuse to go on if the lease was taken away: its packs may have been collected."""
        if self._lock is None or not self._lock.held:
            raise StorageError(
                "this writer's lease is gone, so its packs may have been removed",
                hint="somebody deleted files inside the repository; open it again and retry",
            )

    def release(self) -> None:
        """Give the lease back. Packs that were published no longer need it."""
        with self._mutex:
            lock, self._lock = self._lock, None
            if lock is not None and self._process == self._disk.process():
                with contextlib.suppress(StorageError):
                    self._disk.remove(lock.path)
                lock.release()


def lease_is_live(disk: Disk, layout: Layout, lease: bytes) -> bool:
    """Whether a living process holds this lease."""
    path = layout.lease(lease)
    if not disk.exists(path):
        return False
    try:
        with disk.lock(path):
            return False
    except LockedError:
        return True


def remove_dead_leases(disk: Disk, layout: Layout) -> None:
    """Remove the lease files of dead processes. Each is removed while its lock is held."""
    for name in disk.names(layout.leases):
        path = layout.leases / name
        with contextlib.suppress(LockedError), disk.lock(path):
            disk.remove(path)
