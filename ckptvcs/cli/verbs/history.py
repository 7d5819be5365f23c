"""log, show, reflog."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from ckptvcs.cli import output, session, shapes
from ckptvcs.cli.options import branches_option, complete_revision, complete_revision_and_name, json_option
from ckptvcs.errors import InvalidError, NotFoundError

if TYPE_CHECKING:
    from ckptvcs.history.commit import Commit
    from ckptvcs.history.log import Told
    from ckptvcs.ids import ObjectId
    from ckptvcs.repo import Repo
    from ckptvcs.state.files import FileEntry
    from ckptvcs.state.lazy import LazyTensor
    from ckptvcs.state.tree import Entry
    from ckptvcs.store import LogEntry

# ---- log ----------------------------------------------------------------------------------------


@click.command()
@click.argument("revisions", metavar="[REV...]", nargs=-1, shell_complete=complete_revision)
@click.option("-n", "count", type=click.IntRange(min=0), metavar="N", help="At most N commits.")
@click.option("--graph", is_flag=True, help="Draw how the commits hang together.")
@click.option("--all", "everything", is_flag=True, help="Start from every branch, tag and lost commit.")
@branches_option("Start from the branches that match, as in 'sweep/*'. Can be repeated.")
@click.option("--first-parent", is_flag=True, help="Follow first parents alone.")
@click.option(
    "--brief",
    is_flag=True,
    help="Only commits at which something happens: where lines end, begin, part or join, fresh starts, refs.",
)
@click.option("--oneline", is_flag=True, help="One line per commit.")
@click.option(
    "--metric",
    metavar="CONDITION",
    multiple=True,
    help="Only commits whose metric is so: 'val_loss<0.3', 'acc>=0.9', or there at all. Can be repeated.",
)
@click.option("--step", metavar="A..B", help="Only commits of these steps: 1000, 1000..2000, 1000.., ..2000.")
@click.option(
    "--since", metavar="WHEN", help="Only commits made since: 2d (ago), 2026-03-01, 2026-03-01T12:00."
)
@click.option("--until", metavar="WHEN", help="Only commits made until then.")
@click.option("--author", metavar="REGEX", help="Only commits of these authors.")
@click.option("--grep", metavar="REGEX", help="Only commits with such a message.")
@json_option
def log(
    revisions: tuple[str, ...],
    count: int | None,
    graph: bool,
    everything: bool,
    branches: tuple[str, ...],
    oneline: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """List commits, with their steps and metrics.

    Children come before their parents; clocks decide nothing. A commit whose state does not come from its
    parent is marked as a fresh start, and one of which retention dropped something as dropped.

    REV may be a range: A..B is what B has and A has not, A...B what one of them has and not both; ^A leaves
    out what A has. Filters must all fit; upper and lower case are the same to them.

    \b
    ckpt log --graph --all
    ckpt log --graph --all --brief --oneline
    ckpt log main..exp --oneline
    ckpt log --branches 'sweep/*' --metric 'val_loss<0.3' --step 1000..2000
    ckpt log --json | jq '.commits[].metrics'
    """
    with session.opened() as repo:
        refs = shapes.decorations(repo)
        found = _chosen(repo, revisions, refs, everything, branches, count, chosen)
        if as_json:
            commits = [shapes.commit_shape(repo, told.commit, refs) for told in found if told.shown]
            output.data({"commits": commits})
            return
        texts = _Texts(repo, refs, oneline)
        if graph:
            _print_graph(found, texts)
        else:
            for told in found:
                if told.shown:
                    for line in texts.of(told.commit, output.width()):
                        output.line(line)


def _chosen(
    repo: Repo,
    revisions: Sequence[str],
    refs: shapes.Decorations,
    everything: bool,
    branches: Sequence[str],
    count: int | None,
    chosen: dict[str, Any],
) -> Iterator[Told]:
    revs: list[Any] = [session.spelled(repo, text) for text in revisions]
    if everything:
        revs += refs
    elif not revisions and not branches:
        revs = [session.spelled(repo, "HEAD")]
    return repo.graph(revs, count, branches=branches or None, **chosen)


_LEAST_TEXT = 40
"""Columns that a graph leaves for texts, whatever the width of the terminal."""


def _print_graph(found: Iterable[Told], texts: _Texts) -> None:
    from ckptvcs.history.layout import draw

    drawn, told = itertools.tee(found)
    widest = max(output.width() - _LEAST_TEXT, 8)
    rows = draw(((each.commit.id, each.parents, each.shown) for each in drawn), widest)
    for row, each in zip(rows, told, strict=True):
        output.graph_row(
            (row.node, row.fan, row.fill, row.join, row.width),
            lambda width, commit=each.commit: texts.of(commit, width),  # type: ignore[misc]
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

        notes = self._repo.notes(commit)
        words = []
        if commit.step is not None:
            words.append(f"step {commit.step}")
        if commit.epoch is not None:
            words.append(f"epoch {output.number(commit.epoch)}")
        words += [f"{output.clean(name)}={output.number(value)}" for name, value in notes.metrics.items()]
        if commit.fresh_start:
            words.append("[fresh start]")
        return words + shapes.kept_words(notes)


# ---- show ---------------------------------------------------------------------------------------


@click.command()
@click.argument("what", metavar="[REV[:NAME]]", default="HEAD", shell_complete=complete_revision_and_name)
@json_option
def show(what: str, as_json: bool) -> None:
    """Tell everything about a commit, or about a part of it.

    With a NAME below it: what a tree holds; of a tensor its dtype, shape and chunks, and what its numbers are
    like, in float64 and over finite ones: least, greatest, mean, standard deviation, how many are zero, NaN
    or infinite, and how they are spread. A tensor is read twice, a few MiB at a time.

    \b
    ckpt show main~2
    ckpt show main:model
    ckpt show main@best:val_loss:model/layers/0/weight
    ckpt show v1 --json | jq .config
    """
    from ckptvcs.history.revision import split_name

    revision, name = split_name(what)
    with session.opened() as repo:
        commit = session.resolved(repo, revision or "HEAD")
        if name is not None:
            _show_content(repo, commit, name, as_json)
            return
        refs = shapes.decorations(repo)
        if as_json:
            output.data(shapes.commit_shape(repo, commit, refs))
            return
        _print_commit(repo, commit, refs)


def _show_content(repo: Repo, commit: Commit, name: str, as_json: bool) -> None:
    try:
        tensor = repo.open_tensor(commit, name) if name else None
    except (InvalidError, NotFoundError):
        tensor = None  # a tree, another leaf, or nothing
    if tensor is not None:
        _show_tensor(commit, tensor, as_json)
        return
    entries, files = _below(repo, commit, name)
    if as_json:
        output.data(
            {
                "commit": str(commit.id),
                "path": name,
                "entries": [shapes.entry_shape(entry) for entry in entries],
                "files": [shapes.file_shape(entry) for entry in files],
            }
        )
        return
    if len(entries) + len(files) == 1 and not any(sign in name for sign in "*?["):
        for entry in entries:
            if entry.path == name:
                _print_leaf(entry)
                return
    _print_tree(name, entries, files)


def _below(repo: Repo, commit: Commit, name: str) -> tuple[list[Entry], list[FileEntry]]:
    """The leaves and files at and below a name, which may be a pattern. NotFoundError if there are none."""
    if not name:
        return list(repo.entries(commit)), repo.file_entries(commit)
    entries: list[Entry] = []
    files: list[FileEntry] = []
    missed: NotFoundError | None = None
    try:
        entries = list(repo.entries(commit, name))
    except NotFoundError as error:
        missed = error
    try:
        files = repo.file_entries(commit, name)
    except NotFoundError as error:
        missed = missed or error
    if not entries and not files:
        raise missed or NotFoundError(f"there is nothing at {name!r} in the commit {commit.id.short}")
    return entries, files


def _print_leaf(entry: Entry) -> None:
    rows = [("path", output.clean(entry.path)), ("kind", entry.kind)]
    if entry.dtype:
        rows.append(("dtype", entry.dtype))
    if entry.shape is not None:
        rows.append(("shape", str(list(entry.shape))))
    if entry.nbytes:
        rows.append(("bytes", f"{entry.nbytes:,}"))
    if entry.preview:
        rows.append(("value", output.clean(entry.preview)))
    output.fields(rows)


def _print_tree(name: str, entries: Sequence[Entry], files: Sequence[FileEntry]) -> None:
    """One line for each name directly below: what it is, or how much it holds."""
    from ckptvcs.state import paths

    depth = 0 if any(sign in name for sign in "*?[") else len(paths.split(name))
    below: dict[str, list[Any]] = {}
    every: list[Any] = [*entries, *files]
    for entry in every:
        parts = paths.split(entry.path)
        below.setdefault("/".join(parts[: depth + 1]), []).append(entry)
    rows = []
    for path, held in below.items():
        size = sum(each.size if hasattr(each, "size") else each.nbytes for each in held)
        alone = held[0] if len(held) == 1 and held[0].path == path else None
        if alone is None:
            what = output.counted(len(held), "leaf") if not hasattr(held[0], "size") else "files"
            rows.append((f"{path}/", what.replace("leafs", "leaves"), "", output.size(size)))
        elif hasattr(alone, "size"):
            rows.append((path, alone.kind, "", output.size(size)))
        else:
            shape = "" if alone.shape is None else f"[{', '.join(map(str, alone.shape))}]"
            rows.append((path, alone.dtype or alone.kind, shape or alone.preview, output.size(size)))
    output.table(rows, right=(3,))


_BAR = 40
"""Characters of a histogram's longest bar."""
_BINS = 20


