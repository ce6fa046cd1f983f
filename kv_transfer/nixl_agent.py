"""One NIXL agent and the one thread that ever touches it: NIXL's calls block, and its agents are not thread-safe.

Owns the agent, its registration of our memory, its descriptor lists and the transfers it has posted. Does not know
leases, or which agent a peer is given to: that is nixl.py.

Life:
1. the thread makes the agent and registers the memory; `ready` is set.
2. jobs come in through a queue and run in the thread; between them it drives progress. NIXL's own progress thread is
   off: it spins. Driven from here every 0.2 ms on the reader's and 0.5 ms on the lender's side, a READ over UCX/TCP
   runs at 2.2 GB/s against 1.1 GB/s with the spinning threads (2 cores, 59 MB in 720 KiB blocks).
3. destroy(): every handle is dropped, then the agent. Only that is a fence: releasing a handle, removing the peer and
   deregistering the memory were all measured to let tens of megabytes land afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import queue
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from nixl_cu13._api import nixl_agent, nixl_agent_config

from baton.core.errors import InternalError
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.transport import Pull, PullOrder

T = TypeVar("T")

READER_POLL_S = 0.0002
LENDER_POLL_S = 0.0005
LENDER_IDLE_POLL_S = 0.005
GREETED_TURNS = 4000
"""A reader that connects announces itself, and the lender polls fast for this many turns (2 s): the handshake would
measure the idle poll otherwise."""

logging.getLogger("nixl").setLevel(logging.ERROR)  # its INFO lines go to stdout

Ended = Callable[[Pull, str | None], None]
"""(pull, error or None): called in the agent's thread when a transfer has ended."""


@dataclass(frozen=True, slots=True)
class _Remote:
    """A peer, as one agent knows it."""

    name: str
    address: int
    """Where its block 0 starts."""
    blocks: Any
    """Prepared descriptors of all its blocks."""


class Agent:
    """What the thread holds. Every method runs in the thread and may raise any of NIXL's exceptions."""

    def __init__(self, name: str, memory: KVMemory, ended: Ended) -> None:
        config = nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self._agent: Any = nixl_agent(name, config)
        self._registration: Any = self._agent.register_memory(
            [(memory.address, memory.total_bytes, 0, "kv")], mem_type="DRAM"
        )
        self._block_bytes = memory.block_bytes
        self._local: Any = self._prepare("NIXL_INIT_AGENT", memory.address, memory.total_blocks)
        self._peers: dict[str, _Remote] = {}
        self._active: dict[int, tuple[Pull, Any]] = {}
        """By id(pull), with NIXL's handle."""
        self._ended = ended
        self._greeted = 0
        self._memory = memory  # registered: it must outlive the agent

    def metadata(self) -> bytes:
        return bytes(self._agent.get_agent_metadata())

    def add_peer(self, peer_id: str, metadata: bytes, address: int, total_blocks: int) -> None:
        """Make blocks [0, total_blocks) of the peer's memory at `address` readable."""
        name = self._agent.add_remote_agent(metadata)
        name = name.decode() if isinstance(name, bytes) else name
        self._peers[peer_id] = _Remote(name, address, self._prepare(name, address, total_blocks))
        self._agent.send_notif(name, b"hello")

    def remove_peer(self, peer_id: str) -> None:
        """Only when none of its transfers is under way: this is no fence."""
        remote = self._peers.pop(peer_id)
        remote.blocks.release()
        self._agent.remove_remote_agent(remote.name)

    def start(self, peer_id: str, pull: Pull, order: PullOrder) -> None:
        """Post a READ. With CMA the copy happens right here."""
        handle = None
        try:
            handle = self._prepared(self._peers[peer_id], order)
            state = self._agent.transfer(handle)
        except Exception as e:  # NIXL has no common root; whatever it is, this transfer is over
            self._finish(pull, handle, f"{type(e).__name__}: {e}")
            return
        self._active[id(pull)] = (pull, handle)
        self._look(pull, handle, state)

    def progress(self) -> float | None:
        """A reader's turn: look at every transfer. How long to wait for a job before the next turn; None: for ever."""
        for pull, handle in list(self._active.values()):
            try:
                state = self._agent.check_xfer_state(handle)
            except Exception as e:
                del self._active[id(pull)]
                self._finish(pull, handle, f"{type(e).__name__}: {e}")
                continue
            self._look(pull, handle, state)
        return READER_POLL_S if self._active else None

    def serve(self, busy: bool) -> float:
        """The lender's turn: answer readers' UCX messages. How long to wait before the next."""
        if self._agent.get_new_notifs():
            self._greeted = GREETED_TURNS
        self._greeted = max(0, self._greeted - 1)
        return LENDER_POLL_S if busy or self._greeted else LENDER_IDLE_POLL_S

    def destroy(self) -> Callable[[], object | None]:
        """Drop every handle, then the agent. What is returned answers None once it is really gone, and no transfer of
        its can write any more."""
        while self._active:
            with contextlib.suppress(Exception):  # an unfinished transfer may refuse; the agent's end takes it along
                self._active.popitem()[1][1].release()
        while self._peers:
            with contextlib.suppress(Exception):
                self._peers.popitem()[1].blocks.release()
        with contextlib.suppress(Exception):
            self._local.release()
        alive = weakref.ref(self._agent.agent)
        self._local = self._registration = self._agent = None
        if alive() is not None:
            gc.collect()
        return alive

    def _prepared(self, remote: _Remote, order: PullOrder) -> Any:
        if order.span(self._block_bytes) == (0, self._block_bytes):
            return self._agent.make_prepped_xfer(
                "READ", self._local, list(order.destination), remote.blocks, list(order.source)
            )
        ours = self._parts(self._memory.address, order.destination, order)
        theirs = self._parts(remote.address, order.source, order)
        return self._agent.initialize_xfer("READ", ours, theirs, remote.name)

    def _parts(self, address: int, blocks: tuple[int, ...], order: PullOrder) -> Any:
        start, end = order.span(self._block_bytes)
        return self._agent.get_xfer_descs(
            [(address + b * self._block_bytes + start, end - start, 0) for b in blocks], "DRAM"
        )

    def _prepare(self, name: str, address: int, total_blocks: int) -> Any:
        size = self._block_bytes
        return self._agent.prep_xfer_dlist(name, [(address + i * size, size, 0) for i in range(total_blocks)], "DRAM")

    def _look(self, pull: Pull, handle: Any, state: str) -> None:
        if state == "PROC":
            return
        self._active.pop(id(pull), None)
        self._finish(pull, handle, None if state == "DONE" else f"NIXL answered {state}")

    def _finish(self, pull: Pull, handle: Any, error: str | None) -> None:
        if handle is not None:
            with contextlib.suppress(Exception):
                handle.release()
        self._ended(pull, error)


