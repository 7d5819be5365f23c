"""Tree objects -> stored nodes.

A tree, or the part a selection touches, is decoded into `Stored` nodes without reading any chunk;
`materialise` reads their content. Trees are not trusted: whatever a commit would not write is a
CorruptionError, before memory is allocated for it.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from ckptvcs import canonical
from ckptvcs.canonical import NotCanonicalError, Tagged
from ckptvcs.errors import CorruptionError
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.state import codes, paths, torch_tensors, values
from ckptvcs.state.interface import ObjectReader
from ckptvcs.state.paths import Selection
from ckptvcs.state.tensors import (
    MAX_BYTES,
    MAX_DIMENSIONS,
    Alias,
    Spec,
    check_layout,
    item_size,
    numpy_dtype,
    restore_scalar,
)
from ckptvcs.store.format import unpack_object

_REPEATS: Final = 20_000
"""Trees share subtrees, so a small hostile one could unfold without end. After so many that were read
again, it is counted what the whole would unfold to."""


# -- what is stored -------------------------------------------------------------------------------


@dataclass(slots=True)
class Stored:
    """A value in a tree.

    Attributes:
        kind: the word for it: "int", "tensor", "dict"...
    """

    kind: str


@dataclass(slots=True)
class StoredLeaf(Stored):
    """A value that is read already."""

    value: Any
    nbytes: int = 0


@dataclass(slots=True)
class StoredTorch(Stored):
    """A torch.Size, dtype, device or constant: made when it is wanted, since that takes torch."""

    code: int
    plain: Any


@dataclass(slots=True)
class StoredRandom(Stored):
    """A random generator of Python or numpy: made anew each time it is wanted."""

    code: int
    plain: Any
    nbytes: int


@dataclass(slots=True)
class Content:
    """Where bytes are: inline, in chunks, or in the chunks of a chunk list. `cells` counts chunks."""

    nbytes: int
    inline: bytes | None = None
    chunks: tuple[ObjectId, ...] | None = None
    chunk_list: ObjectId | None = None
    cells: int | None = 0


@dataclass(slots=True)
class StoredTensor(Stored):
    """A dense tensor. `result` is set once it has been read."""

    spec: Spec
    order: list[int] | None
    alias: Alias | None
    content: Content
    result: Any = None


@dataclass(slots=True)
class StoredBlob(Stored):
    """Long text or bytes. `result` is set once it has been read."""

    content: Content
    result: Any = None


@dataclass(slots=True)
class TensorInFile:
    """A tensor in a file: its path there, and how much of the file's rest comes directly before it."""

    name: str
    before: int
    tensor: StoredTensor


@dataclass(slots=True)
class StoredFile(Stored):
    """A file. `content.chunks` follow each other; a splitter other than 0 made them of any length. Of a file
    that holds tensors, `content` is what lies around them."""

    size: int
    mode: int
    digest: bytes
    splitter: int
    content: Content
    format: str = ""
    tensors: list[TensorInFile] = field(default_factory=list)


@dataclass(slots=True)
class StoredLink(Stored):
    """A symbolic link."""

    target: str


@dataclass(slots=True)
class Branch(Stored):
    """A container. `make(keys, values)` builds the value from any part of its children."""

    keys: list[Any]
    children: list[Stored]
    make: Callable[[list[Any], list[Any]], Any]


@dataclass(slots=True)
class Compound(Branch):
    """A sparse or quantised tensor, one of a class of its own, or a generator: one value to people, several
    in the tree. Of a subclass the last child, under None, is its context, and `dtype` is its type's name."""

    dtype: str = ""
    shape: tuple[int, ...] = ()
    about: tuple[Any, ...] = ()
    """(layout, flags) of a sparse tensor, (scheme, flags, axis) of a quantised one, a generator's device."""


@dataclass(slots=True, eq=False)
class StoredTree(Stored):
    """A dict or list, or some entries of a dict, left in its tree (`Loader(apart=...)`). In place of
    entries it is the key as well. `load` gives what it holds."""

    id: ObjectId
    load: Callable[[], Stored]


@dataclass(slots=True)
class _Object:
    """A tree object being decoded, and the trees it refers to that have been fetched."""

    where: str
    references: list[tuple[Kind, ObjectId]]
    body: Any
    fetched: dict[ObjectId, bytes] = field(default_factory=dict)

    def reference(self, position: object, kind: Kind) -> ObjectId:
        if type(position) is not int or not 0 <= position < len(self.references):
            raise CorruptionError(f"{self.where}: a reference outside the table")
        found, id = self.references[position]
        if found is not kind:
            raise CorruptionError(f"{self.where}: a {found.label} where a {kind.label} belongs")
        return id


# -- decoding -------------------------------------------------------------------------------------


def _decode(data: bytes | memoryview, where: str) -> Any:
    try:
        return canonical.decode(data)
    except NotCanonicalError as error:
        raise CorruptionError(f"{where}: {error}") from None


