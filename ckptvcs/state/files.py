"""Files and folders <-> the files part of a tree, byte-exact.

A file keeps its bytes, permission bits and the BLAKE3 of the whole; a symbolic link its target, which is
never followed. Empty folders are not kept, as in git. Nothing a repository says is joined into a path
unchecked: every step below the destination goes through `disk.Folder`.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np

from ckptvcs.disk import Disk, Folder, ReadFile, StrPath, check_name, check_target
from ckptvcs.errors import (
    CkptError,
    ConflictError,
    CorruptionError,
    InvalidError,
    NotFoundError,
    StorageError,
)
from ckptvcs.ids import Buffer, Hasher, ObjectId, chunk_id
from ckptvcs.state import codes
from ckptvcs.state import tree as trees
from ckptvcs.state.build import FileContent, LinkContent, TensorContent
from ckptvcs.state.build import Folder as StoredFolder
from ckptvcs.state.formats.layout import File, Layout, Tensor, TensorSource
from ckptvcs.state.formats.recognise import recognise
from ckptvcs.state.interface import ObjectReader
from ckptvcs.state.materialise import Filler, memory_for, resolve
from ckptvcs.state.read import Content, StoredFile, StoredLink, StoredTensor, TensorInFile
from ckptvcs.state.tensors import ArraySource, Raw, raw_dtype, swap
from ckptvcs.store.format import FOLDER

_log = logging.getLogger("ckptvcs")
_PERMISSIONS: Final = 0o777
"""Without setuid, setgid and sticky, which no checkout may bring back."""
_CHUNKS_AT_ONCE: Final = 16
_SMALL: Final = 256
"""A tensor of so many bytes is not worth an entry of its own, and stays in what lies around it."""
_TURNED: Final = 256 << 20
"""A tensor of a file that is not in C order is held in memory whole if it has at most so many bytes."""
_PIECE: Final = 1 << 20
"""Bytes hashed at a time; a multiple of no grid, only a buffer size."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A stored file or link, without its content.

    Attributes:
        path: names joined by "/"; bytes that are no UTF-8 as lone surrogates.
        kind: "file" or "link".
        size: bytes; 0 for a link.
        mode: permission bits; 0 for a link.
        digest: BLAKE3 of the whole file; empty for a link.
        target: where a link points; None for a file.
    """

    path: str
    kind: str
    size: int
    mode: int
    digest: bytes
    target: str | None


@dataclass(slots=True)
class WriteReport:
    """What `write_out` did, by path."""

    written: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)


@dataclass(slots=True)
class FileStatus:
    """How files in a folder compare with stored ones, by path."""

    modified: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)


# -- storing --------------------------------------------------------------------------------------


class _Ranges:
    """Stretches of a file as if they followed each other, read again when asked, and refused if they are no
    longer what was hashed.

    `add` them in the order of the file while it is hashed; then `read`.
    """

    element_size = 1

    def __init__(self, path: Path) -> None:
        self._path = path
        self.nbytes = 0
        self._starts: list[int] = []  # in this source, of each stretch
        self._offsets: list[int] = []  # in the file
        self._pieces: list[ObjectId] = []
        self._open = bytearray()

    def add(self, offset: int, data: bytes) -> None:
        """The bytes that lie at `offset` in the file."""
        if not self._offsets or self._offsets[-1] + self.nbytes - self._starts[-1] != offset:
            self._starts.append(self.nbytes)
            self._offsets.append(offset)
        self.nbytes += len(data)
        if not self._open and len(data) == _PIECE:
            self._pieces.append(chunk_id(data))
            return
        self._open += data
        while len(self._open) >= _PIECE:
            self._pieces.append(chunk_id(memoryview(self._open)[:_PIECE]))
            self._open = self._open[_PIECE:]

    def close(self) -> None:
        """No more is added."""
        if self._open:
            self._pieces.append(chunk_id(self._open))
            self._open = bytearray()

    def read(self, offset: int, length: int) -> bytes:
        # Opened for each read: a folder may hold more files than a process may have open.
        parts = []
        end = offset + length
        try:
            with ReadFile(self._path) as file:
                at = bisect.bisect_right(self._starts, offset) - 1
                while offset < end:
                    last = self._starts[at + 1] if at + 1 < len(self._starts) else self.nbytes
                    part = file.read(self._offsets[at] + offset - self._starts[at], min(last, end) - offset)
                    if len(part) != min(last, end) - offset:
                        raise _changed(self._path)
                    parts.append(part)
                    offset += len(part)
                    at += 1
        except FileNotFoundError:
            raise _changed(self._path) from None
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self._check(end - length, data)
        return data

    def _check(self, offset: int, data: bytes) -> None:
        """Compare each whole piece in `data` with what was hashed."""
        end = offset + len(data)
        for at in range(-(-offset // _PIECE), len(self._pieces)):
            begin, behind = at * _PIECE, min((at + 1) * _PIECE, self.nbytes)
            if behind > end:
                break
            piece = (
                data
                if (begin, behind) == (offset, end)
                else memoryview(data)[begin - offset : behind - offset]
            )
            if chunk_id(piece) != self._pieces[at]:
                raise _changed(self._path)


class _Budget:
    """How many tensors the files of a commit may have. A tree has a limit, at which no file may make a commit
    fail."""

    def __init__(self) -> None:
        self._left = codes.MAX_VALUES // 4

    def take(self, layout: Layout | None) -> list[Tensor]:
        """The tensors of a file that are stored as such: none if there are too many."""
        parts = [] if layout is None else [_manageable(p) for p in layout.parts if p.spec.nbytes > _SMALL]
        if len(parts) > self._left:
            return []
        self._left -= len(parts)
        return parts


def _manageable(part: Tensor) -> Tensor:
    """The tensor, or if it would have to be turned around in memory and is too large for that, what it looks
    like to someone who reads it in the order of the file."""
    order = part.order
    if order is None or part.spec.nbytes <= _TURNED:
        return part
    shape = tuple(part.spec.shape[axis] for axis in order)
    return replace(part, spec=replace(part.spec, shape=shape), strides=None)


def _changed(path: Path) -> InvalidError:
    return InvalidError(
        f"{path} was changed while it was being committed", hint="commit again", code="state-changed"
    )


def collected(disk: Disk, paths: Mapping[str, StrPath]) -> StoredFolder:
    """Files and folders to store, by the path they get in the tree.

    Hashes every file. NotFoundError for a path that is not there; InvalidError for an impossible tree
    path, for sockets, devices and the like, all of them listed, and if there is no file or link at all.
    """
    root: dict[str, object] = {}
    odd: list[tuple[str, str]] = []
    budget = _Budget()
    for name, source in paths.items():
        steps = _steps(name)
        path = _source(source)
        try:
            folder = Folder.open(path.parent if path.name else path)
        except FileNotFoundError:
            raise NotFoundError(f"there is no file {path}") from None
        except StorageError as error:
            if error.errno != errno.ENOTDIR:
                raise
            raise NotFoundError(f"there is no file {path}") from None
        with contextlib.closing(folder):
            content = (
                _collect(disk, folder, path.name, name, odd, budget)
                if path.name
                else _collect_folder(disk, folder, name, odd, budget)
            )
        if content is None:
            continue
        for step in reversed(steps):
            content = {step: content}
        if not isinstance(content, dict):
            raise InvalidError(f"{name!r} is no name for a file", hint="give the file a name of its own")
        _merge(root, content, "")
    if odd:
        listed = "; ".join(f"{name}: {why}" for name, why in odd)
        raise InvalidError(
            f"{len(odd)} of the paths cannot be stored: {listed}",
            hint="leave them out",
            code="unsupported-leaf",
        )
    if not _holds_files(root):
        listed = ", ".join(map(str, paths.values())) or "no path"
        raise InvalidError(
            f"nothing to commit: there is no file in {listed}",
            hint="empty folders are not kept, and repositories are left out",
        )
    return _sorted(root)


def _source(source: StrPath) -> Path:
    """The path to read from. One that has no name of its own (`.`, `..`) is spelled out."""
    path = Path(source)
    if "\0" in str(path):
        raise InvalidError(f"{str(path)!r} cannot be the path of a file")
    return path.resolve() if path.name in ("", "..") else path


def _holds_files(folder: Mapping[str, object]) -> bool:
    return any(_holds_files(each) if isinstance(each, dict) else True for each in folder.values())


def _merge(into: dict[str, object], more: Mapping[str, object], above: str) -> None:
    """Add files and folders to those that are there. The same file twice is fine, two are not."""
    for name, content in more.items():
        there = into.setdefault(name, content)
        if isinstance(there, dict) and isinstance(content, dict):
            if there is not content:
                _merge(there, content, f"{above}{name}/")
        elif _identity(there) != _identity(content):
            raise InvalidError(
                f"two different things would be stored as {above + name!r}",
                hint="give each a path of its own",
            )


def _identity(content: object) -> object:
    if isinstance(content, FileContent):
        return content.size, content.mode, content.digest
    return content.target if isinstance(content, LinkContent) else None


def attached(disk: Disk, files: Mapping[str, StrPath]) -> StoredFolder:
    """The `files=` of a commit, as `collected`."""
    for name in files:
        if not _steps(name):
            raise InvalidError(f"{name!r} cannot be the path of an attached file")
    return collected(disk, files) if files else {}


def _steps(name: object) -> list[str]:
    """A tree path's names, each checked to be one ordinary step."""
    if not isinstance(name, str):
        raise InvalidError(f"{name!r} cannot be a path in a commit: it is a {type(name).__name__}")
    steps = [step for step in name.split("/") if step not in ("", ".")]
    if name.startswith("/") or ".." in steps:
        raise InvalidError(f"{name!r} cannot be a path in a commit", hint="use a relative path without ..")
    for step in steps:
        why = _objection(step)
        if why is not None:
            raise InvalidError(f"{name!r} cannot be a path in a commit: {why}")
    return steps


