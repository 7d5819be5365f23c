"""ckpt log, ckpt show, ckpt reflog."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ckptvcs import Repo
from ckptvcs.history.commit import encode_commit
from ckptvcs.ids import Kind, object_id
from ckptvcs.store import Drop, Move, Note, Publication
from tests.cli.command import COMMIT_KEYS, ckpt, commit_state, refused, state


def without_ids(text: str) -> str:
    """Text with ids and ages that do not change."""
    text = re.sub(r"\b[0-9a-f]{8}\b", "########", text)
    return re.sub(r"just now|\d+ \w+ ago", "AGE", text)


def test_log_graph_of_all(states: Path) -> None:
    done = ckpt(states, "log", "--graph", "--all")
    assert (
        without_ids(done.out).rstrip()
        == r"""
* ######## (HEAD -> main) third
|   step 30  val_loss=0.5  acc=nan  AGE
* ######## second
|   step 20  val_loss=0.05  AGE
| * ######## (other) forked
| |   step 15  val_loss=0.0666667  AGE
|/
* ######## (tag: v1) first
    step 10  epoch 1  val_loss=0.1  AGE
""".strip("\n")
    )
    assert max(map(len, done.out.splitlines())) <= 80


def test_log_oneline_and_count(states: Path) -> None:
    done = ckpt(states, "log", "main", "-n", "2", "--oneline")
    assert without_ids(done.out).splitlines() == [
        "######## (HEAD -> main) third  step 30  val_loss=0.5  acc=nan",
        "######## second  step 20  val_loss=0.05",
    ]


def test_log_json(states: Path) -> None:
    found = ckpt(states, "log", "other", "--json").json
    assert set(found) == {"commits"}
    assert [commit["message"] for commit in found["commits"]] == ["forked", "first"]
    assert all(set(commit) == COMMIT_KEYS for commit in found["commits"])
    first = found["commits"][1]
    assert first["config"] == {"optimizer": {"lr": 3e-4}, "seed": 7}
    assert first["refs"] == ["tag: v1"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", first["time"])


def test_numbers_that_json_does_not_know_are_text(states: Path) -> None:
    assert ckpt(states, "log", "-n", "1", "--json").json["commits"][0]["metrics"]["acc"] == "nan"


def test_log_marks_fresh_starts_wraps_and_cleans(repo: Repo, folder: Path) -> None:
    commit_state(repo, 1)
    with Repo.open(folder) as fresh:  # restored nothing
        many = {f"metric_{n}": n / 7 for n in range(12)}
        made = commit_state(fresh, 2, "bad \x1b[31m text", metrics=many)
    repo.record([Note(made.id, "mmlu", 0.41)], "note")
    done = ckpt(folder, "log", "--graph")
    assert "bad \\x1b[31m text" in done.out
    assert "\x1b" not in done.out
    assert "[fresh start]" in done.out
    assert "mmlu=0.41" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert all(line[0] in "*|" or line.startswith("  ") for line in done.out.splitlines())


@pytest.mark.parametrize(
    ("revision", "code", "words"),
    [
        ("mian", 4, ("'mian'", "did you mean main")),
        ("0123abcd", 4, ("0123abcd",)),
        ("main~9", 4, ("main~9",)),
        ("main@step:11", 4, ("no commit has step 11", "steps near it: 10")),
        ("main~~x", 2, ("cannot read 'x'",)),
        ("main~1@{1}", 2, ("only a ref has earlier positions",)),
    ],
)
def test_log_refuses(states: Path, revision: str, code: int, words: tuple[str, ...]) -> None:
    refused(states, "log", revision, code=code, words=words)


def test_an_unborn_branch_has_no_log(repo: Repo, folder: Path) -> None:
    refused(
        folder,
        "log",
        code=4,
        words=(
            "main",
            "commit something first",
        ),
    )
    assert ckpt(folder, "log", "--all", "--json").json == {"commits": []}


def test_an_ambiguous_prefix_lists_the_candidates(repo: Repo, folder: Path) -> None:
    base = commit_state(repo, 1)
    seen: dict[str, bytes] = {}
    for time in range(1_000_000):  # until two ids begin alike
        payload = encode_commit(
            tree=base.tree, parents=(), origin=None, author="", time=time, message="", step=None,
            epoch=None, metrics={}, config={}, overrides={}, environment={}, sizes={},
        )  # fmt: skip
        prefix = str(object_id(Kind.COMMIT, payload))[:4]
        if prefix in seen:
            break
        seen[prefix] = payload
    for name, data in (("x", seen[prefix]), ("y", payload)):
        with repo._store.writer() as writer:
            (id,) = writer.put_objects(Kind.COMMIT, [data])
            move = Move(f"refs/heads/{name}", None, id)
            assert writer.publish(Publication(id, (move,), move, (), 0, "", ""))
    done = refused(
        folder,
        "show",
        prefix,
        code=2,
        words=(
            repr(prefix),
            "give more digits",
        ),
    )
    assert all(str(repo.resolve(name).id)[:8] in done.err for name in ("x", "y"))


def test_show(states: Path) -> None:
    out = ckpt(states, "show", "v1").out
    with Repo.open(states) as repo:
        first = repo.resolve("v1")
    assert str(first.id) in out.splitlines()[0]
    assert "(tag: v1)" in out.splitlines()[0]
    for line in (
        "step    10",
        "epoch   1",
        "    first",
        "  val_loss: 0.1",
        "    lr: 0.0003",
        "  model: 4.8 kB",
    ):
        assert line in out.splitlines(), (line, out)
    assert "  python: 3." in out


def test_show_json_and_error(states: Path) -> None:
    found = ckpt(states, "show", "--json").json
    assert set(found) == COMMIT_KEYS
    assert found["message"] == "third"
    failed = ckpt(states, "show", "nope", "--json", code=4)
    assert failed.err == ""
    assert set(failed.json) == {"error"}
    assert set(failed.json["error"]) == {"code", "message", "hint", "exit"}
    assert failed.json["error"]["code"] == "not-found"
    assert failed.json["error"]["exit"] == 4


def test_reflog(files: Path) -> None:
    with Repo.open(files) as repo:
        first, second = repo.resolve("main~1").id, repo.resolve("main").id
        repo.branch("gone", second)
        repo.delete_branch("gone")
    out = ckpt(files, "reflog", "main").out
    assert re.match(rf"main@\{{0\}}  {second.short}  .*commit: files 2\nmain@\{{1\}}  {first.short} ", out)
    out = ckpt(files, "reflog", "gone").out
    assert "delete branch: gone" in out
    assert second.short in out
    assert len(ckpt(files, "reflog", "-n", "2").out.splitlines()) == 2

    found = ckpt(files, "reflog", "main", "--json").json["entries"]
    assert {frozenset(entry) for entry in found} == {
        frozenset({"position", "time", "time_ns", "who", "why", "operations", "info"})
    }
    assert found[0]["operations"] == [
        {"kind": "move", "name": "refs/heads/main", "old": str(first), "new": str(second)}
    ]
    refused(files, "reflog", "nope", code=4, words=("'nope'",))


# -- many branches, ranges, filters ---------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warm-up of two commits on main, three branches of two commits from its tip, one fresh start."""
    folder = tmp_path_factory.mktemp("sweep")
    with Repo.init(folder) as repo:
        for step in (1, 2):
            commit_state(repo, step, f"warm {step}")
        for number, rate in enumerate((0.1, 0.2, 0.3)):
            branch = repo.on(f"sweep/lr{rate}")
            branch.restore(state(0), "main")
            for step in (3, 4):
                loss = float("nan") if rate == 0.3 else rate / step
                config = {"optimizer": {"lr": rate, "betas": [0.9, 0.99]}, "seed": 7}
                made = commit_state(
                    branch, step, f"try {rate}", metrics={"val_loss": loss, "acc": number / 3}, config=config
                )
        with Repo.open(folder, branch="sweep/lr0.3") as fresh:
            commit_state(fresh, 1, "anew", metrics={"val_loss": 0.5})
        repo.record([Drop(made.id, ("model",))], "test")
    return folder


