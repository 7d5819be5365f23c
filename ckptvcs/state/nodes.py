"""Encoded nodes, and where a tree is cut into objects. `codes` has the normative description.

Nodes are built bottom-up from a state, get their chunk ids, and are then written in one pass: `weigh`
says what each node weighs whatever object it ends up in, so a node is encoded once, straight into the
object that it belongs to, with positions in that object's own reference table.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, Final

from ckptvcs.canonical import encode, encoded_array, encoded_map, encoded_tag
from ckptvcs.ids import ID_BYTES, Kind, ObjectId, digest, object_id
from ckptvcs.state import codes
from ckptvcs.state.interface import ObjectWriter, Source
from ckptvcs.state.tensors import Alias, Spec
from ckptvcs.store.format import Grid, pack_object

_BATCH: Final = 1024
_HEADER: Final = 8


class Context:
    """The reference table of an object under construction."""

    __slots__ = ("_positions", "_trees", "references")

    def __init__(self, trees: Trees | None) -> None:
        self.references: list[tuple[Kind, ObjectId]] = []
        self._positions: dict[tuple[Kind, ObjectId], int] = {}
        self._trees = trees

    @property
    def trees(self) -> Trees:
        """Where further objects go. A key's context has none, because keys refer to nothing."""
        assert self._trees is not None
        return self._trees

    def position(self, kind: Kind, id: ObjectId) -> int:
        """Where the table names this id; added at its end when new."""
        found = self._positions.setdefault((kind, id), len(self.references))
        if found == len(self.references):
            self.references.append((kind, id))
        return found


class Trees:
    """Writes objects in batches, what they refer to first."""

    def __init__(self, writer: ObjectWriter) -> None:
        self.grid: Grid = writer.grid
        self._writer = writer
        self._waiting: list[tuple[Kind, bytes]] = []

    def put(self, kind: Kind, references: list[tuple[Kind, ObjectId]], body: bytes) -> ObjectId:
        """The id of an object that is, or soon will be, stored."""
        payload = pack_object(references, body)
        self._waiting.append((kind, payload))
        if len(self._waiting) >= _BATCH:
            self.flush()
        return object_id(kind, payload)

    def flush(self) -> None:
        """Hand everything to the writer. Order is kept, so references stay ahead of referrers."""
        waiting, self._waiting = self._waiting, []
        start = 0
        for end in range(1, len(waiting) + 1):
            if end == len(waiting) or waiting[end][0] is not waiting[start][0]:
                self._writer.put_objects(waiting[start][0], [payload for _, payload in waiting[start:end]])
                start = end


class Node(abc.ABC):
    """An encoded value. `weight` holds once `weigh` has run."""

    __slots__ = ("weight",)
    weight: int

    def weigh(self, grid: Grid) -> int:
        """Compute and keep the weight of this node and all below."""
        return self.weight

    @abc.abstractmethod
    def emit(self, context: Context) -> bytes:
        """The encoding, for an object with this reference table."""


class Leaf(Node):
    """A value whose encoding needs no references."""

    __slots__ = ("encoded", "number")

    def __init__(self, encoded: bytes, number: bool = False) -> None:
        self.encoded = encoded
        self.number = number
        self.weight = len(encoded)

    def emit(self, context: Context) -> bytes:
        return self.encoded


class Deferred(Node):
    """Stands where `node` belongs, which is made after everything else."""

    __slots__ = ("node",)

    def __init__(self) -> None:
        self.node: Node = Leaf(b"")

    def weigh(self, grid: Grid) -> int:
        self.weight = self.node.weigh(grid)
        return self.weight

    def emit(self, context: Context) -> bytes:
        return self.node.emit(context)


class Content:
    """Bytes kept inline or as chunks. `ids` is set once the sources are stored."""

    __slots__ = ("ids", "inline", "nbytes", "sources")

    def __init__(self, nbytes: int, sources: Sequence[Source], grid: Grid) -> None:
        self.nbytes = nbytes
        self.sources = sources
        self.ids: tuple[ObjectId, ...] = ()
        self.inline: bytes | None = None
        if nbytes <= grid.inline:
            self.inline = b"".join(bytes(source.read(0, source.nbytes)) for source in sources if nbytes)
            self.sources = ()

    def weigh(self, grid: Grid) -> int:
        if self.inline is not None:
            return len(encode(self.inline))
        return codes.REFERENCE * (1 if len(self.ids) > grid.chunk_list else len(self.ids))

    def emit(self, context: Context) -> bytes:
        if self.inline is not None:
            return encode(self.inline)
        if len(self.ids) > context.trees.grid.chunk_list:
            # A chunk list has no body to name positions in, so it repeats equal chunks.
            id = context.trees.put(Kind.CHUNK_LIST, [(Kind.CHUNK, id) for id in self.ids], b"")
            return encode({"list": context.position(Kind.CHUNK_LIST, id)})
        return encode([context.position(Kind.CHUNK, id) for id in self.ids])


