"""The open loop: every session begins at its time, however many are in flight and however slow their answers are.

Nothing is skipped. When the client itself falls behind, or a limit on requests in flight was asked for, a request
leaves late, and its record says how late; its latency still counts from when it was meant to leave.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Protocol

from baton.bench.load.openai import Dialect
from baton.bench.load.plan import Session
from baton.bench.load.record import Record

LEAD_S = 0.05
"""Between the call and the first possible send: the schedule begins with a client that is ready."""


class Asks(Protocol):
    @property
    def dialect(self) -> Dialect: ...

    async def ask(self, record: Record, body: bytes, keep_text: bool) -> str: ...


async def drive(
    sessions: Sequence[Session], asker: Asks, max_in_flight: int | None = None
) -> tuple[float, list[Record]]:
    """When it began (the loop's time), and a record per request, when all are over. A turn that failed ends its
    session. Cancelled: so is everything in flight."""
    loop = asyncio.get_running_loop()
    gate = asyncio.Semaphore(max_in_flight) if max_in_flight else contextlib.nullcontext()
    start_s, records = loop.time() + LEAD_S, list[Record]()
    async with asyncio.TaskGroup() as flying:
        for session in sorted(sessions, key=lambda s: s.at_s):
            intended_s = start_s + session.at_s
            if (wait_s := intended_s - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            flying.create_task(_converse(session, intended_s, asker, gate, records))
    return start_s, records


async def _converse(
    session: Session,
    intended_s: float,
    asker: Asks,
    gate: contextlib.AbstractAsyncContextManager[None],
    records: list[Record],
) -> None:
    said: list[str] = []
    prompt_tokens = 0
    for number, turn in enumerate(session.turns):
        more = number + 1 < len(session.turns)
        said.append(turn.text)
        prompt_tokens += turn.prompt_tokens
        record = Record(session.label, number, intended_s, prompt_tokens, turn.output_tokens)
        records.append(record)
        async with gate:
            text = await asker.ask(record, asker.dialect.body(said, turn.output_tokens), more)
        if not more or not record.ok:
            return
        said.append(text)
        prompt_tokens += record.output_tokens
        assert record.end_s is not None
        intended_s = record.end_s + session.think_s
        await asyncio.sleep(session.think_s)
