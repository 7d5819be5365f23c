"""`commit_async`: what is copied, one save at a time, errors that surface, processes that die."""

from __future__ import annotations

import argparse
import collections
import copy
import errno
import gc
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptvcs
from ckptvcs import CkptError, ConflictError, LineageError, PendingCommit, Repo, StorageError
from ckptvcs.background import Background
from ckptvcs.ids import ObjectId
from ckptvcs.state.staging import Staging
from ckptvcs.state.tree import write
from ckptvcs.testing.memory import MemoryStore
from ckptvcs.testing.same import difference
from ckptvcs.testing.strategies import states

PACKAGES = Path(ckptvcs.__file__).parent.parent
PATIENCE = 60.0


def tree_of(state: Any) -> ObjectId:
    """The tree that a state has now."""
    return write(MemoryStore(), state).tree


def writer_of(repo: Repo) -> int:
    """The process id of a handle's running writer."""
    background = repo._opened.background
    assert background is not None
    assert background._companion is not None
    return background._companion.number


class Paused:
    """The writer stands still during the block, so that a save stays in flight."""

    def __init__(self, repo: Repo) -> None:
        self.process = writer_of(repo)

    def __enter__(self) -> Paused:
        os.kill(self.process, signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.process, signal.SIGCONT)


def started(repo: Repo) -> Repo:
    """A handle whose writer runs."""
    repo.commit_async({"started": True}).result(PATIENCE)
    return repo


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(process: int) -> bool:
    """Whether there is no such process, or only its record."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def run(script: str, *arguments: object, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """A script of its own in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        cwd=PACKAGES,
        check=False,
    )


# -- what is copied -------------------------------------------------------------------------------


PARTS = ("torch", "numpy", "python")


def every_leaf() -> dict[str, Any]:
    """Something of every kind that can change, small enough to live in the tree and large."""
    base = torch.arange(4096, dtype=torch.float32)
    big = np.arange(600_000, dtype=np.float64).reshape(600, 1000)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.BatchNorm1d(30))
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    return {
        "torch": {
            "plain": torch.randn(500, 700),
            "step": torch.tensor(7.0),
            "bool": torch.rand(3000) > 0.5,
            "bf16": torch.randn(3000).bfloat16(),
            "complex": torch.randn(1000, dtype=torch.complex64),
            "view": base[10:2000:3],
            "tied": [base, base],
            "transposed": torch.randn(60, 50).T,
            "sparse": torch.eye(80).to_sparse(),
            "parameter": torch.nn.Parameter(torch.randn(100)),
            "generator": torch.Generator().manual_seed(3),
        },
        "numpy": {
            "plain": big,
            "transposed": big.T[::2],
            "zero": np.array(3),
            "turned": np.arange(500, dtype=">i4"),
            "bf16": np.arange(700).astype(ml_dtypes.bfloat16),
            "odd": np.array([b"abcde"] * 300, "V5")[::2],
            "text": np.array(["a", "bc"] * 200),
        },
        "python": {
            "counter": 3,
            "list": [1, [2, 3]],
            "bytearray": bytearray(b"x" * 5000),
            "small": bytearray(b"x"),
            "deque": collections.deque([1, 2], 9),
            "namespace": argparse.Namespace(step=3),
            "simple": types.SimpleNamespace(values=[1]),
            "set": {1, 2},
            "default": collections.defaultdict(list, a=[1]),
        },
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2),
    }


def step(model: Any, optimizer: Any) -> None:
    """One step of training."""
    model(torch.randn(8, 40)).square().mean().backward()
    optimizer.step()


def spoil(value: Any) -> None:
    """Change whatever can be changed in place, everywhere."""
    if isinstance(value, torch.Generator):
        torch.rand(1, generator=value)
    elif isinstance(value, torch.Tensor):
        with torch.no_grad():
            memory = value._values() if value.layout is torch.sparse_coo else value
            memory.copy_(~memory if memory.dtype is torch.bool else memory + 1)
    elif isinstance(value, np.ndarray):
        if value.flags.writeable:
            value[...] = np.zeros_like(value)
    elif isinstance(value, bytearray):
        value += b"more"
        value[0] ^= 1
    elif isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
        spoil(vars(value))
    elif isinstance(value, set):
        value.add("more")
    elif isinstance(value, dict):
        for each in list(value.values()):
            spoil(each)
        for key, each in list(value.items()):
            if type(each) in (int, float):
                value[key] = each + 1
        value["more"] = 1
    elif isinstance(value, (list, collections.deque)):
        for each in list(value):
            spoil(each)
        value.append("more")
    elif isinstance(value, tuple):
        for each in value:
            spoil(each)


