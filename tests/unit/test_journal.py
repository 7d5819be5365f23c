"""The journal: torn anywhere, it loses nothing that was complete, and it catches up."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.canonical import Tagged, encode
from ckptvcs.disk import Disk, WriteFile
from ckptvcs.errors import CorruptionError, InvalidError, StorageError
from ckptvcs.ids import ObjectId, chunk_id, digest
from ckptvcs.store.index import Index
from ckptvcs.store.journal import (
    LONGEST_KEY,
    LONGEST_NAME,
    Drop,
    Expire,
    Fork,
    Journal,
    LogEntry,
    Move,
    Note,
    Operation,
    Pin,
    Status,
)

ONE, TWO = chunk_id(b"one"), chunk_id(b"two")

ids = st.binary(min_size=32, max_size=32).map(ObjectId)
texts = st.text(max_size=20)
targets = st.none() | ids | texts
operations = st.one_of(
    st.builds(Move, texts, targets, targets),
    st.builds(
        Note, ids, texts, st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
    ),
    st.builds(Pin, ids, st.booleans()),
    st.builds(Drop, ids, st.lists(texts, max_size=3).map(tuple)),
    st.builds(Status, texts, st.none() | texts),
    st.builds(
        Fork, texts, st.none() | ids, st.dictionaries(texts, st.integers() | st.lists(texts, max_size=2))
    ),
    st.builds(Expire, st.integers(0, 2**40)),
)


def entry(position: int, *operations: Operation) -> LogEntry:
    return LogEntry(
        position, 1000 + position, "me", "why", operations or (Move("refs/heads/main", None, ONE),)
    )


LOG = [entry(i, Move("refs/heads/main", ONE, TWO), Note(ONE, "n", i)) for i in range(1, 8)]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal(Disk(), tmp_path / "refs.journal")
    made.create()
    return made


def after(position: int) -> list[LogEntry]:
    return LOG[position:]


@given(
    st.lists(operations, max_size=4), texts, texts, st.dictionaries(texts, st.integers() | texts, max_size=3)
)
def test_entries_round_trip(made: list[Operation], who: str, why: str, info: dict[str, object]) -> None:
    before = LogEntry(3, -5, who, why, tuple(made), info)
    assert LogEntry.decode(3, before.encode()) == before


@pytest.mark.parametrize(
    "value",
    [b"", b"\xc0", b"\x90", b"text"],
)
def test_other_bytes_are_no_entry(value: bytes) -> None:
    with pytest.raises(CorruptionError, match="log entry 4 is damaged"):
        LogEntry.decode(4, value)


ABSURD = [
    ["ref", 5, None, None],
    ["ref", b"x", None, None],
    ["ref", "\ud800", None, None],
    ["ref", "r" * 511, None, None],
    ["ref", "é" * 256, None, None],
    ["ref", "a", 5, None],
    ["ref", "a", None, True],
    ["ref", "a", None, b"short"],
    ["ref", "a", None, "\udfff"],
    ["ref", "HEAD", None, "x" * 511],
    ["note", bytes(32), 5, 1],
    ["note", bytes(32), "k" * 479, 1],
    ["note", bytes(32), "\ud800", 1],
    ["note", bytes(32), "k", b"bytes"],
    ["note", bytes(32), "k", [1]],
    ["note", bytes(32), "k", Tagged(9, b"")],
    ["note", [0] * 32, "k", 1],
    ["note", "x" * 32, "k", 1],
    ["pin", bytes(32), 1],
    ["pin", None, True],
    ["drop", bytes(32), "names"],
    ["drop", bytes(32), ["a", 1]],
    ["drop", bytes(32), {"a": 1}],
    ["drop", 5, []],
    ["status", 5, "running"],
    ["status", "main", 5],
    ["status", "main", "\ud800"],
    ["status", "b" * 511, "running"],
    ["status", "b" * 511, None],
    ["expire", "3"],
    ["expire", -1],
    ["expire", 1 << 64],
    ["expire", True],
]


@pytest.mark.parametrize("fields", ABSURD, ids=repr)
def test_absurd_operations_are_damage(journal: Journal, fields: object) -> None:
    """A line may be whole and yet say what no program writes; LMDB must never be asked to keep it."""
    data = encode([0, "w", "y", [fields], {}])
    with pytest.raises(CorruptionError, match="log entry 1 is damaged"):
        LogEntry.decode(1, data)
    line = b" ".join((b"1", digest(b"1 " + data).hex().encode(), base64.b64encode(data))) + b"\n"
    whole = b" ".join((b"2", digest(b"2 " + data).hex().encode(), base64.b64encode(data))) + b"\n"
    journal.path.write_bytes(line + whole)
    with pytest.raises(CorruptionError, match="line 1 is damaged"):
        list(journal.entries())


@pytest.mark.parametrize(
    "fields",
    [
        ["now", "w", "y", [], {}],
        [1.5, "w", "y", [], {}],
        [True, "w", "y", [], {}],
        [1 << 63, "w", "y", [], {}],
        [0, b"w", "y", [], {}],
        [0, "w", None, [], {}],
        [0, "w", "y", {}, {}],
        [0, "w", "y", "", {}],
        [0, "w", "y", [], []],
        [0, "w", "y", [], {1: 1}],
        [0, "w", "y", [], {"a": Tagged(5, b"")}],
        [0, "w", "y", [], {"a": {}}],
    ],
    ids=repr,
)
def test_absurd_entries_are_damage(fields: object) -> None:
    with pytest.raises(CorruptionError, match="log entry 1 is damaged"):
        LogEntry.decode(1, encode(fields))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Move("refs/heads/" + "x" * 500, None, ONE),
        lambda: Move("HEAD", None, 5),  # type: ignore[arg-type]
        lambda: Note(ONE, "k" * 479, 1),
        lambda: Note(ONE, "\ud800", 1),
        lambda: Note(ONE, "k", [1]),  # type: ignore[arg-type]
        lambda: Note(bytes(32), "k", 1),  # type: ignore[arg-type]
        lambda: Drop(ONE, ["a"]),  # type: ignore[arg-type]
        lambda: Status("b" * 511, "running"),
        lambda: Status(5, "running"),  # type: ignore[arg-type]
        lambda: Expire(10**5000),
        lambda: LogEntry(1, 0, 5, "", ()),  # type: ignore[arg-type]
    ],
)
def test_what_the_index_could_not_keep_is_refused_when_it_is_made(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidError):
        make()


def test_the_longest_keys_fit_the_index(tmp_path: Path) -> None:
    made = Index.create(Disk(), tmp_path / "meta", "id")
    operations = [Move("r" * LONGEST_NAME, None, ONE), Note(ONE, "k" * LONGEST_KEY, 1)]
    with made.change() as change:
        change.record(1, "me", "why", [*operations, Status("b" * LONGEST_NAME, "running")])
    with made.snapshot() as snapshot:
        assert snapshot.ref("r" * LONGEST_NAME) == ONE
        assert snapshot.notes(ONE) == {"k" * LONGEST_KEY: 1}
    made.close()


@pytest.mark.parametrize(
    "fields",
    [["jump", b"x"], ["ref", "a", None], ["note", b"short", "k", 1], ["pin", bytes(32)], [], "ref", None],
)
def test_unknown_operations_are_refused(fields: object) -> None:
    with pytest.raises(CorruptionError, match="log entry 1 is damaged"):
        LogEntry.decode(1, encode([0, "w", "y", [fields], {}]))


def test_append_and_read(journal: Journal) -> None:
    assert journal.last_position() == 0
    assert list(journal.entries()) == []
    journal.append(lambda position: LOG[position:3])
    assert journal.last_position() == 3
    assert list(journal.entries()) == LOG[:3]
    journal.append(after)
    journal.append(after)
    assert list(journal.entries()) == LOG
    assert journal.path.read_bytes().count(b"\n") == len(LOG)
    position, mark, text = journal.path.read_bytes().splitlines()[4].split(b" ")
    assert (position, len(mark)) == (b"5", 32)
    assert text


def test_a_tail_torn_at_every_byte(journal: Journal) -> None:
    journal.append(after)
    whole = journal.path.read_bytes()
    ends = [0]
    while ends[-1] < len(whole):
        ends.append(whole.index(b"\n", ends[-1]) + 1)
    for size in {*range(0, len(whole) + 1, 5), *ends, *(end - 1 for end in ends[1:])}:
        complete = max(i for i, end in enumerate(ends) if end <= size)
        for junk in (b"", b"\0" * 40, b"\n", b"\0" * 30 + b"\n"):
            if junk.endswith(b"\n") and size != ends[complete]:
                continue
            journal.path.write_bytes(whole[:size] + junk)
            said: list[str] = []
            assert list(journal.entries(said.append)) == LOG[:complete]
            assert bool(said) == (size > ends[complete] or junk != b"")
            assert journal.last_position() == complete
            journal.append(after)
            assert journal.path.read_bytes() == whole


def test_a_damaged_middle_is_refused(journal: Journal) -> None:
    journal.append(after)
    lines = journal.path.read_bytes().splitlines(keepends=True)
    start = sum(map(len, lines[:3]))
    whole = b"".join(lines)
    for at in range(start, start + len(lines[3])):
        damaged = bytearray(whole)
        damaged[at] ^= 0x01
        journal.path.write_bytes(damaged)
        with pytest.raises(CorruptionError, match=r"line [45] is damaged"):
            list(journal.entries())
        assert journal.last_position() == len(LOG), "the tail is whole"
    for data in (b"".join(lines[:3] + lines[4:]), b"".join(lines[1:]), whole + lines[0], lines[0] + whole):
        journal.path.write_bytes(data)
        with pytest.raises(CorruptionError, match="is damaged"):
            list(journal.entries())


def test_a_long_journal_is_read_from_its_end(journal: Journal) -> None:
    """Also when its last line alone is longer than the window that is looked at."""
    long = [LogEntry(i, 0, "me", "x" * (200_000 if i == 3 else 10), ()) for i in range(1, 5)]
    for count in (3, 4):
        journal.append(lambda position, count=count: long[position:count])
        assert journal.last_position() == count
    assert list(journal.entries()) == long
    whole = journal.path.read_bytes()
    cut = whole.rindex(b"\n", 0, -1) - 100_000
    journal.path.write_bytes(whole[:cut])
    assert journal.last_position() == 2
    journal.append(lambda position: long[position:])
    assert journal.path.read_bytes() == whole


def test_what_a_failed_sync_left_does_not_count(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache may hold a line that the medium does not: it is written anew."""
    journal.append(lambda position: LOG[position:2])

    def fail(_: object) -> None:
        raise StorageError("sync failed")

    with monkeypatch.context() as patch:
        patch.setattr(WriteFile, "sync", fail)
        with pytest.raises(StorageError):
            journal.append(after)
    assert journal.last_position() == 2
    journal.append(after)
    assert list(journal.entries()) == LOG


