"""What `torch.save` writes: a zip archive of a pickle and the storages it refers to.

`torch/serialization.py`: `NAME/data.pkl` describes the object, `NAME/data/KEY` holds the bytes of a storage,
`NAME/byteorder` says how its numbers lie. The pickle is described (`pickled`), never loaded. Where it cannot
be described, its storages are still found, as bytes. Older files that are one pickle without an archive are
not recognised.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ckptvcs.state import codes, paths
from ckptvcs.state.formats import pickled
from ckptvcs.state.formats.archive import Member, members
from ckptvcs.state.formats.layout import (
    MAX_NAME,
    MAX_TENSORS,
    File,
    Layout,
    Plain,
    Tensor,
    apart,
    shape_of,
    strides_of,
)
from ckptvcs.state.formats.pickled import Call, Items, Name, Pairs, Persistent
from ckptvcs.state.tensors import MAX_BYTES, TORCH_SIZES, Spec

_MOST_VALUES: Final = 1_000_000
_MOST_LEAVES: Final = 100_000
_LONGEST_LEAF: Final = 4096
_MOST_LETTERS: Final = 64 << 20
"""Of all paths together."""

_ROOT: Final = "tensor"
"""The path of what is no part of anything: a tensor that was saved by itself."""

_STORAGES: Final = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "QInt8Storage": "int8", "QUInt8Storage": "uint8",
    "QInt32Storage": "int32", "QUInt4x2Storage": "uint8", "QUInt2x4Storage": "uint8",
    "UntypedStorage": "uint8",
}  # fmt: skip
"""The dtype that each class of storages counts in; quantised integers as the integers they are."""

_SPARSE: Final = {
    "torch.sparse_coo": ("indices", "values"),
    "torch.sparse_csr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_csc": ("ccol_indices", "row_indices", "values"),
    "torch.sparse_bsr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_bsc": ("ccol_indices", "row_indices", "values"),
}


@dataclass(slots=True)
class _Found:
    """What lies under which path. Tensors' offsets count from the start of their storage."""

    tensors: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    leaves: dict[str, Plain] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)


def parse(file: File) -> Layout | None:
    """The layout of an archive that torch wrote; None if it is none, or big endian."""
    found = members(file)
    heads = [m for m in found or () if m.name.endswith("/data.pkl") and m.stored]
    if not found or len(heads) != 1:
        return None
    head = heads[0]
    folder = head.name.removesuffix("data.pkl")
    storages = {
        member.name.removeprefix(folder + "data/"): member
        for member in found
        if member.stored and member.name.startswith(folder + "data/")
    }
    order = next((member for member in found if member.name == folder + "byteorder"), None)
    if order is not None and (order.size > 16 or file.read(order.offset, order.size) != b"little"):
        return None
    walked = _Found()
    if head.size <= pickled.MAX_BYTES:
        try:
            walked = _walked(pickled.described(file.read(head.offset, head.size)))
        except pickled.OddError:
            pass
    placed: dict[str, list[Tensor]] = {key: [] for key in storages}
    tensors = []
    for key, tensor in walked.tensors.values():
        storage = storages.get(key)
        if storage is not None and tensor.offset + tensor.extent <= storage.size:
            tensors.append(replace(tensor, offset=storage.offset + tensor.offset))
            placed[key].append(tensors[-1])
    parts: list[Tensor] = []
    taken = {tensor.name for tensor in tensors}
    for key, storage in storages.items():
        named = apart(placed[key])
        rest = _rest(key, storage, walked.dtypes.get(key, "uint8"), named)
        parts += [*named, *(part for part in rest if part.name not in taken)]
    parts.sort(key=lambda part: part.offset)
    return Layout("torch", tuple(tensors), tuple(parts), walked.leaves)


