"""gRPC servers: worker and router services behind health (grpc.health.v1), reflection and one error rule.

Life of a call: gRPC reads the request's bytes -> `_Guard` makes messages of them and runs the service's own code ->
messages are written as they come -> the call ends with OK, a BatonError's status, or, for anything else, INTERNAL and
one sentence (the traceback goes to the log). However it ends, also when the client is gone or reads nothing for
WRITE_TIMEOUT_S, the service's iterator is closed before the call is over.

Health is what the service says of itself, asked again every HEALTH_POLL_S: by what it gets done, not by whether this
server answers.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc._cython.cygrpc import ExecuteBatchError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.core.errors import BatonError, Cancelled, InternalError, InvalidRequest, SetupError
from baton.core.messages import UpMessage
from baton.core.services import WorkerService
from baton.wire import (
    admin_pb2,
    admin_pb2_grpc,
    codec,
    inference_pb2,
    inference_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from baton.wire.calls import SERVER_OPTIONS, abort, closing

log = logging.getLogger("baton.wire")

WRITE_TIMEOUT_S = 30.0
HEALTH_POLL_S = 0.5
_OUR_CALLS = "/baton.wire."

Unhealthy = Callable[[], str | None]
"""Why nothing should be sent here now; None: all is well."""


def _is_no_leaving(record: logging.LogRecord) -> bool:
    """gRPC logs an error when a caller leaves before its call's task has run for the first time, or so late that only
    the status could no longer be written (messages are written by `_write`). Leaving is none."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or not issubclass(kind, asyncio.CancelledError | ExecuteBatchError)


logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_leaving)


class GrpcServer:
    """A server that listens. Whoever started it stops it."""

    def __init__(self, server: grpc.aio.Server, health_of: health.aio.HealthServicer, services: Sequence[str],
                 port: int, unhealthy: Unhealthy) -> None:
        self._server = server
        self._health = health_of
        self._services = ("", *services)
        self.port = port
        self._unhealthy = unhealthy
        self._told: bool | None = None
        self._follower = asyncio.create_task(self._follow_health(), name=f"health of {port}")

    async def _follow_health(self) -> None:
        while True:
            await self.tell_health()
            await asyncio.sleep(HEALTH_POLL_S)

    async def tell_health(self) -> None:
        """What health checks hear from now on, for each service and for the server as a whole. Calls are answered
        either way."""
        why = self._unhealthy()
        if self._told is (why is None):
            return
        if why is not None or self._told is not None:
            level = logging.INFO if self._told is None else logging.WARNING
            log.log(level, "port %d: %s", self.port, f"not healthy: {why}" if why else "healthy again")
        self._told = why is None
        answer = health_pb2.HealthCheckResponse.SERVING if self._told else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self._health.set(service, answer)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give running ones `grace_s`, then cancel them. Safe to call twice."""
        self._follower.cancel()
        await asyncio.gather(self._follower, return_exceptions=True)
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def _always_well() -> None:
    return None


async def start_worker_server(service: WorkerService, host: str, port: int,
                              unhealthy: Unhealthy = _always_well) -> GrpcServer:
    """Serve a worker on host:port; port 0 takes a free one. Raises SetupError when the port cannot be had."""
    server, health_of = _new_server()
    worker_pb2_grpc.add_WorkerServicer_to_server(_WorkerFront(service), server)  # type: ignore[no-untyped-call]
    names = [worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name]
    return await _started(server, health_of, names, (host, port), unhealthy)


async def start_router_server(inference: inference_pb2_grpc.InferenceServicer, admin: admin_pb2_grpc.AdminServicer,
                              host: str, port: int, unhealthy: Unhealthy = _always_well) -> GrpcServer:
    """Serve a router's gRPC front on host:port. Its servicers are async (coroutines, async generators) and raise
    BatonErrors: they need not know gRPC. Raises SetupError when the port cannot be had."""
    server, health_of = _new_server()
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)  # type: ignore[no-untyped-call]
    admin_pb2_grpc.add_AdminServicer_to_server(admin, server)  # type: ignore[no-untyped-call]
    names = [inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name,
             admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name]
    return await _started(server, health_of, names, (host, port), unhealthy)


def _new_server() -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
    server = grpc.aio.server(interceptors=[_Guard()], options=SERVER_OPTIONS)
    health_of = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_of, server)
    return server, health_of


async def _started(server: grpc.aio.Server, health_of: health.aio.HealthServicer, services: list[str],
                   address: tuple[str, int], unhealthy: Unhealthy) -> GrpcServer:
    host, port = address
    reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(target)
    except RuntimeError:
        raise SetupError(f"cannot listen on {target}: {_why_not(host, port)}. Choose another address or port, or end "
                         "what uses this one.") from None
    await server.start()
    handle = GrpcServer(server, health_of, services, bound, unhealthy)
    await handle.tell_health()
    return handle


def _why_not(host: str, port: int) -> str:
    """The system's own words: gRPC does not pass them on."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as e:
        return (e.strerror or str(e)).lower()
    return "it was in use a moment ago"


