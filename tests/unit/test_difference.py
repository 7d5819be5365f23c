"""Differences: exact whatever the numbers mean, the same on every machine, and refused where they lie."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import random
import struct
import threading
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any, Final, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np
import pytest

from ckptvcs.errors import CorruptionError
from ckptvcs.store import codec, difference, planes
from ckptvcs.store.difference import SAME, SCALED
from ckptvcs.store.planes import WORD

Words: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

SIZES: Final = (1, 2, 4, 8)


class Float(NamedTuple):
    """A floating-point format, written down here a second time."""

    code: int
    size: int
    mantissa: int
    exponent: int
    numbers: Any

    @property
    def top(self) -> int:
        """The exponent field of infinities and NaN."""
        return (1 << self.exponent) - 1


FLOATS: Final = {
    "bfloat16": Float(0, 2, 7, 8, ml_dtypes.bfloat16),
    "float32": Float(1, 4, 23, 8, np.float32),
    "float64": Float(2, 8, 52, 11, np.float64),
}
FACTORS: Final = [
    1.0, 0.9, 0.95, 0.999, 0.9999, 1.0001, 0.99999994, 1 / 3, math.pi, 2.0**-8, 2.0**8, 0.5, 2.0, 255.99998,
    0.00390625024, 0.1,
]  # fmt: skip


def words_of(values: Words) -> Words:
    return np.ascontiguousarray(values).reshape(-1).view(WORD[values.dtype.itemsize])


def noise(size: int, count: int, seed: int = 0) -> Words:
    return np.frombuffer(np.random.default_rng([seed, size]).bytes(size * count), WORD[size]).copy()


def specials(kind: Float) -> Words:
    """NaN of both kinds and several payloads, infinities, zeros, denormals, and all ends of the range."""
    low = [0, 1, 2, 1 << (kind.mantissa - 1), (1 << (kind.mantissa - 1)) + 1, (1 << kind.mantissa) - 1]
    exponents = [*range(14), kind.top // 2 - 1, kind.top // 2, *range(kind.top - 13, kind.top + 1)]
    return np.array(
        [
            sign << (8 * kind.size - 1) | exponent << kind.mantissa | payload
            for sign in (0, 1)
            for exponent in exponents
            for payload in low
        ],
        WORD[kind.size],
    )


def numbers(name: str, count: int, seed: int = 0) -> Words:
    """Weights, every kind of special number, and noise."""
    kind = FLOATS[name]
    dense = np.random.default_rng([seed, 5]).standard_normal(count).astype(kind.numbers)
    return np.concatenate([words_of(dense), specials(kind), noise(kind.size, count // 4 + 1, seed)])


def encoded(words: Words, base: Words, name: str | None = None, factor: float | None = None) -> bytes:
    kind = None if name is None else difference.format_of(name)
    return bytes(difference.encode(words, base, factor, kind))


def packed(words: Words, rotated: bool = False) -> bytes:
    return bytes(planes.encode(words, rotated))


def decoded(payload: bytes, base: Words) -> Words:
    """Decoded apart from the base and in its place, which must give the same."""
    size = base.dtype.itemsize
    before = base.tobytes()
    apart, inside = bytearray(b"\x5a" * base.nbytes), bytearray(before)
    known = memoryview(bytearray(before))
    difference.decode_frame(payload, memoryview(apart), size, known)
    assert known == before, "the base is not changed"
    difference.decode_frame(payload, memoryview(inside), size, memoryview(inside))
    assert apart == inside
    return np.frombuffer(bytes(apart), WORD[size])


def scaled_payload(code: int, factor: float, missed: bytes) -> bytes:
    return struct.pack("<BBd", SCALED, code, factor) + missed


def predicted(base: Words, name: str, factor: float) -> Words:
    """What a scaled difference of nothing gives: the prediction."""
    nothing = packed(np.zeros(len(base), base.dtype))
    return decoded(scaled_payload(FLOATS[name].code, factor, nothing), base)


# -- what goes in comes out -----------------------------------------------------------------------


def drifts(size: int, count: int) -> dict[str, tuple[Words, Words]]:
    """Words and their bases."""
    base = noise(size, count, 1)
    steps = np.random.default_rng(size).integers(-3, 4, count).astype(f"<i{size}").view(WORD[size])
    few = base.copy()
    few[:: max(1, count // 3)] ^= WORD[size].type(5)
    return {
        "the same": (base.copy(), base),
        "small steps": (base + steps, base),
        "a few changes": (few, base),
        "nothing alike": (noise(size, count, 2), base),
        "from zero": (base, np.zeros(count, WORD[size])),
        "to zero": (np.zeros(count, WORD[size]), base),
        "around the ends": (np.zeros(count, WORD[size]), ~np.zeros(count, WORD[size])),
        "the highest bit": (base ^ WORD[size].type(1 << (8 * size - 1)), base),
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 255, 257, 3001])
def test_every_difference_comes_back(size: int, count: int) -> None:
    for name, (words, base) in drifts(size, count).items():
        untouched = words.tobytes(), base.tobytes()
        payload = encoded(words, base)
        assert (words.tobytes(), base.tobytes()) == untouched
        assert payload[0] == SAME
        assert decoded(payload, base).tobytes() == words.tobytes(), name


@pytest.mark.parametrize("size", SIZES)
def test_every_step_between_two_bytes_comes_back(size: int) -> None:
    """All carries of the signed digits."""
    edges = sorted({(sign * (1 << bit) + off) % (1 << 8 * size) for bit in range(8 * size)
                    for off in (-129, -128, -127, -1, 0, 1, 127, 128, 129) for sign in (1, -1)})  # fmt: skip
    steps = np.array(edges, np.uint64).astype(WORD[size])
    for start in (0, 1, 0x7F, 0x80, (1 << 8 * size) - 1, 1 << (8 * size - 1)):
        base = np.full(len(steps), start, WORD[size])
        assert decoded(encoded(base + steps, base), base).tobytes() == (base + steps).tobytes()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_small_steps_of_either_sign_take_one_byte(size: int) -> None:
    base = noise(size, 4000, 1)
    steps = np.random.default_rng(size).integers(-100, 100, 4000)
    words = base + steps.astype(f"<i{size}").view(WORD[size])
    assert len(encoded(words, base)) < 4000 + 6 * size + 2
    assert len(encoded(base, base)) < 100


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("factor", FACTORS)
def test_scaled_differences_of_all_numbers_come_back(name: str, factor: float) -> None:
    base = numbers(name, 300, 1)
    for words in (numbers(name, 300, 2), base.copy(), np.roll(base, 7), np.zeros_like(base)):
        untouched = words.tobytes(), base.tobytes()
        payload = encoded(words, base, name, factor)
        assert (words.tobytes(), base.tobytes()) == untouched
        assert payload[:10] == struct.pack("<BBd", SCALED, FLOATS[name].code, factor)
        assert decoded(payload, base).tobytes() == words.tobytes()


@pytest.mark.parametrize("size", SIZES)
def test_memory_that_lies_askew_or_is_read_only(size: int) -> None:
    words, base = drifts(size, 501)["small steps"]
    name = {2: "bfloat16", 4: "float32", 8: "float64"}.get(size)

    def askew(data: bytes) -> memoryview:
        return memoryview(bytearray(b"x" + data))[1:]

    for factor in (None, 0.75) if name else (None,):
        payload = encoded(words, base, name, factor)
        frozen = [np.frombuffer(each.tobytes(), WORD[size]) for each in (words, base)]
        assert encoded(*frozen, name, factor) == payload
        crooked = [np.frombuffer(askew(each.tobytes()), WORD[size]) for each in (words, base)]
        assert encoded(*crooked, name, factor) == payload
        into = askew(bytes(words.nbytes))
        difference.decode_frame(askew(payload), into, size, base.tobytes())
        assert into == words.tobytes()
        into = askew(base.tobytes())
        difference.decode_frame(askew(payload), into, size, into)
        assert into == words.tobytes()
        with pytest.raises(ValueError, match="read-only"):
            difference.decode_frame(payload, memoryview(bytes(words.nbytes)), size, base.tobytes())


@pytest.mark.parametrize("size", SIZES)
def test_a_base_that_overlaps_its_output_by_halves(size: int) -> None:
    words, base = drifts(size, 600)["small steps"]
    payload = encoded(words, base)
    for shift in (size, 1, 64 * size, -size, -64 * size):
        room = bytearray(3 * words.nbytes)
        known = memoryview(room)[words.nbytes : 2 * words.nbytes]
        known[:] = base.tobytes()
        into = memoryview(room)[words.nbytes + shift : 2 * words.nbytes + shift]
        difference.decode_frame(payload, into, size, known)
        assert into == words.tobytes()


def test_a_chain_decodes_in_one_place() -> None:
    """As the reader does it: each link over the one below."""
    for name, kind in FLOATS.items():
        links = [numbers(name, 500, seed) for seed in range(9)]
        into = memoryview(bytearray(links[0].nbytes))
        planes.decode_frame(packed(links[0], True), into, kind.size, None)
        for at, (base, words) in enumerate(itertools.pairwise(links)):
            factor = (None, 0.99, 1.5)[at % 3]
            payload = encoded(words, base, name, factor)
            difference.decode_frame(payload, into, kind.size, into)
            assert into == words.tobytes()


def test_what_was_done_before_leaves_no_trace() -> None:
    """Scratch memory of all sizes and kinds, in any order."""
    chance = random.Random(3)
    seen: dict[tuple[str, int, float | None], bytes] = {}
    for _ in range(200):
        name = chance.choice([*FLOATS])
        count, factor = chance.choice([1, 5, 700, 40_000]), chance.choice([None, 0.9, 2.0**-8, 3.25])
        base, words = numbers(name, count, 1), numbers(name, count, 2)
        payload = encoded(words, base, name, factor)
        assert seen.setdefault((name, count, factor), payload) == payload
        into = bytearray(base.tobytes())
        difference.decode_frame(payload, memoryview(into), base.dtype.itemsize, into)
        assert into == words.tobytes()


def test_threads_do_not_disturb_each_other() -> None:
    jobs = [
        (numbers(name, 20_000, 1), numbers(name, 20_000, 2), name, factor)
        for name in FLOATS
        for factor in (None, 0.9, 1.25)
    ]
    alone = [encoded(words, base, name, factor) for words, base, name, factor in jobs]
    start = threading.Barrier(4)

    def work(first: int) -> list[int]:
        start.wait()
        wrong = []
        for at in (*range(first, len(jobs)), *range(first)):
            words, base, name, factor = jobs[at]
            payload = encoded(words, base, name, factor)
            if payload != alone[at] or decoded(payload, base).tobytes() != words.tobytes():
                wrong.append(at)
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, (0, 2, 4, 6))) == [[], [], [], []]


# -- the prediction, against an independent one ---------------------------------------------------


def value(pattern: int, mantissa: int, bias: int) -> Fraction:
    """A positive normal number."""
    one = 1 << mantissa
    return Fraction(one + pattern % one, one) * Fraction(2) ** ((pattern >> mantissa) - bias)


def rounded(exact: Fraction, mantissa: int, bias: int) -> int:
    """The pattern of the nearest normal number, ties to even, by integers alone."""
    one = 1 << mantissa
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    if Fraction(2) ** exponent > exact:
        exponent -= 1
    steps = exact * one / Fraction(2) ** exponent
    whole, rest = divmod(steps.numerator, steps.denominator)
    double = 2 * rest - steps.denominator
    whole += double > 0 or (double == 0 and whole % 2 == 1)
    return ((exponent + bias) << mantissa) + whole - one


def reference(pattern: int, kind: Float, factor: float) -> int:
    """The word that is predicted: docstrings of `difference`, done with fractions."""
    bias = kind.top // 2
    sign = pattern >> (8 * kind.size - 1) << (8 * kind.size - 1)
    magnitude = pattern ^ sign
    if not 10 <= magnitude >> kind.mantissa <= kind.top - 10:
        return pattern
    if kind.size == 8:
        return sign | rounded(value(magnitude, 52, bias) * Fraction(factor), 52, bias)
    single = Fraction(float(np.float32(factor)))
    if kind.size == 4:
        return sign | rounded(value(magnitude, 23, bias) * single, 23, bias)
    product = rounded(value(magnitude, 7, bias) * single, 23, bias)
    high, low = divmod(product, 1 << 16)
    return sign | high + (low > 1 << 15 or (low == 1 << 15 and high % 2 == 1))


@pytest.mark.parametrize("name", FLOATS)
def test_the_prediction_is_the_exact_product_rounded_once(name: str) -> None:
    kind = FLOATS[name]
    for at, factor in enumerate(FACTORS):
        base = np.concatenate([specials(kind), noise(kind.size, 250, at), numbers(name, 60, at)])
        expected = np.array([reference(int(word), kind, factor) for word in base], base.dtype)
        assert predicted(base, name, factor).tobytes() == expected.tobytes(), factor
        nothing = packed(np.zeros(len(base), base.dtype))
        payload = encoded(expected, base, name, factor)
        assert payload == scaled_payload(kind.code, factor, nothing), "the writer predicts the same"


def test_every_bfloat16_is_predicted_right() -> None:
    """Ties included: factors of few bits give products that lie half way.

    The product of 8 and 24 bits is exact in float64; two conversions by others round it.
    """
    base = np.arange(1 << 16, dtype=np.uint16).view(WORD[2])
    fields = base >> 7 & 0xFF
    multiplied = (fields >= 10) & (fields <= 245)
    values = base[multiplied].view(ml_dtypes.bfloat16).astype(np.float64)
    for factor in (1 + 1 / 128, 1.5, 0.75, 1 - 1 / 256, 1.00390625, 1 + 3 / 256, *FACTORS):
        expected = base.copy()
        product = (values * float(np.float32(factor))).astype(np.float32)
        expected[multiplied] = product.astype(ml_dtypes.bfloat16).view(WORD[2])
        assert predicted(base, "bfloat16", factor).tobytes() == expected.tobytes(), factor


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_near_the_ends_are_predicted_to_stay(name: str) -> None:
    kind = FLOATS[name]
    fields = specials(kind) >> kind.mantissa & kind.top
    for factor in (2.0**-8, 2.0**8, 0.5, 0.999):
        stayed = predicted(specials(kind), name, factor) == specials(kind)
        ends = (fields < 10) | (fields > kind.top - 10)
        assert stayed[ends].all()
        if factor != 0.999:
            assert not stayed[~ends].any()
        after = predicted(specials(kind), name, factor) >> kind.mantissa & kind.top
        assert ((after[~ends] > 0) & (after[~ends] < kind.top)).all(), "normal numbers stay normal"


# -- finding the factor ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("factor", [0.9, 0.95, 0.5, 1.25, 100.0, 1 / 200])
@pytest.mark.parametrize("count", [100, 5000, 100_000])
def test_decayed_values_have_a_factor(name: str, factor: float, count: int) -> None:
    kind = FLOATS[name]
    old = (np.random.default_rng(count).standard_normal(count) * 1e-3).astype(kind.numbers)
    new = (old.astype(np.float64) * factor).astype(kind.numbers)
    kind_of = difference.format_of(name)
    assert kind_of is not None
    found = difference.fit(words_of(new), words_of(old), kind_of)
    assert found is not None
    assert found == float(np.float32(found)), "it survives float32"
    assert abs(found / factor - 1) < (0.01 if name == "bfloat16" else 1e-6)
    scaled = encoded(words_of(new), words_of(old), name, found)
    assert decoded(scaled, words_of(old)).tobytes() == new.tobytes()
    if count == 5000 and name != "bfloat16" and factor != 0.5:
        assert len(scaled) < 0.75 * len(encoded(words_of(new), words_of(old)))


@pytest.mark.parametrize("name", FLOATS)
def test_a_few_other_values_do_not_hide_the_factor(name: str) -> None:
    kind = FLOATS[name]
    old = np.random.default_rng(1).standard_normal(1000).astype(kind.numbers)
    new = (old.astype(np.float64) * 0.5).astype(kind.numbers)
    bits = words_of(new).copy()
    bits[::10] = np.resize(specials(kind), 100)
    found = difference.fit(bits, words_of(old), difference.format_of(name))  # type: ignore[arg-type]
    assert found == 0.5


@pytest.mark.parametrize("name", FLOATS)
def test_values_without_a_factor_have_none(name: str) -> None:
    kind = FLOATS[name]
    form = difference.format_of(name)
    assert form is not None
    old = words_of(np.random.default_rng(1).standard_normal(1000).astype(kind.numbers))
    zeros = np.zeros_like(old)
    nan = np.full_like(old, specials(kind)[-1])
    half = (1 << (kind.exponent - 1)) - 1 << kind.mantissa
    for new, base in (
        (old, old), (zeros, old), (old, zeros), (nan, old), (old, nan), (zeros, zeros), (nan, nan),
        (old[:5], old[:5] * 0 + half), (-old, old), (old + (9 << kind.mantissa), old),
        (old - (9 << kind.mantissa), old), (old ^ WORD[kind.size].type(1 << (8 * kind.size - 1)), old),
    ):  # fmt: skip
        assert difference.fit(new.astype(WORD[kind.size]), base.astype(WORD[kind.size]), form) is None


@pytest.mark.parametrize("name", FLOATS)
def test_no_numbers_whatever_draw_a_warning(name: str) -> None:
    """numpy warns of signalling NaN that are converted, and of factors beyond float32."""
    kind = FLOATS[name]
    form = difference.format_of(name)
    assert form is not None
    pairs = [(specials(kind), np.roll(specials(kind), shift)) for shift in range(0, 300, 7)]
    patterns = specials(kind)
    pairs += [
        (np.full(500, new, WORD[kind.size]), np.full(500, old, WORD[kind.size]))
        for new, old in itertools.product(patterns[::9], patterns[::11])
    ]
    for new, old in pairs:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            factor = difference.fit(new, old, form)
            payload = encoded(new, old, name, factor)
            assert decoded(payload, old).tobytes() == new.tobytes()


def test_which_dtypes_have_exponents_and_which_can_be_multiplied() -> None:
    floats = ["float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"]
    others = ["", "int8", "uint8", "int16", "int32", "int64", "uint64", "bool", "S3", "V4", "U2"]
    assert all(map(difference.is_float, floats))
    assert not any(map(difference.is_float, others))
    sizes = {name: found.size for name in [*floats, *others] if (found := difference.format_of(name))}
    assert sizes == {"bfloat16": 2, "float32": 4, "float64": 8, "complex64": 4, "complex128": 8}


# -- where denormals are flushed to zero ----------------------------------------------------------


@contextlib.contextmanager
def flushing(on: bool = True) -> Iterator[None]:
    """Denormals are zero inside, in this thread and those it starts."""
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(on):
        pytest.skip("torch cannot flush denormals on this processor")
    try:
        assert (float(np.float32(1e-40) * np.float32(1)) == 0) == on, "arithmetic of numpy flushes too"
        yield
    finally:
        torch.set_flush_denormal(False)


def in_pool(work: Callable[[], Any]) -> Any:
    """The result from a thread that was started now."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def here(work: Callable[[], Any]) -> Any:
    return work()


