"""Repositories as nobody honest makes them, built with the store's own low-level writers."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ckptvcs import Repo, canonical
from ckptvcs.canonical import Tagged, encode
from ckptvcs.disk import Disk
from ckptvcs.history.commit import encode_commit
from ckptvcs.ids import Kind, ObjectId, chunk_id, digest
from ckptvcs.state import codes
from ckptvcs.store import Move, Note, Pin, Store, codec
from ckptvcs.store.format import pack_object
from ckptvcs.store.index import Change, PackInfo
from ckptvcs.store.journal import Drop, LogEntry, Status
from ckptvcs.store.packs import make_frame
from tests.crash.stores import Bytes, publication

MAIN: Final = "refs/heads/main"
EVIL: Final = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\r\nfake line\u202e\u2066\x9b1m\u200b"
"""What steers a terminal: escapes, C1 codes, text from right to left, what has no width."""

Builder = Callable[[Path], None]
HOSTILE: Final[dict[str, Builder]] = {}


def hostile(build: Builder) -> Builder:
    """Add a builder. Its first argument is an empty folder; beside it is one that nothing may touch."""
    HOSTILE[build.__name__.removeprefix("_").replace("_", " ")] = build
    return build


# -- tools ----------------------------------------------------------------------------------------


def honest(folder: Path) -> None:
    """A repository with two commits of a state and files."""
    (folder / "notes.txt").write_text("beside the state\n")
    with Repo.init(folder) as repo:
        for step in range(2):
            state = {"w": np.arange(500, dtype="f4") + step, "b": np.ones(3), "step": step}
            repo.commit(
                state, f"step {step}", step=step, metrics={"val_loss": 1.0}, files={"n": folder / "notes.txt"}
            )
        repo.tag("v1")


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Store]:
    """The store below a folder."""
    with contextlib.closing(Store.open(folder / ".ckpt", Disk(), threads=1)) as store:
        yield store


def tip(store: Store) -> ObjectId:
    """Where main stands."""
    with store.snapshot() as snapshot:
        target = snapshot.ref(MAIN)
    assert isinstance(target, ObjectId)
    return target


def commit_fields(**changed: Any) -> dict[str, Any]:
    """What a commit says, but for what is changed."""
    plain: dict[str, Any] = {"config": {}, "overrides": {}, "environment": {}, "sizes": {}, "metrics": {}}
    plain |= {"author": "a", "time": 0, "message": "m", "step": None, "epoch": None}
    return {**plain, **changed}


def publish(folder: Path, tree: bytes, chunks: Sequence[bytes] = (), **fields: Any) -> ObjectId:
    """Put chunks, one tree and a commit of it on main. The tree's payload is as it is."""
    with opened(folder) as store, store.writer() as writer:
        old = tip(store)
        writer.put([Bytes(chunk) for chunk in chunks])
        (tree_id,) = writer.put_objects(Kind.TREE, [tree])
        payload = encode_commit(tree=tree_id, parents=[old], origin=None, **commit_fields(**fields))
        (made,) = writer.put_objects(Kind.COMMIT, [payload])
        assert writer.publish(publication(made, old))
        store.catch_up_journal()
    return made


def publish_commit(folder: Path, references: list[tuple[Kind, ObjectId]], body: Any) -> None:
    """Put a commit whose payload is as it is, on main."""
    with opened(folder) as store, store.writer() as writer:
        (made,) = writer.put_objects(Kind.COMMIT, [pack_object(references, encode(body))])
        assert writer.publish(publication(made, tip(store)))
        store.catch_up_journal()


def change(folder: Path, alter: Callable[[Change, Store], object]) -> None:
    """Alter the index as its owner would, without any check."""
    with opened(folder) as store, store.index.change() as txn:
        alter(txn, store)


def record(folder: Path, *operations: Any) -> None:
    """Log operations that no verb would ask for, and apply them."""
    with opened(folder) as store:
        with store.index.change() as txn:
            txn.record(0, "somebody", "evil", operations)
        store.catch_up_journal()


def root(**parts: Any) -> bytes:
    """The payload of a commit's tree without references."""
    return pack_object([], encode(Tagged(codes.ROOT, encode(parts))))


