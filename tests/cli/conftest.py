"""Repositories that several tests of the command line share, since processes are slow to start."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import file_history, state_history


@pytest.fixture(scope="session")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of states. Only for tests that change nothing in it."""
    folder = tmp_path_factory.mktemp("states")
    with state_history(folder):
        return folder


@pytest.fixture(scope="session")
def read_only_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of files. Only for tests that change nothing in it."""
    folder = tmp_path_factory.mktemp("files")
    file_history(folder)
    return folder


@pytest.fixture
def files(folder: Path) -> Path:
    """A repository of files of the test's own."""
    file_history(folder)
    return folder
