"""Numbers as planes: bytes of equal significance side by side, each plane stored in the way that suits it.

The upper bytes of floating-point numbers (sign, exponent) take few values and compress well; the lower
mantissa bytes are noise, which is kept as it is, in as few wide planes as possible. Everything here is
integer arithmetic on bit patterns, so it is exact whatever the numbers mean. docs/format.md, "Planes", is
the normative description.
"""

from __future__ import annotations

import math
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
_HOLES: Final = 0x20
_BLOCK: Final = 64
"""Words in a block that is left out when all are zero, as are the moments of embeddings never seen."""
CONSTANT, RAW, CODED, SPARSE = range(4)
_HEAD: Final = struct.Struct("<B")
_PLANE: Final = struct.Struct("<BI")
_LENGTH: Final = struct.Struct("<I")
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


def encode(words: Words, rotated: bool = False, layout: int | None = None, prefix: bytes = b"") -> memoryview:
    """The words as planes, behind a prefix. `rotated` turns each word left by one bit first, so that the
    exponent of a floating-point number fills its highest byte. The layout is found from the words unless one
    is given."""
    size = words.dtype.itemsize
    form = _ROTATED if rotated else 0
    holes: list[Buffer] = []
    if _has_holes(words):
        form |= _HOLES
        words, bitmap = _without_holes(words)
        holes = [_LENGTH.pack(len(bitmap)), bitmap]
    if layout is None:
        layout = WIDE if size >= 4 and len(words) and _low_half_is_noise(words) else BYTES
    if rotated:
        words = _turned(words)
    head: list[Buffer] = [prefix, _HEAD.pack(layout | form), *holes]
    data: list[Buffer] = []
    shift = 0
    for width in LAYOUTS[size][layout]:
        mode, parts = _encode_plane(_plane(words, shift, width)) if len(words) else (RAW, [])
        head.append(_PLANE.pack(mode, sum(map(len, parts))))
        data += parts
        shift += 8 * width
    return _joined([b"".join(head), *data])


def layout_of(payload: Buffer) -> int:
    """The layout of a payload that `encode` made without a prefix."""
    return payload[0] & 0x0F


def _joined(parts: Sequence[Buffer]) -> memoryview:
    """Parts one after another, like `bytes.join`, which would hold the GIL for as long as it copies."""
    whole = np.empty(sum(map(len, parts)), np.uint8)
    at = 0
    for part in parts:
        np.copyto(whole[at : at + len(part)], np.frombuffer(part, np.uint8))
        at += len(part)
    return whole.data


