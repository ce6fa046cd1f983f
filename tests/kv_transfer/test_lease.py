"""The lender's promise: blocks are held exactly as long as a lease lives, and its end is told truthfully."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.core.errors import NotFound
from baton.core.handoff import Lease, LentBlock, PrefillCall, Shard
from baton.core.metrics import Metrics
from baton.core.request import Request
from baton.engine.block_pool import BlockPool
from baton.kv_transfer.lease import LeaseTable

TTL = 10.0


def call(ttl_s: float = TTL) -> PrefillCall:
    return PrefillCall(Request("r1", tuple(range(40))), 2, "decode-0", 0, ttl_s)


def table(num_blocks: int = 8) -> tuple[LeaseTable, BlockPool]:
    pool = BlockPool(num_blocks, 16)
    return LeaseTable(pool, Metrics()), pool


def lend(leases: LeaseTable, pool: BlockPool, lease: Lease, count: int) -> list[int]:
    blocks = pool.allocate(count)
    assert blocks is not None
    for i, b in enumerate(blocks):
        leases.add(lease.lease_id, LentBlock(i, b, pool.generation(b), b"d" * 16, 16))
    pool.release(blocks)
    return blocks


def test_a_lease_names_its_request_and_covers_all_its_tokens_in_one_shard() -> None:
    leases, _ = table()
    lease = leases.grant(call(), "prefill-0", "boot7", now=0)
    assert (lease.request_id, lease.epoch, lease.ttl_s) == ("r1", 2, TTL)
    (shard,) = lease.shards
    assert shard == Shard(0, "prefill-0", "boot7", 0, 40)
    assert leases.grant(call(), "prefill-0", "boot7", now=0).lease_id != lease.lease_id


def test_lent_blocks_outlive_the_sequence_and_return_with_the_release() -> None:
    leases, pool = table()
    lease = leases.grant(call(), "p", "b", now=0)
    blocks = lend(leases, pool, lease, 3)
    assert pool.ledger().lent == 3
    assert sorted(leases.lent()) == sorted(blocks)
    assert leases.release(lease.lease_id, now=5).good
    assert pool.ledger().free == 8
    assert list(leases.lent()) == []


def test_a_renewal_counts_from_itself() -> None:
    leases, pool = table()
    lease = leases.grant(call(), "p", "b", now=0)
    assert leases.renew(lease.lease_id, now=9).good
    assert leases.expire(now=18.9) == ()
    assert leases.expire(now=19) == (lease.lease_id,)


def test_without_renewal_the_timer_gives_the_blocks_back_and_a_late_release_is_told_why() -> None:
    leases, pool = table()
    lease = leases.grant(call(), "p", "b", now=0)
    lend(leases, pool, lease, 8)
    assert leases.next_deadline() == TTL
    assert leases.expire(now=TTL) == (lease.lease_id,)
    assert pool.ledger().free == 8
    answer = leases.release(lease.lease_id, now=TTL + 1)
    assert not answer.good
    assert "not renewed for 10 s" in answer.reason
    assert not leases.renew(lease.lease_id, now=TTL + 1).good


def test_a_release_past_the_deadline_is_not_good_even_before_the_timer_ran() -> None:
    leases, pool = table()
    lease = leases.grant(call(), "p", "b", now=0)
    lend(leases, pool, lease, 1)
    assert not leases.release(lease.lease_id, now=TTL).good
    assert pool.ledger().lent == 0


def test_repeating_a_release_repeats_its_answer_until_it_is_forgotten() -> None:
    leases, _ = table()
    lease = leases.grant(call(), "p", "b", now=0)
    assert leases.release(lease.lease_id, now=1).good
    assert leases.release(lease.lease_id, now=2).good, "the first answer may have been lost on the way"
    assert not leases.renew(lease.lease_id, now=2).good
    leases.expire(now=1 + 2 * TTL)
    assert "no such lease" in leases.release(lease.lease_id, now=30).reason
    assert leases.next_deadline() is None


def test_an_abandoned_lease_gives_its_blocks_back_at_once() -> None:
    leases, pool = table()
    lease = leases.grant(call(), "p", "b", now=0)
    lend(leases, pool, lease, 2)
    leases.abandon(lease.lease_id, now=1)
    leases.abandon(lease.lease_id, now=1)
    assert pool.ledger().free == 8
    assert "went away" in leases.release(lease.lease_id, now=2).reason
    assert leases.metrics.value("baton_leases_total", end="abandoned") == 1


def test_nothing_can_be_added_to_a_lease_that_has_ended() -> None:
    leases, pool = table()
    lease = leases.grant(call(), "p", "b", now=0)
    leases.expire(now=TTL)
    with pytest.raises(NotFound, match="expired"):
        leases.add(lease.lease_id, LentBlock(0, 0, 1, b"", 16))
    assert pool.ledger().lent == 0


def test_a_block_that_is_published_in_parts_is_lent_once() -> None:
    leases, pool = table()
    lease = leases.grant(call(), "p", "b", now=0)
    (block,) = lend(leases, pool, lease, 1)
    leases.add(lease.lease_id, LentBlock(0, block, pool.generation(block), b"other layers", 16))
    assert list(leases.lent()) == [block]
    assert leases.metrics.value("baton_published_blocks_total") == 1
    assert leases.release(lease.lease_id, now=1).good
    assert pool.ledger().free == 8
    again = leases.grant(call(), "p", "b", now=1)
    lend(leases, pool, again, 1)
    with pytest.raises(AssertionError, match="another owner"):
        leases.add(again.lease_id, LentBlock(0, block, pool.generation(block) + 1, b"", 16))


def test_whoever_asked_is_told_once_how_the_lease_ended_when_its_blocks_are_back() -> None:
    leases, pool = table()
    told: list[tuple[str, int]] = []
    ids = []
    for _ in range(3):
        lease = leases.grant(call(), "p", "b", now=0, on_end=lambda end: told.append((end, pool.ledger().lent)))
        lend(leases, pool, lease, 1)
        ids.append(lease.lease_id)
    leases.release(ids[0], now=1)
    leases.release(ids[0], now=1)
    leases.abandon(ids[1], now=1)
    leases.expire(now=TTL)
    leases.expire(now=9 * TTL)
    assert told == [("released", 2), ("abandoned", 1), ("expired", 0)]


def test_a_block_with_a_new_owner_makes_the_release_bad() -> None:
    class Forgetful(BlockPool):
        """A pool with the bug that generations guard against: it gives away a lent block."""

        def generation(self, block: int) -> int:
            return super().generation(block) + self.given_away

        given_away = 0

    pool = Forgetful(4, 16)
    leases = LeaseTable(pool, Metrics())
    lease = leases.grant(call(), "p", "b", now=0)
    lend(leases, pool, lease, 2)
    pool.given_away = 1
    answer = leases.release(lease.lease_id, now=1)
    assert not answer.good
    assert "changed their owner" in answer.reason
    assert leases.release(lease.lease_id, now=2) == answer


def test_only_lent_blocks_may_be_read_and_only_under_their_own_live_lease() -> None:
    leases, pool = table()
    mine, other = (leases.grant(call(), "p", "b", now=0) for _ in range(2))
    blocks, theirs = lend(leases, pool, mine, 2), lend(leases, pool, other, 1)
    assert leases.may_read(mine.lease_id, blocks)
    assert not leases.may_read(mine.lease_id, [*blocks, *theirs])
    assert not leases.may_read("no such lease", blocks)
    leases.release(mine.lease_id, now=1)
    assert not leases.may_read(mine.lease_id, blocks)


def test_the_probe_lease_reads_the_probe_block_and_nothing_else() -> None:
    leases, _ = table(num_blocks=8)
    assert leases.may_read("probe", [8, 8])
    assert not leases.may_read("probe", [8, 0])
    assert not leases.may_read("probe", [9])


class Lending(RuleBasedStateMachine):
    """All operations at random against a model that is nothing but a list of (blocks, deadline, state)."""

    def __init__(self) -> None:
        super().__init__()
        self.leases, self.pool = table(6)
        self.now = 0.0
        self.model: dict[str, tuple[list[int], float, str]] = {}

    def _expire_in_model(self) -> None:
        for lease_id, (blocks, deadline, state) in self.model.items():
            if state == "live" and deadline <= self.now:
                self.model[lease_id] = (blocks, deadline, "expired")

    def _pick(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.model)))

    @rule(ttl=st.sampled_from([1.0, 3.0]))
    def grant(self, ttl: float) -> None:
        lease = self.leases.grant(call(ttl), "p", "b", self.now)
        self.model[lease.lease_id] = ([], self.now + ttl, "live")

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        lease_id = self._pick(data)
        block = self.pool.allocate(1)
        if block is None:
            return
        one = LentBlock(0, block[0], self.pool.generation(block[0]), b"", 16)
        blocks, deadline, state = self.model[lease_id]
        if state == "live":
            self.leases.add(lease_id, one)
            blocks.append(block[0])
        else:
            with pytest.raises(NotFound):
                self.leases.add(lease_id, one)
        self.pool.release(block)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        lease_id = self._pick(data)
        blocks, deadline, state = self.model[lease_id]
        good = state == "live"
        assert self.leases.renew(lease_id, self.now).good == good
        if good:
            ttl = self.leases._entries[lease_id].lease.ttl_s
            self.model[lease_id] = (blocks, self.now + ttl, "live")

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease_id = self._pick(data)
        blocks, deadline, state = self.model[lease_id]
        answer = self.leases.release(lease_id, self.now)
        if state == "live":
            assert answer.good
            self.model[lease_id] = (blocks, deadline, "released")
        elif state != "released":
            assert not answer.good

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        lease_id = self._pick(data)
        blocks, deadline, state = self.model[lease_id]
        self.leases.abandon(lease_id, self.now)
        if state == "live":
            self.model[lease_id] = (blocks, deadline, "abandoned")

    @rule(step=st.sampled_from([0.5, 1.0, 2.5]))
    def time_passes(self, step: float) -> None:
        self.now += step
        self.leases.expire(self.now)
        self._expire_in_model()

    @invariant()
    def exactly_the_live_leases_hold_blocks(self) -> None:
        live = [b for blocks, _, state in self.model.values() if state == "live" for b in blocks]
        assert sorted(self.leases.lent()) == sorted(live)
        assert self.pool.ledger().lent == len(set(live))
        assert self.leases.num_live == sum(state == "live" for _, _, state in self.model.values())
        self.pool.check()


TestLending = Lending.TestCase
TestLending.settings = settings(max_examples=60, stateful_step_count=40)
