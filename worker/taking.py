"""The target's side of a planned move: a request that runs on a peer comes here, KV and all.

 1. its prefix is fetched from the peer's cache, while it still runs there
 2. TAKE_OVER: the peer pauses it and lends the rest; it is pulled and verified
 3. the release is the acknowledgement: the peer forgets it. Now it goes on here, with the next index

All choices or none: the peer forgets the request with the last of their leases. Whatever fails before, it runs on
there, and the attempt here ends with an error.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baton.core.errors import BatonError
from baton.core.handoff import HandoffState, LendMode, PrefillCall, RunningAttempt
from baton.core.layout import stored_alike
from baton.core.messages import TakeFrom
from baton.core.request import Request
from baton.core.sequence import SequenceState, new_sequence
from baton.worker.answer import Answer
from baton.worker.arrival import Arrival
from baton.worker.fetch import fetch_prefix
from baton.worker.handoff import Handoff, Silent
from baton.worker.parts import WorkerParts

if TYPE_CHECKING:
    from baton.worker.intake import Intake


@dataclass(frozen=True, slots=True)
class Taken:
    """One choice, whole and verified, not yet acknowledged."""

    answer: Answer
    arrival: Arrival
    handoff: Handoff
    state: HandoffState


async def take_over(intake: Intake, parts: WorkerParts, source: TakeFrom) -> None:
    """Ends the intake if it fails."""
    taken: list[Taken] = []

    async def take(answer: Answer) -> None:
        taken.append(await _take(intake, parts, answer, source))

    try:
        may_fetch = stored_alike(parts.capability, source.worker.capability)
        for answer in intake.answers.values() if may_fetch else ():  # the first brings the prompt, which others share
            await fetch_prefix(parts, _only(intake, answer), intake.submit.epoch, source.worker)
        # All at once: each is paused from its take-over to its release.
        await _all(take(answer) for answer in intake.answers.values())
        await _all(one.handoff.release() for one in taken)
    except BaseException as e:
        for one in taken:
            one.handoff.give_up()
        if not isinstance(e, BatonError):
            raise
        intake.end(e)
        return
    if not intake.life.ended:
        intake.adopt(taken)


async def _all(them: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Each to its end, together. Raises the first error."""
    for error in await asyncio.gather(*them, return_exceptions=True):
        if error is not None:
            raise error


async def _take(intake: Intake, parts: WorkerParts, answer: Answer, source: TakeFrom) -> Taken:
    request, epoch, ttl_s = _only(intake, answer), intake.submit.epoch, parts.handoff.lease_ttl_s
    arrival = intake.arrive(_sequence(intake, parts, answer), may_grow=True)
    running = RunningAttempt(intake.log.outbox.router_id, source.epoch, answer.choice.index)
    call = PrefillCall(
        request, epoch, parts.worker_id, arrival.num_held, ttl_s, LendMode.TAKE_OVER, running
    )
    handoff = Handoff(parts, source.worker, call, arrival, Silent())
    return Taken(answer, arrival, handoff, await handoff.run())


def _only(intake: Intake, answer: Answer) -> Request:
    """The request, with this one of its choices."""
    return dataclasses.replace(intake.request, choices=(answer.choice,))


def _sequence(intake: Intake, parts: WorkerParts, answer: Answer) -> SequenceState:
    """As which the answer runs here: an only one is the leader."""
    leader = intake.leader
    if len(intake.answers) == 1:
        return leader
    request_id = f"{leader.request_id}.{answer.choice.index}"
    request = dataclasses.replace(leader.request, choices=(answer.choice,), request_id=request_id)
    return new_sequence(request, leader.epoch, parts.pool.block_size, leader.max_output_tokens)
