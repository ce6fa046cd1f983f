"""The step loop: schedule, execute, commit, tell. One per worker, whatever its role.

Owns the scheduler and the runner while it runs. Does not know where KV comes from or who wants the tokens: each
sequence has a listener that hears its Progress on the event loop, after the commit and before the next schedule.

Life of a sequence here: add (waiting) -> scheduled, executed, committed, listener told, again and again -> remove.
A finished sequence keeps its blocks until its listener removes it, so that they can be lent first.

The runner always has the next step before it is done with this one, if there is one: what happens here, and the
streaming that follows from it, happens while it computes.

    runner       step 1        | step 2                    | step 3
    event loop   schedule 2    | commit 1, tell, schedule 3 | commit 2, tell, schedule 4
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from baton.core.metrics import Metrics
from baton.core.sequence import SequenceState
from baton.core.step import Progress, Runner, ScheduledChunk, Step, StepResult
from baton.core.step_model import StepFit, StepModel, StepWork
from baton.engine.scheduler import MAX_STEPS_IN_FLIGHT, Scheduler

Listener = Callable[[Progress, float], None]
"""(what the step did to the sequence, loop time when the step began)."""
LayerListener = Callable[[ScheduledChunk, int], None]
"""(the chunk that will sample, layers of its KV that are in the blocks), while the step runs."""

IDLE_CHECK_S = 0.5
"""An idle loop looks again this often even if nobody woke it: blocks can come back by timers of other rooms."""
MODEL_EVERY = 8
"""Steps after which the model of them is worked out anew."""


@dataclass(slots=True, eq=False)
class _Flight:
    """A step that the runner has, and we have not committed."""

    step: Step
    given_s: float
    result: asyncio.Future[StepResult]
    num_layers_done: int = 0


class StepLoop:
    def __init__(self, scheduler: Scheduler, runner: Runner, metrics: Metrics, on_step: Callable[[], None]) -> None:
        """`on_step` is called after each committed step, when all listeners have been told."""
        self.scheduler = scheduler
        self.steps = 0
        self.model = StepModel()
        """Of the steps so far."""
        self._fit = StepFit()
        self._runner = runner
        self._metrics = metrics
        self._on_step = on_step
        self._listeners: dict[str, Listener] = {}
        self._layer_listeners: dict[str, LayerListener] = {}
        self._wake = asyncio.Event()
        self._boundary = asyncio.Event()
        self._flights: deque[_Flight] = deque()
        self._moved_on_s = self._landed_s = asyncio.get_running_loop().time()
        self._preemptions_seen = 0

    def add(self, seq: SequenceState, listener: Listener, on_layers: LayerListener | None = None) -> None:
        """Hand a sequence to the scheduler. Raises Overloaded when the waiting queue is full."""
        now = asyncio.get_running_loop().time()
        if not self.scheduler.has_work:
            self._moved_on_s = now  # it had nothing to do until now
        self.scheduler.add(seq, now)
        self._listeners[seq.request_id] = listener
        if on_layers is not None:
            self._layer_listeners[seq.request_id] = on_layers
        self._wake.set()

    def remove(self, request_id: str) -> None:
        """End a sequence, whatever its state: its blocks return (after the step in flight, if it is in one) and its
        listener hears nothing more. Unknown ids are ignored."""
        self._listeners.pop(request_id, None)
        self._layer_listeners.pop(request_id, None)
        self.scheduler.remove(request_id)
        self._wake.set()

    async def pause(self, request_id: str) -> bool:
        """Stop a sequence at the next step boundary; False: it was removed meanwhile. `resume`, or `remove`, must
        follow. The caller brings the deadline."""
        self.scheduler.pause(request_id)
        while self.scheduler.get(request_id) is not None:
            if self.scheduler.is_settled(request_id):
                return True
            await self._boundary.wait()
        return False

    def resume(self, request_id: str) -> None:
        if not self.scheduler.has_work:
            self._moved_on_s = asyncio.get_running_loop().time()
        self.scheduler.resume(request_id)
        self._wake.set()

    @property
    def stalled_s(self) -> float:
        """How long there has been work and no step was completed; 0 while there is none."""
        return asyncio.get_running_loop().time() - self._moved_on_s if self.scheduler.has_work else 0.0

    @property
    def landed_s(self) -> float:
        """When the last step was done, in the loop's time. For listeners: when theirs was."""
        return self._landed_s

    def wake(self) -> None:
        """Blocks came back from elsewhere (a lease, a pull): waiting sequences may fit now."""
        self._wake.set()

    async def run(self) -> None:
        try:
            while True:
                self._schedule()
                if self._flights and self._flights[0].result.done():
                    self._land()
                    continue
                self._wake.clear()
                if self._flights:
                    await self._wake.wait()
                else:
                    await self._idle()
        finally:
            left = [flight.result for flight in self._flights]
            for result in left:
                result.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _idle(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_CHECK_S):
                await self._wake.wait()

    def _schedule(self) -> None:
        """Give the runner all the steps that there are, as far as it takes them."""
        now = asyncio.get_running_loop().time()
        while len(self._flights) < MAX_STEPS_IN_FLIGHT and (step := self.scheduler.schedule(now)) is not None:
            result = asyncio.ensure_future(self._runner.execute(step, self._watch_layers(step)))
            result.add_done_callback(lambda _: self._wake.set())
            self._flights.append(_Flight(step, now, result))

    def _land(self) -> None:
        """Commit the oldest step, which is done, and tell everybody."""
        flight = self._flights.popleft()
        result, now = flight.result.result(), asyncio.get_running_loop().time()
        began = max(flight.given_s, self._landed_s)
        self._landed_s = self._moved_on_s = now
        told = self.scheduler.commit(flight.step, result, now)
        self._measure(flight.step, now - began)
        for progress in told:
            listener = self._listeners.get(progress.request_id)
            if listener is not None:
                listener(progress, began)
        self._on_step()
        self._boundary.set()
        self._boundary = asyncio.Event()
        if self._flights:
            for num_layers in range(1, self._flights[0].num_layers_done + 1):
                self._tell_layers(self._flights[0].step, num_layers)

    def _watch_layers(self, step: Step) -> Callable[[int], None] | None:
        """What to call when a layer of the step is done; None when nobody asked. Listeners hear of it at once, unless
        the step before is not committed: then they hear of that first."""
        if not any(c.choices and c.request_id in self._layer_listeners for c in step.chunks):
            return None

        def note(num_layers: int) -> None:
            flight = next(f for f in self._flights if f.step is step)
            flight.num_layers_done = num_layers
            if flight is self._flights[0]:
                self._tell_layers(step, num_layers)

        return note

    def _tell_layers(self, step: Step, num_layers: int) -> None:
        """The listeners of chunks that will sample."""
        for chunk in step.chunks:
            listener = self._layer_listeners.get(chunk.request_id)
            if chunk.choices and listener is not None:
                listener(chunk, num_layers)

    def _measure(self, step: Step, duration_s: float) -> None:
        self.steps += 1
        work = StepWork.of(step)
        self._fit.observe(work, duration_s)
        if self.steps <= MODEL_EVERY or self.steps % MODEL_EVERY == 0:
            self.model = self._fit.model
        self._metrics.inc("baton_steps_total")
        self._metrics.inc("baton_step_tokens_total", work.prefill_tokens, kind="prefill")
        self._metrics.inc("baton_step_tokens_total", work.decode_rows, kind="decode")
        fresh = self.scheduler.num_preemptions - self._preemptions_seen
        if fresh:
            self._preemptions_seen += fresh
            self._metrics.inc("baton_preemptions_total", fresh)
