"""Chains of bases as they could be: which chunk would be a difference against which, and what that costs.

A *family* is a set of chunks that one plain frame holds together: each of them is a difference against
another of them, or is that frame. A *plan* gives each chunk of a family its base. Plans are judged by the
bytes that the family takes and by what reading takes: the bytes that are read, and the bytes that each frame
of a chain decodes to.

Training moves away slowly, so a chunk and its base make a good pair in either direction. That is why new
plans are made of the pairs that are there, turned so that the newest chunk needs no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from ckptvcs.ids import ObjectId
from ckptvcs.store.format import MAX_DEPTH

Plan: TypeAlias = Mapping[ObjectId, ObjectId | None]
"""The base of each chunk; None for a plain one."""


class Cost(NamedTuple):
    """What a family costs.

    Attributes:
        bytes: of its records.
        read: bytes read and decoded if each chunk were read once.
        newest: the same for those chunks that tips of branches and tags hold.
    """

    bytes: int
    read: int
    newest: int

    def __add__(self, other: object) -> Cost:
        assert isinstance(other, Cost)
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(a - b for a, b in zip(self, other, strict=True)))

    @property
    def no_worse(self) -> bool:
        """Of a difference of costs: whether nothing grows."""
        return max(self) <= 0


NOTHING = Cost(0, 0, 0)


def depths(plan: Plan) -> dict[ObjectId, int] | None:
    """Frames below each chunk; None if a chain is too long, or does not end."""
    found: dict[ObjectId, int] = {}
    for id in plan:
        below = 0
        current = plan[id]
        while current is not None:
            below += 1
            if below > MAX_DEPTH:
                return None
            current = plan[current]
        found[id] = below
    return found


def cost(plan: Plan, costs: Mapping[ObjectId, int], raw: int, newest: Sequence[ObjectId]) -> Cost:
    """What a family costs whose chunks of `raw` bytes have records of these costs. Its chains must end."""
    read: dict[ObjectId, int] = {}
    for id in plan:
        total = 0
        current: ObjectId | None = id
        while current is not None:
            total += costs[current] + raw
            current = plan[current]
        read[id] = total
    return Cost(sum(costs[id] for id in plan), sum(read.values()), sum(read[id] for id in newest))


def plans(old: Plan, newest_first: Sequence[ObjectId], *, smallest: bool) -> Iterator[Plan]:
    """Plans worth trying for a family, whose chunks are listed with the newest first."""
    yield old
    if len(newest_first) == 1:
        return
    first = newest_first[0]
    yield _turned(old, first)
    yield {id: None if id == first else first for id in newest_first}
    if smallest:
        yield _chained(newest_first)


def _turned(old: Plan, first: ObjectId) -> Plan:
    """The same pairs, with the chunk `first` as the plain one."""
    turned = dict(old)
    child: ObjectId | None = None
    current: ObjectId | None = first
    while current is not None:
        below = old[current]
        turned[current] = child
        child, current = current, below
    return turned


def _chained(newest_first: Sequence[ObjectId]) -> Plan:
    """Each chunk against the next newer one, as deep as chains may be; those that are older still against
    the last but one of such a chain."""
    plan: dict[ObjectId, ObjectId | None] = {}
    for at, id in enumerate(newest_first):
        plan[id] = newest_first[min(at, MAX_DEPTH) - 1] if at else None
    return plan
