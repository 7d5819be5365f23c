"""Fill a live state from a tree, in place.

First everything is compared; nothing is touched if strict restore finds a difference. Then one read
fills arrays and tensors where they are, plain values are replaced in their containers, and then come
the `load_state_dict` calls, in tree order. Random generators are set behind them, and what calls itself
`interface.Last` is loaded at the very end: a loader that moves to its position draws numbers.

What fits what:

- an object with `load_state_dict` takes the stored subtree; a torch module is compared by name, shape and
  dtype first; with `only` below an object, the selected entries are laid over its current state_dict();
- arrays and tensors of the same shape and dtype are filled, from numpy or torch alike;
- None and empty dicts, lists and deques take whatever is stored; so do lists and tuples that hold plain
  values only (a loss history may grow);
- plain values (numbers, text, paths...) replace each other, whatever their type;
- an enum member gets the stored member of its own class;
- a random generator takes the state of one of its own kind.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from ckptvcs.errors import InvalidError, NotFoundError, StateMismatchError
from ckptvcs.ids import ObjectId
from ckptvcs.state import (
    generators,
    paths,
    torch_devices,
    torch_objects,
    torch_tensors,
    tree,
    values,
)
from ckptvcs.state.interface import ObjectReader, is_last
from ckptvcs.state.materialise import Materialiser
from ckptvcs.state.read import (
    Branch,
    Compound,
    Stored,
    StoredBlob,
    StoredLeaf,
    StoredRandom,
    StoredTensor,
    StoredTorch,
)
from ckptvcs.state.tensors import SHARED_NAMES, Raw, Spec, capture

_Set: TypeAlias = Callable[[Any], None]

_MAPS: Final = frozenset(("dict", "OrderedDict", "defaultdict", "namespace", "dataclass"))
_LISTS: Final = frozenset(("list", "deque"))
_TUPLES: Final = frozenset(("tuple", "namedtuple"))


class Filled(NamedTuple):
    """What did not fit.

    Attributes:
        leftover: path -> stored value that had no place, or no fitting one.
        missing: paths in the target that the commit does not have.
        unexpected: paths in the commit that the target does not have.
    """

    leftover: dict[str, Any]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@tree.refuse_deep
def fill(
    reader: ObjectReader,
    tree_id: ObjectId,
    into: Any,
    only: str | Sequence[str] | None = None,
    strict: bool = True,
    rename: Mapping[str, str] | None = None,
) -> Filled:
    """Fill `into` from the state of a tree.

    Args:
        into: nested containers of arrays, tensors and objects; changed in place.
        only: patterns of stored paths; the rest of `into` stays as it is.
        strict: raise for any difference, before anything is changed.
        rename: stored path prefix -> where it belongs in `into`.

    Raises:
        StateMismatchError: lists all that is missing, unexpected or of another shape, dtype or kind.
        NotFoundError: a pattern or a renamed path matches nothing.
    """
    stored = tree.load(reader, tree_id, only)
    if rename:
        stored = _rename(stored, rename, lenient=only is not None)
    plan = _Plan(only, rename or {})
    plan.match(stored, into, "", None)
    if strict:
        plan.ask_last(reader)
    if strict and (plan.missing or plan.unexpected or plan.mismatched):
        raise StateMismatchError(plan.missing, list(plan.unexpected), list(plan.mismatched.values()))
    return plan.carry_out(reader, strict)


# -- comparing ------------------------------------------------------------------------------------


class _Load(NamedTuple):
    path: str
    stored: Stored
    target: Any
    partial: bool
    unfit: frozenset[str]


class _Plan:
    def __init__(self, only: str | Sequence[str] | None, rename: Mapping[str, str]) -> None:
        self._only = None if only is None else [only] if isinstance(only, str) else list(only)
        self._back = {new: old for old, new in rename.items()}
        self.missing: list[str] = []
        self.unexpected: dict[str, Stored] = {}
        self.mismatched: dict[str, str] = {}
        self._spare: dict[str, Stored] = {}
        self._fills: list[tuple[StoredTensor, Raw, int]] = []
        self._staged: list[tuple[StoredTensor, Any]] = []
        self._values: list[tuple[str, Stored, _Set]] = []
        self._rebuilds: list[Callable[[], None]] = []
        self._loads: list[_Load] = []
        self._generators: list[tuple[str, Stored, _Set]] = []

    def match(self, stored: Stored, target: Any, path: str, put: _Set | None) -> None:
        """Find the place of a stored node in `target`, which `put` replaces."""
        if not isinstance(target, type) and callable(getattr(target, "load_state_dict", None)):
            self._object(stored, target, path)
        elif isinstance(stored, StoredTensor):
            self._tensor(stored, target, path, put)
        elif generators.is_generator(target):
            self._random(stored, target, path)
        elif target is None or _is_plain(target):
            # A plain value, or a place kept free for anything.
            if target is None or _holds_plain(stored):
                self._replace(stored, target, path, put)
            else:
                self._differs(path, stored, f"{stored.kind} stored, {type(target).__name__} to be filled")
        elif isinstance(stored, Compound):
            self._compound(stored, target, path, put)
        elif isinstance(stored, Branch) and self._branch(stored, target, path, put):
            pass
        else:
            self._differs(path, stored, f"{stored.kind} stored, {type(target).__name__} to be filled")

    def _differs(self, path: str, stored: Stored, why: str) -> None:
        self.mismatched[path] = f"{path or '(the state itself)'} ({why})"
        self._spare[path] = stored

    def _absent(self, path: str) -> None:
        """A place in the target that the commit has nothing for: missing, if it was asked for."""
        if self._only is not None:
            source = path
            for new, old in self._back.items():
                if path == new or path.startswith(new + "/"):
                    source = old + path[len(new) :]
            if not any(paths.matches(pattern, source) for pattern in self._only):
                return
        self.missing.append(path)

    def _replace(self, stored: Stored, target: Any, path: str, put: _Set | None) -> None:
        if put is None:
            raise InvalidError(
                f"a {type(target).__name__} cannot be filled in place",
                hint="pass the container that holds it",
            )
        if isinstance(target, enum.Enum) and isinstance(stored, StoredLeaf):
            member = stored.value
            if not isinstance(member, values.EnumValue) or member.type != values.type_name(type(target)):
                self._differs(path, stored, f"{stored.kind} stored, {type(target).__name__} to be filled")
                return
            found = type(target).__members__.get(member.name or "")
            if found is None:
                self._differs(path, stored, f"{type(target).__name__} has no member {member.name}")
                return
            stored = StoredLeaf("enum", found)
        self._values.append((path, stored, put))

    # -- tensors ----------------------------------------------------------------------------------

    def _tensor(self, stored: StoredTensor, target: Any, path: str, put: _Set | None) -> None:
        captured: tuple[Spec, Raw] | None = None
        if target is None:
            self._replace(stored, target, path, put)
            return
        if isinstance(target, np.ndarray):
            captured = capture(target)
            if captured is not None and not target.flags.writeable:
                self._differs(path, stored, "read-only array")
                return
        elif torch_tensors.is_tensor(target):
            captured = torch_devices.as_target(target)
            if captured is None:
                self._device_tensor(stored, target, path)
                return
        if captured is None:
            kind = type(target).__name__
            self._differs(path, stored, f"{_describe(stored.spec)} stored, {kind} to be filled")
            return
        spec, raw = captured
        if self._fits(stored, spec, path):
            self._fills.append((stored, raw, spec.swap))

    def _fits(self, stored: StoredTensor, spec: Spec, path: str) -> bool:
        same = stored.spec.framework == spec.framework or spec.dtype in SHARED_NAMES
        if same and stored.spec.shape == spec.shape and stored.spec.dtype == spec.dtype:
            return True
        self._differs(path, stored, f"{_describe(stored.spec)} stored, {_describe(spec)} to be filled")
        return False

    def _device_tensor(self, stored: StoredTensor, target: Any, path: str) -> None:
        why = torch_tensors.why_not(target)
        if why is not None or not torch_tensors.is_dense(target):
            self._differs(path, stored, why or f"dense tensor stored, {target.layout} to be filled")
        elif self._fits(stored, _torch_spec(target), path):
            if torch_devices.on_host(target):  # its memory does not hold its values as they are
                put = functools.partial(torch_tensors.copy_into, target)
                self._values.append((path, stored, put))
            else:
                self._staged.append((stored, target))

    def _compound(self, stored: Compound, target: Any, path: str, put: _Set | None) -> None:
        if stored.kind == "generator":
            if torch_tensors.generator_state(target) is not None:
                state = stored.children[0]
                set_state = functools.partial(torch_tensors.set_generator, target)
                self._generators.append((path, state, set_state))
                return
        elif torch_tensors.is_tensor(target) and tuple(target.shape) == stored.shape and put is not None:
            self._values.append((path, stored, put))
            return
        self._differs(path, stored, f"{stored.kind} stored, {type(target).__name__} to be filled")

    def _random(self, stored: Stored, target: Any, path: str) -> None:
        mine = generators.describe(target)
        theirs = stored.kind
        if isinstance(stored, StoredRandom):
            theirs = generators.kind(stored.code, stored.plain)
        if isinstance(stored, StoredRandom) and mine == theirs:
            self._generators.append((path, stored, functools.partial(generators.assign, target)))
        else:
            self._differs(path, stored, f"{theirs} stored, {mine} to be filled")

    # -- containers -------------------------------------------------------------------------------

    def _branch(self, stored: Branch, target: Any, path: str, put: _Set | None) -> bool:
        if stored.kind in _MAPS and isinstance(target, MutableMapping):
            self._mapping(stored, target, path)
        elif stored.kind in _MAPS and _has_attributes(target):
            self._attributes(stored, target, path)
        elif stored.kind in _LISTS and isinstance(target, (list, collections.deque)):
            if all(map(_is_plain, target)):
                self._values.append((path, stored, lambda value: _refill(target, value)))
            else:
                self._items(stored, target, path, target.__setitem__)
        elif stored.kind in _TUPLES and isinstance(target, tuple):
            if all(map(_is_plain, target)) and put is not None:
                self._values.append((path, stored, put))
            else:
                self._tuple(stored, target, path, put)
        else:
            return False
        return True

    def _children(
        self, stored: Branch, path: str, places: dict[str, Any]
    ) -> Iterator[tuple[str, Stored, Any]]:
        """(path, stored child, key in the target) of those that have a place; the others are noted."""
        found = set()
        for key, child in zip(stored.keys, stored.children, strict=True):
            component = paths.name(key)
            below = paths.join(path, component)
            if component in places:
                found.add(component)
                yield below, child, places[component]
            else:
                self.unexpected[below] = child
        for component in places:
            if component not in found:
                self._absent(paths.join(path, component))

    def _mapping(self, stored: Branch, target: MutableMapping[Any, Any], path: str) -> None:
        if not target:
            for key, child in zip(stored.keys, stored.children, strict=True):
                below = paths.join(path, paths.name(key))
                self._values.append((below, child, _setter(target.__setitem__, key)))
            return
        places = {paths.name(key): key for key in target}
        for below, child, key in self._children(stored, path, places):
            self.match(child, target[key], below, _setter(target.__setitem__, key))

    def _attributes(self, stored: Branch, target: Any, path: str) -> None:
        fields = _fields(target)
        frozen = _is_frozen(target)
        for below, child, key in self._children(stored, path, {paths.name(key): key for key in fields}):
            put = None if frozen else _setter(lambda key, value: setattr(target, key, value), key)
            if put is None and _is_plain(fields[key]):
                self._differs(below, child, f"field of the frozen {type(target).__name__}")
            else:
                self.match(child, fields[key], below, put)

    def _items(self, stored: Branch, target: Any, path: str, put: Callable[[int, Any], None]) -> None:
        places = {paths.name(at): at for at in range(len(target))}
        for below, child, at in self._children(stored, path, places):
            self.match(child, target[at], below, _setter(put, at))

    def _tuple(self, stored: Branch, target: tuple[Any, ...], path: str, put: _Set | None) -> None:
        items = list(target)
        fields = getattr(target, "_fields", None)
        if stored.kind == "namedtuple" and fields is None:
            self._differs(path, stored, "named tuple stored, tuple to be filled")
            return
        names = list(fields) if stored.kind == "namedtuple" and fields else range(len(items))
        places = {paths.name(name): at for at, name in enumerate(names)}
        for below, child, at in self._children(stored, path, places):
            self.match(child, items[at], below, _setter(items.__setitem__, at))

        def rebuild() -> None:
            if any(new is not old for new, old in zip(items, target, strict=True)):
                if put is None:
                    raise InvalidError(
                        "a tuple cannot be filled in place", hint="pass a list or dict instead"
                    )
                put(type(target)(*items) if fields is not None else type(target)(items))

        self._rebuilds.append(rebuild)

    # -- objects ----------------------------------------------------------------------------------

    def _object(self, stored: Stored, target: Any, path: str) -> None:
        torch_objects.refuse_sharded(target, lambda: path)
        partial = self._only is not None and not any(
            paths.matches(pattern, self._source(path)) for pattern in self._only
        )
        unfit: set[str] = set()
        if torch_tensors.is_module(target) and isinstance(stored, Branch):
            places = target.state_dict()
            names = {paths.name(key): key for key in places}
            for below, child, key in self._children(stored, path, names):
                place = places[key]
                if (
                    isinstance(child, StoredTensor)
                    and torch_tensors.is_tensor(place)
                    and not self._fits(child, _torch_spec(place), below)
                ):
                    unfit.add(key)
        self._loads.append(_Load(path, stored, target, partial, frozenset(unfit)))

    def _source(self, path: str) -> str:
        for new, old in self._back.items():
            if path == new or path.startswith(new + "/"):
                return old + path[len(new) :]
        return path

    def ask_last(self, reader: ObjectReader) -> None:
        """Ask those who are loaded last what they cannot take. What is stored for them is small."""
        for load in self._loads:
            ask = getattr(load.target, "ckpt_differences", None) if is_last(load.target) else None
            if ask is None:
                continue
            (value,) = Materialiser(reader).values([(load.path, load.stored)])
            for difference in ask(_whole(load, value)):
                below = paths.join(load.path, difference)
                self.mismatched[below] = below

    # -- doing it ---------------------------------------------------------------------------------

    def carry_out(self, reader: ObjectReader, strict: bool) -> Filled:
        """Read, fill, replace, load."""
        materialiser = Materialiser(reader)
        for stored, raw, swapped in self._fills:
            materialiser.filler.add(stored.content, raw, swapped)
        for stored, tensor in self._staged:
            materialiser.filler.add_staged(stored.content, tensor)
        spare = self.unexpected | self._spare
        wanted = [(path, stored) for path, stored, _ in self._values]
        wanted += [(load.path, load.stored) for load in self._loads]
        wanted += [(path, stored) for path, stored, _ in self._generators]
        wanted += spare.items()
        found = iter(materialiser.values(wanted))
        for _, _, put in self._values:
            put(next(found))
        for rebuild in reversed(self._rebuilds):  # inner tuples were noted after the outer ones
            rebuild()
        loads = [(load, next(found)) for load in self._loads]
        for load, value in loads:
            if not is_last(load.target):
                self._load(load, value, strict)
        for _, _, set_state in self._generators:
            set_state(next(found))
        for load, value in loads:
            if is_last(load.target):
                self._load(load, value, strict)
        leftover = {path: next(found) for path in spare}
        return Filled(leftover, tuple(self.missing), tuple(self.unexpected))

    def _load(self, load: _Load, value: Any, strict: bool) -> None:
        if torch_tensors.is_module(load.target) and isinstance(value, dict):
            kept = {key: item for key, item in value.items() if key not in load.unfit}
            if load.partial or not strict:
                load.target.load_state_dict(kept, strict=False)
                return
        value = _whole(load, value)
        if not strict and is_last(load.target):
            load.target.load_state_dict(value, strict=False)
        else:
            load.target.load_state_dict(value)


# -- small questions ------------------------------------------------------------------------------


def _setter(put: Callable[[Any, Any], None], key: Any) -> _Set:
    return lambda value: put(key, value)


def _describe(spec: Spec) -> str:
    return f"{spec.framework} {spec.dtype}{list(spec.shape)}"


def _torch_spec(tensor: Any) -> Spec:
    name = torch_tensors.name_of(tensor.dtype)
    return Spec("torch", name, tuple(tensor.shape), 0, tensor.element_size())


def _is_plain(value: Any) -> bool:
    """Whether a value of the target is replaced rather than filled."""
    if isinstance(value, (list, MutableMapping, collections.deque, np.ndarray)) or value is None:
        return value is None
    if isinstance(value, tuple):
        return torch_tensors.leaf(value) is not None
    if torch_tensors.is_tensor(value) or torch_tensors.generator_state(value) is not None:
        return False
    if generators.is_generator(value):
        return False
    return not _has_attributes(value) and not callable(getattr(value, "load_state_dict", None))


def _holds_plain(stored: Stored) -> bool:
    """Whether a stored node is a plain value."""
    return (
        isinstance(stored, (StoredLeaf, StoredBlob, StoredTorch, StoredRandom)) or stored.kind == "bytearray"
    )


def _has_attributes(value: Any) -> bool:
    if values.namespace_code(value) is not None:
        return True
    return (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and not isinstance(value, (values.EnumValue, values.DataclassValue))
    )


def _is_frozen(target: Any) -> bool:
    parameters = getattr(target, "__dataclass_params__", None)
    return parameters is not None and bool(parameters.frozen)


def _fields(target: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(target):
        return {field.name: getattr(target, field.name) for field in dataclasses.fields(target)}
    return dict(vars(target))


def _refill(target: Any, value: Any) -> None:
    target.clear()
    target.extend(value)


def _whole(load: _Load, value: Any) -> Any:
    """What an object is to load: all that is stored for it, or a part laid over its state of now."""
    return _merged(load.target.state_dict(), value) if load.partial else value


def _merged(current: Any, selected: Any) -> Any:
    """`selected` laid over `current`, dict by dict."""
    if isinstance(current, Mapping) and isinstance(selected, Mapping):
        merged = dict(current)
        for key, value in selected.items():
            merged[key] = _merged(current[key], value) if key in current else value
        return merged
    return selected


# -- renaming -------------------------------------------------------------------------------------


def _rename(root: Stored, rename: Mapping[str, str], lenient: bool) -> Stored:
    """The tree with each `old` subtree moved to `new`. All are taken out before any is put back."""
    moved = []
    for old, new in rename.items():
        taken, root = _take(root, paths.split(old))
        if taken is not None:
            moved.append((new, taken))
        elif not lenient:
            near = paths.nearest(old, tree.known_paths(root))
            raise NotFoundError(
                f"nothing in this commit is called {old!r}, which `rename` names",
                hint=f"near: {', '.join(near)}" if near else None,
            )
    for new, taken in moved:
        root = _put(root, paths.split(new), taken, new)
    return root


def _take(node: Stored, components: Sequence[str]) -> tuple[Stored | None, Stored]:
    if not components:
        return node, Branch("dict", [], [], _make_dict)
    if isinstance(node, Branch):
        for at, key in enumerate(node.keys):
            if components[0] in (paths.name(key), key):
                taken, rest = _take(node.children[at], components[1:])
                if taken is None:
                    return None, node
                keys, children = list(node.keys), list(node.children)
                if len(components) == 1 or (isinstance(rest, Branch) and not rest.children):
                    del keys[at], children[at]
                else:
                    children[at] = rest
                return taken, Branch(node.kind, keys, children, node.make)
    return None, node


def _put(node: Stored, components: Sequence[str], taken: Stored, new: str) -> Stored:
    if not components:
        if isinstance(node, Branch) and isinstance(taken, Branch) and node.kind == taken.kind:
            return Branch(node.kind, node.keys + taken.keys, node.children + taken.children, taken.make)
        return taken
    if not isinstance(node, Branch) or node.kind not in _MAPS:
        raise InvalidError(f"rename to {new!r}: a {node.kind} is in the way")
    keys, children = list(node.keys), list(node.children)
    for at, key in enumerate(keys):
        if components[0] in (paths.name(key), key):
            if len(components) == 1:
                raise InvalidError(f"rename to {new!r}: the commit has that name already")
            children[at] = _put(children[at], components[1:], taken, new)
            break
    else:
        keys.append(paths.key(components[0]))
        empty = Branch("dict", [], [], _make_dict)
        children.append(_put(empty, components[1:], taken, new) if components[1:] else taken)
    return Branch(node.kind, keys, children, node.make)


def _make_dict(keys: list[Any], found: list[Any]) -> dict[Any, Any]:
    return dict(zip(keys, found, strict=True))
