"""Transport "nixl": one-sided READs by NIXL over UCX, from the lender's registered memory into ours.

Owns which agent serves which peer. The lender has one agent, which only answers; a reader spreads its peers over at
most 8, because fencing a peer means destroying the agent that reads from it. Does not know leases: the lender takes no
part in a READ, so a lease that has ended is found by its release and by the digests.

Only pairs whose READs are really one-sided use it: by process_vm_readv on one machine (tried at connect, on the
peer's probe block), by RDMA between machines. Elsewhere UCX emulates a READ over TCP with the lender's help, and a
lender in the middle of that aborts when its reader's agent goes away (NIXL 1.5.1, "stubs.c:107 Assertion `0' failed",
in 3 of 4 fences of a running lender at 160 MB, and in nearly all of a frozen one): one reader's fence would take down
every lender it is reading from. The tcp transport is faster there anyway.

What makes a pull terminal: DONE or an error from NIXL, or its agent's end. Fencing one peer re-creates the agent and
posts the other peers' unfinished pulls again: they stay MOVING and notice nothing but time.
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import errno
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from baton.core.errors import Incompatible, InternalError, PeerLost
from baton.core.worker import WorkerInfo
from baton.kv_transfer.framing import MAX_ORDER_BLOCKS, pack_advert, unpack_advert
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.nixl_agent import Agent, AgentThread
from baton.kv_transfer.transport import Pull, PullOrder, PullRefused, failed

log = logging.getLogger("baton.kv_transfer")

MAX_AGENTS = 8
_ADVERT_NUMBERS = ("address", "total_blocks", "block_bytes", "probe_block", "pid", "rdma")
_PROBED_BYTES = 64
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")
_RDMA_DEVICES = Path("/sys/class/infiniband")


@dataclass(slots=True, eq=False)
class _Slot:
    """One of the reader's agents, through its re-creations."""

    number: int
    thread: AgentThread | None = None
    """None while a fence is re-creating it."""
    undead: AgentThread | None = None
    """The agent that a fence could not destroy. Its pulls stay MOVING, and its peers are out of reach, until a later
    fence can."""
    generation: int = 0
    peers: dict[str, _Peer] = field(default_factory=dict)
    moving: dict[int, tuple[str, Pull]] = field(default_factory=dict)
    """By id(pull): (peer, pull)."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while peers are added or the agent is re-created."""


@dataclass(slots=True, eq=False)
class _Peer:
    peer_id: str
    boot_id: str
    metadata: bytes
    address: int
    total_blocks: int
    slot: _Slot
    broken: bool = True
    """Not added yet, an error was seen, or a fence is under way: connect (anew) before the next pull."""

    def add_to(self, agent: Agent) -> None:
        agent.add_peer(self.peer_id, self.metadata, self.address, self.total_blocks)


