"""Small packs, merged now and then by those who commit, so that files do not become as many as commits.

A commit writes at least one pack. Packs below 8 MiB are counted by order of size, each order eight times the
one before it; where 32 of an order have gathered, some are copied into one pack of a higher order. So each
byte is copied at most once per order, and files are at most 32 for each of the few orders, and one for each
8 MiB. What one call copies is bounded, whatever the repository holds.

It is a compaction (`compaction`), safe beside readers and writers. If a collector runs, or anything goes
wrong, it is left for another time: the commit it follows is durable already.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ckptvcs.errors import CkptError, CorruptionError
from ckptvcs.maintenance.compaction import compact
from ckptvcs.store import Store
from ckptvcs.store.format import PackName

SMALL: Final = 8 << 20
"""Larger packs are left alone."""

MANY: Final = 32
"""So many small packs of an order are merged."""

AT_MOST: Final = 16 << 20
"""Bytes that one call copies."""

_log = logging.getLogger(__name__)


class Merger:
    """Merges small packs behind commits of one process. Not thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._wait = 0
        self._unreadable: set[Path] = set()

    def after_commit(self) -> int:
        """Look whether there is something to merge, now and then, and merge; the packs that are gone.

        Raises nothing that a commit could fail by.
        """
        self._wait -= 1
        if self._wait > 0:
            return 0
        try:
            merged, self._wait = self._merge()
        except (CkptError, OSError) as error:
            if isinstance(error, CorruptionError) and error.path:
                self._unreadable.add(Path(error.path))
            _log.debug("small packs were not merged: %s", error)
            merged, self._wait = 0, MANY
        return merged

    def _merge(self) -> tuple[int, int]:
        """Packs that are gone, and after how many more commits there may be something to merge."""
        store = self._store
        group, missing = self._group()
        if not group:
            return 0, missing
        with store.collecting():
            group, missing = self._group()  # another process may have been faster
            if not group:
                return 0, missing
            compact(store, group)
        return len(group), 1

    def _group(self) -> tuple[list[PackName], int]:
        with self._store.snapshot() as snapshot:
            packs = snapshot.packs()
        path = self._store.layout.pack
        return choose({name: info.size for name, info in packs.items() if path(name) not in self._unreadable})


def choose(sizes: Mapping[PackName, int]) -> tuple[list[PackName], int]:
    """Of these packs those to be merged now; or none, and how many more the fullest order needs."""
    orders: dict[int, list[PackName]] = {}
    for name, size in sizes.items():
        if size < SMALL:
            orders.setdefault(order(size), []).append(name)
    for _, some in sorted(orders.items()):
        if len(some) >= MANY:
            chosen: list[PackName] = []
            total = 0
            for name in sorted(some):
                total += sizes[name]
                if total > AT_MOST and len(chosen) > 1:
                    break
                chosen.append(name)
            return chosen, 0
    return [], MANY - max(map(len, orders.values()), default=0)


def order(size: int) -> int:
    """The order of a pack of so many bytes."""
    return size.bit_length() // 3
