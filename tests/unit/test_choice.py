"""How chunks are stored: always exact, chains no deeper than the level allows, and never at the mercy of a
base that is damaged, missing or collected."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np
import pytest

from ckptvcs import Commit, CorruptionError, NotFoundError, ObjectId, Repo
from ckptvcs.ids import Kind, chunk_id
from ckptvcs.state import tensors
from ckptvcs.store import Reader, Store, Writer, codec
from ckptvcs.store.format import MAX_DEPTH, pack_object
from ckptvcs.store.hints import Hint
from ckptvcs.store.index import Row
from ckptvcs.testing.same import difference
from tests.crash.stores import MAIN, Bytes, create, publication, put_root, scratch_folder, tips, verify

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

DEPTHS: Final = {"fast": 0, "balanced": 1, "small": 8}
MIB: Final = 1 << 20


def exact(a: Any, b: Any) -> None:
    """Fail with the place where two states differ."""
    assert difference(a, b) is None, difference(a, b)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory: these tests make many commits."""
    with scratch_folder() as folder:
        yield Path(folder) / "repository"


def weights(seed: int, count: int = 8000, dtype: Any = np.float32) -> Array:
    return (np.random.default_rng(seed).standard_normal(count) * 0.02).astype(dtype)


def drifted(array: Array, seed: int, share: float = 1e-3) -> Array:
    """One step of training: every number moves by a small part of itself."""
    steps = 1 + share * np.random.default_rng([seed, 7]).standard_normal(array.shape)
    return (array.astype(np.float64) * steps).astype(array.dtype)


def chunks(repo: Repo) -> dict[ObjectId, Row]:
    """All chunks that the index knows."""
    with repo._store.snapshot() as snapshot:
        return {id: row for id, row in snapshot.rows_from(b"", 1 << 30) if row.kind is Kind.CHUNK}


def row_of(repo: Repo, array: Array) -> Row:
    """The row of an array of one chunk."""
    return chunks(repo)[chunk_id(array.tobytes())]


def below(rows: dict[ObjectId, Row], row: Row) -> int:
    """Frames below a row, counted along its bases."""
    depth = 0
    while row.base is not None:
        row = rows[row.base]
        depth += 1
    return depth


def checked(repo: Repo, level: str) -> dict[ObjectId, Row]:
    """All chunks; fails if one is deeper than a level allows, or than its row says."""
    rows = chunks(repo)
    for row in rows.values():
        assert below(rows, row) == row.depth <= DEPTHS[level]
        assert (row.base is not None) == (row.codec == codec.DIFFERENCE)
    return rows


def depths(repo: Repo, arrays: Sequence[Array]) -> list[int]:
    return [row_of(repo, array).depth for array in arrays]


def pack_of(repo: Repo, row: Row) -> Path:
    return repo._store.layout.pack(row.pack)


def walk(repo: Repo, states: Sequence[Any]) -> list[Commit]:
    """Commit one state after the other."""
    return [repo.commit(state) for state in states]


def walked(count: int, size: int = 8000, dtype: Any = np.float32, share: float = 1e-3) -> list[Array]:
    """A random walk of weights."""
    found = [weights(0, size, dtype)]
    for seed in range(count - 1):
        found.append(drifted(found[-1], seed, share))
    return found


def all_exact(repo: Repo, commits: Sequence[Commit], states: Sequence[Any]) -> None:
    for commit, state in zip(commits, states, strict=True):
        exact(repo.checkout(commit), state)


# -- levels ---------------------------------------------------------------------------------------


def test_fast_makes_no_frame_that_needs_another(place: Path) -> None:
    states = [{"w": array, "step": at} for at, array in enumerate(walked(8))]
    with Repo.init(place, compression="fast") as repo:
        commits = walk(repo, states)
        checked(repo, "fast")
        all_exact(repo, commits, states)
        assert repo.fsck(full=True).ok


@pytest.mark.parametrize(
    ("dtype", "share"),
    [(np.float32, 1e-5), (ml_dtypes.bfloat16, 8e-4), (np.float64, 1e-5), (np.float16, 1e-4)],
)
def test_balanced_differences_are_one_step_deep(place: Path, dtype: Any, share: float) -> None:
    states = [{"w": array} for array in walked(10, dtype=dtype, share=share)]
    with Repo.init(place, compression="balanced") as repo:
        commits = walk(repo, states)
        rows = checked(repo, "balanced")
        assert {row.depth for row in rows.values()} == {0, 1}
        all_exact(repo, commits, states)
        assert repo.fsck(full=True).ok


@pytest.mark.slow
@pytest.mark.parametrize("level", DEPTHS)
def test_forty_commits_of_a_random_walk_are_exact(place: Path, level: str) -> None:
    states = [
        {"w": a, "half": b, "wide": c}
        for a, b, c in zip(
            walked(40, 5000),
            walked(40, 3000, ml_dtypes.bfloat16, 1e-2),
            walked(40, 2000, np.float64, 1e-6),
            strict=True,
        )
    ]
    with Repo.init(place, compression=level) as repo:
        commits = walk(repo, states)
        rows = checked(repo, level)
        depths = {row.depth for row in rows.values()}
        assert max(depths) == DEPTHS[level], "as deep as allowed, and no deeper"
        all_exact(repo, commits, states)
        assert repo.fsck(full=True).ok
    with Repo.open(place, rebuild=True) as again:
        assert checked(again, level).keys() == rows.keys()
        all_exact(again, commits, states)
        assert again.fsck(full=True).ok


