"""What everything on one worker shares: assembled once by the node, read by intakes and lendings."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from baton.core.config import HandoffConfig
from baton.core.layout import Capability, stored_alike
from baton.core.metrics import Metrics
from baton.core.sequence import SequenceState
from baton.core.services import Dial
from baton.core.worker import WorkerInfo
from baton.engine.block_pool import BlockPool
from baton.kv_transfer.lease import LeaseTable
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.puller import Puller
from baton.worker.steps import StepLoop

if TYPE_CHECKING:  # a simulated worker has none, and needs no numpy
    from baton.kv_transfer.landing import Landings


@dataclass(frozen=True, slots=True)
class WorkerParts:
    worker_id: str
    boot_id: str
    capability: Capability
    steps: StepLoop
    pool: BlockPool
    memory: KVMemory
    leases: LeaseTable
    puller: Puller
    dial: Dial
    metrics: Metrics
    clock: Callable[[], float]
    handoff: HandoffConfig
    spawn: Callable[[Coroutine[None, None, None]], None]
    """Run to completion in the background, owned by the node."""
    landings: Landings | None = None
    """How KV of another element type comes in; None: it does not."""
    outside: dict[int, SequenceState] = field(default_factory=dict)
    """By id(): sequences that hold blocks without being in the scheduler."""

    def hold(self, seq: SequenceState) -> None:
        self.outside[id(seq)] = seq

    def let_go(self, seq: SequenceState) -> None:
        self.outside.pop(id(seq), None)

    @property
    def num_layers(self) -> int:
        return self.capability.layout.num_layers

    def reader_of(self, peer: WorkerInfo) -> Puller | Landings:
        """What brings in KV of this peer, which fits."""
        if stored_alike(self.capability, peer.capability):
            return self.puller
        assert self.landings is not None, f"{peer.worker_id} stores {peer.capability.layout.dtype} KV"
        return self.landings

    def bandwidths(self) -> tuple[tuple[str, str, float], ...]:
        """(peer worker_id, transport in use, measured bytes/s)."""
        return self.puller.bandwidths() + (self.landings.bandwidths() if self.landings else ())

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)

    def part_of(self, layer_start: int, layer_end: int) -> tuple[int, int]:
        """The byte range of these layers within a block."""
        layer_bytes = self.memory.block_bytes // self.num_layers
        return layer_start * layer_bytes, layer_end * layer_bytes
