"""The block pool: who holds which KV block, and which cached block can serve a new prompt.

Owns reference counts, the prefix map (block hash -> block), eviction, credits, pins and generations. Does not know
sequences, bytes or transfers: a block is a number, and its memory is somebody else's.

Life of a block:
    1. free -> active: `allocate` or `bind` gives it to its first owner; its generation grows.
    2. The owner fills it, and `publish`es it under its hash: from then on it can be found by `match`.
    3. Others `acquire` it, everybody `release`s it. Without references it is cached when it has a hash, else free.
    4. A pin outlives the references: a *lent* block waits for its readers, a *quarantined* one for bytes that may
       still land. Neither is free or cached before the pin is gone.
    5. cached -> active again through `match` and `acquire`, or evicted, least recently used first: back to 1.

A credit is a promise of n blocks to somebody who will need them soon. It names no blocks: until it is bound the
blocks behind it go on serving the cache. Everything that takes blocks out of (free + cached) leaves enough for all
credits, so that `bind` cannot fail.
"""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from baton.core.block_hash import BlockHash
from baton.core.messages import KVEvents, KVSnapshot
from baton.core.worker import Ledger


@dataclass(frozen=True, slots=True)
class Credit:
    """A promise of `num_blocks` blocks. Ends by `bind` or `drop`, once."""

    credit_id: int
    num_blocks: int


