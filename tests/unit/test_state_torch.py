import subprocess
import sys

import numpy as np
import pytest

from ckptvcs.errors import InvalidError, StateMismatchError, UnsupportedStateError
from ckptvcs.state import tensors, tree
from ckptvcs.state.restore import fill
from ckptvcs.state.values import TensorSubclassValue
from ckptvcs.testing.memory import MemoryStore
from ckptvcs.testing.same import difference

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of :UserWarning"),  # masked and nested tensors
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
]


def check(state):
    store = MemoryStore()
    written = tree.write(store, state)
    back = tree.read(store, written.tree)
    assert difference(state, back) is None
    assert tree.write(MemoryStore(), back).tree == written.tree
    return back


@pytest.mark.parametrize("name", tensors.TORCH_SIZES)
def test_every_dtype(name):
    dtype = getattr(torch, name)
    assert dtype.itemsize == tensors.TORCH_SIZES[name]
    base = torch.randint(0, 256, (9600,), dtype=torch.uint8)
    t = torch.empty(0, dtype=dtype).set_(base.untyped_storage(), 2, (15, 20), (20, 1))
    check({"a": t, "e": torch.empty(0, 3, dtype=dtype), "0": torch.empty((), dtype=dtype)})
    check(t.t())


def test_flags_and_lazy_bits():
    back = check(
        {
            "grad": torch.ones(3, requires_grad=True),
            "parameter": torch.nn.Parameter(torch.ones(2)),
            "frozen": torch.nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False),
            "conj": torch.tensor([1 + 2j, 3]).conj(),
            "neg": torch.tensor([1 + 2j, 3]).conj().imag,
            "result": (torch.ones(3, requires_grad=True) * 2),
        }
    )
    back["grad"].sum().backward()
    assert type(back["parameter"]) is torch.nn.Parameter


def test_memory_formats():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    back = check(
        {
            "x": x,
            "t": torch.randn(30, 40).t(),
            "gaps": torch.randn(9, 9)[::2, 1:],
            "wide": torch.ones(1).expand(500),
        }
    )
    assert back["x"].is_contiguous(memory_format=torch.channels_last)
    assert back["x"].stride() == x.stride()
    assert back["gaps"].is_contiguous()
    assert back["wide"].untyped_storage().nbytes() == 2000


def test_sharing_and_resizable_storage():
    shared = torch.nn.Linear(4, 4)
    module = torch.nn.ModuleDict({"a": shared, "b": shared})
    fused = torch.randn(3, 8)
    back = check(
        {
            "m": module.state_dict(),
            "p": shared.weight,
            "q": fused[0:2],
            "k": fused[1:],
            "bytes": fused.view(torch.uint8)[1],
        }
    )
    assert back["m"]["a.weight"].data_ptr() == back["m"]["b.weight"].data_ptr() == back["p"].data_ptr()
    back["k"][0] = 5
    assert (back["q"][1] == 5).all()
    assert back["bytes"].view(torch.float32)[0] == 5
    for tensor in (back["m"]["a.bias"], shared.bias):
        tensor.untyped_storage().resize_(0)
    with pytest.raises(UnsupportedStateError, match="freed"):
        tree.write(MemoryStore(), shared)


def test_sparse_and_quantised():
    d = torch.randn(4, 4).relu()
    uncoalesced = torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 2), check_invariants=True)
    back = check(
        {
            "coo": d.to_sparse(),
            "uncoalesced": uncoalesced,
            "hybrid": torch.randn(3, 4, 2).to_sparse(1),
            "csr": d.to_sparse_csr(),
            "csc": d.to_sparse_csc(),
            "bsr": d.to_sparse_bsr((2, 2)),
            "bsc": d.to_sparse_bsc((2, 2)),
            "q": torch.quantize_per_tensor(d, 0.1, 3, torch.qint8),
            "q32": torch.quantize_per_tensor(d, 0.1, 0, torch.qint32),
            "qc": torch.quantize_per_channel(
                d, torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 2, 3, 4]), 1, torch.quint8
            ),
        }
    )
    assert back["q"].q_scale() == 0.1
    assert back["q"].q_zero_point() == 3
    assert back["qc"].q_per_channel_axis() == 1
    assert back["qc"].q_per_channel_zero_points().tolist() == [1, 2, 3, 4]


