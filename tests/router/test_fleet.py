"""The fleet: worker states as docs/protocol.md has them, discovery that forgets nobody, streams that stall nobody."""

from __future__ import annotations

import asyncio

import pytest

from baton.core.errors import BatonError, PeerLost
from baton.core.layout import PROTOCOL_VERSION
from baton.core.messages import Cancel, Hello, KVEvents, Submit, TokenChunk
from baton.core.worker import Role, Route, WorkerLoad
from baton.router.fleet import FORGET_S
from baton.router.grpc_front import _worker
from baton.router.link import InFlight, UpQueue, Work
from baton.sim.loop import SimLoop, run
from tests.router.fake_fleet import (
    Listener,
    ScriptedFleet,
    ScriptedWorker,
    capability,
    mute,
    request,
    simulate,
)
from tests.router.test_index import h

# ---- states ----------------------------------------------------------------------------------------------------------


def test_a_worker_is_ready_once_its_prefix_map_is_here() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0", held=dict.fromkeys([h(1), h(2)]), seq=4)
        async with ScriptedFleet(worker) as fleet:
            assert fleet.state("d0") == "ready"
            assert fleet.fleet.ready
            assert worker.routers == ["router-0"]
            assert fleet.fleet.index.match([h(1), h(2), h(3)]) == {"d0": 2}

    simulate(main, range(5))


def test_silence_makes_a_worker_suspect_then_dead_and_a_word_revives_it() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0", held={h(1): None})
        async with ScriptedFleet(worker) as fleet:
            worker.frozen = True
            await asyncio.sleep(1.2)
            assert fleet.state("d0") == "ready"
            await asyncio.sleep(0.8)
            assert fleet.state("d0") == "suspect"
            assert not fleet.fleet.ready
            worker.frozen = False
            await asyncio.sleep(0.6)
            assert fleet.state("d0") == "ready"
            worker.frozen = True
            await asyncio.sleep(3.6)
            assert fleet.state("d0") == "dead"
            assert fleet.fleet.index.num_blocks == 0
            assert fleet.metrics.value("baton_worker_lost_total", role="decode") == 1
            worker.frozen = False
            await asyncio.sleep(6.0)
            assert fleet.state("d0") == "ready"
            assert fleet.fleet.index.num_blocks == 1
            assert worker.num_streams == 1

    simulate(main, range(5))


def test_a_worker_that_speaks_but_computes_nothing_gets_no_new_requests_until_it_does() -> None:
    async def main() -> None:
        worker, other = ScriptedWorker("d0", script=mute), ScriptedWorker("d1", script=mute)
        async with ScriptedFleet(worker, other) as fleet:
            await asyncio.sleep(40)
            assert fleet.state("d0") == "ready", "it had nothing to do"
            worker.load, other.load = WorkerLoad(num_waiting=1, steps=7), WorkerLoad(num_running=1, steps=7)
            await asyncio.sleep(28)
            assert fleet.state("d0") == "ready"
            other.load = WorkerLoad(num_running=1, steps=8)
            await asyncio.sleep(4)
            assert [fleet.state(w) for w in ("d0", "d1")] == ["suspect", "ready"]
            assert [c.info.worker_id for c in fleet.fleet.candidates(Role.DECODE, {})] == ["d1"]
            assert worker.num_streams == 1, "its requests are still its own"
            worker.load = WorkerLoad(num_waiting=1, steps=8)
            await asyncio.sleep(1)
            assert fleet.state("d0") == "ready"
            await asyncio.sleep(31)
            assert fleet.state("d0") == "suspect"
            worker.load = WorkerLoad(steps=8)
            await asyncio.sleep(1)
            assert fleet.state("d0") == "ready", "its work was taken away"

    simulate(main, range(2))


