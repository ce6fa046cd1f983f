"""Workers seen from their streams: parallel answers, spares, cached prefixes of any holder, drains.
Every story ends with nothing held anywhere (tests/worker/by_hand.py)."""

from __future__ import annotations

import asyncio

import pytest

from baton.core.handoff import Layers, LendMode, PrefillCall, Published
from baton.core.request import Choice, FinishReason, Request
from baton.models.hash_model import expected
from tests.worker.by_hand import ALIGNED, BLOCK, FANCY, MAX_MODEL_LEN, PLAIN, PROMPT, Bench, check, play, request, terms

pytestmark = pytest.mark.usefixtures("quiet")


# ---- parallel answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [PROMPT, ALIGNED, (1, 2)], ids=["partial tail", "aligned", "less than a block"])
@pytest.mark.parametrize("is_remote", [True, False], ids=["handed over", "local"])
@pytest.mark.parametrize("sampling", [PLAIN, FANCY], ids=["plain", "penalties and log-probs"])
def test_parallel_answers_share_the_prompt(
    prompt: tuple[int, ...], is_remote: bool, sampling: dict[str, object]
) -> None:
    async def story(b: Bench) -> None:
        r = request("r", prompt, n=3, **sampling)
        heard = b.stream(b.decode[0]).submit(r, 1, b.prefill[0] if is_remote else None)
        await heard.ended(3)
        check(r, heard)
        outputs = 3 * 5  # the first token of each came from the prompt's last row
        assert b.computed(b.decode[0]) == outputs + (0 if is_remote else len(prompt)), "the prompt is computed once"
        assert b.computed(b.prefill[0]) == (len(prompt) if is_remote else 0)
        if is_remote:
            assert b.counter(b.prefill[0], "baton_leases_total", end="released") == 1, "one lease for all choices"

    play(story)


def test_parallel_answers_of_a_retry_go_on_where_each_was() -> None:
    async def story(b: Bench) -> None:
        whole = request("r", PROMPT, n=3, **FANCY)
        right = expected(whole, MAX_MODEL_LEN)
        heard_before = zip(right, (0, 2, 4), strict=True)
        choices = tuple(Choice(a.index, tuple(t.token_id for t in a.tokens[:k])) for a, k in heard_before)
        for epoch, prefill in ((1, b.prefill[0]), (2, None)):
            r = Request("r", PROMPT, whole.sampling, choices, deadline_s=60.0)
            heard = b.stream(b.decode[0]).submit(r, epoch, prefill)
            await heard.ended(3)
            check(r, heard)

    play(story)


def test_parallel_answers_end_one_by_one() -> None:
    """A stop token ends one choice, perhaps with its very first token; the others go on."""

    async def story(b: Bench) -> None:
        plain = request("r", PROMPT, n=4, temperature=1.0, seed=3)
        firsts = [a.tokens[0].token_id for a in expected(plain, MAX_MODEL_LEN)]
        r = request("r", PROMPT, n=4, temperature=1.0, seed=3, stop_token_ids=(firsts[1],))
        assert expected(r, MAX_MODEL_LEN)[1].finish is FinishReason.STOP
        for epoch, prefill in ((1, b.prefill[0]), (2, None)):
            heard = b.stream(b.decode[0]).submit(r, epoch, prefill)
            await heard.ended(4)
            check(r, heard)

    play(story)


def test_parallel_answers_without_room_for_copies_compute_the_tail_again() -> None:
    async def story(b: Bench) -> None:
        r = request("r", PROMPT, n=4, max_tokens=2)
        heard = b.stream(b.decode[0]).submit(r, 1)
        await heard.ended(4)
        check(r, heard)

    play(story, world_terms=terms(num_blocks=24))


# ---- spares ----------------------------------------------------------------------------------------------------------


async def until_bound(b: Bench) -> None:
    """The first blocks of a hand-off are on their way."""
    while not any(m.node and m.node.parts.leases.num_live for m in b.prefill):
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)


@pytest.mark.slow
def test_a_lost_prefill_worker_is_replaced_by_a_spare_and_what_came_is_kept() -> None:
    async def story(b: Bench) -> None:
        r = request("r", tuple(range(1, 81)))
        heard = b.stream(b.decode[0]).submit(r, 1, b.prefill[0], spares=[b.prefill[1]])
        while b.counter(b.decode[0], "baton_verified_bytes_total") < 4 * 2 * 2 * BLOCK * 8:
            await asyncio.sleep(0.001)
        b.prefill[0].kill(silent=False)
        await heard.ended()
        check(r, heard)
        assert heard.last is not None
        assert not heard.failed
        assert b.counter(b.decode[0], "baton_fallbacks_total", kind="spare_peer_lost") == 1
        assert b.computed(b.decode[0]) == 5, "nothing of the prompt was computed here"
        published = b.counter(b.prefill[1], "baton_published_blocks_total")
        assert published <= 16, f"{published} of 20 blocks moved again"

    play(story, num_prefill=2)