def _has_holes(words: Words) -> bool:
    """Whether many words are zero, told from words all over."""
    sample = words[:: max(1, len(words) // _FEW)]
    return int(np.count_nonzero(sample)) * 8 < len(sample) * 7


_FEW: Final = 512


def _without_holes(words: Words) -> tuple[Words, bytes]:
    """The words that lie in blocks with anything but zeros, and a bitmap of these blocks."""
    whole = len(words) // _BLOCK
    blocks = words[: whole * _BLOCK].reshape(whole, _BLOCK)
    present = np.bitwise_or.reduce(blocks, axis=1) != 0
    tail = words[whole * _BLOCK :]
    count = int(np.count_nonzero(present))
    kept = scratch.array("kept words", words.dtype, count * _BLOCK + len(tail))
    np.compress(present, blocks, axis=0, out=kept[: count * _BLOCK].reshape(count, _BLOCK))
    kept[count * _BLOCK :] = tail
    return kept, _block(np.packbits(present))


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
    plane = scratch.array(f"plane {shift}", WORD[width], len(words))
    if shift:
        # Narrowing a shifted copy is several times faster than a strided copy of the bytes.
        shifted = scratch.array("shifted", words.dtype, len(words))
        np.right_shift(words, shift, out=shifted)
        words = shifted
    np.copyto(plane, words, casting="unsafe")
    return plane


def _encode_plane(plane: Words) -> tuple[int, Sequence[Buffer]]:
    """Its mode and its data, which may be its own memory."""
    count, width = len(plane), plane.dtype.itemsize
    first = plane[:1]
    # Most planes differ within their first bytes.
    if (plane[:64] == first).all() and (plane == first).all():
        return CONSTANT, [first.tobytes()]
    raw = plane.view(np.uint8).data
    if width == 1:
        there = np.count_nonzero(plane)
        if count > 4 * _SAMPLE and there * _SPARSE_ABOVE > count and _is_noise(plane):
            return RAW, [raw]
        likely = _sparse_share(plane) if there * _SPARSE_ABOVE < count else _UNLIKELY
        sparse = _encode_sparse(plane) if likely < _UNLIKELY else []
        left = sum(map(len, sparse)) if sparse else count
        if likely < _LIKELY and left < _WORTHWHILE * count:
            return SPARSE, sparse
        coded = entropy.huffman(raw)
        if left < min(len(coded), _WORTHWHILE * count):
            return SPARSE, sparse
        if len(coded) < _WORTHWHILE * count:
            return CODED, [coded]
    return RAW, [raw]


def _is_noise(plane: Words) -> bool:
    """Whether bytes are so evenly frequent that coding them is not worth trying, told from bytes all over.

    The entropy of a sample is an underestimate; Miller and Madow's term corrects it.
    """
    sample = plane[:: max(1, len(plane) // _SAMPLE)]
    counts = np.bincount(sample, minlength=256)
    counts = counts[counts > 0]
    bits = math.log2(len(sample)) - float((counts * np.log2(counts)).sum()) / len(sample)
    return bits + (len(counts) - 1) / (2 * len(sample) * math.log(2)) > _NOISE


def _low_half_is_noise(words: Words) -> bool:
    """Whether no byte of the lower half is worth a plane of its own."""
    size = words.dtype.itemsize
    sample = words[:: max(1, len(words) // _SAMPLE)]
    return all(
        _is_noise((sample >> words.dtype.type(8 * place)).astype(np.uint8)) for place in range(size // 2)
    )


def _sparse_share(plane: Words) -> float:
    """What bitmap and values take, by what coding the bytes takes, told from pieces of the plane.

    Zeros in runs are found by the coder itself, so the pieces are as they lie.
    """
    length = _SAMPLE // 4
    if len(plane) > 32 * length:
        step = len(plane) // 16
        plane = np.concatenate([plane[at : at + length] for at in range(step // 2, len(plane), step)])
    return sum(map(len, _encode_sparse(plane))) / len(entropy.huffman(plane.data))


_LIKELY, _UNLIKELY = 0.85, 1.15
"""Shares below and above which one of the two is not tried."""

_SAMPLE: Final = 4 << 10
_NOISE: Final = 7.93
"""Bits of entropy in a byte."""


def copied(raw: Buffer, into: Buffer) -> None:
    """Copy bytes without holding the GIL."""
    np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(raw, np.uint8))


def _encode_sparse(plane: Words) -> list[Buffer]:
    present = plane != 0
    bitmap = _block(np.packbits(present))
    values = _block(plane[present])
    return [_LENGTH.pack(len(bitmap)), bitmap, values]


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
    form, layout = view[0], view[0] & 0x0F
    if form & ~(0x0F | _ROTATED | _HOLES) or layout >= len(LAYOUTS[size]):
        raise ValueError(f"unknown form {form} of {size}-byte numbers")
    if form & _HOLES:
        places, rest = _placed(view[_HEAD.size :], len(into))
        blocks = len(into) // _BLOCK
        tail = len(into) - blocks * _BLOCK
        kept = scratch.array("kept words", into.dtype, len(places) * _BLOCK + tail)
        _decode_words(rest, form, kept)
        into[: blocks * _BLOCK] = 0
        into[: blocks * _BLOCK].reshape(blocks, _BLOCK)[places] = kept[: len(kept) - tail].reshape(-1, _BLOCK)
        into[blocks * _BLOCK :] = kept[len(kept) - tail :]
    else:
        _decode_words(view[_HEAD.size :], form, into)


def _placed(view: memoryview, count: int) -> tuple[Words, memoryview]:
    """The numbers of the blocks that are there, and what follows their bitmap."""
    if len(view) < _LENGTH.size:
        raise ValueError("the bitmap of blocks is cut short")
    (length,) = _LENGTH.unpack_from(view)
    end = _LENGTH.size + length
    if end > len(view):
        raise ValueError("the bitmap of blocks is cut short")
    return _places(view[_LENGTH.size : end], count // _BLOCK), view[end:]


def _places(block: memoryview, count: int) -> Words:
    """Which of `count` bits of a bitmap are set."""
    bitmap = _unblock(block, (count + 7) // 8)
    return np.flatnonzero(np.unpackbits(np.frombuffer(bitmap, np.uint8), count=count).view(np.bool_))


def _decode_words(view: memoryview, form: int, into: Words) -> None:
    size = into.dtype.itemsize
    widths = LAYOUTS[size][form & 0x0F]
    at = _PLANE.size * len(widths)
    if len(view) < at:
        raise ValueError("the table of planes is cut short")
    planes: list[tuple[int, memoryview]] = []
    for number in range(len(widths)):
        mode, length = _PLANE.unpack_from(view, _PLANE.size * number)
        if at + length > len(view):
            raise ValueError("a plane is cut short")
        planes.append((mode, view[at : at + length]))
        at += length
    if at != len(view):
        raise ValueError("bytes behind the last plane")
    _merge(planes, widths, into)
    if form & _ROTATED:
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
    places = _places(data[4 : 4 + length], count)
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
