"""The worker service over real gRPC: what a caller sees is what it would see of the service itself."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from baton.core.errors import (
    BY_CODE,
    BatonError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    PeerLost,
    from_code,
)
from baton.core.handoff import PrefillCall, PrefillEvent, ReleaseAnswer
from baton.core.messages import Cancel, Hello, KVSnapshot, StepMessage, Submit, TokenChunk, UpMessage
from baton.core.request import Request
from baton.core.worker import Role, Route, WorkerInfo, WorkerLoad
from baton.wire.client import GrpcDial, GrpcWorker
from baton.wire.server import GrpcServer, start_worker_server
from tests.wire.echo_worker import CALL, INFO, STATUS, EchoWorker, one_loop, served


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


def test_a_bug_that_ends_something_the_service_waits_for_does_not_leave_the_caller_waiting(
    caplog: pytest.LogCaptureFixture
) -> None:
    async def body(worker: EchoWorker, client: GrpcWorker, server: GrpcServer) -> None:
        worker.error = asyncio.CancelledError("inside")
        for call in (client.status(5), anext(client.prefill(CALL))):
            with pytest.raises(InternalError):
                await call

    served(body)
    assert caplog.text.count("CancelledError: inside") >= 2


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
from tests.wire.echo_worker import EchoWorker
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

    argv = [sys.executable, "-c", SERVER, str(Path(__file__).parents[2])]
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
