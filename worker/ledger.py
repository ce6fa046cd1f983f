"""The block ledger, checked against the owners: every reference in the pool is held by somebody we can name.

The pool keeps its own counts (BlockPool.ledger, a gauge in production). This scan recounts them from the other side:
sequences and arriving requests hold references, live leases lend, the puller quarantines. Used after events in tests
and in the simulator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from baton.engine.block_pool import BlockPool


def check_ledger(
    pool: BlockPool, tables: Sequence[Sequence[int]], lent: Iterable[int], quarantined: Iterable[int]
) -> None:
    """Assert that pool and owners agree, block by block, and that the pool's own invariants hold. O(pool)."""
    pool.check()
    refs = Counter(block for table in tables for block in table)
    lends = Counter(lent)
    fenced_off = set(quarantined)
    for block in range(pool.num_blocks):
        state = pool.pins(block)
        owners = (refs[block], lends[block], block in fenced_off)
        assert state == owners, (
            f"block {block}: the pool counts (refs, lends, quarantined) = {state}, its owners {owners}"
        )
    ledger = pool.ledger()
    assert ledger.total == pool.num_blocks, f"{ledger} sums to {ledger.total}, the pool has {pool.num_blocks} blocks"
