"""An event loop that never runs by itself: the exploration says when callbacks run and when time passes.

Real coroutines run on it (the Puller's), stepped from the outside, so that the same sequence of choices always leads
to the same state. It has a clock that only `tick` moves, and no sockets, threads or signals.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

EPOCH = 1e6
"""Clocks start here, so that a number of this size is known to be a moment (fingerprint.py)."""
MAX_CALLBACKS = 2_000
"""In one drain: more is a loop that keeps itself busy."""


class ManualLoop:
    """As much of a loop as tasks, futures, events and time-outs ask for."""

    def __init__(self) -> None:
        self.now = EPOCH
        self.tasks: list[asyncio.Task[Any]] = []
        self.problems: list[str] = []
        """Exceptions that nobody took."""
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()

    # ---- what coroutines ask of a loop -----------------------------------------------------------------------------

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def call_later(
        self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are skipped when they are due."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None,
        context: contextvars.Context | None = None, **_: Any,
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        self.tasks.append(task)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.problems.append(f"{context.get('message')}: {context.get('exception')!r}")

    # ---- what the exploration does ---------------------------------------------------------------------------------

    def run(self, act: Callable[[], None]) -> None:
        """`act`, then every callback until none is ready, with this loop as the running one."""
        before = events._get_running_loop()
        events._set_running_loop(self)
        try:
            act()
            for _ in range(MAX_CALLBACKS):
                if not self._ready:
                    break
                handle = self._ready.popleft()
                if not handle.cancelled():
                    handle._run()
            assert not self._ready, "callbacks keep waking each other"
        finally:
            events._set_running_loop(before)
        self.tasks = [t for t in self.tasks if not t.done()]

    def tick(self, step_s: float) -> None:
        """For `run`: time passes, and what is due becomes ready."""
        self.now += step_s
        while self._timers and self._timers[0][0] <= self.now:
            handle = heapq.heappop(self._timers)[2]
            if not handle.cancelled():
                self._ready.append(handle)

    def timers(self) -> list[float]:
        """When the clock will next do something, soonest first."""
        return sorted(when for when, _, handle in self._timers if not handle.cancelled())

    def bury(self) -> None:
        """The process is dead: nothing of it runs again. Its coroutines are closed, their clean-up goes nowhere."""
        def close() -> None:
            for task in self.tasks:
                task._log_destroy_pending = False
                task.get_coro().close()
            self._ready.clear()
            self._timers.clear()

        self.run(close)
        self.tasks.clear()
