"""Overrides: values that a fork sets anew in a state that was restored.

A name joins components with dots, as in `optimizer.lr`, or with "/" as paths do. The first component is that
of a component of the state; a name whose first component the state does not have is for the program to read.

What a name can mean:

- an entry of a mapping, a list or a namespace, or an attribute of an object with `load_state_dict`, that is
  a plain value or a tensor of one element;
- `optimizer.OPTION`, for an object with `param_groups`: that option of every group;
  `optimizer.param_groups.1.OPTION`: of one;
- `OPTION` alone, if the state has no such component and one optimizer in it has that option.

A learning rate is that at the top of the schedule: the `max_lr` of a group, else its `initial_lr`, else its
`lr`. The new one takes its place; the current `lr`, and what else schedules keep in the group, are scaled by
the ratio of new to old, and so are `base_lrs`, `max_lrs` and `_last_lr` of the schedulers of that optimizer
(torch.optim.lr_scheduler keeps the schedule in these). Weights, moments and positions stay.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from ckptvcs.errors import InvalidError, NotFoundError
from ckptvcs.state import paths

_RATES: Final = ("lr", "initial_lr", "max_lr", "min_lr")
_TOP: Final = ("max_lr", "initial_lr", "lr")
_DEEPEST: Final = 64


class Applied(NamedTuple):
    """What overrides did.

    Attributes:
        said: a line for each value that was set, with the old and the new one.
        left: overrides that the state has no component for; the program reads them itself.
    """

    said: list[str]
    left: dict[str, Any]


class _Place(NamedTuple):
    """Where a value is: its name, the value now, and how to set it."""

    name: str
    old: Any
    put: Callable[[Any], None]


def value_of(text: str) -> Any:
    """The value that a text says on a command line: JSON as far as it is a plain value or a list of them,
    Python's True, False and None, and else the text itself."""
    try:
        found = json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
    return text if isinstance(found, dict) else found