def spoil_all(state: dict[str, Any]) -> None:
    """Train on, and change everything else."""
    step(state["model"], state["optimizer"])
    state["scheduler"].step()
    for part in PARTS:
        spoil(state[part])


def parts_of(state: dict[str, Any]) -> dict[str, ObjectId]:
    """The tree of each leaf by path, to see that each of them was spoilt."""
    leaves = [(f"{part}/{name}", leaf) for part in PARTS for name, leaf in state[part].items()]
    return {path: tree_of(leaf) for path, leaf in leaves if not path.endswith("/more")}


def test_every_leaf_may_change_as_soon_as_the_call_returns(repo: Repo) -> None:
    for _ in range(3):  # into fresh memory, then into the same again
        state = every_leaf()
        wanted, before = tree_of(state), parts_of(state)
        pending = repo.commit_async(state)
        spoil_all(state)
        after = parts_of(state)
        assert pending.result(PATIENCE).tree == wanted
        assert [name for name, tree in before.items() if after[name] == tree] == []
    assert repo.fsck(full=True).ok


@pytest.mark.parametrize("piece", [1, 999, 4096])
def test_copies_in_pieces(repo: Repo, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """No border of a piece cuts an element, in order or not, turned around or not."""
    monkeypatch.setattr("ckptvcs.state.staging._PIECE", piece)
    state = {
        "odd": np.arange(12_000).astype("S5").reshape(20, 30, 20).transpose(2, 0, 1)[:, ::3],
        "turned": np.arange(700, dtype=">c16")[::-1],
        "plain": np.arange(700, dtype=np.float64),
        "channels": torch.randn(2, 3, 10, 12).to(memory_format=torch.channels_last),
        "half": torch.randn(30, 40).half().T,
    }
    wanted = tree_of(state)
    pending = repo.commit_async(state)
    spoil(state)
    assert pending.result(PATIENCE).tree == wanted


def test_what_comes_back_is_the_state_at_the_call(repo: Repo) -> None:
    model, optimizer = every_leaf()["model"], None
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    state = {"model": model, "optimizer": optimizer, "step": torch.tensor(5), "n": 5}
    wanted = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "n": 5})
    pending = repo.commit_async(state)
    step(model, optimizer)
    state["step"] += 1
    state["n"] = 6
    got = repo.checkout(pending.result(PATIENCE))
    assert got.pop("step") == 5
    assert difference(wanted, got) is None


@pytest.fixture(scope="module")
def shared_repo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repo]:
    """One repository for many states."""
    with Repo.init(tmp_path_factory.mktemp("shared")) as opened:
        yield opened


@pytest.mark.slow
@settings(max_examples=60)
@given(state=states)
def test_any_state_may_change_as_soon_as_the_call_returns(shared_repo: Repo, state: Any) -> None:
    wanted = tree_of(state)
    pending = shared_repo.commit_async(state)
    spoil(state)
    assert pending.result(PATIENCE).tree == wanted


@pytest.mark.slow
@settings(max_examples=60)
@given(sizes=st.lists(st.integers(250, 3_000_000), max_size=4), turned=st.booleans())
def test_any_sizes(shared_repo: Repo, sizes: list[int], turned: bool) -> None:
    """Cells, pieces, and tensors beside each other; the memory grows and is used again."""
    rng = np.random.default_rng(len(sizes))
    state = [rng.integers(0, 256, size, np.uint8)[:: -1 if turned else 1] for size in sizes]
    wanted = tree_of(state)
    pending = shared_repo.commit_async(state)
    spoil(state)
    assert pending.result(PATIENCE).tree == wanted


