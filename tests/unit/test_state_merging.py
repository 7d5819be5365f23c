"""Merged trees: formulas against an independent implementation, conflicts, what is kept, shared memory."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from ckptvcs import (
    ConflictError,
    DroppedError,
    InvalidError,
    LineageError,
    MergeConflictError,
    NotFoundError,
    ObjectId,
    Repo,
)
from ckptvcs.state import tree
from ckptvcs.state.averaging import MERGEABLE, formula
from ckptvcs.state.merging import MergeReport, Rules, merge
from ckptvcs.store.format import GRIDS
from ckptvcs.store.journal import Drop
from ckptvcs.testing.memory import MemoryStore
from ckptvcs.testing.same import difference
from ckptvcs.testing.strategies import states
from tests.peaks import PEAK

TINY = dataclasses.replace(GRIDS[1], chunk=16, inline=8, chunk_list=2, subtree=80, list_page=2, map_page=2)


def merged(
    *sides: Any,
    base: Any = None,
    strategy: str = "mean",
    weights: Sequence[float] | None = None,
    store: MemoryStore | None = None,
    **rules: Any,
) -> tuple[Any, MergeReport]:
    """States merged in a store of very small pieces, and read back."""
    store = store or MemoryStore(TINY)
    trees = [tree.write(store, side).tree for side in sides]
    below = None if base is None else tree.write(store, base).tree
    store.chunks_read.clear()
    made = Rules(formula(strategy, weights, len(sides)), **rules)
    written, report = merge(store, store, trees, below, made)
    return tree.read(store, written.tree), report


def conflicts(*sides: Any, **more: Any) -> dict[str, str]:
    with pytest.raises(MergeConflictError) as refused:
        merged(*sides, **more)
    assert "\n" not in str(refused.value)
    return dict(refused.value.conflicts)


# -- formulas ------------------------------------------------------------------------------------------


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def nearest(exact: np.ndarray[Any, Any], kind: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Rounded to nearest, ties to even: for small types by looking at all numbers there are."""
    if kind.name in ("float32", "float64", "complex64", "complex128"):
        with np.errstate(over="ignore"):
            return exact.astype(kind)
    count = 1 << 8 * kind.itemsize
    codes = np.arange(count, dtype=f"u{kind.itemsize}")
    with np.errstate(invalid="ignore"):
        values = codes.view(kind).astype(np.float64)
    usable = np.isfinite(values) & ~((values == 0) & (codes != 0))
    order = np.argsort(values[usable], kind="stable")
    steps, patterns = values[usable][order], codes[usable][order]
    found = np.empty(exact.shape, kind)
    for at in np.ndindex(exact.shape):
        wanted = exact[at]
        if not math.isfinite(wanted):
            found[at] = wanted
            continue
        above = int(np.searchsorted(steps, wanted))
        around = [place for place in (above - 1, above) if 0 <= place < len(steps)]
        gaps = [abs(steps[place] - wanted) for place in around]
        best = [place for place, gap in zip(around, gaps, strict=True) if gap == min(gaps)]
        chosen = best[0] if len(best) == 1 else next(p for p in best if patterns[p] % 2 == 0)
        found[at] = patterns[chosen : chosen + 1].view(kind)[0]
    return found


