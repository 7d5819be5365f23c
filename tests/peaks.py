"""How much memory a script needs: text to put in front of one that a test runs in a process of its own."""

from __future__ import annotations

from typing import Final

PEAK: Final = '''
import resource, sys
from pathlib import Path


def peak():
    """The most bytes that this program has had in memory. (`ru_maxrss` begins with what the process had that
    started it, so behind a large test it would measure nothing.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


'''
