"""Rewriting records: the same content elsewhere or otherwise encoded, and chains of bases that always end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ckptvcs import CorruptionError, ObjectId, Repo
from ckptvcs.ids import Kind
from ckptvcs.maintenance.rewriting import Rewriter
from ckptvcs.store import Row
from ckptvcs.store.codec import DIFFERENCE
from ckptvcs.store.format import MAX_DEPTH


@pytest.fixture
def repo(tmp_path: Path) -> Iterator[Repo]:
    with Repo.init(tmp_path, compression="small") as repo:
        yield repo


def weights(n: int) -> np.ndarray:
    """A tensor of one chunk that changes a little with each step."""
    random = np.random.default_rng(7)
    start = random.standard_normal(50_000).astype(np.float32)
    for step in range(n):
        start = start + 1e-3 * np.random.default_rng(step).standard_normal(50_000).astype(np.float32)
    return start


def chunk_of(repo: Repo, rev: str) -> ObjectId:
    with repo._store.reader() as reader:
        from ckptvcs.state import tree

        (held,) = tree.held(reader, repo.resolve(rev).tree).values()
        (chunk,) = held.chunks
        return chunk


def row(repo: Repo, id: ObjectId) -> Row:
    with repo._store.snapshot() as snapshot:
        found = snapshot.row(id)
    assert found is not None
    return found


def history(repo: Repo, length: int) -> list[ObjectId]:
    for n in range(length):
        repo.commit({"w": weights(n)}, step=n)
    return [chunk_of(repo, f"main@step:{n}") for n in range(length)]


def recode(repo: Repo, id: ObjectId, base: ObjectId | None, above: int = 0) -> int:
    with repo._store.collecting(), Rewriter(repo._store) as rewriter:
        old = row(repo, id)
        rewriter.take(id, old, rewriter.encoded(id, old, base, "float32"), above)
        return rewriter.publish()


def sound(repo: Repo, length: int) -> None:
    for n in range(length):
        assert np.array_equal(repo.checkout(f"main@step:{n}")["w"], weights(n))
    assert repo.fsck(full=True).ok


def test_a_difference_becomes_plain_and_the_other_way_round(repo: Repo) -> None:
    ids = history(repo, 3)
    assert [row(repo, id).depth for id in ids] == [0, 1, 2]
    assert recode(repo, ids[2], None) == 1
    assert (row(repo, ids[2]).base, row(repo, ids[2]).depth) == (None, 0)
    assert recode(repo, ids[1], ids[2]) == 1
    assert recode(repo, ids[0], ids[1]) == 1
    assert [(row(repo, id).base, row(repo, id).depth) for id in ids] == [(ids[1], 2), (ids[2], 1), (None, 0)]
    assert row(repo, ids[0]).codec == DIFFERENCE
    sound(repo, 3)
    announced = repo.gc(0, dry_run=True).freed
    assert announced > 0, "the old records are gaps now"
    assert repo.gc(0).freed == announced
    sound(repo, 3)
    repo.fsck(rebuild=True)
    sound(repo, 3)


def test_no_circle_is_ever_closed(repo: Repo) -> None:
    ids = history(repo, 3)
    before = [row(repo, id) for id in ids]
    assert recode(repo, ids[0], ids[2]) == 0, "which is a difference to it"
    assert recode(repo, ids[0], ids[1]) == 0
    assert [row(repo, id) for id in ids] == before
    sound(repo, 3)


def test_chains_stay_within_bounds(repo: Repo) -> None:
    ids = history(repo, MAX_DEPTH + 1)
    assert max(row(repo, id).depth for id in ids) == MAX_DEPTH
    repo.on("other").commit({"w": weights(40)})
    far = chunk_of(repo, "other")
    assert row(repo, far).depth == 0
    assert recode(repo, ids[0], far, above=MAX_DEPTH) == 0, "what is above it would be too deep"
    assert recode(repo, ids[0], far, above=1) == 0, "the stored depth of what is above it would be too small"
    assert row(repo, ids[0]).depth == 0
    sound(repo, MAX_DEPTH + 1)


def test_what_was_published_meanwhile_is_seen(repo: Repo) -> None:
    """A writer takes a chunk as a base after its dependants were counted."""
    ids = history(repo, 1)
    repo.on("other").commit({"w": weights(40)})
    far = chunk_of(repo, "other")
    with repo._store.collecting(), Rewriter(repo._store) as rewriter:
        old = row(repo, ids[0])
        rewriter.take(ids[0], old, rewriter.encoded(ids[0], old, far), 0)
        repo.commit({"w": weights(1)})
        newer = chunk_of(repo, "main")
        assert row(repo, newer).base == ids[0]
        assert rewriter.publish() == 0
    assert row(repo, ids[0]) == old


def test_rows_that_moved_meanwhile_are_left(repo: Repo) -> None:
    ids = history(repo, 2)
    with repo._store.collecting(), Rewriter(repo._store) as rewriter:
        old = row(repo, ids[1])
        rewriter.copy(ids[1], old)
        with Rewriter(repo._store) as other:
            other.copy(ids[1], old)
            assert other.publish() == 1
        moved = row(repo, ids[1])
        assert rewriter.publish() == 0
    assert row(repo, ids[1]) == moved
    sound(repo, 2)


def test_copies_are_verbatim_and_damage_is_named(repo: Repo) -> None:
    (id, *_) = history(repo, 1)
    old = row(repo, id)
    path = repo._store.layout.pack(old.pack)
    with repo._store.collecting(), Rewriter(repo._store) as rewriter:
        rewriter.copy(id, old)
        assert rewriter.added == old.cost
        assert rewriter.publish() == 1
        assert rewriter.publish() == 0, "nothing was added since"
    new = row(repo, id)
    assert new._replace(pack=old.pack, offset=old.offset) == old
    path = repo._store.layout.pack(new.pack)
    data = bytearray(path.read_bytes())
    data[new.offset + 200] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with repo._store.collecting(), Rewriter(repo._store) as rewriter:
        with pytest.raises(CorruptionError, match="is damaged"):
            rewriter.copy(id, new)
        with pytest.raises(CorruptionError):
            rewriter.encoded(id, new)
    assert row(repo, id) == new
    assert not list((repo.path / ".ckpt" / "tmp").iterdir()), "what was not published is thrown away"


def test_objects_are_copied_too(repo: Repo) -> None:
    commit = repo.commit({"w": weights(0), "n": 1})
    with repo._store.collecting(), Rewriter(repo._store) as rewriter:
        for id in (commit.id, commit.tree):
            rewriter.copy(id, row(repo, id))
        assert rewriter.publish() == 2
    assert row(repo, commit.id).kind is Kind.COMMIT
    assert repo.checkout("main")["n"] == 1
