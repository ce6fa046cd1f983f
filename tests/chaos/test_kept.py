"""A supervisor that keeps processes alive, and knows an end that a fault caused from a crash."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from baton.chaos.kept import Kept, Program
from baton.chaos.netns import Host
from baton.cluster.processes import gone
from baton.core.errors import SetupError

SERVES = "import sys, time; print('ready', flush=True); time.sleep(60)"
ENDS_IN_ORDER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("ready", flush=True)
time.sleep(60)
"""
CRASHES = """
import pathlib, sys, time
print("ready", flush=True)
flag = pathlib.Path(sys.argv[1])
if not flag.exists():
    flag.touch()
    raise ValueError("the last words")
time.sleep(60)
"""
SAYS_ON_FD = "import os, sys, time; os.write(int(sys.argv[1]), b'ready\\n'); time.sleep(60)"


def kept(tmp_path: Path, code: str, *arguments: str) -> Kept:
    return Kept("one", Host("one"), Program((sys.executable, "-c", code, *arguments)), tmp_path / "one.log")


def run(one: Kept, story: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        try:
            async with asyncio.timeout(60):
                await one.start(20.0)
                await story()
        finally:
            pid = one.pid
            await one.stop()
            assert pid is None or gone(pid)

    asyncio.run(main())


async def next_boot(one: Kept, restarts: int) -> None:
    while one.restarts < restarts or not one.serving.is_set():
        await asyncio.sleep(0.01)


def test_what_a_fault_kills_comes_back_and_is_no_crash(tmp_path: Path) -> None:
    one = kept(tmp_path, SERVES)

    async def story() -> None:
        first = one.signal(signal.SIGKILL)
        await next_boot(one, 1)
        assert one.pid not in (None, first)
        assert one.exit_code(first) == -9
        assert one.crashes == []

    run(one, story)


def test_what_ends_by_itself_is_a_crash_with_its_last_words(tmp_path: Path) -> None:
    one = kept(tmp_path, CRASHES, str(tmp_path / "flag"))

    async def story() -> None:
        await next_boot(one, 1)
        (crash,) = one.crashes
        assert "code 1" in crash
        assert "the last words" in crash
        assert one.tracebacks() == ["1x ValueError: the last words"]

    run(one, story)


def test_an_end_in_order_is_told_from_others_by_its_code(tmp_path: Path) -> None:
    one = kept(tmp_path, ENDS_IN_ORDER)

    async def story() -> None:
        pid = one.signal(signal.SIGTERM)
        await next_boot(one, 1)
        assert one.exit_code(pid) == 0
        assert one.crashes == []

    run(one, story)


def test_a_frozen_process_is_seen_to_be_and_is_stopped_all_the_same(tmp_path: Path) -> None:
    one = kept(tmp_path, SERVES)

    async def story() -> None:
        one.signal(signal.SIGSTOP)
        async with asyncio.timeout(5):
            while one.state != "T":
                await asyncio.sleep(0.01)

    run(one, story)


def test_a_line_on_a_descriptor_counts_too(tmp_path: Path) -> None:
    one = kept(tmp_path, SAYS_ON_FD, "{fd}")

    async def story() -> None:
        assert one.serving.is_set()

    run(one, story)


def test_who_never_serves_is_an_error_with_its_log(tmp_path: Path) -> None:
    one = kept(tmp_path, "import sys, time; print('no model', file=sys.stderr, flush=True); time.sleep(60)")

    async def main() -> None:
        try:
            with pytest.raises(SetupError, match=r"(?s)did not serve.*no model"):
                await one.start(1.0)
        finally:
            await one.stop()

    asyncio.run(main())