def checked(overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Overrides as they are recorded. InvalidError for names or values that cannot be."""
    found: dict[str, Any] = {}
    for name, value in (overrides or {}).items():
        if not isinstance(name, str) or not all(_parts(name)):
            raise InvalidError(f"{name!r} cannot be overridden", hint="names are like optimizer.lr")
        found[name] = _plain(value, name)
    return found


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(each, name) for each in value]
    if value is None:
        return None
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    raise InvalidError(
        f"{name} cannot be set to a {type(value).__name__}", hint="numbers, text, lists of them"
    )


def check(into: Any, overrides: Mapping[str, Any]) -> None:
    """Refuse overrides that do not fit a state, before anything is changed in it.

    NotFoundError for a name that means nothing in a component that is there; InvalidError for a value of
    another kind.
    """
    for name, value in overrides.items():
        for place in _places(into, name) or ():
            _fitting(place, value)


def apply(into: Any, overrides: Mapping[str, Any]) -> Applied:
    """Set the values in a state, in place."""
    said: list[str] = []
    left: dict[str, Any] = {}
    for name, value in overrides.items():
        places = _places(into, name)
        if places is None:
            left[name] = value
        for place in places or ():
            new = _fitting(place, value)
            shown = _shown(place.old)  # a tensor is changed in place
            place.put(new)
            said.append(f"{place.name}: {shown} -> {_shown(new)}")
    return Applied(list(dict.fromkeys(said)), left)


def _parts(name: str) -> tuple[str, ...]:
    return paths.split(name) if "/" in name else tuple(name.split("."))


# -- finding places -------------------------------------------------------------------------------


def _places(into: Any, name: str) -> list[_Place] | None:
    """The places that a name means; None if the state has no such component."""
    parts = _parts(name)
    if _child(into, parts[0]) is None:
        owners = [each for each in _objects(into) if _groups(each) is not None and _has(each, parts[0])]
        if len(parts) == 1 and len(owners) == 1:
            return _options(into, owners[0], parts[0], name, _groups(owners[0]) or [])
        return None
    node, at = into, ""
    for n, part in enumerate(parts):
        groups = _groups(node)
        rest = parts[n:]
        if groups is not None and len(rest) == 1 and rest[0] != "param_groups":
            return _options(into, node, rest[0], name, groups)
        if groups is not None and len(rest) == 3 and rest[0] == "param_groups":
            chosen = groups[int(rest[1])] if rest[1].isdecimal() and int(rest[1]) < len(groups) else None
            if chosen is None:
                raise NotFoundError(f"{at} has no parameter group {rest[1]}")
            return _options(into, node, rest[2], name, [chosen])
        found = _child(node, part)
        if found is None:
            near = difflib.get_close_matches(part, _names(node), n=3)
            raise NotFoundError(
                f"{name} cannot be overridden: {at or 'the state'} has no {part!r}",
                hint=f"did you mean {' or '.join(near)}?" if near else None,
            )
        at = f"{at}.{part}" if at else part
        if n == len(parts) - 1:
            if isinstance(node, tuple):
                raise InvalidError(f"{name} cannot be overridden: {at} is in a tuple", hint="set all of it")
            return [_Place(name, found.old, found.put)]
        node = found.old
    return []


def _names(node: Any) -> list[str]:
    groups = _groups(node)
    if groups is not None:
        return ["param_groups", *(str(key) for key in (groups[0] if groups else ()) if key != "params")]
    if isinstance(node, Mapping):
        return [paths.name(key) for key in node]
    return [key for key in getattr(node, "__dict__", {}) if not key.startswith("_")]


def _child(node: Any, part: str) -> _Place | None:
    """What a component of a name means below a node; None if nothing."""
    if isinstance(node, Mapping):
        for key in node:
            if paths.name(key) == part or key == part:
                return _Place(part, node[key], _item_setter(node, key))
        return None
    if isinstance(node, (list, tuple)):
        if part.isdecimal() and int(part) < len(node):
            return _Place(part, node[int(part)], _item_setter(node, int(part)))
        return None
    if isinstance(node, (np.ndarray, np.generic, str, bytes)) or part.startswith("_"):
        return None
    if part in getattr(node, "__dict__", {}):
        return _Place(part, getattr(node, part), _attribute_setter(node, part))
    return None


def _item_setter(node: Any, key: Any) -> Callable[[Any], None]:
    def put(value: Any) -> None:
        if _is_scalar_tensor(node[key]):
            _fill(node[key], value)
        else:
            node[key] = value

    return put


def _attribute_setter(node: Any, name: str) -> Callable[[Any], None]:
    def put(value: Any) -> None:
        if _is_scalar_tensor(getattr(node, name)):
            _fill(getattr(node, name), value)
        else:
            setattr(node, name, value)

    return put


def _groups(node: Any) -> list[MutableMapping[str, Any]] | None:
    """The parameter groups of an optimizer; None for anything else."""
    groups = getattr(node, "param_groups", None)
    if isinstance(node, Mapping) or not isinstance(groups, list):
        return None
    return groups if all(isinstance(group, MutableMapping) for group in groups) else None


def _has(optimizer: Any, option: str) -> bool:
    return option != "params" and any(option in group for group in _groups(optimizer) or ())


def _objects(node: Any, deep: int = 0) -> Iterator[Any]:
    """Every value of a state that is no plain container."""
    if deep > _DEEPEST:
        return
    if isinstance(node, Mapping):
        for value in node.values():
            yield from _objects(value, deep + 1)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _objects(value, deep + 1)
    else:
        yield node


# -- optimizers -----------------------------------------------------------------------------------


def _options(
    into: Any, optimizer: Any, option: str, name: str, groups: Sequence[MutableMapping[str, Any]]
) -> list[_Place]:
    """An option in parameter groups."""
    having = [group for group in groups if option in group and option != "params"]
    if not having:
        near = difflib.get_close_matches(option, _names(optimizer), n=3)
        raise NotFoundError(
            f"{name} cannot be overridden: no parameter group has {option!r}",
            hint=f"did you mean {' or '.join(near)}?" if near else None,
        )
    if option != "lr":
        return [_Place(name, group[option], _item_setter(group, option)) for group in having]
    every = _groups(optimizer) or []
    schedulers = [each for each in _objects(into) if getattr(each, "optimizer", None) is optimizer]
    return [
        _Place(
            name,
            group[next(key for key in _TOP if key in group)],
            _rate_setter(group, next(n for n, each in enumerate(every) if each is group), schedulers),
        )
        for group in having
    ]


def _rate_setter(
    group: MutableMapping[str, Any], number: int, schedulers: Sequence[Any]
) -> Callable[[Any], None]:
    """Sets a group's learning rate, and what schedules made of the old one."""

    def put(new: Any) -> None:
        old = _number(group[next(key for key in _TOP if key in group)])
        wanted = _number(new)

        def scaled(value: Any) -> Any:
            now = _number(value)
            # The exact value where it stood exactly: a product may be off in its last bit.
            return wanted if now == old or not old else now * (wanted / old)

        for key in _RATES:
            if isinstance(group.get(key), (int, float)) or _is_scalar_tensor(group.get(key)):
                _item_setter(group, key)(scaled(group[key]))
        for scheduler in _with_inner(schedulers):
            for name in ("base_lrs", "max_lrs", "_last_lr"):
                rates = getattr(scheduler, name, None)
                if isinstance(rates, list) and number < len(rates):
                    _item_setter(rates, number)(scaled(rates[number]))

    return put


def _with_inner(schedulers: Sequence[Any]) -> Iterator[Any]:
    """Schedulers and those they are made of, each once."""
    waiting, seen = list(schedulers), set[int]()
    while waiting:
        scheduler = waiting.pop()
        if id(scheduler) in seen:
            continue
        seen.add(id(scheduler))
        yield scheduler
        inner = getattr(scheduler, "_schedulers", None)
        waiting += inner if isinstance(inner, (list, tuple)) else []


# -- values ---------------------------------------------------------------------------------------


def _is_scalar_tensor(value: Any) -> bool:
    """A tensor or array of one element, which is set in place."""
    if isinstance(value, np.ndarray):
        return value.size == 1
    return hasattr(value, "fill_") and bool(value.numel() == 1)


def _number(value: Any) -> float:
    return float(value.item() if hasattr(value, "item") else value)


def _fill(there: Any, value: Any) -> None:
    if isinstance(there, np.ndarray):
        there.fill(value)
    else:
        there.fill_(value)


def _fitting(place: _Place, value: Any) -> Any:
    """The value as what is there asks for it. InvalidError if it does not fit."""
    old = place.old
    if _is_scalar_tensor(old):
        if isinstance(value, (bool, int, float)):
            return value
    elif old is None or value is None:
        if old is None or not isinstance(old, (Mapping, np.ndarray)):
            return value
    elif isinstance(old, bool) or isinstance(value, bool):
        if isinstance(old, bool) and isinstance(value, bool):
            return value
    elif isinstance(old, float):
        if isinstance(value, (int, float)):
            return float(value)
    elif isinstance(old, int):
        if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
            return value
    elif isinstance(old, tuple):
        if isinstance(value, list) and (len(value) == len(old)):
            return tuple(value)
    elif isinstance(old, (str, list)) and isinstance(value, type(old)):
        return value
    raise InvalidError(
        f"{place.name} cannot be set to {value!r:.60}: a {_kind(old)} is there",
    )


def _kind(value: Any) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, tuple) else type(value).__name__


def _shown(value: Any) -> str:
    text = f"{_number(value):.10g}" if _is_scalar_tensor(value) else repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
