"""The tools that are measured, one adapter each."""

from __future__ import annotations

from benchmarks.rivals.dcp import DistributedCheckpoint
from benchmarks.rivals.dvc import Dvc
from benchmarks.rivals.git_lfs import GitLfs
from benchmarks.rivals.icechunk_store import Icechunk
from benchmarks.rivals.moonclip_store import Moonclip
from benchmarks.rivals.ours import CkptvcsBalanced, CkptvcsFast, CkptvcsSmall
from benchmarks.rivals.restic import Restic
from benchmarks.rivals.rival import Rival
from benchmarks.rivals.safetensors_files import Safetensors
from benchmarks.rivals.tensorfs_store import Tensorfs
from benchmarks.rivals.tensorstore_ocdbt import TensorstoreOcdbt
from benchmarks.rivals.torch_files import TorchSave

REFERENCE: type[Rival] = TorchSave

ALL: dict[str, type[Rival]] = {
    rival.name: rival
    for rival in (
        TorchSave,
        CkptvcsFast,
        CkptvcsBalanced,
        CkptvcsSmall,
        Safetensors,
        DistributedCheckpoint,
        Moonclip,
        Tensorfs,
        TensorstoreOcdbt,
        Icechunk,
        Restic,
        Dvc,
        GitLfs,
    )
}
"""By name, in the order of the tables."""
