"""Tools that are programs: they keep a file, which is written and read with torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import torch

from benchmarks.rivals.rival import Rival
from benchmarks.states import State

FILE = "state.pt"


class FileKeeper(Rival):
    """A program that keeps successive versions of one file. The times include writing and reading it."""

    program: ClassVar[str]

    @classmethod
    def available(cls) -> str | None:
        return None if _find(cls.program) else f"the program {cls.program} is not installed"

    def open(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.work.mkdir()
        # Nothing of the person who runs the benchmark may decide how a tool behaves, nor be left behind.
        self.environment = os.environ | {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Set the store up."""

    @abstractmethod
    def keep(self) -> str:
        """Keep the file as it is now, durably; answers its key."""

    @abstractmethod
    def bring_back(self, key: str) -> Path:
        """Where the kept file is, after it has been put there."""

    def save(self, state: State, step: int) -> str:
        torch.save(state, self.work / FILE)
        return self.keep()

    def load(self, key: str) -> State:
        return torch.load(self.bring_back(key), weights_only=True)

    def run(self, *arguments: str) -> str:
        """Run a program in the work folder; answers what it printed."""
        program = _find(arguments[0])
        assert program is not None
        done = subprocess.run(
            [program, *arguments[1:]], cwd=self.work, env=self.environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout


def asked_version(program: str, *arguments: str) -> str:
    """The first number with dots in what a program says of itself."""
    found = _find(program)
    assert found is not None
    said = subprocess.run([found, *arguments], capture_output=True, text=True, check=True).stdout
    words = said.replace("/", " ").split()
    return next(word for word in words if word[0].isdigit() and "." in word)


def _find(program: str) -> str | None:
    beside = Path(sys.executable).parent / program
    return str(beside) if beside.exists() else shutil.which(program)