class _Place(enum.Enum):
    """Where a block counts in the ledger: the first that applies."""

    QUARANTINED = enum.auto()
    LENT = enum.auto()
    ACTIVE = enum.auto()
    CACHED = enum.auto()
    FREE = enum.auto()

    __hash__ = object.__hash__  # enum's own is written in Python, and every block that moves asks for it twice


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. Every method is O(blocks named), except `check` and `snapshot`."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 1, f"a pool of {num_blocks} blocks"
        assert block_size >= 1, f"blocks of {block_size} tokens"
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Facts of each block. `_place` follows from them; `_settle` keeps it, the lists and the counts in step.
        self._refs = [0] * num_blocks
        self._lends = [0] * num_blocks
        self._quarantined = [False] * num_blocks
        self._hash: list[BlockHash | None] = [None] * num_blocks
        self._generation = [0] * num_blocks
        self._place = [_Place.FREE] * num_blocks
        self._count = dict.fromkeys(_Place, 0) | {_Place.FREE: num_blocks}
        # Ordered: free blocks are reused last in, first out (their pages are warm), cached ones from the front.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(reversed(range(num_blocks)))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._holder: dict[BlockHash, int] = {}
        self._credits: set[Credit] = set()
        self._num_credited = 0
        self._next_credit = 1
        # Net change of the prefix map since the last `take_events`: hash -> stored (True) or removed (False).
        self._changes: dict[BlockHash, bool] = {}
        self._seq = 0

    # ---- the cache ----

    def match(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Blocks of the longest run of leading hashes that is held and may be acquired. Takes no references.

        The run ends where acquiring one more block would eat into a credit, so that `acquire` on the answer is
        always right, until the pool changes.
        """
        run: list[int] = []
        room = self.num_available
        for block_hash in hashes:
            block = self._holder.get(block_hash)
            if block is None:
                break
            if self._place[block] is _Place.CACHED:
                if room == 0:
                    break
                room -= 1
            run.append(block)
        return run

    def publish(self, block: int, block_hash: BlockHash) -> None:
        """Enter a full block, committed and verified, in the prefix map. The first holder of a hash stays; a later
        block with the same content gets no hash and becomes free when released. Repeating it changes nothing."""
        assert self._place[block] in (_Place.ACTIVE, _Place.LENT), f"block {block} published while {self._place[block]}"
        if self._hash[block] is not None:
            assert self._hash[block] == block_hash, f"block {block} is published under another hash"
            return
        if block_hash not in self._holder:
            self._holder[block_hash] = block
            self._hash[block] = block_hash
            self._changed(block_hash, stored=True)

    def unpublish(self, block: int) -> None:
        """Take a block out of the prefix map (its bytes are not what its hash says). Its holders keep it."""
        block_hash = self._hash[block]
        if block_hash is not None:
            del self._holder[block_hash]
            self._hash[block] = None
            self._changed(block_hash, stored=False)
            self._settle(block)

    # ---- references ----

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` and `reserve` can still give: free and cached ones, less outstanding credits."""
        return len(self._free) + len(self._cached) - self._num_credited

    def allocate(self, n: int) -> list[int] | None:
        """n blocks with one reference each, or None (and nothing changes) when that would eat into credits.
        Their bytes are whatever the last owner left."""
        assert n >= 0, f"allocate({n})"
        if n > self.num_available:
            return None
        return [self._take() for _ in range(n)]

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more reference on each block, which somebody holds, or `match` just named."""
        for block in blocks:
            place = self._place[block]
            assert place in (_Place.ACTIVE, _Place.LENT, _Place.CACHED), f"block {block} acquired while {place}"
            assert place is not _Place.CACHED or self.num_available > 0, f"acquiring block {block} breaks a credit"
            self._refs[block] += 1
            self._settle(block)

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less on each block. `blocks` are in sequence order: the tail will be evicted before the
        head, because a tail without its head can never be matched."""
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} released more often than acquired"
            self._refs[block] -= 1
            self._settle(block)

    def generation(self, block: int) -> int:
        """Owners the block has had. Bytes described under one generation are gone under the next."""
        return self._generation[block]

    # ---- credits ----

    def reserve(self, n: int) -> Credit | None:
        """Promise n blocks, or None when there are not that many to promise."""
        assert n >= 0, f"reserve({n})"
        if n > self.num_available:
            return None
        credit = Credit(self._next_credit, n)
        self._next_credit += 1
        self._credits.add(credit)
        self._num_credited += n
        return credit

    def bind(self, credit: Credit) -> list[int]:
        """Turn a live credit into blocks with one reference each. Never fails."""
        self.drop(credit)
        return [self._take() for _ in range(credit.num_blocks)]

    def drop(self, credit: Credit) -> None:
        """Give a live credit back unused."""
        assert credit in self._credits, f"credit {credit.credit_id} was bound or dropped before"
        self._credits.remove(credit)
        self._num_credited -= credit.num_blocks

    # ---- pins ----

    def lend(self, block: int) -> None:
        """Pin a block that the caller holds (reference or lend) for one more reader. A lent block is neither evicted
        nor freed, whatever happens to its references."""
        assert self._refs[block] or self._lends[block], f"block {block} lent by nobody who holds it"
        self._lends[block] += 1
        self._settle(block)

    def unlend(self, block: int) -> None:
        """End one lend. Unlend a lease's blocks tail first, as `release` does, so that heads live longer."""
        assert self._lends[block] > 0, f"block {block} is not lent"
        self._lends[block] -= 1
        self._settle(block)

    def is_pinned(self, block: int) -> bool:
        """Releasing the block now would give nothing back."""
        return self._lends[block] > 0 or self._quarantined[block]

    def pins(self, block: int) -> tuple[int, int, bool]:
        """(references, lends, quarantined): who holds the block, for the ledger scan."""
        return self._refs[block], self._lends[block], self._quarantined[block]

    def quarantine(self, block: int) -> None:
        """Pin a held block into which bytes may still land. It leaves the prefix map: nobody may read it."""
        assert self._refs[block] or self._lends[block], f"block {block} quarantined, but held by nobody"
        assert not self._quarantined[block], f"block {block} is in quarantine already"
        self._quarantined[block] = True
        self.unpublish(block)
        self._settle(block)

    def unquarantine(self, block: int) -> None:
        """No byte can land any more."""
        assert self._quarantined[block], f"block {block} is not in quarantine"
        self._quarantined[block] = False
        self._settle(block)

    # ---- what others see ----

    def ledger(self) -> Ledger:
        """Where every block is. O(1)."""
        c = self._count
        return Ledger(c[_Place.QUARANTINED], c[_Place.LENT], c[_Place.ACTIVE], c[_Place.CACHED], c[_Place.FREE])

    def take_events(self) -> tuple[KVEvents, ...]:
        """The net change of the prefix map since the last call: nothing, or one event with the next `seq`. No hash is
        both stored and removed in one event. The caller owes the event to every reader."""
        if not self._changes:
            return ()
        self._seq += 1
        stored = tuple(h for h, is_stored in self._changes.items() if is_stored)
        removed = tuple(h for h, is_stored in self._changes.items() if not is_stored)
        self._changes = {}
        return (KVEvents(self._seq, stored, removed),)

    def snapshot(self) -> KVSnapshot:
        """The prefix map exactly as of the last event taken. What changed since then is not in it: that comes with
        event `seq` + 1, so that a reader who starts here loses and doubles nothing."""
        then = [h for h in self._holder if h not in self._changes]
        then += [h for h, is_stored in self._changes.items() if not is_stored]
        return KVSnapshot(self._seq, tuple(then))

    def check(self) -> None:
        """Assert every invariant by a full scan."""
        for block in range(self.num_blocks):
            assert self._refs[block] >= 0, f"block {block} has {self._refs[block]} references"
            assert self._lends[block] >= 0, f"block {block} has {self._lends[block]} lends"
            assert self._place[block] is self._place_of(block), f"block {block} is not settled: {self._place[block]}"
            block_hash = self._hash[block]
            assert block_hash is None or self._holder.get(block_hash) == block, f"the map does not know block {block}"
            assert not (self._quarantined[block] and block_hash), f"block {block} is published and in quarantine"
        counted = Counter(self._place)
        assert all(counted[p] == n for p, n in self._count.items()), f"counts {self._count}, really {counted}"
        assert self.ledger().total == self.num_blocks, f"{self.ledger()} does not add up to {self.num_blocks}"
        for place, listed in ((_Place.FREE, self._free), (_Place.CACHED, self._cached)):
            really = {b for b in range(self.num_blocks) if self._place[b] is place}
            assert set(listed) == really, f"{place} lists {sorted(listed)}, really {sorted(really)}"
        num_hashed = sum(h is not None for h in self._hash)
        assert len(self._holder) == num_hashed, f"the map has {len(self._holder)} hashes, the blocks {num_hashed}"
        promised = sum(c.num_blocks for c in self._credits)
        assert self._num_credited == promised, f"credits of {promised} blocks counted as {self._num_credited}"
        assert self.num_available >= 0, f"credits of {promised} blocks, only {self.num_available + promised} to give"
        for block_hash, is_stored in self._changes.items():
            assert (block_hash in self._holder) == is_stored, "a pending event contradicts the prefix map"

    # ---- inside ----

    def _take(self) -> int:
        """One free block, else the least recently used cached one, for a new owner."""
        if self._free:
            block = next(reversed(self._free))
        else:
            block = next(iter(self._cached))
            self.unpublish(block)
        self._refs[block] = 1
        self._generation[block] += 1
        self._settle(block)
        return block

    def _changed(self, block_hash: BlockHash, stored: bool) -> None:
        # A hash alternates between stored and removed, so a second change undoes the one that is pending.
        if self._changes.pop(block_hash, None) is None:
            self._changes[block_hash] = stored

    def _place_of(self, block: int) -> _Place:
        if self._quarantined[block]:
            return _Place.QUARANTINED
        if self._lends[block]:
            return _Place.LENT
        if self._refs[block]:
            return _Place.ACTIVE
        return _Place.FREE if self._hash[block] is None else _Place.CACHED

    def _settle(self, block: int) -> None:
        """Call after every change of a block's facts."""
        old, new = self._place[block], self._place_of(block)
        if old is new:
            return
        if old is _Place.FREE:
            del self._free[block]
        elif old is _Place.CACHED:
            del self._cached[block]
        if new is _Place.FREE:
            self._free[block] = None
        elif new is _Place.CACHED:
            self._cached[block] = None
        self._place[block] = new
        self._count[old] -= 1
        self._count[new] += 1
