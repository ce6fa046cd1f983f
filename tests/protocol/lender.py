"""One boot of the lender: real pool, real leases, and as little around them as there is in worker/lending.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from baton.core.handoff import LentBlock, PrefillCall
from baton.core.machines import LENDING, Life
from baton.core.metrics import Metrics
from baton.core.request import Request
from baton.engine.block_pool import BlockPool
from baton.kv_transfer.digest import digest
from baton.kv_transfer.memory import KVMemory
from baton.worker.ledger import check_ledger
from tests.protocol.bounds import BLOCK_BYTES, LENDER, TTL_S, Bounds, Parts, content, hash_of
from tests.protocol.manual_loop import EPOCH

Message = tuple[Any, ...]
"""(kind, request or lease id, more)."""


@dataclass(slots=True)
class Lending:
    lease_id: str
    blocks: list[int]
    """Held by the sequence until it leaves the scheduler."""
    life: Life


class LenderSide:
    def __init__(self, bounds: Bounds, parts: Parts, boot: int, send: Callable[[Message], None]) -> None:
        self.boot = boot
        self.now = EPOCH
        self.pool = parts.pool(bounds.lender_blocks, 1)
        self.leases = parts.leases(self.pool, Metrics())
        self.memory = KVMemory(bounds.lender_blocks, BLOCK_BYTES, shared=False)
        self.lendings: dict[str, Lending] = {}
        self._blocks_each = bounds.blocks_each
        self._send = send
        self._owners: dict[tuple[int, int], str] = {}
        """(block, generation) -> the one sequence that it ever names."""
        self._granted: dict[str, str] = {}
        """Lease id -> whose."""

    # ---- its calls -------------------------------------------------------------------------------------------------

    def call(self, name: str) -> None:
        """Accept, compute, lend and publish; the sequence holds its blocks until `hand`."""
        hashes = [hash_of(name, i) for i in range(self._blocks_each)]
        blocks = self.pool.match(hashes)
        self.pool.acquire(blocks)
        fresh = self.pool.allocate(len(hashes) - len(blocks))
        if fresh is None:
            self.pool.release(blocks)
            self._send(("refused", name))
            return
        self._own(fresh, name)
        blocks += fresh
        request = Request(name, tuple(range(len(blocks))))
        lease = self.leases.grant(PrefillCall(request, 1, "d", 0, TTL_S), LENDER, f"boot{self.boot}", self.now)
        self._granted[lease.lease_id] = name
        lending = self.lendings[name] = Lending(lease.lease_id, blocks, Life(LENDING))
        lending.life.on("publish")
        lent = []
        for i, block in enumerate(blocks):
            if block in fresh:
                self.memory.block(block)[:] = content(name, i)
                self.pool.publish(block, hashes[i])
            one = LentBlock(i, block, self.pool.generation(block), digest(self.memory.block(block)), 1)
            self.leases.add(lease.lease_id, one)
            lent.append((one.block_id, one.generation, one.digest))
        self._send(("published", name, lease.lease_id, tuple(lent), self.boot))

    def hand(self, name: str) -> None:
        """The prompt is done: the lease alone holds the blocks."""
        lending = self.lendings.pop(name)
        lending.life.on("hand")
        self.pool.release(lending.blocks)
        self._send(("state", name))

    def close(self, name: str) -> None:
        """The reader closed its call."""
        lending = self.lendings.pop(name, None)
        if lending is not None:
            lending.life.on("end")
            self.pool.release(lending.blocks)
            self.leases.abandon(lending.lease_id, self.now)

    def release(self, lease_id: str, name: str) -> None:
        granted = self._granted.get(lease_id, name)
        assert granted == name, f"the reader's release of {name} ended the lease of {granted}"
        was_live = self.leases.may_read(lease_id, ())
        lent = {b: bytes(self.memory.block(b)) for b in self.leases.lent()}
        answer = self.leases.release(lease_id, self.now)
        if was_live and answer.good:
            now = {b: bytes(self.memory.block(b)) for b in lent}
            assert now == lent, f"a release changed lent blocks {lent} to {now}"
        self._send(("answer", lease_id, answer.good))

    def renew(self, lease_id: str) -> None:
        self.leases.renew(lease_id, self.now)

    # ---- what else happens on it -----------------------------------------------------------------------------------

    def reuse(self, name: str) -> None:
        """Another sequence takes a block, fills it and leaves it cached."""
        blocks = self.pool.allocate(1)
        if blocks is None:
            return
        self._own(blocks, name)
        self.memory.block(blocks[0])[:] = content(name, 0)
        self.pool.publish(blocks[0], hash_of(name, 0))
        self.pool.release(blocks)

    def tick(self) -> None:
        self.now += TTL_S

    @property
    def timer_is_due(self) -> bool:
        deadline = self.leases.next_deadline()
        return deadline is not None and deadline <= self.now

    # ---- what must hold --------------------------------------------------------------------------------------------

    def _own(self, blocks: list[int], name: str) -> None:
        for block in blocks:
            key = (block, self.pool.generation(block))
            assert key not in self._owners, (
                f"generation {key[1]} of the lender's block {block} named {self._owners[key]}, and now {name}"
            )
            self._owners[key] = name

    def check(self) -> None:
        tables = [lending.blocks for lending in self.lendings.values()]
        check_ledger(self.pool, tables, self.leases.lent(), ())
        check_cache(self.pool, self.memory, "the lender")

    def check_at_rest(self) -> None:
        ledger = self.pool.ledger()
        assert ledger.free + ledger.cached == ledger.total, f"the lender's blocks never came back: {ledger}"
        assert self.leases.num_live == 0, f"{self.leases.num_live} leases live for ever"
        assert self.leases.next_deadline() is None, "an ended lease is never forgotten"


def check_cache(pool: BlockPool, memory: KVMemory, whose: str) -> None:
    """Every block that a prefix match could hand out holds what its hash names."""
    for block_hash, block in pool._holder.items():
        found = bytes(memory.block(block))
        assert found == block_hash, f"{whose} shows {found!r} under the hash of {block_hash!r} (block {block})"
