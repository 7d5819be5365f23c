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

from ckptvcs.errors import CorruptionError, InvalidError, StateMismatchError
from ckptvcs.ids import ObjectId
from ckptvcs.state import (
    configs,
    generators,
    paths,
    torch_devices,
    torch_objects,
    torch_tensors,
    tree,
    values,
)
from ckptvcs.state.interface import ObjectReader
from ckptvcs.state.loading import Load, load_of
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
from ckptvcs.state.renaming import Renames, near_misses
from ckptvcs.state.tensors import SHARED_NAMES, ArraySource, Raw, Spec, bounds, capture, is_injective, unit
from ckptvcs.state.verify import described, differences, holds

_Set: TypeAlias = Callable[[Any], None]

_MAPS: Final = frozenset(("dict", "OrderedDict", "defaultdict", "Counter", "namespace", "dataclass"))
_LISTS: Final = frozenset(("list", "deque"))
_TUPLES: Final = frozenset(("tuple", "namedtuple"))


class Filled(NamedTuple):
    """What did not fit.

    Attributes:
        leftover: path -> stored value that had no place, or no fitting one.
        missing: paths in the target that the commit does not have.
        unexpected: paths in the commit that the target does not have.
        altered: path -> what an object has made of what was stored there.
    """

    leftover: dict[str, Any]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    altered: dict[str, str]


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
        rename: stored path, or beginning of names, -> what it is called in `into` (`renaming`).

    Raises:
        StateMismatchError: lists all that is missing, unexpected or of another shape, dtype or kind.
        NotFoundError: a pattern or a renamed path matches nothing.
    """
    stored = tree.load(reader, tree_id, only)
    renames = Renames(stored, rename or {}, lenient=only is not None)
    plan = _Plan(only, renames.source)
    plan.match(renames.stored, into, "", None)
    if strict:
        plan.ask_last(reader)
    if strict and (plan.missing or plan.unexpected or plan.mismatched):
        unexpected = list(plan.unexpected)
        near = near_misses(plan.missing, unexpected)
        raise StateMismatchError(plan.missing, unexpected, list(plan.mismatched.values()), near=near)
    filled = plan.carry_out(reader, strict)
    if strict and filled.altered:
        raise StateMismatchError((), (), (), altered=[f"{p} ({why})" for p, why in filled.altered.items()])
    return filled


# -- comparing ------------------------------------------------------------------------------------


class _Fill(NamedTuple):
    path: str
    stored: StoredTensor
    raw: Raw
    swapped: int


def _overwritten(fills: Sequence[_Fill], chunk: int) -> dict[str, str]:
    """Which of these were spoilt by others that overlap them, or by themselves, as an expanded tensor is: of
    two values for one byte, one is lost."""
    extents = []
    for fill in fills:
        low, high = bounds(fill.raw.shape, fill.raw.strides, fill.raw.itemsize)
        start = fill.raw.__array_interface__["data"][0]
        extents.append((start + low, start + high, fill))
    extents.sort(key=lambda extent: extent[:2])
    found: dict[str, str] = {}
    reach, before = 0, -1
    overlapping: dict[int, _Fill] = {}
    for at, (low, high, fill) in enumerate(extents):
        if not is_injective(fill.raw.shape, fill.raw.strides, fill.raw.itemsize):
            overlapping[at] = fill
        if low < reach:
            overlapping |= {before: extents[before][2], at: fill}
        if high > reach:
            reach, before = high, at
    for fill in overlapping.values():
        size = unit(fill.stored.spec.dtype, fill.stored.spec.item)
        if not holds(fill.stored.content, ArraySource(fill.raw, size, fill.swapped), chunk):
            found[fill.path] = "overlaps memory that other values are stored for"
    return found


class _Plan:
    def __init__(self, only: str | Sequence[str] | None, source: Callable[[str], str]) -> None:
        self._only = None if only is None else [only] if isinstance(only, str) else list(only)
        self._source = source  # of a path in the target, the path it was stored under
        self.missing: list[str] = []
        self.unexpected: dict[str, Stored] = {}
        self.mismatched: dict[str, str] = {}
        self._spare: dict[str, Stored] = {}
        self._fills: list[_Fill] = []
        self._staged: list[tuple[StoredTensor, Any]] = []
        self._values: list[tuple[str, Stored, _Set]] = []
        self._rebuilds: list[Callable[[], None]] = []
        self._loads: list[Load] = []
        self._memory: dict[Any, StoredTensor] = {}
        self._generators: list[tuple[str, Stored, _Set]] = []

    def match(self, stored: Stored, target: Any, path: str, put: _Set | None) -> None:
        """Find the place of a stored node in `target`, which `put` replaces."""
        if not isinstance(target, type) and callable(getattr(target, "load_state_dict", None)):
            self._object(stored, target, path)
        elif configs.is_config(target):
            live = configs.plain(target)
            self._rebuilds.append(lambda: configs.write_back(target, live))
            self.match(stored, live, path, None)
        elif isinstance(stored, StoredTensor):
            self._tensor(stored, target, path, put)
        elif generators.is_generator(target):
            self._random(stored, target, path)
        elif target is None or _is_plain(target):
            # A plain value, or a place kept free for anything.
            if target is None or _holds_plain(stored):
                self._replace(stored, target, path, put)
            else:
                self.differs(path, stored, f"{stored.kind} stored, {type(target).__name__} to be filled")
        elif isinstance(stored, Compound):
            self._compound(stored, target, path, put)
        elif isinstance(stored, Branch) and self._branch(stored, target, path, put):
            pass
        else:
            self.differs(path, stored, f"{stored.kind} stored, {type(target).__name__} to be filled")

    def differs(self, path: str, stored: Stored, why: str) -> None:
        self.mismatched[path] = f"{path or '(the state itself)'} ({why})"
        self._spare[path] = stored

    def _absent(self, path: str) -> None:
        """A place in the target that the commit has nothing for: missing, if it was asked for."""
        if self._only is not None:
            source = self._source(path)
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
                self.differs(path, stored, f"{stored.kind} stored, {type(target).__name__} to be filled")
                return
            found = type(target).__members__.get(member.name or "")
            if found is None:
                self.differs(path, stored, f"{type(target).__name__} has no member {member.name}")
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
                self.differs(path, stored, "read-only array")
                return
        elif torch_tensors.is_tensor(target):
            torch_objects.refuse_sharded(target, lambda: path)
            captured = torch_devices.as_target(target)
            if captured is None:
                self._device_tensor(stored, target, path)
                return
        if captured is None:
            kind = type(target).__name__
            self.differs(path, stored, f"{described(stored.spec)} stored, {kind} to be filled")
            return
        spec, raw = captured
        if self.fits(stored, spec, path):
            self._into(stored, raw, spec.swap, path)

    def fill(self, stored: StoredTensor, tensor: Any, path: str) -> bool:
        if not torch_devices.on_host(tensor):
            if not torch_tensors.is_dense(tensor):
                return False
            plain = tensor.detach()
            place = (str(plain.device), plain.data_ptr(), tuple(plain.shape), plain.stride())
            if self._first(stored, place, path):
                self._staged.append((stored, plain))
            return True
        captured = torch_devices.as_target(tensor)
        if captured is None:
            return False
        self._into(stored, captured[1], 0, path)
        return True

    def fill_subclass(self, stored: Compound, target: Any, path: str) -> bool:
        parts = _of_same_make(stored, target)
        return parts is not None and all(self.fill(child, part, path) for child, part in parts)

    def _into(self, stored: StoredTensor, raw: Raw, swapped: int, path: str) -> None:
        if self._first(stored, (raw.__array_interface__["data"][0], raw.shape, raw.strides), path):
            self._fills.append(_Fill(path, stored, raw, swapped))

    def _first(self, stored: StoredTensor, place: Any, path: str) -> bool:
        """Whether nothing fills this place yet. Two names of one tensor must have been stored equal."""
        if not stored.spec.nbytes:
            return False
        other = self._memory.setdefault(place, stored)
        if other is not stored and other.content != stored.content:
            self.differs(path, stored, "shares its memory with a tensor that other values are stored for")
        return other is stored

    def fits(self, stored: StoredTensor, spec: Spec, path: str) -> bool:
        same = stored.spec.framework == spec.framework or spec.dtype in SHARED_NAMES
        if same and stored.spec.shape == spec.shape and stored.spec.dtype == spec.dtype:
            return True
        self.differs(path, stored, f"{described(stored.spec)} stored, {described(spec)} to be filled")
        return False

    def _device_tensor(self, stored: StoredTensor, target: Any, path: str) -> None:
        why = torch_tensors.why_not(target)
        if why is not None or not torch_tensors.is_dense(target):
            self.differs(path, stored, why or f"dense tensor stored, {target.layout} to be filled")
        elif self.fits(stored, _torch_spec(target), path):
            if torch_devices.on_host(target):  # its memory does not hold its values as they are
                put = functools.partial(torch_tensors.copy_into, target)
                self._values.append((path, stored, put))
            else:
                self.fill(stored, target, path)

    def _compound(self, stored: Compound, target: Any, path: str, put: _Set | None) -> None:
        if stored.kind == "generator":
            if torch_tensors.generator_state(target) is not None:
                state = stored.children[0]
                set_state = functools.partial(torch_tensors.set_generator, target)
                self._generators.append((path, state, set_state))
                return
        elif stored.kind == "subclass":
            if put is not None and isinstance(target, values.TensorSubclassValue):
                self._values.append((path, stored, put))
                return
            if self.fill_subclass(stored, target, path):
                return
            kind = stored.dtype.rpartition(":")[2]
            why = f"a {kind} cannot be made without its class; have one of the same make in its place"
            self.differs(path, stored, f"{why}, not {type(target).__name__}")
            return
        elif torch_tensors.is_tensor(target) and tuple(target.shape) == stored.shape and put is not None:
            self._values.append((path, stored, put))
            return
        self.differs(path, stored, f"{stored.kind} stored, {type(target).__name__} to be filled")

    def _random(self, stored: Stored, target: Any, path: str) -> None:
        mine = generators.describe(target)
        theirs = stored.kind
        if isinstance(stored, StoredRandom):
            theirs = generators.kind(stored.code, stored.plain)
        if isinstance(stored, StoredRandom) and mine == theirs:
            self._generators.append((path, stored, functools.partial(generators.assign, target)))
        else:
            self.differs(path, stored, f"{theirs} stored, {mine} to be filled")

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

    def children(
        self, stored: Branch, path: str, places: Mapping[str, Any]
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
        for below, child, key in self.children(stored, path, places):
            self.match(child, target[key], below, _setter(target.__setitem__, key))

    def _attributes(self, stored: Branch, target: Any, path: str) -> None:
        fields = _fields(target)
        frozen = _is_frozen(target)
        for below, child, key in self.children(stored, path, {paths.name(key): key for key in fields}):
            put = None if frozen else _setter(lambda key, value: setattr(target, key, value), key)
            if put is None and _is_plain(fields[key]):
                self.differs(below, child, f"field of the frozen {type(target).__name__}")
            else:
                self.match(child, fields[key], below, put)

    def _items(self, stored: Branch, target: Any, path: str, put: Callable[[int, Any], None]) -> None:
        places = {paths.name(at): at for at in range(len(target))}
        for below, child, at in self.children(stored, path, places):
            self.match(child, target[at], below, _setter(put, at))

    def _tuple(self, stored: Branch, target: tuple[Any, ...], path: str, put: _Set | None) -> None:
        items = list(target)
        fields = getattr(target, "_fields", None)
        if stored.kind == "namedtuple" and fields is None:
            self.differs(path, stored, "named tuple stored, tuple to be filled")
            return
        names = list(fields) if stored.kind == "namedtuple" and fields else range(len(items))
        places = {paths.name(name): at for at, name in enumerate(names)}
        for below, child, at in self.children(stored, path, places):
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
        partial = self._only is not None and not any(
            paths.matches(pattern, self._source(path)) for pattern in self._only
        )
        if partial:
            self._refuse_parts_of_lists(stored, path)
        self._loads.append(load_of(self, path, stored, target, partial))

    def _refuse_parts_of_lists(self, stored: Stored, path: str) -> None:
        """What is selected is laid over what an object has, by name; items of a list have none."""
        source = self._source(path)
        if not isinstance(stored, Branch) or any(paths.matches(each, source) for each in self._only or ()):
            return
        if stored.kind in _LISTS | _TUPLES:
            raise InvalidError(
                f"only= selects a part of {source}, a {stored.kind} that an object loads as a whole",
                hint=f"select {source}, or the whole object",
            )
        for key, child in zip(stored.keys, stored.children, strict=True):
            self._refuse_parts_of_lists(child, paths.join(path, paths.name(key)))

    def ask_last(self, reader: ObjectReader) -> None:
        """Ask those who are loaded last what they cannot take. What is stored for them is small."""
        for load in self._loads:
            if load.ask is None or load.handed is None:
                continue
            (value,) = Materialiser(reader).values([(load.path, load.handed)])
            for difference in load.ask(load.whole(value)):
                below = paths.join(load.path, difference)
                self.mismatched[below] = below

    # -- doing it ---------------------------------------------------------------------------------

    def carry_out(self, reader: ObjectReader, strict: bool) -> Filled:
        """Read, fill, replace, load."""
        materialiser = Materialiser(reader)
        for fill in self._fills:
            materialiser.filler.add(fill.stored.content, fill.raw, fill.swapped)
        for stored, tensor in self._staged:
            materialiser.filler.add_staged(stored.content, tensor)
        spare = self.unexpected | self._spare
        wanted = [(path, stored) for path, stored, _ in self._values]
        loads = [(load, load.handed) for load in self._loads if load.handed is not None]
        wanted += [(load.path, handed) for load, handed in loads]
        wanted += [(path, stored) for path, stored, _ in self._generators]
        wanted += spare.items()
        try:
            found = collections.deque(materialiser.values(wanted))  # each is let go of when it is in place
        except CorruptionError as error:
            if self._fills or self._staged:
                error.add_note("what was to be filled is partly overwritten: restore another commit into it")
            raise
        for _, _, put in self._values:
            put(found.popleft())
        for rebuild in reversed(self._rebuilds):  # inner tuples were noted after the outer ones
            rebuild()
        values = [found.popleft() for _ in loads]
        altered = _overwritten(self._fills, reader.grid.chunk)
        for last in (False, True):
            for at, (load, _) in enumerate(loads):
                if load.last is last:
                    value, values[at] = values[at], None
                    load.run(value, strict)
                    altered |= load.altered(reader.grid.chunk)
            if not last:
                for _, _, set_state in self._generators:
                    set_state(found.popleft())
        leftover = {path: found.popleft() for path in spare}
        return Filled(leftover, tuple(self.missing), tuple(self.unexpected), altered)


# -- small questions ------------------------------------------------------------------------------


def _setter(put: Callable[[Any, Any], None], key: Any) -> _Set:
    return lambda value: put(key, value)


def _of_same_make(stored: Compound, target: Any) -> list[tuple[StoredTensor, Any]] | None:
    """The tensors in a tensor subclass, each with what is stored for it; None if it is of another make."""
    apart = torch_tensors.subclass(target) if torch_tensors.is_tensor(target) else None
    if apart is None or (apart.type, apart.shape) != (stored.dtype, stored.shape):
        return None
    *children, context = stored.children
    if list(apart.parts) != stored.keys[:-1] or differences(context, apart.context, "", 1, lambda *_: False):
        return None
    found: list[tuple[StoredTensor, Any]] = []
    for child, part in zip(children, apart.parts.values(), strict=True):
        inner = _of_same_make(child, part) if isinstance(child, Compound) else None
        if inner is not None:
            found += inner
            continue
        if not isinstance(child, StoredTensor) or not torch_tensors.is_dense(part):
            return None
        spec = torch_tensors.spec_of(part)
        if (spec.dtype, spec.shape) != (child.spec.dtype, child.spec.shape):
            return None
        found.append((child, part))
    return found


def _torch_spec(tensor: Any) -> Spec:
    name = torch_tensors.name_of(tensor.dtype)
    return Spec("torch", name, tuple(tensor.shape), 0, tensor.element_size())


def _is_plain(value: Any) -> bool:
    """Whether a value of the target is replaced rather than filled."""
    if isinstance(value, (list, MutableMapping, collections.deque, np.ndarray)) or value is None:
        return value is None
    if configs.is_config(value):
        return False
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
        and not isinstance(value, (values.EnumValue, values.DataclassValue, values.TensorSubclassValue))
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
