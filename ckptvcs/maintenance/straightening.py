"""Records of a bundle whose chains of bases have become too long, made independent of their bases.

A bundle's frames are differences against what was stored when it was written. Since then a base may have
been rewritten (`rewriting`), as a difference against something else. The frames that would lie too deep are
decoded and written anew, plain, into a pack of the ingester's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from ckptvcs.errors import CorruptionError
from ckptvcs.ids import ObjectId, chunk_id
from ckptvcs.store import Reader, Snapshot, Store
from ckptvcs.store import codec as codecs
from ckptvcs.store.format import MAX_DEPTH
from ckptvcs.store.index import PackInfo
from ckptvcs.store.packs import PackFile, PackWriter, make_frame
from ckptvcs.store.writer import Made, Sealed, chain_depth


def straightened(store: Store, made: Mapping[ObjectId, Made]) -> tuple[dict[ObjectId, Made], list[Sealed]]:
    """The records to be entered instead of those that lie too deep, and the pack that they are in; nothing if
    there are none. Durable on return. The packs of `made` have their final names.

    CorruptionError if one of them cannot be read.
    """
    with store.snapshot() as snapshot:
        deep = _too_deep(snapshot, made)
    if not deep:
        return {}, []
    writer = PackWriter(store.disk, store.layout, store.lease.next_pack())
    try:
        with store.reader() as reader:
            entries = {}
            for id in deep:
                raw = _content(store, reader, id, made)
                codec, payload = codecs.encode(raw)
                entry = made[id].entry
                frame = make_frame(entry.kind, id, codec, entry.element_size, entry.raw, payload)
                entries[id] = writer.append(frame)
        size = writer.seal()
    except BaseException:
        writer.abandon()
        raise
    info = PackInfo(size, len(entries))
    return {id: Made(entry, writer.name) for id, entry in entries.items()}, [Sealed(writer.name, info)]


def _too_deep(snapshot: Snapshot, made: Mapping[ObjectId, Made]) -> list[ObjectId]:
    """Records that must become plain for all others to lie within `MAX_DEPTH`; those below come first."""
    depths: dict[ObjectId, int | None] = {}
    plain: list[ObjectId] = []
    for id in made:
        line: list[ObjectId] = []
        depth: int | None = -1  # of nothing at all, on which a plain frame rests
        current: ObjectId | None = id
        while current is not None:
            if current not in depths:
                depths[current] = chain_depth(snapshot, current, frozenset())
            depth = depths[current]
            if depth is not None or current not in made or len(line) > len(made):
                break  # there already; or nowhere, or a circle, which the transaction refuses
            line.append(current)
            depth, current = -1, made[current].entry.base
        if depth is None:
            continue
        for each in reversed(line):
            depth += 1
            if depth > MAX_DEPTH:
                plain.append(each)
                depth = 0
            depths[each] = depth
    return plain


def _content(store: Store, reader: Reader, id: ObjectId, made: Mapping[ObjectId, Made]) -> bytes:
    """What a record decodes to, whose bases may be among those made."""
    line: list[ObjectId] = []
    current: ObjectId | None = id
    while current is not None and current in made and len(line) <= len(made):
        line.append(current)
        current = made[current].entry.base
    raw = bytearray(made[id].entry.raw) if current is None else bytearray(reader.chunk(current))
    for each in reversed(line):
        entry, name = made[each]
        path = store.layout.pack(name)
        with contextlib.closing(PackFile(store.disk, path)) as pack:
            payload = pack.payload(pack.header(entry.offset), entry.offset)
        base = None if entry.base is None else memoryview(raw)
        if entry.raw != len(raw):
            raise CorruptionError(f"{path}: the base of {each.short} has another length")
        codecs.decode(entry.codec, payload, memoryview(raw), entry.element_size, base, str(path))
    if chunk_id(raw) != id:
        raise CorruptionError(f"{id.short} of a bundle is damaged", id=str(id))
    return bytes(raw)
