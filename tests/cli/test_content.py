"""ckpt ls, ckpt checkout, ckpt status."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from ckptvcs import Repo
from ckptvcs.store import Move
from tests.cli.command import ckpt, commit_state, refused

# ---- ls -----------------------------------------------------------------------------------------


def test_ls_of_a_state(states: Path) -> None:
    lines = ckpt(states, "ls").out.splitlines()
    assert lines[0].split() == ["model/weight", "float32", "[40,", "30]", "4.8", "kB"]
    assert lines[1].split() == ["model/bias", "float64", "[3]", "24", "B"]
    assert lines[2].split()[:3] == ["step", "int", "30"]
    assert lines[-1].startswith("2 tensors, 2 values, 4.8 kB")


def test_ls_json_with_patterns(states: Path) -> None:
    found = ckpt(states, "ls", "v1", "model/*", "notes.txt", "--json").json
    assert set(found) == {"commit", "entries", "files", "dropped", "total"}
    assert [entry["path"] for entry in found["entries"]] == ["model/weight", "model/bias"]
    assert found["entries"][0] == {
        "path": "model/weight", "kind": "tensor", "dtype": "float32", "shape": [40, 30], "bytes": 4800,
        "chunks": 1, "preview": "", "parameter": None,
    }  # fmt: skip
    assert found["total"] == {"tensors": 2, "values": 0, "files": 1, "bytes": 4800 + 24 + 21}
    (file,) = found["files"]
    assert set(file) == {"path", "kind", "bytes", "mode", "blake3", "target"}
    assert file["path"] == "notes.txt"


def test_ls_of_an_optimizer_names_parameters(folder: Path) -> None:
    moments = {n: {"step": 1, "exp_avg": np.ones(shape)} for n, shape in enumerate([(3, 2), (3,)])}
    groups = [{"lr": 0.1, "params": [0, 1]}]
    state = {
        "model": {"layer.weight": np.ones((3, 2)), "layer.bias": np.ones(3)},
        "optimizer": {"state": moments, "param_groups": groups},
    }
    with Repo.init(folder) as repo:
        repo.commit(state)
    lines = {line.split()[0]: line.split() for line in ckpt(folder, "ls").out.splitlines()}
    assert lines["optimizer/state/1/exp_avg"][-1] == "layer.bias"
    assert lines["optimizer/state/0/step"][-1] == "layer.weight"
    found = ckpt(folder, "ls", "HEAD", "optimizer/state/1/exp_avg", "--json").json
    assert [entry["parameter"] for entry in found["entries"]] == ["layer.bias"]


def test_ls_of_files(read_only_files: Path) -> None:
    os.chmod(read_only_files / "a.bin", 0o644)
    lines = ckpt(read_only_files, "ls").out.splitlines()
    assert [line.split()[0][0] for line in lines[:-1]] == ["-", "l", "-"]
    assert lines[1].endswith("link -> a.bin")
    assert lines[2].endswith("16 B  sub/b.txt")
    assert lines[-1].startswith("3 files, 1.0 kB")
    long = ckpt(read_only_files, "ls", "-l", "main~1", "a.bin").out
    assert "  1,000  " in long


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("HEAD", "model/*", "modle/weight"), ("'modle/weight'", "model/weight")),
        (("model/weight",), ("'model/weight'", "ckpt ls HEAD 'model/weight'")),
    ],
)
def test_ls_refuses(states: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(states, "ls", *arguments, code=4, words=words)


# ---- checkout -----------------------------------------------------------------------------------


def test_checkout_brings_files_back_and_moves_head(files: Path) -> None:
    with Repo.open(files) as repo:
        repo.branch("old", "main~1")
        done = ckpt(files, "checkout", "old")
        assert "Wrote 1 file, 2 already there." in done.out
        assert "HEAD is on old" in done.out
        assert (files / "a.bin").read_bytes() == b"content 1\n" * 100
        assert repo.head()[0] == "old"

        found = ckpt(files, "checkout", "main@step:2", "--json").json
        assert set(found) == {"commit", "branch", "head", "state", "written", "unchanged"}
        assert found["branch"] is None
        assert found["head"] == found["commit"] == str(repo.resolve("main").id)
        assert found["written"] == ["a.bin"]
        assert repo.head() == (None, repo.resolve("main").id)


def test_checkout_keeps_changed_files(files: Path) -> None:
    (files / "a.bin").write_text("mine")
    refused(
        files,
        "checkout",
        "main~1",
        code=12,
        words=(
            "a.bin",
            "--force",
        ),
    )
    refused(
        files,
        "checkout",
        "main~1",
        "a.bin",
        code=12,
        words=(
            "a.bin",
            "--force",
        ),
    )
    assert (files / "a.bin").read_text() == "mine"
    with Repo.open(files) as repo:
        assert repo.head()[0] == "main"
        ckpt(files / "sub", "checkout", "main~1", "--force", "../a.bin", "./b.txt")
        assert (files / "a.bin").read_bytes() == b"content 1\n" * 100
        assert repo.head()[0] == "main"  # a PATH moves no HEAD


def test_checkout_to_a_folder(read_only_files: Path, tmp_path: Path) -> None:
    ckpt(read_only_files, "checkout", "main~1", "--to", tmp_path / "x" / "y")
    assert (tmp_path / "x" / "y" / "a.bin").read_bytes() == b"content 1\n" * 100
    assert os.readlink(tmp_path / "x" / "y" / "link") == "a.bin"
    found = ckpt(read_only_files, "checkout", "main", "sub", "--to", tmp_path / "z", "--json").json
    assert found["written"] == ["sub/b.txt"]
    assert found["branch"] == "main"
    refused(read_only_files, "checkout", "main", "sbu", "--to", tmp_path / "z", code=4, words=("'sbu'",))


def test_checkout_of_a_state_writes_nothing_and_says_how_to_read_it(repo: Repo, folder: Path) -> None:
    (folder / "notes.txt").write_text("kept")
    first = commit_state(repo, 1, files={"notes.txt": folder / "notes.txt"})
    commit_state(repo, 2)
    (folder / "notes.txt").unlink()

    done = ckpt(folder, "checkout", "main~1")
    assert "HEAD is detached" in done.out
    assert f'repo.checkout("{first.id.short}")' in done.err
    assert not (folder / "notes.txt").exists()
    refused(
        folder,
        "checkout",
        "main~1",
        "notes.txt",
        code=2,
        words=(
            "Python state",
            "--to DIR",
        ),
    )

    done = ckpt(folder, "checkout", "main~1", "--to", "out")
    assert (folder / "out" / "notes.txt").read_text() == "kept"
    assert "repo.checkout(" in done.err


def test_checkout_refuses_unknown_revisions(read_only_files: Path) -> None:
    refused(read_only_files, "checkout", "nope", code=4, words=("'nope'",))
    refused(read_only_files, "checkout", code=2, words=("REV",))


def test_checkout_of_a_flipped_bit_writes_nothing(files: Path, tmp_path: Path) -> None:
    packs = sorted((files / ".ckpt" / "packs").rglob("*.pack"), key=lambda path: path.stat().st_mtime_ns)
    data = bytearray(packs[-1].read_bytes())
    data[len(data) // 4] ^= 1
    packs[-1].chmod(0o644)
    packs[-1].write_bytes(data)
    refused(files, "checkout", "main", "--to", tmp_path / "out", code=13, words=("ckpt fsck --full",))
    done = ckpt(files, "fsck", "--full", code=13)
    assert "problem: " in done.out


# ---- status -------------------------------------------------------------------------------------


def test_status(files: Path) -> None:
    out = ckpt(files, "status").out
    assert f"repository {files}" in out
    assert "on branch main at " in out
    assert "step 2" in out
    assert "3 committed files unchanged" in out
    (files / "a.bin").write_text("mine")
    (files / "sub" / "b.txt").unlink()
    with Repo.open(files) as repo:
        tip = repo.resolve("main")
        repo.record([Move(f"refs/lost/main/{tip.id.short}", None, tip.id)], "test")
    done = ckpt(files, "status")
    assert "modified  a.bin" in done.out
    assert "missing   sub/b.txt" in done.out
    assert f"lost/main/{tip.id.short}" in done.out
    found = ckpt(files, "status", "--json").json
    assert set(found) == {
        "repository", "branch", "commit", "unborn", "detached", "step", "files", "runs", "lost",
    }  # fmt: skip
    assert found["files"] == {"modified": ["a.bin"], "missing": ["sub/b.txt"], "unchanged": 1}
    assert found["lost"] == {f"lost/main/{tip.id.short}": str(tip.id)}


def test_status_of_an_unborn_branch(repo: Repo, folder: Path) -> None:
    assert "on branch main, no commits yet" in ckpt(folder, "status").out
    found = ckpt(folder, "status", "--json", CKPT_BRANCH="elsewhere").json
    assert (found["branch"], found["unborn"], found["commit"]) == ("main", True, None)


def test_head_is_heads_branch_whatever_the_variable_says(files: Path) -> None:
    with Repo.open(files) as repo:
        repo.branch("job", "main~1")
        assert ckpt(files, "show", "--json", CKPT_BRANCH="job").json["step"] == 2
        assert ckpt(files, "show", "HEAD~1", "--json", CKPT_BRANCH="job").json["step"] == 1
        repo.set_head(repo.resolve("main"))
        assert ckpt(files, "show", "--json", CKPT_BRANCH="job").json["step"] == 2
        assert ckpt(files, "status", "--json", CKPT_BRANCH="job").json["detached"] is True


def test_no_repository(tmp_path: Path) -> None:
    refused(
        tmp_path,
        "status",
        code=10,
        words=(
            str(tmp_path),
            "ckpt init",
        ),
    )
    done = ckpt(tmp_path, "--repo", tmp_path / "nope", "status", "--json", code=10)
    assert done.json["error"]["code"] == "no-repository"


def test_the_repository_is_found_by_option_variable_and_from_below(
    read_only_files: Path, tmp_path: Path
) -> None:
    for done in (
        ckpt(tmp_path, "--repo", read_only_files, "status", "--json"),
        ckpt(tmp_path, "status", "--json", CKPT_REPO=str(read_only_files / "sub")),
        ckpt(read_only_files / "sub", "status", "--json"),
    ):
        assert done.json["repository"] == str(read_only_files)