def test_smaller_levels_are_smaller(place: Path) -> None:
    states = [{"w": array} for array in walked(10, 30_000, share=1e-5)]
    stored = []
    for level in DEPTHS:
        with Repo.init(place / level, compression=level) as repo:
            walk(repo, states)
            stored.append(sum(row.stored for row in chunks(repo).values()))
    assert stored == sorted(stored, reverse=True)
    assert stored[2] < stored[1] < stored[0]


@pytest.mark.parametrize(
    "order",
    [
        ["small"] * 10 + ["balanced"] * 3 + ["fast"] * 2 + ["balanced"] * 3 + ["small"] * 3,
        ["fast", "small", "balanced"] * 5,
        ["balanced"] * 3 + ["small"] * 9 + ["balanced"] * 4,
    ],
    ids=["falling", "mixed", "rising"],
)
def test_levels_may_change_with_every_commit(place: Path, order: list[str]) -> None:
    """The depth of new frames keeps to the level in force, whatever lies below."""
    states = [{"w": array} for array in walked(len(order), 4000, share=1e-5)]
    commits = []
    Repo.init(place).close()
    known: set[ObjectId] = set()
    for level, state in zip(order, states, strict=True):
        with Repo.open(place, compression=level) as repo:
            commits.append(repo.commit(state))
            rows = checked(repo, "small")
            new = rows.keys() - known
            assert len(new) == 1
            assert all(rows[id].depth <= DEPTHS[level] for id in new)
            known = set(rows)
            exact(repo.checkout(), state)
    with Repo.open(place) as repo:
        assert {row.depth for row in chunks(repo).values()} > {0}
        all_exact(repo, commits, states)
        assert repo.fsck(full=True).ok
        repo.fsck(rebuild=True)
        all_exact(repo, commits, states)


def test_the_level_of_a_repository_is_its_setting(place: Path) -> None:
    states = [{"w": array} for array in walked(4, 4000, share=1e-5)]
    with Repo.init(place, compression="small") as repo:
        walk(repo, states[:3])
        assert max(row.depth for row in checked(repo, "small").values()) == 2
        repo.configure("compression", "fast")
        repo.commit(states[3])
        assert row_of(repo, states[3]["w"]).depth == 0


# -- what is not stored, and what chains cost -----------------------------------------------------


@pytest.mark.parametrize("level", DEPTHS)
def test_an_unchanged_tensor_adds_no_chunk(place: Path, level: str) -> None:
    frozen, first, second = weights(1), weights(2), drifted(weights(2), 3)
    with Repo.init(place, compression=level) as repo:
        repo.commit({"frozen": frozen, "w": first})
        before = chunks(repo)
        commit = repo.commit({"frozen": frozen, "w": second})
        after = chunks(repo)
        assert after.keys() - before.keys() == {chunk_id(second.tobytes())}
        assert {id: after[id] for id in before} == before
        again = repo.commit({"frozen": frozen, "w": second, "copy": second.copy()})
        assert chunks(repo) == after
        exact(repo.checkout(commit), {"frozen": frozen, "w": second})
        exact(repo.checkout(again), {"frozen": frozen, "w": second, "copy": second})


@pytest.mark.parametrize("level", ["balanced", "small"])
def test_chains_are_renewed_when_siblings_have_grown(place: Path, level: str) -> None:
    """Training moves away from a base; at some time starting anew is cheaper for all that follow."""
    arrays = walked(60, 6000, share=3e-4)
    with Repo.init(place, compression=level) as repo:
        commits = walk(repo, [{"w": array} for array in arrays])
        rows = checked(repo, level)
        found = [rows[chunk_id(array.tobytes())] for array in arrays]
        plain = [row for row in found if row.depth == 0]
        if level == "balanced":
            assert 2 <= len(plain) <= len(arrays) // 3
        assert sum(row.stored for row in found) < 0.9 * len(arrays) * found[0].stored
        assert [row.depth for row in found[: DEPTHS[level] + 1]] == list(range(DEPTHS[level] + 1))
        all_exact(repo, commits[::5], [{"w": array} for array in arrays[::5]])


def test_a_sibling_never_raises_the_mean_of_its_cycle(place: Path) -> None:
    """The rule, counted again from what was stored."""
    arrays = walked(50, 6000, share=3e-4)
    with Repo.init(place, compression="balanced") as repo:
        walk(repo, [{"w": array} for array in arrays])
        rows = chunks(repo)
        sizes: list[int] = []
        base: ObjectId | None = None
        for array in arrays:
            id = chunk_id(array.tobytes())
            row = rows[id]
            if row.base is None:
                base, sizes = id, [row.stored]
                continue
            assert row.base == base, "siblings share the newest base"
            assert len(sizes) < 2 or row.stored <= sum(sizes) / len(sizes)
            sizes.append(row.stored)


def test_a_jump_is_stored_for_itself(place: Path) -> None:
    """A difference to a chunk that has nothing in common would be no smaller."""
    with Repo.init(place, compression="small") as repo:
        for seed in range(4):
            repo.commit({"w": weights(seed, 20_000)})
        noise = [np.random.default_rng(seed).integers(0, 256, 30_000, np.uint8) for seed in range(3)]
        for each in noise:
            repo.commit({"w": each})
        rows = checked(repo, "small")
        assert [rows[chunk_id(each.tobytes())].codec for each in noise] == [codec.RAW] * 3
        assert all(row.stored <= row.raw for row in rows.values())


