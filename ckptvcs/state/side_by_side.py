"""Trees as sides of a comparison: names, shapes and ids, and bytes on demand.

Of two trees, whatever both refer to by one id at one place is left unread, whole subtrees at a time. No chunk
is read here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeVar

from ckptvcs.canonical import encode
from ckptvcs.errors import CorruptionError, NotFoundError
from ckptvcs.ids import ObjectId
from ckptvcs.state import generators, paths
from ckptvcs.state.build import flat_encoding
from ckptvcs.state.checkpoint import Checkpoint, Dense, Read
from ckptvcs.state.compare import Change, Opaque, Value
from ckptvcs.state.interface import ObjectReader
from ckptvcs.state.materialise import resolve
from ckptvcs.state.parameters import parameter_names
from ckptvcs.state.read import (
    Branch,
    Compound,
    Content,
    Loader,
    Stored,
    StoredBlob,
    StoredFile,
    StoredLeaf,
    StoredLink,
    StoredRandom,
    StoredTensor,
    StoredTorch,
    StoredTree,
    shared_trees,
)
from ckptvcs.state.streams import Stream
from ckptvcs.state.tree import above, load, refuse_deep

_DIGITS: Final = re.compile(r"\d+")
_PREVIEW: Final = 60
_PLAIN: Final = (type(None), bool, int, float, str)

_T = TypeVar("_T")


def _nothing() -> Checkpoint:
    return Checkpoint(Path("the commit"), "commit")


@dataclass(slots=True)
class Sides:
    """Two trees to be compared.

    Attributes:
        old, new: what they hold that is not the same by its id.
        changes: what differs and is neither tensor, value nor file.
        unread: subtrees that are the same in both, and were not read.
    """

    old: Checkpoint = field(default_factory=_nothing)
    new: Checkpoint = field(default_factory=_nothing)
    changes: list[Change] = field(default_factory=list)
    unread: int = 0


@refuse_deep
def contents(reader: ObjectReader, tree: ObjectId) -> Checkpoint:
    """One tree as a side. Tensors in files are under the path of the file followed by theirs."""
    loader = Loader(reader)
    opened, parts = loader.root(tree)
    found = _nothing()
    walk = _Walk(reader, Sides(new=found), whole_files=False)
    for part in parts.values():
        walk.put(found, "", loader.node(part, opened, paths.EVERYTHING))
    walk.name_parameters(found, tree)
    return found


@refuse_deep
def sides(
    reader: ObjectReader, old: ObjectId, new: ObjectId, only: str | Sequence[str] | None = None
) -> Sides:
    """Two trees, without what is the same by its id. `only` selects a part of both (`paths`); NotFoundError
    if a pattern matches nothing in either."""
    found = Sides()
    if old == new:
        _check(reader, [old], only)
        found.unread = 1
        return found
    try:
        apart = shared_trees(reader, old, new)
    except CorruptionError:
        # A part may have been dropped that is not selected. If it is, reading it says so.
        apart = set()
    loaders = Loader(reader, apart), Loader(reader, apart)
    roots = loaders[0].root(old), loaders[1].root(new)
    walk = _Walk(reader, found)
    # One object for both sides: a pattern has matched if it has in either.
    patterns = paths.Patterns(only)
    for part in ("state", "files"):
        nodes: list[Stored | None] = []
        for loader, (opened, parts) in zip(loaders, roots, strict=True):
            selection = patterns.start()
            node = loader.node(parts[part], opened, selection) if part in parts else None
            nothing = isinstance(node, Branch) and not node.children and not selection.whole
            nodes.append(None if nothing else node)
        walk.both("", nodes[0], nodes[1], files=part == "files")
    if not patterns.complete:
        _check(reader, (old, new), only)
    for side, tree in ((found.old, old), (found.new, new)):
        walk.name_parameters(side, tree)
    return found


def _check(reader: ObjectReader, trees: Sequence[ObjectId], only: str | Sequence[str] | None) -> None:
    """A pattern that was not seen to match may be about what was left unread."""
    if only is None:
        return
    known: list[str] = []
    for tree in trees:
        loader = Loader(reader)
        opened, parts = loader.root(tree)
        for part in parts.values():
            known += _names("", loader.node(part, opened, paths.EVERYTHING))
    for pattern in [only] if isinstance(only, str) else only or ():
        if not any(map(paths.matcher(pattern), known)):
            raise paths.unmatched([pattern], known, "these commits")


def _names(path: str, node: Stored) -> Iterator[str]:
    if isinstance(node, Branch):
        for key, child in zip(node.keys, node.children, strict=True):
            below = paths.join(path, paths.name(key))
            yield below
            yield from _names(below, child)


class _Walk:
    """Goes through two trees at once."""

    def __init__(self, reader: ObjectReader, found: Sides, whole_files: bool = True) -> None:
        """`whole_files`: files that hold tensors are compared as a whole as well, by their hashes."""
        self._reader = reader
        self._whole_files = whole_files
        self._found = found

    def both(self, path: str, old: Stored | None, new: Stored | None, files: bool = False) -> None:
        """What lies at one path of both."""
        if isinstance(old, StoredTree) and isinstance(new, StoredTree) and old.id == new.id:
            self._found.unread += 1
            return
        old, new = _selected(old), _selected(new)
        if not isinstance(old, Branch) or not isinstance(new, Branch) or _whole(old) or _whole(new):
            for side, node in ((self._found.old, old), (self._found.new, new)):
                if node is not None:
                    self.put(side, path, node)
            return
        one, other = _about(old), _about(new)
        if one != other:
            self._found.changes.append(Change("type", path, one, other))
        shared = {key.id for key in old.keys if isinstance(key, StoredTree)}
        shared &= {key.id for key in new.keys if isinstance(key, StoredTree)}
        self._found.unread += len(shared)
        before, after = dict(_entries(old, shared)), dict(_entries(new, shared))
        if not shared and before.keys() == after.keys() and list(before) != list(after):
            one, other = (Opaque("order", tuple(e), "entries in another order") for e in (before, after))
            self._found.changes.append(Change("layout", path, one, other))
        if files:
            before = _renumbered(before, after)
        for key in {**before, **after}:
            self.both(paths.join(path, key), before.get(key), after.get(key), files)

    def put(self, side: Checkpoint, path: str, node: Stored) -> None:
        """What only one of them has, or the other has as something else."""
        node = _loaded(node)
        if isinstance(node, StoredTensor):
            side.tensors[path] = self._dense(node)
        elif isinstance(node, StoredFile):
            if self._whole_files or not node.tensors:
                side.others[path] = self._file(node)
            for each in node.tensors:
                side.tensors[paths.join(path, each.name)] = self._dense(each.tensor)
        elif isinstance(node, Branch) and not _whole(node):
            for key, child in _entries(node, set()):
                self.put(side, paths.join(path, key), child)
        else:
            side.leaves[path] = value_of(node)

    def _dense(self, node: StoredTensor) -> Dense:
        spec, alias = node.spec, node.alias
        place = None if alias is None else (alias.offset, alias.strides)
        return Dense(
            spec.dtype,
            spec.shape,
            spec.item,
            spec.nbytes,
            functools.partial(_opened, self._reader, node.content),
            identity_of(node.content),
            functools.partial(_cells, self._reader, node.content),
            self._reader.grid.chunk,
            (spec.framework, spec.flags, None if node.order is None else tuple(node.order), place),
        )

    def _file(self, node: StoredFile) -> Dense:
        """A file as a whole, told from others by its hash. Only one without tensors can be read."""
        return Dense(
            "bytes",
            (node.size,),
            1,
            node.size,
            functools.partial(_opened, self._reader, node.content),
            node.digest,
            lambda: (node.digest,) if node.size else (),
            max(1, node.size),
            (node.mode,),
        )

    def name_parameters(self, side: Checkpoint, tree: ObjectId) -> None:
        """Say of an optimizer's tensors which parameter they belong to, where it is known."""
        if not any("state" in paths.split(path) for path in side.tensors):
            return
        try:
            names = parameter_names(load(self._reader, tree))
        except (NotFoundError, CorruptionError):  # files only; or a part was dropped, and names only help
            return
        for path, tensor in side.tensors.items() if names else ():
            side.tensors[path] = replace(tensor, parameter=above(path, names))


