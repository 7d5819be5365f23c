"""Commits: a tree with the lineage, the numbers and the circumstances that produced it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ckptvcs import canonical
from ckptvcs.errors import CorruptionError, InvalidError, UnsupportedStateError
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.state import configs
from ckptvcs.store.format import pack_object, unpack_object

MAX_DEPTH: Final = 100
"""Containers within containers in a config."""

MAX_VALUES: Final = 1 << 20
"""Values in a config."""

MAX_PARENTS: Final = 256
"""Parents of one commit. A merge has two."""

MAX_BITS: Final = 4096
"""Of a whole number. Python writes no longer ones as text than three times that."""


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
    if len(set(parents)) < len(parents) or len(parents) > MAX_PARENTS:
        raise InvalidError(f"a commit has at most {MAX_PARENTS} parents, each of them once")
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
        fields = canonical.decode(body)
        if type(fields) is not dict:
            raise ValueError("its body is no map")

        def named(position: Any, wanted: Kind) -> ObjectId:
            if type(position) is not int or not 0 <= position < len(references):
                raise ValueError("a reference outside the table")
            kind, found = references[position]
            if kind is not wanted:
                raise ValueError(f"a {kind.label} where a {wanted.label} belongs")
            return found

        origin = fields["origin"]
        parents = _typed(fields, "parents", list)
        if len(parents) > MAX_PARENTS or len(set(map(repr, parents))) < len(parents):
            raise ValueError(f"{len(parents)} parents, some of them twice, or too many")
        return Commit(
            id=id,
            tree=named(fields["tree"], Kind.TREE),
            parents=tuple(named(p, Kind.COMMIT) for p in parents),
            origin=None if origin is None else named(origin, Kind.COMMIT),
            author=_typed(fields, "author", str),
            time=_typed(fields, "time", int),
            message=_typed(fields, "message", str),
            step=_typed(fields, "step", int, type(None)),
            epoch=_typed(fields, "epoch", int, float, type(None)),
            metrics=_numbers(fields, "metrics", int, float),
            config=_plain_tree(fields, "config"),
            overrides=_plain_tree(fields, "overrides"),
            environment=_plain_tree(fields, "environment"),
            sizes=_numbers(fields, "sizes", int),
        )
    except (ValueError, KeyError) as error:
        raise CorruptionError(f"{where} cannot be read: {error}", id=str(id)) from None


def _typed(fields: dict[str, Any], name: str, *kinds: type) -> Any:
    value = fields[name]
    if type(value) not in kinds:
        raise ValueError(f"{name} is a {type(value).__name__}")
    if type(value) is int and value.bit_length() > MAX_BITS:
        raise ValueError(f"{name} has {value.bit_length()} bits")
    return value


def _numbers(fields: dict[str, Any], name: str, *kinds: type) -> dict[str, Any]:
    """A map of names to numbers: what `plain_metrics` gives, or the bytes of components."""
    found: dict[str, Any] = _typed(fields, name, dict)
    for key, value in found.items():
        if type(key) is not str or type(value) not in kinds or (name == "sizes" and value < 0):
            raise ValueError(f"{name} holds {key!r:.40}, a {type(value).__name__}")
        if type(value) is int and value.bit_length() > MAX_BITS:
            raise ValueError(f"{name} holds {key!r:.40}, of {value.bit_length()} bits")
    return found


def _plain_tree(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """Nested plain values, as `plain_config` gives them."""
    found: dict[str, Any] = _typed(fields, name, dict)
    level: list[Any] = [found]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for outer in level:
            if type(outer) is dict and not all(type(key) in _KEYS for key in outer):
                raise ValueError(f"{name} has a key that is no text")
            for inner in outer.values() if type(outer) is dict else outer:
                if type(inner) in (dict, list):
                    below.append(inner)
                elif type(inner) not in _SCALARS:
                    raise ValueError(f"{name} holds a {type(inner).__name__}")
                elif type(inner) is int and inner.bit_length() > MAX_BITS:
                    raise ValueError(f"{name} holds a number of {inner.bit_length()} bits")
        level = below
        if not level:
            return found
    raise ValueError(f"{name} is nested deeper than {MAX_DEPTH} containers")


_SCALARS: Final = (type(None), bool, int, float, str, bytes)
_KEYS: Final = (str, int, bool)
_LIBRARIES: Final = ("numpy", "torch", "jax", "ml_dtypes")


# -- what callers may pass ------------------------------------------------------------------------


def is_metric_name(name: object) -> bool:
    """Whether a metric can be called so: conditions on metrics must be able to name it."""
    return isinstance(name, str) and re.fullmatch(r"[^=<>\s]+", name) is not None and name.isprintable()


def in_float(value: int | float) -> float:
    """A metric as a float; a whole number that is too large for one is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def rankable(value: Any) -> int | float | None:
    """A metric's value if it can be better or worse than another: a number, and not NaN; else None."""
    return value if type(value) in (int, float) and not math.isnan(in_float(value)) else None


