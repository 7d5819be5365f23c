"""ckpt note, best, compare, plot, and show of parts."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ckptvcs import Repo
from tests.cli.command import COMMIT_KEYS, ckpt, refused


def commit(repo: Repo, step: int, loss: float, rate: float) -> None:
    weight = np.linspace(-1, 1, 3000, dtype=np.float32)
    if rate == 0.3:
        weight[:3] = np.nan, np.inf, 0
    state = {"model": {"weight": weight, "bias": np.arange(3.0)}, "name": "tiny", "note": [1, 2]}
    config = {"optimizer": {"lr": rate, "name": "adam"}, "seed": 7}
    repo.commit(state, f"try {rate}", step=step, metrics={"val_loss": loss, "score": step}, config=config)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """main with two commits, and three branches from its tip, of which one diverges."""
    folder = tmp_path_factory.mktemp("sweep")
    with Repo.init(folder) as repo:
        for step in (1, 2):
            commit(repo, step, 1 / step, 0.1)
        for rate in (0.2, 0.3, 0.4):
            branch = repo.on(f"sweep/lr{rate}")
            branch.restore({}, "main", strict=False)
            for step in range(3, 9):
                commit(branch, step, math.nan if rate == 0.4 and step > 5 else rate / step, rate)
    return folder


def test_compare(sweep: Path) -> None:
    done = ckpt(sweep, "compare", "sweep", "main", PYTHONIOENCODING="utf-8")
    assert re.sub(r"\b[0-9a-f]{8}\b", "########", done.out).strip() == (
        """
fork point ######## try 0.1  step 2

config
             optimizer.lr
sweep/lr0.2  0.2
sweep/lr0.3  0.3
sweep/lr0.4  0.4
main         0.1

val_loss       last  best (min)  at      curve
sweep/lr0.2   0.025       0.025  step 8  ▄▂▂▁▁▁
sweep/lr0.3  0.0375      0.0375  step 8  ▆▄▃▂▂▁
sweep/lr0.4     nan        0.08  step 5  █▆▅×××
main            0.5         0.5  step 2  █

