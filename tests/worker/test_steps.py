"""The step loop's judgement of itself: it stands still only while there is something to do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from baton.core.metrics import Metrics
from baton.core.step import Step, StepResult
from baton.sim.loop import SimLoop, run
from baton.worker.steps import StepLoop
from tests.engine.builders import Bench, SlotMemory, sequence

STEP_S = 0.5


class Engine:
    """Steps of half a second, while it is not stuck."""

    def __init__(self, memory: SlotMemory) -> None:
        self._memory = memory
        self.stuck = False

    async def execute(self, step: Step, on_layers: Callable[[int], None] | None = None) -> StepResult:
        await asyncio.sleep(STEP_S)
        while self.stuck:
            await asyncio.sleep(STEP_S)
        return self._memory.execute(step)

    async def close(self) -> None:
        """Nothing is held."""


def test_it_stands_still_while_there_is_work_and_no_step_and_not_while_all_are_paused() -> None:
    async def main(loop: SimLoop) -> None:
        bench = Bench.of(32)
        engine = Engine(bench.memory)
        steps = StepLoop(bench.scheduler, engine, Metrics(), lambda: None)
        turning = asyncio.create_task(steps.run())
        await asyncio.sleep(100)
        assert steps.stalled_s == 0, "nothing to do"
        steps.add(sequence("a", [0, 1], 40), lambda progress, started: None)
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
        turning.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await turning

    run(1, main)
