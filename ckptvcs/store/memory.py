"""Memory that a thread uses again and again: fresh memory costs a page fault every 4 KiB."""

from __future__ import annotations

import threading
from typing import Final

_MOST: Final = 4 << 20
"""What a thread keeps; more is given, and let go with its last view."""


class Reused(threading.local):
    """Bytes of any content, one buffer for each thread."""

    def __init__(self) -> None:
        self._held = bytearray()

    def of(self, size: int) -> memoryview:
        """`size` bytes, the thread's own until it asks again."""
        if size > _MOST:
            return memoryview(bytearray(size))
        if size > len(self._held):
            self._held = bytearray(size)
        return memoryview(self._held)[:size]
