"""Power cuts: a disk that remembers what was done to it, and every state a crash may leave behind.

`RecordingDisk` works on a real folder and logs each change that goes through the one door to files.
`crash_states` replays every prefix of that log on a model of a file system that promises no more than
POSIX does:

- What was written to a file since its last sync is lost, kept, or torn at sector or page boundaries.
- A file's name is not its content. A name that was made, moved or taken away since the last `sync_dir` of
  its folder is lost or kept independently of all others, so a synced file can be missing.
- A rename happens whole or not at all. It is durable once the folder of the new name is synced; the old
  name of a file that moved between folders may come back until that folder is synced as well.
- The index is atomic per transaction and durable when it returns. `lock.mdb` is not part of a state: the
  memory it stands for does not outlive a power cut.

Not modelled: file modes, and what callers do through `disk.Folder`, whose files are the user's.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from ckptvcs.disk import Disk, Lock, WriteFile
from ckptvcs.ids import Buffer, digest

_ROOT: Final = 0
_UNSEEN: Final = "lock.mdb"
_MOST_WRITES: Final = 16
"""Of more unsynced writes to one file no single one is lost or kept by itself."""

# -- the log --------------------------------------------------------------------------------------


class Made(NamedTuple):
    """A new file or folder and its name."""

    folder: int
    name: str
    node: int
    is_folder: bool


class Wrote(NamedTuple):
    """Bytes written at an offset, not yet durable."""

    node: int
    offset: int
    data: bytes


class Cut(NamedTuple):
    """A file cut back, not yet durable."""

    node: int
    size: int


class Synced(NamedTuple):
    """A file's content is durable."""

    node: int


class Linked(NamedTuple):
    """Another name for a file."""

    folder: int
    name: str
    node: int


class Unlinked(NamedTuple):
    """A name taken away."""

    folder: int
    name: str


class Renamed(NamedTuple):
    """A name moved, replacing whatever had the new one."""

    folder: int
    name: str
    to_folder: int
    to_name: str
    node: int
    is_folder: bool


class FolderSynced(NamedTuple):
    """The names in a folder are durable."""

    folder: int


class Protected(NamedTuple):
    """A file was made read-only."""

    node: int


class IndexCommitted(NamedTuple):
    """A durable index transaction, with the whole data file after it."""

    node: int
    data: bytes


class Acknowledged(NamedTuple):
    """Not an operation: from here on somebody relies on this."""

    what: object


Operation: TypeAlias = (
    Made
    | Wrote
    | Cut
    | Synced
    | Linked
    | Unlinked
    | Renamed
    | FolderSynced
    | Protected
    | IndexCommitted
    | Acknowledged
)


@dataclass(slots=True)
class Log:
    """What was there before, all of it durable, and what happened then.

    Attributes:
        folders, files: the start, by node; node 0 is the recorded folder itself.
        operations: in the order they returned.
        paths: a path each node once had, for messages.
    """

    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {_ROOT: {}})
    files: dict[int, bytes] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    paths: dict[int, str] = field(default_factory=lambda: {_ROOT: "."})

    def say(self, operation: Operation) -> str:
        """One operation in words."""
        match operation:
            case Made(folder, name, _, is_folder):
                return f"make {'folder' if is_folder else 'file'} {self.paths[folder]}/{name}"
            case Wrote(node, offset, data):
                return f"write {len(data)} bytes at {offset} of {self.paths[node]}"
            case Cut(node, size):
                return f"cut {self.paths[node]} to {size}"
            case Synced(node):
                return f"sync {self.paths[node]}"
            case Linked(folder, name, _):
                return f"link {self.paths[folder]}/{name}"
            case Unlinked(folder, name):
                return f"unlink {self.paths[folder]}/{name}"
            case Renamed(folder, name, to_folder, to_name):
                return f"rename {self.paths[folder]}/{name} to {self.paths[to_folder]}/{to_name}"
            case FolderSynced(folder):
                return f"sync folder {self.paths[folder]}"
            case Protected(node):
                return f"protect {self.paths[node]}"
            case IndexCommitted(node):
                return f"index transaction in {self.paths[node]}"
            case Acknowledged(what):
                return f"acknowledge {what}"


