"""torch.distributed.checkpoint, a folder per save, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals.files import folder_bytes, sync
from benchmarks.rivals.rival import Rival
from benchmarks.states import State, flatten, unflatten


class DistributedCheckpoint(Rival):
    name = "dcp"
    note = "one process, flattened (it would turn integer keys into text); it syncs its files, we its folder"
    package = "torch"

    def open(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def save(self, state: State, step: int) -> str:
        import torch.distributed.checkpoint as dcp

        self._count += 1
        key = f"{self._count:04d}"
        tensors, rest = flatten(state)
        dcp.save({**tensors, "rest": rest}, checkpoint_id=self._folder / key, no_dist=True)
        sync(self._folder / key)
        sync(self._folder)
        return key

    def load(self, key: str) -> State:
        found = self._read(key, None)
        rest = found.pop("rest")
        return unflatten(found, rest)

    def load_tensor(self, key: str, path: str) -> Tensor | None:
        return self._read(key, path)[path]

    def stored_bytes(self) -> int:
        return folder_bytes(self._folder)

    def _read(self, key: str, only: str | None) -> dict[str, Any]:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        reader = dcp.FileSystemReader(self._folder / key)
        into: dict[str, Any] = {}
        # It fills tensors that the caller has made.
        for name, facts in reader.read_metadata().state_dict_metadata.items():
            if only in (None, name):
                tensor = isinstance(facts, TensorStorageMetadata)
                into[name] = torch.empty(facts.size, dtype=facts.properties.dtype) if tensor else b""
        dcp.load(into, storage_reader=reader, no_dist=True)
        return into
