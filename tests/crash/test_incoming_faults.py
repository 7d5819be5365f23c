"""Disks that refuse while a bundle is written, and while it is ingested."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptvcs.disk import Disk
from ckptvcs.errors import StorageError
from ckptvcs.ids import ObjectId
from ckptvcs.maintenance.gc import collect
from ckptvcs.maintenance.ingest import ingest
from ckptvcs.store import Store
from ckptvcs.store.index_free import IndexFreeStore
from ckptvcs.testing.faults import FailingDisk
from tests.crash.stores import (
    MAIN,
    Commit,
    commit,
    contents,
    create,
    noise,
    open_store,
    publication,
    put_commit,
    tips,
    verify,
)

ERRORS = [errno.ENOSPC, errno.EIO]
"""One that lasts and one that happens once. `test_faults` shows that others take the same ways."""

pytestmark = pytest.mark.slow

Covered = Callable[[str], None]


def without_index(folder: Path, disk: Disk | None = None) -> IndexFreeStore:
    store = IndexFreeStore(folder / ".ckpt", disk or Disk(), 1)
    store.start()
    return store


def leave(store: Store, parts: list[bytes], old: ObjectId) -> Commit:
    with store.writer(base=old) as writer:
        made = put_commit(writer, parts, [old])
        assert writer.publish(publication(made.id, old))
    return made


def says_why(problem: StorageError, error: int) -> None:
    assert problem.errno == error
    assert problem.path is not None
    assert problem.path in problem.message


def incoming(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / ".ckpt" / "incoming").iterdir())


@pytest.mark.usefixtures("several_packs")
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: errno.errorcode[error])
def test_writing_a_bundle_on_a_failing_disk(scratch: Path, covered: Covered, error: int) -> None:
    """Refused, nothing of the commit stays; the same handle goes on; what was acknowledged arrives."""
    with contextlib.closing(create(scratch)) as store:
        chain = [commit(store, [b"base", noise(1, 900)])]
    failures = []
    for at in range(1, 100):
        disk = FailingDisk()
        with contextlib.closing(without_index(scratch, disk)) as store:
            before = incoming(scratch)
            disk.arm(at, error)
            parts = [noise(1, 900), noise(100 + at, 700), noise(300 + at, 6000)]
            try:
                made = leave(store, parts, chain[-1].id)
            except StorageError as problem:
                says_why(problem, error)
                disk.heal()
                assert tips(store) == {MAIN: chain[-1].id}
                assert [name for name in incoming(scratch) if name not in before] == [], disk.failed
                made = leave(store, parts, chain[-1].id)
            disk.heal()
            assert tips(store) == {MAIN: made.id}
            assert contents(store, made.id) == made.contents
        chain.append(made)
        if disk.failed is None:
            break
        failures.append(disk.failed)
    else:
        pytest.fail("a commit never got through")
    with contextlib.closing(open_store(scratch)) as store:
        assert [each.commit for each in ingest(store).ingested] == [each.id for each in chain[1:]]
        assert tips(store) == {MAIN: chain[-1].id}
        verify(store)
    assert incoming(scratch) == []
    covered(f"{errno.errorcode[error]} at each of {len(failures)} operations")
    assert len(failures) >= 15


@pytest.mark.usefixtures("several_packs")
@pytest.mark.parametrize("links", [True, False], ids=["linked", "copied"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: errno.errorcode[error])
def test_ingestion_on_a_failing_disk(
    scratch: Path, covered: Covered, error: int, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal is no reason for quarantine: the bundle stays, and arrives once there is space."""
    if not links:
        monkeypatch.setattr(FailingDisk, "link", lambda *_: False)
    with contextlib.closing(create(scratch)) as store:
        tip = commit(store, [b"base", noise(1, 900)])
    failures = []
    for at in range(1, 100):
        with contextlib.closing(without_index(scratch)) as store:
            made = leave(store, [noise(1, 900), noise(100 + at, 700), noise(300 + at, 6000)], tip.id)
        disk = FailingDisk()
        with contextlib.closing(open_store(scratch, disk)) as store:
            disk.arm(at, error)
            try:
                ingest(store)
            except StorageError as problem:
                says_why(problem, error)
            disk.heal()
            assert tips(store)[MAIN] in (tip.id, made.id)
            collect(store, grace=0, dry_run=False, who="test")
            report = ingest(store)
            assert report.quarantined == []
            assert tips(store) == {MAIN: made.id}
            assert contents(store, made.id) == made.contents
            verify(store)
        assert incoming(scratch) == []
        assert list((scratch / ".ckpt" / "quarantine").iterdir()) == []
        tip = made
        if disk.failed is None:
            break
        failures.append(disk.failed)
    else:
        pytest.fail("an ingestion never got through")
    covered(f"{errno.errorcode[error]} at each of {len(failures)} operations")
    assert len(failures) >= 10