def with_denormals(name: str, seed: int) -> Words:
    """A third each of denormals, of numbers that a factor makes denormal, and of others."""
    kind = FLOATS[name]
    words = numbers(name, 600, seed)
    third = len(words) // 3
    words[:third] &= WORD[kind.size].type(~(kind.top << kind.mantissa) & (1 << 8 * kind.size) - 1)
    field = (np.arange(third) % 12 << kind.mantissa).astype(words.dtype)
    words[third : 2 * third] &= WORD[kind.size].type(~(kind.top << kind.mantissa) & (1 << 8 * kind.size) - 1)
    words[third : 2 * third] |= field
    return words


@pytest.mark.parametrize("where", [here, in_pool], ids=["here", "in a new thread"])
@pytest.mark.parametrize("factor", [None, 2.0**-8, 0.9, 1.0001, 2.0**8])
@pytest.mark.parametrize("name", FLOATS)
def test_denormals_survive_where_they_are_flushed(
    name: str, factor: float | None, where: Callable[[Callable[[], Any]], Any]
) -> None:
    base, words = with_denormals(name, 1), with_denormals(name, 2)
    encode = functools.partial(encoded, words, base, name, factor)
    payload = encode()
    with flushing():
        assert where(encode) == payload
        assert where(lambda: decoded(payload, base).tobytes()) == words.tobytes()
        assert where(lambda: packed(words, True)) == packed(words, True)
    assert decoded(payload, base).tobytes() == words.tobytes()


