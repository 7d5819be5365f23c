"""Objects with `load_state_dict`: what they are given, and what they made of it.

The tensors of a torch module are filled where they are, and so is the state that an optimizer has already.
`load_state_dict` is called all the same, with those very tensors: it copies them onto themselves, and every
hook of the object runs. Where a class loads in a way of its own, the tensors it gets are its to keep.

Afterwards the object is asked for its state_dict() again, which is compared with what was stored. Torch's
optimizers cast what they load to the dtype of the parameter; that is undone.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from ckptvcs.errors import InvalidError
from ckptvcs.state import paths, torch_objects, torch_tensors
from ckptvcs.state.interface import is_last
from ckptvcs.state.read import Branch, Compound, Stored, StoredLeaf, StoredTensor
from ckptvcs.state.tensors import Spec
from ckptvcs.state.verify import differences


class Planning(Protocol):
    """What finds out, and notes, how a stored state fits."""

    def children(
        self, stored: Branch, path: str, places: Mapping[str, Any]
    ) -> Iterator[tuple[str, Stored, Any]]:
        """(path, stored child, what `places` has by its name); what has no counterpart is noted."""

    def fits(self, stored: StoredTensor, spec: Spec, path: str) -> bool:
        """Whether a stored tensor is of this shape and dtype; noted if not."""

    def differs(self, path: str, stored: Stored, why: str) -> None:
        """Note what cannot be filled."""

    def fill_subclass(self, stored: Compound, target: Any, path: str) -> bool:
        """The same for a tensor of a class of its own; False if it is not of the same make."""

    def fill(self, stored: StoredTensor, tensor: Any, path: str) -> bool:
        """Have a torch tensor filled where it is, before anything is loaded; False if it cannot be."""


class Load:
    """One object to be loaded.

    Attributes:
        path: where it is.
        handed: what its `load_state_dict` gets; tensors that are filled where they are stand for themselves.
            None if nothing is loaded.
        last: whether it is loaded behind all others.
        ask: the object's own answer to what of a state it cannot take, if it has one (`interface.Last`).
    """

    def __init__(self, path: str, stored: Stored, target: Any, partial: bool) -> None:
        self.path = path
        self.handed: Stored | None = stored
        self._stored = stored
        self._target = target
        self._partial = partial
        self.last = is_last(target)
        self.ask: Callable[[Any], Sequence[str]] | None = None
        if self.last:
            self.ask = getattr(target, "ckpt_differences", None)

    def whole(self, value: Any) -> Any:
        """What is loaded: the value of `handed`, with `partial` laid over what the object has."""
        return _merged(self._target.state_dict(), value) if self._partial else value

    def run(self, value: Any, strict: bool) -> None:
        """Load the value of `handed`."""
        if self.last and not strict:
            self._target.load_state_dict(self.whole(value), strict=False)
        else:
            self._target.load_state_dict(self.whole(value))

    def altered(self, chunk: int) -> dict[str, str]:
        """Path -> what the object has made of it, where that is not what was stored.

        Not asked are objects without state_dict(), those that have been asked what they cannot take, and data
        loaders, which would start their workers.
        """
        if self.ask is not None or not callable(getattr(self._target, "state_dict", None)):
            return {}
        if torch_objects.is_data_loader(self._target):
            return {}
        return differences(self._stored, self._target.state_dict(), self.path, chunk, _never)


def load_of(plan: Planning, path: str, stored: Stored, target: Any, partial: bool) -> Load:
    """How to load a stored subtree into an object. What does not fit is noted in the plan."""
    torch_objects.refuse_sharded(target, lambda: path)
    if isinstance(stored, Branch) and torch_tensors.is_module(target):
        live = target.state_dict()
        if isinstance(live, Mapping) and all(type(key) is str for key in live):
            return _ModuleLoad(plan, path, stored, target, live, partial)
    if isinstance(stored, Branch) and torch_objects.is_optimizer(target):
        load: Load = _OptimizerLoad(plan, path, stored, target, partial)
    else:
        load = Load(path, stored, target, partial)
    if load.handed is not None and (unmade := list(_subclasses(load.handed))):
        plan.differs(path, stored, _without_class(unmade[0]))
        load.handed = None
    return load


def _subclasses(stored: Stored) -> Iterator[Compound]:
    if isinstance(stored, Compound) and stored.kind == "subclass":
        yield stored
    elif isinstance(stored, Branch):
        for child in stored.children:
            yield from _subclasses(child)


def _without_class(stored: Compound) -> str:
    kind = stored.dtype.rpartition(":")[2]
    return f"a {kind} cannot be made without its class; there must be one of the same make to be filled"


def _never(stored: StoredTensor, live: Any) -> bool:
    return False


def _live(tensor: Any) -> StoredLeaf:
    """A tensor that is filled where it is, in the place of what it is filled with."""
    return StoredLeaf("tensor", tensor)


# -- modules --------------------------------------------------------------------------------------


class _ModuleLoad(Load):
    def __init__(
        self,
        plan: Planning,
        path: str,
        stored: Branch,
        target: Any,
        live: Mapping[str, Any],
        partial: bool,
    ) -> None:
        super().__init__(path, stored, target, partial)
        names = torch_objects.ModuleNames(target)
        self._entries: list[tuple[str, Stored, Any]] = []
        self._filled: dict[int, int] = {}
        self._assign = False
        keys: list[Any] = []
        children: list[Stored] = []
        for below, child, key in plan.children(stored, path, _places(names, live, stored, path)):
            place = live[key]
            given: Stored = child
            if key.endswith(torch_objects.EXTRA_STATE):
                pass  # its module knows what to make of it
            elif isinstance(child, StoredTensor) and torch_tensors.is_tensor(place):
                if not torch_tensors.is_initialized(place):
                    pass  # it gets its shape from what is loaded
                elif not plan.fits(child, torch_tensors.spec_of(place), below):
                    continue
                elif place.is_meta:
                    self._assign = True
                elif names.place(key).plain and plan.fill(child, place, below):
                    self._filled[id(child)] = place.data_ptr()
                    given = _live(place)
            elif isinstance(child, Compound) and child.kind == "subclass":
                if not plan.fill_subclass(child, place, below):
                    plan.differs(below, child, _without_class(child))
                    continue
                given = _live(place)
            elif torch_tensors.is_tensor(place) != _is_tensor(child):
                plan.differs(below, child, f"{child.kind} stored, {type(place).__name__} to be filled")
                continue
            keys.append(key)
            children.append(given)
            self._entries.append((below, child, key))
        metadata = getattr(stored.make([], []), "_metadata", None)

        def make(keys: list[Any], found: list[Any]) -> Any:
            made = collections.OrderedDict(zip(keys, found, strict=True))
            if isinstance(metadata, Mapping):
                made._metadata = names.metadata(metadata)  # type: ignore[attr-defined]
            return made

        self.handed = Branch("OrderedDict", keys, children, make)
        if self._assign:  # what is not on the meta device stays the object that it is
            own = dict(target.state_dict(keep_vars=True))
            self.handed.children = [
                _live(own[key]) if id(child) in self._filled else given
                for (_, child, key), given in zip(self._entries, children, strict=True)
            ]

    def run(self, value: Any, strict: bool) -> None:
        options: dict[str, Any] = {"strict": False} if self._partial or not strict else {}
        if self._assign:
            options["assign"] = True
        self._target.load_state_dict(value, **options)

    def altered(self, chunk: int) -> dict[str, str]:
        live = self._target.state_dict()
        plain = torch_objects.is_plain_module(self._target)

        def trusted(stored: StoredTensor, tensor: Any) -> bool:
            return plain and self._filled.get(id(stored)) == tensor.data_ptr()

        found: dict[str, str] = {}
        for below, child, key in self._entries:
            if key in live:
                found |= differences(child, live[key], below, chunk, trusted)
            else:
                found[below] = "not there any more"
        return found


def _places(
    names: torch_objects.ModuleNames, live: Mapping[str, Any], stored: Branch, path: str
) -> dict[str, Any]:
    """Component name -> key of the module's state_dict()."""
    own = {paths.name(key): key for key in live}
    plain: dict[str, Any] = {}
    for key in live:
        name = paths.name(names.place(key).name)
        if name in plain:
            raise InvalidError(
                f"{paths.join(path, name)}: two entries have this name without the names of wrapping modules"
            )
        plain[name] = key
    # A state_dict that was committed as such keeps the names it had.
    given = {paths.name(key) for key in stored.keys}
    return own if len(given & own.keys()) > len(given & plain.keys()) else plain


