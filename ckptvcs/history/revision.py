"""Revisions: text that names a commit.

HEAD, @             the handle's tip
main, v1, lost/...  a branch, a tag, a commit that lost a race; full names (refs/heads/main) as well
1a2b3c              an id or its beginning, at least 4 hex digits; refs win over ids
REV~n  REV~         n first parents up
REV^n  REV^         the n-th parent; REV^0 is REV
REF@{n}             where the ref stood n moves ago
REV@step:N          the commit of step N nearest to REV along first parents
REV@best[:METRIC]   the best commit by that metric along first parents

And text that names many, for a log: A..B is what B reaches and A does not, A...B what one of them reaches
and not both, ^A takes away what A reaches. A side that is left out is the handle's tip.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

from ckptvcs.errors import AmbiguousError, InvalidError, NotFoundError
from ckptvcs.history import notes, refs
from ckptvcs.history.commit import Commit, rankable
from ckptvcs.history.graph import History
from ckptvcs.ids import Kind, ObjectId
from ckptvcs.store import Move, Store, Target

_SUFFIX = re.compile(
    r"~(?P<up>\d*)|\^(?P<parent>\d*)|@\{(?P<moves>\d+)\}|@step:(?P<step>-?\d+)"
    r"|@best(?::(?P<metric>[^~^@\s]+))?(?=$|[~^@])"
)
_HEX = re.compile(r"[0-9a-fA-F]{4,64}\Z")
_PARENT_OF_HEAD = re.compile(r"\^\d?(?=$|[~^@])")
_MIN_BY_NAME: Final = ("loss", "error", "perplexity")
_MAX_BY_NAME: Final = ("acc", "accuracy")

ModeOf = Callable[[str], str | None]
"""Gives a metric's configured mode, 'min' or 'max', or None."""


