"""Saving a training run on its own: at the right moments, on one branch, by one process."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

from ckptvcs.background import exit_in_failure
from ckptvcs.errors import CkptError, InvalidError, LockedError, NotFoundError, StorageError
from ckptvcs.history.commit import Commit, checked_epoch, checked_step, in_bytes, plain_metrics
from ckptvcs.maintenance import retention
from ckptvcs.maintenance.points import Point
from ckptvcs.repo import Repo
from ckptvcs.store import Claim
from ckptvcs.training import preemption as preemptions
from ckptvcs.training.interval import Planner, Schedule, in_time, schedule_of, seconds_between
from ckptvcs.training.monitor import Monitor
from ckptvcs.training.preemption import Preemption, Signals
from ckptvcs.training.ranks import Flags, Ranks
from ckptvcs.training.saving import Saved, Saver, Wanted

RETRY: Final = 60.0
"""Seconds after a failed save until it is tried again, if nothing makes it due before."""

_in_use: Final[weakref.WeakSet[Claim]] = weakref.WeakSet()
"""Claims under which an Autosave saves. A second one on the same branch is refused, in this process too."""

_log = logging.getLogger("ckptvcs")


class Autosave:
    """Saves a state while it is trained: call `step` after each optimizer step.

    Use it as a context manager, or call `close`: leaving it normally saves what is not saved yet and waits
    for it; leaving it by an exception waits for the save under way and saves nothing more, since the state
    may be in the middle of a step.

    Made and called on every rank of a torch.distributed job; rank 0 writes. Not for use from several threads.
    """

    def __init__(
        self,
        repo: Repo,
        state: Any,
        *,
        every: Any = None,
        interval: str | None = None,
        mtbf: Any = "6h",
        max_overhead: float = 0.02,
        monitor: str | None = None,
        mode: str | None = None,
        save_best: bool = True,
        patience: int | None = None,
        min_delta: float = 0.0,
        keep_last: int | None = None,
        keep_best: int | None = None,
        on_error: str = "raise",
        config: Any = None,
        message: str = "",
        signals: Sequence[int | str] | None = None,
        steal: bool = False,
        save_last: bool = True,
        blocking: bool = False,
        agree: bool = True,
    ) -> None:
        """Checks that the state can be saved, and claims the handle's branch.

        Args:
            repo: the handle whose branch to commit to. `restore` the state through it first.
            state: what to save, as `Repo.commit` takes it. Containers and objects are looked at anew at each
                save.
            every: save at multiples of so many steps (`100`), after so much time without a save ('15min', a
                timedelta), or whichever comes first (`(1000, '15min')`).
            interval: 'auto', the default without `every`: choose the time between saves from what they are
                found to cost.
            mtbf: for `auto`, the mean time between failures; None leaves failures out of account.
            max_overhead: for `auto`, the part of the time that saving may cost.
            monitor: the metric by which a commit is the best.
            mode: 'min' or 'max'. Recorded as the setting `metric.NAME.mode` where that differs from what the
                repository assumes; without it, the repository's setting, or what the name says.
            save_best: save at each step whose metrics have a new best of `monitor`.
            patience: stop after so many values of `monitor` in a row that are not better.
            min_delta: for `patience`, by more than how much a value must be better.
            keep_last, keep_best: of how many newest and best commits of the branch the content is kept.
                Whatever else retention does not protect (`Repo.retain`) is dropped after each save, in the
                background. Without them the config's policy for the branch holds; without one, all is kept.
            on_error: 'raise', or 'warn' to train on when the disk is full or refuses, or the process that
                writes was killed, and try again.
            config: hyperparameters, recorded in each commit.
            message: of each commit; without it, what made the save due.
            signals: save and stop when one of these comes; by default SIGTERM and SIGUSR1, none with ().
                They need the main thread.
            steal: take the branch over from a living claimant, which then saves no longer.
            save_last: save what is not saved yet when training ends.
            blocking: wait at each save until it is durable, instead of writing in the background.
            agree: let the ranks agree at each step, which is one small reduction on the CPU. Without it, make
                the Autosave on rank 0 only: other ranks then learn nothing of a signal.

        Raises:
            InvalidError: an argument that cannot be.
            UnsupportedStateError: leaves that cannot be stored, all of them.
            LineageError, ConflictError: `Repo.commit` would refuse.
            LockedError: code 'claimed': another living process has claimed the branch.
        """
        self._schedule, self._planner = _when(every, interval, mtbf, max_overhead)
        if on_error not in ("raise", "warn"):
            raise InvalidError(f"on_error cannot be {on_error!r:.40}", hint="choose 'raise' or 'warn'")
        if not isinstance(message, str):
            raise InvalidError(f"message must be text, not a {type(message).__name__}")
        self._keep = {
            "keep_last": retention.checked_count(keep_last, "keep_last"),
            "keep_best": retention.checked_count(keep_best, "keep_best"),
        }
        _check_monitor(monitor, mode=mode, patience=patience, min_delta=min_delta, keep_best=keep_best)
        self.should_stop = False
        """True once training is to end: patience ran out, or a signal came and was handed on."""
        self._monitor: Monitor | None = None
        self._policy: retention.Policy | None = None
        self._metric = monitor
        self._save_best = save_best
        self._warn = on_error == "warn"
        self._save_last = save_last
        self._state = state
        self._closed = False
        self._failed: Exception | None = None
        self._last: Commit | None = None
        self._best: Commit | None = None
        self._seen: Wanted | None = None
        self._resumed: Wanted | None = None  # what was seen before the first step
        self._saved_step: int | None = None
        self._given = False
        self._told: Exception | None = None  # the error of a save that `step` or `wait` has raised
        self._waited = 0.0
        self._claim: Claim | None = None
        self._uses: Claim | None = None
        self._exit: Callable[[], None] | None = None
        watched = preemptions.checked(preemptions.DEFAULT if signals is None else signals)
        self._ranks = Ranks(agree=agree)
        self._writes = self._ranks.rank == 0
        if not self._writes and not self._ranks.agreeing:
            self._preemption = Preemption((), repo.disk)
            return
        self._preemption = self._noting(watched, repo, explicit=signals is not None)
        try:
            with self._together():
                if self._ranks.agreeing:
                    self._look()
                if self._writes:
                    repo.check_commit(None if self._ranks.agreeing else state, config=config)
                    self._take_claim(repo, steal=steal)
                    if monitor is not None:
                        self._monitor = _monitor(repo, monitor, mode, patience, float(min_delta))
        except BaseException:
            self._let_go()
            raise
        self._disk = repo.disk
        self._process = self._disk.process()
        if self._writes:
            self._repo = repo
            self._policy = self._chosen_policy()
            retain = None if self._policy is None else self._policy.plain()
            self._saver = Saver(repo, state, config=config, message=message, blocking=blocking, retain=retain)
            self._resume()
            self._announce()
        self._left = self._saved_at = self._disk.seconds()
        self._work = 0.0
        self._exit = _at_exit(self)

    # -- construction ------------------------------------------------------------------------------

    @staticmethod
    def _noting(watched: Sequence[Signals], repo: Repo, *, explicit: bool) -> Preemption:
        try:
            return Preemption(watched, repo.disk)
        except InvalidError as error:
            if explicit:
                raise
            _log.warning("Autosave will not notice signals: %s", error)
            return Preemption((), repo.disk)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """What fails on one rank fails on all, so that none waits for another that has gone."""
        failed: BaseException | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised below
            failed = error
        if self._ranks.agree(Flags(stop=int(failed is not None))).stop and failed is None:
            raise CkptError("Autosave failed on another rank, which says why", code="wrong-rank")
        if failed is not None:
            raise failed

    def _take_claim(self, repo: Repo, *, steal: bool) -> None:
        held = repo.claimed
        if held is None or held in _in_use:
            self._claim = held = repo.claim(steal=steal)
        self._uses = held  # the caller's own, from before the state was restored, stays theirs
        _in_use.add(held)

    def _chosen_policy(self) -> retention.Policy | None:
        """What is to be kept of the branch: as given, else as the config says."""
        rules: dict[str, Any] = {name: count for name, count in self._keep.items() if count is not None}
        if "keep_best" in rules and self._monitor is not None:
            rules |= {"metric": self._monitor.metric, "mode": self._monitor.mode}
        if not rules:
            rules = self._repo.config.retention(self._repo.branch_name or "", retention.is_for)
        return retention.Policy.of(rules) if rules else None

    def _resume(self) -> None:
        """Go on from what the restored commit and those before it say."""
        origin = self._repo.origin
        self._last = origin
        if origin is None:
            return
        if origin.step is not None:
            self._seen = self._resumed = Wanted(origin.step, "")
            self._saved_step = origin.step
        monitor = self._monitor
        if monitor is None:
            return
        with contextlib.suppress(NotFoundError):
            self._best = self._repo.resolve(f"{origin.id}@best:{monitor.metric}")
            monitor.saved = monitor.mark = self._value(self._best)
        record = origin.environment.get("autosave")
        counted = record.get("monitor") if isinstance(record, dict) else None
        if isinstance(counted, dict) and monitor.resume(counted):
            return
        if self._best is not None:  # commits that no Autosave made: count those that hold a value
            for commit in self._repo.log(origin, first_parent=True):
                if commit.id == self._best.id:
                    break
                monitor.stale += self._value(commit) is not None

    def _value(self, commit: Commit) -> float | None:
        """A commit's value of the monitored metric."""
        value = self._repo.metrics(commit).get(self._metric or "")
        return None if value is None else float(value)

    def _announce(self) -> None:
        when = "as often as pays off" if self._schedule is None else f"every {self._schedule}"
        best = f" and at each best {self._metric}" if self._metric and self._save_best else ""
        _log.info("autosaving to the branch %s %s%s", self._repo.branch_name, when, best)
        if self._policy is not None:
            _log.info("retention on %s keeps %s", self._repo.branch_name, self._policy)

    # -- what is known -----------------------------------------------------------------------------

    @property
    def last(self) -> Commit | None:
        """The newest commit of this run that is durable; at first the one that was restored."""
        return self._last

    @property
    def best(self) -> Commit | None:
        """The best durable commit by `monitor` on this line of commits; None if none holds a value."""
        return self._best

    def kept(self) -> list[Commit]:
        """The commits on this line whose content `keep_last` and `keep_best` keep, newest first; all without
        them. What is kept for another reason (`Repo.retain`) is not among them.
        """
        if self._last is None:
            return []
        line = list(self._repo.log(self._last, first_parent=True))
        gone = {commit.id for commit in line if self._repo.dropped(commit) == ()}
        policy = self._policy
        if policy is None:
            return [commit for commit in line if commit.id not in gone]
        score = None
        if policy.metric is not None:
            values = {commit.id: self._repo.metrics(commit) for commit in line}
            mode = policy.mode or self._repo.metric_mode(policy.metric)
            score = retention.score_by(policy.metric, mode, values.__getitem__)
        chosen = retention.keeps([Point.of(commit) for commit in line], policy, score, gone)
        return [commit for commit in line if commit.id in chosen and commit.id not in gone]

    # -- training ----------------------------------------------------------------------------------

    def step(
        self,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        *,
        epoch: int | float | None = None,
        now: bool = False,
    ) -> bool:
        """A training step is over: save if it is time.

        After a signal it saves, waits until the commit is durable, and hands the signal on to whoever handled
        it before; if nobody did, SystemExit with status 128 + the signal's number.

        Args:
            step: how many steps the state has behind it.
            metrics: numbers that belong to this state. 0-dim arrays and tensors are read only if needed.
            epoch: the position in the data, recorded in the commit.
            now: save in any case.

        Returns whether training should go on: the opposite of `should_stop`.

        Raises what `Repo.commit` raises, for this save or the one before, except what `on_error` says; and
        LockedError (code 'claimed') if the branch was taken over.
        """
        if self._closed:
            raise CkptError("this Autosave is closed", code="closed", hint="make another one")
        wanted = self._wanted(step, metrics, epoch)
        if not self._writes and not self._ranks.agreeing:
            return True
        if self._disk.process() != self._process:
            raise CkptError("this Autosave belongs to the parent process", code="closed")
        entered = self._disk.seconds()
        self._work += entered - self._left
        before, self._seen = self._seen, wanted
        why: str | None = None
        problem: Exception | None = None
        if self._writes:
            try:
                why = self._decide(before, wanted, entered, given=metrics or {}, now=now)
            except Exception as error:  # noqa: BLE001 - raised below, when no rank waits any more
                problem = error
        stop = self.should_stop + 2 * (problem is not None)
        agreed = self._ranks.agree(Flags(int(why is not None), int(self._preemption.noted or 0), stop))
        if problem is not None:
            raise problem
        if agreed.stop > 1:
            raise CkptError("saving failed on rank 0, which says why", code="wrong-rank")
        self.should_stop = bool(agreed.stop)
        if agreed.signal:
            self._end(Signals(agreed.signal), wanted)
        elif agreed.save:
            self._save(wanted, why or "")
            if self._ranks.size == 1 and self._preemption.noted is not None:  # it came while we saved
                self._end(self._preemption.noted, wanted)
        self._left = self._disk.seconds()
        return not self.should_stop

    def _wanted(self, step: Any, metrics: Any, epoch: Any) -> Wanted:
        number = checked_step(step)
        if number is None:
            raise InvalidError("step must be a whole number, not None")
        if metrics is not None and not isinstance(metrics, Mapping):
            plain_metrics(metrics)  # says what is wrong with it
        light = {name: _detached(value) for name, value in (metrics or {}).items()}
        if self._seen is not None and self._seen.step == number:  # told in several calls
            light = {**self._seen.metrics, **light}
            epoch = self._seen.epoch if epoch is None else epoch
        return Wanted(number, "", checked_epoch(epoch), light)

    def _decide(
        self, before: Wanted | None, wanted: Wanted, at: float, *, given: Mapping[str, Any], now: bool
    ) -> str | None:
        """What makes a save due, in words; None if nothing does. No other save is under way then."""
        if self._planner is not None:
            self._planner.stepped(at - self._left, writing=self._saver.busy)
        ending = self._preemption.noted is not None
        with self._settled() if ending else contextlib.nullcontext():
            self._take(self._saver.finished(wait=False))
        better = self._observe(given)
        why = self._due(before, wanted, at, better=better, now=now)
        monitor = self._monitor
        if monitor is not None and monitor.exhausted and not self.should_stop:
            self.should_stop = True
            shown = "nothing" if monitor.mark is None else f"{monitor.mark:.6g}"
            _log.warning(
                "stopping: the last %d values of %s were not better than %s",
                monitor.stale,
                monitor.metric,
                shown,
            )
            if self._save_last and self._saved_step != wanted.step:
                why = why or "patience ran out"
        if why is not None:
            with self._settled() if ending else contextlib.nullcontext():
                self._wait()
        return why

    def _observe(self, given: Mapping[str, Any]) -> bool:
        """Whether there is a value of the monitored metric that is better than all that are committed."""
        monitor = self._monitor
        if monitor is None or monitor.metric not in given:
            return False
        self._given = True
        return monitor.observe(float(plain_metrics({monitor.metric: given[monitor.metric]})[monitor.metric]))

    def _due(
        self, before: Wanted | None, wanted: Wanted, at: float, *, better: bool, now: bool
    ) -> str | None:
        if now:
            return "asked for"
        if better and self._save_best:
            return f"best {self._metric}"
        if self._failed is not None and at - self._saved_at >= RETRY:
            return "trying again"
        schedule = self._schedule
        reached = wanted.step - 1 if before is None else before.step
        if schedule is not None and schedule.crossed(reached, wanted.step):
            return f"every {schedule.steps} steps"
        if self._saver.busy or self._saved_step == wanted.step:
            return None
        if schedule is not None and schedule.seconds is not None and at - self._saved_at >= schedule.seconds:
            return f"every {in_time(schedule.seconds)}"
        if self._planner is not None and self._work >= self._planner.interval:
            return "auto"
        return None

    def _wait(self) -> None:
        """Wait for the save under way: there is only ever one."""
        began = self._disk.seconds()
        self._take(self._saver.finished(wait=True))
        self._waited = self._disk.seconds() - began

    # -- saving ------------------------------------------------------------------------------------

    def _save(self, wanted: Wanted, why: str, *, hurried: bool = False) -> None:
        """Begin a save. None is under way."""
        self._saved_step = wanted.step
        if not self._writes:
            self._look()
            return
        metrics = plain_metrics(wanted.metrics)
        value = metrics.get(self._metric) if self._metric else None
        value = None if value is None else float(value)
        best = value is not None and self._monitor is not None and self._monitor.saving(value)
        with self._ranks.looking():
            self._saver.begin(
                Wanted(wanted.step, why, wanted.epoch, metrics, value, best, self._waited, hurried),
                self._record(why),
            )
        self._waited = 0.0
        self._saved_at, self._work = self._disk.seconds(), 0.0
        if not self._ranks.agreeing:  # else at the next step, where all ranks learn of an error
            self._take(self._saver.finished(wait=False))

    def _look(self) -> None:
        """Look at the state as a commit does, together with all ranks, and store nothing."""
        from ckptvcs.state import tree as state_trees

        with self._ranks.looking():
            state_trees.check(self._state)

    def _record(self, why: str) -> dict[str, Any]:
        """What goes into a commit's environment: for people, for retention, for the next process."""
        record: dict[str, Any] = {"why": why}
        record |= {name: count for name, count in self._keep.items() if count is not None}
        if self._monitor is not None:
            record["monitor"] = self._monitor.record()
        return record

    def _take(self, saved: Saved | None) -> None:
        """Note a save that is over: say so, learn from it, or deal with its error."""
        if saved is None:
            return
        if isinstance(saved.outcome, Exception):
            self._failed = saved.outcome
            self._saved_step = None
            if self._monitor is not None and saved.wanted.value is not None:
                self._monitor.failed()
            if not (self._warn and _may_pass(saved.outcome)):
                self._told = saved.outcome
                raise saved.outcome
            _log.warning(
                "step %d could not be saved: %s; training goes on and will try again",
                saved.wanted.step,
                saved.outcome,
            )
            return
        if self._failed is not None:
            _log.warning("saving works again")
            self._failed = None
        commit = self._last = saved.outcome
        if saved.wanted.best:
            self._best = commit
        _log.info("%s", _line(saved, commit, self._repo.branch_name, self._metric))
        if self._planner is not None:
            first = self._planner.plan is None
            if (plan := self._planner.saved(saved.blocked, saved.background)) is not None:
                level = logging.INFO if first else logging.DEBUG
                _log.log(level, "%s", plan.reasoning(self._planner.max_overhead, self._planner.mtbf))

    def _end(self, which: Signals, wanted: Wanted) -> None:
        """A signal came: save, and when that is durable hand the signal on."""
        came = self._preemption.at if self._preemption.noted is not None else self._disk.seconds()
        problem: Exception | None = None
        try:
            if self._writes:
                with self._settled():
                    self._wait()
            unsaved = self._writes and self._saved_step != wanted.step
            if self._ranks.agree(Flags(save=int(unsaved))).save:
                self._save(wanted, which.name, hurried=True)
            if self._writes:
                self._wait()
        except Exception as error:  # noqa: BLE001 - raised below, when no rank waits any more
            problem = error
        finally:
            self._ranks.agree(Flags())  # nobody leaves before the save is durable
        self.should_stop = True
        if problem is not None:
            raise problem
        if self._writes and self._failed is None and self._last is not None:
            _log.warning(
                "%s: step %d is durable as %s, %s after the signal",
                which.name,
                wanted.step,
                self._last.id.short,
                in_time(self._disk.seconds() - came),
            )
        self._preemption.hand_on(which)

    @contextlib.contextmanager
    def _settled(self) -> Iterator[None]:
        """An error of the save before does not keep the last one from being tried."""
        try:
            yield
        except CkptError as error:
            if not _may_pass(error):
                raise
            _log.warning("the save before failed: %s", error)

    def wait(self) -> None:
        """Wait for the save under way. Raises what it raises, except what `on_error` says."""
        if self._writes and not self._closed:
            self._wait()

    # -- the end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Save what is not saved yet, wait until it is durable, and give back branch and signals.

        Raises what the last save raises, whatever `on_error` says: nobody would try again. A signal that came
        since the last step is handed on then. Closing twice is fine.
        """
        self._close(save=self._save_last)
        if self._preemption.noted is not None:
            self._preemption.hand_on(self._preemption.noted)

    def _close(self, *, save: bool) -> None:
        if self._closed:
            return
        self._closed = True
        if not self._writes and not self._ranks.agreeing:
            return
        try:
            if self._writes:
                self._wait()
            unsaved = self._seen is not None and self._saved_step != self._seen.step
            if save and self._ranks.agree(Flags(save=int(self._writes and unsaved))).save:
                assert self._seen is not None
                self._save(self._seen, "the last step")
            if self._writes:
                self._wait()
                if self._failed is not None and (save or self._failed is not self._told):
                    raise self._failed
                stepped = self._seen is not self._resumed
                if save and stepped and self._monitor is not None and not self._given:
                    _log.warning("the metric %s was never given", self._metric)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self._closed = True
        self._preemption.close()
        self._ranks.close()
        if self._uses is not None:
            _in_use.discard(self._uses)
        if self._claim is not None:
            self._claim.release()
        if self._exit is not None:
            atexit.unregister(self._exit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if value is None:
            self.close()
            return
        try:
            self._close(save=False)
        except Exception as error:  # noqa: BLE001 - the exception that ends training says more
            if error is not value:
                _log.error("the last save failed: %s", error)

    def _leave(self) -> None:
        """The interpreter exits, and nobody called `close`."""
        if self._closed or self._disk.process() != self._process:
            return
        seen, saved = self._seen, self._saved_step
        try:
            self._close(save=False)
        except Exception as error:  # noqa: BLE001 - too late to raise
            _log.error("the last save failed: %s", error)
        if self._failed is not None and self._failed is self._told:
            return  # who was told of it has decided how to exit
        if self._failed is not None:
            exit_in_failure()
        elif self._writes and seen is not None and saved != seen.step:
            _log.warning(
                "step %d was not saved when the process ended; `with Autosave(...)` or close() saves it",
                seen.step,
            )


def _at_exit(autosave: Autosave) -> Callable[[], None]:
    where = weakref.ref(autosave)

    def leave() -> None:
        found = where()
        if found is not None:
            found._leave()

    atexit.register(leave)
    return leave


# -- arguments --------------------------------------------------------------------------------------


def _when(every: Any, interval: Any, mtbf: Any, max_overhead: Any) -> tuple[Schedule | None, Planner | None]:
    if interval not in (None, "auto"):
        raise InvalidError(f"interval cannot be {interval!r:.40}", hint="choose 'auto', or give `every`")
    if every is not None:
        if interval is not None:
            raise InvalidError("every and interval exclude each other", hint="give one of them")
        return schedule_of(every), None
    number = isinstance(max_overhead, (int, float)) and not isinstance(max_overhead, bool)
    if not number or not 0 < max_overhead < 1:
        raise InvalidError(f"max_overhead cannot be {max_overhead!r:.40}", hint="a part of 1, as in 0.02")
    between = None if mtbf is None else seconds_between(mtbf)
    return None, Planner(max_overhead=float(max_overhead), mtbf=between)


def _check_monitor(metric: Any, *, mode: Any, patience: Any, min_delta: Any, keep_best: Any) -> None:
    if metric is None:
        named = {"mode": mode, "patience": patience, "keep_best": keep_best}
        lost = [name for name, value in named.items() if value is not None]
        if lost:
            raise InvalidError(f"{lost[0]} needs a metric to go by", hint="as in monitor='val_loss'")
        return
    plain_metrics({metric: 0})
    if mode not in (None, "min", "max"):
        raise InvalidError(f"mode cannot be {mode!r:.40}", hint="choose 'min' or 'max'")
    if patience is not None and (isinstance(patience, bool) or not isinstance(patience, int) or patience < 1):
        raise InvalidError(f"patience cannot be {patience!r:.40}", hint="a number of values from 1 up")
    number = isinstance(min_delta, (int, float)) and not isinstance(min_delta, bool)
    if not number or not 0 <= min_delta < math.inf:
        raise InvalidError(f"min_delta cannot be {min_delta!r:.40}", hint="a number from 0 up")


def _monitor(repo: Repo, metric: str, mode: str | None, patience: int | None, min_delta: float) -> Monitor:
    """The monitor, its mode being the repository's: what `@best` goes by later."""
    assumed: str | None = None
    with contextlib.suppress(InvalidError):
        assumed = repo.metric_mode(metric)
    if mode is None and assumed is None:
        raise InvalidError(f"is a small or a large {metric} better?", hint="give mode='min' or mode='max'")
    if mode is None:
        return Monitor(metric, repo.metric_mode(metric), patience, min_delta)
    if assumed != mode:
        if repo.config.metric_mode(metric) is not None:
            raise InvalidError(
                f"mode={mode!r}, but the repository's setting metric.{metric}.mode is {assumed}",
                hint=f"`ckpt config metric.{metric}.mode {mode}` changes it for all branches",
            )
        repo.configure(f"metric.{metric}.mode", mode)
    return Monitor(metric, mode, patience, min_delta)


