"""Tensors as memory: dtypes, layouts, shared memory, and gathering bytes from strides.

The only module that imports `ml_dtypes`. Torch tensors arrive here as numpy arrays of the same item
size over the same memory (`torch_tensors`), so everything about strides is said once.

Stored bytes are always C order and little endian, per tensor. What the memory looked like is metadata:
the order of the dimensions if the memory was dense, or a place in a group of tensors that share memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np

from ckptvcs.errors import CorruptionError, FormatError
from ckptvcs.ids import Buffer
from ckptvcs.state import codes

Raw: TypeAlias = "np.ndarray[Any, Any]"
"""An array whose dtype says nothing but the item size."""

MAX_BYTES: Final = 1 << 56
"""No tensor is larger; a stored shape that says so is damage."""

MAX_DIMENSIONS: Final = 64

# fmt: off
_PLAIN: Final = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
)
_FLOAT8: Final = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
_EXTRA: Final = (
    *_FLOAT8, "bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float6_e2m3fn",
    "float6_e3m2fn", "float4_e2m1fn",
    "int1", "int2", "int4", "uint1", "uint2", "uint4", "complex32", "bcomplex32",
)
_TORCH_BYTES: Final = (
    *_FLOAT8, "float4_e2m1fn_x2", "int1", "int2", "int3", "int4", "int5", "int6", "int7",
    "uint1", "uint2", "uint3", "uint4", "uint5", "uint6", "uint7", "bits8", "bits1x8", "bits2x4", "bits4x2",
)
# fmt: on
# Each release of ml_dtypes adds some; a name that this one lacks is refused when it is read.
_BY_NAME: Final[dict[str, np.dtype[Any]]] = {name: np.dtype(name) for name in _PLAIN} | {
    name: np.dtype(getattr(ml_dtypes, name)) for name in _EXTRA if hasattr(ml_dtypes, name)
}
_NAMES: Final = {dtype: name for name, dtype in _BY_NAME.items()}
_SIZED: Final = re.compile(r"([SUV])([1-9][0-9]{0,9})\Z")
_TIME: Final = re.compile(
    r"(datetime|timedelta)64(\[(?:[1-9][0-9]{0,8})?(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?\Z"
)

TORCH_SIZES: Final[dict[str, int]] = (
    {name: np.dtype(name).itemsize for name in _PLAIN}
    | dict.fromkeys(_TORCH_BYTES, 1)
    | {"bfloat16": 2, "bits16": 2, "complex32": 4}
)
"""Bytes per element of each torch dtype, known without torch so that trees can be listed anywhere."""

SHARED_NAMES: Final = frozenset((*_PLAIN, *_FLOAT8, "bfloat16", "complex32")) & _BY_NAME.keys()
"""dtypes of the same name and the same bytes in numpy (with ml_dtypes) and torch."""


# -- dtypes ---------------------------------------------------------------------------------------


def dtype_name(dtype: np.dtype[Any]) -> str | None:
    """The stored name of a numpy dtype, without its byte order; None if it cannot be stored."""
    if dtype.hasobject or dtype.names is not None or dtype.subdtype is not None or not dtype.itemsize:
        return None
    if dtype.kind in "SUV" and dtype.type in (np.bytes_, np.str_, np.void):
        return f"{dtype.kind}{dtype.itemsize // 4 if dtype.kind == 'U' else dtype.itemsize}"
    if dtype.kind in "mM":
        return dtype.name
    return _NAMES.get(dtype.newbyteorder("="))


def why_not(dtype: np.dtype[Any]) -> str:
    """Why `dtype_name` is None."""
    if dtype.names is not None:
        return f"structured dtype {dtype}; store its fields as arrays of their own"
    if dtype.hasobject:
        return "array of Python objects"
    if dtype.kind == "T":
        return "array of StringDType; convert it with .astype('U')"
    return f"dtype {dtype} has no portable form"


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of a stored name. FormatError if this program does not know it."""
    found = _BY_NAME.get(name)
    if found is not None:
        return found
    if (sized := _SIZED.match(name)) and int(sized[2]) < 1 << 29:
        return np.dtype(name)
    if _TIME.match(name):
        found = np.dtype(name)
        if found.name == name:
            return found
    raise FormatError(f"unknown numpy dtype {name!r}", hint="use a newer ckptvcs, or a newer ml_dtypes")


