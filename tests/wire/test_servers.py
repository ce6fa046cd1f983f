"""What both servers have in common: ports, health, reflection, one error rule, callers that read nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc._cython.cygrpc import ExecuteBatchError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.core.errors import Cancelled, InvalidRequest, SetupError
from baton.wire import (
    admin_pb2,
    admin_pb2_grpc,
    codec,
    inference_pb2,
    inference_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from baton.wire.client import GrpcAdmin, GrpcWorker
from baton.wire.server import GrpcServer, _reader, start_router_server, start_worker_server
from tests.wire.echo_worker import STATUS, EchoWorker, one_loop, served


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


async def read_to_its_error(call: Any) -> tuple[int, Any]:
    read = 0
    while True:
        try:
            await call.read()
        except grpc.aio.AioRpcError as e:
            return read, e
        read += 1


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
            read, error = await read_to_its_error(call)
            assert 1 + read >= front.written, "what was written before is not lost"
            assert (error.code(), "nobody read" in error.details()) == (grpc.StatusCode.CANCELLED, True)
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


@pytest.mark.parametrize(
    ("raised", "is_told"), [(ExecuteBatchError("status"), False), (asyncio.CancelledError(), False), (KeyError(), True)]
)
def test_a_bug_reaches_the_log_and_a_caller_who_left_before_the_status_does_not(
    raised: BaseException, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """That gRPC sees the unwritten status before it sees the closed call is a race: its record is made here."""
    logging.getLogger("grpc._cython.cygrpc").error("raised in core by servicer method [...]", exc_info=raised)
    assert bool(caplog.records) is is_told


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


def test_a_stream_read_when_its_server_has_stopped_ends_as_everything_ends_that_a_worker_knows() -> None:
    """gRPC raises an error of its own there, in the few turns of the loop between a server's end and its calls'."""

    async def stream() -> AsyncIterator[bytes]:
        yield worker_pb2.UpMessage(hello=worker_pb2.Hello(router_id="r")).SerializeToString()
        raise grpc.aio.UsageError("Server already stopped.")

    async def inside() -> list[Any]:
        handler = grpc.stream_stream_rpc_method_handler(
            lambda *_: None, request_deserializer=worker_pb2.UpMessage.FromString)
        messages = _reader(handler)(stream())
        heard = [await anext(messages)]
        with pytest.raises(Cancelled, match="the call is over"):
            await anext(messages)
        return heard

    (hello,) = one_loop.run(inside())
    assert hello.hello.router_id == "r"
