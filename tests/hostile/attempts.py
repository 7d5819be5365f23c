"""Running a verb on a repository that somebody else made, and judging what it did."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import ckptvcs.repo
import ckptvcs.state.export
import ckptvcs.store.planes  # noqa: F401
from ckptvcs.cli import main
from ckptvcs.cli.exits import Exit

SECONDS = 60.0
"""After which a verb hangs. Whatever is refused takes far less than one."""
MEMORY = 2 << 30
LARGEST_FILE = 64 << 20

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


def attempt(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run `ckpt` in a forked process with little memory: its exit code and what it printed."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _run(folder, arguments, out.fileno(), err.fileno())
        deadline = time.monotonic() + SECONDS
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise AssertionError(f"`ckpt {' '.join(arguments)}` hangs")
            time.sleep(0.001)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read(4 << 20).decode())
    return os.waitstatus_to_exitcode(ended[1]), texts[0], texts[1]


def _run(folder: Path, arguments: Sequence[str], out: int, err: int) -> NoReturn:
    code = 99
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        # What pytest put in their place holds other descriptors.
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        index = 64 << 30  # LMDB's address space
        for what, most in (
            (resource.RLIMIT_AS, used + index + MEMORY),
            (resource.RLIMIT_FSIZE, LARGEST_FILE),
            (resource.RLIMIT_CPU, int(SECONDS)),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(what, (most, resource.getrlimit(what)[1]))
        try:
            main(list(arguments))
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 98
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def judge(arguments: Sequence[str], code: int, out: str, err: str) -> None:
    """One clear line and a documented exit code, and nothing that steers a terminal."""
    what = f"`ckpt {' '.join(arguments)}` ended with {code}:\n{out[-2000:]}\n{err[-4000:]}"
    assert "Traceback" not in err, what
    assert code in set(Exit) - {Exit.UNEXPECTED}, what
    for text in (out, err):
        assert not _CONTROL.search(text), what
    lines = [line for line in err.splitlines() if not line.startswith("warning:")]
    if code not in (Exit.DONE, Exit.PARTLY) and "--json" not in arguments and not out:
        kinds = [line.split(" ")[0] for line in lines]
        assert kinds[:1] == ["error:"], what
        assert set(kinds[1:]) <= {"hint:"}, what
    assert all(len(line) < 4000 for line in err.splitlines()), what[:3000]


def listing(folder: Path) -> dict[str, bytes | str]:
    """Every file below a folder, with its content, and every link with its target."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = path.read_bytes() if path.is_file() else "a folder"
    return found
