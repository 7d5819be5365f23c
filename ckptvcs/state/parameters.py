"""Which parameter of a model a stored optimizer's entry belongs to.

Torch's optimizers number their parameters. Their names are derived here, when they are to be shown, and are
no part of what is stored: the same state has the same id, whatever else is known about it.

- An optimizer that was made from `model.named_parameters()` stores the names itself.
- Otherwise the parameters of a state_dict in the same commit are taken in order, if there are as many as the
  optimizer has and every shape agrees. What looks like a buffer of a norm layer is none of them, nor is the
  second name of a tied weight. An optimizer of several groups need not keep that order, so there only a
  parameter whose shape no other one has is told by it.
- Where two models would give different names, nothing is said.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Final

from ckptvcs.state import paths
from ckptvcs.state.read import Branch, Compound, Stored, StoredLeaf, StoredTensor

_MAPS: Final = ("dict", "OrderedDict")
_BUFFERS: Final = ("running_mean", "running_var", "num_batches_tracked")
_DEPTH: Final = 3
"""Containers above a model or an optimizer in which they are looked for."""


def parameter_names(root: Stored) -> dict[str, str]:
    """Path of what an optimizer holds for one parameter -> that parameter's name, where it is known."""
    optimizers: dict[str, Branch] = {}
    models: list[list[tuple[str, tuple[int, ...]]]] = []
    for path, branch in _maps(root, "", _DEPTH):
        if {"state", "param_groups"} <= set(branch.keys):
            optimizers[path] = branch
        elif found := _parameters(branch):
            models.append(found)
    names: dict[str, str] = {}
    for path, branch in optimizers.items():
        place = paths.join(path, "state")
        for number, name in _named(branch, models).items():
            names[paths.join(place, paths.name(number))] = name
    return names


def optimizers(root: Stored) -> list[str]:
    """The paths of what torch's optimizers gave as their state."""
    return [path for path, branch in _maps(root, "", _DEPTH) if {"state", "param_groups"} <= set(branch.keys)]


def _maps(node: Stored, path: str, depth: int) -> Iterator[tuple[str, Branch]]:
    if not isinstance(node, Branch) or isinstance(node, Compound) or node.kind not in _MAPS:
        return
    yield path, node
    if depth and not {"state", "param_groups"} <= set(node.keys):
        for key, child in zip(node.keys, node.children, strict=True):
            yield from _maps(child, paths.join(path, paths.name(key)), depth - 1)


def _parameters(branch: Branch) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of what may be the parameters in a state_dict, in order; [] if it is none."""
    found = []
    seen = set()
    for key, child in zip(branch.keys, branch.children, strict=True):
        if type(key) is not str or not isinstance(child, StoredTensor):
            continue
        alias = child.alias and (child.alias.group, child.alias.offset, child.alias.strides, child.spec.shape)
        floating = "float" in child.spec.dtype or "complex" in child.spec.dtype
        if not floating or key.rpartition(".")[2] in _BUFFERS or (alias and alias in seen):
            continue
        seen.add(alias)
        found.append((key, child.spec.shape))
    return found


def _named(optimizer: Branch, models: list[list[tuple[str, tuple[int, ...]]]]) -> dict[object, str]:
    groups = [child for child in _items(_child(optimizer, "param_groups")) if isinstance(child, Branch)]
    numbers = [_values(_child(group, "params")) for group in groups]
    given = [_values(_child(group, "param_names")) for group in groups]
    every = [number for group in numbers for number in group]
    if groups and all(len(row) == len(names) for row, names in zip(numbers, given, strict=True)):
        return {n: name for row, names in zip(numbers, given, strict=True)
                for n, name in zip(row, names, strict=True) if type(name) is str}  # fmt: skip
    shapes = _shapes(_child(optimizer, "state"))
    found: dict[object, set[str]] = collections.defaultdict(set)
    for model in models:
        if len(model) != len(every):
            continue
        if len(groups) == 1:
            pairs = list(zip(every, model, strict=True))
            if all(shapes.get(number, shape) == shape for number, (_, shape) in pairs):
                for number, (name, _) in pairs:
                    found[number].add(name)
            continue
        have = collections.Counter(shapes.values())
        known = {shape: name for name, shape in model}
        count = collections.Counter(shape for _, shape in model)
        for number, shape in shapes.items():
            if have[shape] == count[shape] == 1:
                found[number].add(known[shape])
    return {number: names.pop() for number, names in found.items() if len(names) == 1}


def _shapes(state: Stored | None) -> dict[object, tuple[int, ...]]:
    """The shape of each parameter, as far as its state tells: that which all its tensors have."""
    found = {}
    if isinstance(state, Branch):
        for number, child in zip(state.keys, state.children, strict=True):
            shapes = {
                each.spec.shape
                for each in _items(child)
                if isinstance(each, StoredTensor) and each.spec.shape
            }
            if len(shapes) == 1:
                found[number] = shapes.pop()
    return found


def _child(branch: Branch, key: str) -> Stored | None:
    return next((c for k, c in zip(branch.keys, branch.children, strict=True) if k == key), None)


def _items(node: Stored | None) -> list[Stored]:
    return node.children if isinstance(node, Branch) else []


def _values(node: Stored | None) -> list[object]:
    return [each.value for each in _items(node) if isinstance(each, StoredLeaf)]