def _loaded(node: Stored) -> Stored:
    while isinstance(node, StoredTree):
        node = node.load()
    return node


def _selected(node: Stored | None) -> Stored | None:
    """A node, loaded; None if nothing in it is selected. What is a tree of its own is never empty."""
    if not isinstance(node, StoredTree):
        return node
    found = _loaded(node)
    return found if not isinstance(found, Branch) or found.children else None


def _whole(node: Branch) -> bool:
    """Whether a container has no entries, and so is a value."""
    return not node.children


def _about(node: Branch) -> Opaque:
    text = node.kind
    if isinstance(node, Compound):
        shape = f"[{', '.join(map(str, node.shape))}]"
        return Opaque(node.kind, (node.dtype, node.shape, node.about), f"{text} {node.dtype}{shape}")
    return Opaque(node.kind, None, text)


def _entries(node: Branch, without: set[ObjectId]) -> Iterator[tuple[str, Stored]]:
    """Name and value of each entry, those in trees that were left apart and are not in `without` included."""
    for key, child in zip(node.keys, node.children, strict=True):
        if not isinstance(key, StoredTree):
            yield paths.name(key), child
        elif key.id not in without:
            page = _loaded(child)
            assert isinstance(page, Branch)
            yield from _entries(page, without)


def _renumbered(old: dict[str, Stored], new: dict[str, Stored]) -> dict[str, Stored]:
    """Files and folders called as in the new side, where only numbers in the name tell them apart."""
    lost, come = [name for name in old if name not in new], [name for name in new if name not in old]
    named = {}
    for name in lost:
        alike = [each for each in come if _DIGITS.sub("#", each) == _DIGITS.sub("#", name)]
        if len(alike) == 1 and sum(_DIGITS.sub("#", each) == _DIGITS.sub("#", name) for each in lost) == 1:
            named[name] = alike[0]
    return {named.get(name, name): node for name, node in old.items()}


