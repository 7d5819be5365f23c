"""How new each record is: the place of the newest commit that reaches it, tips of branches and tags first.

Every object is read once, from the newest commit down, so a record's place is that of the first commit that
reaches it. Four bytes are kept for each record.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Final

from ckptvcs.errors import CkptError
from ckptvcs.history.graph import History
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.maintenance import reach
from ckptvcs.maintenance.marking import Rows
from ckptvcs.store import Reader, Store

NOBODY: Final = 0xFFFF_FFFF
"""The place of records that no ref reaches."""


class Newness:
    """Places of commits for the records of a listing.

    Attributes:
        tips: so many commits come first which branches, tags and pins name.
        problems: what could not be read, so that everything below it counts as old.
    """

    def __init__(self, store: Store, rows: Rows, say: Callable[[str], None]) -> None:
        self._store = store
        self._rows = rows
        self._places = array("I", [NOBODY]) * len(rows)
        self.problems: list[str] = []
        with store.snapshot() as snapshot:
            named = {target for target in snapshot.refs().values() if isinstance(target, ObjectId)}
            named |= snapshot.pins()
        history = History(store)
        order = self._walk(history, sorted(named))
        order.sort(key=lambda commit: commit not in named)  # which keeps the order otherwise
        self.tips = sum(id in named for id in order)
        with store.reader() as reader:
            for place, commit in enumerate(order):
                say(f"commit {commit.short}")
                self._visit(reader, commit, place)

    def of(self, id: ObjectId) -> int:
        """How new a record is: 0 is the newest. `NOBODY` if no ref reaches it."""
        place = self._rows.place(id)
        return NOBODY if place is None else self._places[place]

    def at(self, place: int) -> int:
        """The same for the record that is listed at a place."""
        return self._places[place]

    def _walk(self, history: History, tips: list[ObjectId]) -> list[ObjectId]:
        found: list[ObjectId] = []
        try:
            found.extend(commit.id for commit in history.walk(tips))
        except CkptError as error:
            self.problems.append(str(error))
        return found

    def _visit(self, reader: Reader, commit: ObjectId, place: int) -> None:
        with self._store.snapshot() as snapshot:
            dropped = snapshot.drops(commit)
        waiting = [(Kind.COMMIT, commit)]
        while waiting:
            kind, id = waiting.pop()
            try:
                payload = reader.objects(kind, [id])[0]
                below = reach.below(reader, kind, id, payload, dropped if kind is Kind.COMMIT else None)
            except CkptError as error:
                self.problems.append(str(error))
                continue
            for child_kind, child in below.whole:
                at = self._rows.place(child)
                if child_kind is Kind.COMMIT or at is None or self._places[at] != NOBODY:
                    continue
                self._places[at] = place
                if child_kind is not Kind.CHUNK:
                    waiting.append((child_kind, child))
