"""Numbers as planes: bytes of equal significance side by side, each plane stored in the way that suits it.

The upper bytes of floating-point numbers (sign, exponent) take few values and compress well; the lower
mantissa bytes are noise, which is kept as it is, in as few wide planes as possible. Everything here is
integer arithmetic on bit patterns, so it is exact whatever the numbers mean. docs/format.md, "Planes", is
the normative description.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from ckptvcs.ids import Buffer
from ckptvcs.store import entropy

Words: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
"""Flat unsigned little-endian integers, one per number."""

WORD: Final = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}
"""The integer type of each element size that can be split."""

LAYOUTS: Final[dict[int, tuple[tuple[int, ...], ...]]] = {
    1: ((1,),),
    2: ((1, 1), (2,)),
    4: ((1, 1, 1, 1), (2, 1, 1)),
    8: ((1, 1, 1, 1, 1, 1, 1, 1), (4, 2, 1, 1)),
}
"""Bytes of each plane, from the least significant, by element size and layout number. Append-only."""

BYTES: Final = 0
"""The layout number whose planes are single bytes."""
WIDE: Final = 1
"""The layout number that keeps low bytes together, where there is one."""

_ROTATED: Final = 0x10
CONSTANT, RAW, CODED, SPARSE = range(4)
_HEAD: Final = struct.Struct("<B")
_PLANE: Final = struct.Struct("<BI")
_SPARSE_ABOVE: Final = 3
"""A plane is tried as bitmap and values if less than one byte in so many is not zero."""
_WORTHWHILE: Final = 0.98
"""A plane is kept coded only below this share of its size: decoding costs time."""


class Scratch(threading.local):
    """Arrays that a thread uses again and again: fresh memory costs a page fault every 4 KiB."""

    def __init__(self) -> None:
        self._arrays: dict[str, Words] = {}

    def array(self, name: str, dtype: Any, count: int) -> Words:
        """`count` numbers of any content. Whoever asks for the same name next gets the same memory."""
        kind = np.dtype(dtype)
        held = self._arrays.get(name)
        if held is None or held.nbytes < count * kind.itemsize:
            held = np.empty(max(count * kind.itemsize, 1 << 16), np.uint8)
            self._arrays[name] = held
        return held[: count * kind.itemsize].view(kind)


scratch: Final = Scratch()


# -- encoding -------------------------------------------------------------------------------------


def encode(words: Words, rotated: bool = False, layout: int | None = None) -> bytes:
    """The words as planes. `rotated` turns each word left by one bit first, so that the exponent of a
    floating-point number fills its highest byte. The layout is found from the words unless one is given."""
    size = words.dtype.itemsize
    if layout is None:
        layout = WIDE if size >= 4 and _low_half_is_noise(words) else BYTES
    if rotated:
        words = _turned(words)
    head: list[Buffer] = [_HEAD.pack(layout | (_ROTATED if rotated else 0))]
    data: list[Buffer] = []
    shift = 0
    for width in LAYOUTS[size][layout]:
        mode, parts = _encode_plane(_plane(words, shift, width))
        head.append(_PLANE.pack(mode, sum(map(len, parts))))
        data += parts
        shift += 8 * width
    return b"".join(head + data)


def _turned(words: Words) -> Words:
    bits = 8 * words.dtype.itemsize
    turned = scratch.array("turned", words.dtype, len(words))
    low = scratch.array("low", words.dtype, len(words))
    np.left_shift(words, 1, out=turned)
    np.right_shift(words, bits - 1, out=low)
    np.bitwise_or(turned, low, out=turned)
    return turned


def _plane(words: Words, shift: int, width: int) -> Words:
    """`width` bytes of each word, from bit `shift` on, side by side."""
    if width == words.dtype.itemsize:
        return words
    plane = scratch.array("plane", WORD[width], len(words))
    if shift:
        # Narrowing a shifted copy is several times faster than a strided copy of the bytes.
        shifted = scratch.array("shifted", words.dtype, len(words))
        np.right_shift(words, shift, out=shifted)
        words = shifted
    np.copyto(plane, words, casting="unsafe")
    return plane


def _encode_plane(plane: Words) -> tuple[int, Sequence[Buffer]]:
    count, width = len(plane), plane.dtype.itemsize
    first = plane[:1]
    # Most planes differ within their first bytes.
    if (plane[:64] == first).all() and (plane == first).all():
        return CONSTANT, [first.tobytes()]
    raw = plane.view(np.uint8).data
    if width == 1:
        there = np.count_nonzero(plane)
        if there * _SPARSE_ABOVE < count:
            sparse = _encode_sparse(plane)
            coded = entropy.huffman(raw)
            if sum(map(len, sparse)) < min(len(coded), count):
                return SPARSE, sparse
        elif count > 4 * _SAMPLE and _is_noise(plane):
            return RAW, [bytes(raw)]
        else:
            coded = entropy.huffman(raw)
        if len(coded) < _WORTHWHILE * count:
            return CODED, [coded]
    return RAW, [bytes(raw)]


def _is_noise(plane: Words) -> bool:
    """Whether coding a plane is not worth trying, told from bytes all over it."""
    step = len(plane) // _SAMPLE
    sample = np.ascontiguousarray(plane[::step]) if step > 1 else plane
    return len(entropy.huffman(sample.data)) > _NOISE * len(sample)


def _low_half_is_noise(words: Words) -> bool:
    """Whether no byte of the lower half is worth a plane of its own."""
    size = words.dtype.itemsize
    step = max(1, len(words) // _SAMPLE)
    sample = words[::step]
    return all(
        _is_noise((sample >> words.dtype.type(8 * place)).astype(np.uint8)) for place in range(size // 2)
    )


_SAMPLE: Final = 8 << 10
_NOISE: Final = 0.99


def _encode_sparse(plane: Words) -> list[Buffer]:
    present = plane != 0
    bitmap = _block(np.packbits(present))
    values = _block(plane[present])
    return [struct.pack("<I", len(bitmap)), bitmap, values]


def _block(numbers: Words) -> bytes:
    raw = numbers.tobytes()
    coded = entropy.huffman(raw)
    return b"\1" + coded if len(coded) < len(raw) else b"\0" + raw


# -- decoding -------------------------------------------------------------------------------------


def words_of(raw: Buffer, element_size: int) -> Words:
    """Memory as words, without a copy. ValueError if numbers of that size cannot fill it."""
    if element_size not in WORD or len(raw) % element_size:
        raise ValueError(f"{len(raw)} bytes are no {element_size}-byte numbers")
    return np.frombuffer(raw, WORD[element_size])


def decode_frame(payload: Buffer, into: memoryview, element_size: int, base: Buffer | None) -> None:
    """Fill `into` from the payload of a frame that needs no base."""
    decode(payload, words_of(into, element_size))


def decode(payload: Buffer, into: Words) -> None:
    """Fill `into` with the words of a payload. ValueError if they cannot be what `encode` made of as many."""
    view = memoryview(payload)
    size = into.dtype.itemsize
    if not len(view):
        raise ValueError("an empty payload")
    form = view[0]
    layout, rotated = form & 0x0F, bool(form & _ROTATED)
    if form & ~(0x0F | _ROTATED) or layout >= len(LAYOUTS[size]):
        raise ValueError(f"unknown form {form} of {size}-byte numbers")
    widths = LAYOUTS[size][layout]
    at = _HEAD.size + _PLANE.size * len(widths)
    if len(view) < at:
        raise ValueError("the table of planes is cut short")
    planes: list[tuple[int, memoryview]] = []
    for number in range(len(widths)):
        mode, length = _PLANE.unpack_from(view, _HEAD.size + _PLANE.size * number)
        if at + length > len(view):
            raise ValueError("a plane is cut short")
        planes.append((mode, view[at : at + length]))
        at += length
    if at != len(view):
        raise ValueError("bytes behind the last plane")
    _merge(planes, widths, into)
    if rotated:
        low = scratch.array("low", into.dtype, len(into))
        np.left_shift(into, 8 * size - 1, out=low)
        np.right_shift(into, 1, out=into)
        np.bitwise_or(into, low, out=into)


def _merge(planes: Sequence[tuple[int, memoryview]], widths: Sequence[int], into: Words) -> None:
    """Put planes back together, from the most significant down."""
    empty = True  # so far all bits of `into` would be zero
    for (mode, data), width in zip(reversed(planes), reversed(widths), strict=True):
        if not empty:
            np.left_shift(into, 8 * width, out=into)
        if mode == CONSTANT:
            if len(data) != width:
                raise ValueError(f"a constant of {len(data)} bytes in a plane of {width}")
            value = int.from_bytes(data, "little")
            if empty and value:
                into[:] = value
                empty = False
            elif value:
                np.bitwise_or(into, into.dtype.type(value), out=into)
            continue
        plane = _decode_plane(mode, data, WORD[width], len(into))
        if empty:
            np.copyto(into, plane, casting="unsafe")
            empty = False
        else:
            np.bitwise_or(into, plane, out=into)
    if empty:
        into[:] = 0


def _decode_plane(mode: int, data: memoryview, dtype: np.dtype[Any], count: int) -> Words:
    size = count * dtype.itemsize
    if mode == RAW:
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes in a plane of {size}")
        return np.frombuffer(data, dtype)
    if mode == CODED:
        return np.frombuffer(entropy.inflate(data, size), dtype)
    if mode == SPARSE and dtype.itemsize == 1:
        return _decode_sparse(data, count)
    raise ValueError(f"unknown mode {mode} of a plane")


def _decode_sparse(data: memoryview, count: int) -> Words:
    if len(data) < 4:
        raise ValueError("a sparse plane is cut short")
    length = int.from_bytes(data[:4], "little")
    if 4 + length > len(data):
        raise ValueError("the bitmap of a sparse plane is cut short")
    bitmap = _unblock(data[4 : 4 + length], (count + 7) // 8)
    present = np.unpackbits(np.frombuffer(bitmap, np.uint8), count=count).view(np.bool_)
    places = np.flatnonzero(present)
    values = _unblock(data[4 + length :], len(places))
    plane = scratch.array("plane", np.uint8, count)
    plane[:] = 0
    plane[places] = np.frombuffer(values, np.uint8)
    return plane


def _unblock(block: memoryview, size: int) -> Buffer:
    if not len(block):
        raise ValueError("an empty block")
    if block[0] == 1:
        return entropy.inflate(block[1:], size)
    if block[0] != 0 or len(block) - 1 != size:
        raise ValueError(f"a block that cannot hold {size} bytes")
    return block[1:]
