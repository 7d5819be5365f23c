"""What `--json` answers are made of. Keys are only ever added: scripts read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ckptvcs.cli import output

if TYPE_CHECKING:
    from ckptvcs.combining import Merged
    from ckptvcs.history.commit import Commit, CommitReport
    from ckptvcs.history.deleted import Deleted
    from ckptvcs.history.diff import Diff
    from ckptvcs.history.notes import Notes
    from ckptvcs.ids import ObjectId
    from ckptvcs.importing import ImportReport
    from ckptvcs.repo import Repo
    from ckptvcs.runs import Run
    from ckptvcs.state.checkpoint import Checkpoint, Dense
    from ckptvcs.state.compare import Change, Comparison
    from ckptvcs.state.export import ExportReport
    from ckptvcs.state.files import FileEntry
    from ckptvcs.state.statistics import Statistics
    from ckptvcs.state.tree import Entry
    from ckptvcs.store import LogEntry

Decorations = Mapping["ObjectId", list[str]]
"""The refs that point at each commit, as people write them."""


def decorations(repo: Repo) -> dict[ObjectId, list[str]]:
    """The refs at each commit: HEAD first, then branches, tags and lost commits."""
    found: dict[ObjectId, list[str]] = {}
    branch, head = repo.head()
    if head is not None:
        found[head] = ["HEAD" if branch is None else f"HEAD -> {branch}"]
    for name, id in repo.branches().items():
        if name != branch:
            found.setdefault(id, []).append(name)
    for name, id in repo.tags().items():
        found.setdefault(id, []).append(f"tag: {name}")
    for name, id in repo.lost().items():
        found.setdefault(id, []).append(name)
    return found


def commit_shape(repo: Repo, commit: Commit, refs: Decorations) -> dict[str, Any]:
    """A commit. `metrics` has what notes added later, `refs` what points at it; `dropped` names what
    retention took: components, all of them if it is empty; null if it took nothing."""
    notes = repo.notes(commit)
    return {
        "id": str(commit.id),
        "tree": str(commit.tree),
        "parents": [str(parent) for parent in commit.parents],
        "origin": None if commit.origin is None else str(commit.origin),
        "fresh_start": commit.fresh_start,
        "author": commit.author,
        "time": output.iso(commit.time),
        "time_ns": commit.time,
        "message": commit.message,
        "step": commit.step,
        "epoch": commit.epoch,
        "metrics": notes.metrics,
        "notes": notes.texts,
        "dropped": None if notes.dropped is None else list(notes.dropped),
        "config": commit.config,
        "overrides": commit.overrides,
        "environment": commit.environment,
        "sizes": commit.sizes,
        "refs": list(refs.get(commit.id, [])),
        "pinned": notes.pinned,
    }


def kept_words(notes: Notes) -> list[str]:
    """Whether a commit is pinned, and what retention took from it, as marks in a log."""
    from ckptvcs.history.notes import dropped_words

    words = ["[pinned]"] if notes.pinned else []
    if gone := dropped_words(notes.dropped):
        words.append(f"[{output.clean(gone)}]")
    return words


def report_shape(report: CommitReport) -> dict[str, Any]:
    """What a commit cost."""
    return {
        "given": report.given,
        "new": report.new,
        "reused": report.reused,
        "stored": report.stored,
        "seconds": report.seconds,
    }


def entry_shape(entry: Entry) -> dict[str, Any]:
    """A leaf of a state."""
    return {
        "path": entry.path,
        "kind": entry.kind,
        "dtype": entry.dtype,
        "shape": None if entry.shape is None else list(entry.shape),
        "bytes": entry.nbytes,
        "chunks": entry.chunks,
        "preview": entry.preview,
        "parameter": entry.parameter or None,
    }


def statistics_shape(found: Statistics) -> dict[str, Any]:
    """What a tensor's numbers are like."""
    return {
        "count": found.count,
        "min": found.minimum,
        "max": found.maximum,
        "mean": found.mean,
        "std": found.std,
        "zeros": found.zeros,
        "nan": found.nan,
        "positive_inf": found.positive_inf,
        "negative_inf": found.negative_inf,
        "histogram": list(found.histogram),
    }


def merged_shape(repo: Repo, made: Merged) -> dict[str, Any]:
    """What a merge or cherry-pick made."""
    assert made.commit.report is not None  # it was just made
    return {
        **commit_shape(repo, made.commit, decorations(repo)),
        "branch": repo.branch_name,
        "report": report_shape(made.commit.report),
        "averaged": list(made.averaged),
        "kept": made.kept,
        "taken": made.taken,
        "settled": [{"path": path, "why": why} for path, why in made.settled],
        "overflowed": made.overflowed,
    }


def file_shape(entry: FileEntry) -> dict[str, Any]:
    """A file or link."""
    return {
        "path": entry.path,
        "kind": entry.kind,
        "bytes": entry.size,
        "mode": f"{entry.mode:04o}",
        "blake3": entry.digest.hex() or None,
        "target": entry.target,
    }


def checkpoint_shape(found: Checkpoint) -> dict[str, Any]:
    """One side of a comparison that is a file."""
    return {"kind": "file", "path": str(found.path), "format": found.format, "bytes": found.nbytes}


