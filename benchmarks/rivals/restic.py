"""restic: content-defined chunks, zstandard, encrypted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks.rivals.files import folder_bytes
from benchmarks.rivals.programs import FILE, FileKeeper, asked_version


class Restic(FileKeeper):
    name = "restic"
    program = "restic"
    note = "a program; the times include writing and reading the file it keeps"

    @classmethod
    def version(cls) -> str:
        return asked_version("restic", "version")

    def prepare(self) -> None:
        self.environment |= {"RESTIC_PASSWORD": "benchmark", "RESTIC_REPOSITORY": str(self.folder / "store")}
        self.run("restic", "init")

    def keep(self) -> str:
        said = self.run("restic", "backup", FILE, "--json")
        return next(
            fact["snapshot_id"] for fact in map(json.loads, said.splitlines()) if "snapshot_id" in fact
        )

    def bring_back(self, key: str) -> Path:
        target = self.folder / "restored"
        shutil.rmtree(target, ignore_errors=True)
        self.run("restic", "restore", key, "--target", str(target))
        return next(target.rglob(FILE))

    def stored_bytes(self) -> int:
        return folder_bytes(self.folder / "store")