@pytest.mark.slow
def test_when_every_prefill_worker_is_lost_the_router_chooses_again() -> None:
    async def story(b: Bench) -> None:
        stream, r = b.stream(b.decode[0]), request("r", tuple(range(1, 81)))
        for prefill in b.prefill:
            assert prefill.runner is not None
            prefill.runner.slowness = 5.0
        heard = stream.submit(r, 1, b.prefill[0], spares=[b.prefill[1]])
        boots = [p.node.info.boot_id for p in b.prefill if p.node]
        for prefill in b.prefill:
            while not (prefill.node and prefill.node.parts.leases.num_live):
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.3)
            prefill.kill(silent=False)
        await heard.ended()
        assert heard.failed
        assert heard.last is not None
        assert heard.last.error_code == "retry_route"
        assert list(heard.last.lost_lenders) == boots
        computed = b.computed(b.decode[0])
        again = stream.submit(r, 2)
        await again.ended()
        check(r, again)
        assert b.computed(b.decode[0]) - computed < len(r.prompt) + 5, "what was verified is in the cache"

    play(story, num_prefill=2)


def test_a_request_is_aboard_no_more_crashes_than_it_may() -> None:
    async def story(b: Bench) -> None:
        stream, r = b.stream(b.decode[0]), request("r", PROMPT)
        for prefill in b.prefill:
            assert prefill.runner is not None
            prefill.runner.slowness = 50.0
        heard = stream.submit(r, 1, b.prefill[0], spares=b.prefill[1:])
        for prefill in b.prefill[:2]:
            while not (prefill.node and prefill.node.parts.leases.num_live):
                await asyncio.sleep(0.001)
            prefill.kill(silent=False)
        await heard.ended()
        assert heard.last is not None
        assert heard.last.error_code == "retry_route"
        assert b.prefill[2].node is not None
        assert b.counter(b.prefill[2], "baton_leases_total") == 0, "the third was not called"

    play(story, num_prefill=3)


# ---- any holder lends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["decode", "prefill"])
def test_the_next_turn_pulls_the_answer_from_the_decode_worker_that_made_it(reader: str) -> None:
    async def story(b: Bench) -> None:
        first = request("turn-1", PROMPT, max_tokens=20)
        heard = b.stream(b.decode[0]).submit(first, 1, b.prefill[0])
        await heard.ended()
        chat = PROMPT + tuple(heard.tokens[0]) + tuple(range(50, 56))
        second = request("turn-2", chat)
        in_cache = (len(PROMPT) + 20 - 1) // BLOCK * BLOCK  # the last token of an answer is never computed
        prefill = b.prefill[1] if reader == "prefill" else None
        heard = b.stream(b.decode[1]).submit(second, 2, prefill, holder=b.decode[0])
        await heard.ended()
        check(second, heard)
        computer = b.prefill[1] if reader == "prefill" else b.decode[1]
        prompt_tokens = b.counter(computer, "baton_step_tokens_total", kind="prefill")
        assert prompt_tokens == len(chat) - in_cache, "only what nobody had was computed"

    play(story, num_prefill=2, num_decode=2)


def test_a_reader_of_the_cache_that_stands_still_holds_nothing_beyond_its_lease() -> None:
    async def story(b: Bench) -> None:
        await b.stream(b.decode[0]).submit(request("turn-1", PROMPT), 1).ended()
        node = b.decode[0].node
        assert node is not None
        events = node.prefill(PrefillCall(request("r", PROMPT), 2, "decode-1", 0, 3.0, LendMode.CACHED))
        await anext(events)
        assert node.parts.pool.ledger().lent == len(PROMPT) // BLOCK
        await asyncio.sleep(4.0)  # nobody renews
        assert (node.parts.pool.ledger().lent, node.parts.pool.ledger().active) == (0, 0)
        await events.aclose()  # type: ignore[attr-defined]

    play(story, num_decode=2)


