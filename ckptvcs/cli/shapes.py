"""What `--json` answers are made of. Keys are only ever added: scripts read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ckptvcs.cli import output

if TYPE_CHECKING:
    from ckptvcs.history.commit import Commit, CommitReport
    from ckptvcs.ids import ObjectId
    from ckptvcs.repo import Repo
    from ckptvcs.state.files import FileEntry
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
    """A commit. `metrics` has what notes added later, `refs` what points at it."""
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
        "metrics": repo.metrics(commit),
        "config": commit.config,
        "overrides": commit.overrides,
        "environment": commit.environment,
        "sizes": commit.sizes,
        "refs": list(refs.get(commit.id, [])),
    }


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
