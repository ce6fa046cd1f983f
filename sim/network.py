"""The simulated network: the doors of core/services.py over links that delay, lose, hold, reset and repeat.

Owns which host reaches which, and every call under way. Does not know what the calls are about: a service is an
object, a call one of its methods. Messages are frozen dataclasses, so they are passed as they are.

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
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from baton.core.errors import BatonError, DeadlineExceeded, InternalError, PeerLost
from baton.core.handoff import PrefillCall, PrefillEvent, ReleaseAnswer
from baton.core.messages import StepMessage, UpMessage, WorkerStatus
from baton.core.services import Dial, WorkerService
from baton.core.worker import WorkerInfo
from baton.sim.loop import SimLoop, SimProcess
from baton.sim.pipe import Control, End, Pipe
from baton.sim.trace import Trace

STOP_GRACE_S = 2.0
"""As worker/assembly.py's."""
STOP_POLL_S = 0.02
REPLAY_DEPTH = 6
"""How far back a replayed message is: older than any that is merely late."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """Of every link. Delays are one way, in seconds; `loss` is per frame."""

    delay_s: float = 0.0005
    jitter_s: float = 0.001
    loss: float = 0.01
    retransmit_s: float = 0.2
    keepalive_s: float = 8.0
    """A call over a link that was cut for so long is given up at both ends."""


class _Call:
    """One call between two hosts. `task` is the server's, once the opening frame has arrived."""

    def __init__(self, network: SimNetwork, client: str, server: str, method: str) -> None:
        self.client, self.server, self.method = client, server, method
        self.up = Pipe(network, client, server)
        self.down = Pipe(network, server, client)
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
        if frame is End:
            raise StopAsyncIteration
        return cast(UpMessage, frame)


CallRule = Callable[[str, str, str], bool]
"""(client, server, method) of a call that is being delivered -> whether it is delivered once more."""
FrameRule = Callable[[str, str, object], bool]
"""(sender, reader, frame) of a frame that arrived -> whether an earlier one arrives again behind it."""


