"""The block pool: examples of each rule, and every operation at random against a naive model."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.core.block_hash import BlockHash
from baton.core.messages import KVEvents
from baton.core.worker import Ledger
from baton.engine.block_pool import BlockPool, Credit

A, B, C, D = (BlockHash(bytes([n]) * 16) for n in range(4))


def taken(pool: BlockPool, n: int) -> list[int]:
    blocks = pool.allocate(n)
    assert blocks is not None
    return blocks


def cache(pool: BlockPool, *hashes: BlockHash) -> list[int]:
    """One sequence's blocks, published and released: cached."""
    blocks = taken(pool, len(hashes))
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.publish(block, block_hash)
    pool.release(blocks)
    return blocks


def test_a_released_block_is_cached_when_it_was_published_and_free_when_not() -> None:
    pool = BlockPool(4, 2)
    blocks = taken(pool, 3)
    pool.publish(blocks[0], A)
    assert pool.ledger() == Ledger(0, 0, 3, 0, 1)
    pool.release(blocks)
    assert pool.ledger() == Ledger(0, 0, 0, 1, 3)
    assert pool.num_available == 4
    pool.check()


def test_the_longest_leading_run_is_matched() -> None:
    pool = BlockPool(4, 2)
    blocks = cache(pool, A, B, D)
    assert pool.match([A, B, C, D]) == blocks[:2]
    assert pool.match([C, A]) == []
    assert pool.ledger().active == 0, "matching takes no references"


def test_an_acquired_block_is_neither_evicted_nor_given_a_new_generation() -> None:
    pool = BlockPool(2, 2)
    cache(pool, A)
    (block,) = pool.match([A])
    generation = pool.generation(block)
    pool.acquire([block])
    assert pool.allocate(2) is None
    taken(pool, 1)
    assert pool.match([A]) == [block]
    assert pool.generation(block) == generation


def test_the_least_recently_used_sequence_is_evicted_first_and_its_tail_before_its_head() -> None:
    pool = BlockPool(4, 2)
    cache(pool, A, B)
    cache(pool, C, D)
    taken(pool, 1)
    assert (len(pool.match([A, B])), len(pool.match([C, D]))) == (1, 2)
    pool.acquire(old := pool.match([A]))
    pool.release(old)
    taken(pool, 2)
    assert (len(pool.match([A, B])), len(pool.match([C, D]))) == (1, 0), "A was used last"


def test_free_blocks_are_taken_before_anything_is_evicted() -> None:
    pool = BlockPool(3, 2)
    cache(pool, A)
    taken(pool, 2)
    assert len(pool.match([A])) == 1


def test_each_ownership_has_its_own_generation() -> None:
    pool = BlockPool(1, 2)
    (block,) = taken(pool, 1)
    first = pool.generation(block)
    pool.acquire([block])
    pool.release([block])
    assert pool.generation(block) == first
    pool.release([block])
    taken(pool, 1)
    assert pool.generation(block) == first + 1


def test_the_first_holder_of_a_hash_stays() -> None:
    pool = BlockPool(2, 2)
    first, second = taken(pool, 2)
    pool.publish(first, A)
    pool.publish(second, A)
    pool.publish(first, A)
    assert pool.match([A]) == [first]
    pool.release([first, second])
    assert pool.ledger() == Ledger(0, 0, 0, 1, 1), "the duplicate is free"


def test_a_credit_is_kept_whatever_happens_and_serves_the_cache_until_it_is_bound() -> None:
    pool = BlockPool(3, 2)
    cache(pool, A, B)
    credit = pool.reserve(3)
    assert credit is not None
    assert pool.num_available == 0
    assert set(pool.take_events()[0].stored) == {A, B}
    assert pool.ledger().cached == 2
    assert pool.allocate(1) is None
    assert pool.reserve(1) is None
    assert pool.match([A, B]) == [], "taking them over would break the promise"
    assert len(pool.bind(credit)) == 3
    assert pool.take_events() == (KVEvents(2, (), (B, A)),)


def test_a_matched_run_ends_where_it_would_eat_into_a_credit() -> None:
    pool = BlockPool(3, 2)
    blocks = cache(pool, A, B, C)
    pool.reserve(2)
    assert pool.match([A, B, C]) == blocks[:1]
    pool.acquire(blocks[:1])
    with pytest.raises(AssertionError, match="breaks a credit"):
        pool.acquire(blocks[1:2])


def test_a_dropped_credit_can_be_given_again_and_dropped_once() -> None:
    pool = BlockPool(3, 2)
    credit = pool.reserve(3)
    assert credit is not None
    pool.drop(credit)
    assert pool.num_available == 3
    with pytest.raises(AssertionError, match="bound or dropped before"):
        pool.drop(credit)
    with pytest.raises(AssertionError, match="bound or dropped before"):
        pool.bind(credit)


