"""The step loop: the runner is never without a step while there is one, and what is told comes in order. The loop's
judgement of itself: it stands still only while there is something to do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from baton.core.metrics import Metrics
from baton.core.request import SamplingParams
from baton.core.step import Progress, ScheduledChunk, Step, StepResult
from baton.sim.loop import SimLoop, run
from baton.worker.steps import StepLoop
from tests.engine.builders import Bench, SlotMemory, limits, sequence, undisturbed

STEP_S = 0.5


class Engine:
    """Steps of half a second, while it is not stuck. Its one layer is done at once when a step begins."""

    def __init__(self, memory: SlotMemory) -> None:
        self._memory = memory
        self._last: asyncio.Task[StepResult] | None = None
        self.stuck = False
        self.broken = False
        self.began_s: list[float] = []

    def execute(self, step: Step, on_layers: Callable[[int], None] | None = None) -> asyncio.Task[StepResult]:
        self._last = asyncio.get_running_loop().create_task(self._in_turn(self._last, step, on_layers))
        return self._last

    async def _in_turn(
        self, last: asyncio.Task[StepResult] | None, step: Step, on_layers: Callable[[int], None] | None
    ) -> StepResult:
        if last is not None:
            await asyncio.wait([last])
        self.began_s.append(asyncio.get_running_loop().time())
        if on_layers is not None:
            on_layers(1)
        await asyncio.sleep(STEP_S)
        while self.stuck:
            await asyncio.sleep(STEP_S)
        assert not self.broken, "the engine broke"
        return self._memory.execute(step)

    async def close(self) -> None:
        """Nothing is held."""


@contextlib.asynccontextmanager
async def turning(bench: Bench) -> AsyncIterator[tuple[StepLoop, Engine]]:
    engine = Engine(bench.memory)
    steps = StepLoop(bench.scheduler, engine, Metrics(), bench.pool.check)
    task = asyncio.create_task(steps.run())
    try:
        yield steps, engine
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def unheard(progress: Progress, started: float) -> None:
    """Of no interest."""


# ---- overlap ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_step_begins_the_moment_the_one_before_is_done_and_the_tokens_are_what_they_are_alone(seed: int) -> None:
    async def main(loop: SimLoop) -> None:
        bench, heard = Bench.of(64), dict[str, list[int]]()
        async with turning(bench) as (steps, engine):
            for name, prompt, num_output in (("a", [0, 1, 1], 9), ("b", [1], 4), ("c", [1, 0, 1, 1, 0], 7)):
                heard[name] = list(prompt)

                def listen(progress: Progress, started: float) -> None:
                    heard[progress.request_id] += [t.token_id for t in progress.new_tokens]
                    if progress.finish is not None:
                        steps.remove(progress.request_id)

                steps.add(sequence(name, prompt, num_output), listen)
            await asyncio.sleep(20)
            assert heard == {
                "a": undisturbed([0, 1, 1], 9), "b": undisturbed([1], 4), "c": undisturbed([1, 0, 1, 1, 0], 7)
            }
            assert engine.began_s == [n * STEP_S for n in range(9)], "one step for each token of the longest"
            assert bench.pool.ledger().active == 0

    run(seed, main)


def test_a_sequence_that_comes_while_a_step_runs_is_in_the_next_if_that_was_not_given_out_yet() -> None:
    async def main(loop: SimLoop) -> None:
        bench = Bench.of(64)
        async with turning(bench) as (steps, engine):
            steps.add(sequence("last", [0, 1], 1), unheard)
            await asyncio.sleep(0.1)
            assert bench.scheduler.schedule(0.0) is None, "it ends with this step"
            steps.add(sequence("new", [1, 1], 1), unheard)
            await asyncio.sleep(2)
            assert engine.began_s == [0.0, STEP_S]

    run(1, main)


def test_a_listener_hears_of_no_layer_of_a_step_before_it_hears_of_the_step_before() -> None:
    async def main(loop: SimLoop) -> None:
        bench, heard = Bench.of(64, limits(max_chunk_tokens=2)), list[tuple[str, int]]()

        def listen(progress: Progress, started: float) -> None:
            heard.append(("computed", progress.num_computed_tokens))

        def on_layers(chunk: ScheduledChunk, num_layers: int) -> None:
            heard.append(("layers of", chunk.end))

        async with turning(bench) as (steps, engine):
            steps.add(sequence("a", [0, 1, 1, 0], 1), listen, on_layers)
            await asyncio.sleep(2)
        assert heard == [("computed", 2), ("layers of", 4), ("computed", 4)]

    for seed in range(20):
        run(seed, main)


def test_what_was_removed_is_heard_of_no_more_though_two_steps_have_it() -> None:
    async def main(loop: SimLoop) -> None:
        bench, heard = Bench.of(64), list[Progress]()
        async with turning(bench) as (steps, engine):
            steps.add(sequence("a", [0, 1], 40), lambda progress, started: heard.append(progress))
            await asyncio.sleep(1.2 * STEP_S)
            assert len(heard) == 1
            steps.remove("a")
            await asyncio.sleep(0.1)
            assert bench.pool.ledger().active > 0, "both steps may write to its blocks"
            await asyncio.sleep(5)
            assert len(heard) == 1
            assert bench.pool.ledger().active == 0
            assert len(engine.began_s) == 3

    run(1, main)


def test_a_paused_sequence_stands_still_once_the_steps_that_have_it_are_done() -> None:
    async def main(loop: SimLoop) -> None:
        bench = Bench.of(64)
        async with turning(bench) as (steps, engine):
            steps.add(sequence("a", [0, 1], 40, sampling=SamplingParams(seed=0, presence_penalty=1.0)), unheard)
            await asyncio.sleep(1.2 * STEP_S)
            assert await steps.pause("a")
            assert loop.time() == 3 * STEP_S
            assert bench.held("a").tokens == undisturbed([0, 1], 3, penalised=True)
            await asyncio.sleep(5)
            assert bench.held("a").num_computed_tokens == 4

    run(1, main)


def test_a_runner_that_breaks_ends_the_loop_and_the_step_behind_it() -> None:
    async def main(loop: SimLoop) -> None:
        bench = Bench.of(64)
        engine = Engine(bench.memory)
        steps = StepLoop(bench.scheduler, engine, Metrics(), lambda: None)
        steps.add(sequence("a", [0, 1], 40), unheard)
        engine.broken = True
        with pytest.raises(AssertionError, match="the engine broke"):
            await steps.run()
        assert loop.time() == STEP_S
        assert [t for t in loop.tasks() if t is not asyncio.current_task()] == []

    run(1, main)


# ---- standing still --------------------------------------------------------------------------------------------------


def test_it_stands_still_while_there_is_work_and_no_step_and_not_while_all_are_paused() -> None:
    async def main(loop: SimLoop) -> None:
        async with turning(Bench.of(32)) as (steps, engine):
            await asyncio.sleep(100)
            assert steps.stalled_s == 0, "nothing to do"
            steps.add(sequence("a", [0, 1], 40), unheard)
            await asyncio.sleep(5)
            assert steps.stalled_s <= STEP_S
            assert await steps.pause("a")
            await asyncio.sleep(100)
            assert steps.stalled_s == 0, "all it has is paused"
            steps.resume("a")
            assert steps.stalled_s == 0, "the pause does not count"
            engine.stuck = True
            await asyncio.sleep(100)
            assert steps.stalled_s > 90
            engine.stuck = False
            await asyncio.sleep(5)
            assert steps.stalled_s <= STEP_S

    run(1, main)
