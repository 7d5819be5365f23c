"""Write the golden files anew. A person runs this, and only after deciding to change the format:

    PYTHONPATH=. .venv/bin/python tests/golden/make.py --change-the-format

Files whose content would stay the same are left alone. No test calls it. A file that changes means that
repositories which exist can no longer be read or compared; raise the format version or add a new kind of
record instead. `records-zstd.hex` is kept when it exists: zstd versions compress differently, so these bytes
are frozen for decoding only. Delete it first if it has to be made anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ckptvcs.canonical import encode
from ckptvcs.ids import object_id
from ckptvcs.store import codec
from ckptvcs.store.journal import _line
from ckptvcs.store.packs import make_frame
from tests.golden import states, values

HERE = Path(__file__).parent
NAMES = (*states.STATES, *states.FILES)


def lines(named: dict[str, bytes]) -> bytes:
    """A text file: a name, a tab, hex."""
    return "".join(f"{name}\t{data.hex()}\n" for name, data in named.items()).encode()


def zstd_records() -> dict[str, bytes]:
    """Payloads that zstd makes smaller."""
    found = {}
    for name, (kind, payload) in values.PAYLOADS.items():
        stored = codec.deflate(payload)
        if stored is not None:
            frame = make_frame(kind, object_id(kind, payload), codec.ZSTD, 1, len(payload), stored)
            found[name] = frame.header.pack() + stored
    return found


def artifacts() -> dict[str, bytes]:
    """Every golden file as today's code would write it."""
    frames = values.raw_frames()
    return {
        "canonical.hex": lines({str(i): encode(value) for i, value in enumerate(values.CANONICAL)}),
        "ids.hex": lines({name: object_id(*payload) for name, payload in values.PAYLOADS.items()}),
        "objects.hex": lines({name: payload for name, (_, payload) in values.PAYLOADS.items()}),
        "records-raw.hex": lines({n: f.header.pack() + bytes(f.payload) for n, f in frames.items()}),
        "records-zstd.hex": lines(zstd_records()),
        "records-numbers.hex": lines(values.number_records()),
        "pack.bin": values.pack_bytes(),
        "format-0.txt": values.FORMATS[0].pack(),
        "format-1.txt": values.FORMATS[1].pack(),
        "refs.journal": b"".join(map(_line, values.JOURNAL)),
        "trees.hex": "".join(f"{line}\n" for name in NAMES for line in states.lines(name)).encode(),
        "commit.hex": lines({"commit": values.encoded_commit()}),
        "bundles.hex": lines({name: each.pack() for name, each in values.BUNDLES.items()}),
        "rows.hex": lines({str(i): row.encode() for i, row in enumerate(values.ROWS)}),
    }


def main() -> None:
    """Write what differs, if asked for."""
    if sys.argv[1:] != ["--change-the-format"]:
        sys.exit(__doc__)
    for name, data in artifacts().items():
        path = HERE / name
        if path.exists() and (
            path.read_bytes() == data or name in ("records-zstd.hex", "records-numbers.hex")
        ):
            continue
        path.write_bytes(data)
        print("written:", path)


if __name__ == "__main__":
    main()
