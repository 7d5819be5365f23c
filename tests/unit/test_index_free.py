"""Handles without the index, and what becomes of the bundles they leave."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import Repo
from ckptvcs.disk import Disk
from ckptvcs.errors import CkptError, ConflictError, LockedError, StorageError
from ckptvcs.maintenance import ingest as ingesting
from ckptvcs.store import bundles
from ckptvcs.store.bundles import Bundle
from ckptvcs.store.format import PackName
from ckptvcs.store.index_free import IndexFreeStore


def state(step: int, scale: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"frozen": rng.standard_normal(40_000), "w": rng.standard_normal(20_000) * scale, "step": step}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with Repo.init(tmp_path / "runs") as repo:
        repo.commit(state(0), "first", step=0)
    return tmp_path / "runs"


def incoming(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / ".ckpt" / "incoming").iterdir())


def waiting(folder: Path) -> list[Path]:
    return sorted((folder / ".ckpt" / "incoming").glob("*.bundle"))


def quarantined(folder: Path) -> dict[str, str]:
    found = {}
    for path in (folder / ".ckpt" / "quarantine").iterdir():
        found[path.name.removesuffix(".bundle")] = (path / "reason.txt").read_text()
    return found


def no_index(folder: Path) -> Repo:
    """A handle without the index, on the branch main, that goes on from its tip."""
    repo = Repo.open(folder, "main", index_free=True)
    repo.restore(state(99))
    return repo


def forge(path: Path, **changes: Any) -> None:
    """Rewrite a bundle with other content and a digest that fits."""
    found = dataclasses.replace(Bundle.unpack(path.read_bytes(), ""), **changes)
    path.unlink()
    path.write_bytes(found.pack())


def messages(repo: Repo, rev: str = "HEAD") -> list[str]:
    return [commit.message for commit in repo.log(rev)]


def test_commits_arrive_whole(folder: Path) -> None:
    before = (folder / ".ckpt" / "refs.journal").read_bytes()
    with no_index(folder) as repo:
        one = repo.commit(state(1), "one", step=1)
        two = repo.commit(state(2, 1.001), "two", step=2)
        assert one.report is not None
        assert one.report.new < 100, "what the parent has is not stored again"
        assert messages(repo) == ["two", "one", "first"]
        assert same(repo.checkout(), state(2, 1.001))
    assert (folder / ".ckpt" / "refs.journal").read_bytes() == before
    assert len(waiting(folder)) == 2
    # Another one, before anything is ingested, goes on from there.
    with no_index(folder) as repo:
        assert repo.origin == two
        three = repo.commit(state(3), "three", step=3)
    with Repo.open(folder, ingest=False) as repo:
        assert messages(repo) == ["first"]
        report = repo.ingest()
        assert [each.commit for each in report.ingested] == [one.id, two.id, three.id]
        assert not any(each.lost for each in report.ingested)
        assert (report.quarantined, report.cleared, report.abandoned) == ([], [], [])
        assert messages(repo) == ["three", "two", "one", "first"]
        assert same(repo.checkout("HEAD~1"), state(2, 1.001))
        assert repo.fsck(full=True).problems == []
        assert repo.ingest().ingested == []
        assert incoming(folder) == []
        assert repo.gc(0).records == 0
    shutil.rmtree(folder / ".ckpt" / "meta")
    with Repo.open(folder) as repo:
        assert messages(repo) == ["three", "two", "one", "first"]


def test_the_index_is_neither_needed_nor_touched(folder: Path) -> None:
    meta = folder / ".ckpt" / "meta"
    shutil.move(meta, folder / "elsewhere")
    with no_index(folder) as repo:
        repo.commit(state(1), "one")
    assert not meta.exists()
    assert not any("lock.mdb" in path.name for path in (folder / ".ckpt").rglob("*"))
    shutil.move(folder / "elsewhere", meta)
    with Repo.open(folder) as repo:
        assert messages(repo) == ["one", "first"]


def test_nothing_is_left_among_temporary_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = folder.parent / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with no_index(folder):
        assert len(list(scratch.iterdir())) == 1
    assert list(scratch.iterdir()) == []
    (folder / ".ckpt" / "format").write_bytes(b"damaged")
    with pytest.raises(CkptError):
        Repo.open(folder, index_free=True)
    assert list(scratch.iterdir()) == []


def test_a_new_branch_and_a_repository_without_commits(tmp_path: Path) -> None:
    Repo.init(tmp_path).close()
    with Repo.open(tmp_path, "run/1", index_free=True) as repo:
        made = repo.commit(state(0), "first")
    (path,) = waiting(tmp_path)
    found = Bundle.unpack(path.read_bytes(), "")
    assert (found.tip, found.base) == (None, None)
    with Repo.open(tmp_path, "run/2", index_free=True) as repo:
        repo.restore(state(9), "run/1")
        fork = repo.commit(state(1), "fork")
    with Repo.open(tmp_path) as repo:
        assert repo.branches() == {"run/1": made.id, "run/2": fork.id}
        assert repo.resolve("run/2").parents == (made.id,)


def test_only_what_the_parent_reaches_is_reused(folder: Path) -> None:
    """Anything else that is stored may be collected before the bundle is ingested."""
    with Repo.open(folder, "other") as repo:
        repo.commit({"secret": state(0)["w"] + 1}, "elsewhere")
    with no_index(folder) as repo:
        made = repo.commit({"w": state(0)["w"] + 1}, "the same numbers")
        assert made.report is not None
        assert made.report.reused == 0
    with Repo.open(folder, ingest=False) as repo:
        repo.delete_branch("other", force=True)
        from ckptvcs.maintenance import gc

        gc.collect(repo._store, grace=0, dry_run=False, who="test")
        assert [each.lost for each in repo.ingest().ingested] == [False]
        assert same(repo.checkout("main"), {"w": state(0)["w"] + 1})


def test_saves_in_the_background(folder: Path) -> None:
    with no_index(folder) as repo:
        repo.commit_async(state(1), "one").result()
        repo.commit_async(state(2), "two")
        repo.commit(state(3), "three")
        assert messages(repo) == ["three", "two", "one", "first"]
    with Repo.open(folder) as repo:
        assert messages(repo) == ["three", "two", "one", "first"]
        assert repo.lost() == {}


def test_a_long_lived_handle_beside_ingestion_and_compaction(folder: Path) -> None:
    """Its packs move to their place, and then into other packs."""
    with no_index(folder) as repo, Repo.open(folder, "main", ingest=False) as host:
        kept = repo.commit(state(1, 1.5), "one")
        for step in range(2, 5):
            with Repo.open(folder, "side", index_free=True) as side:
                side.restore(state(0), kept if step == 2 else "HEAD", strict=False)
                side.commit({**state(step), "more": np.full(3000, step)}, f"side {step}")
            host.ingest()
            assert same(repo.checkout(kept), state(1, 1.5))
            made = repo.commit(state(step, 1.5 + step / 1000), f"main {step}")
        host.ingest()
        host.delete_branch("side", force=True)
        assert host.gc(0).packs > 0
        assert same(repo.checkout(made), state(4, 1.504))
        repo.commit(state(5, 1.505), "main 5")
        host.ingest()
        assert messages(host) == ["main 5", "main 4", "main 3", "main 2", "one", "first"]
        assert host.fsck(full=True).problems == []
        assert host.lost() == {}


def test_who_loses_the_race_keeps_one_lost_ref(folder: Path) -> None:
    with no_index(folder) as repo:
        lost = [repo.commit(state(step), f"slow {step}") for step in range(1, 4)]
    with Repo.open(folder, "main", ingest=False) as repo:
        repo.restore(state(0))
        repo.commit(state(1, 2.0), "fast")
        report = repo.ingest()
        assert [each.lost for each in report.ingested] == [True] * 3
        name = f"lost/main/{lost[-1].id.short}"
        assert repo.lost() == {name: lost[-1].id}
        assert report.ingested[-1].ref == f"refs/{name}"
        assert messages(repo) == ["fast", "first"]
        assert messages(repo, name) == ["slow 3", "slow 2", "slow 1", "first"]


def test_a_handle_that_sees_the_race_says_so(folder: Path) -> None:
    with no_index(folder) as one, no_index(folder) as two:
        one.commit(state(1), "one")
        with pytest.raises(ConflictError) as caught:
            two.commit(state(1, 2.0), "two")
    # Whichever is taken up first: that one was told the truth.
    assert sorted(Bundle.unpack(path.read_bytes(), "").lost for path in waiting(folder)) == [False, True]
    with Repo.open(folder) as repo:
        assert messages(repo) == ["one", "first"]
        assert list(repo.lost()) == [caught.value.rescued]


def test_tags_and_status_arrive_with_the_commit(folder: Path) -> None:
    with no_index(folder) as repo:
        made = repo.commit(state(1), "one", tags="v1", status="finished")
        assert repo.tags() == {"v1": made.id}
        with pytest.raises(CkptError, match="exists already"):
            repo.commit(state(2), "two", tags="v1")
    with Repo.open(folder) as repo:
        assert repo.tags() == {"v1": made.id}
        assert [(run.branch, run.status) for run in repo.runs()] == [("main", "finished")]
        # Somebody else made the tag meanwhile: the commit is kept, and the tag as it was.
        with no_index(folder) as other:
            lost = other.commit(state(3), "three", tags="v2")
        repo.tag("v2", made)
        (taken,) = repo.ingest().ingested
        assert (taken.lost, repo.tags()["v2"], repo.lost()) == (
            True,
            made.id,
            {f"lost/main/{lost.id.short}": lost.id},
        )


def test_what_needs_the_index_is_refused(folder: Path) -> None:
    with no_index(folder) as repo:
        for work in (
            lambda: repo.branch("new"),
            lambda: repo.gc(),
            lambda: repo.ingest(),
            lambda: repo.fsck(rebuild=True),
            lambda: repo.set_head("other"),
            lambda: repo.set_status("finished"),
        ):
            with pytest.raises(CkptError) as caught:
                work()
            assert (caught.value.code, "index" in str(caught.value)) == ("index-free", True)
        assert messages(repo) == ["first"]


def test_the_environment_asks_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_INDEX_FREE", "1")
    with Repo.open(folder) as repo:
        assert isinstance(repo._store, IndexFreeStore)
        with repo.claim():
            with pytest.raises(LockedError), no_index(folder) as other:
                other.claim()
    with Repo.open(folder, index_free=False) as repo:
        assert not isinstance(repo._store, IndexFreeStore)
    monkeypatch.setenv("CKPT_INDEX_FREE", "yes")
    with pytest.raises(CkptError, match="CKPT_INDEX_FREE"):
        Repo.open(folder)


TRAINING = """
import os, signal, sys
import numpy as np
from ckptvcs import Repo
from ckptvcs.training import Autosave

