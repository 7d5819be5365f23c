"""What the golden files hold, as values. Adding a value is fine; changing one is a change of the format."""

from __future__ import annotations

import math
import struct
import uuid
from typing import Any, Final

import numpy as np

from ckptvcs.canonical import Tagged
from ckptvcs.history.commit import encode_commit
from ckptvcs.ids import Kind, ObjectId, chunk_id, object_id
from ckptvcs.store import codec, difference, planes
from ckptvcs.store.bundles import Bundle, BundledPack
from ckptvcs.store.format import Entry, Format, Header, PackName, pack_footer, pack_object
from ckptvcs.store.index import Row
from ckptvcs.store.journal import Drop, Expire, Fork, LogEntry, Move, Note, Pin, Status
from ckptvcs.store.packs import Frame, make_frame
from ckptvcs.testing.codecs import XOR, delta_frame

LEASE: Final = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff").bytes
PACK: Final = PackName(LEASE, 7)

ODD_NAN: Final = struct.unpack(">d", bytes.fromhex("7ff4000000abcdef"))[0]

CANONICAL: Final[list[Any]] = [
    None,
    False,
    True,
    *(0, 1, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64),
    *(-1, -32, -33, -128, -129, -32768, -32769, -(2**31), -(2**31) - 1, -(2**63), -(2**63) - 1),
    *(2**127, -(2**127), 2**128, 3**200),
    *(0.0, -0.0, 1.0, 0.1, 1e-320, math.inf, -math.inf, math.nan, ODD_NAN),
    *("", "a", "a" * 31, "a" * 32, "ä€🙂", "\ud800lone", "a" * 256),
    *(b"", b"\x00", b"\xff" * 255, b"\x01" * 256),
    [],
    [1, [2, [3, []]]],
    list(range(16)),
    {},
    {"b": 1, "a": 2},
    {"a": 2, "b": 1},
    {True: "true", "1": "text", b"1": "bytes"},
    {1: "int"},
    {1.0: "float"},
    {None: 0, -1: 1, 2**70: 2, Tagged(5, b"key"): 3},
    {str(i): i for i in range(16)},
    *(Tagged(2, b""), Tagged(3, b"x"), Tagged(4, b"x" * 3), Tagged(127, b"x" * 16), Tagged(0, b"x" * 300)),
    {"nested": [Tagged(9, b"in"), {"deep": [1.5, b"bytes", None]}]},
]

CHUNK: Final = b"The quick brown fox jumps over the lazy dog. "
ZEROS: Final = bytes(4096)
NEAR: Final = CHUNK.replace(b"quick", b"slick")
CHUNK_ID: Final = object_id(Kind.CHUNK, CHUNK)
LIST: Final = pack_object([(Kind.CHUNK, CHUNK_ID)] * 5, b"\xc0")
LIST_ID: Final = object_id(Kind.CHUNK_LIST, LIST)
TREE: Final = pack_object([(Kind.CHUNK_LIST, LIST_ID), (Kind.CHUNK, CHUNK_ID)], b"\x93\x01\x02\x03")
TREE_ID: Final = object_id(Kind.TREE, TREE)
PARENT_ID: Final = ObjectId(bytes(range(32)))
COMMIT: Final = pack_object([(Kind.TREE, TREE_ID), (Kind.COMMIT, PARENT_ID)], b"\x81\xa1m\xa5hello")
COMMIT_ID: Final = object_id(Kind.COMMIT, COMMIT)
LONG_TREE: Final = pack_object([(Kind.CHUNK, CHUNK_ID)] * 20, b"\xc0")
LONG_COMMIT: Final = pack_object([(Kind.TREE, TREE_ID), (Kind.COMMIT, TREE_ID)], b"\xd9\xc8" + b"again" * 40)
EMPTY: Final = pack_object([], b"")

PAYLOADS: Final[dict[str, tuple[Kind, bytes]]] = {
    "chunk": (Kind.CHUNK, CHUNK),
    "empty chunk": (Kind.CHUNK, b""),
    "zeros": (Kind.CHUNK, ZEROS),
    "chunk list": (Kind.CHUNK_LIST, LIST),
    "tree": (Kind.TREE, TREE),
    "commit": (Kind.COMMIT, COMMIT),
    "long tree": (Kind.TREE, LONG_TREE),
    "long commit": (Kind.COMMIT, LONG_COMMIT),
    "empty object": (Kind.TREE, EMPTY),
}
"""One payload of every kind; each is frozen as a raw record, and where it shrinks as a zstd one."""


