"""What the handles of one opened repository have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ckptvcs import config as settings
from ckptvcs.disk import ThreadLock
from ckptvcs.errors import CkptError, LockedError
from ckptvcs.history.graph import History
from ckptvcs.opening import default_author, read_config
from ckptvcs.store import Store
from ckptvcs.store.index_free import IndexFreeStore

if TYPE_CHECKING:
    from ckptvcs.background import Background
    from ckptvcs.committing import Committer
    from ckptvcs.maintenance.small_packs import Merger


class Opened:
    """A store, with what its handles remember together.

    Attributes:
        store: the repository folder, opened.
        history: its commits.
        config: its settings as they were at open, or after the last `configure`.
        job: the cluster's name for this process's job; None outside one.
        compression: the level that the handle was opened with; None takes the config's.
        committers: those of handles made from others, which close with the first one.
        background: what stores in the background; None until something does.
    """

    def __init__(
        self, store: Store, author: str | None, compression: str | None = None, job: str | None = None
    ) -> None:
        self.store = store
        self.compression = compression
        self.job = job
        self.history = History(store)
        self.committers: list[Committer] = []
        self.background: Background | None = None
        self._merger: Merger | None = None
        self._author = author
        self._mutex = ThreadLock()
        self.config = self.read_config()

    def merge_small_packs(self) -> None:
        """What follows a commit now and then, so that packs do not become as many as commits."""
        if self._merger is None:
            from ckptvcs.maintenance.small_packs import Merger

            self._merger = Merger(self.store)
        self._merger.after_commit()

    @property
    def folder(self) -> Path:
        """The folder that holds `.ckpt`."""
        return self.store.layout.root.parent

    @property
    def index_free(self) -> bool:
        """Whether it was opened without its index."""
        return isinstance(self.store, IndexFreeStore)

    @property
    def author(self) -> str:
        """Who commits: `CKPT_AUTHOR`, else the config's author, else login@host."""
        return self._author or self.config.get("author") or default_author()

    @property
    def level(self) -> str:
        """The compression level of what is committed."""
        return self.compression or str(self.config.get("compression"))

    def in_background(self) -> Background:
        """What stores in the background, for all handles."""
        from ckptvcs.background import Background

        with self._mutex:
            if self.background is None:
                self.background = Background(self.store.grid, self.store.threads, self.store.disk.seconds)
            return self.background

    def take_up(self, say: Callable[[str], None]) -> None:
        """Ingest what waits in `incoming/`, unless another process does, or the setting `ingest` says no.
        `say` is told of what could not be."""
        if self.index_free or self.config.get("ingest") != "auto":
            return
        from ckptvcs.maintenance import ingest

        if not ingest.waiting(self.store):
            return
        try:
            with self.store.operation():
                report = ingest.ingest(self.store)
        except LockedError:
            return
        except (CkptError, OSError) as error:
            say(f"what waits in {self.store.layout.incoming} was not ingested: {error}")
            return
        for each in report.quarantined:
            say(f"the bundle {each.bundle} was put into quarantine: {each.why}")

    def read_config(self) -> settings.Config:
        """The settings as the file has them now."""
        return read_config(self.store.disk, self.store.layout.config)
