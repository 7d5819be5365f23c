"""Which way to store a chunk: by trial on a sample, with what was found for its like tried first.

Three levels trade size against time (docs/benchmarks.md has the figures that decided them):

- `fast`: no chunk needs another one to be read.
- `balanced`: chunks are differences against the parent's where that pays, one step deep.
- `small`: whatever is smallest, chains as deep as the format allows.

How deep a chain grows. A chunk whose parent's chunk is less deep than the level allows becomes a difference
against that. At full depth it becomes a difference against what the parent's chunk is a difference against:
its sibling. Siblings grow, since training moves away from what they share. When one is larger than the mean
of all since their base, base included, going on would raise that mean: then the base of the base takes its
place, or nothing, which starts anew.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final, NamedTuple

import numpy as np

from ckptvcs.errors import CkptError
from ckptvcs.ids import Buffer, Kind, ObjectId
from ckptvcs.store import codec, difference, entropy, planes
from ckptvcs.store.codec import DIFFERENCE, PLANES, RAW, ZSTD
from ckptvcs.store.hints import Hint
from ckptvcs.store.index import Index, Row
from ckptvcs.store.packs import Frame, make_frame
from ckptvcs.store.planes import Words, scratch
from ckptvcs.store.reader import Reader


class Level(NamedTuple):
    """What a compression level may do.

    Attributes:
        depth: frames below a difference, at most.
        gain: a difference is taken if it leaves at most this share of what the chunk takes by itself.
        thorough: try every way, however slow.
    """

    depth: int
    gain: float
    thorough: bool


LEVELS: Final = {
    "fast": Level(depth=0, gain=0.0, thorough=False),
    "balanced": Level(depth=1, gain=0.9, thorough=False),
    "small": Level(depth=8, gain=0.995, thorough=True),
}

_SMALL: Final = 512
"""Chunks below so many bytes are not split into planes."""
_WHOLE: Final = 32 << 10
"""Chunks up to this size are tried as a whole, larger ones by a sample of about this size."""
_SLICES: Final = 4
_WORTHWHILE: Final = 0.98
_LITTLE: Final = 8 << 10
"""Chunks below so many bytes are no differences, unless everything is tried: a base is a read more."""
_SLOWER: Final = 0.95
_AGAIN: Final = 16
"""Every so many chunks of a kind, all ways are tried again."""
_ALIKE: Final = 1.1
"""So are they when a difference takes more than this times the share that its like took."""


class Way(NamedTuple):
    """A way to store a chunk.

    Attributes:
        codec: its number.
        size: bytes of a number, for the codecs that know numbers.
        rotated, layout: of planes; a layout of None is found from the numbers.
        scaled: whether a difference is against the base times a factor.
    """

    codec: int
    size: int = 1
    rotated: bool = False
    scaled: bool = False
    layout: int | None = None


_DEFLATED: Final = Way(ZSTD)


class _Remembered:
    """The way that suited a tensor's last chunk, the share of it that was left, and whether there was a
    base to choose."""

    __slots__ = ("based", "share", "uses", "way")

    def __init__(self, way: Way, share: float, based: bool) -> None:
        self.way = way
        self.share = share
        self.based = based
        self.uses = 0


class Memory:
    """What was found to suit which tensor, and how siblings grow. Shared by all commits of an open store;
    losing it costs trials and some size, nothing else."""

    def __init__(self) -> None:
        self.ways: dict[Hashable, _Remembered] = {}
        self.unchanged: set[Hashable] = set()
        """Tensors whose last chunk was stored already."""
        self.cycles: dict[ObjectId, tuple[int, int]] = {}
        """Frames since a base and their bytes, the base included."""


class _Base(NamedTuple):
    """A chunk to be a difference against, and at full depth the parent's chunk, which is one already."""

    id: ObjectId
    row: Row
    sibling: Row | None


class _Chunk:
    """A chunk to be stored, and what it may be a difference against, read when it is first wanted."""

    def __init__(self, raw: memoryview, hint: Hint, reader: Reader, base: _Base | None) -> None:
        self.raw = raw
        self.hint = hint
        self.base = base
        self._reader = reader
        self._known: memoryview | None = None

    def words(self, size: int) -> Words:
        """The chunk as numbers."""
        return planes.words_of(self.raw, size)

    def known(self, size: int) -> Words | None:
        """The base as numbers; None if it cannot be read."""
        if self.base is not None and self._known is None:
            memory = scratch.array("base", np.uint8, len(self.raw)).data
            try:
                self._reader.read_parts([(self.base.id, memory)])
                self._known = memory
            except CkptError:  # damaged, or collected meanwhile: the chunk is stored for itself
                self.base = None
        return None if self._known is None else planes.words_of(self._known, size)

    def against(self, base: _Base | None) -> _Chunk:
        """The same chunk with another base."""
        return _Chunk(self.raw, self.hint, self._reader, base)


