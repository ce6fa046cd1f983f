"""A worker that costs nothing: OpenAI's endpoints with made-up tokens, for routers that speak HTTP to their workers.

`python -m baton.bench.router_cost.mock PORT... --gap-s S`: one process that listens on each port. A streamed answer is
one event per token, S seconds apart; with 0 all are written at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any, cast

import uvloop

MODEL = "mock"
_TOKEN = b" tok"


class Worker(asyncio.Protocol):
    """One connection. Requests on it come one after the other."""

    def __init__(self, gap_s: float) -> None:
        self._gap_s = gap_s
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head, length = self._received[:end].lower(), 0
            for line in head.split(b"\r\n")[1:]:
                name, _, value = line.partition(b":")
                length = int(value) if name == b"content-length" else length
            if len(self._received) < end + 4 + length:
                return
            body, self._received = self._received[end + 4 : end + 4 + length], self._received[end + 4 + length :]
            self._answer(json.loads(body) if body else None)

    def _answer(self, asked: dict[str, Any] | None) -> None:
        if asked is None:  # health, model list and the like
            self._whole({"status": "ok", "object": "list", "data": [{"id": MODEL, "object": "model"}]})
            return
        # Some routers rename what they pass on.
        num_tokens = asked.get("max_completion_tokens") or asked.get("max_tokens") or 16
        if asked.get("stream"):
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            )
            self._say(num_tokens)
        else:
            text = (_TOKEN * num_tokens).decode()
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}
            self._whole({"id": "mock-1", "object": "chat.completion", "model": MODEL, "choices": [choice]})

    def _say(self, left: int) -> None:
        while left:
            self._event({"index": 0, "delta": {"content": " tok"}, "finish_reason": None})
            left -= 1
            if self._gap_s and left:
                asyncio.get_running_loop().call_later(self._gap_s, self._say, left)
                return
        self._event({"index": 0, "delta": {}, "finish_reason": "length"})
        self._chunk(b"data: [DONE]\n\n")
        self._transport.write(b"0\r\n\r\n")

    def _event(self, choice: dict[str, Any]) -> None:
        said = {"id": "mock-1", "object": "chat.completion.chunk", "model": MODEL, "choices": [choice]}
        self._chunk(b"data: " + json.dumps(said).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _whole(self, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )


async def serve(ports: list[int], gap_s: float) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(lambda: Worker(gap_s), "127.0.0.1", port) for port in ports]
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Workers that cost nothing.")
    parser.add_argument("ports", type=int, nargs="+", metavar="PORT")
    parser.add_argument("--gap-s", type=float, default=0.0)
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.ports, arguments.gap_s))
