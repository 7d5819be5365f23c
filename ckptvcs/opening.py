"""What opening needs to know before there is a handle: the environment, and where the repository is.

The environment (`CKPT_REPO`, `CKPT_BRANCH`, `CKPT_AUTHOR`, `CKPT_THREADS`) is read here, once per open, and
nowhere else.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Final

from ckptvcs.disk import Disk, environment_variable, login
from ckptvcs.errors import InvalidError
from ckptvcs.history import refs
from ckptvcs.store.format import FOLDER

_JOBS: Final = (
    ("slurm", "SLURM_JOB_ID"),
    ("pbs", "PBS_JOBID"),
    ("lsf", "LSB_JOBID"),
    ("sge", "JOB_ID"),
    ("flux", "FLUX_JOB_ID"),
)


class Environment:
    """The settings a process finds around itself.

    Attributes:
        repo: `CKPT_REPO`, where the repository is.
        branch: `CKPT_BRANCH`, checked to be a branch name.
        author: `CKPT_AUTHOR`.
        threads: `CKPT_THREADS`, from 1 up.
        job: what a batch system calls the job this process belongs to, as in 'slurm 4711'.
    """

    def __init__(self) -> None:
        repo, threads = environment_variable("CKPT_REPO"), environment_variable("CKPT_THREADS")
        self.repo = Path(repo) if repo else None
        self.branch = environment_variable("CKPT_BRANCH")
        if self.branch is not None:
            refs.check_name(self.branch, "branch")
        self.author = environment_variable("CKPT_AUTHOR")
        if threads and not (threads.isdecimal() and len(threads) < 5 and int(threads) > 0):
            raise InvalidError(f"CKPT_THREADS is {threads!r}", hint="set it to a number from 1 up")
        self.threads = int(threads) if threads else None
        self.job = next((f"{name} {job}" for name, job in map(_job, _JOBS) if job), None)


def _job(of: tuple[str, str]) -> tuple[str, str | None]:
    name, variable = of
    return name, environment_variable(variable)


def visible_gpus() -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES gives this process; None if it says nothing."""
    said = environment_variable("CUDA_VISIBLE_DEVICES")
    return None if said is None else [each for each in said.split(",") if each]


def default_author() -> str:
    """login@host."""
    return f"{login()}@{platform.node() or 'localhost'}"


def find(disk: Disk, place: Path) -> Path | None:
    """The `.ckpt` folder at `place` or above it."""
    place = place.resolve()
    if place.name == FOLDER and disk.exists(place / "format"):
        return place
    for folder in (place, *place.parents):
        if disk.exists(folder / FOLDER / "format"):
            return folder / FOLDER
    return None


def make_folders(disk: Disk, folder: Path) -> None:
    """Make a folder and those above it that are missing. Durable on return."""
    missing = []
    current = folder.resolve()
    while not disk.exists(current):
        missing.append(current)
        current = current.parent
    if not disk.is_dir(current):
        raise InvalidError(f"{current} is not a folder")
    for each in reversed(missing):
        disk.make_dir(each)
        disk.sync_dir(each.parent)
