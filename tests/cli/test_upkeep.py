"""ckpt gc, ckpt ingest, ckpt fsck, ckpt config; sharing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from ckptvcs import Repo
from ckptvcs.disk import Disk
from ckptvcs.store.format import Format
from tests.cli.command import ckpt, commit_state, refused


def test_gc_announces_holds_and_frees(repo: Repo, folder: Path) -> None:
    commit_state(repo, 1)
    commit_state(repo.on("worse"), 2)
    repo.delete_branch("worse", force=True)

    out = ckpt(folder, "gc").out
    assert "Freed 0 B." in out
    assert "stays recoverable for 24 h; `ckpt gc --grace 0` frees it now." in out

    announced = ckpt(folder, "gc", "--dry-run", "--grace", "0", "--json").json
    assert set(announced) == {
        "dry_run", "freed", "records", "commits", "packs", "reencoded", "disk", "leftovers", "held",
        "grace", "expired", "problems",
    }  # fmt: skip
    assert "Would free" in ckpt(folder, "gc", "--dry-run", "--grace", "0").out
    freed = ckpt(folder, "gc", "--grace", "0", "--json").json
    assert freed["freed"] == announced["freed"] > 0
    assert repo.resolve("main").step == 1


def test_gc_refuses(repo: Repo, folder: Path) -> None:
    refused(
        folder,
        "gc",
        "--grace",
        "soon",
        code=2,
        words=(
            "'soon'",
            "24h",
        ),
    )
    with Disk().lock(folder / ".ckpt" / "gc.lock"):
        refused(folder, "gc", code=11)


def test_repack(repo: Repo, folder: Path) -> None:
    for step in (1, 2, 3):
        commit_state(repo, step)
    keys = {
        "dry_run", "chunks", "looked", "left", "saved", "read_saved", "newest_saved", "packs", "into",
        "freed", "renewed", "problems",
    }  # fmt: skip
    announced = ckpt(folder, "repack", "--dry-run", "--json").json
    assert set(announced) == keys
    assert announced["packs"] == 3
    assert "Would put 3 packs into 1." in ckpt(folder, "repack", "--dry-run").out
    done = ckpt(folder, "repack").out
    assert "Put 3 packs into 1." in done
    assert "smaller on the disk." in done
    assert len(list((folder / ".ckpt" / "packs").rglob("*.pack"))) == 1
    assert ckpt(folder, "repack", "--older-than", "30d", "--json").json["packs"] == 0
    assert "Copied 0 B out of 0 old packs" in ckpt(folder, "repack", "--older-than", "30d").out
    refused(folder, "repack", "--older-than", "soon", code=2, words=("'soon'", "24h"))
    refused(folder, "repack", "--older-than", "3d", "--smallest", code=2)
    with Disk().lock(folder / ".ckpt" / "gc.lock"):
        refused(folder, "repack", code=11)
    assert repo.resolve("main").step == 3


def test_fsck_is_content(states: Path) -> None:
    out = ckpt(states, "fsck", "--full").out
    assert "4 commits" in out
    assert "All is well." in out
    found = ckpt(states, "fsck", "--json").json
    assert set(found) == {"ok", "full", "level", "refs", "commits", "records", "packs", "bytes", "problems"}
    assert (found["ok"], found["problems"]) == (True, [])


def test_fsck_finds_a_truncated_pack(files: Path) -> None:
    pack = next((files / ".ckpt" / "packs").rglob("*.pack"))
    data = pack.read_bytes()
    pack.chmod(0o644)
    pack.write_bytes(data[: len(data) // 2])
    done = ckpt(files, "fsck", code=13)
    assert str(pack) in done.out
    assert "found." in done.out
    found = ckpt(files, "fsck", "--json", code=13).json
    assert found["ok"] is False
    assert set(found["problems"][0]) == {"message", "id", "path", "refs", "commits", "tensors"}


def test_fsck_rebuilds(files: Path) -> None:
    with Repo.open(files) as repo:
        before = (repo.head(), repo.branches())
    shutil.rmtree(files / ".ckpt" / "meta")
    (files / ".ckpt" / "meta").mkdir()
    done = ckpt(files, "log", "-n", "1", "--oneline")
    assert done.err.startswith("warning: ")
    assert "rebuil" in done.err
    assert "files 2" in done.out
    found = ckpt(files, "fsck", "--rebuild", "--json").json
    assert set(found["rebuilt"]) == {"packs", "records", "log_entries", "left_out", "problems"}
    assert "Made the index anew" in ckpt(files, "fsck", "--rebuild").out
    with Repo.open(files) as repo:
        assert (repo.head(), repo.branches()) == before


def test_a_newer_format_is_refused(files: Path) -> None:
    path = files / ".ckpt" / "format"
    stamp = Format.unpack(path.read_bytes(), "format")
    path.chmod(0o644)
    path.write_bytes(Format(stamp.repository, stamp.index, stamp.lmdb, stamp.grid, version=9).pack())
    refused(
        files,
        "log",
        code=14,
        words=(
            "format",
            "newer ckptvcs",
        ),
    )


def test_config(repo: Repo, folder: Path) -> None:
    ckpt(folder, "config", "metric.bleu.mode", "max")
    assert ckpt(folder, "config", "metric.bleu.mode").out == "max\n"
    assert re.search(r"^gc\.grace +24h$", ckpt(folder, "config").out, re.MULTILINE)
    assert ckpt(folder, "config", "--json").json == {
        "settings": {
            "compression": "balanced",
            "environment": True,
            "gc.grace": "24h",
            "index.network": False,
            "ingest": "auto",
            "metric.bleu.mode": "max",
        }
    }
    assert ckpt(folder, "config", "gc.grace", "7d", "--json").json == {"key": "gc.grace", "value": "7d"}
    ckpt(folder, "config", "--unset", "gc.grace")
    assert ckpt(folder, "config", "gc.grace").out == "24h\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("nope",), 2, ("'nope'", "gc.grace")),
        (("nope", "1"), 2, ("'nope'", "gc.grace")),
        (("compression", "tiny"), 2, ("'tiny'", "fast, balanced, small")),
        (("author",), 4, ("author is not set",)),
        (("--unset",), 2, ("--unset",)),
    ],
)
def test_config_refuses(states: Path, arguments: tuple[str, ...], code: int, words: tuple[str, ...]) -> None:
    refused(states, "config", *arguments, code=code, words=words)


def test_a_broken_config_is_named(files: Path) -> None:
    (files / ".ckpt" / "config.toml").write_text("compression = ")
    refused(
        files,
        "log",
        code=2,
        words=(
            "config.toml",
            "mend it, or delete it",
        ),
    )


def test_ingest(files: Path) -> None:
    (files / "more.txt").write_text("more")
    ckpt(files, "config", "ingest", "manual")
    made = ckpt(files, "commit", "--index-free", "-m", "from a container", "more.txt", "--json").json
    with Repo.open(files) as repo:
        assert str(repo.resolve("main").id) != made["id"]
    found = ckpt(files, "ingest", "--json").json
    assert set(found) == {"ingested", "quarantined", "cleared", "abandoned", "bytes"}
    (taken,) = found["ingested"]
    assert (taken["commit"], taken["ref"], taken["lost"]) == (made["id"], "main", False)
    assert ckpt(files, "ingest").out == "Ingested 0 commits, 0 B.\n"
    (files / "more.txt").write_text("even more")
    ckpt(files, "commit", "--index-free", "-m", "again", "more.txt")
    for pack in (files / ".ckpt" / "incoming").glob("*.pack"):
        pack.unlink()
    assert "was put into quarantine" in ckpt(files, "ingest", code=3).err
    with Repo.open(files) as repo:
        assert repo.resolve("main").message == "from a container"
        assert str(repo.resolve("main").id) == made["id"]


def test_ingest_refuses(files: Path) -> None:
    with Disk().lock(files / ".ckpt" / "packs.lock"):
        refused(files, "ingest", code=11, words=("ingesting",))


def test_init_for_several_users(folder: Path) -> None:
    ckpt(folder, "init", "--shared", "all", "here")
    assert (folder / "here" / ".ckpt").stat().st_mode & 0o7777 == 0o2775
    assert (folder / "here" / ".ckpt" / "format").stat().st_mode & 0o777 == 0o664
    refused(folder, "init", "--shared", "everybody", "there", code=2, words=("everybody", "0640"))
    ckpt(folder, "init", "--network", "yonder")
    assert "true" in ckpt(folder / "yonder", "config", "index.network").out
