"""Which commits a policy keeps, and why. Pure: nothing here reads or deletes anything.

A policy looks at one *line* of commits: a branch's tip and its first parents. Order comes from the parents
alone, so neither clocks nor step numbers nor names decide what is newer. A commit is kept if one rule of one
policy keeps it, or if something protects it whatever a policy says (`protected`). What is not kept loses its
payload, or the components that the policy drops. The commit itself stays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ckptvcs.config import seconds_of
from ckptvcs.errors import InvalidError
from ckptvcs.history.commit import rankable
from ckptvcs.ids import ObjectId
from ckptvcs.maintenance.points import Point, Points, Roots
from ckptvcs.state import paths

Score = Callable[[Point], float | None]
"""The lower the better; None without a value."""

COUNTS: Final = ("keep_last", "keep_every", "keep_best", "thin")


def checked_count(value: Any, name: str) -> int | None:
    """A number of commits to keep, from 1 up, or None. 0 is refused: it reads as 'no limit' to some and as
    'delete all' to others."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidError(f"{name} cannot be {value!r:.40}", hint="a number from 1 up, or None for no limit")
    return value


@dataclass(frozen=True, slots=True)
class Policy:
    """What to keep of a line, and what the rest loses.

    Attributes:
        keep_last: so many newest commits.
        keep_every: of every so many steps the first commit.
        keep_best: so many best commits by `metric`. Of equal values the oldest; NaN is never best. As long as
            no commit of the line has a value, all are kept: there is nothing to judge by.
        metric: its name.
        mode: 'min' or 'max'; None asks the repository.
        keep_within: all from the newest back to the last one that was made less than so many seconds before
            the newest. The times are those recorded in the commits.
        thin: the newest so many, and of twice as many before them every second, of four times as many before
            these every fourth, and so on. What is kept now was kept before, however often this runs.
        drop: patterns of components to drop, as in 'optimizer/**'; without any the whole payload.
    """

    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: int | None = None
    metric: str | None = None
    mode: str | None = None
    keep_within: float | None = None
    thin: int | None = None
    drop: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Policy:
        """A policy from plain values, as the config or a caller gives them. InvalidError for what cannot be,
        and for a policy that would keep nothing but what is always protected."""
        known = {name: value for name, value in values.items() if value is not None}
        strange = known.keys() - set(cls.__slots__)
        if strange:
            raise InvalidError(
                f"a retention policy has no {min(strange)}", hint=f"it has {', '.join(cls.__slots__)}"
            )
        for name in COUNTS:
            checked_count(known.get(name), name)
        if "keep_within" in known:
            known["keep_within"] = seconds_of(known["keep_within"])
        drop = known.get("drop", ())
        known["drop"] = (drop,) if isinstance(drop, str) else tuple(drop)
        for pattern in known["drop"]:
            if not isinstance(pattern, str) or not pattern:
                raise InvalidError(
                    f"drop cannot be {pattern!r:.40}", hint="a component, as in 'optimizer/**'"
                )
        if ("keep_best" in known) != ("metric" in known):
            raise InvalidError(
                "keep_best and metric belong together", hint="as in keep_best=3, metric='val_loss'"
            )
        if known.get("mode") not in (None, "min", "max"):
            raise InvalidError(f"mode cannot be {known['mode']!r:.40}", hint="choose 'min' or 'max'")
        if not {*COUNTS, "keep_within"} & known.keys():
            raise InvalidError(
                "a retention policy needs a rule for what to keep",
                hint="keep_last, keep_every, keep_best with metric, keep_within or thin",
            )
        return cls(**known)

    def plain(self) -> dict[str, Any]:
        """Its rules as plain values, which `of` takes."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {**{name: each for name, each in values.items() if each is not None}, "drop": list(self.drop)}

    def __str__(self) -> str:
        """Its rules in words, as `keeps` names them."""
        rules = [
            f"the last {self.keep_last}" if self.keep_last else "",
            f"one of every {self.keep_every:,} steps" if self.keep_every else "",
            f"the best {self.keep_best} by {self.metric}" if self.keep_best else "",
            f"all within {_span(self.keep_within)}" if self.keep_within is not None else "",
            f"ever fewer behind the last {self.thin}" if self.thin else "",
        ]
        return ", ".join(filter(None, rules))


def _span(seconds: float | None) -> str:
    for length, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds and seconds >= length and seconds % length == 0:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds or 0:g} s"


def score_by(metric: str, mode: str, metrics: Callable[[ObjectId], Mapping[str, Any]]) -> Score:
    """A score that is lower the better: the metric's value, turned round if large is better."""
    sign = 1 if mode == "min" else -1

    def score(point: Point) -> float | None:
        value = rankable(metrics(point.id).get(metric))
        return None if value is None else sign * value

    return score


def keeps(
    line: Sequence[Point], policy: Policy, score: Score | None = None, gone: Collection[ObjectId] = ()
) -> dict[ObjectId, str]:
    """The commits that a policy keeps of a line, each with the rule that does.

    The line goes from the newest to the oldest. `score` is that of the policy's metric. Commits in `gone`
    have lost their payload; they count for the order, and are not among the best.
    """
    found: dict[ObjectId, str] = {}

    def keep(points: Sequence[Point], why: str) -> None:
        for point in points:
            found.setdefault(point.id, why)

    if policy.keep_last:
        keep(line[: policy.keep_last], f"among the last {policy.keep_last}")
    if policy.keep_best:
        keep(*_best(line, policy, score, gone))
    if policy.keep_every:
        keep(_every(line, policy.keep_every), f"the first of {policy.keep_every:,} steps")
    if policy.keep_within is not None and line:
        limit = line[0].time - int(policy.keep_within * 10**9)
        last = max(at for at, point in enumerate(line) if point.time >= limit)
        keep(line[: last + 1], f"within {_span(policy.keep_within)}")
    if policy.thin:
        keep(_thinned(line, policy.thin), "left by thinning")
    return found


