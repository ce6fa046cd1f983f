"""A client that leaves, or whose time is up, frees its request at once, on the router and on the worker: at whatever
point of its life, through whichever door. Real servers and the real dispatcher; only the worker follows a script."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from baton.core.messages import Submit, TokenChunk
from baton.core.request import Request
from baton.router.generation import Unknown
from baton.router.grpc_front import InferenceFront
from baton.router.listen import STALL_MS
from baton.wire import admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from baton.wire.server import start_router_server
from tests.router.fake_fleet import Act, ScriptedFleet, ScriptedWorker, mute, refuse, speak
from tests.router.front_world import MODEL, EchoDispatcher, FrontWorld, open_front, scored

TIMEOUT_S = 60.0
BODY = {"model": MODEL, "prompt": "hello", "max_tokens": 40}


@dataclass
class Doors:
    """A router with one worker, and what a client needs to reach it."""

    world: FrontWorld
    fleet: ScriptedFleet
    worker: ScriptedWorker
    grpc: str
    said: asyncio.Event = field(default_factory=asyncio.Event)
    """The worker has done what its script holds."""

    async def freed(self, outcome: str) -> None:
        """Nothing of the request is left, and its end was counted."""
        counted = self.world.metrics.value
        while self.fleet.dispatcher.num_inflight or not counted("baton_requests_total", outcome=outcome):
            await asyncio.sleep(0)

    async def cancelled_on_the_worker(self) -> None:
        last = self.worker.submits[-1]
        while (last.request.request_id, last.epoch) not in {(c.request_id, c.epoch) for c in self.worker.cancels}:
            await asyncio.sleep(0)


def some_tokens(submit: Submit) -> Iterator[Act]:
    for act, _ in zip(speak(submit), range(6), strict=False):
        yield act


POINTS = {"queued": refuse("overloaded"), "prefilling": mute, "decoding": some_tokens}


@contextlib.asynccontextmanager
async def opened(directory: Path, point: str, *overrides: str) -> AsyncIterator[Doors]:
    worker = ScriptedWorker("d0")
    async with ScriptedFleet(worker) as fleet, open_front(directory, fleet.dispatcher, *overrides) as world:  # type: ignore[arg-type]
        server = await start_router_server(
            InferenceFront(world.generation), admin_pb2_grpc.AdminServicer(), "127.0.0.1", 0)  # type: ignore[no-untyped-call]  # fmt: skip
        doors = Doors(world, fleet, worker, f"127.0.0.1:{server.port}")

        def script(submit: Submit) -> Iterator[Act]:
            yield from POINTS[point](submit)
            doors.said.set()

        worker.script = script
        try:
            async with asyncio.timeout(TIMEOUT_S):
                yield doors
        finally:
            await server.stop(0)


# ---- leaving ---------------------------------------------------------------------------------------------------------


async def hang_up(doors: Doors, point: str, stream: bool) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(doors.world.url.rpartition(":")[2]))
    body = json.dumps(BODY | {"stream": stream}).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                 b"content-length: %d\r\n\r\n" % len(body) + body)  # fmt: skip
    await doors.said.wait()
    if stream and point == "decoding":
        await reader.readuntil(b"data: ")
    writer.close()
    await writer.wait_closed()


async def hang_up_whole(doors: Doors, point: str) -> None:
    await hang_up(doors, point, stream=False)


async def hang_up_stream(doors: Doors, point: str) -> None:
    await hang_up(doors, point, stream=True)


async def cancel_the_call(doors: Doors, point: str) -> None:
    async with grpc.aio.insecure_channel(doors.grpc) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(generate_request())  # type: ignore[no-untyped-call]
        await doors.said.wait()
        call.cancel()


async def die(doors: Doors, point: str) -> None:
    """The whole connection, in the middle of the call."""
    channel = grpc.aio.insecure_channel(doors.grpc)
    call = inference_pb2_grpc.InferenceStub(channel).Generate(generate_request())  # type: ignore[no-untyped-call]
    await doors.said.wait()
    await channel.close()
    del call


def generate_request() -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(text="hello", sampling={"max_tokens": 40})


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("leave", [hang_up_whole, hang_up_stream, cancel_the_call, die])
def test_a_client_that_leaves_frees_its_request_on_both_sides(
    tmp_path: Path, point: str, leave: Callable[[Doors, str], Awaitable[None]]
) -> None:
    async def scenario() -> None:
        async with opened(tmp_path, point) as doors:
            await leave(doors, point)
            await doors.freed("cancelled")
            if point != "queued":  # a refused request is no longer the worker's
                await doors.cancelled_on_the_worker()
            doors.worker.script = speak
            async with httpx.AsyncClient() as client:
                reply = await client.post(doors.world.url + "/v1/completions", json=BODY)
            assert reply.status_code == 200, "the next one finds its place"

    asyncio.run(scenario())


# ---- deadlines -------------------------------------------------------------------------------------------------------


async def whole(doors: Doors) -> tuple[int, str]:
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        reply = await client.post(doors.world.url + "/v1/completions", json=BODY)
        return reply.status_code, reply.json()["error"]["code"]


async def streamed(doors: Doors) -> tuple[int, str]:
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        reply = await client.post(doors.world.url + "/v1/completions", json=BODY | {"stream": True})
        if reply.status_code != 200:
            return reply.status_code, reply.json()["error"]["code"]
        last, done = reply.text.split("\n\n")[-3:-1]
        assert done == "data: [DONE]"
        return 504, json.loads(last.partition("data: ")[2])["error"]["code"]


async def by_grpc(doors: Doors) -> tuple[int, str]:
    async with grpc.aio.insecure_channel(doors.grpc) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(generate_request())  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await told(call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return 504, str(dict(caught.value.trailing_metadata())["baton-code"])


async def told(call: Any) -> None:
    async for _ in call:
        pass


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("ask", [whole, streamed, by_grpc])
def test_a_request_whose_time_is_up_ends_with_a_504_and_is_freed_on_both_sides(
    tmp_path: Path, point: str, ask: Callable[[Doors], Awaitable[tuple[int, str]]]
) -> None:
    async def scenario() -> None:
        async with opened(tmp_path, point, "router.request_timeout_s=0.4") as doors:
            assert await ask(doors) == (504, "deadline_exceeded")
            await doors.freed("deadline_exceeded")
            if point != "queued":
                await doors.cancelled_on_the_worker()

    asyncio.run(scenario())


@pytest.mark.parametrize("point", POINTS)
def test_a_calls_own_deadline_frees_its_request_too(tmp_path: Path, point: str) -> None:
    async def scenario() -> None:
        async with opened(tmp_path, point) as doors, grpc.aio.insecure_channel(doors.grpc) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Generate(generate_request(), timeout=0.4)
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            while doors.fleet.dispatcher.num_inflight:
                await asyncio.sleep(0)
            if point != "queued":
                await doors.cancelled_on_the_worker()

    asyncio.run(scenario())


# ---- slow readers ----------------------------------------------------------------------------------------------------


class Endless(EchoDispatcher):
    """Says more than any socket's buffers take."""

    async def generate(self, request: Request, last_seen: str | None = None, unknown: Unknown | None = None
                       ) -> AsyncGenerator[TokenChunk, None]:
        self.requests.append(request)
        left = self.cancelled.setdefault(request.request_id, asyncio.Event())
        try:
            for index in itertools.count(step=100):
                yield TokenChunk(request.request_id, 1, index, (5,) * 100, logprobs=(scored(5, 20),) * 100)
                await asyncio.sleep(0)
        finally:
            left.set()


def test_a_client_that_stays_and_reads_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.router.http.SEND_TIMEOUT_S", 0.5)
    source = Endless()
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True,
                            "logprobs": True, "top_logprobs": 20}  # fmt: skip

    async def scenario() -> None:
        # Before the kernel gives it up (listen.STALL_MS), which is for clients whose machine is gone.
        async with open_front(tmp_path, source) as world, asyncio.timeout(STALL_MS / 1000 - 5):
            data = json.dumps(body).encode()
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(client, ("127.0.0.1", int(world.url.rpartition(":")[2])))
                await loop.sock_sendall(
                    client, b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                    b"content-length: %d\r\n\r\n" % len(data) + data)  # fmt: skip
                while not source.requests:
                    await asyncio.sleep(0)
                await source.cancelled[source.requests[0].request_id].wait()
                while not world.metrics.value("baton_requests_total", outcome="cancelled"):
                    await asyncio.sleep(0)

    asyncio.run(scenario())