def tensor(shape: list[int], data: Any, dtype: str = "float32") -> Tagged:
    """A tensor's node."""
    return Tagged(codes.TENSOR, encode(["numpy", dtype, shape, 0, None, data]))


def file(data: bytes, size: int | None = None) -> Tagged:
    """A file's node, its content inline."""
    return Tagged(
        codes.FILE, encode([len(data) if size is None else size, 0o644, bytes(chunk_id(data)), 0, data])
    )


# -- names ----------------------------------------------------------------------------------------


@hostile
def _names_of_refs_that_lead_outside(folder: Path) -> None:
    honest(folder)
    with opened(folder) as store:
        here = tip(store)
    names = ["../../outside/x", "/etc/passwd", "a/../../b", "", ".", "x\0y", "-rf", "con", "HEAD", "a" * 450]
    record(
        folder,
        *(Move(f"refs/{kind}/{name}", None, here) for kind in ("heads", "tags", "lost") for name in names),
    )
    record(folder, Move("refs/heads", None, here), Move("../outside/x", None, here), Move("", None, here))


@hostile
def _names_of_refs_that_steer_a_terminal(folder: Path) -> None:
    honest(folder)
    with opened(folder) as store:
        here = tip(store)
    record(folder, *(Move(f"refs/{kind}/{EVIL}", None, here) for kind in ("heads", "tags", "lost")))
    record(folder, Status(EVIL, EVIL), Note(here, EVIL, EVIL), Note(here, "val_loss", EVIL))
    record(folder, Move("HEAD", MAIN, f"refs/heads/{EVIL}"))


@hostile
def _texts_that_steer_a_terminal(folder: Path) -> None:
    honest(folder)
    publish(
        folder,
        root(
            state={
                EVIL: {EVIL: EVIL},
                "t": tensor([1], bytes(4)),
                "e": Tagged(codes.PATH, encode(["PosixPath", EVIL])),
            },
            files={EVIL.replace("/", ""): file(b"x"), "l": Tagged(codes.LINK, encode(EVIL))},
        ),
        message=EVIL,
        author=EVIL,
        metrics={EVIL: 1.0},
        config={EVIL: EVIL, "deep": {EVIL: [EVIL, {EVIL: 1}]}},
        environment={EVIL: EVIL},
        sizes={EVIL: 1},
    )
    with opened(folder) as store, store.index.change() as txn:
        txn.record(0, EVIL, EVIL, [Note(tip(store), EVIL, EVIL)], {EVIL: EVIL})
    (folder / ".ckpt" / "config.toml").write_text('[metric."\\u001b[31m"]\nmode = "max"\n')


@hostile
def _settings_that_steer_a_terminal(folder: Path) -> None:
    honest(folder)
    (folder / ".ckpt" / "config.toml").write_text('author = "\\u001b[31mred"\nother = "\\u001b]0;x\\u0007"\n')


@hostile
def _an_error_in_the_settings_that_steers_a_terminal(folder: Path) -> None:
    honest(folder)
    (folder / ".ckpt" / "config.toml").write_text('compression = "\\u001b[31mred"\n')


@hostile
def _features_that_steer_a_terminal(folder: Path) -> None:
    import json

    honest(folder)
    path = folder / ".ckpt" / "format"
    title, body, _, _ = path.read_text().split("\n")
    fields = json.loads(body)
    fields["features"]["write"] = [EVIL, "x" * 100_000]
    line = json.dumps(fields, sort_keys=True)
    path.write_text(f"{title}\n{line}\n{digest(line.encode()).hex()}\n")


@hostile
def _files_that_lead_outside(folder: Path) -> None:
    honest(folder)
    publish(folder, root(files={"..": {"outside": {"x": file(b"evil")}}}))


@hostile
def _files_behind_a_link(folder: Path) -> None:
    honest(folder)
    publish(folder, root(files={"d": Tagged(codes.LINK, encode("../outside")), "d/x": file(b"evil")}))


@hostile
def _files_in_the_repository_itself(folder: Path) -> None:
    honest(folder)
    publish(folder, root(files={".CKPT": {"config.toml": file(b"evil")}}))


