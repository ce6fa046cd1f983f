"""The hand-off against a lender that stands still, leaves out, mislabels, or is left alone (docs/protocol.md)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from baton.core.handoff import HandoffState, PrefillCall, PrefillEvent, Published, ReleaseAnswer
from baton.core.services import WorkerService
from baton.core.worker import Role
from baton.sim.transport import PullFault
from tests.sim.scene import BLOCK, Answer, Proxy, Scene, gone, plan, play, request, right

PROMPT = tuple(range(1, 31))

pytestmark = pytest.mark.usefixtures("quiet")


# ---- a lender that stands still --------------------------------------------------------------------------------------


def test_a_lender_whose_engine_stands_still_is_given_up() -> None:
    """It said Alive for ever, and every request waited for its own deadline."""

    async def story(s: Scene) -> None:
        lender = s.machine(Role.PREFILL)
        assert lender.runner is not None
        lender.runner.slowness = 1e3  # a step takes 10 s at least
        r = request("r", PROMPT, deadline_s=60.0)
        answer = await s.ask(r)
        assert answer.tokens == right(r)
        assert 2.0 < answer.took_s < 4.0, f"{answer.took_s} s for a stall_timeout_s of 2"
        assert s.counter(Role.DECODE, "baton_fallbacks_total", kind="reroute_peer_lost") == 1
        lender.runner.slowness = 1.0
        await asyncio.sleep(60.0)

    play(1, plan(stall_timeout_s=2.0), story)


def test_a_lender_that_is_slow_but_gets_on_is_waited_for() -> None:
    async def story(s: Scene) -> None:
        lender = s.machine(Role.PREFILL)
        assert lender.runner is not None
        lender.runner.slowness = 30.0  # a step takes a second, the prompt four of them
        r = request("r", PROMPT)
        answer = await s.ask(r)
        assert answer.tokens == right(r)
        assert answer.took_s > 2.0
        assert s.counter(Role.DECODE, "baton_fallbacks_total") == 0

    play(1, plan(stall_timeout_s=2.0), story)


# ---- a lender that hands over garbage --------------------------------------------------------------------------------


class LeavesOut(Proxy):
    """Forgets one block of its last publish."""

    async def prefill(self, call: PrefillCall) -> AsyncIterator[PrefillEvent]:
        async for event in self.inner.prefill(call):
            is_last = isinstance(event, Published) and event.last
            yield self.change(call, event) if is_last else event  # type: ignore[arg-type]

    def change(self, call: PrefillCall, event: Published) -> Published:
        return replace(event, blocks=event.blocks[:-1])


class OutOfRange(LeavesOut):
    """Publishes a block behind the reader's table."""

    def change(self, call: PrefillCall, event: Published) -> Published:
        return replace(event, blocks=(*event.blocks[:-1], replace(event.blocks[-1], index=11)))


class OverHeld(LeavesOut):
    """Publishes a block in the place of one that the reader holds, and shares with others."""

    def change(self, call: PrefillCall, event: Published) -> Published:
        if not call.held_blocks:
            return event
        return replace(event, blocks=(*event.blocks, replace(event.blocks[-1], index=0)))


class Twice(LeavesOut):
    """Publishes a block in the place of one that it published before."""

    def change(self, call: PrefillCall, event: Published) -> Published:
        return replace(event, blocks=(*event.blocks, replace(event.blocks[-1], index=event.blocks[0].index - 1)))


class TooFew(LeavesOut):
    """Says that it computed less than the prompt."""

    async def prefill(self, call: PrefillCall) -> AsyncIterator[PrefillEvent]:
        async for event in self.inner.prefill(call):
            short = isinstance(event, HandoffState)
            yield replace(event, num_computed_tokens=event.num_computed_tokens - 1) if short else event  # type: ignore


class OtherTokens(LeavesOut):
    """The state has another first token than the one it sent."""

    async def prefill(self, call: PrefillCall) -> AsyncIterator[PrefillEvent]:
        async for event in self.inner.prefill(call):
            if isinstance(event, HandoffState):
                event = replace(event, choices=(replace(event.choices[0], output=(96,)),))
            yield event


