"""du."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from ckptvcs.cli import output, session
from ckptvcs.cli.options import json_option, revision_argument

if TYPE_CHECKING:
    from ckptvcs.maintenance.usage import Share, Usage

_BAR = 16
_NAME = 24
_MOST = 20


@click.command()
@revision_argument()
@click.option("--branches", is_flag=True, help="By branch.")
@click.option("--components", is_flag=True, help="By component, optimizers by what they keep.")
@click.option("--commits", is_flag=True, help="By commit, from REV along first parents.")
@click.option("--tensors", is_flag=True, help="By tensor, of the commit REV.")
@click.option(
    "-n",
    "count",
    type=click.IntRange(min=1),
    default=_MOST,
    metavar="N",
    help=f"At most N lines of a view; {_MOST} without it.",
)
@json_option
def du(
    revision: str, branches: bool, components: bool, commits: bool, tensors: bool, count: int, as_json: bool
) -> None:
    """Tell what takes the disk space.

    Exclusive bytes (#) are held by nothing else: for a branch, what deleting it and `ckpt gc --grace 0` free.
    Shared ones (=) stay as long as another holds them. Stored is the sum of both; logical is what was given.
    Pending is what nothing needs any more, until `ckpt gc`.

    \b
    ckpt du
    ckpt du --tensors main
    ckpt du --json | jq '.branches[] | {name, exclusive}'
    """
    wanted = {"branch": branches, "component": components, "commit": commits, "tensor": tensors}
    views = [view for view, on in wanted.items() if on] or ["branch", "component"]
    with session.opened() as repo, output.working("counting bytes") as say:
        rev = session.resolved(repo, revision) if commits or tensors else "HEAD"
        found = repo.du(views, rev, count, say=say)
    if as_json:
        output.data(found.as_dict())
    else:
        _print(found, count)


def _print(found: Usage, count: int) -> None:
    views: tuple[tuple[str, Sequence[Share]], ...] = (
        ("branch", found.branches),
        ("component", _with_parts(found.components)),
        ("commit", found.commits),
        ("tensor", found.tensors),
    )
    for title, shares in views:
        if shares:
            _print_view(title, shares, count)
            output.line()
    total = [f"{output.size(found.stored)} in packs"]
    if found.structure:
        total.append(f"{output.size(found.structure)} of it commits and trees")
    if found.others:
        total.append(f"{output.size(found.others)} held by tags, lost commits, pins or HEAD alone")
    for line in output.wrapped([f"{word}," for word in total[:-1]] + [f"{total[-1]}."], 78, " "):
        output.line(line)
    if found.pending:
        window = f", {output.size(found.held)} of it in the undo window" if found.held else ""
        how = "`ckpt gc --grace 0`" if found.held == found.pending else "`ckpt gc`"
        output.line(f"{output.size(found.pending)} pending{window}: {how} frees it.")


def _with_parts(shares: Sequence[Share]) -> list[Share]:
    from dataclasses import replace

    found = []
    for share in shares:
        found.append(share)
        found += [replace(part, name=f"  {part.name}") for part in share.parts]
    return found


def _print_view(title: str, shares: Sequence[Share], count: int) -> None:
    largest = max(share.stored for share in shares) or 1
    rows = [
        (
            _name(title, share),
            *map(output.size, (share.logical, share.stored, share.shared, share.exclusive)),
            _bar(share, largest),
        )
        for share in shares[:count]
    ]
    header = (title, "logical", "stored", "shared", "exclusive", "#own =shared")
    output.table(rows, header=header, right=(1, 2, 3, 4), paints={5: {"fg": "cyan"}})
    if len(shares) > count:
        output.line(f"and {len(shares) - count:,} more (-n)")


def _name(title: str, share: Share) -> str:
    if title == "commit":
        name = share.name[:8] + ("" if share.step is None else f" step {share.step}")
        if share.dropped is not None:
            name += " (dropped)" if share.dropped == () else " (partly)"
    elif title == "tensor" and share.parameter:
        name = f"{share.name.rpartition('/')[2]} of {share.parameter}"
    else:
        name = share.name or "(other)"
    # The end tells more than the beginning.
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"


def _bar(share: Share, largest: int) -> str:
    """Exclusive bytes as #, shared ones as =."""
    whole = max(1, round(_BAR * share.stored / largest)) if share.stored else 0
    own = round(whole * share.exclusive / share.stored) if share.stored else 0
    return "#" * own + "=" * (whole - own)
