"""The simulated network: the doors of core/services.py over links that delay, lose, hold and reset.

Owns which host reaches which, and every call under way. Does not know what the calls are about. Messages are frozen
dataclasses, so they are passed as they are.

Life of a call:

    1. opened by a client: its frames travel up, the answers down, each direction in order (as on one TCP connection)
    2. a lost frame comes late (retransmission) and holds up those behind it; a cut link holds all of them until it
       heals, or until keep-alive gives up and the call ends with PeerLost at both ends
    3. ended by the server (end or error frame), by the client (closing the iterator cancels the server's task when
       the news arrives), by a reset, or by the crash of a host: at once for a killed process (its kernel resets),
       after keep-alive for a host that is gone
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, cast

from baton.core.errors import BatonError, DeadlineExceeded, InternalError, PeerLost
from baton.core.handoff import PrefillCall, PrefillEvent, ReleaseAnswer
from baton.core.messages import StepMessage, UpMessage, WorkerStatus
from baton.core.services import Dial, WorkerService
from baton.core.worker import WorkerInfo
from baton.sim.loop import SimLoop, SimProcess
from baton.sim.trace import Trace

WINDOW_FRAMES = 64
"""Frames one direction holds before its sender waits: HTTP/2 flow control, in frames."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """Of every link. Delays are one way, in seconds; `loss` is per frame."""

    delay_s: float = 0.0005
    jitter_s: float = 0.001
    loss: float = 0.01
    retransmit_s: float = 0.2
    keepalive_s: float = 8.0
    """A call over a link that was cut for so long is given up at both ends."""


class _End:
    """The sender is through with this direction."""


@dataclass(frozen=True, slots=True)
class _Control:
    """A frame for the network itself: acts on arrival, whether or not anybody reads."""

    act: Callable[[], None]


class _Pipe:
    """One direction of a call: frames on the way, then frames that arrived and were not read."""

    def __init__(self, network: SimNetwork, src: str, dst: str) -> None:
        self.src, self.dst = src, dst
        self.discards = False
        """The reader has left: frames vanish, and the sender does not know yet."""
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
        if self._broken is None and not (self.discards and not isinstance(frame, _Control)):
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
            if due > self._network.loop.time():
                return self._arm()
            self._travelling.popleft()
            if isinstance(frame, _Control):
                frame.act()
            else:
                self._arrived.append(frame)
                _wake(self._reader)
        return None

    def _arm(self) -> None:
        if self._timer is None and self._travelling:
            loop, context = self._network.loop, self._network.context
            self._timer = loop.call_at(self._travelling[0][0], self.pump, context=context)

    def _is_full(self) -> bool:
        return not self.discards and len(self._travelling) + len(self._arrived) >= WINDOW_FRAMES


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


class _Call:
    """One call between two hosts. `task` is the server's, once the opening frame has arrived."""

    def __init__(self, network: SimNetwork, client: str, server: str, method: str) -> None:
        self.client, self.server, self.method = client, server, method
        self.up = _Pipe(network, client, server)
        self.down = _Pipe(network, server, client)
        self.task: asyncio.Task[None] | None = None

    def between(self, a: str, b: str | None) -> bool:
        ends = (self.client, self.server)
        return a in ends and (b is None or b in ends)

    def end_server(self, error: BatonError) -> None:
        self.up.end(error)
        if self.task is not None:
            self.task.cancel()


class _Incoming:
    """What the client of a call sends up, until it closes its direction. An iterator without aclose, as gRPC's."""

    def __init__(self, call: _Call) -> None:
        self._call = call

    def __aiter__(self) -> AsyncIterator[UpMessage]:
        return self

    async def __anext__(self) -> UpMessage:
        frame = await self._call.up.get()
        if frame is _End:
            raise StopAsyncIteration
        return cast(UpMessage, frame)