class Revisions:
    """Resolves revisions against one store, from the viewpoint of one handle."""

    def __init__(
        self,
        store: Store,
        history: History,
        head: Callable[[], tuple[str | None, ObjectId | None]],
        mode_of: ModeOf,
    ) -> None:
        """`head` gives the handle's (full ref name or None when detached, tip or None when unborn)."""
        self._store = store
        self._history = history
        self._head = head
        self._mode_of = mode_of

    def resolve(self, text: str | ObjectId | Commit) -> ObjectId:
        """The commit that `text` names.

        NotFoundError with near names, AmbiguousError listing the candidates, InvalidError for text
        that cannot be a revision.
        """
        if isinstance(text, Commit):
            return text.id
        if isinstance(text, ObjectId):
            return self._stored_commit(text, str(text))
        if not isinstance(text, str):
            raise InvalidError(f"a revision is text, not a {type(text).__name__}")
        base, suffixes = _split(text)
        current, ref = self._base(base, before=bool(suffixes) and suffixes[0]["moves"] is not None)
        for suffix in suffixes:
            if suffix["moves"] is not None:
                current = self._moves_ago(ref, _number(suffix["moves"], text), text)
            elif current is None:
                raise self._unborn(text)
            elif suffix["up"] is not None:
                current = self._up(current, _number(suffix["up"] or "1", text), text)
            elif suffix["parent"] is not None:
                current = self._parent(current, _number(suffix["parent"] or "1", text), text)
            elif suffix["step"] is not None:
                current = self._at_step(current, _number(suffix["step"], text), text)
            else:
                current = self.best(current, suffix["metric"]).id
            ref = None
        if current is None:
            raise self._unborn(text)
        return current

    def resolve_all(self, texts: Iterable[str | ObjectId | Commit]) -> tuple[list[ObjectId], list[ObjectId]]:
        """What revisions and ranges of them reach together: (tips, commits whose history is left out)."""
        tips: list[ObjectId] = []
        without: list[ObjectId] = []
        for text in texts:
            sides = None if isinstance(text, ObjectId) or not isinstance(text, str) else range_of(text)
            if sides is not None:
                left, right = (self.resolve(side or refs.HEAD) for side in sides[::2])
                if sides[1] == "...":
                    tips += (left, right)
                    without += self._history.common_ancestors([left, right])
                else:
                    tips.append(right)
                    without.append(left)
            elif isinstance(text, str) and text.startswith("^") and not _PARENT_OF_HEAD.match(text):
                without.append(self.resolve(text[1:]))
            else:
                tips.append(self.resolve(text))
        return tips, without

    # -- bases -----------------------------------------------------------------------------------

    def _base(self, name: str, *, before: bool) -> tuple[ObjectId | None, str | None]:
        """(commit, full ref name). The commit is None for a branch that is not born, and, if an earlier
        position is asked for (`before`), for a ref that was deleted."""
        if name in (refs.HEAD, "@", ""):
            ref, tip = self._head()
            return tip, ref or refs.HEAD
        with self._store.snapshot() as snapshot:
            places = [
                full
                for full in (name, refs.HEADS + name, refs.TAGS + name, "refs/" + name)
                if full.startswith("refs/") and _encodable(full) and len(full.encode()) < 400
            ]
            for full in places:
                target = snapshot.ref(full)
                if isinstance(target, ObjectId):
                    return target, full
            found = []
            if _HEX.match(name):
                digits = name.lower()
                prefix = bytes.fromhex(digits[: len(digits) & ~1])
                candidates = snapshot.ids_with_prefix(prefix, 10_000)
                found = [id for id, kind in candidates if kind is Kind.COMMIT and str(id).startswith(digits)]
        if len(found) == 1:
            return found[0], None
        if len(found) > 1:
            listed = ", ".join(str(id)[: len(name) + 4] for id in found[:5])
            raise AmbiguousError(
                f"{name!r} is the beginning of {len(found)} commit ids: {listed}",
                hint="give more digits",
            )
        ref, tip = self._head()
        if ref == refs.HEADS + name and tip is None:
            return None, ref
        for full in places if before else ():
            if ref_history(self._store, full):
                return None, full
        hint = self._near(name)
        if "@" in name:
            hint = "behind a name may stand @{n}, @step:N or @best:METRIC"
        raise NotFoundError(f"no branch, tag or commit is called {name!r}", hint=hint)

    def _near(self, name: str) -> str | None:
        with self._store.snapshot() as snapshot:
            names = [refs.shown(ref) for ref in snapshot.refs("refs/")]
        near = difflib.get_close_matches(name, names, n=3)
        if near:
            return f"did you mean {' or '.join(near)}?"
        return "`ckpt log --all` lists the commits, `ckpt branch` the branches"

    def _unborn(self, text: str) -> NotFoundError:
        ref, _ = self._head()
        branch = refs.shown(ref) if ref else "HEAD"
        return NotFoundError(
            f"{text!r} names no commit: the branch {branch} has none yet", hint="commit something first"
        )

    def _stored_commit(self, id: ObjectId, text: str) -> ObjectId:
        with self._store.snapshot() as snapshot:
            row = snapshot.row(id)
        if row is None or row.kind is not Kind.COMMIT:
            raise NotFoundError(f"no commit has the id {text}")
        return id

    # -- suffixes --------------------------------------------------------------------------------

    def _up(self, id: ObjectId, count: int, text: str) -> ObjectId:
        for steps, commit in enumerate(self._history.first_parents(id)):
            if steps == count:
                return commit.id
        raise NotFoundError(f"{text!r} goes back beyond the first commit")

    def _parent(self, id: ObjectId, number: int, text: str) -> ObjectId:
        if number == 0:
            return id
        parents = self._history.commit(id).parents
        if number > len(parents):
            raise NotFoundError(f"{text!r}: {id.short} has {len(parents)} parent(s)")
        return parents[number - 1]

    def _moves_ago(self, ref: str | None, count: int, text: str) -> ObjectId:
        if ref is None:
            raise InvalidError(f"{text!r}: only a ref has earlier positions", hint="as in main@{1}")
        values = [target for target, _ in ref_history(self._store, ref)]
        if count >= len(values):
            raise NotFoundError(
                f"{text!r}: {refs.shown(ref)} has moved {max(0, len(values) - 1)} time(s)",
                hint="`ckpt reflog` lists them",
            )
        target = values[count]
        if not isinstance(target, ObjectId):
            with self._store.snapshot() as snapshot:
                target = snapshot.ref(target) if isinstance(target, str) else None
        if not isinstance(target, ObjectId):
            raise NotFoundError(f"{text!r}: {refs.shown(ref)} pointed at nothing then")
        return self._stored_commit(target, str(target))

    def _at_step(self, tip: ObjectId, step: int, text: str) -> ObjectId:
        steps = []
        for commit in self._history.first_parents(tip):
            if commit.step == step:
                return commit.id
            if commit.step is not None:
                steps.append(commit.step)
        near = sorted(steps, key=lambda s: abs(s - step))[:3]
        hint = f"steps near it: {', '.join(map(str, near))}" if near else "no commit there records a step"
        raise NotFoundError(f"{text!r}: no commit has step {step}", hint=hint)

    # -- metrics ---------------------------------------------------------------------------------

    def metrics(self, commit: Commit) -> dict[str, Any]:
        """A commit's metrics with those that notes added or replaced later."""
        return notes.of(self._store, commit).metrics

    def mode(self, metric: str) -> str:
        """'min' or 'max'. InvalidError if neither the config nor the name tells."""
        mode = self._mode_of(metric)
        if mode is None and metric.endswith(_MIN_BY_NAME):
            mode = "min"
        if mode is None and metric.endswith(_MAX_BY_NAME):
            mode = "max"
        if mode is None:
            raise InvalidError(
                f"is a small or a large {metric} better?",
                hint=f"say so once: `ckpt config metric.{metric}.mode min` (or max)",
            )
        return mode

    def best(self, tip: ObjectId, metric: str | None) -> Commit:
        """The best commit along first parents; of equals, the oldest. NaN is never best."""
        chain = [(commit, self.metrics(commit)) for commit in self._history.first_parents(tip)]
        names = sorted({name for _, metrics in chain for name in metrics})
        if metric is None:
            if len(names) != 1:
                raise InvalidError(
                    "@best needs a metric" if names else "no commit there records a metric",
                    hint=f"as in @best:{names[0]} (there are {', '.join(names)})" if names else None,
                )
            metric = names[0]
        sign = 1 if self.mode(metric) == "min" else -1
        scored = [
            (sign * value, commit)
            for commit, metrics in reversed(chain)
            if (value := rankable(metrics.get(metric))) is not None
        ]
        if not scored:
            hint = f"there are {', '.join(names)}" if names else "no commit there records a metric"
            raise NotFoundError(f"no commit there has the metric {metric}", hint=hint)
        best: Commit = min(scored, key=lambda pair: pair[0])[1]
        return best


