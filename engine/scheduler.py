"""The scheduler: which tokens of which sequences go into the next step. Pure: no torch, await, clock or socket.

Owns every sequence between `add` and `remove`, and the references on its blocks. Does not know roles, transfers,
deadlines or text. There are no phases: a sequence is `num_computed_tokens` catching up with `num_tokens`.

Life of a sequence:
    1. `add`: waiting, in order of arrival. One that comes with received KV brings its blocks along.
    2. Admitted: leading full blocks found in the prefix map are taken over, and it runs.
    3. `schedule` puts a chunk of its uncomputed tokens into a step; they are in flight until `commit`.
    4. `commit`: the chunk's KV is in the blocks, full blocks enter the prefix map; a chunk that ended at the last
       known token brought a new one. Back to 3, or finished: it keeps its blocks, and gets no more steps. One of
       several choices (a *leader*) ends there with a token for each: they go on as sequences that bring blocks.
       While that token is still being sampled, the next step may already have a row for it: the sequence *runs
       ahead*. If the token ends the sequence, the row is *void*: its KV and its token are nobody's.
    5. Preempted when an older sequence needs a block: all blocks released, computed tokens forgotten (what it
       published stays cached, and is found again), back to waiting at its place by age.
    6. Paused when its blocks are about to be lent: it keeps its place and its blocks, and takes no part in steps
       until `resume`.
    7. `remove`, at any moment: blocks released, at once or when its last step in flight is committed.

Why it cannot get stuck: a sequence takes blocks only from younger ones, so that the oldest running one always gets
on, unless all other blocks are pinned, promised, paused or in flight, and those end by their own deadlines. Who fails
to get a block keeps what he has, and nobody younger takes one in that step. Waiting sequences that hold blocks pass
those that hold none, and can be preempted as if they ran. A sequence is admitted only when all its known tokens have
room beside what the running ones still need for theirs: otherwise two prompts whose blocks are lent while they are
computed could wait for each other. Nobody is preempted to run ahead; and because a sequence in flight gives no block,
nobody younger than one who lacks a block runs ahead: he can be preempted in the step after.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from baton.core.block_hash import BlockHash, HashScope, extend
from baton.core.errors import BatonError, Overloaded
from baton.core.request import FinishReason, SampledToken
from baton.core.sequence import SequenceState
from baton.core.step import UNKNOWN_TOKEN, Progress, ScheduledChunk, Step, StepResult
from baton.core.step_model import pairs
from baton.engine.block_pool import BlockPool

MAX_STEPS_IN_FLIGHT = 2
"""One is executed, and the next may be scheduled meanwhile."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What a role injects: its budgets. Tokens per step, tokens of one sequence per step, sequences running at once,
    sequences waiting before `add` refuses; and the tokens that end an output."""

    max_step_tokens: int
    max_chunk_tokens: int
    max_sequences: int
    max_waiting: int
    eos_token_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class _Plan:
    """A step being put together."""

    budget_tokens: int
    sampling: dict[int, int]
    """Arrival of who may run ahead -> index of the chunk in flight that samples his token."""
    chunks: list[ScheduledChunk] = field(default_factory=list)
    sequences: list[SequenceState] = field(default_factory=list)
    blocked: int | None = None
    """Arrival of the oldest who found no block: nobody younger takes one, or he would wait for ever."""


@dataclass(slots=True)
class _Refusal:
    """Why the first waiting sequence without blocks did not get any: tried again only when something of this has
    changed, because looking its whole prefix up is slow."""

    arrival: int
    num_matched: int
    """Leading blocks it found. One more in the prefix map may be a block that somebody holds anyway."""
    spare_blocks: int
    """Least spare blocks since. Cached blocks of its own prefix change nothing: taking one over is one less to find,
    and one less available."""


class Scheduler:
    """See the module. `limits` may be replaced between any two calls (a role switch does)."""

    def __init__(self, pool: BlockPool, limits: SchedulerLimits, scope: HashScope) -> None:
        self.limits = limits
        self.num_preemptions = 0
        self._pool = pool
        self._scope = scope
        self._held: dict[str, SequenceState] = {}
        self._running: dict[str, SequenceState] = {}
        self._waiting: list[SequenceState] = []
        """By arrival. A sequence in neither of the two is finished, and waits for `remove`."""
        self._paused: set[str] = set()
        self._unscheduled: dict[str, float] = {}
        """When those that were in no step yet were added, oldest first."""
        self._leaving: dict[int, SequenceState] = {}
        """Removed while in flight, by arrival: their blocks are still written."""
        self._flights: deque[tuple[Step, list[SequenceState]]] = deque()
        self._refusal: _Refusal | None = None
        self._num_arrivals = 0
        self._num_steps = 0

    # ---- sequences come and go ----

    def add(self, seq: SequenceState, now: float) -> None:
        """Take a sequence in. One that brings blocks hands over one reference on each, and its `num_computed_tokens`
        are verified KV: the full blocks among them are published here. Raises Overloaded when the queue is full and
        the sequence has no blocks (one with blocks was let in when they were promised)."""
        table = seq.block_table
        assert seq.request_id not in self._held, f"request {seq.request_id} is here already"
        assert seq.finish is None, f"request {seq.request_id} has ended: {seq.finish}"
        assert seq.num_output_tokens < seq.max_output_tokens, f"{seq.num_output_tokens} of {seq.max_output_tokens} done"
        assert seq.num_computed_tokens < seq.num_tokens, f"{seq.num_computed_tokens} of {seq.num_tokens} computed"
        assert seq.num_computed_tokens <= table.capacity_tokens, f"no blocks for {seq.num_computed_tokens} tokens"
        assert self._blocks_for(seq.num_tokens) <= self._pool.num_blocks, f"{seq.num_tokens} tokens never fit the pool"
        if not table.blocks and len(self._waiting) >= self.limits.max_waiting:
            raise Overloaded(
                f"{len(self._waiting)} requests are waiting, as many as this worker queues (max_waiting). "
                "Try again later or elsewhere."
            )
        self._num_arrivals += 1
        seq.arrival = self._num_arrivals
        self._held[seq.request_id] = seq
        self._unscheduled[seq.request_id] = now
        self._waiting.append(seq)
        self._publish(seq, 0)

    def remove(self, request_id: str) -> None:
        """The one way out: end, cancel, deadline. Blocks are released now, or at the commit of the sequence's last
        step in flight. An unknown id is ignored: it was removed before."""
        seq = self._held.pop(request_id, None)
        if seq is None:
            return
        self._paused.discard(request_id)
        self._unscheduled.pop(request_id, None)
        if self._running.pop(request_id, None) is None:
            self._waiting = [s for s in self._waiting if s is not seq]
        if seq.num_tokens_in_flight:
            self._leaving[seq.arrival] = seq
        else:
            self._release(seq)

    def pause(self, request_id: str) -> None:
        """Keep a sequence out of further steps: its blocks are neither written nor preempted once it is settled. A
        step in flight still brings its token, which may end it."""
        assert request_id in self._held, f"request {request_id} is not here"
        self._paused.add(request_id)

    def resume(self, request_id: str) -> None:
        """Let a paused sequence go on from its place. One that was removed meanwhile, or not paused, is ignored."""
        self._paused.discard(request_id)

    def is_settled(self, request_id: str) -> bool:
        """It is in no step in flight: its tokens and blocks are those of a step boundary. A removed one never is."""
        seq = self._held.get(request_id)
        return seq is not None and not seq.num_tokens_in_flight

    def get(self, request_id: str) -> SequenceState | None:
        return self._held.get(request_id)

    def sequences(self) -> Iterator[SequenceState]:
        """All that hold references on blocks: waiting, running, finished but not removed, removed but in flight."""
        return itertools.chain(self._held.values(), self._leaving.values())

    def hashes(self, seq: SequenceState, num_blocks: int | None = None) -> list[BlockHash]:
        """Hashes of the first `num_blocks` full blocks of the sequence's tokens, of all when None."""
        size = self._pool.block_size
        num_full = seq.num_tokens // size
        wanted = num_full if num_blocks is None else num_blocks
        assert wanted <= num_full, f"{wanted} hashes wanted, {num_full} blocks are full"
        known = seq.block_hashes
        if len(known) < wanted:
            # A tenant's salt keeps its blocks apart from everybody else's.
            salt = seq.request.tenant or self._scope.tenant_salt
            parent = known[-1] if known else dataclasses.replace(self._scope, tenant_salt=salt).root()
            known.extend(extend(parent, seq.tokens[len(known) * size : wanted * size], size))
        return known[:wanted]

    def finish_of(self, seq: SequenceState, token: int) -> FinishReason | None:
        """How `token`, the last of the sequence's tokens, ends it; None: it goes on."""
        sampling = seq.request.sampling
        is_eos = token in self.limits.eos_token_ids and not sampling.ignore_eos
        if is_eos or token in sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if seq.num_output_tokens >= seq.max_output_tokens else None

    # ---- load ----

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Some sequence is neither finished nor paused. `schedule` may still answer None: until a commit, or until
        blocks return."""
        return any(s.request_id not in self._paused for s in self._unfinished())

    def queued_prefill(self) -> tuple[int, int]:
        """(tokens, their (query, key) pairs) still to be computed, in flight or not, of sequences that need more than
        a decode step. What waiting ones find in the prefix map will not be."""
        tokens = num_pairs = 0
        for seq in self._unfinished():
            known = seq.num_computed_tokens
            if not known and seq.request_id not in self._running:
                known = self._expected_hit(seq) * self._pool.block_size
            left = max(1, seq.num_tokens - known)
            if left > 1:
                tokens += left
                num_pairs += pairs(seq.num_tokens - left, left)
        return tokens, num_pairs

    def _expected_hit(self, seq: SequenceState) -> int:
        """Leading blocks that the sequence would find now. Looked up from where the last look ended, so that asking
        again costs one look; evictions meanwhile are seen when it is admitted."""
        hashes, known = self.hashes(seq), seq.num_expected_blocks
        if self._pool.match(hashes[known : known + 1]):
            seq.num_expected_blocks += len(self._pool.match(hashes[known:]))
        return seq.num_expected_blocks

    @property
    def context_tokens(self) -> int:
        """Tokens whose KV a decode step of all running sequences has to read."""
        return sum(s.num_computed_tokens for s in self._running.values())

    @property
    def num_blocks_wanted(self) -> int:
        """Blocks that the first waiting sequence without any needs for its known tokens. New credits should leave
        that many available, or a stream of them keeps it waiting."""
        head = self._first_without_blocks()
        return 0 if head is None else self._blocks_for(head.num_tokens)

    def oldest_waiting_s(self, now: float) -> float:
        """Age of the oldest sequence that has been in no step yet; `now` on the clock that `add` was told."""
        return now - next(iter(self._unscheduled.values()), now)

    # ---- a step ----

    def schedule(self, now: float) -> Step | None:
        """The next step: decodes, then running prefills, then waiting sequences; None when nothing can run.

        May be called while one step is in flight: a sequence in the middle of its prompt gets its next chunk, one
        whose next token is being sampled runs ahead. `now` is the caller's clock; nothing here depends on it yet.
        """
        assert len(self._flights) < MAX_STEPS_IN_FLIGHT, f"{len(self._flights)} steps are in flight"
        plan = _Plan(self.limits.max_step_tokens, self._sampling())
        by_age = sorted((s for s in self._running.values() if s.request_id not in self._paused), key=_arrival)
        decodes = [s for s in by_age if s.num_uncomputed_tokens == 1 or s.arrival in plan.sampling]
        prefills = [s for s in by_age if s.num_uncomputed_tokens > 1]
        for seq in decodes + prefills:
            if seq.request_id in self._running:  # else preempted for one before it
                self._plan_chunk(plan, seq)
        for seq in list(self._waiting):
            full = len(self._running) >= self.limits.max_sequences
            if plan.blocked is not None or full or not plan.budget_tokens:
                break
            self._admit(plan, seq)
        if not plan.chunks:
            return None
        self._num_steps += 1
        step = Step(self._num_steps, tuple(plan.chunks))
        self._flights.append((step, plan.sequences))
        return step

    def commit(self, step: Step, result: StepResult, now: float) -> tuple[Progress, ...]:
        """Enter what a step did, oldest step first. Says nothing of sequences that were removed meanwhile, nor of void
        rows. A finished sequence keeps its blocks until `remove`."""
        oldest, sequences = self._flights.popleft()
        assert oldest is step, f"step {step.step_id} committed before step {oldest.step_id}"
        progress = []
        for index, (chunk, seq, tokens) in enumerate(zip(step.chunks, sequences, result.tokens, strict=True)):
            error = result.failed.get(index)
            expected = 0 if error else len(chunk.choices)
            assert len(tokens) == expected, f"{seq.request_id}: {len(tokens)} tokens for {expected} choices"
            assert seq.num_computed_tokens == chunk.start, f"{seq.num_computed_tokens} computed, chunk at {chunk.start}"
            seq.num_tokens_in_flight -= len(chunk.token_ids)
            # It ran ahead, and ended with the step before, or was removed before that gave it the token.
            is_void = seq.finish is not None or chunk.end > seq.num_tokens
            if not is_void:
                seq.num_computed_tokens = chunk.end
                if error is None:
                    self._publish(seq, chunk.start)
                else:
                    self._unpublish(seq)
            if seq.arrival not in self._leaving:
                if not is_void:
                    progress.append(self._take_tokens(seq, chunk, tokens, error))
            elif not seq.num_tokens_in_flight:
                del self._leaving[seq.arrival]
                self._release(seq)
        return tuple(progress)

    # ---- inside ----

    def _take_tokens(
        self, seq: SequenceState, chunk: ScheduledChunk, tokens: tuple[SampledToken, ...], error: BatonError | None
    ) -> Progress:
        if error is not None:
            seq.finish = FinishReason.ERROR
        elif tokens and len(seq.choices) == 1:
            seq.tokens.append(tokens[0].token_id)
            seq.finish = self.finish_of(seq, tokens[0].token_id)
        if seq.finish is not None or len(tokens) > 1:
            del self._running[seq.request_id]
        return Progress(
            seq.request_id, seq.epoch, chunk.start, chunk.end, tokens, seq.num_output_tokens, seq.finish, error
        )

    def _publish(self, seq: SequenceState, start: int) -> None:
        """Publish the blocks that became full since `start`: only computed tokens count, never a token that was
        sampled and has no KV yet."""
        if seq.converted:
            return
        size = self._pool.block_size
        num_full = seq.num_computed_tokens // size
        known = self.hashes(seq, num_full)
        for index in range(start // size, num_full):
            self._pool.publish(seq.block_table.blocks[index], known[index])

    def _unpublish(self, seq: SequenceState) -> None:
        """Its logits are no numbers: some of the KV they came from may be rubbish, and must not spoil others."""
        for block in seq.block_table.blocks:
            self._pool.unpublish(block)

    def _sampling(self) -> dict[int, int]:
        """Arrival of each sequence that the step in flight brings a token, and that goes on with it for all we know ->
        index of its chunk."""
        if not self._flights:
            return {}
        step, sequences = self._flights[0]
        return {
            seq.arrival: index
            for index, (chunk, seq) in enumerate(zip(step.chunks, sequences, strict=True))
            if len(chunk.choices) == 1 and seq.num_output_tokens + 1 < seq.max_output_tokens
        }

    def _plan_chunk(self, plan: _Plan, seq: SequenceState) -> None:
        """Put the next chunk of a running sequence into the plan, as long as budget and blocks allow."""
        token_from = plan.sampling.get(seq.arrival)
        runs_ahead = token_from is not None
        if runs_ahead and plan.blocked is not None and plan.blocked < seq.arrival:
            return
        start = seq.num_computed_tokens + seq.num_tokens_in_flight
        left = 1 if runs_ahead else seq.num_uncomputed_tokens
        num_tokens = min(left, self.limits.max_chunk_tokens, plan.budget_tokens)
        if num_tokens > 0:
            self._make_room(plan, seq, start, start + num_tokens)
            num_tokens = min(num_tokens, seq.block_table.capacity_tokens - start)
        if num_tokens <= 0:
            return
        end = start + num_tokens
        samples = runs_ahead or end == seq.num_tokens
        looks_back = samples and seq.request.sampling.needs_history
        plan.chunks.append(ScheduledChunk(
            request_id=seq.request_id, start=start, token_from=token_from,
            token_ids=(UNKNOWN_TOKEN,) if runs_ahead else tuple(seq.tokens[start:end]),
            block_table=tuple(seq.block_table.blocks), choices=seq.choices if samples else (),
            sampling=seq.request.sampling, seed=seq.request.seed,
            history=tuple(seq.tokens) if looks_back else (),
            num_prompt_tokens=seq.num_prompt_tokens if looks_back else 0,
        ))
        self._unscheduled.pop(seq.request_id, None)
        plan.sequences.append(seq)
        plan.budget_tokens -= num_tokens
        seq.num_tokens_in_flight += num_tokens

    def _make_room(self, plan: _Plan, seq: SequenceState, start: int, end: int) -> None:
        """Grow the block table towards `end` tokens with what is available. Preempt only when not one token after
        `start` has room: a shorter chunk is cheaper than a recomputed sequence. Not to run ahead: that can wait."""
        table = seq.block_table
        missing = self._blocks_for(end) - len(table.blocks)
        if missing <= 0 or (plan.blocked is not None and seq.arrival > plan.blocked):
            return
        if table.capacity_tokens <= start:
            while not self._pool.num_available:
                victim = None if seq.arrival in plan.sampling else self._youngest_after(seq)
                if victim is None:
                    plan.blocked = seq.arrival
                    return
                self._preempt(victim)
        blocks = self._pool.allocate(min(missing, self._pool.num_available))
        assert blocks is not None, "what is available can be allocated"
        table.blocks.extend(blocks)

    def _admit(self, plan: _Plan, seq: SequenceState) -> None:
        """Let a waiting sequence run, if its blocks are here or there is room for them."""
        if seq.request_id in self._paused:
            return
        # Age goes first: nobody without blocks passes one who waits for some.
        if not seq.block_table.blocks and (self._first_without_blocks() is not seq or not self._take_prefix(seq)):
            return
        self._waiting = [s for s in self._waiting if s is not seq]
        self._running[seq.request_id] = seq
        self._plan_chunk(plan, seq)

    def _take_prefix(self, seq: SequenceState) -> bool:
        """Give a sequence the cached blocks of its prefix, if the rest of its tokens has room too: beside what the
        running sequences lack for their known tokens, and one block of growth for each."""
        size = self._pool.block_size
        # One token at least is left to compute: its row gives the next token.
        hashes = self.hashes(seq, (seq.num_tokens - 1) // size)
        running = self._running.values()
        lacking = sum(max(0, self._blocks_for(s.num_tokens) - len(s.block_table.blocks)) for s in running)
        promised = lacking + len(running)
        spare = self._pool.num_available - promised
        if self._still_refused(seq, hashes, spare):
            return False
        blocks = self._pool.match(hashes)
        self._pool.acquire(blocks)
        if self._blocks_for(seq.num_tokens) - len(blocks) > self._pool.num_available - promised:
            self._pool.release(blocks)
            self._refusal = _Refusal(seq.arrival, len(blocks), spare)
            return False
        self._refusal = None
        seq.block_table.blocks.extend(blocks)
        seq.num_computed_tokens = len(blocks) * size
        if not seq.num_preemptions:
            seq.num_cached_tokens = min(seq.num_computed_tokens, seq.num_prompt_tokens)
        return True

    def _still_refused(self, seq: SequenceState, hashes: list[BlockHash], spare: int) -> bool:
        last = self._refusal
        if last is None or last.arrival != seq.arrival or spare > last.spare_blocks:
            return False
        last.spare_blocks = spare
        return not self._pool.match(hashes[last.num_matched : last.num_matched + 1])

    def _youngest_after(self, seq: SequenceState) -> SequenceState | None:
        """The youngest sequence that came after `seq`, is in no step, not paused, and has a block to give."""
        victims = (
            s for s in self._unfinished()
            if s.arrival > seq.arrival and not s.num_tokens_in_flight and s.request_id not in self._paused
            and not all(self._pool.is_pinned(b) for b in s.block_table.blocks)
        )
        return max(victims, key=_arrival, default=None)

    def _preempt(self, seq: SequenceState) -> None:
        self._release(seq)
        seq.num_computed_tokens = 0
        seq.converted = False
        seq.num_preemptions += 1
        self.num_preemptions += 1
        if self._running.pop(seq.request_id, None) is not None:
            bisect.insort(self._waiting, seq, key=_arrival)

    def _release(self, seq: SequenceState) -> None:
        self._pool.release(seq.block_table.blocks)
        seq.block_table.blocks.clear()

    def _first_without_blocks(self) -> SequenceState | None:
        """Whose turn it is to get blocks."""
        return next((s for s in self._waiting if not s.block_table.blocks and s.request_id not in self._paused), None)

    def _unfinished(self) -> Iterator[SequenceState]:
        return itertools.chain(self._running.values(), self._waiting)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._pool.block_size)


def _arrival(seq: SequenceState) -> int:
    return seq.arrival