class SimNetwork:
    """All hosts and links of one world. A host is a name; a worker's `WorkerInfo.address` is its host."""

    def __init__(self, loop: SimLoop, trace: Trace, conditions: Conditions | None = None) -> None:
        self.loop = loop
        self.context = contextvars.Context()
        """The world's: what the network does belongs to no process."""
        self.conditions = conditions or Conditions()
        self._trace = trace
        self._rng: random.Random = loop.fork("network")
        self._listening: dict[str, tuple[WorkerService, SimProcess]] = {}
        self._gone: set[str] = set()
        self._cuts: dict[tuple[str, str], float] = {}
        self._calls: dict[_Call, None] = {}

    # ---- what production code gets -----------------------------------------------------------------------------

    def listen(self, host: str, service: WorkerService, process: SimProcess) -> None:
        """Serve `service` at `host`. A restart under the same name resets what was open to its predecessor."""
        self._gone.discard(host)
        self._drop([c for c in self._calls if c.between(host, None)], "was restarted")
        self._listening[host] = (service, process)

    def dial(self, host: str) -> Dial:
        """How code on `host` reaches workers."""

        def reach(info: WorkerInfo) -> WorkerService:
            return SimWorker(self, host, info)

        return reach

    # ---- faults --------------------------------------------------------------------------------------------------

    def cut(self, src: str, dst: str) -> None:
        """Frames from src to dst are held, silently, until `heal`; keep-alive may end the calls before."""
        since = self.loop.time()
        self._cuts[src, dst] = since
        self._trace.note("network", "cut", src, dst)
        self.loop.call_later(self.conditions.keepalive_s, self._keepalive, src, dst, since, context=self.context)

    def heal(self, src: str, dst: str) -> None:
        self._cuts.pop((src, dst), None)
        self._trace.note("network", "heal", src, dst)
        for call in list(self._calls):
            call.up.pump()
            call.down.pump()

    def reset(self, a: str, b: str) -> int:
        """Reset every call between two hosts; returns how many there were."""
        calls = [c for c in self._calls if c.between(a, b)]
        self._trace.note("network", "reset", a, b, len(calls))
        self._drop(calls, "reset the connection")
        return len(calls)

    def crash(self, host: str, silent: bool) -> None:
        """The host's process was killed. Its kernel resets its connections, or (`silent`) the whole host is gone."""
        self._listening.pop(host, None)
        self._trace.note("network", "crash", host, "silent" if silent else "reset")
        if silent:
            self._gone.add(host)
            self.loop.call_later(self.conditions.keepalive_s, self._give_up_on, host, context=self.context)
        else:
            self._drop([c for c in self._calls if c.between(host, None)], "reset the connection")

    # ---- what faults verify ------------------------------------------------------------------------------------

    def open_calls(self, a: str, b: str | None = None, method: str | None = None) -> int:
        return sum(c.between(a, b) and method in (None, c.method) for c in self._calls)

    def num_travelling(self, src: str, dst: str) -> int:
        """Frames on the way from src to dst, held ones included."""
        pipes = [p for c in self._calls for p in (c.up, c.down)]
        return sum(p.num_travelling for p in pipes if (p.src, p.dst) == (src, dst))

    def num_unread(self, src: str, dst: str) -> int:
        """Frames from src that have reached dst and that nobody there has read."""
        pipes = [p for c in self._calls for p in (c.up, c.down)]
        return sum(p.num_arrived for p in pipes if (p.src, p.dst) == (src, dst))

    # ---- for pipes and clients -----------------------------------------------------------------------------------

    def reaches(self, src: str, dst: str) -> bool:
        return (src, dst) not in self._cuts and src not in self._gone and dst not in self._gone

    def arrival(self) -> float:
        """When a frame sent now arrives, unless something holds it."""
        c = self.conditions
        late = 0.0
        while self._rng.random() < c.loss:
            late = 2 * late + c.retransmit_s
        return self.loop.time() + c.delay_s + self._rng.random() * c.jitter_s + late

    def open(self, client: str, server: str, method: str, arguments: dict[str, Any]) -> _Call:
        call = _Call(self, client, server, method)
        self._calls[call] = None
        call.up.put(_Control(lambda: self._accept(call, arguments)))
        return call

    def leave(self, call: _Call) -> None:
        """The client is through with the call; the server hears of it when the news arrives."""
        call.down.discards = True
        call.up.put(_Control(lambda: self._left(call)))

    # ---- inside --------------------------------------------------------------------------------------------------

    def _accept(self, call: _Call, arguments: dict[str, Any]) -> None:
        if call.server not in self._listening:
            self._drop([call], "refused the connection")
            return
        service, process = self._listening[call.server]
        serving = self._serve(call, service, arguments)
        call.task = process.spawn(serving, f"{call.method} from {call.client}")

    def _left(self, call: _Call) -> None:
        self._calls.pop(call, None)
        call.end_server(PeerLost(f"{call.client} left"))

    async def _serve(self, call: _Call, service: WorkerService, arguments: dict[str, Any]) -> None:
        """The server's side of a call, in the server's process."""
        try:
            if call.method == "stream":
                await _forward(service.stream(_Incoming(call)), call)
            elif call.method == "prefill":
                await _forward(service.prefill(**arguments), call)
            else:
                await call.down.send(await getattr(service, call.method)(**arguments))
            call.down.put(_End)
        except BatonError as e:
            call.down.put(e)
        except Exception as e:
            self.loop.call_exception_handler({"message": f"{call.method} of {call.server} failed", "exception": e})
            call.down.put(InternalError(f"{call.method} failed: {e!r}"))

    def _drop(self, calls: list[_Call], what: str) -> None:
        """End calls at both ends, each hearing of it after a link delay of its own."""
        for call in calls:
            self._calls.pop(call, None)
            error = PeerLost(f"{call.server} {what}")
            self.loop.call_at(self.arrival(), call.down.end, error, context=self.context)
            self.loop.call_at(self.arrival(), call.end_server, error, context=self.context)

    def _keepalive(self, src: str, dst: str, since: float) -> None:
        if self._cuts.get((src, dst)) == since:
            calls = [c for c in self._calls if c.between(src, dst)]
            self._drop(calls, "does not answer keep-alive")
            self.loop.call_later(self.conditions.keepalive_s, self._keepalive, src, dst, since, context=self.context)

    def _give_up_on(self, host: str) -> None:
        if host in self._gone:
            self._drop([c for c in self._calls if c.between(host, None)], "does not answer keep-alive")
            self.loop.call_later(self.conditions.keepalive_s, self._give_up_on, host, context=self.context)


