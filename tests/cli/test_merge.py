"""merge and cherry-pick."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckptvcs import Repo
from tests.cli.command import COMMIT_KEYS, ckpt, refused


def state(weight: float, step: int) -> dict[str, object]:
    """Weights, an optimizer and a step."""
    return {
        "model": {"w": np.full(500, weight), "steps": np.array(step)},
        "optimizer": {"m": np.full(500, -weight)},
        "step": step,
    }


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """main and the branch `other`, which went apart after a common commit."""
    with Repo.init(tmp_path, compression="fast") as repo:
        base = repo.commit(state(0.0, 1), "base", step=1)
        repo.commit(state(2.0, 2), "here", step=2, config={"lr": 1})
        other = repo.on("other")
        other.restore(state(0.0, 0), base)
        other.commit(state(6.0, 3), "there", step=3)
    return tmp_path


def test_merge_into_the_tip(runs: Path) -> None:
    done = ckpt(runs, "merge", "other", "--only", "model/w")
    lines = done.out.splitlines()
    assert lines[0].startswith("[main ")
    assert lines[0].endswith(": mean")
    assert lines[1] == "  tensors: 1 averaged, 2 kept"
    with Repo.open(runs) as repo:
        made = repo.resolve("main")
        assert made.parents == (repo.resolve("main~").id, repo.resolve("other").id)
        assert made.step == 2
        found = repo.checkout("main")
        assert (found["model"]["w"][0], found["optimizer"]["m"][0], found["step"]) == (4, -2, 2)
    assert "Merge" not in done.err
    graph = ckpt(runs, "log", "--graph").out
    assert "merge " in graph


def test_conflicts_name_all_places_and_how_to_choose(runs: Path) -> None:
    tip = ckpt(runs, "show", "--json").json["id"]
    words = ["2 conflict(s)", "model/steps: int64[] that differs", "step: 2 or 3", "--ours", "--prefer"]
    refused(runs, "merge", "other", code=2, words=words)
    found = ckpt(runs, "merge", "other", "--json", code=2).json
    assert found["error"]["code"] == "merge-conflict"
    assert ckpt(runs, "show", "--json").json["id"] == tip
    choice = ("--theirs", "step", "--prefer", "ours", "-m", "both", "--tag", "m1")
    done = ckpt(runs, "merge", "other", *choice, "--json")
    assert done.json.keys() >= COMMIT_KEYS | {"averaged", "kept", "taken", "settled", "overflowed", "report"}
    assert done.json["averaged"] == ["model/w", "optimizer/m"]
    assert [each["path"] for each in done.json["settled"]] == ["model/steps"]
    assert (done.json["message"], done.json["refs"]) == ("both", ["HEAD -> main", "tag: m1"])
    assert done.json["environment"]["merge"]["prefer"] == "ours"


def test_a_new_branch_begins_at_the_first(runs: Path) -> None:
    words = ["not the tip of main", "--branch"]
    refused(runs, "merge", "other", "main", "--only", "model/w", code=12, words=words)
    arguments = (
        "--strategy",
        "task-arithmetic",
        "--weights",
        "1,0.5",
        "--only",
        "model/w",
        "--branch",
        "soup",
    )
    done = ckpt(runs, "merge", "other", "main", *arguments)
    assert done.out.startswith("[soup ")
    with Repo.open(runs) as repo:
        assert repo.checkout("soup", only="model/w")["model"]["w"][0] == 7
        assert repo.resolve("soup").environment["merge"]["base"] == str(repo.resolve("main~").id)
        assert repo.head()[0] == "main"


def test_weights_and_strategies(runs: Path) -> None:
    ckpt(runs, "merge", "other", "--strategy", "weighted", "--weights", "3,1", "--only", "model/w")
    with Repo.open(runs) as repo:
        assert repo.checkout(only="model/w")["model"]["w"][0] == 3
    refused(runs, "merge", "other", "--weights", "a,b", code=2, words=["no list of numbers"])
    refused(runs, "merge", "other", "--weights", "1,2", code=2, words=["mean has no weights", "weighted"])
    refused(runs, "merge", "main", code=2, words=["each once"])
    refused(runs, "merge", "nothing", code=4, words=["nothing"])
    refused(runs, "merge", "other", "--only", "modle", code=4, words=["modle", "near"])


def test_cherry_pick(runs: Path) -> None:
    done = ckpt(runs, "cherry-pick", "other", "--only", "optimizer")
    lines = done.out.splitlines()
    assert "cherry-pick optimizer of" in lines[0]
    assert lines[1] == "  tensors: 2 kept, 1 taken"
    with Repo.open(runs) as repo:
        found = repo.checkout("main")
        assert (found["model"]["w"][0], found["optimizer"]["m"][0], found["step"]) == (2, -6, 2)
        assert len(repo.resolve("main").parents) == 2
    found = ckpt(
        runs, "cherry-pick", "main~", "--only", "model", "--onto", "other", "--branch", "mixed", "--json"
    ).json  # fmt: skip
    assert (found["branch"], found["taken"], found["kept"]) == ("mixed", 2, 1)
    assert found["environment"]["cherry_pick"]["only"] == ["model"]
    refused(runs, "cherry-pick", "other", code=2, words=["--only"])
    refused(runs, "cherry-pick", "other", "--only", "optimiser", code=4, words=["optimiser"])
    refused(runs, "cherry-pick", "main", "--only", "model", code=2, words=["same"])
