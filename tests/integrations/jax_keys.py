"""A program that `test_jax_keys` runs: jax starts threads, beside which no other test should fork workers.

Keys typed, raw, several at once, and of another algorithm.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import pytest

from ckptvcs import InvalidError, Repo, StateMismatchError, rng


def check_keys_come_back(repo: Repo) -> None:
    mine = rng.Generators(
        typed=jax.random.key(3),
        raw=jax.random.PRNGKey(4),
        several=jax.random.split(jax.random.key(1, impl="rbg"), 3),
        unsafe=jax.random.key(5, impl="unsafe_rbg"),
    )

    def draw() -> list[float]:
        several = jax.vmap(jax.random.normal)(mine["several"])
        single = [jax.random.normal(mine[name]) for name in ("typed", "raw", "unsafe")]
        return [float(value) for value in (*single, *several)]

    repo.commit({"rng": mine})
    expected, kinds = draw(), {name: key.dtype for name, key in mine.items()}
    for name in mine:
        mine[name] = (
            jax.vmap(jax.random.split)(mine[name])[:, 0]
            if name == "several"
            else jax.random.split(mine[name])[0]
        )
    assert draw() != expected
    repo.restore({"rng": mine})
    assert draw() == expected
    assert {name: key.dtype for name, key in mine.items()} == kinds


def check_what_is_no_key() -> None:
    with pytest.raises(InvalidError, match="x: a ArrayImpl is no random generator"):
        rng.capture(x=jnp.zeros(2))
    state = rng.capture(x=jax.random.key(1))
    with pytest.raises(StateMismatchError, match="given/y"):
        rng.restore(state, y=jax.random.key(2))
    state["given"]["x"]["key"] = state["given"]["x"]["key"][:1]
    with pytest.raises(InvalidError, match="jax does not take this key"):
        rng.restore(state, x=jax.random.key(1))


if __name__ == "__main__":
    with Repo.init(sys.argv[1]) as opened:
        check_keys_come_back(opened)
    check_what_is_no_key()
