"""diff of commits, and of a commit and a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckptvcs import Repo
from tests.cli.command import ckpt, refused


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """main with two commits of forty layers, of which one changed, and files beside it."""
    folder = tmp_path_factory.mktemp("diffs")
    rng = np.random.default_rng(1)
    model = {f"layer.{n}.weight": rng.standard_normal((30, 40)).astype(np.float32) for n in range(40)}
    with Repo.init(folder, compression="fast") as repo:
        repo.commit({"model": model, "step": 1}, "one", step=1, config={"lr": 0.1}, metrics={"loss": 2.0})
        model = {**model, "layer.7.weight": model["layer.7.weight"] * 2}
        repo.commit({"model": model, "step": 2}, "two", step=2, config={"lr": 0.2}, metrics={"loss": 1.0})
    np.savez(folder / "model.npz", **model)
    return folder


def test_two_commits(repository: Path) -> None:
    lines = ckpt(repository, "diff", "HEAD~", "main").out.splitlines()
    assert lines[:3] == ["step           1 -> 2", "metrics  loss  2 -> 1", "config   lr    0.1 -> 0.2"]
    lines = lines[lines.index("") + 1 :]
    assert lines[0].split() == ["path", "changed", "largest", "l2", "relative", "cosine"]
    assert lines[1].split()[:4] == ["changed", "model/layer.7.weight", "float32[30,", "40]"]
    assert lines[1].split()[-2:] == ["1", "1.000000"]
    assert lines[2].split() == ["value", "step", "1", "->", "2"]
    assert lines[3].startswith("tensors: 1 changed, ")
    assert lines[4].startswith("read ")
    assert len(lines) == 5


def test_json(repository: Path) -> None:
    found = ckpt(repository, "diff", "HEAD~", "HEAD", "--json").json
    assert (found["old"]["kind"], found["old"]["step"], found["new"]["step"]) == ("commit", 1, 2)
    assert {"part": "config", "name": "lr", "old": 0.1, "new": 0.2} in found["fields"]
    change, value = found["changes"]
    assert (change["change"], change["path"], change["distance"]["changed"]) == (
        "changed", "model/layer.7.weight", 1.0,
    )  # fmt: skip
    assert (value["old"], value["new"]) == (1, 2)
    assert found["read_bytes"] > 0
    assert found["unread"] >= 0


def test_a_part_and_groups(repository: Path) -> None:
    assert "value" not in ckpt(repository, "diff", "HEAD~", "HEAD", "--only", "model").out
    done = ckpt(repository, "diff", "HEAD~", "HEAD", "step", "--norms")
    assert done.out.splitlines()[1].split() == ["value", "step", "1", "->", "2"]
    other = ckpt(repository, "diff", "HEAD", "HEAD", "model")
    assert other.out.splitlines()[0].startswith("tensors: 1 whole subtree equal")


def test_a_commit_and_a_file(repository: Path) -> None:
    done = ckpt(repository, "diff", "HEAD~", "./model.npz")
    assert done.err == "the file is compared with what is below model in the commit\n"
    assert done.out.splitlines()[1].split()[:2] == ["changed", "layer.7.weight"]
    found = ckpt(repository, "diff", "./model.npz", "HEAD", "--json").json
    assert (found["old"]["kind"], found["new"]["below"], found["changes"]) == ("file", "model", [])
    assert found["equal"] == 40


def test_what_is_neither(repository: Path, tmp_path: Path) -> None:
    refused(repository, "diff", "HEAD", "nothing", code=4, words=["nothing"])
    refused(repository, "diff", "HEAD", "HEAD~", "modle", code=4, words=["modle", "near"])
    refused(repository, "diff", "HEAD", "./nothing.pt", code=4, words=["no file"])
    refused(tmp_path, "diff", "a", "b", code=4, words=["no file a", "no repository"])