score        last  best (?)  at  curve
sweep/lr0.2     8         -      ▁▂▄▅▇█
sweep/lr0.3     8         -      ▁▂▄▅▇█
sweep/lr0.4     8         -      ▁▂▄▅▇█
main            2         -      ▁
""".strip()
    )
    assert max(map(len, done.out.splitlines())) <= 80


def test_compare_json(sweep: Path) -> None:
    found = ckpt(sweep, "compare", "main", "sweep/lr0.4", "--metric", "val_loss", "--json").json
    assert set(found) == {"fork", "config", "sides"}
    assert found["config"] == ["optimizer.lr"]
    main, other = found["sides"]
    assert set(main) == {"name", "tip", "base", "commits", "config", "overrides", "metrics"}
    assert main["tip"] == found["fork"]
    assert (main["commits"], other["commits"]) == (0, 6)
    assert other["config"] == {"optimizer.lr": 0.4}
    series = other["metrics"]["val_loss"]
    assert set(other["metrics"]) == {"val_loss"}
    assert series["mode"] == "min"
    assert series["final"]["value"] == "nan"
    assert (series["best"]["step"], series["best"]["value"]) == (5, 0.08)
    assert [point["step"] for point in series["points"]] == [3, 4, 5, 6, 7, 8]


def test_compare_without_block_characters(sweep: Path) -> None:
    done = ckpt(sweep, "compare", "main", "sweep/lr0.2", PYTHONIOENCODING="ascii")
    assert done.out.isascii()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["compare", "main"], 2, ("nothing to compare",)),
        (["compare", "main", "nope*"], 4, ("nope*",)),
        (["compare", "main", "sweep/lr0.2", "--metric", "acc"], 2, ("there are: val_loss, score",)),
        (["best", "val_los"], 4, ("there are score, val_loss",)),
        (["best", "score"], 2, ("ckpt config metric.score.mode",)),
        (["plot", "val_loss", "-o", "x.gif"], 2, (".svg or .png",)),
        (["plot", "nope", "-o", "x.svg"], 4, ("nope",)),
        (["note", "main", "--metric", "a"], 2, ("NAME=NUMBER",)),
        (["note", "main", "--metric", "a=b"], 2, ("'b' is not a number",)),
        (["note", "main", "--remove", "a"], 4, ("no note a",)),
        (["show", "main:nope"], 4, ("nope",)),
        (["show", "nope:model"], 4, ("'nope'",)),
    ],
)
def test_refuses(sweep: Path, arguments: list[str], code: int, words: tuple[str, ...]) -> None:
    refused(sweep, *arguments, code=code, words=words)


def test_best(sweep: Path) -> None:
    done = ckpt(sweep, "best", "val_loss", "-n", "2")
    assert re.sub(r"\b[0-9a-f]{8}\b", "########", done.out).splitlines() == [
        "    0.025  ########  sweep/lr0.2    step 8  try 0.2",
        "0.0285714  ########  sweep/lr0.2~1  step 7  try 0.2",
    ]
    found = ckpt(sweep, "best", "val_loss", "--branches", "*0.4", "--json").json
    assert (found["metric"], found["mode"]) == ("val_loss", "min")
    (best,) = found["best"]
    assert set(best) == {"revision", "branch", "value", "commit"}
    assert (best["revision"], best["branch"], best["value"]) == ("sweep/lr0.4~3", "sweep/lr0.4", 0.08)
    assert set(best["commit"]) == COMMIT_KEYS


def test_note(repo: Repo, folder: Path) -> None:
    commit(repo, 1, 0.5, 0.1)
    assert ckpt(folder, "note").out.splitlines()[1:] == ["  no notes"]
    done = ckpt(folder, "note", "main", "--metric", "mmlu=0.41", "--text", "verdict=good\x1b", "--json")
    assert set(done.json) == {"commit", "metrics", "notes", "added"}
    assert done.json["metrics"] == {"val_loss": 0.5, "score": 1, "mmlu": 0.41}
    assert (done.json["notes"], done.json["added"]) == ({"verdict": "good\x1b"}, ["mmlu"])
    assert "mmlu=0.41" in ckpt(folder, "log").out
    shown = ckpt(folder, "show").out
    assert "  mmlu: 0.41" in shown.splitlines()
    assert "  verdict: good\\x1b" in shown.splitlines()
    out = ckpt(folder, "note", "--remove", "verdict").out
    assert out.splitlines()[1:] == ["  mmlu  0.41"]
    assert ckpt(folder, "log", "--metric", "mmlu>0.4", "--json").json["commits"][0]["notes"] == {}
    ckpt(folder, "config", "metric.mmlu.mode", "max")
    assert ckpt(folder, "best", "mmlu", "--json").json["best"][0]["value"] == 0.41


def test_plot(sweep: Path, folder: Path) -> None:
    path = folder / "out.svg"
    done = ckpt(sweep, "plot", "val_loss", "--branches", "sweep", "-o", path, "--json")
    assert done.json == {
        "file": str(path),
        "metric": "val_loss",
        "by": "step",
        "branches": ["sweep/lr0.2", "sweep/lr0.3", "sweep/lr0.4"],
        "points": 8 + 7 + 7,
    }
    ElementTree.fromstring(path.read_bytes())
    refused(sweep, "plot", "val_loss", "-o", path, code=2, words=("--force",))
    assert (
        "4 curves of val_loss by step" in ckpt(sweep, "plot", "val_loss", "-o", path, "--force", "--log").out
    )


def test_show_of_a_tensor(sweep: Path) -> None:
    out = ckpt(sweep, "show", "sweep/lr0.3@best:val_loss:model/weight", PYTHONIOENCODING="utf-8").out
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in out.split("\n\n")[0].splitlines())
    assert (rows["dtype"], rows["shape"], rows["bytes"]) == ("float32", "[3000]", "12,000")
    assert (rows["NaN"], rows["+Inf"], rows["zeros"]) == ("1", "1", "1 of 3,000")
    assert rows["max"] == "1"
    bars = out.split("\n\n")[1].splitlines()
    assert len(bars) == 20
    assert max(map(len, out.splitlines())) <= 80
    found = ckpt(sweep, "show", "main:model/bias", "--json").json
    assert set(found) == {"commit", "path", "dtype", "shape", "bytes", "chunks", "statistics"}
    assert found["statistics"] == {
        "count": 3, "min": 0.0, "max": 2.0, "mean": 1.0, "std": pytest.approx((2 / 3) ** 0.5), "zeros": 1,
        "nan": 0, "positive_inf": 0, "negative_inf": 0, "histogram": [1, *[0] * 9, 1, *[0] * 8, 1],
    }  # fmt: skip


def test_show_of_trees_and_values(sweep: Path, read_only_files: Path) -> None:
    assert ckpt(sweep, "show", ":").out.splitlines() == [
        "model/  2 leaves          12.0 kB",
        "name    str       'tiny'      5 B",
        "note/   2 leaves             16 B",
    ]
    out = ckpt(sweep, "show", "main:model").out.splitlines()
    assert [line.split() for line in out] == [
        ["model/weight", "float32", "[3000]", "12.0", "kB"],
        ["model/bias", "float64", "[3]", "24", "B"],
    ]
    assert "value  'tiny'" in ckpt(sweep, "show", "main:name").out.splitlines()
    found = ckpt(sweep, "show", "main:model", "--json").json
    assert [entry["path"] for entry in found["entries"]] == ["model/weight", "model/bias"]
    out = ckpt(read_only_files, "show", "main:").out
    assert "a.bin" in out
    assert "sub/" in out
    assert len(ckpt(read_only_files, "show", "main:sub/b.txt", "--json").json["files"]) == 1
