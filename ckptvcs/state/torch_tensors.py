"""Torch tensors as raw memory, and back. The only module that knows torch.

Torch is never imported before the caller did, except to make a torch tensor at checkout.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Hashable
from typing import Any, Final, NamedTuple

import numpy as np

from ckptvcs.errors import CorruptionError, FormatError, InvalidError
from ckptvcs.state import codes
from ckptvcs.state.tensors import TORCH_SIZES, Place, Raw, Spec, raw_dtype
from ckptvcs.state.values import type_name

_SPARSE: Final = {
    "sparse_coo": ("indices", "values"),
    "sparse_csr": ("crow_indices", "col_indices", "values"),
    "sparse_csc": ("ccol_indices", "row_indices", "values"),
    "sparse_bsr": ("crow_indices", "col_indices", "values"),
    "sparse_bsc": ("ccol_indices", "row_indices", "values"),
}
_QUANTIZED: Final = ("qint8", "quint8", "qint32")
CONSTANTS: Final = ("layout", "memory_format", "qscheme")
"""Kinds of named values of torch, each a class of the same name."""
_SCHEMES: Final = ("per_tensor_affine", "per_channel_affine", "per_channel_affine_float_qparams")


def loaded() -> Any:
    """The torch module if the caller has imported it, else None."""
    return sys.modules.get("torch")


def require() -> Any:
    """The torch module, imported now if need be. InvalidError if it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise InvalidError(
            "this state holds torch tensors and torch is not installed",
            hint='checkout(..., framework="numpy") gives numpy arrays',
        ) from None


def is_tensor(value: object) -> bool:
    """Whether `value` is a torch tensor of any kind."""
    torch = loaded()
    return torch is not None and isinstance(value, torch.Tensor)


def is_module(value: object) -> bool:
    """Whether `value` is a torch.nn.Module."""
    torch = loaded()
    return torch is not None and isinstance(value, torch.nn.Module)


def is_generator(value: object) -> bool:
    """Whether `value` is a torch.Generator."""
    torch = loaded()
    return torch is not None and isinstance(value, torch.Generator)


_NESTED: Final = "nested tensor; store the list that .unbind() gives, or its .values() and .offsets()"


def why_not(value: Any) -> str | None:
    """Why a tensor cannot be stored, or None."""
    torch = loaded()
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        if not is_initialized(value):
            return "parameter of a lazy module, which has no data until the module is first called"
        if value.is_nested:
            return _NESTED
        return (
            f"tensor subclass {type(value).__name__} without __tensor_flatten__; convert it to a plain tensor"
        )
    if value.is_nested:
        return _NESTED
    if value.device.type == "meta":
        return "tensor on the meta device, which has no data"
    layout = name_of(value.layout)
    if value.is_quantized:
        if name_of(value.dtype) not in _QUANTIZED or name_of(value.qscheme()) not in _SCHEMES:
            return f"quantised tensor of dtype {value.dtype}; store its integers and parameters"
    elif layout != "strided" and layout not in _SPARSE:
        return f"tensor of layout {layout}; convert it with .to_dense()"
    elif name_of(value.dtype) not in TORCH_SIZES:
        return f"tensor of dtype {value.dtype}, which this version does not know"
    elif layout == "strided" and value.numel():
        last = sum((length - 1) * step for length, step in zip(value.shape, value.stride(), strict=True))
        needed = (value.storage_offset() + last + 1) * value.element_size()
        if needed > value.untyped_storage().nbytes():
            return "tensor whose memory has been freed (a sharding or offloading wrapper holds the data)"
    return None


def is_initialized(tensor: Any) -> bool:
    """Whether a tensor has a shape already; those of lazy modules get theirs later."""
    return not isinstance(tensor, loaded().nn.parameter.UninitializedTensorMixin)


def is_dense(tensor: Any) -> bool:
    """Whether a tensor is nothing but strided memory that can be stored."""
    return why_not(tensor) is None and name_of(tensor.layout) == "strided" and not tensor.is_quantized


def copy_into(target: Any, value: Any) -> None:
    """Copy a tensor's values over another of the same shape."""
    with require().no_grad():
        target.copy_(value)


@functools.cache
def name_of(thing: Hashable) -> str:
    """A dtype, layout or scheme by its name without "torch."."""
    return str(thing).removeprefix("torch.")


def flags_of(tensor: Any) -> int:
    """The flags of a tensor."""
    parameter = type(tensor) is not loaded().Tensor
    return (codes.REQUIRES_GRAD if tensor.requires_grad else 0) | (codes.PARAMETER if parameter else 0)


