"""Scripted workers that can hand a running request to each other: what a planned move looks like to the router.

A `Relay` stands for all the KV in the fleet: it knows who runs which attempt and how far that is. Its scripts pause,
take over and forget as docs/protocol.md says; a test breaks them at the point it is about.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from baton.core.messages import Submit, TokenChunk
from baton.core.request import FinishReason, Request
from baton.core.worker import Role, WorkerLoad
from tests.router.fake_fleet import (
    Act,
    Script,
    ScriptedFleet,
    ScriptedWorker,
    capability,
    expected,
    refuse,
    request,
    token,
)

STEP_S = 0.01


class Point(Enum):
    """Where a move can be broken."""

    FETCHING = auto()
    """The source decodes on, the target pulls what is cached."""
    PAUSED = auto()
    """The source has stopped and lends its tail."""
    TAKEN = auto()
    """The source has forgotten it; the target has not spoken."""
    SPOKEN = auto()
    """The target's first chunk is out."""


@dataclass
class Running:
    """One attempt on one worker."""

    lengths: dict[int, int]
    """Output tokens of each choice."""
    paused: bool = False
    forgotten: bool = False

    def is_over(self, request: Request) -> bool:
        return all(n == request.sampling.max_tokens for n in self.lengths.values())


WAIT_S = {Point.FETCHING: 0.05, Point.PAUSED: 0.02, Point.TAKEN: 0.0}


@dataclass
class Relay:
    attempts: dict[int, Running] = field(default_factory=dict)
    """By epoch: this world has one router."""
    points: list[tuple[Point, str]] = field(default_factory=list)
    """Every point that some move has reached, and which request's."""
    at: dict[Point, Script] = field(default_factory=dict)
    """What the next target that reaches this point does there, instead of going on."""
    forgets: bool = True
    """False: the source does not hear the release and goes on, while the target has it, too."""

    def script(self) -> Script:
        """Of a worker that speaks, is taken from, and takes over."""
        return lambda submit: self._take_over(submit) if submit.take_from else self._start(submit)

    def _start(self, submit: Submit) -> Iterator[Act]:
        running = self.attempts[submit.epoch] = Running({c.index: len(c.delivered) for c in submit.request.choices})
        return self._speak(submit, running)

    def _speak(self, submit: Submit, running: Running) -> Iterator[Act]:
        """A token of each unfinished choice per step."""
        r = submit.request
        while not running.forgotten and not running.is_over(r):
            yield STEP_S
            for choice, n in running.lengths.items():
                if n < r.sampling.max_tokens and not (running.paused or running.forgotten):
                    running.lengths[choice] = n + 1
                    yield said(submit, choice, n, n + 1)

    def _take_over(self, submit: Submit) -> Iterator[Act]:
        assert submit.take_from is not None
        source = self.attempts[submit.take_from.epoch]
        try:
            yield from self._fetch(submit, source)
        finally:
            source.paused = False  # its lease has ended, or ends with the call

    def _fetch(self, submit: Submit, source: Running) -> Iterator[Act]:
        r = submit.request
        for point, wait_s in WAIT_S.items():
            if source.forgotten or (point is Point.PAUSED and source.is_over(r)):
                yield from refuse("not_found", "it does not run here")(submit)
                return
            source.paused = point is Point.PAUSED
            source.forgotten = point is Point.TAKEN and self.forgets
            self.points.append((point, r.request_id))
            if point in self.at:
                source.paused = False
                yield from self.at.pop(point)(submit)
                return
            yield wait_s
        mine = self.attempts[submit.epoch] = Running({c.index: source.lengths[c.index] for c in r.choices})
        self.points.append((Point.SPOKEN, r.request_id))
        for c in r.choices:
            if mine.lengths[c.index] > len(c.delivered):  # what the client may not have yet
                yield said(submit, c.index, len(c.delivered), mine.lengths[c.index])
        yield from self.at.pop(Point.SPOKEN, lambda s: self._speak(s, mine))(submit)


def said(submit: Submit, choice: int, start: int, end: int) -> TokenChunk:
    r = submit.request
    ids = tuple(token(r.request_id, i, choice) for i in range(start, end))
    finish = FinishReason.LENGTH if end == r.sampling.max_tokens else None
    return TokenChunk(r.request_id, submit.epoch, start, ids, finish, choice)


def movers(relay: Relay, count: int) -> list[ScriptedWorker]:
    """Decode workers with room for long requests."""
    roomy, load = capability(max_model_len=1000, num_blocks=1000), WorkerLoad(available_blocks=1000, total_blocks=1000)
    return [ScriptedWorker(f"d{i}", Role.DECODE, roomy, relay.script(), load=load) for i in range(count)]


# ---- a test's moves -----------------------------------------------------------------------------------------------

FULL = WorkerLoad(available_blocks=0, total_blocks=1000)
ROOMY = replace(FULL, available_blocks=1000)


def long(name: str = "r", **fields: object) -> Request:
    return request(name, max_tokens=40, **fields)


async def start(fleet: ScriptedFleet, worker: ScriptedWorker, r: Request) -> asyncio.Task[dict[int, list[int]]]:
    """A request that streams from this worker."""
    others = [w for w in fleet.workers.values() if w is not worker]
    for other in others:
        other.load = replace(other.load, num_running=50)
    await asyncio.sleep(0.6)
    task = asyncio.create_task(fleet.answers(r))
    await asyncio.sleep(0.045)
    assert [s.request.request_id for s in worker.submits][-1] == r.request_id
    for other in others:
        other.load = replace(other.load, num_running=0)
        other.say()
    return task


async def discourage(worker: ScriptedWorker) -> None:
    """Make it the worse choice."""
    worker.load = replace(worker.load, num_running=9)
    worker.say()
    await asyncio.sleep(0.01)


async def finish(task: asyncio.Task[dict[int, list[int]]], r: Request) -> None:
    assert await task == {c.index: expected(r, c.index) for c in r.choices}


def moves(fleet: ScriptedFleet) -> dict[str, float]:
    return {labels["end"]: value for metric, labels, value in fleet.metrics.samples()
            if metric.name == "baton_moves_total"}


def retries(fleet: ScriptedFleet) -> float:
    return fleet.metrics.value("baton_dispatch_retries_total")
