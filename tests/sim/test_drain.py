"""Planned moves: nothing is computed twice, nobody fails, and what is lent is waited for."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
from collections.abc import Sequence

import pytest

from baton.core.messages import TokenChunk
from baton.core.request import Choice, Request
from baton.core.worker import Role
from baton.sim.machine import Machine
from baton.sim.oracle import asked_as
from baton.sim.plan import Plan
from tests.sim.scene import Answer, Scene, play, request, right
from tests.sim.scene import plan as quiet

OUTPUT = 20


def roomy(**counts: int) -> Plan:
    """One decode worker can hold every request: who is preempted computes again, and that is not the drain's doing."""
    drawn = quiet(**counts)
    return dataclasses.replace(drawn, terms=dataclasses.replace(drawn.terms, num_blocks=dict.fromkeys(Role, 200)))


def prompts(num: int, seed: int) -> list[Request]:
    """No two share a block, so that every token is computed by somebody."""
    rng = random.Random(seed)
    return [request(f"r{i}", [i, *(rng.randrange(60) for _ in range(rng.randint(9, 25)))], OUTPUT) for i in range(num)]


def computed(s: Scene) -> dict[str, int]:
    """Tokens that went through an engine, by request."""
    found: dict[str, int] = {}
    for sequence, tokens in s.site.num_computed.items():
        found[asked_as(sequence)] = found.get(asked_as(sequence), 0) + tokens
    return found


async def answers(s: Scene, requests: Sequence[Request], meanwhile: asyncio.Task[None]) -> list[Answer]:
    clients = [asyncio.create_task(s.ask(r)) for r in requests]
    await asyncio.wait([*clients, meanwhile])
    meanwhile.result()
    return [c.result() for c in clients]


async def busiest(s: Scene, role: Role, num_requests: int) -> Machine:
    for _ in range(5000):
        for machine in s.of(role):
            if machine.num_requests >= num_requests:
                return machine
        await asyncio.sleep(0.001)
    raise AssertionError(f"no {role} worker ever had {num_requests} requests")


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 10))])
def test_a_decode_worker_that_is_drained_under_load_computes_no_token_twice_and_fails_nobody(seed: int) -> None:
    requests = prompts(12, seed)

    async def story(s: Scene) -> None:
        async def restart() -> None:
            victim = await busiest(s, Role.DECODE, 2)
            aboard.append(victim.num_requests)
            began = s.loop.now
            assert await victim.stop()
            took.append(s.loop.now - began)
            victim.start()

        aboard: list[int] = []
        took: list[float] = []
        got = await answers(s, requests, asyncio.create_task(restart()))
        assert aboard[0] >= 2, "it had work"
        for r, answer in zip(requests, got, strict=True):
            assert answer.error is None
            assert answer.tokens == right(r)
        assert s.router.metrics[-1].value("baton_moves_total", end="moved") >= 2
        assert s.router.metrics[-1].value("baton_dispatch_retries_total", reason="peer_lost") == 0
        assert s.router.metrics[-1].value("baton_worker_lost_total", role="decode") == 0, "it left in order"
        needed = {r.request_id: len(r.prompt) + OUTPUT - 1 for r in requests}
        assert computed(s) == needed, "each token went through an engine once"
        assert took[0] < 2.0, "it left as soon as it was empty"

    play(seed, roomy(num_decode=2), story)


@pytest.mark.parametrize("num_choices", [2, 3])
def test_parallel_answers_move_together_and_their_prompt_is_computed_once(num_choices: int) -> None:
    asked = dataclasses.replace(prompts(1, 7)[0], choices=tuple(Choice(i) for i in range(num_choices)))

    async def story(s: Scene) -> None:
        async def restart() -> None:
            victim = await busiest(s, Role.DECODE, num_choices)
            assert await victim.stop()
            victim.start()

        (answer,) = await answers(s, [asked], asyncio.create_task(restart()))
        assert answer.error is None
        for choice in asked.choices:
            assert answer.choices[choice.index] == right(dataclasses.replace(asked, choices=(choice,)))
        assert s.router.metrics[-1].value("baton_moves_total", end="moved") == 1
        assert computed(s) == {"r0": len(asked.prompt) + num_choices * (OUTPUT - 1)}

    play(3, roomy(num_decode=2), story)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 5))])
def test_a_prefill_worker_leaves_when_nobody_pulls_from_it_any_more(seed: int) -> None:
    """Its readers need nothing again from anybody else."""
    requests = prompts(6, seed)

    async def story(s: Scene) -> None:
        async def restart() -> None:
            victim = await busiest(s, Role.PREFILL, 1)
            assert victim.node is not None
            while not victim.node.load().num_lent_out:
                await asyncio.sleep(0.001)
            assert await victim.stop()
            victim.start()

        got = await answers(s, requests, asyncio.create_task(restart()))
        for r, answer in zip(requests, got, strict=True):
            assert (answer.error, answer.tokens) == (None, right(r))
        refused = s.counter(Role.DECODE, "baton_fallbacks_total", kind="spare_overloaded")
        assert s.counter(Role.DECODE, "baton_fallbacks_total") == refused, "late calls go to the route's spare"
        assert s.counter(Role.DECODE, "baton_integrity_failures_total") == 0
        assert computed(s) == {r.request_id: len(r.prompt) + OUTPUT - 1 for r in requests}

    play(seed, roomy(num_prefill=2, bytes_per_s=2e4), story)


def test_a_client_of_a_moved_request_waits_no_longer_than_a_few_steps() -> None:
    asked = request("r", range(20), 20)

    async def story(s: Scene) -> None:
        came: list[float] = []

        async def read() -> None:
            async for chunk in s.network.ask("client", s.router.name, "generate", request=asked, last_seen=None):
                assert isinstance(chunk, TokenChunk)
                came.append(s.loop.now)

        reading = asyncio.create_task(read())
        victim = await busiest(s, Role.DECODE, 1)
        await asyncio.sleep(0.02)
        assert await victim.stop()
        victim.start()
        await reading
        gaps = [b - a for a, b in itertools.pairwise(came)]
        step_s = s.plan.terms.costs.step_base_s + s.plan.terms.costs.per_token_s
        assert s.router.metrics[-1].value("baton_moves_total", end="moved") == 1
        assert max(gaps) < 10 * step_s, gaps

    play(1, roomy(num_decode=2), story)


def test_an_operator_may_take_a_worker_back() -> None:
    async def story(s: Scene) -> None:
        machine = s.machine(Role.DECODE)
        assert machine.node is not None
        worker = s.network.dial("operator")(machine.node.info)
        status = await worker.drain(True, 1.0)
        assert status.load.draining
        r = request("r", range(20))
        client = asyncio.create_task(s.ask(r))
        await asyncio.sleep(1.0)
        assert machine.num_requests == 0, "nothing new comes"
        await worker.drain(False, 1.0)
        answer = await client
        assert (answer.error, answer.tokens) == (None, right(r))

    play(1, roomy(), story)
