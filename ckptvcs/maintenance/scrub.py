"""Scrubbing: the bytes of every record against their digests, a bit at a time.

Where the last scrub stopped is kept in `scrubbed`, a file beside the index: which packs were read in this
round, and up to where the next one was. A round ends when all packs were read; then the next begins. Packs
never change, so one that was merged into another is read again under its new name. If the file is lost, a new
round begins.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from ckptvcs import config as settings
from ckptvcs.errors import CkptError, CorruptionError, InvalidError, StorageError
from ckptvcs.ids import ObjectId
from ckptvcs.store import Store
from ckptvcs.store.format import HEADER_BYTES, Entry, PackName
from ckptvcs.store.packs import PackFile


class Budget(NamedTuple):
    """How much one scrub does: bytes read, or seconds; None for no limit."""

    bytes: int | None = None
    seconds: float | None = None


NOTHING: Final = Budget(0)
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?) ?([kKMGT]?)(i?)B\Z")
_POWERS: Final = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def budget_of(text: str | float) -> Budget:
    """'10GiB', '500 MB', a number of bytes, or a duration: '30m', '2h'. InvalidError otherwise."""
    if isinstance(text, (int, float)) and not isinstance(text, bool) and 0 <= text < 1e18:
        return Budget(int(text))
    found = _SIZE.match(text) if isinstance(text, str) else None
    if found:
        return Budget(int(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2]]))
    with contextlib.suppress(InvalidError):
        if not isinstance(text, str) or not text.isdecimal():
            return Budget(None, settings.seconds_of(text))
    raise InvalidError(f"{text!r} is no budget", hint="as in 10GiB, 500MB, 30m or 2h")


@dataclass(slots=True)
class Progress:
    """How far scrubbing is.

    Attributes:
        read: bytes of records read by this call.
        packs, of: packs that were read in this round, and packs there are.
        rounds: rounds that were finished since the file `scrubbed` was made.
    """

    read: int = 0
    packs: int = 0
    of: int = 0
    rounds: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"read": self.read, "packs": self.packs, "of": self.of, "rounds": self.rounds}


@dataclass(slots=True)
class _Place:
    """What `scrubbed` says."""

    done: set[str] = field(default_factory=set)
    pack: str = ""
    offset: int = 0
    rounds: int = 0


def check_record(pack: PackFile, entry: Entry) -> None:
    """Compare a record with its footer entry, and its payload with its digest. CorruptionError if they
    differ."""
    header = pack.header(entry.offset)
    if header[:7] != entry[1:]:
        raise CorruptionError(
            f"{pack.path}: the record at {entry.offset} is not the one its footer lists",
            path=str(pack.path),
            offset=entry.offset,
            id=str(entry.id),
        )
    pack.payload(header, entry.offset)


def scrub(
    store: Store, budget: Budget, say: Callable[[str], None]
) -> tuple[Progress, dict[ObjectId, CkptError]]:
    """Read records from where the last scrub stopped until the budget is spent. Gives how far it is now, and
    what is damaged. Packs without a whole footer are passed over: every check reports them."""
    place = _load(store)
    with store.snapshot() as snapshot:
        packs = snapshot.packs()
    place.done &= {name.text for name in packs}
    progress = Progress(of=len(packs))
    bad: dict[ObjectId, CkptError] = {}
    until = None if budget.seconds is None else store.disk.seconds() + budget.seconds

    def spent() -> bool:
        over = budget.bytes is not None and progress.read >= budget.bytes
        return over or (until is not None and store.disk.seconds() >= until)

    waiting = sorted((name for name in packs if name.text not in place.done), key=lambda n: n.text)
    waiting.sort(key=lambda name: name.text != place.pack)
    for name in waiting:
        if spent():
            break
        say(f"pack {name.text}")
        start = place.offset if name.text == place.pack else 0
        stopped = _scrub_pack(store, name, start, progress, bad, spent)
        place.pack, place.offset = (name.text, stopped) if stopped is not None else ("", 0)
        if stopped is None:
            place.done.add(name.text)
    if packs and len(place.done) == len(packs):
        place = _Place(rounds=place.rounds + 1)
        progress.packs = len(packs)
    else:
        progress.packs = len(place.done)
    progress.rounds = place.rounds
    _save(store, place)
    return progress, bad


def _scrub_pack(
    store: Store,
    name: PackName,
    start: int,
    progress: Progress,
    bad: dict[ObjectId, CkptError],
    spent: Callable[[], bool],
) -> int | None:
    """Check the live records of a pack from `start` on; where it was stopped, None if it was not."""
    try:
        with contextlib.closing(PackFile(store.disk, store.layout.pack(name))) as pack:
            entries = sorted(pack.entries(), key=lambda entry: entry.offset)
            with store.snapshot() as snapshot:
                rows = {entry.id: snapshot.row(entry.id) for entry in entries}
            for entry in entries:
                row = rows[entry.id]
                if entry.offset < start or row is None or (row.pack, row.offset) != (name, entry.offset):
                    continue
                if spent():
                    return entry.offset
                progress.read += HEADER_BYTES + entry.stored
                try:
                    check_record(pack, entry)
                except CkptError as error:
                    bad[entry.id] = error
    except (FileNotFoundError, CkptError):
        return None
    return None


def _load(store: Store) -> _Place:
    try:
        found = json.loads(store.disk.read(store.layout.scrubbed))
        place = _Place({str(name) for name in found["done"]}, str(found["pack"]))
        place.offset, place.rounds = int(found["offset"]), int(found["rounds"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return _Place()
    return place


def _save(store: Store, place: _Place) -> None:
    found = {
        "done": sorted(place.done),
        "pack": place.pack,
        "offset": place.offset,
        "rounds": place.rounds,
    }
    with contextlib.suppress(StorageError):  # read-only: the next scrub begins where this one did
        store.disk.replace(store.layout.scrubbed, json.dumps(found).encode() + b"\n")
