"""Python values that hold no tensors and no other state: each kind's stored form and its way back.

Enum members and dataclass instances come back as stand-ins, never by importing or calling the code
that defined them.
"""

from __future__ import annotations

import collections
import datetime
import functools
import keyword
import pathlib
import sys
import types
import zoneinfo
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ckptvcs.canonical import Tagged, decode, encode
from ckptvcs.errors import CorruptionError, InvalidError
from ckptvcs.state import codes


@dataclass(frozen=True, slots=True)
class EnumValue:
    """An enum member that was stored. Commits to the same bytes as the member itself.

    Attributes:
        type: "module:qualname" of the enum.
        name: the member's name, or None for an unnamed combination of flags.
        value: its value.
    """

    type: str
    name: str | None
    value: Any

    def __hash__(self) -> int:
        return hash((self.type, self.name))

    def __str__(self) -> str:
        return f"{self.type.rpartition(':')[2]}.{self.name}"


@dataclass(frozen=True, slots=True)
class DataclassValue:
    """A dataclass instance that was stored. Commits to the same bytes as the instance itself.

    Attributes:
        type: "module:qualname" of the dataclass.
        fields: its fields in order; `value["name"]` reads one.
    """

    type: str
    fields: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)

    def __hash__(self) -> int:
        return hash((self.type, tuple(self.fields)))


@dataclass(frozen=True, slots=True)
class TensorSubclassValue:
    """A torch tensor of a class of its own that was stored. Commits to the same bytes as the tensor itself.

    Attributes:
        type: "module:qualname" of the class.
        shape: the tensor's shape.
        flags: sum of `codes.REQUIRES_GRAD` and `codes.PARAMETER`.
        parts: the tensors it is made of by name, as its `__tensor_flatten__` gave them; of a class that
            only relabels a plain tensor that one, called "".
        context: the rest of what `__tensor_flatten__` gave, or the tensor's attributes.
    """

    type: str
    shape: tuple[int, ...]
    flags: int
    parts: Mapping[str, Any]
    context: Any

    def __getitem__(self, name: str) -> Any:
        return self.parts[name]

    def __hash__(self) -> int:
        return hash((self.type, self.shape))


def type_name(kind: type) -> str:
    """ "module:qualname"."""
    return f"{kind.__module__}:{kind.__qualname__}"


# -- named tuples ---------------------------------------------------------------------------------


def is_namedtuple(value: object) -> bool:
    """Whether `value` is an instance of a namedtuple class."""
    fields = getattr(type(value), "_fields", None)
    return (
        isinstance(value, tuple)
        and type(fields) is tuple
        and len(fields) == len(value)
        and all(type(field) is str for field in fields)
        and callable(getattr(type(value), "_make", None))
    )


def namedtuple_class(name: str, fields: tuple[str, ...]) -> type[tuple[Any, ...]]:
    """A class that looks like the stored one: the same fields, and the same name when committed again."""
    module, colon, qualname = name.partition(":")
    short = qualname.rpartition(".")[2]
    words = (short, *fields)
    if (
        not colon
        or not all(word.isidentifier() and not keyword.iskeyword(word) for word in words)
        or any(field.startswith("_") for field in fields)
        or len(set(fields)) != len(fields)
    ):
        raise CorruptionError(f"a stored named tuple {name!r} with impossible names")
    return _namedtuple_class(module, qualname, short, fields)


@functools.lru_cache(maxsize=256)
def _namedtuple_class(
    module: str, qualname: str, short: str, fields: tuple[str, ...]
) -> type[tuple[Any, ...]]:
    made: type[tuple[Any, ...]] = collections.namedtuple(short, fields, module=module)  # type: ignore[misc]
    made.__qualname__ = qualname
    return made


# -- leaves ---------------------------------------------------------------------------------------

FACTORIES: Final[dict[str, type]] = {
    kind.__name__: kind for kind in (list, dict, int, float, str, set, tuple, bool, complex, bytes)
}
"""What a defaultdict may have as its factory."""


class NoLeafError(Exception):
    """A value of a known type that cannot be stored all the same; the text says why."""


def _zone(zone: datetime.tzinfo | None) -> Any:
    if zone is None:
        return None
    if type(zone) in _ENCODERS:
        code, plain = _ENCODERS[type(zone)](zone)
        return Tagged(code, encode(plain))
    raise NoLeafError(f"time zone of class {type(zone).__name__}; use datetime.timezone or zoneinfo")


