"""More than the fleet can do, in an open loop: what is taken is still answered in time, the rest hears so at once, and
afterwards all is as before. Production router and workers on virtual time."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from baton.core.errors import Overloaded
from baton.core.worker import Role
from baton.engine.hash_runner import StepCosts
from baton.models.hash_model import VOCABULARY
from baton.sim.plan import Plan
from tests.sim.scene import Answer, Scene, play, request
from tests.sim.scene import plan as quiet

TTFT_SLO_S, DEADLINE_S = 2.0, 4.0
PROMPT, OUTPUT = 24, 6
CAPACITY = 9.0
"""Requests a second: a step of one prompt takes about 0.11 s. What the peak is, is measured."""
BOUND = 16


def plan() -> Plan:
    """One prefill worker that is the bottleneck, two decode workers."""
    drawn = quiet(num_decode=2)
    config = drawn.terms.config
    router = config.router.model_copy(update={
        "max_queue_wait_s": 1.0, "max_queued": BOUND, "worker_queue_s": 0.3, "local_prefill_max_tokens": 0,
    })
    terms = dataclasses.replace(
        drawn.terms, config=config.model_copy(update={"router": router}),
        num_blocks=dict.fromkeys(Role, 200), costs=StepCosts(step_base_s=0.01, per_token_s=0.004),
    )
    return dataclasses.replace(drawn, terms=terms)


@dataclass
class Phase:
    """One stretch of load, and what became of it."""

    seconds: float
    answers: list[Answer]
    most_queued: int = 0
    began_s: float = 0.0

    @property
    def goodput(self) -> float:
        return sum(in_time(a) for a in self.answers) / self.seconds

    @property
    def p99_s(self) -> float:
        """Of how long answers took."""
        took = sorted(a.took_s for a in self.answers if a.error is None)
        return took[int(0.99 * len(took))]

    @property
    def refused(self) -> list[Answer]:
        return [a for a in self.answers if a.error is not None]


def in_time(answer: Answer) -> bool:
    return answer.error is None and answer.took_s <= DEADLINE_S


def arrivals(rng: random.Random, rate: float, seconds: float) -> Iterator[float]:
    at = rng.expovariate(rate)
    while at < seconds:
        yield at
        at += rng.expovariate(rate)


async def load(s: Scene, name: str, rate: float, seconds: float, like: str = "") -> Phase:
    """Requests at this rate, whatever comes of them; returns when the last has ended. `like`: they come as in the phase
    of that name."""
    rng, phase = s.loop.fork(name), Phase(seconds, [], began_s=s.loop.now)
    gaps = s.loop.fork(f"gaps of {like or name}")
    router = s.router.dispatcher
    assert router is not None
    clients = []
    for i, at in enumerate(arrivals(gaps, rate, seconds)):
        await asyncio.sleep(max(0.0, phase.began_s + at - s.loop.now))
        prompt = [rng.randrange(VOCABULARY) for _ in range(PROMPT)]
        asked = request(f"{name}-{i}", prompt, OUTPUT, DEADLINE_S)
        clients.append(asyncio.ensure_future(s.ask(asked)))
        phase.most_queued = max(phase.most_queued, len(router._admission))
    phase.answers = list(await asyncio.gather(*clients))
    return phase


def overloaded(times: float, seconds: float) -> None:
    async def story(s: Scene) -> None:
        before = await load(s, "before", 0.5 * CAPACITY, 60.0)
        peak = max([(await load(s, f"peak-{share}", share * CAPACITY, 20.0)).goodput for share in (0.8, 0.9, 1.0, 1.1)])
        flood = await load(s, "flood", times * peak, seconds)
        await asyncio.sleep(10.0)
        after = await load(s, "after", 0.5 * CAPACITY, 60.0, like="before")

        assert not before.refused
        assert not after.refused
        assert flood.goodput >= 0.9 * peak, f"{flood.goodput:.2f} of {peak:.2f} a second"
        assert flood.most_queued <= BOUND
        assert len(flood.refused) > (times - 2) * peak * seconds
        assert {type(a.error) for a in flood.refused} == {Overloaded}
        assert max(a.took_s for a in flood.refused) <= 0.05
        assert all(isinstance(a.error, Overloaded) and a.error.retry_after_s >= 1 for a in flood.refused)
        assert after.p99_s <= 1.2 * before.p99_s, f"{before.p99_s:.3f} s before, {after.p99_s:.3f} s after"
        print(f"peak {peak:.2f}/s, at {times:g}x {flood.goodput:.2f}/s, p99 {before.p99_s:.2f} {after.p99_s:.2f}")

    play(1, plan(), story)


def test_five_times_the_peak_is_served_at_the_peak_and_the_rest_is_refused_at_once() -> None:
    overloaded(5.0, 20.0)


@pytest.mark.slow
@pytest.mark.parametrize("times", [2.0, 5.0, 10.0])
def test_two_minutes_of_overload_are_served_at_the_peak(times: float) -> None:
    overloaded(times, 120.0)