def raw_frames() -> dict[str, Frame]:
    """Every payload as a plain uncompressed record, and one difference with a synthetic codec."""
    frames = {
        name: make_frame(
            kind, object_id(kind, payload), 0, 4 if name == "zeros" else 1, len(payload), payload
        )
        for name, (kind, payload) in PAYLOADS.items()
    }
    return {**frames, "difference": delta_frame(NEAR, CHUNK)}


def pack_bytes() -> bytes:
    """A whole pack of all raw frames."""
    data = b""
    entries = []
    for frame in raw_frames().values():
        header = frame.header
        entries.append(
            Entry(
                len(data),
                header.kind,
                header.codec,
                header.element_size,
                header.raw,
                header.stored,
                header.id,
                header.base,
            )
        )
        data += header.pack() + bytes(frame.payload)
    return data + pack_footer(entries, PACK, len(data))


FORMATS: Final = [
    Format(
        repository="7c53c0c0-edb4-470a-b5a1-c3315dcf2e91",
        index="5e16bbfd-ab3c-4ee5-b0ac-f9b3e0e02fe3",
        lmdb=0,
        grid=1,
    ),
    Format(
        repository="7c53c0c0-edb4-470a-b5a1-c3315dcf2e91",
        index="5e16bbfd-ab3c-4ee5-b0ac-f9b3e0e02fe3",
        lmdb=0,
        grid=1,
        write=("future-write",),
        gc=("future-gc", "other"),
    ),
]

JOURNAL: Final = [
    LogEntry(1, 1_700_000_000_000_000_000, "ann@host", "init", (Move("HEAD", None, "refs/heads/main"),)),
    LogEntry(
        2,
        1_700_000_001_000_000_000,
        "ann@host",
        "commit: first",
        (Move("refs/heads/main", None, COMMIT_ID),),
        {"stored": 12345, "ratio": 0.25, "name": "ä"},
    ),
    LogEntry(
        3,
        -1,
        "",
        "fork",
        (Move("refs/heads/x", None, PARENT_ID), Move("HEAD", "refs/heads/main", "refs/heads/x")),
    ),
    LogEntry(4, 4, "b", "delete", (Move("refs/heads/x", PARENT_ID, None),)),
    LogEntry(5, 5, "b", "checkout", (Move("HEAD", "refs/heads/x", COMMIT_ID),)),
    LogEntry(6, 6, "b", "note", (Note(COMMIT_ID, "eval/loss", 0.125), Note(COMMIT_ID, "n", 3))),
    LogEntry(7, 7, "b", "note", (Note(COMMIT_ID, "text", "good"), Note(COMMIT_ID, "flag", True))),
    LogEntry(8, 8, "b", "note", (Note(COMMIT_ID, "n", None),)),
    LogEntry(9, 9, "b", "pin", (Pin(COMMIT_ID, True),)),
    LogEntry(10, 10, "b", "pin", (Pin(COMMIT_ID, False), Pin(PARENT_ID, True))),
    LogEntry(11, 11, "b", "retention", (Drop(COMMIT_ID, ("optimizer", "rng")), Drop(PARENT_ID, ()))),
    LogEntry(12, 12, "b", "status", (Status("main", "running"), Status("x", "failed"))),
    LogEntry(13, 13, "b", "status", (Status("x", None),)),
    LogEntry(14, 14, "b", "expire", (Expire(3),)),
    LogEntry(15, 15, "b", "nothing", ()),
    LogEntry(16, 16, "b", "fork", (Fork("x", PARENT_ID, {"optimizer.lr": 3e-4, "l": [1, None, "t"]}),)),
    LogEntry(17, 17, "b", "fork", (Fork("x", None, {}),)),
]

ROWS: Final = [
    Row(Kind.CHUNK, 0, 4, 0, 4096, 4096, 0, PACK),
    Row(Kind.CHUNK, XOR, 1, 3, 45, 45, 2**40 + 1, PACK, CHUNK_ID),
    Row(Kind.COMMIT, 1, 1, 0, 71, 70, 104, PackName(LEASE, 2**32 - 1), None, True),
]

HEADERS: Final[list[Header]] = [frame.header for frame in raw_frames().values()]


def encoded_commit() -> bytes:
    """A commit with every field."""
    return encode_commit(
        tree=TREE_ID,
        parents=[PARENT_ID, object_id(Kind.COMMIT, b"other")],
        origin=PARENT_ID,
        author="me@host",
        time=1_700_000_000_000_000_000,
        message="first line\nsecond",
        step=100,
        epoch=1.5,
        metrics={"val_loss": 0.25, "n": 3},
        config={"lr": 0.1, "layers": [1, {"x": None}]},
        overrides={"lr": 0.2},
        environment={"host": "h"},
        sizes={"model": 10, "": 2},
    )


