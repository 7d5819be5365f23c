"""Files and folders in and out of a commit: byte-exact, never outside, never over somebody's changes."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptvcs import ConflictError, CorruptionError, InvalidError, NotFoundError, Repo, StorageError
from ckptvcs.ids import Hasher, ObjectId, chunk_id
from ckptvcs.state import files, tree
from ckptvcs.state.tensors import BytesSource
from ckptvcs.testing.memory import MemoryStore


def fill(place: Path, files: dict[str, bytes]) -> None:
    """Make files."""
    for name, data in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def content(place: Path) -> dict[str, Any]:
    """All files and links below a folder, the repository left out."""
    found: dict[str, Any] = {}
    for folder, folders, names in os.walk(place):
        folders[:] = [name for name in folders if name != ".ckpt"]
        for name in [*names, *(name for name in folders if os.path.islink(os.path.join(folder, name)))]:
            path = Path(folder) / name
            key = path.relative_to(place).as_posix()
            found[key] = ("link", os.readlink(path)) if path.is_symlink() else path.read_bytes()
    return found


BIG = np.random.default_rng(0).integers(0, 256, 5_300_000, np.uint8).tobytes()
FILES = {"a.txt": b"one\n", "d/empty": b"", "d/e/big.bin": BIG, "d/small": b"x" * 300, "z": bytes(256)}


def commit(repo: Repo, *names: str) -> Any:
    """Commit paths of the repository's folder under their own names."""
    return repo.commit_files({name: repo.path / name for name in names}, continues=True)


@pytest.fixture
def filled(repo: Repo) -> Repo:
    """A repository whose folder holds FILES and a link, committed."""
    fill(repo.path, FILES)
    (repo.path / "d" / "link").symlink_to("../a.txt")
    commit(repo, "a.txt", "d", "z")
    return repo


def test_out_is_what_went_in(filled: Repo, tmp_path: Path) -> None:
    expected = {**FILES, "d/link": ("link", "../a.txt")}
    assert content(filled.path) == expected
    report = filled.checkout_files("main", tmp_path / "new" / "place")
    assert content(tmp_path / "new/place") == expected
    assert sorted(report.written) == sorted(expected)
    assert report.unchanged == []
    again = filled.checkout_files("main", tmp_path / "new" / "place")
    assert again.written == []
    assert sorted(again.unchanged) == sorted(expected)
    filled.checkout_files("main", tmp_path / "part", only="d/e")
    assert content(tmp_path / "part") == {"d/e/big.bin": BIG}
    assert not list((tmp_path / "new").rglob("*ckpt-tmp*"))


def test_entries_tell_size_mode_hash_and_target(filled: Repo) -> None:
    entries = {entry.path: entry for entry in filled.file_entries()}
    assert set(entries) == {*FILES, "d/link"}
    for name, data in FILES.items():
        whole = Hasher()
        whole.update(data)
        found = entries[name]
        assert (found.kind, found.size, found.digest, found.target) == ("file", len(data), whole.id(), None)
    assert (entries["d/link"].kind, entries["d/link"].target) == ("link", "../a.txt")
    assert [entry.path for entry in filled.file_entries(only="d/e")] == ["d/e/big.bin"]
    with pytest.raises(NotFoundError):
        filled.file_entries(only="nothing")


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o755, 0o400, 0o777])
def test_permissions_come_back(repo: Repo, tmp_path: Path, mode: int) -> None:
    fill(repo.path, {"f": b"#!/bin/sh\n"})
    (repo.path / "f").chmod(mode)
    commit(repo, "f")
    repo.checkout_files("main", tmp_path / "out")
    assert (tmp_path / "out" / "f").stat().st_mode & 0o777 == mode


def test_special_permission_bits_do_not_come_back(repo: Repo, tmp_path: Path) -> None:
    fill(repo.path, {"f": b"#!/bin/sh\n"})
    (repo.path / "f").chmod(0o4755)
    commit(repo, "f")
    repo.checkout_files("main", tmp_path / "out")
    assert (tmp_path / "out" / "f").stat().st_mode & 0o7777 == 0o755
    assert repo.checkout_files("main", tmp_path / "out").written == []
    assert repo.file_status("main").modified == []


