"""Conditions on commits."""

from __future__ import annotations

import dataclasses
import datetime
import math
from typing import Any

import pytest

from ckptvcs import Commit, InvalidError, ObjectId
from ckptvcs.history.filters import Condition, Filter

DAY = 86_400 * 10**9
NOW = 20_000 * DAY


def commit(**more: Any) -> Commit:
    plain = Commit(
        ObjectId(bytes(32)), ObjectId(bytes(32)), (), None, "ann@host", NOW, "Warm up\n\nwith a body", 100,
        None, {}, {}, {}, {}, {},
    )  # fmt: skip
    return dataclasses.replace(plain, **more)


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("m<0.3", 0.2, True),
        ("m<0.3", 0.3, False),
        ("m <= 0.3", 0.3, True),
        ("m>=3", 3, True),
        ("m>3", 3, False),
        ("m=3", 3.0, True),
        ("m==3", 4, False),
        ("m!=3", 4, True),
        ("m<inf", 1e300, True),
        ("m<0.3", math.nan, False),
        ("m>0.3", math.nan, False),
        ("m!=3", math.nan, True),
        ("m=nan", math.nan, True),
        ("m!=nan", math.nan, False),
        ("m=nan", 1.0, False),
        ("m!=nan", 1.0, True),
        ("m<nan", 1.0, False),
        ("m", 1.0, True),
        ("m", math.nan, False),
        ("m<3", None, False),
        ("m<1e-3", 5e-4, True),
        ("m>-1", 0, True),
    ],
)
def test_conditions(text: str, value: float | None, holds: bool) -> None:
    metrics = {} if value is None else {"m": value}
    assert Condition.parse(text).holds(metrics) is holds


def test_names_may_hold_signs() -> None:
    assert Condition.parse("a/b!=3") == Condition("a/b", "!=", 3.0)
    assert Condition.parse("eval/a!b<3") == Condition("eval/a!b", "<", 3.0)


@pytest.mark.parametrize("text", ["", "<3", "a<", "a<<3", "a b<3", "a<3x", 7])
def test_no_conditions(text: Any) -> None:
    with pytest.raises(InvalidError, match="no condition"):
        Condition.parse(text)


@pytest.mark.parametrize(
    ("step", "matching"),
    [
        ("100", [100]),
        ("50..150", [50, 100, 150]),
        ("100..", [100, 150]),
        ("..99", [50]),
        (100, [100]),
        ((None, 100), [50, 100]),
        ("-5..60", [50]),
    ],
)
def test_steps(step: Any, matching: list[int]) -> None:
    chosen = Filter.parse(NOW, step=step)
    assert [s for s in (50, 100, 150) if chosen.matches(commit(step=s), dict)] == matching
    assert not chosen.matches(commit(step=None), dict)


@pytest.mark.parametrize("step", ["", "..", "a", "1..b", "9..1", 1.5, (1, 2, 3), "1" * 40])
def test_no_steps(step: Any) -> None:
    with pytest.raises(InvalidError, match="no range of steps"):
        Filter.parse(NOW, step=step)


@pytest.mark.parametrize(
    ("since", "days", "matches"),
    [
        ("2d", 1, True),
        ("2d ago", 3, False),
        (datetime.timedelta(hours=12), 1, False),
        (datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(days=19_990), 1, True),
        ("2999-01-01", 1, False),
        ("1999-01-01T12:00+02:00", 1, True),
    ],
)
def test_times(since: Any, days: int, matches: bool) -> None:
    made = commit(time=NOW - days * DAY)
    assert Filter.parse(NOW, since=since).matches(made, dict) is matches
    assert Filter.parse(NOW, until=since).matches(made, dict) is not matches


@pytest.mark.parametrize("since", ["yesterday", "", 5, "2026-13-01"])
def test_no_times(since: Any) -> None:
    with pytest.raises(InvalidError, match="point in time"):
        Filter.parse(NOW, since=since)


def test_texts_and_metrics_as_late_as_possible() -> None:
    asked = []

    def metrics(of: Commit) -> dict[str, Any]:
        asked.append(of.step)
        return {"loss": 0.1}

    chosen = Filter.parse(NOW, metric=["loss<1", "loss"], author="ANN@", grep="body$", step="..100")
    assert chosen.matches(commit(), metrics)
    assert not chosen.matches(commit(author="bob"), metrics)
    assert not chosen.matches(commit(message="else"), metrics)
    assert not chosen.matches(commit(step=101), metrics)
    assert asked == [100]