class _WorkerFront(worker_pb2_grpc.WorkerServicer):
    """A WorkerService, spoken in protobuf."""

    def __init__(self, service: WorkerService) -> None:
        self._service = service

    async def Stream(self, request_iterator: Any, context: Any) -> AsyncIterator[worker_pb2.StepMessage]:
        async with closing(_decoded(request_iterator)) as up, closing(self._service.stream(up)) as steps:
            async for step in steps:
                yield codec.STEP.encode(step)

    async def Prefill(self, request: worker_pb2.PrefillCall, context: Any) -> AsyncIterator[worker_pb2.PrefillEvent]:
        async with closing(self._service.prefill(codec.PREFILL_CALL.decode(request))) as events:
            async for event in events:
                yield codec.PREFILL_EVENT.encode(event)

    async def Lease(self, request: worker_pb2.LeaseCall, context: Any) -> worker_pb2.ReleaseAnswer:
        answer = await self._service.lease(request.lease_id, request.release, context.time_remaining() or 0.0)
        return codec.RELEASE_ANSWER.encode(answer)

    async def Drain(self, request: worker_pb2.DrainCall, context: Any) -> worker_pb2.WorkerStatus:
        return codec.STATUS.encode(await self._service.drain(request.on, context.time_remaining() or 0.0))

    async def Status(self, request: worker_pb2.StatusCall, context: Any) -> worker_pb2.WorkerStatus:
        return codec.STATUS.encode(await self._service.status(context.time_remaining() or 0.0))


async def _decoded(messages: AsyncIterator[worker_pb2.UpMessage]) -> AsyncIterator[UpMessage]:
    async for message in messages:
        yield codec.UP.decode(message)


class _Guard(grpc.aio.ServerInterceptor):
    """The one error rule, around every call of ours; health and reflection have their own."""

    async def intercept_service(self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
                                handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_OUR_CALLS):
            return handler
        up = "stream" if handler.request_streaming else "unary"
        down = "stream" if handler.response_streaming else "unary"
        behaviour = getattr(handler, f"{up}_{down}")
        make = getattr(grpc, f"{up}_{down}_rpc_method_handler")
        return make(
            _guarded(behaviour, method, _reader(handler)), request_deserializer=None,
            response_serializer=handler.response_serializer)


def _reader(handler: Any) -> Callable[[Any], Any]:
    """From bytes, or an iterator of them, to messages. Not left to gRPC, which answers UNKNOWN for bytes that are no
    message, and logs a traceback."""

    def read(data: bytes) -> Any:
        try:
            return handler.request_deserializer(data)
        except DecodeError as e:
            raise InvalidRequest(f"the request is not a message of this call ({e}). Encode it as proto/ says, text as "
                                 "UTF-8.") from None

    async def read_all(stream: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        try:
            async for data in stream:
                yield read(data)
        except grpc.aio.BaseError as e:  # read when the call, or the server, has ended
            raise Cancelled(f"the call is over: {e}") from None

    return read_all if handler.request_streaming else read


async def _write(context: Any, message: Any) -> None:
    """A caller that stays and reads nothing blocks this as soon as its window is full. It then costs us no more than
    the call's last word, which waits for it."""
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await context.write(message)
    except TimeoutError:
        raise Cancelled(f"nobody read this call's answers for {WRITE_TIMEOUT_S:g} s.") from None


def _guarded(behaviour: Callable[[Any, Any], Any], method: str,
             read: Callable[[Any], Any]) -> Callable[[Any, Any], Awaitable[Any]]:
    """Streams are written from here instead of handing gRPC the generator: gRPC leaves a generator that it no longer
    needs to the garbage collector, and a cancelled Prefill must end its work now."""

    async def call(request: Any, context: Any) -> Any:
        try:
            answer = behaviour(read(request), context)
            if inspect.isawaitable(answer):
                return await answer
            async with closing(answer) as messages:
                async for message in messages:
                    await _write(context, message)
        except grpc.aio.AbortError:
            raise
        except BatonError as e:
            await abort(context, e)
        except grpc.aio.BaseError:
            log.debug("%s: the caller had gone", method, exc_info=True)
        except (Exception, asyncio.CancelledError) as e:
            task = asyncio.current_task()
            if isinstance(e, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # the call is, and not something that it waited for
            log.exception("%s failed", method)
            await abort(context, InternalError("internal error; the server's log says more."))
        return None

    return call
