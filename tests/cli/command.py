"""Running `ckpt` as a process of its own, and repositories to run it on."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ckptvcs import Commit, ObjectId, Repo

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "ckptvcs")

COMMIT_KEYS = {
    "id",
    "tree",
    "parents",
    "origin",
    "fresh_start",
    "author",
    "time",
    "time_ns",
    "message",
    "step",
    "epoch",
    "metrics",
    "notes",
    "dropped",
    "config",
    "overrides",
    "environment",
    "sizes",
    "refs",
    "pinned",
}


def environment(**more: str) -> dict[str, str]:
    """The environment of a command: nobody's settings, this checkout's code."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CKPT_", "_CKPT", "COLUMNS"))}
    kept.pop("NO_COLOR", None)
    return {**kept, "PYTHONPATH": str(ROOT), "CKPT_AUTHOR": "tester", "TZ": "UTC", **more}


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON object."""
        return json.loads(self.out)


def ckpt(folder: Path, *arguments: str | Path, code: int = 0, **env: str) -> Done:
    """Run `ckpt` in a folder, as people do. `code` is what it must end with."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=folder,
        env=environment(**env),
        capture_output=True,
        check=False,
        timeout=90,
        stdin=subprocess.DEVNULL,
    )
    result = Done(done.returncode, done.stdout.decode(), done.stderr.decode())
    assert "Traceback" not in result.err, result.err
    assert result.code == code, (result.code, result.out, result.err)
    return result


def refused(folder: Path, *arguments: str | Path, code: int, words: Sequence[str] = ()) -> Done:
    """Run `ckpt` in a folder: it must end with this code and one line on standard error that, with
    its hint, holds these words. The process is forked from a loaded interpreter: there are many of these."""
    server = _loaded()
    assert server.stdin is not None
    assert server.stdout is not None
    request = {
        "folder": str(folder),
        "arguments": list(map(str, arguments)),
        "environment": environment(),
    }
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    done = Done(**json.loads(server.stdout.readline()))
    assert done.code == code, done
    lines = done.err.splitlines()
    assert [line.split(" ")[0] for line in lines] in (["error:"], ["error:", "hint:"]), done.err
    for word in words:
        assert word in done.err, (word, done.err)
    return done


@functools.cache
def _loaded() -> subprocess.Popen[str]:
    """The interpreter that `refused` asks; it ends when its standard input does."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.cli.loaded"],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)
    return server


def state(step: int) -> dict[str, Any]:
    """A small training state."""
    return {
        "model": {
            "weight": np.full((40, 30), step, np.float32),
            "bias": np.arange(3, dtype=np.float64),
        },
        "step": step,
        "name": "tiny",
    }


def commit_state(repo: Repo, step: int, message: str = "", **more: Any) -> Commit:
    """Commit a small state, with its loss."""
    metrics = more.pop("metrics", {"val_loss": 1 / step})
    return repo.commit(state(step), message or f"step {step}", step=step, metrics=metrics, **more)


@contextmanager
def state_history(folder: Path) -> Iterator[Repo]:
    """A repository of states: main with three commits, `other` forked from the first, the tag v1 there."""
    with Repo.init(folder) as repo:
        folder.joinpath("notes.txt").write_text("kept beside the state")
        first = commit_state(
            repo,
            10,
            "first",
            epoch=1,
            config={"optimizer": {"lr": 3e-4}, "seed": 7},
            files={"notes.txt": folder / "notes.txt"},
        )
        commit_state(repo, 20, "second\n\nwith a body")
        commit_state(repo, 30, "third", metrics={"val_loss": 0.5, "acc": float("nan")})
        repo.tag("v1", first)
        other = repo.on("other")
        other.restore(state(0), first)
        commit_state(other, 15, "forked")
        yield repo


def file_history(folder: Path) -> list[ObjectId]:
    """A repository of files: two commits on main, whose last state is in the folder."""
    with Repo.init(folder) as repo:
        ids = []
        (folder / "sub").mkdir()
        (folder / "link").symlink_to("a.bin")
        for n in (1, 2):
            (folder / "a.bin").write_bytes(b"content %d\n" % n * 100)
            (folder / "sub" / "b.txt").write_text("always the same\n")
            paths = {name: folder / name for name in ("a.bin", "link", "sub")}
            made = repo.commit_files(paths, f"files {n}", step=n, metrics={"val_loss": 1 / n}, continues=True)
            ids.append(made.id)
        return ids
