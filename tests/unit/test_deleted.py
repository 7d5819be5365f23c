"""Bringing back what was deleted, from the log."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ckptvcs import AmbiguousError, ConflictError, ExistsError, NotFoundError, Repo
from ckptvcs.store import Status


def state(seed: int) -> dict[str, Any]:
    """A state that shares nothing with others."""
    return {"w": np.random.default_rng(seed).integers(0, 256, 4000, np.uint8)}


def test_a_branch_comes_back_with_its_commits(repo: Repo) -> None:
    repo.commit(state(0))
    handle = repo.on("side")
    handle.commit(state(1))
    tip = handle.commit(state(2))
    repo.delete_branch("side", force=True)
    assert repo.gc().records == 0  # the undo window holds it
    assert [each.name for each in repo.deleted()] == ["side"]
    assert repo.undelete("side") == tip.id
    assert repo.deleted() == []
    assert (repo.checkout("side~1")["w"] == state(1)["w"]).all()
    with pytest.raises(ExistsError):
        repo.undelete("side")


def test_what_gc_collected_is_refused(repo: Repo) -> None:
    repo.commit(state(0))
    repo.on("side").commit(state(1))
    repo.tag("v1", "side")
    repo.delete_branch("side", force=True)
    repo.delete_tag("v1", force=True)
    repo.gc(grace=0)
    assert not any(each.stored for each in repo.deleted())
    with pytest.raises(NotFoundError, match="gc has collected") as caught:
        repo.undelete("v1")
    assert caught.value.code == "collected"
    with pytest.raises(NotFoundError, match="nothing called"):
        repo.undelete("other")


def test_the_last_deletion_counts(repo: Repo) -> None:
    first = repo.commit(state(0))
    second = repo.commit(state(1))
    for commit in (first, second):
        repo.tag("v1", commit)
        repo.delete_tag("v1", force=True)
    repo.branch("v1", first)
    repo.delete_branch("v1", force=True)
    with pytest.raises(AmbiguousError):
        repo.undelete("v1")
    assert repo.undelete("refs/tags/v1") == second.id
    assert repo.undelete("v1") == first.id
    assert repo.tags() == {"v1": second.id}


def test_a_lost_commit_comes_back(repo: Repo) -> None:
    repo.commit(state(0))
    rival = repo.on("main")
    rival.restore({}, strict=False)
    repo.commit(state(1))
    with pytest.raises(ConflictError) as caught:
        rival.commit(state(2))
    lost = str(caught.value.rescued)
    repo.delete_branch(lost, force=True)
    assert repo.lost() == {}
    repo.undelete(lost)
    assert (repo.checkout(lost)["w"] == state(2)["w"]).all()


def test_fork_and_status_come_back_unless_it_ran(repo: Repo) -> None:
    repo.commit({"lr": 0.1})
    for name, status in (("done", "finished"), ("dead", "running")):
        repo.fork("main", name, {"lr": 0.2}).close()
        repo.record([Status(name, status)], "status")
        repo.delete_branch(name, force=True)
        repo.undelete(name)
    with repo._store.snapshot() as snapshot:
        fork = snapshot.fork("done")
        assert fork is not None
        assert fork[1] == {"lr": 0.2}
        assert snapshot.status() == {"done": "finished"}