def run_shape(run: Run) -> dict[str, Any]:
    """A run."""
    return {
        "branch": run.branch,
        "status": run.status,
        "exit": run.exit,
        "holder": run.holder,
        "commit": None if run.tip is None else str(run.tip.id),
        "step": None if run.tip is None else run.tip.step,
        "since": None if run.since is None else output.iso(run.since),
        "fork_point": None if run.fork_point is None else str(run.fork_point),
        "overrides": run.overrides,
    }


def export_shape(report: ExportReport) -> dict[str, Any]:
    """What an export did."""
    return {
        "files": report.files,
        "copied": report.copied,
        "tensors": report.tensors,
        "bytes": report.nbytes,
        "prefix": report.prefix,
        "repeated": report.repeated,
        "left_out": report.left_out,
        "cast": report.cast,
        "overflowed": report.overflowed,
    }


def import_shape(report: ImportReport) -> dict[str, Any]:
    """What an import did, or a rehearsal would do."""
    return {
        "branch": report.branch,
        "dry_run": report.rehearsal,
        "checkpoints": [
            {
                "name": each.name,
                "step": each.step,
                "epoch": each.epoch,
                "metrics": each.metrics,
                "given": each.given,
                "stored": each.stored,
                "commit": None if each.commit is None else str(each.commit),
            }
            for each in report.checkpoints
        ],
        "given": report.given,
        "stored": report.stored,
        "left_out": report.left_out,
    }


def tensor_shape(path: str, tensor: Dense) -> dict[str, Any]:
    """A tensor in a file, as a leaf of a state."""
    return {
        "path": path,
        "kind": "tensor",
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "bytes": tensor.nbytes,
        "preview": "",
    }


def value_shape(path: str, value: Any) -> dict[str, Any]:
    """A value in a file, as a leaf of a state."""
    kind = "none" if value is None else type(value).__name__
    return {
        "path": path,
        "kind": kind,
        "dtype": None,
        "shape": None,
        "bytes": 0,
        "preview": preview(value),
    }


def preview(value: Any) -> str:
    """A value in some sixty characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def change_shape(change: Change) -> dict[str, Any]:
    """A path at which two sides differ. What is not there is null."""
    distance = change.distance
    return {
        "change": change.kind,
        "path": change.path,
        "old": _side_shape(change.old),
        "new": _side_shape(change.new),
        "distance": None
        if distance is None
        else {
            "changed": distance.changed,
            "largest": distance.largest,
            "relative": distance.relative,
            "not_finite": distance.not_finite,
            "l2": distance.l2,
            "cosine": distance.cosine,
            "whole": distance.whole,
        },
        "parameter": change.parameter or None,
    }


def comparison_shape(found: Comparison) -> dict[str, Any]:
    """All changes, the gravest first."""
    return {
        "changes": [change_shape(change) for change in found.changes],
        "equal": found.equal,
        "equal_values": found.equal_values,
    }


def side_shape(commit: Commit) -> dict[str, Any]:
    """One side of a comparison that is a commit."""
    return {
        "kind": "commit",
        "id": str(commit.id),
        "step": commit.step,
        "message": commit.message,
        "bytes": sum(commit.sizes.values()),
    }


def diff_shape(found: Diff) -> dict[str, Any]:
    """What changed between two commits. A field that one side lacks is null there."""
    return {
        "old": side_shape(found.old),
        "new": side_shape(found.new),
        "fields": [
            {"part": part, "name": name, "old": _field_shape(old), "new": _field_shape(new)}
            for part, name, old, new in found.fields
        ],
        **comparison_shape(found.comparison),
        "unread": found.unread,
        "read_bytes": found.read,
    }


def _field_shape(value: Any) -> Any:
    from ckptvcs.state.compare import ABSENT

    return None if value is ABSENT else value


def _side_shape(side: Any) -> Any:
    if hasattr(side, "shape"):
        return {"dtype": side.dtype, "shape": list(side.shape), "bytes": side.nbytes}
    if hasattr(side, "identity"):
        return {"kind": side.kind, "preview": side.text}
    plain = side is None or isinstance(side, (bool, int, float, str))
    return side if plain else None


def deleted_shape(found: Deleted) -> dict[str, Any]:
    """A ref that was deleted and can be brought back."""
    return {
        "name": found.name,
        "ref": found.ref,
        "kind": found.what,
        "commit": str(found.commit),
        "time": output.iso(found.time),
    }


def log_shape(entry: LogEntry) -> dict[str, Any]:
    """An entry of the ref log."""
    return {
        "position": entry.position,
        "time": output.iso(entry.time),
        "time_ns": entry.time,
        "who": entry.who,
        "why": entry.why,
        "operations": [_operation_shape(operation) for operation in entry.operations],
        "info": entry.info,
    }


def _operation_shape(operation: Any) -> dict[str, Any]:
    values = {
        name: str(value) if isinstance(value, bytes) else value
        for name in operation.__slots__
        for value in [getattr(operation, name)]
    }
    return {"kind": type(operation).__name__.lower(), **values}
