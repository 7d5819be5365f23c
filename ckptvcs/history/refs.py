"""Ref names: which exist, which are allowed, and where each kind lives.

HEAD                     the branch that people's commands act on, or a commit when detached
refs/heads/<branch>      branches
refs/tags/<tag>          tags
refs/lost/<branch>/<id8> commits that lost a race; readable as lost/<branch>/<id8>
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import Final

from ckptvcs.errors import InvalidError, NotFoundError

HEAD: Final = "HEAD"
HEADS: Final = "refs/heads/"
TAGS: Final = "refs/tags/"
LOST: Final = "refs/lost/"
LONGEST: Final = 200

_BAD = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//")


def check_name(name: str, what: str) -> str:
    """Refuse a branch or tag name that git would refuse, or that reads like an id; returns it.

    The rules are those of git-check-ref-format(1), plus: at most 200 UTF-8 bytes, not 64 hex digits, not
    HEAD, not below `lost/` or `refs/`.
    """
    why = _objection(name)
    if why is not None:
        raise InvalidError(
            f"{name!r} cannot be the name of a {what}: {why}",
            hint="use letters, digits, - _ . and /, as in exp/lr3e-4",
        )
    return name


def _objection(name: object) -> str | None:
    if not isinstance(name, str):
        return f"it is a {type(name).__name__}"
    if not name:
        return "it is empty"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "it is not valid text"
    if size > LONGEST:
        return f"it is longer than {LONGEST} bytes"
    if name in (HEAD, "@"):
        return "it is reserved"
    if name.startswith(("lost/", "refs/")) or name in ("lost", "refs"):
        return "lost/ and refs/ are reserved"
    if re.fullmatch(r"[0-9a-fA-F]{64}", name):
        return "it looks like an id"
    bad = _BAD.search(name)
    if bad:
        return f"it contains {bad[0]!r}"
    if re.search(r"@best(?=$|[/@])", name):
        return "@best after a name asks for its best commit"
    if name.startswith("-"):
        return "it starts with '-'"
    if name.startswith("/") or name.endswith("/"):
        return "it starts or ends with '/'"
    if name.endswith("."):
        return "it ends with '.'"
    for part in name.split("/"):
        if part.startswith("."):
            return "a part of it starts with '.'"
        if part.endswith(".lock"):
            return "a part of it ends with '.lock'"
    return None


def branch_ref(branch: str) -> str:
    """The full name of a branch, checked."""
    return HEADS + check_name(branch, "branch")


def tag_ref(tag: str) -> str:
    """The full name of a tag, checked."""
    return TAGS + check_name(tag, "tag")


def matching(patterns: str | Sequence[str], names: Iterable[str], what: str = "branch") -> list[str]:
    """The names that a glob selects, in the order given: `*`, `?` and `[...]`, across `/` too; a name without
    any of these selects itself and all below it (`sweep` is also `sweep/lr3e-4`). NotFoundError for a pattern
    that selects nothing."""
    globs = [patterns] if isinstance(patterns, str) else list(patterns)
    known, found = list(names), set[str]()
    for glob in globs:
        if any(sign in glob for sign in "*?["):
            chosen = {name for name in known if fnmatch.fnmatchcase(name, glob)}
        else:
            chosen = {name for name in known if name == glob or name.startswith(f"{glob}/")}
        if not chosen:
            folders = {name.rpartition("/")[0] for name in known} - {""}
            near = difflib.get_close_matches(glob, [*known, *sorted(folders)], n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"`ckpt {what}` lists them"
            raise NotFoundError(f"no {what} is called {glob!r}", hint=hint)
        found |= chosen
    return [name for name in known if name in found]


def shown(ref: str) -> str:
    """How a full ref name is written for people, and read back as a revision."""
    for prefix in (HEADS, TAGS):
        if ref.startswith(prefix):
            return ref.removeprefix(prefix)
    return ref.removeprefix("refs/")
