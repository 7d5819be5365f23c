"""Who holds the bytes: what `du` says, and that deleting frees just that."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import ObjectId, Repo
from ckptvcs.maintenance.usage import Share
from ckptvcs.store import Drop, Pin

SEED = 5
CASES = 24


def array(seed: int, size: int = 4000) -> np.ndarray[Any, Any]:
    """Bytes that no codec makes smaller."""
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def named(shares: list[Share], name: str) -> Share:
    """The share of one holder."""
    (found,) = [share for share in shares if share.name == name]
    return found


def pin(repo: Repo, id: ObjectId) -> None:
    """Keep a commit."""
    assert repo.record([Pin(id, True)], "pin")


def cost(repo: Repo) -> int:
    """Bytes of all indexed records."""
    with repo._store.snapshot() as snapshot:
        return sum(row.cost for _, row in snapshot.rows_from(b"", 1 << 30))


# -- what deleting frees ---------------------------------------------------------------------------


def trained(chance: random.Random, before: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Numbers of which a few bits changed, so that a difference pays."""
    return before + np.float32(chance.random() * 1e-4)


def history(chance: random.Random, repo: Repo) -> None:
    """Branches that share chunks and commits, forks, tags, pins, deltas, drops, lost content."""
    weights = {"main": np.random.default_rng(chance.randint(0, 99)).standard_normal(30_000, np.float32)}
    made: list[ObjectId] = []
    for _ in range(chance.randint(4, 14)):
        what = chance.random()
        name = chance.choice(list(weights))
        if what < 0.2 and made:
            start = chance.choice(made)
            fork = f"fork{len(weights)}"
            repo.branch(fork, start)
            weights[fork] = weights[name]
        elif what < 0.3 and made:
            repo.tag(f"v{len(made)}-{chance.randint(0, 9**9)}", chance.choice(made))
        elif what < 0.4 and made:
            pin(repo, chance.choice(made))
        elif what < 0.5 and len(made) > 1:
            tips = set(repo.branches().values())
            old = [id for id in made if id not in tips]
            if old:
                names = chance.choice([(), ("optimizer",), ("shared", "model")])
                assert repo.record([Drop(chance.choice(old), names)], "drop")
        else:
            weights[name] = trained(chance, weights[name])
            state = {
                "model": {"w": weights[name]},
                "optimizer": {"m": array(chance.randint(0, 3), 9000), "v": array(chance.randint(0, 99))},
                "shared": array(chance.randint(0, 5)),
            }
            handle = repo.on(name)
            handle.commit(state)
            made.append(handle.resolve("HEAD").id)


@pytest.mark.parametrize("case", range(CASES))
def test_deleting_a_branch_frees_what_it_holds_exclusively(
    tmp_path: Path, case: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = f"{SEED}-{case}"
    print(f"seed {seed}")
    chance = random.Random(seed)
    level = chance.choice(["fast", "balanced", "small"])
    with Repo.init(tmp_path / "r", compression=level) as repo:
        history(chance, repo)
        if chance.random() < 0.5:
            repo.gc(grace=0)
        if not repo.branches():
            return
        repo.set_head("nowhere")  # so that every branch can be deleted
        while repo.branches():
            before = repo.du()
            name = chance.choice(list(repo.branches()))
            assert before.pending == repo.gc(grace=0, dry_run=True).freed, seed
            repo.delete_branch(name, force=True)
            after = repo.du("branch")
            exclusive = named(before.branches, name).exclusive
            assert after.pending == before.pending + exclusive, (seed, name)
            assert after.held == exclusive + before.held, seed
            assert repo.gc(grace=0).freed == exclusive + before.pending, (seed, name)
            assert repo.du("branch").pending == 0, seed
            assert sum(share.exclusive for share in before.branches) <= before.stored - before.pending


def test_what_adds_up(repo: Repo) -> None:
    repo.commit({"model": {"w": array(1)}, "optimizer": array(2)})
    repo.branch("side")
    repo.on("side").commit({"model": {"w": array(1)}, "optimizer": array(3)})
    repo.tag("t", repo.on("x").commit({"own": array(4)}))
    repo.delete_branch("x")
    found = repo.du()
    assert found.stored == cost(repo)
    assert found.pending == 0
    main, side = named(found.branches, "main"), named(found.branches, "side")
    assert main.exclusive == 0
    assert main.shared == main.stored
    assert side.stored == main.stored + side.exclusive
    assert side.exclusive > 4000
    assert found.others > 4000
    assert found.stored == side.stored + found.others
    optimizer, model = named(found.components, "optimizer"), named(found.components, "model")
    assert (optimizer.logical, model.logical) == (8000, 8000)
    assert optimizer.stored == optimizer.exclusive > 8000
    assert 4000 < model.stored < 4200
    assert found.structure + sum(share.stored for share in found.components) == found.stored
