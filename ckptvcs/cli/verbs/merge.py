"""merge, cherry-pick."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckptvcs.cli import output, session, shapes
from ckptvcs.cli.options import complete_branch, complete_revision, json_option, number_of

if TYPE_CHECKING:
    from ckptvcs.combining import Merged
    from ckptvcs.repo import Repo

_SHOWN = 20
"""Settled conflicts that are listed."""

_Function = TypeVar("_Function", bound=Callable[..., Any])

_branch_option = click.option(
    "--branch",
    metavar="NAME",
    shell_complete=complete_branch,
    help="The branch to commit to; a new one begins at the first commit. Else the one HEAD is on.",
)
_message_option = click.option("-m", "--message", default="", metavar="TEXT", help="Else what was done.")
_tag_option = click.option(
    "--tag", "tags", multiple=True, metavar="NAME", help="Make a tag at the commit. May be repeated."
)


def _patterns(name: str, text: str) -> Callable[[_Function], _Function]:
    return click.option(f"--{name}", name, multiple=True, metavar="PATTERN", help=text)


def _weights(ctx: click.Context, param: click.Parameter, text: str | None) -> list[float] | None:
    if text is None:
        return None
    numbers = [number_of(part) for part in text.split(",")]
    if None in numbers:
        raise click.BadParameter(f"{text!r} is no list of numbers", ctx, param)
    return [float(number) for number in numbers if number is not None]


@click.command()
@click.argument("revisions", metavar="REV...", nargs=-1, required=True, shell_complete=complete_revision)
@click.option(
    "--strategy",
    type=click.Choice(["mean", "weighted", "slerp", "task-arithmetic"]),
    default="mean",
    help="The formula; mean if nothing is said.",
)
@click.option(
    "--weights",
    callback=_weights,
    metavar="W,W...",
    help="A number per commit; for slerp also one alone, the part of the second.",
)
@click.option(
    "--base",
    metavar="REV",
    shell_complete=complete_revision,
    help="For task-arithmetic, what all were tuned from. Else their nearest common ancestor.",
)
@_patterns("only", "What is averaged; the rest is that of the first commit. May be repeated.")
@_patterns("ours", "What is taken from the first commit. May be repeated.")
@_patterns("theirs", "What is taken from the second commit. May be repeated.")
@click.option(
    "--prefer",
    type=click.Choice(["ours", "theirs"]),
    help="Where conflicts that no pattern settles are taken from.",
)
@_branch_option
@_message_option
@_tag_option
@json_option
def merge(
    revisions: tuple[str, ...],
    strategy: str,
    weights: list[float] | None,
    base: str | None,
    only: tuple[str, ...],
    ours: tuple[str, ...],
    theirs: tuple[str, ...],
    prefer: str | None,
    branch: str | None,
    message: str,
    tags: tuple[str, ...],
    as_json: bool,
) -> None:
    """Average states into a commit that has them as parents.

    The first commit must be the tip of the branch, unless --branch names a new one. One REV alone is merged
    into the tip. No state is ever held in memory.

    \b
    mean             the sum of all over their number
    weighted         each times its weight, over the sum of the weights
    slerp            of two, along the arc between them
    task-arithmetic  the base, and each one's difference to it times its weight (1)

    Computed in float64 and rounded once. What is equal in all is kept as it is. Whatever has no average
    (missing, of another shape or dtype, integers, values that differ) is a conflict: all of them are listed,
    and nothing is written until each is settled with --ours, --theirs or --prefer, or left out with --only.

    \b
    ckpt merge main lr1e-4 --only model --branch soup
    ckpt merge HEAD math code --strategy task-arithmetic --base pretrained --weights 0,0.4,0.6 --only model
    """
    with session.opened() as repo:
        commits = [session.resolved(repo, text) for text in revisions]
        target = repo if branch is None else repo.on(branch)
        with output.working("merging") as count:
            made = target.merge(
                *commits,
                strategy=strategy,
                weights=weights,
                base=None if base is None else session.resolved(repo, base),
                only=only or None,
                ours=ours,
                theirs=theirs,
                prefer=prefer,
                message=message,
                tags=tags,
                say=count,
            )
        _show(target, made, as_json)


@click.command()
@click.argument("revision", metavar="REV", shell_complete=complete_revision)
@_patterns("only", "What is taken from REV. May be repeated.")
@click.option(
    "--onto",
    metavar="REV",
    shell_complete=complete_revision,
    help="Where the rest comes from: the tip of the branch, or where a new one begins.",
)
@_branch_option
@_message_option
@_tag_option
@json_option
def cherry_pick(
    revision: str,
    only: tuple[str, ...],
    onto: str | None,
    branch: str | None,
    message: str,
    tags: tuple[str, ...],
    as_json: bool,
) -> None:
    """Put parts of one commit's state on top of another's.

    Parts go by their ids: no tensor is read or written. Both commits become parents.

    \b
    ckpt cherry-pick run7 --only optimizer
    ckpt cherry-pick run7@best:val_loss --only model --onto main --branch mixed
    """
    if not only:
        raise click.UsageError("--only PATTERN says what is taken")
    with session.opened() as repo:
        target = repo if branch is None else repo.on(branch)
        start: Any = "HEAD" if onto is None else session.resolved(repo, onto)
        if onto is None and branch is not None and branch not in repo.branches():
            start = session.resolved(repo, "HEAD")
        made = target.cherry_pick(
            session.resolved(repo, revision), list(only), onto=start, message=message, tags=tags
        )
        _show(target, made, as_json)


def _show(repo: Repo, made: Merged, as_json: bool) -> None:
    if as_json:
        output.data(shapes.merged_shape(repo, made))
        return
    commit = made.commit
    head = output.paint(f"[{repo.branch_name} {commit.id.short}]", fg="yellow")
    output.line(f"{head} {output.clean(commit.title)}".rstrip())
    words = [
        f"{count:,} {word}"
        for count, word in ((len(made.averaged), "averaged"), (made.kept, "kept"), (made.taken, "taken"))
        if count
    ]
    output.line(f"  tensors: {', '.join(words) or 'none'}")
    output.line(f"  {commit.report}")
    for path, why in made.settled[:_SHOWN]:
        output.note(f"settled: {path}: {why}")
    if len(made.settled) > _SHOWN:
        output.note(f"and {output.counted(len(made.settled) - _SHOWN, 'conflict')} more were settled")
    for path, count in made.overflowed.items():
        output.warning(f"{path}: {output.counted(count, 'average')} beyond the range of its dtype")
