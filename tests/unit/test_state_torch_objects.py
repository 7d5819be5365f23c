"""Modules named without their wrappers, and what is spread over processes."""

import collections
import datetime

import pytest

from ckptvcs.errors import InvalidError, StateMismatchError, UnsupportedStateError
from ckptvcs.state import torch_objects, tree
from ckptvcs.state.restore import fill
from ckptvcs.testing.memory import MemoryStore
from ckptvcs.testing.same import difference

torch = pytest.importorskip("torch")
nn = torch.nn
averaging = torch.optim.swa_utils


def net():
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Sequential(nn.Linear(30, 8)))


def compiled(module):
    return torch.compile(module, backend="eager")


def checkpointed(module):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(module)


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=0, world_size=1, timeout=datetime.timedelta(seconds=20)
    )
    yield
    torch.distributed.destroy_process_group()


def in_the_middle(wrap):
    def wrapped(model):
        model[2][0] = wrap(model[2][0])
        return model

    return wrapped


WRAPPERS = {
    "compile": compiled,
    "data parallel": nn.DataParallel,
    "checkpoint": checkpointed,
    "compile in the middle": in_the_middle(compiled),
    "checkpoint in the middle": in_the_middle(checkpointed),
    "compile around checkpoint": lambda model: compiled(in_the_middle(checkpointed)(model)),
    "checkpoint around compile": lambda model: checkpointed(in_the_middle(compiled)(model)),
    "all at once": lambda model: nn.DataParallel(compiled(in_the_middle(checkpointed)(model))),
}


def check(wrap):
    torch.manual_seed(0)
    plain = net()
    wrapped = wrap(net())
    wrapped.load_state_dict(dict(zip(wrapped.state_dict(), plain.state_dict().values(), strict=True)))
    store = MemoryStore()
    id = tree.write(store, {"m": plain}).tree
    # The same state, so the same tree, whoever it was committed from.
    assert tree.write(store, {"m": wrapped}).tree == id
    for into in (net(), wrap(net()), compiled(net())):
        fill(store, id, {"m": into})
        assert [*into.state_dict().values()][-1].equal([*plain.state_dict().values()][-1])
        assert tree.write(MemoryStore(), {"m": into}).tree == id


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_leave_no_trace(name):
    check(WRAPPERS[name])


def test_distributed_data_parallel_leaves_no_trace(group):
    check(nn.parallel.DistributedDataParallel)
    check(lambda model: nn.parallel.DistributedDataParallel(compiled(model)))


def test_an_averaged_model_is_the_model_and_a_count():
    model = net()
    average = averaging.AveragedModel(model)
    average.update_parameters(model)
    store = MemoryStore()
    id = tree.write(store, {"m": average}).tree
    back = tree.read(store, id)["m"]
    assert list(back) == ["n_averaged", *model.state_dict()]
    assert back._metadata.keys() == model.state_dict()._metadata.keys()
    other = averaging.AveragedModel(net())
    fill(store, id, {"m": other})
    assert difference(average.state_dict(), other.state_dict()) is None
    into = net()
    with pytest.raises(StateMismatchError) as caught:
        fill(store, id, {"m": into})
    assert caught.value.unexpected == ("m/n_averaged",)
    done = fill(store, id, {"m": into}, strict=False)
    assert done.leftover["m/n_averaged"] == 1
    assert difference(model.state_dict(), into.state_dict()) is None


