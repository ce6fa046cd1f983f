"""The worker service over real gRPC: what a caller sees is what it would see of the service itself."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.core.errors import (
    BY_CODE,
    BatonError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    PeerLost,
    SetupError,
    from_code,
)
from baton.core.handoff import Accepted, Alive, Lease, PrefillCall, PrefillEvent, ReleaseAnswer
from baton.core.layout import Capability, KVLayout
from baton.core.messages import (
    Cancel,
    Hello,
    KVSnapshot,
    StepMessage,
    Submit,
    TokenChunk,
    UpMessage,
    WorkerStatus,
)
from baton.core.request import Request
from baton.core.worker import Ledger, Role, Route, WorkerInfo, WorkerLoad
from baton.wire import (
    admin_pb2,
    admin_pb2_grpc,
    codec,
    inference_pb2,
    inference_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from baton.wire.client import GrpcAdmin, GrpcDial, GrpcWorker
from baton.wire.server import GrpcServer, start_router_server, start_worker_server

INFO = WorkerInfo("w-1", "boot", Role.DECODE, "", Capability("m", "f00d", KVLayout(1, 1, 4, 16, "fp32"), 64, 4))
STATUS = WorkerStatus(INFO, WorkerLoad(num_running=3), Ledger(0, 0, 1, 2, 3), (("baton_steps_total", 7.0),))
CALL = PrefillCall(Request("r-1", (1, 2, 3)), 1, "d-1", 0, 10.0)


class EchoWorker:
    """A worker whose answers say what it was told. `error` is what its next call fails with."""

    def __init__(self) -> None:
        self.error: Exception | None = None
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
"""For all tests of this file. gRPC has one completion queue per process: what a closed loop left in it would be
delivered, as an error, in the middle of the next test's. A server's process has one loop, too."""


@pytest.fixture(scope="module", autouse=True)
def _close_the_loop() -> Iterator[None]:
    yield
    one_loop.close()


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


async def silent() -> AsyncIterator[UpMessage]:
    await asyncio.Event().wait()
    yield Hello("never")


def test_unary_calls_carry_their_values_both_ways() -> None:
    async def body(worker: EchoWorker, client: GrpcWorker, server: GrpcServer) -> None:
        assert await client.status(5) == STATUS
        assert await client.lease("l-7", True, 5) == ReleaseAnswer(True, "l-7 within True")
        assert await client.lease("l-7", False, 5) == ReleaseAnswer(False, "l-7 within True")
        for on in (True, False):
            answer = await client.drain(on, 5)
            assert answer == dataclasses.replace(STATUS, load=WorkerLoad(draining=on, num_lent_out=2))

    served(body)


def test_one_stream_carries_messages_both_ways_in_order() -> None:
    prompt = tuple(range(8192))
    ups = [Hello("router-1"), Submit(Request("r", prompt), Route("w-1", None), 2), Cancel("r", 2)]

    async def body(worker: EchoWorker, client: GrpcWorker, server: GrpcServer) -> None:
        async def up() -> AsyncIterator[UpMessage]:
            for message in ups:
                yield message

        steps = [step async for step in client.stream(up())]
        assert steps[0].snapshot == KVSnapshot(0, ())
        assert steps[1].chunks == (TokenChunk("r", 2, 0, prompt),)
        assert worker.heard == ups
        assert len(steps) == 2, "the stream ends when the router says no more"

    served(body)


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_every_error_crosses_as_itself(code: str) -> None:
    error = from_code(code, "what, why — and what to do: “ü”", "max_tokens")

    async def body(worker: EchoWorker, client: GrpcWorker, server: GrpcServer) -> None:
        async def up() -> AsyncIterator[UpMessage]:
            yield Hello("r")
            await asyncio.Event().wait()

        worker.error = error
        unary = (client.status(5), client.lease("l", False, 5), client.drain(True, 5))
        for call in (*unary, anext(client.prefill(CALL)), _drained(client.stream(up()))):
            with pytest.raises(BatonError) as caught:
                await call
            assert type(caught.value) is type(error)
            assert (caught.value.message, caught.value.param) == (error.message, "max_tokens")

    served(body)


async def _drained(messages: AsyncIterator[StepMessage]) -> None:
    async for _ in messages:
        pass


def test_a_very_long_error_message_arrives_cut_not_lost() -> None:
    async def body(worker: EchoWorker, client: GrpcWorker, server: GrpcServer) -> None:
        worker.error = InvalidRequest("é" * 100_000)
        with pytest.raises(InvalidRequest, match="^é{500,}$"):
            await client.status(5)

    served(body)


def test_a_bug_in_the_service_is_an_internal_error_told_to_the_log_only(caplog: pytest.LogCaptureFixture) -> None:
    async def body(worker: EchoWorker, client: GrpcWorker, server: GrpcServer) -> None:
        worker.error = KeyError("secret of the house")
        for call in (client.status(5), anext(client.prefill(CALL))):
            with pytest.raises(InternalError) as caught:
                await call
            assert "secret" not in str(caught.value)

    served(body)
    assert caplog.text.count("secret of the house") >= 2


def test_a_call_past_its_deadline_says_so() -> None:
    async def body(worker: EchoWorker, client: GrpcWorker, server: GrpcServer) -> None:
        with pytest.raises(DeadlineExceeded, match="w-1"):
            await client.status(0.05)

    served(body)


@pytest.mark.parametrize("how", ["aclose", "cancel reader", "cancel between reads"])
def test_leaving_an_iterator_closes_the_services_generator(how: str) -> None:
    async def body(worker: EchoWorker, client: GrpcWorker, server: GrpcServer) -> None:
        async def read(events: AsyncIterator[object], count: int, ready: asyncio.Event) -> None:
            async with aclosing(events) as messages:  # type: ignore[type-var]
                for _ in range(count):
                    await anext(messages)
                ready.set()
                if how == "cancel reader":
                    await anext(messages)
                elif how == "cancel between reads":
                    await asyncio.Event().wait()

        for opened, count in ((client.prefill(CALL), 2), (client.stream(silent()), 1)):
            ready = asyncio.Event()
            reader = asyncio.create_task(read(opened, count, ready))
            await ready.wait()
            if how != "aclose":
                reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            await worker.all_closed.wait()

    served(body)


def test_what_a_service_says_to_a_caller_who_left_is_no_alarm() -> None:
    class Sore(EchoWorker):
        async def prefill(self, call: PrefillCall) -> AsyncIterator[PrefillEvent]:
            try:
                async for event in super().prefill(call):
                    yield event
            except asyncio.CancelledError:
                raise PeerLost("too late") from None

    async def inside() -> None:
        worker = Sore()
        server = await start_worker_server(worker, "127.0.0.1", 0)
        client = GrpcWorker(f"127.0.0.1:{server.port}")
        async with asyncio.timeout(30):
            async with aclosing(client.prefill(CALL)) as events:
                await anext(events)
                await anext(events)
            await worker.all_closed.wait()
            await client.close()
            await server.stop(5)

    one_loop.run(inside())


def test_an_error_of_the_routers_own_feed_leaves_at_the_router() -> None:
    async def body(worker: EchoWorker, client: GrpcWorker, server: GrpcServer) -> None:
        async def up() -> AsyncIterator[UpMessage]:
            yield Hello("r")
            raise InvalidRequest("nothing to send")

        with pytest.raises(InvalidRequest, match="nothing to send"):
            await _drained(client.stream(up()))
        await worker.all_closed.wait()

    served(body)


def test_a_closed_stream_closes_the_routers_feed() -> None:
    async def body(worker: EchoWorker, client: GrpcWorker, server: GrpcServer) -> None:
        closed = asyncio.Event()

        async def up() -> AsyncIterator[UpMessage]:
            try:
                await asyncio.Event().wait()
                yield Hello("never")
            finally:
                closed.set()

        async with aclosing(client.stream(up())) as steps:
            await anext(steps)
        await closed.wait()

    served(body)


def test_nobody_at_the_address_is_a_lost_peer() -> None:
    async def inside() -> None:
        client = GrpcWorker("127.0.0.1:1", "w-9")
        async with asyncio.timeout(30):
            for call in (client.status(10), anext(client.prefill(CALL)), anext(client.stream(silent()))):
                with pytest.raises(PeerLost, match="w-9"):
                    await call
        await client.close()

    one_loop.run(inside())


def test_a_stopped_server_is_a_lost_peer_under_its_streams() -> None:
    async def body(worker: EchoWorker, client: GrpcWorker, server: GrpcServer) -> None:
        async with aclosing(client.prefill(CALL)) as events:
            await anext(events)
            await server.stop(0)
            with pytest.raises(PeerLost):
                await _drained(events)  # type: ignore[arg-type]
        assert worker.all_closed.is_set(), "the service was closed before stop returned"

    served(body)


SERVER = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from test_calls import EchoWorker
from baton.wire.server import start_worker_server
async def main():
    server = await start_worker_server(EchoWorker(), "127.0.0.1", 0)
    print(server.port, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_a_killed_worker_is_a_lost_peer_under_its_streams() -> None:
    async def inside(port: int, pid: int) -> None:
        client = GrpcWorker(f"127.0.0.1:{port}", "w-1")
        prefill, stream = client.prefill(CALL), client.stream(silent())
        async with asyncio.timeout(60), aclosing(prefill) as events, aclosing(stream) as steps:
            await anext(events)
            await anext(events)
            await anext(steps)
            os.kill(pid, signal.SIGKILL)
            for messages in (events, steps):
                with pytest.raises(PeerLost, match="w-1"):
                    await anext(messages)
        await client.close()

    argv = [sys.executable, "-c", SERVER, os.path.dirname(__file__)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            one_loop.run(inside(int(process.stdout.readline()), process.pid))
        finally:
            process.kill()


def test_each_boot_has_its_channel_and_the_one_before_the_last_is_closed() -> None:
    async def body(worker: EchoWorker, client: GrpcWorker, server: GrpcServer) -> None:
        dial = GrpcDial()
        address = f"127.0.0.1:{server.port}"
        b1, b2, b3 = (WorkerInfo("w", f"b{i}", Role.DECODE, address, INFO.capability) for i in (1, 2, 3))
        first = dial(b1)
        assert dial(b1) is first
        async with aclosing(first.prefill(CALL)) as old, aclosing(dial(b2).prefill(CALL)) as new:
            for events in (old, new):
                await anext(events)
                await anext(events)
            assert dial(b1) is first, "somebody who has not heard of the new boot"
            assert dial(b2) is not first
            third = dial(b3)
            waiting = asyncio.ensure_future(anext(new))
            with pytest.raises(PeerLost, match="closed"):
                await anext(old)
            assert await third.status(5) == STATUS
            assert not waiting.done(), "the second boot's call goes on"
            waiting.cancel()
            await asyncio.wait([waiting])
        await dial.close()
        with pytest.raises(PeerLost):
            await third.status(5)

    served(body)


def test_a_channel_that_nobody_has_used_for_long_is_closed_when_another_is_made() -> None:
    async def body(worker: EchoWorker, client: GrpcWorker, server: GrpcServer) -> None:
        dial = GrpcDial(idle_s=0.0)
        address = f"127.0.0.1:{server.port}"
        quiet, busy, fresh = (WorkerInfo(w, "b", Role.DECODE, address, INFO.capability) for w in ("q", "b", "f"))
        speaking = dial(busy)
        async with aclosing(speaking.prefill(CALL)) as events:
            await anext(events)
            silent_one = dial(quiet)
            await dial(fresh).status(5)
            await anext(events)
            assert dial(busy) is speaking, "it has a call"
            with pytest.raises(PeerLost):
                await silent_one.status(5)
            assert await dial(quiet).status(5) == STATUS
        await dial.close()

    served(body)


def test_a_taken_port_is_one_clear_sentence() -> None:
    async def body(worker: EchoWorker, client: GrpcWorker, server: GrpcServer) -> None:
        with pytest.raises(SetupError, match=rf"127\.0\.0\.1:{server.port}: address already in use"):
            await start_worker_server(worker, "127.0.0.1", server.port)

    served(body)


def test_health_follows_what_the_service_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.wire.server.HEALTH_POLL_S", 0.01)
    wrong: list[str] = []

    async def inside() -> None:
        server = await start_worker_server(EchoWorker(), "127.0.0.1", 0, lambda: wrong[0] if wrong else None)
        async with asyncio.timeout(60), grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for service in ("", "baton.wire.Worker"):
                watched = health.Watch(health_pb2.HealthCheckRequest(service=service))
                while (await watched.read()).status != health_pb2.HealthCheckResponse.SERVING:
                    pass
                wrong.append("no step for 31 s")
                assert (await watched.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
                stub = worker_pb2_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]
                answered = await stub.Status(worker_pb2.StatusCall(), timeout=30)
                assert codec.STATUS.decode(answered) == STATUS, "calls are answered either way"
                wrong.clear()
                assert (await watched.read()).status == health_pb2.HealthCheckResponse.SERVING
        await server.stop(0)

    one_loop.run(inside())


def test_a_caller_that_stays_and_reads_nothing_has_its_work_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.wire.server.WRITE_TIMEOUT_S", 0.2)

    class Verbose(Front):
        def __init__(self) -> None:
            self.closed = asyncio.Event()
            self.written = 0

        async def Generate(self, request: object, context: object) -> AsyncIterator[inference_pb2.GenerateResponse]:
            try:
                while True:
                    yield inference_pb2.GenerateResponse(text="x" * 100_000)
                    self.written += 1
            finally:
                self.closed.set()

    async def inside() -> None:
        front = Verbose()
        server = await start_router_server(front, front, "127.0.0.1", 0)
        async with asyncio.timeout(60), grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call = inference_pb2_grpc.InferenceStub(channel).Generate(inference_pb2.GenerateRequest())
            await call.read()
            await front.closed.wait()
            for _ in range(front.written - 1):
                await call.read()  # what was written before is not lost
            with pytest.raises(grpc.aio.AioRpcError, match="nobody read") as caught:
                await anext(call.__aiter__())
            assert caught.value.code() is grpc.StatusCode.CANCELLED
        await server.stop(0)

    one_loop.run(inside())


class Front(inference_pb2_grpc.InferenceServicer, admin_pb2_grpc.AdminServicer):
    async def Status(self, request: object, context: object) -> admin_pb2.FleetStatus:
        return admin_pb2.FleetStatus(router_id="r-1")

    async def Trace(self, request: admin_pb2.TraceRequest, context: object) -> admin_pb2.RequestTrace:
        raise InvalidRequest(f"no trace of {request.request_id!r}", "request_id")


def test_the_routers_front_has_the_same_error_rule_and_a_client() -> None:
    async def inside() -> None:
        server = await start_router_server(Front(), Front(), "127.0.0.1", 0)
        async with asyncio.timeout(30), GrpcAdmin(f"127.0.0.1:{server.port}") as admin:
            assert (await admin.status(5)).router_id == "r-1"
            with pytest.raises(InvalidRequest, match="no trace of 'x'") as caught:
                await admin.trace("x", 5)
            assert caught.value.param == "request_id"
        await server.stop(0)

    one_loop.run(inside())


@pytest.mark.parametrize("call", ["Prefill", "Status", "Stream"])
@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x07\x0a\x01\xff", b"\x12\x08nothing"])
def test_bytes_that_are_no_message_are_the_callers_fault(
    call: str, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    if call == "Status" and data != b"\xff\xff\xff":
        pytest.skip("a message without fields takes any well-formed ones")

    async def inside() -> None:
        server = await start_worker_server(EchoWorker(), "127.0.0.1", 0)
        async with asyncio.timeout(30), grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            method = f"/baton.wire.Worker/{call}"
            if call == "Stream":
                sent = channel.stream_stream(method)(iter([data]))
                await sent.read()  # what the service says before it reads; the status comes after it
            else:
                sent = (channel.unary_unary if call == "Status" else channel.unary_stream)(method)(data)
            code, details = await sent.code(), await sent.details()
        await server.stop(0)
        assert (code, "not a message of this call" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True), details
        assert not caplog.records

    one_loop.run(inside())


def test_reflection_lists_and_describes_the_services() -> None:
    async def inside() -> None:
        server = await start_router_server(Front(), Front(), "127.0.0.1", 0)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            info = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
            requests = [reflection_pb2.ServerReflectionRequest(list_services=""),
                        reflection_pb2.ServerReflectionRequest(file_containing_symbol="baton.wire.Inference")]
            answers = [a async for a in info(iter(requests), timeout=10)]
        names = {s.name for s in answers[0].list_services_response.service}
        assert {"baton.wire.Inference", "baton.wire.Admin", "grpc.health.v1.Health"} <= names
        assert b"GenerateRequest" in answers[1].file_descriptor_response.file_descriptor_proto[0]
        await server.stop(0)

    one_loop.run(inside())


@pytest.fixture(autouse=True)
def _no_noise(caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest) -> AsyncIterator[None]:  # type: ignore[misc]
    """Nothing but a bug is logged as an error: not a client that leaves, not a peer that dies."""
    caplog.set_level(logging.INFO)
    yield  # type: ignore[misc]
    if "bug" not in request.node.name:
        assert not [r for r in caplog.get_records("call") if r.levelno >= logging.ERROR]
