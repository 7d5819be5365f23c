"""The one door to files: locks, publishing, folders, and what errors say."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptvcs.disk import Disk, Folder, WriteFile, check_name, check_target, translated, usable_cpus
from ckptvcs.errors import LockedError, StorageError

disk = Disk()


def in_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked child; its exit status: 0 fine, 7 LockedError, 9 anything else."""
    child = os.fork()
    if child == 0:
        status = 9
        try:
            action()
            status = 0
        except LockedError:
            status = 7
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "words", "code"),
    [
        (errno.ENOSPC, "the disk is full", "disk-full"),
        (errno.EDQUOT, "the disk quota is used up", "disk-full"),
        (errno.EACCES, "permission denied", "storage"),
        (errno.EROFS, "read-only", "storage"),
        (errno.EIO, "I/O error", "storage"),
        (errno.EFBIG, "larger than this process may write", "storage"),
        (errno.ELOOP, "symbolic links", "storage"),
    ],
)
def test_errors_name_path_and_cause(number: int, words: str, code: str) -> None:
    with pytest.raises(StorageError) as caught, translated("write", "/some/file"):
        raise OSError(number, os.strerror(number))
    assert caught.value.errno == number
    assert caught.value.path == "/some/file"
    assert caught.value.code == code
    assert caught.value.message.startswith("cannot write /some/file: ")
    assert words in caught.value.message


def test_missing_and_taken_stay_what_they_are() -> None:
    for kind in (FileNotFoundError, FileExistsError):
        with pytest.raises(kind), translated("open", "x"):
            raise kind
    with pytest.raises(StorageError, match="inner"), translated("open", "x"):
        raise StorageError("inner")


# -- files ----------------------------------------------------------------------------------------


