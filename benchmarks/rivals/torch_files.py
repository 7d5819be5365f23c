"""torch.save, a file per save: the reference of every ratio."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.rivals.files import folder_bytes, sync
from benchmarks.rivals.rival import Rival
from benchmarks.states import State, flatten


class TorchSave(Rival):
    name = "torch_save"
    note = "torch.save, then fsync of file and folder"
    package = "torch"

    def open(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def save(self, state: State, step: int) -> str:
        self._count += 1
        file = self._folder / f"{self._count:04d}.pt"
        torch.save(state, file)
        sync(file)
        sync(self._folder)
        return file.name

    def load(self, key: str) -> State:
        return torch.load(self._folder / key, weights_only=True)

    def load_tensor(self, key: str, path: str) -> Tensor | None:
        mapped = torch.load(self._folder / key, weights_only=True, mmap=True)
        return flatten(mapped)[0][path].clone()

    def stored_bytes(self) -> int:
        return folder_bytes(self._folder)
