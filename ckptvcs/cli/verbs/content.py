"""ls, checkout, status."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckptvcs.cli import output, session, shapes
from ckptvcs.cli.options import complete_path, complete_revision_or_path, json_option, revision_argument
from ckptvcs.errors import InvalidError, NoRepositoryError, NotFoundError

if TYPE_CHECKING:
    from ckptvcs.history.commit import Commit
    from ckptvcs.repo import Repo
    from ckptvcs.state.files import FileEntry, FileStatus
    from ckptvcs.state.tree import Entry

_Listed = TypeVar("_Listed", "Entry", "FileEntry")

# ---- ls -----------------------------------------------------------------------------------------


@click.command()
@click.argument("revision", metavar="[REV|FILE]", default="HEAD", shell_complete=complete_revision_or_path)
@click.argument("patterns", metavar="[PATTERN...]", nargs=-1)
@click.option("-l", "--long", "long", is_flag=True, help="Exact bytes; chunks of tensors, BLAKE3 of files.")
@json_option
def ls(revision: str, patterns: tuple[str, ...], long: bool, as_json: bool) -> None:
    """List what a commit holds, or a checkpoint file.

    The tensors and values of a state, and files. Nothing but names, types and sizes is read. A plain
    PATTERN is a name with all below it, * stops at /, ** does not. Beside what an optimizer holds stands
    the parameter it belongs to, where the commit tells which.

    FILE is a checkpoint (safetensors, a torch archive, .npz, .npy) or a folder of some; no repository is
    needed. What begins with ./, ../ or / is a file; anything else is a revision if there is one of that
    name, and a file otherwise.

    \b
    ckpt ls
    ckpt ls main~3 'model/**/weight'
    ckpt ls ./checkpoint-500 '**/lm_head.*'
    """
    file = session.file_named(revision)
    if file is not None:
        _list_file(file, patterns, long, as_json)
        return
    with _opened_to_list(revision) as repo:
        commit = _commit_to_list(repo, revision)
        entries, files = _content(repo, commit, patterns)
        dropped = repo.dropped(commit)
    total = {
        "tensors": sum(entry.dtype is not None for entry in entries),
        "values": sum(entry.dtype is None for entry in entries),
        "files": len(files),
        "bytes": sum(entry.nbytes for entry in entries) + sum(entry.size for entry in files),
    }
    if as_json:
        output.data(
            {
                "commit": str(commit.id),
                "entries": [shapes.entry_shape(entry) for entry in entries],
                "files": [shapes.file_shape(entry) for entry in files],
                "total": total,
                "dropped": None if dropped is None else list(dropped),
            }
        )
        return
    size = (lambda count: f"{count:,}") if long else output.size
    if entries:
        rows = [_entry_row(entry, size, long) for entry in entries]
        if any(entry.parameter for entry in entries):
            rows = [(*row, entry.parameter) for row, entry in zip(rows, entries, strict=True)]
        output.table(rows, right=(3, 4) if long else (3,))
    if entries and files:
        output.line()
    if files:
        output.table([_file_row(entry, size, long) for entry in files], right=(1,))
    counts = [output.counted(count, noun[:-1]) for noun, count in total.items() if noun != "bytes" and count]
    output.line(f"{', '.join(counts) or 'nothing'}, {size(total['bytes'])}{' bytes' if long else ''}")
    if dropped and not patterns:
        output.note(f"retention took {', '.join(dropped)} from this commit")


def _list_file(path: Path, patterns: Sequence[str], long: bool, as_json: bool) -> None:
    from ckptvcs.disk import Disk
    from ckptvcs.state.checkpoint import open_checkpoint, selected

    found = open_checkpoint(Disk(), path)
    if patterns:
        (found,) = selected([found], patterns)
    tensors, leaves, others = found.tensors, found.leaves, found.others
    total = {
        "tensors": len(tensors),
        "values": len(leaves),
        "files": len(others),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
    }
    if as_json:
        output.data(
            {
                **shapes.checkpoint_shape(found),
                "entries": [
                    *(shapes.tensor_shape(name, tensor) for name, tensor in tensors.items()),
                    *(shapes.value_shape(name, value) for name, value in leaves.items()),
                ],
                "files": [{"path": name, "bytes": other.nbytes} for name, other in others.items()],
                "total": total,
            }
        )
        return
    size = (lambda count: f"{count:,}") if long else output.size
    if tensors:
        output.table(
            [
                (name, tensor.dtype, f"[{', '.join(map(str, tensor.shape))}]", size(tensor.nbytes))
                for name, tensor in tensors.items()
            ],
            right=(3,),
        )
    if leaves:
        output.table([(name, type(value).__name__, shapes.preview(value)) for name, value in leaves.items()])
    if others:
        rows = [(name, "no tensors", size(other.nbytes)) for name, other in others.items()]
        output.table(rows, right=(2,))
    counts = [output.counted(count, noun[:-1]) for noun, count in total.items() if noun != "bytes" and count]
    tail = " bytes" if long else ""
    output.line(f"{found.format}: {', '.join(counts) or 'nothing'}, {size(total['bytes'])}{tail} of tensors")


@contextlib.contextmanager
def _opened_to_list(revision: str) -> Iterator[Repo]:
    with contextlib.ExitStack() as stack:
        try:
            repo = stack.enter_context(session.opened())
        except NoRepositoryError as error:
            if not any(sign in revision for sign in "/."):
                raise
            raise NotFoundError(f"there is no file {revision}, and {error}") from error
        yield repo


def _commit_to_list(repo: Repo, revision: str) -> Commit:
    try:
        return session.resolved(repo, revision)
    except NotFoundError as error:
        if not any(sign in revision for sign in "*?[/."):
            raise
        hint = error.hint
        if repo.head()[1] is not None:
            hint = f"for a name in HEAD's commit: `ckpt ls HEAD '{revision}'`"
        raise NotFoundError(f"{error}, and there is no file of that name", hint=hint) from error


def _content(repo: Repo, commit: Commit, patterns: Sequence[str]) -> tuple[list[Entry], list[FileEntry]]:
    """The leaves and the files that match; every pattern must match something in one of the two."""
    if not patterns:
        return list(repo.entries(commit)), repo.file_entries(commit)
    entries: dict[str, Entry] = {}
    files: dict[str, FileEntry] = {}
    for pattern in patterns:
        in_state, no_state = _matching(repo.entries, commit, pattern)
        in_files, no_file = _matching(repo.file_entries, commit, pattern)
        if not in_state and not in_files and (missed := no_state or no_file) is not None:
            raise missed
        entries |= in_state
        files |= in_files
    return list(entries.values()), list(files.values())


def _matching(
    listing: Callable[[Commit, str], Iterable[_Listed]], commit: Commit, pattern: str
) -> tuple[dict[str, _Listed], NotFoundError | None]:
    """What matches in one part of a commit, by path, and what is raised if nothing does."""
    try:
        return {entry.path: entry for entry in listing(commit, pattern)}, None
    except NotFoundError as error:
        return {}, error


def _entry_row(entry: Entry, size: Any, long: bool) -> tuple[str, ...]:
    shape = "" if entry.shape is None else f"[{', '.join(map(str, entry.shape))}]"
    kind = entry.dtype or entry.kind
    chunks = (output.counted(entry.chunks, "chunk") if entry.chunks else "inline",) if long else ()
    return (entry.path or "(the state)", kind, shape or entry.preview, size(entry.nbytes), *chunks)


def _file_row(entry: FileEntry, size: Any, long: bool) -> tuple[str, ...]:
    kind = stat.S_IFLNK | 0o777 if entry.kind == "link" else stat.S_IFREG | entry.mode
    name = entry.path if entry.target is None else f"{entry.path} -> {entry.target}"
    return (stat.filemode(kind), size(entry.size), *((entry.digest.hex()[:16],) if long else ()), name)


# ---- checkout -----------------------------------------------------------------------------------


@click.command()
@revision_argument(required=True)
@click.argument("paths", metavar="[PATH...]", nargs=-1)
@click.option(
    "--to",
    metavar="DIR",
    shell_complete=complete_path,
    help="Recreate the paths below DIR (made if missing); HEAD stays.",
)
@click.option("--force", is_flag=True, help="Overwrite files that were changed.")
@json_option
def checkout(revision: str, paths: tuple[str, ...], to: str | None, force: bool, as_json: bool) -> None:
    """Bring files back as they were committed, and move HEAD there.

    HEAD moves to the branch if REV is the name of one, and is detached at the commit otherwise. With PATH
    or --to only files are written and HEAD stays. A PATH is a name or pattern as `ckpt ls` shows it;
    one that begins with ./ or ../ starts from the current folder.

    Files that were changed since the commit HEAD is on are not overwritten without --force; then nothing at
    all is written. No file is ever deleted.

    A commit made from a Python state writes nothing here (with --to, the files attached to it): read it with
    repo.checkout(...) in Python.

    \b
    ckpt checkout main
    ckpt checkout main~1 out/model.safetensors
    ckpt checkout v1 --to /tmp/v1
    """
    with session.opened() as repo:
        commit = session.resolved(repo, revision)
        state = repo.has_state(commit)
        stays = bool(paths) or to is not None
        if state and paths and to is None:
            raise InvalidError(
                f"{commit.id.short} was made from a Python state, so there are no files to bring back",
                hint=f"--to DIR writes the files attached to it; {_python_call(commit)} reads the state",
            )
        written: list[str] = []
        unchanged: list[str] = []
        if not state or to is not None:
            only = [_tree_path(repo, path, to) for path in paths] or None
            with output.working("writing files") as count:
                report = repo.checkout_files(commit, to, only=only, force=force, say=count)
            written, unchanged = report.written, report.unchanged
        if not stays:
            repo.set_head(revision if revision in repo.branches() else commit)
        branch, head = repo.head()
    if as_json:
        output.data(
            {
                "commit": str(commit.id),
                "branch": branch,
                "head": None if head is None else str(head),
                "state": state,
                "written": written,
                "unchanged": unchanged,
            }
        )
        return
    if not state or written or unchanged:
        kept = f", {len(unchanged):,} already there" if unchanged else ""
        where = f" below {output.clean(to)}" if to is not None else ""
        output.line(f"Wrote {output.counted(len(written), 'file')}{where}{kept}.")
    if not stays:
        place = f"on {output.clean(branch)}" if branch is not None else "detached"
        output.line(f"HEAD is {place} at {commit.id.short} {output.clean(commit.title)}".rstrip())
    if state:
        output.note(
            f"{commit.id.short} was made from a Python state, of which nothing is written here: read it "
            f"with {_python_call(commit)}"
        )


def _python_call(commit: Commit) -> str:
    return f'repo.checkout("{commit.id.short}") in Python'


def _tree_path(repo: Repo, path: str, to: str | None) -> str:
    """A PATH as the tree has it; what begins with a dot and a slash is seen from the current folder."""
    if path not in (".", "..") and not path.startswith(("./", "../", "/")):
        return path
    resolved = Path(path).resolve() if Path(path).name in ("", "..") else None
    absolute = resolved or Path(path).parent.resolve() / Path(path).name
    if not absolute.is_relative_to(repo.path):
        raise InvalidError(
            f"{path} lies outside of {repo.path}, the repository's folder",
            hint="name it as `ckpt ls` does",
        )
    inside = absolute.relative_to(repo.path).as_posix()
    return "**" if inside == "." else inside


# ---- status -------------------------------------------------------------------------------------


@click.command()
@json_option
def status(as_json: bool) -> None:
    """Tell where HEAD is, and what changed.

    Lists committed files that were changed or are missing, runs that are running or stale (see runs), and
    commits that lost a race (see docs/concepts.md).
    """
    with session.opened() as repo:
        branch, head = repo.head()
        commit = None if head is None else repo.resolve(head)
        files: FileStatus | None = None
        if commit is not None and not repo.has_state(commit):
            with output.working("comparing files"):
                files = repo.file_status(commit)
        lost = repo.lost()
        runs = [run for run in repo.runs() if run.holder or run.status == "stale"]
        place = repo.path
    if as_json:
        output.data(
            {
                "repository": str(place),
                "branch": branch,
                "commit": None if commit is None else str(commit.id),
                "unborn": commit is None,
                "detached": branch is None,
                "step": None if commit is None else commit.step,
                "files": {
                    "modified": files.modified if files else [],
                    "missing": files.missing if files else [],
                    "unchanged": len(files.unchanged) if files else 0,
                },
                "runs": [shapes.run_shape(run) for run in runs],
                "lost": {name: str(id) for name, id in lost.items()},
            }
        )
        return
    output.line(f"repository {output.clean(str(place))}")
    on = f"on branch {output.clean(branch)}" if branch is not None else "HEAD is detached"
    if commit is None:
        output.line(f"{on}, no commits yet")
    else:
        step = "" if commit.step is None else f", step {commit.step}"
        title = f": {output.clean(commit.title)}" if commit.title else ""
        output.line(f"{on} at {output.paint(commit.id.short, fg='yellow')}{step}{title}")
    if files is not None:
        for name in files.modified:
            output.line(f"  {output.paint('modified', fg='red')}  {output.clean(name)}")
        for name in files.missing:
            output.line(f"  {output.paint('missing ', fg='red')}  {output.clean(name)}")
        if not files.modified and not files.missing:
            output.line(f"{output.counted(len(files.unchanged), 'committed file')} unchanged")
    for run in runs:
        held = f"claimed by {run.holder}" if run.holder else "stale: its run was killed"
        output.line(output.clean(f"{run.branch} is {held}"))
    if lost:
        output.line(f"{output.counted(len(lost), 'commit')} lost a race:")
        for name, id in lost.items():
            output.line(f"  {output.clean(name)}  {id.short}")
        output.line("  (`ckpt branch NAME lost/...` makes one a branch; gc drops them after 30 days)")
