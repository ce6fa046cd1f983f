"""A worker that says what it was told, served over gRPC on the one loop of this folder's tests."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable

from baton.core.handoff import Accepted, Alive, Lease, PrefillCall, PrefillEvent, ReleaseAnswer
from baton.core.layout import Capability, KVLayout
from baton.core.messages import KVSnapshot, StepMessage, Submit, TokenChunk, UpMessage, WorkerStatus
from baton.core.request import Request
from baton.core.worker import Ledger, Role, WorkerInfo, WorkerLoad
from baton.wire.client import GrpcDial, GrpcWorker
from baton.wire.server import GrpcServer, start_worker_server

INFO = WorkerInfo("w-1", "boot", Role.DECODE, "", Capability("m", "f00d", KVLayout(1, 1, 4, 16, "fp32"), 64, 4))
STATUS = WorkerStatus(INFO, WorkerLoad(num_running=3), Ledger(0, 0, 1, 2, 3), (("baton_steps_total", 7.0),))
CALL = PrefillCall(Request("r-1", (1, 2, 3)), 1, "d-1", 0, 10.0)


class EchoWorker:
    """A worker whose answers say what it was told. `error` is what its next call fails with."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.open: set[str] = set()
        self.heard: list[object] = []
        self.all_closed = asyncio.Event()

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error

    async def stream(self, up: AsyncIterator[UpMessage]) -> AsyncIterator[StepMessage]:
        self._enter("stream")
        try:
            yield StepMessage("boot", WorkerLoad(), snapshot=KVSnapshot(0, ()))
            async for message in up:
                self.heard.append(message)
                self._fail()
                if isinstance(message, Submit):
                    chunk = TokenChunk(message.request.request_id, message.epoch, 0, message.request.prompt)
                    yield StepMessage("boot", WorkerLoad(), (chunk,))
        finally:
            self._leave("stream")

    async def prefill(self, call: PrefillCall) -> AsyncIterator[PrefillEvent]:
        self._enter("prefill")
        try:
            self._fail()
            yield Accepted(Lease("l", call.request.request_id, call.epoch, call.lease_ttl_s, ()))
            yield Alive(1)
            await asyncio.Event().wait()
        finally:
            self._leave("prefill")

    async def lease(self, lease_id: str, release: bool, timeout_s: float) -> ReleaseAnswer:
        self._fail()
        return ReleaseAnswer(release, f"{lease_id} within {timeout_s > 0}")

    async def drain(self, on: bool, timeout_s: float) -> WorkerStatus:
        self._fail()
        assert timeout_s > 0
        return dataclasses.replace(STATUS, load=WorkerLoad(draining=on, num_lent_out=2))

    async def status(self, timeout_s: float) -> WorkerStatus:
        self._fail()
        if timeout_s < 1:
            await asyncio.Event().wait()
        return STATUS

    def _enter(self, name: str) -> None:
        self.open.add(name)
        self.all_closed.clear()

    def _leave(self, name: str) -> None:
        self.open.discard(name)
        if not self.open:
            self.all_closed.set()


one_loop = asyncio.Runner()
"""For all tests of this folder. gRPC has one completion queue per process: what a closed loop left in it would be
delivered, as an error, in the middle of the next test's. A server's process has one loop, too."""


def served(body: Callable[[EchoWorker, GrpcWorker, GrpcServer], Awaitable[None]]) -> None:
    """Run `body` with a worker, a client of it over gRPC, and its server."""

    async def inside() -> None:
        worker = EchoWorker()
        async with asyncio.timeout(60):
            server = await start_worker_server(worker, "127.0.0.1", 0)
            dial = GrpcDial()
            client = dial(WorkerInfo("w-1", "boot", Role.DECODE, f"127.0.0.1:{server.port}", INFO.capability))
            try:
                await body(worker, client, server)
            finally:
                await dial.close()
                await server.stop(0)

    one_loop.run(inside())
