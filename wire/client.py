"""Clients: a worker behind gRPC is a core WorkerService, and callers cannot tell; and the CLI's door to a router.

Life of a channel: made by GrpcDial at the first call to an incarnation (address, boot id) of a worker -> shared by
everything this process says to it; gRPC reconnects it under us, and each call fails at once while it cannot ->
closed when two other incarnations of its worker have been dialled since, when it has no call and has not been dialled
for long, or with the dial.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import grpc

from baton.core.handoff import PrefillCall, PrefillEvent, ReleaseAnswer
from baton.core.messages import StepMessage, UpMessage, WorkerStatus
from baton.core.worker import WorkerInfo
from baton.wire import (
    admin_pb2,
    admin_pb2_grpc,
    codec,
    inference_pb2,
    inference_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from baton.wire.calls import CLIENT_OPTIONS, closing, rebuilt_errors

_CLOSE_GRACE_S = 2.0
"""What calls to a replaced incarnation get to end by themselves."""
_MAX_BOOTS = 2
"""Incarnations of a worker held at once: which one is newer we cannot tell, and who still speaks of the older one must
not cut the newer one's calls."""
_IDLE_S = 600.0


class GrpcWorker:
    """A WorkerService at the other end of a channel. Not safe to share between event loops."""

    def __init__(self, address: str, name: str = "") -> None:
        """`name` is what errors call the peer; default: the address."""
        self._peer = f"{name} at {address}" if name else address
        self._channel = grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
        self._stub: Any = worker_pb2_grpc.WorkerStub(self._channel)  # type: ignore[no-untyped-call]
        self.num_calls = 0

    @asynccontextmanager
    async def _call(self) -> AsyncIterator[None]:
        self.num_calls += 1
        try:
            async with rebuilt_errors(self._peer):
                yield
        finally:
            self.num_calls -= 1

    async def stream(self, up: AsyncIterator[UpMessage]) -> AsyncIterator[StepMessage]:
        """An error that `up` raises ends the call on both sides and leaves here; `up` is closed with the call."""
        async with self._call():
            call = self._stub.Stream()
            feeder = asyncio.create_task(_feed(call, up), name=f"up to {self._peer}")
            try:
                async for message in call:
                    yield codec.STEP.decode(message)
            except asyncio.CancelledError:
                if feeder.done() and not feeder.cancelled() and (error := feeder.exception()):
                    raise error from None
                raise
            finally:
                call.cancel()
                feeder.cancel()
                await asyncio.gather(feeder, return_exceptions=True)

    async def prefill(self, call: PrefillCall) -> AsyncIterator[PrefillEvent]:
        async with self._call():
            events = self._stub.Prefill(codec.PREFILL_CALL.encode(call))
            try:
                async for event in events:
                    yield codec.PREFILL_EVENT.decode(event)
            finally:
                events.cancel()

    async def lease(self, lease_id: str, release: bool, timeout_s: float) -> ReleaseAnswer:
        async with self._call():
            call = worker_pb2.LeaseCall(lease_id=lease_id, release=release)
            return codec.RELEASE_ANSWER.decode(await self._stub.Lease(call, timeout=timeout_s))

    async def drain(self, on: bool, timeout_s: float) -> WorkerStatus:
        async with self._call():
            return codec.STATUS.decode(await self._stub.Drain(worker_pb2.DrainCall(on=on), timeout=timeout_s))

    async def status(self, timeout_s: float) -> WorkerStatus:
        async with self._call():
            return codec.STATUS.decode(await self._stub.Status(worker_pb2.StatusCall(), timeout=timeout_s))

    async def close(self, grace_s: float = 0.0) -> None:
        """Calls still running after `grace_s` end with PeerLost here and are cancelled there."""
        await self._channel.close(grace_s)


async def _feed(call: Any, up: AsyncIterator[UpMessage]) -> None:
    """Write `up` to the call until either ends. If `up` fails the call is cancelled: its reader then asks us why."""
    async with closing(up) as messages:
        try:
            async for message in messages:
                try:
                    await call.write(codec.UP.encode(message))
                except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
                    return  # The call is over; its reader gets the reason.
            if not call.done():
                await call.done_writing()
        except Exception:
            call.cancel()
            raise


class _Incarnation(NamedTuple):
    worker_id: str
    boot_id: str
    address: str