class KeptContent(Content):
    """Content that is stored already: in chunks, or in those of a chunk list that need not be read."""

    __slots__ = ("chunk_list",)

    def __init__(
        self, nbytes: int, inline: bytes | None, ids: tuple[ObjectId, ...], chunk_list: ObjectId | None
    ) -> None:
        self.nbytes = nbytes
        self.sources = ()
        self.ids = ids
        self.inline = inline
        self.chunk_list = chunk_list

    def weigh(self, grid: Grid) -> int:
        return super().weigh(grid) if self.chunk_list is None else codes.REFERENCE

    def emit(self, context: Context) -> bytes:
        if self.chunk_list is None:
            return super().emit(context)
        return encode({"list": context.position(Kind.CHUNK_LIST, self.chunk_list)})


class Data(Node):
    """A tagged node of some fields and content: a blob, a file."""

    __slots__ = ("code", "content", "fields")

    def __init__(self, code: int, fields: list[bytes], content: Content) -> None:
        self.code = code
        self.fields = fields
        self.content = content

    def weigh(self, grid: Grid) -> int:
        self.weight = _HEADER + sum(map(len, self.fields)) + self.content.weigh(grid)
        return self.weight

    def emit(self, context: Context) -> bytes:
        return encoded_tag(self.code, encoded_array([*self.fields, self.content.emit(context)]))


class TensorNode(Data):
    """A tensor; its layout is known once all memory of the state has been seen."""

    __slots__ = ("spec",)

    def __init__(self, spec: Spec, content: Content) -> None:
        super().__init__(codes.TENSOR, [], content)
        self.spec = spec

    def set_layout(self, order: list[int] | None, alias: Alias | None) -> None:
        """Say what the memory looked like. Sharing includes the layout."""
        spec = self.spec
        layout: Any = order
        if alias is not None:
            strides = None if alias.strides is None else list(alias.strides)
            layout = {"alias": [alias.group, alias.offset, strides]}
        self.fields = [
            encode(field) for field in (spec.framework, spec.dtype, list(spec.shape), spec.flags, layout)
        ]


class Row(Node):
    """Other nodes, one after the other."""

    __slots__ = ("children",)

    def __init__(self, children: Sequence[Node]) -> None:
        self.children = children

    def weigh(self, grid: Grid) -> int:
        self.weight = _HEADER + sum(child.weigh(grid) for child in self.children)
        return self.weight

    def emit(self, context: Context) -> bytes:
        return encoded_array([child.emit(context) for child in self.children])


class TensorFile(Data):
    """A file in which tensors lie; `content` is the rest of it."""

    __slots__ = ("tensors",)

    def __init__(self, fields: list[bytes], content: Content, tensors: MapNode) -> None:
        super().__init__(codes.TENSOR_FILE, fields, content)
        self.tensors = tensors

    def weigh(self, grid: Grid) -> int:
        self.weight = super().weigh(grid) + self.tensors.weigh(grid)
        return self.weight

    def emit(self, context: Context) -> bytes:
        # In the order of the fields, in which positions are given out.
        parts = [*self.fields, self.content.emit(context), self.tensors.emit(context)]
        return encoded_tag(self.code, encoded_array(parts))


class Tag(Node):
    """A tagged node around one other node, or an array of several."""

    __slots__ = ("children", "code", "single")

    def __init__(self, code: int, children: Sequence[Node], single: bool = False) -> None:
        self.code = code
        self.children = children
        self.single = single

    def weigh(self, grid: Grid) -> int:
        self.weight = _HEADER + sum(child.weigh(grid) for child in self.children)
        return self.weight

    def emit(self, context: Context) -> bytes:
        parts = [child.emit(context) for child in self.children]
        return encoded_tag(self.code, parts[0] if self.single else encoded_array(parts))


