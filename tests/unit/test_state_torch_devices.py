"""Tensors on devices, played by tensors of the host that are said to be on one."""

import numpy as np
import pytest

from ckptvcs.state import torch_devices, torch_tensors, tree
from ckptvcs.state.restore import fill
from ckptvcs.testing.memory import MemoryStore
from ckptvcs.testing.same import difference

torch = pytest.importorskip("torch")


class Device:
    """Watches what moves to and from it."""

    def __init__(self, monkeypatch, buffer):
        self.buffers = []
        self.settled = 0
        self.pieces = []
        pinned, filling = torch_devices._pinned, torch_devices.DeviceSource.read

        def counted(nbytes):
            self.buffers.append(nbytes)
            return pinned(nbytes)

        def read(source, offset, length):
            self.pieces.append(length)
            return filling(source, offset, length)

        def settle(device):
            self.settled += 1

        monkeypatch.setattr(torch_devices, "on_host", lambda tensor: False)
        monkeypatch.setattr(torch_tensors, "device_type", lambda device: "fake")
        monkeypatch.setattr(torch_devices, "settle", settle)
        monkeypatch.setattr(torch_devices, "_pinned", counted)
        monkeypatch.setattr(torch_devices.DeviceSource, "read", read)
        monkeypatch.setattr(torch_devices.Staging.__init__, "__defaults__", (buffer, 2))


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch, 1 << 20)


def states():
    torch.manual_seed(0)
    base = torch.randn(300, 400)
    return {
        "large": torch.randn(700_000),
        "transposed": torch.randn(900, 700).t(),
        "gaps": torch.randn(600, 1000)[::2, 1:-3],
        "deep": torch.randn(7, 11, 13, 17, 30)[:, ::2, 1:, :, ::3],
        "channels": torch.randn(8, 16, 40, 40).to(memory_format=torch.channels_last),
        "expanded": torch.randn(1, 500).expand(400, 500),
        "shared": [base, base[10:], base.view(torch.uint8)[3], base.t()],
        "bytes": torch.randint(0, 255, (300_001,), dtype=torch.uint8),
        "complex": torch.randn(90_000, dtype=torch.complex128)[1:],
        "conj": torch.randn(900, dtype=torch.complex64).conj(),
        "bf16": torch.randn(1000).bfloat16(),
        "float8": torch.randn(1000).to(torch.float8_e5m2),
        "0-dim": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(300)),
        "sparse": torch.eye(50).to_sparse(),
    }


def test_pieces_make_the_same_tree(monkeypatch):
    state = states()
    store = MemoryStore()
    id = tree.write(store, state).tree
    device = Device(monkeypatch, 1 << 20)
    again = MemoryStore()
    assert tree.write(again, state).tree == id
    assert again.records.keys() == store.records.keys()
    assert max(device.pieces) <= 1 << 20
    assert len(device.buffers) <= 2
    assert device.settled == 1


def test_restoring_fills_what_is_on_a_device(device):
    state = states()
    del state["expanded"]  # no tensor whose elements share memory can be filled
    store = MemoryStore()
    id = tree.write(store, state).tree
    into = {name: torch.zeros_like(each) if torch.is_tensor(each) else 0 for name, each in state.items()}
    into["sparse"] = state["sparse"]
    into["shared"] = [torch.zeros(300, 400), torch.zeros(290, 400), torch.zeros(1600, dtype=torch.uint8),
                      torch.zeros(300, 400).t()]  # fmt: skip
    same = dict(into)
    device.buffers.clear()
    fill(store, id, into)
    assert len(device.buffers) <= 2
    assert all(into[name] is same[name] for name in ("large", "transposed", "channels", "parameter"))
    assert difference({**state, "parameter": state["parameter"].detach()},
                      {**into, "parameter": into["parameter"].detach()}) is None  # fmt: skip


def test_modules_and_optimizers_on_a_device(device):
    def make():
        model = torch.nn.Sequential(torch.nn.Linear(600, 700), torch.nn.BatchNorm1d(700))
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(8, 600)).sum().backward()
        optimizer.step()
        return {"m": model, "o": optimizer}

    first, second = make(), make()
    store = MemoryStore()
    id = tree.write(store, first).tree
    weight = second["m"][0].weight
    pointer = weight.data_ptr()
    device.buffers.clear()
    fill(store, id, second)
    assert second["m"][0].weight is weight
    assert weight.data_ptr() == pointer
    assert difference(first["m"].state_dict(), second["m"].state_dict()) is None
    assert tree.write(MemoryStore(), second).tree == id


def test_checking_out_to_a_device(device):
    state = states()
    store = MemoryStore()
    id = tree.write(store, state).tree
    device.buffers.clear()
    back = tree.read(store, id, device="cpu")
    assert len(device.buffers) <= 2
    assert difference(state, back) is None
    assert back["channels"].stride() == state["channels"].stride()
    assert back["shared"][0].data_ptr() == back["shared"][3].data_ptr()


@pytest.mark.parametrize("seed", range(20))
def test_any_range_of_any_tensor(monkeypatch, seed):
    random = np.random.default_rng(seed)
    shape = random.integers(1, 6, random.integers(0, 5))
    whole = torch.from_numpy(random.integers(0, 255, tuple(shape * 2), dtype=np.int32))
    cut = tuple(slice(int(random.integers(0, 2)), None, int(random.integers(1, 3))) for _ in shape)
    tensor = whole[cut].permute(*random.permutation(len(shape)).tolist()) if len(shape) else whole.reshape(())
    expected = tensor.contiguous().numpy().tobytes()
    source = torch_devices.DeviceSource(tensor, 4, torch_devices.Staging(24, 1))
    for _ in range(10):
        start, stop = sorted(int(each) for each in random.integers(0, len(expected) + 1, 2))
        assert bytes(source.read(start, stop - start)) == expected[start:stop], f"seed {seed}"

    def read(offset, memory):
        memory[:] = expected[offset : offset + len(memory)]

    target = torch.zeros_like(whole).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    torch_devices.fill(target, read, torch_devices.Staging(24, 1))
    assert torch.equal(target, tensor), f"seed {seed}"


def test_buffers_are_pinned_where_that_can_be():
    with torch_devices.Staging(4096, 1).buffer() as buffer:
        assert buffer.is_pinned() == torch.accelerator.is_available()
    torch_devices.settle(torch.device("cpu"))
