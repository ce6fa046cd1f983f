"""kill -9 of a router under streaming load, on a stack of real processes: its clients read on at the other one, and
what they have in the end is what an undisturbed stream says, to the byte."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.chaos.plan import Plan
from baton.chaos.stack import Stack, open_stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
NUM_CLIENTS, NUM_TOKENS = 8, 200
PATIENCE_S = 120.0


def body(number: int) -> dict[str, Any]:
    return {"model": "chaos", "prompt": f"Client {number} says: " * 6, "max_tokens": NUM_TOKENS, "seed": number,
            "ignore_eos": True, "stream": True, "n": 1 + number % 2}  # fmt: skip


class Reader:
    """One client: what it has of each choice, and where it is."""

    def __init__(self, number: int) -> None:
        self.body = body(number)
        self.texts: dict[int, str] = {}
        self.finishes: dict[int, str] = {}
        self.last_id = ""
        self.done = False
        self.begun = asyncio.Event()

    async def read(self, client: httpx.AsyncClient, url: str) -> None:
        """To the end, or until the connection is gone."""
        headers = {"last-event-id": self.last_id} if self.last_id else {}
        stream = client.stream("POST", f"{url}/v1/completions", json=self.body, headers=headers, timeout=PATIENCE_S)
        async with stream as reply:
            assert reply.status_code == 200, await reply.aread()
            event_id = self.last_id
            async for line in reply.aiter_lines():
                if line.startswith("id: "):
                    event_id = line[4:]
                elif line.startswith("data: {"):
                    self._take(json.loads(line[6:]))
                    self.last_id = event_id
                self.done |= line == "data: [DONE]"

    def _take(self, event: dict[str, Any]) -> None:
        assert "error" not in event, event
        for choice in event["choices"]:
            index = choice["index"]
            assert index not in self.finishes, f"choice {index} goes on after its end"
            self.texts[index] = self.texts.get(index, "") + choice["text"]
            if choice["finish_reason"]:
                self.finishes[index] = choice["finish_reason"]
        self.begun.set()

    @property
    def answer(self) -> tuple[dict[int, str], dict[int, str], bool]:
        return self.texts, self.finishes, self.done


async def undisturbed(client: httpx.AsyncClient, url: str) -> list[Reader]:
    readers = [Reader(i) for i in range(NUM_CLIENTS)]
    await asyncio.gather(*(reader.read(client, url) for reader in readers))
    return readers


async def through_a_kill(client: httpx.AsyncClient, stack: Stack) -> tuple[list[Reader], int]:
    """All of them begin at the first router, and end at the second. Also: how many the kill cut off."""
    first, second = (stack.endpoints[name].http for name in stack.plan.routers)
    readers = [Reader(i) for i in range(NUM_CLIENTS)]
    reading = [asyncio.create_task(reader.read(client, first)) for reader in readers]
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(reader.begun.wait() for reader in readers))
    stack.kept[stack.plan.routers[0]].signal(signal.SIGKILL)
    await asyncio.gather(*reading, return_exceptions=True)
    cut_off = [reader for reader in readers if not reader.done]
    await asyncio.gather(*(reader.read(client, second) for reader in cut_off))
    return readers, len(cut_off)


async def resumed_at(client: httpx.AsyncClient, url: str) -> float:
    text = (await client.get(f"{url}/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith('baton_resumed_requests_total{lost="router"}')]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_clients_of_a_killed_router_read_on_at_the_other_one(tmp_path: Path) -> None:
    plan = Plan(1, 0.0, model="hash:step_s=0.03", num_prefill=1, num_decode=2, use_namespaces=False)

    async def run() -> None:
        async with open_stack(plan, tmp_path) as stack, httpx.AsyncClient() as client:
            second = stack.endpoints[plan.routers[1]].http
            readers, num_cut_off = await through_a_kill(client, stack)
            assert num_cut_off == NUM_CLIENTS, "the kill must land in the middle of all streams"
            assert await resumed_at(client, second) == NUM_CLIENTS, "and all of them went on where they ran"
            for reader, right in zip(readers, await undisturbed(client, second), strict=True):
                assert reader.answer == right.answer
                assert set(reader.finishes.values()) == {"length"}

    asyncio.run(run())
