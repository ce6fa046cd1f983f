"""A fleet for the router's tests: workers that follow a script instead of a model, behind the real WorkerService door.

A token is a function of the request and its index, so that a test can say what a client must have got, whatever
workers died on the way. Runs on the simulator's loop: no test here waits for a clock.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace

from baton.core.block_hash import BlockHash
from baton.core.config import Config, RouterConfig
from baton.core.errors import BatonError, Forgotten, PeerLost
from baton.core.handoff import PrefillCall, PrefillEvent, ReleaseAnswer
from baton.core.layout import Capability, KVLayout
from baton.core.messages import (
    Cancel,
    Hello,
    KVEvents,
    KVSnapshot,
    Resume,
    StepMessage,
    Submit,
    TokenChunk,
    UpMessage,
    WorkerStatus,
)
from baton.core.metrics import Metrics
from baton.core.request import Choice, FinishReason, Request, SamplingParams
from baton.core.services import WorkerService
from baton.core.worker import Ledger, Role, Route, WorkerInfo, WorkerLoad
from baton.router.cost import CostPolicy
from baton.router.dice import Dice
from baton.router.dispatch import Dispatcher
from baton.router.fleet import Fleet
from baton.router.link import Subscription
from baton.router.policy import Policy
from baton.sim.loop import SimLoop, run

EOS = 999
BLOCK = 2
LEDGER = Ledger(0, 0, 0, 0, 64)


def capability(**changes: object) -> Capability:
    plain = Capability(
        "toy",
        "f00d",
        KVLayout(1, 1, 1, BLOCK, "fp32"),
        max_model_len=64,
        num_blocks=64,
        eos_token_ids=(EOS,),
        transports=(("tcp", b""),),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def token(request_id: str, index: int, choice: int = 0) -> int:
    """What every worker says at this index: never EOS."""
    return hashlib.sha256(f"{request_id}/{choice}/{index}".encode()).digest()[0]


def request(
    request_id: str = "r", prompt: Sequence[int] = (1, 2, 3, 4, 5), max_tokens: int = 6, **fields: object
) -> Request:
    return Request(request_id, tuple(prompt), SamplingParams(max_tokens=max_tokens), **fields)  # type: ignore[arg-type]


def expected(r: Request, choice: int = 0) -> list[int]:
    return [token(r.request_id, i, choice) for i in range(r.sampling.max_tokens)]


def with_delivered(r: Request, *delivered: Sequence[int]) -> Request:
    """As a router sends it again: so much of each choice is with the client."""
    return replace(r, choices=tuple(Choice(k, tuple(tokens)) for k, tokens in enumerate(delivered)))


Said = StepMessage | BatonError | None
"""What a stream brings: a message, what it breaks with, or its end in good order."""
Act = TokenChunk | float | BatonError
"""A script's next act: say this, wait so many seconds, or let the stream break with this error."""
Script = Callable[[Submit], Iterator[Act]]


def speak(submit: Submit) -> Iterator[Act]:
    """The well-behaved worker: from where the client is, a token of each choice every 10 ms, the last with the
    finish."""
    r = submit.request
    for i in range(min(len(c.delivered) for c in r.choices), r.sampling.max_tokens):
        yield 0.01
        finish = FinishReason.LENGTH if i == r.sampling.max_tokens - 1 else None
        for choice in (c.index for c in r.choices if len(c.delivered) <= i):
            yield TokenChunk(r.request_id, submit.epoch, i, (token(r.request_id, i, choice),), finish, choice)


def refuse(code: str, message: str = "no") -> Script:
    def script(submit: Submit) -> Iterator[Act]:
        yield TokenChunk(
            submit.request.request_id,
            submit.epoch,
            0,
            (),
            FinishReason.ERROR,
            error_code=code,
            error_message=message,
        )

    return script


def mute(submit: Submit) -> Iterator[Act]:
    yield from ()


