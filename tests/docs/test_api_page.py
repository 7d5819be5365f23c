"""docs/api.md lists every error, setting and public method."""

from __future__ import annotations

import re

import ckptvcs
from ckptvcs import config
from tests.docs import pages

PAGE = pages.ROOT / "docs" / "api.md"
TEXT = PAGE.read_text()


def test_errors() -> None:
    listed = {row[0].strip("`"): row for row in pages.table(PAGE, "## Errors")}
    classes = {name: getattr(ckptvcs, name) for name in ckptvcs.__all__ if name.endswith("Error")}
    assert listed.keys() == classes.keys()
    for name, kind in classes.items():
        assert f"`{kind.code}`" in listed[name][2]
        parents = re.findall(r"\w+", listed[name][1])
        assert parents == [base.__name__ for base in kind.__bases__ if base.__name__ in parents]
        assert {b.__name__ for b in kind.__bases__} - {"CkptError", "Exception"} <= set(parents)


def test_error_codes() -> None:
    """Codes given at the place where an error is raised are on the page too."""
    raised = set()
    for source in (pages.ROOT / "ckptvcs").rglob("*.py"):
        if "cli" not in source.parts:
            raised |= set(re.findall(r'\bcode="([a-z-]+)"', source.read_text()))
    assert raised
    assert not {code for code in raised if f"`{code}`" not in TEXT}


def test_settings() -> None:
    assert [row[0].strip("`") for row in pages.table(PAGE, "## Settings")] == list(config.KNOWN)


def test_every_public_method_is_named() -> None:
    public = [name for name in vars(ckptvcs.Repo) if not name.startswith("_") and name != "record"]
    assert not [name for name in public if not re.search(rf"\b(repo|Repo)\.{name}\b", TEXT)]
