"""Torch archives: what `torch.save` writes and `torch.load(weights_only=True)` opens, made without torch.

A zip archive holds the bytes of each storage in a member of its own, and in `data.pkl` a pickle program that
builds the value around them. The program is put together here, opcode by opcode, from a short list of kinds
and of callables that the weights-only reader of torch knows (`torch/_weights_only_unpickler.py`). Nothing
here calls the pickle module, and no class of the caller's can get into a file.
"""

from __future__ import annotations

import collections
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ckptvcs.ids import chunk_id
from ckptvcs.state.formats.outgoing import Pieces, Sink
from ckptvcs.state.formats.write_zip import ALIGNMENT, ZipWriter
from ckptvcs.state.tensors import TORCH_SIZES

# A typed storage for each dtype that had one when they were introduced; the later ones are untyped.
_STORAGES: Final = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "bfloat16": "BFloat16Storage",
    "complex128": "ComplexDoubleStorage",
    "complex64": "ComplexFloatStorage",
    "qint8": "QInt8Storage",
    "qint32": "QInt32Storage",
    "quint8": "QUInt8Storage",
}
_QUANTIZED: Final = frozenset(("qint8", "quint8", "qint32"))
_DTYPES: Final = _QUANTIZED | TORCH_SIZES.keys()
_LAYOUTS: Final = frozenset(("sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc"))
_SCHEMES: Final = frozenset(("per_tensor_affine", "per_channel_affine", "per_channel_affine_float_qparams"))
_DEVICE: Final = re.compile(r"[a-z]+(?::[0-9]{1,4})?\Z")
_GLOBAL: Final = re.compile(r"[a-z_.]+ [A-Za-z0-9_]+\Z")
"""A module and a name. What comes out of a repository gets into a program as text only, or through this."""
_LONGEST_INT: Final = 255
"""Bytes of an integer that LONG1, the only opcode for large ones that the reader knows, can hold."""
_NO_HOOKS: Final[collections.OrderedDict[str, object]] = collections.OrderedDict()
_AT_ONCE: Final = 1000
"""Items per SETITEMS or APPENDS, as the pickle module has it."""


# -- values that are no plain Python ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes that one or several tensors show.

    Attributes:
        nbytes: how many.
        pieces: gives them.
    """

    nbytes: int
    pieces: Pieces


@dataclass(frozen=True, slots=True)
class View:
    """A dense tensor: a window on the storage of this number.

    Attributes:
        dtype: name of the dtype, without "torch.".
        offset: of the first element, in elements.
        shape: length of each dimension.
        strides: in elements.
        item: bytes per element.
        grad: it requires gradients.
        parameter: it is a torch.nn.Parameter.
        mixed: the storage is shown in several dtypes, so that it can have none itself.
    """

    storage: int
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item: int
    grad: bool = False
    parameter: bool = False
    mixed: bool = False

    @property
    def storage_class(self) -> str | None:
        """The class that counts the storage in elements; None if it is counted in bytes."""
        return None if self.mixed else _STORAGES.get(self.dtype)


@dataclass(frozen=True, slots=True)
class Sparse:
    """A sparse tensor: what `torch._utils._rebuild_sparse_tensor` takes for its layout."""

    layout: str
    shape: tuple[int, ...]
    parts: tuple[View, ...]
    coalesced: bool | None = None
    grad: bool = False
    parameter: bool = False


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantised tensor: its integers, and numbers or tensors of scale and zero point."""

    integers: View
    scheme: str
    scale: float | View
    zero_point: int | View
    axis: int | None = None
    parameter: bool = False


@dataclass(frozen=True, slots=True)
class Size:
    """A torch.Size."""

    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Dtype:
    """A torch.dtype by its name."""

    name: str


@dataclass(frozen=True, slots=True)
class Device:
    """A torch.device by its text."""

    text: str


_OWN: Final = (View, Sparse, Quantized, Size, Dtype, Device)


