"""Small repositories at the store level and what must hold in them: for crash, fault and unit tests."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ckptvcs import canonical
from ckptvcs.disk import Disk
from ckptvcs.ids import Buffer, Kind, ObjectId, chunk_id, object_id
from ckptvcs.store import Move, Publication, Store, Writer
from ckptvcs.store.format import pack_object, unpack_object
from ckptvcs.store.packs import PackFile

MAIN = "refs/heads/main"


class Bytes:
    """The smallest source."""

    def __init__(self, data: Buffer, element_size: int = 1) -> None:
        self.data = memoryview(data).cast("B")
        self.element_size = element_size

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> memoryview:
        return self.data[offset : offset + length]


@dataclass(frozen=True)
class Commit:
    """A commit and what it holds, remembered by the test."""

    id: ObjectId
    contents: tuple[bytes, ...]
    ref: str = MAIN

    def __repr__(self) -> str:
        return f"Commit({self.id.short} on {self.ref})"


def noise(seed: int, size: int) -> bytes:
    """Bytes that do not compress."""
    return np.random.default_rng(seed).bytes(size)


def scratch_folder() -> contextlib.AbstractContextManager[str]:
    """A folder in memory where there is one: a test that opens thousands of repositories needs no disk."""
    shm = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="ckptvcs-", dir=shm if shm.is_dir() else None)


def create(folder: Path, disk: Disk | None = None) -> Store:
    """A new repository below `folder`."""
    return Store.create(folder / ".ckpt", disk or Disk(), config=b"", head=MAIN, who="test", threads=1)


def open_store(folder: Path, disk: Disk | None = None) -> Store:
    """The repository below `folder`."""
    return Store.open(folder / ".ckpt", disk or Disk(), threads=1)


def put_commit(
    writer: Writer, contents: Sequence[bytes], parents: Sequence[ObjectId] = (), message: str = ""
) -> Commit:
    """Put chunks, a tree and a commit, each content in a section of its own."""
    references: list[tuple[Kind, ObjectId]] = []
    body = []
    for number, content in enumerate(contents):
        writer.section(f"part{number}")
        (ids,) = writer.put([Bytes(content)])
        references += [(Kind.CHUNK, id) for id in ids]
        body.append([len(ids), len(content)])
    writer.section("")
    (tree,) = writer.put_objects(Kind.TREE, [pack_object(references, canonical.encode(body))])
    return Commit(put_root(writer, tree, parents, message), tuple(contents))


def put_root(writer: Writer, tree: ObjectId, parents: Sequence[ObjectId] = (), message: str = "") -> ObjectId:
    """Put a commit of a tree that is there already."""
    links = [(Kind.TREE, tree), *((Kind.COMMIT, parent) for parent in parents)]
    (commit,) = writer.put_objects(Kind.COMMIT, [pack_object(links, canonical.encode(message))])
    return commit


def publication(
    root: ObjectId, old: ObjectId | None, ref: str = MAIN, require: Sequence[ObjectId] | None = None
) -> Publication:
    """Move a ref from `old` to `root`."""
    return Publication(
        root,
        (Move(ref, old, root),),
        Move(f"refs/lost/{ref.removeprefix('refs/heads/')}/{root.short}", None, root),
        tuple(require) if require is not None else ((old,) if old is not None else ()),
        1,
        "test",
        "commit",
    )


def commit(
    store: Store,
    contents: Sequence[bytes],
    old: ObjectId | None = None,
    ref: str = MAIN,
    message: str = "",
) -> Commit:
    """A whole commit, journal included. The race for the ref must be won."""
    with store.writer() as writer:
        made = put_commit(writer, contents, [old] if old else [], message)
        assert writer.publish(publication(made.id, old, ref))
    store.catch_up_journal()
    return Commit(made.id, made.contents, ref)


def contents(store: Store, id: ObjectId) -> tuple[bytes, ...]:
    """Everything a commit holds, read back."""
    with store.reader() as reader:
        (payload,) = reader.objects(Kind.COMMIT, [id])
        tree = unpack_object(payload, "commit")[0][0]
        assert tree[0] is Kind.TREE
        (payload,) = reader.objects(Kind.TREE, [tree[1]])
        references, body = unpack_object(payload, "tree")
        chunks = [reference for _, reference in references]
        found = []
        for count, size in canonical.decode(body):
            buffer = bytearray(size)
            reader.read_into([(chunks[:count], memoryview(buffer))])
            found.append(bytes(buffer))
            chunks = chunks[count:]
        assert not chunks
        return tuple(found)


def parents(store: Store, id: ObjectId) -> list[ObjectId]:
    """The parents of a commit."""
    with store.reader() as reader:
        (payload,) = reader.objects(Kind.COMMIT, [id])
    return [link for kind, link in unpack_object(payload, "commit")[0] if kind is Kind.COMMIT]


def tips(store: Store) -> dict[str, ObjectId]:
    """All refs to commits."""
    with store.snapshot() as snapshot:
        return {name: ref for name, ref in snapshot.refs().items() if isinstance(ref, ObjectId)}


def verify(store: Store) -> int:
    """Check the whole repository: refs -> rows -> packs -> ids -> bytes. Returns the number of rows.

    Every row must point at a record with its id in an existing published pack, everything must decode and
    hash to its id, and a row that is present vouches for all it refers to.
    """
    with store.snapshot() as snapshot:
        rows = snapshot.rows_from(b"", 1 << 30)
        packs = snapshot.packs()
        refs = snapshot.refs()
        position = snapshot.position()
        log = [entry.position for entry in snapshot.log()]
    assert log == list(range(position - len(log) + 1, position + 1)), "the log has gaps"
    there = dict(rows)
    for name, target in refs.items():
        if isinstance(target, ObjectId):
            assert target in there, f"{name} points at the missing {target.short}"
            assert there[target].kind is Kind.COMMIT
    disk, layout = store.disk, store.layout
    used = {row.pack for _, row in rows}
    for pack, info in packs.items():
        # A collector unlinks a pack before it forgets it, once no row points there any more.
        assert pack in used or not disk.exists(layout.pack(pack)) or disk.size(layout.pack(pack)) == info.size
        assert pack not in used or disk.size(layout.pack(pack)) == info.size
    with store.reader() as reader:
        for id, row in rows:
            assert row.pack in packs, f"{id.short} lies in the unpublished pack {row.pack.text}"
            with contextlib.closing(PackFile(disk, layout.pack(row.pack))) as pack:
                header = pack.header(row.offset)
                pack.payload(header, row.offset)
            assert (header.id, header.kind, header.raw, header.stored, header.base) == (
                id,
                row.kind,
                row.raw,
                row.stored,
                row.base,
            )
            if row.base is not None:
                assert there[row.base].depth == row.depth - 1
            if row.kind is Kind.CHUNK:
                assert chunk_id(reader.chunk(id)) == id
                continue
            (payload,) = reader.objects(row.kind, [id])
            assert object_id(row.kind, payload) == id
            for kind, child in unpack_object(payload, "object")[0]:
                assert child in there, f"{row.kind.label} {id.short} refers to the missing {child.short}"
                assert there[child].kind is kind
    return len(rows)


def files(folder: Path) -> Iterator[Path]:
    """All files beneath, LMDB's lock file left out: opening it would drop the process's locks."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock.mdb")
