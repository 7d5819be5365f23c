"""Objects with load_state_dict: torch's optimizers and schedulers, and what loads in its own way."""

import copy
import subprocess
import sys

import numpy as np
import pytest

from ckptvcs.errors import CorruptionError, InvalidError, StateMismatchError
from ckptvcs.state import tree
from ckptvcs.state.restore import fill
from ckptvcs.testing.memory import MemoryStore
from ckptvcs.testing.same import difference
from tests.peaks import PEAK

torch = pytest.importorskip("torch")
nn, schedulers = torch.nn, torch.optim.lr_scheduler


class Watching(MemoryStore):
    """Remembers into which memory chunks were read."""

    def __init__(self):
        super().__init__()
        self.places = []

    def read_into(self, requests):
        self.places += [np.frombuffer(memory, "u1").ctypes.data for _, memory in requests]
        super().read_into(requests)


def stored(state):
    store = Watching()
    return store, tree.write(store, state).tree


def net(*shape, dtype=torch.float32):
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 8)).to(dtype)


def train(model, optimizer, steps=3, closure=False):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(16, 20, generator=generator).to(next(model.parameters()).dtype)

        def loss(batch=batch):
            optimizer.zero_grad()
            found = model(batch).float().square().mean()
            found.backward()
            return found

        if closure:
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()


OPTIMIZERS = {
    "ASGD": {},
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {"amsgrad": True},
    "AdamW": {"lr": torch.tensor(1e-3), "foreach": False},
    "Adamax": {},
    "LBFGS": {"max_iter": 3},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Rprop": {},
    "SGD": {"momentum": 0.9},
}
VARIANTS = list(OPTIMIZERS.items())
VARIANTS += [
    ("Adam", {"foreach": True}),
    ("AdamW", {"fused": True}),
    ("SGD", {"fused": True, "momentum": 0.9}),
]
VARIANTS += [("Adagrad", {"fused": True}), ("Adam", {"capturable": True, "foreach": False})]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda value: str(value)[:30])
def test_every_optimizer_goes_on_exactly(name, options):
    make = getattr(torch.optim, name)
    if options.get("capturable"):
        pytest.importorskip("torch.cuda")
        if not torch.accelerator.is_available():
            options = {"foreach": False}  # capturable steps are refused on the CPU

    def fresh(seed):
        torch.manual_seed(seed)
        model = net()
        return model, make(model.parameters(), **copy.deepcopy(options))

    model, optimizer = fresh(0)
    train(model, optimizer, closure=name == "LBFGS")
    store, id = stored({"m": model, "o": optimizer})
    others = []
    for warm in (False, True):
        other, again = fresh(1)
        if warm:
            train(other, again, steps=1, closure=name == "LBFGS")
        fill(store, id, {"m": other, "o": again})
        assert difference(optimizer.state_dict(), again.state_dict()) is None
        assert tree.write(MemoryStore(), {"m": other, "o": again}).tree == id
        train(other, again, closure=name == "LBFGS")
        others.append(other)
    train(model, optimizer, closure=name == "LBFGS")
    for other in others:
        assert difference(model.state_dict(), other.state_dict()) is None


def test_muon_and_sparse_adam():
    embedding, matrix = nn.Embedding(50, 8, sparse=True), nn.Linear(8, 8, bias=False)
    first = {
        "s": torch.optim.SparseAdam(embedding.parameters()),
        "m": torch.optim.Muon(matrix.parameters()),
    }
    matrix(embedding(torch.tensor([1, 4, 4]))).square().sum().backward()
    for optimizer in first.values():
        optimizer.step()
    second = {
        "s": torch.optim.SparseAdam(copy.deepcopy(embedding).parameters()),
        "m": torch.optim.Muon(copy.deepcopy(matrix).parameters()),
    }
    store, id = stored(first)
    fill(store, id, second)
    assert tree.write(MemoryStore(), second).tree == id


