"""Which saves are measured, in which order: a series is a run's saves, with forks where the run forks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.workloads import trajectory

COUNTED = {"embedding": 5, "embedding_sgd": 5, "ema": 4, "scratch": 4, "scratch_dense": 4}
"""After how many saves a run's size is stated beside the one after all of them; 6 for the others."""


@dataclass(frozen=True)
class Save:
    """One save of a series; `forks_from` is the place in the series that it goes on from, if not the last."""

    file: Path
    forks_from: int | None = None


@dataclass(frozen=True)
class Series:
    name: str
    about: str
    saves: list[Save]
    counted: int
    steps_between: int


def found(folder: Path, limit: int | None = None) -> dict[str, Series]:
    """The series of all complete workloads in a folder of trajectories, at most `limit` saves of each."""
    series: dict[str, Series] = {}
    for file in sorted(folder.glob(f"*/{trajectory.ABOUT}")):
        home, facts = file.parent, trajectory.about(file.parent)
        assert facts is not None
        if facts["name"] == "forks":
            lines = {line: trajectory.saves_in(home / line) for line in ("trunk", "a", "b")}
            at = int(facts["forked_at"]["save"][:3]) - 1
            saves = [Save(save) for save in lines["trunk"]]
            for line in ("a", "b"):
                saves += [Save(save, at if i == 0 else None) for i, save in enumerate(lines[line])]
            parts = {"forks": (saves, len(saves), facts["steps_between"])}
        elif facts["name"] == "intervals":
            parts = {
                f"intervals_{gap}": ([Save(home / name) for name in names], len(names), int(gap))
                for gap, names in facts["series"].items()
            }
        else:
            saves = [Save(save) for save in trajectory.saves_in(home)]
            parts = {facts["name"]: (saves, COUNTED.get(facts["name"], 6), facts["steps_between"])}
        for name, (saves, counted, steps) in parts.items():
            # A series cut short may end before its forks, never between a fork and where it starts.
            series[name] = Series(name, facts["about"], saves[:limit], counted, steps)
    return series
