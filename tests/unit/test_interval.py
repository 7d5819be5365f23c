"""How often to save: the formulas against an independent computation, plans, and what `every` may be."""

from __future__ import annotations

import datetime
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs import InvalidError
from ckptvcs.training.interval import (
    FIRST_SAVE,
    HYSTERESIS,
    Plan,
    Planner,
    Schedule,
    daly,
    in_time,
    plan,
    quantile,
    schedule_of,
    young,
)

HOUR = 3600.0


def waste(interval: float, cost: float, mtbf: float) -> float:
    """The part of the time that is not spent on progress, from Daly's model of the total wall time.

    Daly 2006, equation 20, with a restart that takes no time: the time for `interval` seconds of progress is
    M (exp((tau + C) / M) - 1).
    """
    return mtbf * math.expm1((interval + cost) / mtbf) / interval - 1


def best_interval(cost: float, mtbf: float) -> float:
    """The interval that minimises `waste`, by golden-section search."""
    low, high = cost * 1e-6, mtbf * 4
    part = (math.sqrt(5) - 1) / 2
    for _ in range(300):
        a, b = high - part * (high - low), low + part * (high - low)
        if waste(a, cost, mtbf) < waste(b, cost, mtbf):
            high = b
        else:
            low = a
    return (low + high) / 2


@pytest.mark.parametrize(
    ("cost", "mtbf", "by_young", "by_daly"),
    [
        # sqrt(2 * 50 * 3600) = 600, ratio 50 / 7200
        (50.0, HOUR, 600.0, 600 * (1 + math.sqrt(50 / 7200) / 3 + 50 / 7200 / 9) - 50),
        (0.5, 24 * HOUR, 293.93876913398136, 293.605),
        (300.0, 6 * HOUR, 3600.0, 3402.778),
    ],
)
def test_the_formulas_by_hand(cost: float, mtbf: float, by_young: float, by_daly: float) -> None:
    assert young(cost, mtbf) == pytest.approx(by_young, rel=1e-12)
    assert daly(cost, mtbf) == pytest.approx(by_daly, abs=1e-3)


@pytest.mark.parametrize("mtbf", [HOUR, 6 * HOUR, 72 * HOUR])
@pytest.mark.parametrize("ratio", [1e-6, 1e-4, 1e-3, 1e-2, 0.1, 0.3])
def test_dalys_estimate_is_the_minimum_of_his_model(mtbf: float, ratio: float) -> None:
    """A search for the minimum, which shares nothing with the formula, finds its interval."""
    cost = ratio * mtbf
    found = best_interval(cost, mtbf)
    assert daly(cost, mtbf) == pytest.approx(found, rel=0.02 if ratio > 0.05 else 2e-3)
    assert waste(daly(cost, mtbf), cost, mtbf) <= waste(young(cost, mtbf), cost, mtbf) * (1 + 1e-9)


def test_dalys_estimate_against_a_simulation() -> None:
    """Failures at random moments: an interval half or double as long wastes more."""
    cost, mtbf, seed = 20.0, HOUR, 7
    chosen = daly(cost, mtbf)

    def wall(interval: float) -> float:
        chance = random.Random(seed)
        clock = 0.0
        for _ in range(20_000):
            while True:
                failure = chance.expovariate(1 / mtbf)
                if failure >= interval + cost:
                    clock += interval + cost
                    break
                clock += failure
        return clock / (20_000 * interval)

    assert wall(chosen) < wall(chosen / 2)
    assert wall(chosen) < wall(chosen * 2)


def test_saves_that_cost_more_than_failures_allow() -> None:
    assert daly(2 * HOUR, HOUR) == HOUR
    assert daly(9 * HOUR, HOUR) == HOUR
    assert daly(0.0, HOUR) == 0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_quantiles(values: list[float], part: float) -> None:
    import numpy as np

    assert quantile(values, part) == pytest.approx(float(np.quantile(values, part)), rel=1e-9, abs=1e-6)


# -- plans ----------------------------------------------------------------------------------------


def test_a_plan_is_the_longest_of_its_reasons() -> None:
    by_overhead = plan(2.0, 5.0, 0.1, max_overhead=0.02, mtbf=None)
    assert by_overhead.interval == by_overhead.by_overhead == 100
    by_failures = plan(2.0, 5.0, 0.1, max_overhead=0.02, mtbf=6 * HOUR)
    assert by_failures.interval == by_failures.by_failures == daly(2.0, 6 * HOUR) > 100
    by_writing = plan(0.001, 300.0, 0.1, max_overhead=0.02, mtbf=HOUR)
    assert by_writing.interval == 300
    by_step = plan(0.0, 0.0, 40.0, max_overhead=0.02, mtbf=None)
    assert by_step.interval == 40
    said = by_failures.reasoning(0.02, 6 * HOUR)
    assert said == (
        "saving every 4.9 min (about 2926 steps), because a save costs 2.00 s: "
        "at least 1.7 min for an overhead of 0.02; 4.9 min waste least with a failure every 6.0 h; "
        "at least 5.00 s until a save is durable"
    )


