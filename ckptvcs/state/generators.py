"""Random generators of Python and numpy: their stored form, their way back, and one taking another's state.

What is kept is all that decides the numbers to come: the state of the bit generator, half-used words and
the second normal deviate, and of numpy's also the seed sequence, from which `spawn` makes children.
Stored states are checked before they reach compiled code, which trusts its positions.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeAlias

import numpy as np

from ckptvcs.canonical import Tagged, encode
from ckptvcs.errors import CorruptionError, InvalidError
from ckptvcs.state import codes

_WORDS: Final = 625
"""Of a random.Random: 624 words of the Mersenne Twister and the position, as `getstate` has them."""

_Field: TypeAlias = "int | tuple[str, int] | dict[str, _Field]"
_HALF: Final[dict[str, _Field]] = {"has_uint32": 1, "uinteger": (1 << 32) - 1}
_PCG: Final[dict[str, _Field]] = {"state": {"state": (1 << 128) - 1, "inc": (1 << 128) - 1}, **_HALF}
_BIT_GENERATORS: Final[dict[str, dict[str, _Field]]] = {
    "MT19937": {"state": {"key": ("<u4", 624), "pos": 624}},
    "PCG64": _PCG,
    "PCG64DXSM": _PCG,
    "Philox": {
        "state": {"counter": ("<u8", 4), "key": ("<u8", 2)},
        "buffer": ("<u8", 4),
        "buffer_pos": 4,
        **_HALF,
    },
    "SFC64": {"state": {"state": ("<u8", 4)}, **_HALF},
}
"""What the `state` of each bit generator holds: an integer from 0 up to a greatest, an array of a dtype and
length, or fields."""

_OWNERS: Final = ("Generator", "RandomState", "BitGenerator")
_POOL: Final = 1 << 10
"""The largest pool of a seed sequence: mixing it takes the square of its size."""
_SEED: Final = 1 << 14
"""Words of 32 bits in a seed sequence's entropy and key together: each is mixed with all of the pool, and
cutting an integer into words takes the square of their number."""


def is_generator(value: object) -> bool:
    """Whether `value` is a random generator of Python or numpy, of whatever class."""
    return isinstance(value, random.Random) or _numpy_class(value) is not None


def describe(value: Any) -> str:
    """What kind of generator it is, such as "numpy Generator(PCG64)". Only equal kinds take each other's
    state."""
    owner = _numpy_class(value)
    if owner is None:
        return f"{type(value).__module__}.{type(value).__qualname__}"
    return f"numpy {owner}({_bit_generator_name(value)})"


def leaf(value: Any) -> bytes:
    """The whole encoding of a generator. InvalidError says why one cannot be stored."""
    if isinstance(value, random.Random):
        if type(value) is not random.Random:
            raise InvalidError(f"{describe(value)}, which may keep more than random.Random does")
        version, words, gauss = value.getstate()
        data = np.array(words, "<u4").tobytes()
        return encode(Tagged(codes.RANDOM, encode([version, data, gauss])))
    owner, name = _numpy_class(value), _bit_generator_name(value)
    if name not in _BIT_GENERATORS or type(value).__name__ not in (owner, name):
        raise InvalidError(
            f"{describe(value)} of class {type(value).__qualname__}, which numpy does not have"
        )
    state, gauss = _state(value)
    seeds = None if owner == "RandomState" else _seeds(value)
    packed = _packed(_BIT_GENERATORS[name], state)
    return encode(Tagged(codes.NUMPY_GENERATOR, encode([owner, name, packed, gauss, seeds])))


def restore(code: int, plain: Any) -> Any:
    """A new generator from a decoded payload. CorruptionError for anything that none encodes to."""
    try:
        return _python(*plain) if code == codes.RANDOM else _numpy(*plain)
    except (TypeError, ValueError, OverflowError, KeyError) as error:
        raise CorruptionError(f"a stored random generator is impossible: {error}") from None


def holds(value: Any, code: int, plain: Any) -> bool:
    """Whether a value is a generator in the state of a decoded payload."""
    try:
        return is_generator(value) and leaf(value) == encode(Tagged(code, encode(plain)))
    except InvalidError:  # of a class that could not have been stored
        return False


def kind(code: int, plain: Any) -> str:
    """What `restore` gives, as `describe` would call it."""
    if code == codes.RANDOM:
        return "random.Random"
    return f"numpy {plain[0]}({plain[1]})" if type(plain) is list and len(plain) > 1 else "numpy generator"


def copied(value: Any) -> Any:
    """Another generator that will give the same numbers."""
    if isinstance(value, random.Random):
        made = random.Random()
        made.setstate(value.getstate())
        return made
    found = _made(_numpy_class(value) or "", _bit_generator_name(value), _seeds(value))
    assign(found, value)
    return found


def assign(target: Any, source: Any) -> None:
    """Let `target` go on where `source` stands. InvalidError unless both are of one kind."""
    if describe(target) != describe(source):
        raise InvalidError(f"a {describe(target)} cannot take the state of a {describe(source)}")
    if isinstance(target, random.Random):
        target.setstate(source.getstate())
        return
    if _numpy_class(target) == "RandomState":
        target.set_state(source.get_state(legacy=False))
        return
    mine, theirs = _bit_generator(target), _bit_generator(source)
    wanted = _seeds(source)
    if wanted is not None and wanted != _seeds(target):
        # The only door to the seed sequence of a generator that exists (numpy 2 and later).
        if type(mine.__getstate__()) is not tuple:
            raise InvalidError(
                "this numpy cannot give a generator another seed sequence",
                hint="update numpy, or make the generator from the same seed",
            )
        mine.__setstate__((theirs.state, _sequence(wanted)))
    mine.state = theirs.state


# -- Python ---------------------------------------------------------------------------------------


def _python(version: Any, data: Any, gauss: Any) -> random.Random:
    if type(data) is not bytes or len(data) != 4 * _WORDS or not (gauss is None or type(gauss) is float):
        raise ValueError("no state of a Mersenne Twister")
    made = random.Random()
    made.setstate((version, tuple(np.frombuffer(data, "<u4").tolist()), gauss))
    return made


# -- numpy ----------------------------------------------------------------------------------------


def _numpy_class(value: object) -> str | None:
    """The public class among `_OWNERS` that `value` is of; None for anything else."""
    if "numpy.random" not in sys.modules:
        return None
    return next((name for name in _OWNERS if isinstance(value, getattr(np.random, name))), None)


def _bit_generator(value: Any) -> Any:
    return value.bit_generator if isinstance(value, np.random.Generator) else value


def _bit_generator_name(value: Any) -> str:
    if isinstance(value, np.random.RandomState):
        return str(value.get_state(legacy=False)["bit_generator"])
    return type(_bit_generator(value)).__name__


def _state(value: Any) -> tuple[Mapping[str, Any], float | None]:
    """The bit generator's state, and the normal deviate that RandomState keeps for the next call."""
    if isinstance(value, np.random.RandomState):
        found = value.get_state(legacy=False)
        return found, float(found["gauss"]) if found["has_gauss"] else None
    return _bit_generator(value).state, None


