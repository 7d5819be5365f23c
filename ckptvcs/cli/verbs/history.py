"""log, show, reflog."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click

from ckptvcs.cli import output, session, shapes
from ckptvcs.cli.options import json_option, revision_argument
from ckptvcs.errors import NotFoundError

if TYPE_CHECKING:
    from ckptvcs.history.commit import Commit
    from ckptvcs.ids import ObjectId
    from ckptvcs.repo import Repo
    from ckptvcs.store import LogEntry

# ---- log ----------------------------------------------------------------------------------------


@click.command()
@revision_argument()
@click.option("-n", "count", type=click.IntRange(min=0), metavar="N", help="At most N commits.")
@click.option("--graph", is_flag=True, help="Draw how the commits hang together.")
@click.option("--all", "everything", is_flag=True, help="Start from every branch, tag and lost commit.")
@click.option("--oneline", is_flag=True, help="One line per commit.")
@json_option
def log(
    revision: str, count: int | None, graph: bool, everything: bool, oneline: bool, as_json: bool
) -> None:
    """List commits, with their steps and metrics.

    Children come before their parents; clocks decide nothing. A commit whose state does not come from its
    parent is marked as a fresh start.

    \b
    ckpt log --graph --all
    ckpt log main@best:val_loss -n 1
    ckpt log --json | jq '.commits[].metrics'
    """
    with session.opened() as repo:
        refs = shapes.decorations(repo)
        commits = itertools.islice(_chosen(repo, revision, refs, everything), count)
        if as_json:
            output.data({"commits": [shapes.commit_shape(repo, commit, refs) for commit in commits]})
            return
        texts = _Texts(repo, refs, oneline)
        if graph:
            _print_graph(commits, texts)
        else:
            for commit in commits:
                for line in texts.of(commit, output.width()):
                    output.line(line)


def _chosen(repo: Repo, revision: str, refs: shapes.Decorations, everything: bool) -> Iterator[Commit]:
    if not everything:
        return repo.log(session.resolved(repo, revision))
    tips = list(refs)
    if revision != "HEAD":
        tips.insert(0, session.resolved(repo, revision).id)
    return repo.log(tips)


def _print_graph(commits: Iterable[Commit], texts: _Texts) -> None:
    from ckptvcs.history.layout import draw

    drawn, told = itertools.tee(commits)
    rows = draw((commit.id, commit.parents) for commit in drawn)
    for row, commit in zip(rows, told, strict=True):
        output.graph_row(
            (row.node, row.fan, row.fill, row.join, row.width),
            lambda width, commit=commit: texts.of(commit, width),  # type: ignore[misc]
        )


class _Texts:
    """The lines that tell about a commit in a log."""

    def __init__(self, repo: Repo, refs: shapes.Decorations, oneline: bool) -> None:
        from ckptvcs.disk import Disk

        self._repo = repo
        self._refs = refs
        self._oneline = oneline
        self._now = Disk().now_ns()

    def of(self, commit: Commit, width: int) -> list[str]:
        """One line, or two and more that fit the width where that can be."""
        numbers = self._numbers(commit)
        names = ", ".join(map(output.clean, self._refs.get(commit.id, [])))
        room = width - len(commit.id.short) - (len(names) + 3 if names else 0) - 1
        if self._oneline:
            room -= sum(len(word) + 2 for word in numbers)
        words = [output.paint(commit.id.short, fg="yellow")]
        if names:
            words.append(output.paint(f"({names})", fg="green"))
        if commit.title:
            words.append(output.fitted(output.clean(commit.title), room))
        if self._oneline:
            return ["  ".join([" ".join(words), *numbers])]
        told = [*numbers, output.age(commit.time, self._now)]
        return [" ".join(words), *(f"  {line}" for line in output.wrapped(told, width - 2))]

    def _numbers(self, commit: Commit) -> list[str]:
        words = []
        if commit.step is not None:
            words.append(f"step {commit.step}")
        if commit.epoch is not None:
            words.append(f"epoch {output.number(commit.epoch)}")
        words += [
            f"{output.clean(name)}={output.number(value)}"
            for name, value in self._repo.metrics(commit).items()
        ]
        if commit.fresh_start:
            words.append("[fresh start]")
        return words + shapes.kept_words(self._repo, commit)


# ---- show ---------------------------------------------------------------------------------------


@click.command()
@revision_argument()
@json_option
def show(revision: str, as_json: bool) -> None:
    """Tell everything about a commit, except its content (see ls).

    \b
    ckpt show main~2
    ckpt show v1 --json | jq .config
    """
    with session.opened() as repo:
        commit = session.resolved(repo, revision)
        refs = shapes.decorations(repo)
        if as_json:
            output.data(shapes.commit_shape(repo, commit, refs))
            return
        _print_commit(repo, commit, refs)


def _print_commit(repo: Repo, commit: Commit, refs: shapes.Decorations) -> None:
    names = ", ".join(map(output.clean, refs.get(commit.id, [])))
    origin = "a fresh start" if commit.fresh_start else "none"
    rows = [
        ("commit", f"{output.paint(str(commit.id), fg='yellow')}{f' ({names})' if names else ''}"),
        ("tree", str(commit.tree)),
        *(("parent", str(parent)) for parent in commit.parents),
        ("origin", origin if commit.origin is None else str(commit.origin)),
        ("author", output.clean(commit.author)),
        ("time", output.when(commit.time)),
    ]
    if commit.step is not None:
        rows.append(("step", str(commit.step)))
    if commit.epoch is not None:
        rows.append(("epoch", output.number(commit.epoch)))
    if marks := shapes.kept_words(repo, commit):
        rows.append(("kept", " ".join(marks)))
        if repo.dropped(commit) is not None and (near := repo.nearest_with(commit)) is not None:
            rows.append(("nearest", f"{near.id.short} has all of its content"))
    output.fields(rows)
    if commit.message:
        output.line()
        for line in commit.message.splitlines():
            output.line(f"    {output.clean(line)}".rstrip())
    sections = (
        ("metrics", repo.metrics(commit)),
        ("config", commit.config),
        ("overrides", commit.overrides),
        ("environment", commit.environment),
        ("sizes", {name or "(other)": output.size(size) for name, size in commit.sizes.items()}),
    )
    for title, values in sections:
        if values:
            output.line()
            output.line(output.paint(title, bold=True))
            output.nested(values)


# ---- reflog -------------------------------------------------------------------------------------


@click.command()
@click.argument("ref", metavar="[REF]", required=False)
@click.option("-n", "count", type=click.IntRange(min=0), metavar="N", help="At most N entries.")
@json_option
def reflog(ref: str | None, count: int | None, as_json: bool) -> None:
    """List what happened to refs, newest first.

    With REF (a branch, a tag, HEAD, lost/..., also one that was deleted) only its moves, numbered as in
    REF@{n}. A deleted branch comes back with `ckpt branch NAME ID`, as long as gc has not collected it.

    \b
    ckpt reflog main
    ckpt branch lr3e-4 1a2b3c4d
    """
    with session.opened() as repo:
        entries = repo.reflog(None if ref is not None else count)
        if ref is not None:
            entries = _of_ref(entries, ref)[:count]
        if as_json:
            output.data({"entries": [shapes.log_shape(entry) for entry in entries]})
        elif ref is None:
            _print_entries(entries)
        else:
            _print_moves(entries, ref)


def _full_names(ref: str) -> tuple[str, ...]:
    return (ref, f"refs/heads/{ref}", f"refs/tags/{ref}", f"refs/{ref}")


def _of_ref(entries: list[LogEntry], ref: str) -> list[LogEntry]:
    """The entries that moved a ref; of several refs with that name, a branch comes first."""
    from ckptvcs.store import Move

    for full in _full_names(ref):
        found = [
            entry
            for entry in entries
            if any(isinstance(op, Move) and op.name == full for op in entry.operations)
        ]
        if found:
            return found
    raise NotFoundError(f"no entry of the log is about {ref!r}", hint="`ckpt reflog` lists all of them")


def _print_entries(entries: Iterable[LogEntry]) -> None:
    from ckptvcs.disk import Disk
    from ckptvcs.history.refs import shown
    from ckptvcs.store import Move

    now = Disk().now_ns()
    rows = []
    for entry in entries:
        moves = [op for op in entry.operations if isinstance(op, Move)]
        told = [f"{shown(op.name)}: {_target(op.old)} -> {_target(op.new)}" for op in moves] or [""]
        rows += [(output.age(entry.time, now), entry.who, entry.why, what) for what in told]
    output.table(rows, paints={0: {"dim": True}})


def _print_moves(entries: Iterable[LogEntry], ref: str) -> None:
    from ckptvcs.disk import Disk
    from ckptvcs.store import Move

    now = Disk().now_ns()
    rows: list[tuple[str, ...]] = []
    names = _full_names(ref)
    for entry in entries:
        for op in entry.operations:
            if isinstance(op, Move) and op.name in names:
                name = f"{ref}@{{{len(rows)}}}"
                rows.append((name, _target(op.new), output.age(entry.time, now), entry.who, entry.why))
    output.table(rows, paints={1: {"fg": "yellow"}, 2: {"dim": True}})


def _target(target: ObjectId | str | None) -> str:
    from ckptvcs.history.refs import shown
    from ckptvcs.ids import ObjectId

    if target is None:
        return "nothing"
    return target.short if isinstance(target, ObjectId) else shown(target)
