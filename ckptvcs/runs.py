"""Runs: what becomes of the training on each branch, and whether somebody still works on it.

A run's status is what it last said: running, finished or failed. One that says it is running while no
living process has claimed its branch is stale: it was killed, or its machine was. Claims are flocks, so this
is known without clocks, but only of processes on this machine (`store/claims.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from ckptvcs.errors import InvalidError
from ckptvcs.history import refs
from ckptvcs.history.commit import Commit
from ckptvcs.history.graph import History
from ckptvcs.ids import ObjectId
from ckptvcs.store import Snapshot, Status, Store

STATUSES: Final = ("running", "finished", "failed")
STALE: Final = "stale"


@dataclass(frozen=True, slots=True)
class Run:
    """The run on a branch.

    Attributes:
        branch: its name.
        status: 'running', 'finished', 'failed', 'stale', or None if it never said.
        tip: the branch's newest commit; None if it has none.
        holder: the living process that has claimed the branch, in words; None if nobody has.
        exit: the exit status of the program that ckpt ran there last; None if it ran none, or it is running.
        since: UTC nanoseconds of the last change of status; None if there was none.
        fork_point, overrides: where the branch was forked, and with what.
    """

    branch: str
    status: str | None
    tip: Commit | None
    holder: str | None = None
    exit: int | None = None
    since: int | None = None
    fork_point: ObjectId | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


def checked_status(status: str | None) -> str | None:
    """A status that a run may have, or None."""
    if status is not None and status not in STATUSES:
        raise InvalidError(f"a run's status cannot be {status!r:.40}", hint=f"one of {', '.join(STATUSES)}")
    return status


def marker(branch: str) -> str:
    """What a process claims while it runs a program on a branch. The branch itself is the program's to
    claim. No ref can have this name."""
    return f"run/{branch}"


def holder_of(store: Store, branch: str) -> str | None:
    """The living process that works on a branch, in words."""
    return store.claimant(refs.HEADS + branch) or store.claimant(marker(branch))


def runs(store: Store, history: History) -> list[Run]:
    """The runs on all branches that have a status, were forked, or are claimed, in name order."""
    with store.snapshot() as snapshot:
        tips = {name.removeprefix(refs.HEADS): tip for name, tip in snapshot.refs(refs.HEADS).items()}
        statuses = snapshot.status()
        forks = {name: snapshot.fork(name) for name in tips}
        told = _last_told(snapshot, set(statuses))
    found = []
    for branch in sorted({*tips, *statuses}):
        holder = holder_of(store, branch)
        status, fork = statuses.get(branch), forks.get(branch)
        if status is None and fork is None and holder is None:
            continue
        if status == "running" and holder is None:
            status = STALE
        tip = tips.get(branch)
        since, exit_status = told.get(branch, (None, None))
        found.append(
            Run(
                branch,
                status,
                history.commit(tip) if isinstance(tip, ObjectId) else None,
                holder,
                exit_status,
                since,
                *((None, {}) if fork is None else fork),
            )
        )
    return found


def _last_told(snapshot: Snapshot, branches: set[str]) -> dict[str, tuple[int, int | None]]:
    """When each branch's status was set last, and the exit status that was entered with it."""
    found: dict[str, tuple[int, int | None]] = {}
    for entry in snapshot.log_backwards():
        if len(found) == len(branches):
            break
        for op in entry.operations:
            if isinstance(op, Status) and op.branch in branches and op.branch not in found:
                code = entry.info.get("exit")
                found[op.branch] = entry.time, code if isinstance(code, int) else None
    return found
