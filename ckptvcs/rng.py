"""Exact resume: the random generators of a run, saved with its state and set again behind everything else.

    state = {"model": model, "optimizer": optimizer, "data": loader, "rng": ckptvcs.rng}
    repo.restore(state)     # the generators last, whatever their place
    repo.commit(state)

The module itself is such a leaf: it has `state_dict()` and `load_state_dict()`. It stands for the generators
that every program shares: Python's `random`, numpy's legacy functions, and torch's default generators of the
CPU and all CUDA, XPU and MPS devices, if torch is loaded. `Generators` adds those of the caller's own.

Bit-exact or refused: a device that was captured and is missing here, one that is here and was not captured,
and another number of processes are errors, unless `strict=False`. Torch is imported when a state of it is
restored. A framework that was not loaded at capture is left as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ckptvcs.errors import InvalidError, StateMismatchError
from ckptvcs.state import distributed
from ckptvcs.state import rng as kit

__all__ = ["Generators", "capture", "load_state_dict", "restore", "state_dict"]

_log = logging.getLogger("ckptvcs")

ckpt_last: Final = True
"""Saved and restored behind the rest of a state (`ckptvcs.state.interface.Last`)."""


def capture(*, all_ranks: bool = False, **generators: Any) -> dict[str, Any]:
    """The state of all random generators, as a value for a commit. Later draws do not change it.

    Args:
        all_ranks: gather the states of all ranks of the running torch.distributed group on rank 0, which
            gets `{"ranks": [...]}`; the others get their own state. A collective call: every rank must make
            it, at the same point.
        generators: further ones by name: numpy `Generator`, `BitGenerator` and `RandomState`,
            `random.Random`, `torch.Generator`, and keys of jax, typed or raw.

    Raises InvalidError for a generator whose state cannot be stored.
    """
    return kit.capture(generators, all_ranks=all_ranks)


def restore(state: Mapping[str, Any], *, strict: bool = True, **generators: Any) -> dict[str, Any]:
    """Set all random generators to a state that `capture` gave. Of the states of several ranks each process
    takes its own.

    Call it after everything that draws numbers, such as moving a data loader to its position.

    Args:
        strict: raise if anything captured has no generator here, or the reverse. Otherwise what can be
            restored is, and a warning is logged that names the rest.
        generators: those that were given to `capture`, by the same names. They are set in place.

    Returns the generators given, with new keys in place of jax's, which cannot be set.

    Raises StateMismatchError with all differences, and InvalidError for what `capture` does not give or a
    generator does not take; all generators are as they were then.
    """
    found = kit.differences(state, generators)
    if found and strict:
        raise StateMismatchError([], [], found)
    if found:
        _log.warning("random generators are not restored exactly: %s", "; ".join(found))
        if kit.other_processes(state):
            return dict(generators)
    fitting = generators if not found else kit.fitting(state, generators)
    return generators | kit.restore(state, fitting)


def state_dict() -> dict[str, Any]:
    """`capture()`, for a state with this module in it. In a group of several processes InvalidError, since
    it could not see the others' states; unless all of them save together, as `Autosave` does."""
    return _alone({})


def load_state_dict(state: Mapping[str, Any], strict: bool = True) -> None:
    """`restore(state)`."""
    restore(state, strict=strict)


def ckpt_differences(state: Any) -> Sequence[str]:
    """What keeps a state from being restored here exactly, as `path (reason)`."""
    return kit.differences(state, {})


class Generators(dict[str, Any]):
    """The global generators and some of the caller's own, as one leaf of a state.

        rng = ckptvcs.rng.Generators(data=np.random.default_rng(7), key=jax.random.key(0))
        state = {"model": params, "rng": rng}
        rng["key"], key = jax.random.split(rng["key"])

    A mapping of name to generator. Restoring sets them in place; a key of jax is a value, so the mapping has
    another one afterwards.
    """

    ckpt_last: Final = True

    def state_dict(self) -> dict[str, Any]:
        """`capture` with these generators, as `ckptvcs.rng.state_dict` does it."""
        return _alone(self)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """`restore` with these generators."""
        self.update(restore(state, strict=strict, **self))

    def ckpt_differences(self, state: Any) -> Sequence[str]:
        """What keeps a state from being restored here exactly, as `path (reason)`."""
        return kit.differences(state, self)


def _alone(generators: Mapping[str, Any]) -> dict[str, Any]:
    rank, world = distributed.place()
    if world > 1 and not distributed.together():
        raise InvalidError(
            f"rank {rank} sees its own random generators, and {world} ranks have some",
            hint="call ckptvcs.rng.capture(all_ranks=True) on every rank; put what rank 0 gets in the state",
        )
    return kit.capture(generators, all_ranks=world > 1)
