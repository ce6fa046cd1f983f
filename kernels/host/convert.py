"""KV from one element type to another, by the host library: a row is widened and stored as a step stores it.

There is no second way to do it: who computes without the library (engine/torch_runner.py) knows one type alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from baton.kernels.host import library


@dataclass(frozen=True, slots=True)
class Runs:
    """How the runs of both sides are shaped: `[token, dim]` elements, an int8 run with `[token]` fp32 scales behind."""

    head_dim: int
    block_size: int
    source_dtype: str
    destination_dtype: str

    def convert(self, source: memoryview, destination: memoryview, num_runs: int) -> None:
        """All of `source`, `num_runs` runs, into `destination`. May be called in any thread; the interpreter's lock is
        not held meanwhile."""
        theirs, ours = np.frombuffer(source, np.uint8), np.frombuffer(destination, np.uint8)
        expected = [num_runs * self._run_bytes(dtype) for dtype in (self.source_dtype, self.destination_dtype)]
        assert [theirs.nbytes, ours.nbytes] == expected, (theirs.nbytes, ours.nbytes, expected)
        shape = library.Shape(
            head_dim=self.head_dim, block_size=self.block_size, kv_format=library.FORMATS[self.source_dtype])
        library.load().baton_convert_kv(
            library.isas()[0].encode(), shape, theirs.ctypes.data, num_runs, library.FORMATS[self.destination_dtype],
            ours.ctypes.data)

    def _run_bytes(self, dtype: str) -> int:
        return self.block_size * {"fp32": 4 * self.head_dim, "bf16": 2 * self.head_dim, "int8": self.head_dim + 4}[dtype]
