"""Notes, best commits, comparisons and curves, on repositories."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from ckptvcs import Commit, ExistsError, InvalidError, NotFoundError, Repo, charts
from ckptvcs.history.curves import Chart, Curve
from ckptvcs.history.notes import LONGEST_TEXT
from ckptvcs.store import Drop


def train(repo: Repo, *values: float, start: int = 1, **config: Any) -> list[Commit]:
    return [
        repo.commit({"n": np.array([n])}, f"step {n}", step=n, metrics={"val_loss": value}, config=config)
        for n, value in enumerate(values, start)
    ]


@pytest.fixture
def forked(repo: Repo) -> tuple[Repo, dict[str, list[Commit]]]:
    """main with three commits, `sweep/a` and `sweep/b` of two from the second."""
    made = {"main": train(repo, 3.0, 2.0, 1.5, optimizer={"lr": 0.1, "name": "adam"}, seed=1)}
    for name, values, rate in (("sweep/a", (1.0, 1.0), 0.2), ("sweep/b", (0.5, math.nan), 0.3)):
        branch = repo.on(name)
        branch.restore({"n": np.array([0])}, made["main"][1])
        made[name] = train(branch, *values, start=3, optimizer={"lr": rate, "name": "adam"}, seed=1)
    return repo, made


# -- notes ----------------------------------------------------------------------------------------


def test_notes_add_replace_and_go(repo: Repo) -> None:
    (made,) = train(repo, 1.0)
    noted = repo.annotate(made, {"mmlu": np.float32(0.5), "val_loss": 0.25}, texts={"verdict": "good"})
    assert noted.metrics == {"val_loss": 0.25, "mmlu": 0.5}
    assert noted.texts == {"verdict": "good"}
    assert repo.metrics(made) == noted.metrics
    assert repo.resolve("main@best:val_loss").id == made.id
    assert repo.resolve("main").metrics == {"val_loss": 1.0}
    noted = repo.annotate("main", remove=["val_loss", "verdict"])
    assert (noted.metrics, noted.texts) == ({"val_loss": 1.0, "mmlu": 0.5}, {})
    with Repo.open(repo.path) as again:
        assert again.notes("main") == noted
    assert repo.reflog(1)[0].why == "note: val_loss, verdict"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, InvalidError, "nothing to note"),
        ({"metrics": {"a b": 1}}, InvalidError, "'a b'"),
        ({"metrics": {"a": "much"}}, InvalidError, "not a number"),
        ({"metrics": {"a": True}}, InvalidError, "not a number"),
        ({"texts": {"a": 3}}, InvalidError, "numbers are metrics"),
        ({"texts": {"val_loss": "x"}}, InvalidError, "is a metric"),
        ({"metrics": {"a": 1}, "texts": {"a": "x"}}, InvalidError, "is a metric"),
        ({"texts": {"a": "x" * (LONGEST_TEXT + 1)}}, InvalidError, "bytes"),
        ({"texts": {"a": "\udc80"}}, InvalidError, "not valid text"),
        ({"texts": {"a" * 600: "x"}}, InvalidError, "too long"),
        ({"remove": "val_loss"}, InvalidError, "of the commit itself"),
        ({"remove": "nope"}, NotFoundError, "no note nope"),
        ({"metrics": {"a": 1}, "remove": "a"}, InvalidError, "set and removed"),
    ],
)
def test_no_notes(repo: Repo, arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    train(repo, 1.0)
    before = repo.reflog()
    with pytest.raises(error) as raised:
        repo.annotate("main", **arguments)
    assert words in f"{raised.value} {raised.value.hint}"  # type: ignore[attr-defined]
    assert repo.reflog() == before


def test_what_was_dropped_and_pinned_is_noted(repo: Repo) -> None:
    (made,) = train(repo, 1.0)
    assert (repo.notes().dropped, repo.notes().pinned) == (None, False)
    repo.record([Drop(made.id, ("model", "ema"))], "test")
    assert repo.notes().dropped == ("ema", "model")


# -- best -----------------------------------------------------------------------------------------


def test_best_over_branches(forked: tuple[Repo, dict[str, list[Commit]]]) -> None:
    repo, made = forked
    (found,) = repo.best("val_loss")
    assert (found.commit, found.value, found.revision) == (made["sweep/b"][0], 0.5, "sweep/b~1")
    named = [(each.revision, each.value) for each in repo.best("val_loss", n=9)]
    assert named == [
        ("sweep/b~1", 0.5), ("sweep/a~1", 1.0), ("sweep/a", 1.0), ("main", 1.5),
        ("main~1", 2.0), ("main~2", 3.0),
    ]  # fmt: skip
    for each in repo.best("val_loss", n=9):
        assert repo.resolve(each.revision).id == each.commit.id
    assert [each.value for each in repo.best("val_loss", branches="*a")] == [1.0]
    assert [each.revision for each in repo.best("val_loss", branches=["sweep/a", "main"], n=1)] == [
        "sweep/a~1"
    ]


def test_of_equal_values_the_oldest_is_best_and_nan_never(repo: Repo) -> None:
    made = train(repo, math.nan, 1.0, 1.0, math.nan, math.inf)
    assert [each.commit.id for each in repo.best("val_loss", n=9)] == [made[n].id for n in (1, 2, 4)]
    repo.annotate(made[0], {"accuracy": math.nan, "odd": 1})
    with pytest.raises(NotFoundError, match="a number for the metric accuracy") as raised:
        repo.best("accuracy")
    assert "odd, val_loss" in str(raised.value.hint)
    with pytest.raises(InvalidError, match="is a small or a large odd better"):
        repo.best("odd")
    repo.configure("metric.odd.mode", "max")
    assert repo.best("odd")[0].commit.id == made[0].id
    assert repo.metric_names() == {"val_loss"}


def test_best_sees_what_was_merged(repo: Repo) -> None:
    from ckptvcs.history.commit import encode_commit
    from ckptvcs.ids import Kind
    from ckptvcs.store import Move, Publication

    train(repo, 3.0)
    side = repo.on("side")
    side.restore({"n": np.array([0])}, "main")
    inner = train(side, 0.1, start=2)[0]
    tip = train(repo, 2.0, start=2)[0]
    payload = encode_commit(
        tree=tip.tree, parents=(tip.id, inner.id), origin=tip.id, author="", time=0, message="merge", step=3,
        epoch=None, metrics={}, config={}, overrides={}, environment={}, sizes={},
    )  # fmt: skip
    with repo._store.writer() as writer:
        (id,) = writer.put_objects(Kind.COMMIT, [payload])
        move = Move("refs/heads/main", tip.id, id)
        assert writer.publish(Publication(id, (move,), move, (), 0, "", ""))
    repo.delete_branch("side", force=True)
    (found,) = repo.best("val_loss")
    assert (found.commit, found.revision, found.branch) == (inner, inner.id.short, None)


# -- compare --------------------------------------------------------------------------------------


def test_compare(forked: tuple[Repo, dict[str, list[Commit]]]) -> None:
    repo, made = forked
    found = repo.compare("sweep/*", "main")
    assert found.fork == made["main"][1]
    assert [side.name for side in found.sides] == ["sweep/a", "sweep/b", "main"]
    assert found.differing == ["optimizer.lr"]
    assert [side.config["optimizer.lr"] for side in found.sides] == [0.2, 0.3, 0.1]
    assert [side.commits for side in found.sides] == [2, 2, 1]
    a, b, main = (side.series["val_loss"] for side in found.sides)
    assert [point.value for point in a.points] == [1.0, 1.0]
    assert a.best is not None
    assert a.best.commit == made["sweep/a"][0].id  # the oldest of equals
    assert math.isnan(b.final.value)
    assert b.best is not None
    assert (b.best.value, b.best.step) == (0.5, 3)
    assert main.final.value == 1.5


def test_compare_ranges_ancestors_and_strangers(forked: tuple[Repo, dict[str, list[Commit]]]) -> None:
    repo, made = forked
    found = repo.compare("main~1", "main~2..sweep/a")
    assert found.fork == made["main"][1]
    older, line = found.sides
    assert older.commits == 0
    assert [point.value for point in older.series["val_loss"].points] == [2.0]
    assert [point.value for point in line.series["val_loss"].points] == [2.0, 1.0, 1.0]
    fresh = repo.on("fresh")
    train(fresh, 9.0)
    found = repo.compare("fresh", "main")
    assert found.fork is None
    assert [side.commits for side in found.sides] == [1, 3]
    assert found.differing == ["optimizer.lr", "optimizer.name", "seed"]


def test_compare_refuses(forked: tuple[Repo, dict[str, list[Commit]]]) -> None:
    repo, _ = forked
    for revs in ((), ("main",), ("sweep/a", "sweep/a"), ("sweep/a*",)):
        with pytest.raises(InvalidError, match="nothing to compare"):
            repo.compare(*revs)
    with pytest.raises(NotFoundError):
        repo.compare("main", "nope/*")
    with pytest.raises(InvalidError, match="no line of commits"):
        repo.compare("main...sweep/a", "main")


def test_whole_numbers_beyond_floats(repo: Repo) -> None:
    made = train(repo, 10**400, -(10**400), 1.0)
    assert [each.value for each in repo.best("val_loss", n=3)] == [-(10**400), 1.0, 10**400]
    assert repo.compare("main", "main~1").sides[0].series["val_loss"].best is not None
    assert [value for _, value in repo.curves("val_loss").curves[0].points] == [math.inf, -math.inf, 1.0]
    assert [c.id for c in repo.log(metric="val_loss>1e308")] == [made[0].id]


def test_configs_tell_kinds_apart_and_nothing_from_empty(repo: Repo) -> None:
    train(repo, 1.0, a=1, b=True, c={}, d=[1, 2], e=None, f=math.nan)
    other = repo.on("other")
    other.restore({"n": np.array([0])}, "main")
    train(other, 1.0, start=2, a=1.0, b=1, c={"x": 1}, d=[1, 2], f=math.nan)
    assert repo.compare("main", "other").differing == ["a", "b", "c", "c.x", "e"]


# -- curves and charts ----------------------------------------------------------------------------


def test_curves_share_what_branches_share(forked: tuple[Repo, dict[str, list[Commit]]]) -> None:
    repo, _ = forked
    chart = repo.curves("val_loss")
    assert chart.by == "step"
    main, a, b = chart.curves
    assert (main.name, main.forked, main.points) == ("main", False, ((1, 3.0), (2, 2.0), (3, 1.5)))
    assert (a.name, a.forked, a.points) == ("sweep/a", True, ((2, 2.0), (3, 1.0), (4, 1.0)))
    assert b.points[:2] == ((2, 2.0), (3, 0.5))
    assert math.isnan(b.points[2][1])
    first, second = repo.curves("val_loss", branches="sweep").curves
    assert first.points[:2] == ((1, 3.0), (2, 2.0))
    assert second.forked
    repo.commit({"n": np.array([9])}, metrics={"val_loss": 1.0})
    chart = repo.curves("val_loss")
    assert chart.by == "commit"
    assert [x for x, _ in chart.curves[0].points] == [1, 2, 3, 4]
    assert [x for x, _ in chart.curves[1].points] == [2, 3, 4]
    with pytest.raises(NotFoundError, match="metric nope"):
        repo.curves("nope")


def drawn(chart: Chart, **more: Any) -> ElementTree.Element:
    data = charts.svg(chart, **more)
    assert data == charts.svg(chart, **more)
    return ElementTree.fromstring(data)


def named(root: ElementTree.Element, tag: str) -> Iterator[ElementTree.Element]:
    return root.iter("{http://www.w3.org/2000/svg}" + tag)


def test_svg_draws_a_line_for_each_run_and_names_it() -> None:
    nan = math.nan
    curves = (
        Curve("main", ((0, 3.0), (10, 2.0), (20, 1.0)), False),
        Curve("a<&\x00>b", ((10, 2.0), (20, nan), (30, 1.0), (40, math.inf), (50, 0.5), (60, 0.4)), True),
    )
    root = drawn(Chart("val<loss", "step", curves))
    lines = [line.attrib["points"].split() for line in named(root, "polyline")]
    assert [len(line) for line in lines] == [3, 2]
    assert len(list(named(root, "circle"))) == 2
    assert [title.text for title in named(root, "title")] == ["main", "a<&�>b"]
    texts = [text.text for text in named(root, "text")]
    assert "val<loss" in texts
    assert "step" in texts
    # Values fall, so the line goes down the page; x grows to the right.
    places = [tuple(map(float, point.split(","))) for point in lines[0]]
    assert places == sorted(places)
    assert [y for _, y in places] == sorted(y for _, y in places)


@pytest.mark.parametrize(
    "points",
    [
        ((5, 1.0),),
        ((1, 0.0), (2, 0.0)),
        ((1, -1.7e308), (2, 1.7e308)),
        ((1, 5e-324), (2, 0.0)),
        ((1, 1e-300), (2, 1e300)),
        ((0, 1.0), (10**15, 1.0 + 1e-15)),
        ((-5, -1.0), (-4, 2.0)),
    ],
)
def test_svg_of_odd_numbers(points: tuple[tuple[int, float], ...]) -> None:
    root = drawn(Chart("m", "commit", (Curve("c", points, False),)))
    for text in re.findall(r"[-\d.]+", "".join(line.attrib["points"] for line in named(root, "polyline"))):
        assert -1 <= float(text) <= 1000
    if any(value > 0 for _, value in points):
        drawn(Chart("m", "commit", (Curve("c", points, False),)), log_scale=True)


def test_svg_of_many_branches_is_tall_and_tells_them_apart() -> None:
    curves = tuple(Curve(f"branch-{n}", ((0, float(n)), (1, n + 1.0)), False) for n in range(50))
    root = drawn(Chart("m", "step", curves))
    styles = {
        (line.attrib["stroke"], line.attrib.get("stroke-dasharray")) for line in named(root, "polyline")
    }
    assert len(styles) >= 40
    assert float(root.attrib["height"]) > 50 * 16


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(InvalidError, match="no value of m is a number"):
        charts.svg(Chart("m", "step", (Curve("c", ((1, math.nan),), False),)))
    with pytest.raises(InvalidError, match="positive number"):
        charts.svg(Chart("m", "step", (Curve("c", ((1, -1.0),), False),)), log_scale=True)
    with pytest.raises(InvalidError, match="no picture") as raised:
        charts.renderer(Path("x.pdf"))
    assert "svg" in str(raised.value.hint)


def test_png_without_matplotlib_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InvalidError, match="needs matplotlib") as raised:
        charts.renderer(Path("x.png"))
    assert raised.value.code == "missing-library"


def test_png() -> None:
    pytest.importorskip("matplotlib", reason="an optional extra: ckptvcs[plot]")
    chart = Chart("a$b", "step", (Curve("_x$y", ((1, 1.0), (2, math.nan), (3, 2.0), (4, 1.0)), False),))
    for log_scale in (False, True):
        data = charts.renderer(Path("x.png"))(chart, log_scale=log_scale)
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert data.endswith(b"IEND\xaeB`\x82")


def test_pictures_replace_nothing_without_being_told(repo: Repo, folder: Path) -> None:
    path = folder / "x.svg"
    charts.write(repo.disk, path, b"one")
    with pytest.raises(ExistsError):
        charts.write(repo.disk, path, b"two")
    charts.write(repo.disk, path, b"two", force=True)
    assert path.read_bytes() == b"two"
