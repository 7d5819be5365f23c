"""Power cuts at every operation of every protocol of the store, each checked for what it must not lose."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ckptvcs.errors import CkptError
from ckptvcs.ids import ObjectId
from ckptvcs.maintenance.gc import collect
from ckptvcs.store import Move, Store
from ckptvcs.testing.crashes import (
    CrashState,
    Explored,
    FolderSynced,
    Operation,
    RecordingDisk,
    Synced,
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
    parents,
    publication,
    put_commit,
    tips,
    verify,
)

SEED = 20_240_601
Report = Callable[[Explored, int], None]


@dataclass(frozen=True)
class Promise:
    """A ref was said to stand at a commit: durable in the index, or in the journal as well."""

    commit: Commit
    journalled: bool = False


Where = Callable[[Store, list[Promise]], None]
"""Whether refs stand where the promises allow."""


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
    return {"seed": SEED, "exhaustive": 4 if few else 8, "sample": 2 if few else 12}


def check_repository(known: list[Commit], where: Where | None = None) -> Callable[[Path, CrashState], None]:
    """A checker: what the state promises is there, nothing is half there, and work goes on.

    `known` holds every commit of the scenario. `where` judges the refs; by default a ref stands at what was
    promised last or at a child of it.
    """
    expected = {each.id: each.contents for each in known}

    def check(folder: Path, state: CrashState) -> None:
        promises = [what for what in state.acknowledged if isinstance(what, Promise)]
        check_one(folder, promises)
        # The same crash, and the index is lost with it: packs and journal must suffice.
        without = folder.with_name(folder.name + "-without-index")
        without.mkdir()
        state.materialise(without)
        shutil.rmtree(without / ".ckpt" / "meta", ignore_errors=True)
        check_one(without, [promise for promise in promises if promise.journalled])
        shutil.rmtree(without)

    def check_one(folder: Path, promises: list[Promise]) -> None:
        with contextlib.closing(open_store(folder)) as store:
            verify(store)
            for promise in promises:
                assert contents(store, promise.commit.id) == promise.commit.contents
            (where or at_the_last_or_its_child)(store, promises)
            standing = tips(store)
            for name, tip in standing.items():
                assert contents(store, tip) == expected[tip], name
            before = refs(store)
            after = commit(store, [b"after the crash", noise(99, 700)], standing.get(MAIN))
            assert contents(store, after.id) == after.contents
            assert refs(store) == {**before, MAIN: after.id}
        shutil.rmtree(folder / ".ckpt" / "meta")
        with contextlib.closing(open_store(folder)) as store:
            assert refs(store) == {**before, MAIN: after.id}
            verify(store)

    return check


def at_the_last_or_its_child(store: Store, promises: list[Promise]) -> None:
    """Each ref stands at the commit it was last said to stand at, or at a child nobody heard of yet."""
    standing = tips(store)
    for promise in {promise.commit.ref: promise for promise in promises}.values():
        tip = standing.get(promise.commit.ref)
        assert tip is not None, f"{promise.commit.ref} is gone"
        assert promise.commit.id in (tip, *parents(store, tip)), f"{promise.commit} is lost"


def refs(store: Store) -> dict[str, ObjectId | str]:
    """All refs, HEAD included."""
    with store.snapshot() as snapshot:
        return snapshot.refs()


def publish(store: Store, disk: RecordingDisk, parts: list[bytes], old: Commit | None) -> Commit:
    """A commit in which each step is promised when it returns."""
    with store.writer() as writer:
        made = put_commit(writer, parts, [old.id] if old else [])
        assert writer.publish(publication(made.id, old.id if old else None))
    disk.acknowledge(Promise(made))
    store.catch_up_journal()
    disk.acknowledge(Promise(made, journalled=True))
    return made


def test_init(scratch: Path, breadth: dict[str, int], report: Report) -> None:
    """A repository is absent or whole, and absent only before `create` returned."""
    home = scratch / "home"
    home.mkdir()
    disk = RecordingDisk(home)
    create(home, disk).close()
    disk.acknowledge("created")

    def check(folder: Path, state: CrashState) -> None:
        root = folder / ".ckpt"
        if not (root / "format").exists():
            assert not root.exists(), "half a repository is visible"
            assert not state.acknowledged, "the repository is gone"
            create(folder).close()
        with contextlib.closing(open_store(folder)) as store:
            assert refs(store) == {"HEAD": MAIN}
            made = commit(store, [b"first"])
            assert contents(store, made.id) == (b"first",)
            verify(store)
        assert [path.name for path in folder.iterdir()] == [".ckpt"] or "format" not in state.last
        shutil.rmtree(root / "meta")
        with contextlib.closing(open_store(folder)) as store:
            assert refs(store) == {"HEAD": MAIN, MAIN: made.id}

    report(explore(disk.log, scratch, check, **breadth), 50)


@pytest.mark.usefixtures("several_packs")
@pytest.mark.parametrize("number", [1, 2], ids=["first", "second"])
def test_commit(scratch: Path, breadth: dict[str, int], report: Report, number: int) -> None:
    """A commit of several packs, into an empty repository or onto another commit."""
    home = scratch / "home"
    home.mkdir()
    shared = noise(1, 900)
    known = []
    with contextlib.closing(create(home)) as store:
        if number == 2:
            known.append(commit(store, [shared, b"a" * 700]))
    disk = RecordingDisk(home)
    for old in known:
        disk.acknowledge(Promise(old, journalled=True))
    with contextlib.closing(open_store(home, disk)) as store:
        known.append(
            publish(store, disk, [shared, noise(2, 1500), noise(3, 5000)], known[-1] if known else None)
        )
    report(explore(disk.log, scratch, check_repository(known), **breadth), 100)


@pytest.mark.usefixtures("several_packs")
def test_lost_race(scratch: Path, breadth: dict[str, int], report: Report) -> None:
    """The commit that lost its race is kept under the name it was told, and so is the winner."""
    home = scratch / "home"
    home.mkdir()
    with contextlib.closing(create(home)) as store:
        base = commit(store, [b"base"])
        winner = commit(store, [b"winner"], base.id)
    disk = RecordingDisk(home)
    disk.acknowledge(Promise(winner, journalled=True))
    with contextlib.closing(open_store(home, disk)) as store, store.writer() as writer:
        made = put_commit(writer, [noise(4, 600), noise(5, 800)], [base.id])
        assert not writer.publish(publication(made.id, base.id))
        rescued = Commit(made.id, made.contents, f"refs/lost/main/{made.id.short}")
        disk.acknowledge(Promise(rescued))
        store.catch_up_journal()
        disk.acknowledge(Promise(rescued, journalled=True))
    report(explore(disk.log, scratch, check_repository([base, winner, rescued]), **breadth), 60)


def test_ref_moves(scratch: Path, breadth: dict[str, int], report: Report) -> None:
    """A branch is made, moved together with another, and deleted."""
    home = scratch / "home"
    home.mkdir()
    with contextlib.closing(create(home)) as store:
        first = commit(store, [b"first"])
        second = commit(store, [b"second"], first.id)
    other = "refs/heads/other"
    steps: list[tuple[ObjectId, ObjectId | None]] = [
        (second.id, None),
        (second.id, first.id),
        (first.id, second.id),
        (first.id, None),
    ]
    disk = RecordingDisk(home)
    disk.acknowledge(Promise(second, journalled=True))
    with contextlib.closing(open_store(home, disk)) as store:
        for (main, branch), (new_main, new_branch) in itertools.pairwise(steps):
            moves = [Move(other, branch, new_branch)]
            moves += [Move(MAIN, main, new_main)] if main != new_main else []
            assert store.update(moves, who="test", why="move")
            disk.acknowledge(Promise(first, journalled=True))

    def where(store: Store, promises: list[Promise]) -> None:
        standing = tips(store)
        reached = max(0, len(promises) - 1)
        # All moves of one update happened, or none; and at most one update that nobody heard of yet.
        assert (standing[MAIN], standing.get(other)) in steps[reached : reached + 2]

    report(explore(disk.log, scratch, check_repository([first, second], where), **breadth), 15)


def test_journal_catches_up(scratch: Path, breadth: dict[str, int], report: Report) -> None:
    """Many entries are appended at once behind a torn line; torn anywhere, nothing is lost."""
    home = scratch / "home"
    home.mkdir()
    with contextlib.closing(create(home)) as store:
        known = [commit(store, [b"base"])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "catch_up_journal", lambda _: None)
            for number in range(8):
                known.append(commit(store, [b"%d" % number], known[-1].id, message="x" * 200))
                store.update(
                    [Move("refs/tags/" + "t" * 150 + str(number), None, known[-1].id)], who="me", why="tag"
                )
    journal = home / ".ckpt" / "refs.journal"
    journal.write_bytes(journal.read_bytes() + b"3 0123456789abcdef torn " + b"j" * 700)
    disk = RecordingDisk(home)
    disk.acknowledge(Promise(known[-1]))
    with contextlib.closing(open_store(home, disk)):
        pass
    disk.acknowledge(Promise(known[-1], journalled=True))
    report(explore(disk.log, scratch, check_repository(known), **breadth), 30)


def test_rebuild(scratch: Path, breadth: dict[str, int], report: Report) -> None:
    """A rebuild is cut off; the next open rebuilds again, and afterwards there is one index."""
    home = scratch / "home"
    home.mkdir()
    with contextlib.closing(create(home)) as store:
        first = commit(store, [noise(6, 800)])
        second = commit(store, [noise(6, 800), b"more"], first.id)
    disk = RecordingDisk(home)
    disk.acknowledge(Promise(second, journalled=True))
    with contextlib.closing(open_store(home, disk)) as store:
        store.rebuild()
        store.reopen()
        third = publish(store, disk, [b"third"], second)
    report(explore(disk.log, scratch, check_repository([first, second, third]), **breadth), 80)


def test_rebuild_of_missing_index(scratch: Path, breadth: dict[str, int], report: Report) -> None:
    """The same when `meta` was gone already."""
    home = scratch / "home"
    home.mkdir()
    with contextlib.closing(create(home)) as store:
        first = commit(store, [noise(6, 800)])
    shutil.rmtree(home / ".ckpt" / "meta")
    disk = RecordingDisk(home)
    disk.acknowledge(Promise(first, journalled=True))
    with contextlib.closing(open_store(home, disk)) as store:
        second = publish(store, disk, [b"second"], first)
    report(explore(disk.log, scratch, check_repository([first, second]), **breadth), 50)


def test_folder_made_by_a_writer_that_died(scratch: Path, breadth: dict[str, int], report: Report) -> None:
    """A pack folder that is there need not be durable: whoever publishes into it must see to that."""

    class Dying(RecordingDisk):
        armed = True

        def sync_dir(self, path: Path) -> None:
            if self.armed and path.name == "packs":
                self.armed = False
                raise OSError("died here")
            super().sync_dir(path)

    home = scratch / "home"
    home.mkdir()
    with contextlib.closing(create(home)):
        pass
    disk = Dying(home)
    with contextlib.closing(open_store(home, disk)) as store:
        with pytest.raises(OSError, match="died here"):
            commit(store, [b"never"])
        store.lease._seq = 0  # the next pack goes into the same folder
        made = publish(store, disk, [b"acknowledged"], None)
    report(explore(disk.log, scratch, check_repository([made]), **breadth), 20)


@pytest.mark.usefixtures("several_packs")
def test_collection(scratch: Path, breadth: dict[str, int], report: Report) -> None:
    """A collection is cut off: nothing live is lost, and the next one finishes the work."""
    home = scratch / "home"
    home.mkdir()
    shared = noise(7, 900)
    with contextlib.closing(create(home)) as store:
        # Dead: packs of their own, and a pack that the live commit shares a chunk with.
        dead = commit(store, [shared, noise(8, 600), noise(9, 5000)], ref="refs/heads/dead")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ckptvcs.store.writer._SECTION_BYTES", 1 << 30)
            mixed = commit(store, [shared, noise(10, 700), noise(11, 700)], dead.id, "refs/heads/dead")
        tip = commit(store, [shared, noise(10, 700), b"live"])
        assert store.update([Move("refs/heads/dead", mixed.id, None)], who="test", why="delete")
        with store.writer() as writer:
            put_commit(writer, [noise(12, 800), noise(13, 800)])
            writer._seal()
            writer._sealed.clear()  # as if it had died: its packs stay
    with contextlib.closing(open_store(home)) as store:
        planned = collect(store, grace=0, dry_run=True, who="test")
    assert planned.commits == 2
    assert planned.packs >= 3
    assert planned.leftovers > 0
    disk = RecordingDisk(home)
    disk.acknowledge(Promise(tip, journalled=True))
    with contextlib.closing(open_store(home, disk)) as store:
        done = collect(store, grace=0, dry_run=False, who="test")
        disk.acknowledge("collected")
        # What is made right after a collection must not rest on anything it took.
        after = publish(store, disk, [noise(9, 5000), shared, b"after"], tip)
    assert (done.freed, done.disk) == (planned.freed, planned.disk)
    usual = check_repository([tip, after, dead, mixed])

    def check(folder: Path, state: CrashState) -> None:
        again = folder.with_name(folder.name + "-collected")
        again.mkdir()
        state.materialise(again)
        with contextlib.closing(open_store(again)) as store:
            before = refs(store)
            collect(store, grace=0, dry_run=False, who="test")
            verify(store)
            assert refs(store) == before
            assert contents(store, tip.id) == tip.contents
            with store.snapshot() as snapshot:
                assert snapshot.row(dead.id) is None
                assert snapshot.row(mixed.id) is None
                names = {f"{name.text}.pack" for name in snapshot.packs()}
            left = collect(store, grace=0, dry_run=True, who="test")
            assert (left.freed, left.disk, left.records) == (0, 0, 0), "one collection is enough"
        assert {path.name for path in (again / ".ckpt" / "packs").rglob("*.pack")} == names
        shutil.rmtree(again)
        usual(folder, state)

    report(explore(disk.log, scratch, check, **breadth), 100)


@pytest.mark.parametrize(
    "step", ["sync of a pack", "sync of its folder", "sync of packs/", "sync of the journal"]
)
def test_a_missing_step_is_noticed(scratch: Path, step: str) -> None:
    """These tests can fail: without any one of the commit's syncs a crash state breaks a promise."""
    home = scratch / "home"
    home.mkdir()
    create(home).close()
    disk = RecordingDisk(home)
    with contextlib.closing(open_store(home, disk)) as store:
        made = publish(store, disk, [noise(2, 1500)], None)

    def skipped(operation: Operation) -> bool:
        if isinstance(operation, Synced):
            name = disk.log.paths[operation.node]
            return step == ("sync of the journal" if name.endswith("journal") else "sync of a pack")
        if isinstance(operation, FolderSynced):
            name = disk.log.paths[operation.folder]
            return step == ("sync of packs/" if name.endswith("packs") else "sync of its folder")
        return False

    assert any(map(skipped, disk.log.operations))
    disk.log.operations = [each for each in disk.log.operations if not skipped(each)]
    with pytest.raises((AssertionError, OSError, CkptError)) as caught:
        explore(disk.log, scratch, check_repository([made]))
    assert "power cut after operation" in "".join(caught.value.__notes__)