def _packed(fields: Mapping[str, _Field], state: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in fields.items():
        value = state[name]
        if isinstance(field, dict):
            found[name] = _packed(field, value)
        elif isinstance(field, tuple):
            found[name] = np.asarray(value).astype(field[0]).tobytes()
        else:
            found[name] = int(value)
    return found


def _unpacked(fields: Mapping[str, _Field], plain: Any) -> dict[str, Any]:
    if type(plain) is not dict or plain.keys() != fields.keys():
        raise ValueError("other fields")
    found: dict[str, Any] = {}
    for name, field in fields.items():
        value = plain[name]
        if isinstance(field, dict):
            found[name] = _unpacked(field, value)
        elif isinstance(field, tuple):
            dtype, length = np.dtype(field[0]), field[1]
            if type(value) is not bytes or len(value) != dtype.itemsize * length:
                raise ValueError(f"{name} of another length")
            found[name] = np.frombuffer(value, dtype).astype(dtype.newbyteorder("="))
        elif type(value) is int and 0 <= value <= field:
            found[name] = value
        else:
            raise ValueError(f"{name} is no integer from 0 to {field}")
    return found


def _numpy(owner: Any, name: Any, packed: Any, gauss: Any, seeds: Any) -> Any:
    legacy = owner == "RandomState"
    if owner not in _OWNERS or not (gauss is None or (legacy and type(gauss) is float)):
        raise ValueError("no class of numpy")
    if legacy and seeds is not None:
        raise ValueError("a RandomState with a seed sequence")
    state = {"bit_generator": name, **_unpacked(_BIT_GENERATORS[name], packed)}
    made = _made(owner, name, seeds)
    if legacy:
        made.set_state(state | {"has_gauss": int(gauss is not None), "gauss": gauss or 0.0})
    else:
        _bit_generator(made).state = state
    return made


def _made(owner: str, name: str, seeds: Any) -> Any:
    kind = getattr(np.random, name)
    if owner == "RandomState":
        return np.random.RandomState(kind(0))
    found = kind(0 if seeds is None else _sequence(seeds))
    return np.random.Generator(found) if owner == "Generator" else found


def _seeds(value: Any) -> list[Any] | None:
    """[entropy, spawn key, pool size, children spawned]; None if there is no seed sequence to spawn from."""
    sequence = getattr(_bit_generator(value), "seed_seq", None)
    if sequence is None or type(sequence).__name__ == "SeedlessSeedSequence":
        return None
    if type(sequence) is not np.random.SeedSequence or sequence.pool_size > _POOL:
        raise InvalidError(f"numpy generator with a seed sequence of class {type(sequence).__qualname__}")
    entropy: Any = sequence.entropy
    try:
        plain = int(entropy) if isinstance(entropy, (int, np.integer)) else [int(word) for word in entropy]
        key = [int(word) for word in sequence.spawn_key]
    except (TypeError, ValueError):
        raise InvalidError("numpy generator seeded with something else than integers") from None
    if _words([*(plain if isinstance(plain, list) else [plain]), *key]) > _SEED:
        raise InvalidError(f"numpy generator seeded with more than {4 * _SEED} bytes")
    return [plain, key, int(sequence.pool_size), int(sequence.n_children_spawned)]


def _words(numbers: Iterable[int]) -> int:
    """How many words of 32 bits these take in a seed sequence."""
    return sum(max(1, -(-number.bit_length() // 32)) for number in numbers)


def _sequence(seeds: Any) -> np.random.SeedSequence:
    entropy, key, pool, spawned = seeds
    words = [entropy] if type(entropy) is int else entropy
    if (
        type(words) is not list
        or type(key) is not list
        or not all(type(word) is int and word >= 0 for word in (*words, *key, pool, spawned))
        or not 4 <= pool <= _POOL
        or spawned >= 1 << 32
        or _words((*words, *key)) > _SEED
    ):
        raise ValueError("no seed sequence")
    return np.random.SeedSequence(entropy, spawn_key=key, pool_size=pool, n_children_spawned=spawned)