def test_the_same_files_give_the_same_tree(repo: Repo) -> None:
    fill(repo.path, {"x/1": b"1", "x/2": b"2", "y": b"3"})
    one = repo.commit_files({"x": repo.path / "x", "y": repo.path / "y"})
    other = repo.commit_files({"y": repo.path / "y", "x": repo.path / "x"})
    apart = repo.commit_files({"y": repo.path / "y", "x/2": repo.path / "x/2", "x/1": repo.path / "x/1"})
    assert one.tree == other.tree == apart.tree
    assert other.report is not None
    assert other.report.stored < 2048


def test_status(filled: Repo) -> None:
    status = filled.file_status()
    assert (status.modified, status.missing) == ([], [])
    assert sorted(status.unchanged) == sorted([*FILES, "d/link"])
    (filled.path / "a.txt").write_bytes(b"two\n")  # of the same size
    (filled.path / "z").chmod(0o600)
    (filled.path / "d/small").unlink()
    (filled.path / "d/link").unlink()
    (filled.path / "d/link").symlink_to("elsewhere")
    (filled.path / "d/empty").unlink()
    (filled.path / "d/empty").mkdir()
    (filled.path / "unknown").write_bytes(b"")
    status = filled.file_status()
    assert sorted(status.modified) == ["a.txt", "d/empty", "d/link", "z"]
    assert status.missing == ["d/small"]
    assert status.unchanged == ["d/e/big.bin"]


def test_changed_files_are_not_overwritten(filled: Repo) -> None:
    fill(filled.path, {"a.txt": b"second\n", "new": b"new"})
    commit(filled, "a.txt", "d", "z", "new")
    fill(filled.path, {"a.txt": b"not committed\n", "z": b"nor this"})
    before = content(filled.path)
    with pytest.raises(ConflictError, match=r"2 file\(s\) in .* would be overwritten: a.txt, z") as caught:
        filled.checkout_files("main~1")
    assert "--force" in str(caught.value.hint)
    assert content(filled.path) == before
    filled.checkout_files("main~1", force=True)
    assert content(filled.path) == {**FILES, "d/link": ("link", "../a.txt"), "new": b"new"}


def test_committed_files_are_replaced_by_those_of_another_commit(filled: Repo) -> None:
    fill(filled.path, {"a.txt": b"second\n"})
    commit(filled, "a.txt", "d", "z")
    report = filled.checkout_files("main~1")  # what lies there is HEAD's, so nothing is lost
    assert report.written == ["a.txt"]
    assert content(filled.path) == {**FILES, "d/link": ("link", "../a.txt")}


def test_a_file_that_was_never_committed_is_not_overwritten(repo: Repo) -> None:
    fill(repo.path, {"f": b"committed"})
    commit(repo, "f")
    fill(repo.path, {"g": b"g"})
    commit(repo, "g")
    fill(repo.path, {"f": b"mine now"})
    with pytest.raises(ConflictError, match="f"):
        repo.checkout_files("main~1")
    assert (repo.path / "f").read_bytes() == b"mine now"


def test_links_are_stored_and_never_followed(repo: Repo, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    fill(outside, {"secret": b"secret"})
    (repo.path / "out").symlink_to(outside)
    (repo.path / "dangling").symlink_to(
        "/nowhere/\udcff".encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    )
    commit(repo, "out", "dangling")
    assert repo.checkout() == {"out": os.fsencode(outside), "dangling": b"/nowhere/\xff"}
    repo.checkout_files("main", tmp_path / "copy")
    assert os.readlink(tmp_path / "copy/out") == str(outside)
    assert os.readlink(os.fsencode(tmp_path / "copy/dangling")) == b"/nowhere/\xff"


@pytest.mark.parametrize("force", [False, True])
def test_a_link_planted_in_the_way_leads_nowhere(filled: Repo, tmp_path: Path, force: bool) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    place = tmp_path / "place"
    place.mkdir()
    (place / "d").symlink_to(outside)
    with pytest.raises((ConflictError, StorageError)):
        filled.checkout_files("main", place, force=force)
    assert content(outside) == {}
    # A link in place of the file itself is replaced, not written through.
    (place / "d").unlink()
    (place / "a.txt").unlink(missing_ok=True)
    (outside / "target").write_bytes(b"theirs")
    (place / "a.txt").symlink_to(outside / "target")
    filled.checkout_files("main", place, force=True)
    assert content(outside) == {"target": b"theirs"}
    assert (place / "a.txt").read_bytes() == b"one\n"
    assert not (place / "a.txt").is_symlink()


def test_names_of_any_bytes(repo: Repo, tmp_path: Path) -> None:
    names = [b"caf\xe9", "ünï 文".encode(), b"a b\n", b"-x", b"\\", b"~", b"a:b", b"\x01"]
    for name in names:
        with open(os.path.join(os.fsencode(repo.path), b"d-" + name), "wb") as file:
            file.write(name)
    found = sorted(os.listdir(repo.path))
    found.remove(".ckpt")
    repo.commit_files({name: repo.path / name for name in found})
    repo.checkout_files("main", tmp_path / "out")
    assert sorted(os.listdir(os.fsencode(tmp_path / "out"))) == sorted(b"d-" + name for name in names)
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path / "out"), b"d-" + name), "rb") as file:
            assert file.read() == name


