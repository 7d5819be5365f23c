"""Commits: a tree with the lineage, the numbers and the circumstances that produced it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptvcs import canonical
from ckptvcs.errors import CorruptionError, InvalidError, UnsupportedStateError
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.store.format import pack_object, unpack_object


@dataclass(frozen=True, slots=True)
class Component:
    """Bytes of one top-level component in a commit's report.

    Attributes:
        given: logical bytes of its tensors and files.
        new: of those, bytes the repository did not hold before.
        reused: of those, bytes it held already.
        stored: what the new ones cost on disk, record headers included.
    """

    given: int
    new: int
    reused: int
    stored: int


@dataclass(frozen=True, slots=True)
class CommitReport:
    """What one call of `commit` did. Totals over `components`; `stored` includes the commit's own
    objects. `seconds` is the time the call took."""

    given: int
    new: int
    reused: int
    stored: int
    seconds: float
    components: dict[str, Component] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"{in_bytes(self.given)} given, {in_bytes(self.new)} new, {in_bytes(self.reused)} reused, "
            f"{in_bytes(self.stored)} stored in {self.seconds:.2f} s"
        )


def in_bytes(count: float) -> str:
    """A byte count for people: 1.2 MB (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@dataclass(frozen=True, slots=True)
class Commit:
    """One saved state and where it came from. `str(commit.id)` is a full revision anywhere.

    Attributes:
        tree: id of the state's (and files') structure.
        parents: the first is the branch's tip before this commit.
        origin: the commit whose state the handle had restored or committed before; None for a fresh
            start.
        author: who made it.
        time: UTC nanoseconds; for display, never for ordering.
        step, epoch: training position, if given.
        metrics: numbers by name.
        config: hyperparameters, nested.
        overrides: what a fork changed in the config it started from.
        environment: library versions, code revision, host, command line.
        sizes: logical bytes by top-level component.
        report: bytes and time of the call that made it; None on a commit read back.
    """

    id: ObjectId
    tree: ObjectId
    parents: tuple[ObjectId, ...]
    origin: ObjectId | None
    author: str
    time: int
    message: str
    step: int | None
    epoch: int | float | None
    metrics: dict[str, Any]
    config: dict[str, Any]
    overrides: dict[str, Any]
    environment: dict[str, Any]
    sizes: dict[str, int]
    report: CommitReport | None = field(default=None, compare=False)

    @property
    def title(self) -> str:
        """The message's first line."""
        return self.message.split("\n", 1)[0]

    @property
    def fresh_start(self) -> bool:
        """True if its state does not come from its parent: the handle had restored nothing."""
        return bool(self.parents) and self.origin is None


def encode_commit(
    *,
    tree: ObjectId,
    parents: Sequence[ObjectId],
    origin: ObjectId | None,
    author: str,
    time: int,
    message: str,
    step: int | None,
    epoch: int | float | None,
    metrics: Mapping[str, Any],
    config: Mapping[str, Any],
    overrides: Mapping[str, Any],
    environment: Mapping[str, Any],
    sizes: Mapping[str, int],
) -> bytes:
    """The commit's object payload."""
    references: list[tuple[Kind, ObjectId]] = [(Kind.TREE, tree)]
    for id in (*parents, *((origin,) if origin else ())):
        if (Kind.COMMIT, id) not in references:
            references.append((Kind.COMMIT, id))
    position = {id: i for i, (_, id) in enumerate(references)}
    body = canonical.encode(
        {
            "tree": 0,
            "parents": [position[id] for id in parents],
            "origin": None if origin is None else position[origin],
            "author": author,
            "time": time,
            "message": message,
            "step": step,
            "epoch": epoch,
            "metrics": dict(metrics),
            "config": dict(config),
            "overrides": dict(overrides),
            "environment": dict(environment),
            "sizes": dict(sizes),
        }
    )
    return pack_object(references, body)


def decode_commit(id: ObjectId, payload: bytes) -> Commit:
    """The inverse of `encode_commit`. CorruptionError for anything else."""
    where = f"commit {id.short}"
    references, body = unpack_object(payload, where)
    try:
        fields: dict[str, Any] = canonical.decode(body)

        def commit_at(position: int) -> ObjectId:
            kind, found = references[position]
            if kind is not Kind.COMMIT or position < 0:
                raise ValueError("a parent is not a commit")
            return found

        kind, tree = references[fields["tree"]]
        if kind is not Kind.TREE:
            raise ValueError("its tree is not a tree")
        origin = fields["origin"]
        return Commit(
            id=id,
            tree=tree,
            parents=tuple(commit_at(p) for p in fields["parents"]),
            origin=None if origin is None else commit_at(origin),
            author=_typed(fields, "author", str),
            time=_typed(fields, "time", int),
            message=_typed(fields, "message", str),
            step=_typed(fields, "step", int, type(None)),
            epoch=_typed(fields, "epoch", int, float, type(None)),
            metrics=_typed(fields, "metrics", dict),
            config=_typed(fields, "config", dict),
            overrides=_typed(fields, "overrides", dict),
            environment=_typed(fields, "environment", dict),
            sizes=_typed(fields, "sizes", dict),
        )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise CorruptionError(f"{where} cannot be read: {error}", id=str(id)) from None


def _typed(fields: dict[str, Any], name: str, *kinds: type) -> Any:
    value = fields[name]
    if type(value) not in kinds:
        raise ValueError(f"{name} is a {type(value).__name__}")
    return value


# -- what callers may pass ------------------------------------------------------------------------


def plain_metrics(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """Metrics as Python numbers; 0-dim arrays and tensors are unpacked. InvalidError otherwise."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise InvalidError(
            f"metrics must be a mapping, not a {type(metrics).__name__}", hint="as in {'val_loss': 0.31}"
        )
    plain: dict[str, Any] = {}
    for name, value in (metrics or {}).items():
        if not isinstance(name, str) or not re.fullmatch(r"[^=<>\s]+", name) or not name.isprintable():
            raise InvalidError(f"{name!r} cannot be the name of a metric", hint="use a name like val_loss")
        number = _unpacked(value)
        if isinstance(number, bool) or type(number) not in (int, float):
            raise InvalidError(
                f"the metric {name} is a {type(value).__name__}, not a number", hint="pass a float or int"
            )
        plain[name] = number
    return plain


def plain_config(config: Any, what: str = "config") -> dict[str, Any]:
    """A config as nested dicts, lists and scalars.

    Namespaces become dicts, tuples lists, paths text, 0-dim arrays numbers. Anything else is listed,
    all at once, in an UnsupportedStateError.
    """
    if config is None:
        return {}
    bad: list[tuple[str, str]] = []
    plain = _plain(config, what, bad)
    if bad:
        raise UnsupportedStateError(bad)
    if not isinstance(plain, dict):
        raise InvalidError(f"{what} must be a mapping, not a {type(config).__name__}")
    return plain


def _plain(value: Any, path: str, bad: list[tuple[str, str]]) -> Any:
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, Mapping):
        return {
            key if type(key) in (str, int, bool) else str(key): _plain(each, f"{path}/{key}", bad)
            for key, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(each, f"{path}/{i}", bad) for i, each in enumerate(value)]
    if type(value).__name__ in ("Namespace", "SimpleNamespace"):
        return _plain(vars(value), path, bad)
    if hasattr(value, "__fspath__"):
        return str(value)
    number = _unpacked(value)
    if type(number) in (bool, int, float, str):
        return number
    if isinstance(value, str):
        return str.__str__(value)
    bad.append((path, f"a {type(value).__name__} has no place in a {path.split('/')[0]}"))
    return None


def _unpacked(value: Any) -> Any:
    """The Python scalar inside a 0-dim array, tensor or numpy scalar; other values as they are."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        return value.item()
    return value


def checked_step(step: Any) -> int | None:
    """A step as int. InvalidError for anything that is not a whole number."""
    number = _unpacked(step)
    if number is None or (type(number) is int):
        return number
    raise InvalidError(f"step must be a whole number, not {step!r}")


def checked_epoch(epoch: Any) -> int | float | None:
    """An epoch as int or finite float (a fraction of an epoch is common)."""
    number = _unpacked(epoch)
    if number is None or type(number) is int or (type(number) is float and math.isfinite(number)):
        return number
    raise InvalidError(f"epoch must be a number, not {epoch!r}")
