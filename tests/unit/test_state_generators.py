"""Random generators of Python and numpy as leaves: every kind, bit-exact, and hostile states refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ckptvcs import CorruptionError, Repo, StateMismatchError, UnsupportedStateError
from ckptvcs.canonical import Tagged, decode, encode
from ckptvcs.state import codes, generators, tree
from ckptvcs.testing.memory import MemoryStore

BITS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")


def stored(value: Any) -> Any:
    """A value after it was written and read."""
    store = MemoryStore()
    return tree.read(store, tree.write(store, value).tree)


def python_numbers(source: random.Random) -> list[float]:
    return [source.gauss(0, 1), source.random(), source.getrandbits(70), source.gauss(0, 1)]


def numpy_numbers(source: Any) -> list[float]:
    if isinstance(source, np.random.BitGenerator):
        return [int(source.random_raw()), *source.spawn(1)[0].random_raw(3).tolist()]
    found = [source.standard_normal(), source.standard_normal(), *source.bytes(9), source.random()]
    if isinstance(source, np.random.Generator):
        found += [int(source.integers(0, 99, dtype=np.uint32)), source.spawn(2)[1].random()]
    return found


def used(source: Any) -> Any:
    """The generator after draws that leave half a word and half a pair of normal deviates behind."""
    source.standard_normal()
    if isinstance(source, np.random.Generator):
        source.integers(0, 99, dtype=np.uint32)
        source.spawn(3)
    return source


def generator(name: str, seed: int) -> Any:
    return np.random.Generator(getattr(np.random, name)(seed))


KINDS: dict[str, Callable[[], Any]] = {
    "RandomState": lambda: used(np.random.RandomState(3)),
    "RandomState on PCG64": lambda: used(np.random.RandomState(np.random.PCG64(3))),
    "entropy of several words": lambda: used(np.random.default_rng([1, 2**80])),
    "a child": lambda: used(np.random.default_rng(5).spawn(2)[1]),
    **{f"Generator({name})": lambda n=name: used(generator(n, 7)) for name in BITS},
    **{name: lambda n=name: getattr(np.random, n)(2**100) for name in BITS},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_generators_come_back(kind: str, repo: Repo) -> None:
    source = KINDS[kind]()
    back, copy = stored(source), generators.copied(source)
    assert type(back) is type(source)
    live = {"rng": source}
    commit = repo.commit(live)
    before = numpy_numbers(source)
    assert numpy_numbers(back) == numpy_numbers(copy) == before
    repo.restore(live)
    assert live["rng"] is source, "filled in place"
    assert repo.commit(live).tree == commit.tree
    assert numpy_numbers(source) == before


def test_python_generators_come_back(repo: Repo) -> None:
    live = {"rng": random.Random(5)}
    live["rng"].gauss(0, 1)
    back = stored(live["rng"])
    repo.commit(live)
    before = python_numbers(live["rng"])
    assert python_numbers(back) == before
    source = live["rng"]
    repo.restore(live)
    assert live["rng"] is source
    assert python_numbers(source) == before


def test_a_part_of_a_state_may_be_a_generator_or_nothing_yet(repo: Repo) -> None:
    repo.commit({"rng": np.random.default_rng(1), "list": [random.Random(1), 2]})
    live: dict[str, Any] = {"rng": None, "list": [random.Random(9), 0]}
    repo.restore(live)
    assert live["rng"].random() == np.random.default_rng(1).random()
    assert live["list"][0].random() == random.Random(1).random()


def test_another_kind_is_a_mismatch(repo: Repo) -> None:
    repo.commit({"a": np.random.default_rng(1), "b": random.Random(1), "c": 1, "d": np.random.PCG64(1)})
    live = {
        "a": np.random.Generator(np.random.SFC64(1)),
        "b": np.random.default_rng(1),
        "c": random.Random(2),
        "d": np.random.default_rng(1),
    }
    before = [generators.leaf(value) for value in live.values()]
    with pytest.raises(StateMismatchError) as caught:
        repo.restore(live)
    assert [text.partition(" ")[0] for text in caught.value.mismatched] == ["a", "b", "c", "d"]
    assert "numpy Generator(PCG64) stored, numpy Generator(SFC64) to be filled" in str(caught.value)
    assert [generators.leaf(value) for value in live.values()] == before


class Mine(random.Random):
    """A generator of one's own."""


