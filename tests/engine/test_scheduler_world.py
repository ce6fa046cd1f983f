"""The scheduler under everything at once, in pools too small for it: new and received sequences, leaders and their
choices, cancels, credits, leases, pauses, moves, two steps in flight, prefix hits by the dozen (a vocabulary of two),
preemption, rows that cannot be sampled, rows that ran ahead of a token that ended their sequence.

The oracle is the undisturbed run: each token must be the one that sequence gets when it is alone, and each token the
runner reads from a block must be that sequence's own. At the end every block is back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.errors import InternalError, Overloaded
from baton.core.request import FinishReason, SamplingParams
from baton.core.sequence import SequenceState
from baton.core.step import Progress, Step, StepResult
from baton.engine.block_pool import Credit
from tests.engine.builders import BLOCK_SIZE, SEED_0, Bench, limits, sequence, undisturbed

PENALISED = SamplingParams(seed=0, repetition_penalty=1.5)
STOP = 1
"""The token that ends those who asked for it: half of all tokens are."""


def until_stop(prompt: list[int], tokens: list[int]) -> list[int]:
    """A run's tokens up to the first STOP of its output."""
    output = tokens[len(prompt) :]
    return tokens[: len(prompt) + output.index(STOP) + 1] if STOP in output else tokens


def flip(rnd: Random) -> bool:
    return rnd.random() < 0.5


@dataclass
class LentBlocks:
    """What a reader was told: these bytes, under these generations."""

    blocks: list[int]
    generations: list[int]
    contents: list[int]


@dataclass
class Flight:
    step: Step
    result: StepResult | None = None


