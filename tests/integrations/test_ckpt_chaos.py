"""Trainings killed by somebody else's tool: ckpt-chaos kills a job at the file events of its saves, resumes
it, and judges what came back against a run that nobody killed.

It sees what the trainer opens for writing, renames, removes and makes below the job's folder; no writer
process, no syncs and no writes to the index (docs/testing.md).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import ckptvcs

COMMIT = """
import sys
from pathlib import Path
import numpy as np
import ckptvcs

out = Path(sys.argv[1])
chance = np.random.default_rng(1)
state = {"weights": np.zeros(2000), "chance": chance, "step": 0}
with ckptvcs.Repo.open(out / "run", create=True) as repo:
    repo.restore(state)
    print("resumed from step", state["step"], flush=True)
    while state["step"] < 4:
        state["weights"] += chance.standard_normal(2000)
        state["step"] += 1
        repo.commit(state, step=state["step"])
        (out / f"acknowledged-{state['step']}").write_bytes(b"")  # the judge's checkpoint: it may rely on it
(out / "result").write_bytes(state["weights"].tobytes())
"""

AUTOSAVE = """
import sys
from pathlib import Path
import numpy as np
import ckptvcs
from ckptvcs.training import Autosave

out = Path(sys.argv[1])
chance = np.random.default_rng(1)
state = {"weights": np.zeros(2000), "chance": chance, "step": 0}
with ckptvcs.Repo.open(out / "run", create=True) as repo:
    got = repo.restore(state)
    print("resumed from step", state["step"], flush=True)
    with Autosave(repo, state, every=2, blocking=True) as save:
        while state["step"] < 6:
            state["weights"] += chance.standard_normal(2000)
            state["step"] += 1
            if not save.step(state["step"]):
                break
(out / "result").write_bytes(state["weights"].tobytes())
"""

ROOT = Path(ckptvcs.__file__).parents[1]


@pytest.mark.parametrize(
    ("program", "modes", "more"),
    [
        (COMMIT, "before", ["--checkpoint-glob", "{out}/acknowledged-*"]),
        (AUTOSAVE, "before,term", []),
    ],
    ids=["commit", "autosave"],
)
def test_no_kill_costs_anything(tmp_path: Path, program: str, modes: str, more: list[str]) -> None:
    """Every resumed job ends with the same bytes; one that was told of a commit goes on from there."""
    train, work = tmp_path / "train.py", tmp_path / "work"
    train.write_text(program)
    points = os.environ.get("CKPT_TEST_CHAOS_POINTS", "16")
    command = [sys.executable, "-m", "ckpt_chaos", "run", "--work", str(work), "--modes", modes]
    command += ["--max-points", points, "--jobs", "2", "--step-regex", r"resumed from step (\d+)", *more]
    command += ["--result-file", "{out}/result", "--", sys.executable, str(train), "{out}"]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ends = Counter(line.split()[-1] for line in done.stdout.splitlines() if line.startswith("#"))
    print(done.stdout[-2000:])
    assert "FAIL" not in done.stdout
    assert "LOST_WORK" not in done.stdout
    outcomes = [json.loads(path.read_text()) for path in work.glob("pt_*/result.json")]
    killed = [outcome for outcome in outcomes if outcome["crashed"]]
    assert len(outcomes) == 1 + int(points)
    assert len(killed) >= int(points) // 2, ends
