"""Repositories that several users share, that can only be read, and that are on a network file system."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ckptvcs import Repo
from ckptvcs.disk import Disk, _mounted_type
from ckptvcs.errors import CkptError, InvalidError, LockedError, StorageError
from ckptvcs.store import Move
from ckptvcs.store.index import Index
from ckptvcs.store.index_free import IndexFreeStore

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user or mount")


@pytest.fixture(params=[0o077, 0o000], ids=["umask 077", "umask 000"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, which those of pytest are not."""
    with tempfile.TemporaryDirectory(prefix="ckptvcs-") as name:
        os.chmod(name, 0o755)
        yield Path(name) / "runs"


def modes(folder: Path) -> dict[str, int]:
    root = folder / ".ckpt"
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.lstat().st_mode) for path in (root, *root.rglob("*"))
    }


def traces(folder: Path) -> dict[str, tuple[int, ...]]:
    """Everything that a writer would change."""
    found = {}
    for path in (folder / ".ckpt").rglob("*"):
        now = path.lstat()
        found[str(path)] = (now.st_mode, now.st_ino, now.st_size, now.st_nlink, now.st_mtime_ns)
    return found


def use(repo: Repo) -> None:
    """Everything that makes files."""
    repo.commit({"w": np.arange(1000.0), "n": len(repo.branches())}, "one")
    repo.configure("gc.grace", "1h")
    with repo.claim():
        repo.branch(f"b{len(repo.branches())}")
    repo.delete_branch(f"b{len(repo.branches()) - 1}", force=True)
    repo.gc(0)
    repo.fsck(rebuild=True)
    repo.commit({"w": np.arange(1001.0)}, "two")


@pytest.mark.parametrize(
    ("shared", "of_folders", "of_files", "of_packs"),
    [
        ("group", 0o2770, 0o660, 0o440),
        ("all", 0o2775, 0o664, 0o444),
        ("0640", 0o2750, 0o640, 0o440),
        ("666", 0o2777, 0o666, 0o444),
    ],
)
def test_every_file_has_its_mode(
    tmp_path: Path, umask: int, shared: str, of_folders: int, of_files: int, of_packs: int
) -> None:
    with Repo.init(tmp_path, shared=shared) as repo:
        use(repo)
    with Repo.open(tmp_path) as repo:
        use(repo)
    with Repo.open(tmp_path, "other", index_free=True) as repo:
        repo.commit({"a": np.arange(5000.0)}, "without the index")
        found = modes(tmp_path)
        assert sum(".bundle" in name for name in found) == 1
    with Repo.open(tmp_path):
        found |= modes(tmp_path)
    for name, mode in found.items():
        if (tmp_path / name).is_dir():
            assert mode == of_folders, name
        elif name.endswith((".pack", ".bundle")):
            assert mode == of_packs, name
        else:
            assert mode == of_files, name


def test_without_sharing_the_umask_decides(tmp_path: Path, umask: int) -> None:
    with Repo.init(tmp_path) as repo:
        use(repo)
    for name, mode in modes(tmp_path).items():
        if not name.endswith(".pack"):
            assert mode == (0o755 if (tmp_path / name).is_dir() else 0o644) & ~umask, name


@pytest.mark.parametrize("shared", ["world", "0600", "0755", "0460", "", "06444", "0o640", "99"])
def test_ways_to_share_that_mean_nothing(tmp_path: Path, shared: str) -> None:
    with pytest.raises(InvalidError, match="no way to share"):
        Repo.init(tmp_path, shared=shared)
    assert not (tmp_path / ".ckpt").exists()


