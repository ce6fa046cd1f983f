"""The logs of a stack on this machine: one directory while it runs, a copy of it when a start failed.

    <worker_id>.log    a local worker
    router.log         the router
    ray/               a link to the session logs of the Ray we started; its workers' are worker-*.err

Life: made before the first process -> gone with the stack; the copy stays until somebody removes it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from baton.cli.progress import say
from baton.core.errors import BatonError

_QUIET = re.compile(r"(\S+ \S+ )?(DEBUG|INFO|WARNING)\b")
_MAX_LINES = 15


@contextlib.contextmanager
def kept_if_failed(logs: Path) -> Iterator[None]:
    """Around a start. What went wrong may be said in the logs only, and they are about to be removed."""
    try:
        yield
    except BatonError:
        if any(log.stat().st_size for log in logs.glob("**/*.log")):
            # Without a process id in its name: it is not taken for the directory of a stack that was killed.
            kept = tempfile.mkdtemp(prefix="baton-failed-")
            with contextlib.suppress(OSError, shutil.Error):  # Ray removes its own while we copy
                shutil.copytree(logs, kept, dirs_exist_ok=True, ignore_dangling_symlinks=True)
            say(f"The logs of this start are kept in {kept}")
        raise


def link_ray_logs(logs: Path) -> None:
    """Of the Ray that this process started; a joined cluster keeps its logs where its operator says."""
    for session in Path("/tmp").glob(f"baton-ray-{os.getpid()}-*/session_latest/logs"):
        (logs / "ray").symlink_to(session)


def last_words(log: Path) -> str:
    """The last thing it said that is no plain news: an error with its traceback, or a sentence without a level."""
    lines = log.read_text(errors="replace").strip().splitlines()
    runs = itertools.groupby(lines, key=lambda line: bool(_QUIET.match(line)))
    errors = [list(run) for quiet, run in runs if not quiet]
    return "\n".join(errors[-1][-_MAX_LINES:]) if errors else f"it logged no error ({len(lines)} lines)"
