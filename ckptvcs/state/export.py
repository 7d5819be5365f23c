"""A state as checkpoint files of other tools, written tensor by tensor.

What is exported is first looked at as a whole: everything that the format cannot hold is refused at once,
with all paths, before a byte is written. Then each file is written under a name of its own in the folder and
gets its final one when all are complete and on the medium, the index of shards last.

Memory: two pieces of `streams.PIECE` bytes and what casting them takes, and the header. Only a tensor whose
memory was not in C order, or a group of such tensors that share memory, is held as a whole, one at a time,
and only for torch archives, which keep strides.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fnmatch
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from ckptvcs.disk import Disk, Folder, ReadFile, StrPath
from ckptvcs.errors import InvalidError, NotFoundError, UnsupportedStateError
from ckptvcs.ids import Buffer, ObjectId
from ckptvcs.state import cast as casting
from ckptvcs.state import codes, paths
from ckptvcs.state import tree as trees
from ckptvcs.state.formats import write_npz, write_safetensors, write_torch
from ckptvcs.state.formats.outgoing import Outgoing, Sink
from ckptvcs.state.interface import ObjectReader
from ckptvcs.state.materialise import memory_for
from ckptvcs.state.publishing import Writing, write_all
from ckptvcs.state.read import Branch, Compound, Stored, StoredBlob, StoredLeaf, StoredTensor, StoredTorch
from ckptvcs.state.streams import Stream
from ckptvcs.state.tensors import SHARED_NAMES, TORCH_SIZES, Spec
from ckptvcs.state.torch_memory import Memory, arranged

FORMATS: Final = ("safetensors", "torch", "npz", "hf")

SHARD_SIZE: Final = 50_000_000_000
"""Bytes of tensors per file of a Hugging Face folder, as Transformers 5 has it."""

CONFIG_FILES: Final = (
    "config.json", "generation_config*", "tokenizer*", "special_tokens_map*", "added_tokens*", "vocab*",
    "merges*", "spiece.model", "chat_template*", "preprocessor_config*", "processor_config*", "*.jinja",
)  # fmt: skip
"""Files that make a folder of weights loadable by its name alone."""

_MADE_OF: Final = {
    "sparse": (
        "indices", "crow_indices", "ccol_indices", "col_indices", "row_indices", "values",
    ),
    "quantized": ("integers", "scale", "zero_point"),
}  # fmt: skip
"""The parts of tensors that are made of several, in the order in which torch takes them."""

_FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\Z")


@dataclass(slots=True)
class ExportReport:
    """What an export did.

    Attributes:
        files: bytes of each file written, by name, copies included.
        copied: names of those that were copied from `config_from`.
        tensors: tensors written.
        nbytes: their bytes.
        repeated: paths of tensors that share memory with one written before and were written again.
        left_out: paths of values that are no tensors, left out because that was asked for.
        cast: how many tensors were cast, by the dtype they had.
        overflowed: numbers that were finite and became infinite by the cast, by path.
        prefix: the component whose name was dropped from the names in the files; "" if none.
    """

    files: dict[str, int] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)
    tensors: int = 0
    nbytes: int = 0
    repeated: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    cast: dict[str, int] = field(default_factory=dict)
    overflowed: dict[str, int] = field(default_factory=dict)
    prefix: str = ""


class _Leaf(NamedTuple):
    """What lies at a path: its keys from the top, and the stored value."""

    path: str
    keys: tuple[Any, ...]
    node: Stored


@trees.refuse_deep
def export(
    reader: ObjectReader,
    tree: ObjectId,
    disk: Disk,
    to: Path,
    *,
    format: str,
    only: str | Sequence[str] | None = None,
    dtype: str | None = None,
    config_from: StrPath | None = None,
    max_shard_size: int | str | None = None,
    tensors_only: bool = False,
    force: bool = False,
    about: Mapping[str, str] | None = None,
    say: Callable[[str], None] | None = None,
) -> ExportReport:
    """Write a tree's state, or what `only` selects of it, below the folder `to`, which is there.

    `about` is what the files say of their origin. `say` is told each tensor's path when it is written.

    Raises:
        InvalidError: an argument that means nothing, or two tensors that would get one name.
        UnsupportedStateError: values the format cannot hold; all of them.
        ExistsError: a file of that name is there, and not `force`. Nothing was written.
        NotFoundError: `only` matches nothing; `config_from` has no config.json.
        StorageError: the disk refused. What was there before is there still; files that were complete by
            then may have got their names.
    """
    if format not in FORMATS:
        raise InvalidError(f"cannot export as {format!r}", hint=", ".join(FORMATS))
    if format != "hf" and (config_from is not None or max_shard_size is not None):
        raise InvalidError("only the format hf has a config and shards", hint='format="hf" (`--format hf`)')
    shard_size = SHARD_SIZE if max_shard_size is None else bytes_of_text(max_shard_size)
    target = None if dtype is None else casting.target_of(dtype)
    if format == "hf" and only is None:
        only = _model_of(reader, tree)
    stored, prefix = _below_prefix(trees.load(reader, tree, only), only)
    report = ExportReport(prefix=prefix)
    origin = {"commit": "", **(about or {})} | ({"cast": target} if target is not None else {})
    planning = _Planning(reader, target, tensors_only, report, say)
    stem = prefix if _FILE_NAME.match(prefix) else "state"
    if format == "hf":
        stem = "model"
    if format == "torch":
        name = f"{stem}.pt"
        files: dict[str, Writing] = {name: planning.torch(stored, prefix, stem, origin)}
    else:
        files = planning.flat(stored, prefix, format, stem, shard_size, origin)
    sources = {} if config_from is None else _config_files(Path(config_from))
    report.files = write_all(disk, to, files, sources, force)
    report.copied = list(sources)
    return report


def bytes_of_text(size: int | str) -> int:
    """A size in bytes: a number, or text such as "5GB" (10^9), "5GiB" (2^30) or "200MB"."""
    found = re.fullmatch(r"(\d{1,12})\s*([KMGT]?)(i?)B?", str(size), re.IGNORECASE)
    if found is None or isinstance(size, bool) or (found[3] and not found[2]):
        raise InvalidError(f"{size!r} is no size", hint='a number of bytes, or text such as "5GB"')
    power = " KMGT".index(found[2].upper() or " ")
    count: int = int(found[1]) * (1024 if found[3] else 1000) ** power
    if not count:
        raise InvalidError("a file of no bytes holds nothing", hint='a size such as "5GB"')
    return count


# -- what is exported ------------------------------------------------------------------------------


def _model_of(reader: ObjectReader, tree: ObjectId) -> str | None:
    """The part of a state that a Hugging Face folder is about: its component `model`, if it has one."""
    with contextlib.suppress(NotFoundError):
        found = trees.load(reader, tree, "model")
        if isinstance(found, Branch) and isinstance(found.children[0], Branch):
            return "model"
    return None


def _below_prefix(stored: Stored, only: str | Sequence[str] | None) -> tuple[Stored, str]:
    """What is exported, and the component that is left out of its names: the one that `only` is all about."""
    patterns = [only] if isinstance(only, str) else list(only or ())
    first = {(paths.split(pattern) or ("**",))[0] for pattern in patterns}
    if len(first) == 1 and isinstance(stored, Branch) and len(stored.keys) == 1:
        (prefix,) = first
        child = stored.children[0]
        plain = prefix in (paths.name(stored.keys[0]), stored.keys[0])
        if plain and isinstance(child, Branch) and not isinstance(child, Compound):
            return child, prefix
    return stored, ""


def _leaves(path: str, keys: tuple[Any, ...], node: Stored) -> Iterator[_Leaf]:
    if isinstance(node, Branch) and not isinstance(node, Compound) and node.children:
        for key, child in zip(node.keys, node.children, strict=True):
            yield from _leaves(paths.join(path, paths.name(key)), (*keys, key), child)
    else:
        yield _Leaf(path, keys, node)


def flat_name(keys: Sequence[Any]) -> str:
    """A tensor's name in a flat file: its keys joined by dots, as those of a module's state dict are."""
    return ".".join(key if type(key) is str else paths.name(key) for key in keys)


class _Planning:
    """Looks a state over and says what each file will hold; refuses what cannot be in them."""

    def __init__(
        self,
        reader: ObjectReader,
        target: str | None,
        tensors_only: bool,
        report: ExportReport,
        say: Callable[[str], None] | None,
    ) -> None:
        self._reader = reader
        self._target = target
        self._tensors_only = tensors_only
        self._report = report
        self._say = say
        self._kept: set[int] = set()
        """Tensors (by identity) that are not cast: what a quantised tensor is made of."""

    # -- flat files: names and tensors ---------------------------------------------------------------

    def flat(
        self, stored: Stored, prefix: str, format: str, stem: str, shard_size: int, origin: Mapping[str, str]
    ) -> dict[str, Writing]:
        """The files of a format that knows tensors only."""
        tensors = self._named(stored, prefix, write_npz if format == "npz" else write_safetensors)
        if format == "npz":
            comment = json.dumps({"ckptvcs": origin})
            return {f"{stem}.npz": lambda sink: write_npz.write(sink, tensors, comment)}
        metadata = {"format": "pt"} | {f"ckptvcs.{key}": value for key, value in origin.items()}
        if not write_safetensors.fits(tensors, metadata):
            raise InvalidError("the names of these tensors are more than a safetensors header may hold")
        shards = _shards(tensors, shard_size) if format == "hf" else [tensors]
        names = [f"{stem}.safetensors"]
        if len(shards) > 1:
            names = [f"{stem}-{at:05}-of-{len(shards):05}.safetensors" for at in range(1, len(shards) + 1)]
        files: dict[str, Writing] = {}
        for name, part in zip(names, shards, strict=True):
            files[name] = functools.partial(_write_safetensors, part, metadata)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
                "weight_map": {t.name: name for name, part in zip(names, shards, strict=True) for t in part},
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            files[f"{stem}.safetensors.index.json"] = lambda sink: sink(text.encode())
        return files

    def _named(self, stored: Stored, prefix: str, format: Any) -> list[Outgoing]:
        found: dict[str, str] = {}
        tensors: list[Outgoing] = []
        refused: list[tuple[str, str]] = []
        shown: set[object] = set()
        for path, keys, node in _leaves(prefix, (), stored):
            if not isinstance(node, (StoredTensor, Compound)) or node.kind == "generator":
                self._no_tensor(path, node, refused)
                continue
            if isinstance(node, Compound):
                refused.append((path, f"a {node.kind} tensor; only dense ones have a place in such a file"))
                continue
            dtype = self._dtype(node)
            name = flat_name(keys)
            why = format.why_not(dtype) or format.why_not_called(name)
            if why is not None:
                refused.append((path, why))
                continue
            if name in found:
                refused.append((path, f"would be called {name!r}, like {found[name]}"))
                continue
            found[name] = path
            if (same := _memory_shown(node)) is not None:
                if same in shown:
                    self._report.repeated.append(path)
                shown.add(same)
            stream = Stream(self._reader, node.content)
            item = node.spec.item if dtype == node.spec.dtype else TORCH_SIZES[dtype]
            pieces = functools.partial(self._pieces, path, node.spec.dtype, dtype, stream.pieces)
            tensors.append(Outgoing(name, dtype, node.spec.shape, item, pieces))
            self._count(node.spec, dtype, tensors[-1].nbytes)
        self._refuse(refused)
        if not tensors:
            raise NotFoundError("there is no tensor to export", hint="`ckpt ls REV` lists what there is")
        return tensors

    def _no_tensor(self, path: str, node: Stored, refused: list[tuple[str, str]]) -> None:
        if self._tensors_only:
            self._report.left_out.append(path)
        else:
            refused.append((path, f"a {node.kind}, which is no tensor"))

    def _refuse(self, refused: Sequence[tuple[str, str]]) -> None:
        if refused:
            raise UnsupportedStateError(
                refused,
                "exported in this format",
                "select a part with only= (`--only`), leave out what is no tensor with tensors_only "
                "(`--tensors-only`), cast with dtype= (`--dtype`), or export in another format",
            )

    def _dtype(self, node: StoredTensor) -> str:
        cast = casting.is_cast(node.spec.dtype, self._target) and id(node) not in self._kept
        return self._target if cast and self._target is not None else node.spec.dtype

    def _count(self, spec: Spec, dtype: str, nbytes: int) -> None:
        self._report.tensors += 1
        self._report.nbytes += nbytes
        if dtype != spec.dtype:
            self._report.cast[spec.dtype] = self._report.cast.get(spec.dtype, 0) + 1

    def _pieces(
        self, path: str, dtype: str, target: str, pieces: Callable[[], Iterator[Buffer]]
    ) -> Iterator[Buffer]:
        if self._say is not None:
            self._say(path)
        for piece in pieces():
            if dtype == target:
                yield piece
                continue
            found, overflowed = casting.cast(piece, dtype, target)
            if overflowed:
                self._report.overflowed[path] = self._report.overflowed.get(path, 0) + overflowed
            yield found

    # -- torch archives: the state as it is nested -----------------------------------------------------

    def torch(self, stored: Stored, prefix: str, stem: str, origin: Mapping[str, str]) -> Writing:
        """The one file of a torch archive."""
        refused: list[tuple[str, str]] = []
        dense: list[tuple[str, StoredTensor]] = []
        for path, _, node in _leaves(prefix, (), stored):
            parts = node.children if isinstance(node, Compound) and node.kind in _MADE_OF else [node]
            dense += [
                (path, part)
                for part in parts
                if isinstance(part, StoredTensor) and self._has_torch_dtype(path, part, refused)
            ]
            if node.kind == "quantized":
                self._kept |= {id(part) for part in parts}
        storages: list[write_torch.Storage] = []
        views = self._views(dense, storages, refused)
        value = self._value(prefix, stored, views, refused)
        self._refuse(refused)
        comment = json.dumps({"ckptvcs": origin})
        return lambda sink: write_torch.write(sink, value, storages, stem, comment)

    def _has_torch_dtype(self, path: str, node: StoredTensor, refused: list[tuple[str, str]]) -> bool:
        spec = node.spec
        if spec.framework == "torch" or (spec.dtype in SHARED_NAMES and spec.dtype in TORCH_SIZES):
            return True
        refused.append((path, f"dtype {spec.dtype} has no counterpart in torch"))
        return False

    def _views(
        self,
        dense: Sequence[tuple[str, StoredTensor]],
        storages: list[write_torch.Storage],
        refused: list[tuple[str, str]],
    ) -> dict[int, write_torch.View]:
        """A storage for each group of tensors that share memory, and what each tensor shows of it."""
        groups: dict[object, list[tuple[str, StoredTensor]]] = {}
        for at, (path, node) in enumerate(dense):
            key = at if node.alias is None else (node.spec.framework, node.alias.group)
            groups.setdefault(key, []).append((path, node))
        views: dict[int, write_torch.View] = {}
        for members in groups.values():
            kinds = {node.spec.dtype for _, node in members}
            targets = {self._dtype(node) for _, node in members}
            if len(kinds) > 1 and targets != kinds:
                refused += [(path, "shares memory with tensors of another dtype") for path, _ in members]
                continue
            for part in arranged(members):
                self._storage(part, storages, views)
        return views

    def _storage(
        self,
        part: Memory,
        storages: list[write_torch.Storage],
        views: dict[int, write_torch.View],
    ) -> None:
        path, first, _ = part.members[0]
        source, target = first.spec.dtype, self._dtype(first)
        mixed = len({node.spec.dtype for _, node, _ in part.members}) > 1
        nbytes = part.nbytes
        if source != target:
            nbytes = nbytes // first.spec.item * TORCH_SIZES[target]
        pieces = functools.partial(part.pieces, self._reader)
        cast = functools.partial(self._pieces, path, source, target, pieces)
        storages.append(write_torch.Storage(nbytes, cast))
        for _, node, place in part.members:
            spec = node.spec
            dtype = self._dtype(node)
            flags = spec.flags if spec.framework == "torch" else 0
            views[id(node)] = write_torch.View(
                len(storages) - 1,
                dtype,
                place.offset // spec.item,
                spec.shape,
                tuple(step // spec.item for step in place.strides),
                TORCH_SIZES[dtype],
                bool(flags & codes.REQUIRES_GRAD),
                bool(flags & codes.PARAMETER),
                mixed,
            )
            self._report.tensors += 1
            if dtype != spec.dtype:
                self._report.cast[spec.dtype] = self._report.cast.get(spec.dtype, 0) + 1
        self._report.nbytes += nbytes

    def _value(
        self, path: str, node: Stored, views: Mapping[int, write_torch.View], refused: list[tuple[str, str]]
    ) -> Any:
        """The value for the archive's program; notes what has no place in one."""
        found: Any = None
        if isinstance(node, StoredTensor):
            return views.get(id(node))  # refused before if it is not there
        if isinstance(node, StoredLeaf):
            found = node.value
        elif isinstance(node, StoredTorch) and node.code in _TORCH_LEAVES:
            found = _TORCH_LEAVES[node.code](node.plain)
        elif isinstance(node, StoredBlob):
            found = self._blob(path, node)
        elif isinstance(node, Compound):
            found = self._compound(path, node, views, refused)
        elif isinstance(node, Branch):
            children = [
                self._value(paths.join(path, paths.name(key)), child, views, refused)
                for key, child in zip(node.keys, node.children, strict=True)
            ]
            refused += [
                (paths.join(path, paths.name(key)), f"its key: {why}")
                for key in node.keys
                if (why := write_torch.why_not(key)) is not None
            ]
            found = node.make(node.keys, children)
            if type(found) is collections.OrderedDict and (why := write_torch.why_not_beside(found)):
                refused.append((path, why))
            if type(found) in (dict, list, tuple, collections.OrderedDict):
                return found
        else:  # random generators
            refused.append((path, f"a {node.kind} is nothing that torch's weights-only reader builds"))
            return None
        if (why := write_torch.why_not(found)) is not None:
            refused.append((path, why))
        return found

    def _compound(
        self, path: str, node: Compound, views: Mapping[int, write_torch.View], refused: list[tuple[str, str]]
    ) -> object:
        parts = dict(zip(node.keys, node.children, strict=True))
        made: list[Any] = [
            part.value if isinstance(part, StoredLeaf) else views.get(id(part))
            for part in (parts.get(name) for name in _MADE_OF.get(node.kind, ()) if name in parts)
        ]
        if node.kind not in _MADE_OF or None in made:
            refused.append((path, f"a {node.kind}{' tensor' if node.dtype else ''}"))
            return None
        flags: int = node.about[1]
        parameter = bool(flags & codes.PARAMETER)
        if flags & codes.REQUIRES_GRAD and not parameter:
            refused.append((path, f"a {node.kind} tensor that requires gradients and is no parameter"))
        if node.kind == "sparse":
            coalesced = bool(flags & codes.COALESCED)
            grad = bool(flags & codes.REQUIRES_GRAD)
            return write_torch.Sparse(node.about[0], node.shape, tuple(made), coalesced, grad, parameter)
        integers = dataclasses.replace(made[0], dtype=node.dtype)
        return write_torch.Quantized(integers, node.about[0], made[1], made[2], node.about[2], parameter)

    def _blob(self, path: str, node: StoredBlob) -> Any:
        with memory_for(path, node.content.nbytes):
            data = b"".join(Stream(self._reader, node.content).pieces())
        if node.kind == "str":
            return data.decode("utf-8", "surrogatepass")
        return bytearray(data) if node.kind == "bytearray" else data


