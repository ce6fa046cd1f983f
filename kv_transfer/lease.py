"""What this worker lends, to whom, and until when: the lender's side of docs/protocol.md, table "Lease"
(core.machines.LEASE; every state here is reached through it).

Owns the leases and the pins they hold on blocks. Does not know sequences, transports or RPC; has no clock: every
call that depends on time takes `now` (event loop seconds).

Life of a lease:
1. granted, LIVE and empty; the lender computes.
2. blocks are added as they are committed; each is pinned (lent) in the pool.
3. the reader renews it before `ttl_s` has passed since the last renewal.
4. it ends once: RELEASED by the reader, EXPIRED by the timer, or ABANDONED because the reader's call went away.
   Its blocks are unpinned in that moment.
5. its end is remembered for 2 x ttl, so that a late release hears what happened; then it is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from baton.core.errors import NotFound
from baton.core.handoff import Lease, LentBlock, PrefillCall, ReleaseAnswer, Shard
from baton.core.machines import LEASE, Life
from baton.core.metrics import Metrics
from baton.kv_transfer.transport import PROBE_LEASE

REMEMBERED_TTLS = 2


class LendableBlocks(Protocol):
    """The block pool, as far as lending goes."""

    @property
    def num_blocks(self) -> int:
        """Pool size; the probe block has this index."""
        ...

    def lend(self, block: int) -> None: ...

    def unlend(self, block: int) -> None: ...

    def generation(self, block: int) -> int: ...


OnEnd = Callable[[str], None]
"""Told once how a lease ended: released, expired or abandoned."""


@dataclass(slots=True)
class _Entry:
    lease: Lease
    deadline: float
    """LIVE: when it expires. Ended: when it is forgotten."""
    on_end: OnEnd | None = None
    life: Life = field(default_factory=lambda: Life(LEASE))
    blocks: dict[int, int] = field(default_factory=dict)
    """block id -> generation it was published with, in sequence order."""
    answer: ReleaseAnswer = ReleaseAnswer(good=True)
    """What a release hears once the lease has ended."""


class LeaseTable:
    """All leases of one boot."""

    def __init__(self, blocks: LendableBlocks, metrics: Metrics) -> None:
        self.metrics = metrics
        self._pool = blocks
        self._entries: dict[str, _Entry] = {}
        self._num_granted = 0
        self._num_live = 0

    @property
    def num_live(self) -> int:
        return self._num_live

    def grant(
        self, call: PrefillCall, worker_id: str, boot_id: str, now: float, on_end: OnEnd | None = None
    ) -> Lease:
        """A new, empty lease for this call. Its id is unique over boots. `on_end` is called when it has ended and its
        blocks are unpinned; it may call nothing here."""
        self._num_granted += 1
        num_tokens = len(call.request.shared)
        lease = Lease(
            lease_id=f"{worker_id}:{boot_id}:{self._num_granted}",
            request_id=call.request.request_id,
            epoch=call.epoch,
            ttl_s=call.lease_ttl_s,
            shards=(Shard(0, worker_id, boot_id, 0, num_tokens),),
        )
        self._entries[lease.lease_id] = _Entry(lease, now + lease.ttl_s, on_end)
        self._num_live += 1
        return lease

    def add(self, lease_id: str, block: LentBlock) -> None:
        """Lend one more block, which the caller is about to publish; once, if it publishes the layers of a block in
        parts. Raises NotFound when the lease has ended."""
        entry = self._entries.get(lease_id)
        if entry is None or not entry.life.at("live"):
            raise NotFound(f"lease {lease_id} has ended ({_why(entry)}): its reader stopped renewing it or went away.")
        lent_as = entry.blocks.get(block.block_id)
        assert lent_as in (None, block.generation), f"block {block.block_id} had another owner, {lent_as}"
        if lent_as is not None:
            return
        self._pool.lend(block.block_id)
        entry.blocks[block.block_id] = block.generation
        self.metrics.inc("baton_published_blocks_total")

    def renew(self, lease_id: str, now: float) -> ReleaseAnswer:
        """The reader lives. good=False tells it that the lease is gone."""
        entry = self._live(lease_id, now)
        if entry is None:
            return self._ended_answer(lease_id, renewing=True)
        entry.life.on("renew")
        entry.deadline = now + entry.lease.ttl_s
        return ReleaseAnswer(good=True)

    def release(self, lease_id: str, now: float) -> ReleaseAnswer:
        """The reader needs the blocks no more. good: LIVE until now and every block still has the generation it was
        published with. Repeating a release repeats its answer."""
        entry = self._live(lease_id, now)
        if entry is None:
            return self._ended_answer(lease_id, renewing=False)
        moved = [b for b, generation in entry.blocks.items() if self._pool.generation(b) != generation]
        if moved:
            entry.answer = ReleaseAnswer(False, f"blocks {moved} changed their owner while they were lent")
        self._end(entry, "release", now)
        return entry.answer

    def abandon(self, lease_id: str, now: float) -> None:
        """The reader's call went away before the hand-off. Ignored if the lease has ended already."""
        entry = self._entries.get(lease_id)
        if entry is not None and entry.life.at("live"):
            entry.answer = ReleaseAnswer(False, "the prefill call went away before the hand-off")
            self._end(entry, "abandon", now)

    def expire(self, now: float) -> tuple[str, ...]:
        """For the timer: end what was not renewed, forget what ended long ago. Returns the ids expired now."""
        expired = []
        for lease_id, entry in list(self._entries.items()):
            if entry.deadline > now:
                continue
            if entry.life.at("live"):
                self._expire(entry, now)
                expired.append(lease_id)
            else:
                entry.life.on("forget")
                del self._entries[lease_id]
        return tuple(expired)

    def may_read(self, lease_id: str, blocks: Sequence[int]) -> bool:
        """Whether all these blocks are lent under this lease now. For transports whose lender takes part."""
        if lease_id == PROBE_LEASE:
            return all(b == self._pool.num_blocks for b in blocks)
        entry = self._entries.get(lease_id)
        return entry is not None and entry.life.at("live") and all(b in entry.blocks for b in blocks)

    def lent(self) -> Iterator[int]:
        """Block ids pinned by leases, once per lease that pins them."""
        for entry in self._entries.values():
            if entry.life.at("live"):
                yield from entry.blocks

    def next_deadline(self) -> float | None:
        """When `expire` will next have something to do; None when there is nothing."""
        return min((e.deadline for e in self._entries.values()), default=None)

    def _live(self, lease_id: str, now: float) -> _Entry | None:
        """The entry if it is LIVE at `now`: past its deadline it is expired even if the timer has not run yet."""
        entry = self._entries.get(lease_id)
        if entry is None or not entry.life.at("live"):
            return None
        if entry.deadline <= now:
            self._expire(entry, now)
            return None
        return entry

    def _expire(self, entry: _Entry, now: float) -> None:
        entry.answer = ReleaseAnswer(False, f"the lease expired: it was not renewed for {entry.lease.ttl_s:g} s")
        self._end(entry, "expire", now)

    def _end(self, entry: _Entry, event: str, now: float) -> None:
        state = entry.life.on(event)
        entry.deadline = now + REMEMBERED_TTLS * entry.lease.ttl_s
        # Tail first: in the pool's LRU order a sequence's tail must be evicted before its head.
        for block in reversed(entry.blocks):
            self._pool.unlend(block)
        self._num_live -= 1
        self.metrics.inc("baton_leases_total", end=state)
        if entry.on_end is not None:
            entry.on_end(state)

    def _ended_answer(self, lease_id: str, renewing: bool) -> ReleaseAnswer:
        entry = self._entries.get(lease_id)
        if entry is None:
            return ReleaseAnswer(False, "this worker knows no such lease (another boot, or it ended long ago)")
        if renewing and entry.answer.good:
            return ReleaseAnswer(False, "the lease was released")
        return entry.answer


def _why(entry: _Entry | None) -> str:
    return "unknown" if entry is None else entry.life.state
