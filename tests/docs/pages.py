"""Reads the project's pages, and runs what they show.

A page is run from top to bottom in one folder:

- a ```python block is executed, all blocks of a page in one namespace; one whose first line is a comment
  such as ``# train.py`` is written to that file instead;
- in a ```console block each line ``$ COMMAND`` is run by bash, and the lines up to the next one are its
  output. A command succeeds, unless ``$ echo $?`` and a number follow. An id in a command stands for the
  id that was printed where the page shows it;
- other blocks are not touched; ```sh is for commands that no test should run.

After a change of what commands print, a person writes the output anew and reads the difference:

    PYTHONPATH=. .venv/bin/python -m tests.docs.pages README.md docs/tutorial.md docs/format.md

In docs/format.md that is the table of ckptvcs/state/codes.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptvcs.state import codes

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = ROOT / "docs" / "cli.md"
"""Written by `make docs`. Its examples are commands without output, in no repository of their own."""

WIDTH = 100
"""Columns of the terminal that commands believe in."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page on which the text begins."""

    language: str
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    """A command of a console block, with the output that the page shows."""

    text: str
    output: str
    status: int


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    found: list[Block] = []
    language, start, lines = None, 0, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            if language is None:
                language, start, lines = line[3:].strip(), number + 1, []
            else:
                found.append(Block(language, "\n".join(lines) + "\n", start))
                language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"{page}: a block is not closed"
    return found


def block_after(page: Path, heading: str, language: str, index: int = 0) -> str:
    """The text of a block below a heading."""
    text = page.read_text()
    start = text[: text.index(f"\n{heading}\n")].count("\n") + 2
    return [b.text for b in blocks(page) if b.line > start and b.language == language][index]


def commands(block: Block) -> list[Command]:
    """The commands of a console block. `echo $?` belongs to the command before it."""
    pairs: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            pairs.append((line[2:], []))
        else:
            pairs[-1][1].append(line)
    found: list[Command] = []
    for text, lines in pairs:
        if text == "echo $?":
            last = found.pop()
            found.append(Command(last.text, last.output, int("".join(lines))))
        else:
            found.append(Command(text, "".join(line + "\n" for line in lines), 0))
    return found