def item_size(framework: str, name: str) -> int:
    """Bytes per element. FormatError for an unknown dtype, CorruptionError for an unknown framework."""
    if framework == "numpy":
        return numpy_dtype(name).itemsize
    if framework != "torch":
        raise CorruptionError(f"a tensor of an unknown framework {framework!r}")
    if name not in TORCH_SIZES:
        raise FormatError(f"unknown torch dtype {name!r}", hint="use a newer ckptvcs")
    return TORCH_SIZES[name]


def unit(name: str, item: int) -> int:
    """Bytes of one number in an element: what a byte order turns and codecs split by."""
    if name.startswith(("complex", "bcomplex")):
        return item // 2
    if name[0] == "U":
        return 4
    if _SIZED.match(name):
        return 1
    return item


_RAW: Final = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


def raw_dtype(item: int) -> np.dtype[Any]:
    """A dtype of this item size whose copies are plain moves of bytes."""
    return _RAW.get(item) or np.dtype(f"V{item}")


@dataclass(frozen=True, slots=True)
class Spec:
    """What a tensor is, apart from its bytes and its memory.

    Attributes:
        framework: "numpy" or "torch".
        dtype: stored dtype name.
        shape: length of each dimension.
        flags: sum of `codes.BIG_ENDIAN`, `REQUIRES_GRAD` and `PARAMETER`.
        item: bytes per element.
    """

    framework: str
    dtype: str
    shape: tuple[int, ...]
    flags: int
    item: int

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.item

    @property
    def swap(self) -> int:
        """Bytes per number to be turned around between memory and store, or 0."""
        return unit(self.dtype, self.item) if self.flags & codes.BIG_ENDIAN else 0


def capture(array: np.ndarray[Any, Any]) -> tuple[Spec, Raw] | None:
    """What a numpy array is, and its memory as raw elements; None if its dtype cannot be stored."""
    dtype = array.dtype
    name = _NAMES.get(dtype)
    big = False
    if name is None:
        name = dtype_name(dtype)
        if name is None:
            return None
        big = unit(name, dtype.itemsize) > 1 and dtype.str[0] == ">"
    spec = Spec("numpy", name, array.shape, codes.BIG_ENDIAN if big else 0, dtype.itemsize)
    return spec, np.asarray(array).view(raw_dtype(dtype.itemsize))


# -- gathering bytes ------------------------------------------------------------------------------


def bytes_of(raw: Raw) -> memoryview:
    """The memory of a C-contiguous array as flat bytes, writable if the array is."""
    return raw.reshape(-1).view(np.uint8).data


def swap(memory: memoryview, size: int) -> None:
    """Turn around every group of `size` bytes, in place."""
    numbers = np.frombuffer(memory, np.uint8).reshape(-1, size)
    numbers[:] = numbers[:, ::-1].copy()


