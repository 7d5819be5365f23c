"""Planes: any words come back to the last bit, and no payload writes anywhere but into its output."""

from __future__ import annotations

import functools
import itertools
import math
import random
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import pytest
import zstandard

from ckptvcs.errors import CorruptionError, FormatError
from ckptvcs.store import codec, entropy, planes
from ckptvcs.store.planes import CODED, CONSTANT, LAYOUTS, RAW, SPARSE, WORD

Words: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

SIZES = (1, 2, 4, 8)
COUNTS = (1, 2, 3, 7, 8, 9, 63, 64, 65, 255, 257, 1001)
ROTATED = 0x10
HOLES = 0x20
BLOCK = 64
ALL_LAYOUTS = [(size, layout) for size in SIZES for layout in (None, *range(len(LAYOUTS[size])))]


def words_of(values: Words) -> Words:
    """The bit patterns of any numbers."""
    return np.ascontiguousarray(values).reshape(-1).view(WORD[values.dtype.itemsize])


def noise(size: int, count: int, seed: int = 0) -> Words:
    """Words of which every bit is random."""
    return np.frombuffer(np.random.default_rng([seed, size]).bytes(size * count), WORD[size]).copy()


def skewed(size: int, count: int, seed: int = 0) -> Words:
    """Words whose bytes are unevenly frequent and never repeat as strings."""
    chance = np.random.default_rng([seed, size])
    return (chance.standard_normal(size * count) * 3 + 100).astype(np.uint8).view(WORD[size])


def sparse(size: int, count: int, share: float = 0.02, seed: int = 0) -> Words:
    """Words most of which are zero, and the others anything."""
    found = noise(size, count, seed)
    found[np.random.default_rng([seed, 1, size]).random(count) >= share] = 0
    return found


def weights(size: int, count: int) -> Words:
    """Dense weights as training makes them."""
    values = (np.random.default_rng(size).standard_normal(count) * 0.02).astype(np.float64)
    return words_of(values.astype({2: ml_dtypes.bfloat16, 4: np.float32, 8: np.float64}[size]))


CONTENTS: dict[str, Callable[[int, int], Words]] = {
    "noise": noise,
    "skewed": skewed,
    "sparse": sparse,
    "all zero": lambda size, count: np.zeros(count, WORD[size]),
    "all ones": lambda size, count: ~np.zeros(count, WORD[size]),
    "constant": lambda size, count: np.full(count, 0x8877665544332211 >> 64 - 8 * size, WORD[size]),
    "counting": lambda size, count: np.arange(count).astype(WORD[size]),
    "one bit in the last": lambda size, count: (np.arange(count) == count - 1).astype(WORD[size]),
    "one bit in the first": lambda size, count: (np.arange(count) == 0).astype(WORD[size]) << (8 * size - 1),
}  # fmt: skip


