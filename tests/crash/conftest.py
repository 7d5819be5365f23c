"""Fixtures of the crash and fault tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptvcs.store import index
from tests.crash.stores import scratch_folder


@pytest.fixture
def scratch() -> Iterator[Path]:
    """An empty folder, in memory where possible, removed afterwards."""
    with scratch_folder() as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _no_environment_is_left_open() -> Iterator[None]:
    """Whatever failed: an index that nobody uses is closed. Its inode may soon belong to another file."""
    yield
    assert not index._open


@pytest.fixture
def several_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each component of a commit gets a pack of its own, however small."""
    monkeypatch.setattr("ckptvcs.store.writer._SECTION_BYTES", 1)


_LINES = pytest.StashKey[list[str]]()


@pytest.fixture
def covered(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Say how much a test covered, with the seed that replays it: now and in the run's summary."""

    def say(line: str) -> None:
        print(line)
        request.config.stash.setdefault(_LINES, []).append(f"{request.node.name}: {line}")

    return say


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What all crash and fault tests covered."""
    lines = config.stash.get(_LINES, [])
    if lines:
        terminalreporter.section("crashes and faults")
    for line in lines:
        terminalreporter.write_line(line)