def test_other_torch_values():
    generator = torch.Generator().manual_seed(7)
    torch.rand(3, generator=generator)
    back = check(
        {
            "g": generator,
            "size": torch.Size([1, 2]),
            "dtype": torch.bfloat16,
            "device": torch.device("cuda:1"),
            "constants": [torch.strided, torch.sparse_bsc, torch.channels_last_3d, torch.per_tensor_affine],
        }
    )
    assert torch.equal(torch.rand(9, generator=back["g"]), torch.rand(9, generator=generator))


def test_modules_and_optimizers_are_their_state_dicts():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    store = MemoryStore()
    a = tree.write(store, {"m": module, "o": optimizer})
    b = tree.write(store, {"m": module.state_dict(), "o": optimizer.state_dict()})
    assert a == b
    assert tree.read(store, a.tree)["m"]._metadata == module.state_dict()._metadata


def test_conversion_between_frameworks():
    state = {
        "b": torch.randn(400).bfloat16(),
        "v": torch.arange(12).reshape(3, 4),
        "p": torch.nn.Parameter(torch.ones(2)),
        "s": torch.Size([2]),
        "d": torch.float8_e5m2,
    }
    state["w"] = state["v"].t()
    store = MemoryStore()
    written = tree.write(store, state)
    plain = tree.read(store, written.tree, framework="numpy")
    assert plain["b"].dtype.name == "bfloat16"
    assert plain["b"].tobytes() == state["b"].view(torch.int16).numpy().tobytes()
    assert np.shares_memory(plain["v"], plain["w"])
    assert plain["s"] == (2,)
    assert plain["d"] == "float8_e5m2"
    written = tree.write(store, plain)
    again = tree.read(store, written.tree, framework="torch")
    assert torch.equal(again["b"], state["b"])
    assert again["v"].data_ptr() == again["w"].data_ptr()
    reverse = np.arange(10.0)[::-1]
    written = tree.write(store, [reverse, reverse, np.arange(4, dtype=">i2")])
    found = tree.read(store, written.tree, framework="torch")
    assert found[0].tolist() == reverse.tolist()
    assert found[2].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("state", "framework"),
    [
        ({"x": {"q": torch.empty(2, dtype=torch.bits8)}}, "numpy"),
        ({"x": {"q": torch.eye(2).to_sparse()}}, "numpy"),
        ({"x": {"q": np.array(["a"])}}, "torch"),
        ({"x": {"q": np.zeros(1, "M8[s]")}}, "torch"),
    ],
)
def test_without_counterpart(state, framework):
    store = MemoryStore()
    with pytest.raises(InvalidError, match="x/q"):
        tree.read(store, tree.write(store, state).tree, framework=framework)


def test_devices():
    store = MemoryStore()
    t = torch.ones(500)
    written = tree.write(store, {"a": {"x": t, "y": t}, "b": torch.ones(500), "n": np.ones(3)})
    back = tree.read(store, written.tree, device={"a": "meta"})
    assert back["a"]["x"].device.type == "meta"
    assert back["b"].device.type == "cpu"
    assert tree.read(store, written.tree, device="meta")["b"].device.type == "meta"
    assert tree.read(store, written.tree, device=torch.device("cpu"))["a"]["x"].device.type == "cpu"