def plain_metrics(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """Metrics as Python numbers; 0-dim arrays and tensors are unpacked. InvalidError otherwise."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise InvalidError(
            f"metrics must be a mapping, not a {type(metrics).__name__}", hint="as in {'val_loss': 0.31}"
        )
    plain: dict[str, Any] = {}
    for name, value in (metrics or {}).items():
        if not is_metric_name(name):
            raise InvalidError(f"{name!r} cannot be the name of a metric", hint="use a name like val_loss")
        number = _unpacked(value)
        if isinstance(number, bool) or type(number) not in (int, float):
            raise InvalidError(
                f"the metric {name} is a {type(value).__name__}, not a number", hint="pass a float or int"
            )
        if type(number) is int and number.bit_length() > MAX_BITS:
            raise InvalidError(f"the metric {name} has {number.bit_length()} bits", hint="pass a float")
        plain[name] = number
    return plain


def plain_config(config: Any, what: str = "config") -> dict[str, Any]:
    """A config as nested dicts, lists and scalars.

    Namespaces become dicts, tuples lists, 0-dim arrays numbers; paths, dtypes, devices, classes and
    functions become text: a config is for people. Anything else is listed,
    all at once, in an UnsupportedStateError.
    """
    if config is None:
        return {}
    plainer = _Plainer()
    try:
        plain = plainer.plain(config, what)
    except RecursionError:  # the caller's own stack is nearly full
        raise UnsupportedStateError([(what, "nested too deeply to be followed from here")]) from None
    if plainer.bad:
        raise UnsupportedStateError(plainer.bad)
    if not isinstance(plain, dict):
        raise InvalidError(f"{what} must be a mapping, not a {type(config).__name__}")
    return plain


class _Plainer:
    """Makes plain values of a config's.

    Attributes:
        bad: (path, why) of what has no plain form.
    """

    def __init__(self) -> None:
        self.bad: list[tuple[str, str]] = []
        self._open: list[int] = []
        self._values = 0

    def plain(self, value: Any, path: str) -> Any:
        """The value as dicts, lists and scalars."""
        self._values += 1
        if self._values > MAX_VALUES:
            raise UnsupportedStateError([(path, f"more than {MAX_VALUES} values; keep them in the state")])
        if type(value) in _SCALARS:
            if type(value) is int and value.bit_length() > MAX_BITS:
                return self._refuse(
                    path, f"a whole number of {value.bit_length()} bits; {MAX_BITS} is the most"
                )
            return value
        if configs.is_config(value):
            value = configs.plain(value, names=True)
        namespace = type(value).__name__ in ("Namespace", "SimpleNamespace")
        if namespace or isinstance(value, (Mapping, list, tuple)):
            return self._container(value, vars(value) if namespace else value, path)
        if hasattr(value, "__fspath__"):
            return str(value)
        number = _unpacked(value)
        if type(number) in (bool, int, float, str):
            return number
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(getattr(value, "__qualname__", None), str):  # a class or a function
            return f"{value.__module__}.{value.__qualname__}"
        library, kind = type(value).__module__.split(".", 1)[0], type(value).__name__.lower()
        if library in _LIBRARIES and kind.endswith(("dtype", "device", "layout", "memory_format")):
            return str(value)
        return self._refuse(path, f"a {type(value).__name__} has no place in a {path.split('/')[0]}")

    def _container(self, value: Any, content: Any, path: str) -> Any:
        if id(value) in self._open:
            return self._refuse(path, f"a {type(value).__name__} that contains itself")
        if len(self._open) > MAX_DEPTH:
            return self._refuse(path, f"nested deeper than {MAX_DEPTH} containers")
        self._open.append(id(value))
        try:
            if not isinstance(content, Mapping):
                return [self.plain(each, f"{path}/{i}") for i, each in enumerate(content)]
            return {
                key if type(key) in _KEYS else str(key): self.plain(each, f"{path}/{key}")
                for key, each in content.items()
            }
        finally:
            self._open.pop()

    def _refuse(self, path: str, why: str) -> None:
        self.bad.append((path, why))


def _unpacked(value: Any) -> Any:
    """The Python scalar inside a 0-dim array, tensor or numpy scalar; other values as they are."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        return value.item()
    return value


def checked_step(step: Any) -> int | None:
    """A step as int. InvalidError for anything that is not a whole number."""
    number = _unpacked(step)
    if number is None or (type(number) is int and number.bit_length() <= MAX_BITS):
        return number
    if type(number) is int:
        raise InvalidError(f"step must be a number of at most {MAX_BITS} bits")
    raise InvalidError(f"step must be a whole number, not {step!r}")


def checked_epoch(epoch: Any) -> int | float | None:
    """An epoch as int or finite float (a fraction of an epoch is common)."""
    number = _unpacked(epoch)
    if type(number) is int and number.bit_length() > MAX_BITS:
        raise InvalidError(f"epoch must be a number of at most {MAX_BITS} bits")
    if number is None or type(number) is int or (type(number) is float and math.isfinite(number)):
        return number
    raise InvalidError(f"epoch must be a number, not {epoch!r}")