def test_the_repository_and_empty_folders_are_left_out(repo: Repo) -> None:
    fill(repo.path, {"a": b"a", "inner/b": b"b"})
    (repo.path / "void" / "inside").mkdir(parents=True)
    Repo.init(repo.path / "inner").close()
    made = repo.commit_files({"all": repo.path})
    assert repo.checkout(made) == {"all/a": b"a", "all/inner/b": b"b"}
    root = repo.commit_files({".": repo.path})
    assert repo.checkout(root) == {"a": b"a", "inner/b": b"b"}


def test_what_is_no_file_is_listed(repo: Repo) -> None:
    fill(repo.path, {"d/ok": b"ok"})
    os.mkfifo(repo.path / "d" / "pipe")
    short = Path(os.path.relpath(repo.path / "d" / "sock"))
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(repo.path / "d")
        try:
            server.bind("sock")  # a path of a socket must be short
        finally:
            os.chdir(here)
    assert short.exists()
    with pytest.raises(InvalidError, match=r"d/pipe: .*; d/sock: ") as caught:
        commit(repo, "d")
    assert caught.value.code == "unsupported-leaf"
    assert repo.branches() == {}


def test_nothing_is_no_commit(repo: Repo) -> None:
    (repo.path / "void" / "inside").mkdir(parents=True)
    for paths in ({}, {"void": repo.path / "void"}, {".": repo.path}, {"x": repo.path / ".ckpt"}):
        with pytest.raises(InvalidError, match="nothing to commit"):
            repo.commit_files(paths)
    with pytest.raises(InvalidError, match="nothing to commit"):
        repo.commit({"n": 1}, files={"void": repo.path / "void"})
    assert repo.branches() == {}
    assert repo.checkout(repo.commit({"n": 1}, files={})) == {"n": 1}
    (repo.path / "link").symlink_to("nowhere")
    assert repo.checkout(repo.commit_files({".": repo.path})) == {"link": b"nowhere"}


