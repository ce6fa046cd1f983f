"""Where the bytes in a worker's blocks come from: who wrote them, for which tenant, under which owner of the block.

Watches one boot of one worker from outside production code. The runner says what it writes and reads, the transport
what lands; each is checked against the block pool at that very moment:

    a write lands   only in blocks that one owner holds: the sequence that computes, or the pull that was given them
    a block is read only if it was written since its present owner got it, and for the same tenant

What two requests may share is decided by hashes far away from here. This is where a wrong decision would show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.engine.block_pool import BlockPool

Report = Callable[[str], None]
_PINS = "(references, lends, quarantined)"


@dataclass(frozen=True, slots=True)
class Mark:
    """On a block: `generation` of the owner who wrote it, and for whom."""

    generation: int
    tenant: str


class Provenance:
    def __init__(self, worker_id: str, pool: BlockPool, failed: Report) -> None:
        """`failed` ends the run; it is told here and not raised, because transports write as nobody's process."""
        self.worker_id = worker_id
        self.num_landings = 0
        self._pool = pool
        self._failed = failed
        self._marks: dict[int, Mark] = {}

    def generations(self, blocks: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._pool.generation(b) for b in blocks)

    def mark(self, block: int) -> Mark | None:
        return self._marks.get(block)

    # ---- pulls ---------------------------------------------------------------------------------------------------

    def lands(self, block: int, generation: int, mark: Mark | None) -> None:
        """A pull that was given `block` under `generation` writes to it now; the lender's block was marked so."""
        if block >= self._pool.num_blocks:
            return  # the probe block: nobody's
        self.num_landings += 1
        refs, lends, quarantined = self._pool.pins(block)
        if self._pool.generation(block) != generation:
            self._failed(f"{self.worker_id}: a pull wrote to block {block}, which has had another owner since")
        elif lends or refs > 1 or not (refs or quarantined):
            held = (refs, lends, quarantined)
            self._failed(f"{self.worker_id}: a pull wrote to block {block} with {_PINS} = {held}")
        if mark is not None:
            self._marks[block] = Mark(generation, mark.tenant)

    # ---- steps ---------------------------------------------------------------------------------------------------

    def begins_writing(self, block: int) -> int:
        """A step will write to the block: one sequence holds it, and nobody else reads or writes there. Returns its
        generation."""
        held = self._pool.pins(block)
        if held != (1, 0, False):
            self._failed(f"{self.worker_id}: a step writes to block {block} with {_PINS} = {held}")
        return self._pool.generation(block)

    def wrote(self, block: int, generation: int, tenant: str) -> None:
        """The step has written. Meanwhile the block may have been lent (its first layers), but not given away."""
        if self._pool.generation(block) != generation or self._pool.pins(block)[2]:
            self._failed(f"{self.worker_id}: a step wrote to block {block}, which was taken away under it")
        self._marks[block] = Mark(generation, tenant)

    def forked(self, block: int, tenant: str) -> None:
        """The partial tail of one of several choices was copied here from the first one's, before its first step."""
        mark, generation = self._marks.get(block), self._pool.generation(block)
        if mark is None or mark.generation != generation:
            self._marks[block] = Mark(generation, tenant)

    def reads(self, block: int, tenant: str) -> None:
        """A step for `tenant` attends to what is in the block."""
        mark, generation = self._marks.get(block), self._pool.generation(block)
        if mark is None or mark.generation != generation:
            self._failed(f"{self.worker_id}: a step read block {block}, which nobody wrote since its owner got it")
        elif mark.tenant != tenant:
            self._failed(f"{self.worker_id}: a step of tenant {tenant!r} read block {block} of tenant {mark.tenant!r}")