def test_model_of_the_file_system(scratch: Path) -> None:
    """The model itself: content and names are lost apart from each other, and syncs end the doubt."""
    home = scratch / "home"
    home.mkdir()
    disk = RecordingDisk(home)
    with disk.create(home / "a.tmp") as file:
        file.write([b"x" * 600])
        file.sync()
    disk.rename(home / "a.tmp", home / "a")
    disk.sync_dir(home)
    disk.make_dir(home / "d")
    disk.publish(home / "a", home / "d" / "b")
    trees: list[dict[str, bytes | None]] = []
    explored = explore(disk.log, scratch, lambda _, state: trees.append(state.tree))
    x = b"x" * 600
    assert {"a.tmp": x[:512]} in trees
    assert {"a.tmp": bytes(600)} in trees
    assert {"a.tmp": bytes(512) + x[512:]} in trees
    assert {"a.tmp": b""} in trees
    assert {"a": x, "d": None} in trees
    assert {"d": None} in trees, "the unlink may be durable before the link"
    assert {"d": None, "d/b": x, "a": x} in trees
    assert {"a": b""} not in trees, "the content was synced before the rename"
    assert {"a": x, "a.tmp": x} not in trees, "a rename happens whole"
    after = [s for s in trees if "a" not in s and "a.tmp" not in s and "d" not in s]
    assert after == [{}]
    assert explored.checked == len(trees)
