"""Explicit-state model of the commit and gc protocol, and the explorer that visits every interleaving.

The model mirrors docs/format.md, write order. It is small (one to three commits over one to three chunks)
and complete: `explore` visits every state that any order of the actors' steps can reach. In each it looks for

* a **loss**: a ref names a commit whose own row, parent, chunk row, delta base or pack file is gone;
* a **broken promise**: a commit's row is present although something the commit reaches is not. The promise
  is what lets a new ref, tag or parent check one row only;

and in each state in which nothing more can happen for

* a **leak**: one more collector run, alone, leaves an unreachable row, an unused pack file or a gap.

What a state is
---------------
Nested tuples (`State`): the index rows, the pack files, the refs, each writer's and the collector's place in
its program, and how often the passing actors may still act. A step is one index transaction, one file system
call, or work on private memory; that is what makes it atomic. Three reductions keep the count of states down,
and none of them loses an interleaving:

* gc_seq and the ref-log position are only ever compared for equality with a remembered value, so a state
  holds the outcome (`Writer.stale`, `Collector.moved`) instead of the numbers;
* pack names are never reused, so only their equality matters: `canonical` renumbers them;
* writers with the same task are interchangeable: `canonical` sorts them.

Who acts
--------
* A writer takes the commit steps: ``lookup`` (remembers gc_seq and the branch's tip, plans hit or miss),
  ``pack`` (the misses, sealed and renamed into place), ``publish`` (the one write transaction; it may abort,
  go back to ``pack`` and retry). After that its handle may commit again, with a cache of what it has seen.
* The collector takes the roots and then runs the phases that `collector_program` lists.
* A deleter removes a ref. A tagger points the tag at any commit whose row is present.
* A repack is a phase of the collector's run: chunks of a family are encoded against other bases, and all
  their rows are pointed anew in one transaction, or none.
* An outsider commits without the index: it reads refs and rows once, reuses what its branch's tip reaches,
  and leaves packs and a bundle. An ingester checks the bundle, gives its packs a place, enters them in one
  transaction, and clears the bundle away.
* A writer, the collector or the ingester crashes where it stands; the kernel frees its lease or lock.
* A scrub finds a chunk's bytes damaged; the next commit of that chunk repairs the row.
* Retention records that a commit's payload is dropped, as a whole or in part. A part needs trees: things that
  refer to others, of which the dropped commit keeps the tree *alone* and some of what is below it.

What is left out: power loss (an index transaction counts as durable), refs.journal, readers, the order of
bundles that build on each other, trees and chunk lists where nothing is dropped (more levels of the same
rule), reflog, pins and the undo window (only more roots: this is ``--grace 0``), and the collector's fallback
of marking inside the deleting transaction (the interleaving in which nobody moves between mark and delete).

Each rule that can be broken on purpose is a field of `Rules`. That compaction re-points a row by
compare-and-set is not among them, because breaking it does no harm here: only the collector deletes rows,
compaction is a phase of the same collector under gc.lock, and writers keep live rows. Between copy and
re-pointing nothing but a repair can move a row, and then both copies are good.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

NONE = -1
_GONE = -2
"""The name of a pack that was unlinked."""


# ---- what is explored: rules, content, actors --------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """The rules of the protocol. Each can be broken by setting it to False."""

    referrers_first: bool = True
    """Commit rows are deleted before chunk rows."""
    deltas_before_bases: bool = True
    """Chunk rows are deleted by falling delta depth."""
    compare_log: bool = True
    """A deleting transaction first compares the ref-log position with the one the marks belong to."""
    roots_from_log: bool = True
    """After a lost comparison whatever the log named since is a root, also where the ref is gone again.

    Going back to the deletion of commits with the refs alone as new roots would do as well.
    """
    bump_every_batch: bool = True
    """Each deleting transaction bumps gc_seq (broken: one bump when the run begins)."""
    mark_bases: bool = True
    """Mark follows the base of a delta row."""
    rows_before_files: bool = True
    """A dead pack is unlinked after its rows are gone."""
    lease_before_table: bool = True
    """An orphan's lease is found free before the packs table is asked whether the pack was published."""
    collect_orphans: bool = True
    """A pack that was never published and whose lease is free is dead (broken: a leak, not a loss)."""
    repoint_before_unlink: bool = True
    """Compaction unlinks the old pack after the rows name the new one."""
    oldest_lookup: bool = True
    """A writer remembers the gc_seq of its oldest lookup (broken: of its newest)."""
    forget_cache: bool = True
    """After a re-validation, also one that aborts, only what was re-validated stays in the handle's cache."""
    revalidate: bool = True
    """A writer whose gc_seq moved looks its whole closure up again in the publishing transaction."""
    walk_bases: bool = True
    """Before a delta row is put its base chain is walked: present, not the row itself, within depth."""
    check_every_parent: bool = True
    """The expected tip's row is checked too where it is a parent: the comparison with the tip may fail."""
    check_tagged_row: bool = True
    """A new ref to an existing commit checks the commit's row in its own transaction."""
    alone_apart: bool = True
    """A tree that a dropped commit keeps alone is not marked whole: what else reaches it looks below it."""
    look_below_trees: bool = True
    """A writer looks up what is below a tree that it finds stored."""
    turn_whole: bool = True
    """A repack points the rows of a family in one transaction (broken: in one each, whatever comes of it)."""
    count_those_above: bool = True
    """A chain does not grow under a difference that was published after the repack looked."""
    reuse_from_parent: bool = True
    """An outsider reuses only what its branch's tip reaches, as a ref keeps that."""
    packs_lock: bool = True
    """Nobody looks for orphans while an ingester has packs in place that are not entered."""
    incoming_stays: bool = True
    """A pack keeps its name in incoming/ until its bundle is in the log."""
    ingest_looks_again: bool = True
    """What a bundle reuses is looked up in the transaction that enters it."""
    ask_the_log: bool = True
    """A bundle that is in the log is cleared away and not entered again."""
    plain_repair: bool = True
    """A damaged row is replaced by a plain frame.

    A difference would deepen the rows above it, whose stored depth orders their deletion, and would put a
    new base below a chunk that a running collector has marked already and does not descend into again.
    """