@dataclass
class World:
    bench: Bench
    expected: dict[str, list[int]] = field(default_factory=dict)
    """Prompt + output of each request that ever was, from undisturbed runs."""
    unfinished: set[str] = field(default_factory=set)
    flights: deque[Flight] = field(default_factory=deque)
    credits: list[Credit] = field(default_factory=list)
    arriving: list[list[int]] = field(default_factory=list)
    """Blocks of credits that were bound: somebody is pulling into them."""
    leases: list[LentBlocks] = field(default_factory=list)
    paused: dict[str, tuple[list[int], list[int], int] | None] = field(default_factory=dict)
    """Tokens, blocks and computed tokens of who stands still, once settled."""
    children: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    """Of each leader: what each of its choices must become."""
    ended: list[str] = field(default_factory=list)
    """Finished, and nobody has removed them yet."""
    spoil: bool = False
    """The next row to be sampled is no number."""
    num_cached: int = 0
    num_overlapped: int = 0
    num_forked: int = 0
    num_moved: int = 0
    num_failed: int = 0
    num_ahead: int = 0
    num_void: int = 0

    # ---- what can happen ----

    def add(self, rnd: Random) -> None:
        """A prompt that is computed here; some replay tokens the client already has."""
        prompt, num_output, penalised, choice = self._prompt(rnd), rnd.randint(1, MAX_OUTPUT), flip(rnd), int(flip(rnd))
        tokens, sampling = undisturbed(prompt, num_output, 0, choice, penalised), PENALISED if penalised else SEED_0
        if flip(rnd):
            tokens, sampling = until_stop(prompt, tokens), replace(sampling, stop_token_ids=(STOP,))
        name, _ = self._new(tokens)
        num_delivered = rnd.randint(0, len(tokens) - len(prompt) - 1)
        delivered = tokens[len(prompt) : len(prompt) + num_delivered]
        self._add(sequence(name, prompt, num_output, sampling=sampling, delivered=delivered, choices=[choice]))

    def add_leader(self, rnd: Random) -> None:
        prompt, num_output, penalised = self._prompt(rnd), rnd.randint(1, MAX_OUTPUT), flip(rnd)
        name, _ = self._new(list(prompt))
        choices = sorted(rnd.sample(range(5), rnd.randint(2, 4)))
        self.children[name] = {c: undisturbed(prompt, num_output, 0, c, penalised) for c in choices}
        sampling = PENALISED if penalised else SEED_0
        self._add(sequence(name, prompt, num_output, sampling=sampling, choices=choices))

    def add_received(self, rnd: Random) -> None:
        """A hand-off: prompt and first token known, KV of the prompt (or, after a fallback, of some blocks) in."""
        prompt, num_output = self._prompt(rnd), rnd.randint(2, MAX_OUTPUT)
        bench = self.bench
        needed = -(-(len(prompt) + 1) // BLOCK_SIZE)
        credit = bench.pool.reserve(needed)
        if credit is None:
            return
        name, tokens = self._new(undisturbed(prompt, num_output))
        seq = sequence(name, prompt, num_output, delivered=tokens[len(prompt) : len(prompt) + 1])
        blocks = bench.pool.bind(credit)
        num_computed = len(prompt)
        if rnd.random() < 0.5:
            num_computed = rnd.randint(0, len(prompt) // BLOCK_SIZE) * BLOCK_SIZE
        bench.memory.write(blocks, 0, tokens[:num_computed])
        seq.block_table.blocks.extend(blocks)
        seq.num_computed_tokens = num_computed
        bench.scheduler.add(seq, 0.0)

    def cancel(self, rnd: Random) -> None:
        if self.unfinished:
            name = rnd.choice(sorted(self.unfinished))
            self.unfinished.remove(name)
            self.paused.pop(name, None)
            self.bench.scheduler.remove(name)

    def bury(self, rnd: Random) -> None:
        """Somebody has seen the end of one that has finished, and what it held may go."""
        if self.ended:
            self.bench.scheduler.remove(self.ended.pop(0))

    def pause(self, rnd: Random) -> None:
        if self.unfinished:
            name = rnd.choice(sorted(self.unfinished))
            self.bench.scheduler.pause(name)
            self.paused.setdefault(name, None)

    def resume(self, rnd: Random) -> None:
        if self.paused:
            name = rnd.choice(sorted(self.paused))
            del self.paused[name]
            self.bench.scheduler.resume(name)

    def move(self, rnd: Random) -> None:
        """Take over a paused sequence: its KV is copied, tail and all, and it goes on under another name."""
        settled = [name for name in sorted(self.paused) if self.bench.scheduler.is_settled(name)]
        old = self.bench.held(rnd.choice(settled)) if settled else None
        if old is None or not old.num_computed_tokens or len(old.choices) > 1:
            return
        blocks = self.bench.pool.allocate(len(old.block_table.blocks))
        if blocks is None:
            return
        num_computed, sampling = old.num_computed_tokens, old.request.sampling
        self.bench.memory.write(blocks, 0, self.bench.memory.read(old.block_table.blocks, num_computed))
        name, _ = self._new(self.expected[old.request_id])
        seq = sequence(
            name, old.request.prompt, old.max_output_tokens, sampling=sampling,
            delivered=old.tokens[old.num_prompt_tokens :], choices=old.choices,
        )
        seq.block_table.blocks.extend(blocks)
        seq.num_computed_tokens = num_computed
        self._end(old.request_id)
        self.bench.scheduler.add(seq, 0.0)
        self.num_moved += 1

    def spoil_one(self, rnd: Random) -> None:
        self.spoil = self.spoil or rnd.random() < 0.06

    def reserve(self, rnd: Random) -> None:
        credit = self.bench.pool.reserve(rnd.randint(1, 4))
        if credit is not None:
            self.credits.append(credit)

    def bind(self, rnd: Random) -> None:
        if self.credits:
            self.arriving.append(self.bench.pool.bind(self.credits.pop(0)))

    def give_up(self, rnd: Random) -> None:
        if self.arriving and rnd.random() < 0.5:
            self.bench.pool.release(self.arriving.pop(0))
        elif self.credits:
            self.bench.pool.drop(self.credits.pop(0))

    def lend(self, rnd: Random) -> None:
        """The full, committed blocks of somebody."""
        candidates = [s for s in self.bench.scheduler.sequences() if s.num_computed_tokens >= BLOCK_SIZE]
        if candidates:
            seq = rnd.choice(candidates)
            blocks = seq.block_table.blocks[: seq.num_computed_tokens // BLOCK_SIZE]
            for block in blocks:
                self.bench.pool.lend(block)
            self.leases.append(LentBlocks(blocks, [self.bench.pool.generation(b) for b in blocks], self._read(blocks)))

    def unlend(self, rnd: Random) -> None:
        if self.leases:
            lease = self.leases.pop(0)
            assert self._read(lease.blocks) == lease.contents
            assert [self.bench.pool.generation(b) for b in lease.blocks] == lease.generations
            for block in reversed(lease.blocks):
                self.bench.pool.unlend(block)

    def schedule(self, rnd: Random) -> None:
        if len(self.flights) < 2:
            step = self.bench.scheduler.schedule(0.0)
            if step is not None:
                assert step.num_tokens <= self.bench.scheduler.limits.max_step_tokens
                assert self.bench.scheduler.num_running <= self.bench.scheduler.limits.max_sequences
                self.num_overlapped += len(self.flights)
                self.flights.append(Flight(step))

    def execute(self, rnd: Random) -> None:
        """Bytes land at some time between schedule and commit, in order."""
        for flight in self.flights:
            if flight.result is None:
                self._execute(flight)
                return

    def commit(self, rnd: Random) -> None:
        if self.flights:
            self._commit()

    # ---- the rules that always hold ----

    def check(self) -> None:
        pool, scheduler = self.bench.pool, self.bench.scheduler
        pool.check()
        tables = [s.block_table.blocks for s in scheduler.sequences()] + self.arriving
        held = {block for table in tables for block in table}
        lent = {block for lease in self.leases for block in lease.blocks}
        assert pool.ledger().active == len(held - lent)
        assert pool.ledger().lent == len(lent)
        for seq in scheduler.sequences():
            table = seq.block_table.blocks
            assert seq.tokens == self.expected[seq.request_id][: seq.num_tokens]
            assert self.bench.memory.read(table, seq.num_computed_tokens) == seq.tokens[: seq.num_computed_tokens]
        for name, then in self.paused.items():
            if scheduler.is_settled(name):
                seq = self.bench.held(name)
                now = (list(seq.tokens), list(seq.block_table.blocks), seq.num_computed_tokens)
                assert then in (None, now), "it did not stand still"
                self.paused[name] = now

    def finish(self) -> None:
        """The owners of credits and leases end, as they always do; then everybody must get to the end."""
        for credit in self.credits:
            self.bench.pool.drop(credit)
        for blocks in self.arriving:
            self.bench.pool.release(blocks)
        while self.leases:
            self.unlend(Random(0))
        while self.paused:
            self.resume(Random(0))
        self.credits, self.arriving = [], []
        for _ in range(1000):
            while self.flights:
                self._commit()
            while self.ended:
                self.bury(Random(0))
            if not self.bench.scheduler.has_work:
                break
            step = self.bench.scheduler.schedule(0.0)
            assert step is not None, "stuck: nobody else holds a block"
            self.flights.append(Flight(step))
        assert not self.unfinished, "1000 steps were not enough"
        self.check()
        ledger = self.bench.pool.ledger()
        assert ledger.cached + ledger.free == self.bench.pool.num_blocks == self.bench.pool.num_available

    # ---- inside ----

    def _prompt(self, rnd: Random) -> list[int]:
        """Fresh, or the beginning of what somebody said before."""
        if self.expected and rnd.random() < 0.5:
            return rnd.choice(list(self.expected.values()))[: rnd.randint(1, MAX_PROMPT)]
        return [rnd.randint(0, 1) for _ in range(rnd.randint(1, MAX_PROMPT))]

    def _new(self, expected: list[int]) -> tuple[str, list[int]]:
        name = f"r{len(self.expected)}"
        self.expected[name] = expected
        self.unfinished.add(name)
        return name, expected

    def _add(self, seq: SequenceState) -> None:
        try:
            self.bench.scheduler.add(seq, 0.0)
        except Overloaded:
            self.unfinished.remove(seq.request_id)

    def _end(self, name: str) -> None:
        self.unfinished.remove(name)
        self.paused.pop(name, None)
        self.bench.scheduler.remove(name)

    def _execute(self, flight: Flight) -> None:
        flight.result = self.bench.memory.execute(flight.step)
        sampling = [i for i, c in enumerate(flight.step.chunks) if c.choices]
        if self.spoil and sampling:
            self.spoil = False
            tokens = tuple(() if i == sampling[0] else t for i, t in enumerate(flight.result.tokens))
            flight.result = StepResult(tokens, {sampling[0]: InternalError("no numbers")})
            self.bench.memory.before = flight.result
        for chunk in flight.step.chunks:
            # Whether a token that is not known yet is any good, the step before can tell.
            num_known = chunk.start if chunk.token_from is not None else chunk.end
            read = self.bench.memory.read(chunk.block_table, num_known)
            assert read == self.expected[chunk.request_id][:num_known], "foreign or stale KV"

    def _commit(self) -> None:
        flight = self.flights.popleft()
        if flight.result is None:
            self._execute(flight)
        assert flight.result is not None
        told = self.bench.scheduler.commit(flight.step, flight.result, 0.0)
        self.num_ahead += sum(c.token_from is not None for c in flight.step.chunks)
        self.num_void += sum(c.request_id in self.ended for c in flight.step.chunks)
        for progress in told:
            name = progress.request_id
            assert name in self.unfinished
            seq = self.bench.held(name)
            if progress.error is not None:
                assert progress.finish is FinishReason.ERROR
                found = self.bench.pool.match(self.bench.scheduler.hashes(seq, seq.num_computed_tokens // BLOCK_SIZE))
                assert set(found).isdisjoint(seq.block_table.blocks)
                self.num_failed += 1
                self._end(name)
            elif len(progress.new_tokens) > 1:
                self._fork(seq, progress)
            elif progress.finish is not None:
                stopped = seq.tokens[-1] == STOP and bool(seq.request.sampling.stop_token_ids)
                assert progress.finish is (FinishReason.STOP if stopped else FinishReason.LENGTH)
                assert seq.tokens == self.expected[name]
                self.num_cached += seq.num_cached_tokens
                self.unfinished.remove(name)
                self.paused.pop(name, None)
                self.ended.append(name)

    def _fork(self, leader: SequenceState, progress: Progress) -> None:
        """As a worker does: choices that are not over go on, as far as there are blocks for their tails."""
        self.num_forked += 1
        outputs = self.children[leader.request_id]
        for index, token in zip(leader.choices, progress.new_tokens, strict=True):
            assert token.token_id == outputs[index][leader.num_tokens]
        if leader.max_output_tokens > 1 and self.bench.pool.num_available >= len(leader.choices):
            for child in self.bench.fork(leader, progress.new_tokens, leader.max_output_tokens):
                self.expected[child.request_id] = outputs[child.choices[0]]
                self.unfinished.add(child.request_id)
                self.bench.scheduler.add(child, 0.0)
        self._end(leader.request_id)

    def _read(self, blocks: list[int]) -> list[int]:
        return self.bench.memory.read(blocks, len(blocks) * BLOCK_SIZE)


HAPPENINGS = [
    World.add, World.add, World.add_leader, World.add_received, World.cancel, World.pause, World.pause, World.resume,
    World.move, World.move, World.spoil_one, World.reserve, World.bind, World.give_up, World.lend, World.unlend,
    World.schedule, World.schedule, World.schedule, World.execute, World.commit, World.commit, World.bury,
]


MAX_PROMPT, MAX_OUTPUT = 9, 13


def _world(rnd: Random) -> World:
    budgets = limits(rnd.randint(1, 12), rnd.randint(1, 8), rnd.randint(1, 6), max_waiting=4)
    # The longest sequence fits alone, and hardly more.
    smallest = -(-(MAX_PROMPT + MAX_OUTPUT) // BLOCK_SIZE)
    return World(Bench.of(rnd.randint(smallest, smallest + 4), budgets))


@settings(max_examples=100)
@given(st.randoms(use_true_random=False), st.lists(st.sampled_from(HAPPENINGS), min_size=10, max_size=80))
def test_whatever_happens_every_sequence_gets_its_own_tokens_and_gives_back_every_block(
    rnd: Random, happenings: list[Callable[[World, Random], None]]
) -> None:
    world = _world(rnd)
    for happening in happenings:
        happening(world, rnd)
        world.check()
    world.finish()


@cache
def long_life(seed: int) -> World:
    rnd = Random(seed)
    world = _world(rnd)
    weights = [rnd.random() for _ in HAPPENINGS]
    for happening in rnd.choices(HAPPENINGS, weights, k=800):
        happening(world, rnd)
        world.check()
    world.finish()
    return world


@pytest.mark.parametrize("seed", range(40))
def test_in_a_long_life_too(seed: int) -> None:
    long_life(seed)


def test_these_lives_were_hard() -> None:
    worlds = [long_life(seed) for seed in range(40)]
    assert sum(w.bench.scheduler.num_preemptions for w in worlds) > 70
    assert sum(w.num_cached for w in worlds) > 180
    assert sum(w.num_overlapped for w in worlds) > 250
    assert sum(w.num_forked for w in worlds) > 50
    assert sum(w.num_moved for w in worlds) > 50
    assert sum(w.num_failed for w in worlds) > 20
    assert sum(w.num_ahead for w in worlds) > 300
    assert sum(w.num_void for w in worlds) > 10
