"""The commit and gc protocol loses nothing in any interleaving, and each of its rules is needed for that.

``pytest -rP tests/model`` prints the counterexample of every broken rule.
"""

from dataclasses import fields, replace

import pytest

from tests.model.protocol import (
    NONE,
    Commit,
    Report,
    Rules,
    State,
    Task,
    World,
    bundle_flaw,
    canonical,
    explore,
    flaw,
)

PUBLISH = World(commits=(Commit((1,)),), chunks=1, tasks=(Task(0),), writers=(0, 0, 0))
"""An empty repository, three writers of one commit with one chunk (169,124 states when not reduced)."""

REUSE = replace(PUBLISH, writers=(0, 0), seed_packs=(((1, NONE), (0, NONE)),), seed_refs=(0,))
"""The same commit stands at the start."""

SHARED = World(
    commits=(Commit((2, 3)), Commit((2, 4))),
    chunks=3,
    tasks=(Task(0), Task(1, branch=1)),
    writers=(0, 1),
    branches=2,
    deletions=1,
    split_lookups=True,
    single_row_batches=True,
    seed_packs=(((2, NONE), (3, NONE), (0, NONE)),),
    seed_refs=(0,),
)
"""Two commits share a chunk; each lookup and each deletion of a chunk row is a transaction of its own."""

PARENTS = World(
    commits=(Commit((2,)), Commit((3,), parents=(0,))),
    chunks=2,
    tasks=(Task(1),),
    writers=(0, 0),
    seed_packs=(((2, NONE), (0, NONE)),),
    seed_refs=(0,),
)
"""Two writers commit on top of the branch's tip."""

HANDLE = World(
    commits=(Commit((3,)), Commit((4,)), Commit((3,), parents=(1,))),
    chunks=2,
    tasks=(Task(0, then=1), Task(1, branch=1, then=2), Task(2, branch=1)),
    writers=(0, 2),
    branches=2,
    tags=0,
)
"""A handle commits three times, and the third commit holds the chunk of the first."""

BASES = World(
    commits=(Commit((2,)), Commit((3,))),
    chunks=2,
    tasks=(Task(1, branch=1, bases=((3, 2),)), Task(0)),
    writers=(0, 1),
    branches=2,
    seed_packs=(((2, NONE), (0, NONE)),),
    seed_refs=(0,),
)
"""A chunk is stored as a difference against a chunk that only another commit reaches."""

CHAIN = World(
    commits=(Commit((3,)), Commit((4,)), Commit((5,))),
    chunks=3,
    tasks=(Task(1, branch=1, bases=((4, 3),)), Task(2, branch=2, bases=((5, 4),))),
    writers=(0, 1),
    branches=3,
    max_depth=2,
    single_row_batches=True,
    seed_packs=(((3, NONE), (0, NONE)),),
    seed_refs=(0,),
)
"""A base chain of two links, each stored by another writer."""

COMPACTION = World(
    commits=(Commit((2,)), Commit((3,))),
    chunks=2,
    tasks=(Task(0), Task(1, branch=1)),
    writers=(0, 1),
    branches=2,
    deletions=1,
    compaction=True,
    seed_packs=(((2, NONE), (3, NONE), (0, NONE), (1, NONE)),),
    seed_refs=(0, 1),
)
"""Two commits lie in one pack, and partly dead packs are compacted."""

CRASHES = replace(COMPACTION, tags=0, writer_crashes=1, collector_crashes=1)
"""A writer and the collector may also crash, at any step, a compaction's steps included."""

CRASHED_BASES = replace(BASES, writers=(0, 0), tags=0, writer_crashes=1, collector_crashes=1)
"""A writer and the collector may crash while delta rows come and go."""

DAMAGE = World(
    commits=(Commit((3,)), Commit((4,)), Commit((5,))),
    chunks=3,
    tasks=(Task(1, branch=1, bases=((4, 5),)), Task(0, bases=((3, 5),)), Task(1, branch=1)),
    writers=(0, 1),
    runs=1,
    branches=3,
    deletions=1,
    tags=0,
    damages=1,
    max_depth=2,
    single_row_batches=True,
    seed_packs=(((3, NONE), (4, 3), (1, NONE)), ((5, NONE), (2, NONE))),
    seed_refs=(NONE, 1, 2),
)
"""A chunk, or the base it stands on, is found damaged and is stored again."""

DROPS = World(
    commits=(Commit((3, 4, 2), left=(3,), alone=(2,)), Commit((3, 4, 2), left=(3,), alone=(2,))),
    chunks=3,
    tasks=(Task(1, branch=1),),
    writers=(0,),
    branches=2,
    deletions=1,
    drops=2,
    trees=((2, (3, 4)),),
    split_lookups=True,
    single_row_batches=True,
    seed_packs=(((3, NONE), (4, NONE), (2, NONE), (0, NONE)),),
    seed_refs=(0,),
)
"""A commit loses one of two chunks below its tree, while others commit the same tree, and lose it too."""

