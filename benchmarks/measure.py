"""One job of the benchmark in a process of its own: a tool and a series, for times, memory or components.

`benchmarks.run` starts it; `python -m benchmarks.measure --help` says how.
"""

from __future__ import annotations

import argparse
import json
import shutil
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import clocks, series, states
from benchmarks.rivals import ALL, REFERENCE
from benchmarks.rivals.rival import Rival
from benchmarks.series import Series
from benchmarks.workloads import trajectory

Facts = dict[str, Any]


class Pair:
    """Operations of a tool, each beside the same operation of the reference."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.seconds: list[float] = []
        self.reference: list[float] = []

    def run(
        self,
        clock: clocks.Clock,
        place: int,
        ours: Callable[[], Any],
        reference: Callable[[], Any],
        *,
        refresh: bool = True,
    ) -> Any:
        """Time both for the save at a place, in turns of order, and answer what the tool's returned."""
        if len(self.seconds) % 2:
            seconds, result = clock.seconds(ours, refresh=refresh)
            other, _ = clock.seconds(reference, refresh=refresh)
        else:
            other, _ = clock.seconds(reference, refresh=refresh)
            seconds, result = clock.seconds(ours, refresh=refresh)
        self.places.append(place)
        self.seconds.append(round(seconds, 5))
        self.reference.append(round(other, 5))
        return result

    def facts(self) -> Facts:
        return {"places": self.places, "seconds": self.seconds, "reference": self.reference}


def times(kind: type[Rival], chosen: Series, work: Path, repeats: int, scratch: int) -> Facts:
    """Save all, save the last once more, restore all; sizes and equality in the first pass.

    Later passes, which only make the times surer, end with the saves that are counted.
    """
    clock = clocks.Clock(work, scratch)
    pairs = {name: Pair() for name in ("first", "later", "unchanged", "restore", "one_tensor")}
    facts: Facts = {"stored_after": [], "given_after": [], "differences": [], "blocking": []}
    for number in range(repeats):
        folders = [work / f"{role}{number}" for role in ("tool", "reference")]
        tool, reference = kind(), REFERENCE()
        for store, folder in zip((tool, reference), folders, strict=True):
            folder.mkdir()
            store.open(folder)
        saves = chosen.saves if number == 0 else chosen.saves[: chosen.counted]
        _one_pass(tool, reference, saves, clock, pairs, facts, measure_sizes=number == 0)
        for store, folder in zip((tool, reference), folders, strict=True):
            store.close()
            shutil.rmtree(folder)
    return facts | {name: pair.facts() for name, pair in pairs.items() if pair.seconds}


def _one_pass(
    tool: Rival,
    reference: Rival,
    saves: list[series.Save],
    clock: clocks.Clock,
    pairs: dict[str, Pair],
    facts: Facts,
    measure_sizes: bool,
) -> None:
    keys: list[str] = []
    reference_keys: list[str] = []
    given = 0
    for place, save in enumerate(saves):
        state = trajectory.load(save.file)
        if save.forks_from is not None:
            tool.fork(keys[save.forks_from])
        pair = pairs["later" if place else "first"]
        _save(pair, clock, tool, reference, state, keys, reference_keys)
        if tool.save_blocking_seconds is not None and place:
            facts["blocking"].append(round(tool.save_blocking_seconds, 5))
        if measure_sizes:
            given += states.tensor_bytes(state)
            facts["given_after"].append(given)
            facts["stored_after"].append(tool.stored_bytes())
    before = tool.stored_bytes()
    _save(pairs["unchanged"], clock, tool, reference, state, keys, reference_keys)
    facts["unchanged_bytes"] = tool.stored_bytes() - before
    path = states.largest(state)
    facts["one_tensor_path"] = path
    del state

    for place, save in enumerate(saves):
        key, other = keys[place], reference_keys[place]
        found = pairs["restore"].run(
            clock, place, lambda key=key: tool.load(key), lambda other=other: _dropped(reference.load(other))
        )
        if measure_sizes:
            difference = states.difference(trajectory.load(save.file), found)
            if difference:
                facts["differences"].append(f"{save.file.name}: {difference}")
        del found
        if tool.load_tensor(key, path) is None:
            continue
        found = pairs["one_tensor"].run(
            clock,
            place,
            lambda key=key: tool.load_tensor(key, path),
            lambda other=other: reference.load_tensor(other, path),
            refresh=False,
        )
        if measure_sizes:
            expected = states.flatten(trajectory.load(save.file))[0][path]
            difference = states.difference({path: expected}, {path: found})
            if difference:
                facts["differences"].append(f"{save.file.name}, one tensor: {difference}")


