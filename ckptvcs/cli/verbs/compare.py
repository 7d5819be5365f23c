"""diff."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptvcs.cli import output, session, shapes
from ckptvcs.cli.options import complete_path, json_option
from ckptvcs.errors import InvalidError, NotFoundError

if TYPE_CHECKING:
    from ckptvcs.state.checkpoint import Dense
    from ckptvcs.state.compare import Change, Comparison

_ROWS = 40
"""Differences shown without --all."""


@click.command()
@click.argument("old", metavar="OLD", shell_complete=complete_path)
@click.argument("new", metavar="NEW", shell_complete=complete_path)
@click.argument("patterns", metavar="[PATTERN...]", nargs=-1)
@click.option("--all", "everything", is_flag=True, help=f"Show all differences, not the {_ROWS} gravest.")
@json_option
def diff(old: str, new: str, patterns: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Compare two checkpoint files, or two folders of them.

    Tells which tensors are new, removed, reshaped or cast, and of those that changed: which part of their
    numbers did, the largest difference, and the relative one (the norm of the difference over that of the
    old tensor). Values and metadata are compared too. No repository is needed, and nothing from a file runs.
    A folder's shards count as one file. With PATTERN only what matches is compared.

    \b
    ckpt diff step_100.pt step_200.pt
    ckpt diff ./checkpoint-500 ./checkpoint-1000 '**/attn/**'
    """
    from ckptvcs.disk import Disk
    from ckptvcs.state.checkpoint import open_checkpoint, selected, sides
    from ckptvcs.state.compare import compare

    disk = Disk()
    before, after = (open_checkpoint(disk, _file(text)) for text in (old, new))
    before, after = sides(before, after)
    if patterns:
        before, after = selected([before, after], patterns)
    with output.working("comparing tensors") as count:
        found = compare(before, after, count)
    if as_json:
        output.data(
            {
                "old": shapes.checkpoint_shape(before),
                "new": shapes.checkpoint_shape(after),
                "changes": [shapes.change_shape(change) for change in found.changes],
                "equal": found.equal,
                "equal_values": found.equal_values,
            }
        )
        return
    _show(found, everything)


def _file(text: str) -> Path:
    path = session.file_named(text)
    if path is not None:
        return path
    if Path(text).exists():
        raise InvalidError(
            f"{text} is a revision here, and diff compares files",
            hint=f"./{text} is the file; `ckpt checkout` and `ckpt export` make files of a revision",
        )
    raise NotFoundError(
        f"there is no file {text}",
        hint="diff compares files; `ckpt export REV --to DIR` makes some of a commit",
    )


def _show(found: Comparison, everything: bool) -> None:
    shown = found.changes if everything else found.changes[:_ROWS]
    if shown:
        rows = [_row(change) for change in shown]
        header = ("", "path", "", "changed", "largest", "relative")
        output.table(rows, header=header, right=(3, 4, 5), paints={0: {"fg": "yellow"}})
    if len(shown) < len(found.changes):
        output.line(f"... and {output.counted(len(found.changes) - len(shown), 'more difference')} (--all)")
    counts: dict[str, int] = {}
    for change in found.changes:
        counts[change.kind] = counts.get(change.kind, 0) + 1
    values, files = counts.pop("value", 0), counts.pop("file", 0)
    words = [f"{count:,} {kind}" for kind, count in counts.items()]
    text = f"tensors: {', '.join([*words, f'{found.equal:,} equal'])}"
    if values or found.equal_values:
        text += f"; values: {values:,} changed, {found.equal_values:,} equal"
    if files:
        text += f"; {output.counted(files, 'other file')} changed"
    output.line(text)


def _row(change: Change) -> tuple[str, ...]:
    kind = change.kind
    if change.kind == "value":
        return kind, change.path, f"{shapes.preview(change.old)} -> {shapes.preview(change.new)}", "", "", ""
    distance = change.distance
    if distance is None:
        return kind, change.path, _what(change.old, change.new), "", "", ""
    odd = f" ({distance.not_finite:,} not finite)" if distance.not_finite else ""
    return (
        kind,
        change.path,
        _what(change.old, change.new) + odd,
        f"{100 * distance.changed:.4g}%",
        f"{distance.largest:.3g}",
        f"{distance.relative:.3g}",
    )


def _what(old: Any, new: Any) -> str:
    """What a tensor is, or was and is."""
    texts = list(dict.fromkeys(_described(side) for side in (old, new) if side is not None))
    return " -> ".join(texts)


def _described(tensor: Dense) -> str:
    return f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}]"
