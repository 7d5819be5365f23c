"""Chunks that stay, made independent of bases that nothing else needs.

Of the chunks that are differences against such a base, the first is encoded against what stays of the base's
own chain, or plain; the others become differences against the first. So no chain grows, and what they cost
together is about what they and the base did, without one of the differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ckptvcs.errors import CkptError, StorageError
from ckptvcs.ids import ObjectId
from ckptvcs.maintenance.marking import Marks, slices
from ckptvcs.maintenance.rewriting import Encoded, Rewriter
from ckptvcs.store import Row, Store
from ckptvcs.store.format import HEADER_BYTES, PACK_LIMIT


@dataclass(slots=True)
class Rebased:
    """What was encoded anew, or would be.

    Attributes:
        bases: each chunk's new base; None for one that needs none.
        added: bytes of the new records.
        packs: files they are in.
        problems: why something was left as it was.
    """

    bases: dict[ObjectId, ObjectId | None] = field(default_factory=dict)
    added: int = 0
    packs: int = 0
    problems: list[str] = field(default_factory=list)


def rebase(store: Store, marks: Marks, *, write: bool) -> Rebased:
    """Encode anew each marked chunk whose base is not marked. Without `write` everything is encoded and
    thrown away, which tells exactly what it would cost.

    The caller holds `gc.lock`. Durable on return. What cannot be read keeps its base, as a problem.
    StorageError if it cannot be written; what was done until then is whole.
    """
    done = Rebased()
    size = 0
    with Rewriter(store) as rewriter:
        for base, dependants in sorted(_orphans(store, marks).items()):
            try:
                for id, row, found in _encoded(rewriter, marks, dependants, _nearest(store, marks, base)):
                    if write:
                        rewriter.take(id, row, found)
                    done.bases[id] = found.frame.header.base
                    done.added += found.cost
                    size += HEADER_BYTES + found.frame.header.stored
            except StorageError:
                raise
            except CkptError as error:
                done.problems.append(str(error))
            # Between groups only: the next encoding must not depend on what was published before it.
            if size >= PACK_LIMIT:
                done.packs += 1
                size = 0
                if write:
                    rewriter.publish()
        done.packs += bool(size)
        if write:
            rewriter.publish()
    return done


def _orphans(store: Store, marks: Marks) -> dict[ObjectId, list[tuple[ObjectId, Row]]]:
    """Marked chunks by their base that is not marked."""
    found: dict[ObjectId, list[tuple[ObjectId, Row]]] = {}
    for part in slices(store):
        for id, row in part:
            if row.base is not None and id in marks and row.base not in marks:
                found.setdefault(row.base, []).append((id, row))
    return found


def _nearest(store: Store, marks: Marks, base: ObjectId) -> ObjectId | None:
    """The first record in a chain of bases that is marked."""
    current: ObjectId | None = base
    with store.snapshot() as snapshot:
        while current is not None and current not in marks:
            row = snapshot.row(current)
            current = None if row is None else row.base
    return current


def _encoded(
    rewriter: Rewriter, marks: Marks, chunks: list[tuple[ObjectId, Row]], base: ObjectId | None
) -> Iterator[tuple[ObjectId, Row, Encoded]]:
    """Each chunk in its new encoding: the first against `base`, the others against the first."""
    for id, row in chunks:
        found = rewriter.encoded(id, row, base)
        against = found.frame.header.base
        if against is not None and against not in marks:
            found = rewriter.encoded(id, row)
        yield id, row, found
        base = chunks[0][0]
