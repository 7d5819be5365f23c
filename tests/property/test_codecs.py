"""The codecs of numbers, with anything: chains of commits come back, and payloads that lie are refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptvcs import Repo
from ckptvcs.ids import Kind
from ckptvcs.store import codec, difference, planes
from ckptvcs.store.planes import LAYOUTS, WORD
from ckptvcs.testing.same import difference as differs
from ckptvcs.testing.strategies import DTYPES, arrays
from tests.crash.stores import scratch_folder

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

LEVELS = {"fast": 0, "balanced": 1, "small": 8}
FORMATS = {2: "bfloat16", 4: "float32", 8: "float64"}
everything = list(HealthCheck)
quick = settings(max_examples=300, suppress_health_check=everything)
slow = settings(max_examples=25, suppress_health_check=everything)


# -- words ----------------------------------------------------------------------------------------


@st.composite
def words(draw: st.DrawFn, size: int, count: int) -> Array:
    """Words of a size: any bits, tiled from few, around one value, or mostly zero."""
    most = (1 << 8 * size) - 1
    how = draw(st.sampled_from(["any", "tiled", "near", "sparse", "noise"]))
    if how == "noise":
        seed = draw(st.integers(0, 1 << 32))
        return np.frombuffer(np.random.default_rng(seed).bytes(size * count), WORD[size]).copy()
    few = draw(st.lists(st.integers(0, most), min_size=1, max_size=12))
    if how == "any":
        few = draw(st.lists(st.integers(0, most), min_size=min(count, 30), max_size=min(count, 30)))
    if how == "near":
        middle = draw(st.integers(0, most))
        few = [
            (middle + step) & most for step in draw(st.lists(st.integers(-300, 300), min_size=1, max_size=9))
        ]
    found = np.resize(np.array(few, np.uint64).astype(WORD[size]), count).astype(WORD[size])
    if how == "sparse":
        found[np.arange(count) % draw(st.integers(2, 50)) != 0] = 0
    return found


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Array, Array]:
    """Words and a base, alike or not."""
    size = draw(st.sampled_from([1, 2, 4, 8]))
    count = draw(st.one_of(st.integers(1, 40), st.integers(1, 2000)))
    base = draw(words(size, count))
    if draw(st.booleans()):
        return draw(words(size, count)), base
    return base + (draw(words(size, count)) & WORD[size].type(0x7F)), base


factors = st.one_of(
    st.floats(2.0**-8, 2.0**8), st.sampled_from([2.0**-8, 2.0**8, 1.0, 0.5, 0.9, 0.999]), st.just(None)
)


@quick
@given(pairs(), st.booleans(), st.data())
def test_planes_of_any_words_come_back(pair: tuple[Array, Array], rotated: bool, data: st.DataObject) -> None:
    values, into = pair
    size = values.dtype.itemsize
    layout = data.draw(st.sampled_from([None, *range(len(LAYOUTS[size]))]))
    before = values.tobytes()
    payload = planes.encode(values, rotated, layout)
    planes.decode(payload, into)
    assert into.tobytes() == values.tobytes() == before
    assert len(payload) <= len(before) + 12 + 20 * size + len(values) // 500


@pytest.mark.slow
@quick
@given(pairs(), factors)
def test_differences_of_any_words_come_back(pair: tuple[Array, Array], factor: float | None) -> None:
    values, base = pair
    size = values.dtype.itemsize
    kind = difference.format_of(FORMATS.get(size, ""))
    before = values.tobytes(), base.tobytes()
    payload = difference.encode(values, base, factor, kind)
    assert (values.tobytes(), base.tobytes()) == before
    inside, apart = bytearray(before[1]), bytearray(len(before[1]))
    difference.decode_frame(payload, memoryview(inside), size, memoryview(inside))
    difference.decode_frame(payload, memoryview(apart), size, before[1])
    assert inside == apart == before[0]


@quick
@given(pairs())
def test_any_words_have_a_possible_factor_or_none(pair: tuple[Array, Array]) -> None:
    values, base = pair
    kind = difference.format_of(FORMATS.get(values.dtype.itemsize, ""))
    if kind is not None:
        factor = difference.fit(values, base, kind)
        assert factor is None or (2.0**-8 <= factor <= 2.0**8 and factor != 1)


@pytest.mark.slow
@quick
@given(pairs(), factors, st.data())
def test_payloads_that_lie_are_refused_or_fill_their_output(
    pair: tuple[Array, Array], factor: float | None, data: st.DataObject
) -> None:
    values, base = pair
    size = values.dtype.itemsize
    number = data.draw(st.sampled_from([codec.PLANES, codec.DIFFERENCE]))
    kind = difference.format_of(FORMATS.get(size, ""))
    made = planes.encode(values) if number == codec.PLANES else difference.encode(values, base, factor, kind)
    payload = bytearray(made)
    for _ in range(data.draw(st.integers(1, 4))):
        how = data.draw(st.sampled_from(["change", "cut", "put", "head"]))
        at = data.draw(st.integers(0, len(payload)))
        if how == "change" and at < len(payload):
            payload[at] = data.draw(st.integers(0, 255))
        elif how == "head" and payload:
            payload[at % min(24, len(payload))] = data.draw(st.sampled_from([0, 1, 2, 3, 16, 17, 255]))
        elif how == "cut":
            del payload[at : at + data.draw(st.integers(1, 9))]
        else:
            payload[at:at] = data.draw(st.binary(max_size=9))
    outcomes = []
    for fill in (b"\0", b"\xff"):
        room = bytearray(fill * (len(values.tobytes()) + 32))
        into = memoryview(room)[16:-16]
        try:
            codec.CODECS[number].decode(payload, into, size, base.tobytes())
            outcomes.append(bytes(into))
        except ValueError:
            outcomes.append(b"")
        assert room[:16] == room[-16:] == fill * 16
    assert outcomes[0] == outcomes[1]


# -- chains of commits ----------------------------------------------------------------------------


@contextlib.contextmanager
def repository(level: str) -> Iterator[Repo]:
    with scratch_folder() as folder, Repo.init(Path(folder) / "r", compression=level) as repo:
        yield repo


def enlarged(array: Array, count: int) -> Array:
    """At least so many numbers with the bits of an array, in its memory order."""
    if not array.size:
        return array
    times = -(-count // array.size)
    return np.concatenate([array] * times, axis=0) if array.ndim else np.repeat(array, count)


@st.composite
def edits(draw: st.DrawFn) -> tuple[Any, ...]:
    """What happens to an array between two commits."""
    return draw(
        st.one_of(
            st.just(("nothing",)),
            st.tuples(st.just("step"), st.integers(-3, 3), st.integers(1, 7)),
            st.tuples(st.just("bits"), st.integers(0, 1 << 16), st.integers(1, 20)),
            st.tuples(st.just("scale"), st.sampled_from([0.5, 0.9, 0.999, 1.01, 3.0, 300.0])),
            st.tuples(st.just("bytes"), st.binary(min_size=1, max_size=8), st.integers(0, 1 << 16)),
            st.tuples(st.just("zero"), st.integers(1, 9)),
            st.tuples(st.just("noise"), st.integers(0, 1 << 16)),
            st.tuples(st.just("roll"), st.integers(1, 9)),
            st.tuples(st.just("back")),
        )
    )


def edited(array: Array, edit: tuple[Any, ...], first: Array) -> Array:
    """Another array of the same dtype and shape. Text stays as it is: not any bits are code points."""
    how, *rest = edit
    if how == "nothing" or not array.size or array.dtype.kind == "U":
        return array
    if how == "back":
        return first
    if how == "scale":
        if array.dtype.kind not in "fc" and array.dtype != ml_dtypes.bfloat16:
            return array
        with np.errstate(all="ignore"):
            wide = np.complex128 if array.dtype.kind == "c" else np.float64
            return (array.astype(wide) * rest[0]).astype(array.dtype)
    size = array.dtype.itemsize
    unit = size if size in WORD else 1
    content = bytearray(array.tobytes())
    flat = np.frombuffer(content, WORD[unit])
    if how == "step":
        flat[:: rest[1]] += WORD[unit].type(rest[0] % (1 << 8 * unit))
    elif how == "bits":
        places = np.random.default_rng(rest[0]).integers(0, len(flat), rest[1])
        flat[places] ^= WORD[unit].type(1 << rest[0] % (8 * unit))
    elif how == "bytes":
        at = rest[1] % len(content)
        piece = rest[0][: len(content) - at]
        content[at : at + len(piece)] = piece
    elif how == "zero":
        flat[:: rest[0]] = 0
    elif how == "noise":
        content[:] = np.random.default_rng(rest[0]).bytes(len(content))
    else:
        flat[:] = np.roll(flat, rest[0])
    if array.dtype.kind == "b":
        flat &= WORD[1].type(1)
    return np.frombuffer(bytes(content), array.dtype).reshape(array.shape)


@pytest.mark.slow
@slow
@given(st.data(), st.sampled_from([*LEVELS]))
def test_chains_of_commits_with_any_edits_come_back(data: st.DataObject, level: str) -> None:
    """Arrays of several dtypes through 2 to 10 commits, at one level or a new one each time."""
    count = data.draw(st.sampled_from([70, 150, 1100, 5000]))
    first = {str(at): enlarged(data.draw(arrays()), count) for at in range(data.draw(st.integers(1, 4)))}
    states = [first]
    levels = [level]
    for _ in range(data.draw(st.integers(1, 9))):
        changed = {name: edited(array, data.draw(edits()), first[name]) for name, array in states[-1].items()}
        states.append(changed)
        levels.append(data.draw(st.sampled_from([level, level, *LEVELS])))
    with scratch_folder() as folder:
        place = Path(folder) / "r"
        Repo.init(place).close()
        commits = []
        known: set[Any] = set()
        repo = Repo.open(place, compression=level)
        for before, chosen, state in zip([level, *levels], levels, states, strict=False):
            if chosen != before:
                repo.close()
                repo = Repo.open(place, compression=chosen)
            commits.append(repo.commit(state))
            with repo._store.snapshot() as snapshot:
                rows = dict(snapshot.rows_from(b"", 1 << 30))
            new = [row for id, row in rows.items() if id not in known and row.kind is Kind.CHUNK]
            assert all(row.depth <= LEVELS[chosen] for row in new)
            known = set(rows)
        for commit, state in zip(commits, states, strict=True):
            assert differs(state, repo.checkout(commit)) is None
        assert repo.fsck(full=True).ok
        repo.close()


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=5, suppress_health_check=everything)
@given(st.integers(0, 1 << 16), st.lists(edits(), min_size=1, max_size=9))
def test_every_dtype_at_once_comes_back(level: str, seed: int, changes: list[tuple[Any, ...]]) -> None:
    chance = np.random.default_rng(seed)
    first = {}
    for dtype in DTYPES:
        if dtype.kind in "bU":
            first[str(dtype)] = chance.integers(0, 2, 5000).astype(dtype)
        else:
            first[str(dtype)] = np.frombuffer(chance.bytes(5000 * dtype.itemsize), dtype)
    states = [first]
    for at, _ in enumerate(changes):
        states.append(
            {
                name: edited(array, changes[(at + place) % len(changes)], first[name])
                for place, (name, array) in enumerate(states[-1].items())
            }
        )
    with repository(level) as repo:
        commits = [repo.commit(state) for state in states]
        for commit, state in zip(commits, states, strict=True):
            assert differs(state, repo.checkout(commit)) is None
        with repo._store.snapshot() as snapshot:
            assert all(row.depth <= LEVELS[level] for _, row in snapshot.rows_from(b"", 1 << 30))
        assert repo.fsck(full=True).ok
