"""Saves in the background: one in flight, its outcome, and what becomes of an error nobody asked for.

The state is copied into memory shared with a writer process (`saver.py`), which stores it while training
goes on. Here is the trainer's side: taking turns, copying, waiting, and telling.

Why a process and not a thread: docs/decisions/0012.
"""

from __future__ import annotations

import atexit
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ckptvcs import canonical
from ckptvcs.companion import Companion, SharedMemory
from ckptvcs.disk import in_forked_child
from ckptvcs.errors import CkptError, revived
from ckptvcs.history.commit import Commit, CommitReport, Component, in_bytes
from ckptvcs.ids import ObjectId

if TYPE_CHECKING:
    from ckptvcs.state.staging import Staging
    from ckptvcs.state.tree import Prepared
    from ckptvcs.store.format import Grid

_log = logging.getLogger("ckptvcs")
_WRITER: Final = "ckptvcs.saver"


Deliver: TypeAlias = Callable[[Mapping[str, Any] | None], Commit | None]
"""Makes the commit of the writer's answer; of None, if the writer died, the commit it made before that, if
any. What it raises is the outcome of the save."""


class PendingCommit:
    """A commit that `commit_async` began.

    Attributes:
        blocked: seconds for which the call kept its caller.
        waited: of these, seconds in which an earlier save was still in flight.
        background: seconds from then until it ended; 0 while it is in flight.
        skipped: True if nothing was saved, because one was in flight and `when_busy` was "skip".
    """

    def __init__(self, *, waited: float = 0.0, skipped: bool = False) -> None:
        """Made by `Repo.commit_async`."""
        self.blocked = 0.0
        self.background = 0.0
        self.waited = waited
        self.skipped = skipped
        self._ended = threading.Event()
        self._commit: Commit | None = None
        self._error: BaseException | None = None
        _all_pending.add(self)
        if skipped:
            self.end(
                None,
                CkptError(
                    "this save was skipped: an earlier one was still in flight",
                    code="skipped",
                    hint="ask .skipped first, or pass when_busy='wait'",
                ),
            )

    def done(self) -> bool:
        """Whether the save has ended, well or not. A skipped one has."""
        return self._ended.is_set()

    def result(self, timeout: float | None = None) -> Commit:
        """The commit, once it is durable; waits for that, at most `timeout` seconds.

        Raises what `commit` would have raised; a TimeoutError if the save is still in flight, which
        changes nothing; CkptError (code `skipped`) for a save that was skipped, and (code `writer-lost`)
        if the writer process died. An error that was raised here is not raised again by the next commit.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the commit is still being made after {timeout} s")
        if self._error is not None:
            _untold.discard(self)
            raise self._error
        assert self._commit is not None
        return self._commit

    def wait(self) -> None:
        """Return when the save has ended, well or not."""
        self._ended.wait()

    def surface(self) -> None:
        """Wait for the end, and raise the error if there was one that nobody has been told of."""
        self.wait()
        if self in _untold:
            self.result()

    def end(self, commit: Commit | None, error: BaseException | None) -> None:
        """Settle the outcome, once."""
        self._commit, self._error = commit, error
        if error is not None and not self.skipped:
            _untold.add(self)
        self._ended.set()

    def give_up(self, why: BaseException) -> None:
        """Nothing comes of this save, and who has to know of that knows already."""
        if not self._ended.is_set():
            self._ended = threading.Event()  # in a forked child a thread that is not here may hold the other
            self._error = why
            self._ended.set()


_untold: Final[set[PendingCommit]] = set()
"""Saves that failed and whose error nobody has seen."""

_all_pending: Final[weakref.WeakSet[PendingCommit]] = weakref.WeakSet()
_all: Final[weakref.WeakSet[Background]] = weakref.WeakSet()


class Background:
    """The saves of one opened repository, one at a time, whatever handle they come from.

    The writer process starts with the first save and ends at `close`. Memory is one copy of the largest
    state so far, shared with it.
    """

    def __init__(self, grid: Grid, threads: int, seconds: Callable[[], float]) -> None:
        self._grid = grid
        self._threads = threads
        self._seconds = seconds
        self._turn = threading.Lock()  # held from the first look at a state until its save has ended
        self._companion: Companion | None = None
        self._memory: SharedMemory | None = None
        self._staging: Staging | None = None
        _all.add(self)

    def save(
        self,
        begun: float,
        wait: bool,
        prepare: Callable[[], tuple[Prepared, dict[str, Any]]],
        announce: Callable[[PendingCommit], None],
        deliver: Deliver,
        *,
        quiet: bool = False,
    ) -> PendingCommit:
        """Copy what `prepare` gives, have it stored, and return as soon as the state may change.

        Args:
            begun: when the caller was called, by this object's clock.
            wait: for the save in flight; otherwise this one is skipped.
            prepare: looks at the state, and says what the writer is to do (`saver.Task`).
            announce: told of the save before it is certain to happen, so that no interruption hides it.
            deliver: called on another thread.
            quiet: log nothing when it has ended.
        """
        asked = self._seconds()
        if not self._turn.acquire(blocking=wait):
            skipped = PendingCommit(skipped=True)
            skipped.blocked = self._seconds() - begun
            return skipped
        pending = PendingCommit(waited=self._seconds() - asked)
        ours = [pending]  # until the carrier has taken it; an interruption must not leave it to both
        try:
            prepared, task = prepare()
            header = self._stage(prepared, task)
            companion = self._running()
            sent = threading.Event()
            # On a thread of its own, where no signal interrupts it half way.
            carrier = threading.Thread(
                target=self._carry,
                args=(companion, header, begun, sent, ours, deliver, quiet),
                name="ckptvcs-pending",
                daemon=True,
            )
            announce(pending)
            carrier.start()
            sent.wait()
        except BaseException as error:
            if _taken(ours) is not None:
                pending.give_up(error)
                self._turn.release()
            raise
        return pending

    def _stage(self, prepared: Prepared, task: dict[str, Any]) -> bytes:
        """Copy content and task to the shared memory; the message that says where they are."""
        from ckptvcs.state import staging, transfer

        layout, size = staging.arranged(prepared)
        body = canonical.encode(task | {"tree": transfer.plain(prepared, [spot for _, spot in layout])})
        if self._memory is None or self._staging is None:
            self._memory = SharedMemory()
            self._staging = staging.Staging(self._threads, self._grid.chunk)
        memory = self._memory.reserve(size + len(body))
        try:
            self._staging.fill(memory, layout)
        except BaseException:
            self._let_go()  # a second Ctrl-C leaves threads behind that still copy, into this memory
            raise
        memory[size : size + len(body)] = body
        return canonical.encode([size, len(body)])

    def _running(self) -> Companion:
        """The writer process, started if need be."""
        assert self._memory is not None
        if self._companion is not None and not self._companion.alive:
            _log.warning("the idle writer process %s; starting another", self._companion.end())
            self._companion = None
        if self._companion is None:
            told = {"CKPT_THREADS": str(self._threads), "CKPT_BRANCH": "", "CKPT_REPO": ""}
            self._companion = Companion(_WRITER, self._memory, told)
        return self._companion

    def _carry(
        self,
        companion: Companion,
        header: bytes,
        begun: float,
        sent: threading.Event,
        ours: list[PendingCommit],
        deliver: Deliver,
        quiet: bool,
    ) -> None:
        """One save, from the message to its outcome."""
        pending = _taken(ours)
        if pending is None:
            return
        commit: Commit | None = None
        error: BaseException | None = None
        try:
            heard = companion.send(header)
            pending.blocked = self._seconds() - begun
            sent.set()
            answer = companion.receive() if heard else None
            how = ""
            if answer is None:
                self._companion = None
                how = companion.end()
            commit = deliver(None if answer is None else canonical.decode(answer))
            if commit is None:
                raise CkptError(
                    f"the writer process {how} before the commit was made; the repository is unchanged",
                    code="writer-lost",
                    hint="if memory ran out: commit copies nothing. The next commit_async starts a new one",
                )
        except BaseException as problem:  # noqa: BLE001 - it is the outcome, whatever it is
            error = problem
            sent.set()
        # The turn is free before the outcome is known: whoever waited for it may save at once.
        self._turn.release()
        pending.background = self._seconds() - begun - pending.blocked
        if commit is not None and commit.report is not None and not quiet:
            _log.info(
                "blocked %.2f s, background %.1f s, new %s of %s",
                pending.blocked,
                pending.background,
                in_bytes(commit.report.new),
                in_bytes(commit.report.given),
            )
        pending.end(commit, error)

    def close(self) -> None:
        """Wait for the save in flight, and end the writer process."""
        with self._turn:
            self._let_go()

    def _let_go(self) -> None:
        companion, self._companion = self._companion, None
        if companion is not None:
            companion.end()
        memory, self._memory, self._staging = self._memory, None, None
        if memory is not None:
            memory.close()

    def __del__(self) -> None:
        self._let_go()

    def disown(self) -> None:
        """In a forked child: nothing of this is ours. The socket above all: while a child held it, the
        writer would not see its trainer die."""
        self._turn = threading.Lock()
        companion, self._companion = self._companion, None
        if companion is not None:
            companion.abandon()
        self._let_go()


def _taken(ours: list[PendingCommit]) -> PendingCommit | None:
    """What only one of several threads gets."""
    try:
        return ours.pop()
    except IndexError:
        return None


# -- what the writer answers ----------------------------------------------------------------------


def answer_of(commit: Commit) -> dict[str, Any]:
    """What the trainer does not know of a commit yet, as plain values."""
    report = commit.report
    assert report is not None
    return {
        "id": bytes(commit.id),
        "tree": bytes(commit.tree),
        "parents": [bytes(parent) for parent in commit.parents],
        "origin": None if commit.origin is None else bytes(commit.origin),
        "sizes": commit.sizes,
        "report": [report.given, report.new, report.reused, report.stored, report.seconds],
        "components": {
            name: [each.given, each.new, each.reused, each.stored] for name, each in report.components.items()
        },
    }


def commit_of(answer: Mapping[str, Any], fields: Mapping[str, Any]) -> Commit:
    """The commit of an answer, with the fields the trainer gave it. Raises what the writer met instead."""
    if "error" in answer:
        raise revived(answer["error"])
    given, new, reused, stored, seconds = answer["report"]
    components = {name: Component(*numbers) for name, numbers in answer["components"].items()}
    return Commit(
        id=ObjectId(answer["id"]),
        tree=ObjectId(answer["tree"]),
        parents=tuple(map(ObjectId, answer["parents"])),
        origin=None if answer["origin"] is None else ObjectId(answer["origin"]),
        sizes=answer["sizes"],
        report=CommitReport(given, new, reused, stored, seconds, components),
        **fields,
    )


def is_of(commit: Commit, fields: Mapping[str, Any]) -> bool:
    """Whether a commit has just these fields; with their time in nanoseconds no two have."""
    return canonical.encode({name: getattr(commit, name) for name in fields}) == canonical.encode(
        dict(fields)
    )


# -- the end of the process ---------------------------------------------------------------------------


class _FailsAtTheEnd:
    """Standard output, whose very last flush fails: that one has no caller in Python. The interpreter then
    exits with status 120, whatever the status was, as it does when output is lost. Every other way to set
    a status from here would skip the exit handlers that are still to run, or what they print."""

    closed = False

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __repr__(self) -> str:
        return "<the exit status, because a save in the background failed>"

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()
        try:
            sys._getframe(1)
        except ValueError:
            raise CkptError("a commit was not made") from None


def _at_exit() -> None:
    for background in list(_all):
        background.close()
    for pending in list(_untold):
        _log.error("a commit was not made, and nobody asked for its result: %s", pending._error)
        _untold.discard(pending)
        exit_in_failure()


def exit_in_failure() -> None:
    """Have the interpreter exit with status 120. For exit handlers."""
    if not isinstance(sys.stdout, _FailsAtTheEnd):
        sys.stdout = _FailsAtTheEnd(sys.stdout)


def _in_child() -> None:
    _untold.clear()
    theirs = CkptError(
        "this save belongs to the process that began it", hint="ask there; a forked child makes its own"
    )
    for pending in list(_all_pending):
        pending.give_up(theirs)
    for background in list(_all):
        background.disown()


atexit.register(_at_exit)
in_forked_child(_in_child)
