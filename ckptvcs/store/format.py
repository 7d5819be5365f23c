"""Format version 1: byte layouts, file names and feature flags. docs/format.md is its normative page.

Integers are little endian. A pack is a run of records, then a footer, then a trailer:

    record  = header (104 bytes) · payload (`stored` bytes)
    footer  = one entry per record: 52 bytes, 84 with a base id
    trailer = 68 bytes, at the very end

Every header starts with a magic and ends with a CRC, so a scanner finds the next whole record behind
damage. Whatever stands between two records is a gap and means nothing.
"""

from __future__ import annotations

import json
import re
import struct
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from ckptvcs.errors import CorruptionError, FormatError
from ckptvcs.ids import ID_BYTES, Buffer, Kind, ObjectId, digest

VERSION: Final = 1
NO_BASE: Final = bytes(ID_BYTES)
HAS_BASE: Final = 0x01
DAMAGED: Final = 0x02
"""Row flag only, never in a pack: the record failed its check, so deduplication must not trust it."""

MAX_RAW: Final = 64 << 20
"""Largest raw length of one record. Checked before anything is allocated for it."""

MAX_OBJECT: Final = 8 << 20
"""The same for trees and commits. Trees are split far below it; but a byte may decode to a container, which
takes a hundred bytes of memory, so what is decoded as a whole has a limit of its own."""

MAX_STORED: Final = MAX_RAW + (64 << 10)
"""Largest payload of one record: no codec makes a chunk longer than by a few bytes."""

PACK_LIMIT: Final = 1 << 30
"""A pack is sealed at a commit, or when it passes this size."""

MAX_DEPTH: Final = 8
"""Frames from a chunk down to a plain one; a longer base chain is refused."""


# -- grid -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grid:
    """How content is cut into records: a pure function of the content, so ids never depend on the store.

    Attributes:
        id: number recorded in `format`; its meaning never changes once released.
        chunk: bytes in a grid cell, counted from the tensor's own start.
        inline: tensors of at most this many bytes live inside their tree.
        chunk_list: a tensor of more chunks than this refers to one chunk list instead.
        subtree: a container whose encoding is longer becomes an object of its own.
        list_page: items in a page of a long list, counted from its start.
        map_page: a long dict is cut behind each key whose hash is 0 modulo this, so that an insertion
            moves one boundary only.
    """

    id: int
    chunk: int
    inline: int
    chunk_list: int
    subtree: int
    list_page: int
    map_page: int


GRIDS: Final = {
    1: Grid(id=1, chunk=1 << 20, inline=256, chunk_list=4, subtree=2048, list_page=64, map_page=16),
}


# -- records --------------------------------------------------------------------------------------


def largest(kind: Kind) -> int:
    """The most raw bytes that a record of this kind may have."""
    return MAX_OBJECT if kind in (Kind.TREE, Kind.COMMIT) else MAX_RAW


def _fits(kind: int, raw: int, stored: int) -> bool:
    return kind in _KINDS and raw <= largest(Kind(kind)) and stored <= MAX_STORED


_KINDS: Final = frozenset(int(kind) for kind in Kind)

RECORD_MAGIC: Final = b"CKR\x01"
_HEADER: Final = struct.Struct("<4sBBBBB3xII32s32s16sI")
HEADER_BYTES: Final = _HEADER.size


class Header(NamedTuple):
    """What a record says of itself. `base` is None for a plain frame."""

    kind: Kind
    codec: int
    element_size: int
    raw: int
    stored: int
    id: ObjectId
    base: ObjectId | None
    digest: bytes

    def pack(self) -> bytes:
        """The header's 104 bytes."""
        head = _HEADER.pack(
            RECORD_MAGIC,
            VERSION,
            self.kind,
            self.codec,
            self.element_size,
            HAS_BASE if self.base else 0,
            self.raw,
            self.stored,
            self.id,
            self.base or NO_BASE,
            self.digest,
            0,
        )[:-4]
        return head + zlib.crc32(head).to_bytes(4, "little")

    @classmethod
    def unpack(cls, data: Buffer, where: str, offset: int) -> Header:
        """Parse and check 104 bytes. CorruptionError naming file and offset; FormatError if newer."""
        if len(data) < HEADER_BYTES:
            raise CorruptionError(f"{where}: record at {offset} is cut short", path=where, offset=offset)
        data = bytes(data[:HEADER_BYTES])
        magic, version, kind, codec, element, flags, raw, stored, id, base, mark, crc = _HEADER.unpack(data)
        if magic != RECORD_MAGIC or crc != zlib.crc32(data[:-4]):
            raise CorruptionError(f"{where}: no record header at {offset}", path=where, offset=offset)
        if version != VERSION:
            raise FormatError(
                f"{where}: record at {offset} has version {version}; this program reads {VERSION}"
            )
        if not _fits(kind, raw, stored) or flags & ~HAS_BASE or bool(flags) != (base != NO_BASE):
            raise CorruptionError(f"{where}: impossible record header at {offset}", path=where, offset=offset)
        return cls(
            Kind(kind), codec, element, raw, stored, ObjectId(id), ObjectId(base) if flags else None, mark
        )


