"""Writers without the index and ingesters, killed at random moments: what was acknowledged arrives."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ckptvcs import Repo

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("CKPT_TEST_KILLS", "5"))
SEED = int(os.environ.get("CKPT_TEST_SEED", "20261125"))

WRITER = """
import sys
import numpy as np
from ckptvcs import Repo

with Repo.open(sys.argv[1], index_free=True) as repo:
    state = {"w": np.zeros(20_000), "step": 0}
    repo.restore(state)
    while True:
        state["step"] += 1
        state["w"] += np.random.default_rng(state["step"]).standard_normal(20_000)
        print(state["step"], repo.commit(state, str(state["step"]), step=state["step"]).id, flush=True)
"""

INGESTER = """
import sys
from ckptvcs import Repo
from ckptvcs.errors import LockedError

with Repo.open(sys.argv[1], ingest=False) as repo:
    print("open", flush=True)
    while True:
        try:
            repo.ingest()
            repo.gc(0)
        except LockedError:
            pass
"""


def start(script: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CKPT_THREADS": "1"},
    )


def test_kills(tmp_path: Path, covered: Callable[[str], None]) -> None:
    """Every acknowledged commit is an ancestor of the tip, and every state is what was committed."""
    rng = random.Random(SEED)
    with Repo.init(tmp_path) as repo:
        repo.commit({"w": np.zeros(20_000), "step": 0}, "0", step=0)
    acknowledged: dict[int, str] = {}
    for _ in range(KILLS):
        jobs = [start(WRITER, tmp_path), start(INGESTER, tmp_path)]
        said = [job.stdout.readline() for job in jobs if job.stdout is not None]
        time.sleep(rng.uniform(0, 0.3))
        rng.shuffle(jobs)
        for job in jobs:
            assert job.poll() is None, job.communicate()[1]
            os.kill(job.pid, signal.SIGKILL)
            time.sleep(rng.uniform(0, 0.1))
        for job in jobs:
            text = job.communicate()[0]
            lines = [*said, *text.splitlines()]
            for line in lines:
                words = line.split()
                if len(words) == 2 and len(words[1]) == 64:
                    acknowledged[int(words[0])] = words[1]
    with Repo.open(tmp_path) as repo:
        found = {commit.step: str(commit.id) for commit in repo.log()}
        assert acknowledged.items() <= found.items(), f"seed {SEED}"
        assert sorted(step for step in found if step is not None) == list(range(len(found)))
        assert repo.lost() == {}
        assert repo.fsck(full=True).problems == []
        expected = np.zeros(20_000)
        for step in range(1, len(found)):
            expected += np.random.default_rng(step).standard_normal(20_000)
            assert np.array_equal(repo.checkout(found[step])["w"], expected)
        assert not list((tmp_path / ".ckpt" / "quarantine").iterdir())
        repo.gc(0)
    covered(f"{2 * KILLS} kills, {len(acknowledged)} acknowledged commits, {len(found)} found, seed {SEED}")
