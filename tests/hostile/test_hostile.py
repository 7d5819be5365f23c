"""Hostile repositories under every verb: one clear line, a documented exit code, nothing outside touched.

A verb runs in a process with little memory and time. One that was added since runs with `--json` and without
arguments, until somebody gives it a better line here. A failure names the repository and the verb; the
builders in `repositories.py` are deterministic.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptvcs.cli.main import VERBS
from tests.hostile.attempts import attempt, judge, listing
from tests.hostile.repositories import EVIL, HOSTILE

LOOKS: list[list[str]] = [
    ["log"],
    ["log", "--all", "--graph", "-n", "50"],
    ["log", "--json", "-n", "50"],
    ["show"],
    ["show", "--json"],
    ["show", "HEAD~1"],
    ["ls"],
    ["ls", "--json"],
    ["diff", "HEAD~1", "HEAD"],
    ["branch"],
    ["branch", "--json"],
    ["tag"],
    ["status"],
    ["reflog"],
    ["reflog", "--json"],
    ["config"],
    ["show", "main@best:val_loss"],
    ["show", "main@{1}"],
    ["show", "../../outside/x"],
    ["show", EVIL],
    ["fsck"],
    ["fsck", "--full", "--json"],
    ["gc", "--dry-run"],
]
CHANGES: list[list[str]] = [
    ["export", "HEAD", "--format", "safetensors", "--to", "../out/st", "--tensors-only"],
    ["export", "HEAD", "--format", "torch", "--to", "../out/pt"],
    ["checkout", "HEAD", "--to", "../out"],
    ["branch", "new"],
    ["switch", "new"],
    ["commit", "notes.txt", "-m", "more"],
    ["switch", "main"],
    ["checkout", "main"],
    ["branch", "-d", "new", "--force"],
    ["tag", "w1"],
    ["config", "compression", "fast"],
    ["gc", "--grace", "0"],
    ["fsck", "--rebuild"],
    ["log", "--all", "--oneline", "-n", "50"],
    ["gc", "--grace", "0"],
    ["fsck", "--full"],
]


ALL = bool(os.environ.get("CKPT_HOSTILE"))  # as it was before tests clean the environment
PRECIOUS = ("precious.txt", "old-photos/1.jpg", "meta-data/x", "11111111-1111-1111-1111-111111111111-1.pack")


def lines(place: int) -> Iterator[list[str]]:
    """The command lines for one repository: a sixth of those that look, and a quarter of those that change.

    `CKPT_HOSTILE=1` runs all of them on each.
    """
    known = {line[0] for line in (*LOOKS, *CHANGES)}
    looks = LOOKS + [[verb, "--json"] for verb in VERBS if verb not in known]
    yield from looks if ALL else looks[place % 6 :: 6]
    yield from CHANGES if ALL else CHANGES[place % 4 :: 4]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.slow
def test_no_verb_is_led_astray(name: str, tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "work"
    for each in (outside, folder, tmp_path / "out"):
        each.mkdir()
    for precious in PRECIOUS:
        (outside / precious).parent.mkdir(exist_ok=True)
        (outside / precious).write_text("precious\n")
    before = listing(outside)
    HOSTILE[name](folder)
    for arguments in lines(list(HOSTILE).index(name)):
        judge(arguments, *attempt(folder, *arguments))
        assert listing(outside) == before, f"`ckpt {' '.join(arguments)}` wrote outside"
        assert {path.name for path in tmp_path.iterdir()} == {"outside", "work", "out"}, arguments
    shutil.rmtree(folder)