def record_bytes(stored: int, based: bool) -> int:
    """What a record costs in a pack: header, payload and footer entry. The unit of all accounting."""
    return HEADER_BYTES + stored + (_ENTRY.size + ID_BYTES if based else _ENTRY.size)


# -- footer and trailer ---------------------------------------------------------------------------

_ENTRY: Final = struct.Struct("<BBBBIIQ32s")
TRAILER_MAGIC: Final = b"CKPACK\x01\n"
_TRAILER: Final = struct.Struct("<8sIQQ16sI16sI")
TRAILER_BYTES: Final = _TRAILER.size


class Entry(NamedTuple):
    """A footer line: where a record starts and what it holds."""

    offset: int
    kind: Kind
    codec: int
    element_size: int
    raw: int
    stored: int
    id: ObjectId
    base: ObjectId | None

    @classmethod
    def of(cls, header: Header, offset: int) -> Entry:
        """The entry of the record that begins with this header at `offset`."""
        return cls(offset, *header[:-1])

    @property
    def cost(self) -> int:
        """Bytes of the record in its pack: header, payload and footer entry."""
        return record_bytes(self.stored, self.base is not None)


class PackName(NamedTuple):
    """A pack's name, never used twice: the writer's lease and its running number."""

    lease: bytes
    seq: int

    @property
    def text(self) -> str:
        """The file name without its ending."""
        lease = self.lease.hex()
        return f"{lease[:8]}-{lease[8:12]}-{lease[12:16]}-{lease[16:20]}-{lease[20:]}-{self.seq}"

    @property
    def folder(self) -> str:
        """The folder below `packs/`. The fan-out takes both parts of the name, so that a process with many
        commits fills all folders evenly."""
        return f"{(self.lease[0] + self.seq) & 0xFF:02x}"

    @property
    def key(self) -> bytes:
        """20 bytes: the key in the index, ordered like the name."""
        return self.lease + self.seq.to_bytes(4, "big")

    @classmethod
    def from_key(cls, key: Buffer) -> PackName:
        """The inverse of `key`."""
        return cls(bytes(key[:16]), int.from_bytes(key[16:20], "big"))

    @classmethod
    def parse(cls, file_name: str) -> PackName | None:
        """The name of a pack file, or None if the file is something else."""
        found = _PACK_FILE.match(file_name)
        return cls(uuid.UUID(found[1]).bytes, int(found[2])) if found else None


_PACK_FILE = re.compile(
    r"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})-(0|[1-9][0-9]{0,8})\.pack\Z"
)


def pack_footer(entries: list[Entry], name: PackName, end: int) -> bytes:
    """Footer and trailer of a pack whose records end at offset `end`."""
    body = b"".join(
        _ENTRY.pack(
            e.kind, e.codec, e.element_size, HAS_BASE if e.base else 0, e.raw, e.stored, e.offset, e.id
        )
        + (e.base or b"")
        for e in entries
    )
    head = _TRAILER.pack(TRAILER_MAGIC, len(entries), end, len(body), name.lease, name.seq, digest(body), 0)[
        :-4
    ]
    return body + head + zlib.crc32(head).to_bytes(4, "little")


