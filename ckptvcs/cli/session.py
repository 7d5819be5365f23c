"""Opening the repository a command is about, and reading revisions the way the command line means them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckptvcs.cli import output

if TYPE_CHECKING:
    from ckptvcs.history.commit import Commit
    from ckptvcs.repo import Repo


class _Warnings(logging.Handler):
    """What the library logs, as lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        output.warning(record.getMessage())


def wanted_path() -> str | None:
    """What `--repo` said."""
    path: str | None = click.get_current_context().find_root().params.get("repo")
    return path


@contextlib.contextmanager
def opened(*, rebuild: bool = False, ingest: bool = True) -> Iterator[Repo]:
    """The repository, on HEAD's branch: that is what HEAD means on the command line, whatever CKPT_BRANCH
    says to the jobs started here."""
    with for_commit(None, rebuild=rebuild, ingest=ingest) as repo:
        branch, _ = repo.head()
        yield repo if branch is None or branch == repo.branch_name else repo.on(branch)


@contextlib.contextmanager
def for_commit(
    branch: str | None, *, rebuild: bool = False, index_free: bool | None = None, ingest: bool = True
) -> Iterator[Repo]:
    """The repository, on the branch that commits go to: the argument, else CKPT_BRANCH, else HEAD's."""
    from ckptvcs.repo import Repo

    log = logging.getLogger("ckptvcs")
    if not any(isinstance(handler, _Warnings) for handler in log.handlers):
        log.addHandler(_Warnings())
        log.propagate = False
    with Repo.open(
        wanted_path(), branch, rebuild=rebuild, index_free=index_free, ingest=ingest, say=output.warning
    ) as repo:
        yield repo


def resolved(repo: Repo, revision: str) -> Commit:
    """The commit a revision names."""
    return repo.resolve(spelled(repo, revision))


def spelled(repo: Repo, revision: str) -> str:
    """A revision or range as the handle must read it, where HEAD means the repository's."""
    from ckptvcs.history.revision import range_of

    sides = range_of(revision)
    if sides is not None:
        left, dots, right = sides
        return f"{spelled(repo, left or 'HEAD')}{dots}{spelled(repo, right or 'HEAD')}"
    branch, commit = repo.head()
    if branch is None and commit is not None and repo.branch_name is not None:
        # HEAD is detached, and CKPT_BRANCH has put the handle on a branch all the same.
        for name in ("HEAD", "@"):
            rest = revision.removeprefix(name)
            if revision.startswith(name) and rest[:1] in ("", "~", "^", "@"):
                return f"{commit}{rest}"
    return revision


def file_named(text: str) -> Path | None:
    """The file or folder that an argument names, where it might be a revision; None if it is a revision.

    What begins with `./`, `../` or `/` is a file. Anything else is a revision if there is one of that name in
    this repository, and a file if there is one on the disk.
    """
    from ckptvcs.errors import CkptError

    path = Path(text)
    if text in (".", "..") or text.startswith(("./", "../", "/")):
        return path
    if "\0" in text or not path.exists():
        return None
    try:
        with opened() as repo:
            resolved(repo, text)
    except CkptError:
        return path
    return None
