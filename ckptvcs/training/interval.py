"""How often to save. Pure arithmetic: nothing here looks at a clock or a repository.

Words: the *cost* of a save is the time by which it lengthens training, its *writing* the time until it is
durable, the *interval* the work between the end of one save and the start of the next. All are seconds.

The formulas:

- Young 1974 (CACM 17(9), doi 10.1145/361147.361115): with a cost C and a mean time M between failures the
  interval sqrt(2 C M) wastes least, to first order.
- Daly 2006 (FGCS 22(3), doi 10.1016/j.future.2004.11.016): the higher-order estimate
  sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + (C / 2M) / 9) - C for C < 2M, else M. Its interval does not include
  the save itself.
- A save that is written in the background costs what it blocks and by how much it slows training down, not
  the time it takes (Vaidya 1997, IEEE TC 46(8)); but the next must not begin before it has ended.
"""

from __future__ import annotations

import datetime
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ckptvcs.config import seconds_of
from ckptvcs.errors import InvalidError

FIRST_SAVE: Final = 60.0
"""Seconds of training before the first save of `auto`, when nothing has been measured yet."""

HYSTERESIS: Final = 0.25
"""A new plan replaces the one in force only if its interval differs by more than this part of it."""

_SAVES: Final = 16
_STEPS: Final = 128


def seconds_between(duration: Any) -> float:
    """Seconds in '15min', '90s', '2h', '1d' or a timedelta, more than none. InvalidError otherwise."""
    seconds = seconds_of(duration)
    if seconds <= 0:
        raise InvalidError(f"{duration!r} is no time to wait", hint="as in '90s', '15min' or '2h'")
    return seconds


@dataclass(frozen=True, slots=True)
class Schedule:
    """When a save is due, as asked for.

    Attributes:
        steps: at every multiple of so many steps; None for never.
        seconds: after so many seconds without a save; None for never.
    """

    steps: int | None = None
    seconds: float | None = None

    def crossed(self, before: int, step: int) -> bool:
        """Whether a multiple of `steps` lies behind `before` and not behind `step`."""
        return self.steps is not None and step // self.steps > before // self.steps

    def __str__(self) -> str:
        parts = [] if self.steps is None else [f"{self.steps} steps"]
        parts += [] if self.seconds is None else [in_time(self.seconds)]
        return " or ".join(parts)


def schedule_of(every: Any) -> Schedule:
    """What `every` asks for: a number of steps, a duration, or both in a tuple. InvalidError otherwise."""
    steps: int | None = None
    seconds: float | None = None
    for each in every if isinstance(every, (tuple, list)) else (every,):
        if isinstance(each, bool) or not isinstance(each, (int, str, datetime.timedelta)):
            raise _no_schedule(every)
        if isinstance(each, int):
            if each < 1 or steps is not None:
                raise _no_schedule(every)
            steps = each
        elif seconds is not None:
            raise _no_schedule(every)
        else:
            seconds = seconds_between(each)
    if steps is None and seconds is None:
        raise _no_schedule(every)
    return Schedule(steps, seconds)


def _no_schedule(every: Any) -> InvalidError:
    return InvalidError(
        f"every cannot be {every!r:.60}",
        hint="give a number of steps, a time such as '15min', or (1000, '15min')",
    )


def in_time(seconds: float) -> str:
    """A duration for people: 0.31 s, 2.5 min, 6.0 h."""
    if seconds < 0.00005:
        return "0 ms"
    if seconds < 0.0995:
        return f"{seconds * 1000:.2g} ms"
    if seconds < 99.5:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


# -- formulas -------------------------------------------------------------------------------------


def young(cost: float, mtbf: float) -> float:
    """Young's interval: sqrt(2 C M)."""
    return math.sqrt(2 * cost * mtbf)