@dataclass(frozen=True)
class Commit:
    """What a commit reaches. Commits have the ids 0, 1, ...; the chunks' ids follow."""

    chunks: tuple[int, ...]
    """All that it publishes besides itself, trees included."""
    parents: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
    """Of these, what it still needs with everything below once its payload is dropped."""
    alone: tuple[int, ...] = ()
    """Trees that it then needs by themselves."""


@dataclass(frozen=True)
class Task:
    """What a writer publishes."""

    commit: int
    branch: int = 0
    bases: tuple[tuple[int, int], ...] = ()
    """Pairs (chunk, base): store the chunk as a difference where the base's row is present."""
    then: int = NONE
    """The task (an index into `World.tasks`) that the same handle does after it."""


@dataclass(frozen=True)
class World:
    """One configuration: content, actors, how often each may act, and the rules they follow."""

    commits: tuple[Commit, ...]
    chunks: int
    tasks: tuple[Task, ...]
    writers: tuple[int, ...]
    """Each writer's first task, an index into `tasks`."""
    runs: int = 2
    branches: int = 1
    deletions: int = 2
    tags: int = 1
    writer_crashes: int = 0
    collector_crashes: int = 0
    damages: int = 0
    drops: int = 0
    trees: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Trees, each with what it refers to; they have ids among the chunks'."""
    outsiders: tuple[int, ...] = ()
    """The task of each writer without the index."""
    ingester_crashes: int = 0
    plan: tuple[tuple[int, int], ...] = ()
    """What a repack makes of a family: the pairs (chunk, base or NONE)."""
    compaction: bool = False
    split_lookups: bool = False
    """Each id is looked up in a read transaction of its own."""
    single_row_batches: bool = False
    """Each chunk row is deleted in a transaction of its own."""
    max_depth: int = 1
    seed_packs: tuple[tuple[tuple[int, int], ...], ...] = ()
    """The packs at the start, all published: the pairs (id, base or NONE) in each, bases first."""
    seed_refs: tuple[int, ...] = ()
    """The commits that the first branches name at the start."""
    rules: Rules = field(default_factory=Rules)

    @property
    def ids(self) -> int:
        """How many ids there are."""
        return len(self.commits) + self.chunks

    def below(self, thing: int) -> tuple[int, ...]:
        """What a tree refers to."""
        return dict(self.trees).get(thing, ())

    def reach(self, commit: int, dropped: int) -> tuple[int, ...]:
        """What a commit refers to besides its parents and must find there with all that is below."""
        found = self.commits[commit]
        if dropped >> commit & 1:
            return found.left
        inner = {thing for _, below in self.trees for thing in below}
        return tuple([thing for thing in found.chunks if thing not in inner])

    def alone(self, commit: int, dropped: int) -> tuple[int, ...]:
        """Trees that a commit needs by themselves."""
        return self.commits[commit].alone if dropped >> commit & 1 else ()

    def lost(self, commit: int) -> int:
        """The place in `State.refs` of the lost/ entry for `commit`; branches and the tag come before."""
        return self.branches + 1 + commit

    def thing_name(self, thing: int) -> str:
        """A readable name for an id."""
        return f"C{thing}" if thing < len(self.commits) else f"X{thing - len(self.commits)}"

    def ref_name(self, ref: int) -> str:
        """A readable name for a place in `State.refs`."""
        if ref < self.branches:
            return f"branch {ref}"
        return "the tag" if ref == self.branches else f"lost/{self.thing_name(ref - self.lost(0))}"


# ---- a state -----------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """An index row."""

    pack: int
    base: int = NONE
    depth: int = 0
    """The length of the base chain when the row was put."""
    bad: bool = False


class Pack(NamedTuple):
    """A pack file. Sets of ids are bit masks."""

    published: bool
    """It is in the packs table."""
    records: int = 0
    """What it holds, until it is published: from then on the rows say so."""
    deltas: int = 0
    """Those of `records` that are stored as differences."""
    gap: bool = False
    """It is published and some of its bytes have no row (told apart only with compaction)."""


class Writer(NamedTuple):
    """A writer's place in its task."""

    task: int
    step: str = "lookup"
    stale: bool = False
    """gc_seq is not what it was at the oldest lookup or cache entry in use."""
    tip: int = NONE
    """The branch's tip as this handle knows it."""
    cache: int = 0
    """Ids that earlier commits of this handle found or made present."""
    looked_up: int = 0
    """How many ids of the commit were looked up."""
    todo: int = 0
    """Misses that the next pack is to hold."""
    deltas: int = 0
    """Those of `todo` to be stored as differences."""
    packs: tuple[int, ...] = ()
    """Own packs, not published yet. The last field: `canonical` sorts by the others and what these hold."""


class Collector(NamedTuple):
    """The collector's place in its run."""

    runs: int
    """Runs not begun yet."""
    program: tuple[str, ...] = ()
    """The phases still to come in this run; empty between runs."""
    roots: int = 0
    """The commits that refs named when the run began, until they are marked."""
    moved: bool = False
    """The ref log is not at the position that the marks belong to."""
    fresh: int = 0
    """The commits that the ref log has named since that position."""
    marks: int = 0
    alone: int = 0
    """Trees that are marked by themselves."""
    work: tuple[int, ...] = ()
    """Packs in hand: suspects, then those to unlink; in compaction the old pack and the new one."""
    seen: tuple[int, ...] = ()
    """In a repack: the pack of each chunk of the plan when it was encoded, then the new pack."""
    used: int = 0
    """In a repack: bases of differences that were published since."""


class Outsider(NamedTuple):
    """A writer without the index, and its bundle."""

    task: int
    step: str = "look"
    """Then "leave", "waiting", and "gone": cleared away, or in quarantine; "refused": there for no reason."""
    tip: int = NONE
    records: int = 0
    """What its packs hold."""
    deltas: int = 0
    pack: int = NONE
    """Where its pack is, if it is no longer in incoming/."""
    entered: int = 0
    """How often it was entered."""


class Ingester(NamedTuple):
    """The ingester's place."""

    bundle: int = NONE
    """The outsider whose bundle is at hand."""
    step: str = ""
    pack: int = NONE
    """The bundle's pack, in its place."""


class Budget(NamedTuple):
    """How often each passing actor may still act."""

    deletions: int = 0
    tags: int = 0
    writer_crashes: int = 0
    collector_crashes: int = 0
    damages: int = 0
    drops: int = 0
    ingester_crashes: int = 0


