"""Inputs from inputs: the same seed gives the same bytes on every machine."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Final

_NUMBERS: Final = (0, 1, 2, 7, 8, 0x1F, 0x20, 0x7F, 0x80, 0xBF, 0xC0, 0xFF, 0x7FFF, 0x8000, 0xFFFF)
_LARGE: Final = (
    1 << 20,
    1 << 26,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
_LONGEST: Final = 1 << 16


def mutations(seeds: Sequence[bytes], seed: int, count: int) -> Iterator[bytes]:
    """`count` inputs, each from one seed, or two, by a few edits."""
    chance = random.Random(seed)
    for _ in range(count):
        data = bytearray(chance.choice(seeds))
        for _ in range(1 << chance.randrange(4)):
            _edit(data, chance, seeds)
        yield bytes(data[:_LONGEST])


def _edit(data: bytearray, chance: random.Random, seeds: Sequence[bytes]) -> None:
    at = chance.randrange(len(data) + 1)
    end = min(len(data), at + chance.choice((1, 1, 2, 4, 8, 33, 100)))
    match chance.randrange(9):
        case 0 if at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        case 1 if at < len(data):
            data[at] = chance.choice((chance.randrange(256), *(number & 0xFF for number in _NUMBERS)))
        case 2:
            width = chance.choice((1, 2, 4, 8))
            number = chance.choice(_NUMBERS + _LARGE) & ((1 << 8 * width) - 1)
            data[at : at + width] = number.to_bytes(width, chance.choice(("little", "big")))
        case 3:
            del data[at:end]
        case 4:
            data[at:at] = data[at:end] * chance.choice((1, 1, 2, 16))
        case 5:
            other = chance.choice(seeds)
            start = chance.randrange(len(other) + 1)
            data[at : chance.choice((at, end))] = other[start : start + chance.choice((1, 4, 33, 100, 1000))]
        case 6:
            data[at:at] = chance.randbytes(chance.choice((1, 2, 4, 16)))
        case 7 if at < len(data):
            data[at] = (data[at] + chance.choice((-1, 1, 16, -16))) & 0xFF
        case _:
            other = chance.choice(seeds)
            data[at:] = other[chance.randrange(len(other) + 1) :]