def test_a_worker_that_never_answers_stays_connecting() -> None:
    async def main() -> None:
        async with ScriptedFleet(ScriptedWorker("d0", frozen=True), ScriptedWorker("d1", down=True)) as fleet:
            await asyncio.sleep(20)
            assert [fleet.state(w) for w in ("d0", "d1")] == ["connecting", "connecting"]
            assert fleet.metrics.value("baton_worker_lost_total") == 0

    simulate(main, range(2))


def test_a_killed_worker_that_does_not_come_back_is_dead_and_lost_once() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0", held={h(1): None})
        async with ScriptedFleet(worker) as fleet:
            for lost in (1, 2):
                worker.down = True
                worker.break_streams()
                await asyncio.sleep(2)
                assert fleet.state("d0") == "connecting"
                await asyncio.sleep(3)
                assert fleet.state("d0") == "dead"
                assert fleet.metrics.value("baton_workers", role="decode", state="dead") == 1
                assert fleet.fleet.index.num_blocks == 0
                await asyncio.sleep(20)
                assert fleet.metrics.value("baton_worker_lost_total", role="decode") == lost
                worker.down = False
                await asyncio.sleep(2.1)
                assert fleet.state("d0") == "ready"
            worker.break_streams()
            await asyncio.sleep(10)
            assert fleet.state("d0") == "ready"
            assert fleet.metrics.value("baton_worker_lost_total", role="decode") == 2, "it was back in time"

    simulate(main, range(5))


def test_dialling_backs_off_to_two_seconds() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0")
        async with ScriptedFleet(worker) as fleet:
            worker.down = True
            worker.break_streams()
            await asyncio.sleep(60)
            assert fleet.state("d0") == "dead"
            worker.down = False
            await asyncio.sleep(2.1)
            assert fleet.state("d0") == "ready"

    simulate(main, range(2))


# ---- requests on a stream --------------------------------------------------------------------------------------------


def subscribe(fleet: ScriptedFleet, worker_id: str, request_id: str = "r", epoch: int = 1) -> Listener:
    listener = Listener(request_id, epoch)
    fleet.fleet.subscribe(worker_id, listener.subscription)
    fleet.fleet.send(worker_id, Submit(request(request_id), Route(worker_id, None), epoch))
    return listener


@pytest.mark.parametrize("loss", ["broken", "dead", "rebooted"])
def test_a_lost_worker_fails_its_requests_after_what_it_still_said(loss: str) -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0", script=mute)
        async with ScriptedFleet(worker, ScriptedWorker("d1", script=mute)) as fleet:
            chunks, other = subscribe(fleet, "d0"), subscribe(fleet, "d1")
            await asyncio.sleep(0.01)
            worker.say(TokenChunk("r", 1, 0, (7,)))
            await asyncio.sleep(0.01)
            match loss:
                case "broken":
                    worker.die()
                case "dead":
                    worker.frozen = True
                case "rebooted":
                    worker.boot_id = "boot-2"
            assert (await chunks.next()).token_ids == (7,)
            async with asyncio.timeout(5):
                with pytest.raises(PeerLost, match="d0"):
                    await chunks.next()
            fleet.workers["d1"].say(TokenChunk("r", 1, 0, (8,)))
            assert (await other.next()).token_ids == (8,)

    simulate(main, range(5))


def test_what_an_older_attempt_or_nobody_s_request_says_is_dropped_and_counted() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0", script=mute)
        async with ScriptedFleet(worker) as fleet:
            chunks = subscribe(fleet, "d0", epoch=2)
            worker.say(TokenChunk("r", 1, 0, (1,)), TokenChunk("s", 1, 0, (2,)), TokenChunk("r", 2, 0, (3,)))
            assert (await chunks.next()).token_ids == (3,)
            assert fleet.metrics.value("baton_stale_chunks_total", reason="epoch") == 1
            assert fleet.metrics.value("baton_stale_chunks_total", reason="unknown") == 1

    simulate(main, range(5))


