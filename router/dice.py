"""Random numbers of which the whole state is one integer: what a policy breaks ties with, and cheap to write down
before each decision, so that the decision can be made again."""

from __future__ import annotations

import random

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


class Dice(random.Random):
    """splitmix64 (Steele, Lea, Flood 2014). Everything that `random.Random` draws comes from the two methods below."""

    state = 0

    def __init__(self, state: int) -> None:
        super().__init__(0)
        self.state = state & _MASK

    def random(self) -> float:
        return (self._next() >> 11) / (1 << 53)

    def getrandbits(self, k: int, /) -> int:
        bits = 0
        for _ in range(0, k, 64):
            bits = bits << 64 | self._next()
        return bits >> (-k % 64)

    def _next(self) -> int:
        self.state = z = (self.state + _GAMMA) & _MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
        return z ^ z >> 31
