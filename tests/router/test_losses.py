"""What follows a loss: which workers crashed, what is retried and when, what is not sent to a third worker."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from baton.core.errors import DeadlineExceeded, PeerLost, RequestQuarantined, RetryRoute
from baton.core.messages import Submit, TokenChunk
from baton.core.metrics import Metrics
from baton.core.request import FinishReason
from baton.core.worker import Role
from baton.router import quarantine
from baton.router.budget import CAP, RetryBudget
from baton.router.fleet import MAX_CRASHES
from baton.router.link import RESUME_S
from baton.router.quarantine import Quarantine
from tests.router.fake_fleet import (
    Act,
    Script,
    ScriptedFleet,
    ScriptedWorker,
    break_after,
    expected,
    mute,
    now,
    once,
    refuse,
    request,
    simulate,
    speak,
)

# ---- what is a crash -------------------------------------------------------------------------------------------------


def verdict(fleet: ScriptedFleet, boot_id: str, since: float = 0.0) -> bool | None:
    return fleet.fleet.crashed(boot_id, since)


def test_a_stream_that_breaks_and_an_address_that_refuses_is_a_crash() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0")
        async with ScriptedFleet(worker) as fleet:
            broken_at = now()
            worker.break_streams()
            worker.down = True
            await asyncio.sleep(0.01)
            assert verdict(fleet, "d0-boot", broken_at) is None, "nobody has knocked again"
            await asyncio.sleep(0.2)
            assert verdict(fleet, "d0-boot", broken_at) is True
            worker.down, worker.boot_id = False, "d0-boot-2"
            await asyncio.sleep(3)
            assert fleet.state("d0") == "ready"
            assert verdict(fleet, "d0-boot", broken_at) is True, "it stays one"
            assert verdict(fleet, "d0-boot-2", broken_at) is False

    simulate(main, range(3))


def test_another_boot_at_the_address_or_in_the_registry_proves_a_crash() -> None:
    async def main() -> None:
        for registry_knows in (True, False):
            worker = ScriptedWorker("d0", boot_id="boot-1")
            async with ScriptedFleet(worker) as fleet:
                if not registry_knows:
                    fleet.registry_fails = ConnectionRefusedError()
                worker.boot_id = "boot-2"
                worker.break_streams()
                await asyncio.sleep(1.0)
                assert verdict(fleet, "boot-1") is True

    simulate(main, range(3))


def test_a_boot_that_answers_again_did_not_crash() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0")
        async with ScriptedFleet(worker) as fleet:
            broken_at = now()
            worker.break_streams()
            await asyncio.sleep(0.3)
            assert fleet.state("d0") == "ready"
            assert verdict(fleet, "d0-boot", broken_at) is False
            assert verdict(fleet, "d0-boot", now() + 1) is None, "what comes later is not known yet"

    simulate(main, range(3))


@pytest.mark.parametrize("how", ["frozen", "cut off", "ended in order", "forgotten"])
def test_silence_an_orderly_end_and_what_was_never_known_are_no_crashes(how: str) -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0")
        async with ScriptedFleet(worker, ScriptedWorker("d1")) as fleet:
            began = now()
            if how == "frozen":
                worker.frozen = True
            elif how == "cut off":
                worker.frozen = True
                await asyncio.sleep(2.0)
                worker.boot_id = "d0-boot-2"
            elif how == "ended in order":
                worker.end_streams()
                worker.down = True
            else:
                assert verdict(fleet, "nobody's boot") is False
            await asyncio.sleep(6)
            assert verdict(fleet, "d0-boot", began) is False

    simulate(main, range(3))


def test_only_the_last_crashes_are_remembered() -> None:
    async def main() -> None:
        async with ScriptedFleet(ScriptedWorker("d0")) as fleet:
            for i in range(MAX_CRASHES + 10):
                fleet.fleet._note_crash(f"boot-{i}")
            assert verdict(fleet, "boot-9") is False
            assert verdict(fleet, "boot-10") is True

    simulate(main)


# ---- poison ----------------------------------------------------------------------------------------------------------


def crashing(workers: dict[str, ScriptedWorker], poison: str = "poison") -> Script:
    """A worker that dies under a request of that name, and of its prompt."""

    def script(submit: Submit) -> Iterator[Act]:
        if submit.request.request_id.startswith(poison):
            yield 0.02
            workers[submit.route.decode].die()
            return
        yield from speak(submit)

    return script


def fleet_of_crashing(count: int, **router: object) -> ScriptedFleet:
    workers: dict[str, ScriptedWorker] = {}
    for i in range(count):
        workers[f"d{i}"] = ScriptedWorker(f"d{i}", script=crashing(workers))
    return ScriptedFleet(*workers.values(), **router)


def test_poison_crashes_two_workers_of_eight_and_is_then_refused() -> None:
    async def main() -> None:
        async with fleet_of_crashing(8) as fleet:
            poison = request("poison", prompt=(6, 6, 6))
            with pytest.raises(RequestQuarantined, match="aboard 2 workers that crashed"):
                await fleet.answer(poison)
            assert sum(w.down for w in fleet.workers.values()) == 2
            for again in ("poison-2", "harmless"):
                with pytest.raises(RequestQuarantined, match="is refused"):
                    await fleet.answer(request(again, prompt=(6, 6, 6)))
            assert sum(w.down for w in fleet.workers.values()) == 2
            for other in (request("a", prompt=(6, 6)), request("b", prompt=(6, 6, 6), tenant="acme"),
                          request("c", prompt=(6, 6, 6), max_tokens=3)):
                assert await fleet.answer(other) == expected(other), "another prompt, tenant or sampling"
            assert fleet.metrics.value("baton_quarantined_requests_total", reason="crashes") == 1
            assert fleet.metrics.value("baton_quarantined_requests_total", reason="fingerprint") == 2
            await asyncio.sleep(601)
            harmless = request("harmless", prompt=(6, 6, 6))
            assert await fleet.answer(harmless) == expected(harmless), "router.quarantine_s is over"

    simulate(main, range(3))


def test_copies_of_a_poison_under_way_do_not_crash_further_workers() -> None:
    """Each copy may be aboard two crashes; once one of them is found out, the others are held back."""

    async def main() -> None:
        async with fleet_of_crashing(8) as fleet:
            copies = [asyncio.create_task(fleet.answer(request(f"poison-{i}", prompt=(6, 6, 6)))) for i in range(2)]
            for copy in copies:
                with pytest.raises(RequestQuarantined):
                    await copy
            assert sum(w.down for w in fleet.workers.values()) <= 4

    simulate(main, range(3))


def test_two_broken_streams_whose_workers_answer_again_are_no_crashes() -> None:
    async def main() -> None:
        script = once(break_after(1), once(break_after(1), once(break_after(1))))
        workers = [ScriptedWorker(f"d{i}", script=script) for i in range(4)]
        async with ScriptedFleet(*workers) as fleet:
            assert await fleet.answer(request()) == expected(request())
            assert sum(len(w.submits) for w in workers) == 4
            assert fleet.metrics.value("baton_quarantined_requests_total") == 0

    simulate(main, range(3))


def test_the_third_attempt_waits_until_it_is_known_whether_two_have_crashed() -> None:
    def cut_off(submit: Submit) -> Iterator[Act]:
        """The stream breaks, and nobody answers any more: a crash, a cut link, who knows."""
        workers[submit.route.decode].unreachable = True
        yield PeerLost("reset")

    async def main() -> None:
        async with ScriptedFleet(*workers.values()) as fleet:
            began = now()
            assert await fleet.answer(request()) == expected(request())
            assert now() - began == pytest.approx(RESUME_S + 3.0, abs=0.3), "router.dead_s, and then it goes on"
            sent = sorted((s for w in workers.values() for s in w.submits), key=lambda s: s.epoch)
            assert [s.crashes_left for s in sent] == [2, 1, 2], "they fell silent: no crashes after all"

    script = once(cut_off, once(cut_off))
    workers = {f"d{i}": ScriptedWorker(f"d{i}", script=script) for i in range(3)}
    simulate(main)


def lost_lenders(*boots: str) -> Script:
    def script(submit: Submit) -> Iterator[Act]:
        yield TokenChunk("r", submit.epoch, 0, (), FinishReason.ERROR, error_code=RetryRoute.code,
                         error_message="every prefill worker of the route failed", lost_lenders=boots)

    return script


def test_two_prefill_workers_that_crash_under_a_request_count_as_well() -> None:
    async def main() -> None:
        prefills = [ScriptedWorker(f"p{i}", Role.PREFILL) for i in range(4)]

        def die(submit: Submit) -> Iterator[Act]:
            for worker in prefills[:2]:
                worker.die()
            yield from lost_lenders("p0-boot", "p1-boot")(submit)

        decode = ScriptedWorker("d0", script=once(die))
        async with ScriptedFleet(decode, *prefills, local_prefill_max_tokens=4) as fleet:
            with pytest.raises(RequestQuarantined, match=r"\(p0-boot, p1-boot\)"):
                await fleet.answer(request(prompt=range(20)))
            assert len(decode.submits) == 1

    simulate(main, range(3))


@pytest.mark.parametrize("num_dead", [1, 2])
def test_a_spare_that_crashed_behind_a_decode_worker_that_fell_silent_counts_as_well(num_dead: int) -> None:
    """Nobody is left to say that it was called (our own: world 492)."""

    async def main() -> None:
        prefills = {f"p{i}": ScriptedWorker(f"p{i}", Role.PREFILL) for i in range(3)}
        decodes = [ScriptedWorker(f"d{i}") for i in range(2)]

        def die_and_freeze(submit: Submit) -> Iterator[Act]:
            assert submit.route.prefill is not None
            for lender in (submit.route.prefill, *submit.route.spares)[:num_dead]:
                prefills[lender.worker_id].die()
            next(d for d in decodes if d.worker_id == submit.route.decode).frozen = True
            yield 60.0

        for decode in decodes:
            decode.script = once(die_and_freeze)
        decodes[1].script = decodes[0].script  # only the first of both
        async with ScriptedFleet(*decodes, *prefills.values(), local_prefill_max_tokens=4) as fleet:
            r = request(prompt=range(20))
            if num_dead == 1:
                assert await fleet.answer(r) == expected(r)
            else:
                with pytest.raises(RequestQuarantined, match="was aboard 2 workers that crashed"):
                    await fleet.answer(r)

    simulate(main, range(3))


def test_lenders_whose_link_to_the_decode_worker_alone_was_cut_are_no_crashes() -> None:
    async def main() -> None:
        prefills = [ScriptedWorker(f"p{i}", Role.PREFILL) for i in range(4)]
        decode = ScriptedWorker("d0", script=once(lost_lenders("p0-boot", "p1-boot")))
        async with ScriptedFleet(decode, *prefills, local_prefill_max_tokens=4) as fleet:
            began = now()
            r = request(prompt=range(20))
            assert await fleet.answer(r) == expected(r)
            assert now() - began < 1.0, "both heartbeats have come in between"

    simulate(main, range(3))


def test_the_quarantine_is_bounded() -> None:
    async def main() -> None:
        held = Quarantine(600.0, Metrics())
        for i in range(quarantine.CAPACITY + 3):
            held.enter(request(f"r{i}", prompt=(i,)), ["a", "b"])
        assert len(held) == quarantine.CAPACITY
        held.refuse(request("first", prompt=(2,)))
        with pytest.raises(RequestQuarantined):
            held.refuse(request("kept", prompt=(3,)))

    simulate(main)


# ---- the route is chosen again ---------------------------------------------------------------------------------------


def test_lenders_that_failed_are_avoided_and_the_decode_worker_that_verified_their_blocks_is_not() -> None:
    async def main() -> None:
        prefills = [ScriptedWorker(f"p{i}", Role.PREFILL) for i in range(4)]
        decode = ScriptedWorker("d0", script=once(lost_lenders()))
        async with ScriptedFleet(decode, *prefills, local_prefill_max_tokens=4) as fleet:
            r = request(prompt=range(20))
            assert await fleet.answer(r) == expected(r)
            first, second = decode.submits
            assert first.route.prefill is not None
            assert second.route.prefill is not None
            failed = {w.worker_id for w in (first.route.prefill, *first.route.spares)}
            assert len(failed) == 3
            assert second.route.prefill.worker_id not in failed
            assert second.route.spares == ()

    simulate(main, range(3))


def test_when_every_prefill_worker_has_failed_the_route_is_local() -> None:
    async def main() -> None:
        prefills = [ScriptedWorker(f"p{i}", Role.PREFILL) for i in range(3)]
        decode = ScriptedWorker("d0", script=once(lost_lenders()))
        async with ScriptedFleet(decode, *prefills, local_prefill_max_tokens=0) as fleet:
            r = request(prompt=range(20))
            assert await fleet.answer(r) == expected(r)
            assert decode.submits[1].route.prefill is None

    simulate(main)


# ---- the budget ------------------------------------------------------------------------------------------------------


def test_retries_beyond_what_was_saved_up_come_at_the_budget_s_pace() -> None:
    async def main() -> None:
        budget, metrics = RetryBudget(0.5, 10.0, counted := Metrics()), counted
        began = now()

        async def take() -> float:
            assert await budget.take(began + 600)
            return now() - began

        taken = sorted(await asyncio.gather(*(take() for _ in range(int(CAP) + 5))))
        assert taken == pytest.approx([0.0] * int(CAP) + [0.1, 0.2, 0.3, 0.4, 0.5])
        assert metrics.value("baton_retry_waits_total") == 5
        for _ in range(4):
            budget.admitted()
        assert await budget.take(now() + 0.001)
        assert await budget.take(now() + 0.001), "four admitted requests bring two"
        started = now()
        assert not await budget.take(now() + 0.05)
        assert now() - started == pytest.approx(0.05), "it waits as long as it may"

    simulate(main)


def test_who_leaves_the_budget_s_line_gives_his_turn_back() -> None:
    async def main() -> None:
        budget = RetryBudget(0.0, 1.0, Metrics())
        for _ in range(int(CAP)):
            assert await budget.take(now())
        waiting = asyncio.create_task(budget.take(now() + 60))
        await asyncio.sleep(0.5)
        waiting.cancel()
        await asyncio.wait([waiting])
        started = now()
        assert await budget.take(now() + 60)
        assert now() - started == pytest.approx(0.5)

    simulate(main)


def test_a_fleet_that_loses_every_attempt_is_not_asked_faster_than_the_budget_allows() -> None:
    async def main() -> None:
        workers = [ScriptedWorker(f"d{i}", script=break_after(0)) for i in range(8)]
        async with ScriptedFleet(*workers, retry_ratio=0.0, retry_per_s=2.0, max_attempts=8) as fleet:
            tasks = [asyncio.create_task(fleet.answer(request(f"r{i}", deadline_s=10.0))) for i in range(64)]
            done, _ = await asyncio.wait(tasks)
            assert all(isinstance(task.exception(), (PeerLost, DeadlineExceeded)) for task in done)
            sent = sum(len(w.submits) for w in workers)
            assert 64 < sent <= 64 + CAP + 2.0 * 10.0 + 1
            assert fleet.metrics.value("baton_retry_waits_total") > 0

    simulate(main)


def test_each_admitted_request_brings_its_share_of_a_retry() -> None:
    async def main() -> None:
        workers = [ScriptedWorker(f"d{i}") for i in range(2)]
        async with ScriptedFleet(*workers, retry_ratio=0.5, retry_per_s=0.001) as fleet:
            for _ in range(int(CAP)):
                assert await fleet.dispatcher._budget.take(now())
            await fleet.answer(request("smooth"))
            workers[0].script = workers[1].script = once(break_after(1))
            started = now()
            assert await fleet.answer(request("rough", deadline_s=30.0)) == expected(request("rough"))
            assert now() - started < 1.0
            assert fleet.metrics.value("baton_dispatch_retries_total", reason="peer_lost") == 1

    simulate(main)


def test_a_refusal_costs_the_budget_nothing() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0", script=refuse("overloaded"))
        async with ScriptedFleet(worker, retry_ratio=0.0, retry_per_s=0.001) as fleet:
            tasks = [asyncio.create_task(fleet.answer(request(f"r{i}"))) for i in range(10)]
            await asyncio.sleep(20)
            assert len(worker.submits) > 2 * CAP
            worker.script = speak
            for i, task in enumerate(tasks):
                assert await task == expected(request(f"r{i}"))
            assert fleet.metrics.value("baton_retry_waits_total") == 0

    simulate(main)


# ---- how soon a loss is noticed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["frozen", "killed", "reset"])
def test_requests_of_a_lost_worker_are_dispatched_again_within_dead_s(how: str) -> None:
    async def main() -> None:
        worker, other = ScriptedWorker("d0"), ScriptedWorker("d1", script=speak)
        worker.script = mute
        async with ScriptedFleet(worker) as fleet:
            tasks = [asyncio.create_task(fleet.answer(request(f"r{i}"))) for i in range(5)]
            await asyncio.sleep(0.01)
            fleet.workers["d1"] = other
            await asyncio.sleep(1.0)
            lost_at = now()
            match how:
                case "frozen":
                    worker.frozen = True
                case "killed":
                    worker.die()
                case "reset":
                    worker.break_streams()
                    worker.script = speak
            for i, task in enumerate(tasks):
                assert await task == expected(request(f"r{i}"))
            again_after_s = now() - lost_at - 0.06
            assert again_after_s <= (fleet.config.router.dead_s if how == "frozen" else 0.1)
            if how == "frozen":
                worker.frozen = False
                await asyncio.sleep(6)
                assert fleet.state("d0") == "ready"
                assert worker.num_streams == 1, "the old stream is closed: its requests end there"

    simulate(main, range(3))
