"""Looking into checkpoint files and comparing them, with no repository about."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from ckptvcs.disk import Disk
from ckptvcs.errors import InvalidError, NotFoundError
from ckptvcs.state.checkpoint import Checkpoint, open_checkpoint, selected, sides
from ckptvcs.state.compare import ABSENT, Change, Comparison, compare


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(Disk(), path)


def saved(folder: Path, name: str, value: Any) -> Path:
    path = folder / name
    torch.save(value, path)
    return path


def compared(folder: Path, old: Any, new: Any) -> Comparison:
    """The comparison of two values as torch saves them."""
    return compare(opened(saved(folder, "old.pt", old)), opened(saved(folder, "new.pt", new)))


def by_path(found: Comparison) -> dict[str, Change]:
    return {change.path: change for change in found.changes}


def test_what_a_file_holds(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.pt", {"model": {"w": torch.ones(2, 3)}, "step": 5, "name": "x", "none": None})
    found = opened(path)
    assert (found.format, found.nbytes) == ("torch", path.stat().st_size)
    assert {name: (t.dtype, t.shape, t.nbytes) for name, t in found.tensors.items()} == {
        "model/w": ("float32", (2, 3), 24)
    }
    assert found.leaves["step"] == 5
    assert found.leaves["name"] == "x"


def test_every_kind_of_change(tmp_path: Path) -> None:
    old = {
        "same": torch.randn(5),
        "moved": torch.tensor([3.0, 4.0, 0.0, 0.0]),
        "gone": torch.zeros(2),
        "shape": torch.zeros(2, 3),
        "cast": torch.tensor([1.0, 1.0001]),
        "turned": torch.arange(6.0).reshape(2, 3),
        "step": 1,
        "lr": 0.1,
        "nan": math.nan,
    }
    new = {
        **old,
        "moved": torch.tensor([3.0, 4.0, 0.0, 0.5]),
        "shape": torch.zeros(3, 2),
        "cast": old["cast"].bfloat16(),
        "come": torch.zeros(1),
        "turned": old["turned"].t().contiguous().t(),
        "step": 2,
    }
    del new["gone"]
    found = compared(tmp_path, old, new)
    assert [change.kind for change in found.changes] == [
        "reshaped",
        "cast",
        "removed",
        "new",
        "changed",
        "value",
    ]
    changes = by_path(found)
    distance = changes["moved"].distance
    assert distance is not None
    assert (distance.changed, distance.largest, distance.relative, distance.not_finite) == (0.25, 0.5, 0.1, 0)
    cast = changes["cast"].distance
    assert cast is not None
    assert cast.changed == 0.5
    assert cast.largest == pytest.approx(1e-4, rel=1e-2)
    assert changes["shape"].distance is None
    assert (changes["step"].old, changes["step"].new) == (1, 2)
    assert (found.equal, found.equal_values) == (2, 2)


def test_a_value_that_one_side_lacks_is_not_none(tmp_path: Path) -> None:
    found = compared(tmp_path, {"a": None, "w": torch.ones(1)}, {"w": torch.ones(1)})
    assert [(change.path, change.old, change.new) for change in found.changes] == [("a", None, ABSENT)]


def test_bits_are_compared_and_nan_equals_itself(tmp_path: Path) -> None:
    nan = torch.tensor([math.nan, math.inf, 0.0, 1.0])
    assert compared(tmp_path, {"w": nan}, {"w": nan.clone()}).changes == []
    (change,) = compared(tmp_path, {"w": nan}, {"w": torch.tensor([math.nan, 5.0, -0.0, math.nan])}).changes
    assert change.distance is not None
    assert change.distance.changed == 0.75
    assert change.distance.not_finite == 2
    assert change.distance.largest == 0
    # What became NaN comes before what moved far.
    found = compared(
        tmp_path,
        {"far": torch.ones(3), "odd": torch.ones(3)},
        {"far": torch.full((3,), 1e30), "odd": torch.tensor([1.0, 1.0, math.nan])},
    )
    assert [change.path for change in found.changes] == ["odd", "far"]


@pytest.mark.parametrize(
    ("one", "other", "changed", "largest"),
    [
        (np.array([True, False]), np.array([True, True]), 0.5, 1),
        (np.array([1, 2, 300], np.int64), np.array([1, 2, -300], np.int64), 1 / 3, 600),
        (np.array([1, 2j, 5]), np.array([1, 2j + 3, 5]), 1 / 3, 3),
        (np.array([0, 255], np.uint8), np.array([255, 0], np.uint8), 1, 255),
        (np.arange(3, dtype=">f8"), np.array([0, 1, 4.0], ">f8"), 1 / 3, 2),
        (np.asfortranarray(np.eye(2)), np.asfortranarray(np.ones((2, 2))), 0.5, 1),
    ],
)
def test_numbers_of_all_kinds(tmp_path: Path, one: Any, other: Any, changed: float, largest: float) -> None:
    np.savez(tmp_path / "one.npz", w=one)
    np.savez(tmp_path / "other.npz", w=other)
    (change,) = compare(opened(tmp_path / "one.npz"), opened(tmp_path / "other.npz")).changes
    assert change.distance is not None
    assert change.distance.changed == pytest.approx(changed)
    assert change.distance.largest == largest


def test_small_floats(tmp_path: Path) -> None:
    old = torch.tensor([1.0, 2.0, 448.0])
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float16):
        (change,) = compared(tmp_path, {"w": old.to(dtype)}, {"w": (old / 2).to(dtype)}).changes
        assert change.distance is not None
        assert change.distance.relative == 0.5
    assert np.dtype(ml_dtypes.bfloat16).itemsize == 2


def test_text_has_no_distance(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", w=np.array(["a"]))
    np.savez(tmp_path / "other.npz", w=np.array(["b"]))
    (change,) = compare(opened(tmp_path / "one.npz"), opened(tmp_path / "other.npz")).changes
    assert (change.kind, change.distance) == ("changed", None)


def test_empty_and_scalar(tmp_path: Path) -> None:
    old = {"e": torch.empty(0, 3), "s": torch.tensor(2), "z": torch.zeros(4)}
    assert compared(tmp_path, old, old).equal == 3
    (change, zero) = compared(tmp_path, old, {**old, "s": torch.tensor(3), "z": torch.ones(4)}).changes
    assert (change.path, zero.path) == ("z", "s")
    assert change.distance is not None
    assert change.distance.relative == math.inf


# -- folders -------------------------------------------------------------------------------------------


def folder_of(tmp_path: Path, name: str, step: int) -> Path:
    folder = tmp_path / name
    (folder / "inner").mkdir(parents=True)
    torch.save({"w": torch.full((3,), float(step))}, folder / "model.pt")
    torch.save({"lr": 0.1, "m": torch.ones(2)}, folder / "inner" / "optimizer.pt")
    (folder / "state.json").write_text(f"{step}")
    (folder / ".ckpt").mkdir()
    return folder


def test_folders_are_compared_by_file_and_name(tmp_path: Path) -> None:
    one, other = folder_of(tmp_path, "a", 1), folder_of(tmp_path, "b", 2)
    (other / "added.bin").write_bytes(b"x")
    (other / "loop").symlink_to(other)
    found = compare(opened(one), opened(other))
    assert [(c.kind, c.path) for c in found.changes] == [
        ("changed", "model.pt/w"), ("file", "state.json"), ("file", "added.bin"),
    ]  # fmt: skip
    assert (found.equal, found.equal_values) == (1, 1)


def test_shards_count_as_one_file(tmp_path: Path) -> None:
    for folder, count in (("a", 1), ("b", 3)):
        (tmp_path / folder).mkdir()
        for at in range(count):
            part = {f"w{i}": torch.full((2,), float(i)) for i in range(6) if i * count // 6 == at}
            name = "model.pt" if count == 1 else f"model-{at + 1:05}-of-{count:05}.pt"
            torch.save(part, tmp_path / folder / name)
    found = compare(opened(tmp_path / "a"), opened(tmp_path / "b"))
    assert (found.changes, found.equal) == ([], 6)


def test_a_folder_beside_a_file(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a", 1)
    file = saved(tmp_path, "model.pt", {"w": torch.ones(3)})
    old, new = sides(opened(folder), opened(file))
    assert compare(old, new).changes == []
    new, old = sides(opened(file), opened(folder))
    assert compare(old, new).equal == 1
    with pytest.raises(InvalidError, match="2 checkpoint files") as refused:
        sides(opened(folder), opened(saved(tmp_path, "other.pt", {"w": torch.ones(3)})))
    assert refused.value.hint is not None
    assert "model.pt" in refused.value.hint


def test_a_part_of_two_checkpoints(tmp_path: Path) -> None:
    one, other = opened(folder_of(tmp_path, "a", 1)), opened(folder_of(tmp_path, "b", 2))
    old, new = selected([one, other], ["**/m", "state.json"])
    assert [change.path for change in compare(old, new).changes] == ["state.json"]
    assert compare(old, new).equal == 1
    with pytest.raises(NotFoundError, match="nothing in"):
        selected([one, other], ["nothing"])


# -- what is no checkpoint -----------------------------------------------------------------------------


def test_unknown_and_damaged_files_get_one_line(tmp_path: Path) -> None:
    whole = saved(tmp_path, "a.pt", {"w": torch.ones(1000)}).read_bytes()
    files = {
        "text.txt": b"hello",
        "empty.pt": b"",
        "cut.pt": whole[:-300],
        "half.safetensors": b"\x10" + bytes(7) + b"{",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InvalidError, match="no checkpoint file that can be read") as refused:
            opened(tmp_path / name)
        assert refused.value.code == "unreadable-file"
        assert "\n" not in str(refused.value)
    with pytest.raises(NotFoundError, match="there is no file"):
        opened(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidError, match="no checkpoint file in"):
        opened(tmp_path / "folder")
    with pytest.raises(InvalidError, match="is no file"):
        opened(Path("/dev/null"))