def why_not(value: object) -> str | None:
    """Why a leaf or a key cannot be written, or None. Containers are looked into by whoever makes them."""
    kind = type(value)
    if kind is int:
        fits = -(-(value.bit_length() + 1) // 8) <= _LONGEST_INT  # type: ignore[attr-defined]
        return None if fits else "an integer too long for torch's weights-only reader"
    if kind in (type(None), bool, float, str, bytes, bytearray, complex):
        return None
    if kind in _OWN:
        return None if _is_torchs(value) else f"a {kind.__name__.lower()} that torch does not have"
    if kind in (set, tuple):
        return next((why for each in value if (why := why_not(each))), None)  # type: ignore[attr-defined]
    return f"a {kind.__name__} is nothing that torch's weights-only reader builds"


def why_not_beside(value: collections.OrderedDict[Any, Any]) -> str | None:
    """Why the attributes of an ordered dict, as a state dict has `_metadata`, cannot be written, or None."""
    waiting: list[Any] = [vars(value)]
    while waiting:
        each = waiting.pop()
        if type(each) is collections.OrderedDict:
            waiting.append(vars(each))
        if type(each) in (dict, collections.OrderedDict):
            waiting += (*each, *each.values())
        elif type(each) is list:
            waiting += each
        elif (why := why_not(each)) is not None:
            return f"its attributes: {why}"
    return None


def _is_torchs(value: object) -> bool:
    """Whether the names in a value are torch's own. A damaged repository may say anything there."""
    if isinstance(value, Dtype):
        return value.name in _DTYPES
    if isinstance(value, Device):
        return _DEVICE.match(value.text) is not None
    if isinstance(value, View):
        return value.dtype in _DTYPES
    if isinstance(value, Sparse):
        return value.layout in _LAYOUTS and all(map(_is_torchs, value.parts))
    if isinstance(value, Quantized):
        return value.scheme in _SCHEMES and value.integers.dtype in _QUANTIZED
    return isinstance(value, Size)


# -- the archive ------------------------------------------------------------------------------------


def write(sink: Sink, value: object, storages: Sequence[Storage], name: str, comment: str) -> None:
    """Write an archive of a value made of plain Python and of the kinds above.

    `name` is the folder inside the archive, as torch takes it from the file's; `comment` is the archive's.
    """
    archive = ZipWriter(sink, comment.encode())

    def member(path: str, data: bytes) -> None:
        archive.member(f"{name}/{path}", len(data), [data])

    program = _Program(storages).of(value)
    member("data.pkl", program)
    member(".format_version", b"1")
    member(".storage_alignment", b"%d" % ALIGNMENT)
    member("byteorder", b"little")
    for number, storage in enumerate(storages):
        archive.member(f"{name}/data/{number}", storage.nbytes, storage.pieces())
    member("version", b"3\n")
    # Torch draws forty digits at random; equal content shall give equal bytes.
    member(".data/serialization_id", b"%040d" % (int.from_bytes(bytes(chunk_id(program))[:16], "little")))
    archive.close()


class _Program:
    """Puts a pickle program (protocol 2) together. Names and callables are written once and fetched later."""

    def __init__(self, storages: Sequence[Storage]) -> None:
        self._storages = storages
        self._out = bytearray()
        self._memo: dict[object, int] = {}

    def of(self, value: object) -> bytes:
        """The program that leaves `value` on the stack."""
        self._out += b"\x80\x02"
        self._value(value)
        self._out += b"."
        return bytes(self._out)

    # -- plain values -------------------------------------------------------------------------------

    def _value(self, value: Any) -> None:
        kind, out = type(value), self._out
        if value is None:
            out += b"N"
        elif kind is bool:
            out += b"\x88" if value else b"\x89"
        elif kind is int:
            self._int(value)
        elif kind is float:
            out += b"G" + struct.pack(">d", value)
        elif kind is str:
            self._text(value)
        elif kind is bytes:
            self._bytes(value)
        elif kind is bytearray:
            self._call("builtins bytearray", [bytes(value)])
        elif kind is complex:
            self._call("builtins complex", [value.real, value.imag])
        elif kind is tuple:
            self._tuple(value)
        elif kind is list:
            out += b"]"
            self._items(value, b"e")
        elif kind is dict:
            out += b"}"
            self._items([each for pair in value.items() for each in pair], b"u", 2)
        elif kind is collections.OrderedDict:
            self._ordered(value)
        elif kind is set:
            self._call("builtins set", [list(value)])
        else:
            self._torch(value)

    def _int(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self._out += b"K" + value.to_bytes(1, "little")
        elif 0 <= value < 1 << 16:
            self._out += b"M" + value.to_bytes(2, "little")
        elif -1 << 31 <= value < 1 << 31:
            self._out += b"J" + value.to_bytes(4, "little", signed=True)
        else:
            length = (value.bit_length() + 8) // 8
            self._out += b"\x8a" + bytes((length,)) + value.to_bytes(length, "little", signed=True)

    def _text(self, value: str) -> None:
        if not self._fetched(value):
            encoded = value.encode("utf-8", "surrogatepass")
            self._out += b"X" + len(encoded).to_bytes(4, "little") + encoded
            self._keep(value)

    def _bytes(self, value: bytes) -> None:
        # Protocol 2 has no opcode for bytes; this is how Python writes them there.
        self._call("_codecs encode", [value.decode("latin1"), "latin1"])

    def _tuple(self, values: Sequence[Any]) -> None:
        if not values:
            self._out += b")"
            return
        if len(values) > 3:
            self._out += b"("
        for each in values:
            self._value(each)
        self._out += (b"", b"\x85", b"\x86", b"\x87")[len(values)] if len(values) <= 3 else b"t"

    def _items(self, values: Sequence[Any], opcode: bytes, step: int = 1) -> None:
        for start in range(0, len(values), _AT_ONCE * step):
            self._out += b"("
            for each in values[start : start + _AT_ONCE * step]:
                self._value(each)
            self._out += opcode

    def _ordered(self, value: collections.OrderedDict[Any, Any]) -> None:
        self._call("collections OrderedDict", [])
        self._items([each for pair in value.items() for each in pair], b"u", 2)
        if vars(value):  # the `_metadata` of a module's state dict
            self._value(dict(vars(value)))
            self._out += b"b"

    # -- callables and the memo ---------------------------------------------------------------------

    def _fetched(self, key: object) -> bool:
        place = self._memo.get(key)
        if place is None:
            return False
        self._out += b"h" + bytes((place,)) if place < 256 else b"j" + place.to_bytes(4, "little")
        return True

    def _keep(self, key: object) -> None:
        place = self._memo.setdefault(key, len(self._memo))
        self._out += b"q" + bytes((place,)) if place < 256 else b"r" + place.to_bytes(4, "little")

    def _global(self, name: str) -> None:
        """A module and a name in it, joined by a space."""
        if not self._fetched(("global", name)):
            assert _GLOBAL.match(name), name
            module, _, attribute = name.partition(" ")
            self._out += f"c{module}\n{attribute}\n".encode()
            self._keep(("global", name))

    def _call(self, name: str, arguments: Sequence[Any]) -> None:
        self._global(name)
        self._tuple(arguments)
        self._out += b"R"

    # -- what is torch's ----------------------------------------------------------------------------

    def _torch(self, value: Any) -> None:
        if isinstance(value, View):
            self._tensor(value)
        elif isinstance(value, Sparse):
            self._parameter(value) if value.parameter else self._sparse(value)
        elif isinstance(value, Quantized):
            self._parameter(value) if value.parameter else self._quantized(value)
        elif isinstance(value, Size):
            self._call("torch Size", [value.lengths])
        elif isinstance(value, Dtype):
            self._global(f"torch {value.name}")
        elif isinstance(value, Device):
            kind, _, number = value.text.partition(":")
            self._call("torch device", [kind, int(number)] if number else [kind])
        elif isinstance(value, _Step):
            value.emit()
        else:
            raise AssertionError(f"a {type(value).__name__} in an export")

    def _tensor(self, view: View) -> None:
        if view.parameter:
            self._parameter(view)
            return
        storage, empty = _Step(lambda: self._storage(view)), _NO_HOOKS
        arguments = [storage, view.offset, view.shape, view.strides, view.grad, empty]
        if view.storage_class is not None:
            self._call("torch._utils _rebuild_tensor_v2", arguments)
        else:
            self._call("torch._utils _rebuild_tensor_v3", [*arguments, Dtype(view.dtype)])

    def _storage(self, view: View) -> None:
        nbytes = self._storages[view.storage].nbytes
        typed = view.storage_class
        kind = _Step(lambda: self._global(f"torch {typed}" if typed else "torch.storage UntypedStorage"))
        size = nbytes // view.item if typed else nbytes
        self._tuple(["storage", kind, str(view.storage), "cpu", size])
        self._out += b"Q"

    def _parameter(self, value: View | Sparse | Quantized) -> None:
        def data() -> None:
            if isinstance(value, View):
                self._tensor(replace(value, grad=False, parameter=False))
            elif isinstance(value, Sparse):
                self._sparse(value)
            else:
                self._quantized(value)

        grad = not isinstance(value, Quantized) and value.grad
        self._call("torch._utils _rebuild_parameter", [_Step(data), grad, _NO_HOOKS])

    def _sparse(self, value: Sparse) -> None:
        layout = _Step(lambda: self._call("torch.serialization _get_layout", [f"torch.{value.layout}"]))
        data: tuple[Any, ...] = (*value.parts, Size(value.shape))
        if value.layout == "sparse_coo":
            data = (*data, value.coalesced)
        self._call("torch._utils _rebuild_sparse_tensor", [layout, data])

    def _quantized(self, value: Quantized) -> None:
        view = value.integers
        scheme = _Step(lambda: self._global(f"torch {value.scheme}"))
        parameters: tuple[Any, ...] = (scheme, value.scale, value.zero_point)
        if value.axis is not None:
            parameters = (*parameters, value.axis)
        storage, empty = _Step(lambda: self._storage(view)), _NO_HOOKS
        arguments = [storage, view.offset, view.shape, view.strides, parameters, False, empty]
        self._call("torch._utils _rebuild_qtensor", arguments)


class _Step:
    """A value that is made by a part of the program of its own."""

    def __init__(self, emit: Callable[[], None]) -> None:
        self.emit = emit