def _is_tensor(stored: Stored) -> bool:
    return isinstance(stored, StoredTensor) or stored.kind in ("sparse", "quantized")


# -- optimizers -----------------------------------------------------------------------------------

_OTHER_SHAPES: Final = frozenset(("Adafactor", "LBFGS"))
"""Torch's optimizers whose state is not of the shape of its parameter."""


class _OptimizerLoad(Load):
    def __init__(self, plan: Planning, path: str, stored: Branch, target: Any, partial: bool) -> None:
        super().__init__(path, stored, target, partial)
        self._parameters = [each for group in target.param_groups for each in group["params"]]
        self._known: set[int] = set()
        self._numbers = _numbers(stored)
        groups = [len(group["params"]) for group in target.param_groups]
        given = [len(numbers) for numbers in self._numbers]
        self._place: dict[Any, Any] = {}
        self._plain = torch_objects.is_plain_optimizer(target)
        if partial or "state" not in stored.keys or "param_groups" not in stored.keys:
            numbers = iter(range(len(self._parameters)))  # of what the selection is laid over
            self._numbers = [[next(numbers) for _ in range(count)] for count in groups]
            self._place = dict(enumerate(self._parameters))
            return
        if given != groups:
            plan.differs(path, stored, f"groups of {given} parameters stored, {groups} to be filled")
            self.handed = None
            return
        self._place = dict(zip((n for group in self._numbers for n in group), self._parameters, strict=True))
        state = _child(stored, "state")
        if isinstance(state, Branch):
            fitting = self._fitting(plan, paths.join(path, "state"), state)
            self._stored = _with_child(stored, "state", fitting)
            self.handed = _with_child(stored, "state", self._in_place(plan, path, fitting))

    def _fitting(self, plan: Planning, path: str, state: Branch) -> Branch:
        """The stored state without that of parameters whose shape is another now."""
        kind = type(self._target)
        if not kind.__module__.startswith("torch.optim.") or kind.__name__ in _OTHER_SHAPES:
            return state
        keys, children = [], []
        for key, child in zip(state.keys, state.children, strict=True):
            parameter = self._place.get(key)
            shape = None if parameter is None else tuple(parameter.shape)
            wrong = [] if shape is None else _of_other_shape(child, shape)
            if wrong:
                why = f"{', '.join(wrong)} stored for a parameter of shape {list(shape or ())}"
                plan.differs(paths.join(path, paths.name(key)), child, why)
            else:
                keys.append(key)
                children.append(child)
        return Branch(state.kind, keys, children, state.make)

    def _in_place(self, plan: Planning, path: str, state: Branch) -> Branch:
        if not self._plain:
            return state
        children = []
        for key, child in zip(state.keys, state.children, strict=True):
            live = self._live_state(key)
            below = paths.join(paths.join(path, "state"), paths.name(key))
            children.append(child if live is None else self._filling(plan, below, child, live))
        return Branch(state.kind, state.keys, children, state.make)

    def _filling(self, plan: Planning, path: str, stored: Stored, live: Any) -> Stored:
        if isinstance(stored, StoredTensor):
            # Where it does not fit, it is replaced, as load_state_dict does with all of them.
            if torch_tensors.is_tensor(live) and torch_tensors.is_dense(live):
                spec = torch_tensors.spec_of(live)
                same = (spec.framework, spec.dtype, spec.shape)
                if same == (stored.spec.framework, stored.spec.dtype, stored.spec.shape) and plan.fill(
                    stored, live, path
                ):
                    return _live(live)
            return stored
        if isinstance(stored, Compound):
            subclass = stored.kind == "subclass" and plan.fill_subclass(stored, live, path)
            return _live(live) if subclass else stored
        if not isinstance(stored, Branch):
            return stored
        if isinstance(live, Mapping):
            places: Mapping[Any, Any] = live
        elif isinstance(live, Sequence) and not isinstance(live, str):
            places = dict(enumerate(live))
        else:
            return stored
        children = [
            self._filling(plan, paths.join(path, paths.name(key)), child, places[key])
            if key in places
            else child
            for key, child in zip(stored.keys, stored.children, strict=True)
        ]
        return Branch(stored.kind, stored.keys, children, stored.make)

    def _live_state(self, key: Any) -> Any:
        parameter = self._place.get(key)
        return None if parameter is None else self._target.state.get(parameter)

    def run(self, value: Any, strict: bool) -> None:
        if self._partial:
            value = _merged(self._target.state_dict(), value)
        if self._plain:  # what it is given was compared with its ids when it was read, and becomes its state
            self._known = set(_pointers(value["state"]))
        self._target.load_state_dict(value)
        if torch_objects.casts(self._target):
            for key, given in value["state"].items():
                live = self._live_state(key)
                if live is not None:
                    self._target.state[self._place[key]] = _uncast(given, live)

    def altered(self, chunk: int) -> dict[str, str]:
        # Parameters are numbered anew when they are asked for: compared is what each one's state is.
        numbers = iter(range(len(self._parameters)))
        groups = [[next(numbers) for _ in group] for group in self._numbers]
        now = self._target.state_dict()
        if isinstance(now, Mapping) and isinstance(now.get("state"), Mapping):
            rows = zip(groups, self._numbers, strict=True)
            back = {at: old for group, row in rows for at, old in zip(group, row, strict=True)}
            now = dict(now) | {
                "state": {back.get(key, key): each for key, each in now["state"].items()},
                "param_groups": [
                    dict(group) | {"params": row}
                    for group, row in zip(now["param_groups"], self._numbers, strict=True)
                ],
            }

        def trusted(stored: StoredTensor, tensor: Any) -> bool:
            return tensor.data_ptr() in self._known

        return differences(self._stored, now, self.path, chunk, trusted)


