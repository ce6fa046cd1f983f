"""What must hold in every simulated run, whatever happened in it.

    each chunk      indexes contiguous, tokens a prefix of the pure function of the request
    each request    ends exactly once, by its deadline; a finished one has all its tokens and the right reason, and is
                    accounted once, with the tokens its client got; it fails only in ways its client, its deadline, its
                    router's end or a full fleet can explain
    each turn       the ledger of every worker that ran sums to its pool
    each byte       lands and is read where it belongs (sim/provenance.py)
    its 64th turns  full scan: pool invariants, every reference with an owner we can name, no block that a transport
                    may still write to in anybody else's hands, no work for a request that is over, queues in bounds
    healed          a request through each router is answered promptly
    at the end      nothing lent, quarantined or active; no task left behind; no exception that nobody took

Owns the records of the clients. Does not steer the world.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from baton.core.config import Config
from baton.core.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    Overloaded,
    PeerLost,
    RequestQuarantined,
)
from baton.core.messages import TokenChunk
from baton.core.request import FinishReason, SampledToken
from baton.models.hash_model import Answer, expected
from baton.router.placing import PLACE_WAIT_S, NobodyReady
from baton.router.quarantine import MAX_CRASHES
from baton.router.trace import TraceRecord
from baton.sim.machine import Machine
from baton.sim.workload import Job
from baton.worker.node import WorkerNode

FULL_SCAN_TURNS = 64
DEADLINE_GRACE_S = 1.0
LEFTOVER_S = 15.0
"""Longest that a worker may work for a request that is over: keep-alive (8 s), death (3 s), retransmissions."""


class OracleFailure(AssertionError):
    """Something that must never happen did."""


@dataclass(slots=True)
class Seen:
    """What came of one choice, and what must come."""

    right: Answer
    tokens: list[SampledToken] = field(default_factory=list)
    finish: FinishReason | None = None


@dataclass(slots=True)
class Record:
    """What one client saw."""

    job: Job
    started_s: float
    choices: dict[int, Seen]
    error: BatonError | None = None
    ended_s: float | None = None
    left: bool = False
    """The client went away by itself."""
    trouble_s: Callable[[float, float], float] = lambda since, until: 0.0
    """For so long, between two times, its router could not act: nobody can blame it for being late."""
    router_lost: bool = False
    """Its router died under it, or was out of its reach."""
    last_seen: str = ""
    """The worker that it ran on."""
    heard: dict[int, int] = field(default_factory=dict)
    """Tokens of each choice that came over the connection that it has now."""
    over: set[int] = field(default_factory=set)
    """Choices that have ended on it."""
    crashes: list[str] = field(default_factory=list)
    """Boots that crashed while they computed for it."""
    accounts: list[TraceRecord] = field(default_factory=list)
    """What its router wrote in its own log."""

    @property
    def request_id(self) -> str:
        return self.job.request.request_id

    @property
    def num_tokens(self) -> int:
        return sum(len(seen.tokens) for seen in self.choices.values())

    @property
    def is_answered(self) -> bool:
        return all(seen.finish is not None for seen in self.choices.values())

    @property
    def outcome(self) -> str:
        if self.is_answered:
            return "answered"
        if self.left:
            return "left"
        return self.error.code if self.error else "open"


class Oracle:
    def __init__(self, config: Config, max_model_len: int, delays_s: Callable[[], float] = lambda: 0.0) -> None:
        """`delays_s`: how long a message may have been under way, one way."""
        self.records: dict[str, Record] = {}
        self._delays_s = delays_s
        self._config = config
        self._max_model_len = max_model_len
        self._crashed: set[str] = set()
        self._turns: dict[str, int] = {}

    @property
    def grace_s(self) -> float:
        """How late an end may be: the worker's word, else the router's own end and its word."""
        return DEADLINE_GRACE_S + 2 * self._delays_s()

    # ---- clients -------------------------------------------------------------------------------------------------

    def begins(self, job: Job, now: float, trouble_s: Callable[[float, float], float] | None = None) -> Record:
        record = Record(job, now, {a.index: Seen(a) for a in expected(job.request, self._max_model_len)})
        record.trouble_s = trouble_s or record.trouble_s
        require(record.request_id not in self.records, f"{record.request_id} was asked twice")
        self.records[record.request_id] = record
        return record

    def chunk(self, record: Record, chunk: TokenChunk) -> None:
        name, seen = f"{record.request_id}[{chunk.choice}]", record.choices.get(chunk.choice)
        require(chunk.request_id == record.request_id and seen is not None, f"{name} got {chunk}")
        assert seen is not None
        at, have = record.heard.get(chunk.choice, 0), len(seen.tokens)
        require(record.ended_s is None and chunk.choice not in record.over, f"{name} got {chunk} after its end")
        require(chunk.first_index == at, f"{name}: chunk at index {chunk.first_index}, expected {at}: {chunk}")
        record.heard[chunk.choice] = at + len(chunk.token_ids)
        logprobs = chunk.logprobs or (None,) * len(chunk.token_ids)
        said = [SampledToken(t, p) for t, p in zip(chunk.token_ids, logprobs, strict=True)]
        require(said[: have - at] == seen.tokens[at : at + len(said)], f"{name} said {seen.tokens}, and then {chunk}")
        seen.tokens += said[have - at :]
        right = seen.right.tokens[: len(seen.tokens)]
        require(tuple(seen.tokens) == right, f"{name} answered {seen.tokens}, an undisturbed run {seen.right.tokens}")
        seen.finish = chunk.finish
        if chunk.finish is not None:
            record.over.add(chunk.choice)
            whole = len(seen.tokens) == len(seen.right.tokens) and seen.finish is seen.right.finish
            require(whole, f"{name} finished as {seen.finish} with {seen.tokens}, an undisturbed run as {seen.right}")

    def ends(self, record: Record, now: float) -> None:
        """Called once by the client, when its call is over."""
        name, job = record.request_id, record.job
        require(record.ended_s is None, f"{name} ended twice")
        record.ended_s = now
        took = now - record.started_s
        waited = job.read_delay_s * (record.num_tokens + 1)
        limit = job.request.deadline_s + waited + self.grace_s + record.trouble_s(record.started_s, now)
        require(took <= limit, f"{name} ended after {took:.2f} s, its limit was {limit:.2f}")
        if not (record.is_answered or record.left):
            late = job.may_miss_deadline and isinstance(record.error, DeadlineExceeded | Cancelled | Overloaded)
            crowded = isinstance(record.error, Overloaded | NobodyReady) and took >= PLACE_WAIT_S
            cut_off = record.router_lost and isinstance(record.error, PeerLost)
            excused = late or crowded or cut_off or self._is_rightly_quarantined(record)
            require(excused, f"{name} failed with {record.error!r} after {record.num_tokens} tokens")

    def _is_rightly_quarantined(self, record: Record) -> bool:
        """It names two boots, and both did crash; or its like was."""
        if not isinstance(record.error, RequestQuarantined):
            return False
        named = {boot for boot in self._crashed if boot in record.error.message}
        return len(named) >= MAX_CRASHES or any(self._is_alike(record, other) for other in self.records.values())

    @staticmethod
    def _is_alike(one: Record, other: Record) -> bool:
        a, b = one.job.request, other.job.request
        alike = (a.tenant, a.prompt, a.sampling) == (b.tenant, b.prompt, b.sampling)
        return alike and one is not other and isinstance(other.error, RequestQuarantined)

    def accounted(self, account: TraceRecord) -> None:
        """A router closed its books on a request."""
        record = self.records.get(account.request_id)
        if record is not None:
            record.accounts.append(account)

    def books_balance(self) -> None:
        """At the end: usage is what was delivered, once. A router that died took its books with it."""
        for record in self.records.values():
            name, accounts = record.request_id, record.accounts
            require(record.ended_s is not None, f"{name} never ended")
            turned_away = record.left or isinstance(record.error, Overloaded)  # nothing was begun
            require(len(accounts) == 1 or record.router_lost or (turned_away and not accounts),
                    f"{name} is in the books {len(accounts)} times")
            for account in accounts:
                prompt = len(record.job.request.prompt)
                require(account.num_prompt_tokens == prompt and account.cached_tokens <= prompt,
                        f"{name} has {prompt} prompt tokens, its router wrote {account}")
            got, told = record.num_tokens, [account.num_output_tokens for account in accounts]
            if record.is_answered:  # whoever read on elsewhere may stand in two books, in one with all
                require(not told or max(told) == got, f"{name} got {got} tokens, its routers wrote {told}")
            elif not record.router_lost:  # else what its first router gave died with that
                require(all(output >= got for output in told), f"{name} got {got} tokens, its router wrote {told}")

    # ---- workers -------------------------------------------------------------------------------------------------

    def crashed(self, boot_id: str, request_ids: Iterable[str]) -> None:
        """A worker dies, and everybody can tell, with these requests on board."""
        self._crashed.add(boot_id)
        for request_id in request_ids:
            if (record := self.records.get(request_id)) is not None and record.ended_s is None:
                record.crashes.append(boot_id)
                require(len(record.crashes) <= MAX_CRASHES, f"{request_id} was aboard {record.crashes} as they crashed")

    def turn(self, machines: Iterable[Machine], now: float) -> None:
        for machine in machines:
            node, name = machine.node, machine.worker_id
            if node is None:
                continue
            ledger, total = node.parts.pool.ledger(), node.parts.pool.num_blocks
            if ledger.total != total:
                raise OracleFailure(f"{name}: {ledger} sums to {ledger.total}, the pool has {total} blocks")
            self._turns[name] = self._turns.get(name, 0) + 1
            if self._turns[name] % FULL_SCAN_TURNS == 0:
                self.scan(node)
                self._nothing_runs_for_the_dead(machine, node, now)

    def scan(self, node: WorkerNode) -> None:
        name, pool = node.info.worker_id, node.parts.pool
        try:
            node.check_ledger()
        except AssertionError as e:
            raise OracleFailure(f"{name}: {e}") from e
        for block in node.parts.puller.in_flight_blocks():
            refs, _, quarantined = pool.pins(block)
            require(refs > 0 or quarantined, f"{name}: block {block} is free, and a pull may still write to it")
        load, limits = node.load(), node.parts.scheduler.limits
        require(load.num_waiting <= limits.max_waiting, f"{name} lets {load.num_waiting} wait of {limits.max_waiting}")
        require(load.num_running <= limits.max_sequences, f"{name} runs {load.num_running} of {limits.max_sequences}")

    def _nothing_runs_for_the_dead(self, machine: Machine, node: WorkerNode, now: float) -> None:
        """No sequence of a request that is past its deadline, or long over for its client. A step that the runner took
        in time may take as long as it does."""
        assert machine.runner is not None
        given_s = machine.runner.began_s
        for seq in node.parts.scheduler.sequences():
            record = self.records.get(asked_as(seq.request_id))
            if record is None:
                continue
            deadline = record.started_s + record.job.request.deadline_s + record.trouble_s(record.started_s, now)
            runs = f"{machine.worker_id} runs {seq.request_id}"
            late_s = given_s - max(deadline, machine.thawed_s)
            require(late_s <= self.grace_s, f"{runs} {late_s:.2f} s after its deadline")
            if record.ended_s is not None:
                over_s = now - max(record.ended_s, machine.thawed_s)
                require(over_s <= LEFTOVER_S, f"{runs}, which was over {over_s:.2f} s ago")

    def quiet(self, node: WorkerNode) -> None:
        """After everything has ended and healed."""
        self.scan(node)
        name, ledger, load = node.info.worker_id, node.parts.pool.ledger(), node.load()
        held = (ledger.quarantined, ledger.lent, ledger.active)
        require(held == (0, 0, 0), f"{name} still holds (quarantined, lent, active) = {held} blocks: {ledger}")
        require(load.num_running + load.num_waiting == 0, f"{name} still runs {load}")
        require(load.available_blocks == load.total_blocks, f"{name} keeps credit for nobody: {load}")


def asked_as(engine_id: str) -> str:
    """The client's name of a request that a worker's engine knows as `engine_id`."""
    return engine_id.partition("@")[0]


def require(holds: object, message: str) -> None:
    if not holds:
        raise OracleFailure(message)
