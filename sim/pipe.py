"""One direction of a call on the simulated network: frames on the way, then frames that arrived and were not read.

Frames arrive in the order they were sent, as on one TCP connection; a late one holds up those behind it. Does not know
what a call is, or which host reaches which: it asks its network.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from baton.core.errors import BatonError
from baton.sim.loop import SimLoop

WINDOW_FRAMES = 64
"""Frames one direction holds before its sender waits: HTTP/2 flow control, in frames."""


class End:
    """The sender is through with this direction."""


@dataclass(frozen=True, slots=True)
class Control:
    """A frame for the network itself: acts on arrival, whether or not anybody reads."""

    act: Callable[[], None]


class Links(Protocol):
    """The network, as far as a pipe goes."""

    loop: SimLoop

    def reaches(self, src: str, dst: str) -> bool: ...

    def arrival(self) -> float:
        """World time at which a frame sent now arrives, unless something holds it."""
        ...


class Pipe:
    def __init__(self, network: Links, src: str, dst: str) -> None:
        self.src, self.dst = src, dst
        self.discards = False
        """The reader has left: frames vanish, and the sender does not know yet."""
        self.repeat: Callable[[object], object | None] | None = None
        """Asked for each frame that arrives: what arrives once more behind it, if anything."""
        self._network = network
        self._travelling: deque[tuple[float, Any]] = deque()
        self._arrived: deque[Any] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._last_arrival = 0.0
        self._reader: asyncio.Future[None] | None = None
        self._sender: asyncio.Future[None] | None = None
        self._broken: BatonError | None = None

    @property
    def num_travelling(self) -> int:
        return len(self._travelling)

    @property
    def num_arrived(self) -> int:
        return len(self._arrived)

    async def send(self, frame: object) -> None:
        """Returns when there was room for the frame; raises what the call ended with."""
        while self._is_full() and self._broken is None:
            self._sender = self._network.loop.create_future()
            await self._sender
        if self._broken is not None:
            raise self._broken
        self.put(frame)

    def put(self, frame: object) -> None:
        if self._broken is None and not (self.discards and not isinstance(frame, Control)):
            self._last_arrival = max(self._last_arrival, self._network.arrival())
            self._travelling.append((self._last_arrival, frame))
            self._arm()

    async def get(self) -> Any:
        while not self._arrived:
            if self._broken is not None:
                raise self._broken
            self._reader = self._network.loop.create_future()
            await self._reader
        frame = self._arrived.popleft()
        _wake(self._sender)
        return frame

    def end(self, error: BatonError) -> None:
        """Nothing travels any more. What has arrived can still be read, then `error` is raised."""
        if self._broken is None:
            self._broken = error
            self._travelling.clear()
            _wake(self._reader)
            _wake(self._sender)

    def pump(self) -> None:
        """The head frame is due, or its link healed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._travelling and self._network.reaches(self.src, self.dst):
            due, frame = self._travelling[0]
            if due > self._network.loop.now:
                return self._arm()
            self._travelling.popleft()
            if isinstance(frame, Control):
                frame.act()
            else:
                self._arrive(frame)
        return None

    def _arrive(self, frame: object) -> None:
        self._arrived.append(frame)
        if self.repeat is not None and (again := self.repeat(frame)) is not None:
            self._arrived.append(again)
        _wake(self._reader)

    def _arm(self) -> None:
        if self._timer is None and self._travelling:
            self._timer = self._network.loop.at(self._travelling[0][0], self.pump)

    def _is_full(self) -> bool:
        return not self.discards and len(self._travelling) + len(self._arrived) >= WINDOW_FRAMES


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
