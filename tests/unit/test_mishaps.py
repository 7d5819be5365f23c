"""Defects that a review found and that must not come back: one test each, named for what went wrong."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from ckptvcs import CkptError, CorruptionError, LockedError, Repo
from ckptvcs.disk import Disk
from ckptvcs.ids import chunk_id
from ckptvcs.store import Writer
from ckptvcs.store import store as store_module
from ckptvcs.store.format import Layout
from ckptvcs.store.index import Index
from ckptvcs.store.packs import PackFile


def array(seed: int) -> np.ndarray[Any, Any]:
    """4 KB that nothing else in a test holds."""
    return np.random.default_rng(seed).standard_normal(512)


def fork(action: Callable[[], None]) -> int:
    """The process id of a forked child that runs `action`; killed after 20 s."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - the child must not run the parent's tests
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
        os._exit(0)
    return pid


def status(pid: int) -> int:
    """A child's exit status, once it has ended; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(action: Callable[[], None]) -> int:
    """Exit status of a forked child that runs `action`."""
    return status(fork(action))


# -- one change at a time in a thread ------------------------------------------------------------


class Commits:
    """An object whose `state_dict` commits, as a careless preemption handler would."""

    def __init__(self, repo: Repo) -> None:
        self.repo = repo
        self.refused: list[str] = []

    def state_dict(self) -> dict[str, int]:
        for change in (lambda: self.repo.commit({"n": 1}), lambda: self.repo.branch("b"), self.repo.gc):
            with pytest.raises(CkptError, match="already under way") as caught:
                change()
            self.refused.append(caught.value.code)
        return {"n": 0}


def test_a_commit_inside_a_commit_is_refused(repo: Repo) -> None:
    inner = Commits(repo)
    first = repo.commit({"a": array(0)}, "first")
    outer = repo.commit(inner, "outer")
    assert inner.refused == ["busy"] * 3
    assert [commit.id for commit in repo.log()] == [outer.id, first.id]


def test_a_signal_handler_cannot_commit_inside_a_commit(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []

    def handler(number: int, frame: FrameType | None) -> None:
        with pytest.raises(CkptError) as caught:
            repo.commit({"n": -1}, "from the handler")
        refused.append(caught.value.code)

    plain = Writer.publish

    def interrupted(self: Writer, wanted: Any) -> bool:
        signal.raise_signal(signal.SIGUSR1)
        return plain(self, wanted)

    monkeypatch.setattr(Writer, "publish", interrupted)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        repo.commit({"n": 0}, "outer")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert refused == ["busy"]
    assert [commit.message for commit in repo.log()] == ["outer"]


def test_an_interruption_behind_the_durable_step_leaves_the_handle_at_the_new_tip(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(store_module.Store, "catch_up_journal", interrupt)
        with pytest.raises(KeyboardInterrupt):
            repo.commit({"n": 0}, "durable")
    repo.commit({"n": 1}, "next")
    assert [commit.message for commit in repo.log()] == ["next", "durable"]


def test_closing_waits_for_the_commit_of_a_child_handle(folder: Path) -> None:
    repo = Repo.init(folder)
    child = repo.on("side")
    started, go_on = threading.Event(), threading.Event()

    class Slow:
        def state_dict(self) -> dict[str, Any]:
            started.set()
            assert go_on.wait(20)
            return {"a": array(1)}

    worker = threading.Thread(target=lambda: child.commit(Slow(), "slow"))
    worker.start()
    assert started.wait(20)
    closer = threading.Thread(target=repo.close)
    closer.start()
    go_on.set()
    worker.join(20)
    closer.join(20)
    with pytest.raises(CkptError, match="closed"):
        child.commit({"n": 0})
    with Repo.open(folder) as again:
        assert again.resolve("side").message == "slow"


# -- processes -----------------------------------------------------------------------------------


def test_a_forked_child_that_was_refused_the_lock_stays_refused(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.commit({"n": 0})
    monkeypatch.setattr(store_module, "_LOCK_WAIT", 0.0)
    layout = repo._store.layout
    held = os.pipe()

    def child() -> None:
        os.read(held[0], 1)
        for _ in range(2):
            with pytest.raises(LockedError):
                repo.commit({"n": 1})

    pid = fork(child)
    assert repo._store._shared_lock is not None
    repo._store._shared_lock.release()
    with Disk().lock(layout.lock, wait=5):
        os.write(held[1], b"x")
        assert status(pid) == 0
    for end in held:
        os.close(end)


def test_a_lock_that_another_thread_holds_does_not_stop_a_forked_child(repo: Repo) -> None:
    repo.commit({"n": 0})
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with repo._store.lease._mutex, repo._committer.mutex:
            taken.set()
            assert done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(20)
    try:
        assert in_child(lambda: repo.on("child").commit({"n": 1}) and None) == 0
    finally:
        done.set()
        thread.join()
    assert repo.checkout("child") == {"n": 1}


def test_a_handle_that_nobody_closed_blocks_nothing(folder: Path) -> None:
    Repo.init(folder).close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        Repo.open(folder).branches()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    with Repo.open(folder, rebuild=True) as repo:
        assert repo.fsck().ok


# -- copies and damage ---------------------------------------------------------------------------


def test_a_copy_without_empty_folders_opens_and_commits(repo: Repo, folder: Path, tmp_path: Path) -> None:
    kept = repo.commit({"a": array(2)})
    target = tmp_path / "copy" / ".ckpt"
    target.mkdir(parents=True)
    for name in ("format", "config.toml", "refs.journal"):
        shutil.copy(folder / ".ckpt" / name, target / name)
    shutil.copytree(folder / ".ckpt" / "packs", target / "packs")
    with Repo.open(tmp_path / "copy") as copy:
        assert copy.resolve("main").id == kept.id
        copy.restore(state := {"a": np.zeros(512)})
        copy.commit(state, "goes on")
        assert copy.fsck(full=True).ok


def test_a_missing_journal_is_named_when_the_index_is_missing_too(repo: Repo, folder: Path) -> None:
    repo.commit({"n": 0})
    repo.close()
    shutil.rmtree(folder / ".ckpt" / "meta")
    (folder / ".ckpt" / "refs.journal").unlink()
    with pytest.raises(CorruptionError, match=r"refs\.journal is missing"):
        Repo.open(folder)


@pytest.mark.parametrize("keep", [8192, 0.5])
def test_an_index_cut_short_is_an_error_and_no_crash(repo: Repo, folder: Path, keep: float) -> None:
    for n in range(30):
        repo.commit({"a": array(n)})
    repo.close()
    data = folder / ".ckpt" / "meta" / "data.mdb"
    os.truncate(data, int(keep if keep > 1 else data.stat().st_size * keep) & ~4095)

    def child() -> None:
        with pytest.raises(CorruptionError, match="cut short"):
            Repo.open(folder)

    assert in_child(child) == 0
    with Repo.open(folder, rebuild=True) as again:
        assert again.fsck(full=True).ok
        assert np.array_equal(again.checkout()["a"], array(29))


def test_a_rebuild_takes_the_sound_one_of_two_copies(repo: Repo, folder: Path) -> None:
    """The good copy lies in the later pack, the damaged one in the earlier: names decide only ties."""
    value = array(3)
    target = chunk_id(memoryview(value).cast("B"))
    repo.commit({"a": value})
    store = repo._store
    with store.snapshot() as snapshot:
        row = snapshot.row(target)
    assert row is not None
    with store.index.change() as change:  # as if the row had been dropped after damage was found
        change.delete_row(target)
        change.bump_gc_seq()
    repo.commit({"a": value, "again": True})
    with store.snapshot() as snapshot:
        second = snapshot.row(target)
    assert second is not None
    assert second.pack != row.pack
    repo.close()
    layout = Layout(folder / ".ckpt")
    first = min((row, second), key=lambda each: (each.pack, each.offset))
    path = layout.pack(first.pack)
    data = bytearray(path.read_bytes())
    pack = PackFile(Disk(), path)
    assert pack.header(first.offset).id == target
    pack.close()
    data[first.offset + 104 + 7] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with Repo.open(folder, rebuild=True) as again:
        assert np.array_equal(again.checkout("main")["a"], value)


def test_strangers_among_the_packs_stop_nothing(repo: Repo, folder: Path) -> None:
    repo.commit({"a": array(4)})
    packs = folder / ".ckpt" / "packs"
    (packs / ".DS_Store").write_bytes(b"x")
    (packs / "00").mkdir(exist_ok=True)
    (packs / "00" / "00000000-0000-0000-0000-000000000000-0.pack").mkdir()
    (packs / "00" / "readme.txt").write_text("x")
    repo.gc(grace=0)
    assert repo.fsck(rebuild=True).ok
    assert np.array_equal(repo.checkout()["a"], array(4))


def test_fsck_reports_a_damaged_row_and_goes_on(repo: Repo) -> None:
    commit = repo.commit({"a": array(5)})
    store = repo._store
    with store.index.change() as change:
        value = bytearray(change._get("rows", commit.tree) or b"")
        value[3] ^= 0xFF
        change._put("rows", commit.tree, bytes(value))
    report = repo.fsck()
    assert not report.ok
    assert any("refs/heads/main" in problem.refs for problem in report.problems)


def test_fsck_notices_a_ref_that_the_log_did_not_move(repo: Repo) -> None:
    repo.commit({"a": array(6)})
    with repo._store.index.change() as change:
        value = change._get("refs", b"refs/heads/main")
        assert value is not None
        change._put("refs", b"refs/heads/mahn", value)
        change._delete("refs", b"refs/heads/main")
    report = repo.fsck()
    assert {problem.refs for problem in report.problems} == {("refs/heads/mahn",), ("refs/heads/main",)}


def test_gc_refuses_an_index_that_is_behind_the_journal(repo: Repo, folder: Path) -> None:
    repo.commit({"n": 0})
    store = repo._store
    with store.index.change() as change:
        change._set_number("position", change.position() - 1)
    with pytest.raises(CorruptionError, match="ahead of the index"):
        repo.gc(grace=0)
    with pytest.raises(CorruptionError, match="ahead of the index"):
        Repo.open(folder)


def test_an_index_handle_that_was_closed_stays_closed(tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    index = Index.create(Disk(), tmp_path / "meta", "id")
    index.close()
    with pytest.raises(CkptError, match="closed"), index.snapshot():
        pass


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_commit_does_not_reuse_what_lies_in_a_broken_pack(repo: Repo, folder: Path, damage: str) -> None:
    """Committing the same state again heals it: all of it is stored anew."""
    state = {"a": array(7), "b": {"c": array(8)}}
    first = repo.commit(state, "first")
    assert first.report is not None
    for pack in (folder / ".ckpt" / "packs").rglob("*.pack"):
        if damage == "missing":
            pack.unlink()
        else:
            os.truncate(pack, 100)
    with pytest.raises(CorruptionError):
        repo.checkout(first)
    again = repo.on("again").commit(state, "again")
    assert again.report is not None
    assert again.report.reused == 0
    assert again.tree == first.tree
    back = repo.checkout("again")
    assert np.array_equal(back["a"], state["a"])
    assert np.array_equal(back["b"]["c"], array(8))


@pytest.mark.parametrize("journal", ["missing", "empty"])
def test_commits_survive_the_loss_of_index_and_journal(repo: Repo, folder: Path, journal: str) -> None:
    repo.commit({"a": array(9)}, "first")
    main = repo.commit({"a": array(10)}, "second")
    side = repo.on("side").commit({"a": array(11)}, "side")
    repo.close()
    shutil.rmtree(folder / ".ckpt" / "meta")
    path = folder / ".ckpt" / "refs.journal"
    if journal == "missing":
        path.unlink()
    else:
        path.write_bytes(b"")
    with pytest.raises(CorruptionError, match="missing or empty") as caught:
        Repo.open(folder)
    assert "fsck --rebuild" in str(caught.value.hint)
    with Repo.open(folder, rebuild=True) as again:
        report = again.fsck(full=True)
        assert report.ok
        assert report.rebuilt is not None
        assert "branches and tags are lost" in report.rebuilt.problems[-1]
        assert again.branches() == {}
        assert again.lost() == {
            f"lost/rebuilt/{commit.id.short}": commit.id
            for commit in sorted((main, side), key=lambda commit: commit.id)
        }
        again.gc(grace=0)
        again.branch("main", f"lost/rebuilt/{main.id.short}")
        assert np.array_equal(again.checkout("main~1")["a"], array(9))
        again.delete_branch(f"lost/rebuilt/{main.id.short}")
    with Repo.open(folder) as again:
        assert set(again.lost()) == {f"lost/rebuilt/{side.id.short}"}


def test_fsck_names_the_commits_that_damage_hurts(repo: Repo, folder: Path) -> None:
    state = {"shared": array(12)}
    for n in range(3):
        repo.commit({**state, "own": array(20 + n)}, f"{n}")
    hurt = repo.resolve("main~1")
    target = chunk_id(memoryview(array(21)).cast("B"))
    with repo._store.snapshot() as snapshot:
        row = snapshot.row(target)
    assert row is not None
    path = repo._store.layout.pack(row.pack)
    data = bytearray(path.read_bytes())
    data[row.offset + 104 + 3] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    report = repo.fsck(full=True)
    (problem,) = report.problems
    assert problem.commits == (str(hurt.id),)
    assert problem.refs == ("refs/heads/main",)
    assert hurt.id.short in problem.message


def test_a_hint_is_shown_below_a_traceback(repo: Repo) -> None:
    repo.commit({"n": 0})
    with pytest.raises(CkptError) as caught:
        repo.resolve("mian")
    assert caught.value.__notes__ == ["hint: did you mean main?"]


def test_restoring_a_commit_of_files_names_the_state_before_it(repo: Repo, folder: Path) -> None:
    first = repo.commit({"n": 1})
    (folder / "notes.txt").write_text("x")
    repo.commit_files({"notes.txt": folder / "notes.txt"}, continues=True)
    with pytest.raises(CkptError, match="holds files and no state") as caught:
        repo.restore({"n": 0})
    assert first.id.short in str(caught.value.hint)


def test_a_long_message_does_not_fill_the_log(repo: Repo) -> None:
    repo.commit({"n": 0}, "x" * 5000)
    assert len(repo.reflog(1)[0].why) < 120
    assert len(repo.resolve("main").message) == 5000


def test_a_name_that_reads_as_a_question_is_no_branch(repo: Repo) -> None:
    repo.commit({"n": 0}, metrics={"val_loss": 1.0})
    with pytest.raises(CkptError, match="asks for its best commit"):
        repo.branch("main@best")
    with pytest.raises(CkptError) as caught:
        repo.resolve("main@epoch:3")
    assert "@step:N" in str(caught.value.hint)


def test_a_config_may_hold_dtypes_classes_and_functions(repo: Repo) -> None:
    config = {"dtype": np.dtype("float16"), "optimizer": Repo, "schedule": array, "scale": np.float32(0.5)}
    commit = repo.commit({"n": 0}, config=config)
    assert repo.resolve(commit).config == {
        "dtype": "float16",
        "optimizer": "ckptvcs.repo.Repo",
        "schedule": f"{array.__module__}.array",
        "scale": 0.5,
    }
    with pytest.raises(CkptError, match="config/w"):
        repo.commit({"n": 0}, config={"w": np.zeros(3)})