with Repo.open(sys.argv[1], "job") as repo:
    state = {"w": np.zeros(5_000), "step": 0}
    repo.restore(state)
    with Autosave(repo, state, every=2) as autosave:
        while state["step"] < 9:
            state["step"] += 1
            state["w"] += state["step"]
            autosave.step(state["step"], {"val_loss": 1 / state["step"]})
            if state["step"] == int(sys.argv[2]):
                autosave.wait()
                os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_requeued_job_goes_on_without_the_index(tmp_path: Path) -> None:
    """Killed twice; nothing is ingested before it is done, or everything, or nothing ever on that host."""
    Repo.init(tmp_path).close()
    environ = {**os.environ, "CKPT_INDEX_FREE": "1"}
    for kill_at, ingested in ((4, False), (7, True), (0, True)):
        script = [sys.executable, "-c", TRAINING, str(tmp_path), str(kill_at)]
        done = subprocess.run(script, env=environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == (-9 if kill_at else 0), done.stderr
        if ingested:
            Repo.open(tmp_path).close()
    with Repo.open(tmp_path, "job") as repo:
        assert repo.lost() == {}
        steps = [commit.step for commit in repo.log()]
        assert steps == sorted(set(filter(None, steps)), reverse=True), "one line, nothing twice"
        assert steps[0] == 9
        assert np.array_equal(repo.checkout()["w"], np.full(5_000, 45.0))
        assert all(commit.origin == (*commit.parents, None)[0] for commit in repo.log())
        assert repo.fsck(full=True).problems == []


def test_a_fork_has_a_writer_of_its_own(folder: Path) -> None:
    with no_index(folder) as repo:
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                repo.on("child").commit(state(1), "child")
                code = 0
            os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        repo.commit(state(1), "parent")
    assert len({path.name[:36] for path in waiting(folder)}) == 2
    with Repo.open(folder) as repo:
        assert sorted(repo.branches()) == ["child", "main"]


# -- ingestion ------------------------------------------------------------------------------------


def test_opening_and_collecting_ingest(folder: Path) -> None:
    with no_index(folder) as repo:
        repo.commit(state(1), "one")
    with Repo.open(folder) as repo:
        assert messages(repo) == ["one", "first"]
        with no_index(folder) as other:
            other.commit(state(2), "two")
        repo.gc()
        assert messages(repo) == ["two", "one", "first"]
        repo.configure("ingest", "manual")
        with no_index(folder) as other:
            other.commit(state(3), "three")
        repo.gc()
    with Repo.open(folder) as repo:
        assert messages(repo) == ["two", "one", "first"]
        assert len(repo.ingest().ingested) == 1


def test_a_second_ingester_waits_for_nothing(folder: Path) -> None:
    with no_index(folder) as repo:
        repo.commit(state(1), "one")
    with Disk().lock(folder / ".ckpt" / "packs.lock"), Repo.open(folder) as repo:
        assert messages(repo) == ["first"]
        with pytest.raises(LockedError, match="ingesting"):
            repo.ingest()


def test_done_twice_is_done_once(folder: Path, tmp_path: Path) -> None:
    """Also when the files come back, after the commit was deleted and collected."""
    with no_index(folder) as repo:
        repo.commit(state(1, 3.0), "one")
    shutil.copytree(folder / ".ckpt" / "incoming", tmp_path / "copy")
    with Repo.open(folder) as repo:
        first = repo.resolve("HEAD~1")
        repo.branch("kept", first)
        repo.set_head("kept")
        repo.delete_branch("main", force=True)
        for grace in ("24h", 0):
            repo.gc(grace)
            shutil.copytree(tmp_path / "copy", folder / ".ckpt" / "incoming", dirs_exist_ok=True)
            report = repo.ingest()
            assert (len(report.cleared), report.ingested, report.quarantined) == (1, [], [])
            assert incoming(folder) == []
            assert list(repo.branches()) == ["kept"]
        assert repo.fsck(full=True).problems == []


@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "bundle", "swapped"])
def test_what_is_damaged_is_put_aside(folder: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    with no_index(folder) as repo:
        repo.commit(state(1, 1.5), "damaged")
        repo.commit(state(2, 1.6), "on top of it")
    with Repo.open(folder, "well", index_free=True) as repo:
        repo.commit(state(7), "well")
    bundle = next(p for p in waiting(folder) if b"damaged" in p.read_bytes())
    name = Bundle.unpack(bundle.read_bytes(), "").packs[0].name
    pack = folder / ".ckpt" / "incoming" / f"{name.text}.pack"
    data = pack.read_bytes()
    victim = bundle if harm == "bundle" else pack
    victim.chmod(0o644)
    if harm == "flip":
        pack.write_bytes(data[:200] + bytes([data[200] ^ 4]) + data[201:])
    elif harm == "cut":
        pack.write_bytes(data[:-1])
    elif harm == "gone":
        pack.unlink()
    elif harm == "bundle":
        bundle.write_bytes(bundle.read_bytes()[:-1])
    else:
        other = next(p for p in pack.parent.glob("*.pack") if p != pack)
        pack.write_bytes(other.read_bytes()[: len(data)].ljust(len(data), b"\0"))
    with caplog.at_level(logging.WARNING), Repo.open(folder) as repo:
        assert sorted(repo.branches()) == ["main", "well"]
        assert messages(repo, "main") == ["first"]
        assert repo.fsck(full=True).problems == []
        # What builds on it goes with it: its parent is nowhere.
        assert len(quarantined(folder)) == 2
        assert incoming(folder) == []
        assert caplog.text.count("quarantine") == 2
        repo.gc(0)
        if harm == "gone":
            return
        # Mended, it comes in all the same.
        place = folder / ".ckpt" / "quarantine" / bundle.name
        if harm == "bundle":
            return
        (place / pack.name).write_bytes(data)
        assert [each.lost for each in repo.ingest(retry=True).ingested] == [False, False]
        assert messages(repo, "main") == ["on top of it", "damaged", "first"]
        assert quarantined(folder) == {}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"repository": str(uuid.UUID(int=7))}, "another repository"),
        ({"ref": "refs/tags/v1"}, "cannot be the name|no branch"),
        ({"ref": "refs/heads/../../x"}, "cannot be the name"),
        ({"ref": "HEAD"}, "cannot be the name|no branch"),
        ({"tags": ("refs/heads/x",)}, "cannot be the name|no tags|are none"),
        ({"tags": ("refs/tags/../x",)}, "cannot be the name"),
        ({"tip": "other"}, "its parent"),
        ({"root": "other"}, "neither in its packs nor stored"),
        ({"packs": ()}, "neither in its packs nor stored"),
    ],
)
def test_a_bundle_that_lies_is_put_aside(folder: Path, changes: dict[str, Any], why: str) -> None:
    from ckptvcs.ids import ObjectId

    with no_index(folder) as repo:
        repo.commit(state(1), "one")
    (path,) = waiting(folder)
    forge(path, **{k: ObjectId(b"\7" * 32) if v == "other" else v for k, v in changes.items()})
    with Repo.open(folder, ingest=False) as repo:
        before = repo.reflog()
        (aside,) = repo.ingest().quarantined
        assert aside.bundle == path.name.removesuffix(".bundle")
        import re

        assert re.search(why, aside.why)
        assert repo.reflog() == before
        assert quarantined(folder) == {aside.bundle: f"{aside.why}\n"}
        assert repo.fsck(full=True).problems == []


