"""Agreement between the ranks of a torch.distributed job: what one of them knows, all do.

Signals reach the ranks at different steps, and clocks differ. A rank that stops, or that takes part in
collecting generator states, must do so at the same step as all others, or they wait for each other for ever.
So each `agree` is one reduction of three integers over a group of its own, on the CPU, which waits for no
device. Never imports torch: without it, or in a job of one process, all of this costs nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from ckptvcs.errors import InvalidError
from ckptvcs.state.distributed import looking_together, place

_PATIENCE: Final = datetime.timedelta(minutes=30)
"""How long ranks wait for each other: torch's own default."""

_START: Final = datetime.timedelta(minutes=5)
"""The same while the group is made: a rank that makes no Autosave never comes."""


class Flags(NamedTuple):
    """What ranks tell each other. Agreement takes the largest of each.

    Attributes:
        save: 1 if this step is to be saved.
        signal: number of a signal that came, else 0.
        stop: 1 if training is to stop.
    """

    save: int = 0
    signal: int = 0
    stop: int = 0


class Ranks:
    """This process's place among those that train together.

    Attributes:
        rank: 0 for the one that writes.
        size: how many there are; 1 without torch.distributed.
        agreeing: whether `agree` asks the others.
    """

    def __init__(self, *, agree: bool) -> None:
        """With `agree` and more than one rank this waits until all have come here."""
        self.agreeing = False
        self._group: Any = None
        self.rank, self.size = place()
        if not agree or self.size == 1:
            return
        distributed = sys.modules["torch"].distributed
        try:
            self._group = distributed.new_group(backend="gloo", timeout=_START)
            distributed.barrier(group=self._group)
        except RuntimeError as error:
            raise InvalidError(
                f"rank {self.rank} of {self.size} waited for the other ranks in vain: {_line(error)}",
                hint="make the Autosave on every rank, or only on rank 0 and with agree=False",
                code="wrong-rank",
            ) from error
        self.agreeing = True

    def agree(self, mine: Flags) -> Flags:
        """The largest of what all ranks say. A collective: every rank calls it as often as every other."""
        if not self.agreeing:
            return mine
        torch = sys.modules["torch"]
        flags = torch.tensor(mine, dtype=torch.int64)
        work = torch.distributed.all_reduce(
            flags, op=torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        work.wait(_PATIENCE)
        return Flags(*map(int, flags.tolist()))

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Within, all ranks look at their states: a `state_dict()` may be a collective."""
        with looking_together(self._group) if self.agreeing else contextlib.nullcontext():
            yield

    def close(self) -> None:
        """Agree no more, and end the group."""
        group, self._group = self._group, None
        self.agreeing = False
        distributed = sys.modules["torch"].distributed if group is not None else None
        if distributed is not None and distributed.is_initialized():
            distributed.destroy_process_group(group)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
