"""Torch's modules and optimizers: names without wrappers, who loads in its own way, who holds a part only.

Everything is decided by the classes that are found, never by the text of a name: a model may well have an
attribute called `module`. Torch is never imported here; without it nothing is a torch object.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from ckptvcs.errors import InvalidError
from ckptvcs.state import torch_tensors

# -- what is spread over processes ----------------------------------------------------------------

_SHARDED: Final = frozenset(("DTensor", "ShardedTensor", "FullyShardedDataParallel", "FSDPModule"))


def _sharded_kind(kind: type) -> str | None:
    for base in kind.__mro__:
        if base.__name__ in _SHARDED and base.__module__.startswith("torch.distributed"):
            return base.__name__
    return None


def _is_partitioned(tensor: Any) -> bool:
    """Whether DeepSpeed (ZeRO 3) has taken a parameter's data apart and left an empty tensor."""
    whole = getattr(tensor, "ds_numel", None)
    return whole is not None and whole != tensor.numel()


def refuse_sharded(value: object, path: Callable[[], str]) -> None:
    """InvalidError for a tensor, module or optimizer of which this process holds a part only.

    Looks at classes alone and calls nothing that could be a collective, so that the processes of a job do
    not wait for each other.
    """
    for name, kind in _parts(value):
        raise InvalidError(
            f"{path() or '(the state itself)'}: {name and f'{name} is '}a {kind} spread over processes; "
            "a plain commit sees one part of it",
            hint="commit it through torch.distributed.checkpoint (DCP)",
        )


def _parts(value: Any) -> Iterator[tuple[str, str]]:
    kind = _sharded_kind(type(value))
    if kind is not None:
        yield "", kind
    if torch_tensors.is_module(value):
        for name, module in value.named_modules():
            if name and (kind := _sharded_kind(type(module))):
                yield name, kind
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    yield from _part(f"{name}.{key}" if name else key, tensor)
    elif is_optimizer(value):
        for at, group in enumerate(value.param_groups):
            for index, parameter in enumerate(group["params"]):
                where = f"parameter {index} of group {at}"
                yield from _part(where, parameter)
                state = value.state.get(parameter)
                for key, tensor in state.items() if isinstance(state, Mapping) else ():
                    yield from _part(f"{key} of {where}", tensor)


def _part(name: str, tensor: Any) -> Iterator[tuple[str, str]]:
    kind = _sharded_kind(type(tensor))
    if kind is not None:
        yield name, kind
    elif _is_partitioned(tensor):
        yield name, "parameter that DeepSpeed has"


# -- modules --------------------------------------------------------------------------------------

_CHECKPOINTED: Final = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
_INNER: Final = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.optim.swa_utils", "AveragedModel"): "module",
    (_CHECKPOINTED, "ActivationWrapper"): "_checkpoint_wrapped_module",
}
"""Classes that wrap a module, and the attribute that holds it."""


def _inner_name(kind: type) -> str | None:
    for base in kind.__mro__:
        found = _INNER.get((base.__module__, base.__qualname__))
        if found is not None:
            return found
    return None


class Place(NamedTuple):
    """An entry of a module's state_dict.

    Attributes:
        name: its name without wrappers.
        plain: whether the modules on the way to it load as `torch.nn.Module` does: they copy what they are
            given into the tensor that state_dict() shows, and that is all.
    """

    name: str
    plain: bool


class ModuleNames:
    """The names of a module's state_dict, without what wrapping modules put in front of them."""

    def __init__(self, module: Any) -> None:
        self._root = module

    def place(self, name: str) -> Place:
        """Where an entry of the module's own state_dict() belongs."""
        module, kept, rest, plain = self._root, list[str](), name, True
        while True:
            plain = plain and _loads_plainly(module)
            inner = _inner_name(type(module))
            head, dot, tail = rest.partition(".")
            if inner is not None and dot and head == inner:
                module, rest = module._modules[inner], tail
                continue
            if inner == "_checkpoint_wrapped_module":  # its own hooks leave the name out
                module = module._modules[inner]
                continue
            if not dot or head not in module._modules or module._modules[head] is None:
                return Place(".".join([*kept, rest]), plain)
            kept.append(head)
            module, rest = module._modules[head], tail

    def module_name(self, name: str) -> str:
        """The name of a module within the whole; "" is the whole."""
        return self.place(f"{name}.").name.removesuffix(".") if name else ""

    def metadata(self, plain: Mapping[str, Any]) -> Any:
        """The `_metadata` of a state_dict for this module, from one without wrappers."""
        found: collections.OrderedDict[str, Any] = collections.OrderedDict()
        for name, _ in self._root.named_modules(remove_duplicate=False):
            each = plain.get(self.module_name(name))
            if each is not None:
                found[name] = each
        return found


