"""Checking a repository: what is found, what it is called, and that nothing is changed by looking."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import CorruptionError, LockedError, ObjectId, Repo
from ckptvcs.ids import chunk_id
from ckptvcs.store.format import HEADER_BYTES, TRAILER_BYTES
from ckptvcs.testing.same import difference


def array(seed: int, size: int = 4000) -> np.ndarray[Any, Any]:
    """Bytes that no codec makes smaller, so that they lie in the pack as they are."""
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


STATE = {"a": array(1), "b": {"c": [array(n, 600) for n in range(30)]}, "z": np.zeros(50_000)}


@pytest.fixture
def filled(repo: Repo) -> Repo:
    """A repository with a branch main (STATE) and a branch and a tag of their own."""
    repo.commit(STATE, "one")
    side = repo.on("side")
    side.restore({}, "main", strict=False)
    side.commit({"other": array(77)}, "two")
    repo.tag("v1", "side")
    return repo


def layout(repo: Repo) -> Any:
    """Where things lie."""
    return repo._store.layout


def row(repo: Repo, id: ObjectId) -> Any:
    """A row of the index."""
    with repo._store.snapshot() as snapshot:
        return snapshot.row(id)


def flip(path: Path, offset: int) -> None:
    """Flip a bit of a file."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def flip_record(repo: Repo, id: ObjectId, at: int) -> None:
    """Flip a bit of a record: in its header, or `HEADER_BYTES` further in its payload."""
    found = row(repo, id)
    flip(layout(repo).pack(found.pack), found.offset + at)


def pack_of(repo: Repo, id: ObjectId) -> Path:
    """The pack a record lies in."""
    path: Path = layout(repo).pack(row(repo, id).pack)
    return path


def forget(repo: Repo, id: ObjectId) -> None:
    """Delete a row."""
    with repo._store.index.change() as change:
        assert change.delete_row(id)


CHUNK = chunk_id(array(1).tobytes())


def rewrite_journal(repo: Repo, change: Callable[[bytes], bytes]) -> None:
    path = layout(repo).journal
    path.write_bytes(change(path.read_bytes()))