class Bits(np.random.PCG64):
    """A bit generator of one's own."""


def test_what_may_hold_more_is_refused() -> None:
    class Seeds(np.random.bit_generator.ISeedSequence):
        def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
            return np.arange(n_words, dtype=dtype)

    state = {
        "system": random.SystemRandom(),
        "mine": Mine(1),
        "bits": Bits(1),
        "wrapped": np.random.Generator(Bits(1)),
        "seeds": np.random.default_rng(np.random.PCG64(Seeds())),
        "nested": {"key": {np.random.default_rng(1): 1}},
    }
    with pytest.raises(UnsupportedStateError) as caught:
        tree.write(MemoryStore(), state)
    assert {path.partition("/")[0] for path, _ in caught.value.leaves} == state.keys()


def test_seeds_that_take_long_to_mix_are_refused() -> None:
    for seed in (1 << (32 << 14), list(range(1 << 15))):
        with pytest.raises(UnsupportedStateError, match="seeded with more than"):
            stored({"g": np.random.default_rng(seed)})
    plain = ["Generator", "PCG64", {"state": {"state": 1, "inc": 1}, "has_uint32": 0, "uinteger": 0}, None]
    for entropy, key in ((1 << (32 << 18), []), ([1] * (1 << 15), []), (1, [1] * (1 << 15))):
        with pytest.raises(CorruptionError):
            generators.restore(codes.NUMPY_GENERATOR, [*plain, [entropy, key, 1024, 0]])
    long = np.random.default_rng(list(range(1000)))
    assert stored({"g": long})["g"].random() == long.random()


def test_a_listing_names_the_kind() -> None:
    store = MemoryStore()
    state = {"a": np.random.default_rng(1), "b": random.Random(1), "c": np.random.RandomState(1)}
    found = list(tree.entries(store, tree.write(store, state).tree))
    assert [(entry.kind, entry.preview) for entry in found] == [
        ("generator", "numpy Generator(PCG64)"),
        ("generator", "random.Random"),
        ("generator", "numpy RandomState(MT19937)"),
    ]


def fields(value: Any) -> tuple[int, list[Any]]:
    tagged = decode(generators.leaf(value))
    assert type(tagged) is Tagged
    return tagged.code, decode(tagged.payload)


def changed(plain: list[Any], *path: Any, to: Any) -> list[Any]:
    """A copy of a payload with one field replaced."""
    plain = decode(encode(plain))
    place = plain
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return plain


def test_hostile_states_are_corruption() -> None:
    """numpy does not check positions: one outside would read memory that is not the generator's."""
    twister = fields(np.random.Generator(np.random.MT19937(1)))
    philox = fields(np.random.Philox(1))
    pcg = fields(np.random.default_rng(1))
    legacy = fields(np.random.RandomState(1))
    python = fields(random.Random(1))
    cases = [
        (twister, (2, "state", "pos"), 625),
        (twister, (2, "state", "pos"), -1),
        (twister, (2, "state", "pos"), True),
        (twister, (2, "state", "key"), b""),
        (twister, (2, "state"), {}),
        (philox, (2, "buffer_pos"), 5),
        (philox, (2, "buffer_pos"), 2**70),
        (pcg, (2, "state", "state"), 1 << 128),
        (pcg, (2, "has_uint32"), 2),
        (pcg, (0,), "RandomState"),
        (pcg, (0,), "seed"),
        (pcg, (1,), "__class__"),
        (pcg, (1,), None),
        (pcg, (3,), 1.0),
        (pcg, (4,), [1, [], 1 << 40, 0]),
        (pcg, (4,), [1, [], 3, 0]),
        (pcg, (4,), [-1, [], 4, 0]),
        (pcg, (4,), [1, [], 4, 1 << 40]),
        (pcg, (4,), [[b"x"], [], 4, 0]),
        (pcg, (4,), [1]),
        (legacy, (3,), "x"),
        (python, (0,), 1),
        (python, (1,), b"\0" * 2500 + b"\1\0\0"),
        (python, (1,), b"\xff" * 2500),
        (python, (2,), "x"),
        (python, (2,), 10**400),
    ]
    for (code, plain), path, to in cases:
        print(path, to)
        with pytest.raises(CorruptionError):
            generators.restore(code, changed(plain, *path, to=to))
    for code, plain in (twister, philox, pcg, legacy, python):
        assert generators.leaf(generators.restore(code, plain)) == encode(Tagged(code, encode(plain)))
    assert (python[0], pcg[0]) == (codes.RANDOM, codes.NUMPY_GENERATOR)