class Chooser:
    """Makes the frames of one commit. Thread-safe."""

    def __init__(self, level: Level, memory: Memory, index: Index, reader: Reader) -> None:
        self._level = level
        self.memory = memory
        self._index = index
        self._reader = reader

    def frame(
        self,
        id: ObjectId,
        raw: memoryview,
        element_size: int,
        hint: Hint,
        base: ObjectId | None,
        *,
        however_deep: bool = False,
    ) -> Frame:
        """The frame of a chunk. `base` is a stored chunk that it may differ little from.

        `raw` is not kept. With `however_deep` the base is taken whatever its own chain is.
        """
        worth_a_base = self._level.depth and len(raw) >= (_SMALL if self._level.thorough else _LITTLE)
        found = self._base(base, len(raw), however_deep) if base is not None and worth_a_base else None
        chunk = _Chunk(raw, hint, self._reader, found)
        way, payload = self._encoded(chunk, self._plain_ways(len(raw), element_size, hint.numbers))
        if way.codec == DIFFERENCE and chunk.base is not None and chunk.base.sibling is not None:
            chunk, way, payload = self._in_cycle(chunk, element_size, way, payload)
        if len(payload) >= _WORTHWHILE * len(raw):
            way, payload = Way(RAW), bytes(raw)
        against = chunk.base.id if way.codec == DIFFERENCE and chunk.base is not None else None
        size = way.size if way.codec in (PLANES, DIFFERENCE) else element_size
        return make_frame(Kind.CHUNK, id, way.codec, size, len(raw), payload, against)

    @staticmethod
    def copy(raw: Buffer, into: memoryview) -> None:
        """Copy a chunk. Other threads go on meanwhile."""
        planes.copied(raw, into)

    # -- choosing --------------------------------------------------------------------------------

    def _encoded(self, chunk: _Chunk, plain: Sequence[Way]) -> tuple[Way, Buffer]:
        """The chunk in the way that suited its like, or that a trial finds best."""
        key = chunk.hint.key
        based = chunk.base is not None
        remembered = self.memory.ways.get(key) if key is not None else None
        guess: tuple[Way, Buffer | None] | None = None
        fits = remembered is not None and len(chunk.raw) % remembered.way.size == 0
        if remembered is not None and fits and remembered.based == based and not self._level.thorough:
            remembered.uses += 1
            if remembered.uses % _AGAIN:
                way = remembered.way
                payload = _encode(chunk, way)
                # A difference that turns out large may be worse than none. Without one there is nothing
                # to be seen from the size: a tensor has parts that take more and parts that take less.
                if payload is not None and (
                    way.codec != DIFFERENCE or len(payload) <= _ALIKE * remembered.share * len(chunk.raw)
                ):
                    return way, payload
                guess = way, payload
        way, payload = self._tried(chunk, plain, guess)
        based = chunk.base is not None  # or it turned out unreadable
        if key is not None:
            self.memory.ways[key] = _Remembered(_settled(way, payload), len(payload) / len(chunk.raw), based)
        return way, payload

    def _tried(
        self, chunk: _Chunk, plain: Sequence[Way], done: tuple[Way, Buffer | None] | None = None
    ) -> tuple[Way, Buffer]:
        """The chunk in the way that a trial finds best, among those that are open to it. `done` is a way in
        which it is encoded already."""
        for way in self._trial(chunk, plain):
            same = done is not None and done[0]._replace(layout=None) == way
            payload = done[1] if done is not None and same else _encode(chunk, way)
            if payload is not None:
                return way, payload
        return Way(RAW), bytes(chunk.raw)

    def _trial(self, chunk: _Chunk, plain: Sequence[Way]) -> list[Way]:
        """The ways that are best for a sample of the chunk, the very best first."""
        if len(plain) == 1 and chunk.base is None:
            return list(plain)
        sizes = {way: _size_of_sample(chunk, way) for way in plain}
        found = sorted(plain, key=sizes.__getitem__)
        planar = next((way for way in found if way.codec == PLANES), None)
        # Bytes of a file that deflate best are no numbers.
        if chunk.base is not None and planar is not None and (planar is found[0] or chunk.hint.numbers):
            most = self._level.gain * sizes[found[0]]
            for way in _difference_ways(planar.size, chunk.hint.numbers, self._level.thorough):
                left = _size_of_sample(chunk, way)
                if left <= most:
                    found.insert(0, way)
                    # The next way is slower to read, and must be worth it.
                    most = left * (1.0 if self._level.thorough else _SLOWER)
        return found

    def _plain_ways(self, length: int, size: int, numbers: str) -> list[Way]:
        """Ways that need no base."""
        few = length < (_SMALL if self._level.thorough else 4 * _SMALL)
        if few or size not in planes.WORD or length % size:
            return [_DEFLATED]
        if difference.is_float(numbers):
            # Turning four-byte numbers leaves 0.3 % less and costs a tenth of the time; two-byte ones 0.8 %.
            return [Way(PLANES, size, rotated=size == 2 or self._level.thorough)]
        if numbers:
            return [Way(PLANES, size), _DEFLATED]
        # Bytes of a file, which may be full of numbers.
        guesses = [Way(PLANES, guess, rotated=True) for guess in (4, 2) if length % guess == 0]
        return [_DEFLATED, *guesses]

    # -- bases -----------------------------------------------------------------------------------

    def _base(self, id: ObjectId, length: int, however_deep: bool) -> _Base | None:
        """What a chunk whose parent's chunk is `id` may be a difference against."""
        with self._index.snapshot() as snapshot:
            row = snapshot.live(id)
            if row is None or row.kind is not Kind.CHUNK or row.raw != length:
                return None
            if however_deep or row.depth < self._level.depth:
                return _Base(id, row, None)
            # At full depth, or beyond it after a change of level: as deep as a sibling.
            sibling = row
            for _ in range(row.depth - self._level.depth + 1):
                if row.base is None:
                    return None
                sibling, id = row, row.base
                above = snapshot.live(id)
                if above is None:
                    return None
                row = above
            return _Base(id, row, sibling)

    def _in_cycle(
        self, chunk: _Chunk, element_size: int, way: Way, payload: Buffer
    ) -> tuple[_Chunk, Way, Buffer]:
        """A sibling, or a frame one step less deep when siblings have grown too large."""
        base = chunk.base
        assert base is not None
        assert base.sibling is not None
        first = (2, base.row.stored + base.sibling.stored)
        count, total = self.memory.cycles.get(base.id, first)
        if len(payload) * count <= total:
            self.memory.cycles[base.id] = count + 1, total + len(payload)
            return chunk, way, payload
        self.memory.cycles.pop(base.id, None)
        above = None
        if base.row.base is not None:
            with self._index.snapshot() as snapshot:
                row = snapshot.live(base.row.base)
            above = None if row is None else _Base(base.row.base, row, None)
        renewed = chunk.against(above)
        plain = self._plain_ways(len(chunk.raw), element_size, chunk.hint.numbers)
        return (renewed, *self._tried(renewed, plain))