class ArraySource:
    """The bytes of an array: a view of its memory if that is in order, else gathered piece by piece.

    Attributes:
        witness: as long as it is the same, so are the bytes. None says nothing.
    """

    def __init__(self, raw: Raw, element_size: int, swapped: int = 0, witness: Hashable = None) -> None:
        self.witness = witness
        self._raw = raw
        self._swapped = swapped
        self._flat = bytes_of(raw) if raw.flags.c_contiguous and not swapped else None
        self.nbytes: int = raw.nbytes
        self.element_size = element_size

    def read(self, offset: int, length: int) -> Buffer:
        """Bytes [offset, offset + length) in C order."""
        if self._flat is not None:
            return self._flat[offset : offset + length]
        item = self._raw.itemsize
        first, last = offset // item, -(-(offset + length) // item)
        out = np.empty(last - first, self._raw.dtype)
        _gather(self._raw, first, last, out)
        flat = bytes_of(out)
        if self._swapped:
            swap(flat, self._swapped)
        return flat[offset - first * item :][:length]

    @property
    def item(self) -> int:
        """Bytes of one element of memory."""
        return self._raw.itemsize

    @property
    def memory(self) -> Hashable:
        """Which memory this is, and how it is read: equal for sources of the same bytes, while both live."""
        raw = self._raw
        place = raw.__array_interface__["data"][0], raw.nbytes, self._swapped
        return place if self._flat is not None else (*place, raw.itemsize, raw.shape, raw.strides)

    def fill(self, out: Raw, offset: int) -> None:
        """Copy the bytes from `offset`, a multiple of `item`, to all of `out` (flat, uint8, a multiple of
        `item` long). Releases the GIL where there is much to copy."""
        if self._flat is not None:
            out[:] = np.frombuffer(self._flat, np.uint8)[offset : offset + len(out)]
            return
        item = self._raw.itemsize
        first, count = offset // item, len(out) // item
        _gather(self._raw, first, first + count, out.view(self._raw.dtype))
        if self._swapped:
            swap(out.data, self._swapped)


class BytesSource:
    """Bytes that are in memory already."""

    def __init__(self, data: Buffer) -> None:
        self._data = memoryview(data).cast("B")
        self.nbytes = self._data.nbytes
        self.element_size = 1

    def read(self, offset: int, length: int) -> Buffer:
        """Bytes [offset, offset + length)."""
        return self._data[offset : offset + length]