class Own(nn.Module):
    """A model whose attributes are called as wrappers call theirs."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(3, 3)
        self._orig_mod = nn.ModuleDict({"module": nn.Linear(2, 2)})


def test_a_real_attribute_keeps_its_name():
    model = Own()
    store = MemoryStore()
    id = tree.write(store, {"m": model}).tree
    assert list(tree.read(store, id)["m"]) == list(model.state_dict())
    assert tree.write(store, {"m": compiled(model)}).tree == id
    assert tree.write(store, {"m": nn.DataParallel(model)}).tree == id
    into = nn.DataParallel(Own())
    fill(store, id, {"m": into})
    assert difference(dict(model.state_dict()), dict(into.module.state_dict())) is None


def test_a_state_dict_given_as_such_keeps_its_names():
    wrapped = compiled(net())
    store = MemoryStore()
    id = tree.write(store, {"m": wrapped.state_dict()}).tree
    assert all(name.startswith("_orig_mod.") for name in tree.read(store, id)["m"])
    fill(store, id, {"m": compiled(net())})
    into = net()
    with pytest.raises(StateMismatchError) as caught:
        fill(store, id, {"m": into})
    assert "rename={'m/_orig_mod.': 'm/'} would pair them" in caught.value.hint
    fill(store, id, {"m": into}, rename={"m/_orig_mod.": "m/"})
    assert difference(dict(zip(into.state_dict(), wrapped.state_dict().values(), strict=True)),
                      dict(into.state_dict())) is None  # fmt: skip


def test_names_that_collide_are_refused():
    average = averaging.AveragedModel(nn.Linear(2, 2))
    average.module.register_buffer("n_averaged", torch.zeros(1))
    with pytest.raises(UnsupportedStateError, match="m: two entries are called 'n_averaged'"):
        tree.write(MemoryStore(), {"m": average})
    store = MemoryStore()
    id = tree.write(store, {"m": {"weight": torch.ones(2, 2)}}).tree
    with pytest.raises(InvalidError, match="m/n_averaged: two entries"):
        fill(store, id, {"m": average}, strict=False)


def test_versions_of_layers_reach_the_layers():
    seen = []

    class Versioned(nn.Linear):
        _version = 7

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
            seen.append((prefix, local_metadata.get("version")))
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    store = MemoryStore()
    id = tree.write(store, {"m": nn.Sequential(Versioned(2, 2))}).tree
    fill(store, id, {"m": compiled(nn.Sequential(Versioned(2, 2)))})
    fill(store, id, {"m": nn.ModuleDict({"a": Versioned(2, 2)})}, rename={"m/0": "m/a"})
    assert seen == [("_orig_mod.0.", 7), ("a.", 7)]


# -- rename, only and strict ----------------------------------------------------------------------


def stored(state):
    store = MemoryStore()
    return store, tree.write(store, state).tree


class Adapted(nn.Module):
    """Named like a model with PEFT adapters."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model
        for layer in list(model.modules()):
            if isinstance(layer, nn.Linear):
                layer.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})
                layer.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)})


def test_adapters_and_their_base():
    adapted, base = Adapted(net()), net()
    store, id = stored({"model": adapted})
    # Only the adapters, into another adapted model.
    into = Adapted(net())
    before = into.base_model.model[0].weight.clone()
    fill(store, id, {"model": into}, only="model/*lora_*")
    assert torch.equal(into.base_model.model[0].lora_A["default"].weight,
                       adapted.base_model.model[0].lora_A["default"].weight)  # fmt: skip
    assert torch.equal(into.base_model.model[0].weight, before)
    # The base out of it, into a plain model: the adapters have no place there.
    with pytest.raises(StateMismatchError) as caught:
        fill(store, id, {"model": base}, rename={"model/base_model.model.": "model/"})
    assert not caught.value.missing
    assert len(caught.value.unexpected) == 4
    done = fill(store, id, {"model": base}, rename={"model/base_model.model.": "model/"}, strict=False)
    assert sorted(done.leftover) == sorted(caught.value.unexpected)
    assert torch.equal(base[0].weight, adapted.base_model.model[0].weight)
    # And a plain model into the base of an adapted one.
    store, id = stored({"model": base})
    into = Adapted(net())
    with pytest.raises(StateMismatchError) as caught:
        fill(store, id, {"model": into})
    assert "rename={'model/': 'model/base_model.model.'}" in caught.value.hint
    done = fill(store, id, {"model": into}, rename={"model/": "model/base_model.model."}, strict=False)
    assert len(done.missing) == 4
    assert not done.leftover
    assert torch.equal(into.base_model.model[2][0].weight, base[2][0].weight)