def daly(cost: float, mtbf: float) -> float:
    """Daly's interval, without the save itself; never below 0."""
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return max(0.0, young(cost, mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost)


def quantile(values: Iterable[float], part: float) -> float:
    """The value below which `part` of the values lie, between neighbours in proportion."""
    ordered = sorted(values)
    at = part * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass(frozen=True, slots=True)
class Plan:
    """An interval, and why.

    Attributes:
        interval: seconds of work between saves.
        cost: seconds by which a save lengthens training.
        writing: seconds until a save is durable, behind the training's back.
        by_overhead: the least interval that keeps the cost within the overhead allowed.
        by_failures: Daly's interval; None without an MTBF.
        step: seconds a step takes.
    """

    interval: float
    cost: float
    writing: float
    by_overhead: float
    by_failures: float | None
    step: float

    def reasoning(self, max_overhead: float, mtbf: float | None) -> str:
        """The plan in one sentence."""
        reasons = [f"at least {in_time(self.by_overhead)} for an overhead of {max_overhead:.3g}"]
        if self.by_failures is not None and mtbf is not None:
            reasons.append(f"{in_time(self.by_failures)} waste least with a failure every {in_time(mtbf)}")
        reasons.append(f"at least {in_time(self.writing)} until a save is durable")
        steps = f" (about {max(1, round(self.interval / self.step))} steps)" if self.step > 0 else ""
        return (
            f"saving every {in_time(self.interval)}{steps}, because a save costs {in_time(self.cost)}: "
            + "; ".join(reasons)
        )


def plan(cost: float, writing: float, step: float, *, max_overhead: float, mtbf: float | None) -> Plan:
    """The shortest interval that wastes least, stays within the overhead, and lets a save end first."""
    by_overhead = cost / max_overhead
    by_failures = None if mtbf is None else daly(cost, mtbf)
    return Plan(
        max(by_overhead, by_failures or 0.0, writing, step), cost, writing, by_overhead, by_failures, step
    )


class Planner:
    """Plans from what is measured while training runs.

    Blocked and writing times are upper quantiles of the last saves, not means: what deduplication leaves to
    be written varies. Once there are others, the first save is left out, which fills cold memory.
    """

    def __init__(self, *, max_overhead: float, mtbf: float | None) -> None:
        self.max_overhead = max_overhead
        self.mtbf = mtbf
        self._blocked: deque[float] = deque(maxlen=_SAVES)
        self._writing: deque[float] = deque(maxlen=_SAVES)
        self._free: deque[float] = deque(maxlen=_STEPS)
        self._beside: deque[float] = deque(maxlen=_STEPS)
        self._saves = 0
        self.plan: Plan | None = None

    @property
    def interval(self) -> float:
        """Seconds of work until the next save."""
        return FIRST_SAVE if self.plan is None else self.plan.interval

    def stepped(self, seconds: float, *, writing: bool) -> None:
        """Note how long a step took, and whether a save was being written beside it."""
        (self._beside if writing else self._free).append(seconds)

    def saved(self, blocked: float, writing: float) -> Plan | None:
        """Note a save; the new plan if it replaces the one in force."""
        if self._saves == 1:
            self._blocked.clear()
            self._writing.clear()
        self._saves += 1
        self._blocked.append(blocked)
        self._writing.append(writing)
        fresh = plan(
            quantile(self._blocked, 0.75) + self._drag(),
            quantile(self._writing, 0.75),
            self._step(),
            max_overhead=self.max_overhead,
            mtbf=self.mtbf,
        )
        # The first figures are replaced as soon as there are better ones.
        settled = self.plan is not None and self._saves > 2
        if settled and abs(fresh.interval - self.interval) <= HYSTERESIS * self.interval:
            return None
        self.plan = fresh
        return fresh

    def _step(self) -> float:
        steps: Sequence[float] = self._free or self._beside
        return quantile(steps, 0.5) if steps else 0.0

    def _drag(self) -> float:
        """By how much writing one save slows the steps beside it down, in all."""
        if not self._free or not self._beside:
            return 0.0
        free, beside = quantile(self._free, 0.5), quantile(self._beside, 0.5)
        if free <= 0:
            return 0.0
        return max(0.0, 1 - free / beside) * quantile(self._writing, 0.75) if beside > 0 else 0.0