@hostile
def _a_tensor_whose_name_leads_outside(folder: Path) -> None:
    honest(folder)
    content = bytes(400)
    names = {"../../outside/x": tensor([100], content[:400][:256]), "/abs": tensor([2], bytes(8))}
    names["../../outside/x"] = tensor([64], bytes(256))
    publish(folder, root(state=names))


# -- heads and refs -------------------------------------------------------------------------------


@hostile
def _a_head_that_names_itself(folder: Path) -> None:
    honest(folder)
    record(folder, Move("HEAD", MAIN, "HEAD"))


@hostile
def _heads_in_a_circle(folder: Path) -> None:
    honest(folder)
    with opened(folder) as store:
        here = tip(store)
    record(folder, Move("HEAD", MAIN, "refs/heads/b"), Move("refs/heads/b", None, "refs/heads/a"))
    record(
        folder, Move("refs/heads/a", None, "refs/heads/b"), Move("refs/tags/t", None, "HEAD"), Pin(here, True)
    )


@hostile
def _a_head_that_names_no_branch(folder: Path) -> None:
    honest(folder)
    record(folder, Move("HEAD", MAIN, "refs/tags/v1"))


@hostile
def _no_head(folder: Path) -> None:
    honest(folder)
    record(folder, Move("HEAD", MAIN, None))


@hostile
def _refs_to_what_is_no_commit(folder: Path) -> None:
    honest(folder)
    with opened(folder) as store, store.snapshot() as snapshot:
        rows = dict(snapshot.rows_from(b"", 1000))
    kinds = {row.kind: id for id, row in rows.items()}
    record(folder, *(Move(f"refs/heads/{kind.label}", None, id) for kind, id in kinds.items()))
    record(
        folder, Move("refs/heads/nothing", None, ObjectId(bytes(32))), Move("HEAD", MAIN, "refs/heads/tree")
    )
    record(
        folder,
        Pin(ObjectId(bytes(32)), True),
        Drop(kinds[Kind.TREE], ("x",)),
        Note(kinds[Kind.CHUNK], "k", 1),
    )


# -- objects --------------------------------------------------------------------------------------


@hostile
def _a_commit_with_a_million_parents(folder: Path) -> None:
    honest(folder)
    with opened(folder) as store:
        here = tip(store)
        with store.reader() as reader:
            payload = reader.objects(Kind.COMMIT, [here])[0]
    from ckptvcs.store.format import unpack_object

    tree = unpack_object(payload, "commit")[0][0]
    body = {"tree": 0, "parents": [1] * 1_000_000, "origin": 1, **commit_fields()}
    publish_commit(folder, [tree, (Kind.COMMIT, here)], body)


@hostile
def _a_commit_with_as_many_parents_as_may_be(folder: Path) -> None:
    """Each line of a graph has as many columns."""
    honest(folder)
    with opened(folder) as store, store.writer() as writer:
        here = tip(store)
        (tree,) = writer.put_objects(Kind.TREE, [root(state=None)])
        fields = [commit_fields(message=str(i)) for i in range(256)]
        parents = writer.put_objects(
            Kind.COMMIT, [encode_commit(tree=tree, parents=[here], origin=None, **each) for each in fields]
        )
        top = encode_commit(tree=tree, parents=parents, origin=None, **commit_fields())
        (made,) = writer.put_objects(Kind.COMMIT, [top])
        assert writer.publish(publication(made, here))
        store.catch_up_journal()


@hostile
def _a_ladder_of_merges(folder: Path) -> None:
    """Forty times two parents that have the same two: a trillion paths from the tip down."""
    honest(folder)
    with opened(folder) as store, store.writer() as writer:
        here = tip(store)
        (tree,) = writer.put_objects(Kind.TREE, [root(state=None)])
        pair = [here]
        for number in range(40):
            made = [
                encode_commit(
                    tree=tree, parents=pair, origin=None, **commit_fields(message=f"{number} {side}")
                )
                for side in range(2)
            ]
            pair = writer.put_objects(Kind.COMMIT, made)
        assert writer.publish(publication(pair[0], here))
        store.catch_up_journal()