def titles(done: Any) -> list[str]:
    return [commit["message"] for commit in done.json["commits"]]


def test_log_graph_of_branches(sweep: Path) -> None:
    done = ckpt(sweep, "log", "--graph", "--branches", "sweep/*", "--oneline", COLUMNS="80")
    assert (
        without_ids(done.out).rstrip()
        == r"""
* ######## (sweep/lr0.3) anew  step 1  val_loss=0.5  [fresh start]
* ######## try 0.3  step 4  val_loss=nan  acc=0.666667  [dropped: model]
* ######## try 0.3  step 3  val_loss=nan  acc=0.666667
| * ######## (sweep/lr0.1) try 0.1  step 4  val_loss=0.025  acc=0
| * ######## try 0.1  step 3  val_loss=0.0333333  acc=0
|/
| * ######## (sweep/lr0.2) try 0.2  step 4  val_loss=0.05  acc=0.333333
| * ######## try 0.2  step 3  val_loss=0.0666667  acc=0.333333
|/
* ######## (HEAD -> main) warm 2  step 2  val_loss=0.5
* ######## warm 1  step 1  val_loss=1
""".strip("\n")
    )


def test_log_in_brief_tells_where_something_happens(sweep: Path) -> None:
    done = ckpt(sweep, "log", "--graph", "--all", "--brief", "--oneline")
    assert (
        without_ids(done.out).rstrip()
        == r"""
* ######## (sweep/lr0.3) anew  step 1  val_loss=0.5  [fresh start]
| * ######## (sweep/lr0.1) try 0.1  step 4  val_loss=0.025  acc=0
|/
| * ######## (sweep/lr0.2) try 0.2  step 4  val_loss=0.05  acc=0.333333
|/
* ######## (HEAD -> main) warm 2  step 2  val_loss=0.5
* ######## warm 1  step 1  val_loss=1
""".strip("\n")
    )
    with Repo.open(sweep) as repo:
        assert [c.message for c in repo.log("sweep/lr0.1", brief=True)] == ["try 0.1", "warm 2", "warm 1"]
        assert [c.message for c in repo.log("main..sweep/lr0.2", brief=True)] == ["try 0.2", "try 0.2"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["main..sweep/lr0.1"], ["try 0.1"] * 2),
        (["..sweep/lr0.1", "-n", "1"], ["try 0.1"]),
        (["sweep/lr0.1...sweep/lr0.2"], ["try 0.1"] * 2 + ["try 0.2"] * 2),
        (["sweep/lr0.1", "^main~1"], ["try 0.1"] * 2 + ["warm 2"]),
        (["main..main"], []),
        (["--branches", "sweep", "--metric", "val_loss<0.04"], ["try 0.1"] * 2),
        (["--branches", "sweep", "--metric", "acc>0.3", "--metric", "val_loss<=0.05"], ["try 0.2"]),
        (["--branches", "sweep", "--metric", "val_loss=nan"], ["try 0.3"] * 2),
        (["--branches", "sweep", "--metric", "acc", "--step", "..3"], ["try 0.3", "try 0.1", "try 0.2"]),
        (["--branches", "*0.1", "--step", "2..3"], ["try 0.1", "warm 2"]),
        (["sweep/lr0.1", "--first-parent", "--step", "1"], ["warm 1"]),
        (["sweep/lr0.1", "--grep", "^WARM", "-n", "1"], ["warm 2"]),
        (["--author", "nobody"], []),
        (["--author", ".@", "--since", "1d"], ["warm 2", "warm 1"]),
        (["--until", "2001-02-03"], []),
    ],
)
def test_log_chooses(sweep: Path, arguments: list[str], wanted: list[str]) -> None:
    assert titles(ckpt(sweep, "log", *arguments, "--json")) == wanted


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--branches", "swoop"], 4, ("'swoop'", "sweep")),
        (["--metric", "val_loss<much"], 2, ("'much' is no number",)),
        (["--metric", "<3"], 2, ("'<3'",)),
        (["--step", "9..1"], 2, ("ends before it begins",)),
        (["--step", "x"], 2, ("1000..2000",)),
        (["--since", "yesterday"], 2, ("'yesterday'", "2d")),
        (["--grep", "("], 2, ("cannot be looked for",)),
        (["main", "sweep/lr0.1", "--first-parent"], 2, ("one revision",)),
        (["main..nope"], 4, ("'nope'",)),
    ],
)
def test_log_refuses_what_it_cannot_read(
    sweep: Path, arguments: list[str], code: int, words: tuple[str, ...]
) -> None:
    refused(sweep, "log", *arguments, code=code, words=words)


def test_a_filtered_graph_connects_what_it_shows(sweep: Path) -> None:
    done = ckpt(sweep, "log", "--graph", "--branches", "*", "--step", "4..", "--oneline")
    graph = [re.sub(r" ?[0-9a-f]{8} .*", "", line) for line in done.out.splitlines()]
    assert graph == ["*", "| *", "|/", "| *", "|/"]
    done = ckpt(
        sweep, "log", "--graph", "--branches", "*", "--grep", "try|warm 1", "--step", "1", "--oneline"
    )
    assert [line.split()[0] for line in done.out.splitlines()] == ["*"]
