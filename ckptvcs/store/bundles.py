"""Bundles: what a writer without the index leaves in `incoming/` for somebody who has it.

A bundle is one commit on its way: a file that names the commit, the packs beside it that hold what is new,
and the ref that is to move. It is written last, so that whoever finds it finds the packs. Its layout is
docs/format.md, "Bundles"; what becomes of it is `ckptvcs.maintenance.ingest`.

    bundle = magic (8 bytes) · u32 length · canonical map · BLAKE3-128 of all before
"""

from __future__ import annotations

import contextlib
import struct
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from ckptvcs import canonical
from ckptvcs.disk import Disk
from ckptvcs.errors import CkptError, CorruptionError
from ckptvcs.ids import ObjectId, digest
from ckptvcs.store.format import Layout, PackName
from ckptvcs.store.journal import Move, Operation, Status

MAGIC: Final = b"CKBNDL\x01\n"
_LENGTH: Final = struct.Struct("<I")
_DIGEST: Final = 16
MAX_BUNDLE: Final = 16 << 20
"""The largest bundle, in bytes. Checked before anything is read of it."""

_LONGEST: Final = 4096
ENDING: Final = ".bundle"


class BundledPack(NamedTuple):
    """A pack that a bundle names.

    Attributes:
        size: bytes of the file.
        records: how many it holds.
        mark: the digest of its footer, which its trailer repeats.
    """

    name: PackName
    size: int
    records: int
    mark: bytes


@dataclass(frozen=True, slots=True)
class Bundle:
    """A commit on its way into the index.

    Attributes:
        name: of the bundle itself: its writer's UUID and a running number, which packs and bundles share.
        repository: UUID of the repository it is for.
        root: the commit.
        ref: the branch to move, by its full name.
        tip: where the branch stood for the writer; None if it was not born.
        lost: whether the writer saw that the branch stood elsewhere, so that it must not move.
        tags: full names of tags to be made with it.
        status: what becomes of the run on the branch; None leaves it as it is.
        base: the commit whose content was reused; None if the bundle holds all that its commit reaches.
        packs: the packs that hold what is new.
        time, who, why, info: as in the log entry that is to be.
    """

    name: PackName
    repository: str
    root: ObjectId
    ref: str
    tip: ObjectId | None
    lost: bool
    tags: tuple[str, ...]
    status: str | None
    base: ObjectId | None
    packs: tuple[BundledPack, ...]
    time: int
    who: str
    why: str
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def moves(self) -> tuple[Move, ...]:
        """The refs that are to move."""
        return (Move(self.ref, self.tip, self.root), *(Move(tag, None, self.root) for tag in self.tags))

    @property
    def annotations(self) -> tuple[Operation, ...]:
        """What is entered with the moves."""
        return () if self.status is None else (Status(self.ref.removeprefix("refs/heads/"), self.status),)

    @property
    def file_name(self) -> str:
        """What it is called in `incoming/`."""
        return self.name.text + ENDING

    def pack(self) -> bytes:
        """The file's content."""
        body = canonical.encode(
            {
                "name": self.name.key,
                "repository": self.repository,
                "root": bytes(self.root),
                "ref": self.ref,
                "tip": _bytes(self.tip),
                "lost": self.lost,
                "tags": list(self.tags),
                "status": self.status,
                "base": _bytes(self.base),
                "packs": [[each.name.key, each.size, each.records, each.mark] for each in self.packs],
                "time": self.time,
                "who": self.who,
                "why": self.why,
                "info": self.info,
            }
        )
        data = MAGIC + _LENGTH.pack(len(body)) + body
        return data + digest(data)

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Bundle:
        """Parse and check. CorruptionError for anything that `pack` does not write."""
        start = len(MAGIC) + _LENGTH.size
        whole = len(data) >= start + _DIGEST and data.startswith(MAGIC)
        if not whole or digest(data[:-_DIGEST]) != data[-_DIGEST:]:
            raise CorruptionError(f"{where}: the bundle is damaged or cut short", path=where)
        try:
            if _LENGTH.unpack_from(data, len(MAGIC))[0] != len(data) - start - _DIGEST:
                raise ValueError("its length is wrong")
            fields = canonical.decode(data[start:-_DIGEST])
            made = cls(
                name=_name(fields["name"]),
                repository=str(uuid.UUID(_typed(fields["repository"], str))),
                root=ObjectId(_typed(fields["root"], bytes)),
                ref=_typed(fields["ref"], str),
                tip=_id(fields["tip"]),
                lost=_typed(fields["lost"], bool),
                tags=tuple(_typed(tag, str) for tag in _typed(fields["tags"], list)),
                status=None if fields["status"] is None else _typed(fields["status"], str),
                base=_id(fields["base"]),
                packs=tuple(_pack(each) for each in _typed(fields["packs"], list)),
                time=_typed(fields["time"], int),
                who=_typed(fields["who"], str),
                why=_typed(fields["why"], str),
                info=_plain(fields["info"]),
            )
            if made.pack() != data:
                raise ValueError("it holds more than a bundle")
            if max(len(made.who), len(made.why), len(made.info)) > _LONGEST:
                raise ValueError("who or why is too long")
            if len({each.name for each in made.packs}) != len(made.packs):
                raise ValueError("it names a pack twice")
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptionError(f"{where}: the bundle means nothing: {error}", path=where) from None
        return made


