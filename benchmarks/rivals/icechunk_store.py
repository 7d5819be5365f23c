"""icechunk: versioned zarr arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.rivals.files import Syncer, folder_bytes
from benchmarks.rivals.rival import Rival
from benchmarks.states import State, flatten, unflatten


class Icechunk(Rival):
    name = "icechunk"
    note = (
        "flattened; zarr with its default zstd; a save overwrites the arrays and commits; we sync its files"
    )
    package = "icechunk"

    def open(self, folder: Path) -> None:
        import icechunk

        self._folder = folder
        self._repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(folder)))
        self._branch = "main"
        self._forks = 0
        self._syncer = Syncer(folder)
        self._dtypes: dict[str, torch.dtype] = {}

    def save(self, state: State, step: int) -> str:
        import zarr

        tensors, rest = flatten(state)
        tensors = {**tensors, "rest": torch.frombuffer(bytearray(rest), dtype=torch.uint8)}
        session = self._repository.writable_session(self._branch)
        for path, tensor in tensors.items():
            self._dtypes[path] = tensor.dtype
            bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
            zarr.create_array(session.store, name=path, data=bits.numpy(), overwrite=True)
        key = session.commit(f"step {step}")
        self._syncer.sync()
        return key

    def load(self, key: str) -> State:
        found = self._read(key, list(self._dtypes))
        rest = found.pop("rest")
        return unflatten(found, bytes(rest.numpy()))

    def load_tensor(self, key: str, path: str) -> Tensor | None:
        return self._read(key, [path])[path]

    def fork(self, key: str) -> None:
        self._forks += 1
        self._branch = f"fork-{self._forks}"
        self._repository.create_branch(self._branch, key)

    def stored_bytes(self) -> int:
        return folder_bytes(self._folder)

    def _read(self, key: str, paths: list[str]) -> dict[str, Tensor]:
        import zarr

        store = self._repository.readonly_session(snapshot_id=key).store
        found = {}
        for path in paths:
            values = np.asarray(zarr.open_array(store, path=path, mode="r")[...])
            tensor = torch.from_numpy(values)
            found[path] = tensor if tensor.dtype == self._dtypes[path] else tensor.view(self._dtypes[path])
        return found
