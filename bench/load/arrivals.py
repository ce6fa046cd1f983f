"""When requests are meant to be sent: pure functions from a process, a rate and a seed to a list of seconds.

Knows no clock: an open loop fixes its schedule before the first request leaves, so that a slow server cannot slow the
schedule down, and with it hide how long its clients would have waited.

| process | gaps |
|---|---|
| `constant` | all alike |
| `poisson` | exponential: independent users |
| `gamma:cv=C` | Gamma with coefficient of variation C: 1 is Poisson, above it requests come in clumps |
| `onoff:on_s=A,off_s=B` | Poisson for A seconds, silence for B; the rate given is the mean over both |
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from baton.core.errors import SetupError

Kind = Literal["constant", "poisson", "gamma", "onoff"]
SETTINGS: dict[str, tuple[str, ...]] = {"gamma": ("cv",), "onoff": ("on_s", "off_s")}


@dataclass(frozen=True, slots=True)
class Process:
    """How arrivals follow each other, whatever their rate."""

    kind: Kind = "poisson"
    cv: float = 1.0
    on_s: float = 1.0
    off_s: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Process:
        """From `kind` or `kind:setting=number,...`. Raises SetupError naming what is wrong."""
        kind, _, rest = text.partition(":")
        wrong = SetupError(
            f"the arrivals {text!r} are none of {', '.join(get_args(Kind))}; as in `poisson`, `gamma:cv=3` or "
            "`onoff:on_s=2,off_s=8`, with positive numbers."
        )
        if kind not in get_args(Kind):
            raise wrong
        values = {}
        for item in filter(None, rest.split(",")):
            name, _, number = item.partition("=")
            if name not in SETTINGS.get(kind, ()):
                raise wrong
            try:
                values[name] = float(number)
            except ValueError:
                raise wrong from None
            if not 0 < values[name] < float("inf"):
                raise wrong
        if set(values) != set(SETTINGS.get(kind, ())):
            raise wrong
        return cls(kind, **values)  # type: ignore[arg-type]


def arrivals(process: Process, rate: float, duration_s: float, rng: random.Random) -> list[float]:
    """Seconds from the start, ascending, all below `duration_s`; `rate` is the mean per second."""
    assert rate > 0, rate
    assert duration_s > 0, duration_s
    times: list[float] = []
    for at_s in _endless(process, rate, rng):
        if at_s >= duration_s:
            return times
        times.append(at_s)
    raise AssertionError("arrivals never end")


def _endless(process: Process, rate: float, rng: random.Random) -> Iterator[float]:
    at_s, number = 0.0, 0
    cycle_s = process.on_s + process.off_s
    while True:
        match process.kind:
            case "constant":
                yield number / rate  # not a sum: rounding would add up
                number += 1
            case "poisson":
                at_s += rng.expovariate(rate)
                yield at_s
            case "gamma":
                at_s += rng.gammavariate(process.cv**-2, process.cv**2 / rate)
                yield at_s
            case "onoff":
                # Poisson on the time axis of the on-phases alone; the silences are put in afterwards.
                at_s += rng.expovariate(rate * cycle_s / process.on_s)
                phases, into_s = divmod(at_s, process.on_s)
                yield phases * cycle_s + into_s