def as_user(uid: int, gid: int, script: str, folder: Path) -> str:
    """Run a script as another user; what it prints."""

    def become() -> None:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
        os.umask(0o022)

    # The interpreter and its packages may lie where others cannot look: everything is loaded before.
    program = textwrap.dedent(
        """
        import os, sys
        import numpy, ckptvcs, ckptvcs.repo, ckptvcs.state.tree, ckptvcs.state.restore, ckptvcs.committing
        import ckptvcs.maintenance.gc, ckptvcs.maintenance.fsck, ckptvcs.maintenance.ingest
        import ckptvcs.store.choice, ckptvcs.state.distributed, ckptvcs.state.export, ckptvcs.history.graph
        from ckptvcs import Repo
        folder = sys.argv[1]
        with Repo.init(sys.argv[2]) as repo:  # loads what is loaded late
            repo.commit({"w": numpy.arange(9.0)}, "x")
            repo.fsck(full=True)
            repo.restore({"w": numpy.zeros(9)})
        os.chdir("/")
        os.setgroups([])
        os.setgid(int(sys.argv[4]))
        os.setuid(int(sys.argv[3]))
        os.umask(0o022)
        """
    ) + textwrap.dedent(script)
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [sys.executable, "-c", program, str(folder), scratch, str(uid), str(gid)],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "CKPT_AUTHOR": "second"},
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_root
def test_a_second_user_of_the_group_writes(open_folder: Path, umask: int) -> None:
    with Repo.init(open_folder, shared="group") as repo:
        repo.commit({"w": np.arange(1000.0)}, "one")
    said = as_user(
        4242,
        0,
        """
        with Repo.open(folder) as repo:
            state = {"w": numpy.zeros(1000)}
            repo.restore(state)
            assert (state["w"] == numpy.arange(1000.0)).all()
            repo.commit({"w": state["w"] + 1}, "two")
            repo.gc(0)
        with Repo.open(folder, "free", index_free=True) as repo:
            repo.restore({"w": numpy.zeros(1000)}, "main")
            repo.commit({"w": state["w"] + 2}, "three")
        print("done")
        """,
        open_folder,
    )
    assert said == "done\n"
    with Repo.open(open_folder) as repo:
        assert [commit.message for commit in repo.log("free")] == ["three", "two", "one"]
        assert repo.fsck(full=True).problems == []
    assert {mode for name, mode in modes(open_folder).items() if "." not in Path(name).name} <= {
        0o2770,
        0o660,
    }


@needs_root
@pytest.mark.parametrize("shared", [None, "all"])
def test_a_second_user_who_may_only_read(open_folder: Path, shared: str | None) -> None:
    with Repo.init(open_folder, shared=shared) as repo:
        repo.commit({"w": np.arange(1000.0)}, "one")
        with Repo.open(open_folder, "side", index_free=True) as other:
            other.commit({"a": 1}, "waits")
        before = traces(open_folder)
        said = as_user(
            4242,
            4242,
            """
            from ckptvcs.errors import CkptError
            with Repo.open(folder) as repo:
                print((repo.checkout()["w"] == numpy.arange(1000.0)).all(), repo.fsck(full=True).ok)
                print(*[commit.message for commit in repo.log()], *repo.branches())
                for work in (
                    lambda: repo.commit({"a": 1}, "no"),
                    lambda: repo.branch("no"),
                    lambda: repo.tag("no"),
                    lambda: repo.gc(),
                    lambda: repo.ingest(),
                    lambda: repo.claim(),
                    lambda: repo.fsck(rebuild=True),
                    lambda: repo.configure("gc.grace", "1h"),
                    lambda: repo.commit_async({"a": 1}, "no"),
                ):
                    try:
                        print("did", work())
                    except CkptError as error:
                        print(error.code)
            """,
            open_folder,
        )
        assert traces(open_folder) == before
    assert said.splitlines() == ["True True", "one main side", *["read-only"] * 9]


