"""The event log of one simulated run and its hash: the same seed gives the same hash in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TextIO


class Trace:
    """Lines `time who what details`. Every line goes into the hash; `out` also prints it."""

    def __init__(self, now: Callable[[], float], out: TextIO | None = None) -> None:
        self._now = now
        self._out = out
        self._hash = hashlib.sha256()
        self.num_lines = 0
        self.counts: dict[str, int] = {}

    def note(self, who: str, what: str, *details: object) -> None:
        """Details must print the same in every process: no object addresses, no set without an order."""
        line = f"{self._now():.6f} {who} {what} {' '.join(str(d) for d in details)}".rstrip()
        self.num_lines += 1
        self.counts[what] = self.counts.get(what, 0) + 1
        self._hash.update(line.encode() + b"\n")
        if self._out is not None:
            print(line, file=self._out)

    @property
    def digest(self) -> str:
        """First 16 hex digits of the hash of everything so far."""
        return self._hash.hexdigest()[:16]
