"""The writer process of `commit_async`: stores what the trainer copied to shared memory, one save at a time.

It is a handle like any other: it opens the repository, holds a lease, and commits through the same
transaction. What a commit is, where the branch stood and who made it, the trainer says. When the trainer
closes, or dies, the save in flight is finished and the process ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptvcs import canonical
from ckptvcs.background import answer_of
from ckptvcs.committing import Beside
from ckptvcs.companion import Channel, SharedMemory
from ckptvcs.errors import described
from ckptvcs.history.commit import Commit
from ckptvcs.ids import ObjectId
from ckptvcs.repo import Repo
from ckptvcs.state import transfer, tree


class _Writer(Repo):
    """A handle that commits for another process's handle, from where that one stands."""

    def save(self, task: Mapping[str, Any], memory: memoryview) -> Commit:
        """Make the commit of a task, whose content lies in `memory`."""
        store, committer = self._store, self._committer
        started = store.disk.seconds()
        prepared = transfer.prepared(task["tree"], memory, store.grid)
        claim = None if task["claim"] is None else store.standing_claim(task["ref"], task["claim"])
        committer.stand_for(task["ref"], _id(task["tip"]), _id(task["origin"]), claim)
        beside = Beside(tuple(task["tags"]), task["status"])
        self._opened.compression = task["compression"]
        with committer.mutex, store.operation():
            return committer.make(
                lambda writer, bases: tree.store(writer, prepared, bases), task["fields"], started, beside
            )


def _id(value: bytes | None) -> ObjectId | None:
    return None if value is None else ObjectId(value)


def main(channel: Channel, memory: SharedMemory) -> None:
    """Store what is asked for until the trainer has gone."""
    writer: _Writer | None = None
    while (message := channel.receive()) is not None:
        try:
            start, size = canonical.decode(message)
            view = memory.view(start + size)
            task = canonical.decode(bytes(view[start : start + size]))
            if writer is None:
                opened = _Writer.open(task["folder"], branch=task["branch"], index_free=task["index_free"])
                assert isinstance(opened, _Writer)
                writer = opened
            answer = answer_of(writer.save(task, view))
        except BaseException as error:  # noqa: BLE001 - the trainer raises it
            answer = {"error": described(error)}
        channel.send(canonical.encode(answer))
    if writer is not None:
        writer.close()
