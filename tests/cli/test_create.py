"""ckpt init, ckpt commit."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptvcs import Repo
from tests.cli.command import COMMIT_KEYS, ckpt, refused


def test_init_makes_folders_and_says_where(tmp_path: Path) -> None:
    done = ckpt(tmp_path, "init", "a/b", "--compression", "small")
    assert str(tmp_path / "a" / "b" / ".ckpt") in done.out
    with Repo.open(tmp_path / "a" / "b") as repo:
        assert repo.head() == ("main", None)
        assert repo.config.get("compression") == "small"
    refused(
        tmp_path / "a" / "b",
        "init",
        code=2,
        words=(
            str(tmp_path / "a" / "b"),
            "hint: ",
        ),
    )


def test_init_json(tmp_path: Path) -> None:
    found = ckpt(tmp_path, "--repo", "r", "init", "--json").json
    assert found == {"repository": str(tmp_path / "r"), "branch": "main", "compression": "balanced"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("init", "file/x"), 2, ("file is not a folder",)),
        (("init", "x", "--compression", "tiny"), 2, ("tiny", "fast, balanced, small")),
    ],
)
def test_init_refuses(tmp_path: Path, arguments: tuple[str, ...], code: int, words: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path, *arguments, code=code, words=words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_commit_stores_what_it_is_told(repo: Repo, folder: Path, tmp_path: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "w.bin").write_bytes(bytes(range(256)) * 50)
    (folder / "left").write_text("not given")
    done = ckpt(
        folder / "out",
        *("commit", "-m", "first\nmore", "--step", "7", "--epoch", "0.5"),
        *("--metric", "val_loss=0.25", "--metric", "hits=3"),
        *("--set", "opt.lr=3e-4", "--set", "opt.name=adam", "--set", "nest=[1, 2]", "w.bin"),
    )
    commit = repo.resolve("main")
    head, report = done.out.splitlines()
    assert head == f"[main {commit.id.short}] (first commit) first"
    assert "given" in report
    assert "stored" in report
    assert done.err == ""
    assert (commit.step, commit.epoch, commit.metrics) == (7, 0.5, {"val_loss": 0.25, "hits": 3})
    assert commit.config == {"opt": {"lr": 3e-4, "name": "adam"}, "nest": [1, 2]}
    assert commit.author == "tester"
    assert repo.checkout(commit) == {"out/w.bin": bytes(range(256)) * 50}

    # The next one continues from it, with a path of its own choice, and says nothing of a fresh start.
    outside = tmp_path / "outside.txt"
    outside.write_text("from elsewhere")
    done = ckpt(folder, "commit", "-m", "second", "--as", "deep/name.txt", outside, "--json")
    assert done.err == ""
    assert set(done.json) == COMMIT_KEYS | {"branch", "report"}
    assert set(done.json["report"]) == {"given", "new", "reused", "stored", "seconds"}
    assert done.json["parents"] == [str(commit.id)]
    assert done.json["origin"] == str(commit.id)
    assert done.json["fresh_start"] is False
    assert done.json["refs"] == ["HEAD -> main"]
    assert repo.checkout("main") == {"deep/name.txt": b"from elsewhere"}


def test_commit_of_the_whole_folder_leaves_the_repository_out(files: Path) -> None:
    with Repo.open(files) as repo:
        ckpt(files / "sub", "commit", "-m", "all", "..", "--branch", "other")
        assert [entry.path for entry in repo.file_entries("other")] == ["a.bin", "link", "sub/b.txt"]
        assert repo.head()[0] == "main"
        assert repo.branches()["main"] != repo.branches()["other"]
        ckpt(files, "commit", "-m", "by variable", "a.bin", CKPT_BRANCH="third")
        assert repo.resolve("third").title == "by variable"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("missing.bin",), 4, ("missing.bin",)),
        (("/etc/hosts",), 2, ("/etc/hosts lies outside of", "--as NAME")),
        (("a.bin", "sub", "--as", "x"), 2, ("--as",)),
        (("a.bin", "--as", "../x"), 2, ("../x",)),
        ((".ckpt",), 2, (".ckpt",)),
        (("a.bin", "--metric", "loss"), 2, ("--metric", "NAME=X")),
        (("a.bin", "--metric", "loss=low"), 2, ("'low'", "--metric val_loss=0.31")),
        (("a.bin", "--set", "a=1", "--set", "a.b=2"), 2, ("a.b=2",)),
        (("a.bin", "--step", "1.5"), 2, ("--step", "1.5")),
        (("a.bin", "--branch", "a..b"), 2, ("'a..b' cannot be the name of a branch",)),
        ((), 2, ("PATH",)),
    ],
)
def test_commit_refuses(
    read_only_files: Path, arguments: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    refused(read_only_files, "commit", "-m", "x", *arguments, code=code, words=words)
    with Repo.open(read_only_files) as repo:
        assert repo.resolve("main").title == "files 2"
        assert set(repo.branches()) == {"main"}


def test_a_commit_of_nothing_is_refused(repo: Repo, folder: Path) -> None:
    (folder / "empty").mkdir()
    refused(folder, "commit", "-m", "x", "empty", code=2, words="nothing to commit")
    assert repo.branches() == {}


def test_commit_needs_a_branch(files: Path) -> None:
    with Repo.open(files) as repo:
        repo.set_head(repo.resolve("main~1"))
    refused(
        files,
        "commit",
        "-m",
        "x",
        "a.bin",
        code=12,
        words=(
            "HEAD is detached",
            "--branch NAME",
        ),
    )
