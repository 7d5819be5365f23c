"""A prepared tree as one plain value and back: how it gets to the process that stores it.

Nodes are written in the order in which they are made, each behind its children, so that depth costs
nothing. A node is a list that begins with what it is; a leaf is its encoding, alone in a list if it is a
number. Content is a number, counted in the order of `Prepared.contents`, or its bytes if it is inline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ckptvcs.ids import Buffer
from ckptvcs.state.build import Place
from ckptvcs.state.nodes import (
    Content,
    Data,
    Deferred,
    Leaf,
    ListNode,
    MapNode,
    Node,
    Row,
    Tag,
    TensorFile,
)
from ckptvcs.state.staging import Spot
from ckptvcs.state.tensors import BytesSource
from ckptvcs.state.tree import Prepared, refuse_deep
from ckptvcs.store.format import Grid

_DATA: Final = 0
_TAG: Final = 1
_LIST: Final = 2
_MAP: Final = 3
_ROW: Final = 4
_TENSOR_FILE: Final = 5


@refuse_deep
def plain(prepared: Prepared, spots: Sequence[Spot]) -> dict[str, Any]:
    """A tree as text, bytes, numbers, lists and dicts. `spots` says where its sources lie, in order."""
    numbers: dict[int, int] = {}
    contents: dict[str, list[Any]] = {}
    place_of = iter(spots)
    for component, entries in prepared.contents.items():
        contents[component] = found = []
        for place, content in entries:
            numbers[id(content)] = len(numbers)
            lies = [list(next(place_of)) for _ in content.sources]
            found.append([place.path, place.dtype, list(place.shape), content.nbytes, lies])
    nodes: dict[str, list[Any]] = {}
    for name, node in prepared.nodes.items():
        nodes[name] = []
        _write(node, numbers, nodes[name])
    return {"nodes": nodes, "contents": contents, "sizes": prepared.sizes}


def _write(node: Node, numbers: dict[int, int], out: list[Any]) -> None:
    if isinstance(node, Leaf):
        out.append([node.encoded] if node.number else node.encoded)
    elif isinstance(node, Deferred):
        _write(node.node, numbers, out)
    elif isinstance(node, TensorFile):
        _write(node.tensors, numbers, out)
        out.append([_TENSOR_FILE, node.fields, _kept(node.content, numbers)])
    elif isinstance(node, Data):
        out.append([_DATA, node.code, node.fields, _kept(node.content, numbers)])
    elif isinstance(node, Row):
        for child in node.children:
            _write(child, numbers, out)
        out.append([_ROW, len(node.children)])
    elif isinstance(node, Tag):
        for child in node.children:
            _write(child, numbers, out)
        out.append([_TAG, node.code, node.single, len(node.children)])
    elif isinstance(node, ListNode):
        for item in node.items:
            _write(item, numbers, out)
        out.append([_LIST, len(node.items)])
    elif isinstance(node, MapNode):
        for _, child in node.entries:
            _write(child, numbers, out)
        out.append([_MAP, [key for key, _ in node.entries]])
    else:
        raise TypeError(f"{type(node).__name__} is a node of an unknown kind")


def _kept(content: Content, numbers: dict[int, int]) -> bytes | int:
    return content.inline if content.inline is not None else numbers[id(content)]


class _Staged(BytesSource):
    """A source's bytes in the shared memory."""

    def __init__(self, data: Buffer, element_size: int) -> None:
        super().__init__(data)
        self.element_size = element_size


def prepared(value: dict[str, Any], memory: memoryview, grid: Grid) -> Prepared:
    """The inverse of `plain`: a tree whose content lies in `memory`."""
    contents: dict[str, list[tuple[Place, Content]]] = {}
    numbered: list[Content] = []
    for component, entries in value["contents"].items():
        contents[component] = []
        for path, dtype, shape, nbytes, spots in entries:
            staged = [_Staged(memory[at : at + size], element) for at, size, element in spots]
            content = Content(nbytes, staged, grid)
            numbered.append(content)
            contents[component].append((Place(path, dtype, tuple(shape)), content))
    nodes = {name: _read(program, numbered, grid) for name, program in value["nodes"].items()}
    return Prepared(nodes, contents, value["sizes"])


def _read(program: list[Any], numbered: list[Content], grid: Grid) -> Node:
    made: list[Node] = []

    def last(count: int) -> list[Node]:
        found = made[len(made) - count :]
        del made[len(made) - count :]
        return found

    def content_of(kept: bytes | int) -> Content:
        return Content(len(kept), [BytesSource(kept)], grid) if isinstance(kept, bytes) else numbered[kept]

    for step in program:
        if type(step) is bytes:
            made.append(Leaf(step))
            continue
        what = step[0]
        if type(what) is bytes:
            made.append(Leaf(what, True))
        elif what == _DATA:
            made.append(Data(step[1], step[2], content_of(step[3])))
        elif what == _TENSOR_FILE:
            (tensors,) = last(1)
            assert isinstance(tensors, MapNode)
            made.append(TensorFile(step[1], content_of(step[2]), tensors))
        elif what == _ROW:
            made.append(Row(last(step[1])))
        elif what == _TAG:
            made.append(Tag(step[1], last(step[3]), step[2]))
        elif what == _LIST:
            made.append(ListNode(last(step[1])))
        else:
            made.append(MapNode(list(zip(step[1], last(len(step[1])), strict=True))))
    (root,) = made
    return root
