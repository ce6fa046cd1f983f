"""What the load client itself costs: CPU per token, beside httpx doing the same.

    python -m baton.bench.load.intake [--streams 64] [--rate 50] [--seconds 5]

1. a server in a process of its own streams to so many clients at once, each event in a write of its own
2. the client reads them at `--rate` events a second and stream, as from a model: microseconds of CPU per token
3. it reads them as fast as they come, where one read brings many events: tokens per second of one core

CPU time, not wall time, so that a shared machine disturbs it little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import httpx

from baton.bench.load.client import Client
from baton.bench.load.openai import Asker, Dialect
from baton.bench.load.record import Record

EVENT = {
    "id": "cmpl-0123456789abcdef",
    "object": "text_completion",
    "created": 1_700_000_000,
    "model": "smollm2-135m",
    "system_fingerprint": "fp_0123456789ab",
    "choices": [{"index": 0, "text": " river", "logprobs": None, "finish_reason": None}],
    "usage": None,
}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
BURST = 5000
"""Events per stream when they come as fast as they can."""

Take = Callable[[str, bytes], Awaitable[int]]
"""Asks once at a URL with a body; how many tokens came."""


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """max_tokens events; `user` says how many a second."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    asked = json.loads(await reader.readexactly(length))
    gap_s = 1 / float(asked["user"]) if float(asked["user"]) else 0.0
    event = chunk(b"data: " + json.dumps(EVENT).encode() + b"\n\n")
    writer.write(HEAD)
    for _ in range(asked["max_tokens"]):
        writer.write(event)
        await (asyncio.sleep(gap_s) if gap_s else writer.drain())
    writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    await writer.drain()
    writer.close()


async def serve() -> None:
    server = await asyncio.start_server(stream, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


async def with_ours(url: str, body: bytes) -> int:
    async with Client(url) as client:
        record = Record("intake", 0, 0.0, 1, 1)
        asked = json.loads(body)
        dialect = Dialect("completions", "m", extra={"user": asked["user"]})
        await Asker(client, dialect, 600.0).ask(record, dialect.body(["x"], asked["max_tokens"]), False)
        assert record.ok, record.message
        return len(record.event_s)


async def with_httpx(url: str, body: bytes) -> int:
    tokens = 0
    async with (
        httpx.AsyncClient(timeout=600) as client,
        client.stream("POST", f"{url}/v1/completions", content=body) as response,
    ):
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                tokens += bool(json.loads(line[6:])["choices"][0]["text"])
    return tokens


async def cost(take: Take, url: str, streams: int, rate: float, events: int) -> tuple[float, float]:
    """Microseconds of CPU per token, and tokens per second of CPU, of `streams` answers at once."""
    body = json.dumps({"max_tokens": events, "user": str(rate)}).encode()
    before_s = time.process_time()
    tokens = sum(await asyncio.gather(*(take(url, body) for _ in range(streams))))
    spent_s = time.process_time() - before_s
    assert tokens == streams * events, f"{tokens} of {streams * events} tokens"
    return spent_s / tokens * 1e6, tokens / spent_s


def main() -> None:
    parser = argparse.ArgumentParser(prog="baton.bench.load.intake", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=64, help="answers at once (%(default)s)")
    parser.add_argument("--rate", type=float, default=50.0, help="tokens per second of each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of the paced part (%(default)s)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        asyncio.run(serve())
        return
    command = [sys.executable, "-m", "baton.bench.load.intake", "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        try:
            for name, take in (("baton bench", with_ours), ("httpx", with_httpx)):
                events = int(asked.rate * asked.seconds)
                paced, _ = asyncio.run(cost(take, url, asked.streams, asked.rate, events))
                _, burst = asyncio.run(cost(take, url, asked.streams, 0.0, BURST))
                print(f"{name:<12} {paced:6.1f} us of CPU per token, paced; {burst:,.0f} tokens/s of one core, unpaced")
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
