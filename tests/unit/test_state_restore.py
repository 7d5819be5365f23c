import collections
import dataclasses
import enum
import types

import numpy as np
import pytest

from ckptvcs.errors import InvalidError, NotFoundError, StateMismatchError
from ckptvcs.state import tree
from ckptvcs.state.restore import fill
from ckptvcs.testing.memory import MemoryStore
from ckptvcs.testing.same import difference


class Mode(enum.Enum):
    FAST = 1
    SLOW = 2


@dataclasses.dataclass
class Run:
    name: str
    weights: np.ndarray


class Owner:
    def __init__(self, state=None):
        self.state = state if state is not None else {}
        self.calls = []

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.calls.append(state)
        self.state = state


def stored(state):
    store = MemoryStore()
    return store, tree.write(store, state).tree


def test_arrays_are_filled_where_they_are():
    state = {
        "w": np.arange(1000.0),
        "f": np.arange(600.0).reshape(20, 30),
        "big": np.arange(100, dtype=">i4"),
        "step": 7,
    }
    into = {"w": np.zeros(1000), "f": np.zeros((30, 20)).T, "big": np.zeros(100, ">i4"), "step": 0}
    same = dict(into)
    done = fill(*stored(state), into)
    assert difference(state, into) is None
    assert all(into[key] is same[key] for key in ("w", "f", "big"))
    assert done == ({}, (), (), {})


def test_contiguous_targets_get_no_second_copy():
    buffers = []

    class Watching(MemoryStore):
        def read_into(self, requests):
            buffers.extend(buffer for _, buffer in requests)
            super().read_into(requests)

    store = Watching()
    written = tree.write(store, {"w": np.arange(1000.0)})
    into = {"w": np.zeros(1000)}
    fill(store, written.tree, into)
    assert np.shares_memory(np.frombuffer(buffers[0], "f8"), into["w"])


def test_a_mismatch_lists_everything_and_changes_nothing():
    state = {
        "a": np.ones(3),
        "b": np.ones(3),
        "c": {"x": 1, "extra": 2},
        "d": np.ones(2, "f4"),
        "e": [1],
        "f": np.ones(1),
    }
    into = {
        "a": np.zeros(3),
        "b": np.zeros(4),
        "c": {"x": 0, "gone": 0},
        "d": np.zeros(2),
        "e": {"k": 1},
        "f": "text",
        "more": 1,
    }
    with pytest.raises(StateMismatchError) as caught:
        fill(*stored(state), into)
    assert caught.value.missing == ("c/gone", "more")
    assert caught.value.unexpected == ("c/extra",)
    assert [text.split(" ")[0] for text in caught.value.mismatched] == ["b", "d", "e", "f"]
    assert not into["a"].any()
    assert into["c"] == {"x": 0, "gone": 0}
    done = fill(*stored(state), into, strict=False)
    assert into["a"].all()
    assert into["c"] == {"x": 1, "gone": 0}
    assert set(done.leftover) == {"b", "c/extra", "d", "e", "f"}
    assert done.leftover["c/extra"] == 2
    assert done.leftover["b"].tolist() == [1, 1, 1]
    assert done.missing == ("c/gone", "more")


def test_memory_that_two_values_are_stored_for():
    base = np.zeros(1000)
    into = {"a": base[:600], "b": base[400:], "c": np.zeros(3)}
    kept = np.arange(1000.0)
    fill(*stored({"a": kept[:600], "b": kept[400:], "c": kept[:3]}), into)
    assert base.tolist() == kept.tolist()
    state = {"a": np.ones(600), "b": np.zeros(600), "c": np.ones(3)}
    with pytest.raises(StateMismatchError) as caught:
        fill(*stored(state), into)
    assert [text.split(" ")[0] for text in caught.value.altered] in (["a"], ["b"])
    assert fill(*stored(state), into, strict=False).altered
    same = {"a": base, "b": base}
    with pytest.raises(StateMismatchError, match="shares its memory"):
        fill(*stored({"a": np.ones(1000), "b": np.zeros(1000)}), same)


def test_a_target_that_shows_memory_twice_is_found_out():
    import torch

    def expanded(array):
        return np.lib.stride_tricks.as_strided(array, (4,), (0,))

    class Holder(torch.nn.Module):
        def __init__(self, buffer):
            super().__init__()
            self.register_buffer("b", buffer)

    cases = [
        (np.arange(4.0), expanded(np.zeros(1))),
        (torch.arange(4.0), torch.zeros(1).expand(4)),
        (Holder(torch.arange(4.0)), Holder(torch.zeros(1).expand(4))),
    ]
    for value, target in cases:
        with pytest.raises(StateMismatchError, match="overlaps memory"):
            fill(*stored({"w": value}), {"w": target})
    into = {"w": expanded(np.zeros(1))}
    fill(*stored({"w": np.ones(4)}), into)  # one value everywhere has its place
    assert into["w"].tolist() == [1.0] * 4


def test_places_kept_free():
    state = {
        "none": np.ones(3),
        "empty": {"a": {"b": 1}, 5: 2},
        "history": [0.1, 0.2, 0.3],
        "log": [],
        "tail": collections.deque([1, 2]),
    }
    into = {"none": None, "empty": {}, "history": [0.1], "log": [], "tail": collections.deque(maxlen=2)}
    history = into["history"]
    fill(*stored(state), into)
    assert into["history"] is history
    assert history == [0.1, 0.2, 0.3]
    assert into["empty"] == {"a": {"b": 1}, 5: 2}
    assert into["tail"] == collections.deque([1, 2], 2)
    assert into["none"].tolist() == [1, 1, 1]


