"""diff."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptvcs.cli import output, session, shapes
from ckptvcs.cli.options import complete_revision_or_path, json_option
from ckptvcs.errors import CkptError, NoRepositoryError, NotFoundError

if TYPE_CHECKING:
    from ckptvcs.history.diff import Diff
    from ckptvcs.state.checkpoint import Dense
    from ckptvcs.state.compare import Change, Comparison
    from ckptvcs.state.distance import Distance

_ROWS = 40
"""Differences shown without --all."""

_ENVIRONMENT = 8
"""Of these, lines about the environment."""


@click.command()
@click.argument("old", metavar="OLD", shell_complete=complete_revision_or_path)
@click.argument("new", metavar="NEW", shell_complete=complete_revision_or_path)
@click.argument("patterns", metavar="[PATTERN...]", nargs=-1)
@click.option("--only", "only", multiple=True, metavar="PATTERN", help="The same as PATTERN.")
@click.option("--norms", is_flag=True, help="Read equal chunks of tensors that differ as well: exact norms.")
@click.option("--group", is_flag=True, help="One line for all paths that differ in numbers alone.")
@click.option("--all", "everything", is_flag=True, help=f"Show all differences, not the {_ROWS} gravest.")
@json_option
def diff(
    old: str,
    new: str,
    patterns: tuple[str, ...],
    only: tuple[str, ...],
    norms: bool,
    group: bool,
    everything: bool,
    as_json: bool,
) -> None:
    """Compare commits or checkpoint files.

    Tells which tensors are new, removed, reshaped or cast, and of those that changed: which part of their
    numbers did, the largest difference, the norm of the difference, the same relative to the norm of the old
    tensor, and the cosine of both. Values and metadata are compared too, and of commits step, metrics, config
    and environment. With PATTERN only what matches is compared.

    Of commits only chunks that differ are read. Where the rest of a tensor was not, the relative size is an
    upper bound (≤) and the cosine unknown; --norms reads it.

    No repository is needed for files, and nothing from a file runs. A folder's shards count as one file.

    \b
    ckpt diff main~10 main --only model --group
    ckpt diff step_100.pt step_200.pt
    ckpt diff main ./model.safetensors
    """
    wanted = (*patterns, *only)
    files = session.file_named(old), session.file_named(new)
    if None not in files:
        _files([path for path in files if path is not None], wanted, everything, group, as_json)
        return
    try:
        if files == (None, None):
            _commits(old, new, wanted, norms, everything, group, as_json)
        else:
            _mixed((old, new), files, wanted, everything, group, as_json)
    except NoRepositoryError:
        text = next(text for text, path in zip((old, new), files, strict=True) if path is None)
        raise NotFoundError(
            f"there is no file {text}, and no repository in which it could be a revision",
            hint="name two files, or go to a repository",
        ) from None


def _commits(
    old: str, new: str, only: Sequence[str], norms: bool, everything: bool, group: bool, as_json: bool
) -> None:
    with session.opened() as repo:
        before, after = _commit(repo, old), _commit(repo, new)
        with output.working("comparing tensors") as count:
            found = repo.diff(before, after, only=list(only) or None, norms=norms, say=count)
    if as_json:
        output.data(shapes.diff_shape(found))
        return
    _show_fields(found, everything)
    _show(found.comparison, everything, group, found.unread)
    output.line(f"read {output.size(found.read)} of {output.size(found.held)}")


def _commit(repo: Any, text: str) -> Any:
    try:
        return session.resolved(repo, text)
    except CkptError as error:
        if isinstance(error, NotFoundError) and "/" in text:
            raise NotFoundError(f"there is no file and no revision {text}", hint=error.hint) from None
        raise


def _mixed(
    texts: tuple[str, str],
    files: tuple[Path | None, Path | None],
    only: Sequence[str],
    everything: bool,
    group: bool,
    as_json: bool,
) -> None:
    """A commit beside a file, on either side."""
    from ckptvcs.state.compare import compare

    path = next(path for path in files if path is not None)
    with session.opened() as repo:
        commit = _commit(repo, texts[files.index(None)])
        with repo.beside(commit, path, only=list(only) or None) as (mine, file, prefix):
            flipped = files[0] is not None
            with output.working("comparing tensors") as count:
                found = compare(*((file, mine) if flipped else (mine, file)), count)
    if as_json:
        sides = [shapes.side_shape(commit) | {"below": prefix or None}, shapes.checkpoint_shape(file)]
        old, new = reversed(sides) if flipped else sides
        output.data({"old": old, "new": new, **shapes.comparison_shape(found)})
        return
    if prefix:
        output.note(f"the file is compared with what is below {prefix} in the commit")
    _show(found, everything, group)


def _files(
    files: Sequence[Path], patterns: Sequence[str], everything: bool, group: bool, as_json: bool
) -> None:
    from ckptvcs.disk import Disk
    from ckptvcs.state.checkpoint import open_checkpoint, selected, sides
    from ckptvcs.state.compare import compare

    disk = Disk()
    before, after = (open_checkpoint(disk, path) for path in files)
    before, after = sides(before, after)
    if patterns:
        before, after = selected([before, after], patterns)
    with output.working("comparing tensors") as count:
        found = compare(before, after, count)
    if as_json:
        old, new = map(shapes.checkpoint_shape, (before, after))
        output.data({"old": old, "new": new, **shapes.comparison_shape(found)})
        return
    _show(found, everything, group)


# ---- lines ---------------------------------------------------------------------------------------


def _show_fields(found: Diff, everything: bool) -> None:
    rows: list[tuple[str, str, str]] = []
    shown = left = 0  # of the environment
    for change in found.fields:
        if change.part == "environment" and not everything:
            if shown >= _ENVIRONMENT:
                left += 1
                continue
            shown += 1
        rows.append((change.part, change.name, f"{_value(change.old)} -> {_value(change.new)}"))
    output.table(rows, paints={0: {"fg": "cyan"}})
    if left:
        output.line(f"... and {output.counted(left, 'more difference')} in the environment (--all)")
    if rows:
        output.line()


def _value(value: Any) -> str:
    return output.number(value) if isinstance(value, float) else shapes.preview(value)


def _show(found: Comparison, everything: bool, group: bool, unread: int = 0) -> None:
    rows = _grouped(found.changes) if group else list(map(_row, found.changes))
    shown = rows if everything else rows[:_ROWS]
    if shown:
        header = ("", "path", "", "changed", "largest", "l2", "relative", "cosine")
        output.table(shown, header=header, right=(3, 4, 5, 6, 7), paints={0: {"fg": "yellow"}})
    if len(shown) < len(rows):
        more = "--all" if group else "--all, or --group"
        noun = "more group" if group else "more difference"
        output.line(f"... and {output.counted(len(rows) - len(shown), noun)} ({more})")
    counts: dict[str, int] = {}
    for change in found.changes:
        counts[change.kind] = counts.get(change.kind, 0) + 1
    values, files = counts.pop("value", 0), counts.pop("file", 0)
    words = [f"{count:,} {kind}" for kind, count in counts.items()]
    if found.equal or not unread:
        words.append(f"{found.equal:,} equal")
    if unread:
        words.append(f"{output.counted(unread, 'whole subtree')} equal")
    text = f"tensors: {', '.join(words)}"
    if values or found.equal_values:
        text += f"; values: {values:,} changed, {found.equal_values:,} equal"
    if files:
        text += f"; {output.counted(files, 'other file')} changed"
    output.line(text)


def _row(change: Change) -> tuple[str, ...]:
    path = change.path + (f" ({change.parameter})" if change.parameter else "")
    if change.kind in ("value", "type", "layout") and not hasattr(change.old, "shape"):
        sides = dict.fromkeys(shapes.preview(side) for side in (change.old, change.new))
        return change.kind, path, " -> ".join(sides), *[""] * 5
    what = _what(change.old, change.new)
    if change.kind == "layout":
        what += ", in memory"
    if change.distance is None:
        return change.kind, path, what, *[""] * 5
    odd = f" ({change.distance.not_finite:,} not finite)" if change.distance.not_finite else ""
    return change.kind, path, what + odd, *_numbers([change.distance])


def _numbers(distances: Sequence[Distance]) -> list[str]:
    """Of several the mean part, the largest differences, and the least cosine."""
    top = max(distances, key=lambda each: each.relative)
    bound = "" if top.whole else "≤"
    cosines = [each.cosine for each in distances if each.cosine is not None and not math.isnan(each.cosine)]
    changed = sum(each.changed for each in distances) / len(distances)
    known = len(cosines) == len(distances)
    return [
        f"{100 * changed:.4g}%",
        f"{max(each.largest for each in distances):.3g}",
        f"{math.hypot(*(each.l2 for each in distances)):.3g}",
        f"{bound}{top.relative:.3g}",
        f"{min(cosines):.6f}" if known else "",
    ]


def _grouped(changes: Sequence[Change]) -> list[tuple[str, ...]]:
    """A line for all changes of a kind whose paths differ in numbers alone, in the order of their gravest."""
    groups: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        groups.setdefault((change.kind, re.sub(r"\d+", "#", change.path)), []).append(change)
    rows = []
    for (kind, path), members in groups.items():
        if len(members) == 1:
            rows.append(_row(members[0]))
            continue
        distances = [each.distance for each in members if each.distance is not None]
        odd = sum(each.not_finite for each in distances)
        what = f"{len(members):,} of them" + (f" ({odd:,} not finite)" if odd else "")
        rows.append((kind, path, what, *(_numbers(distances) if distances else [""] * 5)))
    return rows


def _what(old: Any, new: Any) -> str:
    """What a tensor is, or was and is."""
    texts = list(dict.fromkeys(_described(side) for side in (old, new) if side is not None))
    return " -> ".join(texts)


def _described(tensor: Dense) -> str:
    return f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}]"
