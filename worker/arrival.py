"""The blocks of one sequence on their way in: what is held already, what is promised, what came and was verified.

Owns these blocks until they are given back or handed to the scheduler. Does not know who lends or why.

Life: reserved (the cached prefix is held, the rest a credit) -> bound at the first publish (credit becomes destination
blocks) -> parts of blocks are announced, then verified -> handed to the scheduler, or given back. After a failure the
verified prefix can be kept and the rest reserved again, for the next lender.
"""

from __future__ import annotations

from baton.core.errors import IntegrityError, Overloaded
from baton.core.handoff import Layers, Published
from baton.core.sequence import SequenceState
from baton.engine.block_pool import Credit
from baton.worker.parts import WorkerParts


class Arrival:
    def __init__(self, parts: WorkerParts, seq: SequenceState, may_grow: bool = False) -> None:
        """`may_grow`: how long the sequence is only its lender knows; blocks beyond the reserved ones are taken as
        they are announced."""
        self.seq = seq
        self.num_held = 0
        """Leading full blocks that need not come."""
        self._parts = parts
        self._may_grow = may_grow
        self._num_tokens = seq.num_tokens
        """What was asked for. The sequence may get its first token while its KV still comes: that has none."""
        self._extra_blocks = 0
        self._credit: Credit | None = None
        self._announced: dict[int, int] = {}
        """Block index -> layers of it announced so far, from layer 0 on."""
        self._verified: dict[int, int] = {}
        """Block index -> how many of its layers are in and verified."""

    @property
    def blocks(self) -> list[int]:
        return self.seq.block_table.blocks

    # ---- room ----------------------------------------------------------------------------------------------------

    def reserve(self, extra_blocks: int = 0) -> None:
        """Hold what the prefix map has of the sequence, and promise blocks for the rest and `extra_blocks` more.
        Raises Overloaded when they cannot be promised; nothing is held then."""
        parts, seq = self._parts, self.seq
        held = parts.pool.match(parts.steps.scheduler.hashes(seq, (self._num_tokens - 1) // parts.pool.block_size))
        parts.pool.acquire(held)
        self.blocks.extend(held)
        self.num_held = len(held)
        self._extra_blocks = extra_blocks
        parts.hold(seq)
        self._promise_rest()

    def _promise_rest(self) -> None:
        parts = self._parts
        needed = parts.blocks_for(self._num_tokens) + self._extra_blocks - len(self.blocks)
        # Sequences that already wait for blocks come first, or a stream of credits would starve them.
        if needed + parts.steps.scheduler.num_blocks_wanted <= parts.pool.num_available:
            self._credit = parts.pool.reserve(needed)
        if self._credit is None:
            available = parts.pool.num_available
            self.give_back()
            raise Overloaded(
                f"{parts.worker_id} has {available} blocks available, the request needs {needed}. "
                "Try again later, or add decode workers."
            )

    def bind(self) -> None:
        """First publish: the promise becomes blocks."""
        if self._credit is not None:
            self.blocks.extend(self._parts.pool.bind(self._credit))
            self._credit = None

    # ---- what comes ----------------------------------------------------------------------------------------------

    def announce(self, event: Published) -> list[int]:
        """Destination blocks for what was published. Raises IntegrityError unless all of it is new and has its place:
        a lender's word is not enough."""
        layers = self._layers_of(event)
        indices = [b.index for b in event.blocks]
        known = self._parts.blocks_for(self._num_tokens)
        end = max(indices, default=-1) + 1 if self._may_grow else known
        faults = [i for i in indices if not self.num_held <= i < end or self._announced.get(i, 0) != layers.start]
        if faults or len(set(indices)) < len(indices) or not 0 <= layers.start < layers.end <= self._parts.num_layers:
            raise IntegrityError(
                f"blocks {indices} were published for layers [{layers.start}, {layers.end}); expected new ones from "
                f"{self.num_held} to {end}, layers in order"
            )
        self.bind()
        self._grow(end)
        self._announced.update(dict.fromkeys(indices, layers.end))
        return [self.blocks[i] for i in indices]

    def _grow(self, num_blocks: int) -> None:
        missing = num_blocks - len(self.blocks)
        if missing > 0:
            blocks = self._parts.pool.allocate(missing)
            if blocks is None:
                raise Overloaded(f"{self._parts.worker_id} has no {missing} blocks left for what is moved here.")
            self.blocks.extend(blocks)

    def verified(self, event: Published) -> None:
        """The bytes of this publish are in, and right."""
        layers = self._layers_of(event)
        for block in event.blocks:
            self._verified[block.index] = self._verified.get(block.index, 0) + layers.end - layers.start

    def _layers_of(self, event: Published) -> Layers:
        return event.layers or Layers(0, self._parts.num_layers)

    def num_verified(self) -> int:
        """Leading blocks that are ours, whole."""
        count = self.num_held
        while self._verified.get(count) == self._parts.num_layers:
            count += 1
        return count

    def distrust(self) -> None:
        """The lease was not good: only what was held before is ours."""
        self._verified.clear()

    # ---- after ---------------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Enter the full verified blocks in the prefix map: whoever asks next finds them. Not converted ones."""
        if self.seq.converted:
            return
        parts = self._parts
        full = min(self.num_verified(), self._num_tokens // parts.pool.block_size)
        for index, block_hash in enumerate(parts.steps.scheduler.hashes(self.seq, full)):
            if index >= self.num_held:
                parts.pool.publish(self.blocks[index], block_hash)

    def start_over(self) -> None:
        """For another lender: keep the verified full blocks, promise the rest anew. Blocks that may still be written to
        are in quarantine and stay there. Raises Overloaded; nothing is held then."""
        parts = self._parts
        self.publish()
        good = min(self.num_verified(), (self._num_tokens - 1) // parts.pool.block_size)
        self._drop_credit()
        parts.pool.release(self.blocks[good:])
        del self.blocks[good:]
        self.num_held = good
        self._announced.clear()
        self._verified.clear()
        self._promise_rest()

    def hand_out(self) -> None:
        """The scheduler gets the sequence, blocks and all."""
        self.bind()
        self._parts.let_go(self.seq)

    def give_back(self) -> None:
        """References and credit, once or often. What a pull may still write to is in quarantine: giving our reference
        back does not free it."""
        self._parts.let_go(self.seq)
        self._parts.pool.release(self.blocks)
        self.blocks.clear()
        self._drop_credit()
        self._parts.steps.wake()

    def _drop_credit(self) -> None:
        if self._credit is not None:
            self._parts.pool.drop(self._credit)
            self._credit = None
