"""An HTTP server that plays a script: what it is sent, it remembers; what it answers, a test says byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Exchange:
    """One request, and the way to answer it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def whole(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        await self.send(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data))

    async def begin(self) -> None:
        await self.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")

    async def event(self, event: Any) -> None:
        data = b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.send(b"0\r\n\r\n")

    async def answer(self, tokens: int, usage: dict[str, Any] | None = None) -> None:
        """A completion of so many events, as OpenAI streams it."""
        await self.begin()
        for _ in range(tokens):
            await self.event({"choices": [{"index": 0, "text": " word", "finish_reason": None}]})
        await self.event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        if usage is not None:
            await self.event({"choices": [], "usage": usage})
        await self.event(b"[DONE]")
        await self.end()


Play = Callable[[Exchange], Awaitable[None]]


@dataclass
class Scripted:
    url: str
    seen: list[Exchange] = field(default_factory=list)
    num_connections: int = 0


@contextlib.asynccontextmanager
async def scripted(play: Play) -> AsyncIterator[Scripted]:
    """`play` is called for each request; when it raises ConnectionError, the connection is closed."""
    there, serving = Scripted(""), set[asyncio.Task[None]]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there.num_connections += 1
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        # Cancelled at the end, it returns: asyncio reports a connection's task that does not.
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
                headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
                data = await reader.readexactly(int(headers.get("content-length", 0)))
                exchange = Exchange(first.split()[1], headers, json.loads(data or b"{}"), writer)
                there.seen.append(exchange)
                await play(exchange)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    there.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield there
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving)
