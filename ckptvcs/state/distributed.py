"""What the plain path does under torch.distributed: rank 0 commits, and only rank 0."""

from __future__ import annotations

import sys

from ckptvcs.errors import InvalidError


def refuse_on_other_ranks() -> None:
    """InvalidError on every rank but 0 of a running process group. Never imports torch."""
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    rank = int(distributed.get_rank())
    if rank > 0:
        raise InvalidError(
            f"commit was called on rank {rank}; only rank 0 may commit",
            hint="guard the call with `if rank == 0`, after gathering what you save",
            code="wrong-rank",
        )
