"""Revisions: text that names a commit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckptvcs import AmbiguousError, Commit, ConflictError, InvalidError, NotFoundError, ObjectId, Repo
from ckptvcs.history import refs
from ckptvcs.history.revision import ref_history, split_name
from ckptvcs.store import Note

METRICS: list[dict[str, Any]] = [
    {"val_loss": 3.0, "acc": 0.1, "score": 5},
    {"val_loss": 1.0, "acc": 0.5},
    {"val_loss": float("nan"), "acc": 0.9},
    {"val_loss": 1.0, "acc": 0.9, "score": 7},
    {"acc": float("inf") * 0},
]


@pytest.fixture
def line(repo: Repo) -> tuple[Repo, list[Commit]]:
    """Five commits on main: steps 0, 10, 10, 30 and none; with metrics."""
    steps = [0, 10, 10, 30, None]
    pairs = zip(steps, METRICS, strict=True)
    return repo, [repo.commit({"n": n}, f"c{n}", step=s, metrics=m) for n, (s, m) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("main", 4),
        ("HEAD", 4),
        ("@", 4),
        ("refs/heads/main", 4),
        ("main~", 3),
        ("main~1", 3),
        ("main~0", 4),
        ("main~4", 0),
        ("HEAD~2", 2),
        ("@~2", 2),
        ("~2", 2),
        ("main~1~2", 1),
        ("main^", 3),
        ("main^1", 3),
        ("main^0", 4),
        ("main^^", 2),
        ("main^~1", 2),
        ("main~1^", 2),
        ("main@{0}", 4),
        ("main@{1}", 3),
        ("main@{4}", 0),
        ("HEAD@{1}", 3),
        ("@{2}", 2),
        ("main@{1}~1", 2),
        ("main@step:0", 0),
        ("main@step:10", 2),
        ("main@step:30", 3),
        ("@step:0", 0),
        ("main~3@step:10", 1),
        ("main@step:30~1", 2),
        ("main@step:30@step:0", 0),
        ("main@best:val_loss", 1),
        ("main@best:acc", 2),
        ("@best:acc", 2),
        ("main@best:acc~1", 1),
        ("main~2@best:acc", 2),
        ("main~3@best:acc", 1),
        ("main@best:val_loss@step:0", 0),
    ],
)
def test_revisions(line: tuple[Repo, list[Commit]], text: str, number: int) -> None:
    repo, commits = line
    assert repo.resolve(text).message == f"c{number}"
    assert repo.resolve(text).id == commits[number].id


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("nope", NotFoundError, "'nope'"),
        ("main~5", NotFoundError, "beyond the first commit"),
        ("main^2", NotFoundError, "1 parent"),
        ("main~4^", NotFoundError, "0 parent"),
        ("main@{5}", NotFoundError, "moved 4 time"),
        ("main~1@{1}", InvalidError, "only a ref"),
        ("main@step:20", NotFoundError, "no commit has step 20"),
        ("main@step:x", InvalidError, "@step:x"),
        ("main@best:nope", InvalidError, "nope"),
        ("main@best:score", InvalidError, "small or a large score"),
        ("main@best", InvalidError, "needs a metric"),
        ("main~-1", InvalidError, "~-1"),
        ("main@{-1}", InvalidError, "@{-1}"),
        ("main@{x}", InvalidError, "@{x}"),
        ("main~1x", InvalidError, "x"),
        ("f" * 64, NotFoundError, "ffff"),
        ("ffff", NotFoundError, "ffff"),
        ("fff", NotFoundError, "fff"),
        ("\udc80", NotFoundError, "udc80"),
        ("x" * 5000, NotFoundError, "xxx"),
        ("refs/heads/nope", NotFoundError, "nope"),
        ("nope@{1}", NotFoundError, "nope"),
        ("main@best:val_error", NotFoundError, "val_error"),
        ("main~" + "9" * 5000, InvalidError, "5000 digits"),
        ("main^" + "9" * 5000, InvalidError, "5000 digits"),
        ("main@{" + "9" * 5000 + "}", InvalidError, "5000 digits"),
        ("main@step:" + "9" * 5000, InvalidError, "5000 digits"),
        ("main~" + "9" * 50, NotFoundError, "beyond the first commit"),
    ],
)
def test_what_names_nothing(
    line: tuple[Repo, list[Commit]], text: str, error: type[Exception], says: str
) -> None:
    repo, _ = line
    with pytest.raises(error) as caught:
        repo.resolve(text)
    assert says in str(caught.value) or says in repr(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [5, None, b"main", ["main"], 1.5])
def test_a_name_that_is_no_text(line: tuple[Repo, list[Commit]], name: Any) -> None:
    for make in (line[0].branch, line[0].tag, line[0].set_head, refs.branch_ref, refs.tag_ref):
        with pytest.raises(InvalidError, match="cannot be the name of a"):
            make(name)


@pytest.mark.parametrize("value", [3, None, b"main", ["main"], 1.5])
def test_what_is_no_text(line: tuple[Repo, list[Commit]], value: Any) -> None:
    with pytest.raises(InvalidError, match="revision is text"):
        line[0].resolve(value)


def test_steps_near_a_missing_one_are_named(line: tuple[Repo, list[Commit]]) -> None:
    with pytest.raises(NotFoundError) as caught:
        line[0].resolve("main@step:12")
    assert "10, 10, 0" in str(caught.value.hint)


def test_prefixes(line: tuple[Repo, list[Commit]]) -> None:
    repo, commits = line
    for commit in commits:
        for length in (8, 9, 15, 32, 63, 64):
            assert repo.resolve(str(commit.id)[:length]).id == commit.id
        assert repo.resolve(str(commit.id).upper()[:12]).id == commit.id
        assert repo.resolve(str(commit.id)[:12] + "~0").id == commit.id
    tree = commits[0].tree
    with pytest.raises(NotFoundError):  # revisions name commits only
        repo.resolve(str(tree))
    with pytest.raises(NotFoundError):
        repo.resolve(tree)
    with pytest.raises(NotFoundError):
        repo.resolve(ObjectId(bytes(32)))


def test_refs_win_over_ids_and_branches_over_tags(line: tuple[Repo, list[Commit]]) -> None:
    repo, commits = line
    name = str(commits[0].id)[:8]
    repo.branch(name, commits[3])
    assert repo.resolve(name).id == commits[3].id
    assert repo.resolve(str(commits[0].id)[:9]).id == commits[0].id
    repo.tag("both", commits[1])
    assert repo.resolve("both").id == commits[1].id
    repo.branch("both", commits[2])
    assert repo.resolve("both").id == commits[2].id
    assert repo.resolve("refs/tags/both").id == commits[1].id


def test_lost_commits_are_revisions(line: tuple[Repo, list[Commit]]) -> None:
    repo, commits = line
    rival = repo.on("main")
    repo.commit({"n": 5})
    with pytest.raises(ConflictError) as caught:
        rival.commit({"n": 6}, "lost one")
    rev = str(caught.value.rescued)
    assert repo.resolve(rev).message == "lost one"
    assert repo.resolve(f"{rev}~1").id == commits[-1].id
    assert repo.resolve(f"refs/{rev}").message == "lost one"


def test_positions_survive_deletion_and_count_every_move(line: tuple[Repo, list[Commit]]) -> None:
    repo, commits = line
    repo.branch("b", commits[1])
    repo.delete_branch("b")
    assert repo.resolve("b@{1}").id == commits[1].id
    with pytest.raises(NotFoundError, match="pointed at nothing"):
        repo.resolve("b@{0}")
    with pytest.raises(NotFoundError, match="'b'"):
        repo.resolve("b")
    with pytest.raises(NotFoundError, match="'b'"):
        repo.resolve("b~1")
    repo.branch("b", commits[2])
    assert repo.resolve("b@{0}").id == repo.resolve("b").id == commits[2].id
    assert repo.resolve("b@{2}").id == commits[1].id
    assert [target for target, _ in ref_history(repo._store, "refs/heads/b")] == [
        commits[2].id, None, commits[1].id,
    ]  # fmt: skip


def test_head_of_a_detached_handle(line: tuple[Repo, list[Commit]], folder: Path) -> None:
    repo, commits = line
    repo.set_head(commits[2])
    with Repo.open(folder) as detached:
        assert detached.resolve("HEAD").id == commits[2].id
        assert detached.resolve("HEAD~1").id == commits[1].id
        assert detached.resolve("HEAD@{0}").id == commits[2].id
        assert detached.resolve("HEAD@{1}").id == commits[4].id  # it was on main before


def test_an_unborn_branch(repo: Repo) -> None:
    for text in ("HEAD", "main", "@", "HEAD~1", "main@step:1"):
        with pytest.raises(NotFoundError, match="main has none yet"):
            repo.resolve(text)


def test_modes(line: tuple[Repo, list[Commit]], folder: Path) -> None:
    repo, _ = line
    repo.configure("metric.score.mode", "min")
    assert repo.resolve("main@best:score").message == "c0"
    repo.configure("metric.score.mode", "max")
    assert repo.resolve("main@best:score").message == "c3"
    repo.configure("metric.acc.mode", "min")  # the config wins over the name
    assert repo.resolve("main@best:acc").message == "c0"
    with Repo.open(folder) as other:
        assert other.resolve("main@best:score").message == "c3"


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("loss", 0),
        ("val_loss", 0),
        ("eval/error", 0),
        ("perplexity", 0),
        ("acc", 1),
        ("val.accuracy", 1),
        ("top5_acc", 1),
    ],
)
def test_modes_by_name(repo: Repo, name: str, best: int) -> None:
    commits = [repo.commit({"n": n}, metrics={name: float(n)}) for n in range(2)]
    assert repo.resolve(f"main@best:{name}").id == commits[best].id
    assert repo.resolve("main@best").id == commits[best].id  # the only metric there is


def test_nan_alone_is_never_best(repo: Repo) -> None:
    repo.commit({}, metrics={"loss": float("nan")})
    with pytest.raises(NotFoundError, match="metric loss"):
        repo.resolve("main@best:loss")


def test_notes_count_as_metrics(line: tuple[Repo, list[Commit]]) -> None:
    repo, commits = line
    assert repo.record([Note(commits[4].id, "val_loss", 0.25)], "note")
    assert repo.resolve("main@best:val_loss").id == commits[4].id
    assert repo.metrics(commits[4])["val_loss"] == 0.25
    assert "val_loss" not in repo.resolve(commits[4].id).metrics
    assert repo.record([Note(commits[4].id, "val_loss", None)], "note")
    assert repo.resolve("main@best:val_loss").id == commits[1].id


def test_ambiguity(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Commit] = {}
    for n in range(3000):
        commit = repo.on(f"n{n}").commit({"n": n})
        other = seen.setdefault(str(commit.id)[:4], commit)
        if other is not commit:
            break
    with pytest.raises(AmbiguousError, match="beginning of 2 commit ids"):
        repo.resolve(str(commit.id)[:4] + "~0")


# -- text that names many -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "numbers"),
    [
        (["main"], [4, 3, 2, 1, 0]),
        (["main~3..main"], [4, 3, 2]),
        (["main~3.."], [4, 3, 2]),
        (["..main~3"], []),
        (["main~1...main~3"], [3, 2]),
        (["main", "^main~2"], [4, 3]),
        (["^main~2", "main"], [4, 3]),
        (["^"], [3, 2, 1, 0]),
        (["^1~1"], [2, 1, 0]),
        (["main@step:0..main@best:val_loss"], [1]),
        ([], []),
    ],
)
def test_sets(line: tuple[Repo, list[Commit]], texts: list[str], numbers: list[int]) -> None:
    repo, _ = line
    assert [commit.message for commit in repo.log(texts)] == [f"c{n}" for n in numbers]


def test_a_set_of_unknown_names(line: tuple[Repo, list[Commit]]) -> None:
    repo, _ = line
    for text in ("nope..main", "main..nope", "^nope", "main....main"):
        with pytest.raises((NotFoundError, InvalidError)):
            repo.log(text)


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("main", ("main", None)),
        ("main:", ("main", "")),
        (":model", ("", "model")),
        ("main:a:b", ("main", "a:b")),
        ("main@step:10", ("main@step:10", None)),
        ("main@step:10:model/w", ("main@step:10", "model/w")),
        ("main@best:val_loss~1:w", ("main@best:val_loss~1", "w")),
    ],
)
def test_names_behind_revisions(text: str, split: tuple[str, str | None]) -> None:
    assert split_name(text) == split