RUBBISH = {
    "empty lines": b"\n" * (3 << 20),
    "short lines": b"x\n" * (1 << 20),
    "zeros and a line": bytes(17 << 20) + b"\n",
    "one line": b"x" * (17 << 20),
}


@pytest.mark.parametrize("name", RUBBISH)
def test_what_no_journal_wrote_is_told_at_once(journal: Journal, name: str) -> None:
    """Looking for the last whole line took the square of the file's size. And what no torn write leaves is
    not cut off: it may be all that is left of something."""
    journal.append(lambda _: [LogEntry(1, 0, "a", "one", ())])
    with journal.path.open("ab") as file:
        file.write(RUBBISH[name])
    with pytest.raises(CorruptionError, match="is damaged"):
        journal.last_position()
    size = journal.path.stat().st_size
    with pytest.raises(CorruptionError, match="is damaged"):
        journal.append(lambda _: [LogEntry(2, 0, "a", "two", ())])
    assert journal.path.stat().st_size == size
    with pytest.raises(CorruptionError, match="is damaged"):
        list(journal.entries())


def test_stale_blocks_behind_the_last_line_are_cut_off(journal: Journal) -> None:
    """A torn write may show what lay there before: many lines of anything."""
    journal.append(lambda _: [LogEntry(1, 0, "a", "one", ())])
    with journal.path.open("ab") as file:
        file.write(b"some other\nfile's lines\n" * 100)
    assert journal.last_position() == 1
    journal.append(lambda _: [LogEntry(2, 0, "a", "two", ())])
    assert [entry.position for entry in journal.entries()] == [1, 2]
