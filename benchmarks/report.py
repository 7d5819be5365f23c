"""The page of figures: `python -m benchmarks.report results.json --out docs/benchmarks.md`.

Every number comes from the results; pictures go into the folder beside the page that has its name.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import plots
from benchmarks.results import OURS, Results
from benchmarks.states import COMPONENTS
from benchmarks.targets import STORED

_METHOD = """\
Every tool saves the same states, made by real training runs, and is asked for each of them again. What it
returns is compared with the original to the bit, outside the clocks.

- **Sizes** are bytes of all files of the store over bytes of all tensors given. The second copy that some
  programs keep in the work folder is not counted.
- **Times** are ratios: each operation of a tool runs right beside the same operation of `torch.save` with
  fsync (saves) or `torch.load` (restores), on the same state, in the same process, in turns of order. The
  tables give the median of these ratios over {repeats} pass(es). 1.00 is the reference; smaller is faster.
- Before each clock a scratch file of {scratch} MB is written and deleted. Otherwise it is chance which
  operation pays for memory that the virtual machine has not used before.
- A save ends when its bytes are on disk. Where a tool does not sync, we sync its files within the clock.
- What restores read is in the page cache.
- **Memory** is the peak above what was resident before, the restored state included; for programs, their own
  beside it.
"""

_REPRODUCE = """\
```sh
make bench            # runs everything below; hours, and a machine with nothing else to do
```

or step by step:

