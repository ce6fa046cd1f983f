"""One worker: the five calls that both roles serve, around one step loop.

Owns the requests on this worker (an `Intake` per submit, a lending per prefill call), the streams of the routers
and the timers. Does not know its role (a `RolePolicy` is injected), text, or how calls reach it (`wire/` or the
simulated network adapt it).

Life of the node: `run()` turns the step loop, the quarantine timer and the lease timer until it is cancelled;
everything else happens in calls.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING

from baton.core.config import Config
from baton.core.errors import BatonError, Cancelled, Forgotten, InvalidRequest, NotFound, Overloaded
from baton.core.handoff import LendMode, PrefillCall, PrefillEvent, ReleaseAnswer
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
from baton.core.request import FinishReason, Request
from baton.core.sequence import SequenceState, new_sequence
from baton.core.services import Dial
from baton.core.step import Runner
from baton.core.worker import WorkerInfo, WorkerLoad
from baton.engine.block_pool import BlockPool
from baton.engine.scheduler import Scheduler
from baton.kv_transfer.framing import log_bug
from baton.kv_transfer.lease import LeaseTable
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.puller import Puller
from baton.worker.giving import Giving
from baton.worker.intake import Intake
from baton.worker.ledger import check_ledger
from baton.worker.lending import CachedLending, ComputeLending
from baton.worker.outbox import Outbox
from baton.worker.parts import WorkerParts
from baton.worker.policy import RolePolicy
from baton.worker.steps import StepLoop
from baton.worker.token_log import TokenLog, TokenLogs, forgotten

if TYPE_CHECKING:  # a simulated worker has none, and needs no numpy
    from baton.kv_transfer.landing import Landings

log = logging.getLogger(__name__)

LEDGER_SUM_S = 1.0
LEDGER_SCAN_S = 10.0


@dataclass(frozen=True, slots=True)
class NodeParts:
    """What a node is built of; assembled in worker/assembly.py or by the simulator."""

    pool: BlockPool
    scheduler: Scheduler
    runner: Runner
    memory: KVMemory
    leases: LeaseTable
    puller: Puller
    dial: Dial
    metrics: Metrics
    landings: Landings | None = None


class WorkerNode:
    """Implements core.services.WorkerService."""

    def __init__(self, info: WorkerInfo, parts: NodeParts, policy: RolePolicy, config: Config) -> None:
        loop = asyncio.get_running_loop()
        self.info = info
        self.parts = parts
        self._config = config
        self.become(policy)
        self._steps = StepLoop(parts.scheduler, parts.runner, parts.metrics, self._after_step)
        self._numbers = itertools.count(1)
        self._intakes: dict[TokenLog, Intake] = {}
        self._logs = TokenLogs(config.router.orphan_window_s)
        self._outboxes: dict[Outbox, None] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._num_calls = 0
        """Prefill calls open."""
        self._draining = False
        self._broken_ledger = ""
        """What is wrong with it, once something is."""
        self._shared = WorkerParts(
            info.worker_id, info.boot_id, info.capability, self._steps, parts.pool, parts.memory, parts.leases,
            parts.puller, parts.dial, parts.metrics, loop.time, config.handoff, self._spawn,
            parts.landings,
        )

    def become(self, policy: RolePolicy) -> None:
        """Take another role without restart: only numbers change."""
        self.parts.scheduler.limits = policy.limits

    async def run(self) -> None:
        """Until cancelled. An exception here is a bug: the process must end (its pool restarts it)."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._steps.run())
                tasks.create_task(self.parts.puller.run())
                if self.parts.landings is not None:
                    tasks.create_task(self.parts.landings.run())
                tasks.create_task(self._expire_leases())
                tasks.create_task(self._watch_ledger())
        finally:
            for intake in list(self._intakes.values()):
                intake.end(Cancelled(f"{self.info.worker_id} is shutting down"))
            for outbox in self._outboxes:
                outbox.close()

    async def meet(self, peer: WorkerInfo) -> None:
        """Measure the ways to a peer before the first request needs one. Raises what the handshake raises."""
        await self._shared.reader_of(peer).connect(peer)

    # ---- WorkerService -------------------------------------------------------------------------------------------

    async def stream(self, up: AsyncIterator[UpMessage]) -> AsyncIterator[StepMessage]:
        outbox = Outbox(self._compose)
        self._outboxes[outbox] = None
        reader = asyncio.get_running_loop().create_task(self._read_up(up, outbox))
        try:
            while (message := await outbox.next(self._config.router.heartbeat_s)) is not None:
                yield message
        finally:
            reader.cancel()
            self._outboxes.pop(outbox, None)
            outbox.closed = True
            asyncio.get_running_loop().call_later(self._config.router.orphan_window_s, self._end_orphans, outbox)
            await asyncio.wait([reader])  # whoever gave us `up` closes it next, and nobody may be inside it then

    async def prefill(self, call: PrefillCall) -> AsyncIterator[PrefillEvent]:
        self._num_calls += 1
        events: AsyncGenerator[PrefillEvent, None] | None = None
        try:
            events = self._lending(call).events()
            async for event in events:
                yield event
        except Overloaded:
            self.parts.metrics.inc("baton_refusals_total", reason="prefill_queue_full")
            raise
        finally:
            self._num_calls -= 1
            if events is not None:
                await events.aclose()

    def _lending(self, call: PrefillCall) -> ComputeLending | CachedLending | Giving:
        """Raises Overloaded and InvalidRequest for what cannot be computed here, NotFound for what does not run
        here."""
        parts = self._shared
        if call.mode is LendMode.TAKE_OVER:
            return Giving(parts, call, self._running_intake(call))
        if call.mode is LendMode.COMPUTE and self._draining:
            raise self._drained_away()
        num_delivered = max(len(c.delivered) for c in call.request.choices)
        seq = self._sequence(call.request, call.epoch, max_output_tokens=num_delivered + 1)
        if call.mode is LendMode.CACHED:
            return CachedLending(parts, call, seq)
        lease = parts.leases.grant(call, parts.worker_id, parts.boot_id, parts.clock())
        return ComputeLending(parts, call, seq, lease, lambda: self._tell_taken(call.router_id, call.epoch))

    def _tell_taken(self, router_id: str, epoch: int) -> None:
        """Its router with whatever is said next, the others soon."""
        for outbox in self._outboxes:
            if outbox.router_id == router_id:
                outbox.take(epoch)
            else:
                outbox.flush_soon()

    def _running_intake(self, call: PrefillCall) -> Intake:
        running = call.running
        if running is not None:
            intake = self._intake(call.request.request_id, running.router_id, running.epoch)
            if intake is not None:
                return intake
        raise NotFound(f"request {call.request.request_id} does not run on {self.info.worker_id} (any more)")

    async def lease(self, lease_id: str, release: bool, timeout_s: float) -> ReleaseAnswer:
        now = asyncio.get_running_loop().time()
        if not release:
            return self.parts.leases.renew(lease_id, now)
        answer = self.parts.leases.release(lease_id, now)
        self._steps.wake()
        return answer

    async def drain(self, on: bool, timeout_s: float) -> WorkerStatus:
        if on != self._draining:
            log.info("%s %s", self.info.worker_id, "is draining" if on else "takes requests again")
        self._draining = on
        for outbox in self._outboxes:
            outbox.flush(even_empty=True)
        return await self.status(timeout_s)

    @property
    def is_drained(self) -> bool:
        """Nothing runs here and nobody pulls from here."""
        busy = self._intakes or self._num_calls or self.parts.leases.num_live or self.parts.scheduler.has_work
        return self._draining and not busy

    async def status(self, timeout_s: float) -> WorkerStatus:
        self._gauge_ledger()
        return WorkerStatus(self.info, self.load(), self.parts.pool.ledger(), self.parts.metrics.rendered())

    # ---- requests ------------------------------------------------------------------------------------------------

    async def _read_up(self, up: AsyncIterator[UpMessage], outbox: Outbox) -> None:
        try:
            async for message in up:
                match message:
                    case Hello():
                        self._broadcast_events()
                        outbox.greet(message.router_id, self.parts.pool.snapshot())
                        self._come_back(message, outbox)
                    case Submit():
                        self._submit(message, outbox)
                    case Resume():
                        self._resume(message, outbox)
                    case Cancel():
                        intake = self._intake(message.request_id, outbox.router_id, message.epoch)
                        if intake is not None and intake.log.outbox is outbox:
                            intake.end(Cancelled(message.reason))
        except BatonError as e:
            log.info("a router's stream ended: %s", e.message)
        except Exception:
            log.exception("a router's message broke its stream")
        finally:
            outbox.close()

    def _submit(self, submit: Submit, outbox: Outbox) -> None:
        self._tell_taken(outbox.router_id, submit.epoch)
        request, log = submit.request, TokenLog(submit, outbox)
        try:
            if self._intake(request.request_id, outbox.router_id, submit.epoch) is not None:
                raise InvalidRequest(f"request {request.request_id} attempt {submit.epoch} is already here")
            if self._draining:
                raise self._drained_away()
            seq = self._sequence(request, submit.epoch, request.sampling.max_tokens)
            intake = self._intakes[log] = Intake(self._shared, submit, seq, log, self._forget)
            intake.begin()
            self._logs.open(log)
        except BatonError as e:
            self._intakes.pop(log, None)
            if isinstance(e, Overloaded):
                reason = "draining" if self._draining else "no_credit" if submit.route.prefill else "queue_full"
                self.parts.metrics.inc("baton_refusals_total", reason=reason)
            first, choice = len(request.choices[0].delivered), request.choices[0].index
            outbox.put(
                TokenChunk(
                    request.request_id, submit.epoch, first, (), FinishReason.ERROR, choice,
                    error_code=e.code, error_message=e.message,
                )
            )
            outbox.flush()

    def _drained_away(self) -> Overloaded:
        return Overloaded(f"{self.info.worker_id} is draining. Try another worker.")

    def _sequence(self, request: Request, epoch: int, max_output_tokens: int) -> SequenceState:
        """The engine's id is this worker's own: attempts, routers and clients may bring the same request id at once.
        The sampler's key stays the request's. Raises InvalidRequest when no token of output fits."""
        limit = self.info.capability.max_model_len
        output = min(max_output_tokens, limit - len(request.prompt))
        num_delivered = max(len(c.delivered) for c in request.choices)
        if output <= num_delivered:
            raise InvalidRequest(
                f"{len(request.prompt)} prompt tokens, {num_delivered} tokens delivered and {output} allowed: "
                f"nothing is left to generate. This worker holds {limit} tokens of prompt and output together."
            )
        engine_id = f"{request.request_id}@{epoch}#{next(self._numbers)}"
        attempt = dataclasses.replace(request, request_id=engine_id, sampling=request.seeded_sampling)
        return new_sequence(attempt, epoch, self.parts.pool.block_size, output)

    def _intake(self, request_id: str, router_id: str, epoch: int) -> Intake | None:
        log = self._logs.find(request_id, router_id, epoch)
        return None if log is None else self._intakes.get(log)

    def _forget(self, intake: Intake) -> None:
        if self._intakes.pop(intake.log, None) is not None:
            self._logs.ended(intake.log, asyncio.get_running_loop().time())

    # ---- requests that outlive their stream ----------------------------------------------------------------------

    def _come_back(self, hello: Hello, outbox: Outbox) -> None:
        """A router's stream broke, and here it is again: what it still waits for goes on, the rest has ended there."""
        for resume in hello.running:
            log = self._logs.find(resume.request_id, hello.router_id, resume.epoch)
            try:
                if log is None:
                    raise forgotten(resume)
                log.resume(resume, outbox)
            except Forgotten as e:
                self._refuse_to_resume(resume, outbox, e)
        left = [i for i in self._intakes.values() if i.log.outbox.closed and i.log.outbox.router_id == hello.router_id]
        for intake in left:
            intake.end(Cancelled("its router came back and did not ask for it"))

    def _resume(self, resume: Resume, outbox: Outbox) -> None:
        """Another router, or another life of it, goes on with a request."""
        try:
            self._logs.resume(resume, outbox)
        except Forgotten as e:
            self._refuse_to_resume(resume, outbox, e)

    @staticmethod
    def _refuse_to_resume(resume: Resume, outbox: Outbox, error: Forgotten) -> None:
        choice, index = next(iter(resume.next_indexes), (0, 0))
        outbox.put(TokenChunk(resume.request_id, resume.epoch, index, (), FinishReason.ERROR, choice,
                              error_code=error.code, error_message=error.message))
        outbox.flush()

    def _end_orphans(self, outbox: Outbox) -> None:
        """Nobody came for what was left on a stream that ended."""
        for intake in [i for i in self._intakes.values() if i.log.outbox is outbox]:
            intake.end(Cancelled("no router came back for it"))

    # ---- news for the routers ------------------------------------------------------------------------------------

    def _after_step(self) -> None:
        self._broadcast_events()
        for outbox in self._outboxes:
            outbox.flush()

    def _broadcast_events(self) -> None:
        events: tuple[KVEvents, ...] = self.parts.pool.take_events()
        if events:
            for outbox in self._outboxes:
                outbox.put_events(events)

    def _compose(
        self,
        *,
        chunks: tuple[TokenChunk, ...],
        kv_events: tuple[KVEvents, ...],
        snapshot: KVSnapshot | None,
        taken: tuple[int, ...],
        heartbeat: bool,
    ) -> StepMessage:
        if heartbeat:
            self._gauge_ledger()
        said = StepMessage(self.info.boot_id, self.load(), chunks, kv_events, snapshot, taken=taken)
        if heartbeat or snapshot is not None:
            said.ledger, said.pair_bandwidth = self.parts.pool.ledger(), self._shared.bandwidths()
        return said

    def load(self) -> WorkerLoad:
        s, pool = self.parts.scheduler, self.parts.pool
        num_tokens, num_pairs = s.queued_prefill()
        intakes = [i for i in self._intakes.values() if not i.life.ended]
        arriving = [i.leader.num_tokens for i in intakes if not i.life.at("running", "moving_out")]
        return WorkerLoad(
            queued_prefill_tokens=num_tokens,
            queued_prefill_pairs=num_pairs,
            chunk_tokens=min(s.limits.max_step_tokens, s.limits.max_chunk_tokens),
            num_running=s.num_running,
            num_waiting=s.num_waiting,
            num_arriving=len(arriving),
            context_tokens=s.context_tokens + sum(arriving),
            available_blocks=pool.num_available,
            total_blocks=pool.num_blocks,
            model=self._steps.model,
            steps=self._steps.steps,
            oldest_waiting_s=s.oldest_waiting_s(asyncio.get_running_loop().time()),
            draining=self._draining,
            num_lent_out=self.parts.leases.num_live,
        )

    # ---- timers and the ledger -----------------------------------------------------------------------------------

    async def _expire_leases(self) -> None:
        """Leases end by this timer, never by the next request."""
        interval = self._config.handoff.lease_ttl_s / 10
        while True:
            await asyncio.sleep(interval)
            now = asyncio.get_running_loop().time()
            if self.parts.leases.expire(now):
                self._steps.wake()
            self._logs.expire(now)
            self._broadcast_events()

    async def _watch_ledger(self) -> None:
        """The alarm: a block without an owner, or with two, is a bug that must be seen before it is felt. The sum every
        second, all owners every LEDGER_SCAN_S."""
        scan_at = LEDGER_SCAN_S
        loop = asyncio.get_running_loop()
        started = loop.time()
        while not self._broken_ledger:
            await asyncio.sleep(LEDGER_SUM_S)
            self._gauge_ledger()
            ledger = self.parts.pool.ledger()
            if ledger.total != self.parts.pool.num_blocks:
                self._broken_ledger = f"{ledger} sums to {ledger.total}, the pool has {self.parts.pool.num_blocks}"
            elif loop.time() - started >= scan_at:
                scan_at += LEDGER_SCAN_S
                try:
                    self.check_ledger()
                except AssertionError as e:
                    self._broken_ledger = str(e)
        self.parts.metrics.set("baton_ledger_broken", 1)
        log.error("%s must be drained and restarted: its block ledger is broken: %s",
                  self.info.worker_id, self._broken_ledger)

    def unhealthy(self) -> str | None:
        """Why no requests should come here, or None: judged by what the engine gets done, not by whether we answer."""
        stall_s = self._config.handoff.stall_timeout_s
        if self._broken_ledger:
            return f"the block ledger is broken: {self._broken_ledger}"
        if self._steps.stalled_s > stall_s:
            return f"there is work, and no engine step was completed for {self._steps.stalled_s:.0f} s"
        waiting_s = self.parts.scheduler.oldest_waiting_s(asyncio.get_running_loop().time())
        if waiting_s > 2 * stall_s:
            return f"a request has waited {waiting_s:.0f} s for its first step"
        return None

    def _gauge_ledger(self) -> None:
        for state, count in dataclasses.asdict(self.parts.pool.ledger()).items():
            self.parts.metrics.set("baton_blocks", count, state=state)

    def check_ledger(self) -> None:
        """Full scan: every reference in the pool has exactly one owner we can name. O(pool)."""
        in_scheduler = [s.block_table.blocks for s in self.parts.scheduler.sequences()]
        outside = [s.block_table.blocks for s in self._shared.outside.values()]
        check_ledger(
            self.parts.pool, in_scheduler + outside, self.parts.leases.lent(), self.parts.puller.quarantined_blocks()
        )

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(log_bug)
