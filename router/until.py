"""A block of work that may be ended from outside: by its client's going, a stalled send, the router's stop.

As `asyncio.timeout`, with any error and any number of ways to end it, and no task for each of them: a router has
thousands of these blocks at once.
"""

from __future__ import annotations

import asyncio
from types import TracebackType


class Until:
    """`with Until() as until: ...`; somebody else calls `until.end(error)`: the block is cancelled, and `error` leaves
    it. Once, while it runs; before and afterwards a call changes nothing."""

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._error: Exception | None = None

    def end(self, error: Exception) -> None:
        """Not from inside the block: it could have left before its next await."""
        if self._task is not None and self._error is None:
            self._error = error
            self._task.cancel()

    def __enter__(self) -> Until:
        self._task = asyncio.current_task()
        assert self._task is not None, "nothing runs that could be ended"
        self._cancelling = self._task.cancelling()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        task, self._task = self._task, None
        if self._error is None:
            return
        assert task is not None, "left twice"
        ours_alone = task.uncancel() <= self._cancelling
        if ours_alone and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise self._error from error


class Stopping:
    """Whether the router ends now, and whom to tell when it does."""

    def __init__(self) -> None:
        self.is_set = False
        self._running: dict[Until, Exception] = {}

    def set(self) -> None:
        self.is_set = True
        for until, error in tuple(self._running.items()):
            until.end(error)

    def ends(self, until: Until, error: Exception) -> None:
        """With that error, if it comes to that before `spares`."""
        self._running[until] = error

    def spares(self, until: Until) -> None:
        self._running.pop(until, None)
