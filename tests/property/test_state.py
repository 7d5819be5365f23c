"""Any state comes back to the last bit, and commits to the same tree again."""

import dataclasses

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptvcs.state import paths, tree
from ckptvcs.store.format import GRIDS
from ckptvcs.testing.memory import MemoryStore
from ckptvcs.testing.same import difference
from ckptvcs.testing.strategies import arrays, keys, states

# So small that a handful of values already makes pages of pages, chunk lists and blobs.
TINY = dataclasses.replace(GRIDS[1], chunk=16, inline=8, chunk_list=2, subtree=80, list_page=2, map_page=2)
quick = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@quick
@given(states, st.sampled_from([GRIDS[1], TINY]))
def test_round_trip(state, grid):
    store = MemoryStore(grid)
    written = tree.write(store, state)
    back = tree.read(store, written.tree)
    assert difference(state, back) is None
    assert tree.write(MemoryStore(grid), back).tree == written.tree
    for entry in tree.entries(store, written.tree):
        assert entry.nbytes >= 0


@quick
@given(st.lists(keys, max_size=4, unique_by=repr), st.lists(keys, max_size=4, unique_by=repr))
def test_paths_tell_keys_apart(left, right):
    typed = [[(type(key), key) for key in side] for side in (left, right)]
    names = ["/".join(map(paths.name, side)) for side in (left, right)]
    assert (names[0] == names[1]) == (typed[0] == typed[1])
    assert paths.split(names[0]) == tuple(map(paths.name, left))


@quick
@given(arrays(), st.data())
def test_views_come_back_sharing(base, data):
    if not base.ndim:
        base = base.reshape(1)
    base = base.copy()
    cuts = st.builds(slice, *[st.one_of(st.none(), st.integers(-4, 4))] * 2, st.sampled_from([1, 2, -1, -2]))
    views = [base[cut] for cut in data.draw(st.lists(cuts, min_size=1, max_size=4))]
    state = {"base": base, "views": views}
    store = MemoryStore(TINY)
    written = tree.write(store, state)
    back = tree.read(store, written.tree)
    assert difference(state, back) is None
    assert tree.write(MemoryStore(TINY), back).tree == written.tree
    back["base"].view(np.uint8 if base.dtype.itemsize == 1 else f"V{base.dtype.itemsize}")[...] = np.zeros(
        1, np.uint8 if base.dtype.itemsize == 1 else f"V{base.dtype.itemsize}"
    )
    assert all(not any(view.tobytes()) for view in back["views"])
    for only in ("base", "views", "views/0"):
        part = tree.read(store, written.tree, only=only)
        wanted = {"base": base} if only == "base" else {"views": views if only == "views" else views[:1]}
        assert difference(wanted, part) is None