def special_patterns() -> dict[str, Words]:
    """Bit patterns for which floating-point arithmetic has rules of its own."""
    found = {
        "every byte": np.arange(256, dtype=np.uint8),
        "every pattern of two bytes": np.arange(1 << 16, dtype=np.uint16),
    }
    for size, mantissa in ((4, 23), (8, 52)):
        exponents = (1 << (8 * size - mantissa - 1)) - 1
        payloads = [0, 1, 2, 3, 1 << (mantissa - 1), (1 << (mantissa - 1)) + 1, (1 << mantissa) - 1]
        patterns = [
            sign << (8 * size - 1) | exponent << mantissa | payload
            for sign in (0, 1)
            for exponent in (0, 1, 2, exponents // 2, exponents - 1, exponents)
            for payload in payloads
        ]
        found[f"NaN, infinities and denormals of {size} bytes"] = np.array(patterns, WORD[size])
    return found


def packed(words: Words, rotated: bool = False, layout: int | None = None) -> bytes:
    """The payload of words."""
    return bytes(planes.encode(words, rotated, layout))


def parsed(payload: bytes, size: int) -> tuple[int, list[tuple[int, bytes]]]:
    """The form of a payload, and mode and bytes of each of its planes."""
    form, start = payload[0], 1
    if form & HOLES:
        start += 4 + int.from_bytes(payload[1:5], "little")
    widths = LAYOUTS[size][form & 0x0F]
    table = [struct.unpack_from("<BI", payload, start + 5 * at) for at in range(len(widths))]
    at = start + 5 * len(widths)
    found = []
    for mode, length in table:
        found.append((mode, payload[at : at + length]))
        at += length
    assert at == len(payload)
    return form, found


def built(
    form: int, parts: list[tuple[int, bytes]], lengths: dict[int, int] | None = None, holes: bytes = b""
) -> bytes:
    """A payload from its planes, with lies about some of their lengths. `holes` precede them."""
    table = [
        struct.pack("<BI", mode, (lengths or {}).get(at, len(data))) for at, (mode, data) in enumerate(parts)
    ]
    return b"".join([bytes([form]), holes, *table, *(data for _, data in parts)])


def decoded(payload: bytes | memoryview, size: int, count: int) -> Words:
    found = noise(size, count, 99)
    planes.decode(payload, found)
    return found


def modes(words: Words, rotated: bool = False, layout: int | None = None) -> list[int]:
    payload = packed(words, rotated, layout)
    assert decoded(payload, words.dtype.itemsize, len(words)).tobytes() == words.tobytes()
    return [mode for mode, _ in parsed(payload, words.dtype.itemsize)[1]]


# -- what goes in comes out -----------------------------------------------------------------------


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize(("size", "layout"), ALL_LAYOUTS)
def test_every_content_of_every_length_comes_back(size: int, layout: int | None, rotated: bool) -> None:
    for (name, make), count in itertools.product(CONTENTS.items(), COUNTS):
        words = make(size, count)
        payload = packed(words, rotated, layout)
        assert decoded(payload, size, count).tobytes() == words.tobytes(), (name, count)
        form, _ = parsed(payload, size)
        assert bool(form & ROTATED) == rotated
        assert layout is None or form & 0x0F == layout
        assert len(payload) <= words.nbytes + 12 + 5 * size + count // 500, "at worst, planes as they are"


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize(("size", "layout"), ALL_LAYOUTS)
def test_large_chunks_come_back(size: int, layout: int | None, rotated: bool) -> None:
    """Large enough that planes are judged by a sample."""
    count = (1 << 17) // size + 5
    for name, make in CONTENTS.items():
        words = make(size, count)
        assert decoded(packed(words, rotated, layout), size, count).tobytes() == words.tobytes(), name


@pytest.mark.parametrize("name", special_patterns())
def test_patterns_with_a_meaning_are_only_patterns(name: str) -> None:
    words = special_patterns()[name]
    size = words.dtype.itemsize
    for layout, rotated in itertools.product(range(len(LAYOUTS[size])), (False, True)):
        payload = packed(words, rotated, layout)
        assert decoded(payload, size, len(words)).tobytes() == words.tobytes()


@pytest.mark.parametrize("size", SIZES)
def test_words_that_lie_askew_or_are_read_only(size: int) -> None:
    """Memory of files and pickles starts anywhere; numpy may not be told otherwise."""
    words = skewed(size, 777)
    room = bytearray(1 + words.nbytes)
    room[1:] = words.tobytes()
    askew = np.frombuffer(memoryview(room)[1:], WORD[size])
    frozen = np.frombuffer(words.tobytes(), WORD[size])
    assert not frozen.flags.writeable
    for rotated in (False, True):
        expected = packed(words, rotated)
        assert packed(askew, rotated) == expected
        assert packed(frozen, rotated) == expected
        into = bytearray(1 + words.nbytes)
        planes.decode_frame(memoryview(b"x" + expected)[1:], memoryview(into)[1:], size, None)
        assert into[1:] == words.tobytes()
        assert into[0] == 0
        with pytest.raises(ValueError, match="read-only"):
            planes.decode_frame(expected, memoryview(bytes(words.nbytes)), size, None)


@pytest.mark.parametrize("size", SIZES)
def test_the_callers_memory_is_neither_changed_nor_kept(size: int) -> None:
    for (name, make), rotated, layout in itertools.product(
        CONTENTS.items(), (False, True), range(len(LAYOUTS[size]))
    ):
        words = make(size, 500)
        before = words.tobytes()
        payload = packed(words, rotated, layout)
        assert words.tobytes() == before, name
        assert not np.shares_memory(np.frombuffer(planes.encode(words, rotated, layout), np.uint8), words)
        words[:] = ~words
        stored = bytearray(payload)
        found = decoded(stored, size, 500)
        assert found.tobytes() == before, name
        assert stored == payload, "decoding changes no payload"
        stored[:] = bytes(len(stored))
        decoded(packed(noise(size, 500), True), size, 500)
        assert found.tobytes() == before, "nothing of the payload or of scratch memory is kept"


@pytest.mark.parametrize("size", SIZES)
def test_what_was_done_before_leaves_no_trace(size: int) -> None:
    """Scratch memory is used again and again: a longer or shorter chunk before must not shine through."""
    chance = random.Random(size)
    expected: dict[tuple[str, int, bool], bytes] = {}
    for _ in range(300):
        name = chance.choice([*CONTENTS])
        count, rotated = chance.choice([1, 3, 600, 40_000]), chance.random() < 0.5
        words = CONTENTS[name](size, count)
        payload = packed(words, rotated)
        assert expected.setdefault((name, count, rotated), payload) == payload
        assert decoded(payload, size, count).tobytes() == words.tobytes()


def test_threads_do_not_disturb_each_other() -> None:
    jobs = [(size, make(size, 20_011)) for size in SIZES for make in CONTENTS.values()]
    alone = [packed(words, True) for _, words in jobs]
    failures: list[object] = []
    start = threading.Barrier(4)

    def work(first: int) -> None:
        start.wait()
        for at in (*range(first, len(jobs)), *range(first)):
            size, words = jobs[at]
            try:
                payload = packed(words, True)
                back = decoded(payload, size, len(words)).tobytes()
            except BaseException as error:  # noqa: BLE001
                failures.append(error)
            else:
                if payload != alone[at] or back != words.tobytes():
                    failures.append((first, at))

    threads = [threading.Thread(target=work, args=(9 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# -- how planes are stored ------------------------------------------------------------------------


def test_each_mode_is_chosen_where_it_suits() -> None:
    count = 4000
    for size in SIZES:
        odd = WORD[size].type(1 << 8 * (size - 1))  # leaves no hole
        assert modes(~np.zeros(count, WORD[size]), layout=0) == [CONSTANT] * size
        assert modes(noise(size, count), layout=0) == [RAW] * size
        assert modes(skewed(size, count), layout=0) == [CODED] * size
        assert modes(sparse(size, count, 0.05) | odd, layout=0)[:-1] == [SPARSE] * (size - 1)
    assert modes(noise(4, count), layout=1) == [RAW, RAW, RAW]
    assert modes(np.full(count, 0x01020304, WORD[4]), layout=1) == [CONSTANT] * 3
    assert modes(np.full(count, 0x0102030405060708, WORD[8]), layout=1) == [CONSTANT] * 4
    assert modes(noise(2, count), layout=1) == [RAW]
    mixed = noise(8, count) & np.uint64(0x0000FF00FFFF00FF) | np.uint64(0xAB00000000000000)
    mixed |= skewed(8, count) & np.uint64(0x00FF000000000000)
    mixed |= sparse(8, count, 0.05) & np.uint64(0x000000000000FF00)
    assert modes(mixed, layout=0) == [RAW, SPARSE, RAW, RAW, CONSTANT, RAW, CODED, CONSTANT]


@pytest.mark.parametrize("size", SIZES)
def test_holes_are_left_out(size: int) -> None:
    """Rows that nothing touched: whole blocks of zeros, anywhere and of any number."""
    for count in (1, 63, 64, 65, 127, 128, 129, 640, 1000, 8192, 8200):
        for blocks in ([], [0], [1], [count // BLOCK], [count // BLOCK - 1], [0, 2, 3, 9], range(2000)):
            words = np.zeros(count, WORD[size])
            for block in blocks:
                part = words[max(0, block) * BLOCK : (block + 1) * BLOCK]
                part[:] = noise(size, len(part), block + 2)
            modes(words)
            modes(words, True)
    words = np.zeros(64_000, WORD[size])
    words[BLOCK * 100 : BLOCK * 110] = noise(size, 640)
    payload = packed(words)
    assert payload[0] & HOLES
    assert len(payload) < 640 * size + 300
    assert len(packed(np.zeros(64_000, WORD[size]))) < 100


def test_a_constant_plane_is_known_by_all_of_its_bytes() -> None:
    """Not by its start: whatever differs, however late, comes back."""
    for size, at in itertools.product(SIZES, (0, 1, 63, 64, 65, 99_999)):
        words = np.full(100_000, 7, WORD[size])
        words[at] = 8
        modes(words)


def test_low_bytes_that_are_noise_stay_together() -> None:
    count = 1 << 16
    assert parsed(packed(weights(4, count), True), 4)[0] == ROTATED | planes.WIDE
    doubles = noise(8, count) >> WORD[8].type(12) | WORD[8].type(0x3F80 << 48)
    assert parsed(packed(doubles, True), 8)[0] == ROTATED | planes.WIDE
    counting = np.arange(count).astype(WORD[4]) + WORD[4].type(1)
    assert parsed(packed(counting), 4)[0] == planes.BYTES


@pytest.mark.parametrize(("size", "limit"), [(2, 0.67), (4, 0.84), (8, 0.93)])
def test_dense_weights_take_what_their_exponents_save(size: int, limit: float) -> None:
    words = weights(size, (1 << 20) // size)
    payload = packed(words, True)
    assert len(payload) <= limit * words.nbytes
    assert decoded(payload, size, len(words)).tobytes() == words.tobytes()


@pytest.mark.parametrize(("share", "limit"), [(0.001, 0.1), (0.01, 0.25), (0.03, 0.55), (0.05, 0.8)])
def test_sparse_planes_are_far_below_a_code_of_bytes(share: float, limit: float) -> None:
    """A Huffman code spends a bit at least on every byte."""
    count = 1 << 18
    words = sparse(4, count, share)
    payload = packed(words)
    assert len(payload) < limit * words.nbytes / 8
    assert decoded(payload, 4, count).tobytes() == words.tobytes()


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.2, 0.3])
@pytest.mark.parametrize("runs", [1, 64, 4096])
def test_the_smaller_of_code_and_bitmap_is_taken_unless_they_are_alike(share: float, runs: int) -> None:
    """Told from pieces of the plane; both are tried in full where the pieces do not decide."""
    count = 1 << 18
    generator = np.random.default_rng(runs)
    present = np.repeat(generator.random(count // runs) < share, runs)
    plane = np.where(present, generator.integers(1, 9, count), 0).astype(np.uint8)
    coded = len(entropy.huffman(plane.data))
    bitmap = sum(map(len, planes._encode_sparse(plane)))
    taken = sum(map(len, planes._encode_plane(plane)[1]))
    assert taken <= 1.02 * min(coded, bitmap)


# -- payloads that lie ----------------------------------------------------------------------------

GUARD = 64


def attempt(payload: bytes, size: int, count: int, fill: int) -> bytes | None:
    """What a payload decodes to in memory that was full of something else; None if it is refused.

    Fails if anything but the output is written, or anything but ValueError raised.
    """
    nbytes = size * count
    room = bytearray([fill]) * (nbytes + 2 * GUARD)
    try:
        planes.decode_frame(payload, memoryview(room)[GUARD : GUARD + nbytes], size, None)
    except ValueError:
        found = None
    else:
        found = bytes(room[GUARD : GUARD + nbytes])
    assert room[:GUARD] == room[GUARD + nbytes :] == bytes([fill]) * GUARD
    return found


@functools.cache
def polluting(size: int, count: int) -> tuple[bytes, ...]:
    """Payloads whose decoding leaves much in scratch memory."""
    return packed(noise(size, count), True, 0), packed(sparse(size, count, 0.05), False, 0)


def judged(payload: bytes, size: int, count: int) -> bytes | None:
    """Like `attempt`; fails if the outcome depends on what was in memory before."""
    first = attempt(payload, size, count, 0)
    for payload_of_others in polluting(size, count + 50):
        planes.decode(payload_of_others, np.empty(count + 50, WORD[size]))
    assert attempt(payload, size, count, 0xFF) == first
    return first


def small_payloads() -> Iterator[tuple[str, int, int, bytes]]:
    """Payloads in which every mode occurs, short enough to try every change."""
    for size, layout in ALL_LAYOUTS:
        if layout is None:
            continue
        for name, count in (("skewed", 60), ("sparse", 70), ("noise", 5), ("constant", 9)):
            words = CONTENTS[name](size, count)
            words[0] = 1 if name == "sparse" else words[0]
            yield f"{name} {size} {layout}", size, count, packed(words, size > 1, layout)
    mixed = np.zeros(70, WORD[4])
    mixed[:3] = 0x11223344
    yield "sparse words", 4, 70, packed(mixed, False, 0)
    coded = np.tile(skewed(1, 64), 4)
    yield "coded bytes", 1, 256, packed(coded)
    values = noise(1, 900) | np.uint8(1)
    values[::40] &= 3
    bits = (noise(1, 900, 3) < 8).astype(np.uint8)
    yield "coded blocks", 1, 900, packed(bits * values)


PAYLOADS = {name: (size, count, payload) for name, size, count, payload in small_payloads()}


def test_the_small_payloads_reach_every_mode() -> None:
    found = {mode for size, _, payload in PAYLOADS.values() for mode, _ in parsed(payload, size)[1]}
    assert found == {CONSTANT, RAW, CODED, SPARSE}
    blocks = {
        block
        for size, _, payload in PAYLOADS.values()
        for mode, data in parsed(payload, size)[1]
        if mode == SPARSE
        for block in (data[4], data[4 + int.from_bytes(data[:4], "little")])
    }
    assert blocks == {0, 1}, "bitmaps and values as they are, and coded"


@pytest.mark.parametrize("name", PAYLOADS)
def test_no_cut_payload_is_accepted(name: str) -> None:
    size, count, payload = PAYLOADS[name]
    assert judged(payload, size, count) is not None
    for length in range(len(payload)):
        assert judged(payload[:length], size, count) is None
    for more in (b"\0", b"\xff" * 9, payload):
        assert judged(payload + more, size, count) is None


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_flipped_bit_is_refused_or_fills_the_output(name: str) -> None:
    size, count, payload = PAYLOADS[name]
    step = 1 if len(payload) < 120 else 7
    for bit in range(0, 8 * len(payload), step):
        changed = bytearray(payload)
        changed[bit // 8] ^= 1 << bit % 8
        judged(bytes(changed), size, count)


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_payload_of_other_words_is_refused_or_fills_the_output(name: str) -> None:
    size, count, payload = PAYLOADS[name]
    for other, number in itertools.product(SIZES, (count, count + 1, count - 1, 8 * count, count // size)):
        if number:
            judged(payload, other, number)
    raw = size * count
    for wrong in (0, 3, 5, 16, 255):
        with pytest.raises(ValueError):
            planes.decode_frame(payload, memoryview(bytearray(raw)), wrong, None)
    if raw % 8:
        with pytest.raises(ValueError, match="are no 8-byte numbers"):
            planes.decode_frame(payload, memoryview(bytearray(raw)), 8, None)


def test_lying_lengths_of_planes_are_refused() -> None:
    parts = [(RAW, bytes(10)), (RAW, bytes(10))]
    assert judged(built(0, parts), 2, 10) == bytes(20)
    for lengths in (
        {0: 0}, {0: 9}, {0: 11}, {0: 20}, {0: 21}, {1: 9}, {1: 11}, {0: 9, 1: 11}, {0: 2**32 - 1},
        {1: 2**32 - 1}, {0: 2**31, 1: 2**31}, {0: 2**32 - 10, 1: 10},
    ):  # fmt: skip
        assert judged(built(0, parts, lengths), 2, 10) is None, lengths
    for wrong in (b"", b"\1\2"):
        assert judged(built(0, [(CONSTANT, wrong), (RAW, bytes(10))]), 2, 10) is None
    assert judged(built(1, [(CONSTANT, b"\1")]), 2, 10) is None


def test_unknown_forms_and_modes_are_refused() -> None:
    for size in SIZES:
        count = len(LAYOUTS[size])
        for form in range(256):
            known = not form & ~(0x0F | ROTATED | HOLES) and form & 0x0F < count
            widths = LAYOUTS[size][form & 0x0F] if known else (1,) * size
            planes_of_it = [(CONSTANT, bytes(width)) for width in widths]
            holes = HOLES_OF_NOTHING if form & HOLES else b""
            assert (judged(built(form, planes_of_it, holes=holes), size, 6) is not None) == known
    for mode in range(4, 256):
        assert judged(built(0, [(mode, b"\0" * 6)]), 1, 6) is None
    wide = (4).to_bytes(4, "little") + b"\0\0\0\0" + b"\0"
    assert judged(built(1, [(SPARSE, wide)]), 2, 6) is None, "only planes of bytes may be sparse"


HOLES_OF_NOTHING = struct.pack("<I", 1) + b"\0"


def block(data: bytes, coded: bool = False) -> bytes:
    return b"\1" + zstandard.ZstdCompressor().compress(data) if coded else b"\0" + data


def sparse_plane(bitmap: bytes, values: bytes, length: int | None = None) -> bytes:
    return struct.pack("<I", len(bitmap) if length is None else length) + bitmap + values


@pytest.mark.parametrize("coded", [False, True], ids=["raw", "coded"])
def test_lying_bitmaps_are_refused(coded: bool) -> None:
    bitmap = block(b"\xa0\x80", coded)

    def plane(data: bytes) -> bytes | None:
        return judged(built(0, [(SPARSE, data)]), 1, 10)

    assert plane(sparse_plane(bitmap, block(b"abc", coded))) == b"a\0b\0\0\0\0\0c\0"
    for values in (b"", b"ab", b"abcd", b"a" * 10, b"a" * 300):
        assert plane(sparse_plane(bitmap, block(values, coded))) is None
    for bits in (b"", b"\xe0", b"\xe0\0\0", b"\xe0" * 300):
        assert plane(sparse_plane(block(bits, coded), block(b"abc", coded))) is None
    whole = sparse_plane(bitmap, block(b"abc", coded))
    for length in (0, len(bitmap) - 1, len(bitmap) + 1, len(whole), len(whole) - 4, 2**31, 2**32 - 1):
        assert plane(sparse_plane(bitmap, block(b"abc", coded), length)) is None
    for kind in (2, 3, 255):
        assert plane(sparse_plane(bytes([kind]) + bitmap[1:], block(b"abc", coded))) is None
    beyond = plane(sparse_plane(block(b"\xa0\xbf", coded), block(b"abc", coded)))
    assert beyond in (None, b"a\0b\0\0\0\0\0c\0"), "bits behind the last word are nobody's"
    none = plane(sparse_plane(block(bytes(2)), block(b"")))
    assert none == bytes(10)
    full = plane(sparse_plane(block(b"\xff\xc0"), block(b"0123456789")))
    assert full == b"0123456789"


@pytest.mark.parametrize("coded", [False, True], ids=["raw", "coded"])
def test_lying_bitmaps_of_holes_are_refused(coded: bool) -> None:
    count = 10 * BLOCK + 5
    parts = [(RAW, bytes(range(1, 2 * BLOCK + 6)))]

    def decodes(holes: bytes) -> bytes | None:
        return judged(built(HOLES, parts, holes=holes), 1, count)

    def bitmap(bits: bytes, length: int | None = None) -> bytes:
        data = block(bits, coded)
        return struct.pack("<I", len(data) if length is None else length) + data

    expected = bytearray(count)
    expected[BLOCK : 2 * BLOCK] = parts[0][1][:BLOCK]
    expected[9 * BLOCK : 10 * BLOCK] = parts[0][1][BLOCK : 2 * BLOCK]
    expected[-5:] = parts[0][1][-5:]
    assert decodes(bitmap(b"\x40\x40")) == expected
    for bits in (b"", b"\x40", b"\x40\x40\0", b"\x40" * 99, b"\0\0", b"\xff\xff", b"\x40\xc0"):
        assert decodes(bitmap(bits)) is None, bits
    right = len(bitmap(b"\x40\x40")) - 4
    for length in (0, right - 1, right + 1, right + 5, 2**31, 2**32 - 1):
        assert decodes(bitmap(b"\x40\x40", length)) is None, length
    for cut in range(right + 4):
        assert judged(bytes([HOLES]) + bitmap(b"\x40\x40")[:cut], 1, count) is None
    beyond = decodes(bitmap(b"\x40\x7f"))
    assert beyond in (None, bytes(expected)), "bits behind the last block are nobody's"
    full = built(HOLES | ROTATED, [(CONSTANT, b"\2")], holes=bitmap(b"\xff\xc0"))
    assert judged(full, 1, count) == b"\1" * count


def lying_frames(size: int) -> dict[str, bytes]:
    """zstandard frames that do not hold the bytes that a plane needs."""
    plain = zstandard.ZstdCompressor(level=1)
    silent = zstandard.ZstdCompressor(level=1, write_content_size=False)
    honest = plain.compress(bytes(size))
    stream = zstandard.ZstdCompressor(level=1).compressobj(size=size)
    streamed = stream.compress(bytes(size)) + stream.flush()
    wide = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=27, write_content_size=True)
    )
    noisy = wide.compress(np.random.default_rng(1).bytes(size))
    dictionary = zstandard.ZstdCompressor(dict_data=zstandard.ZstdCompressionDict(bytes(range(256)) * 4))
    return {
        "one byte too many": plain.compress(bytes(size + 1)),
        "one byte too few": plain.compress(bytes(size - 1)),
        "nothing": plain.compress(b""),
        "no size": silent.compress(bytes(size)),
        "no size and far too much": silent.compress(bytes(64 << 20)),
        "a bomb": plain.compress(bytes(256 << 20)),
        "cut": honest[:-1],
        "cut to its header": honest[:6],
        "cut noise": noisy[:-3],
        "trailing": honest + b"\0",
        "two frames": honest + honest,
        "skippable": b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"skip",
        "skippable first": b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"skip" + honest,
        "a dictionary": dictionary.compress(bytes(size - 300) + bytes(range(256)) + bytes(44)),
        "another magic": b"\xfe" + streamed[1:],
        "no bytes": b"",
        "text": b"no frame at all",
    }


def with_stated_size(frame: bytes, stated: int) -> bytes:
    """The same frame with a lie of eight bytes about its content's size."""
    parameters = zstandard.get_frame_parameters(frame)
    header = zstandard.frame_header_size(frame)
    window = max(0, math.ceil(math.log2(max(parameters.window_size, 1024))) - 10)
    return frame[:4] + bytes([0b1100_0000, window << 3]) + stated.to_bytes(8, "little") + frame[header:]


@pytest.mark.parametrize("how", ["plane", "bitmap", "values", "holes"])
def test_lying_frames_are_refused_before_memory_is_taken_for_them(how: str) -> None:
    count = {"plane": 4096, "bitmap": 8 * 4096, "values": 4096, "holes": 8 * BLOCK * 4096}[how]

    def payload(frame: bytes) -> bytes:
        if how == "plane":
            return built(0, [(CODED, frame)])
        if how == "holes":
            return built(HOLES, [(RAW, b"")], holes=struct.pack("<I", len(frame) + 1) + b"\1" + frame)
        if how == "bitmap":
            return built(0, [(SPARSE, sparse_plane(b"\1" + frame, b"\0"))])
        return built(0, [(SPARSE, sparse_plane(block(b"\xff" * 512), b"\1" + frame))])

    plain = zstandard.ZstdCompressor(level=1)
    assert judged(payload(plain.compress(bytes(4096))), 1, count) == bytes(count)
    frames = lying_frames(4096)
    frames |= {f"claims {stated}": with_stated_size(plain.compress(bytes(64 << 20)), stated)
               for stated in (0, 1, 4096, 1 << 30, 1 << 62, (1 << 64) - 1, (1 << 64) - 2)}  # fmt: skip
    frames["tells less than it holds"] = with_stated_size(plain.compress(noise(1, 9000).tobytes()), 4096)
    frames["tells more than it holds"] = with_stated_size(plain.compress(noise(1, 900).tobytes()), 4096)
    for name, frame in frames.items():
        tracemalloc.start()
        try:
            assert attempt(payload(frame), 1, count, 0x5A) is None, name
            assert tracemalloc.get_traced_memory()[1] < count + (1 << 20), name
        finally:
            tracemalloc.stop()


def test_no_small_payload_takes_much_memory() -> None:
    chance = random.Random(5)
    decoded(packed(noise(8, 3000), True), 8, 3000)  # scratch memory is there now
    for size, count, payload in PAYLOADS.values():
        for _ in range(10):
            changed = bytearray(payload)
            for _ in range(chance.randint(1, 4)):
                changed[chance.randrange(len(changed))] = chance.choice([0, 1, 0x7F, 0xFF])
            tracemalloc.start()
            attempt(bytes(changed), size, count, 0)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 400_000, changed.hex()


def test_noise_is_refused_or_fills_the_output() -> None:
    chance = random.Random(11)
    for _ in range(3000):
        size = chance.choice(SIZES)
        data = bytearray(chance.randbytes(chance.randint(0, 80)))
        if data:
            data[0] &= 0x31
            for at in range(len(data) // 5):
                data[1 + 5 * at] &= 3
                data[2 + 5 * at : min(len(data), 6 + 5 * at)] = struct.pack("<I", chance.randint(0, 20))[
                    : len(data) - 2 - 5 * at
                ]
        attempt(bytes(data), size, chance.randint(1, 20), 0xA5)


# -- through the registry -------------------------------------------------------------------------


@pytest.mark.parametrize("element_size", [1, 2, 4, 8])
def test_the_registry_says_where_a_payload_is_damaged(element_size: int) -> None:
    words = skewed(element_size, 1000)
    payload = packed(words)
    into = bytearray(words.nbytes)
    codec.decode(codec.PLANES, payload, memoryview(into), element_size, None, "a pack at 7")
    assert into == words.tobytes()
    for wrong in (payload[:-1], payload + b"\0", b"", b"\xff" + payload[1:]):
        with pytest.raises(
            CorruptionError, match="a pack at 7: the stored bytes cannot be decoded"
        ) as caught:
            codec.decode(codec.PLANES, wrong, memoryview(into), element_size, None, "a pack at 7")
        assert caught.value.path == "a pack at 7"
    with pytest.raises(CorruptionError, match="are no 3-byte numbers"):
        codec.decode(codec.PLANES, payload, memoryview(into), 3, None, "a pack at 7")
    for number in (4, 100, 239, 240, 255):
        with pytest.raises(FormatError, match=f"a pack at 7: unknown codec {number}"):
            codec.decode(number, payload, memoryview(into), element_size, None, "a pack at 7")
