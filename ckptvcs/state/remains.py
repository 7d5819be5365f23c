"""What of a tree is left when components of it are dropped.

A tree object cannot lose a part, since its id is the hash of all of it. So the objects that hold top-level
entries stay, *alone*: without a claim on all that they name. What the entries that stay refer to is left
*whole*, with everything below it. Where a tree has another form than `codes` describes, more is left, never
less.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Final, NamedTuple

from ckptvcs.canonical import NotCanonicalError, Tagged, decode
from ckptvcs.errors import CorruptionError
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.state import codes, paths
from ckptvcs.state.build import MAX_COMPONENTS
from ckptvcs.state.interface import ObjectReader
from ckptvcs.store.format import unpack_object


class Remains(NamedTuple):
    """What is left of a tree.

    Attributes:
        alone: trees that must be there, though not all that they refer to.
        whole: what must be there with everything below it.
    """

    alone: frozenset[ObjectId]
    whole: frozenset[tuple[Kind, ObjectId]]


def remains(reader: ObjectReader, tree: ObjectId, dropped: Collection[str]) -> Remains:
    """What is left of a tree without these components (`Written.sizes`); a name that it lacks drops nothing.

    Reads the objects that hold top-level entries and no others. CorruptionError if one of them is damaged
    or missing.
    """
    left = _Left(reader, frozenset(dropped))
    left.take(tree)
    return Remains(frozenset(left.alone), frozenset(left.whole))


_MAPS: Final = {codes.ORDERED_DICT: 0, codes.DEFAULT_DICT: 1}
"""Where the map is among the fields of a dict of another class."""

_CONTAINERS: Final = frozenset(
    {codes.TUPLE, codes.NAMEDTUPLE, codes.ORDERED_DICT, codes.DEFAULT_DICT, codes.COUNTER, codes.SUBTREE}
)
"""What may be a component of its own among many entries."""

_DATA: Final = {codes.TENSOR: 5, codes.BLOB: 2, codes.FILE: 4, codes.TENSOR_FILE: 4}
"""Where the data is among the fields."""

_LEAVES: Final = frozenset(
    {codes.NUMPY_DTYPE, codes.NUMPY_SCALAR, codes.NUMPY_GENERATOR, codes.RANDOM, codes.PATH, codes.ZONEINFO}
)


class _Object:
    """A tree object: what it refers to, and its body."""

    def __init__(self, reader: ObjectReader, id: ObjectId) -> None:
        where = f"tree {id.short}"
        self.references, body = unpack_object(reader.objects(Kind.TREE, [id])[0], where)
        try:
            self.body = decode(bytes(body))
        except NotCanonicalError as error:
            raise CorruptionError(f"{where}: {error}", id=str(id)) from None


class _Left:
    def __init__(self, reader: ObjectReader, dropped: frozenset[str]) -> None:
        self._reader = reader
        self._dropped = dropped
        self.alone: set[ObjectId] = set()
        self.whole: set[tuple[Kind, ObjectId]] = set()

    def take(self, tree: ObjectId) -> None:
        """Take what is left of a root."""
        root = _Object(self._reader, tree)
        self.alone.add(tree)
        try:
            if type(root.body) is not Tagged or root.body.code != codes.ROOT:
                raise _UnknownFormError
            for part, value in decode(root.body.payload).items():
                self._part(part, value, root)
        except (_UnknownFormError, NotCanonicalError, AttributeError, LookupError, TypeError):
            self.whole.update(root.references)

    def _part(self, part: str, value: Any, home: _Object) -> None:
        entries = value
        if part == "state" and type(value) is Tagged and value.code in _MAPS:
            fields = decode(value.payload)
            entries = fields.pop(_MAPS[value.code])
            self._keep(fields, home)
        elif part == "state" and type(value) is Tagged and value.code == codes.COUNTER:
            entries = decode(value.payload)
        pages = list(self._pages(entries, home))
        if not all(type(page) is dict for page, _ in pages):
            # A state that is no dict is one component, "".
            if "" not in self._dropped or part != "state":
                self._keep(value, home)
            return
        few = sum(len(page) for page, _ in pages) <= MAX_COMPONENTS
        for page, object in pages:
            for key, child in page.items():
                name = key if part == "files" else _component(key, child, few)
                if name not in self._dropped:
                    self._keep(child, object)

    def _pages(self, value: Any, home: _Object) -> Iterator[tuple[Any, _Object]]:
        """The values, each with its object, that together are one container; what leads to them is taken."""
        if type(value) is not Tagged or value.code not in (codes.SUBTREE, codes.MAP_PAGES, codes.LIST_PAGES):
            yield value, home
            return
        payload = decode(value.payload)
        for position in [payload] if value.code == codes.SUBTREE else payload[1]:
            kind, id = _reference(home, position)
            if kind is not Kind.TREE:
                raise _UnknownFormError
            self.alone.add(id)
            below = _Object(self._reader, id)
            yield from self._pages(below.body, below)

    def _keep(self, value: Any, home: _Object) -> None:
        for position in _positions(value):
            self.whole.add(_reference(home, position))


class _UnknownFormError(Exception):
    """The tree has another form than expected."""


def _component(key: Any, child: Any, few: bool) -> str | None:
    """The component that a top-level entry belongs to; None if that is not known."""
    if type(key) is Tagged:
        return None
    container = type(child) in (list, dict) or (type(child) is Tagged and child.code in _CONTAINERS)
    return paths.name(key) if few or container else ""


def _reference(home: _Object, position: Any) -> tuple[Kind, ObjectId]:
    if type(position) is not int or not 0 <= position < len(home.references):
        raise _UnknownFormError
    return home.references[position]


def _positions(value: Any) -> Iterator[Any]:
    """The positions in the reference table that an encoded node names. Keys name none."""
    if type(value) is list:
        for item in value:
            yield from _positions(item)
    elif type(value) is dict:
        for item in value.values():
            yield from _positions(item)
    elif type(value) is Tagged and value.code not in _LEAVES:
        payload = decode(value.payload)
        if value.code == codes.SUBTREE:
            yield payload
        elif value.code in (codes.MAP_PAGES, codes.LIST_PAGES):
            yield from payload[1]
        elif value.code in _DATA:
            data = payload.pop(_DATA[value.code])
            if type(data) is dict:
                yield data["list"]
            elif type(data) is list:
                yield from data
            if value.code == codes.TENSOR_FILE:
                yield from _positions(payload)
        else:
            yield from _positions(payload)