class SimNetwork:
    """All hosts and links of one world. A host is a name; a worker's `WorkerInfo.address` is its host."""

    def __init__(self, loop: SimLoop, trace: Trace, conditions: Conditions | None = None) -> None:
        self.loop = loop
        self.conditions = conditions or Conditions()
        self.repeated_calls: dict[object, CallRule] = {}
        """By who set them: unary calls that a retry below us delivers twice."""
        self.replayed_frames: dict[object, FrameRule] = {}
        """By who set them: messages that a worker's stream brings again, as a sender that starts over would."""
        self._trace = trace
        self._rng: random.Random = loop.fork("network")
        self._listening: dict[str, tuple[object, SimProcess]] = {}
        self._gone: set[str] = set()
        self._cuts: dict[tuple[str, str], float] = {}
        self._calls: dict[_Call, None] = {}
        self.num_sent = 0
        """Frames so far."""
        self._queueing_s = self._queueing_jitter_s = 0.0
        c = self.conditions
        self._usual_delay_s = c.delay_s + c.jitter_s + (3 * c.retransmit_s if c.loss else 0.0)
        self.longest_delay_s = self._usual_delay_s
        """Of a frame that is lost no more than twice and held by nobody, so far."""

    # ---- what production code gets -----------------------------------------------------------------------------

    def listen(self, host: str, service: object, process: SimProcess) -> None:
        """Serve the methods of `service` at `host`. A restart under the same name resets what was open to its
        predecessor."""
        self._gone.discard(host)
        self._drop([c for c in self._calls if c.between(host, None)], "was restarted")
        self._listening[host] = (service, process)

    async def close(self, host: str) -> int:
        """An orderly stop: no new call is accepted, those that are open may end in good order for STOP_GRACE_S. Returns
        how many did not."""
        self._listening.pop(host, None)
        left = 0
        for _ in range(int(STOP_GRACE_S / STOP_POLL_S)):
            left = sum(c.server == host for c in self._calls)
            if not left:
                break
            await asyncio.sleep(STOP_POLL_S)
        self.crash(host, silent=False)
        return left

    def dial(self, host: str) -> Dial:
        """How code on `host` reaches workers."""

        def reach(info: WorkerInfo) -> WorkerService:
            return SimWorker(self, host, info)

        return reach

    async def ask(self, client: str, server: str, method: str, **arguments: Any) -> AsyncGenerator[Any, None]:
        """Call a method that answers with a stream; closing the iterator ends the call at the server, too."""
        call = self.open(client, server, method, arguments)
        try:
            async with closing(answers(call)) as messages:
                async for message in messages:
                    yield message
        finally:
            self.leave(call)

    # ---- faults --------------------------------------------------------------------------------------------------

    def cut(self, src: str, dst: str) -> None:
        """Frames from src to dst are held, silently, until `heal`; keep-alive may end the calls before."""
        since = self.loop.now
        self._cuts[src, dst] = since
        self._trace.note("network", "cut", src, dst)
        self.loop.at(since + self.conditions.keepalive_s, self._keepalive, src, dst, since)

    def heal(self, src: str, dst: str) -> None:
        self._cuts.pop((src, dst), None)
        self._trace.note("network", "heal", src, dst)
        for call in list(self._calls):
            call.up.pump()
            call.down.pump()

    @contextlib.contextmanager
    def congested(self, delay_s: float, jitter_s: float) -> Iterator[None]:
        """Until the end of the block frames take longer, by so much and up to so much more."""
        self._queueing_s += delay_s
        self._queueing_jitter_s += jitter_s
        now_s = self._usual_delay_s + self._queueing_s + self._queueing_jitter_s
        self.longest_delay_s = max(self.longest_delay_s, now_s)
        self._trace.note("network", "congested")
        try:
            yield
        finally:
            self._queueing_s -= delay_s
            self._queueing_jitter_s -= jitter_s

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
            self.loop.at(self.loop.now + self.conditions.keepalive_s, self._give_up_on, host)
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
        """World time at which a frame sent now arrives, unless something holds it."""
        c = self.conditions
        late = 0.0
        while self._rng.random() < c.loss:
            late = 2 * late + c.retransmit_s
        self.num_sent += 1
        delay_s, jitter_s = c.delay_s + self._queueing_s, c.jitter_s + self._queueing_jitter_s
        return self.loop.now + delay_s + self._rng.random() * jitter_s + late

    def open(self, client: str, server: str, method: str, arguments: dict[str, Any]) -> _Call:
        call = _Call(self, client, server, method)
        self._calls[call] = None
        if method == "stream":
            call.down.repeat = self._replay_on(call.down)
        call.up.put(Control(lambda: self._accept(call, arguments)))
        return call

    def leave(self, call: _Call) -> None:
        """The client is through with the call; the server hears of it when the news arrives, if it ever does."""
        call.down.discards = call.client not in self._gone
        call.up.put(Control(lambda: self._left(call)))

    # ---- inside --------------------------------------------------------------------------------------------------

    def _accept(self, call: _Call, arguments: dict[str, Any]) -> None:
        if call.server not in self._listening:
            self._drop([call], "refused the connection")
            return
        service, process = self._listening[call.server]
        serving = self._serve(call, service, arguments)
        call.task = process.spawn(serving, f"{call.method} from {call.client}")
        ends = (call.client, call.server, call.method)
        if not call.down.discards and any(rule(*ends) for rule in self.repeated_calls.values()):
            self._trace.note("network", "repeats", call.method, call.client, call.server)
            ghost = _Call(self, call.client, call.server, call.method)
            ghost.down.discards = True  # the client reads one answer
            self.loop.at(self.arrival(), self._accept, ghost, arguments)

    def _left(self, call: _Call) -> None:
        self._calls.pop(call, None)
        call.end_server(PeerLost(f"{call.client} left"))

    async def _serve(self, call: _Call, service: object, arguments: dict[str, Any]) -> None:
        """The server's side of a call, in the server's process."""
        if call.method == "stream":
            arguments = {"up": _Incoming(call)}
        try:
            answer = getattr(service, call.method)(**arguments)
            if isinstance(answer, AsyncIterator):
                async with closing(answer) as messages:
                    async for message in messages:
                        await call.down.send(message)
            else:
                await call.down.send(await answer)
            call.down.put(End)
        except BatonError as e:
            call.down.put(e)
        except Exception as e:
            self.loop.call_exception_handler({"message": f"{call.method} of {call.server} failed", "exception": e})
            call.down.put(InternalError(f"{call.method} failed: {e!r}"))

    def _replay_on(self, pipe: Pipe) -> Callable[[object], object | None]:
        """For the downward pipe of one stream: remembers its last frames, and brings one again when a rule says so."""
        recent: deque[object] = deque(maxlen=REPLAY_DEPTH)

        def again(frame: object) -> object | None:
            old = None
            if recent and any(rule(pipe.src, pipe.dst, recent[0]) for rule in self.replayed_frames.values()):
                old = recent[0]
                self._trace.note("network", "replays", pipe.src, pipe.dst)
            recent.append(frame)
            return old

        return again

    def _drop(self, calls: list[_Call], what: str) -> None:
        """End calls at both ends, each hearing of it after a link delay of its own."""
        for call in calls:
            self._calls.pop(call, None)
            error = PeerLost(f"{call.server} {what}")
            self.loop.at(self.arrival(), call.down.end, error)
            self.loop.at(self.arrival(), call.end_server, error)

    def _keepalive(self, src: str, dst: str, since: float) -> None:
        if self._cuts.get((src, dst)) == since:
            self._drop([c for c in self._calls if c.between(src, dst)], "does not answer keep-alive")
            self.loop.at(self.loop.now + self.conditions.keepalive_s, self._keepalive, src, dst, since)

    def _give_up_on(self, host: str) -> None:
        if host in self._gone:
            self._drop([c for c in self._calls if c.between(host, None)], "does not answer keep-alive")
            self.loop.at(self.loop.now + self.conditions.keepalive_s, self._give_up_on, host)


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
            async with closing(answers(call)) as messages:
                async for message in messages:
                    yield message
        finally:
            self._network.leave(call)
            sending.cancel()
            await asyncio.wait([sending])

    def prefill(self, call: PrefillCall) -> AsyncIterator[PrefillEvent]:
        return self._network.ask(self._host, self._server, "prefill", call=call)

    async def lease(self, lease_id: str, release: bool, timeout_s: float) -> ReleaseAnswer:
        answer = await self._unary("lease", timeout_s, lease_id=lease_id, release=release)
        return cast(ReleaseAnswer, answer)

    async def drain(self, on: bool, timeout_s: float) -> WorkerStatus:
        return cast(WorkerStatus, await self._unary("drain", timeout_s, on=on))

    async def status(self, timeout_s: float) -> WorkerStatus:
        return cast(WorkerStatus, await self._unary("status", timeout_s))

    async def _unary(self, method: str, timeout_s: float, **arguments: Any) -> object:
        call = self._network.open(self._host, self._server, method, {**arguments, "timeout_s": timeout_s})
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


async def answers(call: _Call) -> AsyncGenerator[Any, None]:
    while (frame := await call.down.get()) is not End:
        if isinstance(frame, BatonError):
            raise frame
        yield frame


async def _send_up(up: AsyncIterator[UpMessage], call: _Call) -> None:
    with contextlib.suppress(PeerLost):
        async with closing(up) as messages:
            async for message in messages:
                await call.up.send(message)
        call.up.put(End)
