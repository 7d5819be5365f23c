"""The error tree: names, bases and codes that scripts and callers rely on."""

from __future__ import annotations

import copy
import errno
import inspect
import pickle

import pytest

from ckptvcs import errors
from ckptvcs.errors import CkptError

TREE: dict[str, tuple[tuple[str, ...], str]] = {
    "CkptError": (("Exception",), "error"),
    "NotFoundError": (("CkptError", "KeyError"), "not-found"),
    "NoRepositoryError": (("NotFoundError",), "no-repository"),
    "DroppedError": (("NotFoundError",), "dropped"),
    "ExistsError": (("CkptError", "FileExistsError"), "exists"),
    "InvalidError": (("CkptError", "ValueError"), "invalid"),
    "AmbiguousError": (("InvalidError",), "ambiguous"),
    "MergeConflictError": (("InvalidError",), "merge-conflict"),
    "UnsupportedStateError": (("InvalidError",), "unsupported-leaf"),
    "StateMismatchError": (("InvalidError",), "state-mismatch"),
    "ConflictError": (("CkptError",), "conflict"),
    "LineageError": (("ConflictError",), "lineage"),
    "LockedError": (("CkptError",), "locked"),
    "CorruptionError": (("CkptError",), "corruption"),
    "FormatError": (("CkptError",), "format"),
    "StorageError": (("CkptError", "OSError"), "storage"),
}
"""Append only: people catch these and compare these."""

EXAMPLES: list[CkptError] = [
    errors.CkptError("plain", hint="do this", code="special"),
    errors.NotFoundError("no such branch 'x'", hint="did you mean 'y'?"),
    errors.NoRepositoryError("no repository here"),
    errors.ExistsError("it is there", hint="open it"),
    errors.InvalidError("bad", code="bad-name"),
    errors.AmbiguousError("ab fits two commits"),
    errors.UnsupportedStateError([("model/x", "a function"), ("", "a lambda")]),
    errors.StateMismatchError(["a"], ["b", "c"], ["d"]),
    errors.ConflictError("moved", rescued="refs/lost/main/12345678"),
    errors.LineageError("wrong parent", hint="use branch=", rescued=None),
    errors.LockedError("locked"),
    errors.CorruptionError("bad bytes", path="/p", offset=12, id="ab"),
    errors.FormatError("too new", hint="use a newer ckptvcs"),
    errors.StorageError("full", path="/p", errno=errno.ENOSPC, code="disk-full"),
    errors.DroppedError("gone", hint="look there", commit="ab", names=["optimizer"], nearest="cd"),
    errors.MergeConflictError([("step", "1 or 2")]),
]


def classes() -> dict[str, type[CkptError]]:
    found = inspect.getmembers(errors, inspect.isclass)
    return {name: kind for name, kind in found if issubclass(kind, CkptError)}


def test_the_tree_is_pinned() -> None:
    found = {
        name: (tuple(base.__name__ for base in kind.__bases__), kind.code) for name, kind in classes().items()
    }
    assert found == TREE


def test_the_docstring_shows_the_tree() -> None:
    assert errors.__doc__ is not None
    for name in TREE:
        assert name in errors.__doc__
    assert {type(example).__name__ for example in EXAMPLES} == set(TREE)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("how", ["pickle", "copy", "deepcopy"])
def test_errors_survive_the_way_to_another_process(error: CkptError, how: str) -> None:
    again = pickle.loads(pickle.dumps(error)) if how == "pickle" else getattr(copy, how)(error)
    assert type(again) is type(error)
    assert str(again) == str(error) == error.message
    assert again.__dict__ == error.__dict__
    assert again.code == error.code
    assert again.hint == error.hint
    assert again.args == error.args
    if isinstance(error, OSError):
        assert again.errno == error.errno
    with pytest.raises(type(error)):
        raise again


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_messages_are_one_line(error: CkptError) -> None:
    assert str(error) == error.message
    assert "\n" not in str(error)
    assert error.hint is None or error.hint not in str(error)


def test_old_habits_catch_them() -> None:
    for kind, builtin in [
        (errors.NotFoundError, KeyError),
        (errors.NotFoundError, LookupError),
        (errors.ExistsError, FileExistsError),
        (errors.ExistsError, OSError),
        (errors.InvalidError, ValueError),
        (errors.StateMismatchError, ValueError),
        (errors.StorageError, OSError),
    ]:
        assert issubclass(kind, builtin)
    # A full disk is not "already there", and a missing revision is no input error.
    assert not issubclass(errors.StorageError, FileExistsError)
    assert not issubclass(errors.NotFoundError, ValueError)


def test_key_error_does_not_quote_the_message() -> None:
    assert str(errors.NotFoundError("no branch 'x'")) == "no branch 'x'"


def test_details() -> None:
    unsupported = EXAMPLES[6]
    assert isinstance(unsupported, errors.UnsupportedStateError)
    assert unsupported.leaves == (("model/x", "a function"), ("", "a lambda"))
    assert "model/x: a function" in unsupported.message
    assert "(the state itself): a lambda" in unsupported.message
    mismatch = EXAMPLES[7]
    assert isinstance(mismatch, errors.StateMismatchError)
    assert (mismatch.missing, mismatch.unexpected, mismatch.mismatched) == (("a",), ("b", "c"), ("d",))
    damaged = EXAMPLES[11]
    assert isinstance(damaged, errors.CorruptionError)
    assert (damaged.path, damaged.offset, damaged.id) == ("/p", 12, "ab")
    assert damaged.hint is not None
    assert "fsck" in damaged.hint
    full = EXAMPLES[13]
    assert isinstance(full, errors.StorageError)
    assert (full.errno, full.path, full.code) == (errno.ENOSPC, "/p", "disk-full")


def test_codes_are_unique() -> None:
    codes = [code for _, code in TREE.values()]
    assert len(set(codes)) == len(codes)