class Walk:
    """Runs a page in a folder."""

    def __init__(self, folder: Path) -> None:
        self._names: dict[str, Any] = {"__name__": "page"}
        self._ids: dict[str, str] = {}
        self._root = self._folder = folder.resolve() / "work"
        self._folder.mkdir()
        tools = folder / "bin"
        tools.mkdir()
        for name, words in (("ckpt", "-m ckptvcs "), ("python", "")):
            script = tools / name
            script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
            script.chmod(0o755)
        outer = {k: v for k, v in os.environ.items() if not k.startswith("CKPT_")}
        self._environment = outer | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "CKPT_AUTHOR": "ada@example",
            "COLUMNS": str(WIDTH),
            "TERM": "dumb",
            "TZ": "UTC",
            "HOME": str(folder),
        }

    def python(self, block: Block, page: Path) -> None:
        """Execute a block, or write it to the file that its first line names."""
        name = re.match(r"# ([\w-]+\.py)\n", block.text)
        if name:
            (self._folder / name[1]).write_text(block.text)
            return
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        with contextlib.chdir(self._folder), _without_settings():
            exec(code, self._names)

    def translated(self, command: str) -> str:
        """A command with the ids that the page shows replaced by those of this run."""
        return _ID.sub(lambda found: self._ids.get(found[0], found[0]), command)

    def learn(self, shown: str, printed: str) -> None:
        """Note which ids of this run stand where the page shows others."""
        old, new = _ID.findall(shown), _ID.findall(printed)
        if len(old) == len(new):
            self._ids |= dict(zip(old, new, strict=True))

    def run(self, command: str) -> tuple[int, str]:
        """Run a command where the one before it ended; (exit status, what it printed)."""
        end = self._root.parent / "end"
        done = subprocess.run(
            ["bash", "-c", f'{command}\nstatus=$?; pwd > "{end}"; exit $status'],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if end.exists():
            self._folder = Path(end.read_text().strip())
        printed = done.stdout.replace(str(self._root), "/home/ada")
        return done.returncode, "".join(f"{line.rstrip()}\n" for line in printed.splitlines())


@contextlib.contextmanager
def _without_settings() -> Iterator[None]:
    """The process environment without the variables that ckptvcs reads."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("CKPT_"):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


_ID = re.compile(r"\b[0-9a-f]{7,64}\b")
_SAME = [
    (re.compile(r"\x1b\[[0-9;]*m"), ""),
    (re.compile(r"\b\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?(\.\d+)?( ?UTC|Z|[+-]\d\d:?\d\d)?"), "TIME"),
    (re.compile(r"\b(just now|(\d+|an?) (second|minute|hour)s? ago)"), "TIME"),
    (_ID, "ID"),
    (re.compile(r"\b\d+(\.\d+)? ?(B|kB|MB|GB|bytes)\b"), "BYTES"),
    (re.compile(r"\b\d{1,3}(,\d{3})+( bytes)?\b"), "BYTES"),
    (re.compile(r"\b\d+(\.\d+)? ?m?s\b"), "SECONDS"),
    (re.compile(r"[─-╿]{2,}"), "--"),
    (re.compile(r"[ \t]+"), " "),
]
"""What may differ from run to run: ids (commits carry times), times, sizes (versions of zstandard)."""


def comparable(output: str) -> str:
    """Output without what differs from run to run."""
    for pattern, word in _SAME:
        output = pattern.sub(word, output)
    return output.strip()


def check(page: Path, folder: Path) -> None:
    """Run a page; each command must end and print as shown."""
    walk = Walk(folder)
    for block in blocks(page):
        if block.language == "python":
            walk.python(block, page)
        elif block.language == "console":
            for command in commands(block):
                status, output = walk.run(walk.translated(command.text))
                walk.learn(command.output, output)
                where = f"{page.name}:{block.line}: $ {command.text}"
                assert status == command.status, f"{where}\nended with {status}, and printed\n{output}"
                assert comparable(output) == comparable(command.output), f"{where}\nprinted\n{output}"


def rewrite(page: Path, folder: Path) -> None:
    """Run a page and put what its commands print into it."""
    walk = Walk(folder)
    lines = page.read_text().splitlines()
    grown = 0
    for block in blocks(page):
        if block.language == "python":
            walk.python(block, page)
        elif block.language == "console":
            shown = []
            for command in commands(block):
                text = walk.translated(command.text)
                status, output = walk.run(text)
                walk.learn(command.output, output)
                shown += [f"$ {text}", *output.splitlines()]
                if status:
                    shown += ["$ echo $?", str(status)]
            start, length = block.line - 1 + grown, block.text.count("\n")
            lines[start : start + length] = shown
            grown += len(shown) - length
    text = "\n".join(lines) + "\n"
    if page.name == "format.md":
        text = text.replace(block_after(page, "## Trees", "text"), (codes.__doc__ or "").strip() + "\n")
    page.write_text(text)


# -- headings and links ---------------------------------------------------------------------------


def headings(page: Path) -> list[str]:
    """The text of all headings."""
    inside, found = False, []
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside = not inside
        elif not inside and (heading := re.match(r"#+ (.*)", line)):
            found.append(heading[1])
    return found


def anchor(heading: str) -> str:
    """What a link calls a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.lower())
    return text.replace(" ", "-")


def links(page: Path) -> Iterator[str]:
    """Targets of all links that do not leave the project."""
    inside = False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", line)):
                if not re.match(r"[a-z]+:", target):
                    yield target


def table(page: Path, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its head. Empty cells are kept."""
    text = page.read_text()
    rows = []
    for line in text[text.index(f"\n{heading}\n") + len(heading) + 2 :].splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows[2:]


def main() -> None:
    """Write the output of commands anew."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            rewrite(Path(name), Path(folder))


if __name__ == "__main__":
    main()