class Trailer(NamedTuple):
    """The end of a pack: where its footer is, and whose pack it is."""

    records: int
    footer_offset: int
    footer_bytes: int
    name: PackName
    digest: bytes

    @classmethod
    def unpack(cls, data: Buffer, where: str, file_size: int) -> Trailer:
        """Parse the last `TRAILER_BYTES` of a pack and check them against the file's size."""
        data = bytes(data)
        if len(data) == TRAILER_BYTES:
            magic, count, offset, size, lease, seq, mark, crc = _TRAILER.unpack(data)
            if (
                magic == TRAILER_MAGIC
                and crc == zlib.crc32(data[:-4])
                and offset + size + TRAILER_BYTES == file_size
            ):
                return cls(count, offset, size, PackName(lease, seq), mark)
        raise CorruptionError(f"{where}: the pack has no whole footer", path=where, offset=file_size)


def check_footer(body: Buffer, trailer: Trailer, where: str) -> None:
    """CorruptionError if these are not the footer's bytes."""
    if digest(body) != trailer.digest:
        raise CorruptionError(f"{where}: the footer is damaged", path=where, offset=trailer.footer_offset)


def unpack_footer(body: Buffer, trailer: Trailer, where: str) -> list[Entry]:
    """The entries of a footer, each checked to lie inside the pack."""
    check_footer(body, trailer, where)
    return list(_entries(bytes(body), trailer, where))


def _entries(body: bytes, trailer: Trailer, where: str) -> Iterator[Entry]:
    at = 0
    for _ in range(trailer.records):
        if at + _ENTRY.size > len(body):
            at = len(body) + 1
            break
        kind, codec, element, flags, raw, stored, offset, id = _ENTRY.unpack_from(body, at)
        at += _ENTRY.size
        base = None
        if flags & HAS_BASE:
            base = ObjectId(body[at : at + ID_BYTES]) if at + ID_BYTES <= len(body) else None
            at += ID_BYTES
        inside = offset + HEADER_BYTES + stored <= trailer.footer_offset
        if not _fits(kind, raw, stored) or flags & ~HAS_BASE or not inside:
            raise CorruptionError(f"{where}: impossible footer entry", path=where, offset=offset)
        yield Entry(offset, Kind(kind), codec, element, raw, stored, ObjectId(id), base)
    if at != len(body):
        raise CorruptionError(
            f"{where}: the footer does not hold what it says", path=where, offset=trailer.footer_offset
        )


# -- objects --------------------------------------------------------------------------------------

_COUNT: Final = struct.Struct("<I")


def pack_object(references: list[tuple[Kind, ObjectId]], body: bytes) -> bytes:
    """An object's payload: the ids it refers to, then a body that names them by position.

    The store follows references without understanding any body.
    """
    return b"".join([_COUNT.pack(len(references)), *[bytes((kind,)) + id for kind, id in references], body])


def unpack_object(payload: Buffer, where: str) -> tuple[list[tuple[Kind, ObjectId]], memoryview]:
    """References and body of an object."""
    view = memoryview(payload)
    if len(view) < _COUNT.size:
        raise CorruptionError(f"{where}: the object is cut short")
    (count,) = _COUNT.unpack_from(view)
    end = _COUNT.size + count * (1 + ID_BYTES)
    if end > len(view):
        raise CorruptionError(f"{where}: the object's reference table is cut short")
    references = []
    for at in range(_COUNT.size, end, 1 + ID_BYTES):
        if view[at] not in _KINDS:
            raise CorruptionError(f"{where}: the object refers to an unknown kind {view[at]}")
        references.append((Kind(view[at]), ObjectId(view[at + 1 : at + 1 + ID_BYTES])))
    return references, view[end:]


# -- the repository's own files -------------------------------------------------------------------

FEATURES: Final[dict[str, frozenset[str]]] = {
    "read": frozenset(),
    "write": frozenset(),
    "gc": frozenset(),
}
"""Feature flags this program knows, by the kind of work that needs to understand them."""

_FORMAT_TITLE = "ckptvcs repository"


