"""Which format a file has, by its content alone."""

from __future__ import annotations

from ckptvcs.state.formats import npz, safetensors, torchfile
from ckptvcs.state.formats.layout import MAX_NAME, MAX_TENSORS, File, Layout


def recognise(file: File) -> Layout | None:
    """The layout of a checkpoint file; None for any other file, and for one that is odd in any way.

    Reads headers and tables, no tensors. Runs nothing from the file. Takes memory in proportion to what it
    reads, of which every part is bounded. Raises only what `file.read` raises.
    """
    head = file.read(0, 16)
    if head[:4] == b"PK\3\4":
        found = torchfile.parse(file) or npz.parse(file)
    elif head[:6] == b"\x93NUMPY":
        found = npz.parse_npy(file)
    else:
        found = safetensors.parse(file)
    return found if found is not None and _is_sound(file, found) else None


def _is_sound(file: File, layout: Layout) -> bool:
    """What every user of a layout relies on, whichever parser made it."""
    end = 0
    for part in layout.parts:
        if part.offset < end or not part.dense:
            return False
        end = part.offset + part.spec.nbytes
    names = {part.name for part in layout.parts}
    return (
        end <= file.size
        and all(tensor.offset + tensor.extent <= file.size for tensor in layout.tensors)
        and len(layout.tensors) <= MAX_TENSORS
        and len(names) == len(layout.parts) <= MAX_TENSORS
        and all(0 < len(name) <= MAX_NAME for name in names)
    )