def _objection(step: str) -> str | None:
    """Why a name may not stand in a tree of files."""
    if step.casefold() == FOLDER:
        return f"the name {FOLDER} is the repository's own"
    try:
        check_name(step)
    except StorageError as error:
        return str(error)
    return None


def _collect(
    disk: Disk, folder: Folder, name: str, shown: str, odd: list[tuple[str, str]], budget: _Budget
) -> FileContent | LinkContent | dict[str, object] | None:
    kind = folder.kind(name)
    if kind is None:
        raise NotFoundError(f"there is no file {folder.path / name}")
    if name.casefold() == FOLDER:
        if kind != "folder":
            odd.append((shown, f"the name {FOLDER} is the repository's own"))
        return None
    if kind == "link":
        return LinkContent(folder.read_link(name))
    if kind == "file":
        return _hashed(folder, name, budget)
    if kind == "folder":
        with contextlib.closing(folder.enter(name)) as inner:
            return _collect_folder(disk, inner, shown, odd, budget)
    odd.append((shown, "a socket, pipe or device is no file"))
    return None


def _collect_folder(
    disk: Disk, folder: Folder, shown: str, odd: list[tuple[str, str]], budget: _Budget
) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in folder.names():
        content = _collect(disk, folder, name, f"{shown}/{name}", odd, budget)
        if content is not None:
            found[name] = content
    return found