def _numbers(stored: Branch) -> list[list[Any]]:
    """The numbers that a stored optimizer gave its parameters, by group."""
    found: list[list[Any]] = []
    groups = _child(stored, "param_groups")
    for group in groups.children if isinstance(groups, Branch) else ():
        members = _child(group, "params") if isinstance(group, Branch) else None
        if not isinstance(members, Branch):
            return []
        found.append([each.value for each in members.children if isinstance(each, StoredLeaf)])
    return found


def _child(stored: Stored, key: str) -> Stored:
    if isinstance(stored, Branch):
        for each, child in zip(stored.keys, stored.children, strict=True):
            if each == key:
                return child
    return StoredLeaf("none", None)


def _with_child(stored: Branch, key: str, new: Stored) -> Branch:
    children = [
        new if each == key else child for each, child in zip(stored.keys, stored.children, strict=True)
    ]
    return Branch(stored.kind, stored.keys, children, stored.make)


def _of_other_shape(stored: Stored, shape: tuple[int, ...]) -> list[str]:
    """The tensors of one parameter's state that have neither its shape nor none at all."""
    if not isinstance(stored, Branch):
        return []
    return [
        f"{key} of shape {list(child.spec.shape)}"
        for key, child in zip(stored.keys, stored.children, strict=True)
        if isinstance(child, StoredTensor) and child.spec.shape not in ((), shape)
    ]


