"""The circumstances of a commit: library versions, code revision, host and command line.

Captured once per process. Secrets on the command line are masked by the name of their option.
"""

from __future__ import annotations

import functools
import platform
import re
import subprocess
import sys
from typing import Any, Final

from ckptvcs import __version__

_LIBRARIES: Final = ("numpy", "torch", "jax", "tensorflow", "keras", "transformers", "lightning")
_SECRET = re.compile(r"(?i)(key|token|secret|passw|credential|auth)")
_LOGIN_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_MASK: Final = "***"


@functools.cache
def capture() -> dict[str, Any]:
    """The environment of this process, as nested plain values. Never raises."""
    return {
        "ckptvcs": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "argv": masked(sys.argv),
        "libraries": _versions(),
        "code": _code_revision(),
    }


def _versions() -> dict[str, str]:
    """Versions of the frameworks that are loaded. None is imported for this."""
    found = {}
    for name in _LIBRARIES:
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            found[name] = str(version)
    return found


def masked(argv: list[str]) -> list[str]:
    """The command line with *** for the values of options that sound like secrets, whatever they look
    like, and for the login in a URL."""
    shown: list[str] = []
    hide_next = False
    for word in argv:
        name, equals, _ = word.partition("=")
        if hide_next and not word.startswith("--"):
            shown.append(_MASK)
            hide_next = False
            continue
        if equals and _SECRET.search(name):
            shown.append(f"{name}={_MASK}")
        else:
            shown.append(_LOGIN_IN_URL.sub(f"{_MASK}@", word))
        hide_next = word.startswith("-") and not equals and bool(_SECRET.search(word))
    return shown


def _code_revision() -> dict[str, Any] | None:
    revision = _git("rev-parse", "HEAD")
    if revision is None:
        return None
    return {"git": revision.strip(), "dirty": bool(_git("status", "--porcelain", "-uno"))}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, timeout=3, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")
