"""Wherever a request is when its client goes away, or when its deadline passes, both sides are free at once."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from baton.core.errors import DeadlineExceeded
from baton.core.messages import Submit, TokenChunk
from baton.core.request import Choice
from baton.core.worker import Role
from baton.engine.block_pool import Credit
from baton.sim.machine import Machine
from baton.sim.network import Conditions
from baton.sim.plan import Plan
from baton.worker.node import WorkerNode
from tests.sim.scene import Answer, Scene, gone, play, request
from tests.sim.scene import plan as quiet

FREE_S = 1.0
LOOK_S = 0.0005
REACHED_BY_S = 20.0


def slow_wire(num_decode: int = 1, local: bool = False) -> Plan:
    """A block takes 40 ms on the wire, a message 5 ms. `local`: prompts are computed where they are decoded."""
    plan = quiet(num_decode=num_decode, bytes_per_s=3e3)
    terms = dataclasses.replace(plan.terms, conditions=Conditions(delay_s=0.005, jitter_s=0.0, loss=0.0))
    if local:
        router = terms.config.router.model_copy(update={"local_prefill_max_tokens": 48})
        terms = dataclasses.replace(terms, config=terms.config.model_copy(update={"router": router}))
    return dataclasses.replace(plan, terms=terms)


@dataclass
class Life:
    """One request in a scene, and what else is needed to bring it where it shall be."""

    scene: Scene
    answer: Answer = field(default_factory=Answer)
    others: list[asyncio.Task[Answer]] = field(default_factory=list)
    credit: Credit | None = None

    def first(self, role: Role) -> Machine:
        return next(m for m in self.scene.machines.values() if m.role is role)

    def node(self, role: Role) -> WorkerNode:
        node = self.first(role).node
        assert node is not None
        return node

    def running(self, role: Role) -> int:
        return self.node(role).load().num_running

    def waiting(self, role: Role) -> int:
        return self.node(role).load().num_waiting

    def calls(self, method: str) -> int:
        """Open from decode to prefill."""
        return self.scene.network.open_calls("decode-0", "prefill-0", method)

    def on_its_way(self, kind: type) -> list[object]:
        """Messages of that kind, also inside a step message."""
        calls = self.scene.network._calls
        frames = [f for call in calls for pipe in (call.up, call.down) for _, f in pipe._travelling]
        return [m for f in frames for m in (f, *getattr(f, "chunks", ())) if isinstance(m, kind)]

    def held(self) -> list[str]:
        """What anybody still has."""
        found = [f"{r.name} has {r.num_requests} requests" for r in self.scene.routers.values() if r.num_requests]
        for machine in self.scene.machines.values():
            if machine.alive and machine.node is not None:
                ledger, load = machine.node.parts.pool.ledger(), machine.node.load()
                if ledger.quarantined + ledger.lent + ledger.active or load.num_running + load.num_waiting:
                    found.append(f"{machine.worker_id} holds {ledger}, {load}")
                elif load.available_blocks != load.total_blocks:
                    found.append(f"{machine.worker_id} keeps credit: {load}")
        return found


# ---- how to get there ------------------------------------------------------------------------------------------------


def nothing(life: Life) -> None:
    pass


def no_decode_worker(life: Life) -> None:
    life.first(Role.DECODE).kill(silent=False)


def start_decode_worker(life: Life) -> None:
    life.first(Role.DECODE).start()


def no_credit(life: Life) -> None:
    pool = life.node(Role.DECODE).parts.pool
    life.credit = pool.reserve(pool.num_available)


def drop_credit(life: Life) -> None:
    assert life.credit is not None
    life.node(Role.DECODE).parts.pool.drop(life.credit)


def slowly(role: Role) -> Callable[[Life], None]:
    def prepare(life: Life) -> None:
        runner = life.first(role).runner
        assert runner is not None
        runner.slowness = 5.0  # a step of 16 tokens takes 0.4 s, and its blocks return after it

    return prepare


def behind_another(life: Life) -> None:
    """A step of the prefill worker is under way when the request comes."""
    slowly(Role.PREFILL)(life)
    life.others.append(asyncio.create_task(life.scene.ask(request("other", range(40, 70)))))


def drained_while_decoding(life: Life) -> None:
    async def drain() -> Answer:
        while len(life.answer.tokens) < 3:
            await asyncio.sleep(LOOK_S)
        machine = next(m for m in life.scene.of(Role.DECODE) if m.num_requests)
        assert machine.node is not None
        await life.scene.network.dial("operator")(machine.node.info).drain(True, 1.0)
        return life.answer

    life.others.append(asyncio.create_task(drain()))


@dataclass(frozen=True)
class Point:
    """In the life of a request: how to see that it is there, and how to get there."""

    name: str
    there: Callable[[Life], object]
    prepare: Callable[[Life], None] = nothing
    repair: Callable[[Life], None] = nothing
    num_decode: int = 1
    local: bool = False
    num_choices: int = 1
    may_finish: bool = False
    """Its deadline comes too late to matter."""


P, D = Role.PREFILL, Role.DECODE
POINTS = [
    Point("no worker is ready", lambda x: x.scene.router.num_requests and not x.scene.of(D),
          no_decode_worker, start_decode_worker),
    Point("refused by everybody", lambda x: x.node(D).parts.metrics.value("baton_refusals_total") >= 2,
          no_credit, drop_credit),
    Point("the submit is on its way", lambda x: x.on_its_way(Submit)),
    Point("the prefill call is on its way", lambda x: x.calls("prefill") and not x.running(P) + x.waiting(P)),
    Point("waiting at the prefill worker", lambda x: x.running(P) and x.waiting(P), behind_another),
    Point("computed, and nothing published", lambda x: x.running(P), slowly(P)),
    Point("chunks are pulled while others are computed", lambda x: x.scene.fabric.moving and x.running(P)),
    Point("the first token is out, its KV moves", lambda x: x.answer.tokens and x.scene.fabric.moving),
    Point("all is lent, the last pull moves",
          lambda x: x.answer.tokens and x.scene.fabric.moving and not x.running(P) and not x.calls("prefill")),
    Point("the release is on its way",
          lambda x: x.answer.tokens and x.calls("lease") and not x.scene.fabric.moving and not x.running(D)),
    Point("decoding", lambda x: len(x.answer.tokens) >= 3),
    Point("the last token is on its way",
          lambda x: any(c.finish for c in x.on_its_way(TokenChunk)),  # type: ignore[attr-defined]
          may_finish=True),
    Point("the prompt is computed on the decode worker", lambda x: x.running(D) and not x.answer.tokens,
          slowly(D), local=True),
    Point("several answers, their KV moves", lambda x: len(x.answer.choices) == 3 and x.scene.fabric.moving,
          num_choices=3),
    Point("several answers are decoded", lambda x: len(x.answer.choices.get(2, ())) >= 3, num_choices=3),
    Point("it moves to another decode worker",
          lambda x: x.scene.network.open_calls("decode-0", "decode-1", "prefill") and x.scene.fabric.moving,
          drained_while_decoding, num_decode=2),
]
NAMED = [pytest.param(point, id=point.name) for point in POINTS]


def live(point: Point, deadline_s: float, story: Callable[[Life, asyncio.Task[Answer]], object]) -> None:
    """Play a request to the point, then the story; afterwards everything is free within FREE_S."""

    async def told(s: Scene) -> None:
        life = Life(s)
        point.prepare(life)
        await asyncio.sleep(0.02)
        asked = dataclasses.replace(
            request("r", range(30), max_tokens=10, deadline_s=deadline_s),
            choices=tuple(Choice(i) for i in range(point.num_choices)),
        )
        client = asyncio.create_task(s.ask(asked, life.answer))
        deadline = s.loop.now + REACHED_BY_S
        while not point.there(life):
            assert s.loop.now < deadline, f"never came there; {life.answer}"
            assert not client.done(), f"it was over before; {life.answer}"
            await asyncio.sleep(LOOK_S)
        await story(life, client)  # type: ignore[misc]
        for other in life.others:
            await gone(other)
        point.repair(life)
        free_by = s.loop.now + FREE_S
        while held := life.held():
            assert s.loop.now < free_by, "\n".join(held)
            await asyncio.sleep(LOOK_S)

    play(1, slow_wire(point.num_decode, point.local), told)


@pytest.mark.parametrize("point", NAMED)
def test_a_client_that_goes_away_frees_both_sides_at_once(point: Point) -> None:
    async def leave(life: Life, client: asyncio.Task[Answer]) -> None:
        await gone(client)

    live(point, 30.0, leave)


@pytest.mark.parametrize("point", NAMED)
def test_a_deadline_frees_both_sides_at_once(point: Point) -> None:
    """The same life twice: the second time its deadline is where the point was in the first."""
    reached_s: list[float] = []

    async def measure(life: Life, client: asyncio.Task[Answer]) -> None:
        reached_s.append(life.scene.loop.now)
        await gone(client)

    async def wait(life: Life, client: asyncio.Task[Answer]) -> None:
        assert life.scene.loop.now == reached_s[0], "the same life"
        answer = await client
        if not point.may_finish:
            assert isinstance(answer.error, DeadlineExceeded), answer
        assert answer.took_s <= deadline_s + life.scene.config.router.heartbeat_s + 0.1

    live(point, 30.0, measure)
    deadline_s = reached_s[0] - 2.02  # asked at 2.02
    live(point, deadline_s + 1e-6, wait)
