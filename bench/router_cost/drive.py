"""Closed-loop requests through one router, and the CPU that its process used for them.

Closed, because what is asked here is the cost of a request, not how long it waits: `at_once` connections, each with its
next request as soon as the last one is answered.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from baton.bench.load.host import family, look
from baton.bench.load.http1 import Answer, Events
from baton.core.errors import SetupError

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Row:
    """What is sent."""

    name: str
    at_once: int
    num_requests: int
    num_tokens: int
    stream: bool = False
    prompt_chars: int = 20
    paced: bool = False
    """Workers take 10 ms for a token; else as little as they can."""


ROWS = (
    Row("unary", 16, 1500, 1),
    Row("unary, one at a time", 1, 300, 1),
    Row("unary, 6 KB prompt", 16, 500, 1, prompt_chars=6000),
    Row("stream of 128, at once", 32, 300, 128, stream=True),
    Row("stream of 128, 10 ms apart", 64, 192, 128, stream=True, paced=True),
)


@dataclass(frozen=True, slots=True)
class Cost:
    cpu_s: float
    """Of the router: user and system, all threads of its process and of those that it started."""
    wall_s: float
    num_requests: int
    num_tokens: int
    latencies_s: tuple[float, ...]
    """Sorted."""
    rss_bytes: int

    @property
    def per_request_s(self) -> float:
        return self.cpu_s / self.num_requests

    @property
    def per_token_s(self) -> float:
        return self.cpu_s / max(1, self.num_tokens)


class _Drive:
    def __init__(self, port: int, model: str, row: Row) -> None:
        self._port = port
        self._model = model
        self._row = row
        self._left = row.num_requests
        self.num_events = 0
        self.latencies_s: list[float] = []

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._row.at_once):
                tasks.create_task(self._connection())

    async def _connection(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            while self._left > 0:
                self._left -= 1
                began = time.perf_counter()
                async with asyncio.timeout(TIMEOUT_S):
                    writer.write(self._request(self._left))
                    await self._read(reader)
                self.latencies_s.append(time.perf_counter() - began)
        finally:
            writer.close()

    def _request(self, number: int) -> bytes:
        """No two prompts begin alike, so that nobody's cache helps."""
        row = self._row
        text = f"{number:06d} " + "the baton goes on " * (row.prompt_chars // 18 + 1)
        asked = {
            "model": self._model, "stream": row.stream, "max_tokens": row.num_tokens, "temperature": 0,
            "ignore_eos": True, "messages": [{"role": "user", "content": text[: row.prompt_chars]}],
        }  # fmt: skip
        body = json.dumps(asked).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: router\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def _read(self, reader: asyncio.StreamReader) -> None:
        answer, events, said = Answer(), Events(), b""
        while not answer.complete:
            data = await reader.read(1 << 16)
            if not data:
                raise SetupError("the router closed a connection in the middle of an answer.")
            body = answer.feed(data)
            if answer.status != 200:
                raise SetupError(f"the router answered {answer.status}: {body[:300]!r}")
            if self._row.stream:
                self.num_events += len(events.feed(body))
            else:
                said += body
        if not self._row.stream and not json.loads(said).get("choices"):
            raise SetupError(f"an answer that no worker has made: {said[:300]!r}")


async def measure(port: int, pid: int, model: str, row: Row) -> Cost:
    """Raises SetupError for anything but an answer."""
    drive = _Drive(port, model, row)
    cpu_before, began = cpu_s(pid), time.perf_counter()
    await drive.run()
    wall_s, used_s = time.perf_counter() - began, cpu_s(pid) - cpu_before
    if row.stream and drive.num_events < row.num_requests * row.num_tokens:
        raise SetupError(f"{drive.num_events} events came of {row.num_requests * row.num_tokens} tokens.")
    num_tokens = row.num_requests * row.num_tokens
    return Cost(used_s, wall_s, row.num_requests, num_tokens, tuple(sorted(drive.latencies_s)), _rss_bytes(pid))


def cpu_s(pid: int) -> float:
    """User and system time of a process and its descendants so far."""
    return look(0.0, family(frozenset({pid}))).server


def _rss_bytes(pid: int) -> int:
    statm = (Path("/proc") / str(member) / "statm" for member in family(frozenset({pid})))
    return sum(int(each.read_text().split()[1]) for each in statm) * os.sysconf("SC_PAGE_SIZE")
