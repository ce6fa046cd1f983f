"""What the libraries alone cost: a router that decides nothing.

`python -m baton.bench.router_cost.floor REDIS_URL MODEL_DIRECTORY`: the same HTTP server, JSON, tokenizer, messages and
gRPC as Baton's router, one decode worker for all requests, and nothing else: no checks, admission, index, price,
exactness, text across tokens, figures or log. So what Baton's router takes beyond it is Baton's own Python.

Prints its port once it serves.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import uvloop
from starlette.types import Receive, Scope, Send
from tokenizers import Tokenizer

from baton.cluster.store import RedisRegistry
from baton.core.messages import Hello, Submit, TokenChunk, UpMessage
from baton.core.request import Request, SamplingParams
from baton.core.worker import Role, Route, WorkerInfo
from baton.router.listen import HttpServer
from baton.wire.client import GrpcWorker

POLL_S = 0.05


class Floor:
    def __init__(self, info: WorkerInfo, tokenizer: Any) -> None:
        self._info = info
        self._tokenizer = tokenizer
        self._up: asyncio.Queue[UpMessage] = asyncio.Queue()
        self._down: dict[int, asyncio.Queue[TokenChunk]] = {}
        self._epochs = itertools.count(1)

    async def follow(self) -> None:
        async for message in GrpcWorker(self._info.address).stream(self._sent()):
            for chunk in message.chunks:
                self._down[chunk.epoch].put_nowait(chunk)

    async def _sent(self) -> AsyncGenerator[UpMessage, None]:
        yield Hello("floor")
        while True:
            yield await self._up.get()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        asked, epoch = json.loads(body), next(self._epochs)
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in asked["messages"])
        ids = tuple(self._tokenizer.encode_batch_fast([text])[0].ids)
        request = Request(f"r{epoch}", ids, SamplingParams(max_tokens=asked["max_tokens"]))
        said = self._down[epoch] = asyncio.Queue()
        self._up.put_nowait(Submit(request, Route(self._info.worker_id, None), epoch))
        streamed = asked["stream"]
        kind = b"text/event-stream" if streamed else b"application/json"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        pieces, finish = [], None
        while finish is None:
            chunk = await said.get()
            finish = chunk.finish
            pieces.append("".join(map(str, chunk.token_ids)))
            if streamed:
                choice = {"index": 0, "delta": {"content": pieces[-1]}, "finish_reason": finish}
                event = b"data: " + json.dumps({"id": f"r{epoch}", "choices": [choice]}).encode() + b"\n\n"
                await send({"type": "http.response.body", "body": event, "more_body": finish is None})
        if not streamed:
            choice = {"index": 0, "message": {"content": "".join(pieces)}, "finish_reason": finish}
            await send({"type": "http.response.body", "body": json.dumps({"choices": [choice]}).encode()})
        del self._down[epoch]


async def serve(redis_url: str, tokenizer: Any) -> None:
    floor = Floor(await _a_decode_worker(RedisRegistry(redis_url)), tokenizer)
    following = asyncio.create_task(floor.follow())
    server = await HttpServer.start(floor, "127.0.0.1", 0, 1)
    print(server.port, flush=True)
    await following


async def _a_decode_worker(registry: RedisRegistry) -> WorkerInfo:
    while True:
        for info in await registry.list():
            if info.role is Role.DECODE:
                return info
        await asyncio.sleep(POLL_S)


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], Tokenizer.from_file(str(Path(sys.argv[2]) / "tokenizer.json"))))