Rows = tuple[Row | None, ...]
Packs = tuple[Pack | None, ...]
"""A pack's name is its place. None: unlinked."""


class State(NamedTuple):
    """Everything there is at one moment."""

    rows: Rows
    packs: Packs
    refs: tuple[int, ...]
    writers: tuple[Writer, ...]
    collector: Collector
    budget: Budget
    dropped: int = 0
    """Commits with a drop record."""
    outsiders: tuple[Outsider, ...] = ()
    ingester: Ingester = Ingester()


Step = tuple[str, State]
"""What somebody does, and the state after it."""


def initial(world: World) -> State:
    """The state before anybody has moved."""
    rows: list[Row | None] = [None] * world.ids
    for name, records in enumerate(world.seed_packs):
        for thing, base in records:
            below = rows[base] if base != NONE else None
            rows[thing] = Row(name, base, below.depth + 1 if below else 0)
    others = world.branches + 1 + len(world.commits) - len(world.seed_refs)
    return State(
        rows=tuple(rows),
        packs=(Pack(published=True),) * len(world.seed_packs),
        refs=(*world.seed_refs, *[NONE] * others),
        writers=tuple([Writer(task) for task in world.writers]),
        collector=Collector(world.runs),
        budget=Budget(
            world.deletions,
            world.tags,
            world.writer_crashes,
            world.collector_crashes,
            world.damages,
            world.drops,
            world.ingester_crashes,
        ),
        outsiders=tuple([Outsider(task) for task in world.outsiders]),
    )


def canonical(state: State) -> State:
    """One state for all that differ only in the names of packs or in the order of equal writers.

    Packs are numbered in the order in which rows, then writers, repack, bundles and the collector's work name
    them. So what a compaction has in hand keeps its order: rows name the old pack, nobody yet the new one.
    """
    packs, work = state.packs, state.collector.work
    if any(row is not None and row.pack >= 0 and packs[row.pack] is None for row in state.rows):
        rows = [row and (row if packs[row.pack] else row._replace(pack=_GONE)) for row in state.rows]
        state = state._replace(rows=tuple(rows))
    writers = sorted(state.writers, key=lambda writer: (writer[:-1], [packs[own] for own in writer.packs]))
    names: dict[int, int] = {}
    for row in state.rows:
        if row is not None and row.pack != _GONE:
            names.setdefault(row.pack, len(names))
    for writer in writers:
        for pack in writer.packs:
            names.setdefault(pack, len(names))
    held = (*state.collector.seen, *[o.pack for o in state.outsiders], state.ingester.pack)
    for pack in held:
        if pack >= 0 and packs[pack] is not None:
            names.setdefault(pack, len(names))
    unnamed = [name for name, pack in enumerate(packs) if pack is not None and name not in names]
    for pack in sorted(unnamed, key=lambda name: (name not in work, packs[name])):
        names[pack] = len(names)
    if all(pack < 0 or pack in names for pack in held) and all(old == new for old, new in names.items()):
        return state._replace(packs=packs[: len(names)], writers=tuple(writers))
    names |= {NONE: NONE, _GONE: _GONE}
    return State(
        tuple([row and Row(names[row.pack], row.base, row.depth, row.bad) for row in state.rows]),
        tuple([packs[old] for old in names if old >= 0]),
        state.refs,
        tuple([w._replace(packs=tuple([names[p] for p in w.packs])) if w.packs else w for w in writers]),
        state.collector._replace(
            work=tuple(sorted([names.get(pack, _GONE) for pack in work])),
            seen=tuple([names.get(pack, _GONE) for pack in state.collector.seen]),
        ),
        state.budget,
        state.dropped,
        tuple([o._replace(pack=names.get(o.pack, _GONE)) for o in state.outsiders]),
        state.ingester._replace(pack=names.get(state.ingester.pack, _GONE)),
    )


# ---- parts of several actors' steps ------------------------------------------------------------------------


def _mask(things: Iterable[int]) -> int:
    """A set of ids as a bit mask; NONE is no id."""
    mask = 0
    for thing in things:
        if thing != NONE:
            mask |= 1 << thing
    return mask


def _with(items: tuple[Any, ...], index: int, item: object) -> tuple[Any, ...]:
    """The tuple with one item replaced."""
    return (*items[:index], item, *items[index + 1 :])


def _logged(collector: Collector, commit: int) -> Collector:
    """Ref log += 1, naming `commit` (NONE: a deletion). A run notices while it has rows left to delete."""
    if "commits" not in collector.program and "chunks" not in collector.program:
        return collector
    return collector._replace(moved=True, fresh=collector.fresh | _mask([commit]))


def _bumped(writers: tuple[Writer, ...]) -> tuple[Writer, ...]:
    """gc_seq += 1: stale is whoever has looked something up, or remembers it, and has not published yet."""
    return tuple([w._replace(stale=True) if w.looked_up or w.cache else w for w in writers])


def _gapped(world: World, packs: Packs, losers: set[int]) -> Packs:
    """The packs after rows ceased to name `losers`."""
    if not world.compaction:
        return packs
    return tuple(
        [pack._replace(gap=True) if pack and name in losers else pack for name, pack in enumerate(packs)]
    )


def _chain_depth(world: World, rows: Sequence[Row | None], thing: int, base: int) -> int:
    """Walk the base chain below `thing`: its length, or NONE where it is broken, too long or a circle."""
    depth = 0
    while base != NONE:
        row = rows[base]
        depth += 1
        if row is None or row.bad or base == thing or depth > world.max_depth:
            return NONE
        base = row.base
    return depth


# ---- writer ------------------------------------------------------------------------------------------------


def _writer_steps(world: World, state: State) -> Iterator[Step]:
    """What the writers can do next, a crash included."""
    actions = {"lookup": _lookup, "pack": _write_pack, "publish": _publish}
    for index, writer in enumerate(state.writers):
        if writer.step == "done":
            continue
        outcome, after = actions[writer.step](world, state, index)
        yield f"writer {index}: {outcome}", after
        if state.budget.writer_crashes and (writer.looked_up or writer.cache):
            crashed = _moved_on(state, index, _done(writer))
            budget = state.budget._replace(writer_crashes=state.budget.writer_crashes - 1)
            yield f"writer {index}: crashes", crashed._replace(budget=budget)


