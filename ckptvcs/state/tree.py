"""States and files <-> trees: what the rest of the program calls.

`codes` describes the encoding, normatively; `build` turns Python values into nodes, `nodes` cuts them
into objects, `read` does the reverse.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar

from ckptvcs.canonical import encode, encoded_map, encoded_tag
from ckptvcs.errors import NotFoundError, UnsupportedStateError
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.state import codes, generators, paths
from ckptvcs.state.bases import FILES, INSIDE, Bases, Held, alike
from ckptvcs.state.build import MAX_COMPONENTS, Builder, FileContent, Folder, LinkContent, Place
from ckptvcs.state.interface import ObjectReader, ObjectWriter, Source
from ckptvcs.state.materialise import Devices, Materialiser, resolve
from ckptvcs.state.nodes import Content, Context, Node, Trees
from ckptvcs.state.parameters import parameter_names
from ckptvcs.state.read import (
    Branch,
    Compound,
    Loader,
    Stored,
    StoredBlob,
    StoredFile,
    StoredLeaf,
    StoredLink,
    StoredRandom,
    StoredTensor,
    StoredTorch,
)
from ckptvcs.state.read import Content as StoredContent
from ckptvcs.store.format import GRIDS, Grid
from ckptvcs.store.hints import Hint

__all__ = [
    "ABSENT",
    "Entry",
    "FileContent",
    "Folder",
    "LinkContent",
    "Parts",
    "Prepared",
    "Reached",
    "StoredFile",
    "StoredLink",
    "Written",
    "above",
    "check",
    "entries",
    "files",
    "load",
    "parts",
    "prepare",
    "reached",
    "read",
    "refuse_deep",
    "sizes",
    "store",
    "write",
]


_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Absent:
    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final = _Absent()
"""Says that a tree has no state at all (None is a state)."""


def refuse_deep(follow: Callable[_P, _R]) -> Callable[_P, _R]:
    """Values are followed by recursion, for which a caller deep in calls of its own may have left no room."""

    @functools.wraps(follow)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return follow(*args, **kwargs)
        except RecursionError:
            why = "nested too deeply to be followed from here; see sys.setrecursionlimit"
            raise UnsupportedStateError([("", why)]) from None

    return guarded


class Prepared(NamedTuple):
    """A tree whose content is not stored yet. All of it but the content is a copy.

    Attributes:
        nodes: the node of each part: "state", "files".
        contents: what has to be stored and what it is, by component, in order.
        sizes, kept: as in `Written`.
    """

    nodes: dict[str, Node]
    contents: dict[str, list[tuple[Place, Content]]]
    sizes: dict[str, int]
    kept: Mapping[str, int] = MappingProxyType({})


class Written(NamedTuple):
    """What `store` made.

    Attributes:
        tree: id of the root tree.
        sizes: logical bytes by component: the name of a top-level entry, or "" for what lies in none.
        held: its content that was stored, for the bases of the next tree.
        kept: of `sizes`, the bytes of content that was stored before and is known by its ids alone.
    """

    tree: ObjectId
    sizes: dict[str, int]
    held: dict[str, Held]
    kept: Mapping[str, int] = MappingProxyType({})


@refuse_deep
def prepare(
    grid: Grid,
    state: Any = ABSENT,
    files: Folder | None = None,
    frozen: Callable[[str], bool] | None = None,
) -> Prepared:
    """A state, files, or both, looked at and not stored. Numbers, text and tensors small enough to live in
    the tree are copied; larger memory is referred to, and read when the sources of `contents` are.

    Up to `build.MAX_COMPONENTS` top-level entries are a component each; of a longer dict only those that
    are containers, and the rest share the component "". A state that is no dict is one component "".

    `frozen` names tensors that carry a witness (`ArraySource.witness`).

    UnsupportedStateError lists all leaves that cannot be stored.
    """
    builder = Builder(grid, frozen)
    nodes: dict[str, Node] = {}
    if state is not ABSENT:
        nodes["state"] = builder.state(state)
    if files is not None:
        nodes["files"] = builder.files(files)
    sizes = {name: size for name, size in builder.sizes.items() if name or size}
    return Prepared(nodes, builder.contents, sizes)


@refuse_deep
def store(writer: ObjectWriter, prepared: Prepared, bases: Bases | None = None) -> Written:
    """Store a prepared tree. What lies at the same place in `bases` may serve to store it smaller.

    The memory behind it is read while this runs and must not change. Its sources are gone afterwards.
    """
    held: dict[str, Held] = {}
    for component, contents in prepared.contents.items():
        if contents:
            writer.section(component)
            held |= _store(writer, contents, bases)
    writer.section("")
    trees = Trees(writer)
    context = Context(trees)
    encoded = []
    for name, node in prepared.nodes.items():
        node.weigh(trees.grid)
        encoded.append((encode(name), node.emit(context)))
    root = trees.put(Kind.TREE, context.references, encoded_tag(codes.ROOT, encoded_map(encoded)))
    trees.flush()
    return Written(root, prepared.sizes, held, prepared.kept)


def write(
    writer: ObjectWriter, state: Any = ABSENT, files: Folder | None = None, bases: Bases | None = None
) -> Written:
    """`prepare` and `store` in one. UnsupportedStateError comes before anything is written."""
    return store(writer, prepare(writer.grid, state, files), bases)


@refuse_deep
def check(state: Any) -> None:
    """UnsupportedStateError, listing all leaves, if `write` would refuse the state. Stores nothing."""
    prepare(GRIDS[1], state)  # any grid does: what can be stored does not depend on it


def _store(
    writer: ObjectWriter, contents: Sequence[tuple[Place, Content]], bases: Bases | None
) -> dict[str, Held]:
    sources: list[Source] = []
    hints: list[Hint] = []
    for place, content in contents:
        sources += content.sources
        hints += [_hint(place, bases, writer.grid.chunk) for _ in content.sources]
    found = iter(writer.put(sources, hints))
    held = {}
    for place, content in contents:
        content.ids = tuple(id for _ in content.sources for id in next(found))
        content.sources = ()
        held[place.path] = Held(place.dtype, place.shape, content.ids)
    return held


def _hint(place: Place, bases: Bases | None, cell: int) -> Hint:
    def base(offset: int) -> ObjectId | None:
        chunks = () if bases is None else bases.find(*place)
        return chunks[offset // cell] if offset // cell < len(chunks) else None

    return Hint(place._replace(path=alike(place.path)), place.dtype, base)


@refuse_deep
def held(reader: ObjectReader, tree: ObjectId) -> dict[str, Held]:
    """The content of a tree that lies in chunks, by path, as `write` gives it."""
    loader = Loader(reader)
    opened, found = loader.root(tree)
    contents: list[tuple[Place, Stored]] = []
    for part, start in (("state", ""), ("files", FILES)):
        if part in found:
            _list_contents(start, loader.node(found[part], opened, paths.EVERYTHING), contents)
    inner = [(place, node.content) for place, node in contents if hasattr(node, "content")]
    resolve(reader, [content for _, content in inner])
    return {
        place.path: Held(place.dtype, place.shape, content.chunks)
        for place, content in inner
        if content.chunks
    }


class Reached(NamedTuple):
    """What a tree holds outside of some components.

    Attributes:
        state: the stored nodes of the state; None if there is none.
        contents: what lies outside of tree objects, by path, that of files behind `FILES`.
    """

    state: Stored | None
    contents: list[tuple[str, StoredContent]]


@refuse_deep
def reached(reader: ObjectReader, tree: ObjectId, without: Sequence[str] = ()) -> Reached:
    """Look at a tree, but not at what lies in the components `without`, which need not be stored. Reads no
    chunk and no chunk list."""
    loader = Loader(reader)
    opened, found = loader.root(tree)
    state: Stored | None = None
    places: list[tuple[Place, Stored]] = []
    for part, start in (("state", ""), ("files", FILES)):
        if part in found:
            selection = paths.all_but(without, files=part == "files")
            node = loader.node(found[part], opened, selection)
            _list_contents(start, node, places)
            state = node if part == "state" else state
    outside = [
        (place.path, node.content)
        for place, node in places
        if isinstance(node, (StoredTensor, StoredBlob, StoredFile)) and node.content.inline is None
    ]
    return Reached(state, outside)


def _list_contents(path: str, node: Stored, found: list[tuple[Place, Stored]]) -> None:
    if isinstance(node, StoredTensor):
        found.append((Place(path, node.spec.dtype, node.spec.shape), node))
    elif isinstance(node, (StoredBlob, StoredFile)):
        found.append((Place(path, "", ()), node))
        for each in node.tensors if isinstance(node, StoredFile) else ():
            _list_contents(path + INSIDE + each.name, each.tensor, found)
    elif isinstance(node, Branch):
        for key, child in zip(node.keys, node.children, strict=True):
            _list_contents(paths.join(path, paths.name(key)), child, found)


class Parts(NamedTuple):
    """What a tree holds."""

    state: bool
    files: bool


def parts(reader: ObjectReader, tree: ObjectId) -> Parts:
    """Which parts a tree has."""
    _, found = Loader(reader).root(tree)
    return Parts("state" in found, "files" in found)


@refuse_deep
def load(
    reader: ObjectReader,
    tree: ObjectId,
    only: str | Sequence[str] | None = None,
    without: Sequence[str] = (),
) -> Stored:
    """The stored nodes of a state, without any content. NotFoundError if there is none, or no match.

    Components in `without` are not looked at, so that they need not be stored. Only where nothing is
    selected by `only`.
    """
    loader = Loader(reader)
    opened, found = loader.root(tree)
    if "state" not in found:
        raise NotFoundError("this commit holds files and no state", hint="check out its files instead")
    patterns = paths.Patterns(only)
    selection = paths.all_but(without) if only is None else patterns.start()
    stored = loader.node(found["state"], opened, selection)
    # Only a miss pays for reading the names of everything.
    if not patterns.complete:
        patterns.check(known_paths(loader.node(found["state"], opened, paths.EVERYTHING)))
    return stored


def known_paths(stored: Stored) -> list[str]:
    """All paths in a state, containers included."""
    found: list[str] = []

    def walk(path: str, node: Stored) -> None:
        if isinstance(node, Branch) and not isinstance(node, Compound):
            for key, child in zip(node.keys, node.children, strict=True):
                below = paths.join(path, paths.name(key))
                found.append(below)
                walk(below, child)

    walk("", stored)
    return found


@refuse_deep
def read(
    reader: ObjectReader,
    tree: ObjectId,
    only: str | Sequence[str] | None = None,
    framework: str | None = None,
    device: Devices = None,
) -> Any:
    """The state of a tree, or the part that `only` selects, in its nesting.

    Reads nothing but what it returns. Tensors that shared memory share it again.

    Args:
        only: a pattern or several (`paths`); a list keeps the selected items in order.
        framework: "numpy" or "torch" converts all tensors; None gives what was stored.
        device: for torch tensors: a device, or a mapping of path pattern to device, first match.

    Raises:
        NotFoundError: a pattern matches nothing.
        InvalidError: torch is needed and not installed, or a dtype has no counterpart (names the path).
        CorruptionError: the tree is damaged.
    """
    stored = load(reader, tree, only)
    return Materialiser(reader, framework, device).values([("", stored)])[0]


@refuse_deep
def files(
    reader: ObjectReader,
    tree: ObjectId,
    only: str | Sequence[str] | None = None,
    without: Sequence[str] = (),
) -> dict[str, StoredFile | StoredLink]:
    """The files of a tree by path, without their content; {} if it has none. Without `only`, components in
    `without` are not looked at."""
    loader = Loader(reader)
    opened, found = loader.root(tree)
    if "files" not in found:
        return {}
    patterns = paths.Patterns(only)
    result: dict[str, StoredFile | StoredLink] = {}
    selection = paths.all_but(without, files=True) if only is None else patterns.start()
    stored = loader.node(found["files"], opened, selection)
    _list_files("", stored, result)
    if not patterns.complete:
        everything: dict[str, StoredFile | StoredLink] = {}
        _list_files("", loader.node(found["files"], opened, paths.EVERYTHING), everything)
        patterns.check(everything)
    return result


def _list_files(path: str, node: Stored, found: dict[str, StoredFile | StoredLink]) -> None:
    if isinstance(node, (StoredFile, StoredLink)):
        found[path] = node
    elif isinstance(node, Branch):
        for key, child in zip(node.keys, node.children, strict=True):
            _list_files(f"{path}/{key}" if path else str(key), child, found)


# -- listing --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """A leaf as `ckpt ls` shows it.

    Attributes:
        path: its path (`paths`).
        kind: "tensor", "sparse", "quantized", "int", "str", "dict" (an empty one)...
        dtype: of a tensor, else None.
        shape: of a tensor, else None.
        nbytes: logical bytes.
        chunks: number of chunks; 0 when it lives in the tree.
        preview: a short text of a value that is read already, else "".
        parameter: the name of the parameter that an optimizer's entry belongs to, where it is known, else ""
            (`parameters`).
    """

    path: str
    kind: str
    dtype: str | None
    shape: tuple[int, ...] | None
    nbytes: int
    chunks: int
    preview: str
    parameter: str = ""


def entries(
    reader: ObjectReader,
    tree: ObjectId,
    only: str | Sequence[str] | None = None,
    without: Sequence[str] = (),
) -> Iterator[Entry]:
    """The leaves of a state in order, without reading chunks; nothing if the tree has no state. Components
    in `without` are not looked at."""
    if parts(reader, tree).state:
        stored = load(reader, tree, only, without)
        names = parameter_names(stored if only is None else load(reader, tree, without=without))
        for entry in _entries("", stored):
            name = above(entry.path, names)
            yield dataclasses.replace(entry, parameter=name) if name else entry


def above(path: str, names: Mapping[str, str]) -> str:
    """What `names` says of a path, or of the nearest one above it."""
    while names and path not in names:
        path, slash, _ = path.rpartition("/")
        if not slash:
            return ""
    return names.get(path, "")


def sizes(reader: ObjectReader, tree: ObjectId) -> dict[str, int]:
    """Logical bytes of a state by component, as `write` counts tensors, long text and bytes."""
    if not parts(reader, tree).state:
        return {}
    stored = load(reader, tree)
    found: dict[str, int] = {}
    if not isinstance(stored, Branch) or stored.kind not in ("dict", "OrderedDict", "defaultdict", "Counter"):
        return {"": sum(entry.nbytes for entry in _entries("", stored))}
    few = len(stored.keys) <= MAX_COMPONENTS
    for key, child in zip(stored.keys, stored.children, strict=True):
        container = isinstance(child, Branch) and not isinstance(child, Compound)
        name = paths.name(key) if few or container else ""
        found[name] = found.get(name, 0) + sum(entry.nbytes for entry in _entries("", child))
    return found


_PREVIEW: Final = 60


def _preview(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return f"{value.bit_length()} bits" if isinstance(value, int) else "numbers of thousands of digits"
    return text if len(text) <= _PREVIEW else text[: _PREVIEW - 1] + "…"


def _tensors_in(node: Branch) -> Iterator[StoredTensor]:
    for child in node.children:
        if isinstance(child, StoredTensor):
            yield child
        elif isinstance(child, Branch):
            yield from _tensors_in(child)


def _entries(path: str, node: Stored) -> Iterator[Entry]:
    if isinstance(node, StoredLeaf):
        yield Entry(path, node.kind, None, None, node.nbytes, 0, _preview(node.value))
    elif isinstance(node, StoredTorch):
        yield Entry(path, node.kind, None, None, 0, 0, str(node.plain))
    elif isinstance(node, StoredRandom):
        yield Entry(path, node.kind, None, None, node.nbytes, 0, generators.kind(node.code, node.plain))
    elif isinstance(node, StoredTensor):
        spec, cells = node.spec, node.content.cells or 0
        yield Entry(path, "tensor", spec.dtype, spec.shape, spec.nbytes, cells, "")
    elif isinstance(node, StoredBlob):
        yield Entry(path, node.kind, None, None, node.content.nbytes, node.content.cells or 0, "")
    elif isinstance(node, Compound):
        inner = list(_tensors_in(node))
        yield Entry(
            path,
            node.kind,
            node.dtype.rpartition(":")[2] or None,
            node.shape if node.dtype else None,
            sum(child.spec.nbytes for child in inner),
            sum(child.content.cells or 0 for child in inner),
            "",
        )
    elif isinstance(node, Branch):
        if not node.children:
            yield Entry(path, node.kind, None, None, 0, 0, _preview(node.make([], [])))
        for key, child in zip(node.keys, node.children, strict=True):
            yield from _entries(paths.join(path, paths.name(key)), child)
