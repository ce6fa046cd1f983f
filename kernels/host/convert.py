"""KV from one element type to another, by the host library: a row is widened and stored as a step stores it.

There is no second way to do it: who computes without the library (engine/torch_runner.py) knows one type alone.
"""

from __future__ import annotations

import numpy as np

from baton.core.layout import KVLayout
from baton.kernels.host import library


def convert_kv(theirs: KVLayout, ours: KVLayout, source: memoryview, destination: memoryview) -> None:
    """All K and V runs in `source`, of layout `theirs`, into `destination`, of `ours`: they differ in type alone. May
    be called in any thread; the interpreter's lock is not held meanwhile."""
    lent, read = np.frombuffer(source, np.uint8), np.frombuffer(destination, np.uint8)
    num_runs = lent.nbytes // theirs.run_bytes
    expected = num_runs * theirs.run_bytes, num_runs * ours.run_bytes
    assert (lent.nbytes, read.nbytes) == expected, (lent.nbytes, read.nbytes, expected)
    shape = library.Shape(
        head_dim=ours.head_dim, block_size=ours.block_size, kv_format=library.FORMATS[theirs.dtype])
    isa, form = library.isas()[0].encode(), library.FORMATS[ours.dtype]
    library.load().baton_convert_kv(isa, shape, lent.ctypes.data, num_runs, form, read.ctypes.data)
