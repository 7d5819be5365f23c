"""What the pages show is what happens: code runs, commands print it, links and headings are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs import pages

ROOT = pages.ROOT
RUN = [
    page
    for page in pages.PAGES
    if page != pages.GENERATED and any(b.language in ("python", "console") for b in pages.blocks(page))
]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", RUN, ids=named)
def test_runs_as_shown(page: Path, tmp_path: Path) -> None:
    pages.check(page, tmp_path)


def test_pages_that_run() -> None:
    """None of them has lost its blocks to a misspelt fence."""
    assert {"README.md", "docs/api.md", "docs/tutorial.md"} <= set(map(named, RUN))
    languages = {b.language for page in pages.PAGES if page != pages.GENERATED for b in pages.blocks(page)}
    assert languages <= {"python", "console", "sh", "text", "hex"}


@pytest.mark.parametrize("page", pages.PAGES, ids=named)
def test_links_resolve(page: Path) -> None:
    for link in pages.links(page):
        path, _, part = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.exists() or target == pages.GENERATED, f"{named(page)}: {link}"
        if part:
            assert part in map(pages.anchor, pages.headings(target)), f"{named(page)}: {link}"


def test_code_cites_pages_and_headings_that_exist() -> None:
    cited = set()
    for folder in ("ckptvcs", "tests", "examples", "benchmarks"):
        for source in (ROOT / folder).rglob("*.py"):
            text = source.read_text()
            for path in re.findall(r"\bdocs/[\w/-]+\.md", text):
                assert (ROOT / path).exists() or ROOT / path == pages.GENERATED, f"{source}: {path}"
            cited |= set(re.findall(r'(docs/[\w/-]+\.md), "([^"]+)"', text))
    assert {("docs/format.md", "Commit"), ("docs/format.md", "Collection")} <= cited
    for path, heading in cited:
        assert heading in pages.headings(ROOT / path), f'{path}, "{heading}"'


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    written = {path.name for path in folder.glob("0*.md")}
    assert written == set(pages.links(folder / "README.md"))
    for name in written:
        for part in ("Summary", "Goals", "Non-goals", "Alternatives", "Consequences"):
            assert part in pages.headings(folder / name), f"{name}: {part}"


def test_architecture_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    package = ROOT / "ckptvcs"
    for module in package.rglob("*.py"):
        path = module.relative_to(package)
        if path.parts[0] not in ("testing", "cli") and path.name not in ("__init__.py", "__main__.py"):
            assert path.name in text, f"{path} is not on the page"
    for name in re.findall(r"`((?:\w+/)?\w+\.py)`", text):
        assert list(package.rglob(name)), f"{name} is no module"