def halves(moments):
    """An optimizer with bfloat16 parameters, or float32 ones, and moments of the other dtype."""
    torch.manual_seed(3)
    parameters = torch.float32 if moments is torch.bfloat16 else torch.bfloat16
    model = net(dtype=parameters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, steps=2)
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = (state[key].to(torch.float64) * 1.0000001).to(moments)
    return model, optimizer


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("warm", [False, True])
def test_a_cast_of_moments_is_undone(moments, warm):
    model, optimizer = halves(moments)
    store, id = stored({"m": model, "o": optimizer})
    other = copy.deepcopy(model)
    again = torch.optim.AdamW(other.parameters(), lr=0.1)
    plain = torch.optim.AdamW(other.parameters(), lr=0.1)
    plain.load_state_dict(optimizer.state_dict())
    assert difference(optimizer.state_dict(), plain.state_dict()) is not None  # what torch does by itself
    if warm:
        train(other, again, steps=1)
    fill(store, id, {"m": other, "o": again})
    assert all(state["exp_avg"].dtype is moments for state in again.state.values())
    assert difference(optimizer.state_dict(), again.state_dict()) is None
    assert tree.write(MemoryStore(), {"m": other, "o": again}).tree == id


def test_a_part_of_an_optimizer_leaves_the_rest_uncast():
    _, optimizer = halves(torch.float32)
    store, id = stored({"o": optimizer})
    before = copy.deepcopy(optimizer.state_dict())
    for state in optimizer.state.values():
        state["exp_avg"].add_(1)
    fill(store, id, {"o": optimizer}, only="o/state/2/exp_avg")
    now = optimizer.state_dict()
    assert difference(before["state"][2], now["state"][2]) is None
    assert now["state"][0]["exp_avg"].dtype is torch.float32
    assert torch.equal(now["state"][0]["exp_avg"], before["state"][0]["exp_avg"] + 1)