def _moved_on(state: State, index: int, writer: Writer) -> State:
    """The state with this writer's place changed."""
    return state._replace(writers=_with(state.writers, index, writer))


def _done(writer: Writer) -> Writer:
    """A writer that has ended, one way or another: its lease is free."""
    return Writer(writer.task, "done")


def _content(world: World, task: Task) -> tuple[int, ...]:
    """The ids that a task publishes."""
    return (*world.commits[task.commit].chunks, task.commit)


def _lookup(world: World, state: State, index: int) -> Step:
    """Commit steps 1 and 2: read gc_seq, the tip and rows in one read transaction, plan hit or miss."""
    writer = state.writers[index]
    task = world.tasks[writer.task]
    content, bases = _content(world, task), dict(task.bases)
    begins = writer.looked_up == 0
    end = writer.looked_up + 1 if world.split_lookups else len(content)
    todo, deltas = writer.todo, writer.deltas
    for thing in content[writer.looked_up : end]:
        if _vouched(world, state.rows, thing):
            continue
        row = state.rows[thing]
        if writer.cache >> thing & 1 or (row is not None and not row.bad):
            continue
        todo |= 1 << thing
        base = state.rows[bases[thing]] if thing in bases else None
        if base is not None and not base.bad and not (row and world.rules.plain_repair):
            deltas |= 1 << thing
    after = writer._replace(
        step="lookup" if end < len(content) else "pack" if todo else "publish",
        stale=writer.stale and (begins or world.rules.oldest_lookup),
        tip=state.refs[task.branch] if begins and writer.tip == NONE else writer.tip,
        looked_up=end,
        todo=todo,
        deltas=deltas,
    )
    return "looks up", _moved_on(state, index, after)


def _vouched(world: World, rows: Sequence[Row | None], thing: int) -> bool:
    """Whether a tree that is stored is taken to vouch for a thing (by the rules none does)."""
    if world.rules.look_below_trees:
        return False
    return any(rows[tree] is not None for tree, below in world.trees if thing in below)


def _write_pack(world: World, state: State, index: int) -> Step:
    """Commit step 3: the misses are in a pack of the writer's own, sealed and renamed into place."""
    writer = state.writers[index]
    pack = Pack(False, writer.todo, writer.deltas)
    after = writer._replace(step="publish", todo=0, deltas=0, packs=(*writer.packs, len(state.packs)))
    return "writes a pack", _moved_on(state._replace(packs=(*state.packs, pack)), index, after)


def _own_row(world: World, state: State, writer: Writer, rows: list[Row | None], thing: int) -> Row | None:
    """The row that the writer's own packs can give `thing`, or None if it has to be written first."""
    bases = dict(world.tasks[writer.task].bases)
    for name in reversed(writer.packs):
        pack = state.packs[name]
        if pack is None or not pack.records >> thing & 1:
            continue
        if not pack.deltas >> thing & 1:
            return Row(name)
        if rows[thing] is not None and world.rules.plain_repair:
            continue
        depth = _chain_depth(world, rows, thing, bases[thing]) if world.rules.walk_bases else 1
        if depth != NONE:
            return Row(name, bases[thing], depth)
    return None


def _publish(world: World, state: State, index: int) -> Step:
    """Commit step 4, the one write transaction.

    Check the parents' rows. Look up again what the own packs hold, and if gc_seq moved the whole closure:
    what is live is kept, what is absent or damaged gets a row in an own pack, and if no own pack holds it the
    transaction is given up and the writer goes back to write it. Compare and set the ref, or root the commit
    at lost/. Append to the ref log.
    """
    writer = state.writers[index]
    task = world.tasks[writer.task]
    content = _content(world, task)
    for parent in world.commits[task.commit].parents:
        if state.rows[parent] is None and (world.rules.check_every_parent or parent != writer.tip):
            return "is refused, a parent is gone", _moved_on(state, index, _done(writer))

    rows = list(state.rows)
    own = {name: pack for name in writer.packs if (pack := state.packs[name])}
    written = 0
    for pack in own.values():
        written |= pack.records
    losers: set[int] = set()
    put = dict.fromkeys(own, 0)
    absent = 0
    for thing in content:
        if not written >> thing & 1 and not (writer.stale and world.rules.revalidate):
            continue
        if not written >> thing & 1 and _vouched(world, rows, thing):
            continue
        row = rows[thing]
        if row and not row.bad and _chain_depth(world, rows, thing, row.base) != NONE:
            continue
        replacement = _own_row(world, state, writer, rows, thing)
        if replacement is None:
            absent |= 1 << thing
            continue
        if row:
            losers.add(row.pack)
        rows[thing] = replacement
        put[replacement.pack] |= 1 << thing
    kept = 0 if writer.stale and world.rules.forget_cache else writer.cache
    if absent:
        again = writer._replace(step="pack", stale=False, cache=kept, todo=absent, deltas=0)
        return "aborts, something is absent", _moved_on(state, index, again)

    packs = list(_gapped(world, state.packs, losers))
    for name, pack in own.items():
        packs[name] = Pack(published=True, gap=world.compaction and pack.records != put[name])
    expected = state.refs[task.branch] == writer.tip
    ref = task.branch if expected else world.lost(task.commit)
    after = _done(writer)
    if expected and task.then != NONE:
        tip = task.commit if world.tasks[task.then].branch == task.branch else NONE
        after = Writer(task.then, tip=tip, cache=kept | _mask(content))
    return f"publishes at {world.ref_name(ref)}", state._replace(
        rows=tuple(rows),
        packs=tuple(packs),
        refs=_with(state.refs, ref, task.commit),
        writers=_with(state.writers, index, after),
        collector=_using(_logged(state.collector, task.commit), rows, put.values()),
    )


def _using(collector: Collector, rows: Sequence[Row | None], put: Iterable[int]) -> Collector:
    """A repack that has begun will see that these ids were published as differences."""
    if not collector.seen:
        return collector
    things = 0
    for some in put:
        things |= some
    bases = [row.base for thing, row in enumerate(rows) if row and things >> thing & 1]
    return collector._replace(used=collector.used | _mask(bases))


