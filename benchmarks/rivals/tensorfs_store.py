"""tensorfs: a store that keeps equal tensors once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals.files import folder_bytes
from benchmarks.rivals.rival import Rival
from benchmarks.states import State, flatten, unflatten


class Tensorfs(Rival):
    name = "tensorfs"
    note = "flattened; keeps equal tensors once, uncompressed"
    package = "tensorfs"

    def open(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def save(self, state: State, step: int) -> str:
        import tensorfs

        self._count += 1
        key = f"{self._count:04d}.cozytensors"
        tensors, rest = flatten(state)
        with tensorfs.Writer(self._folder / key, cache_dir=self._folder / "store") as writer:
            component = writer.component("state", cls="")
            for path, tensor in tensors.items():
                component.put(path, tensor)
            component.asset("rest", rest)
            writer.commit()
        return key

    def load(self, key: str) -> State:
        component = self._component(key)
        tensors = {path: torch.from_dlpack(array) for path, array in component.tensors.read().items()}
        return unflatten(tensors, component.asset("rest"))

    def load_tensor(self, key: str, path: str) -> Tensor | None:
        return torch.from_dlpack(self._component(key).tensors.read(path))

    def stored_bytes(self) -> int:
        return folder_bytes(self._folder)

    def _component(self, key: str) -> Any:
        import tensorfs

        return tensorfs.open(self._folder / key, cache_dir=self._folder / "store").components["state"]
