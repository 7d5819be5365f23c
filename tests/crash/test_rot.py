"""Bits that flip in every kind of file: what is read is right, or refused; never other bytes.

`test_faults.py` flips those of a repository of plain records; here are all codecs, the index, and the small
files. Each flip is judged in a process of its own: LMDB trusts the pages that it reads, so that one may end
the process. That is counted, and is no wrong answer.

`CKPT_ROT=20` flips twenty times as many.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import Commit, Repo
from ckptvcs.errors import CkptError
from ckptvcs.store import codec
from ckptvcs.testing.same import difference
from tests.crash.test_faults import Covered, is_one_line

MORE = int(os.environ.get("CKPT_ROT", "1"))  # as it was before tests clean the environment
_SECONDS = 60


class Rotting:
    """A repository with frames of every codec, and what it holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / ".ckpt"
        self.known: list[tuple[Commit, dict[str, Any]]] = []
        chance = np.random.default_rng(5)
        weights = chance.standard_normal(3000, dtype="f4")
        (folder / "notes.txt").write_text("some notes, and again some notes\n" * 30)
        with Repo.init(folder) as repo:
            for step in range(3):
                weights = weights * np.float32(0.999) + chance.standard_normal(3000, dtype="f4") * np.float32(
                    1e-5
                )
                state = {
                    "weights": weights,
                    "counts": np.arange(2000, dtype="i8") * step,
                    "noise": chance.integers(0, 256, 700, np.uint8),
                    "text": "the quick brown fox " * 200,
                    "step": step,
                }
                files = {"notes.txt": folder / "notes.txt"}
                made = repo.commit(state, f"step {step}", step=step, metrics={"val_loss": 1.0}, files=files)
                self.known.append((made, state))
            repo.tag("v1", self.known[0][0])
            repo.configure("metric.val_loss.mode", "min")
            self.refs = self._refs(repo)
            with repo._store.snapshot() as snapshot:
                self.codecs = {row.codec for _, row in snapshot.rows_from(b"", 1000)}

    @staticmethod
    def _refs(repo: Repo) -> dict[str, Any]:
        with repo._store.snapshot() as snapshot:
            return snapshot.refs()

    def judge(self) -> str:
        """ "harmless", "detected" or what is wrong, in a forked process."""
        child = os.fork()
        if child == 0:
            code = 9
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                signal.alarm(_SECONDS)
                code = self._judged()
            finally:
                os._exit(code)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if ended < 0:
            assert ended in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT), signal.Signals(-ended).name
            return "ended the process"
        return {0: "harmless", 1: "detected"}.get(ended, f"WRONG ({ended})")

    def _judged(self) -> int:
        whole = True
        said: list[str] = []  # that the index is made anew, and what was left out
        try:
            with Repo.open(self.folder, say=said.append) as repo:
                for commit, state in self.known:
                    try:
                        if difference(repo.checkout(commit.id), state) is not None:
                            return 2
                        if repo.resolve(commit.id).message != commit.message:
                            return 3
                    except CkptError as problem:
                        is_one_line(problem)
                        whole = False
                try:
                    if self._refs(repo) != self.refs:
                        if len(said) < 2 and not repo.fsck().problems:
                            return 4  # a ref changed, and nothing tells
                        whole = False
                except CkptError:
                    whole = False
        except CkptError as problem:
            is_one_line(problem)
            whole = False
        return 0 if whole else 1


@pytest.fixture
def rotting(scratch: Path) -> Rotting:
    made = Rotting(scratch)
    assert made.codecs == {codec.RAW, codec.ZSTD, codec.PLANES, codec.DIFFERENCE}
    return made


def flipped(path: Path, chance: random.Random, count: int) -> Iterator[tuple[int, int]]:
    """A file with one bit flipped, `count` times; whole again at the end."""
    whole = path.read_bytes()
    path.chmod(0o644)
    for at in sorted(chance.sample(range(len(whole)), min(count, len(whole)))):
        bit = chance.randrange(8)
        damaged = bytearray(whole)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        yield at, bit
    path.write_bytes(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["packs", "packs, rebuilt", "index", "journal, rebuilt", "format", "settings"]
)
def test_flips_in_every_kind_of_file(rotting: Rotting, covered: Covered, kind: str) -> None:
    seed = random.SystemRandom().getrandbits(32)
    chance = random.Random(seed)
    root = rotting.root
    spare = rotting.folder / "spare"
    shutil.copytree(root, spare, ignore=shutil.ignore_patterns("lock.mdb"))
    packs = sorted((root / "packs").rglob("*.pack"))
    victims = {
        "index": [root / "meta" / "data.mdb"],
        "journal, rebuilt": [root / "refs.journal"],
        "format": [root / "format"],
        "settings": [root / "config.toml"],
    }.get(kind, packs)
    counts: Counter[str] = Counter()
    for path in victims:
        for at, bit in flipped(path, chance, MORE * (120 if kind == "index" else 60 // len(victims))):
            if kind.endswith("rebuilt"):
                shutil.rmtree(root / "meta", ignore_errors=True)
            found = rotting.judge()
            assert not found.startswith("WRONG"), (
                f"seed {seed}: bit {bit} of byte {at} of {path.name}: {found}"
            )
            counts[found] += 1
            for name in ("format", "refs.journal", "config.toml"):
                shutil.copyfile(spare / name, root / name)
            if kind.endswith("rebuilt"):
                shutil.rmtree(root / "meta", ignore_errors=True)
                shutil.copytree(spare / "meta", root / "meta")
    with contextlib.suppress(FileNotFoundError):
        (root / "meta" / "lock.mdb").unlink()
    shutil.rmtree(root / "meta")
    assert rotting.judge() == "harmless"
    told = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    covered(f"{kind}: {sum(counts.values())} bits flipped: {told}, seed {seed}")
    assert counts["detected"] or kind == "settings"