@pytest.mark.parametrize("source", ["..", ".", "d/..", "../d/e/.."])
def test_folders_without_a_name_of_their_own(
    repo: Repo, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    fill(repo.path, {"d/e/f": b"f"})
    monkeypatch.chdir(repo.path / "d")
    made = repo.commit_files({"x": source})
    below = os.path.relpath(repo.path / "d/e/f", source)
    assert repo.checkout(made) == {f"x/{below}": b"f"}


def test_the_name_of_the_repository_is_refused_in_a_commit(repo: Repo) -> None:
    fill(repo.path, {"f": b"f", "other/.CKPT": b"a file", "sub/.Ckpt/f": b"in a folder", "sub/g": b"g"})
    for name in (".ckpt", ".ckpt/refs.journal", "a/.ckpt/f", ".CKPT/f", "a/.Ckpt"):
        with pytest.raises(InvalidError, match=r"cannot be a path .* the repository's own"):
            repo.commit_files({name: repo.path / "f"})
        with pytest.raises(InvalidError, match="repository's own"):
            repo.commit({}, files={name: repo.path / "f"})
    with pytest.raises(InvalidError, match=r"o/\.CKPT: the name"):
        repo.commit_files({"o": repo.path / "other"})
    assert repo.checkout(repo.commit_files({"sub": repo.path / "sub"})) == {"sub/g": b"g"}


def stored(folder: dict[str, Any]) -> tuple[MemoryStore, ObjectId]:
    """A tree of files as no commit would make it: names and targets are not checked."""

    def made(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: made(each) for name, each in value.items()}
        if isinstance(value, str):
            return tree.LinkContent(value)
        data, mode = value if isinstance(value, tuple) else (value, 0o644)
        sources = [BytesSource(data)] if data else []
        return tree.FileContent(len(data), mode, bytes(chunk_id(data)), 0, sources)

    store = MemoryStore()
    return store, tree.write(store, files=made(folder)).tree


HOSTILE: dict[str, dict[str, Any]] = {
    "repository": {".ckpt": {"config.toml": b"x"}},
    "repository below": {"d": {".ckpt": {"format": b"x"}}},
    "repository in capitals": {".CKPT": {"format": b"x"}},
    "repository file": {".Ckpt": b"x"},
    "up": {"..": {"x": b"x"}},
    "up in one name": {"a/../../x": b"x"},
    "here": {".": b"x"},
    "absolute": {"/etc/x": b"x"},
    "empty": {"": b"x"},
    "empty step": {"a//b": b"x"},
    "NUL": {"a\0b": b"x"},
    "no byte": {"a\ud800b": b"x"},
    "NUL in a link": {"link": "a\0b"},
    "link to nothing": {"link": ""},
    "link without bytes": {"link": "\ud800"},
    "file as folder": {"a": b"x", "a/b": b"x"},
    "link as folder": {"a": "/tmp", "a/evil": b"x"},
    "link as folder, later": {"a/b/evil": b"x", "a/b": "/tmp"},
    "link to the repository": {"a": ".ckpt", "a/config.toml": b"x"},
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("force", [False, True])
def test_hostile_trees_are_refused_before_anything_is_written(tmp_path: Path, name: str, force: bool) -> None:
    store, id = stored({"0 first": b"fine", **HOSTILE[name], "z last": b"fine"})
    with pytest.raises(CorruptionError, match="the commit holds"):
        files.write_out(store, id, tmp_path / "out", force=force)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CorruptionError, match="the commit holds"):
        files.contents(store, id)


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o1755, 0o7777, 0o170755])
def test_special_permission_bits_of_a_commit_are_left_out(tmp_path: Path, mode: int) -> None:
    store, id = stored({"f": (b"#!/bin/sh\n", mode)})
    assert [entry.mode for entry in files.entries(store, id)] == [mode & 0o777]
    files.write_out(store, id, tmp_path)
    assert (tmp_path / "f").stat().st_mode & 0o7777 == mode & 0o777
    assert files.write_out(store, id, tmp_path).unchanged == ["f"]
    assert files.status(store, id, tmp_path).unchanged == ["f"]


TRANSITIONS: list[tuple[dict[str, bytes], list[str], dict[str, Any], bool]] = [
    # files there, empty folders there, the tree, whether force may do it
    ({"a": b"old"}, [], {"a": {"b": b"new"}}, True),
    ({"a": b"old"}, [], {"a": {"b": {"c": b"new"}, "d": b"new"}}, True),
    ({}, ["a"], {"a": b"new"}, True),
    ({}, ["d/a"], {"d": {"a": "target"}}, True),
    ({"a/old": b"old"}, [], {"a": b"new"}, False),
    ({}, ["a/inside"], {"a": b"new"}, False),
    ({"a/old": b"old", "b": b"old"}, ["c"], {"a": b"new", "b": {"x": b"new"}, "c": b"new"}, False),
]


