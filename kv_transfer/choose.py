"""The measured handshake: which transport a pair of workers uses is found out, not configured.

Owns the measurement. For every transport that both offer, in the peer's order of preference: connect, pull its probe
block once (is it the right memory, and is everything set up?), then pull it repeatedly up to `handoff.probe_bytes`
against the clock. The fastest wins, if it is clearly faster than what the peer prefers. Does not know leases, pools or
requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from baton.core.config import HandoffConfig
from baton.core.errors import BatonError, Incompatible, IntegrityError, PeerLost
from baton.core.metrics import Metrics
from baton.core.worker import WorkerInfo
from baton.kv_transfer.digest import digest
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.transport import PROBE_LEASE, Pull, PullOrder, PullState, Transport

log = logging.getLogger("baton.kv_transfer")

MAX_PROBE_PULLS = 256
CLEARLY_FASTER = 1.1
"""Less than this is noise: the measurement takes a few milliseconds on a busy machine."""
_SHORTEST_S = 1e-9  # a virtual clock may not have moved


@dataclass(frozen=True, slots=True)
class Figure:
    """One transport of one pair as it was measured; bytes_per_s is 0 where it failed, and `error` says why."""

    transport: str
    bytes_per_s: float
    error: str = ""


@dataclass(slots=True)
class _Landing:
    """One of our blocks that probes are pulled into."""

    block_id: int
    pulls: list[Pull] = field(default_factory=list)

    def is_quiet(self) -> bool:
        """No byte can land in it any more."""
        self.pulls = [pull for pull in self.pulls if pull.state is PullState.MOVING]
        return not self.pulls


class Handshake:
    """Measures pairs for one worker. Several run at once, each with its own landing block."""

    def __init__(
        self, memory: KVMemory, transports: Mapping[str, Transport], config: HandoffConfig, metrics: Metrics
    ) -> None:
        self._memory = memory
        self._transports = transports
        self._config = config
        self._metrics = metrics
        self._free: asyncio.Queue[_Landing] = asyncio.Queue()
        for block in memory.landing_blocks:
            self._free.put_nowait(_Landing(block))
        self._unended: list[_Landing] = []
        """A probe could not be ended: its bytes may still land."""

    async def choose(self, peer: WorkerInfo) -> tuple[Figure, ...]:
        """Figures of all common transports, the chosen one first; at least that one works.

        Takes up to 2 x peer_timeout_s per transport that fails. Raises Incompatible when there is no common transport
        at all, PeerLost when every one failed (strict: when the first one failed).
        """
        common = [n for n, _ in peer.capability.transports if n in self._transports]
        figures = [f for name in common if (f := await self._try(name, peer)) is not None]
        if not figures:
            raise Incompatible(
                f"no transport joins this worker and {peer.worker_id}: it offers "
                f"{[n for n, _ in peer.capability.transports]}, we have {list(self._transports)}. "
                "Give handoff.transports a common entry that works between these machines (tcp always does)."
            )
        return _ranked(peer, figures)

    async def _landing(self, peer: WorkerInfo) -> _Landing:
        """Raises PeerLost when every one is taken for long."""
        for landing in [one for one in self._unended if one.is_quiet()]:
            self._unended.remove(landing)
            self._free.put_nowait(landing)
        try:
            async with asyncio.timeout(self._config.peer_timeout_s):
                return await self._free.get()
        except TimeoutError:
            raise PeerLost(
                f"{peer.worker_id} was not measured: {len(self._unended)} landing blocks wait for probes that do not "
                "end, the others are in use"
            ) from None

    async def _try(self, name: str, peer: WorkerInfo) -> Figure | None:
        """None: this transport cannot join the two (other machine), which is no failure."""
        try:
            return Figure(name, await self._measure(self._transports[name], peer))
        except Incompatible as e:
            log.debug("%s does not reach %s: %s", name, peer.worker_id, e)
            return None
        except (BatonError, TimeoutError) as e:
            reason = str(e) or f"no answer within {self._config.peer_timeout_s:g} s"
        self._metrics.inc("baton_fallbacks_total", kind="transport")
        log.warning("transport %s to %s failed in the handshake and is left out: %s", name, peer.worker_id, reason)
        if self._config.strict:
            raise PeerLost(f"transport {name} to {peer.worker_id} failed and handoff.strict is set: {reason}")
        return Figure(name, 0.0, reason)

    async def _measure(self, transport: Transport, peer: WorkerInfo) -> float:
        """Bytes per second. Raises PeerLost, Incompatible, IntegrityError or TimeoutError."""
        async with asyncio.timeout(self._config.peer_timeout_s):
            await transport.connect(peer)
        loop = asyncio.get_running_loop()
        repeats = min(MAX_PROBE_PULLS, max(1, self._config.probe_bytes // self._memory.block_bytes))
        landing = await self._landing(peer)
        try:
            await self._probe(transport, peer, landing, 1)
            started = loop.time()
            await self._probe(transport, peer, landing, repeats)
        finally:
            if landing.is_quiet():
                self._free.put_nowait(landing)
            else:
                self._unended.append(landing)
        return repeats * self._memory.block_bytes / max(loop.time() - started, _SHORTEST_S)

    async def _probe(self, transport: Transport, peer: WorkerInfo, landing: _Landing, repeats: int) -> None:
        """Pull the peer's probe block `repeats` times into our landing block and look at what came."""
        block = self._memory.block(landing.block_id)
        block[:] = bytes(len(block))
        # The peer's probe block lies behind its own pool, whose size is not ours.
        order = PullOrder(PROBE_LEASE, (peer.capability.num_blocks,) * repeats, (landing.block_id,) * repeats)
        pull = transport.pull(peer.worker_id, order)
        landing.pulls.append(pull)
        await _finish(transport, peer.worker_id, pull, self._config.peer_timeout_s)
        if digest(block) != self._memory.probe_digest:
            raise IntegrityError(
                f"the probe block of {peer.worker_id} came over {transport.name} with other bytes than it holds"
            )


def _ranked(peer: WorkerInfo, figures: list[Figure]) -> tuple[Figure, ...]:
    """`figures` come in order of preference; the chosen one first, the others by speed."""
    enough = max(f.bytes_per_s for f in figures) / CLEARLY_FASTER
    chosen = next(f for f in figures if f.bytes_per_s >= enough)
    if chosen.error:
        raise PeerLost(f"{peer.worker_id} answers on no transport: {chosen.transport}: {chosen.error}")
    others = sorted((f for f in figures if f is not chosen), key=lambda f: -f.bytes_per_s)
    return (chosen, *others)


async def _finish(transport: Transport, peer_id: str, pull: Pull, timeout_s: float) -> None:
    """Wait for a probe; leave it terminal in any case. Raises its error, or TimeoutError."""
    try:
        async with asyncio.timeout(timeout_s):
            await pull.wait()
    finally:
        if pull.state is PullState.MOVING:
            await transport.fence(peer_id)
    if pull.state is PullState.FAILED:
        raise pull.error or PeerLost(f"the probe of {peer_id} failed")