```sh
python -m benchmarks.trajectories --dir DIR       # trains; follows from seeds
{command}
python -m benchmarks.report results.json --out docs/benchmarks.md
```
"""

_NOT_MEASURED = """\
- GPUs, network file systems, object stores, several ranks.
- Models above 10^8 parameters, mixture-of-experts models, fp8, 8-bit optimizers.
- Restores from a cold page cache.
- Compression of a single save against the compressors' own command-line tools.
"""


def page(results: Results, pictures: Path, relative: str) -> str:
    """The whole page; pictures are drawn into a folder."""
    pictures.mkdir(parents=True, exist_ok=True)
    blocks = ["# Benchmarks", _summary(results)]
    blocks += ["## Sizes of ckptvcs", _levels(results)]
    blocks += ["## Sizes by component", _components(results)]
    blocks += ["## Steps between saves", _intervals(results)]
    blocks += _pictures(plots.intervals(results, pictures), relative)
    blocks += ["## Sizes of all tools", _sizes(results)]
    blocks += _pictures(plots.sizes(results, pictures), relative)
    blocks += ["## Times"]
    for name in results.series:
        blocks += _times(results, name)
    for name in ("finetune_fp32", *results.series):
        drawn = plots.times(results, pictures, name)
        if drawn:
            blocks += _pictures(drawn + plots.growth(results, pictures, name), relative)
            break
    blocks += ["## Memory", _memory(results)]
    if results.depths:
        blocks += ["## How deep chains grow", _depths(results)]
    if results.codecs:
        blocks += ["## Codecs alone", _codecs(results)]
    blocks += ["## The runs", _series(results), "## The tools", _tools(results)]
    method = _METHOD.format(repeats=results.repeats, scratch=results.scratch_mb)
    if results.notes:
        blocks += ["## This run", results.notes]
    blocks += ["## Method", method.strip(), "## Machine", _machine(results)]
    blocks += ["## How to reproduce", _REPRODUCE.format(command="\n".join(results.commands)).strip()]
    blocks += ["## Not measured", _NOT_MEASURED.strip()]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _summary(results: Results) -> str:
    differences = results.differences()
    lines = [
        "Bytes stored over bytes given, and times over those of `torch.save` and `torch.load`, on real runs."
    ]
    if differences:
        told = "; ".join(f"{key}: {found[0]}" for key, found in differences.items())
        lines.append(f"**Not restored to the bit:** {told}.")
    else:
        lines.append("Every state was restored to the bit by every tool measured.")
    lines += [f"Failed: {key}: {reason}." for key, reason in results.failures().items()]
    return "\n".join(lines)


def _levels(results: Results) -> str:
    levels = [name for name in OURS if name in results.measured()]
    rows = []
    for series, facts in results.series.items():
        row = [series, str(facts["steps_between"])]
        for rival in levels:
            level = rival.removeprefix("ckptvcs_")
            target = STORED.get((series, level))
            counted = results.stored(series, rival, facts["counted"])
            text = _number(counted)
            if target is not None and counted is not None:
                text += f" (target {target:.2f}: {'met' if counted <= target else '**missed**'})"
            row += [text, _number(results.stored(series, rival))]
        rows.append([*row, str(min(facts["counted"], facts["saves"])), str(facts["saves"])])
    titles = ["series", "steps between saves"]
    for rival in levels:
        level = rival.removeprefix("ckptvcs_")
        titles += [f"{level}, first n", f"{level}, all"]
    return _table([*titles, "n", "all"], rows)


def _components(results: Results) -> str:
    rows = []
    for series in results.series:
        for rival in OURS:
            if results.job("components", series, rival) is None:
                continue
            row = [series, rival.removeprefix("ckptvcs_")]
            for name in COMPONENTS[:-1]:
                first, last = (results.component(series, rival, name, saves) for saves in (5, None))
                row.append("" if last is None else f"{_number(first)} / {_number(last)}")
            rows.append(row)
    if not rows:
        return "Not measured."
    return "After 5 and after all saves.\n\n" + _table(["series", "level", *COMPONENTS[:-1]], rows)


def _intervals(results: Results) -> str:
    gaps = [name for name in results.series if name.startswith("intervals_")]
    gaps.sort(key=lambda name: int(name.rpartition("_")[2]))
    rows = []
    for rival in results.measured():
        values = [results.stored(name, rival) for name in gaps]
        if any(value is not None for value in values):
            rows.append([rival, *map(_number, values)])
    if not rows:
        return "Not measured."
    told = ", ".join(f"{results.series[name]['saves']} saves" for name in gaps)
    text = (
        "The farther saves are apart, the less one tells about the next, and the more there is to store. "
        f"One run at a constant learning rate, sampled three times ({told}):"
    )
    return text + "\n\n" + _table(["tool", *(f"{n.rpartition('_')[2]} steps" for n in gaps)], rows)


def _sizes(results: Results) -> str:
    rows = [
        [rival, *(_number(results.stored(series, rival)) for series in results.series)]
        for rival in results.measured()
    ]
    return "Stored over given bytes after all saves.\n\n" + _table(["tool", *results.series], rows)


def _times(results: Results, series: str) -> list[str]:
    rows = []
    for rival in results.measured():
        if results.job("times", series, rival) is None:
            continue
        blocking = results.blocking(series, rival)
        one = results.seconds(series, rival, "one_tensor")
        rows.append(
            [
                rival,
                *(_number(results.ratio(series, rival, name), 2) for name in ("first", "later", "unchanged")),
                "= save" if blocking is None else f"{blocking:.3f} s",
                _number(results.ratio(series, rival, "restore"), 2),
                _number(results.worst_restore(series, rival), 2),
                "" if one is None else f"{1000 * one:.1f} ms",
                " / ".join(_number(results.seconds(series, rival, name), 2) for name in ("later", "restore")),
            ]
        )
    if not rows:
        return []
    titles = ["tool", "first save", "later save", "unchanged save", "blocked", "restore", "worst restore"]
    titles += ["one tensor", "later save / restore, s"]
    return [f"### {series}", _table(titles, rows)]


def _memory(results: Results) -> str:
    rows = []
    for series in results.series:
        for rival in results.measured():
            facts = results.job("memory", series, rival)
            if facts is not None:
                programs = f"{_mega(facts['save_programs'])} / {_mega(facts['restore_programs'])}"
                row = [series, rival, _mega(facts["given"]), _mega(facts["save"]), _mega(facts["restore"])]
                rows.append([*row, programs if facts["save_programs"] else ""])
    if not rows:
        return "Not measured."
    return _table(["series", "tool", "state, MB", "save", "restore", "programs, save / restore"], rows)


def _depths(results: Results) -> str:
    about = (
        "Level `balanced` with other depths (`python -m benchmarks.depths`): stored over given bytes of all "
        "saves, and medians of paired ratios of a later commit to `torch.save` with fsync, and of a restore "
        "to `torch.load`. `balanced` goes one step deep: what deeper chains save, commits and restores pay."
    )
    rows = [
        (name, str(each["depth"]), *(_number(each[key], 3 if key == "stored" else 2) for key in columns))
        for columns in (("stored", "commit", "restore", "worst"),)
        for name, facts in results.depths.items()
        for each in facts["rows"]
    ]
    titles = ("run", "depth", "stored/given", "later commit", "restore, median", "restore, worst")
    return f"{about}\n\n{_table(titles, rows)}"


def _codecs(results: Results) -> str:
    about = (
        "GB/s of raw bytes on one core, 1 MiB at a time, on synthetic normal weights and a small step from "
        "them (`python -m benchmarks.codecs`), beside a copy of memory in the cache and the hash."
    )
    names = ("copy", "hash", "planes_encode", "planes_decode", "difference_encode", "difference_decode")
    rows = [(kind, *(_number(facts[name], 2) for name in names)) for kind, facts in results.codecs.items()]
    return f"{about}\n\n{_table(('numbers', *(name.replace('_', ', ') for name in names)), rows)}"


def _series(results: Results) -> str:
    rows = [
        [name, facts["about"], str(facts["steps_between"]), str(facts["saves"])]
        for name, facts in results.series.items()
    ]
    return _table(["series", "what", "steps between saves", "saves"], rows)


def _tools(results: Results) -> str:
    rows = [
        [name, results.rivals[name]["version"], results.rivals[name]["note"]] for name in results.measured()
    ]
    rows += [[name, "not measured", reason] for name, reason in results.missing().items()]
    return _table(["tool", "version", "notes"], rows)


def _machine(results: Results) -> str:
    facts = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['system']}, "
        f"Python {facts['python']}, {versions}. ckptvcs at revision {facts['revision']}."
    )


def _pictures(drawn: Iterable[tuple[str, str]], relative: str) -> list[str]:
    return [f"![{caption}]({relative}/{name})" for caption, name in drawn]


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _mega(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e6:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the page, such as docs/benchmarks.md")
    options = parser.parse_args()
    pictures = options.out.with_suffix("")
    options.out.write_text(page(Results(options.results), pictures, pictures.name))
    print(f"Wrote {options.out} and {len(list(pictures.glob('*.png')))} pictures.")


if __name__ == "__main__":
    main()