def unwrapped(module: Any, state: Any) -> Any:
    """A module's state_dict() under the names it would have without wrappers.

    InvalidError if two entries would have the same name.
    """
    if not isinstance(state, dict) or not any(_inner_name(type(each)) for each in module.modules()):
        return state
    names = ModuleNames(module)
    plain: collections.OrderedDict[Any, Any] = collections.OrderedDict()
    for key, value in state.items():
        name = names.place(key).name if type(key) is str else key
        if name in plain:
            raise InvalidError(f"two entries are called {name!r} without the names of wrapping modules")
        plain[name] = value
    metadata = getattr(state, "_metadata", None)
    if isinstance(metadata, Mapping):
        found: collections.OrderedDict[str, Any] = collections.OrderedDict()
        for name, each in metadata.items():  # of a wrapper and what it wraps, the latter is kept
            found[names.module_name(name)] = each
        plain._metadata = found  # type: ignore[attr-defined]
    return plain


_LOADING: Final = ("_load_from_state_dict", "_save_to_state_dict", "load_state_dict", "state_dict")
_HOOKS: Final = (
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)


def _loads_plainly(module: Any) -> bool:
    own = vars(module)
    for name in _LOADING:
        # Torch's own layers that override one of these do so for names of older versions.
        if name in own or not _of_torch(getattr(type(module), name)):
            return False
    return all(
        _of_torch(getattr(hook, "hook", hook)) for name in _HOOKS for hook in own.get(name, {}).values()
    )


def _of_torch(function: Any) -> bool:
    module = str(getattr(function, "__module__", ""))
    return module.startswith("torch.nn.modules.") or module == _CHECKPOINTED


def is_plain_module(module: Any) -> bool:
    """Whether loading a state_dict into a module can do nothing but copy tensors."""
    torch = torch_tensors.loaded()
    return not torch.__future__.get_swap_module_params_on_conversion() and all(
        _loads_plainly(each) and type(each).set_extra_state is torch.nn.Module.set_extra_state
        for each in module.modules()
    )


# -- optimizers -----------------------------------------------------------------------------------


def is_optimizer(value: object) -> bool:
    """Whether `value` is a torch.optim.Optimizer."""
    torch = torch_tensors.loaded()
    return torch is not None and isinstance(value, torch.optim.Optimizer)


_OPTIMIZER_HOOKS: Final = (
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
)


def casts(optimizer: Any) -> bool:
    """Whether an optimizer loads by torch's own method, which casts state to the dtype of the parameter."""
    own, kind = vars(optimizer), type(optimizer)
    return "load_state_dict" not in own and kind.load_state_dict.__module__ == "torch.optim.optimizer"


def is_plain_optimizer(optimizer: Any) -> bool:
    """Whether an optimizer loads as `torch.optim.Optimizer` does: tensors become its state as they are, or
    cast."""
    own = vars(optimizer)
    return all(
        name not in own and getattr(type(optimizer), name).__module__.startswith("torch.optim.")
        for name in ("load_state_dict", "state_dict", "__setstate__")
    ) and not any(own.get(name) for name in _OPTIMIZER_HOOKS)


EXTRA_STATE: Final = "_extra_state"
"""How the name of what get_extra_state() gives ends in a module's state_dict()."""


def is_data_loader(value: object) -> bool:
    """Whether `value` is a torch DataLoader, whose state_dict() may start its workers."""
    torch = torch_tensors.loaded()
    data = getattr(getattr(torch, "utils", None), "data", None)
    return data is not None and isinstance(value, data.DataLoader)