@hostile
def _a_long_line_of_commits(folder: Path) -> None:
    honest(folder)
    with opened(folder) as store, store.writer() as writer:
        old = here = tip(store)
        (tree,) = writer.put_objects(Kind.TREE, [root(state=None)])
        for number in range(1500):
            fields = commit_fields(message=str(number), step=number)
            (here,) = writer.put_objects(
                Kind.COMMIT, [encode_commit(tree=tree, parents=[here], origin=None, **fields)]
            )
        assert writer.publish(publication(here, old))
        store.catch_up_journal()


@hostile
def _numbers_without_end(folder: Path) -> None:
    honest(folder)
    big = 1 << 20_000
    publish(
        folder,
        root(state={"n": big, "f": float("nan")}),
        time=big,
        step=-big,
        epoch=float("inf"),
        metrics={"val_loss": big, "nan": float("nan")},
        config={"n": big},
        sizes={"a": big, "b": 1},
    )


@hostile
def _a_commit_of_eight_megabytes_of_message(folder: Path) -> None:
    honest(folder)
    publish(folder, root(state=1), message="x" * (7 << 20), config={f"k{i}": i for i in range(50_000)})


@hostile
def _a_tree_that_unfolds_without_end(folder: Path) -> None:
    """Ninety levels, each of the level below twice."""
    honest(folder)
    with opened(folder) as store, store.writer() as writer:
        old = tip(store)
        (below,) = writer.put_objects(Kind.TREE, [pack_object([], encode(["x" * 3000]))])
        for _ in range(90):
            link = Tagged(codes.SUBTREE, encode(0))
            (below,) = writer.put_objects(
                Kind.TREE, [pack_object([(Kind.TREE, below)], encode([link, link]))]
            )
        body = encode(Tagged(codes.ROOT, encode({"state": Tagged(codes.SUBTREE, encode(0))})))
        (top,) = writer.put_objects(Kind.TREE, [pack_object([(Kind.TREE, below)], body)])
        payload = encode_commit(tree=top, parents=[old], origin=None, **commit_fields())
        (made,) = writer.put_objects(Kind.COMMIT, [payload])
        assert writer.publish(publication(made, old))
        store.catch_up_journal()


@hostile
def _a_tree_nested_deeper_than_any_state(folder: Path) -> None:
    honest(folder)
    value: Any = 1
    for _ in range(190):
        value = [value]
    publish(folder, root(state=value))


@hostile
def _a_tree_of_a_million_times_nothing(folder: Path) -> None:
    honest(folder)
    publish(folder, root(state=[None] * 1_000_000))


@hostile
def _tensors_larger_than_any_memory(folder: Path) -> None:
    """64 gibibytes that are one mebibyte many times."""
    honest(folder)
    chunk = bytes(1 << 20)
    count = 1 << 16
    with opened(folder) as store, store.writer() as writer:
        old = tip(store)
        writer.put([Bytes(chunk)])
        payload = pack_object([(Kind.CHUNK, chunk_id(chunk))] * count, b"")
        (listed,) = writer.put_objects(Kind.CHUNK_LIST, [payload])
        huge = tensor([count << 20], {"list": 0}, "uint8")
        body = encode(Tagged(codes.ROOT, encode({"state": {"huge": huge}})))
        (tree,) = writer.put_objects(Kind.TREE, [pack_object([(Kind.CHUNK_LIST, listed)], body)])
        commit = encode_commit(tree=tree, parents=[old], origin=None, **commit_fields())
        (made,) = writer.put_objects(Kind.COMMIT, [commit])
        assert writer.publish(publication(made, old))
        store.catch_up_journal()


@hostile
def _tensors_whose_shape_overflows(folder: Path) -> None:
    honest(folder)
    publish(
        folder, root(state={"t": tensor([1 << 40, 1 << 40, 0, 1 << 62], b""), "u": tensor([1 << 70], b"")})
    )


@hostile
def _files_larger_than_any_disk(folder: Path) -> None:
    honest(folder)
    publish(folder, root(files={"f": file(b"x", size=1 << 62), "g": file(b"x", size=-1)}))