def _hashed(folder: Folder, name: str, budget: _Budget) -> FileContent:
    size, mode = _stat(folder, name)
    path = (folder.path / name).absolute()
    with folder.open_file(name) as file:
        layout = _layout(file, size) if size > _SMALL else None
        parts = budget.take(layout)
        whole, rest = Hasher(), _Ranges(path)
        tensors: list[TensorContent] = []
        end = 0
        for part in parts:
            before = _hash(file, end, part.offset, whole, rest)
            end = part.offset + part.spec.nbytes
            ranges = _Ranges(path)
            _hash(file, part.offset, end, whole, ranges)
            ranges.close()
            source = TensorSource(File(ranges.nbytes, ranges.read), replace(part, offset=0))
            tensors.append(TensorContent(part.name, before, part.spec, part.order, source))
        _hash(file, end, size, whole, rest)
        rest.close()
    format = layout.format if layout is not None and tensors else ""
    return FileContent(
        size, mode, bytes(whole.id()), 0, [rest] if rest.nbytes else [], format, tuple(tensors)
    )


def _layout(file: ReadFile, size: int) -> Layout | None:
    """Where tensors lie in a file; None if that is not known."""
    try:
        return recognise(File(size, file.read))
    except (CkptError, OSError):
        raise
    except Exception:  # noqa: BLE001
        # A checkpoint must not be lost to a case that no parser thought of.
        _log.warning("%s could not be looked into, and is stored as plain bytes", file.path, exc_info=True)
        return None


