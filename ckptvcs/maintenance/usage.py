"""Who holds the bytes: by branch, component, commit and tensor.

- *logical*: bytes of what was given, once per commit that still has it.
- *stored*: bytes of all records that are needed for it: headers, payloads, footer entries, and the bases of
  what is stored as a difference. What two hold counts for both.
- *exclusive*: bytes of the records that nothing else holds. Of a branch: what `branch -d --force` and
  `gc --grace 0` free, beside what is pending.
- *shared*: the rest of stored.
- *pending*: bytes in packs that no ref and no pin needs; of these, `held` is what the undo window holds.

Beside writers these are figures of about now: records that come and go meanwhile are left out.
Memory: see `columns`; besides some 500 bytes for each commit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ckptvcs.ids import ObjectId
from ckptvcs.maintenance.columns import Content, Labels, Places, Rows, Sets, one_or_many
from ckptvcs.maintenance.points import Point, Points, Roots, roots
from ckptvcs.state import parameters, paths
from ckptvcs.state import tree as trees
from ckptvcs.state.bases import FILES
from ckptvcs.store import Store
from ckptvcs.store.format import TRAILER_BYTES

VIEWS: Final = ("branch", "component", "commit", "tensor")
_OTHERS, _WINDOW, _FIRST = 0, 1, 2
"""Members of the sets of holders: tags and the like, the undo window, then the branches."""


@dataclass(slots=True)
class Share:
    """What one holder holds, in bytes. `parts` divides it further: an optimizer's moments."""

    name: str
    logical: int = 0
    stored: int = 0
    exclusive: int = 0
    parts: list[Share] = field(default_factory=list)
    step: int | None = None
    parameter: str = ""
    dropped: tuple[str, ...] | None = None

    @property
    def shared(self) -> int:
        """Stored bytes that others hold as well."""
        return self.stored - self.exclusive

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        found: dict[str, Any] = {
            "name": self.name,
            "logical": self.logical,
            "stored": self.stored,
            "shared": self.shared,
            "exclusive": self.exclusive,
        }
        if self.parts:
            found["parts"] = [part.as_dict() for part in self.parts]
        if self.step is not None:
            found["step"] = self.step
        if self.parameter:
            found["parameter"] = self.parameter
        if self.dropped is not None:
            found["dropped"] = list(self.dropped)
        return found


@dataclass(slots=True)
class Usage:
    """Who holds the bytes of a repository. A view that was not asked for is empty.

    Attributes:
        branches, components, commits, tensors: what each holds; `tensors` are those of one commit.
        stored: bytes of all records in all packs, pending ones included.
        structure: bytes of commits and trees, which are no component's.
        others: bytes that only tags, lost commits, pins and a detached HEAD hold.
        pending: bytes that nothing needs any more; `gc` frees them.
        held: of these, what only the undo window holds; `gc --grace 0` frees it.
    """

    branches: list[Share] = field(default_factory=list)
    components: list[Share] = field(default_factory=list)
    commits: list[Share] = field(default_factory=list)
    tensors: list[Share] = field(default_factory=list)
    stored: int = 0
    structure: int = 0
    others: int = 0
    pending: int = 0
    held: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        plain = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {
            name: [share.as_dict() for share in value] if isinstance(value, list) else value
            for name, value in plain.items()
        }


