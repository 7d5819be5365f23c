"""Commits compared: what is read, and what is found."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckptvcs import NotFoundError, Repo
from ckptvcs.history.diff import Diff
from ckptvcs.state import paths, tree
from ckptvcs.state.compare import ABSENT, Change, Comparison, compare
from ckptvcs.state.side_by_side import sides
from ckptvcs.store.format import GRIDS
from ckptvcs.testing.memory import MemoryStore
from tests.peaks import PEAK

TINY = dataclasses.replace(GRIDS[1], chunk=16, inline=8, chunk_list=2, subtree=80, list_page=2, map_page=2)


def compared(old: Any, new: Any, store: MemoryStore | None = None, **more: Any) -> Comparison:
    """Two states, in a store whose trees are cut into very small pieces."""
    store = store or MemoryStore(TINY)
    trees = tree.write(store, old).tree, tree.write(store, new).tree
    store.objects_read.clear()
    store.chunks_read.clear()
    found = sides(store, *trees, more.pop("only", None))
    result = compare(found.old, found.new, **more)
    result.changes += found.changes
    return result


def kinds(found: Comparison) -> dict[str, str]:
    return {change.path: change.kind for change in found.changes}


# -- what is read --------------------------------------------------------------------------------------


def state_of(layers: int) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {"model": {f"layer{n}.weight": rng.standard_normal(40) for n in range(layers)}, "rest": [1, 2]}


def test_only_differing_chunks_are_read_and_equal_trees_are_not() -> None:
    store = MemoryStore(TINY)
    old = state_of(200)
    new = {**old, "model": {name: array.copy() for name, array in old["model"].items()}}
    new["model"]["layer77.weight"][[0, 1, 38]] += 1
    found = compared(old, new, store)
    (change,) = found.changes
    assert (change.path, change.kind) == ("model/layer77.weight", "changed")
    assert change.distance is not None
    assert (change.distance.changed, change.distance.l2) == (3 / 40, pytest.approx(math.sqrt(3)))
    assert not change.distance.whole
    assert len(store.chunks_read) == 4  # two numbers to a chunk: the first and the last, of both sides
    read = len(set(store.objects_read))
    everything = MemoryStore(TINY)
    written = tree.write(everything, old)
    everything.objects_read.clear()
    tree.load(everything, written.tree)
    assert read < len(set(everything.objects_read)) / 4
    assert found.equal < 30


def test_norms_read_the_equal_chunks_of_one_side() -> None:
    store = MemoryStore(TINY)
    a, b = np.arange(1.0, 41), np.arange(1.0, 41)
    b[5] = 0
    found = compared({"w": a}, {"w": b}, store, norms=True)
    (change,) = found.changes
    assert change.distance is not None
    assert change.distance.relative == pytest.approx(6 / np.linalg.norm(a))
    assert change.distance.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert len(store.chunks_read) == 21
    bound = compared({"w": a}, {"w": b}).changes[0].distance
    assert bound is not None
    assert bound.relative == pytest.approx(6 / np.hypot(5, 6))


def test_the_same_tree_is_not_opened() -> None:
    store = MemoryStore(TINY)
    assert compared(state_of(50), state_of(50), store).changes == []
    assert store.objects_read == []


def test_a_part_that_moved_is_compared_where_it_is() -> None:
    """The same subtree at another place is known by its id, and still compared with what was there."""
    one, other = state_of(20)["model"], {f"x{n}": np.arange(9.0) + n for n in range(20)}
    found = compared({"a": one, "b": other}, {"a": other, "b": one, "c": one})
    assert len([c for c in found.changes if c.kind == "removed"]) == 40
    assert len([c for c in found.changes if c.kind == "new"]) == 60
    swapped = compared({"a": one, "b": other}, {"a": other, "b": one}, only="a/x1*")
    assert {change.path for change in swapped.changes} == {f"a/x{n}" for n in (1, *range(10, 20))}
    swapped = compared({"a": one, "b": other}, {"a": other, "b": one}, only="b/x1*")
    assert {change.kind for change in swapped.changes} == {"removed"}
    nested = compared({"a": one}, {"a": {**one, "more": np.arange(5.0)}})
    assert kinds(nested) == {"a/more": "new"}


@pytest.mark.parametrize("seed", range(25))
def test_against_a_comparison_that_reads_everything(seed: int) -> None:
    """Random nested states and changes of them; the seed replays it."""
    rng = random.Random(seed)

    def made(depth: int) -> Any:
        if depth and rng.random() < 0.6:
            return {f"k{n}": made(depth - 1) for n in range(rng.randrange(1, 9))}
        if rng.random() < 0.3:
            return [made(0) for _ in range(rng.randrange(5))] if depth else rng.randrange(3)
        return np.arange(rng.choice([1, 3, 12]), dtype=np.float32) + rng.randrange(2)

    def mutated(value: Any) -> Any:
        if isinstance(value, dict):
            found = {key: mutated(each) for key, each in value.items() if rng.random() > 0.05}
            if rng.random() < 0.1:
                found["new"] = made(1)
            return found
        if isinstance(value, list):
            return [mutated(each) for each in value]
        return made(1) if rng.random() < 0.05 else value

    def flat(path: str, value: Any) -> dict[str, Any]:
        if isinstance(value, (dict, list)) and value:
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            return {p: v for k, each in pairs for p, v in flat(f"{path}/{k}", each).items()}
        return {path: (type(value).__name__, value.tobytes() if isinstance(value, np.ndarray) else value)}

    old = {f"part{n}": made(3) for n in range(4)}
    new = mutated(old)
    a, b = flat("", old), flat("", new)
    wanted = {path[1:] for path in {**a, **b} if a.get(path) != b.get(path)}
    everywhere = sorted({path[1:] for path in {**a, **b}})
    for only in (None, *rng.sample(everywhere, 4), "part1", "**/k1", "part*/*/k2"):
        if only is not None and not any(paths.matches(only, path) for path in everywhere):
            continue
        changes = compared(old, new, only=only).changes
        found = {change.path for change in changes if change.kind not in ("type", "layout")}
        selected = {path for path in wanted if only is None or paths.matches(only, path)}
        assert found == selected, f"seed {seed}, only {only!r}"


# -- what is found -------------------------------------------------------------------------------------


def test_kinds_of_change() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    old = {
        "cast": weight, "shape": weight, "gone": weight, "grad": weight, "order": weight,
        "same": weight.clone(), "tensor": weight, "n": 1, "nan": math.nan, "text": "a" * 100,
        "tuple": (1, [2]), "size": torch.Size([1]),
        "rng": random.Random(1), "empty": {}, "was list": [1], "sparse": weight.to_sparse(),
        "moved": {"a": 1, "b": 2}, "bytes": bytearray(b"x"), "zero": 0.0, "one": 1,
    }  # fmt: skip
    new = {
        **old,
        "cast": weight.half(), "shape": weight.reshape(3, 2), "grad": weight.clone().requires_grad_(),
        "order": weight.t().contiguous().t(), "tensor": 5, "n": 2, "nan": math.nan, "text": "b" * 100,
        "tuple": (1, [3]), "size": torch.Size([2]), "rng": random.Random(2), "empty": [], "was list": (1,),
        "sparse": (2 * weight).to_sparse(), "moved": {"b": 2, "a": 1}, "bytes": bytearray(b"y"), "zero": -0.0,
        "one": True,
    }  # fmt: skip
    del new["gone"]
    found = compared(old, new, MemoryStore())
    changes = kinds(found)
    assert [c.kind for c in found.changes if c.path == "tensor"] == ["removed", "value"]
    changes.pop("tensor")
    assert changes == {
        "cast": "cast", "shape": "reshaped", "gone": "removed", "grad": "layout", "order": "layout",
        "n": "value", "text": "value", "tuple/1/0": "value", "size": "value", "rng": "value",
        "was list": "type", "sparse/values": "changed", "moved": "layout", "bytes": "value", "zero": "value",
        "one": "value", "empty": "value",
    }  # fmt: skip


def test_parameters_of_an_optimizer_are_named(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    with Repo.init(tmp_path) as repo:
        one = repo.commit({"model": model, "optimizer": optimizer})
        optimizer.state[model[1].weight]["exp_avg"].add_(1)
        other = repo.commit({"model": model, "optimizer": optimizer})
        (change,) = repo.diff(one, other).comparison.changes
        assert (change.path, change.parameter) == ("optimizer/state/2/exp_avg", "1.weight")


def test_what_is_recorded_with_commits(tmp_path: Path) -> None:
    with Repo.init(tmp_path) as repo:
        state = {"w": np.ones(3)}
        one = repo.commit(state, step=1, metrics={"loss": 1.0}, config={"o": {"lr": 1, "wd": 0}, "x": [1]})
        other = repo.commit(
            state, step=2, metrics={"loss": 1.0, "acc": 0.5}, config={"o": {"lr": 2, "wd": 0}}
        )
        found = repo.diff(one, other)
        assert [tuple(each) for each in found.fields if each.part != "environment"] == [
            ("step", "", 1, 2),
            ("metrics", "acc", ABSENT, 0.5),
            ("config", "o.lr", 1, 2),
            ("config", "x", [1], ABSENT),
        ]
        assert found.comparison.changes == []
        assert bool(found)
        assert not repo.diff(one, one)
        assert not repo.diff(one, other, only="w")


def test_patterns(tmp_path: Path) -> None:
    with Repo.init(tmp_path) as repo:
        old = {"model": {f"w{n}": np.full(300, n) for n in range(100)}, "rest": 1}
        one = repo.commit(old)
        other = repo.commit({**old, "model": {**old["model"], "w5": np.zeros(300)}, "rest": 2, "more": 3})

        def found(only: Any) -> list[str]:
            return [change.path for change in repo.diff(one, other, only=only).comparison.changes]

        assert found(None) == ["model/w5", "rest", "more"]
        assert found("model") == ["model/w5"]
        assert found(["more", "**/w5"]) == ["model/w5", "more"]  # new in one, changed in both
        assert found("model/w7") == []  # equal, and perhaps unread
        for only in ("modle", ["model", "nothing/*"]):
            with pytest.raises(NotFoundError, match="nothing in these commits matches"):
                repo.diff(one, other, only=only)


def by_path(found: Diff) -> dict[str, Change]:
    return {change.path: change for change in found.comparison.changes}


def test_files_and_the_tensors_in_them(tmp_path: Path) -> None:
    """Folders that differ by the number of the step alone are one."""
    with Repo.init(tmp_path) as repo:
        commits = []
        for step in (500, 1000):
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            torch.save({"w": torch.full((300,), float(step)), "same": torch.ones(300)}, folder / "model.pt")
            (folder / "notes.txt").write_text(f"{step}")
            (folder / "equal.txt").write_text("same")
            commits.append(repo.commit_files({folder.name: folder}, continues=True))
        found = by_path(repo.diff(*commits))
        assert {path: change.kind for path, change in found.items()} == {
            "checkpoint-1000/model.pt/w": "changed",
            "checkpoint-1000/model.pt": "file",
            "checkpoint-1000/notes.txt": "file",
        }
        distance = found["checkpoint-1000/model.pt/w"].distance
        assert distance is not None
        assert distance.largest == 500


def test_a_commit_beside_a_file(tmp_path: Path) -> None:
    state = {"model": {"layer": {"weight": torch.randn(400)}}, "step": 3}
    with Repo.init(tmp_path) as repo:
        commit = repo.commit(state)
        state["model"]["layer"]["weight"][0] += 1
        torch.save(state["model"], tmp_path / "model.pt")
        with repo.beside(commit, tmp_path / "model.pt") as (mine, file, prefix):
            assert prefix == "model"
            (change,) = compare(mine, file).changes
            assert change.path == "layer/weight"
            assert change.distance is not None
            assert change.distance.changed == 1 / 400
        with repo.beside(commit, tmp_path / "model.pt", only="layer/w*") as (mine, file, _):
            assert list(mine.tensors) == list(file.tensors) == ["layer/weight"]


def test_a_commit_of_files_beside_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"w": torch.ones(400)}, folder / "model.pt")
    (folder / "notes.txt").write_text("a" * 3000)
    (folder / "more.txt").write_text("same")
    with Repo.init(tmp_path) as repo:
        commit = repo.commit_files({"run": folder})
        with repo.beside(commit, folder) as (mine, disk, prefix):
            assert prefix == "run"
            found = compare(mine, disk)
            assert (found.changes, found.equal) == ([], 1)
        (folder / "notes.txt").write_text("a" * 2999 + "b")
        torch.save({"w": torch.zeros(400)}, folder / "model.pt")
        with repo.beside(commit, folder) as (mine, disk, _):
            found = compare(mine, disk)
            assert [(c.kind, c.path) for c in found.changes] == [
                ("changed", "model.pt/w"),
                ("file", "notes.txt"),
            ]
        with repo.beside(commit, folder / "model.pt") as (mine, disk, prefix):
            assert prefix == "run/model.pt"
            assert [c.path for c in compare(mine, disk).changes] == ["w"]


# -- memory --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_does_not_grow_with_the_state(tmp_path: Path) -> None:
    """Two states of 240 MB that differ everywhere: less than 128 MiB more than an interpreter that has
    read a small commit."""
    with Repo.init(tmp_path, compression="fast") as repo:
        small = np.zeros(300_000, np.float32)
        repo.commit({"w": small})
        repo.commit({"w": small + 1})
        rng = np.random.default_rng(1)
        for _ in range(2):
            repo.commit({f"w{n}": rng.standard_normal(20_000_000, dtype=np.float32) for n in range(3)})
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["changed"] == [1.0] * 3
    assert 1 << 20 < found["more"] < 128 << 20


_MEASURE = f"""
{PEAK}
import json
from ckptvcs import Repo
with Repo.open(sys.argv[1]) as repo:
    repo.diff("HEAD~3", "HEAD~2")
    before = peak()
    found = repo.diff("HEAD~1", "HEAD")
    more = peak() - before
changed = [round(c.distance.changed, 2) for c in found.comparison.changes]
print(json.dumps(dict(more=more, changed=changed)))
"""
