"""The repository's settings: `config.toml`, written by people or by `ckpt config`.

Every key has a default, so the file may be deleted. Unknown keys are kept and ignored (a newer program
may know them); a known key with an impossible value is an error that names it.

    author = "name"            who commits; CKPT_AUTHOR comes first, login@host last
    compression = "balanced"   fast, balanced or small
    environment = true         record library versions, code revision, host and command line
    index.network = false      use the index on a network file system; one host alone may then
    ingest = "auto"            take bundles up when the repository is opened, or "manual": by `ckpt ingest`
    gc.grace = "24h"           how long gc keeps what nothing refers to any more
    repack.older-than = "30d"  gc copies what lives in packs whose files are older; unset: never
    metric.NAME.mode = "min"   whether small or large values of NAME are better
    retention.RULE             what `ckpt retain` and Autosave keep (docs/concepts: retention)
    retention.branch.PATTERN.RULE   the same for branches that match; the first pattern in the file counts
"""

from __future__ import annotations

import contextlib
import datetime
import math
import re
import tomllib
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Final

from ckptvcs.errors import InvalidError

COMPRESSION_LEVELS: Final = ("fast", "balanced", "small")
_MODES: Final = ("min", "max")
_SWITCHES: Final = ("environment", "index.network")
_INGEST: Final = ("auto", "manual")
_UNITS: Final = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(|s|m|min|h|d|w)\Z")


def seconds_of(duration: str | float | datetime.timedelta) -> float:
    """Seconds in '0', '30m' ('30min'), '24h', '7d', a number of seconds or a timedelta. InvalidError
    otherwise."""
    if isinstance(duration, datetime.timedelta):
        seconds = duration.total_seconds()
    elif isinstance(duration, (int, float)) and not isinstance(duration, bool):
        try:
            seconds = float(duration)
        except OverflowError:
            seconds = math.inf
    else:
        found = _DURATION.match(duration) if isinstance(duration, str) else None
        if not found:
            raise InvalidError(f"{_shown(duration)} is not a duration", hint="as in 0, 30m, 24h or 7d")
        seconds = float(found[1]) * _UNITS[found[2]]
    if not 0 <= seconds < 1e10:
        raise InvalidError(f"{_shown(duration)} is not a duration", hint="as in 0, 30m, 24h or 7d")
    return seconds


def _shown(value: object) -> str:
    """A value for a message, however long it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of more digits than Python writes, lists within lists
        return f"such a {type(value).__name__}"
    return text if len(text) <= 60 else text[:59] + "…"


class Config:
    """Settings as read from the file. Immutable; `with_value` gives the file's next content."""

    def __init__(self, text: str, where: str = "config.toml") -> None:
        self._text = text
        self._where = where
        try:
            self._values: Mapping[str, Any] = tomllib.loads(text)
            flat = flatten(self._values)
        except ValueError as error:  # tomllib's own, and an int of too many digits
            raise InvalidError(f"{where} cannot be read: {error}", hint="mend it, or delete it") from None
        except RecursionError:
            raise InvalidError(
                f"{where} cannot be read: it is nested too deeply", hint="mend it, or delete it"
            ) from None
        for key, value in flat.items():
            if known(key):
                checked(key, value, where)

    def get(self, key: str) -> Any:
        """The value of a dotted key, or its default; None for an unknown key that is not set."""
        value = flatten(self._values).get(key)
        return _DEFAULTS.get(key) if value is None else value

    def items(self) -> dict[str, Any]:
        """All settings in force by dotted key: what is set, and the defaults."""
        return {**_DEFAULTS, **flatten(self._values)}

    def retention(self, branch: str, matches: Callable[[str, str], bool]) -> dict[str, Any]:
        """The retention rules for a branch: those of the first pattern that matches it, as `matches(pattern,
        branch)` tells, else those for all branches; {} without any."""
        table = self._values.get("retention")
        if not isinstance(table, Mapping):
            return {}
        patterns = table.get("branch")
        for pattern, rules in patterns.items() if isinstance(patterns, Mapping) else ():
            if isinstance(rules, Mapping) and matches(pattern, branch):
                return {name: rules[name] for name in RETENTION if name in rules}
        return {name: table[name] for name in RETENTION if name in table}

    def metric_mode(self, metric: str) -> str | None:
        """'min', 'max', or None if the file does not say."""
        found = flatten(self._values).get(f"metric.{metric}.mode")
        return str(found) if found is not None else None

    def with_value(self, key: str, text: str | None) -> str:
        """The file's content with a key set from text, or unset (None). Comments are kept."""
        import tomlkit  # only writing needs it; reading must not cost its import

        if not known(key):
            raise InvalidError(f"there is no setting called {key!r}", hint=f"there are {', '.join(KNOWN)}")
        try:
            # Behind a last line without an end, a comment say, what is added would be a part of it.
            ended = not self._text or self._text.endswith("\n")
            document = tomlkit.parse(self._text if ended else f"{self._text}\n")
        except (ValueError, RecursionError):
            raise InvalidError(f"{self._where} cannot be changed", hint="mend it, or delete it") from None
        *folders, last = split_key(key)
        table: Any = document
        for folder in folders:
            if folder not in table:
                if text is None:
                    return self._text
                table[folder] = tomlkit.table()
            table = table[folder]
            if not isinstance(table, MutableMapping):
                raise InvalidError(
                    f"{self._where}: {folder} is not a table, so {key} has no place", hint="mend the file"
                )
        if text is None:
            table.pop(last, None)
        else:
            table[last] = checked(key, _value_of(key, text), key)
        text_now: str = tomlkit.dumps(document)
        return text_now