def test_a_submit_without_a_stream_is_refused_at_once() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0")
        async with ScriptedFleet(worker) as fleet:
            worker.down = True
            worker.break_streams()
            await asyncio.sleep(0.01)
            with pytest.raises(PeerLost):
                fleet.fleet.send("d0", Submit(request(), Route("d0", None), 1))
            for worker_id in ("d0", "d9"):
                with pytest.raises(PeerLost):
                    fleet.fleet.subscribe(worker_id, Listener("r", 1).subscription)
            fleet.fleet.send("d0", Cancel("r", 1))

    simulate(main, range(5))


def drain(queue: UpQueue) -> list[object]:
    async def main(loop: SimLoop) -> list[object]:
        found: list[object] = []
        while True:
            try:
                async with asyncio.timeout(1):
                    found.append(await anext(queue))
            except TimeoutError:
                return found

    return run(1, main)


def test_cancels_never_queue_behind_submits() -> None:
    queue = UpQueue(Hello("router-0"))
    submits = [Submit(request(f"r{i}"), Route("d0", None), 1) for i in range(3)]
    for submit in submits:
        queue.put(submit)
    queue.put(Cancel("old", 1))
    assert drain(queue) == [Hello("router-0"), Cancel("old", 1), *submits]


def test_a_cancel_takes_its_own_unsent_submit_along() -> None:
    queue = UpQueue(Hello("router-0"))
    queue.put(Submit(request("a"), Route("d0", None), 1))
    queue.put(Submit(request("a"), Route("d0", None), 2))
    queue.put(Cancel("a", 1))
    assert drain(queue) == [Hello("router-0"), Submit(request("a"), Route("d0", None), 2)]


def test_a_closed_stream_s_queue_ends() -> None:
    async def main() -> None:
        queue = UpQueue(Hello("router-0"))
        reader = asyncio.create_task(_collect(queue))
        await asyncio.sleep(0.01)
        queue.close()
        assert await reader == [Hello("router-0")]

    simulate(main, range(5))


async def _collect(queue: UpQueue) -> list[object]:
    return [message async for message in queue]


# ---- the index -------------------------------------------------------------------------------------------------------


def test_kv_events_reach_the_index_and_a_gap_brings_a_new_snapshot() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0")
        async with ScriptedFleet(worker) as fleet:
            worker.store(h(1))
            await asyncio.sleep(0.01)
            assert fleet.fleet.index.match([h(1)]) == {"d0": 1}
            worker.store(h(2), skip=1)
            await asyncio.sleep(0.3)
            assert fleet.state("d0") == "ready"
            assert fleet.fleet.index.match([h(1), h(2)]) == {"d0": 2}
            assert fleet.metrics.value("baton_index_resyncs_total") == 1
            assert worker.num_streams == 1

    simulate(main, range(5))


def test_events_between_hello_and_snapshot_are_neither_lost_nor_doubled() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0", held={h(1): None}, seq=3)
        async with ScriptedFleet(worker) as fleet:
            worker.say(kv_events=(KVEvents(3, removed=(h(1),)), KVEvents(4, stored=(h(2),))))
            await asyncio.sleep(0.01)
            assert fleet.fleet.index.match([h(1), h(2)]) == {"d0": 2}

    simulate(main, range(5))


# ---- discovery -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["fails", "is empty"])
def test_a_registry_in_trouble_removes_nobody(trouble: str) -> None:
    async def main() -> None:
        async with ScriptedFleet(ScriptedWorker("d0")) as fleet:
            fleet.registry_empty = trouble == "is empty"
            fleet.registry_fails = ConnectionRefusedError() if trouble == "fails" else None
            await asyncio.sleep(10 * FORGET_S)
            assert fleet.state("d0") == "ready"
            fleet.registry_empty, fleet.registry_fails = False, None
            fleet.workers["d1"] = ScriptedWorker("d1")
            await asyncio.sleep(1)
            assert fleet.state("d1") == "ready"

    simulate(main)


