"""ckpt du, ckpt retain, ckpt pin, ckpt unpin, and what the other verbs say of what was dropped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckptvcs import Commit, Repo
from tests.cli.command import ckpt, refused


@pytest.fixture
def line(repo: Repo) -> list[Commit]:
    """Five commits on main, and a branch with a long name."""
    made = []
    for n in range(5):
        numbers = np.random.default_rng(n).integers(0, 256, 5000, np.uint8)
        moments = {k: np.random.default_rng(100 + 10 * n + i).random(2000) for i, k in enumerate(("m", "v"))}
        optimizer = {"state": {0: moments}, "param_groups": [{"params": [0], "param_names": ["layer.w"]}]}
        made.append(
            repo.commit({"model": {"layer.w": numbers}, "optimizer": optimizer}, f"n {n}", step=10 * n)
        )
    repo.branch("experiments/a-name-that-is-longer-than-its-column", "HEAD~1")
    return made


def test_du_fits_eighty_columns_without_colour(line: list[Commit], folder: Path) -> None:
    out = ckpt(folder, "du").out
    assert all(len(text) <= 80 for text in out.splitlines())
    assert "\x1b" not in out
    branch, *rows = out.splitlines()
    assert branch.split() == ["branch", "logical", "stored", "shared", "exclusive", "#own", "=shared"]
    assert rows[0].startswith("main ")
    assert "########" in out
    for word in ("optimizer", "  m ", "  v ", "model", "in packs"):
        assert word in out
    tensors = ckpt(folder, "du", "--tensors", "HEAD~1").out
    assert "m of layer.w" in tensors
    commits = ckpt(folder, "du", "--commits", "-n", "2").out
    assert f"{line[4].id.short} step 40" in commits
    assert line[2].id.short not in commits


def test_du_as_json(line: list[Commit], folder: Path, repo: Repo) -> None:
    repo.on("x").commit({"x": np.random.default_rng(7).random(9000)})
    repo.delete_branch("x", force=True)
    found = ckpt(folder, "du", "--json").json
    assert set(found) == {
        "branches", "components", "commits", "tensors", "stored", "structure", "others", "pending", "held"
    }  # fmt: skip
    assert found["pending"] == found["held"] > 50_000
    (main,) = [branch for branch in found["branches"] if branch["name"] == "main"]
    assert set(main) == {"name", "logical", "stored", "shared", "exclusive"}
    assert main["stored"] == main["shared"] + main["exclusive"]
    (optimizer,) = [each for each in found["components"] if each["name"] == "optimizer"]
    assert {part["name"] for part in optimizer["parts"]} == {"m", "v"}
    assert ckpt(folder, "gc", "--grace", "0", "--json").json["freed"] == found["pending"]
    tensors = ckpt(folder, "du", "--tensors", "--json", "-n", "1").json["tensors"]
    assert {"name", "logical", "stored", "shared", "exclusive"} <= set(tensors[0])
    assert {each.get("parameter") for each in tensors} == {"layer.w", None}
    assert found["commits"] == []


def test_retain_announces_and_drops(line: list[Commit], folder: Path, repo: Repo) -> None:
    out = ckpt(folder, "retain", "--keep-last", "2", "--dry-run").out
    assert "keep" in out
    assert "the tip of main" in out
    assert f"drop  {line[0].id.short}  step 0" in out
    assert "not kept by: the last 2" in out
    assert "Would drop 2 payloads" in out
    announced = ckpt(folder, "retain", "--keep-last", "2", "--dry-run", "--json").json
    assert set(announced) == {
        "dry_run", "dropped", "kept", "freed", "garbage", "recoded", "collected", "problems"
    }  # fmt: skip
    assert announced["freed"] == sum(each["freed"] for each in announced["dropped"]) > 60_000
    done = ckpt(folder, "retain", "--keep-last", "2", "--json").json
    assert done == {**announced, "dry_run": False}
    assert ckpt(folder, "retain", "--keep-last", "2").out.startswith("Dropped 0 payloads; 0 B freed.")
    assert repo.dropped(line[1]) == ()


@pytest.mark.slow
def test_what_other_verbs_say(line: list[Commit], folder: Path, repo: Repo, tmp_path: Path) -> None:
    gone = line[1].id.short
    ckpt(folder, "retain", "main", "--keep-last", "1", "--drop", "optimizer/**")
    listed = ckpt(folder, "ls", gone)
    assert "model/layer.w" in listed.out
    assert "optimizer" not in listed.out
    assert "retention took optimizer" in listed.err
    refused(folder, "ls", gone, "optimizer", code=4, words=("retention took the optimizer", line[3].id.short))
    assert "[dropped: optimizer]" in ckpt(folder, "log").out
    ckpt(folder, "retain", "main", "--keep-last", "1")
    for verb in (
        ["ls", gone],
        ["checkout", gone, "--to", str(tmp_path / "out")],
        ["export", gone, "--to", str(tmp_path / "out"), "--format", "torch"],
    ):
        refused(folder, *verb, code=4, words=("retention took the content", "the nearest along its line"))
    assert ckpt(folder, "ls", gone, "--json", code=4).json["error"]["code"] == "dropped"
    out = ckpt(folder, "log", "--oneline").out
    assert [text.endswith("[dropped]") for text in out.splitlines()] == [False, False, True, True, True]
    shown = ckpt(folder, "show", gone).out
    assert "dropped" in shown
    assert f"{line[3].id.short} has all of its content" in shown
    assert "n 1" in shown
    told = ckpt(folder, "show", gone, "--json").json
    assert (told["dropped"], told["pinned"], told["message"]) == ([], False, "n 1")


@pytest.mark.slow
def test_pin_and_unpin(line: list[Commit], folder: Path, repo: Repo) -> None:
    assert ckpt(folder, "pin", "HEAD~3").out == f"Pinned {line[1].id.short}.\n"
    assert ckpt(folder, "pin", "--list", "--json").json == {"pins": [str(line[1].id)]}
    assert line[1].id.short in ckpt(folder, "pin", "--list").out
    assert "[pinned]" in ckpt(folder, "log", "--oneline").out.splitlines()[3]
    ckpt(folder, "retain", "--keep-last", "1")
    assert repo.dropped(line[1]) is None
    assert repo.dropped(line[2]) == ()
    refused(folder, "pin", "HEAD~2", code=4, words=("retention took",))
    assert ckpt(folder, "unpin", "HEAD~3", "--json").json == {"commit": str(line[1].id), "pinned": False}
    refused(folder, "unpin", "HEAD~3", code=4, words=("is not pinned",))


@pytest.mark.slow
def test_retain_refuses(line: list[Commit], folder: Path) -> None:
    refused(folder, "retain", code=2, words=("no retention policy", "--keep-last"))
    refused(folder, "retain", "nope", "--keep-last", "1", code=4, words=("nope",))
    refused(folder, "retain", "--drop", "model", code=2, words=("a rule",))
    refused(folder, "retain", "--keep-best", "1", code=2, words=("metric",))
    refused(folder, "retain", "--keep-last", "1", "--drop", "model/x", code=2, words=("whole components",))
    refused(folder, "retain", "--keep-last", "1", "--drop", "modle", code=4, words=("near: model",))
    refused(folder, "retain", "--keep-last", "0", code=2, words=())
    assert ckpt(folder, "config", "retention.keep_last", "3").out == ""
    assert ckpt(folder, "config", "retention.keep_last").out == "3\n"
    refused(folder, "config", "retention.keep_last", "none", code=2, words=("a number from 1 up",))
    assert "Dropped 1 payload; " in ckpt(folder, "retain").out