DROPPED = replace(
    DROPS, commits=(Commit((3, 4, 2)), Commit((3, 4, 2), parents=(0,))), tags=0, drops=1, compaction=True
)
"""A commit loses its whole payload while others commit the same on top of it, and packs are compacted."""

REPACK = World(
    commits=(Commit((3,)), Commit((4,)), Commit((5,))),
    chunks=3,
    tasks=(Task(2, branch=2, bases=((5, 3),)), Task(0)),
    writers=(0, 1),
    branches=3,
    tags=0,
    deletions=1,
    compaction=True,
    single_row_batches=True,
    max_depth=2,
    plan=((3, 4), (4, NONE)),
    seed_packs=(((3, NONE), (4, 3), (0, NONE), (1, NONE)),),
    seed_refs=(0, 1),
)
"""A pair of chunks is turned: the base becomes a difference, while another difference against it comes."""

BUNDLES = World(
    commits=(Commit((2, 3)), Commit((2, 4), parents=(0,))),
    chunks=3,
    tasks=(Task(1), Task(1, branch=1)),
    writers=(1,),
    branches=2,
    tags=0,
    outsiders=(0,),
    ingester_crashes=1,
    seed_packs=(((2, NONE), (3, NONE), (0, NONE)),),
    seed_refs=(0,),
)
"""A commit without the index on top of the branch's tip is ingested, beside a writer of the same content."""

BUNDLED_BASES = World(
    commits=(Commit((2,)), Commit((3,), parents=(0,))),
    chunks=2,
    tasks=(Task(1, bases=((3, 2),)),),
    writers=(0,),
    branches=2,
    tags=0,
    outsiders=(0,),
    ingester_crashes=1,
    seed_packs=(((2, NONE), (0, NONE)),),
    seed_refs=(0,),
)
"""A bundle, and a writer of the same commit, hold a difference against a chunk of the branch's tip."""

CONFIGURATIONS = {
    "repack": (REPACK, 12_983),
    "bundles": (BUNDLES, 17_532),
    "bundled bases": (BUNDLED_BASES, 25_566),
    "publish": (PUBLISH, 23_280),
    "reuse": (REUSE, 15_760),
    "shared": (SHARED, 42_145),
    "parents": (PARENTS, 11_613),
    "handle": (HANDLE, 37_167),
    "bases": (BASES, 22_319),
    "chain": (CHAIN, 21_605),
    "compaction": (COMPACTION, 17_455),
    "crashes": (CRASHES, 22_536),
    "crashed bases": (CRASHED_BASES, 12_357),
    "damage": (DAMAGE, 15_125),
    "drops": (DROPS, 14_664),
    "dropped": (DROPPED, 15_115),
}
"""Each configuration and the number of its states."""

LARGER = {
    "repack": (replace(REPACK, writers=(0, 0, 1)), 90_742),
    "bundles": (replace(BUNDLES, outsiders=(0, 1), writers=()), 22_161),
    "bundled bases": (replace(BUNDLED_BASES, tags=1, compaction=True), 122_187),
    "publish": (replace(PUBLISH, runs=3, deletions=3, tags=2), 65_936),
    "reuse": (replace(REUSE, writers=(0, 0, 0)), 139_567),
    "shared": (replace(SHARED, deletions=2), 97_756),
    "handle": (replace(HANDLE, writers=(0, 0), deletions=1, tags=1), 151_522),
    "bases": (replace(BASES, writers=(0, 0, 1)), 228_375),
    "crashes": (replace(CRASHES, tags=1), 60_342),
    "crashed bases": (replace(CRASHED_BASES, writers=(0, 1)), 20_190),
    "damage": (replace(DAMAGE, runs=2, deletions=2), 176_657),
    "dropped": (replace(DROPPED, writers=(0, 0), runs=1, split_lookups=False), 116_088),
}
"""The same with more writers, runs, deletions, tags or crashes."""

