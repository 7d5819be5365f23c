"""export, import-run, and looking at files: ls FILE, diff."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ckptvcs import Repo
from tests.cli.command import ckpt, refused


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Two checkpoint files and a folder of three checkpoints, and no repository."""
    for step in (1, 2, 3):
        state = {"model": {"w": torch.full((4, 5), float(step)), "frozen": torch.ones(3)}, "step": step}
        torch.save(state, tmp_path / f"step_{step}.pt")
        place = tmp_path / "run" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        torch.save(state, place / "model.pt")
        (place / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 0.5}))
    return tmp_path


# ---- export --------------------------------------------------------------------------------------


def test_export_says_what_it_wrote(states: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = ckpt(states, "export", "main", "--format", "npz", "--only", "model", "--to", out)
    assert "model.npz" in done.out
    assert "Wrote 2 tensors, 4.8 kB" in done.out
    assert "without model in their names" in done.out
    with np.load(out / "model.npz") as found:
        assert sorted(found.files) == ["bias", "weight"]


def test_export_as_json(states: Path, tmp_path: Path) -> None:
    arguments = ("export", "HEAD", "--format", "torch", "--dtype", "bf16", "--to", tmp_path, "--json")
    found = ckpt(states, *arguments).json
    assert found["files"] == {"state.pt": (tmp_path / "state.pt").stat().st_size}
    assert found["cast"] == {"float32": 1, "float64": 1}
    assert found["tensors"] == 2
    assert found["bytes"] == 2 * (40 * 30 + 3)
    assert {"commit", "to", "copied", "prefix", "repeated", "left_out", "overflowed"} <= found.keys()
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["model"]["weight"].dtype == torch.bfloat16
    assert loaded["name"] == "tiny"


def test_export_never_leaves_out_in_silence(states: Path, tmp_path: Path) -> None:
    arguments = ("export", "HEAD", "--format", "safetensors", "--to", tmp_path / "out")
    refused(states, *arguments, code=2, words=["step: a int", "name: a str", "only="])
    done = ckpt(states, *arguments, "--tensors-only")
    assert "2 values that are no tensors were left out: step, name" in done.err
    refused(states, *arguments, "--tensors-only", code=2, words=["already", "--force"])
    ckpt(states, *arguments, "--tensors-only", "--force")
    refused(states, *arguments[:-2], "--to", "/dev/null/x", code=2, words=["not a folder"])
    refused(states, "export", "nope", "--format", "npz", "--to", "x", code=4)
    refused(states, "export", "HEAD", "--format", "onnx", "--to", "x", code=2, words=["onnx"])


# ---- import-run ----------------------------------------------------------------------------------


def test_a_rehearsal_needs_no_repository(models: Path) -> None:
    done = ckpt(models, "import-run", "run", "--dry-run")
    assert "3 checkpoints would be imported on run" in done.out
    assert "Nothing was kept" in done.out
    assert not list(models.rglob(".ckpt"))
    found = ckpt(models, "import-run", "run", "--dry-run", "--json", "--scratch", models).json
    assert found["dry_run"] is True
    assert [each["step"] for each in found["checkpoints"]] == [1, 2, 3]
    assert [each["commit"] for each in found["checkpoints"]] == [None] * 3
    assert found["given"] == sum(each["given"] for each in found["checkpoints"])
    assert found["stored"] > 0
    refused(models, "import-run", "run", code=10)


def test_a_run_becomes_a_branch(models: Path) -> None:
    with Repo.init(models):
        pass
    done = ckpt(models, "import-run", "run", "--branch", "base")
    assert "3 checkpoints imported on base" in done.out
    again = ckpt(models, "import-run", "run", "--branch", "base", "--json").json
    assert [each["stored"] for each in again["checkpoints"]] == [None] * 3
    with Repo.open(models) as repo:
        assert [commit.step for commit in repo.log("base")] == [3, 2, 1]
        assert repo.head() == ("main", None)
    refused(models, "import-run", "nothing", code=4)
    refused(models, "import-run", "run", "--scratch", "x", code=2, words=["--dry-run"])
    ckpt(models, "branch", "other", "base~1")
    ckpt(models, "commit", "-m", "by hand", "--branch", "other", "step_1.pt")
    refused(models, "import-run", "run", "--branch", "other", code=2, words=["no import made", "--branch"])


# ---- files ---------------------------------------------------------------------------------------


def test_ls_of_a_file_without_a_repository(models: Path) -> None:
    done = ckpt(models, "ls", "step_1.pt")
    assert done.out.splitlines() == [
        "model/w       float32  [4, 5]  80 B",
        "model/frozen  float32  [3]     12 B",
        "step  int  1",
        "torch: 2 tensors, 1 value, 92 B of tensors",
    ]
    found = ckpt(models, "ls", "./step_1.pt", "model/w", "--json").json
    assert (found["kind"], found["format"], found["path"]) == ("file", "torch", "step_1.pt")
    assert [(each["path"], each["dtype"], each["shape"]) for each in found["entries"]] == [
        ("model/w", "float32", [4, 5])
    ]
    assert found["total"] == {"tensors": 1, "values": 0, "files": 0, "bytes": 80}
    found = ckpt(models, "ls", "run/checkpoint-1", "--json").json
    assert [each["path"] for each in found["entries"]][:1] == ["model.pt/model/w"]
    assert [each["path"] for each in found["files"]] == ["trainer_state.json"]


def test_a_revision_wins_over_a_file_unless_it_is_spelled_as_one(models: Path) -> None:
    with Repo.init(models, compression="fast") as repo:
        repo.commit({"in": {"the": np.ones(2)}}, "x")
        repo.branch("step_1.pt")
    assert "in/the" in ckpt(models, "ls", "step_1.pt").out
    assert "model/w" in ckpt(models, "ls", "./step_1.pt").out
    assert "model/w" in ckpt(models, "ls", "step_2.pt").out
    assert "in/the" in ckpt(models, "ls").out
    assert "in/the" in ckpt(models, "diff", "step_1.pt", "step_2.pt").out
    assert "in/the" not in ckpt(models, "diff", "./step_1.pt", "step_2.pt").out
    assert "removed  in/the" in ckpt(models, "diff", "HEAD", "step_2.pt").out
    assert "new      in/the" in ckpt(models, "diff", "step_2.pt", "HEAD").out


def test_diff_of_two_files(models: Path) -> None:
    done = ckpt(models, "diff", "step_1.pt", "step_3.pt")
    assert done.out.splitlines() == [
        "         path                    changed  largest    l2  relative    cosine",
        "changed  model/w  float32[4, 5]     100%        2  8.94         2  1.000000",
        "value    step     1 -> 3",
        "tensors: 1 changed, 1 equal; values: 1 changed, 0 equal",
    ]
    found = ckpt(models, "diff", "step_1.pt", "step_3.pt", "--json").json
    assert (found["old"]["path"], found["new"]["format"]) == ("step_1.pt", "torch")
    assert found["changes"][0] == {
        "change": "changed",
        "path": "model/w",
        "old": {"dtype": "float32", "shape": [4, 5], "bytes": 80},
        "new": {"dtype": "float32", "shape": [4, 5], "bytes": 80},
        "distance": {
            "changed": 1.0, "largest": 2.0, "relative": 2.0, "not_finite": 0,
            "l2": 80**0.5, "cosine": 1.0, "whole": True,
        },
        "parameter": None,
    }  # fmt: skip
    assert found["equal"] == 1
    done = ckpt(models, "diff", "run/checkpoint-1", "run/checkpoint-2", "model.pt/model")
    assert done.out.splitlines()[-1] == "tensors: 1 changed, 1 equal"


def test_a_thousand_tensors_fit_a_screen(tmp_path: Path) -> None:
    for name, scale in (("a", 0.0), ("b", 1.0)):
        arrays = {f"w{i}": np.ones(4) + scale * i * (i % 2) for i in range(1000)}
        np.savez(tmp_path / f"{name}.npz", **arrays)
    lines = ckpt(tmp_path, "diff", "a.npz", "b.npz").out.splitlines()
    assert len(lines) == 43
    assert lines[1].split()[1] == "w999"
    assert lines[-2:] == [
        "... and 460 more differences (--all, or --group)",
        "tensors: 500 changed, 500 equal",
    ]
    assert len(ckpt(tmp_path, "diff", "a.npz", "b.npz", "--all").out.splitlines()) == 502
    grouped = ckpt(tmp_path, "diff", "a.npz", "b.npz", "--group").out.splitlines()
    assert grouped[1].split()[:5] == ["changed", "w#", "500", "of", "them"]
    assert len(grouped) == 3


def test_files_that_are_no_checkpoints(models: Path) -> None:
    (models / "notes.txt").write_text("hello")
    (models / "cut.pt").write_bytes((models / "step_1.pt").read_bytes()[:-100])
    for name in ("notes.txt", "cut.pt"):
        refused(models, "ls", name, code=2, words=[name, "cut short or damaged", "safetensors"])
        refused(models, "diff", name, "step_1.pt", code=2, words=[name])
    refused(models, "ls", "./nothing", code=4, words=["there is no file nothing"])
    refused(models, "ls", "step_9.pt", code=4, words=["there is no file step_9.pt", "no repository"])
    refused(models, "import-run", "step_1.pt", "--dry-run", code=2, words=["step_1.pt is a file", "folder"])
    ckpt(models, "init")
    refused(models, "ls", "step_9.pt", code=4, words=["called 'step_9.pt'", "no file of that name"])
    refused(models, "ls", "step_1.pt", "nope", code=4, words=["nothing in step_1.pt matches 'nope'"])
