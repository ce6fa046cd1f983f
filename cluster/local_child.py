"""The process of one local worker: `python -m baton.cluster.local_child PARENT_PID READY_FD < spec.json`.

It writes one line to READY_FD when the worker has registered. SIGTERM cancels the entry, which drains; a second one
ends the drain. Exit codes: 0 after SIGTERM, 2 for a SetupError (its sentence is the last line of output), 1 for
anything else.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys

from baton.cluster.entry import run_entry
from baton.cluster.pool import WorkerSpec
from baton.cluster.watchdog import die_with_parent
from baton.core.errors import SetupError
from baton.core.worker import Role


def main() -> int:
    parent_pid, ready_fd = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent_pid, signal.SIGKILL)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    fields = json.load(sys.stdin)
    spec = WorkerSpec(role=Role(fields.pop("role")), **fields)
    try:
        asyncio.run(_until_terminated(spec, ready_fd))
    except SetupError as e:
        print(e.message, file=sys.stderr)
        return 2
    return 0


async def _until_terminated(spec: WorkerSpec, ready_fd: int) -> None:
    task = asyncio.create_task(run_entry(spec, lambda: _say_ready(ready_fd)))
    terminated = asyncio.Event()

    def terminate() -> None:
        terminated.set()
        task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
    try:
        await task
    except asyncio.CancelledError:
        if not terminated.is_set():
            raise


def _say_ready(ready_fd: int) -> None:
    os.write(ready_fd, b"ready\n")
    os.close(ready_fd)


if __name__ == "__main__":
    sys.exit(main())
