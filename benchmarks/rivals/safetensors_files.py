"""safetensors, a file per save."""

from __future__ import annotations

import base64
from pathlib import Path

from torch import Tensor

from benchmarks.rivals.files import folder_bytes, sync
from benchmarks.rivals.rival import Rival
from benchmarks.states import State, flatten, unflatten


class Safetensors(Rival):
    name = "safetensors"
    note = "flattened, then fsync of file and folder; its load maps the file and reads it on use"
    package = "safetensors"

    def open(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def save(self, state: State, step: int) -> str:
        from safetensors.torch import save_file

        self._count += 1
        file = self._folder / f"{self._count:04d}.safetensors"
        tensors, rest = flatten(state)
        save_file(tensors, file, metadata={"rest": base64.b64encode(rest).decode()})
        sync(file)
        sync(self._folder)
        return file.name

    def load(self, key: str) -> State:
        from safetensors import safe_open

        with safe_open(self._folder / key, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return unflatten(tensors, base64.b64decode(file.metadata()["rest"]))

    def load_tensor(self, key: str, path: str) -> Tensor | None:
        from safetensors import safe_open

        with safe_open(self._folder / key, framework="pt") as file:
            return file.get_tensor(path).clone()

    def stored_bytes(self) -> int:
        return folder_bytes(self._folder)
