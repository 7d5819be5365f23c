"""A trajectory: the numbered saves of one training run in a folder, and `about.json` beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

State = dict[str, Any]

ABOUT = "about.json"


def saves_in(folder: Path) -> list[Path]:
    """The saves of a run, in order."""
    return sorted(folder.glob("[0-9][0-9][0-9].pt"))


def about(folder: Path) -> dict[str, Any] | None:
    """What `about.json` says, None while the run is not complete."""
    file = folder / ABOUT
    return json.loads(file.read_text()) if file.exists() else None


def load(file: Path) -> State:
    return torch.load(file, weights_only=True)


def write_about(folder: Path, facts: dict[str, Any]) -> None:
    """Written last: its presence says that the run is complete."""
    new = folder / (ABOUT + ".new")
    new.write_text(json.dumps(facts, indent=1) + "\n")
    new.rename(folder / ABOUT)


def train(
    folder: Path,
    step_once: Callable[[int], float],
    state: Callable[[int], State],
    at: Sequence[int],
    after: int = 0,
) -> list[float]:
    """Run the steps after step `after` to the last of `at`, saving after each step named in `at`.

    `step_once` takes the number of the step, counted from 1, and answers the loss. Returns all losses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    losses = []
    for step in range(after + 1, at[-1] + 1):
        losses.append(round(step_once(step), 4))
        if step in at:
            number = list(at).index(step) + 1
            _save(state(step), folder / f"{number:03d}.pt")
            print(f"{folder.name} {number}/{len(at)}: step {step}, loss {losses[-1]:.3f}", flush=True)
    return losses


def every(steps: int, saves: int, after: int = 0) -> list[int]:
    """The steps at which a run that saves every so many steps saves."""
    return [after + steps * number for number in range(1, saves + 1)]


def parameters(module: torch.nn.Module) -> int:
    """How many numbers a model has."""
    return sum(parameter.numel() for parameter in module.parameters())


def _save(state: State, file: Path) -> None:
    # Whoever watches the folder must never see half a file.
    new = file.with_suffix(".new")
    torch.save(state, new)
    new.replace(file)