# -- small questions --------------------------------------------------------------------------------


def _may_pass(error: Exception) -> bool:
    """Whether trying again may help: the disk refused, something was locked, the process that writes was
    killed. A branch that was lost stays lost."""
    if isinstance(error, LockedError):
        return error.code != "claimed"
    return isinstance(error, StorageError) or (isinstance(error, CkptError) and error.code == "writer-lost")


def _detached(value: Any) -> Any:
    """A metric without the graph that computed it, which would be kept alive; not read from its device."""
    detach = getattr(value, "detach", None)
    return detach() if callable(detach) else value


def _line(saved: Saved, commit: Commit, branch: str | None, metric: str | None) -> str:
    """A save in one line."""
    report = commit.report
    parts = [
        f"waited {in_time(saved.wanted.waited)}",
        f"blocked {in_time(saved.blocked)}",
        f"background {in_time(saved.background)}",
    ]
    if report is not None:
        parts.append(f"new {in_bytes(report.new)} of {in_bytes(report.given)}")
    if saved.wanted.value is not None:
        parts.append(f"{metric} {saved.wanted.value:.6g}" + (" (best)" if saved.wanted.best else ""))
    return (
        f"saved step {saved.wanted.step} on {branch} as {commit.id.short} ({saved.wanted.why}): "
        + ", ".join(parts)
    )