@contextlib.contextmanager
def mounted_read_only(folder: Path, place: Path) -> Iterator[Path]:
    place.mkdir()
    done = subprocess.run(["mount", "--bind", str(folder), str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("this machine does not let root mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@needs_root
def test_a_read_only_file_system(tmp_path: Path) -> None:
    """Beside a writer who has it mounted otherwise: nothing is locked, and nothing torn is read."""
    with Repo.init(tmp_path / "runs") as writer:
        first = writer.commit({"w": np.arange(1000.0)}, "one")
        with mounted_read_only(tmp_path / "runs", tmp_path / "mounted") as place, Repo.open(place) as repo:
            assert isinstance(repo._store, IndexFreeStore)
            assert np.array_equal(repo.checkout()["w"], np.arange(1000.0))
            writer.restore({"w": np.zeros(1000)})
            writer.commit({"w": np.arange(1000.0) * 1.01}, "two")
            writer.delete_branch("lost", force=True) if "lost" in writer.branches() else None
            writer.gc(0)
            assert np.array_equal(repo.checkout(first)["w"], np.arange(1000.0))
            assert [commit.message for commit in repo.log()] == ["one"]
            with pytest.raises(StorageError) as caught:
                repo.commit({"a": 1}, "no")
            assert caught.value.code == "read-only"
            with Repo.open(place) as again:
                assert [commit.message for commit in again.log()] == ["two", "one"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without being root: the disk says so."""
    with Repo.init(tmp_path) as repo:
        repo.commit({"a": 1}, "one")
    monkeypatch.setattr(Disk, "writable", lambda *_: False)
    with Repo.open(tmp_path) as repo:
        assert repo.checkout()["a"] == 1
        with pytest.raises(StorageError, match="reading only"):
            repo.commit({"a": 2}, "two")


def test_reading_without_an_index_to_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is missing, another repository's, or damaged: packs and journal have it all."""
    with Repo.init(tmp_path / "other"):
        pass
    with Repo.init(tmp_path / "runs") as repo:
        repo.commit({"a": 1}, "one")
    meta = tmp_path / "runs" / ".ckpt" / "meta"
    monkeypatch.setattr(Disk, "writable", lambda *_: False)
    foreign = (tmp_path / "other" / ".ckpt" / "meta" / "data.mdb").read_bytes()
    for content in (foreign, foreign[:4096], b"", bytes(20_000), None):
        if content is None:
            (meta / "data.mdb").unlink()
        else:
            (meta / "data.mdb").write_bytes(content)
        with Repo.open(tmp_path / "runs") as repo:
            assert [commit.message for commit in repo.log()] == ["one"]
            assert repo.fsck(full=True).ok


def test_copies_of_an_index_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every copy is that of one transaction."""
    with Repo.init(tmp_path) as repo:
        first = repo.commit({"a": 1}, "one")
        stop = threading.Event()

        def keep_moving() -> None:
            writer = repo.on("main")
            number = 0
            while not stop.is_set():
                names = [f"{n}-{number}" for n in range(20)]
                moves = [Move(f"refs/tags/{name}", None, first.id) for name in names]
                old = [Move(f"refs/tags/{n}-{number - 1}", first.id, None) for n in range(20) if number]
                assert writer.record([*moves, *old], "move")
                number += 1

        thread = threading.Thread(target=keep_moving)
        thread.start()
        copies = 0
        try:
            for number in range(40):
                to = tmp_path / f"copy{number}"
                to.mkdir()
                meta, index_id = tmp_path / ".ckpt" / "meta", repo._store.format.index
                index = Index.copied(Disk(), meta, to, index_id)
                if index is None:
                    continue
                copies += 1
                with index.snapshot() as snapshot:
                    tags = {name.rpartition("-")[2] for name in snapshot.refs("refs/tags/")}
                    assert len(tags) <= 1
                    assert len(snapshot.refs("refs/tags/")) == 20 * len(tags)
                    assert len(list(snapshot.log())) == snapshot.position()
                index.close()
        finally:
            stop.set()
            thread.join()
        assert copies > 0


# -- network file systems -------------------------------------------------------------------------

TABLE = r"""22 1 0:21 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /home rw - nfs4 server:/home rw,vers=4.2
31 30 0:41 / /home/local rw - xfs /dev/vdb rw
32 22 0:42 / /scratch rw - lustre 10.0.0.1@tcp:/scratch rw
33 22 0:43 / /mnt/with\040space rw - fuse.sshfs host:/ rw
34 22 0:44 / /var/lib/merged rw - overlay overlay rw
35 22 0:45 / /mnt/podman rw - fuse.fuse-overlayfs fuse-overlayfs rw
36 22 0:46 / /over rw - nfs old rw
37 36 0:47 / /over rw - ext4 new rw
38 22 0:21 /data /bind rw - ext4 /dev/vda rw
broken line
"""


@pytest.mark.parametrize(
    ("device", "path", "kind"),
    [
        ("0:21", "/data/runs", "ext4"),
        ("0:40", "/home/me/runs", "nfs4"),
        ("0:41", "/home/local/runs", "xfs"),
        ("0:40", "/homeless", "ext4"),
        ("0:42", "/scratch", "lustre"),
        ("0:43", "/mnt/with space/x", "fuse.sshfs"),
        ("0:44", "/var/lib/merged/x", "overlay"),
        ("0:47", "/over/x", "ext4"),
        ("0:99", "/over/x", "ext4"),
        ("0:21", "/bind/x", "ext4"),
    ],
)
def test_which_file_system_a_path_is_on(device: str, path: str, kind: str) -> None:
    assert _mounted_type(TABLE, device, path) == kind


def test_local_places_are_local(tmp_path: Path) -> None:
    assert Disk().network(tmp_path) is None
    assert Disk().network(tmp_path / "missing") is None


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "fuse.sshfs"])
def test_the_index_is_not_used_over_a_network(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Repo.init(tmp_path / "before").close()
    monkeypatch.setattr(Disk, "network", lambda *_: kind)
    for refused in (lambda: Repo.init(tmp_path / "new"), lambda: Repo.open(tmp_path / "before")):
        with pytest.raises(StorageError, match=kind) as caught:
            refused()
        assert caught.value.code == "network"
        assert "CKPT_INDEX_FREE" in (caught.value.hint or "")
    assert not (tmp_path / "new").exists()
    # Jobs commit there without it.
    with Repo.open(tmp_path / "before", index_free=True) as repo:
        repo.commit({"a": 1}, "one")
    # Whoever knows that one host alone uses it says so.
    (tmp_path / "before" / ".ckpt" / "config.toml").write_text("index.network = true\n")
    with Repo.open(tmp_path / "before") as repo:
        assert [commit.message for commit in repo.log()] == ["one"]
    with Repo.init(tmp_path / "new", network=True) as repo:
        assert repo.config.get("index.network") is True
    Repo.open(tmp_path / "new").close()


# -- the exclusive lock ---------------------------------------------------------------------------


@pytest.mark.parametrize("index_free", [False, True])
def test_every_opening_waits_for_the_exclusive_lock(
    tmp_path: Path, index_free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Repo.init(tmp_path).close()
    monkeypatch.setattr("ckptvcs.store.store._LOCK_WAIT", 0.05)
    with Disk().lock(tmp_path / ".ckpt" / "lock"), pytest.raises(LockedError, match="locked"):
        Repo.open(tmp_path, index_free=index_free)
    Repo.open(tmp_path, index_free=index_free).close()


def test_the_index_grows_when_nobody_else_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptvcs.store.index.MAP_SIZE", 1 << 18)

    def size(repo: Repo) -> int:
        return int(repo._store.index._attach(create=False).env.info()["map_size"])

    with Repo.init(tmp_path) as repo:
        made = repo.commit({"n": 1}, "one")
        number = 0
        with pytest.raises(CkptError) as caught:  # noqa: PT012 - which one it is, nobody knows before
            while number < 1000:
                number += 1
                repo.tag(f"{number}" + "t" * 150, made)
        assert caught.value.code == "index-full"
        assert "open it again" in (caught.value.hint or "")
        tags = repo.tags()
        assert repo.fsck(full=True).problems == []
        with Repo.open(tmp_path) as other:
            assert size(other) == 1 << 18, "somebody else has it open"
    with Repo.open(tmp_path) as repo:
        assert size(repo) == 1 << 19
        assert repo.tags() == tags
        for number in range(30):
            repo.tag(f"more{number}", repo.commit({"n": number}, "x" * 100))
        assert repo.fsck(full=True).problems == []
