"""Torch's default generators, of the CPU and of every device: their states, and setting them.

    {"cpu": state, "cuda": [state of device 0, ...], "mps": state}

A state is a uint8 tensor on the CPU. There is an entry for each kind of device that this machine has. To ask
CUDA for its states initialises it: a seed that was set before is pending until then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from ckptvcs.errors import InvalidError
from ckptvcs.state.torch_tensors import loaded, require

_MANY: Final = ("cuda", "xpu")
"""Kinds of which a machine may have several; each device has a generator."""
_ONE: Final = ("mps",)


def capture() -> dict[str, Any] | None:
    """The states now, copied; None if torch is not loaded."""
    torch = loaded()
    if torch is None:
        return None
    found: dict[str, Any] = {"cpu": torch.random.get_rng_state()}
    for kind in _MANY:
        if getattr(torch, kind).is_available():
            found[kind] = [state.clone() for state in getattr(torch, kind).get_rng_state_all()]
    for kind in _ONE:
        if getattr(torch, kind).is_available():
            found[kind] = getattr(torch, kind).get_rng_state().clone()
    return found


def differences(states: Mapping[str, Any]) -> Iterator[str]:
    """Which states have no generator here and which generators have no state, as paths with the reason."""
    torch = require()
    for kind in states:
        if kind not in ("cpu", *_MANY, *_ONE):
            yield f"{kind} (this version knows no such device)"
    if "cpu" not in states:
        yield "cpu (not stored)"
    for kind in (*_MANY, *_ONE):
        stored = states.get(kind)
        there = 0 if stored is None else len(stored) if kind in _MANY else 1
        here = 0
        if getattr(torch, kind).is_available():
            here = getattr(torch, kind).device_count()
        if there != here:
            yield f"{kind} ({there} device(s) stored, {here} here)"


def restore(states: Mapping[str, Any]) -> None:
    """Set all generators that have a state, or, if torch does not take one, none. InvalidError then."""
    torch = require()
    found: list[tuple[Any, Any]] = []
    if "cpu" in states:
        found.append((torch.device("cpu"), states["cpu"]))
    for kind in _MANY:
        if getattr(torch, kind).is_available():
            here = getattr(torch, kind).device_count()
            stored = states.get(kind, ())
            found += [(torch.device(kind, at), state) for at, state in enumerate(stored[:here])]
    found += [
        (torch.device(kind), states[kind])
        for kind in _ONE
        if kind in states and getattr(torch, kind).is_available()
    ]
    ready = [(device, _accepted(device, state)) for device, state in found]
    for device, state in ready:
        if device.type == "cpu":
            torch.random.set_rng_state(state)
        elif device.type in _ONE:
            getattr(torch, device.type).set_rng_state(state)
        else:
            getattr(torch, device.type).set_rng_state(state, device)


def generator(value: Any) -> dict[str, Any]:
    """A torch.Generator as plain values: its device and state."""
    return {"device": str(value.device), "state": value.get_state().clone()}


def set_generator(target: Any, stored: Mapping[str, Any], *, check_only: bool = False) -> None:
    """Let a torch.Generator go on from what `generator` gave. InvalidError if it is of another device."""
    kind = str(stored["device"]).partition(":")[0]
    if target.device.type != kind:
        raise InvalidError(f"a generator of {target.device} cannot take the state of one of {kind}")
    state = _accepted(target.device, stored["state"])
    if not check_only:
        target.set_state(state)


def _accepted(device: Any, state: Any) -> Any:
    """A state as torch wants it, which a generator of that device has taken."""
    torch = require()
    try:
        plain = torch.as_tensor(state).cpu()
        torch.Generator(device=device).set_state(plain)
    except (RuntimeError, TypeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise InvalidError(f"torch does not take this state of a generator of {device}: {why}") from None
    return plain