# -- ways -----------------------------------------------------------------------------------------


def _difference_ways(size: int, numbers: str, thorough: bool) -> list[Way]:
    """Ways that need a base."""
    ways = [Way(DIFFERENCE, size)]
    if difference.format_of(numbers) is not None and (size > 2 or thorough):
        ways.append(Way(DIFFERENCE, size, scaled=True))
    return ways


def _settled(way: Way, payload: Buffer) -> Way:
    """The way with the layout that was found for its planes."""
    if way.codec == PLANES:
        return way._replace(layout=planes.layout_of(payload))
    if way.codec == DIFFERENCE:
        return way._replace(layout=difference.layout_of(payload))
    return way


def _size_of_sample(chunk: _Chunk, way: Way) -> float:
    """Bytes that a sample of the chunk takes, from all over it; the whole chunk if it is small."""
    count = len(chunk.raw) // way.size
    most = _WHOLE // way.size
    step = count // _SLICES
    pieces = [slice(0, count)]
    if count > most:
        pieces = [slice(at * step, at * step + most // _SLICES) for at in range(_SLICES)]
    words = chunk.words(way.size) if way.codec != ZSTD else planes.words_of(chunk.raw, 1)
    sample = words if len(pieces) == 1 else np.concatenate([words[piece] for piece in pieces])
    if way.codec == ZSTD:
        return len(entropy.deflate(sample.data))
    if way.codec == PLANES:
        return len(planes.encode(sample, way.rotated, way.layout))
    known = chunk.known(way.size)
    if known is None:
        return float("inf")
    base = known if len(pieces) == 1 else np.concatenate([known[piece] for piece in pieces])
    payload = _difference(sample, base, way, chunk.hint.numbers)
    return float("inf") if payload is None else len(payload)


def _encode(chunk: _Chunk, way: Way) -> Buffer | None:
    """The chunk in a way; None if that way is not open to it."""
    if way.codec == RAW:
        return bytes(chunk.raw)
    if way.codec == ZSTD:
        return codec.deflate(chunk.raw)
    words = chunk.words(way.size)
    if way.codec == PLANES:
        return planes.encode(words, way.rotated, way.layout)
    known = chunk.known(way.size)
    if known is None:
        return None
    payload = _difference(words, known, way, chunk.hint.numbers)
    if payload is not None and way.scaled:
        # A product that came out otherwise than on other machines must never be stored.
        check = scratch.array("check", words.dtype, len(words))
        difference.decode_frame(payload, check.data.cast("B"), way.size, known.data.cast("B"))
        if not np.array_equal(check, words):
            return None
    return payload


def _difference(words: Words, base: Words, way: Way, numbers: str) -> Buffer | None:
    if not way.scaled:
        return difference.encode(words, base, layout=way.layout)
    kind = difference.format_of(numbers)
    factor = None if kind is None else difference.fit(words, base, kind)
    return None if factor is None else difference.encode(words, base, factor, kind, way.layout)
