"""Pulls from lenders that store KV in another element type: their blocks land beside the pool, and come into it
converted.

Owns, per foreign type, a small memory of blocks as the lender has them, with transports and a puller of its own. So a
transport moves, and a digest covers, the lender's own bytes; late bytes land where no sequence ever reads, and
conversion is behind every transport alike. Does not know sequences or who may be paired with whom.

Life of a converted block:
1. room for it is taken in the landing; the puller pulls it there and verifies it (or quarantines the room)
2. it is converted into its destination in the pool, in a thread that is waited for even by who is cancelled
3. the room is free again, unless late bytes may come
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from baton.core.config import HandoffConfig
from baton.core.errors import DeadlineExceeded, PeerLost
from baton.core.handoff import Layers, LentBlock, Published
from baton.core.layout import KVLayout
from baton.core.metrics import Metrics
from baton.core.worker import WorkerInfo
from baton.kv_transfer.framing import finish
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.puller import Puller
from baton.kv_transfer.transport import Transport

LANDING_BLOCKS = 64
"""Two of a lender's slices (worker/lending.py): one is converted while the next one comes."""

OpenTransports = Callable[[KVMemory, str], Awaitable[dict[str, Transport]]]
"""(memory, name) -> transports that read into this memory. `name` sets them apart from the worker's others."""
Convert = Callable[[KVLayout, KVLayout, memoryview, memoryview], None]
"""(layout of the source, of the destination, source, destination): the same layers of one block. Called in a thread."""


class Landing:
    """Room for blocks of one layout."""

    def __init__(
        self, layout: KVLayout, memory: KVMemory, transports: dict[str, Transport], config: HandoffConfig,
        metrics: Metrics,
    ) -> None:
        self.layout = layout
        self.memory = memory
        # One cancelled pull may fill it: no reason to fence a lender off, which ends everybody's pulls. Age alone is.
        patient = config.model_copy(update={"quarantine_cap": 1.0})
        self.puller = Puller(memory, transports, self, patient, metrics)
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for block in range(memory.num_blocks):
            self._free.put_nowait(block)
        self._taken: set[int] = set()
        self._quarantined: set[int] = set()
        self._taking = asyncio.Lock()
        """Two that each wait for what the other has would wait for ever."""

    async def take(self, count: int) -> list[int]:
        blocks: list[int] = []
        try:
            async with self._taking:
                while len(blocks) < count:
                    blocks.append(await self._free.get())
                    self._taken.add(blocks[-1])
        except BaseException:
            self.give_back(blocks)
            raise
        return blocks

    def give_back(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._taken.remove(block)
            self._free_again(block)

    def quarantine(self, block: int) -> None:
        self._quarantined.add(block)

    def unquarantine(self, block: int) -> None:
        self._quarantined.remove(block)
        self._free_again(block)

    def _free_again(self, block: int) -> None:
        if block not in self._taken | self._quarantined:
            self._free.put_nowait(block)

    async def close(self) -> None:
        await self.puller.close()
        self.memory.close()


class Landings:
    """All landings of one worker. A landing is opened when the first lender of its type is met."""

    def __init__(
        self, layout: KVLayout, memory: KVMemory, open_transports: OpenTransports, convert: Convert,
        config: HandoffConfig, metrics: Metrics,
    ) -> None:
        """`memory` holds the pool's blocks, of `layout`."""
        self._layout = layout
        self._memory = memory
        self._open_transports = open_transports
        self._convert_part = convert
        self._config = config
        self._metrics = metrics
        self._landings: dict[str, Landing] = {}
        """By element type."""
        self._opening = asyncio.Lock()
        self._converter = ThreadPoolExecutor(1, "kv-convert")
        self._closed = False

    async def connect(self, peer: WorkerInfo) -> str:
        """As Puller.connect."""
        return await (await self._landing(peer)).puller.connect(peer)

    async def pull(self, peer: WorkerInfo, event: Published, destination: Sequence[int]) -> None:
        """Bring what was published into our blocks `destination`, in our element type. Returns when every digest was
        right and all is converted. Raises as Puller.pull does; a destination is never written afterwards."""
        landing = await self._landing(peer)
        layers = event.layers or Layers(0, self._layout.num_layers)
        pairs = zip(event.blocks, destination, strict=True)
        while some := list(itertools.islice(pairs, LANDING_BLOCKS)):
            rooms = await self._room(landing, len(some))
            try:
                await self._pull_some(landing, peer, event.lease_id, [block for block, _ in some], rooms, layers)
                await self._convert(landing, rooms, [block for _, block in some], layers)
            finally:
                landing.give_back(rooms)

    async def run(self) -> None:
        """The quarantine timer, until cancelled."""
        while True:
            await asyncio.sleep(self._config.quarantine_poll_s)
            for landing in self._landings.values():
                landing.puller.poll()

    def bandwidths(self) -> tuple[tuple[str, str, float], ...]:
        """As Puller.bandwidths."""
        return tuple(one for landing in self._landings.values() for one in landing.puller.bandwidths())

    async def close(self) -> None:
        """On return every pull is terminal and nothing is converted any more."""
        self._closed = True
        async with self._opening:
            for landing in self._landings.values():
                await landing.close()
        self._converter.shutdown(wait=True)

    async def _landing(self, peer: WorkerInfo) -> Landing:
        dtype = peer.capability.layout.dtype
        async with self._opening:
            if self._closed:
                raise PeerLost("this worker is closing its transfers.")
            if dtype not in self._landings:
                self._landings[dtype] = await self._open(dtype)
            return self._landings[dtype]

    async def _open(self, dtype: str) -> Landing:
        layout = dataclasses.replace(self._layout, dtype=dtype)
        memory = KVMemory(LANDING_BLOCKS, layout.block_bytes, shared=True)
        try:
            transports = await self._open_transports(memory, dtype)
        except BaseException:
            memory.close()
            raise
        return Landing(layout, memory, transports, self._config, self._metrics)

    async def _room(self, landing: Landing, count: int) -> list[int]:
        try:
            async with asyncio.timeout(self._config.pull_timeout_s):
                return await landing.take(count)
        except TimeoutError:
            raise DeadlineExceeded(
                f"there was no room for {count} blocks of {landing.layout.dtype} KV to land in within "
                f"{self._config.pull_timeout_s:g} s"
            ) from None

    @staticmethod
    async def _pull_some(
        landing: Landing, peer: WorkerInfo, lease_id: str, blocks: Sequence[LentBlock], rooms: Sequence[int],
        layers: Layers,
    ) -> None:
        part = landing.layout.part_of(layers.start, layers.end)
        await landing.puller.pull(peer, lease_id, blocks, rooms, part)

    async def _convert(
        self, landing: Landing, rooms: Sequence[int], destination: Sequence[int], layers: Layers
    ) -> None:
        theirs, ours = landing.layout, self._layout
        sources, targets = (slice(*layout.part_of(layers.start, layers.end)) for layout in (theirs, ours))

        def convert() -> None:
            for room, block in zip(rooms, destination, strict=True):
                lent, read = landing.memory.block(room)[sources], self._memory.block(block)[targets]
                self._convert_part(theirs, ours, lent, read)

        converting = asyncio.get_running_loop().run_in_executor(self._converter, convert)
        await finish([converting])
        converting.result()
        num_bytes = len(rooms) * (sources.stop - sources.start)
        self._metrics.inc("baton_converted_bytes_total", num_bytes, lender=theirs.dtype, reader=ours.dtype)
