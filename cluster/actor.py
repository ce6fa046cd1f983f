"""Inside the process of one Ray worker: the entry on a thread with its own event loop, and what the pool may ask.

The process lives exactly as long as the entry: when that ends unasked the process exits, and Ray starts the next
one. Only a process that fails before it ever registered waits a while, for the pool to read why. It drains when its
pool asks it to end (`stop`); a SIGTERM to the process is Ray's own, which ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import traceback
from dataclasses import dataclass
from typing import Any

from baton.cluster.entry import run_entry
from baton.cluster.pool import WorkerSpec
from baton.cluster.processes import machine_id
from baton.core.config import apply_child_env
from baton.core.errors import SetupError
from baton.core.worker import Role

_BACKOFF_S = 0.5
"""Ray has none: without it a worker that always fails would be restarted in a tight loop."""
_UNREAD_FAILURE_S = 5.0
_TAIL_CHARS = 2000


@dataclass(frozen=True, slots=True)
class ActorState:
    pid: int
    machine: str
    """processes.machine_id() there: a pid means something only on its own machine."""
    up: bool
    failure: str
    """Why the entry ended; empty while it runs."""


class WorkerActor:
    """Made into an actor by ray_pool. To Ray it is an async one, as it has coroutines: all calls share a loop of Ray's,
    so none may block."""

    def __init__(self, spec: dict[str, Any]) -> None:
        """`spec`: the fields of a WorkerSpec."""
        self._spec = WorkerSpec(**{**spec, "role": Role(spec["role"])})
        apply_child_env(self._spec.threads)
        self._up = threading.Event()
        self._ended = threading.Event()
        self._failure = ""
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        threading.Thread(target=self._run, name=self._spec.worker_id, daemon=True).start()

    def state(self) -> ActorState:
        return ActorState(os.getpid(), machine_id(), self._up.is_set(), self._failure)

    async def stop(self, grace_s: float) -> bool:
        """Cancel the entry, which drains. Returns whether it ended within `grace_s`."""
        self._stopping = True
        self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())
        return await asyncio.to_thread(self._ended.wait, grace_s)

    def _run(self) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._task = asyncio.create_task(run_entry(self._spec, self._up.set))
        try:
            await self._task
        except SetupError as e:
            self._failure = e.message
        except asyncio.CancelledError:
            self._failure = "it was cancelled"
        except BaseException:
            self._failure = traceback.format_exc()[-_TAIL_CHARS:]
        self._ended.set()
        if self._stopping:
            return
        logging.getLogger("baton.cluster").error("worker %s ended: %s", self._spec.worker_id, self._failure)
        await asyncio.sleep(_BACKOFF_S if self._up.is_set() else _UNREAD_FAILURE_S)
        os._exit(1)

