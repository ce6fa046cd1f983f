"""One prefill and one decode node with the real model, real transports and (optionally) real gRPC, in this process.

The quick way to run a whole hand-off many times with many settings. The stack of processes is tested in
test_stack.py; nothing here stands in for production code.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from baton.core.config import Config, load
from baton.core.errors import RetryRoute, from_code
from baton.core.messages import Hello, Submit, TakeFrom, TokenChunk, UpMessage
from baton.core.request import Choice, FinishReason, Request, SamplingParams, TokenLogprob
from baton.core.services import Dial, WorkerService
from baton.core.worker import Role, Route, WorkerInfo
from baton.decode_node.policy import decode_policy
from baton.models.catalog import ModelFiles
from baton.prefill_node.policy import prefill_policy
from baton.worker.assembly import open_node
from baton.worker.node import WorkerNode

_ids = itertools.count()


@dataclasses.dataclass
class Answer:
    tokens: list[int]
    finish: FinishReason | None
    cached_tokens: int
    chunks: list[TokenChunk]

    def take(self, chunk: TokenChunk) -> None:
        assert chunk.first_index == len(self.tokens), "a gap or a duplicate"
        self.chunks.append(chunk)
        self.tokens += chunk.token_ids
        self.finish, self.cached_tokens = chunk.finish, chunk.cached_tokens


class Client:
    """Submits to a decode worker, as a router would."""

    def __init__(self, service: WorkerService, info: WorkerInfo, lender: WorkerInfo) -> None:
        self._service = service
        self._info = info
        self.lender = lender
        """Where prompts are prefilled, unless `local`."""
        self._up: asyncio.Queue[UpMessage] = asyncio.Queue()
        self._waiting: dict[str, asyncio.Queue[TokenChunk]] = {}

    async def run_router(self) -> None:
        self._up.put_nowait(Hello("test"))
        async for message in self._service.stream(self._read_queue()):
            for chunk in message.chunks:
                self._waiting[chunk.request_id].put_nowait(chunk)

    async def _read_queue(self) -> AsyncIterator[UpMessage]:
        while True:
            yield await self._up.get()

    async def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        local: bool = False,
        started: asyncio.Event | None = None,
        **sampling: object,
    ) -> Answer:
        """Greedy unless told otherwise. `started` is set at the first token. Told to choose another route, it sends
        what it has and asks the decode worker to prefill, as a router does that knows no other. Raises what else the
        worker answered."""
        request = request_of(prompt, max_tokens, **sampling)
        chunks, answer, epoch = self._submitted(request, local), Answer([], None, 0, []), 1
        while answer.finish is None:
            async with asyncio.timeout(120):
                chunk = await chunks.get()
            if chunk.error_code == RetryRoute.code:
                epoch += 1
                rest = dataclasses.replace(request, choices=(Choice(0, tuple(answer.tokens)),))
                self._up.put_nowait(Submit(rest, Route(self._info.worker_id, None), epoch))
                continue
            if started is not None:
                started.set()
            answer.take(chunk)
        if answer.chunks[-1].error_code:
            raise from_code(answer.chunks[-1].error_code, answer.chunks[-1].error_message)
        return answer

    async def moved(
        self, prompt: Sequence[int], max_tokens: int, target: Client, at_token: int, **sampling: object
    ) -> Answer:
        """Prefilled by the lender, it runs here until `at_token` tokens were told; then `target` takes it over."""
        request, answer = request_of(prompt, max_tokens, **sampling), Answer([], None, 0, [])
        chunks = self._submitted(request, local=False)
        async with asyncio.timeout(120):
            while len(answer.tokens) < at_token:
                answer.take(await chunks.get())
            assert answer.finish is None, "nothing is left to move"
            known = dataclasses.replace(request, choices=(Choice(0, tuple(answer.tokens)),))
            chunks = target._waiting[request.request_id] = asyncio.Queue()
            route = Route(target._info.worker_id, None)
            target._up.put_nowait(Submit(known, route, 2, take_from=TakeFrom(self._info, 1)))
            while answer.finish is None:
                answer.take(await chunks.get())
        assert not answer.chunks[-1].error_code, answer.chunks[-1]
        return answer

    def _submitted(self, request: Request, local: bool) -> asyncio.Queue[TokenChunk]:
        chunks = self._waiting[request.request_id] = asyncio.Queue()
        self._up.put_nowait(Submit(request, Route(self._info.worker_id, None if local else self.lender), 1))
        return chunks


def request_of(prompt: Sequence[int], max_tokens: int, **sampling: object) -> Request:
    params = SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return Request(f"r{next(_ids)}", tuple(prompt), params)


def pair_config(*overrides: str) -> Config:
    return load({}, ["engine.num_blocks=160", "engine.quantization=fp32", 'handoff.transports=["tcp"]', *overrides])


class Pair(Client):
    """Both nodes in this process, and a third one."""

    def __init__(self, prefill: WorkerNode, decode: WorkerNode, other: WorkerNode | None = None) -> None:
        super().__init__(decode, decode.info, prefill.info)
        self.prefill = prefill
        self.decode = decode
        self.other = None if other is None else Pair(prefill, other)
        """A pair of its own with the same prefill worker: what runs here can move there."""


@contextlib.asynccontextmanager
async def open_pair(files: ModelFiles, config: Config, other: Config | None = None) -> AsyncIterator[Pair]:
    """Both nodes, met and measured, and with `other` a second decode node; everything is closed at the end and all
    ledgers must balance."""
    nodes: dict[str, WorkerNode] = {}

    def dial(info: WorkerInfo) -> WorkerService:
        return nodes[info.worker_id]

    async with contextlib.AsyncExitStack() as stack:
        for role in (Role.PREFILL, Role.DECODE):
            nodes[role.value] = await stack.enter_async_context(running_node(files, config, role, dial))
        if other is not None:
            third = running_node(files, other, Role.DECODE, dial, "other")
            nodes["other"] = await stack.enter_async_context(third)
        pair = Pair(nodes["prefill"], nodes["decode"], nodes.get("other"))
        await pair.decode.meet(pair.lender)
        for client in (pair, pair.other):
            if client is not None:
                await stack.enter_async_context(background(client.run_router()))
        yield pair
        for node in nodes.values():
            await settle(node)


@contextlib.asynccontextmanager
async def running_node(
    files: ModelFiles, config: Config, role: Role, dial: Dial, name: str = ""
) -> AsyncIterator[WorkerNode]:
    async with contextlib.AsyncExitStack() as stack:
        policy = (prefill_policy if role is Role.PREFILL else decode_policy)(config, files.spec.eos_token_ids)
        node = await open_node(files, config, name or role.value, policy, dial, stack)
        await stack.enter_async_context(background(node.run()))
        yield node


def said(answer: Answer, num_tokens: int) -> list[tuple[int, TokenLogprob]]:
    """Each token and its log-prob; all of the answer that was asked for."""
    logprobs = [p for c in answer.chunks for p in c.logprobs]
    assert len(logprobs) == len(answer.tokens) == num_tokens
    return list(zip(answer.tokens, logprobs, strict=True))


async def said_every_way(
    pair: Pair, prompts: Sequence[Sequence[int]], num_tokens: int, moved_at: int, **sampling: Any
) -> list[list[tuple[int, TokenLogprob]]]:
    """What each prompt is answered, computed anew each time: apart, together, and moved to the third node at token
    `moved_at`. All three must be the same."""
    assert pair.other is not None
    answers = []
    for prompt in prompts:
        apart = said(await pair.generate(prompt, num_tokens, **sampling), num_tokens)
        forget_cache(pair.decode)
        together = said(await pair.generate(prompt, num_tokens, local=True, **sampling), num_tokens)
        forget_cache(pair.decode)
        moved = said(await pair.moved(prompt, num_tokens, pair.other, moved_at, **sampling), num_tokens)
        forget_cache(pair.decode)
        assert apart == together == moved, f"{len(prompt)} prompt tokens"
        answers.append(apart)
    for node in (pair.decode, pair.other.decode):
        assert node.parts.metrics.value("baton_fallbacks_total") == 0
    return answers


def forget_cache(node: WorkerNode) -> None:
    """Empty a node's prefix map, so that the next request computes everything."""
    pool = node.parts.pool
    for block_hash in pool.snapshot().hashes:
        for block in pool.match([block_hash]):
            pool.unpublish(block)


async def settle(node: WorkerNode) -> None:
    """Wait (bounded) until nothing is active, lent or quarantined, then scan the ledger."""
    async with asyncio.timeout(20):
        while (ledger := node.parts.pool.ledger()).active or ledger.lent or ledger.quarantined:
            await asyncio.sleep(0.01)
    node.check_ledger()


@contextlib.asynccontextmanager
async def background(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Run it meanwhile; what it died of is raised at the end."""
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(result, Exception):
            raise result
