"""The journal: torn anywhere, it loses nothing that was complete, and it catches up."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.canonical import encode
from ckptvcs.disk import Disk, WriteFile
from ckptvcs.errors import CorruptionError, StorageError
from ckptvcs.ids import ObjectId, chunk_id
from ckptvcs.store.journal import Drop, Expire, Journal, LogEntry, Move, Note, Operation, Pin, Status

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