class Greedy:
    """A loader that draws numbers when it is looked at and when it is moved, as real ones do."""

    def __init__(self, draw: Callable[[], object]) -> None:
        self.draw = draw

    def state_dict(self) -> dict[str, int]:
        self.draw()
        return {"at": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        del state
        self.draw()


@pytest.mark.parametrize("kind", ["random", "numpy", "torch"])
def test_generators_are_saved_and_set_behind_what_draws_from_them(kind: str, repo: Repo) -> None:
    if kind == "torch":
        source: Any = torch.Generator().manual_seed(1)

        def draw() -> float:
            return float(torch.rand((), generator=source))
    else:
        source = random.Random(1) if kind == "random" else np.random.default_rng(1)

        def draw() -> float:
            return float(source.random())

    live = {"rng": source, "deep": [{"loader": Greedy(draw)}]}
    repo.commit(live)
    expected = draw()
    repo.restore(live)
    assert draw() == expected


def test_what_says_so_comes_last_and_learns_whether_restore_is_strict(repo: Repo) -> None:
    calls: list[Any] = []

    class Part:
        def __init__(self, name: str) -> None:
            self.name = name

        def state_dict(self) -> dict[str, str]:
            calls.append(("save", self.name))
            return {"name": self.name}

        def load_state_dict(self, state: dict[str, str]) -> None:
            calls.append(("load", state["name"]))

    class LastPart(Part):
        ckpt_last = True
        refuses: tuple[str, ...] = ()

        def load_state_dict(self, state: dict[str, str], strict: bool = True) -> None:
            calls.append(("load", state["name"], strict))

        def ckpt_differences(self, state: dict[str, str]) -> tuple[str, ...]:
            assert state == {"name": self.name}
            return self.refuses

    last = LastPart("last")
    live = {"x": {"last": last}, "first": Part("first"), "list": [Part("second"), np.zeros(2)]}
    repo.commit(live)
    assert calls == [("save", "first"), ("save", "second"), ("save", "last")]
    calls.clear()
    repo.restore(live)
    loaded = [call for call in calls if call[0] == "load"]  # the others are asked again what they made of it
    assert loaded == [("load", "first"), ("load", "second"), ("load", "last", True)]
    calls.clear()
    last.refuses = ("a/b (two stored, one here)",)
    live["list"][1] += 1  # type: ignore[index]
    with pytest.raises(StateMismatchError) as caught:
        repo.restore(live)
    assert caught.value.mismatched == ("x/last/a/b (two stored, one here)",)
    assert calls == []
    assert live["list"][1].tolist() == [1, 1], "nothing was changed"  # type: ignore[index]
    repo.restore(live, strict=False)
    assert calls[-1] == ("load", "last", False)


def test_the_state_itself_may_be_saved_last(repo: Repo) -> None:
    class Alone:
        ckpt_last = True

        def state_dict(self) -> dict[str, int]:
            return {"a": 1}

    repo.commit(Alone())
    assert repo.checkout() == {"a": 1}


def test_an_object_that_does_not_take_its_generator_is_found_out(repo: Repo) -> None:
    class Sampler:
        stubborn = False

        def __init__(self) -> None:
            self.rng: Any = np.random.default_rng(1)

        def state_dict(self) -> dict[str, Any]:
            return {"rng": self.rng}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            if not self.stubborn:
                self.rng = state["rng"]

    live = {"sampler": Sampler()}
    repo.commit(live)
    expected = live["sampler"].rng.random()
    repo.restore(live)
    assert live["sampler"].rng.random() == expected
    live["sampler"].stubborn = True
    with pytest.raises(StateMismatchError, match=r"sampler/rng .a random generator in another state"):
        repo.restore(live)
