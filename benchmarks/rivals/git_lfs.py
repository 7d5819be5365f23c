"""git-lfs: whole files by hash, named by git commits."""

from __future__ import annotations

from pathlib import Path

from benchmarks.rivals.files import Syncer, folder_bytes
from benchmarks.rivals.programs import FILE, FileKeeper, asked_version


class GitLfs(FileKeeper):
    name = "git_lfs"
    program = "git-lfs"
    note = "a program; the times include the file; we sync its store; keeps a second copy in the work folder"

    @classmethod
    def version(cls) -> str:
        return asked_version("git-lfs", "version")

    def prepare(self) -> None:
        self.environment |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0"}
        self.run("git", "init", "-q")
        self.run("git", "config", "user.name", "benchmark")
        self.run("git", "config", "user.email", "benchmark@localhost")
        self.run("git", "lfs", "install", "--local")
        self.run("git", "lfs", "track", FILE)
        self._syncer = Syncer(self.work / ".git")

    def keep(self) -> str:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "--allow-empty", "-m", "save")
        self._syncer.sync()
        return self.run("git", "rev-parse", "HEAD").strip()

    def bring_back(self, key: str) -> Path:
        # Removed first, so that git has to bring it back even where it takes it for unchanged.
        (self.work / FILE).unlink(missing_ok=True)
        self.run("git", "checkout", "-q", key, "--", FILE)
        return self.work / FILE

    def fork(self, key: str) -> None:
        self.run("git", "checkout", "-q", "-f", "-b", f"fork-{key[:12]}-{self.stored_bytes()}", key)

    def stored_bytes(self) -> int:
        return folder_bytes(self.work / ".git")
