"""Options and arguments that several verbs share, their types, and what the shell offers for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from ckptvcs.repo import Repo

_Function = TypeVar("_Function", bound=Callable[..., Any])

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object, also for an error."
)


def number(ctx: click.Context, param: click.Parameter, text: str | None) -> int | float | None:
    """A whole number or a decimal one."""
    found = None if text is None else number_of(text)
    if text is not None and found is None:
        raise click.BadParameter(f"{text!r} is not a number", ctx, param)
    return found


def number_of(text: str) -> int | float | None:
    """The number a text says; None if it says none."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def pairs(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> list[tuple[str, str]]:
    """NAME=VALUE, each as the two sides of its first equals sign."""
    found = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{text!r} is not of the form {param.metavar}", ctx, param)
        found.append((name, value))
    return found


# ---- what the shell offers ----------------------------------------------------------------------


def _names(ctx: click.Context, incomplete: str, names_of: Callable[[Repo], list[str]]) -> list[str]:
    from ckptvcs.errors import CkptError
    from ckptvcs.repo import Repo

    try:
        with Repo.open(ctx.find_root().params.get("repo"), say=lambda _: None) as repo:
            return [name for name in names_of(repo) if name.startswith(incomplete)]
    except (CkptError, OSError):
        return []


def complete_revision(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Revisions that begin so, also behind `A..` and `^`."""
    dots = incomplete.rfind("..")
    before = incomplete[: dots + 2] if dots >= 0 else "^" * incomplete.startswith("^")

    def names_of(repo: Repo) -> list[str]:
        return [before + name for name in ("HEAD", *repo.branches(), *repo.tags(), *repo.lost())]

    return _names(ctx, incomplete, names_of)


def complete_revision_and_name(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Revisions that begin so; behind REV: the names in its commit, a component at a time."""
    from ckptvcs.history.revision import split_name
    from ckptvcs.state import paths

    revision, name = split_name(incomplete)
    if name is None:
        return complete_revision(ctx, param, incomplete)
    depth = len(paths.split(f"{name}x"))

    def names_of(repo: Repo) -> list[str]:
        found = dict.fromkeys(
            "/".join(parts[:depth]) + ("/" if len(parts) > depth else "")
            for entry in repo.entries(revision or "HEAD")
            for parts in [paths.split(entry.path)]
        )
        return [f"{revision}:{each}" for each in found]

    return _names(ctx, incomplete, names_of)


def complete_path(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files and folders: the shell knows them."""
    return [CompletionItem(incomplete, type="file")]


def complete_revision_or_path(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Revisions that begin so; files and folders where there are none."""
    revisions = complete_revision(ctx, param, incomplete)
    return [*complete_path(ctx, param, incomplete), *map(CompletionItem, revisions)]


def complete_branch(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Branches that begin so."""
    return _names(ctx, incomplete, lambda repo: list(repo.branches()))


def _tags(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return _names(ctx, incomplete, lambda repo: list(repo.tags()))


def _settings(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return _names(ctx, incomplete, lambda repo: list(repo.config.items()))


def revision_argument(*, required: bool = False) -> Callable[[_Function], _Function]:
    """REV; HEAD if it may be left out and is."""
    if required:
        return click.argument("revision", metavar="REV", shell_complete=complete_revision)
    return click.argument("revision", metavar="[REV]", default="HEAD", shell_complete=complete_revision)


def branch_argument(name: str, metavar: str, **more: Any) -> Callable[[_Function], _Function]:
    """The name of a branch."""
    return click.argument(name, metavar=metavar, shell_complete=complete_branch, **more)


def branches_option(help: str) -> Callable[[_Function], _Function]:
    """Globs of branches."""
    return click.option(
        "--branches", "branches", metavar="GLOB", multiple=True, help=help, shell_complete=complete_branch
    )


def complete_metric(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of metrics that begin so: those of the newest commits of each branch."""
    return _names(ctx, incomplete, lambda repo: sorted(repo.metric_names()))


def tag_argument(name: str, metavar: str, **more: Any) -> Callable[[_Function], _Function]:
    """The name of a tag."""
    return click.argument(name, metavar=metavar, shell_complete=_tags, **more)


def setting_argument(name: str, metavar: str, **more: Any) -> Callable[[_Function], _Function]:
    """The key of a setting."""
    return click.argument(name, metavar=metavar, shell_complete=_settings, **more)
