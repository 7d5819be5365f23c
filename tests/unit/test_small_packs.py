"""Small packs are merged behind commits: how many files are left, what is copied, who is disturbed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import Repo
from ckptvcs.errors import LockedError, StorageError
from ckptvcs.maintenance import compaction, small_packs
from ckptvcs.store.format import PackName


def state(seed: int, size: int = 3000) -> dict[str, Any]:
    """A state that shares nothing with others."""
    return {"w": np.random.default_rng(seed).integers(0, 256, size, np.uint8)}


def files(folder: Path) -> int:
    """Packs on disk."""
    return sum(1 for _ in (folder / ".ckpt" / "packs").rglob("*.pack"))


@pytest.mark.parametrize(
    ("bytes_each", "commits", "most_files", "most_copied"),
    [(100_000, 100_000, 1000, 3.0), (1000, 100_000, 200, 6.0), (3_000_000, 5000, 2500, 1.1)],
)
def test_files_stay_few_and_little_is_copied(
    bytes_each: int, commits: int, most_files: int, most_copied: float
) -> None:
    """What `choose` does to so many commits, one call behind each, without a disk."""
    chance = random.Random("sizes")
    sizes: dict[PackName, int] = {}
    copied = given = most = wait = number = 0
    for _ in range(commits):
        number += 1
        sizes[PackName(bytes(16), number)] = size = int(bytes_each * chance.uniform(0.5, 1.5))
        given += size
        wait -= 1
        if wait <= 0:
            group, wait = small_packs.choose(sizes)
            if group:
                merged = sum(sizes.pop(name) for name in group)
                assert merged <= small_packs.AT_MOST
                copied += merged
                number += 1
                sizes[PackName(bytes(16), number)] = merged
                wait = 1
        most = max(most, len(sizes))
    print(f"{commits} commits of {bytes_each} bytes: {most} files, {copied / given:.2f} times copied")
    assert most < most_files
    assert copied < most_copied * given


def test_packs_are_merged_and_everything_reads_back(
    repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_packs, "MANY", 4)
    made = []
    for seed in range(30):
        made.append(repo.commit(state(seed)))
        assert files(folder) <= 10
    for seed, commit in enumerate(made):
        assert (repo.checkout(commit)["w"] == state(seed)["w"]).all()
    assert repo.fsck(full=True).ok
    assert repo.gc(grace=0).freed == 0


def test_a_commit_does_not_wait_for_a_collector(
    repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_packs, "MANY", 2)
    with Repo.open(folder) as other, other._store.collecting():
        for seed in range(5):
            repo.commit(state(seed))
        assert files(folder) == 5
    for seed in range(5, 8):
        repo.commit(state(seed))
    assert files(folder) < 8


@pytest.mark.parametrize("error", [StorageError("full", code="disk-full"), LockedError("busy"), OSError(5)])
def test_a_merge_that_fails_does_not_fail_the_commit(
    repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(small_packs, "MANY", 2)
    monkeypatch.setattr(compaction.Rewriter, "publish", fails)
    for seed in range(4):
        commit = repo.commit(state(seed))
        assert (repo.checkout(commit)["w"] == state(seed)["w"]).all()
    assert files(folder) == 4
    assert repo.fsck(full=True).ok


def test_a_damaged_pack_is_passed_over(repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_packs, "MANY", 3)
    repo.commit(state(0))
    (path,) = (folder / ".ckpt" / "packs").rglob("*.pack")
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    for seed in range(1, 14):
        repo.commit(state(seed))
    assert path.exists()
    assert files(folder) < 9