def test_tied_memory_is_copied_once(repo: Repo) -> None:
    weight = torch.randn(1000, 1000)
    wanted = tree_of({"a": weight, "b": weight.view(-1), "c": weight})
    assert repo.commit_async({"a": weight, "b": weight.view(-1), "c": weight}).result().tree == wanted
    background = repo._opened.background
    assert background is not None
    assert background._staging is not None
    assert background._staging.copied == weight.nbytes


def test_files_are_copied_too(repo: Repo, tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    (tmp_path / "big").write_bytes(data)
    (tmp_path / "empty").touch()
    pending = repo.commit_async({"n": 1}, files={"big": tmp_path / "big", "empty": tmp_path / "empty"})
    (tmp_path / "big").write_bytes(b"other")
    (tmp_path / "empty").unlink()
    to = tmp_path / "out"
    repo.checkout_files(pending.result(PATIENCE), to)
    assert (to / "big").read_bytes() == data
    assert (to / "empty").read_bytes() == b""


def test_everything_a_commit_records(repo: Repo) -> None:
    config = {"lr": 1e-3, "nested": {"a": [1, None, True]}}
    given_ = {"step": 3, "epoch": 1.5, "metrics": {"loss": float("nan"), "n": 1}, "config": config}
    a = repo.commit_async({"n": 1}, "title\nbody", **given_).result(PATIENCE)  # type: ignore[arg-type]
    b = repo.commit({"n": 1}, "title\nbody", **given_)  # type: ignore[arg-type]
    read = repo.resolve(a.id)
    for name in ("author", "message", "step", "epoch", "config", "environment", "tree", "sizes"):
        assert getattr(a, name) == getattr(b, name) == getattr(read, name), name
    assert str(a.metrics) == str(b.metrics) == str(read.metrics)
    assert (a.parents, a.origin, a.time) == (read.parents, read.origin, read.time) == ((), None, a.time)
    assert b.parents == (a.id,) == (b.origin,)
    assert a.report is not None
    assert b.report is not None
    assert a.report.given == b.report.given
    assert a.report.components.keys() == b.report.components.keys()


def test_what_cannot_be_stored_is_refused_at_once(repo: Repo) -> None:
    with pytest.raises(ckptvcs.UnsupportedStateError, match="hook"):
        repo.commit_async({"hook": print})
    with pytest.raises(ckptvcs.InvalidError, match="when_busy"):
        repo.commit_async({}, when_busy="perhaps")
    with pytest.raises(ckptvcs.InvalidError, match="metric"):
        repo.commit_async({}, metrics={"loss": "low"})
    assert repo.commit_async({"n": 1}).result(PATIENCE).parents == ()


# -- one at a time --------------------------------------------------------------------------------


def test_wait_and_skip(repo: Repo) -> None:
    with Paused(started(repo)):
        first = repo.commit_async({"n": 1})
        assert not first.done()
        assert not first.skipped
        with pytest.raises(TimeoutError):
            first.result(0.01)
        skipped = repo.commit_async({"n": 2}, when_busy="skip")
        assert skipped.skipped
        assert skipped.done()
        with pytest.raises(CkptError, match="skipped") as caught:
            skipped.result()
        assert caught.value.code == "skipped"
        threading.Timer(0.3, os.kill, (writer_of(repo), signal.SIGCONT)).start()
        second = repo.commit_async({"n": 3})
    assert first.done()
    assert 0.2 < second.waited <= second.blocked
    assert second.result(PATIENCE).parents == (first.result().id,)
    assert repo.commit_async({"n": 4}, when_busy="skip").result(PATIENCE).parents == (second.result().id,)


def test_who_saw_it_done_may_save_without_waiting(repo: Repo) -> None:
    pending = repo.commit_async({"n": 0})
    for n in range(30):
        until(pending.done)
        pending = repo.commit_async({"n": n}, when_busy="skip")
        assert not pending.skipped


def test_commit_and_restore_wait_for_the_save(repo: Repo) -> None:
    first = started(repo).resolve()
    with Paused(repo) as paused:
        pending = repo.commit_async({"n": 1})
        assert repo.resolve("HEAD").id == first.id  # reads see what is durable
        threading.Timer(0.2, os.kill, (paused.process, signal.SIGCONT)).start()
        made = repo.commit({"n": 2})
    assert made.parents == (pending.result().id,)
    with Paused(repo) as paused:
        pending = repo.commit_async({"n": 3})
        threading.Timer(0.2, os.kill, (paused.process, signal.SIGCONT)).start()
        into = {"started": False}
        repo.restore(into, first)
    assert into == {"started": True}
    with pytest.raises(LineageError):  # the origin is what was restored, not what ended meanwhile
        repo.commit_async({"n": 4})
    assert repo.resolve().id == pending.result().id


def test_two_handles_share_one_writer(repo: Repo) -> None:
    other = repo.on("other")
    a = repo.commit_async({"n": 1})
    b = other.commit_async({"n": 2})
    process = writer_of(repo)
    c = repo.commit_async({"n": 3})
    assert c.result(PATIENCE).parents == (a.result().id,)
    assert b.result(PATIENCE).parents == ()
    assert writer_of(repo) == process
    assert repo.branches() == {"main": c.result().id, "other": b.result().id}


def test_differences_to_the_save_before(folder: Path) -> None:
    """The writer remembers what it stored, and the trainer's own commits are bases as well."""
    state = torch.randn(500_000)
    with Repo.init(folder) as repo:
        for save in (repo.commit_async, repo.commit_async, repo.commit, repo.commit_async):
            made = save({"w": state})
            made = made.result(PATIENCE) if isinstance(made, PendingCommit) else made
            state += 1e-4 * torch.randn(500_000)
        assert made.report is not None
        assert made.report.stored < 0.7 * made.report.given


def test_the_log_line(repo: Repo, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ckptvcs"):
        repo.commit_async({"w": np.zeros(2_000_000, np.uint8)}).result(PATIENCE)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert line.startswith("blocked ")
    assert line.endswith(" s, new 2.0 MB of 2.0 MB")


# -- frozen ---------------------------------------------------------------------------------------


def copied(repo: Repo) -> int:
    """Bytes that the last save copied."""
    background = repo._opened.background
    assert background is not None
    assert background._staging is not None
    return background._staging.copied


def test_frozen_tensors_are_copied_when_they_change(repo: Repo) -> None:
    state = {
        "backbone": torch.nn.Linear(512, 600),
        "head": torch.nn.Linear(600, 10),
        "half": torch.randn(500, 700).T,
    }
    frozen = ["backbone", "half"]

    def save() -> int:
        wanted = tree_of(state)
        assert repo.commit_async(state, frozen=frozen).result(PATIENCE).tree == wanted
        return copied(repo)

    always = 4 * (600 + 600 * 10)  # what is small; the head's bias lives in the tree
    backbone, half = 4 * 512 * 600, 4 * 500 * 700
    assert save() == always + backbone + half
    assert save() == always
    with torch.no_grad():
        state["backbone"].weight.add_(1)  # type: ignore[union-attr, operator]
    assert save() == always + backbone
    state["half"] = torch.randn(500, 700).T  # in the place of the old one, perhaps
    assert save() == always + half
    state["half"].requires_grad_()  # type: ignore[union-attr]
    assert save() == always
    spoilt = state["half"].detach()  # type: ignore[union-attr]
    spoilt[3, 4] = 5
    assert save() == always + half
    del state["backbone"]  # everything moves
    assert save() == 4 * 600 * 10 + half
    frozen.clear()
    assert save() == 4 * 600 * 10 + half


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_writes_of_fused_optimizers_count(repo: Repo, optimizer: Any) -> None:
    """Their kernels do not tell torch's version counters."""
    model = torch.nn.Linear(600, 600)
    state = {"model": model, "optimizer": optimizer(model.parameters(), lr=0.1, fused=True)}
    for _ in range(3):
        model(torch.randn(2, 600)).sum().backward()
        state["optimizer"].step()
        wanted = tree_of(state)
        assert repo.commit_async(state, frozen="**").result(PATIENCE).tree == wanted


def test_running_statistics_of_frozen_layers_are_copied(repo: Repo) -> None:
    model = torch.nn.BatchNorm1d(500)
    for _ in range(2):
        model(torch.randn(3, 500))
        wanted = tree_of(model.state_dict())
        assert repo.commit_async(model.state_dict(), frozen="**").result(PATIENCE).tree == wanted


def test_a_copy_that_was_interrupted_is_made_again(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"a": torch.randn(300_000), "b": torch.randn(300_000)}
    repo.commit_async(state, frozen="**").result(PATIENCE)
    state["b"] += 1
    with monkeypatch.context() as patched:
        patched.setattr("ckptvcs.state.staging._copy", interrupt)
        with pytest.raises(KeyboardInterrupt):
            repo.commit_async(state, frozen="**")
    wanted = tree_of(state)
    assert repo.commit_async(state, frozen="**").result(PATIENCE).tree == wanted
    assert copied(repo) == 2_400_000


def test_copying_that_outlives_an_interruption_spoils_no_later_save(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two Ctrl-C leave threads that copy behind."""
    late: list[Callable[[], None]] = []

    def fill(staging: Any, memory: memoryview, layout: Any) -> None:
        late.append(lambda: original(staging, memory, layout))
        raise KeyboardInterrupt

    original = Staging.fill
    started(repo)
    with monkeypatch.context() as patched:
        patched.setattr(Staging, "fill", fill)
        with pytest.raises(KeyboardInterrupt):
            repo.commit_async({"a": np.zeros(1000)})
    carry = Background._carry
    monkeypatch.setattr(Background, "_carry", lambda *arguments: (late[0](), carry(*arguments)))
    made = repo.commit_async({"a": np.ones(1000)}).result(PATIENCE)
    assert repo.checkout(made)["a"].all()


def interrupt(*_: object) -> None:
    """Ctrl-C, here."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("after", [False, True])
def test_ctrl_c_around_the_start_of_a_save(
    repo: Repo, monkeypatch: pytest.MonkeyPatch, *, after: bool
) -> None:
    """The save is made, or it is not; either way the handle knows."""
    first = started(repo).resolve()
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if after:
            waiting = thread._args[4]  # type: ignore[attr-defined]
            start(thread)
            until(lambda: not waiting)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            repo.commit_async({"n": 1})
    made = repo.commit({"n": 2})
    between = repo.resolve(made.parents[0])
    assert repo.checkout(between) == ({"n": 1} if after else {"started": True})
    assert (between.id == first.id) == (not after)
    assert repo.commit_async({"n": 3}).result(PATIENCE).parents == (made.id,)


def test_ctrl_c_while_the_save_is_starting(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that was to carry it finds that it is not to."""
    first = started(repo).resolve()
    start, carry = threading.Thread.start, Background._carry
    gate, passed = threading.Event(), threading.Event()

    def late(*arguments: Any) -> None:
        gate.wait()
        carry(*arguments)
        passed.set()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Background, "_carry", late)
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            repo.commit_async({"n": 1})
        gate.set()
        assert passed.wait(PATIENCE)
    assert repo.commit_async({"n": 2}).result(PATIENCE).parents == (first.id,)
    assert repo.commit_async({"n": 3}, when_busy="skip").result(PATIENCE).step is None


def test_memory_of_inference_mode_is_always_copied(repo: Repo) -> None:
    with torch.inference_mode():
        state = {"a": torch.randn(300_000)}
    for _ in range(2):
        repo.commit_async(state, frozen="**").result(PATIENCE)
        assert copied(repo) == 1_200_000


# -- errors ---------------------------------------------------------------------------------------


def conflict(repo: Repo) -> PendingCommit:
    """A save that loses a race."""
    started(repo)
    with Repo.open(repo.path, branch=repo.branch_name) as other:
        other.restore({"started": False})
        other.commit({"n": "theirs"})
    pending = repo.commit_async({"n": "ours"})
    until(pending.done)
    return pending


def test_a_lost_race_is_told_by_result(repo: Repo) -> None:
    pending = conflict(repo)
    for _ in range(2):
        with pytest.raises(ConflictError) as caught:
            pending.result()
        assert caught.value.rescued is not None
        assert repo.checkout(caught.value.rescued) == {"n": "ours"}
    with pytest.raises(ConflictError):  # this handle still stands where it stood
        repo.commit({"n": 1})
    with pytest.raises(ConflictError):
        repo.commit_async({"n": 2}).result()


@pytest.mark.parametrize("name", ["commit", "commit_async"])
def test_a_lost_race_is_told_by_the_next_commit(repo: Repo, name: str) -> None:
    conflict(repo)
    before = repo.resolve("main").id
    with pytest.raises(ConflictError) as caught:
        getattr(repo, name)({"n": 1})
    assert repo.checkout(caught.value.rescued) == {"n": "ours"}
    assert repo.resolve("main").id == before
    assert len(repo.lost()) == 1  # the state at hand was not saved; the caller knows now


def test_a_lost_race_is_told_by_close(folder: Path) -> None:
    repo = Repo.init(folder)
    conflict(repo)
    process = writer_of(repo)
    with pytest.raises(ConflictError):
        repo.close()
    repo.close()
    assert gone(process)


def test_close_of_the_first_handle_tells_of_all(folder: Path) -> None:
    repo = Repo.init(folder)
    conflict(repo.on("other"))
    with pytest.raises(ConflictError, match="other"):
        repo.close()


def test_an_error_does_not_hide_that_of_the_block(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def work() -> None:
        with Repo.init(folder) as repo:
            conflict(repo)
            raise RuntimeError("the block's own")

    with pytest.raises(RuntimeError, match="own"):
        work()
    assert "was not made" in caplog.text


def test_a_disk_that_refuses(repo: Repo) -> None:
    first = started(repo).resolve()
    process = writer_of(repo)
    limit = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (100_000, limit[1]))
    state = {"w": np.random.default_rng(1).integers(0, 256, 5_000_000, np.uint8)}
    with pytest.raises(StorageError) as caught:
        repo.commit_async(state).result(PATIENCE)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.path is not None
    assert caught.value.hint == "see `ulimit -f`"
    assert repo.resolve().id == first.id
    resource.prlimit(process, resource.RLIMIT_FSIZE, limit)
    assert repo.commit_async(state).result(PATIENCE).parents == (first.id,)
    assert writer_of(repo) == process
    assert repo.fsck(full=True).ok


def test_a_writer_that_dies(repo: Repo) -> None:
    first = started(repo).resolve()
    with Paused(repo) as paused:
        pending = repo.commit_async({"n": 1})
        os.kill(paused.process, signal.SIGKILL)
    with pytest.raises(CkptError, match="SIGKILL") as caught:
        pending.result(PATIENCE)
    assert caught.value.code == "writer-lost"
    assert repo.commit_async({"n": 2}).result(PATIENCE).parents == (first.id,)
    assert writer_of(repo) != paused.process
    assert repo.fsck(full=True).ok


def test_a_writer_that_dies_while_idle(repo: Repo) -> None:
    process = writer_of(started(repo))
    os.kill(process, signal.SIGKILL)
    until(lambda: gone(process))
    assert repo.commit_async({"n": 2}).result(PATIENCE).parents


def test_a_writer_that_dies_after_the_commit_was_durable(repo: Repo) -> None:
    """Its last word is lost, the commit is not, and the handle does not conflict with itself."""
    first = started(repo).resolve()
    background = repo._opened.background
    assert background is not None
    companion = background._companion
    assert companion is not None
    receive = companion.receive
    companion.receive = lambda: receive() and None  # type: ignore[method-assign, func-returns-value]
    made = repo.commit_async({"n": 1}, metrics={"loss": float("nan")}).result(PATIENCE)
    assert made.parents == (first.id,)
    assert repo.resolve().id == made.id
    assert repo.commit_async({"n": 2}).result(PATIENCE).parents == (made.id,)


def test_where_no_process_can_be_started(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(CkptError, match="nowhere") as caught:
            repo.commit_async({"n": 1})
        assert "commit" in str(caught.value.hint)
        patched.setattr(sys, "executable", "")
        with pytest.raises(CkptError, match="no Python interpreter"):
            repo.commit_async({"n": 1})
        patched.setattr(sys, "executable", "/bin/true")
        with pytest.raises(CkptError, match="ended with status 0") as caught:
            repo.commit_async({"n": 1}).result(PATIENCE)
        assert caught.value.code == "writer-lost"
    assert repo.commit({"n": 1}).parents == ()
    assert repo.commit_async({"n": 2}).result(PATIENCE).step is None


def test_where_memory_is_refused(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(StorageError, match="Cannot allocate memory") as caught:
            repo.commit_async({"w": np.zeros(1_000_000)})
        assert "commit" in str(caught.value.hint)
        patched.setattr(os, "memfd_create", refuse)
        with Repo.open(repo.path) as other, pytest.raises(StorageError, match="shared memory"):
            other.commit_async({"n": 1})
    assert repo.commit_async({"w": np.zeros(1_000_000)}).result(PATIENCE).parents == ()


def test_without_a_memfd(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.delattr(os, "posix_fallocate")
    state = {"w": np.arange(1_000_000)}
    assert repo.commit_async(state).result(PATIENCE).tree == tree_of(state)


def test_rebuilding_the_index_stops_the_writer(repo: Repo) -> None:
    made = started(repo).resolve()
    assert repo.fsck(rebuild=True).ok
    assert repo.commit_async({"n": 1}).result(PATIENCE).parents == (made.id,)


def test_a_signal_handler_that_saves_is_refused(repo: Repo) -> None:
    class Nested:
        def state_dict(self) -> dict[str, Any]:
            with pytest.raises(CkptError) as caught:
                repo.commit_async({"inner": 1})
            assert caught.value.code == "busy"
            return {"n": 1}

    assert repo.checkout(repo.commit_async({"nested": Nested()}).result(PATIENCE)) == {"nested": {"n": 1}}


def test_a_signal_handler_that_closes_is_refused(repo: Repo) -> None:
    """It would wait for the save that waits for it."""

    class Nested:
        def state_dict(self) -> dict[str, Any]:
            with pytest.raises(CkptError) as caught:
                repo.close()
            assert caught.value.code == "busy"
            return {"n": 1}

    assert repo.checkout(repo.commit_async({"nested": Nested()}).result(PATIENCE)) == {"nested": {"n": 1}}
    repo.commit({"nested": Nested()})
    repo.close()


def test_closing_while_another_thread_waits_for_its_turn(folder: Path) -> None:
    repo = Repo.init(folder)
    other = started(repo).on("other")
    caught: list[str] = []

    def save() -> None:
        try:
            other.commit_async({"n": 2})
        except CkptError as error:
            caught.append(error.code)

    background = repo._opened.background
    assert background is not None
    writer = writer_of(repo)
    background._turn.acquire()
    thread = threading.Thread(target=save)
    thread.start()
    other._committer.closed = True  # what `close` of the first handle does before it takes its turn
    background._turn.release()
    thread.join(PATIENCE)
    assert caught == ["closed"]
    repo.close()
    assert gone(writer)


# -- processes ------------------------------------------------------------------------------------


def test_signals_to_the_group_do_not_end_a_save(repo: Repo) -> None:
    first = started(repo).resolve()
    with Paused(repo) as paused:
        pending = repo.commit_async({"n": 1})
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(paused.process, each)
    assert pending.result(PATIENCE).parents == (first.id,)


def test_the_writer_yields(repo: Repo) -> None:
    process = writer_of(started(repo))
    assert os.getpriority(os.PRIO_PROCESS, process) == 19
    maps = Path(f"/proc/{process}/maps").read_text()
    assert "numpy" in maps
    assert "torch" not in maps


def leftovers() -> tuple[int, str]:
    """Open descriptors, and mapped shared memory."""
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), "".join(line for line in maps.splitlines() if "memfd" in line)


@pytest.mark.slow
def test_nothing_is_left_behind(tmp_path: Path) -> None:
    def once(name: str, *, close: bool) -> int:
        repo = started(Repo.init(tmp_path / name))
        process = writer_of(repo)
        if close:
            repo.close()
        return process

    once("first", close=True)
    gc.collect()  # what other tests left
    before = leftovers()
    ended = [once(f"closed{n}", close=True) for n in range(4)]
    assert all(map(gone, ended))
    ended = [once(f"forgotten{n}", close=False) for n in range(4)]
    gc.collect()
    assert all(map(gone, ended))
    assert leftovers() == before


def test_a_forked_child_has_a_writer_of_its_own(repo: Repo) -> None:
    first = started(repo).resolve()
    with Paused(repo):
        pending = repo.commit_async({"n": "parent"})
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with pytest.raises(CkptError, match="belongs"):
                    pending.result(1)
                mine = repo.on("child")
                assert mine.commit_async({"n": "child"}).result(PATIENCE).parents == ()
                mine.close()
                repo.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not pending.done()
    assert pending.result(PATIENCE).parents == (first.id,)
    assert repo.checkout("child") == {"n": "child"}
    assert repo.commit_async({"n": 3}).result(PATIENCE).parents == (pending.result().id,)


KILLED = """
    import os, signal, sys, time
    import numpy as np
    import ckptvcs

    repo = ckptvcs.Repo.open(sys.argv[1])
    repo.commit_async({"n": 0}).result()
    print(repo._opened.background._companion.number, flush=True)
    if sys.argv[2] == "fork" and os.fork() == 0:
        os.close(1)
        os.close(2)
        time.sleep(60)  # a worker that outlives its trainer
        os._exit(0)
    state = {"w": np.random.default_rng(3).integers(0, 256, 30_000_000, np.uint8)}
    repo.commit_async(state, "last")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_save_outlives_its_trainer(repo: Repo, how: str) -> None:
    """What the call returned from is finished, and then the writer ends by itself."""
    done = run(KILLED, repo.path, how)
    assert done.returncode == -signal.SIGKILL
    process = int(done.stdout)
    until(lambda: gone(process))
    last = repo.resolve("main")
    assert last.message == "last"
    wanted = np.random.default_rng(3).integers(0, 256, 30_000_000, np.uint8)
    assert np.array_equal(repo.checkout(last)["w"], wanted)
    assert repo.fsck(full=True).ok


AT_EXIT = """
    import atexit, os, sys

    @atexit.register
    def first_registered():
        print("handler after", flush=True)
        print("unflushed", end="")

    import ckptvcs

    atexit.register(print, "handler before")
    kept = open(sys.argv[3], "w")
    kept.write("written")
    repo = ckptvcs.Repo.open(sys.argv[1])
    repo.commit_async({"n": 0}).result()
    if sys.argv[2] != "well":
        with ckptvcs.Repo.open(sys.argv[1]) as other:
            other.restore({"n": 0})
            other.commit({"n": "theirs"})
    pending = repo.commit_async({"n": 1})
    if sys.argv[2] == "asked":
        try:
            pending.result()
        except ckptvcs.ConflictError:
            pass
    if sys.argv[2] == "exit":
        sys.exit(3)
    if sys.argv[2] == "raised":
        raise RuntimeError("of the script")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status"), [("well", 0), ("asked", 0), ("unasked", 120), ("exit", 120), ("raised", 120)]
)
def test_the_exit_status_tells_of_an_error_that_nobody_saw(
    repo: Repo, tmp_path: Path, how: str, status: int
) -> None:
    done = run(AT_EXIT, repo.path, how, tmp_path / "kept")
    assert done.returncode == status, done.stderr
    assert done.stdout == "handler before\nhandler after\nunflushed"
    assert (tmp_path / "kept").read_text() == "written"
    assert ("a commit was not made" in done.stderr) == (status == 120)
    assert ("moved the branch main" in done.stderr) == (status == 120)
    assert ("RuntimeError: of the script" in done.stderr) == (how == "raised")
    if how == "well":
        assert repo.checkout("main") == {"n": 1}


SAME_CODE = """
    import os, sys

    sys.path[:] = [sys.argv[2], *(each for each in sys.path if each and each != sys.argv[3])]
    import ckptvcs

    assert ckptvcs.__file__.startswith(sys.argv[2]), ckptvcs.__file__
    os.chdir("/tmp")
    with ckptvcs.Repo.open(sys.argv[1]) as repo:
        assert repo.commit_async({"n": 0}).result().message == ""
        writer = repo._opened.background._companion
        print(open(f"/proc/{writer.number}/cmdline").read().count(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("-I",), ("-s", "-E")], ids=str)
@pytest.mark.parametrize("zipped", [False, True])
def test_the_writer_runs_the_same_code(repo: Repo, tmp_path: Path, flags: Any, zipped: bool) -> None:
    """Whatever else is installed, wherever this package lies, and whatever the current folder is."""
    place = PACKAGES
    if zipped:
        place = tmp_path / "code.zip"
        with zipfile.ZipFile(place, "w") as archive:
            for path in (PACKAGES / "ckptvcs").rglob("*.py"):
                archive.write(path, path.relative_to(PACKAGES))
    done = run(SAME_CODE, repo.path, place, PACKAGES, flags=flags)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1
