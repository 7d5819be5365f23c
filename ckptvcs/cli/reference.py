"""Writes docs/cli.md from the commands themselves: `python -m ckptvcs.cli.reference > docs/cli.md`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from ckptvcs.cli import output
from ckptvcs.cli.exits import MEANING
from ckptvcs.cli.main import NAME, VERBS, ckpt

_HEAD = """\
# The command line

<!-- Written by `make docs` from the commands themselves. Change the texts in ckptvcs/cli. -->

`ckpt`, `ckptvcs` and `python -m ckptvcs` are one command. It works on one [repository](concepts.md), and \
most verbs take a [revision](concepts.md#revisions): `HEAD`, `main`, `v1`, `1a2b3c4d`, `main~2`, `main^2`, \
`main@{1}`, `main@step:1200`, `main@best:val_loss`.

    ckpt [--repo PATH] [--color WHEN] VERB ...
"""

_ANSWERS = """\
## Answers

Results go to standard output; warnings, progress (on a terminal only) and errors go to standard error. \
An error is one line, and a second one if there is something to be done about it:

    error: no branch, tag or commit is called 'mian'
    hint: did you mean main?

Every verb that answers has `--json`, which prints one object to standard output and nothing else there. \
Keys are never removed or given another meaning, only added. Bytes and times are exact (`time` is ISO \
8601 in UTC, `time_ns` nanoseconds since 1970), ids are whole, and `nan`, `inf` and `-inf` are texts, \
since JSON has no such numbers. With `--json` an error is an object on standard output too, and the exit \
code is the same:

    {"error": {"code": "not-found", "message": "...", "hint": "...", "exit": 4}}

`code` is stable, `hint` may be null. A command whose reader went away (`ckpt log | head`) ends \
quietly with 0.
"""

_ENVIRONMENT = """\
## Environment

| variable | meaning |
|---|---|
| `CKPT_REPO` | the repository's folder, where `--repo` is not given |
| `CKPT_BRANCH` | the branch that commits go to, where `--branch` is not given; `HEAD` stays what it is |
| `CKPT_AUTHOR` | who commits; else the setting `author`, else login@host |
| `CKPT_THREADS` | threads that hash and compress, by default up to 4 |
| `CKPT_INDEX_FREE` | `1`: open without the index; commits go to `.ckpt/incoming` |
| `CKPT_DEBUG` | if set, an error comes with its traceback |
| `NO_COLOR` | if set, no colours, unless `--color always` |
"""


def reference() -> str:
    """The page."""
    parts = [_HEAD, "## Options before the verb\n", _options(ckpt), *_verbs(), _ANSWERS]
    parts += ["## Exit codes\n", _exits(), _ENVIRONMENT]
    return "\n".join(parts)


def _exits() -> str:
    rows = [f"| {int(code)} | {text} |" for code, text in MEANING.items()]
    return "\n".join(["| code | meaning |", "|---|---|", *rows, ""])


def _verbs() -> Iterator[str]:
    context = click.Context(ckpt, info_name=NAME)
    yield "## Verbs\n"
    yield "\n".join(f"- [`{verb}`](#ckpt-{verb}): {_summary(context, verb)}" for verb in VERBS) + "\n"
    for verb in VERBS:
        command = ckpt.get_command(context, verb)
        assert command is not None  # it is in the table of verbs
        arguments = " ".join(p.metavar or "" for p in command.params if isinstance(p, click.Argument))
        yield f"### ckpt {verb}\n"
        yield f"    ckpt {verb} [OPTIONS] {arguments}".rstrip() + "\n"
        yield from _paragraphs(command.help or "")
        yield _options(command)


def _summary(context: click.Context, verb: str) -> str:
    command = ckpt.get_command(context, verb)
    return ((command.help if command else None) or "").split("\n", 1)[0]


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b\n"):
            yield "```console\n" + "".join(f"$ {line}\n" for line in paragraph[2:].splitlines()) + "```\n"
        else:
            yield " ".join(paragraph.split()).replace("*", chr(92) + "*") + "\n"


def _options(command: click.Command) -> str:
    rows = ["| option | meaning |", "|---|---|"]
    for option in command.params:
        if isinstance(option, click.Option):
            names = ", ".join(f"`{name}`" for name in option.opts)
            value = f" `{option.metavar}`" if option.metavar and not option.is_flag else ""
            rows.append(f"| {names}{value} | {(option.help or '').replace('|', chr(92) + '|')} |")
    return "\n".join([*rows, ""]) if len(rows) > 2 else ""


if __name__ == "__main__":
    output.line(reference().rstrip())