class AgentThread:
    """The event loop's side of an Agent. All methods are called on the loop."""

    def __init__(self, name: str, memory: KVMemory, ended: Ended, turn: Callable[[Agent], float | None]) -> None:
        """`turn` runs in the thread between jobs; it returns how long the thread may then wait for a job. `ended` is
        called on the loop."""
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[Callable[[Agent], None] | None] = queue.SimpleQueue()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._left: asyncio.Future[Callable[[], object | None]] = self._loop.create_future()
        """The thread is through; the answer tells what is left of the agent."""
        self._stopping = False
        # A daemon: a library call that never returns must not keep the process from ending.
        self._thread = threading.Thread(
            target=self._main, args=(name, memory, ended, turn), name=f"nixl {name}", daemon=True
        )
        self._thread.start()

    async def ready(self) -> None:
        """Raises whatever NIXL raised when the agent could not be made."""
        await asyncio.shield(self._ready)

    async def run(self, job: Callable[[Agent], T]) -> T:
        """Run a job in the thread and return its result; cancelling the waiter does not stop the job."""
        result: asyncio.Future[T] = self._loop.create_future()

        def work(agent: Agent) -> None:
            try:
                value = job(agent)
            except Exception as e:
                self._tell(result, None, e)
            else:
                self._tell(result, value, None)

        self._jobs.put(work)
        return await result

    def post(self, job: Callable[[Agent], None]) -> None:
        """Run a job that reports for itself."""
        self._jobs.put(job)

    def stop(self) -> None:
        """Begin to destroy the agent; destroy() is where one learns that it is gone."""
        if not self._stopping:
            self._stopping = True
            self._jobs.put(None)

    async def destroy(self) -> None:
        """On return no transfer of this agent can write any more, and all it had to report has been reported. Raises
        InternalError if the agent could not be destroyed: then late bytes must still be expected. May be repeated."""
        self.stop()
        left = await asyncio.shield(self._left)
        if left() is not None:
            raise InternalError("a NIXL agent is still referenced and could not be destroyed: its pulls stay fenced in")

    def _main(
        self, name: str, memory: KVMemory, ended: Ended, turn: Callable[[Agent], float | None]
    ) -> None:
        def report(pull: Pull, error: str | None) -> None:
            self._on_loop(ended, pull, error)

        try:
            agent = Agent(name, memory, report)
        except Exception as e:
            self._tell(self._ready, None, e)
            self._tell(self._left, lambda: None, None)
            return
        self._tell(self._ready, None, None)
        self._work(agent, turn)
        self._tell(self._left, agent.destroy(), None)

    def _work(self, agent: Agent, turn: Callable[[Agent], float | None]) -> None:
        while True:
            try:
                wait_s = turn(agent)
            except Exception:
                logging.getLogger("baton.kv_transfer").exception("a NIXL agent made no progress")
                wait_s = LENDER_IDLE_POLL_S
            try:
                job = self._jobs.get(timeout=wait_s)
            except queue.Empty:
                continue
            if job is None:
                return
            job(agent)

    def _tell(self, future: asyncio.Future[T], value: Any, error: Exception | None) -> None:
        self._on_loop(_settle, future, value, error)

    def _on_loop(self, call: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: there is nobody left to tell
            self._loop.call_soon_threadsafe(call, *args)


def _settle(future: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
        future.exception()  # looked at: nobody may be waiting any more