def _show_tensor(commit: Commit, tensor: LazyTensor, as_json: bool) -> None:
    from ckptvcs.history.blocks import bar

    try:
        found = tensor.statistics(_BINS)
    except InvalidError:
        found = None  # elements that are no numbers
    if as_json:
        output.data(
            {
                "commit": str(commit.id),
                "path": tensor.path,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "bytes": tensor.nbytes,
                "chunks": tensor.chunks,
                "statistics": None if found is None else shapes.statistics_shape(found),
            }
        )
        return
    rows = [
        ("path", output.clean(tensor.path)),
        ("dtype", tensor.dtype),
        ("shape", str(list(tensor.shape))),
        ("bytes", f"{tensor.nbytes:,}"),
        ("chunks", f"{tensor.chunks:,}" if tensor.chunks else "none: it lives in the tree"),
    ]
    if found is not None:
        rows += [
            (label, output.number(value))
            for label, value in (
                ("min", found.minimum),
                ("max", found.maximum),
                ("mean", found.mean),
                ("std", found.std),
            )
            if value is not None
        ]
        rows.append(("zeros", f"{found.zeros:,} of {found.count:,}"))
        for label, count in (("NaN", found.nan), ("+Inf", found.positive_inf), ("-Inf", found.negative_inf)):
            if count:
                rows.append((label, f"{count:,}"))
    output.fields(rows)
    if found is None or found.minimum is None or found.maximum is None or found.minimum == found.maximum:
        return
    output.line()
    low, high = float(found.minimum), float(found.maximum)
    most = max(found.histogram)
    edges = [f"{low + (high / _BINS - low / _BINS) * place:.4g}" for place in range(_BINS)]
    longest = max(map(len, edges))
    for edge, count in zip(edges, found.histogram, strict=True):
        drawn = bar(count / most, _BAR, plain=output.is_plain())
        output.line(f"{edge.rjust(longest)}  {drawn}{' ' if drawn else ''}{count:,}")


def _print_commit(repo: Repo, commit: Commit, refs: shapes.Decorations) -> None:
    from ckptvcs.history.notes import dropped_words

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
    notes = repo.notes(commit)
    if gone := dropped_words(notes.dropped):
        rows.append(("payload", output.clean(gone)))
        if (near := repo.nearest_with(commit)) is not None:
            rows.append(("nearest", f"{near.id.short} has all of its content"))
    if notes.pinned:
        rows.append(("pinned", "yes"))
    if commit.step is not None:
        rows.append(("step", str(commit.step)))
    if commit.epoch is not None:
        rows.append(("epoch", output.number(commit.epoch)))
    output.fields(rows)
    if commit.message:
        output.line()
        for line in commit.message.splitlines():
            output.line(f"    {output.clean(line)}".rstrip())
    sections = (
        ("metrics", notes.metrics),
        ("notes", notes.texts),
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