def _hash(file: ReadFile, start: int, end: int, whole: Hasher, into: _Ranges) -> int:
    """Hash bytes [start, end) of a file, which are there; their number."""
    at = start
    while at < end:
        piece = file.read(at, min(_PIECE, end - at))
        if not piece:
            raise _changed(file.path)
        whole.update(piece)
        into.add(at, piece)
        at += len(piece)
    return end - start


def _stat(folder: Folder, name: str) -> tuple[int, int]:
    """(size, permission bits)."""
    size, mode = folder.stat(name)
    return size, mode & _PERMISSIONS


def _sorted(folder: Mapping[str, object]) -> StoredFolder:
    """Names in order, whatever the order of the call, so that equal files give an equal tree."""
    ordered: dict[str, FileContent | LinkContent | StoredFolder] = {}
    for name in sorted(folder):
        content = folder[name]
        if isinstance(content, dict):
            ordered[name] = _sorted(content)
        elif isinstance(content, (FileContent, LinkContent)):
            ordered[name] = content
    return ordered


# -- reading --------------------------------------------------------------------------------------


def entries(
    reader: ObjectReader,
    tree: ObjectId,
    only: str | Sequence[str] | None = None,
    without: Sequence[str] = (),
) -> Iterator[FileEntry]:
    """The files of a tree, without reading their content. Components in `without` are not looked at."""
    for path, stored in trees.files(reader, tree, only, without).items():
        yield _entry_of(path, stored)


def contents(
    reader: ObjectReader, tree: ObjectId, only: str | Sequence[str] | None = None
) -> dict[str, bytes]:
    """The bytes of every file by path; of a link, its target's."""
    stored = trees.files(reader, tree, only)
    _check_paths(stored)
    found = {}
    for path, item in stored.items():
        if isinstance(item, StoredLink):
            found[path] = item.target.encode(errors="surrogateescape")
        else:
            with memory_for(path, item.size):
                found[path] = b"".join(_pieces(reader, path, item))
    return found


def _pieces(reader: ObjectReader, path: str, stored: StoredFile) -> Iterator[Buffer]:
    """A file's bytes, some chunks at a time, the whole checked against its hash at the end."""
    whole = Hasher()
    for piece in _file_order(reader, path, stored):
        whole.update(piece)
        yield piece
    if whole.id() != stored.digest:
        raise CorruptionError(f"the file {path} does not have the content its entry states")


def _file_order(reader: ObjectReader, path: str, stored: StoredFile) -> Iterator[Buffer]:
    rest = _Stream(_in_chunks(reader, stored.content))
    for group in _groups(stored.tensors, _CHUNKS_AT_ONCE * reader.grid.chunk):
        first = group[0].tensor
        if len(group) == 1 and first.order is None:
            yield from rest.take(group[0].before)
            for piece in _in_chunks(reader, first.content):
                yield from _as_in_file(first, piece)
            continue
        # Small tensors are read many at once, and one in another order than C's whole.
        with memory_for(path, sum(each.tensor.spec.nbytes for each in group)):
            buffers = [bytearray(each.tensor.spec.nbytes) for each in group]
        filler = Filler(reader)
        for each, buffer in zip(group, buffers, strict=True):
            filler.add_flat(each.tensor.content, memoryview(buffer))
        filler.run()
        for each, buffer in zip(group, buffers, strict=True):
            yield from rest.take(each.before)
            yield from _as_in_file(each.tensor, buffer)
    yield from rest.take(None)


