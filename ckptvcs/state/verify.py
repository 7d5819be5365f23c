"""Whether a live value is what a stored node says, found out without a second copy of it.

Content is hashed where it lies and compared with the ids of the stored chunks, so that the answer is exact
and takes the memory of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from ckptvcs.ids import chunk_id
from ckptvcs.state import generators, paths, torch_devices, torch_tensors, values
from ckptvcs.state.build import flat_encoding
from ckptvcs.state.interface import Source
from ckptvcs.state.read import (
    Branch,
    Compound,
    Content,
    Stored,
    StoredBlob,
    StoredLeaf,
    StoredRandom,
    StoredTensor,
    StoredTorch,
    torch_value,
)
from ckptvcs.state.tensors import SHARED_NAMES, ArraySource, BytesSource, Spec, capture, unit

Trusted: TypeAlias = Callable[[StoredTensor, Any], bool]
"""Whether a live tensor is known to hold what was stored, so that it need not be hashed."""


def differences(stored: Stored, live: Any, path: str, chunk: int, trusted: Trusted) -> dict[str, str]:
    """Path -> what is another there in `live` than was stored; {} if all that was stored is there.

    What `live` has beyond that is no difference, nor is a list for a tuple, or a 0-dim tensor of the same
    value for a number. Chunk lists must have been resolved; `chunk` is the grid's cell in bytes.
    """
    comparison = _Comparison(chunk, trusted)
    comparison.compare(stored, live, path)
    return comparison.found


class _Comparison:
    def __init__(self, chunk: int, trusted: Trusted) -> None:
        self._chunk = chunk
        self._trusted = trusted
        self._captures = torch_devices.Captures()
        self.found: dict[str, str] = {}

    def compare(self, stored: Stored, live: Any, path: str) -> None:
        """Note what differs at and below a path."""
        why: str | None = None
        if isinstance(stored, StoredTensor):
            why = self._tensor(stored, live)
        elif isinstance(stored, StoredLeaf):
            if not _same_leaf(stored.value, live):
                why = f"{stored.value!r:.60} stored, now {live!r:.60}"
        elif isinstance(stored, StoredTorch):
            made = torch_value(stored, None)
            if type(made) is not type(live) or made != live:
                why = f"{made!r} stored, now {live!r:.60}"
        elif isinstance(stored, StoredRandom):
            if not generators.holds(live, stored.code, stored.plain):
                why = "a random generator in another state"
        elif isinstance(stored, StoredBlob):
            if not _same_blob(stored, live, self._chunk):
                why = f"other {stored.kind}"
        elif isinstance(stored, Branch):
            compound = isinstance(stored, Compound)
            places = _parts_of(stored, live) if isinstance(stored, Compound) else _places(stored, live)
            if places is None:
                kind = type(live).__name__
                why = f"{stored.kind} stored, now {'another ' if compound else ''}{kind}"
            else:
                self._children(stored, places, path)
        if why is not None:
            self.found[path] = why

    def _children(self, stored: Branch, places: Mapping[Any, Any], path: str) -> None:
        for key, child in zip(stored.keys, stored.children, strict=True):
            below = paths.join(path, paths.name(key))
            if key in places:
                self.compare(child, places[key], below)
            else:
                self.found[below] = "not there any more"

    def _tensor(self, stored: StoredTensor, live: Any) -> str | None:
        array = capture(live) if isinstance(live, np.ndarray) else None
        if array is not None:
            spec = array[0]
        elif torch_tensors.is_tensor(live) and torch_tensors.is_dense(live):
            spec = torch_tensors.spec_of(live)
        else:
            return f"{described(stored.spec)} stored, now {type(live).__name__}"
        same = stored.spec.framework == spec.framework or spec.dtype in SHARED_NAMES
        if not same or (spec.dtype, spec.shape) != (stored.spec.dtype, stored.spec.shape):
            return f"{described(stored.spec)} stored, now {described(spec)}"
        if self._trusted(stored, live):
            return None
        if array is not None:
            source: Source = ArraySource(array[1], unit(spec.dtype, spec.item), spec.swap)
        else:
            source = self._captures.dense(live).source
        return None if holds(stored.content, source, self._chunk) else "other values than stored"


def described(spec: Spec) -> str:
    """A tensor as messages name it."""
    return f"{spec.framework} {spec.dtype}{list(spec.shape)}"


def _places(stored: Branch, live: Any) -> Mapping[Any, Any] | None:
    """What of a live container bears the keys of a stored one."""
    if not isinstance(live, type) and callable(getattr(live, "state_dict", None)):
        live = live.state_dict()
    if stored.kind == "bytearray":
        return {} if live == stored.make([], []) else None
    if stored.kind in ("list", "tuple", "deque"):
        ordered = isinstance(live, Sequence) and not isinstance(live, (str, bytes, bytearray))
        return dict(enumerate(live)) if ordered or hasattr(live, "maxlen") else None
    if stored.kind == "namedtuple":
        return dict(zip(live._fields, live, strict=True)) if values.is_namedtuple(live) else None
    if isinstance(live, Mapping):
        return live
    if isinstance(live, values.DataclassValue):
        return live.fields
    return vars(live) if hasattr(live, "__dict__") and stored.kind in ("namespace", "dataclass") else None


def _parts_of(stored: Compound, live: Any) -> Mapping[Any, Any] | None:
    if stored.kind == "generator":
        state = torch_tensors.generator_state(live)
        return None if state is None else {"state": state[1]}
    if not torch_tensors.is_tensor(live) or tuple(live.shape) != stored.shape:
        return None
    if stored.kind == "subclass":
        apart = torch_tensors.subclass(live)
        same = apart is not None and apart.type == stored.dtype
        return {**apart.parts, None: apart.context} if apart is not None and same else None
    sparse, quantized = torch_tensors.sparse(live), torch_tensors.quantized(live)
    return sparse[2] if sparse else quantized[4] if quantized else None


def holds(content: Content, source: Source, chunk: int) -> bool:
    """Whether these bytes are the stored ones."""
    if source.nbytes != content.nbytes:
        return False
    if content.inline is not None:
        return not content.nbytes or bytes(source.read(0, content.nbytes)) == content.inline
    assert content.chunks is not None
    return all(
        chunk_id(source.read(at * chunk, min(chunk, content.nbytes - at * chunk))) == id
        for at, id in enumerate(content.chunks)
    )


def _same_blob(stored: StoredBlob, live: Any, chunk: int) -> bool:
    if type(live).__name__ != stored.kind:
        return False
    data = live.encode("utf-8", "surrogatepass") if isinstance(live, str) else live
    return holds(stored.content, BytesSource(data), chunk)


def _same_leaf(stored: Any, live: Any) -> bool:
    if type(stored) in (int, float) and torch_tensors.is_tensor(live) and live.ndim == 0:
        return bool(live.item() == stored)
    encoded = flat_encoding(live)
    return encoded is not None and encoded == flat_encoding(stored)
