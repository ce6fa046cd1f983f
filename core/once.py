"""Things that are made once per host, however many processes want them: a converted model, a compiled library.

Life of such a directory:
1. Whoever finds it complete uses it, without a lock.
2. Under a file lock it is built in a temporary directory beside its place: whoever comes second waits, then finds it.
3. One rename makes it visible. A crash leaves a temporary directory that the next holder of the lock removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from baton.core.errors import NotWritable, SetupError

LOCK_TIMEOUT_S = 900.0
SETTING = "model.cache_dir"
"""Where most of it is kept."""
_LOCK_POLL_S = 0.1

Files = TypeVar("Files")


def made_once(
    directory: Path, opened: Callable[[Path], Files | None], build: Callable[[Path], None], what: str,
    setting: str = SETTING,
) -> Files:
    """What `opened` finds in `directory`; if nothing, `build` makes it first, in a directory that is then renamed.

    `what` says what is done, as in "convert a.gguf", and `setting` how to choose another place. Safe to call from many
    processes at once. Raises NotWritable, or SetupError if others take too long."""
    files = opened(directory)
    if files is not None:
        return files
    # Not with_suffix: names such as `SmolLM2-135M.Q4_1-0a1b` have dots of their own.
    lock, building = (directory.with_name(directory.name + suffix) for suffix in (".lock", ".building"))
    with locked(lock, f"another process to {what}", setting=setting):
        files = opened(directory)
        if files is not None:
            return files
        for stale in (building, directory):
            shutil.rmtree(stale, ignore_errors=True)
        try:
            building.mkdir()
            build(building)
            building.rename(directory)
        except OSError as e:
            raise NotWritable(f"cannot {what} in {building}: {e}. Set {setting}.") from e
        finally:
            shutil.rmtree(building, ignore_errors=True)
    files = opened(directory)
    assert files is not None, directory
    return files


@contextlib.contextmanager
def locked(
    path: Path, waiting_for: str, timeout_s: float = LOCK_TIMEOUT_S, setting: str = SETTING
) -> Iterator[None]:
    """Hold a lock file; it is released when its process dies. Raises NotWritable, or SetupError when others hold it
    too long."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise NotWritable(f"cannot write to {path.parent}: {e}. Set {setting}.") from e
    never = threading.Event()  # flock has no deadline of its own: try, wait, try again
    try:
        for _ in range(max(1, int(timeout_s / _LOCK_POLL_S))):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                never.wait(_LOCK_POLL_S)
        else:
            raise SetupError(f"waited {timeout_s:.0f} s for {waiting_for} ({path} is locked). End it and try again.")
        yield
    finally:
        os.close(descriptor)
