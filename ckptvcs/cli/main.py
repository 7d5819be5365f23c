"""The command itself: global options, verbs loaded on demand, and what becomes of errors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from ckptvcs import __version__
from ckptvcs.cli import output
from ckptvcs.cli.exits import Exit, exit_of
from ckptvcs.errors import CkptError, StorageError

VERBS = {
    "init": "create",
    "commit": "create",
    "log": "history",
    "show": "history",
    "ls": "content",
    "diff": "compare",
    "note": "metrics",
    "best": "metrics",
    "compare": "metrics",
    "plot": "metrics",
    "checkout": "content",
    "export": "exchange",
    "import-run": "exchange",
    "branch": "refs",
    "switch": "refs",
    "tag": "refs",
    "undelete": "refs",
    "fork": "experiments",
    "sweep": "experiments",
    "runs": "experiments",
    "reset": "experiments",
    "merge": "merge",
    "cherry-pick": "merge",
    "status": "content",
    "reflog": "history",
    "du": "usage",
    "retain": "keeping",
    "pin": "keeping",
    "unpin": "keeping",
    "gc": "upkeep",
    "ingest": "upkeep",
    "repack": "upkeep",
    "fsck": "upkeep",
    "config": "upkeep",
    "completion": "shell",
}
"""Each verb and the module of `ckptvcs.cli.verbs` that has it, in the order of the help."""

NAME = "ckpt"
_GLOBAL = ("--repo", "--color", "--version")


class _Verbs(click.Group):
    """Imports a verb's module when the verb is wanted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = import_module(f"ckptvcs.cli.verbs.{VERBS[cmd_name]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-") and not ctx.resilient_parsing:
            from difflib import get_close_matches

            near = get_close_matches(args[0], VERBS, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"`{NAME} --help` lists the verbs"
            raise _NoSuchVerb(f"{args[0]!r} is not a ckpt verb", hint, ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Whoever read this has seen enough, as in `ckpt log | head`. click would make it an exit code.
            _give_up_output()
            return Exit.DONE


class _NoSuchVerb(click.UsageError):
    def __init__(self, message: str, hint: str, ctx: click.Context) -> None:
        super().__init__(message, ctx)
        self.hint = hint


@click.group(
    cls=_Verbs,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name=NAME, message="%(prog)s %(version)s")
@click.option(
    "--repo",
    metavar="PATH",
    help="The repository's folder, or one below it. Else CKPT_REPO, else the current folder and those "
    "above it are searched.",
)
@click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    metavar="WHEN",
    help="auto (on a terminal, unless NO_COLOR is set), always or never.",
)
@click.pass_context
def ckpt(ctx: click.Context, repo: str | None, color: str) -> None:
    """Version control for training checkpoints.

    Revisions name commits: HEAD, main, v1, 1a2b3c4d, main~2, main^2, main@{1}, main@step:1200,
    main@best:val_loss.
    """
    ctx.color = _color(color)
    if ctx.invoked_subcommand is None:
        output.line(ctx.get_help())


def _color(wish: str) -> bool | None:
    from ckptvcs.disk import environment_variable

    if wish == "auto":
        return False if environment_variable("NO_COLOR") else None
    return wish == "always"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `ckpt` and leave with its exit code. Never shows a traceback unless CKPT_DEBUG is set."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    ours = words[: words.index("--")] if "--" in words else words  # behind it: another program's
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = int(ckpt.main(words, prog_name=NAME, standalone_mode=False) or Exit.DONE)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        code = Exit.INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last resort: a line for people, not a traceback
        code = _report(error, ours)
    sys.exit(code)


def _give_up_output() -> None:
    """Close a standard output that nobody reads, so that the interpreter does not complain at exit."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.close()


def _report(error: Exception, words: list[str]) -> Exit:
    from ckptvcs.disk import environment_variable

    if environment_variable("CKPT_DEBUG"):
        import traceback

        traceback.print_exception(error)
    code, message, hint, exit = _described(error)
    try:
        if "--json" in words:
            output.error_data(code, message, hint, exit)
        else:
            output.error(message, hint, color=_color_of(words))
        sys.stdout.flush()
    except BrokenPipeError:
        _give_up_output()
    return exit


def _described(error: Exception) -> tuple[str, str, str | None, Exit]:
    """An error's stable code, its message in one line, its hint and the exit code."""
    if isinstance(error, CkptError):
        return error.code, error.message, error.hint, exit_of(error)
    if isinstance(error, click.ClickException):
        message = error.format_message().rstrip(".")
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else NAME
        hint: Any = getattr(error, "hint", None) or f"see `{path} --help`"
        if isinstance(error, click.NoSuchOption):
            message = f"no such option: {error.option_name}"
            if error.option_name in _GLOBAL:
                hint = f"it stands before the verb: `{NAME} {error.option_name} ... VERB`"
            elif error.possibilities:
                hint = f"did you mean {' or '.join(sorted(error.possibilities))}?"
        return "usage", message[:1].lower() + message[1:], hint, Exit.USAGE
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename is not None else ""
        return StorageError.code, f"{error.strerror.lower()}{where}", None, exit_of(error)
    kind = type(error).__name__
    text = str(error).strip().split("\n", 1)[0]
    return (
        "unexpected",
        f"unexpected {kind}: {text}" if text else f"unexpected {kind}",
        "this is a bug; set CKPT_DEBUG=1 to see the traceback, and please report it",
        Exit.UNEXPECTED,
    )


def _color_of(words: list[str]) -> bool | None:
    """What --color said: the context that knew it is gone when an error arrives."""
    for i, word in enumerate(words):
        if word.startswith("--color"):
            wish = word.partition("=")[2] or (words[i + 1] if i + 1 < len(words) else "")
            return _color(wish if wish in ("always", "never") else "auto")
    return _color("auto")
