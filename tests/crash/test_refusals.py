"""Disks that refuse in the middle of operations of many steps, and disks that are really full.

`test_faults.py` does so for commits, ref moves, init and rebuild.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import Repo
from ckptvcs.disk import Disk
from ckptvcs.errors import CkptError, CorruptionError, StorageError
from ckptvcs.maintenance import fsck, gc
from ckptvcs.store import Move, Store
from ckptvcs.testing.faults import FailingDisk
from ckptvcs.testing.same import difference
from tests.crash.stores import MAIN, Commit, commit, contents, create, noise, open_store, tips, verify
from tests.crash.test_faults import ERRORS, Covered, is_one_line, left_over, says_why

DEAD = "refs/heads/dead"


@pytest.fixture
def littered(scratch: Path) -> tuple[Path, list[Commit]]:
    """A repository in which a collection has packs to unlink and packs to compact."""
    home = scratch / "littered"
    home.mkdir()
    with contextlib.closing(create(home)) as store:
        known = [commit(store, [b"base", noise(1, 900), noise(2, 600)])]
        store.update([Move(DEAD, None, known[0].id)], who="test", why="branch")
        half = commit(store, [noise(4, 3000), noise(6, 500), noise(7, 400)], known[0].id, ref=DEAD)
        dead = commit(store, [noise(8, 2000), b"more"], half.id, ref=DEAD)
        known.append(commit(store, [noise(6, 500), noise(7, 400), noise(5, 700)], known[0].id))
        store.update([Move(DEAD, dead.id, None)], who="test", why="branch -d")
    return home, known


def intact(home: Path, known: list[Commit]) -> None:
    """Everything promised is there, with the index and without it."""
    with contextlib.closing(open_store(home)) as store:
        assert tips(store) == {MAIN: known[-1].id}
        for each in known:
            assert contents(store, each.id) == each.contents
        verify(store)


def names_the_sector(problem: CkptError) -> None:
    """Which file could not be read, and why; a check may report it as damage."""
    is_one_line(problem)
    assert isinstance(problem, (StorageError, CorruptionError)), problem
    assert "I/O error" in problem.message, problem


def names_the_full_disk(problem: StorageError) -> None:
    """That it is full, on one line."""
    is_one_line(problem)
    assert problem.code == "disk-full", problem
    assert "full" in problem.message, problem


def copies(home: Path, scratch: Path) -> Iterator[tuple[int, Path]]:
    """Copies of a repository, numbered from 1, each removed afterwards."""
    for at in range(1, 400):
        folder = scratch / "copy"
        shutil.copytree(home, folder, ignore=shutil.ignore_patterns("lock.mdb"))
        yield at, folder
        shutil.rmtree(folder)
    pytest.fail("it never got through")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: errno.errorcode[error])
def test_collection_on_a_failing_disk(
    scratch: Path, littered: tuple[Path, list[Commit]], covered: Covered, error: int
) -> None:
    """A collection that is refused anywhere has lost nothing, and the next one does what is left."""
    home, known = littered
    failures = []
    for at, folder in copies(home, scratch):
        disk = FailingDisk()
        with contextlib.closing(open_store(folder, disk)) as store:
            disk.arm(at, error)
            try:
                gc.collect(store, grace=0, dry_run=False, who="test")
            except StorageError as problem:
                says_why(problem, error)
            disk.heal()
            for each in known:
                assert contents(store, each.id) == each.contents
        intact(folder, known)
        with contextlib.closing(open_store(folder)) as store:
            gc.collect(store, grace=0, dry_run=False, who="test")
            again = gc.collect(store, grace=0, dry_run=True, who="test")
            assert (again.freed, again.leftovers) == (0, 0), disk.failed
        assert not left_over(folder), disk.failed
        shutil.rmtree(folder / ".ckpt" / "meta")
        intact(folder, known)
        if disk.failed is None:
            break
        failures.append(disk.failed)
    shutil.rmtree(scratch / "copy")
    covered(f"{errno.errorcode[error]} at each of {len(failures)} operations")
    assert {failure.split()[0] for failure in failures} >= {"create", "write", "sync", "publish", "lock"}


READS: dict[str, Callable[[Store, list[Commit]], object]] = {
    "reading": lambda store, known: [contents(store, each.id) for each in known],
    "commit": lambda store, known: commit(store, [noise(9, 500), noise(1, 900)], known[-1].id),
    "collection": lambda store, known: gc.collect(store, grace=0, dry_run=False, who="test"),
    "check": lambda store, known: fsck.check(store, full=True),
    "rebuild": lambda store, known: (store.rebuild(), store.reopen()),
}


@pytest.mark.parametrize("what", READS)
def test_reads_that_fail(
    scratch: Path, littered: tuple[Path, list[Commit]], covered: Covered, what: str
) -> None:
    """An unreadable sector is an error that says so: never other bytes, and nothing is given up for it."""
    home, known = littered
    failures = []
    for at, folder in copies(home, scratch):
        disk = FailingDisk()
        with contextlib.closing(open_store(folder, disk)) as store:
            disk.arm_reads(at)
            try:
                READS[what](store, known)
            except CkptError as problem:
                names_the_sector(problem)
            disk.heal()
        with contextlib.closing(open_store(folder)) as store:
            if what == "commit":
                assert contents(store, tips(store)[MAIN])
            else:
                assert tips(store) == {MAIN: known[-1].id}
            for each in known:
                assert contents(store, each.id) == each.contents, disk.failed
            verify(store)
        if disk.failed is None:
            break
        failures.append(disk.failed)
    shutil.rmtree(scratch / "copy")
    covered(f"EIO at each of {len(failures)} reads")
    assert failures or what == "commit"


# -- disks that are full --------------------------------------------------------------------------


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 4 MiB. Only root may mount one."""
    with tempfile.TemporaryDirectory(prefix="ckptvcs-") as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "ckptvcs", folder]
        try:
            done = subprocess.run(mount, capture_output=True, check=False, text=True)
            why = done.stderr.strip() if done.returncode else ""
        except OSError as error:
            why = str(error)
        if why:
            pytest.skip(f"no small file system can be mounted here: {why}")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, left: int) -> Path:
    """A file that leaves so many bytes free."""
    path = folder / "filler"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with path.open("wb") as file:
        file.write(bytes(max(0, free - left)))
    return path


