"""What a transport is: it moves the bytes of blocks from a peer's memory into ours, and knows for certain
when it no longer will.

Owns the order and the life of one pull as the transport sees it. Does not know leases' states, digests, quarantine
or deadlines: those are the puller's and the lender's.

    MOVING   bytes may land in the destination at any time
    DONE     every byte landed
    FAILED   not every byte landed, and none will any more
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.core.errors import BatonError, PeerLost
from baton.core.worker import WorkerInfo

PROBE_LEASE = "probe"
"""The lease id under which any connected peer may read the probe block, and nothing else."""

MayRead = Callable[[str, Sequence[int]], bool]
"""(lease id, block ids) -> whether the lender still lends all of them under that lease."""


class PullRefused(PeerLost):
    """The lender is alive but does not lend these blocks (any more)."""


class PullState(enum.Enum):
    MOVING = "moving"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class PullOrder:
    """Copy the lender's block source[i] to our block destination[i], for each i: the bytes [start, end) of each block,
    to the same place in ours. No other byte of the destination is touched."""

    lease_id: str
    source: tuple[int, ...]
    destination: tuple[int, ...]
    start: int = 0
    end: int | None = None
    """None: the end of the block."""

    def __post_init__(self) -> None:
        assert len(self.source) == len(self.destination), f"{len(self.source)} blocks to {len(self.destination)}"
        assert self.source, f"an empty order under lease {self.lease_id}"
        assert self.start >= 0, f"bytes from {self.start}"
        assert self.end is None or self.start < self.end, f"bytes [{self.start}, {self.end})"

    @property
    def part(self) -> slice:
        """Of each block's bytes."""
        return slice(self.start, self.end)

    def span(self, block_bytes: int) -> tuple[int, int]:
        """[start, end) of each block, `end` spelled out."""
        end = block_bytes if self.end is None else self.end
        assert self.start < end <= block_bytes, f"bytes [{self.start}, {end}) of a block of {block_bytes}"
        return self.start, end

    def overlaps(self, other: PullOrder, block_bytes: int) -> bool:
        """Whether the two would write to one byte."""
        (start, end), (other_start, other_end) = self.span(block_bytes), other.span(block_bytes)
        return start < other_end and other_start < end and not set(self.destination).isdisjoint(other.destination)


class Pull:
    """One transfer. The transport that made it ends it, exactly once; whoever waits for it may go away."""

    __slots__ = ("_ended", "error", "moved_blocks", "order", "state")

    def __init__(self, order: PullOrder) -> None:
        self.order = order
        self.state = PullState.MOVING
        self.error: BatonError | None = None
        """Why it FAILED."""
        self.moved_blocks = 0
        """Whole blocks landed so far, as far as the transport can tell: 0 until the end is allowed."""
        self._ended = asyncio.Event()

    async def wait(self) -> PullState:
        """The terminal state. Never raises for the transfer's sake; cancelling the waiter leaves the transfer be."""
        await self._ended.wait()
        return self.state

    def set_done(self) -> None:
        """For the transport, on the event loop: every byte is in the destination."""
        self._end(PullState.DONE)
        self.moved_blocks = len(self.order.source)

    def set_failed(self, error: BatonError) -> None:
        """For the transport, on the event loop: from now on no byte of this pull can land."""
        self._end(PullState.FAILED)
        self.error = error

    def _end(self, state: PullState) -> None:
        assert self.state is PullState.MOVING, f"a {self.state} pull was ended again as {state}"
        self.state = state
        self._ended.set()


class Transport(Protocol):
    """One way to move blocks, both ends of it: it serves our memory to peers and pulls theirs into it.

    All calls are made on one event loop. `name` and `advert` go into our capability document; `advert` tells peers
    how to reach us and is opaque to everybody else.
    """

    @property
    def name(self) -> str: ...

    @property
    def advert(self) -> bytes: ...

    async def connect(self, peer: WorkerInfo) -> None:
        """Get ready to pull from this boot of the peer; an older boot's connection is fenced first. Idempotent.

        Raises PeerLost when the peer does not answer, Incompatible when this transport cannot join the two at all
        (shared memory between two machines). The caller brings the deadline: cancelling is safe.
        """
        ...

    def pull(self, peer_id: str, order: PullOrder) -> Pull:
        """Start moving. Never raises for the world's failures: without a connection the pull is FAILED at once."""
        ...

    async def fence(self, peer_id: str) -> None:
        """End the connection. On return every pull from this peer is terminal: no byte of theirs can land."""
        ...

    async def close(self) -> None:
        """Fence everybody and stop serving. On return nothing of ours is left on the machine."""
        ...


def failed(order: PullOrder, error: BatonError) -> Pull:
    """A pull that never moved a byte."""
    pull = Pull(order)
    pull.set_failed(error)
    return pull