class SimWorker:
    """A client of a worker (core.services.WorkerService) on a host of the simulated network."""

    def __init__(self, network: SimNetwork, host: str, info: WorkerInfo) -> None:
        self._network = network
        self._host = host
        self._server = info.address

    async def stream(self, up: AsyncIterator[UpMessage]) -> AsyncGenerator[StepMessage, None]:
        call = self._network.open(self._host, self._server, "stream", {})
        sending = asyncio.ensure_future(_send_up(up, call))
        try:
            async with closing(_answers(call)) as messages:
                async for message in messages:
                    yield message
        finally:
            self._network.leave(call)
            sending.cancel()
            await asyncio.wait([sending])

    async def prefill(self, call: PrefillCall) -> AsyncGenerator[PrefillEvent, None]:
        opened = self._network.open(self._host, self._server, "prefill", {"call": call})
        try:
            async with closing(_answers(opened)) as events:
                async for event in events:
                    yield event
        finally:
            self._network.leave(opened)

    async def lease(self, lease_id: str, release: bool, timeout_s: float) -> ReleaseAnswer:
        arguments = {"lease_id": lease_id, "release": release, "timeout_s": timeout_s}
        return cast(ReleaseAnswer, await self._unary("lease", arguments, timeout_s))

    async def drain(self, on: bool, timeout_s: float) -> WorkerStatus:
        return cast(WorkerStatus, await self._unary("drain", {"on": on, "timeout_s": timeout_s}, timeout_s))

    async def status(self, timeout_s: float) -> WorkerStatus:
        return cast(WorkerStatus, await self._unary("status", {"timeout_s": timeout_s}, timeout_s))

    async def _unary(self, method: str, arguments: dict[str, Any], timeout_s: float) -> object:
        call = self._network.open(self._host, self._server, method, arguments)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await call.down.get()
        except TimeoutError:
            raise DeadlineExceeded(f"{self._server} did not answer {method} within {timeout_s} s.") from None
        finally:
            self._network.leave(call)
        if isinstance(answer, BatonError):
            raise answer
        return answer


@contextlib.asynccontextmanager
async def closing(iterator: AsyncIterator[Any]) -> AsyncIterator[AsyncIterator[Any]]:
    """contextlib.aclosing for what is typed as a plain iterator: closed if it can be."""
    try:
        yield iterator
    finally:
        aclose = getattr(iterator, "aclose", None)
        if aclose is not None:
            await aclose()


async def _answers(call: _Call) -> AsyncGenerator[Any, None]:
    while (frame := await call.down.get()) is not _End:
        if isinstance(frame, BatonError):
            raise frame
        yield frame


async def _send_up(up: AsyncIterator[UpMessage], call: _Call) -> None:
    with contextlib.suppress(PeerLost):
        async with closing(up) as messages:
            async for message in messages:
                await call.up.send(message)
        call.up.put(_End)


async def _forward(answers: AsyncIterator[object], call: _Call) -> None:
    async with closing(answers) as messages:
        async for message in messages:
            await call.down.send(message)
