"""DVC: whole files by hash."""

from __future__ import annotations

from pathlib import Path

from benchmarks.rivals.files import Syncer, folder_bytes
from benchmarks.rivals.programs import FILE, FileKeeper, asked_version


class Dvc(FileKeeper):
    name = "dvc"
    program = "dvc"
    note = "a program; the times include the file; we sync its cache; keeps a second copy in the work folder"

    @classmethod
    def version(cls) -> str:
        return asked_version("dvc", "--version")

    def prepare(self) -> None:
        self.run("dvc", "init", "--no-scm", "-q")
        self.run("dvc", "config", "core.analytics", "false")
        self.run("dvc", "config", "core.check_update", "false")
        self._syncer = Syncer(self.work / ".dvc" / "cache")
        self._kept: dict[str, str] = {}

    def keep(self) -> str:
        self.run("dvc", "add", "-q", FILE)
        self._syncer.sync()
        pointer = (self.work / f"{FILE}.dvc").read_text()
        key = next(line.split()[-1] for line in pointer.splitlines() if "md5:" in line)
        self._kept[key] = pointer
        return key

    def bring_back(self, key: str) -> Path:
        (self.work / f"{FILE}.dvc").write_text(self._kept[key])
        self.run("dvc", "checkout", "-q", "--force", f"{FILE}.dvc")
        return self.work / FILE

    def stored_bytes(self) -> int:
        return folder_bytes(self.work / ".dvc" / "cache")
