"""Power cuts while a bundle is written, while it is taken up, while a shared repository is made, and while
the index's address space grows."""

from __future__ import annotations

import contextlib
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptvcs.disk import Disk
from ckptvcs.ids import ObjectId
from ckptvcs.maintenance.gc import collect
from ckptvcs.maintenance.ingest import ingest
from ckptvcs.store import Store
from ckptvcs.store.index_free import IndexFreeStore
from ckptvcs.testing.crashes import (
    CrashState,
    Explored,
    FolderSynced,
    Linked,
    Operation,
    RecordingDisk,
    explore,
)
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

SEED = 20_261_125
Report = Callable[[Explored, int], None]


@pytest.fixture
def report(covered: Callable[[str], None]) -> Report:
    """Print what an exploration covered, and insist on a least number of distinct states."""

    def say(explored: Explored, least: int) -> None:
        covered(str(explored))
        assert explored.enumerated >= explored.checked >= least, explored

    return say


@pytest.fixture(params=["few", pytest.param("many", marks=pytest.mark.slow)])
def breadth(request: pytest.FixtureRequest) -> dict[str, int]:
    """How many states an exploration looks at."""
    few = request.param == "few"
    return {"seed": SEED, "exhaustive": 3 if few else 8, "sample": 1 if few else 12}


def without_index(folder: Path, disk: Disk | None = None) -> IndexFreeStore:
    store = IndexFreeStore(folder / ".ckpt", disk or Disk(), 1)
    store.start()
    return store


def leave(store: Store, parts: list[bytes], old: ObjectId | None) -> Commit:
    """A commit without the index."""
    with store.writer(base=old) as writer:
        made = put_commit(writer, parts, [old] if old else [])
        assert writer.publish(publication(made.id, old))
    return made


def arrived(folder: Path, chain: list[Commit], least: int) -> None:
    """Ingestion brings the branch to a commit of the chain, no less far than `least`, and leaves nothing."""
    with contextlib.closing(open_store(folder)) as store:
        ingest(store)
        at = [each.id for each in chain].index(tips(store)[MAIN])
        assert at >= least, f"{chain[least]} is lost"
        for each in chain[: at + 1]:
            assert contents(store, each.id) == each.contents
        verify(store)
        again = ingest(store)
        assert (again.ingested, again.quarantined) == ([], [])
        assert tips(store).keys() == {MAIN}
        verify(store)
        after = commit(store, [b"after", noise(99, 700)], chain[at].id)
        collect(store, grace=0, dry_run=False, who="test")
        assert contents(store, after.id) == after.contents
        verify(store)
    assert list((folder / ".ckpt" / "quarantine").iterdir()) == []
    assert not list((folder / ".ckpt" / "incoming").glob("*.bundle"))
    shutil.rmtree(folder / ".ckpt" / "meta")
    with contextlib.closing(open_store(folder)) as store:
        assert tips(store) == {MAIN: after.id}
        verify(store)


def check(chain: list[Commit]) -> Callable[[Path, CrashState], None]:
    """What was acknowledged arrives, with the index that is there and with one made anew."""

    def look(folder: Path, state: CrashState) -> None:
        least = max([0, *(number for number in state.acknowledged if isinstance(number, int))])
        without = folder.with_name(folder.name + "-without-index")
        without.mkdir()
        state.materialise(without)
        shutil.rmtree(without / ".ckpt" / "meta", ignore_errors=True)
        # A handle without the index sees what is acknowledged, before and after.
        with contextlib.closing(without_index(without)) as store:
            seen = tips(store)[MAIN]
            at = [each.id for each in chain].index(seen)
            assert at >= least
            assert contents(store, seen) == chain[at].contents
        arrived(without, chain, least)
        shutil.rmtree(without)
        arrived(folder, chain, least)

    return look


@pytest.mark.usefixtures("several_packs")
def test_writing_a_bundle(scratch: Path, breadth: dict[str, int], report: Report) -> None:
    """Two commits without the index, each of several packs."""
    home = scratch / "home"
    home.mkdir()
    shared = noise(1, 900)
    with contextlib.closing(create(home)) as store:
        chain = [commit(store, [shared, b"a" * 700])]
    disk = RecordingDisk(home)
    with contextlib.closing(without_index(home, disk)) as store:
        for number in (1, 2):
            chain.append(
                leave(store, [shared, noise(10 * number, 1500), noise(10 * number + 1, 5000)], chain[-1].id)
            )
            disk.acknowledge(number)
    report(explore(disk.log, scratch, check(chain), **breadth), 60)


