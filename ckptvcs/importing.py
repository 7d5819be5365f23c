"""Folders of checkpoints that other tools left, as a branch: what is there, in which order, and what is new.

A checkpoint is a folder (`checkpoint-500` of Hugging Face, `checkpoint_0` of Accelerate) or a file
(`epoch=2-step=500.ckpt` of Lightning, `step_100.pt`). Its step is what it says itself, in
`trainer_state.json` or inside the file, and else the number in its name. Times of files order nothing.
Nothing from a file runs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from ckptvcs.disk import Disk, StrPath
from ckptvcs.errors import ExistsError, InvalidError, NotFoundError
from ckptvcs.history.commit import Commit, is_metric_name
from ckptvcs.ids import Hasher, ObjectId
from ckptvcs.store.format import FOLDER

if TYPE_CHECKING:
    from ckptvcs.state.checkpoint import Checkpoint

_SUFFIXES: Final = frozenset((".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".npz", ".distcp"))
_FOLDER: Final = re.compile(r"(?:checkpoint|ckpt|step|iter|epoch|ep|global_?step)\D{0,2}\d+\Z", re.IGNORECASE)
_STEP_IN_NAME: Final = (
    re.compile(r"(?<![a-z])(?:global_?step|step|iter(?:ation)?|ba)[=_-]?(\d{1,18})", re.IGNORECASE),
    re.compile(r"(?<![a-z])(?:checkpoint|ckpt)[=_-]?(\d{1,18})", re.IGNORECASE),
    re.compile(r"(\d{1,18})(?!.*\d)"),
)
_EPOCH_IN_NAME: Final = re.compile(r"(?<![a-z])(?:epoch|ep)[=_-]?(\d{1,9})", re.IGNORECASE)
_PART: Final = re.compile(
    r"-\d{5,6}-of-\d{5,6}\.|"
    r"\A(?:rng_state|random_states|optimizer|scheduler|scaler|custom_checkpoint|training_args)",
    re.IGNORECASE,
)
"""Files that are a part of a checkpoint in a folder."""
_VERSION: Final = re.compile(r"-v\d+\Z")
"""What Lightning puts behind a name that is taken."""
_STEPS_INSIDE: Final = ("global_step", "step", "iteration", "iter")
_METRIC_INSIDE: Final = re.compile(
    r"metrics/((?:[^/\\]|\\.)+)|((?:[^/]*_)?(?:loss|acc|accuracy|auc|f1|perplexity|reward))"
)
"""Where the checkpoints of hand-written loops keep metrics: in a dict of that name, or beside the model by a
name that says so."""
_LONGEST_STATE: Final = 64 << 20
"""Bytes of a `trainer_state.json` that are read."""
_NO_METRICS: Final = frozenset(("step", "epoch", "total_flos"))
_PIECE: Final = 1 << 20
_MARK: Final = "import "


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint in a folder.

    Attributes:
        name: of its file or folder: its path in the commit.
        path: where it is.
        step, epoch: the training position; an epoch may be a fraction.
        metrics: numbers that were recorded at that step.
    """

    name: str
    path: Path
    step: int
    epoch: int | float | None
    metrics: Mapping[str, int | float]


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of a checkpoint.

    Attributes:
        name: of its file or folder.
        step, epoch, metrics: as recorded.
        given: its bytes.
        stored: bytes added to the repository; None if it was there before.
        commit: its commit; None in a rehearsal.
    """

    name: str
    step: int
    epoch: int | float | None
    metrics: Mapping[str, int | float]
    given: int
    stored: int | None
    commit: ObjectId | None


@dataclass(slots=True)
class ImportReport:
    """What an import did, or a rehearsal would do.

    Attributes:
        branch: where the commits are.
        checkpoints: in step order.
        left_out: why, by name, for all else in the folder.
        rehearsal: nothing was kept.
    """

    branch: str
    checkpoints: list[Imported] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    rehearsal: bool = False

    @property
    def given(self) -> int:
        """Bytes of the checkpoints that were imported now."""
        return sum(each.given for each in self.checkpoints if each.stored is not None)

    @property
    def stored(self) -> int:
        """Bytes that these took."""
        return sum(each.stored or 0 for each in self.checkpoints)


class Target(Protocol):
    """The handle that commits are made with (`ckptvcs.Repo`)."""

    def branches(self) -> dict[str, ObjectId]:
        """All branches."""

    def log(self, rev: str) -> Iterator[Commit]:
        """Commits, children first."""

    def has_state(self, rev: Commit) -> bool:
        """Whether a commit holds a state."""

    def file_entries(self, rev: Commit) -> Iterable[Any]:
        """The files of a commit."""

    def commit_files(
        self,
        paths: Mapping[str, StrPath],
        message: str,
        *,
        step: int | None,
        epoch: int | float | None,
        metrics: Mapping[str, Any] | None,
        continues: bool,
    ) -> Commit:
        """Make a commit."""


def branch_for(folder: Path) -> str:
    """What the branch of a folder is called if nobody says: like the folder, as far as a branch can be."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name).strip("-.")
    return re.sub(r"\.{2,}", ".", name).removesuffix(".lock") or "import"


