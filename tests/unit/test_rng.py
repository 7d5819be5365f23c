"""The exact resume kit: all generators of a process, captured and set again, or refused."""

from __future__ import annotations

import random
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckptvcs
from ckptvcs import InvalidError, Repo, StateMismatchError, rng
from ckptvcs.state import distributed, jax_keys, torch_random


@pytest.fixture(autouse=True)
def _global_generators() -> Iterator[None]:
    """Tests leave the global generators as they found them."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def numbers() -> list[float]:
    """What the global generators give next, with the cached half of a pair of deviates."""
    return [
        random.gauss(0, 1),
        random.random(),
        float(np.random.standard_normal()),
        *np.random.rand(2).tolist(),
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def test_captured_and_restored() -> None:
    numbers()
    state = rng.capture()
    expected = numbers()
    assert set(state) == {"python", "numpy", "torch"}
    numbers()
    rng.restore(state)
    assert numbers() == expected
    rng.restore(state)
    assert numbers() == expected, "a captured state does not change"


def test_as_a_leaf(repo: Repo) -> None:
    live = {"rng": ckptvcs.rng, "w": np.zeros(3)}
    commit = repo.commit(live)
    expected = numbers()
    assert repo.restore(live).commit == commit
    assert numbers() == expected
    repo.restore(live, only="rng/python")
    assert numbers()[:2] == expected[:2]
    kept = repo.checkout(only="rng")["rng"]
    assert kept["python"].gauss(0, 1) == expected[0]
    rng.restore(repo.checkout(framework="numpy")["rng"])
    assert numbers() == expected


def test_same_generators_same_tree(repo: Repo) -> None:
    assert repo.commit({"rng": ckptvcs.rng}).tree == repo.commit({"rng": rng.capture()}).tree


def test_generators_of_the_caller(repo: Repo) -> None:
    mine = rng.Generators(
        data=np.random.default_rng(1),
        old=np.random.RandomState(2),
        py=random.Random(3),
        bits=np.random.SFC64(4),
    )
    mine["torch"] = torch.Generator().manual_seed(5)
    before = dict(mine)

    def draw() -> list[float]:
        own = [mine["data"].random(), mine["old"].rand(), mine["py"].random(), int(mine["bits"].random_raw())]
        return [*own, float(torch.rand((), generator=mine["torch"])), *numbers()]

    repo.commit({"rng": mine})
    expected = draw()
    repo.restore({"rng": mine})
    assert dict(mine) == before, "set in place"
    assert draw() == expected


def test_names_of_generators_have_to_fit(repo: Repo) -> None:
    repo.commit({"rng": rng.Generators(a=np.random.default_rng(1), b=random.Random(1))})
    other = rng.Generators(b=np.random.default_rng(2), c=np.random.default_rng(3))
    expected = numbers()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    with pytest.raises(StateMismatchError) as caught:
        repo.restore({"rng": other})
    assert caught.value.mismatched == (
        "rng/given/a (stored, and no such generator is given)",
        "rng/given/b (random.Random stored, numpy Generator(PCG64) given)",
        "rng/given/c (not stored)",
    )
    assert numbers() == expected, "nothing was touched"
    repo.restore({"rng": other}, strict=False)
    assert other["c"].random() == np.random.default_rng(3).random()


def test_what_is_no_generator() -> None:
    with pytest.raises(InvalidError, match="data: a int is no random generator"):
        rng.capture(data=1)
    with pytest.raises(InvalidError, match="SystemRandom"):
        rng.capture(data=random.SystemRandom())
    for state in ({"a": 1}, {"ranks": [1]}, 3):
        with pytest.raises(InvalidError, match="no state of random generators"):
            rng.restore(state)  # type: ignore[arg-type]


def test_impossible_states_leave_all_generators_alone() -> None:
    state = rng.capture()
    expected = numbers()
    numbers()
    for part, value in (("cpu", torch.zeros(5056, dtype=torch.uint8)), ("cpu", torch.zeros(3)), ("cpu", "x")):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        with pytest.raises(InvalidError, match="does not take"):
            rng.restore(state | {"torch": {part: value}})
        assert numbers() == expected
    for part in ("python", "numpy"):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        with pytest.raises(StateMismatchError, match=f"{part} "):
            rng.restore(state | {part: np.random.default_rng(1)})
        with pytest.raises(StateMismatchError, match=f"{part} "):
            rng.restore(state | {part: (1, 2)})
        assert numbers() == expected


def test_another_global_bit_generator_of_numpy(repo: Repo) -> None:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        repo.commit({"rng": rng})
        expected = np.random.rand()
        repo.restore({"rng": rng})
        assert np.random.rand() == expected
    finally:
        np.random.set_bit_generator(before)
    with pytest.raises(
        StateMismatchError, match=r"RandomState\(PCG64\) stored, numpy RandomState\(MT19937\)"
    ):
        repo.restore({"rng": rng})


# -- devices --------------------------------------------------------------------------------------


class Devices:
    """A kind of device with generators, as torch.cuda has them."""

    def __init__(self, count: int) -> None:
        self.states = [torch.full((16,), n, dtype=torch.uint8) for n in range(count)]

    def is_available(self) -> bool:
        return bool(self.states)

    def device_count(self) -> int:
        return len(self.states)

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return self.states

    def get_rng_state(self) -> torch.Tensor:
        return self.states[0]

    def set_rng_state(self, state: torch.Tensor, device: Any = "mps") -> None:
        self.states[torch.device(device).index or 0] = state.clone()


class Generator:
    """A generator of a device that this machine does not have."""

    def __init__(self, device: torch.device) -> None:
        self.real = torch.Generator() if device.type == "cpu" else None

    def set_state(self, state: torch.Tensor) -> None:
        if self.real is not None:
            self.real.set_state(state)
        elif state.shape != (16,) or state.dtype != torch.uint8:
            raise RuntimeError("RNG state is wrong size\nand more")


def machine(monkeypatch: pytest.MonkeyPatch, cuda: int = 0, mps: int = 0) -> Any:
    """A torch on a machine with so many devices."""
    fake = types.SimpleNamespace(
        cuda=Devices(cuda),
        xpu=Devices(0),
        mps=Devices(mps),
        Generator=Generator,
        **{name: getattr(torch, name) for name in ("random", "device", "as_tensor")},
    )
    monkeypatch.setattr(torch_random, "loaded", lambda: fake)
    monkeypatch.setattr(torch_random, "require", lambda: fake)
    return fake


def test_devices_come_back(monkeypatch: pytest.MonkeyPatch, repo: Repo) -> None:
    here = machine(monkeypatch, cuda=2, mps=1)
    repo.commit({"rng": rng})
    for device in (*here.cuda.states, *here.mps.states):
        device.fill_(77)
    repo.restore({"rng": rng})
    assert [int(state[0]) for state in (*here.cuda.states, *here.mps.states)] == [0, 1, 0]


def test_other_devices_are_refused_unless_told(
    monkeypatch: pytest.MonkeyPatch, repo: Repo, caplog: pytest.LogCaptureFixture
) -> None:
    machine(monkeypatch, cuda=2, mps=1)
    repo.commit({"rng": rng, "w": np.ones(2)})
    expected = numbers()
    live = {"rng": rng, "w": np.zeros(2)}
    for cuda, difference in ((0, "2 device(s) stored, 0 here"), (3, "2 device(s) stored, 3 here")):
        here = machine(monkeypatch, cuda=cuda)
        for state in here.cuda.states:
            state.fill_(99)
        live["w"] = np.zeros(2)
        numbers()
        with pytest.raises(StateMismatchError) as caught:
            repo.restore(live)
        assert caught.value.mismatched == (
            f"rng/torch/cuda ({difference})",
            "rng/torch/mps (1 device(s) stored, 0 here)",
        )
        assert not live["w"].any(), "refused before anything is changed"
        caplog.clear()
        repo.restore(live, strict=False)
        assert live["w"].all()
        assert numbers() == expected
        assert "torch/cuda" in caplog.text
        assert "torch/mps" in caplog.text
        assert [int(state[0]) for state in here.cuda.states] == [0, 1, 99][:cuda]


def test_a_state_that_a_device_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine(monkeypatch, cuda=1)
    state = rng.capture()
    state["torch"]["cuda"] = [torch.zeros(8, dtype=torch.uint8)]
    here.cuda.states[0].fill_(5)
    expected = torch.get_rng_state()
    with pytest.raises(InvalidError, match="generator of cuda:0: RNG state is wrong size"):
        rng.restore(state)
    assert torch.equal(torch.get_rng_state(), expected)


def test_an_unknown_device(monkeypatch: pytest.MonkeyPatch) -> None:
    state = rng.capture()
    state["torch"]["tpu"] = torch.zeros(3)
    with pytest.raises(StateMismatchError, match="torch/tpu"):
        rng.restore(state)
    rng.restore(state, strict=False)


# -- frameworks that are not there -----------------------------------------------------------------

ALONE = """
import random, sys, ckptvcs
assert "numpy" not in sys.modules
rng = ckptvcs.rng
assert rng is ckptvcs.rng and "rng" in dir(ckptvcs)
assert "torch" not in sys.modules
repo = ckptvcs.Repo.open(sys.argv[1], branch=sys.argv[2], create=True)
"""


def alone(folder: Path, branch: str, then: str) -> None:
    """Run a program in a process that has loaded no framework."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE + then, str(folder / "runs"), branch],
        cwd=Path(ckptvcs.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_torch_is_captured_and_left_alone_as_far_as_it_is_loaded(folder: Path) -> None:
    alone(
        folder,
        "plain",
        """
random.seed(5)
repo.commit({"rng": rng})
assert "torch" not in sys.modules and "torch" not in repo.checkout()["rng"]
""",
    )
    alone(
        folder,
        "plain",
        """
import torch
torch.manual_seed(7)
repo.restore({"rng": rng})
assert random.random() == random.Random(5).random()
assert torch.initial_seed() == 7
torch.manual_seed(9)
repo.on("torch").commit({"rng": rng})
""",
    )
    alone(
        folder,
        "torch",
        """
repo.restore({"rng": rng})
torch = sys.modules["torch"]
found = torch.rand(())
torch.manual_seed(9)
assert found == torch.rand(())
""",
    )


class Key:
    """A key as jax has them: immutable, typed or raw."""

    def __init__(self, data: list[int], impl: str | None = None) -> None:
        self.data = np.array(data, np.uint32)
        self.dtype = np.dtype("uint32") if impl is None else f"key<{impl}>"
        self.impl = impl

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        assert self.impl is None, "jax refuses to make an array of a typed key"
        return np.array(self.data)


def test_keys_of_jax(monkeypatch: pytest.MonkeyPatch, repo: Repo) -> None:
    """A double of the few functions that are used; the real one is among the integration tests."""
    jax = types.SimpleNamespace(
        Array=Key,
        dtypes=types.SimpleNamespace(
            prng_key="key", issubdtype=lambda dtype, kind: str(dtype).startswith(kind)
        ),
        numpy=types.SimpleNamespace(asarray=lambda data: Key(data.tolist())),
        random=types.SimpleNamespace(
            key_impl=lambda key: key.impl,
            key_data=lambda key: Key(key.data.tolist()),
            wrap_key_data=lambda data, impl: Key(data.data.tolist(), impl),
        ),
    )
    monkeypatch.setitem(sys.modules, "jax", jax)
    mine = rng.Generators(key=Key([1, 2], "fry"), raw=Key([3, 4]))
    repo.commit({"rng": mine})
    mine.update(key=Key([9, 9], "fry"), raw=Key([9, 9]))
    repo.restore({"rng": mine})
    assert (mine["key"].data.tolist(), mine["key"].impl) == ([1, 2], "fry")
    assert (mine["raw"].data.tolist(), mine["raw"].impl) == ([3, 4], None)
    assert rng.restore(rng.capture(k=Key([5, 6])), k=Key([0, 0]))["k"].data.tolist() == [5, 6]
    monkeypatch.delitem(sys.modules, "jax")
    with pytest.raises(InvalidError, match="jax is not loaded"):
        jax_keys.restored({"impl": None, "key": np.zeros(2, np.uint32)})


# -- several processes ----------------------------------------------------------------------------


def test_one_rank_alone_is_refused(monkeypatch: pytest.MonkeyPatch, repo: Repo) -> None:
    state = rng.capture()
    monkeypatch.setattr(distributed, "place", lambda: (0, 2))
    with pytest.raises(InvalidError, match="2 ranks have some"):
        repo.commit({"rng": rng})
    with pytest.raises(InvalidError, match="2 ranks have some"):
        repo.commit({"rng": rng.Generators()})
    with pytest.raises(StateMismatchError, match="generators of 1 process"):
        rng.restore(state)


def test_without_a_group_all_ranks_are_one(repo: Repo) -> None:
    state = rng.capture(all_ranks=True)
    expected = numbers()
    assert list(state) == ["ranks"]
    repo.commit({"rng": state})
    repo.restore({"rng": rng})
    assert numbers() == expected


def test_another_number_of_processes(repo: Repo, caplog: pytest.LogCaptureFixture) -> None:
    repo.commit({"rng": {"ranks": [rng.capture(), rng.capture(), rng.capture()]}, "w": 1})
    expected = numbers()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    live = {"rng": rng, "w": 0}
    with pytest.raises(StateMismatchError) as caught:
        repo.restore(live)
    difference = "rng/ranks (the generators of 3 process(es) stored, 1 run here)"
    assert caught.value.mismatched == (difference,)
    assert live["w"] == 0
    repo.restore(live, strict=False)
    assert live["w"] == 1
    assert numbers() == expected, "left alone"
    assert "3 process(es)" in caplog.text


RANK = """
import random, sys, numpy as np, torch, ckptvcs
import torch.distributed as dist
root, rank, phase = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{root}/store-{phase}", rank=rank, world_size=2)

def numbers():
    return [random.random(), float(np.random.rand()), float(torch.rand(())), float(mine["data"].random())]

mine = {"data": np.random.default_rng(rank + (50 if phase == "resume" else 0))}
with ckptvcs.Repo.open(root + "/runs", create=True) as repo:
    if phase == "save":
        random.seed(rank), np.random.seed(rank), torch.manual_seed(rank)
        numbers()
        states = ckptvcs.rng.capture(all_ranks=True, **mine)
        assert ("ranks" in states) == (rank == 0)
        if rank == 0:
            try:
                repo.commit({"rng": ckptvcs.rng})
            except ckptvcs.InvalidError as error:
                assert "all_ranks=True" in error.hint
            else:
                raise AssertionError("one rank committed what it could not see")
            repo.commit({"rng": states})
    else:
        repo.restore({"rng": ckptvcs.rng.Generators(**mine)})
    dist.barrier()
print(numbers(), flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_each_rank_takes_its_own(folder: Path) -> None:
    """Two real processes save together, and two others resume."""
    found = []
    for phase in ("save", "resume"):
        ranks = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", RANK, str(folder), str(rank), phase],
                cwd=Path(ckptvcs.__file__).parents[1],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        results = [process.communicate(timeout=120) for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], results
        found.append([out.splitlines()[-1] for out, _ in results])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