def _groups(tensors: Sequence[TensorInFile], most: int) -> Iterator[list[TensorInFile]]:
    """Tensors that follow each other and together have no more than so many bytes; larger ones alone."""
    group: list[TensorInFile] = []
    size = 0
    for each in tensors:
        nbytes = each.tensor.spec.nbytes
        if group and size + nbytes > most:
            yield group
            group, size = [], 0
        group.append(each)
        size += nbytes
    if group:
        yield group


def _as_in_file(tensor: StoredTensor, data: bytearray) -> Iterator[Buffer]:
    """C-ordered little-endian bytes as they lie in the file: of a tensor in C order some, else all."""
    spec = tensor.spec
    if tensor.order is None:
        if spec.swap:
            swap(memoryview(data), spec.swap)
        yield data
        return
    raw: Raw = np.ndarray(spec.shape, raw_dtype(spec.item), data).transpose(tensor.order)
    source = ArraySource(raw, spec.item, spec.swap)
    for start in range(0, spec.nbytes, _PIECE):
        yield source.read(start, min(_PIECE, spec.nbytes - start))


def _in_chunks(reader: ObjectReader, content: Content) -> Iterator[bytearray]:
    """Content, some chunks at a time. Each piece is the caller's."""
    if content.inline is not None:
        yield bytearray(content.inline)
        return
    # Chunks are as long as the grid says, except where a splitter made them: then their number decides.
    resolve(reader, [content])
    ids = content.chunks or ()
    left = content.nbytes
    for start in range(0, len(ids), _CHUNKS_AT_ONCE):
        part = ids[start : start + _CHUNKS_AT_ONCE]
        buffer = bytearray(min(left, len(part) * reader.grid.chunk))
        reader.read_into([(part, memoryview(buffer))])
        left -= len(buffer)
        yield buffer


class _Stream:
    """Pieces one after the other, taken in other lengths than they come."""

    def __init__(self, pieces: Iterator[bytearray]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")

    def take(self, length: int | None) -> Iterator[Buffer]:
        """The next so many bytes; None for all that are left."""
        while length is None or length:
            if not self._left:
                piece = next(self._pieces, None)
                if piece is None:
                    if length is None:
                        return
                    raise CorruptionError("a file's content is shorter than its entry states")
                self._left = memoryview(piece)
            part = self._left[:length]
            self._left = self._left[len(part) :]
            length = None if length is None else length - len(part)
            yield part


def write_out(
    reader: ObjectReader,
    tree: ObjectId,
    to: Path,
    *,
    only: str | Sequence[str] | None = None,
    force: bool = False,
    base: Mapping[str, FileEntry] | None = None,
    say: Callable[[str], None] | None = None,
) -> WriteReport:
    """Put a tree's files below `to`, which is made if missing.

    A file that is there with other content than the tree's is overwritten only if it still is what
    `base` says (the commit the folder came from), or with `force`; otherwise ConflictError lists all of
    them and nothing is written. A file where the tree has a folder, and an empty folder where it has a
    file, go only with `force`; a folder that holds something, and a link in place of a folder, never.
    Each file appears whole or not at all.
    """
    stored = trees.files(reader, tree, only)
    _check_paths(stored)
    report = WriteReport()
    base = base or {}
    with contextlib.closing(Folder.open(to, create=True)) as root:
        changed = []
        in_the_way: dict[str, str] = {}
        for path, item in stored.items():
            state = _compare(root, path, _entry_of(path, item))
            if state == "same":
                report.unchanged.append(path)
            elif state == "other" and not force:
                known = base.get(path)
                if known is None or _compare(root, path, known) != "same":
                    changed.append(path)
            elif state == "other":
                in_the_way |= _in_the_way(root, path)
        immovable = [path for path, kind in in_the_way.items() if kind not in ("file", "empty folder")]
        if immovable:
            raise ConflictError(
                f"{len(immovable)} path(s) in {to} are in the way: {_listed(immovable)}",
                hint="move them away",
            )
        if changed:
            raise ConflictError(
                f"{len(changed)} file(s) in {to} would be overwritten: {_listed(changed)}",
                hint="commit or move them away, or use --force",
            )
        for path, kind in in_the_way.items():
            with _folder_of(root, path) as (folder, name):
                folder.remove(name) if kind == "file" else folder.remove_folder(name)
        same = set(report.unchanged)
        for path, item in stored.items():
            if path in same:
                continue
            with _folder_of(root, path) as (folder, name):
                if isinstance(item, StoredLink):
                    folder.write_link(name, item.target)
                else:
                    with folder.writing(name, item.mode) as file:
                        for piece in _pieces(reader, path, item):
                            file.write([piece])
                folder.sync()
            report.written.append(path)
            if say is not None:
                say(path)
    return report


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:10]) + (" and more" if len(paths) > 10 else "")