def run(
    target: Target, disk: Disk, folder: Path, branch: str, say: Callable[[str], None] | None = None
) -> ImportReport:
    """Commit the checkpoints of a folder, by step, on the branch that `target` is on.

    Those that the branch holds already are left alone, so an import that was interrupted goes on. ExistsError
    if the branch holds anything else; NotFoundError if there is no checkpoint in the folder.
    """
    report = ImportReport(branch)
    found = checkpoints(disk, folder, report.left_out)
    known = _held(target, branch)
    source = f"from {folder.resolve()}"
    familiar = known.keys() & {each.name for each in found}
    if known and not familiar and not any(source in commit.message for commit in known.values()):
        raise ExistsError(
            f"the branch {branch} holds the checkpoints of another folder",
            hint="import into another branch: --branch NAME",
        )
    last = max((each.step for each in known.values() if each.step is not None), default=-1)
    for each in found:
        if say is not None:
            say(each.name)
        files = dict(_files(disk, each))
        given = sum(disk.size(path) for path in files.values())
        before = known.get(each.name)
        if before is not None:
            if not _equal(disk, files, target.file_entries(before)):
                raise ExistsError(
                    f"the branch {branch} holds another {each.name} than {folder}",
                    hint="import into another branch: --branch NAME",
                )
            report.checkpoints.append(
                Imported(each.name, each.step, each.epoch, each.metrics, given, None, before.id)
            )
            continue
        if each.step < last:
            report.left_out[each.name] = f"step {each.step} is before the branch's last, {last}"
            continue
        made = target.commit_files(
            {each.name: each.path},
            f"{_MARK}{each.name}\n\n{source}",
            step=each.step,
            epoch=each.epoch,
            metrics=each.metrics or None,
            continues=True,
        )
        assert made.report is not None
        report.checkpoints.append(
            Imported(each.name, each.step, each.epoch, each.metrics, given, made.report.stored, made.id)
        )
    return report


def _held(target: Target, branch: str) -> dict[str, Commit]:
    """The imports on a branch by name. ExistsError if it holds anything else."""
    if branch not in target.branches():
        return {}
    found: dict[str, Commit] = {}
    for commit in target.log(f"refs/heads/{branch}"):
        name = commit.title.removeprefix(_MARK)
        if name == commit.title or target.has_state(commit) or name in found:
            raise ExistsError(
                f"the branch {branch} holds commits that no import made, such as {commit.id.short}",
                hint="import into a branch of its own: --branch NAME",
            )
        found[name] = commit
    return found


def _files(disk: Disk, found: Found) -> Iterator[tuple[str, Path]]:
    """(path in the commit, path) of each file of a checkpoint, links and repositories left out."""
    if not disk.is_dir(found.path):
        yield found.name, found.path
        return
    for name in disk.names(found.path):
        path = found.path / name
        if not path.is_symlink() and name.casefold() != FOLDER:
            inner = Found(f"{found.name}/{name}", path, 0, None, {})
            if disk.is_dir(path) or disk.is_file(path):
                yield from _files(disk, inner)