def _save(
    pair: Pair,
    clock: clocks.Clock,
    tool: Rival,
    reference: Rival,
    state: states.State,
    keys: list[str],
    reference_keys: list[str],
) -> None:
    step = int(state["step"])
    keys.append(
        pair.run(
            clock,
            len(keys),
            lambda: tool.save(state, step),
            lambda: reference_keys.append(reference.save(state, step)),
        )
    )


def _dropped(state: states.State) -> None:
    """Let go of a restored state within the clock's action, so that two never share the memory."""
    del state


def memory(kind: type[Rival], chosen: Series, work: Path) -> Facts:
    """Peak memory of a later save and of a restore, above what is in use before."""
    tool = kind()
    folder = work / "tool"
    folder.mkdir()
    tool.open(folder)
    # The first save loads what the tool loads lazily.
    tool.save(trajectory.load(chosen.saves[0].file), 1)
    held = [trajectory.load(chosen.saves[1].file)]
    given = states.tensor_bytes(held[0])
    keys: list[str] = []
    with clocks.ChildrenWatch() as saving_programs:
        saving = clocks.peak_bytes(lambda: keys.append(tool.save(held[0], 2)))
    held.clear()
    with clocks.ChildrenWatch() as restoring_programs:
        restoring = clocks.peak_bytes(lambda: tool.load(keys[-1]))
    tool.close()
    return {
        "save": saving,
        "restore": restoring,
        "save_programs": saving_programs.peak,
        "restore_programs": restoring_programs.peak,
        "given": given,
    }


def components(kind: type[Rival], chosen: Series, work: Path) -> Facts:
    """Bytes given and stored by component after each save, as the commit reports state them.

    The states are regrouped, so that both of the optimizer's moments are components of their own.
    """
    tool: Any = kind()
    folder = work / "tool"
    folder.mkdir()
    tool.open(folder)
    totals = {name: {"given": 0, "stored": 0} for name in states.COMPONENTS}
    after: list[dict[str, dict[str, int]]] = []
    keys: list[str] = []
    for save in chosen.saves:
        if save.forks_from is not None:
            tool.fork(keys[save.forks_from])
        state = trajectory.load(save.file)
        keys.append(tool.save(states.grouped(state), int(state["step"])))
        given = states.component_bytes(state)
        for name, part in tool.commit.report.components.items():
            totals[name]["given"] += given[name]
            totals[name]["stored"] += part.stored
        after.append({name: dict(total) for name, total in totals.items() if total["given"]})
    tool.close()
    return {"after": after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--what", choices=("times", "memory", "components"), required=True)
    parser.add_argument("--rival", choices=ALL, required=True)
    parser.add_argument("--series", required=True)
    parser.add_argument("--trajectories", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--saves", type=int)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--scratch-mb", type=int, default=900)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # tools warn of what they were asked to do
    torch.set_num_threads(2)
    kind = ALL[options.rival]
    chosen = series.found(options.trajectories, options.saves)[options.series]
    try:
        if options.what == "times":
            facts = times(kind, chosen, options.work, options.repeats, options.scratch_mb)
        elif options.what == "memory":
            facts = memory(kind, chosen, options.work)
        else:
            facts = components(kind, chosen, options.work)
    except Exception as error:  # noqa: BLE001 - a tool that fails is a result
        traceback.print_exc()
        facts = {"failed": f"{type(error).__name__}: {error}"}
    options.out.write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