def usage(
    store: Store,
    *,
    grace: float,
    by: Collection[str] = ("branch", "component"),
    commits: Sequence[ObjectId] = (),
    tensors_of: ObjectId | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Usage:
    """Find out who holds the bytes.

    Args:
        grace: the undo window in seconds, for `held`.
        by: which of `VIEWS` to fill in.
        commits: those of the view by commit.
        tensors_of: the commit of the view by tensor.
        say: told now and then how far it is.
    """
    return _Accounts(store, grace, say).usage(by, commits, tensors_of)


class _Accounts:
    def __init__(self, store: Store, grace: float, say: Callable[[str], None]) -> None:
        self._store = store
        self._roots: Roots = roots(store, grace)
        self._points = Points(store)
        self._firm = self._points.reach(self._roots.firm)
        self._all = self._firm | self._points.reach(self._roots.recent)
        say(f"{len(self._all):,} commits")
        self._drops: dict[ObjectId, tuple[str, ...]] = {}
        with store.snapshot() as snapshot:
            self._in_packs = sum(max(0, each.size - TRAILER_BYTES) for each in snapshot.packs().values())
            for id in self._all:
                taken = snapshot.drops(id)
                if taken is not None:
                    self._drops[id] = taken
        self._rows = Rows(store)
        say(f"{len(self._rows):,} records")
        self._content = Content(store, self._rows, say)
        self._content.read(self._some(self._all), self._drops)
        self._say = say

    def _some(self, ids: Collection[ObjectId]) -> Iterator[Point]:
        return (self._points.of[id] for id in ids)

    def usage(self, by: Collection[str], commits: Sequence[ObjectId], tensors_of: ObjectId | None) -> Usage:
        found = Usage(stored=self._in_packs)
        live = self._by_branch(found)
        if "branch" not in by:
            found.branches = []
        if "component" in by:
            found.components = self._by_component(found, live)
        if "commit" in by or "tensor" in by:
            owners = self._owners()
            if "commit" in by:
                found.commits = [self._of_commit(self._points.of[id], owners) for id in commits]
            if "tensor" in by and tensors_of is not None:
                found.tensors = self._of_tensors(self._points.of[tensors_of], owners)
        return found

    def _logical(self, point: Point) -> int:
        return sum(self._left(point).values())

    def _left(self, point: Point) -> Mapping[str, int]:
        """Logical bytes by component, of what was not dropped."""
        taken = self._drops.get(point.id)
        if taken is None:
            return point.sizes
        return {name: size for name, size in point.sizes.items() if taken and name not in taken}

    # -- branches ----------------------------------------------------------------------------------

    def _by_branch(self, found: Usage) -> Places:
        """Fill in what branches hold and what nobody does; the places of what refs and pins need."""
        sets, names = Sets(), sorted(self._roots.branches)
        holders: dict[ObjectId, set[int]] = {}
        for member, name in enumerate(names, _FIRST):
            holders.setdefault(self._roots.branches[name], set()).add(member)
        for id in {*self._roots.others.values(), *self._roots.pins}:
            holders.setdefault(id, set()).add(_OTHERS)
        for id in self._roots.recent:
            holders.setdefault(id, set()).add(_WINDOW)
        order = self._points.oldest_first(self._all)
        of: dict[ObjectId, int] = dict.fromkeys(order, 0)
        for id in reversed(order):
            if id in holders:
                of[id] = sets.join(of[id], sets.label(holders[id]))
            for before in self._points.of[id].before:
                of[before] = sets.join(of[before], of[id])
        labels = Labels(self._rows, sets.join)
        logical = dict.fromkeys(range(_FIRST, _FIRST + len(names)), 0)
        by_label: dict[int, int] = {}
        # Ancestors have the larger sets: what they hold is then known to be held by all that follow.
        places = self._rows.places(order)
        for id, place in zip(order, places.tolist(), strict=True):
            if place >= 0:
                labels.add(np.array([place], np.int32), of[id])
            if id not in self._drops:
                self._content.label(labels, self._points.of[id], of[id])
            by_label[of[id]] = by_label.get(of[id], 0) + self._logical(self._points.of[id])
        for id, taken in self._drops.items():  # now that what has a label has it with all that is below
            labels.add(self._content.of(self._points.of[id], taken), of[id])
        labels.spread_to_bases()
        members = {label: sets.members(label) - {_WINDOW} for label in np.unique(labels.of).tolist()}
        for label, size in by_label.items():
            for member in sets.members(label) - {_WINDOW, _OTHERS}:
                logical[member] += size
        shares = {m: Share(name, logical[m]) for m, name in enumerate(names, _FIRST)}
        live = 0
        for label, size in labels.bytes().items():
            holding = members[label]
            live += size if holding else 0
            found.held += size if label and not holding else 0
            found.others += size if holding == {_OTHERS} else 0
            for member in holding - {_OTHERS}:
                shares[member].stored += size
                shares[member].exclusive += size if len(holding) == 1 else 0
        found.pending = max(0, self._in_packs - live)
        found.branches = sorted(shares.values(), key=lambda share: (-share.stored, share.name))
        needed = np.array([label for label, holding in members.items() if holding], np.int32)
        return np.flatnonzero(np.isin(labels.of, needed)).astype(np.int32)

    # -- components --------------------------------------------------------------------------------

    def _by_component(self, found: Usage, live: Places) -> list[Share]:
        """Components over all commits that refs and pins need, the largest first."""
        sets = Sets()
        numbers: dict[tuple[str, str], int] = {}
        logical: dict[tuple[str, str], int] = {}
        labels = Labels(self._rows, sets.join)
        trees_of: dict[tuple[ObjectId, tuple[str, ...] | None], list[Point]] = {}
        for point in self._some(self._firm):
            trees_of.setdefault((point.tree, self._drops.get(point.id)), []).append(point)
            for name, size in self._left(point).items():
                logical[name, ""] = logical.get((name, ""), 0) + size
        for count, ((_, taken), points) in enumerate(trees_of.items(), 1):
            if count % 100 == 0:
                self._say(f"{count:,} of {len(trees_of):,} trees by component")
            if taken == ():
                continue
            ids: dict[tuple[str, str], list[Places]] = {}
            for key, _, nbytes, places in self._contents(points[0]):
                ids.setdefault(key, []).append(places)
                if key[1]:
                    logical[key] = logical.get(key, 0) + nbytes * len(points)
            for key, several in ids.items():
                label = sets.label([numbers.setdefault(key, len(numbers))])
                labels.add(np.unique(np.concatenate(several)), label)
        labels.spread_to_bases()
        whole: dict[str, Share] = {name: Share(name, logical[name, ""]) for name, _ in logical if not _}
        parts: dict[tuple[str, str], Share] = {k: Share(k[1], logical[k]) for k in logical if k[1]}
        names = {number: key for key, number in numbers.items()}
        claimed = 0
        for label, size in labels.bytes().items():
            holding = {names[number] for number in sets.members(label)}
            claimed += size if label else 0
            tops = {name for name, _ in holding}
            for name in tops:
                share = whole.setdefault(name, Share(name))
                share.stored += size
                share.exclusive += size if len(tops) == 1 else 0
            for key in holding:
                if key[1]:
                    parts[key].stored += size
                    parts[key].exclusive += size if len(holding) == 1 else 0
        found.structure = int(self._rows.cost[live].sum()) - claimed
        for (name, _), part in parts.items():
            whole[name].parts.append(part)
        for share in whole.values():
            share.parts.sort(key=lambda part: -part.stored)
        return sorted(whole.values(), key=lambda share: (-share.stored, share.name))

    def _contents(self, point: Point) -> Iterator[tuple[tuple[str, str], str, int, Places]]:
        """((component, part), path, logical bytes, places) of all content outside of trees that is left."""
        taken = self._drops.get(point.id)
        with self._store.reader() as reader:
            reached = trees.reached(reader, point.tree, taken or ())
        optimizers = [] if reached.state is None else parameters.optimizers(reached.state)
        for path, content in reached.contents:
            inner = _shown(path)
            top = (paths.split(inner) or ("",))[0]
            component = top if top in point.sizes else paths.key(top) if path != inner else ""
            part = next((_part(path, each) for each in optimizers if path.startswith(f"{each}/state/")), "")
            yield (str(component), part), path, content.nbytes, self._content.outside(content)

    # -- commits and tensors -----------------------------------------------------------------------

    def _owners(self) -> Labels:
        """Records by the one commit whose content they are, in the order of `_points`; `MANY` otherwise."""
        labels = Labels(self._rows, one_or_many)
        for number, id in enumerate(self._numbered(), 1):
            places = self._content.of(self._points.of[id], self._drops.get(id))
            labels.add(places, number)
        labels.spread_to_bases()
        return labels

    def _numbered(self) -> list[ObjectId]:
        return [id for id in self._points.of if id in self._all]

    def _of_commit(self, point: Point, owners: Labels) -> Share:
        taken = self._drops.get(point.id)
        places = self._content.with_bases(self._content.of(point, taken))
        number = self._numbered().index(point.id) + 1
        return Share(
            str(point.id),
            self._logical(point),
            int(self._rows.cost[places].sum()),
            int(self._rows.cost[places[owners.of[places] == number]].sum()),
            step=point.step,
            dropped=taken,
        )

    def _of_tensors(self, point: Point, owners: Labels) -> list[Share]:
        number = self._numbered().index(point.id) + 1
        taken = self._drops.get(point.id)
        if taken == ():
            return []
        found = list(self._contents(point))
        inside = Labels(self._rows, one_or_many)
        for at, (_, _, _, places) in enumerate(found, 1):
            inside.add(self._content.with_bases(places), at)
        with self._store.reader() as reader:
            state = trees.reached(reader, point.tree, taken or ()).state
        names = {} if state is None else parameters.parameter_names(state)
        shares = []
        for at, (_, path, nbytes, places) in enumerate(found, 1):
            needed = self._content.with_bases(places)
            alone = needed[(owners.of[needed] == number) & (inside.of[needed] == at)]
            shares.append(
                Share(
                    _shown(path),
                    nbytes,
                    int(self._rows.cost[needed].sum()),
                    int(self._rows.cost[alone].sum()),
                    parameter=names.get(path.rpartition("/")[0], ""),
                )
            )
        return sorted(shares, key=lambda share: -share.stored)


def _shown(path: str) -> str:
    """A path as people know it: that of a file without what marks it as one."""
    return path.removeprefix(f"{FILES}/")


def _part(path: str, optimizer: str) -> str:
    """What an optimizer keeps for each parameter, such as exp_avg."""
    below = paths.split(path.removeprefix(f"{optimizer}/state/"))
    return "/".join(below[1:])


# -- what retention frees --------------------------------------------------------------------------


def losses(
    store: Store,
    points: Points,
    top: Roots,
    dropping: Mapping[ObjectId, tuple[str, ...]],
    oldest_first: Sequence[ObjectId],
    say: Callable[[str], None],
) -> tuple[dict[ObjectId, int], int]:
    """(bytes of records that go with each commit, bytes that nothing needs even now).

    A record that several of the commits lose counts for the first of `oldest_first`. Bases do not count as
    needed: what is stored as a difference to something that goes will be stored in another way.
    """
    rows = Rows(store)
    content = Content(store, rows, say)
    alive = points.reach(top.firm | top.recent)
    before: dict[ObjectId, tuple[str, ...]] = {}
    with store.snapshot() as snapshot:
        in_packs = sum(max(0, each.size - TRAILER_BYTES) for each in snapshot.packs().values())
        for id in alive:
            taken = snapshot.drops(id)
            if taken is not None:
                before[id] = taken
    content.read((points.of[id] for id in alive), before)
    needed, stays = (np.zeros(len(rows), bool) for _ in range(2))
    needed[rows.known(list(alive))] = stays[rows.known(list(alive))] = True
    for id in alive:
        needed[content.of(points.of[id], before.get(id))] = True
        after = before.get(id)
        if id in dropping:
            more = dropping[id]
            after = () if not more or after == () else tuple(sorted({*(after or ()), *more}))
        stays[content.of(points.of[id], after)] = True
    found = {}
    counted = stays.copy()
    for id in oldest_first:
        places = content.of(points.of[id], before.get(id))
        lost = places[~counted[places]]
        counted[lost] = True
        found[id] = int(rows.cost[lost].sum())
    return found, in_packs - int(rows.cost[needed].sum())