def test_a_lent_block_outlives_its_references_until_the_last_reader() -> None:
    pool = BlockPool(1, 2)
    (block,) = taken(pool, 1)
    pool.publish(block, A)
    pool.lend(block)
    pool.lend(block)
    pool.release([block])
    pool.unlend(block)
    assert pool.ledger().lent == 1
    assert pool.allocate(1) is None
    pool.acquire(pool.match([A]))
    pool.release([block])
    pool.unlend(block)
    assert pool.ledger().cached == 1


def test_a_quarantined_block_leaves_the_prefix_map_and_is_reused_only_afterwards() -> None:
    pool = BlockPool(2, 2)
    blocks = taken(pool, 2)
    pool.publish(blocks[0], A)
    pool.quarantine(blocks[0])
    pool.release(blocks)
    assert pool.match([A]) == []
    assert pool.is_pinned(blocks[0])
    assert pool.allocate(2) is None
    pool.unquarantine(blocks[0])
    assert sorted(taken(pool, 2)) == sorted(blocks)


def test_a_block_with_every_claim_at_once_counts_once_in_the_ledger() -> None:
    pool = BlockPool(2, 2)
    (block,) = taken(pool, 1)
    pool.acquire([block])
    pool.publish(block, A)
    assert pool.ledger() == Ledger(0, 0, 1, 0, 1)
    pool.lend(block)
    assert pool.ledger() == Ledger(0, 1, 0, 0, 1)
    pool.quarantine(block)
    assert pool.ledger() == Ledger(1, 0, 0, 0, 1)
    pool.unlend(block)
    pool.unquarantine(block)
    assert pool.ledger() == Ledger(0, 0, 1, 0, 1)
    pool.check()


def test_an_unpublished_block_stays_with_its_holders_and_is_found_no_more() -> None:
    pool = BlockPool(2, 2)
    (block,) = cache(pool, A)
    pool.unpublish(block)
    assert pool.match([A]) == []
    assert pool.ledger().free == 2
    pool.unpublish(block)
    assert pool.ledger().free == 2


def test_events_that_undo_each_other_are_not_told() -> None:
    pool = BlockPool(1, 2)
    cache(pool, A)
    taken(pool, 1)
    assert pool.take_events() == ()
    assert pool.snapshot().seq == 0


def test_a_snapshot_with_pending_events_loses_and_doubles_nothing() -> None:
    pool = BlockPool(2, 2)
    cache(pool, A)
    pool.take_events()
    cache(pool, B)
    taken(pool, 1)
    snapshot = pool.snapshot()
    assert (snapshot.seq, snapshot.hashes) == (1, (A,))
    assert pool.take_events() == (KVEvents(2, (B,), (A,)),)


@pytest.mark.parametrize("misuse", ["release", "unlend", "lend", "quarantine", "publish", "acquire", "unquarantine"])
def test_misuse_of_a_free_block_is_a_bug_and_asserts(misuse: str) -> None:
    pool = BlockPool(1, 2)
    with pytest.raises(AssertionError):
        getattr(pool, misuse)(*{"release": ([0],), "acquire": ([0],), "publish": (0, A)}.get(misuse, (0,)))
    pool.check()


# ---- against a naive model ----


@dataclass
class Fact:
    """What the model knows of one block."""

    refs: int = 0
    lends: int = 0
    quarantined: bool = False
    hash: BlockHash | None = None
    generation: int = 0

    @property
    def place(self) -> str:
        if self.quarantined:
            return "quarantined"
        if self.lends:
            return "lent"
        if self.refs:
            return "active"
        return "cached" if self.hash else "free"

    @property
    def is_held(self) -> bool:
        return bool(self.refs or self.lends)


@dataclass
class Reader:
    """A router's prefix index of this worker."""

    seq: int
    hashes: set[BlockHash] = field(default_factory=set)

    def apply(self, event: KVEvents) -> None:
        assert event.seq == self.seq + 1
        assert self.hashes.isdisjoint(event.stored)
        assert self.hashes >= set(event.removed)
        self.hashes = (self.hashes | set(event.stored)) - set(event.removed)
        self.seq = event.seq


HASHES = [BlockHash(bytes([n]) * 16) for n in range(5)]
NUM_BLOCKS = 5


