"""States of training as the benchmarks see them: flat names, component groups, sizes, equality to the bit."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]

COMPONENTS = ("model", "ema", "exp_avg", "exp_avg_sq", "rest")

_MARK = "\0tensor"


def flatten(state: State) -> tuple[dict[str, Tensor], bytes]:
    """Tensors by path, and everything else as bytes, for tools that store named tensors only."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value
            return (_MARK, path)
        if isinstance(value, dict):
            return {key: walk(item, f"{path}/{key}" if path else str(key)) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, f"{path}/{i}") for i, item in enumerate(value)]
        if isinstance(value, tuple):
            return tuple(walk(item, f"{path}/{i}") for i, item in enumerate(value))
        return value

    skeleton = walk(state, "")
    return tensors, pickle.dumps(skeleton)


def unflatten(tensors: dict[str, Tensor], rest: bytes) -> State:
    """The inverse of `flatten`. Dictionaries come back as plain ones."""

    def walk(value: Any) -> Any:
        if isinstance(value, tuple):
            if len(value) == 2 and value[0] == _MARK:
                return tensors[value[1]]
            return tuple(walk(item) for item in value)
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        return value

    return walk(pickle.loads(rest))


def tensor_bytes(state: State) -> int:
    """What a state weighs: the bytes of its tensors."""
    return sum(tensor.nbytes for tensor in flatten(state)[0].values())


def grouped(state: State) -> State:
    """The same tensors and values under the names of COMPONENTS, so that each is accounted for apart."""
    tensors, rest = flatten(state)
    groups: State = {name: {} for name in COMPONENTS}
    for path, tensor in tensors.items():
        groups[_component(path)][path] = tensor
    groups["rest"]["values"] = rest
    return groups


def component_bytes(state: State) -> dict[str, int]:
    """Tensor bytes of each component."""
    sizes = dict.fromkeys(COMPONENTS, 0)
    for path, tensor in flatten(state)[0].items():
        sizes[_component(path)] += tensor.nbytes
    return sizes


def largest(state: State) -> str:
    """The path of the model's largest tensor that is no embedding: what a reader of one tensor asks for."""
    tensors = {
        path: tensor.nbytes
        for path, tensor in flatten(state)[0].items()
        if path.startswith("model/") and "embed" not in path and "table" not in path
    }
    return max(tensors, key=lambda path: (tensors[path], path))


def difference(expected: State, found: State) -> str | None:
    """The first place where two states differ, None if they are equal to the bit.

    Keys are compared as text and sequences as lists, so that tools which change those are still compared.
    """
    return next(_differences(expected, found, ""), None)


def _differences(expected: Any, found: Any, path: str) -> Iterator[str]:
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor):
            yield f"{path}: {type(found).__name__} instead of a tensor"
        elif (expected.dtype, expected.shape) != (found.dtype, found.shape):
            yield f"{path}: {found.dtype} {tuple(found.shape)}"
        elif not torch.equal(_bits(expected), _bits(found)):
            yield f"{path}: other bits"
    elif isinstance(expected, dict):
        named = {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}
        if sorted(map(str, expected)) != sorted(named):
            yield f"{path}: other keys"
        for key, value in expected.items():
            yield from _differences(value, named.get(str(key)), f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        if not isinstance(found, list | tuple) or len(expected) != len(found):
            yield f"{path}: other items"
        else:
            for i, (one, other) in enumerate(zip(expected, found, strict=True)):
                yield from _differences(one, other, f"{path}/{i}")
    elif expected != found:
        yield f"{path}: {found!r} instead of {expected!r}"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _component(path: str) -> str:
    top, _, name = path.partition("/")
    if top in ("model", "ema"):
        return top
    last = name.rpartition("/")[2]
    return last if last in COMPONENTS else "rest"