@dataclass
class ScriptedWorker:
    """A WorkerService whose requests follow `script`; it heartbeats unless frozen, and refuses streams while down."""

    worker_id: str
    role: Role = Role.DECODE
    capability: Capability = field(default_factory=capability)
    script: Script = speak
    boot_id: str = ""
    frozen: bool = False
    down: bool = False
    unreachable: bool = False
    """Whoever dials it hears nothing at all."""
    load: WorkerLoad = field(default_factory=lambda: WorkerLoad(available_blocks=64, total_blocks=64))
    pairs: tuple[tuple[str, str, float], ...] = ()
    held: dict[BlockHash, None] = field(default_factory=dict)
    seq: int = 0
    submits: list[Submit] = field(default_factory=list)
    cancels: list[Cancel] = field(default_factory=list)
    resumes: list[Resume] = field(default_factory=list)
    """Answered with Forgotten, but for those of what it knows."""
    knows: dict[str, Request] = field(default_factory=dict)
    """It says `script` of these from where it is asked for."""
    routers: list[str] = field(default_factory=list)
    _downs: list[asyncio.Queue[Said]] = field(default_factory=list)

    @property
    def info(self) -> WorkerInfo:
        boot = self.boot_id or f"{self.worker_id}-boot"
        return WorkerInfo(self.worker_id, boot, self.role, f"{self.worker_id}:1", self.capability)

    @property
    def num_streams(self) -> int:
        return len(self._downs)

    def say(self, *chunks: TokenChunk, **fields: object) -> None:
        """One message on every stream."""
        for down in self._downs:
            down.put_nowait(StepMessage(self.info.boot_id, self.load, chunks, **fields))  # type: ignore[arg-type]

    def store(self, *hashes: BlockHash, skip: int = 0) -> None:
        """Blocks enter the prefix map; `skip` events are lost on the way."""
        self.held |= dict.fromkeys(hashes)
        self.seq += 1 + skip
        self.say(kv_events=(KVEvents(self.seq, stored=hashes),))

    def break_streams(self, error: BatonError | None = None) -> None:
        for down in self._downs:
            down.put_nowait(error or PeerLost(f"{self.worker_id} was killed"))

    def die(self) -> None:
        """kill -9: its streams break, its address refuses."""
        self.down = True
        self.break_streams()

    def end_streams(self) -> None:
        """It stops in order."""
        for down in self._downs:
            down.put_nowait(None)

    async def stream(self, up: AsyncIterator[UpMessage]) -> AsyncGenerator[StepMessage, None]:
        if self.down:
            raise PeerLost(f"{self.worker_id} refuses")
        if self.unreachable:
            await asyncio.Event().wait()
        down: asyncio.Queue[Said] = asyncio.Queue()
        self._downs.append(down)
        tasks: list[asyncio.Task[None]] = []
        tasks.append(asyncio.create_task(self._read(up, down, tasks)))
        try:
            while True:
                message = await self._next(down)
                if message is None:
                    return
                if isinstance(message, BatonError):
                    raise message
                yield message
        finally:
            self._downs.remove(down)
            for task in tasks:
                task.cancel()

    async def _next(self, down: asyncio.Queue[Said]) -> Said:
        try:
            async with asyncio.timeout(0.5):
                said = await down.get()
        except TimeoutError:
            said = StepMessage(self.info.boot_id, self.load, ledger=LEDGER, pair_bandwidth=self.pairs)
        while self.frozen:
            await asyncio.sleep(0.02)
        return said

    async def _read(
        self,
        up: AsyncIterator[UpMessage],
        down: asyncio.Queue[Said],
        tasks: list[asyncio.Task[None]],
    ) -> None:
        async for message in up:
            match message:
                case Hello():
                    self.routers.append(message.router_id)
                    snapshot = KVSnapshot(self.seq, tuple(self.held))
                    down.put_nowait(StepMessage(self.info.boot_id, self.load, snapshot=snapshot))
                    for resume in message.running:
                        tasks.append(asyncio.create_task(self._resume(resume, down)))
                case Resume():
                    tasks.append(asyncio.create_task(self._resume(message, down)))
                case Submit():
                    self.submits.append(message)
                    tasks.append(asyncio.create_task(self._perform(message, down)))
                case Cancel():
                    self.cancels.append(message)

    async def _resume(self, resume: Resume, down: asyncio.Queue[Said]) -> None:
        self.resumes.append(resume)
        known = self.knows.get(resume.request_id)
        if known is not None:
            have = [expected(known, choice)[:index] for choice, index in resume.next_indexes]
            await self._perform(Submit(with_delivered(known, *have), Route(self.worker_id, None), resume.epoch), down)
            return
        chunk = TokenChunk(resume.request_id, resume.epoch, 0, (), FinishReason.ERROR, error_code=Forgotten.code)
        down.put_nowait(StepMessage(self.info.boot_id, self.load, (chunk,)))

    async def _perform(self, submit: Submit, down: asyncio.Queue[Said]) -> None:
        for act in self.script(submit):
            if isinstance(act, float):
                await asyncio.sleep(act)
            elif isinstance(act, TokenChunk):
                down.put_nowait(StepMessage(self.info.boot_id, self.load, (act,)))
            else:
                down.put_nowait(act)

    def prefill(self, call: PrefillCall) -> AsyncIterator[PrefillEvent]:
        raise PeerLost("the router never calls prefill")

    async def lease(self, lease_id: str, release: bool, timeout_s: float) -> ReleaseAnswer:
        return ReleaseAnswer(False, "no such lease")

    async def drain(self, on: bool, timeout_s: float) -> WorkerStatus:
        self.load = replace(self.load, draining=on)
        self.say()
        return await self.status(timeout_s)

    async def status(self, timeout_s: float) -> WorkerStatus:
        return WorkerStatus(self.info, self.load, LEDGER, ())