@pytest.mark.usefixtures("several_packs")
@pytest.mark.parametrize("links", [True, False], ids=["linked", "copied"])
def test_ingestion(
    scratch: Path, breadth: dict[str, int], report: Report, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bundles are taken up, and a collection comes behind."""
    if not links:
        monkeypatch.setattr(Disk, "link", lambda *_: False)
    home = scratch / "home"
    home.mkdir()
    shared = noise(1, 900)
    with contextlib.closing(create(home)) as store:
        chain = [commit(store, [shared, b"a" * 700])]
    with contextlib.closing(without_index(home)) as store:
        for number in (1, 2):
            chain.append(leave(store, [shared, noise(20 + number, 1500), noise(30, 5000)], chain[-1].id))
    disk = RecordingDisk(home)
    disk.acknowledge(2)  # they are durable where they are
    with contextlib.closing(open_store(home, disk)) as store:
        assert len(ingest(store).ingested) == 2
        collect(store, grace=0, dry_run=False, who="test")
    if not links:
        breadth = {**breadth, "exhaustive": breadth["exhaustive"] - 1}
    report(explore(disk.log, scratch, check(chain), **breadth), 40)


def test_quarantine(scratch: Path, breadth: dict[str, int], report: Report) -> None:
    """What is put aside is put aside whole, and comes back whole."""
    home = scratch / "home"
    home.mkdir()
    with contextlib.closing(create(home)) as store:
        first = commit(store, [b"first"])
    with contextlib.closing(without_index(home)) as store:
        chain = [first, leave(store, [noise(5, 900)], first.id)]
    # Its parent is not there when it is taken up, and there later.
    bundle = next((home / ".ckpt" / "incoming").glob("*.bundle"))
    pack = next((home / ".ckpt" / "incoming").glob("*.pack"))
    shutil.copy(pack, scratch / "pack")
    data = pack.read_bytes()
    pack.chmod(0o644)
    pack.write_bytes(data[:-1])
    disk = RecordingDisk(home)
    with contextlib.closing(open_store(home, disk)) as store:
        assert len(ingest(store).quarantined) == 1
        ingest(store, retry=True)

    def look(folder: Path, state: CrashState) -> None:
        with contextlib.closing(open_store(folder)) as store:
            ingest(store)
            assert tips(store) == {MAIN: first.id}
            verify(store)
            ingest(store, retry=True)  # bringing back may have been cut off in the middle
            place = folder / ".ckpt" / "quarantine" / bundle.name
            assert (place / bundle.name).exists()
            assert (place / pack.name).read_bytes() == data[:-1]
            (place / pack.name).unlink()
            shutil.copy(scratch / "pack", place / pack.name)
            assert len(ingest(store, retry=True).ingested) == 1
            assert tips(store) == {MAIN: chain[1].id}
            verify(store)

    report(explore(disk.log, scratch, look, **breadth), 15)


def test_making_a_shared_repository(scratch: Path, breadth: dict[str, int], report: Report) -> None:
    """A repository is absent or whole; modes are no part of a state, but those of what is made are right."""
    home = scratch / "home"
    home.mkdir()
    disk = RecordingDisk(home)
    made = Store.create(home / ".ckpt", disk, config=b"", head=MAIN, who="test", threads=1, mode=0o2770)
    commit(made, [b"one"])
    made.close()
    disk.acknowledge("created")
    for path in (home / ".ckpt", *(home / ".ckpt").rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o2770 if path.is_dir() else 0o440 if path.suffix == ".pack" else 0o660), path

    def look(folder: Path, state: CrashState) -> None:
        root = folder / ".ckpt"
        if not (root / "format").exists():
            assert not root.exists(), "half a repository is visible"
            assert not state.acknowledged, "the repository is gone"
            return
        with contextlib.closing(open_store(folder)) as store:
            tip = tips(store).get(MAIN)
            assert tip is not None or not state.acknowledged
            commit(store, [b"two"], tip)
            verify(store)

    report(explore(disk.log, scratch, look, **breadth), 50)


def test_growing(
    scratch: Path, breadth: dict[str, int], report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index's address space is doubled, or not."""
    monkeypatch.setattr("ckptvcs.store.index.MAP_SIZE", 1 << 19)
    home = scratch / "home"
    home.mkdir()
    with contextlib.closing(create(home)) as store:
        first = commit(store, [bytes([number]) * 40 for number in range(200)])
        while not store.index.nearly_full:
            commit(store, [noise(len(tips(store)), 10)], None, f"refs/heads/b{len(tips(store))}")
    disk = RecordingDisk(home)
    with contextlib.closing(open_store(home, disk)) as store:
        assert store.index._attach(create=False).env.info()["map_size"] == 1 << 20
    disk.acknowledge("grown")

    def look(folder: Path, state: CrashState) -> None:
        with contextlib.closing(open_store(folder)) as store:
            assert store.index._attach(create=False).env.info()["map_size"] == 1 << 20
            assert contents(store, first.id) == first.contents
            verify(store)

    report(explore(disk.log, scratch, look, **breadth), 2)


@pytest.mark.parametrize("step", ["sync of a pack's folder", "name of a pack"])
def test_a_missing_step_of_ingestion_is_noticed(scratch: Path, step: str) -> None:
    """These tests can fail: without a step a crash state breaks a promise."""
    home = scratch / "home"
    home.mkdir()
    with contextlib.closing(create(home)) as store:
        chain = [commit(store, [b"first"])]
    with contextlib.closing(without_index(home)) as store:
        chain.append(leave(store, [noise(5, 900)], chain[0].id))
    disk = RecordingDisk(home)
    disk.acknowledge(1)
    with contextlib.closing(open_store(home, disk)) as store:
        ingest(store)

    def skipped(operation: Operation) -> bool:
        if isinstance(operation, FolderSynced):
            return step.startswith("sync") and "packs/" in disk.log.paths[operation.folder]
        return isinstance(operation, Linked) and step.startswith("name")

    assert any(map(skipped, disk.log.operations))
    disk.log.operations = [each for each in disk.log.operations if not skipped(each)]
    with pytest.raises(Exception, match=r".*") as caught:
        explore(disk.log, scratch, check(chain))
    assert "power cut after operation" in "".join(caught.value.__notes__)