# ---- collector ---------------------------------------------------------------------------------------------


def collector_program(world: World) -> tuple[str, ...]:
    """The phases of a run after it took gc.lock, log position and roots, in the order that the rules give."""
    rules = world.rules
    rows = ("commits", "chunks") if rules.referrers_first else ("chunks", "commits")
    orphans = ("leases", "table") if rules.lease_before_table else ("table", "leases")
    files = (*orphans, "unlink")
    if world.plan:
        rows = (*rows, "encode", "turn")
    deletion = (*rows, *files) if rules.rows_before_files else (*files, *rows)
    return ("mark", *deletion, "copy") if world.compaction else ("mark", *deletion)


def _collector_steps(world: World, state: State) -> Iterator[Step]:
    """What the collector can do next, a crash included."""
    collector = state.collector
    if collector.program:
        for outcome, after in PHASES[collector.program[0]](world, state):
            yield f"gc: {outcome}", after
        if state.budget.collector_crashes:
            budget = state.budget._replace(collector_crashes=state.budget.collector_crashes - 1)
            yield "gc: crashes", state._replace(collector=Collector(collector.runs), budget=budget)
    elif collector.runs:
        begun = Collector(collector.runs - 1, collector_program(world), roots=_mask(state.refs))
        writers = state.writers if world.rules.bump_every_batch else _bumped(state.writers)
        yield "gc: takes the roots", state._replace(collector=begun, writers=writers)


def _advanced(state: State, **changes: Any) -> State:
    """The state after the current phase is over, without what no later phase needs."""
    program = state.collector.program[1:]
    if not program:
        return state._replace(collector=Collector(state.collector.runs))
    if "commits" not in program and "chunks" not in program:
        changes |= {"moved": False, "fresh": 0, "marks": 0, "alone": 0}
    if program[0] == "copy":
        changes["work"] = ()
    return state._replace(collector=state.collector._replace(program=program, **changes))


def _marked(
    world: World, rows: Rows, dropped: int, roots: int, marks: int = 0, alone: int = 0
) -> tuple[int, int]:
    """`marks` and what `roots` reach, descending only where no mark is yet, and the trees that are needed
    alone; NONE for both if a row is absent."""
    stack = [thing for thing in range(world.ids) if roots >> thing & 1]
    while stack:
        thing = stack.pop()
        if marks >> thing & 1:
            continue
        row = rows[thing]
        if row is None:
            return NONE, NONE
        marks |= 1 << thing
        if thing < len(world.commits):
            by_themselves = world.alone(thing, dropped)
            if any(rows[tree] is None for tree in by_themselves):
                return NONE, NONE
            if world.rules.alone_apart:
                alone |= _mask(by_themselves)
            else:
                marks |= _mask(by_themselves)
            stack += (*world.commits[thing].parents, *world.reach(thing, dropped))
        else:
            stack += world.below(thing)
            if row.base != NONE and world.rules.mark_bases:
                stack.append(row.base)
    return marks, alone


def _mark(world: World, state: State) -> Iterator[Step]:
    """Mark what the roots reach."""
    marks, alone = _marked(world, state.rows, state.dropped, state.collector.roots)
    done = (
        _stopped(state) if marks == NONE else ("marks", _advanced(state, roots=0, marks=marks, alone=alone))
    )
    yield done


def _stopped(state: State) -> Step:
    """A row is absent though reachable: the run ends and deletes nothing more."""
    return "finds a reachable row absent and stops", state._replace(collector=Collector(state.collector.runs))


def _unmarked(state: State, things: range) -> list[int]:
    """Those of `things` whose rows are to be deleted."""
    marked = state.collector.marks | state.collector.alone
    return [t for t in things if state.rows[t] is not None and not marked >> t & 1]


def _delete_commits(world: World, state: State) -> Iterator[Step]:
    """Delete all unmarked commit rows in one transaction."""
    yield _delete_batch(world, state, _unmarked(state, range(len(world.commits))), last=True)


def _delete_chunks(world: World, state: State) -> Iterator[Step]:
    """Delete the unmarked chunk rows of the greatest depth; the phase goes on until there are none."""
    depths = {
        t: row.depth for t in _unmarked(state, range(len(world.commits), world.ids)) if (row := state.rows[t])
    }
    edge = max if world.rules.deltas_before_bases else min
    batch = [thing for thing, depth in depths.items() if depth == edge(depths.values())]
    for some in [[thing] for thing in batch] if batch and world.single_row_batches else [batch]:
        yield _delete_batch(world, state, some, last=len(some) == len(depths))


def _delete_batch(world: World, state: State, batch: list[int], last: bool) -> Step:
    """One deleting transaction: compare the log position (moved: only mark the new roots), bump, delete."""
    collector = state.collector
    if not batch:
        return f"has no {collector.program[0]} to delete", _advanced(state)
    if collector.moved and world.rules.compare_log:
        roots = collector.fresh if world.rules.roots_from_log else _mask(state.refs)
        marks, alone = _marked(world, state.rows, state.dropped, roots, collector.marks, collector.alone)
        if marks == NONE:
            return _stopped(state)
        again = collector._replace(moved=False, fresh=0, marks=marks, alone=alone)
        return "loses the comparison and marks the new roots", state._replace(collector=again)
    after = state._replace(
        rows=tuple([None if thing in batch else row for thing, row in enumerate(state.rows)]),
        packs=_gapped(world, state.packs, {row.pack for thing in batch if (row := state.rows[thing])}),
        writers=_bumped(state.writers) if world.rules.bump_every_batch else state.writers,
    )
    return f"deletes {' '.join(map(world.thing_name, batch))}", _advanced(after) if last else after


def _check_leases(world: World, state: State) -> Iterator[Step]:
    """Orphan scan: the files whose lease is free. By the rules it comes before `_check_table`."""
    if state.ingester.bundle != NONE and world.rules.packs_lock:
        return
    owned = {name for writer in state.writers for name in writer.packs}
    known = range(len(state.packs)) if world.rules.lease_before_table else state.collector.work
    free = tuple([name for name in known if state.packs[name] and name not in owned])
    yield f"finds packs {free} without a lease", _advanced(state, work=free)