def state(seed: int) -> dict[str, Any]:
    """Something that takes a few pages."""
    return {"w": np.frombuffer(noise(seed, 20_000), np.uint8), "step": seed}


def _branches(repo: Repo) -> None:
    for _ in range(60):
        repo.branch(f"new{len(repo.branches())}")


OPERATIONS: dict[str, Callable[[Repo], object]] = {
    "commit": lambda repo: repo.commit(state(7), "more"),
    "branches": _branches,
    "gc": lambda repo: repo.gc(grace=0),
    "config": lambda repo: repo.configure("compression", "fast"),
    "checkout": lambda repo: repo.checkout_files("HEAD", repo.path / "out"),
    "export": lambda repo: repo.export("HEAD", format="safetensors", to=repo.path / "out", tensors_only=True),
}


@pytest.mark.parametrize("what", [*OPERATIONS, "init", "rebuild"])
def test_a_disk_that_is_full(small_disk: Path, covered: Covered, what: str) -> None:
    """With no space, and with a page more each time: clear words, nothing lost, and space is all it takes.

    LMDB writes its lock file through memory: a page without room ended the process with SIGBUS.
    """
    home = small_disk / "work"
    refused = 0
    for pages in range(120):
        home.mkdir()
        (home / "file").write_bytes(noise(1, 9000))
        with Repo.init(home) as repo:
            first = repo.commit(state(1), "first", files={"file": home / "file"})
            dead = repo.on("dead")
            dead.commit({**state(1), "v": state(5)}, "dead")
            second = repo.commit(state(2), "second", files={"file": home / "file"})
            repo.delete_branch("dead", force=True)
        filler = fill(small_disk, pages * 4096)
        try:
            if what == "init":
                (home / "inner").mkdir()
                Repo.init(home / "inner").close()
            elif what == "rebuild":
                Repo.open(home, rebuild=True).close()
            else:
                with Repo.open(home) as repo:
                    OPERATIONS[what](repo)
        except StorageError as problem:
            refused += 1
            names_the_full_disk(problem)
            with contextlib.suppress(StorageError):  # reading needs no space, but a lock may
                with Repo.open(home) as repo:
                    assert difference(repo.checkout(first), state(1)) is None
            done = False
        else:
            done = True
        filler.unlink()
        with Repo.open(home) as repo:
            for id, expected in ((first, state(1)), (second, state(2))):
                assert difference(repo.checkout(id), expected) is None
            if not done and what in OPERATIONS:
                OPERATIONS[what](repo)
            assert not repo.fsck(full=True).problems
            repo.commit(state(9), "and on")
        shutil.rmtree(home)
        if done:
            break
    else:
        pytest.fail("it never got through")
    covered(f"full with 0 to {pages - 1} pages left, {refused} times refused")
    assert refused or what == "gc"  # which unlinks what is dead as a whole before it needs any space


def test_the_disk_of_the_others_is_not_touched(small_disk: Path) -> None:
    """What a commit that met a full disk had written is gone at once, not with the next collection."""
    with Repo.init(small_disk / "work") as repo:
        repo.commit(state(1), "first")
        filler = fill(small_disk, 1 << 20)
        before = Disk().free_bytes(small_disk)
        with pytest.raises(StorageError, match="full"):
            repo.commit({"large": np.frombuffer(noise(3, 3 << 20), np.uint8)}, "large")
        assert Disk().free_bytes(small_disk) >= before - (64 << 10)
        filler.unlink()
        repo.commit(state(3), "fits")