@contextlib.contextmanager
def _folder_of(root: Folder, path: str) -> Iterator[tuple[Folder, str]]:
    """The folder that a path lies in, made if missing, and its name there."""
    *folders, name = path.split("/")
    with contextlib.ExitStack() as stack:
        folder = root
        for step in folders:
            folder = stack.enter_context(folder.enter(step, create=True))
        yield folder, name


def _check_paths(stored: Mapping[str, StoredFile | StoredLink]) -> None:
    """Refuse a tree with any path or link that no commit would hold, before anything is written."""
    for path, item in stored.items():
        steps = path.split("/")
        for step in steps:
            why = _objection(step)
            if why is not None:
                raise CorruptionError(f"the commit holds the path {path!r}: {why}")
        for end in range(1, len(steps)):
            above = "/".join(steps[:end])
            if above in stored:
                raise CorruptionError(f"the commit holds {above!r} both as a file and as a folder")
        if isinstance(item, StoredLink):
            try:
                check_target(item.target)
            except StorageError as error:
                raise CorruptionError(f"the commit holds the link {path!r}: {error}") from None


def status(reader: ObjectReader, tree: ObjectId, folder: Path) -> FileStatus:
    """How the files below `folder` compare with the tree's."""
    found = FileStatus()
    with contextlib.closing(Folder.open(folder)) as root:
        for entry in entries(reader, tree):
            state = _compare(root, entry.path, entry)
            {"same": found.unchanged, "other": found.modified, "missing": found.missing}[state].append(
                entry.path
            )
    return found


def _entry_of(path: str, stored: StoredFile | StoredLink) -> FileEntry:
    if isinstance(stored, StoredLink):
        return FileEntry(path, "link", 0, 0, b"", stored.target)
    return FileEntry(path, "file", stored.size, stored.mode & _PERMISSIONS, stored.digest, None)


def _in_the_way(root: Folder, path: str) -> dict[str, str]:
    """What must go before a file can be put at `path`, and its kind, if anything must."""
    steps = path.split("/")
    with contextlib.ExitStack() as stack:
        folder = root
        for end, step in enumerate(steps, 1):
            kind = folder.kind(step)
            if kind == "folder":
                folder = stack.enter_context(folder.enter(step))
            elif end < len(steps) and kind is not None:
                return {"/".join(steps[:end]): kind}
            else:
                return {}
        return {path: "folder" if folder.names() else "empty folder"}


def _compare(root: Folder, path: str, entry: FileEntry) -> str:
    """'same', 'other' or 'missing'. A folder or symlink in the way counts as 'other'."""
    *folders, name = path.split("/")
    with contextlib.ExitStack() as stack:
        folder = root
        for step in folders:
            kind = folder.kind(step)
            if kind is None:
                return "missing"
            if kind != "folder":
                return "other"
            folder = stack.enter_context(folder.enter(step))
        kind = folder.kind(name)
        if kind is None:
            return "missing"
        if kind != entry.kind:
            return "other"
        if kind == "link":
            return "same" if folder.read_link(name) == entry.target else "other"
        size, mode = _stat(folder, name)
        if size != entry.size or mode != entry.mode:
            return "other"
        whole, done = Hasher(), 0
        with folder.open_file(name) as file:
            while done < size:
                piece = file.read(done, _PIECE)
                if not piece:
                    break
                whole.update(piece)
                done += len(piece)
        return "same" if whole.id() == entry.digest else "other"
