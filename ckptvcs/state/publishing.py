"""Files that appear in a folder together: written under names of their own, then given their final ones.

No final name ever stands for half a file: each is complete and on the medium before it gets its name.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeAlias

from ckptvcs.disk import Disk, ReadFile, WriteFile, check_name, random_name
from ckptvcs.errors import ExistsError, StorageError
from ckptvcs.ids import Buffer
from ckptvcs.state.formats.outgoing import Sink

Writing: TypeAlias = Callable[[Sink], None]
"""Writes the content of a file to what it is given."""

_COPY: Final = 1 << 20
_WRITEBACK: Final = 4 << 20
"""From so many bytes on, the medium is told to begin."""


def write_all(
    disk: Disk, to: Path, files: Mapping[str, Writing], copies: Mapping[str, ReadFile], force: bool
) -> dict[str, int]:
    """Write `files`, and the content of `copies`, below the folder `to`; their bytes by name.

    ExistsError, with nothing written, if one of the names is taken, and not `force`. They get their names in
    the order of `copies` and then `files`. A failure leaves nothing behind but whole files.
    """
    for name in (*copies, *files):
        check_name(name)
    both = sorted(files.keys() & copies.keys())
    there = [name for name in (*files, *copies) if disk.exists(to / name)]
    if both or (there and not force):
        raise ExistsError(
            f"{', '.join(both or there[:10])} {'would be written twice' if both else f'is in {to} already'}",
            hint="another folder, or --force to replace",
        )
    temporary: dict[str, Path] = {}
    sizes: dict[str, int] = {}
    try:
        for name in (*copies, *files):
            temporary[name] = to / f".{random_name()}.ckpt-tmp"
            with disk.create(temporary[name]) as file:
                if name in files:
                    files[name](functools.partial(_put, file))
                else:
                    _copy(copies[name], file)
                file.sync()
                sizes[name] = file.size
        for name, path in list(temporary.items()):
            if force:
                disk.rename(path, to / name)
            else:
                disk.publish(path, to / name)
            del temporary[name]
        disk.sync_dir(to)
    except FileExistsError as error:
        raise ExistsError(f"{error.filename} was made meanwhile", hint="another folder") from None
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError, StorageError):
                disk.remove(path)
        for source in copies.values():
            source.close()
    return sizes


def _put(file: WriteFile, piece: Buffer) -> None:
    start = file.size
    file.write([piece])
    if file.size - start >= _WRITEBACK:
        file.start_writeback(start, file.size - start)


def _copy(source: ReadFile, file: WriteFile) -> None:
    at = 0
    while data := source.read(at, _COPY):
        file.write([data])
        at += len(data)
