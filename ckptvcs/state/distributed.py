"""Processes under torch.distributed: who may commit, and gathering what each of them has."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Final

from ckptvcs.errors import InvalidError


def _group() -> Any:
    """torch.distributed if a process group runs, else None. Never imports torch."""
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed


def place() -> tuple[int, int]:
    """(this process's rank, how many processes there are); (0, 1) without a process group."""
    group = _group()
    return (0, 1) if group is None else (int(group.get_rank()), int(group.get_world_size()))


def refuse_on_other_ranks() -> None:
    """InvalidError on every rank but 0 of a running process group. Never imports torch."""
    rank, _ = place()
    if rank > 0:
        raise InvalidError(
            f"commit was called on rank {rank}; only rank 0 may commit",
            hint="guard the call with `if rank == 0`, after gathering what you save",
            code="wrong-rank",
        )


_looking: Final[ContextVar[Any]] = ContextVar("looking", default=None)


@contextlib.contextmanager
def looking_together(group: Any) -> Iterator[None]:
    """Within, every rank of a process group looks at its state, each leaf in the same order, as a commit
    does. So a leaf may gather what the ranks have; `gather` goes through that group."""
    token = _looking.set(group)
    try:
        yield
    finally:
        _looking.reset(token)


def together() -> bool:
    """Whether all ranks look at their states at this moment."""
    return _looking.get() is not None


def gather(value: Any) -> list[Any] | None:
    """The values of all ranks, on rank 0; None on the others. A collective call: every rank makes it, or
    those that do wait for ever. Without a process group, the one value."""
    group = _group()
    if group is None:
        return [value]
    rank, world = place()
    found: list[Any] | None = [None] * world if rank == 0 else None
    group.gather_object(value, found, dst=0, group=_looking.get())
    return found
