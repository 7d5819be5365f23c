"""JAX's random keys as plain values, and back. The only module that knows jax, which it never imports.

A key is a value, not a generator: who draws numbers splits it and goes on with a new one. So a stored key is
given back instead of being set.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from ckptvcs.errors import InvalidError


def is_key(value: object) -> bool:
    """Whether `value` is a typed key, or a raw one (an array of jax of dtype uint32), or several at once."""
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(value, jax.Array):
        return False
    return _is_typed(jax, value) or str(value.dtype) == "uint32"


def _is_typed(jax: Any, value: Any) -> bool:
    return bool(jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key))


def plain(key: Any) -> dict[str, Any]:
    """A key as {"impl": name of its algorithm, None for a raw key, "key": uint32 array}."""
    jax: Any = sys.modules["jax"]
    if not _is_typed(jax, key):
        return {"impl": None, "key": np.array(key)}
    return {"impl": str(jax.random.key_impl(key)), "key": np.array(jax.random.key_data(key))}


def restored(stored: Mapping[str, Any]) -> Any:
    """The key that `plain` gave. InvalidError if jax does not take it."""
    jax = sys.modules.get("jax")
    if jax is None:
        raise InvalidError("a key of jax is stored and jax is not loaded", hint="import jax first")
    data = np.asarray(stored["key"])
    if data.dtype != np.uint32:
        raise InvalidError(f"a key of jax is made of uint32, not of {data.dtype}")
    if stored["impl"] is None:
        return jax.numpy.asarray(data)
    try:
        return jax.random.wrap_key_data(jax.numpy.asarray(data), impl=str(stored["impl"]))
    except (TypeError, ValueError) as error:
        raise InvalidError(f"jax does not take this key: {str(error).splitlines()[0]}") from None
