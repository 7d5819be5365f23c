"""Several trees made into one: parts of one or the other, and tensors that are averages (`averaging`).

Trees are gone through together, from the first on. At each place a side is chosen, by a pattern or because
all agree, or tensors are averaged, or there is a conflict. Conflicts are collected, and all of them refused
at once before anything is stored. What is chosen goes by its ids and is not read; averages are computed cell
by cell while they are stored.

Tensors that share memory in the first tree share it in the result. They have to be treated alike, or what is
read back would not fit into one memory: anything else is a conflict.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ckptvcs.errors import InvalidError, MergeConflictError, NotFoundError
from ckptvcs.ids import ObjectId
from ckptvcs.state import averaging, paths
from ckptvcs.state import tree as trees
from ckptvcs.state.averaging import MERGEABLE, Formula, MergedSource, is_same
from ckptvcs.state.bases import Bases
from ckptvcs.state.build import Builder
from ckptvcs.state.compare import same_value
from ckptvcs.state.interface import ObjectReader, ObjectWriter
from ckptvcs.state.materialise import resolve
from ckptvcs.state.nodes import Node
from ckptvcs.state.read import (
    Branch,
    Compound,
    Content,
    Loader,
    Stored,
    StoredFile,
    StoredTensor,
)
from ckptvcs.state.restating import GivenTensor, Tensors, contents_of, ids_of, restated, restated_files
from ckptvcs.state.side_by_side import value_of

_LISTS: Final = ("list", "tuple", "namedtuple", "deque")
"""Containers whose entries are counted: none may be missing before the last."""

_Entry = tuple[str, Any, list[Stored | None], Stored | None]


class _Nothing:
    def __repr__(self) -> str:
        return "NOTHING"


_NOTHING: Final = _Nothing()
"""What becomes of a place that is left out."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What becomes of each place.

    Attributes:
        formula: how tensors are averaged; None averages nothing.
        only: patterns of what is averaged; None for everything. The rest is that of the first tree.
        ours, theirs: patterns of what is taken from the first tree, and from the second.
        prefer: "ours" or "theirs" settles conflicts so; None refuses them.
    """

    formula: Formula | None = None
    only: Sequence[str] | None = None
    ours: Sequence[str] = ()
    theirs: Sequence[str] = ()
    prefer: str | None = None


@dataclass(slots=True)
class MergeReport:
    """What a merge did.

    Attributes:
        averaged: paths of tensors that were computed.
        kept: tensors taken over from the first tree.
        taken: tensors taken over from another.
        settled: conflicts that `prefer` settled: (path, why).
        overflowed: numbers of a finite average beyond the range of their dtype, by path.
    """

    averaged: list[str] = field(default_factory=list)
    kept: int = 0
    taken: int = 0
    settled: list[tuple[str, str]] = field(default_factory=list)
    overflowed: dict[str, int] = field(default_factory=dict)


@trees.refuse_deep
def merge(
    writer: ObjectWriter,
    reader: ObjectReader,
    sides: Sequence[ObjectId],
    base: ObjectId | None,
    rules: Rules,
    bases: Bases | None = None,
    *,
    missing: Callable[[Iterable[ObjectId]], set[ObjectId]] = lambda _: set(),
    lost: Sequence[Collection[str]] = (),
    refuse: Callable[[int, str], None] = lambda side, name: None,
    say: Callable[[str], None] | None = None,
) -> tuple[trees.Written, MergeReport]:
    """Store the tree that `rules` make of `sides`.

    `missing` says which records are not stored; none of them may be kept. `lost` names components that each
    side has no more; `refuse` is told a side and a component when it is wanted all the same. `say` is told
    the path of each tensor whose numbers are looked at before anything is stored.

    Raises:
        MergeConflictError: all places at which a side has to be chosen.
        NotFoundError: a pattern matches nothing, or content that was to be kept is gone.
        InvalidError: two patterns want one place from both sides.
    """
    lost = lost or [()] * len(sides)
    merging = _Merging(reader, sides, base, rules, lost, say)
    for side, names in enumerate(lost):
        for name in names:
            if merging.wants(side, name):
                refuse(side, name)
    prepared, sources, report = merging.prepared(writer)
    merging.check(missing)
    written = trees.store(writer, prepared, bases)
    report.overflowed = {
        path: count for path, source in sources.items() if (count := sum(source.overflowed.values()))
    }
    return written, report


@dataclass(slots=True)
class _Fate:
    """What becomes of a tensor.

    Attributes:
        side: where it is taken from; 0 if it is averaged.
        averaged: whether it is.
        equal: whether it is taken because all sides have the same, so that an average would be that, too.
    """

    side: int
    averaged: bool = False
    equal: bool = False


class _Merging:
    """Goes through trees together."""

    def __init__(
        self,
        reader: ObjectReader,
        sides: Sequence[ObjectId],
        base: ObjectId | None,
        rules: Rules,
        lost: Sequence[Collection[str]],
        say: Callable[[str], None] | None,
    ) -> None:
        self._reader = reader
        self._rules = rules
        self._say = say or (lambda _: None)
        self._only = None if rules.only is None else paths.matcher(list(rules.only))
        self._ours = paths.matcher(list(rules.ours)) if rules.ours else None
        self._theirs = paths.matcher(list(rules.theirs)) if rules.theirs else None
        self._tensors = Tensors()
        self._conflicts: dict[str, str] = {}
        self._fates: dict[str, _Fate] = {}
        self._report = MergeReport()
        self._sources: dict[str, MergedSource] = {}
        self._known: set[str] = set()
        self._found: dict[str, list[Stored | None]] = {"state": [], "files": []}
        self._base: Stored | None = None
        self._contents: list[tuple[str, Content]] = []
        self._in_files = False
        for tree, names in zip(sides, lost, strict=True):
            loader = Loader(reader)
            opened, parts = loader.root(tree)
            for part, nodes in self._found.items():
                selection = paths.all_but(names, files=part == "files")
                nodes.append(loader.node(parts[part], opened, selection) if part in parts else None)
        if base is not None and rules.formula is not None and rules.formula.needs_base:
            self._base = trees.load(reader, base)

    def wants(self, side: int, name: str) -> bool:
        """Whether the rules take something of a component from a side, or average it."""
        forced = self._forced(name)
        if forced is not None:
            return side == forced
        averaged = self._rules.formula is not None and (self._only is None or self._only(name))
        return averaged or side == 0

    def check(self, missing: Callable[[Iterable[ObjectId]], set[ObjectId]]) -> None:
        """NotFoundError if something that is kept by its ids is not there."""
        for _ in range(2):  # chunk lists, then what they name
            gone = missing({id for _, content in self._contents for id in ids_of(content)})
            if gone:
                places = [path for path, content in self._contents if gone & set(ids_of(content))]
                more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
                raise NotFoundError(
                    f"what is kept at {places[0]}{more} is not stored any more",
                    hint="it was dropped or is damaged (`ckpt fsck`); take it from another side",
                )
            resolve(self._reader, [content for _, content in self._contents])

    def prepared(self, writer: ObjectWriter) -> tuple[trees.Prepared, dict[str, MergedSource], MergeReport]:
        """The tree, looked at and not stored."""
        state = self._place("", self._found["state"], self._base)
        self._in_files = True
        files = self._place("", self._found["files"], None)
        self._check_patterns()
        self._check_sharing()
        if self._conflicts:
            raise MergeConflictError(sorted(self._conflicts.items()))
        builder = Builder(writer.grid)
        nodes: dict[str, Node] = {}
        if state is not _NOTHING:
            nodes["state"] = builder.state(state)
            self._tensors.settle()
        if files is not _NOTHING and files:
            nodes["files"] = restated_files(files, builder, builder.given_component)
        sizes = {name: size for name, size in builder.sizes.items() if name or size}
        for fate in self._fates.values():
            if not fate.averaged:
                self._report.kept += fate.side == 0
                self._report.taken += fate.side != 0
        prepared = trees.Prepared(nodes, builder.contents, sizes, builder.kept)
        return prepared, self._sources, self._report

    # -- places -----------------------------------------------------------------------------------

    def _forced(self, path: str) -> int | None:
        """The side that a pattern takes a place from."""
        ours = self._ours is not None and self._ours(path)
        theirs = self._theirs is not None and self._theirs(path)
        if ours and theirs:
            raise InvalidError(
                f"{path} is to be taken from both sides", hint="make one of the patterns narrower"
            )
        return 0 if ours else 1 if theirs else None

    def _place(self, path: str, nodes: list[Stored | None], base: Stored | None) -> Any:
        """What becomes of a place, or `_NOTHING`."""
        if all(node is None for node in nodes):
            return _NOTHING
        self._known.add(path)
        forced = self._forced(path)
        if forced is not None:
            self._know(path, nodes)
            return self._whole(path, nodes[forced], forced)
        averaged = self._rules.formula is not None and (self._only is None or self._only(path))
        first = nodes[0]
        if not averaged:
            # Patterns may want something below from another side, also where the first has nothing.
            lead = first if first is not None else next(node for node in nodes if node is not None)
            if not _is_container(lead):
                self._know(path, nodes)
                return self._whole(path, first, 0)
            nodes = [node if _alike(node, lead) else None for node in nodes]
            return self._container(path, nodes, base, empty=first is not None)
        if all(_is_container(node) and _alike(node, first) for node in nodes):
            return self._container(path, nodes, base, empty=True)
        self._know(path, nodes)
        why, found = self._leaf(path, nodes, base)
        return found if why is None else self._conflict(path, why, nodes)

    def _know(self, path: str, nodes: Sequence[Stored | None]) -> None:
        """Note paths that are not gone to, for patterns that name one."""
        for node in nodes:
            if _is_container(node):
                assert isinstance(node, Branch)
                for key, child in zip(node.keys, node.children, strict=True):
                    below = paths.join(path, paths.name(key))
                    self._known.add(below)
                    self._know(below, [child])

    def _container(self, path: str, nodes: list[Stored | None], base: Stored | None, empty: bool) -> Any:
        """A container of what becomes of its entries; `empty` if it is one also without any."""
        lead = next(node for node in nodes if node is not None)
        assert isinstance(lead, Branch)
        keys: list[Any] = []
        values: list[Any] = []
        for name, key, below, beneath in _entries(nodes, base):
            found = self._place(paths.join(path, name), below, beneath)
            if found is not _NOTHING:
                keys.append(key)
                values.append(found)
        if not keys and not empty:
            return _NOTHING
        whole = range(len(keys)) if lead.kind != "namedtuple" else lead.keys
        if lead.kind in _LISTS and keys != list(whole):
            return self._conflict(path, f"a {lead.kind} of which entries would be missing", nodes)
        return dict(zip(keys, values, strict=True)) if self._in_files else lead.make(keys, values)

    def _whole(self, path: str, node: Stored | None, side: int, equal: bool = False) -> Any:
        """A place as it is on a side."""
        if node is None:
            return _NOTHING
        self._contents += contents_of(path, node)
        if self._in_files:
            return _folder(node)
        for below, _ in _tensors(path, node):
            self._fates[below] = _Fate(side, equal=equal)
        return restated(node, side, self._tensors)

    def _conflict(self, path: str, why: str, nodes: Sequence[Stored | None]) -> Any:
        if self._rules.prefer is None:
            self._conflicts[path] = why
            return _NOTHING
        side = 0 if self._rules.prefer == "ours" else 1
        self._report.settled.append((path, why))
        return self._whole(path, nodes[side], side)

    # -- leaves -----------------------------------------------------------------------------------

    def _leaf(self, path: str, nodes: Sequence[Stored | None], base: Stored | None) -> tuple[str | None, Any]:
        """Why a side has to be chosen, or None; and what becomes of a place where all are averaged."""
        absent = [at for at, node in enumerate(nodes) if node is None]
        if absent:
            return f"missing in {_sides(absent, len(nodes))}", None
        first = nodes[0]
        assert first is not None
        kinds = list(dict.fromkeys(_kind(node) for node in nodes if node is not None))
        if len(kinds) > 1:
            return f"{' here, '.join(kinds)} there", None
        tensors = [node for node in nodes if isinstance(node, StoredTensor)]
        if tensors:
            return self._tensor(path, tensors, base)
        if isinstance(first, Branch):
            if self._same_below(nodes):
                return None, self._whole(path, first, 0, equal=True)
            return f"a {first.kind}{' tensor' if isinstance(first, Compound) else ''} that differs", None
        if isinstance(first, StoredFile):
            files = {(node.digest, node.mode) for node in nodes if isinstance(node, StoredFile)}
            if len(files) > 1:
                return "a file that differs", None
            return None, self._whole(path, first, 0, equal=True)
        values = [value_of(node) for node in nodes if node is not None]
        if all(same_value(values[0], value) for value in values[1:]):
            return None, self._whole(path, first, 0, equal=True)
        return " or ".join(dict.fromkeys(_short(repr(value)) for value in values)), None

    def _same_below(self, nodes: Sequence[Stored | None]) -> bool:
        """Whether values made of several nodes are the same."""
        branches = [node for node in nodes if isinstance(node, Branch)]
        first = branches[0]
        if any(node.keys != first.keys for node in branches):
            return False
        for children in zip(*(node.children for node in branches), strict=True):
            found = [child for child in children if isinstance(child, StoredTensor)]
            if len(found) == len(children):
                if any(t.spec != found[0].spec for t in found) or not is_same([t.content for t in found]):
                    return False
            elif isinstance(children[0], Branch):
                if not all(_alike(child, children[0]) for child in children) or not self._same_below(
                    children
                ):
                    return False
            elif not all(same_value(value_of(children[0]), value_of(child)) for child in children):
                return False
        return True

    def _tensor(
        self, path: str, tensors: Sequence[StoredTensor], base: Stored | None
    ) -> tuple[str | None, Any]:
        formula = self._rules.formula
        assert formula is not None
        first = tensors[0]
        described = list(dict.fromkeys(_described(tensor) for tensor in tensors))
        if len(described) > 1:
            return " or ".join(described), None
        same = is_same([tensor.content for tensor in tensors])
        beneath = base if formula.needs_base else None
        if same and (
            not formula.needs_base
            or first.spec.dtype not in MERGEABLE
            or (isinstance(base, StoredTensor) and is_same([first.content, base.content]))
        ):
            return None, self._whole(path, first, 0, equal=True)
        if first.spec.dtype not in MERGEABLE:
            return f"{described[0]} that differs and has no average", None
        if formula.needs_base:
            if not isinstance(beneath, StoredTensor):
                return "missing in the base", None
            if _described(beneath) != described[0]:
                return f"{_described(beneath)} in the base, {described[0]} in the others", None
        below = beneath if isinstance(beneath, StoredTensor) else None
        every = [*tensors, *([below] if below is not None else [])]
        resolve(self._reader, [tensor.content for tensor in every])
        factors = formula.coefficients()
        if formula.strategy == "slerp":
            self._say(path)
            cosine = averaging.cosine(self._reader, tensors[0], tensors[1])
            if cosine is None:
                return "holds NaN or infinities, so there is no angle for slerp", None
            factors = formula.coefficients(cosine)
        source = MergedSource(self._reader, formula, tensors, below, factors)
        self._sources[path] = source
        self._fates[path] = _Fate(0, averaged=True)
        self._report.averaged.append(path)
        return None, GivenTensor(first, 0, self._tensors, source)

    # -- all together -----------------------------------------------------------------------------

    def _check_patterns(self) -> None:
        rules = self._rules
        for pattern in (*(rules.only or ()), *rules.ours, *rules.theirs):
            matches = paths.matcher(pattern)
            if not any(map(matches, self._known)):
                raise paths.unmatched([pattern], self._known, "these commits")

    def _check_sharing(self) -> None:
        """Tensors that share memory must have been treated alike, and share it on all sides that count."""
        groups = [_groups(node) for node in self._found["state"]]
        for path, fate in self._fates.items():
            mine = groups[fate.side].get(path)
            if mine is not None:
                for partner in mine.members:
                    other = self._fates.get(partner)
                    if other is not None and not _together(fate, other):
                        self._conflicts.setdefault(
                            path, f"shares memory with {partner}, which is treated otherwise"
                        )
            if not fate.averaged:
                continue
            shapes = {_shape(groups[side].get(path)) for side in range(len(groups))}
            if len(shapes) > 1:
                self._conflicts.setdefault(path, "shares memory with others on some sides only, or otherwise")
            elif mine is not None and self._rules.formula is not None:
                views = {groups[0][member].view for member in mine.members}
                if len(views) > 1 and not self._rules.formula.keeps_equal:
                    self._conflicts.setdefault(
                        path, "shares a part of its memory, so slerp would tear it apart"
                    )
                elif len({view[0] for view in views}) > 1:
                    self._conflicts.setdefault(path, "shares memory with numbers of another kind")


@dataclass(frozen=True, slots=True)
class _Group:
    """Which tensors share memory with one, itself included, and what it shows of it."""

    members: tuple[str, ...]
    view: tuple[object, ...]


def _groups(root: Stored | None) -> dict[str, _Group]:
    """By path, of all tensors that share memory."""
    found: dict[tuple[str, int], list[tuple[str, StoredTensor]]] = {}
    for path, tensor in _tensors("", root) if root is not None else ():
        if tensor.alias is not None:
            found.setdefault((tensor.spec.framework, tensor.alias.group), []).append((path, tensor))
    groups = {}
    for members in found.values():
        names = tuple(sorted(path for path, _ in members))
        for path, tensor in members:
            alias = tensor.alias
            assert alias is not None
            kind = tensor.spec.dtype, tensor.spec.swap, alias.offset % tensor.spec.item
            view = (kind, alias.offset, alias.strides, tensor.spec.shape)
            groups[path] = _Group(names, view)
    return groups


def _together(one: _Fate, other: _Fate) -> bool:
    """Whether two tensors of one memory fit together: from one side, and both averaged, or as good as."""
    return one.side == other.side and (one.averaged or one.equal) == (other.averaged or other.equal)


def _shape(group: _Group | None) -> object:
    return None if group is None else (group.members, group.view)


def _tensors(path: str, node: Stored) -> list[tuple[str, StoredTensor]]:
    if isinstance(node, StoredTensor):
        return [(path, node)]
    if not isinstance(node, Branch):
        return []
    return [
        each
        for key, child in zip(node.keys, node.children, strict=True)
        for each in _tensors(paths.join(path, paths.name(key)), child)
    ]


def _entries(nodes: Sequence[Stored | None], base: Stored | None) -> list[_Entry]:
    """Name, key and what each side has of each entry, in the order of the first side, then of the others."""
    sides: list[dict[str, tuple[Any, Stored]]] = [
        {paths.name(key): (key, child) for key, child in zip(node.keys, node.children, strict=True)}
        if isinstance(node, Branch)
        else {}
        for node in (*nodes, base)
    ]
    below = sides.pop()
    return [
        (
            name,
            next(side[name][0] for side in sides if name in side),
            [side[name][1] if name in side else None for side in sides],
            below[name][1] if name in below else None,
        )
        for name in dict.fromkeys(name for side in sides for name in side)
    ]


def _is_container(node: Stored | None) -> bool:
    return isinstance(node, Branch) and not isinstance(node, Compound) and node.kind != "bytearray"


def _alike(node: Stored | None, other: Stored | None) -> bool:
    """Whether two nodes are containers of one kind."""
    if not isinstance(node, Branch) or not isinstance(other, Branch) or type(node) is not type(other):
        return False
    about = [
        (each.kind, getattr(each, "dtype", None), getattr(each, "about", None)) for each in (node, other)
    ]
    return about[0] == about[1]


def _folder(node: Stored) -> Any:
    """A file or link as it is, of a folder what is in it."""
    if not isinstance(node, Branch):
        return node
    return {key: _folder(child) for key, child in zip(node.keys, node.children, strict=True)}


def _kind(node: Stored) -> str:
    if isinstance(node, StoredTensor):
        return "a tensor"
    return f"a {node.kind}" if isinstance(node, (Branch, StoredFile)) or node.kind == "link" else "a value"


def _described(tensor: StoredTensor) -> str:
    return f"{tensor.spec.dtype}[{', '.join(map(str, tensor.spec.shape))}]"


def _sides(which: Sequence[int], count: int) -> str:
    if count == 2:
        return ("the first", "the second")[which[0]]
    return f"number {', '.join(str(at + 1) for at in which)}"


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"
