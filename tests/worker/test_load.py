"""What workers say of their load: each router's work exactly once, from the moment it is sent until it has ended."""

from __future__ import annotations

import asyncio

import pytest

from baton.core.messages import Hello, StepMessage
from baton.sim.machine import Machine
from tests.worker.by_hand import PROMPT, Bench, Stream, play, request


class Listening(Stream):
    """Keeps every message."""

    def __init__(self, machine: Machine, bench: Bench, router_id: str) -> None:
        super().__init__(machine, bench.network, Hello(router_id))
        self.messages: list[StepMessage] = []
        self.reading = bench.hand.spawn(self.read(), f"{router_id} listens to {machine.worker_id}")

    def _take(self, message: StepMessage) -> None:
        super()._take(message)
        self.messages.append(message)

    @property
    def taken(self) -> list[int]:
        return [epoch for message in self.messages for epoch in message.taken]

    def counts(self, epoch: int) -> list[int]:
        """Sequences that a router would count here, with each message until the first that knows of none: those in the
        load, and the one it has sent until it is said to be covered."""
        sent, counts = 1, []
        for message in self.messages:
            sent -= epoch in message.taken
            load = message.load
            counts.append(sent + load.num_running + load.num_waiting + load.num_arriving)
        return counts


def test_work_that_was_sent_counts_once_until_it_has_ended_on_both_workers() -> None:
    async def story(bench: Bench) -> None:
        prefill, decode = Listening(bench.prefill[0], bench, "r1"), Listening(bench.decode[0], bench, "r1")
        await asyncio.sleep(0.1)
        prefill.messages.clear()
        decode.messages.clear()
        heard = decode.submit(request("a", PROMPT, max_tokens=20), 7, prefill=bench.prefill[0])
        await heard.ended()
        await asyncio.sleep(2.0)
        assert (prefill.taken, decode.taken) == ([7], [7])
        for stream in (prefill, decode):
            counts = stream.counts(7)
            end = counts.index(0)
            assert end >= 2, f"{stream.info.worker_id} never showed it: {counts}"
            assert counts == [1] * end + [0] * (len(counts) - end)
        assert any(m.load.num_arriving and m.load.context_tokens >= len(PROMPT) for m in decode.messages)

    play(story)


def test_another_router_hears_of_the_load_and_not_of_the_attempt() -> None:
    async def story(bench: Bench) -> None:
        mine, others = Listening(bench.decode[0], bench, "r1"), Listening(bench.prefill[0], bench, "r2")
        await asyncio.sleep(0.1)
        await mine.submit(request("a", PROMPT), 3, prefill=bench.prefill[0]).ended()
        await asyncio.sleep(1.0)
        assert (mine.taken, others.taken) == ([3], [])
        assert any(m.load.queued_prefill_tokens for m in others.messages)

    play(story)


def test_routers_hear_of_each_others_work_while_a_long_step_runs() -> None:
    async def story(bench: Bench) -> None:
        prefill, decode = bench.prefill[0], bench.decode[0]
        mine = {machine.worker_id: Listening(machine, bench, "r1") for machine in (prefill, decode)}
        others = {machine.worker_id: Listening(machine, bench, "r2") for machine in (prefill, decode)}
        await asyncio.sleep(0.1)
        assert prefill.runner is not None
        prefill.runner.slowness = 50.0  # longer than a heartbeat
        heard = mine[decode.worker_id].submit(request("a", PROMPT), 3, prefill=prefill)
        told = {name: len(stream.messages) for name, stream in others.items()}
        await asyncio.sleep(0.1)
        for name, stream in others.items():
            (news,) = stream.messages[told[name] :]
            assert news.load.num_waiting + news.load.num_running + news.load.num_arriving == 1
        prefill.runner.slowness = 1.0
        await heard.ended()

    play(story)


def test_a_prompt_that_first_fetches_its_prefix_is_taken_when_it_waits_to_be_computed() -> None:
    async def story(bench: Bench) -> None:
        holder, decode = bench.decode
        await bench.stream(holder).submit(request("a", PROMPT), 1).ended()
        prefill = Listening(bench.prefill[0], bench, "r1")
        stream = Listening(decode, bench, "r1")
        await asyncio.sleep(0.1)
        await stream.submit(request("b", (*PROMPT[:28], 9, 9, 9)), 2, prefill=bench.prefill[0], holder=holder).ended()
        await asyncio.sleep(1.0)
        assert prefill.taken == [2]
        assert max(m.load.queued_prefill_tokens for m in prefill.messages) <= 3, "what was fetched is no work"

    play(story, num_decode=2)


def test_what_is_refused_is_covered_too() -> None:
    async def story(bench: Bench) -> None:
        stream = Listening(bench.decode[0], bench, "r1")
        node = bench.decode[0].node
        assert node is not None
        await node.drain(True, 1.0)
        await stream.submit(request("a", PROMPT), 5).ended()
        assert stream.taken == [5]
        await node.drain(False, 1.0)

    play(story)


def test_workers_report_the_model_of_their_own_steps() -> None:
    async def story(bench: Bench) -> None:
        stream = Listening(bench.decode[0], bench, "r1")
        for number in range(12):
            prompt = tuple(range(number, number + 20 + number))
            await stream.submit(request(f"a{number}", prompt, max_tokens=10), number).ended()
        model = stream.load.model
        assert model.num_prefill_steps >= 12
        assert model.num_decode_steps >= 80
        costs = bench.decode[0]._terms.costs
        assert model.decode_step_s(1, 30) == pytest.approx(costs.step_base_s + costs.per_token_s, rel=0.1)
        assert model.prefill_s(0, 8, 8) == pytest.approx(costs.step_base_s + 8 * costs.per_token_s, rel=0.1)

    play(story)
