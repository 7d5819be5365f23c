"""The metric that training watches: what was best, and for how long nothing better came."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Monitor:
    """Judges the values of one metric, in the order in which they come.

    Attributes:
        metric: its name.
        mode: 'min' or 'max'.
        patience: so many values in a row may fail to be better; None for any number.
        min_delta: only a value better by more than this ends a row.
        saved: the best value that a commit holds, or the one under way; None before the first.
        mark: the value that the next must beat to end the row.
        stale: values since then.
    """

    metric: str
    mode: str
    patience: int | None = None
    min_delta: float = 0.0
    saved: float | None = None
    mark: float | None = None
    stale: int = 0
    _before: float | None = None

    def better(self, value: float, than: float | None, by: float = 0.0) -> bool:
        """Whether a value is better by more than `by`. NaN never is; a first number always is."""
        if math.isnan(value):
            return False
        if than is None:
            return True
        return value < than - by if self.mode == "min" else value > than + by

    def observe(self, value: float) -> bool:
        """Count one value; whether it is better than what is saved."""
        if self.better(value, self.mark, self.min_delta):
            self.mark, self.stale = value, 0
        else:
            self.stale += 1
        return self.better(value, self.saved)

    def saving(self, value: float) -> bool:
        """A commit with this value is begun; whether it is the best. What follows is compared with it at
        once: when it is durable is a matter of chance."""
        self._before = self.saved
        if not self.better(value, self.saved):
            return False
        self.saved = value
        return True

    def failed(self) -> None:
        """The commit that was begun last was not made."""
        self.saved = self._before

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.stale >= self.patience

    def record(self) -> dict[str, Any]:
        """What a later process needs to go on counting."""
        return {"metric": self.metric, "mode": self.mode, "mark": self.mark, "stale": self.stale}

    def resume(self, record: Mapping[str, Any]) -> bool:
        """Go on from a record; False, and nothing changes, if it is not of this metric."""
        mark, stale = record.get("mark"), record.get("stale")
        if record.get("metric") != self.metric or record.get("mode") != self.mode:
            return False
        if type(stale) is not int or stale < 0 or type(mark) not in (int, float, type(None)):
            return False
        self.mark, self.stale = mark, stale
        return True