@pytest.mark.slow
def test_a_holder_that_is_gone_costs_only_the_cache() -> None:
    async def story(b: Bench) -> None:
        heard = b.stream(b.decode[0]).submit(request("turn-1", PROMPT), 1)
        await heard.ended()
        info_before = b.decode[0]
        r = request("turn-2", PROMPT + (9, 9))
        stream = b.stream(b.decode[1])
        heard = stream.submit(r, 2, holder=info_before)
        b.decode[0].kill(silent=False)
        await heard.ended()
        check(r, heard)

    play(story, num_decode=2)


# ---- drain -----------------------------------------------------------------------------------------------------------


def test_a_draining_worker_takes_nothing_new_and_finishes_what_it_has() -> None:
    async def story(b: Bench) -> None:
        stream, node = b.stream(b.decode[0]), b.decode[0].node
        assert node is not None
        r = request("r", PROMPT, max_tokens=60)
        heard = stream.submit(r, 1)
        await heard.until(lambda h: len(h.tokens[0]) >= 3)
        await node.drain(True, 1.0)
        await asyncio.sleep(0.05)
        assert stream.load.draining, "said at once, not with the next heartbeat"
        refused = stream.submit(request("late", PROMPT), 2)
        await refused.ended()
        assert refused.last is not None
        assert refused.last.error_code == "overloaded"
        assert not node.is_drained
        await heard.ended()
        check(r, heard)
        await asyncio.sleep(0.1)
        assert node.is_drained
        await node.drain(False, 1.0)
        again = stream.submit(request("again", PROMPT), 3)
        await again.ended()
        assert not again.failed

    play(story)


def test_a_prefill_worker_told_to_stop_waits_until_nothing_it_lends_is_pulled() -> None:
    async def story(b: Bench) -> None:
        r = request("r", tuple(range(1, 81)))
        heard = b.stream(b.decode[0]).submit(r, 1, b.prefill[0])
        await until_bound(b)
        await b.prefill[0].stop()
        await heard.ended()
        check(r, heard)
        assert b.computed(b.decode[0]) == 5
        assert b.counter(b.decode[0], "baton_fallbacks_total") == 0

    play(story, world_terms=terms(bytes_per_s=2e4))


def test_a_worker_whose_engine_stands_still_is_unhealthy_until_it_moves() -> None:
    async def story(b: Bench) -> None:
        machine, stream = b.decode[0], b.stream(b.decode[0])
        assert machine.runner is not None
        assert await b.unhealthy(machine) is None
        machine.runner.slowness = 2e3
        heard = stream.submit(request("r", PROMPT), 1)
        await asyncio.sleep(1.0)
        assert await b.unhealthy(machine) is None, "busy is not stuck"
        await asyncio.sleep(4.0)
        assert "no engine step" in (await b.unhealthy(machine) or "")
        machine.runner.slowness = 1.0
        await heard.ended()
        assert await b.unhealthy(machine) is None

    play(story, world_terms=terms(stall_timeout_s=3))


def test_a_broken_ledger_raises_the_alarm() -> None:
    async def story(b: Bench) -> None:
        node = b.decode[0].node
        assert node is not None
        (stray,) = node.parts.pool.allocate(1) or ()
        await asyncio.sleep(15.0)
        assert "ledger" in (await b.unhealthy(b.decode[0]) or "")
        assert b.counter(b.decode[0], "baton_ledger_broken") == 1
        node.parts.pool.release([stray])

    play(story)


# ---- what is published when ------------------------------------------------------------------------------------------


def test_the_last_chunk_goes_layer_by_layer_and_what_was_cached_goes_before_it() -> None:
    async def story(b: Bench) -> None:
        stream, node = b.stream(b.decode[0]), b.prefill[0].node
        assert node is not None
        long = tuple(range(1, 91))
        await b.stream(b.decode[1]).submit(request("warm", long, max_tokens=1), 1, b.prefill[0]).ended()
        call = PrefillCall(request("r", long), 2, "decode-0", 0, 3.0)
        published = [e async for e in node.prefill(call) if isinstance(e, Published)]
        whole = [e for e in published if e.layers is None]
        assert sum(len(e.blocks) for e in whole) == len(long[:-1]) // BLOCK, "the cached prefix, whole"
        (lower, upper) = [e for e in published if e.layers is not None]
        assert (lower.layers, upper.layers) == (Layers(0, 1), Layers(1, 2))
        assert [x.index for x in lower.blocks] == [x.index for x in upper.blocks] == [22]
        assert [x.digest for x in lower.blocks] != [x.digest for x in upper.blocks]
        assert upper.last
        heard = stream.submit(request("r", long), 3, b.prefill[0])
        await heard.ended()
        check(request("r", long), heard)

    play(story, num_decode=2)