def test_another_head_and_a_renamed_part():
    old = nn.ModuleDict({"backbone": net(), "head": nn.Linear(8, 3)})
    new = nn.ModuleDict({"encoder": net(), "head": nn.Linear(8, 5), "extra": nn.Linear(1, 1)})
    store, id = stored({"m": old, "step": 3})
    into = {"m": new, "step": 0}
    with pytest.raises(StateMismatchError) as caught:
        fill(store, id, into)
    error = caught.value
    assert [text.split(" ")[0] for text in error.mismatched] == ["m/head.weight", "m/head.bias"]
    assert len(error.unexpected) == 9
    assert len(error.missing) == 11
    assert "rename={'m/backbone.': 'm/encoder.'}" in error.hint
    for rename in ({"m/backbone.": "m/encoder."}, {"m/backbone": "m/encoder"}):
        done = fill(store, id, into, rename=rename, strict=False)
        assert set(done.leftover) == {"m/head.weight", "m/head.bias"}
        assert done.missing == ("m/extra.weight", "m/extra.bias")
        assert torch.equal(new["encoder"][0].weight, old["backbone"][0].weight)
        new = nn.ModuleDict({"encoder": net(), "head": nn.Linear(8, 5), "extra": nn.Linear(1, 1)})
        into = {"m": new, "step": 0}
    fill(store, id, into, rename={"m/backbone": "m/encoder"}, only="m/backbone.*")
    assert torch.equal(new["encoder"][0].weight, old["backbone"][0].weight)
    assert into["step"] == 0


def test_whole_states_change_their_place():
    model = net()
    store, id = stored(model)
    into = nn.ModuleDict({"inner": net()})
    fill(store, id, into, rename={"": "inner."})
    assert torch.equal(into["inner"][0].weight, model[0].weight)
    plain = {"net": {name: torch.zeros_like(value) for name, value in model.state_dict().items()}}
    fill(store, id, plain, rename={"": "net"})
    assert difference(plain["net"], dict(model.state_dict())) is None
    with pytest.raises(InvalidError, match=r"name '1.weight' there already"):
        fill(store, id, plain, rename={"2.0.": "1."})


def test_a_hint_names_what_is_near():
    store, id = stored({"model": 1, "lr": 2, "epoch": 3})
    with pytest.raises(StateMismatchError) as caught:
        fill(store, id, {"modell": 1, "lr": 2, "epochs": 3})
    assert "model for modell" in caught.value.hint
    assert "epoch for epochs" in caught.value.hint


# -- what is spread over processes -----------------------------------------------------------------


def test_sharded_tensors_and_modules_are_refused_before_any_collective(group, monkeypatch):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    sharded = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
    model = net()
    fully_shard(model[0], mesh=mesh)
    optimizer = torch.optim.AdamW([nn.Parameter(sharded)])
    buffered = net()
    buffered[2].register_buffer("cache", sharded)
    moments = torch.optim.AdamW([nn.Parameter(torch.ones(4, 4))])
    (parameter,) = moments.param_groups[0]["params"]
    moments.state[parameter]["exp_avg"] = sharded

    def collective(*_, **__):
        pytest.fail("something was called that may wait for other processes")

    for name in ("all_gather_into_tensor", "all_gather", "all_reduce", "broadcast", "barrier"):
        monkeypatch.setattr(torch.distributed, name, collective)
    monkeypatch.setattr(DTensor, "full_tensor", collective)
    monkeypatch.setattr(nn.Module, "state_dict", collective)
    monkeypatch.setattr(torch.optim.Optimizer, "state_dict", collective)
    for state, match in (
        ({"deep": [{"w": sharded}]}, "deep/0/w: a DTensor spread"),
        ({"m": model}, "m: 0 is a FSDPModule"),
        ({"m": {"inner": buffered}}, "m/inner: 2.cache is a DTensor"),
        ({"o": optimizer}, "o: parameter 0 of group 0 is a DTensor"),
        ({"o": moments}, "o: exp_avg of parameter 0 of group 0 is a DTensor"),
    ):
        with pytest.raises(InvalidError, match=match) as caught:
            tree.write(MemoryStore(), state)
        assert "DCP" in caught.value.hint
    store, id = stored({"x": {"w": torch.ones(4, 4)}})
    for target in (model, buffered, optimizer, moments, {"w": sharded}):
        with pytest.raises(InvalidError, match="spread over processes"):
            fill(store, id, {"x": target})


def test_parameters_that_deepspeed_took_apart_are_refused():
    model = nn.Linear(4, 4)
    model.weight.data = torch.empty(0)
    model.weight.ds_numel = 16
    with pytest.raises(InvalidError, match="m: weight is a parameter that DeepSpeed has spread"):
        tree.write(MemoryStore(), {"m": model})


def test_without_torch_objects_nothing_is_looked_at():
    assert torch_objects.unwrapped(net(), collections.OrderedDict(a=1)) == {"a": 1}
    torch_objects.refuse_sharded({"a": 1}, lambda: pytest.fail("no path is needed"))
