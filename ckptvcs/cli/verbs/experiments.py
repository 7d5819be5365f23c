"""fork, sweep, runs, reset."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptvcs.cli import output, session, shapes
from ckptvcs.cli.exits import Exit
from ckptvcs.cli.options import branch_argument, complete_branch, json_option, pairs, revision_argument
from ckptvcs.errors import ConflictError, ExistsError, InvalidError

if TYPE_CHECKING:
    from ckptvcs.repo import Repo
    from ckptvcs.running import Job
    from ckptvcs.runs import Run
    from ckptvcs.sweeping import Point

_set_option = click.option(
    "--set",
    "overrides",
    callback=pairs,
    multiple=True,
    metavar="NAME=VALUE",
    help="A value that restoring the fork point sets anew, such as optimizer.lr=3e-4. The value is read as "
    "JSON, else as text. May be repeated.",
)

# ---- fork ---------------------------------------------------------------------------------------


@click.command()
@revision_argument(required=True)
@branch_argument("name", "NAME")
@_set_option
@click.option("--again", is_flag=True, help="Go on with the branch if it is there and was forked so.")
@click.argument("command", metavar="[-- COMMAND...]", nargs=-1, type=click.UNPROCESSED)
@json_option
def fork(
    revision: str,
    name: str,
    overrides: list[tuple[str, str]],
    again: bool,
    command: tuple[str, ...],
    as_json: bool,
) -> int:
    """Branch an experiment from a commit, and run it.

    No bytes are copied. What --set says is applied once: when the fork point is restored on the new branch. A
    new learning rate takes the place of the one at the top of the schedule. Names that the state has no
    component for are for the program to read.

    The program runs with CKPT_REPO, CKPT_BRANCH, CKPT_FORK_POINT and CKPT_OVERRIDES set, its exit status is
    recorded (`ckpt runs`), and is that of this command.

    \b
    ckpt fork main~3 lr3e-4 --set optimizer.lr=3e-4 -- python train.py
    ckpt fork base@step:4000 wd0 --set optimizer.weight_decay=0
    """
    from ckptvcs.state.overrides import checked, value_of

    wanted = checked({key: value_of(text) for key, text in _once(overrides)})
    with session.opened() as repo:
        commit = session.resolved(repo, revision)
        handle = _forked(repo, commit.id, name, wanted, again=again)
        shown = {"branch": name, "commit": str(commit.id), "overrides": wanted}
        if not command:
            if as_json:
                output.data(shown)
            else:
                said = "".join(f", {key} = {output.clean(str(value))}" for key, value in wanted.items())
                output.line(f"Forked {name} at {commit.id.short}{said}")
            return Exit.DONE
        from ckptvcs.running import run

        def say() -> None:
            if not as_json:
                output.note(f"{name} from {commit.id.short}: {shlex.join(command)}")

        code = run(handle, command, say)
        if as_json:
            output.data({**shown, "exit": code})
        elif code:
            output.warning(f"{command[0]} ended with exit status {code}")
        return code


def _once(overrides: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    names = [name for name, _ in overrides]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise click.UsageError(f"--set {twice[0]} is given twice")
    return overrides


def _forked(repo: Repo, commit: Any, name: str, wanted: dict[str, Any], *, again: bool) -> Repo:
    """A handle on the branch: made now, or, with `again`, there and forked in the same way."""
    try:
        return repo.fork(commit, name, wanted)
    except ExistsError as error:
        if not again:
            raise ExistsError(
                error.message, hint="choose another name, or --again to go on with it"
            ) from None
    handle = repo.on(name)
    if (handle.fork_point, handle.overrides) != (commit, wanted):
        raise ExistsError(
            f"{name} exists already, and was not forked so",
            hint="choose another name; `ckpt runs` shows what was set there",
        )
    return handle


# ---- sweep --------------------------------------------------------------------------------------


@click.command()
@revision_argument(required=True)
@click.option(
    "--grid",
    "axes",
    callback=pairs,
    multiple=True,
    required=True,
    metavar="NAME=V1,V2,...",
    help="Values of an override. Of several, every combination becomes a branch.",
)
@_set_option
@click.option("--name", default="sweep", metavar="PREFIX", help="What the branches' names begin with.")
@click.option("--print", "only_print", is_flag=True, help="Print a command for each point instead.")
@click.option(
    "--jobs", type=click.IntRange(min=1), default=1, metavar="N", help="Run N at a time; GPUs are dealt out."
)
@click.option(
    "--logs",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("sweep-logs"),
    metavar="DIR",
    help="With --jobs: where output goes, a file for each branch.  [default: sweep-logs]",
)
@click.argument("command", metavar="-- COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
@json_option
def sweep(
    revision: str,
    axes: list[tuple[str, str]],
    overrides: list[tuple[str, str]],
    name: str,
    only_print: bool,
    jobs: int,
    logs: Path,
    command: tuple[str, ...],
    as_json: bool,
) -> int:
    """Fork and run a branch for each point of a grid.

    Begun again, it leaves out what has finished and runs the rest: each program goes on where its branch is.
    With --print nothing is made or run: each line is a `ckpt fork --again` for a job of its own.

    \b
    ckpt sweep main --grid lr=1e-4,3e-4 --grid wd=0,0.1 --jobs 2 -- python train.py
    ckpt sweep main --grid optimizer.lr=1e-4,3e-4 --print -- python train.py > jobs.txt
    """
    from ckptvcs.sweeping import grid

    points = grid(axes, name, dict(_once(overrides)))
    with session.opened() as repo:
        commit = session.resolved(repo, revision)
        if only_print:
            return _print_points(repo, points, str(commit.id), command, as_json)
        from ckptvcs.running import Job, run_all

        before = {run.branch: run for run in repo.runs()}
        done = [point for point in points if _is_done(before.get(point.branch), commit.id, point)]
        taken = [p for p in points if p not in done and (r := before.get(p.branch)) is not None and r.holder]
        rest = [point for point in points if point not in done and point not in taken]
        for each in done if not as_json else ():
            output.note(f"{each.branch}: finished before")
        for each in taken:
            output.warning(f"{each.branch}: left alone, {before[each.branch].holder} is at work there")

        def start(point: Point, share: str | None) -> Job:
            handle = _forked(repo, commit.id, point.branch, point.overrides, again=True)
            return Job(handle, command, gpus=share, log=logs / f"{point.branch}.log" if jobs > 1 else None)

        ended: dict[str, int | None] = {}

        def say_started(job: Job) -> None:
            if not as_json:
                output.note(f"{job.branch}: running")

        def say_ended(job: Job) -> None:
            ended[job.branch] = job.exit
            if not as_json:
                output.note(f"{job.branch}: " + ("finished" if job.exit == 0 else f"failed, exit {job.exit}"))

        starts = [lambda share, point=point: start(point, share) for point in rest]
        run_all(starts, jobs, say_started, say_ended)
    failed = [branch for branch, code in ended.items() if code]
    if as_json:
        output.data(
            {
                "commit": str(commit.id),
                "finished_before": [point.branch for point in done],
                "left_alone": [point.branch for point in taken],
                "ended": ended,
            }
        )
    elif not failed and not taken:
        output.line(f"{output.counted(len(points), 'point')} finished")
    if failed and not as_json:
        output.warning(f"{len(failed)} of {len(points)} failed: {', '.join(failed)}")
    return Exit.PARTLY if failed or taken else Exit.DONE


def _is_done(run: Run | None, commit: Any, point: Point) -> bool:
    return run is not None and (run.status, run.fork_point, run.overrides) == (
        "finished",
        commit,
        point.overrides,
    )


def _print_points(
    repo: Repo, points: Sequence[Point], commit: str, command: Sequence[str], as_json: bool
) -> Exit:
    lines = []
    for point in points:
        words = ["ckpt", "--repo", str(repo.path), "fork", "--again", commit, point.branch]
        for name, text in point.texts.items():
            words += ["--set", f"{name}={text}"]
        lines.append(shlex.join([*words, "--", *command]))
    if as_json:
        rows = [
            {"branch": point.branch, "overrides": point.overrides, "command": text}
            for point, text in zip(points, lines, strict=True)
        ]
        output.data({"commit": commit, "points": rows})
    else:
        for text in lines:
            output.line(text)
    return Exit.DONE


# ---- runs ---------------------------------------------------------------------------------------


@click.command()
@json_option
def runs(as_json: bool) -> None:
    """List the runs, and what became of each.

    A run is running, finished or failed, as it last said itself; stale if it says that it is running and no
    living process of this machine has claimed its branch.

    \b
    ckpt runs
    """
    with session.opened() as repo:
        found = repo.runs()
        now = repo.disk.now_ns()
    if as_json:
        output.data({"runs": [shapes.run_shape(run) for run in found]})
        return
    rows = [("branch", "status", "step", "since", "from", "set"), *(_run_row(run, now) for run in found)]
    output.table(rows if found else [], paints={1: {"fg": "yellow"}})
    if not found:
        output.note("no runs yet: `ckpt fork` begins one")


def _run_row(run: Run, now: int) -> tuple[str, ...]:
    status = run.status or ("running" if run.holder else "not started")
    if run.status == "failed" and run.exit is not None:
        status = f"failed ({run.exit})"
    step = "" if run.tip is None or run.tip.step is None else str(run.tip.step)
    since = "" if run.since is None else output.age(run.since, now)
    point = "" if run.fork_point is None else run.fork_point.short
    values = " ".join(f"{name}={output.clean(str(value))}" for name, value in run.overrides.items())
    return (run.branch, status, step, since, point, values)


# ---- reset --------------------------------------------------------------------------------------


@click.command()
@revision_argument(required=True)
@click.option(
    "--branch", metavar="NAME", shell_complete=complete_branch, help="The branch to move, else HEAD's."
)
@_set_option
@click.option("--force", is_flag=True, help="Also if a living process has claimed the branch.")
@json_option
def reset(
    revision: str, branch: str | None, overrides: list[tuple[str, str]], force: bool, as_json: bool
) -> None:
    """Move a branch to another commit. No file is touched.

    The old tip stays in the reflog: `ckpt reset BRANCH@{1}` goes back, until gc collects what nothing else
    holds.

    \b
    ckpt reset main~2
    ckpt reset best --branch worker3 --set optimizer.lr=2e-4
    """
    from ckptvcs.state.overrides import checked, value_of

    wanted = checked({key: value_of(text) for key, text in _once(overrides)})
    with session.opened() as repo:
        target = session.resolved(repo, revision)
        name = branch or repo.head()[0]
        if name is None:
            raise ConflictError(
                "HEAD is detached, so there is no branch to move", hint="name one: --branch NAME"
            )
        if name not in repo.branches():
            raise InvalidError(f"there is no branch called {name!r}", hint=f"`ckpt branch {name} {revision}`")
        old = repo.on(name).reset(target, wanted, force=force)
    if as_json:
        output.data({"branch": name, "commit": str(target.id), "before": str(old)})
    else:
        undo = f"ckpt reset --branch {name} {old.short}"
        output.line(f"{name} is at {target.id.short} now; it was at {old.short} (undo: `{undo}`)")
