import enum
import time

import pytest

from ckptvcs.errors import InvalidError, NotFoundError
from ckptvcs.state import paths


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("weight", "weight"),
        ("0.weight", "0.weight"),
        (0, "0"),
        ("0", r"\s0"),
        (-1, "-1"),
        (True, "True"),
        ("True", r"\sTrue"),
        (None, "None"),
        ("None", r"\sNone"),
        (1.5, "1.5"),
        ("1.5", r"\s1.5"),
        ("1e-05", r"\s1e-05"),
        (float("nan"), "nan"),
        ("nan", r"\snan"),
        ("", r"\s"),
        ("a/b", r"a\/b"),
        ("a\\b", r"a\\b"),
        ("/", r"\/"),
        ("\\", r"\\"),
        ("\\s0", r"\s\\s0"),
        ((1, 2), "(1, 2)"),
        ("(1, 2)", r"\s(1, 2)"),
        (b"x", "b'x'"),
        ("b'x'", r"\sb'x'"),
        (2j, "2j"),
        (Colour.RED, "<Colour.RED>"),
    ],
)
def test_names(key, name):
    assert paths.name(key) == name
    assert paths.split(paths.join("top", name)) == ("top", name)


@pytest.mark.parametrize("key", ["0", 0, None, True, "a/b", "", "\\", "w.0", -3, "None"])
def test_key_is_the_inverse_of_name(key):
    found = paths.key(paths.name(key))
    assert found == key
    assert type(found) is type(key)


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("model", "model", True),
        ("model", "model/a/b", True),
        ("model", "models", False),
        ("model/*", "model/a/b", True),
        ("model/*/w", "model/a/w", True),
        ("model/*/w", "model/a/b/w", False),
        ("model/**/w", "model/a/b/w", True),
        ("model/**/w", "model/w", True),
        ("**weight", "model/a/weight", True),
        ("**weight", "model/a/xweight", True),
        ("**weight", "weight", True),
        ("mo**w", "model/a/w", True),
        ("model/layer?", "model/layer1", True),
        ("model/layer[12]", "model/layer3", False),
        ("", "anything", True),
        ("model/", "model/x", True),
        (r"a\/b", r"a\/b", True),
        ("a", r"a\/b", False),
        ("*", r"a\/b", True),
    ],
)
def test_patterns(pattern, path, fits):
    assert paths.matches(pattern, path) is fits


@pytest.mark.parametrize("only", [5, [5], b"model", [None], ["model", 5]])
def test_what_is_no_pattern(only):
    with pytest.raises(InvalidError, match="a pattern is text"):
        paths.Patterns(only)


@pytest.mark.parametrize("pattern", ["a**b/" * 24, "**/" * 200 + "x", "**a**b/" * 24, "a**/**b/" * 30])
def test_many_stars_take_no_time(pattern):
    """Each `a**b` has two meanings, and so many of them had two to that power together."""
    started = time.monotonic()
    assert not paths.matches(pattern + "end", "/".join(["ab"] * 100))
    assert paths.matches(pattern, "/".join(["ab"] * 300 + ["x"]))
    assert time.monotonic() - started < 5


def test_a_number_finds_the_text_key_too():
    assert paths.Patterns("0").start().step("0") is not None
    assert paths.Patterns("0").start().step(0) is not None
    assert paths.Patterns(r"\s0").start().step("0") is not None
    assert paths.Patterns(r"\s0").start().step(0) is None


def test_a_pattern_without_match_names_near_paths():
    patterns = paths.Patterns(["model", "optimiser"])
    patterns.start().step("model")
    with pytest.raises(NotFoundError, match="'optimiser'") as caught:
        patterns.check(["model", "optimizer"])
    assert "optimizer" in caught.value.hint
