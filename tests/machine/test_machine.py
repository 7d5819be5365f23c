"""The repository against its model, in any order of operations (ckptvcs.testing.machine)."""

from __future__ import annotations

import collections
import os
import shutil
import tempfile
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ckptvcs.store import writer
from ckptvcs.testing.machine import Handle, Model

BRANCHES = ["main", "a", "b", "c/d"]
TENSORS = [
    *(np.random.default_rng(n).integers(0, 256, 300 + 900 * n, np.uint8) for n in range(5)),
    np.random.default_rng(9).standard_normal((30, 20)),
    np.arange(40, dtype=np.int16).reshape(8, 5).T,
    np.zeros(3000, np.float32),
    np.zeros((0, 3)),
    np.random.default_rng(10).integers(0, 256, (1 << 20) + 5, np.uint8),
]
"""Few, so that commits share them."""


def tensor(number: int) -> np.ndarray[Any, Any]:
    """One of them. By number, so that a failing example is short."""
    return TENSORS[number]


leaves = st.one_of(
    st.integers(0, len(TENSORS) - 2).map(tensor),
    st.integers(0, len(TENSORS) - 1).map(tensor),
    st.integers(0, 3),
    st.none(),
    st.text(max_size=3),
)
states = st.dictionaries(
    st.sampled_from("uvwxyz"),
    st.one_of(leaves, st.lists(leaves, max_size=3), st.dictionaries(st.sampled_from("pq"), leaves)),
    max_size=4,
)
picks = st.integers(0, 99)

happened: collections.Counter[str] = collections.Counter()
"""What the machines of this run did, to show that every outcome was met."""