def _best(
    line: Sequence[Point], policy: Policy, score: Score | None, gone: Collection[ObjectId]
) -> tuple[Sequence[Point], str]:
    assert policy.keep_best is not None
    scored = [] if score is None else [(score(p), p) for p in reversed(line) if p.id not in gone]
    judged = [(value, point) for value, point in scored if value is not None]
    if not judged:
        return line, f"no commit has a value of {policy.metric} yet"
    judged.sort(key=lambda pair: pair[0])
    return (
        [point for _, point in judged[: policy.keep_best]],
        f"among the best {policy.keep_best} by {policy.metric}",
    )


def _every(line: Sequence[Point], steps: int) -> list[Point]:
    """The first commit at or behind each multiple of so many steps."""
    found = []
    reached: int | None = None
    for point in reversed(line):
        if point.step is None:
            continue
        count = point.step // steps
        crossed = point.step % steps == 0 if reached is None else count != reached
        if crossed or (reached is None and count > 0):
            found.append(point)
        reached = count
    return found


def _thinned(line: Sequence[Point], dense: int) -> list[Point]:
    """Numbers of the line's commits from its beginning never change, so that what is kept at some distance
    was also kept when it was nearer: multiples of 2^(j+1) are multiples of 2^j."""
    found = []
    for distance, point in enumerate(line):
        number = len(line) - 1 - distance
        # `dense` commits of stride 1, twice as many of stride 2, and so on.
        stride = 1 << ((distance // dense + 1).bit_length() - 1)
        if number % stride == 0:
            found.append(point)
    return found


# -- whatever a policy says ------------------------------------------------------------------------


def protected(
    points: Points,
    roots: Roots,
    reachable: set[ObjectId],
    scores: Mapping[str, Score],
    claimed: Collection[ObjectId],
    gone: Collection[ObjectId],
) -> dict[ObjectId, str]:
    """The commits that no policy touches, each with the reason: tips, what tags, lost commits and HEAD name,
    pins, what a living claimant restored, where lines part, and the best of each line.

    Args:
        reachable: all commits that refs and pins reach; an edge to one of them counts as a child.
        scores: of all metrics of which the repository knows whether small or large is better.
        claimed: commits that living claimants restored.
        gone: commits that have lost their payload, which are not the best of anything.
    """
    found: dict[ObjectId, str] = {}
    for name, id in roots.branches.items():
        found.setdefault(id, f"the tip of {name}")
    for name, id in roots.others.items():
        found.setdefault(id, f"named by {name}")
    for id in roots.pins:
        found.setdefault(id, "pinned")
    for name, id in roots.forks.items():
        found.setdefault(id, f"where {name} was forked")
    for id in claimed:
        found.setdefault(id, "restored by a running job")
    children: dict[ObjectId, int] = {}
    for id in reachable:
        for before in points.of[id].before:
            children[before] = children.get(before, 0) + 1
    for id, count in children.items():
        if count > 1:
            found.setdefault(id, "a fork point")
    for name, tip in roots.branches.items():
        line = points.line(tip)
        for metric, score in scores.items():
            values = [(score(point), point) for point in reversed(line) if point.id not in gone]
            judged = [(value, point) for value, point in values if value is not None]
            if judged:
                best = min(judged, key=lambda pair: pair[0])[1]
                found.setdefault(best.id, f"the best {metric} of {name}")
    return found


def is_for(pattern: str, branch: str) -> bool:
    """Whether a pattern means a branch: `*` stops at `/`, `**` does not; without them it is the name."""
    return paths.matches(pattern, branch) if any(sign in pattern for sign in "*?[") else pattern == branch


# -- components ------------------------------------------------------------------------------------


def components(patterns: Sequence[str], names: Collection[str]) -> tuple[str, ...] | None:
    """The components that patterns select as a whole; () if they select all there is, or there are no
    patterns; None if they select nothing.

    InvalidError for a pattern that would take a part of a component: only whole ones are dropped.
    """
    if not patterns:
        return ()
    taken = []
    for pattern in patterns:
        start = paths.Patterns(pattern).start()
        if start.whole:
            return ()
        for name in names:
            below = start.step_named(name, paths.key(name)) if name else None
            if below is None:
                continue
            if not below.whole:
                raise InvalidError(
                    f"{pattern!r} is a part of {name}, and only whole components can be dropped",
                    hint=f"drop {name}/**, or keep it",
                )
            taken.append(name)
    return tuple(dict.fromkeys(taken)) or None


def check_known(policies: Mapping[str, Policy], lines: Mapping[str, Sequence[Point]]) -> None:
    """NotFoundError if a pattern to drop names nothing that a commit of those lines has."""
    for branch, policy in policies.items():
        names = sorted({name for point in lines[branch] for name in point.sizes})
        for pattern in policy.drop:
            if names and components([pattern], names) is None:
                raise paths.unmatched([pattern], names, f"the commits of {branch}")
