"""Prefixes on their way against a naive model: the prompts in flight, each compared block by block."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.block_hash import BlockHash, HashScope, block_hashes
from baton.core.errors import PeerLost
from baton.core.messages import Submit, TokenChunk
from baton.core.worker import Role, WorkerLoad
from baton.router.coming import STRIDE, Coming
from tests.router.fake_fleet import (
    BLOCK,
    Act,
    Script,
    ScriptedFleet,
    ScriptedWorker,
    capability,
    mute,
    once,
    refuse,
    request,
    simulate,
    speak,
)

SCOPE = HashScope("f00d", "fp32", "toy")
TOKENS = st.lists(st.integers(0, 1), max_size=24)


def hashes(tokens: list[int]) -> list[BlockHash]:
    return block_hashes(SCOPE, tokens, 2)


def common(a: list[BlockHash], b: list[BlockHash]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(
    st.lists(st.tuples(st.sampled_from(["b0", "b1", "b2"]), st.integers(0, 5), TOKENS, TOKENS), max_size=20),
    st.integers(1, 4),
)
def test_it_answers_like_a_list_of_the_prompts_in_flight(
    steps: list[tuple[str, int, list[int], list[int]]], stride: int
) -> None:
    coming = Coming(stride)
    prompts: dict[int, tuple[str, list[BlockHash]]] = {}
    for boot, key, tokens, asked in steps:
        if prompts.pop(key, None) is None:
            prompts[key] = boot, hashes(tokens)
            coming.expect(boot, key, hashes(tokens))
        else:
            coming.settle(key)
        truth: dict[str, int] = {}
        for where, prompt in prompts.values():
            blocks = common(prompt, hashes(asked)) // stride * stride
            truth[where] = max(truth.get(where, 0), blocks)
        found = coming.match(hashes(asked))
        assert found == {where: n for where, n in truth.items() if n}
        assert list(found.values()) == sorted(found.values(), reverse=True), "most first"
    for key in prompts:
        coming.settle(key)
    assert coming.num_entries == 0


def test_the_end_of_one_prompt_leaves_the_prefix_to_the_others_that_bring_it() -> None:
    coming, prefix = Coming(), hashes([0, 1] * 2 * STRIDE)
    coming.expect("b0", "first", prefix)
    coming.expect("b0", "second", prefix[:STRIDE])
    assert coming.match(prefix) == {"b0": 2 * STRIDE}
    coming.settle("first")
    coming.settle("first")
    assert coming.match(prefix) == {"b0": STRIDE}
    coming.settle("second")
    assert coming.match(prefix) == {}


# ---- in a router -----------------------------------------------------------------------------------------------------

def roomy(worker_id: str, role: Role = Role.DECODE, script: Script = speak) -> ScriptedWorker:
    load = WorkerLoad(available_blocks=5000, total_blocks=5000)
    return ScriptedWorker(worker_id, role, capability(max_model_len=5000, num_blocks=5000), script, load=load)


LONG = tuple(range(20 * BLOCK * STRIDE))
SHARED = block_hashes(HashScope.of(capability()), LONG, BLOCK)


def test_a_prefix_in_flight_counts_where_it_is_computed_until_the_first_token() -> None:
    async def main() -> None:
        decode = roomy("d0", script=mute)
        prefills = [roomy(f"p{i}", Role.PREFILL) for i in range(3)]
        async with ScriptedFleet(decode, *prefills, local_prefill_max_tokens=0) as fleet:
            task = asyncio.create_task(fleet.answer(request("first", LONG, deadline_s=99.0)))
            await asyncio.sleep(0.1)
            computing = decode.submits[0].route.prefill
            assert computing is not None
            assert fleet.fleet.coming.match(SHARED) == {computing.boot_id: 20 * STRIDE}
            assert fleet.fleet.index.match(SHARED) == {}, "nobody can pull it yet"
            load = fleet.fleet.candidates(Role.PREFILL, {})
            behind = asyncio.create_task(fleet.answer(request("behind", (*LONG, 7, 8, 9), deadline_s=99.0)))
            await asyncio.sleep(0.1)
            then = {c.info: c.queued_prefill_tokens for c in fleet.fleet.candidates(Role.PREFILL, {})}
            added = {c.info: then[c.info] - c.queued_prefill_tokens for c in load}
            assert set(added.values()) <= {0, 3, len(LONG) + 3}
            assert (added[computing] == 3) == (decode.submits[1].route.prefill == computing)
            for submit in decode.submits:
                decode.say(TokenChunk(submit.request.request_id, submit.epoch, 0, (1,)))
            await asyncio.sleep(0.1)
            assert fleet.fleet.coming.num_entries == 0
            task.cancel()
            behind.cancel()

    simulate(main, range(4))


@pytest.mark.parametrize("end", ["refused", "lost", "cancelled"])
def test_a_prefix_is_no_longer_on_its_way_when_its_attempt_has_ended(end: str) -> None:
    def ends(submit: Submit) -> Iterator[Act]:
        yield 0.2
        yield from refuse("overloaded")(submit) if end == "refused" else [PeerLost("killed")]

    async def main() -> None:
        worker = roomy("d0", script=once(mute if end == "cancelled" else ends, mute))
        async with ScriptedFleet(worker) as fleet:
            task = asyncio.create_task(fleet.answer(request("r", LONG, deadline_s=99.0)))
            await asyncio.sleep(0.01)
            assert fleet.fleet.coming.match(SHARED) == {worker.info.boot_id: 20 * STRIDE}
            if end == "cancelled":
                task.cancel()
                await asyncio.sleep(0.01)
                assert fleet.fleet.coming.num_entries == 0
            else:
                await asyncio.sleep(5)
                assert len(worker.submits) == 2
                assert fleet.fleet.coming.num_entries == 20, "of the second attempt alone"
                task.cancel()

    simulate(main)


@pytest.mark.parametrize(("stride", "num_computing"), [(STRIDE, 1), (len(LONG), 8)], ids=["", "nothing expected"])
def test_a_burst_of_equal_prefixes_is_computed_by_one_of_many_that_are_equally_busy(
    stride: int, num_computing: int
) -> None:
    """Idle ones would all compute it: nobody would wait less for another."""

    async def main() -> None:
        decode = roomy("d0", script=mute)
        prefills = [roomy(f"p{i}", Role.PREFILL) for i in range(8)]
        for worker in prefills:
            worker.load = replace(worker.load, queued_prefill_tokens=400, num_running=1)
        async with ScriptedFleet(decode, *prefills, local_prefill_max_tokens=0) as fleet:
            fleet.fleet.coming = Coming(stride)
            prompts = [request(f"r{i}", (*LONG, i), deadline_s=99.0) for i in range(8)]
            tasks = [asyncio.create_task(fleet.answer(prompt)) for prompt in prompts]
            await asyncio.sleep(0.1)
            assert len(decode.submits) == len(prompts)
            assert len({s.route.prefill for s in decode.submits}) == num_computing
            for task in tasks:
                task.cancel()

    simulate(main)