def test_what_was_collected_meanwhile_is_put_aside(folder: Path) -> None:
    """Somebody deleted the branch that a job without the index built on."""
    with Repo.open(folder, "job", index_free=True) as repo:
        repo.restore(state(0), "main")
        repo.commit(state(1), "one")
    with Repo.open(folder, "other", ingest=False) as repo:
        repo.commit({"a": 1}, "other")
        repo.set_head("other")
        repo.delete_branch("main", force=True)
        from ckptvcs.maintenance import gc

        gc.collect(repo._store, grace=0, dry_run=False, who="test")
        (aside,) = repo.ingest().quarantined
        assert "stored here" in aside.why
        assert repo.fsck(full=True).problems == []
        # The bytes are kept: whoever brings the base back can have them.
        place = folder / ".ckpt" / "quarantine" / f"{aside.bundle}.bundle"
        assert sorted(path.suffix for path in place.iterdir()) == [".bundle", ".pack", ".txt"]


def test_only_plain_files_are_taken_up(folder: Path) -> None:
    """A pipe would be waited for, and a link leads to what may change later."""
    with no_index(folder) as repo:
        repo.commit(state(1), "one")
    place = folder / ".ckpt" / "incoming"
    os.mkfifo(place / f"{uuid.uuid4()}-1.bundle")
    (place / f"{uuid.uuid4()}-1.bundle").symlink_to("/etc/passwd")
    (pack,) = place.glob("*.pack")
    pack.rename(folder / "elsewhere")
    pack.symlink_to(folder / "elsewhere")
    with Repo.open(folder, ingest=False) as repo:
        (aside,) = repo.ingest().quarantined
        assert "missing or cut short" in aside.why
        assert repo.fsck(full=True).problems == []
    with no_index(folder) as repo:
        assert messages(repo) == ["first"]


