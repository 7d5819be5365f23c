"""branch, switch, tag, undelete."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import click

from ckptvcs.cli import output, session
from ckptvcs.cli.exits import Exit
from ckptvcs.cli.options import branch_argument, json_option, tag_argument
from ckptvcs.cli.shapes import deleted_shape
from ckptvcs.errors import CkptError, ExistsError, NotFoundError

if TYPE_CHECKING:
    from ckptvcs.ids import ObjectId
    from ckptvcs.repo import Repo

_delete_option = click.option("-d", "--delete", is_flag=True, help="Delete the ones named.")
_force_option = click.option(
    "--force", is_flag=True, help="With -d: also if commits would be left that nothing refers to."
)


# ---- branch and tag -----------------------------------------------------------------------------


@click.command()
@branch_argument("names", "[NAME [START]]", nargs=-1)
@_delete_option
@_force_option
@json_option
def branch(names: tuple[str, ...], delete: bool, force: bool, as_json: bool) -> Exit:
    """List, make and delete branches.

    Without a name the branches are listed. A new one begins at START, else at HEAD. The branch HEAD is on
    is never deleted. What a deleted branch held stays recoverable until gc collects it.

    \b
    ckpt branch
    ckpt branch lr3e-4 main@step:4000
    ckpt branch -d lr3e-4 lr1e-3
    """
    with session.opened() as repo:
        if delete:
            return _delete(names, lambda name: repo.delete_branch(name, force), "branch", as_json)
        if names:
            return _make(repo, names, repo.branch, "branch", as_json)
        current, head = repo.head()
        if as_json:
            where = {"branch": current, "commit": None if head is None else str(head)}
            rows = [{**row, "current": row["name"] == current} for row in _rows(repo, repo.branches())]
            output.data({"head": where, "branches": rows})
            return Exit.DONE
        _print_branches(repo, current, head)
    return Exit.DONE


def _print_branches(repo: Repo, current: str | None, head: ObjectId | None) -> None:
    rows = [_text_row("* " if row["name"] == current else "  ", row) for row in _rows(repo, repo.branches())]
    if head is None:
        rows.insert(0, (f"* {current}", "", "no commits yet", ""))
    elif current is None:
        rows.insert(0, (f"* (detached at {head.short})", "", "", ""))
    output.table(rows, paints={1: {"fg": "yellow"}})


@click.command()
@tag_argument("names", "[NAME [REV]]", nargs=-1)
@_delete_option
@_force_option
@json_option
def tag(names: tuple[str, ...], delete: bool, force: bool, as_json: bool) -> Exit:
    """List, make and delete tags.

    Without a name the tags are listed. A new one stays at REV, else at HEAD, and keeps that commit from being
    collected.

    \b
    ckpt tag v1 main@best:val_loss
    ckpt tag -d v1
    """
    with session.opened() as repo:
        if delete:
            return _delete(names, lambda name: repo.delete_tag(name, force), "tag", as_json)
        if names:
            return _make(repo, names, repo.tag, "tag", as_json)
        rows = _rows(repo, repo.tags())
        if as_json:
            output.data({"tags": rows})
        else:
            output.table([_text_row("", row) for row in rows], paints={1: {"fg": "yellow"}})
    return Exit.DONE


@click.command()
@click.argument("name", required=False)
@json_option
def undelete(name: str | None, as_json: bool) -> Exit:
    """Bring back a deleted branch, tag or lost commit.

    Without NAME those that can be brought back are listed. gc keeps what was deleted for the setting
    gc.grace (24h); what it has collected is gone.

    \b
    ckpt undelete
    ckpt undelete lr3e-4
    """
    with session.opened() as repo:
        if name is not None:
            commit = repo.undelete(name)
            if as_json:
                output.data({"name": name, "commit": str(commit)})
            else:
                output.line(f"Brought {name} back at {commit.short}.")
            return Exit.DONE
        found = [each for each in repo.deleted() if each.stored]
        if as_json:
            output.data({"deleted": [deleted_shape(each) for each in found]})
        elif not found:
            output.line("Nothing that was deleted can be brought back.")
        else:
            rows = [
                (each.name, each.commit.short, each.what, f"deleted {output.when(each.time)}")
                for each in found
            ]
            output.table(rows, paints={1: {"fg": "yellow"}})
    return Exit.DONE


def _rows(repo: Repo, refs: Mapping[str, ObjectId]) -> list[dict[str, Any]]:
    rows = []
    for name, id in refs.items():
        commit = repo.resolve(id)
        rows.append({"name": name, "commit": str(id), "step": commit.step, "title": commit.title})
    return rows


def _text_row(mark: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    step = "" if row["step"] is None else f"step {row['step']}"
    return (f"{mark}{row['name']}", row["commit"][:8], step, row["title"])


def _make(repo: Repo, names: Sequence[str], make: Callable[..., ObjectId], what: str, as_json: bool) -> Exit:
    if len(names) > 2:
        raise click.UsageError(f"a new {what} takes a name and where it starts, no more")
    commit = session.resolved(repo, names[1] if len(names) > 1 else "HEAD")
    make(names[0], commit)
    if as_json:
        output.data({"name": names[0], "commit": str(commit.id)})
    else:
        output.line(f"Made the {what} {names[0]} at {commit.id.short} {output.clean(commit.title)}".rstrip())
    return Exit.DONE


def _delete(names: Sequence[str], delete: Callable[[str], ObjectId], what: str, as_json: bool) -> Exit:
    """Delete each; those that cannot be are told one by one, and the rest is deleted all the same."""
    if not names:
        raise click.UsageError(f"-d needs the name of a {what}")
    deleted: dict[str, ObjectId] = {}
    failed: dict[str, CkptError] = {}
    for name in dict.fromkeys(names):
        try:
            deleted[name] = delete(name)
        except CkptError as error:
            failed[name] = error
    if failed and not deleted:
        # What cannot be raised is still said: a list of names has one exit code.
        *others, last = failed.values()
        if not as_json:
            for left in others:
                output.error(left.message, left.hint)
        raise last
    if as_json:
        output.data(
            {
                "deleted": {name: str(id) for name, id in deleted.items()},
                "failed": {name: {"code": e.code, "message": e.message} for name, e in failed.items()},
            }
        )
    else:
        for name, id in deleted.items():
            undo = f"ckpt {what} {name} {id.short}"
            output.line(f"Deleted the {what} {name}, which was at {id.short} (undo: `{undo}`).")
        for left in failed.values():
            output.error(left.message, left.hint)
    return Exit.PARTLY if failed else Exit.DONE


# ---- switch -------------------------------------------------------------------------------------


@click.command()
@branch_argument("name", "BRANCH")
@click.option("-c", "--create", is_flag=True, help="Make the branch first, where HEAD is.")
@json_option
def switch(name: str, create: bool, as_json: bool) -> None:
    """Move HEAD to a branch. No file is touched (see checkout), and no running job notices.

    \b
    ckpt switch main
    ckpt switch -c lr3e-4
    """
    with session.opened() as repo:
        current, head = repo.head()
        if create:
            if name in repo.branches():
                raise ExistsError(f"{name} exists already", hint=f"`ckpt switch {name}` moves HEAD to it")
            if head is not None:
                repo.branch(name, head)
        elif name not in repo.branches() and (name != current or head is not None):
            raise _no_branch(repo, name)
        repo.set_head(name)
        branch, tip = repo.head()
    if as_json:
        output.data({"branch": branch, "commit": None if tip is None else str(tip)})
    else:
        output.line(
            f"HEAD is on {output.clean(branch or name)}"
            + (", no commits yet" if tip is None else f" at {tip.short}")
        )


def _no_branch(repo: Repo, name: str) -> NotFoundError:
    near = get_close_matches(name, repo.branches(), n=3)
    try:
        repo.resolve(name)
        hint = f"`ckpt checkout {name}` detaches HEAD at that commit"
    except CkptError:
        hint = f"did you mean {' or '.join(near)}?" if near else f"`ckpt switch -c {name}` makes it"
    return NotFoundError(f"there is no branch called {name!r}", hint=hint)