# -- the recorder ---------------------------------------------------------------------------------


class RecordingDisk(Disk):
    """A real folder whose changes are logged. What lies there at the start counts as durable.

    Paths outside the folder are served and not logged. One process only; threads are fine.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log = Log()
        self._live: dict[int, dict[str, int]] = {_ROOT: {}}
        self._next = 1
        self._mutex = threading.RLock()
        self._adopt(root, _ROOT)
        self.log.folders = {node: dict(names) for node, names in self._live.items()}

    def _adopt(self, folder: Path, node: int) -> None:
        for entry in sorted(os.scandir(folder), key=lambda each: each.name):
            if entry.name == _UNSEEN:
                continue
            is_folder = entry.is_dir(follow_symlinks=False)
            child = self._new(node, entry.name, is_folder)
            if is_folder:
                self._adopt(Path(entry.path), child)
            else:
                self.log.files[child] = Path(entry.path).read_bytes()

    def acknowledge(self, what: object) -> None:
        """From here on every crash state must honour `what`."""
        self._note(Acknowledged(what))

    # -- the live tree, to turn paths into nodes

    def _note(self, operation: Operation) -> None:
        with self._mutex:
            self.log.operations.append(operation)

    def _new(self, folder: int, name: str, is_folder: bool) -> int:
        with self._mutex:
            node, self._next = self._next, self._next + 1
            self._live[folder][name] = node
            self.log.paths[node] = f"{self.log.paths[folder]}/{name}".removeprefix("./")
            if is_folder:
                self._live[node] = {}
            return node

    def _find(self, path: Path) -> int | None:
        if not path.is_relative_to(self.root):
            return None
        node = _ROOT
        for part in path.relative_to(self.root).parts:
            child = self._live.get(node, {}).get(part)
            if child is None:
                return None
            node = child
        return node

    def _made(self, path: Path, *, is_folder: bool) -> int | None:
        with self._mutex:
            folder = self._find(path.parent)
            if folder is None or path.name == _UNSEEN:
                return None
            node = self._new(folder, path.name, is_folder)
            self._note(Made(folder, path.name, node, is_folder))
            return node

    def _unlinked(self, path: Path) -> None:
        with self._mutex:
            folder = self._find(path.parent)
            if folder is not None and self._live[folder].pop(path.name, None) is not None:
                self._note(Unlinked(folder, path.name))

    # -- the door

    def create(self, path: Path, mode: int = 0o644) -> WriteFile:
        file = _RecordedFile(self, path, create=True, mode=mode)
        self.adopt(path)
        return file

    def append(self, path: Path) -> WriteFile:
        return _RecordedFile(self, path, create=False)

    def make_dir(self, path: Path) -> None:
        there = os.path.lexists(path)
        super().make_dir(path)
        if not there:
            self._made(path, is_folder=True)

    def publish(self, temporary: Path, final: Path) -> None:
        super().publish(temporary, final)
        with self._mutex:
            node, folder = self._find(temporary), self._find(final.parent)
            if node is not None and folder is not None:
                self._live[folder][final.name] = node
                self._note(Linked(folder, final.name, node))
                self._unlinked(temporary)

    def link(self, existing: Path, new: Path) -> bool:
        if not super().link(existing, new):
            return False
        with self._mutex:
            node, folder = self._find(existing), self._find(new.parent)
            if node is not None and folder is not None:
                self._live[folder][new.name] = node
                self._note(Linked(folder, new.name, node))
        return True

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        with self._mutex:
            node, source, target = self._find(old), self._find(old.parent), self._find(new.parent)
            if node is None or source is None or target is None:
                return
            del self._live[source][old.name]
            self._live[target][new.name] = node
            self._note(Renamed(source, old.name, target, new.name, node, node in self._live))

    def protect(self, path: Path) -> None:
        super().protect(path)
        node = self._find(path)
        if node is not None:
            self._note(Protected(node))

    def remove(self, path: Path) -> None:
        super().remove(path)
        self._unlinked(path)

    def remove_tree(self, path: Path) -> None:
        for folder, folders, files in os.walk(path, topdown=False):
            for name in sorted(files):
                self.remove(Path(folder) / name)
            for name in sorted(folders):
                os.rmdir(Path(folder) / name)
                self._unlinked(Path(folder) / name)
        super().remove_tree(path)
        self._unlinked(path)

    def sync_dir(self, path: Path) -> None:
        super().sync_dir(path)
        node = self._find(path)
        if node is not None:
            self._note(FolderSynced(node))

    def index_committed(self, path: Path) -> None:
        data = path.read_bytes()
        with self._mutex:
            node = self._find(path)
            if node is None:
                node = self._made(path, is_folder=False)
            if node is not None:
                self._note(IndexCommitted(node, data))

    def lock(self, path: Path, *, shared: bool = False, wait: float = 0.0) -> Lock:
        there = os.path.lexists(path)
        lock = super().lock(path, shared=shared, wait=wait)
        if not there:
            self._made(path, is_folder=False)
        return lock


class _RecordedFile(WriteFile):
    def __init__(self, disk: RecordingDisk, path: Path, *, create: bool, mode: int = 0o644) -> None:
        super().__init__(path, create=create, mode=mode)
        self._disk = disk
        self._node = disk._made(path, is_folder=False) if create else disk._find(path)

    def _log(self, operation: Wrote | Cut | Synced) -> None:
        if self._node is not None:
            self._disk._note(operation)

    def write(self, buffers: Sequence[Buffer]) -> None:
        offset = self.size
        super().write(buffers)
        self._log(Wrote(self._node or 0, offset, b"".join(bytes(buffer) for buffer in buffers)))

    def truncate(self, size: int) -> None:
        super().truncate(size)
        self._log(Cut(self._node or 0, size))

    def sync(self) -> None:
        super().sync()
        self._log(Synced(self._node or 0))


# -- the model of a file system -------------------------------------------------------------------

_Edit: TypeAlias = tuple[int, str, int | None]
"""In a folder, a name gets a node, or none."""


class _Pending(NamedTuple):
    """Names that changed and may be lost, all of them together. `anchor` is the folder whose sync
    makes them durable; with `whole` it takes the other folder's part along."""

    edits: tuple[_Edit, ...]
    anchor: int
    whole: bool
    words: str

    def without(self, edit: _Edit) -> _Pending:
        """The rest, when another change of the same name has become durable."""
        edits = tuple(each for each in self.edits if each[:2] != edit[:2])
        if edits == self.edits or not edits:
            return self._replace(edits=edits)
        return self._replace(edits=edits, anchor=edits[-1][0])


