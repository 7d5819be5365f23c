"""Which commits of a history are asked for: conditions on metrics, steps, times, authors and messages.

Nothing is ordered by any of these, so a filter ends no walk; it is asked commit by commit, and looks at notes
only where a metric is asked for and everything else fits.
"""

from __future__ import annotations

import datetime
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from ckptvcs.config import seconds_of
from ckptvcs.errors import InvalidError
from ckptvcs.history.commit import Commit

Steps: TypeAlias = "str | int | tuple[int | None, int | None]"
Moment: TypeAlias = "str | datetime.datetime | datetime.timedelta"

_CONDITION: Final = re.compile(r"(?P<name>[^=<>\s]+?)\s*(?:(?P<sign><=|>=|!=|==|=|<|>)\s*(?P<number>.*))?\Z")
_COMPARE: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
}
_RANGE: Final = re.compile(r"(?P<low>-?\d{1,18})?(?P<dots>\.\.)?(?P<high>-?\d{1,18})?\Z")


@dataclass(frozen=True, slots=True)
class Condition:
    """What one metric must be: `sign` is '' if it only has to be there and a number."""

    name: str
    sign: str = ""
    number: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Condition:
        """'val_loss<0.3', 'acc>=0.9', 'val_loss=nan', or the name alone."""
        found = _CONDITION.match(text.strip()) if isinstance(text, str) else None
        if found is None:
            raise InvalidError(f"{text!r} is no condition on a metric", hint="as in 'val_loss<0.3'")
        if found["sign"] is None:
            return cls(found["name"])
        try:
            number = float(found["number"])
        except ValueError:
            raise InvalidError(
                f"{text!r} is no condition on a metric: {found['number']!r} is no number",
                hint="as in 'val_loss<0.3'",
            ) from None
        return cls(found["name"], found["sign"], number)

    def holds(self, metrics: Mapping[str, Any]) -> bool:
        """Whether these metrics fulfil it. What is missing fulfils nothing; NaN is equal to NaN here, and
        neither less nor more than anything."""
        value = metrics.get(self.name)
        if type(value) not in (int, float):
            return False
        nan = isinstance(value, float) and math.isnan(value)
        if not self.sign:
            return not nan
        if nan or math.isnan(self.number):
            return (nan and math.isnan(self.number)) == (self.sign != "!=") and self.sign in ("=", "==", "!=")
        return _COMPARE[self.sign](value, self.number)


@dataclass(frozen=True, slots=True)
class Filter:
    """Conditions that a commit must all fulfil.

    Attributes:
        metrics: of its metrics.
        low, high: of its step, both included; None is no bound.
        since, until: UTC nanoseconds between which it was made.
        author: looked for in its author.
        grep: looked for in its message.
    """

    metrics: tuple[Condition, ...] = ()
    low: int | None = None
    high: int | None = None
    since: int | None = None
    until: int | None = None
    author: re.Pattern[str] | None = None
    grep: re.Pattern[str] | None = None

    @classmethod
    def parse(
        cls,
        now: int,
        *,
        metric: str | Sequence[str] = (),
        step: Steps | None = None,
        since: Moment | None = None,
        until: Moment | None = None,
        author: str | None = None,
        grep: str | None = None,
    ) -> Filter:
        """Read what people wrote. `now` is in UTC nanoseconds. InvalidError naming what cannot be read.

        Args:
            metric: conditions as `Condition.parse` reads them.
            step: '1000', '1000..2000', '1000..', '..2000', a number, or a pair.
            since, until: '2d' ago, a date, a date with a time ('2026-03-01T12:00', local unless it names a
                zone), a datetime, or a timedelta ago.
            author, grep: regular expressions; upper and lower case are the same.
        """
        low, high = _steps(step)
        conditions = [metric] if isinstance(metric, str) else metric
        return cls(
            tuple(map(Condition.parse, conditions)),
            low,
            high,
            _moment(since, now),
            _moment(until, now),
            _pattern(author, "author"),
            _pattern(grep, "message"),
        )

    def matches(self, commit: Commit, metrics: Callable[[Commit], Mapping[str, Any]]) -> bool:
        """Whether a commit is asked for. `metrics` gives its metrics, notes included, if they matter."""
        if self.low is not None and (commit.step is None or commit.step < self.low):
            return False
        if self.high is not None and (commit.step is None or commit.step > self.high):
            return False
        if self.since is not None and commit.time < self.since:
            return False
        if self.until is not None and commit.time > self.until:
            return False
        if self.author is not None and not self.author.search(commit.author):
            return False
        if self.grep is not None and not self.grep.search(commit.message):
            return False
        if not self.metrics:
            return True
        known = metrics(commit)
        return all(condition.holds(known) for condition in self.metrics)


EVERYTHING: Final = Filter()


def _steps(step: Steps | None) -> tuple[int | None, int | None]:
    hint = "as in 1000, 1000..2000, 1000.. or ..2000"
    if step is None:
        return None, None
    if type(step) is int:
        return step, step
    if isinstance(step, tuple) and len(step) == 2 and all(type(s) in (int, type(None)) for s in step):
        low, high = step
    else:
        found = _RANGE.match(step) if isinstance(step, str) else None
        if found is None or (found["low"] is None and found["high"] is None):
            raise InvalidError(f"{step!r} is no range of steps", hint=hint)
        low = None if found["low"] is None else int(found["low"])
        high = None if found["high"] is None else int(found["high"])
        if found["dots"] is None:
            return low, low
    if low is not None and high is not None and low > high:
        raise InvalidError(f"{low}..{high} is no range of steps: it ends before it begins", hint=hint)
    return low, high


def _moment(moment: Moment | None, now: int) -> int | None:
    """UTC nanoseconds."""
    if moment is None:
        return None
    if isinstance(moment, datetime.timedelta):
        return now - int(seconds_of(moment) * 1e9)
    if isinstance(moment, str):
        try:
            return now - int(seconds_of(moment.strip().removesuffix(" ago")) * 1e9)
        except InvalidError:
            pass
        try:
            moment = datetime.datetime.fromisoformat(moment.strip())
        except ValueError:
            raise InvalidError(
                f"{moment!r} is no point in time", hint="as in 2d, 12h, 2026-03-01 or 2026-03-01T12:00"
            ) from None
    if not isinstance(moment, datetime.datetime):
        raise InvalidError(f"a point in time is no {type(moment).__name__}", hint="pass a datetime or text")
    start = datetime.datetime.fromtimestamp(0, datetime.UTC)
    try:
        return (moment.astimezone() - start) // datetime.timedelta(microseconds=1) * 1000
    except (OverflowError, ValueError, OSError):
        raise InvalidError(f"{moment} is no point in time that a clock here has") from None


def _pattern(text: str | None, what: str) -> re.Pattern[str] | None:
    if text is None:
        return None
    try:
        return re.compile(text, re.IGNORECASE)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise InvalidError(f"{text!r} cannot be looked for in the {what}: {error}") from None