def test_refused_tensors():
    state = {
        "meta": torch.ones(2, device="meta"),
        "special": torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False])),
        "set": {torch.ones(1)},
    }
    with pytest.raises(UnsupportedStateError) as caught:
        tree.write(MemoryStore(), state)
    assert [path for path, _ in caught.value.leaves][:2] == ["meta", "special"]
    fake = type("DTensor", (torch.Tensor,), {"__module__": "torch.distributed.tensor"})
    with pytest.raises(InvalidError, match="DTensor") as refused:
        tree.write(MemoryStore(), {"w": torch.ones(2).as_subclass(fake)})
    assert "DCP" in refused.value.hint
    wrapped = type("FullyShardedDataParallel", (torch.nn.Linear,), {"__module__": "torch.distributed.fsdp"})(
        2, 2
    )
    wrapped.state_dict = lambda: pytest.fail("a collective")
    with pytest.raises(InvalidError, match="FullySharded"):
        tree.write(MemoryStore(), {"m": wrapped})


WITHOUT = """
import sys; sys.path.insert(0, ".")
import ckptvcs.state.tree as tree, ckptvcs.state.restore
assert "torch" not in sys.modules
sys.modules["torch"] = None  # an import of it fails from here on
import numpy as np, pickle
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.testing.memory import MemoryStore
store = MemoryStore()
store.records, root = pickle.load(sys.stdin.buffer)
assert [entry.kind for entry in tree.entries(store, root)] == ["tensor", "size", "sparse"]
print(tree.read(store, root, only=["w", "s"], framework="numpy"))
try:
    tree.read(store, root)
except Exception as error:
    print(type(error).__name__, error.hint)
"""


def test_without_torch():
    import pickle

    store = MemoryStore()
    written = tree.write(store, {"w": torch.arange(3), "s": torch.Size([2]), "x": torch.eye(2).to_sparse()})
    # Stored bytes and ids only, handed to a child.
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        input=pickle.dumps((store.records, written.tree)),
        capture_output=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr.decode()
    assert "array([0, 1, 2])" in found.stdout.decode()
    assert "InvalidError" in found.stdout.decode()
    assert 'framework="numpy"' in found.stdout.decode()


class Marked(torch.Tensor):
    """Changes nothing but its name, and may carry attributes."""