_PLAIN: Final = {
    type(None): "none",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    bytes: "bytes",
}


class Loader:
    """Decodes trees."""

    def __init__(self, reader: ObjectReader, apart: Set[ObjectId] = frozenset()) -> None:
        """Trees in `apart` are left as `StoredTree`, where a dict or list of a state may be one."""
        self._reader = reader
        self._apart = set(apart)
        self._grid = grid = reader.grid
        # What is longer becomes pages, except in keys.
        self._longest = max(grid.subtree, 16 * grid.list_page, 8 * grid.map_page)
        self._in_keys = 0
        self._count = 0
        self._seen: set[ObjectId] = set()
        self._repeats = 0
        self._top: ObjectId | None = None

    def root(self, tree: ObjectId) -> tuple[_Object, dict[str, Any]]:
        """The root object and its parts ("state", "files"), undecoded."""
        self._top = tree
        opened = self._open(tree, self._reader.objects(Kind.TREE, [tree])[0])
        body = opened.body
        if type(body) is not Tagged or body.code != codes.ROOT:
            raise CorruptionError(f"{opened.where}: not the root of a tree")
        parts = _decode(body.payload, opened.where)
        if type(parts) is not dict or not parts.keys() <= {"state", "files"}:
            raise CorruptionError(f"{opened.where}: a root with unknown parts")
        return opened, parts

    # -- objects ----------------------------------------------------------------------------------

    def _open(self, id: ObjectId, payload: bytes) -> _Object:
        if id in self._seen:
            self._repeats += 1
            if self._repeats == _REPEATS:
                self._survey()
        self._seen.add(id)
        return _parsed(id, payload)

    def _survey(self) -> None:
        """Refuse a tree that unfolds to more than any state. Each object is looked at once."""
        assert self._top is not None
        known: dict[ObjectId, tuple[int, collections.Counter[ObjectId]]] = {}
        waiting = {self._top}
        together = 0
        while waiting:
            ids = [waiting.pop() for _ in range(min(len(waiting), _AT_ONCE))]
            for id, payload in zip(ids, self._reader.objects(Kind.TREE, ids), strict=True):
                known[id] = _census(_parsed(id, payload))
                together += known[id][0]
                waiting |= known[id][1].keys() - known.keys()
            if together > _MOST_COUNTED:
                raise _too_many(f"tree {self._top.short}")
        unfolded: dict[ObjectId, int] = {}
        stack = [self._top]  # no id is above itself, since ids are hashes
        while stack:
            own, below = known[stack[-1]]
            missing = [id for id in below if id not in unfolded]
            if missing:
                stack += missing
            else:
                unfolded[stack.pop()] = own + sum(times * unfolded[id] for id, times in below.items())
        if unfolded[self._top] > _MOST_COUNTED:
            raise _too_many(f"tree {self._top.short}")

    def _child(self, parent: _Object, position: object, ahead: bool) -> _Object:
        id = parent.reference(position, Kind.TREE)
        if id not in parent.fetched:
            wanted = [id]
            if ahead:  # everything is wanted: ask once for all trees that this object names
                wanted = [each for kind, each in parent.references if kind is Kind.TREE]
            try:
                payloads = self._reader.objects(Kind.TREE, wanted)
            except CorruptionError:
                # The object names others that nobody asked for, and which retention may have dropped.
                wanted = [id]
                payloads = self._reader.objects(Kind.TREE, wanted)
            parent.fetched |= zip(wanted, payloads, strict=True)
        return self._open(id, parent.fetched[id])

    def _pages(
        self, value: Any, opened: _Object, kind: type, code: int, ahead: bool, apart: bool = False
    ) -> Iterator[tuple[Any, _Object]]:
        """The list or dict values, each with its object, that together are one container; with `apart` also
        trees that are left so."""
        apart = apart and bool(self._apart)
        if type(value) is Tagged and value.code == codes.SUBTREE:
            position = _decode(value.payload, opened.where)
            if apart and (id := opened.reference(position, Kind.TREE)) in self._apart:
                yield StoredTree("tree", id, _unloaded), opened
                return
            opened = self._child(opened, position, ahead)
            value = opened.body
        for page, home in self._unpage(value, opened, kind, code, None, apart):
            if type(page) is not StoredTree and len(page) > self._longest and not self._in_keys:
                raise CorruptionError(f"{home.where}: a {kind.__name__} that belongs into pages")
            yield page, home

    def _unpage(
        self, value: Any, opened: _Object, kind: type, code: int, level: int | None, apart: bool = False
    ) -> Iterator[tuple[Any, _Object]]:
        if type(value) is kind and not level:
            yield value, opened
            return
        if type(value) is not Tagged or value.code != code or level == 0:
            raise CorruptionError(f"{opened.where}: a {kind.__name__} was expected")
        found, positions = self._fields(value, opened, 2)
        if (
            type(found) is not int
            or not 0 <= found <= codes.MAX_LEVEL
            or (level is not None and found != level - 1)
            or type(positions) is not list
        ):
            raise CorruptionError(f"{opened.where}: impossible pages")
        for position in positions:
            if apart and (id := opened.reference(position, Kind.TREE)) in self._apart:
                yield StoredTree("tree", id, _unloaded), opened
                continue
            page = self._child(opened, position, not apart)
            if found == 0:
                if type(page.body) is not kind:
                    raise CorruptionError(f"{page.where}: a page of a {kind.__name__} was expected")
                yield page.body, page
            else:
                yield from self._unpage(page.body, page, kind, code, found, apart)

    def _fields(self, value: Tagged, opened: _Object, count: int) -> list[Any]:
        fields = _decode(value.payload, opened.where)
        if type(fields) is not list or len(fields) != count:
            raise CorruptionError(f"{opened.where}: extension {value.code} has the wrong number of fields")
        return fields

    # -- nodes ------------------------------------------------------------------------------------

    def node(self, value: Any, opened: _Object, selection: Selection, depth: int = 0) -> Stored:
        """The stored value of a decoded node, or what `selection` touches of it."""
        self._count += 1
        if self._count > codes.MAX_VALUES:
            raise _too_many(opened.where)
        if depth > codes.MAX_DEPTH + 4:
            raise CorruptionError(f"{opened.where}: nested deeper than any state")
        word = _PLAIN.get(type(value))
        if word is not None:
            return StoredLeaf(word, value, 8 if word in ("int", "float") else len(canonical.encode(value)))
        if type(value) is list:
            return self._list("list", value, opened, selection, depth, lambda keys, found: found)
        if type(value) is dict:
            return self._map("dict", value, opened, selection, depth, _make_dict, apart=True)
        if type(value) is Tagged:
            decoder = _DECODERS.get(value.code)
            if decoder is not None:
                return decoder(self, value, opened, selection, depth)
            word = values.kind_of(value.code)
            if word is not None:
                found = values.restore(value.code, self._payload(value, opened))
                return StoredLeaf(word, found, len(value.payload))
        raise CorruptionError(f"{opened.where}: an unknown kind of value")

    def _payload(self, value: Tagged, opened: _Object) -> Any:
        return _decode(value.payload, opened.where)

    def _list(
        self,
        word: str,
        value: Any,
        opened: _Object,
        selection: Selection,
        depth: int,
        make: Callable[[list[Any], list[Any]], Any],
        names: Sequence[str] | None = None,
    ) -> Branch:
        keys: list[Any] = []
        children = []
        at = 0
        for page, home in self._pages(value, opened, list, codes.LIST_PAGES, selection.whole):
            for item in page:
                key: Any = at
                if names is not None:
                    if at >= len(names):
                        raise CorruptionError(f"{home.where}: more values than fields")
                    key = names[at]
                at += 1
                below = selection.step(key)
                if below is not None:
                    child = self.node(item, home, below, depth + 1)
                    if _wanted(child, below):
                        keys.append(key)
                        children.append(child)
        if names is not None and at != len(names):
            raise CorruptionError(f"{opened.where}: fewer values than fields")
        return Branch(word, keys, children, make)

    def _map(
        self,
        word: str,
        value: Any,
        opened: _Object,
        selection: Selection,
        depth: int,
        make: Callable[[list[Any], list[Any]], Any],
        apart: bool = False,
    ) -> Branch:
        keys: list[Any] = []
        children: list[Stored] = []
        seen: set[Any] = set()
        for page, home in self._pages(value, opened, dict, codes.MAP_PAGES, selection.whole, apart=apart):
            if type(page) is StoredTree:
                page.load = functools.partial(self._entries_of, page.id, selection, depth)
                keys.append(page)
                children.append(page)
                continue
            for raw, item in page.items():
                key = raw if type(raw) is str else self._key(raw, home, depth)
                if key in seen:
                    raise CorruptionError(f"{home.where}: a key that appears twice")
                seen.add(key)
                below = selection.step(key)
                if below is not None:
                    child = self.node(item, home, below, depth + 1)
                    if _wanted(child, below):
                        keys.append(key)
                        children.append(child)
        return Branch(word, keys, children, make)

    def _entries_of(self, id: ObjectId, selection: Selection, depth: int) -> Stored:
        """What a tree holds that was left apart, as a dict or list of its own."""
        self._apart.discard(id)
        (payload,) = self._reader.objects(Kind.TREE, [id])
        return self._container(self._open(id, payload), selection, depth)

    def _container(self, child: _Object, selection: Selection, depth: int) -> Branch:
        body = child.body
        if type(body) is dict or (type(body) is Tagged and body.code == codes.MAP_PAGES):
            return self._map("dict", body, child, selection, depth, _make_dict, apart=True)
        if type(body) is list or (type(body) is Tagged and body.code == codes.LIST_PAGES):
            return self._list("list", body, child, selection, depth, lambda keys, found: found)
        raise CorruptionError(f"{child.where}: a subtree that is no container")

    def _key(self, raw: Any, opened: _Object, depth: int) -> Any:
        key = self._flat(raw, opened, depth)
        try:
            hash(key)
        except TypeError:
            raise CorruptionError(f"{opened.where}: a {type(key).__name__} as a key") from None
        return key

    def _flat(self, raw: Any, opened: _Object, depth: int) -> Any:
        """A value that is never cut into pages."""
        if type(raw) in _PLAIN:
            self._count += 1
            return raw
        self._in_keys += 1
        found = plain_value(self.node(raw, opened, paths.EVERYTHING, depth + 1))
        self._in_keys -= 1
        return found

    # -- tagged nodes -----------------------------------------------------------------------------

    def _subtree(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        position = self._payload(value, opened)
        if self._apart and (id := opened.reference(position, Kind.TREE)) in self._apart:
            return StoredTree("tree", id, functools.partial(self._entries_of, id, selection, depth))
        return self._container(self._child(opened, position, selection.whole), selection, depth)

    def _tuple(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        inner = self._payload(value, opened)
        return self._list("tuple", inner, opened, selection, depth, lambda keys, found: tuple(found))

    def _namedtuple(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        name, fields, inner = self._fields(value, opened, 3)
        if type(name) is not str or type(fields) is not list or not all(type(f) is str for f in fields):
            raise CorruptionError(f"{opened.where}: a named tuple without names")
        kind = values.namedtuple_class(name, tuple(fields))

        def make(keys: list[Any], found: list[Any]) -> Any:
            # A part of a named tuple cannot be one.
            return kind(*found) if keys == fields else dict(zip(keys, found, strict=True))

        return self._list("namedtuple", inner, opened, selection, depth, make, fields)

    def _set(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        kind: type = set if value.code == codes.SET else frozenset
        items = []
        last = None
        inner = self._payload(value, opened)
        for page, home in self._pages(inner, opened, list, codes.LIST_PAGES, True):
            for raw in page:
                encoded = canonical.encode(raw)
                if last is not None and encoded <= last:
                    raise CorruptionError(f"{home.where}: a set out of order")
                last = encoded
                items.append(self._key(raw, home, depth))
        found = kind(items)
        if len(found) != len(items):
            raise CorruptionError(f"{opened.where}: a set with an element twice")
        return StoredLeaf(kind.__name__, found, len(value.payload))

    def _ordered(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        parts = self._payload(value, opened)
        if type(parts) is not list or len(parts) not in (1, 2):
            raise CorruptionError(f"{opened.where}: an OrderedDict has the wrong number of fields")
        metadata = [plain_value(self.node(part, opened, paths.EVERYTHING, depth + 1)) for part in parts[1:]]

        def make(keys: list[Any], found: list[Any]) -> Any:
            made = collections.OrderedDict(zip(keys, found, strict=True))
            for each in metadata:
                made._metadata = each  # type: ignore[attr-defined]
            return made

        return self._map("OrderedDict", parts[0], opened, selection, depth, make, apart=True)

    def _defaultdict(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        name, inner = self._fields(value, opened, 2)
        if name is not None and (type(name) is not str or name not in values.FACTORIES):
            raise CorruptionError(f"{opened.where}: a defaultdict with an unknown factory")
        factory = None if name is None else values.FACTORIES[name]

        def make(keys: list[Any], found: list[Any]) -> Any:
            return collections.defaultdict(factory, zip(keys, found, strict=True))

        return self._map("defaultdict", inner, opened, selection, depth, make)

    def _counter(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        def make(keys: list[Any], found: list[Any]) -> Any:
            return collections.Counter(dict(zip(keys, found, strict=True)))

        return self._map("Counter", self._payload(value, opened), opened, selection, depth, make)

    def _deque(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        limit, inner = self._fields(value, opened, 2)
        if limit is not None and (type(limit) is not int or not 0 <= limit < 1 << 62):
            raise CorruptionError(f"{opened.where}: a deque of impossible length")

        def make(keys: list[Any], found: list[Any]) -> Any:
            return collections.deque(found, limit)

        branch = self._list("deque", inner, opened, selection, depth, make)
        if limit is not None and len(branch.keys) > limit:
            raise CorruptionError(f"{opened.where}: a deque longer than its limit")
        return branch

    def _bytearray(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        data = self._payload(value, opened)
        if type(data) is not bytes:
            raise CorruptionError(f"{opened.where}: a bytearray without bytes")
        # Mutable, so each reading makes its own.
        return Branch("bytearray", [], [], lambda keys, found: bytearray(data))

    def _slice(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        parts = [self._key(part, opened, depth) for part in self._fields(value, opened, 3)]
        return StoredLeaf("slice", slice(*parts), len(value.payload))

    def _namespace(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:

        def make(keys: list[Any], found: list[Any]) -> Any:
            return values.make_namespace(value.code, dict(zip(keys, found, strict=True)))

        return self._attributes(
            self._map("namespace", self._payload(value, opened), opened, selection, depth + 1, make), opened
        )

    def _attributes(self, branch: Branch, opened: _Object) -> Branch:
        if not all(type(key) is str for key in branch.keys):
            raise CorruptionError(f"{opened.where}: an attribute whose name is no text")
        return branch

    def _enum(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        name, member, inner = self._fields(value, opened, 3)
        if type(name) is not str or not (member is None or type(member) is str):
            raise CorruptionError(f"{opened.where}: an enum member without a name")
        found = self._flat(inner, opened, depth)
        return StoredLeaf("enum", values.EnumValue(name, member, found), len(value.payload))

    def _dataclass(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        name, inner = self._fields(value, opened, 2)
        if type(name) is not str:
            raise CorruptionError(f"{opened.where}: a dataclass without a name")

        def make(keys: list[Any], found: list[Any]) -> Any:
            return values.DataclassValue(name, dict(zip(keys, found, strict=True)))

        return self._attributes(self._map("dataclass", inner, opened, selection, depth + 1, make), opened)

    def _scalar(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        name, data = self._fields(value, opened, 2)
        if type(name) is not str or type(data) is not bytes:
            raise CorruptionError(f"{opened.where}: a numpy scalar without dtype or bytes")
        return StoredLeaf(name, restore_scalar(name, data), len(data))

    def _dtype(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        name, flags = self._fields(value, opened, 2)
        if type(name) is not str or flags not in (0, codes.BIG_ENDIAN):
            raise CorruptionError(f"{opened.where}: a dtype without a name")
        found = numpy_dtype(name)
        return StoredLeaf("dtype", found.newbyteorder(">") if flags else found, len(name))

    def _torch_leaf(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        plain = self._payload(value, opened)
        if value.code == codes.TORCH_SIZE:
            self._shape(plain, opened)
        elif value.code == codes.TORCH_CONSTANT:
            if type(plain) is not list or len(plain) != 2 or plain[0] not in torch_tensors.CONSTANTS:
                raise CorruptionError(f"{opened.where}: an unknown constant of torch")
            if type(plain[1]) is not str:
                raise CorruptionError(f"{opened.where}: a torch value without a name")
            return StoredTorch(plain[0], value.code, plain)
        elif type(plain) is not str:
            raise CorruptionError(f"{opened.where}: a torch value without a name")
        words = {codes.TORCH_SIZE: "size", codes.TORCH_DTYPE: "dtype", codes.TORCH_DEVICE: "device"}
        return StoredTorch(words[value.code], value.code, plain)

    def _random(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        plain = self._fields(value, opened, 3 if value.code == codes.RANDOM else 5)
        return StoredRandom("generator", value.code, plain, len(value.payload))

    # -- tensors ----------------------------------------------------------------------------------

    def _shape(self, value: Any, opened: _Object) -> tuple[int, ...]:
        if (
            type(value) is not list
            or len(value) > MAX_DIMENSIONS
            or not all(type(length) is int and 0 <= length < MAX_BYTES for length in value)
            or math.prod(length for length in value if length) > MAX_BYTES
        ):
            raise CorruptionError(f"{opened.where}: an impossible shape")
        return tuple(value)

    def _content(self, value: Any, nbytes: int, opened: _Object, gridded: bool = True) -> Content:
        cells = -(-nbytes // self._grid.chunk) if gridded else None
        if type(value) is bytes:
            if len(value) != nbytes or nbytes > self._grid.inline:
                raise CorruptionError(f"{opened.where}: {len(value)} bytes kept inline of {nbytes}")
            return Content(nbytes, inline=value)
        if nbytes <= self._grid.inline:
            raise CorruptionError(f"{opened.where}: {nbytes} bytes that should be inline are not")
        if type(value) is list and value:
            chunks = tuple(opened.reference(position, Kind.CHUNK) for position in value)
            if (cells is not None and len(chunks) != cells) or len(chunks) > self._grid.chunk_list:
                raise CorruptionError(f"{opened.where}: {len(chunks)} chunks for {nbytes} bytes")
            return Content(nbytes, chunks=chunks, cells=len(chunks))
        if type(value) is dict and value.keys() == {"list"}:
            if cells is not None and cells <= self._grid.chunk_list:
                raise CorruptionError(f"{opened.where}: a chunk list for {nbytes} bytes")
            id = opened.reference(value["list"], Kind.CHUNK_LIST)
            return Content(nbytes, chunk_list=id, cells=cells)
        raise CorruptionError(f"{opened.where}: content of an unknown form")

    def _tensor(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        framework, name, lengths, flags, layout, data = self._fields(value, opened, 6)
        if type(framework) is not str or type(name) is not str:
            raise CorruptionError(f"{opened.where}: a tensor without a dtype")
        shape = self._shape(lengths, opened)
        allowed = (0, codes.BIG_ENDIAN) if framework == "numpy" else _TORCH_FLAGS
        if type(flags) is not int or flags not in allowed:
            raise CorruptionError(f"{opened.where}: a tensor with impossible flags")
        spec = Spec(framework, name, shape, flags, item_size(framework, name))
        if spec.nbytes > MAX_BYTES:
            raise CorruptionError(f"{opened.where}: an impossible shape")
        order, alias = self._layout(layout, opened)
        check_layout(spec, order, alias)
        return StoredTensor("tensor", spec, order, alias, self._content(data, spec.nbytes, opened))

    def _layout(self, layout: Any, opened: _Object) -> tuple[list[int] | None, Alias | None]:
        if layout is None:
            return None, None
        if _integers(layout):
            return layout, None
        if type(layout) is dict and layout.keys() == {"alias"}:
            place = layout["alias"]
            if (
                type(place) is list
                and len(place) == 3
                and _integers(place[:2])
                and (place[2] is None or _integers(place[2]))
            ):
                strides = None if place[2] is None else tuple(place[2])
                return None, Alias(place[0], place[1], strides)
        raise CorruptionError(f"{opened.where}: a tensor with an impossible layout")

    def _blob(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        word, nbytes, data = self._fields(value, opened, 3)
        known = word in ("str", "bytes", "bytearray")
        if not known or type(nbytes) is not int or not 0 <= nbytes < MAX_BYTES:
            raise CorruptionError(f"{opened.where}: an impossible blob")
        return StoredBlob(word, self._content(data, nbytes, opened))

    def _parts(self, value: Any, opened: _Object, depth: int) -> Branch:
        branch = self._map("dict", value, opened, paths.EVERYTHING, depth + 1, _make_dict)
        for child in branch.children:
            plain = isinstance(child, StoredLeaf) and type(child.value) in (int, float)
            if not plain and not (isinstance(child, StoredTensor) and child.spec.framework == "torch"):
                raise CorruptionError(f"{opened.where}: a tensor made of something else than tensors")
        return branch

    def _sparse(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        layout, lengths, flags, inner = self._fields(value, opened, 4)
        shape = self._shape(lengths, opened)
        if type(layout) is not str or type(flags) is not int:
            raise CorruptionError(f"{opened.where}: an impossible sparse tensor")
        parts = self._parts(inner, opened, depth)

        def make(keys: list[Any], found: list[Any]) -> Any:
            return torch_tensors.restore_sparse(layout, shape, flags, dict(zip(keys, found, strict=True)))

        names = [c.spec.dtype for k, c in zip(parts.keys, parts.children, strict=True)
                 if k == "values" and isinstance(c, StoredTensor)]  # fmt: skip
        return Compound("sparse", parts.keys, parts.children, make, "".join(names), shape, (layout, flags))

    def _quantized(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        name, scheme, flags, axis, inner = self._fields(value, opened, 5)
        if (
            type(name) is not str
            or type(scheme) is not str
            or type(flags) is not int
            or not (axis is None or type(axis) is int)
        ):
            raise CorruptionError(f"{opened.where}: an impossible quantised tensor")
        parts = self._parts(inner, opened, depth)

        def make(keys: list[Any], found: list[Any]) -> Any:
            return torch_tensors.restore_quantized(
                name, scheme, flags, axis, dict(zip(keys, found, strict=True))
            )

        shapes = [c.spec.shape for k, c in zip(parts.keys, parts.children, strict=True)
                  if k == "integers" and isinstance(c, StoredTensor)]  # fmt: skip
        whole = shapes[0] if shapes else ()
        about = (scheme, flags, axis)
        return Compound("quantized", parts.keys, parts.children, make, name, whole, about)

    def _generator(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        device, inner = self._fields(value, opened, 2)
        if type(device) is not str or type(inner) is not Tagged or inner.code != codes.TENSOR:
            raise CorruptionError(f"{opened.where}: an impossible generator")
        state = self._tensor(inner, opened, paths.EVERYTHING, depth + 1)

        def make(keys: list[Any], found: list[Any]) -> Any:
            return torch_tensors.restore_generator(device, found[0])

        return Compound("generator", ["state"], [state], make, about=(device,))

    def _subclass(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        name, lengths, flags, inner, context = self._fields(value, opened, 5)
        if type(name) is not str or flags not in _TORCH_FLAGS:
            raise CorruptionError(f"{opened.where}: an impossible tensor of a class of its own")
        shape = self._shape(lengths, opened)
        parts = self._map("dict", inner, opened, paths.EVERYTHING, depth + 1, _make_dict)
        if not all(type(key) is str for key in parts.keys):
            raise CorruptionError(f"{opened.where}: a part of a tensor whose name is no text")
        rest = self.node(context, opened, paths.EVERYTHING, depth + 1)

        def make(keys: list[Any], found: list[Any]) -> Any:
            made = dict(zip(keys[:-1], found[:-1], strict=True))
            return values.TensorSubclassValue(name, shape, flags, made, found[-1])

        return Compound("subclass", [*parts.keys, None], [*parts.children, rest], make, name, shape)

    # -- files ------------------------------------------------------------------------------------

    def _file(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        size, mode, digest, splitter, data = self._fields(value, opened, 5)
        self._check_file(size, mode, digest, opened)
        if type(splitter) is not int or splitter < 0:
            raise CorruptionError(f"{opened.where}: an impossible file")
        content = self._content(data, size, opened, gridded=splitter == 0)
        return StoredFile("file", size, mode, digest, splitter, content)

    def _check_file(self, size: Any, mode: Any, digest: Any, opened: _Object) -> None:
        if (
            not _integers([size, mode])
            or not 0 <= size < MAX_BYTES
            or not 0 <= mode < 1 << 16
            or type(digest) is not bytes
            or len(digest) != 32
        ):
            raise CorruptionError(f"{opened.where}: an impossible file")

    def _tensor_file(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        size, mode, digest, format, data, inner = self._fields(value, opened, 6)
        self._check_file(size, mode, digest, opened)
        if type(format) is not str:
            raise CorruptionError(f"{opened.where}: a file of no format")
        found: dict[str, TensorInFile] = {}
        rest, around = size, 0
        for page, home in self._pages(inner, opened, dict, codes.MAP_PAGES, True):
            for name, entry in page.items():
                self._count += 1
                if self._count > codes.MAX_VALUES:
                    raise _too_many(home.where)
                if type(name) is not str or name in found or type(entry) is not list or len(entry) != 2:
                    raise CorruptionError(f"{home.where}: an impossible tensor in a file")
                before, tensor = entry
                if type(before) is not int or type(tensor) is not Tagged or tensor.code != codes.TENSOR:
                    raise CorruptionError(f"{home.where}: an impossible tensor in a file")
                stored = self._tensor(tensor, home, paths.EVERYTHING, depth)
                assert isinstance(stored, StoredTensor)
                rest -= stored.spec.nbytes
                around += before
                if before < 0 or stored.alias is not None or not stored.spec.nbytes:
                    raise CorruptionError(f"{home.where}: an impossible tensor in a file")
                found[name] = TensorInFile(name, before, stored)
        if not 0 <= around <= rest:
            raise CorruptionError(f"{opened.where}: a file smaller than what lies in it")
        content = self._content(data, rest, opened)
        return StoredFile("file", size, mode, digest, 0, content, format, list(found.values()))

    def _link(self, value: Tagged, opened: _Object, selection: Selection, depth: int) -> Stored:
        target = self._payload(value, opened)
        if type(target) is not str:
            raise CorruptionError(f"{opened.where}: a link without a target")
        return StoredLink("link", target)


def _unloaded() -> Stored:
    raise AssertionError("set by whoever asked for trees to be left apart")


def shared_trees(reader: ObjectReader, one: ObjectId, other: ObjectId) -> set[ObjectId]:
    """Trees that both of two trees refer to; of what lies below these only what is found elsewhere, too."""
    seen: tuple[set[ObjectId], set[ObjectId]] = ({one}, {other})
    edges = ({one}, {other})
    while any(edges):
        below: tuple[set[ObjectId], set[ObjectId]] = (set(), set())
        wanted = sorted((edges[0] | edges[1]) - (seen[0] & seen[1]))
        for start in range(0, len(wanted), _AT_ONCE):
            ids = wanted[start : start + _AT_ONCE]
            for id, payload in zip(ids, reader.objects(Kind.TREE, ids), strict=True):
                named = {each for kind, each in unpack_object(payload, f"tree {id.short}")[0]
                         if kind is Kind.TREE}  # fmt: skip
                for side in (0, 1):
                    if id in edges[side]:
                        below[side].update(named - seen[side])
        for side in (0, 1):
            seen[side].update(below[side])
        edges = below
    return seen[0] & seen[1]


def _parsed(id: ObjectId, payload: bytes) -> _Object:
    where = f"tree {id.short}"
    references, body = unpack_object(payload, where)
    return _Object(where, references, _decode(bytes(body), where))


def _too_many(where: str) -> CorruptionError:
    return CorruptionError(f"{where}: more values than any state")


def _census(opened: _Object) -> tuple[int, collections.Counter[ObjectId]]:
    """How many values a tree object holds, roughly, and how often it names each other one."""
    values, below = 0, collections.Counter[ObjectId]()
    waiting = [opened.body]
    while waiting:
        value = waiting.pop()
        values += 1
        if type(value) is list:
            waiting += value
        elif type(value) is dict:
            waiting += value.values()
        elif type(value) is Tagged and value.code == codes.SUBTREE:
            below[opened.reference(_decode(value.payload, opened.where), Kind.TREE)] += 1
        elif type(value) is Tagged and value.code in (codes.MAP_PAGES, codes.LIST_PAGES):
            pages = _decode(value.payload, opened.where)
            if type(pages) is list and pages and type(pages[-1]) is list:
                below.update(opened.reference(position, Kind.TREE) for position in pages[-1])
        elif type(value) is Tagged and value.code in _CONTAINERS:
            waiting.append(_decode(value.payload, opened.where))
    return values, below


_AT_ONCE: Final = 256
_MOST_COUNTED: Final = 4 * codes.MAX_VALUES
"""A census counts type names and other fields as well."""

_CONTAINERS: Final = frozenset(
    (
        codes.ROOT,
        codes.TUPLE,
        codes.NAMEDTUPLE,
        codes.SET,
        codes.FROZENSET,
        codes.ORDERED_DICT,
        codes.DEFAULT_DICT,
        codes.COUNTER,
        codes.DEQUE,
        codes.NAMESPACE,
        codes.SIMPLE_NAMESPACE,
        codes.DATACLASS,
        codes.TENSOR_FILE,
        codes.TORCH_SUBCLASS,
    )
)

_TORCH_FLAGS: Final = (
    0,
    codes.REQUIRES_GRAD,
    codes.PARAMETER,
    codes.REQUIRES_GRAD | codes.PARAMETER,
)

_Decoder: TypeAlias = Callable[[Loader, Tagged, _Object, Selection, int], Stored]

_DECODERS: Final[dict[int, _Decoder]] = {
    codes.TUPLE: Loader._tuple,
    codes.NAMEDTUPLE: Loader._namedtuple,
    codes.SET: Loader._set,
    codes.FROZENSET: Loader._set,
    codes.ORDERED_DICT: Loader._ordered,
    codes.DEFAULT_DICT: Loader._defaultdict,
    codes.COUNTER: Loader._counter,
    codes.DEQUE: Loader._deque,
    codes.BYTEARRAY: Loader._bytearray,
    codes.BLOB: Loader._blob,
    codes.NAMESPACE: Loader._namespace,
    codes.SIMPLE_NAMESPACE: Loader._namespace,
    codes.ENUM: Loader._enum,
    codes.DATACLASS: Loader._dataclass,
    codes.SLICE: Loader._slice,
    codes.NUMPY_SCALAR: Loader._scalar,
    codes.NUMPY_DTYPE: Loader._dtype,
    codes.RANDOM: Loader._random,
    codes.NUMPY_GENERATOR: Loader._random,
    codes.TENSOR: Loader._tensor,
    codes.SPARSE: Loader._sparse,
    codes.QUANTIZED: Loader._quantized,
    codes.TORCH_SIZE: Loader._torch_leaf,
    codes.TORCH_DTYPE: Loader._torch_leaf,
    codes.TORCH_DEVICE: Loader._torch_leaf,
    codes.TORCH_GENERATOR: Loader._generator,
    codes.TORCH_CONSTANT: Loader._torch_leaf,
    codes.TORCH_SUBCLASS: Loader._subclass,
    codes.SUBTREE: Loader._subtree,
    codes.FILE: Loader._file,
    codes.LINK: Loader._link,
    codes.TENSOR_FILE: Loader._tensor_file,
}


def _integers(value: Any) -> bool:
    return type(value) is list and all(type(item) is int for item in value)


def _make_dict(keys: list[Any], found: list[Any]) -> dict[Any, Any]:
    return dict(zip(keys, found, strict=True))


def _wanted(child: Stored, selection: Selection) -> bool:
    """Whether something of `child` is selected; a container on the way to nothing is not."""
    if selection.whole or isinstance(child, StoredTree):
        return True
    return isinstance(child, Branch) and not isinstance(child, Compound) and bool(child.children)


def plain_value(stored: Stored) -> Any:
    """The value of a node that may hold no tensors: a key, metadata. CorruptionError if it does."""
    if isinstance(stored, StoredLeaf):
        return stored.value
    if isinstance(stored, StoredTorch):
        return torch_value(stored, None)
    if isinstance(stored, Branch) and not isinstance(stored, Compound):
        return stored.make(stored.keys, [plain_value(child) for child in stored.children])
    raise CorruptionError(f"a {stored.kind} where only plain values can be")


def torch_value(stored: StoredTorch, framework: str | None) -> Any:
    """A torch.Size, dtype or device, or with "numpy" what stands for it without torch."""
    if framework == "numpy":
        if stored.code == codes.TORCH_CONSTANT:
            return stored.plain[1]
        return tuple(stored.plain) if stored.code == codes.TORCH_SIZE else stored.plain
    if stored.code == codes.TORCH_CONSTANT:
        return torch_tensors.constant(*stored.plain)
    if stored.code == codes.TORCH_SIZE:
        return torch_tensors.require().Size(stored.plain)
    if stored.code == codes.TORCH_DTYPE:
        return torch_tensors.dtype(stored.plain)
    return torch_tensors.device(stored.plain)
