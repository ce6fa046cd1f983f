"""Who goes first when a place is free: requests that every worker refused, in the order in which they were.

Knows ids and turns, neither workers nor prices.

Life of a seat:

1. taken when all workers asked have refused the request; it pauses before it asks again
2. while the first in line pauses, everybody who has no seat or a later one waits: it asks before them
3. refused again, it keeps its seat. Overtaken MAX_OVERTAKEN times (a long prompt among short ones), it makes the others
   wait also until the workers have had time to answer: what becomes free is left for it
4. not refused for ANSWER_S, placed or ended: the seat is given up
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

MAX_OVERTAKEN = 16
ANSWER_S = 0.5
"""A worker that refuses has said so by then."""


@dataclass(slots=True)
class _Seat:
    asked_at: float | None = None
    """When it last asked again; None: it pauses, or waits for its turn."""
    overtaken: int = 0


class WaitingLine:
    def __init__(self) -> None:
        self._seats: dict[str, _Seat] = {}
        self._moved = asyncio.Event()

    def __len__(self) -> int:
        return len(self._seats)

    @property
    def somebody_waits(self) -> bool:
        return self._first() is not None

    def refused(self, request_id: str) -> None:
        """It keeps or takes its seat, and pauses until it comes for its `turn`."""
        self._seats.setdefault(request_id, _Seat()).asked_at = None

    async def turn(self, request_id: str, until: float) -> bool:
        """Wait while those before it ask; False: not its turn by `until` (the loop's time). Whoever has got it asks
        before giving up the loop."""
        loop = asyncio.get_running_loop()
        while self._is_behind(request_id):
            left_s = until - loop.time()
            if left_s <= 0:
                return False
            try:
                async with asyncio.timeout(min(left_s, ANSWER_S)):
                    await self._moved.wait()
            except TimeoutError:
                pass
        if request_id in self._seats:
            self._seats[request_id].asked_at = loop.time()
            self._move()
        return True

    def placed(self, request_id: str) -> None:
        """A worker has it: its seat is free, and the first in line was overtaken if that was another."""
        self.leave(request_id)
        first = self._first()
        if first is not None:
            self._seats[first].overtaken += 1

    def leave(self, request_id: str) -> None:
        if self._seats.pop(request_id, None) is not None:
            self._move()

    def _is_behind(self, request_id: str) -> bool:
        first = self._first()
        if first is None or first == request_id:
            return False
        return self._seats[first].asked_at is None or self._seats[first].overtaken >= MAX_OVERTAKEN

    def _first(self) -> str | None:
        """Gives up the seats of those that were not refused in time."""
        now = asyncio.get_running_loop().time()
        while self._seats:
            request_id, seat = next(iter(self._seats.items()))
            if seat.asked_at is None or now < seat.asked_at + ANSWER_S:
                return request_id
            del self._seats[request_id]
        return None

    def _move(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()
