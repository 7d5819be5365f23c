"""What the writers of checkpoint files are given: tensors whose bytes come in pieces, and where bytes go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from ckptvcs.ids import Buffer

Pieces: TypeAlias = Callable[[], Iterator[Buffer]]
"""Bytes from front to back, some MiB at a time. A piece is used up before the next is asked for."""

Sink: TypeAlias = Callable[[Buffer], None]
"""Takes the next bytes of a file."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A tensor to be written, in C order and little endian.

    Attributes:
        name: what it is called in the file.
        dtype: the stored name of its dtype, such as "bfloat16".
        shape: length of each dimension.
        item: bytes per element.
        pieces: gives its bytes, `nbytes` in all; called once per writing.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    item: int
    pieces: Pieces

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.item
