"""What stands behind the routers that are measured, as they are started: workers that cost nothing."""

from __future__ import annotations

import asyncio
import os

import httpx
import pytest

from baton.bench.router_cost import mock
from baton.bench.router_cost.drive import Row, measure
from baton.bench.router_cost.systems import mocks
from baton.core.errors import SetupError


def test_every_one_of_the_workers_answers_whole_and_as_a_stream() -> None:
    async def main() -> None:
        async with mocks(paced=False) as ports:
            for port in ports:
                whole = await measure(port, os.getpid(), mock.MODEL, Row("whole", 2, 4, 3))
                stream = await measure(port, os.getpid(), mock.MODEL, Row("stream", 2, 4, 3, stream=True))
                assert (whole.num_tokens, len(whole.latencies_s)) == (12, 4)
                assert (stream.num_tokens, len(stream.latencies_s)) == (12, 4)

    asyncio.run(main())


def test_a_router_that_renames_max_tokens_gets_as_many_as_were_asked_for() -> None:
    async def main() -> None:
        asked = {"model": mock.MODEL, "max_completion_tokens": 3, "messages": []}
        async with mocks(paced=False) as ports, httpx.AsyncClient() as client:
            answer = await client.post(f"http://127.0.0.1:{ports[0]}/v1/chat/completions", json=asked)
        assert answer.json()["choices"][0]["message"]["content"] == " tok tok tok"

    asyncio.run(main())


def test_an_answer_that_no_worker_made_is_no_measurement() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
            with pytest.raises(BaseExceptionGroup) as caught:
                await measure(server.sockets[0].getsockname()[1], os.getpid(), "m", Row("whole", 1, 1, 1))
        assert caught.group_contains(SetupError, match="no worker")

    asyncio.run(main())
