"""Every parser of bytes that others wrote, as a function of bytes: what it may answer, and what follows.

A target takes any bytes. It raises nothing for what its parser refuses in the way that is documented, and
anything else for a violation: an error of another class, or a value that does not encode to the bytes it was
decoded from where the encoding is canonical.

Checksums would stop nearly every mutation at the door. So a target takes what a checksum covers and puts the
right one there itself (`_sealed_*`); that wrong ones are refused is shown by `tests/crash/test_faults.py`.
"""

from __future__ import annotations

import base64
import contextlib
import io
import pickle
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ckptvcs import canonical
from ckptvcs.canonical import NotCanonicalError
from ckptvcs.config import Config, seconds_of
from ckptvcs.errors import CkptError, CorruptionError, FormatError, InvalidError
from ckptvcs.history import refs, revision
from ckptvcs.history.commit import decode_commit
from ckptvcs.ids import Kind, ObjectId, digest, object_id
from ckptvcs.state import files, paths, tree
from ckptvcs.state.formats.layout import File, TensorSource
from ckptvcs.state.formats.pickled import OddError, described
from ckptvcs.state.formats.recognise import recognise
from ckptvcs.store import codec
from ckptvcs.store.format import (
    HEADER_BYTES,
    TRAILER_BYTES,
    TRAILER_MAGIC,
    Entry,
    Format,
    Header,
    PackName,
    Trailer,
    pack_footer,
    pack_object,
    unpack_footer,
    unpack_object,
)
from ckptvcs.store.index import Row
from ckptvcs.store.journal import Journal, LogEntry
from ckptvcs.store.packs import PackFile
from ckptvcs.testing.memory import MemoryStore
from ckptvcs.testing.same import difference