def test_a_tensor_that_moved_finds_its_base(place: Path) -> None:
    """A numbered folder, or a wrapper, between two saves."""
    first, second = walked(2, 8000, share=1e-5)
    with Repo.init(place, compression="balanced") as repo:
        repo.commit({"checkpoint-500": {"layer.weight": first}})
        repo.commit({"checkpoint-1000": {"module.layer.weight": second}})
        assert row_of(repo, second).base == chunk_id(first.tobytes())
        exact(repo.checkout(), {"checkpoint-1000": {"module.layer.weight": second}})


def test_a_reopened_repository_goes_on_where_it_was(place: Path) -> None:
    """What the last commit held is read from its tree."""
    arrays = walked(6, 8000, share=1e-5)
    Repo.init(place, compression="small").close()
    for array in arrays:
        with Repo.open(place) as repo:
            repo.commit({"w": array})
    with Repo.open(place) as repo:
        assert [row_of(repo, array).depth for array in arrays] == [0, 1, 2, 3, 4, 5]
        assert repo.fsck(full=True).ok


def test_the_base_is_the_parents_content_and_no_other_branchs(place: Path) -> None:
    first, second, third = walked(3, 8000, share=1e-5)
    with Repo.init(place, compression="small") as repo:
        repo.commit({"w": first})
        repo.branch("side", "main")
        side = repo.on("side")
        repo.commit({"w": second})
        side.commit({"w": third})
        assert row_of(repo, second).base == row_of(repo, third).base == chunk_id(first.tobytes())
        exact(side.checkout(), {"w": third})
        exact(repo.checkout("main"), {"w": second})


# -- bases that cannot be had ---------------------------------------------------------------------


def damage(path: Path, at: int) -> None:
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("reopened", [False, True], ids=["same handle", "reopened"])
@pytest.mark.parametrize("how", ["flipped payload", "flipped header", "cut", "missing", "emptied"])
@pytest.mark.parametrize("level", ["balanced", "small"])
@pytest.mark.usefixtures("pack_per_component")
def test_a_parent_that_cannot_be_read_does_not_stop_a_commit(
    place: Path, level: str, how: str, reopened: bool
) -> None:
    """Its trees are whole, its chunk is not: the new chunk is stored for itself."""
    first, second, third = walked(3, 8000, share=1e-5)
    other = weights(9, 500)
    with contextlib.ExitStack() as stack:
        repo = stack.enter_context(Repo.init(place, compression=level))
        repo.commit({"w": first, "x": {"y": other}})
        row = row_of(repo, first)
        path = pack_of(repo, row)
        assert row_of(repo, other).pack != row.pack
        path.chmod(0o644)
        if how == "missing":
            path.unlink()
        elif how == "emptied":
            path.write_bytes(b"")
        elif how == "cut":
            path.write_bytes(path.read_bytes()[: row.offset + 300])
        else:
            damage(path, row.offset + (5 if how == "flipped header" else 104 + row.stored // 2))
        if reopened:
            repo.close()
            repo = stack.enter_context(Repo.open(place))
        repo.commit({"w": second, "x": {"y": other}})
        assert row_of(repo, second).base is None
        exact(repo.checkout(), {"w": second, "x": {"y": other}})
        repo.commit({"w": third, "x": {"y": other}})
        exact(repo.checkout(), {"w": third, "x": {"y": other}})


@pytest.mark.parametrize("level", ["balanced", "small"])
@pytest.mark.usefixtures("pack_per_component")
def test_after_a_base_that_could_not_be_read_differences_are_tried_again(place: Path, level: str) -> None:
    first, second, third = walked(3, 8000, share=1e-5)
    with Repo.init(place, compression=level) as repo:
        repo.commit({"w": first, "x": {"y": weights(9, 500)}})
        pack_of(repo, row_of(repo, first)).unlink()
        for array in (second, third):
            repo.commit({"w": array, "x": {"y": weights(9, 500)}})
        assert row_of(repo, second).base is None
        assert row_of(repo, third).base == chunk_id(second.tobytes())


@pytest.fixture
def pack_per_component(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each component of a commit gets a pack of its own, however small."""
    monkeypatch.setattr("ckptvcs.store.writer._SECTION_BYTES", 1)


@pytest.mark.usefixtures("pack_per_component")
def test_a_parents_tree_that_cannot_be_read_does_not_stop_a_commit(place: Path) -> None:
    first, second = walked(2, 8000, share=1e-5)
    with Repo.init(place, compression="balanced") as repo:
        commit = repo.commit({"w": first, "many": {f"k{at}": "x" * 100 for at in range(100)}})
        with repo._store.snapshot() as snapshot:
            row = snapshot.row(commit.tree)
        assert row is not None
        damage(pack_of(repo, row), row.offset + 104 + row.stored // 2)
    with Repo.open(place) as repo:
        repo.commit({"w": second})
        assert row_of(repo, second).base is None
        exact(repo.checkout(), {"w": second})


@pytest.mark.usefixtures("pack_per_component")
def test_the_same_state_again_heals_a_cut_pack_whose_records_are_there(place: Path) -> None:
    """The chunk's own record, readable but in a broken pack, must not become its own base."""
    arrays = walked(3, 8000, share=1e-5)
    with Repo.init(place, compression="small") as repo:
        for array in arrays:
            repo.commit({"w": array, "v": array[::-1].copy()})
        path = pack_of(repo, row_of(repo, arrays[2]))
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-3])
    with Repo.open(place) as repo:
        state = {"w": arrays[2], "v": arrays[2][::-1].copy(), "more": 1}
        repo.commit(state)
        path.unlink()
        exact(repo.checkout(), state)
        row = row_of(repo, arrays[2])
        assert pack_of(repo, row) != path
        assert row.base != chunk_id(arrays[2].tobytes())
        checked(repo, "small")


@pytest.mark.usefixtures("pack_per_component")
def test_two_tensors_that_change_places_in_a_broken_pack(place: Path) -> None:
    """Each would be the other's base, and both have to be written anew: no circle may come of it."""
    first, second = walked(2, 8000, share=1e-5)
    with Repo.init(place, compression="small") as repo:
        repo.commit({"a": {"w": first, "v": second}})
        path = pack_of(repo, row_of(repo, first))
        assert pack_of(repo, row_of(repo, second)) == path
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-3])
    with Repo.open(place) as repo:
        state = {"a": {"w": second, "v": first}}
        repo.commit(state)
        exact(repo.checkout(), state)
        path.unlink()
        exact(repo.checkout(), state)
        checked(repo, "small")


