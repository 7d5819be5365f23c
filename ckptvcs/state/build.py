"""A nested Python state -> nodes. Nothing is stored here; memory is looked at, not copied."""

from __future__ import annotations

import abc
import collections
import dataclasses
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from ckptvcs.canonical import Tagged, encode
from ckptvcs.errors import InvalidError, UnsupportedStateError
from ckptvcs.state import (
    codes,
    configs,
    generators,
    paths,
    torch_devices,
    torch_objects,
    torch_tensors,
    values,
)
from ckptvcs.state.bases import INSIDE
from ckptvcs.state.interface import Source, is_last
from ckptvcs.state.nodes import (
    Content,
    Context,
    Data,
    Deferred,
    Leaf,
    ListNode,
    MapNode,
    Node,
    Row,
    Tag,
    TensorFile,
    TensorNode,
)
from ckptvcs.state.tensors import (
    ArraySource,
    BytesSource,
    Raw,
    Spec,
    capture,
    dense_order,
    dtype_name,
    find_aliases,
    scalar_fields,
    unit,
    why_not,
)
from ckptvcs.store.format import GRIDS, Grid

MAX_COMPONENTS: Final = 64
"""Up to so many top-level entries each is a component; of more, only those that are containers."""


class Place(NamedTuple):
    """What content is: its path in the state, or behind `FILES` in the files, and of a tensor the dtype's
    name and the shape."""

    path: str
    dtype: str
    shape: tuple[int, ...]


class TensorContent(NamedTuple):
    """A tensor in a file that is to be stored.

    Attributes:
        name: its path in the file.
        before: how many bytes of the file's rest come between it and the tensor before it.
        spec: dtype, shape, flags.
        order: the order of its dimensions in the file if that is not C order.
        source: its bytes in C order and little endian, at least one.
    """

    name: str
    before: int
    spec: Spec
    order: list[int] | None
    source: Source


@dataclass(frozen=True, slots=True)
class FileContent:
    """A file to be stored.

    Attributes:
        size: bytes of the whole file.
        mode: permission bits.
        digest: BLAKE3 of the whole file.
        splitter: 0 if the grid cuts it, else the id of the splitter that made `sources`.
        sources: its bytes; each is cut by the grid in turn. If it holds tensors: the bytes of the rest.
        format: what it is, as people call it, if it holds tensors.
        tensors: its tensors, in the order of their bytes. Then `splitter` is 0.
    """

    size: int
    mode: int
    digest: bytes
    splitter: int
    sources: Sequence[Source]
    format: str = ""
    tensors: Sequence[TensorContent] = ()


@dataclass(frozen=True, slots=True)
class LinkContent:
    """A symbolic link to be stored: its target's text."""

    target: str


Folder: TypeAlias = "Mapping[str, FileContent | LinkContent | Folder]"

Trail: TypeAlias = "tuple[Any, object] | None"
"""Where a value is: the trail above it and its key, None at the top."""

_Trail = Trail
_IN_FILES: Final[_Trail] = (None, "")
_NUMBERS: Final = (type(None), bool, int, float)


def _path(trail: _Trail) -> str:
    names = []
    while trail is not None:
        trail, key = trail
        names.append(paths.name(key))
    return "/".join(reversed(names))


class Given(abc.ABC):
    """A part of a state that makes its own node: it is stored already, or computed while it is stored."""

    @abc.abstractmethod
    def node(self, builder: Builder, trail: Trail) -> Node:
        """Its node, made with the methods of `builder` that begin with `given`."""


