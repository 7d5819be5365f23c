"""`rename={old: new}`: stored names that are called otherwise in the state to be filled.

`old` is a stored path and `new` where it belongs. The names of a module's tensors are dotted and lie within
one component of a path, so `old` may also be the beginning of such names, up to a dot: "model/encoder." or,
where nothing is called just that, "model/encoder". "model/base." to "model/" takes a beginning away,
"model/" to "model/base." puts one before all names.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ckptvcs.errors import InvalidError, NotFoundError
from ckptvcs.state import paths
from ckptvcs.state.read import Branch, Stored

_MAPS = ("dict", "OrderedDict", "defaultdict", "Counter", "namespace", "dataclass")


class _Rule(NamedTuple):
    """A rename in its two forms: of a path, or of the beginning of the names in one container."""

    old: str
    new: str
    prefix: bool = False

    def source(self, path: str) -> str | None:
        """The stored path of a path in the target, if this rule leads there."""
        if self.prefix:
            return self.old + path[len(self.new) :] if path.startswith(self.new) else None
        if not self.new:
            return paths.join(self.old, path)
        if path == self.new or path.startswith(self.new + "/"):
            return self.old + path[len(self.new) :]
        return None


class Renames:
    """What `rename` says, applied to one stored state.

    Attributes:
        stored: the state under its new names.
    """

    def __init__(self, stored: Stored, rename: Mapping[str, str], *, lenient: bool) -> None:
        """With `lenient`, what names nothing is passed over; otherwise it is a NotFoundError."""
        self._rules: list[_Rule] = []
        moved: list[Callable[[Stored], Stored]] = []
        root = stored
        for old, new in rename.items():  # all are taken out before any is put back
            root, put = self._taken(root, old, new)
            if put is not None:
                moved.append(put)
            elif not lenient:
                near = paths.nearest(old, _paths(stored))
                raise NotFoundError(
                    f"nothing in this commit is called {old!r}, which `rename` names",
                    hint=f"near: {', '.join(near)}" if near else None,
                )
        for put in moved:
            root = put(root)
        self.stored = root

    def source(self, path: str) -> str:
        """The stored path of a path in the target."""
        for rule in self._rules:
            found = rule.source(path)
            if found is not None:
                return found
        return path

    def _taken(self, root: Stored, old: str, new: str) -> tuple[Stored, Callable[[Stored], Stored] | None]:
        open_ended = old.endswith((".", "/")) or (not old and new.endswith("."))
        taken, rest = (None, root) if open_ended else _take(root, paths.split(old))
        if taken is not None:
            self._rules.append(_Rule(old, new))
            found = taken
            return rest, lambda node: _put(node, paths.split(new), found, new)
        before, after = (old, new) if open_ended else (f"{old}.", f"{new}.")
        where, _, beginning = before.rpartition("/")
        taken_names, rest = _take_names(root, paths.split(where), beginning)
        if taken_names is None:
            return root, None
        self._rules.append(_Rule(before, after, prefix=True))
        where, _, beginning = after.rpartition("/")
        names = taken_names.under(beginning)
        return rest, lambda node: _put_names(node, paths.split(where), names, new)


def _paths(stored: Stored, path: str = "") -> list[str]:
    found = [path] if path else []
    if isinstance(stored, Branch):
        for key, child in zip(stored.keys, stored.children, strict=True):
            found += _paths(child, paths.join(path, paths.name(key)))
    return found


def _take(node: Stored, components: Sequence[str]) -> tuple[Stored | None, Stored]:
    if not components:
        return node, Branch("dict", [], [], _make_dict)
    if isinstance(node, Branch):
        for at, key in enumerate(node.keys):
            if components[0] in (paths.name(key), key):
                taken, rest = _take(node.children[at], components[1:])
                if taken is None:
                    return None, node
                return taken, _without(node, at, rest, whole=len(components) == 1)
    return None, node


def _without(node: Branch, at: int, rest: Stored, *, whole: bool) -> Branch:
    keys, children = list(node.keys), list(node.children)
    if whole or (isinstance(rest, Branch) and not rest.children):
        del keys[at], children[at]
    else:
        children[at] = rest
    return Branch(node.kind, keys, children, node.make)


class _Names(NamedTuple):
    """Entries of one container, what its `_metadata` says of the modules they belong to, and an empty one of
    its kind."""

    entries: list[tuple[str, Stored]]
    metadata: dict[str, Any]
    empty: Branch

    def under(self, beginning: str) -> _Names:
        """The same, each name with this before it."""
        metadata = {(beginning + name).rstrip("."): each for name, each in self.metadata.items()}
        return _Names([(beginning + name, child) for name, child in self.entries], metadata, self.empty)


def _take_names(node: Stored, place: Sequence[str], beginning: str) -> tuple[_Names | None, Stored]:
    """The entries of the container at `place` whose names begin so, without that, and the rest."""
    if not isinstance(node, Branch):
        return None, node
    if place:
        for at, key in enumerate(node.keys):
            if place[0] in (paths.name(key), key):
                taken, rest = _take_names(node.children[at], place[1:], beginning)
                return taken, node if taken is None else _without(node, at, rest, whole=False)
        return None, node
    taken_entries, kept = [], []
    for key, child in zip(node.keys, node.children, strict=True):
        if node.kind in _MAPS and type(key) is str and key.startswith(beginning):
            taken_entries.append((key[len(beginning) :], child))
        else:
            kept.append((key, child))
    if not taken_entries:
        return None, node
    metadata = {
        f"{name}."[len(beginning) :]: each
        for name, each in _metadata(node).items()
        if f"{name}.".startswith(beginning)
    }
    rest = Branch(node.kind, [key for key, _ in kept], [child for _, child in kept], node.make)
    return _Names(taken_entries, metadata, Branch(node.kind, [], [], node.make)), rest


def _metadata(node: Branch) -> Mapping[str, Any]:
    found = getattr(node.make([], []), "_metadata", None) if node.kind == "OrderedDict" else None
    return found if isinstance(found, Mapping) else {}


def _put(node: Stored, components: Sequence[str], taken: Stored, new: str) -> Stored:
    if not components:
        if isinstance(node, Branch) and isinstance(taken, Branch) and node.kind == taken.kind:
            return Branch(node.kind, node.keys + taken.keys, node.children + taken.children, taken.make)
        return taken
    node = _map(node, new)
    keys, children = list(node.keys), list(node.children)
    for at, key in enumerate(keys):
        if components[0] in (paths.name(key), key):
            if len(components) == 1:
                raise InvalidError(f"rename to {new!r}: the commit has that name already")
            children[at] = _put(children[at], components[1:], taken, new)
            break
    else:
        keys.append(paths.key(components[0]))
        empty = Branch("dict", [], [], _make_dict)
        children.append(_put(empty, components[1:], taken, new) if components[1:] else taken)
    return Branch(node.kind, keys, children, node.make)


def _put_names(node: Stored, place: Sequence[str], names: _Names, new: str) -> Stored:
    """The tree with these entries in the container at `place`, which is made if need be."""
    node = _map(node, new)
    keys, children = list(node.keys), list(node.children)
    if place:
        for at, key in enumerate(keys):
            if place[0] in (paths.name(key), key):
                children[at] = _put_names(children[at], place[1:], names, new)
                return Branch(node.kind, keys, children, node.make)
        keys.append(paths.key(place[0]))
        empty = Branch("dict", [], [], _make_dict) if place[1:] else names.empty
        children.append(_put_names(empty, place[1:], names, new))
        return Branch(node.kind, keys, children, node.make)
    for name, child in names.entries:
        if name in keys:
            raise InvalidError(f"rename to {new!r}: the commit has the name {name!r} there already")
        keys.append(name)
        children.append(child)
    old = node
    metadata = dict(_metadata(old)) | names.metadata

    def make(keys: list[Any], found: list[Any]) -> Any:
        made = old.make(keys, found)
        if old.kind == "OrderedDict" and metadata:
            made._metadata = metadata
        return made

    return Branch(node.kind, keys, children, make)


def _map(node: Stored, new: str) -> Branch:
    if not isinstance(node, Branch) or node.kind not in _MAPS:
        raise InvalidError(f"rename to {new!r}: a {node.kind} is in the way")
    return node


def _make_dict(keys: list[Any], found: list[Any]) -> dict[Any, Any]:
    return dict(zip(keys, found, strict=True))


# -- near misses ----------------------------------------------------------------------------------

_SHOWN = 5


def near_misses(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """A hint for names that differ: one rename that pairs them all, or for some of them what is near.

    "" if nothing suggests itself.
    """
    if not missing or not unexpected:
        return ""
    pair = _one_rename(missing, unexpected)
    if pair is not None:
        return f"rename={{{pair[0]!r}: {pair[1]!r}}} would pair {'them' if len(missing) > 1 else 'it'}"
    found = []
    for wanted in missing[:_SHOWN]:
        near = paths.nearest(wanted, unexpected, n=1)
        if near:
            found.append(f"{near[0]} for {wanted}")
    return f"near: {', '.join(found)}" if found else ""


def _one_rename(missing: Sequence[str], unexpected: Sequence[str]) -> tuple[str, str] | None:
    """(old, new) that turns most unexpected paths into missing ones."""
    wanted = set(missing)
    pairs: collections.Counter[tuple[str, str]] = collections.Counter()
    for path in unexpected[:20]:
        for name in missing[:500]:
            rest = _common_end(path, name)
            if rest:
                pairs[path[: len(path) - len(rest)], name[: len(name) - len(rest)]] += 1
    for (old, new), _ in pairs.most_common(10):
        hits = [path for path in unexpected if path.startswith(old) and new + path[len(old) :] in wanted]
        if 2 * len(hits) > len(unexpected):
            both = old.endswith("/") and new.endswith("/")
            return (old[:-1], new[:-1]) if both else (old, new)
    return None


def _common_end(one: str, other: str) -> str:
    """The longest end of both that begins behind a separator, or is all of one of them."""
    length = 0
    while length < min(len(one), len(other)) and one[-length - 1] == other[-length - 1]:
        length += 1
    while length and not all(len(each) == length or each[-length - 1] in "./" for each in (one, other)):
        length -= 1
    return one[len(one) - length :]
