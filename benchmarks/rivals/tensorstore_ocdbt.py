"""tensorstore: zarr arrays with zstandard in one OCDBT database, every save under a prefix of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.rivals.files import folder_bytes
from benchmarks.rivals.rival import Rival
from benchmarks.states import State, flatten, unflatten


class TensorstoreOcdbt(Rival):
    name = "tensorstore_ocdbt"
    note = "flattened; zarr3 with zstd level 1, one transaction a save"
    package = "tensorstore"

    def open(self, folder: Path) -> None:
        import tensorstore

        self._folder = folder
        self._count = 0
        self._context = tensorstore.Context()
        self._dtypes: dict[str, dict[str, torch.dtype]] = {}

    def save(self, state: State, step: int) -> str:
        import tensorstore

        self._count += 1
        key = f"{self._count:04d}"
        tensors, rest = flatten(state)
        tensors = {**tensors, "rest": torch.frombuffer(bytearray(rest), dtype=torch.uint8)}
        self._dtypes[key] = {path: tensor.dtype for path, tensor in tensors.items()}
        transaction = tensorstore.Transaction(atomic=True)
        arrays = {path: _array(tensor) for path, tensor in tensors.items()}
        opened = {
            path: tensorstore.open(
                self._spec(key, path) | {"metadata": _metadata(array)},
                create=True,
                transaction=transaction,
                context=self._context,
            )
            for path, array in arrays.items()
        }
        writes = [opened[path].result().write(array) for path, array in arrays.items()]
        for write in writes:
            write.copy.result()
        transaction.commit_async().result()
        return key

    def load(self, key: str) -> State:
        found = self._read(key, list(self._dtypes[key]))
        rest = found.pop("rest")
        return unflatten(found, bytes(rest.numpy()))

    def load_tensor(self, key: str, path: str) -> Tensor | None:
        return self._read(key, [path])[path]

    def stored_bytes(self) -> int:
        return folder_bytes(self._folder)

    def _spec(self, key: str, path: str) -> dict[str, Any]:
        base = {"driver": "file", "path": f"{self._folder}/"}
        return {
            "driver": "zarr3",
            "kvstore": {"driver": "ocdbt", "base": base, "path": f"{key}/{path}/"},
        }

    def _read(self, key: str, paths: list[str]) -> dict[str, Tensor]:
        import tensorstore

        opened = {
            path: tensorstore.open(self._spec(key, path), open=True, context=self._context) for path in paths
        }
        reads = {path: future.result().read() for path, future in opened.items()}
        return {path: _tensor(read.result(), self._dtypes[key][path]) for path, read in reads.items()}


def _array(tensor: Tensor) -> np.ndarray:
    # numpy has no bfloat16 of its own; the bits are what is kept.
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(np.asarray(array))
    return tensor.view(dtype) if tensor.dtype != dtype else tensor


def _metadata(array: np.ndarray) -> dict[str, Any]:
    return {
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(n, 1) for n in array.shape]}},
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": 1}},
        ],
    }