# -- numbers --------------------------------------------------------------------------------------


def _words(dtype: str, count: int) -> np.ndarray[Any, Any]:
    """Numbers that need no generator, the same for ever: a walk over the low bits, and the special values."""
    kind = np.dtype(dtype)
    at = np.arange(count, dtype="<u8")
    mixed = (at * 0x9E3779B97F4A7C15) ^ (at * 0xC2B2AE3D27D4EB4F >> 29)
    return (mixed >> (64 - 8 * kind.itemsize)).astype(f"<u{kind.itemsize}")


def _floats(size: int, count: int) -> np.ndarray[Any, Any]:
    """Words whose exponents lie close together, with zeros, infinities, NaN and denormals among them."""
    mantissa = {2: 7, 4: 23, 8: 52}[size]
    words = _words(f"<u{size}", count)
    exponent = {2: 120, 4: 120, 8: 1015}[size] + (np.arange(count) % 5)
    words = (words & ((1 << mantissa) - 1)) | (exponent.astype(words.dtype) << mantissa)
    top = {2: 255, 4: 255, 8: 2047}[size]
    special = [0, 1 << (8 * size - 1), 1, top << mantissa, (top << mantissa) + 1, (1 << mantissa) - 1]
    words[: 6 * 7 : 7] = np.array(special, words.dtype)
    return words


def number_records() -> dict[str, bytes]:
    """Records of the codecs for numbers, each with its raw bytes and its base: `<name>.<part>`."""
    made: dict[str, bytes] = {}

    def add(name: str, words: Any, payload: bytes, base: Any = None) -> None:
        raw = words.tobytes()
        number = codec.PLANES if base is None else codec.DIFFERENCE
        base_id = None if base is None else chunk_id(base.tobytes())
        size = words.dtype.itemsize
        frame = make_frame(Kind.CHUNK, chunk_id(raw), number, size, len(raw), payload, base_id)
        made[f"{name}.record"] = frame.header.pack() + payload
        made[f"{name}.raw"] = raw
        if base is not None:
            made[f"{name}.base"] = base.tobytes()

    for size in (1, 2, 4, 8):
        sparse = np.zeros(300, f"<u{size}")
        sparse[::20] = _words(f"<u{size}", 15)
        add(f"sparse-{size}", sparse, planes.encode(sparse))
        holes = np.zeros(300, f"<u{size}")
        holes[70:90] = _words(f"<u{size}", 20)
        add(f"holes-{size}", holes, planes.encode(holes))
        same = np.full(300, 0x7B, f"<u{size}")
        add(f"constant-{size}", same, planes.encode(same))
        near = _words(f"<u{size}", 300)
        add(f"difference-{size}", near + np.uint8(3), difference.encode(near + np.uint8(3), near), near)
    for name, size in (("bfloat16", 2), ("float32", 4), ("float64", 8)):
        floats = _floats(size, 300)
        add(f"bytes-{size}", floats, planes.encode(floats, True, planes.BYTES))
        add(f"wide-{size}", floats, planes.encode(floats, False, planes.WIDE))
        kind = difference.format_of(name)
        add(f"scaled-{size}", floats ^ 1, difference.encode(floats ^ 1, floats, 0.875, kind), floats)
    return made


def forms(records: dict[str, bytes]) -> dict[str, bytes]:
    """The first bytes of each payload, which say in what way it is stored."""
    return {name: data[104:106] for name, data in records.items() if name.endswith(".record")}


BUNDLES: Final = {
    "self-contained": Bundle(
        name=PackName(LEASE, 8),
        repository="01234567-89ab-cdef-0123-456789abcdef",
        root=PARENT_ID,
        ref="refs/heads/main",
        tip=None,
        lost=False,
        tags=(),
        status=None,
        base=None,
        packs=(BundledPack(PACK, 1 << 33, 70_000, bytes(range(16))),),
        time=1_700_000_000_000_000_000,
        who="ada@example",
        why="commit: first",
    ),
    "on a base": Bundle(
        name=PackName(LEASE, 1 << 20),
        repository="01234567-89ab-cdef-0123-456789abcdef",
        root=TREE_ID,
        ref="refs/heads/exp/lr-\u00fc",
        tip=PARENT_ID,
        lost=True,
        tags=("refs/tags/v1", "refs/tags/v2"),
        status="finished",
        base=PARENT_ID,
        packs=(BundledPack(PACK, 68, 0, bytes(16)), BundledPack(PackName(LEASE, 9), 300, 2, b"\xff" * 16)),
        time=0,
        who="",
        why="",
        info={"given": 10, "stored": 4, "share": 0.5, "text": "x", "flag": True, "none": None},
    ),
}
