"""Signals that announce the end of a job: noted when they come, acted on between two steps.

A handler runs between any two instructions of the main thread, in the middle of a step or of a save. So ours
only writes down which signal came, and when. Whoever handled that signal before gets it after the state has
been saved (`Preemption.hand_on`): nothing is taken away from them but the time in between.
"""

from __future__ import annotations

import logging
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from signal import Signals as Signals
from types import FrameType
from typing import Any, Final, TypeAlias

from ckptvcs.disk import Disk
from ckptvcs.errors import InvalidError

_Earlier: TypeAlias = Callable[[int, FrameType | None], Any] | int | signal.Handlers

DEFAULT: Final = (signal.SIGTERM, signal.SIGUSR1)
"""What batch systems send: SIGTERM before SIGKILL, SIGUSR1 by convention with `sbatch --signal`."""

_log = logging.getLogger("ckptvcs")


def checked(signals: Any) -> tuple[Signals, ...]:
    """Signals by number, name or member. InvalidError for what cannot be caught."""
    found = []
    for each in (signals,) if isinstance(signals, (int, str)) else signals:
        try:
            one = Signals[each] if isinstance(each, str) else Signals(each)
        except (KeyError, ValueError):
            raise InvalidError(f"there is no signal {each!r:.40}", hint="as in signal.SIGTERM") from None
        if one in (signal.SIGKILL, signal.SIGSTOP):
            raise InvalidError(f"{one.name} cannot be caught", hint="leave it out of `signals`")
        found.append(one)
    return tuple(dict.fromkeys(found))


class Preemption:
    """Notes the first of some signals from now on, until `close`.

    Attributes:
        noted: the signal that came first, or None.
        at: when it came, by `Disk.seconds`.
        closed: whether nothing is noted any more.
    """

    def __init__(self, signals: Sequence[Signals], disk: Disk) -> None:
        """Installs the handlers. InvalidError outside the main thread, where Python allows none."""
        self.noted: Signals | None = None
        self.at = 0.0
        self.closed = False
        self._disk = disk
        self._process = disk.process()
        self._earlier: dict[Signals, _Earlier] = {}
        self._handlers: dict[Signals, _Note] = {}
        if not signals:
            return
        if threading.current_thread() is not threading.main_thread():
            raise InvalidError(
                "only the main thread can handle signals",
                hint="make the Autosave in the main thread, or pass signals=()",
            )
        for each in signals:
            earlier = _living(signal.getsignal(each))
            if earlier is None:
                _log.warning("%s has a handler outside Python; Autosave leaves it alone", each.name)
                continue
            self._earlier[each] = earlier
            self._handlers[each] = _Note(weakref.ref(self), earlier)
            signal.signal(each, self._handlers[each])

    def note(self, which: int) -> bool:
        """A signal has come; False when closed, and in a forked child, whose signals are not the job's."""
        if self.closed or self._disk.process() != self._process:
            return False
        if self.noted is None:
            self.noted, self.at = Signals(which), self._disk.seconds()
        return True

    def hand_on(self, which: Signals) -> None:
        """Give a signal to whoever handled it before; SystemExit with 128 + its number if nobody did."""
        self.noted = None
        earlier = _living(self._earlier.get(which, signal.SIG_DFL))
        if not callable(earlier):
            raise SystemExit(128 + which)
        earlier(which, None)

    def close(self) -> None:
        """Put the earlier handlers back, except where somebody installed another one since."""
        self.closed = True
        if self._disk.process() != self._process or threading.current_thread() is not threading.main_thread():
            return  # ours hand on at once what comes
        for which, handler in self._handlers.items():
            if signal.getsignal(which) is handler:
                signal.signal(which, self._earlier[which])
        self._handlers.clear()


class _Note:
    """A handler that notes, for as long as there is somebody to note it for.

    Attributes:
        where: the `Preemption`, or nothing any more.
        earlier: who handled the signal before.
    """

    def __init__(self, where: weakref.ref[Preemption], earlier: _Earlier) -> None:
        self.where = where
        self.earlier = earlier

    def __call__(self, which: int, frame: FrameType | None) -> None:
        preemption = self.where()
        if preemption is not None and preemption.note(which):
            return
        # Nobody saves here: a forked child, or what is left of an Autosave that was forgotten. A child that
        # only noted a SIGTERM could not be terminated.
        if callable(self.earlier):
            self.earlier(which, frame)
        else:
            signal.signal(which, self.earlier)
            signal.raise_signal(which)


def _living(handler: Any) -> Any:
    """A handler, or the one before it if it is ours and notes for nobody any more."""
    while isinstance(handler, _Note) and ((noting := handler.where()) is None or noting.closed):
        handler = handler.earlier
    return handler
