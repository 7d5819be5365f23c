"""Checkpoint files and folders of them, opened to be looked at: names, shapes, dtypes, and bytes on demand.

No repository is needed, no framework, and nothing from a file runs. Opening reads headers alone. In a folder,
names begin with the file they are in; the shards of one model (`model-00001-of-00004.safetensors`) count as
one file, since how a model was cut says nothing about it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

from ckptvcs.disk import Disk
from ckptvcs.errors import InvalidError, NotFoundError
from ckptvcs.ids import Buffer
from ckptvcs.state import paths
from ckptvcs.state.formats.layout import File, Layout, TensorSource
from ckptvcs.state.formats.recognise import recognise
from ckptvcs.store.format import FOLDER

_SHARD: Final = re.compile(r"-\d{5,6}-of-\d{5,6}(?=\.)")

Read: TypeAlias = Callable[[int, int], Buffer]
"""`read(offset, length)`: bytes of a tensor in C order and little endian."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A tensor that can be read.

    Attributes:
        dtype: the dtype's stored name.
        shape: length of each dimension.
        item: bytes per element.
        nbytes: bytes of all elements.
        opened: gives a new reader of its bytes.
        identity: tensors of one identity have the same bytes; None if it says nothing.
        cells: ids of its pieces of `cell` bytes, equal for equal ones; None if there are none.
        cell: bytes of one of these pieces.
        layout: what else there is to it, such as its order in memory and flags; () if nothing is known.
        parameter: the parameter that it belongs to in an optimizer, where that is known, else "".
    """

    dtype: str
    shape: tuple[int, ...]
    item: int
    nbytes: int
    opened: Callable[[], Read]
    identity: object = None
    cells: Callable[[], Sequence[object]] | None = None
    cell: int = 0
    layout: tuple[object, ...] = ()
    parameter: str = ""


@dataclass(slots=True)
class Checkpoint:
    """What a file or folder holds, or a commit (`side_by_side`).

    Attributes:
        path: where it is; what it is called.
        format: "safetensors", "torch", "npz", "npy", "folder" or "commit".
        nbytes: bytes of all files.
        tensors: by path, in the order of the files.
        leaves: numbers and text beside the tensors, and metadata, by path: `layout.Plain`, or of a commit
            also `compare.Opaque`.
        others: files that hold no tensors that are understood, as plain bytes by name; in a folder only.
        files: format by name of those that are understood, shards together; in a folder only.
    """

    path: Path
    format: str
    nbytes: int = 0
    tensors: dict[str, Dense] = field(default_factory=dict)
    leaves: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Dense] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def open_checkpoint(disk: Disk, path: Path) -> Checkpoint:
    """Look into a file or folder.

    NotFoundError if there is nothing; InvalidError (code `unreadable-file`) for a file that is no checkpoint
    or is damaged, and for a folder without any.
    """
    if disk.is_dir(path):
        return _folder(disk, path)
    if not disk.is_file(path):
        if disk.exists(path):
            raise InvalidError(f"{path} is no file", code="unreadable-file")
        raise NotFoundError(f"there is no file {path}")
    layout, size = look(disk, path)
    if layout is None:
        raise InvalidError(
            f"{path} is no checkpoint file that can be read: of another kind, cut short or damaged",
            hint="safetensors, torch.save archives (since torch 1.6), .npz and .npy can be read",
            code="unreadable-file",
        )
    found = Checkpoint(path, layout.format, size)
    _add(found, disk, path, layout, "")
    return found


def look(disk: Disk, path: Path) -> tuple[Layout | None, int]:
    """The layout of a file, None if it is no checkpoint file; and its bytes."""
    with disk.open(path) as file:
        size = file.size()
        return recognise(File(size, file.read)), size


def _folder(disk: Disk, path: Path) -> Checkpoint:
    found = Checkpoint(path, "folder")
    for name, file in files_below(disk, path):
        layout, size = look(disk, file)
        found.nbytes += size
        if layout is None:
            found.others[name] = _opaque(disk, file, size)
        else:
            found.files[whole_name(name)] = layout.format
            _add(found, disk, file, layout, whole_name(name))
    if not found.tensors and not found.leaves:
        raise InvalidError(
            f"there is no checkpoint file in {path}",
            hint="safetensors, torch.save archives (since torch 1.6), .npz and .npy can be read",
            code="unreadable-file",
        )
    return found


def files_below(disk: Disk, folder: Path, above: str = "") -> Iterator[tuple[str, Path]]:
    """All files below a folder: (name with the folders it is in, path), in name order. Links to folders are
    not followed, and repositories are left out."""
    for name in disk.names(folder):
        path = folder / name
        if disk.is_dir(path):
            if name.casefold() != FOLDER and not path.is_symlink():
                yield from files_below(disk, path, f"{above}{name}/")
        elif disk.is_file(path):
            yield above + name, path


def whole_name(name: str) -> str:
    """A file's name without the number of a shard."""
    return _SHARD.sub("", name)


