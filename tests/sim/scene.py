"""A simulated world with a story instead of a drawn workload: production router and workers, clients that a test
writes, and workers that break the protocol in the one way that the test is about."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.core.config import Config
from baton.core.errors import BatonError
from baton.core.handoff import PrefillCall, PrefillEvent, ReleaseAnswer
from baton.core.messages import StepMessage, UpMessage, WorkerStatus
from baton.core.request import FinishReason, Request, SamplingParams
from baton.core.services import WorkerService
from baton.core.worker import Role
from baton.models.hash_model import expected
from baton.sim.loop import SimLoop, run
from baton.sim.machine import Machine
from baton.sim.network import Conditions
from baton.sim.plan import Plan, draw_plan
from baton.sim.router_host import RouterHost
from baton.sim.transport import WireSpeed
from baton.sim.world import World

BLOCK = 4
MAX_MODEL_LEN = 48


def plan(
    num_prefill: int = 1, num_decode: int = 1, bytes_per_s: float = 1e5, num_routers: int = 1, **handoff: object
) -> Plan:
    """A quiet world: ample pools, no loss, no faults, every prompt computed on a prefill worker."""
    drawn = draw_plan(0)
    config = drawn.terms.config
    changed: Config = config.model_copy(update={
        "router": config.router.model_copy(update={"local_prefill_max_tokens": 0}),
        "handoff": config.handoff.model_copy(update={"lease_ttl_s": 3.0, "quarantine_cap": 0.5, **handoff}),
        "prefill": config.prefill.model_copy(update={"max_chunk_tokens": 2 * BLOCK}),
    })
    terms = dataclasses.replace(
        drawn.terms, block_size=BLOCK, max_model_len=MAX_MODEL_LEN, num_blocks=dict.fromkeys(Role, 60), config=changed,
        conditions=Conditions(), speed=WireSpeed(bytes_per_s=bytes_per_s),
    )
    return dataclasses.replace(
        drawn, terms=terms, faults=(), num_routers=num_routers, num_prefill=num_prefill, num_decode=num_decode
    )


def request(
    request_id: str, prompt: Sequence[int], max_tokens: int = 6, deadline_s: float = 30.0
) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id, tuple(prompt), sampling, deadline_s=deadline_s)


def right(r: Request) -> list[int]:
    """What the request answers in an undisturbed run."""
    return list(expected(r, MAX_MODEL_LEN)[0].token_ids)


@dataclass
class Answer:
    """What a client has seen so far, and when (virtual seconds)."""

    choices: dict[int, list[int]] = field(default_factory=dict)
    token_s: float | None = None
    """When the first token came."""
    finish: FinishReason | None = None
    """In the last chunk that came."""
    error: BatonError | None = None
    took_s: float = 0.0

    @property
    def tokens(self) -> list[int]:
        """Of the first choice."""
        return self.choices.get(0, [])


Story = Callable[["Scene"], Awaitable[None]]


class Scene(World):
    """A World whose clients are the story. All its checks of the end hold here too."""

    def __init__(self, loop: SimLoop, plan: Plan, story: Story) -> None:
        super().__init__(loop, plan)
        self._story = story

    async def _serve(self) -> None:
        await self._story(self)

    @property
    def router(self) -> RouterHost:
        """The first of them."""
        return next(iter(self.routers.values()))

    async def ask(self, r: Request, answer: Answer | None = None, router: RouterHost | None = None) -> Answer:
        """One client, in its router's process; cancelling it is the client going away. What it gets is in `answer` at
        once."""
        got, started, host = answer or Answer(), self.loop.now, router or self.router
        assert host.process is not None
        call = host.process.spawn(self._ask(r, got, host), r.request_id)
        try:
            await asyncio.wait([call])
        finally:
            call.cancel()
            await asyncio.wait([call])
            got.took_s = self.loop.now - started
        call.result()
        return got

    async def _ask(self, r: Request, got: Answer, router: RouterHost) -> None:
        assert router.dispatcher is not None
        chunks = router.dispatcher.generate(r)
        try:
            async for chunk in chunks:
                got.choices.setdefault(chunk.choice, []).extend(chunk.token_ids)
                got.finish = chunk.finish
                if got.tokens and got.token_s is None:
                    got.token_s = self.loop.now
        except BatonError as e:
            got.error = e
        finally:
            await chunks.aclose()

    def machine(self, role: Role) -> Machine:
        """The only one of its role."""
        (one,) = self.of(role)
        return one

    def replace(self, machine: Machine, service: Callable[[WorkerService], WorkerService]) -> None:
        """From now on `service(node)` answers in the node's place."""
        assert machine.node is not None
        assert machine.process is not None
        self.network.listen(machine.worker_id, service(machine.node), machine.process)

    def counter(self, role: Role, name: str, **labels: str) -> float:
        """Of all workers of a role."""
        return sum(m.node.parts.metrics.value(name, **labels) for m in self.of(role) if m.node is not None)


class Proxy:
    """A WorkerService that passes everything on. Its subclasses do not."""

    def __init__(self, inner: WorkerService) -> None:
        self.inner = inner

    def stream(self, up: AsyncIterator[UpMessage]) -> AsyncIterator[StepMessage]:
        return self.inner.stream(up)

    def prefill(self, call: PrefillCall) -> AsyncIterator[PrefillEvent]:
        return self.inner.prefill(call)

    async def lease(self, lease_id: str, release: bool, timeout_s: float) -> ReleaseAnswer:
        return await self.inner.lease(lease_id, release, timeout_s)

    async def status(self, timeout_s: float) -> WorkerStatus:
        return await self.inner.status(timeout_s)


def play(seed: int, plan: Plan, story: Story, scene: Callable[..., Scene] = Scene) -> None:
    """Raises what the story asserts, and what the world finds at its end."""

    async def main(loop: SimLoop) -> None:
        await scene(loop, plan, story).run()

    run(seed, main)


async def gone(task: asyncio.Task[Any]) -> None:
    """The client goes away; returns when its call is over."""
    task.cancel()
    await asyncio.wait([task])
