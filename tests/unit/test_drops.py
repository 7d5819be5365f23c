"""What is said of content that retention took, instead of damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import CkptError, Commit, CorruptionError, DroppedError, NotFoundError, ObjectId, Repo
from ckptvcs.ids import Kind
from ckptvcs.state.remains import remains
from ckptvcs.store import Drop
from ckptvcs.store.format import unpack_object
from ckptvcs.testing.same import difference


def state(step: int) -> dict[str, Any]:
    """Three components, of which two lie in trees of their own."""
    big = {f"p{n}": np.full(3000, step + n, np.float32) for n in range(3)}
    moments = {n: {"exp_avg": np.full(3000, step * n + 0.5, np.float32)} for n in range(3)}
    return {"model": big, "optimizer": {"state": moments}, "step": step}


def drop(repo: Repo, commit: Commit, *names: str, collect: bool = True) -> None:
    """Record a drop, and delete the rows that go with it, as a collector would."""
    assert repo.record([Drop(commit.id, names)], "retain: test")
    if not collect:
        return
    store = repo._store
    needed: set[ObjectId] = set()

    def reach(kind: Kind, id: ObjectId) -> None:
        if id not in needed:
            needed.add(id)
            if kind is not Kind.CHUNK:
                with store.reader() as reader:
                    (payload,) = reader.objects(kind, [id])
                for below_kind, below in unpack_object(payload, "")[0]:
                    if below_kind is not Kind.COMMIT:
                        reach(below_kind, below)

    for each in repo.log(list(repo.branches().values())):
        needed.add(each.id)
        taken = repo.dropped(each)
        if taken is None:
            reach(Kind.TREE, each.tree)
        elif taken:
            with store.reader() as reader:
                left = remains(reader, each.tree, taken)
            needed.update(left.alone)
            for kind, id in left.whole:
                reach(kind, id)
    with store.index.change() as change:
        change.bump_gc_seq()
        for id, _ in change.rows_from(b"", 1 << 30):
            if id not in needed:
                change.delete_row(id)


@pytest.fixture
def line(repo: Repo) -> list[Commit]:
    """Six commits of steps 0 to 50."""
    return [repo.commit(state(n), f"step {n}", step=10 * n) for n in range(6)]


READINGS: dict[str, Callable[[Repo, Commit, Path], Any]] = {
    "checkout": lambda repo, commit, place: repo.checkout(commit),
    "restore": lambda repo, commit, place: repo.on("other").restore(state(0), commit),
    "restore loosely": lambda repo, commit, place: repo.on("other").restore({}, commit, strict=False),
    "export": lambda repo, commit, place: repo.export(commit, place / "out", format="torch"),
    "open_tensor": lambda repo, commit, place: repo.open_tensor(commit, "optimizer/state/0/exp_avg"),
    "ls": lambda repo, commit, place: list(repo.entries(commit, "optimizer")),
    "part": lambda repo, commit, place: repo.checkout(commit, "optimizer/state/*/exp_avg"),
    "across": lambda repo, commit, place: repo.checkout(commit, "**/exp_avg"),
    "files": lambda repo, commit, place: repo.checkout_files(commit, place),
}
WHOLE: dict[str, Callable[[Repo, Commit, Path], Any]] = {
    **READINGS,
    "model": lambda repo, commit, place: repo.checkout(commit, "model"),
    "ls of all": lambda repo, commit, place: list(repo.entries(commit)),
    "files of all": lambda repo, commit, place: repo.file_entries(commit),
    "status": lambda repo, commit, place: repo.file_status(commit),
    "has_state": lambda repo, commit, place: repo.has_state(commit),
}


@pytest.mark.parametrize("collected", [False, True])
@pytest.mark.parametrize("how", READINGS)
def test_what_reading_a_dropped_component_says(
    repo: Repo, line: list[Commit], how: str, collected: bool, tmp_path: Path
) -> None:
    drop(repo, line[2], "optimizer", collect=collected)
    with pytest.raises(DroppedError) as caught:
        READINGS[how](repo, line[2], tmp_path)
    error = caught.value
    assert (error.code, error.names, error.commit) == ("dropped", ("optimizer",), str(line[2].id))
    assert error.nearest == str(line[3].id)  # of two equally near ones the newer
    assert "optimizer" in str(error)
    assert line[3].id.short in (error.hint or "")
    assert "step 30" in (error.hint or "")
    assert repo.dropped(line[2]) == ("optimizer",)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("collected", [False, True])
@pytest.mark.parametrize("how", WHOLE)
def test_what_reading_a_dropped_payload_says(
    repo: Repo, line: list[Commit], how: str, collected: bool, tmp_path: Path
) -> None:
    for commit in line[1:4]:
        drop(repo, commit, collect=collected)
    with pytest.raises(DroppedError) as caught:
        WHOLE[how](repo, line[1], tmp_path)
    assert caught.value.nearest == str(line[0].id)
    with pytest.raises(DroppedError) as caught:
        WHOLE[how](repo, line[3], tmp_path)
    assert caught.value.nearest == str(line[4].id)
    assert repo.dropped(line[1]) == ()
    again = repo.resolve(line[1].id)
    assert (again.message, again.step, again.parents) == ("step 1", 10, (line[0].id,))


@pytest.mark.parametrize("collected", [False, True])
def test_what_is_left_of_a_commit_reads_as_before(
    repo: Repo, line: list[Commit], collected: bool, tmp_path: Path
) -> None:
    drop(repo, line[2], "optimizer", collect=collected)
    for only in ("model", ["model/p1"], ["model/**", "step"]):
        assert difference(repo.checkout(line[2], only), repo.checkout(line[2], only)) is None
    assert difference(repo.checkout(line[2], "model")["model"], state(2)["model"]) is None
    into = {"model": state(0)["model"]}
    repo.on("side").restore(into, line[2], only="model")
    assert difference(into["model"], state(2)["model"]) is None
    assert [entry.path for entry in repo.entries(line[2])] == ["model/p0", "model/p1", "model/p2", "step"]
    assert repo.open_tensor(line[2], "model/p0")[5] == 2
    report = repo.export(line[2], tmp_path / "m", format="safetensors", only="model")
    assert report.tensors == 3
    assert repo.has_state(line[2])


def test_a_name_that_is_not_there_is_not_taken_for_damage(repo: Repo, line: list[Commit]) -> None:
    drop(repo, line[2], "optimizer")
    with pytest.raises(NotFoundError):
        repo.checkout(line[2], "modle")
    with pytest.raises(NotFoundError):
        repo.open_tensor(line[2], "model/p9")


def test_damage_in_what_is_left_is_still_damage(repo: Repo, line: list[Commit]) -> None:
    drop(repo, line[2], "optimizer")
    entry = repo.open_tensor(line[2], "model/p0")
    assert entry[0] == 2
    for path in (repo.path / ".ckpt" / "packs").rglob("*.pack"):
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CkptError) as caught:
        repo.checkout(line[2], "model")
    assert isinstance(caught.value, CorruptionError)


def test_nobody_has_it_any_more(repo: Repo) -> None:
    first = repo.commit({"optimizer": np.ones(5000)})
    second = repo.commit({"model": np.ones(5000)})
    drop(repo, first, "optimizer")
    with pytest.raises(DroppedError, match="retention took the optimizer of the commit") as caught:
        repo.checkout(first)
    assert caught.value.nearest is None
    drop(repo, first)
    with pytest.raises(DroppedError) as caught:
        repo.checkout(first)
    assert caught.value.nearest == str(second.id)
    assert repo.nearest_with(first, ["optimizer"]) is None


def test_the_nearest_lies_on_the_line_of_the_commit(repo: Repo, line: list[Commit]) -> None:
    """Not on another branch, however near that is."""
    repo.branch("side", line[1])
    side = repo.on("side")
    side.restore(state(0))
    own = [side.commit(state(10 + n), step=100 + n) for n in range(3)]
    drop(repo, own[0], collect=False)
    drop(repo, own[1], collect=False)
    assert repo.nearest_with(own[0]) == line[1]
    assert repo.nearest_with(own[1]).id == own[2].id  # type: ignore[union-attr]


def test_a_handle_goes_on_from_what_was_dropped_meanwhile(repo: Repo, line: list[Commit]) -> None:
    """The state is in its hands: only the base of differences is missing."""
    job = repo.on("fork")
    job.restore(state(0), line[2])
    drop(repo, line[2])
    made = job.commit(state(7), step=70)
    assert made.parents == (line[2].id,)
    assert difference(job.checkout(), state(7)) is None
    late = Repo.open(repo.path, branch="late")
    late.restore(state(0), line[3])
    again = late.commit(state(2))  # what was dropped, once more
    assert difference(late.checkout(again), state(2)) is None
    late.close()


def test_pins(repo: Repo, line: list[Commit]) -> None:
    assert repo.pins() == set()
    assert repo.pin("HEAD~2") == line[3].id
    assert repo.pin(line[3]) == line[3].id
    assert repo.pins() == {line[3].id}
    assert [entry.why for entry in repo.reflog(1)] == [f"pin: {line[3].id.short}"]
    with pytest.raises(NotFoundError, match="is not pinned"):
        repo.unpin("HEAD")
    assert repo.unpin(line[3].id) == line[3].id
    assert repo.pins() == set()
    drop(repo, line[0], collect=False)
    with pytest.raises(DroppedError):
        repo.pin(line[0])
