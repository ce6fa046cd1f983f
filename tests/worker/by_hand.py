"""Workers on the simulated network, and a router by hand: a test says what is submitted where, and sees every chunk."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from baton.core.config import load
from baton.core.messages import Cancel, Hello, Resume, StepMessage, Submit, TakeFrom, TokenChunk, UpMessage
from baton.core.request import Choice, FinishReason, Request, SamplingParams, TokenLogprob
from baton.core.worker import Role, Route, WorkerInfo, WorkerLoad
from baton.engine.hash_runner import StepCosts
from baton.models.hash_model import expected
from baton.sim.loop import SimLoop, SimProcess, run
from baton.sim.machine import Builders, Machine, SimRegistry, Site, Terms
from baton.sim.network import Conditions, SimNetwork, closing
from baton.sim.trace import Trace
from baton.sim.transport import Fabric, WireSpeed

BLOCK = 4
MAX_MODEL_LEN = 96
HAND = "hand"
PROMPT = tuple(range(1, 31))  # 30 tokens: 7 full blocks and a half one
ALIGNED = tuple(range(1, 33))
PLAIN: dict[str, object] = {}
FANCY = {"temperature": 0.8, "seed": 7, "frequency_penalty": 0.5, "presence_penalty": 0.25, "repetition_penalty": 1.2,
         "logit_bias": ((5, 2.0),), "logprobs": 3}


def terms(num_blocks: int = 60, bytes_per_s: float = 1e6, max_step_tokens: int = 256, **handoff: object) -> Terms:
    settings = {"lease_ttl_s": 3, "pull_timeout_s": 1, "alive_interval_s": 0.2, "peer_timeout_s": 1, "probe_bytes": 256,
                "release_timeout_s": 0.5, "quarantine_max_s": 4, **handoff}
    config = load({}, [
        *(f"handoff.{name}={value}" for name, value in settings.items()),
        f"prefill.max_chunk_tokens={2 * BLOCK}", f"decode.max_chunk_tokens={2 * BLOCK}",
        f"prefill.max_step_tokens={max_step_tokens}", f"decode.max_step_tokens={max_step_tokens}",
    ])
    return Terms(BLOCK, MAX_MODEL_LEN, dict.fromkeys(Role, num_blocks), config, StepCosts(), Conditions(loss=0.0),
                 WireSpeed(bytes_per_s=bytes_per_s))


def request(request_id: str, prompt: Sequence[int], max_tokens: int = 6, n: int = 1, **sampling: object) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling)  # type: ignore[arg-type]
    return Request(request_id, tuple(prompt), params, tuple(Choice(i) for i in range(n)), deadline_s=60.0)


@dataclasses.dataclass
class Heard:
    """What one worker's stream has said of one attempt."""

    tokens: dict[int, list[int]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    logprobs: dict[int, list[TokenLogprob]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    first_index: dict[int, int] = dataclasses.field(default_factory=dict)
    finish: dict[int, FinishReason] = dataclasses.field(default_factory=dict)
    last: TokenChunk | None = None
    news: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def take(self, chunk: TokenChunk) -> None:
        start = self.first_index.setdefault(chunk.choice, chunk.first_index)
        have = self.tokens[chunk.choice]
        assert chunk.first_index == start + len(have), f"gap or double: {chunk}, have {have} from {start}"
        have.extend(chunk.token_ids)
        self.logprobs[chunk.choice].extend(chunk.logprobs)
        if chunk.finish is not None:
            assert chunk.choice not in self.finish, f"{chunk.choice} ended twice"
            self.finish[chunk.choice] = chunk.finish
        self.last = chunk
        self.news.set()
        self.news = asyncio.Event()

    async def until(self, holds: Callable[[Heard], bool]) -> None:
        async with asyncio.timeout(60.0):
            while not holds(self):
                await self.news.wait()

    async def ended(self, num_choices: int = 1) -> None:
        """All choices have their finish, or the attempt failed."""
        await self.until(lambda h: len(h.finish) >= num_choices or h.failed)

    @property
    def failed(self) -> bool:
        return bool(self.last and self.last.finish in (FinishReason.ERROR, FinishReason.CANCELLED))


class Stream:
    """Our stream to one worker."""

    def __init__(self, machine: Machine, network: SimNetwork, hello: Hello) -> None:
        assert machine.node is not None
        self.info: WorkerInfo = machine.node.info
        self.load = WorkerLoad()
        self.heard: dict[tuple[str, int], Heard] = defaultdict(Heard)
        self._up: asyncio.Queue[UpMessage] = asyncio.Queue()
        self._up.put_nowait(hello)
        self._down = network.dial(HAND)(self.info).stream(self._messages())
        self.reading: asyncio.Task[None] | None = None

    async def _messages(self) -> AsyncIterator[UpMessage]:
        while True:
            yield await self._up.get()

    async def read(self) -> None:
        async with closing(self._down):
            async for message in self._down:
                self._take(message)

    async def lose(self) -> None:
        """The stream is gone, with all that was on its way; returns when the worker has heard of it."""
        assert self.reading is not None
        self.reading.cancel()
        await asyncio.wait([self.reading])
        await asyncio.sleep(0.05)

    def _take(self, message: StepMessage) -> None:
        self.load = message.load
        for chunk in message.chunks:
            self.heard[chunk.request_id, chunk.epoch].take(chunk)

    def submit(self, r: Request, epoch: int, prefill: Machine | None = None, take_from: TakeFrom | None = None,
               spares: Sequence[Machine] = (), holder: Machine | None = None) -> Heard:
        route = Route(self.info.worker_id, _info(prefill), tuple(_known(m) for m in spares), _info(holder))
        self._up.put_nowait(Submit(r, route, epoch, take_from))
        return self.heard[r.request_id, epoch]

    def resume(self, resume: Resume) -> Heard:
        self._up.put_nowait(resume)
        return self.heard[resume.request_id, resume.epoch]

    def cancel(self, r: Request, epoch: int) -> None:
        self._up.put_nowait(Cancel(r.request_id, epoch))


def _info(machine: Machine | None) -> WorkerInfo | None:
    return None if machine is None else _known(machine)


def _known(machine: Machine) -> WorkerInfo:
    assert machine.node is not None
    return machine.node.info


class Bench:
    """Some prefill and decode workers that run."""

    def __init__(self, loop: SimLoop, world_terms: Terms, num_prefill: int, num_decode: int) -> None:
        self.loop = loop
        self.trace = Trace(loop.time, None)
        self.network = SimNetwork(loop, self.trace, world_terms.conditions)
        self.fabric = Fabric(loop, self.trace, world_terms.speed)
        self.fabric.reaches = self.network.reaches
        self.failures: list[str] = []
        site = Site(loop, self.trace, self.network, self.fabric, SimRegistry(self.network), self.failures.append)

        def machine(role: Role, number: int) -> Machine:
            return Machine(site, world_terms, f"{role}-{number}", role, Builders())

        self.prefill = [machine(Role.PREFILL, i) for i in range(num_prefill)]
        self.decode = [machine(Role.DECODE, i) for i in range(num_decode)]
        self.hand = SimProcess(loop, HAND)
        self.epochs = itertools.count(1)

    @property
    def machines(self) -> list[Machine]:
        return self.prefill + self.decode

    async def start(self) -> None:
        for machine in self.machines:
            machine.start()
        await asyncio.sleep(1.0)

    def stream(self, machine: Machine, hello: Hello | None = None) -> Stream:
        stream = Stream(machine, self.network, hello or Hello(HAND))
        stream.reading = self.hand.spawn(stream.read(), f"stream to {machine.worker_id}")
        return stream

    def computed(self, machine: Machine) -> float:
        """Tokens this worker has computed, prompt and output."""
        assert machine.node is not None
        return machine.node.parts.metrics.value("baton_step_tokens_total")

    def counter(self, machine: Machine, name: str, **labels: str) -> float:
        assert machine.node is not None
        return machine.node.parts.metrics.value(name, **labels)

    async def unhealthy(self, machine: Machine) -> str | None:
        """As the machine finds itself: on its own clock."""

        async def ask() -> str | None:
            assert machine.node is not None
            return machine.node.unhealthy()

        assert machine.process is not None
        return await machine.process.spawn(ask(), "health")

    async def quiet(self) -> None:
        """Leases and quarantine have had their time: nothing may be held anywhere."""
        await asyncio.sleep(10.0)
        assert not self.failures, self.failures
        for machine in self.machines:
            if machine.node is not None and machine.alive:
                machine.node.check_ledger()
                ledger, load = machine.node.parts.pool.ledger(), machine.node.load()
                assert (ledger.quarantined, ledger.lent, ledger.active) == (0, 0, 0), f"{machine.worker_id}: {ledger}"
                assert load.num_running + load.num_waiting == 0, f"{machine.worker_id}: {load}"
                assert load.available_blocks == load.total_blocks, f"{machine.worker_id} keeps credit: {load}"


Story = Callable[[Bench], Awaitable[None]]


def play(
    story: Story, num_prefill: int = 1, num_decode: int = 1, world_terms: Terms | None = None, seed: int = 1
) -> None:
    """Run a story, then check that nothing is held."""

    async def main(loop: SimLoop) -> None:
        bench = Bench(loop, world_terms or terms(), num_prefill, num_decode)
        await bench.start()

        async def told() -> None:
            await story(bench)
            await bench.quiet()

        await bench.hand.spawn(told(), "story")

    run(seed, main)


def check(r: Request, heard: Heard) -> None:
    """Every choice, from what was delivered before, log-probs and all."""
    for choice, answer in zip(r.choices, expected(r, MAX_MODEL_LEN), strict=True):
        start = len(choice.delivered)
        assert heard.tokens[choice.index] == [t.token_id for t in answer.tokens[start:]], f"choice {choice.index}"
        assert heard.finish[choice.index] is answer.finish
        if r.sampling.logprobs is not None:
            assert heard.logprobs[choice.index] == [t.logprob for t in answer.tokens[start:]]
        else:
            assert not heard.logprobs[choice.index]