class Functional(torch.Tensor):
    """Has a say in every function, and none in what its memory is."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} of a class from outside was called")


def marked(data, **attributes):
    tensor = data.as_subclass(Marked)
    vars(tensor).update(attributes)
    return tensor


def two(a, b):
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(a, b)


def subclasses(seed):
    torch.manual_seed(seed)
    module = torch.nn.Linear(30, 20)
    module.weight = torch.nn.Parameter(two(torch.randn(20, 30), torch.randn(20, 30)))
    return {
        "marked": marked(torch.randn(3, 4).t(), scale=0.5, names=["a"]),
        "functional": torch.Tensor.as_subclass(torch.randn(300), Functional),
        "parameter": torch.nn.Parameter(marked(torch.randn(400))),
        "two": two(torch.randn(300), torch.randn(300)),
        "nested": two(two(torch.randn(300), torch.randn(300)), two(torch.randn(300), torch.randn(300))),
        "module": module,
    }


def test_subclasses_come_back_as_stand_ins_and_in_place():
    state = subclasses(0)
    store = MemoryStore()
    id = tree.write(store, state).tree
    back = tree.read(store, id)
    assert type(back["marked"]) is TensorSubclassValue
    assert back["marked"].type == f"{__name__}:Marked"
    assert torch.equal(back["marked"][""], state["marked"].as_subclass(torch.Tensor))
    assert back["marked"].context == {"scale": 0.5, "names": ["a"]}
    assert back["parameter"].flags == 6
    assert torch.equal(back["nested"]["b"]["a"], state["nested"].b.a)
    assert difference(state["two"], back["two"]) is None
    assert tree.write(MemoryStore(), back).tree == id
    assert tree.read(store, id, framework="numpy")["two"]["a"].dtype == "f4"
    listed = {entry.path: entry for entry in tree.entries(store, id)}
    assert (listed["two"].kind, listed["two"].dtype, listed["two"].nbytes) == ("subclass", "TwoTensor", 2400)
    into = subclasses(1)
    same = dict(into)
    fill(store, id, into)
    assert all(into[name] is same[name] for name in into)
    assert tree.write(MemoryStore(), into).tree == id
    assert type(into["module"].weight.a) is torch.Tensor


def test_what_is_no_like_subclass_is_not_filled():
    state = subclasses(0)
    store = MemoryStore()
    id = tree.write(store, {"x": state["two"], "o": {"w": state["two"]}, "m": state["module"]}).tree

    class Owner:
        def load_state_dict(self, state):
            raise AssertionError("a stand-in is no tensor")

    into = {"x": torch.zeros(300), "o": Owner(), "m": torch.nn.Linear(30, 20)}
    with pytest.raises(StateMismatchError) as caught:
        fill(store, id, into)
    assert [text.split(" ")[0] for text in caught.value.mismatched] == ["x", "o", "m/weight"]
    assert "TwoTensor cannot be made without its class" in str(caught.value)
    done = fill(store, id, into, strict=False)
    assert set(done.leftover) == {"x", "o", "m/weight"}
    assert torch.equal(into["m"].bias, state["module"].bias)
    id = tree.write(store, {"x": marked(torch.ones(4), scale=1)}).tree
    with pytest.raises(StateMismatchError, match="same make"):
        fill(store, id, {"x": marked(torch.zeros(4), scale=2)})
    # A plain tensor into a subclass would be converted by its class.
    id = tree.write(store, {"m": torch.nn.Linear(30, 20)}).tree
    with pytest.raises(StateMismatchError):
        fill(store, id, {"m": state["module"]})


def test_what_has_no_portable_form_is_named():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    jagged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    state = {
        "nested": nested,
        "jagged": jagged,
        "lazy": torch.nn.LazyLinear(3),
        "mkldnn": torch.ones(3).to_mkldnn(),
        "storage": torch.ones(3).untyped_storage(),
        "attribute": marked(torch.ones(2), hook=print),
    }
    with pytest.raises(UnsupportedStateError) as caught:
        tree.write(MemoryStore(), state)
    found = dict(caught.value.leaves)
    assert list(found) == [
        "nested",
        "jagged",
        "lazy/weight",
        "lazy/bias",
        "mkldnn",
        "storage",
        "attribute/None/hook",
    ]
    assert ".unbind()" in found["nested"]
    assert ".offsets()" in found["jagged"]
    assert "first called" in found["lazy/weight"]
    assert ".to_dense()" in found["mkldnn"]
    assert "tensor over it" in found["storage"]


@pytest.mark.parametrize("base", [torch.ones(4, 5), torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2)])
def test_every_shape_of_memory(base):
    check(
        {
            "0-dim": base[0, 0],
            "expanded": base[:1].expand(7, *base.shape[1:]),
            "flipped": base.flip(0),
            "diagonal": base.diagonal(),
            "unfolded": base.reshape(-1).unfold(0, 4, 2),
            "narrow": base.narrow(1, 1, 2),
            "channels_last": base.new_ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "channels_last_3d": base.new_ones(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
            "batched csr": base.new_ones(2, 3, 3).to_sparse_csr(),
            "dense dims": base.new_ones(3, 4, 2).to_sparse_csr(dense_dim=1),
            "batched bsr": base.new_ones(2, 4, 4).to_sparse_bsr((2, 2)),
            "empty coo": torch.sparse_coo_tensor(size=(3, 4)),
            "0-dim coo": torch.sparse_coo_tensor(
                torch.empty(0, 1, dtype=torch.int64), base[0, :1].reshape(-1)[:1], ()
            ),
            "sparse parameter": torch.nn.Parameter(torch.eye(3).to_sparse()),
        }
    )


def test_every_dtype_of_this_torch_is_known():
    names = {
        str(dtype).removeprefix("torch.") for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)
    }
    quantised = {"qint8", "quint8", "qint32"}
    packed = {"quint4x2", "quint2x4"}  # refused: their integers cannot be taken out
    assert names - quantised - packed == set(tensors.TORCH_SIZES)