_TORCH_LEAVES: Final[dict[int, Callable[[Any], object]]] = {
    codes.TORCH_SIZE: lambda lengths: write_torch.Size(tuple(lengths)),
    codes.TORCH_DTYPE: write_torch.Dtype,
    codes.TORCH_DEVICE: write_torch.Device,
}


def _memory_shown(node: StoredTensor) -> object:
    """What is equal for tensors that show the same memory; None for one that shares nothing."""
    if node.alias is None:
        return None
    spec = node.spec
    return spec.framework, node.alias.group, node.alias.offset, node.alias.strides, spec.shape, spec.item


def _shards(tensors: Sequence[Outgoing], limit: int) -> list[list[Outgoing]]:
    """Tensors in order, as many to a file as fit in `limit`; one that is larger has a file of its own."""
    shards: list[list[Outgoing]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_safetensors(part: Sequence[Outgoing], metadata: Mapping[str, str], sink: Sink) -> None:
    write_safetensors.write(sink, part, metadata)


# -- files beside the tensors -----------------------------------------------------------------------


def _config_files(folder: Path) -> dict[str, ReadFile]:
    """The files of `config_from`, opened. A link is followed within the folder and nowhere else."""
    found: dict[str, ReadFile] = {}
    try:
        with Folder.open(folder) as opened:
            for name in opened.names():
                if not any(fnmatch.fnmatchcase(name, pattern) for pattern in CONFIG_FILES):
                    continue
                kind = opened.kind(name)
                if kind == "link":
                    found[name] = _linked(folder, name)
                elif kind == "file":
                    found[name] = opened.open_file(name)
    except FileNotFoundError:
        raise NotFoundError(f"there is no folder {folder}") from None
    if "config.json" not in found:
        raise NotFoundError(f"there is no config.json in {folder}", hint="name the folder of a model")
    return found


def _linked(folder: Path, name: str) -> ReadFile:
    top, place = folder.resolve(), (folder / name).resolve()
    if not place.is_relative_to(top):
        raise InvalidError(
            f"{folder / name} is a link that leads out of its folder",
            hint="make a copy without links first: cp -rL",
        )
    with Folder.open(place.parent) as real:
        return real.open_file(place.name)
