"""What a policy drops never piles up: a long training under keep_last, saves and collections side by side."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import Repo
from ckptvcs.testing.same import difference
from ckptvcs.training import Autosave

SEED = 3
KEEP = 3
NUMBERS = 40_000


def content(repo: Repo) -> int:
    """Bytes of all records that are in packs, but for the commits and trees that stay."""
    found = repo.du(("branch", "component"))
    return found.stored - found.structure


@pytest.mark.slow
@pytest.mark.parametrize(("level", "steps"), [("fast", 60), ("balanced", 200)])
def test_200_commits_never_take_more_than_5_payloads(tmp_path: Path, level: str, steps: int) -> None:
    """At no durable save, and while collecting, does the repository hold more than two payloads besides those
    that are kept or protected. Differences count: what is kept is encoded anew when its base goes."""
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    rng = np.random.default_rng(SEED)
    state: dict[str, Any] = {"w": rng.standard_normal(NUMBERS, np.float32), "step": 0}
    with Repo.init(tmp_path / "alone", compression=level) as alone:
        payload = alone.commit(state).report.stored  # type: ignore[union-attr]
    with Repo.init(tmp_path / "r", compression=level) as repo:
        protected = 0
        most = 0
        with Autosave(repo, state, every=1, keep_last=KEEP) as save:
            for step in range(1, steps + 1):
                state["w"] += np.float32(1e-3) * rng.standard_normal(NUMBERS, np.float32)
                state["step"] = step
                save.step(step)
                if chance.random() < 0.03 and save.last is not None:
                    repo.pin(save.last) if chance.random() < 0.5 else repo.tag(f"t{step}", save.last)
                    protected += 1
                if step % 10 == 0:
                    save.wait()
                    held = content(repo)
                    most = max(most, held)
                    assert held <= (KEEP + 2 + protected) * payload, step
        print(f"{level}: at most {most / payload:.2f} payloads, {protected} protected")
        assert protected > 0
    with Repo.open(tmp_path / "r") as repo:
        assert content(repo) <= (KEEP + protected) * payload
        assert [commit.step for commit in repo.log()] == list(range(steps, 0, -1))
        kept = [commit for commit in repo.log() if repo.dropped(commit) is None]
        assert len(kept) <= KEEP + protected
        assert difference(repo.checkout(), state) is None
        for commit in kept:
            assert repo.checkout(commit)["step"] == commit.step
        assert repo.fsck(full=True).ok
