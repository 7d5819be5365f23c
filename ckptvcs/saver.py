"""The writer process of `commit_async`: stores what the trainer copied to shared memory, one save at a time.

It is a handle like any other: it opens the repository, holds a lease, and commits through the same
transaction. What a commit is, where the branch stood and who made it, the trainer says. When the trainer
closes, or dies, the save in flight is finished and the process ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from ckptvcs import canonical
from ckptvcs.background import answer_of
from ckptvcs.committing import Beside
from ckptvcs.companion import Channel, SharedMemory
from ckptvcs.config import seconds_of
from ckptvcs.errors import described
from ckptvcs.history.commit import Commit
from ckptvcs.ids import ObjectId
from ckptvcs.maintenance.retaining import Retention
from ckptvcs.maintenance.retention import Policy
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

    _retention: Retention | None = None

    def retain_on(self, branch: str, rules: Mapping[str, Any]) -> None:
        """Apply a retention policy to a branch. Beside `save`, on another thread."""
        opened = self._opened
        opened.config = opened.read_config()
        if self._retention is None:
            self._retention = Retention(opened.store, self._revisions.mode)
        policy = Policy.of(rules)
        with opened.store.operation():
            self._retention.run(
                lambda branches: {branch: policy} if branch in branches else {},
                grace=seconds_of(opened.config.get("gc.grace")),
                who=opened.author,
                attribute=False,
                idle=False,
            )


class Retainer:
    """Retention behind saves, on a thread: neither an answer nor a save in a hurry waits for it.

    The next save under a policy does. So a repository holds one payload more than the policy keeps, another
    while differences to what goes are encoded anew, and no more, however slow collections are.
    """

    def __init__(self, apply: Callable[[str, Mapping[str, Any]], None]) -> None:
        """`apply` is called with a branch and its rules."""
        self._apply = apply
        self._turn = threading.Condition()
        self._wanted: tuple[str, Mapping[str, Any]] | None = None
        self._running = False
        self._problems: list[str] = []
        self._last = ""
        threading.Thread(target=self._work, name="ckptvcs-retention", daemon=True).start()

    def wait(self) -> None:
        """Wait until nothing is due."""
        with self._turn:
            self._turn.wait_for(lambda: not self._running and self._wanted is None)

    def begin(self, branch: str, rules: Mapping[str, Any]) -> None:
        """A save was stored: apply the policy."""
        with self._turn:
            self._wanted = branch, rules
            self._turn.notify_all()

    def problems(self) -> list[str]:
        """What went wrong since the last call; the same thing is not told twice in a row."""
        with self._turn:
            found, self._problems = self._problems, []
        return found

    def _work(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._wanted is not None)
                assert self._wanted is not None
                (branch, rules), self._wanted = self._wanted, None
                self._running = True
            problem = ""
            try:
                self._apply(branch, rules)
            except Exception as error:  # noqa: BLE001 - the trainer is told; its saves are safe
                problem = f"retention on {branch} failed: {error}"
            with self._turn:
                self._running = False
                if problem and problem != self._last:
                    self._problems.append(problem)
                self._last = problem
                self._turn.notify_all()


def _id(value: bytes | None) -> ObjectId | None:
    return None if value is None else ObjectId(value)


def main(channel: Channel, memory: SharedMemory) -> None:
    """Store what is asked for until the trainer has gone."""
    writer: _Writer | None = None
    retainer: Retainer | None = None
    rules: Mapping[str, Any] | None = None
    while (message := channel.receive()) is not None:
        try:
            start, size = canonical.decode(message)
            view = memory.view(start + size)
            task = canonical.decode(bytes(view[start : start + size]))
            rules = task.get("retain")
            if writer is None:
                opened = _Writer.open(task["folder"], branch=task["branch"], index_free=task["index_free"])
                assert isinstance(opened, _Writer)
                writer = opened
            if rules is not None and retainer is not None:
                retainer.wait()
            answer = answer_of(writer.save(task, view))
            if rules is not None:
                retainer = retainer or Retainer(writer.retain_on)
                retainer.begin(task["branch"], rules)
        except BaseException as error:  # noqa: BLE001 - the trainer raises it
            answer = {"error": described(error)}
        if retainer is not None:
            answer["warnings"] = retainer.problems()
        channel.send(canonical.encode(answer))
    if retainer is not None:
        if rules is None:  # the last save was in a hurry: a collection may end anywhere, as in a crash
            return
        retainer.wait()
    if writer is not None:
        writer.close()
