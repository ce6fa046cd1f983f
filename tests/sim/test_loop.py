"""The virtual-time loop: time, order, processes, and that a seed is all there is to a schedule."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from baton.sim.loop import SimDeadlock, SimLivelock, SimLoop, SimProcess, current_process, run


def test_an_hour_of_sleep_costs_no_time_and_ends_exactly_on_time() -> None:
    async def main(loop: SimLoop) -> float:
        await asyncio.sleep(3600.1)
        return loop.time()

    assert run(1, main) == 3600.1


def test_a_timer_beyond_asyncio_s_longest_select_still_fires() -> None:
    async def main(loop: SimLoop) -> float:
        await asyncio.sleep(10 * 86_400)
        return loop.time()

    assert run(1, main) == 864_000


def test_everybody_waiting_without_a_timer_is_reported_with_who_waits_where() -> None:
    async def main(loop: SimLoop) -> None:
        await asyncio.Event().wait()

    with pytest.raises(SimDeadlock, match=r"world: Task-\d+ at .*main"):
        run(1, main)


def test_a_busy_loop_is_reported_instead_of_hanging() -> None:
    async def main(loop: SimLoop) -> None:
        for _ in itertools.count():
            await asyncio.sleep(0)

    with pytest.raises(SimLivelock):
        run(1, main)


def order(seed: int) -> list[int]:
    async def main(loop: SimLoop) -> list[int]:
        seen: list[int] = []

        async def one(i: int) -> None:
            await asyncio.sleep(1.0)
            seen.append(i)

        await asyncio.gather(*(one(i) for i in range(10)))
        return seen

    return run(seed, main)


def test_the_seed_chooses_the_order_of_callbacks_due_at_the_same_instant() -> None:
    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(2)) == list(range(10))


CANCELLATIONS = """
import asyncio, hashlib, random
from baton.sim.loop import run
junk = [bytearray(random.SystemRandom().randrange(9999)) for _ in range(500)]
async def main(loop):
    log = []
    async def waits(i):
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            log.append(i)
            raise
    async def fails():
        await asyncio.sleep(1)
        raise ValueError
    try:
        async with asyncio.TaskGroup() as group:
            for i in range(40):
                group.create_task(waits(i))
            group.create_task(fails())
    except* ValueError:
        pass
    futures = [loop.create_future() for _ in range(40)]
    for i, f in enumerate(futures):
        loop.call_later(1.0, f.set_result, i)
    done, _ = await asyncio.wait(futures)
    return log + [f.result() for f in done]
print(hashlib.sha256(repr(run(7, main)).encode()).hexdigest())
"""


def test_the_same_seed_cancels_in_the_same_order_in_another_process() -> None:
    def digest(hash_seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", CANCELLATIONS]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout

    assert digest("1") == digest("2")


def test_a_frozen_process_does_nothing_until_it_thaws_and_then_everything_at_once() -> None:
    async def main(loop: SimLoop) -> list[float]:
        process = SimProcess(loop, "worker")
        ticks: list[float] = []

        async def tick() -> None:
            while True:
                await asyncio.sleep(1.0)
                ticks.append(loop.time())

        process.spawn(tick())
        await asyncio.sleep(2.5)
        process.freeze()
        await asyncio.sleep(5.0)
        process.thaw()
        await asyncio.sleep(1.5)
        return ticks

    assert run(1, main) == [1.0, 2.0, 7.5, 8.5]


def test_a_killed_process_runs_no_finally_and_its_children_die_with_it() -> None:
    async def main(loop: SimLoop) -> tuple[list[str], int]:
        process = SimProcess(loop, "worker")
        log: list[str] = []

        async def child() -> None:
            assert current_process() is process
            try:
                await asyncio.sleep(2.0)
                log.append("child ran")
            finally:
                log.append("finally")

        async def parent() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(child())
                group.create_task(child())

        process.spawn(parent())
        await asyncio.sleep(1.0)
        assert len(process.tasks()) == 3
        process.kill()
        await asyncio.sleep(10.0)
        return list(log), len(loop.tasks())

    log, alive = run(1, main)
    assert log == []
    assert alive == 1  # main itself


@pytest.mark.slow
def test_what_was_ready_when_its_process_died_does_not_run_any_more() -> None:
    async def main(loop: SimLoop) -> list[int]:
        process, ran = SimProcess(loop, "worker"), list[int]()

        async def kill(n: int) -> None:
            ran.append(n)
            process.kill()

        for n in range(3):
            process.spawn(kill(n))
        await asyncio.sleep(1.0)
        return ran

    assert {tuple(run(seed, main)) for seed in range(20)} == {(0,), (1,), (2,)}


def test_threads_and_sockets_are_refused() -> None:
    async def main(loop: SimLoop) -> None:
        with pytest.raises(RuntimeError, match="no threads"):
            await asyncio.to_thread(print)
        with pytest.raises(RuntimeError, match="no threads"):
            await asyncio.open_connection("localhost", 1)

    run(1, main)


def test_an_exception_nobody_takes_and_a_generator_nobody_closes_are_noted() -> None:
    async def main(loop: SimLoop) -> list[str]:
        async def fails() -> None:
            raise ValueError("lost")

        async def numbers() -> AsyncIterator[int]:
            yield 1
            yield 2

        task = asyncio.ensure_future(fails())
        await asyncio.sleep(1.0)
        del task
        async for _ in numbers():
            break
        await asyncio.sleep(1.0)
        return loop.problems

    problems = run(1, main)
    assert any("lost" in p for p in problems)
    assert any("numbers" in p for p in problems)
