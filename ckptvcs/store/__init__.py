"""The content-addressed store: bytes in, ids out. Knows no tensor names and reads no commit."""

from __future__ import annotations

from ckptvcs.store.claims import Claim
from ckptvcs.store.format import Grid
from ckptvcs.store.index import Change, Row, Snapshot
from ckptvcs.store.journal import (
    Drop,
    Expire,
    Fork,
    LogEntry,
    Move,
    Note,
    Operation,
    Pin,
    Status,
    Target,
)
from ckptvcs.store.reader import Reader
from ckptvcs.store.store import Store
from ckptvcs.store.writer import Publication, Source, Tally, Writer

__all__ = [
    "Change",
    "Claim",
    "Drop",
    "Expire",
    "Fork",
    "Grid",
    "LogEntry",
    "Move",
    "Note",
    "Operation",
    "Pin",
    "Publication",
    "Reader",
    "Row",
    "Snapshot",
    "Source",
    "Status",
    "Store",
    "Tally",
    "Target",
    "Writer",
]
