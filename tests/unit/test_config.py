"""Settings: durations, defaults, what the file may hold, and what is refused."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs import InvalidError, Repo
from ckptvcs.config import KNOWN, Config, flatten, known, seconds_of, split_key


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        ("0", 0),
        ("30", 30),
        ("30s", 30),
        ("30m", 1800),
        ("30min", 1800),
        ("24h", 86_400),
        ("7d", 604_800),
        ("2w", 1_209_600),
        ("1.5h", 5400),
        (0, 0),
        (2.5, 2.5),
        (datetime.timedelta(minutes=3), 180),
    ],
)
def test_durations(duration: Any, seconds: float) -> None:
    assert seconds_of(duration) == seconds


@pytest.mark.parametrize(
    "duration",
    [
        "",
        "h",
        "-1",
        "1 h",
        "1y",
        "1h30m",
        "0x1",
        "nan",
        "1e3",
        " 1",
        "1\n",
        -1,
        True,
        None,
        [],
        float("nan"),
        float("inf"),
        10**400,
        pytest.param(10**5000, id="5000 digits"),
        "9" * 5000,
        1e11,
        datetime.timedelta(seconds=-1),
        "99999999999d",
        b"1h",
    ],
)
def test_no_durations(duration: Any) -> None:
    with pytest.raises(InvalidError, match="not a duration"):
        seconds_of(duration)


def test_defaults() -> None:
    config = Config("")
    assert config.get("compression") == "balanced"
    assert config.get("gc.grace") == "24h"
    assert config.get("environment") is True
    assert config.get("author") is None
    assert config.get("nothing.like.it") is None
    assert config.metric_mode("loss") is None
    assert config.items() == {
        "author": None,
        "compression": "balanced",
        "environment": True,
        "gc.grace": "24h",
        "index.network": False,
        "ingest": "auto",
        "repack.older-than": None,
    }


@pytest.mark.parametrize(
    "text",
    [
        'compression = "huge"',
        "compression = 3",
        'author = ""',
        "author = 1",
        'environment = "yes"',
        "gc.grace = true",
        'gc.grace = "soon"',
        "gc.grace = 1" + "0" * 400,
        "gc.grace = 0x" + "f" * 6000,
        "author = 0x" + "f" * 6000,
        'metric.loss.mode = "best"',
        "metric.loss.mode = 1",
    ],
)
def test_impossible_values_name_file_and_key(text: str) -> None:
    with pytest.raises(InvalidError) as caught:
        Config(text, "/r/config.toml")
    assert "\n" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "a = ",
        "[",
        "a = 1\na = 2",
        "\x00",
        "a = " + "[" * 5000 + "]" * 5000,
        "a" + ".a" * 5000 + " = 1",
        "a = " + "9" * 5000,
        "gc.grace = " + "9" * 5000,
    ],
    ids=range(8),
)
def test_broken_files(text: str) -> None:
    with pytest.raises(InvalidError, match=r"config\.toml cannot be read"):
        Config(text)


def test_unknown_settings_are_kept_and_ignored() -> None:
    text = 'from_the_future = 1\nmetric.loss.note = "x"\n[remote]\nurl = "s3://x"\n'
    config = Config(text)
    assert config.get("remote.url") == "s3://x"
    changed = config.with_value("compression", "small")
    assert "from_the_future = 1" in changed
    assert Config(changed).get("remote.url") == "s3://x"
    assert Config(changed).get("compression") == "small"
    for nonsense in ("metric = 3", "gc = 3", "metric.loss = 1"):
        assert Config(nonsense).metric_mode("loss") is None


def test_comments_survive() -> None:
    text = "# ours\nauthor = 'Ann' # me\n\n[gc]\n# long\ngrace = '7d'\n"
    changed = Config(text).with_value("gc.grace", "2h")
    assert "# ours" in changed
    assert "# me" in changed
    assert "# long" in changed
    assert Config(changed).get("gc.grace") == "2h"
    assert Config(changed).get("author") == "Ann"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("author", "Ann Ö <a@b>", "Ann Ö <a@b>"),
        ("compression", "fast", "fast"),
        ("environment", "false", False),
        ("environment", "TRUE", True),
        ("gc.grace", "30m", "30m"),
        ("metric.loss.mode", "min", "min"),
        ("metric.val/top.5.mode", "max", "max"),
        ("metric.a b.mode", "max", "max"),
        ('metric."x".mode', "min", "min"),
    ],
)
def test_set_and_unset(key: str, text: str, value: Any) -> None:
    changed = Config("").with_value(key, text)
    assert Config(changed).get(key) == value
    back = Config(changed).with_value(key, None)
    assert Config(back).get(key) == Config("").get(key)
    assert Config("").with_value(key, None) == ""


@pytest.mark.parametrize(
    "key",
    [
        "",
        "x",
        "gc",
        "gc.grace.x",
        "metric",
        "metric.loss",
        "metric.mode",
        "metric..mode",
        "metric.loss.note",
        "Author",
        "metric.loss.mode.x",
    ],
)
def test_unknown_keys_are_refused_with_the_known_ones(key: str) -> None:
    assert not known(key)
    with pytest.raises(InvalidError, match="no setting called") as caught:
        Config("").with_value(key, "min")
    assert all(name in str(caught.value.hint) for name in KNOWN)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("compression", "x"),
        ("environment", "maybe"),
        ("gc.grace", "x"),
        ("author", " "),
        ("metric.loss.mode", "avg"),
    ],
)
def test_bad_values_are_refused(key: str, text: str) -> None:
    with pytest.raises(InvalidError, match=key):
        Config("").with_value(key, text)


def test_a_value_where_a_table_belongs() -> None:
    with pytest.raises(InvalidError, match="gc is not a table"):
        Config("gc = 3").with_value("gc.grace", "1h")


@pytest.mark.parametrize(
    "text",
    ['[metric."val.loss"]\nmode = "max"', 'metric."val.loss".mode = "max"', 'metric.val.loss.mode = "max"'],
)
def test_metric_names_with_dots_may_be_written_in_any_way(text: str) -> None:
    assert Config(text).metric_mode("val.loss") == "max"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=12))
def test_any_metric_name(name: str) -> None:
    key = f"metric.{name}.mode"
    assert split_key(key) == ["metric", name, "mode"]
    assert Config(Config("").with_value(key, "min")).metric_mode(name) == "min"


def test_flattening() -> None:
    assert flatten({"a": 1, "b": {"c": {"d": 2}, "e": {}}}) == {"a": 1, "b.c.d": 2}


def test_a_repository_without_its_config_file(repo: Repo, folder: Path) -> None:
    (folder / ".ckpt/config.toml").unlink()
    with Repo.open(folder) as again:
        assert again.config.get("compression") == "balanced"
        again.configure("gc.grace", "1h")
    assert (folder / ".ckpt/config.toml").read_text() == '[gc]\ngrace = "1h"\n'


def test_a_broken_config_file_says_what_to_do(repo: Repo, folder: Path) -> None:
    for content in (b"=", b"\xff\xfe", b'compression = "x"'):
        (folder / ".ckpt/config.toml").write_bytes(content)
        with pytest.raises(InvalidError, match=r"config\.toml") as caught:
            Repo.open(folder)
        assert caught.value.hint
    (folder / ".ckpt/config.toml").unlink()
    Repo.open(folder).close()


def test_two_handles_do_not_undo_each_others_settings(repo: Repo, folder: Path) -> None:
    with Repo.open(folder) as other:
        other.configure("author", "Ann")
        repo.configure("compression", "small")
        assert repo.config.get("author") == "Ann"


@pytest.mark.parametrize(
    "text", ["# a comment", 'author = "ada" # who', "[gc]\ngrace = '1h' #", "author = 'a'"]
)
def test_a_file_without_an_end_of_line_takes_a_setting(text: str) -> None:
    """What was added behind a comment became a part of it, and nothing was set."""
    changed = Config(Config(text).with_value("compression", "fast"))
    assert changed.get("compression") == "fast"
    assert changed.get("author") == Config(text).get("author")
