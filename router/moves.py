"""Planned moves: requests leave a worker that drains, KV and all, while they run.

Owns when a request moves and how many at once. Does not know prices (cost.py), nor what a move's chunks mean
(run.py).

Life of a move: its worker drains, it has a first token, a place among MAX_AT_ONCE is free and somebody has room ->
submitted to that one as an attempt of its own, which takes it over -> ended, however: its place is free again. One that
failed tries again after a pause; where nobody has room, the worker's requests are looked at again by a timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from baton.core.metrics import Metrics
from baton.core.worker import WorkerInfo
from baton.router.attempt import Attempt
from baton.router.fleet import Fleet
from baton.router.run import Run

MAX_AT_ONCE = 8
"""Per worker. More would only share its wires."""
LOOK_AGAIN_S = 0.25
PAUSE_S = 0.5
"""Before a request whose move failed tries again."""


class Moves:
    """All on one loop, nothing waits."""

    def __init__(
        self, fleet: Fleet, metrics: Metrics, runs: Callable[[], Collection[Run]], start: Callable[[Run], bool]
    ) -> None:
        """`runs`: every request of this router. `start` begins one's move and says whether there was a place for it."""
        self._fleet = fleet
        self._metrics = metrics
        self._runs = runs
        self._start = start
        self._timer: asyncio.TimerHandle | None = None

    def look(self) -> None:
        """Begin what may begin: some worker drains, a move has ended, or a request on a draining worker has begun to
        stream."""
        for worker in self._fleet.draining():
            self._look_at(worker)

    def ended(self, run: Run, move: Attempt, end: str) -> None:
        self._metrics.inc("baton_moves_total", end=end)
        if end != "moved":
            run.move_after = asyncio.get_running_loop().time() + PAUSE_S
            run.move_elsewhere.add(move.decode.worker_id)
        self.look()

    def _look_at(self, worker: WorkerInfo) -> None:
        here = [r for r in self._runs() if r.attempt is not None and r.attempt.decode.boot_id == worker.boot_id]
        free = MAX_AT_ONCE - sum(run.move is not None for run in here)
        now = asyncio.get_running_loop().time()
        for run in (r for r in here if r.may_move):
            if free <= 0:
                return  # the end of a move looks again
            if now >= run.move_after and self._start(run):
                free -= 1
            elif self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(LOOK_AGAIN_S, self._again)

    def _again(self) -> None:
        self._timer = None
        self.look()
