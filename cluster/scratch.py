"""Private directories of this machine's stacks: named after the process that owns them, and gone with it.

Life: made by its owner -> removed by its owner, or by the owner's watchdog -> or, if both were killed, swept at the
next start of any stack of the same user, with the processes that still write there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import signal
import tempfile
from pathlib import Path

from baton.cluster.processes import family_of, gone, machine_id, writers_to

log = logging.getLogger("baton.cluster")

_NAME = re.compile(r"baton-[a-z]+-(\d+)-\w+")
_DIE_TIMEOUT_S = 5.0
_POLL_S = 0.01
_OWNER = "owner"
"""A file in each: the machine (see `machine_id`) where the pid in the directory's name means something."""


def private_dir(kind: str, parent: str | None = None) -> Path:
    """A new directory that only this user can enter; `parent` None: where temporary files go."""
    directory = Path(tempfile.mkdtemp(prefix=f"baton-{kind}-{os.getpid()}-", dir=parent))
    (directory / _OWNER).write_text(machine_id())
    return directory


async def sweep() -> None:
    """Remove what owners that were killed have left. What other users, machines or containers own stays."""
    for parent in {Path(tempfile.gettempdir()), Path("/tmp")}:
        for directory in parent.glob("baton-*-*-*"):
            if _left(directory):
                log.info("removing %s: its owner is dead", directory)
                await _kill(family_of(writers_to(str(directory))))
                shutil.rmtree(directory, ignore_errors=True)


async def _kill(pids: set[int]) -> None:
    """And wait a little until they are gone: what still runs may still write."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DIE_TIMEOUT_S):
            while not all(map(gone, pids)):  # noqa: ASYNC110 (not our children: nobody tells us)
                await asyncio.sleep(_POLL_S)


def _left(directory: Path) -> bool:
    name = _NAME.fullmatch(directory.name)
    try:
        ours = directory.lstat().st_uid == os.getuid() and (directory / _OWNER).read_text() == machine_id()
    except OSError:
        return False
    return name is not None and ours and gone(int(name[1]))
