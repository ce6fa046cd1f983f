"""The prefix index: which worker holds which blocks, exactly, as their own KV events say.

A block hash names a block and everything before it, so the index is one flat map from hash to a bit per worker, and
a lookup walks the prompt's hashes with a mask that only loses bits. It holds what the workers' pools hold and no
more: every eviction is an event. It does not know prompts, load or streams.

Life of a worker's entries:

1. `apply_snapshot`: all that was known of the worker is replaced.
2. `apply`: events in order; a gap or an unknown boot is refused, and the caller takes a new snapshot.
3. `drop`: the worker is dead or has a new boot.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from baton.core.block_hash import BlockHash
from baton.core.messages import KVEvents, KVSnapshot


@dataclass(slots=True)
class _Holder:
    boot_id: str
    bit: int
    """One bit, unique among present workers; used again after a drop."""
    seq: int
    hashes: set[BlockHash] = field(default_factory=set)


class PrefixIndex:
    """One thread, no waits. Memory: one map entry per distinct hash, one set entry per (worker, hash)."""

    def __init__(self) -> None:
        self._masks: dict[BlockHash, int] = {}
        self._holders: dict[str, _Holder] = {}
        self._names: dict[int, str] = {}
        self._everyone = 0

    @property
    def num_blocks(self) -> int:
        """Distinct hashes."""
        return len(self._masks)

    def num_held(self, worker_id: str) -> int:
        holder = self._holders.get(worker_id)
        return len(holder.hashes) if holder else 0

    def apply_snapshot(self, worker_id: str, boot_id: str, snapshot: KVSnapshot) -> None:
        """The whole prefix map of a worker as of event `snapshot.seq`; what was known before is void."""
        holder = self._holders.get(worker_id)
        if holder is None:
            holder = self._admit(worker_id)
        now_held = set(snapshot.hashes)
        self._forget(holder, holder.hashes - now_held)
        self._learn(holder, now_held - holder.hashes)
        holder.boot_id, holder.seq = boot_id, snapshot.seq

    def apply(self, worker_id: str, boot_id: str, events: KVEvents) -> bool:
        """Take the next change of a worker's prefix map. An event seen before changes nothing.

        False: events are missing or the boot is unknown, nothing was changed; resync with a snapshot. `stored` and
        `removed` are the net change, so a hash in both (evicted, then computed again) ends up stored.
        """
        holder = self._holders.get(worker_id)
        if holder is None or holder.boot_id != boot_id or events.seq > holder.seq + 1:
            return False
        if events.seq <= holder.seq:
            return True
        self._forget(holder, events.removed)
        self._learn(holder, events.stored)
        holder.seq = events.seq
        return True

    def drop(self, worker_id: str) -> None:
        """Forget a worker; an unknown one is no error."""
        holder = self._holders.pop(worker_id, None)
        if holder is None:
            return
        self._forget(holder, tuple(holder.hashes))
        del self._names[holder.bit]
        self._everyone ^= holder.bit

    def match(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """How many leading blocks each worker holds. Workers that lack the first are left out.

        O(blocks + workers): one map lookup and one `and` per block, until nobody is left.
        """
        held: dict[str, int] = {}
        alive = self._everyone
        for depth, block_hash in enumerate(hashes):
            still = alive & self._masks.get(block_hash, 0)
            if still != alive:
                self._note(held, alive ^ still, depth)
                alive = still
                if not alive:
                    return held
        self._note(held, alive, len(hashes))
        return held

    def _note(self, held: dict[str, int], bits: int, depth: int) -> None:
        while depth and bits:
            lowest = bits & -bits
            held[self._names[lowest]] = depth
            bits ^= lowest

    def _admit(self, worker_id: str) -> _Holder:
        bit = ~self._everyone & (self._everyone + 1)  # the lowest bit nobody has
        holder = self._holders[worker_id] = _Holder("", bit, 0)
        self._names[bit] = worker_id
        self._everyone |= bit
        return holder

    def _learn(self, holder: _Holder, hashes: Collection[BlockHash]) -> None:
        masks, bit = self._masks, holder.bit
        for block_hash in hashes:
            masks[block_hash] = masks.get(block_hash, 0) | bit
        holder.hashes.update(hashes)

    def _forget(self, holder: _Holder, hashes: Collection[BlockHash]) -> None:
        masks, bit = self._masks, holder.bit
        for block_hash in hashes:
            rest = masks.get(block_hash, 0) & ~bit
            if rest:
                masks[block_hash] = rest
            else:
                masks.pop(block_hash, None)
        holder.hashes.difference_update(hashes)
