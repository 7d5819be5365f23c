"""Pack files between two collections: how much of each is in use, and their records in fewer, fuller packs.

The order of steps is docs/format.md, "Collection" 7 and 8: live records are copied verbatim into a new pack,
one transaction moves their rows, and only then the old packs are unlinked. The caller holds `gc.lock`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ckptvcs.errors import CorruptionError
from ckptvcs.ids import ObjectId
from ckptvcs.maintenance.marking import slices
from ckptvcs.maintenance.rewriting import Rewriter
from ckptvcs.store import Row, Store
from ckptvcs.store.format import HEADER_BYTES, PACK_LIMIT, TRAILER_BYTES, PackName
from ckptvcs.store.packs import PackFile


@dataclass(slots=True)
class Usage:
    """What of a published pack is in use.

    Attributes:
        records, bytes: live ones; bytes with headers and footer entries.
        all_records, all_bytes: of the whole file without its trailer.
    """

    records: int
    bytes: int
    all_records: int
    all_bytes: int


def usage(store: Store, dead: Callable[[ObjectId], bool] | None = None) -> dict[PackName, Usage]:
    """All published packs, and what of each is in use if the rows that are `dead` were gone."""
    with store.snapshot() as snapshot:
        packs = snapshot.packs()
    found = {
        name: Usage(0, 0, info.records, max(0, info.size - TRAILER_BYTES)) for name, info in packs.items()
    }
    for part in slices(store):
        for id, row in part:
            pack = found.get(row.pack)
            if pack is not None and (dead is None or not dead(id)):
                pack.records += 1
                pack.bytes += row.cost
    return found


def groups(sizes: Iterable[tuple[PackName, int]]) -> list[list[PackName]]:
    """Packs, with the bytes of their live records, so that each group fits into one new pack."""
    found: list[list[PackName]] = []
    size = PACK_LIMIT
    for name, live in sizes:
        if size + live > PACK_LIMIT:
            found.append([])
            size = 0
        found[-1].append(name)
        size += live
    return found


def compact(store: Store, names: Sequence[PackName]) -> None:
    """Move the live records of these packs into one new pack, and unlink them.

    CorruptionError if one of them is damaged, StorageError if it cannot be written: then all stay as they
    are.
    """
    with Rewriter(store) as rewriter:
        for name in names:
            for id, row in _live(store, name):
                rewriter.copy(id, row)
        rewriter.publish()
    for name in names:
        unlink(store, name)


def unlink(store: Store, name: PackName) -> None:
    """Remove a pack that no row points into. The file first, then its row: a crash in between leaves a row
    without file, which the next run finishes. No row can come to point into a published pack again."""
    store.disk.remove(store.layout.pack(name))
    with store.index.change() as change:
        change.bump_gc_seq()
        change.delete_pack(name)


def _live(store: Store, name: PackName) -> list[tuple[ObjectId, Row]]:
    """The rows that point into a pack, in its order.

    Found by its footer, which must list the file without a gap: then no row can point at anything else.
    """
    path = store.layout.pack(name)
    try:
        with contextlib.closing(PackFile(store.disk, path)) as pack:
            entries = sorted(pack.entries(), key=lambda entry: entry.offset)
            records = pack.trailer().footer_offset
    except FileNotFoundError:
        raise CorruptionError(f"the pack {path} is missing", path=str(path)) from None
    end = 0
    for entry in entries:
        end += HEADER_BYTES + entry.stored if entry.offset == end else 0
    if end != records:
        raise CorruptionError(f"{path}: the footer leaves records out", path=str(path))
    with store.snapshot() as snapshot:
        rows = [(entry.id, snapshot.row(entry.id), entry.offset) for entry in entries]
    return [(id, row) for id, row, at in rows if row is not None and (row.pack, row.offset) == (name, at)]