GOLDEN: Final = Path(__file__).parents[1] / "golden"
_LARGEST: Final = 1 << 20
"""Bytes that a target makes of its input at most, where the input says how many."""


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        check: judges one input.
        seeds: inputs to begin with, most of them from the golden files.
    """

    check: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


TARGETS: Final[dict[str, Target]] = {}


def _target(seeds: Callable[[], list[bytes]]) -> Callable[[Callable[[bytes], None]], None]:
    def add(check: Callable[[bytes], None]) -> None:
        TARGETS[check.__name__.strip("_").replace("_", "-")] = Target(check, seeds)

    return add


def golden(name: str) -> list[bytes]:
    """The values of a golden file of lines that end in hex."""
    return [bytes.fromhex(line.rpartition("\t")[2]) for line in (GOLDEN / name).read_text().splitlines()]


class _Held:
    """A disk whose one file is held in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def open(self, path: Path) -> _Held:
        return self

    def read(self, offset: Any, length: int = -1) -> bytes:
        return self._data if isinstance(offset, Path) else self._data[offset : offset + length]

    def read_into(self, buffer: memoryview, offset: int) -> int:
        data = self._data[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        return len(data)

    def append(self, path: Path) -> _Held:
        return _HeldForWriting(self._data)

    def size(self) -> int:
        return len(self._data)

    def __enter__(self) -> _Held:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def lock(self) -> None:
        pass

    close = lock


class _HeldForWriting(_Held):
    @property
    def size(self) -> Any:
        return len(self._data)


def _disk(data: bytes) -> Any:
    return _Held(data)


# -- the store ------------------------------------------------------------------------------------


@_target(lambda: golden("canonical.hex"))
def _canonical(data: bytes) -> None:
    try:
        value = canonical.decode(data)
    except NotCanonicalError:
        return
    assert canonical.encode(value) == data


@_target(lambda: [record[:100] for record in _records()])
def _header(data: bytes) -> None:
    sealed = data[: HEADER_BYTES - 4] + zlib.crc32(data[: HEADER_BYTES - 4]).to_bytes(4, "little")
    try:
        found = Header.unpack(sealed, "fuzz", 0)
    except (CorruptionError, FormatError):
        return
    reserved = bytes(3)  # is not interpreted
    again = found.pack()
    assert again[:9] + reserved + again[12:100] == sealed[:9] + reserved + sealed[12:100]


def _records() -> list[bytes]:
    return [*golden("records-raw.hex"), *golden("records-zstd.hex"), *golden("records-numbers.hex")]


@_target(lambda: [row[:-4] for row in golden("rows.hex")])
def _row(data: bytes) -> None:
    sealed = data + zlib.crc32(data).to_bytes(4, "little")
    try:
        found = Row.decode(bytes(32), sealed)
    except CorruptionError:
        return
    assert found.encode() == sealed


_PACK: Final = PackName(bytes(range(16)), 7)


def _footers() -> list[bytes]:
    whole = (GOLDEN / "pack.bin").read_bytes()
    trailer = Trailer.unpack(whole[-TRAILER_BYTES:], "golden", len(whole))
    body = whole[trailer.footer_offset : -TRAILER_BYTES]
    return [trailer.records.to_bytes(4, "little") + trailer.footer_offset.to_bytes(8, "little") + body]


@_target(_footers)
def _footer(data: bytes) -> None:
    """Number of records, offset of the footer, entries."""
    count, end, body = int.from_bytes(data[:4], "little"), int.from_bytes(data[4:12], "little"), data[12:]
    try:
        entries = unpack_footer(body, Trailer(count, end, len(body), _PACK, digest(body)), "fuzz")
    except CorruptionError:
        return
    assert pack_footer(entries, _PACK, end)[:-TRAILER_BYTES] == body


def _sealed_pack(data: bytes) -> bytes:
    """With the right checksums in every header, payload and trailer, as far as they lie inside."""
    pack = bytearray(data)
    at = pack.find(b"CKR\x01")
    while 0 <= at <= len(pack) - HEADER_BYTES:
        stored = int.from_bytes(pack[at + 16 : at + 20], "little")
        pack[at + 84 : at + 100] = digest(pack[at + HEADER_BYTES : at + HEADER_BYTES + stored])
        pack[at + 100 : at + 104] = zlib.crc32(pack[at : at + 100]).to_bytes(4, "little")
        at = pack.find(b"CKR\x01", at + 1)
    start = len(pack) - TRAILER_BYTES
    if start >= 0 and pack[start : start + 8] == TRAILER_MAGIC:
        offset, size = (int.from_bytes(pack[start + at : start + at + 8], "little") for at in (12, 20))
        pack[start + 48 : start + 64] = digest(pack[offset : offset + size])
        pack[start + 64 :] = zlib.crc32(pack[start : start + 64]).to_bytes(4, "little")
    return bytes(pack)


@_target(lambda: [(GOLDEN / "pack.bin").read_bytes(), *(r for r in _records() if len(r) < 2000)])
def _pack(data: bytes) -> None:
    """Whatever a pack holds: its footer and a scan name records that lie inside it."""
    for whole in (data, _sealed_pack(data)):
        pack = PackFile(_disk(whole), Path("fuzz.pack"))
        found: list[Entry] = []
        with contextlib.suppress(CorruptionError):
            found = pack.entries()
        scanned = list(pack.scan())
        for entry in scanned:
            header = pack.header(entry.offset)
            assert len(pack.payload(header, entry.offset)) == header.stored == entry.stored
        for entry in found:
            with contextlib.suppress(CorruptionError, FormatError):
                header, payload = pack.record(
                    entry.offset, entry.stored, lambda size: memoryview(bytearray(size))
                )
                assert len(payload) == header.stored


@_target(lambda: [bytes([r[6], r[7]]) + r[12:16] + r[104:] for r in _records() if r[12:16] < b"\0\0\2\0"])
def _codecs(data: bytes) -> None:
    """Codec, element size, raw length, payload. The base is as long as the chunk, as the reader sees to."""
    number, element, raw = data[:1], data[1:2], int.from_bytes(data[2:6], "little")
    if not number or raw > _LARGEST:
        return
    into = bytearray(bytes(range(256)) * (raw // 256 + 1))[:raw]
    base = memoryview(into) if number[0] == codec.DIFFERENCE else None
    with contextlib.suppress(CorruptionError, FormatError):
        codec.decode(number[0], data[6:], memoryview(into), element[0] if element else 0, base, "fuzz")
    assert len(into) == raw


@_target(lambda: golden("objects.hex"))
def _object(data: bytes) -> None:
    try:
        references, body = unpack_object(data, "fuzz")
    except CorruptionError:
        return
    assert pack_object(references, bytes(body)) == data


# -- the journal and the small files ----------------------------------------------------------------


def _journal_lines() -> list[bytes]:
    return (GOLDEN / "refs.journal").read_bytes().splitlines()


@_target(lambda: [base64.b64decode(line.split(b" ")[2]) for line in _journal_lines()])
def _entry(data: bytes) -> None:
    try:
        entry = LogEntry.decode(1, data)
    except CorruptionError:
        return
    assert entry.encode() == data


def _sealed_journal(data: bytes) -> bytes:
    lines = []
    for line in data.split(b"\n"):
        parts = line.split(b" ")
        with contextlib.suppress(ValueError, IndexError):
            parts[1] = digest(parts[0] + b" " + base64.b64decode(parts[2], validate=True)).hex().encode()
        lines.append(b" ".join(parts))
    return b"\n".join(lines)


@_target(lambda: [(GOLDEN / "refs.journal").read_bytes(), b"\n".join(_journal_lines()[:3]), b""])
def _journal(data: bytes) -> None:
    """What it gives stands in it, in order and without a gap."""
    for whole in (data, _sealed_journal(data)):
        journal = Journal(_disk(whole), Path("refs.journal"))
        with contextlib.suppress(CorruptionError):
            entries = list(journal.entries(lambda _: None))
            assert [entry.position for entry in entries] == list(range(1, len(entries) + 1))
            for line, entry in zip(whole.split(b"\n"), entries, strict=False):
                assert base64.b64decode(line.split(b" ")[2]) == entry.encode()
        assert 0 <= journal.last_position() < 1 << 63


def _formats() -> list[bytes]:
    return [(GOLDEN / f"format-{number}.txt").read_bytes() for number in (0, 1)]


@_target(_formats)
def _format(data: bytes) -> None:
    lines = data.split(b"\n")
    if len(lines) > 2:
        lines[2] = digest(lines[1]).hex().encode()
    for whole in (data, b"\n".join(lines)):
        with contextlib.suppress(CorruptionError, FormatError):
            found = Format.unpack(whole, "fuzz")
            assert Format.unpack(found.pack(), "again") == found


_SETTINGS: Final = [
    b'author = "ada"\ncompression = "small"\nenvironment = false\n',
    b'[gc]\ngrace = "7d"\n\n[metric.val_loss]\nmode = "min"\n',
    b'gc.grace = 3600 # seconds\nmetric."a.b/c".mode = "max"\nunknown = [1, {x = 2}]\n',
]


@_target(lambda: list(_SETTINGS))
def _config(data: bytes) -> None:
    try:
        config = Config(data.decode(errors="surrogateescape"))
    except InvalidError:
        return
    for key in config.items():
        config.get(key)
    with contextlib.suppress(InvalidError):
        again = Config(config.with_value("compression", "fast"))
        assert again.get("compression") == "fast"
        assert again.get("author") == config.get("author")


_TEXTS: Final = [
    "main",
    "exp/lr3e-4",
    "HEAD~3^2",
    "main@{1}",
    "v1@step:100",
    "a@best:val_loss~2",
    "24h",
    "1.5d",
]
_TEXTS.extend(
    ["optimizer/**", "layers/*/weight", "0", "1e3", "7w", "lost/main/0123abcd", "a/b.lock", "@{-1}"]
)


@_target(lambda: [text.encode() for text in _TEXTS])
def _texts(data: bytes) -> None:
    """Names, revisions, durations and patterns."""
    text = data.decode(errors="surrogateescape")
    readers: list[Callable[[str], object]] = [
        lambda text: refs.check_name(text, "branch"),
        revision._split,
        seconds_of,
        lambda text: paths.Patterns(text).start(),
    ]
    for read in readers:
        with contextlib.suppress(InvalidError):
            read(text)


# -- commits and trees ------------------------------------------------------------------------------


@_target(lambda: golden("commit.hex"))
def _commit(data: bytes) -> None:
    id = object_id(Kind.COMMIT, data)
    with contextlib.suppress(CorruptionError):
        commit = decode_commit(id, data)
        assert commit.id == id
        assert commit.title == commit.message.split("\n")[0]


def _tree_lines() -> list[tuple[str, str, bytes]]:
    lines = (GOLDEN / "trees.hex").read_text().splitlines()
    return [(name, kind, bytes.fromhex(text)) for name, kind, text in (line.split("\t") for line in lines)]


def _trees() -> list[bytes]:
    return [payload for _, kind, payload in _tree_lines() if kind == Kind.TREE.label]


class _Around(MemoryStore):
    """The objects of all golden trees, for a mutated one to refer to, and the same bytes for all chunks."""

    def __init__(self) -> None:
        super().__init__()
        kinds = {kind.label: kind for kind in Kind}
        for _, kind, payload in _tree_lines():
            if kind != "root":
                self.records[kinds[kind], object_id(kinds[kind], payload)] = payload

    def read_into(self, requests: Any) -> None:
        for _, buffer in requests:
            size = len(buffer)
            buffer[:] = (bytes(range(251)) * (size // 251 + 1))[:size]


_AROUND: Final = _Around()


@_target(_trees)
def _tree(data: bytes) -> None:
    """A tree's object: what is read can be written, and what is written reads the same."""
    id = object_id(Kind.TREE, data)
    _AROUND.records[Kind.TREE, id] = data
    try:
        _read_tree(id)
    finally:
        if data not in _trees_known():
            del _AROUND.records[Kind.TREE, id]


_known: set[bytes] = set()


def _trees_known() -> set[bytes]:
    if not _known:
        _known.update(_trees())
    return _known


def _read_tree(id: ObjectId) -> None:
    with contextlib.suppress(CkptError):
        list(tree.entries(_AROUND, id))
        tree.sizes(_AROUND, id)
    with contextlib.suppress(CkptError):
        tree.held(_AROUND, id)
    with contextlib.suppress(CkptError):
        if sum(entry.size for entry in files.entries(_AROUND, id)) < _LARGEST:
            files.contents(_AROUND, id)
    try:
        if sum(entry.nbytes for entry in tree.entries(_AROUND, id)) > _LARGEST:
            return
        value = tree.read(_AROUND, id)
    except CkptError:
        return
    store = MemoryStore()
    written = tree.write(store, value)
    assert difference(value, tree.read(store, written.tree)) is None


# -- files of other tools ---------------------------------------------------------------------------


def _layout(data: bytes) -> None:
    """Recognised or not, without an error; and what is recognised can be read."""
    reads = 0

    def read(offset: int, length: int) -> bytes:
        nonlocal reads
        reads += 1
        assert offset >= 0
        assert length >= 0
        return data[offset : offset + length]

    file = File(len(data), read)
    found = recognise(file)
    if found is None:
        return
    for tensor in found.tensors:
        if tensor.spec.nbytes < _LARGEST:
            assert len(TensorSource(file, tensor).read(0, tensor.spec.nbytes)) == tensor.spec.nbytes
    assert sum(part.spec.nbytes for part in found.parts) <= len(data)


def _safetensors() -> list[bytes]:
    from tests.unit.checkpoint_files import safetensors

    return [safetensors({"w": np.ones((3, 5), "f4"), "b": np.arange(3)}, {"format": "pt"}), safetensors({})]


@_target(_safetensors)
def _safetensors_file(data: bytes) -> None:
    header = data[8:]
    end = header.find(b"}}") + 2
    _layout(data)
    _layout(end.to_bytes(8, "little") + header)


def _arrays() -> list[bytes]:
    def npy(array: Any) -> bytes:
        out = io.BytesIO()
        np.save(out, array)
        return out.getvalue()

    return [npy(np.ones((3, 4), "<f4")), npy(np.asfortranarray(np.ones((3, 4), ">i8"))), npy(np.array(1.5))]


@_target(_arrays)
def _npy_file(data: bytes) -> None:
    _layout(data)
    _layout(_zipped({"a.npy": data, "b.npy": data[:200]}))


def _archives() -> list[bytes]:
    pickled = _pickles()[0]
    return [
        _zipped({"a.npy": _arrays()[0], "b.npy": _arrays()[1]}),
        _zipped(
            {"a/data.pkl": pickled, "a/byteorder": b"little", "a/data/0": bytes(400), "a/version": b"3\n"}
        ),
    ]


def _zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()


@_target(_archives)
def _archive(data: bytes) -> None:
    _layout(data)


def _pickles() -> list[bytes]:
    import torch

    out = io.BytesIO()
    weight = torch.ones(10, 10)
    state = {"w": weight, "view": weight.t()[2:, 3:], "n": 1, "text": "x", "deep": [(1, {2: None})]}
    torch.save({"model": state, "parameter": torch.nn.Parameter(weight)}, out)
    with zipfile.ZipFile(out) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith("data.pkl"))
        whole = archive.read(name)
    plain = {"a": [1, 2.5, "x", b"y", None, True, (1, 2)], "b": 2**70, 3: {"c": np.float64(1.5)}}
    return [whole, *(pickle.dumps(plain, protocol=protocol) for protocol in range(2, 6))]


@_target(_pickles)
def _pickle(data: bytes) -> None:
    """A pickle is a description: nothing in it is run, and it ends."""
    with contextlib.suppress(OddError):
        described(data)
    _layout(
        _zipped(
            {
                "a/data.pkl": data,
                "a/byteorder": b"little",
                "a/version": b"3",
                "a/data/0": bytes(400),
                "a/data/1": b"x",
            }
        )
    )