@pytest.mark.parametrize("stage", ["placed", "entered"])
def test_an_ingester_that_died(folder: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection comes between it and the next one."""
    with no_index(folder) as repo:
        repo.commit(state(1, 1.5), "one")
    died = RuntimeError("died here")

    def die(*_: object, **__: object) -> None:
        raise died

    with Repo.open(folder, ingest=False) as repo:
        with monkeypatch.context() as patch:
            patch.setattr(ingesting._Ingestion, "_enter" if stage == "placed" else "_clear", die)
            with pytest.raises(RuntimeError, match="died here"):
                repo.ingest()
        from ckptvcs.maintenance import gc

        report = gc.collect(repo._store, grace=0, dry_run=False, who="test")
        assert (report.leftovers > 0) == (stage == "placed")
        report_now = repo.ingest()
        assert len(report_now.ingested) == (stage == "placed")
        assert len(report_now.cleared) == (stage == "entered")
        assert messages(repo, "main") == ["one", "first"]
        assert repo.fsck(full=True).problems == []
        assert incoming(folder) == []


def test_where_files_cannot_have_two_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with no_index(folder) as repo:
        repo.commit(state(1, 1.5), "one")
    monkeypatch.setattr(Disk, "link", lambda *_: False)
    with Repo.open(folder) as repo:
        assert same(repo.checkout("main"), state(1, 1.5))
        assert repo.fsck(full=True).problems == []
    assert incoming(folder) == []


def test_what_interrupted_writers_leave_goes_after_a_month(folder: Path) -> None:
    with no_index(folder) as repo:
        repo.commit(state(1), "one")
    place = folder / ".ckpt" / "incoming"
    old, new = (place / PackName(uuid.uuid4().bytes, 1).text for _ in range(2))
    for each in (old, new):
        for ending in (".pack", ".pack.tmp", ".bundle.0123456789ab.tmp"):
            each.with_name(each.name + ending).write_bytes(b"half of it")
    month_ago = Disk().now_ns() - 31 * 86_400 * 10**9
    for path in place.glob(f"{old.name}*"):
        os.utime(path, ns=(month_ago, month_ago))
    for path in waiting(folder):
        os.utime(path, ns=(month_ago, month_ago))
    with Repo.open(folder, ingest=False) as repo:
        report = repo.ingest()
    assert len(report.ingested) == 1
    assert len(report.abandoned) == 3
    assert len(incoming(folder)) == 3
    assert all(name.startswith(new.name) for name in incoming(folder))


def test_a_full_disk_leaves_the_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with no_index(folder) as repo:
        repo.commit(state(1), "one")

    def full(*_: object) -> bool:
        raise StorageError("the disk is full", code="disk-full")

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Disk, "link", full)
        with Repo.open(folder, say=said.append) as repo:
            assert messages(repo) == ["first"]
    assert "not ingested: the disk is full" in said[0]
    assert len(bundles.readable(Disk(), repo._opened.store.layout)) == 1
    with Repo.open(folder) as repo:
        assert messages(repo) == ["one", "first"]


@pytest.mark.parametrize("fault", ["bundle", "disk"])
def test_whose_fault_it_is(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of bases that has become too long would be tried for ever; a disk that refuses mends."""
    with no_index(folder) as repo:
        repo.commit(state(1), "one")
    path = None if fault == "bundle" else str(folder)

    def refuse(*_: object) -> bool:
        raise StorageError("the base chain is too long" if path is None else "refused", path=path)

    with Repo.open(folder, ingest=False) as repo:
        with monkeypatch.context() as patch:
            patch.setattr(ingesting, "enter", refuse)
            if fault == "bundle":
                assert "too long" in repo.ingest().quarantined[0].why
            else:
                with pytest.raises(StorageError, match="refused"):
                    repo.ingest()
        assert len(repo.ingest(retry=True).ingested) == 1
        assert messages(repo) == ["one", "first"]