BROKEN = {
    "turn_whole": (REPACK, 6),
    "count_those_above": (replace(REPACK, max_depth=1), 9),
    "reuse_from_parent": (BUNDLES, 10),
    "packs_lock": (BUNDLES, 12),
    "incoming_stays": (BUNDLES, 12),
    "ingest_looks_again": (BUNDLES, 9),
    "ask_the_log": (BUNDLES, 9),
    "referrers_first": (PUBLISH, 8),
    "deltas_before_bases": (DAMAGE, 8),
    "compare_log": (PUBLISH, 6),
    "roots_from_log": (PUBLISH, 10),
    "bump_every_batch": (PUBLISH, 9),
    "mark_bases": (BASES, 8),
    "rows_before_files": (PUBLISH, 8),
    "lease_before_table": (PUBLISH, 10),
    "repoint_before_unlink": (COMPACTION, 10),
    "oldest_lookup": (SHARED, 10),
    "forget_cache": (HANDLE, 14),
    "revalidate": (PUBLISH, 9),
    "walk_bases": (BASES, 8),
    "check_every_parent": (PARENTS, 7),
    "check_tagged_row": (REUSE, 5),
    "plain_repair": (DAMAGE, 10),
    "alone_apart": (DROPS, 11),
    "look_below_trees": (DROPS, 11),
}
"""For each rule whose breach loses data: where that shows, and in how many steps at the least."""


def story(report: Report, target: State) -> str:
    """How a state comes about, a line per step, and what is wrong in it."""
    lines = [f"{number:3}  {step}" for number, step in enumerate(report.trace(target), start=1)]
    for ref, commit in enumerate(target.refs):
        if commit != NONE and (lost := flaw(report.world, target.rows, target.packs, commit, target.dropped)):
            world = report.world
            lines.append(f"     {world.ref_name(ref)} names {world.thing_name(commit)}, and {lost}")
    if lost := bundle_flaw(target):
        lines.append(f"     {lost}")
    return "\n".join(["", *lines])


def assert_sound(report: Report, states: int) -> None:
    """Nothing was found, and all of it was searched."""
    for kind in (report.losses, report.broken, report.leaks):
        assert not kind, story(report, kind[0])
    assert len(report.before) == states, "the exploration no longer covers what it did"


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_interleaving_loses_anything(name: str) -> None:
    """Zero losses, broken promises and leaks in every reachable state."""
    world, states = CONFIGURATIONS[name]
    assert_sound(explore(world), states)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_no_interleaving_of_more_actors_loses_anything(name: str) -> None:
    """The same with more writers, runs, deletions, tags or crashes."""
    world, states = LARGER[name]
    assert_sound(explore(world), states)


@pytest.mark.parametrize("rule", BROKEN)
def test_breaking_a_rule_loses_data(rule: str) -> None:
    """The explorer finds the loss, and the shortest way to it is as long as it was."""
    world, steps = BROKEN[rule]
    report = explore(replace(world, rules=Rules(**{rule: False})), first_loss_only=True)
    assert report.losses, f"breaking {rule} goes unnoticed"
    print(story(report, report.losses[0]))
    assert len(report.trace(report.losses[0])) == steps


def test_growing_under_a_difference_loses_data_however_short_the_chain() -> None:
    """A stored depth orders deletions: under a row whose depth is out of date its base goes first."""
    world = replace(REPACK, writers=(0, 0), deletions=2, rules=Rules(count_those_above=False))
    report = explore(world, first_loss_only=True)
    print(story(report, report.losses[0]))
    assert len(report.trace(report.losses[0])) == 25


def test_each_rule_is_broken_somewhere() -> None:
    """No rule of the model is there without a test that needs it."""
    assert {rule.name for rule in fields(Rules)} == {*BROKEN, "collect_orphans"}


def test_orphans_leak_where_nobody_collects_them() -> None:
    """The explorer sees the pack that a writer left whose parent is gone, and that it is no loss."""
    report = explore(replace(PARENTS, rules=Rules(collect_orphans=False)))
    assert report.leaks
    assert not report.losses
    assert not report.broken


def test_deleting_referred_rows_first_breaks_the_promise_of_a_commit_row() -> None:
    """The explorer sees a commit row above missing chunks before any ref names it."""
    report = explore(replace(PUBLISH, rules=Rules(referrers_first=False)), first_loss_only=True)
    assert report.broken


@pytest.mark.parametrize(
    "world",
    [
        replace(PUBLISH, writers=(0, 0), compaction=True, writer_crashes=1),
        replace(BASES, writers=(0, 0), deletions=1, tags=0),
        replace(PUBLISH, writers=(0, 0), rules=Rules(compare_log=False)),
        replace(COMPACTION, tags=0),
        replace(REPACK, runs=1),
        replace(BUNDLES, deletions=1),
        pytest.param(PUBLISH, marks=pytest.mark.slow),
    ],
)
def test_reduction_loses_no_state(world: World) -> None:
    """Renaming packs and sorting writers at every step ends where doing it once at the end does."""
    reduced = explore(world)
    unreduced = explore(world, reduce=lambda state: state)
    assert set(map(canonical, unreduced.before)) == set(reduced.before)
    assert set(map(canonical, unreduced.losses)) == set(reduced.losses)