@pytest.mark.parametrize("level", ["balanced", "small"])
@pytest.mark.usefixtures("pack_per_component")
def test_dependants_outlive_the_branch_of_their_base(place: Path, level: str) -> None:
    arrays = walked(5, 8000, share=1e-5)
    ballast = weights(77, 50_000)
    with Repo.init(place, compression=level) as repo:
        repo.commit({"n": 0})
        side = repo.on("side")
        side.commit({"w": arrays[0], "ballast": ballast})
        for at, array in enumerate(arrays[1:]):
            repo.branch(f"b{at}", "side")
            repo.on(f"b{at}").commit({"w": array})
            side = repo.on(f"b{at}")
            repo.delete_branch("side", force=True)
            repo.branch("side", f"b{at}")
        assert row_of(repo, arrays[-1]).base is not None
        # Commits keep their parents, so what stands for itself is committed anew without one.
        repo.on("alone").commit({"w": arrays[-1]})
        for name in ("side", *(f"b{at}" for at in range(4))):
            repo.delete_branch(name, force=True)
        report = repo.gc(grace=0)
        assert report.freed > 50_000
        rows = checked(repo, level)
        row = rows[chunk_id(arrays[-1].tobytes())]
        assert row.base is not None
        assert len(rows) == 1 + row.depth, "all below it, and nothing else"
        exact(repo.checkout("alone"), {"w": arrays[-1]})
        assert repo.fsck(full=True).ok
        repo.fsck(rebuild=True)
        exact(repo.checkout("alone"), {"w": arrays[-1]})
        assert repo.gc(grace=0).freed == 0
        following = drifted(arrays[-1], 99, 1e-5)
        repo.on("alone").commit({"w": following})
        exact(repo.checkout("alone"), {"w": following})
        repo.delete_branch("alone", force=True)
        repo.gc(grace=0)
        assert chunks(repo) == {}


def collect(store: Store, *ids: ObjectId) -> None:
    """What a collector does to rows, as far as a writer can see it."""
    with store.index.change() as change:
        change.bump_gc_seq()
        for id in ids:
            assert change.delete_row(id)


def put_hinted(writer: Writer, array: Array, base: ObjectId | None) -> ObjectId:
    """Put an array with a base, a tree and a commit of it; the commit."""
    hint = Hint("w", str(array.dtype), lambda offset: base)
    ((id,),) = writer.put([Bytes(array.tobytes(), array.dtype.itemsize)], [hint])
    (tree,) = writer.put_objects(Kind.TREE, [pack_object([(Kind.CHUNK, id)], b"\x90")])
    return put_root(writer, tree)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("level", ["balanced", "small"])
def test_a_base_collected_while_a_difference_is_made(tmp_path: Path, level: str, when: str) -> None:
    """Before it is published the difference is written again, for itself."""
    first, second = walked(2, 8000, share=1e-5)
    base, id = (chunk_id(each.tobytes()) for each in (first, second))
    with contextlib.closing(create(tmp_path)) as store:
        with store.writer(level) as writer:
            old = put_hinted(writer, first, None)
            assert writer.publish(publication(old, None, "refs/heads/old"))
        with store.writer(level) as writer:
            if when == "before":
                collect(store, base)
            root = put_hinted(writer, second, base)
            assert writer._made[id].entry.base == (base if when == "after" else None)
            if when == "after":
                collect(store, base)
            assert writer.publish(publication(root, None))
        assert tips(store)[MAIN] == root
        with store.snapshot() as snapshot:
            row = snapshot.live(id)
        assert row is not None
        assert (row.base, row.depth) == (None, 0)
        with store.reader() as reader:
            assert reader.chunk(id) == second.tobytes()


def test_a_base_deeper_down_collected_while_a_difference_is_made(tmp_path: Path) -> None:
    arrays = walked(5, 8000, share=1e-5)
    ids = [chunk_id(each.tobytes()) for each in arrays]
    with contextlib.closing(create(tmp_path)) as store:
        for at, array in enumerate(arrays[:-1]):
            with store.writer("small") as writer:
                root = put_hinted(writer, array, ids[at - 1] if at else None)
                assert writer.publish(publication(root, None, f"refs/heads/{at}"))
        with store.writer("small") as writer:
            root = put_hinted(writer, arrays[-1], ids[-2])
            assert writer._made[ids[-1]].entry.base == ids[-2]
            collect(store, ids[1])
            assert writer.publish(publication(root, None))
        with store.reader() as reader:
            assert reader.chunk(ids[-1]) == arrays[-1].tobytes()


