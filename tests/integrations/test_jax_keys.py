"""Keys of the real jax, in a process of its own (`tests/integrations/jax_keys.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_keys_of_jax(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.integrations.jax_keys", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