class _Memory:
    """A tensor's storage as numpy sees it. `Tensor.numpy` would forbid torch to resize the storage, which
    those who shard and offload their models do."""

    def __init__(self, flat: Any) -> None:
        self._kept = flat
        self.__array_interface__ = {
            "version": 3,
            "shape": (flat.numel(),),
            "typestr": "|u1",
            "data": (flat.data_ptr(), False),
        }


def memory(flat: Any) -> Raw:
    """The bytes of a flat uint8 CPU tensor, which stays alive as long as they do."""
    return np.asarray(_Memory(flat)) if flat.numel() else np.empty(0, np.uint8)


def resolved(tensor: Any) -> Any:
    """A strided tensor apart from autograd, whose memory holds its values as they are."""
    plain = tensor.detach()
    return plain.resolve_conj().resolve_neg() if plain.is_conj() or plain.is_neg() else plain


def spec_of(tensor: Any) -> Spec:
    """What a strided tensor is."""
    name = name_of(tensor.dtype)
    return Spec("torch", name, tuple(tensor.shape), flags_of(tensor), tensor.element_size())


def host_memory(plain: Any) -> Raw:
    """The memory of a `resolved` CPU tensor, which stays alive as long as it does."""
    torch = loaded()
    return view_of(plain, memory(torch.empty(0, dtype=torch.uint8).set_(plain.untyped_storage())))


def view_of(plain: Any, storage: Raw) -> Raw:
    """A `resolved` tensor as raw elements of the bytes of its storage."""
    item = plain.element_size()
    return np.ndarray(
        tuple(plain.shape),
        raw_dtype(item),
        storage,
        plain.storage_offset() * item if plain.numel() else 0,
        [step * item for step in plain.stride()] if plain.numel() else None,
    )


_CERTAIN: Final = 1 << 20
"""Bytes of the smallest tensor that gets a witness. Kernels that update statistics (batch normalisation,
observers of quantisation) write to small tensors without counting, and copying those costs nothing."""


def witness(tensor: Any) -> Hashable:
    """What is the same again as long as nothing that torch counts has written to the tensor; None if torch
    does not count for it, and for small tensors.

    Fused optimizers are made to count from the first call on. Writes through `.data`, through a numpy view,
    and by foreign code go uncounted.
    """
    _count_fused_steps()
    if tensor.numel() * tensor.element_size() < _CERTAIN:
        return None
    try:
        version = tensor._version
    except RuntimeError:  # made in inference mode
        return None
    storage = tensor.untyped_storage()
    # A weak reference keeps the storage's identity from being given to another, and not its memory.
    identity = loaded().multiprocessing.reductions.StorageWeakRef(storage)
    view = (tensor.data_ptr(), storage.nbytes(), tuple(tensor.stride()), tuple(tensor.shape))
    return identity, version, view, tensor.dtype, tensor.is_conj(), tensor.is_neg()


@functools.cache
def _count_fused_steps() -> None:
    """Have the steps of fused optimizers count as writes. Their kernels write without telling, so this is
    what `increment_version` is for."""
    torch = loaded()

    def count(optimizer: Any, *_: Any) -> None:
        written: list[Any] = []
        for group in optimizer.param_groups:
            if group.get("fused"):
                for parameter in group["params"]:
                    _add_plain(parameter, written)
                    for each in optimizer.state.get(parameter, {}).values():
                        if isinstance(each, torch.Tensor):
                            _add_plain(each, written)
        if written:
            torch.autograd.graph.increment_version(written)

    importlib.import_module("torch.optim.optimizer").register_optimizer_step_post_hook(count)


