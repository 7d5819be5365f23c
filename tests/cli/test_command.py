"""The command as a whole: start, help, colours, completion, and errors of every kind."""

from __future__ import annotations

import errno
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckptvcs import Repo, errors
from ckptvcs.cli import exits, reference
from ckptvcs.cli import main as run_main
from ckptvcs.cli.main import VERBS
from tests.cli.command import COMMAND, ROOT, ckpt, environment, refused

HEAVY = ("numpy", "lmdb", "torch", "rich", "zstandard", "msgpack", "ml_dtypes", "ckptvcs.repo")

# ---- starting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["log", "--help"], []])
def test_starting_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from ckptvcs.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('loaded', *sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment(), capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    loaded = set(done.stderr.split())
    assert "click" in loaded
    assert not loaded & set(HEAVY)
    assert done.stdout


def test_version_and_help(tmp_path: Path) -> None:
    import ckptvcs

    assert ckpt(tmp_path, "--version").out == f"ckpt {ckptvcs.__version__}\n"
    out = ckpt(tmp_path).out
    for verb in VERBS:
        assert re.search(rf"^  {verb} +[A-Z]", out, re.MULTILINE)
    assert "..." not in out.partition("Commands:")[2]  # no summary is cut off
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("comit",), ("'comit' is not a ckpt verb", "did you mean commit")),
        (("log", "--grap"), ("--grap", "--graph")),
        (("log", "--repo", "x"), ("--repo", "before the verb")),
        (("log", "-n", "-1"), ("-n",)),
        (("--color", "blue", "log"), ("blue",)),
        (("completion", "tcsh"), ("tcsh",)),
    ],
)
def test_bad_command_lines(tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(tmp_path, *arguments, code=2, words=(*words, "hint: "))


# ---- terminals, pipes, signals ------------------------------------------------------------------


def test_colours(states: Path) -> None:
    log = ("log", "-n", "1", "--oneline")
    assert "\x1b[" not in ckpt(states, *log).out
    assert "\x1b[33m" in ckpt(states, "--color", "always", *log).out
    assert "\x1b[" in ckpt(states, "--color", "always", "show", "nope", code=4).err
    assert "\x1b[33m" in on_a_terminal(states, *log)
    assert "\x1b[" not in on_a_terminal(states, *log, NO_COLOR="1")


def test_progress_on_a_terminal_only(files: Path) -> None:
    (files / "a.bin").unlink()
    assert "writing files" in on_a_terminal(files, "checkout", "main", "a.bin")
    (files / "a.bin").unlink()
    assert ckpt(files, "checkout", "main", "a.bin").err == ""


def on_a_terminal(folder: Path, *arguments: str, **env: str) -> str:
    """What a command shows on a terminal."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=folder, env=environment(TERM="xterm", **env), stdin=theirs, stdout=theirs, stderr=theirs,
        )  # fmt: skip
    finally:
        os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 4096):
            shown += data
    except OSError as error:  # how Linux says that the other end was closed
        if error.errno != errno.EIO:
            raise
    finally:
        os.close(ours)
        assert process.wait(60) == 0
    return shown.decode()


def test_a_reader_that_goes_away(states: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*COMMAND, "log"],
            cwd=states, env=environment(), stdout=writing, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_ctrl_c(files: Path) -> None:
    with (
        Repo.open(files),  # so that the rebuild waits for its lock
        subprocess.Popen(
            [*COMMAND, "fsck", "--rebuild"],
            cwd=files,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
            # Whoever runs the tests in the background may have told them to ignore the signal.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process,
    ):
        maps = Path(f"/proc/{process.pid}/maps")
        deadline = time.monotonic() + 20
        while "lmdb" not in maps.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, err.strip()) == (130, "interrupted")


def test_what_a_terminal_cannot_show_is_escaped(files: Path) -> None:
    name = os.fsdecode(b"\xff\xc3\xa4")
    (files / name).write_text("x")
    done = ckpt(files, "commit", "-m", "now \u2192 then", name, PYTHONIOENCODING="latin-1")
    assert "now \\u2192 then" in done.out
    assert "\\xff\u00e4" in ckpt(files, "ls").out
    assert ckpt(files, "ls", "--json").json["files"][0]["path"] == name


# ---- errors -------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_repository_as_it_was(files: Path) -> None:
    (files / "big").write_bytes(os.urandom(4 << 20))
    done = subprocess.run(
        [*COMMAND, "commit", "-m", "too much", "big", "--json"],
        cwd=files, env=environment(PYTHONDONTWRITEBYTECODE="1"), capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20)),
    )  # fmt: skip
    assert done.returncode == 15, done
    assert '"exit": 15' in done.stdout
    assert ckpt(files, "fsck", "--full", "--json").json["ok"]
    assert "files 2" in ckpt(files, "log", "-n", "1").out


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        refused(tmp_path, "init", "new", code=15, words=(str(tmp_path),))
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.CkptError("m"), 1, "m"),
        (errors.NotFoundError("m"), 4, "m"),
        (errors.NoRepositoryError("m"), 10, "m"),
        (errors.ExistsError("m"), 2, "m"),
        (errors.InvalidError("m"), 2, "m"),
        (errors.AmbiguousError("m"), 2, "m"),
        (errors.UnsupportedStateError([("a/b", "a lambda")]), 2, "a/b: a lambda"),
        (errors.StateMismatchError(["x"], [], []), 2, "x"),
        (errors.ConflictError("m"), 12, "m"),
        (errors.LineageError("m"), 12, "m"),
        (errors.LockedError("m"), 11, "m"),
        (errors.CorruptionError("m"), 13, "m"),
        (errors.FormatError("m"), 14, "m"),
        (errors.StorageError("m"), 15, "m"),
        (PermissionError(13, "Permission denied", "/x"), 15, "permission denied: /x"),
        (RuntimeError("line 1\nline 2"), 1, "unexpected RuntimeError: line 1"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_error_has_its_exit_code_and_one_line(
    error: BaseException,
    code: int,
    line: str,
    states: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Repo, "graph", fail)
    with pytest.raises(SystemExit) as left:
        run_main(["--repo", str(states), "log"])
    err = capsys.readouterr().err
    assert left.value.code == code
    assert line in err
    assert "Traceback" not in err
    assert len([each for each in err.strip().splitlines() if not each.startswith("hint: ")]) == 1

    if code == 1 and isinstance(error, RuntimeError):
        assert "CKPT_DEBUG=1" in err
        monkeypatch.setenv("CKPT_DEBUG", "1")
        with pytest.raises(SystemExit):
            run_main(["--repo", str(states), "log"])
        assert "Traceback" in capsys.readouterr().err


def test_every_error_class_is_in_the_table() -> None:
    kinds = [errors.CkptError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    for kind in kinds:
        assert any(issubclass(kind, each) for each, _ in exits._BY_ERROR[:-2]) or kind is errors.CkptError


# ---- completion ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(tmp_path: Path, shell: str) -> None:
    out = ckpt(tmp_path, "completion", shell).out
    assert "_CKPT_COMPLETE" in out
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=out, text=True, check=True)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ckpt sh", ["show"]),
        ("ckpt switch ", ["main", "other"]),
        ("ckpt show ", ["HEAD", "main", "other", "v1"]),
        ("ckpt show main:", ["main:model/", "main:step", "main:name"]),
        ("ckpt show main@step:10:model/w", ["main@step:10:model/weight"]),
        ("ckpt log main..o", ["main..other"]),
        ("ckpt log ^v", ["^v1"]),
        ("ckpt log --branches o", ["other"]),
        ("ckpt best v", ["val_loss"]),
        ("ckpt plot a", ["acc"]),
        ("ckpt tag -d v", ["v1"]),
        ("ckpt log --gra", ["--graph"]),
        ("ckpt ls ma", ["file,ma", "main"]),
        ("ckpt diff st", ["file,st"]),
        ("ckpt import-run out", ["file,out"]),
        ("ckpt import-run out --branch m", ["main"]),
    ],
)
def test_completion_offers_names(states: Path, line: str, expected: list[str]) -> None:
    words = line.split(" ")
    done = ckpt(states, _CKPT_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    assert [row.removeprefix("plain,") for row in done.out.splitlines()] == expected


def test_completion_is_silent_without_a_repository(tmp_path: Path) -> None:
    done = ckpt(tmp_path, _CKPT_COMPLETE="bash_complete", COMP_WORDS="ckpt switch ", COMP_CWORD="2")
    assert (done.out.strip(), done.err) == ("", "")


# ---- documentation ------------------------------------------------------------------------------


def test_the_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == reference.reference().rstrip() + "\n", "run `make docs`"


def test_the_reference_has_the_table_of_exit_codes() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE)
    assert {exits.Exit(int(code)): text for code, text in rows} == exits.MEANING
    assert set(exits.MEANING) == set(exits.Exit)


def test_every_verb_that_answers_has_json() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    for verb in VERBS:
        section = text.split(f"### ckpt {verb}\n")[1].split("\n##")[0]
        assert ("`--json`" in section) == (verb != "completion")