def _equal(disk: Disk, files: Mapping[str, Path], entries: Iterable[Any]) -> bool:
    """Whether a commit holds exactly these files, by their hashes."""
    held = {entry.path: entry for entry in entries if entry.kind == "file"}
    return held.keys() == files.keys() and all(
        disk.size(path) == held[name].size and digest(disk, path) == held[name].digest
        for name, path in files.items()
    )


def digest(disk: Disk, path: Path) -> bytes:
    """The BLAKE3 of a file."""
    whole, at = Hasher(), 0
    with disk.open(path) as file:
        while data := file.read(at, _PIECE):
            whole.update(data)
            at += len(data)
    return bytes(whole.id())


# -- finding -----------------------------------------------------------------------------------------


def checkpoints(disk: Disk, folder: Path, left_out: dict[str, str]) -> list[Found]:
    """The checkpoints of a folder, or of the folder `checkpoints` in it, by step. What is there besides goes
    to `left_out`, with the reason."""
    if not disk.is_dir(folder):
        if disk.exists(folder):
            raise InvalidError(
                f"{folder} is a file", hint="name the folder it is in, or `ckpt commit` this file alone"
            )
        raise NotFoundError(f"there is no folder {folder}")
    found = _in(disk, folder, left_out)
    inner = folder / "checkpoints"
    if not found and disk.is_dir(inner):
        left_out.clear()
        found = _in(disk, inner, left_out)
    if not found:
        raise NotFoundError(
            f"there is no checkpoint in {folder}",
            hint="name the folder that holds checkpoint-500/, epoch=2-step=500.ckpt, step_100.pt or the like",
        )
    found.sort(key=lambda each: (each.step, _digits_apart(each.name)))
    return _without_duplicates(disk, found, left_out)


def _in(disk: Disk, folder: Path, left_out: dict[str, str]) -> list[Found]:
    found = []
    for name in disk.names(folder):
        path = folder / name
        if path.is_symlink():
            left_out[name] = f"a link to {path.readlink()}"
        elif "\n" in name:  # commits are found again by the first line of their message
            left_out[name] = "its name has a line break"
        elif name.casefold() == FOLDER:
            left_out[name] = "a repository"
        elif disk.is_dir(path) and not (_FOLDER.search(name) or _holds_checkpoint(disk, path)):
            left_out[name] = "a folder without checkpoint files"
        elif not disk.is_dir(path) and path.suffix not in _SUFFIXES:
            left_out[name] = "no checkpoint file"
        elif not disk.is_dir(path) and _PART.search(name):
            left_out[name] = "a part of a checkpoint that has no folder of its own"
        elif isinstance(each := _described(disk, name, path), str):
            left_out[name] = each
        else:
            found.append(each)
    return found


def _holds_checkpoint(disk: Disk, folder: Path) -> bool:
    return re.search(r"\d", folder.name) is not None and any(
        Path(name).suffix in _SUFFIXES for name in disk.names(folder)
    )


def _described(disk: Disk, name: str, path: Path) -> Found | str:
    """A checkpoint with its step, or why it cannot be put in order."""
    says = _of_trainer(disk, path / "trainer_state.json") if disk.is_dir(path) else _inside(disk, path)
    stem = _VERSION.sub("", name if disk.is_dir(path) else path.stem)
    epoch = says.epoch
    if epoch is None and (match := _EPOCH_IN_NAME.search(stem)):
        epoch = int(match[1])
    step = says.step
    if step is None:
        step = next((int(match[1]) for each in _STEP_IN_NAME if (match := each.search(stem))), None)
    if step is None:
        return "its step is neither in it nor in its name"
    return Found(name, path, step, epoch, says.metrics)


@dataclass(slots=True)
class _Says:
    step: int | None = None
    epoch: int | float | None = None
    metrics: dict[str, int | float] = field(default_factory=dict)


