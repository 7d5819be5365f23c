"""moonclip: deltas against the last full snapshot, written in the background."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.rivals.files import folder_bytes
from benchmarks.rivals.rival import Rival
from benchmarks.states import State


class Moonclip(Rival):
    name = "moonclip"
    note = "save, then flush; its history is linear, so a fork is a delta against the other branch's tip"
    package = "moonclip"

    def open(self, folder: Path) -> None:
        from moonclip import CheckpointManager

        self._folder = folder
        # By default it forgets all but five full snapshots; here every save must stay.
        self._manager = CheckpointManager(str(folder), max_full_snapshots=1000, world_size=1, rank=0)

    def save(self, state: State, step: int) -> str:
        started = time.perf_counter()
        key = self._manager.save(
            step,
            model=_Holder(state["model"]),
            optimizer=state["optimizer"],
            extra={name: value for name, value in state.items() if name not in ("model", "optimizer")},
        )
        self.save_blocking_seconds = time.perf_counter() - started
        self._manager.flush()
        return key

    def load(self, key: str) -> State:
        found = self._manager.load(key)
        return {name.removeprefix("extra/"): value for name, value in found.items()}

    def load_tensor(self, key: str, path: str) -> Tensor | None:
        # Only the model's tensors go by their own names.
        if not path.startswith("model/"):
            return None
        described = next(t for t in self._manager.describe(key)["tensors"] if t["name"] == path)
        raw = self._manager.load_tensors(key, [path])[path]
        return torch.frombuffer(raw, dtype=getattr(torch, described["dtype"])).reshape(described["shape"])

    def stored_bytes(self) -> int:
        return folder_bytes(self._folder)


class _Holder:
    """A model as moonclip wants one: something with a `state_dict`."""

    def __init__(self, state: State) -> None:
        self._state = state

    def state_dict(self) -> State:
        return self._state
