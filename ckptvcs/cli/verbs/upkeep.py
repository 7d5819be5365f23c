"""gc, ingest, repack, fsck, config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptvcs.cli import output, session
from ckptvcs.cli.exits import Exit
from ckptvcs.cli.options import json_option, setting_argument
from ckptvcs.errors import InvalidError, NotFoundError

if TYPE_CHECKING:
    from ckptvcs.maintenance import fsck as checking
    from ckptvcs.maintenance import gc as collecting
    from ckptvcs.maintenance import repack as repacking

_MANY = 20
"""Problems that are printed."""

# ---- gc -----------------------------------------------------------------------------------------


@click.command()
@click.option("--dry-run", is_flag=True, help="Only tell what would be freed.")
@click.option(
    "--grace",
    metavar="D",
    help="How long deleted things stay recoverable: 0, 30m, 24h, 7d. Else the setting gc.grace (24h).",
)
@json_option
def gc(dry_run: bool, grace: str | None, as_json: bool) -> Exit:
    """Free what no branch, tag or lost commit reaches any more.

    Safe while others commit and read, with --grace 0 too. What a dry run announces is what a run frees.

    \b
    ckpt gc --dry-run
    ckpt gc --grace 0
    """
    with session.opened() as repo, output.working("looking for garbage"):
        report = repo.gc(grace, dry_run)
    if as_json:
        output.data(report.as_dict())
    else:
        _print_collection(report)
    for problem in report.problems:
        output.warning(problem)
    return Exit.PARTLY if report.problems else Exit.DONE


def _print_collection(report: collecting.Report) -> None:
    verb = "Would free" if report.dry_run else "Freed"
    what = [
        output.counted(report.records, "record"),
        f"{report.commits:,} of them commits" if report.commits else "no commit among them",
        output.counted(report.packs, "pack"),
    ]
    detail = f" ({', '.join(what)})" if report.records or report.packs else ""
    output.line(f"{verb} {output.size(report.freed)}{detail}.")
    if report.leftovers:
        did = "would be removed" if report.dry_run else "removed"
        output.line(f"{output.size(report.leftovers)} that interrupted writers left {did}.")
    for name in report.expired:
        did = "Would drop" if report.dry_run else "Dropped"
        output.line(f"{did} {output.clean(name)}, which is older than 30 days.")
    if report.held:
        output.line(
            f"{output.size(report.held)} stays recoverable for {output.duration(report.grace)}; "
            "`ckpt gc --grace 0` frees it now."
        )


# ---- ingest -------------------------------------------------------------------------------------


@click.command()
@click.option("--retry", is_flag=True, help="Take up once more what was put into quarantine.")
@json_option
def ingest(retry: bool, as_json: bool) -> Exit:
    """Take up commits that were made without the index.

    They wait in .ckpt/incoming. All their bytes are checked first. Opening a repository does the same, unless
    the setting ingest is manual. What is damaged, or builds on what is no longer stored, goes to
    .ckpt/quarantine, with the reason.

    \b
    ckpt ingest
    ckpt ingest --retry
    """
    with session.opened(ingest=False) as repo, output.working("ingesting"):
        report = repo.ingest(retry=retry)
    if as_json:
        output.data(report.as_dict())
    else:
        for each in report.ingested:
            where = output.clean(each.ref.removeprefix("refs/").removeprefix("heads/"))
            lost = ", because its branch had moved" if each.lost else ""
            output.line(f"{each.commit.short} is on {where}{lost}.")
        output.line(
            f"Ingested {output.counted(len(report.ingested), 'commit')}, {output.size(report.bytes)}."
        )
        for name in report.abandoned:
            output.line(f"Removed {output.clean(name)}, which an interrupted writer left 30 days ago.")
    for aside in report.quarantined:
        output.warning(f"the bundle {aside.bundle} was put into quarantine: {aside.why}")
    return Exit.PARTLY if report.quarantined else Exit.DONE


# ---- repack -------------------------------------------------------------------------------------


@click.command()
@click.option("--dry-run", is_flag=True, help="Only tell. Everything is really encoded, and thrown away.")
@click.option(
    "--smallest", is_flag=True, help="Let commits that are no tips take longer to read, if that saves bytes."
)
@click.option(
    "--older-than",
    metavar="D",
    help="Only copy what lives in packs whose files are older than this (30d) into new ones, so that a purge "
    "of old files does not take them.",
)
@json_option
def repack(dry_run: bool, smallest: bool, older_than: str | None, as_json: bool) -> Exit:
    """Rewrite packs so that the newest commits read fastest.

    Chunks are encoded as at compression level small, and packs merged. What would make the repository larger
    or slower to read is left as it is. Safe while others commit and read; may be interrupted at any time.

    \b
    ckpt repack
    ckpt repack --smallest
    ckpt repack --older-than 30d
    """
    if smallest and older_than is not None:
        raise click.UsageError("--smallest does nothing with --older-than, which copies")
    with session.opened() as repo, output.working("repacking") as count:
        report = repo.repack(older_than=older_than, dry_run=dry_run, smallest=smallest, say=count)
    if as_json:
        output.data(report.as_dict())
    elif older_than is None:
        _print_repack(report)
    else:
        did = "Would copy" if dry_run else "Copied"
        output.line(
            f"{did} {output.size(report.renewed)} out of {output.counted(report.packs, 'old pack')} "
            f"into {output.counted(report.into, 'new one')}."
        )
    for problem in report.problems:
        output.warning(problem)
    return Exit.PARTLY if report.problems else Exit.DONE


def _print_repack(report: repacking.Report) -> None:
    would = report.dry_run
    output.line(
        f"{'Would encode' if would else 'Encoded'} {report.chunks:,} of "
        f"{output.counted(report.looked, 'chunk')} anew, which saves {output.size(report.saved)}; the others "
        "are best as they are."
    )
    if report.newest_saved:
        output.line(
            f"To read all tips takes {output.size(report.newest_saved)} less of reading and decoding."
        )
    if report.packs:
        output.line(
            f"{'Would put' if would else 'Put'} {output.counted(report.packs, 'pack')} into {report.into:,}."
        )
    if not would:
        change = "smaller" if report.freed >= 0 else "larger"
        output.line(f"The repository is {output.size(abs(report.freed))} {change} on the disk.")


# ---- fsck ---------------------------------------------------------------------------------------


@click.command()
@click.option("--quick", is_flag=True, help="Only the index, and the sizes and footers of packs.")
@click.option("--full", is_flag=True, help="Read and hash every byte.")
@click.option(
    "--budget",
    metavar="B",
    help="Read and hash so much, 10GiB or 30m, from where the last check with a budget stopped.",
)
@click.option("--repair", is_flag=True, help="Mend what can be mended, then check again.")
@click.option(
    "--rebuild",
    is_flag=True,
    help="First make the index anew from packs and journal. Nobody else may have the repository open.",
)
@json_option
def fsck(quick: bool, full: bool, budget: str | None, repair: bool, rebuild: bool, as_json: bool) -> Exit:
    """Check the repository. Nothing is ever deleted.

    Without options: that every ref reaches all it needs, that each record lies where the index says, and
    that commits, trees and chunk lists hash to their ids. Damage is told from the record up to the tensors,
    commits and branches that need it, and ends in exit code 13.

    Damaged records are marked, so that committing the same content again stores it again. --repair looks for
    other copies of them, copies what is whole out of broken packs, and puts those into .ckpt/quarantine.

    \b
    ckpt fsck --full
    ckpt fsck --budget 30m
    ckpt fsck --full --repair
    ckpt fsck --rebuild
    """
    if full + quick + (budget is not None) > 1:
        raise click.UsageError("--quick, --full and --budget exclude each other")
    if quick and repair:
        raise click.UsageError("--quick finds too little to --repair")
    with output.working("rebuilding and checking" if rebuild else "checking") as count:
        with session.opened(rebuild=rebuild) as repo:
            report = repo.fsck(full=full, quick=quick, repair=repair, budget=budget, say=count)
    if as_json:
        output.data(report.as_dict())
    else:
        _print_check(report)
    return Exit.DONE if report.ok else Exit.CORRUPTION


def _print_check(report: checking.Report) -> None:
    rebuilt = report.rebuilt
    if rebuilt is not None:
        output.line(
            f"Made the index anew: {output.counted(rebuilt.records, 'record')} of "
            f"{output.counted(rebuilt.packs, 'pack')}, "
            f"{output.counted(rebuilt.log_entries, 'journal entry')}."
        )
        for problem in rebuilt.problems:
            output.line(f"  {output.clean(problem)}")
    looked = ", ".join(
        output.counted(count, noun)
        for count, noun in (
            (report.refs, "ref"),
            (report.commits, "commit"),
            (report.records, "record"),
            (report.packs, "pack"),
        )
    )
    how = "every byte hashed" if report.full else "`--full` hashes every byte"
    if report.scrubbed is not None:
        done = report.scrubbed
        how = f"{output.size(done.read)} hashed, {done.packs:,} of {done.of:,} packs in this round"
    output.line(f"Checked {looked}, {output.size(report.bytes)}; {how}.")
    if report.repaired is not None:
        mended = report.repaired
        output.line(
            f"Repaired: {output.counted(mended.copies, 'record')} from copies, "
            f"{output.counted(mended.salvaged, 'record')} out of broken packs; "
            f"no copy of {output.counted(mended.lost, 'record')}."
        )
        for place in mended.quarantined:
            output.line(f"  put aside: {output.clean(place)}")
    for found in report.problems[:_MANY]:
        output.line(f"  {output.paint('problem:', fg='red', bold=True)} {output.clean(found.message)}")
    if len(report.problems) > _MANY:
        output.line(f"  and {len(report.problems) - _MANY:,} more; `--json` lists all of them")
    output.line("All is well." if report.ok else f"{output.counted(len(report.problems), 'problem')} found.")


# ---- config -------------------------------------------------------------------------------------


@click.command()
@setting_argument("key", "[KEY", required=False)
@click.argument("value", metavar="[VALUE]]", required=False)
@click.option("--unset", is_flag=True, help="Forget the setting, so that its default holds again.")
@json_option
def config(key: str | None, value: str | None, unset: bool, as_json: bool) -> None:
    """List the settings in force, show one, or set one.

    There are author, compression (fast, balanced, small), environment (true, false), gc.grace (0, 30m, 24h,
    7d), index.network (true, false), ingest (auto, manual), repack.older-than (30d) and metric.NAME.mode
    (min, max).

    \b
    ckpt config metric.bleu.mode max
    ckpt config gc.grace 7d
    """
    if unset and (key is None or value is not None):
        raise click.UsageError("--unset takes one KEY and no VALUE")
    with session.opened() as repo:
        if key is None:
            settings = {name: each for name, each in repo.config.items().items() if each is not None}
            if as_json:
                output.data({"settings": settings})
            else:
                output.fields((name, _shown(each)) for name, each in sorted(settings.items()))
            return
        if value is not None or unset:
            repo.configure(key, None if unset else value)
        _check_known(key)
        found = repo.config.get(key)
    if found is None and value is None and not unset:
        raise NotFoundError(f"the setting {key} is not set", hint=f"`ckpt config {key} VALUE` sets it")
    if as_json:
        output.data({"key": key, "value": found})
    elif value is None and not unset:
        output.line(_shown(found))


def _check_known(key: str) -> None:
    from ckptvcs import config as settings

    if not settings.known(key):
        raise InvalidError(
            f"there is no setting called {key!r}", hint=f"there are {', '.join(settings.KNOWN)}"
        )


def _shown(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, "") or output.clean(str(value))
