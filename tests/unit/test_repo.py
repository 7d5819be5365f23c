"""The façade: opening, branches, lineage, reports, what it refuses, and how it fails."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import pickle
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckptvcs
from ckptvcs import (
    AmbiguousError,
    CkptError,
    Commit,
    ConflictError,
    CorruptionError,
    ExistsError,
    FormatError,
    InvalidError,
    LineageError,
    NoRepositoryError,
    NotFoundError,
    ObjectId,
    Repo,
    StorageError,
    UnsupportedStateError,
)
from ckptvcs.history import environment
from ckptvcs.store.format import Format
from ckptvcs.testing.faults import FailingDisk
from ckptvcs.testing.same import difference

BAD_NAMES = [
    "", " ", "a b", "a~1", "a^", "a:b", "a?", "a*", "a[", "a\\b", "a..b", "a@{1}", "@", "HEAD", "-x", ".a",
    "a/.b", "a.lock", "a.lock/b", "a.", "/a", "a/", "a//b", "a\x7f", "a\x00b", "a\nb", "lost/x", "lost",
    "refs/heads/x", "refs", "f" * 64, "A" * 64, "x" * 201, "\udc80",
]  # fmt: skip


def small(seed: int = 0) -> dict[str, Any]:
    """A state of some kilobytes: tensors of several sizes, a counter, nested containers."""
    random = np.random.default_rng(seed)
    return {
        "model": {"w": random.standard_normal((40, 25)), "b": np.zeros(7, np.float32)},
        "optimizer": {"m": random.standard_normal(600), "t": seed},
        "rng": random.bit_generator.state,
        "list": [1, (2.5, None), "text"],
    }


def exact(a: Any, b: Any) -> None:
    """Fail with the place where two states differ."""
    assert difference(a, b) is None, difference(a, b)


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked child; its exit status (0 if it returned)."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:  # noqa: BLE001 - the child must never return into pytest
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def tree_bytes(place: Path) -> int:
    """Bytes of all pack files and temporary files."""
    return sum(
        p.stat().st_size for part in ("packs", "tmp") for p in (place / ".ckpt" / part).rglob("*.pack")
    )


# -- init and open --------------------------------------------------------------------------------


def test_init_makes_missing_folders_and_an_unborn_main(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    with Repo.init(place) as repo:
        assert (place / ".ckpt" / "format").is_file()
        assert repo.path == place
        assert repo.branch_name == "main"
        assert repo.head() == ("main", None)
        assert repo.branches() == {}
        with pytest.raises(NotFoundError, match="main has none yet"):
            repo.resolve("HEAD")
    assert (place / ".ckpt" / ".gitignore").read_text() == "*\n"


def test_init_over_a_repository_is_an_error_and_changes_nothing(repo: Repo, folder: Path) -> None:
    commit = repo.commit(small())
    before = (folder / ".ckpt" / "format").read_bytes()
    with pytest.raises(ExistsError, match="repository already"):
        Repo.init(folder)
    with pytest.raises(FileExistsError):  # an ExistsError is one
        Repo.init(folder)
    assert (folder / ".ckpt" / "format").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == [".ckpt"]
    exact(repo.checkout(commit), small())


def test_init_inside_another_repository_makes_one_of_its_own(repo: Repo, folder: Path) -> None:
    with Repo.init(folder / "inner") as inner:
        assert inner.path == folder / "inner"
    with Repo.open(folder / "inner") as again:
        assert again.path == folder / "inner"


@pytest.mark.parametrize("level", ["fast", "balanced", "small"])
def test_compression_is_recorded(tmp_path: Path, level: str) -> None:
    with Repo.init(tmp_path / "r", compression=level) as repo:
        assert repo.config.get("compression") == level
        exact(repo.checkout(repo.commit(small())), small())
    with Repo.open(tmp_path / "r") as repo:
        assert repo.config.get("compression") == level
    assert f'compression = "{level}"' in (tmp_path / "r/.ckpt/config.toml").read_text()


def test_a_handle_may_have_a_level_of_its_own(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal(300_000, dtype=np.float32)
    with Repo.init(tmp_path, compression="fast") as repo:
        repo.commit({"w": weights})
    with Repo.open(tmp_path, compression="small") as repo:
        assert repo.config.get("compression") == "fast"
        small = repo.commit({"w": weights * np.float32(1.0001)})
    with Repo.open(tmp_path) as repo:
        fast = repo.commit({"w": weights * np.float32(1.0002)})
        assert np.array_equal(repo.checkout(small)["w"], weights * np.float32(1.0001))
    assert small.report is not None
    assert fast.report is not None
    assert small.report.stored < 0.6 * fast.report.stored
    with pytest.raises(InvalidError, match="compression"):
        Repo.open(tmp_path, compression="huge")


def test_bad_compression_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="huge") as caught:
        Repo.init(tmp_path / "r", compression="huge")
    assert "fast, balanced, small" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_init_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(CkptError, match="not a folder"):
        Repo.init(tmp_path / "f" / "r")


def test_open_finds_the_repository_from_below(
    repo: Repo, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = folder / "x" / "y"
    below.mkdir(parents=True)
    for path in (folder, str(below), folder / ".ckpt", folder / "x" / "not-there"):
        with Repo.open(path) as opened:
            assert opened.path == folder
    monkeypatch.chdir(below)
    with Repo.open() as opened:
        assert opened.path == folder
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CKPT_REPO", str(below))
    with Repo.open() as opened:
        assert opened.path == folder
    with Repo.init(tmp_path / "other"):
        pass
    with Repo.open(tmp_path / "other") as opened:  # an explicit path comes before CKPT_REPO
        assert opened.path == tmp_path / "other"


def test_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for open_it in (Repo.open, lambda: Repo.open(tmp_path / "nowhere")):
        with pytest.raises(NoRepositoryError, match="no repository in") as caught:
            open_it()
        assert "ckpt init" in str(caught.value.hint)
        assert caught.value.code == "no-repository"
    monkeypatch.setenv("CKPT_REPO", str(tmp_path / "gone"))
    with pytest.raises(NoRepositoryError, match="gone"):
        Repo.open()


def test_create_needs_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidError, match="create=True needs a path"):
        Repo.open(create=True)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("CKPT_REPO", str(tmp_path / "r"))
    with Repo.open(create=True) as repo:
        assert repo.path == tmp_path / "r"
        first = repo.commit(small())
    with Repo.open(tmp_path / "r", create=True) as again:  # opens what is there
        assert again.resolve("main").id == first.id


def test_fifty_processes_create_one_repository(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "r"
    gate_r, gate_w = os.pipe()
    children = []
    for number in range(50):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(gate_w)
                os.read(gate_r, 1)  # returns for all of them when the parent closes its end
                with Repo.open(place, branch=f"b{number}", create=True) as repo:
                    repo.commit({"n": number})
                status = 0
            except BaseException:  # noqa: BLE001 - the child must never return into pytest
                import traceback

                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(pid)
    os.close(gate_r)
    os.close(gate_w)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 50
    assert [p.name for p in place.iterdir()] == [".ckpt"]
    with Repo.open(place) as repo:
        assert {name: repo.checkout(name) for name in repo.branches()} == {
            f"b{n}": {"n": n} for n in range(50)
        }
        assert repo.fsck(full=True).ok


# -- branch selection -----------------------------------------------------------------------------


def test_the_branch_comes_from_the_argument_then_the_environment_then_head(
    repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.commit(small())
    repo.branch("b")
    repo.set_head("b")
    with Repo.open(folder) as opened:
        assert opened.branch_name == "b"
    monkeypatch.setenv("CKPT_BRANCH", "from-env")
    with Repo.open(folder) as opened:
        assert opened.branch_name == "from-env"
    with Repo.open(folder, branch="arg") as opened:
        assert opened.branch_name == "arg"
    monkeypatch.setenv("CKPT_BRANCH", "a b")
    with pytest.raises(InvalidError, match="a b"):
        Repo.open(folder)


def test_init_takes_its_branch_from_the_environment_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_BRANCH", "job-7")
    with Repo.init(tmp_path / "r") as repo:
        assert repo.branch_name == "job-7"
        assert repo.head() == ("main", None)
    monkeypatch.setenv("CKPT_BRANCH", "a b")
    with pytest.raises(InvalidError, match="a b"):
        Repo.init(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_detached_head_needs_a_branch_to_commit(repo: Repo, folder: Path) -> None:
    first = repo.commit(small(1))
    repo.commit(small(2))
    repo.set_head(first)
    with Repo.open(folder) as detached:
        assert detached.branch_name is None
        assert detached.resolve("HEAD").id == first.id
        exact(detached.checkout(), small(1))
        with pytest.raises(LineageError, match="detached") as caught:
            detached.commit(small(3))
        assert "branch=" in str(caught.value.hint)
        with detached.on("side") as side:
            into = small(0)
            assert side.restore(into, first)
            assert side.commit(small(3)).parents == (first.id,)


def test_a_handle_stays_on_its_branch_when_head_moves(repo: Repo, folder: Path) -> None:
    first = repo.commit(small(1))
    repo.branch("other")
    with Repo.open(folder) as person:
        person.set_head("other")
        assert person.branch_name == "main"
    second = repo.commit(small(2))
    assert repo.branch_name == "main"
    assert repo.branches() == {"main": second.id, "other": first.id}
    assert repo.head() == ("other", first.id)
    assert repo.resolve("HEAD").id == second.id  # in Python, HEAD is the handle's tip
    with Repo.open(folder) as later:
        assert later.branch_name == "other"


# -- lineage --------------------------------------------------------------------------------------


def test_parents_and_origin_along_a_run(repo: Repo) -> None:
    commits = [repo.commit(small(n), f"step {n}", step=n) for n in range(3)]
    assert [c.parents for c in commits] == [(), (commits[0].id,), (commits[1].id,)]
    assert [c.origin for c in commits] == [None, commits[0].id, commits[1].id]
    assert not any(c.fresh_start for c in commits)


def test_a_fresh_start_is_warned_about_once_and_recorded(
    repo: Repo, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = repo.commit(small(1))
    with Repo.open(folder) as job:
        with caplog.at_level(logging.WARNING, "ckptvcs"):
            second = job.commit(small(2))
            third = job.commit(small(3))
    warnings = [r for r in caplog.records if "without having restored" in r.getMessage()]
    assert len(warnings) == 1
    assert second.parents == (first.id,)
    assert second.origin is None
    assert second.fresh_start
    assert [c.fresh_start for c in repo.log("main")] == [False, True, False]
    assert third.origin == second.id


def test_only_restore_sets_the_origin(repo: Repo, folder: Path) -> None:
    first = repo.commit(small(1))
    with Repo.open(folder) as reader:
        reader.checkout("main")
        assert reader.commit(small(2)).origin is None
    with Repo.open(folder) as job:
        restored = job.restore(small(0))
        assert restored
        assert job.commit(small(3)).origin == restored.commit.id  # type: ignore[union-attr]
    assert first.origin is None


def test_a_restored_older_commit_needs_a_branch_of_its_own(repo: Repo, folder: Path) -> None:
    commits = [repo.commit(small(n), step=n) for n in range(3)]
    with Repo.open(folder) as job:
        into = small(9)
        assert job.restore(into, commits[0]).step == 0
        exact(into, small(0))
        before = job.branches()
        with pytest.raises(LineageError, match="not the tip of main") as caught:
            job.commit(into)
        assert isinstance(caught.value, ConflictError)
        assert "branch=" in str(caught.value.hint)
        assert "ckpt fork" in str(caught.value.hint)
        assert job.branches() == before
        assert job.lost() == {}
        job.restore(into)  # back at the tip, commits go on
        assert job.commit(small(4)).parents == (commits[2].id,)


def test_an_unborn_branch_starts_at_what_was_restored(repo: Repo) -> None:
    commits = [repo.commit(small(n)) for n in range(3)]
    fork = repo.on("fork")
    fork.restore(small(9), "main~1")
    made = fork.commit(small(7))
    assert made.parents == (commits[1].id,)
    assert made.origin == commits[1].id
    assert not made.fresh_start
    root = repo.on("root").commit(small(8))
    assert root.parents == ()
    assert root.origin is None


def test_a_conflict_keeps_the_commit_and_names_it(repo: Repo, folder: Path) -> None:
    first = repo.commit(small(1))
    with Repo.open(folder) as one, Repo.open(folder) as two:
        one.restore(small(0))
        two.restore(small(0))
        won = one.commit(small(2))
        with pytest.raises(ConflictError) as caught:
            two.commit(small(3), "mine", step=3)
        rescued = caught.value.rescued
        assert rescued is not None
        assert not isinstance(caught.value, LineageError)
        assert rescued in str(caught.value)
        assert rescued.startswith("lost/main/")
        lost = two.resolve(rescued)
        assert (lost.parents, lost.message, lost.step) == ((first.id,), "mine", 3)
        assert two.lost() == {rescued: lost.id}
        exact(two.checkout(rescued), small(3))
        assert two.branches() == {"main": won.id}
        with pytest.raises(ConflictError):  # it still knows the old tip
            two.commit(small(4))
        two.branch("mine", rescued)
        two.restore(small(0))
        assert two.commit(small(5)).parents == (won.id,)
        assert repo.fsck(full=True).ok


@pytest.mark.parametrize("rev", [None, "main"])
def test_a_tip_that_moves_during_restore_is_a_conflict_and_not_a_false_parent(
    repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch, rev: str | None
) -> None:
    repo.commit(small(1))
    with Repo.open(folder) as job:
        second = repo.commit(small(2))
        plain = Repo._reading

        def meanwhile(self: Repo, commit: Commit, *only: Any) -> Any:
            if self is job:
                monkeypatch.undo()
                repo.commit(small(3))
            return plain(self, commit, *only)

        monkeypatch.setattr(Repo, "_reading", meanwhile)
        restored = job.restore(small(0), rev)
        assert restored.commit == second
        with pytest.raises(ConflictError) as caught:
            job.commit(small(4))
        assert caught.value.rescued is not None
        assert job.resolve(caught.value.rescued).parents == (second.id,)


def test_two_handles_race_for_an_unborn_branch(repo: Repo) -> None:
    one, two = repo.on("new"), repo.on("new")
    won = one.commit(small(1))
    with pytest.raises(ConflictError):
        two.commit(small(2))
    assert repo.branches() == {"new": won.id}


# -- handles --------------------------------------------------------------------------------------


def test_on_is_closed_with_its_parent_and_not_the_other_way(repo: Repo, folder: Path) -> None:
    with Repo.open(folder) as parent:
        child = parent.on("c")
        grandchild = child.on("g")
        with parent.on("d") as closed:
            closed.commit(small())
        assert parent.branches().keys() == {"d"}
        child.commit(small())
        assert child.branch_name == "c"
    for handle in (child, grandchild, closed, parent):
        with pytest.raises(CkptError, match="closed") as caught:
            handle.commit(small())
        assert caught.value.code == "closed"


def test_a_closed_handle_says_so_everywhere(folder: Path) -> None:
    repo = Repo.init(folder)
    commit = repo.commit(small())
    repo.close()
    repo.close()
    assert "Repo(" in repr(repo)
    calls: list[Callable[[], Any]] = [
        lambda: repo.commit(small()),
        lambda: repo.commit_files({"a": folder}),
        repo.checkout,
        lambda: repo.restore(small()),
        lambda: repo.resolve(commit.id),
        lambda: list(repo.log()),
        repo.branches,
        repo.tags,
        repo.lost,
        repo.head,
        repo.reflog,
        lambda: repo.branch("x"),
        lambda: repo.tag("x"),
        lambda: repo.delete_branch("main"),
        lambda: repo.delete_tag("x"),
        lambda: repo.set_head("main"),
        lambda: repo.on("x"),
        repo.gc,
        repo.fsck,
        lambda: repo.config,
        lambda: repo.configure("author", "x"),
        lambda: repo.metrics(commit),
        lambda: repo.has_state(),
        lambda: list(repo.entries()),
        repo.file_entries,
        repo.file_status,
        repo.checkout_files,
    ]
    for call in calls:
        with pytest.raises(CkptError) as caught:
            call()
        assert caught.value.code == "closed", call


def test_an_idle_handle_keeps_no_pack_open(repo: Repo) -> None:
    repo.commit(small())
    repo.checkout()
    list(repo.log())
    open_files = {os.readlink(f"/proc/self/fd/{fd}") for fd in _open_fds()}
    assert not [name for name in open_files if ".pack" in name]


def _open_fds() -> Iterator[str]:
    for fd in os.listdir("/proc/self/fd"):
        if os.path.lexists(f"/proc/self/fd/{fd}"):
            yield fd


# -- restore, checkout, log -----------------------------------------------------------------------


def test_restore_on_an_unborn_branch_is_a_falsy_no_op(repo: Repo) -> None:
    into = small(3)
    restored = repo.restore(into)
    assert not restored
    assert restored.commit is None
    assert restored.step is None
    assert dict(restored) == {}
    exact(into, small(3))
    assert repo.commit(into).parents == ()


def test_restore_fills_in_place_and_reports(repo: Repo) -> None:
    repo.commit({**small(1), "extra": np.arange(5)}, step=12)
    into: dict[str, Any] = small(2)
    weights = into["model"]["w"]
    with pytest.raises(ckptvcs.StateMismatchError) as caught:
        repo.restore(into)
    assert caught.value.unexpected == ("extra",)
    exact(into, small(2))  # nothing was changed
    restored = repo.restore(into, strict=False)
    assert restored.step == 12
    assert restored.unexpected == ("extra",)
    assert restored["extra"].tolist() == [0, 1, 2, 3, 4]
    assert into["model"]["w"] is weights
    exact(into, small(1))


def test_checkout_gives_independent_exact_copies(repo: Repo) -> None:
    state = small(1)
    commit = repo.commit(state)
    state["model"]["w"][:] = 0
    first, second = repo.checkout(), repo.checkout(commit.id)
    exact(first, small(1))
    first["model"]["w"][:] = 7
    exact(second, small(1))
    exact(repo.checkout(only="model"), {"model": small(1)["model"]})
    with pytest.raises(NotFoundError):
        repo.checkout(only="nothing-like-this")


def test_log_is_newest_first_by_the_graph_whatever_the_clock_says(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**18, 0, -(10**15)))
    monkeypatch.setattr("ckptvcs.disk.time.time_ns", lambda: next(clock))
    commits = [repo.commit({"n": n}, f"c{n}") for n in range(5)]
    assert commits[4].time < commits[0].time
    assert [c.message for c in repo.log()] == ["c4", "c3", "c2", "c1", "c0"]
    assert [c.message for c in repo.log(n=2)] == ["c4", "c3"]
    assert [c.message for c in repo.log("main~3")] == ["c1", "c0"]
    assert list(repo.log(n=0)) == []


def test_ids_are_full_revisions_anywhere(repo: Repo, folder: Path) -> None:
    commit = repo.commit(small(1), "one", step=4, epoch=1.5)
    repo.commit(small(2))
    assert len(str(commit.id)) == 64
    with Repo.open(folder) as other:
        found = other.resolve(str(commit.id))
        assert found == commit
        assert found.report is None
        assert isinstance(found.parents, tuple)
        assert isinstance(found.time, int)
        exact(other.checkout(str(commit.id)), small(1))
        assert [c.id for c in other.log(str(commit.id))] == [commit.id]
        other.tag("t", str(commit.id))
        assert other.resolve("t") == commit
        assert other.resolve(commit) == commit
        assert other.resolve(commit.id) == commit
        assert abs(found.time - time.time_ns()) < 600 * 10**9


# -- what a commit records ------------------------------------------------------------------------


def test_report_numbers_add_up(repo: Repo) -> None:
    state = {"model": np.random.default_rng(1).standard_normal(50_000), "opt": np.zeros(1000), "step": 1}
    first = repo.commit(state).report
    assert first is not None
    assert first.given == first.new + first.reused
    assert first.given >= state["model"].nbytes + state["opt"].nbytes
    assert set(first.components) >= {"model", "opt"}
    for each in first.components.values():
        assert each.given == each.new + each.reused
        assert min(each.given, each.new, each.reused, each.stored) >= 0
    assert first.components["model"].new == state["model"].nbytes
    assert first.seconds > 0
    assert sum(c.given for c in first.components.values()) == first.given
    state["model"] = state["model"] + 1
    second = repo.commit(state).report
    assert second is not None
    assert second.components["opt"].reused == 8000
    assert second.components["opt"].stored == 0
    assert second.components["model"].reused == 0
    assert "given" in str(second)


def test_stored_is_what_the_packs_grow_by(repo: Repo, folder: Path) -> None:
    before = tree_bytes(folder)
    report = repo.commit(small(1)).report
    assert report is not None
    packs = len(list((folder / ".ckpt/packs").rglob("*.pack")))
    assert tree_bytes(folder) - before == report.stored + 68 * packs


def test_shared_and_repeated_tensors_never_make_negative_numbers(repo: Repo) -> None:
    tied = np.random.default_rng(2).standard_normal(5000)
    state = {"a": tied, "b": tied, "c": tied.copy(), "d": tied[100:2000], "e": [tied, {"x": tied.copy()}]}
    for _ in range(2):
        report = repo.commit(state).report
        assert report is not None
        for name, each in report.components.items():
            assert each.given == each.new + each.reused, name
            assert min(each.given, each.new, each.reused, each.stored) >= 0, (name, each)
    back = repo.checkout()
    exact(back, state)
    assert np.shares_memory(back["a"], back["b"])
    assert not np.shares_memory(back["a"], back["c"])


def test_an_unchanged_commit_stores_less_than_2_kb(repo: Repo) -> None:
    state = {f"t{n}": np.full(1000, n, np.float32) for n in range(50)}
    repo.commit(state, "first", metrics={"val_loss": 1.0}, config={"lr": 0.1})
    again = repo.commit(state, "again", metrics={"val_loss": 1.0}, config={"lr": 0.1})
    assert again.report is not None
    assert again.report.new == 0
    assert again.report.reused == again.report.given
    assert again.report.stored < 2048


def test_metrics_become_plain_numbers(repo: Repo) -> None:
    torch = pytest.importorskip("torch")
    given = {
        "val_loss": np.float32(0.5),
        "acc": np.array(0.75),
        "steps": np.int64(3),
        "t": torch.tensor(1.5),
        "grad": torch.tensor(2.5, requires_grad=True),
        "nan": float("nan"),
        "inf": float("inf"),
        "sub/x.y": 1,
    }
    commit = repo.resolve(repo.commit({}, metrics=given).id)
    assert list(commit.metrics) == list(given)
    assert {k: type(v) for k, v in commit.metrics.items()} == {
        "val_loss": float, "acc": float, "steps": int, "t": float, "grad": float, "nan": float,
        "inf": float, "sub/x.y": int,
    }  # fmt: skip
    assert commit.metrics["acc"] == 0.75
    assert np.isnan(commit.metrics["nan"])


@pytest.mark.parametrize(
    "metrics",
    [
        {"a": "0.5"}, {"a": True}, {"a": None}, {"a": [1.0]}, {"a": np.zeros(1)}, {"a b": 1.0}, {"": 1.0},
        {"a=b": 1.0}, {3: 1.0}, {"a\x00": 1.0}, {"a": 1j}, {"a": np.bool_(True)},
        [("a", 1.0)], 0.5,
    ],
)  # fmt: skip
def test_bad_metrics_are_refused_before_anything_is_written(repo: Repo, folder: Path, metrics: Any) -> None:
    before = tree_bytes(folder)
    with pytest.raises(InvalidError):
        repo.commit(small(), metrics=metrics)
    assert repo.branches() == {}
    assert tree_bytes(folder) == before


def test_config_is_normalised(repo: Repo) -> None:
    config = argparse.Namespace(
        lr=np.float64(0.1), layers=(1, 2), data=Path("/x/y"), inner={"seed": np.int32(7), "on": True, 3: None}
    )
    commit = repo.resolve(repo.commit({}, config=config).id)
    assert commit.config == {
        "lr": 0.1, "layers": [1, 2], "data": "/x/y", "inner": {"seed": 7, "on": True, 3: None},
    }  # fmt: skip
    assert type(commit.config["lr"]) is float


def test_bad_configs_are_refused_with_all_places(repo: Repo) -> None:
    with pytest.raises(UnsupportedStateError) as caught:
        repo.commit({}, config={"a": object(), "b": {"c": [1, np.zeros(3)]}})
    assert [path for path, _ in caught.value.leaves] == ["config/a", "config/b/c/1"]
    with pytest.raises(InvalidError, match="mapping"):
        repo.commit({}, config=[1, 2])
    assert repo.branches() == {}


@pytest.mark.parametrize("field", [{"step": 1.5}, {"step": "1"}, {"step": True}, {"epoch": float("nan")},
                                   {"epoch": "x"}, {"epoch": True}, {"message": 5}])  # fmt: skip
def test_bad_fields(repo: Repo, field: dict[str, Any]) -> None:
    with pytest.raises(InvalidError, match=next(iter(field))):
        repo.commit({}, **field)
    assert repo.branches() == {}


def test_numpy_steps_and_epochs(repo: Repo) -> None:
    commit = repo.commit({}, step=np.int64(5), epoch=np.float32(0.5))  # type: ignore[arg-type]
    assert (type(commit.step), commit.step, type(commit.epoch), commit.epoch) == (int, 5, float, 0.5)


def test_messages_of_any_text(repo: Repo) -> None:
    for message in ("", "\n", "one\ntwo", "  ", "ünï\udc80", "a: ", "\x1c"):
        commit = repo.commit({"m": message}, message)
        assert repo.resolve(commit.id).message == message
        assert "\n" not in repo.reflog(1)[0].why
    assert repo.fsck(full=True).ok


def test_files_are_kept_apart_from_the_state(repo: Repo, folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_bytes(b'{"lr": 1}\n' * 100)
    commit = repo.commit(small(1), files={"config.json": config, "deep/er.json": str(config)})
    exact(repo.checkout(), small(1))
    assert repo.has_state()
    assert [(e.path, e.size) for e in repo.file_entries(commit)] == [
        ("config.json", 1000),
        ("deep/er.json", 1000),
    ]
    repo.checkout_files(commit, tmp_path / "out")
    assert (tmp_path / "out/deep/er.json").read_bytes() == config.read_bytes()
    into = small(2)
    assert dict(repo.restore(into)) == {}
    exact(into, small(1))
    for bad in ("", "../x", "/x", "a/../b", "."):
        with pytest.raises(InvalidError):
            repo.commit(small(1), files={bad: config})
    with pytest.raises(NotFoundError, match="gone"):
        repo.commit(small(1), files={"x": tmp_path / "gone"})
    assert repo.resolve("main").id == commit.id


def test_a_commit_of_files_checks_out_as_bytes(repo: Repo, folder: Path) -> None:
    (folder / "d" / "e").mkdir(parents=True)
    (folder / "d" / "a.bin").write_bytes(bytes(range(256)) * 20_000)  # 5 MB: several chunks
    (folder / "d" / "e" / "empty").write_bytes(b"")
    (folder / "d" / "link").symlink_to("a.bin")
    commit = repo.commit_files({"d": folder / "d"}, "files")
    assert not repo.has_state(commit)
    assert repo.checkout(commit) == {
        "d/a.bin": bytes(range(256)) * 20_000,
        "d/e/empty": b"",
        "d/link": b"a.bin",
    }
    assert repo.checkout(commit, only="d/e") == {"d/e/empty": b""}


def test_commit_files_that_continue_are_no_fresh_start(repo: Repo, folder: Path) -> None:
    (folder / "a").write_text("1")
    first = repo.commit_files({"a": folder / "a"})
    with Repo.open(folder) as person:
        second = person.commit_files({"a": folder / "a"}, continues=True)
    assert second.origin == first.id
    assert not second.fresh_start


# -- refs -----------------------------------------------------------------------------------------


def test_branches_and_tags(repo: Repo) -> None:
    first = repo.commit(small(1))
    second = repo.commit(small(2))
    assert repo.branch("old", "main~1") == first.id
    assert repo.branch("new") == second.id
    assert repo.tag("v1", first) == first.id
    assert list(repo.branches()) == ["main", "new", "old"]
    assert repo.tags() == {"v1": first.id}
    for again in (lambda: repo.branch("old"), lambda: repo.tag("v1")):
        with pytest.raises(ExistsError, match="exists already"):
            again()
    with pytest.raises(NotFoundError):
        repo.branch("x", "nothing")
    with pytest.raises(NotFoundError):
        repo.branch("x", ObjectId(bytes(32)))
    assert repo.tags() == {"v1": first.id}
    assert repo.delete_tag("v1") == first.id
    with pytest.raises(NotFoundError, match="no tag called 'v1'"):
        repo.delete_tag("v1")
    assert repo.tags() == {}


def test_deleting_branches(repo: Repo) -> None:
    repo.commit(small(1))
    repo.branch("merged")
    side = repo.on("side")
    side.restore(small(0), "main")
    tip = side.commit(small(2))
    repo.delete_branch("merged")
    with pytest.raises(InvalidError, match="nothing else refers to") as caught:
        repo.delete_branch("side")
    assert caught.value.code == "unmerged"
    assert "force" in str(caught.value.hint)
    repo.tag("keep", tip)
    assert repo.delete_branch("side") == tip.id  # the tag holds it
    with pytest.raises(InvalidError, match="nothing else"):
        repo.delete_tag("keep")
    assert repo.delete_tag("keep", force=True) == tip.id
    with pytest.raises(InvalidError, match="HEAD is on"):
        repo.delete_branch("main", force=True)
    with pytest.raises(NotFoundError, match="no branch called 'nope'"):
        repo.delete_branch("nope")
    assert repo.branches().keys() == {"main"}
    # Deleted, it is still there until gc: by id, and by where the ref stood.
    exact(repo.checkout(str(tip.id)), small(2))
    assert repo.resolve("side@{1}").id == tip.id
    assert repo.branch("side", "side@{1}") == tip.id


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_ref_names(repo: Repo, name: str) -> None:
    repo.commit({})
    before = (repo.branches(), repo.tags())
    for call in (repo.branch, repo.tag, repo.on, repo.set_head, repo.delete_branch, repo.delete_tag):
        with pytest.raises(InvalidError, match="cannot be the name of a "):
            call(name)
    assert (repo.branches(), repo.tags()) == before
    assert repo.head()[0] == "main"


@pytest.mark.parametrize(
    "name", ["a", "exp/lr3e-4", "ünï", "deadbeef", "a" * 200, "x.y", "a@b", "f" * 63, "1"]
)
def test_good_ref_names(repo: Repo, name: str) -> None:
    commit = repo.commit({})
    repo.branch(name)
    assert repo.resolve(name).id == commit.id
    assert repo.resolve(f"{name}~0").id == commit.id
    repo.on(name).restore({})
    assert repo.delete_branch(name) == commit.id


def test_the_reflog_tells_what_happened(repo: Repo) -> None:
    repo.commit({}, "first")
    repo.branch("b")
    repo.tag("t")
    repo.delete_branch("b")
    assert [e.why for e in repo.reflog()] == [
        "delete branch: b", "tag: t", "branch: b", "commit: first", "init",
    ]  # fmt: skip
    assert [e.position for e in repo.reflog(2)] == [5, 4]


# -- circumstances --------------------------------------------------------------------------------


def test_the_environment_is_captured_with_secrets_masked(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    environment.capture.cache_clear()
    argv = ["train.py", "--api-key", "hunter2", "--lr", "0.1", "TOKEN=hunter2", "--pass-word=x",
            "--wandb.apiKey=hunter2", "--password", "-hunter2", "https://me:hunter2@host/x"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    try:
        commit = repo.resolve(repo.commit({}).id)
    finally:
        environment.capture.cache_clear()
    assert commit.environment["argv"][:5] == ["train.py", "--api-key", "***", "--lr", "0.1"]
    assert "hunter2" not in repr(commit.environment)
    assert commit.environment["ckptvcs"] == ckptvcs.__version__
    assert commit.environment["libraries"]["numpy"] == np.__version__
    assert commit.environment["python"]


def test_the_environment_can_be_switched_off(repo: Repo, folder: Path) -> None:
    repo.configure("environment", "false")
    assert repo.commit({}).environment == {}
    with Repo.open(folder) as other:
        assert other.config.get("environment") is False
    repo.configure("environment", None)
    assert repo.commit({}).environment


def test_the_author(repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "@" in repo.commit({}).author
    repo.configure("author", "Ann <ann@x>")
    assert repo.commit({}).author == "Ann <ann@x>"
    monkeypatch.setenv("CKPT_AUTHOR", "job 7")
    assert repo.commit({}).author == "Ann <ann@x>"  # read once, at open
    with Repo.open(folder) as job:
        assert job.author == "job 7"
        assert job.commit({}).author == "job 7"
        assert job.reflog(1)[0].who == "job 7"


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "٣x"])
def test_bad_thread_counts(repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CKPT_THREADS", value)
    with pytest.raises(InvalidError, match="CKPT_THREADS"):
        Repo.open(folder)
    with pytest.raises(InvalidError, match="CKPT_THREADS"):
        Repo.init(folder / "new")
    assert not (folder / "new").exists()


def test_good_thread_counts(repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"w": np.random.default_rng(0).standard_normal(1_000_000)}
    ids = set()
    for count in ("1", "3"):
        monkeypatch.setenv("CKPT_THREADS", count)
        with Repo.open(folder, branch=f"t{count}") as job:
            ids.add(job.commit(state).tree)
            exact(job.checkout(), state)
    assert len(ids) == 1


# -- bad input ------------------------------------------------------------------------------------


def one_line(error: CkptError) -> str:
    """The message, which must be one line."""
    assert "\n" not in str(error)
    assert type(pickle.loads(pickle.dumps(error))) is type(error)
    return str(error)


def test_unknown_revisions_name_near_ones(repo: Repo) -> None:
    repo.commit({})
    repo.branch("experiment")
    with pytest.raises(NotFoundError) as caught:
        repo.checkout("experimant")
    assert "'experimant'" in one_line(caught.value)
    assert "experiment" in str(caught.value.hint)
    with pytest.raises(NotFoundError) as caught:
        repo.checkout("ffffffff")
    assert "ffffffff" in one_line(caught.value)
    for text in ("main@step", "main~x", "main@{x}", "main^^^^^", "main@{99}"):
        with pytest.raises((NotFoundError, InvalidError)) as other:
            repo.resolve(text)
        assert text in one_line(other.value)


def test_ambiguous_prefixes_list_the_candidates(repo: Repo) -> None:
    # Commits whose ids share four digits turn up among a few hundred (birthday).
    seen: dict[str, Commit] = {}
    for n in range(3000):
        commit = repo.on(f"b{n}").commit({"n": n})
        other = seen.setdefault(str(commit.id)[:4], commit)
        if other is not commit:
            break
    else:
        pytest.fail("3000 ids without a shared prefix of four digits")
    with pytest.raises(AmbiguousError) as caught:
        repo.resolve(str(commit.id)[:4])
    message = one_line(caught.value)
    assert str(commit.id)[:8] in message
    assert str(other.id)[:8] in message
    assert caught.value.hint == "give more digits"
    assert repo.resolve(str(commit.id)[:16]).id == commit.id


def test_unsupported_leaves_are_all_listed_and_nothing_is_written(repo: Repo, folder: Path) -> None:
    before = tree_bytes(folder)
    with pytest.raises(UnsupportedStateError) as caught:
        repo.commit({"a": object(), "b": {"c": [np.zeros(1000), lambda: 0]}, "ok": 1})
    assert [path for path, _ in caught.value.leaves] == ["a", "b/c/1"]
    assert "a: " in one_line(caught.value)
    assert "b/c/1: " in str(caught.value)
    assert repo.branches() == {}
    assert tree_bytes(folder) == before


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_a_read_only_folder(tmp_path: Path) -> None:
    place = tmp_path / "r"
    with Repo.init(place) as repo:
        repo.commit(small(1))
    for parent in (tmp_path, *tmp_path.parents):
        if parent.owner() == "root" and parent != Path("/") and parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(parent.stat().st_mode | 0o055)
    before = sorted((p, p.stat().st_size) for p in place.rglob("*"))

    def as_nobody() -> None:
        os.chdir("/")
        os.setgid(65534)
        os.setuid(65534)
        for call in (
            lambda: Repo.init(tmp_path / "new"),
            lambda: Repo.open(tmp_path / "new", create=True),
            lambda: Repo.open(place).commit(small(2)),
        ):
            with pytest.raises(StorageError, match="denied") as caught:
                call()
            assert str(tmp_path) in one_line(caught.value)

    assert in_child(as_nobody) == 0
    assert sorted((p, p.stat().st_size) for p in place.rglob("*")) == before
    with Repo.open(place) as repo:
        exact(repo.checkout(), small(1))


def test_a_full_disk_leaves_the_repository_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Repo.init(folder) as repo:
        repo.commit(small(1))
    disk = FailingDisk()
    monkeypatch.setattr("ckptvcs.repo.Disk", lambda: disk)
    for error, code in ((errno.ENOSPC, "disk-full"), (errno.EDQUOT, "disk-full"), (errno.EIO, "storage")):
        failures = 0
        for at in range(1, 60):
            with Repo.open(folder) as repo:
                repo.restore(small(0))
                tip = repo.branches()["main"]
                disk.arm(at, error)
                refused: StorageError | None = None
                try:
                    made = repo.commit(small(at + error * 100))
                except StorageError as caught:
                    refused = caught
                if refused is not None:
                    failures += 1
                    assert (refused.code, refused.errno) == (code, error)
                    one_line(refused)
                    assert repo.branches()["main"] == tip
                    disk.heal()
                    made = repo.commit(small(at + error * 100))  # the handle goes on
                disk.heal()
                assert repo.branches()["main"] == made.id
                exact(repo.checkout(), small(at + error * 100))
            if disk.failed is None:
                break
        else:
            pytest.fail("a commit takes more than 60 operations")
        assert failures >= 8, failures
    with Repo.open(folder) as repo:
        repo.gc(grace=0)
        assert repo.fsck(full=True).ok
        assert list((folder / ".ckpt/tmp").iterdir()) == []


def test_a_file_size_limit(folder: Path) -> None:
    with Repo.init(folder) as repo:
        repo.commit(small(1))

    def limited() -> None:
        with Repo.open(folder) as repo:
            repo.restore(small(0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
            with pytest.raises(StorageError, match="larger than this process may write"):
                repo.commit({"w": np.random.default_rng(0).standard_normal(1 << 20)})

    assert in_child(limited) == 0
    with Repo.open(folder) as repo:
        exact(repo.checkout(), small(1))
        assert len(list(repo.log())) == 1
        assert repo.fsck(full=True).ok
        assert repo.restore(small(0))
        repo.commit(small(2))


def test_a_truncated_pack(repo: Repo, folder: Path) -> None:
    repo.commit(small(1))
    (pack,) = (folder / ".ckpt/packs").rglob("*.pack")
    pack.chmod(0o644)
    os.truncate(pack, pack.stat().st_size // 2)
    with pytest.raises(CorruptionError) as caught, Repo.open(folder) as fresh:
        fresh.checkout()
    assert str(pack) in one_line(caught.value)
    assert "fsck" in str(caught.value.hint)
    assert not repo.fsck().ok


def test_a_flipped_bit_is_never_returned(repo: Repo, folder: Path) -> None:
    state = {"w": np.random.default_rng(3).integers(0, 256, 16_000, np.uint8)}  # stored as it is
    repo.commit(state)
    (pack,) = (folder / ".ckpt/packs").rglob("*.pack")
    pack.chmod(0o644)
    data = bytearray(pack.read_bytes())
    data[data.index(state["w"].tobytes()) + 100] ^= 4
    pack.write_bytes(data)
    with pytest.raises(CorruptionError) as caught, Repo.open(folder) as fresh:
        fresh.checkout()
    assert str(pack) in one_line(caught.value)
    assert caught.value.id is not None
    assert not repo.fsck(full=True).ok


def rewrite_format(folder: Path, **changes: Any) -> None:
    """Change fields of the `format` file, with a right checksum."""
    from dataclasses import replace

    path = folder / ".ckpt" / "format"
    path.write_bytes(replace(Format.unpack(path.read_bytes(), "format"), **changes).pack())


@pytest.mark.parametrize(
    "changes", [{"version": 2}, {"grid": 77}, {"read": ("holograms",)}], ids=["version", "grid", "feature"]
)
def test_a_newer_format_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    Repo.init(folder).close()
    rewrite_format(folder, **changes)
    with pytest.raises(FormatError) as caught:
        Repo.open(folder)
    assert caught.value.hint == "use a newer ckptvcs"
    one_line(caught.value)
    with pytest.raises(ExistsError):
        Repo.init(folder)


def test_an_unknown_write_feature_still_allows_reading(folder: Path) -> None:
    with Repo.init(folder) as repo:
        repo.commit(small(1))
    rewrite_format(folder, write=("holograms",))
    with Repo.open(folder) as repo:
        exact(repo.checkout(), small(1))
        for call in (lambda: repo.commit(small(2)), lambda: repo.branch("x"), lambda: repo.tag("x")):
            with pytest.raises(FormatError, match=r"write to .* holograms"):
                call()


def test_a_damaged_format_file(folder: Path) -> None:
    Repo.init(folder).close()
    path = folder / ".ckpt" / "format"
    path.write_bytes(path.read_bytes().replace(b"grid", b"gird"))
    with pytest.raises(CorruptionError, match="format is damaged"):
        Repo.open(folder)


def test_a_moved_repository_still_works(folder: Path, tmp_path: Path) -> None:
    with Repo.init(folder) as repo:
        repo.commit(small(1))
    folder.rename(tmp_path / "moved")
    with Repo.open(tmp_path / "moved") as repo:
        exact(repo.checkout(), small(1))
        repo.restore(small(0))
        repo.commit(small(2))


def test_opening_without_an_index_rebuilds_and_says_so(folder: Path) -> None:
    import shutil

    with Repo.init(folder) as repo:
        commit = repo.commit(small(1))
        repo.tag("v1")
    shutil.rmtree(folder / ".ckpt" / "meta")
    said: list[str] = []
    with Repo.open(folder, say=said.append) as repo:
        assert repo.tags() == {"v1": commit.id}
        exact(repo.checkout(), small(1))
    assert len(said) == 1
    assert "rebuilding" in said[0]