def _pointers(value: Any) -> Iterator[int]:
    if torch_tensors.is_tensor(value):
        if torch_tensors.is_dense(value):
            yield value.data_ptr()
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _pointers(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _pointers(each)


def _uncast(given: Any, live: Any) -> Any:
    """`live` with every tensor that is of another dtype than the one given replaced by that."""
    if torch_tensors.is_tensor(given) and torch_tensors.is_tensor(live):
        return live if live.dtype == given.dtype else given.to(device=live.device)
    if isinstance(given, Mapping) and isinstance(live, dict):
        for key, each in given.items():
            if key in live:
                live[key] = _uncast(each, live[key])
    elif isinstance(given, list) and isinstance(live, list):
        live[:] = [_uncast(each, now) for each, now in zip(given, live, strict=True)]
    elif isinstance(given, tuple) and type(given) is tuple and type(live) is tuple:
        return tuple(_uncast(each, now) for each, now in zip(given, live, strict=True))
    return live


def _merged(current: Any, selected: Any) -> Any:
    """`selected` laid over `current`, dict by dict."""
    if isinstance(current, Mapping) and isinstance(selected, Mapping):
        merged = dict(current)
        for key, value in selected.items():
            merged[key] = _merged(current[key], value) if key in current else value
        return merged
    return selected