class GrpcDial:
    """Implements core's Dial over gRPC. One per process and event loop; whoever made it closes it."""

    def __init__(self, idle_s: float = _IDLE_S) -> None:
        self._idle_s = idle_s
        self._workers: dict[_Incarnation, GrpcWorker] = {}
        """In the order in which they were first dialled."""
        self._dialled_s: dict[_Incarnation, float] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def __call__(self, info: WorkerInfo) -> GrpcWorker:
        key = _Incarnation(info.worker_id, info.boot_id, info.address)
        worker = self._workers.get(key)
        if worker is None:
            self._make_room(info.worker_id)
            worker = self._workers[key] = GrpcWorker(info.address, info.worker_id)
        self._dialled_s[key] = asyncio.get_running_loop().time()
        return worker

    def _make_room(self, worker_id: str) -> None:
        """Before a new channel: close what its worker has too many of, and what nobody has used for long."""
        now = asyncio.get_running_loop().time()
        boots = [key for key in self._workers if key.worker_id == worker_id]
        idle = [
            key
            for key, worker in self._workers.items()
            if not worker.num_calls and now - self._dialled_s[key] > self._idle_s
        ]
        for key in {*boots[: 1 - _MAX_BOOTS], *idle}:
            del self._dialled_s[key]
            task = asyncio.create_task(self._workers.pop(key).close(_CLOSE_GRACE_S), name=f"close {key.boot_id}")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close every channel. Calls that still run end with PeerLost."""
        workers = list(self._workers.values())
        self._workers.clear()
        await asyncio.gather(*self._closing, *(w.close() for w in workers), return_exceptions=True)


class GrpcInference:
    """A router's public API. Answers are the wire's own messages. Not safe to share between event loops."""

    def __init__(self, address: str) -> None:
        self._peer = f"router at {address}"
        self._channel = grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
        self._stub: Any = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]

    async def generate(
        self, request: inference_pb2.GenerateRequest
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Closing the iterator cancels the request. Raises what the router refused or ended it with, and PeerLost when
        the router cannot be reached or its connection breaks."""
        async with rebuilt_errors(self._peer):
            call = self._stub.Generate(request)
            try:
                async for message in call:
                    yield message
            finally:
                call.cancel()

    async def close(self) -> None:
        await self._channel.close()


class GrpcAdmin:
    """A router's Admin service. Answers are the wire's own messages: they are shown, not worked with. Raises PeerLost
    when nobody answers, and what the router refused with."""

    def __init__(self, address: str) -> None:
        self._peer = f"router at {address}"
        self._channel = grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
        self._admin: Any = admin_pb2_grpc.AdminStub(self._channel)  # type: ignore[no-untyped-call]

    async def status(self, timeout_s: float) -> admin_pb2.FleetStatus:
        async with rebuilt_errors(self._peer):
            answer: admin_pb2.FleetStatus = await self._admin.Status(admin_pb2.FleetStatusRequest(), timeout=timeout_s)
            return answer

    async def trace(self, request_id: str, timeout_s: float) -> admin_pb2.RequestTrace:
        """An empty `request_id` is the newest request."""
        async with rebuilt_errors(self._peer):
            request = admin_pb2.TraceRequest(request_id=request_id)
            answer: admin_pb2.RequestTrace = await self._admin.Trace(request, timeout=timeout_s)
            return answer

    async def newest(self, count: int, timeout_s: float) -> admin_pb2.NewestTraces:
        async with rebuilt_errors(self._peer):
            request = admin_pb2.NewestRequest(count=count)
            answer: admin_pb2.NewestTraces = await self._admin.Newest(request, timeout=timeout_s)
            return answer

    async def explain(self, request_id: str, timeout_s: float) -> admin_pb2.RequestRecord:
        """An empty `request_id` is the newest request."""
        async with rebuilt_errors(self._peer):
            request = admin_pb2.ExplainRequest(request_id=request_id)
            answer: admin_pb2.RequestRecord = await self._admin.Explain(request, timeout=timeout_s)
            return answer

    async def drain(self, worker_id: str, on: bool | None, timeout_s: float) -> admin_pb2.DrainProgress:
        """`on` None changes nothing and only asks."""
        async with rebuilt_errors(self._peer):
            request = admin_pb2.DrainRequest(worker_id=worker_id, on=on)
            answer: admin_pb2.DrainProgress = await self._admin.Drain(request, timeout=timeout_s)
            return answer

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> GrpcAdmin:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
