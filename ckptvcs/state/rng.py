"""The state of all random generators of a process as one plain value, and setting them to it again.

    {"python": random.Random, "numpy": numpy.random.RandomState, "torch": {"cpu": ..., "cuda": [...]},
     "given": {name: generator}}

`torch` is there if torch was loaded, `given` if the caller named generators. What has been gathered from
several processes is `{"ranks": [one such value per rank]}`. Generators inside are copies; torch's are kept as
their device and state, because a machine without the device could not make one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ckptvcs.errors import InvalidError
from ckptvcs.state import distributed, generators, jax_keys, torch_random, torch_tensors


def capture(given: Mapping[str, Any], *, all_ranks: bool = False) -> dict[str, Any]:
    """The state of the global generators and of those given, copied.

    `all_ranks` is a collective call: rank 0 gets the states of all ranks, every other rank its own.
    """
    found: dict[str, Any] = {"python": _python(), "numpy": _numpy()}
    torch = torch_random.capture()
    if torch is not None:
        found["torch"] = torch
    if given:
        found["given"] = {name: _snapshot(name, value) for name, value in given.items()}
    if not all_ranks:
        return found
    gathered = distributed.gather(found)
    return found if gathered is None else {"ranks": gathered}


def differences(state: Any, given: Mapping[str, Any]) -> list[str]:
    """What of a captured state could not be restored here, and what here has none: paths with the reason.
    InvalidError for what is no captured state."""
    elsewhere = other_processes(state)
    return [f"ranks ({elsewhere})"] if elsewhere else list(_differences(_own(state), given))


def fitting(state: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the generators given for which a state of their own kind was captured."""
    stored = _own(state).get("given", {})
    return {n: value for n, value in given.items() if n in stored and _kind(stored[n]) == _kind(value)}


def restore(state: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Set the generators to what was captured, as far as both are there.

    Everything is checked first: an InvalidError leaves all generators as they were. The result holds the
    generators given, with new keys in the place of jax's.
    """
    mine = _own(state)
    stored = mine.get("given", {})
    result = dict(given)
    for name, value in given.items():
        if name in stored:
            _put(value, stored[name], check_only=True)
            if jax_keys.is_key(value):
                result[name] = jax_keys.restored(stored[name])
    here = {"python": _python(), "numpy": _numpy()}
    parts = [(part, mine[part]) for part in here if _kind(mine[part]) == _kind(here[part])]
    if "torch" in mine:
        torch_random.restore(mine["torch"])  # all of it or nothing
    for part, value in parts:
        if part == "python":
            random.setstate(value.getstate())
        else:
            np.random.set_state(value.get_state(legacy=False))
    for name, value in given.items():
        if name in stored:
            _put(value, stored[name])
    return result


# -- the parts ------------------------------------------------------------------------------------


def _python() -> random.Random:
    made = random.Random()
    made.setstate(random.getstate())
    return made


def _numpy() -> np.random.RandomState:
    state = np.random.get_state(legacy=False)
    made = np.random.RandomState(getattr(np.random, state["bit_generator"])(0))
    made.set_state(state)
    return made


def _snapshot(name: str, value: Any) -> Any:
    if generators.is_generator(value):
        generators.leaf(value)  # refuses what cannot be stored, here where it has its name
        return generators.copied(value)
    if torch_tensors.is_generator(value):
        return torch_random.generator(value)
    if jax_keys.is_key(value):
        return jax_keys.plain(value)
    raise InvalidError(
        f"{name}: a {type(value).__name__} is no random generator",
        hint="generators of random, numpy and torch, and keys of jax",
    )


def _put(target: Any, stored: Any, *, check_only: bool = False) -> None:
    """Set a generator that was given. InvalidError if what is stored is of another kind."""
    if generators.is_generator(target):
        if check_only:
            target = generators.copied(target)
        generators.assign(target, stored)
    elif torch_tensors.is_generator(target):
        torch_random.set_generator(target, stored, check_only=check_only)


def _kind(value: Any) -> str:
    """What is stored for a generator, or a generator itself, in a word that tells which fit each other."""
    if isinstance(value, Mapping):
        return "torch.Generator" if "device" in value else "key of jax"
    if torch_tensors.is_generator(value):
        return "torch.Generator"
    if jax_keys.is_key(value):
        return "key of jax"
    return generators.describe(value)


def _differences(mine: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    for part, here in (("python", _python()), ("numpy", _numpy())):
        if _kind(mine[part]) != _kind(here):
            yield f"{part} ({_kind(mine[part])} stored, {_kind(here)} here)"
    if "torch" in mine:
        yield from (f"torch/{difference}" for difference in torch_random.differences(mine["torch"]))
    stored = mine.get("given", {})
    for name in (*stored, *(name for name in given if name not in stored)):
        if name not in given:
            yield f"given/{name} (stored, and no such generator is given)"
        elif name not in stored:
            yield f"given/{name} (not stored)"
        elif _kind(stored[name]) != _kind(given[name]):
            yield f"given/{name} ({_kind(stored[name])} stored, {_kind(given[name])} given)"


# -- several processes ----------------------------------------------------------------------------


def other_processes(state: Any) -> str | None:
    """How many processes a state was captured in and how many there are, if these differ; else None."""
    _, world = distributed.place()
    stored = len(state["ranks"]) if isinstance(state, Mapping) and "ranks" in state else 1
    return None if stored == world else f"the generators of {stored} process(es) stored, {world} run here"


def _own(state: Any) -> Mapping[str, Any]:
    """This process's part of a captured state. InvalidError for what is none."""
    mine = state
    if isinstance(state, Mapping) and "ranks" in state:
        mine = state["ranks"][distributed.place()[0]]
    if not isinstance(mine, Mapping) or not mine.keys() >= {"python", "numpy"}:
        raise InvalidError("this is no state of random generators", hint="ckptvcs.rng.capture makes one")
    return mine