def _add_plain(tensor: Any, out: list[Any]) -> None:
    """The tensors whose memory a tensor shows."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            _add_plain(getattr(tensor, name), out)
    elif not tensor.is_inference():
        out.append(tensor)


def sparse(tensor: Any) -> tuple[str, int, dict[str, Any]] | None:
    """(layout, flags, components) of a sparse tensor; None for any other."""
    layout = name_of(tensor.layout)
    if layout not in _SPARSE:
        return None
    flags = flags_of(tensor)
    plain = tensor.detach()
    if layout == "sparse_coo":
        flags |= codes.COALESCED if plain.is_coalesced() else 0
        return layout, flags, {"indices": plain._indices(), "values": plain._values()}
    return layout, flags, {part: getattr(plain, part)() for part in _SPARSE[layout]}


def quantized(tensor: Any) -> tuple[str, str, int, int | None, dict[str, Any]] | None:
    """(dtype, scheme, flags, axis, components) of a quantised tensor; None for any other."""
    if not tensor.is_quantized:
        return None
    plain = tensor.detach()
    scheme = name_of(plain.qscheme())
    parts = {"integers": plain.int_repr()}
    axis = None
    if scheme == "per_tensor_affine":
        parts |= {"scale": plain.q_scale(), "zero_point": plain.q_zero_point()}
    else:
        axis = plain.q_per_channel_axis()
        parts |= {"scale": plain.q_per_channel_scales(), "zero_point": plain.q_per_channel_zero_points()}
    return name_of(plain.dtype), scheme, flags_of(tensor), axis, parts


class Subclass(NamedTuple):
    """A tensor of a class of its own, taken apart.

    Attributes:
        type: "module:qualname" of the class.
        shape: its shape.
        flags: its flags.
        parts: the tensors it is made of, each over the memory that it has there.
        context: what else it takes to make it.
    """

    type: str
    shape: tuple[int, ...]
    flags: int
    parts: dict[str, Any]
    context: Any


def subclass(tensor: Any) -> Subclass | None:
    """A tensor subclass that can be taken apart: one that says how by `__tensor_flatten__`, or one that
    changes no operation of torch and so is a plain tensor by another name. None for all others."""
    torch = loaded()
    kind = type(tensor)
    if kind in (torch.Tensor, torch.nn.Parameter) or not is_initialized(tensor):
        return None
    flattens = callable(getattr(kind, "__tensor_flatten__", None))
    relabels = kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    with torch._C.DisableTorchFunctionSubclass():
        if tensor.is_nested or not (flattens or relabels):
            return None
        flags = codes.REQUIRES_GRAD if tensor.requires_grad else 0
        flags |= codes.PARAMETER if isinstance(tensor, torch.nn.Parameter) else 0
        name, shape = type_name(kind), tuple(tensor.shape)
        if not flattens:
            attributes = {key: each for key, each in vars(tensor).items() if key != "_is_param"}
            return Subclass(name, shape, flags, {"": tensor.detach().as_subclass(torch.Tensor)}, attributes)
    names, context = tensor.__tensor_flatten__()
    return Subclass(name, shape, flags, {each: getattr(tensor, each) for each in names}, context)


# -- back to torch --------------------------------------------------------------------------------


def dtype(name: str) -> Any:
    """The torch dtype of a stored name. FormatError if this torch lacks it."""
    found = getattr(require(), name, None)
    if not isinstance(found, require().dtype):
        raise FormatError(f"this torch has no dtype {name!r}", hint='newer torch, or framework="numpy"')
    return found


def constant(kind: str, name: str) -> Any:
    """A layout, memory format or scheme by its name. FormatError if this torch lacks it."""
    found = getattr(require(), name, None)
    if not isinstance(found, getattr(require(), kind)):
        raise FormatError(f"this torch has no {kind} {name!r}", hint='newer torch, or framework="numpy"')
    return found


def device(text: str) -> Any:
    """The torch device a text names. CorruptionError if there can be none."""
    try:
        return require().device(text)
    except RuntimeError:
        raise CorruptionError(f"no torch device is called {text!r}") from None


def allocate(nbytes: int, zeroed: bool = False, device: Any = None) -> tuple[Any, Raw]:
    """Fresh torch memory, and the same memory for numpy to fill, or nothing if it is on a device."""
    # Made by torch so that the storage can be resized and freed by torch later.
    torch = require()
    base = (torch.zeros if zeroed else torch.empty)(nbytes, dtype=torch.uint8, device=device)
    return base, memory(base) if device is None else np.empty(0, np.uint8)


def device_type(device: Any) -> str:
    """The kind of device that a text, a number or a torch.device names, such as "cuda"."""
    return str(require().device(device).type)


def restore(base: Any, spec: Spec, place: Place) -> Any:
    """The tensor of `spec` at `place` in a torch buffer of bytes."""
    torch = require()
    kind = dtype(spec.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # complex32 calls itself experimental
        tensor = torch.empty(0, dtype=kind, device=base.device).set_(
            base.untyped_storage(),
            place.offset // spec.item,
            spec.shape,
            tuple(step // spec.item for step in place.strides),
        )
    return flagged(tensor, spec.flags)


def flagged(tensor: Any, flags: int) -> Any:
    """The tensor as a Parameter, or requiring gradients, as its flags say."""
    torch = require()
    grad = bool(flags & codes.REQUIRES_GRAD)
    try:
        if flags & codes.PARAMETER:
            return torch.nn.Parameter(tensor, requires_grad=grad)
        return tensor.requires_grad_() if grad else tensor
    except RuntimeError as error:
        raise CorruptionError(f"a stored tensor cannot require gradients: {error}") from None


def restore_sparse(layout: str, shape: tuple[int, ...], flags: int, parts: dict[str, Any]) -> Any:
    """The sparse tensor of these components. CorruptionError if they contradict each other."""
    torch = require()
    if layout not in _SPARSE or set(parts) != set(_SPARSE[layout]):
        raise CorruptionError(f"a sparse tensor of unknown layout {layout!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # these layouts call themselves beta
            if layout == "sparse_coo":
                tensor = torch.sparse_coo_tensor(
                    parts["indices"],
                    parts["values"],
                    shape,
                    is_coalesced=bool(flags & codes.COALESCED),
                    check_invariants=True,
                )
            else:
                tensor = torch.sparse_compressed_tensor(
                    *(parts[part] for part in _SPARSE[layout]),
                    shape,
                    layout=getattr(torch, layout),
                    check_invariants=True,
                )
    except (RuntimeError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise CorruptionError(f"a stored sparse tensor is impossible: {error}") from None
    return flagged(tensor, flags)


def restore_quantized(name: str, scheme: str, flags: int, axis: int | None, parts: dict[str, Any]) -> Any:
    """The quantised tensor of these components. CorruptionError if they contradict each other."""
    torch = require()
    if name not in _QUANTIZED or scheme not in _SCHEMES or set(parts) != {"integers", "scale", "zero_point"}:
        raise CorruptionError(f"a quantised tensor of unknown scheme {scheme!r}")
    try:
        integers, scale, zero = parts["integers"], parts["scale"], parts["zero_point"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # deprecated upstream; stored ones stay readable
            if scheme == "per_tensor_affine":
                empty = torch._empty_affine_quantized(
                    integers.shape, scale=scale, zero_point=zero, dtype=dtype(name)
                )
            else:
                empty = torch._empty_per_channel_affine_quantized(
                    integers.shape, scales=scale, zero_points=zero, axis=axis, dtype=dtype(name)
                )
            if empty.int_repr().dtype != integers.dtype:
                raise CorruptionError("a quantised tensor's integers are of the wrong dtype")
            # The memory is written as plain bytes: setting quantised values would round them again.
            memory = torch.empty(0, dtype=integers.dtype).set_(
                empty.untyped_storage(), 0, integers.shape, integers.contiguous().stride()
            )
            memory.copy_(integers)
    except (RuntimeError, TypeError, ValueError, IndexError, OverflowError, AttributeError) as error:
        raise CorruptionError(f"a stored quantised tensor is impossible: {error}") from None
    return flagged(empty, flags)


# -- other torch values ---------------------------------------------------------------------------


def is_storage(value: object) -> bool:
    """Whether `value` is a torch storage."""
    torch = loaded()
    return torch is not None and isinstance(value, (torch.UntypedStorage, torch.TypedStorage))


def leaf(value: Any) -> tuple[int, Any] | None:
    """(code, payload value) of a torch.Size, dtype, device or constant; None for anything else."""
    torch = loaded()
    if torch is None:
        return None
    if type(value) is torch.Size:
        return codes.TORCH_SIZE, [int(length) for length in value]
    if isinstance(value, torch.dtype):
        return codes.TORCH_DTYPE, name_of(value)
    if isinstance(value, torch.device):
        return codes.TORCH_DEVICE, str(value)
    for kind in CONSTANTS:
        if isinstance(value, getattr(torch, kind)):
            return codes.TORCH_CONSTANT, [kind, name_of(value)]
    return None


def generator_state(value: object) -> tuple[str, Any] | None:
    """(device, state tensor) of a torch.Generator; None for anything else."""
    torch = loaded()
    if torch is None or not isinstance(value, torch.Generator):
        return None
    return str(value.device), value.get_state()


def restore_generator(device_text: str, state: Any) -> Any:
    """A generator with this state. InvalidError if this machine lacks its device."""
    try:
        found = require().Generator(device=device(device_text))
    except RuntimeError as error:
        raise InvalidError(f"no random generator on {device_text}: {error}") from None
    set_generator(found, state)
    return found


def set_generator(target: Any, state: Any) -> None:
    """Give an existing generator this state."""
    try:
        target.set_state(state)
    except (RuntimeError, TypeError) as error:
        raise CorruptionError(f"torch does not take the generator's state: {error}") from None