def test_a_new_boot_replaces_the_old_one_and_the_old_one_never_comes_back() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0", boot_id="boot-1", held={h(1): None})
        async with ScriptedFleet(worker) as fleet:
            old = worker.info
            worker.boot_id, worker.held, worker.seq = "boot-2", {h(2): None}, 0
            worker.break_streams()
            await asyncio.sleep(1.5)
            assert fleet.state("d0") == "ready"
            assert fleet.fleet.index.match([h(1)]) == {}
            assert fleet.fleet.index.match([h(2)]) == {"d0": 1}
            assert fleet.metrics.value("baton_worker_lost_total", role="decode") == 1
            fleet.unlisted, fleet.also_listed = {"d0"}, (old,)
            await asyncio.sleep(2)
            assert [w.info.boot_id for w in fleet.fleet.workers()] == ["boot-2"]

    simulate(main, range(5))


def test_another_boot_at_the_same_address_is_not_taken_for_the_known_one() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0", boot_id="boot-1", held={h(1): None})
        async with ScriptedFleet(worker) as fleet:
            fleet.registry_fails = ConnectionRefusedError()
            worker.boot_id = "boot-2"
            worker.break_streams()
            await asyncio.sleep(5)
            assert fleet.state("d0") == "dead", "what the known one's stream brings is another's word"
            fleet.registry_fails = None
            await asyncio.sleep(1)
            assert fleet.state("d0") == "ready"

    simulate(main, range(2))


def test_a_worker_that_hashes_differently_is_looked_up_in_its_own_way() -> None:
    async def main() -> None:
        async with ScriptedFleet(ScriptedWorker("d0"), ScriptedWorker("d1")) as fleet:
            assert len(fleet.fleet.scopes()) == 1
            fleet.workers["d2"] = ScriptedWorker("d2", capability=capability(numerics="bf16"))
            await asyncio.sleep(1)
            assert len(fleet.fleet.scopes()) == 2

    simulate(main)


def test_a_worker_that_is_gone_and_no_longer_listed_is_forgotten_in_the_end() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0", held={h(1): None})
        async with ScriptedFleet(worker, ScriptedWorker("d1")) as fleet:
            fleet.unlisted = {"d0"}
            await asyncio.sleep(2 * FORGET_S)
            assert fleet.state("d0") == "ready", "its stream lives, whatever the registry says"
            fleet.unlisted = set()
            worker.down = True
            worker.break_streams()
            await asyncio.sleep(2 * FORGET_S)
            assert fleet.state("d0") == "dead", "it is listed, so it may come back"
            fleet.unlisted = {"d0"}
            await asyncio.sleep(1)
            assert fleet.state("d0") == "unknown"
            assert fleet.fleet.index.num_blocks == 0

    simulate(main)


def test_pairs_that_do_not_fit_are_named_with_the_field_that_differs() -> None:
    async def main() -> None:
        odd = ScriptedWorker("p1", Role.PREFILL, capability(numerics="bf16"))
        async with ScriptedFleet(ScriptedWorker("p0", Role.PREFILL), odd, ScriptedWorker("d0")) as fleet:
            views = {w.info.worker_id: w for w in fleet.fleet.workers()}
            assert views["p0"].refused == (("p1", "numerics: torch-fp32 vs bf16"),)
            assert views["p1"].refused == (
                ("d0", "numerics: bf16 vs torch-fp32"),
                ("p0", "numerics: torch-fp32 vs bf16"),
            ), "any two workers may lend to each other"
            assert views["d0"].refused == (("p1", "numerics: bf16 vs torch-fp32"),)
            told = _worker(views["d0"]).kept_apart
            assert [(k.peer, k.difference) for k in told] == [("p1", "numerics: bf16 vs torch-fp32")]
            assert fleet.fleet.fits(views["p0"].info, views["d0"].info)
            assert not fleet.fleet.fits(views["p1"].info, views["d0"].info)

    simulate(main)


