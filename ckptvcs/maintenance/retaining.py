"""Retention at work: what policies drop is planned, recorded in one log entry, and collected.

1. From one snapshot: refs, pins and drop records; then the commits they reach. `retention` decides.
2. One transaction records all drops, if nothing has come to depend on what they drop: between the snapshot
   and the transaction somebody may have tagged, pinned, branched or committed from it. What the log got since
   is looked at outside of the transaction, the third time inside it.
3. The collector frees what was dropped at once, whatever the undo window is: it re-encodes what was stored as
   a difference to it.

A crash after 2 leaves drops that the next collection frees. A commit lives on one branch, its *home*: the
branch it was made on, as the log tells, as long as that holds it; else every branch whose line it is on. It
loses something only if all its homes have a policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ckptvcs.config import Config
from ckptvcs.errors import ConflictError, InvalidError, LockedError, NotFoundError
from ckptvcs.history import refs
from ckptvcs.ids import ObjectId
from ckptvcs.maintenance import gc, retention
from ckptvcs.maintenance.points import Point, Points, Roots, roots
from ckptvcs.maintenance.retention import Policy, Score
from ckptvcs.store import Drop, Move, Pin, Snapshot, Store

_RETRIES: Final = 10
_LOST_COMPARISONS: Final = 3

ModeOf = Callable[[str], str]
"""'min' or 'max' for a metric; InvalidError if the repository does not know."""


def chooser(
    wanted: str | Sequence[str] | None, policy: Policy | None, config: Config
) -> Callable[[Sequence[str]], dict[str, Policy]]:
    """Gives the branches that match `wanted` (all without it) their policies: `policy`, else the config's.

    What it returns raises NotFoundError if no branch matches, InvalidError if there is no policy for any.
    """
    patterns = None if wanted is None else ([wanted] if isinstance(wanted, str) else list(wanted))

    def choose(branches: Sequence[str]) -> dict[str, Policy]:
        chosen = [
            name
            for name in branches
            if patterns is None or any(retention.is_for(pattern, name) for pattern in patterns)
        ]
        for pattern in patterns or ():
            if not any(retention.is_for(pattern, name) for name in branches):
                raise NotFoundError(
                    f"no branch matches {pattern!r}",
                    hint="`ckpt branch` lists them; exp/* means all below exp",
                )
        if policy is not None:
            return dict.fromkeys(chosen, policy)
        rules = {name: config.retention(name, retention.is_for) for name in chosen}
        if not any(rules.values()) and chosen:
            raise InvalidError(
                "there is no retention policy for these branches",
                hint="give rules, as in --keep-last 3 (keep_last=3), or set retention.keep_last and the like",
            )
        return {name: Policy.of(given) for name, given in rules.items() if given}

    return choose


@dataclass(slots=True)
class Verdict:
    """What becomes of a commit.

    Attributes:
        branch: on whose line it is.
        reason: why it is kept, or loses something.
        names: the components it loses; () for all of its content, None if it is kept.
        freed: bytes of the records that go with it. What several commits lose counts for the oldest.
    """

    commit: ObjectId
    step: int | None
    branch: str
    reason: str
    names: tuple[str, ...] | None = None
    freed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "commit": str(self.commit),
            "step": self.step,
            "branch": self.branch,
            "reason": self.reason,
            "drops": None if self.names is None else list(self.names),
            "freed": self.freed,
        }


@dataclass(slots=True)
class Report:
    """What retention did, or would do.

    Attributes:
        dropped: commits that lose something, oldest first.
        kept: commits of the same lines that keep their content, newest first.
        freed: bytes freed: those of `dropped`, and `garbage`, less `recoded`.
        garbage: bytes that nothing needed before, which go along.
        recoded: bytes by which chunks grew that were stored as a difference to what goes; negative if they
            are smaller now.
        collected: False if another process was collecting: it, or the next one, frees what was dropped.
        problems: damage that the collector met.
    """

    dry_run: bool = False
    dropped: list[Verdict] = field(default_factory=list)
    kept: list[Verdict] = field(default_factory=list)
    freed: int = 0
    garbage: int = 0
    recoded: int = 0
    collected: bool = True
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "dry_run": self.dry_run,
            "dropped": [each.as_dict() for each in self.dropped],
            "kept": [each.as_dict() for each in self.kept],
            "freed": self.freed,
            "garbage": self.garbage,
            "recoded": self.recoded,
            "collected": self.collected,
            "problems": self.problems,
        }


class Retention:
    """Applies policies to one store, again and again: what it read of the history it remembers."""

    def __init__(self, store: Store, mode_of: ModeOf) -> None:
        self._store = store
        self._mode_of = mode_of
        self._points = Points(store)
        self._homes: dict[ObjectId, str] = {}
        self._logged = 0
        self._owed = False  # what was dropped could not be collected yet

    def run(
        self,
        policies: Callable[[Sequence[str]], Mapping[str, Policy]],
        *,
        grace: float,
        who: str,
        dry_run: bool = False,
        attribute: bool = True,
        idle: bool = True,
        say: Callable[[str], None] = lambda _: None,
    ) -> Report:
        """Drop what policies do not keep, and free it. Durable on return.

        Args:
            policies: the policy of each branch that has one, given all branches.
            grace: the undo window in seconds, for what was deleted otherwise.
            attribute: tell which commit frees how many bytes.
            idle: collect also if nothing is dropped.

        ConflictError if refs keep moving under what would be dropped.
        """
        for _ in range(_RETRIES):
            top = roots(self._store, grace)
            plan = self._plan(top, policies(sorted(top.branches)))
            report = Report(dry_run, plan.dropped, plan.kept)
            dropping = {each.commit: each.names for each in plan.dropped if each.names is not None}
            if dry_run or not dropping or self._harmless(top.position, dropping):
                if attribute and dropping:
                    self._attribute(report, top, dropping, say)
                if dry_run or not dropping or self._record(top.position, dropping, who):
                    break
        else:
            raise ConflictError(
                "refs keep moving to what retention would drop", hint="try again, or pin what is needed"
            )
        if dropping or idle or self._owed:
            self._collect(report, grace, who, dropping)
        return report

    def _collect(
        self, report: Report, grace: float, who: str, dropping: Mapping[ObjectId, tuple[str, ...]]
    ) -> None:
        try:
            found = gc.collect(
                self._store,
                grace=grace,
                dry_run=report.dry_run,
                who=who,
                dropping=dropping if report.dry_run else {},
                rebase=True,
            )
        except LockedError:
            report.collected = False
            self._owed = not report.dry_run
            return
        self._owed = self._owed and report.dry_run
        report.freed, report.problems = found.freed, list(found.problems)
        attributed = sum(each.freed for each in report.dropped)
        if not attributed:
            report.garbage = max(report.freed, 0)
        report.recoded = attributed + report.garbage - report.freed

    # -- deciding ----------------------------------------------------------------------------------

    def _plan(self, top: Roots, policies: Mapping[str, Policy]) -> _Plan:
        points = self._points
        reachable = points.reach(top.firm)
        taken: dict[ObjectId, tuple[str, ...]] = {}
        metrics: dict[ObjectId, Mapping[str, Any]] = {}
        with self._store.snapshot() as snapshot:
            for id in reachable:
                metrics[id] = points.metrics(id, snapshot)
                found = snapshot.drops(id)
                if found is not None:
                    taken[id] = found
        gone = {id for id, names in taken.items() if names == ()}
        lines = {branch: points.line(top.branches[branch]) for branch in policies}
        retention.check_known(policies, lines)
        safe = retention.protected(
            points, top, reachable, self._scores(metrics), self._store.restored_by_claimants(), gone
        )
        kept: dict[ObjectId, str] = {}
        for branch, policy in policies.items():
            score = self._score(policy, metrics)
            for id, rule in retention.keeps(lines[branch], policy, score, gone).items():
                kept.setdefault(id, rule)
        homes = self._homes_of(top, lines)
        plan = _Plan()
        for branch, line in lines.items():
            for point in line:
                if point.id in plan.seen or point.id in gone:
                    continue
                plan.seen.add(point.id)
                why: str | None = safe.get(point.id) or kept.get(point.id)
                others = homes[point.id] - policies.keys()
                if why is None and others:
                    why = f"made on {min(others)}, which no policy is for"
                if why is None:
                    self._drop(plan, point, {each: policies[each] for each in homes[point.id]}, taken)
                else:
                    plan.kept.append(Verdict(point.id, point.step, branch, why))
        order = {id: at for at, id in enumerate(points.oldest_first(reachable))}
        plan.dropped.sort(key=lambda verdict: order[verdict.commit])
        plan.kept.sort(key=lambda verdict: -order[verdict.commit])
        return plan

    def _drop(
        self,
        plan: _Plan,
        point: Point,
        policies: Mapping[str, Policy],
        taken: Mapping[ObjectId, tuple[str, ...]],
    ) -> None:
        """Note what a commit loses: of several policies, what all of them drop."""
        names: tuple[str, ...] | None = ()
        for policy in policies.values():
            found = retention.components(policy.drop, point.sizes)
            if found is None or names == ():
                names = found
            elif found and names:
                names = tuple(name for name in names if name in found) or None
            if names is None:
                break
        if names:
            names = tuple(name for name in names if name not in taken.get(point.id, ())) or None
        branch = next(iter(policies))
        if names is None:
            plan.kept.append(Verdict(point.id, point.step, branch, "nothing in it is to be dropped"))
        else:
            reason = f"not kept by: {policies[branch]}"
            plan.dropped.append(Verdict(point.id, point.step, branch, reason, names))

    def _scores(self, metrics: Mapping[ObjectId, Mapping[str, Any]]) -> dict[str, Score]:
        """Scores of all metrics of which it is known what is better."""
        found = {}
        for name in {name for values in metrics.values() for name in values}:
            try:
                found[name] = retention.score_by(name, self._mode_of(name), metrics.__getitem__)
            except InvalidError:
                continue
        return found

    def _score(self, policy: Policy, metrics: Mapping[ObjectId, Mapping[str, Any]]) -> Score | None:
        if policy.metric is None:
            return None
        mode = policy.mode or self._mode_of(policy.metric)
        return retention.score_by(policy.metric, mode, metrics.__getitem__)

    def _homes_of(self, top: Roots, lines: Mapping[str, Sequence[Point]]) -> dict[ObjectId, set[str]]:
        """The branches that each commit of these lines is at home on."""
        with self._store.snapshot() as snapshot:
            for entry in snapshot.log(after=self._logged):
                for op in entry.operations:
                    if (
                        isinstance(op, Move)
                        and isinstance(op.new, ObjectId)
                        and op.name.startswith(refs.HEADS)
                    ):
                        self._homes.setdefault(op.new, op.name.removeprefix(refs.HEADS))
                self._logged = entry.position
        wanted = {point.id for line in lines.values() for point in line}
        holders: dict[ObjectId, set[str]] = {id: set() for id in wanted}
        for branch, tip in top.branches.items():
            for point in self._points.line(tip):
                if point.id in wanted:
                    holders[point.id].add(branch)
        for id, holding in holders.items():
            home = self._homes.get(id)
            if home in holding:
                holders[id] = {home}
        return holders

    # -- recording ---------------------------------------------------------------------------------

    def _record(self, position: int, dropping: Mapping[ObjectId, tuple[str, ...]], who: str) -> bool:
        """Record the drops, in one log entry; False if something has come to depend on them."""
        operations = [Drop(id, names) for id, names in dropping.items()]
        why = f"retain: {len(operations)} commit{'s' if len(operations) > 1 else ''}"
        for lost in range(_LOST_COMPARISONS + 1):
            with self._store.snapshot() as snapshot:
                now = snapshot.position()
            if not self._harmless(position, dropping):
                return False
            position = now

            def unchanged(change: Snapshot, position: int = position, last: bool = lost == 3) -> bool:
                same = change.position() == position
                return same or (last and self._harmless(position, dropping, change))

            if self._store.update(operations, who=who, why=why, provided=unchanged) is not None:
                return True
        return False

    def _harmless(
        self, position: int, dropping: Mapping[ObjectId, Any], within: Snapshot | None = None
    ) -> bool:
        """Whether nothing that the log got behind a position names what is dropped, or grew out of it."""
        named: set[ObjectId] = set()

        def look(snapshot: Snapshot) -> None:
            for entry in snapshot.log(after=position):
                for op in entry.operations:
                    if isinstance(op, Move) and isinstance(op.new, ObjectId):
                        named.add(op.new)
                    elif isinstance(op, Pin) and op.pinned:
                        named.add(op.commit)

        if within is not None:
            look(within)
        else:
            with self._store.snapshot() as snapshot:
                look(snapshot)
        known = {id for id in named if id in self._points.of}
        self._points.reach(named - known)
        grown = {before for id in named - known for before in self._points.of[id].before}
        return not (named | grown) & dropping.keys()

    # -- bytes -------------------------------------------------------------------------------------

    def _attribute(
        self,
        report: Report,
        top: Roots,
        dropping: Mapping[ObjectId, tuple[str, ...]],
        say: Callable[[str], None],
    ) -> None:
        """Give each byte that goes to the oldest commit that loses it, and the rest to nobody."""
        from ckptvcs.maintenance.usage import losses  # brings numpy, which background work does without

        by_commit, report.garbage = losses(
            self._store, self._points, top, dropping, [each.commit for each in report.dropped], say
        )
        for verdict in report.dropped:
            verdict.freed = by_commit[verdict.commit]


@dataclass(slots=True)
class _Plan:
    dropped: list[Verdict] = field(default_factory=list)
    kept: list[Verdict] = field(default_factory=list)
    seen: set[ObjectId] = field(default_factory=set)
