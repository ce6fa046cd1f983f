"""The prefix index: which worker holds which blocks, exactly, as their own KV events say.

A block hash names a block and everything before it, so the index is one flat map from hash to a bit per worker, and
a lookup walks the prompt's hashes with a mask that only loses bits. It holds what the workers' pools hold and no
more: every eviction is an event. It does not know prompts, load or streams, nor what is only on its way (coming.py).

Life of a worker's entries:

1. `apply_snapshot`: all that was known of the worker is replaced.
2. `apply`: events in order; a gap or an unknown boot is refused, and the caller takes a new snapshot.
3. Full: of the worker that holds most, entries go that no prompt has asked for lately. What is left is still true.
4. `drop`: the worker is dead or has a new boot. Its bit is void at once; the entries are swept out by and by.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from baton.core.block_hash import BlockHash
from baton.core.messages import KVEvents, KVSnapshot

MAX_ENTRIES = 1 << 24
"""(worker, block) pairs that an index holds: 268 M tokens in blocks of 16, and about 2 GB (bench/route_index.py)."""
SLICE = 512
"""Entries swept or dropped at once: about 0.3 ms."""


@dataclass(slots=True)
class _Holder:
    boot_id: str
    at: int
    """Where its bit is, which no other worker has until all its entries are swept."""
    bit: int
    seq: int = 0
    hashes: set[BlockHash] = field(default_factory=set)


class Held(Mapping[str, int]):
    """Leading blocks of one prompt on each worker, most first; who lacks the first block is left out. A view: ask
    before the index changes. It costs what is asked of it, however many hold the prompt."""

    def __init__(self, groups: Sequence[tuple[int, int]], holders: Mapping[str, _Holder], names: Mapping[int, str]):
        self._groups = groups
        """(blocks, bits of those who hold as many), most blocks first."""
        self._holders = holders
        self._names = names

    def __getitem__(self, worker_id: str) -> int:
        found: int = self.get(worker_id, -1)
        if found < 0:
            raise KeyError(worker_id)
        return found

    def get(self, worker_id: str, default: Any = None) -> Any:
        """Asked for every candidate, and most hold nothing: no error is raised and caught on the way."""
        holder = self._holders.get(worker_id)
        if holder is not None:
            for num_blocks, bits in self._groups:
                if bits & holder.bit:
                    return num_blocks
        return default

    def __iter__(self) -> Iterator[str]:
        for _, bits in self._groups:
            if not bits & (bits - 1):  # one alone, as mostly
                yield self._names[bits.bit_length() - 1]
                continue
            # A string of digits is searched at C's speed. Taking the lowest bit away again and again would cost as
            # much for each worker as the mask is long.
            digits = f"{bits:b}"[::-1]
            at = digits.find("1")
            while at >= 0:
                yield self._names[at]
                at = digits.find("1", at + 1)

    def __len__(self) -> int:
        return sum(bits.bit_count() for _, bits in self._groups)


class PrefixIndex:
    """One thread, no waits. Memory: one map entry per distinct hash, one set entry per (worker, hash)."""

    def __init__(self, max_entries: int = MAX_ENTRIES, slice_entries: int = SLICE) -> None:
        self.num_dropped = 0
        """Entries that went because the index was full."""
        self._max_entries = max_entries
        self._slice = slice_entries
        self._masks: dict[BlockHash, int] = {}
        """May have bits of workers that are gone. Neighbours with equal holders mostly share one int."""
        self._holders: dict[str, _Holder] = {}
        self._names: dict[int, str] = {}
        """worker_id by place of the bit."""
        self._everyone = 0
        """Bits of those that are here."""
        self._taken = 0
        """The same and those still to be swept."""
        self._gone: deque[_Holder] = deque()
        self._num_entries = 0
        self._asked: set[BlockHash] = set()
        """Hashes found by prompts since the index is full: they get a second chance."""

    @property
    def num_blocks(self) -> int:
        """Distinct hashes, those that are still to be swept included."""
        return len(self._masks)

    @property
    def num_entries(self) -> int:
        """(worker, hash) pairs in memory."""
        return self._num_entries

    def num_held(self, worker_id: str) -> int:
        holder = self._holders.get(worker_id)
        return len(holder.hashes) if holder else 0

    def apply_snapshot(self, worker_id: str, boot_id: str, snapshot: KVSnapshot) -> None:
        """The whole prefix map of a worker as of event `snapshot.seq`; what was known before is void."""
        holder = self._holders.get(worker_id)
        if holder is None:
            holder = self._admit(worker_id)
        self._forget(holder, holder.hashes.difference(snapshot.hashes))
        self._learn(holder, snapshot.hashes)
        holder.boot_id, holder.seq = boot_id, snapshot.seq
        self._tidy(len(snapshot.hashes))

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
        self._tidy(len(events.stored))
        return True

    def drop(self, worker_id: str) -> None:
        """Forget a worker, at once and however much it holds; an unknown one is no error."""
        holder = self._holders.pop(worker_id, None)
        if holder is None:
            return
        del self._names[holder.at]
        self._everyone ^= holder.bit
        self._gone.append(holder)
        self._tidy(0)

    def match(self, hashes: Sequence[BlockHash]) -> Held:
        """How many leading blocks each worker holds.

        O(blocks): one map lookup each, until nobody is left, and one `and` where the holders change.
        """
        groups: list[tuple[int, int]] = []
        alive, last, depth = self._everyone, -1, 0
        for depth, mask in enumerate(map(self._masks.get, hashes, repeat(0))):
            if mask is not last:
                last, still = mask, alive & mask
                if still != alive:
                    if depth:
                        groups.append((depth, alive ^ still))
                    alive = still
                    if not alive:
                        break
        else:
            depth = len(hashes)
            if alive and depth:
                groups.append((depth, alive))
        if self._num_entries >= self._max_entries:
            if len(self._asked) > self._max_entries // 4:
                self._asked.clear()  # most of them long gone
            self._asked.update(hashes[:depth])
        return Held(groups[::-1], self._holders, self._names)

    def _admit(self, worker_id: str) -> _Holder:
        bit = ~self._taken & (self._taken + 1)  # the lowest bit nobody has
        holder = self._holders[worker_id] = _Holder("", bit.bit_length() - 1, bit)
        self._names[holder.at] = worker_id
        self._everyone |= bit
        self._taken |= bit
        return holder

    def _learn(self, holder: _Holder, hashes: Collection[BlockHash]) -> None:
        add, masks, bit = self._masks.setdefault, self._masks, holder.bit
        seen, after = 0, bit
        for block_hash in hashes:
            before = add(block_hash, bit)
            if before is not bit:
                if before is not seen:  # the int for its neighbour serves as well
                    seen, after = before, before | bit
                masks[block_hash] = after
        self._num_entries -= len(holder.hashes)
        holder.hashes.update(hashes)
        self._num_entries += len(holder.hashes)

    def _forget(self, holder: _Holder, hashes: Collection[BlockHash]) -> None:
        masks, bit = self._masks, holder.bit
        seen, after = bit, 0
        for block_hash in hashes:
            before = masks.get(block_hash, 0)
            if before is not seen:
                seen, after = before, before & ~bit
            if after:
                masks[block_hash] = after
            elif before:
                del masks[block_hash]
        self._num_entries -= len(holder.hashes)
        holder.hashes.difference_update(hashes)
        self._num_entries += len(holder.hashes)

    # ---- bounds ----

    def _tidy(self, num_stored: int) -> None:
        """Sweep twice as much as came in, so that what is gone never piles up; then make room."""
        left = self._slice + 2 * num_stored
        while self._gone and left > 0:
            left -= self._sweep(self._gone[0], left)
        while self._num_entries > self._max_entries:
            if self._gone:
                self._sweep(self._gone[0], self._slice)
            else:
                self._make_room()

    def _sweep(self, gone: _Holder, at_most: int) -> int:
        hashes = [gone.hashes.pop() for _ in range(min(at_most, len(gone.hashes)))]
        self._num_entries -= len(hashes)
        self._forget(gone, hashes)
        if not gone.hashes:
            self._taken ^= gone.bit
            self._gone.popleft()
        return max(1, len(hashes))

    def _make_room(self) -> None:
        """Drop a slice of the worker that holds most: what prompts have not asked for since its last turn. `set.pop`
        goes round the table like the hand of a clock, so what is spared comes up again after all the others."""
        most = max(self._holders.values(), key=lambda holder: len(holder.hashes))
        excess = self._num_entries - self._max_entries
        unasked: list[BlockHash] = []
        spared: list[BlockHash] = []
        while len(unasked) < max(excess, self._slice) and most.hashes:
            block_hash = most.hashes.pop()
            (spared if block_hash in self._asked else unasked).append(block_hash)
        self._asked.difference_update(spared)
        most.hashes.update(spared)
        self._num_entries -= len(unasked)
        self._forget(most, unasked)
        self.num_dropped += len(unasked)
