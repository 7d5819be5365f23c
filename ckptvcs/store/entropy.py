"""zstandard, the entropy coder. The only module that knows it.

Two settings: plain zstandard for bytes in which strings repeat (objects, opaque files), and zstandard tuned
to be a Huffman coder for planes of numbers, in which bytes are unevenly frequent but do not repeat as
strings: a short window, long minimal matches and no acceleration leave nearly everything to the Huffman
stage, which is smaller and about three times faster than level 1 there (decision 10).

Compressors and decompressors are not thread-safe, so each thread has its own. All release the GIL.
"""

from __future__ import annotations

import threading
from typing import Final

import zstandard

from ckptvcs.ids import Buffer

_LEVEL: Final = 1
_HUFFMAN: Final = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=17,
    hash_log=6,
    min_match=7,
    target_length=0,  # anything else would let the compressor skip the Huffman stage
    write_content_size=True,
)


class _Coders(threading.local):
    def __init__(self) -> None:
        self.plain = zstandard.ZstdCompressor(level=_LEVEL)
        self.huffman = zstandard.ZstdCompressor(compression_params=_HUFFMAN)
        self.decoder = zstandard.ZstdDecompressor()


_coders = _Coders()


def deflate(raw: Buffer) -> bytes:
    """A zstandard frame of bytes in which strings repeat. It states its content's size."""
    return _coders.plain.compress(raw)


def huffman(raw: Buffer) -> bytes:
    """A zstandard frame of bytes that are unevenly frequent. It states its content's size."""
    return _coders.huffman.compress(raw)


def inflate(frame: Buffer, size: int) -> bytes:
    """The `size` bytes of a frame. ValueError if it is damaged, or states or holds another size.

    The stated size is looked at first, since zstandard allocates what a frame states whatever limit it is
    given.
    """
    try:
        stated = zstandard.frame_content_size(frame)
        if stated != size:
            raise ValueError(f"the frame states {stated} bytes, the record {size}")
        raw = _coders.decoder.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    if len(raw) != size:
        raise ValueError(f"the frame gave {len(raw)} bytes, not {size}")
    return raw
