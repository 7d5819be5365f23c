"""Claims: how a process says that a branch is its own to commit to.

A claim is a file under `leases/` whose flock its process holds, like a lease. The kernel lets go when the
process dies, so there are no stale claims, and no clock decides. Its content is a token, and says who holds
it. Who takes a claim over puts another file in its place, so that its token is found there no longer
(docs/format.md, "Leases").

A claim keeps others from claiming, not from committing: that is what the comparison of refs is for. But a
claimant commits only while its claim stands (`Publication.claim`). Claims are written, like refs, in write
transactions of the index: no commit is between its last look at the claim and its move of the ref then.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from ckptvcs.disk import Disk, Lock, random_name
from ckptvcs.errors import LockedError, StorageError
from ckptvcs.ids import ObjectId
from ckptvcs.store.format import Layout
from ckptvcs.store.index import Index

_WAIT: Final = 2.0
"""Seconds to wait for a free claim that somebody holds for a moment: a collector clearing away dead ones."""

_MOST: Final = 1 << 16


class Claim:
    """A claim that stands, or stood.

    Attributes:
        token: what its file holds as long as it stands.
    """

    def __init__(self, disk: Disk, path: Path, token: str, shown: str, lock: Lock | None) -> None:
        """Use `take`. Without a lock it can be checked and not released: another process holds it."""
        self._disk = disk
        self._path = path
        self.token = token
        self._shown = shown
        self._lock = lock
        self._released = False

    @property
    def released(self) -> bool:
        """Whether it was given back."""
        return self._released

    @property
    def held(self) -> bool:
        """Whether it stands."""
        return not self._released and _content(self._disk, self._path).get("token") == self.token

    def check(self) -> None:
        """LockedError (code "claimed") if somebody has taken it over. A claim given back binds nobody."""
        if not self._released and not self.held:
            raise LockedError(
                f"the branch {self._shown} was taken over by {claimant(self._disk, self._path)}",
                hint="this process saves there no longer; it may go on on another branch",
                code="claimed",
            )

    def release(self) -> None:
        """Give it back. The empty file stays for the next claimant, or for a collector to remove."""
        if self._released or self._lock is None:
            return
        if self._lock.held:
            with contextlib.suppress(StorageError):
                self._lock.write(b"")
        self._released = True
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def take(
    disk: Disk,
    layout: Layout,
    index: Index,
    ref: str,
    tip: ObjectId | None,
    holder: Mapping[str, Any],
    *,
    steal: bool = False,
) -> Claim | None:
    """Claim a ref that stands at `tip`; None, and nothing is claimed, if it stands elsewhere.

    LockedError (code "claimed") naming the living claimant, unless `steal`.
    """
    path = layout.claim(ref)
    token = random_name() + random_name()
    lock: Lock | None = None
    try:
        lock = disk.lock(path, wait=0 if steal else _WAIT)
    except LockedError:
        if not steal:
            raise refusal(ref, claimant(disk, path)) from None
    try:
        with index.change() as change:
            if change.ref(ref) != tip:
                if lock is not None:
                    lock.release()
                return None
            if lock is None:
                disk.remove(path)
                lock = disk.lock(path)
            lock.write(json.dumps({"token": token, **holder}).encode())
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return Claim(disk, path, token, _shown(ref), lock)


def standing(disk: Disk, layout: Layout, ref: str, token: str) -> Claim:
    """The claim with this token, which another process took."""
    return Claim(disk, layout.claim(ref), token, _shown(ref), None)


def living(disk: Disk, layout: Layout, ref: str) -> str | None:
    """The living process that has claimed a ref, in words; None if nobody has."""
    path = layout.claim(ref)
    if not disk.exists(path):
        return None
    try:
        with disk.lock(path):
            return None
    except LockedError:
        return claimant(disk, path)


def refusal(ref: str, who: str) -> LockedError:
    """The error for those who want what another has claimed."""
    return LockedError(
        f"the branch {_shown(ref)} is claimed by {who}",
        hint="stop it or wait for its end, work on another branch, or take over with steal=True",
        code="claimed",
    )


def restored(disk: Disk, layout: Layout) -> set[ObjectId]:
    """The commits whose states living claimants restored before they claimed."""
    found = set()
    for name in disk.names(layout.leases):
        path = layout.leases / name
        origin = _content(disk, path).get("origin") if name.startswith("claim-") else None
        if isinstance(origin, str):
            with contextlib.suppress(ValueError):
                id = ObjectId.parse(origin)
                try:
                    disk.lock(path).release()
                except LockedError:
                    found.add(id)
    return found


def _shown(ref: str) -> str:
    return ref.removeprefix("refs/heads/")


def _content(disk: Disk, path: Path) -> dict[str, Any]:
    try:
        with disk.open(path) as file:
            found = json.loads(file.read(0, _MOST))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def claimant(disk: Disk, path: Path) -> str:
    """Who holds a claim, in words, as far as its file tells."""
    found = _content(disk, path)
    process, host, job, author = (found.get(name) for name in ("process", "host", "job", "author"))
    if not host:
        return "another process"
    mine = process == disk.process() and host == disk.host()
    words = [f"job {job}:" if job else "", "this process" if mine else f"process {process}", f"on {host}"]
    words.append(f"({author})" if author else "")
    return " ".join(" ".join(words).split())[:300]