class NixlTransport:
    """Built by `open`; closed by whoever opened it."""

    name = "nixl"

    def __init__(self, agent_name: str, memory: KVMemory) -> None:
        self._agent_name = agent_name
        self._memory = memory
        self._slots: list[_Slot] = []
        self._peers: dict[str, _Peer] = {}
        self._lender: AgentThread | None = None
        self.advert = b""

    @classmethod
    async def open(cls, agent_name: str, memory: KVMemory, lending: Callable[[], bool]) -> NixlTransport:
        """Register the memory and start the lender's agent. `agent_name` must be unique over workers and boots.
        `lending` is asked from the agent's thread: whether leases are out, so that progress is worth driving fast.

        Raises OSError when NIXL finds no way to serve on this machine.
        """
        self = cls(agent_name, memory)
        self._lender = AgentThread(agent_name, memory, lambda pull, error: None, lambda agent: agent.serve(lending()))
        try:
            await self._lender.ready()
            metadata = await self._lender.run(Agent.metadata)
        except BaseException as e:
            await self._lender.destroy()
            if isinstance(e, Exception):
                raise OSError(f"NIXL cannot start: {type(e).__name__}: {e}") from e
            raise
        self.advert = pack_advert(
            metadata=base64.b64encode(metadata).decode(), address=memory.address, total_blocks=memory.total_blocks,
            block_bytes=memory.block_bytes, probe_block=memory.probe_block, machine=_machine(), pid=os.getpid(),
            rdma=int(_has_rdma()),
        )
        return self

    async def connect(self, peer: WorkerInfo) -> None:
        known = self._peers.get(peer.worker_id)
        if known is not None and known.boot_id == peer.boot_id and not known.broken:
            return
        await self.fence(peer.worker_id)
        slot = self._slot_for_new_peer()
        fresh = self._parse(peer, slot)
        async with slot.lock:
            if peer.worker_id in self._peers:  # another caller was quicker
                return
            slot.peers[peer.worker_id] = self._peers[peer.worker_id] = fresh
            try:
                if slot.thread is None:
                    slot.thread = await self._start_agent(slot)
                await slot.thread.run(fresh.add_to)
            except Exception as e:  # NIXL has no common root
                self._forget(fresh)
                raise PeerLost(f"NIXL cannot reach {peer.worker_id}: {type(e).__name__}: {e}") from None
            # Only now: whoever was cancelled above, or comes in between, finds a peer to connect anew.
            fresh.broken = False

    def pull(self, peer_id: str, order: PullOrder) -> Pull:
        assert len(order.source) <= MAX_ORDER_BLOCKS, f"an order of {len(order.source)} blocks"
        peer = self._peers.get(peer_id)
        if peer is None or peer.broken:
            return failed(order, PeerLost(f"there is no NIXL connection to {peer_id}"))
        outside = [b for b in order.source if not 0 <= b < peer.total_blocks]
        if outside:
            return failed(order, PullRefused(f"blocks {outside[:8]} lie outside the memory of {peer_id}"))
        order.span(self._memory.block_bytes)  # it is inside
        pull = Pull(order)
        peer.slot.moving[id(pull)] = (peer_id, pull)
        if peer.slot.thread is not None:  # else the fence that is re-creating the agent posts it
            _post(peer.slot.thread, peer_id, pull)
        return pull

    async def fence(self, peer_id: str) -> None:
        peer = self._peers.get(peer_id)
        if peer is None:
            return
        peer.broken = True
        slot = peer.slot
        async with slot.lock:
            if self._peers.get(peer_id) is not peer:
                return  # somebody else fenced it while we waited
            if slot.undead is None and (slot.thread is None or await self._removed_quietly(slot.thread, peer)):
                self._forget(peer)
                return
            await self._destroy(slot)
            self._forget(peer)
            self._fail(slot, peer_id, PeerLost(f"the NIXL connection to {peer_id} was fenced"))
            if slot.peers:
                await self._recreate(slot)

    async def close(self) -> None:
        for peer in self._peers.values():
            peer.broken = True
        for slot in self._slots:
            async with slot.lock:
                try:
                    await self._destroy(slot)
                except InternalError as e:
                    log.error("%s", e.message)
                for peer in list(slot.peers.values()):
                    self._forget(peer)
                    self._fail(slot, peer.peer_id, PeerLost("this worker is closing its transfers"))
        if self._lender is not None:
            await self._lender.destroy()

    # ---- slots ---------------------------------------------------------------------------------------------------

    def _slot_for_new_peer(self) -> _Slot:
        """The emptiest agent; a new one while there are few."""
        emptiest = min((s for s in self._slots if s.undead is None), key=lambda s: len(s.peers), default=None)
        if emptiest is None or (emptiest.peers and len(self._slots) < MAX_AGENTS):
            emptiest = _Slot(len(self._slots))
            self._slots.append(emptiest)
        return emptiest

    async def _start_agent(self, slot: _Slot) -> AgentThread:
        slot.generation += 1
        name = f"{self._agent_name}/r{slot.number}.{slot.generation}"
        thread = AgentThread(name, self._memory, functools.partial(self._ended, slot), Agent.progress)
        try:
            await thread.ready()
        except BaseException:
            thread.stop()
            raise
        return thread

    async def _destroy(self, slot: _Slot) -> None:
        """Raises InternalError when it is still referenced; then nobody of the slot can be pulled from."""
        slot.undead, slot.thread = slot.undead or slot.thread, None
        if slot.undead is not None:
            try:
                await slot.undead.destroy()
            except InternalError:
                for peer in slot.peers.values():
                    peer.broken = True
                raise
            slot.undead = None

    async def _removed_quietly(self, thread: AgentThread, peer: _Peer) -> bool:
        """Without destroying the agent: only right when none of the peer's pulls is under way."""
        if any(peer_id == peer.peer_id for peer_id, _ in peer.slot.moving.values()):
            return False
        try:
            await thread.run(lambda agent: agent.remove_peer(peer.peer_id))
        except Exception as e:
            log.debug("removing %s from a NIXL agent failed: %r", peer.peer_id, e)
            return False
        return True

    async def _recreate(self, slot: _Slot) -> None:
        """A new agent for the peers that are left; their unfinished pulls are posted again."""
        try:
            thread = await self._start_agent(slot)
        except Exception as e:
            for peer in list(slot.peers.values()):
                self._drop(peer, f"NIXL cannot start again: {e}")
            return
        for peer in list(slot.peers.values()):
            try:
                await thread.run(peer.add_to)
            except Exception as e:
                self._drop(peer, f"NIXL cannot reach it again: {e}")
        slot.thread = thread
        for peer_id, pull in slot.moving.values():
            _post(thread, peer_id, pull)

    def _drop(self, peer: _Peer, reason: str) -> None:
        self._forget(peer)
        self._fail(peer.slot, peer.peer_id, PeerLost(f"{peer.peer_id}: {reason}"))

    def _forget(self, peer: _Peer) -> None:
        peer.broken = True
        peer.slot.peers.pop(peer.peer_id, None)
        if self._peers.get(peer.peer_id) is peer:
            del self._peers[peer.peer_id]

    def _fail(self, slot: _Slot, peer_id: str, error: PeerLost) -> None:
        """The agent that moved these pulls is gone."""
        for key, (owner, pull) in list(slot.moving.items()):
            if owner == peer_id:
                del slot.moving[key]
                pull.set_failed(error)

    def _ended(self, slot: _Slot, pull: Pull, error: str | None) -> None:
        peer_id, _ = slot.moving.pop(id(pull))
        if error is None:
            pull.set_done()
            return
        peer = slot.peers.get(peer_id)
        if peer is not None:
            peer.broken = True
        pull.set_failed(PeerLost(f"NIXL lost {peer_id}: {error}"))

    def _parse(self, peer: WorkerInfo, slot: _Slot) -> _Peer:
        who = peer.worker_id
        fields = unpack_advert(who, peer.capability.advert(self.name))
        try:
            metadata = base64.b64decode(str(fields["metadata"]), validate=True)
            address, total, size, probe, pid, rdma = (int(fields[k]) for k in _ADVERT_NUMBERS)
        except (KeyError, ValueError):
            raise Incompatible(f"the nixl advert of {who} cannot be read; it runs another version.") from None
        if size != self._memory.block_bytes:
            raise Incompatible(f"blocks of {who} have {size} bytes, ours {self._memory.block_bytes}")
        neighbour = fields.get("machine") == _machine()
        if not (self._reads_directly(who, pid, address + probe * size) if neighbour else rdma and _has_rdma()):
            raise Incompatible(
                f"NIXL cannot read the memory of {who} one-sidedly: there is no RDMA network between us, and it is not "
                "a process that we may read (same machine, user and pid namespace)"
            )
        return _Peer(who, peer.boot_id, metadata, address, total, slot)

    def _reads_directly(self, peer_id: str, pid: int, probe_address: int) -> bool:
        """Whether the kernel lets us read that process, and it is the one that is meant: its probe block says so.
        Raises PeerLost when there is no such process any more."""
        expected = bytes(self._memory.block(self._memory.probe_block)[:_PROBED_BYTES])
        found = ctypes.create_string_buffer(len(expected))
        local = _IoVec(ctypes.addressof(found), len(expected))
        remote = _IoVec(probe_address, len(expected))
        libc = ctypes.CDLL(None, use_errno=True)
        count = libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if count < 0 and ctypes.get_errno() == errno.ESRCH:
            raise PeerLost(f"the process of {peer_id} is gone")
        return bool(count == len(expected) and found.raw == expected)


class _IoVec(ctypes.Structure):
    """struct iovec of <sys/uio.h>."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _machine() -> str:
    """Equal for processes that know each other by pid."""
    return f"{_BOOT_ID.read_text().strip()}:{os.stat(_PID_NAMESPACE).st_ino}"


def _has_rdma() -> bool:
    return _RDMA_DEVICES.is_dir() and any(_RDMA_DEVICES.iterdir())


def _post(thread: AgentThread, peer_id: str, pull: Pull) -> None:
    thread.post(lambda agent: agent.start(peer_id, pull, pull.order))
