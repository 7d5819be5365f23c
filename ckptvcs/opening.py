"""What opening needs to know before there is a handle: the environment, and where the repository is.

The environment (`CKPT_REPO`, `CKPT_BRANCH`, `CKPT_AUTHOR`, `CKPT_THREADS`, `CKPT_INDEX_FREE`) is read here,
once per open, and nowhere else.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ckptvcs.config import Config
from ckptvcs.disk import Disk, environment_variable, login
from ckptvcs.errors import InvalidError, StorageError
from ckptvcs.history import refs
from ckptvcs.store import Store
from ckptvcs.store.format import FOLDER, Layout
from ckptvcs.store.index_free import IndexFreeStore
from ckptvcs.store.rebuild import Below, everything_below

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
        index_free: `CKPT_INDEX_FREE`: whether to open without the index.
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
        index_free = environment_variable("CKPT_INDEX_FREE")
        if index_free not in (None, "0", "1"):
            raise InvalidError(f"CKPT_INDEX_FREE is {index_free!r}", hint="set it to 1, or to 0")
        self.index_free = index_free == "1"
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


def read_config(disk: Disk, path: Path) -> Config:
    """The settings as the file has them now; all defaults if there is none."""
    try:
        text = disk.read(path).decode()
    except FileNotFoundError:
        text = ""
    except UnicodeDecodeError:
        raise InvalidError(f"{path} is not text", hint="mend it, or delete it") from None
    return Config(text, str(path))


def open_store(
    root: Path,
    disk: Disk,
    *,
    threads: int | None,
    say: Callable[[str], None],
    rebuild: bool = False,
    index_free: bool = False,
    below: Below = everything_below,
) -> Store:
    """The repository folder, opened in the way that is safe here: with its index, or without, if that is
    wanted or this user may not write. `below` tells a rebuild what commits must reach.

    StorageError (code "network") if the index would be used over a network.
    """
    layout = Layout(root)
    if not rebuild and (index_free or not disk.writable(root)):
        store = IndexFreeStore(root, disk, threads, writes=disk.writable(layout.incoming))
        try:
            store.start(copy=not index_free and disk.network(root) is None)
        except BaseException:
            store.close()
            raise
        return store
    if not read_config(disk, layout.config).get("index.network"):
        refuse_network(disk, root)
    return Store.open(root, disk, threads=threads, say=say, rebuild=rebuild, below=below)


def refuse_network(disk: Disk, place: Path) -> None:
    """StorageError (code "network") if a path is, or will be, on a network file system, which LMDB must not
    be on."""
    place = place.resolve()
    while not disk.exists(place):
        place = place.parent
    kind = disk.network(place)
    if kind is not None:
        raise StorageError(
            f"{place} is on a network file system ({kind}), where using the index could damage it",
            hint="jobs commit there with index_free=True, or CKPT_INDEX_FREE=1; if one host alone uses the "
            "index, `ckpt config index.network true` there (`ckpt init --network` for a new repository)",
            path=str(place),
            code="network",
        )


def folder_mode(shared: str) -> int:
    """The mode of folders in a repository that is shared so: 'group', 'all' or a file mode as in '0640'.

    Who may read files may enter folders. InvalidError for anything else, and if the owner may not write.
    """
    mode = _SHARED.get(shared)
    if mode is None and re.fullmatch("0?[0-7]{3}", shared):
        mode = int(shared, 8)
    if mode is None or mode & 0o600 != 0o600 or mode & 0o111 or mode & 0o066 == 0:
        raise InvalidError(
            f"{shared!r} is no way to share",
            hint="choose group, all, or a file mode that lets others read, as in 0640",
        )
    return 0o2000 | mode | (mode & 0o444) >> 2


_SHARED: Final = {"group": 0o660, "all": 0o664}


def make_folders(disk: Disk, folder: Path, mode: int | None = None) -> None:
    """Make a folder and those above it that are missing, with this mode if several users are to share them.
    Durable on return."""
    missing = []
    current = folder.resolve()
    while not disk.exists(current):
        missing.append(current)
        current = current.parent
    if not disk.is_dir(current):
        raise InvalidError(f"{current} is not a folder")
    for each in reversed(missing):
        disk.make_dir(each)
        if mode is not None:
            disk.share(each, mode)
        disk.sync_dir(each.parent)