def _gather(raw: Raw, first: int, last: int, out: Raw) -> None:
    """Copy elements [first, last) of `raw`, counted in C order, to `out`."""
    if raw.ndim <= 1:
        out[:] = raw.reshape(-1)[first:last]
        return
    inner = math.prod(raw.shape[1:])
    begin, end = -(-first // inner), last // inner
    if begin > end:  # within one slab
        _gather(raw[end], first - end * inner, last - end * inner, out)
        return
    head, tail = begin * inner - first, last - end * inner
    if head:
        _gather(raw[begin - 1], inner - head, inner, out[:head])
    if end > begin:
        out[head : len(out) - tail].reshape(end - begin, *raw.shape[1:])[...] = raw[begin:end]
    if tail:
        _gather(raw[end], 0, tail, out[len(out) - tail :])


# -- layouts --------------------------------------------------------------------------------------


def c_strides(shape: Sequence[int], item: int) -> tuple[int, ...]:
    """Byte strides of C order. All 0 for an empty shape."""
    strides, step = [], item
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def ordered_strides(shape: Sequence[int], item: int, order: Sequence[int]) -> tuple[int, ...]:
    """Byte strides of dense memory whose dimensions lie in `order`, outermost first."""
    strides, step = [0] * len(shape), item
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


def dense_order(raw: Raw) -> list[int] | None:
    """The order of the dimensions in memory if it is dense and not C order, else None.

    Dimensions of length 1 have strides that mean nothing; they come first, so that equal memory has an
    equal order.
    """
    if raw.flags.c_contiguous:
        return None
    return dense_order_of(raw.shape, raw.strides, raw.itemsize)


def dense_order_of(shape: Sequence[int], strides: Sequence[int], item: int) -> list[int] | None:
    """`dense_order` of memory of which only shape and byte strides are known; None for C order, too."""
    if 0 in shape:
        return None
    real = sorted((axis for axis in range(len(shape)) if shape[axis] > 1), key=lambda axis: -strides[axis])
    step = item
    for axis in reversed(real):
        if strides[axis] != step:
            return None
        step *= shape[axis]
    if real == sorted(real):
        return None
    return [axis for axis in range(len(shape)) if shape[axis] == 1] + real


def meaningful_strides(raw: Raw) -> tuple[int, ...] | None:
    """Byte strides with those of length-1 dimensions made a function of the others; None for C order."""
    if raw.flags.c_contiguous:
        return None
    strides: list[int] = []
    step = raw.itemsize
    for length, stride in zip(reversed(raw.shape), reversed(raw.strides), strict=True):
        strides.append(stride if length > 1 else step)
        step = abs(strides[-1]) * length
    return tuple(reversed(strides))


def is_injective(shape: Sequence[int], strides: Sequence[int], item: int) -> bool:
    """Whether a view surely shows no byte twice, so that it can be written to in any order."""
    reach = item
    for stride, length in sorted((abs(s), n) for n, s in zip(shape, strides, strict=True) if n > 1):
        if stride < reach:
            return False
        reach = stride * (length - 1) + reach
    return True


def bounds(shape: Sequence[int], strides: Sequence[int], item: int) -> tuple[int, int]:
    """Lowest and highest byte (exclusive) that a view touches, counted from its first element."""
    low, high = 0, item
    for length, stride in zip(shape, strides, strict=True):
        if stride < 0:
            low += stride * (length - 1)
        else:
            high += stride * (length - 1)
    return low, high


# -- shared memory --------------------------------------------------------------------------------


def worth_sharing(extent: int, shown: int) -> bool:
    """Whether one buffer of `extent` bytes is a sane home for views that show `shown` bytes.

    A few elements picked out of a huge array must not bring back its size, and neither may a damaged
    tree ask for memory that no stored bytes justify.
    """
    return extent <= 16 * shown + (1 << 20)


@dataclass(frozen=True, slots=True)
class Alias:
    """A tensor's place in a group that shares memory. `strides` None is C order."""

    group: int
    offset: int
    strides: tuple[int, ...] | None


def find_aliases(arrays: Sequence[tuple[str, Raw]]) -> list[Alias | None]:
    """For each (framework, array), in order of appearance, its place in a group, if it has company.

    Arrays of one framework whose memory extents overlap, directly or through others, are a group.
    Groups are numbered by their first member. Where a group spans far more memory than its members
    show (`worth_sharing`), only views of exactly the same memory share it.
    """
    extents: list[tuple[str, int, int, int]] = []
    for at, (framework, raw) in enumerate(arrays):
        if raw.size:
            address: int = raw.__array_interface__["data"][0]
            low, high = bounds(raw.shape, raw.strides, raw.itemsize)
            extents.append((framework, address + low, address + high, at))
    extents.sort()
    groups: list[list[tuple[str, int, int, int]]] = []
    reach: tuple[str, int] = ("", 0)
    for extent in extents:
        if groups and extent[0] == reach[0] and extent[1] < reach[1]:
            groups[-1].append(extent)
            reach = (reach[0], max(reach[1], extent[2]))
        else:
            groups.append([extent])
            reach = (extent[0], extent[2])
    found: list[Alias | None] = [None] * len(arrays)
    shared: list[list[tuple[int, int, tuple[int, ...] | None]]] = []
    for group in groups:
        if len(group) == 1:
            continue
        base = group[0][1]
        members = [(at, arrays[at][1]) for _, _, _, at in group]
        if worth_sharing(max(high for _, _, high, _ in group) - base, sum(raw.nbytes for _, raw in members)):
            shared.append(
                [
                    (at, raw.__array_interface__["data"][0] - base, meaningful_strides(raw))
                    for at, raw in members
                ]
            )
            continue
        equal: dict[Any, list[int]] = {}
        for at, raw in members:
            key = (raw.__array_interface__["data"][0], raw.shape, meaningful_strides(raw), raw.itemsize)
            equal.setdefault(key, []).append(at)
        shared += [[(at, 0, None) for at in same] for same in equal.values() if len(same) > 1]
    shared.sort(key=lambda group: min(at for at, _, _ in group))
    for number, places in enumerate(shared):
        for at, offset, strides in places:
            found[at] = Alias(number, offset, strides)
    return found


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lives in a buffer: first element's byte offset, and byte strides."""

    offset: int
    strides: tuple[int, ...]


def arrange(members: Sequence[tuple[Spec, Alias]], shift: bool) -> tuple[int, list[Place]] | None:
    """One buffer for some members of a group: its bytes and each member's place.

    None if no single buffer is sensible; then each member gets memory of its own. `shift` asks for
    offsets and strides that are multiples of the item sizes (torch counts in elements).
    """
    views = []
    for spec, alias in members:
        strides = c_strides(spec.shape, spec.item) if alias.strides is None else alias.strides
        low, high = bounds(spec.shape, strides, spec.item)
        views.append((spec, alias.offset, strides, alias.offset + low, alias.offset + high))
    base = min(view[3] for view in views)
    extent = max(view[4] for view in views) - base
    if not worth_sharing(extent, sum(spec.nbytes for spec, _ in members)):
        return None
    pad = 0
    if shift:
        fitting = (
            pad for pad in range(16) if all((at - base + pad) % spec.item == 0 for spec, at, _, _, _ in views)
        )
        pad = next(fitting, -1)
        whole = all(
            step >= 0 and step % spec.item == 0 for spec, _, strides, _, _ in views for step in strides
        )
        if pad < 0 or not whole:
            return None
    return extent + pad, [Place(at - base + pad, strides) for _, at, strides, _, _ in views]


def check_layout(spec: Spec, order: Sequence[int] | None, alias: Alias | None) -> None:
    """CorruptionError unless a stored layout is possible for this tensor."""
    if order is not None and sorted(order) != list(range(len(spec.shape))):
        raise CorruptionError("a tensor's layout does not name each dimension once")
    if alias is not None:
        if not spec.nbytes or alias.group < 0 or not 0 <= alias.offset < MAX_BYTES:
            raise CorruptionError("a tensor's place in shared memory is impossible")
        if alias.strides is not None:
            if len(alias.strides) != len(spec.shape) or any(abs(s) >= MAX_BYTES for s in alias.strides):
                raise CorruptionError("a shared tensor's strides do not fit its shape")
            low, high = bounds(spec.shape, alias.strides, spec.item)
            if alias.offset + low < 0 or high - low >= MAX_BYTES:
                raise CorruptionError("a shared tensor reaches outside its memory")


# -- numpy values ---------------------------------------------------------------------------------


def restore_numpy(memory: Raw, spec: Spec, place: Place) -> np.ndarray[Any, Any]:
    """The array of `spec` at `place` in a buffer of bytes, whose numbers are little endian."""
    dtype = numpy_dtype(spec.dtype)
    if spec.flags & codes.BIG_ENDIAN:
        dtype = dtype.newbyteorder(">")
    return np.ndarray(spec.shape, dtype, memory, place.offset, place.strides)


def scalar_fields(value: np.generic) -> tuple[str, bytes] | None:
    """(dtype name, little-endian bytes) of a numpy scalar; None if it cannot be stored."""
    # An array would cut trailing zeros off text, and has no form for empty text.
    if isinstance(value, np.str_):
        return "str_", str(value).encode("utf-8", "surrogatepass")
    if isinstance(value, np.bytes_):
        return "bytes_", bytes(value)
    name = dtype_name(value.dtype)
    return None if name is None else (name, np.asarray(value).tobytes())


def restore_scalar(name: str, data: bytes) -> np.generic:
    """The inverse of `scalar_fields`. CorruptionError if the bytes do not fit the dtype."""
    if name == "bytes_":
        return np.bytes_(data)
    if name == "str_":
        try:
            return np.str_(data.decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError:
            raise CorruptionError("a numpy text scalar that is not UTF-8") from None
    dtype = numpy_dtype(name)
    if len(data) != dtype.itemsize or name[0] in "SU":
        raise CorruptionError(f"a numpy scalar of {len(data)} bytes cannot be a {name}")
    found: np.generic = np.frombuffer(data, dtype)[0]
    return found