@given(
    st.floats(1e-6, 1e4), st.floats(0, 1e5), st.floats(1e-6, 1e3), st.floats(1e-3, 0.5), st.floats(60, 1e7)
)
def test_a_plan_keeps_its_promises(
    cost: float, writing: float, step: float, most: float, mtbf: float
) -> None:
    made = plan(cost, writing, step, max_overhead=most, mtbf=mtbf)
    assert cost / (made.interval + cost) <= most
    assert made.interval >= writing
    assert made.interval >= step
    assert made.interval >= daly(cost, mtbf)


def planner(mtbf: float | None = None) -> Planner:
    return Planner(max_overhead=0.02, mtbf=mtbf)


def test_before_anything_is_measured() -> None:
    fresh = planner()
    assert fresh.plan is None
    assert fresh.interval == FIRST_SAVE


def test_the_first_save_is_left_out_once_there_are_others() -> None:
    plans = planner()
    first = plans.saved(8.0, 30.0)
    assert first is not None
    assert first.interval == 400
    second = plans.saved(1.0, 2.0)
    assert second is not None
    assert second.interval == 50


def test_a_plan_stays_until_another_differs_much() -> None:
    plans = planner()
    for _ in range(4):
        plans.saved(1.0, 2.0)
    assert plans.interval == 50
    for _ in range(16):
        assert plans.saved(1.0 + HYSTERESIS * 0.9, 2.0) is None
    assert plans.interval == 50
    changes = [made for made in (plans.saved(2.0, 2.0) for _ in range(16)) if made is not None]
    assert plans.interval == 100
    assert len(changes) <= 2


def test_quantiles_not_means() -> None:
    """One save in eight that writes everything does not quadruple the interval, nor do cheap ones hide dear
    ones."""
    plans = planner()
    for n in range(32):
        plans.saved(30.0 if n % 8 == 7 else 1.0, 1.0)
    assert plans.interval == 50
    dear = planner()
    for n in range(32):
        dear.saved(0.1 if n % 2 else 4.0, 1.0)
    assert dear.interval == 200


def test_steps_that_a_save_slows_down_are_part_of_its_cost() -> None:
    plans = planner()
    for _ in range(50):
        plans.stepped(1.0, writing=False)
        plans.stepped(1.25, writing=True)
    made = plans.saved(0.5, 20.0)
    assert made is not None
    assert made.cost == pytest.approx(0.5 + 20 * 0.2)  # a fifth of the 20 seconds is lost
    assert made.step == 1.0
    quick = planner()
    for _ in range(50):
        quick.stepped(1.0, writing=False)
        quick.stepped(0.9, writing=True)  # noise the other way is no gain
    made = quick.saved(0.5, 20.0)
    assert made is not None
    assert made.cost == 0.5


def test_plans_need_no_steps() -> None:
    made = planner().saved(0.0, 0.0)
    assert made == Plan(0.0, 0.0, 0.0, 0.0, None, 0.0)
    assert "steps" not in made.reasoning(0.02, None)


# -- what is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "schedule", "shown"),
    [
        (100, Schedule(100, None), "100 steps"),
        ("15min", Schedule(None, 900), "15.0 min"),
        ("15m", Schedule(None, 900), "15.0 min"),
        ("90s", Schedule(None, 90), "90.0 s"),
        ("1.5h", Schedule(None, 5400), "90.0 min"),
        (datetime.timedelta(hours=2), Schedule(None, 7200), "2.0 h"),
        ((1000, "15min"), Schedule(1000, 900), "1000 steps or 15.0 min"),
        (["1d", 7], Schedule(7, 86_400), "7 steps or 24.0 h"),
    ],
)
def test_every(every: Any, schedule: Schedule, shown: str) -> None:
    assert schedule_of(every) == schedule
    assert str(schedule) == shown


@pytest.mark.parametrize(
    "every",
    [
        *(0, -1, True, 1.5, None, {}, b"15min"),
        *("", "soon", "0", "-5min", "1e9h"),
        *((), (1, 2), ("1h", "2h"), (100, 2.5)),
        *(datetime.timedelta(0), datetime.timedelta(-1)),
    ],
)
def test_every_that_cannot_be(every: Any) -> None:
    with pytest.raises(InvalidError):
        schedule_of(every)


@given(st.integers(1, 50), st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(0, 100))
def test_each_multiple_is_crossed_once_however_steps_come(every: int, strides: list[int], start: int) -> None:
    schedule = Schedule(every)
    at, hits = start, 0
    for stride in strides:
        before, at = at, at + stride
        crossed = schedule.crossed(before, at)
        assert crossed == any(step % every == 0 for step in range(before + 1, at + 1))
        hits += crossed
    assert hits <= at // every - start // every
    assert not schedule.crossed(at, start)
    assert not schedule.crossed(at, at)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        *(
            (0, "0 ms"),
            (1e-6, "0 ms"),
            (0.0123, "12 ms"),
            (0.31, "0.31 s"),
            (9.99, "9.99 s"),
            (12.34, "12.3 s"),
        ),
        *((150, "2.5 min"), (5900, "98.3 min"), (21_600, "6.0 h")),
    ],
)
def test_time_for_people(seconds: float, shown: str) -> None:
    assert in_time(seconds) == shown
