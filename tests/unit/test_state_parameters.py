"""Which parameter an optimizer's entry belongs to."""

import pytest

from ckptvcs.state import tree
from ckptvcs.testing.memory import MemoryStore

torch = pytest.importorskip("torch")
nn = torch.nn


def model(tied=False):
    made = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    if tied:
        made[3].weight = made[2].weight
    return made


def stepped(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def told(state, only=None):
    store = MemoryStore()
    id = tree.write(store, state).tree
    return {entry.path: entry.parameter for entry in tree.entries(store, id, only) if entry.parameter}


def names_of(made):
    return [name for name, _ in made.named_parameters()]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adafactor])
def test_one_group_in_order(tied, make):
    made = model(tied)
    found = told({"run": {"model": made, "optimizer": stepped(make(made.parameters()))}, "step": 3})
    for number, name in enumerate(names_of(made)):
        assert {n for path, n in found.items() if path.startswith(f"run/optimizer/state/{number}/")} == {name}
    assert not any("model" in path for path in found)


def test_a_selection_is_told_by_the_whole():
    made = model()
    state = {"model": made, "optimizer": stepped(torch.optim.AdamW(made.parameters()))}
    assert told(state, "optimizer/state/2/exp_avg") == {"optimizer/state/2/exp_avg": "1.weight"}


def test_names_that_the_optimizer_knows_win():
    made = model()
    optimizer = torch.optim.SGD([
        {"params": [(name, p) for name, p in made.named_parameters() if p.ndim > 1]},
        {"params": [(name, p) for name, p in made.named_parameters() if p.ndim < 2]},
    ], momentum=0.9)  # fmt: skip
    found = told({"optimizer": stepped(optimizer)})
    assert found["optimizer/state/0/momentum_buffer"] == "0.weight"
    assert found["optimizer/state/3/momentum_buffer"] == "0.bias"


def test_nothing_is_guessed():
    made = model()
    parameters = list(made.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim < 2]},
    ]
    found = told({"m": made, "o": stepped(torch.optim.AdamW(groups))})
    assert found == dict.fromkeys(["o/state/0/step", "o/state/0/exp_avg", "o/state/0/exp_avg_sq"], "0.weight")
    assert told({"m": made, "o": stepped(torch.optim.AdamW(parameters[1:]))}) == {}
    assert told({"m": made, "o": stepped(torch.optim.AdamW(parameters[::-1]))}) == {}
    assert told({"o": stepped(torch.optim.AdamW(parameters))}) == {}
    twin = nn.Sequential(*[nn.Identity()], *model())
    both = {"m": made, "ema": twin, "o": stepped(torch.optim.AdamW(parameters))}
    assert told(both) == {}
    both["ema"] = model()
    assert told(both)["o/state/1/exp_avg"] == "0.bias"


def test_what_only_looks_like_an_optimizer():
    assert (
        told({"o": {"state": 3, "param_groups": [1, {"params": None}, {"params": [0], "param_names": [5]}]}})
        == {}
    )
    assert told({"state": {0: torch.ones(2)}, "param_groups": []}) == {}
