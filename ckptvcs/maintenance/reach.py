"""What the presence of a record vouches for: the one place that knows what a drop record takes away.

A commit must reach all that it refers to, except for what its drop record names: of a payload that was
dropped as a whole the tree, of one that was dropped in part what `state.remains` leaves out. Trees and chunk
lists vouch for nothing by themselves, for a tree may be kept for the part of it that is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ckptvcs.ids import Kind, ObjectId
from ckptvcs.state.remains import remains
from ckptvcs.store import Reader, Snapshot
from ckptvcs.store.format import unpack_object
from ckptvcs.store.writer import child_name


class Reach(NamedTuple):
    """What lies directly below a record.

    Attributes:
        whole: records that must be there with everything below them, by their own reach.
        alone: trees that must be there although some of what they refer to may be gone.
    """

    whole: Sequence[tuple[Kind, ObjectId]]
    alone: Sequence[ObjectId] = ()


class Drops:
    """Drop records: those of the index, and others taken as if they were recorded."""

    def __init__(self, assumed: Mapping[ObjectId, tuple[str, ...]] | None = None) -> None:
        self._assumed = assumed or {}

    def of(self, snapshot: Snapshot, commit: ObjectId) -> tuple[str, ...] | None:
        """Components taken from a commit; () if all of it was, None if nothing."""
        recorded = snapshot.drops(commit)
        assumed = self._assumed.get(commit)
        if recorded is None or assumed is None:
            return recorded if assumed is None else assumed
        return tuple(sorted({*recorded, *assumed})) if recorded and assumed else ()


def below(
    reader: Reader, kind: Kind, id: ObjectId, payload: bytes, dropped: tuple[str, ...] | None = None
) -> Reach:
    """What an object must reach; `dropped` is what `Drops` says of a commit. CorruptionError if the object
    is damaged, or one that is needed to tell."""
    references = unpack_object(payload, child_name(kind, id))[0]
    if kind is not Kind.COMMIT or dropped is None:
        return Reach(references)
    lineage = [reference for reference in references if reference[0] is Kind.COMMIT]
    if not dropped:
        return Reach(lineage)
    whole = list(lineage)
    alone: list[ObjectId] = []
    for below_kind, tree in references:
        if below_kind is Kind.TREE:
            left = remains(reader, tree, dropped)
            whole += left.whole
            alone += left.alone
    return Reach(whole, alone)