@hostile
def _wrong_kinds(folder: Path) -> None:
    """A commit whose tree is a chunk, and a tree whose parts are of other kinds than it says."""
    honest(folder)
    with opened(folder) as store, store.writer() as writer:
        old = tip(store)
        chunk = b"a chunk, and no tree" * 20
        writer.put([Bytes(chunk)])
        body = encode(Tagged(codes.ROOT, encode({"state": Tagged(codes.SUBTREE, encode(0))})))
        trees = writer.put_objects(Kind.TREE, [pack_object([(Kind.CHUNK, chunk_id(chunk))], body)])
        payload = encode_commit(tree=trees[0], parents=[old], origin=old, **commit_fields())
        (made,) = writer.put_objects(Kind.COMMIT, [payload])
        wrong = payload.replace(bytes([Kind.TREE]) + trees[0], bytes([Kind.TREE]) + chunk_id(chunk))
        (top,) = writer.put_objects(Kind.COMMIT, [wrong])
        writer._reuses = lambda _: False  # type: ignore[method-assign]  # which an honest writer looks up
        assert writer.publish(publication(top, old))
        store.catch_up_journal()
    record(folder, Move("refs/heads/other", None, made))


# -- records, rows and packs ----------------------------------------------------------------------


@hostile
def _decompression_bombs(folder: Path) -> None:
    """Zeros that are a thousandth of their size, as chunk, tree and commit, and a chunk beyond its cell."""
    honest(folder)
    with opened(folder) as store, store.writer() as writer:
        old = tip(store)
        large = bytes(64 << 20)
        packed = codec.deflate(large)
        assert packed is not None
        writer.put_frame(
            chunk_id(large), make_frame(Kind.CHUNK, chunk_id(large), codec.ZSTD, 4, len(large), packed)
        )
        state = {"t": tensor([len(large) // 4], [0])}
        body = encode(Tagged(codes.ROOT, encode({"state": state})))
        links = [(Kind.CHUNK, chunk_id(large))]
        (tree,) = writer.put_objects(Kind.TREE, [pack_object(links, body)])
        (zeros,) = writer.put_objects(Kind.TREE, [bytes(8 << 20)])
        commits = [
            encode_commit(tree=each, parents=[old], origin=None, **commit_fields()) for each in (tree, zeros)
        ]
        made = writer.put_objects(Kind.COMMIT, commits)
        (nothing,) = writer.put_objects(Kind.COMMIT, [bytes(8 << 20)])
        assert writer.publish(publication(made[0], old))
        store.catch_up_journal()
    record(folder, Move("refs/heads/zeros", None, made[1]), Move("refs/heads/nothing", None, nothing))


def _rows(folder: Path, alter: Callable[[Any], Any]) -> None:
    def all_rows(txn: Change, store: Store) -> None:
        for id, row in txn.rows_from(b"", 1000):
            txn.put_row(id, alter(row))

    honest(folder)
    change(folder, all_rows)


@hostile
def _rows_outside_their_packs(folder: Path) -> None:
    _rows(folder, lambda row: row._replace(offset=1 << 62))


@hostile
def _rows_of_the_wrong_record(folder: Path) -> None:
    _rows(folder, lambda row: row._replace(offset=0))


@hostile
def _rows_of_the_largest_size(folder: Path) -> None:
    _rows(folder, lambda row: row._replace(stored=64 << 20, raw=8 << 20))


@hostile
def _rows_in_packs_that_are_not_there(folder: Path) -> None:
    _rows(folder, lambda row: row._replace(pack=row.pack._replace(seq=999_999_999)))


@hostile
def _bases_in_a_circle(folder: Path) -> None:
    def circle(txn: Change, store: Store) -> None:
        chunks = [(id, row) for id, row in txn.rows_from(b"", 1000) if row.kind is Kind.CHUNK]
        for (id, row), (other, _) in zip(chunks, [*chunks[1:], chunks[0]], strict=True):
            txn.put_row(id, row._replace(base=other, codec=codec.DIFFERENCE, depth=1))

    honest(folder)
    change(folder, circle)


@hostile
def _packs_of_any_size_in_the_table(folder: Path) -> None:
    def sizes(txn: Change, store: Store) -> None:
        for name in txn.packs():
            txn.put_pack(name, PackInfo((1 << 64) - 1, (1 << 32) - 1))

    honest(folder)
    change(folder, sizes)


@hostile
def _an_index_full_of_rubbish(folder: Path) -> None:
    """A value of a wrong form in every table."""

    def rubbish(txn: Change, store: Store) -> None:
        here = tip(store)
        for table, key in (
            ("rows", bytes(32)), ("rows", b"short"), ("packs", bytes(20)), ("packs", b"x"),
            ("refs", b"refs/heads/\xff"), ("refs", b"refs/heads/x"), ("log", (1 << 40).to_bytes(8, "big")),
            ("notes", here + b"\xff"), ("notes", b"x"), ("pins", b"short"), ("drops", bytes(here)),
            ("status", b"\xff"), ("meta", b"gc_seq"), ("meta", b"other"),
        ):  # fmt: skip
            txn._put(table, key, b"\xff" * 40)

    honest(folder)
    change(folder, rubbish)


@hostile
def _one_rotten_pack_entry(folder: Path) -> None:
    honest(folder)
    change(folder, lambda txn, store: txn._put("packs", bytes(20), b"\xff"))


@hostile
def _one_rotten_pin_and_status(folder: Path) -> None:
    def rot(txn: Change, store: Store) -> None:
        txn._put("pins", b"short", b"")
        txn._put("status", b"\xff\xfe", b"\xff")

    honest(folder)
    change(folder, rot)


@hostile
def _one_rotten_note(folder: Path) -> None:
    honest(folder)
    change(folder, lambda txn, store: txn._put("notes", tip_in(txn) + b"\xff", b"\xc1"))


@hostile
def _a_note_that_is_a_map(folder: Path) -> None:
    honest(folder)
    change(
        folder, lambda txn, store: txn._put("notes", tip_in(txn) + b"val_loss", canonical.encode({"a": [1]}))
    )


@hostile
def _one_rotten_ref_name(folder: Path) -> None:
    honest(folder)
    change(folder, lambda txn, store: txn._put("refs", b"refs/heads/\xff\xfe", b"\x00" + tip_in(txn)))


@hostile
def _numbers_of_the_index_without_end(folder: Path) -> None:
    honest(folder)
    change(folder, lambda txn, store: txn._put("meta", b"gc_seq", b"\xff" * 8))


def tip_in(txn: Change) -> bytes:
    """Where main stands."""
    found = txn.ref(MAIN)
    assert isinstance(found, ObjectId)
    return bytes(found)


# -- the journal and the small files --------------------------------------------------------------


def _line(entry: LogEntry) -> bytes:
    data, position = entry.encode(), str(entry.position).encode()
    return b"%s %s %s\n" % (position, digest(position + b" " + data).hex().encode(), base64.b64encode(data))


@hostile
def _a_journal_that_is_ahead(folder: Path) -> None:
    honest(folder)
    with (folder / ".ckpt" / "refs.journal").open("ab") as journal:
        journal.write(_line(LogEntry((1 << 63) - 1, 0, "x", "evil", ())))


@hostile
def _a_journal_line_of_a_hundred_megabytes(folder: Path) -> None:
    honest(folder)
    with (folder / ".ckpt" / "refs.journal").open("ab") as journal:
        journal.write(b"x" * (100 << 20))


@hostile
def _a_journal_of_empty_lines(folder: Path) -> None:
    honest(folder)
    with (folder / ".ckpt" / "refs.journal").open("ab") as journal:
        journal.write(b"\n" * (1 << 20))


@hostile
def _a_journal_of_short_lines(folder: Path) -> None:
    honest(folder)
    with (folder / ".ckpt" / "refs.journal").open("ab") as journal:
        journal.write(b"x\n" * (1 << 19))


@hostile
def _a_sparse_format_of_a_terabyte(folder: Path) -> None:
    honest(folder)
    os.truncate(folder / ".ckpt" / "format", 1 << 40)


@hostile
def _sparse_settings_of_a_terabyte(folder: Path) -> None:
    honest(folder)
    os.truncate(folder / ".ckpt" / "config.toml", 1 << 40)


@hostile
def _a_sparse_journal_of_a_terabyte(folder: Path) -> None:
    honest(folder)
    os.truncate(folder / ".ckpt" / "refs.journal", 1 << 40)


@hostile
def _a_sparse_pack_of_a_terabyte(folder: Path) -> None:
    honest(folder)
    for path in (folder / ".ckpt" / "packs").rglob("*.pack"):
        path.chmod(0o644)
        os.truncate(path, 1 << 40)


@hostile
def _settings_nested_without_end(folder: Path) -> None:
    honest(folder)
    (folder / ".ckpt" / "config.toml").write_text("a = " + "[" * 100_000)


# -- what lies in the folder ----------------------------------------------------------------------


def _outside(folder: Path) -> Path:
    return folder.parent / "outside"


def _linked(folder: Path, name: str, target: Path) -> None:
    """Something of the repository becomes a link to what is outside."""
    honest(folder)
    path = folder / ".ckpt" / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(target)


for _name in ("tmp", "packs", "leases", "incoming", "quarantine", "meta"):
    HOSTILE[f"a link in place of {_name}"] = lambda folder, name=_name: _linked(
        folder, name, _outside(folder)
    )  # type: ignore[misc]
for _name in ("refs.journal", "config.toml", "format", "lock", "gc.lock", ".gitignore"):
    HOSTILE[f"a link in place of {_name}"] = lambda folder, name=_name: _linked(  # type: ignore[misc]
        folder, name, _outside(folder) / "precious.txt"
    )


@hostile
def _links_in_place_of_the_folders_of_packs(folder: Path) -> None:
    honest(folder)
    packs = folder / ".ckpt" / "packs"
    for number in range(256):
        shutil.rmtree(packs / f"{number:02x}", ignore_errors=True)
        (packs / f"{number:02x}").symlink_to(_outside(folder))


@hostile
def _a_link_in_place_of_a_pack(folder: Path) -> None:
    honest(folder)
    for path in (folder / ".ckpt" / "packs").rglob("*.pack"):
        path.unlink()
        path.symlink_to("/dev/zero")


@hostile
def _leftovers_that_are_links(folder: Path) -> None:
    honest(folder)
    for name in (
        "tmp/meta-x",
        "tmp/old-x",
        "tmp/11111111-1111-1111-1111-111111111111-1.pack",
        "leases/claim-x",
    ):
        (folder / ".ckpt" / name).symlink_to(_outside(folder))
    (folder / ".ckpt" / "leases" / "22222222-2222-2222-2222-222222222222").symlink_to(
        _outside(folder) / "precious.txt"
    )
    (folder / ".ckpt" / "format.x.tmp").symlink_to(_outside(folder) / "precious.txt")


def _piped(folder: Path, name: str) -> None:
    honest(folder)
    path = folder / ".ckpt" / name
    path.unlink()
    os.mkfifo(path)


for _name in ("refs.journal", "config.toml", "format", "lock", "gc.lock"):
    HOSTILE[f"a pipe in place of {_name}"] = lambda folder, name=_name: _piped(folder, name)  # type: ignore[misc]


@hostile
def _pipes_in_place_of_packs_and_leases(folder: Path) -> None:
    honest(folder)
    for path in (folder / ".ckpt" / "packs").rglob("*.pack"):
        path.unlink()
        os.mkfifo(path)
    os.mkfifo(folder / ".ckpt" / "leases" / "22222222-2222-2222-2222-222222222222")
    os.mkfifo(folder / ".ckpt" / "leases" / "claim-00112233445566778899aabbccddeeff")
    os.mkfifo(folder / ".ckpt" / "tmp" / "11111111-1111-1111-1111-111111111111-1.pack")


@hostile
def _folders_in_place_of_files(folder: Path) -> None:
    honest(folder)
    for name in ("refs.journal", "config.toml"):
        (folder / ".ckpt" / name).unlink()
        (folder / ".ckpt" / name).mkdir()
    for path in list((folder / ".ckpt" / "packs").rglob("*.pack")):
        path.unlink()
        path.mkdir()


@hostile
def _files_in_place_of_folders(folder: Path) -> None:
    honest(folder)
    for name in ("tmp", "leases", "incoming", "quarantine"):
        shutil.rmtree(folder / ".ckpt" / name)
        (folder / ".ckpt" / name).write_text("no folder")


@hostile
def _names_without_end_among_the_leftovers(folder: Path) -> None:
    honest(folder)
    for name in ("packs", "tmp", "leases", "incoming", "quarantine"):
        for strange in (EVIL.replace("/", ""), "-rf", "a" * 250, "x\udcffy"):
            (folder / ".ckpt" / name / strange).write_bytes(b"x")