DAMAGES: dict[str, tuple[Callable[[Repo], Any], bool, str, set[str]]] = {
    # what is done, whether the quick check finds it, what the message says, the refs it names
    "a chunk's payload": (
        lambda r: flip_record(r, CHUNK, HEADER_BYTES + 50),
        False,
        "damaged",
        {"main", "side", "v1"},
    ),
    "a chunk's header": (
        lambda r: flip_record(r, CHUNK, 60),
        False,
        "no record header",
        {"main", "side", "v1"},
    ),
    "a tree's payload": (
        lambda r: flip_record(r, r.resolve("main").tree, HEADER_BYTES + 20),
        True,
        "",
        {"main", "side", "v1"},
    ),
    "a commit's payload": (
        lambda r: flip_record(r, r.resolve("side").id, HEADER_BYTES + 20),
        True,
        "",
        {"side", "v1"},
    ),
    "a pack cut short": (
        lambda r: os.truncate(pack_of(r, CHUNK), pack_of(r, CHUNK).stat().st_size - 5),
        True,
        "bytes instead of",
        set(),
    ),
    "a pack cut to half": (
        lambda r: os.truncate(pack_of(r, CHUNK), pack_of(r, CHUNK).stat().st_size // 2),
        True,
        "bytes instead of",
        {"main", "side", "v1"},
    ),
    "a missing pack": (
        lambda r: pack_of(r, r.resolve("side").id).unlink(),
        True,
        "is missing",
        {"side", "v1"},
    ),
    "a footer": (
        lambda r: flip(pack_of(r, CHUNK), pack_of(r, CHUNK).stat().st_size - TRAILER_BYTES - 9),
        True,
        "footer is damaged",
        set(),
    ),
    "a trailer": (
        lambda r: flip(pack_of(r, CHUNK), pack_of(r, CHUNK).stat().st_size - 3),
        True,
        "no whole footer",
        set(),
    ),
    "a forgotten chunk": (
        lambda r: forget(r, CHUNK),
        True,
        "referred to but missing",
        {"main", "side", "v1"},
    ),
    "a forgotten tree": (
        lambda r: forget(r, r.resolve("side").tree),
        True,
        "referred to but missing",
        {"side", "v1"},
    ),
    "a forgotten commit": (
        lambda r: forget(r, r.resolve("side").id),
        True,
        "referred to but missing",
        {"side", "v1"},
    ),
    "a journal line": (lambda r: flip(layout(r).journal, 70), True, "line 1 is damaged", set()),
    "a missing journal": (lambda r: layout(r).journal.unlink(), True, "journal is missing", set()),
    "a lost journal line": (
        lambda r: rewrite_journal(
            r, lambda data: b"".join(data.splitlines(True)[:1] + data.splitlines(True)[2:])
        ),
        True,
        "line 2 is damaged",
        set(),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_named(filled: Repo, name: str) -> None:
    damage, quick_finds, says, refs = DAMAGES[name]
    filled.fsck(full=True)
    for path in (layout(filled).packs).rglob("*.pack"):
        path.chmod(0o644)
    damage(filled)
    before = {path: path.stat().st_size for path in layout(filled).root.rglob("*.pack")}
    quick, full = filled.fsck(), filled.fsck(full=True)
    assert bool(quick) is quick.ok is not quick_finds
    assert not full
    assert full.problems
    assert any(says in problem.message for problem in full.problems), full.problems
    named = {ref.rsplit("/", 1)[1] for problem in full.problems for ref in problem.refs}
    assert named == refs
    for problem in full.problems:
        assert "\n" not in problem.message
    json.dumps(full.as_dict())
    assert full.as_dict()["ok"] is False
    assert {path: path.stat().st_size for path in layout(filled).root.rglob("*.pack")} == before


def test_a_sound_repository(filled: Repo) -> None:
    for full in (False, True):
        report = filled.fsck(full=full)
        assert report
        assert report.ok
        assert (report.refs, report.commits, report.packs) == (4, 2, 2)  # HEAD counts
        assert report.records > 30
        assert report.bytes == sum(
            path.stat().st_size - TRAILER_BYTES for path in layout(filled).packs.rglob("*.pack")
        )
        assert report.as_dict()["problems"] == []
        assert "rebuilt" not in report.as_dict()


def test_an_empty_repository(repo: Repo) -> None:
    report = repo.fsck(full=True)
    assert report.ok
    assert (report.commits, report.records, report.packs) == (0, 0, 0)


def test_damage_in_one_branch_does_not_hide_in_another(filled: Repo) -> None:
    flip_record(filled, chunk_id(array(77).tobytes()), HEADER_BYTES + 1)
    report = filled.fsck(full=True)
    assert {ref for problem in report.problems for ref in problem.refs} == {"refs/heads/side", "refs/tags/v1"}
    assert difference(filled.checkout("main"), STATE) is None
    with pytest.raises(CorruptionError):
        filled.checkout("side")


def test_rebuilding_mends_the_index(filled: Repo, folder: Path) -> None:
    with filled._store.snapshot() as snapshot:
        before = snapshot.dump()
    forget(filled, CHUNK)
    forget(filled, filled.resolve("side").id)
    with filled._store.index.change() as change:
        change._delete("refs", b"refs/tags/v1")
    assert not filled.fsck()
    report = filled.fsck(full=True, rebuild=True)
    assert report.ok, report.problems
    assert report.rebuilt is not None
    assert report.rebuilt.problems == []
    assert report.as_dict()["rebuilt"]["log_entries"] == 4
    with filled._store.snapshot() as snapshot:
        after = snapshot.dump()
    del before["meta"], after["meta"]
    assert after == before
    assert difference(filled.checkout("main"), STATE) is None
    filled.restore({}, strict=False)
    filled.commit({"goes": "on"})


def test_rebuilding_is_refused_while_others_have_it_open(
    filled: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptvcs.store.store._LOCK_WAIT", 0.1)
    with Repo.open(folder) as other:
        with pytest.raises(LockedError, match="has it open"):
            filled.fsck(rebuild=True)
        assert other.fsck(full=True).ok
    filled.close()
    with Repo.open(folder, rebuild=True) as again:
        assert again.fsck(full=True).ok


def test_a_refused_rebuild_leaves_a_handle_that_works(
    filled: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptvcs.store.store._LOCK_WAIT", 0.1)
    with Repo.open(folder):
        with pytest.raises(LockedError):
            filled.fsck(rebuild=True)
    assert difference(filled.checkout("main"), STATE) is None
    assert filled.fsck(rebuild=True).ok


def test_rebuilding_salvages_what_is_whole(filled: Repo, folder: Path) -> None:
    path = pack_of(filled, CHUNK)
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size - 40)
    report = filled.fsck(full=True, rebuild=True)
    assert not report
    assert report.rebuilt is not None
    assert any("salvaged" in problem for problem in report.rebuilt.problems)
    assert difference(filled.checkout("main"), STATE) is None  # only the footer was lost
