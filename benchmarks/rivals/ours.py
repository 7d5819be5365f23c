"""ckptvcs at its three levels of compression, through its public interface only."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

import ckptvcs
from benchmarks.rivals.files import folder_bytes
from benchmarks.rivals.rival import Rival
from benchmarks.states import State


class _Ckptvcs(Rival):
    level: ClassVar[str]
    package = "ckptvcs"

    def open(self, folder: Path) -> None:
        self._folder = folder
        self._repo = ckptvcs.Repo.init(folder, compression=self.level)
        self._handle = self._repo
        self._forks = 0

    def save(self, state: State, step: int) -> str:
        self.commit = self._handle.commit(state, step=step)
        return str(self.commit.id)

    def load(self, key: str) -> State:
        return self._repo.checkout(key)

    def load_tensor(self, key: str, path: str) -> Tensor | None:
        values = self._repo.open_tensor(key, path)[...]
        return values if isinstance(values, Tensor) else torch.from_numpy(values)

    def fork(self, key: str) -> None:
        self._forks += 1
        self._handle = self._repo.on(f"fork-{self._forks}")
        self._handle.restore({}, key)

    def stored_bytes(self) -> int:
        return folder_bytes(self._folder)

    def close(self) -> None:
        self._repo.close()


class CkptvcsFast(_Ckptvcs):
    name = "ckptvcs_fast"
    level = "fast"
    note = "durable on return, every read verified"


class CkptvcsBalanced(_Ckptvcs):
    name = "ckptvcs_balanced"
    level = "balanced"
    note = "the default"


class CkptvcsSmall(_Ckptvcs):
    name = "ckptvcs_small"
    level = "small"