RETENTION: Final = (
    "keep_last",
    "keep_every",
    "keep_best",
    "metric",
    "mode",
    "keep_within",
    "thin",
    "drop",
)
"""The rules of a retention policy."""

KNOWN: Final = (
    "author",
    "compression",
    "environment",
    "gc.grace",
    "index.network",
    "ingest",
    "repack.older-than",
    "metric.NAME.mode",
    "retention.RULE",
    "retention.branch.PATTERN.RULE",
)
_DEFAULTS: Final[dict[str, Any]] = {
    "author": None,
    "compression": "balanced",
    "environment": True,
    "gc.grace": "24h",
    "index.network": False,
    "ingest": "auto",
    "repack.older-than": None,
}


def split_key(key: str) -> list[str]:
    """The parts of a dotted key. A metric's name and a branch's may hold dots and slashes themselves."""
    if key.startswith("metric.") and key.endswith(".mode") and len(key) > len("metric..mode"):
        return ["metric", key[len("metric.") : -len(".mode")], "mode"]
    start, (pattern, _, rule) = "retention.branch.", key.rpartition(".")
    if key.startswith(start) and len(pattern) > len(start):
        return ["retention", "branch", pattern.removeprefix(start), rule]
    return key.split(".")


def known(key: str) -> bool:
    """Whether this program knows a setting of that name."""
    first, *rest = split_key(key)
    if first == "retention":
        return rest[-1:] != [] and rest[-1] in RETENTION and (len(rest) == 1 or rest[0] == "branch")
    return key in _DEFAULTS or (first == "metric" and len(rest) == 2 and rest[0] != "" and rest[1] == "mode")


def checked(key: str, value: Any, where: str) -> Any:
    """The value, if the key may have it. InvalidError naming key and choices otherwise."""
    if key == "author" and isinstance(value, str) and value.strip():
        return value
    if key == "compression" and value in COMPRESSION_LEVELS:
        return value
    if key in _SWITCHES and isinstance(value, bool):
        return value
    if key == "ingest" and value in _INGEST:
        return value
    if key in ("gc.grace", "repack.older-than"):
        with contextlib.suppress(InvalidError):
            seconds_of(value)
            return value
    if key.startswith("metric.") and value in _MODES:
        return value
    if key.startswith("retention."):
        return _checked_rule(split_key(key)[-1], value, key, where)
    choices = {
        "author": "a name",
        "compression": ", ".join(COMPRESSION_LEVELS),
        "environment": "true or false",
        "index.network": "true or false",
        "ingest": " or ".join(_INGEST),
        "gc.grace": "a duration, as in 0, 30m, 24h or 7d",
        "repack.older-than": "a duration, as in 30d",
    }.get(key, " or ".join(_MODES))
    place = "" if where == key else f"{where}: "
    raise InvalidError(f"{place}{key} cannot be {_shown(value)}", hint=f"choose {choices}")


_RULES: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "metric": (lambda value: isinstance(value, str) and value != "", "the name of a metric"),
    "mode": (lambda value: value in _MODES, " or ".join(_MODES)),
    "keep_within": (lambda value: _is_duration(value), "a duration, as in 30m, 24h or 7d"),
    "drop": (lambda value: _are_texts(value), "components, as in optimizer/**"),
}


def _checked_rule(rule: str, value: Any, key: str, where: str) -> Any:
    fits, choices = _RULES.get(
        rule, (lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0, "a number from 1 up")
    )
    if fits(value):
        return value
    place = "" if where == key else f"{where}: "
    raise InvalidError(f"{place}{key} cannot be {_shown(value)}", hint=f"choose {choices}")


def _is_duration(value: Any) -> bool:
    with contextlib.suppress(InvalidError):
        seconds_of(value)
        return True
    return False


def _are_texts(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and bool(texts) and all(isinstance(t, str) and t for t in texts)


def _value_of(key: str, text: str) -> Any:
    if key in _SWITCHES:
        return {"true": True, "false": False}.get(text.lower(), text)
    if key.startswith("retention."):
        rule = split_key(key)[-1]
        if rule == "drop":
            return [part for part in text.split(",") if part]
        if rule not in _RULES and text.isascii() and text.isdigit() and len(text) < 16:
            return int(text)
    return text


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
