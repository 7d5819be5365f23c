"""Missing packs are noticed at open, and looking for them costs no more for many packs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import CorruptionError, Repo
from ckptvcs.disk import Disk
from ckptvcs.maintenance import presence
from ckptvcs.store.format import PackName
from ckptvcs.store.index import PackInfo


def array(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, 4000, np.uint8)


def packs(folder: Path) -> list[Path]:
    return sorted((folder / ".ckpt" / "packs").rglob("*.pack"), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture
def filled(folder: Path) -> Path:
    """Three packs: what is frozen lies in the first, something old in the second."""
    with Repo.init(folder) as repo:
        repo.commit({"frozen": array(1)})
        repo.commit({"frozen": array(1), "once": array(2)})
        repo.commit({"frozen": array(1), "new": array(3)})
    return folder


def said(folder: Path, branch: str | None = None) -> list[str]:
    lines: list[str] = []
    with Repo.open(folder, branch, say=lines.append):
        pass
    return lines


def test_a_missing_pack_of_the_tip_is_named(filled: Path) -> None:
    assert said(filled) == []
    first, second, _ = packs(filled)
    second.unlink()
    assert said(filled) == [], "the tip does not need it"
    first.unlink()
    (line,) = said(filled)
    assert first.name in line
    assert second.name not in line
    assert "tip of main" in line
    assert "commit the state again" in line
    assert "ckpt fsck" in line
    assert "\n" not in line
    assert said(filled, "unborn") == []


def test_it_is_logged_and_healed_by_committing_again(filled: Path, caplog: pytest.LogCaptureFixture) -> None:
    packs(filled)[0].unlink()
    with caplog.at_level(logging.WARNING), Repo.open(filled) as repo:
        assert "a pack is missing" in caplog.text
        with pytest.raises(CorruptionError):
            repo.checkout("main")
        repo.commit({"frozen": array(1), "new": array(3)})
        assert np.array_equal(repo.checkout("main")["frozen"], array(1))
        assert np.array_equal(repo.checkout("main~1")["frozen"], array(1))
    assert said(filled) == []


def test_a_pack_that_nothing_lies_in_is_not_missed(filled: Path) -> None:
    """A collector died between unlinking a pack and forgetting it."""
    with Repo.open(filled) as repo, repo._store.index.change() as change:
        change.put_pack(PackName(bytes(16), 7), PackInfo(1000, 3))
    assert said(filled) == []


def test_its_cost_does_not_grow_with_the_packs(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(of: Any) -> Any:
        def call(self: Disk, path: Path) -> Any:
            nonlocal calls
            calls += 1
            return of(self, path)

        return call

    monkeypatch.setattr(Disk, "exists", counted(Disk.exists))
    monkeypatch.setattr(Disk, "names", counted(Disk.names))
    with Repo.open(filled) as repo:
        calls = 0
        assert presence._missing(repo._store) == set()
        assert calls == 3
        with repo._store.index.change() as change:
            for seq in range(1000):
                change.put_pack(PackName(bytes(16), seq), PackInfo(1000, 3))
        calls = 0
        assert len(presence._missing(repo._store)) == 1000
        assert calls <= 256