def _check_table(world: World, state: State) -> Iterator[Step]:
    """List what to unlink: published packs that no row names, and orphans: neither published nor leased."""
    staying = ~0 if world.rules.rows_before_files else state.collector.marks | state.collector.alone
    named = {row.pack for thing, row in enumerate(state.rows) if row and staying >> thing & 1}
    orphans = state.collector.work if world.rules.lease_before_table else range(len(state.packs))
    dead = []
    for name, pack in enumerate(state.packs):
        if pack and (
            name not in named if pack.published else name in orphans and world.rules.collect_orphans
        ):
            dead.append(name)
    yield f"finds packs {tuple(dead)} dead", _advanced(state, work=tuple(dead))


def _unlink(world: World, state: State) -> Iterator[Step]:
    """Unlink the dead packs."""
    work = state.collector.work
    packs = tuple([None if name in work else pack for name, pack in enumerate(state.packs)])
    yield f"unlinks packs {work}", _advanced(state._replace(packs=packs), work=())


def _encode(world: World, state: State) -> Iterator[Step]:
    """Repack: the chunks of the plan are in a new pack, in their new encodings."""
    seen = [row.pack for thing, _ in world.plan if (row := state.rows[thing]) and not row.bad]
    if len(seen) < len(world.plan):
        after = _advanced(state)
        yield "has no family to repack", _advanced(after)
        return
    family = _mask(thing for thing, _ in world.plan)
    # Whoever stands on the family by now belongs to it, and this plan would be another.
    used = _mask(row.base for thing, row in enumerate(state.rows) if row and not family >> thing & 1)
    after = state._replace(packs=(*state.packs, Pack(False, family)))
    yield "encodes a family anew", _advanced(after, seen=(*seen, len(state.packs)), used=used)


def _turn(world: World, state: State) -> Iterator[Step]:
    """Repack, one transaction: bump gc_seq; the rows of the family, if all still are where they were seen and
    every chain will do, name the new pack and the new bases."""
    *seen, new = state.collector.seen
    pairs = list(zip(world.plan, seen, strict=True))
    if not world.rules.turn_whole:
        pairs = [pair for pair in pairs if (row := state.rows[pair[0][0]]) and row.pack != new][:1]
    rows = list(state.rows)
    for (thing, base), pack in pairs:
        row = rows[thing]
        if row is None or row.bad or row.pack != pack:
            pairs = []
            break
        rows[thing] = Row(new, base)
    for (thing, base), _ in pairs:
        before, depth = state.rows[thing], _chain_depth(world, rows, thing, base)
        assert before is not None
        grows = depth > _chain_depth(world, state.rows, thing, before.base)
        above = state.collector.used >> thing & 1 and world.rules.count_those_above
        if world.rules.turn_whole and (depth == NONE or (grows and above)):
            pairs = []
            break
        row = rows[thing]
        assert row is not None
        rows[thing] = row._replace(depth=depth)
    losers = {pack for _, pack in pairs}
    packs = list(_gapped(world, state.packs, losers) if pairs else state.packs)
    packs[new] = Pack(published=True, gap=not pairs)
    after = state._replace(
        rows=tuple(rows) if pairs else state.rows,
        packs=tuple(packs),
        writers=_bumped(state.writers) if world.rules.bump_every_batch else state.writers,
    )
    words = "turns the family" if pairs else "leaves the family as it is"
    if not world.rules.turn_whole and pairs and any(rows[thing].pack != new for thing, _ in world.plan):  # type: ignore[union-attr]
        yield words + ", in part", after
        return
    yield words, _advanced(after, seen=(), used=0)


def _copy(world: World, state: State) -> Iterator[Step]:
    """Compaction: copy the live records of a partly dead pack into a new one; a bad one spares the pack."""
    bad = {row.pack for row in state.rows if row and row.bad}
    named = {row.pack for row in state.rows if row}
    partly = [name for name in named - bad if (pack := state.packs[name]) and pack.gap]
    order = ("repoint", "retire") if world.rules.repoint_before_unlink else ("retire", "repoint")
    for old in partly:
        copied = _mask(thing for thing, row in enumerate(state.rows) if row and row.pack == old)
        program, work = (*order, *state.collector.program), (old, len(state.packs))
        yield (
            f"copies the live records of pack {old}",
            state._replace(
                packs=(*state.packs, Pack(False, copied)),
                collector=state.collector._replace(program=program, work=work),
            ),
        )
    if not partly:
        yield "has nothing to compact", _advanced(state)


def _repoint(world: World, state: State) -> Iterator[Step]:
    """Compaction, one transaction: bump gc_seq; the rows that still name the old pack name the new one."""
    old, new = state.collector.work
    pack = state.packs[new]
    copied = pack.records if pack else 0
    rows = list(state.rows)
    moved = 0
    for thing, row in enumerate(rows):
        if row and row.pack == old and copied >> thing & 1:
            rows[thing] = row._replace(pack=new)
            moved |= 1 << thing
    after = state._replace(
        rows=tuple(rows),
        packs=_with(state.packs, new, Pack(published=True, gap=moved != copied)),
        writers=_bumped(state.writers) if world.rules.bump_every_batch else state.writers,
    )
    yield f"re-points the rows of pack {old} to pack {new}", _advanced(after, work=(old,))


def _retire(world: World, state: State) -> Iterator[Step]:
    """Compaction: unlink the old pack."""
    old = state.collector.work[0]
    yield f"unlinks pack {old}", _advanced(state._replace(packs=_with(state.packs, old, None)))


PHASES: dict[str, Callable[[World, State], Iterator[Step]]] = {
    "mark": _mark,
    "commits": _delete_commits,
    "chunks": _delete_chunks,
    "leases": _check_leases,
    "table": _check_table,
    "unlink": _unlink,
    "encode": _encode,
    "turn": _turn,
    "copy": _copy,
    "repoint": _repoint,
    "retire": _retire,
}


# ---- without the index -------------------------------------------------------------------------------------


