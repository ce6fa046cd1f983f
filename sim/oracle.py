"""What must hold in every simulated run, whatever happened in it.

    each chunk      indexes contiguous, tokens a prefix of the pure function of the request (models/hash_model.py)
    each request    ends exactly once, by its deadline; a finished one has all its tokens and the right reason;
                    it fails only in ways its client, its deadline or a full fleet can explain
    each turn       the ledger of every worker that ran sums to its pool
    its 64th turns  full scan: pool invariants, every reference with an owner we can name, no block that a transport
                    may still write to in anybody else's hands
    at the end      nothing lent, quarantined or active; no task left behind; no exception that nobody took

Owns the records of the clients. Does not steer the world.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from baton.core.errors import BatonError, Cancelled, DeadlineExceeded, Overloaded
from baton.core.messages import TokenChunk
from baton.core.request import FinishReason
from baton.models.hash_model import expected
from baton.router.dispatch import PLACE_WAIT_S, NobodyReady
from baton.sim.workload import Job
from baton.worker.node import WorkerNode

FULL_SCAN_TURNS = 64
DEADLINE_GRACE_S = 1.0


class OracleFailure(AssertionError):
    """Something that must never happen did."""


@dataclass(slots=True)
class Record:
    """What one client saw."""

    job: Job
    started_s: float
    expected: tuple[int, ...]
    expected_finish: FinishReason
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    error: BatonError | None = None
    ended_s: float | None = None
    left: bool = False
    """The client went away by itself."""

    @property
    def outcome(self) -> str:
        if self.finish in (FinishReason.STOP, FinishReason.LENGTH):
            return self.finish.value
        if self.left:
            return "left"
        return self.error.code if self.error else "open"


class Oracle:
    def __init__(self, max_model_len: int) -> None:
        self.records: dict[str, Record] = {}
        self.grace_s = DEADLINE_GRACE_S
        """How late an end may be; a fault that stops the clients' own clocks adds to it."""
        self._max_model_len = max_model_len
        self._turns: dict[str, int] = {}

    # ---- clients -------------------------------------------------------------------------------------------------

    def begins(self, job: Job, now: float) -> Record:
        (answer,) = expected(job.request, self._max_model_len)
        record = Record(job, now, answer.token_ids, answer.finish)
        require(job.request.request_id not in self.records, f"{job.request.request_id} was asked twice")
        self.records[job.request.request_id] = record
        return record

    def chunk(self, record: Record, chunk: TokenChunk) -> None:
        name = record.job.request.request_id
        require(record.ended_s is None and record.finish is None, f"{name} got {chunk} after its end")
        require(chunk.request_id == name, f"{name} got a chunk of {chunk.request_id}")
        at = len(record.tokens)
        require(chunk.first_index == at, f"{name}: chunk at index {chunk.first_index}, expected {at}: {chunk}")
        record.tokens.extend(chunk.token_ids)
        right = record.expected[: len(record.tokens)]
        require(tuple(record.tokens) == right, f"{name} answered {record.tokens}, an undisturbed run {record.expected}")
        record.finish = chunk.finish

    def ends(self, record: Record, now: float) -> None:
        """Called once by the client, when its call is over."""
        name, job = record.job.request.request_id, record.job
        require(record.ended_s is None, f"{name} ended twice")
        record.ended_s = now
        took = now - record.started_s
        waited = job.read_delay_s * (len(record.tokens) + 1)
        limit = job.request.deadline_s + waited + self.grace_s
        require(took <= limit, f"{name} ended after {took:.2f} s, its limit was {limit:.2f}")
        if record.finish in (FinishReason.STOP, FinishReason.LENGTH):
            whole = tuple(record.tokens) == record.expected and record.finish is record.expected_finish
            require(whole, f"{name} finished as {record.finish} with {record.tokens}, an undisturbed run "
                           f"as {record.expected_finish} with {record.expected}")
        elif not record.left:
            late = job.may_miss_deadline and isinstance(record.error, DeadlineExceeded | Cancelled)
            crowded = isinstance(record.error, Overloaded | NobodyReady) and took >= PLACE_WAIT_S
            excused = late or crowded
            require(excused, f"{name} failed with {record.error!r} ({record.finish}) after {len(record.tokens)} tokens")

    # ---- workers -------------------------------------------------------------------------------------------------

    def turn(self, nodes: Iterable[WorkerNode]) -> None:
        for node in nodes:
            name, ledger, total = node.info.worker_id, node.parts.pool.ledger(), node.parts.pool.num_blocks
            if ledger.total != total:
                raise OracleFailure(f"{name}: {ledger} sums to {ledger.total}, the pool has {total} blocks")
            self._turns[name] = self._turns.get(name, 0) + 1
            if self._turns[name] % FULL_SCAN_TURNS == 0:
                self.scan(node)

    @staticmethod
    def scan(node: WorkerNode) -> None:
        name, pool = node.info.worker_id, node.parts.pool
        try:
            node.check_ledger()
        except AssertionError as e:
            raise OracleFailure(f"{name}: {e}") from e
        for block in node.parts.puller.in_flight_blocks():
            refs, _, quarantined = pool.pins(block)
            require(refs > 0 or quarantined, f"{name}: block {block} is free, and a pull may still write to it")

    def quiet(self, node: WorkerNode) -> None:
        """After everything has ended and healed."""
        self.scan(node)
        name, ledger, load = node.info.worker_id, node.parts.pool.ledger(), node.load()
        held = (ledger.quarantined, ledger.lent, ledger.active)
        require(held == (0, 0, 0), f"{name} still holds (quarantined, lent, active) = {held} blocks: {ledger}")
        require(load.num_running + load.num_waiting == 0, f"{name} still runs {load}")
        require(load.available_blocks == load.total_blocks, f"{name} keeps credit for nobody: {load}")


def require(holds: object, message: str) -> None:
    if not holds:
        raise OracleFailure(message)