@pytest.mark.parametrize("only", ["o/param_groups/0/lr", "o/param_groups/0", "o/*/0/lr"])
def test_a_part_of_a_list_in_an_object_is_refused_before_anything_is_changed(only):
    """Laid over what the optimizer has it would replace the whole list."""
    model = net(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    train(model, optimizer)
    store, id = stored({"o": optimizer, "n": 1})
    live = torch.optim.AdamW(model.parameters(), lr=0.25)
    target = {"o": live, "n": 2}
    with pytest.raises(InvalidError, match="part of o/param_groups, a list") as caught:
        fill(store, id, target, only=[only, "n"])
    assert "o/param_groups" in caught.value.hint
    assert target["n"] == 2
    assert live.param_groups[0]["lr"] == 0.25
    fill(store, id, target, only=["o/param_groups", "n"])
    assert target["n"] == 1
    assert live.param_groups[0]["lr"] == 0.5


class CastingOptimizer(torch.optim.SGD):
    """Loads in its own way, so what it does is not undone but told."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].half().float()


class Casting:
    def __init__(self):
        self.values = {"w": torch.zeros(500), "step": 0, "extra": [1, 2]}

    def state_dict(self):
        return self.values

    def load_state_dict(self, state):
        self.values = {"w": state["w"].bfloat16(), "step": float(state["step"]), "new": 1}


def test_whatever_an_object_changes_is_listed():
    model = net()
    optimizer = CastingOptimizer(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    store, id = stored({"o": optimizer, "c": Casting()})
    into = {"o": CastingOptimizer(net().parameters(), lr=0.1, momentum=0.9), "c": Casting()}
    with pytest.raises(StateMismatchError) as caught:
        fill(store, id, into)
    assert [text.split(" ")[0] for text in caught.value.altered] == [
        *(f"o/state/{number}/momentum_buffer" for number in range(6)),
        "c/w",
        "c/step",
        "c/extra",
    ]
    assert "strict=False" in caught.value.hint
    assert "bfloat16" in str(caught.value)
    done = fill(store, id, into, strict=False)
    assert set(done.altered) >= {"c/w", "c/step", "c/extra", "o/state/0/momentum_buffer"}
    assert done.missing == ()


@pytest.mark.parametrize(
    "make",
    [
        lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
        lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.9),
        lambda o: schedulers.StepLR(o, 2),
        lambda o: schedulers.MultiStepLR(o, [1, 3]),
        lambda o: schedulers.ConstantLR(o),
        lambda o: schedulers.LinearLR(o),
        lambda o: schedulers.ExponentialLR(o, 0.9),
        lambda o: schedulers.PolynomialLR(o),
        lambda o: schedulers.CosineAnnealingLR(o, 5),
        lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
        lambda o: schedulers.CyclicLR(o, 0.01, 0.1, mode="exp_range"),
        lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20),
        lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
        lambda o: schedulers.ChainedScheduler([schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.9)]),
        lambda o: schedulers.SequentialLR(
            o, [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.9)], milestones=[2]
        ),
        lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
    ],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_every_scheduler_goes_on_exactly(make):
    def fresh():
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return {"m": model, "o": optimizer, "s": make(optimizer)}

    def steps(state, count):
        rates = []
        for at in range(count):
            state["o"].step()
            plateau = isinstance(state["s"], schedulers.ReduceLROnPlateau)
            state["s"].step(*([1.0 + at] if plateau else []))
            rates.append(state["o"].param_groups[0]["lr"])
        return rates

    first, second = fresh(), fresh()
    steps(first, 3)
    store, id = stored(first)
    fill(store, id, second)
    assert tree.write(MemoryStore(), second).tree == id
    assert steps(first, 5) == steps(second, 5)


class Decay:
    """A callable object keeps its attributes in the scheduler's state; a lambda keeps nothing."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, epoch):
        return self.rate**epoch


def test_schedules_that_are_objects_and_grad_scalers():
    def fresh(rate):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
        return {
            "s": schedulers.LambdaLR(optimizer, Decay(rate)),
            "g": torch.amp.GradScaler("cpu", init_scale=rate),
        }

    store, id = stored(fresh(0.5))
    into = fresh(0.25)
    fill(store, id, into)
    assert into["s"].lr_lambdas[0].rate == 0.5
    assert into["g"].get_scale() == 0.5


class Loader(torch.utils.data.DataLoader):
    """Like a StatefulDataLoader: asking for its state starts its workers."""

    asked = 0

    def state_dict(self):
        type(self).asked += 1
        return {"position": 5, "workers": [{"bytes": b"\x00" * 3000, "count": 2}], "rng": torch.arange(600)}

    def load_state_dict(self, state):
        self.loaded = state


def test_a_data_loader_is_not_asked_again():
    loader = Loader([1, 2, 3])
    store, id = stored({"data": loader})
    asked = Loader.asked
    into = {"data": Loader([1, 2, 3])}
    fill(store, id, into)
    assert Loader.asked == asked
    assert difference(loader.state_dict(), into["data"].loaded) is None


# -- in place -------------------------------------------------------------------------------------


def pointers(state):
    return {key: value.data_ptr() for key, value in state.items() if torch.is_tensor(value)}


def test_parameters_and_moments_are_read_into_where_they_are():
    model, optimizer = net(), None
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    store, id = stored({"m": model, "o": optimizer})
    other = net()
    again = torch.optim.AdamW(other.parameters())
    train(other, again, steps=1)
    before = pointers(other.state_dict())
    moments = [state["exp_avg"] for state in again.state.values()]
    store.places.clear()
    fill(store, id, {"m": other, "o": again})
    large = {other[0].weight.data_ptr(), other[2].weight.data_ptr(), moments[0].data_ptr()}
    assert large <= set(store.places)
    assert set(store.places) <= set(before.values()) | {
        each.data_ptr() for state in again.state.values() for each in state.values() if torch.is_tensor(each)
    }
    assert pointers(other.state_dict()) == before
    assert all(a is b["exp_avg"] for a, b in zip(moments, again.state.values(), strict=True))
    assert difference(model.state_dict(), other.state_dict()) is None


MEMORY = f"""
{PEAK}
import torch
from ckptvcs import Repo

model = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000, bias=False) for _ in range(30)))
optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
state = dict(m=model, o=optimizer)
warm = sys.argv[2] != "fresh"
if warm:
    for parameter in model.parameters():
        moments = dict((key, torch.full_like(parameter, 0.5)) for key in ("exp_avg", "exp_avg_sq"))
        optimizer.state[parameter] = dict(step=torch.tensor(1.0), **moments)
if sys.argv[2] == "write":
    Repo.init(sys.argv[1], compression="fast").commit(state)
    sys.exit()
repo = Repo.open(sys.argv[1])
before = peak()
repo.restore(state)
print(peak() - before)
"""


@pytest.mark.slow
def test_restoring_takes_no_second_copy(tmp_path):
    def run(mode):
        command = [sys.executable, "-c", MEMORY, str(tmp_path), mode]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    run("write")
    whole = 3 * 30 * 4_000_000
    assert int(run("warm")) < 0.2 * whole
    # Moments that are not there yet are made once.
    assert whole / 2 < int(run("fresh")) < whole * 2 / 3 + 0.2 * whole


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.jit.script(nn.Sequential(nn.Linear(30, 30), nn.BatchNorm1d(30))),
        lambda: nn.MultiheadAttention(32, 4),
        lambda: nn.LSTM(30, 30, 2),
        lambda: nn.ParameterList([torch.randn(30), torch.randn(400)]),
        lambda: nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last),
        lambda: nn.Linear(30, 30).to(torch.float8_e4m3fn),
        lambda: nn.Linear(30, 30, dtype=torch.complex64),
        lambda: nn.InstanceNorm1d(300, affine=True, track_running_stats=True),
        lambda: nn.Linear(30, 30).share_memory(),
    ],
)
def test_modules_of_many_kinds(make):
    torch.manual_seed(0)
    model, into = make(), make()
    store, id = stored({"m": model})
    fill(store, id, {"m": into})
    assert tree.write(MemoryStore(), {"m": into}).tree == id