class _Model:
    """What is durable, and what is not yet."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.names: dict[int, dict[str, int]] = {n: dict(names) for n, names in log.folders.items()}
        self.content: dict[int, bytes] = dict(log.files)
        self.unsynced: dict[int, list[Wrote | Cut]] = {}
        self.pending: list[_Pending] = []
        self.acknowledged: list[object] = []

    def apply(self, operation: Operation) -> None:
        words = self.log.say(operation)
        match operation:
            case Made(folder, name, node, is_folder):
                if is_folder:
                    self.names[node] = {}
                else:
                    self.content[node] = b""
                self.pending.append(_Pending(((folder, name, node),), folder, True, words))
            case Wrote(node) | Cut(node):
                self.unsynced.setdefault(node, []).append(operation)
            case Synced(node):
                self.content[node] = _applied(self.content[node], self.unsynced.pop(node, ()))
            case Linked(folder, name, node):
                self.pending.append(_Pending(((folder, name, node),), folder, True, words))
            case Unlinked(folder, name):
                self.pending.append(_Pending(((folder, name, None),), folder, True, words))
            case Renamed(folder, name, to_folder, to_name, node, is_folder):
                edits = ((folder, name, None), (to_folder, to_name, node))
                self.pending.append(_Pending(edits, to_folder, is_folder, words))
            case FolderSynced(folder):
                self._settle(folder)
            case IndexCommitted(node, data):
                self.content[node] = data
                self.unsynced.pop(node, None)
            case Acknowledged(what):
                self.acknowledged.append(what)
            case Protected():
                pass

    def _settle(self, folder: int) -> None:
        left: list[_Pending] = []
        for change in self.pending:
            if change.anchor != folder:
                left.append(change)
                continue
            rest: list[_Edit] = []
            for edit in change.edits:
                if edit[0] != folder and not change.whole:
                    rest.append(edit)
                    continue
                _edit(self.names, edit)
                # Whatever befell this name earlier no longer matters.
                left = [cut for kept in left if (cut := kept.without(edit)).edits]
            if rest:
                left.append(_Pending(tuple(rest), rest[0][0], True, f"old name after {change.words}"))
        self.pending = left

    def variants(self, node: int) -> list[tuple[str, bytes]]:
        """What an unsynced file may hold after a power cut: a bounded, telling selection."""
        durable, waiting = self.content[node], self.unsynced[node]
        whole = _applied(durable, waiting)
        found: dict[bytes, str] = {durable: "lost", whole: "whole"}
        # Writes reach the medium in any order: every part of a few of them, all but one of many.
        writes = range(len(waiting))
        counts = range(1, len(waiting)) if len(waiting) <= 3 else [1, len(waiting) - 1]
        for count in counts if len(waiting) <= _MOST_WRITES else ():
            for some in itertools.combinations(writes, count):
                part = _applied(durable, [waiting[i] for i in some])
                found.setdefault(part, f"only writes {some}")
        start = min((change.offset for change in waiting if isinstance(change, Wrote)), default=len(whole))
        if start < len(whole):
            found.setdefault(whole[:start] + bytes(len(whole) - start), "zeros")
        for block in (512, 4096):
            first = (start // block + 1) * block
            last = (len(whole) - 1) // block * block
            for cut in sorted({first, last}):
                if start < cut < len(whole):
                    zeros = bytes(len(whole) - cut)
                    found.setdefault(whole[:cut], f"torn at {cut}")
                    found.setdefault(whole[:cut] + zeros, f"zeros from {cut} on")
                    found.setdefault(whole[:start] + bytes(cut - start) + whole[cut:], f"hole before {cut}")
        return [(words, data) for data, words in found.items()]


def _edit(names: dict[int, dict[str, int]], edit: _Edit) -> None:
    folder, name, node = edit
    if node is None:
        names[folder].pop(name, None)
    else:
        names[folder][name] = node


def _applied(data: bytes, changes: Iterable[Wrote | Cut]) -> bytes:
    content = bytearray(data)
    for change in changes:
        if isinstance(change, Cut):
            del content[change.size :]
            content.extend(bytes(change.size - len(content)))
        else:
            content.extend(bytes(max(0, change.offset - len(content))))
            content[change.offset : change.offset + len(change.data)] = change.data
    return bytes(content)


# -- the states -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CrashState:
    """One thing a power cut may leave.

    Attributes:
        prefix: operations that had returned.
        last: the newest of them, in words.
        choices: the fate of each thing that was not durable, in words.
        acknowledged: what somebody relies on by then, oldest first.
        tree: every path and its bytes; None for a folder.
    """

    prefix: int
    last: str
    choices: tuple[str, ...]
    acknowledged: tuple[object, ...]
    tree: dict[str, bytes | None]

    def describe(self) -> str:
        """Enough to see the state, on a few lines."""
        fates = "".join(f"\n    {choice}" for choice in self.choices)
        return f"power cut after operation {self.prefix} ({self.last}):{fates or ' nothing was pending'}"

    def materialise(self, folder: Path) -> None:
        """Make this state beneath an empty folder."""
        for name, data in self.tree.items():
            path = folder / name
            if data is None:
                path.mkdir()
            else:
                path.write_bytes(data)

    def key(self) -> bytes:
        """Equal for states that no program could tell apart and that promise the same."""
        parts = [f"{len(self.acknowledged)}".encode()]
        for name, data in sorted(self.tree.items()):
            parts += (name.encode("utf-8", "surrogatepass"), b"/" if data is None else digest(data))
        return digest(b"\0".join(parts), 32)


def crash_states(log: Log, *, seed: int = 0, exhaustive: int = 8, sample: int = 16) -> Iterator[CrashState]:
    """Every state a power cut may leave, at every prefix of the log.

    With at most `exhaustive` pending things (and no more combinations than twice 2**exhaustive, since an
    unsynced file has more than two fates) all combinations are given; otherwise all lost, all kept, each
    one alone lost or kept, and a sample of `sample` more that depends on `seed`.
    """
    model = _Model(log)
    chance = random.Random(seed)
    last = "nothing"
    for prefix in range(len(log.operations) + 1):
        if prefix:
            operation = log.operations[prefix - 1]
            model.apply(operation)
            last = log.say(operation)
        files = [(node, model.variants(node)) for node in sorted(model.unsynced)]
        sizes = [2] * len(model.pending) + [len(variants) for _, variants in files]
        for choice in _choices(sizes, chance, exhaustive, sample):
            yield _state(model, prefix, last, files, choice)


def _choices(
    sizes: list[int], chance: random.Random, exhaustive: int, sample: int
) -> Iterator[tuple[int, ...]]:
    """For each item the number of its fate: 0 lost, 1 kept whole, others in between."""
    total = 1
    for size in sizes:
        total *= size
    if len(sizes) <= exhaustive and total <= 2 << exhaustive:
        yield from itertools.product(*map(range, sizes))
        return
    kept = tuple(min(1, size - 1) for size in sizes)
    lost = (0,) * len(sizes)
    yield lost
    yield kept
    for i, size in enumerate(sizes):
        for fate in range(size):
            yield (*lost[:i], fate, *lost[i + 1 :])
            yield (*kept[:i], fate, *kept[i + 1 :])
    for _ in range(sample):
        yield tuple(chance.randrange(size) for size in sizes)


def _state(
    model: _Model,
    prefix: int,
    last: str,
    files: list[tuple[int, list[tuple[str, bytes]]]],
    choice: tuple[int, ...],
) -> CrashState:
    names = {folder: dict(entries) for folder, entries in model.names.items()}
    words = []
    for change, fate in zip(model.pending, choice, strict=False):
        words.append(f"{'kept' if fate else 'lost'}: {change.words}")
        if fate:
            for edit in change.edits:
                _edit(names, edit)
    content = dict(model.content)
    for (node, variants), fate in zip(files, choice[len(model.pending) :], strict=True):
        words.append(f"{variants[fate][0]}: content of {model.log.paths[node]}")
        content[node] = variants[fate][1]
    tree: dict[str, bytes | None] = {}
    waiting = [(_ROOT, "")]
    while waiting:
        folder, above = waiting.pop()
        for name, node in sorted(names[folder].items()):
            path = f"{above}{name}"
            if node in content:
                tree[path] = content[node]
            else:
                tree[path] = None
                waiting.append((node, f"{path}/"))
    return CrashState(prefix, last, tuple(words), tuple(model.acknowledged), tree)


@dataclass(frozen=True, slots=True)
class Explored:
    """What an exploration covered."""

    operations: int
    enumerated: int
    checked: int
    seed: int

    def __str__(self) -> str:
        return (
            f"{self.operations} operations, {self.enumerated} crash states enumerated, "
            f"{self.checked} distinct ones checked, seed {self.seed}"
        )


def explore(
    log: Log,
    scratch: Path,
    check: Callable[[Path, CrashState], None],
    *,
    seed: int = 0,
    exhaustive: int = 8,
    sample: int = 16,
    known: Collection[bytes] = (),
) -> Explored:
    """Materialise every distinct crash state in a fresh folder below `scratch` and call `check` on it.

    States whose `key` is among the `known` ones are passed over: who changes a protocol looks only at the
    states that come with the change.

    The first exception of `check` is raised again with the state and the seed in its notes, and the
    folder is left for inspection.
    """
    seen: set[bytes] = set()
    enumerated = 0
    for state in crash_states(log, seed=seed, exhaustive=exhaustive, sample=sample):
        enumerated += 1
        key = state.key()
        if key in seen or key in known:
            continue
        seen.add(key)
        folder = scratch / f"state-{len(seen)}"
        folder.mkdir()
        state.materialise(folder)
        try:
            check(folder, state)
        except BaseException as error:
            error.add_note(f"{state.describe()}\nseed {seed}, state {len(seen)}, in {folder}")
            raise
        shutil.rmtree(folder)
    return Explored(len(log.operations), enumerated, len(seen), seed)
