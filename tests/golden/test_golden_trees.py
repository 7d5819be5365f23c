"""Trees and commits frozen when grid 1 was: today's code writes the same objects, and reads the old ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptvcs.history.commit import decode_commit
from ckptvcs.ids import Kind, ObjectId, object_id
from ckptvcs.state import codes, tree
from ckptvcs.state.read import StoredFile
from ckptvcs.store.format import unpack_object
from ckptvcs.testing.memory import MemoryStore
from ckptvcs.testing.same import difference
from tests.golden import states, values

HERE = Path(__file__).parent
LINES = (HERE / "trees.hex").read_text().splitlines()
NAMES = (*states.STATES, *states.FILES)
KINDS = {kind.label: kind for kind in Kind}

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")


@pytest.mark.parametrize("name", NAMES)
def test_trees_are_written_as_they_were(name: str) -> None:
    assert states.lines(name) == [line for line in LINES if line.startswith(f"{name}\t")]


@pytest.mark.parametrize("name", NAMES)
def test_old_trees_are_read(name: str) -> None:
    """Chunks are taken from today's write: their ids are plain hashes. Objects are the frozen ones."""
    today, _ = states.written(name)
    store, root = MemoryStore(), b""
    for line in LINES:
        of, kind, text = line.split("\t")
        if of == name and kind == "root":
            root = bytes.fromhex(text)
        elif of == name:
            payload = bytes.fromhex(text)
            store.records[KINDS[kind], object_id(KINDS[kind], payload)] = payload
    store.records |= {key: raw for key, raw in today.records.items() if key[0] is Kind.CHUNK}
    if name == "files":
        found = tree.files(store, ObjectId(root))
        assert list(found) == ["folder/empty", "folder/small", "folder/long", "link"]
        return
    if name == "tensor files":
        few, many = tree.files(store, ObjectId(root)).values()
        assert isinstance(few, StoredFile)
        assert isinstance(many, StoredFile)
        assert [(each.name, each.before, each.tensor.order) for each in few.tensors] == [
            ("a", 10, None), ("b/c", 0, [1, 0]), ("tiny", 3, None), ("big", 1, None),
        ]  # fmt: skip
        assert (few.format, few.content.nbytes, many.content.nbytes) == ("npz", 20, 600)
        assert [each.name for each in many.tensors] == [f"layers.{at}.weight" for at in range(200)]
        return
    assert difference(states.STATES[name](), tree.read(store, ObjectId(root))) is None


def test_every_code_is_frozen() -> None:
    """A code that no frozen tree uses could change its meaning unseen."""
    used = set()
    for line in LINES:
        _, kind, text = line.split("\t")
        if kind == Kind.TREE.label:
            _, body = unpack_object(bytes.fromhex(text), "golden")
            used |= _codes_in(bytes(body))
    defined = {
        value
        for name, value in vars(codes).items()
        if name.isupper() and isinstance(value, int) and 2 <= value <= 66
    }
    rare = {codes.QUANTIZED, codes.TORCH_GENERATOR}  # torch deprecates the one; the other's state is 5 KB
    assert defined - used <= rare | _NO_CODES


_NO_CODES = {
    value
    for name, value in vars(codes).items()
    if name in ("REFERENCE", "BIG_ENDIAN", "REQUIRES_GRAD", "PARAMETER", "COALESCED")
}


def _codes_in(body: bytes) -> set[int]:
    """Extension codes anywhere in an encoding."""
    import msgpack

    found: set[int] = set()

    def note(code: int, payload: bytes) -> None:
        found.add(code)
        if code not in (1, codes.COMPLEX):
            msgpack.unpackb(payload, ext_hook=note, strict_map_key=False, raw=True)

    def hashable(pairs: list[tuple[object, object]]) -> None:
        del pairs

    msgpack.unpackb(body, ext_hook=note, strict_map_key=False, raw=True, object_pairs_hook=hashable)
    return found


def test_commits_are_written_and_read_as_they_were() -> None:
    frozen = bytes.fromhex((HERE / "commit.hex").read_text().split("\t")[1])
    assert values.encoded_commit() == frozen
    commit = decode_commit(object_id(Kind.COMMIT, frozen), frozen)
    assert commit.tree == values.TREE_ID
    assert commit.parents == (values.PARENT_ID, object_id(Kind.COMMIT, b"other"))
    assert commit.origin == values.PARENT_ID
    assert (commit.step, commit.epoch, commit.message) == (100, 1.5, "first line\nsecond")
    assert commit.metrics == {"val_loss": 0.25, "n": 3}
    assert commit.config == {"lr": 0.1, "layers": [1, {"x": None}]}
    assert commit.overrides == {"lr": 0.2}
    assert commit.environment == {"host": "h"}
    assert commit.sizes == {"model": 10, "": 2}
