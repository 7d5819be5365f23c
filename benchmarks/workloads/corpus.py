"""The text: docstrings of Python's own standard library, so that nothing needs a download."""

from __future__ import annotations

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Entry:
    """A documented function or class."""

    module: str  # top-level module or package
    signature: str  # qualified name and parameters
    summary: str  # the docstring's first paragraph
    text: str  # the whole docstring


@cache
def entries() -> tuple[Entry, ...]:
    """All documented functions and classes, in an order that depends on nothing but the sources."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Entry] = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        # Tests repeat themselves, and installed packages differ between machines.
        if any(part in ("site-packages", "dist-packages", "test", "tests", "idlelib") for part in parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some sources warn when they are parsed
                tree = ast.parse(file.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        found.extend(_walk(tree, parts[0], ".".join(parts)))
    return tuple(found)


def pairs() -> list[tuple[str, str]]:
    """(signature, summary) of entries whose summaries say enough to be told apart."""
    unique = {entry.summary: entry.signature for entry in entries() if len(entry.summary) >= 20}
    return [(signature, summary) for summary, signature in unique.items()]


def text() -> str:
    """All signatures and docstrings, one after another."""
    return "\n\n".join(f"{entry.signature}\n{entry.text}" for entry in entries())


def _walk(node: ast.AST, module: str, prefix: str) -> Iterator[Entry]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _Documented):
            continue
        name = f"{prefix}.{child.name}"
        docstring = ast.get_docstring(child)
        if docstring:
            arguments = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
            paragraph = inspect.cleandoc(docstring).split("\n\n")[0]
            yield Entry(module, name + arguments, " ".join(paragraph.split()), docstring)
        yield from _walk(child, module, name)