def test_a_wrong_base_costs_nothing_but_space(tmp_path: Path) -> None:
    """Of another length, another kind, unknown, or the chunk itself."""
    first, second = walked(2, 8000, share=1e-5)
    with contextlib.closing(create(tmp_path)) as store:
        with store.writer("small") as writer:
            root = put_hinted(writer, first[:-1], None)
            assert writer.publish(publication(root, None, "refs/heads/old"))
        wrong = [chunk_id(first[:-1].tobytes()), chunk_id(b"nothing"), root, chunk_id(second.tobytes())]
        for at, base in enumerate(wrong):
            changed = second + np.float32(at)
            with store.writer("small") as writer:
                made = put_hinted(writer, changed, base if at < 3 else chunk_id(changed.tobytes()))
                assert writer.publish(publication(made, None, f"refs/heads/{at}"))
            with store.reader() as reader:
                assert reader.chunk(chunk_id(changed.tobytes())) == changed.tobytes()
        verify(store)


def test_a_collector_between_choice_and_publication_loses_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent's branch goes and is collected while its child is made: an error, or all is there."""
    first, second = walked(2, 8000, share=1e-5)
    with Repo.init(place, compression="balanced") as repo:
        repo.commit({"n": 0})
        repo.on("side").commit({"w": first})
        plain = Writer.publish

        def late(self: Writer, wanted: Any) -> bool:
            monkeypatch.setattr(Writer, "publish", plain)
            with Repo.open(place) as collector:
                collector.delete_branch("side", force=True)
                collector.gc(grace=0)
            return plain(self, wanted)

        job = repo.on("side")
        monkeypatch.setattr(Writer, "publish", late)
        with pytest.raises(NotFoundError, match="parent commit"):
            job.commit({"w": second})
        assert chunks(repo) == {}
        repo.on("again").commit({"w": second})
        exact(repo.checkout("again"), {"w": second})
        assert repo.fsck(full=True).ok


# -- every kind of number, every shape of memory --------------------------------------------------


