"""Claims on branches: who holds one, what a lost one forbids, and what does not disturb them."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import ConflictError, LineageError, LockedError, Repo
from ckptvcs.ids import digest


def small(n: int) -> dict[str, Any]:
    return {"w": np.full(100, n)}


def file_of(folder: Path, branch: str) -> Path:
    return folder / ".ckpt/leases" / f"claim-{digest(f'refs/heads/{branch}'.encode()).hex()}"


@pytest.fixture
def other(folder: Path, repo: Repo) -> Any:
    with Repo.open(folder) as opened:
        yield opened


def test_a_claim_is_held_by_one(folder: Path, repo: Repo, other: Repo) -> None:
    claim = repo.claim()
    assert claim.held
    said = json.loads(file_of(folder, "main").read_text())
    assert said.pop("token") == claim.token
    assert said == {
        "process": os.getpid(),
        "host": os.uname().nodename,
        "job": None,
        "author": repo.author,
        "origin": None,
    }
    shown = rf"main is claimed by this process on .* \({repo.author}\)\n"
    with pytest.raises(LockedError, match=shown) as caught:
        other.claim()
    assert caught.value.code == "claimed"
    claim.release()
    claim.release()
    assert claim.released
    assert not claim.held
    assert other.claim().held


def test_branches_are_claimed_each_for_itself(repo: Repo, other: Repo) -> None:
    names = ["main", "a", "a/b", "x" * 100, "ünïcode"]
    claims = [repo.on(name).claim() for name in names]
    assert all(claim.held for claim in claims)
    for name in names:
        with pytest.raises(LockedError):
            other.on(name).claim()


def test_a_detached_head_has_nothing_to_claim(folder: Path, repo: Repo) -> None:
    repo.set_head(repo.commit(small(1)))
    with Repo.open(folder) as detached, pytest.raises(LineageError, match="detached"):
        detached.claim()


@pytest.mark.parametrize("how", ["commit", "commit_async"])
def test_a_claimant_that_lost_its_claim_commits_no_more(repo: Repo, other: Repo, how: str) -> None:
    claim = repo.claim()
    tip = repo.commit(small(1), step=1)
    other.restore(small(0))
    theirs = other.claim(steal=True)
    assert not claim.held
    with pytest.raises(LockedError, match="the branch main was taken over by this process") as caught:
        getattr(repo, how)(small(2))
    assert caught.value.code == "claimed"
    assert repo.branches() == {"main": tip.id}
    assert repo.lost() == {}
    other.commit(small(3), step=2)
    claim.release()
    assert theirs.held
    with pytest.raises(ConflictError):  # a claim that was given back binds nobody; refs are compared as ever
        repo.commit(small(4))


def test_a_claim_that_goes_while_a_commit_is_made(repo: Repo, other: Repo) -> None:
    """Nothing moves, and nothing of the commit stays behind."""
    repo.claim()
    tip = repo.commit(small(1))
    other.restore(small(0))

    class Thief:
        def state_dict(self) -> dict[str, Any]:
            other.claim(steal=True)
            return {"big": np.random.default_rng(0).integers(0, 256, 3 << 20, np.uint8)}

    with pytest.raises(LockedError, match="taken over"):
        repo.commit({"thief": Thief()})
    with pytest.raises(LockedError, match="taken over"):
        repo.commit({"thief": Thief()})
    assert repo.branches() == {"main": tip.id}
    assert repo.lost() == {}
    assert repo.fsck(full=True).ok
    assert other.commit(small(2)).parents == (tip.id,)


def test_nothing_is_taken_over_by_who_restored_an_old_tip(repo: Repo, other: Repo) -> None:
    claim = repo.claim()
    repo.commit(small(1))
    other.restore(small(0))
    repo.commit(small(2))
    with pytest.raises(ConflictError, match="somebody else moved the branch main") as caught:
        other.claim(steal=True)
    assert "restore its tip" in str(caught.value.hint)
    assert claim.held
    claim.release()
    with pytest.raises(ConflictError):
        other.claim()
    assert repo.claim().held


def test_who_restored_nothing_claims_the_tip_as_it_is(repo: Repo, other: Repo) -> None:
    claim = repo.claim()
    tip = repo.commit(small(1), step=1)
    assert other.claimed is None
    taken = other.claim(steal=True)
    assert other.claimed is taken
    assert repo.claimed is None
    assert not claim.held
    state = small(0)
    assert other.restore(state).step == 1
    assert other.commit(state).parents == (tip.id,)


def test_closing_gives_claims_back(folder: Path, other: Repo) -> None:
    with Repo.open(folder) as third:
        claims = [third.claim(), third.on("more").claim()]
    assert all(claim.released for claim in claims)
    assert other.claim().held
    assert other.on("more").claim().held


def test_collecting_checking_and_rebuilding_leave_claims_alone(folder: Path, repo: Repo) -> None:
    claim = repo.claim()
    repo.commit(small(1))
    assert repo.gc(grace=0).problems == []
    assert repo.fsck(full=True).ok
    assert claim.held
    report = repo.fsck(full=True, rebuild=True)
    assert report.ok, report.problems
    assert claim.held
    repo.commit(small(2))
    claim.release()
    assert file_of(folder, "main").read_bytes() == b""
    repo.gc(grace=0)
    assert not file_of(folder, "main").exists()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b"[" * 100_000, b'{"host": "a\\nb"}'])
def test_what_a_claim_file_says_is_not_trusted(folder: Path, repo: Repo, other: Repo, content: bytes) -> None:
    claim = repo.claim()
    file_of(folder, "main").write_bytes(content)
    with pytest.raises(LockedError, match="main is claimed by") as caught:
        other.claim()
    assert "\n" not in str(caught.value)
    with pytest.raises(LockedError, match="was taken over"):
        repo.commit(small(1))
    claim.release()


def test_claiming_and_checking_wait_for_the_save_in_flight(repo: Repo, other: Repo) -> None:
    """It moves the tip, which would look like somebody else's doing."""
    repo.commit_async({"n": 0}).result()
    background = repo._opened.background
    assert background is not None
    assert background._companion is not None
    writer = background._companion.number
    os.kill(writer, signal.SIGSTOP)
    repo.commit_async({"n": 1})
    threading.Timer(0.2, os.kill, (writer, signal.SIGCONT)).start()
    claim = repo.claim()
    assert claim.held
    repo.check_commit({"n": 2})
    assert repo.checkout(repo.commit({"n": 2}).parents[0]) == {"n": 1}
