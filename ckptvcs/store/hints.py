"""What a caller may say about content to have it stored smaller. It changes sizes, never what comes back."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

from ckptvcs.ids import ObjectId


class Hint(NamedTuple):
    """A hint for one source.

    Attributes:
        key: sources of equal keys are alike, in this commit or another of the same store, so what was found
            to suit one is tried first on the next. None for a source that is like no other.
        numbers: the dtype's name, for codecs that calculate with values; "" for bytes without such meaning.
        base: a stored chunk, as long as the cell at an offset, from which that cell may differ little; None
            if there is none. Called from several threads, and only for cells that have to be stored.
    """

    key: Hashable = None
    numbers: str = ""
    base: Callable[[int], ObjectId | None] | None = None
