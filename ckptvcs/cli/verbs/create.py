"""init, commit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptvcs.cli import output, session, shapes
from ckptvcs.cli.options import complete_branch, complete_path, json_option, number, number_of, pairs
from ckptvcs.errors import InvalidError, LineageError

if TYPE_CHECKING:
    from ckptvcs.repo import Repo


@click.command()
@click.argument("path", metavar="[PATH]", required=False, shell_complete=complete_path)
@click.option(
    "--compression",
    metavar="LEVEL",
    help="fast, balanced (the default) or small: what commits here use from now on.",
)
@click.option(
    "--shared",
    metavar="WHO",
    help="group (its group may write), all (and everybody read), or a file mode such as 0640. Every file "
    "gets that mode, whatever the umask.",
)
@click.option(
    "--network",
    is_flag=True,
    help="Allow a network file system: one host alone will use the index, others commit with --index-free.",
)
@json_option
def init(path: str | None, compression: str | None, shared: str | None, network: bool, as_json: bool) -> None:
    """Make a repository in a folder, by default the current one.

    Makes PATH/.ckpt, with HEAD on the branch main, which has no commits yet. Missing folders are made.

    \b
    ckpt init /data/runs
    ckpt init --compression small
    ckpt init --shared=group /data/team
    """
    from ckptvcs.repo import Repo
    from ckptvcs.store.format import FOLDER

    place = path or session.wanted_path() or "."
    with Repo.init(place, compression=compression, network=network, shared=shared) as repo:
        branch = repo.branch_name
        level = repo.config.get("compression")
        if as_json:
            output.data({"repository": str(repo.path), "branch": branch, "compression": level})
        else:
            output.line(f"Made a repository in {output.clean(str(repo.path / FOLDER))}, on branch {branch}.")


@click.command()
@click.option("-m", "--message", metavar="MSG", required=True, help="What this is. Any text.")
@click.option("--step", type=int, metavar="N", help="The training step.")
@click.option("--epoch", callback=number, metavar="E", help="The epoch; may be a fraction.")
@click.option(
    "--metric", "metrics", callback=pairs, multiple=True, metavar="NAME=X", help="A metric. May be repeated."
)
@click.option(
    "--set",
    "settings",
    callback=pairs,
    multiple=True,
    metavar="KEY=VALUE",
    help="Adds to the commit's config: dotted keys nest; the value is read as JSON, else as text. May be "
    "repeated.",
)
@click.option(
    "--branch",
    metavar="NAME",
    shell_complete=complete_branch,
    help="The branch to commit to, made if missing. Else CKPT_BRANCH, else the one HEAD is on.",
)
@click.option(
    "--as", "name", metavar="NAME", help="The path in the commit, for one PATH anywhere on this machine."
)
@click.option(
    "--tag", "tags", multiple=True, metavar="NAME", help="Make a tag at the commit. May be repeated."
)
@click.option(
    "--status",
    type=click.Choice(["finished", "failed"]),
    help="What became of the run on the branch (`ckpt runs`).",
)
@click.option(
    "--index-free",
    is_flag=True,
    help="Leave the commit in .ckpt/incoming: for containers, network file systems and other hosts. `ckpt "
    "ingest` takes it up. CKPT_INDEX_FREE=1 does the same.",
)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, shell_complete=complete_path)
@json_option
def commit(
    message: str,
    step: int | None,
    epoch: float | None,
    metrics: tuple[tuple[str, str], ...],
    settings: tuple[tuple[str, str], ...],
    branch: str | None,
    name: str | None,
    tags: tuple[str, ...],
    status: str | None,
    index_free: bool,
    paths: tuple[str, ...],
    as_json: bool,
) -> None:
    """Save files and folders, byte for byte.

    The commit holds exactly the paths given. In it they are named relative to the folder that holds .ckpt;
    a path outside of that folder needs --as. Symbolic links are stored as links. Empty folders are not kept.

    The commit continues from the tip of the branch.

    \b
    ckpt commit -m "after warm-up" --step 1000 --metric val_loss=0.41 out/model.safetensors
    ckpt commit -m imported --set optimizer.lr=3e-4 --as base.pt /scratch/base.pt
    """
    with session.for_commit(branch, index_free=index_free or None) as repo:
        if repo.branch_name is None:
            raise LineageError(
                "HEAD is detached, so there is no branch to commit to",
                hint="name one with --branch NAME, or `ckpt switch BRANCH` first",
            )
        with output.working("committing"):
            made = repo.commit_files(
                _tree_paths(repo, paths, name),
                message,
                step=step,
                epoch=epoch,
                metrics=_metrics(metrics),
                config=_config(settings),
                continues=True,
                tags=tags,
                status=status,
            )
        report = made.report
        assert report is not None  # it was just made
        if as_json:
            shape = shapes.commit_shape(repo, made, shapes.decorations(repo))
            output.data({**shape, "branch": repo.branch_name, "report": shapes.report_shape(report)})
            return
        root = "" if made.parents else " (first commit)"
        head = output.paint(f"[{repo.branch_name} {made.id.short}]", fg="yellow")
        output.line(f"{head}{root} {output.clean(made.title)}".rstrip())
        output.line(f"  {report}")


def _tree_paths(repo: Repo, paths: Sequence[str], name: str | None) -> dict[str, Path]:
    """Where each path goes in the tree."""
    if name is not None:
        if len(paths) > 1:
            raise click.UsageError("--as names one PATH, and there are several")
        return {name: _absolute(paths[0])}
    found: dict[str, Path] = {}
    for text in paths:
        path = _absolute(text)
        if not path.is_relative_to(repo.path):
            raise InvalidError(
                f"{text} lies outside of {repo.path}, the repository's folder",
                hint="say what it is called in the commit: --as NAME (one path at a time)",
            )
        inside = path.relative_to(repo.path)
        if inside.parts[:1] == (".ckpt",):
            raise InvalidError(f"{text} belongs to the repository itself", hint="name files of yours")
        found[inside.as_posix()] = path
    return found


def _absolute(text: str) -> Path:
    """A path as it is, with the folders it lies in resolved. A link at its end is not followed."""
    path = Path(text)
    if path.name in ("", ".."):
        return path.resolve()
    return path.parent.resolve() / path.name


def _metrics(pairs: Sequence[tuple[str, str]]) -> dict[str, int | float]:
    metrics = {}
    for name, text in pairs:
        value = number_of(text)
        if value is None:
            raise InvalidError(
                f"the metric {name} is {text!r}, not a number", hint="as in --metric val_loss=0.31"
            )
        metrics[name] = value
    return metrics


def _config(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for key, text in pairs:
        *folders, last = key.split(".")
        table = config
        for folder in folders:
            table = table.setdefault(folder, {})
            if not isinstance(table, dict):
                break
        if not isinstance(table, dict) or isinstance(table.get(last), dict) or "" in (*folders, last):
            raise InvalidError(
                f"--set {key}={text} does not fit",
                hint="a key is a value, or it holds others, as in lr.max",
            )
        table[last] = _value(text)
    return config


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