class RepositoryMachine(RuleBasedStateMachine):
    """Any sequence of commits, refs, collections, reopenings and rebuilds."""

    model: Model

    @initialize(packs=st.sampled_from([1, 3000, 8 << 20]))
    def begin(self, packs: int) -> None:
        self.place = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self._section_bytes = writer._SECTION_BYTES
        writer._SECTION_BYTES = packs  # type: ignore[misc]  # several packs per commit
        self.model = Model(self.place)
        self.idle: set[str] = set()  # what would change nothing now

    def handle(self, pick: int) -> Handle:
        return self.model.handles[pick % len(self.model.handles)]

    def any_commit(self, pick: int) -> Any:
        # In the order they were made: ids depend on the clock, and a replay must choose alike.
        return list(self.model.commits)[pick % len(self.model.commits)]

    def stepped(self, what: str) -> None:
        happened[what] += 1
        self.idle = set()

    @rule(pick=picks, state=states, message=st.sampled_from(["", "one", "two\nlines"]))
    def commit(self, pick: int, state: Any, message: str) -> None:
        self.stepped(f"commit {self.model.commit(self.handle(pick), state, message)}")

    @rule(state=states)
    def commit_at_the_tip(self, state: Any) -> None:
        """As a script that resumes: without this, most handles would soon be refused."""
        handle = self.model.handles[0]
        self.model.restore(handle, None)
        self.stepped(f"commit {self.model.commit(handle, state, 'resumed')}")

    @precondition(lambda self: self.model.commits)
    @rule(pick=picks, of=picks)
    def commit_a_known_state_again(self, pick: int, of: int) -> None:
        state = self.model.commits[self.any_commit(of)].state
        self.stepped(f"commit {self.model.commit(self.handle(pick), state, 'again')}")

    @precondition(lambda self: len(self.model.handles) < 5)
    @rule(branch=st.sampled_from(BRANCHES))
    def open_a_handle(self, branch: str) -> None:
        self.model.open(branch)

    @precondition(lambda self: self.model.branches)
    @rule(pick=picks)
    def restore_the_tip(self, pick: int) -> None:
        self.model.restore(self.handle(pick), None)
        happened["restore"] += 1

    @precondition(lambda self: self.model.commits)
    @rule(pick=picks, of=picks)
    def restore_any_commit(self, pick: int, of: int) -> None:
        self.model.restore(self.handle(pick), self.any_commit(of))
        happened["restore"] += 1

    @precondition(lambda self: self.model.stored)
    @rule(branch=st.sampled_from(BRANCHES), of=picks, state=states)
    def fork(self, branch: str, of: int, state: Any) -> None:
        """Restore an older commit on another branch and commit there."""
        stored = [id for id in self.model.commits if id in self.model.stored]
        self.model.open(branch)
        handle = self.model.handles[-1]
        self.model.restore(handle, stored[of % len(stored)])
        self.stepped(f"fork {self.model.commit(handle, state, 'fork')}")
        handle.repo.close()
        self.model.handles.pop()

    @precondition(lambda self: self.model.commits)
    @rule(name=st.sampled_from(BRANCHES), of=picks)
    def branch(self, name: str, of: int) -> None:
        self.model.branch(name, self.any_commit(of))

    @precondition(lambda self: self.model.commits)
    @rule(name=st.sampled_from("st"), of=picks)
    def tag(self, name: str, of: int) -> None:
        self.model.tag(name, self.any_commit(of))

    @precondition(lambda self: self.model.branches)
    @rule(name=st.sampled_from(BRANCHES), force=st.sampled_from([True, True, False]))
    def delete_a_branch(self, name: str, force: bool) -> None:
        self.model.delete(name, tag=False, force=force)
        self.stepped("delete")

    @precondition(lambda self: self.model.tags)
    @rule(name=st.sampled_from("st"), force=st.booleans())
    def delete_a_tag(self, name: str, force: bool) -> None:
        self.model.delete(name, tag=True, force=force)
        self.stepped("delete")

    @precondition(lambda self: self.model.branches)
    @rule(name=st.sampled_from(BRANCHES), pick=picks, state=states)
    def delete_a_branch_and_collect(self, name: str, pick: int, state: Any) -> None:
        """The branch's handles then know a tip that is gone."""
        handle = self.handle(pick)
        if handle.branch in self.model.branches and handle.branch != self.model.head:
            name = handle.branch
        self.model.delete(name, tag=False, force=True)
        freed = self.model.collect(grace=0)
        self.stepped("gc that freed" if freed else "gc")
        self.stepped(f"commit {self.model.commit(handle, state, 'late')}")

    @rule(branch=st.sampled_from(BRANCHES))
    def switch(self, branch: str) -> None:
        self.model.switch(branch)

    @precondition(lambda self: "gc" not in self.idle)
    @rule(grace=st.sampled_from([0, 0, None]))
    def collect(self, grace: float | None) -> None:
        freed = self.model.collect(grace=grace)
        happened["gc that freed" if freed else "gc"] += 1
        if grace == 0:
            self.idle = self.idle | {"gc"}

    @precondition(lambda self: "reopen" not in self.idle)
    @rule(rebuild=st.sampled_from([None, "deleting", "asking"]))
    def reopen(self, rebuild: str | None) -> None:
        self.model.reopen(rebuild=rebuild)
        happened[f"reopen {rebuild or ''}".strip()] += 1
        self.idle = self.idle | {"reopen"}

    @invariant()
    def agrees(self) -> None:
        self.model.check()

    def teardown(self) -> None:
        try:
            self.model.check(full=True)
            self.model.collect(grace=0)
            self.model.check(full=True)
        finally:
            self.model.close()
            writer._SECTION_BYTES = self._section_bytes  # type: ignore[misc]
            shutil.rmtree(self.place)


def run(examples: int, steps: int) -> None:
    """Run machines and print what happened in them."""
    happened.clear()
    run_state_machine_as_test(
        RepositoryMachine,
        settings=hypothesis.settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
    print(f"{examples} machines of up to {steps} steps:", dict(sorted(happened.items())))


def test_any_sequence() -> None:
    run(25, 30)
    assert happened["commit won"] > 10
    assert happened["gc"] + happened["gc that freed"] > 3


@pytest.mark.slow
def test_any_longer_sequence() -> None:
    run(100, 60)
    for outcome in ("commit won", "commit lost", "commit refused", "commit orphaned", "fork won",
                    "gc that freed", "reopen deleting", "reopen asking"):  # fmt: skip
        assert happened[outcome] > 5, (outcome, happened)