@pytest.mark.parametrize("liar", [LeavesOut, OutOfRange, OverHeld, Twice, TooFew, OtherTokens])
def test_what_a_lender_hands_over_is_used_only_if_it_is_whole(liar: type[LeavesOut]) -> None:
    """Its word for it was taken: a block left out was a block of whatever had been there before."""

    async def story(s: Scene) -> None:
        s.replace(s.machine(Role.PREFILL), liar)
        await asyncio.sleep(3.0)  # the router has a new stream
        for name, prompt in (("a", PROMPT), ("b", (*PROMPT[: 4 * BLOCK], *range(50, 66))), ("c", PROMPT)):
            r = request(name, prompt)
            answer = await s.ask(r)
            assert answer.error is None
            assert answer.tokens == right(r), f"{name} answered wrong tokens"
        assert s.counter(Role.DECODE, "baton_fallbacks_total", kind="reroute_integrity") >= 1

    play(2, plan(), story)


# ---- a client that leaves, an answer that is complete ----------------------------------------------------------------


class LosesFirstRelease(Proxy):
    """The first release never arrives."""

    def __init__(self, inner: WorkerService) -> None:
        super().__init__(inner)
        self.asked = asyncio.Event()

    async def lease(self, lease_id: str, release: bool, timeout_s: float) -> ReleaseAnswer:
        if release and not self.asked.is_set():
            self.asked.set()
            await asyncio.Event().wait()
        return await super().lease(lease_id, release, timeout_s)


def test_a_client_that_leaves_during_the_release_frees_the_lease_at_once() -> None:
    """The lender held the prompt's blocks for a whole lease_ttl_s."""

    async def story(s: Scene) -> None:
        lender = s.machine(Role.PREFILL)
        assert lender.node is not None
        lossy: list[LosesFirstRelease] = []

        def lose(inner: WorkerService) -> WorkerService:
            lossy.append(LosesFirstRelease(inner))
            return lossy[0]

        s.replace(lender, lose)
        await asyncio.sleep(3.0)
        client = asyncio.create_task(s.ask(request("r", PROMPT)))
        await lossy[0].asked.wait()
        pool = lender.node.parts.pool
        assert pool.ledger().lent > 0
        await gone(client)
        await asyncio.sleep(0.2)
        assert pool.ledger().lent == 0
        assert s.counter(Role.PREFILL, "baton_leases_total", end="expired") == 0

    play(1, plan(release_timeout_s=2.0), story)


def test_an_answer_that_is_complete_does_not_wait_for_its_kv() -> None:
    async def story(s: Scene) -> None:
        s.fabric.rules["test"] = lambda reader, lender, order: PullFault.NEVER
        r = request("r", PROMPT, max_tokens=1)
        answer, started = Answer(), s.loop.time()
        await s.ask(r, answer)
        assert answer.tokens == right(r)
        assert answer.token_s is not None
        last_word_s = started + answer.took_s - answer.token_s
        assert last_word_s < 0.1, f"'finished' came {last_word_s} s after the last token"

    play(1, plan(), story)


def test_a_client_that_leaves_in_the_middle_of_a_pull_disturbs_nobody_elses() -> None:
    """Its blocks counted as quarantined beyond the cap, and the healthy lender was fenced at once."""

    async def story(s: Scene) -> None:
        other = request("other", range(40, 70))
        staying = asyncio.create_task(s.ask(other))
        leaving = asyncio.create_task(s.ask(request("leaving", PROMPT)))
        decode = s.machine(Role.DECODE)
        assert decode.node is not None
        while len({m.pull.order.lease_id for m in s.fabric.moving}) < 2:
            await asyncio.sleep(0.001)
        await gone(leaving)
        await asyncio.sleep(0.01)
        assert decode.node.parts.puller.quarantined_blocks(), "the cancelled pull was still on its way"
        answer = await staying
        assert answer.tokens == right(other)
        assert s.counter(Role.DECODE, "baton_fences_total") == 0
        assert s.counter(Role.DECODE, "baton_fallbacks_total") == 0

    play(1, plan(bytes_per_s=3e3, quarantine_cap=0.01, quarantine_poll_s=1.0), story)
