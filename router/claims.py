"""Whose word is taken that his request runs already.

What runs is let in however many wait, and was paid for where it began. So whoever claims it makes the router read a
prompt and ask several workers before it can refuse him, and a mark is easily made up: only a key that all routers share
could tell. Instead an account is believed until too many of its claims proved false within a short time. After that its
claims are treated as what is new: refused before the prompt is read where that is certain, and charged before any
worker is asked. Where there is room, what truly runs is read on with all the same, and the charge given back.

Clients that give neither tenant nor key are one account: one of them that makes up marks costs all of them this trust.

Counts what was false, not what was asked: when a router dies, hundreds of clients of one account come at once.
"""

from __future__ import annotations

MAX_FALSE, WITHIN_S = 64, 60.0
"""More than the streams that one account had on a machine that died with a router and a worker on it."""
MAX_ACCOUNTS = 16_384
"""Remembered; of more (clients may choose their names), those that were wrong longest ago are believed again."""


class Claims:
    def __init__(self) -> None:
        self._false: dict[str, tuple[float, float]] = {}
        """By account: how many as of when. They wear off evenly. Who was wrong last is the last."""

    def believes(self, account: str, now: float) -> bool:
        return self._num_false(account, now) <= MAX_FALSE - 1

    def was_false(self, account: str, now: float) -> None:
        """No worker knew of it."""
        num_false = self._num_false(account, now) + 1
        self._false.pop(account, None)
        self._false[account] = num_false, now
        if len(self._false) > MAX_ACCOUNTS:
            del self._false[next(iter(self._false))]

    def _num_false(self, account: str, now: float) -> float:
        num_false, at = self._false.get(account, (0.0, now))
        return max(0.0, num_false - (now - at) * MAX_FALSE / WITHIN_S)