def test_write_read_truncate(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with disk.create(path) as file:
        file.write([b"ab", b"", bytearray(b"cd"), memoryview(b"efgh").cast("H")])
        assert file.size == 8
        file.write([b"x"] * 2000)
        assert file.read(2, 4) == b"cdef"
        file.truncate(10)
        assert file.size == 10
        file.sync()
    assert disk.read(path) == b"abcdefghxx"
    assert disk.size(path) == 10
    with disk.append(path) as file:
        assert file.size == 10
        file.write([b"!"])
    with disk.open(path) as reading:
        assert reading.size() == 11
        assert reading.read(8, 100) == b"xx!"
        assert reading.read(50, 4) == b""
        buffer = bytearray(6)
        assert reading.read_into(memoryview(buffer), 8) == 3
        assert buffer == b"xx!\0\0\0"
    with pytest.raises(FileExistsError):
        disk.create(path)
    with pytest.raises(FileNotFoundError):
        disk.open(tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        disk.append(tmp_path / "missing")


def test_a_partial_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.writev

    def little(fd: int, buffers: list[memoryview]) -> int:
        return real(fd, [b"".join(buffers)[:3]])

    monkeypatch.setattr(os, "writev", little)
    with disk.create(tmp_path / "file") as file:
        file.write([b"abcd", b"e", b"fghij"])
        assert file.size == 10
    assert disk.read(tmp_path / "file") == b"abcdefghij"


def test_files_are_not_followed_through_links(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"keep")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(StorageError, match="symbolic links"):
        disk.append(tmp_path / "link")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert disk.exists(tmp_path / "dangling")
    with pytest.raises(FileExistsError):
        disk.create(tmp_path / "dangling")
    assert not (tmp_path / "nowhere").exists()


def test_publish_never_replaces(tmp_path: Path) -> None:
    new, final = tmp_path / "new", tmp_path / "final"
    new.write_bytes(b"new")
    final.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        disk.publish(new, final)
    assert final.read_bytes() == b"old"
    assert new.read_bytes() == b"new"
    final.unlink()
    disk.publish(new, final)
    assert final.read_bytes() == b"new"
    assert not new.exists()


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_publish_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    new, final = tmp_path / "new", tmp_path / "final"
    new.write_bytes(b"new")
    final.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        disk.publish(new, final)
    assert final.read_bytes() == b"old"
    final.unlink()
    disk.publish(new, final)
    assert final.read_bytes() == b"new"
    assert not new.exists()


def test_of_many_publishers_one_wins(tmp_path: Path) -> None:
    final = tmp_path / "final"
    won = []

    def publish(number: int) -> None:
        mine = tmp_path / f"mine{number}"
        mine.write_bytes(b"%d" % number)
        try:
            disk.publish(mine, final)
            won.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=publish, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert final.read_bytes() == b"%d" % won[0]


def test_replace_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    disk.replace(path, b"one")
    disk.replace(path, b"two")
    assert path.read_bytes() == b"two"

    def fail(_: object) -> None:
        raise StorageError("sync failed")

    monkeypatch.setattr(WriteFile, "sync", fail)
    with pytest.raises(StorageError):
        disk.replace(path, b"three")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["file"]


def test_small_questions(tmp_path: Path) -> None:
    assert disk.names(tmp_path / "missing") == []
    disk.make_dir(tmp_path / "b")
    disk.make_dir(tmp_path / "b")
    (tmp_path / "a").touch()
    assert disk.names(tmp_path) == ["a", "b"]
    assert disk.is_dir(tmp_path / "b")
    assert not disk.is_dir(tmp_path / "a")
    assert not disk.exists(tmp_path / "a" / "below a file")
    disk.protect(tmp_path / "a")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o444
    disk.remove(tmp_path / "a")
    disk.remove(tmp_path / "a")
    disk.remove_tree(tmp_path / "b")
    disk.remove_tree(tmp_path / "b")
    disk.sync_dir(tmp_path)
    assert disk.names(tmp_path) == []
    assert disk.free_bytes(tmp_path) > 0
    assert disk.writable(tmp_path)
    assert disk.same_file(tmp_path) == disk.same_file(tmp_path / "..") or tmp_path.parent != tmp_path
    assert disk.process() == os.getpid()
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)


# -- locks ----------------------------------------------------------------------------------------


def test_locks_exclude(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with disk.lock(path) as lock:
        assert lock.held
        with pytest.raises(LockedError, match="locked by another process"):
            disk.lock(path)
        with pytest.raises(LockedError):
            disk.lock(path, shared=True)
        assert in_child(lambda: disk.lock(path)) == 7
    assert not lock.held
    with disk.lock(path, shared=True), disk.lock(path, shared=True):
        assert in_child(lambda: disk.lock(path, shared=True)) == 0
        assert in_child(lambda: disk.lock(path)) == 7
    assert in_child(lambda: disk.lock(path)) == 0
    lock.release()  # twice is fine


def test_a_folder_can_be_locked(tmp_path: Path) -> None:
    with disk.lock(tmp_path):
        assert in_child(lambda: disk.lock(tmp_path)) == 7
    assert in_child(lambda: disk.lock(tmp_path)) == 0


def test_waiting_for_a_lock(tmp_path: Path) -> None:
    lock = disk.lock(tmp_path / "lock")
    timer = threading.Timer(0.05, lock.release)
    timer.start()
    disk.lock(tmp_path / "lock", wait=30).release()
    timer.join()


def test_an_unlinked_lock_is_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with disk.lock(path) as old:
        disk.remove(path)
        assert not old.held
        with disk.lock(path) as new:
            assert new.held
            assert not old.held


def test_a_forked_child_does_not_hold_the_parents_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = disk.lock(path)
    (heard, tell), (readable, writable) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writable)
        os.write(tell, b"!")
        os.read(readable, 1)  # lives on until told
        os._exit(0 if not lock.held else 1)
    try:
        os.close(readable)
        os.close(tell)
        assert os.read(heard, 1) == b"!"
        os.close(heard)
        lock.release()
        disk.lock(path).release()  # free although the child lives
    finally:
        os.close(writable)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    child = os.fork()
    if child == 0:
        disk.lock(path)
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert path.exists()
    disk.lock(path).release()


# -- folders of the user's ------------------------------------------------------------------------

BAD_NAMES = ["", ".", "..", "a/b", "/etc", "../x", "a\0b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_traversal_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError, match="refusing the file name"):
        check_name(name)
    with Folder.open(tmp_path) as folder:
        for action in (
            folder.enter,
            folder.kind,
            folder.stat,
            folder.open_file,
            folder.read_link,
            folder.remove,
            lambda name: folder.write_link(name, "x"),
            lambda name: folder.writing(name, 0o644).__enter__(),
        ):
            with pytest.raises(StorageError, match="refusing the file name"):
                action(name)


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("keep")
    home = tmp_path / "home"
    home.mkdir()
    (home / "folder").symlink_to(outside)
    (home / "file").symlink_to(outside / "secret")
    with Folder.open(home) as folder:
        assert folder.kind("folder") == "link"
        for create in (False, True):
            with pytest.raises(StorageError):
                folder.enter("folder", create=create)
        with pytest.raises(StorageError, match="symbolic links"):
            folder.open_file("file")
        assert folder.read_link("file") == str(outside / "secret")
        with folder.writing("file", 0o600) as file:
            file.write([b"mine"])
        assert folder.kind("file") == "file"
        folder.write_link("folder", "nowhere")
        assert folder.read_link("folder") == "nowhere"
    assert (outside / "secret").read_text() == "keep"
    assert (home / "file").read_text() == "mine"
    with Folder.open(home.parent / "home") as folder:  # the person's own path may hold links
        assert folder.names() == ["file", "folder"]


def test_folders_and_files(tmp_path: Path) -> None:
    with Folder.open(tmp_path / "a" / "b", create=True) as folder:
        with pytest.raises(FileNotFoundError):
            folder.enter("c")
        with folder.enter("c", create=True) as below, below.writing("f", 0o750) as file:
            file.write([b"12345"])
            assert [name for name in below.names() if not name.endswith(".ckpt-tmp")] == []
        assert folder.kind("c") == "folder"
        assert folder.kind("missing") is None
        os.mkfifo(tmp_path / "a" / "b" / "pipe")
        assert folder.kind("pipe") == "other"
        with folder.enter("c") as below:
            assert below.names() == ["f"]
            assert below.stat("f") == (5, 0o750)
            with below.open_file("f") as reading:
                assert reading.read(0, 9) == b"12345"
            with pytest.raises(TypeError), below.writing("f", 0o644) as file:
                file.write([b"half", None])  # type: ignore[list-item]
            assert below.names() == ["f"]
            assert (tmp_path / "a" / "b" / "c" / "f").read_bytes() == b"12345"
            below.remove("f")
            below.remove("f")
            below.sync()
            assert below.names() == []


@pytest.mark.parametrize("target", ["", "a\0b", "\ud800"])
def test_targets_that_no_link_can_have(target: str) -> None:
    with pytest.raises(StorageError, match="refusing the link target"):
        check_target(target)
    check_target("caf\udce9")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "\ud800"])
def test_names_that_are_no_step_below_a_folder(name: str) -> None:
    with pytest.raises(StorageError, match="refusing the file name"):
        check_name(name)
    check_name("caf\udce9")


def test_only_an_empty_folder_is_removed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / "x").mkdir(parents=True)
    with Folder.open(tmp_path) as folder:
        folder.remove_folder("empty")
        with pytest.raises(StorageError, match="cannot remove"):
            folder.remove_folder("full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path: Path) -> None:
    """Opening a pipe waits for a writer for ever, and a device never ends."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    disk = Disk()
    for name in ("pipe", "device", "folder"):
        with pytest.raises(StorageError, match="no ordinary file"):
            disk.open(tmp_path / name)
        with pytest.raises(StorageError, match="no ordinary file"):
            disk.read(tmp_path / name)
    for name in ("pipe", "folder"):
        with pytest.raises(StorageError):
            disk.append(tmp_path / name)
    with Folder.open(tmp_path) as folder, pytest.raises(StorageError, match="no ordinary file"):
        folder.open_file("pipe")


def test_a_small_file_is_small(tmp_path: Path) -> None:
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 40)
    with pytest.raises(StorageError, match="where at most 16777216 belong"):
        Disk().read(tmp_path / "large")