class _Container(Node):
    """A list or dict, which becomes a tree of its own when it is heavy."""

    __slots__ = ("heavy",)
    heavy: bool

    def _settle(self, weight: int, grid: Grid) -> int:
        self.heavy = weight > grid.subtree
        self.weight = codes.REFERENCE if self.heavy else weight
        return self.weight

    def emit(self, context: Context) -> bytes:
        if not self.heavy:
            return self.body(context)
        id = self.paged(context.trees)
        return encoded_tag(codes.SUBTREE, encode(context.position(Kind.TREE, id)))

    @abc.abstractmethod
    def body(self, context: Context) -> bytes:
        """All children in one value."""

    @abc.abstractmethod
    def paged(self, trees: Trees) -> ObjectId:
        """Write the container as trees; the id of the topmost."""


class ListNode(_Container):
    """A list of nodes."""

    __slots__ = ("items",)

    def __init__(self, items: Sequence[Node]) -> None:
        self.items = items

    def weigh(self, grid: Grid) -> int:
        return self._settle(_HEADER + sum(item.weigh(grid) for item in self.items), grid)

    def body(self, context: Context) -> bytes:
        return encoded_array([item.emit(context) for item in self.items])

    def paged(self, trees: Trees) -> ObjectId:
        grid = trees.grid
        numbers = all(type(item) is Leaf and item.number for item in self.items)
        step = grid.list_page * (16 if numbers else 1)
        pages = []
        for at in range(0, len(self.items), step):
            context = Context(trees)
            body = encoded_array([item.emit(context) for item in self.items[at : at + step]])
            pages.append(trees.put(Kind.TREE, context.references, body))
        level = 0
        while codes.REFERENCE * len(pages) > grid.subtree and level < codes.MAX_LEVEL:
            groups = [pages[at : at + grid.list_page] for at in range(0, len(pages), grid.list_page)]
            pages = [_page(trees, codes.LIST_PAGES, level, group) for group in groups]
            level += 1
        return pages[0] if len(pages) == 1 else _page(trees, codes.LIST_PAGES, level, pages)


class MapNode(_Container):
    """A dict of encoded keys and nodes."""

    __slots__ = ("entries",)

    def __init__(self, entries: Sequence[tuple[bytes, Node]]) -> None:
        self.entries = entries

    def weigh(self, grid: Grid) -> int:
        total = sum(len(key) + child.weigh(grid) for key, child in self.entries)
        return self._settle(_HEADER + total, grid)

    def body(self, context: Context) -> bytes:
        return encoded_map([(key, child.emit(context)) for key, child in self.entries])

    def paged(self, trees: Trees) -> ObjectId:
        modulus = trees.grid.map_page
        marks = [digest(key, ID_BYTES) for key, _ in self.entries]
        pages: list[tuple[bytes, ObjectId]] = []
        for first, last in _cuts(marks, 0, modulus):
            context = Context(trees)
            body = encoded_map([(key, child.emit(context)) for key, child in self.entries[first:last]])
            pages.append((marks[last - 1], trees.put(Kind.TREE, context.references, body)))
        level = 0
        while codes.REFERENCE * len(pages) > trees.grid.subtree and level < codes.MAX_LEVEL:
            pages = [
                (
                    pages[last - 1][0],
                    _page(trees, codes.MAP_PAGES, level, [id for _, id in pages[first:last]]),
                )
                for first, last in _cuts([mark for mark, _ in pages], level + 1, modulus)
            ]
            level += 1
        ids = [id for _, id in pages]
        return ids[0] if len(ids) == 1 else _page(trees, codes.MAP_PAGES, level, ids)


def _cuts(marks: Sequence[bytes], word: int, modulus: int) -> list[tuple[int, int]]:
    """Ranges of `marks` that end behind those whose `word` is divisible by `modulus`, or at the cap."""
    found, first = [], 0
    for at, mark in enumerate(marks, 1):
        cut = int.from_bytes(mark[4 * word : 4 * word + 4], "little") % modulus == 0
        if cut or at - first == 8 * modulus or at == len(marks):
            found.append((first, at))
            first = at
    return found


def _page(trees: Trees, code: int, level: int, ids: Sequence[ObjectId]) -> ObjectId:
    context = Context(trees)
    positions = [context.position(Kind.TREE, id) for id in ids]
    return trees.put(Kind.TREE, context.references, encoded_tag(code, encode([level, positions])))