def _rest(key: str, storage: Member, dtype: str, parts: list[Tensor]) -> Iterator[Tensor]:
    """The stretches of a storage in which no part lies, as flat tensors."""
    end = storage.offset + storage.size
    at = storage.offset
    for begin, behind in (*((p.offset, p.offset + p.spec.nbytes) for p in parts), (end, end)):
        if begin > at:
            known = dtype if (begin - at) % TORCH_SIZES[dtype] == 0 else "uint8"
            item = TORCH_SIZES[known]
            name = paths.name(f"{key}[{at - storage.offset}:{begin - storage.offset}]")
            yield Tensor(f"data/{name}", at, Spec("torch", known, ((begin - at) // item,), 0, item))
        at = behind


# -- what the pickle describes --------------------------------------------------------------------


def _walked(root: Any) -> _Found:
    """Everything below the root, by path. What is shared is met on each path; OddError for a pickle in which
    it is shared so often that it would unfold without end."""
    found = _Found()
    waiting: list[tuple[str, Any, int]] = [("", root, 0)]
    count = letters = 0
    while waiting:
        path, value, depth = waiting.pop()
        count += 1
        if type(value) is Persistent:
            _note_storage(found, path or _ROOT, value)
        elif type(value) is Call and (placed := _tensor(path or _ROOT, value)) is not None:
            key, dtype, tensor = placed
            found.tensors.setdefault(tensor.name, (key, tensor))
            found.dtypes.setdefault(key, dtype)
        elif _is_leaf(value):
            if len(found.leaves) < _MOST_LEAVES:
                found.leaves.setdefault(path or _ROOT, value)
        elif type(value) is Call and (number := _numpy_scalar(value)) is not None:
            found.leaves.setdefault(path or _ROOT, number)
        elif depth < codes.MAX_DEPTH:
            below = []
            for name, child in _children(value, _MOST_VALUES - count - len(waiting)):
                inner = paths.join(path, name)
                letters += len(inner)
                if len(inner) <= MAX_NAME:
                    below.append((inner, child, depth + 1))
            waiting += reversed(below)
        if letters > _MOST_LETTERS or len(found.tensors) > MAX_TENSORS:
            raise pickled.OddError
    return found


def _children(value: Any, most: int) -> list[tuple[str, Any]]:
    """(name, value) of what a described value holds. OddError if these are more than `most`."""
    if type(value) is not Call:
        return _items(value, most)
    if value.name.startswith("numpy."):
        return []
    sparse = _sparse(value)
    if sparse is not None:
        return sparse
    # What was put into an object, what it was made from, and its attributes.
    if len(value.items) + len(value.pairs) > most:
        raise pickled.OddError
    return [
        *((paths.name(at), child) for at, child in enumerate(value.items)),
        *((_name(key), child) for key, child in value.pairs),
        *_items(value.arguments, most),
        *_items(value.state, most),
    ]


def _items(value: Any, most: int) -> list[tuple[str, Any]]:
    """`_children` of a plain container, and none of anything else."""
    if type(value) not in (Pairs, Items, tuple):
        return []
    inner = value if type(value) is tuple else value.items
    if len(inner) > most:
        raise pickled.OddError
    if type(value) is Pairs:
        return [(_name(key), child) for key, child in inner]
    return [(paths.name(at), child) for at, child in enumerate(inner)]


def _name(key: Any) -> str:
    """A dict key as a path has it."""
    if key is None or type(key) in (bool, int, float, str):
        return paths.name(key) if type(key) is not str or len(key) <= MAX_NAME else "<text>"
    if type(key) is bytes and len(key) <= 64:
        return paths.name(key)
    if type(key) is tuple and len(key) <= 8 and all(type(part) in (bool, int, float, str) for part in key):
        return paths.name(tuple(part[:64] if type(part) is str else part for part in key))
    return f"<{key.text[:64]}>".replace("/", "\\/") if type(key) is Name else "<key>"


def _is_leaf(value: Any) -> bool:
    if type(value) is str:
        return len(value) <= _LONGEST_LEAF
    return value is None or type(value) in (bool, int, float)


def _numpy_scalar(value: Call) -> int | float | None:
    """The number in a numpy scalar, which metrics often are."""
    if not value.name.endswith(".multiarray.scalar"):
        return None
    arguments = value.arguments
    if type(arguments) is not tuple or len(arguments) != 2 or type(arguments[1]) is not bytes:
        return None
    dtype, data = arguments
    if type(dtype) is not Call or type(dtype.arguments) is not tuple or not dtype.arguments:
        return None
    layout = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "u8": "<Q", "u4": "<I"}.get(
        dtype.arguments[0] if type(dtype.arguments[0]) is str else ""
    )
    little = type(dtype.state) is tuple and len(dtype.state) > 1 and dtype.state[1] == "<"
    if layout is None or not little or len(data) != struct.calcsize(layout):
        return None
    number: int | float = struct.unpack(layout, data)[0]
    return number


def _sparse(value: Call) -> list[tuple[str, Any]] | None:
    """The tensors of a sparse one under the names that a commit gives them."""
    if value.name != "torch._utils._rebuild_sparse_tensor":
        return None
    match value.arguments:
        case (Call(arguments=(str(layout),)), tuple(inner)) if layout in _SPARSE and len(inner) >= 3:
            return list(zip(_SPARSE[layout], inner, strict=False))
    return None


def _note_storage(found: _Found, path: str, value: Persistent) -> None:
    """A storage that stands in the object for itself."""
    storage = _storage(value)
    if storage is not None:
        key, dtype, count = storage
        item = TORCH_SIZES[dtype]
        if count * item <= MAX_BYTES:
            found.tensors.setdefault(path, (key, Tensor(path, 0, Spec("torch", dtype, (count,), 0, item))))
            found.dtypes.setdefault(key, dtype)


def _storage(value: Any) -> tuple[str, str, int] | None:
    """(key, dtype, number of elements) of a storage."""
    if type(value) is not Persistent or type(value.id) is not tuple or len(value.id) < 5:
        return None
    word, kind, key, _, count = value.id[:5]
    if word != "storage" or type(kind) is not Name or type(key) is not str or type(count) is not int:
        return None
    dtype = _STORAGES.get(kind.text.rpartition(".")[2])
    return None if dtype is None or count < 0 else (key, dtype, count)


def _tensor(path: str, value: Call, depth: int = 0) -> tuple[str, str, Tensor] | None:
    """(key of its storage, dtype of that, the tensor) if the call makes a dense tensor."""
    name, arguments = value.name, value.arguments
    if type(arguments) is not tuple or not arguments or depth > 4:
        return None
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        if type(arguments[0]) is not Call or len(arguments) < 2:
            return None
        found = _tensor(path, arguments[0], depth + 1)
        if found is None:
            return None
        key, dtype, tensor = found
        flags = codes.PARAMETER | (codes.REQUIRES_GRAD if arguments[1] is True else 0)
        return key, dtype, replace(tensor, spec=replace(tensor.spec, flags=flags))
    if name == "torch._tensor._rebuild_from_type_v2":
        if len(arguments) < 3 or type(arguments[0]) is not Name:
            return None
        return _tensor(path, Call(arguments[0], arguments[2]), depth + 1)
    if not name.startswith("torch._utils._rebuild_") or name.rpartition("_")[2] not in (
        "tensor", "v2", "v3", "qtensor",
    ):  # fmt: skip
        return None
    if len(arguments) < 4:
        return None
    storage, offset, size, steps = _storage(arguments[0]), *arguments[1:4]
    shape, steps = shape_of(_ints(size)), _ints(steps)
    if storage is None or type(offset) is not int or shape is None or not _are_steps(steps, len(shape)):
        return None
    key, counted, _ = storage
    dtype = counted
    if name.endswith("_v3"):
        if len(arguments) < 7 or type(arguments[6]) is not Name:
            return None
        dtype = arguments[6].text.removeprefix("torch.")
    item = TORCH_SIZES.get(dtype)
    if item is None or not 0 <= offset < MAX_BYTES:
        return None
    flags = codes.REQUIRES_GRAD if len(arguments) > 4 and arguments[4] is True and "_v" in name else 0
    spec = Spec("torch", dtype, shape, flags, item)
    if spec.nbytes > MAX_BYTES:
        return None
    strides = strides_of(shape, [step * item for step in steps], item)
    return (
        key,
        dtype if counted == "uint8" else counted,
        Tensor(path, offset * item if spec.nbytes else 0, spec, strides),
    )


def _ints(value: Any) -> Any:
    """The numbers of a tuple, list or torch.Size."""
    if type(value) is Call and value.name == "torch.Size" and type(value.arguments) is tuple:
        value = value.arguments[0] if value.arguments else ()
    return value.items if type(value) is Items else value


def _are_steps(value: Any, count: int) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == count
        and all(type(step) is int and 0 <= step < MAX_BYTES for step in value)
    )
