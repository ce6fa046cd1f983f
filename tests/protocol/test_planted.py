"""The exploration can fail: each of these bugs, known from real systems, is found, and the way there can be read."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from baton.core.handoff import Lease, LentBlock, PrefillCall
from baton.core.worker import WorkerInfo
from baton.engine.block_pool import BlockPool
from baton.kv_transfer.lease import LeaseTable, OnEnd
from baton.kv_transfer.puller import Puller
from tests.protocol.bounds import Bounds, Parts
from tests.protocol.explore import Violation, explore
from tests.protocol.test_exploration import published

RELEASE_UNDER_WAY = (("start", "a"), ("deliver", ("call", "a")), ("deliver", published("p:boot:1")), ("cancel", "a"))
"""The reader has left, and its release of the lease is on the way."""


class SameGeneration(BlockPool):
    """A block's new owner gets the generation of the last one."""

    def generation(self, block: int) -> int:
        return min(super().generation(block), 1)


class FreedAtTimeout(BlockPool):
    """A time-out gives the blocks back, whatever the transport still does."""

    def quarantine(self, block: int) -> None: ...

    def unquarantine(self, block: int) -> None: ...


class FreeWithoutReferences(BlockPool):
    """Who lets go of a quarantined block frees it."""

    def _place_of(self, block: int) -> Any:
        kept, self._quarantined[block] = self._quarantined[block], self._quarantined[block] and self._refs[block] > 0
        place = super()._place_of(block)
        self._quarantined[block] = kept
        return place


class NothingQuarantined(Puller):
    def quarantined_blocks(self) -> set[int]:
        return set()


class NeverExpires(LeaseTable):
    def expire(self, now: float) -> tuple[str, ...]:
        return () if self.num_live else super().expire(now)


class AbandonedKeepsPins(LeaseTable):
    def abandon(self, lease_id: str, now: float) -> None:
        """Ends the lease, but forgets its blocks."""
        pool, self._pool = self._pool, _NoPins()
        super().abandon(lease_id, now)
        self._pool = pool


class _NoPins:
    def unlend(self, block: int) -> None: ...


class RepeatsLeaseIds(LeaseTable):
    """After a restart the first lease has the id of the first lease before."""

    def grant(
        self, call: PrefillCall, worker_id: str, boot_id: str, now: float, on_end: OnEnd | None = None
    ) -> Lease:
        return super().grant(call, worker_id, "boot", now, on_end)


class PolledByTheNextRequest(Puller):
    """Nobody looks at the quarantine until somebody wants blocks."""

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def pull(
        self, peer: WorkerInfo, lease_id: str, blocks: Sequence[LentBlock], destination: Sequence[int],
        part: tuple[int, int] | None = None,
    ) -> None:
        self.poll()
        await super().pull(peer, lease_id, blocks, destination, part)


class Alike(bytes):
    """A digest that equals every other."""

    def __ne__(self, other: object) -> bool:
        return False


PLANTED = {
    "generation not bumped on reuse": (
        Parts(pool=SameGeneration), Bounds(limits={"reuse at P": 2}),
        r"generation 1 of the lender's block \d named P1, and now P2"),
    "blocks returned at the time-out, before terminal": (
        Parts(pool=FreedAtTimeout, puller=NothingQuarantined), Bounds(races=False),
        "landed in block 0, which belongs to nobody"),
    "release of a handle taken for a fence": (
        Parts(fences=False), Bounds(races=False), "landed in block 0, which belongs to nobody"),
    "a lease never expires": (Parts(leases=NeverExpires), Bounds(), "the lender's blocks never came back"),
    "an abandoned lease keeps its pins": (
        Parts(leases=AbandonedKeepsPins), Bounds(),
        r"block 0: the pool counts .* = \(0, 1, False\), its owners \(0, 0, False\)"),
    "quarantine polled by the next request only": (
        Parts(puller=PolledByTheNextRequest), Bounds(), "the reader's blocks never came back"),
    "a lease id comes again after a restart": (
        Parts(leases=RepeatsLeaseIds), Bounds(("a", "b"), before=RELEASE_UNDER_WAY, limits={"crash at P": 1}),
        "the reader's release of a ended the lease of b"),
    "late blocks freed with their last reference": (
        Parts(pool=FreeWithoutReferences), Bounds(races=False, limits={"reuse at D": 1}),
        "block 0 published while _Place.QUARANTINED"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(name: str) -> None:
    parts, bounds, why = PLANTED[name]
    with pytest.raises(Violation, match=why):
        explore(bounds, parts)


def test_a_skipped_digest_is_found_and_the_way_there_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.kv_transfer.puller.digest", lambda data: Alike())
    with pytest.raises(Violation) as violation:
        explore(Bounds(limits={"reuse at P": 2}, races=False))
    assert str(violation.value) == """\
the reader shows b'P2.0----' under the hash of b'a.0-----' (block 0)
   1. start a
   2. deliver call a
   3. deliver published a
   4. hand a
   5. deliver state a
   6. clock at P
   7. lease timer
   8. reuse at P
   9. reuse at P
  10. land 0 new bytes
  11. no answer a"""
