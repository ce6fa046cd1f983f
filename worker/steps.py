"""The step loop: schedule, execute, commit, tell. One per worker, whatever its role.

Owns the scheduler and the runner while it runs. Does not know where KV comes from or who wants the tokens: each
sequence has a listener that hears its Progress on the event loop, after the commit and before the next schedule.

Life of a sequence here: add (waiting) -> scheduled, executed, committed, listener told, again and again -> remove.
A finished sequence keeps its blocks until its listener removes it, so that they can be lent first.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from baton.core.metrics import Metrics
from baton.core.sequence import SequenceState
from baton.core.step import Progress, Runner, ScheduledChunk, Step
from baton.engine.scheduler import Scheduler

Listener = Callable[[Progress, float], None]
"""(what the step did to the sequence, loop time when the step began)."""
LayerListener = Callable[[ScheduledChunk, int], None]
"""(the chunk that will sample, layers of its KV that are in the blocks), while the step runs."""

IDLE_CHECK_S = 0.5
"""An idle loop looks again this often even if nobody woke it: blocks can come back by timers of other rooms."""
_SMOOTHING = 0.2
_PREFILL_SHARE = 0.5
"""Steps with at least this share of prompt tokens measure the prefill rate, steps without any the decode step."""


class StepLoop:
    def __init__(self, scheduler: Scheduler, runner: Runner, metrics: Metrics, on_step: Callable[[], None]) -> None:
        """`on_step` is called after each committed step, when all listeners have been told."""
        self.scheduler = scheduler
        self.steps = 0
        self.prefill_tokens_per_s = 0.0
        self.decode_step_s = 0.0
        self._runner = runner
        self._metrics = metrics
        self._on_step = on_step
        self._listeners: dict[str, Listener] = {}
        self._layer_listeners: dict[str, LayerListener] = {}
        self._wake = asyncio.Event()
        self._boundary = asyncio.Event()
        self._moved_on_s = asyncio.get_running_loop().time()
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

    def wake(self) -> None:
        """Blocks came back from elsewhere (a lease, a pull): waiting sequences may fit now."""
        self._wake.set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            step = self.scheduler.schedule(loop.time())
            if step is None:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(IDLE_CHECK_S):
                        await self._wake.wait()
                continue
            started = loop.time()
            result = await self._runner.execute(step, self._watch_layers(step))
            now = self._moved_on_s = loop.time()
            told = self.scheduler.commit(step, result, now)
            self._measure(step, now - started)
            for progress in told:
                listener = self._listeners.get(progress.request_id)
                if listener is not None:
                    listener(progress, started)
            self._on_step()
            self._boundary.set()
            self._boundary = asyncio.Event()

    def _watch_layers(self, step: Step) -> Callable[[int], None] | None:
        """Tell each listener of a chunk that will sample how far its layers are; None when nobody asked."""
        watched = [c for c in step.chunks if c.choices and c.request_id in self._layer_listeners]

        def tell(num_layers: int) -> None:
            for chunk in watched:
                listener = self._layer_listeners.get(chunk.request_id)
                if listener is not None:
                    listener(chunk, num_layers)

        return tell if watched else None

    def _measure(self, step: Step, duration_s: float) -> None:
        self.steps += 1
        prompt_tokens = sum(len(c.token_ids) for c in step.chunks if len(c.token_ids) > 1 or not c.choices)
        decode_tokens = step.num_tokens - prompt_tokens
        self._metrics.inc("baton_steps_total")
        self._metrics.inc("baton_step_tokens_total", prompt_tokens, kind="prefill")
        self._metrics.inc("baton_step_tokens_total", decode_tokens, kind="decode")
        fresh = self.scheduler.num_preemptions - self._preemptions_seen
        if fresh:
            self._preemptions_seen += fresh
            self._metrics.inc("baton_preemptions_total", fresh)
        if prompt_tokens >= _PREFILL_SHARE * step.num_tokens:
            if duration_s > 0:
                self.prefill_tokens_per_s = _smooth(self.prefill_tokens_per_s, step.num_tokens / duration_s)
        elif not prompt_tokens:
            self.decode_step_s = _smooth(self.decode_step_s, duration_s)


def _smooth(old: float, new: float) -> float:
    return new if old == 0 else old + _SMOOTHING * (new - old)
