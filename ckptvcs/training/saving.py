"""One save after the other: how a state gets into the repository, in the background or not."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ckptvcs.errors import CkptError
from ckptvcs.history.commit import Commit
from ckptvcs.repo import Repo

_log = logging.getLogger("ckptvcs")


class Pending(Protocol):
    """A save under way: `PendingCommit`, or one that is over already.

    Attributes:
        background: seconds from when the caller went on until it was over.
    """

    background: float

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""
        ...

    def result(self, timeout: float | None = None) -> Commit:
        """The commit, once durable; or what went wrong."""
        ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to save.

    Attributes:
        step: the training step.
        why: what made it due, in words.
        epoch, metrics: as `Repo.commit` takes them.
        value: of the monitored metric; None if it was not given.
        best: whether that is better than all that were saved before.
        waited: seconds for which the save before held it up.
        hurried: somebody waits for it to become durable, so retention does not come before or behind it.
    """

    step: int
    why: str
    epoch: int | float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    value: float | None = None
    best: bool = False
    waited: float = 0.0
    hurried: bool = False


@dataclass(frozen=True, slots=True)
class Saved:
    """A save that is over.

    Attributes:
        wanted: what it was.
        outcome: the commit, or the error.
        blocked: seconds for which training stood still.
        background: seconds from then until it was over.
    """

    wanted: Wanted
    outcome: Commit | Exception
    blocked: float
    background: float


class _Over:
    """A commit made while the caller waited."""

    def __init__(self, outcome: Commit | Exception) -> None:
        self._outcome = outcome
        self.background = 0.0

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> Commit:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


class Saver:
    """Saves one state through one handle, at most one save at a time."""

    def __init__(
        self,
        repo: Repo,
        state: Any,
        *,
        config: Any,
        message: str,
        blocking: bool,
        retain: Mapping[str, Any] | None = None,
    ) -> None:
        """`retain` is applied to the branch after each save, in the background like the save."""
        self._retain = retain
        self._repo = repo
        self._state = state
        self._config = config
        self._message = message
        self._blocking = blocking
        self._under_way: tuple[Wanted, Pending, float] | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._under_way is not None and not self._under_way[1].done()

    def begin(self, wanted: Wanted, record: Mapping[str, Any]) -> None:
        """Save. When it returns the state may change; `finished` tells how it went.

        `record` goes into the commit's environment. The save before must have been taken out.
        """
        assert self._under_way is None
        began = self._repo.disk.seconds()
        arguments: dict[str, Any] = {
            "message": self._message or f"autosave: {wanted.why}",
            "step": wanted.step,
            "epoch": wanted.epoch,
            "metrics": wanted.metrics,
            "config": self._config,
            "environment": {"autosave": dict(record)},
        }
        pending: Pending
        try:
            if self._blocking:
                pending = _Over(self._repo.commit(self._state, **arguments))
                if not wanted.hurried:
                    self._drop()
            else:
                retain = None if wanted.hurried else self._retain
                pending = self._repo.commit_async(self._state, **arguments, quiet=True, retain=retain)
        except Exception as error:  # noqa: BLE001 - raised when the outcome is taken out
            pending = _Over(error)
        self._under_way = wanted, pending, self._repo.disk.seconds() - began

    def _drop(self) -> None:
        """Apply retention here and now. The save is durable, whatever comes of this."""
        if self._retain is None:
            return
        try:
            self._repo.retain(self._repo.branch_name, **self._retain)
        except CkptError as error:
            _log.warning("retention on %s failed: %s", self._repo.branch_name, error)

    def finished(self, *, wait: bool) -> Saved | None:
        """The save that is over since the last call, if there is one; `wait` for the one under way."""
        if self._under_way is None or not (wait or self._under_way[1].done()):
            return None
        wanted, pending, blocked = self._under_way
        try:
            outcome: Commit | Exception = pending.result()
        except Exception as error:  # noqa: BLE001 - the caller decides
            outcome = error
        self._under_way = None
        return Saved(wanted, outcome, blocked, pending.background)