class Transposing(nn.Module):
    """Keeps its weight the other way round in the state than in memory."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(30, 30))
        self.plain = nn.Linear(30, 30)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.weight.detach().t()

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        with torch.no_grad():
            self.weight.copy_(state_dict[prefix + "weight"].t())


class Extra(nn.Linear):
    def __init__(self):
        super().__init__(30, 20)
        self.extra = {"history": torch.zeros(3), "n": 0}

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_what_loads_in_its_own_way_does():
    first, second = (
        nn.ModuleDict(
            {
                "t": Transposing(),
                "e": Extra(),
                "w": nn.utils.parametrizations.weight_norm(nn.Linear(20, 20)),
                "o": nn.utils.parametrizations.orthogonal(nn.Linear(20, 20)),
                "s": nn.utils.spectral_norm(nn.Linear(20, 20)),
            }
        )
        for _ in range(2)
    )
    first["e"].extra = {"history": torch.ones(100), "n": 7}
    seen = []
    second["e"].register_load_state_dict_post_hook(lambda *_: seen.append("post"))
    second["w"].register_load_state_dict_pre_hook(lambda *_: seen.append("pre"))
    store, id = stored({"m": first})
    fill(store, id, {"m": second})
    assert torch.equal(first["t"].weight, second["t"].weight)
    assert difference(first.state_dict(), second.state_dict()) is None
    assert second["e"].extra["n"] == 7
    assert sorted(seen) == ["post", "pre"]
    assert tree.write(MemoryStore(), {"m": second}).tree == id


def test_lazy_and_meta_modules_get_what_is_stored():
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 8))
    store, id = stored({"m": model})
    lazy = nn.Sequential(nn.LazyLinear(30), nn.LazyLinear(8))
    fill(store, id, {"m": lazy})
    assert difference(model.state_dict(), lazy.state_dict()) is None
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 8))
    meta[1] = nn.Linear(30, 8)
    kept = meta[1].weight
    fill(store, id, {"m": meta})
    assert difference(model.state_dict(), meta.state_dict()) is None
    assert meta[1].weight is kept
    assert isinstance(meta[0].weight, nn.Parameter)


def test_tied_weights():
    def tied(share):
        model = nn.ModuleDict({"a": nn.Linear(30, 30), "b": nn.Linear(30, 30)})
        if share:
            model["b"].weight = model["a"].weight
        return model

    model = tied(True)
    store, id = stored({"m": model})
    into = tied(True)
    store.places.clear()
    fill(store, id, {"m": into})
    assert store.places.count(into["a"].weight.data_ptr()) == 1
    assert into["b"].weight is into["a"].weight
    assert difference(model.state_dict(), into.state_dict()) is None
    apart = tied(False)
    fill(store, id, {"m": apart})
    assert difference(model.state_dict(), apart.state_dict()) is None
    # The reverse would have to lose one of two weights.
    store, id = stored({"m": tied(False)})
    before = copy.deepcopy(into.state_dict())
    with pytest.raises(StateMismatchError, match=r"m/b.weight .shares its memory"):
        fill(store, id, {"m": into})
    assert difference(before, into.state_dict()) is None


def test_a_damaged_chunk_says_that_the_target_is_partly_filled():
    model = nn.Linear(30, 30)
    store, id = stored({"m": model})

    def broken(requests):
        raise CorruptionError("a chunk is damaged")

    store.read_into = broken
    with pytest.raises(CorruptionError) as caught:
        fill(store, id, {"m": nn.Linear(30, 30)})
    assert any("partly" in note for note in caught.value.__notes__)


# -- shapes ---------------------------------------------------------------------------------------


def test_groups_and_shapes_are_compared_before_anything_is_changed():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    store, id = stored({"m": model, "o": optimizer})
    other = net()
    before = copy.deepcopy(other.state_dict())
    split = torch.optim.AdamW(
        [{"params": list(other.parameters())[:2]}, {"params": list(other.parameters())[2:]}]
    )
    with pytest.raises(StateMismatchError, match=r"o .groups of \[6\] .*\[2, 4\]"):
        fill(store, id, {"m": other, "o": split})
    assert difference(before, other.state_dict()) is None
    head = nn.Sequential(*net()[:2], nn.Linear(30, 5))
    again = torch.optim.AdamW(head.parameters())
    with pytest.raises(StateMismatchError) as caught:
        fill(store, id, {"m": head, "o": again})
    assert [text.split(" ")[0] for text in caught.value.mismatched] == [
        "m/2.weight",
        "m/2.bias",
        "o/state/4",
        "o/state/5",
    ]
    done = fill(store, id, {"m": head, "o": again}, strict=False)
    assert set(done.leftover) == {"m/2.weight", "m/2.bias", "o/state/4", "o/state/5"}
    assert list(again.state_dict()["state"]) == [0, 1, 2, 3]
    assert torch.equal(head[0].weight, model[0].weight)
    train(head, again)


class Older(torch.optim.AdamW):
    """As most optimizers from elsewhere: knows how to unpickle what earlier versions wrote."""

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("trust", 1)


def test_casts_of_optimizers_from_elsewhere_are_undone():
    model, optimizer = halves(torch.float32)
    store, id = stored({"o": optimizer})
    again = Older(copy.deepcopy(model).parameters(), lr=0.1)
    fill(store, id, {"o": again})
    assert difference(optimizer.state_dict()["state"], again.state_dict()["state"]) is None
    assert again.param_groups[0]["trust"] == 1


class Own(nn.Module):
    """Has a state that is none of names and tensors."""

    def __init__(self, items):
        super().__init__()
        self.items = items

    def state_dict(self):
        return self.items

    def load_state_dict(self, items):
        self.items = items


def test_modules_whose_state_is_something_else():
    store, id = stored({"a": Own([1, torch.ones(300)]), "b": Own({1: torch.ones(300), "n": {"deep": 2}})})
    into = {"a": Own([]), "b": Own({1: None, "n": None})}
    fill(store, id, into)
    assert into["a"].items[0] == 1
    assert torch.equal(into["b"].items[1], torch.ones(300))