@pytest.mark.parametrize("name", FLOATS)
def test_the_factor_is_found_alike_where_denormals_are_flushed(name: str) -> None:
    """Else the same state would be stored in other bytes by another process."""
    kind = FLOATS[name]
    form = difference.format_of(name)
    assert form is not None
    dense = np.random.default_rng(1).standard_normal(400)
    denormals = np.arange(600).astype(WORD[kind.size]) % WORD[kind.size].type(100) + WORD[kind.size].type(20)
    old = np.concatenate([denormals, words_of(dense.astype(kind.numbers))])
    decayed = old[600:].view(kind.numbers).astype(np.float64) * 0.75
    new = np.concatenate([denormals >> WORD[kind.size].type(1), words_of(decayed.astype(kind.numbers))])
    alone = difference.fit(new, old, form)
    with flushing():
        assert difference.fit(new, old, form) == alone


# -- payloads that lie ----------------------------------------------------------------------------

GUARD = 64


def attempt(payload: bytes, size: int, base: bytes, fill: int | None) -> bytes | None:
    """What a payload decodes to; None if it is refused. `fill` is what the output was full of; None puts
    the base there and decodes in place.

    Fails if anything but the output is written, or anything but ValueError raised.
    """
    room = bytearray([fill if fill is not None else 0xA5]) * (len(base) + 2 * GUARD)
    edge = bytes(room[:GUARD])
    into = memoryview(room)[GUARD : GUARD + len(base)]
    known: memoryview | bytes = base
    if fill is None:
        into[:] = base
        known = into
    try:
        difference.decode_frame(payload, into, size, known)
    except ValueError:
        found = None
    else:
        found = bytes(into)
    assert room[:GUARD] == room[GUARD + len(base) :] == edge
    return found


