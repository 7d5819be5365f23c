"""Commits made of commits: merges, and parts of one on top of another.

`Repo` has the public methods and their promises; this has what they do. How trees are merged is
`state.merging`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptvcs.committing import Committer
from ckptvcs.errors import InvalidError
from ckptvcs.history.commit import Commit
from ckptvcs.history.drops import Drops
from ckptvcs.history.graph import History
from ckptvcs.ids import ObjectId
from ckptvcs.opened import Opened
from ckptvcs.store import Reader, Writer

if TYPE_CHECKING:
    from ckptvcs.state.bases import Bases
    from ckptvcs.state.merging import MergeReport, Rules
    from ckptvcs.state.tree import Written


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge or a cherry-pick made.

    Attributes:
        commit: the new commit.
        averaged: paths of tensors that were computed.
        kept: how many tensors were taken over from the first commit.
        taken: how many were taken over from another.
        settled: conflicts that `prefer` settled: (path, why).
        overflowed: how many numbers of a finite average were beyond the range of their dtype, by path.
    """

    commit: Commit
    averaged: tuple[str, ...]
    kept: int
    taken: int
    settled: tuple[tuple[str, str], ...]
    overflowed: dict[str, int]


def combine(
    opened: Opened,
    committer: Committer,
    reader: Reader,
    sides: Sequence[Commit],
    base: Commit | None,
    rules: Rules,
    message: str,
    *,
    step: Any,
    epoch: Any,
    metrics: Mapping[str, Any] | None,
    config: Any,
    how: Mapping[str, Any],
    tags: Sequence[str],
    drops: Drops,
    say: Callable[[str], None] | None,
) -> Merged:
    """Commit what `rules` make of commits. Step, epoch and config are those of the first, unless given."""
    from ckptvcs.state import merging
    from ckptvcs.state.paths import exactly

    first = sides[0]
    report: list[MergeReport] = []

    def missing(ids: Iterable[ObjectId]) -> set[ObjectId]:
        with opened.store.snapshot() as snapshot:
            return {id for id in ids if snapshot.live(id) is None}

    def write(writer: Writer, bases: Bases) -> Written:
        # All is looked at in here, behind the writer's first look at the collector's count.
        written, done = merging.merge(
            writer,
            reader,
            [side.tree for side in sides],
            None if base is None else base.tree,
            rules,
            bases,
            missing=missing,
            lost=[drops.of(side.id) or () for side in sides],
            refuse=lambda side, name: drops.check(sides[side], exactly([name])),
            say=say,
        )
        report.append(done)
        return written

    commit = committer.combine(
        write,
        message,
        first,
        [side.id for side in sides[1:]],
        step=first.step if step is None else step,
        epoch=first.epoch if epoch is None else epoch,
        metrics=metrics,
        config=first.config if config is None else config,
        circumstances=how,
        tags=tags,
    )
    done = report[0]
    return Merged(
        commit,
        tuple(done.averaged),
        done.kept,
        done.taken,
        tuple(done.settled),
        done.overflowed,
    )


def patterns(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """One pattern or several."""
    return (given,) if isinstance(given, str) else tuple(given or ())


class Recipe(NamedTuple):
    """What `Repo.merge` was asked for."""

    strategy: str
    weights: Sequence[float] | None
    base: Commit | None
    only: str | Sequence[str] | None
    ours: str | Sequence[str]
    theirs: str | Sequence[str]
    prefer: str | None

    def checked(
        self, sides: Sequence[Commit], history: History
    ) -> tuple[Rules, Commit | None, dict[str, Any]]:
        """The rules for these commits, the base if there is one, and what the new commit records of it all.
        InvalidError if that makes no sense."""
        from ckptvcs.state import averaging, merging

        if len(sides) < 2 or len({side.id for side in sides}) < len(sides):
            raise InvalidError("a merge takes two commits or more, each once")
        if self.prefer not in (None, "ours", "theirs"):
            raise InvalidError(f"prefer is {self.prefer!r}", hint="'ours' or 'theirs'")
        if len(sides) > 2 and (self.theirs or self.prefer == "theirs"):
            raise InvalidError(
                "of more than two commits none is 'theirs'", hint="put the one to be taken first"
            )
        formula = averaging.formula(self.strategy, self.weights, len(sides))
        if self.base is not None and not formula.needs_base:
            raise InvalidError(
                f"the strategy {self.strategy} has no base", hint="strategy 'task-arithmetic' has"
            )
        base = self.base
        if formula.needs_base and base is None:
            base = _common(sides, history)
        only = None if self.only is None else patterns(self.only)
        how: dict[str, Any] = {"strategy": self.strategy, "weights": list(formula.weights)}
        for name, value in (("only", only), ("ours", patterns(self.ours)), ("theirs", patterns(self.theirs))):
            how |= {name: list(value)} if value else {}
        how |= {"prefer": self.prefer} if self.prefer is not None else {}
        how |= {"base": str(base.id)} if base is not None else {}
        rules = merging.Rules(formula, only, patterns(self.ours), patterns(self.theirs), self.prefer)
        return rules, base, how


def _common(sides: Sequence[Commit], history: History) -> Commit:
    """The nearest commit that all have come from along first parents, and that is none of them."""
    lines = [{each.id for each in history.first_parents(side.id)} for side in sides]
    shared = set.intersection(*lines) - {side.id for side in sides}
    for commit in history.first_parents(sides[0].id):
        if commit.id in shared:
            return commit
    raise InvalidError(
        "these commits come from no common one that is none of them",
        hint="name one with base= (`--base REV`)",
    )
