"""Packs that are gone: noticed when a repository is opened, before a job relies on them.

A purge of old files takes packs that new commits share. What the opening of a repository may cost does not
grow with the number of packs: up to 256 of them are looked at one by one, and of more the folders are listed,
which are 256 at most. Only if a pack is missing is it found out whether the tip of the branch needs it.
"""

from __future__ import annotations

import contextlib
from typing import Final

from ckptvcs.errors import CkptError
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.store import Store
from ckptvcs.store.format import MAX_DEPTH, PackName

_FEW: Final = 256
_SHOWN: Final = 3


def warning(store: Store, branch: str, tip: ObjectId) -> str | None:
    """What to tell people if packs are missing that the tip of a branch needs; None if none is."""
    missing = _missing(store)
    if not missing:
        return None
    needed = sorted(_needed(store, tip, missing))
    if not needed:
        return None
    folder = store.layout.packs
    names = ", ".join(str(store.layout.pack(name).relative_to(folder)) for name in needed[:_SHOWN])
    more = f" and {len(needed) - _SHOWN:,} more" if len(needed) > _SHOWN else ""
    what = "a pack is" if len(needed) == 1 else f"{len(needed):,} packs are"
    return (
        f"{what} missing from {folder} that the tip of {branch} needs: {names}{more}. Put the files back "
        "from a copy, or commit the state again: what is missing is stored again then. `ckpt fsck` tells "
        "what else is affected"
    )


def _missing(store: Store) -> set[PackName]:
    """Published packs without their file."""
    with store.snapshot() as snapshot:
        packs = snapshot.packs()
    if len(packs) <= _FEW:
        gone = {name for name in packs if not store.disk.exists(store.layout.pack(name))}
    else:
        folders: dict[str, dict[str, PackName]] = {}
        for name in packs:
            folders.setdefault(name.folder, {})[f"{name.text}.pack"] = name
        gone = set()
        for folder, expected in folders.items():
            there = store.disk.names(store.layout.packs / folder)
            gone.update(expected[file] for file in expected.keys() - set(there))
    if gone:
        with store.snapshot() as snapshot:  # a collector may have merged them meanwhile
            gone = {name for name in gone if snapshot.pack(name) is not None}
    return gone


def _needed(store: Store, tip: ObjectId, missing: set[PackName]) -> set[PackName]:
    """Those of the packs in which something lies that a commit needs, as far as its objects can be read."""
    # It brings numpy, which opening must not wait for.
    from ckptvcs.maintenance import reach

    found: set[PackName] = set()
    seen: set[ObjectId] = set()
    with store.snapshot() as snapshot:
        dropped = snapshot.drops(tip)
    waiting = [(Kind.COMMIT, tip)]
    with store.reader() as reader:
        while waiting:
            kind, id = waiting.pop()
            if id in seen:
                continue
            seen.add(id)
            current: ObjectId | None = id
            lost = False
            for _ in range(MAX_DEPTH + 1):
                if current is None:
                    break
                with store.snapshot() as snapshot:
                    row = snapshot.row(current)
                if row is None:
                    break
                if row.pack in missing:
                    found.add(row.pack)
                    lost = True
                current = row.base
            if lost or kind is Kind.CHUNK:
                continue
            with contextlib.suppress(CkptError):
                payload = reader.objects(kind, [id])[0]
                below = reach.below(reader, kind, id, payload, dropped if id == tip else None)
                waiting += [each for each in below.whole if each[0] is not Kind.COMMIT]
    return found