def test_nested_places():
    Pair = collections.namedtuple("Pair", "array label")
    make = lambda n, text: {  # noqa: E731
        "list": [np.full(3, n), {"k": n}],
        "tuple": (np.full(3, n), text),
        "pair": Pair(np.full(3, n), text),
        "space": types.SimpleNamespace(a=n, b=np.full(2, n)),
        "run": Run(text, np.full(2, n)),
        "plain": (n, text),
        "text": text * 3000,
    }
    into, state = make(0, "x"), make(1, "y")
    arrays = into["tuple"][0], into["run"].weights
    fill(*stored(state), into)
    assert difference(state, into) is None
    assert into["tuple"][0] is arrays[0]
    assert into["run"].weights is arrays[1]


def test_enums_get_their_own_member():
    into = {"mode": Mode.FAST, "other": 3}
    fill(*stored({"mode": Mode.SLOW, "other": 4}), into)
    assert into == {"mode": Mode.SLOW, "other": 4}
    with pytest.raises(StateMismatchError, match="mode"):
        fill(*stored({"mode": 5, "other": 4}), into)


def test_objects():
    state = {"o": {"k": 1, "w": np.ones(2)}, "x": {"deep": {"a": 1, "b": 2}}}
    owner, other = Owner(), Owner({"deep": {"a": 0, "b": 0}, "keep": 5})
    fill(*stored(state), {"o": owner, "x": other})
    assert owner.state["k"] == 1
    other = Owner({"deep": {"a": 0, "b": 0}, "keep": 5})
    fill(*stored(state), {"o": owner, "x": other}, only="x/deep/a")
    assert other.state == {"deep": {"a": 1, "b": 0}, "keep": 5}
    assert len(owner.calls) == 1
    top = Owner()
    fill(*stored(state), top)
    assert top.state["x"] == state["x"]


def test_objects_come_last_and_in_tree_order():
    order = []

    class Noting(Owner):
        def load_state_dict(self, state):
            order.append((state["n"], into["w"].tolist()))
            self.state = state

    into = {"b": Noting(), "a": Noting(), "w": np.zeros(2)}
    fill(*stored({"a": {"n": 1}, "w": np.ones(2), "b": {"n": 2}}), into)
    assert order == [(1, [1, 1]), (2, [1, 1])]


def test_only_limits_what_is_missing():
    into = {"a": {"x": 0, "y": 0}, "b": 0}
    fill(*stored({"a": {"x": 1}, "c": 3}), into, only="a/x")
    assert into == {"a": {"x": 1, "y": 0}, "b": 0}
    with pytest.raises(StateMismatchError, match="a/y"):
        fill(*stored({"a": {"x": 1}, "c": 3}), into, only="a")


def test_rename():
    state = {"model": {"enc": {"w": np.ones(3)}, "dec": 2}, "step": 4}
    into = {"net": {"encoder": {"w": np.zeros(3)}}, "model": {"dec": 0}, "n": 0}
    fill(*stored(state), into, rename={"model/enc": "net/encoder", "step": "n"})
    assert into["net"]["encoder"]["w"].all()
    assert into["n"] == 4
    assert into["model"]["dec"] == 2
    swapped = {"a": 0, "b": 0}
    fill(*stored({"a": 1, "b": 2}), swapped, rename={"a": "b", "b": "a"})
    assert swapped == {"a": 2, "b": 1}
    with pytest.raises(NotFoundError, match="'stp'") as caught:
        fill(*stored(state), into, rename={"stp": "n"})
    assert "step" in caught.value.hint
    whole = {"inner": {"model": {"enc": {"w": np.zeros(3)}, "dec": 0}, "step": 0}}
    fill(*stored(state), whole, rename={"": "inner"})
    assert whole["inner"]["step"] == 4


def test_what_cannot_be_filled():
    with pytest.raises(InvalidError, match="int cannot be filled"):
        fill(*stored(5), 3)
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    with pytest.raises(StateMismatchError, match="read-only"):
        fill(*stored({"a": np.ones(3)}), {"a": frozen})


def test_torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)

    def make():
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        return {
            "m": module,
            "o": torch.optim.AdamW(module.parameters()),
            "g": torch.Generator(),
            "t": torch.zeros(500),
        }

    first, second = make(), make()
    first["m"](torch.randn(5, 3)).sum().backward()
    first["o"].step()
    first["g"].manual_seed(9)
    first["t"] += 1
    store, id = stored(first)
    weight, t = second["m"][0].weight, second["t"]
    fill(store, id, second)
    assert difference(first["m"].state_dict(), second["m"].state_dict()) is None
    assert difference(first["o"].state_dict(), second["o"].state_dict()) is None
    assert torch.equal(torch.rand(3, generator=second["g"]), torch.rand(3, generator=first["g"]))
    assert second["m"][0].weight is weight
    assert second["t"] is t
    assert t.all()
    bad = {"m": torch.nn.Sequential(torch.nn.Linear(3, 5)), "o": Owner(), "g": None, "t": np.zeros(500, "f4")}
    before = bad["m"][0].weight.clone()
    with pytest.raises(StateMismatchError) as caught:
        fill(store, id, bad)
    assert [text.split(" ")[0] for text in caught.value.mismatched] == ["m/0.weight", "m/0.bias"]
    assert len(caught.value.unexpected) == 5
    assert torch.equal(before, bad["m"][0].weight)
    fill(store, id, bad, strict=False)
    assert bad["t"].all()
    part = make()
    fill(store, id, part, only="m/0.weight")
    assert torch.equal(part["m"][0].weight, first["m"][0].weight)
    assert not torch.equal(part["m"][0].bias, first["m"][0].bias)
