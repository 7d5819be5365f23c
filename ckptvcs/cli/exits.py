"""What a `ckpt` process ends with: one table, which the documentation prints too."""

from __future__ import annotations

import enum

from ckptvcs import errors


class Exit(enum.IntEnum):
    """Exit codes. Scripts rely on them: numbers are never given another meaning."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    PARTLY = 3
    NOT_FOUND = 4
    NO_REPOSITORY = 10
    LOCKED = 11
    CONFLICT = 12
    CORRUPTION = 13
    FORMAT = 14
    STORAGE = 15
    INTERRUPTED = 130


MEANING = {
    Exit.DONE: "Done.",
    Exit.UNEXPECTED: "Unexpected error: a bug, or something no other code stands for. `CKPT_DEBUG=1` shows "
    "the traceback.",
    Exit.USAGE: "The command line or its input cannot mean anything here: an unknown option, a bad name, an "
    "ambiguous id, a name that is taken.",
    Exit.PARTLY: "Partly done: some of it worked, the rest is listed on standard error.",
    Exit.NOT_FOUND: "A revision, branch, tag, path or setting that does not exist.",
    Exit.NO_REPOSITORY: "There is no repository here or above.",
    Exit.LOCKED: "Another process holds a lock that this needs.",
    Exit.CONFLICT: "Somebody else moved the branch, HEAD is detached, or changed files would be overwritten.",
    Exit.CORRUPTION: "Stored bytes are not what was written, or `fsck` found problems.",
    Exit.FORMAT: "The repository needs a newer ckptvcs.",
    Exit.STORAGE: "The file system refused: disk full, over quota, read-only, no permission, I/O error.",
    Exit.INTERRUPTED: "Interrupted (Ctrl-C).",
}

_BY_ERROR: tuple[tuple[type[BaseException], Exit], ...] = (
    (errors.NoRepositoryError, Exit.NO_REPOSITORY),
    (errors.NotFoundError, Exit.NOT_FOUND),
    (errors.ExistsError, Exit.USAGE),
    (errors.InvalidError, Exit.USAGE),
    (errors.ConflictError, Exit.CONFLICT),
    (errors.LockedError, Exit.LOCKED),
    (errors.CorruptionError, Exit.CORRUPTION),
    (errors.FormatError, Exit.FORMAT),
    (errors.StorageError, Exit.STORAGE),
    (errors.CkptError, Exit.UNEXPECTED),
    (OSError, Exit.STORAGE),
)


def exit_of(error: BaseException) -> Exit:
    """The exit code for an error."""
    return next((code for kind, code in _BY_ERROR if isinstance(error, kind)), Exit.UNEXPECTED)
