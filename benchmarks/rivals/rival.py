"""What the benchmark asks of every tool, ours included."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from benchmarks.states import State


class Rival(ABC):
    """One tool, keeping the saves of one run in one folder."""

    name: ClassVar[str]
    note: ClassVar[str] = ""
    """What a reader of the tables should know."""

    package: ClassVar[str] = ""
    """The distribution whose version is reported; empty for programs."""

    save_blocking_seconds: float | None = None
    """For a tool that saves in the background: seconds the last `save` kept its caller. Else None."""

    @classmethod
    def available(cls) -> str | None:
        """Why it cannot be measured here, None if it can."""
        try:
            importlib.metadata.version(cls.package)
        except importlib.metadata.PackageNotFoundError:
            return f"the package {cls.package} is not installed"
        return None

    @classmethod
    def version(cls) -> str:
        return importlib.metadata.version(cls.package)

    @abstractmethod
    def open(self, folder: Path) -> None:
        """Begin a store in an existing empty folder."""

    @abstractmethod
    def save(self, state: State, step: int) -> str:
        """Keep a state, durable on return; answers the key under which it is found again."""

    @abstractmethod
    def load(self, key: str) -> State:
        """The whole state, in memory."""

    def load_tensor(self, key: str, path: str) -> Tensor | None:
        """One tensor by its path in the state, None for a tool that cannot read less than all."""
        return None

    def fork(self, key: str) -> None:  # noqa: B027 - most tools have nothing to do
        """Later saves go on from this one. Nothing to do for tools without branches."""

    @abstractmethod
    def stored_bytes(self) -> int:
        """Bytes of everything the tool keeps."""

    def close(self) -> None:  # noqa: B027 - most tools hold nothing open
        """Let go of the store."""