def identity_of(content: Content) -> object:
    """What is equal for equal content, if anything is known without reading: never unequal for equal ids."""
    if content.inline is not None:
        return content.inline
    return content.chunks if content.chunks is not None else content.chunk_list


def _cells(reader: ObjectReader, content: Content) -> Sequence[object]:
    if content.inline is not None:
        return (content.inline,) if content.inline else ()
    resolve(reader, [content])
    assert content.chunks is not None
    return content.chunks


def _opened(reader: ObjectReader, content: Content) -> Read:
    stream = Stream(reader, content)
    return lambda offset, length: stream.read(offset, offset + length)


def value_of(node: Stored) -> Value:
    """A node that is no tensor, as what is compared and shown."""
    if isinstance(node, StoredLeaf):
        if type(node.value) in _PLAIN:
            plain: Value = node.value
            return plain
        return Opaque(node.kind, flat_encoding(node.value), _preview(repr(node.value)))
    if isinstance(node, StoredTorch):
        return Opaque(node.kind, (node.code, encode(node.plain)), _preview(str(node.plain)))
    if isinstance(node, StoredRandom):
        return Opaque(node.kind, encode(node.plain), generators.kind(node.code, node.plain))
    if isinstance(node, StoredLink):
        return Opaque(node.kind, node.target, f"link to {_preview(node.target)}")
    if isinstance(node, StoredBlob):
        return Opaque(node.kind, identity_of(node.content), f"{node.kind} of {node.content.nbytes:,} bytes")
    assert isinstance(node, Branch)
    made = node.make([], []) if node.kind == "bytearray" else None
    return Opaque(
        node.kind, made and bytes(made), f"empty {node.kind}" if made is None else _preview(repr(made))
    )


def _preview(text: str) -> str:
    return text if len(text) <= _PREVIEW else text[: _PREVIEW - 1] + "…"


def aligned(commit: Checkpoint, file: Checkpoint) -> tuple[Checkpoint, str]:
    """The part of a commit that a file is about, and below which path it lies: all of it if they have a
    tensor's path in common, else what is below the one where most of the file's are."""
    counts: dict[str, int] = {}
    for path in commit.tensors:
        names = path.split("/")
        for at in range(1, len(names)):
            if "/".join(names[at:]) in file.tensors:
                head = "/".join(names[:at])
                counts[head] = counts.get(head, 0) + 1
    if not counts or commit.tensors.keys() & file.tensors.keys():
        return commit, ""
    prefix = max(counts, key=lambda head: counts[head])

    def part(found: dict[str, _T]) -> dict[str, _T]:
        start = prefix + "/"
        return {path.removeprefix(start): each for path, each in found.items() if path.startswith(start)}

    found = replace(
        commit, tensors=part(commit.tensors), leaves=part(commit.leaves), others=part(commit.others)
    )
    return found, prefix
