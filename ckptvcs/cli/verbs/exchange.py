"""export, import-run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from ckptvcs.cli import output, session, shapes
from ckptvcs.cli.options import complete_branch, complete_path, complete_revision, json_option
from ckptvcs.errors import NoRepositoryError

if TYPE_CHECKING:
    from ckptvcs.importing import ImportReport
    from ckptvcs.state.export import ExportReport

# ---- export -------------------------------------------------------------------------------------


@click.command()
@click.argument("revision", metavar="REV", shell_complete=complete_revision)
@click.option(
    "--format",
    "format",
    required=True,
    type=click.Choice(["safetensors", "torch", "npz", "hf"]),
    help="What to write.",
)
@click.option(
    "--to",
    required=True,
    metavar="DIR",
    shell_complete=complete_path,
    help="The folder to write to, made if missing.",
)
@click.option("--only", multiple=True, metavar="GLOB", help="A name or pattern. May be repeated.")
@click.option("--dtype", metavar="TYPE", help="Cast floating-point tensors to bf16, fp16 or fp32.")
@click.option(
    "--config-from",
    metavar="DIR",
    shell_complete=complete_path,
    help="For hf: copy config and tokenizer files from this folder.",
)
@click.option("--max-shard-size", metavar="SIZE", help="For hf: tensors per file, such as 5GB; 50GB.")
@click.option("--tensors-only", is_flag=True, help="Leave out what is no tensor, where it has no place.")
@click.option("--force", is_flag=True, help="Replace files that are there.")
@json_option
def export(
    revision: str,
    format: str,
    to: str,
    only: tuple[str, ...],
    dtype: str | None,
    config_from: str | None,
    max_shard_size: str | None,
    tensors_only: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a commit's state as checkpoint files of other tools.

    safetensors and npz hold tensors only, called by their keys joined with dots. torch is an archive for
    torch.load(weights_only=True), nested as the state is. hf is a folder for from_pretrained. If every GLOB
    begins with the same name, that name is left out: --only model gives what load_file users expect.

    What the format cannot hold is refused, all of it listed, before anything is written. Tensors are written
    one after another, never the whole state at once. torch need not be installed.

    \b
    ckpt export main --format safetensors --only model --to out
    ckpt export v1 --format hf --dtype bf16 --config-from base --to release
    """
    with session.opened() as repo:
        commit = session.resolved(repo, revision)
        with output.working("writing tensors") as count:
            report = repo.export(
                commit,
                to,
                format=format,
                only=list(only) or None,
                dtype=dtype,
                config_from=config_from,
                max_shard_size=max_shard_size,
                tensors_only=tensors_only,
                force=force,
                say=count,
            )
    if as_json:
        output.data({"commit": str(commit.id), "to": to, **shapes.export_shape(report)})
        return
    _show_export(report, to)


def _show_export(report: ExportReport, to: str) -> None:
    for name, nbytes in report.files.items():
        output.line(f"  {output.clean(name)}  {output.size(nbytes)}")
    dropped = f", without {output.clean(report.prefix)} in their names" if report.prefix else ""
    output.line(
        f"Wrote {output.counted(report.tensors, 'tensor')}, {output.size(report.nbytes)}, "
        f"below {output.clean(to)}{dropped}."
    )
    if report.cast:
        kinds = ", ".join(f"{count:,} of {dtype}" for dtype, count in report.cast.items())
        output.line(f"Cast {output.counted(sum(report.cast.values()), 'tensor')}: {kinds}.")
    if report.overflowed:
        many = sum(report.overflowed.values())
        output.warning(
            f"{output.counted(many, 'number')} became infinite by the cast, in {', '.join(report.overflowed)}"
        )
    if report.repeated:
        count = output.counted(len(report.repeated), "tensor")
        output.note(f"{count} that share memory with others were written again: {', '.join(report.repeated)}")
    if report.left_out:
        count = output.counted(len(report.left_out), "value")
        output.note(f"{count} that are no tensors were left out: {', '.join(report.left_out)}")


# ---- import-run ---------------------------------------------------------------------------------


@click.command("import-run")
@click.argument("folder", metavar="DIR", shell_complete=complete_path)
@click.option(
    "--branch",
    metavar="NAME",
    shell_complete=complete_branch,
    help="The branch, made if missing. Else it is called like DIR.",
)
@click.option("--dry-run", is_flag=True, help="Only tell: encode into a temporary folder, and remove it.")
@click.option(
    "--scratch",
    metavar="DIR",
    shell_complete=complete_path,
    help="For --dry-run: where the temporary folder is made.",
)
@json_option
def import_run(folder: str, branch: str | None, dry_run: bool, scratch: str | None, as_json: bool) -> None:
    """Make a branch of a folder of checkpoints, a commit each.

    Finds checkpoint-500/ (Hugging Face), epoch=2-step=500.ckpt (Lightning), checkpoint_0/ (Accelerate),
    step_100.pt, model_000100.safetensors and the like. Commits follow each other by step: as recorded in
    the checkpoint, else as in its name. Epoch and metrics are taken from it too. The files come back byte
    for byte.

    Done again, it goes on where it stopped. DIR is only read. With --dry-run no repository is needed, and
    none is changed; the sizes it tells are those of an import into an empty one.

    \b
    ckpt import-run outputs/run7 --dry-run
    ckpt import-run outputs/run7 --branch run7
    """
    with output.working("importing") as count:
        if dry_run:
            report = _rehearsed(folder, branch, scratch, count)
        elif scratch is not None:
            raise click.UsageError("--scratch is for --dry-run")
        else:
            with session.opened() as repo:
                report = repo.import_run(folder, branch=branch, say=count)
    if as_json:
        output.data(shapes.import_shape(report))
        return
    _show_import(report)


def _rehearsed(
    folder: str, branch: str | None, scratch: str | None, count: Callable[[str], None]
) -> ImportReport:
    from ckptvcs.repo import Repo

    level = None
    try:
        with session.opened() as repo:
            level = str(repo.config.get("compression"))
    except NoRepositoryError:
        pass
    return Repo.rehearsed_import(folder, compression=level, branch=branch, scratch=scratch, say=count)


def _show_import(report: ImportReport) -> None:
    rows = []
    for each in report.checkpoints:
        commit = "" if each.commit is None else each.commit.short
        stored = "there already" if each.stored is None else output.size(each.stored)
        metrics = ", ".join(f"{name} {output.number(value)}" for name, value in each.metrics.items())
        epoch = "" if each.epoch is None else output.number(each.epoch)
        rows.append((commit, each.name, str(each.step), epoch, output.size(each.given), stored, metrics))
    header = ("commit", "checkpoint", "step", "epoch", "before", "after", "metrics")
    output.table(rows, header=header, right=(2, 3, 4, 5))
    new = sum(each.stored is not None for each in report.checkpoints)
    ratio = f" ({100 * report.stored / report.given:.1f} %)" if report.given else ""
    done = "would be imported" if report.rehearsal else "imported"
    output.line(
        f"{output.counted(new, 'checkpoint')} {done} on {output.clean(report.branch)}: "
        f"{output.size(report.given)} before, {output.size(report.stored)} after{ratio}"
    )
    if report.rehearsal:
        output.line("Nothing was kept; encoded into a temporary repository, as if into an empty one.")
    for name, why in report.left_out.items():
        output.note(f"left out {name}: {why}")
