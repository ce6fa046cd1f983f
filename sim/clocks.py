"""The wall clocks of simulated hosts, for code that should not ask for one.

Baton measures time on the loop's monotonic clock and sends durations, so that setting a host's clock changes nothing.
Inside a run `time.time` and its kin answer as that host's clocks would: code that leans on them meets the jumps.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from baton.sim.loop import SimLoop, current_process

EPOCH_S = 1_800_000_000.0
"""Wall clock when a world begins."""
_NAMES = ("time", "time_ns", "monotonic", "monotonic_ns")


@contextlib.contextmanager
def host_clocks(loop: SimLoop) -> Iterator[None]:
    """This thread's clocks are the simulated ones until the end of the block; other threads keep the machine's."""
    here, real = threading.get_ident(), {name: getattr(time, name) for name in _NAMES}

    def wall() -> float:
        process = current_process()
        return EPOCH_S + loop.now + (process.wall_jump_s if process else 0.0)

    simulated = {
        "time": wall,
        "time_ns": lambda: int(wall() * 1e9),
        "monotonic": loop.time,
        "monotonic_ns": lambda: int(loop.time() * 1e9),
    }

    def clock(name: str) -> object:
        return lambda: (simulated if threading.get_ident() == here else real)[name]()

    for name in _NAMES:
        setattr(time, name, clock(name))
    try:
        yield
    finally:
        for name in _NAMES:
            setattr(time, name, real[name])