def judged(payload: bytes, size: int, base: bytes) -> bytes | None:
    first = attempt(payload, size, base, 0)
    other = noise(size, len(base) // size + 9)
    into = memoryview(bytearray(other.nbytes))
    difference.decode_frame(polluting(size, len(other)), into, size, other.tobytes())
    assert attempt(payload, size, base, 0xFF) == first
    assert attempt(payload, size, base, None) == first
    return first


@functools.cache
def polluting(size: int, count: int) -> bytes:
    """A payload whose decoding leaves much in scratch memory."""
    name = {2: "bfloat16", 4: "float32", 8: "float64"}.get(size)
    return encoded(noise(size, count, 1), noise(size, count), name, 0.5 if name else None)


def hostile() -> Iterator[tuple[str, int, bytes, bytes, bytes]]:
    """Small differences of every kind: name, size, payload, base, words."""
    for size in SIZES:
        for how, (words, base) in drifts(size, 40).items():
            if how in ("small steps", "a few changes", "nothing alike"):
                yield f"{how} {size}", size, encoded(words, base), base.tobytes(), words.tobytes()
    for name, kind in FLOATS.items():
        base = np.concatenate([specials(kind)[::13], numbers(name, 10)[:10]])
        for factor in (0.75, 2.0**8):
            words = predicted(base, name, factor).copy()
            words[::7] += WORD[kind.size].type(3)
            payload = encoded(words, base, name, factor)
            yield f"{name} times {factor}", kind.size, payload, base.tobytes(), words.tobytes()


HOSTILE = {name: rest for name, *rest in hostile()}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_cut_difference_is_accepted(name: str) -> None:
    size, payload, base, words = HOSTILE[name]
    assert judged(payload, size, base) == words
    for length in range(len(payload)):
        assert judged(payload[:length], size, base) is None
    for more in (b"\0", payload):
        assert judged(payload + more, size, base) is None


@pytest.mark.parametrize("name", HOSTILE)
def test_a_flipped_bit_is_refused_or_fills_the_output(name: str) -> None:
    size, payload, base, _ = HOSTILE[name]
    for bit in range(0, 8 * len(payload), 1 if len(payload) < 120 else 5):
        changed = bytearray(payload)
        changed[bit // 8] ^= 1 << bit % 8
        judged(bytes(changed), size, base)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_difference_without_its_base_is_refused(name: str) -> None:
    size, payload, base, words = HOSTILE[name]
    into = memoryview(bytearray(len(base)))
    for wrong in (None, b"", base[:-1], base[:-size], base + bytes(size), base + base):
        with pytest.raises(ValueError, match="without a base of its length"):
            difference.decode_frame(payload, into, size, wrong)
    assert into == bytes(len(base)), "nothing was written"
    for other in (0, 3, 16, *SIZES):
        if other != size:
            with contextlib.suppress(ValueError):
                difference.decode_frame(payload, into, other, base)
    difference.decode_frame(payload, into, size, base)
    assert into == words


@pytest.mark.parametrize("name", FLOATS)
def test_impossible_factors_are_refused(name: str) -> None:
    kind = FLOATS[name]
    base = numbers(name, 20).tobytes()
    nothing = packed(np.zeros(len(base) // kind.size, WORD[kind.size]))
    for factor in (2.0**-8, 2.0**8, 1.0, 0.1, math.nextafter(2.0**-8, 1), math.nextafter(2.0**8, 1)):
        assert judged(scaled_payload(kind.code, factor, nothing), kind.size, base) is not None
    for factor in (
        math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, -0.5, 5e-324, 1e300, 1e-300, 2.0**9, 2.0**-9,
        math.nextafter(2.0**-8, 0), math.nextafter(2.0**8, 1e9),
    ):  # fmt: skip
        assert judged(scaled_payload(kind.code, factor, nothing), kind.size, base) is None, factor
    signalling = struct.pack("<BBQ", SCALED, kind.code, 0x7FF0_0000_0000_0001) + nothing
    assert judged(signalling, kind.size, base) is None
    for code in range(256):
        found = judged(scaled_payload(code, 0.5, nothing), kind.size, base)
        assert (found is not None) == (code == kind.code), "a format of another size, or of none"
    for predictor in range(2, 256):
        assert judged(bytes([predictor]) + nothing, kind.size, base) is None
        assert (
            judged(bytes([predictor]) + scaled_payload(kind.code, 0.5, nothing)[1:], kind.size, base) is None
        )


def test_bytes_have_no_factor() -> None:
    nothing = packed(np.zeros(10, np.uint8))
    for code in range(256):
        assert judged(scaled_payload(code, 0.5, nothing), 1, bytes(10)) is None


def test_no_small_difference_takes_much_memory() -> None:
    chance = random.Random(5)
    for size, payload, base, _ in HOSTILE.values():
        for _ in range(15):
            changed = bytearray(payload)
            for _ in range(chance.randint(1, 4)):
                changed[chance.randrange(len(changed))] = chance.choice([0, 1, 0x7F, 0xFF])
            tracemalloc.start()
            attempt(bytes(changed), size, base, 0)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 1 << 20, changed.hex()


def test_the_registry_says_where_a_difference_is_damaged() -> None:
    for size, payload, base, words in HOSTILE.values():
        into = memoryview(bytearray(base))
        codec.decode(codec.DIFFERENCE, payload, into, size, into, "a pack at 7")
        assert into == words
        for wrong, below in ((payload[:-1], base), (b"", base), (b"\2" + payload[1:], base), (payload, None)):
            with pytest.raises(CorruptionError, match="a pack at 7: the stored bytes cannot be decoded"):
                codec.decode(codec.DIFFERENCE, wrong, into, size, below, "a pack at 7")