class Builder:
    """Builds the nodes of one tree.

    Attributes:
        contents: what has to be stored and what it is, by component, in order.
        sizes: logical bytes by component.
        kept: of these, bytes of content that was given as stored.
    """

    def __init__(self, grid: Grid, frozen: Callable[[str], bool] | None = None) -> None:
        """`frozen` says by path which torch tensors carry a witness."""
        self._grid = grid
        self._frozen = frozen
        # Keys and set elements are never split.
        self._flat = dataclasses.replace(grid, subtree=1 << 62)
        self._errors: list[tuple[str, str]] = []
        self._tensors: list[tuple[TensorNode, Raw]] = []
        self._open: set[int] = set()
        self._expanding = 0
        self._count = 0
        # Whatever was made on the way stays alive, or another array could be given its memory and
        # seem to share it. Raw views keep their memory alive on their own, for as long as sources last.
        self._kept: list[Any] = []
        self._captures = torch_devices.Captures()
        # Random generators and what else has to be seen last: `state_dict()` of an object may draw numbers.
        self._later: list[Callable[[], None]] = []
        self.contents: dict[str, list[tuple[Place, Content]]] = {}
        self.sizes: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        self._component = ""

    def state(self, value: Any) -> Node:
        """The node of a whole state. UnsupportedStateError lists every leaf that cannot be stored."""
        node = self._node(value, None, 0)
        for look in self._later:
            look()
        if self._errors:
            raise UnsupportedStateError(self._errors)
        aliases = find_aliases([(node.spec.framework, raw) for node, raw in self._tensors])
        for (tensor, raw), alias in zip(self._tensors, aliases, strict=True):
            tensor.set_layout(None if alias else dense_order(raw), alias)
        return node

    def files(self, folder: Folder) -> Node:
        """The node of a folder of files."""
        return MapNode([(encode(name), self._file(name, entry, _IN_FILES)) for name, entry in folder.items()])

    def _file(self, name: str, entry: FileContent | LinkContent | Folder, trail: _Trail) -> Node:
        self._counted(None)
        if trail is _IN_FILES:
            self._enter(name)
        trail = (trail, name)
        if isinstance(entry, LinkContent):
            return Leaf(encode(Tagged(codes.LINK, encode(entry.target))))
        if isinstance(entry, FileContent) and entry.tensors:
            return self._tensor_file(entry, trail)
        if isinstance(entry, FileContent):
            fields = [encode(field) for field in (entry.size, entry.mode, entry.digest, entry.splitter)]
            return Data(codes.FILE, fields, self._content(entry.size, entry.sources, trail))
        return MapNode([(encode(key), self._file(key, below, trail)) for key, below in entry.items()])

    def _tensor_file(self, entry: FileContent, trail: _Trail) -> Node:
        fields = [encode(field) for field in (entry.size, entry.mode, entry.digest, entry.format)]
        rest = entry.size - sum(tensor.spec.nbytes for tensor in entry.tensors)
        content = self._content(rest, entry.sources, trail)
        found: list[tuple[bytes, Node]] = []
        for name, before, spec, order, source in entry.tensors:
            self._counted(None)
            node = TensorNode(
                spec, self._content(spec.nbytes, [source], trail, spec.dtype, spec.shape, INSIDE + name)
            )
            node.set_layout(order, None)
            found.append((encode(name), Row([Leaf(encode(before)), node])))
        return TensorFile(fields, content, MapNode(found))

    def _enter(self, component: str) -> None:
        self._component = component
        self.contents.setdefault(component, [])
        self.sizes.setdefault(component, 0)

    def _content(
        self,
        nbytes: int,
        sources: Sequence[Source],
        trail: _Trail,
        dtype: str = "",
        shape: tuple[int, ...] = (),
        inside: str = "",
    ) -> Content:
        content = Content(nbytes, sources, self._grid)
        if content.inline is None:
            place = Place(_path(trail) + inside, dtype, shape)
            self.contents.setdefault(self._component, []).append((place, content))
        self.sizes[self._component] = self.sizes.get(self._component, 0) + nbytes
        return content

    def given_leaf(self, encoded: bytes) -> Leaf:
        """The node of an encoded value without references."""
        return self._leaf(encoded)

    def given_content(self, content: Content) -> Content:
        """Count content that is stored already."""
        for counts in (self.sizes, self.kept):
            counts[self._component] = counts.get(self._component, 0) + content.nbytes
        return content

    def given_source(self, spec: Spec, source: Source, trail: Trail) -> Content:
        """Content of a tensor that is to be stored."""
        return self._content(spec.nbytes, [source], trail, spec.dtype, spec.shape)

    def given_component(self, name: str) -> None:
        """What follows belongs to this component."""
        self._enter(name)

    def given_value(self, value: Any, trail: Trail, depth: int) -> Node:
        """The node of any value below a given one."""
        return self._node(value, trail, depth)

    def _given(self, value: Given, trail: _Trail, depth: int, in_key: bool) -> Node:
        return value.node(self, trail)

    def _counted(self, trail: _Trail, more: int = 1) -> None:
        self._count += more
        if self._count > codes.MAX_VALUES:  # at once: the rest may have no end
            why = f"more than {codes.MAX_VALUES} values in all; long lists of numbers belong in arrays"
            raise UnsupportedStateError([*self._errors, (_path(trail), why)])

    def _refuse(self, trail: _Trail, why: str) -> Node:
        self._errors.append((_path(trail), why))
        return Leaf(b"")

    # -- values -----------------------------------------------------------------------------------

    def _leaf(self, encoded: bytes, number: bool = False) -> Leaf:
        self.sizes[self._component] = self.sizes.get(self._component, 0) + len(encoded)
        return Leaf(encoded, number)

    def _node(self, value: Any, trail: _Trail, depth: int, in_key: bool = False) -> Node:
        self._counted(trail)
        kind = type(value)
        if kind in _NUMBERS:
            return self._leaf(encode(value), True)
        if kind is np.ndarray:
            return self._array(value, trail, in_key)
        handler = _HANDLERS.get(kind)
        if handler is None:
            handler = _handler(value)
            if handler is None:
                return self._refuse(trail, _why_unsupported(value))
        if handler not in _CONTAINERS:
            return handler(self, value, trail, depth, in_key)
        if depth > codes.MAX_DEPTH:
            return self._refuse(trail, f"nested deeper than {codes.MAX_DEPTH} containers")
        if id(value) in self._open:
            return self._refuse(trail, f"{kind.__name__} that contains itself")
        self._open.add(id(value))
        try:
            return handler(self, value, trail, depth, in_key)
        finally:
            self._open.discard(id(value))

    def _text(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        kind = type(value)
        if len(value) > self._grid.subtree // 4 and not in_key:
            data = value.encode("utf-8", "surrogatepass") if kind is str else value
            if len(data) > self._grid.subtree:
                if kind is bytearray:
                    data = bytes(data)  # a view would forbid its owner to resize it
                fields = [encode(kind.__name__), encode(len(data))]
                return Data(codes.BLOB, fields, self._content(len(data), [BytesSource(data)], trail))
        return self._leaf(
            encode(Tagged(codes.BYTEARRAY, encode(bytes(value))) if kind is bytearray else value)
        )

    def _plain(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        try:
            encoded = values.leaf(value)
        except values.NoLeafError as error:
            return self._refuse(trail, str(error))
        return self._leaf(encoded)

    def _enum(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        if isinstance(value, values.EnumValue):
            name, member, inner = value.type, value.name, value.value
        else:
            name, member, inner = values.type_name(type(value)), value.name, value.value
        # An enum's value is code, not state: it is kept as far as it is plain, to be shown.
        head = [self._leaf(encode(name)), self._leaf(encode(member))]
        return Tag(codes.ENUM, [*head, self._key(inner, trail, depth)])

    def _scalar(self, value: np.generic, trail: _Trail, depth: int, in_key: bool) -> Node:
        fields = scalar_fields(value)
        if fields is None:
            return self._refuse(trail, f"numpy scalar: {why_not(value.dtype)}")
        return self._leaf(encode(Tagged(codes.NUMPY_SCALAR, encode(list(fields)))))

    def _dtype(self, value: np.dtype[Any], trail: _Trail, depth: int, in_key: bool) -> Node:
        name = dtype_name(value)
        if name is None:
            return self._refuse(trail, why_not(value))
        big = codes.BIG_ENDIAN if value.str[0] == ">" else 0
        return self._leaf(encode(Tagged(codes.NUMPY_DTYPE, encode([name, big]))))

    def _torch_leaf(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        code, plain = torch_tensors.leaf(value) or (0, None)
        return self._leaf(encode(Tagged(code, encode(plain))))

    def _random(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        if in_key:
            return self._refuse(trail, "generator as a key or in a set")

        def look() -> Node:
            try:
                return self._leaf(generators.leaf(value))
            except InvalidError as error:
                return self._refuse(trail, str(error))

        return self._deferred(look)

    def _deferred(self, look: Callable[[], Node]) -> Node:
        place, component = Deferred(), self._component

        def fill() -> None:
            self._component = component
            place.node = look()

        self._later.append(fill)
        return place

    # -- containers -------------------------------------------------------------------------------

    def _items(self, value: Iterable[Any], trail: _Trail, depth: int, in_key: bool) -> ListNode:
        return ListNode([self._node(item, (trail, at), depth + 1, in_key) for at, item in enumerate(value)])

    def _entries(self, value: Mapping[Any, Any], trail: _Trail, depth: int, in_key: bool = False) -> MapNode:
        top, few = trail is None and depth == 0, len(value) <= MAX_COMPONENTS
        entries = []
        for key, item in value.items():
            if top:
                self._enter(paths.name(key) if few or _is_component(item) else "")
            entries.append(
                (
                    encode(key) if type(key) is str else self._key(key, (trail, key), depth).encoded,
                    self._node(item, (trail, key), depth + 1, in_key),
                )
            )
        if top:
            self._component = ""
        return MapNode(entries)

    def _key(self, key: Any, trail: _Trail, depth: int) -> Leaf:
        node = self._node(key, trail, depth + 1, True)
        if type(node) is Leaf:
            return node
        node.weigh(self._flat)
        return Leaf(node.emit(Context(None)))

    def _list(self, value: list[Any], trail: _Trail, depth: int, in_key: bool) -> Node:
        return self._items(value, trail, depth, in_key)

    def _dict(self, value: dict[Any, Any], trail: _Trail, depth: int, in_key: bool) -> Node:
        return self._entries(value, trail, depth, in_key)

    def _tuple(self, value: tuple[Any, ...], trail: _Trail, depth: int, in_key: bool) -> Node:
        return Tag(codes.TUPLE, [self._items(value, trail, depth, in_key)], single=True)

    def _namedtuple(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        kind = type(value)
        items = [
            self._node(item, (trail, field), depth + 1, in_key)
            for field, item in zip(kind._fields, value, strict=True)
        ]
        head = [self._leaf(encode(values.type_name(kind))), self._leaf(encode(list(kind._fields)))]
        return Tag(codes.NAMEDTUPLE, [*head, ListNode(items)])

    def _set(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        found = []
        for item in value:
            leaf = self._key(item, (trail, item), depth)
            leaf.number = type(item) in _NUMBERS
            found.append(leaf)
        found.sort(key=lambda leaf: leaf.encoded)
        code = codes.SET if type(value) is set else codes.FROZENSET
        return Tag(code, [ListNode(found)], single=True)

    def _ordered(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        parts: list[Node] = [self._entries(value, trail, depth, in_key)]
        metadata = getattr(value, "_metadata", None)
        if metadata is not None:
            parts.append(self._node(metadata, (trail, "_metadata"), depth + 1, in_key))
        return Tag(codes.ORDERED_DICT, parts)

    def _defaultdict(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        factory = value.default_factory
        name = None if factory is None else getattr(factory, "__name__", "")
        if name is not None and values.FACTORIES.get(name) is not factory:
            return self._refuse(
                trail, f"defaultdict with factory {factory!r}; only {', '.join(values.FACTORIES)} or None"
            )
        return Tag(codes.DEFAULT_DICT, [self._leaf(encode(name)), self._entries(value, trail, depth, in_key)])

    def _counter(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        return Tag(codes.COUNTER, [self._entries(value, trail, depth, in_key)], single=True)

    def _deque(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        return Tag(codes.DEQUE, [self._leaf(encode(value.maxlen)), self._items(value, trail, depth, in_key)])

    def _slice(self, value: slice, trail: _Trail, depth: int, in_key: bool) -> Node:
        return Tag(
            codes.SLICE, [self._key(part, trail, depth) for part in (value.start, value.stop, value.step)]
        )

    def _namespace(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        code = values.namespace_code(value) or 0
        return Tag(code, [self._entries(vars(value), trail, depth + 1, in_key)], single=True)

    def _config(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        plain = configs.plain(value)
        self._kept.append(plain)
        return self._node(plain, trail, depth, in_key)

    def _dataclass(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        if isinstance(value, values.DataclassValue):
            name, fields = value.type, value.fields
        else:
            name = values.type_name(type(value))
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        self._kept.append(fields)
        inner = self._entries(fields, trail, depth + 1, in_key)
        return Tag(codes.DATACLASS, [self._leaf(encode(name)), inner])

    def _tensor_subclass(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        if in_key:
            return self._refuse(trail, "tensor as a key or in a set")
        head = self._fields([value.type, list(value.shape), value.flags])
        parts = [
            (encode(name), self._node(part, (trail, name), depth + 1)) for name, part in value.parts.items()
        ]
        context = self._node(value.context, (trail, None), depth + 1)
        return Tag(codes.TORCH_SUBCLASS, [*head, MapNode(parts), context])

    def _expand(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        if in_key:
            return self._refuse(trail, f"{type(value).__name__} as a key or in a set")
        # Before anything of the object is called: its state_dict() may wait for other processes.
        torch_objects.refuse_sharded(value, lambda: _path(trail))
        if is_last(value):
            return self._deferred(lambda: self._expanded(value, trail, depth))
        return self._expanded(value, trail, depth)

    def _expanded(self, value: Any, trail: _Trail, depth: int) -> Node:
        expanded = value.state_dict()
        if torch_tensors.is_module(value):
            try:
                expanded = torch_objects.unwrapped(value, expanded)
            except InvalidError as error:
                return self._refuse(trail, str(error))
        self._kept.append(expanded)
        # The object's own trail: its tree is the tree of the dict, whatever made it.
        self._expanding += 1
        try:
            if self._expanding > codes.MAX_DEPTH:
                return self._refuse(trail, f"{type(value).__name__} whose state_dict() leads ever deeper")
            return self._node(expanded, trail, depth)
        finally:
            self._expanding -= 1

    # -- tensors ----------------------------------------------------------------------------------

    def _array(self, value: Any, trail: _Trail, in_key: bool) -> Node:
        captured = capture(value)
        if captured is None:
            return self._refuse(trail, why_not(value.dtype))
        if in_key:
            return self._refuse(trail, "array as a key or in a set")
        spec, raw = captured
        return self._tensor(trail, spec, raw, ArraySource(raw, unit(spec.dtype, spec.item), spec.swap))

    def _memmap(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        return self._array(value, trail, in_key)

    def _tensor(self, trail: _Trail, spec: Spec, raw: Raw, source: Source) -> TensorNode:
        node = TensorNode(spec, self._content(spec.nbytes, [source], trail, spec.dtype, spec.shape))
        self._tensors.append((node, raw))
        return node

    def _torch(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        torch_objects.refuse_sharded(value, lambda: _path(trail))
        if not in_key and (apart := torch_tensors.subclass(value)):
            self._kept.append(apart)
            stand_in = values.TensorSubclassValue(*apart)
            return self._node(stand_in, trail, depth)
        why = "tensor as a key or in a set" if in_key else torch_tensors.why_not(value)
        if why:
            return self._refuse(trail, why)
        sparse = torch_tensors.sparse(value)
        if sparse:
            layout, flags, parts = sparse
            head = [layout, list(value.shape), flags]
            return Tag(codes.SPARSE, [*self._fields(head), self._parts(parts, trail)])
        quantized = torch_tensors.quantized(value)
        if quantized:
            name, scheme, flags, axis, parts = quantized
            head = [name, scheme, flags, axis]
            return Tag(codes.QUANTIZED, [*self._fields(head), self._parts(parts, trail)])
        frozen = self._frozen is not None and self._frozen(_path(trail))
        witness = torch_tensors.witness(value) if frozen else None
        return self._tensor(trail, *self._captures.dense(value, witness))

    def _fields(self, fields: Sequence[Any]) -> list[Node]:
        return [Leaf(encode(field)) for field in fields]

    def _parts(self, parts: Mapping[str, Any], trail: _Trail) -> MapNode:
        self._counted(trail, len(parts))
        self._kept.append(parts)
        return MapNode(
            [
                (
                    encode(name),
                    self._tensor((trail, name), *self._captures.dense(part))
                    if torch_tensors.is_tensor(part)
                    else self._leaf(encode(part)),
                )
                for name, part in parts.items()
            ]
        )

    def _generator(self, value: Any, trail: _Trail, depth: int, in_key: bool) -> Node:
        if in_key:
            return self._refuse(trail, "generator as a key or in a set")

        def look() -> Node:
            device, state = torch_tensors.generator_state(value) or ("", None)
            self._kept.append(state)
            return Tag(
                codes.TORCH_GENERATOR,
                [self._leaf(encode(device)), self._tensor((trail, "state"), *self._captures.dense(state))],
            )

        return self._deferred(look)


_Handler: TypeAlias = Callable[[Builder, Any, _Trail, int, bool], Node]

_HANDLERS: Final[dict[type, _Handler]] = {
    str: Builder._text,
    bytes: Builder._text,
    bytearray: Builder._text,
    list: Builder._list,
    dict: Builder._dict,
    tuple: Builder._tuple,
    set: Builder._set,
    frozenset: Builder._set,
    collections.OrderedDict: Builder._ordered,
    collections.defaultdict: Builder._defaultdict,
    collections.Counter: Builder._counter,
    collections.deque: Builder._deque,
    slice: Builder._slice,
    values.EnumValue: Builder._enum,
    values.DataclassValue: Builder._dataclass,
    values.TensorSubclassValue: Builder._tensor_subclass,
    np.memmap: Builder._memmap,
} | dict.fromkeys(values.LEAF_TYPES, Builder._plain)

_CONTAINERS: Final = {
    Builder._list,
    Builder._dict,
    Builder._tuple,
    Builder._namedtuple,
    Builder._set,
    Builder._ordered,
    Builder._defaultdict,
    Builder._counter,
    Builder._deque,
    Builder._namespace,
    Builder._dataclass,
    Builder._tensor_subclass,
    Builder._expand,
}


def flat_encoding(value: Any) -> bytes | None:
    """The encoding of a value that holds no tensors, all in one piece; None if it cannot be stored so."""
    builder = Builder(GRIDS[1])  # any: nothing is cut
    encoded = builder._key(value, None, 0).encoded
    return None if builder._errors else encoded


def _handler(value: Any) -> _Handler | None:
    """What to do with a type that is not known by its exact class."""
    if isinstance(value, Given):
        return Builder._given
    if isinstance(value, enum.Enum):
        return Builder._enum
    if torch_tensors.is_tensor(value):
        return Builder._torch
    if isinstance(value, np.generic):
        return Builder._scalar
    if isinstance(value, np.dtype):
        return Builder._dtype
    if torch_tensors.leaf(value) is not None:
        return Builder._torch_leaf
    if torch_tensors.generator_state(value) is not None:
        return Builder._generator
    if generators.is_generator(value):
        return Builder._random
    if values.is_namedtuple(value):
        return Builder._namedtuple
    if values.namespace_code(value) is not None:
        return Builder._namespace
    if configs.is_config(value):
        return Builder._config
    if not isinstance(value, type):
        if callable(getattr(value, "state_dict", None)):
            return Builder._expand
        if dataclasses.is_dataclass(value):
            return Builder._dataclass
    return None


def _is_component(value: Any) -> bool:
    """Whether a top-level entry among many is worth a section of its own."""
    return isinstance(value, (dict, list, tuple)) or callable(getattr(value, "state_dict", None))


_SUBCLASSES: Final = {
    str: "str()",
    bytes: "bytes()",
    bool: "bool()",
    int: "int()",
    float: "float()",
    complex: "complex()",
    dict: "dict()",
    list: "list()",
    tuple: "tuple()",
    set: "set()",
    np.ndarray: "np.asarray()",
}


def _why_unsupported(value: object) -> str:
    kind = type(value)
    if isinstance(value, type):
        return f"class {value.__qualname__}"
    if callable(value) and hasattr(value, "__code__"):
        return f"function {getattr(value, '__qualname__', '')}"
    for base, convert in _SUBCLASSES.items():
        if isinstance(value, base):
            return f"{kind.__name__}, a subclass of {base.__name__}; convert it with {convert}"
    if torch_tensors.is_storage(value):
        return f"torch storage {kind.__name__}; store a tensor over it"
    if callable(value):
        return f"callable {kind.__qualname__}"
    return f"class {kind.__qualname__} has no state_dict()"
