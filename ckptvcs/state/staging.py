"""Copying a prepared tree's content into memory that another process reads, so that the state may go on.

Each save lays its sources out one behind the other, from the start, in the order of the tree. The memory is
used again by the next save, which finds it warm: fresh memory costs a page fault every 4 KiB.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from ckptvcs.state.interface import Source
from ckptvcs.state.tensors import ArraySource, Raw
from ckptvcs.state.torch_devices import DeviceSource
from ckptvcs.state.tree import Prepared

ALIGNMENT: Final = 256
"""Every source starts at a multiple of this many bytes."""

_PIECE: Final = 8 << 20
"""Bytes that a thread copies at a time."""


class Spot(NamedTuple):
    """Where a source's bytes lie in the memory."""

    offset: int
    nbytes: int
    element_size: int


Layout: TypeAlias = list[tuple[Source, Spot]]
"""The sources of a tree, in the order of its contents. Those of the same memory share a spot."""


class _Piece(NamedTuple):
    source: Source
    offset: int
    target: int
    length: int


def sources(prepared: Prepared) -> Iterator[Source]:
    """All sources of a tree, in order."""
    for contents in prepared.contents.values():
        for _, content in contents:
            yield from content.sources


def arranged(prepared: Prepared) -> tuple[Layout, int]:
    """Where each source will lie, and the bytes that takes in all."""
    layout: Layout = []
    taken: dict[Hashable, int] = {}
    end = 0
    for source in sources(prepared):
        memory = source.memory if isinstance(source, ArraySource) else id(source)
        start = taken.setdefault(memory, end)
        layout.append((source, Spot(start, source.nbytes, source.element_size)))
        if start == end:
            end += -(-source.nbytes // ALIGNMENT) * ALIGNMENT
    return layout, end


class Staging:
    """Fills memory with the content of one tree after another.

    Attributes:
        copied: bytes that the last `fill` copied; the others stood there already.
    """

    def __init__(self, threads: int, cell: int) -> None:
        """Sources other than arrays are read by cells of the grid, as a writer reads them."""
        self.copied = 0
        self._threads = threads
        self._cell = cell
        # By where it lies, the witness of what was copied there last.
        self._standing: dict[tuple[int, int], Hashable] = {}

    def fill(self, memory: memoryview, layout: Layout) -> None:
        """Copy all sources to their spots. When it returns, the memory behind them may change.

        A source whose witness is that of what lies at its spot is left out.
        """
        standing, self._standing = self._standing, {}  # whatever happens on the way: no longer true
        whole = np.frombuffer(memory, np.uint8)
        fresh: dict[tuple[int, int], Hashable] = {}
        todo: dict[int, tuple[Source, Spot]] = {}
        for source, spot in layout:
            place = spot.offset, spot.nbytes
            witness = source.witness if isinstance(source, (ArraySource, DeviceSource)) else None
            if witness is not None:
                fresh[place] = witness
            if witness is None or standing.get(place) != witness:
                todo.setdefault(spot.offset, (source, spot))
        tasks = list(_tasks(todo.values(), self._cell))
        self.copied = sum(piece.length for task in tasks for piece in task)

        def copy(task: list[_Piece]) -> None:
            for source, offset, target, length in task:
                _copy(source, offset, whole[target : target + length])

        _in_threads(copy, tasks, self._threads)
        self._standing = fresh


def _tasks(todo: Iterable[tuple[Source, Spot]], cell: int) -> Iterator[list[_Piece]]:
    """Pieces in groups of about as many bytes, so that no thread has much more to do than another."""
    task: list[_Piece] = []
    size = 0
    for source, spot in todo:
        step = max(_PIECE // source.item, 1) * source.item if isinstance(source, ArraySource) else cell
        for at in range(0, spot.nbytes, step):
            length = min(step, spot.nbytes - at)
            if size and size + length > _PIECE:
                yield task
                task, size = [], 0
            task.append(_Piece(source, at, spot.offset + at, length))
            size += length
    if task:
        yield task


def _copy(source: Source, offset: int, out: Raw) -> None:
    if isinstance(source, ArraySource):
        source.fill(out, offset)
    else:
        out[:] = np.frombuffer(source.read(offset, len(out)), np.uint8)


def _in_threads(copy: Callable[[list[_Piece]], None], tasks: list[list[_Piece]], threads: int) -> None:
    threads = min(threads, len(tasks))
    if threads < 2:
        for task in tasks:
            copy(task)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="ckptvcs-copy") as pool:
        for _ in pool.map(copy, tasks):
            pass