@dataclass(frozen=True, slots=True)
class Format:
    """The content of `.ckpt/format`. Written at init, rebuild and upgrade only."""

    repository: str
    index: str
    lmdb: int
    grid: int
    version: int = VERSION
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    gc: tuple[str, ...] = ()

    @classmethod
    def new(cls) -> Format:
        """A repository of its own, with a fresh UUID and index id."""
        return cls(repository=str(uuid.uuid4()), index=str(uuid.uuid4()), lmdb=0, grid=1)

    def with_new_index(self) -> Format:
        """The same repository with another index id: what a rebuild writes."""
        return replace(self, index=str(uuid.uuid4()))

    def pack(self) -> bytes:
        """Three text lines: a title, JSON, the BLAKE3 of the JSON."""
        body = json.dumps(
            {
                "version": self.version,
                "repository": self.repository,
                "index": self.index,
                "lmdb": self.lmdb,
                "grid": self.grid,
                "features": {"read": self.read, "write": self.write, "gc": self.gc},
            },
            sort_keys=True,
        )
        return f"{_FORMAT_TITLE}\n{body}\n{digest(body.encode()).hex()}\n".encode()

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Format:
        """Parse and check. The version is judged before anything else is read."""
        damaged = CorruptionError(
            f"{where} is damaged", path=where, hint="restore it from a copy of the repository"
        )
        try:
            title, body, mark, rest = data.decode().split("\n")
            if title != _FORMAT_TITLE or rest or digest(body.encode()).hex() != mark:
                raise damaged
            fields: dict[str, Any] = json.loads(body)
            version = _whole(fields["version"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise damaged from None
        if version != VERSION:
            raise FormatError(
                f"{where}: repository format {version}; this program knows {VERSION}",
                hint="use a newer ckptvcs",
            )
        try:
            features = fields["features"]
            found = cls(
                repository=str(uuid.UUID(_text(fields["repository"]))),
                index=str(uuid.UUID(_text(fields["index"]))),
                lmdb=_whole(fields["lmdb"]),
                grid=_whole(fields["grid"]),
                read=tuple(map(_text, features["read"])),
                write=tuple(map(_text, features["write"])),
                gc=tuple(map(_text, features["gc"])),
            )
        except (ValueError, KeyError, TypeError):
            raise damaged from None
        if found.grid not in GRIDS:
            raise FormatError(f"{where}: unknown grid {found.grid}", hint="use a newer ckptvcs")
        found.check("read")
        return found

    def check(self, work: str) -> None:
        """Refuse `work` ('read', 'write' or 'gc') if the repository uses a feature unknown here."""
        needed: tuple[str, ...] = {"read": self.read, "write": self.write, "gc": self.gc}[work]
        unknown = [name[:60] for name in sorted(set(needed) - FEATURES[work])[:10]]
        if unknown:
            doing = {"read": "read", "write": "write to", "gc": "collect garbage in"}[work]
            raise FormatError(
                f"to {doing} this repository a program must know the feature "
                f"{', '.join(unknown)}, and this one does not",
                hint="use a newer ckptvcs",
            )


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError("not a whole number")
    return value


def _text(value: object) -> str:
    if type(value) is not str:
        raise TypeError("not a text")
    return value


FOLDER: Final = ".ckpt"
"""The repository folder's name, inside the folder that people name. No file in a tree has it."""


class Layout:
    """Every file name inside `.ckpt`. The names are relative; a repository may be moved."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.format = root / "format"
        self.config = root / "config.toml"
        self.meta = root / "meta"
        self.packs = root / "packs"
        self.incoming = root / "incoming"
        self.leases = root / "leases"
        self.journal = root / "refs.journal"
        self.lock = root / "lock"
        self.gc_lock = root / "gc.lock"
        self.packs_lock = root / "packs.lock"
        self.temporary = root / "tmp"
        self.quarantine = root / "quarantine"
        self.scrubbed = root / "scrubbed"
        self.ignore = root / ".gitignore"

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders made at init, besides the 256 below `packs`."""
        return self.meta, self.packs, self.incoming, self.leases, self.temporary, self.quarantine

    @property
    def own(self) -> tuple[Path, ...]:
        """Everything that is there once, in every repository."""
        files = (
            self.format,
            self.config,
            self.journal,
            self.lock,
            self.gc_lock,
            self.packs_lock,
            self.ignore,
        )
        return (*self.folders, *files, self.meta / "data.mdb", self.meta / "lock.mdb")

    def pack(self, name: PackName) -> Path:
        """Where a sealed pack lives."""
        return self.packs / name.folder / f"{name.text}.pack"

    def open_pack(self, name: PackName) -> Path:
        """Where a pack is written before it is sealed."""
        return self.temporary / f"{name.text}.pack"

    def lease(self, lease: bytes) -> Path:
        """A writer's lease file."""
        return self.leases / str(uuid.UUID(bytes=lease))

    def claim(self, ref: str) -> Path:
        """The lease file of a ref's claimant. A hash, since names of refs may be longer than those of
        files."""
        return self.leases / f"claim-{digest(ref.encode()).hex()}"