def _outsider_steps(world: World, state: State) -> Iterator[Step]:
    """What writers without the index do next: look, and leave a bundle."""
    for index, outsider in enumerate(state.outsiders):
        task = world.tasks[outsider.task]
        if outsider.step == "look":
            tip = state.refs[task.branch]
            reached = _marked(world, state.rows, state.dropped, _mask([tip]))[0] if tip != NONE else 0
            reusable = reached if world.rules.reuse_from_parent else ~0
            content = _content(world, task)
            kept = [t for t in content if reusable >> t & 1 and (row := state.rows[t]) and not row.bad]
            records = _mask(content) & ~_mask(kept)
            deltas = _mask(
                thing
                for thing, base in task.bases
                if records >> thing & 1 and reusable >> base & 1 and state.rows[base]
            )
            after = outsider._replace(step="leave", tip=tip, records=records, deltas=deltas)
            yield f"outsider {index}: looks", _outside(state, index, after)
        elif outsider.step == "leave":
            yield (
                f"outsider {index}: leaves a bundle",
                _outside(state, index, outsider._replace(step="waiting")),
            )


def _outside(state: State, index: int, outsider: Outsider) -> State:
    """The state with this outsider's place changed."""
    return state._replace(outsiders=_with(state.outsiders, index, outsider))


def _ingester_steps(world: World, state: State) -> Iterator[Step]:
    """What the ingester does next, a crash included. It holds packs.lock from `_check_bundle` to the end."""
    ingester = state.ingester
    if ingester.bundle == NONE:
        if world.rules.packs_lock and state.collector.program[:1] in (("table",), ("unlink",)):
            return
        for index, outsider in enumerate(state.outsiders):
            if outsider.step == "waiting":
                yield _check_bundle(world, state, index)
        return
    yield {"place": _place, "enter": _enter, "clear": _clear}[ingester.step](world, state, ingester.bundle)
    if state.budget.ingester_crashes:
        budget = state.budget._replace(ingester_crashes=state.budget.ingester_crashes - 1)
        yield "ingester: crashes", state._replace(ingester=Ingester(), budget=budget)


def _reused(world: World, outsider: Outsider) -> list[int]:
    """What a bundle does not hold itself."""
    task = world.tasks[outsider.task]
    bases = [base for thing, base in task.bases if outsider.deltas >> thing & 1]
    needed = (*_content(world, task), *world.commits[task.commit].parents, *bases)
    return [thing for thing in needed if not outsider.records >> thing & 1]


def _is_there(world: World, rows: Sequence[Row | None], thing: int) -> bool:
    """Whether a row is live down its base chain."""
    row = rows[thing]
    return row is not None and not row.bad and _chain_depth(world, rows, thing, row.base) != NONE


def _check_bundle(world: World, state: State, index: int) -> Step:
    """Ingest steps 1 and 2: is it in the log already; is all there that it does not hold."""
    outsider = state.outsiders[index]
    if outsider.entered and world.rules.ask_the_log:
        return f"ingester: finds bundle {index} in the log", state._replace(ingester=Ingester(index, "clear"))
    if not all(_is_there(world, state.rows, thing) for thing in _reused(world, outsider)):
        return _quarantined(world, state, index)
    return f"ingester: checks bundle {index}", state._replace(ingester=Ingester(index, "place"))


def _quarantined(world: World, state: State, index: int) -> Step:
    """It builds on what is not stored any more, as its branch was deleted: put aside, as it is."""
    outsider = state.outsiders[index]
    built_on = {*world.commits[world.tasks[outsider.task].commit].parents, outsider.tip} - {NONE}
    reason = any(state.rows[commit] is None for commit in built_on)
    aside = _outside(state, index, Outsider(outsider.task, "gone" if reason else "refused"))
    return f"ingester: puts bundle {index} aside", aside._replace(ingester=Ingester())


def _place(world: World, state: State, index: int) -> Step:
    """Ingest step 3: the pack has its final name, and by the rules also that in incoming/."""
    outsider = state.outsiders[index]
    name = outsider.pack
    if name == NONE:
        name = len(state.packs)
        state = state._replace(packs=(*state.packs, Pack(False, outsider.records, outsider.deltas)))
        if not world.rules.incoming_stays:
            state = _outside(state, index, outsider._replace(pack=name))
    return f"ingester: places the pack of bundle {index}", state._replace(
        ingester=Ingester(index, "enter", name)
    )


def _enter(world: World, state: State, index: int) -> Step:
    """Ingest step 4, the one transaction: look all up again, put rows, compare and set the ref."""
    outsider, name = state.outsiders[index], state.ingester.pack
    task = world.tasks[outsider.task]
    if world.rules.ingest_looks_again and not all(
        _is_there(world, state.rows, thing) for thing in _reused(world, outsider)
    ):
        return _quarantined(world, state, index)
    rows, put, losers = list(state.rows), 0, set()
    for thing in _content(world, task):
        if not outsider.records >> thing & 1 or _is_there(world, rows, thing):
            continue
        row = rows[thing]
        base = dict(task.bases)[thing] if outsider.deltas >> thing & 1 else NONE
        depth = _chain_depth(world, rows, thing, base)
        if base != NONE and (depth == NONE or row):
            return _quarantined(world, state, index)
        if row:
            losers.add(row.pack)
        rows[thing] = Row(name, base, depth)
        put |= 1 << thing
    packs = list(_gapped(world, state.packs, losers))
    if name >= 0 and packs[name]:
        packs[name] = Pack(published=True, gap=world.compaction and put != outsider.records)
    expected = state.refs[task.branch] == outsider.tip
    ref = task.branch if expected else world.lost(task.commit)
    after = _outside(state, index, outsider._replace(entered=min(2, outsider.entered + 1)))
    return f"ingester: enters bundle {index} at {world.ref_name(ref)}", after._replace(
        rows=tuple(rows),
        packs=tuple(packs),
        refs=_with(state.refs, ref, task.commit),
        collector=_using(_logged(state.collector, task.commit), rows, [put]),
        ingester=Ingester(index, "clear"),
    )


def _clear(world: World, state: State, index: int) -> Step:
    """Ingest step 5: nothing is left in incoming/."""
    done = _outside(state, index, Outsider(state.outsiders[index].task, "gone"))
    return f"ingester: clears bundle {index} away", done._replace(ingester=Ingester())


def bundle_flaw(state: State) -> str:
    """A bundle that somebody was told is stored and that cannot be entered any more, or was entered twice."""
    for index, outsider in enumerate(state.outsiders):
        if outsider.step == "refused":
            return f"bundle {index} is in quarantine, and what it builds on is there"
        if outsider.entered > 1:
            return f"bundle {index} was entered twice"
        moved = outsider.pack != NONE and not outsider.entered and outsider.step == "waiting"
        if moved and (outsider.pack < 0 or state.packs[outsider.pack] is None):
            return f"the pack of bundle {index} is gone"
    return ""


