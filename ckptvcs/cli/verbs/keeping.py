"""retain, pin, unpin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckptvcs.cli import output, session
from ckptvcs.cli.exits import Exit
from ckptvcs.cli.options import branch_argument, json_option, revision_argument

if TYPE_CHECKING:
    from ckptvcs.maintenance.retaining import Report, Verdict

_COUNT = click.IntRange(min=1)


# ---- retain -------------------------------------------------------------------------------------


@click.command()
@branch_argument("branches", "[BRANCH...]", nargs=-1)
@click.option("--keep-last", type=_COUNT, metavar="N", help="Keep the newest N of each branch.")
@click.option("--keep-every", type=_COUNT, metavar="STEPS", help="Keep the first of every so many steps.")
@click.option("--keep-best", type=_COUNT, metavar="K", help="Keep the best K by --metric.")
@click.option("--metric", metavar="NAME", help="The metric for --keep-best.")
@click.option("--mode", type=click.Choice(["min", "max"]), help="Which values are better, if not known.")
@click.option("--keep-within", metavar="D", help="Keep what was made in the span before the tip: 12h, 7d.")
@click.option("--thin", type=_COUNT, metavar="N", help="Keep the newest N, and ever fewer before them.")
@click.option(
    "--drop",
    multiple=True,
    metavar="PATTERN",
    help="Drop these components instead of all content, as in 'optimizer/**'. May be repeated.",
)
@click.option("--dry-run", is_flag=True, help="Only tell, with reason and bytes per commit.")
@json_option
def retain(
    branches: tuple[str, ...],
    keep_last: int | None,
    keep_every: int | None,
    keep_best: int | None,
    metric: str | None,
    mode: str | None,
    keep_within: str | None,
    thin: int | None,
    drop: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> Exit:
    """Drop the content of old commits, and free it now.

    Commits stay, with message, metrics and lineage; only their content goes, for good: neither ref nor undo
    window brings it back. Tips, tags, pins, fork points and the best of each branch keep theirs in any case.
    BRANCH is a name or a pattern, as in 'exp/*'; without it all are meant. Without rules here those of the
    config apply (retention.keep_last and so on).

    \b
    ckpt retain --keep-last 3 --keep-best 2 --metric val_loss --dry-run
    ckpt retain 'exp/*' --thin 10
    ckpt retain --keep-last 5 --drop 'optimizer/**'
    """
    with session.opened() as repo, output.working("looking at what is kept") as say:
        report = repo.retain(
            branches or None,
            keep_last=keep_last,
            keep_every=keep_every,
            keep_best=keep_best,
            metric=metric,
            mode=mode,
            keep_within=keep_within,
            thin=thin,
            drop=drop,
            dry_run=dry_run,
            say=say,
        )
    if as_json:
        output.data(report.as_dict())
    else:
        _print(report)
    for problem in report.problems:
        output.warning(problem)
    return Exit.PARTLY if report.problems else Exit.DONE


def _print(report: Report) -> None:
    if report.dry_run:
        _print_verdicts("keep", report.kept)
    _print_verdicts("drop", report.dropped)
    verb = "Would drop" if report.dry_run else "Dropped"
    what = output.counted(len(report.dropped), "payload")
    if any(verdict.names for verdict in report.dropped):
        what = f"components of {output.counted(len(report.dropped), 'commit')}"
    if not report.collected:
        output.line(f"{verb} {what}. Another process is collecting; the next collection frees the bytes.")
        return
    also = [f"{output.size(report.garbage)} of it garbage from before"] if report.garbage else []
    if report.recoded > 0:
        also.append(f"{output.size(report.recoded)} spent on storing what was a difference to it")
    detail = f" ({', '.join(also)})" if also else ""
    output.line(f"{verb} {what}; {output.size(report.freed)} freed{detail}.")


def _print_verdicts(word: str, verdicts: list[Verdict]) -> None:
    rows = [
        (
            word,
            verdict.commit.short,
            "" if verdict.step is None else f"step {verdict.step}",
            verdict.branch,
            output.size(verdict.freed) if verdict.names is not None else "",
            f"{', '.join(verdict.names)}: {verdict.reason}" if verdict.names else verdict.reason,
        )
        for verdict in verdicts
    ]
    output.table(rows, right=(4,), paints={1: {"fg": "yellow"}, 5: {"dim": True}})


# ---- pins ---------------------------------------------------------------------------------------


@click.command()
@revision_argument()
@click.option("--list", "listing", is_flag=True, help="List the pins instead.")
@json_option
def pin(revision: str, listing: bool, as_json: bool) -> None:
    """Keep a commit and its content, whatever retention says.

    The commit stays also if all refs to it are deleted.

    \b
    ckpt pin main@best:val_loss
    ckpt pin --list
    """
    with session.opened() as repo:
        if not listing:
            id = repo.pin(session.resolved(repo, revision))
            if as_json:
                output.data({"commit": str(id), "pinned": True})
            else:
                output.line(f"Pinned {id.short}.")
            return
        commits = [repo.resolve(id) for id in sorted(repo.pins())]
    if as_json:
        output.data({"pins": [str(commit.id) for commit in commits]})
    else:
        rows = [
            (c.id.short, "" if c.step is None else f"step {c.step}", output.fitted(c.title, 60))
            for c in commits
        ]
        output.table(rows, paints={0: {"fg": "yellow"}})


@click.command()
@revision_argument(required=True)
@json_option
def unpin(revision: str, as_json: bool) -> None:
    """Take a pin away.

    \b
    ckpt unpin main@best:val_loss
    """
    with session.opened() as repo:
        id = repo.unpin(session.resolved(repo, revision))
    if as_json:
        output.data({"commit": str(id), "pinned": False})
    else:
        output.line(f"Unpinned {id.short}.")
