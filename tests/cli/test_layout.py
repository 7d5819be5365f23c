"""The shape of drawn histories."""

from __future__ import annotations

import random

import pytest

from ckptvcs.history.layout import draw


def drawn(*commits: tuple[str, str]) -> str:
    """The graph of (commit, parents), with each commit's name beside it."""
    lines = []
    for (name, _), row in zip(commits, draw([(c, list(p), True) for c, p in commits]), strict=True):
        assert row.width == max(len(line) for line in (row.node, row.fill, *row.fan))
        lines += [f"{row.node.ljust(row.width)} {name}", *row.fan, *row.join]
    return "\n".join(lines)


def picture(text: str) -> str:
    return "\n".join(line[8:] for line in text.strip("\n").splitlines()).rstrip()


def test_a_line() -> None:
    assert drawn(("c", "b"), ("b", "a"), ("a", "")) == "* c\n* b\n* a"


def test_a_fork() -> None:
    assert drawn(("x", "b"), ("c", "b"), ("b", "a"), ("a", "")) == picture(r"""
        * x
        | * c
        |/
        * b
        * a
    """)


def test_a_merge() -> None:
    assert drawn(("m", "ab"), ("b", "r"), ("a", "r"), ("r", "")) == picture(r"""
        *   m
        |\
        | * b
        * | a
        |/
        * r
    """)


def test_a_merge_of_three() -> None:
    assert drawn(("m", "abc"), ("a", "r"), ("b", "r"), ("c", "r"), ("r", "")) == picture(r"""
        *     m
        |\
        |\ \
        * | | a
        | * | b
        |/ /
        | * c
        |/
        * r
    """)


def test_a_criss_cross() -> None:
    assert drawn(("m", "ab"), ("n", "ba"), ("b", "r"), ("a", "r"), ("r", "")) == picture(r"""
        *   m
        |\
        | | *   n
        | | |\
        | |/ /
        | |/
        |/|
        | * b
        * | a
        |/
        * r
    """)


def test_two_roots() -> None:
    assert drawn(("x", "1"), ("y", "2"), ("1", ""), ("2", "")) == picture(r"""
        * x
        | * y
        * | 1
         /
        * 2
    """)


def test_an_edge_across_others() -> None:
    assert drawn(
        ("x", "r"), ("y", "1"), ("z", "2"), ("q", "r"), ("1", "r"), ("2", "r"), ("r", "")
    ) == picture(r"""
        * x
        | * y
        | | * z
        | | | * q
        | |_|/
        |/| |
        | * | 1
        |/ /
        | * 2
        |/
        * r
    """)


def test_a_parent_named_twice_is_one_parent() -> None:
    assert drawn(("m", "aa"), ("a", "")) == "* m\n* a"


@pytest.mark.parametrize("seed", range(20))
def test_every_commit_of_any_history_has_its_line(seed: int) -> None:
    rng = random.Random(seed)
    names = list(range(40))
    history = [
        (
            n,
            rng.sample(names[n + 1 : n + 9], k=min(rng.choice((0, 1, 1, 1, 2, 3)), len(names) - n - 1, 8)),
            True,
        )
        for n in names
    ]
    rows = list(draw(history))
    assert len(rows) == len(history)
    for row, (_, parents, _) in zip(rows, history, strict=True):
        assert row.node.count("*") == 1
        assert len(row.fan) == max(0, len(parents) - 1)
        for line in (row.node, row.fill, *row.fan, *row.join):
            assert line == line.rstrip()
            assert set(line) <= set("*|/\\_ ")
    assert rows[-1].join == ()  # nothing is left open below the last root
    assert rows[-1].node.strip() == "*"


def test_hidden_commits_connect_those_that_are_shown() -> None:
    shown = "xmcr"
    history = [("y", "w"), ("x", "b"), ("m", "bd"), ("d", "e"), ("e", "c"), ("b", "c"), ("c", "r"), ("r", "")]
    rows = draw([(c, list(p), c in shown) for c, p in history])
    lines = [line for row in rows for line in (row.node, *row.fan, *row.join) if line]
    assert "\n".join(lines) == picture(r"""
        *
        | *
        | |\
        |/ /
        |/
        *
        *
    """)


def test_no_line_is_wider_than_told() -> None:
    tips = 60
    history = [(f"t{n}", [f"p{n}"], True) for n in range(tips)]
    history += [(f"p{n}", ["r"], True) for n in reversed(range(tips))]
    history.append(("r", [], True))
    rows = list(draw(history, 24))
    assert len(rows) == 2 * tips + 1
    for row in rows:
        assert row.node.count("*") == 1
        assert max(len(line) for line in (row.node, row.fill, *row.fan, *row.join)) <= 24
    assert rows[50].node == "| | | | | | | | | | ~ *"
    assert rows[50].fill.endswith("~")
    assert rows[-1].node == "*"
