"""The open loop, on virtual time: nobody waits for a slow server, nobody is left out, answers lead to next turns."""

from __future__ import annotations

import asyncio
import json

import pytest

from baton.bench.load.arrivals import Process
from baton.bench.load.drive import LEAD_S, drive
from baton.bench.load.openai import Dialect
from baton.bench.load.plan import Session, Shape, Turn, synthetic
from baton.bench.load.prose import Prose
from baton.bench.load.record import Record
from baton.sim.loop import SimLoop, run


class Server:
    """Answers after `answer_s`, whoever else is waiting; fails the request numbers in `fails`."""

    dialect = Dialect("chat", "m")

    def __init__(self, answer_s: float, fails: tuple[int, ...] = ()) -> None:
        self.answer_s, self.fails = answer_s, fails
        self.bodies: list[bytes] = []
        self.most_at_once = self._now = 0

    async def ask(self, record: Record, body: bytes, keep_text: bool) -> str:
        time = asyncio.get_running_loop().time
        record.sent_s = time()
        self.bodies.append(body)
        number, self._now = len(self.bodies), self._now + 1
        self.most_at_once = max(self.most_at_once, self._now)
        await asyncio.sleep(self.answer_s)
        self._now -= 1
        record.event_s.append(time())
        record.end_s = time()
        record.error = "broken" if number in self.fails else None
        return f" answer {number}" if keep_text else ""


def driven(
    sessions: list[Session], server: Server, max_in_flight: int | None = None
) -> tuple[float, list[Record]]:
    async def main(loop: SimLoop) -> tuple[float, list[Record]]:
        return await drive(sessions, server, max_in_flight)

    return run(0, main)


def singles(*at_s: float) -> list[Session]:
    return [Session(at, (Turn((f" {at}",), 5, 2),)) for at in at_s]


def test_requests_leave_at_their_times_while_the_server_answers_nobody() -> None:
    sessions = synthetic(Shape(), Process("gamma", 3.0), 20.0, 30.0, Prose.estimated(1.0), "s")
    server = Server(answer_s=3600.0)
    start_s, records = driven(sessions, server)
    assert len(records) == len(sessions) == server.most_at_once > 300
    assert [r.sent_s for r in records] == pytest.approx([start_s + s.at_s for s in sessions], abs=1e-9)
    assert all(r.ttft_s == pytest.approx(3600.0) for r in records)


def test_a_request_whose_time_has_passed_leaves_at_once_and_its_wait_counts() -> None:
    start_s, records = driven(singles(0.5, -1.0 - LEAD_S), Server(answer_s=2.0))
    late, on_time = records
    assert late.late_s == pytest.approx(1.0)
    assert late.ttft_s == pytest.approx(3.0)
    assert on_time.late_s == pytest.approx(0.0)
    assert on_time.sent_s == pytest.approx(start_s + 0.5)


def test_a_limit_on_requests_in_flight_makes_them_late_and_their_wait_counts() -> None:
    server = Server(answer_s=4.0)
    _, records = driven(singles(0.0, 1.0, 2.0, 3.0), server, max_in_flight=2)
    assert server.most_at_once == 2
    assert [r.late_s for r in records] == pytest.approx([0, 0, 2, 2])
    assert [r.ttft_s for r in records] == pytest.approx([4, 4, 6, 6])


def chat(turns: int, at_s: float = 0.0) -> Session:
    return Session(at_s, tuple(Turn((f" question {n}",), 5, 2) for n in range(turns)), think_s=4.0)


def test_a_session_s_turns_follow_their_answers_and_send_all_that_was_said() -> None:
    server = Server(answer_s=3.0)
    start_s, records = driven([chat(3)], server)
    assert [r.intended_s - start_s for r in records] == pytest.approx([0.0, 7.0, 14.0])
    assert [r.turn for r in records] == [0, 1, 2]
    assert all(r.late_s == pytest.approx(0.0) for r in records)
    said = [(m["role"], m["content"]) for m in json.loads(server.bodies[-1])["messages"]]
    assert said == [
        ("user", " question 0"), ("assistant", " answer 1"), ("user", " question 1"), ("assistant", " answer 2"),
        ("user", " question 2"),
    ]  # fmt: skip
    assert [r.asked_prompt_tokens for r in records] == [5, 11, 17], "5 of each question, 1 of each answer"


def test_a_turn_that_fails_ends_its_session_and_nobody_else_s() -> None:
    _, records = driven([chat(3), chat(3, at_s=1.0)], Server(answer_s=3.0, fails=(1,)))
    assert len(records) == 4
    assert sum(not r.ok for r in records) == 1


def test_a_run_that_is_cancelled_leaves_nothing_in_flight() -> None:
    server = Server(answer_s=3600.0)

    async def main(loop: SimLoop) -> int:
        work = asyncio.ensure_future(drive(singles(0.0, 0.1, 50.0), server))
        await asyncio.sleep(1.0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        return len(asyncio.all_tasks())

    assert run(0, main) == 1
    assert len(server.bodies) == 2


