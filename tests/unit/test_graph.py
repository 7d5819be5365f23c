"""Walking commits: order from the graph alone, each commit once, read as late as possible."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs import Repo
from ckptvcs.history import graph
from ckptvcs.history.commit import encode_commit
from ckptvcs.history.graph import History
from ckptvcs.history.walk import Walk
from ckptvcs.ids import Kind, ObjectId, object_id


class Commits:
    """Commits in a dict, and as much of a store as a history needs."""

    def __init__(self) -> None:
        self.payloads: dict[ObjectId, bytes] = {}
        self.parents: dict[ObjectId, tuple[ObjectId, ...]] = {}
        self.read: list[ObjectId] = []
        self.ranks: dict[ObjectId, int] = {}

    def add(self, parents: Sequence[ObjectId], time: int = 0) -> ObjectId:
        payload = encode_commit(
            tree=ObjectId(bytes(32)), parents=parents, origin=None, author="a", time=time,
            message=str(len(self.payloads)), step=None, epoch=None, metrics={}, config={}, overrides={},
            environment={}, sizes={},
        )  # fmt: skip
        id = object_id(Kind.COMMIT, payload)
        self.payloads[id], self.parents[id] = payload, tuple(parents)
        if all(parent in self.ranks for parent in parents):
            self.ranks[id] = 1 + max((self.ranks[parent] for parent in parents), default=0)
        return id

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Any]:
        yield self

    def rank(self, id: ObjectId) -> int | None:
        return self.ranks.get(id)

    def note_ranks(self, commits: Sequence[tuple[ObjectId, Sequence[ObjectId]]]) -> None:
        for id, below in commits:
            self.ranks[id] = 1 + max((self.ranks[each] for each in below), default=0)

    @contextlib.contextmanager
    def reader(self) -> Iterator[Any]:
        yield self

    def objects(self, kind: Kind, ids: Sequence[ObjectId]) -> list[bytes]:
        assert kind is Kind.COMMIT
        self.read += ids
        return [self.payloads[id] for id in ids]

    def below(self, tips: Sequence[ObjectId]) -> set[ObjectId]:
        found: set[ObjectId] = set()
        waiting = list(tips)
        while waiting:
            id = waiting.pop()
            if id not in found:
                found.add(id)
                waiting += self.parents[id]
        return found

    def history(self) -> History:
        return History(self)  # type: ignore[arg-type]


@given(
    st.lists(st.lists(st.integers(0, 30), max_size=3), min_size=1, max_size=31), st.lists(st.integers(0, 30))
)
def test_any_graph(edges: list[list[int]], tips: list[int]) -> None:
    commits = Commits()
    ids: list[ObjectId] = []
    for n, wanted in enumerate(edges):
        ids.append(commits.add(list(dict.fromkeys(ids[w % n] for w in wanted)) if n else [], time=-n))
    chosen = [ids[tip % len(ids)] for tip in tips]
    walked = [commit.id for commit in commits.history().walk(chosen)]
    assert len(walked) == len(set(walked))
    assert set(walked) == commits.below(chosen)
    position = {id: n for n, id in enumerate(walked)}
    for id in walked:
        assert all(position[id] < position[parent] for parent in commits.parents[id])
    for older in ids[:5]:
        assert commits.history().is_ancestor(older, ids[-1]) == (older in commits.below([ids[-1]]))


def test_a_line_of_work_stays_together() -> None:
    commits = Commits()
    root = commits.add([])
    left = [root]
    right = [root]
    for _ in range(3):
        left.append(commits.add([left[-1]]))
        right.append(commits.add([right[-1]]))
    merge = commits.add([left[-1], right[-1]])
    walked = [commit.id for commit in commits.history().walk([merge])]
    assert walked == [merge, *left[:0:-1], *right[:0:-1], root]
    walked = [commit.id for commit in commits.history().walk([right[-1], left[-1]])]
    assert walked == [*right[:0:-1], *left[:0:-1], root]


def test_the_first_page_of_a_long_line_reads_no_more_than_itself() -> None:
    commits = Commits()
    tip = commits.add([])
    for _ in range(5000):
        tip = commits.add([tip])
    walk = commits.history().walk([tip])
    for _ in range(10):
        next(walk)
    assert len(commits.read) <= 11
    history = commits.history()
    assert sum(1 for _ in history.first_parents(tip)) == 5001
    assert sum(1 for _ in history.walk([tip, tip])) == 5001


def test_deep_graphs_need_no_recursion() -> None:
    commits = Commits()
    one, other = commits.add([]), commits.add([], 1)
    for n in range(3000):
        one, other = commits.add([one, other], n), commits.add([other, one], n)
    assert sum(1 for _ in commits.history().walk([one, other])) == 6002


def test_commits_are_remembered_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_REMEMBERED", 3)
    commits = Commits()
    ids = [commits.add([], n) for n in range(10)]
    history = commits.history()
    chance = random.Random(0)
    for _ in range(200):
        wanted = [chance.choice(ids) for _ in range(chance.randint(0, 6))]
        assert [commit.id for commit in history.commits(wanted)] == wanted
        assert len(history._seen) <= 3
    commits.read.clear()
    history.commit(ids[0])
    history.commit(ids[0])
    assert len(commits.read) <= 1


# -- walks ----------------------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Commits, list[ObjectId]]:
    """Commits that hang together anyhow; some without a noted rank."""
    commits = Commits()
    ids: list[ObjectId] = []
    for n in range(draw(st.integers(1, 30))):
        wanted = draw(st.lists(st.integers(max(0, n - 6), max(0, n - 1)), max_size=3)) if n else []
        ids.append(commits.add(list(dict.fromkeys(ids[w] for w in wanted)), time=n))
    if draw(st.booleans()):
        commits.ranks.clear()
    return commits, ids


@given(graphs(), st.lists(st.integers(0, 29), max_size=6), st.lists(st.integers(0, 29), max_size=3))
def test_what_is_reachable_from_some_and_not_from_others(
    made: tuple[Commits, list[ObjectId]], tips: list[int], without: list[int]
) -> None:
    commits, ids = made
    with_, not_from = ([ids[each % len(ids)] for each in chosen] for chosen in (tips, without))
    visits = list(commits.history().visits(with_, not_from))
    walked = [commit.id for commit, _ in visits]
    expected = commits.below(with_) - commits.below(not_from)
    assert len(walked) == len(set(walked))
    assert set(walked) == expected
    position = {id: n for n, id in enumerate(walked)}
    for commit, parents in visits:
        assert list(parents) == [p for p in dict.fromkeys(commit.parents) if p in expected]
        assert all(position[commit.id] < position[parent] for parent in parents)


@given(graphs(), st.lists(st.integers(0, 29), min_size=1, max_size=4))
def test_common_ancestors(made: tuple[Commits, list[ObjectId]], tips: list[int]) -> None:
    commits, ids = made
    chosen = [ids[tip % len(ids)] for tip in tips]
    shared = set.intersection(*(commits.below([id]) for id in chosen))
    best = {id for id in shared if not any(id in commits.below([o]) for o in shared if o != id)}
    found = commits.history().common_ancestors(chosen)
    assert len(found) == len(set(found))
    assert set(found) == best
    assert commits.history().ancestors_among(chosen, set(ids)) == commits.below(chosen)


def sweep(branches: int, shared: int, each: int) -> tuple[Commits, list[ObjectId]]:
    """A warm-up of `shared` commits, and branches from there."""
    commits = Commits()
    root = commits.add([])
    for _ in range(shared - 1):
        root = commits.add([root])
    tips = []
    for _ in range(branches):
        tip = root
        for _ in range(each):
            tip = commits.add([tip])
        tips.append(tip)
    return commits, tips


def test_the_first_page_of_many_branches_reads_what_it_needs() -> None:
    commits, tips = sweep(branches=50, shared=500, each=100)
    page = list(itertools.islice(commits.history().visits(tips), 20))
    assert len(page) == 20
    # The heads of 50 lines are looked at as far down as the page goes, and no further.
    assert len(set(commits.read)) <= 50 * 21


def test_a_page_of_what_another_branch_lacks_does_not_read_what_they_share() -> None:
    commits, tips = sweep(branches=2, shared=3000, each=30)
    walked = list(commits.history().walk([tips[0]], [tips[1]]))
    assert len(walked) == 30
    assert len(set(commits.read)) <= 62
    commits.read.clear()
    (fork,) = commits.history().common_ancestors(tips)
    assert commits.rank(fork) == 3000
    assert len(set(commits.read)) <= 62


def test_side_branches_come_right_above_their_forks() -> None:
    commits = Commits()
    main = [commits.add([])]
    names = {main[0]: "0"}
    tips = []
    for n in range(1, 6):
        main.append(commits.add([main[-1]]))
        names[main[-1]] = str(n)
        side = commits.add([main[-1]])
        names[side] = f"s{n}"
        tips.append(side)
    walked = [names[commit.id] for commit in commits.history().walk([*tips, main[-1]])]
    assert walked == ["s5", "5", "s4", "4", "s3", "3", "s2", "2", "s1", "1", "0"]


def test_what_a_long_walk_keeps_is_a_page_of_each_line() -> None:
    commits, tips = sweep(branches=10, shared=300, each=200)
    walk = Walk(commits.history().commit, commits.ranks.__getitem__, tips)
    most = 0
    for n, _ in enumerate(walk):
        most = max(most, len(walk._waits))
        if n == 50:
            assert most <= 10 * 53
    assert most <= 10 * 201
    assert not walk._waits
    assert not walk._line
    assert not walk._front


# -- ranks in a real store ------------------------------------------------------------------------


def test_ranks_are_noted_with_commits_found_out_where_missing_and_deleted_with_them(repo: Repo) -> None:
    first = repo.commit({"n": 1})
    second = repo.commit({"n": 2})
    side = repo.on("side")
    side.restore({"n": 0}, first)
    third = side.commit({"n": 3})
    store = repo._store

    def noted() -> list[int | None]:
        with store.snapshot() as snapshot:
            return [snapshot.rank(each.id) for each in (first, second, third)]

    assert noted() == [1, 2, 2]
    with store.index.change() as change:
        for each in (first, second, third):
            assert change._delete("ranks", each.id)
    with Repo.open(repo.path) as other:
        assert [commit.id for commit in other.log("main", 1)] == [second.id]
        assert noted() == [None, None, None]  # a single line needs none
        assert len(list(other.log(["main", "side"]))) == 3
    assert noted() == [1, 2, 2]
    repo.delete_branch("side", force=True)
    repo.gc(grace=0)
    assert noted() == [1, 2, None]