def _timezone(zone: datetime.timezone) -> tuple[int, Any]:
    # The only public way to tell a name given from a name made up.
    offset, *name = zone.__getinitargs__()  # type: ignore[attr-defined]
    return codes.TIMEZONE, [offset // datetime.timedelta(microseconds=1), name[0] if name else None]


def _zoneinfo(zone: zoneinfo.ZoneInfo) -> tuple[int, Any]:
    if zone.key is None:
        raise NoLeafError("time zone made from a file, without a key")
    return codes.ZONEINFO, zone.key


def _clock(t: datetime.datetime | datetime.time) -> list[Any]:
    return [t.hour, t.minute, t.second, t.microsecond, t.fold, _zone(t.tzinfo)]


_PATHS: Final = {
    kind.__name__: kind
    for kind in (
        pathlib.PosixPath,
        pathlib.WindowsPath,
        pathlib.PurePosixPath,
        pathlib.PureWindowsPath,
    )
}

_ENCODERS: Final[dict[type, Callable[[Any], tuple[int, Any]]]] = {
    complex: lambda v: (codes.COMPLEX, [v.real, v.imag]),
    datetime.datetime: lambda v: (codes.DATETIME, [v.year, v.month, v.day, *_clock(v)]),
    datetime.date: lambda v: (codes.DATE, [v.year, v.month, v.day]),
    datetime.time: lambda v: (codes.TIME, _clock(v)),
    datetime.timedelta: lambda v: (codes.TIMEDELTA, [v.days, v.seconds, v.microseconds]),
    datetime.timezone: _timezone,
    zoneinfo.ZoneInfo: _zoneinfo,
    range: lambda v: (codes.RANGE, [v.start, v.stop, v.step]),
    type(Ellipsis): lambda v: (codes.ELLIPSIS, None),
} | {kind: lambda v: (codes.PATH, [type(v).__name__, str(v)]) for kind in _PATHS.values()}

LEAF_TYPES: Final = frozenset(_ENCODERS)
"""The exact types that `leaf` encodes."""


def leaf(value: object) -> bytes:
    """The whole encoding of a value of `LEAF_TYPES`. NoLeafError says why one cannot be stored."""
    code, plain = _ENCODERS[type(value)](value)
    return encode(Tagged(code, encode(plain)))


def _path(name: str, text: str) -> pathlib.PurePath:
    kind = _PATHS[name]
    if issubclass(kind, pathlib.Path) and not isinstance(pathlib.Path(), kind):
        kind = pathlib.PurePosixPath if kind is pathlib.PosixPath else pathlib.PureWindowsPath
    return kind(text)


def _restore_zone(plain: Any) -> datetime.tzinfo | None:
    if plain is None:
        return None
    if type(plain) is Tagged and plain.code in (codes.TIMEZONE, codes.ZONEINFO):
        zone: datetime.tzinfo = restore(plain.code, decode(plain.payload))
        return zone
    raise ValueError("not a time zone")


def _restore_timezone(plain: Any) -> datetime.timezone:
    offset = datetime.timedelta(microseconds=plain[0])
    return datetime.timezone(offset) if plain[1] is None else datetime.timezone(offset, plain[1])


def _restore_zoneinfo(key: str) -> zoneinfo.ZoneInfo:
    try:
        return zoneinfo.ZoneInfo(key)
    except (zoneinfo.ZoneInfoNotFoundError, OSError):  # a folder of zones is an OSError
        raise InvalidError(
            f"this machine does not know the time zone {key!r}", hint="install the package tzdata"
        ) from None


def _restore_time(p: list[Any]) -> datetime.time:
    hour, minute, second, micro, fold, zone = p
    return datetime.time(hour, minute, second, micro, _restore_zone(zone), fold=fold)


_RESTORERS: Final[dict[int, tuple[str, int, Callable[[Any], Any]]]] = {
    codes.COMPLEX: ("complex", 2, lambda p: complex(*map(_float, p))),
    codes.DATETIME: (
        "datetime",
        9,
        lambda p: datetime.datetime.combine(datetime.date(*p[:3]), _restore_time(p[3:])),
    ),
    codes.DATE: ("date", 3, lambda p: datetime.date(*p)),
    codes.TIME: ("time", 6, _restore_time),
    codes.TIMEDELTA: ("timedelta", 3, lambda p: datetime.timedelta(*p)),
    codes.TIMEZONE: ("timezone", 2, _restore_timezone),
    codes.ZONEINFO: ("zoneinfo", 0, _restore_zoneinfo),
    codes.RANGE: ("range", 3, lambda p: range(*p)),
    codes.ELLIPSIS: ("ellipsis", 0, lambda p: ...),
    codes.PATH: ("path", 2, lambda p: _path(*p)),
}


def _float(value: object) -> float:
    if type(value) is not float:
        raise TypeError("not a float")
    return value


def kind_of(code: int) -> str | None:
    """The word for a leaf of this module, as `ls` shows it; None for other codes."""
    found = _RESTORERS.get(code)
    return found[0] if found else None


def restore(code: int, plain: Any) -> Any:
    """The leaf of a decoded payload. CorruptionError for anything that no leaf encodes to."""
    _, fields, restorer = _RESTORERS[code]
    if fields and (type(plain) is not list or len(plain) != fields):
        raise CorruptionError(f"a stored {_RESTORERS[code][0]} has the wrong number of fields")
    try:
        return restorer(plain)
    except (TypeError, ValueError, OverflowError, KeyError, AttributeError) as error:
        raise CorruptionError(f"a stored {_RESTORERS[code][0]} is impossible: {error}") from None


# -- namespaces: classes that are nothing but their attributes ---------------------------------------


def namespace_code(value: object) -> int | None:
    """The code of an argparse.Namespace or types.SimpleNamespace; None for anything else."""
    if type(value) is types.SimpleNamespace:
        return codes.SIMPLE_NAMESPACE
    argparse = sys.modules.get("argparse")  # slow to import, and in use already by whoever has one
    return codes.NAMESPACE if argparse is not None and type(value) is argparse.Namespace else None


def make_namespace(code: int, attributes: dict[Any, Any]) -> Any:
    """An instance with these attributes, whatever text they are called by."""
    if code == codes.NAMESPACE:
        import argparse

        made: Any = argparse.Namespace()
    else:
        made = types.SimpleNamespace()
    made.__dict__.update(attributes)
    return made
