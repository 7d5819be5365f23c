"""ckptvcs: version control for training state.

    import ckptvcs

    repo = ckptvcs.Repo.open("runs", branch="main", create=True)
    repo.commit({"model": model, "optimizer": optimizer}, "epoch 1", step=100, metrics={"val_loss": 0.3})
    state = repo.checkout("main@best:val_loss")

Importing this package imports no framework and no numpy; they come with the first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ckptvcs import rng
    from ckptvcs.background import PendingCommit
    from ckptvcs.errors import (
        AmbiguousError,
        CkptError,
        ConflictError,
        CorruptionError,
        DroppedError,
        ExistsError,
        FormatError,
        InvalidError,
        LineageError,
        LockedError,
        MergeConflictError,
        NoRepositoryError,
        NotFoundError,
        StateMismatchError,
        StorageError,
        UnsupportedStateError,
    )
    from ckptvcs.history.commit import Commit
    from ckptvcs.ids import ObjectId
    from ckptvcs.repo import Repo, Restored

__all__ = [
    "AmbiguousError",
    "CkptError",
    "Commit",
    "ConflictError",
    "CorruptionError",
    "DroppedError",
    "ExistsError",
    "FormatError",
    "InvalidError",
    "LineageError",
    "LockedError",
    "MergeConflictError",
    "NoRepositoryError",
    "NotFoundError",
    "ObjectId",
    "PendingCommit",
    "Repo",
    "Restored",
    "StateMismatchError",
    "StorageError",
    "UnsupportedStateError",
    "rng",
]

_HOMES = {
    "Commit": "ckptvcs.history.commit",
    "ObjectId": "ckptvcs.ids",
    "PendingCommit": "ckptvcs.background",
    "Repo": "ckptvcs.repo",
    "Restored": "ckptvcs.repo",
}

_MODULES = ("rng",)


def __getattr__(name: str) -> Any:
    # Names are imported on first use, so that `ckpt --version` and error handling stay cheap.
    if name not in __all__:
        raise AttributeError(f"module 'ckptvcs' has no attribute {name!r}")
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"ckptvcs.{name}")  # which also makes it an attribute
    value = getattr(import_module(_HOMES.get(name, "ckptvcs.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
