"""Fixtures of all tests: a clean environment, repositories in temporary folders, Hypothesis' settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from ckptvcs import Repo

# No deadline: the machine may be busy. The blob replays a failure anywhere.
hypothesis.settings.register_profile("ckptvcs", deadline=None, print_blob=True)
hypothesis.settings.load_profile("ckptvcs")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on the `CKPT_*` variables of whoever runs it."""
    for name in list(os.environ):
        if name.startswith("CKPT_"):
            monkeypatch.delenv(name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for a repository."""
    made = tmp_path / "work"
    made.mkdir()
    return made


@pytest.fixture
def repo(folder: Path) -> Iterator[Repo]:
    """A fresh repository in `folder`, on the unborn branch main."""
    with Repo.init(folder) as opened:
        yield opened