def edited(array: Array, seed: int) -> Array:
    """Some bytes changed, whatever they mean; most stay."""
    chance = np.random.default_rng([seed, 3])
    changed = bytearray(array.tobytes())
    for at in chance.integers(0, len(changed), max(1, len(changed) // 200)):
        changed[at] ^= int(chance.integers(1, 256)) if array.dtype.kind not in "bU" else 0
    if array.dtype.kind == "b":
        return array ^ (chance.random(array.shape) < 0.01)
    return np.frombuffer(bytes(changed), array.dtype).reshape(array.shape)


DTYPES: Final = [
    *map(np.dtype, "? i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16 S3 V5 V3 M8[ns] m8[25s]".split()),  # noqa: SIM905
    *map(np.dtype, ">i2 >i4 >f4 >f8 >c16 >u8 >M8[D]".split()),  # noqa: SIM905
    *map(
        np.dtype,
        (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4, ml_dtypes.uint4),
    ),
]


def arrays_of_all_kinds(count: int, seed: int) -> dict[str, Array]:
    """Noise and structure of every dtype."""
    chance = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for at, dtype in enumerate(DTYPES):
        if dtype.kind == "b":
            noise = chance.random(count) < 0.5
        else:
            noise = np.frombuffer(chance.bytes(count * dtype.itemsize), dtype)
        found[f"noise {at}"] = noise
        found[f"tiles {at}"] = np.resize(noise[:50], count)
        found[f"zeros {at}"] = np.zeros(count, dtype)
    return found


@pytest.mark.parametrize("level", DEPTHS)
@pytest.mark.parametrize("count", [103, 5000])
def test_numbers_of_every_dtype_come_back(place: Path, level: str, count: int) -> None:
    state = arrays_of_all_kinds(count, 1)
    states = [state]
    for seed in range(4):
        states.append({name: edited(array, seed) for name, array in states[-1].items()})
    with Repo.init(place, compression=level) as repo:
        commits = walk(repo, states)
        all_exact(repo, commits, states)
        checked(repo, level)
        assert repo.fsck(full=True).ok


@pytest.mark.parametrize("level", DEPTHS)
def test_memory_of_every_shape_comes_back(place: Path, level: str) -> None:
    """Strides, reversal, overlap, byte orders, read-only and shared memory."""
    base = weights(1, 40_000).reshape(200, 200)
    commits, states = [], []
    with Repo.init(place, compression=level) as repo:
        for seed in range(4):
            base = drifted(base, seed, 1e-5)
            frozen = base.copy()
            frozen.flags.writeable = False
            askew = np.frombuffer(memoryview(b"x" + base.tobytes())[1:], base.dtype)
            state = {
                "plain": base,
                "transposed": base.T,
                "every third": base[::3, 1::2],
                "reversed": base[::-1, ::-1],
                "one column": base[:, 7],
                "broadcast": np.broadcast_to(base[0], (30, 200)),
                "windows": np.lib.stride_tricks.sliding_window_view(base[0], 100),
                "fortran": np.asfortranarray(base + 1),
                "big-endian": base.astype(">f4"),
                "big-endian strided": base.astype(">f8")[::2, ::-1],
                "frozen": frozen,
                "askew": askew,
                "complex": (base[:50] + 1j * base[50:100]).astype(np.complex64),
            }
            commits.append(repo.commit(state))
            states.append({name: array.copy(order="K") for name, array in state.items()})
            exact(repo.checkout(), states[-1])
        all_exact(repo, commits, states)
        checked(repo, level)
        assert repo.fsck(full=True).ok


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
@pytest.mark.parametrize("level", DEPTHS)
def test_torch_tensors_of_every_dtype_come_back(place: Path, level: str) -> None:
    torch = pytest.importorskip("torch")
    chance = np.random.default_rng(4)
    raw = chance.integers(0, 256, 64_000, np.uint8)
    commits, states = [], []
    with Repo.init(place, compression=level) as repo:
        for _ in range(4):
            raw = raw.copy()
            raw[chance.integers(0, len(raw), 30)] ^= 1
            state = {}
            for name in tensors.TORCH_SIZES:
                bytes_of_it = raw & 1 if name == "bool" else raw
                storage = torch.from_numpy(bytes_of_it.copy()).untyped_storage()
                state[name] = torch.empty(0, dtype=getattr(torch, name)).set_(storage, 0, (4000,), (1,))
            state["transposed"] = state["float32"].as_strided((50, 79), (1, 50))
            commits.append(repo.commit(state))
            states.append(state)
        all_exact(repo, commits, states)
        checked(repo, level)
        assert repo.fsck(full=True).ok


@pytest.mark.parametrize("level", DEPTHS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.complex64, np.int32])
def test_a_last_cell_of_any_length_comes_back(place: Path, level: str, dtype: Any) -> None:
    """A tensor's last cell may hold a single number."""
    states = []
    item = np.dtype(dtype).itemsize
    for rest in (1, 25):
        array = (weights(rest, MIB // item + rest, np.float64) * 100).astype(dtype)
        states.append(
            [{"w": array}, {"w": (array * 0.99).astype(dtype)}, {"w": (array * 0.97).astype(dtype)}]
        )
    for number, each in enumerate(states):
        with Repo.init(place / str(number), compression=level) as repo:
            commits = walk(repo, each)
            all_exact(repo, commits, each)
            checked(repo, level)


@pytest.mark.parametrize("level", DEPTHS)
@pytest.mark.parametrize("rest", [0, 1, 2, 3, 513, 1001])
def test_bytes_and_files_full_of_numbers_come_back(
    place: Path, tmp_path: Path, level: str, rest: int
) -> None:
    """Their last cell need not be a whole number of numbers."""
    content = weights(1, (MIB + MIB // 2) // 4).tobytes() + bytes(range(256)) * 4
    versions = []
    for version in range(3):
        data = bytearray(content[: MIB + MIB // 2 + rest])
        data[version * 1000] ^= 1
        data[MIB + 5 + version] ^= 1
        versions.append(bytes(data))
    with Repo.init(place, compression=level) as repo:
        commits = walk(repo, [{"blob": each, "array": np.frombuffer(each, np.uint8)} for each in versions])
        for commit, each in zip(commits, versions, strict=True):
            exact(repo.checkout(commit), {"blob": each, "array": np.frombuffer(each, np.uint8)})
        checked(repo, level)
    with Repo.init(place / "files", compression=level) as repo:
        for each in versions:
            (tmp_path / "model.bin").write_bytes(each)
            repo.commit_files({"model.bin": tmp_path / "model.bin"})
            assert repo.checkout() == {"model.bin": each}
        assert repo.fsck(full=True).ok


@pytest.mark.parametrize("level", DEPTHS)
def test_numbers_without_a_value_come_back(place: Path, level: str) -> None:
    """NaN, infinities and denormals beside what decays by a factor, at every level."""
    chance = np.random.default_rng(8)
    states = []
    for name, size in (("f4", 4), ("f8", 8), (ml_dtypes.bfloat16, 2), ("f2", 2)):
        dtype = np.dtype(name)
        values = chance.standard_normal(6000).astype(dtype)
        odd = np.frombuffer(chance.bytes(600 * size), f"<u{size}").copy()
        odd[::2] |= np.array(-1, dtype).view(f"<u{size}") * 0 + np.array(np.inf, dtype).view(f"<u{size}")
        series = []
        for step in range(4):
            with np.errstate(all="ignore"):
                values = (values.astype(np.float64) * 0.9).astype(dtype)
            array = values.copy()
            array.view(f"<u{size}")[::10] = odd + (step if size > 2 else 0)
            array.view(f"<u{size}")[1::10] = np.arange(600) + step
            series.append(array)
        states.append(series)
    rounds = [{str(at): array for at, array in enumerate(each)} for each in zip(*states, strict=True)]
    with Repo.init(place, compression=level) as repo:
        commits = walk(repo, rounds)
        all_exact(repo, commits, rounds)
        checked(repo, level)


@pytest.mark.parametrize("level", ["balanced", "small"])
@pytest.mark.parametrize("writer", [False, True], ids=["kept", "flushed"])
def test_states_survive_where_denormals_are_flushed(place: Path, level: str, writer: bool) -> None:
    """Written and read in every combination, on the pool's threads too."""
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot flush denormals on this processor")
    try:
        torch.set_flush_denormal(False)
        base = weights(1, 3 * MIB // 4)
        base.view("<u4")[::3] &= 0x807FFFFF
        states = [{"w": (base.astype(np.float64) * 0.9**step).astype(np.float32)} for step in range(3)]
        torch.set_flush_denormal(writer)
        with Repo.init(place, compression=level) as repo:
            commits = walk(repo, states)
            assert max(row.depth for row in chunks(repo).values()) > 0
        for reader in (False, True):
            torch.set_flush_denormal(reader)
            with Repo.open(place) as repo:
                for commit, state in zip(commits, states, strict=True):
                    assert repo.checkout(commit)["w"].tobytes() == state["w"].tobytes()
                assert repo.fsck(full=True).ok
    finally:
        torch.set_flush_denormal(False)


# -- reading chains -------------------------------------------------------------------------------


def test_a_chain_is_read_into_memory_that_lies_askew(place: Path) -> None:
    arrays = walked(9, 4001, np.float32, 1e-6)
    with Repo.init(place, compression="small") as repo:
        walk(repo, [{"w": array} for array in arrays])
        assert depths(repo, arrays) == list(range(9))
        with repo._store.reader() as reader:
            for offset, array in itertools.product((0, 1, 3, 7), arrays):
                room = bytearray(b"\xa5" * (array.nbytes + 64))
                into = memoryview(room)[16 + offset : 16 + offset + array.nbytes]
                reader.read_parts([(chunk_id(array.tobytes()), into)])
                assert into == array.tobytes()
                assert not set(room[: 16 + offset]) - {0xA5}
                assert not set(room[16 + offset + array.nbytes :]) - {0xA5}


def test_many_threads_read_the_same_chains(place: Path) -> None:
    arrays = walked(9, 20_001, np.float32, 1e-6)
    with Repo.init(place, compression="small") as repo:
        walk(repo, [{"w": array} for array in arrays])
        start = threading.Barrier(4)

        def work(reader: Reader, seed: int) -> bool:
            start.wait()
            order = np.random.default_rng(seed).permutation(len(arrays))
            return all(reader.chunk(chunk_id(raw)) == raw for raw in (arrays[at].tobytes() for at in order))

        with repo._store.reader() as reader, ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, [reader] * 4, range(4))) == [True] * 4


@pytest.mark.parametrize("link", [0, 3, 5])
def test_the_damaged_link_of_a_chain_is_the_one_that_is_named(place: Path, link: int) -> None:
    """What lies above cannot be read, what lies below can, and the next commit does not build on it."""
    arrays = walked(8, 4000, share=1e-6)
    with Repo.init(place, compression="small") as repo:
        commits = walk(repo, [{"w": array} for array in arrays[:-1]])
        row = row_of(repo, arrays[link])
        damage(pack_of(repo, row), row.offset + 104 + row.stored // 2)
        for at, commit in enumerate(commits):
            if at < link:
                exact(repo.checkout(commit), {"w": arrays[at]})
            else:
                with pytest.raises(CorruptionError) as caught:
                    repo.checkout(commit)
                assert caught.value.path == str(pack_of(repo, row))
        assert not repo.fsck(full=True).ok
        repo.commit({"w": arrays[-1]})
        exact(repo.checkout(), {"w": arrays[-1]})


# -- several tensors, threads and kinds of content at once ----------------------------------------


def test_parts_of_their_own_kind_come_back(place: Path) -> None:
    """What suited a tensor's last cell is tried first on the next, which may be of another kind."""
    chance = np.random.default_rng(2)
    cell = MIB // 4
    parts = [
        weights(1, cell),
        np.zeros(cell, np.float32),
        np.frombuffer(chance.bytes(MIB), np.float32),
        np.full(cell, np.pi, np.float32),
        np.where(chance.random(cell) < 0.01, weights(3, cell), 0).astype(np.float32),
        np.arange(cell, dtype=np.float32),
    ]
    orders = [(0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (0, 0, 1, 3, 2, 2)]
    with Repo.init(place, compression="balanced") as repo:
        for order in orders:
            state = {"w": np.concatenate([parts[at] for at in order])}
            changed = {"w": state["w"].copy()}
            changed["w"].view(np.uint32)[::1000] ^= 1
            for each in (state, changed):
                commit = repo.commit(each)
                assert repo.checkout(commit)["w"].tobytes() == each["w"].tobytes()
        assert repo.fsck(full=True).ok
        checked(repo, "balanced")


@pytest.mark.parametrize("level", ["balanced", "small"])
def test_branches_that_commit_side_by_side(place: Path, level: str) -> None:
    """Handles of one store share what was found to suit whom, and scratch memory is each thread's own."""
    start = threading.Barrier(3)
    failures: list[object] = []

    def work(repo: Repo, seed: int) -> None:
        dtype = (np.float32, np.float64, ml_dtypes.bfloat16)[seed]
        states = [
            {"w": array, "v": array[:500].astype(np.float32)}
            for array in walked(6, 20_000 + seed, dtype, share=1e-4)
        ]
        start.wait()
        try:
            commits = walk(repo, states)
            all_exact(repo, commits, states)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    with Repo.init(place, compression=level) as repo:
        repo.commit({"w": weights(0, 20_000)})
        threads = [threading.Thread(target=work, args=(repo.on(f"b{seed}"), seed)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        checked(repo, level)
        assert repo.fsck(full=True).ok


def test_a_tensor_that_is_changed_in_place_between_commits(place: Path) -> None:
    """As every optimizer does: nothing of the memory that was committed may be kept by reference."""
    array = weights(1, 50_000)
    with Repo.init(place, compression="small") as repo:
        kept = []
        for step in range(6):
            kept.append((repo.commit({"w": array, "step": step}), array.copy()))
            array *= np.float32(0.999)
            array[:: step + 2] += np.float32(1e-4)
        for step, (commit, before) in enumerate(kept):
            exact(repo.checkout(commit), {"w": before, "step": step})


def test_many_cells_on_the_pool_come_back(place: Path) -> None:
    """More cells than threads and tasks, each with a base of its own."""
    states = []
    array = weights(1, 9 * MIB // 4 + 77)
    for seed in range(3):
        array = drifted(array, seed, 1e-5)
        states.append({"w": array, "tied": array[1000:], "late": array[::-1]})
    with Repo.init(place, compression="balanced") as repo:
        commits = walk(repo, states)
        for commit, state in zip(commits, states, strict=True):
            back = repo.checkout(commit)
            assert all(back[name].tobytes() == state[name].tobytes() for name in state)
        rows = checked(repo, "balanced")
        assert sum(row.depth == 1 for row in rows.values()) > 15


@pytest.mark.slow
@pytest.mark.parametrize("level", DEPTHS)
def test_tensors_that_share_memory_come_back(place: Path, level: str) -> None:
    """Chunks are decoded in place, by several threads: two of them must not work on the same bytes."""
    array = weights(1, 5 * MIB // 2)
    states = []
    with Repo.init(place, compression=level) as repo:
        for seed in range(3):
            array = drifted(array, seed, 1e-5)
            views = {str(at): array[at:] for at in (0, 1, 17, 1000, MIB // 4, MIB // 2 + 3)}
            states.append({"base": array, "views": views, "small": array[50:60], "again": array})
            repo.commit(states[-1])
        back = repo.checkout()
        assert np.shares_memory(back["base"], back["views"]["17"])
        exact(states[-1], back)
        into = {"base": array.copy()}
        into |= {"views": {name: into["base"][int(name) :] for name in views}}
        into |= {"small": into["base"][50:60], "again": into["base"]}
        into["base"][:] = 0
        repo.restore(into)
        exact(into, states[-1])
        for commit, state in zip(reversed([*repo.log()]), states, strict=True):
            exact(repo.checkout(commit), state)


@pytest.mark.parametrize("level", DEPTHS)
def test_the_same_states_are_the_same_trees_at_every_level(place: Path, level: str) -> None:
    """How a chunk is stored is no part of what it is."""
    states = [{"w": array} for array in walked(3, 3000)]

    def trees(chosen: str, where: Path) -> list[ObjectId]:
        with Repo.init(where, compression=chosen) as repo:
            return [commit.tree for commit in walk(repo, states)]

    assert trees(level, place / "a") == trees("fast", place / "b")


def test_a_state_of_few_bytes_needs_no_base(place: Path) -> None:
    """Chunks around the sizes from which planes and differences are tried."""
    sizes = (257, 300, 511, 512, 513, 515, 520, 1023, 1024, 1025)
    for level in DEPTHS:
        with Repo.init(place / level, compression=level) as repo:
            for step in range(4):
                state: dict[str, Any] = {
                    str(size): bytes((at * at + step) % 251 for at in range(size)) for size in sizes
                }
                state |= {f"f{size}": weights(1, size // 4) * np.float32(0.9**step) for size in sizes}
                state |= {f"h{size}": weights(1, size // 2, np.float16) for size in sizes}
                state |= {f"d{size}": weights(1, size // 8 + 1, np.float64) * 0.9**step for size in sizes}
                repo.commit(state)
                exact(repo.checkout(), state)
            checked(repo, level)
            assert repo.fsck(full=True).ok


@pytest.mark.parametrize("depth", range(1, MAX_DEPTH + 1))
def test_a_chain_goes_on_from_any_depth_at_any_level(place: Path, depth: int) -> None:
    """After a change of level the new frame finds a base that is shallow enough."""
    arrays = walked(depth + 3, 4000, share=1e-6)
    with Repo.init(place, compression="small") as repo:
        walk(repo, [{"w": array} for array in arrays[: depth + 1]])
        assert depths(repo, arrays[: depth + 1]) == list(range(depth + 1))
    with Repo.open(place, compression="balanced") as repo:
        repo.commit({"w": arrays[depth + 1]})
        row = row_of(repo, arrays[depth + 1])
        assert (row.depth, row.base) == (1, chunk_id(arrays[0].tobytes()))
    with Repo.open(place, compression="fast") as repo:
        repo.commit({"w": arrays[depth + 2]})
        assert row_of(repo, arrays[depth + 2]).depth == 0
        for back, array in itertools.zip_longest(reversed([*repo.log()]), arrays):
            exact(repo.checkout(back), {"w": array})


def test_what_was_chosen_is_never_larger_than_the_content(place: Path) -> None:
    chance = np.random.default_rng(1)
    with Repo.init(place, compression="small") as repo:
        for seed in range(3):
            repo.commit({str(n): np.frombuffer(chance.bytes(8 * n), np.float64) for n in (40, 100, 5000)})
            repo.commit({str(n): weights(seed, n, np.float64) for n in (40, 100, 5000)})
        for row in chunks(repo).values():
            assert row.stored <= row.raw
            assert math.isclose(row.cost, row.stored, abs_tol=400)
