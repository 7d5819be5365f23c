"""ckpt branch, ckpt switch, ckpt tag."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptvcs import Repo
from tests.cli.command import ckpt, commit_state, refused


def test_branch_lists(states: Path) -> None:
    out = ckpt(states, "branch").out.splitlines()
    assert [line[:7].rstrip() for line in out] == ["* main", "  other"]
    assert out[0].endswith("step 30  third")
    found = ckpt(states, "branch", "--json").json
    assert set(found) == {"head", "branches"}
    assert set(found["head"]) == {"branch", "commit"}
    assert [set(row) for row in found["branches"]] == [{"name", "commit", "step", "title", "current"}] * 2
    assert [row["current"] for row in found["branches"]] == [True, False]


def test_branch_is_made_deleted_and_brought_back(files: Path) -> None:
    with Repo.open(files) as repo:
        first = repo.resolve("main~1").id
        assert first.short in ckpt(files, "branch", "old", "main~1").out
        assert repo.branches()["old"] == first
        assert ckpt(files, "branch", "new", "--json").json == {
            "name": "new",
            "commit": str(repo.resolve("main").id),
        }
        done = ckpt(files, "branch", "-d", "old", "new")
        assert f"`ckpt branch old {first.short}`" in done.out
        assert set(repo.branches()) == {"main"}


def test_deleting_is_refused_or_done_in_part(files: Path) -> None:
    with Repo.open(files) as repo:
        repo.branch("safe", "main")
        repo.branch("alone", "main")
        ckpt(files, "commit", "-m", "only here", "--branch", "alone", "a.bin")
        refused(
            files,
            "branch",
            "-d",
            "alone",
            code=2,
            words=(
                "alone",
                "--force",
            ),
        )
        refused(
            files,
            "branch",
            "-d",
            "main",
            code=2,
            words=(
                "main",
                "ckpt switch",
            ),
        )
        done = ckpt(files, "branch", "-d", "safe", "nope", "--json", code=3)
        assert set(done.json) == {"deleted", "failed"}
        assert set(done.json["deleted"]) == {"safe"}
        assert done.json["failed"]["nope"]["code"] == "not-found"
        ckpt(files, "branch", "-d", "--force", "alone")
        assert set(repo.branches()) == {"main"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("branch", "main"), 2, ("main exists",)),
        (("branch", "a b"), 2, ("'a b' cannot be the name of a branch",)),
        (("branch", "a" * 64), 2, ("looks like an id",)),
        (("branch", "x", "nope"), 4, ("'nope'",)),
        (("branch", "x", "main", "y"), 2, ("no more",)),
        (("branch", "-d"), 2, ("-d",)),
        (("branch", "-d", "nope"), 4, ("there is no branch called 'nope'",)),
        (("tag", "v1"), 2, ("v1 exists",)),
        (("tag", "a..b"), 2, ("'a..b' cannot be the name of a tag",)),
        (("tag", "-d", "nope"), 4, ("there is no tag called 'nope'",)),
        (("switch", "mian"), 4, ("'mian'", "did you mean main")),
        (("switch", "v1"), 4, ("'v1'", "ckpt checkout v1")),
        (("switch", "fresh"), 4, ("ckpt switch -c fresh",)),
        (("switch", "-c", "main"), 2, ("main exists",)),
    ],
)
def test_refused(states: Path, arguments: tuple[str, ...], code: int, words: tuple[str, ...]) -> None:
    refused(states, *arguments, code=code, words=words)
    with Repo.open(states) as repo:
        assert (set(repo.branches()), set(repo.tags())) == ({"main", "other"}, {"v1"})
        assert repo.head()[0] == "main"


def test_switch_moves_head_only(files: Path) -> None:
    with Repo.open(files) as repo:
        repo.branch("old", "main~1")
        assert "HEAD is on old" in ckpt(files, "switch", "old").out
        assert (files / "a.bin").read_bytes() == b"content 2\n" * 100
        found = ckpt(files, "switch", "-c", "new", "--json").json
        assert found == {"branch": "new", "commit": str(repo.resolve("old").id)}
        assert repo.head() == ("new", repo.resolve("old").id)


def test_switch_on_an_unborn_branch(repo: Repo, folder: Path) -> None:
    assert "HEAD is on exp/1, no commits yet" in ckpt(folder, "switch", "-c", "exp/1").out
    assert repo.head() == ("exp/1", None)
    assert "no commits yet" in ckpt(folder, "branch").out
    commit_state(repo, 1)  # on main, where this handle still is
    refused(folder, "switch", "-c", "main", code=2, words=("main exists",))


def test_tag(files: Path) -> None:
    with Repo.open(files) as repo:
        first = repo.resolve("main~1").id
        assert first.short in ckpt(files, "tag", "v1", "main@step:1").out
        out = ckpt(files, "tag").out
        assert out.split() == ["v1", first.short, "step", "1", "files", "1"]
        assert ckpt(files, "tag", "--json").json == {
            "tags": [{"name": "v1", "commit": str(first), "step": 1, "title": "files 1"}]
        }
        assert f"`ckpt tag v1 {first.short}`" in ckpt(files, "tag", "-d", "v1").out
        assert repo.tags() == {}


def test_undelete(files: Path) -> None:
    with Repo.open(files) as repo:
        assert ckpt(files, "undelete").out == "Nothing that was deleted can be brought back.\n"
        first = repo.resolve("main~1").id
        repo.branch("old", "main~1")
        repo.delete_branch("old", force=True)
        (row,) = ckpt(files, "undelete", "--json").json["deleted"]
        assert {row["name"], row["kind"], row["commit"]} == {"old", "branch", str(first)}
        assert first.short in ckpt(files, "undelete").out
        assert ckpt(files, "undelete", "old", "--json").json == {"name": "old", "commit": str(first)}
        assert repo.branches()["old"] == first
        assert "is there" in ckpt(files, "undelete", "old", code=2).err
        assert "was deleted" in ckpt(files, "undelete", "nope", code=4).err