@pytest.mark.parametrize(("there", "folders", "wanted", "possible"), TRANSITIONS)
def test_a_file_where_a_folder_belongs_and_the_reverse(
    tmp_path: Path, there: dict[str, bytes], folders: list[str], wanted: dict[str, Any], possible: bool
) -> None:
    store, id = stored({"0": b"first", **wanted})
    fill(tmp_path, there)
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConflictError, match="would be overwritten"):
        files.write_out(store, id, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    if possible:
        files.write_out(store, id, tmp_path, force=True)
        assert files.write_out(store, id, tmp_path).written == []
    else:
        with pytest.raises(ConflictError, match=r"1 path\(s\) in .* are in the way: a") as caught:
            files.write_out(store, id, tmp_path, force=True)
        assert caught.value.hint == "move them away"
        assert sorted(tmp_path.rglob("*")) == before
        assert content(tmp_path) == there


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", "a\0b", "..", "\ud800", 5])
def test_impossible_tree_paths(repo: Repo, name: Any) -> None:
    fill(repo.path, {"f": b""})
    with pytest.raises(InvalidError, match="cannot be a path"):
        repo.commit_files({name: repo.path / "f"})


def test_paths_that_collide(repo: Repo) -> None:
    fill(repo.path, {"f": b"f", "d/g": b"g"})
    for paths in (
        {"x": "f", "x/y": "d/g"},
        {"x/y": "d/g", "x": "f"},
        {"x": "f", "./x": "d/g"},
        {"x": "d", "x/g": "f"},
        {"x/g": "f", "x": "d"},
        {"x": "d", "x/g/y": "f"},
    ):
        with pytest.raises(InvalidError, match="two different things would be stored as 'x"):
            repo.commit_files({name: repo.path / path for name, path in paths.items()})
    with pytest.raises(InvalidError, match="no name for a file"):
        repo.commit_files({".": repo.path / "f"})
    twice = repo.on("twice").commit_files({"d": repo.path / "d", "d/g": repo.path / "d/g", ".": repo.path})
    assert repo.checkout(twice) == {"d/g": b"g", "f": b"f"}
    merged = repo.commit_files({"x": repo.path / "d", "x/f": repo.path / "f"})
    assert repo.checkout(merged) == {"x/g": b"g", "x/f": b"f"}
    assert repo.branches() == {"main": merged.id, "twice": twice.id}


def test_missing_files(repo: Repo) -> None:
    fill(repo.path, {"f": b""})
    for name in ("gone", "gone/further", "f/below"):
        with pytest.raises(NotFoundError, match=name.split("/")[0]):
            commit(repo, name)
    assert repo.branches() == {}


@pytest.mark.parametrize("how", ["grows", "shrinks", "changes", "goes"])
def test_a_file_that_changes_while_it_is_committed(
    repo: Repo, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Between hashing and storing. Refused: never a mixture under the hash of neither."""
    from ckptvcs.state import files

    fill(repo.path, {"f": BIG})
    path = repo.path / "f"
    plain = files.collected
    after = {"grows": BIG + b"x", "shrinks": BIG[:-1], "changes": BIG[:-9] + b"123456789"}.get(how)

    def then_change(*arguments: Any) -> Any:
        found = plain(*arguments)
        path.unlink() if after is None else path.write_bytes(after)
        return found

    monkeypatch.setattr(files, "collected", then_change)
    if how == "grows":  # a log that is written meanwhile is stored as it was
        assert repo.checkout(commit(repo, "f")) == {"f": BIG}
        return
    with pytest.raises(InvalidError, match="f was changed while it was being committed") as caught:
        commit(repo, "f")
    assert caught.value.code == "state-changed"
    assert repo.branches() == {}
    assert repo.fsck(full=True).ok


def test_a_full_folder_is_written_whole_or_not_at_all(
    filled: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptvcs.disk import WriteFile

    place = tmp_path / "out"
    fill(place, {"d/e/big.bin": b"old"})
    plain = WriteFile.write
    monkeypatch.setattr(
        WriteFile, "write", lambda self, data: _full(self) if len(data[0]) > 1 << 20 else plain(self, data)
    )
    with pytest.raises(StorageError, match="full"):
        filled.checkout_files("main", place, force=True)
    assert content(place)["d/e/big.bin"] == b"old"
    assert not list(place.rglob("*ckpt-tmp*"))


def _full(file: Any) -> None:
    from ckptvcs.disk import translated

    with translated("write", file.path):
        raise OSError(28, "No space left on device")


names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8).filter(
    lambda name: name not in (".", "..", ".ckpt")
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.lists(names, min_size=1, max_size=3).map("/".join), st.binary(max_size=400), max_size=6
    )
)
def test_any_files(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    place = tmp_path_factory.mktemp("any")
    with Repo.init(place / "r") as repo:
        whole: dict[str, bytes] = {}
        for name, data in files.items():
            try:
                fill(place / "in", {name: data})
            except OSError:  # a file where a folder belongs, or the other way round, or too long a name
                continue
            whole[name] = data
        (place / "in").mkdir(exist_ok=True)
        if not whole:
            with pytest.raises(InvalidError, match="nothing to commit"):
                repo.commit_files({".": place / "in"})
            return
        repo.commit_files({".": place / "in"})
        assert repo.checkout() == whole
        repo.checkout_files("main", place / "out")
        assert content(place / "out") == whole