def _bytes(id: ObjectId | None) -> bytes | None:
    return None if id is None else bytes(id)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _id(value: Any) -> ObjectId | None:
    return None if value is None else ObjectId(_typed(value, bytes))


def _name(value: Any) -> PackName:
    if len(_typed(value, bytes)) != 20:
        raise ValueError("a name of another length")
    return PackName.from_key(value)


def _pack(value: Any) -> BundledPack:
    name, size, records, mark = _typed(value, list)
    if len(_typed(mark, bytes)) != _DIGEST:
        raise ValueError("a digest of another length")
    if not (0 <= _typed(size, int) < 1 << 63 and 0 <= _typed(records, int) < 1 << 32):
        raise ValueError("an impossible size")
    return BundledPack(_name(name), size, records, mark)


def _plain(value: Any) -> dict[str, Any]:
    for name, each in _typed(value, dict).items():
        _typed(name, str)
        if type(each) not in (type(None), bool, int, float, str):
            raise ValueError(f"a {type(each).__name__} among its numbers")
    return dict(value)


# -- the folder -----------------------------------------------------------------------------------


def waiting(disk: Disk, layout: Layout) -> list[str]:
    """The file names of bundles in `incoming/`, in name order."""
    return [
        name
        for name in disk.names(layout.incoming)
        if bundle_name(name) is not None and disk.is_plain_file(layout.incoming / name)
    ]


def bundle_name(file_name: str) -> PackName | None:
    """The name of a bundle's file, or None if it is something else."""
    if not file_name.endswith(ENDING):
        return None
    return PackName.parse(file_name.removesuffix(ENDING) + ".pack")


def read(disk: Disk, path: Path) -> Bundle:
    """The bundle in a file. FileNotFoundError if it is gone; CorruptionError if it is none."""
    with disk.open(path) as file:
        size = file.size()
        if size > MAX_BUNDLE:
            raise CorruptionError(f"{path}: a bundle of {size} bytes is too large", path=str(path))
        found = Bundle.unpack(file.read(0, size), str(path))
    if found.name != bundle_name(path.name):
        raise CorruptionError(f"{path} holds the bundle {found.name.text}", path=str(path))
    return found


def readable(disk: Disk, layout: Layout) -> list[Bundle]:
    """The bundles in `incoming/` that can be read. What becomes of the others is not asked here."""
    found = []
    for name in waiting(disk, layout):
        with contextlib.suppress(FileNotFoundError, CkptError):
            found.append(read(disk, layout.incoming / name))
    return found


def in_order(bundles: Iterable[Bundle]) -> list[Bundle]:
    """Each behind those that made what it builds on; else by name. Clocks order nothing."""
    ordered: list[Bundle] = []
    left = sorted(bundles, key=lambda each: each.name)
    coming = {each.root for each in left}
    while left:
        later = []
        for each in left:
            if any(id in coming and id != each.root for id in (each.tip, each.base)):
                later.append(each)
            else:
                ordered.append(each)
                coming.discard(each.root)
        if len(later) == len(left):  # they wait for each other: whoever takes them up will say so
            return ordered + later
        left = later
    return ordered