# ---- passing actors ----------------------------------------------------------------------------------------


def _passing_steps(world: World, state: State) -> Iterator[Step]:
    """Deletions of refs, new refs to existing commits, and damage found."""
    refs, collector, budget = state.refs, state.collector, state.budget
    if budget.deletions:
        spent = budget._replace(deletions=budget.deletions - 1)
        for ref, commit in enumerate(refs):
            if commit != NONE:
                yield (
                    f"deleter: removes {world.ref_name(ref)}",
                    state._replace(
                        refs=_with(refs, ref, NONE), collector=_logged(collector, NONE), budget=spent
                    ),
                )
    if budget.tags:
        tag, spent = world.branches, budget._replace(tags=budget.tags - 1)
        for commit in range(len(world.commits)):
            if refs[tag] != commit and (state.rows[commit] or not world.rules.check_tagged_row):
                yield (
                    f"tagger: points the tag at {world.thing_name(commit)}",
                    state._replace(
                        refs=_with(refs, tag, commit), collector=_logged(collector, commit), budget=spent
                    ),
                )
    if budget.drops:
        spent = budget._replace(drops=budget.drops - 1)
        for commit in range(len(world.commits)):
            if state.rows[commit] and not state.dropped >> commit & 1:
                yield (
                    f"retention: drops {world.thing_name(commit)}",
                    state._replace(
                        dropped=state.dropped | 1 << commit, collector=_logged(collector, NONE), budget=spent
                    ),
                )
    if budget.damages:
        spent = budget._replace(damages=budget.damages - 1)
        for thing in range(len(world.commits), world.ids):
            row = state.rows[thing]
            if row and not row.bad:
                rows = _with(state.rows, thing, row._replace(bad=True))
                yield (
                    f"scrub: finds {world.thing_name(thing)} damaged",
                    state._replace(rows=rows, budget=spent),
                )


def successors(world: World, state: State) -> Iterator[Step]:
    """Every step that anybody can take."""
    yield from _writer_steps(world, state)
    yield from _collector_steps(world, state)
    yield from _outsider_steps(world, state)
    yield from _ingester_steps(world, state)
    yield from _passing_steps(world, state)


# ---- what must hold ----------------------------------------------------------------------------------------


def flaw(world: World, rows: Rows, packs: Packs, commit: int, dropped: int = 0) -> str:
    """What `commit` must reach and cannot have, in words; empty if there is nothing."""
    stack = [(commit, 0)]
    while stack:
        thing, depth = stack.pop()
        row = rows[thing]
        if row is None:
            return f"{world.thing_name(thing)} has no row"
        if row.pack == _GONE or packs[row.pack] is None:
            return f"{world.thing_name(thing)} is in a pack that is gone"
        if depth > world.ids:
            return f"{world.thing_name(thing)} is its own base"
        if row.base != NONE and depth >= world.max_depth:
            return f"the chain of bases above {world.thing_name(row.base)} is too long"
        if thing < len(world.commits):
            for tree in world.alone(thing, dropped):
                if rows[tree] is None:
                    return f"{world.thing_name(tree)} has no row"
            needed = (*world.commits[thing].parents, *world.reach(thing, dropped))
            stack += [(below, 0) for below in needed]
        else:
            stack += [(below, 0) for below in world.below(thing)]
            if row.base != NONE:
                stack.append((row.base, depth + 1))
    return ""


def leaks(world: World, state: State) -> bool:
    """Whether one more collector run, alone, leaves more than what refs reach, packs in use, and no gap."""
    state = state._replace(
        collector=Collector(1), budget=Budget(), writers=(), outsiders=(), ingester=Ingester()
    )
    while step := next(successors(world, state), None):
        state = step[1]
    rows = _mask(thing for thing, row in enumerate(state.rows) if row)
    files = {name for name, pack in enumerate(state.packs) if pack}
    unused = files - {row.pack for row in state.rows if row}
    gaps = any(pack.gap for pack in state.packs if pack)
    marks, alone = _marked(world, state.rows, state.dropped, _mask(state.refs))
    return rows != marks | alone or bool(unused) or gaps


@dataclass
class Report:
    """What an exploration found. The lists are in the order of distance from the start."""

    world: World
    reduce: Callable[[State], State]
    before: dict[State, State | None]
    """Each visited state and the one it was first reached from."""
    losses: list[State] = field(default_factory=list)
    broken: list[State] = field(default_factory=list)
    leaks: list[State] = field(default_factory=list)

    def trace(self, target: State) -> list[str]:
        """A shortest way to `target`, a line per step; names of packs and writers stay the same along it."""
        path: list[State] = []
        wanted: State | None = target
        while wanted is not None:
            path.append(wanted)
            wanted = self.before[wanted]
        lines: list[str] = []
        state = initial(self.world)
        for wanted in reversed(path[:-1]):
            steps = successors(self.world, state)
            label, state = next(step for step in steps if self.reduce(step[1]) == wanted)
            lines.append(label)
        return lines


def explore(
    world: World, reduce: Callable[[State], State] = canonical, first_loss_only: bool = False
) -> Report:
    """Visit every reachable state, breadth first. What follows a loss is not explored."""
    start = reduce(initial(world))
    report = Report(world, reduce, {start: None})
    flawed: dict[tuple[Rows, Packs, int], int] = {}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        key = (state.rows, state.packs, state.dropped)
        if key not in flawed:
            flawed[key] = _mask(
                commit
                for commit in range(len(world.commits))
                if flaw(world, state.rows, state.packs, commit, state.dropped)
            )
        if flawed[key] & _mask(state.refs) or (state.outsiders and bundle_flaw(state)):
            report.losses.append(state)
            if first_loss_only:
                break
            continue
        if flawed[key] & _mask(thing for thing, row in enumerate(state.rows) if row):
            report.broken.append(state)
        final = True
        for _, after in successors(world, state):
            final = False
            after = reduce(after)
            if after not in report.before:
                report.before[after] = state
                queue.append(after)
        if final and leaks(world, state):
            report.leaks.append(state)
    return report