def _opaque(disk: Disk, path: Path, size: int) -> Dense:
    read = _reopening(disk, path)
    return Dense("bytes", (size,), 1, size, lambda: read)


def _prefix(name: str) -> str:
    return "/".join(paths.name(step) for step in name.split("/"))


def _add(found: Checkpoint, disk: Disk, path: Path, layout: Layout, above: str) -> None:
    prefix = _prefix(above) if above else ""
    file = File(0, _reopening(disk, path))
    for tensor in layout.tensors:
        spec = tensor.spec

        def opened(tensor: object = tensor) -> Read:
            return TensorSource(file, tensor).read  # type: ignore[arg-type]

        found.tensors[paths.join(prefix, tensor.name)] = Dense(
            spec.dtype, spec.shape, spec.item, spec.nbytes, opened
        )
    for name, value in layout.leaves.items():
        found.leaves[paths.join(prefix, name)] = value


def _reopening(disk: Disk, path: Path) -> Callable[[int, int], bytes]:
    """Reads a file that is opened for each piece: a folder may hold more files than a process may open."""

    def read(offset: int, length: int) -> bytes:
        with disk.open(path) as file:
            return file.read(offset, length)

    return read


def sides(old: Checkpoint, new: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Two checkpoints with comparable paths: of a folder that is compared with a file, the file of the same
    name, or the only one it has. InvalidError if that leaves a choice."""
    if (old.format == "folder") == (new.format == "folder"):
        return old, new
    if old.format == "folder":
        return _inside(old, new.path.name), new
    return old, _inside(new, old.path.name)


def _inside(folder: Checkpoint, name: str) -> Checkpoint:
    """One file of a folder, by the name it has there."""
    wanted = whole_name(name)
    if wanted not in folder.files and len(folder.files) == 1:
        (wanted,) = folder.files
    if wanted not in folder.files:
        raise InvalidError(
            f"{folder.path} has {len(folder.files)} checkpoint files, and the other side is one file",
            hint=f"name a file in it: {', '.join(list(folder.files)[:5])}",
        )
    prefix = f"{_prefix(wanted)}/"
    return Checkpoint(
        folder.path / wanted,
        folder.files[wanted],
        folder.nbytes,
        {path.removeprefix(prefix): each for path, each in folder.tensors.items() if path.startswith(prefix)},
        {path.removeprefix(prefix): each for path, each in folder.leaves.items() if path.startswith(prefix)},
    )


def selected(checkpoints: Sequence[Checkpoint], patterns: Sequence[str]) -> list[Checkpoint]:
    """What matches any of the patterns. NotFoundError for a pattern that matches nothing in any of them."""
    known = [
        path for each in checkpoints for part in (each.tensors, each.leaves, each.others) for path in part
    ]
    chosen = set()
    for pattern in patterns:
        matching = {path for path in known if paths.matches(pattern, path)}
        if not matching:
            raise paths.unmatched([pattern], known, " or ".join(str(each.path) for each in checkpoints))
        chosen |= matching
    return [
        replace(
            each,
            tensors={path: tensor for path, tensor in each.tensors.items() if path in chosen},
            leaves={path: value for path, value in each.leaves.items() if path in chosen},
            others={path: file for path, file in each.others.items() if path in chosen},
        )
        for each in checkpoints
    ]
