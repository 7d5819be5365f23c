"""Containers: processes that are all number 1, each in a PID namespace of its own, commit side by side."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ckptvcs import Repo

UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]

SCRIPT = """
import os, sys
import numpy as np
from ckptvcs import Repo

folder, branch, seed, commits = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
print(os.getpid(), flush=True)
sys.stdin.readline()  # both are there
rng = np.random.default_rng(seed)
with Repo.open(folder, branch, index_free=True) as repo:
    state = {"w": np.zeros(30_000), "seed": 0, "step": -1}
    repo.restore(state, "main")
    state["seed"] = seed
    for step in range(commits):
        state["w"] += rng.standard_normal(30_000) * 1e-3
        state["step"] = step
        repo.commit(state, f"{branch} {step}", step=step)
    print("done", flush=True)
"""


@pytest.fixture
def namespaces() -> None:
    """Skips where this machine or user cannot make PID namespaces."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare(1) here")
    if subprocess.run([*UNSHARE, "true"], capture_output=True).returncode:
        pytest.skip("this user may not make PID namespaces")


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_two_committers_that_are_both_process_1(tmp_path: Path) -> None:
    """While the host, whose processes have other numbers, has the index open and collects."""
    with Repo.init(tmp_path) as repo:
        repo.commit({"w": np.arange(30_000.0), "seed": 0, "step": -1}, "first")
        jobs = [
            subprocess.Popen(
                [*UNSHARE, sys.executable, "-c", SCRIPT, str(tmp_path), f"job{seed}", str(seed), "6"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "CKPT_THREADS": "1"},
            )
            for seed in (1, 2)
        ]
        for job in jobs:
            assert job.stdout is not None
            assert job.stdout.readline() == "1\n", "it is not process 1"
        for job in jobs:
            assert job.stdin is not None
            job.stdin.write("go\n")
            job.stdin.flush()
        while any(job.poll() is None for job in jobs):
            repo.ingest()
            repo.gc(0)
        for job in jobs:
            assert job.communicate()[0] == "done\n"
            assert job.returncode == 0
        repo.ingest()
        assert sorted(repo.branches()) == ["job1", "job2", "main"]
        assert repo.lost() == {}
        for seed in (1, 2):
            rng = np.random.default_rng(seed)
            expected = np.arange(30_000.0)
            for step in range(6):
                expected = expected + rng.standard_normal(30_000) * 1e-3
                found = repo.checkout(f"job{seed}@step:{step}")
                assert (found["seed"], found["step"]) == (seed, step)
                assert np.array_equal(found["w"], expected)
            assert len(list(repo.log(f"job{seed}"))) == 7
        assert repo.fsck(full=True).problems == []
        assert not list((tmp_path / ".ckpt" / "quarantine").iterdir())