def expected(
    strategy: str, weights: Sequence[float] | None, sides: Sequence[Any], base: Any
) -> np.ndarray[Any, Any]:
    """The formulas of docs/concepts, written anew, element by element; complex numbers are two."""
    paired = sides[0].dtype.kind == "c"

    def numbers(side: Any) -> list[float]:
        with np.errstate(invalid="ignore"):
            wide = side.astype(np.complex128 if paired else np.float64)
        return [float(each) for each in wide.ravel().view(np.float64)]

    rows = [numbers(side) for side in sides]
    count = len(sides)
    if strategy == "slerp":
        dot = math.fsum(a * b for a, b in zip(*rows, strict=True))
        norms = [math.sqrt(math.fsum(each**2 for each in row)) for row in rows]
        t = 0.5 if weights is None else weights[-1] / (sum(weights) if len(weights) == 2 else 1)
        factors = [1 - t, t]
        if all(norms) and abs(dot / norms[0] / norms[1]) <= 0.9995:
            angle = math.acos(dot / norms[0] / norms[1])
            factors = [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    out = []
    for at in range(len(rows[0])):
        xs = [row[at] for row in rows]
        if strategy == "mean":
            out.append(sum(xs[1:], xs[0]) / count)
        elif strategy == "weighted":
            assert weights is not None
            terms = [w / math.fsum(weights) * x for w, x in zip(weights, xs, strict=True)]
            out.append(sum(terms[1:], terms[0]))
        elif strategy == "slerp":
            out.append(factors[0] * xs[0] + factors[1] * xs[1])
        else:
            b = numbers(base)[at]
            terms = [w * (x - b) for w, x in zip(weights or [1.0] * count, xs, strict=True)]
            out.append(sum(terms, b))
    return np.array(out).view(np.complex128 if paired else np.float64).reshape(sides[0].shape)


CASES: list[tuple[str, list[float] | None, int]] = [
    ("mean", None, 2),
    ("mean", None, 3),
    ("weighted", [0.7, 0.2], 2),
    ("weighted", [3, -1, 2], 3),
    ("slerp", None, 2),
    ("slerp", [0.3], 2),
    ("slerp", [1, 3], 2),
    ("task-arithmetic", None, 2),
    ("task-arithmetic", [0.3, 0.5, -0.2], 3),
]


@pytest.mark.parametrize("name", sorted(MERGEABLE))
@pytest.mark.parametrize(("strategy", "weights", "count"), CASES)
def test_formulas(strategy: str, weights: list[float] | None, count: int, name: str) -> None:
    rng = np.random.default_rng(11)
    kind = dtype_of(name)

    def made() -> Any:
        x = rng.standard_normal((5, 9)) * 2
        return (x + 1j * rng.standard_normal((5, 9)) if kind.kind == "c" else x).astype(kind)

    sides, base = [made() for _ in range(count)], made()
    given_base = base if strategy == "task-arithmetic" else None
    found, report = merged(
        *({"w": side} for side in sides),
        base=None if given_base is None else {"w": given_base},
        strategy=strategy,
        weights=weights,
    )
    assert report.averaged == ["w"]
    exact = expected(strategy, weights, sides, given_base)
    wanted = nearest(exact, kind)
    if strategy == "slerp":  # angles are sums over the tensor, whose order is free
        step = np.abs(found["w"].astype(exact.dtype) - exact)
        assert (step <= np.abs(wanted.astype(exact.dtype) - exact) + 1e-12).all()
    else:
        assert found["w"].dtype == kind
        assert found["w"].tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float16"])
def test_halfway_numbers_are_rounded_to_even_and_once(name: str) -> None:
    """Means of neighbours lie halfway; those of three numbers near a half must not be rounded twice."""
    kind = dtype_of(name)
    codes = np.arange(1, 1 + min(2000, (1 << 8 * kind.itemsize) // 4), dtype=f"u{kind.itemsize}")
    a, b = codes.view(kind), (codes + 1).astype(codes.dtype).view(kind)
    keep = np.isfinite(a.astype(np.float64)) & np.isfinite(b.astype(np.float64))
    a, b = a[keep], b[keep]
    found, _ = merged({"w": a}, {"w": b})
    exact = (a.astype(np.float64) + b.astype(np.float64)) / 2
    assert found["w"].tobytes() == nearest(exact, kind).tobytes()
    shares = [0.5 + 1e-12, 0.5 - 1e-12]
    found, _ = merged({"w": a}, {"w": b}, strategy="weighted", weights=shares)
    near = nearest(expected("weighted", shares, [a, b], None), kind)
    assert found["w"].tobytes() == near.tobytes()


@pytest.mark.parametrize("strategy", ["mean", "weighted", "slerp", "task-arithmetic"])
def test_scalars_empty_and_parallel(strategy: str) -> None:
    weights = [1.0, 3.0] if strategy == "weighted" else None
    one = {"scalar": np.array(1.0), "empty": np.zeros((0, 3)), "zero": np.zeros(5), "line": np.arange(4.0)}
    other = {"scalar": np.array(2.0), "empty": np.zeros((0, 3)), "zero": np.ones(5), "line": -np.arange(4.0)}
    base = one if strategy == "task-arithmetic" else None
    found, _ = merged(one, other, strategy=strategy, weights=weights, base=base)
    for name in one:
        wanted = expected(strategy, weights, [one[name], other[name]], None if base is None else base[name])
        assert found[name].shape == one[name].shape
        np.testing.assert_array_equal(found[name], wanted)


def test_not_finite_numbers() -> None:
    nan, inf = math.nan, math.inf
    one = np.array([nan, inf, inf, -inf, 1.0, nan], np.float32)
    other = np.array([1.0, 1.0, -inf, -inf, 3.0, nan], np.float32)
    found, report = merged({"w": one}, {"w": other})
    np.testing.assert_array_equal(found["w"], np.array([nan, inf, nan, -inf, 2, nan], np.float32))
    assert report.overflowed == {}
    bits = np.array([[0x7FC12345, 0xFF8ABCDE, n, n] for n in (0, 1 << 30)], np.uint32)  # NaNs of two kinds
    found, _ = merged(*({"w": each.view(np.float32)} for each in bits))
    assert found["w"].view(np.uint32)[:2].tolist() == bits[0][:2].tolist()  # what all have stays to the bit
    found, _ = merged(
        {"w": np.array([inf, 1.0])}, {"w": np.array([inf, 2.0])}, strategy="task-arithmetic",
        base={"w": np.array([inf, 0.0])},
    )  # fmt: skip
    np.testing.assert_array_equal(found["w"], [inf, 3])
    assert "NaN" in conflicts({"w": one}, {"w": other}, strategy="slerp")["w"]


def test_overflow_is_counted() -> None:
    big = np.full(40, 60000, np.float16)
    found, report = merged(
        {"w": big}, {"w": big * np.float16(0.9)}, strategy="task-arithmetic", base={"w": big * np.float16(0)}
    )
    assert np.isinf(found["w"]).all()
    assert report.overflowed == {"w": 40}


def test_what_all_have_stays_under_a_formula_that_would_move_it() -> None:
    """0.1 a + 0.2 a + 0.7 a need not be a."""
    rng = np.random.default_rng(2)
    common = rng.standard_normal(400)
    sides = [np.append(common, n) for n in range(3)]
    found, _ = merged(*({"w": side} for side in sides), strategy="weighted", weights=[0.1, 0.2, 0.7])
    assert found["w"][:400].tobytes() == common.tobytes()
    # With a base that differs it does not stay.
    found, _ = merged(
        {"w": common}, {"w": common}, strategy="task-arithmetic", base={"w": common - 1}, weights=[1, 1]
    )
    np.testing.assert_allclose(found["w"], common + 1)


@pytest.mark.parametrize(
    ("strategy", "weights", "sides"),
    [
        ("median", None, 2), ("mean", [1, 1], 2), ("weighted", None, 2), ("weighted", [1], 2),
        ("weighted", [1, -1], 2), ("weighted", [math.nan, 1], 2), ("slerp", None, 3), ("slerp", [1, 2, 3], 2),
        ("task-arithmetic", [1], 2),
    ],
)  # fmt: skip
def test_weights_that_mean_nothing(strategy: str, weights: Any, sides: int) -> None:
    with pytest.raises(InvalidError):
        formula(strategy, weights, sides)


# -- conflicts and sides -------------------------------------------------------------------------------


def test_all_conflicts_are_listed_at_once() -> None:
    w = np.ones(5, np.float32)
    one = {
        "gone": w, "shape": w, "dtype": w, "int": np.arange(3), "bool": np.array([True]),
        "step": 1, "same": 1, "kind": {"a": 1}, "list": [1, 2], "text": "a" * 200, "nan": math.nan,
        "tensor": w, "deep": {"x": {"y": 1}},
        "sparse": torch.eye(2).to_sparse(), "rng": random.Random(1),
        "f8": np.ones(3, ml_dtypes.float8_e8m0fnu),
    }  # fmt: skip
    other = {
        **one, "shape": np.ones(6, np.float32), "dtype": np.ones(5), "int": np.arange(3) + 1,
        "bool": np.array([False]), "step": 2, "kind": [1], "list": [1], "text": "b" * 200, "tensor": 1,
        "deep": {"x": {"y": 2}}, "new": w, "sparse": torch.zeros(2, 2).to_sparse(), "rng": random.Random(2),
        "f8": np.full(3, 2, ml_dtypes.float8_e8m0fnu),
    }  # fmt: skip
    del other["gone"]
    found = conflicts(one, other)
    assert set(found) == {
        "gone", "shape", "dtype", "int", "bool", "step", "kind", "list/1", "text", "tensor", "deep/x/y",
        "new",
        "sparse", "rng", "f8",
    }  # fmt: skip
    assert found["gone"] == "missing in the second"
    assert found["new"] == "missing in the first"
    assert found["step"] == "1 or 2"
    assert found["shape"] == "float32[5] or float32[6]"
    assert found["kind"] == "a dict here, a list there"
    for prefer, wanted in (("ours", one), ("theirs", other)):
        state, report = merged(one, other, prefer=prefer)
        assert (
            difference(
                {**wanted, "same": 1}, dict(sorted(state.items(), key=lambda e: [*wanted].index(e[0])))
            )
            is None
        )
        assert set(dict(report.settled)) == set(found)
    assert set(conflicts(one, other, ours=["gone", "s*", "d**"], theirs=["new", "list", "text"])) == {
        "int", "bool", "kind", "tensor", "rng", "f8",
    }  # fmt: skip
    state, _ = merged(one, other, only=["shape*", "same"], ours=["shape"], theirs=["deep", "new", "gone"])
    assert state["deep"] == {"x": {"y": 2}}
    assert list(state) == [*(name for name in one if name != "gone"), "new"]
    assert state["step"] == 1


def test_patterns_that_match_nothing_or_both() -> None:
    state = {"a": {"b": 1}, "c": 2}
    with pytest.raises(NotFoundError, match="nothing in these commits matches 'd'"):
        merged(state, state, ours=["d"])
    with pytest.raises(NotFoundError, match="'a/x'"):
        merged(state, state, only=["a/x"])
    with pytest.raises(InvalidError, match="both sides"):
        merged(state, state, ours=["a"], theirs=["a"])
    merged(state, state, theirs=["a/b"], only=["c"])


def test_entries_of_lists_cannot_be_missing_in_the_middle() -> None:
    w = [np.ones(3), np.ones(3), np.ones(3)]
    assert "entries would be missing" in conflicts({"l": w}, {"l": w[:1]}, theirs=["l/1"], ours=["l/2"])["l"]
    state, _ = merged({"l": w}, {"l": w[:1]}, theirs=["l/1", "l/2"])
    assert len(state["l"]) == 1
    state, _ = merged({"l": w[:1]}, {"l": w}, theirs=["l/1", "l/2"])
    assert len(state["l"]) == 3


Point = collections.namedtuple("Point", "x y")


def test_containers_keep_their_kinds_and_attributes() -> None:
    def made(n: float) -> Any:
        metadata = collections.OrderedDict(w=torch.full((20,), n))
        metadata._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
        return {
            "od": metadata, "point": Point(torch.full((3,), n), 1), "tuple": (torch.full((3,), n),),
            "dd": collections.defaultdict(list, a=torch.full((9,), n)),
            "dq": collections.deque([n * np.ones(9)], 4),
            3: {None: torch.full((9,), n)}, "param": torch.nn.Parameter(torch.full((9,), n)),
            "order": torch.full((3, 4), n).t().contiguous().t(), "be": np.full(9, n, ">f4"),
        }  # fmt: skip

    state, report = merged(made(1.0), made(3.0))
    assert difference(made(2.0), state) is None
    assert state["od"]._metadata == {"": {"version": 1}}
    assert len(report.averaged) == 9


# -- what is read --------------------------------------------------------------------------------------


def test_equal_leaves_are_not_read() -> None:
    store = MemoryStore(TINY)
    one = {"same": np.arange(100.0), "w": np.arange(10.0), "blob": "x" * 500, "many": np.zeros(64)}
    other = {**one, "w": np.arange(10.0) + 1, "many": np.append(np.zeros(63), 1)}
    trees = [tree.write(store, side).tree for side in (one, other)]
    written, report = merge(store, store, trees, None, Rules(formula("mean", None, 2)))
    assert report.averaged == ["w", "many"]
    assert report.kept == 1
    # Five cells of w on each side, and of `many` each equal cell once and the other twice.
    assert len(store.chunks_read) == 10 + 31 + 2
    np.testing.assert_array_equal(tree.read(store, written.tree)["w"], one["w"] + 0.5)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(states, states)
def test_a_part_goes_by_its_ids(state: Any, other: Any) -> None:
    """Anything on top of anything else is the tree that committing it would give, and no chunk is read."""
    store = MemoryStore(TINY)
    trees = [tree.write(store, {"top": each, "stays": 1}).tree for each in (other, state)]
    store.chunks_read.clear()
    written, _ = merge(store, store, trees, None, Rules(theirs=["**"]))
    assert store.chunks_read == []
    plain = tree.write(store, {"top": state, "stays": 1})
    assert written.tree == plain.tree
    assert written.sizes == plain.sizes
    written, _ = merge(store, store, trees, None, Rules(theirs=["top"]))
    assert written.tree == plain.tree


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(states)
def test_merging_equal_states_gives_the_same_tree(state: Any) -> None:
    store = MemoryStore(TINY)
    first = tree.write(store, {"top": state}).tree
    store.chunks_read.clear()
    written, report = merge(store, store, [first, first], None, Rules(formula("mean", None, 2)))
    assert written.tree == first
    assert (report.averaged, store.chunks_read) == ([], [])


# -- shared memory -------------------------------------------------------------------------------------


class Tied(torch.nn.Module):
    """A model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_stay_tied_and_restore_into_the_model(tmp_path: Path) -> None:
    model = Tied()
    with Repo.init(tmp_path) as repo:
        start = repo.commit({"model": model, "n": np.ones(3)})
        one = model.embed.weight.detach().clone().double()
        side = repo.on("side")
        side.restore({"model": model, "n": np.ones(3)}, start)
        with torch.no_grad():
            model.embed.weight.add_(2)
        other = side.commit({"model": model, "n": np.ones(3)})
        for strategy in ("mean", "slerp"):
            branch = repo.on(strategy)
            made = branch.merge(start, other, strategy=strategy)
            fresh = Tied()
            branch.restore({"model": fresh, "n": np.zeros(3)})
            assert fresh.head.weight is fresh.embed.weight
            if strategy == "mean":
                assert torch.equal(fresh.embed.weight, ((one + model.embed.weight) / 2).float())
            assert set(made.averaged) == {"model/embed.weight", "model/head.weight"}
        with pytest.raises(MergeConflictError, match=r"shares memory with model/head\.weight"):
            repo.merge(start, other, ours=["model/embed*"])
        with pytest.raises(MergeConflictError, match="shares memory"):
            repo.cherry_pick(other, "model/head*", onto=start)


def test_shared_on_one_side_only() -> None:
    w, v = torch.ones(6), torch.zeros(6)
    found = conflicts({"a": w, "b": w}, {"a": v, "b": v.clone()})
    assert set(found) == {"a", "b"}
    assert "some sides only" in found["a"]
    state, _ = merged({"a": w, "b": w}, {"a": v, "b": v.clone()}, ours=["*"])
    assert state["a"].data_ptr() == state["b"].data_ptr()


def test_views_that_overlap_in_part() -> None:
    def made(n: float) -> Any:
        base = torch.arange(40.0) * n
        return {"a": base[:30], "b": base[10:], "same": torch.ones(3)}

    state, _ = merged(made(1), made(2))
    assert difference(made(1.5), state) is None
    assert "slerp would tear" in conflicts(made(1), made(-2), strategy="slerp")["a"]

    def half(n: float) -> Any:
        base = torch.ones(40)
        base[35:] = n
        return {"a": base[:30], "b": base[10:]}

    store = MemoryStore(TINY)
    state, report = merged(half(1), half(2), store=store)
    assert report.averaged == ["b"]
    assert difference(half(1.5), state) is None


def test_groups_of_two_trees_do_not_become_one() -> None:
    a, b = torch.ones(6), torch.zeros(6)
    one = {"model": [a, a], "optimizer": [a.clone(), a.clone()]}
    other = {"optimizer": [b, b], "model": [b.clone(), b.clone()]}
    store = MemoryStore(TINY)
    trees = [tree.write(store, state).tree for state in (one, other)]
    written, _ = merge(store, store, trees, None, Rules(theirs=["optimizer"]))
    state = tree.read(store, written.tree)
    assert difference({"model": [a, a], "optimizer": [b, b]}, state) is None
    assert written.tree == tree.write(store, {"model": [a, a], "optimizer": [b, b]}).tree
    # One of a group alone shares nothing.
    written, _ = merge(store, store, trees, None, Rules(theirs=["model"], ours=["optimizer"]))
    assert written.tree == tree.write(store, {"model": [b, b.clone()], "optimizer": [a, a.clone()]}).tree


# -- commits -------------------------------------------------------------------------------------------


def two_branches(folder: Path) -> tuple[Repo, ObjectId, ObjectId, ObjectId]:
    """A repository, the fork point, and the tips of main and side."""
    repo = Repo.init(folder)
    start = repo.commit({"model": {"w": np.zeros(300)}, "step": 1}, step=1, config={"lr": 1}).id
    one = repo.commit({"model": {"w": np.ones(300)}, "step": 2}, step=2, config={"lr": 2}).id
    side = repo.on("side")
    side.restore({"model": {"w": np.zeros(300)}, "step": 1}, start)
    other = side.commit({"model": {"w": np.full(300, 5.0)}, "step": 3}, step=3).id
    return repo, start, one, other


def test_a_merge_is_a_commit_with_all_parents(tmp_path: Path) -> None:
    repo, start, one, other = two_branches(tmp_path)
    with repo:
        made = repo.merge("side", prefer="ours", metrics={"loss": 1.0}, tags=["soup"]).commit
        assert made.parents == (one, other)
        assert made.origin == one
        assert not made.fresh_start
        assert (made.step, made.config, made.metrics) == (2, {"lr": 2}, {"loss": 1.0})
        assert made.environment["merge"] == {"strategy": "mean", "weights": [1.0, 1.0], "prefer": "ours"}
        assert repo.resolve("HEAD").id == repo.resolve("soup").id == made.id
        np.testing.assert_array_equal(repo.checkout(only="model")["model"]["w"], np.full(300, 3.0))
        # The handle's state is not that of the merge.
        with pytest.raises(LineageError, match="restored"):
            repo.commit({"model": {"w": np.ones(300)}, "step": 4})
        repo.restore({"model": {"w": np.ones(300)}, "step": 4})
        repo.commit({"model": {"w": np.ones(300)}, "step": 4})
        new = repo.on("new").merge(one, other, start, only="model", strategy="weighted", weights=[1, 1, 2])
        assert new.commit.parents == (one, other, start)
        np.testing.assert_array_equal(
            repo.checkout(new.commit, only="model")["model"]["w"], np.full(300, 1.5)
        )
        task = repo.on("task").merge(one, other, strategy="task-arithmetic", prefer="theirs").commit
        assert task.environment["merge"]["base"] == str(start)
        np.testing.assert_array_equal(repo.checkout(task)["model"]["w"], np.full(300, 6.0))
        assert repo.fsck(full=True).problems == []


def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    repo, start, one, other = two_branches(tmp_path)
    with repo:
        refs = repo.branches()
        for call in (
            lambda: repo.merge(other, one),
            lambda: repo.merge(one, one),
            lambda: repo.merge(one),
            lambda: repo.merge(one, other),
            lambda: repo.merge(one, other, start, theirs="model"),
            lambda: repo.merge(one, other, base=start),
            lambda: repo.merge(one, other, prefer="mine"),
            lambda: repo.merge(one, other, strategy="mode"),
            lambda: repo.cherry_pick(one, "model"),
            lambda: repo.cherry_pick(other, ()),
            lambda: repo.cherry_pick(other, "modle"),
            lambda: repo.on("x").merge(start, other, one, strategy="task-arithmetic"),
        ):
            with pytest.raises((InvalidError, LineageError, NotFoundError)):
                call()
        assert repo.branches() == refs
        # The handle goes on as before.
        repo.commit({"model": {"w": np.ones(300)}, "step": 4})


def test_a_race_is_lost_like_any_other(tmp_path: Path) -> None:
    repo, _, one, _ = two_branches(tmp_path)
    with repo, Repo.open(tmp_path) as second:
        state = {"model": {"w": np.zeros(300)}, "step": 1}
        second.restore(state)

        def interfere(_: str) -> None:
            if second.resolve("main").id == one:
                second.commit(state)

        with pytest.raises(ConflictError) as lost:
            repo.merge("side", prefer="ours", strategy="slerp", say=interfere)
        assert lost.value.rescued in repo.lost()


def test_a_collector_beside_a_merge(tmp_path: Path) -> None:
    """What it takes while a merge is being made is not referred to: the merge is refused, or all is there."""
    repo, _, one, other = two_branches(tmp_path)
    with repo, Repo.open(tmp_path) as second:

        def collect(_: str) -> None:
            second.delete_branch("side", force=True)
            assert second.gc(grace=0).commits == 1

        with pytest.raises(NotFoundError, match="was deleted while it was being read"):
            repo.merge(one, other, prefer="theirs", strategy="slerp", say=collect)
        assert repo.resolve("main").id == one
        assert repo.fsck(full=True).problems == []

    with Repo.init(tmp_path / "again") as repo, Repo.open(tmp_path / "again") as second:
        state = {"w": np.ones(300), "kept": np.arange(400.0)}
        repo.commit(state)
        repo.on("side").commit({**state, "w": np.full(300, 3.0)})
        repo.on("waste").commit({"x": np.arange(999.0)})

        def collect_waste(_: str) -> None:
            second.delete_branch("waste", force=True)
            assert second.gc(grace=0).commits == 1

        made = repo.merge("main", "side", strategy="slerp", say=collect_waste)
        assert difference({**state, "w": np.full(300, 2.0)}, repo.checkout(made.commit)) is None
        assert repo.fsck(full=True).problems == []


def test_cherry_pick_takes_the_optimizer_of_another_run(tmp_path: Path) -> None:
    model = torch.nn.Linear(30, 30)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer}

    def train() -> None:
        model(torch.randn(5, 30)).sum().backward()
        optimizer.step()

    train()
    with Repo.init(tmp_path) as repo:
        start = repo.commit(state)
        train()
        one = repo.commit(state, step=7)
        side = repo.on("side")
        side.restore(state, start)
        train()
        other = side.commit(state)
        made = repo.cherry_pick("side", "optimizer")
        assert made.commit.parents == (one.id, other.id)
        assert made.commit.step == 7
        assert made.commit.report is not None
        assert made.commit.report.new < 1000
        assert repo.diff(one, made.commit, only="model").comparison.changes == []
        assert repo.diff(other, made.commit, only="optimizer").comparison.changes == []
        assert repo.restore(state).commit == made.commit
        train()
        repo.commit(state)


def test_files_beside_states(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name * 300)
    torch.save({"w": torch.ones(500)}, tmp_path / "m.pt")
    folder = {"same/m.pt": tmp_path / "m.pt"}
    with Repo.init(tmp_path) as repo:
        start = repo.commit({"w": np.zeros(30)}, files=folder)
        one = repo.commit({"w": np.ones(30)}, files={**folder, "t": tmp_path / "a.txt"})
        side = repo.on("side")
        side.restore({"w": np.zeros(30)}, start)
        side.commit({"w": np.zeros(30)}, files={**folder, "t": tmp_path / "b.txt"})
        with pytest.raises(MergeConflictError) as refused:
            repo.merge("side")
        assert refused.value.conflicts == (("t", "a file that differs"),)
        made = repo.merge("side", theirs="t").commit
        assert [entry.path for entry in repo.file_entries(made)] == ["same/m.pt", "t"]
        repo.checkout_files(made, tmp_path / "out")
        assert (tmp_path / "out" / "t").read_text() == "b.txt" * 300
        assert (tmp_path / "out" / "same" / "m.pt").read_bytes() == (tmp_path / "m.pt").read_bytes()
        assert repo.resolve(one).sizes == made.sizes


def test_parts_that_retention_took(tmp_path: Path) -> None:
    """They are missed only where they are wanted, and then it is said."""

    def state(n: float) -> Any:
        many = {f"k{i}": np.full(100, n + i) for i in range(200)}
        return {"model": {"w": np.full(300, n)}, "optimizer": many, "step": 1}

    with Repo.init(tmp_path) as repo:
        thin = repo.commit(state(1.0))
        gone = repo.commit(state(2.0))
        full = repo.commit(state(3.0))
        repo.record([Drop(thin.id, ("optimizer",)), Drop(gone.id, ())], "drop")
        repo.gc(grace=0)
        onto = repo.on("onto").cherry_pick(full, "optimizer", onto=thin)
        wanted = {"model": state(1.0)["model"], "step": 1, "optimizer": state(3.0)["optimizer"]}
        assert difference(wanted, repo.checkout(onto.commit)) is None  # what was not there comes last
        taken = repo.on("taken").cherry_pick(thin, "model", onto=full)
        assert difference({**state(3.0), "model": state(1.0)["model"]}, repo.checkout(taken.commit)) is None
        mean = repo.on("mean").merge(full, thin, only="model")
        assert difference({**state(3.0), "model": state(2.0)["model"]}, repo.checkout(mean.commit)) is None
        for number, call in enumerate(
            (
                lambda branch: branch.merge(thin, full, only="model"),
                lambda branch: branch.merge(full, thin),
                lambda branch: branch.merge(full, thin, only="model", theirs="optimizer"),
                lambda branch: branch.cherry_pick(thin, "optimizer", onto=full),
                lambda branch: branch.cherry_pick(gone, "model", onto=full),
                lambda branch: branch.merge(
                    full, onto.commit, only="optimizer", strategy="task-arithmetic", base=thin
                ),
            )
        ):
            with pytest.raises(DroppedError, match="retention took"):
                call(repo.on(f"refused{number}"))
        assert [c.path for c in repo.diff(thin, full, only="model").comparison.changes] == ["model/w"]
        for only in (None, "optimizer", "optimizer/k7"):
            with pytest.raises(DroppedError, match="retention took the optimizer"):
                repo.diff(thin, full, only=only)
        assert repo.fsck(full=True).problems == []


def test_content_that_is_gone_is_not_kept(tmp_path: Path) -> None:
    repo, _, one, _ = two_branches(tmp_path)
    with repo:
        store = repo._opened.store
        (entry,) = repo.entries(one, "model")
        assert entry.chunks == 1
        with store.reader() as reader:
            chunk = tree.held(reader, repo.resolve(one).tree)["model/w"].chunks[0]
        with store.index.change() as change:
            change.delete_row(chunk)
        with pytest.raises(NotFoundError, match="kept at model/w is not stored any more"):
            repo.cherry_pick("side", "step")
        repo.cherry_pick("side", "model")


# -- memory --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_does_not_grow_with_the_state(tmp_path: Path) -> None:
    """Two states of 240 MB each, whose merge is stored: less than 128 MiB above a small merge."""
    rng = np.random.default_rng(1)
    with Repo.init(tmp_path, compression="fast") as repo:
        small = repo.commit({"w": np.zeros(300_000, np.float32)})
        repo.on("small").commit({"w": np.ones(300_000, np.float32)})
        for name in ("one", "other"):
            repo.on(name).commit({f"w{n}": rng.standard_normal(20_000_000, np.float32) for n in range(3)})
        assert small.parents == ()
    for strategy in ("mean", "slerp"):
        done = subprocess.run(
            [sys.executable, "-c", _MEASURE, str(tmp_path), strategy],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found = json.loads(done.stdout)
        assert found["averaged"] == 3
        assert 1 << 20 < found["more"] < 128 << 20, strategy


_MEASURE = f"""
{PEAK}
import json
from ckptvcs import Repo
with Repo.open(sys.argv[1]) as repo:
    repo.on("a" + sys.argv[2]).merge("main", "small", strategy=sys.argv[2])
    before = peak()
    made = repo.on("b" + sys.argv[2]).merge("one", "other", strategy=sys.argv[2])
    more = peak() - before
print(json.dumps(dict(more=more, averaged=len(made.averaged))))
"""
