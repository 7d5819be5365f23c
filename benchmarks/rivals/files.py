"""Files that several tools need written durably, and their sizes."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Syncer:
    """Forces to disk what a tool that does not sync has written since the last call."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, int] = {}

    def sync(self) -> None:
        for path in (self._folder, *self._folder.rglob("*")):
            try:
                written = path.stat().st_mtime_ns
            except FileNotFoundError:  # a temporary file of the tool
                continue
            if self._seen.get(str(path)) != written:
                self._seen[str(path)] = written
                sync(path)


def folder_bytes(folder: Path) -> int:
    """Apparent bytes of all files below a folder, each file once however many names it has."""
    seen = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            facts = path.stat()
            seen[facts.st_dev, facts.st_ino] = facts.st_size
    return sum(seen.values())
