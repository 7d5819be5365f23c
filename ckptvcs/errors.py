"""Every error ckptvcs raises on purpose, sorted by what the caller does next.

    CkptError
    ├── NotFoundError (KeyError)          name something that exists
    │   ├── NoRepositoryError             run `ckpt init`, or point CKPT_REPO at a repository
    │   └── DroppedError                  take the nearest commit that has it; retention took this one's
    ├── ExistsError (FileExistsError)     choose another name, or open what is there
    ├── InvalidError (ValueError)         mend the input
    │   ├── AmbiguousError                give more of the id
    │   ├── MergeConflictError            choose a side for each of the listed places
    │   ├── UnsupportedStateError         take the listed leaves out of the state
    │   └── StateMismatchError            mend the names, or restore with strict=False
    ├── ConflictError                     somebody moved the ref: look, then retry or branch
    │   └── LineageError                  say which branch the commit belongs to
    ├── LockedError                       wait, or see who holds it
    ├── CorruptionError                   run `ckpt fsck --full`; carries path, offset and id
    ├── FormatError                       use a newer ckptvcs
    └── StorageError (OSError)            free space, mend permissions, look at the disk

Each error has a one-line message that names the thing, a stable `code` (append-only: scripts
compare it), an optional `hint` that says what to do, and survives pickling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class CkptError(Exception):
    """Base of all errors raised on purpose. `str(error)` is one line without the hint."""

    code = "error"

    def __init__(self, message: str, *, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint is not None:
            self.add_note(f"hint: {hint}")  # shown below a traceback
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self.__dict__))


def _rebuild(kind: type[CkptError], attributes: dict[str, Any]) -> CkptError:
    error = kind.__new__(kind, attributes["message"])
    Exception.__init__(error, attributes["message"])
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


class NotFoundError(CkptError, KeyError):
    """A revision, ref, path or tensor that does not exist. The hint lists near names."""

    code = "not-found"


class NoRepositoryError(NotFoundError):
    """There is no repository at, or above, the given place."""

    code = "no-repository"


class DroppedError(NotFoundError):
    """Retention took this content from the commit; its message, metrics and lineage are still there.

    `commit` is the commit's id, `names` are the components asked for that were taken (all of it if empty),
    and `nearest` is the id of the nearest commit along the line that has them; None if there is none.
    """

    code = "dropped"

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        commit: str = "",
        names: Sequence[str] = (),
        nearest: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.commit, self.names, self.nearest = commit, tuple(names), nearest


class ExistsError(CkptError, FileExistsError):
    """The thing to be made is already there."""

    code = "exists"


class InvalidError(CkptError, ValueError):
    """The input cannot mean anything here: a bad ref name, an unknown setting, a wrong type."""

    code = "invalid"


class AmbiguousError(InvalidError):
    """An id prefix that fits several commits."""

    code = "ambiguous"


class UnsupportedStateError(InvalidError):
    """Leaves that cannot be stored, or exported, without pickle, all of them. `leaves` holds (path, why)
    pairs."""

    code = "unsupported-leaf"

    def __init__(
        self,
        leaves: Sequence[tuple[str, str]],
        done: str = "stored",
        hint: str = "convert them to tensors, numbers, text or containers of these, or leave them out; "
        "ckptvcs never pickles",
    ) -> None:
        self.leaves = tuple(leaves)
        listed = "; ".join(f"{path or '(the state itself)'}: {why}" for path, why in self.leaves)
        super().__init__(f"{len(self.leaves)} value(s) cannot be {done}: {listed}", hint=hint)


class StateMismatchError(InvalidError):
    """`restore` found names that are missing, unexpected or of another shape or dtype, before it changed
    anything; or, in `altered`, what `load_state_dict` of an object did not keep as it was stored."""

    code = "state-mismatch"

    def __init__(
        self,
        missing: Sequence[str],
        unexpected: Sequence[str],
        mismatched: Sequence[str],
        *,
        altered: Sequence[str] = (),
        near: str = "",
    ) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)
        self.altered = tuple(altered)
        parts = [
            f"{title}: {', '.join(names)}"
            for title, names in (
                ("missing in the commit", self.missing),
                ("without a place in the target", self.unexpected),
                ("of another shape, dtype or kind", self.mismatched),
                ("other than stored once loaded", self.altered),
            )
            if names
        ]
        if self.altered:
            message = "the state was filled, and objects changed what they were given; "
            hint = "strict=False accepts that and lists it in the result's .altered"
        else:
            message = "the commit does not fit the state to be filled; "
            hint = "restore(..., only=...), rename={old: new} or strict=False restore what does fit"
        super().__init__(message + "; ".join(parts), hint=f"{near}; {hint}" if near else hint)


class MergeConflictError(InvalidError):
    """Places at which states cannot be merged by a formula, all of them, as (path, why) pairs in `conflicts`.
    Nothing was written."""

    code = "merge-conflict"

    def __init__(self, conflicts: Sequence[tuple[str, str]]) -> None:
        self.conflicts = tuple(conflicts)
        listed = "; ".join(f"{path or '(the state itself)'}: {why}" for path, why in self.conflicts)
        super().__init__(
            f"{len(self.conflicts)} conflict(s): {listed}",
            hint="choose a side by pattern with ours= or theirs= (`--ours`, `--theirs`), for the rest with "
            "prefer= (`--prefer ours`), or merge a part with only= (`--only model`)",
        )


class ConflictError(CkptError):
    """A ref is not where this handle last saw it. `rescued` names the ref that keeps the lost commit."""

    code = "conflict"

    def __init__(self, message: str, *, hint: str | None = None, rescued: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.rescued = rescued


class LineageError(ConflictError):
    """The commit would record a parent that the state does not come from."""

    code = "lineage"


class LockedError(CkptError):
    """Another process holds a lock this operation needs."""

    code = "locked"


class CorruptionError(CkptError):
    """Stored bytes are not what was written. Nothing of them is returned."""

    code = "corruption"

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = "run `ckpt fsck --full` to see what is affected",
        path: str | None = None,
        offset: int | None = None,
        id: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.path, self.offset, self.id = path, offset, id


class FormatError(CkptError):
    """The repository uses a format version or feature this program does not know."""

    code = "format"


class StorageError(CkptError, OSError):
    """The file system refused: full, over quota, read-only, no permission, or an I/O error."""

    code = "storage"

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        path: str | None = None,
        errno: int | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint, code=code)
        self.path = path
        self.errno = errno

    def __reduce__(self) -> tuple[Any, ...]:
        # `errno` lives in a slot of OSError, outside __dict__.
        return _rebuild, (type(self), {**self.__dict__, "errno": self.errno})


def described(error: BaseException) -> dict[str, Any]:
    """An error of this tree as plain values, for another process; of any other, what can be said of it."""
    if not isinstance(error, CkptError):
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        return {"kind": "CkptError", "attributes": {"message": text, "code": "error", "hint": None}}
    kind, attributes = error.__reduce__()[1]
    return {"kind": kind.__name__, "attributes": _plain(attributes)}


def revived(description: Mapping[str, Any]) -> CkptError:
    """The error that `described` describes."""
    kind = globals()[description["kind"]]
    attributes = {
        name: _tuples(value) if name != "__notes__" else value
        for name, value in description["attributes"].items()
    }
    return _rebuild(kind, attributes)


def _plain(value: Any) -> Any:
    """With lists for tuples, and plain text for text of other classes."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if type(value) in (type(None), bool, int, float, str, bytes) else str(value)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