def ref_history(store: Store, ref: str) -> list[tuple[Target | None, int]]:
    """Where a ref pointed, newest first, with the log position of each move."""
    with store.snapshot() as snapshot:
        return [
            (op.new, entry.position)
            for entry in snapshot.log_backwards()
            for op in entry.operations
            if isinstance(op, Move) and op.name == ref
        ]


def range_of(text: str) -> tuple[str, str, str] | None:
    """The two sides of a range and what is between them: '..' or '...'; None if it is no range."""
    left, dots, right = text.partition("...")
    if not dots:
        left, dots, right = text.partition("..")
    return (left, dots, right) if dots else None


def split_name(text: str) -> tuple[str, str | None]:
    """`REV:NAME` as revision and name, the name None without a colon of its own: those in `@step:N` and
    `@best:METRIC` belong to the revision, unless another follows."""
    for found in re.finditer(":", text):
        if not text[: found.start()].endswith(("@step", "@best")):
            return text[: found.start()], text[found.end() :]
    return text, None


def _split(text: str) -> tuple[str, list[dict[str, str | None]]]:
    """The base and the suffixes of a revision."""
    start = len(text)
    first = re.search(r"[~^]|@\{|@step:|@best(?=$|[:~^@])", text)
    if first is not None:
        start = first.start()
    base, rest = text[:start], text[start:]
    suffixes = []
    while rest:
        found = _SUFFIX.match(rest)
        if found is None:
            raise InvalidError(
                f"{text!r} is not a revision: cannot read {rest!r}",
                hint="as in main~2, main^2, main@{1}, main@step:100, main@best:val_loss",
            )
        suffixes.append(found.groupdict())
        rest = rest[found.end() :]
    return base, suffixes


def _number(digits: str, text: str) -> int:
    try:
        return int(digits)
    except ValueError:  # more digits than Python reads
        raise InvalidError(
            f"{text[:40] + '…'!r} is not a revision: a number of {len(digits)} digits"
        ) from None


def _encodable(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False