def _of_trainer(disk: Disk, path: Path) -> _Says:
    """What a Hugging Face trainer recorded: `global_step`, `epoch`, and what it logged at that step."""
    if not disk.is_file(path) or disk.size(path) > _LONGEST_STATE:
        return _Says()
    try:
        state = json.loads(disk.read(path))
    except (ValueError, RecursionError):
        return _Says()
    if not isinstance(state, dict):
        return _Says()
    says = _Says(_position(state.get("global_step")), _finite(state.get("epoch")))
    history = state.get("log_history")
    for entry in history if isinstance(history, list) else []:
        if isinstance(entry, dict) and says.step is not None and entry.get("step") == says.step:
            says.metrics |= {
                name: number
                for name, value in entry.items()
                if name not in _NO_METRICS and is_metric_name(name) and (number := _number(value)) is not None
            }
    return says


def _inside(disk: Disk, path: Path) -> _Says:
    """What a checkpoint file says of itself: steps and metrics among its values, and Lightning's monitored
    score."""
    from ckptvcs.state.checkpoint import open_checkpoint

    try:
        found = open_checkpoint(disk, path)
    except InvalidError:  # of a kind unknown here: its name may say more
        return _Says()
    steps = (_position(_plain(found.leaves.get(name))) for name in _STEPS_INSIDE)
    says = _Says(next((step for step in steps if step is not None), None), _finite(found.leaves.get("epoch")))
    for name, monitor in found.leaves.items():
        if name.startswith("callbacks/") and name.endswith("/monitor") and isinstance(monitor, str):
            place = name.removesuffix("monitor") + "current_score"
            score = _number_at(found, place)
            if score is not None and is_metric_name(monitor):
                says.metrics[monitor] = score
    for place in (*found.leaves, *found.tensors):
        match = _METRIC_INSIDE.fullmatch(place)
        name = "" if match is None else re.sub(r"\\(.)", r"\1", match[1] or match[2])
        number = _number_at(found, place) if is_metric_name(name) else None
        if number is not None:
            says.metrics[name] = number
    return says


def _number_at(found: Checkpoint, place: str) -> int | float | None:
    """A number among a file's values, be it a tensor."""
    number = _number(found.leaves.get(place))
    return _scalar(found.tensors[place]) if number is None and place in found.tensors else number


def _scalar(tensor: Any) -> float | None:
    """The number of a 0-dim tensor."""
    from ckptvcs.state.distance import widening

    widened = widening(tensor.dtype, tensor.item) if tensor.shape in ((), (1,)) else None
    value = None if widened is None else widened(tensor.opened()(0, tensor.item)).wide[0]
    return _number(float(value)) if value is not None and value.dtype.kind == "f" else None


def _plain(value: object) -> object:
    """A number; text of one too, since the metadata of safetensors is text."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\d{1,18}", value) else value


def _position(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 62 else None


def _number(value: object) -> int | float | None:
    if type(value) is int and abs(value) < 1 << 62:
        return value
    return value if type(value) is float and not math.isnan(value) else None


def _finite(value: object) -> int | float | None:
    number = _number(value)
    return number if number is not None and math.isfinite(number) else None


def _digits_apart(name: str) -> tuple[bool, list[tuple[bool, int, str]]]:
    """A key that puts v2 before v10, and a name that has no number (`last.ckpt`) behind those that have."""
    words = [(word.isdigit(), int(word) if word.isdigit() else 0, word) for word in re.split(r"(\d+)", name)]
    return not any(digit for digit, _, _ in words), words


def _without_duplicates(disk: Disk, found: list[Found], left_out: dict[str, str]) -> list[Found]:
    """One of each group of files of the same content and step, as `last.ckpt` and the newest one are."""
    kept: list[Found] = []
    for each in found:
        twin = next((other for other in kept if _same_content(disk, other, each)), None)
        if twin is None:
            kept.append(each)
        else:
            left_out[each.name] = f"the same as {twin.name}"
    return kept


def _same_content(disk: Disk, one: Found, other: Found) -> bool:
    if one.step != other.step or disk.is_dir(one.path) or disk.is_dir(other.path):
        return False
    return disk.size(one.path) == disk.size(other.path) and digest(disk, one.path) == digest(disk, other.path)
