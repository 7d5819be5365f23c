"""The circumstances a commit records."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptvcs import canonical
from ckptvcs.history import environment


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    environment.capture.cache_clear()
    yield
    environment.capture.cache_clear()


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["t.py", "--lr", "0.1"], ["t.py", "--lr", "0.1"]),
        (["--api-key", "abc"], ["--api-key", "***"]),
        (["--api-key=abc"], ["--api-key=***"]),
        (["-token", "abc", "x"], ["-token", "***", "x"]),
        (["WANDB_API_KEY=abc"], ["WANDB_API_KEY=***"]),
        (["+logger.Secret=abc=def"], ["+logger.Secret=***"]),
        (["--password", "-abc"], ["--password", "***"]),
        (["--use-auth", "--lr", "1"], ["--use-auth", "--lr", "1"]),
        (["--credentials", "a", "--passwd", "b"], ["--credentials", "***", "--passwd", "***"]),
        (["--token"], ["--token"]),
        (["s3://user:pw@host/x"], ["s3://***@host/x"]),
        (["--url=https://ghp_abc@github.com/x"], ["--url=https://***@github.com/x"]),
        (["mail me@host", "https://host/a@b"], ["mail me@host", "https://host/a@b"]),
        ([], []),
    ],
)
def test_secrets_are_masked(argv: list[str], shown: list[str]) -> None:
    assert environment.masked(argv) == shown


def test_what_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "ü\udc80", "--token=x"])
    found = environment.capture()
    assert set(found) == {"ckptvcs", "python", "platform", "host", "argv", "libraries", "code"}
    assert found["argv"] == ["train.py", "ü\udc80", "--token=***"]
    assert canonical.decode(canonical.encode(found)) == found
    assert environment.capture() is found  # once per process


def test_the_code_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.capture()["code"] is None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-qm", "x")
    environment.capture.cache_clear()
    assert environment.capture()["code"] == {"git": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "f").write_text("2")
    environment.capture.cache_clear()
    assert environment.capture()["code"]["dirty"] is True
    monkeypatch.setenv("PATH", str(tmp_path))  # no git program
    environment.capture.cache_clear()
    assert environment.capture()["code"] is None


def test_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert environment.capture()["code"] is None


def test_libraries_are_not_imported_for_it() -> None:
    script = (
        "import sys; from ckptvcs.history import environment as e; found = e.capture()['libraries'];"
        "assert 'torch' not in sys.modules and 'torch' not in found, found"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(environment.__file__).parents[2])
