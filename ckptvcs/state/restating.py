"""Stored nodes as parts of a state that is to be stored: what they hold goes by its ids and is not read.

`restated` gives a value for `build.Builder`; what it makes of that is the node that was stored, to the byte.
Tensors are noted as they are built, because their place in shared memory is known once all of them are
(`Tensors.settle`): groups of several trees that have become one are numbered anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from ckptvcs.canonical import Tagged, encode
from ckptvcs.ids import ObjectId
from ckptvcs.state import codes, paths
from ckptvcs.state.build import Builder, Given, Trail
from ckptvcs.state.interface import Source
from ckptvcs.state.nodes import Data, KeptContent, Leaf, MapNode, Node, Row, Tag, TensorFile, TensorNode
from ckptvcs.state.read import (
    Branch,
    Compound,
    Content,
    Stored,
    StoredBlob,
    StoredFile,
    StoredLeaf,
    StoredLink,
    StoredRandom,
    StoredTensor,
    StoredTorch,
)
from ckptvcs.state.tensors import dense_order_of

KEPT_COMPOUNDS: Final = ("sparse", "quantized", "generator")
"""Values made of several nodes that only torch could build: they are restated node by node."""


@dataclass(slots=True)
class Tensors:
    """The tensors of a state that is being built, in order: their nodes, and the tree each layout is from."""

    placed: list[tuple[TensorNode, StoredTensor, int]] = field(default_factory=list)

    def settle(self) -> None:
        """Give each its layout. Members of a group that is left with one share nothing any more."""
        counts: dict[tuple[int, int], int] = {}
        for _, tensor, origin in self.placed:
            if tensor.alias is not None:
                key = origin, tensor.alias.group
                counts[key] = counts.get(key, 0) + 1
        numbers: dict[tuple[int, int], int] = {}
        for node, tensor, origin in self.placed:
            alias, order, spec = tensor.alias, tensor.order, tensor.spec
            if alias is not None:
                key = origin, alias.group
                if counts[key] == 1:
                    if alias.strides is not None:
                        order = dense_order_of(spec.shape, alias.strides, spec.item)
                    alias = None
                else:
                    alias = dataclasses.replace(alias, group=numbers.setdefault(key, len(numbers)))
            node.set_layout(order, alias)


@dataclass(slots=True, eq=False)
class GivenTensor(Given):
    """A stored tensor, or with `source` another of its kind whose bytes are computed while they are stored.

    Attributes:
        tensor: dtype, shape, flags and layout; and the content if there is no source.
        origin: the tree it is from, as a number: groups that share memory are told apart by it.
    """

    tensor: StoredTensor
    origin: int
    tensors: Tensors
    source: Source | None = None

    def node(self, builder: Builder, trail: Trail) -> TensorNode:
        spec = self.tensor.spec
        if self.source is None:
            content = builder.given_content(kept(self.tensor.content))
        else:
            content = builder.given_source(spec, self.source, trail)
        made = TensorNode(spec, content)
        self.tensors.placed.append((made, self.tensor, self.origin))
        return made


@dataclass(slots=True, eq=False)
class _GivenLeaf(Given):
    code: int
    plain: Any

    def node(self, builder: Builder, trail: Trail) -> Node:
        return builder.given_leaf(encode(Tagged(self.code, encode(self.plain))))


@dataclass(slots=True, eq=False)
class _GivenBlob(Given):
    blob: StoredBlob

    def node(self, builder: Builder, trail: Trail) -> Node:
        content = self.blob.content
        fields = [encode(self.blob.kind), encode(content.nbytes)]
        return Data(codes.BLOB, fields, builder.given_content(kept(content)))


@dataclass(slots=True, eq=False)
class _GivenCompound(Given):
    compound: Compound
    parts: dict[str, Any]

    def node(self, builder: Builder, trail: Trail) -> Node:
        made = self.compound
        nodes = {name: builder.given_value(part, (trail, name), 1) for name, part in self.parts.items()}
        if made.kind == "generator":
            return Tag(codes.TORCH_GENERATOR, [builder.given_leaf(encode(made.about[0])), nodes["state"]])
        if made.kind == "sparse":
            layout, flags = made.about
            code, fields = codes.SPARSE, [layout, list(made.shape), flags]
        else:
            code, fields = codes.QUANTIZED, [made.dtype, *made.about]
        below = MapNode([(encode(name), node) for name, node in nodes.items()])
        return Tag(code, [*(Leaf(encode(each)) for each in fields), below])


def kept(content: Content) -> KeptContent:
    """Content as it is stored."""
    return KeptContent(content.nbytes, content.inline, content.chunks or (), content.chunk_list)


def restated(node: Stored, origin: int, tensors: Tensors) -> Any:
    """The value of a node, with parts that make their own nodes where content is."""
    if isinstance(node, StoredTensor):
        return GivenTensor(node, origin, tensors)
    if isinstance(node, StoredBlob):
        return _GivenBlob(node)
    if isinstance(node, (StoredTorch, StoredRandom)):
        return _GivenLeaf(node.code, node.plain)
    if isinstance(node, StoredLeaf):
        return node.value
    assert isinstance(node, Branch)
    children = [restated(child, origin, tensors) for child in node.children]
    if isinstance(node, Compound) and node.kind in KEPT_COMPOUNDS:
        return _GivenCompound(node, dict(zip(node.keys, children, strict=True)))
    return node.make(node.keys, children)


def contents_of(path: str, node: Stored) -> Iterator[tuple[str, Content]]:
    """All content of a node, by path."""
    if isinstance(node, (StoredTensor, StoredBlob, StoredFile)):
        yield path, node.content
        for each in node.tensors if isinstance(node, StoredFile) else ():
            yield paths.join(path, each.name), each.tensor.content
    elif isinstance(node, Branch):
        for key, child in zip(node.keys, node.children, strict=True):
            yield from contents_of(paths.join(path, paths.name(key)), child)


# -- files -----------------------------------------------------------------------------------------------


def restated_files(folder: dict[str, Any], builder: Builder, enter: Callable[[str], None] | None) -> MapNode:
    """The node of a folder of stored files; `enter` is told the name of each entry at the top."""
    found: list[tuple[bytes, Node]] = []
    for name, entry in folder.items():
        if enter is not None:
            enter(name)
        if isinstance(entry, dict):
            found.append((encode(name), restated_files(entry, builder, None)))
        elif isinstance(entry, StoredLink):
            found.append((encode(name), Leaf(encode(Tagged(codes.LINK, encode(entry.target))))))
        else:
            found.append((encode(name), _file(entry, builder)))
    return MapNode(found)


def _file(entry: StoredFile, builder: Builder) -> Node:
    content = builder.given_content(kept(entry.content))
    fields = [encode(field) for field in (entry.size, entry.mode, entry.digest)]
    if not entry.tensors:
        return Data(codes.FILE, [*fields, encode(entry.splitter)], content)
    inside: list[tuple[bytes, Node]] = []
    for each in entry.tensors:
        node = TensorNode(each.tensor.spec, builder.given_content(kept(each.tensor.content)))
        node.set_layout(each.tensor.order, None)
        inside.append((encode(each.name), Row([Leaf(encode(each.before)), node])))
    return TensorFile([*fields, encode(entry.format)], content, MapNode(inside))


def ids_of(content: Content) -> tuple[ObjectId, ...]:
    """The records that content names: its chunks, or the chunk list that does."""
    return content.chunks or () if content.chunk_list is None else (content.chunk_list,)
