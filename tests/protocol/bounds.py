"""How big an explored world is, and which of its real parts a planted bug replaces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from baton.core.block_hash import BlockHash
from baton.core.config import HandoffConfig
from baton.engine.block_pool import BlockPool
from baton.kv_transfer.lease import LeaseTable
from baton.kv_transfer.puller import Puller

BLOCK_BYTES = 8
LENDER = "p"
PRIME = "'"
TTL_S = 1.0
CONFIG = HandoffConfig(
    lease_ttl_s=TTL_S, pull_timeout_s=1.0, quarantine_poll_s=1.0, quarantine_max_s=2.0, quarantine_cap=1.0,
    probe_bytes=BLOCK_BYTES, peer_timeout_s=1.0,
)
"""A tick is a second: every timer of the code is a tick or two."""


def content(name: str, index: int) -> bytes:
    """What a block of this sequence holds: a tag that names its prompt and place."""
    return f"{name.rstrip(PRIME)}.{index}".encode().ljust(BLOCK_BYTES, b"-")


def hash_of(name: str, index: int) -> BlockHash:
    """The hash is the content's name, as in production: what it names can be checked against the bytes."""
    return BlockHash(content(name, index))


@dataclass(frozen=True)
class Parts:
    """The production code under exploration."""

    pool: type[BlockPool] = BlockPool
    leases: type[LeaseTable] = LeaseTable
    puller: type[Puller] = Puller
    fences: bool = True
    """The transport's fence ends what moves. False: it says so, and bytes land on (NIXL's release of a handle)."""


@dataclass(frozen=True)
class Bounds:
    """What may happen, how often. Time-outs, delays, late bytes and reordering cost nothing: they may always be."""

    requests: tuple[str, ...] = ("a",)
    """In the order in which they start. Those that differ only in primes have the same prompt: a, a'."""
    side_by_side: bool = False
    """The next may start while one is under way; else when it has ended (its pull may still be quarantined)."""
    races: bool = True
    """Two things may happen in one turn of the reader's loop."""
    blocks_each: int = 1
    lender_blocks: int = 2
    reader_blocks: int = 2
    before: tuple[tuple[Any, ...], ...] = ()
    """Actions that have happened when the exploration begins."""
    limits: dict[str, int] = field(default_factory=dict)
    """Of any kind of action; world.py says which need one."""