def test_a_worker_that_does_not_speak_the_router_s_protocol_is_asked_nothing_and_shown_with_the_versions() -> None:
    async def main() -> None:
        older = ScriptedWorker("d0", capability=capability(protocol_versions=(1,)))
        both = ScriptedWorker("d1", capability=capability(protocol_versions=(PROTOCOL_VERSION, PROTOCOL_VERSION + 1)))
        async with ScriptedFleet(older, both) as fleet:
            assert [c.info.worker_id for c in fleet.fleet.candidates(Role.DECODE, {})] == ["d1"]
            views = {w.info.worker_id: w.refused for w in fleet.fleet.workers()}
            mine = f"protocol_versions: [1] vs [{PROTOCOL_VERSION}]"
            assert ("router-0", mine) in views["d0"]
            assert [peer for peer, _ in views["d1"]] == ["d0"]
            both.break_streams()
            await asyncio.sleep(0.01)
            assert (fleet.state("d0"), fleet.fleet.ready) == ("ready", False)

    simulate(main)


# ---- work in flight --------------------------------------------------------------------------------------------------


def test_dispatched_work_counts_until_the_worker_says_that_it_covers_it() -> None:
    sent = InFlight()
    sent.add(1, Work(100, 5050))
    sent.add(2, Work(context_tokens=70))
    assert (sent.queued_prefill_tokens, sent.queued_prefill_pairs, sent.context_tokens) == (100, 5050, 70)
    assert sent.num_sequences == 2
    sent.settle(1)
    sent.settle(1)
    assert (sent.queued_prefill_tokens, sent.queued_prefill_pairs, sent.context_tokens) == (0, 0, 70)
    assert sent.num_sequences == 1


def test_candidates_are_the_ready_ones_with_their_load_and_what_was_sent_since() -> None:
    async def main() -> None:
        load = WorkerLoad(queued_prefill_tokens=10, num_running=1, num_waiting=2)
        there = ScriptedWorker("d0", load=load, pairs=(("p0", "shm", 5e9),))
        async with ScriptedFleet(there, ScriptedWorker("d1", down=True)) as fleet:
            fleet.fleet.charge("d0", 1, Work(40, 820, 60))
            (found,) = fleet.fleet.candidates(Role.DECODE, {"d0": 3})
            assert (found.queued_prefill_tokens, found.num_sequences, found.held_blocks) == (50, 4, 3)
            await asyncio.sleep(0.6)
            (found,) = fleet.fleet.candidates(Role.DECODE, {})
            assert found.bandwidth == {"p0": 5e9}
            assert (found.queued_prefill_tokens, found.num_sequences) == (50, 4), "a heartbeat came, it says nothing"
            assert (found.queued_prefill_pairs, found.context_tokens) == (820, 60)
            assert found.age_s == pytest.approx(0.3)
            fleet.workers["d0"].say(taken=(1,))
            await asyncio.sleep(0.01)
            (found,) = fleet.fleet.candidates(Role.DECODE, {})
            assert found.bandwidth == {"p0": 5e9}, "a step that says nothing of it changes nothing"
            assert (found.queued_prefill_tokens, found.num_sequences) == (10, 3), "now it is covered"

    simulate(main)


def test_gauges_show_workers_by_state_and_the_index() -> None:
    async def main() -> None:
        async with ScriptedFleet(ScriptedWorker("d0", held={h(1): None}), ScriptedWorker("d1", down=True)) as fleet:
            await asyncio.sleep(0.5)
            assert fleet.metrics.value("baton_workers", role="decode", state="ready") == 1
            assert fleet.metrics.value("baton_workers", role="decode", state="connecting") == 1
            assert fleet.metrics.value("baton_index_blocks") == 1

    simulate(main)


def test_an_end_of_the_fleet_fails_what_is_waiting() -> None:
    async def main() -> None:
        fleet = ScriptedFleet(ScriptedWorker("d0", script=mute))
        async with fleet:
            chunks = subscribe(fleet, "d0")
        with pytest.raises(BatonError, match="router goes away"):
            await chunks.next()

    simulate(main, range(5))
