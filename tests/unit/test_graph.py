"""Walking commits: order from the graph alone, each commit once, read as late as possible."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.history import graph
from ckptvcs.history.commit import encode_commit
from ckptvcs.history.graph import History
from ckptvcs.ids import Kind, ObjectId, object_id


class Commits:
    """Commits in a dict, and as much of a store as a history needs."""

    def __init__(self) -> None:
        self.payloads: dict[ObjectId, bytes] = {}
        self.parents: dict[ObjectId, tuple[ObjectId, ...]] = {}
        self.read: list[ObjectId] = []

    def add(self, parents: Sequence[ObjectId], time: int = 0) -> ObjectId:
        payload = encode_commit(
            tree=ObjectId(bytes(32)), parents=parents, origin=None, author="a", time=time,
            message=str(len(self.payloads)), step=None, epoch=None, metrics={}, config={}, overrides={},
            environment={}, sizes={},
        )  # fmt: skip
        id = object_id(Kind.COMMIT, payload)
        self.payloads[id], self.parents[id] = payload, tuple(parents)
        return id

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
    one = other = commits.add([])
    for n in range(3000):
        one, other = commits.add([one, other], n), commits.add([other, one], n)
    assert sum(1 for _ in commits.history().walk([one, other])) == 6001


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