class Listener:
    """Hears one attempt without a dispatcher."""

    def __init__(self, request_id: str, epoch: int) -> None:
        lacks = Resume(request_id, epoch, b"", ((0, 0),))
        self.subscription = Subscription(request_id, epoch, self._put, self._put, lambda: lacks)
        self._heard: asyncio.Queue[TokenChunk | BatonError] = asyncio.Queue()

    def _put(self, news: TokenChunk | BatonError) -> None:
        self._heard.put_nowait(news)

    async def next(self) -> TokenChunk:
        news = await self._heard.get()
        if isinstance(news, BatonError):
            raise news
        return news


class ScriptedFleet:
    """Workers, a registry that lists them, and a router over both. Use as `async with`; closes every stream."""

    def __init__(
        self, *workers: ScriptedWorker, policy: Policy | None = None, router_id: str = "router-0", **router: object
    ) -> None:
        self.workers = {w.worker_id: w for w in workers}
        self.registry_fails: BaseException | None = None
        self.registry_empty = False
        self.unlisted: set[str] = set()
        self.also_listed: tuple[WorkerInfo, ...] = ()
        """Entries of boots that are over."""
        self.config = Config(router=RouterConfig(**router))  # type: ignore[arg-type]
        self.metrics = Metrics()
        self.fleet = Fleet(self._discover, self._dial, self.config, self.metrics, router_id)
        dice = Dice(1)
        self.dispatcher = Dispatcher(
            self.fleet, policy or CostPolicy(self.config.router, dice), self.config, self.metrics, dice=dice
        )

    async def _discover(self) -> Sequence[WorkerInfo]:
        if self.registry_fails is not None:
            raise self.registry_fails
        if self.registry_empty:
            return ()
        return (*self.also_listed, *(w.info for w in self.workers.values() if w.worker_id not in self.unlisted))

    def _dial(self, info: WorkerInfo) -> WorkerService:
        return self.workers[info.worker_id]

    async def __aenter__(self) -> ScriptedFleet:
        self._task = asyncio.create_task(self.fleet.run())
        await asyncio.sleep(0.2)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        assert self._task.cancelled(), self._task.exception()

    def state(self, worker_id: str) -> str:
        return {w.info.worker_id: w.state.value for w in self.fleet.workers()}.get(worker_id, "unknown")

    async def answer(self, r: Request) -> list[int]:
        """All tokens of a request; checks that the pieces fit and that the end is said once, at the end."""
        (tokens,) = (await self.answers(r)).values()
        return tokens

    async def answers(self, r: Request) -> dict[int, list[int]]:
        """The same of each choice."""
        tokens = {c.index: list(c.delivered) for c in r.choices}
        unfinished = set(tokens)
        async for chunk in self.dispatcher.generate(r):
            assert chunk.choice in unfinished, f"{chunk} came after the end"
            assert chunk.first_index == len(tokens[chunk.choice]), f"{chunk} does not follow {tokens}"
            tokens[chunk.choice] += chunk.token_ids
            if chunk.finish is not None:
                unfinished.remove(chunk.choice)
        assert not unfinished, f"the tokens of {unfinished} stopped without an end"
        return tokens


def simulate(main: Callable[[], Coroutine[None, None, None]], seeds: Sequence[int] = (1,)) -> None:
    """Run a test on schedules of these seeds. What nobody caught or closed is a failure too."""
    for seed in seeds:

        async def world(loop: SimLoop) -> None:
            await main()
            assert not loop.problems, loop.problems

        run(seed, world)


def now() -> float:
    return asyncio.get_running_loop().time()


def once(first: Script, then: Script = speak) -> Script:
    """The first submit gets one treatment, later ones another."""
    scripts = iter([first])
    return lambda submit: next(scripts, then)(submit)


def break_after(num_tokens: int, say_finish: bool = True) -> Script:
    """The worker's stream breaks when it has said so many tokens of its own."""

    def script(submit: Submit) -> Iterator[Act]:
        said = 0
        for act in speak(submit):
            if isinstance(act, TokenChunk):
                if said == num_tokens:
                    break
                said += 1
                yield act if say_finish else replace(act, finish=None)
            else:
                yield act
        yield PeerLost("killed")

    return script