class PoolAgainstModel(RuleBasedStateMachine):
    """Every operation that is legal at the moment, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 2)
        self.facts = [Fact() for _ in range(NUM_BLOCKS)]
        self.lru: list[int] = []
        self.credits: list[Credit] = []
        self.readers = [Reader(0)]

    # The model's own arithmetic, by scan.

    @property
    def available(self) -> int:
        return sum(f.place in ("free", "cached") for f in self.facts) - sum(c.num_blocks for c in self.credits)

    def blocks(self, condition: str) -> list[int]:
        return [b for b, f in enumerate(self.facts) if getattr(f, condition)]

    def settle(self) -> None:
        """Blocks that became cached go to the end; who left the cache leaves the list."""
        cached = [b for b, f in enumerate(self.facts) if f.place == "cached"]
        self.lru = [b for b in self.lru if b in cached]
        assert len(cached) - len(self.lru) <= 1, "the model settles after each block"
        self.lru += [b for b in cached if b not in self.lru]

    def own(self, blocks: list[int]) -> None:
        """Check that these were right to be taken, in this order, and take them in the model."""
        for block in blocks:
            free = [b for b, f in enumerate(self.facts) if f.place == "free"]
            assert block in free if free else block == self.lru[0], "free first, then the least recently used"
            fact = self.facts[block]
            fact.hash, fact.refs, fact.generation = None, 1, fact.generation + 1
            self.settle()

    # Operations.

    @rule(n=st.integers(0, NUM_BLOCKS))
    def allocate(self, n: int) -> None:
        expected = n <= self.available
        blocks = self.pool.allocate(n)
        assert (blocks is not None) == expected
        if blocks is not None:
            assert len(blocks) == n
            self.own(blocks)

    @rule(n=st.integers(0, 3))
    def reserve(self, n: int) -> None:
        expected = n <= self.available
        credit = self.pool.reserve(n)
        assert (credit is not None) == expected
        if credit is not None:
            self.credits.append(credit)

    @precondition(lambda self: self.credits)
    @rule(data=st.data())
    def bind(self, data: st.DataObject) -> None:
        credit = self.credits.pop(data.draw(st.integers(0, len(self.credits) - 1)))
        blocks = self.pool.bind(credit)
        assert len(blocks) == credit.num_blocks
        self.own(blocks)

    @precondition(lambda self: self.credits)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.pool.drop(self.credits.pop(data.draw(st.integers(0, len(self.credits) - 1))))

    @rule(hashes=st.lists(st.sampled_from(HASHES), max_size=4, unique=True))
    def match_and_acquire(self, hashes: list[BlockHash]) -> None:
        run: list[int] = []
        room = self.available
        for h in hashes:
            holders = [b for b, f in enumerate(self.facts) if f.hash == h]
            room -= bool(holders) and self.facts[holders[0]].place == "cached"
            if not holders or room < 0:
                break
            run += holders
        assert self.pool.match(hashes) == run
        self.pool.acquire(run)
        for block in run:
            self.facts[block].refs += 1
            self.settle()

    @precondition(lambda self: self.blocks("refs"))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(self.blocks("refs")), min_size=1, unique=True))
        self.pool.release(blocks)
        for block in reversed(blocks):
            self.facts[block].refs -= 1
            self.settle()

    @precondition(lambda self: self.blocks("is_held"))
    @rule(data=st.data(), block_hash=st.sampled_from(HASHES))
    def publish(self, data: st.DataObject, block_hash: BlockHash) -> None:
        block = data.draw(st.sampled_from(self.blocks("is_held")))
        fact = self.facts[block]
        if fact.quarantined or fact.hash not in (None, block_hash):
            return
        self.pool.publish(block, block_hash)
        if all(f.hash != block_hash for f in self.facts):
            fact.hash = block_hash

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def unpublish(self, block: int) -> None:
        self.pool.unpublish(block)
        self.facts[block].hash = None
        self.settle()

    @precondition(lambda self: self.blocks("is_held"))
    @rule(data=st.data())
    def lend(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.blocks("is_held")))
        self.pool.lend(block)
        self.facts[block].lends += 1

    @precondition(lambda self: self.blocks("lends"))
    @rule(data=st.data())
    def unlend(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.blocks("lends")))
        self.pool.unlend(block)
        self.facts[block].lends -= 1
        self.settle()

    @precondition(lambda self: self.blocks("is_held"))
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.blocks("is_held")))
        if not self.facts[block].quarantined:
            self.pool.quarantine(block)
            self.facts[block].quarantined, self.facts[block].hash = True, None

    @precondition(lambda self: self.blocks("quarantined"))
    @rule(data=st.data())
    def unquarantine(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.blocks("quarantined")))
        self.pool.unquarantine(block)
        self.facts[block].quarantined = False

    @rule()
    def connect_a_reader(self) -> None:
        snapshot = self.pool.snapshot()
        assert len(set(snapshot.hashes)) == len(snapshot.hashes)
        self.readers.append(Reader(snapshot.seq, set(snapshot.hashes)))

    @rule()
    def take_events(self) -> None:
        for event in self.pool.take_events():
            for reader in self.readers:
                reader.apply(event)
        for reader in self.readers:
            assert reader.hashes == {f.hash for f in self.facts if f.hash}

    @invariant()
    def pool_and_model_agree(self) -> None:
        self.pool.check()
        places = [f.place for f in self.facts]
        assert self.pool.ledger() == Ledger(*map(places.count, ("quarantined", "lent", "active", "cached", "free")))
        assert self.pool.num_available == self.available >= 0
        for block, fact in enumerate(self.facts):
            assert self.pool.generation(block) == fact.generation
            assert self.pool.is_pinned(block) == (fact.quarantined or fact.lends > 0)


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(max_examples=100, stateful_step_count=40)
