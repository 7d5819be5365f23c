"""Disks that refuse, children that are killed, bytes that rot."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptvcs.disk import Disk
from ckptvcs.errors import CkptError, StorageError
from ckptvcs.ids import ObjectId
from ckptvcs.store import Move, Store
from ckptvcs.testing.faults import FailingDisk
from tests.crash.stores import (
    MAIN,
    Commit,
    commit,
    contents,
    create,
    files,
    noise,
    open_store,
    publication,
    put_commit,
    tips,
    verify,
)

ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES]
Covered = Callable[[str], None]


def packs(folder: Path) -> set[str]:
    return {path.name for path in (folder / ".ckpt" / "packs").rglob("*.pack")}


def left_over(folder: Path) -> list[str]:
    """Files that no closed store leaves behind."""
    root = folder / ".ckpt"
    found = [path for name in ("tmp", "leases", "incoming") for path in (root / name).iterdir()]
    return [str(path) for path in [*found, *root.glob("*.tmp")]]


def is_one_line(problem: CkptError) -> None:
    assert problem.message
    assert "\n" not in problem.message


def says_why(problem: StorageError, error: int) -> None:
    """The error names the file and its cause, on one line."""
    is_one_line(problem)
    assert problem.errno == error
    assert problem.path is not None
    assert problem.path in problem.message
    assert problem.code == ("disk-full" if error in (errno.ENOSPC, errno.EDQUOT) else "storage")


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: errno.errorcode[error])
def test_commit_on_a_failing_disk(scratch: Path, several_packs: None, covered: Covered, error: int) -> None:
    """Each operation of a commit fails once: the old tip stays, nothing half-made does, the next works."""
    with contextlib.closing(create(scratch)) as store:
        tip = commit(store, [b"base", noise(1, 900)])
    failures: list[str] = []
    for at in range(1, 200):
        disk = FailingDisk()
        published = packs(scratch)
        parts = [noise(1, 900), noise(100 + at, 700), noise(300 + at, 6000)]
        with contextlib.closing(open_store(scratch, disk)) as store:
            disk.arm(at, error)
            try:
                made = commit(store, parts, tip.id)
            except StorageError as problem:
                says_why(problem, error)
                disk.heal()
                assert tips(store) == {MAIN: tip.id}
                assert contents(store, tip.id) == tip.contents
                made = commit(store, parts, tip.id)  # the same handle goes on once there is space
            else:
                disk.heal()
            assert tips(store) == {MAIN: made.id}
            assert contents(store, made.id) == made.contents
            verify(store)
        if disk.failed is None:
            break
        failures.append(disk.failed)
        tip = made
        assert not left_over(scratch), disk.failed
        with contextlib.closing(open_store(scratch)) as store:
            with store.snapshot() as snapshot:
                indexed = {name.text + ".pack" for name in snapshot.packs()}
            assert packs(scratch) == indexed, disk.failed
            assert indexed > published
            assert verify(store)
    else:
        pytest.fail("a commit never got through")
    shutil.rmtree(scratch / ".ckpt" / "meta")
    with contextlib.closing(open_store(scratch)) as store:
        assert tips(store) == {MAIN: made.id}
        verify(store)
    covered(f"{errno.errorcode[error]} at each of {len(failures)} operations")
    assert len(failures) >= 15
    assert {failure.split()[0] for failure in failures} >= {"create", "write", "sync", "publish", "lock"}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: errno.errorcode[error])
def test_ref_move_on_a_failing_disk(scratch: Path, caplog: pytest.LogCaptureFixture, error: int) -> None:
    """The index has the move; a journal that cannot follow is said and caught up by the next open."""
    with contextlib.closing(create(scratch)) as store:
        tip = commit(store, [b"base"])
    for at in range(1, 50):
        disk = FailingDisk()
        name = f"refs/tags/v{at}"
        with contextlib.closing(open_store(scratch, disk)) as store:
            disk.arm(at, error)
            assert store.update([Move(name, None, tip.id)], who="test", why="tag")
            assert (disk.failed is not None) == ("journal could not be brought up to date" in caplog.text)
            caplog.clear()
            disk.heal()
        with contextlib.closing(open_store(scratch)) as store:
            assert tips(store)[name] == tip.id
        # Rebuilt from a copy of the journal: the open above caught it up.
        shutil.rmtree(scratch / ".ckpt" / "meta")
        with contextlib.closing(open_store(scratch)) as store:
            assert tips(store)[name] == tip.id
        if disk.failed is None:
            break
    else:
        pytest.fail("an update never got through")
    assert at > 3


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: errno.errorcode[error])
def test_init_on_a_failing_disk(scratch: Path, error: int) -> None:
    """`create` leaves nothing behind, whatever fails."""
    for at in range(1, 200):
        home = scratch / str(at)
        home.mkdir()
        disk = FailingDisk()
        disk.arm(at, error)
        try:
            create(home, disk).close()
        except StorageError as problem:
            says_why(problem, error)
            disk.heal()
            if (home / ".ckpt").exists():  # the last sync failed: whole, though not surely durable
                assert disk.failed == f"sync {home.name}"
                open_store(home).close()
            else:
                assert list(home.iterdir()) == []
                create(home).close()
        with contextlib.closing(open_store(home)) as store:
            made = commit(store, [b"first"])
            assert contents(store, made.id) == made.contents
        if disk.failed is None:
            break
    else:
        pytest.fail("init never got through")
    assert at > 20


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: errno.errorcode[error])
def test_rebuild_on_a_failing_disk(scratch: Path, error: int) -> None:
    """A rebuild that fails can be repeated, and nothing is lost."""
    with contextlib.closing(create(scratch)) as store:
        tip = commit(store, [b"base", noise(1, 900)])
    for at in range(1, 100):
        disk = FailingDisk()
        store = open_store(scratch, disk)
        disk.arm(at, error)
        with contextlib.closing(store):
            try:
                store.rebuild()
            except StorageError as problem:
                says_why(problem, error)
        disk.heal()
        with contextlib.closing(open_store(scratch)) as store:
            assert tips(store) == {MAIN: tip.id}
            verify(store)
        if disk.failed is None:
            break
    else:
        pytest.fail("a rebuild never got through")
    assert at > 5


def test_a_failed_sync_is_never_repeated(scratch: Path) -> None:
    """The disk itself refuses what fsyncgate taught."""
    disk = FailingDisk()
    file = disk.create(scratch / "file")
    file.write([b"x"])
    disk.arm(1, errno.EIO)
    with pytest.raises(StorageError):
        file.sync()
    with pytest.raises(AssertionError, match="synced again"):
        file.sync()
    with pytest.raises(AssertionError, match="written although"):
        file.write([b"y"])
    file.close()


# -- kills ----------------------------------------------------------------------------------------


def committing_child(folder: Path, pipe: int, start: int, tip: ObjectId | None) -> None:
    """Commit for ever; a line per commit that was acknowledged. Never returns."""
    try:
        store = open_store(folder)
        for number in range(start, start + 10_000):
            made = commit(store, content_of(number), tip)
            os.write(pipe, f"{number} {made.id}\n".encode())
            tip = made.id
    finally:
        os._exit(1)


def content_of(number: int) -> list[bytes]:
    """Some of it new in each commit, some of it shared with others."""
    return [noise(number, 300 + number % 5000), noise(number // 3, 2000), b"step %d" % number]


@pytest.mark.parametrize("kills", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_kill_a_committing_child(scratch: Path, several_packs: None, covered: Covered, kills: int) -> None:
    """SIGKILL at random moments: what was acknowledged is there, bit-exact, and work goes on."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    create(scratch).close()
    tip: ObjectId | None = None
    acknowledged: list[tuple[int, ObjectId]] = []
    unheard = idle = 0
    start = 0
    for _ in range(kills):
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(readable)
            committing_child(scratch, writable, start, tip)
        os.close(writable)
        time.sleep(chance.uniform(0.002, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(readable) as lines:
            heard = [(int(number), ObjectId.parse(id)) for number, id in map(str.split, lines)]
        idle += not heard
        acknowledged += heard
        with contextlib.closing(open_store(scratch)) as store:
            found = tips(store).get(MAIN)
            last = heard[-1][1] if heard else tip
            if found != last:
                # One more commit was durable when the kill came, before anybody was told.
                assert found is not None
                number = heard[-1][0] + 1 if heard else start
                assert contents(store, found) == tuple(content_of(number))
                heard.append((number, found))
                unheard += 1
            for number, id in heard:
                assert contents(store, id) == tuple(content_of(number))
            start = heard[-1][0] + 1 if heard else start
            made = commit(store, content_of(start), found)
            assert contents(store, made.id) == made.contents
            tip, start = made.id, start + 1
    with contextlib.closing(open_store(scratch)) as store:
        rows = verify(store)
        for number, id in acknowledged:
            assert contents(store, id) == tuple(content_of(number))
    shutil.rmtree(scratch / ".ckpt" / "meta")
    with contextlib.closing(open_store(scratch)) as store:
        assert tips(store) == {MAIN: tip}
        verify(store)
        for number, id in acknowledged[-50:]:
            assert contents(store, id) == tuple(content_of(number))
    covered(
        f"{kills} kills, {len(acknowledged)} acknowledged commits all there, {unheard} durable but unheard, "
        f"{idle} children without any, {rows} rows, seed {seed}"
    )
    assert len(acknowledged) >= kills


# -- rot ------------------------------------------------------------------------------------------


class Rot:
    """Flips bits of a small repository one by one and judges what readers make of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: list[Commit] = []
        with contextlib.closing(create(folder)) as store:
            self.known.append(commit(store, [noise(1, 300), b"zeros" * 40, b""]))
            self.known.append(commit(store, [noise(1, 300), b"other" * 30], self.known[0].id))
            store.update([Move("refs/tags/one", None, self.known[0].id)], who="test", why="tag")
            self.refs = self._refs(store)
        self.detected = self.harmless = 0

    def _refs(self, store: Store) -> dict[str, ObjectId | str]:
        with store.snapshot() as snapshot:
            return snapshot.refs()

    def flips(self, path: Path, chance: random.Random, *, all_bits: bool) -> Iterator[tuple[int, int]]:
        """Every byte with one of its bits, or with all; the file is flipped inside the loop's body."""
        whole = path.read_bytes()
        path.chmod(0o644)
        for at in range(len(whole)):
            for bit in range(8) if all_bits else (chance.randrange(8),):
                damaged = bytearray(whole)
                damaged[at] ^= 1 << bit
                path.write_bytes(damaged)
                yield at, bit
        path.write_bytes(whole)

    def judge(self, store: Store) -> bool:
        """Read everything through fresh readers. True if all is as it was; never wrong bytes."""
        whole = True
        for made in self.known:
            try:
                assert contents(store, made.id) == made.contents
            except CkptError as problem:
                is_one_line(problem)
                whole = False
        return whole

    def judge_opened(self) -> bool:
        """The same through a fresh handle. Refs may not differ without a word."""
        said: list[str] = []
        try:
            store = Store.open(self.folder / ".ckpt", Disk(), threads=1, say=said.append)
        except CkptError as problem:
            is_one_line(problem)
            return False
        with contextlib.closing(store):
            whole = self.judge(store)
            same = self._refs(store) == self.refs
            assert same or len(said) > 1, "a ref changed without a word"
            return whole and same

    def count(self, whole: bool) -> None:
        self.harmless += whole
        self.detected += not whole

    def say(self, covered: Covered, what: str, seed: int) -> None:
        covered(
            f"{what}: {self.detected + self.harmless} flips, {self.detected} detected, "
            f"{self.harmless} harmless, seed {seed}"
        )


@pytest.fixture(params=["one-bit", pytest.param("all-bits", marks=pytest.mark.slow)])
def all_bits(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "all-bits")


def test_flips_in_packs(scratch: Path, covered: Covered, all_bits: bool) -> None:
    """With the index: the record is read right or refused."""
    seed = random.SystemRandom().getrandbits(32)
    chance = random.Random(seed)
    rot = Rot(scratch)
    with contextlib.closing(open_store(scratch)) as store:
        for path in sorted((scratch / ".ckpt" / "packs").rglob("*.pack")):
            for at, bit in rot.flips(path, chance, all_bits=all_bits):
                try:
                    rot.count(rot.judge(store))
                except BaseException as error:
                    error.add_note(f"seed {seed}: bit {bit} of byte {at} of {path.name}")
                    raise
        assert rot.judge(store)
    rot.say(covered, "packs, read by the index", seed)
    assert rot.detected > 500
    assert rot.harmless > 100, "footers are not read while there is an index"


@pytest.mark.parametrize("without_index", [False, True], ids=["index", "rebuilt"])
def test_flips_before_an_open(scratch: Path, covered: Covered, all_bits: bool, without_index: bool) -> None:
    """`format`, journal and packs, each met by a fresh handle with the index or without one."""
    seed = random.SystemRandom().getrandbits(32)
    chance = random.Random(seed)
    rot = Rot(scratch)
    root = scratch / ".ckpt"
    spare = scratch / "spare"
    shutil.copytree(root, spare, ignore=shutil.ignore_patterns("lock.mdb"))
    victims = [root / "format", root / "refs.journal"]
    if without_index:
        victims += sorted((root / "packs").rglob("*.pack"))
    for path in victims:
        whole = path.read_bytes()
        for at, bit in rot.flips(path, chance, all_bits=all_bits):
            if without_index:
                shutil.rmtree(root / "meta")
            try:
                rot.count(rot.judge_opened())
            except BaseException as error:
                error.add_note(f"seed {seed}: bit {bit} of byte {at} of {path.name}")
                raise
            for name in ("format", "refs.journal"):
                shutil.copyfile(spare / name, root / name)
            if without_index:
                shutil.rmtree(root / "meta", ignore_errors=True)
                shutil.rmtree(root / "tmp")
                (root / "tmp").mkdir()
                shutil.copytree(spare / "meta", root / "meta")
        path.write_bytes(whole)
    assert rot.judge_opened()
    rot.say(covered, f"format, journal{', packs; index rebuilt' if without_index else ''}", seed)
    assert rot.detected > 200


def test_cut_packs(scratch: Path) -> None:
    """A pack cut short anywhere: read right or refused; and what is whole before the cut is salvaged."""
    rot = Rot(scratch)
    root = scratch / ".ckpt"
    assert len(list(files(root / "packs"))) == 2
    for path in files(root / "packs"):
        whole = path.read_bytes()
        path.chmod(0o644)
        for size in range(0, len(whole), 37):
            path.write_bytes(whole[:size])
            with contextlib.closing(open_store(scratch)) as store:
                rot.judge(store)
            shutil.rmtree(root / "meta")
            rot.judge_opened()
        path.write_bytes(whole)
        shutil.rmtree(root / "meta")
        assert rot.judge_opened()


def test_lost_race_is_the_same_object(scratch: Path) -> None:
    """The commit that lost is complete under its rescue ref, even when the disk fails afterwards."""
    with contextlib.closing(create(scratch)) as store:
        base = commit(store, [b"base"])
    disk = FailingDisk()
    with contextlib.closing(open_store(scratch, disk)) as store:
        winner = commit(store, [b"winner"], base.id)
        with store.writer() as writer:
            made = put_commit(writer, [noise(1, 400)], [base.id])
            assert not writer.publish(publication(made.id, base.id))
            disk.arm(1, errno.ENOSPC)
            store.catch_up_journal()
    with contextlib.closing(open_store(scratch)) as store:
        assert tips(store) == {MAIN: winner.id, f"refs/lost/main/{made.id.short}": made.id}
        assert contents(store, made.id) == made.contents
