"""A loaded interpreter that forks a process for each command line: `python -m tests.cli.loaded`.

Starting Python and importing numpy takes ten times longer than the command does. Requests and answers are
JSON lines on standard input and output.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any, NoReturn

import ckptvcs.repo  # noqa: F401 - what is loaded before the fork
from ckptvcs.cli import main


def serve() -> None:
    """Answer requests until standard input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                run(request, out.fileno(), err.fileno())
            _, status = os.waitpid(child, 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
            for name, file in (("out", out), ("err", err)):
                file.seek(0)
                answer[name] = file.read().decode()
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def run(request: dict[str, Any], out: int, err: int) -> NoReturn:
    """Be one `ckpt` process."""
    code = 99  # anything but an exit code of ckpt
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        try:
            main(request["arguments"])
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 98
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
